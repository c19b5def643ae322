"""Waiters: requests for changes that aren't there yet, and everything that may happen to them meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fakes import WAIT, Actor

from persistency import (
    Change,
    Check,
    Closed,
    Conflict,
    DiskFull,
    FeedTruncated,
    Job,
    Misuse,
    Overloaded,
    Persistency,
    Poisoned,
    Put,
    Reply,
    StorageError,
    key,
)
from persistency.actor.settling import pending
from persistency.actor.waiters import Waiters
from persistency.errors import Corrupt
from persistency.storage.memory import MemoryStore
from persistency.storage.port import Barrier, Batch, Failed, ListChanges, SetRow, StoredChange, StoreOptions, TouchRow
from tests.loops import InLoop, Task, bounded, turns

T0_MS = 1_700_000_000_000


def an_actor(**options: Any) -> Actor:
    """Return an actor over a store that keeps its changes."""
    return Actor(options=StoreOptions(feed_changes_max=100), **options)


def wait_for_changes(actor: Actor, after: int = 0, limit: int = 10) -> Reply[Any]:
    """Ask for changes, and wait until the request is parked or answered."""
    reply = actor.mailbox.ask(ListChanges(after, limit, wait=True), reads=True)
    actor.mailbox.ask(Barrier(), reads=False, free=True).result(WAIT)
    return reply


def a_put(version: int, name: bytes, payload: bytes = b"x") -> StoredChange:
    """Return the change of a put into the category c."""
    return StoredChange(version, "put", b"c", name, payload, None)


# -- answering ----------------------------------------------------------------------------------------------------


def test_changes_that_are_there_are_given_at_once() -> None:
    """Waiting is only for what isn't there yet."""
    with an_actor() as actor:
        actor.put(b"k")
        assert wait_for_changes(actor).result(WAIT) == [a_put(1, b"k")]
        assert not actor.worker.waiters


def test_the_first_commit_with_a_change_answers() -> None:
    """Neither a read, nor a flush, nor a write that changes no row answers; the first change behind `after` does."""
    with an_actor() as actor:
        actor.put(b"k")
        reply = wait_for_changes(actor, after=3)
        actor.put(b"k", b"2")
        actor.mailbox.get(b"c", b"k").result(WAIT)
        touch = Batch([None, TouchRow(b"c", b"none", None), None], 1, False)
        actor.mailbox.write(touch, 1, 1).result(WAIT)
        actor.put(b"k", b"3")
        actor.mailbox.ask(Barrier(), reads=False, free=True).result(WAIT)
        assert not reply.done()
        actor.put(b"l", b"4")
        assert reply.result(WAIT) == [a_put(4, b"l", b"4")]


def test_a_group_answers_with_all_of_its_changes_up_to_the_limit() -> None:
    """What is committed together is told together."""
    with an_actor() as actor:
        few, many = wait_for_changes(actor, limit=3), wait_for_changes(actor, limit=50)
        with actor.mailbox._lock:
            for number in range(10):
                actor.put(b"%d" % number)
        assert few.result(WAIT) == [a_put(number + 1, b"%d" % number) for number in range(3)]
        assert len(many.result(WAIT)) in range(1, 11)  # the first put may have been a group of its own
        assert many.result()[0] == a_put(1, b"0")


def test_a_write_in_place_answers_too() -> None:
    """A commit that never goes through the worker rings it, and the worker answers."""
    with an_actor() as actor:
        reply = wait_for_changes(actor)
        assert actor.mailbox.write(Batch([b"c", b"k", b"x"], 1, False), 1, 2).result(WAIT) == 1
        assert actor.store.threads[-1] == threading.get_ident()
        assert reply.result(WAIT) == [a_put(1, b"k")]


def test_an_expiry_answers() -> None:
    """A row that ends is a change when it is reaped, and that answers like a commit."""
    now_ms = T0_MS
    with an_actor(read_ms=lambda: now_ms) as actor:
        row = SetRow(b"c", b"k", b"x", T0_MS + 5_000)
        assert actor.mailbox.write(Batch([None, row, None], 1, False), 1, 2).result(WAIT) == 1
        reply = wait_for_changes(actor, after=1)
        now_ms += 5_000
        actor.mailbox.ring()
        assert reply.result(WAIT) == [StoredChange(2, "expire", b"c", b"k", None, None)]


def test_one_commit_answers_everybody() -> None:
    """However many wait, from whatever version: each gets its own changes, in the order of versions."""
    with an_actor() as actor:
        for number in range(5):
            actor.put(b"%d" % number)
        replies = [wait_for_changes(actor, after=5) for _ in range(8)]
        actor.put(b"k")
        assert [reply.result(WAIT) for reply in replies] == [[a_put(6, b"k")]] * 8


def test_a_group_that_outruns_what_is_kept_is_told() -> None:
    """A waiter whose changes were given up in the very group that brought them learns that it has missed some."""
    with Actor(options=StoreOptions(feed_changes_max=3)) as actor:
        reply = wait_for_changes(actor)
        batch = Batch([place for number in range(9) for place in (b"c", b"%d" % number, b"x")], 9, False)
        actor.mailbox.write(batch, 9, 9).result(WAIT)
        with pytest.raises(FeedTruncated) as caught:
            reply.result(WAIT)
        assert caught.value.oldest == 7


def test_who_asks_behind_what_is_kept_is_told_at_once() -> None:
    """FeedTruncated isn't something to wait for."""
    with Actor(options=StoreOptions(feed_changes_max=1)) as actor:
        actor.put(b"k")
        actor.put(b"l")
        actor.mailbox.ask(Barrier(), reads=False, free=True).result(WAIT)
        with pytest.raises(FeedTruncated) as caught:
            wait_for_changes(actor).result(WAIT)
        assert caught.value.oldest == 2


def test_a_read_that_fails_is_the_waiters_answer() -> None:
    """Promise 3: a read error fails that read; the write whose commit it was is none the worse."""

    class Unreadable(MemoryStore):
        fails = False

        def read(self, message: Any, now_ms: int) -> Any:
            if self.fails and isinstance(message, ListChanges):
                raise DiskFull("it can't be read")
            return super().read(message, now_ms)

    store = Unreadable(StoreOptions(feed_changes_max=10))
    with Actor(open_store=lambda: store) as actor:
        reply = wait_for_changes(actor)
        store.fails = True
        assert actor.mailbox.write(Batch([b"c", b"k", b"x"], 1, False), 1, 2).result(WAIT) == 1
        with pytest.raises(StorageError, match="can't be read"):
            reply.result(WAIT)
        store.fails = False
        assert wait_for_changes(actor).result(WAIT) == [a_put(1, b"k")]


def test_nobody_waits_behind_a_waiter() -> None:
    """A parked request is neither work nor in the way: reads, writes, flush and drain go on, and nothing is pending."""
    with an_actor(ops_max=4, requests_max=2) as actor:
        reply = wait_for_changes(actor, after=10**6)
        for number in range(50):
            actor.put(b"%d" % number)
            assert actor.mailbox.get(b"c", b"%d" % number).result(WAIT) == b"x"
        actor.mailbox.drain().result(WAIT)
        actor.mailbox.ask(Barrier(), reads=False, free=True).result(WAIT)
        numbers = actor.worker.statistics()
        assert (numbers.accepted, numbers.committed, numbers.pending) == (50, 50, 0)
        assert not reply.done()


# -- giving up ----------------------------------------------------------------------------------------------------


def test_a_cancelled_waiter_is_gone() -> None:
    """Cancelling takes it out; the next commit finds nobody, and there is room for another."""
    with an_actor(waiters_max=1) as actor:
        for _ in range(5):
            reply = wait_for_changes(actor)
            assert reply.cancel() is True
            assert reply.cancelled()
            with pytest.raises(CancelledError):
                reply.result(WAIT)
            assert not actor.worker.waiters
        actor.put(b"k")
        assert wait_for_changes(actor).result(WAIT) == [a_put(1, b"k")]


def test_an_answered_waiter_can_not_be_cancelled() -> None:
    """What was answered stays so."""
    with an_actor() as actor:
        reply = wait_for_changes(actor)
        actor.put(b"k")
        assert reply.result(WAIT) == [a_put(1, b"k")]
        assert reply.cancel() is False


def test_giving_up_while_it_is_on_its_way_leaves_nothing_behind() -> None:
    """A request that is cancelled between the mailbox and the waiters isn't parked for ever."""
    with an_actor() as actor:
        actor.store.gate.clear()
        reply = actor.mailbox.ask(ListChanges(0, 10, wait=True), reads=True)
        assert actor.store.entered.acquire(timeout=WAIT)  # the worker has taken it
        reply.cancel()
        actor.let_go()
        with pytest.raises(CancelledError):
            reply.result(WAIT)
        actor.mailbox.ask(Barrier(), reads=False, free=True).result(WAIT)
        assert not actor.worker.waiters


def test_a_timeout_is_not_a_cancellation() -> None:
    """A thread that stops waiting for the answer may come back for it."""
    with an_actor() as actor:
        reply = wait_for_changes(actor)
        with pytest.raises(TimeoutError):
            reply.result(0.001)
        assert actor.worker.waiters
        actor.put(b"k")
        assert reply.result(WAIT) == [a_put(1, b"k")]


def test_more_than_the_limit_are_refused() -> None:
    """`requests_max` requests may wait for changes; one more is Overloaded, and those that wait are none the worse."""
    with an_actor(waiters_max=3) as actor:
        replies = [wait_for_changes(actor) for _ in range(3)]
        with pytest.raises(Overloaded, match="3 requests wait"):
            wait_for_changes(actor).result(WAIT)
        assert replies[1].cancel()
        again = wait_for_changes(actor)
        assert not again.done()
        actor.put(b"k")
        for reply in (replies[0], replies[2], again):
            assert reply.result(WAIT) == [a_put(1, b"k")]


# -- ending -------------------------------------------------------------------------------------------------------


def closes(actor: Actor) -> None:
    """Close in order."""
    actor.worker.close().result(WAIT)


def discards(actor: Actor) -> None:
    """Close without draining."""
    actor.worker.close(drain=False).result(WAIT)


def retires(actor: Actor) -> None:
    """End with the interpreter."""
    actor.worker.retire().result(WAIT)


@pytest.mark.parametrize("end", [closes, discards, retires])
def test_the_end_of_a_job_settles_its_waiters(end: Callable[[Actor], None]) -> None:
    """Promise 7: nobody waits for changes that can't come any more."""
    with an_actor() as actor:
        replies = [wait_for_changes(actor) for _ in range(3)]
        end(actor)
        for reply in replies:
            with pytest.raises(Closed):
                reply.result(WAIT)


def test_a_job_that_serves_late_posters_parks_nobody() -> None:
    """After its retirement a job has no one to answer later: waiting is refused, asking isn't."""
    with an_actor() as actor:
        retires(actor)
        actor.put(b"late")
        assert wait_for_changes(actor).result(WAIT) == [a_put(1, b"late")]
        with pytest.raises(Closed):
            wait_for_changes(actor, after=1).result(WAIT)


@pytest.mark.parametrize("in_place", [True, False])
def test_poisoning_settles_the_waiters(in_place: bool) -> None:
    """Promise 7: a job that can't go on tells its waiters why."""
    with an_actor() as actor:
        reply = wait_for_changes(actor)
        cause = Corrupt("a bad page")
        actor.store.errors = [cause, cause]
        if in_place:
            actor.mailbox.write(Batch([b"c", b"k", b"x"], 1, False), 1, 2).exception(WAIT)
        else:
            actor.put(b"k")
        with pytest.raises(Poisoned) as caught:
            reply.result(WAIT)
        assert caught.value.__cause__ is cause
        with pytest.raises(Poisoned):
            actor.mailbox.ask(ListChanges(0, 1, wait=True), reads=True)


def test_callbacks_may_post_and_ask_again() -> None:
    """The usual way to follow a feed without a thread: each answer asks for the next."""
    seen: list[int] = []
    enough = threading.Event()
    with an_actor() as actor:

        def more(reply: Any) -> None:
            if reply.exception() is None:
                seen.extend(change.version for change in reply.result())
                if len(seen) == 40:
                    enough.set()
                else:
                    ask(seen[-1])

        def ask(after: int) -> None:
            actor.mailbox.ask(ListChanges(after, 3, wait=True), reads=True).add_done_callback(more)

        ask(0)
        for number in range(40):
            if number % 2:
                actor.put(b"%d" % number)
            else:
                actor.mailbox.write(Batch([b"c", b"%d" % number, b"x"], 1, False), 1, 2).result(WAIT)
        assert enough.wait(WAIT)
    assert seen == list(range(1, 41))


# -- the list itself ----------------------------------------------------------------------------------------------


def test_the_list_parks_answers_and_refuses() -> None:
    """Each request is answered once, whoever answers, refuses or cancels it."""
    waiters = Waiters(2, lambda: False)
    line = Actor(start=False).mailbox
    first, second, third = (pending(line, reads=True) for _ in range(3))
    assert not waiters
    assert waiters.park(ListChanges(0, 1, wait=True), first) is None
    assert waiters.park(ListChanges(5, 1, wait=True), second) is None
    assert isinstance(waiters.park(ListChanges(0, 1, wait=True), third), Overloaded)
    answers: list[Any] = []
    waiters.answer(lambda message: [], 9, answers)
    waiters.answer(lambda message: ["never asked"], 0, answers)  # nothing is behind what they know
    assert answers == []
    waiters.answer(lambda message: ["change"] if message.after == 0 else [], 9, answers)
    assert answers == [(first, ["change"], None)]
    assert waiters.withdraw(first) is False
    error = Closed("over")
    waiters.answer(lambda message: Failed(error), 9, answers)
    assert answers[1:] == [(second, None, error)]
    assert waiters.park(ListChanges(0, 1, wait=True), third) is None
    waiters.refuse(error, answers)
    assert answers[2:] == [(third, None, error)]
    assert waiters.park(ListChanges(0, 1, wait=True), third) is error
    assert not waiters


def test_waiting_for_a_change_where_none_can_come_is_refused(tmp_path: Path) -> None:
    """Inside the job's own run, and in a callback of its worker, the answer could never come: `Misuse`, no hang."""
    with Persistency(tmp_path) as opened:
        job = opened.open_job("a", feed_changes_max=10)
        waiting = job.changes(0, 1, wait=True)
        job.flush().result(WAIT)
        with pytest.raises(Misuse, match="in the thread that has to answer it"):
            job.run(lambda _tx: waiting.result(WAIT)).result(WAIT)
        job.put("c", ("k",), b"")
        assert [change.version for change in waiting.result(WAIT)] == [1]


def test_cancelling_while_answers_are_being_made_answers_once() -> None:
    """A signal handler may cancel in the middle of it: then there is no answer for that request any more."""
    waiters = Waiters(2, lambda: False)
    reply = pending(waiters, reads=True)
    assert waiters.park(ListChanges(0, 1, wait=True), reply) is None

    def read(_message: Any) -> list[str]:
        assert reply.cancel()
        return ["change"]

    answers: list[Any] = []
    waiters.answer(read, 1, answers)
    assert answers == []
    assert reply.cancelled()


# -- through a job ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "directory"])
def persistency(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Persistency]:
    """Give an empty root of either kind."""
    with Persistency(":memory:" if request.param == "memory" else tmp_path / "root") as opened:
        yield opened


@pytest.fixture
def job(persistency: Persistency) -> Job:
    """Give an empty job that keeps its changes."""
    return persistency.open_job("job", feed_changes_max=100_000)


def test_only_a_job_with_a_feed_has_changes(persistency: Persistency) -> None:
    """Asking any other is Misuse, at the call."""
    job = persistency.open_job("job")
    for wait in (True, False):
        with pytest.raises(Misuse, match="feed_changes_max"):
            job.changes(0, 1, wait=wait)


def test_a_waiting_request_inside_run_is_misuse(job: Job) -> None:
    """It could never be answered: the commit it waits for is the one it is in."""
    older = job.changes(0, 1, wait=True)

    def fn(tx: Any) -> None:
        tx.put("c", (1,), b"x")
        with pytest.raises(Misuse):
            job.changes(0, 1, wait=True)
        assert not older.done()

    job.run(fn).result(WAIT)
    assert [change.version for change in older.result(WAIT)] == [1]


def test_what_was_undone_answers_nobody(job: Job) -> None:
    """Committed changes only: neither a failed check nor a run that raises is told."""
    reply = job.changes(0, 10, wait=True)
    with pytest.raises(Conflict):
        job.commit([Put("c", (1,), b"x"), Check("c", (2,), 7)]).result(WAIT)

    def raises(tx: Any) -> None:
        tx.put("c", (1,), b"x")
        raise KeyError("no")

    with pytest.raises(KeyError):
        job.run(raises).result(WAIT)
    assert not reply.done()
    job.put("c", (3,), b"y")
    assert reply.result(WAIT) == [Change(1, "put", "c", key(3), b"y", None)]


def test_a_cancelled_task_leaves_no_waiter(job: Job, in_loop: InLoop) -> None:
    """Promise 8: giving up in an event loop takes the request out, whenever it comes."""

    async def main() -> None:
        for number in range(50):
            async with anyio.create_task_group() as group:
                task = Task(group, lambda: job.changes(0, 10, wait=True))
                for _ in range(number % 3):
                    await anyio.lowlevel.checkpoint()
                task.cancel()
            assert task.cancelled
        await job.flush()

    in_loop(main)
    worker = job._statistics.__self__  # type: ignore[attr-defined]  # a bound method
    assert not worker.waiters
    job.put("c", (1,), b"x")
    assert len(job.changes(0, 10, wait=True).result(WAIT)) == 1


def test_a_loop_waits_beside_its_own_writes(job: Job, in_loop: InLoop) -> None:
    """In an event loop one task waits while another one writes; an abandoned one of several takes nobody along."""

    async def main() -> None:
        async with anyio.create_task_group() as group:
            waiting = [Task(group, job.changes(0, 10, wait=True)) for _ in range(4)]
            await turns()
            await job.flush()
            waiting[0].cancel()
            await job.commit(Put("c", (1,), b"x"))
        assert [task.cancelled for task in waiting] == [True, False, False, False]
        assert [len(await task) for task in waiting[1:]] == [1, 1, 1]

    in_loop(bounded, main)


@pytest.mark.parametrize("close", ["job", "persistency", "drop"])
def test_closing_settles_who_waits(persistency: Persistency, job: Job, close: str) -> None:
    """Promise 7: whichever way a job ends, waiting for its changes ends with Closed."""
    reply = job.changes(0, 10, wait=True)
    if close == "job":
        job.close()
    elif close == "persistency":
        persistency.close()
    else:
        persistency.drop_job("job")
    with pytest.raises(Closed):
        reply.result(WAIT)


def test_a_handle_s_waiters_end_with_it(tmp_path: Path) -> None:
    """Leases: two Persistency objects share a worker; closing one ends its own waiters, not the other's."""
    with Persistency(tmp_path) as first, Persistency(tmp_path) as second:
        mine, theirs = (each.open_job("job", feed_changes_max=10) for each in (first, second))
        ending, staying = mine.changes(0, 10, wait=True), theirs.changes(0, 10, wait=True)
        mine.close()
        with pytest.raises(Closed):
            ending.result(WAIT)
        theirs.put("c", (1,), b"x")
        assert len(staying.result(WAIT)) == 1


@pytest.mark.parametrize("writers", [1, 8])
def test_nothing_is_lost_or_told_twice_beside_writers(job: Job, writers: int) -> None:
    """A consumer that asks from the last version it has seen gets every change once, in order, however commits fall."""
    each = 300
    start = threading.Barrier(writers + 1)

    def write(me: int) -> None:
        start.wait(WAIT)
        for number in range(each):
            if number % 3 == 0:
                job.put("c", (me, number), b"x")
            elif number % 3 == 1:
                job.commit(Put("c", (me, number), b"x")).result(WAIT)
            else:
                job.run(lambda tx, number=number: tx.put("c", (me, number), b"x")).result(WAIT)

    threads = [threading.Thread(target=write, args=(me,)) for me in range(writers)]
    for thread in threads:
        thread.start()
    start.wait(WAIT)
    seen: list[Change] = []
    while len(seen) < writers * each:
        limit = 1 + len(seen) % 7
        seen += job.changes(seen[-1].version if seen else 0, limit, wait=True).result(WAIT)
    for thread in threads:
        thread.join(WAIT)
    assert [change.version for change in seen] == list(range(1, writers * each + 1))
    assert {change.key.parts for change in seen} == {(me, number) for me in range(writers) for number in range(each)}
    for me in range(writers):
        assert [change.key.parts[1] for change in seen if change.key.parts[0] == me] == list(range(each))


def test_it_survives_reopening(tmp_path: Path) -> None:
    """A consumer goes on from the version it knows, and waits for what comes next."""
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("job", feed_changes_max=10)
        job.put("c", (1,), b"x")
        assert len(job.changes(0, 10, wait=True).result(WAIT)) == 1
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("job", feed_changes_max=10)
        reply = job.changes(1, 10, wait=True)
        job.delete("c", (1,))
        assert reply.result(WAIT) == [Change(2, "delete", "c", key(1), None, None)]
