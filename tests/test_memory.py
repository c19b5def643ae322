"""Memory: what waits is bounded, whoever produces it, and costs little more than its own bytes.

Growth is measured in processes of their own (`tests.crash.hungry`), as the peak over what it was after the imports.
`python -m tests.soak memory` is the long form.
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
from tests.crash.hungry import CASES, PLANTS, complaints
from tests.soak.memory import grow

# How many operations each producer posts here, a part of the long form's million; so many that an engine with a planted
# defect is far over the limit, which `test_planted_defect` shows: what is kept takes 440 bytes and more each.
QUICK = 150_000
COUNTS = {
    "thread_kib_puts": 50_000,
    "thread_page_puts": 30_000,
    "thread_large_puts": 150,
    "slow_thread_puts": 100_000,
    "slow_requests": 100_000,
    "failing_puts": 100_000,
    "failing_puts_told": 60_000,
    "failing_puts_told_slowly": 60_000,
    "failing_batches": 50_000,
    "failing_large_puts": 300,
    "unseen_requests": 4_000,
}
QUEUED = 5_000
POINTER_BYTES = 8


@pytest.mark.parametrize("name", CASES)
def test_producer(name: str) -> None:
    """Whoever produces, faster than the disk, and whether it is written or fails: the process hardly grows.

    Eight threads and a mailbox of 8 MiB: less than 40 MiB. Of what failed and nobody flushed 1,000 failures and 1 MiB
    of payload are kept, beyond it the count alone; and everything posted is accounted for.
    """
    count = COUNTS.get(name, QUICK)
    told = grow(name, count)
    print(told)
    assert not complaints(name, count, told)


@pytest.mark.parametrize("name", PLANTS)
def test_planted_defect(name: str) -> None:
    """An engine that has no bound, or keeps all that failed, is reported by what it grows."""
    plant = PLANTS[name]
    told = grow(plant.case, plant.count, name)
    print(told)
    seen = {complaint.partition(":")[0] for complaint in complaints(plant.case, plant.count, told)}
    assert plant.kinds <= seen


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
