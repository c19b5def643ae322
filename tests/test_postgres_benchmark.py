"""The benchmark of jobs on PostgreSQL: that it runs, and trusts no figure of rows it hasn't read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import postgres
from benchmarks.verify import Mismatch
from persistency import key
from tests.garbage import heap_left_alone
from tests.postgres import fresh_url, postgres_url, sql

__all__ = ["heap_left_alone"]  # a fixture, for every test here

REPOSITORY = Path(__file__).parent.parent


def test_one_run_measures_all_of_them(tmp_path: Path) -> None:
    """A small run gives a figure of each for each case, the ratio of each repetition, and leaves nothing."""
    report, url = tmp_path / "report.json", postgres_url()
    few = ("--rows", "300", "--gets", "40", "--repeat", "2", "--url", url, "--json", str(report), "--markdown")
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-m", "benchmarks.postgres", *few],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "200", "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert "| await get |" in ended.stdout
    written = json.loads(report.read_text())
    assert written["machine"]["server"]
    cases = written["results"]
    assert len(cases) == 6
    for case in cases.values():
        assert {postgres.OURS, postgres.FILES} < case["us"].keys()
        assert {len(times) for times in case["us"].values()} == {2}
        assert case["ratio"] == postgres.ratios(case["us"])
    assert list(tmp_path.glob("benchmark-*")) == []
    assert sql(url, "SELECT count(*) FROM pg_tables WHERE tablename LIKE 'bench%'") == [(0,)]


def test_the_ratio_is_that_to_the_fastest_peer_of_the_repetition() -> None:
    """Ours in a file is no peer."""
    us = {postgres.OURS: [2.0, 4.0], postgres.FILES: [0.1, 0.1], "one": [1.0, 9.0], "other": [3.0, 2.0]}
    assert postgres.ratios(us) == [0.5, 0.5]


def test_a_wrong_result_is_no_figure(tmp_path: Path) -> None:
    """Rows that aren't what was put end the run."""
    rows = [(key("a", 1), b"right")]
    with postgres.job_at(fresh_url()) as job:
        postgres.fill(job, [(key("a", 1), b"wrong")])
        with pytest.raises(Mismatch):
            postgres.get_ours(job, rows)
    peer = postgres.Peer(postgres._bare(fresh_url()))
    try:
        peer.put([(key("a", 1), b"wrong")], "process", pipelined=False)
        with pytest.raises(Mismatch):
            peer.get(rows)
    finally:
        peer.drop()
