"""The mailbox: order, bounds, turns, sleeping and closing."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from fakes import WAIT, Actor

from persistency.actor.bounds import Bounds
from persistency.actor.mailbox import Mailbox
from persistency.errors import Closed, Overloaded, StorageError
from persistency.storage.port import Barrier, GetRow, LastVersion
from tests.loops import InLoop, together


def in_thread(fn: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Run a function in a thread; the list gets what it returned or raised."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(fn())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


def wait_until_waiting(mailbox: Mailbox, count: int) -> None:
    """Spin until so many threads wait for room; it is a state nobody can announce from within."""
    while len(mailbox._queue) < count:
        pass


def test_messages_are_taken_in_the_order_they_were_posted() -> None:
    """Promise 1: one line, first in first out, events and requests alike."""
    mailbox = Mailbox(Bounds())
    mailbox.put(b"c", b"1", b"", 1)
    mailbox.ask(LastVersion(), reads=True)
    mailbox.put(b"c", b"2", b"", 1)
    assert mailbox.hold(object())
    group = mailbox.take()
    assert [group[0], group[1], group[3], group[4], group[6], group[7]] == [b"c", b"1", None, LastVersion(), b"c", b"2"]


def test_a_queued_put_is_three_places_and_nothing_else() -> None:
    """A plain put costs three pointers in one flat list, and no object of its own."""
    mailbox = Mailbox(Bounds())
    for number in range(1000):
        mailbox.put(b"c", b"%d" % number, b"payload", 10)
    assert len(mailbox._messages) == 3000
    assert sys.getsizeof(mailbox._messages) <= 1000 * 24 * 1.2 + 200


def test_the_turn_is_one_callers_at_a_time() -> None:
    """Nobody takes the line while another one has the turn."""
    mailbox = Mailbox(Bounds())
    mailbox.put(b"c", b"1", b"", 1)
    token = object()
    assert mailbox.hold(token)
    assert mailbox.take()
    mailbox.put(b"c", b"2", b"", 1)
    assert not mailbox.hold(object())
    mailbox.give_back(object())  # somebody else's token gives nothing back
    assert not mailbox.hold(object())
    mailbox.give_back(token)
    assert mailbox.hold(object())
    assert mailbox.take() == [b"c", b"2", b""]


def test_a_read_is_begun_ahead_only_by_itself_and_in_turn() -> None:
    """By who finds the line empty and the turn free, after one that came alone; and under that turn."""
    mailbox = Mailbox(Bounds())
    begun: list[tuple[GetRow, bool]] = []
    mailbox.serve_ahead(lambda message: begun.append((message, mailbox.taken_here)))

    def get(*, begins: bool) -> None:
        before = len(begun)
        assert not mailbox.get(b"c", b"k").done()
        assert mailbox._messages[-2] == GetRow(b"c", b"k")
        assert begun[before:] == ([(mailbox._messages[-2], True)] if begins else [])
        assert not mailbox.taken
        if begins:
            assert begun[-1][0] is mailbox._messages[-2]

    def take() -> None:
        token = object()
        assert mailbox.hold(token)
        mailbox.take(answers_ring=True)
        mailbox.give_back(token)

    get(begins=False)  # nobody knows yet who comes here
    take()
    get(begins=True)
    get(begins=False)  # behind another
    take()
    get(begins=False)  # two came
    take()
    get(begins=True)
    take()
    mailbox.ring()
    get(begins=False)  # something else is looked after first
    take()
    token = object()
    assert mailbox.hold(token)
    before = len(begun)
    mailbox.get(b"c", b"k")  # while somebody has the turn
    assert len(begun) == before
    mailbox.give_back(token)
    take()
    mailbox.serve_ahead(None)
    get(begins=False)
    take()
    mailbox.serve_ahead(lambda message: begun.append((message, True)))
    mailbox.close(lambda: Closed("closed"))
    before = len(begun)
    with pytest.raises(Closed):
        mailbox.get(b"c", b"k")
    assert len(begun) == before


def test_a_read_that_could_not_be_begun_is_asked_all_the_same() -> None:
    """A fault while it is begun is nobody's: its turn will show."""
    mailbox = Mailbox(Bounds())

    def fails(_message: GetRow) -> None:
        raise StorageError("away")

    mailbox.serve_ahead(fails)
    token = object()
    assert mailbox.hold(token)
    mailbox.take()
    mailbox.give_back(token)
    assert not mailbox.get(b"c", b"k").done()
    assert not mailbox.taken
    assert len(mailbox) == 1


def test_who_waits_for_the_turn_comes_before_who_would_not() -> None:
    """Else a fork could wait in vain beside a worker that is never idle, and gives the turn back only to take it."""
    mailbox = Mailbox(Bounds())
    token, waiting = object(), object()
    assert mailbox.hold(token)
    thread, outcome = in_thread(lambda: mailbox.hold(waiting, WAIT))
    while not mailbox._late:
        os.sched_yield()
    with mailbox._lock:
        mailbox.give_back(token)
        assert not mailbox.hold(token)
    thread.join(WAIT)
    assert outcome == [True]
    assert mailbox._rung  # who was kept from it looks again
    mailbox.give_back(waiting)
    assert mailbox.hold(token)


def test_a_full_mailbox_makes_a_thread_wait_and_lets_it_in_when_there_is_room() -> None:
    """Promise 4: a plain thread waits for room, and its write is then taken."""
    with Actor(ops_max=4) as actor:
        actor.hold()
        for number in range(4):
            actor.put(b"%d" % number)
        thread, outcome = in_thread(lambda: actor.put(b"late"))
        wait_until_waiting(actor.mailbox, 1)
        assert outcome == []
        actor.let_go()
        thread.join(WAIT)
        assert outcome == [None]
        assert actor.mailbox.write(Barrier(), 0, 0, free=True).result(WAIT) is None
        assert actor.mailbox.get(b"c", b"late").result(WAIT) == b"x"


def test_who_waits_for_room_is_let_in_in_order() -> None:
    """First come, first served: a newcomer doesn't overtake those who wait."""
    with Actor(ops_max=1) as actor:
        actor.hold()
        actor.put(b"0")
        threads = []
        for number in range(1, 6):
            threads.append(in_thread(lambda number=number: actor.put(b"%d" % number))[0])
            wait_until_waiting(actor.mailbox, number)
        actor.let_go()
        for thread in threads:
            thread.join(WAIT)
        actor.mailbox.write(Barrier(), 0, 0, free=True).result(WAIT)
        puts = [
            group[at + 1] for group in actor.store.groups for at in range(0, len(group), 3) if group[at] is not None
        ]
        assert puts == [b"held", b"0", b"1", b"2", b"3", b"4", b"5"]


def test_waiting_for_room_has_a_limit() -> None:
    """Promise 4: after full_timeout the poster gets Overloaded, and its write wasn't taken."""
    with Actor(ops_max=1, full_timeout=0.01) as actor:
        actor.hold()
        actor.put(b"1")
        with pytest.raises(Overloaded, match=r"within 0\.01 s"):
            actor.put(b"2")
        assert actor.worker.statistics().pending == 2
        actor.let_go()
        actor.mailbox.write(Barrier(), 0, 0, free=True).result(WAIT)
        assert actor.mailbox.get(b"c", b"2").result(WAIT) is None
        actor.put(b"3")  # and the mailbox is as open as ever


def test_on_full_raise_refuses_at_once() -> None:
    """Promise 4: with on_full='raise' nobody waits."""
    with Actor(ops_max=1, on_full="raise") as actor:
        actor.hold()
        actor.put(b"1")
        with pytest.raises(Overloaded, match="on_full='raise'") as caught:
            actor.put(b"2")
        assert caught.value.retryable
        assert caught.value.hint


def test_bytes_are_bounded_as_well_as_operations() -> None:
    """Promise 4: writes are bounded by their bytes too; one larger than the bound is taken by an empty mailbox."""
    with Actor(bytes_max=1000, on_full="raise") as actor:
        actor.put(b"big", b"x" * 5000)
        actor.mailbox.write(Barrier(), 0, 0, free=True).result(WAIT)
        actor.hold()
        actor.put(b"1", b"x" * 600)
        with pytest.raises(Overloaded):
            actor.put(b"2", b"x" * 600)
        actor.put(b"3", b"x" * 300)


def test_a_full_write_mailbox_refuses_no_read() -> None:
    """Promise 4: requests have a bound of their own."""
    with Actor(ops_max=1, requests_max=2, on_full="raise") as actor:
        actor.hold()
        actor.put(b"1")
        reads = [actor.mailbox.get(b"c", b"1"), actor.mailbox.get(b"c", b"held")]
        with pytest.raises(Overloaded):
            actor.mailbox.get(b"c", b"1")
        actor.mailbox.write(Barrier(), 0, 0, free=True)  # a flush needs no room
        actor.let_go()
        assert [read.result(WAIT) for read in reads] == [b"x", b"x"]


def test_reads_do_not_wait_behind_writers_who_wait_for_room() -> None:
    """A thread that waits to write holds up no read of another one."""
    with Actor(ops_max=1) as actor:
        actor.hold()
        actor.put(b"1")
        thread, _ = in_thread(lambda: actor.put(b"2"))
        wait_until_waiting(actor.mailbox, 1)
        read = actor.mailbox.get(b"c", b"1")
        actor.let_go()
        assert read.result(WAIT) == b"x"
        thread.join(WAIT)


def test_a_loop_thread_never_waits_and_may_go_over_by_as_much_again(in_loop: InLoop) -> None:
    """Promise 4: a thread that runs an event loop is refused, not blocked, and only beyond twice the bound."""
    with Actor(ops_max=4) as actor:
        actor.hold()

        async def flood() -> int:
            taken = 0
            try:
                while True:
                    actor.put(b"%d" % taken)
                    taken += 1
            except Overloaded as error:
                assert "event loop" in str(error)
            return taken

        assert in_loop(flood) == 8


def test_as_many_pacing_tasks_as_the_bound_counts_are_never_refused(in_loop: InLoop) -> None:
    """Promise 4: tasks that await drain() after every put are never refused."""
    with Actor(ops_max=16) as actor:

        async def task(name: int) -> None:
            for number in range(50):
                actor.put(b"%d.%d" % (name, number))
                await actor.mailbox.drain()

        async def main() -> None:
            await together(*(task(name) for name in range(16)))

        in_loop(main)
        actor.mailbox.write(Barrier(), 0, 0, free=True).result(WAIT)
        assert actor.worker.statistics().committed == 800


def test_drain_is_settled_at_the_low_water_mark() -> None:
    """drain() answers at once below half of the bounds, else when the line was taken."""
    with Actor(ops_max=4) as actor:
        actor.hold()
        actor.put(b"1")
        actor.put(b"2")
        assert actor.mailbox.drain().done()
        actor.put(b"3")
        drained = actor.mailbox.drain()
        assert not drained.done()
        actor.let_go()
        assert drained.result(WAIT) is None


def test_the_workers_own_posts_never_wait() -> None:
    """Promise 4: a post from a callback in the worker's thread is taken over the bound."""
    with Actor(ops_max=1) as actor:
        actor.hold()
        posted = threading.Event()

        def post(_reply: object) -> None:
            for number in range(10):
                actor.put(b"from the callback %d" % number)
            posted.set()

        actor.mailbox.get(b"c", b"1").add_done_callback(post)
        actor.let_go()
        assert posted.wait(WAIT)
        actor.mailbox.write(Barrier(), 0, 0, free=True).result(WAIT)
        assert actor.worker.statistics().committed == 11


def test_a_post_in_the_middle_of_another_is_taken_over_the_bound() -> None:
    """Promise 4: a signal handler or `__del__` in the middle of a post of its thread neither waits nor deadlocks."""
    mailbox = Mailbox(Bounds(ops_max=1))
    mailbox.put(b"c", b"1", b"", 1)
    with mailbox._lock:
        mailbox.put(b"c", b"2", b"", 1)
    assert len(mailbox._messages) == 6


def test_a_signal_handler_may_post_while_its_thread_waits_for_room() -> None:
    """Promise 4: the handler's post is taken at once, and the waiting one when there is room."""
    with Actor(ops_max=1) as actor:
        actor.hold()
        actor.put(b"1")
        handled: list[bool] = []
        came = threading.Event()

        def handler(*_: object) -> None:
            if came.is_set():
                return
            actor.put(b"from the handler")
            handled.append(True)
            actor.let_go()
            came.set()

        previous = signal.signal(signal.SIGUSR1, handler)
        try:
            main = threading.main_thread().ident
            assert main is not None

            def interrupt() -> None:
                wait_until_waiting(actor.mailbox, 1)
                signal.pthread_kill(main, signal.SIGUSR1)
                # A signal that comes just before a wait begins is slept through: then another one has to come.
                while not came.wait(0.2):
                    signal.pthread_kill(main, signal.SIGUSR1)

            thread, _ = in_thread(interrupt)
            actor.put(b"2")
            thread.join(WAIT)
        finally:
            signal.signal(signal.SIGUSR1, previous)
        assert handled == [True]
        actor.mailbox.write(Barrier(), 0, 0, free=True).result(WAIT)
        assert actor.worker.statistics().committed == 4


def test_an_interrupted_wait_for_room_leaves_nothing_behind() -> None:
    """A KeyboardInterrupt while waiting for room takes the post out of the line of those who wait."""
    with Actor(ops_max=1) as actor:
        actor.hold()
        actor.put(b"1")

        came = threading.Event()

        def on_interrupt(*_: object) -> None:
            if not came.is_set():
                came.set()
                raise KeyboardInterrupt

        def interrupt() -> None:
            wait_until_waiting(actor.mailbox, 1)
            # Again until it is seen: one that comes just before CPython blocks in a lock is only seen after it.
            while not came.is_set():
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                came.wait(0.05)

        before = signal.signal(signal.SIGINT, on_interrupt)
        try:
            in_thread(interrupt)
            with pytest.raises(KeyboardInterrupt):
                actor.put(b"2")
        finally:
            signal.signal(signal.SIGINT, before)
        assert not actor.mailbox._queue
        actor.let_go()
        actor.put(b"3")
        actor.mailbox.write(Barrier(), 0, 0, free=True).result(WAIT)
        assert actor.mailbox.get(b"c", b"2").result(WAIT) is None


def test_closing_refuses_who_comes_later_and_who_waits_for_room() -> None:
    """Nothing slips in behind a closing; those who wait for room are told, not left."""
    with Actor(ops_max=1) as actor:
        actor.hold()
        actor.put(b"1")
        thread, outcome = in_thread(lambda: actor.put(b"2"))
        wait_until_waiting(actor.mailbox, 1)
        closed = actor.worker.close()
        thread.join(WAIT)
        assert isinstance(outcome[0], Closed)
        for post in (
            lambda: actor.put(b"3"),
            lambda: actor.mailbox.get(b"c", b"1"),
            lambda: actor.mailbox.drain(),
            lambda: actor.mailbox.write(Barrier(), 0, 0, free=True),
        ):
            with pytest.raises(Closed):
                post()
        actor.let_go()
        closed.result(WAIT)
        assert actor.worker.statistics().committed == 2


def test_a_withdrawn_read_gives_its_place_back() -> None:
    """Promise 8: cancelling a read that hasn't started removes it, and lets in who waits for its place."""
    with Actor(requests_max=1) as actor:
        actor.hold()
        first = actor.mailbox.get(b"c", b"1")
        thread, outcome = in_thread(lambda: actor.mailbox.get(b"c", b"held").result(WAIT))
        wait_until_waiting(actor.mailbox, 1)
        assert first.cancel()
        assert first.cancelled()
        actor.let_go()
        thread.join(WAIT)
        assert outcome == [b"x"]
        messages = [group[1] for group in actor.store.groups if group[0] is None]
        assert GetRow(b"c", b"1") not in messages


def test_a_thousand_random_schedules_keep_every_writers_order() -> None:
    """Promise 1: whatever the interleaving of posters, room and turns, each thread's writes stay in its order."""
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    with Actor(ops_max=7, bytes_max=300) as actor:
        sizes = [[rng.randrange(60) for _ in range(400)] for _ in range(6)]

        def writer(name: int) -> None:
            for number, size in enumerate(sizes[name]):
                actor.put(b"%d:%d" % (name, number), b"x" * size)

        threads = [in_thread(lambda name=name: writer(name)) for name in range(6)]
        for thread, outcome in threads:
            thread.join(60)
            assert outcome == [None], f"seed {seed}"
        actor.mailbox.write(Barrier(), 0, 0, free=True).result(WAIT)
        seen: dict[bytes, int] = {}
        for group in actor.store.groups:
            for at in range(0, len(group), 3):
                if group[at] is not None:
                    name, _, number = group[at + 1].partition(b":")
                    assert int(number) == seen.get(name, -1) + 1, f"seed {seed}"
                    seen[name] = int(number)
        assert sorted(seen.values()) == [399] * 6, f"seed {seed}"


def test_a_drain_is_settled_when_cancelled_reads_lower_the_level() -> None:
    """Promise 7: drain() is answered by whatever brings the line below its low-water mark."""
    with Actor(requests_max=4) as actor:
        actor.hold()
        reads = [actor.mailbox.get(b"c", b"%d" % number) for number in range(4)]
        drained = actor.mailbox.drain()
        assert not drained.done()
        assert all(read.cancel() for read in reads)
        assert drained.result(WAIT) is None


def test_callbacks_of_drain_do_not_run_under_the_mailbox_s_lock() -> None:
    """A callback may wait for a thread that posts: nothing of ours is held while callbacks run."""
    with Actor(ops_max=4) as actor:
        actor.hold()
        for number in range(4):
            actor.put(b"%d" % number)
        posted = threading.Event()
        waited: list[bool] = []

        def callback(_reply: object) -> None:
            in_thread(lambda: (actor.put(b"beside"), posted.set()))
            waited.append(posted.wait(WAIT))

        actor.mailbox.drain().add_done_callback(callback)
        actor.let_go()
        actor.mailbox.ask(LastVersion(), reads=True).result(WAIT)
        assert waited == [True]


def test_an_interrupt_while_others_are_let_in_forgets_nobody() -> None:
    """Promise 3: whoever waits for room is let in, or told; an exception in between loses no post."""
    with Actor(ops_max=1) as actor:
        actor.hold()
        actor.put(b"0")
        outcomes = []
        for number in range(1, 4):
            outcomes.append(in_thread(lambda number=number: actor.put(b"%d" % number)))
            wait_until_waiting(actor.mailbox, number)
        original = actor.mailbox.level

        def interrupted() -> Any:
            raise KeyboardInterrupt

        actor.mailbox.level = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            actor.mailbox._admit()
        actor.mailbox.level = original  # type: ignore[method-assign]
        actor.let_go()
        for thread, outcome in outcomes:
            thread.join(WAIT)
            assert outcome == [None]
        actor.mailbox.write(Barrier(), 0, 0, free=True).result(WAIT)
        assert actor.worker.statistics().committed == 5


def test_thousands_of_cancelled_reads_are_cleared_away_at_once() -> None:
    """Promise 8: cancelling is cheap however long the line is, and what was cancelled takes no memory for long."""
    with Actor() as actor:
        actor.hold()
        for number in range(1000):
            actor.put(b"%d" % number)
        reads = [actor.mailbox.get(b"c", b"%d" % number) for number in range(8000)]
        kept = reads.pop(4000)
        assert all(read.cancel() for read in reads)
        assert len(actor.mailbox._messages) < 3 * 4000
        assert not reads[0].map(str).done() or reads[0].cancelled()
        actor.let_go()
        assert kept.result(WAIT) is None
        asked = sum(group[at] is None for group in actor.store.groups for at in range(0, len(group), 3))
        assert asked == 1
