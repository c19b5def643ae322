"""A program as a user would write it, about jobs and replies: it has no type error, and what it says of types is so."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import sys
from collections.abc import Awaitable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, assert_type

from persistency import (
    Change,
    Check,
    Conflict,
    Delete,
    DeletePrefix,
    DeleteRange,
    Entry,
    Failure,
    Found,
    Job,
    Key,
    KeyRange,
    Op,
    Persistency,
    Put,
    RawKey,
    Reader,
    Reply,
    Row,
    Statistics,
    StoredJob,
    Transaction,
    WriteFailed,
    key,
)


def keys() -> None:
    """Keys and ranges."""
    k = key("users", 7, None, 1.5, b"x", ("nested", True))
    assert_type(k, Key)
    assert_type(k.parts, tuple[Any, ...])
    assert_type(k + ("more",), Key)
    assert_type(RawKey(b"\0\1"), RawKey)
    assert_type(KeyRange.prefix(k), KeyRange)
    assert_type(KeyRange.text_prefix(("users",), "al"), KeyRange)
    assert_type(KeyRange(k, key("users", 8)).start, Key | None)
    assert_type(sorted([key("b"), key("a")]), list[Key])


def events(job: Job) -> None:
    """Events answer nothing; keys are tuples or `Key`s, payloads whatever holds bytes."""
    job.put("users", ("ada", 7), b"1")
    job.put("users", key("bob"), bytearray(b"2"), ttl=60)
    job.put("users", ("eve",), memoryview(b"3"), ttl=timedelta(hours=1))
    job.delete("users", ("bob",))
    job.delete_prefix("users", ("b",))
    job.delete_range("users", KeyRange(key("x"), key("y")))
    job.persist(Put("users", ("ada",), b""))
    batch: list[Op] = [Put("users", ("ada",), b"", 3.0), Delete("users", ("x",)), Check("users", ("y",), None)]
    job.persist(batch)
    job.persist([DeletePrefix("users", ("z",)), DeleteRange("users", KeyRange(key("x")))])
    puts = [Put("users", (number,), b"") for number in range(3)]
    job.persist(puts)
    job.persist(Put("users", (number,), b"") for number in range(3))


def requests(job: Job) -> None:
    """Requests answer by replies of their type."""
    assert_type(job.get("users", ("ada",)), Reply[bytes | None])
    assert_type(job.get("users", ("ada",)).result(), bytes | None)
    assert_type(job.get("users", ("ada",)).result(timeout=5), bytes | None)
    assert_type(job.entry("users", ("ada",)).result(), Entry | None)
    found = job.get_many("users", [("ada",), key("bob")]).result()
    assert_type(found, Found)
    assert_type(found["ada",], bytes)
    assert_type(list(found.items()), list[tuple[Key, bytes]])
    assert_type(found.get(("eve",)), bytes | None)
    assert_type(found.get(("eve",), b""), bytes)
    assert_type(job.exists("users", ("ada",)).result(), bool)
    assert_type(job.count("users").result(), int)
    rows = job.scan("users", KeyRange(key("a")), reverse=True, limit=3).result()
    assert_type(rows, list[Row])
    for row_key, payload in rows:
        assert_type(row_key, Key)
        assert_type(payload, bytes)
    assert_type(job.scan_prefix("users", ("ada",)).result()[0].key.parts, tuple[Any, ...])
    assert_type(job.snapshot("users").result()[0].expires_ms, int | None)
    assert_type(job.categories().result(), list[str])
    assert_type(job.commit([Put("users", ("ada",), b"")]).result(), int)
    assert_type(job.delete_acked("users", ("ada",)).result(), bool)
    assert_type(job.delete_prefix_acked("users", ("ada",)).result(), int)
    assert_type(job.delete_range_acked("users", KeyRange(key("x"))).result(), int)
    assert_type(job.compare_and_set("users", ("ada",), None, b"1", ttl=5).result(), bool)
    assert_type(job.increment("counts", ("ada",), 2).result(), int)
    assert_type(job.touch("users", ("ada",), None).result(), bool)
    assert_type(job.version().result(), int)
    assert_type(job.changes(0, 10).result(), list[Change])
    assert_type(job.changes(0, 10).result()[0].kind, Literal["put", "delete", "expire", "delete_range"])
    assert_type(job.storage_used().result(), int)
    assert_type(job.check(lambda done, total: None).result(), list[str])
    assert_type(job.compact().result(), int)
    assert_type(job.statistics(), Statistics)
    assert_type(job.statistics().accepted, int)
    assert_type(job.path, Path | None)
    assert_type(job.id, str)
    job.flush(sync=True).result()
    job.drain().result()


def replies(job: Job) -> None:
    """What is made of a reply keeps its type."""
    reply = job.get("users", ("ada",))
    assert_type(reply.map(lambda payload: 0 if payload is None else len(payload)), Reply[int])
    assert_type(reply.map(_text).map(str.split).result(), list[str])
    assert_type(reply.exception(), BaseException | None)
    assert_type(reply.cancel(), bool)
    reply.add_done_callback(lambda done: print(done.result()))
    for done in concurrent.futures.as_completed([job.count("users"), job.count("counts")]):
        assert_type(done.result(), int)
    finished, waiting = concurrent.futures.wait([job.count("users"), job.count("counts")])
    assert (len(finished), len(waiting)) == (2, 0)
    replies: list[Reply[bytes | None]] = [job.get("users", (name,)) for name in ("ada", "bob")]
    assert_type([one.result() for one in replies], list[bytes | None])
    _takes_awaitables([reply])


def _text(payload: bytes | None) -> str:
    return "" if payload is None else payload.decode()


def _takes_awaitables(awaitables: Sequence[Awaitable[bytes | None]]) -> None:
    assert awaitables


def pages(job: Job) -> None:
    """`iterate` gives rows, or keys."""
    for row in job.iterate("users", prefix=("ada",), page=100):
        assert_type(row, Row)
    for each in job.iterate("users", keys_only=True):
        assert_type(each, Key)
    for payload in (row.payload for row in job.iterate("users", KeyRange(key("a")), reverse=True)):
        assert_type(payload, bytes)


def ship(tx: Transaction, number: int, note: str = "") -> bytes:
    """Run in the data."""
    order = tx.get("orders", (number,)) or b"new"
    assert_type(tx.commit([Put("orders", (number,), order + note.encode())]), int)
    assert_type(tx.count("orders"), int)
    assert_type(tx.run(_first, 1), list[Row])
    return order


def _first(tx: Transaction, limit: int) -> list[Row]:
    return tx.scan("orders", limit=limit)


class Orders:
    """Whose method is sent to the data."""

    def close(self, tx: Transaction, number: int) -> bool:
        return tx.delete_acked("orders", (number,))


def functions(job: Job) -> None:
    """`run` knows what the function takes and gives."""
    assert_type(job.run(ship, 42).result(), bytes)
    assert_type(job.run(ship, 42, "shipped"), Reply[bytes])
    assert_type(job.run(Orders().close, 42).result(), bool)
    assert_type(job.run(functools.partial(ship, note="x"), 42).result(), bytes)
    assert_type(job.run(lambda tx: tx.count("orders")).result(), int)


async def loops(root: Path) -> None:
    """The same under an event loop."""
    async with Persistency(root, max_live_jobs=4, clock=lambda: 2e9) as p:
        assert_type(p, Persistency)
        job = await p.aopen_job("async", durability="power", ttl=3600, on_full="raise")
        assert_type(job, Job)
        job.put("c", (1,), b"")
        await job.drain()
        assert_type(await job.get("c", (1,)), bytes | None)
        assert_type(await job.get("c", (1,)).map(_text), str)
        payload, count = await asyncio.gather(job.get("c", (1,)), job.count("c"))
        assert_type(payload, bytes | None)
        assert_type(count, int)
        assert_type(await asyncio.wait_for(job.get("c", (1,)), 5), bytes | None)
        assert_type(await asyncio.wrap_future(job.count("c")), int)
        assert_type(await job.run(ship, 1), bytes)
        async for row in job.iterate("c"):
            assert_type(row, Row)
        async for each in job.iterate("c", keys_only=True):
            assert_type(each, Key)
        async with await p.aopen_reader("async") as reader:
            assert_type(reader, Reader)
            assert_type(await reader.get("c", (1,)), bytes | None)
        assert_type(await p.adrop_job("async"), list[Path])


def told(job_id: str, failures: Sequence[Failure]) -> None:
    """Be told of failures."""
    for failure in failures:
        assert_type(failure.error, BaseException)
        assert_type(failure.outcome, str)
        print(job_id, failure.op)


def stores(root: Path) -> None:
    """A root and its jobs."""
    with Persistency(root) as p, p.open_job("alpha", feed_changes_max=100, max_bytes=None, on_error=told) as job:
        assert_type(job, Job)
        assert_type(p["alpha"], Job)
        assert_type(p.job("alpha"), Job)
        assert_type(list(p), list[str])
        assert_type(p.stored_jobs(), list[StoredJob])
        assert_type(p.purge("500MB"), list[str])
        job.put("users", ("ada",), b"1")
        job.put("users", ("ada", 1), b"1")
        events(job)
        requests_after_events(job)
        replies(job)
        pages(job)
        functions(job)
        try:
            job.commit(Check("users", ("ada",), 1)).result()
        except Conflict as conflict:
            assert conflict.expected == 1
        job.persist(Check("users", ("ada",), 1))
        try:
            job.flush().result()
        except WriteFailed as failed:
            assert_type(failed.failures, tuple[Failure, ...])
            assert_type(failed.omitted, int)


def requests_after_events(job: Job) -> None:
    """Ask for everything about rows that are there."""
    job.put("users", ("ada",), b"1")
    job.put("users", ("ada", 1), b"1")
    requests(job)


def several(job: Job, names: Iterable[str]) -> dict[str, bytes]:
    """Take and give plain types, as a service's own functions do."""
    found = job.get_many("users", [(name,) for name in names]).result()
    return {name: found[name,] for name in names if found.get((name,)) is not None}


if __name__ == "__main__":
    keys()
    stores(Path(sys.argv[1]))
    asyncio.run(loops(Path(sys.argv[1])))
