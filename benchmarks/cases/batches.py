"""Cases that read many rows: a hundred keys a call, and a walk over all rows.

Rules:
  1. Every store holds the same rows, whoever reads them; every answer is compared with what it must be.
  2. A walk is measured by the row, and nothing of it is kept: so it may be as long as the store has rows.

Doesn't know: contenders, targets.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from statistics import median

from benchmarks.cases.reading import read_all
from benchmarks.harness import Case, Sample, opened, timed, timed_parts
from benchmarks.protocol import Contender, Pair, Way
from benchmarks.verify import check_answers
from benchmarks.workload import Workload

KEYS = 100  # a call
CALLS = 500
WALKS = 3
COMPARED = 8_192  # rows at a time


def _get_many(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    rows = workload.for_contender(contender, workload.ordered)
    calls = max(1, workload.portion(way, KEYS * CALLS) // KEYS)
    # In random order, and distinct: an answer has a key once.
    chosen = random.Random(4)
    reads = [chosen.sample(rows, min(KEYS, len(rows))) for _ in range(calls)]
    asked = [tuple(key for key, _payload in some) for some in reads]
    with opened(contender, directory) as (store, _runner):
        store.fill(rows)
        get_many = way.make(store)
        answers, us = timed_parts(lambda part: [get_many(keys) for keys in part], asked)
    check_answers(contender.name, answers, (dict(some) for some in reads))
    return Sample(calls, us)


def _iterate(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    rows = workload.for_contender(contender, workload.ordered)
    times = []
    with opened(contender, directory) as (store, _runner):
        store.fill(rows)
        iterate = way.make(store)
        for _ in range(WALKS):
            _, us = timed(lambda: read_all(iterate()), len(rows))
            times.append(us)
        _check_walk(contender.name, iterate(), rows)
    return Sample(len(rows), median(times))


def _check_walk(who: str, walked: Iterable[Pair], rows: Sequence[Pair]) -> None:
    walk = iter(walked)
    for at in range(0, len(rows), COMPARED):
        check_answers(who, islice(walk, COMPARED), rows[at : at + COMPARED])
    check_answers(who, islice(walk, 1), ())  # and nothing behind the last row


CASES = (
    Case("get-many", f"get of {KEYS} keys a call, idle job", ("get-many",), _get_many, rows=KEYS),
    Case("iterate", "a walk over all rows, every key and payload read", ("iterate",), _iterate),
)
