"""Exit: a process that ends without closing anything loses nothing, hangs nothing, and says what it couldn't do.

Each case is a process of its own (`tests.crash.exits`) with a time limit; then its job is opened again.
"""

from __future__ import annotations

import gc
import re
import signal
import sqlite3
import subprocess
from pathlib import Path

import pytest

from persistency import Persistency
from tests.crash.held import PENDING
from tests.crash.late import FIRST, PLACES, VERBS
from tests.crash.running import run

SIGINT = -signal.SIGINT


def end(*arguments: str | Path, program: str = "exits", timeout: float = 20) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    given = list(map(str, arguments))
    done = run(f"tests.crash.{program}", *given, timeout=timeout)
    print(f"python -m tests.crash.{program} {' '.join(given)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done


def rows(root: Path, job_id: str = "alpha") -> list[int]:
    """Open a job again and return the numbers of its rows; look at the payloads as well."""
    with Persistency(root) as persistency, persistency.open_job(job_id) as job:
        found = job.scan("rows").result()
    numbers = [row.key.parts[0] for row in found]
    assert [row.payload for row in found] == [b"%d" % number for number in numbers]
    return numbers


def check_tidy(root: Path, job_id: str = "alpha") -> None:
    """Check that a job's file was left in order: nothing in the log, the clean mark set."""
    path = root / f"{job_id}.db"
    log = path.with_name(path.name + "-wal")
    assert not log.exists() or log.stat().st_size == 0
    # As it stands: without the log, and without a lock that another reader would have to respect.
    connection = sqlite3.connect(f"file:{path}?immutable=1", uri=True)
    try:
        meta = dict(connection.execute("SELECT name, value FROM meta"))
        count, last_version = connection.execute("SELECT count(*), max(version) FROM kv").fetchone()
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        connection.close()
    assert meta["clean"] == 1
    assert meta["last_version"] == (last_version or 0) == count


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("returns", 0, ""),
        ("drops_handles", 0, ""),
        ("exits_with_0", 0, ""),
        ("exits_with_3", 3, ""),
        ("exits_with_a_word", 1, "good bye"),
        ("raises", 1, "LookupError: nobody catches this"),
        ("raises_in_thread", 0, "LookupError: nobody catches this"),
        ("interrupted", SIGINT, "KeyboardInterrupt"),
        ("asyncio_run", 0, ""),
        ("trio_run", 0, ""),
        ("trio_exits", 3, ""),
        ("trio_interrupted", SIGINT, "KeyboardInterrupt"),
    ],
)
def test_pending_writes_survive_exit(tmp_path: Path, name: str, code: int, told: str) -> None:
    """10,000 writes that wait when the exit hooks begin are written, however the process came to its end."""
    done = end(name, tmp_path)
    assert done.stdout == f"pending {PENDING}\n"
    assert done.returncode == code
    assert told in done.stderr
    assert told or not done.stderr
    check_tidy(tmp_path)
    assert rows(tmp_path) == list(range(PENDING))


@pytest.mark.parametrize(
    ("name", "code"),
    [("posts_in_thread_and_raises", 0), ("interrupted_in_flush", SIGINT), ("closes_too_late", 0)],
)
def test_posted_writes_survive_exit(tmp_path: Path, name: str, code: int) -> None:
    """Writes survive a poster that dies, a flush that is interrupted, and a close that was given up."""
    done = end(name, tmp_path)
    assert done.returncode == code
    check_tidy(tmp_path)
    assert rows(tmp_path) == list(range(PENDING))


def test_several_jobs_survive_exit(tmp_path: Path) -> None:
    """Every open job is drained at exit, not just the first."""
    done = end("returns_from_several", tmp_path)
    assert done.returncode == 0
    assert done.stdout == f"pending {PENDING} {PENDING} {PENDING}\n"
    assert not done.stderr
    for job_id in ("alpha", "beta", "gamma"):
        check_tidy(tmp_path, job_id)
        assert rows(tmp_path, job_id) == list(range(PENDING))


def test_idle_job_is_left_tidy(tmp_path: Path) -> None:
    """A job that has nothing to do at exit, but was never closed, leaves a clean file as well."""
    done = end("idle", tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    check_tidy(tmp_path)
    assert rows(tmp_path) == list(range(10))


@pytest.mark.parametrize("name", ["posts_until_the_end", "posts_batches_until_the_end"])
def test_endless_poster_does_not_hold_exit_up(tmp_path: Path, name: str) -> None:
    """A daemon thread that posts without a pause doesn't keep the process from ending, and leaves a prefix."""
    done = end(name, tmp_path, timeout=15)
    assert done.returncode == 0
    assert not done.stderr
    numbers = rows(tmp_path)
    assert len(numbers) >= 100
    assert numbers == list(range(len(numbers)))


@pytest.mark.parametrize(("name", "code"), [("os_exit", 7), ("terminated", -signal.SIGTERM)])
def test_hard_end_leaves_a_prefix(tmp_path: Path, name: str, code: int) -> None:
    """`os._exit`, and a SIGTERM nobody handles, take only what wasn't committed, and leave a prefix."""
    done = end(name, tmp_path)
    assert done.returncode == code
    numbers = rows(tmp_path)
    assert PENDING // 2 <= len(numbers) <= PENDING
    assert numbers == list(range(len(numbers)))


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "job_id", "count"),
    [("blocked", "alpha", PENDING), ("blocked_beside_another", "beta", 123), ("disk_full", "alpha", PENDING)],
)
def test_fault_at_exit_is_told(tmp_path: Path, name: str, job_id: str, count: int) -> None:
    """What can't be written within `exit_timeout` is told on stderr with the job and the exact count; nothing hangs."""
    done = end(name, tmp_path, timeout=10)
    assert done.returncode == 0
    told = [line for line in done.stderr.splitlines() if "at exit" in line]
    assert len(told) == 1
    assert repr(job_id) in told[0]
    assert re.findall(r"\b\d+ operations", told[0]) == [f"{count} operations"]
    assert "Traceback" not in done.stderr
    assert rows(tmp_path, job_id) == []
    if name == "blocked_beside_another":
        check_tidy(tmp_path)
        assert rows(tmp_path) == list(range(PENDING))


def test_fault_that_passes_costs_nothing(tmp_path: Path) -> None:
    """A disk that is full for a while at exit is waited for, and everything is written."""
    done = end("disk_full_for_a_while", tmp_path)
    assert done.returncode == 0
    assert "at exit" not in done.stderr
    check_tidy(tmp_path)
    assert rows(tmp_path) == list(range(PENDING))


@pytest.mark.parametrize("name", ["interrupted_in_hook", "interrupted_as_hook_begins"])
def test_interrupted_hook_loses_nothing_silently(tmp_path: Path, name: str) -> None:
    """A SIGINT in the middle of the exit hook: everything is written all the same."""
    done = end(name, tmp_path)
    assert rows(tmp_path) == list(range(PENDING)), done.stderr


def test_hook_that_is_interrupted_twice_gives_up(tmp_path: Path) -> None:
    """A second SIGINT ends the waiting for a store that never comes back; stderr has the job and the exact count."""
    done = end("interrupted_twice_in_hook", tmp_path, timeout=10)
    told = [line for line in done.stderr.splitlines() if "'alpha'" in line]
    assert len(told) == 1
    assert f" {PENDING} operations" in told[0]
    assert rows(tmp_path) == []


def test_failed_event_is_told_at_exit(tmp_path: Path) -> None:
    """An event that fails by itself only at exit still reaches `on_error` and the log; its neighbours are written."""
    done = end("failed_event", tmp_path)
    assert done.returncode == 0
    assert done.stdout == "failed alpha 2\n"
    assert "2 operation(s) failed" in done.stderr
    assert rows(tmp_path) == list(range(10))


# -- late writers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("verb", sorted(VERBS))
@pytest.mark.parametrize("place", sorted(PLACES))
def test_late_use_is_served(tmp_path: Path, place: str, verb: str) -> None:
    """An earlier exit hook, a thread that outlives main and a `__del__` at the end use a job as ever; nothing hangs."""
    done = end(place, verb, tmp_path, program="late")
    assert done.returncode == 0
    assert "done" in done.stdout.splitlines()
    assert not done.stderr
    written = "beta" if verb == "open" else "alpha"
    # The exit hook comes after the threads that outlive main; what is written after the hook is committed, no more.
    if place == "thread" or verb == "close":
        check_tidy(tmp_path, written)
    if written == "beta":
        check_tidy(tmp_path)
        assert rows(tmp_path) == list(range(PENDING))
        assert rows(tmp_path, "beta") == list(range(21))
    else:
        assert rows(tmp_path) == list(range(PENDING + 20))
    check_tidy(tmp_path, written)  # `rows` has opened and closed it


@pytest.mark.parametrize("place", sorted(FIRST))
def test_first_use_in_a_hook(tmp_path: Path, place: str) -> None:
    """The package's first use, or its import, in an exit hook works: what is written there is in the file."""
    done = end(place, "put", tmp_path, program="late")
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert rows(tmp_path) == list(range(100))
    check_tidy(tmp_path)  # `rows` has opened and closed it


# -- a dropped one ----------------------------------------------------------------------------------------------------


def test_dropped_persistency_warns(tmp_path: Path) -> None:
    """A `Persistency` that is dropped with a job open warns of it; one that was closed, or never used, doesn't."""
    used = [Persistency(tmp_path)]
    job = used[0].open_job("alpha")
    with pytest.warns(ResourceWarning, match="unclosed"):
        used.clear()
    job.put("rows", (0,), b"0")
    job.close()
    assert rows(tmp_path) == [0]
    unused = Persistency(tmp_path)
    closed = Persistency(tmp_path)
    closed.open_job("alpha")
    closed.close()
    del unused, closed
    gc.collect()
