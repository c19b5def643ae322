"""What a forked child may do with what it has inherited: nothing. Every verb of every handle is tried.

Each has to raise `Forked`. A reply that was settled before the fork keeps its answer; one that wasn't is settled in the
child, with `Forked`.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from persistency import (
    RAW,
    Category,
    ChangeFeed,
    Check,
    Collection,
    Forked,
    Job,
    KeyRange,
    KVStore,
    MergePool,
    Persistency,
    Put,
    Reply,
    SharedStore,
)

SECONDS = 1.0  # for what must come at once
SPAN = KeyRange((0,), (9,))

Verb = Callable[[Any], object]


def _entered(handle: Any) -> None:
    with handle:
        pass


def _awaited(call: Callable[[Any], Any]) -> Verb:
    """Return a verb that awaits what `call` gives, in an event loop of its own."""

    async def main(handle: Any) -> Any:
        return await call(handle)

    return lambda handle: asyncio.run(main(handle))


def _awaited_in_trio(call: Callable[[Any], Any]) -> Verb:
    """Return a verb that awaits what `call` gives, in a run of trio's."""
    import trio

    async def main(handle: Any) -> Any:
        return await call(handle)

    return lambda handle: trio.run(main, handle)


def _walked(call: Callable[[Any], Any]) -> Verb:
    async def main(handle: Any) -> None:
        async for _ in call(handle):
            pass

    return lambda handle: asyncio.run(main(handle))


READS: dict[str, Verb] = {
    "aclose": _awaited(lambda h: h.aclose()),
    "categories": lambda h: h.categories(),
    "changes": lambda h: h.changes(0, 10),
    "check": lambda h: h.check(),
    "close": lambda h: h.close(),
    "count": lambda h: h.count("rows"),
    "entry": lambda h: h.entry("rows", (0,)),
    "exists": lambda h: h.exists("rows", (0,)),
    "get": lambda h: h.get("rows", (0,)),
    "get, awaited": _awaited(lambda h: h.get("rows", (0,))),
    "get, awaited in trio": _awaited_in_trio(lambda h: h.get("rows", (0,))),
    "get_many": lambda h: h.get_many("rows", [(0,), (1,)]),
    "iterate": lambda h: list(h.iterate("rows")),
    "iterate, async": _walked(lambda h: h.iterate("rows")),
    "keys": lambda h: h.keys("rows"),
    "scan": lambda h: h.scan("rows"),
    "scan_prefix": lambda h: h.scan_prefix("rows", (0,)),
    "snapshot": lambda h: h.snapshot("rows"),
    "storage_used": lambda h: h.storage_used(),
    "version": lambda h: h.version(),
    "with": _entered,
}
JOB: dict[str, Verb] = {
    **READS,
    "changes, waiting": lambda job: job.changes(10**9, 1, wait=True),
    "commit": lambda job: job.commit([Check("rows", (9,), None), Put("rows", (9,), b"child")]),
    "commit, awaited": _awaited(lambda job: job.commit(Put("rows", (9,), b"child"))),
    "commit nothing": lambda job: job.commit([]),
    "compact": lambda job: job.compact(),
    "compare_and_set": lambda job: job.compare_and_set("rows", (9,), None, b"child"),
    "delete": lambda job: job.delete("rows", (0,)),
    "delete_acked": lambda job: job.delete_acked("rows", (0,)),
    "delete_prefix": lambda job: job.delete_prefix("rows", (0,)),
    "delete_prefix_acked": lambda job: job.delete_prefix_acked("rows", (0,)),
    "delete_range": lambda job: job.delete_range("rows", SPAN),
    "delete_range_acked": lambda job: job.delete_range_acked("rows", SPAN),
    "drain": lambda job: job.drain(),
    "export": lambda job: job.export(io.BytesIO()),
    "flush": lambda job: job.flush(),
    "flush, synced": lambda job: job.flush(sync=True),
    "flush, awaited": _awaited(lambda job: job.flush()),
    "import_": lambda job: job.import_(io.BytesIO()),
    "increment": lambda job: job.increment("rows", ("counter",)),
    "persist": lambda job: job.persist([Put("rows", (9,), b"child")]),
    "persist nothing": lambda job: job.persist([]),
    "put": lambda job: job.put("rows", (9,), b"child"),
    "put with a ttl": lambda job: job.put("rows", (9,), b"child", ttl=100),
    "run": lambda job: job.run(lambda tx: tx.put("rows", (9,), b"child")),
    "statistics": lambda job: job.statistics(),
    "touch": lambda job: job.touch("rows", (0,), 100),
    "close, undrained": lambda job: job.close(drain=False),
    "close within a time": lambda job: job.close(1.0),
}
PERSISTENCY: dict[str, Verb] = {
    "aclose": _awaited(lambda p: p.aclose()),
    "adrop_job": _awaited(lambda p: p.adrop_job("alpha")),
    "aopen_job": _awaited(lambda p: p.aopen_job("alpha")),
    "aopen_job in trio": _awaited_in_trio(lambda p: p.aopen_job("alpha")),
    "aopen_reader": _awaited(lambda p: p.aopen_reader("alpha")),
    "close": lambda p: p.close(),
    "close_job": lambda p: p.close_job("alpha"),
    "drop_job": lambda p: p.drop_job("alpha"),
    "has_job": lambda p: p.has_job("alpha"),
    "in": lambda p: "alpha" in p,
    "iter": lambda p: list(p),
    "job": lambda p: p.job("alpha"),
    "[]": lambda p: p["alpha"],
    "open_job": lambda p: p.open_job("alpha"),
    "open_job, another": lambda p: p.open_job("another"),
    "open_reader": lambda p: p.open_reader("alpha"),
    "purge": lambda p: p.purge(1),
    "purge_expired": lambda p: p.purge_expired(),
    "restore": lambda p: p.restore("alpha", "/nowhere"),
    "stored_jobs": lambda p: p.stored_jobs(),
    "with": _entered,
}
# Of these nothing is asked that somebody would have to answer.
HARMLESS = {"closed", "id", "now_ms", "path", "root", "instance", "reset"}

CATEGORY: dict[str, Verb] = {
    "put": lambda c: c.put((9,), b"child"),
    "delete": lambda c: c.delete((0,)),
    "get": lambda c: c.get((0,)),
    "compare_and_set": lambda c: c.compare_and_set((9,), None, b"child"),
    "list": lambda c: list(c.list()),
    "scan": lambda c: c.scan(),
    "mapping": lambda c: len(c.mapping()),
    "mapping []": lambda c: c.mapping()[(0,)],
    "mapping [] =": lambda c: c.mapping().update({(9,): b"child"}),
    "mapping pop": lambda c: c.mapping().pop((0,)),
}
KVSTORE: dict[str, Verb] = {
    "set": lambda kv: kv.set("k", b"child"),
    "set_with_ttl": lambda kv: kv.set_with_ttl("k", b"child", 100),
    "get": lambda kv: kv.get("k"),
    "has": lambda kv: kv.has("k"),
    "list": lambda kv: kv.list(),
    "delete": lambda kv: kv.delete("k"),
    "delete_by_prefix": lambda kv: kv.delete_by_prefix("k"),
    "storage_used": lambda kv: kv.storage_used(),
}
SHARED: dict[str, Verb] = {
    "open": lambda shared: shared.open("users", kind="permanent"),
    "open another": lambda shared: shared.open("another"),
    "aopen": _awaited(lambda shared: shared.aopen("another")),
    "get": lambda shared: shared.get("users"),
    "open_pool": lambda shared: shared.open_pool("another"),
    "purge_expired": lambda shared: shared.purge_expired(),
}
COLLECTION: dict[str, Verb] = {
    "set": lambda collection: collection.set({"id": "child"}),
    "get": lambda collection: collection.get("ada"),
    "delete": lambda collection: collection.delete("ada"),
    "snapshot": lambda collection: collection.snapshot(),
    "changes_since": lambda collection: collection.changes_since(0),
}
POOL: dict[str, Verb] = {
    "merge": lambda pool: pool.merge("client", {"by": "child"}),
    "snapshot": lambda pool: pool.snapshot(),
    "changes_since": lambda pool: pool.changes_since(0),
}


@dataclass
class Handles:
    """What a process has open when it is forked: handles with the verbs to try on each, and replies."""

    tried: list[tuple[str, Any, dict[str, Verb]]] = field(default_factory=list)
    waiting: dict[str, Reply[Any]] = field(default_factory=dict)  # nobody has answered them yet

    def add(self, name: str, handle: Any, verbs: dict[str, Verb]) -> Any:
        """Have some verbs tried on a handle; return it."""
        self.tried.append((name, handle, verbs))
        return handle

    def add_views(self, persistency: Persistency, job: Job) -> None:
        """Have every kind of view of a job, and of its root, tried as well."""
        self.add("category", Category(job, "rows", RAW), CATEGORY)
        self.add("store", KVStore(job), KVSTORE)
        feed = ChangeFeed(job, after=0, page=1)
        next(feed)
        self.add("feed", feed, {"next": lambda feed: [next(feed), next(feed)], "async": _walked(lambda feed: feed)})
        self.add(
            "new views", job, {"ChangeFeed": lambda job: next(ChangeFeed(job)), "KVStore": lambda j: KVStore(j).list()}
        )
        pages = iter(job.iterate("rows", page=1))
        next(pages)
        self.add("pages", pages, {"next": lambda pages: [next(pages), next(pages)]})
        shared = self.add("shared", SharedStore(persistency), SHARED)
        collection: Collection = shared.open("users", kind="permanent")
        collection.set({"id": "ada"}).result()
        self.add("collection", collection, COLLECTION)
        pool: MergePool = shared.open_pool("state", kind="permanent")
        pool.merge("client", {"by": "parent"}).result()
        self.add("pool", pool, POOL)

    def wrong(self) -> Iterator[str]:
        """Try everything, in the child; give what didn't raise `Forked`."""
        for name, reply in self.waiting.items():
            yield from unsettled(name, reply)
        for name, handle, verbs in self.tried:
            for verb, call in verbs.items():
                yield from not_forked(f"{name}.{verb}", lambda call=call, handle=handle: call(handle))  # type: ignore[misc]


def not_forked(name: str, call: Callable[[], object]) -> list[str]:
    """Call something that has to raise `Forked`, or whose reply has to; return what it did instead."""
    try:
        answer = call()
        if isinstance(answer, Reply):
            answer = answer.result(SECONDS)
    except Forked:
        return []
    except BaseException as error:
        return [f"handle: {name} raised {error!r}"]
    return [f"handle: {name} gave {str(answer)[:80]}"]


def unsettled(name: str, reply: Reply[Any]) -> list[str]:
    """Ask a reply that nobody will answer for everything; return what it should have said, and didn't."""
    told: list[Any] = []
    wrong = []
    if reply.cancel() or reply.cancelled():
        wrong.append(f"reply: {name} was cancelled")
    if not reply.done() or reply.running():
        wrong.append(f"reply: {name} isn't done: {reply!r}")
    reply.add_done_callback(told.append)
    if told != [reply]:
        wrong.append(f"reply: {name} didn't call back")
    if concurrent.futures.wait([reply], timeout=SECONDS).not_done:
        wrong.append(f"reply: {name} isn't done for concurrent.futures")
    asked: dict[str, Callable[[], object]] = {
        "result": lambda: reply.result(SECONDS),
        "map": lambda: reply.map(str).result(SECONDS),
        "await": lambda: _awaited(lambda one: asyncio.wait_for(one, SECONDS))(reply),
        "wrap_future": lambda: _awaited(lambda one: asyncio.wait_for(asyncio.wrap_future(one), SECONDS))(reply),
    }
    for verb, ask in asked.items():
        wrong += [f"reply: {name}: {complaint}" for complaint in not_forked(verb, ask)]
    try:
        error = reply.exception(SECONDS)
        wrong += [] if isinstance(error, Forked) else [f"reply: {name}: exception() gave {error!r}"]
    except BaseException as error:
        wrong.append(f"reply: {name}: exception() raised {error!r}")
    return wrong


def uncovered(kind: type, verbs: Iterable[str]) -> set[str]:
    """Return the public names of a class that are not among the verbs that are tried."""
    return {name for name in dir(kind) if not name.startswith("_")} - set(verbs) - HARMLESS


def backup_verb(target: Path) -> dict[str, Verb]:
    """Return the verb that needs a path."""
    return {"backup": lambda job: job.backup(target)}
