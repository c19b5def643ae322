"""Children of `multiprocessing` that post and return without closing anything lose nothing, however they were started.

Each case is a process of its own (`tests.crash.spawned`) whose children's workers are held until their exit hook, so
that 10,000 rows are pending when their work is over. `python -m tests.soak forks` tries every form on every Python.
"""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from tests.crash.spawned import play_spawned

METHODS = multiprocessing.get_all_start_methods()


@pytest.mark.parametrize("method", METHODS)
def test_children_lose_nothing(tmp_path: Path, method: str) -> None:
    """Promise 6: every row of processes that return is written, and every row of their busy parent."""
    assert play_spawned(tmp_path, method, "process", "returns") == []


@pytest.mark.parametrize("end", ["exits", "raises", "nests"])
def test_children_end_in_any_way(tmp_path: Path, end: str) -> None:
    """By `sys.exit`, by an exception, with a child of their own."""
    assert play_spawned(tmp_path, "fork", "process", end) == []


@pytest.mark.parametrize("method", METHODS)
def test_late_threads_of_children_are_served(tmp_path: Path, method: str) -> None:
    """A thread that outlives a child's work posts, reads and opens another job; what it writes is there."""
    assert play_spawned(tmp_path, method, "process", "late") == []


@pytest.mark.parametrize("how", ["pool", "executor"])
@pytest.mark.parametrize("method", METHODS)
def test_workers_of_a_pool_lose_nothing(tmp_path: Path, method: str, how: str) -> None:
    """What tasks have posted is written when their processes are told that there is nothing more to do."""
    assert play_spawned(tmp_path, method, how, "returns") == []


def test_what_children_have_inherited_is_refused(tmp_path: Path) -> None:
    """Promise 7, under `multiprocessing`: `Forked` for the parent's handles; its root can be opened anew."""
    assert play_spawned(tmp_path, "fork", "process", "inherits") == []


@pytest.mark.parametrize("method", ["fork"])
def test_planted_defect_is_seen(tmp_path: Path, method: str) -> None:
    """Where `multiprocessing` isn't told of the exit hook, its children's rows are lost, on every Python."""
    wrong = play_spawned(tmp_path, method, "process", "returns", plant="no Finalize")
    assert wrong == ["lost: child-0 has 0 rows of 10000", "lost: child-1 has 0 rows of 10000"]
