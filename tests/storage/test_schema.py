"""The file format: exactly what is written, what is migrated, and what is refused with not a byte changed."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import apsw
import pytest

from persistency.errors import Corrupt, SchemaTooNew, StorageError, Unavailable
from persistency.storage import schema
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import Durability, Store, StoredRow, StoreOptions
from persistency.testing import batch, dump, group, put
from tests.storage.conftest import FaultyDisk, contents, run_child

OPTIONS = StoreOptions()
KV_1 = (
    "CREATE TABLE kv (category BLOB NOT NULL, key BLOB NOT NULL, payload BLOB NOT NULL,"
    " PRIMARY KEY (category, key)) WITHOUT ROWID"
)
KV_2 = (
    "CREATE TABLE kv (category BLOB NOT NULL, key BLOB NOT NULL, payload BLOB NOT NULL,"
    " version INTEGER NOT NULL DEFAULT 0, expires_ms INTEGER, PRIMARY KEY (category, key)) WITHOUT ROWID"
)
INDEX_2 = "CREATE INDEX kv_expires ON kv (expires_ms) WHERE expires_ms IS NOT NULL"
META_2 = "CREATE TABLE meta (name TEXT NOT NULL PRIMARY KEY, value) WITHOUT ROWID"
ROWS_1 = [(b"c", b"a", b"1"), (b"c", b"b", b""), (b"d", b"", b"\0\xff")]


def write(path: Path, *statements: str, version: int = 2, rows: list[tuple[bytes, ...]] | None = None) -> None:
    """Write a SQLite file with the standard library, not in WAL mode."""
    path.parent.mkdir(exist_ok=True)
    connection = sqlite3.connect(path)
    for statement in statements:
        connection.execute(statement)
    for row in rows or []:
        connection.execute("INSERT INTO kv VALUES (?, ?, ?)", row)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.commit()
    connection.close()


def look(path: Path, sql: str) -> list[Any]:
    """Ask a file something with the standard library."""
    connection = sqlite3.connect(path)
    rows = connection.execute(sql).fetchall()
    connection.close()
    return rows


def used(root: DirectoryRoot, job_id: str = "alpha") -> Path:
    """Make a job with two rows, close it, and return its file."""
    store = root.open(job_id, OPTIONS)
    store.apply(group(put(b"c", b"a", b"1"), put(b"c", b"b", b"2")), 1)
    store.close()
    return root.path(job_id)


# -- the format --------------------------------------------------------------------------------------------------


def test_the_format_is_the_documented_one(root: DirectoryRoot) -> None:
    """A new file has format 2, WAL mode, the documented table without rowids, its index and the meta table, no more."""
    path = used(root)
    assert look(path, "PRAGMA user_version") == [(2,)]
    assert look(path, "PRAGMA journal_mode") == [("wal",)]
    assert look(path, "PRAGMA page_size") == [(4096,)]
    objects = look(path, "SELECT type, name FROM sqlite_schema ORDER BY name")
    assert objects == [("table", "kv"), ("index", "kv_expires"), ("table", "meta")]
    assert look(path, "PRAGMA table_xinfo(kv)") == [
        (0, "category", "BLOB", 1, None, 1, 0),
        (1, "key", "BLOB", 1, None, 2, 0),
        (2, "payload", "BLOB", 1, None, 0, 0),
        (3, "version", "INTEGER", 1, "0", 0, 0),
        (4, "expires_ms", "INTEGER", 0, None, 0, 0),
    ]
    without_rowid = look(
        path, "SELECT name, wr FROM pragma_table_list WHERE schema = 'main' AND name IN ('kv', 'meta')"
    )
    assert sorted(without_rowid) == [("kv", 1), ("meta", 1)]
    index = look(path, "SELECT sql FROM sqlite_schema WHERE name = 'kv_expires'")[0][0]
    assert " ".join(index.split()) == INDEX_2
    assert look(path, "PRAGMA integrity_check") == [("ok",)]


def test_the_rows_are_plain(root: DirectoryRoot) -> None:
    """Any SQLite tool reads the rows: blobs, versions from 1, no expiry; the meta table has the true id and marks."""
    path = used(root, "Ünïcode/id")
    rows = look(path, "SELECT category, key, payload, version, expires_ms FROM kv ORDER BY key")
    assert rows == [(b"c", b"a", b"1", 1, None), (b"c", b"b", b"2", 2, None)]
    meta = dict(look(path, "SELECT name, value FROM meta"))
    assert meta == {"job_id": "Ünïcode/id", "last_version": 2, "clean": 1, "syncs": 0}


def test_openings_keep_the_rows(root: DirectoryRoot) -> None:
    """Opening a job again and again keeps its rows and goes on counting versions."""
    for at in range(6):
        store = root.open("alpha", OPTIONS)
        assert store.apply(group(batch(put(b"c", b"%d" % at, b"v"))), 1) == [at + 1]
        assert [row.version for row in dump(store)[b"c"]] == list(range(1, at + 2))
        store.close()
        assert sorted(path.name for path in root.directory.iterdir()) == ["alpha.db", "alpha.lock"]


def test_a_fresh_file_stands_without_its_log(root: DirectoryRoot) -> None:
    """The tables of a new job are in the file itself at once, not in a log that may get lost."""
    store = root.open("alpha", OPTIONS)
    copy = root.directory / "copy"
    copy.write_bytes(root.path("alpha").read_bytes())
    store.close()
    assert look(copy, "SELECT count(*) FROM kv") == [(0,)]
    assert look(copy, "PRAGMA user_version") == [(2,)]


@pytest.mark.parametrize("durability", ["process", "power"])
def test_a_fresh_files_journal_gets_all_of_its_syncs(
    root: DirectoryRoot, disk: FaultyDisk, durability: Durability
) -> None:
    """Until it has a log, a file has a journal, which a power cut tears unless its head is synced after the rest."""
    DirectoryRoot(root.directory, vfs=disk.name).open("alpha", StoreOptions(durability=durability)).close()
    assert disk.calls.count(("sync", "other")) == 4  # twice for each of its two transactions


def test_an_empty_file_is_new(root: DirectoryRoot) -> None:
    """An empty file counts as new, beside an empty log too."""
    root.directory.mkdir()
    root.path("alpha").touch()
    (root.directory / "alpha.db-wal").touch()
    path = used(root)
    assert look(path, "SELECT count(*) FROM kv") == [(2,)]


@pytest.mark.parametrize("durability", ["process", "power"])
def test_the_defences_are_on(root: DirectoryRoot, durability: Durability) -> None:
    """SQLite's defences, limits and settings are what they should be, asked of the connection itself."""
    store = root.open("alpha", StoreOptions(durability))
    connection = store._connection
    on = ["DEFENSIVE"]
    off = ["TRUSTED_SCHEMA", "ENABLE_TRIGGER", "ENABLE_VIEW", "DQS_DML", "DQS_DDL", "ENABLE_ATTACH_CREATE"]
    off += ["ENABLE_ATTACH_WRITE", "NO_CKPT_ON_CLOSE", "ENABLE_LOAD_EXTENSION", "WRITABLE_SCHEMA"]
    for names, state in ((on, 1), (off, 0)):
        for name in names:
            assert connection.config(getattr(apsw, f"SQLITE_DBCONFIG_{name}"), -1) == state, name
    limits = {"ATTACHED": 0, "LENGTH": 257 * 2**20, "SQL_LENGTH": 100_000, "EXPR_DEPTH": 20, "TRIGGER_DEPTH": 1}
    assert {name: connection.limit(getattr(apsw, f"SQLITE_LIMIT_{name}")) for name in limits} == limits
    settings = {"cell_size_check": 1, "mmap_size": 0, "wal_autocheckpoint": 0, "temp_store": 2, "journal_mode": "wal"}
    settings |= {"synchronous": 2 if durability == "power" else 1, "busy_timeout": 5000}
    assert {name: connection.pragma(name) for name in settings} == settings
    with pytest.raises(apsw.SQLError, match="too many attached"):
        connection.execute("ATTACH ':memory:' AS other")
    with pytest.raises(apsw.Error):
        connection.execute("PRAGMA writable_schema = 1; UPDATE sqlite_schema SET sql = ''")
    store.close()


# -- migration ---------------------------------------------------------------------------------------------------


def check_migrated(store: Store) -> None:
    """Hold the rows of `ROWS_1` after a migration, and that the job goes on."""
    held = {
        b"c": [StoredRow(b"a", b"1", 0, None), StoredRow(b"b", b"", 0, None)],
        b"d": [StoredRow(b"", b"\0\xff", 0, None)],
    }
    assert dump(store) == held
    assert store.apply(group(batch(put(b"c", b"new", b"n"))), 1) == [1]


def test_format_1_is_migrated_in_place(root: DirectoryRoot) -> None:
    """A file of format 1 gets the new columns, index and meta table, keeps every row, and is the same file."""
    write(root.path("alpha"), KV_1, version=1, rows=ROWS_1)
    number = root.path("alpha").stat().st_ino
    store = root.open("alpha", OPTIONS)
    check_migrated(store)
    store.close()
    path = root.path("alpha")
    assert path.stat().st_ino == number
    assert look(path, "PRAGMA user_version") == [(2,)]
    columns = [row[1:4] + row[5:] for row in look(path, "PRAGMA table_xinfo(kv)")]
    fresh = [row[1:4] + row[5:] for row in look(used(root, "fresh"), "PRAGMA table_xinfo(kv)")]
    assert columns == fresh
    assert dict(look(path, "SELECT name, value FROM meta"))["job_id"] == "alpha"
    store = root.open("alpha", OPTIONS)
    assert store.get(b"c", b"new", 1) == b"n"
    store.close()


ORIGINAL = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode = WAL")
connection.execute("PRAGMA wal_autocheckpoint = 0")
connection.execute(sys.argv[2])
connection.execute("PRAGMA user_version = 1")
for row in eval(sys.argv[3]):
    connection.execute("INSERT INTO kv VALUES (?, ?, ?)", row)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("job_id", ["alpha", "Alice", "me@home", "a b", "é"])
def test_a_killed_originals_file_is_taken_over(job_id: str, root: DirectoryRoot) -> None:
    """A format 1 file under the id as it stands, its rows in a killed process' log, is adopted whole."""
    root.directory.mkdir()
    plain = root.directory / f"{job_id}.db"
    run_child(ORIGINAL, plain, KV_1, repr(ROWS_1))
    assert plain.with_name(plain.name + "-wal").stat().st_size > 8000
    store = root.open(job_id, OPTIONS)
    check_migrated(store)
    assert plain.exists() == (plain == root.path(job_id))
    store.close()
    assert sorted(path.suffix for path in root.directory.iterdir()) == [".db", ".lock"]
    assert [job.job_id for job in root.stored()] == [job_id]


def test_a_closed_originals_file_is_adopted(root: DirectoryRoot) -> None:
    """A format 1 file without a log is adopted too, and an escaped file that is there already comes first."""
    write(root.directory / "Alice.db", KV_1, version=1, rows=ROWS_1)
    store = root.open("Alice", OPTIONS)
    check_migrated(store)
    store.close()
    write(root.directory / "Alice.db", KV_1, version=1, rows=[(b"c", b"other", b"")])
    before = contents(root.directory)["Alice.db"]
    store = root.open("Alice", OPTIONS)
    assert store.get(b"c", b"new", 1) == b"n"
    store.close()
    assert contents(root.directory)["Alice.db"] == before


@pytest.mark.parametrize(
    "job_id", ["./alice", ".//alice", "x/../alice", "../root/alice", "ALICE", "alice.db", "alice\0"]
)
def test_nobody_elses_original_is_adopted(job_id: str, root: DirectoryRoot) -> None:
    """A format 1 file belongs to exactly the id it is named by, whatever a path or a letter's case would make of it."""
    write(root.directory / "alice.db", KV_1, version=1, rows=ROWS_1)
    before = contents(root.directory)
    store = root.open(job_id, OPTIONS)
    assert dump(store) == {}
    store.close()
    assert contents(root.directory)["alice.db"] == before["alice.db"]
    store = root.open("alice", OPTIONS)
    check_migrated(store)
    store.close()


def test_a_lost_files_log_is_not_given_to_an_original(root: DirectoryRoot) -> None:
    """A log left without its file is refused before an original's file is put in its place and read with that log."""
    write(root.directory / "Alice.db", KV_1, version=1, rows=ROWS_1)
    root.path("Alice").with_name("%41lice.db-wal").write_bytes(b"a log of something else")
    before = contents(root.directory)
    with pytest.raises(Corrupt, match="gone"):
        root.open("Alice", OPTIONS)
    assert contents(root.directory) == before


def test_an_original_that_cannot_be_renamed(root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses the adoption makes it `Unavailable` with the cause, and nothing is lost."""
    write(root.directory / "Alice.db", KV_1, version=1, rows=ROWS_1)
    before = contents(root.directory)

    def refuse(path: Path, _target: Path) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(Unavailable) as caught:
            root.open("Alice", OPTIONS)
    assert isinstance(caught.value.__cause__, PermissionError)
    assert contents(root.directory) == before
    store = root.open("Alice", OPTIONS)
    check_migrated(store)
    store.close()


def test_dropping_a_job_of_the_original_drops_it(root: DirectoryRoot) -> None:
    """Dropping an id whose rows still lie in the original's file deletes that file: it can't come back."""
    write(root.directory / "Alice.db", KV_1, version=1, rows=ROWS_1)
    assert root.path("Alice") in root.drop("Alice")
    assert list(root.directory.iterdir()) == []
    write(root.directory / "Alice.db", "CREATE TABLE other (x)", version=0)
    before = contents(root.directory)
    root.drop("Alice")
    assert contents(root.directory) == before


def test_a_failing_migration_leaves_format_1(root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A migration that fails half way is undone: the file is format 1 as before, and the next opening migrates it."""
    write(root.path("alpha"), KV_1, version=1, rows=ROWS_1)
    path = root.path("alpha")
    steps = {**schema.MIGRATIONS, 1: (2, schema.MIGRATIONS[1][1] + "INSERT INTO nowhere VALUES (1);")}
    with monkeypatch.context() as patch:
        patch.setattr(schema, "MIGRATIONS", steps)
        with pytest.raises(StorageError, match="nowhere"):
            root.open("alpha", OPTIONS)
    assert look(path, "PRAGMA user_version") == [(1,)]
    assert look(path, "SELECT * FROM kv") == ROWS_1
    assert look(path, "SELECT name FROM sqlite_schema") == [("kv",)]
    store = root.open("alpha", OPTIONS)
    check_migrated(store)
    store.close()


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_a_migration_survives_any_fault(operation: str, place: Path, disk: FaultyDisk) -> None:
    """Whichever write or sync fails while a file is opened and migrated, the next opening has all rows."""
    code = apsw.SQLITE_IOERR_WRITE if operation == "write" else apsw.SQLITE_IOERR_FSYNC
    failures = 0
    for sticky in (False, True):
        for at in range(1, 100):
            root = DirectoryRoot(place / f"{sticky}{at}", vfs=disk.name)
            write(root.path("alpha"), KV_1, version=1, rows=ROWS_1)
            disk.arm(operation, at, code, sticky=sticky)
            try:
                root.open("alpha", OPTIONS).close()
            except StorageError:
                failures += 1
            fired = disk.fired
            disk.disarm()
            store = root.open("alpha", OPTIONS)
            check_migrated(store)
            store.close()
            assert look(root.path("alpha"), "PRAGMA integrity_check") == [("ok",)]
            if not fired:
                break
        else:
            pytest.fail("never a clean run")
    assert failures >= 8


# -- what is refused ---------------------------------------------------------------------------------------------


def with_columns(kv: str) -> Callable[[Path], None]:
    """Return a writer of a file whose kv is another one."""
    return lambda path: write(path, kv, INDEX_2, META_2)


def with_more(*statements: str) -> Callable[[Path], None]:
    """Return a writer of a file that has something besides what is ours."""
    return lambda path: write(path, KV_2, INDEX_2, META_2, *statements)


def smuggled(path: Path) -> None:
    """Write a file with a trigger under a name of SQLite's own, which takes a writable schema."""
    write(path, KV_2, INDEX_2, META_2)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA writable_schema = 1")
    connection.execute(
        "INSERT INTO sqlite_schema VALUES ('trigger', 'sqlite_stat1', 'kv', 0,"
        " 'CREATE TRIGGER sqlite_stat1 AFTER INSERT ON kv BEGIN DELETE FROM kv; END')"
    )
    connection.commit()
    connection.close()


def of_bytes(data: bytes) -> Callable[[Path], None]:
    """Return a writer of a file of just these bytes."""
    return lambda path: (path.parent.mkdir(exist_ok=True), path.write_bytes(data))[0]


def cut(size: int) -> Callable[[Path], None]:
    """Return a writer of a job's file cut to a size, or (negative) by so much."""

    def writer(path: Path) -> None:
        data = used(DirectoryRoot(path.parent)).read_bytes()
        path.write_bytes(data[:size])
        path.with_suffix(".lock").unlink()

    return writer


def renamed(path: Path) -> None:
    """Write another job's file under this name."""
    used(DirectoryRoot(path.parent), "beta").rename(path)


def with_meta(statement: str) -> Callable[[Path], None]:
    """Return a writer of a job's file whose meta table was changed."""

    def writer(path: Path) -> None:
        used(DirectoryRoot(path.parent))
        connection = sqlite3.connect(path)
        connection.execute(statement)
        connection.commit()
        connection.close()

    return writer


REFUSED: dict[str, Callable[[Path], None]] = {
    "garbage": of_bytes(bytes(range(256)) * 64),
    "one byte": of_bytes(b"S"),
    "a text": of_bytes(b"Dear diary, today nothing happened.\n" * 200),
    "a short text": of_bytes(b"hello\n"),
    "zeros": of_bytes(bytes(8192)),
    "the magic alone": of_bytes(b"SQLite format 3\0"),
    "the magic and garbage": of_bytes(b"SQLite format 3\0" + b"\x55" * 5000),
    "cut to a page": cut(4096),
    "cut within the header": cut(99),
    "cut within a page": cut(6000),
    "cut by a page": cut(-4096),
    "another application's": lambda path: write(path, "CREATE TABLE users (id INTEGER PRIMARY KEY, name)", version=0),
    "another application's, format 1": lambda path: write(path, "CREATE TABLE users (id)", version=1),
    "another application's, format 2": lambda path: write(path, "CREATE TABLE users (id)", version=2),
    "format 1 without a table": lambda path: write(path, version=1),
    "format 2 without a table": lambda path: write(path, version=2),
    "a negative format": lambda path: write(path, KV_2, INDEX_2, META_2, version=-1),
    "format 0 with our tables": lambda path: write(path, KV_2, INDEX_2, META_2, version=0),
    "format 1 with format 2's tables": lambda path: write(path, KV_2, INDEX_2, META_2, version=1),
    "format 2 with format 1's table": lambda path: write(path, KV_1, version=2),
    "no index": lambda path: write(path, KV_2, META_2),
    "no meta": lambda path: write(path, KV_2, INDEX_2),
    "a trigger": with_more("CREATE TRIGGER t AFTER INSERT ON kv BEGIN DELETE FROM kv; END"),
    "a trigger on format 1": lambda path: write(
        path, KV_1, "CREATE TRIGGER t AFTER INSERT ON kv BEGIN DELETE FROM kv; END", version=1
    ),
    "a trigger that looks like SQLite's own": with_more(
        "CREATE TRIGGER sqliteXt AFTER INSERT ON kv BEGIN DELETE FROM kv; END"
    ),
    "a trigger named as SQLite's own": smuggled,
    "a view": with_more("CREATE VIEW v AS SELECT * FROM kv"),
    "a table": with_more("CREATE TABLE more (x)"),
    "a table that looks like SQLite's own": with_more("CREATE TABLE sqlitex (x)"),
    "an index": with_more("CREATE INDEX more ON kv (payload)"),
    "a virtual table": with_more("CREATE VIRTUAL TABLE more USING fts5(x)"),
    "kv as a view": lambda path: write(
        path, "CREATE TABLE x (a)", "CREATE VIEW kv AS SELECT a category, a key, a payload FROM x", version=1
    ),
    "a column more": with_columns(KV_2.replace("expires_ms INTEGER,", "expires_ms INTEGER, extra,")),
    "a column less": with_columns(KV_2.replace("version INTEGER NOT NULL DEFAULT 0,", "")),
    "a column of another name": with_columns(KV_2.replace("payload", "value")),
    "a column of another type": with_columns(KV_2.replace("payload BLOB", "payload TEXT")),
    "a column that may be null": with_columns(KV_2.replace("payload BLOB NOT NULL", "payload BLOB")),
    "columns in another order": with_columns(
        KV_2.replace("category BLOB NOT NULL, key BLOB", "key BLOB NOT NULL, category BLOB")
    ),
    "a generated column": with_columns(
        KV_2.replace("expires_ms INTEGER,", "expires_ms INTEGER, g AS (length(payload)),")
    ),
    "a stored generated column": with_columns(
        KV_2.replace("expires_ms INTEGER,", "expires_ms INTEGER, g AS (hex(zeroblob(100))) STORED,")
    ),
    "another primary key": with_columns(KV_2.replace("(category, key)", "(key, category)")),
    "rowids": with_columns(KV_2.replace(" WITHOUT ROWID", "")),
    "a check that computes": with_columns(
        KV_2.replace("expires_ms INTEGER,", "expires_ms INTEGER CHECK (length(zeroblob(9)) = 9),")
    ),
    "another collation": with_columns(KV_2.replace("key BLOB NOT NULL", "key BLOB NOT NULL COLLATE NOCASE")),
    "a default that computes": with_columns(KV_2.replace("DEFAULT 0", "DEFAULT (random())")),
    "a unique expiry": lambda path: write(path, KV_2, INDEX_2.replace("INDEX", "UNIQUE INDEX"), META_2),
    "an index that computes": lambda path: write(
        path, KV_2, INDEX_2.replace("(expires_ms)", "(abs(expires_ms))"), META_2
    ),
    "meta of other columns": lambda path: write(path, KV_2, INDEX_2, META_2.replace("value", "content")),
    "meta as a view": lambda path: write(
        path, KV_2, INDEX_2, "CREATE VIEW meta AS SELECT 'job_id' name, 'alpha' value"
    ),
    "another job's": renamed,
    "another job's id": with_meta("UPDATE meta SET value = 'beta' WHERE name = 'job_id'"),
    "an id that is a number": with_meta("UPDATE meta SET value = 7 WHERE name = 'job_id'"),
    "an id that is no text": with_meta("UPDATE meta SET value = x'616c706861' WHERE name = 'job_id'"),
    "an id that can't be read": with_meta("UPDATE meta SET value = CAST(x'ff' AS TEXT) WHERE name = 'job_id'"),
    "no last version": with_meta("DELETE FROM meta WHERE name = 'last_version'"),
    "a last version that can't be read": with_meta(
        "UPDATE meta SET value = CAST(x'ff' AS TEXT) WHERE name = 'last_version'"
    ),
    "a last version that is text": with_meta("UPDATE meta SET value = 'x' WHERE name = 'last_version'"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_ours_is_refused_untouched(kind: str, root: DirectoryRoot) -> None:
    """A file that isn't this job's is `Corrupt`, stays byte for byte as it was, with nothing new beside it."""
    path = root.path("alpha")
    REFUSED[kind](path)
    before = contents(root.directory)
    for _ in range(2):
        with pytest.raises(Corrupt) as caught:
            root.open("alpha", OPTIONS)
        assert caught.value.hint
        assert contents(root.directory) == before
    path.rename(path.with_name("moved"))
    assert look(used(root), "SELECT count(*) FROM kv") == [(2,)]


WITH_LOG = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode = WAL")
connection.execute("PRAGMA wal_autocheckpoint = 0")
for statement in sys.argv[2:]:
    connection.execute(statement)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("version", [0, 1, 2, 3])
def test_somebody_elses_log_is_not_carried_over(version: int, root: DirectoryRoot) -> None:
    """Another application's file with rows still in its log is refused with both as they were."""
    root.directory.mkdir()
    path = root.path("alpha")
    statements = ["CREATE TABLE users (name)", "INSERT INTO users VALUES ('x')", f"PRAGMA user_version = {version}"]
    run_child(WITH_LOG, path, *statements)
    names = ("alpha.db", "alpha.db-wal")
    before = [contents(root.directory)[name] for name in names]
    with pytest.raises(SchemaTooNew if version == 3 else Corrupt):
        root.open("alpha", OPTIONS)
    assert [contents(root.directory)[name] for name in names] == before
    assert look(path, "SELECT name FROM users") == [("x",)]


HALFWAY = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode = DELETE")
connection.execute("PRAGMA cache_size = 2")
connection.execute("BEGIN")
connection.execute(sys.argv[2])
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_somebody_elses_journal_is_not_applied(root: DirectoryRoot) -> None:
    """Another application's file with a journal that would be rolled back is refused with both as they were."""
    path = root.path("alpha")
    many = "WITH RECURSIVE n (x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM n LIMIT 2000)"
    write(path, "CREATE TABLE users (name)", f"INSERT INTO users {many} SELECT hex(zeroblob(300)) FROM n", version=0)
    run_child(HALFWAY, path, "UPDATE users SET name = name || 'x'")
    assert path.with_name("alpha.db-journal").stat().st_size > 4096
    before = contents(root.directory)
    with pytest.raises(Corrupt):
        root.open("alpha", OPTIONS)
    assert contents(root.directory) == before
    assert look(path, "SELECT count(*) FROM users WHERE name LIKE '%x'") == [(0,)]


@pytest.mark.parametrize("job_id", ["alpha", "A %?#b"])
def test_our_own_journal_is_applied(job_id: str, root: DirectoryRoot) -> None:
    """A job's file that another tool was changing without a log when it was killed is rolled back and read."""
    store = root.open(job_id, OPTIONS)
    store.apply(group(*[put(b"c", b"%03d" % at, b"x" * 1000) for at in range(200)]), 1)
    store.close()
    run_child(HALFWAY, root.path(job_id), "UPDATE kv SET payload = x'00'")
    assert root.path(job_id).with_name(root.path(job_id).name + "-journal").stat().st_size > 4096
    store = root.open(job_id, OPTIONS)
    assert {row.payload for row in dump(store)[b"c"]} == {b"x" * 1000}
    store.close()


def test_another_jobs_log_is_not_carried_over(root: DirectoryRoot) -> None:
    """A job's file that was renamed together with its log is refused with both as they were."""
    code = """
import os, signal, sys
from pathlib import Path
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import StoreOptions
DirectoryRoot(Path(sys.argv[1])).open("beta", StoreOptions()).apply([b"c", b"k", b"v"], 1)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run_child(code, root.directory)
    for suffix in ("", "-wal"):
        root.path("beta").with_name(f"beta.db{suffix}").rename(root.directory / f"alpha.db{suffix}")
    (root.directory / "beta.db-shm").unlink()
    before = {name: contents(root.directory)[name] for name in ("alpha.db", "alpha.db-wal")}
    with pytest.raises(Corrupt, match="beta"):
        root.open("alpha", OPTIONS)
    assert {name: contents(root.directory)[name] for name in before} == before
    for suffix in ("", "-wal"):
        (root.directory / f"alpha.db{suffix}").rename(root.directory / f"beta.db{suffix}")
    store = root.open("beta", OPTIONS)
    assert store.get(b"c", b"k", 1) == b"v"
    store.close()


@pytest.mark.parametrize("version", [3, 4, 100, 2**31 - 1])
def test_newer_formats_are_refused_untouched(version: int, root: DirectoryRoot) -> None:
    """A file from a newer release is `SchemaTooNew`, whatever is in it, and stays byte for byte as it was."""
    for statements in ((KV_2, INDEX_2, META_2), ("CREATE TABLE something (new)",)):
        path = root.path("alpha")
        write(path, *statements, version=version)
        before = contents(root.directory)
        with pytest.raises(SchemaTooNew, match=str(version)):
            root.open("alpha", OPTIONS)
        assert contents(root.directory) == before
        path.unlink()


@pytest.mark.parametrize("kind", ["garbage", "a text", "another application's", "a trigger on format 1", "zeros"])
def test_what_is_not_the_originals_is_not_adopted(kind: str, root: DirectoryRoot) -> None:
    """A file under an id as it stands that isn't the original's is left alone, and the job is a new one."""
    REFUSED[kind](root.directory / "Alice.db")
    before = contents(root.directory)
    store = root.open("Alice", OPTIONS)
    assert dump(store) == {}
    store.close()
    after = contents(root.directory)
    del after["%41lice.db"]
    assert after == before


def test_statistics_of_sqlite_are_no_strangers(root: DirectoryRoot) -> None:
    """A file that somebody ran ANALYZE on is still ours."""
    path = used(root)
    connection = sqlite3.connect(path)
    connection.execute("ANALYZE")
    connection.close()
    assert ("sqlite_stat1",) in look(path, "SELECT name FROM sqlite_schema")
    store = root.open("alpha", OPTIONS)
    assert store.get(b"c", b"a", 1) == b"1"
    store.close()


def test_a_file_that_cannot_have_a_log_is_unavailable(root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SQLite can't switch to a write-ahead log, opening fails and says so."""
    used(root)

    class Without(apsw.Connection):
        def execute(self, statements: str, *args: Any, **more: Any) -> apsw.Cursor:
            return super().execute(statements.replace("journal_mode = wal", "journal_mode = delete"), *args, **more)

    monkeypatch.setattr(schema.apsw, "Connection", Without)
    with pytest.raises(Unavailable, match="write-ahead"):
        root.open("alpha", OPTIONS)


def test_a_file_somebody_is_writing_to_is_unavailable(root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new job whose file another program has locked is `Unavailable` after the busy time."""
    monkeypatch.setattr(schema, "BUSY_MS", 50)
    root.directory.mkdir()
    root.path("alpha").touch()
    other = apsw.Connection(str(root.path("alpha")))  # sqlite3 is another library, whose locks mean nothing here
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(Unavailable):
        root.open("alpha", OPTIONS)
    other.execute("ROLLBACK")
    other.close()
    used(root)


def test_only_owner_may_read_what_is_migrated(root: DirectoryRoot) -> None:
    """A new file's log has the file's own mode, also with a wide umask."""
    before = os.umask(0)
    try:
        store = root.open("alpha", OPTIONS)
        store.apply(group(put(b"c", b"k", b"v")), 1)
        assert (root.directory / "alpha.db-wal").stat().st_mode & 0o777 == 0o600
        store.close()
    finally:
        os.umask(before)
