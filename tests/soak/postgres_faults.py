"""The soak's failing servers: every round trip of the script of `tests.crash.faulty_server` fails, in every way."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

from tests.crash.faulty import Totals, rig
from tests.crash.faulty_server import FAULTS, NO_FAULT, VARIANTS, Wire, play_one
from tests.postgres import NoPostgres, why_not
from tests.soak.part import Part, Tell


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Let every round trip fail, once and for good."""
    if why := why_not():
        raise NoPostgres(why)
    begun = monotonic()
    for variant in VARIANTS:
        wire, totals, since = Wire(), Totals(), monotonic()
        with rig(), tempfile.TemporaryDirectory() as place:
            play_one(Path(place), wire, variant, NO_FAULT, 0)
            trips = {fault: wire.calls[fault.operation, "wire"] for fault in FAULTS}
            for fault, count in trips.items():
                for at in range(1, count + 1):
                    if monotonic() - begun >= given.seconds:
                        break
                    tell(f"postgres, {variant}, {fault}: {at} of {count}")
                    totals.add(f"{variant}, {fault}, trip {at}", play_one(Path(place), wire, variant, fault, at))
        part = Part(f"postgres, failing, {variant}", wrong=list(totals.findings))
        part.cells = {
            "cycles": f"{totals.plays:,}",
            "in between": f"{totals.stalled:,} stalled, {totals.poisoned:,} poisoned",
            "other": str(sum(totals.kinds.values())),
            "seconds": f"{monotonic() - since:.1f}",
        }
        yield part
