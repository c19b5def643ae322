"""What is kept beside the rows, in files that somebody has tampered with: refused, counted anew, or told as a gap."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from persistency import Corrupt, FeedTruncated, Job, Persistency, Poisoned
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import DropRow, StoreOptions, UsedBytes
from persistency.storage.sqlite import SqliteStore

START = 1_700_000_000.0
WAIT = 20.0
KEEPING = {"feed_changes_max": 100}
QUOTA = {"max_bytes": 10}


class Wall:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall() -> Wall:
    """A clock."""
    return Wall()


def fill(root: Path, wall: Wall, **options: Any) -> Path:
    """Make a job with a row that ends and one that doesn't, and close it."""
    with Persistency(root, clock=wall) as p:
        job = p.open_job("a", **options)
        job.put("c", ("ends",), b"12345", ttl=60)
        job.put("c", ("stays",), b"123")
        job.flush().result(WAIT)
        assert job.path is not None
        return job.path


def tamper(path: Path, *statements: str) -> None:
    """Change a closed job's file with another tool."""
    with closing(sqlite3.connect(path)) as file:
        for statement in statements:
            file.execute(statement)
        file.commit()


def ask_for_ever(job: Job) -> None:
    """Ask a job until it is poisoned, and every request raises."""
    while True:
        job.version().result(WAIT)


@pytest.mark.parametrize("options", [{}, KEEPING], ids=["plain", "with a feed"])
def test_an_index_that_names_a_row_that_is_not_there_poisons(
    tmp_path: Path, wall: Wall, options: dict[str, Any]
) -> None:
    """Promise 11: reaping ends with the cause, it doesn't go round for ever, and takes no version."""
    path = fill(tmp_path, wall, **options)
    with closing(sqlite3.connect(path)) as file:
        (index,) = file.execute("SELECT sql FROM sqlite_schema WHERE name = 'kv_expires'").fetchall()
        (root,) = file.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'kv_expires'").fetchall()
    hide = ("PRAGMA writable_schema = on", "DELETE FROM sqlite_schema WHERE name = 'kv_expires'")
    tamper(path, *hide)
    tamper(path, "DELETE FROM kv", "PRAGMA writable_schema = on")
    with closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA writable_schema = on")
        file.execute("INSERT INTO sqlite_schema VALUES ('index', 'kv_expires', 'kv', ?, ?)", (*root, *index))
        file.commit()
    wall.now += 61
    p = Persistency(tmp_path, clock=wall)
    job = p.open_job("a", **options)
    with pytest.raises(Poisoned) as poisoned:
        ask_for_ever(job)
    assert isinstance(poisoned.value.__cause__, Corrupt)
    p.close()
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("SELECT value FROM meta WHERE name = 'last_version'").fetchone() == (2,)


@pytest.mark.parametrize("name", ["latest_ms", "used_ms"])
def test_a_time_beyond_any_clock_is_refused(tmp_path: Path, wall: Wall, name: str) -> None:
    """It would end every row at once, or be more digits than an end has."""
    path = fill(tmp_path, wall, **QUOTA)
    tamper(path, f"INSERT OR REPLACE INTO meta VALUES ('{name}', 10000000000000000)")
    with Persistency(tmp_path, clock=wall) as p, pytest.raises(Corrupt, match="beyond any clock"):
        p.open_job("a")


@pytest.mark.parametrize("version", ["-5", "9223372036854775807", "'three'", "NULL"])
def test_a_last_version_that_can_not_be_is_refused(tmp_path: Path, wall: Wall, version: str) -> None:
    """Versions would be given twice, or run out."""
    path = fill(tmp_path, wall)
    tamper(path, f"UPDATE meta SET value = {version} WHERE name = 'last_version'")
    with Persistency(tmp_path, clock=wall) as p, pytest.raises(Corrupt, match="last version"):
        p.open_job("a")


def test_an_interrupt_behind_a_commit_leaves_the_file_right(tmp_path: Path) -> None:
    """What is known of the file's notes is forgotten then, so the next commit writes them all."""
    interrupts = iter([KeyboardInterrupt()])

    class Interrupted(SqliteStore):
        def _commit(self, before: int, **how: Any) -> None:
            super()._commit(before, **how)
            for interrupt in interrupts:
                raise interrupt

    root = DirectoryRoot(tmp_path)
    options = StoreOptions(max_bytes=100)
    with closing(root.open("a", options)) as store:
        store.apply([b"c", b"k", b"1234567890"], 0)
        store.__class__ = Interrupted
        with pytest.raises(KeyboardInterrupt):
            store.apply([b"c", b"l", b"1234567890"], 0)
        assert store.read(UsedBytes(), 0) == 20  # it is committed
        store.apply([None, DropRow(b"c", b"l"), None], 0)
    with closing(root.open("a", options)) as store:
        assert store.read(UsedBytes(), 0) == 10


@pytest.mark.parametrize("used", ["-1000000", "9223372036854775807", "'much'", "NULL", "1.5"])
def test_bytes_in_use_that_can_not_be_are_counted_anew(tmp_path: Path, wall: Wall, used: str) -> None:
    """The quota holds, whatever the file says of it."""
    path = fill(tmp_path, wall, **QUOTA)
    tamper(path, f"UPDATE meta SET value = {used} WHERE name = 'used_bytes'")
    with Persistency(tmp_path, clock=wall) as p:
        assert p.open_job("a", **QUOTA).storage_used().result(WAIT) == 8


def test_text_in_another_encoding_is_refused(tmp_path: Path, wall: Wall) -> None:
    """SQLite would store the file's own encoding where this engine relies on UTF-8."""
    path = fill(tmp_path, wall)
    with closing(sqlite3.connect(path)) as file:
        schema = [sql for (sql,) in file.execute("SELECT sql FROM sqlite_schema WHERE sql IS NOT NULL")]
        meta = file.execute("SELECT name, value FROM meta").fetchall()
    path.unlink()
    with closing(sqlite3.connect(path)) as file:
        file.execute("PRAGMA encoding = 'UTF-16le'")
        for sql in schema:
            file.execute(sql)
        file.executemany("INSERT INTO meta VALUES (?, ?)", meta)
        file.execute("PRAGMA user_version = 2")
        file.commit()
    before = path.read_bytes()
    with Persistency(tmp_path, clock=wall) as p, pytest.raises(Corrupt, match="UTF-16le"):
        p.open_job("a")
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE changes SET kind = x'ff' WHERE version = 1",
        "UPDATE changes SET kind = 'zap' WHERE version = 1",
        "UPDATE changes SET category = x'ff' WHERE version = 1",
    ],
)
def test_a_change_nobody_here_has_written_is_corrupt(tmp_path: Path, wall: Wall, statement: str) -> None:
    """The reply says so; the call doesn't raise, and the job goes on."""
    tamper(fill(tmp_path, wall, **KEEPING), statement)
    with Persistency(tmp_path, clock=wall) as p:
        job = p.open_job("a", **KEEPING)
        reply = job.changes(0, 10)
        with pytest.raises(Corrupt):
            reply.result(WAIT)
        assert [change.version for change in job.changes(1, 10).result(WAIT)] == [2]


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO changes VALUES (3, 'put', x'63', x'', x'', NULL)",
        "INSERT INTO changes VALUES (9223372036854775807, 'put', x'63', x'', x'', NULL)",
        "UPDATE meta SET value = 1000 WHERE name = 'changes_dropped'",
        "UPDATE meta SET value = -1 WHERE name = 'changes_dropped'",
        "DROP TABLE changes",
    ],
)
def test_a_change_log_that_can_not_be_begins_anew(tmp_path: Path, wall: Wall, statement: str) -> None:
    """Who followed is told that changes are missing, and new ones are kept."""
    tamper(fill(tmp_path, wall, **KEEPING), statement)
    with Persistency(tmp_path, clock=wall) as p:
        job = p.open_job("a", **KEEPING)
        with pytest.raises(FeedTruncated):
            job.changes(0, 10).result(WAIT)
        job.put("c", ("new",), b"")
        assert [(change.version, change.kind) for change in job.changes(2, 10).result(WAIT)] == [(3, "put")]


def test_every_reap_where_changes_were_kept_once_takes_a_version(tmp_path: Path, wall: Wall) -> None:
    """Also behind other writes: a follower that resumes at the version it saw is told that an expiry is missing."""
    fill(tmp_path, wall, **KEEPING)
    with Persistency(tmp_path, clock=wall) as p:
        job = p.open_job("a")
        assert not job.compare_and_set("c", ("stays",), b"other", b"").result(WAIT)
        assert job.version().result(WAIT) == 2  # what comes to nothing takes none
        job.put("c", ("more",), b"")
        seen = job.version().result(WAIT)
        wall.now += 61
        while job.version().result(WAIT) == seen:  # a barrier wakes the worker; the time limit is the test's
            job.flush().result(WAIT)
    with Persistency(tmp_path, clock=wall) as p:
        job = p.open_job("a", **KEEPING)
        with pytest.raises(FeedTruncated):
            job.changes(seen, 10).result(WAIT)
        assert job.changes(seen + 1, 10).result(WAIT) == []


@pytest.mark.parametrize("says", [float("nan"), float("inf"), float("-inf"), -5.0, 1e300])
def test_a_clock_that_says_nothing_is_not_believed(wall: Wall, says: float) -> None:
    """The job's time stands still then, or at the furthest a clock goes; nobody is poisoned."""
    with Persistency(":memory:", clock=wall) as p:
        job = p.open_job("a")
        job.put("c", ("k",), b"", ttl=60)
        job.flush().result(WAIT)
        wall.now = says
        assert job.exists("c", ("k",)).result(WAIT) is (says != 1e300)
        job.put("c", ("l",), b"", ttl=60)
        assert job.get("c", ("l",)).result(WAIT) == b""


def test_what_a_float_lacks_takes_no_millisecond_away(wall: Wall) -> None:
    """1000.024 s is 1,000,024 ms, though as a float it is a little less."""
    for ms in range(1, 1000):
        wall.now = 1000.0
        with_ttl = ms / 1000
        with Persistency(":memory:", clock=wall) as p:
            job = p.open_job("a")
            job.put("c", ("k",), b"", ttl=with_ttl)
            assert job.exists("c", ("k",)).result(WAIT)
            wall.now = 1000.0 + with_ttl
            assert not job.exists("c", ("k",)).result(WAIT)
