"""The rows of a py-key-value store: what both twins ask for, each verb one transaction, answered by a `Reply`.

A store is one category of a job, `name`; a key of a collection is the row `(collection, key)`.

Rules:
  1. Each verb is all or nothing, and sees one state of the job: `put_many` writes all of its rows or none.
  2. A TTL counts from the call, and the row has it. So what has ended is neither read nor listed, and the engine
     reclaims it by itself.
  3. How long a row has still to live is told in milliseconds from now, as the job's clock is perhaps no other one's.

Doesn't know: event loops, what a payload holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from typing import NamedTuple

from persistency import Corrupt, Entry, Job, Key, KeyRange, Misuse, Put, Reply, Transaction
from persistency.recipes.runner import Runner, as_runner

_COLLECTIONS = KeyRange.text_prefix((), "")  # the rows of all of them: those whose first part is text


class Stored(NamedTuple):
    """A row that is there: its payload, and after how many milliseconds it ends (`None`: never)."""

    payload: bytes
    left_ms: int | None


class Rows:
    """The rows of one store. Raises `Misuse` for what is no runner, and for a bad name."""

    def __init__(self, runner: Runner, name: str) -> None:
        self.runner: Runner = as_runner(runner)
        self.name: str = as_name(name)

    def get(self, row: Key) -> Reply[Stored | None]:
        """Ask for one row."""
        if isinstance(job := self.runner, Job):  # a job answers this in place, without another thread
            return job.entry(self.name, row).map(lambda entry: _stored(entry, job.now_ms))
        return self.runner.run(_get, self.name, row)

    def get_many(self, rows: Sequence[Key]) -> Reply[list[Stored | None]]:
        """Ask for several rows of one state, in the order asked."""
        return self.runner.run(_get_many, self.name, rows)

    def put_many(self, items: Sequence[tuple[Key, bytes]], ttl_ms: int | None) -> Reply[None]:
        """Store rows, which all end after `ttl_ms` from now."""
        if isinstance(job := self.runner, Job):  # a job counts a TTL from the call by itself, by its own clock
            ttl = None if ttl_ms is None else timedelta(milliseconds=ttl_ms)
            return job.commit([Put(self.name, row, payload, ttl) for row, payload in items]).map(_done)
        return self.runner.run(_put_many, self.name, items, ttl_ms, monotonic())

    def delete_many(self, rows: Sequence[Key]) -> Reply[int]:
        """Remove rows and answer how many were there."""
        return self.runner.run(_delete_many, self.name, rows)

    def keys(self, collection: str, limit: int | None) -> Reply[list[str]]:
        """Ask for the keys of a collection in the order of their UTF-8, all of them or the first `limit`."""
        return self.runner.run(_keys, self.name, KeyRange.text_prefix((collection,), ""), as_limit(limit))

    def collections(self, limit: int | None) -> Reply[list[str]]:
        """Ask for the collections that have rows, in the order of their UTF-8."""
        return self.runner.run(_collections, self.name, as_limit(limit))

    def delete_collection(self, collection: str) -> Reply[int]:
        """Remove a collection and answer how many rows it had."""
        return self.runner.run(Transaction.delete_range_acked, self.name, KeyRange.text_prefix((collection,), ""))

    def delete_all(self) -> Reply[int]:
        """Remove all rows of the store and answer how many there were."""
        return self.runner.run(Transaction.delete_range_acked, self.name, _COLLECTIONS)

    def wake(self) -> Reply[None]:
        """Have the job looked after: what has ended is reclaimed when it has nothing else to do."""
        return self.runner.run(_nothing)


def as_name(name: str) -> str:
    """Return a store's name, which is a category's. Raises `Misuse`."""
    try:
        size = len(name.encode()) if isinstance(name, str) else 0
    except UnicodeEncodeError:  # a lone surrogate
        size = 0
    if not 1 <= size <= 255:
        raise Misuse(f"name must be text of 1 to 255 UTF-8 bytes, not {name!r:.80}: pass the name of a category")
    return name


def as_limit(limit: int | None) -> int | None:
    """Return how many are asked for. Raises `Misuse`."""
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
        raise Misuse(f"limit must be an int of 0 or more, not {limit!r:.80}: pass None for all")
    return limit


def _stored(entry: Entry | None, now_ms: int) -> Stored | None:
    if entry is None:
        return None
    if entry.expires_ms is None:
        return Stored(entry.payload, None)
    left_ms = entry.expires_ms - now_ms
    return Stored(entry.payload, left_ms) if left_ms > 0 else None  # or it has ended since it was read


def _get(tx: Transaction, name: str, row: Key) -> Stored | None:
    return _stored(tx.entry(name, row), tx.now_ms)


def _get_many(tx: Transaction, name: str, rows: Sequence[Key]) -> list[Stored | None]:
    return [_get(tx, name, row) for row in rows]


def _put_many(
    tx: Transaction, name: str, items: Sequence[tuple[Key, bytes]], ttl_ms: int | None, called_at: float
) -> None:
    ttl: timedelta | None = None
    if ttl_ms is not None:
        left_ms = ttl_ms - int((monotonic() - called_at) * 1000)
        if left_ms <= 0:  # it had to wait for its turn for so long that it is over already
            _delete_many(tx, name, [row for row, _ in items])
            return
        ttl = timedelta(milliseconds=left_ms)
    for row, payload in items:
        tx.put(name, row, payload, ttl=ttl)


def _delete_many(tx: Transaction, name: str, rows: Sequence[Key]) -> int:
    return sum(tx.delete_acked(name, row) for row in rows)


def _keys(tx: Transaction, name: str, span: KeyRange, limit: int | None) -> list[str]:
    return [_parts(name, row)[1] for row in tx.keys(name, span, limit=limit)]


def _collections(tx: Transaction, name: str, limit: int | None) -> list[str]:
    found: list[str] = []
    start = _COLLECTIONS.start
    while limit is None or len(found) < limit:  # one look-up for each, however many rows it has
        first = tx.keys(name, KeyRange(start, _COLLECTIONS.stop), limit=1)
        if not first:
            break
        collection = _parts(name, first[0])[0]
        found.append(collection)
        start = KeyRange.prefix((collection,)).stop
    return found


def _parts(name: str, row: Key) -> tuple[str, str]:
    try:
        collection, found = row.parts
    except ValueError as error:  # not two parts, or not even a key: Misuse is one too
        raise Corrupt(
            f"category {name!r} holds {row!r}, which is no key of a py-key-value store",
            hint="Give the store a category of its own: PersistencyStore(job, name=...).",
        ) from error
    return collection, found


def _done(_version: int) -> None:
    """What a write answers."""


def _nothing(_tx: Transaction) -> None:
    """What it takes to wake a job."""
