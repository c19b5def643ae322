"""The soak's disks that fail: every call of every operation, once and for good, for every variant; and full disks."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import monotonic

from tests.crash.faulty import (
    FAULTS,
    VARIANTS,
    Disk,
    Fault,
    Play,
    Totals,
    full_by_vfs,
    full_in_child,
    memory_disk,
    play_migration,
    play_one,
    rig,
    sweep,
)
from tests.soak.part import Part, Tell

CYCLES = 1_000  # for every call; with fewer cycles only each second, third, ...

Full = Callable[..., tuple[list[str], str]]


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Let every call fail, and let disks run full `cycles // 20` times (50) in each way."""
    until = monotonic() + given.seconds
    stride = max(1, CYCLES // max(1, given.cycles))
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory_disk()) as directory:
        root = Path(directory)
        for variant in VARIANTS:
            with rig(hurried=variant.hurried):
                play = partial(play_one, root, variant=variant)
                yield _faults(f"faults, {variant}", FAULTS, play, stride, until, tell)
        plain = tuple(fault for fault in FAULTS if not fault.kind and fault.operation != "commit")
        yield _faults("faults in a migration", plain, partial(play_migration, root), stride, until, tell)
    times = max(1, given.cycles // 20)
    yield _full("full disk, simulated", lambda place, **how: (full_by_vfs(place, **how), ""), times, until, tell)
    yield _full("full disk, mounted", partial(full_in_child, "ballast"), times, until, tell)
    yield _full("full disk, by a limit", partial(full_in_child, "limit"), times, until, tell)


def _faults(
    name: str, faults: tuple[Fault, ...], play: Callable[..., Play], stride: int, until: float, tell: Tell
) -> Part:
    """Sweep over each fault; return the table's row. `in between` are the plays in which the fault was met."""
    begun = monotonic()
    totals = Totals()
    for fault in faults:
        disk = Disk()

        def one(at: int, fault: Fault = fault, disk: Disk = disk) -> Play:
            tell(f"{name}: {fault}, call {at}; {totals.plays:,} plays")
            return play(disk=disk, given=fault, at=at)

        try:
            sweep(one, f"{name}, {fault}", totals, stride=stride, until=until)
        finally:
            disk.unregister()
    named = {"lost": "lost", "holes": "hole", "split": "split"}
    part = Part(name, wrong=list(totals.findings))
    part.cells = {
        "cycles": f"{totals.plays:,}",
        "in between": f"{totals.fired:,} ({totals.fired / max(1, totals.plays):.0%})",
        **{column: str(totals.kinds.get(kind, 0)) for column, kind in named.items()},
        "other": str(sum(count for kind, count in totals.kinds.items() if kind not in named.values())),
        "seconds": f"{monotonic() - begun:.1f}",
    }
    return part


def _full(name: str, run: Full, times: int, until: float, tell: Tell) -> Part:
    """Let a disk run full so many times, half of them for longer than the jobs wait; return the table's row."""
    begun = monotonic()
    part = Part(name)
    done = 0
    while done < times and monotonic() < until:
        tell(f"{name}: {done} of {times}")
        with tempfile.TemporaryDirectory(prefix="full-", dir=memory_disk()) as directory:
            findings, why_not = run(Path(directory), patient=done % 2 == 0)
        if why_not:
            part.name = f"{name}: skipped, {why_not}"
            break
        part.wrong += [f"{name}, time {done}: {finding}" for finding in findings]
        done += 1
    part.cells |= {"cycles": str(done), "seconds": f"{monotonic() - begun:.1f}"}
    return part
