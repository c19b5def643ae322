"""Kill a writer with SIGKILL, look at what it left, and again: `python -m tests.crash.kills --cycles N`.

Prints progress as one line of JSON now and then, and the totals as the last one. This process imports the package once,
opens nothing and stays single-threaded, so that a fork of it is a writer, or a reader, without the cost of a start.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

from persistency import Persistency, key
from tests.crash.ledger import (
    ANNOUNCED,
    ENDED,
    FLUSHED,
    OPENED,
    RECORD_BYTES,
    ROWS,
    STATE,
    STATE_KEY,
    Contents,
    Finding,
    Found,
    judge,
    read_record,
)
from tests.crash.plants import plant
from tests.crash.writers import WRITERS

HANG_SECONDS = 30.0
LIVES_MAX = 4  # kills that one job goes through, one after the other
FINDINGS_MAX = 20
PROGRESS_SECONDS = 0.5


@dataclass
class Totals:
    """What came of all the cycles."""

    cycles: int = 0
    between: int = 0  # kills that fell while more was posted than flushed
    cut: int = 0  # kills after which some of what was surely posted was not there
    ahead: int = 0  # kills after which more was there than had been acknowledged
    posted: int = 0  # rows, at least
    recovered: int = 0  # rows
    seconds: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)


class Said:
    """What a writer has said so far; `there` is how many rows it began with."""

    def __init__(self, pipe: int, there: int) -> None:
        self.announced = there
        self.posted = there  # at least
        self.flushed = there
        self.flushes = 0
        self.over = False
        self._pipe = pipe
        self._data = bytearray()
        os.set_blocking(pipe, False)

    def listen(self, seconds: float) -> bool:
        """Take in what comes within some time; return whether anything did."""
        if not select.select([self._pipe], [], [], seconds)[0]:
            return False
        data = os.read(self._pipe, 65536)
        self._data += data
        if not data:
            self.over = True
        at = 0
        while at + RECORD_BYTES <= len(self._data):
            self._hear(*read_record(self._data, at))
            at += RECORD_BYTES
        del self._data[:at]
        return bool(data)

    def _hear(self, kind: bytes, number: int) -> None:
        if kind == ANNOUNCED:
            self.posted = max(self.posted, self.announced)  # it only announces when the block before is posted
            self.announced = number
        elif kind in (FLUSHED, OPENED):
            self.announced = max(self.announced, number)
            self.posted = self.flushed = number
            self.flushes += kind == FLUSHED
        elif kind == ENDED:
            self.over = True


def fork(run: Callable[[int], None]) -> tuple[int, int]:
    """Run a function in a child process, with a pipe to write to; return its id and the pipe to read from."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    try:
        os.close(reading)
        run(writing)
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(70)


def kill_one(
    run: Callable[[int], None], rng: random.Random, there: int, *, after_flush: bool
) -> tuple[Said, list[Finding]]:
    """Run a writer, kill it at a random moment (after a flush or two, if asked), return what it had said."""
    child, pipe = fork(run)
    said = Said(pipe, there)
    flushes = rng.randint(1, 3) if after_flush else 0
    limit = monotonic() + HANG_SECONDS
    findings = []
    while said.flushes < flushes and not said.over and monotonic() < limit:
        said.listen(limit - monotonic())
    if said.flushes < flushes and not said.over:
        findings.append(Finding("hang", f"no flush was answered within {HANG_SECONDS} s"))
    until = monotonic() + rng.random() * (0.008 if after_flush else 0.03)
    while monotonic() < until and not said.over:
        said.listen(max(0.0, until - monotonic()))
    os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    while said.listen(0.0):
        pass
    os.close(pipe)
    if not os.WIFSIGNALED(status) or os.WTERMSIG(status) != signal.SIGKILL:
        findings.append(Finding("writer", f"the writer ended by itself, with status {status}"))
    return said, findings


def contents(root: Path, job_id: str) -> tuple[Contents, list[Finding]]:
    """Open a job again, as a service would, and return what it holds; then look at the closed file from outside."""
    with Persistency(root) as persistency, persistency.open_job(job_id) as job:
        through = [(row.key.parts[0], row.payload) for row in job.scan(ROWS).result()]
        state = job.entry(STATE, key(*STATE_KEY)).result()
        last_version = job.version().result()
        path = job.path
    assert path is not None
    findings = []
    connection = sqlite3.connect(path)
    try:
        verdict = connection.execute("PRAGMA integrity_check").fetchall()
        select_rows = "SELECT key, payload, version FROM kv WHERE category = ? ORDER BY key"
        raw = connection.execute(select_rows, (ROWS.encode(),)).fetchall()
        meta = dict(connection.execute("SELECT name, value FROM meta"))
    finally:
        connection.close()
    # Were there fewer in one than in the other, that is found below.
    both = zip(through, raw, strict=False)
    rows = [Found(number, payload, version) for (number, payload), (_key, _payload, version) in both]
    if verdict != [("ok",)]:
        findings.append(Finding("file", f"integrity_check says {verdict}"))
    if [(key(number), payload) for number, payload in through] != [(row[0], row[1]) for row in raw]:
        findings.append(Finding("file", "the file holds other rows than its job told"))
    if meta["last_version"] != last_version or meta["clean"] != 1:
        findings.append(Finding("file", f"after a close in order, with last version {last_version}, meta says {meta}"))
    return Contents(rows, None if state is None else (state.payload, state.version), last_version), findings


def look(root: Path, job_id: str, said: Said) -> tuple[int, list[Finding]]:
    """Have a fresh process judge what a killed writer left; return how many rows there are, and what is wrong."""

    def report(pipe: int) -> None:
        found, findings = contents(root, job_id)
        findings += judge(found, said.flushed, said.announced)
        with os.fdopen(pipe, "w") as stream:
            json.dump([len(found.rows), findings], stream)

    child, pipe = fork(report)
    data = bytearray()
    limit = monotonic() + HANG_SECONDS
    while select.select([pipe], [], [], max(0.0, limit - monotonic()))[0]:
        piece = os.read(pipe, 65536)
        if not piece:
            break
        data += piece
    else:
        os.kill(child, signal.SIGKILL)
    os.close(pipe)
    status = os.waitpid(child, 0)[1]
    if not data:
        return 0, [Finding("file", f"the job can't be opened again: the reader ended with status {status}")]
    count, findings = json.loads(data)
    return count, [Finding(*finding) for finding in findings]


class Loop:
    """All cycles of one run."""

    def __init__(self, root: Path, arguments: argparse.Namespace) -> None:
        self.totals = Totals()
        self._root = root
        self._arguments = arguments
        self._rng = random.Random(arguments.seed)
        self._job_id = ""
        self._lives = 0
        self._there = 0

    def cycle(self) -> None:
        """Kill one writer and judge what it left."""
        rng, totals, arguments = self._rng, self.totals, self._arguments
        if not self._lives:
            self._lives = rng.randint(1, LIVES_MAX)
            self._job_id = f"job-{totals.cycles}"
            self._there = 0
        self._lives -= 1
        seed = rng.getrandbits(32)

        def run(pipe: int) -> None:
            if arguments.plant:
                plant(arguments.plant)
            WRITERS[arguments.writer](self._root, self._job_id, arguments.durability, seed, pipe)

        said, findings = kill_one(run, rng, self._there, after_flush=arguments.writer == "stream")
        count, more = look(self._root, self._job_id, said)
        totals.posted += said.posted - self._there
        totals.recovered += count - self._there
        self._there = count
        self._count(said, count, findings + more)
        if findings or more or not self._lives:
            self._lives = 0
            for file in self._root.glob(f"{self._job_id}.*"):
                file.unlink()

    def _count(self, said: Said, recovered: int, findings: list[Finding]) -> None:
        totals = self.totals
        totals.between += said.flushed < said.posted
        totals.cut += recovered < said.posted
        totals.ahead += recovered > said.flushed
        for finding in findings:
            totals.kinds[finding.kind] = totals.kinds.get(finding.kind, 0) + 1
            if len(totals.findings) < FINDINGS_MAX:
                totals.findings.append(f"cycle {totals.cycles}, {self._job_id}: {finding.kind}: {finding.detail}")
        totals.cycles += 1


def main(given: list[str] | None = None) -> int:
    """Run the cycles; the exit code is 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, required=True)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time, if that comes first")
    parser.add_argument("--durability", choices=("process", "power"), default="process")
    parser.add_argument("--writer", choices=sorted(WRITERS), default="stream")
    parser.add_argument("--plant", default="", help="a defect to plant into every writer; stops at the first finding")
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args(given)
    begun = told = monotonic()
    with tempfile.TemporaryDirectory(prefix="kills-") as root:
        loop = Loop(Path(root), arguments)
        totals = loop.totals
        while totals.cycles < arguments.cycles and totals.seconds < arguments.seconds:
            loop.cycle()
            totals.seconds = round(monotonic() - begun, 3)
            if monotonic() - told > PROGRESS_SECONDS:
                told = monotonic()
                _print(asdict(totals))
            if arguments.plant and totals.kinds:
                break
    _print(asdict(totals))
    return 1 if totals.kinds else 0


def _print(totals: dict[str, Any]) -> None:
    print(json.dumps(totals), flush=True)


if __name__ == "__main__":
    sys.exit(main())
