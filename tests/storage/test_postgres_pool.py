"""The pool: so many connections and no more, kept by who uses them, given up when nobody does."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from persistency import Persistency
from persistency.storage.postgres import pool as pool_module
from persistency.storage.postgres.address import parsed
from persistency.storage.postgres.faults import Lost
from persistency.storage.postgres.pool import Holder, Pool
from tests.postgres import fresh_url, sql, until, with_parameters

WAIT = 60


class FakeSession:
    """A session that is nothing but its state."""

    def __init__(self) -> None:
        self.broken = False
        self.idle = True
        self.used_at = 0.0
        self.closed = False
        self.cut_off = False

    def is_cut_off(self) -> bool:
        return self.cut_off

    def close(self) -> None:
        self.closed = True

    def forsake(self) -> None:
        self.closed = True


@pytest.fixture
def made() -> list[FakeSession]:
    """The sessions that were made, in order."""
    return []


def pool_of(size: int, made: list[FakeSession]) -> Pool:
    """Return a pool of sessions that are noted down."""

    def connect() -> Any:
        made.append(FakeSession())
        return made[-1]

    return Pool(connect, size)


def test_a_holder_keeps_its_session(made: list[FakeSession]) -> None:
    """Turn after turn it is the same one, and nobody else's while there is room."""
    pool, one, other = pool_of(2, made), Holder(), Holder()
    for _ in range(3):
        assert pool.borrow(one) is made[0]  # type: ignore[comparison-overlap]  # a stand-in
        pool.park(one)
        assert pool.borrow(other) is made[1]  # type: ignore[comparison-overlap]  # a stand-in
        pool.park(other)
    assert len(made) == 2


def test_the_longest_idle_gives_up_its_session(made: list[FakeSession]) -> None:
    """With no room left, whoever has not used its own for the longest loses it."""
    pool, holders = pool_of(2, made), [Holder() for _ in range(3)]
    for holder in holders[:2]:
        pool.borrow(holder)
        pool.park(holder)
    pool.borrow(holders[0])
    pool.park(holders[0])
    assert pool.borrow(holders[2]) is made[1]  # type: ignore[comparison-overlap]  # a stand-in
    assert holders[1].session is None
    assert holders[0].session is made[0]  # type: ignore[comparison-overlap]  # a stand-in
    assert len(made) == 2


def test_who_waits_gets_the_next_in_order(made: list[FakeSession]) -> None:
    """First come first served, even before whoever gives a session back and wants it again."""
    pool, first = pool_of(1, made), Holder()
    pool.borrow(first)
    served: list[int] = []
    threads = []
    for number in range(4):

        def wait(number: int = number) -> None:
            holder = Holder()
            pool.borrow(holder)
            served.append(number)
            pool.park(holder)
            pool.leave(holder)

        threads.append(threading.Thread(target=wait))
        threads[-1].start()
        until(lambda number=number: len(pool._waiting) == number + 1, "it waits")
    pool.park(first)
    pool.borrow(first)
    assert served == [0, 1, 2, 3]
    for thread in threads:
        thread.join(WAIT)
    assert len(made) == 1


class Waiter(threading.Thread):
    """A thread that borrows a session; `got` is what it was lent, or the error. Starting it returns once it waits."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(daemon=True)
        self.got: object = None
        self._pool = pool
        waiting = len(pool._waiting)
        self.start()
        until(lambda: len(pool._waiting) == waiting + 1, "it waits")

    def run(self) -> None:
        try:
            self.got = self._pool.borrow(Holder())
        except Lost as error:
            self.got = error


@pytest.mark.parametrize("ends", ["park", "leave", "give up", "park what broke", "leave what broke"])
def test_whatever_makes_room_is_told_to_who_waits(made: list[FakeSession], ends: str) -> None:
    """A session that is given back, or given up, is the next one's, or makes room for another, at once."""
    pool, one = pool_of(1, made), Holder()
    pool.borrow(one)
    waiter = Waiter(pool)
    made[0].broken, made[0].idle = ends.endswith("broke"), not ends.endswith("broke")
    {"park": pool.park, "leave": pool.leave, "give": pool.give_up}[ends.split()[0]](one)
    waiter.join(WAIT)
    assert waiter.got is made[-1]
    assert len(made) == (1 if ends in ("park", "leave") else 2)


def test_two_sessions_given_back_at_once_serve_two(made: list[FakeSession]) -> None:
    """Whoever is served tells the next in line, for whom there is one too."""
    pool, holders = pool_of(2, made), [Holder(), Holder()]
    for holder in holders:
        pool.borrow(holder)
    waiters = [Waiter(pool), Waiter(pool)]
    with pool._lock:  # so that the first in line is told twice before it runs
        for holder in holders:
            pool.park(holder)
    for waiter in waiters:
        waiter.join(WAIT)
    assert [session for session in made if session in [waiter.got for waiter in waiters]] == made
    assert len(made) == 2


def test_room_that_a_failed_connection_leaves_is_told(made: list[FakeSession]) -> None:
    """While one connects, which takes all the room there is, another waits: if that fails it is its turn."""
    begun, fail = threading.Event(), threading.Event()

    def connect() -> Any:
        if not begun.is_set():
            begun.set()
            assert fail.wait(WAIT)
            raise Lost("no")
        made.append(FakeSession())
        return made[-1]

    pool, failed = Pool(connect, 1), []

    def borrow() -> None:
        with pytest.raises(Lost, match="no"):
            pool.borrow(Holder())
        failed.append(True)

    first = threading.Thread(target=borrow)
    first.start()
    assert begun.wait(WAIT)
    second = Waiter(pool)
    fail.set()
    first.join(WAIT)
    second.join(WAIT)
    assert failed == [True]
    assert [second.got] == made


def test_nobody_waits_for_ever(made: list[FakeSession], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where none is given back, waiting ends with an error that says why; the pool is none the worse."""
    monkeypatch.setattr(pool_module, "WAIT_SECONDS_MAX", 0.05)
    pool, one, other = pool_of(1, made), Holder(), Holder()
    pool.borrow(one)
    with pytest.raises(Lost, match="all 1 connections have been in use"):
        pool.borrow(other)
    pool.park(one)
    assert pool.borrow(other) is made[0]  # type: ignore[comparison-overlap]  # a stand-in


@pytest.mark.parametrize("flaw", ["broken", "busy"])
def test_what_isnt_sound_is_never_lent_again(made: list[FakeSession], flaw: str) -> None:
    """A session that broke, or is in the middle of something, is closed, and makes room for another."""
    pool, one = pool_of(1, made), Holder()
    pool.borrow(one)
    made[0].broken, made[0].idle = flaw == "broken", False
    pool.park(one)
    assert made[0].closed
    assert pool.borrow(one) is made[1]  # type: ignore[comparison-overlap]  # a stand-in
    made[1].broken, made[1].idle = flaw == "broken", False
    pool.leave(one)
    assert made[1].closed
    assert pool.borrow(one) is made[2]  # type: ignore[comparison-overlap]  # a stand-in


def test_what_is_kept_busy_is_lent_to_nobody(made: list[FakeSession]) -> None:
    """A session over which something was sent ahead is its holder's for that answer alone; a turn gets a sound one."""
    pool, one, other = pool_of(1, made), Holder(), Holder()
    for taker in (one, other):
        session = pool.borrow(one)
        session.broken = True
        pool.park(one, busy=True)
        assert pool.at_hand(one) is None
        assert not made[-1].closed
        assert not pool.borrow(taker).broken
        assert made[-2].closed
        pool.park(taker)
        pool.leave(taker)
    assert len(made) == 3


def test_what_was_cut_off_meanwhile_is_replaced(made: list[FakeSession]) -> None:
    """A session that the server has ended while nobody used it is found out before anything is sent, free or kept."""
    pool, one, other = pool_of(1, made), Holder(), Holder()
    pool.borrow(one)
    pool.park(one)
    made[0].cut_off = True
    assert pool.borrow(one) is made[1]  # type: ignore[comparison-overlap]  # a stand-in
    assert made[0].closed
    pool.leave(one)
    made[1].cut_off = True
    assert pool.borrow(other) is made[2]  # type: ignore[comparison-overlap]  # a stand-in
    assert made[1].closed


def interrupted(module: str, function: str, called: str, act: Callable[[], object]) -> None:
    """Do something, with a Ctrl-C as soon as a function has called something of a name."""

    def look(frame: Any, event: str, arg: Any) -> None:
        if event != "c_return" and event != "call":
            return
        inside, name = (frame, arg.__name__) if event == "c_return" else (frame.f_back, frame.f_code.co_name)
        if name == called and inside.f_code.co_name == function and inside.f_code.co_filename.endswith(module):
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(look)
    try:
        with pytest.raises(KeyboardInterrupt):
            act()
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize(
    ("function", "called"), [("_queue_up", "append"), ("_queue_up", "add"), ("_wait", "connect"), ("_wait", "add")]
)
def test_an_interrupt_while_a_session_is_made_leaves_the_room_to_others(function: str, called: str) -> None:
    """Whoever is gone waits for nothing any more, and what nobody has counts for nothing."""
    made: list[int] = []

    def connect() -> Any:
        made.append(1)
        return FakeSession()

    pool = Pool(connect, 1)

    def borrow() -> None:
        holder = Holder()
        try:
            pool.borrow(holder)
        finally:
            pool.leave(holder)

    interrupted("pool.py", function, called, borrow)
    gc.collect()  # of the interrupt's traceback
    assert not pool._waiting
    holder = Holder()
    assert pool.borrow(holder) is not None
    assert pool._count == 1
    pool.park(holder)
    assert holder.session is not None


def test_a_session_that_is_busy_is_given_up_for_somebody_else(made: list[FakeSession]) -> None:
    """What was sent ahead keeps nobody from a session; a sound one is taken first."""
    pool, one, other, third = pool_of(2, made), Holder(), Holder(), Holder()
    for holder in (one, other):
        pool.borrow(holder)
    made[0].broken, made[0].idle = True, False
    pool.park(one, busy=True)
    pool.park(other)
    assert pool.borrow(third) is made[1]  # type: ignore[comparison-overlap]  # a stand-in
    assert pool.borrow(other) is made[2]  # type: ignore[comparison-overlap]  # a stand-in
    assert made[0].closed
    assert one.session is None
    assert pool._count == 2


def test_who_is_short_of_sessions_sends_nothing_ahead(made: list[FakeSession], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once somebody had to take one from somebody else, all keep them for their turns, for a while."""
    clock = [1000.0]
    monkeypatch.setattr(pool_module, "monotonic", lambda: clock[0])
    pool, one, other = pool_of(1, made), Holder(), Holder()
    pool.borrow(one)
    pool.park(one)
    assert pool.at_hand(one) is made[0]  # type: ignore[comparison-overlap]  # a stand-in
    pool.park(one)
    pool.borrow(other)
    pool.park(other)
    assert pool.at_hand(other) is None
    clock[0] += pool_module.SCARCE_SECONDS
    assert pool.at_hand(other) is made[0]  # type: ignore[comparison-overlap]  # a stand-in


def test_a_connection_that_fails_leaves_its_room(made: list[FakeSession]) -> None:
    """What couldn't be made counts for nothing."""
    attempts: list[int] = []

    def connect() -> Any:
        attempts.append(1)
        if len(attempts) < 3:
            raise Lost("no")
        made.append(FakeSession())
        return made[-1]

    pool, one = Pool(connect, 1), Holder()
    for _ in range(2):
        with pytest.raises(Lost):
            pool.borrow(one)
    assert pool.borrow(one) is made[0]  # type: ignore[comparison-overlap]  # a stand-in


def test_idle_sessions_are_closed(made: list[FakeSession]) -> None:
    """Those that nobody has used for a while go, parked or free; those in use stay."""
    pool, holders = pool_of(3, made), [Holder() for _ in range(3)]
    for holder in holders:
        pool.borrow(holder)
    pool.park(holders[0])
    pool.leave(holders[1])
    assert pool.close_idle(3600) == 3
    assert pool.close_idle(-1) == 1
    assert [session.closed for session in made] == [True, True, False]
    assert holders[0].session is None
    pool.borrow(holders[0])
    assert len(made) == 4


def test_many_jobs_on_few_connections() -> None:
    """A hundred jobs, written from many threads, never have more connections than they may; every value is right."""
    url = fresh_url(persistency_connections=5, application_name="few")
    looking = with_parameters(url, application_name="looking")
    schema = parsed(url).schema
    seen: list[int] = []
    with Persistency(url) as persistency:
        jobs = [persistency.open_job(f"j{at}") for at in range(100)]
        start = threading.Barrier(8)

        def write(part: int) -> None:
            start.wait(WAIT)
            for number in range(5):
                for job in jobs[part::8]:
                    job.put("c", (number,), b"%d" % number)
            for job in jobs[part::8]:
                job.flush().result(WAIT)
            seen.append(sql(looking, "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'few'")[0][0])

        threads = [threading.Thread(target=write, args=(part,)) for part in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        assert len(seen) == 8
        assert max(seen) <= 5
        for job in jobs:
            assert job.version().result(WAIT) == 5
        assert sql(url, f"SELECT count(*) FROM {schema}.rows") == [(500,)]
    until(
        lambda: not sql(looking, "SELECT 1 FROM pg_stat_activity WHERE application_name = 'few'"),
        "all connections are closed",
    )
