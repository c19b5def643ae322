"""The soak's memory: producers that run far ahead of the disk, each of which may make the process grow so much."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from time import monotonic
from typing import Any

from tests.crash.hungry import CASES, MIB, PLANTS, complaints
from tests.crash.running import last_json, run
from tests.soak.part import Part, Tell

CYCLES = 1_000  # with so many each case runs the count it names; with fewer a part of it, but a tenth at least
TIMEOUT = 900  # seconds for a case


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Have every planted defect reported, then run every producer: a million operations of most (of 1,000 cycles)."""
    begun = monotonic()
    yield planted(tell)
    for name, case in CASES.items():
        if monotonic() - begun < given.seconds:
            count = max(case.count // 10, case.count * given.cycles // CYCLES)
            yield produce(name, count, tell)


def planted(tell: Tell) -> Part:
    """Run producers on engines that were spoilt on purpose."""
    part, begun, count = Part("memory, planted defects"), monotonic(), 0
    for name, plant in PLANTS.items():
        tell(f"{part.name}: {name}")
        count += plant.count
        try:
            told = grow(plant.case, plant.count, name)
        except (subprocess.TimeoutExpired, AssertionError) as error:
            part.wrong.append(f"{name}: {error}")
            continue
        seen = {complaint.partition(":")[0] for complaint in complaints(plant.case, plant.count, told)}
        if not plant.kinds <= seen:
            part.wrong.append(f"{name}: not reported as {', '.join(sorted(plant.kinds - seen))}")
    part.cells = {
        "cycles": f"{count:,}",
        "other": f"{len(PLANTS) - len(part.wrong)} of {len(PLANTS)} seen",
        "seconds": f"{monotonic() - begun:.1f}",
    }
    return part


def produce(name: str, count: int, tell: Tell) -> Part:
    """Run a producer; return the table's row. `in between` is how much waited in the mailbox at most."""
    part = Part(f"memory, {name}")
    tell(f"{part.name}: {count:,}")
    try:
        told = grow(name, count)
    except (subprocess.TimeoutExpired, AssertionError) as error:
        part.wrong.append(f"{part.name}: {error}")
        return part
    part.wrong = complaints(name, count, told)
    part.cells = {
        "cycles": f"{count:,}",
        "other": str(len(part.wrong)),
        "rows": f"{told['committed']:,} written, {told['failed']:,} failed",
        "MiB grown": f"{told['grown']:.1f} (of {CASES[name].grown_mib_max:.0f})",
        "seconds": f"{told['seconds']:.1f}",
    }
    if "waited_bytes" in told:
        part.cells["in between"] = f"{told['waited_bytes'] / MIB:.1f} MiB waited"
    return part


def grow(name: str, count: int, *plant: str) -> dict[str, Any]:
    """Run a case in a process of its own and return what it tells. Raises `AssertionError` if it tells nothing."""
    with tempfile.TemporaryDirectory(prefix="hungry-") as root:
        done = run("tests.crash.hungry", name, root, str(count), *plant, timeout=TIMEOUT, flags=("-W", "error"))
    assert not done.returncode, f"return code {done.returncode}: {done.stderr[-500:]}"
    assert not done.stderr, done.stderr[-500:]
    return last_json(done)
