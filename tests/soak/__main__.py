"""The long forms of the crash, exit and memory tests, as a command that prints a table:

    python -m tests.soak [PART ...] [--cycles N] [--seconds S] [--seed SEED]

    kill     N cycles (1,000) of SIGKILL and reopening for each durability level, and N more of kills while a job opens
             and closes: every job must be an exact prefix, with all that was acknowledged, and three quarters of the
             kills must have fallen between flushed and posted rows
    exit     N // 20 processes (50) that end without closing anything, in turn by every way there is
    memory   a million operations by every kind of producer, each within its limit
    machine  2 N runs (2,000) of 50 steps of the state machine of tests/test_machine.py, for each of its variants: a job
             must do what a dict would
    large    a million rows that end are gone from the file beside puts, in bounded slices; `storage_used` of a million
             rows costs what it costs at ten

Without a PART all of them are run. `--seconds` ends each part after that time, if that comes first. The exit code is 1
if anything is off.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

from persistency import Persistency
from tests.crash.held import PENDING
from tests.crash.running import PROJECT, command, last_json, run
from tests.soak.part import Part, Tell

KILLS = {
    "kill -9, durability process": ("--durability", "process"),
    "kill -9, durability power": ("--durability", "power"),
    "kill -9 while opening and closing": ("--writer", "doors"),
}
BETWEEN_MIN = 0.75
CYCLES_MIN = 100  # fewer say nothing about a share
# The return code of each way to end; every one of them must leave all rows.
EXITS = {
    "returns": 0,
    "returns_from_several": 0,
    "drops_handles": 0,
    "exits_with_0": 0,
    "exits_with_3": 3,
    "raises": 1,
    "raises_in_thread": 0,
    "posts_in_thread_and_raises": 0,
    "interrupted": -2,
    "interrupted_in_flush": -2,
    "interrupted_in_hook": 0,
    "asyncio_run": 0,
    "closes_too_late": 0,
    "disk_full_for_a_while": 0,
    "late hook flush": 0,
    "late thread flush": 0,
    "late del flush": 0,
}
# How many operations, and by how many MiB the process may grow.
PRODUCERS = {
    "puts": (1_000_000, 150),
    "requests": (1_000_000, 150),
    "loop_puts": (1_000_000, 150),
    "loop_requests": (1_000_000, 150),
    "thread_puts": (1_000_000, 40),
    "thread_page_puts": (60_000, 80),
    "thread_large_puts": (1_000, 80),
    "failing_events": (100_000, 50),
}

MACHINE_STEPS = 50
LARGE_ROWS = 1_000_000

TABLE_WIDTH = 170
COLUMNS = ("cycles", "in between", "lost", "holes", "split", "other", "rows", "MiB grown", "seconds")


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


def exit_storm(given: argparse.Namespace, tell: Tell) -> Part:
    """End processes in every way there is, and look at what they leave."""
    name = "exit without close"
    part = Part(name)
    begun = monotonic()
    times = max(len(EXITS), given.cycles // 20)
    lost = ended = recovered = 0
    while ended < times and monotonic() - begun < given.seconds:
        case = list(EXITS)[ended % len(EXITS)]
        tell(f"{name}: {ended} of {times}, {case}")
        with tempfile.TemporaryDirectory(prefix="exits-") as root:
            try:
                program, *arguments = case.split() if " " in case else ("exits", case)
                code = run(f"tests.crash.{program}", *arguments, root, timeout=60).returncode
            except subprocess.TimeoutExpired:
                part.wrong.append(f"{case}: still there after 60 s")
                code = EXITS[case]
            if code != EXITS[case]:
                part.wrong.append(f"{case}: return code {code}, not {EXITS[case]}")
            for job_id, count in _counts(root):
                recovered += count
                if count < PENDING:
                    lost += PENDING - count
                    part.wrong.append(f"{case}: job {job_id!r} has {count} rows, not {PENDING}")
        ended += 1
    part.cells = {
        "cycles": str(ended),
        "lost": f"{lost:,}",
        "rows": f"{recovered:,}",
        "seconds": f"{monotonic() - begun:.1f}",
    }
    return part


def _counts(root: str) -> Iterator[tuple[str, int]]:
    with Persistency(root) as persistency:
        for stored in persistency.stored_jobs():
            with persistency.open_job(stored.job_id) as job:
                yield stored.job_id, job.count("rows").result()


def produce(case: str, count: int, mib_max: int, tell: Tell) -> Part:
    """Run a producer that is faster than the disk."""
    name = f"{count:,} x {case}"
    tell(name)
    with tempfile.TemporaryDirectory(prefix="hungry-") as root:
        done = run("tests.crash.hungry", case, root, str(count), timeout=600)
    if done.returncode:
        return Part(name, wrong=[f"{case}: return code {done.returncode}: {done.stderr[-500:]}"])
    told = last_json(done)
    part = Part(name)
    part.cells = {
        "rows": f"{told['rows']:,}",
        "MiB grown": f"{told['grown']:.1f} (of {mib_max})",
        "seconds": f"{told['seconds']:.1f}",
    }
    if told["grown"] >= mib_max:
        part.wrong.append(f"{case}: grew by {told['grown']} MiB, the limit is {mib_max}")
    return part


def machines(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Run the state machine in every variant."""
    from tests.test_machine import VARIANTS, drive

    runs, begun = max(1, 2 * given.cycles), monotonic()
    for variant in VARIANTS:
        if monotonic() - begun >= given.seconds:
            return
        name = f"machine, {variant}"
        tell(f"{name}: {runs} runs of {MACHINE_STEPS} steps")
        part, since = Part(name), monotonic()
        try:
            drive(variant, runs=runs, steps=MACHINE_STEPS, database=None)
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", ()))
            part.wrong.append(f"{name}: {error!r}\n{notes}")
        part.cells = {"cycles": f"{runs:,}", "seconds": f"{monotonic() - since:.1f}"}
        yield part


def large(_given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Let a million rows end, and count a million rows."""
    import pytest

    from tests.test_quota import compare_costs
    from tests.test_time import Slices, check_slices, vanish

    with tempfile.TemporaryDirectory(prefix="large-") as place:
        part, since = Part(f"{LARGE_ROWS:,} rows that end"), monotonic()
        with pytest.MonkeyPatch.context() as patch:
            slices = Slices(patch)
            left = vanish(f"{place}/ending", LARGE_ROWS, slices, lambda left: tell(f"{part.name}: {left:,} are left"))
        try:
            check_slices(slices, LARGE_ROWS, left)
        except AssertionError as error:
            part.wrong.append(f"{part.name}: {error}")
        part.cells = {"cycles": f"{len(slices.counts):,}", "seconds": f"{monotonic() - since:.1f}"}
        yield part
        part, since = Part(f"storage_used of {LARGE_ROWS:,} rows"), monotonic()
        tell(part.name)
        try:
            compare_costs(Path(place), LARGE_ROWS)
        except AssertionError as error:
            part.wrong.append(f"{part.name}: {error}")
        part.cells = {"rows": f"{LARGE_ROWS:,}", "seconds": f"{monotonic() - since:.1f}"}
        yield part


def kills(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Run every kill loop."""
    for name, options in KILLS.items():
        yield kill(name, options, given, tell)


def exits(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Run the exit storm."""
    yield exit_storm(given, tell)


def producers(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Run every producer."""
    begun = monotonic()
    for case, (count, mib_max) in PRODUCERS.items():
        if monotonic() - begun < given.seconds:
            yield produce(case, count, mib_max, tell)


PARTS: dict[str, Callable[[argparse.Namespace, Tell], Iterator[Part]]] = {
    "kill": kills,
    "exit": exits,
    "memory": producers,
    "machine": machines,
    "large": large,
}


def all_parts(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Run what was asked for, or everything, one part after the other."""
    for name, parts in PARTS.items():
        if name in (given.parts or PARTS):
            yield from parts(given, tell)


@contextlib.contextmanager
def progress() -> Iterator[Tell]:
    """Give what shows a line of progress: one that is replaced on a terminal, else nothing."""
    try:
        from rich.console import Console
    except ImportError:
        yield lambda _text: None
        return
    console = Console(stderr=True)
    with console.status("") as status:
        yield status.update


def print_table(parts: list[Part]) -> None:
    """Print what came of it."""
    lines = [[part.name, *(part.cells.get(column, "") for column in COLUMNS)] for part in parts]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        lines = [["", *COLUMNS], *lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        for line in lines:
            print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    else:
        table = Table("")
        for column in COLUMNS:
            table.add_column(column, no_wrap=True, justify="right")
        for line, part in zip(lines, parts, strict=True):
            table.add_row(*line, style="red" if part.wrong else None)
        # Into a file a table isn't cut to the width of a terminal that isn't there.
        Console(width=None if sys.stdout.isatty() else TABLE_WIDTH).print(table)


def main(arguments: list[str] | None = None) -> int:
    """Run the long forms; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"only these: {', '.join(PARTS)}")
    parser.add_argument("--cycles", type=int, default=1_000, help="kills per durability level (1000)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="at most so long for each part")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32), help="to repeat a run")
    given = parser.parse_args(arguments)
    if unknown := set(given.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    logging.getLogger("persistency").setLevel(logging.CRITICAL)  # failing is part of it
    with progress() as tell:
        parts = list(all_parts(given, tell))
    print_table(parts)
    wrong = [complaint for part in parts for complaint in part.wrong]
    for complaint in wrong:
        print(complaint, file=sys.stderr)
    print(f"seed {given.seed}: {'all is as promised' if not wrong else f'{len(wrong)} findings'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
