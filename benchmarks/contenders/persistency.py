"""This engine, with its defaults.

Rules:
  1. Nothing is set that a user wouldn't get without asking.

Doesn't know: its peers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.contenders.tables import read_back
from benchmarks.protocol import (
    CATEGORY,
    AwaitedGet,
    AwaitedPut,
    Contender,
    EncodeAll,
    Get,
    Pair,
    PostSome,
    PutAll,
    PutOne,
    Scan,
    Way,
)
from persistency import Key, Persistency, Put, key

TTL_SECONDS = 3_600  # nothing ends while it is measured
FEED_CHANGES = 100_000  # half of what the usual run puts, so that the oldest are dropped too


class Ours:
    """A job of its own in a root of its own."""

    def __init__(self, directory: Path, _runner: asyncio.Runner) -> None:
        self._persistency = Persistency(directory)
        self.job = self._persistency.open_job(CATEGORY)

    def reopen(self, **options: Any) -> None:
        """Open the job again, with other options."""
        self.job.close()
        self.job = self._persistency.open_job(CATEGORY, **options)

    def fill(self, rows: Sequence[Pair]) -> None:
        """Store rows."""
        _put_all(self)(rows)

    def close(self) -> None:
        """Close the job and the root."""
        self._persistency.close()


def _put_all(store: Ours) -> PutAll:
    def put_all(rows: Sequence[Pair]) -> None:
        put = store.job.put
        for encoded, payload in rows:
            put(CATEGORY, encoded, payload)  # type: ignore[arg-type]  # a Key: see takes_keys
        store.job.flush().result()

    return put_all


def _put_all_with_quota(store: Ours) -> PutAll:
    store.reopen(max_bytes=2**40)
    return _put_all(store)


def _put_all_with_feed(store: Ours) -> PutAll:
    store.reopen(feed_changes_max=FEED_CHANGES)
    return _put_all(store)


def _put_all_with_ttl(store: Ours) -> PutAll:
    def put_all(rows: Sequence[Pair]) -> None:
        put = store.job.put
        for encoded, payload in rows:
            put(CATEGORY, encoded, payload, ttl=TTL_SECONDS)  # type: ignore[arg-type]  # a Key: see takes_keys
        store.job.flush().result()

    return put_all


def _produce(store: Ours) -> PutOne:
    put = store.job.put
    return lambda encoded, payload: put(CATEGORY, encoded, payload)  # type: ignore[arg-type]  # as above


def _get(store: Ours) -> Get:
    get = store.job.get
    return lambda encoded: get(CATEGORY, encoded).result()  # type: ignore[arg-type]  # as above


def _commit(store: Ours) -> PutOne:
    commit = store.job.commit
    return lambda encoded, payload: commit(Put(CATEGORY, encoded, payload)).result()  # type: ignore[arg-type]  # as above


def _aget(store: Ours) -> AwaitedGet:
    get = store.job.get
    return lambda encoded: get(CATEGORY, encoded)  # type: ignore[arg-type]  # as above


def _acommit(store: Ours) -> AwaitedPut:
    commit = store.job.commit
    return lambda encoded, payload: commit(Put(CATEGORY, encoded, payload))  # type: ignore[arg-type]  # as above


def _post(store: Ours) -> PostSome:
    put, drain = store.job.put, store.job.drain

    async def post(rows: Sequence[Pair]) -> int:
        for encoded, payload in rows:
            put(CATEGORY, encoded, payload)  # type: ignore[arg-type]  # as above
        await drain()
        return len(rows)

    return post


def _post_nothing(_store: Ours) -> PostSome:
    # What the loop's timers do beside an open, idle job: to hold the others against.
    async def post(_rows: Sequence[Pair]) -> int:
        return 0

    return post


def _scan(store: Ours) -> Scan:
    return lambda prefix: store.job.scan_prefix(CATEGORY, Key(prefix)).result()


def _encode(_store: object) -> EncodeAll:
    def encode(parts: Sequence[tuple[str, int]]) -> list[Key]:
        return [key(text, number) for text, number in parts]

    return encode


CONTENDER = Contender(
    name="persistency",
    settings="defaults: durability 'process', mailbox of 8,192 operations and 32 MiB",
    ways=(
        Way("put", "put, flush", _put_all),
        Way("put-kept", "plain", _put_all),
        Way("put-kept", "with a ttl", _put_all_with_ttl),
        Way("put-kept", "with a quota", _put_all_with_quota),
        Way("put-kept", "with a feed", _put_all_with_feed),
        Way("produce", "put", _produce),
        Way("get", "get", _get),
        Way("commit", "commit", _commit),
        Way("aget", "await get", _aget),
        Way("acommit", "await commit", _acommit),
        Way("post", "put, drain", _post),
        Way("post", "no puts", _post_nothing),
        Way("scan", "scan_prefix", _scan),
        Way("encode", "key", _encode),
    ),
    open_store=Ours,
    read_back=read_back,
    takes_keys=True,
)
