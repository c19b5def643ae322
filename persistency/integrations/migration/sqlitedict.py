"""sqlitedict: the items of the tables of a file, read without the library.

A file has a table for each `tablename` (`unnamed` where none was given), with the columns `key` and `value`. What is
in them is what `encode` and `encode_key` have made; nothing in the file says what that was. So it is guessed:

| stored | taken for |
|---|---|
| bytes that are a pickle of protocol 2 or later, packed by zlib or not | the pickle: what sqlitedict writes by itself |
| other bytes, numbers | themselves |
| text, where every text of the table is JSON, and some are an object, a list, or text in quotes | what that says |
| other text | itself |
| a key that is the base64 of a pickle | the pickle: what sqlitedict's own `encode_key` writes |

Rules:
  1. What is guessed can be said instead: `encoded` for values, `keys` for keys.
  2. That text was taken for JSON is told, and that it could have been.
  3. A table that has other columns isn't one of sqlitedict's, and is passed over, which is told too.

Doesn't know: jobs, how pickles are read.
"""

from __future__ import annotations

import os
from base64 import b64decode
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

from persistency import Corrupt, Misuse
from persistency.integrations.migration.diskcache import is_cache
from persistency.integrations.migration.foreign import (
    KEY_BYTES_MAX,
    PAGE_BYTES_MAX,
    PAGE_ROWS_MAX,
    VALUE_BYTES_MAX,
    Foreign,
    bounded,
    quoted,
)
from persistency.integrations.migration.items import Item, Lost, Part, Parts, Pickled, Reason, chosen
from persistency.integrations.migration.jsontext import JSON_BYTES_MAX, read_json
from persistency.integrations.migration.pickles import pickle_in

Encoded: TypeAlias = Literal["auto", "pickle", "json", "plain"]

_ENCODED = ("auto", "pickle", "json", "plain")
_KEYS = ("auto", "text", "pickle")
_SURELY_JSON = ("{", "[", '"')


class Sqlitedict:
    """A file of sqlitedict, to be brought over.

    `tables`: the names of the tables to bring; without it all of them. `encoded`: what the values are: `"pickle"` (of
    any protocol), `"json"` (text or bytes), `"plain"` (what SQLite holds is the value), or `"auto"`, a guess for each
    table. `keys`: `"text"`, `"pickle"` (what `encode_key` of sqlitedict writes), or `"auto"`.

    Raises `Misuse` for a wrong argument.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tables: Iterable[str] | None = None,
        encoded: Encoded = "auto",
        keys: Literal["auto", "text", "pickle"] = "auto",
    ) -> None:
        if encoded not in _ENCODED:
            raise Misuse(f"encoded must be one of {', '.join(map(repr, _ENCODED))}, not {encoded!r:.40}")
        if keys not in _KEYS:
            raise Misuse(f"keys must be one of {', '.join(map(repr, _KEYS))}, not {keys!r:.40}")
        self.path: Path = Path(path)
        self._tables = tables
        self._encoded: Encoded = encoded
        self._keys = keys

    @contextmanager
    def open(self) -> Iterator[Sequence[Part]]:
        """Open it, to be read. Raises as `Origin` says."""
        if self.path.stat() and not self.path.is_file():
            raise Corrupt(f"{self.path} is no file of sqlitedict", hint="Pass the file that SqliteDict was given.")
        with Foreign(self.path) as file:
            tables = file.tables()
            if is_cache(tables):
                raise Corrupt(
                    f"{self.path} is the file of a diskcache",
                    hint="Use Diskcache, or --from diskcache, for its directory.",
                )
            others = {name: why for name, columns in tables.items() if (why := _other(file, name, columns))}
            names = [name for name in tables if name not in others]
            if not names:
                told = "".join(f" {name!r:.100}: {why}." for name, why in others.items())
                raise Corrupt(f"{self.path} has no table of sqlitedict", hint=f"Was it made by sqlitedict?{told:.2000}")
            wanted = chosen(names, self._tables, self.path)
            guessed: dict[str, str] = {}
            parts = [_Table(file, name, self._encoded, self._keys, guessed) for name in names if name in wanted]
            yield Parts(parts, others if self._tables is None else {}, guessed)

    def __repr__(self) -> str:
        return f"<Sqlitedict {str(self.path)!r}>"


def _other(file: Foreign, name: str, columns: list[str]) -> str:
    """Return why a table is none of sqlitedict's; nothing if it is one."""
    if not columns:
        return "its name can't be asked for"
    if sorted(columns) != ["key", "value"]:
        return f"its columns are {', '.join(columns):.100}, and not key and value"
    return "" if file.has_rowids(name) else "it has no rowids"


class _Table:
    """One table."""

    def __init__(self, file: Foreign, name: str, encoded: Encoded, keys: str, guessed: dict[str, str]) -> None:
        self.name = name
        self._guessed = guessed
        self._file = file
        self._from = f"FROM {quoted(name)}"
        self.count = file.count(name)
        self._encoded = encoded
        self._keys = keys

    def __iter__(self) -> Iterator[Item | None]:
        value_of = yield from self._reader()
        columns = f"typeof(key), {bounded('key', KEY_BYTES_MAX)}, typeof(value), {bounded('value', VALUE_BYTES_MAX)}"
        rows = self._file.walk(f"SELECT _rowid_, {columns} {self._from} WHERE _rowid_ >= ? ORDER BY _rowid_")
        for _rowid, key_kind, key, kind, value in rows:
            yield Item(self._key(key_kind, key), _tried(value_of, kind, value))

    def _reader(self) -> Generator[None, None, Callable[[Any], Any]]:
        if self._encoded != "auto":
            return _READERS[self._encoded]
        all_json, some = yield from self._look_for_json()
        if all_json and some:
            self._guessed[self.name] = "text was taken for JSON"
            return _guessed_json
        if all_json is True:
            self._guessed[self.name] = "text was taken for text, and could be JSON: numbers, true, false, null"
        return _guessed

    def _look_for_json(self) -> Generator[None, None, tuple[bool | None, bool]]:
        """Return whether all text is JSON, `None` if there is none; and whether some of it is hardly anything else.

        It is all that can be read, in a damaged file.
        """
        statement = (
            f"SELECT _rowid_, {bounded('value', JSON_BYTES_MAX)} {self._from} "
            "WHERE _rowid_ >= ? AND typeof(value) = 'text' ORDER BY _rowid_"
        )
        found: bool | None = None
        some, rows, nbytes = False, 0, 0
        try:
            for _rowid, text in self._file.walk(statement):
                rows += 1
                nbytes += len(text or "")
                if rows >= PAGE_ROWS_MAX or nbytes >= PAGE_BYTES_MAX:
                    rows = nbytes = 0
                    yield None
                if text is None:
                    continue  # it is too long to be read, whatever it is
                try:
                    _json(text)
                except Lost as lost:
                    if lost.reason is Reason.large:
                        continue
                    return False, some
                found, some = True, some or text.lstrip()[:1] in _SURELY_JSON
        except Corrupt:
            pass  # which is told when the items are read
        return found, some

    def _key(self, kind: str, key: Any) -> Any:
        if key is None and kind != "null":
            return Lost(Reason.large, f"a key of over {KEY_BYTES_MAX:,} bytes")
        if key is None:
            return Lost(Reason.damaged, "it has no key")
        if self._keys == "text":
            return key
        data = _unpacked_key(key)
        if data is not None and (self._keys == "pickle" or pickle_in(data) == data):
            return Pickled(data)
        return Lost(Reason.damaged, "its key is no base64") if self._keys == "pickle" else key


def _unpacked_key(key: Any) -> bytes | None:
    if not isinstance(key, str):
        return None
    try:
        return b64decode(key, validate=True)
    except ValueError:
        return None


def _tried(value_of: Callable[[Any], Any], kind: str, value: Any) -> Any:
    if value is None and kind != "null":
        return Lost(Reason.large, f"over {VALUE_BYTES_MAX:,} bytes")
    try:
        return value_of(value)
    except Lost as lost:
        return lost


def _pickle(value: Any) -> Pickled:
    if not isinstance(value, bytes):
        raise Lost(Reason.damaged, f"a {type(value).__name__}, and no pickle")
    return Pickled(pickle_in(value) or value)


def _json(value: Any) -> Any:
    if not isinstance(value, str | bytes):
        raise Lost(Reason.damaged, f"a {type(value).__name__}, and no JSON")
    return read_json(value)


def _guessed(value: Any) -> Any:
    data = pickle_in(value) if isinstance(value, bytes) else None
    return value if data is None else Pickled(data)


def _guessed_json(value: Any) -> Any:
    return _json(value) if isinstance(value, str) else _guessed(value)


def _plain(value: Any) -> Any:
    return value


_READERS: dict[str, Callable[[Any], Any]] = {"pickle": _pickle, "json": _json, "plain": _plain}
