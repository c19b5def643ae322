"""diskcache: a cache in a SQLite file, with pickled keys and values where they aren't plain.

Rules:
  1. Everything its documentation names as costing speed and a store doesn't need is switched off.

Doesn't know: its peers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import diskcache

from benchmarks.contenders.tables import CHECKPOINT_COMMIT_PAGES
from benchmarks.protocol import Contender, Get, Pair, PutAll, PutOne, Way

SETTINGS = {
    "eviction_policy": "none",  # no bookkeeping of accesses, and nothing is evicted
    "statistics": 0,  # a hit isn't counted: reads don't write
    "tag_index": 0,
    "cull_limit": 0,  # a set doesn't look for something to cull
    "size_limit": 2**40,
    "sqlite_auto_vacuum": 0,  # no pages moved around after a delete
    "sqlite_journal_mode": "wal",
    "sqlite_synchronous": 1,  # NORMAL, its default: the same durability as ours
    "sqlite_mmap_size": 2**28,  # reads of the whole file without copying through the page cache
    "sqlite_cache_size": 2**15,
    "sqlite_wal_autocheckpoint": CHECKPOINT_COMMIT_PAGES,  # as all have it whose commits are of one row
}


class Cached:
    """A `diskcache.Cache`: one writer and one reader need no `FanoutCache`."""

    def __init__(self, directory: Path, _runner: asyncio.Runner) -> None:
        self.cache = diskcache.Cache(str(directory), **SETTINGS)

    def fill(self, rows: Sequence[Pair]) -> None:
        """Store rows in one transaction."""
        _put_in_transaction(self)(rows)

    def close(self) -> None:
        """Close the cache."""
        self.cache.close()


def _put_single(store: Cached) -> PutAll:
    # Each `set` is committed when it returns; a single put of this engine is what it is compared with.
    def put_all(rows: Sequence[Pair]) -> None:
        put = store.cache.set
        for key, payload in rows:
            put(key, payload)

    return put_all


def _put_in_transaction(store: Cached) -> PutAll:
    # The documented way to store many: one transaction around them.
    def put_all(rows: Sequence[Pair]) -> None:
        put = store.cache.set
        with store.cache.transact():
            for key, payload in rows:
                put(key, payload)

    return put_all


def _get(store: Cached) -> Get:
    return store.cache.get  # type: ignore[no-any-return]  # bytes are stored as they are


def _commit(store: Cached) -> PutOne:
    return store.cache.set  # type: ignore[no-any-return]  # as above


def read_back(directory: Path, keys: Sequence[bytes]) -> tuple[int, list[bytes | None]]:
    """Return how many rows a closed cache has, and the payloads of some keys."""
    with diskcache.Cache(str(directory)) as cache:
        return len(cache), [cache.get(bytes(key)) for key in keys]


CONTENDER = Contender(
    name="diskcache",
    settings=", ".join(f"{name}={value}" for name, value in SETTINGS.items()),
    ways=(
        Way("put", "set", _put_single, share=0.05),
        Way("put", "set inside transact", _put_in_transaction, share=0.25),
        Way("get", "get", _get),
        Way("commit", "set", _commit),
        # It pickles what isn't text, bytes or a number: its documented default.
        Way("put-object", "set", _put_single, share=0.05),
        Way("put-object", "set inside transact", _put_in_transaction, share=0.25),
        Way("get-object", "get", _get),
    ),
    open_store=Cached,
    read_back=read_back,
    takes_objects=True,
)
