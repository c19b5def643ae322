"""The benchmark of the LangGraph saver: that it runs, and trusts no saver it hasn't read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import checkpointers
from benchmarks.verify import Mismatch
from persistency.integrations.langgraph import PersistencySaver
from tests.garbage import heap_left_alone

__all__ = ["heap_left_alone"]  # a fixture, for every test here

REPOSITORY = Path(__file__).parent.parent


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks.checkpointers", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def test_one_run_measures_all_savers_in_every_way(tmp_path: Path) -> None:
    """A small run gives a figure of each saver for each way, and the ratio of each repetition."""
    report = tmp_path / "report.json"
    ended = command(
        "--steps", "64", "--repeat", "2", "--state", "dicts", "--directory", str(tmp_path), "--json", str(report)
    )
    assert ended.returncode == 0, ended.stderr
    assert "theirs / ours" in ended.stdout
    ways = json.loads(report.read_text())["results"]["dicts"]
    assert list(ways) == ["in turn", "in turn, awaited", "32 tasks", "32 threads"]
    for one in ways.values():
        assert {name: len(times) for name, times in one["us"].items()} == {
            "PersistencySaver": 2,
            "SqliteSaver": 2,
            "serializer": 2,
        }
        ours, theirs = one["us"]["PersistencySaver"], one["us"]["SqliteSaver"]
        assert one["ratio"] == [their / our for our, their in zip(ours, theirs, strict=True)]
    assert list(tmp_path.glob("checkpointers-*")) == []


def test_an_unknown_state_is_refused_before_anything_is_measured() -> None:
    """With exit code 2, and those there are."""
    ended = command("--state", "unknown")
    assert ended.returncode == 2
    assert "dicts" in ended.stderr


@pytest.mark.parametrize("lost", ["put", "put_writes"])
def test_a_saver_that_loses_something_is_found(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A put, or its writes, that aren't there afterwards make the run worthless, and it says so."""
    kept: Any = getattr(PersistencySaver, lost)

    def losing(self: PersistencySaver, config: Any, *given: Any) -> Any:
        if lost == "put_writes" or given[1]["step"] == 20:
            return {"configurable": {**config["configurable"], "checkpoint_id": "lost"}}
        return kept(self, config, *given)

    monkeypatch.setattr(PersistencySaver, lost, losing)
    with pytest.raises(Mismatch):
        checkpointers.measured(checkpointers.STATES[:1], 64, 1, tmp_path)
