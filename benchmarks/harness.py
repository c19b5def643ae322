"""The harness: clocks, fresh directories, interleaved repetitions, ratios.

Rules:
  1. Repetitions are interleaved (A B C A B C ...), so that a slow minute of the machine hits all of them; where a case
     has parts, so are these, each a fraction of a second: a slow moment hits all, too. Ratios are made within one
     repetition only.
  2. Every measurement has a directory of its own, which is gone afterwards; where a store grows, all of one contender's
     in one repetition.
  3. Where many short calls are measured, the median of their parts stands for a repetition; where the work goes on
     behind the calls, as that of puts does, the whole does.
  4. A measurement that isn't done in turn with others is made again if the machine was slow at its beginning or end,
     and whoever asks has the patience.
  5. The garbage collector is treated the same for all: what was made ready is collected and frozen beforehand, then
     the collector stays on, as it does for users.

Doesn't know: what a case measures, who takes part.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import median
from time import perf_counter_ns
from typing import Any, cast

from benchmarks.pace import Pace
from benchmarks.protocol import Contender, Store, Way
from benchmarks.workload import Workload

PARTS = 10
TURNS = 40  # parts of what is done in turn: some milliseconds each


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement, in microseconds per operation; the percentiles where calls were timed one by one.

    `per_second` is the pace that was kept, where the case asks for one. `more` is what else was measured, by its name
    with the unit.
    """

    operations: int
    us: float
    p50_us: float | None = None
    p99_us: float | None = None
    per_second: float | None = None
    more: Mapping[str, float] = field(default_factory=dict)


# A measurement in parts: it makes ready, yields before each part, and returns what was measured.
Measuring = Generator[None, None, Sample]


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured: `run(contender, way, workload, directory)` gives a `Sample` of every way that does the task, or
    measures it in parts, which are done in turn with those of all others.

    `tasks` are tried in order: the first one a contender has ways for is measured. `left_out` says why the case can't
    run, or `None`. `rows` is how many an operation is about, if they are many. `one_directory`: all ways of a
    contender share a directory, each beginning with what the one before has left. `in_turn`: it is measured in parts.
    """

    name: str
    what: str
    tasks: tuple[str, ...]
    run: Callable[[Contender, Way, Workload, Path], Sample | Measuring]
    left_out: Callable[[], str | None] = lambda: None
    rows: int = 1
    one_directory: bool = False
    in_turn: bool = False

    def ways(self, contender: Contender) -> list[Way]:
        """Return the ways of a contender that this case measures."""
        for task in self.tasks:
            found = [way for way in contender.ways if way.task == task]
            if found:
                return found
        return []


@dataclass(slots=True)
class Series:
    """The samples of one way, one for each repetition."""

    case: str
    contender: str
    way: str
    samples: list[Sample] = field(default_factory=list)

    @property
    def us(self) -> float:
        """The median of microseconds per operation."""
        return median(sample.us for sample in self.samples)

    def middle(self, name: str) -> float | None:
        """Return the median of a percentile, or of the pace, if it was measured."""
        found = [value for value in (getattr(sample, name) for sample in self.samples) if value is not None]
        return median(found) if found else None

    def besides(self) -> dict[str, float]:
        """Return the medians of what else was measured, by name."""
        names = dict.fromkeys(name for sample in self.samples for name in sample.more)
        return {name: median(sample.more[name] for sample in self.samples if name in sample.more) for name in names}


def run_case(
    case: Case,
    contenders: Sequence[Contender],
    workload: Workload,
    repeat: int,
    *,
    parent: Path | None = None,
    step: Callable[[str], None] = lambda _doing: None,
    pace: Pace | None = None,
) -> list[Series]:
    """Measure a case with all contenders that can do it, `repeat` times in turn, each at the machine's own `pace`."""
    pace = pace or Pace()
    pairs = [(contender, way) for contender in contenders for way in case.ways(contender)]
    series = [Series(case.name, contender.name, way.label) for contender, way in pairs]
    groups = [_group(case, contender, at) for at, (contender, _way) in enumerate(pairs)]
    turns = list(zip(groups, pairs, series, strict=True))
    for _ in range(repeat):
        for _group_name, together in groupby(turns, key=itemgetter(0)):
            turn = list(together)
            measure = partial(_measure, case, [pair for _, pair, _ in turn], workload, parent, step)
            samples = pace.measured(measure, once=case.one_directory or case.in_turn)
            for (_, _, one), sample in zip(turn, samples, strict=True):
                one.samples.append(sample)
    return series


def _group(case: Case, contender: Contender, at: int) -> str:
    """Name what a way is measured together with: all others, those of its contender, or nothing."""
    if case.in_turn:
        return case.name
    return contender.name if case.one_directory else str(at)


def _measure(
    case: Case,
    pairs: Sequence[tuple[Contender, Way]],
    workload: Workload,
    parent: Path | None,
    step: Callable[[str], None],
    *,
    again: bool,
) -> list[Sample]:
    """Measure the ways of one group; `again`: that step was taken already."""
    with ExitStack() as stack:
        shared = stack.enter_context(_fresh(parent)) if case.one_directory else None
        found = []
        for contender, way in pairs:
            if not again:
                step(f"{case.name}: {contender.name}, {way.label}")
            found.append(case.run(contender, way, workload, shared or stack.enter_context(_fresh(parent))))
        return in_turn(found)


def in_turn(measurings: Sequence[Sample | Measuring]) -> list[Sample]:
    """Do what is measured in parts, the first of everybody, then the second, and so on; return all samples."""
    found = {at: one for at, one in enumerate(measurings) if isinstance(one, Sample)}
    going = {at: one for at, one in enumerate(measurings) if not isinstance(one, Sample)}

    def go_on() -> None:
        for at, measuring in list(going.items()):
            try:
                next(measuring)
            except StopIteration as ended:
                found[at] = ended.value
                del going[at]

    try:
        go_on()  # until all are ready
        with settled_garbage() if going else nullcontext():
            while going:
                go_on()
    finally:
        for measuring in going.values():
            measuring.close()
    return [found[at] for at in range(len(measurings))]


@contextmanager
def _fresh(parent: Path | None) -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="benchmark-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


@contextmanager
def opened(contender: Contender, directory: Path) -> Iterator[tuple[Store, asyncio.Runner]]:
    """Open a contender's store, with an event loop for those who await; close both."""
    assert contender.open_store is not None
    with asyncio.Runner() as runner:
        store = contender.open_store(directory, runner)
        try:
            yield store, runner
        finally:
            store.close()


@contextmanager
def settled_garbage() -> Iterator[None]:
    """Measure with the collector on, but nothing of what was made ready to walk through."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def timed(call: Callable[[], Any], operations: int) -> tuple[Any, float]:
    """Call once; return what it gave and the microseconds per operation."""
    with settled_garbage():
        begun = perf_counter_ns()
        result = call()
        took = perf_counter_ns() - begun
    return result, took / operations / 1000


def timed_parts(call: Callable[[Sequence[Any]], Sequence[Any]], items: Sequence[Any]) -> tuple[list[Any], float]:
    """Call with a tenth of the items at a time; return all answers, and the microseconds per item in the median part.

    So a moment in which the machine did something else doesn't count, whoever it hits.
    """
    measuring = parts_in_turn(call, items, PARTS)
    with settled_garbage():
        while True:
            try:
                next(measuring)
            except StopIteration as ended:
                return cast("tuple[list[Any], float]", ended.value)


def parts_in_turn(
    call: Callable[[Sequence[Any]], Sequence[Any]], items: Sequence[Any], count: int = TURNS
) -> Generator[None, None, tuple[list[Any], float]]:
    """Do what `timed_parts` does, and let others have their turn before each part."""
    answers: list[Any] = []
    times = []
    for part in parts(items, count):
        yield
        begun = perf_counter_ns()
        answers += call(part)
        times.append((perf_counter_ns() - begun) / len(part))
    return answers, median(times) / 1000


def awaited_in_turn(
    runner: asyncio.Runner, call: Callable[[Sequence[Any]], Awaitable[Sequence[Any]]], items: Sequence[Any]
) -> Generator[None, None, tuple[list[Any], float]]:
    """Do what `parts_in_turn` does with a call that is awaited."""
    answers: list[Any] = []
    times = []

    async def measure(part: Sequence[Any]) -> None:
        begun = perf_counter_ns()
        answers.extend(await call(part))
        times.append((perf_counter_ns() - begun) / len(part))

    for part in parts(items, TURNS):
        yield
        runner.run(measure(part))
    return answers, median(times) / 1000


def each_in_turn(call: Callable[[Any], Any], items: Sequence[Any]) -> Generator[None, None, list[int]]:
    """Call with one item at a time, in parts; return the nanoseconds of each call."""
    times = []
    for part in parts(items, TURNS):
        yield
        for item in part:
            begun = perf_counter_ns()
            call(item)
            times.append(perf_counter_ns() - begun)
    return times


def parts(items: Sequence[Any], count: int = PARTS) -> list[Sequence[Any]]:
    """Return the items in parts of nearly the same size."""
    size = max(1, -(-len(items) // count))
    return [items[at : at + size] for at in range(0, len(items), size)]


def percentiles(times_ns: Sequence[int]) -> tuple[float, float]:
    """Return the median and the 99th percentile in microseconds, without what the clock itself takes."""
    ordered = sorted(times_ns)
    clock = _clock_ns()
    last = len(ordered) - 1
    median, late = (max(1, ordered[round(part * last)] - clock) / 1000 for part in (0.5, 0.99))
    return median, late


def _clock_ns() -> int:
    pairs = []
    for _ in range(2_000):
        begun = perf_counter_ns()
        pairs.append(perf_counter_ns() - begun)
    return int(median(pairs))
