"""Upkeep: when a job wakes by itself, and how rows that have ended are taken away beside its work."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import apsw
import pytest
from fakes import WAIT, Actor, HeldStore

from persistency.actor import upkeep as upkeep_module
from persistency.actor.clock import Clock
from persistency.actor.mailbox import Mailbox
from persistency.actor.upkeep import REAP_ROWS_MAX, REAP_SECONDS, SLEEP_SECONDS_MAX, Upkeep
from persistency.errors import Closed, Corrupt, DiskFull, Poisoned
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import (
    Barrier,
    Batch,
    CountRange,
    GetRow,
    OutcomeUnknown,
    Run,
    SetRow,
    StoreOptions,
    TouchRow,
)
from persistency.storage.sqlite import SqliteStore

T0_MS = 1_700_000_000_000


class Time:
    """The wall clock of a job, in milliseconds, and the steady one its upkeep counts seconds by; both stand still."""

    def __init__(self) -> None:
        self.ms = T0_MS
        self.seconds = 1_000.0

    def read_ms(self) -> int:
        return self.ms

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    """Clocks that only a test moves."""
    time = Time()
    monkeypatch.setattr(upkeep_module, "monotonic", time.monotonic)
    return time


class ReapedStore(HeldStore):
    """A held store that notes the slices it reaps, in line with the groups it runs, and fails one when told to."""

    def __init__(self, options: StoreOptions | None = None) -> None:
        super().__init__(options)
        self.slices: list[int] = []
        self.events: list[Any] = []  # "reap" for a slice, the messages for a group
        self.reaped = threading.Semaphore(0)
        self.reap_errors: list[BaseException] = []
        self.in_apply: Callable[[], None] | None = None
        self.in_reap: Callable[[], None] | None = None

    def apply(self, group: list[Any], now_ms: int) -> list[Any]:
        self.events.append([message for message in group[1::3] if not isinstance(message, SetRow)])
        outcomes = super().apply(group, now_ms)
        if self.in_apply is not None:
            self.in_apply()
        return outcomes

    def reap(self, now_ms: int, limit: int) -> int:
        self.events.append("reap")
        if self.in_reap is not None:
            self.in_reap()
        try:
            if self.reap_errors:
                raise self.reap_errors.pop(0)
            count = super().reap(now_ms, limit)
            self.slices.append(count)
            return count
        finally:
            self.reaped.release()


class Sleeper(Actor):
    """An actor over a `ReapedStore` whose worker notes for how long it goes to sleep."""

    def __init__(self, time: Time, **options: Any) -> None:
        self.kept = ReapedStore()
        super().__init__(start=False, read_ms=time.read_ms, open_store=lambda: self.kept, **options)
        self.store = self.kept
        self.pauses: list[float | None] = []
        self.pausing = threading.Semaphore(0)
        wait = self.mailbox.wait

        def noted(seconds: float | None = None) -> None:
            self.pauses.append(seconds)
            self.pausing.release()
            wait(seconds)

        self.mailbox.wait = noted  # type: ignore[method-assign]
        self.worker.start()
        self.worker.opened.result(WAIT)
        self.wait_paused()

    def wait_paused(self) -> None:
        """Wait until the worker goes to sleep once more."""
        assert self.pausing.acquire(timeout=WAIT)

    def wait_reaped(self) -> None:
        """Wait for one slice more."""
        assert self.kept.reaped.acquire(timeout=WAIT)

    def ending(self, name: bytes, end_ms: int) -> None:
        """Write a row that ends, in this thread: the worker isn't needed for it."""
        message = Batch([None, SetRow(b"c", name, b"x", end_ms), None], 1, False)
        assert self.mailbox.write(message, 1, 2).done()

    def ending_rows(self, count: int, end_ms: int) -> None:
        """Write many such rows at once."""
        rows = [SetRow(b"c", b"%06d" % number, b"x", end_ms) for number in range(count)]
        items = [place for row in rows for place in (None, row, None)]
        assert self.mailbox.write(Batch(items, count, False), count, count).done()

    def rows_left(self) -> int:
        """Return how many rows are there, ended or not."""
        return sum(len(rows.rows) for rows in self.kept._table.categories.values())


# -- when it wakes ------------------------------------------------------------------------------------------------


class Ends:
    """What upkeep needs of a store: when its next row ends."""

    next_expiry_ms: int | None = None


def planner(time: Time) -> tuple[Upkeep, Ends]:
    """Return an upkeep and the store it looks at."""
    store = Ends()
    return Upkeep("job", store, Mailbox(Actor(start=False).mailbox.bounds), Clock(time.read_ms)), store  # type: ignore[arg-type]


def test_the_pause_lasts_until_the_next_row_ends(time: Time) -> None:
    """Promise 9: without rows that end there is no waking; else at the next end, and at least every five minutes."""
    upkeep, store = planner(time)
    assert upkeep.pause() is None
    for left_ms, seconds in ((1, 0.001), (90_000, 90.0), (300_000, 300.0), (10**12, SLEEP_SECONDS_MAX)):
        store.next_expiry_ms = time.ms + left_ms
        assert upkeep.pause() == seconds
    for late_ms in (0, 1, 10**9):
        store.next_expiry_ms = time.ms - late_ms
        assert upkeep.pause() == REAP_SECONDS


def test_a_clock_that_steps_back_is_waited_for(time: Time) -> None:
    """Promise 9: the job's own time stands still until the clock is there again, so nothing can end before."""
    upkeep, store = planner(time)
    store.next_expiry_ms = time.ms + 5_000
    upkeep._clock.now_ms()
    time.ms -= 60_000
    assert upkeep.pause() == 65.0
    time.ms -= 3_600_000
    assert upkeep.pause() == SLEEP_SECONDS_MAX


def test_a_clock_that_stands_still_wakes_nobody_a_thousand_times(time: Time) -> None:
    """Where a whole pause has passed, but no time by the clock, the next one is a second long at least."""
    upkeep, store = planner(time)
    store.next_expiry_ms = time.ms + 1
    assert upkeep.pause() == 0.001
    assert upkeep.pause() == 0.001  # rung meanwhile: no pause has passed yet
    time.seconds += 0.001
    assert upkeep.pause() == REAP_SECONDS
    time.ms += 1
    store.next_expiry_ms = time.ms + 2
    assert upkeep.pause() == 0.002


def test_a_plan_holds_for_its_end_and_later_ones(time: Time) -> None:
    """A worker that sleeps until a row ends needn't be rung for rows that end later, but for those that end earlier."""
    upkeep, store = planner(time)
    assert upkeep.is_planned()  # nothing to plan for
    store.next_expiry_ms = time.ms + 5_000
    assert not upkeep.is_planned()  # nobody has planned yet
    upkeep.pause()
    assert upkeep.is_planned()
    store.next_expiry_ms = time.ms + 6_000
    assert upkeep.is_planned()
    store.next_expiry_ms = time.ms + 4_999
    assert not upkeep.is_planned()
    upkeep.pause()
    time.ms += 4_999
    assert not upkeep.is_planned()  # it is due
    store.next_expiry_ms = None
    assert upkeep.is_planned()
    upkeep.pause()
    store.next_expiry_ms = time.ms + 1
    assert not upkeep.is_planned()


def test_a_job_without_ttl_never_wakes(time: Time) -> None:
    """Rows without a TTL pay nothing: the worker goes to sleep once, without a time, and is left alone."""
    with Sleeper(time) as actor:
        for number in range(500):
            name = b"%d" % number
            assert actor.mailbox.write(Batch([b"c", name, b"x"], 1, False), 1, 2).done()
            assert actor.mailbox.get(b"c", name).result(WAIT) == b"x"
            actor.mailbox.read(CountRange(b"c", b"", None)).result(WAIT)
            actor.mailbox.write(Barrier(), 0, 0, free=True).result(WAIT)
            time.ms += 1_000
        assert actor.pauses == [None]
        assert actor.kept.events.count("reap") == 0


def test_a_write_in_place_that_ends_earlier_wakes_the_worker(time: Time) -> None:
    """An in-place write rings the sleeping worker only if its row ends before the worker would wake."""
    with Sleeper(time) as actor:
        for seconds, wakes in ((100, True), (200, False), (100, False), (50, True), (60, False), (10, True)):
            actor.ending(b"%d" % seconds, time.ms + seconds * 1_000)
            if wakes:
                actor.wait_paused()
        assert actor.pauses == [None, 100.0, 50.0, 10.0]


def test_a_touch_in_place_wakes_the_worker_too(time: Time) -> None:
    """A row that is given an earlier end counts as one that was written with it."""
    with Sleeper(time) as actor:
        actor.ending(b"k", time.ms + 100_000)
        actor.wait_paused()
        assert actor.mailbox.write(TouchRow(b"c", b"k", time.ms + 7_000), 1, 2).result(WAIT) is True
        actor.wait_paused()
        assert actor.pauses == [None, 100.0, 7.0]


def test_an_idle_job_wakes_for_its_next_end_by_itself(time: Time) -> None:
    """Promise 9: an open idle job wakes for its next expiry; nobody rings, posts or reads."""
    with Sleeper(time) as actor:
        actor.ending(b"later", time.ms + 3_600_000)
        actor.wait_paused()
        actor.ending(b"k", time.ms + 50)
        actor.wait_paused()
        time.ms += 50
        actor.wait_reaped()
        assert actor.kept.slices == [1]
        assert actor.rows_left() == 1


def test_a_failed_group_leaves_no_plan_behind(time: Time) -> None:
    """A row whose batch was undone is nothing to wake for."""
    with Sleeper(time) as actor:

        def raises(within: Any) -> None:
            within.do(SetRow(b"c", b"k", b"x", time.ms + 5_000))
            raise KeyError("no")

        assert isinstance(actor.mailbox.write(Run(raises), 1, 0).exception(WAIT), KeyError)
        actor.mailbox.ring()
        actor.wait_paused()
        assert actor.pauses == [None, None]


# -- slices -------------------------------------------------------------------------------------------------------


def test_no_slice_takes_more_than_a_thousand_rows(time: Time) -> None:
    """S0-43: an idle job takes all that has ended away, in slices of 1,000 rows, each a turn of its own."""
    with Sleeper(time) as actor:
        actor.ending_rows(3_500, time.ms + 60_000)
        actor.wait_paused()
        time.ms += 60_000
        actor.mailbox.ring()
        for _ in range(4):
            actor.wait_reaped()
        actor.wait_paused()
        assert actor.kept.slices == [1_000, 1_000, 1_000, 500]
        assert max(actor.kept.slices) == REAP_ROWS_MAX
        assert actor.rows_left() == 0
        assert actor.pauses[-1] is None


def test_what_comes_during_a_slice_is_answered_before_the_next(time: Time) -> None:
    """Promise 9: nobody's answer waits for more than one slice, and none starts while somebody waits."""
    with Sleeper(time) as actor:
        actor.ending_rows(2_500, time.ms + 60_000)
        actor.wait_paused()
        replies = []

        def ask() -> None:
            replies.append(actor.mailbox.ask(GetRow(b"c", b"none%d" % len(replies)), reads=True))

        actor.kept.in_reap = ask
        del actor.kept.events[:]
        time.ms += 60_000
        actor.mailbox.ring()
        for _ in range(3):
            actor.wait_reaped()
        actor.mailbox.ask(Barrier(), reads=False, free=True).result(WAIT)
        assert [reply.result(WAIT) for reply in replies] == [None] * 3
        seen = [event if event == "reap" else "group" for event in actor.kept.events]
        # Time stands still, so only an idle job reaps: each slice is followed by the group that came meanwhile.
        assert seen[:6] == ["reap", "group"] * 3


def test_under_a_steady_trickle_one_slice_a_second_begins(time: Time) -> None:
    """Promise 9: where the mailbox always has work, a slice begins once a second and not more often."""
    with Sleeper(time) as actor:
        actor.ending_rows(50_000, time.ms + 60_000)
        actor.wait_paused()
        actor.hold()
        time.ms += 60_000
        groups, done = 200, threading.Event()
        ran = 0

        def trickle() -> None:
            nonlocal ran
            ran += 1
            time.seconds += REAP_SECONDS / 10
            if ran < groups:
                actor.put(b"trickle")  # before the group's turn ends: there is always something waiting
            else:
                done.set()
                actor.kept.gate.clear()
                actor.put(b"last")  # held at the gate, so that the job isn't idle now

        del actor.kept.events[:]
        actor.kept.in_apply = trickle
        actor.put(b"trickle")
        actor.let_go()
        assert done.wait(WAIT)
        reaps = [at for at, event in enumerate(actor.kept.events) if event == "reap"]
        actor.kept.in_apply = None
        assert 19 <= len(reaps) <= 21
        # Ten groups make a second, and the slice itself is one event.
        assert min(later - earlier for earlier, later in pairwise(reaps)) >= 10
        assert set(actor.kept.slices) == {REAP_ROWS_MAX}


def test_a_busy_mailbox_starts_no_slice_within_the_second(time: Time) -> None:
    """Promise 9: in the second after a slice none starts while there is work, however much has ended."""
    with Sleeper(time) as actor:
        actor.ending_rows(5_000, time.ms + 60_000)
        actor.wait_paused()
        answered = threading.Event()
        asked = 0

        def ask_again() -> None:
            nonlocal asked
            asked += 1
            if asked < 300:
                actor.put(b"more")
            else:
                actor.kept.gate.clear()
                actor.put(b"held")
                answered.set()

        def first_slice() -> None:
            actor.kept.in_reap = None
            actor.kept.in_apply = ask_again
            actor.put(b"more")

        actor.kept.in_reap = first_slice
        time.ms += 60_000
        actor.mailbox.ring()
        assert answered.wait(WAIT)
        assert actor.kept.slices == [REAP_ROWS_MAX]
        actor.kept.in_apply = None


# -- ending -------------------------------------------------------------------------------------------------------


def test_reaping_stops_for_a_closing(time: Time) -> None:
    """S0-45, S0-46: close doesn't wait for rows that have ended; the slice at hand is the last."""
    with Sleeper(time) as actor:
        actor.ending_rows(10_000, time.ms + 60_000)
        actor.wait_paused()
        actor.kept.in_reap = actor.worker.close
        time.ms += 60_000
        actor.mailbox.ring()
        actor.worker.closed.result(WAIT)
        assert actor.kept.slices == [REAP_ROWS_MAX]
        with pytest.raises(Closed):
            actor.put(b"late")


def test_reaping_stops_for_a_retirement(time: Time) -> None:
    """At the exit of the interpreter nothing is reaped any more, neither by the worker nor by late posters."""
    with Sleeper(time) as actor:
        actor.ending_rows(10_000, time.ms + 60_000)
        actor.wait_paused()
        retired = []
        actor.kept.in_reap = lambda: retired.append(actor.worker.retire())
        time.ms += 60_000
        actor.mailbox.ring()
        actor.wait_reaped()
        retired[0].result(WAIT)
        time.seconds += 10 * REAP_SECONDS
        actor.put(b"late")
        assert actor.mailbox.get(b"c", b"late").result(WAIT) == b"x"
        assert actor.kept.slices == [REAP_ROWS_MAX]


# -- failing ------------------------------------------------------------------------------------------------------


def test_a_slice_that_fails_is_tried_again_later(time: Time) -> None:
    """A full disk harms nobody: the slice is tried again a second later, not at once, and the job goes on meanwhile."""
    with Sleeper(time) as actor:
        actor.ending_rows(10, time.ms + 60_000)
        actor.wait_paused()
        actor.kept.reap_errors.append(DiskFull("no room"))
        time.ms += 60_000
        actor.mailbox.ring()
        actor.wait_reaped()
        for _ in range(20):
            actor.mailbox.ring()
            actor.wait_paused()
        assert actor.kept.events.count("reap") == 1
        assert actor.worker.statistics().state == "live"
        actor.put(b"k")
        assert actor.mailbox.get(b"c", b"k").result(WAIT) == b"x"
        time.seconds += REAP_SECONDS
        actor.mailbox.ring()
        actor.wait_reaped()
        assert actor.kept.slices == [10]


def test_a_failed_slice_is_tried_again_without_anybody_coming(time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker doesn't sleep on while rows that have ended are still there: it comes back as soon as it may."""
    with Sleeper(time) as actor:
        actor.ending_rows(10, time.ms + 60_000)
        actor.wait_paused()
        actor.kept.reap_errors.append(DiskFull("no room"))
        monkeypatch.setattr(upkeep_module, "REAP_SECONDS", 0.02)
        time.ms += 60_000
        actor.mailbox.ring()
        actor.wait_reaped()
        actor.wait_paused()
        time.seconds += 1
        actor.wait_reaped()
        assert actor.kept.slices == [10]
        assert actor.pauses[2] == 0.02


@pytest.mark.parametrize("error", [Corrupt("a bad page"), OutcomeUnknown("a failed sync")])
def test_a_slice_poisons_only_for_what_nothing_can_mend(time: Time, error: Exception) -> None:
    """Promise 3: a corrupt file or a commit that nobody knows of poisons the job; its cause is told."""
    with Sleeper(time) as actor:
        actor.ending_rows(10, time.ms + 60_000)
        actor.wait_paused()
        actor.kept.reap_errors.append(error)
        time.ms += 60_000
        actor.mailbox.ring()
        actor.wait_reaped()
        actor.wait_paused()
        assert actor.worker.statistics().state == "poisoned"
        with pytest.raises(Poisoned) as caught:
            actor.put(b"k")
        assert caught.value.__cause__ is error
        assert actor.kept.events.count("reap") == 1


# -- from the file ------------------------------------------------------------------------------------------------


def stepped(store: SqliteStore, act: Callable[[], object]) -> int:
    """Return how many steps of SQLite's virtual machine something takes."""
    steps = 0

    def note(event: dict[str, Any]) -> None:
        nonlocal steps
        steps += event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]

    store._connection.trace_v2(apsw.SQLITE_TRACE_PROFILE, note)
    act()
    store._connection.trace_v2(0)
    return steps


def test_rows_without_an_end_are_not_looked_at(tmp_path: Path) -> None:
    """Reaping goes by the partial index: the same steps beside 20,000 rows that don't end as beside 20."""
    steps = []
    for number, permanent in enumerate((20, 20_000)):
        store = DirectoryRoot(tmp_path).open(f"job{number}", StoreOptions())
        rows = [place for at in range(permanent) for place in (b"c", b"p%06d" % at, b"x")]
        ending = [place for at in range(50) for place in (None, SetRow(b"c", b"e%06d" % at, b"x", T0_MS), None)]
        store.apply(rows + ending, T0_MS - 1)
        assert isinstance(store, SqliteStore)
        steps.append(stepped(store, lambda store=store: store.reap(T0_MS, REAP_ROWS_MAX)))  # type: ignore[misc]
        assert store.next_expiry_ms is None
        assert store.read(CountRange(b"c", b"", None), T0_MS - 1) == permanent
        store.close()
    assert steps[0] == steps[1]


class Logging:
    """What upkeep needs of a store with a log: it notes for what limit it was asked, and is due at the lower one."""

    next_expiry_ms: int | None = None
    last_version = 0
    unsynced = False

    def __init__(self) -> None:
        self.asked: list[bool] = []
        self.checkpoints = 0

    def checkpoint_due(self, *, idle: bool) -> bool:
        self.asked.append(idle)
        return idle

    def checkpoint(self) -> None:
        self.checkpoints += 1

    def fold(self) -> bool:
        return True

    def settle(self) -> None:
        return None


def test_who_asks_beside_a_producer_waits_for_short_checkpoints(time: Time) -> None:
    """The log is carried over at its lower limit once a request has waited in the line, and then not again for that."""
    store, mailbox = Logging(), Mailbox(Actor(start=False).mailbox.bounds)
    upkeep = Upkeep("job", store, mailbox, Clock(time.read_ms))  # type: ignore[arg-type]  # all it needs of a store
    mailbox.put(b"c", b"k", b"v", 2)
    assert upkeep.next_step(reaps=False) is None
    mailbox.ask(GetRow(b"c", b"k"), reads=True)
    step = upkeep.next_step(reaps=False)
    assert step is not None
    step()
    assert store.checkpoints == 1
    assert upkeep.next_step(reaps=False) is None
    assert store.asked == [False, True, False]
