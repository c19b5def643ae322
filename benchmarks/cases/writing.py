"""Cases that write: puts until they are committed, the producer's side of a put, commits of one row.

Rules:
  1. Every store begins empty, and what is in it at the end is read back after it was closed.

Doesn't know: contenders, targets.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path
from statistics import fmean
from time import perf_counter_ns

from benchmarks.harness import (
    Case,
    Measuring,
    Sample,
    each_in_turn,
    opened,
    percentiles,
    settled_garbage,
    timed,
)
from benchmarks.protocol import AwaitedPut, Contender, Pair, PutOne, Way
from benchmarks.verify import check_stored
from benchmarks.workload import Workload

COMMITS = 4_000
PASSES = 3


def put_rows(contender: Contender, way: Way, rows: Sequence[Pair], directory: Path) -> Sample:
    """Put all rows; over when the last one is committed."""
    with opened(contender, directory) as (store, _runner):
        put_all = way.make(store)
        _, us = timed(lambda: put_all(rows), len(rows))
    check_stored(contender, directory, rows)
    return Sample(len(rows), us)


def _put_ordered(contender: Contender, way: Way, workload: Workload, directory: Path) -> Measuring:
    rows = workload.for_contender(contender, workload.ordered)[: workload.portion(way, workload.rows)]
    return _passes(lambda place: put_rows(contender, way, rows, place), directory)


def _put_shuffled(contender: Contender, way: Way, workload: Workload, directory: Path) -> Measuring:
    rows = workload.for_contender(contender, workload.shuffled)[: workload.portion(way, workload.rows)]
    return _passes(lambda place: put_rows(contender, way, rows, place), directory)


def _passes(measure: Callable[[Path], Sample], directory: Path) -> Measuring:
    """Measure as often, in an empty directory each time; the pass in the middle stands for them.

    Where a store works on behind the calls a part won't do: what it does while others have their turn would be free, or
    what falls due then would be counted to a few calls.
    """
    samples = []
    for number in range(PASSES):
        place = directory / str(number)
        place.mkdir()
        yield
        samples.append(measure(place))
        shutil.rmtree(place)
    return sorted(samples, key=attrgetter("us"))[PASSES // 2]


def _call_each(put: PutOne, rows: Sequence[Pair]) -> list[int]:
    times = []
    with settled_garbage():
        for key, payload in rows:
            begun = perf_counter_ns()
            put(key, payload)
            times.append(perf_counter_ns() - begun)
    return times


async def _await_each(put: AwaitedPut, rows: Sequence[Pair]) -> list[int]:
    times = []
    with settled_garbage():
        for key, payload in rows:
            begun = perf_counter_ns()
            await put(key, payload)
            times.append(perf_counter_ns() - begun)
    return times


def _produce(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    # The median stands for the case: a producer at full speed now and then waits for room, which the mean would show.
    rows = workload.for_contender(contender, workload.ordered)
    with opened(contender, directory) as (store, _runner):
        p50, p99 = percentiles(_call_each(way.make(store), rows))
    check_stored(contender, directory, rows)
    return Sample(len(rows), p50, p50, p99)


def _commit(contender: Contender, way: Way, workload: Workload, directory: Path) -> Measuring:
    rows = workload.for_contender(contender, workload.ordered)[: workload.portion(way, COMMITS)]
    with opened(contender, directory) as (store, _runner):
        put = way.make(store)
        times = yield from each_in_turn(lambda row: put(*row), rows)
    check_stored(contender, directory, rows)
    return Sample(len(rows), fmean(times) / 1000, *percentiles(times))


def _acommit(contender: Contender, way: Way, workload: Workload, directory: Path) -> Measuring:
    rows = workload.for_contender(contender, workload.ordered)[: workload.portion(way, COMMITS)]

    def measure(place: Path) -> Sample:
        with opened(contender, place) as (store, runner):
            times = runner.run(_await_each(way.make(store), rows))
        check_stored(contender, place, rows)
        return Sample(len(rows), fmean(times) / 1000, *percentiles(times))

    return _passes(measure, directory)


CASES = (
    Case("put", "puts until committed, sorted keys", ("put",), _put_ordered, in_turn=True),
    Case("put-random", "puts until committed, random keys", ("put-random", "put"), _put_shuffled, in_turn=True),
    Case("put-kept", "puts until committed, with a ttl, a quota, a feed", ("put-kept",), _put_ordered, in_turn=True),
    Case("put-durable", "puts until committed, each level of durability", ("put-durable",), _put_ordered, in_turn=True),
    Case("produce", "the producer's side of a put, median", ("produce",), _produce),
    Case("commit", "blocking commit of one put", ("commit",), _commit, in_turn=True),
    Case(
        "commit-durable",
        "blocking commit of one put, each level of durability",
        ("commit-durable",),
        _commit,
        in_turn=True,
    ),
    Case("acommit", "awaited commit of one put", ("acommit",), _acommit, in_turn=True),
)
