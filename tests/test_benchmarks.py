"""The benchmarks: that the command runs, says what is missing, and trusts no result it hasn't looked at."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import CASES, FULL_CASES
from benchmarks.contenders import PACKAGES, Missing, load
from benchmarks.harness import Sample, Series, run_case
from benchmarks.protocol import Contender, Way
from benchmarks.report import held
from benchmarks.targets import TARGETS, Judged, Target, judged
from benchmarks.verify import Mismatch, check_answers, check_stored
from benchmarks.workload import Workload
from tests.garbage import heap_left_alone

__all__ = ["heap_left_alone"]  # a fixture, for every test here

REPOSITORY = Path(__file__).parent.parent
WORKLOAD = Workload(rows=200, payload_bytes=10, scanned_rows=1_000)


# The command, except that what is measured beside threads that spin is over sooner.
HURRIED = """
import runpy
from benchmarks.cases import pressure
pressure.SPINNING_NS_MAX = 100_000_000
runpy.run_module("benchmarks", run_name="__main__", alter_sys=True)
"""


def run(
    *arguments: str, command: Sequence[str] = ("-m", "benchmarks"), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    inherited = {name: value for name, value in os.environ.items() if name != "PERSISTENCY_DATA"}
    return subprocess.run(
        [sys.executable, *command, *arguments],
        cwd=REPOSITORY,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


def hide(folder: Path, package: str) -> str:
    """Make a folder that, first on the path, lets a package seem not installed; return that path."""
    (folder / f"{package}.py").write_text(f"raise ModuleNotFoundError('no module named {package}')\n")
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def crippled(
    task: str, change: Callable[[Callable[..., Any]], Callable[..., Any]], contender: Contender | None = None
) -> Contender:
    """Return a contender, else this engine, with one of its functions changed."""
    ours = contender or load("persistency")

    def changed(original: Way) -> Way:
        return replace(original, make=lambda store: change(original.make(store)))

    return replace(ours, ways=tuple(changed(one) if one.task == task else one for one in ours.ways))


def test_the_command_measures_every_case(tmp_path: Path) -> None:
    """A small run exits with 0 and writes positive figures of all cases, ratios beside apsw, and the machine."""
    file = tmp_path / "report.json"
    done = run("--contender", "apsw", "--rows", "100", "--repeat", "1", "--json", str(file), command=("-c", HURRIED))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    figures = report["figures"]
    assert {one["case"] for one in figures} == CASES.keys() - {"packages"}
    assert {one["contender"] for one in figures} == {"persistency", "apsw"}
    assert all(one["us"] > 0 and one["samples"][0]["operations"] > 0 for one in figures)
    measured = [one for one in report["targets"] if one["values"]]
    assert {one["peer"] for one in measured} == {"", "apsw", "persistency"}
    assert all(one["median"] > 0 and one["values"] == [one["median"]] for one in measured)
    assert len(report["targets"]) == len(TARGETS)
    assert report["machine"].keys() >= {"cpu", "cores", "python", "apsw", "sqlite", "filesystem", "date", "durability"}
    assert "Targets" in done.stdout
    assert report["left_out"] == ["case 'packages' is left out: " + done.stderr.partition(" is left out: ")[2].strip()]


def test_real_records_are_put_where_there_are_some(tmp_path: Path) -> None:
    """With a folder of data the case `packages` puts its records; with one that has none it says so."""
    import gzip

    records = [{"section": f"s{row % 3}", "package": f"p{row // 2}", "size": row} for row in range(120)]
    with gzip.open(tmp_path / "debian-packages.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    done = run("--case", "packages", "--contender", "apsw", "--repeat", "1", PERSISTENCY_DATA=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "packages" in done.stdout
    done = run("--case", "packages", "--contender", "apsw", PERSISTENCY_DATA=str(tmp_path / "nowhere"))
    assert done.stderr.startswith("case 'packages' is left out: ")


def test_a_missing_package_is_one_line(tmp_path: Path) -> None:
    """A contender that isn't installed is named in one line: an error if it was asked for, else it is left out."""
    path = hide(tmp_path, "diskcache")
    asked = run("--contender", "diskcache", "--case", "key", PYTHONPATH=path)
    assert asked.returncode == 2
    assert asked.stderr.splitlines() == [
        "contender 'diskcache' is left out: no module named diskcache; pip install diskcache"
    ]
    small = run("--case", "key", "--rows", "100", "--repeat", "1", PYTHONPATH=path)
    assert small.returncode == 0
    assert asked.stderr in small.stderr


def test_a_wrong_name_is_refused() -> None:
    """A case or contender that doesn't exist is a wrong command line, and the message names those that do."""
    done = run("--contender", "nobody")
    assert done.returncode == 2
    assert "diskcache" in done.stderr
    assert run("--case", "nothing", "--contender", "apsw").returncode == 2


def test_a_wrong_result_ends_the_command(tmp_path: Path) -> None:
    """A mismatch is the exit code 1, and no figure is shown."""
    (tmp_path / "sitecustomize.py").write_text(
        "import benchmarks.contenders.apsw as peer\npeer.GET = 'SELECT key FROM kv WHERE category = ? AND key = ?'\n"
    )
    path = os.pathsep.join((str(tmp_path), str(REPOSITORY)))
    done = run("--case", "get", "--contender", "apsw", "--rows", "100", "--repeat", "1", PYTHONPATH=path)
    assert done.returncode == 1
    assert done.stderr.startswith("a wrong result, so nothing counts: apsw: answer 0 is ")
    assert "Figures" not in done.stdout


@pytest.mark.parametrize(
    ("given", "message"),
    [([b"a"], "1 answers, not 2"), ([b"a", None], "answer 1 is None"), ([b"a", b"b", b"c"], "3 answers, not 2")],
)
def test_answers_are_compared(given: Sequence[object], message: str) -> None:
    """Answers that are too few, too many or different are a mismatch."""
    check_answers("somebody", [b"a", b"b"], [b"a", b"b"])
    with pytest.raises(Mismatch, match=message):
        check_answers("somebody", given, [b"a", b"b"])


def test_what_is_stored_is_compared(tmp_path: Path) -> None:
    """A store that lacks a row, or holds another payload, is a mismatch; of equal keys the last row counts."""
    ours = load("persistency")
    assert ours.open_store is not None
    rows = [*WORKLOAD.ordered, (WORKLOAD.ordered[0][0], b"last")]
    with asyncio.Runner() as runner:
        store = ours.open_store(tmp_path, runner)
        store.fill(rows)
        store.close()
    check_stored(ours, tmp_path, rows)
    with pytest.raises(Mismatch, match="200 rows are stored, not 199"):
        check_stored(ours, tmp_path, rows[1:-1])
    with pytest.raises(Mismatch, match="read back: answer 0 is b'last'"):
        check_stored(ours, tmp_path, WORKLOAD.ordered)


@pytest.mark.parametrize(
    ("case", "task", "change"),
    [
        ("put", "put", lambda put: lambda rows: put(rows[1:])),
        ("put-random", "put", lambda put: lambda rows: put([(key, b"") for key, _payload in rows])),
        ("produce", "produce", lambda put: lambda key, payload: None),
        ("commit", "commit", lambda put: lambda key, payload: put(key, b"")),
        ("acommit", "acommit", lambda put: lambda key, payload: put(key, b"")),
        ("get", "get", lambda get: lambda key: b""),
        ("aget", "aget", lambda _get: lambda key: asyncio.sleep(0)),
        ("aget-64", "aget", lambda _get: lambda key: asyncio.sleep(0)),
        ("lag", "post", lambda post: lambda rows: post(rows[1:])),
        ("scan", "scan", lambda scan: lambda prefix: scan(prefix)[1:]),
        ("key", "encode", lambda encode: lambda parts: encode(parts)[1:]),
    ],
)
def test_every_case_sees_a_wrong_result(
    case: str, task: str, change: Callable[[Callable[..., Any]], Callable[..., Any]], tmp_path: Path
) -> None:
    """No case counts a figure whose result was wrong, and none leaves a file behind."""
    run_case(CASES[case], [load("persistency")], WORKLOAD, 1, parent=tmp_path)
    with pytest.raises(Mismatch):
        run_case(CASES[case], [crippled(task, change)], WORKLOAD, 1, parent=tmp_path)
    assert list(tmp_path.iterdir()) == []


def elsewhere(directory: Path) -> Path:
    """Return another directory."""
    (directory / "elsewhere").mkdir(exist_ok=True)
    return directory / "elsewhere"


LARGE_PUTS = ("put-1k", "put-64k", "put-1m")
LARGE_GETS = ("get-1k", "get-64k", "get-1m")
# What each peer takes part in; everything else it has no operation for.
PEERS = {
    "apsw": (
        *("put", "put-random", "get", "commit", "scan"),
        *("put-spinning", "get-spinning", "scan-spinning", "get-producer"),
        *("open", "jobs-new", "jobs-open", "jobs-evict"),
        *(*LARGE_PUTS, *LARGE_GETS, "put-object", "get-object", "put-durable", "commit-durable", "get-many", "iterate"),
    ),
    "apsw.aio": ("put", "put-random", "aget", "aget-64", "acommit", "lag", *LARGE_PUTS),
    "sqlite3": ("put", "put-random", "get", "commit", "scan", *LARGE_PUTS, *LARGE_GETS),
    "aiosqlite": ("put", "put-random", "aget", "aget-64", "acommit", "lag", *LARGE_PUTS),
    "diskcache": ("put", "put-random", "get", "commit", *LARGE_PUTS, *LARGE_GETS, "put-object", "get-object"),
    "lmdb": (
        *("put", "put-random", "get", "commit", "scan", "get-producer"),
        *(*LARGE_PUTS, *LARGE_GETS, "get-many", "iterate"),
    ),
    "rocksdict": ("put", "put-random", "get", "commit", "scan", *LARGE_PUTS, *LARGE_GETS, "get-many", "iterate"),
    "plyvel": ("put", "put-random", "get", "commit", "scan", *LARGE_PUTS, *LARGE_GETS, "iterate"),
}
# For each task a result that is nearly right: a row that is lost, a payload that is another one.
WRONG: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "put": lambda put: lambda rows: put(rows[1:]),
    "put-random": lambda put: lambda rows: put([*rows[:-1], (rows[-1][0], b"")]),
    "commit": lambda put: lambda key, payload: put(key, payload[1:]),
    "acommit": lambda put: lambda key, payload: put(key, payload[1:]),
    "get": lambda get: lambda key: get(key)[1:],
    "aget": lambda get: lambda key: asyncio.sleep(0, key),
    "post": lambda post: lambda rows: post(rows[1:]),
    "scan": lambda scan: lambda prefix: list(scan(prefix))[:-1],
    "put-object": lambda put: lambda rows: put([*rows[:-1], (rows[-1][0], {})]),
    "get-object": lambda get: lambda key: {**get(key), "package": ""},
    "put-durable": lambda put: lambda rows: put(rows[1:]),
    "commit-durable": lambda put: lambda key, payload: put(key, payload[1:]),
    "get-many": lambda get: lambda keys: get(keys[1:]),
    "iterate": lambda iterate: lambda: list(iterate())[:-1],
    "put-spinning": lambda put: lambda rows: put(rows[1:]),
    "get-spinning": lambda get: lambda key: get(key)[1:],
    "get-producer": lambda get: lambda key: get(key)[1:],
    "scan-spinning": lambda scan: lambda prefix: list(scan(prefix))[:-1],
    "open": lambda jobs: lambda directory, live_max: jobs(elsewhere(directory), live_max),
    "evict": lambda jobs: lambda directory, live_max: jobs(elsewhere(directory), live_max),
}


def installed(name: str) -> Contender:
    """Return a contender; without its package the test is skipped, and says which."""
    try:
        return load(name)
    except Missing as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in PEERS.items() for case in cases])
def test_every_way_of_a_peer_is_measured_and_verified(name: str, case: str, tmp_path: Path) -> None:
    """Each way of a peer gives a figure at a tiny size, and the same way with a wrong result ends in a mismatch."""
    peer = installed(name)
    ways = CASES[case].ways(peer)
    found = run_case(CASES[case], [peer], WORKLOAD, 1, parent=tmp_path)
    assert [one.way for one in found] == [way.label for way in ways] != []
    assert all(one.us > 0 for one in found)
    for way in ways:
        wrong = crippled(way.task, WRONG[way.task], replace(peer, ways=(way,)))
        with pytest.raises(Mismatch, match=re.escape(name)):
            run_case(CASES[case], [wrong], WORKLOAD, 1, parent=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", ["scan", "scan-spinning"])
def test_a_scan_is_of_as_many_rows_as_its_case_says(case: str) -> None:
    """A run of the command scans them all; only tests have fewer."""
    assert len(Workload().scanned) == CASES[case].rows
    assert f"{CASES[case].rows:,} rows" in CASES[case].what


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_takes_part_in_what_it_can(name: str) -> None:
    """The cases a peer has ways for are those named above, so that none is lost in silence."""
    peer = installed(name)
    assert {case for case in CASES if CASES[case].ways(peer)} == {*PEERS[name], "packages"}
    assert peer.name == name
    assert peer.settings


WRITE_AND_DIE = """
import asyncio, os, signal, sys
from pathlib import Path
from benchmarks.contenders import load
from benchmarks.workload import Workload

async def commit(put, rows):
    for key, payload in rows:
        await put(key, payload)

name, rows, payload_bytes, *directories = sys.argv[1:]
peer = load(name)
workload = Workload(int(rows), int(payload_bytes))
rows = workload.for_contender(peer, workload.ordered)
left_open = []
for directory in map(Path, directories):
    way = peer.ways[int(directory.name)]
    runner = asyncio.Runner()
    store = peer.open_store(directory, runner)
    write = way.make(store)
    left_open += [store, write, runner]
    if way.task == "commit":
        for key, payload in rows:
            write(key, payload)
    elif way.task == "acommit":
        runner.run(commit(write, rows))
    else:
        write(rows)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("name", PEERS)
def test_what_a_peer_has_committed_outlives_a_kill(name: str, tmp_path: Path) -> None:
    """All peers are set to the same durability: what a way of theirs has put or committed is there after SIGKILL."""
    peer = installed(name)
    writing = {"put", "put-random", "commit", "acommit"}
    directories = [tmp_path / str(at) for at, way in enumerate(peer.ways) if way.task in writing]
    assert directories
    for directory in directories:
        directory.mkdir()
    sizes = (str(WORKLOAD.rows), str(WORKLOAD.payload_bytes))
    done = subprocess.run(
        [sys.executable, "-c", WRITE_AND_DIE, name, *sizes, *map(str, directories)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    for directory in directories:
        check_stored(peer, directory, WORKLOAD.for_contender(peer, WORKLOAD.ordered))


def test_repetitions_are_interleaved() -> None:
    """Everybody is measured once before anybody is measured again."""
    order: list[str] = []
    named = [replace(load("persistency"), name=name) for name in "ab"]
    found = run_case(CASES["key"], named, WORKLOAD, 2, step=order.append)
    assert [len(one.samples) for one in found] == [2, 2]
    assert [step.split()[1] for step in order] == ["a,", "b,", "a,", "b,"]


def series(case: str, contender: str, way: str, *times: float) -> Series:
    """Return what would have been measured in as many repetitions."""
    return Series(case, contender, way, [Sample(1, us) for us in times])


@pytest.mark.parametrize(
    ("ours", "verdict"), [((1, 1, 1), "reached"), ((1, 2, 2), "floor only"), ((1, 1, 4), "missed")]
)
def test_targets_are_judged_pair_by_pair(ours: Iterable[float], verdict: str) -> None:
    """The floor must hold in every repetition and the aim by the median; each ratio is of one repetition."""
    measured = [series("put", "persistency", "put", *ours), series("put", "apsw", "loop", 1, 1, 1)]
    target = Target("put", "speed", 0.5, 0.75, "apsw", "loop")
    (found,) = judged(measured, [target])
    assert found.values == [1 / us for us in ours]
    assert found.verdict == verdict
    assert Judged(Target("put", "time", 2, 1), list(ours)).verdict == verdict


def test_the_report_says_how_many_floors_have_held_in_every_repetition_and_by_the_median() -> None:
    """One that was missed once counts by the median alone; what nobody measured doesn't count at all."""
    target = Target("put", "time", 2, 1)
    results = [Judged(target, [1.0, 1.5, 1.9]), Judged(target, [1.0, 1.5, 2.1]), Judged(target, [1.0, 2.5, 2.1])]
    assert held([*results, Judged(target, [], "asleep")]) == [
        "floors held: 1 of 3 in every repetition, 2 by the median"
    ]
    assert held([Judged(target, [], "asleep")]) == []


def test_every_target_names_a_way_there_is() -> None:
    """Each target's case exists, and so does its peer's way, so that none is dropped in silence."""
    for target in TARGETS:
        assert target.case in CASES | FULL_CASES
        if target.peer:
            try:
                peer = load(target.peer)
            except Missing:
                continue
            assert target.way in [way.label for way in (CASES | FULL_CASES)[target.case].ways(peer)], target


def test_contenders_are_imported_only_when_asked_for() -> None:
    """Importing the command imports no peer's package."""
    peers = {"diskcache", "aiosqlite", "fdb", "apsw.aio", "lmdb", "rocksdict", "plyvel"}
    code = f"import sys, benchmarks.__main__; print(*sorted({peers} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    modules = {path.stem for path in (REPOSITORY / "benchmarks/contenders").glob("[!_]*.py")}
    assert {name.replace(".", "_") for name in PACKAGES} == modules - {"tables", "groups", "awaited", "files"}
