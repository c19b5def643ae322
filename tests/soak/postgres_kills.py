"""Owners killed beside their writes, each taken over by another process: `python -m tests.soak.postgres_kills`.

Each owner of a job on a server is a process of its own. It waits until the lease of the one before it is over, judges
what that one has left, and writes until it is killed in turn. It prints the totals as the last line, one object of
JSON. This process opens nothing and stays single-threaded, so that a fork of it is an owner without the cost of a
start.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from time import monotonic, sleep
from typing import Any

from persistency import Job, JobLocked, Persistency, key
from persistency.storage.port import Durability
from tests.crash.kills import FINDINGS_MAX, HANG_SECONDS, PROGRESS_SECONDS, Said, Totals, kill_one
from tests.crash.ledger import ENDED, FLUSHED, ROWS, STATE, STATE_KEY, Contents, Finding, Found, judge
from tests.crash.running import PROJECT, command
from tests.crash.writers import ROWS_MAX, Writer
from tests.postgres import Server, with_parameters
from tests.soak.part import Part, Tell
from tests.soak.postgres_plants import PLANTS

LEASE_SECONDS = 1
LIVES_MAX = 8  # owners that one job goes through
OPEN_PAUSE = 0.02


def open_when_free(persistency: Persistency, job_id: str, **options: Any) -> Job:
    """Open a job as soon as nobody has it. Raises `JobLocked` if somebody still has it when that is a hang."""
    limit = monotonic() + HANG_SECONDS
    while True:
        try:
            return persistency.open_job(job_id, **options)
        except JobLocked:
            if monotonic() > limit:
                raise
            sleep(OPEN_PAUSE)


def contents_of(job: Job) -> Contents:
    """Return what a job holds, as its owner sees it."""
    rows = sorted((row.key.parts[0], row.payload, row.version) for row in job.snapshot(ROWS).result())
    state = job.entry(STATE, key(*STATE_KEY)).result()
    found = [Found(*row) for row in rows]
    return Contents(found, None if state is None else (state.payload, state.version), job.version().result())


def own(
    url: str, job_id: str, seed: int, durability: Durability, expected: tuple[int, int], report: Path, pipe: int
) -> None:
    """Take a job over, judge what is there, and write until killed."""
    rng = random.Random(seed)
    job = open_when_free(Persistency(url), job_id, durability=durability)
    found = contents_of(job)
    findings = judge(found, *expected)
    draft = report.with_suffix(".draft")
    draft.write_text(json.dumps([len(found.rows), findings]))
    draft.replace(report)
    writer = Writer(job, pipe, rng)
    end = writer.number + ROWS_MAX
    while writer.number < end:
        for _ in range(rng.randint(1, 25)):
            writer.post_block()
        job.flush(sync=rng.random() < 0.05).result()
        writer.tell(FLUSHED)
    writer.tell(ENDED)
    signal.pause()


class Loop:
    """All cycles of one run."""

    def __init__(self, url: str, place: Path, arguments: argparse.Namespace) -> None:
        self.totals = Totals()
        self._url = with_parameters(url, persistency_lease=LEASE_SECONDS)
        self._place = place
        self._arguments = arguments
        self._rng = random.Random(arguments.seed)
        self._lives = 0
        self._expected = (0, 0)  # rows acknowledged, and rows that may be there
        self._there = 0
        self._job_id = ""

    def cycle(self) -> None:
        """Have an owner judge what the one before has left, and kill it."""
        rng, totals = self._rng, self.totals
        if not self._lives:
            self._lives = LIVES_MAX
            self._job_id, self._expected, self._there = f"job-{totals.cycles}", (0, 0), 0
        self._lives -= 1
        report = self._place / f"{totals.cycles}.json"
        seed, expected, job_id, arguments = rng.getrandbits(32), self._expected, self._job_id, self._arguments

        def run(pipe: int) -> None:
            if arguments.plant:
                PLANTS[arguments.plant].plant()
            own(self._url, job_id, seed, arguments.durability, expected, report, pipe)

        # Most are killed amid writes, others while they take the job over.
        said, findings = kill_one(run, rng, expected[0], after_flush=rng.random() < 0.9)
        if report.exists():
            count, more = json.loads(report.read_text())
            findings += [Finding(*finding) for finding in more]
            totals.recovered += count - self._there
            totals.cut += count < expected[1]
            totals.ahead += count > expected[0]
            self._there = count
            said.flushed = max(said.flushed, count) if not said.flushes else said.flushed
            self._expected = (max(count, said.flushed), max(count, said.announced))
            totals.posted += max(0, said.posted - count)
        self._count(said, findings)
        if findings:
            self._lives = 0

    def _count(self, said: Said, findings: list[Finding]) -> None:
        totals = self.totals
        totals.between += said.flushed < said.posted
        for finding in findings:
            totals.kinds[finding.kind] = totals.kinds.get(finding.kind, 0) + 1
            if len(totals.findings) < FINDINGS_MAX:
                totals.findings.append(f"cycle {totals.cycles}, {self._job_id}: {finding.kind}: {finding.detail}")
        totals.cycles += 1


def main(given: list[str] | None = None) -> int:
    """Run the cycles; the exit code is 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True)
    parser.add_argument("--cycles", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--durability", choices=("process", "power"), default="process")
    parser.add_argument("--plant", default="", help="a defect to plant into every owner; stops at the first finding")
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args(given)
    begun = told = monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as place:
        loop = Loop(arguments.url, Path(place), arguments)
        totals = loop.totals
        while totals.cycles < arguments.cycles and totals.seconds < arguments.seconds:
            loop.cycle()
            totals.seconds = round(monotonic() - begun, 3)
            if monotonic() - told > PROGRESS_SECONDS:
                told = monotonic()
                print(json.dumps(asdict(totals)), flush=True)
            if arguments.plant and totals.kinds:
                break
    print(json.dumps(asdict(totals)), flush=True)
    return 1 if totals.kinds else 0


# -- the long form -----------------------------------------------------------------------------------------------


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Kill N // 5 owners (200) for each durability level."""
    with Server() as server:
        for durability in ("process", "power"):
            url = with_parameters(server.url, persistency_schema=f"kills_{durability}")
            yield kill(url, durability, max(1, given.cycles // 5), given, tell)


def kill(url: str, durability: str, cycles: int, given: argparse.Namespace, tell: Tell) -> Part:
    """Run the loop, passing its progress on."""
    name = f"postgres, kill -9 and taken over, durability {durability}"
    arguments = ["--url", url, "--cycles", str(cycles), "--seconds", str(given.seconds), "--seed", str(given.seed)]
    totals: dict[str, Any] = {}
    with subprocess.Popen(
        command("tests.soak.postgres_kills", *arguments, "--durability", durability),
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            totals = json.loads(line)
            tell(f"{name}: {totals['cycles']} of {cycles}")
    if not totals:
        return Part(name, wrong=[f"{name}: the loop ended with return code {child.returncode}"])
    kinds = totals["kinds"]
    named = {"lost": "lost", "holes": "hole", "split": "split"}
    part = Part(name, wrong=list(totals["findings"]))
    part.cells = {
        "cycles": f"{totals['cycles']:,}",
        "in between": f"{totals['between']:,} ({totals['between'] / max(1, totals['cycles']):.0%})",
        **{column: str(kinds.get(kind, 0)) for column, kind in named.items()},
        "other": str(sum(count for kind, count in kinds.items() if kind not in named.values())),
        "rows": f"{totals['recovered']:,} of {totals['posted']:,}",
        "seconds": f"{totals['seconds']:.1f}",
    }
    return part


if __name__ == "__main__":
    sys.exit(main())
