"""Many jobs from several processes on one server, with few connections each: `python -m tests.soak.postgres_crowd`.

Each process has its share of the jobs open and writes to all of them in turn: plain puts, counters and batches. At the
end every value of every job is looked at, by another process than the one that has written it. Meanwhile the server is
asked how many connections each process has.

It prints the totals as the last line, one object of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any

from persistency import Job, Persistency, Put
from persistency.codec.values import encode
from tests.crash.running import PROJECT, command
from tests.postgres import Server, sql, with_parameters
from tests.soak.part import Part, Tell

SECONDS = 600.0  # that one step may take at most: beyond it somebody hangs
PROCESSES = 4
CONNECTIONS_MAX = 32
ROUND_PUTS = 100
PAYLOAD = bytes(100)


@dataclass
class Totals:
    """What came of it; `connections` is the most that one process was seen to have."""

    jobs: int = 0
    ops: int = 0
    write_seconds: float = 0.0
    ops_per_second: int = 0
    reads: int = 0
    reads_per_second: int = 0
    connections: int = 0
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)


# -- one process -----------------------------------------------------------------------------------------------------


def payload_of(job_id: str, number: int) -> bytes:
    """Return what a row holds."""
    return f"{job_id} {number} ".encode() + PAYLOAD


def write(url: str, share: int, jobs: int, rounds: int, seed: int) -> dict[str, Any]:
    """Open a share of the jobs and write to all of them; return the numbers."""
    rng = random.Random(seed + share)
    mine = [f"job-{number}" for number in range(share, jobs, PROCESSES)]
    with Persistency(url, open_timeout=SECONDS) as persistency:
        opened = {job_id: persistency.open_job(job_id) for job_id in mine}
        print(json.dumps({"opened": len(opened)}), flush=True)
        sys.stdin.readline()  # until all have opened theirs
        begun = monotonic()
        ops = reads = 0
        for at in range(rounds):
            rng.shuffle(mine)
            asked = []
            for job_id in mine:
                ops += write_round(opened[job_id], at)
                asked.append((job_id, opened[job_id].get("rows", (at * ROUND_PUTS,))))
            for job_id, reply in asked:
                assert reply.result(SECONDS) == payload_of(job_id, at * ROUND_PUTS)
            reads += len(asked)
        for job in opened.values():
            job.flush().result(SECONDS)
        seconds = monotonic() - begun
    return {"jobs": len(mine), "ops": ops, "seconds": seconds, "reads": reads}


def write_round(job: Job, at: int) -> int:
    """Write a round to a job; return how many operations that was."""
    first = at * ROUND_PUTS
    for number in range(first, first + ROUND_PUTS):
        job.put("rows", (number,), payload_of(job.id, number))
    job.increment("counters", ("rounds",))
    job.persist([Put("last", (name,), b"%d" % at) for name in ("one", "two")])
    return ROUND_PUTS + 3


def check(url: str, share: int, jobs: int, rounds: int) -> dict[str, Any]:
    """Look at every value of another process' jobs; return the numbers, and what is wrong."""
    wrong = []
    reads = 0
    begun = monotonic()
    with Persistency(url, max_live_jobs=16, open_timeout=SECONDS) as persistency:
        for number in range((share + 1) % PROCESSES, jobs, PROCESSES):
            job_id = f"job-{number}"
            with persistency.open_job(job_id) as job:
                rows = job.scan("rows").result(SECONDS)
                expected = [payload_of(job_id, at) for at in range(rounds * ROUND_PUTS)]
                keys = [row.key.parts for row in rows] == [(at,) for at in range(len(expected))]
                if not keys or [row.payload for row in rows] != expected:
                    wrong.append(f"{job_id} has {len(rows)} rows, not the {len(expected)} that were written")
                if job.get("counters", ("rounds",)).result(SECONDS) != encode(rounds):
                    wrong.append(f"{job_id} has counted something else than {rounds} rounds")
                last = {row.payload for row in job.scan("last").result(SECONDS)}
                if last != {b"%d" % (rounds - 1)}:
                    wrong.append(f"{job_id} has {last} of the last batch")
                if job.version().result(SECONDS) != rounds * (ROUND_PUTS + 3):
                    wrong.append(f"{job_id} has version {job.version().result(SECONDS)}")
                reads += len(rows) + 4
    return {"reads": reads, "seconds": monotonic() - begun, "wrong": wrong[:10]}


# -- all of them -----------------------------------------------------------------------------------------------------


def children(step: str, url: str, jobs: int, rounds: int, seed: int) -> list[subprocess.Popen[str]]:
    """Start a process for each share."""
    given = ["--jobs", str(jobs), "--rounds", str(rounds), "--seed", str(seed)]
    return [
        subprocess.Popen(
            command(
                "tests.soak.postgres_crowd",
                *("--url", with_parameters(url, application_name=f"crowd-{share}")),
                *("--step", step, "--share", str(share), *given),
            ),
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for share in range(PROCESSES)
    ]


def ended(child: subprocess.Popen[str], findings: list[str]) -> dict[str, Any]:
    """Return what a process says last."""
    hanging = threading.Timer(SECONDS, child.kill)
    hanging.start()
    told, _ = child.communicate()
    hanging.cancel()
    if child.returncode:
        findings.append(f"a process ended with {child.returncode}")
        return {}
    said: dict[str, Any] = json.loads(told.splitlines()[-1])
    return said


def crowd(
    url: str, jobs: int, rounds: int, seed: int, totals: Totals, *, bound: int = CONNECTIONS_MAX, told: int = 0
) -> None:
    """Have all processes write, and then check one another; `told` is the bound they are told, if another."""
    begun = monotonic()
    named = with_parameters(url, persistency_connections=told or bound)
    over = threading.Event()
    watching = threading.Thread(target=watch, args=(url, over, totals))
    writing = children("write", named, jobs, rounds, seed)
    for child in writing:
        assert child.stdout is not None
        child.stdout.readline()
    watching.start()
    try:
        for child in writing:
            assert child.stdin is not None
            child.stdin.write("\n")
            child.stdin.flush()
        said = [ended(child, totals.findings) for child in writing]
    finally:
        over.set()
        watching.join()
    totals.jobs = sum(one.get("jobs", 0) for one in said)
    totals.ops = sum(one.get("ops", 0) for one in said)
    totals.write_seconds = round(max(one.get("seconds", 0.0) for one in said), 2)
    totals.ops_per_second = round(totals.ops / max(0.001, totals.write_seconds))
    if totals.connections > bound:
        totals.findings.append(f"a process had {totals.connections} connections, {bound} were allowed")
    if not totals.findings:
        looked = [ended(child, totals.findings) for child in children("check", named, jobs, rounds, seed)]
        totals.findings += [text for one in looked for text in one.get("wrong", [])]
        totals.reads = sum(one.get("reads", 0) for one in looked)
        totals.reads_per_second = round(totals.reads / max(one.get("seconds", 1.0) for one in looked))
    totals.seconds = round(monotonic() - begun, 1)


def watch(url: str, over: threading.Event, totals: Totals) -> None:
    """Ask the server now and then how many connections each process has."""
    counts = "SELECT application_name, count(*) FROM pg_stat_activity WHERE application_name LIKE 'crowd-%' GROUP BY 1"
    while not over.is_set():
        totals.connections = max([totals.connections, *(count for _, count in sql(url, counts))])
        over.wait(0.1)


def main(given: list[str] | None = None) -> int:
    """Run it; the exit code is 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of the server; without it one is started")
    parser.add_argument("--jobs", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--bound", type=int, default=CONNECTIONS_MAX)
    parser.add_argument("--step", choices=("write", "check"))
    parser.add_argument("--share", type=int, default=0)
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args(given)
    if arguments.step == "write":
        print(json.dumps(write(arguments.url, arguments.share, arguments.jobs, arguments.rounds, arguments.seed)))
        return 0
    if arguments.step == "check":
        print(json.dumps(check(arguments.url, arguments.share, arguments.jobs, arguments.rounds)))
        return 0
    totals = Totals()
    with ExitStack() as stack:
        url = arguments.url or stack.enter_context(Server()).url
        crowd(url, arguments.jobs, arguments.rounds, arguments.seed, totals, bound=arguments.bound)
    print(json.dumps(asdict(totals)), flush=True)
    return 1 if totals.findings else 0


# -- the long form ---------------------------------------------------------------------------------------------------


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """N jobs (1,000) from 4 processes with at most 32 connections each."""
    name = "postgres, many jobs"
    tell(name)
    totals = Totals()
    with Server() as server:
        crowd(server.url, given.cycles, 10, given.seed, totals)
    part = Part(name, wrong=list(totals.findings))
    part.cells = {
        "cycles": f"{totals.jobs:,} jobs",
        "in between": f"{totals.connections} connections each",
        "other": str(len(totals.findings)),
        "rows": f"{totals.ops:,}; {totals.ops_per_second:,} ops/s, {totals.reads_per_second:,} reads/s",
        "seconds": f"{totals.seconds:.1f}",
    }
    yield part


if __name__ == "__main__":
    sys.exit(main())
