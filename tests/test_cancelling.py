"""Giving up: whatever tasks, threads and loops stop waiting for, every write is applied and every reply settled.

The storms are made by `tests.crash.cancelling` and judged by `tests.crash.aftermath`. Before they are believed they are
shown engines with a planted defect, each of which they have to report. `python -m tests.soak cancel` is the long form.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from persistency.actor import mailbox, settling
from persistency.actor.accounts import Accounts
from persistency.actor.failures import FailureLog
from persistency.actor.worker import Worker
from tests.crash.aftermath import storm

SEED = random.SystemRandom().getrandbits(32)
GIVEN_UP = 2_500
PLANTED_MAX = 2_000  # a planted defect must be reported within so many
PLANTED_LIMIT = 0.5  # seconds: what is waited for in vain isn't waited for long


# -- planted defects --------------------------------------------------------------------------------------------------


def unsettled() -> Any:
    """Forget the answer of a read now and then."""
    settle_all, number = settling.settle_all, itertools.count()

    def forget(answers: Any) -> None:
        settle_all([answer for answer in answers if not answer[0]._reads or next(number) % 20])

    return mock.patch.object(settling, "settle_all", forget)


def withdrawn_writes() -> Any:
    """Let a request that writes be cancelled as a read is."""
    pending = mailbox.pending
    return mock.patch.object(mailbox, "pending", lambda line, *, reads: pending(line, reads=True))


def careless_waking() -> Any:
    """Wake those who wait without looking whether they still do."""

    def wake(futures: list[Any]) -> None:
        for future in futures:
            future.set_result(True)

    return mock.patch.object(settling, "wake", wake)


def miscounted() -> Any:
    """Count one committed operation too few, now and then."""
    count, number = Accounts.count, itertools.count()

    def miscount(self: Accounts, committed: int, failed: int, *, in_place: bool = False) -> None:
        count(self, committed - (committed > 0 and next(number) % 50 == 0), failed, in_place=in_place)

    return mock.patch.object(Accounts, "count", miscount)


def untold() -> Any:
    """Tell nobody of a failure that nobody has looked at."""
    return mock.patch.object(FailureLog, "report")


@contextmanager
def threads_left() -> Iterator[None]:
    """Have the worker's thread stay when its job is closed."""
    run, over = Worker._run, threading.Event()

    def stay(self: Worker) -> None:
        run(self)
        over.wait()

    before = set(threading.enumerate())
    try:
        with mock.patch.object(Worker, "_run", stay):
            yield
    finally:
        over.set()
        for thread in set(threading.enumerate()) - before:
            thread.join()


# Each with the kind of complaint it has to be reported by.
PLANTS: dict[str, tuple[Callable[[], Any], str]] = {
    "unsettled reply": (unsettled, "unsettled"),
    "cancelled write": (withdrawn_writes, "lost"),
    "careless waking": (careless_waking, "log"),
    "miscounted operation": (miscounted, "statistics"),
    "untold failure": (untold, "untold"),
    "thread left": (threads_left, "thread"),
}


def storm_planted(name: str, place: Path, seed: int) -> tuple[int, list[str]]:
    """Have a storm rage over an engine that was spoilt on purpose, until something is wrong.

    Returns how often something was given up, and the complaints of the kind it has to be.
    """
    spoilt, kind = PLANTS[name]
    with spoilt():
        _, books = storm(place, seed, PLANTED_MAX, until=f": {kind}: ", limit=PLANTED_LIMIT)
    return books.given_up, [wrong for wrong in books.wrong if f": {kind}: " in wrong]


@pytest.mark.parametrize("name", PLANTS)
def test_planted_defect_is_seen(tmp_path: Path, name: str) -> None:
    """The storm reports an engine that was spoilt on purpose, and as what it is."""
    given_up, complaints = storm_planted(name, tmp_path / "root", SEED)
    print(f"seed {SEED}: {name}, {given_up} given up", *complaints[:3], sep="\n")
    assert complaints


# -- the engine -------------------------------------------------------------------------------------------------------


def test_giving_up_harms_nobody(tmp_path: Path) -> None:
    """Promises 7 and 8: after thousands of cancellations and closed loops nothing is lost, and nobody waits."""
    rounds, books = storm(tmp_path / "root", SEED, GIVEN_UP)
    print(f"seed {SEED}: {rounds} rounds, {books.given_up} given up, {books.left_pending} pending where a loop closed")
    assert not books.wrong, books.wrong[:5]
    assert books.given_up >= GIVEN_UP
    # Otherwise it would have proved nothing.
    assert books.left_pending > 0
    assert 0 < books.seen < books.failing
