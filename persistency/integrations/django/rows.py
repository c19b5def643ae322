"""Rows: what a cache does within a transaction. An entry is two rows: its value, and its place in the order of age.

| category | key | payload |
|---|---|---|
| `django` | the cache key | the value |
| `django.age` | the version of the value's row | the encoded cache key |

Rules:
  1. Every live value has exactly one row of age, under its row's version, with the same end; so the oldest ones are
     found, and all are counted, without looking at a value.
  2. "Old" is when it was last written. Reading an entry doesn't make it younger: a read writes nothing.
  3. An entry is culled only to make room for a new one. There never are more than `Limits` allow.
  4. A time to live is in seconds from the transaction on (`None`: for ever; 0: it has ended already).

Doesn't know: what a payload means, Django, who else uses the job.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Final, NamedTuple

from persistency import Conflict, Delete, Found, Key, KeyRange, Misuse, Op, Put, RawKey, Transaction, key

VALUES: Final = "django"
AGES: Final = "django.age"
_KEY_BYTES_MAX: Final = 8 * 1024
_PAGE: Final = 1_000  # rows at a time, where there may be any number
_ALL: Final = KeyRange(None, RawKey(b"\xff"))  # no encoded key begins so


class Limits(NamedTuple):
    """How much there may be; to make room one entry of `cull_frequency` goes, and all of them if that is 0."""

    entries: int
    cull_frequency: int
    bytes: int | None


class Sum(NamedTuple):
    """What an entry was counted up to, and whether there is room for it."""

    total: int
    kept: bool


class Census:
    """How many entries a job can have at the most, without counting them each time.

    Every new entry takes two of the job's versions, whichever process writes it. So whoever has counted once knows by
    the version alone how many more there can be by now: as long as it is the same file.
    """

    def __init__(self) -> None:
        self._entries = 0
        self._version: int | None = None

    def bound(self, tx: Transaction) -> int:
        """Return a number that isn't exceeded."""
        version = tx.version()
        if self._version is None or version < self._version:  # or what was counted was undone
            return self.count(tx)
        return self._entries + (version - self._version) // 2

    def count(self, tx: Transaction) -> int:
        """Return the number. To be called before a transaction writes, which may be undone."""
        self._entries, self._version = tx.count(AGES), tx.version()
        return self._entries


def row_key(name: str) -> Key:
    """Return the key of a cache key's row: of one that is too long, or no valid text, its hash."""
    try:
        found = key(name)
    except Misuse:
        found = key()
    if found and len(found) <= _KEY_BYTES_MAX:
        return found
    return key(sha256(name.encode("utf-8", "surrogatepass")).digest())  # bytes: no text's key


# -- reading ---------------------------------------------------------------------------------------------------------


def get(tx: Transaction, at: Key) -> bytes | None:
    """Return a payload."""
    return tx.get(VALUES, at)


def get_many(tx: Transaction, keys: list[Key]) -> Found:
    """Return the payloads that there are."""
    return tx.get_many(VALUES, keys)


# -- writing ---------------------------------------------------------------------------------------------------------


def put(tx: Transaction, rows: dict[Key, bytes], ttl: float | None, limits: Limits, census: Census) -> list[Key]:
    """Write entries; return the keys of those that can't have room, which are absent then."""
    if ttl == 0:
        delete_many(tx, rows)
        return []
    versions = {at: _version(tx, at) for at in rows}
    new = sum(version is None for version in versions.values())
    entries = census.bound(tx) if new else 0
    if new and entries + new > limits.entries:
        entries = census.count(tx)
    refused = []
    for at, payload in rows.items():
        # Of several, one may have been culled to make room for another.
        version = versions[at] if len(rows) == 1 else _version(tx, at)
        if version is not None:
            tx.delete(AGES, (version,))
        else:
            if entries >= limits.entries:
                entries = _make_place(tx, limits)
            entries += 1
        if not _write(tx, at, payload, ttl, limits):
            refused.append(at)
    return refused


def add(tx: Transaction, at: Key, payload: bytes, ttl: float | None, limits: Limits, census: Census) -> bytes | bool:
    """Write an entry and return whether it can have room; or, if there is one, return its payload."""
    found = tx.get(VALUES, at)
    return not put(tx, {at: payload}, ttl, limits, census) if found is None else found


def touch(tx: Transaction, at: Key, ttl: float | None) -> bytes | None:
    """Give an entry another end, and return its payload, if there was one."""
    entry = tx.entry(VALUES, at)
    if entry is None or ttl == 0:
        return delete(tx, at)
    tx.touch(VALUES, at, ttl)
    tx.put(AGES, (entry.version,), at, ttl=ttl)  # a touch could find that it ended just now
    return entry.payload


def delete(tx: Transaction, at: Key) -> bytes | None:
    """Remove an entry, and return its payload, if there was one."""
    entry = tx.entry(VALUES, at)
    if entry is None:
        return None
    tx.persist((Delete(VALUES, at), Delete(AGES, (entry.version,))))
    return entry.payload


def delete_many(tx: Transaction, keys: Iterable[Key]) -> None:
    """Remove entries."""
    for at in keys:
        delete(tx, at)


def clear(tx: Transaction) -> None:
    """Remove every entry."""
    tx.delete_range(VALUES, _ALL)
    tx.delete_range(AGES, _ALL)


def drop(tx: Transaction, at: Key, payload: bytes) -> bool:
    """Remove an entry if it still is what somebody has read, and return whether it was."""
    return tx.get(VALUES, at) == payload and delete(tx, at) is not None


def increment(tx: Transaction, at: Key, delta: int, limits: Limits) -> Sum | bytes | None:
    """Count an entry up, whose end stays, and return the sum; the payload if it is no integer; `None`: no entry."""
    entry = tx.entry(VALUES, at)
    if entry is None:
        return None
    try:
        total = tx.increment(VALUES, at, delta)
    except (Conflict, Misuse):  # no integer, or one too long
        return entry.payload
    version = tx.version()
    tx.delete(AGES, (entry.version,))
    tx.put(AGES, (version,), at, ttl=_left(tx, entry.expires_ms))
    _make_room(tx, 0, limits)
    return Sum(total, limits.bytes is None or tx.exists(VALUES, at))


def replace(tx: Transaction, at: Key, expected: bytes, payload: bytes, limits: Limits) -> bool | None:
    """Write an entry, whose end stays, in the place of what somebody has read; return whether it can have room.

    `None` if what was read isn't there any more.
    """
    entry = tx.entry(VALUES, at)
    if entry is None or entry.payload != expected:
        return None
    tx.delete(AGES, (entry.version,))
    return _write(tx, at, payload, _left(tx, entry.expires_ms), limits)


def move(
    tx: Transaction,
    source: Key,
    expected: bytes,
    target: Key,
    payload: bytes,
    ttl: float | None,
    limits: Limits,
    census: Census,
) -> bool:
    """Put an entry in the place of another, if that still is what somebody has read; return whether it was."""
    if tx.get(VALUES, source) != expected:
        return False
    put(tx, {target: payload}, ttl, limits, census)
    if source != target:
        delete(tx, source)
    return True


# -- within ----------------------------------------------------------------------------------------------------------


def _version(tx: Transaction, at: Key) -> int | None:
    entry = tx.entry(VALUES, at)
    return None if entry is None else entry.version


def _write(tx: Transaction, at: Key, payload: bytes, ttl: float | None, limits: Limits) -> bool:
    """Write both rows of an entry, which has no row of age any more; return whether it can have room."""
    if limits.bytes is not None:
        tx.delete(VALUES, at)
        if not _make_room(tx, len(payload) + len(at), limits):
            return False
    version = tx.commit(Put(VALUES, at, payload, ttl))
    tx.put(AGES, (version,), at, ttl=ttl)
    return True


def _left(tx: Transaction, expires_ms: int | None) -> float | None:
    """Return how many seconds there are until an end."""
    return None if expires_ms is None else max(1, expires_ms - tx.now_ms) / 1000


def _make_room(tx: Transaction, nbytes: int, limits: Limits) -> bool:
    """Cull until so many bytes more are within the limit; return whether they can be."""
    if limits.bytes is not None:
        if nbytes > limits.bytes:
            return False
        while tx.storage_used() + nbytes > limits.bytes:
            if not _cull(tx, max(1, _share(tx.count(AGES), limits))):
                return False
    return True


def _make_place(tx: Transaction, limits: Limits) -> int:
    """Cull, if there are as many entries as there may be, so that one more can come; return how many there are."""
    entries = tx.count(AGES)
    if entries < limits.entries:
        return entries
    return entries - _cull(tx, max(_share(entries, limits), entries - limits.entries + 1))


def _share(entries: int, limits: Limits) -> int:
    """Return how many of so many entries are culled at once."""
    return entries // limits.cull_frequency if limits.cull_frequency else entries


def _cull(tx: Transaction, count: int) -> int:
    """Remove the entries that were written the longest ago, and return how many."""
    culled = 0
    while culled < count:
        oldest = tx.scan(AGES, limit=min(_PAGE, count - culled))
        if not oldest:
            break
        ops: list[Op] = [Delete(AGES, row.key) for row in oldest]
        ops += [Delete(VALUES, RawKey(row.payload)) for row in oldest]
        tx.persist(ops)
        culled += len(oldest)
    return culled
