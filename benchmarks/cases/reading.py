"""Cases that read: point reads that block or are awaited, and a scan.

Rules:
  1. Every store holds the same rows, whoever reads them; every answer is compared with what it must be.
  2. A rate is measured without a clock between the calls; the percentiles come from a pass of their own.

Doesn't know: contenders, targets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from time import perf_counter_ns
from typing import Any

from benchmarks.harness import (
    Case,
    Measuring,
    Sample,
    awaited_in_turn,
    each_in_turn,
    opened,
    parts_in_turn,
    percentiles,
)
from benchmarks.protocol import AwaitedGet, Contender, Pair, Way
from benchmarks.verify import check_answers
from benchmarks.workload import SCANNED, SCANNED_ROWS, Workload, picked

READS = 50_000
READS_EACH = 10_000  # of those whose calls are timed one by one
TASKS = 64
SCANS = 10


def _get(contender: Contender, way: Way, workload: Workload, directory: Path) -> Measuring:
    rows = workload.for_contender(contender, workload.ordered)
    reads = picked(rows, workload.portion(way, READS))
    keys = [key for key, _payload in reads]
    with opened(contender, directory) as (store, _runner):
        store.fill(rows)
        get = way.make(store)
        # Once before: what was just written is still in the memory of some, and of others only what was read.
        for key in keys:
            get(key)
        answers, us = yield from parts_in_turn(lambda part: [get(key) for key in part], keys)
        check_answers(contender.name, answers, (payload for _key, payload in reads))
        times = yield from each_in_turn(get, keys[:READS_EACH])
    return Sample(len(keys), us, *percentiles(times))


async def _in_turn(get: AwaitedGet, keys: Sequence[bytes]) -> list[bytes | None]:
    return [await get(key) for key in keys]


async def _at_once(get: AwaitedGet, keys: Sequence[bytes]) -> list[bytes | None]:
    parts = await asyncio.gather(*(_in_turn(get, keys[task::TASKS]) for task in range(TASKS)))
    answers: list[bytes | None] = [None] * len(keys)
    for task, part in enumerate(parts):
        answers[task::TASKS] = part
    return answers


async def _each(get: AwaitedGet, keys: Sequence[bytes], times: list[int]) -> None:
    for key in keys:
        begun = perf_counter_ns()
        await get(key)
        times.append(perf_counter_ns() - begun)


async def _each_at_once(get: AwaitedGet, keys: Sequence[bytes], times: list[int]) -> None:
    await asyncio.gather(*(_each(get, keys[task::TASKS], times) for task in range(TASKS)))


def _awaited(
    reading: Callable[..., Awaitable[list[bytes | None]]], each: Callable[..., Coroutine[Any, Any, None]]
) -> Callable[[Contender, Way, Workload, Path], Measuring]:
    def run(contender: Contender, way: Way, workload: Workload, directory: Path) -> Measuring:
        rows = workload.for_contender(contender, workload.ordered)
        reads = picked(rows, workload.portion(way, READS))
        keys = [key for key, _payload in reads]
        times: list[int] = []
        with opened(contender, directory) as (store, runner):
            store.fill(rows)
            get = way.make(store)
            answers, us = yield from awaited_in_turn(runner, lambda part: reading(get, part), keys)
            yield
            runner.run(each(get, keys[:READS_EACH], times))
        check_answers(contender.name, answers, (payload for _key, payload in reads))
        return Sample(len(keys), us, *percentiles(times))

    return run


def _scan(contender: Contender, way: Way, workload: Workload, directory: Path) -> Measuring:
    rows = workload.for_contender(contender, workload.ordered)
    wanted = workload.for_contender(contender, workload.scanned)
    prefix = SCANNED if contender.takes_keys else bytes(SCANNED)
    with opened(contender, directory) as (store, _runner):
        store.fill(rows)
        store.fill(wanted)
        scan = way.make(store)
        times = yield from each_in_turn(lambda prefix: read_all(scan(prefix)), [prefix] * SCANS)
        found = list(scan(prefix))
    check_answers(contender.name, found, wanted)
    p50, p99 = percentiles(times)
    return Sample(SCANS, p50, p50, p99)


def read_all(rows: Iterable[Pair]) -> int:
    """Look at every key and payload; return how many bytes they have."""
    size = 0
    for key, payload in rows:
        size += len(key) + len(payload)
    return size


CASES = (
    Case("get", "blocking get, idle job", ("get",), _get, in_turn=True),
    Case("aget", "awaited get, in turn", ("aget",), _awaited(_in_turn, _each), in_turn=True),
    Case("aget-64", "awaited get, 64 tasks at once", ("aget",), _awaited(_at_once, _each_at_once), in_turn=True),
    Case(
        "scan",
        "scan_prefix of 10,000 rows, every key and payload read",
        ("scan",),
        _scan,
        rows=SCANNED_ROWS,
        in_turn=True,
    ),
)
