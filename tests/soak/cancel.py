"""Giving up: tens of thousands of cancellations, timeouts, and loops closed under pending replies."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

from tests.crash.aftermath import storm
from tests.crash.cancelling import Books
from tests.soak.part import Part, Tell
from tests.test_cancelling import PLANTS, storm_planted

GIVEN_UP_EACH = 50  # for every cycle


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Have every planted defect reported, then give up fifty times as often as `cycles` says (50,000)."""
    with tempfile.TemporaryDirectory(prefix="cancel-") as place:
        yield planted(Path(place), given, tell)
        yield cancellations(Path(place) / "sound", GIVEN_UP_EACH * given.cycles, given, tell)


def planted(place: Path, given: argparse.Namespace, tell: Tell) -> Part:
    """Show the storm engines that were spoilt on purpose."""
    part, begun, count = Part("cancellations, planted defects"), monotonic(), 0
    for number, name in enumerate(PLANTS):
        tell(f"{part.name}: {name}")
        given_up, complaints = storm_planted(name, place / str(number), given.seed)
        count += given_up
        if not complaints:
            part.wrong.append(f"{name}: not reported within {given_up} cancellations")
    part.cells = {
        "cycles": f"{count:,}",
        "other": f"{len(PLANTS) - len(part.wrong)} of {len(PLANTS)} seen",
        "seconds": f"{monotonic() - begun:.1f}",
    }
    return part


def cancellations(place: Path, count: int, given: argparse.Namespace, tell: Tell) -> Part:
    """Have the storm rage over the engine as it is."""
    part, begun = Part("cancellations and closed loops"), monotonic()

    def progress(_rounds: int, books: Books) -> None:
        tell(f"{part.name}: {books.given_up:,} of {count:,}")

    _, books = storm(place, given.seed, count, seconds=given.seconds, tell=progress)
    part.wrong = list(books.wrong)
    part.cells = {
        "cycles": f"{books.given_up:,}",
        "in between": f"{books.left_pending:,} at closing",
        "lost": str(sum(": lost: " in wrong for wrong in books.wrong)),
        "other": str(sum(": lost: " not in wrong for wrong in books.wrong)),
        "rows": f"{books.ops:,} ops",
        "seconds": f"{monotonic() - begun:.1f}",
    }
    return part
