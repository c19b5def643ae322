"""Memory: what waits is bounded, whoever produces it, and costs little more than its own bytes.

Growth is measured in processes of their own (`tests.crash.hungry`), as the peak over what it was after the import.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persistency import Job, Persistency, key
from persistency.storage.port import PLACES, Group
from persistency.storage.sqlite import SqliteStore
from tests.crash.running import last_json, run

MILLION = 1_000_000
QUEUED = 5_000
POINTER_BYTES = 8


def grow(tmp_path: Path, case: str, count: int) -> dict[str, Any]:
    """Run a hungry program and return what it tells."""
    done = run("tests.crash.hungry", case, str(tmp_path / "root"), str(count), timeout=100)
    print(f"{case} {count}: {done.stdout}{done.stderr[-2000:]}")
    assert done.returncode == 0
    assert not done.stderr
    return last_json(done)


@pytest.mark.parametrize(("case", "mib_max"), [("puts", 150), ("loop_puts", 150), ("thread_puts", 40)])
def test_million_puts(tmp_path: Path, case: str, mib_max: float) -> None:
    """A million puts grow the process little: from a plain loop, from a paced event loop, from eight threads."""
    told = grow(tmp_path, case, MILLION)
    assert told["rows"] == told["committed"] == MILLION
    assert told["grown"] < mib_max


@pytest.mark.parametrize("case", ["requests", "loop_requests"])
def test_million_requests(tmp_path: Path, case: str) -> None:
    """A million requests nobody waits for grow the process little, and all those that write are carried out."""
    told = grow(tmp_path, case, MILLION)
    assert told["rows"] == MILLION // 10
    assert told["grown"] < 150


@pytest.mark.parametrize(("case", "count"), [("thread_page_puts", 60_000), ("thread_large_puts", 300)])
def test_large_payloads(tmp_path: Path, case: str, count: int) -> None:
    """A bound of 8 MiB bounds large payloads too: some 300 MiB of them leave the process within a few times of it."""
    told = grow(tmp_path, case, count)
    assert told["committed"] == count
    assert told["grown"] < 80


def test_failures_nobody_takes(tmp_path: Path) -> None:
    """Of 100,000 failing events nobody flushes 1,000 failures are kept at most, beyond it the count alone."""
    told = grow(tmp_path, "failing_events", 100_000)
    assert 0 < told["kept"] <= 1_000
    assert told["kept"] + told["omitted"] == told["failed"] == 200_000
    assert told["rows"] == 0
    assert told["grown"] < 50


@pytest.fixture
def held_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    """Return a job whose worker is held in the middle of a group, so that what is posted stays in the mailbox."""
    gate, reached = threading.Event(), threading.Event()
    apply = SqliteStore.apply

    def held(store: SqliteStore, group: Group, now_ms: int) -> list[Any]:
        reached.set()
        gate.wait()
        return apply(store, group, now_ms)

    monkeypatch.setattr(SqliteStore, "apply", held)
    with Persistency(tmp_path) as persistency, persistency.open_job("alpha") as job:
        job.put("rows", key("first"), b"")
        assert reached.wait(30)
        try:
            yield job
        finally:
            gate.set()


@pytest.mark.parametrize("keys", ["ready", "tuples"])
def test_queued_puts_are_nothing_to_the_collector(held_job: Job, keys: str) -> None:
    """5,000 queued puts aren't one object that the garbage collector has to walk over, beyond the caller's own keys."""
    job, payload = held_job, b"payload"
    ready: list[Any] = [key("channel", number) for number in range(QUEUED)]
    job.put("rows", ("channel", -1), payload)
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        for number in range(QUEUED):
            job.put("rows", ready[number] if keys == "ready" else ("channel", number), payload)
        tracked = len(gc.get_objects()) - before
    finally:
        gc.enable()
    assert job.statistics().pending == QUEUED + 2
    assert tracked <= 10  # whatever else the interpreter keeps in this function


def test_queued_put_costs_three_pointers(held_job: Job) -> None:
    """Besides key and payload a queued put takes 24 bytes of the mailbox's list, and its share of the spare places."""
    job, payload = held_job, b"payload"
    for number in range(QUEUED):
        job.put("rows", key("channel", number), payload)
    line = job._mailbox._messages
    assert len(line) == PLACES * QUEUED
    # A list that grows keeps up to an eighth of spare places.
    each = sys.getsizeof(line) / QUEUED
    assert each <= PLACES * POINTER_BYTES * 1.13
    assert sys.getsizeof(list(line)) / QUEUED <= PLACES * POINTER_BYTES + 0.1
    # Categories and payloads are shared with the caller, not copied.
    assert all(kept is payload for kept in line[2::PLACES])
    assert len({id(category) for category in line[0::PLACES]}) == 1
