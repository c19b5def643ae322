"""Storms of giving up: tasks, threads and event loops that stop waiting for a job at any moment, in every way there is.

Several threads run event loops whose tasks write, read and wait: and are cancelled, run out of time, share a reply that
somebody else cancels, or are left behind by a loop that is closed. Half of the time the job is held at first, so that
there is something to give up. What was posted, and with what success, is kept in books; `tests.crash.aftermath` holds a
job against them.

Delays are load here; nothing relies on their length.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import queue
import random
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from persistency import Check, Conflict, Job, Key, Overloaded, Put, Reply, key
from persistency.transaction import Transaction

LIMIT = 20.0  # seconds for whatever must come
LOOPS_AT_ONCE = 3
LOOPS_EACH = 2
TASKS = 8
STEPS = 12
VERSIONS_AHEAD = 40  # of the changes that are waited for, at most
NEVER = 10**9  # a version no row has


Way = Callable[[Reply[Any]], Coroutine[Any, Any, None]]


@dataclass
class Books:
    """What one loop has posted, and what became of it."""

    rows: list[Key] = field(default_factory=list)
    ops: int = 0
    failing: int = 0  # batches that can't succeed
    seen: int = 0  # of those, how many were looked at
    counted: int = 0  # increments
    doomed: list[Key] = field(default_factory=list)  # rows whose delete was refused
    given_up: int = 0
    left_pending: int = 0  # replies that weren't settled when their loop was closed
    replies: list[Reply[Any]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def add(self, other: Books) -> None:
        """Take another loop's books over."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


def put_row(tx: Transaction, at: Key) -> None:
    """Write a row."""
    tx.put("rows", at, b"x")


def hold(_tx: Transaction, gate: threading.Event) -> None:
    """Keep the job's turn until the gate is opened."""
    gate.wait(LIMIT)


class Loop:
    """One event loop and its tasks, in a thread of its own."""

    def __init__(self, job: Job, number: int, rng: random.Random, others: queue.SimpleQueue[Any], limit: float) -> None:
        self.books = Books()
        self._job = job
        self._number = number
        self._rng = rng
        self._others = others
        self._limit = limit
        self._fresh = itertools.count()
        self._gate = threading.Event()
        self._version = 0  # as far as is known here
        self._closing = rng.randrange(3) == 0

    def run(self) -> None:
        """Run the loop to one of its ends."""
        try:
            if self._closing:
                self._run_and_close()
            else:
                asyncio.run(self._main())
        except BaseException as error:
            self.books.wrong.append(f"raised: {error!r} out of a loop")
        finally:
            self._gate.set()

    async def _main(self) -> None:
        """Run tasks to their ends, or leave them to `asyncio.run`, which cancels them."""
        loop = asyncio.get_running_loop()
        if self._rng.randrange(2):
            self._hold()
            loop.call_later(self._rng.random() * 0.004, self._gate.set)
        tasks = [loop.create_task(self._task()) for _ in range(TASKS)]
        early = self._rng.randrange(2)
        done, _ = await asyncio.wait(tasks, timeout=self._rng.random() * 0.02 if early else self._limit)
        if not early and len(done) < len(tasks):
            self.books.wrong.append(f"waiting: {len(tasks) - len(done)} tasks after {self._limit} s")
        self._gather_errors(done)

    def _run_and_close(self) -> None:
        """Close the loop under its tasks and their replies; half of the time none of those can have been answered."""
        loop = asyncio.new_event_loop()
        tasks = []
        try:
            asyncio.set_event_loop(loop)
            loop.call_soon(self._hold)
            if self._rng.randrange(2):
                loop.call_later(self._rng.random() * 0.004, self._gate.set)
            tasks = [loop.create_task(self._task()) for _ in range(TASKS)]
            loop.call_later(self._rng.random() * 0.01, loop.stop)
            loop.run_forever()
        finally:
            self._gather_errors({task for task in tasks if task.done()})
            left = asyncio.all_tasks(loop)
            self.books.left_pending = sum(not reply.done() for reply in self.books.replies)
            loop.close()
            asyncio.set_event_loop(None)
            for task in left:
                task._log_destroy_pending = False  # type: ignore[attr-defined]  # that is what it is about
                coroutine = task.get_coro()
                assert coroutine is not None
                # Here, from the outermost to the innermost. Left to the garbage collector, which takes them in any
                # order, a coroutine in `asyncio.timeout` ends with its task in its own middle, and Python 3.11 crashes.
                coroutine.close()

    def _gather_errors(self, done: set[asyncio.Task[None]]) -> None:
        for task in done:
            if not task.cancelled() and (error := task.exception()) is not None:
                self.books.wrong.append(f"raised: {error!r} out of a task")

    def _hold(self) -> None:
        with suppress(Overloaded):
            self._job.run(hold, self._gate)
            self.books.ops += 1

    # -- what is posted ------------------------------------------------------------------------------------------

    def _row(self) -> Key:
        return key(self._number, next(self._fresh))

    def _wrote(self, *rows: Key, ops: int = 0) -> None:
        self.books.rows += rows
        self.books.ops += ops or len(rows)

    def _put(self) -> Key:
        row = self._row()
        self._job.put("rows", row, b"x")
        self._wrote(row)
        return row

    def _events(self) -> None:
        rows = [self._row(), self._row()]
        self._job.persist(Put("rows", row, b"x") for row in rows)
        self._wrote(*rows)

    def _write(self) -> Reply[Any]:
        return self._rng.choice((self._commit, self._swap, self._run, self._increment, self._delete))()

    def _commit(self) -> Reply[Any]:
        rows = [self._row() for _ in range(self._rng.randint(1, 2))]
        reply = self._job.commit([Put("rows", row, b"x") for row in rows])
        self._wrote(*rows)
        return reply

    def _swap(self) -> Reply[Any]:
        row = self._row()
        reply = self._job.compare_and_set("rows", row, None, b"x")
        self._wrote(row)
        return reply

    def _run(self) -> Reply[Any]:
        row = self._row()
        reply = self._job.run(put_row, row)
        self._wrote(row)
        return reply

    def _increment(self) -> Reply[Any]:
        reply = self._job.increment("numbers", ("n",))
        self.books.counted += 1
        self._wrote(ops=1)
        return reply

    def _delete(self) -> Reply[Any]:
        row = self._row()
        self._job.put("doomed", row, b"")
        self._wrote(ops=1)
        self.books.doomed.append(row)
        reply = self._job.delete_acked("doomed", row)
        self._wrote(ops=1)
        self.books.doomed.pop()
        return reply

    def _fail(self) -> Reply[Any]:
        row = self._row()
        reply = self._job.commit([Check("rows", row, NEVER), Put("rows", row, b"")])
        self.books.failing += 1
        self._wrote(ops=2)
        return reply

    def _read(self) -> Reply[Any]:
        job, row = self._job, key(self._number, 0)
        asks: list[Callable[[], Reply[Any]]] = [
            lambda: job.get("rows", row), lambda: job.entry("rows", row), lambda: job.scan("rows", limit=3),
            lambda: job.count("rows"), lambda: job.get_many("rows", [row]), job.version, job.flush, job.drain,
        ]  # fmt: skip
        return self._rng.choice(asks)()

    # -- how it is given up --------------------------------------------------------------------------------------

    async def _task(self) -> None:
        for step in range(STEPS):
            try:
                if step % 3 == 0:
                    self._events()
                await self._step()
            except Overloaded:
                await self._job.drain()

    async def _step(self) -> None:
        kind = self._rng.randrange(10)
        if kind == 0:
            await self._await_own_row()
        elif kind == 1:
            # Of a failure nobody may be left who could look: so it isn't kept here.
            await self._by_some_way(self._fail(), [self._cancel, self._time_out, self._drop, self._awaiting])
        elif kind == 2 and not self._closing:
            self.books.given_up += 1
            await self._walk()
        elif kind == 3:
            ahead = self._rng.randrange(VERSIONS_AHEAD)
            await self._by_any_way(self._job.changes(self._version + ahead, 10, wait=True))
        else:
            reply = self._read() if kind % 2 else self._write()
            await self._by_any_way(reply, self._one_of_two)

    async def _by_any_way(self, reply: Reply[Any], *more: Way) -> None:
        if self._rng.randrange(4):
            self.books.replies.append(reply)
        ways: list[Way] = [
            self._cancel, self._time_out, self._time_out_directly, self._time_out_block, self._wrap, self._shield,
            self._cancel_reply, self._elsewhere, self._map, self._drop, *more,
        ]  # fmt: skip
        if not self._closing:  # a closed loop tells nobody of the cancelled gathering, and asyncio complains
            ways.append(self._gather)
        await self._by_some_way(reply, ways)

    async def _by_some_way(self, reply: Reply[Any], ways: list[Way]) -> None:
        way = self._rng.choice(ways)
        self.books.given_up += way not in (self._drop, self._awaiting)
        await way(reply)

    async def _await_own_row(self) -> None:
        """Nobody else's giving up may take an answer away, or change it."""
        row = self._put()
        payload = await self._job.get("rows", row)
        if payload != b"x":
            self.books.wrong.append(f"answer: {payload!r} for {row!r}, which was put before")
        self._version = await self._job.version()

    async def _walk(self) -> None:
        async def walk() -> None:
            async for _ in self._job.iterate("rows", page=3):
                pass

        await self._give_up(walk())

    async def _pause(self) -> None:
        if self._rng.randrange(4):
            for _ in range(self._rng.randrange(4)):
                await asyncio.sleep(0)
        else:
            await asyncio.sleep(self._rng.random() * 0.002)

    def _soon(self) -> float:
        return self._rng.choice((0, 0.0001, 0.001)) * self._rng.random()

    async def _awaiting(self, reply: Reply[Any]) -> None:
        try:
            await reply
        except Conflict:
            self.books.seen += 1
        except concurrent.futures.CancelledError:  # by somebody else
            pass

    async def _give_up(self, waiting: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(waiting)
        await self._pause()
        task.cancel()
        await asyncio.wait([task])
        self._gather_errors({task})

    async def _cancel(self, reply: Reply[Any]) -> None:
        await self._give_up(self._awaiting(reply))

    async def _time_out(self, reply: Reply[Any]) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._awaiting(reply), self._soon())

    async def _time_out_directly(self, reply: Reply[Any]) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(reply, self._soon())

    async def _time_out_block(self, reply: Reply[Any]) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._soon()):
                await reply

    async def _wrap(self, reply: Reply[Any]) -> None:
        future = asyncio.wrap_future(reply)
        await self._pause()
        future.cancel()

    async def _shield(self, reply: Reply[Any]) -> None:
        shielded = asyncio.shield(asyncio.wrap_future(reply))
        await self._pause()
        shielded.cancel()

    async def _gather(self, reply: Reply[Any]) -> None:
        together = asyncio.gather(self._awaiting(reply), self._awaiting(self._read()))
        together.add_done_callback(lambda together: together.cancelled() or together.exception())
        await self._pause()
        together.cancel()
        await asyncio.wait([together])

    async def _cancel_reply(self, reply: Reply[Any]) -> None:
        await self._pause()
        self.books.wrong += cancel(reply)

    async def _elsewhere(self, reply: Reply[Any]) -> None:
        self._others.put((reply, self._soon(), self.books))
        await self._pause()

    async def _one_of_two(self, reply: Reply[Any]) -> None:
        """What one of two has given up the other one still gets."""
        other = asyncio.ensure_future(self._awaiting(reply))
        await self._give_up(self._awaiting(reply))
        await asyncio.wait([other], timeout=self._limit)
        if reply.cancelled() or not other.done():
            self.books.wrong.append(f"answer: {reply!r} was awaited by two, and given up by one")

    async def _map(self, reply: Reply[Any]) -> None:
        await self._give_up(self._awaiting(reply.map(lambda answer: answer)))

    async def _drop(self, reply: Reply[Any]) -> None:
        pass


def cancel(reply: Reply[Any]) -> list[str]:
    """Cancel a reply, and return what was wrong about it."""
    writes = reply.running()
    cancelled = reply.cancel()
    if cancelled != reply.cancelled() or (cancelled and writes):
        return [f"answer: cancel() gave {cancelled} for {reply!r}, which {'writes' if writes else 'reads'}"]
    return []


def give_up_elsewhere(others: queue.SimpleQueue[Any]) -> None:
    """Cancel replies, or run out of time with them, in a plain thread, until there is nothing more."""
    while (given := others.get()) is not None:
        reply, seconds, books = given
        with suppress(TimeoutError, concurrent.futures.CancelledError):
            reply.result(seconds)
        books.wrong += cancel(reply)


def run_loops(job: Job, rng: random.Random, limit: float) -> Books:
    """Run event loops in several threads, some after one another; return what they have posted together."""
    others: queue.SimpleQueue[Any] = queue.SimpleQueue()
    loops = [
        [
            Loop(job, at * LOOPS_EACH + turn, random.Random(rng.getrandbits(64)), others, limit)
            for turn in range(LOOPS_EACH)
        ]
        for at in range(LOOPS_AT_ONCE)
    ]
    threads = [threading.Thread(target=lambda mine=mine: [loop.run() for loop in mine], daemon=True) for mine in loops]
    other = threading.Thread(target=give_up_elsewhere, args=(others,), daemon=True)
    for thread in (other, *threads):
        thread.start()
    for thread in threads:
        thread.join(2 * limit)
    others.put(None)
    other.join(2 * limit)
    books = Books()
    for loop in itertools.chain(*loops):
        books.add(loop.books)
    return books
