"""The events example: its rules one by one, followers, the real commits where they are, and kill -9 at any moment."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import anyio
import pytest

from examples.events import Event, EventLog, commits, count_lines
from persistency import CBOR, Job, Persistency, Transaction
from tests.loops import InLoop, Task, bounded

EXAMPLE = Path(__file__).parent.parent / "examples" / "events.py"
WAIT = 30.0


@pytest.fixture
def log(persistency: Persistency) -> EventLog:
    """Give an empty log."""
    return EventLog(persistency.open_job("events", feed_changes_max=1_000))


def numbered(first: int, stop: int) -> list[Event]:
    """Give events that say which they are."""
    return [{"n": number} for number in range(first, stop)]


def add(tx: Transaction, event: Event) -> None:
    """An effect: a sum."""
    tx.increment("sum", (), event["n"])


def summed(job: Job) -> int:
    """Read the sum."""
    return job.increment("sum", (), 0).result(WAIT)


def test_events_are_numbered_without_a_gap(log: EventLog) -> None:
    """Appending answers with the last number; reading gives what is behind one."""
    assert log.append(numbered(1, 4)).result(WAIT) == 3
    assert log.append([]).result(WAIT) == 3
    assert log.append(numbered(4, 5)).result(WAIT) == 4
    assert log.read().result(WAIT) == [(number, {"n": number}) for number in range(1, 5)]
    assert log.read(after=2, limit=1).result(WAIT) == [(3, {"n": 3})]
    assert log.read(after=4).result(WAIT) == []


def test_a_source_that_is_read_again_is_taken_in_once(log: EventLog) -> None:
    """What the log has of a source already is passed over; a gap is refused; other sources are others."""
    assert log.append(numbered(1, 6), "ledger", after=0).result(WAIT) == 5
    assert log.append(numbered(4, 9), "ledger", after=3).result(WAIT) == 8
    assert log.append(numbered(1, 3), "ledger", after=0).result(WAIT) == 8
    assert log.taken("ledger").result(WAIT) == 8
    with pytest.raises(ValueError, match="9 to 9"):
        log.append(numbered(10, 11), "ledger", after=9).result(WAIT)
    assert log.append(numbered(1, 2), "other", after=0).result(WAIT) == 9
    assert [event["n"] for _, event in log.read().result(WAIT)] == [*range(1, 9), 1]


def test_consumers_have_positions_of_their_own(log: EventLog) -> None:
    """Each consumer gets each event once, in order, as many at a time as it asks for."""
    log.append(numbered(1, 11))
    seen: dict[str, list[int]] = {"a": [], "b": []}
    assert log.consume("a", lambda _tx, event: seen["a"].append(event["n"]), limit=4).result(WAIT) == 4
    assert log.consume("b", lambda _tx, event: seen["b"].append(event["n"])).result(WAIT) == 10
    assert log.consume("a", lambda _tx, event: seen["a"].append(event["n"])).result(WAIT) == 6
    assert log.consume("a", lambda _tx, event: seen["a"].append(event["n"])).result(WAIT) == 0
    assert seen == {"a": list(range(1, 11)), "b": list(range(1, 11))}
    assert log.position("a").result(WAIT) == log.position("b").result(WAIT) == 10
    assert log.position("nobody").result(WAIT) == 0


def test_an_effect_that_raises_undoes_the_whole_step(log: EventLog) -> None:
    """Neither what was written before nor the position stays; the next attempt sees the same events."""
    log.append(numbered(1, 6))

    def fail_at_three(tx: Transaction, event: Event) -> None:
        add(tx, event)
        if event["n"] == 3:
            raise RuntimeError("three")

    with pytest.raises(RuntimeError, match="three"):
        log.consume("a", fail_at_three).result(WAIT)
    assert (summed(log.job), log.position("a").result(WAIT)) == (0, 0)
    assert log.consume("a", add).result(WAIT) == 5
    assert (summed(log.job), log.position("a").result(WAIT)) == (15, 5)


def test_two_who_work_under_one_name_notice(log: EventLog) -> None:
    """After an effect elsewhere the position moves for the first one only."""
    log.append(numbered(1, 6))
    assert log.moved("mail", 0, 3).result(WAIT)
    assert not log.moved("mail", 0, 2).result(WAIT)
    assert log.position("mail").result(WAIT) == 3
    assert log.moved("mail", 3, 5).result(WAIT)


def test_trimming_waits_for_the_slowest_consumer(log: EventLog) -> None:
    """Only what everybody has dealt with goes, and the last ones stay if asked; sources don't count as consumers."""
    log.append(numbered(1, 11), "source")
    assert log.trim().result(WAIT) == 0  # nobody has dealt with anything
    log.consume("fast", add)
    log.consume("slow", add, limit=6)
    assert log.trim(keep=7).result(WAIT) == 3
    assert log.trim().result(WAIT) == 3
    assert [number for number, _ in log.read().result(WAIT)] == [7, 8, 9, 10]
    assert log.consume("slow", add).result(WAIT) == 4
    assert log.append(numbered(11, 12)).result(WAIT) == 11  # numbers go on


# trio warns of the walk that `follow` leaves behind when it is closed in the middle of it.
def test_a_follower_sees_the_past_and_what_comes(log: EventLog, in_loop: InLoop) -> None:
    """Without a gap and without a repetition, also of what is appended while it reads the past."""

    async def session() -> list[int]:
        log.append(numbered(1, 601))
        seen = []

        async def append() -> None:
            for first in range(701, 901, 10):
                await log.append(numbered(first, first + 10))

        async with contextlib.aclosing(log.follow(after=100)) as following, anyio.create_task_group() as group:
            async for number, event in following:
                assert event == {"n": number}
                seen.append(number)
                if number == 101:  # a page was read, and others come: these are in them, and in the feed
                    await log.append(numbered(601, 701))
                if number == 700:
                    group.start_soon(append)
                if number == 900:
                    break
        return seen

    assert in_loop(bounded, session) == list(range(101, 901))


# trio warns of the walk that `follow` leaves behind when it is closed in the middle of it.
def test_a_follower_that_falls_behind_reads_the_events_themselves(persistency: Persistency, in_loop: InLoop) -> None:
    """The job keeps few changes, and the follower is paused: it still sees everything once."""
    log = EventLog(persistency.open_job("events", feed_changes_max=5))

    async def session() -> list[int]:
        await log.append(numbered(1, 3))
        following = log.follow()
        seen = [(await anext(following))[0] for _ in range(2)]
        async with anyio.create_task_group() as group:
            waiting = Task(group, lambda: anext(following))  # at the end of the log
            while not waiting.done:
                last = await log.append(numbered(0, 50))  # more at once than is kept
        seen.append((await waiting)[0])
        while seen[-1] < last:
            seen.append((await anext(following))[0])
        await following.aclose()
        return seen

    seen = in_loop(bounded, session)
    assert seen == list(range(1, len(seen) + 1))
    assert len(seen) > 50


def totals(job: Job) -> Counter[tuple[Any, ...]]:
    """Read what the demonstration has counted."""
    return Counter({row.key.parts: CBOR.decode(row.payload) for row in job.scan("lines").result(WAIT)})


def expected() -> Counter[tuple[Any, ...]]:
    """Count the same without a log."""
    found: Counter[tuple[Any, ...]] = Counter()
    for event in commits():
        for path, added, removed in event["files"]:
            found[event["repo"], path.partition("/")[0] if "/" in path else ""] += (added or 0) + (removed or 0)
    return found


def test_commits_are_counted(persistency: Persistency) -> None:
    """The real commits where `PERSISTENCY_DATA` names them, else generated ones: all of them, exactly once."""
    log = EventLog(persistency.open_job("events", feed_changes_max=1_000))
    events = list(commits())
    assert len(events) > 1_000
    log.append(events)
    while log.consume("lines", count_lines, limit=500).result(WAIT):
        pass
    assert totals(log.job) == expected()


def run(root: Path, lines: int | None) -> int:
    """Run the example over a root; kill it after so many lines of output, or let it end. Give its return code."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parent.parent)}
    command = [sys.executable, "-X", "dev", "-W", "error", str(EXAMPLE), str(root)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if lines is None:
            process.stdout.read()
        else:
            for _ in range(lines):
                process.stdout.readline()
            process.kill()
        return process.wait(WAIT)


def test_killed_again_and_again_each_event_counts_once(tmp_path: Path) -> None:
    """Kill -9 while commits are taken in and while they are counted: at the end the totals are exactly right."""
    seed = random.randrange(1_000_000)
    print("seed", seed)
    chance = random.Random(seed)
    codes = [run(tmp_path / "root", chance.randrange(1, 9)) for _ in range(8)]
    assert -9 in codes
    assert run(tmp_path / "root", None) == 0
    with Persistency(tmp_path / "root") as p:
        log = EventLog(p.open_job("events", feed_changes_max=1_000))
        events = list(commits())
        assert log.taken("commits").result(WAIT) == log.position("lines").result(WAIT) == len(events)
        assert log.read(limit=20_000).result(WAIT) == list(enumerate(events, 1))
        assert totals(log.job) == expected()


def test_the_example_is_a_program(tmp_path: Path) -> None:
    """Without a root it works in a directory of its own and leaves nothing behind; it uses public names only."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parent.parent), "TMPDIR": str(tmp_path)}
    environment.pop("PERSISTENCY_DATA", None)
    command = [sys.executable, "-X", "dev", "-W", "error", "-m", "examples.events"]
    done = subprocess.run(
        command, cwd=EXAMPLE.parent.parent, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "counted up to 2000" in done.stdout
    assert list(tmp_path.iterdir()) == []
    imported = {line.split()[1] for line in EXAMPLE.read_text().splitlines() if line.startswith("from persistency")}
    assert imported == {"persistency"}
