"""Damaged files: thousands of flipped bits, cuts and lost pages for every kind of file, and a cut at every sector.

Of each row of the table: "in between" says how many cases couldn't be opened, and in how many errors of ours came
later; "split" in how many answers differ from what was written, because SQLite can't see that a byte has changed;
"holes" in how many the job was as it had been some groups before, and "rows" in how many everything was right. "other"
are the findings.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from time import monotonic
from typing import Any

from tests.crash.damaged import KINDS
from tests.crash.running import PROJECT, command, last_json, run
from tests.soak.part import Part, Tell
from tests.test_damage import PLANTED_SEED, PLANTS

CASES_EACH = 2  # for every cycle
SWEEP_CYCLES = 1_000  # with so many a file is cut at every sector, with fewer at some of them


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Have every planted defect reported, then damage each kind of file twice as often as `cycles` says (2,000)."""
    begun = monotonic()
    yield planted(tell)
    for kind in KINDS:
        left = given.seconds - (monotonic() - begun)
        yield damaged(f"damage, {kind}", kind, ("--cases", str(CASES_EACH * given.cycles)), given.seed, left, tell)
    step = max(1, SWEEP_CYCLES // max(1, given.cycles))
    for kind in KINDS:
        left = given.seconds - (monotonic() - begun)
        yield damaged(f"damage, {kind}, cut everywhere", kind, ("--sweep", str(step)), given.seed, left, tell)


def planted(tell: Tell) -> Part:
    """Show the cases engines that were spoilt on purpose."""
    part, begun = Part("damage, planted defects"), monotonic()
    tell(part.name)
    done = run("tests.crash.damaged", "planted", "--seed", PLANTED_SEED, timeout=600, flags=("-W", "error"))
    told = last_json(done)
    for name, plant in PLANTS.items():
        if plant.finding not in told[name]["kinds"]:
            part.wrong.append(f"{part.name}: {name}: not reported within {told[name]['cases']} cases")
    part.cells = {
        "cycles": f"{sum(totals['cases'] for totals in told.values()):,}",
        "other": f"{len(PLANTS) - len(part.wrong)} of {len(PLANTS)} seen",
        "seconds": f"{monotonic() - begun:.1f}",
    }
    return part


def damaged(name: str, kind: str, how: tuple[str, ...], seed: int, seconds: float, tell: Tell) -> Part:
    """Run the cases of a kind, passing their progress on."""
    arguments = (kind, *how, "--seed", str(seed), "--seconds", str(seconds))
    totals: dict[str, Any] = {}
    with subprocess.Popen(
        command("tests.crash.damaged", *arguments, flags=("-W", "error")),
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            totals = json.loads(line)
            tell(f"{name}: {totals['cases']:,} cases")
    if not totals:
        return Part(name, wrong=[f"{name}: the cases ended with return code {child.returncode}"])
    part = Part(name, wrong=list(totals["findings"]))
    part.cells = {
        "cycles": f"{totals['cases']:,}",
        "in between": f"{totals['refused']:,} refused, {totals['failed']:,} later",
        "split": f"{totals['changed']:,} changed",
        "holes": f"{totals['earlier']:,} earlier",
        "other": str(sum(totals["kinds"].values())),
        "rows": f"{totals['right']:,} right",
        "MiB grown": f"{totals['peak_mib']:.0f} at most",
        "seconds": f"{totals['seconds']:.1f}",
    }
    return part
