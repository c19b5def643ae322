"""Promises 6 and 7: children by fork and by multiprocessing, and processes that are told to end, lose nothing."""

from __future__ import annotations

import signal
import threading
from pathlib import Path

import pytest

from persistency import Misuse, Persistency, install_signal_handlers
from tests.crash.children import ROWS
from tests.crash.running import run

# From Python 3.12 on a fork beside threads is warned of; that it works is what is tested here.
QUIETLY = ("-W", "ignore:This process:DeprecationWarning")


def rows_in(root: Path, job_id: str) -> int:
    """Return how many rows a job has."""
    with Persistency(root) as persistency, persistency.open_job(job_id) as job:
        assert job.check().result(60) == []
        return job.count("rows").result(60)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_children_of_multiprocessing_lose_nothing(tmp_path: Path, method: str) -> None:
    """Children that return without closing leave every row, and so does their parent, by every start method."""
    done = run("tests.crash.children", "start", str(tmp_path), method, timeout=90, flags=QUIETLY)
    assert done.returncode == 0, done.stderr
    assert [rows_in(tmp_path, job_id) for job_id in ("own", "child0", "child1", "child2")] == [ROWS] * 4


def test_forks_beside_a_busy_worker(tmp_path: Path) -> None:
    """Of 40 children each is refused its parent's handles and has a job of its own; the parent loses nothing."""
    done = run("tests.crash.children", "fork", str(tmp_path), "40", timeout=90, flags=QUIETLY)
    assert done.returncode == 0, done.stderr
    assert [rows_in(tmp_path, f"child{number}") for number in range(0, 40, 13)] == [1] * 4


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_the_process_in_order(tmp_path: Path, name: str) -> None:
    """With the handlers installed a signal loses nothing, and the exit code is 128 and its number."""
    done = run("tests.crash.children", "end", str(tmp_path), name, timeout=60)
    assert done.returncode == 128 + getattr(signal, name), done.stderr
    assert rows_in(tmp_path, "own") == ROWS


def test_handlers_are_installed_in_the_main_thread_only() -> None:
    """Elsewhere Python takes none: `Misuse`, at the call."""
    raised: list[BaseException] = []

    def install() -> None:
        try:
            install_signal_handlers()
        except Misuse as error:
            raised.append(error)

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    assert [type(error) for error in raised] == [Misuse]
