"""The soak's power cuts: 20 N images (20,000), half for each durability level, and every cut of one short run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from time import monotonic

from persistency.storage.port import Durability
from tests.crash.powered import Plan, Totals, every_cut, every_recovery, run
from tests.soak.part import Part, Tell

LEVELS: tuple[Durability, ...] = ("process", "power")
IMAGES_MIN = 500  # fewer say nothing about a share
LOOSE_MIN = 0.5


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Cut the power at random at every level, then after every step, and again while the job recovers from that."""
    begun = monotonic()
    images = 10 * given.cycles
    for durability in LEVELS:
        name = f"power cuts, durability {durability}"
        totals = Totals()
        for totals in run(given.seed, images, durability, seconds=given.seconds - (monotonic() - begun)):
            tell(f"{name}: {totals.images:,} of {images:,}")
        yield part(name, totals)
    if monotonic() - begun < given.seconds:
        name, totals, since = "a power cut after every step", Totals(), monotonic()
        tell(name)
        for durability in LEVELS:
            every_cut(given.seed, Plan(durability, feed_changes_max=25), totals)
            every_recovery(given.seed, Plan(durability), totals)
        totals.seconds = monotonic() - since
        yield part(name, totals)


def part(name: str, totals: Totals) -> Part:
    """Return the table's row of some totals; `in between` are the images of cuts before everything was synced."""
    named = {"lost": "lost", "holes": "hole", "split": "split"}
    share = totals.loose / max(1, totals.images)
    row = Part(name, wrong=list(totals.findings))
    row.cells = {
        "cycles": f"{totals.images:,}",
        "in between": f"{totals.loose:,} ({share:.0%})",
        **{column: str(totals.kinds.get(kind, 0)) for column, kind in named.items()},
        "other": str(sum(count for kind, count in totals.kinds.items() if kind not in named.values())),
        "rows": f"{totals.recovered:,} of {totals.accepted:,}",
        "seconds": f"{totals.seconds:.1f}",
    }
    if share < LOOSE_MIN and totals.images >= IMAGES_MIN:
        row.wrong.append(f"{name}: only {share:.0%} of the cuts fell where something wasn't synced")
    return row
