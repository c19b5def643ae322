"""diskcache: the items of a `Cache`, `FanoutCache`, `DjangoCache`, `Deque` or `Index`, read without the library.

A cache is a directory with a file `cache.db`, whose table `Cache` has a row for each item; long values are files of
their own below it. A `FanoutCache` is a directory of such directories, `000`, `001`, ..., which together are one part;
the caches, deques and indexes that were made from it lie in `cache`, `deque` and `index`, and are parts of those names.

Rules:
  1. A file is read only if it lies within the cache's own directory, is no link, and no link leads to it.
  2. The ends of items are given as they are written; whoever takes them knows what time it is.
  3. The settings of the cache, access times and counts are nothing that an item has. A tag stays behind, and is told.

Doesn't know: jobs, how pickles are read.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from persistency import Corrupt, Misuse, Unavailable
from persistency.integrations.migration.foreign import KEY_BYTES_MAX, VALUE_BYTES_MAX, Foreign, Row, bounded, cut
from persistency.integrations.migration.items import Item, Later, Lost, Part, Parts, Pickled, Reason, chosen
from persistency.integrations.migration.jsontext import read_json
from persistency.integrations.migration.pickles import unpacked

_FILE = "cache.db"
_NESTED = ("cache", "deque", "index")
_COLUMNS = ("key", "raw", "expire_time", "tag", "size", "mode", "filename", "value")
_RAW, _BINARY, _TEXT, _PICKLE = 1, 2, 3, 4
_CELLS = ", ".join(
    (
        "_rowid_", "typeof(key)", bounded("key", KEY_BYTES_MAX), cut("raw"), cut("expire_time"), "tag IS NOT NULL",
        cut("size"), cut("mode"), cut("filename"), "typeof(value)", bounded("value", VALUE_BYTES_MAX),
    )
)  # fmt: skip
_SELECT = " ".join(("SELECT", _CELLS, "FROM Cache"))
_WALK = f"{_SELECT} WHERE _rowid_ >= ? ORDER BY _rowid_"
_ONE = f"{_SELECT} WHERE _rowid_ = ?"
_SHARD = re.compile("[0-9]{3,}")
_KEY_DEPTH_MAX = 64
_ATTEMPTS = 3
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_VALUE = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Diskcache:
    """The directory of a cache of diskcache, to be brought over.

    `tables`: the names of the parts to bring, such as `deque/jobs`; without it all of them. `encoded`: `"json"` if the
    cache was made with `disk=JSONDisk`.

    Raises `Misuse` for a wrong argument.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        tables: Iterable[str] | None = None,
        encoded: Literal["auto", "json"] = "auto",
    ) -> None:
        if encoded not in ("auto", "json"):
            raise Misuse(f"encoded must be 'auto' or 'json', not {encoded!r:.40}")
        given = Path(path)
        self.path: Path = given.parent if given.name == _FILE and given.is_file() else given
        self._tables = tables
        self._json = encoded == "json"

    @contextmanager
    def open(self) -> Iterator[Sequence[Part]]:
        """Open it, to be read. Raises as `Origin` says."""
        if not stat.S_ISDIR(self.path.stat().st_mode):
            raise Corrupt(
                f"{self.path} is no directory of diskcache", hint="Pass the directory that has cache.db in it."
            )
        try:
            found, others = _found(self.path)
        except OSError as error:
            raise Unavailable(
                f"{error.filename} can't be read: {error.strerror}", hint="Nothing was done; may you read all of it?"
            ) from error
        if not found:
            raise Corrupt(f"{self.path} has no {_FILE}", hint="Pass the directory that diskcache was given.")
        wanted = chosen(list(found), self._tables, self.path)
        with ExitStack() as stack:
            parts = [
                _Cache(name, [stack.enter_context(_opened(place, as_json=self._json)) for place in places])
                for name, places in found.items()
                if name in wanted
            ]
            yield Parts(parts, others if self._tables is None else {}, {})

    def __repr__(self) -> str:
        return f"<Diskcache {str(self.path)!r}>"


def is_cache(tables: Mapping[str, Collection[str]]) -> bool:
    """Return whether a file with these tables, each with its columns, is one of diskcache's."""
    return set(_COLUMNS) <= set(tables.get("Cache", ()))


def _found(path: Path) -> tuple[dict[str | None, list[Path]], dict[str, str]]:
    """Return the directories that have a cache in them, by part, and what was passed over. Raises `OSError`."""
    shards = [path / name for name in sorted(filter(_SHARD.fullmatch, os.listdir(path)), key=int)]
    own = [place for place in (path, *shards) if _has_file(place)]
    found: dict[str | None, list[Path]] = {None: own} if own else {}
    passed_over: dict[str, str] = {}
    for kind in _NESTED:
        for at, directories, files in os.walk(path / kind, onerror=_unread):
            place = Path(at)
            if _FILE in files:
                found[place.relative_to(path).as_posix()] = [place]
            for directory in directories:
                if (place / directory).is_symlink():
                    passed_over[(place / directory).relative_to(path).as_posix()] = "a link, which isn't followed"
    return found, passed_over


def _has_file(place: Path) -> bool:
    try:
        return stat.S_ISREG((place / _FILE).stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False


def _unread(error: OSError) -> None:
    """Raise what keeps a directory from being read, but that there is none."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


class _Cache:
    """One part: a cache, or the shards of one."""

    def __init__(self, name: str | None, shards: list[_Shard]) -> None:
        self.name = name
        self.count = sum(shard.count() for shard in shards)
        self._shards = shards

    def __iter__(self) -> Iterator[Item]:
        for shard in self._shards:
            yield from shard.items()


class _Found(NamedTuple):
    """A row of the table."""

    rowid: int
    key_kind: str
    key: Any
    raw: Any
    ends: Any
    tagged: int
    size: Any
    mode: Any
    filename: Any
    kind: str
    value: Any


@contextmanager
def _opened(path: Path, *, as_json: bool) -> Iterator[_Shard]:
    """Give a directory that has a `cache.db`, open."""
    with Foreign(path / _FILE) as file:
        tables = file.tables()
        if not is_cache(tables):
            raise Corrupt(f"{path / _FILE} has no table of diskcache", hint="Was it made by diskcache?")
        if "_rowid_" in map(str.lower, tables["Cache"]) or not file.has_rowids("Cache"):
            raise Corrupt(f"{path / _FILE} has another table than diskcache makes", hint="Its rows have no numbers.")
        place = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield _Shard(file, place, as_json=as_json)
        finally:
            os.close(place)


class _Shard:
    """A directory with a `cache.db`."""

    def __init__(self, file: Foreign, place: int, *, as_json: bool) -> None:
        self._file = file
        self._place = place
        self._json = as_json

    def count(self) -> int:
        """Return how many items there are."""
        return self._file.count("Cache")

    def items(self) -> Iterator[Item]:
        """Give them."""
        for row in self._file.walk(_WALK):
            found = _Found(*row)
            ends = found.ends
            if ends is not None and not isinstance(ends, int | float):
                yield Item(self._key(found), Lost(Reason.damaged, f"its end is {ends!r:.40}"))
            else:
                yield Item(self._key(found), self._value(found), ends, bool(found.tagged))

    def _key(self, found: _Found) -> Any:
        if found.key is None and found.key_kind != "null":
            return Lost(Reason.large, f"a key of over {KEY_BYTES_MAX:,} bytes")
        if found.key is None:
            return Lost(Reason.damaged, "it has no key")
        if self._json:
            try:
                return _hashable(_from_json(found.key))
            except Lost as lost:
                return lost
        if found.raw:
            return found.key
        return Pickled(found.key) if isinstance(found.key, bytes) else Lost(Reason.damaged, "its key is no pickle")

    def _value(self, found: _Found) -> Any:
        if found.filename is not None:
            return Later(lambda: self._read_again(found))
        try:
            return self._decoded(found.mode, self._in_row(found))
        except Lost as lost:
            return lost

    def _in_row(self, found: _Found) -> Any:
        if found.value is None and found.kind != "null":
            raise Lost(Reason.large, f"over {VALUE_BYTES_MAX:,} bytes")
        return found.value

    def _decoded(self, mode: Any, value: Any) -> Any:
        """Return the object of what was stored, by the mode it was stored in."""
        if mode == _PICKLE:
            if not isinstance(value, bytes):
                raise Lost(Reason.damaged, "it is said to be a pickle, and there is none")
            return Pickled(value)
        if mode not in (_RAW, _BINARY, _TEXT):
            raise Lost(Reason.damaged, f"its mode is {mode!r:.40}")
        if self._json:
            return _from_json(value)
        if mode != _TEXT:
            return value
        try:
            return value.decode() if isinstance(value, bytes) else value
        except UnicodeDecodeError as error:
            raise Lost(Reason.damaged, str(error)) from error

    # -- values in files -----------------------------------------------------------------------------------------

    def _read_again(self, found: _Found) -> Any:
        """Return the value of a row that has a file: who writes meanwhile may give the row another one."""
        for _ in range(_ATTEMPTS):
            try:
                return self._decoded(found.mode, self._read(found))
            except Lost:
                row: list[Row] = self._file.rows(_ONE, found.rowid)
                now = _Found(*row[0]) if row else found
                if now.filename == found.filename:
                    raise
                found = now
                if found.filename is None:
                    break
        return self._decoded(found.mode, self._in_row(found))

    def _read(self, found: _Found) -> bytes:
        data = self._content(found.filename)
        if isinstance(found.size, int) and found.size != len(data):
            raise Lost(Reason.damaged, f"its file {found.filename} has {len(data):,} bytes of {found.size:,}")
        return data

    def _content(self, name: Any) -> bytes:
        """Return what is in a file below the directory."""
        parts = name.split("/") if isinstance(name, str) else [""]
        if any(part in ("", ".", "..") or "\0" in part for part in parts):
            raise Lost(Reason.file, f"{name!r:.200} is no file of the cache")
        opened: list[int] = []
        try:
            place = self._place
            for at, part in enumerate(parts, 1):
                place = os.open(part, _VALUE if at == len(parts) else _DIRECTORY, dir_fd=place)
                opened.append(place)
            found = os.fstat(place)
            if not stat.S_ISREG(found.st_mode):
                raise Lost(Reason.file, f"{name!r:.200} is no file")
            if found.st_size > VALUE_BYTES_MAX:
                raise Lost(Reason.large, f"{found.st_size:,} bytes")
            with open(place, "rb", closefd=False) as file:
                return file.read(VALUE_BYTES_MAX)
        except (OSError, ValueError) as error:  # a name that the file system can't spell is a ValueError
            raise Lost(Reason.file, f"{name!r:.200}: {getattr(error, 'strerror', None) or error}") from error
        finally:
            for handle in opened:
                os.close(handle)


def _from_json(value: Any) -> Any:
    """Return what `JSONDisk` has stored: JSON, packed."""
    inner = unpacked(value) if isinstance(value, bytes) else None
    if inner is None:
        raise Lost(Reason.damaged, "it isn't what JSONDisk writes")
    return read_json(inner)


def _hashable(key: Any, depth: int = 0) -> Any:
    if not isinstance(key, list):
        return key
    if depth >= _KEY_DEPTH_MAX:
        raise Lost(Reason.no_key, f"a key that is nested over {_KEY_DEPTH_MAX} deep")
    return tuple(_hashable(part, depth + 1) for part in key)
