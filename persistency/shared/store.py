"""Shared collections and pools: state that a server owns, and that many clients change and follow.

    store = SharedStore(persistency)
    users = store.open("users", kind="permanent")
    users.subscribe("client-7")
    record = users.set({"id": "ada", "role": "admin"}).result()    # record.subscribers: whom to tell

Everything is in one durable job, so a change, its seq and the rows it changes are one transaction.

Rules:
  1. What has expired is gone for every caller from that moment on, purged or not; opened again it starts empty.
  2. What blocks a thread has a twin for event loops, and both take the same steps.
  3. Ids, kinds and rows are durable. Who follows is not, and belongs to the `SharedStore` it was said to.

Doesn't know: how clients are reached, what they may see: an id that was made here is the right to what it names.
"""

from __future__ import annotations

import logging
import secrets
import weakref
from collections.abc import Callable, Generator
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self, TypeVar

from persistency.actor.reply import Reply
from persistency.arguments import as_choice, as_count, as_seconds, as_ttl_ms
from persistency.codec.keys import as_key
from persistency.engine import Persistency
from persistency.errors import Closed, Misuse
from persistency.job import Job
from persistency.logfields import about
from persistency.ops import Ttl
from persistency.shared.collection import Collection
from persistency.shared.following import Following, SharedChange
from persistency.shared.places import Kind, Place, Wanted, find, find_expired, open_place, purge_slice
from persistency.shared.pool import MergePool

log: logging.Logger = logging.getLogger("persistency.shared")

T = TypeVar("T")
S = TypeVar("S", Collection, MergePool)
Steps = Generator[Reply[Any], Any, T]

CHANGES_MAX = 10_000
"""How many changes of each collection and pool are kept for `changes_since`, the newest."""


class SharedStore:
    """The collections and pools of one job. Any thread may use it; where a loop runs, use what begins with `a`.

    `job_id`: the job they are in, opened by the first call that needs it and closed by `persistency`; its options are
    those it is opened with before, if it is. `changes_max`: how many changes are kept of each (10,000). Make one
    `SharedStore` for a job: several see the same records, but each has followers and listeners of its own.
    """

    def __init__(self, persistency: Persistency, job_id: str = "shared", *, changes_max: int = CHANGES_MAX) -> None:
        if not isinstance(persistency, Persistency):
            raise Misuse(f"persistency must be a Persistency, not {type(persistency).__name__}: pass the root object")
        self._changes_max = as_count(changes_max, "changes_max", 1)
        self._persistency = persistency
        persistency.has_job(job_id)  # says what is wrong with an id
        self._job_id = job_id
        self._job: Job | None = None
        self._following = Following()
        self._open: dict[int, Collection | MergePool] = {}  # by number, until they are purged
        self._janitors: dict[Event, None] = {}

    # -- opening -------------------------------------------------------------------------------------------------

    def open(
        self,
        id: str = "",  # noqa: A002  # what it is called everywhere
        kind: Kind = "temp",
        primary: str = "id",
        ttl: Ttl = 3600,
    ) -> Collection:
        """Open a collection, creating it if need be, and return it: the same one for an id that is open.

        id: without one it gets a fresh one that nobody can guess (24 hex digits), which is as good as a password.
        kind: `"temp"` (the default): it ends, with all it holds, `ttl` after it was first opened; `"permanent"`: it
          stays, and `ttl` is ignored.
        primary: the name of the field that is a record's key.
        ttl: seconds (3600) or a `timedelta`. Neither use nor opening it again renews it.

        Opening one that has expired removes what is left of it; it starts empty, and its seq at 0. Raises `Misuse` for
        a bad argument, and for another kind or primary than it has.
        """
        wanted = _wanted("collection", id, kind, primary, ttl)
        return self._as_handle(Collection, _wait(self._opening(self._opened(), wanted)))

    async def aopen(
        self,
        id: str = "",  # noqa: A002  # as above
        kind: Kind = "temp",
        primary: str = "id",
        ttl: Ttl = 3600,
    ) -> Collection:
        """Do what `open` does, without blocking the event loop."""
        wanted = _wanted("collection", id, kind, primary, ttl)
        return self._as_handle(Collection, await _await(self._opening(await self._aopened(), wanted)))

    def open_pool(self, id: str = "", kind: Kind = "temp", ttl: Ttl = 3600) -> MergePool:  # noqa: A002  # as above
        """Open a merge pool, creating it if need be, as `open` does a collection. Pools have ids of their own."""
        wanted = _wanted("pool", id, kind, "", ttl)
        return self._as_handle(MergePool, _wait(self._opening(self._opened(), wanted)))

    async def aopen_pool(self, id: str = "", kind: Kind = "temp", ttl: Ttl = 3600) -> MergePool:  # noqa: A002
        """Do what `open_pool` does, without blocking the event loop."""
        wanted = _wanted("pool", id, kind, "", ttl)
        return self._as_handle(MergePool, await _await(self._opening(await self._aopened(), wanted)))

    def get(self, id: str) -> Collection | None:  # noqa: A002  # as above
        """Return a collection that exists; `None` if there is none, or it has expired."""
        place = self._opened().run(find, "collection", _as_id(id)).result()
        return None if place is None else self._as_handle(Collection, place)

    async def aget(self, id: str) -> Collection | None:  # noqa: A002  # as above
        """Do what `get` does, without blocking the event loop."""
        place = await (await self._aopened()).run(find, "collection", _as_id(id))
        return None if place is None else self._as_handle(Collection, place)

    def get_pool(self, id: str) -> MergePool | None:  # noqa: A002  # as above
        """Return a pool that exists; `None` if there is none, or it has expired."""
        place = self._opened().run(find, "pool", _as_id(id)).result()
        return None if place is None else self._as_handle(MergePool, place)

    async def aget_pool(self, id: str) -> MergePool | None:  # noqa: A002  # as above
        """Do what `get_pool` does, without blocking the event loop."""
        place = await (await self._aopened()).run(find, "pool", _as_id(id))
        return None if place is None else self._as_handle(MergePool, place)

    def _opening(self, job: Job, wanted: Wanted) -> Steps[Place]:
        while True:
            place, live = yield job.run(open_place, wanted)
            if live:
                return place  # type: ignore[no-any-return]  # a Place
            yield from self._removing(job, place)
            self._sweep(job)

    def _as_handle(self, cls: type[S], place: Place) -> S:
        with self._following.lock:
            handle = self._open.get(place.number)
            if handle is None:
                assert self._job is not None
                handle = self._open[place.number] = cls(self._job, place, self._following, self._changes_max)
            assert isinstance(handle, cls)
            return handle

    def _opened(self) -> Job:
        self._check()
        if self._job is None:
            self._job = self._persistency.open_job(self._job_id)
        return self._job

    async def _aopened(self) -> Job:
        self._check()
        if self._job is None:
            self._job = await self._persistency.aopen_job(self._job_id)
        return self._job

    def _check(self) -> None:
        if self._following.closed:
            raise Closed("the shared store is closed", hint="Make a new SharedStore.")

    # -- following -----------------------------------------------------------------------------------------------

    def unsubscribe_all(self, client: str) -> None:
        """Have a client follow no collection and no pool any more: it has gone."""
        self._following.unsubscribe_all(client)

    def on_change(self, fn: Callable[[Collection | MergePool, SharedChange], object]) -> Callable[[], None]:
        """Have `fn(source, change)` called for each change made through this store from now on; return what ends that.

        `source` is the collection or pool. Its changes come in the order of their seqs, each once, when they are
        committed, and with those who followed at their moment: send them on, in that order. The last one is `"closed"`:
        it has expired and was purged, and nobody follows it any more.

        `fn` is called in a thread of its own, one change at a time, and holds up nobody; what it raises is logged. One
        that is 10,000 changes, or 32 MiB of them, behind misses the oldest: it can tell by the gap between seqs, and
        ask `changes_since`. With a listener a change that fails is logged at once, whoever looks at its reply.
        """
        self._check()
        return self._following.listen(fn)

    # -- purging -------------------------------------------------------------------------------------------------

    def purge_expired(self) -> int:
        """Remove what has expired, and return how many collections and pools that were.

        Those who followed them are told of by `on_change`.
        """
        return _wait(self._purging(self._opened()))

    async def apurge_expired(self) -> int:
        """Do what `purge_expired` does, without blocking the event loop."""
        return await _await(self._purging(await self._aopened()))

    def start_janitor(self, interval: float) -> Callable[[], None]:
        """Have a daemon thread call `purge_expired` every `interval` seconds; return what stops that (once is enough).

        It also ends with the store, and with its job. Raises `Misuse` for an interval that isn't more than 0.
        """
        self._check()
        seconds = as_seconds(interval, "interval", optional=False)
        if not seconds:
            raise Misuse("interval must be more than 0 seconds: pass 60.0, say")
        stopped = Event()
        self._janitors[stopped] = None
        Thread(
            target=_purge_at_intervals,
            args=(weakref.ref(self, lambda _store: stopped.set()), stopped, seconds),
            name=f"persistency:{self._job_id}:janitor",
            daemon=True,
        ).start()

        def stop() -> None:
            stopped.set()
            self._janitors.pop(stopped, None)

        return stop

    def _purging(self, job: Job) -> Steps[int]:
        count = 0
        while (place := (yield job.run(find_expired))) is not None:
            count += yield from self._removing(job, place)
        self._sweep(job)
        return count

    def _removing(self, job: Job, place: Place) -> Steps[bool]:
        while (removed := (yield job.run(purge_slice, place))) is None:
            pass
        return removed  # type: ignore[no-any-return]  # a bool: somebody else may have been faster

    def _sweep(self, job: Job) -> None:
        """Forget the handles of what has expired, and tell that nobody follows it any more."""
        now_ms = job.now_ms
        with self._following.lock:
            expired = [handle for handle in self._open.values() if handle._place.ended(now_ms)]
            for handle in expired:
                del self._open[handle._place.number]
        for handle in expired:
            handle._followers.end()

    def close(self) -> None:
        """Stop the janitor, forget followers and listeners, and have all handles refuse; a second call is nothing.

        Nothing is removed, and the job stays open until its `Persistency` closes it: others may be using it.
        """
        for stopped in list(self._janitors):
            stopped.set()
        self._janitors.clear()
        self._following.close()
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SharedStore {self._job_id!r} of {self._persistency!r}{' (closed)' if self._following.closed else ''}>"


def _purge_at_intervals(find: weakref.ref[SharedStore], stopped: Event, seconds: float) -> None:
    while not stopped.wait(seconds):
        store = find()
        if store is None:
            return
        try:
            store.purge_expired()
        except Closed:  # the store, the job or the root: there is nothing left to purge here
            return
        except Exception as error:  # a full disk, say, is over one day
            fields = about("purge_failed", store._job_id, error, source=repr(store))
            log.exception("%r: a purge failed", store, extra=fields)
        del store


# Arguments.


def _wanted(what: str, id_: Any, kind: Any, primary: Any, ttl: Any) -> Wanted:
    kind = as_choice(kind, "kind", ("temp", "permanent"))
    if not isinstance(primary, str):
        raise Misuse(f"primary must be a str, not {type(primary).__name__}: pass a field's name, such as 'id'")
    if kind == "temp":
        as_ttl_ms(ttl)
    default = "id" if what == "collection" else ""
    return Wanted(what, _as_id(id_) or secrets.token_hex(12), kind, primary or default, ttl if kind == "temp" else None)


def _as_id(value: Any) -> str:
    if not isinstance(value, str):
        raise Misuse(f"id must be a str, not {type(value).__name__}: pass the id it was opened by")
    as_key(("collection", value), "id")  # neither too long nor a lone surrogate
    return str.__str__(value)


# Waiting for steps that go the same way in a thread and in an event loop.


def _wait(steps: Steps[T]) -> T:
    try:
        reply = next(steps)
        while True:
            reply = steps.send(reply.result())
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # what the generator returned


async def _await(steps: Steps[T]) -> T:
    try:
        reply = next(steps)
        while True:
            reply = steps.send(await reply)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # as above
