"""A worker that is thrown at: whatever comes into its thread, or ends it, every reply is settled and nothing is lost.

An exception from outside comes where a thread looks for one: when a function begins, and when one written in C returns.
A `Thrower` counts these places in the life of one job's worker and throws at one of them; `act` plays a small piece
meanwhile, with events, requests, waiting readers, rests and sweeps, and holds what came of it against what was promised.
So every place can be tried; the plain test tries a share of them. Beside it `PyThreadState_SetAsyncExc` throws for real.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import persistency as package
from persistency import Check, Closed, Job, Persistency, Poisoned, Put, WriteFailed
from persistency.actor import turns, worker
from persistency.storage import sqlite
from tests.conftest import Wall
from tests.test_engine import WAIT, in_thread

PACKAGE = str(Path(package.__file__).parent)
HANG_SECONDS = float(os.environ.get("HANG", "10"))
PLACES_EACH = 60  # tried by the plain test, for each piece
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
        self.places += 1
        if self.places == self._at:
            code = frame.f_code
            self.where = f"{event} in {code.co_qualname}, {Path(code.co_filename).name}:{frame.f_lineno}"
            raise self._kind("from outside")

    def __enter__(self) -> Thrower:
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
            await asyncio.wait_for(reply, HANG_SECONDS)
            return True
        except TimeoutError:
            self._books.wrong.append(f"hang: {what} isn't answered")
        except WriteFailed as failed:
            self._books.note(failed)
            return True
        except (Exception, asyncio.CancelledError) as error:
            self._check_told(what, error)
        return False

    def _check_told(self, what: str, error: BaseException) -> None:
        if not isinstance(error, Poisoned | Closed | Thrown | package.StorageError):
            self._books.wrong.append(f"told: {what}: {error!r}")


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
    persistency = Persistency(place, clock=wall, **options)
    rest = bool(options)
    thrower = Thrower(at, kind)
    with pytest.MonkeyPatch.context() as patch, thrower:
        patch.setattr(turns.log, "error", lambda *_args, **_how: None)
        patch.setattr(worker.log, "exception", lambda *_args, **_how: None)
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
            if not isinstance(error, Thrown | Poisoned | Closed):
                books.wrong.append(f"told: open: {error!r}")
        else:
            actors = Actors(persistency, books, wall, rest)
            asyncio.run(actors.play(job))
            _ended("close", actors.closing, books)
            _count(job, books, thrower)
        _ended("Persistency.close", in_thread(persistency.close), books)
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
        if not isinstance(error, Thrown | Poisoned):
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


def sweep(place: Path, piece: str, seed: int, share: float) -> Iterator[tuple[Thrower, list[str]]]:
    """Throw at a share of all places of a piece, chosen at random."""
    rng = random.Random(f"{seed} {piece}")
    places = act(place / "whole", piece, 10**9)[0].places
    for at in range(1, places + 1):
        if rng.random() < share:
            yield act(place / str(at), piece, at)
