"""The lock: one holder at a time, tokens that grow, leases that are renewed, and what is lost when they aren't."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import anyio
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from persistency import CBOR, Closed, Job, Misuse, Persistency, Reply, StorageError, Transaction
from persistency.recipes import Baton, Grant, Lock, LockLost, lock_grant, lock_keeper, lock_rows
from persistency.recipes.lock_line import Line
from persistency.testing import ManualClock
from tests.crash.holders import PLANTS
from tests.crash.running import PROJECT
from tests.loops import WAIT, InLoop, Task, bounded, together
from tests.soak.locks import Judged, enough, judge, storm

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

LONG = 3600.0  # a lease that doesn't run out in a test by itself


@pytest.fixture
def clock() -> ManualClock:
    """A clock that only the test moves."""
    return ManualClock()


@pytest.fixture
def job(clock: ManualClock, tmp_path: Path) -> Iterator[Job]:
    """A job by that clock."""
    with Persistency(tmp_path / "root", clock=clock) as store, store.open_job("locks") as job:
        yield job


class Held:
    """A runner that keeps its calls until it is told to make them, or to fail them; given up, some are not made."""

    def __init__(self, job: Job, *, cancellable: bool = False) -> None:
        self.job = job
        self.cancellable = cancellable
        self.id = job.id
        self.calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self.holds = True

    def run(self, fn: Callable[[Transaction, *Ts], T], *args: *Ts) -> Reply[T]:
        """Keep a call, or make it."""
        if not self.holds:
            return self.job.run(fn, *args)
        future: Future[T] = Future()
        if not self.cancellable:
            future.set_running_or_notify_cancel()
        self.calls.put((future, lambda: self.job.run(fn, *args).result()))
        return Reply.of(future)

    def make(self) -> None:
        """Make the call that waits longest, once there is one."""
        future, call = self.calls.get(timeout=WAIT)
        future.set_result(call())

    def fail(self, error: Exception) -> None:
        """Have it fail."""
        self.calls.get(timeout=WAIT)[0].set_exception(error)


def in_thread(fn: Callable[[], T]) -> Future[T]:
    """Run a function in a thread of its own; what comes of it is the future's."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(fn())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The events that were logged by recipes."""
    return [vars(record)["persistency_event"] for record in caplog.records if record.name == "persistency.recipes"]


# -- as a model has it -------------------------------------------------------------------------------------------------


class LockModel(RuleBasedStateMachine):
    """Locks beside a dict of who has them until when, by a clock that only the machine moves."""

    grants = Bundle("grants")

    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory(prefix="locks-")
        self.clock = ManualClock()
        self.held: dict[str, tuple[int, int]] = {}  # by name: the token, and when the lease ends
        self.top = 0
        self.given: dict[Grant, str] = {}  # what each of them is known to be
        self.now = 0
        self.open()

    def open(self) -> None:
        """Open the job, and begin with new locks."""
        self.store = Persistency(self.place.name, clock=self.clock)
        self.job = self.store.open_job("locks")
        self.locks = {
            (name, lease): Lock(self.job, name, lease=lease, renew=False)
            for name in ("one", "two")
            for lease in (1000, 2000)
        }

    def holder(self, name: str) -> int | None:
        """Who has a lock, by the model."""
        token, ends = self.held.get(name, (None, 0))
        return token if self.now < ends else None

    def current(self, grant: Grant) -> bool:
        """Whether a grant is the one that has its lock, and doesn't know otherwise."""
        return self.given[grant] == "held" and self.holder(grant.name) == grant.token

    @rule(target=grants, name=st.sampled_from(["one", "two"]), lease=st.sampled_from([1000, 2000]))
    def try_acquire(self, name: str, lease: int) -> Any:
        grant = self.locks[name, lease].try_acquire().result()
        assert (grant is None) == (self.holder(name) is not None)
        if grant is not None:
            assert grant.token > self.top
            self.top = grant.token
            self.held[name] = grant.token, self.now + lease
            self.given[grant] = "held"
        return grant, lease

    @rule(seconds=st.sampled_from([1, 400, 999, 1000, 1500]))
    def wait(self, seconds: int) -> None:
        self.clock.advance(seconds)
        self.now += seconds

    @rule(given=grants)
    def renew(self, given: tuple[Grant | None, int]) -> None:
        grant, lease = given
        if grant in self.given:
            kept = self.current(grant)
            assert grant.renew().result() == kept
            if kept:
                self.held[grant.name] = grant.token, self.now + lease
            elif self.given[grant] == "held":
                self.given[grant] = "lost"

    @rule(given=grants)
    def check(self, given: tuple[Grant | None, int]) -> None:
        grant, _ = given
        if grant in self.given:
            reply = self.job.run(grant.check_in)
            if self.current(grant):
                reply.result()
            else:
                with pytest.raises(LockLost):
                    reply.result()
                if self.given[grant] == "held":
                    self.given[grant] = "lost"

    @rule(given=grants)
    def release(self, given: tuple[Grant | None, int]) -> None:
        grant, _ = given
        if grant in self.given and self.given[grant] != "released":
            kept = self.current(grant)
            assert grant.release().result() == kept
            assert grant.release().result() == kept
            if kept:
                del self.held[grant.name]
            self.given[grant] = "released" if kept else "lost"

    @rule()
    def reopen(self) -> None:
        self.finish()
        self.open()

    @invariant()
    def what_they_say(self) -> None:
        for grant, known in self.given.items():
            assert (grant.held, grant.lost) == (known == "held", known == "lost")

    def finish(self) -> None:
        """Leave all grants to run out."""
        self.store.close()
        for grant, known in self.given.items():
            if known == "held":
                with pytest.raises(Closed):
                    grant.release()
        self.given.clear()

    def teardown(self) -> None:
        self.finish()
        self.place.cleanup()


def test_locks_do_what_a_model_says() -> None:
    """One holder until his lease ends, tokens grow over reopening, and only the holder renews, passes and releases."""
    run_state_machine_as_test(LockModel, settings=settings(max_examples=25, stateful_step_count=40, deadline=None))


# -- waiting -----------------------------------------------------------------------------------------------------------


def test_release_wakes_a_waiter(job: Job) -> None:
    """Who waits gets the lock by its release, long before the lease is over."""
    held = Lock(job, "one", lease=LONG).acquire()
    waiting = in_thread(Lock(job, "one", lease=LONG).acquire)
    assert held.release().result()
    with waiting.result(WAIT) as grant:
        assert grant.token > held.token


def test_waiters_get_it_in_the_order_they_came(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A release lets in who has waited longest, and nobody who comes later passes him."""
    lock, came, order = Lock(job, "one", lease=LONG), queue.SimpleQueue[None](), []
    join = Line.join
    held = lock.acquire()
    monkeypatch.setattr(Line, "join", lambda line: (join(line), came.put(None))[0])

    def wait(number: int) -> None:
        with Lock(job, "one", lease=LONG):
            order.append(number)

    waiting = []
    for number in range(6):
        waiting.append(in_thread(lambda number=number: wait(number)))
        came.get(timeout=WAIT)
    held.release().result()
    for one in waiting:
        one.result(WAIT)
    assert order == list(range(6))


def test_timeout_takes_nothing(job: Job) -> None:
    """Who waits in vain is told so, and the lock goes to others as if he had never come."""
    lock = Lock(job, "one", lease=LONG)
    with lock.acquire():
        with pytest.raises(TimeoutError, match="'one'"):
            lock.acquire(timeout=0.01)
        assert lock.try_acquire().result() is None
    with lock.acquire(timeout=WAIT) as grant:
        assert grant.held


def test_lock_that_comes_too_late_is_given_back(job: Job) -> None:
    """The attempt of somebody who has given up waiting succeeds, and the lock is free again at once."""
    runner = Held(job)
    with pytest.raises(TimeoutError):
        Lock(runner, "one", lease=LONG).acquire(timeout=0.01)
    runner.make()  # it is taken
    assert Lock(job, "one").try_acquire().result() is None
    runner.make()
    with Lock(job, "one").acquire(timeout=WAIT) as grant:
        assert grant.held


def test_free_lock_is_had_with_a_timeout_of_0(job: Job, in_loop: InLoop) -> None:
    """However long the answer of the one attempt takes: in a loop, where it never comes at once, and in a thread."""

    async def main() -> None:
        for number in range(20):
            async with await Lock(job, f"lock {number}").aacquire(timeout=0):
                with pytest.raises(TimeoutError):
                    await Lock(job, f"lock {number}").aacquire(timeout=0)

    in_loop(bounded, main)
    runner = Held(job)
    waiting = in_thread(lambda: Lock(runner, "one").acquire(timeout=0))
    runner.make()
    runner.holds = False
    assert waiting.result(WAIT).release().result()


def test_free_lock_of_a_baton_is_had_with_a_timeout_of_0(tmp_path: Path) -> None:
    """The baton has to open the job first; a held one is refused after one look."""
    with Persistency(tmp_path) as store, Baton(store, "locks") as baton:
        with Lock(baton, "one").acquire(timeout=0), pytest.raises(TimeoutError):
            Lock(baton, "one").acquire(timeout=0)
        with Lock(baton, "one").acquire(timeout=timedelta(seconds=WAIT)) as grant:
            assert grant.held


def test_attempt_nobody_has_looked_at_is_given_back(job: Job, in_loop: InLoop) -> None:
    """A cancelled task that had asked by `try_acquire` doesn't keep the lock for a lease, nor does a dropped reply."""
    runner = Held(job)

    async def attempt() -> None:
        await Lock(runner, "one", lease=LONG).try_acquire()

    async def main() -> None:
        async with anyio.create_task_group() as group:
            task = Task(group, attempt)
            while runner.calls.empty():
                await anyio.lowlevel.checkpoint()
            task.cancel()

    in_loop(bounded, main)
    runner.make()  # it is taken
    assert job.exists("locks", ("one",)).result()
    runner.holds = False
    gc.collect()
    assert not job.exists("locks", ("one",)).result()
    Lock(job, "one", lease=LONG).try_acquire()
    gc.collect()
    grant = Lock(job, "one", lease=LONG).try_acquire().result()
    gc.collect()
    assert grant is not None
    assert job.exists("locks", ("one",)).result()
    assert grant.release().result()


def test_who_waited_in_a_closed_loop_holds_nobody_up(job: Job) -> None:
    """Its task is never woken again, and still stands in front: the next one in line is the first."""
    lock = Lock(job, "one", lease=LONG)
    held = lock.acquire()
    loop = asyncio.new_event_loop()
    task = loop.create_task(lock.aacquire())
    while not lock._terms.line._turns:
        loop.run_until_complete(asyncio.sleep(0))
    behind = in_thread(lambda: lock.acquire(timeout=WAIT))
    while len(lock._terms.line._turns) < 2:
        time.sleep(0)
    loop.close()
    held.release().result()
    assert behind.result(2 * WAIT).release().result()
    task.get_coro().close()  # type: ignore[union-attr]  # a coroutine
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # that is what happened to it


def test_who_is_behind_a_closed_loop_comes_by_himself(tmp_path: Path) -> None:
    """Where the holder is dead too, nobody rings for who isn't the first: a lease later he sees that he is."""
    with Persistency(tmp_path) as store, store.open_job("locks") as job:
        lock = Lock(job, "one", lease=0.2, renew=False)
        dead = lock.acquire()
        loop = asyncio.new_event_loop()
        task = loop.create_task(lock.aacquire())
        while not lock._terms.line._turns:
            loop.run_until_complete(asyncio.sleep(0))
        behind = in_thread(lambda: lock.acquire(timeout=WAIT))
        while len(lock._terms.line._turns) < 2:
            time.sleep(0)
        loop.close()
        behind.result(2 * WAIT).release().result()
        assert dead.lost
        task.get_coro().close()  # type: ignore[union-attr]  # a coroutine
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # that is what happened to it


def test_attempt_that_was_cancelled_leaves_nothing(job: Job, in_loop: InLoop) -> None:
    """Where a runner drops a call that nobody waits for there is nothing to give back."""
    runner = Held(job, cancellable=True)
    lock = Lock(runner, "one", lease=LONG)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            await lock.aacquire(timeout=0.01)

    in_loop(bounded, main)
    future, _ = runner.calls.get(timeout=WAIT)
    assert future.cancelled()
    assert runner.calls.empty()
    runner.holds = False
    with lock as grant:
        assert grant.held


def test_attempt_that_fails_is_raised(job: Job) -> None:
    """What the job says is what the caller gets; the next one in line asks again."""
    runner = Held(job)
    lock = Lock(runner, "one")
    waiting = [in_thread(lock.acquire) for _ in range(2)]
    runner.fail(StorageError("no disk"))
    runner.make()
    errors = [one.exception(WAIT) for one in waiting]
    assert sorted(map(str, errors)) == ["None", "no disk"]
    runner.holds = False
    assert next(one for one in waiting if one.exception() is None).result().release().result()


def test_end_of_the_lease_lets_others_in(job: Job, clock: ManualClock) -> None:
    """The lock of a dead holder is free when its lease is over, to the millisecond, and not before."""
    dead = Lock(job, "one", lease=30, renew=False).acquire()
    clock.advance(29.999)
    assert Lock(job, "one").try_acquire().result() is None
    clock.advance(0.001)
    with Lock(job, "one").acquire(timeout=WAIT) as grant:
        assert grant.token > dead.token
        assert not dead.release().result()
        assert Lock(job, "one").try_acquire().result() is None  # it is no dead man's to give back


def test_waiter_comes_by_itself_when_the_lease_ends(tmp_path: Path) -> None:
    """Nobody rings when a holder dies: who waits looks again when the lease is over."""
    with Persistency(tmp_path) as store, store.open_job("locks") as job:
        dead = Lock(job, "one", lease=0.1, renew=False).acquire()
        with Lock(job, "one").acquire(timeout=WAIT):
            assert dead.lost


# -- losing it ---------------------------------------------------------------------------------------------------------


def test_holder_counts_its_lease_by_its_own_clock(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A holder that was paused for a lease knows it is lost before it asks anybody, and nothing takes that back."""
    real = lock_grant.clock
    grant = Lock(job, "one", lease=30, renew=False).acquire()
    monkeypatch.setattr(lock_grant, "clock", lambda: real() + 29.9)
    assert not grant.lost
    monkeypatch.setattr(lock_grant, "clock", lambda: real() + 30)
    assert grant.lost
    monkeypatch.undo()
    assert grant.lost
    assert not grant.renew().result()
    with pytest.raises(LockLost):
        job.run(grant.check_in).result()
    assert not grant.release().result()
    with Lock(job, "one").acquire(timeout=WAIT):  # given back all the same
        pass


def test_holder_has_lost_it_before_another_can_have_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one clock for both, taken in the last part of a millisecond, of which the row's end has none."""
    now = [1000.0009]
    with Persistency(tmp_path, clock=lambda: 1_700_000_000 + now[0]) as store, store.open_job("locks") as job:
        for module in (lock_rows, lock_grant):
            monkeypatch.setattr(module, "clock", lambda: now[0])
        grant = Lock(job, "one", lease=30, renew=False).acquire()
        now[0] = 1029.99
        assert not grant.lost
        now[0] = 1030.00001
        with Lock(job, "one", lease=30, renew=False).acquire(timeout=0):
            assert grant.lost


def test_late_answer_finds_it_lost(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A renewal that comes after the lease is over is no renewal, though nobody has looked in between."""
    runner, real = Held(job), lock_grant.clock
    runner.holds = False
    grant = Lock(runner, "one", lease=LONG, renew=False).acquire()
    runner.holds = True
    renewed = grant.renew()
    monkeypatch.setattr(lock_rows, "clock", lambda: real() + 10)  # it is done in time
    monkeypatch.setattr(lock_grant, "clock", lambda: real() + LONG + 1)  # and told too late
    runner.make()
    assert not renewed.result(WAIT)
    monkeypatch.undo()
    assert grant.lost
    runner.holds = False
    assert not grant.release().result()


def test_transaction_of_another_job_is_refused(tmp_path: Path) -> None:
    """A grant guards nothing elsewhere: another job is `Misuse`, one of the same id in another root never passes."""
    with Persistency(tmp_path / "one") as store, Persistency(tmp_path / "two") as others:
        job, foreign, namesake = store.open_job("a"), store.open_job("b"), others.open_job("a")
        told: list[Grant] = []
        grant = Lock(job, "one", on_lost=told.append).acquire()
        there = [Lock(other, "one").acquire() for other in (foreign, namesake)]
        assert {one.token for one in there} == {grant.token}
        with pytest.raises(Misuse, match="'b'"):
            foreign.run(grant.check_in).result()
        there[0].release().result()
        with pytest.raises(Misuse, match="'b'"):
            foreign.run(grant.check_in).result()
        job.run(grant.check_in).result()
        assert grant.held
        with pytest.raises(LockLost):
            namesake.run(grant.check_in).result()
        assert there[1].release().result()
        grant.release().result()


def test_what_is_guarded_is_fenced(job: Job, clock: ManualClock) -> None:
    """The transaction of who has lost the lock writes nothing, though nobody had told him."""

    def write(tx: Transaction, grant: Grant, text: bytes) -> None:
        tx.put("guarded", (), text)
        grant.check_in(tx)

    late = Lock(job, "one", lease=30, renew=False).acquire()
    job.run(write, late, b"first").result()
    clock.advance(30)
    with Lock(job, "one").acquire() as grant:
        job.run(write, grant, b"second").result()
        assert not late.lost
        with pytest.raises(LockLost):
            job.run(write, late, b"third").result()
        assert late.lost
        assert job.get("guarded", ()).result() == b"second"


def test_block_says_that_the_lock_was_lost(job: Job, clock: ManualClock) -> None:
    """Leaving the block raises `LockLost`; but what was raised inside is what comes out."""
    lock = Lock(job, "one", lease=30, renew=False)
    with pytest.raises(LockLost), lock:
        clock.advance(30)
    with pytest.raises(ZeroDivisionError), lock:
        clock.advance(1 / 0 if lock.try_acquire().result() is None else 30)
    with lock as grant:
        assert grant.release().result()  # once is enough


def test_on_lost_is_told_once(job: Job, clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    """The callback gets the grant; the log has it, and what the callback raises."""
    told: queue.SimpleQueue[Grant] = queue.SimpleQueue()
    lock = Lock(job, "one", lease=30, on_lost=lambda grant: (told.put(grant), 1 / 0))
    kept = lock.acquire()
    assert kept.release().result()
    grant = lock.acquire()
    clock.advance(30)
    assert not grant.renew().result()
    assert not grant.release().result()
    assert told.get(timeout=WAIT) is grant
    for thread in threading.enumerate():
        if thread.name == "persistency-lock-lost":
            thread.join(WAIT)
    assert told.empty()
    assert sorted(events(caplog)) == ["lock_lost", "on_lost_raised"]


# -- renewing ----------------------------------------------------------------------------------------------------------


def test_lease_is_renewed_in_the_background(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A third of the lease on it begins anew; an attempt that fails is told, and followed by another."""
    with Persistency(tmp_path) as store, store.open_job("locks") as job:
        runner = Held(job)
        runner.holds = False
        grant = Lock(runner, "one", lease=3).acquire()
        before = job.entry("locks", ("one",)).result()
        runner.holds = True
        runner.fail(StorageError("not now"))
        runner.make()
        runner.holds = False
        after = job.entry("locks", ("one",)).result()
        assert before is not None
        assert after is not None
        assert after.version == before.version == grant.token
        assert (after.expires_ms or 0) - (before.expires_ms or 0) >= 1000
        assert grant.release().result()
    assert events(caplog) == ["lock_not_renewed"]


def test_renewal_that_comes_too_late_changes_nothing(job: Job) -> None:
    """It is lost when the lease is over by the holder's clock, though a renewal that was asked for before goes well."""
    runner, lost = Held(job), threading.Event()
    runner.holds = False
    grant = Lock(runner, "one", lease=0.3, on_lost=lambda _grant: lost.set()).acquire()
    runner.holds = True
    assert lost.wait(WAIT)
    runner.make()  # by the job's clock, which stands still, it is in time
    assert grant.lost
    runner.holds = False
    assert not grant.release().result()
    assert job.get("locks", ("one",)).result() is None


def test_one_thread_renews_all_and_ends_with_them(job: Job) -> None:
    """However many grants there are there is one keeper, and none when there are no grants."""
    grants = [Lock(job, f"lock {number}").acquire() for number in range(20)]
    keepers = [thread for thread in threading.enumerate() if thread.name == "persistency-locks"]
    assert len(keepers) == 1
    for grant in grants:
        assert grant.release().result()
    keepers[0].join(WAIT)
    assert not keepers[0].is_alive()
    with Lock(job, "another").acquire():
        assert [thread for thread in threading.enumerate() if thread.name == "persistency-locks"]


def test_thread_that_could_not_be_started_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and the next grant starts one, which looks after the first as well."""
    monkeypatch.setattr(lock_keeper, "_keeper", lock_keeper.Keeper())
    start = threading.Thread.start

    def fail(thread: threading.Thread) -> None:
        if thread.name == "persistency-locks":
            raise RuntimeError("can't start new thread")
        start(thread)

    with Persistency(tmp_path) as store, store.open_job("locks") as job:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", fail)
            first = Lock(job, "one", lease=3).acquire()
            assert not lock_keeper.the_keeper().runs
        assert events(caplog) == ["lock_not_renewed"]
        runner = Held(job)
        runner.holds = False
        second = Lock(runner, "two", lease=3).acquire()
        runner.holds = True
        runner.make()  # it is renewed
        runner.holds = False
        assert lock_keeper.the_keeper().runs
        for grant in (first, second):
            assert grant.release().result()


def test_keeper_looks_at_those_that_are_due(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """With many grants one that is renewed often doesn't have all others looked at; nor do the released ones stay."""
    looked: Counter[str] = Counter()
    attend = Grant._attend
    monkeypatch.setattr(Grant, "_attend", lambda grant: (looked.update([grant.name]), attend(grant))[1])
    grants = [Lock(job, f"lock {number}", lease=LONG).acquire() for number in range(50)]
    for _ in range(300):
        Lock(job, "short", lease=LONG).acquire().release().result()
    runner = Held(job)
    runner.holds = False
    often = Lock(runner, "often", lease=1.5).acquire()
    runner.holds = True
    for _ in range(3):
        runner.make()
    runner.holds = False
    assert often.release().result()
    assert looked["often"] >= 3
    assert looked["lock 7"] == 0
    keeper = lock_keeper.the_keeper()
    keeper.stir(grants[0], 0.0)
    while not looked["lock 0"] or len(keeper._due) > 2 * len(grants) + 100:
        time.sleep(0)
    for grant in grants:
        assert grant.release().result()


def test_full_mailbox_holds_nobody_else_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The keeper doesn't wait for room in one job's mailbox while another job's lock has to be renewed."""
    inside, go_on, renewed = threading.Event(), threading.Event(), threading.Event()
    prolong = lock_grant.prolong

    def noted(tx: Transaction, row: Any, token: int) -> float | None:
        until = prolong(tx, row, token)
        if row.name == "free":
            renewed.set()
        return until

    def block(_tx: Transaction) -> None:
        inside.set()
        go_on.wait(WAIT)

    monkeypatch.setattr(lock_grant, "prolong", noted)
    with Persistency(tmp_path) as store:
        full, free = store.open_job("full", mailbox_ops_max=4, full_timeout=None), store.open_job("free")
        grants = [Lock(full, "full", lease=1).acquire(), Lock(free, "free", lease=1.5).acquire()]
        blocked = in_thread(lambda: full.run(block))
        assert inside.wait(WAIT)
        for number in range(4):
            full.put("other", (number,), b"")
        assert renewed.wait(WAIT)
        go_on.set()
        blocked.result(WAIT).result(WAIT)
        for grant in grants:
            grant.release().result(WAIT)


def test_dropped_grant_is_no_longer_renewed(job: Job) -> None:
    """Who drops a grant is warned, and it isn't kept alive by who renews it."""
    lock = Lock(job, "one")
    with pytest.warns(ResourceWarning, match="unreleased <Grant"):
        lock.acquire()
    gc.collect()
    assert "one" not in {kept.name for kept in lock_keeper.the_keeper()._kept}  # type: ignore[attr-defined]  # grants


# -- as blocks, in threads and loops -----------------------------------------------------------------------------------


def test_it_is_not_reentrant(job: Job) -> None:
    """Who is inside and asks for the same lock would wait for himself: `Misuse`. Others wait for it."""
    lock, same = Lock(job, "one", lease=LONG), Lock(job, "one", lease=LONG)
    with lock:
        with pytest.raises(Misuse, match="re-entrant"):
            lock.acquire()
        with pytest.raises(Misuse, match="re-entrant"), same:
            pass
        with Lock(job, "two"):
            assert lock.try_acquire().result() is None
        with pytest.raises(TimeoutError):
            in_thread(lambda: same.acquire(timeout=0.01)).result(WAIT)
    with lock:
        pass


def test_block_may_end_in_another_thread(job: Job) -> None:
    """As generators do that a framework drives: the grant that was entered with is the one that is released."""
    lock = Lock(job, "one", lease=LONG)
    in_thread(lock.__enter__).result(WAIT)
    in_thread(lambda: lock.__exit__(None, None, None)).result(WAIT)
    assert job.count("locks").result() == 0


def test_thread_of_a_pool_is_not_taken_for_whom_it_worked_before(job: Job) -> None:
    """As frameworks do it: a block is entered in a pool's thread, in a context of its own, which then works for others.

    They wait for the lock. What comes in the context of the block itself would wait for itself.
    """
    lock, came = Lock(job, "one", lease=LONG), contextvars.copy_context()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(came.run, lock.__enter__).result(WAIT)
        other = pool.submit(contextvars.copy_context().run, lock.acquire, WAIT)
        while not (other.done() or lock._terms.line._turns):
            time.sleep(0)
        lock.__exit__(None, None, None)
        assert other.result(WAIT).release().result()
        pool.submit(came.run, lock.__enter__).result(WAIT)
        with pytest.raises(Misuse, match="re-entrant"):
            pool.submit(came.run, lock.acquire, WAIT).result(WAIT)
        lock.__exit__(None, None, None)


def test_loop_that_is_run_inside_of_a_block_would_wait_for_itself(job: Job, in_loop: InLoop) -> None:
    """The block can't end before the loop does: `Misuse`, too."""
    lock = Lock(job, "one", lease=LONG)
    with lock, pytest.raises(Misuse, match="re-entrant"):
        in_loop(bounded, lock.aacquire, timeout=WAIT)


def test_tasks_exclude_one_another(job: Job, in_loop: InLoop) -> None:
    """Under each event loop: one task inside at a time, and all of them come in."""
    lock, inside, rounds = Lock(job, "one", lease=LONG), [], []

    async def contend() -> None:
        for _ in range(5):
            async with lock as grant:
                inside.append(grant.token)
                await anyio.lowlevel.checkpoint()
                assert inside == [grant.token]
                inside.clear()
                rounds.append(grant.token)

    in_loop(bounded, together, *[contend] * 8)
    assert rounds == sorted(rounds)
    assert len(set(rounds)) == 40


def test_task_is_not_taken_for_another_one(job: Job, in_loop: InLoop) -> None:
    """A task that is inside gets `Misuse`, another one of the same thread waits; a timeout takes nothing."""
    lock = Lock(job, "one", lease=LONG)

    async def wait() -> None:
        with pytest.raises(TimeoutError):
            await lock.aacquire(timeout=0.01)

    async def main() -> None:
        async with lock:
            with pytest.raises(Misuse):
                await lock.aacquire()
            await together(wait)
        async with await lock.aacquire(timeout=WAIT) as grant:
            assert grant.held

    in_loop(bounded, main)


def test_cancelled_task_has_not_got_it(job: Job, in_loop: InLoop) -> None:
    """Cancelled while its attempt is on the way, a task leaves the lock free; and the line goes on without it."""
    runner = Held(job)
    lock = Lock(runner, "one", lease=LONG)

    async def main() -> None:
        async with anyio.create_task_group() as group:
            task = Task(group, lock.aacquire)
            while runner.calls.empty():
                await anyio.lowlevel.checkpoint()
            task.cancel()
        runner.make()  # taken
        runner.make()  # and given back
        runner.holds = False
        async with lock, anyio.create_task_group() as group:
            first, second = Task(group, lock.aacquire), Task(group, lock.aacquire)
            while len(lock._terms.line._turns) < 2:
                await anyio.lowlevel.checkpoint()
            first.cancel()
            second.cancel()
        async with lock as grant:
            assert grant.held

    in_loop(bounded, main)
    assert job.count("locks").result() == 0


# -- processes ---------------------------------------------------------------------------------------------------------

FORKING = """
import os, sys
from persistency import Forked, Persistency
from persistency.recipes import Lock

def refused(call):
    try:
        call()
    except Forked:
        return True
    return False

with Persistency(sys.argv[1]) as store, store.open_job("locks") as job:
    lock = Lock(job, "one")
    with lock as grant:
        pid = os.fork()
        if pid == 0:
            assert grant.lost and not grant.held
            calls = [grant.release, grant.renew, lock.try_acquire, lock.acquire, lambda: grant.check_in(None)]
            assert all(map(refused, calls))
            with Persistency(sys.argv[2]) as mine, mine.open_job("locks") as own, Lock(own, "one") as fresh:
                assert fresh.held
    if pid == 0:
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    assert grant._state == "released"
"""


def test_child_has_not_got_its_parents_lock(tmp_path: Path) -> None:
    """In a forked child every use of the parent's grant is `Forked`; it may leave the block, and have its own locks."""
    program = [sys.executable, "-W", "error", "-W", "ignore:This process:DeprecationWarning", "-c", FORKING]
    done = subprocess.run(
        [*program, str(tmp_path / "one"), str(tmp_path / "other")],
        cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def test_processes_that_are_killed_and_paused_exclude_one_another() -> None:
    """Over a `Baton`: no two inside at once, tokens grow, who has lost it knows, and what it guards is fenced."""
    judged = storm("processes", 100, seed=1, lease_ms=300, kills=20, count=3, seconds=40)
    assert judged.wrong == []
    assert judged.contended > 50
    assert judged.killed > 0


def test_threads_of_a_process_that_is_killed_exclude_one_another() -> None:
    """Over a `Job`: the same, in thousands of rounds."""
    judged = storm("threads", 1500, seed=2, lease_ms=200, kills=2, seconds=40)
    assert judged.wrong == []
    assert judged.contended > 1000
    assert judged.killed > 0


@pytest.mark.parametrize("plant", PLANTS)
def test_planted_defects_are_found(plant: str) -> None:
    """A lock that is spoilt in one way is reported by that harness, in the words for it."""
    for seed in range(8):
        judged = storm("threads", 150, seed, lease_ms=150, kills=8, overstays=50, plant=plant)
        if judged.wrong:
            break
    assert any(PLANTS[plant] in wrong for wrong in judged.wrong)


def test_judge_tells_an_overlap_from_a_lease_that_was_over() -> None:
    """Who comes in a millisecond before the lease of a dead holder is over is reported, and not who comes then."""
    dead = ["enter 5 100 600 90", "work 5 200 700 0"]
    assert judge([*dead, "enter 9 700 1200 150", "leave 9 700 1200 800"]).wrong == []
    assert judge([*dead, "enter 9 700 1200 150"]).died == 2
    for lines, word in (
        ([*dead, "enter 9 699 1199 150"], "while"),
        ([*dead, "enter 4 700 1200 150"], "token"),
        ([*dead, "enter 9 700 1200 150", "work 5 200 700 0"], "after"),
        ([*dead, "held 5 701.5", "enter 9 700 1200 150"], "believed"),
    ):
        (wrong,) = judge(lines).wrong
        assert word in wrong


def test_soak_that_has_shown_nothing_is_a_finding() -> None:
    """Too few contended rounds, or nobody killed: unless its time was over, which the table says."""
    assert enough(Judged(rounds=110, contended=100, left=90, killed=1), 10, ended_early=False) == []
    few = Judged(rounds=110, contended=99, left=90, killed=1)
    (told,) = enough(few, 10, ended_early=False)
    assert "99 rounds" in told
    assert enough(few, 10, ended_early=True) == []
    for alive in (Judged(rounds=110, contended=110, left=110, killed=1), Judged(rounds=110, contended=110, left=90)):
        (told,) = enough(alive, 10, ended_early=False)
        assert "nobody has died" in told


# -- arguments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given",
    [
        {"name": ""}, {"name": 5}, {"name": "x" * 1025}, {"name": "\ud800"}, {"lease": 0}, {"lease": -1},
        {"lease": "30"}, {"lease": True}, {"lease": 10**400},
        {"lease": timedelta(seconds=-1)}, {"lease": float("nan")}, {"lease": float("inf")}, {"lease": 0.001},
        {"renew": 1}, {"on_lost": "x"}, {"category": ""}, {"category": None}, {"runner": None}, {"runner": "locks"},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments_are_misuse(job: Job, given: dict[str, Any]) -> None:
    """At the call, and nothing was done."""
    with pytest.raises(Misuse):
        Lock(**{"runner": job, "name": "one", **given})


@pytest.mark.parametrize("timeout", [-1, "1", True, float("nan"), timedelta(seconds=-1)])
def test_wrong_timeouts_are_misuse(job: Job, timeout: Any) -> None:
    """At the call too."""
    with pytest.raises(Misuse, match="timeout"):
        Lock(job, "one").acquire(timeout)
    assert job.count("locks").result() == 0


def test_lease_may_be_a_timedelta(job: Job) -> None:
    """Wherever seconds are taken."""
    lock = Lock(job, "one", lease=timedelta(milliseconds=1500))
    assert lock.lease == 1.5
    with lock.acquire(timeout=timedelta(seconds=WAIT)), pytest.raises(TimeoutError):
        lock.acquire(timeout=timedelta(0))


def test_row_says_whose_it_is(job: Job) -> None:
    """Whoever looks into the file finds the process; a lock that is free has no row."""
    with Lock(job, "one", category="mutexes"):
        payload = job.get("mutexes", ("one",)).result()
        assert payload is not None
        row = CBOR.decode(payload)
        assert row["pid"] == os.getpid()
        assert len(row["grant"]) == 8
    assert job.categories().result() == []
