"""The soak's exits: processes that end without closing anything, in turn by every way there is; no row may be lost."""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Iterator
from time import monotonic

from persistency import Persistency
from tests.crash.held import PENDING
from tests.crash.running import run
from tests.soak.part import Part, Tell

# The return code of each way to end; every one of them must leave all rows.
EXITS = {
    "returns": 0,
    "returns_from_several": 0,
    "drops_handles": 0,
    "exits_with_0": 0,
    "exits_with_3": 3,
    "exits_with_a_word": 1,
    "raises": 1,
    "raises_in_thread": 0,
    "posts_in_thread_and_raises": 0,
    "interrupted": -2,
    "interrupted_in_flush": -2,
    "interrupted_in_hook": 0,
    "interrupted_as_hook_begins": 0,
    "asyncio_run": 0,
    "closes_too_late": 0,
    "disk_full_for_a_while": 0,
    "late hook flush": 0,
    "late thread flush": 0,
    "late del flush": 0,
}


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Run the exit storm."""
    yield exit_storm(given, tell)


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
