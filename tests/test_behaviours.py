"""Behaviours of the reference systems that no other test names: roots, jobs, writes, reads, the file, errors, workers.

Each test names its statements. They use public names; where a fault is needed they tamper with SQLite, not with us.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import apsw
import pytest

from persistency import (
    Closed,
    Corrupt,
    Delete,
    Job,
    JobNotFound,
    KeyRange,
    Misuse,
    Persistency,
    PersistencyError,
    Put,
    Row,
    SchemaTooNew,
    StorageError,
    Unavailable,
    key,
)
from persistency.codec.fixed import fixed_payload
from persistency.codec.values import decode, encode
from persistency.storage.memory import MemoryStore

WAIT = 20.0  # seconds a test waits for what must come
KV_1 = (
    "CREATE TABLE kv (category BLOB NOT NULL, key BLOB NOT NULL, payload BLOB NOT NULL, "
    "PRIMARY KEY (category, key)) WITHOUT ROWID"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Name a root that doesn't exist yet."""
    return tmp_path / "root"


@pytest.fixture
def persistency(root: Path) -> Iterator[Persistency]:
    """Give a root on a directory."""
    with Persistency(root) as opened:
        yield opened


@pytest.fixture(params=["memory", "directory"])
def job(request: pytest.FixtureRequest, root: Path) -> Iterator[Job]:
    """Give an empty job over either adapter."""
    with Persistency(":memory:" if request.param == "memory" else root) as opened:
        yield opened.open_job("job")


def look(path: Path, sql: str) -> list[Any]:
    """Ask a file something with the standard library; only ever one that no job of this process has open."""
    connection = sqlite3.connect(path)
    rows = connection.execute(sql).fetchall()
    connection.close()
    return rows


def look_from_outside(path: Path, sql: str) -> list[Any]:
    """Ask the file of an open job something, in another process."""
    program = "import json, sqlite3, sys; print(json.dumps([*sqlite3.connect(sys.argv[1]).execute(sys.argv[2])]))"
    command = [sys.executable, "-W", "ignore", "-c", program, str(path), sql]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return [tuple(row) for row in json.loads(done.stdout)]


def assert_no_worker_is_left(*job_ids: str) -> None:
    """See that the threads of jobs come to their end; a closed job's may be in its last line still."""
    for thread in threading.enumerate():
        if thread.name.removeprefix("persistency:") in job_ids:
            thread.join(WAIT)
            assert not thread.is_alive()


def write_version_1(path: Path, rows: list[tuple[bytes, bytes, bytes]], version: int = 1) -> None:
    """Write a file of the original, or one that says it is of another version."""
    path.parent.mkdir(exist_ok=True)
    connection = sqlite3.connect(path)
    connection.execute(KV_1)
    connection.executemany("INSERT INTO kv VALUES (?, ?, ?)", rows)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.commit()
    connection.close()


@contextmanager
def every_connection(prepare: Callable[[apsw.Connection], object]) -> Iterator[None]:
    """Do something with every connection to SQLite as it is made."""
    apsw.connection_hooks.append(prepare)
    try:
        yield
    finally:
        apsw.connection_hooks.remove(prepare)


# -- roots --------------------------------------------------------------------------------------------------------


def test_one_object_serves_many_threads(persistency: Persistency) -> None:
    """S3-18: any thread opens, finds, lists, uses and closes jobs of one `Persistency`, at the same time."""
    shared = persistency.open_job("shared")

    def work(number: int) -> int:
        for at in range(20):
            with persistency.open_job(f"own-{number}") as own:
                assert persistency.job(own.id) is own
                assert own.id in list(persistency)
                own.put("c", (at,), b"")
                persistency["shared"].put("c", (number, at), b"")
            assert f"own-{number}" not in persistency
        return persistency.open_job(f"own-{number}").count("c").result(WAIT)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [20] * 8
    assert shared.count("c").result(WAIT) == 160


def test_an_owner_that_is_dropped_harms_no_other(root: Path) -> None:
    """S3-21: one of two objects on a root goes away without being closed; the other's job and data are untouched."""
    with Persistency(root) as second:
        first = [Persistency(root)]
        left_open = first[0].open_job("a")
        left_open.put("c", (1,), b"from the first")
        job = second.open_job("a")
        with pytest.warns(ResourceWarning, match="unclosed"):
            first.clear()
        job.put("c", (2,), b"from the second")
        assert [row.payload for row in job.scan("c").result(WAIT)] == [b"from the first", b"from the second"]
        job.flush(sync=True).result(WAIT)
        left_open.close(WAIT)
        assert job.count("c").result(WAIT) == 2
    with Persistency(root) as third:
        assert third.open_job("a").count("c").result(WAIT) == 2


def test_there_is_no_root_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S3-24: where the data goes is always said; nothing is ever put into the working directory unasked."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TypeError, match="root"):
        Persistency()  # type: ignore[call-arg]
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_can_not_be_made_says_so_and_can_be_made_later(root: Path) -> None:
    """S0-4, S2-17: the opening names the path; the failure isn't remembered: without its cause the job opens."""
    persistency = Persistency(root)
    root.write_text("in the way")
    for _ in range(2):
        with pytest.raises((PersistencyError, OSError), match=str(root)):
            persistency.open_job("a")
        assert "a" not in persistency
    root.unlink()
    persistency.open_job("a").put("c", ("k",), b"")
    persistency.close(WAIT)
    assert root.stat().st_mode & 0o777 == 0o700


def test_each_tenant_has_a_file_of_its_own(persistency: Persistency, root: Path) -> None:
    """S0-1, S0-2, S0-3, S0-5: tenants are separate files under a private root, and their data survives a restart."""
    for tenant in ("plugin-a", "plugin-b"):
        persistency.open_job(tenant).put("c", ("same",), tenant.encode())
    persistency.close(WAIT)
    assert sorted(path.name for path in root.glob("*.db")) == ["plugin-a.db", "plugin-b.db"]
    assert root.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in root.iterdir()} == {0o600}
    with Persistency(root) as again:
        for tenant in ("plugin-a", "plugin-b"):
            assert again.open_job(tenant).get("c", ("same",)).result(WAIT) == tenant.encode()


def test_no_id_leaves_the_root_or_meets_another(persistency: Persistency, root: Path, tmp_path: Path) -> None:
    """S0-92: dots, separators, trailing dots and spaces, reserved names: each is a job of its own, inside the root."""
    ids = [".", "..", "a/b", "a\\b", "../x", "/x", "a", "a.", "a ", "A", "nul", "NUL.db", "a%2Fb"]
    for job_id in ids:
        persistency.open_job(job_id).put("c", ("id",), job_id.encode())
    paths = [persistency[job_id].path for job_id in ids]
    assert {path.parent for path in paths if path is not None} == {root}
    assert len({str(path).casefold() for path in paths}) == len(ids)
    assert [persistency[job_id].get("c", ("id",)).result(WAIT) for job_id in ids] == [name.encode() for name in ids]
    persistency.close(WAIT)
    assert list(tmp_path.iterdir()) == [root]


def test_a_half_failed_start_closes_what_it_has_opened(root: Path) -> None:
    """S0-90: an exception in the block closes every job, so that the next attempt finds them free."""
    jobs = []

    def start() -> None:
        with Persistency(root) as persistency:
            jobs.extend([persistency.open_job(name) for name in ("a", "b")])
            jobs[0].put("c", ("k",), b"kept")
            raise RuntimeError("the next part failed")

    with pytest.raises(RuntimeError, match="the next part failed"):
        start()
    assert all(job.closed for job in jobs)
    assert_no_worker_is_left("a", "b")
    with Persistency(root) as persistency:
        assert persistency.open_job("a").get("c", ("k",)).result(WAIT) == b"kept"


# -- jobs by id ---------------------------------------------------------------------------------------------------

BY_ID: dict[str, Callable[[Job], object]] = {
    "get": lambda job: job.get("c", ("k",)),
    "count": lambda job: job.count("c"),
    "exists": lambda job: job.exists("c", ("k",)),
    "scan": lambda job: job.scan("c"),
    "scan_prefix": lambda job: job.scan_prefix("c", ("k",)),
    "delete_acked": lambda job: job.delete_acked("c", ("k",)),
    "put": lambda job: job.put("c", ("k",), b""),
    "persist": lambda job: job.persist([Put("c", ("k",), b""), Delete("c", ("l",))]),
}


@pytest.mark.parametrize("verb", BY_ID)
def test_by_id_every_verb_of_a_job_that_is_not_open_is_refused(verb: str, persistency: Persistency, root: Path) -> None:
    """S3-59, S3-77: reads and writes by an unknown or closed id raise `JobNotFound` at the call; no job is made."""
    persistency.open_job("closed").close(WAIT)
    for job_id in ("unknown", "closed"):
        with pytest.raises(JobNotFound, match=job_id):
            BY_ID[verb](persistency[job_id])
        assert not persistency.has_job(job_id)
    assert not (root / "unknown.db").exists()
    assert look(root / "closed.db", "SELECT count(*) FROM kv") == [(0,)]


def test_dropping_is_repeatable_and_the_job_usable_again(persistency: Persistency, root: Path) -> None:
    """S2-18: a drop removes everything, a second one nothing, and the id opens again as an empty job."""
    for _ in range(2):
        job = persistency.open_job("a")
        assert job.categories().result(WAIT) == []
        job.put("c", ("k",), b"")
        assert root / "a.db" in persistency.drop_job("a")
        assert persistency.drop_job("a") == []
        assert list(root.glob("a.*")) == []


# -- writes and reads ---------------------------------------------------------------------------------------------


def test_flush_means_committed(persistency: Persistency) -> None:
    """S3-47: once `flush` has answered, another process finds in the file all that was posted before."""
    job = persistency.open_job("a")
    for number in range(1000):
        job.put("c", (number,), b"x")
    job.flush().result(WAIT)
    assert job.path is not None
    assert look_from_outside(job.path, "SELECT count(*), sum(length(payload)) FROM kv") == [(1000, 1000)]


def test_a_posted_delete_is_seen_by_the_next_read(job: Job) -> None:
    """S3-55, S2-13: no polling: the read behind a delete finds nothing, and deleting again is fine."""
    for number in range(200):
        job.put("c", (number,), b"x")
        assert job.exists("c", (number,)).result(WAIT) is True
        job.delete("c", (number,))
        assert job.exists("c", (number,)).result(WAIT) is False
        job.delete("c", (number,))
    assert job.flush().result(WAIT) is None


def test_encoded_values_come_back_as_the_same_bytes(job: Job) -> None:
    """S3-57: what was encoded, as CBOR or as the original did, is stored and given back untouched."""
    for number, payload in enumerate((encode({"id": 7, "tags": ["a"]}), fixed_payload("id", 7, True, b"\0\xff"))):
        job.put("c", (number,), payload)
        assert job.get("c", (number,)).result(WAIT) == payload


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 8191, 8193, 65_537, 1_000_000])
def test_no_size_is_dropped(size: int, job: Job) -> None:
    """S3-61b: values, batches and answers far beyond 4 and 8 KB come through whole."""
    payload = os.urandom(size)
    job.put("c", ("alone",), payload)
    job.persist([Put("c", ("batch", number), payload) for number in range(5)])
    assert job.get("c", ("alone",)).result(WAIT) == payload
    assert job.scan_prefix("c", ("batch",)).result(WAIT) == [Row(key("batch", n), payload) for n in range(5)]


def test_a_batch_and_an_answer_of_ten_thousand(job: Job) -> None:
    """S3-61b: one batch of 10,000 operations is one message, and so is the answer with their rows."""
    job.persist([Put("c", (number,), b"%d" % number) for number in range(10_000)])
    rows = job.scan("c").result(WAIT)
    assert [row.payload for row in rows] == [b"%d" % number for number in range(10_000)]


def test_a_read_that_takes_too_long_is_a_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3-81, S3-119: waiting too long is the builtin `TimeoutError`, not a failure of storage; the read goes on."""
    entered, may_go = threading.Event(), threading.Event()
    apply = MemoryStore.apply

    def held(*arguments: Any) -> list[Any]:
        entered.set()
        assert may_go.wait(WAIT)
        return apply(*arguments)

    monkeypatch.setattr(MemoryStore, "apply", held)
    with Persistency(":memory:") as persistency:
        job = persistency.open_job("a")
        job.put("c", ("k",), b"x")
        assert entered.wait(WAIT)
        reply = job.scan("c")
        try:
            with pytest.raises(TimeoutError, match="goes on") as caught:
                reply.result(0.01)
            assert not isinstance(caught.value, PersistencyError)
        finally:
            may_go.set()
        assert [row.payload for row in reply.result(WAIT)] == [b"x"]


@pytest.mark.parametrize(
    "parts", [("",), ("a", ""), ("a/b", "c"), ("ü", "日本", "🙂"), ("a\0b",), ('"', "\\", "%_"), ("a",) * 50]
)
def test_keys_are_tuples_of_any_text(parts: tuple[str, ...], job: Job) -> None:
    """S2-1, S2-2, S2-10: any text makes a part, the beginning of a stored key isn't one, an upsert leaves one row."""
    job.put("c", parts, b"1")
    job.put("c", parts, b"2")
    assert job.get("c", parts).result(WAIT) == b"2"
    assert [row.key.parts for row in job.scan("c").result(WAIT)] == [parts]
    for length in range(len(parts)):
        assert job.get("c", parts[:length]).result(WAIT) is None


@pytest.mark.parametrize(
    "value", [None, False, True, 0, -1, 1.5, "", "text", b"", [], {}, {"a": [1, {"b": None}], "ü": "\0"}, [[[]]]]
)
def test_any_plain_value_is_stored(value: Any, job: Job) -> None:
    """S2-3, S2-4, S2-6: values that are false or null come back as themselves, and aren't mistaken for missing."""
    job.put("c", ("k",), encode(value))
    payload = job.get("c", ("k",)).result(WAIT)
    assert payload is not None
    assert (decode(payload), type(decode(payload))) == (value, type(value))
    assert job.exists("c", ("k",)).result(WAIT) is True
    assert job.get("c", ("missing",)).result(WAIT) is None


def test_nothing_is_no_payload(job: Job) -> None:
    """S2-5: putting `None` is refused at the call, and the key stays absent."""
    with pytest.raises(Misuse, match="payload"):
        job.put("c", ("k",), None)  # type: ignore[arg-type]
    assert job.exists("c", ("k",)).result(WAIT) is False
    assert job.version().result(WAIT) == 0


@pytest.mark.parametrize("memory", [False, True])
def test_a_row_ends_when_its_time_is_over(memory: bool, root: Path) -> None:
    """S2-7, S2-8, S2-9, S2-12, S2-14: to the millisecond; a ttl of 0 is refused; a put without one clears it."""
    now = [1000.0]
    with Persistency(":memory:" if memory else root, clock=lambda: now[0]) as persistency:
        job = persistency.open_job("a")
        job.put("c", ("day",), b"x", ttl=timedelta(days=1))
        job.put("c", ("cleared",), b"x", ttl=1)
        job.put("c", ("cleared",), b"y")
        with pytest.raises(Misuse, match="ttl"):
            job.put("c", ("none",), b"x", ttl=0)
        entry = job.entry("c", ("day",)).result(WAIT)
        assert entry is not None
        assert entry.expires_ms == 1_000_000 + 86_400_000
        now[0] += 86_400 - 0.001
        assert job.get("c", ("day",)).result(WAIT) == b"x"
        now[0] = 1000.0 + 86_400
        assert job.get("c", ("day",)).result(WAIT) is None
        assert [row.key.parts for row in job.scan("c").result(WAIT)] == [("cleared",)]


# -- the file -----------------------------------------------------------------------------------------------------


def test_the_schema_is_one_plain_table(persistency: Persistency, root: Path) -> None:
    """S3-84, S3-87, S0-7, S0-8, S0-9, S0-10: a new file has the table and the number; reopening changes nothing."""
    persistency.open_job("a").put("c", ("k",), b"x")
    persistency.close(WAIT)
    schema = look(root / "a.db", "SELECT type, name, sql FROM sqlite_schema ORDER BY name")
    for _ in range(2):
        assert look(root / "a.db", "PRAGMA user_version") == [(2,)]
        columns = look(root / "a.db", "SELECT name, type, pk FROM pragma_table_info('kv')")
        assert columns[:3] == [("category", "BLOB", 1), ("key", "BLOB", 2), ("payload", "BLOB", 0)]
        assert [name for name, _, _ in columns[3:]] == ["version", "expires_ms"]
        assert look(root / "a.db", "SELECT wr FROM pragma_table_list('kv')") == [(1,)]
        assert look(root / "a.db", "SELECT type, name, sql FROM sqlite_schema ORDER BY name") == schema
        with Persistency(root) as again:
            assert again.open_job("a").get("c", ("k",)).result(WAIT) == b"x"


@pytest.mark.parametrize(("durability", "synchronous"), [("process", 1), ("power", 2)])
def test_the_pragmas(durability: Any, synchronous: int, root: Path) -> None:
    """S3-86, S0-6, S2-19: WAL, the durability asked for (what is committed outlives the process by default), 5 s."""
    made: list[apsw.Connection] = []
    wanted = {"journal_mode": "wal", "synchronous": synchronous, "temp_store": 2, "foreign_keys": 0}
    with every_connection(made.append), Persistency(root) as persistency:
        persistency.open_job("a", **({} if durability == "process" else {"durability": durability}))
        found = {name: made[-1].pragma(name) for name in (*wanted, "busy_timeout")}
    assert found == {**wanted, "busy_timeout": 5000}


KILLED = """
import os, signal, sys
from persistency import Persistency
job = Persistency(sys.argv[1]).open_job("a")
for number in range(500):
    job.put("c", (number,), b"x")
job.flush().result(20)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_default_survives_the_end_of_the_process(root: Path) -> None:
    """S2-19: without any option, what was flushed is there after the process was killed."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(root)], capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, b"")
    with Persistency(root) as persistency:
        assert persistency.open_job("a").count("c").result(WAIT) == 500


def refuse(code: int, name: str, answer: int) -> Callable[[apsw.Connection], None]:
    """Let SQLite answer an action, of a name if one is given, in another way than usual."""

    def prepare(connection: apsw.Connection) -> None:
        def decide(action: int, first: str | None, second: str | None, _db: str | None, _by: str | None) -> int:
            changes = action == code and first == name and (code != apsw.SQLITE_PRAGMA or second is not None)
            return answer if changes else apsw.SQLITE_OK

        connection.authorizer = decide

    return prepare


def test_without_a_log_nothing_is_opened(persistency: Persistency, root: Path) -> None:
    """S3-85: a file that doesn't take the WAL mode is `Unavailable`, and opens once it does."""
    ignored = refuse(apsw.SQLITE_PRAGMA, "journal_mode", apsw.SQLITE_IGNORE)
    with every_connection(ignored), pytest.raises(Unavailable, match="write-ahead"):
        persistency.open_job("a")
    assert "a" not in persistency
    persistency.open_job("a").put("c", ("k",), b"")
    assert persistency["a"].count("c").result(WAIT) == 1


@pytest.mark.parametrize("pragma", ["journal_mode", "synchronous", "temp_store"])
def test_a_pragma_that_fails_fails_the_opening(pragma: str, persistency: Persistency) -> None:
    """S3-89: no job is opened with other settings than its own; the cause is SQLite's, and the id is free again."""
    denied = refuse(apsw.SQLITE_PRAGMA, pragma, apsw.SQLITE_DENY)
    with every_connection(denied), pytest.raises(StorageError, match="not authorized") as caught:
        persistency.open_job("a")
    assert isinstance(caught.value.__cause__, apsw.Error)
    assert persistency.open_job("a").version().result(WAIT) == 0


ROWS_1 = [(b"c", b"a", b"1"), (b"c", b"b", b"")]


def test_a_migration_that_fails_changes_nothing(root: Path) -> None:
    """S0-12: a step that fails undoes all of them, the version number too; the next opening migrates."""
    write_version_1(root / "a.db", ROWS_1)
    denied = refuse(apsw.SQLITE_CREATE_INDEX, "kv_expires", apsw.SQLITE_DENY)
    with Persistency(root) as persistency:
        with every_connection(denied), pytest.raises(StorageError, match="not authorized"):
            persistency.open_job("a")
        assert look(root / "a.db", "PRAGMA user_version") == [(1,)]
        assert look(root / "a.db", "SELECT * FROM kv") == ROWS_1
        assert look(root / "a.db", "SELECT name FROM sqlite_schema") == [("kv",)]
        assert persistency.open_job("a").count("c").result(WAIT) == 2
    assert look(root / "a.db", "PRAGMA user_version") == [(2,)]


def test_old_rows_are_permanent(root: Path) -> None:
    """S0-14: rows from before there were TTLs have none, however late it is."""
    write_version_1(root / "a.db", ROWS_1)
    with Persistency(root, clock=lambda: 4e9) as persistency:
        job = persistency.open_job("a")
        assert [row.payload for row in job.scan("c").result(WAIT)] == [b"1", b""]
        entries = [job.entry("c", row.key).result(WAIT) for row in job.scan("c").result(WAIT)]
        assert [entry.expires_ms for entry in entries if entry is not None] == [None, None]


@pytest.mark.parametrize("version", [3, 1000])
def test_a_newer_file_is_refused(version: int, root: Path) -> None:
    """S3-87, S0-13: a file of a newer release is `SchemaTooNew` with its number, and stays as it is, byte for byte."""
    write_version_1(root / "a.db", ROWS_1, version)
    before = (root / "a.db").read_bytes()
    with Persistency(root) as persistency:
        for _ in range(2):
            with pytest.raises(SchemaTooNew, match=str(version)):
                persistency.open_job("a")
    assert (root / "a.db").read_bytes() == before
    assert not list(root.glob("a.db-*"))


# -- errors -------------------------------------------------------------------------------------------------------


def test_each_kind_of_error_is_a_class(persistency: Persistency, root: Path) -> None:
    """S3-119: backend, closed, argument and unknown job are told apart by `except`, all of them one family."""
    job = persistency.open_job("a")
    job.close(WAIT)
    (root / "b.db").write_bytes(b"not a database, but long enough to look at" * 100)
    attempts: list[tuple[type[PersistencyError], Callable[[], object]]] = [
        (StorageError, lambda: persistency.open_job("b")),
        (Closed, lambda: job.get("c", ("k",))),
        (Misuse, lambda: persistency.open_job("")),
        (JobNotFound, lambda: persistency["a"]),
    ]
    for kind, attempt in attempts:
        with pytest.raises(PersistencyError) as caught:
            attempt()
        assert isinstance(caught.value, kind)
        assert sum(isinstance(caught.value, other) for other, _ in attempts) == 1
        assert caught.value.hint


def test_errors_cross_threads_as_objects(persistency: Persistency, root: Path) -> None:
    """S3-120: what the worker raised arrives as it is, with SQLite's code and its error as the cause."""
    root.mkdir()
    (root / "a.db").write_bytes(b"Backend: Closed: Timeout: this looks like an error, but is none\n" * 100)
    with pytest.raises(Corrupt) as caught:
        persistency.open_job("a")
    assert caught.value.code == apsw.SQLITE_NOTADB
    assert isinstance(caught.value.__cause__, apsw.NotADBError)


def test_a_workers_error_is_not_cut(tmp_path: Path) -> None:
    """S3-121: the message of a failed opening is whole, however long."""
    root = tmp_path / ("long" * 40) / ("longer" * 30)
    root.mkdir(parents=True)
    (root / "a.db").write_bytes(b"not a database, but long enough to look at" * 100)
    with Persistency(root) as persistency, pytest.raises(Corrupt) as caught:
        persistency.open_job("a")
    assert len(str(caught.value)) > 300
    assert str(root / "a.db") in str(caught.value)


def test_options_are_validated(persistency: Persistency) -> None:
    """S2-16: a bad option or name is `Misuse` that names it, before anything is opened or stored."""
    bad: list[tuple[str, Any]] = [("mailbox_ops_max", 0), ("mailbox_bytes_max", -1), ("durability", "always")]
    for name, value in bad:
        with pytest.raises(Misuse, match=name):
            persistency.open_job("a", **{name: value})
    assert not persistency.has_job("a")
    job = persistency.open_job("a")
    for category in ("", "x" * 256, "ü" * 128):
        with pytest.raises(Misuse, match="category"):
            job.put(category, ("k",), b"")
    assert job.categories().result(WAIT) == []


# -- workers ------------------------------------------------------------------------------------------------------


def test_a_worker_begins_ready_and_ends_with_its_file_closed(root: Path) -> None:
    """S3-122: a job that was opened answers at once; one that was closed has neither thread, lock nor log left."""
    with Persistency(root) as first, Persistency(root) as second:
        for persistency in (first, second, first):
            job = persistency.open_job("a")
            assert job.count("c").result(WAIT) >= 0
            job.put("c", (job.version().result(WAIT),), b"")
            job.close(WAIT)
            assert sorted(path.name for path in root.iterdir() if path.suffix != ".lock") == ["a.db"]
            assert_no_worker_is_left("a")
    assert look(root / "a.db", "SELECT count(*) FROM kv") == [(3,)]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts a thread's wake-ups, which Linux tells")
def test_an_idle_worker_sleeps() -> None:
    """S3-123: a worker with nothing to do isn't woken to look whether there is something, or whether to end."""

    def wakeups(thread: threading.Thread) -> int:
        status = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
        return int(status.partition("voluntary_ctxt_switches:")[2].split()[0])

    with Persistency(":memory:") as persistency:
        job = persistency.open_job("idle")
        job.put("c", ("k",), b"")
        job.flush().result(WAIT)
        [worker] = [thread for thread in threading.enumerate() if thread.name == "persistency:idle"]
        before = wakeups(worker)
        time.sleep(0.3)  # what is observed, not waited for: a worker that polls every 10 ms would wake 30 times
        assert wakeups(worker) - before <= 5


def test_closing_what_is_closed_is_nothing(root: Path) -> None:
    """S3-124: closing tolerates every order and repetition, and what was never opened."""
    persistency = Persistency(root)
    job = persistency.open_job("a")
    persistency.close_job("a")
    persistency.close_job("a")
    job.close()
    persistency.close_job("never")
    persistency.close()
    persistency.close()
    job.close(drain=False)
    Persistency(root).close()
    assert job.closed


def test_threads_never_meet_in_the_store(job: Job) -> None:
    """S3-125: SQLite refuses a connection that two threads use at once; a storm of verbs from eight never does."""

    def storm(number: int) -> None:
        for at in range(60):
            job.put("c", (number, at), b"x")
            assert job.get("c", (number, at)).result(WAIT) == b"x"
            job.commit([Put("c", (number, "last"), b"%d" % at), Delete("c", (number, at - 1))]).result(WAIT)
            assert job.count("c", KeyRange.prefix((number,))).result(WAIT) == 2
            assert [row.key.parts[1] for row in job.scan_prefix("c", (number,)).result(WAIT)] == ["last", at]
            assert len(list(job.iterate("c", prefix=(number,), page=1))) == 2
            assert job.delete_acked("c", ("nobody",)).result(WAIT) is False

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(storm, range(8)))
    assert job.count("c").result(WAIT) == 16
    assert job.statistics().failed == 0


@pytest.mark.parametrize("workers", [8])
def test_opening_is_single_flight(workers: int, persistency: Persistency) -> None:
    """S2-17: of many who open one job at once, all get the same one, and it was opened once."""
    made: list[apsw.Connection] = []
    barrier = threading.Barrier(workers)

    def attempt(_number: int) -> Job:
        barrier.wait(WAIT)
        return persistency.open_job("a")

    with every_connection(made.append), ThreadPoolExecutor(workers) as pool:
        jobs = list(pool.map(attempt, range(workers)))
    assert len(set(map(id, jobs))) == 1
    assert len(made) == 1
