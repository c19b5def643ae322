"""The ordered log: beside a model; appended to by many at once; consumed by those that are killed; and its promises."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from persistency import (
    CBOR,
    RAW,
    Closed,
    Conflict,
    Corrupt,
    FeedTruncated,
    Job,
    Misuse,
    Persistency,
    Poisoned,
    QuotaExceeded,
    Transaction,
    typed,
)
from persistency.recipes import Baton, Consumer, LogRecord, OrderedLog
from persistency.recipes.orderedlog_rows import Rows
from persistency.recipes.waiting import Bell
from persistency.testing import ManualClock
from tests.loops import InLoop, in_loop, together
from tests.soak.logs import crowd, holes, trial

__all__ = ["in_loop"]  # a fixture

WAIT = 30.0
SEED = 20_261_122


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still."""
    return ManualClock()


@pytest.fixture
def job(clock: ManualClock) -> Iterator[Job]:
    """Give an empty job."""
    with Persistency(":memory:", clock=clock) as p, p.open_job("events") as opened:
        yield opened


@pytest.fixture
def log(job: Job) -> OrderedLog[Any]:
    """Give an empty log."""
    return OrderedLog(job)


def numbers(records: list[LogRecord[Any]]) -> list[int]:
    """The numbers of records."""
    return [record.number for record in records]


# -- beside a model ------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c"])
NUMBERS = st.integers(0, 12)


class Shared:
    """A runner that stands for a baton: other processes may change its job."""

    poll = 0.001

    def __init__(self, job: Job) -> None:
        self.id, self.run = job.id, job.run


class LogMachine(RuleBasedStateMachine):
    """A log and its consumers beside a list and a dict of positions."""

    @initialize(shared=st.booleans())
    def begin(self, shared: bool) -> None:
        self.clock = ManualClock()
        self.persistency = Persistency(":memory:", clock=self.clock)
        self.job = self.persistency.open_job("events")
        self.runner: Any = Shared(self.job) if shared else self.job
        self.records: list[LogRecord[int]] = []  # all there ever were
        self.trimmed = 0
        self.positions: dict[str, int] = {}
        self.starts: dict[str, str] = {}
        self.consumers: dict[str, Consumer[int]] = {}
        self.again()

    @rule()
    def again(self) -> None:
        """Use another object of the same log: nothing is kept in one."""
        self.log: OrderedLog[int] = OrderedLog(self.runner)
        self.consumers.clear()

    def appended(self, values: list[int]) -> list[int]:
        """Tell the model; return the numbers that are due."""
        first = len(self.records) + 1
        at_ms = round(self.clock.now * 1000)
        self.records += [LogRecord(first + nth, value, at_ms) for nth, value in enumerate(values)]
        return list(range(first, first + len(values)))

    def entered(self, name: str) -> Consumer[int]:
        if name not in self.consumers:
            start: Any = self.starts.setdefault(name, ["first", "last"][len(self.starts) % 2])
            self.consumers[name] = self.log.consumer(name, start=start)
        self.positions.setdefault(name, self.trimmed if self.starts[name] == "first" else len(self.records))
        return self.consumers[name]

    def due(self, after: int, limit: int) -> Any:
        if after < self.trimmed:
            return self.trimmed + 1
        return self.records[after : after + limit]

    def outcome(self, ask: Callable[[], Any]) -> Any:
        try:
            return ask().result()
        except FeedTruncated as error:
            return error.oldest

    @rule(value=st.integers())
    def append(self, value: int) -> None:
        assert [self.log.append(value).result()] == self.appended([value])

    @rule(values=st.lists(st.integers(), max_size=5))
    def append_many(self, values: list[int]) -> None:
        assert list(self.log.append_many(iter(values)).result()) == self.appended(values)

    @rule(value=st.integers(), fails=st.booleans())
    def append_in(self, value: int, fails: bool) -> None:
        def program(tx: Transaction) -> int:
            number = self.log.append_in(tx, value)
            if fails:
                raise LookupError
            return number

        reply = self.job.run(program)
        if fails:
            with pytest.raises(LookupError):
                reply.result()
        else:
            assert [reply.result()] == self.appended([value])

    @rule(after=NUMBERS, limit=st.integers(1, 4))
    def read(self, after: int, limit: int) -> None:
        assert self.outcome(lambda: self.log.read(after, limit)) == self.due(after, limit)

    @rule(name=NAMES, limit=st.integers(1, 4))
    def take(self, name: str, limit: int) -> None:
        consumer = self.entered(name)
        assert self.outcome(lambda: consumer.take(limit)) == self.due(self.positions[name], limit)

    @rule(name=NAMES, count=st.integers(1, 4))
    def loop(self, name: str, count: int) -> None:
        """Go through some records and leave the last one's body by a `break`."""
        consumer, position = self.entered(name), self.positions[name]
        due = self.due(position, count)
        if not isinstance(due, list) or len(due) < count:
            return
        found = []
        for record in consumer:
            found.append(record)
            if len(found) == count:
                break
        assert found == due
        self.positions[name] = position + count - 1

    @rule(name=NAMES, number=NUMBERS, inside=st.booleans())
    def commit(self, name: str, number: int, inside: bool) -> None:
        consumer, position = self.entered(name), self.positions[name]
        number = max(1, number)

        def ask() -> bool:
            if not inside:
                return consumer.commit(number).result()
            try:
                self.job.run(consumer.commit_in, number).result()
            except Conflict:
                return False
            return True

        if number > len(self.records):
            with pytest.raises(Misuse, match="there is no record"):
                ask()
        else:
            assert ask() is (position < number)
            self.positions[name] = max(position, number)

    @rule(name=NAMES, number=NUMBERS)
    def reset(self, name: str, number: int) -> None:
        consumer = self.entered(name)
        if number > len(self.records):
            with pytest.raises(Misuse, match="there is no record"):
                consumer.reset(number).result()
        else:
            assert consumer.reset(number).result() is None  # type: ignore[func-returns-value]
            self.positions[name] = number

    @rule(name=NAMES)
    def drop(self, name: str) -> None:
        assert self.log.drop_consumer(name).result() is (self.positions.pop(name, None) is not None)
        self.consumers.pop(name, None)

    @rule(
        keep_last=st.integers(0, 3),
        keep_s=st.sampled_from([0, 1, 10]),
        despite=st.booleans(),
        limit=st.sampled_from([1, 3, 100]),
    )
    def trim(self, keep_last: int, keep_s: int, despite: bool, limit: int) -> None:
        if despite and not keep_last and not keep_s:
            return
        now_ms = round(self.clock.now * 1000)
        gone = 0
        for record in self.records[self.trimmed :]:
            done = despite or (bool(self.positions) and min(self.positions.values()) >= record.number)
            kept = record.number > len(self.records) - keep_last or (keep_s and record.at_ms > now_ms - keep_s * 1000)
            if not done or kept or gone == limit:
                break
            gone += 1
        options: dict[str, Any] = {"keep_last": keep_last, "keep_ms": timedelta(seconds=keep_s), "limit": limit}
        assert self.log.trim(**options, despite_consumers=despite).result() == gone
        self.trimmed += gone

    @rule(seconds=st.sampled_from([0.5, 1, 20]))
    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "log"):
            assert self.log.last().result() == len(self.records)
            assert self.log.first().result() == self.trimmed + 1
            assert self.log.consumers().result() == self.positions
            for name, consumer in self.consumers.items():
                if name in self.positions:
                    assert consumer.position().result() == self.positions[name]
                    assert consumer.lag().result() == len(self.records) - self.positions[name]
            rows = len(self.records) - self.trimmed + len(self.positions) + (self.trimmed > 0)
            assert self.job.count("log").result() == rows

    def teardown(self) -> None:
        if hasattr(self, "persistency"):
            self.persistency.close()


def run_model(**options: Any) -> None:
    """Run the machine."""
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        LogMachine, settings=settings(deadline=None, database=None, **options)
    )


def test_it_does_what_a_list_would() -> None:
    """In any order of calls, on a job and on a stand-in for a baton, by several objects, it does what a model says."""
    run_model(max_examples=60, stateful_step_count=30)


def _forgets_where_it_was(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Rows, "first", lambda rows, tx: 1)


def _goes_backwards(patch: pytest.MonkeyPatch) -> None:
    really = Rows.commit

    def commit(rows: Rows, tx: Transaction, name: str, at_end: bool, number: int, before: int | None) -> bool:
        moved = really(rows, tx, name, at_end, number, before)
        tx.put(rows.category, ("consumer", name), CBOR.encode(number))
        return moved

    patch.setattr(Rows, "commit", commit)


def _trims_too_much(patch: pytest.MonkeyPatch) -> None:
    really = Rows.trim

    def trim(rows: Rows, tx: Transaction, keep_last: int, keep_ms: int, _despite: bool, limit: int) -> int:
        return really(rows, tx, keep_last, keep_ms, True, limit)

    patch.setattr(Rows, "trim", trim)


@pytest.mark.parametrize("plant", [_forgets_where_it_was, _goes_backwards, _trims_too_much])
def test_the_model_sees_planted_defects(
    monkeypatch: pytest.MonkeyPatch, plant: Callable[[pytest.MonkeyPatch], None]
) -> None:
    """What was trimmed is read as if it had never been; positions go back; a trim takes what somebody has to read."""
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        run_model(max_examples=200, phases=[Phase.generate], derandomize=True)


# -- many at once --------------------------------------------------------------------------------------------------


def test_16_threads_append_without_holes(tmp_path: Path) -> None:
    """And each thread's records are in the order it appended them; so it is after a restart."""
    with Persistency(tmp_path) as p, p.open_job("events") as job:
        log = OrderedLog(job)

        def append(nth: int) -> None:
            replies = [log.append([f"t{nth}", value]) for value in range(100)]
            assert [reply.result(WAIT) for reply in replies] == sorted(reply.result() for reply in replies)

        with ThreadPoolExecutor(16) as pool:
            list(pool.map(append, range(16)))
        assert holes(log, 16, 100) == []
    with Persistency(tmp_path) as p, p.open_job("events") as job:
        assert holes(OrderedLog(job), 16, 100) == []
        assert OrderedLog(job).append("one more").result() == 1_601


def test_processes_append_by_batons_without_holes(tmp_path: Path) -> None:
    """Two processes of two threads each."""
    assert crowd(tmp_path, 2, 2, 20) == []


def test_holes_are_seen(log: OrderedLog[Any], job: Job) -> None:
    """A planted defect: a record that is missing."""
    log.append_many([["a", 0], ["a", 1], ["a", 2]]).result()
    job.delete("log", ("record", 2))
    assert [finding.split(":")[0] for finding in holes(log, 1, 3)] == ["hole", "order"]


@pytest.mark.parametrize("how", ["exactly", "at least", "shared"])
def test_killed_consumers_skip_nothing(tmp_path: Path, how: str) -> None:
    """SIGKILL in the middle, again and again: exactly once with `commit_in`, at least once in a loop, by batons too."""
    wrong, killed = trial(tmp_path, how, 60, 3, SEED)
    assert (wrong, killed) == ([], 3)


@pytest.mark.parametrize(("plant", "how", "kind"), [("beside", "exactly", "twice"), ("before", "at least", "lost")])
def test_the_kills_see_a_planted_defect(tmp_path: Path, plant: str, how: str, kind: str) -> None:
    """Effects beside the position's transaction are done twice; a position that moves too early loses records."""
    for nth in range(5):
        wrong, _ = trial(tmp_path / str(nth), how, 60, 4, SEED + nth, plant)
        if any(finding.startswith(kind) for finding in wrong):
            return
    pytest.fail(f"not seen in 20 kills from seed {SEED}")


# -- waiting -------------------------------------------------------------------------------------------------------


def test_a_waiting_thread_is_woken_by_every_kind_of_append(job: Job, log: OrderedLog[Any]) -> None:
    """Also by another object of the same log, and by a transaction that appends."""
    other: OrderedLog[Any] = OrderedLog(job)
    appends: list[Callable[[], Any]] = [
        lambda: log.append("x"),
        lambda: other.append_many(["y"]),
        lambda: job.run(lambda tx: other.append_in(tx, "z")),
    ]
    consumer = log.consumer("c")
    with ThreadPoolExecutor(1) as pool:
        for nth, append in enumerate(appends, 1):
            waiting = pool.submit(consumer.next, WAIT)
            listens(log)
            append().result()
            assert waiting.result(WAIT).number == nth
            assert consumer.commit(nth).result()


def listens(log: OrderedLog[Any], count: int = 1) -> None:
    """Return when so many wait for a record."""
    while log._rows.bell.listeners < count:
        threading.Event().wait(0.001)


def test_tasks_wait_for_records(job: Job, log: OrderedLog[Any], in_loop: InLoop) -> None:
    """Under each loop: `anext`, `async for`, and a thread that appends."""

    async def main() -> list[Any]:
        consumer = log.consumer("c")
        found: list[Any] = []

        async def consume() -> None:
            assert (await consumer.anext(WAIT)).value == 0
            async for record in consumer:
                found.append(record.value)
                if record.value == 4:
                    consumer.close()

        async def append() -> None:
            for value in range(5):
                await anyio.to_thread.run_sync(listens, log) if value in (0, 3) else None
                await log.append(value)

        await together(consume, append)
        return found

    assert in_loop(main) == [0, 1, 2, 3, 4]
    assert log.consumers().result() == {"c": 5}


def test_a_cancelled_wait_leaves_nothing_behind(log: OrderedLog[Any], in_loop: InLoop) -> None:
    """The next one gets the record, and nobody listens any more."""

    async def main() -> Any:
        consumer = log.consumer("c")
        async with anyio.create_task_group() as group:
            group.start_soon(consumer.anext)
            await anyio.to_thread.run_sync(listens, log)
            group.cancel_scope.cancel()
        assert log._rows.bell.listeners == 0
        await log.append("a")
        return (await consumer.anext(WAIT)).value

    assert in_loop(main) == "a"


def test_waiting_has_a_bound(log: OrderedLog[Any], in_loop: InLoop) -> None:
    """`TimeoutError`, and with 0 after one look."""
    consumer = log.consumer("c")
    for seconds in (0, 0.01):
        with pytest.raises(TimeoutError, match="nothing to take"):
            consumer.next(seconds)
        with pytest.raises(TimeoutError, match="nothing to take"):
            in_loop(functools.partial(consumer.anext, seconds))
    log.append("a").result()
    assert consumer.next(0).value == "a"


def test_a_record_of_another_process_is_seen_by_polling(tmp_path: Path) -> None:
    """A baton's consumer looks again by itself: nobody rings for what another process appends."""
    with Persistency(tmp_path) as p, Baton(p, "events", poll=0.005) as baton:
        log: OrderedLog[str] = OrderedLog(baton)
        consumer = log.consumer("c")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(consumer.next, WAIT)
            listens(log)

            def append(tx: Transaction) -> None:  # as another process would: without a bell of this one
                Rows("log", Bell()).append(tx, [CBOR.encode("theirs")])

            baton.run(append).result()
            assert waiting.result(WAIT).value == "theirs"


def test_close_ends_loops_and_waits(log: OrderedLog[Any], in_loop: InLoop) -> None:
    """From another thread; the position stays."""
    log.append_many("ab").result()
    consumer = log.consumer("c")
    with ThreadPoolExecutor(1) as pool:
        looping = pool.submit(lambda: [record.value for record in consumer])
        while consumer.lag().result():
            threading.Event().wait(0.001)
        listens(log)
        consumer.close()
        assert looping.result(WAIT) == ["a", "b"]
    with pytest.raises(Closed):
        consumer.next()
    with pytest.raises(Closed):
        in_loop(consumer.anext)
    assert list(consumer) == []
    with log.consumer("c") as again:
        assert again.position().result() == 2
    assert list(again) == []

    async def main() -> list[Any]:
        async with log.consumer("c") as third:
            assert await third.position() == 2
        return [record async for record in third]

    assert in_loop(main) == []


def test_who_waits_is_told_that_the_job_was_closed() -> None:
    """Nobody waits for ever."""
    with Persistency(":memory:") as p:
        job = p.open_job("events")
        log = OrderedLog(job)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(log.consumer("c").next)
            listens(log)
            job.close()
            with pytest.raises(Closed):
                waiting.result(WAIT)


def test_who_waits_is_told_that_the_job_can_not_go_on(tmp_path: Path, in_loop: InLoop) -> None:
    """A job whose file was taken away fails what it is asked, and rings no bell; in threads and in loops."""
    with Persistency(tmp_path) as p:
        job = p.open_job("events")
        log = OrderedLog(job)
        consumer = log.consumer("c")
        consumer.position().result()
        with ThreadPoolExecutor(2) as pool:
            waiting = pool.submit(consumer.next), pool.submit(in_loop, consumer.anext)
            listens(log, 2)
            assert job.path is not None
            job.path.unlink()
            with pytest.raises(Poisoned):
                job.run(lambda tx: tx.put("other", (1,), b"")).result()
            for one in waiting:
                with pytest.raises(Poisoned):
                    one.result(WAIT)


# -- consumers -----------------------------------------------------------------------------------------------------


def test_a_record_whose_body_was_left_comes_again(log: OrderedLog[Any], in_loop: InLoop) -> None:
    """By `break` or an error; those before it don't."""
    log.append_many(range(5)).result()
    consumer = log.consumer("c")
    for record in consumer:
        if record.value == 1:
            break
    loop = iter(consumer)
    assert [next(loop).value, next(loop).value] == [1, 2]  # an error in this one's body: nobody asks for another
    assert consumer.next().value == 2

    async def main() -> None:
        async for record in consumer:
            if record.value == 4:
                break

    in_loop(main)
    assert consumer.position().result() == 4


def test_of_two_consumers_of_one_name_the_one_behind_is_told(job: Job, log: OrderedLog[Any]) -> None:
    """The position never goes backwards, and effects in its transaction are done once."""
    log.append_many(range(1, 6)).result()
    one, other = log.consumer("c"), log.consumer("c")
    assert one.take().result() == other.take().result()
    assert one.commit(3).result() is True
    assert other.commit(2).result() is False
    assert other.commit(3).result() is False

    def effect(tx: Transaction, consumer: Consumer[Any], number: int) -> None:
        tx.increment("effects", (number,))
        consumer.commit_in(tx, number)

    job.run(effect, one, 4).result()
    with pytest.raises(Conflict) as caught:
        job.run(effect, other, 4).result()
    assert "nothing of this transaction was applied" in caught.value.hint
    assert str(caught.value).endswith("expected a position before 4, found position 4")
    assert job.increment("effects", (4,), 0).result() == 1
    assert other.commit(5).result() is True
    assert one.position().result() == 5


def test_a_loop_goes_on_where_another_consumer_or_a_reset_has_moved_it(log: OrderedLog[Any]) -> None:
    """Though it has read further ahead: what is next is what is behind the position."""
    log.append_many(range(1, 11)).result()
    consumer = log.consumer("c")
    seen = []
    for record in consumer:
        seen.append(record.number)
        if seen == [1, 2]:
            log.consumer("c").commit(7).result()
        if seen == [1, 2, 8]:
            consumer.reset(3).result()
        if len(seen) == 6:
            break
    assert seen == [1, 2, 8, 4, 5, 6]


def test_a_new_consumer_begins_where_it_says(log: OrderedLog[Any]) -> None:
    """With the first record that is kept, or behind the last one; and only when it is new."""
    log.append_many("abc").result()
    late = log.consumer("late", start="last")
    log.append("d").result()
    assert [record.value for record in late.take().result()] == ["d"]
    log.consumer("all").commit(2).result()
    assert log.trim().result() == 2
    assert [record.value for record in log.consumer("new").take().result()] == ["c", "d"]
    assert log.consumer("late", start="first").position().result() == 3
    assert log.consumers().result() == {"late": 3, "all": 2, "new": 2}


def test_a_consumer_holds_up_trim_from_its_making(log: OrderedLog[Any]) -> None:
    """Before it has taken anything."""
    log.append_many("abc").result()
    done = log.consumer("done")
    done.commit(3).result()
    log.consumer("new")
    assert log.trim().result() == 0
    assert log.drop_consumer("new").result() is True
    assert log.drop_consumer("new").result() is False
    assert log.trim().result() == 3


# -- trimming and reading ------------------------------------------------------------------------------------------


def test_without_consumers_nothing_is_trimmed(log: OrderedLog[Any]) -> None:
    """Nobody has read it; unless it is said that that doesn't matter."""
    log.append_many(range(10)).result()
    assert log.trim().result() == log.trim(keep_last=3).result() == 0
    assert log.trim(keep_last=3, despite_consumers=True).result() == 7
    with pytest.raises(Misuse, match="despite_consumers needs"):
        log.trim(despite_consumers=True)


def test_who_is_behind_what_was_trimmed_is_told_where_to_go_on(log: OrderedLog[Any]) -> None:
    """`FeedTruncated`, of reads, takes, waits and loops; and from its `oldest` it goes on."""
    log.append_many(range(1, 11)).result()
    consumer = log.consumer("slow")
    log.trim(keep_last=3, despite_consumers=True).result()
    asks: list[Callable[[], Any]] = [
        lambda: log.read().result(),
        lambda: consumer.take().result(),
        lambda: consumer.next(),
        lambda: next(iter(consumer)),
    ]
    for ask in asks:
        with pytest.raises(FeedTruncated) as caught:
            ask()
        assert caught.value.oldest == log.first().result() == 8
        assert "after=7" in caught.value.hint
    consumer.reset(7).result()
    assert numbers(consumer.take().result()) == numbers(log.read(7).result()) == [8, 9, 10]


def test_numbers_go_on_when_everything_was_trimmed(tmp_path: Path) -> None:
    """After a restart, too."""
    with Persistency(tmp_path) as p, p.open_job("events") as job:
        log = OrderedLog(job)
        log.append_many("abc").result()
        log.consumer("c").commit(3).result()
        assert log.trim().result() == 3
    with Persistency(tmp_path) as p, p.open_job("events") as job:
        log = OrderedLog(job)
        assert (log.first().result(), log.last().result(), log.read(3).result()) == (4, 3, [])
        assert log.append("d").result() == 4


def test_young_records_are_kept(log: OrderedLog[Any], clock: ManualClock) -> None:
    """To the millisecond: one that is as old as `keep_ms` goes."""
    for value in range(10):
        log.append(value).result()
        clock.advance(1)
    log.consumer("c").commit(10).result()
    assert log.trim(keep_ms=5_001).result() == 5
    assert log.trim(keep_ms=5_000).result() == 1
    assert log.trim(keep_ms=timedelta(seconds=2), keep_last=4).result() == 0
    assert log.trim(keep_ms=1_000, limit=2).result() == 2


@pytest.mark.parametrize("keep_ms", [0.4, 0.5, timedelta(microseconds=1)])
def test_a_part_of_a_millisecond_is_kept_as_a_whole_one(log: OrderedLog[Any], clock: ManualClock, keep_ms: Any) -> None:
    """It isn't none, with which all would go."""
    log.append_many(range(10)).result()
    assert log.trim(keep_ms=keep_ms, despite_consumers=True).result() == 0
    clock.advance(0.001)
    log.append("young").result()
    assert log.trim(keep_ms=keep_ms, despite_consumers=True).result() == 10


def test_a_timedelta_is_what_it_says(log: OrderedLog[Any], clock: ManualClock) -> None:
    """To the millisecond, where seconds as a float would be a little more."""
    log.append("a").result()
    clock.advance(4.035)
    log.consumer("c").commit(1).result()
    assert log.trim(keep_ms=timedelta(milliseconds=4_036)).result() == 0
    assert log.trim(keep_ms=timedelta(milliseconds=4_035)).result() == 1


def test_a_read_is_bounded_by_bytes_too(log: OrderedLog[Any]) -> None:
    """Some 16 MiB: records may be large."""
    raw: OrderedLog[bytes] = OrderedLog(log._runner, "raw", codec=RAW)
    raw.append_many([bytes(6 * 2**20)] * 5).result()
    assert numbers(raw.read().result()) == [1, 2, 3]
    assert numbers(raw.consumer("c").take().result()) == [1, 2, 3]


def test_records_tell_when_they_were_appended(log: OrderedLog[Any], clock: ManualClock) -> None:
    """By the job's clock, in Unix milliseconds; in the file each is one CBOR item."""
    log.append({"a": 1}).result()
    clock.advance(1.5)
    log.append("b").result()
    start_ms = round(clock.now * 1000) - 1_500
    assert log.read().result() == [LogRecord(1, {"a": 1}, start_ms), LogRecord(2, "b", start_ms + 1_500)]
    (row, _) = log._runner.scan_prefix("log", ("record",)).result()  # type: ignore[attr-defined]
    assert CBOR.decode(row.payload) == [start_ms, {"a": 1}]


@dataclass
class Event:
    """A value of a class of its own."""

    name: str


def test_a_codec_keeps_other_types(job: Job) -> None:
    """And what can't be encoded is refused at the call."""
    log: OrderedLog[Event] = OrderedLog(job, "typed", codec=typed(Event))
    log.append(Event("a")).result()
    assert log.consumer("c").next().value == Event("a")
    for wrong in (lambda: log.append("b"), lambda: log.append_many([Event("a"), "b"])):  # type: ignore[arg-type, list-item]
        with pytest.raises(Misuse):
            wrong()
    with pytest.raises(Misuse):
        job.run(log.append_in, "b").result()  # type: ignore[arg-type]
    assert log.last().result() == 1


def test_several_logs_share_a_job(job: Job, log: OrderedLog[Any]) -> None:
    """By their names."""
    other: OrderedLog[Any] = OrderedLog(job, "other")
    log.append_many("abc").result()
    assert other.append("x").result() == 1
    assert (other.name, log.name) == ("other", "log")
    assert numbers(other.read().result()) == [1]


def test_an_append_that_fails_takes_no_number(tmp_path: Path) -> None:
    """All of a batch or none."""
    with Persistency(tmp_path) as p, p.open_job("events", max_bytes=200) as job:
        log: OrderedLog[Any] = OrderedLog(job)
        log.append("a").result()
        with pytest.raises(QuotaExceeded):
            log.append_many(["b", "c" * 500]).result()
        assert log.append("d").result() == 2


@pytest.mark.parametrize("payload", [b"", b"\x82\x1b" + bytes(8) + b"\xff", b"x" * 20])
def test_a_damaged_record_is_named(job: Job, log: OrderedLog[Any], payload: bytes) -> None:
    """`Corrupt`, with its number."""
    log.append_many("abc").result()
    job.put("log", ("record", 2), payload)
    with pytest.raises(Corrupt, match="record 2"):
        log.read().result()
    job.put("log", ("consumer", "c"), b"\x61x")
    with pytest.raises(Corrupt, match="isn't a number"):
        log.consumer("c").position().result()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda log: OrderedLog(None), "runner must be a Job or a Baton"),  # type: ignore[arg-type]
        (lambda log: OrderedLog(log._runner, ""), "name must be a str of 1 to 255"),
        (lambda log: OrderedLog(log._runner, 5), "name must be a str"),  # type: ignore[arg-type]
        (lambda log: OrderedLog(log._runner, codec=dict), "codec must be a codec"),  # type: ignore[arg-type]
        (lambda log: OrderedLog(log._runner, "\ud800"), "lone surrogate"),
        (lambda log: log.consumer("\ud800"), "lone surrogate"),
        (lambda log: log.drop_consumer("\ud800"), "lone surrogate"),
        (lambda log: log.append(object()), "object"),
        (lambda log: log.append_many(range(10_001)), "10,001 records at once are too many"),
        (lambda log: log.read(-1), "after must be at least 0"),
        (lambda log: log.read(True), "after must be an int"),
        (lambda log: log.read(0, 0), "limit must be at least 1"),
        (lambda log: log.consumer(""), "name must be a str of 1 to 1,000"),
        (lambda log: log.consumer("c", start="middle"), "start must be 'first' or 'last'"),
        (lambda log: log.consumer("c").take(0), "limit must be at least 1"),
        (lambda log: log.consumer("c").commit(0), "number must be at least 1"),
        (lambda log: log.consumer("c").commit("1"), "number must be an int"),
        (lambda log: log.consumer("c").reset(-1), "number must be at least 0"),
        (lambda log: log.consumer("c").next(-1), "timeout must be 0 or more"),
        (lambda log: log.consumer("c").next("1"), "timeout must be a number"),
        (lambda log: log.drop_consumer(5), "name must be a str"),
        (lambda log: log.trim(keep_last=-1), "keep_last must be at least 0"),
        (lambda log: log.trim(keep_ms=-1), "keep_ms must be 0 or more"),
        (lambda log: log.trim(keep_ms="1"), "keep_ms must be 0 or more"),
        (lambda log: log.trim(despite_consumers=1), "despite_consumers must be a bool"),
        (lambda log: log.trim(limit=0), "limit must be at least 1"),
    ],
)
def test_wrong_arguments_are_misuse_at_the_call(
    log: OrderedLog[Any], call: Callable[[OrderedLog[Any]], Any], message: str
) -> None:
    """And say what to pass."""
    with pytest.raises(Misuse, match=message):
        call(log)


def test_they_say_what_they_are(log: OrderedLog[Any]) -> None:
    """In a few words."""
    consumer = log.consumer("c")
    assert repr(log) == "<OrderedLog 'log' of job 'events'>"
    assert (repr(consumer), consumer.name) == ("<Consumer 'c' of 'log'>", "c")
    consumer.close()
    assert repr(consumer) == "<Consumer 'c' of 'log' (closed)>"
