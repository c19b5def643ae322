"""Concurrent histories: thousands of them, each with an order of posting that explains every answer."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

from tests.crash.clients import Survey, survey
from tests.soak.part import Part, Tell
from tests.test_linear import OVERLAP_MIN, PLANTS, survey_planted

HISTORIES_EACH = 5  # for every cycle
ENOUGH = 100  # fewer say nothing about an average


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Have every planted defect reported, then make five times as many histories as `cycles` says (5,000)."""
    with tempfile.TemporaryDirectory(prefix="linear-") as place:
        yield planted(Path(place), given, tell)
        yield histories(Path(place) / "sound", HISTORIES_EACH * given.cycles, given, tell)


def planted(place: Path, given: argparse.Namespace, tell: Tell) -> Part:
    """Show the histories engines that were spoilt on purpose."""
    part, begun, count = Part("histories, planted defects"), monotonic(), 0
    for number, name in enumerate(PLANTS):
        tell(f"{part.name}: {name}")
        taken, complaints = survey_planted(name, place / str(number), given.seed)
        count += taken
        if not complaints:
            part.wrong.append(f"{name}: not reported within {taken} histories")
    part.cells = {
        "cycles": f"{count:,}",
        "other": f"{len(PLANTS) - len(part.wrong)} of {len(PLANTS)} seen",
        "seconds": f"{monotonic() - begun:.1f}",
    }
    return part


def histories(place: Path, count: int, given: argparse.Namespace, tell: Tell) -> Part:
    """Make histories with the engine as it is."""
    part, begun = Part("concurrent histories"), monotonic()

    def progress(told: Survey) -> None:
        if told.histories % 100 == 0:
            tell(f"{part.name}: {told.histories:,} of {count:,}")

    told = survey(place, given.seed, count, seconds=given.seconds, tell=progress)
    part.wrong = list(told.wrong)
    if told.overlap < OVERLAP_MIN and told.histories >= ENOUGH:
        part.wrong.append(f"{part.name}: a call overlaps with {told.overlap:.1f} others only")
    part.cells = {
        "cycles": f"{told.histories:,}",
        "in between": f"overlap {told.overlap:.1f}",
        "other": str(len(told.wrong)),
        "rows": f"{told.calls:,} calls",
        "seconds": f"{monotonic() - begun:.1f}",
    }
    return part
