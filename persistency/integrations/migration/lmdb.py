"""LMDB: the keys and values of an environment, with the extra `lmdb`.

An environment has one database without a name, and others that have one, which become categories. LMDB trusts its
file: a damaged or forged one can crash the process that opens it. So import one only from where you trust.

| a database that | becomes |
|---|---|
| is plain | a row for each key; the value is bytes |
| may have several values under a key (`dupsort`) | a row for each key; the value is the list of them, in their order |
| has numbers as keys (`integerkey`) | rows whose key is the tuple of that number, whatever `keys` says |

Rules:
  1. It is opened for reading. Where it has a lock file that one is used, as every reader does, so that a service may
     write meanwhile; where it has none, none is made, and nobody else may have it open.
  2. It is read in pages of bounded size, each a transaction of its own: who writes meanwhile isn't kept from using
     pages again.

Doesn't know: jobs, what the bytes mean.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from persistency import Corrupt, Misuse, RawKey, Unavailable
from persistency.integrations.migration.items import Item, Lost, Part, Reason, chosen

try:
    import lmdb
except ModuleNotFoundError as _missing:
    if (_missing.name or "").partition(".")[0] != "lmdb":
        raise
    raise ModuleNotFoundError(
        "persistency.integrations.migration.lmdb needs the extra 'lmdb': pip install 'persistency[lmdb]'",
        name=_missing.name,
    ) from None

T = TypeVar("T")

_KEYS = ("raw", "text", "bytes")
_DATABASES_MAX = 4_096
_PAGE_KEYS_MAX = 256
_PAGE_BYTES_MAX = 1024 * 1024
_VALUE_BYTES_MAX = 256 * 1024 * 1024
_ENTRY_BYTES = 48  # what a database without a name has of each other one


class Lmdb:
    """An environment of LMDB, a directory or a file, to be brought over.

    `tables`: the names of the databases to bring, `""` for the one without a name; without it all of them. `keys`:
    `"raw"` for `RawKey`s, the bytes as they are; `"text"` for tuples of one text; `"bytes"` for tuples of one part of
    bytes.

    Raises `Misuse` for a wrong argument.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tables: Iterable[str] | None = None,
        keys: Literal["raw", "text", "bytes"] = "raw",
    ) -> None:
        if keys not in _KEYS:
            raise Misuse(f"keys must be one of {', '.join(map(repr, _KEYS))}, not {keys!r:.40}")
        self.path: Path = Path(path)
        self._tables = tables
        self._key_of = {"raw": RawKey, "text": _text, "bytes": bytes}[keys]

    @contextmanager
    def open(self) -> Iterator[Sequence[Part]]:
        """Open it, to be read. Raises as `Origin` says."""
        directory = self.path.is_dir()
        data = self.path / "data.mdb" if directory else self.path
        if not data.is_file():
            self.path.stat()  # which says it, if nothing is there at all
            raise Corrupt(f"{self.path} is no environment of LMDB", hint="Pass the directory that has data.mdb in it.")
        lock = self.path / "lock.mdb" if directory else Path(f"{self.path}-lock")
        environment = _Environment(self.path, lock, directory=directory)
        try:
            tables = self._tables if self._tables is None or isinstance(self._tables, str) else list(self._tables)
            names = environment.names(tables)
            wanted = chosen(names, tables, self.path)
            yield [_Database(environment, name, self._key_of, names) for name in names if name in wanted]
        finally:
            environment.close()

    def __repr__(self) -> str:
        return f"<Lmdb {str(self.path)!r}>"


class _Environment:
    """An environment that is open for reading."""

    def __init__(self, path: Path, lock: Path, *, directory: bool) -> None:
        self._path = path
        self._lock = lock
        self._locks = os.access(lock, os.R_OK | os.W_OK)
        try:
            self._env = lmdb.open(
                str(path),
                subdir=directory,
                readonly=True,
                lock=self._locks,
                create=False,
                max_dbs=_DATABASES_MAX,
                readahead=False,
            )
        except lmdb.Error as error:
            raise self._told(error) from error

    def close(self) -> None:
        """Close it."""
        self._env.close()

    def read(self, step: Callable[[Any], T]) -> T:
        """Return what a function of a transaction gives."""
        try:
            try:
                return self._read(step)
            except lmdb.MapResizedError:  # who writes has let it grow
                self._env.set_mapsize(0)
                return self._read(step)
        except lmdb.Error as error:
            raise self._told(error) from error

    def _read(self, step: Callable[[Any], T]) -> T:
        with self._env.begin() as transaction:
            found = step(transaction)
        if not self._locks and self._lock.exists() and os.access(self._lock, os.R_OK | os.W_OK):
            raise Unavailable(
                f"somebody has opened {self._path} meanwhile", hint="Nothing in it was harmed; try again."
            )
        return found

    def database(self, name: str | None, transaction: Any) -> Any:
        """Return a database."""
        return self._env.open_db(None if name is None else _spelled(name), txn=transaction, create=False)

    def names(self, tables: Iterable[str] | None) -> list[str | None]:
        """Return the names of all databases; that of the first one, if it has items, is `None`.

        `tables`: these are enough, if they are there. Then no other one is opened.
        """
        if tables is not None and all(isinstance(table, str) and table for table in tables):
            names = self._names({_spelled(table) for table in tables})
            if set(tables) <= set(names):
                return names
        return self._names(None)

    def _names(self, enough: set[bytes] | None) -> list[str | None]:

        def find(transaction: Any) -> list[str | None]:
            found: list[str | None] = []
            with transaction.cursor(db=self._env.open_db(None, txn=transaction, create=False)) as cursor:
                # A name ends with a NUL, so that no name has one in it.
                likely = [key for key, value in cursor if len(value) == _ENTRY_BYTES and b"\0" not in key]
            if enough is not None:
                likely = [key for key in likely if key in enough]
            for key in likely:
                try:
                    self._env.open_db(key, txn=transaction, create=False)
                except (lmdb.IncompatibleError, lmdb.NotFoundError, lmdb.BadValsizeError):
                    continue  # an item that is as long by chance
                found.append(key.decode("utf-8", "surrogateescape"))
            own = self._env.stat()["entries"] - len(found)
            return [None, *found] if own or not found else found

        return self.read(find)

    def _told(self, error: lmdb.Error) -> Corrupt | Unavailable:
        if isinstance(error, lmdb.InvalidError | lmdb.VersionMismatchError | lmdb.CorruptedError):
            return Corrupt(f"{self._path} is no environment of LMDB: {error}", hint="Is it the one you mean?")
        hint = "Who else has it open? Then try again."
        if isinstance(error, lmdb.DbsFullError):
            hint = f"It has over {_DATABASES_MAX:,} databases. Name those to bring, some thousands at a time."
        elif isinstance(error, lmdb.ReadersFullError):
            hint = "It has as many readers as it may have. Try again when one of them is gone."
        return Unavailable(f"{self._path} can't be read: {error}", hint=hint)


class _Database:
    """One database of an environment."""

    def __init__(
        self, environment: _Environment, name: str | None, key_of: Callable[[bytes], Any], names: list[str | None]
    ) -> None:
        self.name = name
        self._environment = environment
        self._key_of = key_of
        # What the others are called is written among the items of the one that has no name.
        self._not_items = {_spelled(other) for other in names if other is not None} if name is None else set()
        count, flags = environment.read(self._look)
        self._several: bool = flags["dupsort"]
        # Where a key may have several values only these are counted, and how many keys there are can't be told.
        self.count: int = 0 if self._several else count - len(self._not_items)
        if flags["integerkey"]:
            self._key_of = _number

    def _look(self, transaction: Any) -> tuple[int, Any]:
        database = self._environment.database(self.name, transaction)
        return transaction.stat(database)["entries"], database.flags(transaction)

    def __iter__(self) -> Iterator[Item]:
        last: bytes | None = None
        while page := self._environment.read(partial(self._page, last)):
            last = page[-1][0]
            for key, value in page:
                if key not in self._not_items:
                    yield Item(_tried(self._key_of, key), value)

    def _page(self, last: bytes | None, transaction: Any) -> list[tuple[bytes, Any]]:
        """Return the items behind a key, up to the bounds of a page."""
        page: list[tuple[bytes, Any]] = []
        nbytes = 0
        with transaction.cursor(db=self._environment.database(self.name, transaction)) as cursor:
            there = cursor.first() if last is None else cursor.set_range(last)
            if there and last is not None and cursor.key() == last:
                there = cursor.next_nodup()
            while there and len(page) < _PAGE_KEYS_MAX and nbytes < _PAGE_BYTES_MAX:
                key = cursor.key()
                value, size = self._several_of(cursor) if self._several else (cursor.value(), 0)
                page.append((key, value))
                nbytes += len(key) + (size or len(value))
                there = cursor.next_nodup()
        return page

    def _several_of(self, cursor: Any) -> tuple[Any, int]:
        values, size = [], 0
        for value in cursor.iternext_dup():
            values.append(value)
            size += len(value)
            if size > _VALUE_BYTES_MAX:
                return Lost(Reason.large, f"over {_VALUE_BYTES_MAX:,} bytes under one key"), size
        return values, size


def _spelled(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _tried(key_of: Callable[[bytes], Any], key: bytes) -> Any:
    try:
        return key_of(key)
    except UnicodeDecodeError as error:
        return Lost(Reason.no_key, f"{key!r:.200} isn't text: {error.reason}")


def _text(key: bytes) -> str:
    return key.decode()


def _number(key: bytes) -> int:
    return int.from_bytes(key, sys.byteorder)
