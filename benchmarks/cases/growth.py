"""A case that grows: the same puts and gets in a store of 100,000 rows, of a million, and of ten.

At each size rows with the next keys are put, then random ones of those that are there, then random ones are read. The
sizes say how many rows are there when this begins: so a put into ten million rows is held against the same put into a
hundred thousand. Every figure begins with a store that was just opened, its log empty: whatever there is to carry over
comes of the measured rows, which are as many at each size.

Rules:
  1. A contender has one directory, which grows; those take part that say how they open what is there, with the first
     way they have to put and every way to get.
  2. Rows are made in slices when they are needed, each from its number alone; nothing holds all of them.
  3. What lies between two sizes is added by a fresh process, whose memory at its peak is noted: that must not grow.
  4. What was put is read back after the store was closed, with the number of all rows; every get is looked at.

Doesn't know: contenders, targets.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.contenders import load
from benchmarks.harness import Case, Sample, opened, timed, timed_parts
from benchmarks.process import call_apart, peak_kib, resident_kib
from benchmarks.protocol import Contender, Pair, Way
from benchmarks.verify import SAMPLE_ROWS, Mismatch, check_answers
from benchmarks.workload import Workload
from persistency import key

SIZES = (100_000, 1_000_000, 10_000_000)
MEASURED_ROWS = 100_000
READS = 50_000
SLICE_ROWS = 10_000
KEYS = key("growth")
FIRST = 100_000_000  # so that all keys are equally long


@dataclass(frozen=True, slots=True)
class Step(Way):
    """A way at a size, which is the last of `sizes`; at each of them so many rows are put, and put again."""

    figure: str = ""
    sizes: tuple[int, ...] = ()
    measured: int = 0

    @property
    def rows(self) -> int:
        """How many rows are there before anything is measured at this size."""
        return self.sizes[-1]

    @property
    def rows_before(self) -> int:
        """How many rows are there when the size before is done with."""
        return self.sizes[-2] + self.measured if len(self.sizes) > 1 else 0


@dataclass(frozen=True, slots=True)
class Growth(Case):
    """The case: its ways are those of a contender at every size, in the order in which the store grows."""

    sizes: tuple[int, ...] = SIZES

    def ways(self, contender: Contender) -> list[Way]:
        """Return the ways of a contender at every size."""
        steps: list[Way] = []
        if any(way.task == "open" for way in contender.ways):
            for at, size in enumerate(self.sizes, 1):
                for figure in FIGURES:
                    for way in _ways(contender, figure):
                        label = f"{figure} ({way.label}), {written(size)} rows"
                        measured = min(MEASURED_ROWS, *self.sizes)
                        steps.append(
                            Step(way.task, label, way.make, way.share, 0, None, figure, self.sizes[:at], measured)
                        )
        return steps


def _ways(contender: Contender, figure: str) -> list[Way]:
    tasks, _run = FIGURES[figure]
    for task in tasks:
        found = [way for way in contender.ways if way.task == task]
        if found:
            return found if figure == "get" else found[:1]  # a second way to put would find the rows of the first
    return []


def written(count: int) -> str:
    """Return a number of rows as it is read."""
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        if count % size == 0:
            return f"{count // size}{unit}"
    return str(count)


# -- rows --------------------------------------------------------------------------------------------------------------


def _row(contender: Contender, number: int, puts: int, size: int) -> Pair:
    """Return a row by its number, as a contender takes it; `puts` is how often it was put before."""
    encoded = KEYS + (FIRST + number,)
    payload = ((number << 8 | puts).to_bytes(8, "big") * (size // 8 + 1))[: max(8, size)]
    return encoded if contender.takes_keys else bytes(encoded), payload


def _again(size: int, measured: int) -> list[int]:
    """Return the rows that are put once more at a size."""
    return random.Random(size).sample(range(size), measured)


def _last(contender: Contender, step: Step, numbers: Iterable[int], size: int) -> list[Pair]:
    """Return rows as they are when all puts of a step's size are done; that follows from the sizes alone."""
    put_again = [frozenset(_again(earlier, step.measured)) for earlier in step.sizes]
    return [_row(contender, number, sum(number in one for one in put_again), size) for number in numbers]


def fill(name: str, directory: str, first: int, stop: int, payload_bytes: int) -> float | None:
    """Have a contender add rows; return by how many MiB this process grew at most."""
    contender = load(name)
    before = resident_kib()
    with opened(contender, Path(directory)) as (store, _runner):
        for at in range(first, stop, SLICE_ROWS):
            numbers = range(at, min(at + SLICE_ROWS, stop))
            store.fill([_row(contender, number, 0, payload_bytes) for number in numbers])
    after = peak_kib()
    return None if before is None or after is None else (after - before) / 1024


# -- what is measured --------------------------------------------------------------------------------------------------


def _put_next(contender: Contender, step: Step, size: int, directory: Path) -> Sample:
    peak_mib = call_apart(fill, contender.name, str(directory), step.rows_before, step.rows, size)
    numbers = range(step.rows, step.rows + step.measured)
    us = _put(contender, step, [_row(contender, number, 0, size) for number in numbers], directory)
    more = {"rows": float(step.rows)} | ({} if peak_mib is None else {"peak MiB": peak_mib})
    return Sample(step.measured, us, more=more)


def _put_again(contender: Contender, step: Step, size: int, directory: Path) -> Sample:
    rows = _last(contender, step, _again(step.rows, step.measured), size)
    return Sample(len(rows), _put(contender, step, rows, directory), more={"rows": step.rows})


def _put(contender: Contender, step: Step, rows: Sequence[Pair], directory: Path) -> float:
    """Put rows until they are committed; return the microseconds of each."""
    with opened(contender, directory) as (store, _runner):
        put_all = step.make(store)
        _, us = timed(lambda: put_all(rows), len(rows))
    sample = rows if len(rows) <= SAMPLE_ROWS else [rows[0], rows[-1], *random.Random(7).sample(rows, SAMPLE_ROWS)]
    assert contender.read_back is not None
    count, found = contender.read_back(directory, [encoded for encoded, _payload in sample])
    if count != step.rows + step.measured:
        raise Mismatch(f"{contender.name}: {count} rows are stored, not {step.rows + step.measured}")
    check_answers(f"{contender.name}, read back", found, (payload for _encoded, payload in sample))
    return us


def _get(contender: Contender, step: Step, size: int, directory: Path) -> Sample:
    numbers = random.Random(step.rows).choices(range(step.rows + step.measured), k=min(READS, step.measured))
    rows = _last(contender, step, numbers, size)
    with opened(contender, directory) as (store, _runner):
        get = step.make(store)
        answers, us = timed_parts(lambda part: [get(encoded) for encoded in part], [encoded for encoded, _ in rows])
    check_answers(contender.name, answers, (payload for _encoded, payload in rows))
    return Sample(len(rows), us, more={"rows": step.rows})


def _run(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    assert isinstance(way, Step)
    _tasks, run = FIGURES[way.figure]
    return run(contender, way, workload.payload_bytes, directory)


# The figures in the order in which they are measured, with the tasks that are tried for each.
FIGURES: dict[str, tuple[tuple[str, ...], Callable[[Contender, Step, int, Path], Sample]]] = {
    "sorted put": (("put",), _put_next),
    "random put": (("put-random", "put"), _put_again),
    "get": (("get",), _get),
}


def growth(sizes: tuple[int, ...] = SIZES) -> Growth:
    """Return the case with these sizes, which must be further apart than the smallest of them."""
    return Growth("growth", "puts and gets in a store that grows", ("open",), _run, one_directory=True, sizes=sizes)


CASES = (growth(),)
