"""Checking a job's file: what SQLite itself finds wrong with it, and what isn't as this package would have written it.

Rules:
  1. What is found is a text in a list, and so is damage that stops the search; only what keeps a file from being looked
     at at all is raised.
  2. The file is read through a connection of its own, in one read transaction: what is checked is of one moment, and
     nobody's writes wait for it.
  3. A damaged file neither exhausts nor detains: every statement has a limit, and so has their number.

Doesn't know: key tuples, what payloads mean, how to mend anything.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, TypeAlias, get_args

import apsw

from persistency.errors import Corrupt, Unavailable
from persistency.storage import looking, schema
from persistency.storage.changes import DROPPED
from persistency.storage.files import identity
from persistency.storage.port import ChangeKind
from persistency.storage.quota import USED, USED_MS
from persistency.storage.table import LATEST_MS

PROBLEMS_MAX = 100
CATEGORY_BYTES_MAX = 255
SLICE_ROWS = 1_000
_ROW_BYTES_MIN = 8  # in a page; no row is smaller
_SHOWN = 80  # characters of a key

Steps: TypeAlias = Generator[tuple[int, int | None], None, list[str]]

_NUMBERS = ("last_version", "clean", "syncs", LATEST_MS, USED, USED_MS, DROPPED, schema.ENDS)
_NEEDED = ("last_version", "clean", "syncs")
_META = "SELECT typeof(value), CAST(value AS BLOB) FROM meta WHERE name = ?"

# Of a row, with the last version as ?1: what is wrong with it, or NULL.
_WRONG_1 = (
    "CASE WHEN typeof(category) <> 'blob' THEN 'its category is ' || typeof(category)"
    " WHEN typeof(key) <> 'blob' THEN 'its key is ' || typeof(key)"
    " WHEN typeof(payload) <> 'blob' THEN 'its payload is ' || typeof(payload) END"
)
_WRONG_2 = _WRONG_1.removesuffix("END") + (
    "WHEN typeof(version) <> 'integer' THEN 'its version is ' || typeof(version)"
    " WHEN version < 0 OR version > ?1 THEN 'its version, ' || version || ', was never given'"
    " WHEN typeof(expires_ms) NOT IN ('integer', 'null') THEN 'its expires_ms is ' || typeof(expires_ms) END"
)
_LIVE = "CASE WHEN expires_ms IS NULL OR expires_ms > ?2 THEN octet_length(payload) ELSE 0 END"
# What isn't bytes sorts below all that is.
_STRANGE_CATEGORY = "FROM kv WHERE category < x''"
_STRANGE_KEY = "FROM kv WHERE category = ?1 AND key < x''"
_NEXT_CATEGORY = "SELECT category FROM kv WHERE category >= ? ORDER BY category LIMIT 1"
_SPAN = f"FROM kv WHERE category = ?3 AND key >= ?4 ORDER BY key LIMIT {SLICE_ROWS}"

_KINDS = ", ".join(f"'{kind}'" for kind in get_args(ChangeKind))
# With the last version as ?1, and that of the last change no longer kept as ?2.
_WRONG_CHANGE = (
    "CASE WHEN version <= 0 OR version > ?1 THEN 'its version was never given'"
    " WHEN version <= ?2 THEN 'it should no longer be kept'"
    f" WHEN typeof(kind) <> 'text' OR kind NOT IN ({_KINDS}) THEN 'its kind is unknown'"
    " WHEN typeof(category) <> 'blob' OR typeof(key) <> 'blob' THEN 'its category or key is no bytes'"
    " WHEN typeof(payload) <> iif(kind = 'put', 'blob', 'null') THEN 'its payload is ' || typeof(payload)"
    " WHEN stop IS NOT NULL AND (kind <> 'delete_range' OR typeof(stop) <> 'blob') THEN 'its stop is ' || typeof(stop)"
    " END"
)
_CHANGES = f"FROM changes WHERE version >= ?3 ORDER BY version LIMIT {SLICE_ROWS}"


def check(path: Path, *, vfs: str | None = None, lies_still: Callable[[], None] | None = None) -> Steps:
    """Look for what is wrong with a job's file, as it is at the first step; return the problems found.

    An empty list is returned for a sound one; of many problems the first 100 are given, and how many more there are.
    Yields how many rows and changes it has looked at. With `lies_still` the file is read as it lies there, and that is
    called at last, to raise if it was touched meanwhile.

    Raises `Corrupt` for what can't be taken for a job's file, `SchemaTooNew`, and `Unavailable` or another
    `StorageError` for what the system refuses.
    """
    was = identity(path)
    try:
        connection = looking.begin(path, vfs, immutable=lies_still is not None)
        try:
            found = schema.recognise(connection, path)
            problems = _Problems()
            try:
                yield from _File(connection, found, problems).look()
            except (apsw.CorruptError, apsw.NotADBError, apsw.IOError, UnicodeDecodeError, Corrupt) as error:
                if identity(path) != was:
                    raise Unavailable(f"{str(path)!r} was removed or replaced while it was checked") from error
                problems.add(f"it can't be read to its end: {error}")
            if lies_still is not None:
                lies_still()
            return problems.texts()
        finally:
            schema.close(connection)
    except (apsw.Error, UnicodeDecodeError) as error:
        raise schema.translated(error, f"can't check {str(path)!r}") from error


class _Problems:
    """The problems found so far; beyond the limit they are only counted."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._more = 0

    @property
    def room(self) -> int:
        return PROBLEMS_MAX - len(self._texts)

    def add(self, text: str) -> None:
        if self.room:
            self._texts.append(text)
        else:
            self._more += 1

    def count(self, more: int) -> None:
        self._more += more

    def texts(self) -> list[str]:
        return self._texts + ([f"and {self._more} more"] if self._more else [])


class _File:
    """One file that is being looked at."""

    def __init__(self, connection: apsw.Connection, found: int, problems: _Problems) -> None:
        self._execute: Callable[..., Any] = connection.cursor().execute
        self._format = found
        self._problems = problems
        self._numbers: dict[str, int] = {}
        self._seen = 0
        self._used = 0
        self._all_seen = True
        page_bytes, pages = connection.pragma("page_size"), connection.pragma("page_count")
        self._rows_max = pages * (page_bytes // _ROW_BYTES_MIN)

    def look(self) -> Generator[tuple[int, int | None], None, None]:
        yield 0, None
        for (text,) in self._execute(f"PRAGMA integrity_check({PROBLEMS_MAX})"):
            for line in text.splitlines():
                if line != "ok" and not line.startswith("***"):  # a heading
                    self._problems.add(line)
        yield 0, None
        if self._format == schema.FORMAT:
            self._look_at_meta()
        yield from self._look_at_rows()
        self._compare_used()
        if self._execute("SELECT 1 FROM sqlite_schema WHERE name = 'changes'").fetchall():
            yield from self._look_at_changes()

    def _look_at_meta(self) -> None:
        for name in _NUMBERS:
            row = self._execute(_META, (name,)).fetchall()
            if row and row[0][0] == "integer" and int(row[0][1]) >= 0:
                self._numbers[name] = int(row[0][1])
            elif row or name in _NEEDED:
                self._problems.add(f"meta: {name} is no number" if row else f"meta: {name} is missing")
        row = self._execute(_META, ("job_id",)).fetchall()
        if not row or row[0][0] != "text" or not row[0][1] or not _is_utf8(row[0][1]):
            self._problems.add("meta: job_id is no text" if row else "meta: job_id is missing")
        for name in (LATEST_MS, USED_MS):
            if self._numbers.get(name, 0) > schema.TIME_MS_MAX:
                self._problems.add(f"meta: {name} is beyond any clock's")

    # -- rows ------------------------------------------------------------------------------------------------------

    def _look_at_rows(self) -> Generator[tuple[int, int | None], None, None]:
        self._strange(_STRANGE_CATEGORY)
        category = self._next_category(b"")
        while category is not None:
            if not 0 < len(category) <= CATEGORY_BYTES_MAX or not _is_utf8(category):
                self._problems.add(f"category {_shown(category)} is not 1 to {CATEGORY_BYTES_MAX} bytes of UTF-8")
            self._strange(_STRANGE_KEY, category)
            yield from self._look_at_category(category)
            category = self._next_category(category + b"\0")

    def _next_category(self, start: bytes) -> bytes | None:
        found = self._execute(_NEXT_CATEGORY, (start,)).fetchall()
        if not found:
            return None
        category: bytes = found[0][0]
        self._advance(start, category, 0)
        return category

    def _look_at_category(self, category: bytes) -> Generator[tuple[int, int | None], None, None]:
        wrong = _WRONG_2 if self._format == schema.FORMAT else _WRONG_1
        live = _LIVE if self._format == schema.FORMAT else "0"
        slice_ = (
            f"SELECT count(*), count(wrong), coalesce(sum(live), 0), max(key)"
            f" FROM (SELECT key, {wrong} AS wrong, {live} AS live {_SPAN})"
        )
        start = b""
        while True:
            span = (*self._bindings(), category, start)
            count, wrong_rows, live_bytes, last = self._execute(slice_, span).fetchall()[0]
            if not count:
                return
            if wrong_rows:
                self._tell(f"SELECT category, key, {wrong} AS wrong {_SPAN}", span, wrong_rows)
            self._used += live_bytes
            self._advance(start, last, count)
            yield self._seen, None
            start = last + b"\0"

    def _bindings(self) -> tuple[int, int]:
        return self._numbers.get("last_version", 2**63 - 1), self._numbers.get(USED_MS, 0)

    def _strange(self, where: str, *category: bytes) -> None:
        """Tell of the rows that stand where nothing that isn't bytes should."""
        limited = f"SELECT category, key, {_WRONG_1} AS wrong {where} LIMIT {SLICE_ROWS}"
        count = self._execute(f"SELECT count(*) FROM ({limited})", category).fetchall()[0][0]
        if count:
            self._all_seen = False
            self._tell(limited, category, count)

    def _tell(self, rows: str, span: tuple[Any, ...], count: int) -> None:
        """Tell of the rows of a span that are wrong, `count` in all, as far as there is room."""
        told = self._execute(
            f"SELECT CAST(category AS BLOB), CAST(key AS BLOB), wrong FROM ({rows})"
            f" WHERE wrong IS NOT NULL LIMIT {self._problems.room}",
            span,
        ).fetchall()
        for category, key, wrong in told:
            self._problems.add(f"row {_shown(category)}, {_shown(key)}: {wrong}")
        self._problems.count(count - len(told))

    def _advance(self, start: Any, last: Any, count: int) -> None:
        """Note how far it is. Raises `Corrupt` where a walk that goes on like this would never end."""
        self._seen += count
        if last < start or self._seen > self._rows_max:
            raise Corrupt("rows are out of order, or there are more than the file has room for")

    def _compare_used(self) -> None:
        numbers = self._numbers
        if {USED, USED_MS} <= numbers.keys() and self._all_seen and numbers[USED] != self._used:
            self._problems.add(f"meta: {USED} is {numbers[USED]}, but the payloads have {self._used}")

    # -- changes ---------------------------------------------------------------------------------------------------

    def _look_at_changes(self) -> Generator[tuple[int, int | None], None, None]:
        last_version = self._numbers.get("last_version", 2**63 - 1)
        dropped = self._numbers.get(DROPPED, 0)
        if dropped > last_version:
            self._problems.add(f"meta: {DROPPED} is {dropped}, which was never given")
            dropped = 0
        slice_ = (
            f"SELECT count(*), count(wrong), max(version) FROM (SELECT version, {_WRONG_CHANGE} AS wrong {_CHANGES})"
        )
        start = -(2**63)
        while start < 2**63:
            span = (last_version, dropped, start)
            count, wrong_rows, last = self._execute(slice_, span).fetchall()[0]
            if not count:
                return
            if wrong_rows:
                self._tell_changes(span, wrong_rows)
            self._advance(start, last, count)
            yield self._seen, None
            start = last + 1

    def _tell_changes(self, span: tuple[int, int, int], count: int) -> None:
        told = self._execute(
            f"SELECT version, wrong FROM (SELECT version, {_WRONG_CHANGE} AS wrong {_CHANGES})"
            f" WHERE wrong IS NOT NULL LIMIT {self._problems.room}",
            span,
        ).fetchall()
        for version, wrong in told:
            self._problems.add(f"change {version}: {wrong}")
        self._problems.count(count - len(told))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _shown(data: bytes) -> str:
    text = repr(data)
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
