"""Promise 4: a post on an event loop's thread never enters a wait, and one from an awkward place never deadlocks.

Every lock, condition and event that the package makes is replaced by one that notes which thread had to wait for it. A
plain thread at a full mailbox is noted, so the instrument can be trusted where it notes nothing.
"""

from __future__ import annotations

import gc
import itertools
import logging
import signal
import sys
import threading
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from time import monotonic, sleep
from typing import Any

import pytest

from persistency import Check, Job, KeyRange, Overloaded, Persistency, Put, Reply, WriteFailed, key
from tests.crash.cancelling import hold
from tests.loops import InLoop

WAIT = 20.0  # seconds a test waits for what must come
BOUND = 8
NEVER = 10**6  # a version no row has

# -- the instrument ---------------------------------------------------------------------------------------------------


class Watch:
    """Which thread has waited for what.

    A mutex is told apart: that it is somebody else's is over in a few instructions, because whoever has one waits for
    nothing, which is noted too.
    """

    def __init__(self) -> None:
        self.noted: list[tuple[int, str]] = []
        self.with_a_mutex: list[str] = []  # what was waited for by who had one
        self._mine = threading.local()
        self._changed = threading.Condition()

    @property
    def mutexes(self) -> Counter[int]:
        """How often the calling thread has each mutex."""
        found: Counter[int] = vars(self._mine).setdefault("mutexes", Counter())
        return found

    def note(self, what: str, released: object = None) -> None:
        """Note that the calling thread is about to wait; `released` is a mutex that it gives up for it."""
        had = [mutex for mutex, times in self.mutexes.items() if times and mutex != id(released)]
        with self._changed:
            self.noted.append((get_ident(), what))
            if had and what != "mutex":
                self.with_a_mutex.append(what)
            self._changed.notify_all()

    def waited(self) -> list[str]:
        """Return what the calling thread has waited for, mutexes apart."""
        return [what for what in self.of(get_ident()) if what != "mutex"]

    def of(self, thread: int | None) -> list[str]:
        """Return what a thread has waited for."""
        return [what for who, what in self.noted if who == thread]

    def wait_for(self, thread: int | None) -> None:
        """Wait until a thread has begun to wait for a lock."""
        with self._changed:
            assert self._changed.wait_for(lambda: "lock" in self.of(thread), WAIT)


class WatchedLock:
    """A lock that tells when it can't be had at once."""

    what = "lock"

    def __init__(self, watch: Watch, lock: Any) -> None:
        self._watch = watch
        self._lock = lock

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self._lock.acquire(False):
            return True
        if not blocking or timeout == 0:
            return False
        self._watch.note(self.what)
        return bool(self._lock.acquire(True, timeout))

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lock, name)


class WatchedMutex(WatchedLock):
    """A re-entrant one, which also tells that it is had."""

    what = "mutex"

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        had = super().acquire(blocking, timeout)
        self._watch.mutexes[id(self)] += had
        return had

    def release(self) -> None:
        self._watch.mutexes[id(self)] -= 1
        self._lock.release()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _release_save(self) -> Any:  # as a condition does while it waits
        return self._watch.mutexes.pop(id(self)), self._lock._release_save()

    def _acquire_restore(self, saved: Any) -> None:
        times, theirs = saved
        self._lock._acquire_restore(theirs)
        self._watch.mutexes[id(self)] = times


def watched_kinds(watch: Watch) -> dict[Any, Any]:
    """Return what stands in for each thing that a thread can wait for."""

    class Condition(threading.Condition):
        def wait(self, timeout: float | None = None) -> bool:
            watch.note("condition", released=self._lock)  # type: ignore[attr-defined]  # every condition has one
            return super().wait(timeout)

    class Event(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            watch.note("event")
            return super().wait(timeout)

    return {
        threading.Lock: lambda: WatchedLock(watch, threading.Lock()),
        threading.RLock: lambda: WatchedMutex(watch, threading.RLock()),
        threading.Condition: Condition,
        threading.Event: Event,
    }


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Put the instrument in the place of everything that the package's modules can wait for."""
    watch = Watch()
    kinds = watched_kinds(watch)
    module = types.ModuleType("threading")
    vars(module).update({name: kinds.get(value, value) for name, value in _hashable(vars(threading))})
    mutexes: dict[int, WatchedMutex] = {}
    replaced = set()
    for name, found in list(sys.modules.items()):
        if name.split(".")[0] != "persistency" or found is None:
            continue
        for attribute, value in _hashable(vars(found)):
            if value is threading:
                monkeypatch.setattr(found, attribute, module)
            elif value in kinds:
                monkeypatch.setattr(found, attribute, kinds[value])
            elif type(value) is type(threading.RLock()):
                mutex = mutexes.setdefault(id(value), WatchedMutex(watch, value))
                monkeypatch.setattr(found, attribute, mutex)
            else:
                continue
            replaced.add(name)
    assert {"persistency.actor.mailbox", "persistency.actor.bounds", "persistency.actor.reply"} <= replaced
    return watch


def _hashable(found: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in found.items() if getattr(type(value), "__hash__", None) is not None]


def test_the_instrument_tells_who_waits_and_with_what() -> None:
    """A wait is noted, and whether a mutex is had meanwhile; the one that a condition gives up for it is none."""
    watch = Watch()
    kinds = watched_kinds(watch)
    mutex, lock = kinds[threading.RLock](), kinds[threading.Lock]()
    condition = kinds[threading.Condition](mutex)
    with lock, condition, mutex:
        condition.wait(0)
    assert (watch.waited(), watch.with_a_mutex) == (["condition"], [])
    with lock, mutex:
        assert not lock.acquire(timeout=0.001)
    assert (watch.waited(), watch.with_a_mutex) == (["condition", "lock"], ["lock"])
    with mutex:
        join(start(lambda: mutex.acquire(timeout=0.001)))
    kinds[threading.Event]().wait(0)
    assert [what for _, what in watch.noted] == ["condition", "lock", "mutex", "event"]
    assert watch.with_a_mutex == ["lock"]


# -- jobs that are full -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory", "directory"])
def persistency(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Persistency]:
    """Give an empty root of either kind."""
    with Persistency(":memory:" if request.param == "memory" else tmp_path / "root") as opened:
        yield opened


@contextmanager
def held(job: Job) -> Iterator[threading.Event]:
    """Have a thread keep the job's turn, so that what is posted stays in line; give what lets it go."""
    gate, entered = threading.Event(), threading.Event()

    def enter(tx: Any) -> None:
        entered.set()
        hold(tx, gate)

    thread = threading.Thread(target=lambda: job.run(enter).result(WAIT))
    thread.start()
    assert entered.wait(WAIT)
    try:
        yield gate
    finally:
        gate.set()
        thread.join(WAIT)


def start(*targets: Callable[[], object]) -> list[threading.Thread]:
    """Start threads."""
    threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    return threads


def join(threads: list[threading.Thread]) -> None:
    """Wait for threads to end; one that doesn't has been deadlocked."""
    for thread in threads:
        thread.join(WAIT)
    assert not [thread for thread in threads if thread.is_alive()]


Post = Callable[[Job, int], Any]
OPS: dict[str, Post] = {
    "put": lambda job, number: job.put("c", key(number), b"x"),
    "put of a tuple": lambda job, number: job.put("c", (number,), b"x"),
    "put with a ttl": lambda job, number: job.put("c", key(number), b"x", ttl=60),
    "persist": lambda job, number: job.persist(Put("c", (number,), b"x")),
    "delete": lambda job, number: job.delete("c", (number,)),
    "delete_prefix": lambda job, number: job.delete_prefix("c", (number,)),
    "delete_range": lambda job, number: job.delete_range("c", KeyRange(key(number), None)),
    "commit": lambda job, number: job.commit(Put("c", (number,), b"x")),
    "run": lambda job, number: job.run(lambda tx: None),
}
REQUESTS: dict[str, Post] = {
    "get": lambda job, number: job.get("c", (number,)),
    "scan": lambda job, number: job.scan("c"),
    "get_many": lambda job, number: job.get_many("c", [(number,)]),
    "changes": lambda job, number: job.changes(number, 1, wait=True),
}
FLOODS: dict[str, tuple[dict[str, int], Post]] = {
    **{f"{name}, operations": ({"mailbox_ops_max": BOUND}, post) for name, post in OPS.items()},
    **{f"{name}, requests": ({"requests_max": BOUND}, post) for name, post in REQUESTS.items()},
    "commit, requests": ({"requests_max": BOUND}, OPS["commit"]),
    "put, bytes": ({"mailbox_bytes_max": 100 * BOUND}, lambda job, number: job.put("c", key(1), b"x" * 98)),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_loop_thread_enters_no_wait(watch: Watch, persistency: Persistency, name: str, in_loop: InLoop) -> None:
    """Promise 4: at a full mailbox a loop's thread goes over the bound by as much again, is refused, and never waits.

    Beside it a plain thread waits for room, and is noted.
    """
    bounds, post = FLOODS[name]
    job = persistency.open_job("job", feed_changes_max=10, **bounds)
    with held(job) as gate:
        watch.noted.clear()  # of the opening
        for number in range(BOUND):
            post(job, number)
        waiting = start(lambda: post(job, BOUND))
        watch.wait_for(waiting[0].ident)

        async def flood() -> int:
            for number in itertools.count(BOUND + 1):
                try:
                    post(job, number)
                except Overloaded as error:
                    assert "event loop" in str(error)
                    return number
            raise AssertionError

        async def main() -> int:
            refused = await flood()
            flushed, drained = job.flush(), job.drain()  # they need no room
            assert not watch.waited()
            assert not watch.with_a_mutex
            gate.set()
            await flushed
            await drained
            return refused

        assert in_loop(main) == 2 * BOUND + 1
        join(waiting)


def test_a_loop_thread_enters_no_wait_beside_busy_threads(
    watch: Watch, persistency: Persistency, in_loop: InLoop
) -> None:
    """A loop that paces itself enters no wait beside threads that fill the mailbox, and everything is written.

    The mailbox's mutex may be somebody else's for a moment; nobody sleeps in it.
    """
    job = persistency.open_job("job", mailbox_ops_max=BOUND)
    paced, each = 3_000, 5_000

    def produce(me: int) -> None:
        for number in range(each):
            job.put("c", (me, number), b"x")

    async def pace() -> None:
        for number in range(paced):
            job.put("c", ("loop", number), b"x")
            await job.drain()

    watch.noted.clear()  # of the opening
    threads = start(*(lambda me=me: produce(me) for me in range(3)))  # type: ignore[misc]  # bound now
    in_loop(pace)
    assert not watch.waited()
    join(threads)
    assert not watch.with_a_mutex
    assert all("lock" in watch.of(thread.ident) for thread in threads)
    assert job.count("c").result(WAIT) == paced + 3 * each


def test_a_loop_thread_enters_no_wait_for_a_resting_job(watch: Watch, tmp_path: Path, in_loop: InLoop) -> None:
    """Promise 4: nor is it waited for that a job that rests can be woken, while there is no place for it."""
    with Persistency(tmp_path, max_live_jobs=1) as persistency:
        resting = persistency.open_job("resting", mailbox_ops_max=BOUND)
        busy = persistency.open_job("busy")
        with held(busy) as gate:
            watch.noted.clear()  # of the openings

            async def main() -> None:
                for number in range(2 * BOUND):
                    resting.put("c", (number,), b"x")
                with pytest.raises(Overloaded, match="event loop"):
                    resting.put("c", ("one too many",), b"x")
                count, flushed = resting.count("c"), resting.flush()
                assert not watch.waited()
                assert not count.done()
                gate.set()
                await flushed
                assert await count == 2 * BOUND

            in_loop(main)


# -- posts from awkward places ----------------------------------------------------------------------------------------


class Posting:
    """A cycle whose end posts: when, and in which thread, is up to the garbage collector."""

    posted = 0
    nested = 0

    def __init__(self, job: Job, number: int) -> None:
        self.job = job
        self.number = number
        self.myself = self

    def __del__(self) -> None:
        Posting.nested += self.job._mailbox._lock._is_owned()  # type: ignore[attr-defined]  # as the mailbox asks
        self.job.put("dropped", (self.number,), b"x")
        if self.number % 10 == 0:
            self.job.commit(Put("committed", (self.number,), b"x"))
            self.job.get("dropped", (self.number,))
            self.job.drain()
        Posting.posted += 1


# How many new objects it takes for a collection: so it strikes now at this place, now at that.
THRESHOLDS = (1, 2, 3, 5, 7, 11, 13, 17)


@contextmanager
def collecting_often() -> Iterator[None]:
    """Have only what is new collected, and leave the garbage collector as it was."""
    thresholds = gc.get_threshold()
    gc.collect()
    gc.freeze()  # or every collection would walk over all that the tests have imported
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        gc.collect()


def test_posts_from_del_never_deadlock(persistency: Persistency, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 4: 20,000 posts of `__del__`, wherever the collector strikes, beside four producers at a full mailbox."""
    monkeypatch.setattr(Posting, "posted", 0)
    monkeypatch.setattr(Posting, "nested", 0)
    job = persistency.open_job("job", mailbox_ops_max=4 * BOUND, requests_max=4 * BOUND)
    producers, each = 4, 640
    fresh = itertools.count()

    def produce() -> None:
        for _ in range(each):
            number = next(fresh)
            Posting(job, number)
            job.put("put", (number,), b"x")

    with collecting_often():
        for threshold in THRESHOLDS:
            gc.set_threshold(threshold)
            join(start(*[produce] * producers))
    posted = len(THRESHOLDS) * producers * each
    end = monotonic() + WAIT
    while Posting.posted < posted and monotonic() < end:
        gc.collect()  # nothing, as long as another thread, the worker, is at a collection of its own
    assert Posting.posted == posted
    job.flush().result(WAIT)
    counts = {category: job.count(category).result(WAIT) for category in ("put", "dropped", "committed")}
    assert counts == {"put": posted, "dropped": posted, "committed": posted // 10}
    assert Posting.nested > 0  # some came in the middle of another post
    numbers = job.statistics()
    assert (numbers.accepted, numbers.committed, numbers.pending) == (sum(counts.values()), sum(counts.values()), 0)


def interrupted(verb: Callable[[], object], at: int, handler: Callable[[], object]) -> bool:
    """Do something, with a handler called where its `at`th function is entered, or a built-in one has returned.

    Those are where the interpreter looks for signals. Returns whether there were so many.
    """
    left = at

    def look(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal left
        if event in ("call", "c_return"):
            left -= 1
            if left == -1:  # once: a collection on the way here has events of its own
                sys.setprofile(None)
                handler()

    sys.setprofile(look)
    try:
        verb()
    finally:
        sys.setprofile(None)
    return left < 0


HANDLERS: dict[str, Callable[[Job, int], Any]] = {
    "put": lambda job, number: job.put("handler", (number,), b"x"),
    "commit": lambda job, number: job.commit(Put("handler", (number,), b"x")),
    "get": lambda job, number: job.get("handler", (number,)),
    "flush": lambda job, number: job.flush(),
}


# Inside a job's own run() its requests are Misuse, a handler's too.
INTERRUPTED = [("run", "put"), *itertools.product(["put", "persist", "delete", "commit", "get", "scan"], HANDLERS)]


def wait_until_asleep(job: Job) -> None:
    """Wait until a job's worker has nothing to do, so that the next post has to wake it."""
    deadline = monotonic() + WAIT
    while not job._mailbox._asleep:
        assert monotonic() < deadline
        sleep(0)


@pytest.mark.parametrize("bound", [1, 8192])
@pytest.mark.parametrize(("verb", "handler"), INTERRUPTED)
def test_a_handler_may_post_at_any_moment(persistency: Persistency, verb: str, handler: str, bound: int) -> None:
    """Promise 4: wherever a call is interrupted, its own post and the handler's are both taken, and answered."""
    job = persistency.open_job("job", mailbox_ops_max=bound, requests_max=bound)
    asked: list[Any] = []

    def call(number: int) -> None:
        reply = {**OPS, **REQUESTS}[verb](job, number)
        if reply is not None:
            reply.result(WAIT)

    def try_at(number: int) -> bool:
        wait_until_asleep(job)
        return interrupted(lambda: call(number), number, lambda: asked.append(HANDLERS[handler](job, number)))

    moments = next(number for number in itertools.count() if not try_at(number))
    assert len(asked) == moments > 3
    for reply in asked:
        if reply is not None:
            reply.result(WAIT)
    job.flush().result(WAIT)
    assert job.count("handler").result(WAIT) == (moments if handler in ("put", "commit") else 0)
    assert job.count("c").result(WAIT) == (moments + 1 if verb in ("put", "persist", "commit") else 0)


@contextmanager
def alarmed(handler: Callable[[], object], seconds: float) -> Iterator[None]:
    """Have a signal handler called in the main thread, over and over."""
    before = signal.signal(signal.SIGALRM, lambda *_: handler())
    signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_posts_and_requests_from_a_signal_handler_never_deadlock(persistency: Persistency) -> None:
    """Promise 4: whatever a handler interrupts in the main thread, what it posts and asks is taken and answered."""
    job = persistency.open_job("job", mailbox_ops_max=4 * BOUND, requests_max=4 * BOUND)
    handled, turns = itertools.count(), itertools.count()
    replies: list[Reply[Any]] = []
    wanted = 2_000

    def handler() -> None:
        number = next(handled)
        if number < wanted:
            job.put("handler", (number,), b"x")
            asked = (
                lambda: job.get("handler", (number,)),
                lambda: job.commit(Put("handler's", (number,), b"x")),
                lambda: job.scan("handler", limit=2),
                lambda: job.flush(),
            )
            replies.append(asked[number % len(asked)]())
            replies[len(replies) // 2].cancel()

    def produce() -> None:
        while len(replies) < wanted:
            job.put("beside", (0,), b"x")

    threads = start(produce)
    with alarmed(handler, 0.0003):
        while len(replies) < wanted:
            number = next(turns)
            job.put("main", (number,), b"x")
            assert job.get("main", (number,)).result(WAIT) == b"x"
            if number % 5 == 0:
                assert job.commit(Put("main", (number,), b"y")).result(WAIT) > 0
                assert len(job.scan_prefix("main", (number,)).result(WAIT)) == 1
            if number % 50 == 0:
                job.flush().result(WAIT)
    join(threads)
    for reply in replies:
        if not reply.cancelled():
            reply.result(WAIT)
    assert job.count("handler").result(WAIT) == wanted
    assert job.count("handler's").result(WAIT) == wanted // 4
    assert job.count("main").result(WAIT) == next(turns)


def test_posts_from_callbacks_never_deadlock(persistency: Persistency, caplog: pytest.LogCaptureFixture) -> None:
    """Promise 4: what callbacks and `on_error` post at a full mailbox is taken, in whatever thread they run."""
    caplog.set_level(logging.CRITICAL, "persistency")  # hundreds of failures are part of it
    told, corrected = threading.Semaphore(0), itertools.count()

    def on_error(job_id: str, failures: Any) -> None:
        for failure in failures:
            if type(failure.op) is Put:
                persistency[job_id].put("corrected", (next(corrected),), b"x")
                told.release()

    job = persistency.open_job("job", mailbox_ops_max=BOUND, requests_max=BOUND, on_error=on_error)
    each, producers, follow_ups = 200, 4, 3

    def follow(at: Any, left: int, _reply: object) -> None:
        job.put("followed", (*at, left), b"x")
        if left:
            reply = job.commit(Put("chained", (*at, left), b"x"))
            reply.add_done_callback(lambda reply: follow(at, left - 1, reply))

    def produce(me: int) -> None:
        for number in range(each):
            at = me, number
            job.persist([Check("c", at, NEVER), Put("c", at, b"x")])
            job.get("c", at).add_done_callback(lambda reply, at=at: follow(at, follow_ups, reply))
            job.put("c", at, b"x")

    join(start(*(lambda me=me: produce(me) for me in range(producers))))  # type: ignore[misc]  # bound now
    for _ in range(producers * each):
        assert told.acquire(timeout=WAIT)
    expected = {"c": 1, "corrected": 1, "followed": follow_ups + 1, "chained": follow_ups}
    for _ in range(follow_ups + 1):  # a chained callback may post behind one flush, and not behind as many as links
        with suppress(WriteFailed):
            job.flush().result(WAIT)
    counts = {category: job.count(category).result(WAIT) for category in expected}
    assert counts == {category: times * producers * each for category, times in expected.items()}
