"""A case under an event loop: how late a timer comes while the same loop puts at a steady pace.

A task posts so many rows a second, a few at a time; beside it another one sets a timer of a millisecond, over and over,
and notes by how much it comes too late. What the machine and asyncio do to such a timer by themselves is shown by the
same two tasks when nothing is put.

Rules:
  1. The pace is the loop's own time: what a late batch has missed is made up for, a bounded number of rows at a time.
  2. The 99th percentile stands for the case, and beside it the rows a second that were really handed over.

Doesn't know: contenders, targets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter_ns

from benchmarks.harness import Case, Sample, opened, percentiles, settled_garbage
from benchmarks.protocol import Contender, Pair, PostSome, Way
from benchmarks.verify import check_stored
from benchmarks.workload import Workload

ROWS_PER_SECOND = 50_000
TIMER_SECONDS = 0.001
TIMER_NS = 1_000_000
AT_ONCE_MAX = 500  # rows, what ten milliseconds have missed: more at once would be a lag of its own


async def _time(late_ns: list[int]) -> None:
    while True:
        begun = perf_counter_ns()
        await asyncio.sleep(TIMER_SECONDS)
        late_ns.append(perf_counter_ns() - begun - TIMER_NS)


async def _post_paced(post: PostSome, rows: Sequence[Pair]) -> int:
    """Post all rows in their time; return how many were taken."""
    loop = asyncio.get_running_loop()
    begun = loop.time()
    posted = taken = 0
    while posted < len(rows):
        await asyncio.sleep(TIMER_SECONDS)
        due = min(round((loop.time() - begun) * ROWS_PER_SECOND), posted + AT_ONCE_MAX)
        taken += await post(rows[posted:due])
        posted = min(due, len(rows))
    return taken


async def _measure(post: PostSome, rows: Sequence[Pair]) -> tuple[list[int], int, int]:
    """Return by how much the timers were late, how many rows were taken, and in what time; all times in nanoseconds."""
    late_ns: list[int] = []
    with settled_garbage():
        timing = asyncio.create_task(_time(late_ns))
        begun = perf_counter_ns()
        taken = await _post_paced(post, rows)
        took = perf_counter_ns() - begun
        while not late_ns:  # a run that is over before the first timer has come
            await asyncio.sleep(TIMER_SECONDS)
        timing.cancel()
        await asyncio.wait([timing])
    return late_ns, taken, took


def _lag(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    rows = workload.for_contender(contender, workload.ordered)
    rows = rows[: workload.portion(way, workload.rows)]
    with opened(contender, directory) as (store, runner):
        late_ns, taken, took = runner.run(_measure(way.make(store), rows))
    check_stored(contender, directory, rows if taken else [])
    p50, p99 = percentiles(late_ns)
    return Sample(len(late_ns), p99, p50, p99, per_second=taken / took * 1e9)


CASES = (Case("lag", "how late a timer of 1 ms comes beside 50,000 puts a second, p99", ("post",), _lag),)
