"""The plots of the benchmarks: that they show what a report holds, and nothing else, the same each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from benchmarks import plots
from benchmarks.cases.growth import growth
from benchmarks.contenders import load
from benchmarks.harness import Sample, Series, run_case
from benchmarks.report import as_json, from_json, ratios_table
from benchmarks.targets import NOT_ASKED, Judged, Target, judged
from benchmarks.workload import Workload
from tests.garbage import heap_left_alone

__all__ = ["heap_left_alone"]  # a fixture, for every test here

REPOSITORY = Path(__file__).parent.parent
MACHINE: dict[str, str | int] = {
    "cpu": "A processor",
    "cores": 4,
    "date": "2026-01-02T03:04:05+00:00",
    "sqlite": "3.51",
}
TARGETS = (
    Target("put", "speed", 0.5, 1.0, "apsw", "loop"),
    Target("put", "speed", 2, 4, "diskcache", "set"),
    Target("produce", "us", 2, 1),
    Target("scan", "time", 4, 2, "apsw", "fetchall", "scan_prefix"),
    Target("get", "time", 1, 0.5, "lmdb", "get"),
    Target("key", "time", 1, 0.5, "fdb", "pack"),
)
LEFT_OUT = {"lmdb": "contender 'lmdb' is left out: no [module] <named> lmdb; pip install lmdb"}


@pytest.fixture
def matplotlib() -> None:
    """Skip what draws where there is nothing to draw with."""
    pytest.importorskip("matplotlib", reason="matplotlib isn't installed; pip install 'matplotlib>=3.8'")


def series(case: str, contender: str, way: str, *times: float) -> Series:
    """Return what would have been measured in as many repetitions."""
    return Series(case, contender, way, [Sample(1, us) for us in times])


MEASURED = (
    series("put", "persistency", "put, flush", 1, 1.25, 2),
    series("put", "apsw", "loop", 1, 1, 1),
    series("put", "diskcache", "set", 9, 8, 7),
    series("produce", "persistency", "put", 3, 3, 3),
    series("scan", "persistency", "scan_prefix", 8_000, 8_000, 8_000),
    series("scan", "apsw", "fetchall", 4_000, 4_000, 4_000),
    series("get", "persistency", "get", 5, 6, 7),
)


def grown(contender: str, figure: str, way: str, *times: float) -> list[Series]:
    """Return what the growth case would have measured at so many sizes."""
    sizes = {"100k": 1e5, "1M": 1e6, "10M": 1e7}
    return [
        Series(
            "growth", contender, f"{figure} ({way}), {size} rows", [Sample(1, us, more={"rows": rows, "peak MiB": 9})]
        )
        for (size, rows), us in zip(sizes.items(), times, strict=False)
    ]


GROWN = (
    *grown("apsw", "sorted put", "512 a statement", 1, 2),
    *grown("persistency", "sorted put", "put, flush", 1.2, 1.3, 1.4),
    *grown("apsw", "get", "autocommit", 5, 6),
)


def report(*measured: Series) -> dict[str, Any]:
    """Return the report of a made-up run, as it comes out of a file."""
    cases = {"put": {"what": "puts & commits", "rows": 1}, "scan": {"what": "a scan", "rows": 10_000}}
    settings = {"rows": 200_000, "payload_bytes": 100, "repeat": 3, "cases": cases}
    results = list(judged(measured, TARGETS, LEFT_OUT))
    written: dict[str, Any] = json.loads(
        json.dumps(as_json(measured, results, MACHINE, settings, [*LEFT_OUT.values()]))
    )
    return written


def drawn(given: dict[str, Any], directory: Path) -> dict[str, ET.Element]:
    """Draw, and return what was drawn by the files' names."""
    return {path.name: ET.parse(path).getroot() for path in plots.draw(given, directory)}


def texts(root: ET.Element) -> list[str]:
    """Return all lines of text, which are text."""
    return ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]


def groups(root: ET.Element, prefix: str) -> dict[str, ET.Element]:
    """Return the groups whose id begins with something, without that."""
    found = {one.get("id", ""): one for one in root.iter("{http://www.w3.org/2000/svg}g")}
    return {name.removeprefix(prefix): one for name, one in found.items() if name.startswith(prefix)}


def extent(group: ET.Element) -> tuple[float, float]:
    """Return from where to where the path of a group goes, from left to right."""
    (path,) = group.iter("{http://www.w3.org/2000/svg}path")
    words = path.get("d", "").split()
    across = [float(words[at + 1]) for at, word in enumerate(words) if word in {"M", "L"}]
    return min(across), max(across)


def place(group: ET.Element) -> float:
    """Return how far to the right a marker stands."""
    (used,) = group.iter("{http://www.w3.org/2000/svg}use")
    return float(used.get("x", ""))


@pytest.mark.usefixtures("matplotlib")
def test_every_target_is_a_row_with_its_spread(tmp_path: Path) -> None:
    """Each target that was asked for is written out; those measured have a median inside their spread, others none."""
    root = drawn(report(*MEASURED), tmp_path)["targets.svg"]
    written = texts(root)
    assert {"put", "produce", "scan", "get", "vs apsw, loop", "vs diskcache, set", "by itself"} <= set(written)
    assert {"scan_prefix, vs apsw, fetchall", "0.80 x", "0.50 - 1.00 x", "≥ 0.50 x", "3 µs", "≤ 2 µs"} <= set(written)
    assert {"aim reached: 2", "floor holds in every run: 1", "floor missed in some run: 1"} <= set(written)
    medians, spreads = groups(root, "median-"), groups(root, "spread-")
    assert list(medians) == list(spreads) == ["0", "1", "2", "3"]
    for row, group in medians.items():
        low, high = extent(spreads[row])
        assert low - 0.01 <= place(group) <= high + 0.01
    assert extent(spreads["0"])[1] - extent(spreads["0"])[0] > 10  # the ratios 0.5 to 1
    # 1.6, 3.2, 0.67 and 2 times better than their floors: a missed one stands left of it.
    assert place(medians["2"]) < place(medians["0"]) < place(medians["3"]) < place(medians["1"])


@pytest.mark.usefixtures("matplotlib")
def test_a_target_that_was_left_out_is_said_to_be(tmp_path: Path) -> None:
    """What is missing has a row and its reason, whatever characters are in it; what nobody asked for is counted."""
    written = texts(drawn(report(*MEASURED), tmp_path)["targets.svg"])
    assert written.count("not measured") == 1
    assert f"not measured: {LEFT_OUT['lmdb']}" in written
    assert "key" not in written
    assert f"targets {NOT_ASKED}: 1" in written


@pytest.mark.usefixtures("matplotlib")
def test_what_is_far_off_stands_at_the_edge(tmp_path: Path) -> None:
    """A thousand times the floor doesn't press the others together: it is marked inside the plot, with its figure."""
    far = [*MEASURED[1:], series("put", "persistency", "put, flush", 0.001, 0.001, 0.001)]
    near = drawn(report(*MEASURED), tmp_path)["targets.svg"]
    root = drawn(report(*far), tmp_path)["targets.svg"]
    assert "2,000 x" in texts(root)
    assert "0" not in groups(root, "spread-")
    assert place(groups(root, "median-")["0"]) < float(root.get("viewBox", "").split()[2])
    aims = [place(groups(one, "median-")["3"]) - place(groups(one, "median-")["2"]) for one in (near, root)]
    assert aims[1] > aims[0] / 4


@pytest.mark.usefixtures("matplotlib")
def test_operations_are_bars_that_grow_with_the_time(tmp_path: Path) -> None:
    """Each way of a main case has a bar, the fastest first, with the median beside it; a scan's is for a row."""
    root = drawn(report(*MEASURED), tmp_path)["operations.svg"]
    bars = groups(root, "bar-")
    assert list(bars) == ["put-0", "put-1", "put-2", "get-0", "scan-0", "scan-1"]
    lengths = {name: extent(bar)[1] - extent(bar)[0] for name, bar in bars.items()}
    assert lengths["put-0"] < lengths["put-1"] < lengths["put-2"]
    assert lengths["scan-0"] < lengths["scan-1"] < lengths["put-0"]
    # The scale is logarithmic, and one for all cases: a scan's 0.4 and 0.8 us are as far apart as a put's 4 and 8.
    octave = lengths["scan-1"] - lengths["scan-0"]
    assert lengths["put-2"] - lengths["put-0"] == pytest.approx(3 * octave, rel=0.01)
    written = texts(root)
    assert written.index("apsw, loop") < written.index("persistency, put, flush") < written.index("diskcache, set")
    assert {"puts & commits", "a scan; per row", "0.4", "0.8", "1.25", "6"} <= set(written)
    assert any(line.startswith("A processor · 4 cores · SQLite 3.51 · 200,000 rows") for line in written)


@pytest.mark.usefixtures("matplotlib")
def test_growth_is_a_line_for_each_way(tmp_path: Path) -> None:
    """Where growth was measured, each contender has a line through its numbers of rows; else there is no such plot."""
    assert drawn(report(*MEASURED), tmp_path).keys() == {"targets.svg", "operations.svg"}
    assert not (tmp_path / "growth.svg").exists()
    root = drawn(report(*MEASURED, *GROWN), tmp_path)["growth.svg"]
    lines = groups(root, "line-")
    assert {name: len(list(line.iter("{http://www.w3.org/2000/svg}use"))) for name, line in lines.items()} == {
        "sorted put-persistency, put, flush": 3,
        "sorted put-apsw, 512 a statement": 2,
        "get-apsw, autocommit": 2,
        "memory at its peak, to add the rows before-persistency": 3,
        "memory at its peak, to add the rows before-apsw": 2,
    }
    written = texts(root)
    assert {"sorted put", "get", "100k", "1M", "10M", "apsw, autocommit", "persistency, put, flush"} <= set(written)
    assert not any("200,000 rows" in line for line in written)


@pytest.mark.usefixtures("matplotlib")
def test_growth_as_it_is_measured_is_drawn(tmp_path: Path) -> None:
    """What the case itself gives, at small sizes, comes out with its sizes as the points of one line for each way."""
    measured = run_case(growth((1_000, 3_000)), [load("persistency")], Workload(100, 10), 1, parent=tmp_path)
    root = drawn(report(*measured), tmp_path)["growth.svg"]
    assert {"1k", "3k"} <= set(texts(root))
    lines = {name: line for name, line in groups(root, "line-").items() if not name.startswith("memory")}
    assert len(lines) == len(measured) / 2 > 0
    assert all(len(list(line.iter("{http://www.w3.org/2000/svg}use"))) == 2 for line in lines.values())


@pytest.mark.usefixtures("matplotlib")
def test_labels_move_apart_and_stay_inside() -> None:
    """Labels keep their order and their distance; those that have room stay where they are."""
    from benchmarks.drawing.sheet import spread_out

    assert spread_out([0.5, 0.1], 0.2) == [0.5, 0.1]
    moved = spread_out([0.99, 0.5, 1.0, 0.52, 0.51], 0.1)
    assert moved == pytest.approx([0.9, 0.41, 1.0, 0.61, 0.51])
    assert spread_out([0.0] * 5, 0.25) == pytest.approx([0, 0.25, 0.5, 0.75, 1])


@pytest.mark.usefixtures("matplotlib")
def test_nothing_measured_is_nothing_drawn(tmp_path: Path) -> None:
    """A run of other cases gives no empty plots."""
    assert drawn(report(series("packages", "persistency", "put, flush", 1)), tmp_path) == {}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("matplotlib")
def test_a_report_gives_the_same_bytes_whoever_draws_it(tmp_path: Path) -> None:
    """Two processes, one of them with settings of its user's, draw a file alike; a date stands in no file."""
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report(*MEASURED, *GROWN)))
    settings = tmp_path / "matplotlibrc"
    settings.write_text("font.size: 30\nsvg.fonttype: path\nsavefig.facecolor: black\nxtick.major.pad: 20\n")
    found = []
    for name, environment in (("one", {}), ("other", {"MATPLOTLIBRC": str(settings), "PYTHONHASHSEED": "1"})):
        done = command("benchmarks.plots", str(file), str(tmp_path / name), **environment)
        assert done.returncode == 0, done.stderr
        names = ["targets.svg", "operations.svg", "growth.svg"]
        assert done.stdout.splitlines() == [str(tmp_path / name / one) for one in names]
        found.append([(tmp_path / name / one).read_bytes() for one in names])
    assert found[0] == found[1]
    assert not any(b"<dc:date>" in one for one in found[0])


def command(module: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the benchmarks."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=REPOSITORY,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_without_matplotlib_plots_are_refused_beforehand(tmp_path: Path) -> None:
    """A run that shall draw and can't is over before it measured: one line with the remedy, and the exit code 2."""
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['matplotlib'] = None\n")
    path = os.pathsep.join((str(tmp_path), str(REPOSITORY)))
    file = tmp_path / "report.json"
    file.write_text(json.dumps(report(*MEASURED)))
    small = ("--case", "key", "--contender", "apsw", "--rows", "100", "--repeat", "1")
    for done in (
        command("benchmarks", *small, "--plots", str(tmp_path / "to"), "--json", str(tmp_path / "no"), PYTHONPATH=path),
        command("benchmarks.plots", str(file), str(tmp_path / "to"), PYTHONPATH=path),
    ):
        assert done.returncode == 2
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("plots can't be drawn: ")
        assert line.endswith("; pip install 'matplotlib>=3.8'")
    assert not (tmp_path / "to").exists()
    assert not (tmp_path / "no").exists()
    # Who doesn't ask for plots doesn't need it.
    assert command("benchmarks", *small, PYTHONPATH=path).returncode == 0


@pytest.mark.usefixtures("matplotlib")
def test_a_folder_that_cannot_be_made_is_told_beforehand(tmp_path: Path) -> None:
    """A file where the folder should be is one line too."""
    (tmp_path / "file").write_text("")
    with pytest.raises(plots.Hindered, match="Not a directory; name another folder"):
        plots.make_ready(tmp_path / "file" / "folder")


@pytest.mark.usefixtures("matplotlib")
@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"figures": [1], "targets": []}', '{"figures": [{}], "targets": []}']
)
def test_a_file_that_is_no_report_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What no run has written is told as such."""
    file = tmp_path / "report.json"
    file.write_text(text)
    with pytest.raises(SystemExit) as ended:
        plots.app([str(file), str(tmp_path / "plots")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{file} is no report of this command; ")
    assert len(said.splitlines()) == 1


@pytest.mark.usefixtures("matplotlib")
def test_a_run_draws_what_its_file_would_give(tmp_path: Path) -> None:
    """`--plots` and a drawing of the file that `--json` wrote are the same bytes."""
    file = tmp_path / "report.json"
    small = ("--case", "get", "--case", "key", "--contender", "apsw", "--rows", "100", "--repeat", "2")
    done = command("benchmarks", *small, "--json", str(file), "--plots", str(tmp_path / "plots"))
    assert done.returncode == 0, done.stderr
    plots.app([str(file), str(tmp_path / "again")], standalone_mode=False)
    names = {"targets.svg", "operations.svg"}
    assert {one.name for one in (tmp_path / "plots").iterdir()} == names
    assert all((tmp_path / "plots" / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in names)


def test_matplotlib_is_imported_only_for_plots() -> None:
    """Importing the command imports no matplotlib."""
    code = "import sys, benchmarks.__main__, benchmarks.plots; print(sys.modules.get('matplotlib'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "None"


def test_a_report_is_read_as_it_was_written() -> None:
    """Figures, targets and reasons come back from JSON; what another version knew besides is passed over."""
    written = report(*MEASURED, *GROWN)
    written["figures"][0]["samples"][0]["colour"] = "blue"
    written["targets"][0]["colour"] = "blue"
    assert from_json(written) == ([*MEASURED, *GROWN], list(judged([*MEASURED, *GROWN], TARGETS, LEFT_OUT)))


def test_what_was_not_measured_is_told_with_the_reason() -> None:
    """A peer or a case that is left out, or was not asked for, is in the results, in JSON and in the table."""
    left_out = LEFT_OUT | {"scan": "case 'scan' is left out: no data"}
    targets = (*TARGETS, Target("put", "speed", 1, 2, "apsw", "another way"))
    measured = [one for one in MEASURED if one.case != "scan"]
    results = list(judged(measured, targets, left_out))
    assert [one.target for one in results] == list(targets)
    assert {one.target.case: one.reason for one in results[3:6]} == {
        "scan": left_out["scan"],
        "get": left_out["lmdb"],
        "key": NOT_ASKED,
    }
    assert results[6] == Judged(targets[6], [], "apsw has no way 'another way' in the case 'put'")
    assert [one.verdict for one in results[3:]] == ["not measured"] * 4
    found = as_json(measured, results, MACHINE, {}, [])["targets"]
    assert [one["reason"] for one in found[3:]] == [one.reason for one in results[3:]]
    assert all(one["median"] is one["min"] is one["max"] is None and one["values"] == [] for one in found[3:])
    console = Console(width=200)
    with console.capture() as captured:
        console.print(ratios_table(results))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    rows = [line for line in lines if "not measured" in line and not line.startswith("not measured")]
    assert [row.split()[1] for row in rows] == ["scan,", "get", "put"]
    assert [line for line in lines if line.startswith("not measured: ")] == [
        f"not measured: {one.reason}" for one in results[3:] if one.reason != NOT_ASKED
    ]
    assert lines[-1] == f"targets {NOT_ASKED}: 1"
