"""A mapping: a category as a `MutableMapping`, for code that works on dicts.

Rules:
  1. It behaves as CPython's own tests of mappings demand, as far as a mapping can whose values are copies.
  2. A key that comes back leads to the row it came from.
  3. What reads before it writes is sent to the data by `job.run`, and is atomic; an error there undoes it.

Doesn't know: how values are encoded, event loops.
"""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, Mapping, MutableMapping, ValuesView
from typing import TYPE_CHECKING, Any, TypeVar, overload

from persistency.arguments import as_payload
from persistency.codec.keys import Key, KeyRange, RawKey, as_key
from persistency.coding import Coding, V
from persistency.job import Job
from persistency.ops import Delete, DeleteRange
from persistency.transaction import Transaction

if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault  # see `coding`

    B = TypeVarWithDefault("B", default=Any)
else:
    B = TypeVar("B")
D = TypeVar("D")
T = TypeVar("T")
_NONE_THERE: Any = object()
# Every key but the empty one; together they are the whole category, which no single delete may name.
_ALL_BUT_EMPTY = KeyRange(RawKey(b"\0"))


class CategoryMapping(MutableMapping[B, V]):
    """A category as a dict, in key order. Made by `Category.mapping()`.

    A key that isn't a tuple stands for the tuple of it alone, and comes back bare: `m["a"]` and `m["a",]` are one row.
    (A tuple in a tuple, `m[(1, 2),]`, comes back as it is, as its bare element would be another key.) A `Key` is a key.

    Assigning and `clear` post an event: they don't wait, all later reads see it, and a failure is told as any event's.
    All else waits for its answer, and so blocks its thread: under an event loop use the `Category`. `pop`, `popitem`
    and `setdefault` are atomic. Iterating reads pages, and writing meanwhile is safe. Values are copies: a change to
    one is stored when it is assigned again.
    """

    __slots__ = ("_coding", "_job", "_name")
    __hash__ = None  # type: ignore[assignment]  # like a dict's: it is equal to what has the same items

    def __init__(self, job: Job, coding: Coding[V]) -> None:
        self._job = job
        self._coding = coding
        self._name = coding.name

    def __getitem__(self, key: B | Key) -> V:
        inner = _inner(key)
        payload = self._job.get(self._name, inner).result()
        if payload is None:
            raise KeyError(key)
        return self._coding.decode(inner, payload)

    def __setitem__(self, key: B | Key, value: V) -> None:
        self._job.put(self._name, _inner(key), self._coding.encode(value))

    def __delitem__(self, key: B | Key) -> None:
        if not self._job.delete_acked(self._name, _inner(key)).result():
            raise KeyError(key)

    if TYPE_CHECKING:  # `Mapping`'s own, which takes a `Key` too, as all else does

        @overload
        def get(self, key: B | Key, /) -> V | None: ...
        @overload
        def get(self, key: B | Key, /, default: V) -> V: ...
        @overload
        def get(self, key: B | Key, /, default: D) -> V | D: ...
        def get(self, key: B | Key, /, default: Any = None) -> Any:
            """Return the value of a key, or `default` if there is none."""

    def __contains__(self, key: object) -> bool:
        return self._job.exists(self._name, _inner(key)).result()

    def __len__(self) -> int:
        return self._job.count(self._name).result()

    def __iter__(self) -> Iterator[B]:
        return map(self._outer, self._job.iterate(self._name, keys_only=True))

    def __reversed__(self) -> Iterator[B]:
        return map(self._outer, self._job.iterate(self._name, keys_only=True, reverse=True))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Mapping):
            return NotImplemented
        items = list(self.items())
        # As keys of a dict 1, 1.0 and True are one; here they are three.
        return len(items) == len(other) and dict(items) == dict(other.items())

    def items(self) -> ItemsView[B, V]:
        """Return a view of pairs of key and value."""
        return _Items(self)

    def values(self) -> ValuesView[V]:
        """Return a view of the values, in key order."""
        return _Values(self)

    @overload
    def pop(self, key: B | Key) -> V: ...
    @overload
    def pop(self, key: B | Key, default: V) -> V: ...
    @overload
    def pop(self, key: B | Key, default: D) -> V | D: ...
    def pop(self, key: B | Key, default: Any = _NONE_THERE) -> Any:
        """Remove a row and return its value, or `default`. Raises `KeyError` if there is neither."""
        value = self._job.run(_pop, self._coding, _inner(key), default).result()
        if value is _NONE_THERE:
            raise KeyError(key)
        return value

    def popitem(self) -> tuple[B, V]:
        """Remove the last row in key order and return its key and value. Raises `KeyError` if there is none."""
        item = self._job.run(_pop_last, self._coding).result()
        if item is None:
            raise KeyError(f"category {self._name!r} is empty")
        return item

    @overload
    def setdefault(self: CategoryMapping[B, D | None], key: B | Key, default: None = None) -> D | None: ...
    @overload
    def setdefault(self, key: B | Key, default: V) -> V: ...
    def setdefault(self, key: B | Key, default: Any = None) -> Any:
        """Return the value of a key; if there is none, store `default` first."""
        payload = as_payload(self._coding.encode(default))
        return self._job.run(_set_default, self._coding, _inner(key), payload).result()

    def clear(self) -> None:
        """Post the removal of all rows of the category."""
        self._job.persist([Delete(self._name, ()), DeleteRange(self._name, _ALL_BUT_EMPTY)])

    def _outer(self, key: Key) -> Any:
        return _outer(self._coding, key)

    def __repr__(self) -> str:
        return f"<CategoryMapping {self._name!r} of {self._job!r}, {self._coding.codec!r}>"


class _Items(ItemsView[B, V]):
    _mapping: CategoryMapping[B, V]

    def __iter__(self) -> Iterator[tuple[B, V]]:
        m = self._mapping
        return ((m._outer(row.key), m._coding.decode(*row)) for row in m._job.iterate(m._name))


class _Values(ValuesView[V]):
    _mapping: CategoryMapping[Any, V]

    def __iter__(self) -> Iterator[V]:
        m = self._mapping
        return (m._coding.decode(*row) for row in m._job.iterate(m._name))

    def __contains__(self, wanted: object) -> bool:
        return any(value is wanted or value == wanted for value in self)


def _inner(key: Any) -> Key:
    return as_key(key if isinstance(key, Key | tuple) else (key,))


def _outer(coding: Coding[Any], key: Key) -> Any:
    parts = coding.parts(key)
    return parts[0] if len(parts) == 1 and not isinstance(parts[0], tuple) else parts


# What travels to the data. An error while decoding undoes what was written there.


def _pop(tx: Transaction, coding: Coding[T], key: Key, default: Any) -> Any:
    payload = tx.get(coding.name, key)
    if payload is None:
        return default
    tx.delete(coding.name, key)
    return coding.decode(key, payload)


def _pop_last(tx: Transaction, coding: Coding[T]) -> tuple[Any, T] | None:
    for row in tx.scan(coding.name, reverse=True, limit=1):
        tx.delete(coding.name, row.key)
        return _outer(coding, row.key), coding.decode(*row)
    return None


def _set_default(tx: Transaction, coding: Coding[T], key: Key, payload: bytes) -> T:
    stored = tx.get(coding.name, key)
    if stored is None:
        tx.put(coding.name, key, payload)
        stored = payload
    return coding.decode(key, stored)
