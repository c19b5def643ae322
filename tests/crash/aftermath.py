"""After a storm of giving up: whether a job did all that was posted, told everybody, and left nothing behind.

A round opens a job, has `tests.crash.cancelling` rage over it, and holds it against the promises: every write that was
posted is there, every reply is settled, every failure was told once, the statistics add up, no thread is left, and
nobody has complained in a log or a hook. What is found is told as "kind: what".
"""

from __future__ import annotations

import concurrent.futures
import gc
import itertools
import logging
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from time import monotonic
from typing import Any

from persistency import Failure, Job, Persistency, Put, Reply, key
from tests.crash.cancelling import LIMIT, VERSIONS_AHEAD, Books, run_loops

VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"inline": False},
    {"inline": False, "mailbox_ops_max": 24, "requests_max": 24},
)


class Complaints(logging.Handler):
    """Whatever anybody has complained of: in a log, in a hook of the interpreter, in a warning."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.heard: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        # A failure nobody has looked at is told here too; and this is what any future says to a loop that is gone.
        told = record.name == "persistency" and "operation(s) failed" in record.msg
        late = record.name == "persistency.actor" and str(error) == "Event loop is closed"
        if not told and not late:
            self.heard.append(f"log: {record.name}: {record.getMessage()} {error!r}")

    def hook(self, unraisable: Any) -> None:
        self.heard.append(f"log: {unraisable.exc_value!r} in {getattr(unraisable, 'object', None)!r}")

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear everything that is complained of."""
        logger, before = logging.getLogger("persistency"), (sys.unraisablehook, threading.excepthook)
        level, propagate = logger.level, logger.propagate
        for source in (logging.getLogger(), logger):
            source.addHandler(self)
        logger.setLevel(logging.WARNING)
        logger.propagate = False  # hundreds of failures are part of it, and nobody else's business
        sys.unraisablehook = threading.excepthook = self.hook
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                yield
                gc.collect()
        finally:
            sys.unraisablehook, threading.excepthook = before
            logger.setLevel(level)
            logger.propagate = propagate
            for source in (logging.getLogger(), logger):
                source.removeHandler(self)


class Told:
    """An `on_error` that counts batches by their puts."""

    def __init__(self) -> None:
        self.count = 0
        self._changed = threading.Condition()

    def __call__(self, _job_id: str, failures: Any) -> None:
        failed: list[Failure] = list(failures)
        with self._changed:
            self.count += sum(type(failure.op) is Put for failure in failed)
            self._changed.notify_all()

    def wait(self, count: int, limit: float) -> None:
        """Wait until so many were told of. Those that are still in a cycle are told of when it is collected."""
        deadline = monotonic() + limit
        while self.count < count and monotonic() < deadline:
            gc.collect()  # nothing, while another thread collects
            with self._changed:
                self._changed.wait_for(lambda: self.count >= count, 0.1)


def audit(job: Job, books: Books, limit: float) -> list[str]:
    """Return what is wrong with a job after a storm."""
    wrong = []
    for number in range(VERSIONS_AHEAD):  # for those that still wait for a change
        job.put("rows", key("last", number), b"x")
        books.rows.append(key("last", number))
    books.ops += VERSIONS_AHEAD
    try:
        job.flush().result(limit)
    except TimeoutError:
        wrong.append("unsettled: the last flush")
    deadline = monotonic() + limit
    pending = [reply for reply in books.replies if not _settled(reply, deadline)]
    wrong += [f"unsettled: {len(pending)} of {len(books.replies)} replies"] if pending else []
    rows = {row.key for row in job.scan("rows").result(limit)}
    if missing := set(books.rows) - rows:
        wrong.append(f"lost: {len(missing)} of {len(books.rows)} rows")
    if rows - set(books.rows):
        wrong.append(f"lost: {len(rows - set(books.rows))} rows are there that nobody has written")
    counted = job.increment("numbers", ("n",), 0).result(limit)
    doomed = {row.key for row in job.scan("doomed").result(limit)}
    if counted != books.counted or doomed != set(books.doomed):
        wrong.append(f"lost: counted {counted} of {books.counted}, {len(doomed)} rows for {len(books.doomed)}")
    numbers = job.statistics()
    ops, failed = books.ops + 1, 2 * books.failing
    if (numbers.accepted, numbers.committed, numbers.failed, numbers.pending) != (ops, ops - failed, failed, 0):
        wrong.append(f"statistics: {numbers}; {ops} were posted, {failed} of them failing")
    return wrong


def _settled(reply: Reply[Any], deadline: float) -> bool:
    with suppress(TimeoutError, concurrent.futures.CancelledError):
        reply.exception(max(0.0, deadline - monotonic()))
    return reply.done()


def one_round(place: Path, number: int, seed: int, limit: float = LIMIT) -> Books:
    """Run a round; return its books, with all that was wrong."""
    rng = random.Random(f"round {number} of seed {seed}")
    complaints, told = Complaints(), Told()
    before = set(threading.enumerate())
    with complaints.listening():
        with Persistency(place if number % 2 else ":memory:") as persistency:
            options = VARIANTS[number // 2 % len(VARIANTS)]
            job = persistency.open_job(f"round{number}", feed_changes_max=100_000, on_error=told, **options)
            books = run_loops(job, rng, limit)
            books.wrong += audit(job, books, limit)
            books.replies.clear()
            told.wait(books.failing - books.seen, limit)
            if told.count != books.failing - books.seen:
                books.wrong.append(f"untold: {books.failing} failed, {books.seen} seen, {told.count} told")
        for thread in set(threading.enumerate()) - before:
            thread.join(limit)
    left = set(threading.enumerate()) - before
    books.wrong += [f"thread: {thread!r} is left" for thread in left] + complaints.heard
    books.wrong = [f"round {number} of seed {seed}: {wrong}" for wrong in books.wrong]
    return books


def storm(
    place: Path,
    seed: int,
    count: int,
    *,
    until: str = "",
    limit: float = LIMIT,
    seconds: float = inf,
    tell: Callable[[int, Books], object] = lambda _rounds, _books: None,
) -> tuple[int, Books]:
    """Run rounds until so many were given up, or something is wrong whose complaint has `until` in it.

    Returns how many rounds there were, and what came of them all.
    """
    books, begun = Books(), monotonic()
    for number in itertools.count():
        found = any(until in wrong for wrong in books.wrong)
        if books.given_up >= count or found or monotonic() - begun >= seconds:
            return number, books
        books.add(one_round(place, number, seed, limit))
        books.rows.clear()
        tell(number, books)
    raise AssertionError
