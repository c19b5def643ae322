"""The rate limiter: what it allows, in what order those who wait are served, and what stays in the job."""

from __future__ import annotations

import queue
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from fractions import Fraction
from functools import partial
from math import ceil, floor
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistency import CBOR, Corrupt, Job, Misuse, Persistency, Reply, Transaction, key
from persistency.recipes import Baton, RateLimiter, Verdict, ratelimit
from persistency.recipes.waiting import Nap
from persistency.testing import ManualClock
from tests.crash.running import PROJECT, command
from tests.loops import WAIT, InLoop, Task, bounded, together

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


@pytest.fixture
def clock() -> ManualClock:
    """A clock that only the test moves."""
    return ManualClock()


@pytest.fixture
def job(clock: ManualClock, tmp_path: Path) -> Iterator[Job]:
    """A job by that clock."""
    with Persistency(tmp_path / "root", clock=clock) as store, store.open_job("limits") as job:
        yield job


class Bucket:
    """The same as a bucket that leaks: `limit` in `per_ms` run out of it, evenly, and `burst` fit in. Exact."""

    def __init__(self, limit: int, per_ms: int, burst: int) -> None:
        self.rate = Fraction(limit, per_ms)
        self.burst = burst
        self.level = Fraction(0)
        self.now_ms = 0

    def wait(self, ms: int) -> None:
        """Let time pass."""
        self.now_ms += ms
        self.level = max(Fraction(0), self.level - ms * self.rate)

    def verdict(self, n: int, *, takes: bool) -> Verdict:
        """Take `n`, if they fit in."""
        allowed = self.level + n <= self.burst
        wait_ms = 0 if allowed else ceil((self.level + n - self.burst) / self.rate)
        self.level += n if allowed and takes else 0
        return Verdict(allowed, floor(self.burst - self.level), wait_ms / 1000)


RATES = st.tuples(st.integers(1, 40), st.sampled_from([1, 7, 100, 1000, 60_000]), st.integers(1, 50))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.sampled_from([0, 1, 2, 3, 10, 99, 1000, 12_345])),
        st.tuples(st.sampled_from(["check", "peek", "check_in"]), st.integers(1, 50)),
        st.tuples(st.just("reset"), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=120, deadline=None)
@given(RATES, STEPS)
def test_it_does_what_a_leaking_bucket_does(rate: tuple[int, int, int], steps: list[tuple[str, int]]) -> None:
    """To the millisecond, for every rate: what is allowed, what remains, and when to come again."""
    limit, per_ms, burst = rate
    clock, bucket = ManualClock(), Bucket(limit, per_ms, burst)
    with Persistency(":memory:", clock=clock) as store, store.open_job("limits") as job:
        limiter = RateLimiter(job, limit=limit, per=timedelta(milliseconds=per_ms), burst=burst)
        for what, count in steps:
            n = min(count, burst)
            if what == "wait":
                clock.advance(count / 1000)
                bucket.wait(count)
            elif what == "reset":
                assert limiter.reset("who").result() == (bucket.level > 0)
                bucket.level = Fraction(0)
            elif what == "peek":
                assert limiter.peek("who", n).result() == bucket.verdict(n, takes=False)
            elif what == "check":
                assert limiter.check("who", n).result() == bucket.verdict(n, takes=True)
            else:
                assert job.run(limiter.check_in, "who", n).result() == bucket.verdict(n, takes=True)
            assert job.exists("limits", ("who",)).result() == (bucket.level > 0)


@settings(max_examples=60, deadline=None)
@given(RATES, st.lists(st.tuples(st.sampled_from([0, 1, 3, 50, 400, 2000]), st.integers(1, 5)), max_size=80))
def test_no_window_has_more(rate: tuple[int, int, int], tried: list[tuple[int, int]]) -> None:
    """Whatever comes when: no window of `w` has more than `burst + w * limit / per`, so none of `per` has
    more than `limit + burst`.
    """
    limit, per_ms, burst = rate
    clock, now, taken = ManualClock(), 0, []
    with Persistency(":memory:", clock=clock) as store, store.open_job("limits") as job:
        limiter = RateLimiter(job, limit=limit, per=per_ms / 1000, burst=burst)
        for wait_ms, n in tried:
            clock.advance(wait_ms / 1000)
            now += wait_ms
            n = min(n, burst)
            if limiter.check("who", n).result().allowed:
                taken.append((now, n))
    for first, (begin, _) in enumerate(taken):
        inside = 0
        for end, n in taken[first:]:
            inside += n
            assert inside <= burst + (end - begin) * limit / per_ms


def test_threads_at_once_get_no_more(job: Job, clock: ManualClock) -> None:
    """Eight threads that all try get what one would: a burst, and then a limit for each `per`."""
    limiter, allowed = RateLimiter(job, limit=10, per=1, burst=25), queue.SimpleQueue[bool]()

    def attempt() -> None:
        for _ in range(20):
            allowed.put(limiter.check("who").result().allowed)

    def attempts() -> int:
        threads = [threading.Thread(target=attempt) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(allowed.get(timeout=WAIT) for _ in range(160))

    assert attempts() == 25
    assert attempts() == 0
    for _ in range(3):
        clock.advance(1)
        assert attempts() == 10
    clock.advance(60)
    assert attempts() == 25


LIMITED = """
import sys
from persistency import Persistency
from persistency.recipes import Baton, RateLimiter

with Persistency(sys.argv[1]) as store, Baton(store, "limits") as baton:
    limiter = RateLimiter(baton, limit=1, per=1e6, burst=40)
    print(sum(limiter.check("who").result().allowed for _ in range(30)))
"""


def test_processes_share_a_limit(tmp_path: Path) -> None:
    """Over a `Baton`: three processes that try 30 times each get the 40 of the burst between them."""
    line = [*command("unused")[:1], "-W", "error", "-c", LIMITED, str(tmp_path)]
    running = [subprocess.Popen(line, cwd=PROJECT, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    told = [child.communicate(timeout=WAIT)[0] for child in running]
    assert [child.returncode for child in running] == [0, 0, 0]
    assert sum(map(int, told)) == 40


# -- rows --------------------------------------------------------------------------------------------------------------


def test_idle_keys_vanish(job: Job, clock: ManualClock) -> None:
    """A key has a row as long as it says something, and the job gets rid of it by itself."""
    limiter = RateLimiter(job, limit=10, per=1)
    for number in range(50):
        assert limiter.check(("user", number), 5).result().allowed
    assert job.count("limits").result() == 50
    clock.advance(0.499)
    assert job.count("limits").result() == 50
    clock.advance(0.001)
    assert job.count("limits").result() == 0
    assert limiter.peek(("user", 1), 10).result().allowed


def test_keys_are_apart(job: Job) -> None:
    """One key's use is no other's; a text stands for the tuple of it; categories are apart too."""
    limiter, other = RateLimiter(job, limit=1, per=60), RateLimiter(job, "logins", limit=1, per=60)
    assert limiter.check("a").result().allowed
    assert not limiter.check(("a",)).result().allowed
    assert not limiter.check(key("a")).result().allowed
    for which in ("b", ("a", 1), 1, ("1",)):
        assert limiter.check(which).result().allowed
    assert other.check("a").result().allowed


def test_check_is_undone_with_its_transaction(job: Job) -> None:
    """As a part of one's own transaction it takes nothing if that fails."""
    limiter = RateLimiter(job, limit=1, per=60)

    def spend(tx: Transaction, *, fails: bool) -> Verdict:
        verdict = limiter.check_in(tx, "who")
        return verdict if not fails else tx.run(lambda _tx: 1 / 0)  # type: ignore[return-value]  # it raises

    with pytest.raises(ZeroDivisionError):
        job.run(lambda tx: spend(tx, fails=True)).result()
    assert job.run(lambda tx: spend(tx, fails=False)).result().allowed
    assert not limiter.check("who").result().allowed


def test_other_limit_goes_on_from_there(job: Job, clock: ManualClock) -> None:
    """A limiter whose rate was changed knows what was taken: nobody gets more, or less, by it."""
    assert RateLimiter(job, limit=7, per=7).check("who", 7).result().allowed  # for the next seven seconds
    clock.advance(3)
    faster = RateLimiter(job, limit=30, per=10, burst=30)  # three in a second
    assert faster.peek("who").result() == Verdict(True, 30 - 4 * 3, 0.0)
    assert RateLimiter(job, limit=7, per=7, burst=1).peek("who").result() == Verdict(False, 0, 4.0)


def test_other_limit_is_rounded_up(job: Job) -> None:
    """A third of a millisecond is a whole one, where the new limit knows no thirds: nobody gets more by it."""
    assert RateLimiter(job, limit=3, per=0.001).check("who").result().allowed
    assert not RateLimiter(job, limit=1, per=0.001).check("who").result().allowed


@pytest.mark.parametrize("row", [1, [], [1], [1, 0], [1, 1, [1]], [1, 1, {"a": 1}], [1, 1, {}, 1]], ids=str)
def test_foreign_rows_are_corrupt(job: Job, row: Any) -> None:
    """What a limiter hasn't written it doesn't take for a number."""
    job.put("limits", ("who",), CBOR.encode(row))
    with pytest.raises(Corrupt, match="who"):
        RateLimiter(job, limit=1, per=1).check("who").result()


def test_transaction_of_another_job_is_refused(tmp_path: Path) -> None:
    """What is counted there says nothing here: `Misuse`, and nothing is taken in either."""
    with Persistency(tmp_path) as store:
        job, other = store.open_job("limits"), store.open_job("other")
        limiter = RateLimiter(job, limit=1, per=60)
        with pytest.raises(Misuse, match="'other'"):
            other.run(limiter.check_in, "who").result()
        assert job.count("limits").result() == other.count("limits").result() == 0


@pytest.mark.parametrize(
    ("per", "ms"),
    [(0.0014, 2), (0.001, 1), (0.069, 69), (1.005, 1005), (2.3, 2300), (2.007, 2007), (1, 1000), (0.010001, 11)],
)
def test_fraction_of_a_millisecond_counts_as_a_whole_one(job: Job, clock: ManualClock, per: float, ms: int) -> None:
    """So no more gets through than `limit` in `per`; and what was written as whole milliseconds is taken so."""
    for length in (per, timedelta(seconds=per)):
        limiter = RateLimiter(job, f"by {type(length).__name__}", limit=1, per=length)
        assert limiter.check("who").result().allowed
        assert limiter.peek("who").result().retry_after == ms / 1000


# -- waiting for one's turn --------------------------------------------------------------------------------------------


def test_turns_are_reserved_in_order(job: Job, clock: ManualClock) -> None:
    """Who waits has his place: `check` gets nothing before him, and a turn too far off is refused at once."""
    limiter = RateLimiter(job, limit=1, per=100)
    limiter.take("who")  # there was one
    for far in (50, 99.9):
        with pytest.raises(TimeoutError, match="turn"):
            limiter.take("who", timeout=far)
    assert limiter.peek("who").result().retry_after == 100.0  # they have taken nothing
    clock.advance(100)
    limiter.take("who", timeout=0.5)
    assert limiter.peek("who").result().retry_after == 100.0


def test_take_waits_for_its_turn(tmp_path: Path) -> None:
    """By the job's own clock: three more than the burst take three times as long as one, and all are served."""
    with Persistency(tmp_path) as store, store.open_job("limits") as job:
        limiter = RateLimiter(job, limit=100, per=1, burst=1)
        before = limiter.peek("who").result()
        threads = [threading.Thread(target=limiter.take, args=("who",)) for _ in range(4)]
        begun = job.run(lambda tx: tx.now_ms).result()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert before.allowed
        assert job.run(lambda tx: tx.now_ms).result() - begun >= 29  # two clocks of whole milliseconds


def test_tasks_take_turns(tmp_path: Path, in_loop: InLoop) -> None:
    """Under each event loop; and a turn too far off is refused there as well."""
    with Persistency(tmp_path) as store, store.open_job("limits") as job:
        limiter, served = RateLimiter(job, limit=1000, per=1, burst=1), []

        async def take() -> None:
            for _ in range(3):
                await limiter.atake("who", timeout=WAIT)
                served.append(1)

        in_loop(bounded, together, *[take] * 4)
        assert len(served) == 12
        slow = RateLimiter(job, limit=1, per=3600)
        in_loop(bounded, slow.atake, "slow")
        with pytest.raises(TimeoutError):
            in_loop(bounded, slow.atake, "slow", timeout=5.0)


def test_turn_given_up_goes_back(job: Job, in_loop: InLoop) -> None:
    """A cancelled task has taken nothing, once nobody is left who has come after it."""
    limiter = RateLimiter(job, limit=1, per=100)

    def retry_after() -> float:
        return limiter.peek("who").result().retry_after

    async def main() -> None:
        await limiter.atake("who")
        async with anyio.create_task_group() as group:
            first = Task(group, partial(limiter.atake, "who"))
            while retry_after() < 200:
                await anyio.lowlevel.checkpoint()
            second = Task(group, partial(limiter.atake, "who"))
            while retry_after() < 300:
                await anyio.lowlevel.checkpoint()
            first.cancel()
            while not first.done:
                await anyio.lowlevel.checkpoint()
            assert retry_after() == 300
            second.cancel()
        while retry_after() > 100:  # the job has it undone a little after the tasks have ended
            await anyio.lowlevel.checkpoint()
        assert retry_after() == 100

    in_loop(bounded, main)


def test_batch_given_up_goes_back(job: Job, clock: ManualClock, in_loop: InLoop) -> None:
    """Cancelled in any order, with others' turns among them: what they had reserved is as if they had never come."""
    limiter = RateLimiter(job, limit=1, per=60)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            tasks = []
            for _ in range(20):
                tasks.append(Task(group, partial(limiter.atake, "who")))
                while limiter.peek("who").result().retry_after < 60 * (len(tasks) + 10):
                    await anyio.lowlevel.checkpoint()
            for task in tasks[:7] + tasks[12:] + tasks[7:12]:
                task.cancel()
        while limiter.peek("who").result().retry_after > 60 * 10:  # undone a little after the tasks have ended
            await anyio.lowlevel.checkpoint()

    for _ in range(10):  # these have theirs, and keep them
        job.run(ratelimit._reserve, limiter._rate, key("who"), 1, float("inf")).result()
    in_loop(bounded, main)
    assert limiter.peek("who").result().retry_after == 60 * 10
    clock.advance(60 * 10)
    assert limiter.check("who").result().allowed


def test_turn_given_up_and_past_is_forgotten(job: Job, clock: ManualClock) -> None:
    """Only turns that are still to come are remembered, and no more than there is room for; the first stay taken."""
    limiter, which = RateLimiter(job, limit=1, per=1), key("who")
    rate = limiter._rate

    def reserve() -> int:
        reserved = job.run(ratelimit._reserve, rate, which, 1, float("inf")).result()
        assert reserved.arrival is not None
        return reserved.arrival

    def given_up() -> int:
        row = CBOR.decode(job.get("limits", which).result() or b"")
        return len(row[2]) if len(row) > 2 else 0

    turns = [reserve() for _ in range(ratelimit._GIVEN_UP_MAX + 10)]
    for turn in turns[:-1]:
        job.run(ratelimit._undo, rate, which, rate.step, turn).result()
    assert given_up() == ratelimit._GIVEN_UP_MAX
    clock.advance(len(turns) - 5)
    job.run(ratelimit._undo, rate, which, rate.step, turns[0]).result()  # it is past
    reserve()
    assert given_up() == 4
    other = RateLimiter(job, limit=2, per=1)
    assert other.check("who").result().allowed is False
    job.run(ratelimit._undo, other._rate, which, other._rate.step, turns[-1] * 2).result()  # by another limit: nothing
    assert given_up() == 4
    assert limiter.peek("who").result().retry_after == 6.0


def test_free_turn_is_had_with_a_timeout_of_0(job: Job, tmp_path: Path, in_loop: InLoop) -> None:
    """However long the answer takes: in a loop, over a baton, and of a job that is busy."""
    limiter = RateLimiter(job, limit=20, per=3600)

    async def main() -> None:
        for _ in range(20):
            await limiter.atake("who", timeout=0)
        with pytest.raises(TimeoutError, match="turn"):
            await limiter.atake("who", timeout=0)

    in_loop(bounded, main)
    with Persistency(tmp_path / "shared") as store, Baton(store, "limits") as baton:
        shared = RateLimiter(baton, limit=1, per=3600)
        shared.take("who", timeout=0)
        with pytest.raises(TimeoutError, match="turn"):
            shared.take("who", timeout=timedelta(0))
    runner = Kept(job)
    steps = RateLimiter(runner, limit=1, per=100)._taking("busy", 1, 0)
    nap = next(steps)
    assert isinstance(nap, Nap)
    assert nap.seconds is None
    runner.calls.pop()()
    with pytest.raises(StopIteration):
        steps.send(True)


class Kept:
    """A runner whose calls are made when the test says so."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.id = job.id
        self.calls: list[Callable[[], None]] = []

    def run(self, fn: Callable[[Transaction, *Ts], T], *args: *Ts) -> Reply[T]:
        """Keep a call."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()
        self.calls.append(lambda: future.set_result(self.job.run(fn, *args).result()))
        return Reply.of(future)


def test_turn_that_comes_too_late_goes_back(job: Job) -> None:
    """The job was busy until the timeout was over: what it reserves then is taken back."""
    runner = Kept(job)
    with pytest.raises(TimeoutError):
        RateLimiter(runner, limit=2, per=100).take("who", timeout=0.01)
    runner.calls.pop()()
    assert job.exists("limits", ("who",)).result()
    runner.calls.pop()()
    assert not job.exists("limits", ("who",)).result()


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"runner": None}, {"name": ""}, {"name": 1}, {"name": "\ud800"}, {"limit": 0}, {"limit": 1.5},
        {"limit": True}, {"limit": 10**10}, {"per": 0}, {"per": -1}, {"per": "1"}, {"per": float("nan")}, {"per": 1e10},
        {"burst": 0}, {"burst": "1"}, {"per": timedelta(seconds=-1)}, {"per": 10**400},
        {"per": 1e9, "burst": 10**9}, {"per": 1e9, "burst": 2},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_rates_are_misuse(job: Job, wrong: dict[str, Any]) -> None:
    """At the call."""
    with pytest.raises(Misuse):
        RateLimiter(**{"runner": job, "limit": 1, "per": 1, **wrong})


@pytest.mark.parametrize("n", [0, -1, 4, 1.0, True, "1"])
def test_wrong_numbers_are_misuse(job: Job, n: Any) -> None:
    """At the call, for every verb: more than the burst could never be had."""
    limiter = RateLimiter(job, limit=3, per=1)
    for verb in (limiter.check, limiter.peek, limiter.take):
        with pytest.raises(Misuse):
            verb("who", n)
    with pytest.raises(Misuse):
        job.run(limiter.check_in, "who", n).result()
    for timeout in (-1, timedelta(seconds=-1), float("nan"), "1", True):
        with pytest.raises(Misuse, match="timeout"):
            limiter.take("who", timeout=timeout)  # type: ignore[arg-type]  # that is what is tried
    with pytest.raises(Misuse):
        limiter.check(object())  # type: ignore[arg-type]  # no key
    assert job.count("limits").result() == 0


def test_large_numbers_are_exact(clock: ManualClock) -> None:
    """A billion in a year: times are kept in parts of a millisecond beyond 64 bits."""
    with tempfile.TemporaryDirectory() as place, Persistency(place, clock=clock) as store:
        limiter = RateLimiter(store.open_job("limits"), limit=10**9, per=timedelta(days=365))
        assert limiter.check("who", 10**9).result() == Verdict(True, 0, 0.0)
        clock.advance(1)
        assert limiter.peek("who", 31).result() == Verdict(True, 31, 0.0)  # 10**9 / 31,536,000 in a second
        assert limiter.peek("who", 32).result().retry_after == 0.01
