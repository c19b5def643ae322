"""The benchmarks: that the command runs, says what is missing, and trusts no result it hasn't looked at."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import CASES
from benchmarks.contenders import PACKAGES, Missing, load
from benchmarks.harness import Sample, Series, run_case
from benchmarks.protocol import Contender, Way
from benchmarks.targets import TARGETS, Judged, Target, judged
from benchmarks.verify import Mismatch, check_answers, check_stored
from benchmarks.workload import Workload

REPOSITORY = Path(__file__).parent.parent
WORKLOAD = Workload(rows=200, payload_bytes=10)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    inherited = {name: value for name, value in os.environ.items() if name != "PERSISTENCY_DATA"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=REPOSITORY,
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def hide(folder: Path, package: str) -> str:
    """Make a folder that, first on the path, lets a package seem not installed; return that path."""
    (folder / f"{package}.py").write_text(f"raise ModuleNotFoundError('no module named {package}')\n")
    return os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))


def crippled(task: str, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Contender:
    """Return this engine with one of its functions changed."""
    ours = load("persistency")

    def changed(original: Way) -> Way:
        return replace(original, make=lambda store: change(original.make(store)))

    return replace(ours, ways=tuple(changed(one) if one.task == task else one for one in ours.ways))


def test_the_command_measures_every_case(tmp_path: Path) -> None:
    """A small run exits with 0 and writes positive figures of all cases, ratios beside apsw, and the machine."""
    file = tmp_path / "report.json"
    done = run("--contender", "apsw", "--rows", "500", "--repeat", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    figures = report["figures"]
    assert {one["case"] for one in figures} == CASES.keys() - {"packages"}
    assert {one["contender"] for one in figures} == {"persistency", "apsw"}
    assert all(one["us"] > 0 and one["samples"][0]["operations"] > 0 for one in figures)
    assert {one["peer"] for one in report["targets"]} == {"", "apsw", "persistency"}
    assert all(one["median"] > 0 and one["values"] == [one["median"]] for one in report["targets"])
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


def test_every_target_names_a_way_there_is() -> None:
    """Each target's case exists, and so does its peer's way, so that none is dropped in silence."""
    for target in TARGETS:
        assert target.case in CASES
        if target.peer:
            try:
                peer = load(target.peer)
            except Missing:
                continue
            assert target.way in [way.label for way in CASES[target.case].ways(peer)], target


def test_contenders_are_imported_only_when_asked_for() -> None:
    """Importing the command imports no peer's package."""
    code = "import sys, benchmarks.__main__; print(*sorted({'diskcache', 'aiosqlite', 'fdb'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
    assert PACKAGES.keys() == {path.stem for path in (REPOSITORY / "benchmarks/contenders").glob("[!_]*.py")} - {
        "tables"
    }
