"""Cases with many jobs: what it costs to open one among them, to have it open, to use more than may be live at once.

Rules:
  1. All jobs that a case opens stay open until it ends, so each one is opened among those before it.
  2. What an idle job holds of memory and descriptors is measured in a fresh process, by how much more it has with all
     of them open than with one; each of them was written to, or read from, and then left alone.
  3. Every job is looked at: what it holds at the end is read from its own file.

Doesn't know: contenders, targets.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import fmean
from time import perf_counter_ns

import apsw

from benchmarks.contenders import load
from benchmarks.contenders.tables import CATEGORY_BYTES, GET
from benchmarks.harness import Case, Sample, percentiles, settled_garbage
from benchmarks.process import allow_descriptors, call_apart, descriptors, resident_kib
from benchmarks.protocol import Contender, Job, Jobs, Way
from benchmarks.verify import Mismatch, check_answers
from benchmarks.workload import Workload
from persistency import key

JOBS = 200
JOBS_ROWS = 100  # a smaller run has one job for so many rows
JOBS_MIN = 10
DESCRIPTORS_EACH = 8  # allowed for, of any contender's
IDS_ROWS = 100  # a job for so many rows: 2,000 at 200,000 rows,
FULL_IDS_ROWS = 20  # and 10,000, which takes minutes to make
LIVE_MAX = 64
CALLS = 2_000
KEY = key("state")


def _key(contender: Contender) -> bytes:
    """Return the key of a job's one row, as a contender takes it."""
    return KEY if contender.takes_keys else bytes(KEY)


def _names(count: int) -> list[str]:
    return [f"job-{at:05}" for at in range(count)]


def _payload(name: str, call: int, size: int) -> bytes:
    # Longer than asked for where that is too short to tell one from the other.
    return f"{name}, {call}".encode().ljust(size, b".")


def _count(workload: Workload) -> int:
    return max(JOBS_MIN, min(JOBS, workload.rows // JOBS_ROWS))


def _open_new(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    names = _names(_count(workload))
    payloads = [_payload(name, 0, workload.payload_bytes) for name in names]
    with closing(way.make(None)(directory, None)) as jobs:
        found, times = _open_each(jobs, names)
        for job, payload in zip(found, payloads, strict=True):
            job.put(_key(contender), payload)
        _close(found)
    _check_files(contender.name, directory, dict(zip(names, payloads, strict=True)))
    return _sample(contender, way, workload, directory / "new", times, fresh=True)


def _open_existing(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    names = _names(_count(workload))
    payloads = [_payload(name, 0, workload.payload_bytes) for name in names]
    with closing(way.make(None)(directory, None)) as jobs:
        for name, payload in zip(names, payloads, strict=True):
            with closing(jobs.open(name)) as job:
                job.put(_key(contender), payload)
    _check_files(contender.name, directory, dict(zip(names, payloads, strict=True)))
    with closing(way.make(None)(directory, None)) as jobs:
        found, times = _open_each(jobs, names)
        answers = [job.get(_key(contender)) for job in found]
        _close(found)
    check_answers(contender.name, answers, payloads)
    return _sample(contender, way, workload, directory, times, fresh=False)


def _open_each(jobs: Jobs, names: Sequence[str]) -> tuple[list[Job], list[int]]:
    allow_descriptors(DESCRIPTORS_EACH * len(names))
    found, times = [], []
    with settled_garbage():
        for name in names:
            begun = perf_counter_ns()
            found.append(jobs.open(name))
            times.append(perf_counter_ns() - begun)
    return found, times


def _close(jobs: Sequence[Job]) -> None:
    for job in jobs:
        job.close()


def _sample(
    contender: Contender, way: Way, workload: Workload, directory: Path, times: Sequence[int], *, fresh: bool
) -> Sample:
    directory.mkdir(exist_ok=True)
    more = call_apart(weigh, contender.name, way.label, str(directory), len(times), workload.payload_bytes, fresh)
    p50, p99 = percentiles(times)
    return Sample(len(times), p50, p50, p99, more=more)


# -- in a process of its own -------------------------------------------------------------------------------------------


def weigh(who: str, label: str, directory: str, count: int, payload_bytes: int, fresh: bool) -> dict[str, float]:
    """Return what each of so many open jobs holds; `fresh`: they are made and written to, else they are read from."""
    allow_descriptors(DESCRIPTORS_EACH * (count + 1))
    contender = load(who)
    way = next(way for way in contender.ways if way.task == "open" and way.label == label)
    state = _key(contender)
    with closing(way.make(None)(Path(directory), None)) as jobs:
        found: list[Job] = [jobs.open("the-first")]
        found[0].put(state, b"")  # what is loaded with the first use belongs to no job
        found[0].get(state)
        before = _held()
        for name in _names(count):
            job = jobs.open(name)
            payload = _payload(name, 0, payload_bytes)
            if fresh:
                job.put(state, payload)
            elif job.get(state) != payload:
                raise Mismatch(f"{who}: another payload in {name}")
            found.append(job)
        after = _held()
        _close(found)
    return {name: (after[name] - before[name]) / count for name in before}


def _held() -> dict[str, float]:
    gc.collect()
    held = {"KiB a job": resident_kib(), "descriptors a job": descriptors()}
    return {name: value for name, value in held.items() if value is not None}


# -- more than may be live at once -------------------------------------------------------------------------------------


def _evict(ids_rows: int, contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    names = _names(max(JOBS_MIN, workload.rows // ids_rows))
    stored = {name: _payload(name, 0, workload.payload_bytes) for name in names}
    calls = random.Random(4).choices(names, k=workload.portion(way, CALLS))
    answers, expected, times = [], [], []
    state = _key(contender)
    allow_descriptors(DESCRIPTORS_EACH * LIVE_MAX)
    with closing(way.make(None)(directory, min(LIVE_MAX, len(names) // 2))) as jobs:
        found: dict[str, Job] = {}
        for name in names:
            found[name] = jobs.open(name)
            found[name].put(state, stored[name])
        with settled_garbage():
            for at, name in enumerate(calls, 1):
                expected.append(stored[name])
                payload = stored[name] = _payload(name, at, workload.payload_bytes)
                job = found[name]
                begun = perf_counter_ns()
                answer = job.get(state)
                job.put(state, payload)
                times.append(perf_counter_ns() - begun)
                answers.append(answer)
    check_answers(contender.name, answers, expected)
    _check_files(contender.name, directory, stored)
    return Sample(len(calls), fmean(times) / 1000, *percentiles(times))


def _check_files(who: str, directory: Path, stored: dict[str, bytes]) -> None:
    """Read each job's row from its file, which is closed."""
    found = []
    for name in stored:
        path = directory / f"{name}.db"
        if not path.exists():
            raise Mismatch(f"{who}: {name} has no file")
        with closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)) as connection:
            found.append(connection.execute(GET, (CATEGORY_BYTES, bytes(KEY))).get)
    check_answers(who, found, stored.values())


_few = partial(_evict, IDS_ROWS)
_many = partial(_evict, FULL_IDS_ROWS)

CASES = (
    Case("jobs-new", "opening a fresh job among 200 that are open, median", ("open",), _open_new),
    Case("jobs-open", "opening an existing job among 200 that are open, median", ("open",), _open_existing),
    Case("jobs-evict", "get and commit in one of 2,000 jobs at random, 64 of them live", ("evict",), _few),
)
FULL_CASES = (
    Case("jobs-evict-10k", "get and commit in one of 10,000 jobs at random, 64 of them live", ("evict",), _many),
)
