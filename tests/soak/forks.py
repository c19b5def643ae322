"""The soak's forks: N // 2 of them (500) beside a busy worker, and children by every start method."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

from persistency import Persistency
from tests.crash.children import ROWS
from tests.crash.running import run
from tests.soak.part import Part, Tell

QUIETLY = ("-W", "ignore:This process:DeprecationWarning")  # from Python 3.12 on, of forks beside threads
METHODS = ("fork", "spawn", "forkserver")


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Fork, and start children; the parent and every child must have all they posted."""
    forks = max(1, given.cycles // 2)
    part, since = Part("forks beside a busy worker"), monotonic()
    tell(f"{part.name}: {forks}")
    with tempfile.TemporaryDirectory(prefix="forks-") as root:
        done = run("tests.crash.children", "fork", root, str(forks), timeout=10.0 * forks + 60, flags=QUIETLY)
        if done.returncode:
            part.wrong.append(f"{part.name}: return code {done.returncode}: {done.stderr[-1000:]}")
        part.cells = {"cycles": f"{forks:,}", "seconds": f"{monotonic() - since:.1f}"}
    yield part
    for method in METHODS:
        part, since = Part(f"children by {method}"), monotonic()
        rounds = lost = 0
        while rounds < max(1, given.cycles // 50) and monotonic() - since < given.seconds:
            tell(f"{part.name}: {rounds}")
            with tempfile.TemporaryDirectory(prefix="forks-") as root:
                done = run("tests.crash.children", "start", root, method, timeout=120, flags=QUIETLY)
                lost += _lost(Path(root))
            if done.returncode:
                part.wrong.append(f"{part.name}: return code {done.returncode}: {done.stderr[-1000:]}")
            rounds += 1
        if lost:
            part.wrong.append(f"{part.name}: {lost} rows are lost")
        part.cells = {"cycles": str(rounds), "lost": str(lost), "seconds": f"{monotonic() - since:.1f}"}
        yield part


def _lost(root: Path) -> int:
    """Return how many rows aren't there that children and their parent posted."""
    with Persistency(root) as persistency:
        counts = [
            persistency.open_job(job_id).count("rows").result(60) for job_id in ("own", "child0", "child1", "child2")
        ]
    return ROWS * len(counts) - sum(counts)
