"""What operations cost the actor, counted: wake-ups of its thread and of event loops, groups, syncs.

Nothing here has a clock in it, so it says the same on every machine: whoever makes an operation dearer is told.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio

from persistency import Job, Persistency, Put, key
from persistency.actor.sleeper import Sleeper
from persistency.actor.turns import Turns
from persistency.storage.port import Barrier
from persistency.storage.sqlite import SqliteStore
from persistency.transaction import program
from tests.loops import InLoop, Task, in_thread, turns
from tests.soak.lives import Quiet
from tests.test_durability import Disk, Steady, on
from tests.test_engine import WAIT

OPERATIONS = 1_000
KEYS = [key("channel", number) for number in range(OPERATIONS)]


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count what a job does: rings that wake its thread, groups, transactions, and wake-ups of event loops."""
    counted: Counter[str] = Counter()

    def count(owner: type, name: str, called: str) -> None:
        real = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[called] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    count(Sleeper, "_ring", "rings")
    count(Turns, "decide", "groups")
    count(SqliteStore, "apply", "applied")
    count(asyncio.BaseEventLoop, "call_soon_threadsafe", "loop wake-ups")
    count(trio.lowlevel.TrioToken, "run_sync_soon", "loop wake-ups")
    return counted


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Quiet:
    """Tell when a worker sleeps."""
    return Quiet(monkeypatch)


@pytest.fixture
def disk() -> Iterator[Disk]:
    """Give a file system that counts."""
    made = Disk()
    yield made
    made.unregister()


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Give an open job with a row for every key."""
    with Persistency(tmp_path / "jobs") as persistency:
        job = persistency.open_job("job", mailbox_ops_max=10 * OPERATIONS, requests_max=10 * OPERATIONS)
        job.commit([Put("c", k, b"x") for k in KEYS]).result(WAIT)
        yield job


class Hold:
    """Keeps a job's worker inside a function, so that what is posted meanwhile waits for it."""

    def __init__(self, job: Job) -> None:
        self._entered, self._released = threading.Event(), threading.Event()
        # Posted, not run in place: this thread must go on.
        self._reply = job._mailbox.ask(_hold(job, self._entered, self._released), reads=False, ops=1)
        assert self._entered.wait(WAIT)

    def release(self) -> None:
        """Let the worker go on, and wait until it has left the function."""
        self._released.set()
        self._reply.result(WAIT)


def _hold(job: Job, entered: threading.Event, released: threading.Event) -> Any:
    def wait(_tx: Any) -> None:
        entered.set()
        assert released.wait(WAIT)

    return program(wait, (), job.id, job._now_ms, job._mailbox)


def test_puts_to_a_busy_worker_wake_nobody(job: Job, counts: Counter[str]) -> None:
    """1,000 puts while the worker has something to do: no ring, and one group, in one transaction, takes them all."""
    hold = Hold(job)
    counts.clear()
    for k in KEYS:
        job.put("c", k, b"y")
    assert counts["rings"] == 0
    hold.release()
    job._mailbox.ask(Barrier(sync=False), reads=False, free=True).result(WAIT)
    assert counts["groups"] <= 2  # theirs, and the barrier's
    assert counts["applied"] <= 3  # and the function's
    assert job.get("c", KEYS[-1]).result(WAIT) == b"y"


@pytest.mark.parametrize(
    "ask",
    [
        lambda job, k: job.get("c", k),
        lambda job, k: job.entry("c", k),
        lambda job, k: job.exists("c", k),
        lambda job, k: job.scan("c", limit=1),
        lambda job, k: job.commit(Put("c", k, b"y")),
        lambda job, k: job.compare_and_set("c", k, b"x", b"y"),
        lambda job, k: job.run(lambda tx: tx.get("c", k)),
    ],
    ids=["get", "entry", "exists", "scan", "commit", "compare_and_set", "run"],
)
def test_requests_of_a_thread_to_an_idle_job_need_no_other_thread(
    job: Job,
    quiet: Quiet,
    counts: Counter[str],
    ask: Callable[[Job, Any], Any],
) -> None:
    """1,000 requests, each answered before the next: all of them in place, and the worker is woken at most to plan."""
    quiet.wait(job)
    counts.clear()
    for k in KEYS:
        ask(job, k).result(WAIT)
    assert counts["rings"] <= 2  # to plan a sync, or when there is something to tidy up
    assert counts["groups"] <= 2


def test_point_reads_under_a_loop_wake_no_loop(job: Job, quiet: Quiet, counts: Counter[str], in_loop: InLoop) -> None:
    """1,000 point reads that are awaited at an idle job: answered in place, with neither thread nor loop woken."""
    quiet.wait(job)

    async def read() -> None:
        counts.clear()
        for k in KEYS:
            assert await job.get("c", k) == b"x"
        assert counts["loop wake-ups"] == counts["rings"] == counts["groups"] == 0

    in_loop(read)


def test_one_group_of_replies_wakes_a_loop_once(job: Job, counts: Counter[str], in_loop: InLoop) -> None:
    """1,000 commits of as many tasks that come in one group: one transaction, and one wake-up for all of them."""

    async def commit() -> None:
        hold = await in_thread(Hold, job)
        replies = [job.commit(Put("c", k, b"y")) for k in KEYS]
        async with anyio.create_task_group() as group:
            tasks = [Task(group, reply) for reply in replies]
            while not all(reply._loops for reply in replies):
                await turns()
            counts.clear()
            hold._released.set()
            versions = [await task for task in tasks]
        assert counts["loop wake-ups"] <= 2
        assert counts["groups"] <= 2
        assert len(set(versions)) == OPERATIONS
        hold.release()

    in_loop(commit)


@pytest.mark.parametrize(("durability", "syncs"), [("process", 0), ("power", OPERATIONS)])
def test_what_commits_sync(
    durability: Any,
    syncs: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    disk: Disk,
) -> None:
    """1,000 commits in turn: no sync within the interval, or with "power" one each; 1,000 puts at once: one."""
    Steady(monkeypatch)  # so no interval ever is over
    with on(disk, tmp_path / "jobs") as persistency:
        job = persistency.open_job("a", durability=durability, mailbox_ops_max=10 * OPERATIONS)
        job.commit(Put("c", KEYS[0], b"x")).result(WAIT)  # the first one also syncs the log's header
        disk.calls.clear()
        for k in KEYS:
            job.commit(Put("c", k, b"x")).result(WAIT)
        assert disk.syncs() == syncs
        hold = Hold(job)
        disk.calls.clear()
        for k in KEYS:
            job.put("c", k, b"y")
        hold.release()
        job.get("c", KEYS[0]).result(WAIT)
        job.scan("c").result(WAIT)
        assert disk.syncs() <= (0 if durability == "process" else 2)  # the function's, and theirs
        assert job.get("c", KEYS[-1]).result(WAIT) == b"y"
