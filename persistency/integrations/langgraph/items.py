"""Items: where the store's items lie in a category of the job, and what travels to the data to read and write them.

| key | payload |
|---|---|
| `("item", *namespace, None, key)` | an `Entry`: times, TTL, and the value as CBOR |
| `("vector", *namespace, None, key)` | the item's vectors, where it has any |

Rules:
  1. `None` parts a namespace from the keys in it, and sorts before every label: a namespace's own items stand together,
     before those of the namespaces below it.
  2. The vectors of an item are written, end and go with it.
  3. An item that is put again keeps its time of creation. One that has ended was never there.

Doesn't know: filters, how near two vectors are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from persistency import CBOR, Corrupt, Key, KeyRange, RawKey, Row, Transaction, key

Namespace = tuple[str, ...]

ITEM, VECTOR = "item", "vector"
_SECONDS_PER_MINUTE = 60
_HINT = "Is the category used by something else?"


class Entry(NamedTuple):
    """An item's row. Times are Unix milliseconds; `ttl` is in minutes, as LangGraph has it; `value` is CBOR."""

    created_ms: int
    updated_ms: int
    ttl: float | None
    value: bytes

    def pack(self) -> bytes:
        """Return it as a payload."""
        return CBOR.encode(list(self))

    @classmethod
    def unpack(cls, payload: bytes) -> Entry:
        """Return what a payload holds."""
        try:
            return cls(*CBOR.decode(payload))
        except TypeError as error:
            raise Corrupt("a row of an item is none", hint=_HINT) from error


class Get(NamedTuple):
    """To read an item, and have its TTL begin anew if `refresh`."""

    namespace: Namespace
    key: str
    refresh: bool


class Set(NamedTuple):
    """To write an item, or delete it where the value is `None`; `vectors` is the payload of their row, if any."""

    namespace: Namespace
    key: str
    value: bytes | None
    vectors: bytes | None
    ttl: float | None


class Page(NamedTuple):
    """Some items in key order: their rows, their vectors if asked for, and where the next page begins."""

    rows: list[Row]
    vectors: list[bytes | None]
    following: KeyRange | None


def row_of(kind: str, namespace: Namespace, name: str) -> Key:
    """Return the key of an item, or of its vectors."""
    return key(kind, *namespace, None, name)


def place_of(row: Key) -> tuple[Namespace, str]:
    """Return the namespace and the key that an item's row names."""
    _, *namespace, end, name = row.parts
    if end is not None:
        raise Corrupt(f"{row!r} is no key of an item", hint=_HINT)
    return tuple(namespace), name


def span_of(namespace: Namespace) -> KeyRange:
    """Return the range of the items of a namespace and those below it."""
    return KeyRange.prefix(key(ITEM, *namespace))


def apply(tx: Transaction, category: str, gets: Sequence[Get], sets: Sequence[Set]) -> list[Entry | None]:
    """Read some items, then write some; return those that were read."""
    found = [_get(tx, category, get) for get in gets]
    for one in sets:
        _set(tx, category, one)
    return found


def page(tx: Transaction, category: str, span: KeyRange, limit: int, *, vectors: bool) -> Page:
    """Return the first items of a range."""
    rows = tx.scan(category, span, limit=limit)
    found = [tx.get(category, row_of(VECTOR, *place_of(row.key))) if vectors else None for row in rows]
    # The smallest key greater than another one is that and a zero byte.
    behind = KeyRange(RawKey(bytes(rows[-1].key) + b"\0"), span.stop) if len(rows) == limit else None
    return Page(rows, found, behind)


def namespaces(tx: Transaction, category: str, span: KeyRange, limit: int) -> tuple[list[Namespace], KeyRange | None]:
    """Return the first namespaces of a range that have items, in order, and where to go on."""
    found: list[Namespace] = []
    while len(found) < limit:
        rows = tx.keys(category, span, limit=1)
        if not rows:
            return found, None
        namespace, _ = place_of(rows[0])
        found.append(namespace)
        span = KeyRange(KeyRange.prefix(key(ITEM, *namespace, None)).stop, span.stop)
    return found, span


def refresh(tx: Transaction, category: str, places: Sequence[tuple[Namespace, str]]) -> None:
    """Have the TTL of some items begin anew."""
    for namespace, name in places:
        _get(tx, category, Get(namespace, name, True))


def _get(tx: Transaction, category: str, get: Get) -> Entry | None:
    payload = tx.get(category, row_of(ITEM, get.namespace, get.key))
    entry = None if payload is None else Entry.unpack(payload)
    if entry is not None and entry.ttl is not None and get.refresh:
        for kind in (ITEM, VECTOR):
            tx.touch(category, row_of(kind, get.namespace, get.key), entry.ttl * _SECONDS_PER_MINUTE)
    return entry


def _set(tx: Transaction, category: str, one: Set) -> None:
    row, vectors = (row_of(kind, one.namespace, one.key) for kind in (ITEM, VECTOR))
    ttl = None if one.ttl is None else one.ttl * _SECONDS_PER_MINUTE
    if one.vectors is None:
        tx.delete(category, vectors)
    else:
        tx.put(category, vectors, one.vectors, ttl=ttl)
    if one.value is None:
        tx.delete(category, row)
        return
    before, now_ms = tx.get(category, row), tx.now_ms
    created_ms = now_ms if before is None else Entry.unpack(before).created_ms
    tx.put(category, row, Entry(created_ms, now_ms, one.ttl, one.value).pack(), ttl=ttl)
