"""Foreign files: SQLite files of other programs, read beside whoever writes them, and never written.

A file beside which there is no log and no journal is read as one that nobody changes, so that nothing is made beside
it, and nobody is kept waiting. That it has stayed so is looked at after every page; if it hasn't, or there is a log,
it is read under SQLite's own locks.

Rules:
  1. No byte of the file, of its log or its journal is changed. At the worst the index of a log that a killed process
     has left (`-shm`) is made anew.
  2. Rows are read in pages of bounded size, and no transaction is open between two of them: a service that writes
     meanwhile isn't kept waiting, and its log doesn't grow. An item that is there throughout is seen, at least once.
  3. The schema of the file isn't trusted: only real tables are read, and no function that is named in it is called. Nor
     are its pages: rows that don't rise are damage, and so no damage is read for ever.
  4. Of a link it is the file that counts, for its log lies beside that one. What is no file, such as a pipe, isn't
     opened.
  5. Text that isn't UTF-8 keeps its bytes, as lone surrogates.

Doesn't know: what is in the tables, jobs.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from time import sleep, time
from typing import Any, Final, Self, TypeAlias, TypeVar

from persistency import Corrupt, PersistencyError, Unavailable

T = TypeVar("T")
Row: TypeAlias = tuple[Any, ...]

PAGE_ROWS_MAX: Final = 256
PAGE_BYTES_MAX: Final = 1024 * 1024
VALUE_BYTES_MAX: Final = 256 * 1024 * 1024
"""Values longer than this aren't read at all."""
KEY_BYTES_MAX: Final = 1024 * 1024
"""Nor are keys longer than this: a job takes none that is."""
_SMALL_BYTES_MAX = 8 * 1024
_BUSY_SECONDS = 10.0
_TICK_SECONDS = 0.05  # longer than a tick of the clock that gives files their times
_FIRST_ROWID = -(2**63)
_LAST_ROWID = 2**63 - 1


class Foreign:
    """A SQLite file that isn't ours. Raises `Corrupt` if it is none, `Unavailable` if it can't be read now."""

    def __init__(self, path: Path) -> None:
        self.path: Path = path
        self._file = Path(os.path.realpath(path))
        self._seen = _quiet(self._file)
        self._db = self._connected()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def tables(self) -> dict[str, list[str]]:
        """Return the real tables of the file, each with the names of its columns; without, if it can't be asked for."""
        found = self.rows("SELECT name FROM sqlite_master WHERE type = 'table' AND rootpage > 0 ORDER BY rowid")
        if not all(isinstance(name, str) for (name,) in found):
            raise Corrupt(f"{self.path} can't be read: a table has no name", hint="It is damaged.")
        return {name: self._columns(name) for (name,) in found if not name.startswith("sqlite_")}

    def _columns(self, name: str) -> list[str]:
        if not _has_spelling(name):
            return []
        return [row[1] for row in self.rows(f"PRAGMA table_info({quoted(name)})")]

    def has_rowids(self, table: str) -> bool:
        """Return whether a table can be walked through."""
        try:
            self.rows(" ".join(("SELECT _rowid_ FROM", quoted(table), "LIMIT 0")))
        except Corrupt:
            return False
        return True

    def rows(self, statement: str, *values: object) -> list[Row]:
        """Return all rows of a statement that has few."""
        return self._sure(lambda: self._db.execute(statement, values).fetchall())

    def count(self, table: str) -> int:
        """Return how many rows a table has; 0 if that can't be told: what can be read of it may still be of use."""
        try:
            return int(self.rows(" ".join(("SELECT count(*) FROM", quoted(table))))[0][0])
        except Corrupt:
            return 0

    def walk(self, statement: str) -> Iterator[Row]:
        """Give the rows of `SELECT _rowid_, ... WHERE _rowid_ >= ? ORDER BY _rowid_`, a page at a time."""
        start = _FIRST_ROWID
        while page := self._sure(lambda start=start: self._page(statement, start)):  # type: ignore[misc]
            for row in page:
                if type(row[0]) is not int or row[0] < start:
                    raise Corrupt(f"{self.path} can't be read: its rows are out of order", hint="It is damaged.")
                start = row[0] + 1
                yield row
            if start > _LAST_ROWID:
                return

    def _page(self, statement: str, start: int) -> list[Row]:
        page: list[Row] = []
        nbytes = 0
        cursor = self._db.execute(statement, (start,))
        try:
            for row in cursor:
                page.append(row)
                nbytes += sum(len(cell) for cell in row if isinstance(cell, str | bytes))
                if len(page) >= PAGE_ROWS_MAX or nbytes >= PAGE_BYTES_MAX:
                    break
        finally:
            cursor.close()  # and with it the transaction
        return page

    def _sure(self, read: Callable[[], T]) -> T:
        """Return what a reading gives, once it is sure that nobody has written meanwhile, or under locks."""
        while True:
            try:
                found = read()
            except sqlite3.Error as error:
                if self._seen is None or _look(self._file) == self._seen:
                    raise _told(self.path, error) from error
            else:
                if self._seen is None or _look(self._file) == self._seen:
                    return found
            self._db.close()
            self._seen = None
            self._db = self._connected()

    def _connected(self) -> sqlite3.Connection:
        mode = "mode=ro" if self._seen is None else "mode=ro&immutable=1"
        try:
            db = sqlite3.connect(f"{self._file.as_uri()}?{mode}", timeout=_BUSY_SECONDS, isolation_level=None, uri=True)
        except sqlite3.Error as error:
            raise _told(self.path, error) from error
        db.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
        for pragma in ("trusted_schema = OFF", "query_only = ON", "cell_size_check = ON", "mmap_size = 0"):
            db.execute(f"PRAGMA {pragma}").close()
        return db


def quoted(name: str) -> str:
    """Return a name as SQL takes it."""
    return '"' + name.replace('"', '""') + '"'


def _has_spelling(name: str) -> bool:
    """Return whether SQL can spell a name: it is UTF-8, and has no NUL."""
    try:
        return b"\0" not in name.encode()
    except UnicodeEncodeError:
        return False


def bounded(column: str, nbytes_max: int) -> str:
    """Return what SQL gives of a column: `NULL` where it is longer. A text is measured in bytes, up to its last NUL."""
    return " ".join(
        (
            f"CASE WHEN typeof({column}) = 'text' AND length(CAST({column} AS BLOB)) > {nbytes_max} THEN NULL",
            f"WHEN typeof({column}) = 'blob' AND length({column}) > {nbytes_max} THEN NULL ELSE {column} END",
        )
    )


def cut(column: str) -> str:
    """Return what SQL gives of a column that is never long: the beginning, where it is."""
    return (
        f"CASE WHEN typeof({column}) IN ('text', 'blob') AND length(CAST({column} AS BLOB)) > {_SMALL_BYTES_MAX} "
        f"THEN substr({column}, 1, {_SMALL_BYTES_MAX}) ELSE {column} END"
    )


def _look(path: Path) -> tuple[int, ...] | None:
    """Return what tells whether a file was changed; `None` if somebody may have it open, so that locks are needed.

    Raises `Corrupt` if it, or what lies beside it, is no file: to open a pipe is to wait for whoever writes to it.
    """
    found = {}
    for ending in ("", "-wal", "-journal", "-shm"):
        try:
            found[ending] = os.lstat(f"{path}{ending}")
        except FileNotFoundError:
            if not ending:
                raise
            continue
        if not stat.S_ISREG(found[ending].st_mode):
            raise Corrupt(f"{path}{ending} is no file", hint="Nothing of it was read: what has put it there?")
    if "-wal" in found or "-journal" in found:
        return None
    return found[""].st_ino, found[""].st_size, found[""].st_mtime_ns


def _quiet(path: Path) -> tuple[int, ...] | None:
    """Return the same, of a file whose next change will be seen: its time is from an earlier tick of the clock."""
    seen = _look(path)
    if seen is not None and abs(time() - seen[-1] / 1e9) < _TICK_SECONDS:
        sleep(_TICK_SECONDS)
        return seen if _look(path) == seen else None
    return seen


def _told(path: Path, error: sqlite3.Error) -> PersistencyError:
    code = getattr(error, "sqlite_errorcode", 0)
    if code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR):
        return Unavailable(f"{path} can't be read now: {error}", code, hint="Somebody writes to it; try again.")
    if code & 0xFF in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        hint = (
            "Was its program killed while it wrote? Have that program open it once, which mends it. Or is its "
            "directory one that can't be written to, with a log in it? Then copy all its files to another one."
        )
        return Unavailable(f"{path} can't be read: {error}", code, hint=hint)
    return Corrupt(f"{path} can't be read: {error}", code, hint="Is it the file you mean? If it is, it is damaged.")
