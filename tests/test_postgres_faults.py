"""Servers that fail: whatever fails, and when, nothing is lost, nothing is there twice, nobody hangs, and all is told.

The script and the judge are those of `tests.test_faults`; what fails is a round trip (`tests.crash.faulty_server`):
here a sample of them, drawn anew each time, in `python -m tests.soak postgres-faults` every single one. Before
the judge is believed it is shown engines with a planted defect, each of which it has to report.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from persistency.actor.failures import FailureLog
from persistency.errors import StorageError
from persistency.storage.port import PLACES, Group
from persistency.storage.postgres import schema
from persistency.storage.postgres.standing import Standing
from persistency.storage.postgres.store import PostgresStore
from tests.crash.faulty import Posted, Totals, Variant, rig
from tests.crash.faulty_server import FAULTS, NO_FAULT, OPERATIONS, VARIANTS, ServerFault, Wire, play_one
from tests.soak.postgres_fence_plants import FENCES, unfenced

SEED = random.SystemRandom().getrandbits(32)
SAMPLE = 5  # round trips of each kind, for each way they can fail
PLANTED_PLAYS = 60
PLANTED_LIMIT = 3.0  # seconds

BROKEN = ServerFault("commit")
UNANSWERED = ServerFault("commit", manner="all")
GONE = ServerFault("any", sticky=True)


def trips_of(wire: Wire, given: ServerFault) -> int:
    """Return how many round trips of a fault's kind the last play has made."""
    return wire.calls[given.operation, "wire"]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_clean_play_meets_what_can_fail(variant: Variant, tmp_path: Path) -> None:
    """Without a fault the judge finds nothing, and the script makes round trips of every kind."""
    wire = Wire()
    with rig():
        play = play_one(tmp_path, wire, variant, NO_FAULT, 0)
    assert play.findings == []
    assert play.watch.stalls == len(play.watch.causes) == 0
    assert all(wire.calls[operation, "wire"] >= 15 for operation in OPERATIONS), wire.calls
    verbs = Counter(entry.asked.verb for entry in play.log if isinstance(entry, Posted))
    assert verbs["increment"] >= 8
    assert verbs["run"] >= 4


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_whatever_fails(variant: Variant, tmp_path: Path) -> None:
    """Promises 2, 3, 7: round trips that break, before or after the server has acted, or are refused."""
    rng, wire, totals = random.Random(SEED), Wire(), Totals()
    with rig():
        play_one(tmp_path, wire, variant, NO_FAULT, 0)
        trips = {given: trips_of(wire, given) for given in FAULTS}
        for given, count in trips.items():
            assert count, given
            for at in rng.sample(range(1, count + 1), min(count, SAMPLE)):
                totals.add(f"{variant}, {given}, trip {at}", play_one(tmp_path, wire, variant, given, at))
    print(f"seed {SEED}: {totals}")
    assert totals.findings == []
    assert totals.fired >= 0.9 * totals.plays
    assert totals.stalled >= 10
    assert totals.poisoned >= 5


# -- planted defects ---------------------------------------------------------------------------------------------------


class Plant(NamedTuple):
    """A defect, a fault that brings it to light, and the kinds of findings that it may be told as."""

    planted: Callable[[], Any]
    given: ServerFault
    kinds: set[str]


@contextmanager
def swallowing() -> Iterator[None]:
    """Lose what couldn't be written, and say it was."""
    apply = PostgresStore.apply

    def swallow(self: PostgresStore, group: Group, now_ms: int) -> list[Any]:
        try:
            return apply(self, group, now_ms)
        except StorageError:
            return [None] * (len(group) // PLACES)

    with mock.patch.object(PostgresStore, "apply", swallow):
        yield


@contextmanager
def doing_again() -> Iterator[None]:
    """Don't look whether what is in doubt has happened: do it again."""

    def make_sure(self: Standing, _session: object, _where: object) -> None:
        self.unsure = False

    with (
        mock.patch.dict(schema._SQL, unfenced(*FENCES)),
        mock.patch.object(Standing, "make_sure", make_sure),
    ):
        yield


def telling_nobody() -> Any:
    """Keep failures to oneself."""
    return mock.patch.object(FailureLog, "record", return_value=None)


PLANTS = {
    "faults swallowed": Plant(swallowing, BROKEN, {"lost", "answer", "difference", "hole", "error"}),
    "done again": Plant(doing_again, UNANSWERED, {"answer", "difference"}),
    "untold failures": Plant(telling_nobody, GONE, {"told", "hole", "books", "lost"}),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_defect_is_seen(name: str, tmp_path: Path) -> None:
    """An engine that was spoilt on purpose is reported, and as what it is."""
    plant, wire, totals = PLANTS[name], Wire(), Totals()
    with rig():
        play_one(tmp_path, wire, Variant(), NO_FAULT, 0)
        trips = trips_of(wire, plant.given)
        with plant.planted():
            for at in random.Random(SEED).sample(range(1, trips + 1), min(trips, PLANTED_PLAYS)):
                play = play_one(tmp_path, wire, Variant(), plant.given, at, limit=PLANTED_LIMIT)
                totals.add(f"trip {at}", play)
                if plant.kinds & totals.kinds.keys():
                    return
    pytest.fail(f"seed {SEED}: {totals}")
