"""A worker that is thrown at: whatever comes into its thread, or ends it, every reply is settled and nothing is lost.

An exception from outside comes where a thread looks for one: when a function begins, and when one written in C returns.
A `Thrower` counts these places in the life of one job's worker and throws at one of them; `act` plays a small piece
meanwhile, with events, requests, waiting readers, rests and sweeps, and holds what came of it against the promises. So
every place can be tried; the plain test tries a share of them. Beside it `PyThreadState_SetAsyncExc` throws for real.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import anyio
import pytest

import persistency as package
from persistency import CBOR, Category, Check, Closed, Corrupt, Job, Misuse, Persistency, Poisoned, Put, WriteFailed
from persistency.actor import activation, turns
from persistency.actor.activation import Activation
from persistency.actor.worker import Worker
from persistency.storage import sqlite
from tests import loops
from tests.conftest import Wall
from tests.loops import LOOPS, InLoop
from tests.test_engine import WAIT, in_thread

PACKAGE = str(Path(package.__file__).parent)
HANG_SECONDS = 10.0
PLACES_EACH = 120  # tried by the plain test, for each piece
KINDS = (SystemExit, KeyboardInterrupt, MemoryError)  # what may come from outside in earnest
NEVER = Check("c", ("never",), 10**6)  # a check that fails


class Thrown(BaseException):
    """What nobody expects."""


class Thrower:
    """Throws once into the worker of the job "a", at the `at`-th place where an exception can come from outside."""

    def __init__(self, at: int, kind: type[BaseException] = Thrown) -> None:
        self.places = 0
        self.where = ""
        self._at = at
        self._kind = kind

    def __call__(self, frame: Any, event: str, _arg: Any) -> None:
        """Count a place, and throw if it is the one."""
        if event not in ("call", "c_return") or threading.current_thread().name != "persistency:a":
            return
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return
        if event == "call" and frame.f_code is Worker._run.__code__:
            return  # a thread's very first function can't do anything about it
        self.places += 1
        if self.places == self._at:
            code = frame.f_code
            self.where = f"{event} in {code.co_qualname}, {Path(code.co_filename).name}:{frame.f_lineno}"
            raise self._kind("from outside")

    def __enter__(self) -> Self:
        threading.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        threading.setprofile(None)  # type: ignore[arg-type]


# -- the piece ---------------------------------------------------------------------------------------------------------


@dataclass
class Books:
    """What was asked for, and what became of it."""

    accepted: list[int] = field(default_factory=list)  # operations, in order
    acknowledged: set[int] = field(default_factory=set)
    refused: set[int] = field(default_factory=set)  # told as not applied
    failing: set[int] = field(default_factory=set)  # that were to fail by themselves
    wrong: list[str] = field(default_factory=list)
    told: list[Any] = field(default_factory=list)  # by on_error

    def note(self, failed: WriteFailed) -> None:
        """Take down what a flush or a close has raised."""
        for failure in failed.failures:
            if failure.outcome == "not applied":
                self.refused |= set(_numbers(failure.op))


def _numbers(op: Any) -> list[int]:
    if not isinstance(op, Put):
        return []
    return [package.key(*op.key).parts[0] if isinstance(op.key, tuple) else op.key.parts[0]]


class Actors:
    """The piece on one job: who asks, under an event loop, so that the worker has to answer."""

    def __init__(self, persistency: Persistency, books: Books, wall: Wall, rest: bool) -> None:
        self._persistency = persistency
        self._books = books
        self._wall = wall
        self._rest = rest
        self._next = itertools.count()

    async def play(self, job: Job) -> None:
        """Ask for this and that."""
        waiting = None
        for scene in range(4):
            with contextlib.suppress(Poisoned, Closed):
                for _ in range(3):
                    number = next(self._next)
                    job.put("c", (number,), b"%d" % number, ttl=60 if number % 5 == 4 else None)
                    self._books.accepted.append(number)
                number = next(self._next)
                committed = job.commit([Put("c", (number,), b"%d" % number)])
                self._books.accepted.append(number)
                if scene == 1:
                    number = next(self._next)
                    job.persist([NEVER, Put("c", (number,), b"never")])
                    self._books.failing.add(number)
                    if not self._rest:  # who waits would keep it live
                        waiting = job.changes(10**6, 5, wait=True)
                if await self._settled("commit", committed):
                    self._books.acknowledged.add(number if scene != 1 else number - 1)
                await self._settled("count", job.count("c"))
                before = list(self._books.accepted)
                if await self._settled("flush", job.flush(sync=scene == 2)):
                    self._books.acknowledged |= set(before)
                self._wall.ms += 20_000
                job._mailbox.ring()  # rows may have ended
            if self._rest:
                other = self._persistency["other"]
                await self._settled("flush of the other", other.flush())
        self.closing = in_thread(job.close)
        if waiting is not None:
            await self._settled("changes", waiting)

    async def _settled(self, what: str, reply: Any) -> bool:
        """Say whether a request went well; one that isn't answered is what must not be."""
        try:
            with anyio.fail_after(HANG_SECONDS):
                await reply
            return True
        except TimeoutError:
            self._books.wrong.append(f"hang: {what} isn't answered")
        except WriteFailed as failed:
            self._books.note(failed)
            return True
        except (Poisoned, Closed, Thrown, *KINDS) as error:
            if isinstance(error, Poisoned) and not isinstance(error.__cause__, (Thrown, *KINDS)):
                self._books.wrong.append(f"told: {what}: poisoned by {error.__cause__!r}")
        except (Exception, asyncio.CancelledError) as error:
            self._books.wrong.append(f"told: {what}: {error!r}")
        return False


PIECES: dict[str, dict[str, Any]] = {
    "plain": {},
    "resting": {"max_live_jobs": 1},
    "sweeping": {"sync_interval": 0.001},
}


def act(place: Path, piece: str, at: int, kind: type[BaseException] = Thrown) -> tuple[Thrower, list[str]]:
    """Play a piece, throwing at one place; return what was thrown, and what is wrong with what came of it."""
    options = dict(PIECES[piece])
    books, wall = Books(), Wall()
    sync_interval = options.pop("sync_interval", None)
    persistency = Persistency(place, clock=wall, open_timeout=HANG_SECONDS, **options)
    rest = bool(options)
    thrower = Thrower(at, kind)
    with pytest.MonkeyPatch.context() as patch, thrower:
        patch.setattr(turns.log, "error", lambda *_args, **_how: None)
        patch.setattr(activation.log, "exception", lambda *_args, **_how: None)
        patch.setattr(threading, "excepthook", lambda _args: None)
        patch.setattr(sqlite, "CHECKPOINT_IDLE_PAGES", 8)
        if rest:
            persistency.open_job("other")
        try:
            job = persistency.open_job(
                "a",
                feed_changes_max=50,
                sync_interval=sync_interval,
                on_error=lambda _job_id, failures: books.told.extend(failures),
            )
        except BaseException as error:
            if not isinstance(error, (Thrown, Poisoned, Closed, *KINDS)):
                books.wrong.append(f"told: open: {error!r}")
        else:
            actors = Actors(persistency, books, wall, rest)
            LOOPS["trio" if at % 3 == 0 else "asyncio"](actors.play, job)
            _ended("close", actors.closing, books)
            _count(job, books, thrower)
        _ended("Persistency.close", in_thread(persistency.close), books)
        for thread in threading.enumerate():  # what is thrown in a thread's last line comes behind the closing
            if thread.name == "persistency:a":
                thread.join(HANG_SECONDS)
    _look_again(place, books)
    return thrower, [f"{piece}, place {at} ({thrower.where}): {finding}" for finding in books.wrong]


def _ended(what: str, closing: Future[None], books: Books) -> None:
    """Wait for a closing."""
    try:
        closing.result(HANG_SECONDS)
    except TimeoutError:
        books.wrong.append(f"hang: {what}")
    except WriteFailed as failed:
        books.note(failed)
    except BaseException as error:
        if not isinstance(error, (Thrown, Poisoned, *KINDS)):
            books.wrong.append(f"told: {what}: {error!r}")


def _count(job: Job, books: Books, thrower: Thrower) -> None:
    """Look at the numbers of a job that is closed."""
    numbers = job.statistics()
    if numbers.pending or numbers.accepted != numbers.committed + numbers.failed:
        books.wrong.append(f"numbers: {numbers}")
    posted = len(books.accepted) + 2 * len(books.failing)
    if not 0 <= numbers.accepted - posted <= 1:  # the last one may have been refused and counted
        books.wrong.append(f"numbers: {numbers.accepted} accepted, {posted} were")
    if not thrower.where and numbers.failed != 2 * len(books.failing):
        books.wrong.append(f"numbers: {numbers.failed} failed, though nothing was thrown")


def _look_again(place: Path, books: Books) -> None:
    """Hold what is there against the books: a prefix of what was accepted, with all that was acknowledged."""
    try:
        with Persistency(place, open_timeout=HANG_SECONDS) as persistency:
            found = [key.parts[0] for key in persistency.open_job("a").keys("c").result(WAIT)]
            changes = persistency["a"].check().result(WAIT)
    except (package.PersistencyError, TimeoutError) as error:
        books.wrong.append(f"reopening: {error!r}")
        return
    ended = {number for number in books.accepted if number % 5 == 4}  # may be gone, by their time
    expected = [number for number in books.accepted if number not in ended]
    present = [number for number in found if number not in ended]
    if present != expected[: len(present)]:
        books.wrong.append(f"hole: {found} of {books.accepted}")
    if lost := books.acknowledged - set(found) - ended:
        books.wrong.append(f"lost: {lost} of {books.acknowledged}")
    if books.refused & set(found):
        books.wrong.append(f"told as not applied, and there: {books.refused & set(found)}")
    if changes:
        books.wrong.append(f"damage: {changes}")


def places(place: Path, piece: str) -> int:
    """Return how many places a piece has, give or take a few; check that it goes well if nothing is thrown."""
    thrower, wrong = act(place, piece, 10**9)
    assert wrong == []
    return thrower.places


def sweep(place: Path, piece: str, seed: int, share: float) -> Iterator[tuple[Thrower, list[str]]]:
    """Throw at a share of all places of a piece, chosen at random."""
    rng = random.Random(f"{seed} {piece}")
    for at in range(1, places(place / "whole", piece) + 1):
        if rng.random() < share:
            yield act(place / str(at), piece, at, rng.choice((Thrown, MemoryError)))


# -- tests -------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[{}, {"max_live_jobs": 2}], ids=str)
def persistency(request: pytest.FixtureRequest, place: Path) -> Iterator[Persistency]:
    """Give a root, without a limit and with one."""
    with contextlib.suppress(WriteFailed, Poisoned), Persistency(place / "root", **request.param) as opened:
        yield opened


def of_worker(job: Job) -> int:
    """Return the thread of a job's worker, which comes for the first who rings."""
    job._mailbox.ring()
    job.flush().result(WAIT)
    ident = job._mailbox.worker_thread
    assert ident is not None
    return ident


# What is thrown while a generator or a finaliser ends can't get further; Python only says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("piece", PIECES)
def test_an_exception_at_any_place_leaves_nobody_waiting(place: Path, piece: str) -> None:
    """Issue 4.2, promise 7: wherever it comes, every reply is settled, the cause told, the numbers add up."""
    seed = 20_26
    share = PLACES_EACH / places(place / "count", piece)
    thrown, wrong = 0, []
    for thrower, found in sweep(place, piece, seed, share):
        thrown += bool(thrower.where)
        wrong += found
        if wrong:
            break
    assert wrong == [], f"seed {seed}"
    assert thrown > PLACES_EACH // 2


PLANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "everybody is forgotten": lambda patch: patch.setattr(turns.Turns, "poison", lambda *_args: None),
    "the group is forgotten": lambda patch: patch.setattr(turns.Turns, "poison", _forgetful),
}
POISON = turns.Turns.poison


def _forgetful(self: turns.Turns, cause: BaseException, outcome: str, answers: list[Any]) -> None:
    self._mailbox.in_hand = []
    POISON(self, cause, outcome, answers)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("plant", PLANTS)
def test_a_worker_that_forgets_who_waits_is_seen(place: Path, monkeypatch: pytest.MonkeyPatch, plant: str) -> None:
    """Planted defects: the sweep reports an engine that doesn't tell those whom it can't serve any more."""
    monkeypatch.setattr(sys.modules[__name__], "HANG_SECONDS", 0.5)
    PLANTS[plant](monkeypatch)
    rng = random.Random(plant)
    for at in rng.sample(range(300, 1_500), 40):
        if act(place / str(at), "plain", at)[1]:
            return
    pytest.fail("not reported")


def throw(ident: int, kind: type[BaseException]) -> bool:
    """Throw into a thread; return whether there is such a thread."""
    return bool(ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), ctypes.py_object(kind)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("kind", [Thrown, *KINDS])
@pytest.mark.parametrize("seed", range(6))
def test_exceptions_thrown_for_real(
    place: Path, monkeypatch: pytest.MonkeyPatch, seed: int, kind: type[BaseException]
) -> None:
    """Issue 4.2: thrown from another thread, in the middle of a storm of posts and requests of several threads."""
    monkeypatch.setattr(threading, "excepthook", lambda _args: None)
    rng = random.Random(seed)
    persistency = Persistency(place / "root", **rng.choice(({}, {"max_live_jobs": 1})))
    job = persistency.open_job("a", on_error=lambda _job_id, _failures: None)
    posted = threading.Semaphore(0)
    stop = threading.Event()
    accepted: list[list[int]] = [[], [], []]
    acknowledged: set[tuple[int, int]] = set()

    def storm(me: int) -> None:
        with contextlib.suppress(Poisoned):
            for number in itertools.count():
                if stop.is_set():
                    return
                job.put("c", (me, number), b"x")
                accepted[me].append(number)
                if number % 10 == 9:
                    # In line behind the put, so that the worker has to answer.
                    # Not under trio: what is thrown into its queue could leave the lock of that locked.
                    asyncio.run(_asked(job.version()))
                    acknowledged.add((me, number))
                posted.release()

    async def _asked(reply: Any) -> Any:
        with anyio.fail_after(WAIT):
            return await reply

    threads = [in_thread(lambda me=me: storm(me)) for me in range(3)]  # type: ignore[misc]
    for _ in range(rng.randrange(20, 300)):
        assert posted.acquire(timeout=WAIT)
    throw(job._mailbox.worker_thread or 0, kind)
    for _ in range(100):
        if job.statistics().state == "poisoned":
            break
        posted.acquire(timeout=0.05)
    stop.set()
    for thread in threads:
        assert thread.exception(WAIT) is None
    flushed = in_thread(lambda: job.flush().exception(WAIT))
    error = flushed.exception(WAIT) or flushed.result()
    state = job.statistics().state
    if state == "poisoned":
        assert isinstance(error, Poisoned)
        assert isinstance(error.__cause__, kind)
    else:  # it came where it could be taken for what it was in the middle of, and that was done again
        assert (state, error) == ("live", None)
    with contextlib.suppress(WriteFailed):
        in_thread(persistency.close).result(WAIT)
    numbers = job.statistics()
    assert numbers.accepted == numbers.committed + numbers.failed == sum(map(len, accepted))
    with Persistency(place / "root") as again:
        found = [key.parts for key in again.open_job("a").keys("c").result(WAIT)]
    for me, numbers_of in enumerate(accepted):
        mine = [number for writer, number in found if writer == me]
        assert mine == numbers_of[: len(mine)], f"a hole, seed {seed}"
    assert acknowledged <= set(found)
    assert state == "poisoned" or len(found) == numbers.accepted
    assert len(found) >= numbers.committed


@pytest.mark.parametrize("pending", ["nothing", "posts", "requests", "a waiting reader", "a closing"])
@pytest.mark.parametrize("kind", [Thrown, *KINDS])
def test_a_thread_that_ends_leaves_nobody_waiting(
    persistency: Persistency, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException], pending: str, in_loop: InLoop
) -> None:
    """Issue 4.2: the thread is gone: the job is poisoned with the cause, all is settled, closing and opening work."""
    monkeypatch.setattr(threading, "excepthook", lambda _args: None)
    entered, may_die = threading.Event(), threading.Event()
    really = Worker._live

    def dies(self: Worker) -> None:
        self.serve()
        entered.set()
        assert may_die.wait(WAIT)
        raise kind("the end")

    monkeypatch.setattr(Worker, "_live", dies)
    told: list[Any] = []
    job = persistency.open_job("a", feed_changes_max=5, on_error=lambda _id, failures: told.extend(failures))
    if job._mailbox.napping:
        job._mailbox.ring()  # a thread comes for the first who does
    assert entered.wait(WAIT)
    monkeypatch.setattr(Worker, "_live", really)
    [thread] = [thread for thread in threading.enumerate() if thread.name == "persistency:a"]
    job.commit([Put("c", ("before",), b"x")]).result(WAIT)  # in this thread
    replies: list[Any] = []
    closing = None

    async def ask() -> None:
        if pending == "requests":
            replies.extend([job.commit([Put("c", ("k",), b"x")]), job.count("c"), job.flush(), job.version()])
        if pending == "a waiting reader":
            replies.append(job.changes(5, 5, wait=True))
        if pending == "posts":
            for number in range(10):
                job.put("c", (number,), b"x")

    in_loop(ask)
    if pending == "a closing":
        job.put("c", ("k",), b"x")
        closing = in_thread(job.close)
    may_die.set()
    thread.join(WAIT)
    assert not thread.is_alive()
    for reply in replies:
        error = reply.exception(WAIT)
        assert isinstance(error, Poisoned)
        assert isinstance(error.__cause__, kind)
    if closing is not None:
        assert isinstance(closing.exception(WAIT), WriteFailed | Poisoned | None)
    else:
        assert job.statistics().state == "poisoned"
        for refused in (lambda: job.put("c", ("k",), b""), lambda: job.get("c", ("k",)), job.flush):
            with pytest.raises(Poisoned) as poisoned:
                refused().result(WAIT)
            assert isinstance(poisoned.value.__cause__, kind)
        closed = in_thread(job.close).exception(WAIT)
        assert isinstance(closed, WriteFailed if pending == "posts" else type(None))
    numbers = job.statistics()
    assert numbers.state == "closed"
    assert numbers.accepted == numbers.committed + numbers.failed
    again = persistency.open_job("a")
    assert again.get("c", ("before",)).result(WAIT) == b"x"
    again.put("c", ("after",), b"x")
    again.flush().result(WAIT)
    assert again.statistics().state == "live"


@pytest.mark.parametrize("kind", [Thrown, *KINDS])
def test_a_thread_that_ends_while_it_opens_tells_who_waits(
    persistency: Persistency, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """Issue 4.2: all who wait for the opening are told the cause; it can be tried again."""
    monkeypatch.setattr(threading, "excepthook", lambda _args: None)
    really = Activation.begin

    def dies(_self: Activation) -> None:
        raise kind("while it opens")

    with monkeypatch.context() as patch:
        patch.setattr(Activation, "begin", dies)
        opening = [in_thread(lambda: persistency.open_job("a")) for _ in range(4)]
        for one in opening:
            error = one.exception(WAIT)
            assert isinstance(error, kind | Poisoned | Closed), error
            assert kind in (type(error), type(error.__cause__), type(error.__context__))
    assert Activation.begin is really
    assert "a" not in persistency
    assert persistency.open_job("a").version().result(WAIT) == 0


# -- what others' functions throw --------------------------------------------------------------------------------------


class Spoilt:
    """A codec whose functions throw."""

    def __init__(self, kind: type[BaseException]) -> None:
        self._kind = kind

    def encode(self, value: Any) -> bytes:
        if value == "bad":
            raise self._kind("in encode")
        return CBOR.encode(value)

    def decode(self, data: bytes) -> Any:
        value = CBOR.decode(data)
        if value == "unreadable":
            raise self._kind("in decode")
        return value


@pytest.mark.parametrize("kind", [ZeroDivisionError, GeneratorExit, Thrown, *KINDS])
def test_whatever_others_functions_throw_the_worker_goes_on(
    persistency: Persistency, caplog: pytest.LogCaptureFixture, kind: type[BaseException], in_loop: InLoop
) -> None:
    """Issue 4.2: callbacks, `on_error`, codecs, functions, progress: it goes to its caller or the log, no further."""
    called = threading.Semaphore(0)

    def throws(*_args: Any) -> Any:
        called.release()
        raise kind("of somebody's")

    job = persistency.open_job("a", on_error=throws, feed_changes_max=10)
    job.flush().result(WAIT)
    worker_thread = of_worker(job)

    async def asked() -> None:
        with pytest.raises(kind):
            await _outcome(job.run(throws))
        reply = job.commit([Put("c", ("k",), b"x")])
        reply.add_done_callback(throws)
        await reply
        waiting = job.changes(10**6, 1, wait=True)
        waiting.add_done_callback(throws)
        waiting.cancel()
        with pytest.raises(kind):
            await _outcome(job.count("c").map(throws))

    async def _outcome(reply: Any) -> Any:
        done = threading.Event()
        reply.add_done_callback(lambda _reply: done.set())
        assert await loops.in_thread(done.wait, WAIT)
        return reply.result(0)

    in_loop(asked)
    with pytest.raises(kind):
        job.run(throws).result(WAIT)
    with pytest.raises(kind):
        job.backup(job.path.with_suffix(".copy"), progress=throws).result(WAIT)  # type: ignore[union-attr]
    job.persist([NEVER])
    with pytest.raises(WriteFailed):
        job.flush().result(WAIT)
    category = Category(job, "objects", codec=Spoilt(kind))
    with pytest.raises((kind, Misuse)):
        category.put(("k",), "bad")
    category.put(("k",), "unreadable")
    with pytest.raises((kind, Corrupt)):
        category.get(("k",)).result(WAIT)
    for _ in range(6):
        assert called.acquire(timeout=WAIT)
    assert of_worker(job) == worker_thread
    assert job.statistics().state == "live"
    assert job.get("c", ("k",)).result(WAIT) == b"x"
    assert (job.statistics().accepted, job.statistics().pending) == (job.statistics().committed + 3, 0)
    assert "poisoned" not in caplog.text


# -- Ctrl-C in a caller ------------------------------------------------------------------------------------------------


class Interrupter:
    """Throws a KeyboardInterrupt once into the thread that enters it, at the `at`-th place in the package."""

    def __init__(self, at: int) -> None:
        self.places = 0
        self._at = at

    def __call__(self, frame: Any, event: str, _arg: Any) -> None:
        """Count a place, and throw if it is the one."""
        code = frame.f_code
        # What the collector has to drop just now, of some other test, is no place of this one.
        caller = None if frame.f_back is None else frame.f_back.f_code.co_name
        ours = code.co_filename.startswith(PACKAGE) and "__del__" not in (code.co_name, caller)
        if event in ("call", "c_return") and ours:
            self.places += 1
            if self.places == self._at:
                raise KeyboardInterrupt

    def __enter__(self) -> Self:
        sys.setprofile(self)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


def close_interrupted(place: Path, at: int, *, resting: bool) -> int:
    """Close a job with an interrupt at some place of it; see that it is closed all the same; return the places."""
    with Persistency(place, max_live_jobs=1) as persistency:
        job = persistency.open_job("a")
        job.put("c", (1,), b"x")
        job.flush().result(WAIT)
        if resting:
            persistency.open_job("b").flush().result(WAIT)
            assert job.statistics().state == "idle"
        with contextlib.suppress(KeyboardInterrupt), Interrupter(at) as interrupter:
            job.close()
        job.close(timeout=WAIT)
        again = persistency.open_job("a")
        assert again.get("c", (1,)).result(WAIT) == b"x"
    return interrupter.places


@pytest.mark.parametrize("resting", [False, True], ids=["live", "resting"])
def test_an_interrupted_close_closes_all_the_same(place: Path, resting: bool) -> None:
    """Promise 7: wherever a Ctrl-C comes in `close`, the job is closed, and can be opened again."""
    places = close_interrupted(place / "count", 10**9, resting=resting)
    assert places > 20
    # Of the last ones some come after the close is over; with the first one nothing has begun.
    for at in random.Random(2026).sample(range(2, places + 1), 40):
        close_interrupted(place / str(at), at, resting=resting)
