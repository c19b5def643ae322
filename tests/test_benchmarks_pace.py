"""The machine's pace: what was measured while it was slow is measured again, for whoever has the patience, and told."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest

from benchmarks.harness import Case, Measuring, Sample, in_turn, run_case
from benchmarks.pace import Pace
from benchmarks.protocol import Contender, Way
from benchmarks.verify import Mismatch
from benchmarks.workload import Workload
from tests.test_benchmarks import run

QUICK, LATE = 100.0, 200.0  # what a look takes, in whatever unit


class Machine:
    """A machine whose pace is said beforehand, look by look; afterwards it is quick. Its time goes on by itself."""

    def __init__(self, looks: Iterable[float] = ()) -> None:
        self.looks = iter(looks)
        self.paused = 0.0
        self.seconds = 0.0

    def look(self) -> float:
        """Return the next pace."""
        return next(self.looks, QUICK)

    def clock(self) -> float:
        """Return a time that is a second later with every call."""
        self.seconds += 1.0
        return self.seconds

    def pause(self, seconds: float) -> None:
        """Note that somebody waits."""
        self.paused += seconds

    def pace(self, patience: float) -> Pace:
        """Return the pace of this machine; the first look is its own."""
        return Pace(patience, look=self.look, clock=self.clock, pause=self.pause)


def measure(pace: Pace, *, once: bool = False) -> list[bool]:
    """Have something measured; return for each time whether it was told that it is done again."""
    told: list[bool] = []

    def note(*, again: bool) -> int:
        told.append(again)
        return len(told)

    assert pace.measured(note, once=once) == len(told)  # the last time counts
    return told


@pytest.mark.parametrize(
    ("looks", "times"),
    [
        ([QUICK, QUICK, QUICK], 1),
        ([QUICK, QUICK, LATE, QUICK, QUICK], 2),
        ([QUICK, QUICK, LATE, QUICK, LATE], 3),
        ([QUICK, QUICK, QUICK * 1.19], 1),
        ([LATE, QUICK, LATE], 2),  # it is found out only then that it was slow at first
    ],
)
def test_what_ends_while_the_machine_is_slow_is_measured_again(looks: list[float], times: int) -> None:
    """As often as it takes; what counts in the end was measured at the machine's pace."""
    pace = Machine(looks).pace(60)
    assert measure(pace) == [at > 0 for at in range(times)]
    assert (pace.again, pace.slow) == (times - 1, 0)


def test_nothing_begins_while_the_machine_is_slow() -> None:
    """It is waited for, a while at a time."""
    machine = Machine([QUICK, LATE, LATE, LATE])
    pace = machine.pace(60)
    assert measure(pace) == [False]
    assert machine.paused == 1.5
    assert (pace.again, pace.slow) == (0, 0)


def test_patience_is_bounded_by_what_was_waited_and_thrown_away() -> None:
    """In all, and for each measurement; then it counts as it comes, and it is told that the machine was slow."""
    machine = Machine([QUICK, *[LATE] * 1000])
    pace = machine.pace(40)
    assert measure(pace) == [False]
    assert machine.paused == 2.0  # a twentieth
    for _ in range(19):
        assert measure(pace) == [False]
    assert machine.paused == 40.0
    assert measure(pace) == [False]
    assert machine.paused == 40.0
    assert pace.facts() == {
        "measurements": 21,
        "made while the machine was slow": 21,
        "made again": 0,
        "slowest pace": "2.00 x the best",
    }


def test_what_takes_longer_than_its_part_of_the_patience_is_done_once() -> None:
    """Else a long one that is unlucky would use up what many short ones could have had."""
    pace = Machine([QUICK, QUICK, LATE]).pace(19)
    assert measure(pace) == [False]
    assert (pace.again, pace.slow) == (0, 1)


def test_without_patience_nothing_is_waited_for_or_done_again() -> None:
    """As long as nobody asks for it all is measured once."""
    machine = Machine([QUICK, LATE, LATE])
    pace = machine.pace(0)
    assert measure(pace) == [False]
    assert (machine.paused, pace.again, pace.slow) == (0.0, 0, 1)


def test_what_can_not_be_done_again_counts_and_is_told() -> None:
    """Where the ways of a contender share what was stored before."""
    pace = Machine([QUICK, QUICK, LATE]).pace(60)
    assert measure(pace, once=True) == [False]
    assert (pace.again, pace.slow) == (0, 1)


def test_what_was_measured_before_the_best_was_known_is_told_of() -> None:
    """A run that begins while the machine is slow finds out later."""
    pace = Machine([LATE, LATE, LATE, QUICK, QUICK]).pace(60)
    measure(pace)
    assert pace.slow == 0
    measure(pace)
    assert pace.slow == 1


@pytest.mark.parametrize("shared", [False, True])
def test_a_case_counts_the_last_time_in_a_fresh_directory(tmp_path: Path, *, shared: bool) -> None:
    """Whoever it is that was slow: each is measured again by itself. And a step is a step, however often it is done."""
    found: list[tuple[str, bool]] = []
    steps: list[str] = []

    def measured(_contender: Contender, way: Way, _workload: Workload, directory: Path) -> Sample:
        found.append((way.label, any(directory.iterdir())))
        (directory / way.label).touch()
        return Sample(1, float(len(found)))

    def sleep(_store: object) -> None:
        raise AssertionError("nobody makes one")

    ways = tuple(Way("task", label, sleep) for label in ("a", "b"))
    case = Case("case", "a case", ("task",), measured, one_directory=shared)
    pace = Machine([QUICK, QUICK, LATE]).pace(60)
    series = run_case(
        case, [Contender("one", "", ways)], Workload(100), 1, parent=tmp_path, step=steps.append, pace=pace
    )
    assert steps == ["case: one, a", "case: one, b"]
    assert not list(tmp_path.iterdir())
    if shared:
        assert found == [("a", False), ("b", True)]
        assert [one.us for one in series] == [1.0, 2.0]
    else:
        assert found == [("a", False), ("a", False), ("b", False)]
        assert [one.us for one in series] == [2.0, 3.0]


def test_the_command_tells_of_the_machine_s_pace(tmp_path: Path) -> None:
    """With the figures and in the JSON; a wrong patience is told before anything is measured."""
    file = tmp_path / "report.json"
    arguments = ("--contender", "apsw", "--case", "key", "--rows", "100", "--repeat", "2", "--patience", "0.1")
    done = run(*arguments, "--json", str(file))
    assert done.returncode == 0, done.stderr
    machine = json.loads(file.read_text())["machine"]
    assert machine["measurements"] == 2
    assert 0 <= machine["made while the machine was slow"] <= 2
    assert "slowest pace" in done.stdout
    assert run("--patience", "-1").returncode == 2


def measuring(name: str, count: int, done: list[str]) -> Measuring:
    """Return what is measured in so many parts."""
    done.append(f"{name} is ready")
    try:
        for part in range(count):
            yield
            done.append(f"{name} {part}")
        return Sample(count, float(count))
    finally:
        done.append(f"{name} is over")


def test_parts_are_done_in_turn() -> None:
    """All are made ready first, and who has no part left is left out."""
    done: list[str] = []
    whole = Sample(7, 7.0)
    found = in_turn([measuring("a", 2, done), whole, measuring("b", 1, done), measuring("c", 0, done)])
    assert [one.us for one in found] == [2.0, 7.0, 1.0, 0.0]
    assert done == [
        "a is ready",
        "b is ready",
        "c is ready",
        "c is over",
        "a 0",
        "b 0",
        "b is over",
        "a 1",
        "a is over",
    ]


def test_what_goes_wrong_in_one_part_ends_all() -> None:
    """Every store is closed before it is told."""
    done: list[str] = []

    def wrong() -> Measuring:
        yield
        raise Mismatch("wrong")

    with pytest.raises(Mismatch):
        in_turn([measuring("a", 2, done), wrong(), measuring("b", 2, done)])
    assert done == ["a is ready", "b is ready", "a 0", "a is over", "b is over"]


def test_a_case_in_turn_has_a_fresh_directory_for_each_way(tmp_path: Path) -> None:
    """And each way its own sample in every repetition, in whatever order they end."""
    order: list[str] = []

    def measured(_contender: Contender, way: Way, _workload: Workload, directory: Path) -> Measuring:
        assert not list(directory.iterdir())
        (directory / way.label).touch()
        for _ in range(int(way.label)):
            yield
            order.append(way.label)
        return Sample(1, float(way.label))

    ways = tuple(Way("task", label, lambda _store: print) for label in ("3", "1", "2"))
    case = Case("case", "a case", ("task",), measured, in_turn=True)
    series = run_case(case, [Contender("one", "", ways)], Workload(100), 2, parent=tmp_path)
    assert [[sample.us for sample in one.samples] for one in series] == [[3.0] * 2, [1.0] * 2, [2.0] * 2]
    assert order == ["3", "1", "2", "3", "2", "3"] * 2
    assert not list(tmp_path.iterdir())
