"""Cases under pressure from Python itself: threads that spin, a thread that puts, the collector beside a long queue.

A thread that runs pure Python holds the interpreter until it is asked to let go of it, five milliseconds later; so what
gives the interpreter away and wants it back, be it for a moment, waits. The same holds for a thread that puts without
a pause, behind whose puts a read of the same store may have to stand as well.

Rules:
  1. Every thread that is started here is stopped and joined, whatever happens meanwhile; what it failed with is raised.
  2. Beside a producer the reads go on until it has put enough: a few fast reads would be over before it had its turn.
     There is a moment between two of them: of those back to back most are over while the producer waits.
  3. Of calls that may be slow a few are enough: after two seconds no further one is begun.
  4. How many threads spin, and who produces, is said by the way.

Doesn't know: contenders, targets.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from threading import Event, Thread
from time import perf_counter_ns, sleep
from typing import Any, TypeVar

from benchmarks.harness import Case, Sample, opened, percentiles, settled_garbage, timed
from benchmarks.protocol import AwaitedGet, Contender, Get, Pair, PutAll, Scan, Way
from benchmarks.verify import check_answers, check_stored
from benchmarks.workload import SCANNED, SCANNED_ROWS, Workload, picked
from persistency import key

T = TypeVar("T")

READS_SPINNING = 200_000  # as many as there is time for
SCANS_SPINNING = 10
SPINNING_NS_MAX = 2_000_000_000
THINK_SECONDS = 0.001  # between two reads beside a producer
READS_BESIDE = 500  # at the least; in a small run a part of its rows, for each read may take long
SMALL_RUN = 10
PRODUCED_ROWS = 400_000  # at the least, unless there are fewer rows than half of it: then all of them twice
AT_ONCE_ROWS = 8_192  # this engine's group: who takes many rows at once gets as many
QUEUED = 1_000_000
QUEUED_PER_ROW = 5  # so that a small run has a short queue
COLLECTIONS = 5


@contextmanager
def spinning(threads: int) -> Iterator[list[Thread]]:
    """Have so many threads run pure Python."""
    stopped: list[bool] = []

    def spin() -> None:
        n = 0
        while not stopped:
            n += 1

    spinners = [Thread(target=spin, name=f"spinner {at}") for at in range(threads)]
    try:
        for spinner in spinners:
            spinner.start()
        yield spinners
    finally:
        stopped.append(True)
        _join(spinners)


@dataclass(slots=True)
class Produced:
    """What a producer has put until now: so many rows. `error` is what ended it, if something did."""

    rows: int = 0
    error: BaseException | None = None


@contextmanager
def producing(put_all: PutAll, rows: Sequence[Pair]) -> Iterator[Produced]:
    """Have a thread put rows at full speed, over and over; it has put some when this begins.

    What the thread failed with is raised at the end, unless something else was raised before.
    """
    produced = Produced()
    parts = [rows[at : at + AT_ONCE_ROWS] for at in range(0, len(rows), AT_ONCE_ROWS)]
    begun, stopped = Event(), Event()

    def produce() -> None:
        try:
            for part in cycle(parts):
                put_all(part)
                produced.rows += len(part)
                begun.set()
                if stopped.is_set():
                    return
        except BaseException as error:  # a thread has nobody else to tell
            produced.error = error
        finally:
            begun.set()

    producer = Thread(target=produce, name="producer")
    try:
        producer.start()
        begun.wait()
        yield produced
    finally:
        stopped.set()
        _join([producer])
    if produced.error is not None:
        raise produced.error


def _join(threads: Sequence[Thread]) -> None:
    for thread in threads:
        if thread.ident is not None:  # it was started
            thread.join()


# -- beside threads that spin ------------------------------------------------------------------------------------------


def _put(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    rows = workload.for_contender(contender, workload.ordered)
    rows = rows[: workload.portion(way, workload.rows)]
    with opened(contender, directory) as (store, _runner):
        put_all = way.make(store)
        with spinning(way.spinning):
            _, us = timed(lambda: put_all(rows), len(rows))
    check_stored(contender, directory, rows)
    return Sample(len(rows), us)


def _timed_each(call: Callable[[bytes], T], wanted: Sequence[bytes]) -> tuple[list[T], list[int]]:
    """Make calls, as many as there is time for; return their answers, and the nanoseconds each one took."""
    answers: list[T] = []
    times: list[int] = []
    with settled_garbage():
        end = perf_counter_ns() + SPINNING_NS_MAX
        for one in wanted:
            begun = perf_counter_ns()
            if begun >= end and answers:
                break
            answer = call(one)
            times.append(perf_counter_ns() - begun)
            answers.append(answer)
    return answers, times


def _get(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    rows = workload.for_contender(contender, workload.ordered)
    reads = picked(rows, workload.portion(way, READS_SPINNING))
    with opened(contender, directory) as (store, _runner):
        store.fill(rows)
        get: Get = way.make(store)
        with spinning(way.spinning):
            answers, times = _timed_each(get, [wanted for wanted, _payload in reads])
    check_answers(contender.name, answers, (payload for _key, payload in reads[: len(answers)]))
    return Sample(len(times), fmean(times) / 1000, *percentiles(times))


def _scan(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    rows = workload.for_contender(contender, workload.ordered)
    wanted = workload.for_contender(contender, workload.scanned)
    prefix = SCANNED if contender.takes_keys else bytes(SCANNED)
    with opened(contender, directory) as (store, _runner):
        store.fill(rows)
        store.fill(wanted)
        scan: Scan = way.make(store)

        def read_all(prefix: bytes) -> list[Pair]:
            return [(found, payload) for found, payload in scan(prefix)]

        with spinning(way.spinning):
            answers, times = _timed_each(read_all, [prefix] * SCANS_SPINNING)
    for found in answers:
        check_answers(contender.name, found, wanted)
    p50, p99 = percentiles(times)
    return Sample(len(times), p50, p50, p99)


# -- beside a thread that puts -----------------------------------------------------------------------------------------


class _Reads:
    """Reads beside a producer: of these rows, each once at the least, and until so many rows have been put."""

    def __init__(self, rows: Sequence[Pair], produced: Produced, enough: int) -> None:
        self._rows = rows
        self._produced = produced
        self._enough = enough
        self.times: list[int] = []
        self.answers: list[bytes | None] = []

    def _wanted(self) -> Iterator[bytes]:
        for wanted, _payload in cycle(self._rows):
            if self._produced.error is not None:
                return
            if len(self.times) >= len(self._rows) and self._produced.rows >= self._enough:
                return
            yield wanted

    def each(self, get: Get) -> None:
        """Read until it is enough."""
        for wanted in self._wanted():
            sleep(THINK_SECONDS)
            begun = perf_counter_ns()
            answer = get(wanted)
            self.times.append(perf_counter_ns() - begun)
            self.answers.append(answer)

    async def await_each(self, get: AwaitedGet) -> None:
        """Do the same with reads that are awaited."""
        for wanted in self._wanted():
            await asyncio.sleep(THINK_SECONDS)
            begun = perf_counter_ns()
            answer = await get(wanted)
            self.times.append(perf_counter_ns() - begun)
            self.answers.append(answer)

    def expected(self) -> list[bytes]:
        """Return what the answers must be."""
        return [payload for _key, payload in islice(cycle(self._rows), len(self.answers))]


def _beside_puts(
    reading: Callable[[_Reads, Callable[..., Any], asyncio.Runner], None],
) -> Callable[[Contender, Way, Workload, Path], Sample]:
    def run(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
        # Every other row is there from the beginning, and they alone are read; all are put, with what is there already.
        rows = workload.for_contender(contender, workload.ordered)
        stored = rows[::2]
        few = picked(stored, workload.portion(way, min(READS_BESIDE, len(rows) // SMALL_RUN)))
        assert way.producer is not None
        with opened(contender, directory) as (store, runner):
            store.fill(stored)
            get, put_all = way.make(store), way.producer(store)
            with producing(put_all, rows) as produced, settled_garbage():
                reads = _Reads(few, produced, min(PRODUCED_ROWS, 2 * len(rows)))
                begun, before = perf_counter_ns(), produced.rows
                reading(reads, get, runner)
                pace = (produced.rows - before) / (perf_counter_ns() - begun) * 1e9
        check_answers(contender.name, reads.answers, reads.expected())
        check_stored(contender, directory, [*stored, *rows[: produced.rows]])
        p50, p99 = percentiles(reads.times)
        return Sample(len(reads.times), p99, p50, p99, per_second=pace)

    return run


# -- a long queue ------------------------------------------------------------------------------------------------------


def _queued(contender: Contender, payloads: Sequence[bytes]) -> Iterator[Pair]:
    """Give rows with a key each, made only now: the collector walks through a `Key`, and those belong to the queue."""
    for row in range(min(QUEUED, QUEUED_PER_ROW * len(payloads))):
        encoded = key("queued", row)
        yield encoded if contender.takes_keys else bytes(encoded), payloads[row % len(payloads)]


def _collect(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    payloads = [payload for _key, payload in workload.ordered]
    times = []
    with opened(contender, directory) as (store, _runner):
        queue = way.make(store)
        with settled_garbage(), queue(_queued(contender, payloads)):
            for _ in range(COLLECTIONS):
                begun = perf_counter_ns()
                gc.collect()
                times.append(perf_counter_ns() - begun)
    check_stored(contender, directory, list(_queued(contender, payloads)))
    p50, p99 = percentiles(times)
    return Sample(COLLECTIONS, p50, p50, p99)


CASES = (
    Case("put-spinning", "puts until committed, sorted keys, beside threads that spin", ("put-spinning",), _put),
    Case("get-spinning", "blocking get beside a thread that spins", ("get-spinning",), _get),
    Case(
        "scan-spinning",
        "scan_prefix of 10,000 rows beside a thread that spins",
        ("scan-spinning",),
        _scan,
        rows=SCANNED_ROWS,
    ),
    Case(
        "get-producer",
        "blocking get beside a thread that puts at full speed, p99",
        ("get-producer",),
        _beside_puts(lambda reads, get, _runner: reads.each(get)),
    ),
    Case(
        "aget-producer",
        "awaited get beside a thread that puts at full speed, p99",
        ("aget-producer",),
        _beside_puts(lambda reads, get, runner: runner.run(reads.await_each(get))),
    ),
    Case("collect", "one gc.collect() while a million puts are queued", ("queue",), _collect),
)
