"""This engine, with its defaults.

Rules:
  1. Nothing is set that a user wouldn't get without asking.

Doesn't know: its peers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
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
    GetMany,
    GetObject,
    Iterate,
    Object,
    Pair,
    PostSome,
    PutAll,
    PutObjects,
    PutOne,
    Queue,
    Scan,
    Way,
)
from persistency import Category, Key, Persistency, Put, Reply, key

TTL_SECONDS = 3_600  # nothing ends while it is measured
LONG_PAGE = 4_096  # rows: sixteen times the default
FEED_CHANGES = 100_000  # half of what the usual run puts, so that the oldest are dropped too

PutKey: Any = Put  # see `Ours.job`


class Ours:
    """A job of its own in a root of its own."""

    def __init__(self, directory: Path, runner: asyncio.Runner) -> None:
        self.runner = runner
        self._persistency = Persistency(directory)
        # Any: the protocol speaks of keys as bytes, and this contender is handed its own `Key`s: see takes_keys.
        self.job: Any = self._persistency.open_job(CATEGORY)

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
            put(CATEGORY, encoded, payload)
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
            put(CATEGORY, encoded, payload, ttl=TTL_SECONDS)
        store.job.flush().result()

    return put_all


def _produce(store: Ours) -> PutOne:
    put = store.job.put
    return lambda encoded, payload: put(CATEGORY, encoded, payload)


def _get(store: Ours) -> Get:
    get = store.job.get
    return lambda encoded: get(CATEGORY, encoded).result()


def _commit(store: Ours) -> PutOne:
    commit = store.job.commit
    return lambda encoded, payload: commit(PutKey(CATEGORY, encoded, payload)).result()


def _aget(store: Ours) -> AwaitedGet:
    get = store.job.get
    return lambda encoded: get(CATEGORY, encoded)


def _acommit(store: Ours) -> AwaitedPut:
    commit = store.job.commit
    return lambda encoded, payload: commit(PutKey(CATEGORY, encoded, payload))


def _post(store: Ours) -> PostSome:
    put, drain = store.job.put, store.job.drain

    async def post(rows: Sequence[Pair]) -> int:
        for encoded, payload in rows:
            put(CATEGORY, encoded, payload)
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


def _produce_all(store: Ours) -> PutAll:
    put = store.job.put

    def put_all(rows: Sequence[Pair]) -> None:
        for encoded, payload in rows:
            put(CATEGORY, encoded, payload)

    return put_all


def _queue(store: Ours) -> Queue:
    store.reopen(mailbox_ops_max=2**30, mailbox_bytes_max=2**40)
    job = store.job

    @contextmanager
    def queue(rows: Iterable[Pair]) -> Iterator[None]:
        begun, released = threading.Event(), threading.Event()

        def wait(_tx: object) -> None:
            begun.set()
            released.wait()

        async def ask_to_wait() -> Reply[None]:
            # From an event loop it is the worker that runs it; here it would run in this thread.
            reply: Reply[None] = job.run(wait)
            return reply

        try:
            waiting = store.runner.run(ask_to_wait())
            waiting.add_done_callback(lambda _waiting: begun.set())  # should it fail before
            begun.wait()
            waited_for = 1  # the function that waits is an operation, too
            for encoded, payload in rows:
                job.put(CATEGORY, encoded, payload)
                waited_for += 1
            assert job.statistics().pending == waited_for
            yield
        finally:
            released.set()
        waiting.result()
        job.flush().result()

    return queue


def _queue_in_list(store: Ours) -> Queue:
    # What somebody would write who had no mailbox.
    @contextmanager
    def queue(rows: Iterable[Pair]) -> Iterator[None]:
        waiting = [(CATEGORY, encoded, payload) for encoded, payload in rows]
        yield
        for category, encoded, payload in waiting:
            store.job.put(category, encoded, payload)
        store.job.flush().result()

    return queue


def _put_objects(store: Ours) -> PutObjects:
    def put_all(rows: Sequence[tuple[bytes, Object]]) -> None:
        put: Any = Category(store.job, CATEGORY).put
        for encoded, value in rows:
            put(encoded, value)
        store.job.flush().result()

    return put_all


def _get_object(store: Ours) -> GetObject:
    get: Any = Category(store.job, CATEGORY).get
    return lambda encoded: get(encoded).result()


def _put_all_powered(store: Ours) -> PutAll:
    store.reopen(durability="power")
    return _put_all(store)


def _commit_powered(store: Ours) -> PutOne:
    store.reopen(durability="power")
    return _commit(store)


def _get_many(store: Ours) -> GetMany:
    get_many = store.job.get_many
    return lambda keys: get_many(CATEGORY, keys).result()


def _iterate(store: Ours) -> Iterate:
    return lambda: store.job.iterate(CATEGORY)


def _iterate_long_pages(store: Ours) -> Iterate:
    return lambda: store.job.iterate(CATEGORY, page=LONG_PAGE)


def _encode(_store: object) -> EncodeAll:
    def encode(parts: Sequence[tuple[str, int]]) -> list[Key]:
        return [key(text, number) for text, number in parts]

    return encode


class OurJob:
    """A job of a root that has several."""

    def __init__(self, job: Any) -> None:
        self._job = job  # as above
        self.close = job.close

    def put(self, encoded: bytes, payload: bytes) -> None:
        """Commit a row."""
        self._job.commit(PutKey(CATEGORY, encoded, payload)).result()

    def get(self, encoded: bytes) -> bytes | None:
        """Return a payload."""
        payload: bytes | None = self._job.get(CATEGORY, encoded).result()
        return payload


class OurJobs:
    """A root with several jobs."""

    def __init__(self, directory: Path, live_max: int | None) -> None:
        self._persistency = Persistency(directory, max_live_jobs=live_max)
        self.close = self._persistency.close

    def open(self, name: str) -> OurJob:
        """Open a job."""
        return OurJob(self._persistency.open_job(name))


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
        Way("put-spinning", "alone", _put_all),
        Way("put-spinning", "beside one thread", _put_all, spinning=1),
        Way("put-spinning", "beside four threads", _put_all, spinning=4, share=0.25),
        Way("get-spinning", "get", _get, spinning=1),
        Way("scan-spinning", "scan_prefix", _scan, spinning=1),
        Way("get-producer", "get", _get, producer=_produce_all),
        Way("aget-producer", "await get", _aget, producer=_produce_all),
        Way("queue", "in the mailbox", _queue),
        Way("queue", "a list of tuples", _queue_in_list),
        Way("put-object", "Category.put, flush", _put_objects),
        Way("get-object", "Category.get", _get_object),
        Way("put-durable", "process", _put_all),
        Way("put-durable", "power", _put_all_powered),
        Way("commit-durable", "process", _commit),
        Way("commit-durable", "power", _commit_powered, share=0.1),
        Way("get-many", "get_many", _get_many),
        Way("iterate", "iterate", _iterate),
        Way("iterate", f"iterate, page={LONG_PAGE:,}", _iterate_long_pages),
        Way("open", "open_job", lambda _store: OurJobs),
        Way("evict", "max_live_jobs", lambda _store: OurJobs),
        Way("import", "import", lambda _store: lambda: "persistency"),
        Way("encode", "key", _encode),
    ),
    open_store=Ours,
    read_back=read_back,
    takes_keys=True,
)
