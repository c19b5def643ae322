"""The life of jobs: leases, opening, resting and waking, temporary jobs, and what is swept away.

Statements `S1-*` and `C.i-*` are those of the reference behaviours. "At once" and "at most" are counted: a `Census`
counts the stores that are open, at every instant, and the threads that opened them.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Self

import anyio
import apsw
import pytest

from persistency import (
    Check,
    Closed,
    Corrupt,
    Delete,
    Job,
    JobLocked,
    KeyRange,
    Misuse,
    Persistency,
    Poisoned,
    Put,
    StorageError,
    StoredJob,
    Unavailable,
    WriteFailed,
    key,
)
from persistency.codec.keys import as_key
from persistency.shared import SharedStore
from persistency.slots import Slots
from persistency.storage.directory import DirectoryRoot
from persistency.storage.memory import MemoryStore
from persistency.storage.sqlite import SqliteStore
from tests import loops
from tests.conftest import Wall
from tests.crash.running import PROJECT
from tests.loops import LOOPS, InLoop, Task, bounded, turns
from tests.soak import lives
from tests.soak.lives import Census, Quiet, workers
from tests.storage.conftest import run_child
from tests.test_engine import WAIT, Gate, in_thread, openings, together

LIMITS: list[dict[str, Any]] = [{}, {"max_live_jobs": 2}]
NEVER = Check("c", ("never",), 10**6)  # a check that fails


@pytest.fixture
def root(place: Path) -> Path:
    """Name a root that doesn't exist yet."""
    return place / "root"


@pytest.fixture
def census(monkeypatch: pytest.MonkeyPatch) -> Census:
    """Count the stores that are open."""
    return Census(monkeypatch)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Quiet:
    """Tell when a worker sleeps."""
    return Quiet(monkeypatch)


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Give a gate that is open at the end, whatever happened."""
    gate = Gate()
    yield gate
    gate.may_go.set()


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """No test leaves a worker, or the thread that wakes them, behind."""
    before = set(threading.enumerate())
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("persistency:") and thread not in before:
            thread.join(WAIT)
            assert not thread.is_alive(), thread.name


class Busy:
    """A job that is kept in the middle of its work, so that it can't rest, until it is let go."""

    def __init__(self, job: Job) -> None:
        self._entered, self._may_go = threading.Event(), threading.Event()

        def work(_tx: Any) -> None:
            self._entered.set()
            assert self._may_go.wait(WAIT)

        self.reply = in_thread(lambda: job.run(work).result(WAIT))
        assert self._entered.wait(WAIT)

    def let_go(self) -> None:
        """Let the work end."""
        self._may_go.set()
        self.reply.result(WAIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.let_go()


def hurry(persistency: Persistency, seconds: float) -> None:
    """From now on wait no longer for a slot, or for a job to open."""
    persistency._open_timeout = seconds
    slots = persistency._opener.slots
    assert slots is not None
    slots._open_timeout = seconds


class Line:
    """Tells when somebody has come to wait for a slot."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._came = threading.Semaphore(0)
        really = Slots.wake

        def wake(slots: Slots, place: Any) -> None:
            really(slots, place)
            self._came.release()

        patch.setattr(Slots, "wake", wake)

    def wait(self) -> None:
        """Wait for one more."""
        assert self._came.acquire(timeout=WAIT)

    def is_longer(self) -> bool:
        """Say whether there was one more."""
        return self._came.acquire(blocking=False)


def adds_up(job: Job) -> bool:
    """Say whether what was accepted is accounted for."""
    numbers = job.statistics()
    return numbers.accepted == numbers.committed + numbers.failed + numbers.pending


def errors_of(count: int, attempt: Callable[[], Any]) -> list[BaseException]:
    """Try something in many threads at once; return what each of them was told."""

    def trying(_number: int) -> BaseException:
        try:
            attempt()
        except BaseException as error:
            return error
        return AssertionError("it went well")

    return together(count, trying)


# -- leases ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", LIMITS, ids=str)
@pytest.mark.parametrize("way", ["handle", "by id", "all", "dropped"])
def test_one_object_letting_go_never_stops_the_job_of_another(
    root: Path, census: Census, options: dict[str, Any], way: str
) -> None:
    """C.i-1, S1-1, S1-44: two objects on one root share a worker; it lives until the last lease is given back."""
    one, two = Persistency(root, **options), Persistency(root, **options)
    first, second = one.open_job("a"), two.open_job("a")
    assert first is not second
    assert census.opened == ["a"]
    first.put("c", ("k",), b"1")
    if way == "dropped":
        with pytest.raises(JobLocked):
            one.drop_job("a")
    else:
        {"handle": first.close, "by id": lambda: one.close_job("a"), "all": one.close}[way]()
    assert first.closed
    assert not second.closed
    assert census.live == ["a"]
    assert second.get("c", ("k",)).result(WAIT) == b"1"
    second.commit([Put("c", ("l",), b"2")]).result(WAIT)
    two.close()
    one.close()
    assert census.closed == ["a"]
    assert census.opened == ["a"]


@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_a_handle_gives_its_lease_back_once(root: Path, census: Census, options: dict[str, Any]) -> None:
    """C.i-1, S1-35, S1-42, S1-43: closing a handle again, from many threads, never takes the lease of another one."""
    with Persistency(root, **options) as one, Persistency(root, **options) as two:
        first, second = one.open_job("a"), two.open_job("a")
        together(8, lambda _number: first.close())
        first.close()
        one.close_job("a")
        assert (first.closed, second.closed, census.closed) == (True, False, [])
        with pytest.raises(Closed):
            first.put("c", ("k",), b"")
        again = one.open_job("a")
        first.close()
        assert not again.closed
        again.put("c", ("k",), b"1")
        assert second.get("c", ("k",)).result(WAIT) == b"1"
    assert census.closed == ["a"]


@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_a_reader_that_waits_is_told_when_its_own_handle_is_closed(root: Path, options: dict[str, Any]) -> None:
    """C.i-1, S1-44: who waits for changes through a handle that is closed is told; who waits through another isn't."""
    with Persistency(root, **options) as one, Persistency(root, **options) as two:
        first, second = one.open_job("a", feed_changes_max=10), two.open_job("a", feed_changes_max=10)
        mine, others = first.changes(0, 5, wait=True), second.changes(0, 5, wait=True)
        first.close()
        assert isinstance(mine.exception(WAIT), Closed)
        assert not others.done()
        second.put("c", ("k",), b"")
        assert [change.version for change in others.result(WAIT)] == [1]


@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_options_that_differ_are_refused_and_harm_nobody(root: Path, census: Census, options: dict[str, Any]) -> None:
    """C.i-1: another object that wants the open job with other options gets `Misuse`, names them, and has no lease."""
    with Persistency(root, **options) as one, Persistency(root, **options) as two:
        job = one.open_job("a", sync_interval=2.0, durability="power")
        with pytest.raises(Misuse, match="durability, sync_interval"):
            two.open_job("a", sync_interval=3.0, durability="process")
        with pytest.raises(Misuse, match=r"another ttl\b"):
            two.open_job("a", ttl=60)
        assert "a" not in two
        assert two.open_job("a", sync_interval=2.0).version().result(WAIT) == 0
        two.close_job("a")
        job.close()
        assert census.closed == ["a"]
        two.open_job("a", sync_interval=3.0).close()


@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_opening_is_single_flight_for_threads_and_tasks(
    root: Path,
    census: Census,
    monkeypatch: pytest.MonkeyPatch,
    gate: Gate,
    options: dict[str, Any],
    in_loop: InLoop,
) -> None:
    """C.i-2, S1-2 (BEAT: built once), S1-28: 16 threads and 16 tasks open a job at once; one store is opened."""
    openings(monkeypatch, lambda _job_id: gate())
    with Persistency(root, **options) as persistency, Persistency(root, **options) as other:
        threads = in_thread(lambda: together(16, lambda number: (persistency, other)[number % 2].open_job("a")))

        async def main() -> list[Job]:
            async with anyio.create_task_group() as group:
                tasks = [Task(group, persistency.aopen_job("a")) for _ in range(16)]
                await turns()  # nobody can have opened it, and the loop goes on
                assert all(task.begun and not task.done for task in tasks)
                gate.may_go.set()
                return [await task for task in tasks]

        jobs = in_loop(main) + threads.result(WAIT)
        assert len({id(job) for job in jobs}) == 2  # one handle for each object
        assert census.opened == ["a"]
        jobs[0].put("c", ("k",), b"1")
        assert jobs[-1].get("c", ("k",)).result(WAIT) == b"1"


def test_two_ids_are_two_jobs(root: Path, census: Census) -> None:
    """S1-10 T: ids that look alike are independent; closing or dropping one is nothing to the other."""
    with Persistency(root, max_live_jobs=2) as persistency:
        one, two = persistency.open_job("same"), persistency.open_job("Same")
        one.put("c", ("k",), b"1")
        assert two.get("c", ("k",)).result(WAIT) is None
        persistency.drop_job("same")
        assert not two.closed
        assert two.count("c").result(WAIT) == 0
        assert sorted(census.opened) == ["Same", "same"]


def test_a_closed_root_forgets_its_workers(root: Path, census: Census) -> None:
    """S1-11 BEAT, S1-40, S1-45, S1-52: `close` refuses openings and closes every job; nothing stale survives it."""
    persistency = Persistency(root, max_live_jobs=2)
    for number in range(5):
        persistency.open_job(f"job{number}").put("c", ("k",), b"%d" % number)
    persistency.close()
    persistency.close()
    assert census.live == []
    with pytest.raises(Closed):
        persistency.open_job("job0")
    with Persistency(root, max_live_jobs=2) as again:
        values = [again.open_job(f"job{number}").get("c", ("k",)).result(WAIT) for number in range(5)]
    assert values == [b"%d" % number for number in range(5)]


# -- opening -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_a_late_opening_is_closed_again(
    root: Path,
    census: Census,
    monkeypatch: pytest.MonkeyPatch,
    gate: Gate,
    options: dict[str, Any],
    in_loop: InLoop,
) -> None:
    """C.i-3, S1-20, S1-24: who waits longer than `open_timeout` gets `TimeoutError`; what opens late is closed."""
    with Persistency(root, open_timeout=0.1, **options) as persistency:
        with monkeypatch.context() as patch:
            openings(patch, lambda _job_id: gate())
            assert {type(error) for error in errors_of(4, lambda: persistency.open_job("a"))} == {TimeoutError}
            with pytest.raises(TimeoutError):
                in_loop(persistency.aopen_job, "a")
            assert "a" not in persistency
            gate.may_go.set()
            census.wait(lambda: census.opened.count("a") == census.closed.count("a") >= 1)
        # Retrying is not bounded by what was late: the file and the slot are free.
        with Persistency(root, **options) as patient:
            patient.open_job("a").put("c", ("k",), b"1")
        assert persistency._site._entries == {}
    assert census.live == []


@pytest.mark.parametrize("options", LIMITS, ids=str)
@pytest.mark.parametrize(
    "cause", [Corrupt("bad file"), Unavailable("no such place"), OSError(5, "fire"), SystemExit(3)]
)
def test_every_waiter_gets_the_real_cause_and_can_try_again(
    root: Path,
    census: Census,
    monkeypatch: pytest.MonkeyPatch,
    gate: Gate,
    options: dict[str, Any],
    cause: BaseException,
    in_loop: InLoop,
) -> None:
    """C.i-2, C.i-3, S1-4 (BEAT), S1-23, S1-25 (BEAT), S1-26, S1-53: a failed opening is told to all, and over."""

    def fail(_job_id: str) -> None:
        gate()
        raise cause

    with Persistency(root, **options) as persistency:
        with monkeypatch.context() as patch:
            openings(patch, fail)
            told = in_thread(lambda: errors_of(16, lambda: persistency.open_job("a")))
            gate.wait()
            waiting = in_thread(lambda: errors_of(1, lambda: in_loop(persistency.aopen_job, "a")))
            gate.may_go.set()
            assert {error is cause for error in told.result(WAIT) + waiting.result(WAIT)} == {True}
        assert "a" not in persistency
        assert persistency._site._entries == {}
        persistency.open_job("a").put("c", ("k",), b"1")
        assert persistency["a"].get("c", ("k",)).result(WAIT) == b"1"
    assert census.live == []


def test_a_failed_opening_returns_its_slot(root: Path, census: Census, monkeypatch: pytest.MonkeyPatch) -> None:
    """S1-41 T: openings that fail, one after the other and side by side, use no slot up."""

    def fail(job_id: str) -> None:
        if job_id.startswith("bad"):
            raise Unavailable("no")

    openings(monkeypatch, fail)
    with Persistency(root, max_live_jobs=1) as persistency:
        for number in range(5):
            with pytest.raises(Unavailable):
                persistency.open_job(f"bad{number}")
        errors_of(8, lambda: persistency.open_job("bad"))
        assert persistency.open_job("good").version().result(WAIT) == 0
        assert census.most == 1


def test_a_thread_that_can_not_be_started_is_tried_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S1-4 BEAT: where the system has no thread to give, opening says so, or times out; later it works."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("persistency:"):
            raise RuntimeError("can't start new thread")
        start(thread)

    with Persistency(root, max_live_jobs=1, open_timeout=0.1) as persistency:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            with pytest.raises((RuntimeError, TimeoutError)):
                persistency.open_job("a")
        persistency._open_timeout = WAIT
        persistency.open_job("a").put("c", ("k",), b"1")
        assert persistency["a"].get("c", ("k",)).result(WAIT) == b"1"


def test_sequential_and_concurrent_uses_of_one_job(root: Path, census: Census) -> None:
    """S1-32 N, S1-36 T, S1-46, S1-47 T: five uses one after the other, then eight at once, of one opening."""
    with Persistency(root, max_live_jobs=1) as persistency, persistency.open_job("a") as job:
        for number in range(5):
            assert job.increment("c", ("n",)).result(WAIT) == number + 1
        found = together(8, lambda _number: persistency.open_job("a").increment("c", ("n",)).result(WAIT))
        assert sorted(found) == list(range(6, 14))
        assert census.opened == ["a"]


# -- how many are live -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", lives.PLANTS)
def test_the_harnesses_see_planted_defects(place: Path, name: str) -> None:
    """Each spoilt engine is reported by `address` or `roam`, so that their silence says something."""
    assert lives.planted(name, place, 4711)


@pytest.mark.parametrize("seed", range(3))
def test_the_one_unused_the_longest_rests(place: Path, seed: int) -> None:
    """C.i-4, C.i-5, S1-29, S1-33: in exact order of last use, one for one, and not before the limit is reached."""
    assert lives.address(place, seed, steps=120, jobs=9, live_max=4) == []


@pytest.mark.parametrize(("jobs", "live_max", "steps"), [(200, 8, 1_000), (12, 1, 300)])
def test_many_jobs_through_few_slots(place: Path, jobs: int, live_max: int, steps: int) -> None:
    """C.i-4, S1-31, S1-36 T: threads use jobs at random; no more stores are open than may be, every value is right."""
    walk = lives.roam(place, 20_26, jobs=jobs, live_max=live_max, steps=steps)
    assert walk.wrong == []
    assert walk.most == live_max
    assert walk.openings > jobs  # they did go to rest, and come back


def test_a_look_at_the_wrong_moment_sends_nobody_else_to_rest(
    root: Path, census: Census, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C.i-4: a worker that wakes up just while somebody waits doesn't rest in the place of one unused for longer."""
    with Persistency(root, max_live_jobs=3) as persistency:
        for name in ("a", "b", "c"):
            persistency.open_job(name, sync_interval=None).flush().result(WAIT)
            quiet.wait(persistency[name])
        really = Slots._ask

        def late(slots: Slots, *args: Any) -> Any:
            if threading.current_thread().name != "persistency:opener":
                return really(slots, *args)
            # Somebody waits, nobody was asked yet: all three look, the one used last before the others.
            for name in ("c", "b", "a"):
                mailbox = persistency[name]._mailbox
                if census.live == ["a", "b", "c"]:
                    mailbox.ring()
                    quiet.wait_or(persistency[name], lambda: census.closed != [])
            return really(slots, *args)

        monkeypatch.setattr(Slots, "_ask", late)
        persistency.open_job("d")
        monkeypatch.setattr(Slots, "_ask", really)
        for name in ("b", "c", "d"):
            quiet.wait(persistency[name])
        assert census.closed == ["a"]
        assert census.live == ["b", "c", "d"]


def test_a_ring_that_comes_while_a_job_goes_to_rest_wakes_nobody(
    root: Path, census: Census, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C.i-5: a job at rest is woken by posts and by closing it; nobody else has to rest for a wake-up for nothing."""
    line = Line(monkeypatch)
    with Persistency(root, max_live_jobs=1) as persistency:
        first = persistency.open_job("a", sync_interval=None)
        line.wait()
        really = SqliteStore.close

        def close(store: SqliteStore, **how: Any) -> None:
            first._mailbox.ring()  # as one may who asks it to rest a second time
            really(store, **how)

        with monkeypatch.context() as patch:
            patch.setattr(SqliteStore, "close", close)
            second = persistency.open_job("b", sync_interval=None)
            line.wait()
        quiet.wait(second)
        persistency.open_job("c").flush().result(WAIT)  # whoever was woken before has had his turn
        assert census.opened == ["a", "b", "c"]
        assert census.closed == ["a", "b"]
        line.wait()
        assert not line.is_longer()


def test_jobs_in_memory_never_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """C.i-5: what is kept in memory only would be gone after a rest."""
    closed = []
    really = MemoryStore.close
    monkeypatch.setattr(MemoryStore, "close", lambda store, **how: (closed.append(store), really(store, **how)))
    with Persistency(":memory:", max_live_jobs=1, idle_ttl=0.001) as persistency:
        jobs = [persistency.open_job(f"job{number}") for number in range(4)]
        for number, job in enumerate(jobs):
            job.put("c", ("k",), b"%d" % number)
        for number, job in enumerate(jobs):
            assert job.get("c", ("k",)).result(WAIT) == b"%d" % number
            assert job.statistics().state == "live"
        assert closed == []


def test_a_job_with_a_waiting_reader_never_rests(root: Path, census: Census) -> None:
    """C.i-5: who waits for changes keeps the job live; it may rest once he is answered, or has given up."""
    with Persistency(root, max_live_jobs=2) as persistency:
        waited_for = persistency.open_job("a", feed_changes_max=10)
        for answer in ("answered", "cancelled"):
            waiting = waited_for.changes(waited_for.version().result(WAIT), 5, wait=True)
            for name in ("b", "c", "d"):
                persistency.open_job(name).put("c", ("k",), b"")
                persistency[name].flush().result(WAIT)
            assert waited_for.statistics().state == "live"
            assert "a" not in census.closed
            assert not waiting.done()
            if answer == "answered":
                waited_for.put("c", ("k",), b"1")
                assert [change.payload for change in waiting.result(WAIT)] == [b"1"]
            else:
                assert waiting.cancel()
        for name in ("b", "c", "d"):
            persistency[name].flush().result(WAIT)
        assert waited_for.statistics().state == "idle"


def test_a_job_with_unfinished_work_never_rests(root: Path, census: Census) -> None:
    """C.i-5: neither one in the middle of a function, nor one that stalls, nor one that somebody is asking."""
    with Persistency(root, max_live_jobs=2) as persistency:
        busy = persistency.open_job("a")
        with Busy(busy):
            busy.put("c", ("k",), b"1")  # and something waits
            for number in range(4):
                persistency.open_job(f"job{number}").flush().result(WAIT)
            assert "a" not in census.closed
            assert busy.statistics().state == "live"
        busy.flush().result(WAIT)
        assert busy.get("c", ("k",)).result(WAIT) == b"1"


def test_a_job_that_its_caller_runs_is_not_idle(root: Path, census: Census, quiet: Quiet) -> None:
    """C.i-4: a function that runs in its caller's thread keeps its job live; the idle one rests, though used later."""
    with Persistency(root, max_live_jobs=2) as persistency:
        busy, idle = persistency.open_job("a", sync_interval=None), persistency.open_job("b", sync_interval=None)
        with Busy(busy):
            idle.flush().result(WAIT)
            quiet.wait(idle)
            assert in_thread(lambda: persistency.open_job("c")).result(WAIT).version().result(WAIT) == 0
            assert census.closed == ["b"]
        assert busy.version().result(WAIT) == 0
        assert census.closed == ["b"]


def test_a_stalled_job_never_rests(root: Path, census: Census, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 3: what waits for a full disk to have room again is unfinished work."""
    with Persistency(root, max_live_jobs=2) as persistency:
        job = persistency.open_job("a")
        job.run(lambda tx: tx.put("c", ("k",), b"1")).result(WAIT)
        store = persistency._site._entries["a"].worker.store  # type: ignore[union-attr]
        really, tried = store.apply, threading.Event()

        def full(group: Any, now_ms: int) -> Any:
            tried.set()
            raise StorageError("no room")

        store.apply = full
        job.put("c", ("l",), b"2")
        assert tried.wait(WAIT)
        for number in range(4):
            persistency.open_job(f"job{number}").flush().result(WAIT)
        assert "a" not in census.closed
        assert job.statistics().state == "stalled"
        store.apply = really
        job.flush().result(WAIT)
        assert job.get("c", ("l",)).result(WAIT) == b"2"


def test_a_poisoned_job_keeps_nobody_from_opening(root: Path, census: Census) -> None:
    """Promise 3: what has gone wrong in one job harms no other one: it needs no slot any more."""
    with contextlib.suppress(WriteFailed), Persistency(root, max_live_jobs=1, open_timeout=5.0) as persistency:
        bad = persistency.open_job("bad")
        bad.path.unlink()
        bad.put("c", ("k",), b"")
        with pytest.raises(Exception, match="removed, renamed or replaced"):
            bad.flush().result(WAIT)
        assert bad.statistics().state == "poisoned"
        persistency.open_job("good").put("c", ("k",), b"1")
        assert persistency["good"].get("c", ("k",)).result(WAIT) == b"1"
        assert census.most == 1


# -- the handle of a resting job ---------------------------------------------------------------------------------------

DAY_MS = 86_400_000


def exported(job: Job) -> bytes:
    """Return an export of a job."""
    file = io.BytesIO()
    job.export(file).result(WAIT)
    return file.getvalue()


def imported(job: Job) -> int:
    """Take an export of the job in again; it becomes newer by it."""
    return job.import_(io.BytesIO(exported(job))).result(WAIT)


def waited(job: Job) -> Any:
    """Wait for a change, which then comes."""
    reply = job.changes(job.version().result(WAIT), 3, wait=True)
    job.put("a", ("new",), b"change")
    return reply.result(WAIT)


def told(ask: Callable[[Job], None]) -> Callable[[Job], Any]:
    """Post an event, and ask what has become of it."""

    def posted(job: Job) -> Any:
        ask(job)
        return job.flush()

    return posted


# Each as a function that asks; it gives a Reply, or what there is to be seen.
VERBS: dict[str, Callable[[Job], Any]] = {
    "put": told(lambda job: job.put("a", ("new",), b"x", ttl=60)),
    "delete": told(lambda job: job.delete("a", (1,))),
    "delete_prefix": told(lambda job: job.delete_prefix("a", ("t",))),
    "delete_range": told(lambda job: job.delete_range("a", KeyRange(key(1), key(3)))),
    "persist": told(lambda job: job.persist([Put("a", ("x",), b""), Delete("a", (2,)), Check("a", (9,), None)])),
    "get": lambda job: job.get("a", (3,)),
    "entry": lambda job: job.entry("a", (3,)),
    "get_many": lambda job: job.get_many("a", [(3,), (4,), ("none",)]),
    "exists": lambda job: job.exists("a", (3,)),
    "count": lambda job: job.count("a"),
    "scan": lambda job: job.scan("a", reverse=True, limit=3),
    "keys": lambda job: job.keys("a", limit=3),
    "scan_prefix": lambda job: job.scan_prefix("a", ("t",)),
    "iterate": lambda job: list(job.iterate("a", page=2)),
    "snapshot": lambda job: job.snapshot("a"),
    "categories": lambda job: job.categories(),
    "version": lambda job: job.version(),
    "commit": lambda job: job.commit([Put("a", ("x",), b""), Delete("a", (2,))]),
    "delete_acked": lambda job: job.delete_acked("a", (1,)),
    "delete_prefix_acked": lambda job: job.delete_prefix_acked("a", ("t",)),
    "delete_range_acked": lambda job: job.delete_range_acked("a", KeyRange(key(1), key(3))),
    "compare_and_set": lambda job: job.compare_and_set("a", (1,), b"1", b"one"),
    "increment": lambda job: job.increment("a", ("n",), 5),
    "touch": lambda job: job.touch("a", (1,), 60),
    "run": lambda job: job.run(lambda tx, factor: tx.count("a") * factor, 2),
    "flush": lambda job: job.flush(sync=True),
    "drain": lambda job: job.drain(),
    "changes": lambda job: job.changes(2, 3),
    "changes(wait=True)": waited,
    "storage_used": lambda job: job.storage_used(),
    "backup": lambda job: job.backup(job.path.with_suffix(".copy")),  # type: ignore[union-attr]
    "check": lambda job: job.check(),
    "compact": lambda job: job.compact(),
    "export": exported,
    "import_": imported,
}
NO_VERBS = {"close", "aclose", "statistics", "id", "path", "closed", "now_ms"}  # of the handle itself
WAKES_NOBODY = {"drain"}  # nothing waits in a resting job


def fill(job: Job) -> Job:
    """Write the same rows into any job."""
    for number in range(8):
        job.put("a", (number,), b"%d" % number)
        job.put("a", ("t", number), b"t%d" % number)
    job.flush().result(WAIT)
    return job


def answered(outcome: Any) -> Any:
    """Return what was asked for."""
    return outcome.result(WAIT) if hasattr(outcome, "result") else outcome


@pytest.mark.parametrize("manner", ["thread", *LOOPS])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_wakes_a_resting_job(root: Path, place: Path, census: Census, verb: str, manner: str) -> None:
    """C.i-5, S1-29: a handle keeps working: each verb answers what it does in a job that never rests."""
    ask, wall = VERBS[verb], Wall()
    with Persistency(place / "plain", clock=wall) as plain:
        job = fill(plain.open_job("a", feed_changes_max=100))
        due, rows, numbers = answered(ask(job)), job.snapshot("a").result(WAIT), job.statistics()
    with Persistency(root, max_live_jobs=1, clock=wall) as persistency:
        job = fill(persistency.open_job("a", feed_changes_max=100))
        other = persistency.open_job("other")
        assert (job.statistics().state, job.closed, census.live) == ("idle", False, ["other"])
        assert list(persistency) == ["a", "other"]
        if manner != "thread":

            async def main() -> Any:
                outcome = await loops.in_thread(ask, job) if verb in BLOCKING else ask(job)
                return await outcome if hasattr(outcome, "result") else outcome

            found = LOOPS[manner](main)
        else:
            found = answered(ask(job))
        assert found == due
        assert (job.statistics().state == "idle") is (verb in WAKES_NOBODY)
        assert other.statistics().state == ("live" if verb in WAKES_NOBODY else "idle")
        assert job.snapshot("a").result(WAIT) == rows
        assert job.statistics().accepted == numbers.accepted
        assert adds_up(job)


BLOCKING = {"changes(wait=True)", "export", "import_", "iterate"}  # written here so that they wait for themselves


def test_no_verb_is_left_out() -> None:
    """The list above has all that a handle can do."""
    assert {name for name in dir(Job) if not name.startswith("_")} - NO_VERBS <= set(VERBS)


def test_looking_at_a_resting_job_wakes_nobody(root: Path, census: Census) -> None:
    """Its numbers, its state, its id and whether it is open are there without a store; what it counted stays."""
    with Persistency(root, max_live_jobs=1) as persistency:
        job = fill(persistency.open_job("a"))
        before = job.statistics()
        persistency.open_job("b")
        for _ in range(3):
            numbers = job.statistics()
            assert (numbers.state, numbers.accepted, numbers.committed) == ("idle", before.accepted, before.committed)
            assert (numbers.pending, numbers.wal_bytes, numbers.commits) == (0, 0, before.commits)
            assert (job.id, job.path, job.closed, job.drain().done()) == ("a", root / "a.db", False, True)
            assert "a" in persistency
            assert persistency["a"] is persistency.open_job("a") is job
            assert [stored.job_id for stored in persistency.stored_jobs()] == ["a", "b"]
        assert census.opened == ["a", "b"]
        assert not (root / "a.db-wal").exists()
        with Persistency(root) as other:  # the lock is given up too, for other processes
            assert other.open_job("a") is not job


def test_a_post_to_a_resting_job_is_taken_at_once(
    root: Path, census: Census, monkeypatch: pytest.MonkeyPatch, gate: Gate, in_loop: InLoop
) -> None:
    """`max_live_jobs`: a post returns while the job can't even be opened, and the poster's thread opens nothing."""
    with Persistency(root, max_live_jobs=1) as persistency:
        job = persistency.open_job("a")
        persistency.open_job("b")
        openings(monkeypatch, lambda job_id: gate() if job_id == "a" else None)
        for number in range(100):
            job.put("c", (number,), b"%d" % number)
        gate.wait()
        assert (job.statistics().state, job.statistics().pending) == ("idle", 100)

        async def main() -> list[bytes | None]:
            job.put("c", (100,), b"100")
            replies = [job.get("c", (number,)) for number in (0, 99, 100)]
            await turns()
            assert not any(reply.done() for reply in replies)
            gate.may_go.set()
            return [await reply for reply in replies]

        assert in_loop(main) == [b"0", b"99", b"100"]
        job.flush().result(WAIT)
        assert [row.key.parts[0] for row in job.scan("c").result(WAIT)] == list(range(101))
        assert threading.get_ident() not in census.threads
        assert gate.times == 1
        assert adds_up(job)


def test_a_read_in_place_that_comes_while_the_job_goes_to_rest_is_answered(
    root: Path, monkeypatch: pytest.MonkeyPatch, quiet: Quiet
) -> None:
    """A caller that was about to be served in place, when the job went to rest, is served by the one that wakes."""
    from persistency.actor.mailbox import Mailbox

    with Persistency(root, max_live_jobs=1) as persistency:
        job, other = fill(persistency.open_job("a")), persistency.open_job("b")
        really = Mailbox._in_place
        asks: list[tuple[Callable[[], Any], Any]] = [
            (lambda: job.count("a"), 16),
            (lambda: job.exists("a", (1,)), True),
            (lambda: job.version(), 16),
            (lambda: job.commit([Put("a", (1,), b"")]), 17),
            (lambda: job.flush(), None),
        ]
        for ask, due in asks:
            job.version().result(WAIT)  # it is live
            quiet.wait(job)

            def late(mailbox: Mailbox, *args: Any) -> Any:
                monkeypatch.setattr(Mailbox, "_in_place", really)
                other.flush().result(WAIT)  # meanwhile, as another thread may
                assert job.statistics().state == "idle"
                return really(mailbox, *args)

            monkeypatch.setattr(Mailbox, "_in_place", late)
            assert ask().result(WAIT) == due


LOCKER = """
import sys
from persistency import Persistency
with Persistency(sys.argv[1]) as persistency, persistency.open_job("a") as job:
    job.put("c", ("child",), b"x")
    job.flush().result(10)
    print("open", flush=True)
    sys.stdin.readline()
"""


def test_a_job_that_another_process_took_fails_its_posts_and_works_again_afterwards(root: Path) -> None:
    """`max_live_jobs`: `JobLocked` is reported like any failed write; once the other has let go the next post works."""
    told: list[Any] = []
    heard = threading.Semaphore(0)

    def on_error(job_id: str, failures: Any) -> None:
        told.extend(failures)
        heard.release()

    with Persistency(root, max_live_jobs=1) as persistency:
        job = persistency.open_job("a", on_error=on_error)
        job.put("c", ("before",), b"x")
        persistency.open_job("b")
        with subprocess.Popen(
            [sys.executable, "-c", LOCKER, str(root)],
            cwd=PROJECT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as child:
            assert child.stdin is not None
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            job.put("c", ("lost", 0), b"x")
            with pytest.raises(WriteFailed) as failed:
                job.flush().result(WAIT)
            job.persist([Put("c", ("lost", 1), b"x"), Put("c", ("lost", 2), b"x")])
            with pytest.raises(JobLocked) as locked:
                job.get("c", ("before",)).result(WAIT)
            assert locked.value.pid == child.pid
            with pytest.raises(JobLocked):
                job.commit([Put("c", ("lost", 3), b"x")]).result(WAIT)
            with pytest.raises(WriteFailed) as later:
                job.flush().result(WAIT)
            job.flush().result(WAIT)  # told once
            failures = [*failed.value.failures, *later.value.failures]
            assert [as_key(failure.op.key) for failure in failures] == [key("lost", number) for number in range(3)]
            assert {(type(failure.error), failure.outcome) for failure in failures} == {(JobLocked, "not applied")}
            while len(told) < 3:
                assert heard.acquire(timeout=WAIT)
            assert told == failures
            numbers = job.statistics()
            assert (numbers.state, numbers.accepted, numbers.committed, numbers.failed) == ("idle", 5, 1, 4)
            assert numbers.pending == 0
            child.stdin.close()
            assert child.wait(WAIT) == 0
        job.put("c", ("after",), b"x")
        job.flush().result(WAIT)
        assert [found.parts for found in job.keys("c").result(WAIT)] == [("after",), ("before",), ("child",)]
        assert adds_up(job)


@pytest.mark.parametrize("harm", ["garbage", "older copy"])
def test_a_job_whose_file_went_bad_while_it_rested_is_poisoned_by_a_write(root: Path, harm: str) -> None:
    """Promise 3: reads are told, and work again when it is mended; a write poisons: what follows it mustn't be kept."""
    with contextlib.suppress(WriteFailed), Persistency(root, max_live_jobs=1) as persistency:
        job, other = persistency.open_job("a"), persistency.open_job("b")
        shutil.copy(root / "a.db", root / "older")
        job.put("c", ("k",), b"1")
        job.flush().result(WAIT)
        other.flush().result(WAIT)
        assert job.statistics().state == "idle"
        os.rename(root / "a.db", root / "sound")
        if harm == "garbage":
            (root / "a.db").write_bytes(b"not a database " * 1_000)
        else:
            shutil.copy(root / "older", root / "a.db")
        with pytest.raises(Corrupt):
            job.get("c", ("k",)).result(WAIT)
        assert job.statistics().state == "idle"
        job.put("c", ("lost",), b"")
        with pytest.raises(Poisoned) as poisoned:
            job.flush().result(WAIT)
        assert isinstance(poisoned.value.__cause__, Corrupt)
        assert (job.statistics().failed, adds_up(job)) == (1, True)
        other.flush().result(WAIT)  # it has got the slot
        os.replace(root / "sound", root / "a.db")
        with pytest.raises(WriteFailed) as failed:
            job.close()
        assert [(failure.op.key, failure.outcome) for failure in failed.value.failures] == [
            (key("lost"), "not applied")
        ]
        again = persistency.open_job("a")
        assert again.scan("c").result(WAIT) == [(key("k"), b"1")]


def test_a_job_that_can_not_be_opened_again_stalls(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Promise 3: a fault of the environment skips no batch, at the opening after a rest neither."""
    stalls = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "stalls" in record.getMessage():
                stalls.set()

    listener = Listener()
    logging.getLogger("persistency").addHandler(listener)
    try:
        with Persistency(root, max_live_jobs=1) as persistency:
            job, other = persistency.open_job("a"), persistency.open_job("b")
            job.put("c", ("k",), b"1")
            job.flush().result(WAIT)
            other.flush().result(WAIT)
            os.rename(root / "a.db", root / "sound")
            (root / "a.db").mkdir()
            with pytest.raises(Unavailable):
                job.get("c", ("k",)).result(WAIT)
            job.put("c", ("first",), b"")
            assert stalls.wait(WAIT)
            job.put("c", ("second",), b"")
            assert job.statistics().state == "stalled"
            (root / "a.db").rmdir()
            os.replace(root / "sound", root / "a.db")
            job.flush().result(WAIT)
            assert [found.parts for found in job.keys("c").result(WAIT)] == [("first",), ("k",), ("second",)]
            assert (job.statistics().failed, adds_up(job)) == (0, True)
    finally:
        logging.getLogger("persistency").removeHandler(listener)


# -- all slots busy ----------------------------------------------------------------------------------------------------


def test_who_waits_for_a_slot_is_served_in_turn(root: Path, census: Census, monkeypatch: pytest.MonkeyPatch) -> None:
    """C.i-4 (BEAT: in order), S1-38: openings and posts to resting jobs wait in one line, first come first served."""
    line = Line(monkeypatch)
    with Persistency(root, max_live_jobs=1) as persistency:
        resting, busy = persistency.open_job("r"), persistency.open_job("a")
        line.wait()
        line.wait()
        openings: list[Any] = []
        with Busy(busy):
            for name in "edc":
                openings.append(in_thread(lambda name=name: persistency.open_job(name)))  # type: ignore[misc]
                line.wait()
            resting.put("c", ("k",), b"1")
            line.wait()
            openings.append(in_thread(lambda: persistency.open_job("b")))
            line.wait()
            assert census.opened == ["r", "a"]
        for opening in openings:
            opening.result(WAIT)
        assert census.opened == [*"ra", *"edc", "r", "b"]
        assert census.closed == census.opened[:-1]
        assert resting.get("c", ("k",)).result(WAIT) == b"1"
        assert census.most == 1


def test_a_slot_that_is_given_back_goes_to_one_who_waits(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S1-38: with three slots busy and two given back, two of three who wait are served; the third times out."""
    line = Line(monkeypatch)
    with Persistency(root, max_live_jobs=3, open_timeout=1.5) as persistency:
        jobs = [persistency.open_job(name) for name in "abc"]
        for _ in jobs:
            line.wait()
        work = [Busy(job) for job in jobs]
        openings = []
        for name in "def":
            openings.append(in_thread(lambda name=name: persistency.open_job(name).run(held).result(WAIT)))  # type: ignore[misc]
            line.wait()
        done = threading.Event()
        entered = threading.Semaphore(0)

        def held(_tx: Any) -> str:
            entered.release()
            assert done.wait(WAIT)
            return "served"

        for one in work[:2]:
            one.let_go()
            assert entered.acquire(timeout=WAIT)
        assert isinstance(openings[2].exception(WAIT), TimeoutError)
        done.set()
        assert [opening.result(WAIT) for opening in openings[:2]] == ["served", "served"]
        work[2].let_go()


@pytest.mark.parametrize(
    ("manner", "loop"), [("thread", ""), *((manner, loop) for manner in ("task", "cancelled task") for loop in LOOPS)]
)
def test_a_wait_for_a_slot_that_is_given_up_leaves_nothing(
    root: Path, census: Census, monkeypatch: pytest.MonkeyPatch, manner: str, loop: str
) -> None:
    """C.i-4, S1-37, S1-39: the `TimeoutError` says why; nothing was created, and nobody stands in line any more."""
    line = Line(monkeypatch)
    with Persistency(root, max_live_jobs=1) as persistency:
        busy = persistency.open_job("a")
        line.wait()
        hurry(persistency, 0.05)
        with Busy(busy):
            if manner == "thread":
                with pytest.raises(TimeoutError, match=r"all 1 jobs that may be live had work for 0\.05 s"):
                    persistency.open_job("b")
            elif manner == "task":
                with pytest.raises(TimeoutError, match="all 1 jobs that may be live had work"):
                    LOOPS[loop](persistency.aopen_job, "b")
            else:

                async def main() -> None:
                    async with anyio.create_task_group() as group:
                        task = Task(group, persistency.aopen_job("b"))
                        await turns()
                        task.cancel()
                    assert task.begun
                    assert task.cancelled

                LOOPS[loop](main)
            assert "b" not in persistency
            assert not (root / "b.db").exists()
            assert not (root / "b.lock").exists()
            assert list(persistency._site._entries) == ["a"]
            assert not persistency._opener.slots._waiting
            assert "b" not in workers()
        assert census.opened == ["a"]
        busy.flush().result(WAIT)
        hurry(persistency, WAIT)
        assert persistency.open_job("b").version().result(WAIT) == 0
        assert census.opened == ["a", "b"]


def test_posts_that_wait_too_long_for_a_slot_fail_and_are_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """C.i-4: where all slots are busy for `open_timeout`, what was posted to a resting job fails; the next works."""
    monkeypatch.setattr("persistency.slots.LOOK_SECONDS", 0.02)
    with Persistency(root, max_live_jobs=1) as persistency:
        resting, busy = persistency.open_job("r"), persistency.open_job("a")
        hurry(persistency, 0.05)
        with Busy(busy):
            resting.put("c", ("lost",), b"")
            with pytest.raises(WriteFailed) as failed:
                resting.flush().result(WAIT)
            assert [type(failure.error) for failure in failed.value.failures] == [TimeoutError]
            assert "all 1 jobs that may be live had work" in str(failed.value)
            with pytest.raises(TimeoutError):
                resting.get("c", ("lost",)).result(WAIT)
            assert resting.statistics().failed == 1
            assert adds_up(resting)
        hurry(persistency, WAIT)
        busy.flush().result(WAIT)
        resting.put("c", ("k",), b"1")
        resting.flush().result(WAIT)
        assert resting.scan("c").result(WAIT) == [(key("k"), b"1")]


ENDINGS: dict[str, Callable[[Persistency, Job], Any]] = {
    "close": lambda persistency, job: job.close(),
    "close without draining": lambda persistency, job: job.close(drain=False),
    "close_job": lambda persistency, job: persistency.close_job(job.id),
    "aclose": lambda persistency, job: LOOPS["asyncio"](job.aclose),
    "aclose under trio": lambda persistency, job: LOOPS["trio"](job.aclose),
    "drop_job": lambda persistency, job: persistency.drop_job(job.id),
    "purge": lambda persistency, job: persistency.purge(1),
}


@pytest.mark.parametrize("state", ["resting", "with posts", "with a reader", "busy"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_closing_a_job_that_rests_or_waits_for_a_slot_never_hangs(
    root: Path, monkeypatch: pytest.MonkeyPatch, state: str, ending: str
) -> None:
    """C.i-6, S1-35, S1-40, S1-52: it ends within its time limits, every reply is settled, and the books add up."""
    monkeypatch.setattr("persistency.slots.LOOK_SECONDS", 0.02)
    with Persistency(root, max_live_jobs=1) as persistency:
        resting, busy = persistency.open_job("r"), persistency.open_job("a")
        hurry(persistency, 0.1)
        replies: list[Any] = []
        with contextlib.ExitStack() as stack:
            if state != "resting":
                stack.enter_context(Busy(busy))
            if state in ("with posts", "busy"):
                resting.put("c", ("k",), b"1")
            if state in ("with a reader", "busy"):
                replies.append(in_thread(lambda: resting.get("c", ("k",)).result(WAIT)))
            ended = in_thread(lambda: ENDINGS[ending](persistency, resting))
            assert isinstance(ended.exception(WAIT), WriteFailed | None)
            for reply in replies:
                reply.exception(WAIT)
            assert resting.closed is (ending != "purge")
            if resting.closed:
                assert list(persistency) == ["a"]
                assert list(persistency._site._entries) == ["a"]
        assert adds_up(resting)
        if ending == "purge":
            resting.flush().exception(WAIT)
        assert (root / "r.db").exists() is (ending != "drop_job")
        busy.flush().result(WAIT)


@pytest.mark.parametrize("state", ["resting", "with posts", "waiting to be opened"])
def test_closing_everything_while_jobs_rest_or_wait_never_hangs(
    root: Path, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C.i-6, S1-52: `Persistency.close` ends what rests, writes what was posted to it, and refuses who waits."""
    line = Line(monkeypatch)
    persistency = Persistency(root, max_live_jobs=1)
    jobs = [persistency.open_job(f"job{number}") for number in range(6)]
    for _ in jobs:
        line.wait()
    opening = None
    with Busy(jobs[-1]):
        if state == "with posts":
            for job in jobs[:-1]:
                job.put("c", ("k",), b"1")
                line.wait()
        elif state == "waiting to be opened":
            opening = in_thread(lambda: persistency.open_job("late"))
            line.wait()
        closing = in_thread(persistency.close)
    assert closing.exception(WAIT) is None
    if opening is not None:
        assert isinstance(opening.exception(WAIT), Closed | None)
    for entry in list(persistency._site._entries.values()):  # one that opened all the same is closed by itself
        entry.gone.result(WAIT)
    if state == "with posts":
        with Persistency(root) as again:
            assert [again.open_job(job.id).get("c", ("k",)).result(WAIT) for job in jobs[:-1]] == [b"1"] * 5


# -- exit --------------------------------------------------------------------------------------------------------------

EXITS = {
    "posts": """
import sys
from persistency import Persistency
persistency = Persistency(sys.argv[1], max_live_jobs=2)
jobs = [persistency.open_job(f"job{number}") for number in range(20)]
for job in jobs:
    for number in range(50):
        job.put("c", (number,), b"x")
""",
    "few descriptors": """
import resource, sys
from persistency import Persistency
persistency = Persistency(sys.argv[1], max_live_jobs=4)
jobs = [persistency.open_job(f"job{number}") for number in range(100)]
resource.setrlimit(resource.RLIMIT_NOFILE, (96, 96))
for job in jobs:
    for number in range(10):
        job.put("c", (number,), b"x")
""",
    "busy": """
import sys, threading
from persistency import Persistency
persistency = Persistency(sys.argv[1], max_live_jobs=1, exit_timeout=1.0)
jobs = [persistency.open_job(f"job{number}") for number in range(5)]
busy, entered = persistency.open_job("busy"), threading.Event()
def work(tx):
    entered.set()
    threading.Event().wait()
busy.persist([])
threading.Thread(target=lambda: busy.run(work).result(), daemon=True).start()
entered.wait()
for job in jobs:
    for number in range(10):
        job.put("c", (number,), b"x")
""",
    "late hook": """
import atexit, sys
def late():
    for job in jobs:
        for number in range(10):
            job.put("c", (number,), b"x")
    jobs[0].flush().result(10)
atexit.register(late)  # before the engine's: so it runs after that
from persistency import Persistency
persistency = Persistency(sys.argv[1], max_live_jobs=2)
jobs = [persistency.open_job(f"job{number}") for number in range(10)]
""",
    "opening in a hook": """
import atexit, sys
from persistency import Persistency
def hook():
    persistency = Persistency(sys.argv[1], max_live_jobs=1, open_timeout=10.0)
    for number in range(5):
        job = persistency.open_job(f"job{number}")
        for row in range(10):
            job.put("c", (row,), b"x")
    for number in range(5):
        persistency[f"job{number}"].flush().result(10)
    persistency.close()
atexit.register(hook)
""",
    "threads": """
import sys, threading
from persistency import Persistency
persistency = Persistency(sys.argv[1], max_live_jobs=2)
jobs = [persistency.open_job(f"job{number}") for number in range(12)]
def post(share):
    for number in range(50):
        for job in share:
            job.put("c", (number,), b"x")
for number in range(4):
    threading.Thread(target=post, args=(jobs[number::4],)).start()
""",
}
ROWS = {"posts": (20, 50), "few descriptors": (100, 10), "busy": (5, 10), "late hook": (10, 10)}
ROWS |= {"opening in a hook": (5, 10), "threads": (12, 50)}


@pytest.mark.parametrize("case", EXITS)
def test_an_exit_loses_nothing_that_was_posted_to_resting_jobs(root: Path, case: str) -> None:
    """Promise 6: returning from main writes what waits in jobs that rest, or wait for a slot, and hangs nothing."""
    done = run_child(EXITS[case], root, timeout=30)
    assert done.returncode == 0, done.stderr
    jobs, rows = ROWS[case]
    with Persistency(root, max_live_jobs=4) as persistency:
        found = [persistency.open_job(f"job{number}").count("c").result(WAIT) for number in range(jobs)]
    assert found == [rows] * jobs, done.stderr[-2_000:]
    named = re.findall("job '(.*)': .* could not be written", done.stderr)
    assert named == (["busy"] if case == "busy" else [])
    assert "failed" not in done.stderr


# -- idle for too long -------------------------------------------------------------------------------------------------


class Steady:
    """The clock intervals are counted by; only a test moves it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seconds = 1_000.0
        for module in ("activation", "turns", "upkeep"):
            patch.setattr(f"persistency.actor.{module}.monotonic", lambda: self.seconds)


def look(job: Job, quiet: Quiet, census: Census) -> None:
    """Have a worker look whether there is something to do, and wait until it has."""
    job._mailbox.ring()
    quiet.wait_or(job, lambda: job.id in census.closed)


def test_a_job_nobody_uses_rests_after_a_while(
    root: Path, census: Census, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C.i-5, S1-29, S1-34: after `idle_ttl` without use, not before; every use begins it anew; posts wake it again."""
    time = Steady(monkeypatch)
    uses: list[Callable[[Job], Any]] = [
        lambda job: job.get("c", ("k",)).result(WAIT),
        lambda job: job.count("c").result(WAIT),
        lambda job: job.commit([Put("c", ("k",), b"2")]).result(WAIT),
        lambda job: (job.put("c", ("k",), b"3"), job.flush().result(WAIT)),
        *(lambda job, run=run: run(bounded, lambda: job.scan("c")) for run in LOOPS.values()),  # type: ignore[misc]
    ]
    with Persistency(root, idle_ttl=100.0) as persistency:
        job = persistency.open_job("a", sync_interval=None)
        quiet.wait(job)
        for use in uses:
            time.seconds += 99.9
            look(job, quiet, census)
            assert job.statistics().state == "live"
            use(job)
        time.seconds += 99.9
        job.statistics()  # looking is no use
        look(job, quiet, census)
        assert census.closed == []
        time.seconds += 0.2
        look(job, quiet, census)
        census.wait(lambda: census.closed == ["a"])
        assert job.statistics().state == "idle"
        assert job.get("c", ("k",)).result(WAIT) == b"3"
        assert census.opened == ["a", "a"]


def test_a_job_rests_by_itself(root: Path, census: Census) -> None:
    """C.i-5 (no sweeper): the worker wakes for it without anybody asking, again and again."""
    with Persistency(root, idle_ttl=0.02) as persistency:
        job = persistency.open_job("a")
        for number in range(3):
            job.put("c", (number,), b"")
            job.flush().result(WAIT)
            census.wait(lambda number=number: len(census.closed) > number and census.live == [])  # type: ignore[misc]
        assert job.count("c").result(WAIT) == 3


def test_a_waiting_reader_keeps_an_idle_job_live(
    root: Path, census: Census, quiet: Quiet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C.i-5: as for `max_live_jobs`; and the job doesn't spin meanwhile."""
    time = Steady(monkeypatch)
    with Persistency(root, idle_ttl=10.0) as persistency:
        job = persistency.open_job("a", feed_changes_max=5, sync_interval=None)
        waiting = job.changes(0, 1, wait=True)
        quiet.wait(job)
        time.seconds += 11.0
        sleeps = quiet.sleeps(job)
        look(job, quiet, census)
        assert census.closed == []
        assert quiet.sleeps(job) - sleeps <= 2
        assert quiet.seconds(job) == 10.0
        assert waiting.cancel()
        look(job, quiet, census)
        census.wait(lambda: census.closed == ["a"])


def test_an_idle_ttl_is_for_all_jobs_of_its_object(root: Path, census: Census) -> None:
    """C.i-5: with both limits; an object without them shares a job, and neither's close stops the other's."""
    with Persistency(root, idle_ttl=0.02, max_live_jobs=2) as persistency, Persistency(root) as plain:
        jobs = [persistency.open_job(f"job{number}") for number in range(5)]
        shared = plain.open_job("job0")
        census.wait(lambda: census.live == [])
        for number, job in enumerate(jobs):
            job.put("c", ("k",), b"%d" % number)
        jobs[0].close()
        assert shared.get("c", ("k",)).result(WAIT) == b"0"
        census.wait(lambda: census.live == [])
        assert census.most <= 2
        assert [job.get("c", ("k",)).result(WAIT) for job in jobs[1:]] == [b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("thrown", [SystemExit, MemoryError, KeyboardInterrupt])
def test_what_is_thrown_into_the_thread_that_wakes_jobs_leaves_nobody_waiting(
    root: Path, monkeypatch: pytest.MonkeyPatch, thrown: type[BaseException]
) -> None:
    """Promise 7: posts to resting jobs are run all the same, before long, and everything can be closed."""
    monkeypatch.setattr(threading, "excepthook", lambda _args: None)
    with Persistency(root, max_live_jobs=1) as persistency:
        one, two = persistency.open_job("a"), persistency.open_job("b")
        really, thrown_once = Slots._granted, threading.Event()

        def granted(slots: Slots) -> Any:
            if not thrown_once.is_set():
                thrown_once.set()
                raise thrown
            return really(slots)

        monkeypatch.setattr(Slots, "_granted", granted)
        one.put("c", ("k",), b"1")
        assert thrown_once.wait(WAIT)
        assert one.get("c", ("k",)).result(WAIT) == b"1"
        assert two.count("c").result(WAIT) == 0


# -- temporary jobs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["live", "resting", "in memory"])
@pytest.mark.parametrize("verb", VERBS)
def test_a_temporary_job_is_over_at_its_end(root: Path, wall: Wall, verb: str, state: str) -> None:
    """`ttl=`: exact on every verb: a millisecond before its end it works; from then on the call raises `Closed`."""
    where, options = (":memory:" if state == "in memory" else root), {"max_live_jobs": 1} if state == "resting" else {}
    if state == "in memory" and verb == "backup":
        return
    with Persistency(where, clock=wall, **options) as persistency:
        job = fill(persistency.open_job("a", ttl=60, feed_changes_max=100))
        persistency.open_job("b")
        wall.ms += 59_999
        answered(VERBS[verb](job))
        assert not job.closed
        persistency["b"].flush().result(WAIT)
        if state == "resting" and verb not in WAKES_NOBODY:
            assert job.statistics().state == "idle"
        wall.ms += 1
        with pytest.raises(Closed, match="temporary"):
            VERBS[verb](job)
        assert job.closed
        assert "a" not in persistency
        assert list(persistency) == ["b"]


@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_closing_a_job_that_is_over_closes_it(root: Path, wall: Wall, census: Census, options: dict[str, Any]) -> None:
    """`ttl=`: `close` in time or after the end gives everything back, whether or not the worker has noticed the end."""
    with Persistency(root, clock=wall, **options) as persistency:
        for number in range(4):
            persistency.open_job(f"job{number}", ttl=3_600).put("c", ("k",), b"")
        for number in range(4):
            persistency[f"job{number}"].flush().result(WAIT)
        jobs = [persistency[f"job{number}"] for number in range(4)]
        wall.ms += 3_600_000
        for job in jobs[:2]:
            job.close()
        assert sorted(persistency._site._entries) in ([], ["job2", "job3"])
    census.wait(lambda: census.live == [])
    assert persistency._site._entries == {}


def test_a_temporary_job_gets_a_fresh_id(root: Path) -> None:
    """`open_job()`: without an id each gets an unguessable one of 24 hex digits, with a `ttl` or without."""
    with Persistency(root, max_live_jobs=2) as persistency:
        ids = [persistency.open_job(ttl=60).id for _ in range(20)] + [persistency.open_job().id for _ in range(20)]
        assert len(set(ids)) == 40
        assert all(re.fullmatch("[0-9a-f]{24}", job_id) for job_id in ids)


@pytest.mark.parametrize("ttl", [60, 60.0, timedelta(minutes=1)])
def test_a_stored_end_survives(root: Path, wall: Wall, ttl: Any) -> None:
    """`ttl=`: what was said once counts from that call, also for those who open the job later without one."""
    end = wall.now + 60
    with Persistency(root, clock=wall) as persistency:
        persistency.open_job("a", ttl=ttl).put("c", ("k",), b"1")
        assert persistency.open_job("a", ttl=ttl) is persistency["a"]
        assert [stored.expires for stored in persistency.stored_jobs()] == [end]
    wall.ms += 30_000
    for _ in range(2):
        with Persistency(root, clock=wall) as persistency:
            job = persistency.open_job("a")
            assert job.get("c", ("k",)).result(WAIT) == b"1"
            assert persistency.stored_jobs()[0].expires == end
            wall.ms += 10_000
    with Persistency(root, clock=wall) as persistency:
        assert persistency.stored_jobs()[0].expires == end
        job = persistency.open_job("a")
        wall.ms += 9_999
        assert job.count("c").result(WAIT) == 1
        wall.ms += 1
        with pytest.raises(Closed):
            job.count("c")


def test_opening_with_a_ttl_again_begins_a_new_time(root: Path, wall: Wall) -> None:
    """`ttl=`: counts from the call that opens the job."""
    for _ in range(3):
        with Persistency(root, clock=wall) as persistency:
            job = persistency.open_job("a", ttl=60)
            assert persistency.stored_jobs()[0].expires == wall.now + 60
            job.increment("c", ("n",)).result(WAIT)
        wall.ms += 59_000
    with Persistency(root, clock=wall) as persistency:
        assert persistency.open_job("a").increment("c", ("n",)).result(WAIT) == 4


@pytest.mark.parametrize("options", LIMITS, ids=str)
@pytest.mark.parametrize("again", [{}, {"ttl": 60}])
def test_a_job_that_is_over_starts_empty(
    root: Path, wall: Wall, options: dict[str, Any], again: dict[str, Any]
) -> None:
    """`ttl=`: opening an expired one, open here or closed, with a `ttl` or without, starts empty, at version 0."""
    with Persistency(root, clock=wall, **options) as persistency:
        for closed in (True, False, True):
            job = fill(persistency.open_job("a", ttl=60))
            if closed:
                job.close()
            wall.ms += 60_000
            assert job.closed
            fresh = persistency.open_job("a", **again)
            assert fresh is not job
            assert (fresh.count("a").result(WAIT), fresh.version().result(WAIT)) == (0, 0)
            assert fresh.check().result(WAIT) == []
            assert persistency.stored_jobs()[0].expires == (wall.now + 60 if again else None)
            assert job.closed
            persistency.drop_job("a")


def test_a_permanent_job_can_not_be_made_temporary(root: Path, wall: Wall) -> None:
    """`ttl=`: `Misuse`, whether the job is open or stored; nothing of it is touched."""
    with Persistency(root, clock=wall, max_live_jobs=1) as persistency:
        job = fill(persistency.open_job("a"))
        persistency.open_job("b")
        with pytest.raises(Misuse, match=r"ttl\b"):
            persistency.open_job("a", ttl=60)
        job.close()
        with pytest.raises(Misuse, match="ttl"):
            persistency.open_job("a", ttl=60)
        wall.ms += 60_000
        assert persistency.purge_expired() == []
        assert persistency.open_job("a").count("a").result(WAIT) == 16
        assert [stored.expires for stored in persistency.stored_jobs()] == [None, None]


def test_who_waits_for_a_temporary_job_is_told_of_its_end(root: Path, census: Census) -> None:
    """`ttl=`: the worker wakes for the end by itself, tells who waits for changes, and lets the file go."""
    with Persistency(root) as persistency:
        job = persistency.open_job("a", ttl=1.0, feed_changes_max=5)
        waiting = job.changes(0, 1, wait=True)
        assert isinstance(waiting.exception(WAIT), Closed)
        census.wait(lambda: census.live == [])
        with pytest.raises(Closed):
            job.put("c", ("k",), b"")
        assert persistency.purge_expired() == ["a"]


def test_a_temporary_job_goes_with_the_next_sweep(root: Path, wall: Wall, census: Census) -> None:
    """`purge_expired`: drops what has ended, open here (live, resting, twice) or not, and returns the ids; no more."""
    with Persistency(root, clock=wall, max_live_jobs=3) as persistency, Persistency(root, clock=wall) as other:
        for name in ("closed", "resting", "live", "shared", "later"):
            fill(persistency.open_job(name, ttl=120 if name == "later" else 60))
        other.open_job("shared")
        persistency.close_job("closed")
        fill(persistency.open_job("for good"))
        for name in ("live", "shared"):
            persistency[name].flush().result(WAIT)
        assert persistency["resting"].statistics().state == "idle"
        wall.ms += 59_999
        assert persistency.purge_expired() == []
        wall.ms += 1
        waiting = persistency["later"].count("a")
        assert persistency.purge_expired() == ["closed", "live", "resting", "shared"]
        assert persistency.purge_expired() == []
        assert waiting.result(WAIT) == 16
        assert [stored.job_id for stored in persistency.stored_jobs()] == ["for good", "later"]
        assert sorted(path.name for path in root.iterdir() if path.suffix == ".db") == ["for%20good.db", "later.db"]
        assert sorted(persistency) == ["for good", "later"]
        assert persistency["for good"].count("a").result(WAIT) == 16


def test_a_sweep_leaves_the_jobs_of_other_processes_alone(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`purge_expired`, `purge`: what another process has open stays; the rest goes; nothing is logged of it."""
    code = """
import sys
from persistency import Persistency
with Persistency(sys.argv[1], clock=lambda: 1_000.0) as persistency:
    job = persistency.open_job("theirs", ttl=60)
    job.put("c", ("k",), bytes(100_000))
    job.flush().result(10)
    print("open", flush=True)
    sys.stdin.readline()
    assert job.count("c").result(10) == 1
"""
    with Persistency(root, clock=lambda: 1_000.0) as persistency:
        persistency.open_job("mine", ttl=60).put("c", ("k",), b"")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(root)], cwd=PROJECT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"
        with Persistency(root, clock=lambda: 2_000.0) as persistency:
            assert persistency.purge_expired() == ["mine"]
            assert persistency.purge(1) == []
            assert [stored.job_id for stored in persistency.stored_jobs()] == ["theirs"]
        child.stdin.close()
        assert child.wait(WAIT) == 0
    assert not caplog.records
    with Persistency(root, clock=lambda: 2_000.0) as persistency:
        assert persistency.purge_expired() == ["theirs"]


def test_a_resting_temporary_job_ends(root: Path, wall: Wall, census: Census) -> None:
    """`ttl=`: it ends while it rests; nothing is opened for it, not even to be dropped; what waited before is told."""
    with Persistency(root, clock=wall, max_live_jobs=1) as persistency:
        job = fill(persistency.open_job("a", ttl=60))
        persistency.open_job("b")
        wall.ms += 60_000
        opened = list(census.opened)
        for _ in range(2):
            with pytest.raises(Closed):
                job.put("c", ("k",), b"")
            with pytest.raises(Closed):
                job.get("c", ("k",))
        assert job.statistics().state in ("idle", "closed")
        assert persistency.purge_expired() == ["a"]
        assert census.opened == opened
        assert not (root / "a.db").exists()


def test_posts_to_a_temporary_job_that_ends_before_it_wakes_fail_and_are_told(
    root: Path, wall: Wall, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    """Promise 3: what was accepted before the end, and could only be written after it, is reported with `Closed`."""
    told: list[Any] = []
    heard = threading.Event()
    persistency = Persistency(root, clock=wall, max_live_jobs=1)
    job = persistency.open_job("a", ttl=60, on_error=lambda _id, failures: (told.extend(failures), heard.set()))
    busy = persistency.open_job("b")
    with Busy(busy):
        job.put("c", ("k",), b"")
        reply = job.count("c")
        wall.ms += 60_000
    assert isinstance(reply.exception(WAIT), Closed)
    assert heard.wait(WAIT)
    assert [type(failure.error) for failure in told] == [Closed]
    assert (job.statistics().failed, adds_up(job)) == (1, True)
    assert persistency.purge_expired() == ["a"]
    with pytest.raises(WriteFailed) as failed:
        persistency.close()
    assert list(failed.value.failures) == told


def test_collections_that_end_live_in_a_job_that_rests(root: Path, wall: Wall) -> None:
    """`SharedStore`: its job is no temporary one; its collections outlive its rests and end by themselves."""
    with Persistency(root, clock=wall, max_live_jobs=1) as persistency:
        store = SharedStore(persistency)
        temporary, lasting = store.open("t", ttl=60), store.open("p", kind="permanent")
        for number in range(3):
            temporary.set({"id": str(number)}).result(WAIT)
            lasting.set({"id": str(number)}).result(WAIT)
            persistency.open_job(f"other{number}").flush().result(WAIT)
            assert persistency["shared"].statistics().state == "idle"
        assert [record.key for record in temporary.snapshot().result(WAIT)] == ["0", "1", "2"]
        wall.ms += 60_000
        persistency["other0"].flush().result(WAIT)
        assert persistency.purge_expired() == []  # of the root: the job itself has no end
        assert store.get("t") is None
        assert store.purge_expired() == ["t"] or store.get("t") is None
        assert [record.key for record in lasting.snapshot().result(WAIT)] == ["0", "1", "2"]


# -- what is stored, and making room -----------------------------------------------------------------------------------


def test_stored_jobs_say_what_is_known(root: Path, wall: Wall) -> None:
    """C.i-7: every job on disk, open, resting or closed: its id, file, size of all its files, last use and end."""
    with Persistency(root, clock=wall, max_live_jobs=1) as persistency:
        assert persistency.stored_jobs() == []
        at = {}
        for name in ("closed", "resting", "live"):
            persistency.open_job(name, ttl=600 if name == "resting" else None).put("c", ("k",), bytes(50_000))
            persistency[name].flush(sync=True).result(WAIT)
            at[name] = wall.now
            if name == "closed":
                persistency.close_job(name)
            wall.ms += 10_000
        found = {stored.job_id: stored for stored in persistency.stored_jobs()}
        assert list(found) == ["closed", "live", "resting"]
        for name, stored in found.items():
            assert isinstance(stored, StoredJob)
            assert stored.path == root / f"{name}.db"
            assert stored.bytes == sum(path.stat().st_size for path in root.glob(f"{name}.db*"))
            assert stored.bytes > 50_000
        assert {name: stored.expires for name, stored in found.items()} == {
            "closed": None, "live": None, "resting": at["resting"] + 600,
        }  # fmt: skip
        assert found["closed"].last_used == at["closed"]
        assert found["live"].last_used == at["live"]
        assert at["resting"] <= found["resting"].last_used <= wall.now


SIZES = [
    (0, 0), (1, 1), (10**12, 10**12), ("0", 0), ("17", 17), ("200K", 200_000), ("200kb", 200_000), ("10MB", 10**7),
    ("500MB", 5 * 10**8), (" 2 GiB ", 2**31), ("2gib", 2**31), ("1.5KiB", 1536), ("1Ti", 2**40), ("3T", 3 * 10**12),
    ("9007199254740993", 9007199254740993),
]  # fmt: skip


@pytest.mark.parametrize(("text", "limit"), SIZES)
def test_sizes_are_numbers_or_texts(root: Path, monkeypatch: pytest.MonkeyPatch, text: Any, limit: int) -> None:
    """C.i-7, S1-12: decimal and binary units; 0 is no limit."""
    sizes = [limit // 2, limit - limit // 2, 1] if limit else [10**15] * 3
    stored = [StoredJob(f"job{at}", root / f"job{at}.db", size, float(at), None) for at, size in enumerate(sizes)]
    monkeypatch.setattr(DirectoryRoot, "stored", lambda _root: stored)
    monkeypatch.setattr(DirectoryRoot, "drop", lambda _root, _job_id: [])
    with Persistency(root) as persistency:
        gone = persistency.purge(text)
        assert gone == ([] if limit == 0 else ["job0"] if limit > 1 else ["job0", "job1"])


@pytest.mark.parametrize(
    "text",
    ["", " ", "much", "MB", "-1", -1, "1e3", "1,5MB", "10 XB", "٣", 1.5, None, True, b"10", "9" * 400, "0x10", "nan"],
)
def test_what_is_no_size_is_refused(root: Path, text: Any) -> None:
    """C.i-7, S1-12 (BEAT: the reference does nothing): what can't be read is `Misuse`, and nothing is dropped."""
    with Persistency(root) as persistency:
        fill(persistency.open_job("a")).close()
        if text == "9" * 400:
            with contextlib.suppress(Misuse):
                assert persistency.purge(text) == []  # a number like others, or too much of one
        else:
            with pytest.raises(Misuse, match="max_bytes"):
                persistency.purge(text)
        assert [stored.job_id for stored in persistency.stored_jobs()] == ["a"]


def make_jobs(root: Path, wall: Wall, order: str, each: int = 40_000) -> None:
    """Make jobs that were last used in this order."""
    with Persistency(root, clock=wall) as persistency:
        for name in sorted(order):
            persistency.open_job(name).put("c", ("k",), bytes(each))
        for name in order:
            wall.ms += 1_000
            persistency[name].increment("c", ("n",)).result(WAIT)
            persistency.close_job(name)


def total(root: Path) -> int:
    """Return how many bytes a root's jobs take."""
    with Persistency(root) as persistency:
        return sum(stored.bytes for stored in persistency.stored_jobs())


def test_a_root_that_is_not_there_needs_no_room(root: Path) -> None:
    """S1-13 T: no error, nothing is created."""
    with Persistency(root) as persistency:
        assert persistency.purge("1K") == []
        assert persistency.purge_expired() == []
        assert persistency.stored_jobs() == []
    assert not root.exists()


def test_a_root_that_fits_keeps_everything(root: Path, wall: Wall) -> None:
    """S1-14 T: at the limit, to the byte, nothing goes; 0 is no limit."""
    make_jobs(root, wall, "abc")
    with Persistency(root, clock=wall) as persistency:
        assert persistency.purge(0) == persistency.purge("0") == []
        assert persistency.purge(total(root)) == []
        assert persistency.purge("1GB") == []
        assert len(persistency.stored_jobs()) == 3
        assert persistency.purge(total(root) - 1) == ["a"]


def test_the_longest_unused_go_first(root: Path, wall: Wall) -> None:
    """S1-15 T, S1-16 T, S1-17, C.i-7: by the stored last use, not the files' times, as many as need be, all files."""
    make_jobs(root, wall, "dbeac")
    for at, name in enumerate("caebd"):  # the files' times say the opposite
        for path in root.glob(f"{name}.*"):
            os.utime(path, (at, at))
    each = total(root) // 5
    with Persistency(root, clock=wall) as persistency:
        assert persistency.purge(5 * each - 1) == ["d"]
        assert persistency.purge(each * 2) == ["b", "e"]
        assert [stored.job_id for stored in persistency.stored_jobs()] == ["a", "c"]
        assert sum(stored.bytes for stored in persistency.stored_jobs()) <= each * 2
        assert persistency.purge(1) == ["a", "c"]
        assert list(root.iterdir()) == []
        assert persistency.purge(1) == []


def test_last_use_is_stored_with_reads_and_rests(root: Path, wall: Wall) -> None:
    """C.i-7: a job that is opened and only read was used; so was one that went to rest."""
    make_jobs(root, wall, "abcd")
    with Persistency(root, clock=wall, max_live_jobs=1) as persistency:
        for name in ("b", "a"):
            wall.ms += 1_000
            persistency.open_job(name).get("c", ("k",)).result(WAIT)
        persistency.close_job("a")
        persistency.close_job("b")
        last = {stored.job_id: stored.last_used for stored in persistency.stored_jobs()}
        assert last["c"] < last["d"] < last["b"] <= last["a"]
        assert persistency.purge(1)[:2] == ["c", "d"]


def test_an_unknown_last_use_counts_as_the_oldest(root: Path, wall: Wall) -> None:
    """C.i-7: where the stamp is gone (the lock file was removed), the job goes first, and it is no error."""
    make_jobs(root, wall, "abc")
    (root / "c.lock").unlink()
    with Persistency(root, clock=wall) as persistency:
        assert {stored.job_id: stored.last_used is None for stored in persistency.stored_jobs()}["c"]
        assert persistency.purge(total(root) - 1) == ["c"]


@pytest.mark.parametrize("options", LIMITS, ids=str)
def test_open_jobs_are_never_purged(root: Path, wall: Wall, options: dict[str, Any]) -> None:
    """C.i-7: neither live nor resting ones, of this object or another one on the root; they count, though."""
    make_jobs(root, wall, "abcde")
    with Persistency(root, clock=wall, **options) as persistency, Persistency(root, clock=wall) as other:
        opened = [persistency.open_job(name) for name in "abc"]
        other.open_job("d")
        assert persistency.purge(1) == ["e"]
        assert persistency.purge("1") == []
        for job in [*opened, other["d"]]:
            assert job.get("c", ("k",)).result(WAIT) == bytes(40_000)
        persistency.close_job("b")
        assert other.purge(1) == ["b"]


def test_what_can_not_be_deleted_is_passed_over_and_told(
    root: Path, wall: Wall, caplog: pytest.LogCaptureFixture
) -> None:
    """S1-18 T, C.i-7: it is logged, still counted, and the others go all the same."""
    make_jobs(root, wall, "abc")
    each = total(root) // 3
    (root / "a.db").unlink()
    with contextlib.closing(apsw.Connection(str(root / "a.db"))) as stranger:
        stranger.execute("CREATE TABLE theirs (x); INSERT INTO theirs VALUES (zeroblob(100000))")
    os.link(root / "b.db", root / "second name")
    with Persistency(root, clock=wall) as persistency, caplog.at_level(logging.WARNING, "persistency"):
        assert persistency.purge(3 * each) == ["c"]
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert "'a'" in told[0]
    assert "'b'" in told[1]
    assert (root / "a.db").exists()
    assert (root / "b.db").exists()


def test_what_is_no_job_is_passed_over(root: Path, wall: Wall) -> None:
    """S1-19 T: directories, pipes, links and foreign names in the root are neither counted nor touched."""
    make_jobs(root, wall, "a")
    size = total(root)
    (root / "b.db").mkdir()
    (root / "b.db" / "inside").write_bytes(bytes(100_000))
    (root / "c.db").symlink_to(root / "nowhere")
    os.mkfifo(root / "d.db")
    (root / "NOT OURS.db").write_bytes(bytes(100_000))
    (root / "notes.txt").write_bytes(bytes(100_000))
    with Persistency(root, clock=wall) as persistency:
        assert [stored.job_id for stored in persistency.stored_jobs()] == ["a"]
        assert persistency.purge(size) == []
        assert persistency.purge(1) == ["a"]
    assert {path.name for path in root.iterdir()} == {"b.db", "c.db", "d.db", "NOT OURS.db", "notes.txt"}


def test_purging_in_memory(wall: Wall) -> None:
    """C.i-7: jobs in memory are all open, so none is dropped; ended ones go with their handles."""
    with Persistency(":memory:", clock=wall) as persistency:
        fill(persistency.open_job("a"))
        temporary = fill(persistency.open_job("t", ttl=60))
        assert persistency.purge(1) == []
        wall.ms += 60_000
        persistency.purge_expired()
        assert temporary.closed
        assert persistency["a"].count("a").result(WAIT) == 16
        assert persistency.open_job("t").count("a").result(WAIT) == 0


def test_sweeps_beside_openings(root: Path, wall: Wall) -> None:
    """C.i-7, S1-36: purging beside threads that open, use and close jobs never takes one that is in use."""
    stop = threading.Event()
    with Persistency(root, clock=wall, max_live_jobs=3) as persistency, Persistency(root, clock=wall) as sweeper:

        def use(number: int) -> int:
            done = 0
            for turn in range(60):
                with persistency.open_job(f"job{number}") as job:
                    job.put("c", (turn,), b"x")
                    assert job.get("c", (turn,)).result(WAIT) == b"x"
                    done += 1
            return done

        def sweep() -> int:
            gone = 0
            while not stop.is_set():
                gone += len(sweeper.purge(1))
                gone += len(sweeper.purge_expired())
            return gone

        sweeping = in_thread(sweep)
        try:
            assert together(4, use) == [60] * 4
        finally:
            stop.set()
        assert sweeping.result(WAIT) > 0


def test_the_soak_counts_what_it_does(place: Path) -> None:
    """The long form's walk, short: it says how often it has opened jobs, and how many rows it has found."""
    walk = lives.roam(place, 7, jobs=10, live_max=2, steps=40)
    assert json.dumps(vars(walk))
    assert walk.steps == 50
    assert walk.rows > 0
    assert walk.wrong == []
