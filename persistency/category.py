"""A category: one category of a job with its values as objects, and the same as a mapping.

Rules:
  1. Built on `Job`'s public methods alone: an event returns `None`, a request a `Reply`, and their order is the job's.
  2. A value is encoded at the call, in the caller's thread, and `Misuse` is raised there; it is decoded in the thread
     that takes the answer, and what can't be decoded is `Corrupt`, which names the category and the key.
  3. What has to read before it writes is sent to the data by `job.run`, and is atomic; the codec works there then.
  4. `None` stands for "no row" where a verb has no other way to say it. A stored `None` is a value of its own for all
     others: see `get`, `compare_and_set`.

Doesn't know: how values are encoded, threads, SQL, files.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, ItemsView, Iterable, Iterator, Mapping, MutableMapping, ValuesView
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeAlias, TypeVar, overload

from persistency.actor.reply import Reply
from persistency.arguments import as_category, as_payload, as_ttl_ms
from persistency.codec.keys import Key, KeyRange, RawKey, as_key
from persistency.codec.objects import CBOR, RAW, Codec, same
from persistency.errors import Corrupt, Misuse
from persistency.job import Job
from persistency.ops import Delete, DeleteRange, Entry, Found, KeyLike, Row, Ttl
from persistency.paging import Pages
from persistency.transaction import Transaction

T = TypeVar("T")
D = TypeVar("D")
M = TypeVar("M")
_EVERYTHING = KeyRange()
_NONE_THERE: Any = object()
# Every key but the empty one: no range of a job's is allowed to have no bound.
_ALL_BUT_EMPTY = KeyRange(RawKey(b"\0"))


class CategoryRow(NamedTuple, Generic[T]):
    """What a scan gives: a key and its value."""

    key: Key
    value: T


class CategoryEntry(NamedTuple, Generic[T]):
    """A row with all that is kept of it: an `Entry` with its value decoded."""

    key: Key
    value: T
    version: int
    expires_ms: int | None


_Rows: TypeAlias = list[CategoryRow[T]]
_Entries: TypeAlias = list[CategoryEntry[T]]

if TYPE_CHECKING:

    class FoundValues(dict[Key, T]):
        """A `Found` of values."""

        def __getitem__(self, wanted: KeyLike) -> T: ...
        def __contains__(self, wanted: object) -> bool: ...
        def get(self, wanted: KeyLike, default: Any = None) -> Any: ...

else:
    FoundValues = Found


class Decoded(Generic[M]):
    """Pages whose rows are decoded as they are given. Each `for`, and each `async for`, walks from the beginning."""

    def __init__(self, pages: Pages[Any], make: Callable[[Any], M]) -> None:
        self._pages = pages
        self._make = make

    def __iter__(self) -> Iterator[M]:
        return map(self._make, self._pages)

    async def __aiter__(self) -> AsyncIterator[M]:
        async for row in self._pages:
            yield self._make(row)


class Category(Generic[T]):
    """The verbs of a job with one category bound, and values as objects.

    `codec`: `CBOR` for plain values (the default), `RAW` for bytes, `typed(cls)` for a dataclass, msgspec struct or
    pydantic model, or anything with an `encode` and a `decode`. Several categories may share a job and a name.
    """

    __slots__ = ("codec", "job", "name")

    @overload
    def __init__(self: Category[Any], job: Job, name: str) -> None: ...
    @overload
    def __init__(self, job: Job, name: str, codec: Codec[T]) -> None: ...
    def __init__(self, job: Job, name: str, codec: Codec[Any] = CBOR) -> None:
        if not isinstance(job, Job):
            raise Misuse(f"job must be a Job, not {type(job).__name__}: pass what open_job gave")
        as_category(name)
        if not all(callable(getattr(codec, function, None)) for function in ("encode", "decode")):
            hint = "Pass CBOR, RAW, typed(cls), or an object with encode(value) and decode(data)."
            raise Misuse(f"codec must be a codec, not {codec!r:.80}", hint=hint)
        self.job = job
        self.name = name
        self.codec: Codec[T] = codec

    # -- events --------------------------------------------------------------------------------------------------

    def put(self, key: KeyLike, value: T, *, ttl: Ttl | None = None) -> None:
        """Store a value under a key, whatever was there; it ends after `ttl` (seconds or a `timedelta`)."""
        self.job.put(self.name, key, self._encode(value), ttl=ttl)

    def delete(self, key: KeyLike) -> None:
        """Remove one row; a missing one is fine."""
        self.job.delete(self.name, key)

    def delete_prefix(self, prefix: KeyLike) -> None:
        """Remove the row of the key `prefix` and those of all its children. An empty prefix is `Misuse`."""
        self.job.delete_prefix(self.name, prefix)

    def delete_range(self, key_range: KeyRange) -> None:
        """Remove the rows of a range, start in, stop out. One without any bound is `Misuse`."""
        self.job.delete_range(self.name, key_range)

    # -- reads ---------------------------------------------------------------------------------------------------

    @overload
    def get(self, key: KeyLike) -> Reply[T | None]: ...
    @overload
    def get(self, key: KeyLike, default: D) -> Reply[T | D]: ...
    def get(self, key: KeyLike, default: Any = None) -> Reply[Any]:
        """Ask for a value; `default` if there is no such row. (A stored `None` is `None`, whatever the default.)"""
        key = as_key(key)
        return self.job.get(self.name, key).map(
            lambda payload: default if payload is None else self._decode(key, payload)
        )

    def entry(self, key: KeyLike) -> Reply[CategoryEntry[T] | None]:
        """Ask for a row with its version and expiry."""
        return self.job.entry(self.name, key).map(lambda entry: None if entry is None else self._entry(entry))

    def get_many(self, keys: Iterable[KeyLike]) -> Reply[FoundValues[T]]:
        """Ask for several values in one snapshot: a dict by `Key` in the order asked, the missing left out.

        Looking up a tuple in it works too.
        """
        return self.job.get_many(self.name, keys).map(
            lambda found: FoundValues((key, self._decode(key, payload)) for key, payload in found.items())
        )

    def exists(self, key: KeyLike) -> Reply[bool]:
        """Ask whether there is such a row."""
        return self.job.exists(self.name, key)

    def count(self, key_range: KeyRange = _EVERYTHING) -> Reply[int]:
        """Ask how many rows a range has."""
        return self.job.count(self.name, key_range)

    def scan(
        self, key_range: KeyRange = _EVERYTHING, *, reverse: bool = False, limit: int | None = None
    ) -> Reply[_Rows[T]]:
        """Ask for the rows of a range in key order, start in, stop out, at most `limit` of them."""
        return self.job.scan(self.name, key_range, reverse=reverse, limit=limit).map(self._rows)

    def scan_prefix(self, prefix: KeyLike, *, reverse: bool = False, limit: int | None = None) -> Reply[_Rows[T]]:
        """Ask for the row of the key `prefix` itself and those of all its children."""
        return self.job.scan_prefix(self.name, prefix, reverse=reverse, limit=limit).map(self._rows)

    def snapshot(self) -> Reply[_Entries[T]]:
        """Ask for all rows, in the order of their versions."""
        return self.job.snapshot(self.name).map(lambda entries: [self._entry(entry) for entry in entries])

    @overload
    def iterate(
        self,
        key_range: KeyRange = ...,
        *,
        prefix: KeyLike | None = ...,
        reverse: bool = ...,
        page: int = ...,
        keys_only: Literal[False] = ...,
    ) -> Decoded[CategoryRow[T]]: ...
    @overload
    def iterate(
        self,
        key_range: KeyRange = ...,
        *,
        prefix: KeyLike | None = ...,
        reverse: bool = ...,
        page: int = ...,
        keys_only: Literal[True],
    ) -> Pages[Key]: ...
    def iterate(
        self,
        key_range: KeyRange = _EVERYTHING,
        *,
        prefix: KeyLike | None = None,
        reverse: bool = False,
        page: int = 256,
        keys_only: bool = False,
    ) -> Decoded[CategoryRow[T]] | Pages[Key]:
        """Walk over a range, or a prefix, with `for` or `async for`, asking for a page of rows at a time.

        Nothing is held between pages: writing meanwhile is safe, and a key that is there throughout is seen once.
        """
        pages = self.job.iterate(self.name, key_range, prefix=prefix, reverse=reverse, page=page, keys_only=keys_only)
        return pages if keys_only else Decoded(pages, self._row)

    def list(
        self, prefix: KeyLike = (), *, reverse: bool = False, page: int = 256
    ) -> Decoded[tuple[tuple[Any, ...], T]]:
        """Walk over a key and its children (of an empty prefix: everything) as pairs of the key's tuple and its value.

        For `for` and `async for`, a page at a time like `iterate`; parents come before their children. Raises `Misuse`
        at a `RawKey`, which has no tuple: `iterate` gives those.
        """
        return Decoded(self.job.iterate(self.name, prefix=prefix, reverse=reverse, page=page), self._pair)

    # -- requests that write -------------------------------------------------------------------------------------

    def delete_acked(self, key: KeyLike) -> Reply[bool]:
        """Remove one row and answer whether it was there."""
        return self.job.delete_acked(self.name, key)

    def delete_prefix_acked(self, prefix: KeyLike) -> Reply[int]:
        """Remove a key and its children and answer how many rows were there. An empty prefix is `Misuse`."""
        return self.job.delete_prefix_acked(self.name, prefix)

    def delete_range_acked(self, key_range: KeyRange) -> Reply[int]:
        """Remove the rows of a range and answer how many there were. One without any bound is `Misuse`."""
        return self.job.delete_range_acked(self.name, key_range)

    def compare_and_set(
        self, key: KeyLike, expected: T | None, new: T | None, *, ttl: Ttl | None = None
    ) -> Reply[bool]:
        """Put `new` in the place of `expected`, and answer whether that was there; `None` is no row, on either side.

        So `None, new` creates a row only if there is none, `expected, None` deletes one only if it is still that, and a
        stored `None` can't be swapped. Values are compared deeply once decoded (with `RAW`, as bytes): the order of a
        map's keys doesn't count, `1` is `1.0`, but `True` isn't `1`. A `ttl` counts from the swap.
        """
        key = as_key(key)
        wanted = None if expected is None else self._encode(expected)
        put = None if new is None else self._encode(new)
        if wanted is None or self.codec is RAW:
            return self.job.compare_and_set(self.name, key, wanted, put, ttl=ttl)
        if put is not None:
            as_payload(put, "new")
        if ttl is not None:
            if put is None:
                raise Misuse("ttl was given, but new is None, which deletes the row: leave ttl out")
            as_ttl_ms(ttl)
        return self.job.run(_swap, self, key, wanted, put, ttl)

    def increment(self, key: KeyLike, delta: int = 1) -> Reply[int]:
        """Count up and answer with the new number; a missing row counts as 0, and an expiry stays.

        Raises `Conflict` if what is there isn't an integer. Raises `Misuse` with any other codec than `CBOR`.
        """
        if self.codec is not CBOR:
            raise Misuse(f"increment stores CBOR integers, which {self.codec!r} doesn't: use a category with CBOR")
        return self.job.increment(self.name, key, delta)

    def touch(self, key: KeyLike, ttl: Ttl | None) -> Reply[bool]:
        """Have a row end after `ttl` from now (`None`: not at all), and answer whether there was one."""
        return self.job.touch(self.name, key, ttl)

    # -- as a mapping --------------------------------------------------------------------------------------------

    def mapping(self) -> CategoryMapping[T]:
        """Return the category as a `MutableMapping`, whose reads and removals wait for their answers."""
        return CategoryMapping(self)

    # -- values --------------------------------------------------------------------------------------------------

    def _encode(self, value: T) -> bytes:
        try:
            return self.codec.encode(value)
        except (Misuse, MemoryError, RecursionError):
            raise
        except Exception as error:  # a codec of the user's own
            raise Misuse(f"category {self.name!r}: the value can't be encoded: {error!r:.200}") from error

    def _decode(self, key: Key, payload: bytes) -> T:
        try:
            return self.codec.decode(payload)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # as above
            why = error if isinstance(error, Corrupt) else f"{error!r:.200}"
            hint = error.hint if isinstance(error, Corrupt) else "Was it written with another codec?"
            raise Corrupt(f"category {self.name!r}, {key!r}: the value can't be decoded: {why}", hint=hint) from error

    def _row(self, row: Row) -> CategoryRow[T]:
        return CategoryRow(row.key, self._decode(*row))

    def _rows(self, rows: Iterable[Row]) -> _Rows[T]:
        return [CategoryRow(key, self._decode(key, payload)) for key, payload in rows]

    def _entry(self, entry: Entry) -> CategoryEntry[T]:
        return CategoryEntry(entry.key, self._decode(entry.key, entry.payload), entry.version, entry.expires_ms)

    def _pair(self, row: Row) -> tuple[tuple[Any, ...], T]:
        return self._parts(row.key), self._decode(*row)

    def _parts(self, key: Key) -> tuple[Any, ...]:
        try:
            return key.parts
        except Misuse as error:
            hint = "Use iterate(): it gives keys as they are."
            raise Misuse(f"category {self.name!r} has a key that isn't a tuple, {key!r:.80}", hint=hint) from error

    def __repr__(self) -> str:
        return f"<Category {self.name!r} of {self.job!r}, {self.codec!r}>"


def _swap(tx: Transaction, category: Category[T], key: Key, wanted: bytes, put: bytes | None, ttl: Ttl | None) -> bool:
    stored = tx.get(category.name, key)
    if stored is None:
        return False
    if stored != wanted and not same(category._decode(key, stored), category._decode(key, wanted)):
        return False
    if put is None:
        tx.delete(category.name, key)
    else:
        tx.put(category.name, key, put, ttl=ttl)
    return True


class CategoryMapping(MutableMapping[Any, T]):
    """A category as a dict, in key order. Made by `Category.mapping()`.

    A key that isn't a tuple stands for the tuple of it alone, and comes back bare: `m["a"]` and `m["a",]` are one row.
    (A tuple in a tuple, `m[(1, 2),]`, comes back as it is, as its bare element would be another key.) A `Key` is a key.

    Assigning posts a put: it doesn't wait, all later reads see it, and a failure is told as any event's. Everything else
    waits for its answer, and so blocks the thread that calls it: under an event loop use the `Category`. `pop`,
    `setdefault` and `popitem` are atomic. Iterating reads pages, and writing meanwhile is safe. Values are copies: a change
    to one is stored when it is assigned again.
    """

    __slots__ = ("category",)
    __hash__ = None  # type: ignore[assignment]  # like a dict's: it is equal to what has the same items

    def __init__(self, category: Category[T]) -> None:
        self.category = category

    def __getitem__(self, key: Any) -> T:
        value = self.category.get(_inner(key), _NONE_THERE).result()
        if value is _NONE_THERE:
            raise KeyError(key)
        return value  # type: ignore[no-any-return]  # a T by now

    def __setitem__(self, key: Any, value: T) -> None:
        self.category.put(_inner(key), value)

    def __delitem__(self, key: Any) -> None:
        if not self.category.delete_acked(_inner(key)).result():
            raise KeyError(key)

    def __contains__(self, key: Any) -> bool:
        return self.category.exists(_inner(key)).result()

    def __len__(self) -> int:
        return self.category.count().result()

    def __iter__(self) -> Iterator[Any]:
        return map(self._outer, self.category.iterate(keys_only=True))

    def __reversed__(self) -> Iterator[Any]:
        return map(self._outer, self.category.iterate(keys_only=True, reverse=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        items = list(self.items())
        # As keys of a dict 1, 1.0 and True are one; here they are three.
        return len(items) == len(other) and dict(items) == dict(other.items())

    def items(self) -> ItemsView[Any, T]:
        """Return a view of pairs of key and value."""
        return _Items(self)

    def values(self) -> ValuesView[T]:
        """Return a view of the values, in key order."""
        return _Values(self)

    def pop(self, key: Any, default: Any = _NONE_THERE) -> Any:
        """Remove a row and return its value, or `default`. Raises `KeyError` if there is neither."""
        found = self.category.job.run(_take, self.category, as_key(_inner(key))).result()
        if found:
            return found[0][1]
        if default is _NONE_THERE:
            raise KeyError(key)
        return default

    def popitem(self) -> tuple[Any, T]:
        """Remove the last row in key order and return its key and value. Raises `KeyError` if there is none."""
        found = self.category.job.run(_take, self.category, None).result()
        if not found:
            raise KeyError(f"category {self.category.name!r} is empty")
        return self._outer(found[0][0]), found[0][1]

    def setdefault(self, key: Any, default: Any = None) -> Any:
        """Return the value of a key; if there is none, store `default` first."""
        category = self.category
        found = category.job.run(_keep, category, as_key(_inner(key)), as_payload(category._encode(default))).result()
        return found[0] if found else default

    def clear(self) -> None:
        """Post the removal of all rows of the category."""
        name = self.category.name
        self.category.job.persist([Delete(name, ()), DeleteRange(name, _ALL_BUT_EMPTY)])

    def _outer(self, key: Key) -> Any:
        parts = self.category._parts(key)
        return parts[0] if len(parts) == 1 and not isinstance(parts[0], tuple) else parts

    def __repr__(self) -> str:
        return f"<CategoryMapping of {self.category!r}>"


class _Items(ItemsView[Any, T]):
    _mapping: CategoryMapping[T]

    def __iter__(self) -> Iterator[tuple[Any, T]]:
        return ((self._mapping._outer(key), value) for key, value in self._mapping.category.iterate())


class _Values(ValuesView[T]):
    _mapping: CategoryMapping[T]

    def __iter__(self) -> Iterator[T]:
        return (value for _, value in self._mapping.category.iterate())

    def __contains__(self, wanted: object) -> bool:
        return any(value is wanted or value == wanted for value in self)


def _inner(key: Any) -> KeyLike:
    return key if isinstance(key, Key | tuple) else (key,)


def _take(tx: Transaction, category: Category[T], key: Key | None) -> list[tuple[Key, T]]:
    """Remove a row, the last one if none is named, and give what it was: none or one."""
    if key is None:
        rows = tx.scan(category.name, reverse=True, limit=1)
    else:
        payload = tx.get(category.name, key)
        rows = [] if payload is None else [Row(key, payload)]
    for row in rows:
        tx.delete(category.name, row.key)
    return [(row.key, category._decode(*row)) for row in rows]  # an error in here brings the row back


def _keep(tx: Transaction, category: Category[T], key: Key, payload: bytes) -> list[T]:
    """Give the value that is there, or put one: none or one."""
    stored = tx.get(category.name, key)
    if stored is None:
        tx.put(category.name, key, payload)
    return [] if stored is None else [category._decode(key, stored)]
