"""The soak's kills: processes killed as they write, and while a job opens and closes; every job is looked at."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from typing import Any

from tests.crash.running import PROJECT, command
from tests.soak.part import Part, Tell

KILLS = {
    "kill -9, durability process": ("--durability", "process"),
    "kill -9, durability power": ("--durability", "power"),
    "kill -9 while opening and closing": ("--writer", "doors"),
}
BETWEEN_MIN = 0.75
CYCLES_MIN = 100  # fewer say nothing about a share


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Run every kill loop."""
    for name, options in KILLS.items():
        yield kill(name, options, given, tell)


def kill(name: str, options: tuple[str, ...], given: argparse.Namespace, tell: Tell) -> Part:
    """Run the kill loop, passing its progress on."""
    arguments = ("--cycles", str(given.cycles), "--seconds", str(given.seconds), "--seed", str(given.seed), *options)
    totals: dict[str, Any] = {}
    with subprocess.Popen(
        command("tests.crash.kills", *arguments), cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            totals = json.loads(line)
            tell(f"{name}: {totals['cycles']} of {given.cycles}")
    if not totals:
        return Part(name, wrong=[f"the kill loop ended with return code {child.returncode}"])
    kinds = totals["kinds"]
    named = {"lost": "lost", "holes": "hole", "split": "split"}
    share = totals["between"] / max(1, totals["cycles"])
    part = Part(name, wrong=list(totals["findings"]))
    part.cells = {
        "cycles": f"{totals['cycles']:,}",
        "in between": f"{totals['between']:,} ({share:.0%})",
        **{column: str(kinds.get(kind, 0)) for column, kind in named.items()},
        "other": str(sum(count for kind, count in kinds.items() if kind not in named.values())),
        "rows": f"{totals['recovered']:,} of {totals['posted']:,}",
        "seconds": f"{totals['seconds']:.1f}",
    }
    if "doors" not in options and share < BETWEEN_MIN and totals["cycles"] >= CYCLES_MIN:
        part.wrong.append(f"only {share:.0%} of the kills fell between flushed and posted rows")
    return part
