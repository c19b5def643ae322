"""The benchmark of plugins: that it runs, and trusts no answer it hasn't looked at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wasmtime", reason="needs the extra plugins")

from benchmarks import plugins
from benchmarks.verify import Mismatch
from persistency.plugins import Plugin
from tests.garbage import heap_left_alone

__all__ = ["heap_left_alone"]  # a fixture, for every test here

REPOSITORY = Path(__file__).parent.parent


def test_one_run_measures_everything(tmp_path: Path) -> None:
    """A small run gives a figure for the host and for what it is measured beside, and each repetition's ratio."""
    report = tmp_path / "report.json"
    few = ["--calls", "20", "--repeat", "2", "--functions", "20"]
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks.plugins", *few]
        + ["--directory", str(tmp_path), "--json", str(report)],
        cwd=REPOSITORY, env={**os.environ, "COLUMNS": "200"}, capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    results = json.loads(report.read_text())["results"]
    for row in results["calls"]:
        ours, theirs = row["us"][row["ours"]], row["us"][row["theirs"]]
        assert len(ours) == len(theirs) == 2
        assert row["ratio"] == [our / their for our, their in zip(ours, theirs, strict=True)]
        assert row["what"] in ended.stdout
    assert [row["target"] for row in results["calls"]] == [3, 3, None, None, None, None]
    compiled, cached = results["loads"]["ms"].values()
    assert results["loads"]["ratio"] == [one / other for one, other in zip(compiled, cached, strict=True)]
    assert results["crowd"]["calls"] == 40
    assert list(tmp_path.glob("plugins-*")) == []


@pytest.mark.parametrize("name", ["empty", "echo", "get"])
def test_a_wrong_answer_is_found(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that answers otherwise than bare wasmtime, or than the store, makes the run worthless, and it says so."""
    call = Plugin.call

    def wrong(self: Plugin, function: str, data: bytes = b"", **options: Any) -> Any:
        return call(self, function, data, **options).map(lambda answer: answer + b"?" * (function == name))

    monkeypatch.setattr(Plugin, "call", wrong)
    with pytest.raises(Mismatch):
        (plugins.measure_store if name == "get" else plugins.measure_calls)(10, 1, tmp_path)


def test_a_store_that_changes_something_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was set through a guest is read back, byte for byte."""
    call = Plugin.call

    def cutting(self: Plugin, function: str, data: bytes = b"", **options: Any) -> Any:
        return call(self, function, data[:-1] if data.startswith(b"key 0005a") else data, **options)

    monkeypatch.setattr(Plugin, "call", cutting)
    with pytest.raises(Mismatch):
        plugins.measure_store(10, 1, tmp_path)


def test_the_code_that_is_loaded_is_of_many_functions_that_run() -> None:
    """More functions make more code, all of them different, and it can be compiled and called."""
    few, many = plugins.big_module(2), plugins.big_module(20)
    assert len(many) > 8 * len(few)
    assert plugins.Bare(False)("empty", b"") == b""
