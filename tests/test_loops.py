"""Event loops: replies awaited under asyncio, trio and anyio, one in another, given up at any moment."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import gc
import itertools
import logging
import queue
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
import types
import warnings
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import anyio
import pytest
import trio
import trio.testing

from persistency import Category, ChangeFeed, Job, Misuse, Overloaded, Persistency, Put, Reply
from persistency.actor import loops, settling
from persistency.actor import reply as reply_module
from persistency.actor.loops import running_loop
from persistency.actor.reply import Line
from persistency.actor.settling import cancel, pending, ready, settle_all
from tests.loops import LOOPS, WAIT, InLoop, Task, bounded, gather, in_thread, together, turns

ROOT = Path(__file__).parents[1]


class Giving:
    """A line that gives up what it is asked for, and belongs to nobody's thread."""

    abandoned: BaseException | None = None

    def withdraw(self, reply: Reply[Any], /) -> bool:
        """Settle the reply as cancelled, unless it is settled."""
        cancel(reply)
        return reply.cancelled()

    def waits_for_itself(self) -> bool:
        """Say no."""
        return False


def asked(*, reads: bool = True) -> Reply[Any]:
    """Return a reply nobody has settled."""
    line: Line = Giving()
    return pending(line, reads=reads)


def settle(reply: Reply[Any], value: Any = None, error: BaseException | None = None) -> None:
    """Settle a reply in this thread."""
    settle_all([(reply, value, error)])


def awaited_by(*replies: Reply[Any], tasks: int = 1) -> Callable[[], bool]:
    """Return what says whether so many tasks await each of the replies."""
    sources = [getattr(reply, "_source", reply) for reply in replies]
    return lambda: all(len(reply._loops or ()) >= tasks for reply in sources)


def once(condition: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Start a thread that acts when a condition holds."""

    def run() -> None:
        while not condition():
            time.sleep(0)  # a turn for other threads
        act()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


async def answered(value: Any = None) -> Any:
    """Await a reply that another thread settles once it is awaited; return its answer."""
    reply = asked()
    thread = once(awaited_by(reply), lambda: settle(reply, value))
    try:
        return await reply
    finally:
        thread.join(WAIT)


async def as_guest(main: Callable[[], Awaitable[Any]], beside: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Run `main` under trio as the guest of this asyncio loop, and `beside` in the loop itself."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    trio.lowlevel.start_guest_run(
        main,
        run_sync_soon_threadsafe=loop.call_soon_threadsafe,
        run_sync_soon_not_threadsafe=loop.call_soon,
        done_callback=ended.set_result,
        host_uses_signal_set_wakeup_fd=True,
    )
    other = await beside()
    return [(await ended).unwrap(), other]


@pytest.fixture
def job(persistency: Persistency) -> Job:
    """A job that keeps its changes."""
    return persistency.open_job("a", feed_changes_max=1000)


# -- which loop --------------------------------------------------------------------------------------------------------


def test_outside_of_any_loop_there_is_none_and_awaiting_says_what_to_do() -> None:
    """The thread that runs none isn't held for one that does, while others run in other threads."""
    inside, go_on = threading.Event(), threading.Event()

    async def stay() -> None:
        inside.set()
        await in_thread(go_on.wait, WAIT)

    thread = threading.Thread(target=trio.run, args=(stay,))
    thread.start()
    try:
        assert inside.wait(WAIT)
        assert running_loop() is None
        with pytest.raises(Misuse, match=r"asyncio or trio.*reply\.result\(\)"):
            asked().__await__().send(None)
    finally:
        go_on.set()
        thread.join(WAIT)


def test_the_running_loop_is_found(in_loop: InLoop) -> None:
    """Inside it is the same for every task of a run; in a thread that works for it there is none."""

    async def one() -> Any:
        return running_loop()

    async def main() -> None:
        here = running_loop()
        assert here is not None
        assert await together(one, one) == [here, here]
        assert await in_thread(running_loop) is None

    in_loop(main)
    assert running_loop() is None


def test_two_runs_of_trio_are_two_loops() -> None:
    """What tells runs apart is their token, one after the other too."""

    async def main() -> Any:
        assert running_loop() == running_loop()
        assert len({running_loop(), running_loop()}) == 1
        return running_loop()

    first, second = trio.run(main), trio.run(main)
    assert first != second


def test_each_runs_as_the_guest_of_the_other() -> None:
    """Trio as the guest of asyncio, in one thread: both sides await the same replies and their own."""
    both, of_trio, of_asyncio = asked(reads=False), asked(), asked()

    async def guest() -> Any:
        assert type(running_loop()) is loops._Trio
        await trio.lowlevel.checkpoint()
        return await both, await of_trio

    async def host() -> Any:
        assert running_loop() is asyncio.get_running_loop()
        first = await both
        assert running_loop() is asyncio.get_running_loop()
        return first, await of_asyncio

    def answer() -> None:
        settle_all([(both, 1, None), (of_trio, 2, None), (of_asyncio, 3, None)])

    thread = once(awaited_by(both, tasks=2), answer)
    assert asyncio.run(asyncio.wait_for(as_guest(guest, host), WAIT)) == [(1, 2), (1, 3)]
    thread.join(WAIT)


def test_a_guest_and_its_host_pace_themselves_and_each_other(job: Job) -> None:
    """Sixteen tasks on either side of one thread post and read, at once."""

    async def client(name: str, number: int) -> None:
        for at in range(20):
            job.put(name, (number, at), b"%d" % at)
            await job.drain()
            assert await job.get(name, (number, at)) == b"%d" % at

    async def clients(name: str) -> int:
        await together(*(lambda number=number: client(name, number) for number in range(16)))  # type: ignore[misc]
        return await job.count(name)

    async def main() -> list[Any]:
        return await as_guest(lambda: clients("guest"), lambda: clients("host"))

    assert asyncio.run(asyncio.wait_for(main(), WAIT)) == [320, 320]


def test_one_loop_may_be_run_in_the_middle_of_another() -> None:
    """`trio.run` in a coroutine of asyncio, `asyncio.run` in a task of trio, and both once more: the nearest counts."""

    async def ask(inner: tuple[str, ...]) -> list[Any]:
        found = [type(running_loop()) is loops._Trio, await answered(len(inner)), await ready("turn")]
        if inner:
            found += LOOPS[inner[0]](ask, inner[1:])
            with pytest.raises(TimeoutError):  # and it is itself again
                await asked().within(0.001)
            await answered()
        return found

    assert LOOPS["asyncio"](ask, ("trio",)) == [False, 1, "turn", True, 0, "turn"]
    assert LOOPS["trio"](ask, ("asyncio",)) == [True, 1, "turn", False, 0, "turn"]


def test_a_reply_awaited_through_generators_and_helpers_in_the_middle_of_another_loop() -> None:
    """However deep the awaiting is, the task it belongs to is found."""

    async def numbers() -> Any:
        for _ in range(3):
            yield await answered(2)

    async def deep() -> list[int]:
        return [number async for number in numbers()]

    async def outer(runner: InLoop) -> list[int]:
        return runner(deep)

    assert asyncio.run(outer(LOOPS["trio"])) == trio.run(outer, LOOPS["asyncio"]) == [2, 2, 2]


def test_the_turn_of_a_ready_reply_belongs_to_the_task_that_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn under asyncio, in the middle of a task of trio's, and the other way round, is the right one's."""
    monkeypatch.setattr("persistency.actor.reply.TURN_S", -1.0)

    async def inner() -> int:
        return await ready(1) + await ready(2)

    async def outer(runner: InLoop) -> int:
        return await ready(4) + runner(inner) + await ready(8)

    assert asyncio.run(outer(LOOPS["trio"])) == trio.run(outer, LOOPS["asyncio"]) == 15


@pytest.mark.parametrize("stage", [{}, {"in_trio_run": lambda: False}, {"in_trio_task": lambda: False}])
def test_a_module_on_its_way_in_is_no_loop(stage: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may be importing trio or asyncio: what isn't there yet runs nowhere."""
    half = types.ModuleType("trio.lowlevel")
    half.__dict__.update(stage)
    monkeypatch.setitem(sys.modules, "trio.lowlevel", half)
    assert running_loop() is None

    async def main() -> Any:
        return await answered(5), await ready(6)

    assert asyncio.run(main()) == (5, 6)
    monkeypatch.setitem(sys.modules, "asyncio.events", types.ModuleType("asyncio.events"))
    assert running_loop() is None


# -- many who wait -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, ValueError("no")])
def test_a_reply_is_awaited_everywhere_at_once(error: Exception | None) -> None:
    """One reply is awaited by each kind of loop twice, in six threads, and by a plain thread; so is a failure."""
    reply = asked(reads=False)
    seen: list[Any] = []

    async def wait() -> Any:
        return await reply

    def tell(look: Callable[..., Any], *args: Any) -> None:
        try:
            seen.append(look(*args))
        except ValueError as raised:
            seen.append(raised)

    looks = [(run, wait) for run in [*LOOPS.values()] * 2] + [(reply.result, WAIT)]
    threads = [threading.Thread(target=tell, args=look) for look in looks]
    for thread in threads:
        thread.start()
    once(lambda: awaited_by(reply, tasks=6)() and bool(reply._bells), lambda: settle(reply, 7, error)).join(WAIT)
    for thread in threads:
        thread.join(WAIT)
    assert seen == [error or 7] * 7


class Woken:
    """The loops that are woken, call by call."""

    def __init__(self) -> None:
        self.loops: list[Any] = []

    def __enter__(self) -> list[Any]:
        self._patches = [
            self._count(asyncio.BaseEventLoop, "call_soon_threadsafe"),
            self._count(trio.lowlevel.TrioToken, "run_sync_soon"),
        ]
        return self.loops

    def __exit__(self, *_: object) -> None:
        for patch in self._patches:
            patch.stop()

    def _count(self, of: type, name: str) -> Any:
        original = getattr(of, name)

        def counted(loop: Any, fn: Any, *args: Any, **options: Any) -> Any:
            self.loops.extend([loop] * (fn is loops.wake))
            return original(loop, fn, *args, **options)

        patch = mock.patch.object(of, name, counted)
        patch.start()
        return patch


def test_two_runs_of_trio_in_two_threads_await_one_reply() -> None:
    """Each run is woken by a call of its own, many tasks in each."""
    reply = asked(reads=False)
    found: list[list[int]] = []

    async def wait() -> int:
        return await reply

    async def several() -> list[int]:
        return await together(*[wait] * 8)

    threads = [threading.Thread(target=lambda: found.append(trio.run(several))) for _ in range(2)]
    with Woken() as woken:
        for thread in threads:
            thread.start()
        once(awaited_by(reply, tasks=16), lambda: settle(reply, 7)).join(WAIT)
        for thread in threads:
            thread.join(WAIT)
    assert found == [[7] * 8] * 2
    assert len(woken) == len(set(woken)) == 2


def test_a_group_of_sixty_four_wakes_its_loop_once(in_loop: InLoop) -> None:
    """One call from thread to thread, for many replies and the many tasks that wait."""
    replies = [asked() for _ in range(64)]

    async def wait(reply: Reply[int]) -> int:
        return await reply

    async def main() -> list[int]:
        answers = [(reply, at, None) for at, reply in enumerate(replies)]
        thread = once(awaited_by(*replies), lambda: settle_all(answers))
        found = await together(*(partial(wait, reply) for reply in replies))
        thread.join(WAIT)
        return found

    with Woken() as woken:
        assert in_loop(main) == list(range(64))
    assert len(woken) == 1


def test_sixty_four_tasks_ask_one_job(job: Job, in_loop: InLoop) -> None:
    """Commits, reads and increments of many tasks: each gets its own answer, and none is lost."""

    async def client(number: int) -> bytes | None:
        await job.increment("counter", ())
        await job.commit(Put("c", (number,), b"%d" % number))
        await job.run(lambda tx: tx.put("r", (number,), b""))
        return await job.get("c", (number,))

    async def main() -> None:
        found = await bounded(together, *(partial(client, number) for number in range(64)))
        assert found == [b"%d" % number for number in range(64)]
        assert await job.increment("counter", (), 0) == await job.count("r") == 64

    in_loop(main)


# -- giving up ---------------------------------------------------------------------------------------------------------


def test_a_task_cancelled_before_it_waits_doesnt_wait(in_loop: InLoop) -> None:
    """A cancelled scope ends the waiting at once; a reply that is there already is given all the same, or given up."""

    async def main() -> None:
        read, write = asked(), asked(reads=False)
        for reply in (read, write):
            with anyio.CancelScope() as scope:
                scope.cancel()
                await reply
            assert scope.cancelled_caught
        assert read.cancelled()
        assert not write.done()
        settle(write, 1)
        assert await write == 1

    in_loop(main)


def test_a_read_that_was_given_up_leaves_the_mailbox_and_a_write_stays(job: Job, in_loop: InLoop) -> None:
    """Promise 8, in whatever loop: by a cancelled task, by a deadline, by `within`, by a failing neighbour."""

    async def fail() -> None:
        await turns(3)
        raise KeyError

    async def main() -> None:
        gate, inside = threading.Event(), threading.Event()
        held = job.run(lambda _tx: (inside.set(), gate.wait(WAIT)))
        await in_thread(inside.wait, WAIT)
        reads = [job.scan("c") for _ in range(4)]
        writes = [job.increment("c", (at,)) for at in range(4)]
        for replies in (reads, writes):
            async with anyio.create_task_group() as group:
                task: Task[Any] = Task(group, replies[0])
                await turns(2)
                task.cancel()
            assert task.cancelled
            with anyio.move_on_after(0.001) as scope:
                await replies[1]
            assert scope.cancelled_caught
            with pytest.raises(TimeoutError, match=r"no answer within 0\.001 s; the request goes on"):
                await replies[2].within(0.001)
            with pytest.raises(KeyError):
                await together(replies[3], fail)
        assert [reply.cancelled() for reply in reads] == [True] * 4
        assert [reply.done() for reply in writes] == [False] * 4
        gate.set()
        await held
        assert [await reply for reply in writes] == [1] * 4
        assert await job.count("c") == 4

    in_loop(main)


def test_a_shielded_wait_is_not_given_up(in_loop: InLoop) -> None:
    """What is awaited in a shield comes in spite of the cancelled scope around it."""
    reply = asked()

    async def main() -> None:
        thread = once(awaited_by(reply), lambda: settle(reply, 3))
        with anyio.CancelScope() as outer:
            outer.cancel()
            with anyio.CancelScope(shield=True):
                assert await reply == 3
        thread.join(WAIT)

    in_loop(main)


def test_deadlines_end_the_waiting_exactly_then() -> None:
    """On a clock of trio's that jumps: `within` is over at its time, and an earlier deadline around it comes first."""

    async def main() -> None:
        began = trio.current_time()
        with pytest.raises(TimeoutError):
            await asked().within(5)
        assert trio.current_time() - began == 5
        reply = asked()
        with trio.move_on_after(3) as scope:
            await reply.within(5)
        assert scope.cancelled_caught
        assert trio.current_time() - began == 8
        assert reply.cancelled()
        with trio.move_on_after(5) as scope, pytest.raises(TimeoutError):
            await asked().within(3)
        assert not scope.cancelled_caught
        assert trio.current_time() - began == 11
        with pytest.raises(TimeoutError):
            await asked().within(0)
        assert trio.current_time() - began == 11
        with trio.move_on_after(2) as scope:  # at the same moment: whichever it is, nobody waits any longer
            with contextlib.suppress(TimeoutError):
                await asked().within(2)
        assert trio.current_time() - began == 13

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_errors_of_several_tasks_come_in_a_group() -> None:
    """Each task of a nursery that awaits a failing reply raises it; trio puts them together."""
    replies = [asked(reads=False), asked(reads=False)]

    async def wait(reply: Reply[Any]) -> None:
        await reply

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            for reply in replies:
                nursery.start_soon(wait, reply)

    async def main() -> None:
        thread = once(
            awaited_by(*replies), lambda: settle_all([(reply, None, KeyError(at)) for at, reply in enumerate(replies)])
        )
        with pytest.raises(ExceptionGroup) as caught:
            await both()
        assert {error.args for error in caught.value.exceptions} == {(0,), (1,)}
        thread.join(WAIT)

    trio.run(main)


class Answering:
    """A thread that settles replies with their own identity, as fast as it is given them."""

    def __init__(self) -> None:
        self._asked = queue.SimpleQueue[Any]()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def answer(self, *replies: Reply[Any]) -> None:
        """Have replies settled, as one group."""
        self._asked.put([(reply, id(reply), None) for reply in replies])

    def _run(self) -> None:
        while answers := self._asked.get():
            settle_all(answers)

    def close(self) -> None:
        """Let the thread end, without waiting for it: where trio has crashed this comes when the process ends."""
        self._asked.put([])


async def giving_up_at_any_moment(rounds: int, seed: int) -> dict[str, int]:
    """Cancel tasks at the moment their replies come, or about then; count how they ended. Nobody waits for ever."""
    rng = random.Random(seed)
    answering = Answering()
    ends = {"answered": 0, "given up": 0, "too late": 0, "withdrawn": 0}
    try:
        for _ in range(rounds):
            replies = [asked(reads=rng.random() < 0.5) for _ in range(6)]
            async with anyio.create_task_group() as group:
                tasks: list[Task[Any]] = []
                for reply in replies:
                    timeout = rng.choice([None, None, None, rng.random() * 0.0005])
                    tasks.append(Task(group, reply.within(timeout)))
                await turns(rng.randrange(3))
                acts: list[Callable[[], object]] = [task.cancel for task in tasks if rng.random() < 0.6]
                acts += [partial(answering.answer, *replies[:3]), partial(answering.answer, *replies[3:])]
                rng.shuffle(acts)
                for act in acts:
                    act()
                    if rng.random() < 0.3:
                        await turns()
            for reply, task in zip(replies, tasks, strict=True):
                ends[_end(reply, task)] += 1
    finally:
        answering.close()
    assert await bounded(answered, 1) == 1  # the loop is sound, and wakes whom it should
    return ends


def _end(reply: Reply[Any], task: Task[Any]) -> str:
    assert task.done
    if task.cancelled:
        return "given up"
    if isinstance(task.error, TimeoutError):
        return "too late"
    if isinstance(task.error, concurrent.futures.CancelledError):
        assert reply.cancelled()
        return "withdrawn"
    assert task.error is None
    assert task._found == [id(reply)]
    return "answered"


@pytest.mark.parametrize(
    ("loop", "rounds"), [("trio", 2000), ("asyncio", 200), ("anyio", 50)], ids=["trio", "asyncio", "anyio"]
)
def test_giving_up_at_any_moment_leaves_everybody_sound(loop: str, rounds: int) -> None:
    """Promise 7 and 8: thousands of replies, each answered or given up, at the same moment as often as not."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    ends = LOOPS[loop](bounded, giving_up_at_any_moment, rounds, seed)
    assert sum(ends.values()) == 6 * rounds
    assert ends["answered"] > rounds / 4
    assert ends["given up"] > rounds / 4


def forgetful_abort() -> Any:
    """Plant: what a cancelled task slept on still knows it, and wakes it again."""

    def sleep(this: Any) -> Generator[Any, None, None]:
        if not this._woken:
            this._sleeper = trio.lowlevel.current_task()
            yield from trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.SUCCEEDED).__await__()

    return mock.patch.object(loops._TrioFuture, "__iter__", sleep)


def forgetful_withdrawal() -> Any:
    """Plant: a task that was woken is woken again by the next group."""

    def set_result(this: Any, woken: bool) -> None:
        this._woken = woken
        trio.lowlevel.reschedule(this._sleeper)

    return mock.patch.object(loops._TrioFuture, "set_result", set_result)


@pytest.mark.parametrize("plant", [forgetful_abort, forgetful_withdrawal])
def test_a_planted_defect_of_waking_is_found(plant: Callable[[], Any]) -> None:
    """The storm above tells of a loop that wakes who doesn't sleep; in a process that can be left as it is then."""
    program = """
        import sys, trio
        from tests import test_loops as t

        async def main():
            with trio.fail_after(10):
                await t.giving_up_at_any_moment(100, 1)

        with getattr(t, sys.argv[1])():
            trio.run(main)
    """
    done = run_process(program, plant.__name__)
    assert done.returncode != 0
    assert "TrioInternalError" in done.stderr or "TooSlowError" in done.stderr  # or it sleeps, and nobody wakes it


async def busy_with(job: Job, rounds: int, seed: int) -> set[int]:
    """Have 64 tasks write, read, wait and walk, and cancel half of what they ask; return what was acknowledged."""
    rng = random.Random(seed)
    acknowledged: set[int] = set()
    numbers = itertools.count()

    async def commit() -> None:
        number = next(numbers)
        await job.commit(Put("c", (number,), b""))
        acknowledged.add(number)

    async def walk() -> None:
        async for row in job.iterate("c", page=3):
            assert row.payload == b""

    async def follow() -> None:
        await anext(ChangeFeed(job))

    asks: list[Callable[[], Awaitable[Any]]] = [
        commit,
        commit,
        walk,
        follow,
        job.flush,
        job.drain,
        lambda: job.get("c", (0,)),
        lambda: job.scan("c", limit=5),
        lambda: job.increment("n", ()),
        lambda: job.changes(10**9, 1, wait=True).within(rng.random() * 0.002),
    ]

    async def client() -> None:
        for _ in range(rounds):
            async with anyio.create_task_group() as group:
                asked_for = rng.choice(asks)
                task: Task[Any] = Task(group, asked_for)
                await turns(rng.randrange(3))
                if asked_for is follow or rng.random() < 0.5:
                    task.cancel()
            assert task.error is None or isinstance(task.error, TimeoutError)

    await together(*[client] * 64)
    return acknowledged


@pytest.mark.parametrize(("loop", "rounds"), [("trio", 30), ("asyncio", 10), ("anyio", 4)])
def test_a_job_is_sound_after_thousands_of_waits_that_were_given_up(job: Job, loop: str, rounds: int) -> None:
    """Promise 3, 7 and 8: nothing that was acknowledged is lost, no waiter is left, and the counts add up."""
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    acknowledged = LOOPS[loop](bounded, busy_with, job, rounds, seed)
    job.flush().result(WAIT)
    assert len(acknowledged) > rounds
    assert acknowledged <= {k.parts[0] for k in job.keys("c").result(WAIT)}
    assert not job._statistics.__self__.waiters  # type: ignore[attr-defined]  # of the worker
    numbers = job.statistics()
    assert numbers.accepted == numbers.committed
    assert (numbers.failed, numbers.pending) == (0, 0)


# -- interrupts --------------------------------------------------------------------------------------------------------


def held(job: Job) -> tuple[Reply[Any], threading.Event, threading.Event]:
    """Keep a job's worker inside a function: its reply, what says that it is there, what lets it go."""
    inside, gate = threading.Event(), threading.Event()
    return job.run(lambda _tx: (inside.set(), gate.wait(WAIT))), inside, gate


def test_an_interrupt_ends_the_waiting_of_trios_main_task(job: Job) -> None:
    """Ctrl-C while the main task awaits a read: it is raised there, the read withdrawn, and the run goes on."""
    main_thread = threading.main_thread().ident
    assert threading.get_ident() == main_thread

    async def main() -> int:
        holding, inside, gate = held(job)
        await in_thread(inside.wait, WAIT)
        read = job.scan("c")
        thread = once(awaited_by(read), lambda: signal.pthread_kill(main_thread, signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            await read
        thread.join(WAIT)
        assert read.cancelled()
        gate.set()
        await holding
        return await job.increment("c", ())

    assert trio.run(main) == 1


def interrupted_at(call: int, first: Callable[[], object]) -> Callable[[Any, str, Any], None]:
    """Return a profile function that does something and interrupts, at the so many-th call in the code that waits.

    That is where Python looks for signals: when a function begins, and when one in C has returned.
    """
    left = [call]
    files = {loops.__file__, reply_module.__file__}

    def look(frame: Any, event: str, _arg: Any) -> None:
        caller = frame.f_back if event == "call" else frame
        if event not in ("call", "c_return") or not {frame.f_code.co_filename, caller.f_code.co_filename} & files:
            return
        if trio.lowlevel.currently_ki_protected():  # trio itself is at it, and puts the interrupt off
            return
        left[0] -= 1
        if left[0] < 0:
            sys.setprofile(None)
            first()
            signal.raise_signal(signal.SIGINT)

    return look


def waiting_interrupted_at(call: int, *, settled: bool) -> bool:
    """Wait under trio, interrupted at a call, as the answer comes or before it. Returns whether it came to that."""

    async def main() -> bool:
        reply, after = asked(reads=False), asked()
        sys.setprofile(interrupted_at(call, partial(settle, reply, 1) if settled else int))
        try:
            with trio.move_on_after(0):
                await reply.within(60)
            interrupted = False
        except KeyboardInterrupt:
            interrupted = True
        finally:
            sys.setprofile(None)
        assert reply.done() is (settled and interrupted)
        thread = once(awaited_by(after), lambda: (settle(reply, 1), settle(after, 2)))
        assert await after.within(WAIT) == 2  # the first of the two has woken nobody
        assert await reply == 1
        thread.join(WAIT)
        return interrupted

    return trio.run(main)


@pytest.mark.parametrize("settled", [False, True], ids=["before the answer", "as the answer comes"])
def test_an_interrupt_at_any_call_of_the_waiting_leaves_nobody_to_be_woken(settled: bool) -> None:
    """Ctrl-C in code of the main task is raised wherever it is: also just before it falls asleep."""
    looking = sys.getprofile()
    try:
        calls = 0
        while waiting_interrupted_at(calls, settled=settled):
            calls += 1
    finally:
        sys.setprofile(looking)
    assert calls > 15


# -- the end of a run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
def test_a_run_that_is_over_before_its_answers_harms_nobody(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    """The last task gave up while its reply was being settled: nobody is woken, which is told for who debugs."""
    reply, other = asked(reads=False), asked(reads=False)
    decided, over = threading.Event(), threading.Event()
    act = settling._Telling.act

    def wait_and_act(telling: Any) -> None:
        decided.set()
        assert over.wait(WAIT)
        act(telling)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            task: Task[Any] = Task(group, reply)
            await in_thread(decided.wait, WAIT)
            task.cancel()

    caplog.set_level(logging.DEBUG, "persistency.actor")
    with mock.patch.object(settling._Telling, "act", wait_and_act):
        answers = [(reply, 1, None), (other, 2, None)]
        thread = once(awaited_by(reply), lambda: settle_all(answers))
        LOOPS[loop](bounded, main)
        over.set()
        thread.join(WAIT)
    assert (reply.result(0), other.result(0)) == (1, 2)
    assert [record.getMessage() for record in caplog.records] == ["1 replies came after their event loop was closed"]


def test_tasks_that_outlive_their_nursery_are_given_up_with_the_run(job: Job) -> None:
    """A system task that awaits a job's changes ends with the run, and leaves no waiter behind."""

    async def follow(reply: Reply[Any]) -> None:
        await reply

    async def main() -> Reply[Any]:
        reply = job.changes(0, 1, wait=True)
        trio.lowlevel.spawn_system_task(follow, reply)
        await trio.testing.wait_all_tasks_blocked()
        assert awaited_by(reply)()
        return reply

    reply = trio.run(main)
    with pytest.raises(concurrent.futures.CancelledError):  # by the worker, if that has it in hand just then
        reply.result(WAIT)
    assert reply.cancelled()
    job.put("c", (), b"")
    assert len(job.changes(0, 1, wait=True).result(WAIT)) == 1


# -- fairness and pressure ---------------------------------------------------------------------------------------------


def test_replies_that_are_ready_give_others_their_turn_and_can_be_given_up(in_loop: InLoop) -> None:
    """A loop over answers that are there at once has a checkpoint in it: others run, and a deadline ends it."""

    async def main() -> None:
        count = 0
        end = time.monotonic() + WAIT  # a loop that gives no turn can't be ended from outside

        async def other() -> None:
            nonlocal count
            while True:
                count += 1
                await anyio.lowlevel.checkpoint()

        async with anyio.create_task_group() as group:
            group.start_soon(other)
            while count < 10:
                assert await ready(1) == 1
                assert time.monotonic() < end
            with anyio.move_on_after(0.01) as scope:
                while time.monotonic() < end:
                    await ready(1)
            group.cancel_scope.cancel()
        assert scope.cancelled_caught

    in_loop(main)


def test_a_turn_is_not_given_for_every_ready_reply(monkeypatch: pytest.MonkeyPatch) -> None:
    """The turns of trio are a millisecond apart, whatever the number of answers."""
    now = [0.0]
    monkeypatch.setattr("persistency.actor.reply.monotonic", lambda: now[0])
    monkeypatch.setattr("persistency.actor.loops.monotonic", lambda: now[0])
    monkeypatch.setattr(loops.turns, "at", 0.0)
    checkpoints = 0
    checkpoint = trio.lowlevel.checkpoint

    async def counted() -> None:
        nonlocal checkpoints
        checkpoints += 1
        await checkpoint()

    async def main() -> None:
        for _ in range(1000):
            now[0] += 0.0001
            await ready(1)

    monkeypatch.setattr(trio.lowlevel, "checkpoint", counted)
    trio.run(main)
    assert 80 <= checkpoints <= 100


def test_a_thread_that_runs_a_loop_never_waits_for_room(tmp_path: Path, in_loop: InLoop) -> None:
    """Promise 4: it may go over the bound by as much again, is refused beyond it, and paces itself with `drain()`."""

    async def main() -> None:
        async with Persistency(tmp_path) as persistency:
            job = await persistency.aopen_job("a", mailbox_ops_max=8, requests_max=4)
            holding, inside, gate = held(job)
            await in_thread(inside.wait, WAIT)
            for number in range(16):
                job.put("c", (number,), b"")
            with pytest.raises(Overloaded, match="event loop"):
                job.put("c", (16,), b"")
            reads = [job.count("c") for _ in range(8)]
            with pytest.raises(Overloaded, match="event loop"):
                job.count("c")
            drained = job.drain()
            assert not drained.done()
            gate.set()
            await drained
            job.put("c", (16,), b"")
            assert [await read for read in reads] == [16] * 8
            assert await job.count("c") == 17
            await holding

    in_loop(bounded, main)


def test_as_many_pacing_tasks_as_the_bound_counts_are_never_refused(tmp_path: Path, in_loop: InLoop) -> None:
    """Promise 4: `await job.drain()` after every put, in as many tasks as the mailbox holds."""

    async def main() -> None:
        async with Persistency(tmp_path) as persistency:
            job = await persistency.aopen_job("a", mailbox_ops_max=64)

            async def produce(name: int) -> None:
                for number in range(50):
                    job.put("c", (name, number), b"")
                    await job.drain()

            await together(*(partial(produce, name) for name in range(64)))
            assert await job.count("c") == 64 * 50

    in_loop(bounded, main)


def test_paused_iterators_and_feeds_block_nobody(job: Job, in_loop: InLoop) -> None:
    """Thirty-two of each, paused in the middle: writers and readers go on, and each sees its own to the end."""

    async def main() -> None:
        await job.commit([Put("c", (number,), b"") for number in range(40)])
        walks = [aiter(job.iterate("c", page=4, keys_only=True)) for _ in range(32)]
        feeds = [ChangeFeed(job, after=0, page=4) for _ in range(32)]
        first = await together(*(partial(anext, walk) for walk in walks))
        changes = await together(*(partial(anext, feed) for feed in feeds))
        assert [key.parts for key in first] == [change.key.parts for change in changes] == [(0,)] * 32
        await job.commit([Put("c", (number,), b"new") for number in range(40, 44)])
        await together(*(job.increment("n", (at,)) for at in range(64)))
        rest = await together(*(partial(gather, walk) for walk in walks))
        assert [[key.parts for key in keys] for keys in rest] == [[(number,) for number in range(1, 44)]] * 32

        async def follow(feed: ChangeFeed) -> list[Any]:
            return [(await anext(feed)).key.parts for _ in range(43)]

        assert await together(*(partial(follow, feed) for feed in feeds)) == [[(n,) for n in range(1, 44)]] * 32

    in_loop(bounded, main)


@pytest.mark.parametrize("timeout", [-1, float("nan"), "1", True])
def test_a_bound_that_is_none_is_misuse_in_every_loop(timeout: Any, in_loop: InLoop) -> None:
    """What `result(timeout)` refuses `within` refuses too, and in the same words, whatever the loop makes of it."""

    async def main() -> None:
        with pytest.raises(Misuse, match=r"^timeout must be"):
            await asked().within(timeout)

    in_loop(main)


def test_a_walk_that_is_left_in_the_middle_warns_of_nothing(job: Job, in_loop: InLoop) -> None:
    """`break` out of `async for` over rows holds nothing, so there is nothing to clean up, and to warn of."""

    async def main() -> None:
        await job.commit([Put("c", (number,), b"") for number in range(10)])
        async for row in job.iterate("c", page=4):
            assert row.key.parts == (0,)
            break
        values = Category(job, "objects")
        for number in range(10):
            values.put((number,), number)
        async for found in values.list(()):
            assert found[1] == 0
            break
        gc.collect()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        in_loop(main)
    assert [str(warning.message) for warning in caught] == []


def test_a_feed_that_waits_is_given_up_and_goes_on(job: Job, in_loop: InLoop) -> None:
    """A step that was cancelled leaves no waiter behind and has missed nothing; a closed feed ends its loop."""

    async def main() -> None:
        feed = ChangeFeed(job)
        for _ in range(3):
            with anyio.move_on_after(0.001) as scope:
                await anext(feed)
            assert scope.cancelled_caught
        job.put("c", (1,), b"")
        assert (await anext(feed)).key.parts == (1,)
        async with anyio.create_task_group() as group:
            rest: Task[Any] = Task(group, gather(feed))
            await turns(3)
            job.put("c", (2,), b"")
            while feed._given < 2:
                await turns()
            feed.close()
            assert [change.key.parts for change in await rest] == [(2,)]

    in_loop(bounded, main)


# -- without them, and beside a fork -----------------------------------------------------------------------------------


def run_process(program: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own, warnings being errors."""
    command = [sys.executable, "-W", "error", "-c", textwrap.dedent(program), *args]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=WAIT * 2, check=False)


def run_alone(program: str, *args: str) -> str:
    """Run a program that has to end well; return what it printed."""
    done = run_process(program, *args)
    assert done.returncode == 0, done.stderr
    return done.stdout


WITHOUT = """
    import sys
    for absent in sys.argv[2:]:
        sys.modules[absent] = None  # as if it weren't installed
    from persistency import ChangeFeed, Persistency

    def use(job):
        job.put("c", (1,), b"x")
        assert job.get("c", (1,)).result() == b"x"
        assert [row.payload for row in job.iterate("c")] == [b"x"]

    with Persistency(sys.argv[1]) as p:
        use(p.open_job("a"))
    loops = {"asyncio", "trio", "anyio", "sniffio"}
    print(sorted(loops & {name for name, module in sys.modules.items() if module is not None}))

    import asyncio

    async def main():
        async with Persistency(sys.argv[1]) as p:
            job = await p.aopen_job("a", feed_changes_max=1000)
            feed = ChangeFeed(job)
            assert await job.get("c", (1,)) == b"x"
            await asyncio.gather(*(job.increment("n", ()) for _ in range(64)))
            job.put("c", (2,), b"y")
            await job.drain()
            async for change in feed:
                if change.category == "c":
                    break
            try:
                await job.changes(change.version, 1, wait=True).within(0.001)
            except TimeoutError:
                print("ok")

    asyncio.run(main())
    print(sorted(loops & {name for name, module in sys.modules.items() if module is not None}))
"""


@pytest.mark.parametrize("absent", [[], ["trio", "anyio", "sniffio"], ["trio", "trio.lowlevel"]])
def test_no_loop_is_ever_imported(absent: list[str], tmp_path: Path) -> None:
    """`import persistency`, and its use, bring in neither asyncio nor trio nor anyio; nor is any of them needed."""
    assert run_alone(WITHOUT, str(tmp_path), *absent).splitlines() == ["[]", "ok", "['asyncio']"]


FORKING = """
    import os, sys, warnings
    import trio, trio.testing
    from persistency import Forked, Persistency

    warnings.simplefilter("ignore", DeprecationWarning)  # later Pythons warn of forking beside threads

    async def in_child(job, waiting):
        for reply in (waiting, waiting.map(str)):
            try:
                await reply
            except Forked:
                continue
            return "an inherited reply was awaited"
        try:
            job.put("c", (1,), b"")
        except Forked:
            pass
        else:
            return "an inherited job took a put"
        own = Persistency(sys.argv[2])  # opened, and waited for, without trio: its run is the parent's
        mine = own.open_job("own", mailbox_ops_max=8)
        mine.put("c", (1,), b"x")
        if mine.get("c", (1,)).result(20) != b"x":
            return "an own job didn't answer"
        own.close()

    async def main():
        async with Persistency(sys.argv[1]) as p:
            job = await p.aopen_job("a", feed_changes_max=10)
            waiting = job.changes(0, 10, wait=True)

            async def wait():
                await waiting

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                pid = os.fork()
                if not pid:
                    try:
                        wrong = await in_child(job, waiting)
                    except BaseException as error:
                        wrong = repr(error)
                    print(wrong or "sound", flush=True)
                    os._exit(0)
                await trio.to_thread.run_sync(os.waitpid, pid, 0)
                job.put("c", (1,), b"")
            print(len(await waiting), flush=True)

    trio.run(main)
"""


def test_a_fork_in_a_run_of_trio_harms_neither(tmp_path: Path) -> None:
    """Promise 7: inherited replies are `Forked`, an own job works, and the parent's waiting task gets its answer."""
    assert run_alone(FORKING, str(tmp_path / "parent"), str(tmp_path / "child")).split() == ["sound", "1"]


# -- plain futures -----------------------------------------------------------------------------------------------------


def test_a_plain_future_is_awaited_as_a_reply(in_loop: InLoop) -> None:
    """`Reply.of`: an answer, a failure, a cancelled one; there already, and settled while it is awaited."""

    async def main() -> None:
        for early in (True, False):
            for act, expected in (
                (lambda future: future.set_result(5), 5),
                (lambda future: future.set_exception(KeyError(1)), KeyError),
                (lambda future: future.cancel(), concurrent.futures.CancelledError),
            ):
                future: concurrent.futures.Future[int] = concurrent.futures.Future()
                if early:
                    act(future)
                reply = Reply.of(future)
                assert reply.done() is early
                thread = None if early else once(awaited_by(reply), partial(act, future))
                if isinstance(expected, int):
                    assert await reply == reply.result() == expected
                else:
                    with pytest.raises(expected):
                        await reply
                if thread is not None:
                    thread.join(WAIT)
                assert reply.cancelled() is future.cancelled()

    in_loop(bounded, main)


def test_the_last_to_give_up_a_plain_future_cancels_it_unless_it_runs(in_loop: InLoop) -> None:
    """As with a read: while somebody else wants it, or once it has begun, it goes on."""

    async def main() -> None:
        begun: concurrent.futures.Future[int] = concurrent.futures.Future()
        begun.set_running_or_notify_cancel()
        for future, cancelled in ((concurrent.futures.Future[int](), True), (begun, False)):
            reply = Reply.of(future)
            async with anyio.create_task_group() as group:
                tasks = [Task(group, reply) for _ in range(2)]
                await turns()
                tasks[0].cancel()
                await turns()
                assert not future.cancelled()
                tasks[1].cancel()
            assert future.cancelled() is reply.cancelled() is cancelled
        begun.set_result(4)
        assert await reply == 4
        pending_one: Reply[int] = Reply.of(concurrent.futures.Future())
        assert pending_one.cancel()
        with pytest.raises(TimeoutError):
            await Reply.of(concurrent.futures.Future()).within(0.001)

    in_loop(bounded, main)


def test_only_a_plain_future_is_one() -> None:
    """A coroutine, or a future of asyncio's, is `Misuse`: it belongs to its loop."""

    async def main() -> None:
        for wrong in (asyncio.get_running_loop().create_future(), 5, None):
            with pytest.raises(Misuse, match=r"concurrent\.futures\.Future"):
                Reply.of(wrong)  # type: ignore[arg-type]

    asyncio.run(main())
