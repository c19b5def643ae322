"""Durability: what is on the medium and when, how long the log grows, and losses and moved files that are noticed.

Syncs are counted by a file system that notes them; intervals are counted by a clock that only the test moves. What
survives a power cut is shown in `tests/test_power.py`, what survives a kill in `tests/test_crash.py`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from persistency import Corrupt, Job, Persistency, Poisoned, Put, WriteFailed, key
from persistency.actor import upkeep
from persistency.actor.upkeep import FOLD_SECONDS, Upkeep
from persistency.storage import schema, sqlite, wal
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import StoreOptions
from persistency.storage.wal import WriteAheadLog
from tests.loops import LOOPS, InLoop
from tests.soak.lives import Quiet
from tests.storage.conftest import FaultyDisk, run_child
from tests.test_engine import WAIT, in_thread

KILLS = 50


class Disk(FaultyDisk):
    """A file system that notes what is asked of it, and tells when something was synced."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        super().__init__()

    def note(self, operation: str, kind: str) -> None:
        with self._changed:
            super().note(operation, kind)
            self._changed.notify_all()

    def wait_synced(self, count: int, kind: str = "wal") -> None:
        """Wait until there were so many syncs."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.syncs(kind) >= count, WAIT), self.calls[-20:]


class Steady:
    """The clock intervals are counted by; only a test moves it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.seconds = 1_000.0
        patch.setattr(upkeep, "monotonic", lambda: self.seconds)


@pytest.fixture
def disk() -> Iterator[Disk]:
    """Give a file system that counts."""
    made = Disk()
    yield made
    made.unregister()


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Steady:
    """Give a clock that stands still."""
    return Steady(monkeypatch)


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Quiet:
    """Tell when a worker sleeps."""
    return Quiet(monkeypatch)


@pytest.fixture
def root(place: Path) -> Path:
    """Name a root that doesn't exist yet."""
    return place / "root"


def on(disk: FaultyDisk, root: Path, **options: Any) -> Persistency:
    """Give a root whose files are on a disk."""
    persistency = Persistency(root, **options)
    persistency._site.root._vfs = disk.name  # type: ignore[attr-defined]  # a directory's
    return persistency


def look(job: Job, quiet: Quiet) -> None:
    """Have the worker look whether there is something to do, and wait until it has."""
    job._mailbox.ring()
    quiet.wait(job)


def wal_bytes(root: Path, job_id: str = "a") -> int:
    """Return the size of a job's log."""
    path = root / f"{job_id}.db-wal"
    return path.stat().st_size if path.exists() else 0


# -- when it is on the medium ------------------------------------------------------------------------------------------


def commit_in_place(job: Job, number: int) -> None:
    """Commit in this thread."""
    job.commit([Put("c", (number,), b"x")]).result(WAIT)


def post(job: Job, number: int) -> None:
    """Post, and wait until it is committed by the worker."""
    job.put("c", (number,), b"x")
    job._mailbox.ask(wait_barrier(), reads=False, free=True).result(WAIT)


def commit_in_task(job: Job, number: int, *, loop: str = "asyncio") -> None:
    """Commit under an event loop."""
    LOOPS[loop](job.commit, [Put("c", (number,), b"x")])


def wait_barrier() -> Any:
    """Return what a flush posts."""
    from persistency.storage.port import Barrier

    return Barrier()


WAYS = {
    "in place": commit_in_place,
    "posted": post,
    "in a task": commit_in_task,
    "in a task of trio": partial(commit_in_task, loop="trio"),
}


def interval_findings(root: Path, disk: Disk, time: Steady, quiet: Quiet, way: str) -> list[str]:
    """Commit now and then for a while; return what was synced too late, too early, or too often."""
    wrong = []
    write = WAYS[way]
    with on(disk, root) as persistency:
        job = persistency.open_job("a", sync_interval=2.0)
        number = 0
        for pause in (0.0, 0.5, 1.875, 0.125, 2.125, FOLD_SECONDS, 0.25):  # after a sync, until the next commit
            quiet.wait(job)
            time.seconds += pause
            look(job, quiet)
            number += 1
            write(job, number)  # the first after the log was cut off syncs its header
            quiet.wait(job)
            disk.calls.clear()
            for _ in range(5):
                number += 1
                write(job, number)
            quiet.wait(job)
            if disk.syncs() != 0:
                wrong.append(f"early: {disk.syncs()} syncs within the interval")
            time.seconds += 1.875
            if (seconds := quiet.seconds(job)) is None or seconds > 2.0:
                wrong.append(f"late: the worker sleeps for {seconds}")
            look(job, quiet)
            if disk.syncs() != 0:
                wrong.append(f"early: {disk.syncs()} syncs within the interval")
            time.seconds += 0.125
            look(job, quiet)
            if disk.syncs() != 1:
                wrong.append(f"late: {disk.syncs()} syncs after the interval, {pause} s after the last one")
            time.seconds += 0.5
            look(job, quiet)
            if disk.syncs() > 1:
                wrong.append(f"often: {disk.syncs()} syncs for one interval")
    return wrong


@pytest.mark.parametrize("way", WAYS)
def test_what_is_committed_is_synced_within_the_interval(
    root: Path, disk: Disk, time: Steady, quiet: Quiet, way: str
) -> None:
    """Promise 5: one sync, not before `sync_interval` is over, not after; each commit after a sync begins a new one."""
    assert interval_findings(root, disk, time, quiet, way) == []


@pytest.mark.parametrize("plant", ["never comes", "is late", "comes at every look"])
def test_a_sync_that_never_comes_is_seen(
    root: Path, disk: Disk, time: Steady, quiet: Quiet, monkeypatch: pytest.MonkeyPatch, plant: str
) -> None:
    """Planted defects: the harness of the test above reports an engine that syncs never, late, or all the time."""
    really_look, really_sync = Upkeep._look, Upkeep._sync
    if plant == "never comes":

        def forget(self: Upkeep) -> None:
            self._sync_at = None

        monkeypatch.setattr(Upkeep, "_sync", forget)
    elif plant == "is late":

        def later(self: Upkeep) -> None:
            before = self._sync_at
            really_look(self)
            if before is None and self._sync_at is not None:
                self._sync_at += 1.0

        monkeypatch.setattr(Upkeep, "_look", later)
    else:

        def now(self: Upkeep) -> None:
            really_look(self)
            if self._sync_at is not None:
                really_sync(self)

        monkeypatch.setattr(Upkeep, "_look", now)
    found = {finding.partition(":")[0] for finding in interval_findings(root, disk, time, quiet, "in place")}
    assert found & ({"early", "often"} if plant == "comes at every look" else {"late"})


def test_it_is_synced_without_anybody_asking(root: Path, disk: Disk) -> None:
    """Promise 5: by the real clock: the worker wakes for it; afterwards it sleeps."""
    with on(disk, root) as persistency:
        job = persistency.open_job("a", sync_interval=0.02)
        for number in range(3):
            job.put("c", (number,), b"x")
            job.flush().result(WAIT)
            disk.wait_synced(number + 1)
            assert job.count("c").result(WAIT) == number + 1


def test_without_an_interval_only_who_asks_has_it_synced(root: Path, disk: Disk, time: Steady, quiet: Quiet) -> None:
    """Promise 5: `sync_interval=None`: no sync however long it takes, but with `flush(sync=True)`, and at the end."""
    with on(disk, root) as persistency:
        job = persistency.open_job("a", sync_interval=None)
        commit_in_place(job, 0)
        disk.calls.clear()
        for number in range(1, 40):
            commit_in_place(job, number)
            quiet.wait(job)
            time.seconds += FOLD_SECONDS - 0.1  # before the log is cut off, which brings it onto the medium
            look(job, quiet)
        assert disk.syncs() == 0
        job.flush(sync=True).result(WAIT)
        assert disk.syncs() == 1
        commit_in_place(job, 99)
        disk.calls.clear()
        job.close()
        assert disk.syncs() >= 1


@pytest.mark.parametrize("way", WAYS)
def test_with_power_every_commit_is_synced_before_it_is_answered(root: Path, disk: Disk, way: str) -> None:
    """Promise 5: `durability="power"`: one sync for each commit, there when the caller has the answer."""
    with on(disk, root) as persistency:
        job = persistency.open_job("a", durability="power")
        commit_in_place(job, 0)
        for number in range(1, 6):
            disk.calls.clear()
            WAYS[way](job, number)
            assert disk.syncs() == 1


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_flush_with_sync_is_one_sync(root: Path, disk: Disk, durability: Any, in_loop: InLoop) -> None:
    """Promise 5: `flush(sync=True)`: exactly one, however much was posted; answered when it is done."""
    with on(disk, root) as persistency:
        job = persistency.open_job("a", durability=durability, sync_interval=None)
        commit_in_place(job, 0)
        job.flush(sync=True).result(WAIT)
        for count in (1, 10, 500):
            disk.calls.clear()

            async def main(count: int = count) -> None:
                for number in range(count):
                    job.put("c", (number,), b"y")
                await job.flush(sync=True)  # stands behind them: one group

            in_loop(main)
            assert disk.syncs() == (1 if durability == "process" else disk.syncs())
            assert disk.syncs() >= 1
        if durability == "process":
            disk.calls.clear()
            job.flush().result(WAIT)
            assert disk.syncs() == 0


def test_an_idle_job_that_is_synced_wakes_no_more(root: Path, disk: Disk, time: Steady, quiet: Quiet) -> None:
    """Promise 5: a sync, a cut of the log, and then nothing: the worker sleeps until somebody comes."""
    with on(disk, root) as persistency:
        job = persistency.open_job("a", sync_interval=1.0)
        quiet.wait(job)
        before = quiet.sleeps(job)
        for number in range(10):
            commit_in_place(job, number)
        quiet.wait(job)
        time.seconds += 1.0
        look(job, quiet)
        time.seconds += FOLD_SECONDS
        look(job, quiet)
        assert wal_bytes(root) == 0
        assert quiet.seconds(job) is None
        assert quiet.sleeps(job) - before <= 4  # rung by the first commit, then by the test
        for _ in range(5):
            assert job.get("c", (1,)).result(WAIT) == b"x"
            assert job.count("c").result(WAIT) == 10
        time.seconds += 1_000.0
        disk.calls.clear()
        sleeps = quiet.sleeps(job)
        look(job, quiet)
        assert quiet.sleeps(job) == sleeps + 1
        assert [call for call in disk.calls if call[0] != "read"] == []


def test_a_sync_that_fails_is_no_sync(root: Path, disk: Disk, time: Steady, quiet: Quiet) -> None:
    """Promise 3: a background sync that fails poisons the job at once: nobody knows what is on the medium."""
    import apsw

    with contextlib.suppress(WriteFailed), on(disk, root) as persistency:
        job = persistency.open_job("a", sync_interval=1.0)
        commit_in_place(job, 0)
        commit_in_place(job, 1)
        quiet.wait(job)
        disk.arm("sync", 1, apsw.SQLITE_IOERR_FSYNC)
        time.seconds += 1.0
        look(job, quiet)
        disk.disarm()
        assert job.statistics().state == "poisoned"
        with pytest.raises(Poisoned):
            job.put("c", (2,), b"")


# -- the log -----------------------------------------------------------------------------------------------------------

READER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN")
print(connection.execute("SELECT count(*) FROM kv").fetchone()[0], flush=True)
sys.stdin.readline()
connection.execute("COMMIT")
connection.close()
"""


class Reader:
    """A process of a stranger's that reads a job's file and keeps its read transaction open."""

    def __init__(self, path: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", READER, str(path)], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self.seen = int(self._process.stdout.readline())

    def end(self) -> None:
        """Have it end, and wait until it has."""
        self._process.communicate("\n", timeout=WAIT)
        assert self._process.returncode == 0


@contextlib.contextmanager
def reading(path: Path) -> Iterator[Reader]:
    """Have a stranger read a job's file."""
    reader = Reader(path)
    try:
        yield reader
    finally:
        reader.end()


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was logged."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def never_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have whoever waits for a stranger's lock wait for ever, so that it shows."""
    for module in (schema, wal):
        monkeypatch.setattr(module, "BUSY_MS", 10**8)


def test_the_log_is_cut_off_when_the_job_is_idle_and_when_it_is_closed(root: Path, time: Steady, quiet: Quiet) -> None:
    """Promise 5, C.i: some seconds after the last write, and at close; reads and a busy job don't put it off or on."""
    with Persistency(root) as persistency:
        job = persistency.open_job("a")
        for round_ in range(3):
            for number in range(50):
                commit_in_place(job, number)
                time.seconds += FOLD_SECONDS / 10
                look(job, quiet)
                assert wal_bytes(root) > 0  # not in the middle of the work
            assert job.statistics().wal_bytes > 0
            quiet.wait(job)
            time.seconds += FOLD_SECONDS - 0.5
            job.count("c").result(WAIT)
            look(job, quiet)
            assert wal_bytes(root) > 0, round_
            time.seconds += 0.5
            look(job, quiet)
            assert wal_bytes(root) == job.statistics().wal_bytes == 0
        commit_in_place(job, 0)
        assert wal_bytes(root) > 0
        job.close()
        assert wal_bytes(root) == 0
        resting = persistency.open_job("b")
        resting.put("c", ("k",), b"")
    assert wal_bytes(root, "b") == 0


def test_the_log_is_bounded_beside_work_that_never_pauses(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Promise 5: the checkpoints are the engine's own: forced at a size, whoever waits, however full the mailbox is."""
    monkeypatch.setattr(sqlite, "CHECKPOINT_IDLE_PAGES", 40)
    monkeypatch.setattr(sqlite, "CHECKPOINT_FORCED_PAGES", 100)
    sizes = []
    with Persistency(root) as persistency:
        job = persistency.open_job("a", mailbox_ops_max=64)
        for number in range(2_000):
            job.put("c", (number % 50,), bytes(2_000))
            if number % 20 == 0:
                sizes.append(job.statistics().wal_bytes // schema.PAGE_BYTES)
        job.flush().result(WAIT)
    group = 64 * 2  # pages, at the most
    assert max(sizes) <= 100 + group
    assert max(sizes) > 0


@pytest.mark.parametrize("moment", ["before the last commit", "at the end of the log"])
def test_a_stranger_that_reads_pins_the_log_and_blocks_nobody(
    root: Path,
    time: Steady,
    quiet: Quiet,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    moment: str,
) -> None:
    """Issue 4.5: it is seen in the statistics, told once, blocks no write and no close; then the log goes back."""
    never_busy(monkeypatch)
    with Persistency(root) as persistency:
        job = persistency.open_job("a")
        commit_in_place(job, 0)
        quiet.wait(job)
        with reading(root / "a.db") as stranger:
            assert stranger.seen == 1
            for number in range(1, 30):
                if moment == "before the last commit" or number > 1:
                    in_thread(lambda number=number: commit_in_place(job, number)).result(WAIT)  # type: ignore[misc]
                quiet.wait(job)
                time.seconds += FOLD_SECONDS
                in_thread(lambda: look(job, quiet)).result(WAIT)
            assert job.statistics().wal_pinned
            assert job.statistics().wal_bytes > 0
            assert wal_bytes(root) > 0
            assert len(warnings_of(caplog)) == 1
            assert "somebody is reading" in warnings_of(caplog)[0]
            in_thread(lambda: job.flush(sync=True).result(WAIT)).result(WAIT)
        commit_in_place(job, 99)
        quiet.wait(job)
        time.seconds += FOLD_SECONDS
        look(job, quiet)
        assert not job.statistics().wal_pinned
        assert wal_bytes(root) == job.statistics().wal_bytes == 0
        with reading(root / "a.db"):
            commit_in_place(job, 100)
            in_thread(job.close).result(WAIT)
        assert len(warnings_of(caplog)) == 1
        assert persistency.open_job("a").get("c", (100,)).result(WAIT) == b"x"
        assert persistency["a"].get("c", (99,)).result(WAIT) == b"x"


def test_forced_checkpoints_beside_a_stranger_do_not_spin(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Issue 4.5: what can't be carried over isn't tried again and again: one attempt for so many pages."""
    never_busy(monkeypatch)
    monkeypatch.setattr(sqlite, "CHECKPOINT_IDLE_PAGES", 40)
    monkeypatch.setattr(sqlite, "CHECKPOINT_FORCED_PAGES", 100)
    attempts = []
    really = WriteAheadLog._checkpoint
    monkeypatch.setattr(
        WriteAheadLog, "_checkpoint", lambda log, mode: (attempts.append(log.pages), really(log, mode))[1]
    )
    with Persistency(root) as persistency:
        job = persistency.open_job("a", mailbox_ops_max=64, sync_interval=None)
        commit_in_place(job, 0)
        with reading(root / "a.db"):
            attempts.clear()
            for number in range(2_000):
                job.put("c", (number % 50,), bytes(2_000))
            job.flush().result(WAIT)
            for number in range(200):
                commit_in_place(job, number)
            pages = job.statistics().wal_bytes // schema.PAGE_BYTES
            assert pages > 300
            assert 1 <= len(attempts) <= pages // 40 + 2
            assert job.statistics().wal_pinned
        for number in range(100):
            commit_in_place(job, number)
        assert job.statistics().wal_bytes // schema.PAGE_BYTES <= 40 + 2
        assert not job.statistics().wal_pinned
    assert len(warnings_of(caplog)) == 1


def test_a_checkpoint_that_could_carry_nothing_over_has_synced_nothing(root: Path, disk: Disk) -> None:
    """Promise 5: beside a reader that pins the log, what no checkpoint has synced is unsynced, and isn't noted."""
    store = DirectoryRoot(root, disk.name).open("a", StoreOptions())
    try:
        store.apply([b"c", b"first", b"x"], 1)
        with reading(root / "a.db"):
            for checkpoint in (store.checkpoint, store.checkpoint, store.fold, store.checkpoint):
                store.apply([b"c", b"k", bytes(3_000)], 1)
                disk.calls.clear()
                checkpoint()
                assert store.unsynced or disk.syncs() > 0
                noted = store._claim.record.version
                assert (noted == store.status().last_version) is not store.unsynced
    finally:
        store.close()


# -- losses ------------------------------------------------------------------------------------------------------------


def digests(root: Path) -> dict[str, str]:
    """Return a digest of every file in a root, but for its locks, and what SQLite makes of a log for itself."""
    files = (path for path in sorted(root.iterdir()) if path.suffix not in (".lock", ".db-shm") and path.stat().st_size)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_loss(root: Path, rows: int = 0) -> None:
    """Check that opening reports a loss and touches nothing; with `rows`, the most that can be there, also that it goes
    on with what is there once it is told to.
    """
    before = digests(root)
    for _ in range(2):
        with Persistency(root) as persistency:
            with pytest.raises(Corrupt, match=r"has lost writes|its write-ahead log is still there") as told:
                persistency.open_job("a")
            assert "a.lock" in told.value.hint or "drop_job" in told.value.hint
        assert digests(root) == before
    if not rows:
        return
    (root / "a.lock").unlink()
    with Persistency(root) as persistency:
        job = persistency.open_job("a")
        found = job.keys("c").result(WAIT)
        assert found == [key(number) for number in range(len(found))]  # a prefix
        assert len(found) <= rows
        assert job.check().result(WAIT) == []
        commit_in_place(job, len(found))
    with Persistency(root) as persistency:
        assert persistency.open_job("a").count("c").result(WAIT) == len(found) + 1


@pytest.mark.parametrize("harm", ["deleted", "emptied", "cut", "older"])
def test_a_log_that_is_lost_after_a_clean_close_is_told(root: Path, harm: str) -> None:
    """Issue 4.5: a stranger kept the log from being folded at close, then it was removed or shortened: `Corrupt`."""
    log = root / "a.db-wal"
    with Persistency(root) as persistency:
        job = persistency.open_job("a")
        commit_in_place(job, 0)
        job.flush(sync=True).result(WAIT)
        with reading(root / "a.db"):
            for number in range(1, 20):
                commit_in_place(job, number)
                if number == 10:
                    shutil.copy(log, root / "older")
            job.close()
            assert wal_bytes(root) > 0
            # Under the reader's eyes: its own end would fold the log.
            kept = {path: path.read_bytes() for path in (root / "a.db", log)}
    for path, data in kept.items():
        path.write_bytes(data)
    (root / "a.db-shm").unlink(missing_ok=True)
    older = (root / "older").read_bytes()
    (root / "older").unlink()
    with Persistency(root) as persistency:  # as it is, it is whole
        assert persistency.open_job("a").count("c").result(WAIT) == 20
    for path, data in kept.items():
        path.write_bytes(data)
    if harm == "deleted":
        log.unlink()
    elif harm == "emptied":
        os.truncate(log, 0)
    elif harm == "cut":
        os.truncate(log, len(kept[log]) // 2)
    else:
        log.write_bytes(older)
    check_loss(root, 19)


KILLED = """
import os, signal, sys
from persistency import Persistency, Put
job = Persistency(sys.argv[1]).open_job("a", durability=sys.argv[2])
for number in range(20):
    job.commit([Put("c", (number,), b"x")]).result(10)
if sys.argv[2] == "process":
    job.flush(sync=True).result(10)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("harm", [None, "deleted", "cut"])
def test_a_log_that_is_lost_after_a_kill_is_told(root: Path, durability: str, harm: str | None) -> None:
    """Issue 4.5: what was on the medium when the process was killed, and isn't there now, is `Corrupt`."""
    assert run_child(KILLED, root, durability).returncode == -9
    log = root / "a.db-wal"
    if harm is None:
        with Persistency(root) as persistency:
            assert persistency.open_job("a").count("c").result(WAIT) == 20
        return
    if harm == "deleted":
        log.unlink()
    else:
        os.truncate(log, wal_bytes(root) // 2)
    check_loss(root)
    with Persistency(root) as persistency:
        assert persistency.drop_job("a") != []  # the other way out
        assert persistency.open_job("a").count("c").result(WAIT) == 0


def test_an_older_copy_in_the_place_of_a_job_is_told(root: Path) -> None:
    """Issue 4.5: the last version that was on the medium is known beside the file: an older file is `Corrupt`."""
    with Persistency(root) as persistency:
        with persistency.open_job("a") as job:
            commit_in_place(job, 0)
        shutil.copy(root / "a.db", root / "older")
        with persistency.open_job("a") as job:
            for number in range(1, 10):
                commit_in_place(job, number)
        shutil.copy(root / "a.db", root / "newer")
    os.replace(root / "older", root / "a.db")
    newer = (root / "newer").read_bytes()
    (root / "newer").unlink()
    check_loss(root, 1)
    (root / "a.db").write_bytes(newer)  # a newer one is none
    with Persistency(root) as persistency:
        assert persistency.open_job("a").count("c").result(WAIT) == 10


def test_a_restored_backup_is_no_loss(root: Path) -> None:
    """Issue 4.5: who puts an older backup back by `restore` means it."""
    with Persistency(root) as persistency:
        with persistency.open_job("a") as job:
            commit_in_place(job, 0)
            job.backup(root / "backup").result(WAIT)
            for number in range(1, 10):
                commit_in_place(job, number)
        persistency.restore("a", root / "backup")
        with persistency.open_job("a") as job:
            assert job.count("c").result(WAIT) == 1
    with Persistency(root) as persistency:
        assert persistency.open_job("a").count("c").result(WAIT) == 1


def test_a_job_whose_file_was_removed_begins_anew_and_says_so(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Issue 4.5: whoever removes the database by hand means it; it is told to the log, once."""
    with Persistency(root) as persistency, persistency.open_job("a") as job:
        commit_in_place(job, 0)
    (root / "a.db").unlink()
    for count in (0, 1):
        with Persistency(root) as persistency, persistency.open_job("a") as job:
            assert job.count("c").result(WAIT) == count
            commit_in_place(job, 0)
    assert len(warnings_of(caplog)) == 1
    assert "'a': its file, which was there, is gone; it begins anew" in warnings_of(caplog)[0]


def test_a_log_without_its_file_is_told(root: Path) -> None:
    """Issue 4.5: where only the database was removed, or emptied, its log may have all there is: `Corrupt`."""
    assert run_child(KILLED, root, "process").returncode == -9
    path = root / "a.db"
    kept = path.read_bytes()
    path.unlink()
    check_loss(root)
    path.touch()
    check_loss(root)
    path.write_bytes(kept)
    with Persistency(root) as persistency:
        assert persistency.open_job("a").count("c").result(WAIT) == 20


def test_a_note_that_is_torn_is_taken_for_no_loss(root: Path) -> None:
    """Issue 4.5: a lock file that was cut off or damaged anywhere accuses nobody."""
    with Persistency(root) as persistency, persistency.open_job("a") as job:
        for number in range(5):
            commit_in_place(job, number)
    lock = root / "a.lock"
    whole = lock.read_bytes()
    rng = random.Random(5)
    damaged = [whole[:size] for size in range(0, len(whole), 3)]
    for _ in range(60):
        at = rng.randrange(len(whole.rstrip()))
        damaged.append(whole[:at] + bytes([rng.randrange(256)]) + whole[at + 1 :])
    for data in [*damaged, b"", bytes(4096), b"\xff" * 200, whole.replace(b"version 5", b"version 9")]:
        lock.write_bytes(data)
        store = DirectoryRoot(root).open("a", StoreOptions())
        assert store.status().last_version == 5
        store.close()


KILLER = """
import os, random, signal, sys
from persistency import Persistency, Put
root, cycles, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
rng = random.Random(seed)

def write(pipe):
    job = Persistency(root).open_job("a", sync_interval=0.001)
    number = job.count("c").result(10)
    while True:
        job.put("c", (number,), bytes(100))
        if number % 3 == 0:
            job.commit([Put("d", (number,), bytes(500))]).result(10)
        if number % 7 == 0:
            job.flush(sync=number % 2 == 0).result(10)
        number += 1
        os.write(pipe, b".")

def read():
    with Persistency(root) as persistency:
        print(persistency.open_job("a").version().result(10), flush=True)

def fork(act, *args):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            act(*args)
            code = 0
        finally:
            sys.stdout.flush()
            os._exit(code)
    return pid

for cycle in range(cycles):
    out, into = os.pipe()
    pid = fork(write, into)
    os.close(into)
    for _ in range(rng.choice((1, 2, 5, 20, 60))):
        assert os.read(out, 1) == b".", "the writer has failed"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(out)
    assert os.waitpid(fork(read), 0)[1] == 0, f"cycle {cycle}: it can't be opened"
"""


def test_a_kill_alone_is_never_taken_for_a_loss(root: Path) -> None:
    """Issue 4.5: after 50 kills at any moment, amid syncs and notes, the job opens every time, and never has less."""
    seed = 20_26
    done = run_child(KILLER, root, KILLS, seed)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-2_000:]}"
    versions = list(map(int, done.stdout.split()))
    assert len(versions) == KILLS
    assert versions == sorted(versions)
    assert versions[-1] > KILLS


# -- files that are moved while they are open --------------------------------------------------------------------------


def unlinked(path: Path) -> None:
    """Remove a file."""
    path.unlink()


def renamed(path: Path) -> None:
    """Rename a file."""
    path.rename(path.with_name("elsewhere"))


def replaced(path: Path) -> None:
    """Put a copy in the place of a file, that tells its times too."""
    shutil.copy2(path, path.with_name("copy"))
    os.replace(path.with_name("copy"), path)


def swapped(path: Path) -> None:
    """Put a directory in the place of a file."""
    path.unlink()
    path.mkdir()


def linked(path: Path) -> None:
    """Move a file, and leave a link to it."""
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


MOVES = (unlinked, renamed, replaced, swapped, linked)


def ask_in_task(ask: Callable[[Job], Any], loop: str = "asyncio") -> Callable[[Job], Any]:
    """Have a request made under an event loop."""
    return lambda job: LOOPS[loop](ask, job)


def put_and_flush(job: Job) -> Any:
    """Post, and wait for it."""
    job.put("c", ("new",), b"new")
    return job.flush().result(WAIT)


VERBS: dict[str, Callable[[Job], Any]] = {
    "commit": lambda job: job.commit([Put("c", ("new",), b"new")]).result(WAIT),
    "put and flush": put_and_flush,
    "flush": lambda job: job.flush().result(WAIT),
    "flush(sync=True)": lambda job: job.flush(sync=True).result(WAIT),
    "run": lambda job: job.run(lambda tx: tx.put("c", ("new",), b"new")).result(WAIT),
    "commit in a task": ask_in_task(lambda job: job.commit([Put("c", ("new",), b"new")])),
    "flush in a task": ask_in_task(lambda job: job.flush()),
    "commit in a task of trio": ask_in_task(lambda job: job.commit([Put("c", ("new",), b"new")]), "trio"),
}


def check_poisoned(job: Job, verb: str) -> None:
    """Check that the next call poisons a job whose file was moved, and nothing of it is acknowledged."""
    before = job.statistics()
    with pytest.raises((Poisoned, Corrupt, WriteFailed)) as told:
        VERBS[verb](job)
    cause: BaseException | None = told.value
    if isinstance(cause, WriteFailed):
        assert {failure.outcome for failure in cause.failures} == {"not applied"}
        cause = cause.failures[0].error
    if isinstance(cause, Poisoned):
        cause = cause.__cause__
    assert isinstance(cause, Corrupt)
    assert "was removed, renamed or replaced while it was open" in str(cause)
    numbers = job.statistics()
    assert numbers.state == "poisoned"
    assert numbers.committed == before.committed
    assert numbers.accepted == numbers.committed + numbers.failed
    for refused in (lambda: job.put("c", ("late",), b""), lambda: job.get("c", ("late",)), job.flush):
        with pytest.raises(Poisoned):
            refused().result(WAIT)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("suffix", [".db", ".db-wal"])
@pytest.mark.parametrize("move", MOVES)
def test_a_file_that_is_moved_while_it_is_open_poisons_the_job(
    root: Path, move: Callable[[Path], None], suffix: str, verb: str
) -> None:
    """Promise 3, issue 4.5: the next write, or flush, is refused at once, with `Corrupt` as its cause; others go on."""
    with contextlib.suppress(WriteFailed, Corrupt), Persistency(root) as persistency:
        job, other = persistency.open_job("a"), persistency.open_job("b")
        for one in (job, other):
            commit_in_place(one, 0)
        move(root / f"a{suffix}")
        check_poisoned(job, verb)
        commit_in_place(other, 1)
        assert other.count("c").result(WAIT) == 2
        assert other.statistics().state == "live"


@pytest.mark.parametrize("times", [1, 300])
def test_it_is_noticed_however_long_the_job_has_been_open(root: Path, times: int) -> None:
    """Promise 3: between two writes of many, just after the last one, and after other files have come and gone."""
    with contextlib.suppress(WriteFailed, Corrupt), Persistency(root) as persistency:
        job = persistency.open_job("a")
        for number in range(times):
            commit_in_place(job, number)
            if number % 50 == 0:
                (root / "notes.txt").touch()
                (root / "notes.txt").unlink()
        replaced(root / "a.db")
        check_poisoned(job, "commit")


def renamed_root(root: Path) -> None:
    """Rename the root."""
    root.rename(root.with_name("elsewhere"))


def replaced_root(root: Path) -> None:
    """Put a copy with the same times in the place of the root, as a backup program does."""
    copy = root.with_name("copy")
    shutil.copytree(root, copy)
    assert copy.stat().st_mtime_ns == root.stat().st_mtime_ns
    root.rename(root.with_name("elsewhere"))
    copy.rename(root)


def removed_root(root: Path) -> None:
    """Remove the root with all that is in it."""
    shutil.rmtree(root)


@pytest.mark.parametrize("verb", ["commit", "put and flush", "flush"])
@pytest.mark.parametrize("move", [renamed_root, replaced_root, removed_root])
def test_a_root_that_is_moved_poisons_its_jobs(root: Path, move: Callable[[Path], None], verb: str) -> None:
    """Promise 3, issue 4.5: all of them, each at its next write or flush."""
    with contextlib.suppress(WriteFailed, Corrupt), Persistency(root) as persistency:
        jobs = [persistency.open_job(name) for name in "ab"]
        for job in jobs:
            for number in range(3):
                commit_in_place(job, number)
        move(root)
        for job in jobs:
            check_poisoned(job, verb)


@pytest.mark.parametrize("suffix", [".db", ".db-wal"])
def test_a_moved_file_is_noticed_in_the_background_too(root: Path, time: Steady, quiet: Quiet, suffix: str) -> None:
    """Promise 3: a sync that nobody asked for doesn't say that all is well either."""
    with contextlib.suppress(WriteFailed, Corrupt), Persistency(root) as persistency:
        job = persistency.open_job("a", sync_interval=1.0)
        commit_in_place(job, 0)
        quiet.wait(job)
        (root / f"a{suffix}").unlink()
        time.seconds += 1.0
        look(job, quiet)
        assert job.statistics().state == "poisoned"


@pytest.mark.parametrize("suffix", [".db", ".db-wal"])
def test_a_close_that_finds_the_file_gone_says_so(root: Path, suffix: str) -> None:
    """Promise 3: what was committed and acknowledged is lost with the file: closing is no success."""
    persistency = Persistency(root)
    job = persistency.open_job("a")
    commit_in_place(job, 0)
    (root / f"a{suffix}").unlink()
    with pytest.raises(Corrupt, match="removed, renamed or replaced"):
        job.close()
    persistency.close()


def test_what_was_acknowledged_before_is_there_when_the_file_is_put_back(root: Path) -> None:
    """Promise 3: nothing of what was refused is in it, and all that was acknowledged before."""
    with contextlib.suppress(WriteFailed, Corrupt), Persistency(root) as persistency:
        job = persistency.open_job("a")
        for number in range(5):
            commit_in_place(job, number)
        job.flush(sync=True).result(WAIT)
        (root / "a.db").rename(root / "elsewhere")
        check_poisoned(job, "put and flush")
        (root / "elsewhere").rename(root / "a.db")
        with pytest.raises(Poisoned):  # until it is opened again
            job.put("c", ("late",), b"")
        with contextlib.suppress(WriteFailed):
            job.close()
        again = persistency.open_job("a")
        assert again.keys("c").result(WAIT) == [key(number) for number in range(5)]
        assert again.check().result(WAIT) == []


def test_files_that_are_not_the_jobs_may_come_and_go(root: Path) -> None:
    """Isolation: whatever else happens in the root, to other jobs' files too, poisons nobody."""
    with Persistency(root) as persistency:
        job = persistency.open_job("a")
        for number in range(20):
            commit_in_place(job, number)
            with persistency.open_job(f"other{number}") as other:
                commit_in_place(other, 0)
            persistency.drop_job(f"other{number}")
            (root / f"file{number}").touch()
            os.utime(root, (number, number))
        assert job.statistics().state == "live"
        assert job.count("c").result(WAIT) == 20
