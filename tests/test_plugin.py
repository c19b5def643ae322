"""The pytest plugin, in runs of pytest of its own; and the clock it gives, by itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Collection
from datetime import timedelta
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest

import pytest_persistency
from persistency import Change, ChangeFeed, Misuse, Persistency
from persistency.testing import ManualClock

TREE = Path(__file__).parent.parent
WAIT = 20.0
Run = Callable[..., "Ran"]
# The plugins of others that are installed here, by their names. Without them a run takes a fifth of the time.
OTHERS = frozenset(entry.name for entry in entry_points(group="pytest11")) - {"pytest_persistency"}


class Ran:
    """What became of a run: the exit code, how many tests had which outcome, and all that was said."""

    def __init__(self, finished: subprocess.CompletedProcess[str]) -> None:
        self.code = finished.returncode
        self.said = finished.stdout + finished.stderr
        last = next((line for line in reversed(finished.stdout.splitlines()) if re.search(r" in [\d.]+s", line)), "")
        self.outcomes = {kind.rstrip("s"): int(number) for number, kind in re.findall(r"(\d+) ([a-z]+)", last)}
        self.outcomes.pop("deselected", None)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Give what runs pytest on a file of tests, with every warning an error."""

    def run_on(
        program: str,
        *options: str,
        ini: str = "",
        conftest: str = "",
        site: Path | None = None,
        beside: Collection[str] = (),
    ) -> Ran:
        (tmp_path / "test_it.py").write_text(program)
        (tmp_path / "pytest.ini").write_text("[pytest]\n" + ini)
        (tmp_path / "conftest.py").write_text(conftest)
        path = os.pathsep.join(map(str, filter(None, (site, TREE))))
        fixed = ["-q", "-W", "error", "--strict-config", "--strict-markers", "-pno:cacheprovider"]
        without = [f"-pno:{name}" for name in sorted(OTHERS - set(beside))]
        command = [sys.executable, "-m", "pytest", *fixed, *without, f"--basetemp={tmp_path / 'base'}", *options]
        environment = {**os.environ, "PYTHONPATH": path, "PYTEST_ADDOPTS": "", "PYTEST_PLUGINS": ""}
        finished = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False
        )
        return Ran(finished)

    return run_on


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Give a directory in which this package is installed, as far as pytest looks."""
    entries = tomllib.loads((TREE / "pyproject.toml").read_text())["project"]["entry-points"]["pytest11"]
    told = tmp_path / "site" / "persistency-0.1.0.dist-info"
    told.mkdir(parents=True)
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: persistency\nVersion: 0.1.0\n")
    (told / "entry_points.txt").write_text("[pytest11]\n" + "".join(f"{n} = {m}\n" for n, m in entries.items()))
    (told / "RECORD").write_text("persistency/__init__.py,,\npytest_persistency.py,,\n")
    return told.parent


LOADED = ("-p", "pytest_persistency")

# -- the fixtures ------------------------------------------------------------------------------------------------------

SERVICE = """
import threading

import pytest

from persistency import ChangeFeed, Closed

seen = []


def test_a_row_ends(persistency_job, persistency_clock):
    persistency_job.put("session", ("ada",), b"token", ttl=60)
    persistency_clock.advance(59.999)
    assert persistency_job.get("session", ("ada",)).result() == b"token"
    persistency_clock.advance(0.001)
    assert persistency_job.get("session", ("ada",)).result() is None


@pytest.mark.persistency_job(feed_changes_max=10)
def test_a_feed_that_waits_is_told(persistency_job, persistency_clock):
    feed = ChangeFeed(persistency_job)
    kinds, arrived = [], threading.Semaphore(0)

    def follow():
        for change in feed:
            kinds.append(change.kind)
            arrived.release()

    following = threading.Thread(target=follow, daemon=True)
    following.start()
    persistency_job.put("c", (1,), b"", ttl=3600)
    assert arrived.acquire(timeout=20)
    persistency_job.flush().result()
    persistency_clock.advance(3600)
    assert arrived.acquire(timeout=20)
    feed.close()
    following.join(20)
    assert kinds == ["put", "expire"]


def test_names(persistency_job, persistency_store, persistency_root, persistency_clock):
    assert persistency_job.id == "test_names"
    assert persistency_store["test_names"] is persistency_job
    assert persistency_job.now_ms == persistency_clock.now * 1000
    assert persistency_store.root == str(persistency_root)
    assert KIND == ("memory" if persistency_job.path is None else "disk")
    seen.append(persistency_store)


def test_each_test_has_its_own(persistency_store, persistency_clock):
    assert persistency_store.stored_jobs() == []
    assert persistency_clock.now == 2_000_000_000
    with pytest.raises(Closed):
        seen[0].open_job("late")


@pytest.mark.persistency_job(feed_changes_max=10)
class TestOptions:
    @pytest.mark.persistency_job(max_bytes=5, job_id="mine")
    @pytest.mark.persistency_store(max_live_jobs=1)
    def test_of_markers(self, persistency_job, persistency_store):
        assert persistency_job.id == "mine"
        feed = ChangeFeed(persistency_job)
        persistency_job.put("c", (1,), b"12345")
        assert next(feed).kind == "put"
        with pytest.raises(Exception, match="would use 6 of 5 bytes"):
            persistency_job.commit([]).result()
            persistency_store["mine"].compare_and_set("c", (2,), None, b"6").result()

    @pytest.mark.persistency_store(root="memory", clock=lambda: 5.0)
    def test_of_the_store(self, persistency_job):
        assert (persistency_job.path, persistency_job.now_ms) == (None, 5000)


@pytest.mark.parametrize("odd", ["a/b\\0c", "\\u00e4" * 300, "x" * 5000, ".", "CON"])
def test_a_name_is_cut_to_what_a_file_can_have(odd, persistency_job):
    assert persistency_job.id.startswith("test_a_name_is_cut")
    persistency_job.flush().result()
"""


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_a_service_is_tested(run: Run, kind: str) -> None:
    """A store, a job named after the test, a clock that stands still; on disk, or in memory by the ini option."""
    # Beside whatever else is installed, except that one of them warns about its own settings.
    beside = OTHERS - {"asyncio"}
    ran = run(SERVICE.replace("KIND", repr(kind)), *LOADED, ini=f"persistency_root = {kind}\n", beside=beside)
    assert (ran.code, ran.outcomes) == (0, {"passed": 11}), ran.said


FAILING = """
import pytest
from persistency import Check, WriteFailed


def test_unseen(persistency_job):
    for number in range(25):
        persistency_job.persist(Check("c", (number,), 5))


def test_seen(persistency_job):
    persistency_job.persist(Check("c", (1,), 5))
    with pytest.raises(WriteFailed):
        persistency_job.flush().result()


def test_of_another_job(persistency_store):
    persistency_store.open_job("other").persist(Check("secret", ("k",), 5))


def test_closed_by_itself(persistency_store):
    job = persistency_store.open_job("other")
    job.persist(Check("c", (1,), 5))
    with pytest.raises(WriteFailed):
        persistency_store.close()
"""


def test_a_write_that_failed_unseen_fails_the_test(run: Run) -> None:
    """At its end, with what failed and why; but not the test that has looked."""
    ran = run(FAILING, *LOADED)
    assert ran.outcomes == {"passed": 4, "error": 2}, ran.said
    assert re.findall(r"ERROR at teardown of (\w+)", ran.said) == ["test_unseen", "test_of_another_job"]
    assert "25 posted writes failed, and the test didn't look" in ran.said
    assert ran.said.count("(not applied)\n") >= 21  # twenty, and one of the other
    assert "  and 5 more\n" in ran.said
    assert "1 posted write failed, and the test didn't look" in ran.said
    assert "Check 'secret' ('k',): Conflict: key('k'): expected version 5, found no row" in ran.said
    assert "During handling" not in ran.said


def test_wrong_settings_say_so(run: Run) -> None:
    """A root that there isn't, in the ini option before anything runs, in a marker where it stands."""
    ran = run("def test_nothing(): pass", *LOADED, ini="persistency_root = tape\n")
    assert ran.code == pytest.ExitCode.USAGE_ERROR
    assert "persistency_root must be one of disk, memory, not 'tape'" in ran.said
    program = """
import pytest
@pytest.mark.persistency_store(root="tape")
def test_root(persistency_store): pass
@pytest.mark.persistency_job("alpha")
def test_place(persistency_job): pass
@pytest.mark.persistency_job(max_byte=3)
def test_option(persistency_job): pass
@pytest.mark.persistency_store(max_live_jobs=0)
def test_value(persistency_store): pass
"""
    ran = run(program, *LOADED)
    assert ran.outcomes == {"error": 4}, ran.said
    assert "root in the marker persistency_store must be one of disk, memory, not 'tape'" in ran.said
    assert "the marker persistency_job takes options by their names, not 'alpha'" in ran.said
    assert "unexpected keyword argument 'max_byte'" in ran.said
    assert "max_live_jobs must be at least 1" in ran.said


def test_the_root_can_be_the_project_s_own(run: Run) -> None:
    """A fixture of that name in a conftest stands in for it: here each test runs on either."""
    conftest = """
import pytest

@pytest.fixture(params=["disk", "memory"])
def persistency_root(request, tmp_path):
    return ":memory:" if request.param == "memory" else tmp_path / "elsewhere"
"""
    program = """
def test_it(persistency_job, persistency_root):
    assert (persistency_job.path is None) == (persistency_root == ":memory:")
"""
    ran = run(program, *LOADED, conftest=conftest)
    assert ran.outcomes == {"passed": 2}, ran.said


# -- how it is loaded --------------------------------------------------------------------------------------------------

ONE = """
import sys

def test_one(persistency_job):
    loader = type(sys.modules["persistency"].__loader__).__name__
    assert loader == "SourceFileLoader", "the package was compiled anew by pytest"
    assert persistency_job.version().result() == 0
"""


@pytest.mark.parametrize("conftest", ["", 'pytest_plugins = ["pytest_persistency"]\n'])
@pytest.mark.parametrize("options", [(), LOADED])
def test_it_is_loaded_once_however_often_it_is_named(
    run: Run, site: Path, conftest: str, options: tuple[str, ...]
) -> None:
    """By its entry point alone, and by a conftest and the command line as well; the package isn't rewritten by that."""
    ran = run(ONE, *options, conftest=conftest, site=site)
    assert (ran.code, ran.outcomes) == (0, {"passed": 1}), ran.said


def test_it_can_be_left_out(run: Run, site: Path) -> None:
    """By the short name, in spite of the entry point."""
    ran = run(ONE, "-p", "no:persistency", site=site)
    assert ran.outcomes == {"error": 1}
    assert "fixture 'persistency_job' not found" in ran.said


def test_it_works_in_several_processes(run: Run, site: Path) -> None:
    """`-n 2`, each with roots of its own; a failure at the end of a test is told from there too."""
    ran = run(FAILING, "-n", "2", site=site, beside={"xdist"})
    assert ran.outcomes == {"passed": 4, "error": 2}, ran.said


def test_coroutines_take_the_fixtures_too(run: Run) -> None:
    """Beside a plugin that runs tests in an event loop."""
    program = """
import pytest

@pytest.fixture
def anyio_backend():
    return "asyncio"

@pytest.mark.anyio
async def test_it(persistency_job, persistency_store, persistency_clock):
    persistency_job.put("c", (1,), b"x", ttl=10)
    assert await persistency_job.get("c", (1,)) == b"x"
    persistency_clock.advance(10)
    assert await persistency_job.get("c", (1,)) is None
    other = await persistency_store.aopen_job("other")
    assert await other.count("c") == 0
"""
    ran = run(program, *LOADED, beside={"anyio"})
    assert (ran.code, ran.outcomes) == (0, {"passed": 1}), ran.said


def test_who_uses_no_fixture_imports_nothing(run: Run, site: Path) -> None:
    """Every run of pytest on a machine that has the package loads the plugin: it is one small module."""
    program = """
import sys

def test_it():
    assert "pytest_persistency" in sys.modules
    assert not {"persistency", "apsw", "cbor2"} & set(sys.modules)
"""
    ran = run(program, site=site)
    assert (ran.code, ran.outcomes) == (0, {"passed": 1}), ran.said
    asked = "import sys, pytest; had = set(sys.modules); import pytest_persistency; print(*set(sys.modules) - had)"
    told = subprocess.run(
        [sys.executable, "-c", asked], cwd=TREE, capture_output=True, text=True, check=True, timeout=60
    )
    assert told.stdout.split() == ["pytest_persistency"]


def test_the_clock_needs_neither_pytest_nor_the_checks() -> None:
    """`persistency.testing` is of use without pytest, and what isn't asked for isn't imported."""
    program = """
import sys
sys.modules["pytest"] = None
from persistency.testing import ManualClock
assert ManualClock().now == 2_000_000_000
assert "persistency.testing.suite" not in sys.modules
from persistency.testing import *
assert "persistency.testing.suite" in sys.modules
import persistency.testing as testing
assert {name for name in testing.__all__ if globals()[name] is getattr(testing, name)} == set(testing.__all__)
assert set(testing.__all__) <= set(dir(testing))
try:
    testing.StoreConformances
except AttributeError as error:
    assert "StoreConformances" in str(error)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", program], cwd=TREE, check=True, timeout=60)


def test_the_module_says_what_it_is() -> None:
    """It stands outside of the package, but in the same house: its rules are written down."""
    opening = str(pytest_persistency.__doc__)
    assert "Rules:" in opening
    assert "Doesn't know" in opening


# -- the clock ---------------------------------------------------------------------------------------------------------


def test_a_clock_stands_still_until_it_is_moved() -> None:
    """To the millisecond, however often; and to wherever it is set."""
    clock = ManualClock(1000)
    assert (clock(), clock.now) == (1000, 1000)
    for _ in range(1000):
        clock.advance(0.1)
    assert clock.now == 1100
    clock.advance(timedelta(hours=1))
    clock.advance(0)
    assert clock() == 4700
    clock.now = 12.5
    assert clock() == 12.5
    assert repr(clock) == "<ManualClock at 12.5>"
    assert ManualClock().now == ManualClock().now


@pytest.mark.parametrize("wrong", [-1, timedelta(seconds=-1), "60", None, True, float("nan"), float("inf")])
def test_a_clock_is_moved_by_seconds(wrong: Any) -> None:
    """Forwards only; and what is refused has not moved it."""
    clock = ManualClock(1000)
    with pytest.raises(Misuse):
        clock.advance(wrong)
    assert clock.now == 1000
    if not isinstance(wrong, int) or isinstance(wrong, bool):
        with pytest.raises(Misuse):
            clock.now = wrong
        with pytest.raises(Misuse):
            ManualClock(wrong)


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_a_feed_that_waits_is_told_of_rows_that_end(kind: str, tmp_path: Path) -> None:
    """Moving a clock wakes the jobs of the store it is attached to, though nobody asks them anything."""
    clock = ManualClock()
    with Persistency(tmp_path if kind == "disk" else ":memory:", clock=clock) as persistency:
        clock.attach(persistency)
        job = persistency.open_job("job", feed_changes_max=10)
        feed = ChangeFeed(job)
        changes: list[Change] = []
        arrived = threading.Semaphore(0)

        def follow() -> None:
            for change in feed:
                changes.append(change)
                arrived.release()

        following = threading.Thread(target=follow, daemon=True)
        following.start()
        job.put("c", (1,), b"", ttl=3600)
        assert arrived.acquire(timeout=WAIT)
        job.flush().result(WAIT)
        version = job.version().result(WAIT)
        clock.advance(3600)
        assert arrived.acquire(timeout=WAIT)
        feed.close()
        following.join(WAIT)
        assert [change.kind for change in changes] == ["put", "expire"]
        assert job.version().result(WAIT) == version + 1  # the end of the row; the clock has written nothing


def test_a_clock_moves_whatever_became_of_the_jobs(tmp_path: Path) -> None:
    """Jobs that are closed, over or full, and stores that are closed, or gone."""
    clock = ManualClock()
    with Persistency(tmp_path, clock=clock) as persistency:
        clock.attach(persistency)
        closed = persistency.open_job("closed")
        closed.close()
        over = persistency.open_job("over", ttl=10)
        clock.advance(5)
        assert not over.closed
        clock.advance(5)
        assert over.closed
        clock.advance(5)
    clock.advance(5)
    del persistency, closed, over
    clock.advance(5)
    assert clock.now == 2_000_000_025
