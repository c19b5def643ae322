"""Soak of the ordered log and of memoize: consumers killed again and again, and many processes that want one result.

A consumer is a process of its own that takes records and is killed by SIGKILL in the middle of that. Whatever it did in
the transaction of `commit_in` must have been done exactly once; what it wrote to a file of its own before `commit`, at
least once; and nothing may be skipped either way.

Of memoize: processes on one baton want the same results at the same time, and some are killed while they compute. Each
computation is a line of a file: one of each result, and no more than one again for each thread that was killed.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

from persistency import CBOR, Persistency
from persistency.recipes import Baton, OrderedLog
from tests.soak.part import Part, Tell

TOP = Path(__file__).parent.parent.parent
WAIT = 60.0

CONSUMER = """
import os, sys, time
from persistency import Persistency
from persistency.recipes import Baton, OrderedLog
from persistency.recipes.orderedlog_consumer import Loop

root, journal, how, last, plant = sys.argv[1:]
line = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

if plant == "before":  # a planted defect: a record counts as done before its body is

    def following(loop, really=Loop._following):
        record = yield from really(loop)
        yield loop._consumer._step(record.number)
        loop._given = None
        return record

    Loop._following = following


def effect(tx, consumer, number):
    tx.increment("effects", (number,))
    if plant != "beside":  # a planted defect: the position moves in a transaction of its own
        consumer.commit_in(tx, number)


def consume(runner):
    log = OrderedLog(runner)
    consumer = log.consumer("worker")
    if consumer.lag().result() == 0:
        pass
    elif how == "exactly":
        while True:
            number = consumer.next().number
            runner.run(effect, consumer, number).result()
            print(number, flush=True)
            if plant == "beside":
                consumer.commit(number).result()
            if number == int(last):
                break
    else:
        for number, value, _ in consumer:
            time.sleep(0.001)  # a body takes its time, and is what a kill falls into
            os.write(line, b"%d\\n" % number)
            print(number, flush=True)
            if number == int(last):
                consumer.commit(number).result()
                break
    print("done", flush=True)


with Persistency(root) as p:
    if how == "shared":
        with Baton(p, "work", poll=0.02) as baton:
            consume(baton)
    else:
        consume(p.open_job("work"))
"""


class Trial:
    """A log of records, and consumers of it that are killed one after the other."""

    def __init__(self, place: Path, how: str, records: int, seed: int, plant: str = "") -> None:
        self.place, self.how, self.records, self.plant = place, how, records, plant
        self.rng = random.Random(seed)
        self.kills = 0
        place.mkdir(parents=True, exist_ok=True)
        with Persistency(place / "root") as p, p.open_job("work") as job:
            log = OrderedLog(job)
            for first in range(1, records + 1, 1_000):
                log.append_many(range(first, min(first + 1_000, records + 1))).result()

    def start(self) -> subprocess.Popen[str]:
        """Start a consumer."""
        arguments = [self.place / "root", self.place / "journal", self.how, self.records, self.plant]
        return subprocess.Popen(
            [sys.executable, "-c", CONSUMER, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=TOP,
            env={**os.environ, "PYTHONPATH": str(TOP)},
        )

    def run(self, kills: int) -> None:
        """Kill so many consumers, each after some records more; then let one finish."""
        for nth in range(kills + 1):
            with self.start() as consumer:
                assert consumer.stdout is not None
                to_go = self.rng.randint(1, max(1, self.records // (kills + 1)))
                for line in consumer.stdout:
                    to_go -= 1
                    if line == "done\n":
                        return
                    if to_go == 0 and nth < kills:
                        consumer.kill()
                        self.kills += 1
                        break
            assert nth < kills, "a consumer ended before the last record"

    def wrong(self) -> list[str]:
        """Return what was lost, skipped or done twice."""
        every = range(1, self.records + 1)
        if self.how == "exactly":
            with Persistency(self.place / "root") as p, p.open_job("work") as job:
                done = {row.key.parts[0]: CBOR.decode(row.payload) for row in job.scan("effects").result()}
            wrong = [f"lost: record {number} had no effect" for number in every if number not in done]
            return wrong + [f"twice: record {number}: {count} effects" for number, count in done.items() if count != 1]
        done_at: dict[int, int] = {}
        for place, number in enumerate(map(int, (self.place / "journal").read_text().split())):
            done_at.setdefault(number, place)
        wrong = [f"lost: record {number} wasn't dealt with" for number in every if number not in done_at]
        in_order = sorted(done_at, key=done_at.__getitem__) == sorted(done_at)
        return wrong + ([] if in_order else ["order: a record was dealt with before an earlier one"])


def trial(place: Path, how: str, records: int, kills: int, seed: int, plant: str = "") -> tuple[list[str], int]:
    """Run a trial; return what was wrong, and how many were killed."""
    ran = Trial(place, how, records, seed, plant)
    ran.run(kills)
    return ran.wrong(), ran.kills


APPENDER = """
import sys, threading
from persistency import Persistency
from persistency.recipes import Baton, OrderedLog

root, name, threads, records = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

with Persistency(root) as p, Baton(p, "work") as baton:
    log = OrderedLog(baton)

    def append(nth):
        for value in range(records):
            log.append([f"{name}-{nth}", value]).result()

    threads = [threading.Thread(target=append, args=(nth,)) for nth in range(threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


def crowd(place: Path, processes: int, threads: int, records: int) -> list[str]:
    """Have threads of several processes append to one log by batons; return what is wrong with it."""
    program = [sys.executable, "-c", APPENDER, str(place)]
    environment = {**os.environ, "PYTHONPATH": str(TOP)}
    running = [
        subprocess.Popen([*program, str(nth), str(threads), str(records)], cwd=TOP, env=environment)
        for nth in range(processes)
    ]
    wrong = [f"process {nth} failed" for nth, process in enumerate(running) if process.wait(WAIT * 10) != 0]
    with Persistency(place) as p, Baton(p, "work") as baton:
        return wrong + holes(OrderedLog(baton), processes * threads, records)


def holes(log: OrderedLog[Any], appenders: int, records: int) -> list[str]:
    """Return what is wrong with a log to which each appender has appended `[its name, 0]`, `[its name, 1]`, ..."""
    wrong, last, values = [], 0, Counter[str]()
    while page := log.read(last, 1_000).result():
        for number, (name, value), _ in page:
            if number != last + 1:
                wrong.append(f"hole: {number} follows {last}")
            if value != values[name]:
                wrong.append(f"order: {name} has {value} where {values[name]} was due")
            values[name], last = value + 1, number
    if len(values) != appenders or set(values.values()) != {records}:
        wrong.append(f"lost: {len(values)} appenders of {appenders} have {dict(values)}")
    return wrong


MEMOIZER = """
import os, sys, threading, time
from persistency import Persistency
from persistency.recipes import Baton, memoize, memoize_flights

root, journal, plant = sys.argv[1:4]
results, threads, lease = int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6])
line = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

if plant == "alone":  # a planted defect: claims of other processes count for nothing

    def begin(tx, claim, ahead, waits, anew, really=memoize_flights.begin):
        return really(tx, claim, ahead, False, anew)

    memoize_flights.begin = begin

with Persistency(root) as p, Baton(p, "cache", poll=0.01) as baton:

    @memoize(baton, "slow", lease=lease)
    def slow(x):
        os.write(line, b"%d\\n" % x)
        time.sleep(0.02)
        return [x]

    found = []

    def call(tells):
        for x in range(results):
            if slow(x) != [x]:
                return
            if tells:
                print(x, flush=True)
        found.append(True)

    callers = [threading.Thread(target=call, args=(nth == 0,)) for nth in range(threads)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
sys.exit(len(found) != threads)
"""
THREADS = 2


def shared(
    place: Path, processes: int, results: int, kills: int, seed: int, lease: float, plant: str = ""
) -> tuple[list[str], int]:
    """Have processes ask for the same results, and kill some meanwhile; return what was wrong, and how many died."""
    place.mkdir(parents=True, exist_ok=True)
    arguments = [place / "root", place / "journal", plant, results, THREADS, lease]
    program = [sys.executable, "-c", MEMOIZER, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(TOP)}

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(program, stdout=subprocess.PIPE, text=True, cwd=TOP, env=environment)

    rng, killed, wrong = random.Random(seed), 0, []
    running = [start() for _ in range(processes)]
    for nth in range(kills):
        goal = (nth + rng.random()) * results / (kills + 1)
        with running.pop(0) as victim:
            assert victim.stdout is not None
            if any(int(number) >= goal for number in victim.stdout):
                victim.kill()
                killed += 1
        running.append(start())
    for process in running:
        with process:
            process.communicate(timeout=WAIT * 10)
        if process.returncode:
            wrong.append("failed: a process got a wrong result, or none")
    computed = Counter(map(int, (place / "journal").read_text().split()))
    wrong += [f"lost: result {number} was never computed" for number in range(results) if number not in computed]
    if computed.total() > results + killed * THREADS:
        wrong.append(f"twice: {computed.total()} computations of {results} results, {killed} processes killed")
    return wrong, killed


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Kill a consumer `cycles // 5` times in each way (200), append 16 * `cycles` records by 4 processes, and
    compute `cycles` results of which `cycles // 20` (50) processes are killed in the middle.
    """
    kills = max(1, given.cycles // 5)
    with tempfile.TemporaryDirectory(prefix="logs-") as name:
        place = Path(name)
        for plant, how, kind in (("beside", "exactly", "twice"), ("before", "at least", "lost")):
            part, begun = Part(f"log, planted defect: {plant}"), monotonic()
            tell(part.name)
            found, killed = trial(place / f"plant-{plant}", how, 200, 20, given.seed, plant)
            if not any(finding.startswith(kind) for finding in found):
                part.wrong.append(f"{part.name}: not reported")
            part.cells = {"cycles": str(killed), "other": "seen" if not part.wrong else "", "seconds": _since(begun)}
            yield part
        for how in ("exactly", "at least", "shared"):
            part, begun = Part(f"log, killed consumers, {how}"), monotonic()
            tell(part.name)
            part.wrong, killed = trial(place / how, how, 10 * kills, kills, given.seed)
            lost = sum(finding.startswith("lost") for finding in part.wrong)
            part.cells = {
                "cycles": f"{killed:,}",
                "lost": str(lost),
                "rows": f"{10 * kills:,}",
                "seconds": _since(begun),
            }
            yield part
        part, begun = Part("log, 16 appenders of 4 processes"), monotonic()
        tell(part.name)
        part.wrong = crowd(place / "crowd", 4, 4, given.cycles)
        lost = sum(finding.startswith("lost") for finding in part.wrong)
        gaps = sum(finding.startswith("hole") for finding in part.wrong)
        part.cells = {
            "lost": str(lost),
            "holes": str(gaps),
            "rows": f"{16 * given.cycles:,}",
            "seconds": _since(begun),
        }
        yield part
        yield from _soak_memoize(given, tell, place)


def _soak_memoize(given: argparse.Namespace, tell: Tell, place: Path) -> Iterator[Part]:
    part, begun = Part("memoize, planted defect: alone"), monotonic()
    tell(part.name)
    found, _ = shared(place / "plant-alone", 4, 20, 0, given.seed, 2.0, "alone")
    if not any(finding.startswith("twice") for finding in found):
        part.wrong.append(f"{part.name}: not reported")
    part.cells = {"other": "seen" if not part.wrong else "", "seconds": _since(begun)}
    yield part
    part, begun = Part("memoize, 4 processes, some killed"), monotonic()
    tell(part.name)
    kills = max(1, given.cycles // 20)
    part.wrong, killed = shared(place / "memoize", 4, given.cycles, kills, given.seed, 2.0)
    if killed < kills:
        part.wrong.append(f"{part.name}: only {killed} of {kills} were killed")
    lost = sum(finding.startswith("lost") for finding in part.wrong)
    part.cells = {
        "cycles": f"{killed:,}",
        "lost": str(lost),
        "rows": f"{given.cycles:,}",
        "seconds": _since(begun),
    }
    yield part


def _since(begun: float) -> str:
    return f"{monotonic() - begun:.1f}"
