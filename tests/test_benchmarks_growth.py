"""The benchmarks that start, open many jobs and grow: what they measure is looked at, and a wrong result ends them."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks.__main__ import _cases
from benchmarks.cases import CASES, FULL_CASES, growth, jobs, starting
from benchmarks.contenders import load
from benchmarks.contenders.files import LimitedFiles
from benchmarks.harness import Case, Sample, Series, opened, run_case
from benchmarks.process import (
    allow_descriptors,
    call_apart,
    descriptors,
    peak_kib,
    resident_kib,
    run_program,
)
from benchmarks.protocol import Contender, Job, Pair, Way
from benchmarks.report import as_json, figures_table, from_json
from benchmarks.verify import Mismatch
from benchmarks.workload import Workload
from persistency import Persistency
from tests.garbage import heap_left_alone
from tests.test_benchmarks import crippled, elsewhere, run

__all__ = ["heap_left_alone"]  # a fixture, for every test here

WORKLOAD = Workload(rows=200, payload_bytes=10)
SIZES = (1_000, 3_000)
BOTH = ("persistency", "apsw")
CONTENDERS = [load(name) for name in BOTH]
PROC = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system has no /proc")


# -- start-up ----------------------------------------------------------------------------------------------------------


def test_an_import_is_that_of_a_fresh_interpreter(tmp_path: Path) -> None:
    """Only this engine's import is measured, and it takes more than that of a module which does nothing."""
    (found,) = run_case(CASES["import"], CONTENDERS, WORKLOAD, 1, parent=tmp_path)
    assert found.contender == "persistency"
    assert found.samples[0].operations == starting.INTERPRETERS_MIN
    assert found.us > 100


@pytest.mark.parametrize("name", ["json", "apsw", "sys"])
def test_an_import_of_something_else_is_seen(name: str, tmp_path: Path) -> None:
    """A module that is another one, or that was imported before the clock ran, is a mismatch."""
    wrong = crippled("import", lambda _import: lambda: name)
    with pytest.raises(Mismatch, match=r"what was imported is .*, not .*persistency"):
        run_case(CASES["import"], [wrong], WORKLOAD, 1, parent=tmp_path)


def test_nothing_is_imported_before_the_clock_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the measured import begins, apsw and cbor2 are there with what they need, and nothing more."""
    looking = "import sys\nnames = sorted(sys.modules)\nprint(*names)\n"
    (tmp_path / "looking.py").write_text(looking)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    found = run_program(starting.PROGRAM, "looking").splitlines()[0].split()
    least = run_program("import apsw, cbor2, looking").split()
    assert set(found) - set(least) <= {"time"}
    assert "json" not in least


def test_all_open_the_same_file(tmp_path: Path) -> None:
    """Everybody opens what this engine has stored, finds its rows, and says what closing takes."""
    found = run_case(CASES["open"], CONTENDERS, WORKLOAD, 2, parent=tmp_path)
    assert [one.contender for one in found] == list(BOTH)
    assert all(sample.us > 0 and sample.more["us to close"] > 0 for one in found for sample in one.samples)
    assert list(tmp_path.iterdir()) == []


def test_bare_apsw_has_this_engines_pragmas(tmp_path: Path) -> None:
    """What opens a file beside this engine gives it the pragmas that this engine does."""
    names = ("cell_size_check", "mmap_size", "journal_mode", "wal_autocheckpoint", "temp_store", "synchronous")
    from persistency.storage import schema

    way = next(way for way in load("apsw").ways if way.task == "open")
    with Persistency(tmp_path) as p, p.open_job("bench"):
        pass
    ours = schema.connect(tmp_path / "bench.db", "process")
    theirs = way.make(None)(tmp_path, None).open("bench")
    try:
        expected = {name: ours.pragma(name) for name in names}
        assert {name: theirs._connection.pragma(name) for name in names} == expected
        assert expected["journal_mode"] == "wal"
    finally:
        theirs.close()
        ours.close()


# -- many jobs ---------------------------------------------------------------------------------------------------------


@PROC
@pytest.mark.parametrize("case", ["jobs-new", "jobs-open"])
def test_an_idle_job_has_its_memory_and_descriptors(case: str, tmp_path: Path) -> None:
    """Besides the time, each repetition says what a job holds; it holds its file and its log at the least."""
    for one in run_case(CASES[case], CONTENDERS, WORKLOAD, 1, parent=tmp_path):
        assert one.samples[0].operations == jobs.JOBS_MIN
        held = one.besides()
        assert held["descriptors a job"] >= 2
        assert 1 < held["KiB a job"] < 20_000


@pytest.mark.parametrize("case", ["open", "jobs-new", "jobs-open", "jobs-evict"])
def test_jobs_that_are_elsewhere_are_seen(case: str, tmp_path: Path) -> None:
    """Whoever opens other files than he was asked to ends the run."""
    task = "evict" if case == "jobs-evict" else "open"
    for contender in CONTENDERS:
        wrong = crippled(task, lambda many: lambda directory, live_max: many(elsewhere(directory), live_max), contender)
        with pytest.raises(Mismatch, match=contender.name):
            run_case(CASES[case], [wrong], WORKLOAD, 1, parent=tmp_path)
    assert list(tmp_path.iterdir()) == []


class Forgetful:
    """Jobs of which one doesn't store what it is given the second time, or gives a payload too many."""

    def __init__(self, jobs: Any, fault: str) -> None:
        self.close = jobs.close
        self._jobs = jobs
        self._fault = fault

    def open(self, name: str) -> Job:
        job: Job = self._jobs.open(name)
        return _Forgetful(job, self._fault) if name == "job-00003" else job


class _Forgetful:
    def __init__(self, job: Job, fault: str) -> None:
        self.close = job.close
        self._job = job
        self._fault = fault
        self._puts = 0

    def put(self, key: bytes, payload: bytes) -> None:
        self._puts += 1
        if self._puts == 1 or self._fault != "put":
            self._job.put(key, payload)

    def get(self, key: bytes) -> bytes | None:
        found = self._job.get(key)
        return b"" if self._fault == "get" else found


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("fault", ["put", "get"])
def test_one_job_of_many_that_is_wrong_is_seen(name: str, fault: str, tmp_path: Path) -> None:
    """Every value of every job is looked at, while they come and go and afterwards."""
    wrong = crippled(
        "evict", lambda many: lambda directory, live_max: Forgetful(many(directory, live_max), fault), load(name)
    )
    with pytest.raises(Mismatch, match=name):
        run_case(CASES["jobs-evict"], [wrong], WORKLOAD, 1, parent=tmp_path)


def test_fewer_are_live_than_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is too small for 64 live jobs has a smaller limit, so that some have to go in every run."""
    limits: list[int] = []

    def noted(many: Callable[..., Any]) -> Callable[..., Any]:
        def open_all(directory: Path, live_max: int) -> Any:
            limits.append(live_max)
            return many(directory, live_max)

        return open_all

    monkeypatch.setattr(jobs, "CALLS", 10)  # every other one opens a file and closes one
    run_case(CASES["jobs-evict"], [crippled("evict", noted)], WORKLOAD, 1, parent=tmp_path)
    run_case(FULL_CASES["jobs-evict-10k"], [crippled("evict", noted)], Workload(2_600, 10), 1, parent=tmp_path)
    assert limits == [jobs.JOBS_MIN // 2, 64]


def test_connections_by_hand_are_closed_when_others_need_their_place(tmp_path: Path) -> None:
    """What stands beside `max_live_jobs` keeps to its limit, lets those go that were used first, and loses nothing."""
    files = LimitedFiles(tmp_path, 2)
    named = {name: files.open(name) for name in "abc"}
    for name, one in named.items():
        one.put(b"key", name.encode())
    assert list(files._live) == ["b", "c"]
    assert [named[name].get(b"key") for name in "bac"] == [b"b", b"a", b"c"]
    assert list(files._live) == ["a", "c"]
    files.close()
    assert not files._live


# -- growth ------------------------------------------------------------------------------------------------------------


def grown(contenders: Sequence[Contender], tmp_path: Path, repeat: int = 1) -> list[Series]:
    """Run the case at tiny sizes."""
    return run_case(growth.growth(SIZES), contenders, WORKLOAD, repeat, parent=tmp_path)


@PROC
def test_a_store_grows_from_size_to_size(tmp_path: Path) -> None:
    """Both contenders put, put at random and get at each size, in one directory; the memory of adding rows is shown."""
    found = grown(CONTENDERS, tmp_path, repeat=2)
    ours = [one for one in found if one.contender == "persistency"]
    assert [one.way for one in ours] == [
        f"{figure}, {size} rows"
        for size in ("1k", "3k")
        for figure in ("sorted put (put, flush)", "random put (put, flush)", "get (get)")
    ]
    assert [one.way for one in found if one.contender == "apsw"][4:] == [
        "sorted put (512 a statement), 3k rows",
        "random put (groups sorted), 3k rows",
        "get (autocommit), 3k rows",
        "get (inside BEGIN), 3k rows",
    ]
    for one in found:
        assert [sample.operations for sample in one.samples] == [1_000, 1_000]
        assert one.us > 0
        assert one.besides()["rows"] == (1_000 if "1k" in one.way else 3_000)
        assert ("peak MiB" in one.besides()) == one.way.startswith("sorted put")
    assert list(tmp_path.iterdir()) == []


def _lost(rows: Sequence[Pair]) -> Sequence[Pair]:
    return rows[1:]


def _emptied(rows: Sequence[Pair]) -> Sequence[Pair]:
    return [*rows[:-1], (rows[-1][0], b"")]


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    ("task", "change"),
    [
        ("put", lambda put: lambda rows: put(_lost(rows))),
        ("put", lambda put: lambda rows: put(_emptied(rows))),
        ("put-random", lambda put: lambda rows: put(_lost(rows))),
        ("put-random", lambda put: lambda rows: put(_emptied(rows))),
        ("get", lambda get: lambda key: get(key)[1:]),
    ],
)
def test_growth_sees_a_wrong_result(
    name: str, task: str, change: Callable[[Callable[..., Any]], Callable[..., Any]], tmp_path: Path
) -> None:
    """A row that is lost or another one ends the run, and nothing is left behind."""
    contender = load(name)
    if not any(way.task == task for way in contender.ways):
        task = "put"  # a contender that needs no other way for random keys
    with pytest.raises(Mismatch, match=name):
        grown([crippled(task, change, contender)], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_lost_random_put_is_seen_by_the_gets_after_it(tmp_path: Path) -> None:
    """What is put again is another payload, so the reads of a store that missed it are wrong."""
    contender = load("apsw")
    case = growth.growth(SIZES)
    steps = case.ways(contender)
    case.run(contender, steps[0], WORKLOAD, tmp_path)
    with pytest.raises(Mismatch, match="apsw: answer"):
        case.run(contender, steps[2], WORKLOAD, tmp_path)
    case.run(contender, steps[1], WORKLOAD, tmp_path)
    case.run(contender, steps[2], WORKLOAD, tmp_path)


def test_rows_that_lie_between_two_sizes_are_missed(tmp_path: Path) -> None:
    """A step that finds fewer rows than the steps before it leave says so."""
    contender = load("apsw")
    last = growth.growth(SIZES).ways(contender)[4]
    with pytest.raises(Mismatch, match="2000 rows are stored, not 4000"):
        growth.growth(SIZES).run(contender, last, WORKLOAD, tmp_path)


def test_what_adds_rows_adds_all_of_them_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows come a slice at a time, the last one shorter, and all are stored."""
    sizes: list[int] = []
    contender = load("apsw")

    class Noting:
        def __init__(self, store: Any) -> None:
            self._store = store
            self.close = store.close

        def fill(self, rows: Sequence[Pair]) -> None:
            sizes.append(len(rows))
            self._store.fill(rows)

    original = contender.open_store
    assert original is not None
    noting = replace(contender, open_store=lambda directory, runner: Noting(original(directory, runner)))
    monkeypatch.setattr(growth, "load", lambda _name: noting)
    monkeypatch.setattr(growth, "SLICE_ROWS", 400)
    growth.fill("apsw", str(tmp_path), 100, 1_000, 10)
    assert sizes == [400, 400, 100]
    assert contender.read_back is not None
    assert contender.read_back(tmp_path, [])[0] == 900


@pytest.mark.parametrize(
    ("count", "text"), [(100_000, "100k"), (1_000_000, "1M"), (10_000_000, "10M"), (1_500, "1500"), (3_000, "3k")]
)
def test_numbers_of_rows_are_written_briefly(count: int, text: str) -> None:
    """Sizes are written as the targets name them."""
    assert growth.written(count) == text


# -- the command and the harness ---------------------------------------------------------------------------------------


def test_growth_is_measured_only_when_asked_for() -> None:
    """A plain run leaves it out, `--full` adds it, and by name it comes without."""
    left_out: dict[str, str] = {}
    plain = [case.name for case in _cases([], left_out, full=False)]
    assert plain == [name for name in CASES if name not in left_out]
    assert [case.name for case in _cases([], left_out, full=True)] == [*plain, *FULL_CASES]
    assert [case.name for case in _cases(["key"], left_out, full=True)] == ["key", *FULL_CASES]
    assert [case.name for case in _cases(["growth"], left_out, full=True)] == [*FULL_CASES]
    assert [case.name for case in _cases(["growth"], left_out, full=False)] == ["growth"]
    assert FULL_CASES.keys().isdisjoint(CASES)
    with pytest.raises(typer.BadParameter, match="growth"):
        _cases(["growing"], left_out, full=True)


def test_the_command_knows_the_flag() -> None:
    """`--full` says in its help what it adds."""
    done = run("--help", COLUMNS="200")
    assert "--full" in done.stdout
    assert "gigabytes: growth" in done.stdout


@pytest.mark.parametrize(("one_directory", "expected"), [(True, [1, 2, 3, 1, 2]), (False, [1, 1, 1, 1, 1])])
def test_a_contenders_ways_share_a_directory_where_a_store_grows(
    one_directory: bool, expected: list[int], tmp_path: Path
) -> None:
    """All ways of a contender follow one another in one directory; the next contender, and repetition, has another."""
    seen: list[int] = []

    def leave(_contender: Contender, way: Way, _workload: Workload, directory: Path) -> Sample:
        (directory / way.label).touch()
        seen.append(len(list(directory.iterdir())))
        return Sample(1, 1.0)

    def contender(name: str, ways: int) -> Contender:
        return Contender(name, "", tuple(Way("task", str(at), lambda _store: print) for at in range(ways)))

    case = Case("case", "", ("task",), leave, one_directory=one_directory)
    run_case(case, [contender("a", 3), contender("b", 2)], WORKLOAD, 2, parent=tmp_path)
    assert seen == expected * 2
    assert list(tmp_path.iterdir()) == []


def test_what_else_was_measured_is_shown_and_kept() -> None:
    """The medians are in the table of figures, every repetition in the JSON, and a report read again has them."""
    series = Series("case", "persistency", "way", [Sample(1, 1.0, more={"KiB a job": kib}) for kib in (240, 1, 250)])
    assert series.besides() == {"KiB a job": 240}
    table = figures_table([series, Series("case", "apsw", "way", [Sample(1, 1.0)])])
    assert list(table.columns[-1].cells) == ["KiB a job 240", ""]
    report = as_json([series], [], {}, {}, [])
    assert [sample["more"] for sample in report["figures"][0]["samples"]] == [
        {"KiB a job": 240},
        {"KiB a job": 1},
        {"KiB a job": 250},
    ]
    assert from_json(report)[0] == [series]


# -- a process of its own ----------------------------------------------------------------------------------------------


def answering(text: str, number: int) -> dict[str, object]:
    """Answer from a fresh process."""
    print("what a function prints doesn't disturb its answer")
    return {"text": text, "number": number, "process": os.getpid()}


def mistaken(what: str) -> None:
    """Find something wrong in a fresh process."""
    raise Mismatch(f"apsw: {what}")


def failing() -> None:
    """Fail in a fresh process."""
    raise LookupError("no such thing")


def test_a_fresh_process_answers() -> None:
    """The answer is that of the function, from another process."""
    found = call_apart(answering, "ä b", 3)
    assert found["process"] != os.getpid()
    assert (found["text"], found["number"]) == ("ä b", 3)


def test_what_a_fresh_process_ends_with_is_told() -> None:
    """A mismatch arrives as one; any other error shows what the process said."""
    with pytest.raises(Mismatch, match="apsw: another payload"):
        call_apart(mistaken, "another payload")
    with pytest.raises(RuntimeError, match="LookupError: no such thing"):
        call_apart(failing)


def test_a_fresh_interpreter_keeps_what_it_has_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Imports aren't measured with their compilation, whatever the environment says."""
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    assert run_program("import sys; print(sys.dont_write_bytecode)") == "False\n"


@PROC
def test_memory_and_descriptors_are_this_processes(tmp_path: Path) -> None:
    """What is taken is seen, and the peak stays when it was given back."""
    before, files = resident_kib(), descriptors()
    assert before is not None
    assert files is not None
    block = bytearray(b"x") * (64 << 20)
    grown_by = resident_kib()
    assert grown_by is not None
    assert grown_by - before > 60_000
    del block
    peak = peak_kib()
    assert peak is not None
    assert peak >= grown_by - 4_000  # the kernel counts in batches
    with (tmp_path / "one").open("w"), (tmp_path / "two").open("w"):
        assert descriptors() == files + 2
    assert descriptors() == files


@PROC
def test_a_child_begins_with_a_peak_of_its_own() -> None:
    """A parent that has had much memory doesn't show in what its child has had at most."""
    block = bytearray(b"x") * (256 << 20)
    mine, childs = peak_kib(), call_apart(peak_kib)
    del block
    assert mine is not None
    assert childs is not None
    assert childs < mine - 100_000


def test_room_for_descriptors_is_made() -> None:
    """The limit is raised as far as it goes, and never lowered."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = descriptors() or 256
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_now + 50, hard))
        allow_descriptors(10)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == open_now + 50
        allow_descriptors(60)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(open_now + 60, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_an_open_store_is_filled_with_is_the_same_each_time(tmp_path: Path) -> None:
    """A store can be opened again where it grew, by both contenders, with its rows in it."""
    for contender in CONTENDERS:
        directory = tmp_path / contender.name
        directory.mkdir()
        rows = WORKLOAD.for_contender(contender, WORKLOAD.ordered)
        for part in (rows[:100], rows[100:]):
            with opened(contender, directory) as (store, _runner):
                store.fill(part)
        assert contender.read_back is not None
        assert contender.read_back(directory, [rows[0][0], rows[-1][0]]) == (200, [rows[0][1], rows[-1][1]])
