"""The worker: group commit, accounting, failures, faults of the environment, ending."""

from __future__ import annotations

import ctypes
import logging
import threading
import time
from typing import Any

import pytest
from fakes import WAIT, Actor, HeldStore

from persistency.actor.mailbox import CROWD_OPS_MIN
from persistency.errors import (
    Closed,
    Conflict,
    Corrupt,
    DiskFull,
    Failure,
    LeaseLost,
    Poisoned,
    StorageError,
    WriteFailed,
)
from persistency.ops import Check, Delete, Put
from persistency.storage.port import Barrier, Batch, DropRow, Expect, GetRow, OutcomeUnknown, StoreOptions
from tests.loops import InLoop


def failing_batch(key: bytes = b"k") -> Batch:
    """A batch of a put and a check that can't hold."""
    origin = (Put("c", ("k",), b"v"), Check("c", ("k",), 99))
    return Batch([b"c", key, b"v", None, Expect(b"c", key, 99), None], 2, True, origin)


def flush(actor: Actor) -> None:
    """Flush through the line or in place."""
    actor.mailbox.write(Barrier(), 0, 0, free=True).result(WAIT)


def test_all_that_waits_is_one_group() -> None:
    """What came while a commit ran is committed by the next one, together."""
    with Actor() as actor:
        actor.hold()
        for number in range(100):
            actor.put(b"%d" % number)
        actor.let_go()
        flush(actor)
        assert [len(group) // 3 for group in actor.store.groups[:2]] in ([1, 100], [1, 101])
        assert actor.worker.statistics().committed == 101


class PreparedStore(HeldStore):
    """A held store that can begin with a group before it has it; notes how many wait meanwhile."""

    def __init__(self, options: StoreOptions | None = None) -> None:
        super().__init__(options)
        self.waiting: list[int] = []
        self.mailbox: Any = None

    def prepare(self) -> None:
        """Note it."""
        self.waiting.append(len(self.mailbox))


def prepared_actor(**bounds: Any) -> tuple[Actor, PreparedStore]:
    """Return an actor over such a store, with room for so many."""
    store = PreparedStore()
    actor = Actor(open_store=lambda: store, start=False, **bounds)
    actor.store, store.mailbox = store, actor.mailbox
    actor.worker.start()
    actor.worker.opened.result(WAIT)
    return actor, store


@pytest.mark.parametrize("many", [False, True])
def test_many_are_prepared_for_before_they_are_taken(many: bool) -> None:
    """Who waits for room does so until the store has begun: then it has time to go on, while the store is busy."""
    count = CROWD_OPS_MIN - (not many)
    actor, store = prepared_actor(ops_max=count)
    with actor:
        actor.hold()
        for number in range(count):
            actor.put(b"%d" % number)
        late = threading.Thread(target=actor.put, args=(b"late",))
        late.start()
        while not actor.mailbox._queue:
            assert late.is_alive()
        actor.let_go()
        late.join(WAIT)
        flush(actor)
        assert store.waiting == [count] * many
        assert actor.worker.statistics().committed == count + 2


@pytest.mark.parametrize("end", ["poisoned", "discarded"])
def test_nothing_is_prepared_that_is_not_going_to_be_run(end: str) -> None:
    """What a poisoned job, or one that is closed without draining, refuses needs no transaction."""
    actor, store = prepared_actor()
    actor.hold()
    for number in range(CROWD_OPS_MIN):
        actor.put(b"%d" % number)
    if end == "poisoned":
        store.errors.append(Corrupt("broken"))
    else:
        actor.worker.close(drain=False)
    actor.close()
    assert store.waiting == []
    assert actor.worker.statistics().failed >= CROWD_OPS_MIN


def test_a_request_that_finds_the_job_idle_is_run_by_its_caller() -> None:
    """The turn: reads, commits and flushes of a plain thread are answered in place, without a hop."""
    with Actor() as actor:
        reply = actor.mailbox.write(Batch([b"c", b"k", b"v"], 1, False), 1, 2)
        assert reply.done()
        assert actor.store.threads == [threading.get_ident()]
        assert actor.mailbox.get(b"c", b"k").done()
        assert actor.mailbox.read(GetRow(b"c", b"k")).done()
        assert actor.mailbox.write(Barrier(), 0, 0, free=True).done()


def test_under_a_loop_only_point_reads_are_run_in_place(in_loop: InLoop) -> None:
    """Scans and commits of an event loop go to the worker; with inline=False point reads do too."""

    async def main(actor: Actor, *, inline: bool) -> None:
        assert actor.mailbox.get(b"c", b"k").done() is inline
        actor.store.gate.clear()
        commit = actor.mailbox.write(Batch([b"c", b"k", b"v"], 1, False), 1, 2)
        assert not commit.done()
        actor.store.gate.set()
        await commit
        assert actor.store.threads[-1] != threading.get_ident()

    for inline in (True, False):
        with Actor(inline=inline) as actor:
            in_loop(main, actor, inline=inline)


def test_reads_stand_in_line_behind_the_writes_before_them() -> None:
    """Promise 1: a read sees every write posted before it, and none after."""
    with Actor() as actor:
        actor.hold()
        actor.put(b"k", b"1")
        first = actor.mailbox.get(b"c", b"k")
        actor.put(b"k", b"2")
        second = actor.mailbox.get(b"c", b"k")
        actor.mailbox.tell(DropRow(b"c", b"k"), 1, 2)
        third = actor.mailbox.get(b"c", b"k")
        actor.let_go()
        assert [reply.result(WAIT) for reply in (first, second, third)] == [b"1", b"2", None]


def test_a_failing_event_is_reported_four_ways_and_once(caplog: pytest.LogCaptureFixture) -> None:
    """Promise 3: log, on_error on a thread of its own, statistics, and exactly one flush."""
    told: list[tuple[str, list[Failure], str]] = []
    heard = threading.Event()

    def on_error(job_id: str, failures: Any) -> None:
        told.append((job_id, list(failures), threading.current_thread().name))
        heard.set()

    with caplog.at_level(logging.ERROR, "persistency"), Actor(on_error=on_error) as actor:
        actor.hold()
        for number in range(1000):
            if number == 500:
                actor.mailbox.tell(failing_batch(), 2, 3)
            actor.put(b"%d" % number)
        actor.let_go()
        with pytest.raises(WriteFailed) as caught:
            flush(actor)
        flush(actor)
        assert heard.wait(WAIT)
        numbers = actor.worker.statistics()
    assert [failure.op for failure in caught.value.failures] == list(failing_batch().origin)
    assert {failure.outcome for failure in caught.value.failures} == {"not applied"}
    assert isinstance(caught.value.failures[0].error, Conflict)
    assert (numbers.accepted, numbers.committed, numbers.failed, numbers.pending) == (1003, 1001, 2, 0)
    assert len(told) == 1
    assert told[0][0] == "job"
    assert told[0][1] == list(caught.value.failures)
    assert "on_error" in told[0][2]
    assert "failed" in caplog.text


def test_a_flush_reports_only_what_failed_before_it() -> None:
    """Two flushes in one group: each raises what failed before it, nobody's twice."""
    with Actor() as actor:
        actor.hold()
        actor.mailbox.tell(failing_batch(b"1"), 2, 3)
        first = actor.mailbox.ask(Barrier(), reads=False, free=True)
        second = actor.mailbox.ask(Barrier(), reads=False, free=True)
        actor.mailbox.tell(failing_batch(b"2"), 2, 3)
        third = actor.mailbox.ask(Barrier(), reads=False, free=True)
        actor.let_go()
        assert isinstance(first.exception(WAIT), WriteFailed)
        assert second.exception(WAIT) is None
        assert isinstance(third.exception(WAIT), WriteFailed)


def test_a_request_s_failure_goes_to_its_caller_alone() -> None:
    """Promise 3: a commit that fails raises in its reply; no flush repeats it."""
    told: list[Any] = []
    with Actor(on_error=lambda _job, failures: told.extend(failures)) as actor:
        reply = actor.mailbox.write(failing_batch(), 2, 3)
        with pytest.raises(Conflict):
            reply.result(WAIT)
        del reply
        flush(actor)
        assert actor.worker.statistics().failed == 2
        actor.failures.wait_told(WAIT)
    assert told == []


@pytest.mark.parametrize("in_place", [True, False])
def test_a_request_s_failure_nobody_looked_at_is_told(in_place: bool) -> None:
    """Promise 3: its reply dropped unseen, a failed request goes to the log and on_error."""
    told: list[Failure] = []
    heard = threading.Event()

    def on_error(_job: str, failures: Any) -> None:
        told.extend(failures)
        heard.set()

    with Actor(on_error=on_error) as actor:
        if not in_place:
            actor.hold()
        actor.mailbox.write(failing_batch(), 2, 3)
        actor.let_go()
        assert heard.wait(WAIT)
        flush(actor)  # but no flush raises it
    assert [failure.op for failure in told] == list(failing_batch().origin)


def test_an_on_error_that_raises_or_blocks_harms_nobody() -> None:
    """Whatever on_error does, the worker goes on, and later failures are told when it comes back."""
    blocked, go_on = threading.Event(), threading.Event()
    calls: list[int] = []

    def on_error(_job: str, failures: Any) -> None:
        calls.append(len(failures))
        blocked.set()
        assert go_on.wait(WAIT)
        raise SystemExit("no")

    with Actor(on_error=on_error) as actor:
        actor.mailbox.tell(failing_batch(), 2, 3)
        assert blocked.wait(WAIT)
        for _ in range(3):
            actor.mailbox.tell(failing_batch(), 2, 3)
        actor.put(b"k2")
        with pytest.raises(WriteFailed):
            flush(actor)
        assert actor.mailbox.get(b"c", b"k2").result(WAIT) == b"x"
        go_on.set()
        actor.failures.wait_told(WAIT)
    assert sum(calls) == 8


def test_failures_nobody_takes_are_kept_up_to_a_bound() -> None:
    """Promise 3: up to 1,000 failures and 1 MiB of payload are kept, beyond it only the count."""
    with Actor() as actor:
        for _ in range(700):
            actor.mailbox.tell(failing_batch(), 2, 3)
        with pytest.raises(WriteFailed) as caught:
            flush(actor)
        assert (len(caught.value.failures), caught.value.omitted) == (1000, 400)
        origin = (Put("c", ("k",), bytes(600_000)), Check("c", ("k",), 99))
        for _ in range(3):
            actor.mailbox.tell(failing_batch()._replace(origin=origin), 2, 3)
        with pytest.raises(WriteFailed) as caught:
            flush(actor)
        assert caught.value.omitted == 2
        assert sum(len(getattr(failure.op, "payload", b"")) for failure in caught.value.failures) <= 2**20


def test_a_fault_of_the_environment_is_waited_out_in_order() -> None:
    """Promise 3: a full disk stalls the job; the same group is tried again, nothing is skipped."""
    with Actor() as actor:
        actor.hold()
        actor.store.errors += [DiskFull("full", 13), StorageError("write failed", 778)]
        actor.put(b"behind")
        read = actor.mailbox.get(b"c", b"held")
        actor.let_go()
        assert read.result(WAIT) == b"x"
        flush(actor)
        assert actor.store.groups[0] == actor.store.groups[1] == actor.store.groups[2]
        numbers = actor.worker.statistics()
        assert (numbers.state, numbers.committed, numbers.failed) == ("live", 2, 0)


def test_a_stalled_job_says_so_and_takes_more_until_it_is_full() -> None:
    """While a fault lasts the statistics say `stalled`, and posts go on being taken."""
    with Actor() as actor:
        actor.hold()
        actor.store.errors += [DiskFull("full", 13)] * 2
        actor.store.entered = threading.Semaphore(0)
        actor.let_go()
        assert actor.store.entered.acquire(timeout=WAIT)
        assert actor.worker.statistics().state == "stalled"
        actor.put(b"behind")
        flush(actor)
        assert actor.worker.statistics().state == "live"


def test_a_fault_that_lasts_poisons_the_job_and_everybody_is_told() -> None:
    """Promise 3: after stall_timeout every later call raises Poisoned with the cause; what waited is not applied."""
    with Actor(stall_timeout=0.0) as actor:
        actor.hold()
        cause = DiskFull("full", 13)
        actor.store.errors += [cause] * 2
        actor.put(b"1")
        read = actor.mailbox.get(b"c", b"1")
        commit = actor.mailbox.ask(Batch([b"c", b"2", b""], 1, False, (Delete("c", ()),)), reads=False, ops=1)
        drained = actor.mailbox.ask(Barrier(), reads=False, free=True)
        actor.let_go()
        for reply in (read, commit, drained):
            error = reply.exception(WAIT)
            assert isinstance(error, Poisoned)
            assert error.__cause__ is cause
        with pytest.raises(Poisoned) as caught:
            actor.put(b"3")
        assert caught.value.__cause__ is cause
        numbers = actor.worker.statistics()
        assert (numbers.state, numbers.accepted, numbers.failed, numbers.pending) == ("poisoned", 3, 3, 0)
        with pytest.raises(WriteFailed) as failed:
            actor.worker.close().result(WAIT)
        assert [failure.op for failure in failed.value.failures] == [Put("c", b"held", b"x"), Put("c", b"1", b"x")]
        assert actor.store.closed == 1


def test_a_commit_nobody_knows_of_poisons_at_once() -> None:
    """Promise 3: the one group whose COMMIT failed half way is `unknown`, all behind it `not applied`."""
    with Actor() as actor:
        actor.hold()
        unknown = OutcomeUnknown("sync failed")
        unknown.__cause__ = StorageError("sync failed", 1034)
        actor.store.errors.append(unknown)
        actor.put(b"behind")
        actor.let_go()
        with pytest.raises(WriteFailed) as caught:
            actor.worker.close().result(WAIT)
        assert [failure.outcome for failure in caught.value.failures] == ["unknown", "not applied"]


@pytest.mark.parametrize(
    "end", [Corrupt("damaged", 11), LeaseLost("taken over")], ids=lambda error: type(error).__name__
)
@pytest.mark.parametrize(("at_commit", "outcome"), [(True, "unknown"), (False, "not applied")])
def test_what_ends_a_stall_leaves_a_doubtful_commit_unknown(end: Exception, at_commit: bool, outcome: str) -> None:
    """Promise 3: a group whose COMMIT failed first, and which is never tried again, may be there."""
    with Actor() as actor:
        actor.hold()
        failed = StorageError("the connection was lost")
        failed.at_commit = at_commit
        actor.store.errors += [failed, end]
        actor.put(b"behind")
        actor.let_go()
        with pytest.raises(WriteFailed) as caught:
            actor.worker.close().result(WAIT)
        assert [failure.outcome for failure in caught.value.failures] == [outcome, "not applied"]


@pytest.mark.parametrize("error", [Corrupt("damaged", 11), SystemExit("no"), KeyboardInterrupt(), ValueError("defect")])
def test_what_can_not_be_waited_out_poisons_at_once(error: BaseException) -> None:
    """Promise 7: whatever the store throws, BaseException included, every reply is settled."""
    with Actor() as actor:
        actor.hold()
        actor.store.errors.append(error)
        reply = actor.mailbox.ask(GetRow(b"c", b"k"), reads=True)
        actor.let_go()
        assert isinstance(reply.exception(WAIT), Poisoned)
        assert actor.worker.statistics().state == "poisoned"


def test_an_exception_thrown_into_the_worker_settles_everything() -> None:
    """Promise 7: an exception from outside poisons the job; nobody is left waiting, and it can be closed."""
    with Actor() as actor:
        actor.hold()
        reply = actor.mailbox.ask(GetRow(b"c", b"k"), reads=True)
        thread = actor.mailbox.worker_thread
        assert thread is not None
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(SystemExit))
        actor.let_go()
        assert reply.exception(WAIT) is not None
        actor.worker.close().exception(WAIT)
        assert actor.store.closed == 1


def test_a_read_error_in_place_fails_that_read_alone() -> None:
    """Promise 3: a read error fails its read with StorageError; the next one is served."""
    with Actor() as actor:
        actor.put(b"k")
        flush(actor)
        original = actor.mailbox.get_in_place

        def broken(*_args: Any) -> bytes | None:
            raise StorageError("read failed", 266)

        actor.mailbox.get_in_place = broken
        assert isinstance(actor.mailbox.get(b"c", b"k").exception(), StorageError)
        actor.mailbox.get_in_place = original
        assert actor.mailbox.get(b"c", b"k").result() == b"x"


def test_a_write_in_place_that_meets_a_fault_is_left_to_the_worker() -> None:
    """A commit in place that can't be applied joins the line, and is applied when the fault is over."""
    with Actor() as actor:
        actor.store.errors += [DiskFull("full", 13)] * 2
        reply = actor.mailbox.write(Batch([b"c", b"k", b"v"], 1, False), 1, 2)
        assert reply.result(WAIT) == 1
        assert [len(group) for group in actor.store.groups] == [3, 3, 3]
        assert actor.worker.statistics().committed == 1


def test_an_interrupted_request_in_place_gives_the_turn_back() -> None:
    """A KeyboardInterrupt in the middle of a request in place leaves the job usable."""
    with Actor() as actor:
        actor.store.errors.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            actor.mailbox.write(Batch([b"c", b"k", b"v"], 1, False), 1, 2)
        actor.put(b"k2")
        flush(actor)
        assert actor.mailbox.get(b"c", b"k2").result(WAIT) == b"x"


def test_close_writes_what_waits_and_closes_the_store_once() -> None:
    """close() drains; closing again is nothing."""
    actor = Actor()
    actor.hold()
    for number in range(50):
        actor.put(b"%d" % number)
    closed = actor.worker.close()
    assert not closed.done()
    actor.let_go()
    closed.result(WAIT)
    assert actor.worker.close().done()
    numbers = actor.worker.statistics()
    assert (numbers.state, numbers.committed, actor.store.closed) == ("closed", 51, 1)


def test_close_without_draining_fails_what_was_not_started() -> None:
    """close(drain=False): what wasn't started fails with Closed and is counted; what was started is finished."""
    actor = Actor()
    actor.hold()
    actor.put(b"1")
    commit = actor.mailbox.ask(Batch([b"c", b"2", b""], 1, False), reads=False, ops=1)
    closed = actor.worker.close(drain=False)
    actor.let_go()
    assert isinstance(commit.exception(WAIT), Closed)
    closed.exception(WAIT)
    numbers = actor.worker.statistics()
    assert (numbers.accepted, numbers.committed, numbers.failed, numbers.pending) == (3, 1, 2, 0)


def test_a_stalled_job_can_be_closed_without_draining() -> None:
    """close(drain=False) doesn't wait for a fault to be over."""
    actor = Actor(stall_timeout=1000.0)
    actor.hold()
    actor.store.errors += [DiskFull("full", 13)] * 1000
    actor.let_go()
    actor.worker.close(drain=False).exception(WAIT)
    assert actor.store.closed == 1
    assert actor.worker.statistics().failed == 1


def test_closing_just_after_opening_is_seen() -> None:
    """A close that comes before the store opens, while it does, or before the worker sleeps, is never missed."""
    opened = 0
    for _ in range(200):
        actor = Actor(start=False)
        actor.worker.start()
        actor.worker.close().result(WAIT)
        was_opened = actor.worker.opened.exception(WAIT) is None
        assert actor.store.closed == was_opened
        opened += was_opened
    assert opened


def test_retiring_serves_late_posters_in_their_own_thread() -> None:
    """Promise 6: after its thread has ended a job still takes writes and reads, in the poster's thread."""
    for _ in range(50):
        actor = Actor()
        actor.put(b"early")
        actor.worker.retire().result(WAIT)
        actor.put(b"late")
        assert actor.store.threads[-1] == threading.get_ident()
        assert actor.mailbox.get(b"c", b"late").result(WAIT) == b"x"
        assert actor.mailbox.write(failing_batch(), 2, 3).exception(WAIT) is not None
        flush(actor)
        assert actor.worker.statistics().committed == 2
        actor.worker.close().result(WAIT)
        with pytest.raises(Closed):
            actor.put(b"too late")


def test_late_posters_in_many_threads_lose_nothing() -> None:
    """Promise 6: late writers of several threads serve one another's posts."""
    actor = Actor(ops_max=8)
    actor.worker.retire().result(WAIT)

    def write(name: int) -> None:
        for number in range(200):
            actor.put(b"%d.%d" % (name, number))

    threads = [threading.Thread(target=write, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    actor.worker.close().result(WAIT)
    assert actor.worker.statistics().committed == 1600


def test_a_failed_opening_tells_its_cause() -> None:
    """What opening the store raised is what `opened` raises, and later posts are refused."""

    def broken() -> HeldStore:
        raise Corrupt("not ours", 26)

    actor = Actor(open_store=broken, start=False)
    actor.worker.start()
    assert isinstance(actor.worker.opened.exception(WAIT), Corrupt)
    with pytest.raises(Closed):
        actor.put(b"k")
    assert actor.worker.close().result(WAIT) is None


def test_the_books_balance_at_every_look() -> None:
    """Promise 3: accepted == committed + failed + pending, and none of the sums ever shrinks, whoever looks when."""
    with Actor(ops_max=64) as actor:
        stop = threading.Event()
        wrong: list[Any] = []

        def look() -> None:
            accepted = decided = 0
            while not stop.is_set():
                now = actor.worker.statistics()
                if now.accepted != now.committed + now.failed + now.pending or now.accepted < accepted:
                    wrong.append(now)
                if now.committed + now.failed < decided or now.pending < 0:
                    wrong.append(now)
                accepted, decided = now.accepted, now.committed + now.failed

        looker = threading.Thread(target=look)
        looker.start()
        for number in range(3000):
            actor.put(b"%d" % number)
            if number % 100 == 0:
                actor.mailbox.tell(failing_batch(), 2, 3)
        with pytest.raises(WriteFailed):
            flush(actor)
        stop.set()
        looker.join(WAIT)
        numbers = actor.worker.statistics()
    assert wrong == []
    assert (numbers.accepted, numbers.committed, numbers.failed, numbers.pending) == (3060, 3000, 60, 0)
    assert numbers.commits >= 1
    assert 0 <= numbers.commit_ms_p50 <= numbers.commit_ms_p99


def test_an_idle_worker_sleeps() -> None:
    """Nobody polls: an idle job uses no processor time at all."""
    with Actor() as actor:
        flush(actor)
        before = time.process_time()
        threading.Event().wait(0.2)
        assert time.process_time() - before < 0.05


@pytest.mark.parametrize("in_place", [True, False])
def test_a_flush_nobody_looked_at_leaves_its_failures_to_the_next(in_place: bool) -> None:
    """Promise 3: exactly one flush or close raises; a flush whose reply was dropped unseen has raised nothing."""
    actor = Actor()
    actor.hold()
    actor.mailbox.tell(failing_batch(), 2, 3)
    if in_place:
        actor.let_go()
        actor.mailbox.ask(GetRow(b"c", b"k"), reads=True).result(WAIT)
    actor.mailbox.write(Barrier(), 0, 0, free=True)  # dropped
    closed = actor.worker.close()
    actor.let_go()
    with pytest.raises(WriteFailed) as caught:
        closed.result(WAIT)
    assert len(caught.value.failures) == 2


def test_a_failed_opening_settles_who_waits_for_the_exit() -> None:
    """Promise 7: a job that can't be opened while the interpreter exits holds nobody up."""
    opening, go_on = threading.Event(), threading.Event()

    def broken() -> HeldStore:
        opening.set()
        assert go_on.wait(WAIT)
        raise Corrupt("not ours", 26)

    actor = Actor(open_store=broken, start=False)
    actor.worker.start()
    assert opening.wait(WAIT)
    retired = actor.worker.retire()
    go_on.set()
    assert retired.result(WAIT) is None


def test_an_interrupt_after_the_commit_is_counted_as_committed() -> None:
    """Promise 3: a KeyboardInterrupt between a commit in place and its answer doesn't lose the count."""
    with Actor() as actor:
        original = actor.store.apply

        def interrupted(group: list[Any], now_ms: int) -> list[Any]:
            original(group, now_ms)
            raise KeyboardInterrupt

        actor.store.apply = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            actor.mailbox.write(Batch([b"c", b"k", b"v"], 1, False), 1, 2)
        actor.store.apply = original  # type: ignore[method-assign]
        numbers = actor.worker.statistics()
        assert (numbers.accepted, numbers.committed, numbers.pending) == (1, 1, 0)


def test_a_reader_that_never_pauses_does_not_hold_the_exit_up() -> None:
    """Promise 6: retiring gets the turn beside a thread that reads in place without end."""
    actor = Actor()
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            actor.mailbox.get(b"c", b"k").result(WAIT)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert actor.worker.retire().result(WAIT) is None
    finally:
        stop.set()
        reader.join(WAIT)
    actor.worker.close().result(WAIT)


def test_the_memory_store_undoes_an_interrupted_group() -> None:
    """Promise 2: an exception in the middle of a group leaves nothing of it, in memory too."""
    store = HeldStore()
    store.apply([b"c", b"1", b"a", b"c", b"2", b"b"], 0)

    class Poison(bytes):
        def __hash__(self) -> int:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.apply([b"c", b"1", b"new", None, DropRow(b"c", b"2"), None, b"c", b"3", b"new", b"c", Poison(), b""], 0)
    assert [store.get(b"c", key, 0) for key in (b"1", b"2", b"3")] == [b"a", b"b", None]
    assert store.status().last_version == 2
    assert store.apply([None, Batch([b"c", b"4", b""], 1, False), None], 0) == [3]
