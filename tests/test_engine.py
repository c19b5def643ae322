"""The root: jobs opened, found, closed and dropped by their ids, from many threads, objects and processes."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import stat
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import anyio
import pytest

from persistency import (
    Check,
    Closed,
    Conflict,
    Corrupt,
    Job,
    JobLocked,
    JobNotFound,
    Misuse,
    Persistency,
    PersistencyError,
    Poisoned,
    Put,
    StorageError,
    StoredJob,
    Unavailable,
    WriteFailed,
    key,
)
from persistency.actor.mailbox import Mailbox
from persistency.storage.directory import DirectoryRoot
from persistency.storage.memory import MemoryStore
from persistency.storage.port import PLACES
from persistency.storage.sqlite import SqliteStore
from tests.loops import LOOPS, InLoop, Task, turns

WAIT = 20.0  # seconds a test waits for what must come
NEVER = Check("c", ("never",), 10**6)  # a check that fails
T = TypeVar("T")

WEIRD_IDS = [
    "alpha", "Alpha", "a.b", ".hidden", "trailing.", "..", ".", "a/b", "../../etc/passwd", "/etc/passwd", "con", "NUL",
    "com1.txt", "ü", "日本", "a b", "a%2Fb", "%", "-", "_", "line\nfeed", "nul\0byte", "emoji 🙂", "alpha.db",
    "alpha.db-wal", "'; DROP TABLE kv; --", "~", "*",
]  # fmt: skip


class Gate:
    """Holds what a store is about to do until it is released; anything else passes."""

    def __init__(self) -> None:
        self.may_go = threading.Event()
        self.entered = threading.Semaphore(0)
        self.times = 0

    def __call__(self) -> None:
        """Come in, and wait."""
        self.times += 1
        self.entered.release()
        assert self.may_go.wait(WAIT)

    def wait(self) -> None:
        """Wait until somebody has come in."""
        assert self.entered.acquire(timeout=WAIT)


_workers_before: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@pytest.fixture(autouse=True)
def _look_at_the_workers_before() -> None:
    """Note the jobs that other tests have left open, so that only theirs are blamed for them."""
    _workers_before.update(workers())


@pytest.fixture
def gate() -> Iterator[Gate]:
    """Give a gate that is open at the end, whatever happened."""
    gate = Gate()
    yield gate
    gate.may_go.set()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Name a root that doesn't exist yet."""
    return tmp_path / "root"


@pytest.fixture
def persistency(root: Path) -> Iterator[Persistency]:
    """Give a root on a directory."""
    with Persistency(root) as opened:
        yield opened


@pytest.fixture
def singleton() -> Iterator[None]:
    """See that there is no process-wide instance, before and after."""
    Persistency.reset()
    yield
    Persistency.reset()


def in_thread(fn: Callable[[], T]) -> Future[T]:
    """Run a function in a daemon thread of its own; the future has what it returns or raises."""
    future: Future[T] = Future()

    def body() -> None:
        try:
            future.set_result(fn())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    return future


def together(count: int, fn: Callable[[int], T]) -> list[T]:
    """Run a function in many threads that begin at the same moment; return what they return."""
    barrier = threading.Barrier(count)

    def body(number: int) -> T:
        barrier.wait(WAIT)
        return fn(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(body, range(count)))


def workers() -> list[threading.Thread]:
    """Return the threads of jobs that were opened in this test."""
    return [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("persistency:") and thread not in _workers_before
    ]


def assert_no_worker_is_left(*names: str) -> None:
    """Wait for the workers that are ending, and check that none goes on."""
    for thread in workers():
        if not names or thread.name.removeprefix("persistency:") in names:
            thread.join(WAIT)
            assert not thread.is_alive(), thread.name


def held(monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    """Have every group that has a put into the category "held" wait at the gate."""
    for kind in (MemoryStore, SqliteStore):
        apply = kind.apply

        def guarded(store: Any, group: list[Any], now_ms: int, apply: Any = apply) -> Any:
            if b"held" in group[::PLACES]:
                gate()
            return apply(store, group, now_ms)

        monkeypatch.setattr(kind, "apply", guarded)


def openings(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]) -> None:
    """Have something done before a store is opened."""
    really = DirectoryRoot.open

    def open_store(self: DirectoryRoot, job_id: str, *args: Any) -> Any:
        before(job_id)
        return really(self, job_id, *args)

    monkeypatch.setattr(DirectoryRoot, "open", open_store)


# -- the root as a directory --------------------------------------------------------------------------------------


def test_without_a_job_there_is_no_file_and_no_thread(root: Path) -> None:
    """S3-5, S3-6: making a `Persistency`, asking it and closing it leaves no trace."""
    threads = set(threading.enumerate())
    with Persistency(root) as persistency:
        assert not persistency.has_job("a")
        assert persistency.stored_jobs() == []
        assert persistency.drop_job("a") == []
        persistency.close_job("a")
        assert set(threading.enumerate()) <= threads
        assert not root.exists()
    assert list(root.parent.iterdir()) == []


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_the_first_job_creates_the_root(tmp_path: Path, umask: int) -> None:
    """S3-5, S3-25, S3-90: the root comes with missing parents, mode 0700, files 0600, whatever the umask."""
    (tmp_path / "existing").mkdir()
    parents = tmp_path / "existing" / ("" if umask == 0o777 else "missing/parents")
    before = os.umask(umask)
    try:
        with Persistency(parents / "root") as persistency:
            job = persistency.open_job("a")
            job.commit(Put("c", ("k",), b"")).result(WAIT)
            assert job.path == parents / "root" / "a.db"
            files = list((parents / "root").iterdir())
            modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in files}
    finally:
        os.umask(before)
    assert stat.S_IMODE((parents / "root").stat().st_mode) == 0o700
    assert {"a.db", "a.lock"} <= modes.keys()
    assert set(modes.values()) == {0o600}


def test_other_files_of_the_root_are_untouched(root: Path) -> None:
    """S3-4: an existing directory is taken as it is, with its mode; what else lies in it stays."""
    root.mkdir(mode=0o750)
    root.chmod(0o750)
    (root / "do-not-touch.txt").write_text("mine")
    (root / "folder").mkdir()
    with Persistency(root) as persistency:
        persistency.open_job("a").put("c", ("k",), b"")
        assert [job.job_id for job in persistency.stored_jobs()] == ["a"]
        persistency.drop_job("a")
    assert sorted(path.name for path in root.iterdir()) == ["do-not-touch.txt", "folder"]
    assert (root / "do-not-touch.txt").read_text() == "mine"
    assert stat.S_IMODE(root.stat().st_mode) == 0o750


def test_a_root_may_be_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative root is the one of the moment it was named; changing the directory later moves nothing."""
    monkeypatch.chdir(tmp_path)
    with Persistency("root") as persistency:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        job = persistency.open_job("a")
        assert job.path == tmp_path / "root" / "a.db"
        assert persistency.root == str(tmp_path / "root")
    assert list((tmp_path / "elsewhere").iterdir()) == []


# -- opening ------------------------------------------------------------------------------------------------------


def test_opening_an_open_job_gives_the_same_handle(persistency: Persistency, in_loop: InLoop) -> None:
    """S3-26: `open_job` is idempotent, also in event loops and with options that don't differ."""
    job = persistency.open_job("a", mailbox_ops_max=10, durability="power", full_timeout=60)
    assert persistency.open_job("a") is job
    assert persistency.open_job("a", mailbox_ops_max=10, durability="power", full_timeout=60.0) is job
    assert in_loop(persistency.aopen_job, "a", mailbox_ops_max=10) is job
    assert persistency.open_job("b") is not job
    job.close(WAIT)
    again = persistency.open_job("a")
    assert again is not job
    assert not again.closed
    assert job.closed


def test_options_that_differ_are_named(persistency: Persistency, in_loop: InLoop) -> None:
    """Options given that differ from the open job's are `Misuse` and named; the job stays as it is."""

    def on_error(_job_id: str, _failures: Any) -> None:
        raise AssertionError

    job = persistency.open_job("a", mailbox_ops_max=10)
    differing: dict[str, Any] = {
        "durability": "power", "mailbox_ops_max": 11, "mailbox_bytes_max": 1, "requests_max": 1, "on_full": "raise",
        "full_timeout": None, "stall_timeout": 1, "inline": False, "on_error": on_error,
    }  # fmt: skip
    for name, value in differing.items():
        with pytest.raises(Misuse) as caught:
            persistency.open_job("a", **{name: value})
        assert name in str(caught.value)
        assert "'a'" in str(caught.value)
        assert sum(other in str(caught.value) for other in differing) == 1
    with pytest.raises(Misuse, match=r"durability.*requests_max"):
        in_loop(persistency.aopen_job, "a", requests_max=1, durability="power")
    assert persistency.open_job("a", mailbox_ops_max=10) is job
    job.close(WAIT)
    persistency.open_job("a", **differing)


def test_a_job_without_an_id_gets_a_fresh_one(persistency: Persistency, in_loop: InLoop) -> None:
    """No id: 24 hex digits that nobody can guess, another one each time, that opens the same job later."""
    jobs = [persistency.open_job() for _ in range(5)] + [in_loop(persistency.aopen_job)]
    ids = [job.id for job in jobs]
    assert len(set(ids)) == len(ids)
    assert all(len(job_id) == 24 and set(job_id) <= set("0123456789abcdef") for job_id in ids)
    assert sorted(persistency) == sorted(ids)
    jobs[0].put("c", ("k",), b"1")
    jobs[0].close(WAIT)
    assert persistency.open_job(ids[0]).get("c", ("k",)).result(WAIT) == b"1"


def test_a_job_that_is_opened_again_has_its_data(root: Path) -> None:
    """S3-27, S3-88: data are there when the job is opened again, by this `Persistency` or another."""
    with Persistency(root) as persistency:
        persistency.open_job("a").put("c", ("k",), b"1")
        persistency.close_job("a")
        assert persistency.open_job("a").get("c", ("k",)).result(WAIT) == b"1"
    with Persistency(root) as persistency, persistency.open_job("a") as job:
        assert job.scan("c").result(WAIT) == [(key("k"), b"1")]


def test_opening_is_single_flight(persistency: Persistency, monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    """S3-45, D-23: of 32 threads that open one job at once, one opens the store and all get the same handle."""
    openings(monkeypatch, lambda _job_id: gate())
    opening = in_thread(lambda: together(32, lambda _number: persistency.open_job("a")))
    gate.wait()
    gate.may_go.set()
    jobs = opening.result(WAIT)
    assert len({id(job) for job in jobs}) == 1
    assert gate.times == 1
    jobs[0].put("c", ("k",), b"1")
    assert jobs[1].get("c", ("k",)).result(WAIT) == b"1"


def test_opening_is_single_flight_for_tasks_too(
    persistency: Persistency, monkeypatch: pytest.MonkeyPatch, gate: Gate, in_loop: InLoop
) -> None:
    """S3-46: many tasks open one job without blocking their loop, and get the same handle of one opening."""
    openings(monkeypatch, lambda _job_id: gate())

    async def main() -> None:
        async with anyio.create_task_group() as group:
            tasks = [Task(group, persistency.aopen_job("a")) for _ in range(32)]
            await turns()  # the loop goes on, while nobody can have opened the job
            assert all(task.begun and not task.done for task in tasks)
            gate.may_go.set()
            assert len({id(await task) for task in tasks}) == 1

    in_loop(main)
    assert gate.times == 1


def test_a_failed_opening_raises_the_cause_in_every_waiter(
    persistency: Persistency, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    """S3-28, S3-29, S3-31: all who wait get the real error, nothing is left, and the job can be opened again."""
    cause = OSError(5, "the disk is on fire")
    failing = True

    def fail(_job_id: str) -> None:
        gate()
        if failing:
            raise cause

    openings(monkeypatch, fail)

    def attempt(_number: int) -> BaseException | Job:
        try:
            return persistency.open_job("a")
        except BaseException as error:
            return error

    opening = in_thread(lambda: together(8, attempt))
    gate.wait()
    gate.may_go.set()
    assert all(error is cause for error in opening.result(WAIT))
    assert "a" not in persistency
    assert_no_worker_is_left("a")
    failing = False
    persistency.open_job("a").put("c", ("k",), b"1")
    assert persistency["a"].get("c", ("k",)).result(WAIT) == b"1"


def test_a_job_whose_thread_can_not_be_started_can_be_opened_later(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3-30: where no thread can be started, opening raises why, and works once there is one."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "persistency:a":
            raise RuntimeError("can't start new thread")
        start(thread)

    with Persistency(root, open_timeout=3.0) as persistency:
        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuse)
            with pytest.raises((RuntimeError, PersistencyError), match="can't start new thread"):
                persistency.open_job("a")
        assert "a" not in persistency
        with persistency.open_job("a") as job:
            job.put("c", ("k",), b"")


def test_opening_takes_no_longer_than_its_timeout(
    root: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate, in_loop: InLoop
) -> None:
    """`open_timeout`: a job that doesn't open in time is `TimeoutError`; the late opening is undone by itself."""
    openings(monkeypatch, lambda _job_id: gate())
    with Persistency(root, open_timeout=0.05) as impatient, Persistency(root) as patient:
        with pytest.raises(TimeoutError):
            impatient.open_job("a")
        with pytest.raises(TimeoutError):
            in_loop(impatient.aopen_job, "a")
        assert "a" not in impatient
        later = in_thread(lambda: patient.open_job("a"))
        gate.may_go.set()
        later.result(WAIT).put("c", ("k",), b"1")
        assert list(patient) == ["a"]
    assert_no_worker_is_left("a")


def test_a_cancelled_opening_leaves_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate, in_loop: InLoop
) -> None:
    """A task that is cancelled while its job opens holds no lease: the job is closed, and can be dropped."""
    openings(monkeypatch, lambda _job_id: gate())
    with Persistency(root) as persistency:

        async def main() -> None:
            async with anyio.create_task_group() as group:
                task = Task(group, persistency.aopen_job("a"))
                await turns()
                task.cancel()
            assert task.begun
            assert task.cancelled

        in_loop(main)
        gate.may_go.set()
        assert "a" not in persistency
        with Persistency(root) as other:
            other.drop_job("a")  # it would be `JobLocked` if anybody still had it open
    assert_no_worker_is_left("a")


def test_jobs_open_and_close_in_an_event_loop(root: Path, in_loop: InLoop) -> None:
    """S3-46: `aopen_job`, `aclose`, `adrop_job` and `async with` do what their namesakes do."""

    async def main() -> None:
        async with Persistency(root) as persistency:
            job = await persistency.aopen_job("a", mailbox_ops_max=100)
            job.put("c", ("k",), b"1")
            assert await job.get("c", ("k",)) == b"1"
            await job.aclose()
            assert job.closed
            async with await persistency.aopen_job("a") as job:
                assert await job.count("c") == 1
            job = await persistency.aopen_job("a")
            paths = await persistency.adrop_job("a")
            assert root / "a.db" in paths
            assert job.closed
            assert await persistency.adrop_job("a") == []
            left = await persistency.aopen_job("b")
            left.persist(NEVER)
            with pytest.raises(WriteFailed):
                await persistency.aclose()
            assert left.closed
            await persistency.aclose()
            with pytest.raises(Closed):
                await persistency.aopen_job("c")

    in_loop(main)
    assert_no_worker_is_left()


# -- finding jobs -------------------------------------------------------------------------------------------------


def test_jobs_are_found_by_their_ids(persistency: Persistency) -> None:
    """S3-41..44: `job`, `[]`, `in`, `has_job` and iteration know the open jobs, and no others."""
    assert list(persistency) == []
    assert len(persistency) == 0
    assert persistency
    job = persistency.open_job("a")
    assert persistency.job("a") is persistency["a"] is job
    assert "a" in persistency
    assert persistency.has_job("a")
    assert ("b" in persistency, persistency.has_job("b"), 5 in persistency) == (False, False, False)
    persistency.open_job("b")
    assert sorted(persistency) == ["a", "b"]
    assert len(persistency) == 2
    job.close(WAIT)
    assert list(persistency) == ["b"]
    assert not persistency.has_job("a")


def test_a_job_that_is_not_open_is_not_found(persistency: Persistency) -> None:
    """S3-42, S3-44: `JobNotFound` is a `KeyError`, names the id, and says what to do."""
    persistency.open_job("closed").close(WAIT)
    for job_id in ("missing", "closed"):
        for find in (persistency.job, persistency.__getitem__, lambda job_id: persistency[job_id].put("c", (), b"")):
            with pytest.raises(JobNotFound) as caught:
                find(job_id)
            assert isinstance(caught.value, KeyError)
            assert repr(job_id) in str(caught.value)
            assert "open_job" in caught.value.hint


def test_the_way_by_id_is_the_handles(persistency: Persistency) -> None:
    """S3-78, S3-79: `p[id]` has all verbs, on the same data as the handle."""
    job = persistency.open_job("a")
    persistency["a"].put("c", ("k",), b"1")
    assert job.get("c", ("k",)).result(WAIT) == b"1"
    assert persistency["a"].scan("c").result(WAIT) == job.scan("c").result(WAIT)


def test_close_job_closes_one_and_no_other(persistency: Persistency) -> None:
    """S3-32, S3-34: `close_job` closes that job, raises what has failed, and is nothing for one that isn't open."""
    first, second = persistency.open_job("a"), persistency.open_job("b")
    persistency.close_job("a")
    assert (first.closed, second.closed) == (True, False)
    persistency.close_job("a")
    persistency.close_job("never opened")
    second.put("c", ("k",), b"1")
    assert second.get("c", ("k",)).result(WAIT) == b"1"
    second.persist(NEVER)
    with pytest.raises(WriteFailed):
        persistency.close_job("b")
    assert second.closed


def test_jobs_are_isolated(persistency: Persistency, root: Path) -> None:
    """S3-39: two jobs have their own files and data, and work side by side."""
    jobs = [persistency.open_job(name) for name in ("a", "b", "A")]
    for number, job in enumerate(jobs):
        job.put("c", ("k",), b"%d" % number)
    assert [job.get("c", ("k",)).result(WAIT) for job in jobs] == [b"0", b"1", b"2"]
    assert len({job.path for job in jobs}) == 3
    assert [name.casefold() for name in os.listdir(root)].count("a.db") == 1


def test_a_closed_handle_is_not_kept(persistency: Persistency) -> None:
    """A service that opens jobs by fresh ids for ever keeps nothing of those it has closed."""
    job = persistency.open_job()
    gone = weakref.ref(job)
    job.close(WAIT)
    assert_no_worker_is_left(job.id)
    del job
    gc.collect()
    assert gone() is None


# -- dropping -----------------------------------------------------------------------------------------------------


def test_drop_job_deletes_its_files(persistency: Persistency, root: Path) -> None:
    """S3-36: an open job is closed and all its files are gone; they are returned, and reopening starts empty."""
    job, other = persistency.open_job("a"), persistency.open_job("b")
    other.put("c", ("k",), b"")
    job.put("c", ("k",), b"1")
    job.flush().result(WAIT)
    there = {path for path in root.iterdir() if path.name.startswith("a.")}
    paths = persistency.drop_job("a")
    assert root / "a.db" in paths
    assert set(paths) <= there
    assert job.closed
    assert [path for path in root.iterdir() if path.name.startswith("a.")] == []
    again = persistency.open_job("a")
    assert (again.count("c").result(WAIT), again.version().result(WAIT)) == (0, 0)
    assert other.count("c").result(WAIT) == 1


def test_drop_job_takes_one_that_is_not_open(root: Path) -> None:
    """S3-36, S3-37: a stored job is dropped without being opened; one that never existed is fine."""
    with Persistency(root) as persistency:
        persistency.open_job("a").close(WAIT)
        assert root / "a.db" in persistency.drop_job("a")
        assert persistency.drop_job("a") == []
        assert persistency.drop_job("never") == []
        assert persistency.stored_jobs() == []
    with Persistency(":memory:") as persistency:
        job = persistency.open_job("a")
        assert persistency.drop_job("a") == []  # S3-38
        assert job.closed


def test_drop_job_says_nothing_of_failures_it_deletes(persistency: Persistency) -> None:
    """Dropping a job whose events have failed is no failure: what they were about is gone."""
    job = persistency.open_job("a")
    job.persist(NEVER)
    assert persistency.drop_job("a")
    assert job.closed


def test_drop_job_that_can_not_delete_is_an_error(persistency: Persistency, root: Path) -> None:
    """D-26, DD17: what can't be deleted is told, and a later drop ends the work."""
    persistency.open_job("a").close(WAIT)
    (root / "a.db-journal").mkdir()
    with pytest.raises(PersistencyError) as caught:
        persistency.drop_job("a")
    assert isinstance(caught.value, StorageError)
    assert "a.db-journal" in str(caught.value)
    (root / "a.db-journal").rmdir()
    persistency.drop_job("a")
    assert list(root.iterdir()) == []
    persistency.open_job("a")


def test_drop_job_that_is_open_elsewhere_is_locked(root: Path) -> None:
    """A job open through another `Persistency` of this process isn't deleted under it."""
    with Persistency(root) as one, Persistency(root) as two:
        job = two.open_job("a")
        job.put("c", ("k",), b"1")
        with pytest.raises(JobLocked) as caught:
            one.drop_job("a")
        assert caught.value.pid == os.getpid()
        assert job.get("c", ("k",)).result(WAIT) == b"1"
        one.open_job("a")
        with pytest.raises(JobLocked):
            one.drop_job("a")
        assert job.get("c", ("k",)).result(WAIT) == b"1"
        job.close(WAIT)
        assert one.drop_job("a")


def test_drop_job_waits_for_a_job_that_is_closing(root: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    """A drop that comes while the job still writes what waits, and an opening behind it, take their turns."""
    held(monkeypatch, gate)
    with Persistency(root) as persistency:
        job = persistency.open_job("a")
        job.put("held", ("k",), b"")
        gate.wait()
        closing = job._leave()
        dropping = in_thread(lambda: persistency.drop_job("a"))
        with pytest.raises(TimeoutError):
            dropping.result(0.05)
        gate.may_go.set()
        closing.result(WAIT)
        assert root / "a.db" in dropping.result(WAIT)
        assert persistency.open_job("a").count("held").result(WAIT) == 0


# -- stored jobs --------------------------------------------------------------------------------------------------


def test_stored_jobs_are_listed_open_or_not(persistency: Persistency, root: Path) -> None:
    """`stored_jobs` has every job on disk, by id, with its file and size; other files are none."""
    persistency.open_job("b").close(WAIT)
    job = persistency.open_job("a")
    job.put("c", ("k",), bytes(100_000))
    job.flush().result(WAIT)
    for name in ("notes.txt", "x.db-wal", "Upper.db", "a b.db", "%61.db", ".db"):
        (root / name).write_bytes(b"")
    (root / "folder.db").mkdir()
    (root / "link.db").symlink_to(root / "b.db")
    stored = persistency.stored_jobs()
    assert [(type(found), found.job_id, found.path) for found in stored] == [
        (StoredJob, "a", root / "a.db"),
        (StoredJob, "b", root / "b.db"),
    ]
    assert stored[0].bytes > 100_000 > stored[1].bytes > 0


def test_weird_ids_stay_in_the_root(tmp_path: Path) -> None:
    """S3-40, D-25, promise 10: an id never escapes its root, and no two meet in one file, whatever they contain."""
    root = tmp_path / "deep" / "er" / "root"
    with Persistency(root) as persistency:
        for number, job_id in enumerate(WEIRD_IDS):
            persistency.open_job(job_id).put("c", ("k",), b"%d" % number)
        assert sorted(persistency) == sorted(WEIRD_IDS)
    names = os.listdir(root)
    assert len({name.casefold() for name in names}) == len(names)
    outside = [path for path in tmp_path.rglob("*") if path.is_file() and path.parent != root]
    assert outside == []
    with Persistency(root) as persistency:
        assert [found.job_id for found in persistency.stored_jobs()] == sorted(WEIRD_IDS)
        for number, job_id in enumerate(WEIRD_IDS):
            assert persistency.open_job(job_id).get("c", ("k",)).result(WAIT) == b"%d" % number
        for job_id in WEIRD_IDS:
            assert persistency.drop_job(job_id)
        assert persistency.stored_jobs() == []
    assert list(root.iterdir()) == []


# -- several objects on one root ----------------------------------------------------------------------------------


@pytest.mark.parametrize("through_a_link", [False, True])
def test_two_objects_on_one_root_share_the_worker(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch, through_a_link: bool
) -> None:
    """S3-15, S3-20, D-22: one worker for both, each sees the other's writes; one's close never stops the other's."""
    opened: list[str] = []
    openings(monkeypatch, opened.append)
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    other = tmp_path / "link" if through_a_link else Path(str(root) + "/../root/")
    one, two = Persistency(root), Persistency(other)
    first, second = one.open_job("a"), two.open_job("a")
    assert first is not second
    assert opened == ["a"]
    first.put("c", ("k",), b"1")
    assert second.get("c", ("k",)).result(WAIT) == b"1"
    assert [thread.name for thread in workers()] == ["persistency:a"]
    one.close(WAIT)
    assert (first.closed, second.closed) == (True, False)
    second.put("c", ("k",), b"2")
    assert second.get("c", ("k",)).result(WAIT) == b"2"
    pytest.raises(Closed, first.get, "c", ("k",))
    two.close(WAIT)
    assert_no_worker_is_left("a")


def test_closing_a_shared_job_waits_for_what_was_posted(
    root: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    """Closing one of two handles returns when what was posted is committed, and raises what has failed."""
    held(monkeypatch, gate)
    with Persistency(root) as one, Persistency(root) as two:
        first, second = one.open_job("a"), two.open_job("a")
        first.put("held", ("k",), b"")
        gate.wait()
        first.persist(NEVER)
        closing = in_thread(first.close)
        with pytest.raises(TimeoutError):
            closing.exception(0.05)
        gate.may_go.set()
        assert isinstance(closing.exception(WAIT), WriteFailed)
        assert second.count("held").result(WAIT) == 1
        second.close(WAIT)


def test_options_of_a_shared_job_are_compared(root: Path) -> None:
    """Two objects that open one job with options that differ: the second gets `Misuse` and no lease."""
    with Persistency(root) as one, Persistency(root) as two:
        job = one.open_job("a", mailbox_ops_max=10)
        with pytest.raises(Misuse, match="mailbox_ops_max"):
            two.open_job("a", mailbox_ops_max=20)
        assert list(two) == []
        job.close(WAIT)
        assert_no_worker_is_left("a")
        two.open_job("a", mailbox_ops_max=20)


def test_objects_on_different_roots_have_nothing_in_common(tmp_path: Path) -> None:
    """S3-14, S3-22: one id in two roots is two jobs."""
    with Persistency(tmp_path / "one") as one, Persistency(tmp_path / "two") as two:
        one.open_job("a").put("c", ("k",), b"1")
        assert two.open_job("a").count("c").result(WAIT) == 0
        one.close(WAIT)
        assert two["a"].version().result(WAIT) == 0


def test_memory_is_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3-16, S3-17: jobs in memory are separate for each object and id, leave no file, and end when closed."""
    monkeypatch.chdir(tmp_path)
    with Persistency(":memory:") as one, Persistency(":memory:") as two:
        assert one.root == ":memory:"
        for number, (owner, job_id) in enumerate(((one, "a"), (one, "b"), (two, "a"))):
            owner.open_job(job_id).put("c", ("k",), b"%d" % number)
        assert one["a"].get("c", ("k",)).result(WAIT) == b"0"
        assert one["b"].get("c", ("k",)).result(WAIT) == b"1"
        assert two["a"].get("c", ("k",)).result(WAIT) == b"2"
        assert one["a"].path is None
        assert one.stored_jobs() == []
        one.close_job("a")
        assert one.open_job("a").count("c").result(WAIT) == 0
    assert list(tmp_path.iterdir()) == []


# -- the singleton ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("singleton")
def test_the_instance_is_made_once(root: Path, tmp_path: Path) -> None:
    """S3-8, S3-10, S3-13: get or create, the same object for the same real path; none named and none made: `Closed`."""
    with pytest.raises(Closed) as caught:
        Persistency.instance()
    assert "instance(root)" in caught.value.hint
    instance = Persistency.instance(root)
    assert Persistency.instance() is Persistency.instance(root) is Persistency.instance(str(root) + "/") is instance
    root.mkdir()
    (tmp_path / "link").symlink_to(root)
    assert Persistency.instance(tmp_path / "link") is instance


@pytest.mark.usefixtures("singleton")
def test_the_instance_keeps_its_root(root: Path, tmp_path: Path) -> None:
    """S3-9: another root, memory or options are `Misuse` that names both roots, and change nothing."""
    instance = Persistency.instance(root)
    job = instance.open_job("a")
    with pytest.raises(Misuse) as caught:
        Persistency.instance(tmp_path / "other")
    assert str(root) in str(caught.value)
    assert str(tmp_path / "other") in str(caught.value)
    pytest.raises(Misuse, Persistency.instance, ":memory:")
    pytest.raises(Misuse, Persistency.instance, root, open_timeout=1.0)
    pytest.raises(Misuse, Persistency.instance, "")
    assert Persistency.instance() is instance
    assert not job.closed


@pytest.mark.usefixtures("singleton")
def test_the_instance_takes_options_and_memory(tmp_path: Path) -> None:
    """The first call's options are the constructor's; `":memory:"` is a root like others."""
    with pytest.raises(TypeError, match="nonsense"):
        Persistency.instance(tmp_path, nonsense=1)
    pytest.raises(Closed, Persistency.instance)
    instance = Persistency.instance(":memory:", open_timeout=5.0)
    assert Persistency.instance(":memory:") is instance
    pytest.raises(Misuse, Persistency.instance, tmp_path)


@pytest.mark.usefixtures("singleton")
def test_reset_closes_and_forgets(root: Path, tmp_path: Path) -> None:
    """S3-11, S3-12: `reset` closes all jobs, may be called again and without an instance, and frees the place."""
    Persistency.reset()
    instance = Persistency.instance(root)
    job = instance.open_job("a")
    job.put("c", ("k",), b"1")
    Persistency.reset()
    Persistency.reset()
    assert job.closed
    pytest.raises(Closed, Persistency.instance)
    pytest.raises(Closed, instance.open_job, "b")
    other = Persistency.instance(tmp_path / "other")
    assert other is not instance
    Persistency.reset()
    with Persistency.instance(root).open_job("a") as job:
        assert job.get("c", ("k",)).result(WAIT) == b"1"


@pytest.mark.usefixtures("singleton")
def test_an_instance_that_was_closed_is_made_anew(root: Path) -> None:
    """Closing the instance itself is as good as `reset`: the next call makes another."""
    instance = Persistency.instance(root)
    instance.close()
    pytest.raises(Closed, Persistency.instance)
    assert Persistency.instance(root) is not instance


@pytest.mark.usefixtures("singleton")
def test_reset_says_what_has_failed(root: Path) -> None:
    """`reset` raises what closing raises, and has forgotten the instance all the same."""
    Persistency.instance(root).open_job("a").persist(NEVER)
    pytest.raises(WriteFailed, Persistency.reset)
    pytest.raises(Closed, Persistency.instance)


@pytest.mark.usefixtures("singleton")
def test_the_instance_is_one_for_all_threads(root: Path) -> None:
    """S3-13, D-24: threads that ask at once get one object; a `reset` that waits for a job holds nobody up."""
    instances = together(16, lambda _number: Persistency.instance(root))
    assert len({id(instance) for instance in instances}) == 1


@pytest.mark.usefixtures("singleton")
def test_a_reset_that_waits_holds_nobody_up(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    """D-24: while `reset` waits for a slow job, another instance can be made and used."""
    held(monkeypatch, gate)
    Persistency.instance(root).open_job("a").put("held", ("k",), b"")
    gate.wait()
    resetting = in_thread(Persistency.reset)
    with pytest.raises(TimeoutError):
        resetting.result(0.05)
    other = Persistency.instance(tmp_path / "other")
    assert other.open_job("a").version().result(WAIT) == 0
    gate.may_go.set()
    resetting.result(WAIT)


# -- closing ------------------------------------------------------------------------------------------------------


def test_close_closes_every_job(root: Path) -> None:
    """S3-35: all jobs are closed and written, a second close is nothing, and nothing is opened any more."""
    persistency = Persistency(root)
    jobs = [persistency.open_job(f"job-{number}") for number in range(5)]
    for job in jobs:
        for number in range(1_000):
            job.put("c", (number,), b"")
    persistency.close(WAIT)
    persistency.close()
    for run in LOOPS.values():
        run(persistency.aclose)
    assert all(job.closed for job in jobs)
    assert list(persistency) == []
    assert "closed" in repr(persistency)
    pytest.raises(Closed, persistency.open_job, "job-0")
    pytest.raises(Closed, persistency.drop_job, "job-0")
    pytest.raises(JobNotFound, persistency.job, "job-0")
    with Persistency(root) as again:
        assert [again.open_job(job.id).count("c").result(WAIT) for job in jobs] == [1_000] * 5


def test_close_gathers_the_failures_of_all_jobs(root: Path) -> None:
    """Failures in two of three jobs come out in one `WriteFailed`; all three are closed."""
    persistency = Persistency(root)
    jobs = [persistency.open_job(name) for name in ("a", "b", "c")]
    checks = [Check("c", (name,), 1) for name in ("a", "c")]
    jobs[0].persist([checks[0], Put("c", ("k",), b"")])
    jobs[1].put("c", ("k",), b"")
    jobs[2].persist(checks[1])
    with pytest.raises(WriteFailed) as caught:
        persistency.close(WAIT)
    assert [failure.op for failure in caught.value.failures] == [checks[0], Put("c", ("k",), b""), checks[1]]
    assert {type(failure.error) for failure in caught.value.failures} == {Conflict}
    assert all(job.closed for job in jobs)
    persistency.close()
    assert_no_worker_is_left("a", "b", "c")


def test_close_counts_failures_that_were_not_kept(root: Path) -> None:
    """The count of those beyond what is kept is summed up over the jobs."""
    persistency = Persistency(root)
    for name in ("a", "b"):
        job = persistency.open_job(name)
        for number in range(1_200):
            job.persist(Check("c", (number,), 1))
    with pytest.raises(WriteFailed) as caught:
        persistency.close(WAIT)
    assert len(caught.value.failures) + caught.value.omitted == 2_400


@pytest.mark.parametrize("asynchronous", [None, *LOOPS])
def test_close_waits_for_every_job_though_one_fails(
    root: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate, asynchronous: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that can't be closed in order doesn't keep `close` from waiting for the other jobs."""
    close = SqliteStore.close
    bad: list[Any] = []

    def failing(store: Any, **_how: Any) -> None:
        close(store)
        if store in bad:
            raise OSError(5, "the store can't be closed")

    monkeypatch.setattr(SqliteStore, "close", failing)
    held(monkeypatch, gate)
    apply = SqliteStore.apply

    def marked(store: Any, group: list[Any], now_ms: int) -> Any:
        if b"bad" in group[::PLACES]:
            bad.append(store)
        return apply(store, group, now_ms)

    monkeypatch.setattr(SqliteStore, "apply", marked)
    persistency = Persistency(root)
    first, second = persistency.open_job("a"), persistency.open_job("b")
    first.put("bad", ("k",), b"")
    first.flush().result(WAIT)
    second.put("held", ("k",), b"")
    gate.wait()
    closing = in_thread((lambda: LOOPS[asynchronous](persistency.aclose)) if asynchronous else persistency.close)
    with pytest.raises(TimeoutError):
        closing.exception(0.2)
    gate.may_go.set()
    assert "the store can't be closed" in str(closing.exception(WAIT))
    assert_no_worker_is_left("a", "b")


def test_close_leaves_every_job_though_one_refuses(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A shared job that is poisoned doesn't keep `close` from closing those after it."""
    apply = SqliteStore.apply

    def corrupt(store: Any, group: list[Any], now_ms: int) -> Any:
        if b"corrupt" in group[::PLACES]:
            raise Corrupt("the file is damaged")
        return apply(store, group, now_ms)

    monkeypatch.setattr(SqliteStore, "apply", corrupt)
    one, two = Persistency(root), Persistency(root)
    shared, alone = one.open_job("shared"), one.open_job("alone")
    two.open_job("shared")
    shared.put("corrupt", ("k",), b"")
    with pytest.raises(Poisoned):
        shared.flush().result(WAIT)
    for persistency in (one, two):
        with contextlib.suppress(PersistencyError):
            persistency.close(WAIT)
    assert alone.closed
    assert_no_worker_is_left("alone", "shared")


def test_a_close_that_takes_too_long_names_the_jobs(root: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    """`close(timeout)`: `TimeoutError` names those that are still closing; they keep closing and lose nothing."""
    held(monkeypatch, gate)
    persistency = Persistency(root)
    slow, quick = persistency.open_job("slow"), persistency.open_job("quick")
    slow.put("held", ("k",), b"")
    gate.wait()
    slow.put("c", ("k",), b"1")
    quick.put("c", ("k",), b"1")
    with pytest.raises(TimeoutError, match="'slow'") as caught:
        persistency.close(0.2)
    assert "'quick'" not in str(caught.value)
    assert slow.closed
    assert quick.closed
    gate.may_go.set()
    with Persistency(root) as again:
        assert again.open_job("slow").get("c", ("k",)).result(WAIT) == b"1"
        assert again.open_job("quick").get("c", ("k",)).result(WAIT) == b"1"


def test_what_a_late_closing_has_to_tell_the_next_close_tells(
    root: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    """Promise 3: after a `close(timeout)` that ran out, the next one raises what has failed, and only that one."""
    held(monkeypatch, gate)
    with Persistency(root) as persistency:
        job = persistency.open_job("slow")
        job.put("held", ("k",), b"")
        gate.wait()
        job.persist([Put("c", ("k",), b"1"), NEVER])
        with pytest.raises(TimeoutError):
            job.close(0)
        gate.may_go.set()
        with Persistency(root) as again:
            assert again.open_job("slow").count("c").result(WAIT) == 0  # opened when the other is closed
        with pytest.raises(WriteFailed) as caught:
            job.close()
        assert [failure.op for failure in caught.value.failures] == [Put("c", ("k",), b"1"), NEVER]
        job.close()


def test_an_exception_in_the_with_body_is_not_masked(root: Path) -> None:
    """S3-23: the body's exception comes out of `with`, what closing raised is noted on it, and all is closed."""
    with pytest.raises(ZeroDivisionError) as caught, Persistency(root) as persistency:  # noqa: PT012
        job = persistency.open_job("a")
        job.persist(NEVER)
        raise ZeroDivisionError
    assert any("WriteFailed" in note for note in caught.value.__notes__)
    assert job.closed
    with pytest.raises(WriteFailed), Persistency(root) as persistency:
        persistency.open_job("a").persist(NEVER)


def test_a_dropped_persistency_warns(root: Path) -> None:
    """Promise 6: a `Persistency` that is dropped with open jobs warns, and its jobs go on."""
    persistency = Persistency(root)
    job = persistency.open_job("a")
    owner = [persistency]
    del persistency
    with pytest.warns(ResourceWarning, match=r"unclosed.*root"):
        owner.clear()
    job.put("c", ("k",), b"1")
    assert job.get("c", ("k",)).result(WAIT) == b"1"
    job.close(WAIT)


def test_a_persistency_with_nothing_open_does_not_warn(root: Path) -> None:
    """No warning for one that was closed, whose jobs are all closed, that opened none, or that couldn't be made."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        closed = Persistency(root)
        closed.open_job("a")
        closed.close(WAIT)
        emptied = Persistency(root)
        emptied.open_job("a").close(WAIT)
        idle = Persistency(root)
        del closed, emptied, idle
        for wrong in ("", 5):
            with pytest.raises(Misuse):
                Persistency(wrong)  # type: ignore[arg-type]
        gc.collect()


# -- threads, descriptors, processes ------------------------------------------------------------------------------


def test_a_job_has_one_thread_that_carries_its_name(persistency: Persistency) -> None:
    """Threads are named `persistency:<id>`, are daemons, and are gone after close."""
    jobs = [persistency.open_job(name) for name in ("alpha", "beta")]
    for job in jobs:
        job.put("c", (1,), b"x")
        job.flush().result(WAIT)
    assert sorted(thread.name for thread in workers()) == ["persistency:alpha", "persistency:beta"]
    assert all(thread.daemon for thread in workers())
    jobs[0].close(WAIT)
    assert_no_worker_is_left("alpha")
    assert [thread.name for thread in workers()] == ["persistency:beta"]
    persistency.close(WAIT)
    assert_no_worker_is_left()


def descriptors() -> int:
    """Return how many files this process has open."""
    return len(os.listdir("/dev/fd"))


@pytest.mark.parametrize("memory", [False, True])
def test_opening_and_closing_leaks_nothing(root: Path, memory: bool) -> None:
    """D-20: 200 jobs opened, written and closed leave no thread and no descriptor, and take their time in seconds."""
    with Persistency(":memory:" if memory else root) as persistency:

        def cycle(number: int) -> None:
            with persistency.open_job(f"job-{number % 20}") as job:
                job.put("c", (number,), b"")
                assert job.get("c", (number,)).result(WAIT) == b""

        cycle(0)
        assert_no_worker_is_left()
        gc.collect()
        files, threads = descriptors(), threading.active_count()
        for number in range(200):
            cycle(number)
        assert_no_worker_is_left()
        gc.collect()
        assert descriptors() <= files
        assert threading.active_count() <= threads


CHILD = """
import sys
from persistency import JobLocked, Persistency
with Persistency(sys.argv[1]) as persistency:
    for attempt in (lambda: persistency.open_job("a"), lambda: persistency.drop_job("a")):
        try:
            attempt()
        except JobLocked as error:
            print(error.pid, error.retryable)
    with persistency.open_job("b") as job:
        print(job.count("c").result(10))
"""


def test_another_process_is_told_who_owns_the_job(persistency: Persistency, root: Path) -> None:
    """Promise 10: a second process gets `JobLocked` at once, with the owner's pid; other jobs are free."""
    job = persistency.open_job("a")
    job.put("c", ("k",), b"1")
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(root)], capture_output=True, text=True, timeout=WAIT * 2, check=False
    )
    assert done.stderr == ""
    assert done.stdout.splitlines() == [f"{os.getpid()} True"] * 2 + ["0"]
    assert job.get("c", ("k",)).result(WAIT) == b"1"
    assert persistency.open_job("b").version().result(WAIT) == 0


OWNER = """
import sys
from persistency import Persistency
with Persistency(sys.argv[1]) as persistency, persistency.open_job("a") as job:
    job.put("c", ("k",), b"from the child")
    job.flush().result(10)
    print("open", flush=True)
    sys.stdin.readline()
"""


def test_a_job_is_free_once_its_owner_has_gone(persistency: Persistency, root: Path) -> None:
    """Promise 10: what another process owns is `JobLocked` here, and opens as soon as it has let go."""
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdin is not None
        assert owner.stdout is not None
        assert owner.stdout.readline() == "open\n"
        for attempt in (persistency.open_job, persistency.drop_job):
            with pytest.raises(JobLocked) as caught:
                attempt("a")
            assert caught.value.pid == owner.pid
        assert "a" not in persistency
        owner.stdin.write("\n")
        owner.stdin.close()
        assert owner.wait(WAIT) == 0
    assert persistency.open_job("a").get("c", ("k",)).result(WAIT) == b"from the child"


# -- races --------------------------------------------------------------------------------------------------------


class SlowReturn:
    """An `open_job` of an open id, in a thread of its own, that is held while it gives its second lease back."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, persistency: Persistency) -> None:
        self.arrived, self.may_go, self.went = threading.Event(), threading.Event(), threading.Event()
        self.thread = 0
        leave = Job._leave

        def held(job: Job, **options: Any) -> Any:
            if threading.get_ident() != self.thread:
                return leave(job, **options)
            self.arrived.set()
            assert self.may_go.wait(WAIT)
            try:
                return leave(job, **options)
            finally:
                self.went.set()

        def open_again() -> Job:
            self.thread = threading.get_ident()
            try:
                return persistency.open_job("a")
            finally:
                self.arrived.set()
                self.went.set()

        monkeypatch.setattr(Job, "_leave", held)
        self.opening = in_thread(open_again)
        self.arrived.wait(1.0)

    def let_go(self) -> None:
        """Let it go on, until the lease is given back, or a second is over because it waits for something else."""
        self.may_go.set()
        self.went.wait(1.0)


def test_opening_again_never_discards_what_was_posted(root: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate) -> None:
    """An `open_job` of an open id that races with the handle's `close` drops nothing that was accepted before it."""
    held(monkeypatch, gate)
    with Persistency(root) as persistency:
        job = persistency.open_job("a")
        racing = SlowReturn(monkeypatch, persistency)
        job.put("held", ("k",), b"")
        gate.wait()
        for number in range(10):
            job.put("c", (number,), b"")
        closing = job._leave()
        racing.let_go()
        gate.may_go.set()
        assert closing.exception(WAIT) is None
        racing.opening.exception(WAIT)
        assert persistency.open_job("a").count("c").result(WAIT) == 10


def test_opening_again_survives_a_close_beside_it(persistency: Persistency, monkeypatch: pytest.MonkeyPatch) -> None:
    """An `open_job` that races with the closing of the same handle gives a handle; the root is open all the time."""
    job = persistency.open_job("a")
    racing = SlowReturn(monkeypatch, persistency)
    job.close(WAIT)
    racing.let_go()
    assert racing.opening.result(WAIT).id == "a"


def test_open_close_and_put_storm(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """S3-45: 16 threads open, put into and close a few jobs 2,000 times: each put is found later, or was `Closed`."""
    caplog.set_level(logging.ERROR)
    accepted: list[list[tuple[str, tuple[int, int]]]] = [[] for _ in range(16)]

    with Persistency(root) as persistency:

        def storm(number: int) -> None:
            random = Random(number)
            for turn in range(125):
                job = persistency.open_job(f"job-{random.randrange(4)}")
                with contextlib.suppress(Closed):
                    job.put("c", (number, turn), b"%d" % turn)
                    accepted[number].append((job.id, (number, turn)))
                    assert job.get("c", (number, turn)).result(WAIT) == b"%d" % turn
                if random.random() < 0.5:
                    job.close(WAIT)

        together(16, storm)
        for job_id, parts in [place for thread in accepted for place in thread]:
            assert persistency.open_job(job_id).get("c", parts).result(WAIT) == b"%d" % parts[1]
        total = sum(persistency.open_job(f"job-{number}").count("c").result(WAIT) for number in range(4))
    assert total == sum(map(len, accepted)) > 0
    assert caplog.records == []


def test_open_close_storm_of_several_objects(root: Path) -> None:
    """S3-20: objects on one root, each opening and closing the same jobs at once, lose none of their puts."""
    accepted: list[list[tuple[int, int]]] = [[] for _ in range(8)]

    def storm(number: int) -> None:
        for turn in range(60):
            with Persistency(root) as persistency, persistency.open_job(f"job-{turn % 2}") as job:
                job.put("c", (number, turn), b"")
                accepted[number].append((number, turn))

    together(8, storm)
    with Persistency(root) as persistency:
        counts = [persistency.open_job(f"job-{number}").count("c").result(WAIT) for number in range(2)]
    assert sum(counts) == sum(map(len, accepted)) == 480
    assert_no_worker_is_left()


def test_closing_all_while_jobs_are_opened(root: Path) -> None:
    """`close` beside threads that open and put: each gets `Closed` or is heard, and no job stays open."""
    for _ in range(20):
        persistency = Persistency(root)
        accepted: list[str] = []

        def use(number: int, persistency: Persistency = persistency, accepted: list[str] = accepted) -> None:
            if number == 0:
                persistency.close(WAIT)
                return
            with contextlib.suppress(Closed):
                job = persistency.open_job(f"job-{number % 3}")
                job.put(f"c{id(persistency)}", (number,), b"")
                accepted.append(job.id)

        together(6, use)
        assert_no_worker_is_left()
        assert list(persistency) == []
        with Persistency(root) as again:
            for job_id in set(accepted):
                found = again.open_job(job_id).count(f"c{id(persistency)}").result(WAIT)
                assert found == accepted.count(job_id)
                again.drop_job(job_id)


def test_drops_and_openings_storm(root: Path) -> None:
    """Threads that open, put and drop one job at once meet only the errors of section 3, and leave a sound root."""

    def storm(number: int, persistency: Persistency) -> None:
        for turn in range(30):
            with contextlib.suppress(Closed, JobLocked):
                if (number + turn) % 3 == 0:
                    persistency.drop_job("a")
                else:
                    job = persistency.open_job("a")
                    job.put("c", (number, turn), b"")
                    assert job.get("c", (number, turn)).result(WAIT) in (b"", None)

    with Persistency(root) as persistency:
        together(8, lambda number: storm(number, persistency))
        persistency.drop_job("a")
        with persistency.open_job("a") as job:
            assert (job.count("c").result(WAIT), job.version().result(WAIT)) == (0, 0)
        persistency.drop_job("a")
    assert list(root.iterdir()) == []


def test_a_job_that_can_not_be_reached_is_unavailable(persistency: Persistency, root: Path) -> None:
    """Promise 11: a link or a directory in the place of a job's file is refused, named, and left alone."""
    root.mkdir()
    (root / "target").write_bytes(b"")
    (root / "a.db").symlink_to(root / "target")
    (root / "b.db").mkdir()
    for job_id in ("a", "b"):
        with pytest.raises(Unavailable, match=f"{job_id}.db"):
            persistency.open_job(job_id)
    assert (root / "target").read_bytes() == b""
    assert (root / "a.db").is_symlink()
    assert list(persistency) == []


def test_a_handle_that_closes_while_the_last_one_does(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3-20: who isn't the last to close, and finds the job closed when he wants it flushed, waits for that closing."""
    first, second = Persistency(root), Persistency(root)
    early, late = first.open_job("a"), second.open_job("a")
    early.put("c", (1,), b"")
    write = Mailbox.write

    def closed_meanwhile(mailbox: Mailbox, *args: Any, **how: Any) -> Any:
        monkeypatch.setattr(Mailbox, "write", write)
        late.close()
        return write(mailbox, *args, **how)

    monkeypatch.setattr(Mailbox, "write", closed_meanwhile)
    early.close()
    first.close()
    second.close()
    with Persistency(root) as again:
        assert again.open_job("a").count("c").result(WAIT) == 1
