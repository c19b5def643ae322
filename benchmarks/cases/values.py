"""Cases with other values than the usual 100 bytes: payloads of 1 KiB, 64 KiB and 1 MiB, and objects.

Rules:
  1. A measurement writes 64 MiB at most, and a small run fewer: as many bytes as its rows would have with 1 KiB each.
  2. Answers are compared and let go of part by part: who reads large values doesn't keep them all.
  3. Objects go in and come out as objects; whose encoding is its own may use it, all others store CBOR.

Doesn't know: contenders, targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any

import cbor2

from benchmarks.cases.writing import put_rows
from benchmarks.harness import Case, Sample, opened, parts, percentiles, settled_garbage
from benchmarks.protocol import Contender, Object, Way
from benchmarks.verify import check_answers
from benchmarks.workload import Workload, picked
from persistency import Key, key

KIB = 1_024
SIZES = {"1 KiB": KIB, "64 KiB": 64 * KIB, "1 MiB": KIB * KIB}
BYTES_MAX = 64 * KIB * KIB
ROWS_MIN = 8
READS = 50_000
READS_EACH = 10_000  # of those whose calls are timed one by one
OBJECTS = 20_000
SECTIONS = ("admin", "devel", "libs", "net", "python", "text", "utils", "web")


def read_rows(
    contender: Contender,
    way: Way,
    stored: Sequence[tuple[bytes, Any]],
    reads: Sequence[tuple[bytes, Any]],
    directory: Path,
) -> Sample:
    """Fill a store, and read some of its rows from it, one after the other."""
    times = []
    each = []
    with opened(contender, directory) as (store, _runner):
        store.fill(stored)
        get = way.make(store)
        with settled_garbage():
            for part in parts(reads):
                keys = [key for key, _value in part]
                begun = perf_counter_ns()
                answers = [get(key) for key in keys]
                times.append((perf_counter_ns() - begun) / len(keys))
                check_answers(contender.name, answers, [value for _key, value in part])
                del answers
            for key, _value in reads[:READS_EACH]:
                begun = perf_counter_ns()
                get(key)
                each.append(perf_counter_ns() - begun)
    return Sample(len(reads), median(times) / 1000, *percentiles(each))


# -- payloads of one size ----------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def _of_size(rows: int, nbytes: int) -> Workload:
    return Workload(rows, nbytes)


def sized(workload: Workload, nbytes: int) -> Workload:
    """Return a workload of payloads of so many bytes; only the last one that was asked for is kept."""
    rows = min(workload.rows * KIB, BYTES_MAX) // nbytes
    return _of_size(max(ROWS_MIN, rows), nbytes)


def _put(nbytes: int) -> Callable[[Contender, Way, Workload, Path], Sample]:
    def run(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
        large = sized(workload, nbytes)
        rows = large.for_contender(contender, large.ordered)
        return put_rows(contender, way, rows[: large.portion(way, large.rows)], directory)

    return run


def _get(nbytes: int) -> Callable[[Contender, Way, Workload, Path], Sample]:
    def run(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
        large = sized(workload, nbytes)
        rows = large.for_contender(contender, large.ordered)
        return read_rows(contender, way, rows, picked(rows, large.portion(way, READS)), directory)

    return run


# -- objects -----------------------------------------------------------------------------------------------------------


def _package(row: int) -> tuple[Key, Object]:
    """Return a record as a package list has it, some 500 bytes of CBOR."""
    name = f"lib{SECTIONS[row % len(SECTIONS)]}-{row:06}"
    record = {
        "package": name,
        "section": SECTIONS[row // 7 % len(SECTIONS)],
        "version": f"{row % 9}.{row % 31}.{row % 101}-{row % 4}",
        "architecture": "amd64" if row % 3 else "all",
        "essential": row % 97 == 0,
        "installed_kib": 37 * row % 90_001,
        "popularity": row % 1_000 / 1_000,
        "homepage": None if row % 5 == 0 else f"https://example.org/{name}",
        "depends": [{"package": f"libbase{at}", "at_least": f"{at}.{row % 13}"} for at in range(row % 6)],
        "description": f"{name} for everybody who needs it. " * (2 + row % 8),
    }
    return key("packages", name), record


@cache
def packages(count: int) -> list[tuple[Key, Object]]:
    """Return records under their keys, in the order of the keys."""
    return sorted((_package(row) for row in range(count)), key=lambda record: record[0])


def _decoded(contender: Contender) -> Contender:
    """Return a contender whose stored objects are read back as objects."""
    read_back = contender.read_back
    if contender.takes_objects or read_back is None:
        return contender

    def decode(directory: Path, keys: Sequence[bytes]) -> tuple[int, list[Any]]:
        count, found = read_back(directory, keys)
        return count, [None if data is None else cbor2.loads(data) for data in found]

    return replace(contender, read_back=decode)


def _objects(contender: Contender, workload: Workload) -> list[tuple[bytes, Any]]:
    return workload.for_contender(contender, packages(min(OBJECTS, workload.rows)))  # type: ignore[arg-type]  # objects, which it hands on


def _put_objects(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    rows = _objects(contender, workload)
    return put_rows(_decoded(contender), way, rows[: workload.portion(way, len(rows))], directory)


def _get_objects(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    rows = _objects(contender, workload)
    stored = rows if contender.takes_objects else [(key, cbor2.dumps(value)) for key, value in rows]
    return read_rows(contender, way, stored, picked(rows, workload.portion(way, len(rows))), directory)


def _named(size: str) -> str:
    """Return a size as the name of a case has it."""
    number, unit = size.split()
    return f"{number}{unit[0].lower()}"


CASES = (
    *(
        Case(f"put-{_named(size)}", f"puts of {size} until committed, sorted keys", ("put",), _put(nbytes))
        for size, nbytes in SIZES.items()
    ),
    *(
        Case(f"get-{_named(size)}", f"blocking get of {size}, idle job", ("get",), _get(nbytes))
        for size, nbytes in SIZES.items()
    ),
    Case("put-object", "puts of objects until committed, sorted keys", ("put-object",), _put_objects),
    Case("get-object", "blocking get of an object, idle job", ("get-object",), _get_objects),
)
