"""memoize: beside a model; computed once among threads, tasks, loops and processes; and what it promises its users."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import dataclasses
import enum
import functools
import gc
import inspect
import json
import logging
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, ClassVar, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import anyio
import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from persistency import (
    CBOR,
    RAW,
    Closed,
    Corrupt,
    Job,
    Key,
    Misuse,
    Persistency,
    QuotaExceeded,
    RawKey,
    Reply,
    Transaction,
    key,
    typed,
)
from persistency.recipes import AsyncMemoized, Baton, Memoized, memoize
from persistency.recipes.memoize_flights import Lead, _flights, _leading
from persistency.recipes.memoize_rows import packed
from persistency.testing import ManualClock
from tests.loops import InLoop, Task, in_loop, together
from tests.soak.logs import shared

__all__ = ["in_loop"]  # a fixture

WAIT = 30.0
SEED = 20_261_122
TOP = Path(__file__).parent.parent


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still."""
    return ManualClock()


@pytest.fixture
def job(clock: ManualClock) -> Iterator[Job]:
    """Give an empty job."""
    with Persistency(":memory:", clock=clock) as p, p.open_job("cache") as opened:
        yield opened
    assert not _flights  # whatever happened, none is left behind


class Another:
    """A runner that stands for another process' baton: of one job, and nothing in common with this one's flights."""

    poll = 0.001

    def __init__(self, job: Job) -> None:
        self.job = job
        self.id = job.id
        self.runs: list[str] = []

    def run(self, fn: Callable[..., Any], *args: Any) -> Reply[Any]:
        self.runs.append(fn.__name__)
        return self.job.run(fn, *args)


class Gate:
    """A function's body that says that it is being run, and waits until it may go on."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.go = threading.Event()
        self.runs: list[Any] = []

    def pass_(self, *args: Any) -> None:
        self.runs.append(args)
        self.entered.release()
        assert self.go.wait(WAIT)

    def wait(self) -> None:
        assert self.entered.acquire(timeout=WAIT)


# -- beside a model ------------------------------------------------------------------------------------------------

TTL = 60
ARGS = st.integers(0, 2)


class MemoizeMachine(RuleBasedStateMachine):
    """Memoized functions of all kinds beside a dict of what is kept until when."""

    @initialize(kind=st.sampled_from(["sync", "async", "process"]), ttl=st.sampled_from([None, TTL]))
    def begin(self, kind: str, ttl: float | None) -> None:
        self.clock = ManualClock()
        self.persistency = Persistency(":memory:", clock=self.clock)
        self.job = self.persistency.open_job("cache")
        self.kind, self.ttl = kind, ttl
        self.kept: dict[int, tuple[int, float]] = {}
        self.count = 0
        self.failing = False
        self.takes = 0.0
        self.fn = self.make()

    def make(self) -> Any:
        if self.kind == "async":

            @memoize(self.job, "counted", ttl=self.ttl)
            async def counted(number: int) -> list[int]:
                return self.body(number)

            return counted

        @memoize(self.job if self.kind == "sync" else Another(self.job), "counted", ttl=self.ttl)  # type: ignore[arg-type]
        def counted_here(number: int) -> list[int]:
            return self.body(number)

        return counted_here

    def body(self, number: int) -> list[int]:
        self.count += 1
        if self.failing:
            raise LookupError(number)
        self.clock.advance(self.takes)
        return [number, self.count]

    def outcome(self, call: Callable[..., Any], number: int) -> Any:
        async def awaited() -> Any:
            return await call(number)

        try:
            return asyncio.run(awaited()) if self.kind == "async" else call(number)
        except LookupError as error:
            return error.args

    def expect(self, number: int, before: int) -> Any:
        """What a computation gives, and is kept of it."""
        if self.failing:
            return (number,)
        ends = float("inf") if self.ttl is None else self.clock.now + self.ttl
        self.kept[number] = (before + 1, ends)
        return [number, before + 1]

    @rule(number=ARGS)
    def call(self, number: int) -> None:
        count, ends = self.kept.get(number, (0, 0.0))
        before = self.count
        is_kept = ends > self.clock.now
        found = self.outcome(self.fn, number)
        assert found == ([number, count] if is_kept else self.expect(number, before))
        assert self.count == before + (not is_kept)

    @rule(number=ARGS)
    def refresh(self, number: int) -> None:
        before = self.count
        found = self.outcome(self.fn.refresh, number)
        assert found == self.expect(number, before)

    @rule(number=ARGS)
    def forget(self, number: int) -> None:
        _, ends = self.kept.pop(number, (0, 0.0))
        assert self.fn.forget(number).result() is (ends > self.clock.now)

    @rule()
    def clear(self) -> None:
        live = sum(ends > self.clock.now for _, ends in self.kept.values())
        assert self.fn.clear().result() == live
        self.kept.clear()

    @rule(seconds=st.sampled_from([1, TTL - 1, TTL, 5 * TTL]))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @rule(failing=st.booleans(), takes=st.sampled_from([0.0, 1.0, 2 * TTL]))
    def change(self, failing: bool, takes: float) -> None:
        # Between processes a lease is renewed by the system's clock, which this one runs ahead of.
        self.failing, self.takes = failing, takes if self.kind != "process" else min(takes, 1.0)

    @rule()
    def decorate_again(self) -> None:
        self.fn = self.make()

    def teardown(self) -> None:
        if hasattr(self, "persistency"):
            self.persistency.close()
        assert not _flights


def test_it_does_what_a_dict_would() -> None:
    """In any order of calls, and as time passes, it gives and computes what a model says."""
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        MemoizeMachine,
        settings=settings(max_examples=40, stateful_step_count=25, deadline=None, database=None),
    )


def test_the_model_sees_a_result_that_is_kept_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted defect: `forget` that forgets nothing."""
    monkeypatch.setattr(
        "persistency.recipes.memoize_calls.forget", lambda tx, category, place: tx.exists(category, place)
    )
    with pytest.raises(AssertionError):
        run_state_machine_as_test(  # type: ignore[no-untyped-call]
            MemoizeMachine,
            settings=settings(max_examples=60, deadline=None, database=None, phases=[Phase.generate], derandomize=True),
        )


# -- once among many -----------------------------------------------------------------------------------------------


def storm(job: Any, callers: int = 100, computing: int = 1) -> tuple[list[Any], list[Any]]:
    """Have threads ask for one result at once; return what they got, and the computations.

    It is there only when `computing` of them compute it at the same time.
    """
    gate, arrived = Gate(), threading.Barrier(callers + 1)

    @memoize(job, "slow")
    def slow(x: int) -> list[int]:
        gate.pass_(x)
        return [x]

    def call() -> list[int]:
        arrived.wait(WAIT)
        return slow(7)

    with ThreadPoolExecutor(callers) as pool:
        futures = [pool.submit(call) for _ in range(callers)]
        arrived.wait(WAIT)
        for _ in range(computing):
            gate.wait()
        gate.go.set()
        found = [future.result(WAIT) for future in futures]
    return found, gate.runs


def test_of_100_threads_one_computes(job: Job) -> None:
    """All get an equal result, and each one of its own."""
    found, runs = storm(job)
    assert found == [[7]] * 100
    assert len({id(one) for one in found}) == 100
    assert len(runs) == 1


def test_of_100_threads_of_a_baton_one_computes(tmp_path: Path) -> None:
    """The same, where every look is a run of the baton's."""
    with Persistency(tmp_path) as p, Baton(p, "cache") as baton:
        found, runs = storm(baton)
    assert (found, len(runs)) == ([[7]] * 100, 1)


def test_the_storm_sees_several_computing(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted defect: everybody leads a flight of their own."""
    monkeypatch.setattr(Lead, "board", lambda lead: lead.flight)
    found, runs = storm(job, 20, computing=20)
    assert found == [[7]] * 20
    assert len(runs) == 20


def test_of_100_tasks_one_computes(job: Job, in_loop: InLoop) -> None:
    """Under each loop all tasks get what one of them computes."""
    runs = []

    async def main() -> list[Any]:
        begun = anyio.Event()
        go = anyio.Event()

        @memoize(job, "slow")
        async def slow(x: int) -> list[int]:
            runs.append(x)
            begun.set()
            await go.wait()
            return [x]

        async def release() -> list[int]:
            await begun.wait()
            go.set()
            return [7]

        return await together(*[functools.partial(slow, 7)] * 100, release)

    assert in_loop(main) == [[7]] * 101
    assert runs == [7]


def test_one_computes_among_loops_and_threads(job: Job) -> None:
    """Tasks of asyncio, tasks of trio and threads with a loop each, all at once: one computes for all of them."""
    gate, arrived = Gate(), threading.Barrier(5)

    @memoize(job, "slow")
    async def slow(x: int) -> list[int]:
        gate.pass_(x)  # whatever waits in that loop waits for this, as the others do
        return [x]

    async def many(count: int) -> list[list[int]]:
        arrived.wait(WAIT)
        return await together(*[functools.partial(slow, 7)] * count)

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(asyncio.run, many(40)), pool.submit(trio.run, many, 40)]
        futures += [pool.submit(asyncio.run, many(10)), pool.submit(trio.run, many, 10)]
        arrived.wait(WAIT)
        gate.wait()
        gate.go.set()
        found = [one for future in futures for one in future.result(WAIT)]
    assert found == [[7]] * 100
    assert len(gate.runs) == 1


def test_a_plain_function_is_shared_by_threads_and_tasks(job: Job) -> None:
    """Tasks call it through threads, as they must, beside plain threads."""
    gate = Gate()

    @memoize(job, "slow")
    def slow(x: int) -> int:
        gate.pass_(x)
        return x

    async def many() -> list[int]:
        return await together(*[functools.partial(anyio.to_thread.run_sync, slow, 7)] * 30)

    with ThreadPoolExecutor(31) as pool:
        tasks = pool.submit(anyio.run, many)
        threads = [pool.submit(slow, 7) for _ in range(30)]
        gate.wait()
        gate.go.set()
        assert tasks.result(WAIT) == [7] * 30
        assert [thread.result(WAIT) for thread in threads] == [7] * 30
    assert len(gate.runs) == 1


PROCESS = """
import os, sys, threading
from persistency import Persistency
from persistency.recipes import Baton, memoize

root, journal, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
line = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
with Persistency(root) as p, Baton(p, "cache", poll=0.02) as baton:

    @memoize(baton, "slow", lease=float(sys.argv[4]))
    def slow(x):
        os.write(line, b"%d\\n" % os.getpid())
        print("computing", flush=True)
        assert sys.stdin.readline() == "go on\\n"
        return [x]

    arrived = threading.Barrier(threads + 1)
    found = []

    def call():
        arrived.wait()
        found.append(slow(7))

    callers = [threading.Thread(target=call) for _ in range(threads)]
    for caller in callers:
        caller.start()
    print("ready", flush=True)
    assert sys.stdin.readline() == "go\\n"
    arrived.wait()
    print("called", flush=True)
    for caller in callers:
        caller.join()
    print("found", found == [[7]] * threads, flush=True)
"""


class Process:
    """A process of several threads that call one function, told by lines when to."""

    def __init__(self, place: Path, threads: int, lease: float = 10.0) -> None:
        arguments = [place / "root", place / "journal", threads, lease]
        self.popen = subprocess.Popen(
            [sys.executable, "-c", PROCESS, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=TOP,
            env={**os.environ, "PYTHONPATH": str(TOP)},
        )
        self.lines: list[str] = []

    def tell(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def read(self, line: str) -> None:
        """Read lines up to this one."""
        assert self.popen.stdout is not None
        while line not in self.lines:
            found = self.popen.stdout.readline()
            assert found, f"the process has ended before {line!r}: {self.lines}"
            self.lines.append(found.rstrip("\n"))

    def end(self) -> None:
        self.popen.kill()
        self.popen.wait(WAIT)
        for file in (self.popen.stdin, self.popen.stdout):
            assert file is not None
            file.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start processes on one baton."""
    started: list[Process] = []

    def start(threads: int, lease: float = 10.0) -> Process:
        started.append(Process(tmp_path, threads, lease))
        return started[-1]

    yield start
    for process in started:
        process.end()


def computations(tmp_path: Path) -> list[int]:
    """The processes that have computed, one for each time."""
    return list(map(int, (tmp_path / "journal").read_text().split()))


def test_of_100_callers_in_four_processes_one_computes(tmp_path: Path, processes: Callable[..., Process]) -> None:
    """A claim in the job has all other processes wait; each computation is a line of one file."""
    crowd = [processes(25) for _ in range(4)]
    for process in crowd:
        process.read("ready")
    for process in crowd:
        process.tell("go")
    for process in crowd:
        process.read("called")
    for process in crowd:  # only the one that computes reads it
        process.tell("go on")
    for process in crowd:
        process.read("found True")
    assert len(computations(tmp_path)) == 1


def test_a_killed_process_is_replaced_when_its_lease_is_over(tmp_path: Path, processes: Callable[..., Process]) -> None:
    """SIGKILL in the middle of computing: one of another process computes, once."""
    first = processes(1, 0.5)
    first.tell("go")
    first.read("computing")
    second = processes(5, 0.5)
    second.read("ready")
    second.tell("go")
    second.read("called")
    first.end()
    second.tell("go on")
    second.read("found True")
    assert computations(tmp_path) == [first.popen.pid, second.popen.pid]


def test_killed_processes_hold_up_nobody_and_are_replaced_once(tmp_path: Path) -> None:
    """Of three processes that want the same results some die while they compute: see `tests.soak.logs`."""
    assert shared(tmp_path, 3, 30, 2, SEED, 0.5) == ([], 2)


def test_the_kills_see_processes_that_heed_no_claims(tmp_path: Path) -> None:
    """A planted defect: each process computes for itself."""
    wrong, _ = shared(tmp_path, 3, 20, 0, SEED, 0.5, "alone")
    assert [finding.split(":")[0] for finding in wrong] == ["twice"]


# -- how a flight ends -----------------------------------------------------------------------------------------------


def test_all_who_wait_get_what_the_computation_raised_and_it_is_not_kept(job: Job) -> None:
    """The next call computes anew."""
    gate, results = Gate(), iter([ZeroDivisionError("no"), 5])

    @memoize(job, "slow")
    def slow(x: int) -> int:
        gate.pass_(x)
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow, 1)
        gate.wait()
        second = pool.submit(slow, 1)
        waits_for(_flights)
        gate.go.set()
        for future in (first, second):
            with pytest.raises(ZeroDivisionError, match="no"):
                future.result(WAIT)
    assert len(gate.runs) == 1
    assert slow(1) == 5


def waits_for(flights: dict[Any, Any]) -> None:
    """Return when somebody waits for the one flight there is."""
    (flight,) = flights.values()
    while not flight.stage.reply._wanted():
        threading.Event().wait(0.001)


def test_a_failure_nobody_waits_for_is_not_logged(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    """The caller has it; there is nobody else to be told."""

    @memoize(job, "slow")
    def slow() -> int:
        raise ZeroDivisionError

    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            slow()
    gc.collect()
    assert caplog.records == []


@pytest.mark.parametrize("callers", [2, 5])
def test_a_cancelled_one_hands_over_to_the_next(job: Job, in_loop: InLoop, callers: int) -> None:
    """Whoever computes is cancelled, one after the other; the last one's result is what there is."""

    async def main() -> tuple[list[int], dict[int, int]]:
        scopes = [anyio.CancelScope() for _ in range(callers)]
        begun = [anyio.Event() for _ in range(callers)]
        order: list[int] = []
        found: dict[int, int] = {}

        @memoize(job, "slow", ignore=("caller",))
        async def slow(x: int, caller: int) -> int:
            order.append(caller)
            begun[len(order) - 1].set()
            if len(order) < callers:
                await anyio.sleep_forever()
            return x

        async def call(caller: int) -> None:
            with scopes[caller]:
                found[caller] = await slow(3, caller)

        async with anyio.create_task_group() as group:
            for caller in range(callers):
                group.start_soon(call, caller)
            for event in begun[:-1]:
                await event.wait()
                scopes[order[-1]].cancel()
        return order, found

    order, found = in_loop(main)
    assert sorted(order) == list(range(callers))
    assert found == {order[-1]: 3}


def test_an_interrupted_thread_hands_over_to_the_next(job: Job) -> None:
    """What isn't an `Exception` ends its own call alone; a waiting thread computes then."""
    gate = Gate()

    class Stop(BaseException):
        pass

    @memoize(job, "slow")
    def slow(x: int) -> int:
        gate.pass_(x)
        if len(gate.runs) == 1:
            raise Stop
        return len(gate.runs)

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(slow, 1)
        gate.wait()
        second = pool.submit(slow, 1)
        waits_for(_flights)
        gate.go.set()
        with pytest.raises(Stop):
            first.result(WAIT)
        assert second.result(WAIT) == 2


def test_a_coroutine_that_is_dropped_half_way_leaves_nobody_waiting(job: Job) -> None:
    """Nobody closed it: what is left of it gives the flight up."""
    finished = []

    class Once:
        def __await__(self) -> Iterator[None]:
            yield

    @memoize(job, "slow")
    async def slow(x: int) -> int:
        await Once()
        finished.append(x)
        return x

    coroutine = slow(1)
    while not _flights:
        coroutine.send(None)
    del coroutine
    gc.collect()
    assert not _flights
    assert asyncio.run(slow(1)) == 1
    assert finished == [1]


def test_a_lead_dropped_by_an_interrupt_gives_its_flight_up(job: Job) -> None:
    """Wherever between two steps it comes: what nobody has any more holds nobody up."""
    lead = Lead(job, "slow", key("result", 1), 10.0)
    assert lead.board() is lead.flight
    assert lead.flight.stage is not None
    reply = lead.flight.stage.reply
    del lead
    assert reply.result(WAIT) == (None, None)


def test_recursion_computes_each_result_once(job: Job) -> None:
    """As `functools.cache` does for a Fibonacci function."""
    runs = []

    @memoize(job, "fib")
    def fib(n: int) -> int:
        runs.append(n)
        return n if n < 2 else fib(n - 1) + fib(n - 2)

    @memoize(job, "afib")
    async def afib(n: int) -> int:
        return n if n < 2 else await afib(n - 1) + await afib(n - 2)

    assert fib(60) == 1548008755920
    assert sorted(runs) == list(range(61))
    assert asyncio.run(afib(20)) == 6765


def test_a_call_of_itself_with_the_same_arguments_computes(job: Job, in_loop: InLoop) -> None:
    """In the same thread, the same task, or one that it has started: it would wait for itself, and so it doesn't."""
    depth = []

    @memoize(job, "nested")
    def nested(x: int) -> int:
        depth.append(x)
        return nested(x) + 1 if len(depth) < 3 else 0

    assert nested(1) == 2
    assert nested(1) == 2
    assert len(depth) == 3

    async def main() -> int:
        adepth: list[int] = []

        @memoize(job, "anested")
        async def anested(x: int) -> int:
            adepth.append(x)
            return (await together(functools.partial(anested, x)))[0] + 1 if len(adepth) < 3 else 0

        return await anested(1)

    assert in_loop(main) == 2


def test_two_threads_that_need_each_other_s_result_both_end(job: Job) -> None:
    """One is in the middle of `a` and wants `b`, the other one in the middle of `b` and wants `a`."""
    both = threading.Barrier(2)

    @memoize(job, "entangled", ignore=("deep",))
    def entangled(name: str, deep: bool = False) -> str:
        if deep:
            return name
        both.wait(WAIT)
        return name + entangled("b" if name == "a" else "a", deep=True)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(entangled, "ab"))
    assert len(found[0]) + len(found[1]) in (4, 5)  # who came second may have waited for the other one's whole result
    assert {one[0] for one in found} == {"a", "b"}


def test_a_plain_call_does_not_block_the_loop_that_computes_its_result(job: Job, in_loop: InLoop) -> None:
    """Two forms of one function share results; where waiting would stop the computation, it computes by itself."""

    async def main() -> list[Any]:
        go, begun = anyio.Event(), anyio.Event()

        @memoize(job, "both")
        async def loads(x: int) -> str:
            begun.set()
            await go.wait()
            return "loop"

        @memoize(job, "both")
        def load(x: int) -> str:
            return "thread"

        async with anyio.create_task_group() as group:
            computing = Task(group, functools.partial(loads, 1))
            await begun.wait()
            found = [load(1)]  # it blocks this loop
            go.set()
            found.append(await computing)
        return [*found, load(1) == await loads(1)]

    assert in_loop(main) == ["thread", "loop", True]


def test_a_plain_call_does_not_block_the_loop_through_another_thread(job: Job, in_loop: InLoop) -> None:
    """A thread waits for the loop, and the loop is about to wait for that thread."""

    async def main() -> tuple[Any, Any]:
        go, begun, runs = anyio.Event(), anyio.Event(), []

        @memoize(job, "inner")
        async def inner(x: int) -> int:
            begun.set()
            await go.wait()
            return 10

        @memoize(job, "inner")
        def plain_inner(x: int) -> int:
            return 20

        @memoize(job, "outer")
        def outer(x: int) -> int:
            runs.append(x)
            return plain_inner(x) + 1

        async with anyio.create_task_group() as group:
            computing = Task(group, functools.partial(inner, 1))
            await begun.wait()
            (flight,) = _flights.values()
            in_thread = Task(group, functools.partial(anyio.to_thread.run_sync, outer, 1))
            while flight.stage is None or not flight.stage.reply._wanted():
                await anyio.sleep(0.001)
            found = outer(1)
            go.set()
            assert await computing == 10
            return found, await in_thread

    assert in_loop(main) == (21, 11)


def test_a_plain_call_waits_for_a_refresh_of_its_loop_no_longer_than_a_lease(job: Job, in_loop: InLoop) -> None:
    """On a baton a refresh has a claim, which its process renews; the call blocks the loop that refreshes."""
    runner: Any = Another(job)

    async def main() -> tuple[str, str]:
        go, begun = anyio.Event(), anyio.Event()

        @memoize(runner, "both", lease=0.05)
        async def loads(x: int) -> str:
            begun.set()
            await go.wait()
            return "loop"

        @memoize(runner, "both", lease=0.05)
        def load(x: int) -> str:
            return "thread"

        async with anyio.create_task_group() as group:
            refreshing = Task(group, functools.partial(loads.refresh, 1))
            await begun.wait()
            found = load(1)
            go.set()
            return found, await refreshing

    assert in_loop(main) == ("thread", "loop")


def test_a_context_that_lives_on_holds_no_result(job: Job, clock: ManualClock) -> None:
    """A task that was started in the middle of a computation has a copy of its context."""
    contexts: list[contextvars.Context] = []

    @memoize(job, "early", ttl=60, early=1.0, random=lambda: 0.9)
    def fn() -> bytes:
        contexts.append(contextvars.copy_context())
        clock.advance(2)
        return bytes(1_000)

    fn()
    clock.advance(59)
    fn()  # early: those who came meanwhile would have been given the old one
    for context in contexts:
        (flight,) = context[_leading]
        assert (flight.stage, flight._future, flight.waits) == (None, None, [])
    assert len(contexts) == 2


def test_who_waits_gets_a_stop_iteration_as_it_is(job: Job) -> None:
    """What a generator may not raise, a function may."""
    gate = Gate()

    @memoize(job, "slow")
    def slow(x: int) -> int:
        gate.pass_(x)
        raise StopIteration("end")

    def error_of() -> BaseException:
        try:
            slow(1)
        except BaseException as error:  # a future can't hold it
            return error
        raise AssertionError

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(error_of)
        gate.wait()
        second = pool.submit(error_of)
        waits_for(_flights)
        gate.go.set()
        assert [repr(one.result(WAIT)) for one in (first, second)] == ["StopIteration('end')"] * 2


def test_a_job_that_is_closed_says_so(job: Job) -> None:
    """To all callers, and it leaves no flight behind."""

    @memoize(job, "slow")
    def slow(x: int) -> int:
        return x

    job.close()
    for _ in range(2):
        with pytest.raises(Closed):
            slow(1)


# -- forgotten, refreshed --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True], ids=["forget", "clear"])
def test_what_was_forgotten_while_it_was_computed_is_not_kept(job: Job, whole: bool) -> None:
    """Who calls afterwards gets what was computed afterwards, and doesn't wait for what was begun before."""
    gate, data = Gate(), ["old"]

    @memoize(job, "slow")
    def slow(x: int) -> str:
        found = data[0]
        if found == "old":
            gate.pass_(x)
        return found

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(slow, 1)
        gate.wait()
        data[0] = "new"
        assert not (slow.clear() if whole else slow.forget(1)).result()
        assert slow(1) == "new"
        gate.go.set()
        assert first.result(WAIT) == "old"
    assert slow(1) == "new"


def test_a_refresh_wins_over_what_was_begun_before_it(job: Job) -> None:
    """Both a computation for want of a result, and another refresh."""
    gate, data = Gate(), ["old"]

    @memoize(job, "slow")
    def slow(x: int) -> str:
        found = data[0]
        if found == "old":
            gate.pass_(x)
        return found

    with ThreadPoolExecutor(2) as pool:
        pending = [pool.submit(slow, 1), pool.submit(slow.refresh, 1)]
        gate.wait()
        gate.wait()
        data[0] = "new"
        assert slow.refresh(1) == "new"
        gate.go.set()
        assert [one.result(WAIT) for one in pending] == ["old", "old"]
    assert slow(1) == "new"


def test_a_refresh_that_fails_leaves_what_was_kept(job: Job) -> None:
    """And raises what the function raised."""
    results: list[Any] = [1, ZeroDivisionError("no"), 2]

    @memoize(job, "slow")
    def slow() -> int:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return int(result)

    assert slow() == 1
    with pytest.raises(ZeroDivisionError):
        slow.refresh()
    assert slow() == 1
    assert slow.refresh() == 2
    assert slow() == 2


def test_others_get_the_kept_result_while_it_is_refreshed(job: Job, in_loop: InLoop) -> None:
    """Nobody waits for a refresh."""
    runs = []

    async def main() -> None:
        go = anyio.Event()
        begun = anyio.Event()

        @memoize(job, "slow")
        async def slow(x: int) -> int:
            runs.append(x)
            if len(runs) > 1:
                begun.set()
                await go.wait()
            return len(runs)

        async with anyio.create_task_group() as group:
            assert await slow(1) == 1
            refreshed = Task(group, functools.partial(slow.refresh, 1))
            await begun.wait()
            assert await slow(1) == 1
            go.set()
            assert await refreshed == 2
        assert await slow(1) == 2

    in_loop(main)


# -- claims between processes ----------------------------------------------------------------------------------------


def test_a_claim_is_waited_for_and_ends_with_its_lease(job: Job, clock: ManualClock) -> None:
    """The runner of one process waits while another one's claim stands, and computes when that has ended."""
    mine, theirs = Another(job), Another(job)
    lead = Lead(theirs, "slow", memoize(mine, "slow")(len_of).key("ab"), 10.0)  # type: ignore[arg-type]
    assert drained(lead.claimed(0.0, patience=None)).began_ms is not None
    lead._renewing.set()  # type: ignore[union-attr]  # as if it had been killed
    fn = memoize(mine, "slow")(len_of)  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(fn, "ab")
        while mine.runs.count("begin") < 3:
            threading.Event().wait(0.001)
        assert not waiting.done()
        clock.advance(10)
        assert waiting.result(WAIT) == 2
    assert lead.keep(b"never", None).result() is False  # it is too late for that
    assert fn("ab") == 2


def len_of(text: str) -> int:
    """A function to memoize."""
    return len(text)


def zeros(count: int) -> bytes:
    """Another one."""
    return bytes(count)


def drained(steps: Any) -> Any:
    """Take steps that wait for nothing but replies."""
    step = next(steps)
    while True:
        try:
            step = steps.send(step.result(WAIT))
        except StopIteration as stop:
            return stop.value


def test_a_long_computation_renews_its_lease(job: Job, clock: ManualClock) -> None:
    """As long as its process lives; the lease here ends by a clock that a test moves, once each renewal is seen."""
    mine = Another(job)

    @memoize(mine, "slow", lease=0.03)  # type: ignore[arg-type]
    def slow(x: int) -> int:
        for nth in range(1, 5):
            while mine.runs.count("renew") < 2 * nth:
                threading.Event().wait(0.001)
            clock.advance(0.02)
        return x

    assert slow(1) == 1
    assert mine.runs.count("keep") == 1
    assert job.exists("slow", slow.key(1)).result()
    assert job.count("slow").result() == 1  # no claim is left


def test_two_processes_that_need_each_other_s_result_both_end(job: Job) -> None:
    """Nobody in the middle of a computation waits for another process for longer than a lease."""
    both = threading.Barrier(2)
    fns: dict[str, Any] = {}

    def entangled(name: str, here: str, deep: bool = False) -> str:
        if deep:
            return name
        both.wait(WAIT)
        return name + str(fns[here]("b" if name == "a" else "a", here, deep=True))

    for here in "ab":  # two processes, each of which computes one, and needs the other one's
        decorate = memoize(Another(job), "entangled", ignore=("here", "deep"), lease=0.05)  # type: ignore[arg-type]
        fns[here] = decorate(entangled)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda here: fns[here](here, here), "ab"))
    assert [one[0] for one in found] == ["a", "b"]


def test_a_claim_of_a_process_that_is_gone_holds_up_nobody_in_a_job(tmp_path: Path) -> None:
    """A job has one owner: what is claimed in it when it is opened was left behind."""
    with Persistency(tmp_path) as p, p.open_job("cache") as job:
        fn = memoize(job, "slow")(len_of)
        lead = Lead(job, "slow", fn.key("ab"), 10.0)
        drained(lead.claimed(0.0, patience=None))
        lead._claimed = False  # as if it had been killed
    with Persistency(tmp_path) as p, p.open_job("cache") as job:
        assert job.count("slow").result() == 1
        assert memoize(job, "slow")(len_of)("ab") == 2


def test_it_reads_what_another_process_has_computed(tmp_path: Path) -> None:
    """By a baton, and after a restart."""
    runs = []

    def body(x: int) -> list[int]:
        runs.append(x)
        return [x]

    for _ in range(2):
        with Persistency(tmp_path) as p, Baton(p, "cache") as baton:
            assert memoize(baton, "slow")(body)(3) == [3]
    with Persistency(tmp_path) as p, p.open_job("cache") as job:
        assert memoize(job, "slow")(body)(3) == [3]
    assert runs == [3]


# -- early -----------------------------------------------------------------------------------------------------------


class Early:
    """A function whose results took two seconds, end after sixty, and are computed early."""

    def __init__(self, job: Any, clock: ManualClock) -> None:
        self.draws: list[float] = []
        self.runs = 0
        self.error: Exception | None = None

        @memoize(job, "early", ttl=60, early=1.0, random=self.draw)
        def fn() -> int:
            self.runs += 1
            if self.error is not None:
                raise self.error
            clock.advance(2)
            return self.runs

        self.fn = fn

    def draw(self) -> float:
        return self.draws.pop(0) if self.draws else 0.0

    def at(self, drawn: float) -> int:
        self.draws = [drawn]
        return self.fn()


def test_a_result_is_computed_early_as_xfetch_says(job: Job, clock: ManualClock) -> None:
    """When `now - took * early * log(random)` is past its end, and not a millisecond before; then from its new end."""
    early = Early(job, clock)
    assert early.at(0.0) == 1  # it took 2 s, and ends 60 s later
    half = 0.5  # log(2) times two seconds ahead: 1386 ms
    clock.advance(58.613)
    assert early.at(half) == 1
    assert early.at(0.0) == 1  # never early
    clock.advance(0.001)
    assert early.at(half) == 2
    clock.advance(58.613)
    assert early.at(half) == 2
    clock.advance(0.001)
    assert early.at(half) == 3
    assert early.at(0.999999999) == 3  # some 41 s early: it has just begun its 60


def test_others_get_the_kept_result_while_one_computes_early(job: Job, clock: ManualClock) -> None:
    """One computes, and nobody waits for that."""
    gate = Gate()

    @memoize(job, "early", ttl=60, early=1.0, random=lambda: 0.5)
    def fn() -> int:
        clock.advance(10)
        if gate.runs or not first:
            gate.pass_()
        first.clear()
        return len(gate.runs)

    first = [True]
    assert fn() == 0
    clock.advance(55)
    with ThreadPoolExecutor(1) as pool:
        computing = pool.submit(fn)
        gate.wait()
        clock.now -= 10
        assert [fn() for _ in range(3)] == [0, 0, 0]
        gate.go.set()
        assert computing.result(WAIT) == 1
    assert fn() == 1


def test_what_fails_early_is_logged_and_the_kept_result_given(
    job: Job, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It is good until its end; then the error is the caller's."""
    early = Early(job, clock)
    assert early.at(0.0) == 1
    early.error = ZeroDivisionError("no")
    clock.advance(59)
    assert early.at(0.9) == 1
    assert [record.persistency_event for record in caplog.records] == ["memoize_early_failed"]  # type: ignore[attr-defined]
    clock.advance(1)
    with pytest.raises(ZeroDivisionError):
        early.at(0.9)


class Outlasting:
    """A function whose result is being computed early by a thread, and has ended meanwhile: an hour ago."""

    def __init__(self, job: Any, clock: ManualClock, pool: ThreadPoolExecutor) -> None:
        self.gate = Gate()
        self.error: Exception | None = None

        @memoize(job, "early", ttl=10, early=1.0, random=lambda: 0.999999)
        def fn() -> str:
            if first:
                first.clear()
                clock.advance(1)
                return "old"
            self.gate.pass_()
            if self.error is not None:
                raise self.error
            return "new"

        first = [True]
        self.fn = fn
        assert fn() == "old"
        clock.advance(8.5)
        self.leading = pool.submit(fn)
        self.gate.wait()
        assert fn() == "old"
        clock.advance(3_600)
        self.waiting = pool.submit(fn)
        waits_for(_flights)


@pytest.mark.parametrize("runner", [lambda job: job, Another], ids=["job", "process"])
def test_an_old_result_is_given_until_its_end_and_no_longer(
    job: Job, clock: ManualClock, runner: Callable[[Job], Any]
) -> None:
    """Though the next one is still being computed: that is waited for then."""
    with ThreadPoolExecutor(2) as pool:
        early = Outlasting(runner(job), clock, pool)
        early.gate.go.set()
        assert (early.leading.result(WAIT), early.waiting.result(WAIT)) == ("new", "new")
    assert len(early.gate.runs) == 1


def test_what_fails_early_but_too_late_is_raised(
    job: Job, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """By whoever computes and whoever waits: the old result has ended."""
    with ThreadPoolExecutor(2) as pool:
        early = Outlasting(job, clock, pool)
        early.error = ZeroDivisionError("no")
        early.gate.go.set()
        for future in (early.leading, early.waiting):
            with pytest.raises(ZeroDivisionError):
                future.result(WAIT)
    assert caplog.records == []


def test_an_old_result_that_was_forgotten_is_not_given_when_the_next_one_fails(job: Job, clock: ManualClock) -> None:
    """Though it hadn't ended."""
    runs = []

    @memoize(job, "early", ttl=60, early=1.0, random=lambda: 0.9)
    def fn() -> int:
        runs.append(1)
        if len(runs) == 1:
            clock.advance(2)
            return 1
        assert fn.forget().result()
        raise ZeroDivisionError("no")

    assert fn() == 1
    clock.advance(59)
    with pytest.raises(ZeroDivisionError):
        fn()


def test_a_result_that_is_good_is_given_in_a_job_that_is_full(clock: ManualClock, in_loop: InLoop) -> None:
    """It is due to be computed early, but not even a claim has room; at its end it is computed."""
    runs = []

    async def one(x: int) -> int:
        runs.append(x)
        clock.advance(1)
        return len(runs)

    with Persistency(":memory:", clock=clock) as p, p.open_job("cache", max_bytes=1_000) as job:
        fn = memoize(job, "early", ttl=10, early=1.0, random=lambda: 0.9999999)(one)
        assert in_loop(fn, 5) == 1
        job.put("full", (1,), bytes(1_000 - job.storage_used().result() - 10))
        job.flush().result()
        clock.advance(8.5)
        assert in_loop(fn, 5) == 1
        clock.advance(2)
        assert in_loop(fn, 5) == 2


def test_early_works_in_event_loops_and_on_batons(tmp_path: Path, in_loop: InLoop) -> None:
    """Where nothing is early, it is a hit like any other."""
    runs = []

    async def main(runner: Any) -> list[int]:
        @memoize(runner, "early", ttl=60, early=1.0)
        async def fn(x: int) -> int:
            runs.append(x)
            return x

        return [await fn(5) for _ in range(3)]

    with Persistency(tmp_path) as p:
        with Baton(p, "cache") as baton:
            assert in_loop(main, baton) == [5, 5, 5]
        with p.open_job("cache") as job:
            assert in_loop(main, job) == [5, 5, 5]
    assert runs == [5]


# -- keys ------------------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    """Two members."""

    RED = 1
    BLUE = 2


class Word(enum.StrEnum):
    """A text that isn't one."""

    RED = "red"


class Bit(enum.Flag):
    """Combinations have a name, or none."""

    A = 1
    B = 2


class Pair(NamedTuple):
    """A tuple of a class of its own."""

    a: Any
    b: Any


@dataclasses.dataclass
class Point:
    """Two fields."""

    a: Any
    b: Any


@dataclasses.dataclass
class Size:
    """The same two fields."""

    a: Any
    b: Any


class Text(str):
    """A text of a class of its own."""

    __slots__ = ()


class Number(int):
    """A number of a class of its own."""


class Instant(datetime):
    """A time of a class of its own."""


class Half(tzinfo):
    """A zone that nobody knows."""

    def utcoffset(self, when: datetime | None) -> timedelta:
        return timedelta(minutes=30)


ZONES = [
    ZoneInfo("Europe/Zurich"), ZoneInfo("Europe/Paris"), ZoneInfo("UTC"), UTC,
    timezone(timedelta(hours=1)), timezone(timedelta(hours=1), "CET"), timezone(timedelta(hours=2)),
]  # fmt: skip

ATOMS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.integers()
    | st.floats(allow_nan=False)
    | st.sampled_from(["", "a", "list", "dict", "tuple", "date", "sha256", "red", "1"])
    | st.binary(max_size=3)
    | st.sampled_from([Colour.RED, Colour.BLUE, Word.RED, Bit.A, Bit.A | Bit.B, Bit(0), Colour, Point, int])
    | st.sampled_from([date(2026, 1, 2), datetime(2026, 1, 2), datetime(2026, 1, 2, tzinfo=UTC), time(1)])
    | st.sampled_from([datetime(2026, 1, 2, tzinfo=zone) for zone in ZONES] + [time(1, tzinfo=zone) for zone in ZONES])
    | st.sampled_from([time(1, fold=1), datetime(2026, 1, 2, fold=1), PureWindowsPath("a"), Text("a"), Number(1)])
    | st.binary(max_size=2).map(bytearray)
    | st.sampled_from([timedelta(1), timedelta(0, 86_399), Decimal("1.0"), Decimal(1), Fraction(1, 2), Fraction(1)])
    | st.sampled_from([UUID(int=1), UUID(int=2), PurePosixPath("a"), PurePosixPath("/a"), key("a"), key("a", 1)])
    | st.text("ab", min_size=1_020, max_size=1_030)
)


def holding(members: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Containers of every kind."""
    few = st.lists(members, max_size=3)
    keys = st.dictionaries(st.integers(0, 3) | st.sampled_from(["a", "b"]), members, max_size=3)
    sets = st.frozensets(st.integers(0, 3) | st.sampled_from(["a", "b"]), max_size=3)
    classes = [st.builds(cls, members, members) for cls in (Pair, Point, Size)]
    return st.one_of(few, few.map(tuple), keys, sets, sets.map(set), *classes)


VALUES = st.recursive(ATOMS, holding, max_leaves=6)


def likeness(value: Any) -> Any:
    """What two arguments have in common if they are the same one; written with no regard to how keys are made."""
    kind = type(value)
    if kind in (list, tuple, Pair):
        return kind, tuple(map(likeness, value))
    if kind is dict:
        return dict, frozenset((likeness(k), likeness(v)) for k, v in value.items())
    if kind in (set, frozenset):
        return kind, frozenset(map(likeness, value))
    if kind in (Point, Size):
        return kind, likeness(value.a), likeness(value.b)
    if kind is bytearray:
        return kind, bytes(value)
    if kind is datetime or kind is time:
        return kind, str(value.replace(tzinfo=None)), value.fold, repr(value.tzinfo)
    if kind is Decimal or kind is float:
        return kind, str(value)  # 1 and 1.0; 0.0 and -0.0
    return kind, value


keyed = memoize(lambda: None, "keyed")(lambda a, b=None: None)  # type: ignore[arg-type, return-value, misc]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(VALUES, VALUES)
def test_two_arguments_have_one_key_if_and_only_if_they_are_the_same(one: Any, other: Any) -> None:
    """In type and value, however deep; a mutable one by what it holds at the call."""
    assert keyed.key(one) == keyed.key(copy.deepcopy(one))
    assert (keyed.key(one) == keyed.key(other)) == (likeness(one) == likeness(other))
    assert len(keyed.key(one)) < 1_200


LOOKALIKES: list[Any] = [
    1, 1.0, True, "1", b"1", Decimal(1), Fraction(1), (1,), [1], {1}, {1: 1}, Pair(1, 1), Point(1, 1), Size(1, 1),
    (1, 1), None, (None,), ((None,),), (None, "list", 1), (None, "tuple", None), "", b"", (), [], set(), {}, Colour.RED,
    (None, "tests.test_memoize.Colour", "RED"), "red", Word.RED, date(2026, 1, 1), datetime(2026, 1, 1), "2026-01-01",
    key(1), RawKey(bytes(key(1))[:1]), bytes(key(1)), PurePosixPath("1"), int, "int", 0.0, -0.0, float("nan"),
    RawKey(bytes(key(1))), PureWindowsPath("1"), Path("1"), frozenset((1,)), bytearray(b"1"), memoryview(b"1"),
    Text("1"), Number(1), datetime(2026, 1, 1, fold=1), Instant(2026, 1, 1),
    time(1), time(1, fold=1), *(time(1, tzinfo=zone) for zone in ZONES),
    *(datetime(2026, 1, 1, tzinfo=zone) for zone in ZONES),
]  # fmt: skip


def test_things_that_look_alike_have_keys_of_their_own() -> None:
    """Above all those that stand for others in a key."""
    assert len({keyed.key(value) for value in LOOKALIKES}) == len(LOOKALIKES)


def test_parts_are_not_one_container_of_the_same_items(job: Job) -> None:
    """However long they are: what stands for the parts of a call stands for nothing else."""
    parts = memoize(job, "parts", key=lambda *given: given)(lambda *given: None)
    long = "x" * 2_000
    for several in (("x", "b"), (long, "b"), (None, "list", long), (None, "tuple", None, long)):
        assert parts.key(*several) != parts.key(several)
        assert parts.key(*several) != parts.key(list(several))
    assert parts.key(None, "list", long) != parts.key([long])
    assert keyed.key(long, None) != keyed.key((long, None), None)


def test_a_class_that_is_not_found_by_its_name_is_refused() -> None:
    """Another one could have that: two calls of one function make two classes of one name."""

    def local() -> list[Any]:
        class Plain:
            pass

        @dataclasses.dataclass
        class Fields:
            x: int = 1

        class Named(NamedTuple):
            x: int = 1

        class Word(int):
            pass

        member: Any = enum.Enum("E", {"A": 1})
        return [Plain, Fields, Fields(), Named(), Word(1), member.A, [Fields()]]

    for value in local():
        with pytest.raises(
            Misuse, match=r"argument 'a' can't be in a key: class tests\.test_memoize\..* isn't found by"
        ):
            keyed.key(value)
    assert keyed.key(type(None)) != keyed.key(type(len_of))  # those that nobody can make twice needn't be found


@pytest.mark.parametrize("value", [datetime(2026, 1, 1, tzinfo=Half()), time(1, tzinfo=Half())])
def test_a_zone_that_can_not_be_told_from_another_is_refused(value: Any) -> None:
    """An offset and a name don't say how it goes on."""
    with pytest.raises(Misuse, match=r"the zone of a time, a tests\.test_memoize\.Half, .*pass times in a ZoneInfo"):
        keyed.key(value)


def test_what_a_container_has_several_times_is_looked_at_once() -> None:
    """Thirty lists, each twice in the next one, would be a thousand million; and it is the key of equal ones."""

    def shared(depth: int) -> list[Any]:
        found: list[Any] = [1]
        for _ in range(depth):
            found = [found, found]
        return found

    assert keyed.key(shared(30)) != keyed.key(shared(29))
    assert keyed.key(shared(6)) == keyed.key(json.loads(json.dumps(shared(6))))


@pytest.mark.parametrize("deep_first", [False, True])
def test_what_is_nested_too_deep_in_one_place_is_refused(deep_first: bool) -> None:
    """Though it is in another one, where it isn't."""
    inner: list[Any] = []
    for _ in range(20):
        inner = [inner]
    outer = inner
    for _ in range(20):
        outer = [outer]
    with pytest.raises(Misuse, match="nested over 32 deep"):
        keyed.key([outer, inner] if deep_first else [inner, outer])


def test_one_call_in_several_spellings_has_one_key(job: Job) -> None:
    """By position, by keyword, by default; in any order of keywords."""

    @memoize(job, "f")
    def f(a: int, b: int = 2, *rest: int, c: int = 3, **more: int) -> list[Any]:
        return [a, b, rest, c, more]

    assert len({f.key(1), f.key(a=1), f.key(1, 2), f.key(1, b=2), f.key(b=2, a=1, c=3)}) == 1
    assert len({f.key(1, x=1, y=2), f.key(1, y=2, x=1)}) == 1
    assert len({f.key(1), f.key(2), f.key(1, 3), f.key(1, 2, 3), f.key(1, c=4), f.key(1, x=1), f.key(1, x=2)}) == 7
    assert f.key(1, 2, 3, c=4, d=5) == key("result", 1, "a,b,*rest,c,**more", 1, 2, (3,), 4, (None, "dict", "d", 5))

    @memoize(job, "g")
    def g(a: int, /, b: int = 2, *, c: int = 3) -> None: ...

    assert len({g.key(1), g.key(1, 2), g.key(1, b=2), g.key(1, 2, c=3), g.key(1, c=3, b=2)}) == 1
    assert len({g.key(1), g.key(2), g.key(1, 3), g.key(1, c=4)}) == 4


@pytest.mark.parametrize(
    ("args", "kwargs"), [((), {}), ((1, 2, 3), {}), ((1,), {"a": 1}), ((1,), {"x": 1}), ((), {"b": 1})]
)
def test_a_call_that_does_not_fit_is_a_type_error(job: Job, args: Any, kwargs: Any) -> None:
    """As it is for the function itself, which isn't called."""

    @memoize(job, "f")
    def f(a: int, b: int = 2) -> None:
        raise AssertionError

    with pytest.raises(TypeError) as caught:
        f(*args, **kwargs)
    assert not isinstance(caught.value, Misuse)


def test_long_arguments_are_kept_under_their_digest(job: Job) -> None:
    """Of any length; and two that differ at their end have two results."""
    runs = []

    @memoize(job, "f")
    def f(text: Any, x: int = 0) -> int:
        runs.append(x)
        return len(text)

    longs: list[Any] = ["a" * 10**6, "a" * (10**6 - 1) + "b", ["a"] * 10**5, {"a": ["b" * 10**5]}, b"a" * 10**6]
    for nth, text in enumerate(longs):
        assert f(text, nth) == len(text)
    for nth, text in enumerate(longs):
        assert f(text, nth) == len(text)
        assert len(f.key(text, nth)) < 100
    assert runs == list(range(5))


@pytest.mark.parametrize(
    "value", [object(), lambda: None, [object()], {"a": object()}, Point(1, object()), 1j, iter(()), "\ud800", 2**9999]
)
def test_an_argument_without_a_value_of_its_own_is_refused_by_name(job: Job, value: Any) -> None:
    """Never by its `repr` or its hash: those of the next process would be others."""

    @memoize(job, "f")
    def f(a: int, b: Any = None, *, c: Any = None) -> None:
        raise AssertionError

    for call in (lambda: f(1, value), lambda: f(1, b=value), lambda: f.key(1, value), lambda: f.forget(1, value)):
        with pytest.raises(Misuse, match=r"^f: argument 'b' can't be in a key: "):
            call()
    with pytest.raises(Misuse, match="argument 'c'"):
        f(1, c=value)


def test_what_is_nested_without_end_is_refused(job: Job) -> None:
    """A list that holds itself, too."""
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(Misuse, match="nested over 32 deep"):
        keyed.key(endless)


def test_ignored_arguments_are_not_in_the_key(job: Job) -> None:
    """Whatever they are; what they are given as, reaches the function."""
    seen = []

    @memoize(job, "f", ignore=("client", "trace"))
    def f(client: Any, city: str, **options: Any) -> str:
        seen.append((client, options))
        return city

    client = object()
    assert f(client, "bern", trace=object(), unit="C") == f(object(), "bern", unit="C") == "bern"
    assert seen[0][0] is client
    assert len(seen) == 1
    f(None, "bern", unit="F")
    assert len(seen) == 2

    @memoize(job, "g", ignore=("b",))
    def g(a: int, b: Any, c: int = 3) -> int:
        return a

    assert g.key(1, object()) == g.key(1, object(), 3) == g.key(a=1, b=object()) == key("result", 1, "a,c", 1, 3)


def test_a_key_function_makes_the_parts_of_the_key(job: Job) -> None:
    """Of all arguments, however they are given; `ignore` isn't needed then."""
    runs = []

    @memoize(job, "f", key=lambda request, depth=1: (request["url"], depth))
    def f(request: dict[str, Any], depth: int = 1) -> str:
        runs.append(request["url"])
        return str(request["url"])

    assert f({"url": "a", "secret": object()}) == f({"url": "a", "secret": object()}, depth=1) == "a"
    assert runs == ["a"]
    assert f.key({"url": "a"}) == key("result", 1, "key()", "a", 1)

    @memoize(job, "g", key=lambda x: object())
    def g(x: int) -> int:
        return x

    with pytest.raises(Misuse, match="g: what key= gave can't be in a key"):
        g(1)


def test_another_version_or_other_parameters_read_nothing_of_the_old(job: Job) -> None:
    """And `clear` removes those of all versions."""

    def make(version: Any, fn: Any) -> Any:
        return memoize(job, "f", version=version)(fn)

    assert make(1, lambda a: "first")(1) == "first"
    assert make(1, lambda a: "second")(1) == "first"
    assert make(2, lambda a: "second")(1) == "second"
    assert make("2026-11", lambda a: "third")(1) == "third"
    assert make(1, lambda b: "fourth")(1) == "fourth"
    assert make(1, lambda a: None).clear().result() == 4


# -- what is kept ----------------------------------------------------------------------------------------------------


def test_none_is_a_result_as_any_other(job: Job) -> None:
    """It is kept."""
    runs = []

    @memoize(job, "f")
    def f() -> None:
        runs.append(1)

    assert f() is None
    assert f() is None
    assert runs == [1]


def test_the_first_call_gives_what_later_ones_give(job: Job) -> None:
    """The types that come back from the job, and an object of one's own each time."""

    @memoize(job, "f")
    def f() -> Any:
        return (1, {"a": (2,)})

    assert f() == [1, {"a": [2]}]
    assert f() == [1, {"a": [2]}]
    f().append("changed")
    assert f() == [1, {"a": [2]}]


def test_a_codec_keeps_other_types(job: Job) -> None:
    """`typed(cls)` for a class, RAW for bytes."""

    @memoize(job, "f", codec=typed(Point_))
    def f(x: int) -> Point_:
        return Point_(x)

    @memoize(job, "g", codec=RAW)
    def g(x: int) -> bytes:
        return bytes(x)

    for _ in range(2):
        assert f(1) == Point_(1)
        assert g(3) == b"\0\0\0"


@dataclasses.dataclass
class Point_:  # noqa: N801  # beside the other one
    """A result of a class of its own."""

    x: int


def test_a_kept_result_is_one_cbor_item_that_tells_its_times(job: Job, clock: ManualClock) -> None:
    """How long it took, when it ends, and the value: for whoever reads the file with another tool."""

    @memoize(job, "f", ttl=timedelta(minutes=1))
    def f() -> list[str]:
        clock.advance(1.5)
        return ["a"]

    f()
    entry = job.entry("f", f.key()).result()
    assert entry is not None
    ends_ms = round(clock.now * 1000) + 60_000
    assert CBOR.decode(entry.payload) == [1_500, ends_ms, ["a"]]
    assert entry.expires_ms == ends_ms


def test_a_result_that_can_not_be_stored_is_misuse_that_names_the_function(job: Job, in_loop: InLoop) -> None:
    """For all who wait, and the next one computes anew; a coroutine that was forgotten to be awaited, too."""

    @memoize(job, "f")
    def f() -> Any:
        return object()

    with pytest.raises(Misuse, match=r"f returned what can't be kept: .*object"):
        f()

    async def inner() -> int:
        return 1

    @memoize(job, "g")
    async def g() -> Any:
        return inner()

    with pytest.raises(Misuse, match=r"g returned what can't be kept: .*coroutine"):
        in_loop(g)


@pytest.mark.parametrize("room", [200, 20], ids=["for a claim", "for nothing"])
def test_what_has_no_room_is_given_all_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, in_loop: InLoop, room: int
) -> None:
    """A full cache is no reason to fail; it is logged, and computed again by the next one."""

    async def azeros(count: int) -> bytes:
        return bytes(count)

    with Persistency(tmp_path) as p, p.open_job("cache", max_bytes=room) as job:
        fn, afn = memoize(job, "f", codec=RAW)(zeros), memoize(job, "f", codec=RAW)(azeros)
        for _ in range(2):
            assert fn(10_000) == bytes(10_000)
            assert in_loop(afn, 10_000) == bytes(10_000)
        assert job.count("f").result() == 0  # no claim is left, either
    assert len(caplog.records) == 4
    for record in caplog.records:
        assert record.persistency_event == "memoize_not_kept"  # type: ignore[attr-defined]
        assert record.persistency_error == QuotaExceeded.__name__  # type: ignore[attr-defined]


def test_what_is_too_large_to_be_kept_is_given_to_all(
    job: Job, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the one who has computed it as to those who have waited."""
    gate = Gate()

    def keep(tx: Transaction, *_: Any) -> bool:
        raise Misuse("payload has 999,999,999 bytes")

    monkeypatch.setattr("persistency.recipes.memoize_flights.keep", keep)

    @memoize(job, "f")
    def f(x: int) -> int:
        gate.pass_(x)
        return x

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(f, 1)
        gate.wait()
        second = pool.submit(f, 1)
        waits_for(_flights)
        gate.go.set()
        assert (first.result(WAIT), second.result(WAIT)) == (1, 1)
    assert [record.persistency_event for record in caplog.records] == ["memoize_not_kept"]  # type: ignore[attr-defined]
    assert job.count("f").result() == 0  # no claim is left


@pytest.mark.parametrize("spoilt", [b"", b"\x83\x1a", b"x" * 40, "other codec"])
def test_what_can_not_be_read_is_computed_anew(
    job: Job, caplog: pytest.LogCaptureFixture, in_loop: InLoop, spoilt: Any
) -> None:
    """Whoever has written it; it is logged, and replaced."""
    fn = memoize(job, "f")(len_of)

    async def async_len(text: str) -> int:
        return len(text)

    afn = memoize(job, "f")(async_len)
    for call in (fn, lambda text: in_loop(afn, text), memoize(Another(job), "f")(len_of)):  # type: ignore[arg-type]
        if spoilt == "other codec":
            job.put("f", fn.key("abc"), packed(b"\xff"))
        else:
            job.put("f", fn.key("abc"), spoilt)
        caplog.clear()
        assert call("abc") == 3  # type: ignore[operator]
        assert [record.persistency_event for record in caplog.records] == ["memoize_unreadable"]  # type: ignore[attr-defined]
        assert call("abc") == 3  # type: ignore[operator]
        assert len(caplog.records) == 1


def test_a_codec_that_reads_nothing_it_writes_is_told_of(job: Job) -> None:
    """It doesn't compute for ever."""

    class Forgetful:
        def encode(self, value: Any, /) -> bytes:
            return b"x"

        def decode(self, data: bytes, /) -> Any:
            raise Corrupt("what was it?")

    fn = memoize(job, "f", codec=Forgetful())(len_of)
    for _ in range(2):
        with pytest.raises(Corrupt, match="what was it"):
            fn("abc")


# -- as a function ---------------------------------------------------------------------------------------------------


class Service:
    """Methods of all kinds, memoized at a time when there was no job."""

    job: ClassVar[Job]
    runs: ClassVar[list[Any]] = []

    def __init__(self, name: str) -> None:
        self.name = name

    @memoize(lambda: Service.job, ignore=("self",))
    def shared(self, x: int) -> str:
        """For all instances."""
        self.runs.append(x)
        return f"{self.name} {x}"

    @memoize(lambda: Service.job, key=lambda self, x: (self.name, x))
    async def own(self, x: int) -> str:
        self.runs.append(x)
        return f"{self.name} {x}"

    @classmethod
    @memoize(lambda: Service.job)
    def of_class(cls, x: int) -> str:
        return f"{cls.__name__} {x}"

    @staticmethod
    @memoize(lambda: Service.job)
    def of_none(x: int) -> int:
        return x


class Other(Service):
    """A class of its own for `of_class`."""


def test_methods_are_memoized(job: Job) -> None:
    """Of instances, with what is said of `self`; of classes, and of none."""
    Service.job = job
    Service.runs.clear()
    one, other = Service("one"), Service("other")
    assert one.shared(1) == other.shared(1) == Service.shared(one, 1) == "one 1"
    assert asyncio.run(one.own(1)) == "one 1"
    assert asyncio.run(other.own(x=1)) == "other 1"
    assert asyncio.run(other.own(1)) == "other 1"
    assert Service.runs == [1, 1, 1]
    assert Service.of_class(1) == "Service 1"
    assert Other.of_class(1) == "Other 1"
    assert one.of_none(3) == Service.of_none(3) == 3
    assert one.shared.forget(1).result() is True
    assert asyncio.run(one.own.refresh(1)) == "one 1"
    assert asyncio.run(other.own.refresh(1)) == "other 1"
    assert other.own.key(1) != one.own.key(1)
    assert one.own.forget(1).result() is True
    assert other.own.forget(1).result() is True
    assert Service.shared.name == "tests.test_memoize.Service.shared"


def test_a_method_of_what_has_no_value_says_what_to_do(job: Job) -> None:
    """`self` is an argument like any other."""

    class Plain:
        @memoize(job, "f")
        def method(self, x: int) -> int:
            return x

    with pytest.raises(Misuse, match=r"argument 'self' can't be in a key: a .*Plain can't be told") as caught:
        Plain().method(1)
    assert "ignore=" in caught.value.hint


@memoize(lambda: Service.job, ttl=60)
def documented(a: int, *, b: str = "b") -> list[str]:
    """It says what it does."""
    return [b] * a


def test_it_looks_like_the_function(job: Job) -> None:
    """Name, docstring, signature, and whether it is a coroutine function; it is found again by pickle."""
    Service.job = job
    assert (documented.__name__, documented.__doc__) == ("documented", "It says what it does.")
    assert documented.__module__ == __name__
    assert str(inspect.signature(documented)) == "(a: 'int', *, b: 'str' = 'b') -> 'list[str]'"
    assert documented.__wrapped__(2) == ["b", "b"]
    assert pickle.loads(pickle.dumps(documented)) is documented
    assert copy.deepcopy(documented) is documented
    assert isinstance(documented, Memoized)
    assert isinstance(Service.own, AsyncMemoized)
    assert repr(documented) == "<Memoized 'tests.test_memoize.documented'>"
    for fn, is_one in ((Service.own, True), (documented, False)):
        assert inspect.iscoroutinefunction(fn.__call__) is is_one
        if sys.version_info >= (3, 12):
            assert inspect.iscoroutinefunction(fn) is is_one


def test_bound_methods_are_found_again_by_pickle(job: Job) -> None:
    """As those of plain functions are."""
    Service.job = job
    again = pickle.loads(pickle.dumps(Service("one").shared))
    assert again(5) == "one 5"


def test_bound_methods_look_like_methods(job: Job) -> None:
    """Their signatures have no `self`; two of one instance are equal, and those of others aren't."""
    Service.job = job
    one, other = Service("one"), Service("one")
    assert str(inspect.signature(one.shared)) == "(x: 'int') -> 'str'"
    assert str(inspect.signature(one.own)) == "(x: 'int') -> 'str'"
    assert str(inspect.signature(Service.shared)) == "(self, x: 'int') -> 'str'"
    assert not hasattr(Memoized, "__signature__")
    assert one.shared == one.shared
    assert hash(one.shared) == hash(one.shared)
    assert len({one.shared, one.shared, other.shared, one.own, Service.shared}) == 4
    assert one.shared != Service.shared
    assert Service.shared == Service.shared
    assert documented != len_of


def test_a_signature_that_was_given_is_bound_too(job: Job) -> None:
    """As by decorators that hide a parameter."""

    def method(self: Any, x: int, y: int = 1) -> int:
        return x

    method.__signature__ = inspect.signature(lambda self, x: None)  # type: ignore[attr-defined]
    made: Any = type("Made", (), {"method": memoize(job, "f", ignore=("self",))(method)})
    assert str(inspect.signature(made().method)) == "(x)"
    assert str(inspect.signature(made.method)) == "(self, x)"


def test_two_functions_have_no_results_in_common_unnoticed(job: Job, tmp_path: Path) -> None:
    """Of one name, version and parameters; the same function, defined anew, and its other form go on."""

    def price(x: int) -> str:
        return "price"

    def cost(x: int) -> str:
        return "cost"

    async def aprice(x: int) -> str:
        return "aprice"

    def anew() -> Any:
        def inner(x: int) -> str:
            return "inner"

        return memoize(job, "inner")(inner)

    first = memoize(job, "price")(price)
    assert first(1) == "price"
    second = memoize(job, "price")(cost)
    for call in (second, second.refresh):
        with pytest.raises(Misuse, match=r"cost and .*price both keep results as 'price' in job 'cache'"):
            call(1)
    assert memoize(job, "price", version=2)(cost)(1) == "cost"
    assert asyncio.run(memoize(job, "price")(aprice)(1)) == "price"
    assert first(1) == memoize(job, "price")(price)(1) == "price"
    assert anew()(1) == anew()(1) == "inner"
    with Persistency(tmp_path) as p, p.open_job("cache") as another:
        assert memoize(another, "price")(cost)(1) == "cost"
    del first, price
    gc.collect()
    assert second(1) == "price"  # nobody has the other one any more


def test_a_runner_is_asked_for_at_each_call(job: Job) -> None:
    """So a function can be decorated before there is a job; what isn't one is told."""
    runners: list[Any] = [job, "none"]
    fn = memoize(lambda: runners[0], "f")(len_of)
    assert fn("abc") == 3
    runners.pop(0)
    with pytest.raises(Misuse, match="runner must be a Job or a Baton"):
        fn("abc")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": 5}, "name must be a str"),
        ({"name": ""}, "name must have 1 to 255"),
        ({"name": "\ud800"}, "lone surrogate"),
        ({"ttl": 0}, "ttl must be more than 0"),
        ({"ttl": "1"}, "ttl must be seconds or a timedelta"),
        ({"ttl": True}, "ttl must be seconds"),
        ({"ttl": float("nan")}, "ttl must be more than 0"),
        ({"lease": 0}, "lease must be more than 0"),
        ({"lease": None}, "lease must be seconds"),
        ({"lease": 0.0005}, "lease must be at least 0.01 seconds"),
        ({"version": 1.0}, "version of f must be an int or a str"),
        ({"version": "v" * 999}, "version of f is too long"),
        ({"ignore": "self"}, "ignore must be a tuple of names"),
        ({"ignore": ("b",)}, "which is no parameter of f"),
        ({"ignore": (1,)}, "which is no parameter of f"),
        ({"key": "a"}, "key must be callable"),
        ({"codec": dict}, "codec must be a codec"),
        ({"early": -1, "ttl": 1}, "early must be 0 or more"),
        ({"early": float("nan"), "ttl": 1}, "early must be 0 or more"),
        ({"early": 1.0}, "early is given without a ttl"),
        ({"random": 4}, "random must be callable"),
    ],
)
def test_wrong_options_are_misuse_when_it_decorates(job: Job, options: dict[str, Any], message: str) -> None:
    """And say what to pass."""
    with pytest.raises(Misuse, match=message):
        memoize(job, **{"name": "f", **options})(len_of)


@pytest.mark.parametrize("runner", [None, "job", object()])
def test_only_a_runner_is_one(runner: Any) -> None:
    """A job, a baton, or a function that gives one."""
    with pytest.raises(Misuse, match="runner must be a Job or a Baton"):
        memoize(runner, "f")


def test_only_functions_that_return_a_result_are_decorated(job: Job) -> None:
    """Generators give theirs piece by piece; a decorated method of a class goes inside of `classmethod`."""

    def generator() -> Iterator[int]:
        yield 1

    async def agenerator() -> Any:
        yield 1

    decorate: Any = memoize(job)
    for wrong in (generator, agenerator):
        with pytest.raises(Misuse, match="what a generator gives"):
            decorate(wrong)
    for wrong_ in (5, property(len_of)):
        with pytest.raises(Misuse, match="memoize decorates a function"):
            decorate(wrong_)
    for nameless in (lambda: 1, functools.partial(len_of, "a")):
        with pytest.raises(Misuse, match="without a name of its own"):
            decorate(nameless)
    for method in (staticmethod(len_of), classmethod(len_of)):
        with pytest.raises(Misuse, match=r"memoize decorates a function, not (static|class)method") as caught:
            decorate(method)
        assert "@classmethod or @staticmethod above that" in caught.value.hint
    assert decorate(len)("ab") == 2


def test_the_decorator_without_its_arguments_says_what_to_write(job: Job) -> None:
    """When it decorates; or, where the function could be one that gives a runner, when that is called."""

    async def coroutine() -> int:
        return 1

    def nothing() -> int:
        return 1

    bare: Any = memoize
    for fn in (len_of, coroutine):
        with pytest.raises(Misuse, match=r"memoize takes a runner, not .*(len_of|coroutine)") as caught:
            bare(fn)
        assert "Write @memoize(job) above the def" in caught.value.hint
    decorated = bare(nothing)
    for call in (decorated, lambda: decorated(x=1), lambda: decorated(1, 2)):
        with pytest.raises(Misuse, match="memoize decorates one function") as caught:
            call()
        assert "Write @memoize(job) above the def" in caught.value.hint


def test_partials_and_callable_objects_are_decorated(job: Job) -> None:
    """By the name they are given; the kind of function is found within."""

    async def add(a: int, b: int) -> int:
        return a + b

    class Adder:
        async def __call__(self, a: int) -> int:
            return a + 1

    assert asyncio.run(memoize(job, "a")(functools.partial(add, 1))(2)) == 3
    assert asyncio.run(memoize(job, "b")(functools.partial(add, b=1))(a=2)) == 3
    assert asyncio.run(memoize(job, "c")(Adder())(2)) == 3
    assert memoize(job, "d")(functools.partial(len_of, "abc"))() == 3


def test_inside_of_a_run_it_is_refused(job: Job) -> None:
    """Nobody can wait there for what the job itself has to answer."""
    fn = memoize(job, "f")(len_of)

    def within(tx: Transaction) -> int:
        return fn("abc")

    with pytest.raises(Misuse):
        job.run(within).result()
    assert fn("abc") == 3


def test_a_forked_child_waits_for_no_flight_of_its_parent(tmp_path: Path) -> None:
    """Whoever leads it isn't there; the child's own job serves it."""
    program = """
import os, sys, threading
from persistency import Persistency
from persistency.recipes import memoize

here, go = threading.Event(), threading.Event()
jobs = []

@memoize(lambda: jobs[-1], "slow")
def slow(x):
    if os.getpid() == parent:
        here.set()
        go.wait()
    return x

parent = os.getpid()
with Persistency(sys.argv[1]) as p:
    jobs.append(p.open_job("cache"))
    computing = threading.Thread(target=slow, args=(1,))
    computing.start()
    here.wait()
    child = os.fork()
    if child == 0:
        with Persistency(":memory:") as own:
            jobs.append(own.open_job("cache"))
            ok = slow(1) == 1
        os._exit(0 if ok else 1)
    _, status = os.waitpid(child, 0)
    go.set()
    computing.join()
    print(os.waitstatus_to_exitcode(status), slow(1))
"""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        cwd=TOP,
        env={**os.environ, "PYTHONPATH": str(TOP)},
    )
    assert found.stdout.split() == ["0", "1"]


def test_log_records_are_plain_for_machines(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    """The fields of a record are text and numbers; neither arguments nor results are among them."""
    fn = memoize(job, "f")(len_of)
    job.put("f", fn.key("secret"), b"spoilt")
    fn("secret")
    (record,) = caplog.records
    fields = {name: value for name, value in vars(record).items() if name.startswith("persistency_")}
    assert json.loads(json.dumps(fields)) == {
        "persistency_event": "memoize_unreadable",
        "persistency_job": "cache",
        "persistency_error": "Corrupt",
        "persistency_function": "f",
    }
    assert record.levelno == logging.WARNING
    assert "secret" not in record.getMessage()


def test_keys_of_results_are_the_job_s_own(job: Job) -> None:
    """`key` and `name` tell where a result is, for whoever wants to look."""
    fn = memoize(job, "f")(len_of)
    assert job.exists(fn.name, fn.key("abc")).result() is False
    fn("abc")
    assert job.exists(fn.name, fn.key("abc")).result() is True
    assert isinstance(fn.key("abc"), Key)
