"""A server that is restarted, and replaced by its copy, under load: `python -m tests.soak.postgres_restarts`.

A service posts rows, commits batches and reads, with durability `power`, in a process of its own. Beside it the server
is shut down as a crash would, and started again, so many times; then it is shut down for good, and its copy promoted,
which the service's URL names as the second host. Every row says which version it must have: one that was lost, or
written twice, shows. Nobody may be kept waiting for longer than the server was away and a while.

With `--held` the copy is held just before a shutdown, until a commit waits for it: that one is on the server's medium,
and nobody was told. Else it is chance whether a shutdown meets a commit between the two.

It prints the totals as the last line, one object of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any

from persistency import Job, Persistency, PersistencyError, StorageError
from tests.crash.kills import Said
from tests.crash.ledger import ENDED, FLUSHED, ROWS, judge
from tests.crash.running import PROJECT, command
from tests.crash.writers import Writer
from tests.postgres import Server, until, url_of
from tests.soak.part import Part, Tell
from tests.soak.postgres_kills import HANG_SECONDS, contents_of
from tests.soak.postgres_plants import RESTART_PLANTS

PATIENCE = 120.0  # seconds that a server may be away
FLUSHES_BETWEEN = 20
HELD_SECONDS = 2.0
COUNTER = "counter", ("n",)
COUNTING = threading.Lock()


@dataclass
class Totals:
    """What came of it."""

    restarts: int = 0
    failovers: int = 0
    rows: int = 0
    acknowledged: int = 0
    reads: int = 0
    counted: int = 0  # increments that were acknowledged
    reads_failed: int = 0  # those that were under way, or asked for, while the server was away
    away_ms_max: int = 0  # the longest that nothing was acknowledged
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)


# -- the service ---------------------------------------------------------------------------------------------------


def serve(url: str, seed: int, plant: str) -> None:
    """Write and read until stdin ends; say how far it is on stdout, and at the end what is there, as JSON."""
    if plant:
        RESTART_PLANTS[plant]()
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    rng = random.Random(seed)
    wrong: list[str] = []
    numbers = {"reads": 0, "failed": 0, "counted": 0}
    with Persistency(url, open_timeout=HANG_SECONDS) as persistency:
        job = persistency.open_job("job", durability="power", stall_timeout=PATIENCE)
        counter = persistency.open_job("counter", durability="power", stall_timeout=PATIENCE)
        beside = [threading.Thread(target=read, args=(job, over, numbers, wrong))]
        beside += [threading.Thread(target=count, args=(counter, over, numbers, wrong)) for _ in range(2)]
        for thread in beside:
            thread.start()
        writer = Writer(job, sys.stdout.fileno(), rng)
        try:
            while not over.is_set() and not wrong:
                for _ in range(rng.randint(1, 10)):
                    writer.post_block()
                job.flush(sync=rng.random() < 0.05).result(PATIENCE)
                writer.tell(FLUSHED)
        except (PersistencyError, TimeoutError) as error:
            wrong.append(f"a write wasn't waited out: {error!r}")
        over.set()
        for thread in beside:
            thread.join(PATIENCE)
            if thread.is_alive():
                wrong.append("a caller hangs")
        writer.tell(ENDED)
        with suppress(PersistencyError, TimeoutError):
            value = counter.increment(*COUNTER, 0).result(PATIENCE)
            if value != numbers["counted"]:
                wrong.append(f"{numbers['counted']} times 1 was added and acknowledged, and the sum is {value}")
        with suppress(PersistencyError, TimeoutError):
            found = contents_of(job)
            wrong += [f"{finding.kind}: {finding.detail}" for finding in judge(found, writer.number, writer.number)]
            numbers["rows"] = len(found.rows)
        told = job.statistics()
        if told.accepted != told.committed + told.failed + told.pending or told.failed:
            wrong.append(f"accepted {told.accepted}, committed {told.committed}, failed {told.failed}")
    print(json.dumps([wrong, numbers]), file=sys.stderr)


def read(job: Job, over: threading.Event, numbers: dict[str, int], wrong: list[str]) -> None:
    """Read what was written, again and again: a read answers or fails, and never hangs."""
    while not over.is_set():
        try:
            last = job.count(ROWS).result(PATIENCE) - 1
            if last >= 0 and job.get(ROWS, (last,)).result(PATIENCE) is None:
                wrong.append(f"row {last} was counted, and isn't there")
            numbers["reads"] += 1
        except StorageError:
            numbers["failed"] += 1
            over.wait(0.02)
        except (PersistencyError, TimeoutError) as error:
            wrong.append(f"a read wasn't answered: {error!r}")
            return


def count(job: Job, over: threading.Event, numbers: dict[str, int], wrong: list[str]) -> None:
    """Add 1, again and again: what is acknowledged was done, and once."""
    while not over.is_set():
        try:
            job.increment(*COUNTER).result(PATIENCE)
        except (PersistencyError, TimeoutError) as error:
            wrong.append(f"an increment wasn't waited out: {error!r}")
            return
        with COUNTING:
            numbers["counted"] += 1


# -- what happens to its server ------------------------------------------------------------------------------------


class Watch:
    """The service's process, and what it says."""

    def __init__(self, url: str, seed: int, plant: str, totals: Totals) -> None:
        self.totals = totals
        arguments = ["--serve", url, "--seed", str(seed), *(["--plant", plant] if plant else [])]
        self._child = subprocess.Popen(
            command("tests.soak.postgres_restarts", *arguments),
            cwd=PROJECT,
            env={**os.environ, "PYTHONPATH": str(PROJECT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._child.stdout is not None
        self._said = Said(self._child.stdout.fileno(), 0)
        self._last = monotonic()

    def see(self, flushes: int) -> bool:
        """Wait until so many more flushes were acknowledged; return whether they were, before that is a hang."""
        wanted = self._said.flushes + flushes
        while self._said.flushes < wanted:
            before, limit = self._said.flushes, self._last + PATIENCE
            if self._said.over or not self._said.listen(max(0.0, limit - monotonic())):
                self.totals.findings.append(f"nothing was acknowledged any more after {self._said.flushed} rows")
                return False
            if self._said.flushes > before:
                now = monotonic()
                self.totals.away_ms_max = max(self.totals.away_ms_max, round(1000 * (now - self._last)))
                self._last = now
        return True

    def end(self) -> None:
        """End the service in order, and take in what it says at its end."""
        stop = threading.Timer(2 * PATIENCE, self._child.kill)
        stop.start()
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        assert self._child.stderr is not None
        self._child.stdin.close()
        listening = threading.Thread(target=self._drain)
        listening.start()
        told = self._child.stderr.read().decode()
        listening.join()
        self._child.wait()
        stop.cancel()
        self._child.stdout.close()
        self._child.stderr.close()
        try:
            wrong, numbers = json.loads(told.splitlines()[-1])
        except (IndexError, ValueError):
            self.totals.findings.append(f"the service ended with {self._child.returncode}: {told[-2000:]}")
            return
        totals = self.totals
        totals.findings += wrong
        totals.rows, totals.reads, totals.reads_failed = numbers.get("rows", -1), numbers["reads"], numbers["failed"]
        totals.acknowledged, totals.counted = self._said.flushed, numbers["counted"]
        if totals.rows < totals.acknowledged:
            totals.findings.append(f"{totals.acknowledged} rows were acknowledged, {totals.rows} are there")

    def _drain(self) -> None:
        while self._said.listen(2 * PATIENCE):
            pass


@contextmanager
def held(server: Server, copy: Server) -> Iterator[None]:
    """Hold what receives a server's log for its copy, and wait until a commit waits for that, if one ever does."""
    receiving = copy.sql("SELECT pid FROM pg_stat_activity WHERE backend_type = 'walreceiver'")
    for (pid,) in receiving:
        os.kill(pid, signal.SIGSTOP)
    try:
        waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep' LIMIT 1"
        with suppress(TimeoutError):  # an engine that doesn't sync waits for nobody
            until(lambda: server.sql(waiting), "a commit waits for the copy", seconds=HELD_SECONDS)
        yield
    finally:
        for (pid,) in receiving:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def ordeal(totals: Totals, arguments: argparse.Namespace, told: Callable[[Totals], None]) -> None:
    """Restart a server under load, and replace it by its copy."""
    begun = monotonic()
    with Server() as server, server.standby() as copy:
        watch = Watch(url_of(server, copy, persistency_lease=5), arguments.seed, arguments.plant, totals)
        try:
            while totals.restarts < arguments.restarts and not totals.findings and watch.see(FLUSHES_BETWEEN):
                with held(server, copy) if arguments.held else nullcontext():
                    server.restart(immediate=True)
                totals.restarts += 1
                totals.seconds = round(monotonic() - begun, 1)
                told(totals)
            if arguments.failovers and not totals.findings and watch.see(FLUSHES_BETWEEN):
                server.stop(immediate=True)
                copy.promote()
                totals.failovers += 1
                watch.see(FLUSHES_BETWEEN)
        finally:
            watch.end()
    totals.seconds = round(monotonic() - begun, 1)


def main(given: list[str] | None = None) -> int:
    """Run it; the exit code is 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", metavar="URL", help="be the service")
    parser.add_argument("--restarts", type=int, default=20)
    parser.add_argument("--failovers", type=int, choices=(0, 1), default=1)
    parser.add_argument("--held", action="store_true", help="shut down when a commit waits for the copy")
    parser.add_argument("--plant", default="")
    parser.add_argument("--seed", type=int, required=True)
    arguments = parser.parse_args(given)
    if arguments.serve:
        serve(arguments.serve, arguments.seed, arguments.plant)
        return 0
    totals = Totals()
    ordeal(totals, arguments, lambda so_far: print(json.dumps(asdict(so_far)), flush=True))
    print(json.dumps(asdict(totals)), flush=True)
    return 1 if totals.findings else 0


# -- the long form -------------------------------------------------------------------------------------------------


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Restart the server N // 50 times (20), and replace it once."""
    yield part_of("postgres, restarted and failed over", max(1, given.cycles // 50), given, tell)


def part_of(name: str, restarts: int, given: argparse.Namespace, tell: Tell) -> Part:
    """Run it in a process of its own, passing its progress on."""
    totals: dict[str, Any] = {}
    arguments = ["--restarts", str(restarts), "--seed", str(given.seed)]
    with subprocess.Popen(
        command("tests.soak.postgres_restarts", *arguments), cwd=PROJECT, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            totals = json.loads(line)
            tell(f"{name}: {totals['restarts']} of {restarts}")
    if not totals:
        return Part(name, wrong=[f"{name}: it ended with return code {child.returncode}"])
    part = Part(name, wrong=list(totals["findings"]))
    part.cells = {
        "cycles": f"{totals['restarts']} + {totals['failovers']}",
        "in between": f"{totals['away_ms_max']:,} ms away at most",
        "other": str(len(totals["findings"])),
        "rows": f"{totals['rows']:,}; {totals['counted']:,} counted, {totals['reads']:,} reads",
        "seconds": f"{totals['seconds']:.1f}",
    }
    return part


if __name__ == "__main__":
    sys.exit(main())
