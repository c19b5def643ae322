"""The SQLite adapter: its statements, its syncs, its log, and what it does when the disk or a message fails."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from persistency.errors import Conflict, Corrupt, DiskFull, StorageError, Unavailable
from persistency.storage import sqlite
from persistency.storage.directory import DirectoryRoot
from persistency.storage.pagecache import PageCache
from persistency.storage.port import (
    Barrier,
    Checkpointing,
    CountRange,
    DropRange,
    DropRow,
    Durability,
    Expect,
    Failed,
    GetEntry,
    GetRow,
    GetRows,
    HasRow,
    LastVersion,
    ListCategories,
    OutcomeUnknown,
    ScanRange,
    SetRow,
    StoredRow,
    StoreOptions,
    SwapRow,
    TouchRow,
)
from persistency.storage.sqlite import SqliteStore
from persistency.testing import batch, dump, group, put
from tests.storage.conftest import FaultyDisk, fault, run_child, statements

OPTIONS = StoreOptions()


@pytest.fixture
def store(root: DirectoryRoot) -> Iterator[SqliteStore]:
    """An open job "alpha" of the root, after one read and one group."""
    opened = root.open("alpha", OPTIONS)
    opened.get(b"c", b"first", 1)  # the first read also takes room for what is read
    opened.apply(group(put(b"c", b"first", b"1")), 1)
    yield opened
    opened.close()


def heads(ran: list[str]) -> list[str]:
    """Return the first two words of each statement."""
    return [" ".join(sql.split()[:2]) for sql in ran]


def rows_of(count: int, prefix: bytes = b"k", size: int = 8) -> list[Any]:
    """Return so many puts of sorted keys."""
    return [put(b"c", prefix + b"%06d" % at, b"%08d" % at * (size // 8)) for at in range(count)]


def meta(root: DirectoryRoot, job_id: str = "alpha") -> dict[str, Any]:
    """Return the meta table of a job, by SQLite's own library: another would take its locks away."""
    connection = apsw.Connection(str(root.path(job_id)), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        return dict(connection.execute("SELECT name, value FROM meta"))
    finally:
        connection.close()


# -- statements --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["sorted", "reversed", "repeated"])
def test_a_group_of_puts_takes_few_statements(store: SqliteStore, order: str) -> None:
    """A group of 1,000 puts is one transaction of at most twelve inserts and one update of the version."""
    rows = rows_of(1000)
    if order == "reversed":
        rows.reverse()
    elif order == "repeated":
        rows = rows[:500] * 2
    with statements(store) as ran:
        store.apply(group(*rows), 1)
    assert [ran[0], *heads(ran[-2:])] == ["BEGIN IMMEDIATE", "UPDATE meta", "COMMIT"]
    assert set(heads(ran[1:-2])) == {"INSERT INTO"}
    assert len(ran) - 3 <= 12


@pytest.mark.parametrize(("count", "inserts_max"), [(1, 1), (7, 4), (32, 1)])
def test_small_groups_take_small_statements(store: SqliteStore, count: int, inserts_max: int) -> None:
    """A group of one put is one insert in one transaction; more of them take fewer statements than rows."""
    with statements(store) as ran:
        store.apply(group(*rows_of(count)), 1)
    inserts = heads(ran).count("INSERT INTO")
    assert heads(ran) == ["BEGIN IMMEDIATE", *["INSERT INTO"] * inserts, "UPDATE meta", "COMMIT"]
    assert 1 <= inserts <= inserts_max


def test_puts_around_point_reads_and_batches_share_statements(store: SqliteStore) -> None:
    """Puts keep together across point reads of what the group wrote and across batches of puts alone."""
    messages: list[Any] = []
    for row in rows_of(16):
        messages += [row, GetRow(b"c", row[1]), batch(put(b"c", b"x" + row[1], b""))]
    with statements(store) as ran:
        outcomes = store.apply(group(*messages), 1)
    assert heads(ran) == ["BEGIN IMMEDIATE", "INSERT INTO", "UPDATE meta", "COMMIT"]
    assert outcomes[-3:] == [None, b"00000015", 33]


def test_the_first_group_takes_the_clean_mark_away(root: DirectoryRoot) -> None:
    """Only the first group after an opening updates the clean mark."""
    store = root.open("alpha", OPTIONS)
    for updates in (2, 1, 1):
        with statements(store) as ran:
            store.apply(group(put(b"c", b"k", b"v")), 1)
        assert heads(ran).count("UPDATE meta") == updates
    store.close()


def test_reads_begin_no_write_transaction(store: SqliteStore) -> None:
    """A group of reads alone, a barrier without sync among them, takes no write lock and writes nothing."""
    reads = [GetRow(b"c", b"first"), Barrier(), ScanRange(b"c", b"", None), CountRange(b"c", b"", None), LastVersion()]
    with statements(store) as ran:
        assert store.apply(group(*reads), 1) == [b"1", None, [(b"first", b"1")], 1, 1]
        assert store.apply(group(*reads), 1)[0] == b"1"
    assert [head for head in heads(ran) if not head.startswith("SELECT")] == ["BEGIN"]
    assert not any("meta" in sql for sql in ran)


def test_point_reads_keep_one_read_transaction(store: SqliteStore) -> None:
    """A run of reads of any kind is one read transaction; the next write ends it, and so does a checkpoint."""
    with statements(store) as ran:
        for _ in range(5):
            assert store.get(b"c", b"first", 1) == b"1"
        store.read(HasRow(b"c", b"first"), 1)
        store.scan(ScanRange(b"c", b"", None), 1)
        store.apply(group(GetRow(b"c", b"first")), 1)
        assert [head for head in heads(ran) if not head.startswith("SELECT")] == ["BEGIN"]
        ran.clear()
        store.apply(group(put(b"c", b"k", b"v")), 1)
        assert heads(ran) == ["COMMIT", "BEGIN IMMEDIATE", "INSERT INTO", "UPDATE meta", "COMMIT"]
        store.get(b"c", b"k", 1)
        ran.clear()
        store.checkpoint()
        assert heads(ran) == ["COMMIT"]
        store.get(b"c", b"k", 1)
        ran.clear()
        store.apply(group(Barrier(sync=True)), 1)
        assert heads(ran)[:2] == ["COMMIT", "BEGIN IMMEDIATE"] or "COMMIT" in heads(ran)
    assert not store._connection.in_transaction


def test_existence_does_not_read_payloads(store: SqliteStore) -> None:
    """Asking whether a row exists, counting and listing keys read no payload, where nothing expires."""
    with statements(store) as ran:
        store.read(HasRow(b"c", b"first"), 1)
        store.read(CountRange(b"c", b"", None), 1)
        store.read(ScanRange(b"c", b"", None, keys_only=True), 1)
    assert not any("payload" in sql for sql in ran)


# -- syncs -------------------------------------------------------------------------------------------------------


def test_syncs_of_the_process_level(root: DirectoryRoot, disk: FaultyDisk) -> None:
    """With durability "process" groups sync nothing; a sync barrier syncs the log exactly once, each time."""
    store = DirectoryRoot(root.directory, vfs=disk.name).open("alpha", OPTIONS)
    disk.calls.clear()
    for at in range(20):
        store.apply(group(put(b"c", b"%d" % at, b"v"), Barrier()), 1)
    store.apply(group(Barrier(), GetRow(b"c", b"1")), 1)
    assert disk.syncs() == 0
    for messages in ([Barrier(sync=True)], [Barrier(sync=True)], [put(b"c", b"k", b"v"), Barrier(sync=True)],
                     [Barrier(sync=True), GetRow(b"c", b"k"), Barrier(), Barrier(sync=True)]):  # fmt: skip
        disk.calls.clear()
        store.apply(group(*messages), 1)
        assert disk.syncs() == 1
        assert disk.calls[-1] == ("sync", "wal")
    disk.calls.clear()
    store.apply(group(put(b"c", b"k", b"w")), 1)
    assert disk.syncs() == 0
    assert store._connection.pragma("synchronous") == 1
    store.close()


def test_syncs_of_the_power_level(root: DirectoryRoot, disk: FaultyDisk) -> None:
    """With durability "power" every group that writes is synced once, reads and barriers cost nothing more."""
    store = DirectoryRoot(root.directory, vfs=disk.name).open("alpha", StoreOptions("power"))
    for at in range(5):
        disk.calls.clear()
        store.apply(group(put(b"c", b"%d" % at, b"v"), Barrier(sync=True)), 1)
        assert disk.syncs() == 1
    disk.calls.clear()
    store.apply(group(GetRow(b"c", b"1"), Barrier(sync=True)), 1)
    assert disk.syncs() == 0
    store.close()


# -- the disk fails ----------------------------------------------------------------------------------------------

BIG = 3000  # bytes of a payload, so that a group takes many pages
# SQLite swallows some errors; the file system that raised them then complains to Python's hook.
swallowed = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def script() -> list[list[Any]]:
    """Return groups that grow the file, change rows, remove ranges, check and read."""
    check = batch(Expect(b"c", b"k", 999), DropRange(b"c", b"", None))
    return [
        rows_of(14, b"a", BIG),
        [batch(put(b"c", b"k", b"1"), put(b"d", b"k", b"2")), GetRow(b"c", b"k"), DropRow(b"d", b"k")],
        [DropRange(b"c", b"a000003", b"a000009"), put(b"c", b"a000005", b"again"), Barrier(sync=True)],
        [check, *rows_of(66, b"b", 64), CountRange(b"c", b"", None)],
        [batch(DropRow(b"c", b"a000001"), put(b"e", b"", b"")), LastVersion()],
    ]


def plain(outcomes: list[Any]) -> list[Any]:
    """Return outcomes in a form that compares."""
    return [("failed", type(each.error)) if isinstance(each, Failed) else each for each in outcomes]


def expected_of_script(fresh: Callable[[], Any]) -> list[tuple[list[Any], Any, int]]:
    """Return the outcomes, the rows and the version after each group of the script, on a disk that works."""
    model = fresh()
    found = [
        (plain(model.apply(group(*messages), 1)), dump(model), model.status().last_version) for messages in script()
    ]
    model.close()
    return found


FAULTS = [
    ("write", apsw.SQLITE_IOERR_WRITE, StorageError),
    ("write", apsw.SQLITE_FULL, DiskFull),
    ("read", apsw.SQLITE_IOERR_READ, StorageError),
    ("read", apsw.SQLITE_IOERR_DATA, Corrupt),
]


def check_reopened(root: DirectoryRoot, job_id: str, states: dict[int, Any]) -> int:
    """Open a job on a disk that works: it has the rows of its last version, which is returned."""
    store = root.open(job_id, OPTIONS)
    version = store.status().last_version
    assert dump(store) == states[version]
    assert store._connection.pragma("integrity_check") == "ok"
    store.close()
    return version


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have caches stay as small as the test makes them."""
    monkeypatch.setattr(PageCache, "enlarge", lambda _cache: None)


@swallowed
@pytest.mark.usefixtures("little")
@pytest.mark.parametrize("prepared", [False, True], ids=["as it comes", "prepared"])
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize(("operation", "code", "kind"), FAULTS)
def test_every_fault_leaves_a_prefix(
    operation: str,
    code: int,
    kind: type,
    sticky: bool,
    prepared: bool,
    root: DirectoryRoot,
    disk: FaultyDisk,
    fresh: Callable[[], Any],
) -> None:
    """Whichever read or write fails, nothing of the group is there; then it works, and no version is given twice."""
    model = expected_of_script(fresh)
    states = {0: {}} | {version: rows for _, rows, version in model}
    place = DirectoryRoot(root.directory, vfs=disk.name)
    failures = 0
    for at in range(1, 400):
        store = place.open(f"job{at}", OPTIONS)
        store._connection.pragma("cache_size", 8)
        disk.arm(operation, at, code, sticky=sticky)
        version = fired = 0
        for messages, (right, _, last) in zip(script(), model, strict=True):
            if prepared:
                store.prepare()
            try:
                outcomes = store.apply(group(*messages), 1)
            except OutcomeUnknown:
                assert sticky  # then the connection can't even be asked
                assert operation == "read"
                fired += 1
                break
            except StorageError as error:
                fired += 1
                assert type(error) is kind
                assert error.code == code
                if sticky:
                    with pytest.raises((kind, OutcomeUnknown)):
                        store.apply(group(*messages), 1)
                disk.disarm()
                assert store.status().last_version == version
                assert not store._connection.in_transaction
                assert dump(store) == states[version]
                outcomes = store.apply(group(*messages), 1)
            for outcome, answer in zip(plain(outcomes), right, strict=True):
                assert outcome == answer or (operation == "read" and outcome == ("failed", kind))
            version = last
            assert store.status().last_version == version
        fired += disk.fired
        disk.disarm()
        store.close()
        assert check_reopened(root, f"job{at}", states) >= version
        root.drop(f"job{at}")
        failures += bool(fired)
        if not fired:
            break
    else:
        pytest.fail("never a clean run")
    assert failures >= 10


@swallowed
@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("sticky", [False, True], ids=["once", "for good"])
def test_a_failed_sync_is_an_unknown_outcome(
    durability: Durability, sticky: bool, root: DirectoryRoot, disk: FaultyDisk, fresh: Callable[[], Any]
) -> None:
    """A group whose sync fails is `OutcomeUnknown`, never ok; reopened, it is there or not, as its version tells."""
    model = expected_of_script(fresh)
    states = {0: {}} | {version: rows for _, rows, version in model}
    place = DirectoryRoot(root.directory, vfs=disk.name)
    unknown = 0
    for at in range(1, 40):
        store = place.open(f"job{at}", StoreOptions(durability))
        disk.arm("sync", at, apsw.SQLITE_IOERR_FSYNC, sticky=sticky)
        acknowledged = 0
        for messages in script():
            fired = disk.fired
            try:
                store.apply(group(*messages), 1)
                assert disk.fired == fired
                acknowledged = store.status().last_version
            except OutcomeUnknown as error:
                unknown += 1
                assert isinstance(error.__cause__, StorageError)
                assert error.__cause__.code == apsw.SQLITE_IOERR_FSYNC
                break
        clean = not disk.fired
        disk.disarm()
        store.close()
        assert check_reopened(root, f"job{at}", states) >= acknowledged
        if clean:
            break
    else:
        pytest.fail("never a clean run")
    assert unknown >= (5 if durability == "power" else 1)


@swallowed
@pytest.mark.parametrize("operation", ["sync", "write", "read"])
def test_a_failing_checkpoint_loses_nothing(operation: str, root: DirectoryRoot, disk: FaultyDisk) -> None:
    """Whatever fails in a checkpoint, rows and version stay; only a failed sync makes the outcome unknown."""
    codes = {"sync": apsw.SQLITE_IOERR_FSYNC, "write": apsw.SQLITE_IOERR_WRITE, "read": apsw.SQLITE_IOERR_READ}
    kind = OutcomeUnknown if operation == "sync" else StorageError
    failures = 0
    for at in range(1, 60):
        store = DirectoryRoot(root.directory, vfs=disk.name).open(f"job{at}", OPTIONS)
        store.apply(group(*rows_of(20, size=BIG)), 1)
        rows = dump(store)
        disk.arm(operation, at, codes[operation])
        try:
            store.checkpoint()
        except kind:
            failures += 1
        clean = not disk.fired
        disk.disarm()
        assert dump(store) == rows
        store.apply(group(put(b"d", b"k", b"v")), 1)
        assert store.status().last_version == 21
        store.close()
        again = root.open(f"job{at}", OPTIONS)
        assert dump(again) == rows | {b"d": [StoredRow(b"k", b"v", 21, None)]}
        again.close()
        if clean:
            break
    else:
        pytest.fail("never a clean run")
    assert failures == at - 1 >= (2 if operation == "sync" else 10)


def cold(store: SqliteStore) -> None:
    """Throw the page cache away, so that the next read goes to the disk."""
    store._roll_back()
    store._connection.pragma("shrink_memory")


@swallowed
def test_a_read_fault_fails_that_read_alone(root: DirectoryRoot, disk: FaultyDisk) -> None:
    """A read that fails in a group is `Failed` with its cause, never a wrong answer; what stands around it is done."""
    place = DirectoryRoot(root.directory, vfs=disk.name)
    failed, writes_failed = 0, 0
    for at in range(1, 200):
        store = place.open(f"job{at}", OPTIONS)
        store.apply(group(*rows_of(40, b"a", BIG)), 1)
        store.checkpoint()
        cold(store)
        reads: list[Any] = [
            GetRow(b"c", b"a000005"),
            ScanRange(b"c", b"a00003", None, limit=4),
            HasRow(b"c", b"a000020"),
        ]
        reads += [GetEntry(b"c", b"a000011"), GetRows(b"c", (b"a000001", b"a000039")), CountRange(b"c", b"", None)]
        messages = [
            put(b"c", b"x", b"1"),
            *reads,
            put(b"c", b"y", b"2"),
            *reads,
            batch(put(b"c", b"z", b"3")),
            LastVersion(),
        ]
        disk.arm("read", at, apsw.SQLITE_IOERR_READ)
        try:
            outcomes = store.apply(group(*messages), 1)
        except StorageError:
            writes_failed += 1  # a write has to read too: then nothing was applied
            outcomes = []
        fired = disk.fired
        disk.disarm()
        if outcomes:
            assert not store._connection.in_transaction
            pages = store.apply(group(*reads), 1)
            pages = [each - 2 if isinstance(each, int) and not isinstance(each, bool) else each for each in pages]
            right = [None, *pages, None, *pages, 43, 43]
            right[6], right[13] = 41, 42
            wrong = [(got, want) for got, want in zip(outcomes, right, strict=True) if got != want]
            assert len(wrong) <= 1
            for got, _ in wrong:
                assert isinstance(got, Failed)
                assert isinstance(got.error, StorageError)
                assert got.error.code == apsw.SQLITE_IOERR_READ
                failed += 1
            assert [store.get(b"c", key, 1) for key in (b"x", b"y", b"z")] == [b"1", b"2", b"3"]
        else:
            assert store.get(b"c", b"x", 1) is None
        assert store.status().last_version == (43 if outcomes else 40)
        store.close()
        root.drop(f"job{at}")
        if not fired:
            break
    else:
        pytest.fail("never a clean run")
    assert failed >= 5


@swallowed
def test_a_read_fault_outside_a_group(root: DirectoryRoot, disk: FaultyDisk) -> None:
    """A read outside a group, and a group of reads, fail alone with the cause, and work again right after."""
    store = DirectoryRoot(root.directory, vfs=disk.name).open("alpha", OPTIONS)
    store.apply(group(*rows_of(40, b"a", BIG)), 1)
    store.checkpoint()
    span = ScanRange(b"c", b"", None)
    for ask in (
        lambda: store.get(b"c", b"a000020", 1),
        lambda: store.read(GetEntry(b"c", b"a000020"), 1),
        lambda: store.scan(span, 1),
    ):
        right = ask()
        cold(store)
        disk.arm("read", 1, apsw.SQLITE_IOERR_READ)
        with pytest.raises(StorageError) as caught:
            ask()
        assert caught.value.code == apsw.SQLITE_IOERR_READ
        assert ask() == right
    cold(store)
    disk.arm("read", 2, apsw.SQLITE_IOERR_READ)
    outcomes = store.apply(group(CountRange(b"c", b"", None), GetRow(b"c", b"a000001"), LastVersion()), 1)
    assert sum(isinstance(outcome, Failed) for outcome in outcomes) == 1
    assert store.apply(group(CountRange(b"c", b"", None)), 1) == [40]
    store.close()


@swallowed
def test_a_close_that_fails_gives_the_job_up(root: DirectoryRoot, disk: FaultyDisk, caplog: Any) -> None:
    """A close on a failing disk raises nothing, tells the log, loses nothing, and frees the job."""
    for at in range(1, 30):
        store = DirectoryRoot(root.directory, vfs=disk.name).open(f"job{at}", OPTIONS)
        store.apply(group(*rows_of(3, size=BIG)), 1)
        disk.arm("write", at, apsw.SQLITE_FULL, sticky=True)
        with caplog.at_level(logging.WARNING, logger="persistency.storage"):
            store.close()
        fired = disk.fired
        assert bool(caplog.records) == bool(fired)
        caplog.clear()
        disk.disarm()
        again = root.open(f"job{at}", OPTIONS)
        assert again.read(CountRange(b"c", b"", None), 1) == 3
        again.close()
        if not fired:
            break
    assert at >= 4


# -- COMMIT ------------------------------------------------------------------------------------------------------


def on_commit(store: SqliteStore, act: Callable[[Callable[..., Any]], None], skip: int = 0) -> list[int]:
    """Have `act(execute)` done instead of the store's next COMMIT but `skip`; return how often it was."""
    real, done = store._execute, [0]

    def execute(sql: str, *bindings: Any) -> Any:
        if sql == "COMMIT" and not done[0]:
            done[0] += 1
            return act(real)
        return real(sql, *bindings)

    store._execute = execute
    return done


def test_a_commit_that_raised_but_happened(store: SqliteStore) -> None:
    """A COMMIT that raises though it happened is a success: not reported failed, not applied twice."""

    def act(execute: Callable[..., Any]) -> None:
        execute("COMMIT")
        raise fault(apsw.SQLITE_IOERR_WRITE)

    done = on_commit(store, act)
    assert store.apply(group(put(b"c", b"n", b"1"), batch(put(b"c", b"m", b"1"), Expect(b"c", b"m", None))), 1) == [
        None,
        4,
    ]
    assert done == [1]
    assert store.status().last_version == 4
    assert store.apply(group(batch(put(b"c", b"o", b"1"))), 1) == [5]
    assert [row.version for row in dump(store)[b"c"]] == [1, 3, 2, 5]


@pytest.mark.parametrize("code", [apsw.SQLITE_FULL, apsw.SQLITE_IOERR_WRITE, apsw.SQLITE_BUSY])
@pytest.mark.parametrize("rolled_back", [False, True], ids=["transaction open", "rolled back"])
def test_a_commit_that_raised_and_did_not_happen(store: SqliteStore, code: int, rolled_back: bool) -> None:
    """A COMMIT that raises and didn't happen fails the group; its versions are given to the next one."""

    def act(execute: Callable[..., Any]) -> None:
        if rolled_back:
            execute("ROLLBACK")
        raise fault(code)

    done = on_commit(store, act)
    with pytest.raises(StorageError) as caught:
        store.apply(group(put(b"c", b"n", b"1"), put(b"c", b"m", b"1")), 1)
    assert done == [1]
    assert caught.value.code == code
    assert isinstance(caught.value.__cause__, apsw.Error)
    assert store.status().last_version == 1
    assert [row.key for row in dump(store)[b"c"]] == [b"first"]
    assert store.apply(group(batch(put(b"c", b"n", b"1"))), 1) == [2]


def test_a_commit_nothing_is_known_of(store: SqliteStore) -> None:
    """A COMMIT that raises on a connection that can't be asked any more is `OutcomeUnknown`, with the cause."""
    real = store._execute

    def act(execute: Callable[..., Any]) -> None:
        execute("COMMIT")
        store._execute = refuse
        raise fault(apsw.SQLITE_IOERR_WRITE)

    def refuse(*_arguments: Any) -> Any:
        raise fault(apsw.SQLITE_IOERR_READ)

    on_commit(store, act)
    with pytest.raises(OutcomeUnknown) as caught:
        store.apply(group(put(b"c", b"n", b"1")), 1)
    assert isinstance(caught.value.__cause__, StorageError)
    store._execute = real


def test_a_barrier_whose_commit_fails(store: SqliteStore) -> None:
    """A sync barrier alone whose COMMIT fails is an error that can be tried again, whatever happened to it."""

    def act(execute: Callable[..., Any]) -> None:
        execute("COMMIT")
        raise fault(apsw.SQLITE_IOERR_WRITE)

    on_commit(store, act)
    with pytest.raises(StorageError):
        store.apply(group(Barrier(sync=True)), 1)
    assert store.apply(group(Barrier(sync=True)), 1) == [None]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_around_commit(root: DirectoryRoot, moment: str) -> None:
    """An interrupt just before or after COMMIT goes through; version, rows and clean mark are the file's."""
    store = root.open("alpha", OPTIONS)

    def act(execute: Callable[..., Any]) -> None:
        if moment == "after":
            execute("COMMIT")
        raise KeyboardInterrupt

    on_commit(store, act)
    with pytest.raises(KeyboardInterrupt):
        store.apply(group(put(b"c", b"a", b"1"), put(b"c", b"b", b"2")), 1)
    kept = 2 if moment == "after" else 0
    assert store.status().last_version == kept == meta(root)["last_version"]
    assert store.read(CountRange(b"c", b"", None), 1) == kept
    assert meta(root)["clean"] == (0 if kept else 1)
    store.close()
    assert meta(root)["clean"] == 1
    store = root.open("alpha", OPTIONS)
    assert store.apply(group(batch(put(b"c", b"c", b"3"))), 1) == [kept + 1]
    store.close()


def test_an_interrupt_in_the_middle(store: SqliteStore) -> None:
    """A group that is interrupted while it runs is undone whole, and the store goes on."""
    store._connection.set_progress_handler(lambda: True, 50)
    with pytest.raises((StorageError, apsw.Error, KeyboardInterrupt)) as caught:
        store.apply(group(*rows_of(300), DropRange(b"c", b"", None)), 1)
    store._connection.set_progress_handler(None)
    assert isinstance(caught.value, StorageError)
    assert not store._connection.in_transaction
    assert store.status().last_version == 1
    assert [row.key for row in dump(store)[b"c"]] == [b"first"]
    assert store.apply(group(batch(put(b"c", b"k", b"v"))), 1) == [2]


def test_an_unknown_message_harms_nothing(store: SqliteStore) -> None:
    """A message no store knows raises, and nothing of its group is applied."""
    with pytest.raises((KeyError, TypeError)):
        store.apply(group(put(b"c", b"k", b"v"), ("what",)), 1)
    assert not store._connection.in_transaction
    assert dump(store) == {b"c": [StoredRow(b"first", b"1", 1, None)]}
    assert store.apply(group(batch(put(b"c", b"k", b"v"))), 1) == [2]


# -- a message fails by itself -----------------------------------------------------------------------------------

LIMIT = 5000


def test_a_message_that_cannot_be_stored_fails_alone(root: DirectoryRoot) -> None:
    """In any place of a group, a payload too long fails its message alone; versions have no gaps."""
    for at in range(8):
        store = root.open(f"job{at}", OPTIONS)
        store._connection.limit(apsw.SQLITE_LIMIT_LENGTH, LIMIT)
        messages: list[Any] = [
            put(b"c", b"a", b"1"),
            GetRow(b"c", b"a"),
            batch(put(b"c", b"b", b"2"), put(b"c", b"c", b"3")),
        ]
        messages += [
            put(b"c", b"a", b"4"),
            batch(Expect(b"c", b"a", 4), put(b"c", b"d", b"5")),
            DropRow(b"c", b"b"),
            LastVersion(),
        ]
        messages.insert(at, put(b"c", b"bad", b"x" * (LIMIT + 1)))
        outcomes = store.apply(group(*messages), 1)
        bad = outcomes.pop(at)
        assert isinstance(bad, Failed)
        assert isinstance(bad.error, StorageError)
        assert bad.error.code == apsw.SQLITE_TOOBIG
        assert outcomes == [None, b"1", 3, None, 6, True, 7]
        assert [(row.key, row.version) for row in dump(store)[b"c"]] == [(b"a", 4), (b"c", 3), (b"d", 6)]
        assert store.status().last_version == 7
        store.close()
        assert meta(root, f"job{at}")["last_version"] == 7


def test_a_batch_that_cannot_be_stored_is_undone_alone(root: DirectoryRoot) -> None:
    """A batch with one payload too long is undone whole, takes no version, and its neighbours stay: plain or mixed."""
    bad = put(b"c", b"bad", b"x" * (LIMIT + 1))
    for batched in (
        [put(b"c", b"x", b""), bad],
        [DropRow(b"c", b"first"), put(b"c", b"x", b""), bad],
        [bad, put(b"c", b"x", b"")],
    ):
        store = root.open("alpha", OPTIONS)
        store.apply(group(put(b"c", b"first", b"1")), 1)
        store._connection.limit(apsw.SQLITE_LIMIT_LENGTH, LIMIT)
        before = store.status().last_version
        outcomes = store.apply(group(put(b"c", b"y", b"1"), batch(*batched), batch(put(b"c", b"z", b"2"))), 1)
        assert outcomes[0] is None
        assert isinstance(outcomes[1], Failed)
        assert outcomes[2] == before + 2
        assert [row.key for row in dump(store)[b"c"]] == [b"first", b"y", b"z"]
        store.close()


def test_many_messages_fail_alone(root: DirectoryRoot) -> None:
    """In a group of 300 puts, all those too long fail, each with its error, and all the others are there."""
    store = root.open("alpha", OPTIONS)
    store._connection.limit(apsw.SQLITE_LIMIT_LENGTH, LIMIT)
    outcomes = store.apply(
        group(*[put(b"c", b"%03d" % at, b"x" * (LIMIT if at % 10 == 3 else 5)) for at in range(300)]), 1
    )
    assert [at for at, outcome in enumerate(outcomes) if isinstance(outcome, Failed)] == list(range(3, 300, 10))
    assert [row.version for row in dump(store)[b"c"]] == list(range(1, 271))
    assert store.status().last_version == 270
    store.close()


def test_no_memory_at_commit_is_the_environments(store: SqliteStore) -> None:
    """A fault no message is guilty of is an error after one more try, and all is undone."""
    real = store._execute

    def execute(sql: str, *bindings: Any) -> Any:
        if sql == "COMMIT":
            raise MemoryError
        return real(sql, *bindings)

    store._execute = execute
    with pytest.raises(StorageError) as caught:
        store.apply(group(put(b"c", b"k", b"v"), put(b"c", b"l", b"v")), 1)
    store._execute = real
    assert isinstance(caught.value.__cause__, MemoryError)
    assert dump(store) == {b"c": [StoredRow(b"first", b"1", 1, None)]}
    assert store.apply(group(batch(put(b"c", b"k", b"v"))), 1) == [2]


@swallowed
@pytest.mark.usefixtures("little")
def test_a_read_that_has_no_room_is_no_failed_read(root: DirectoryRoot, disk: FaultyDisk) -> None:
    """A read that must first write the group's own pages fails the group on a full disk, not itself."""
    messages = [*rows_of(70, b"b", 64), CountRange(b"c", b"", None), ScanRange(b"c", b"a00002", None, limit=3)]
    met = 0
    for at in range(1, 200):
        store = DirectoryRoot(root.directory, vfs=disk.name).open(f"job{at}", OPTIONS)
        store._connection.pragma("cache_size", 2)
        store.apply(group(*rows_of(40, b"a", BIG)), 1)
        disk.arm("write", at, apsw.SQLITE_FULL)
        try:
            outcomes = store.apply(group(*messages), 1)
        except DiskFull:
            met += 1
            outcomes = store.apply(group(*messages), 1)
        assert not any(isinstance(outcome, Failed) for outcome in outcomes)
        fired = disk.fired
        disk.disarm()
        store.close()
        if not fired:
            break
    assert met >= 3


@pytest.mark.parametrize("payload", [None, object(), 2**70])
def test_a_payload_that_is_no_bytes_fails_alone(store: SqliteStore, payload: Any) -> None:
    """What SQLite can't bind or keep in a payload fails its message alone."""
    outcomes = store.apply(group(put(b"c", b"a", b"1"), put(b"c", b"bad", payload), put(b"c", b"b", b"2")), 1)
    assert outcomes[0] is None
    assert isinstance(outcomes[1], Failed)
    assert outcomes[2] is None
    assert [row.key for row in dump(store)[b"c"]] == [b"a", b"b", b"first"]


@swallowed
def test_a_read_fault_beside_a_message_that_fails(root: DirectoryRoot, disk: FaultyDisk) -> None:
    """A failing read and a payload too long in one group are two failures; the third message is applied."""
    both = 0
    for at in range(1, 30):
        store = DirectoryRoot(root.directory, vfs=disk.name).open(f"job{at}", OPTIONS)
        store.apply(group(*rows_of(40, b"a", BIG)), 1)
        store.checkpoint()
        store._connection.limit(apsw.SQLITE_LIMIT_LENGTH, LIMIT)
        cold(store)
        disk.arm("read", at, apsw.SQLITE_IOERR_READ)
        messages = [put(b"c", b"bad", b"x" * LIMIT), GetRow(b"c", b"a000011"), put(b"c", b"x", b"1")]
        try:
            outcomes = store.apply(group(*messages), 1)
        except StorageError:
            disk.disarm()
            assert store.get(b"c", b"x", 1) is None
        else:
            disk.disarm()
            assert isinstance(outcomes[0], Failed)
            both += isinstance(outcomes[1], Failed)
            assert isinstance(outcomes[1], Failed) or len(outcomes[1]) == BIG
            assert outcomes[2] is None
            assert store.get(b"c", b"x", 1) == b"1"
            assert store.status().last_version == 41
        store.close()
    assert both >= 1


# -- time --------------------------------------------------------------------------------------------------------

EXPIRES = 1000


@pytest.fixture
def expiring(root: DirectoryRoot) -> Iterator[SqliteStore]:
    """A job whose rows `e` (in c) and `k` (alone in d) expire at 1000, and `k` in c doesn't."""
    made = root.open("alpha", OPTIONS)
    made.apply(group(put(b"c", b"e", b"1"), put(b"c", b"k", b"2"), put(b"d", b"k", b"3")), 1)
    made.close()
    connection = sqlite3.connect(root.path("alpha"))
    connection.execute("UPDATE kv SET expires_ms = ? WHERE category = x'64' OR key = x'65'", (EXPIRES,))
    connection.commit()
    connection.close()
    opened = root.open("alpha", OPTIONS)
    yield opened
    opened.close()


READS: list[tuple[Any, Any, Any]] = [  # message, answer while live, answer when expired
    (GetRow(b"c", b"e"), b"1", None),
    (HasRow(b"c", b"e"), True, False),
    (HasRow(b"c", b"k"), True, True),
    (GetEntry(b"c", b"e"), StoredRow(b"e", b"1", 1, EXPIRES), None),
    (GetEntry(b"c", b"k"), StoredRow(b"k", b"2", 2, None), StoredRow(b"k", b"2", 2, None)),
    (GetRows(b"c", (b"e", b"k")), [(b"e", b"1"), (b"k", b"2")], [(b"k", b"2")]),
    (ScanRange(b"c", b"", None), [(b"e", b"1"), (b"k", b"2")], [(b"k", b"2")]),
    (ScanRange(b"c", b"", b"f"), [(b"e", b"1")], []),
    (ScanRange(b"c", b"", None, limit=1), [(b"e", b"1")], [(b"k", b"2")]),
    (ScanRange(b"c", b"", None, True, None, True), [(b"k", b""), (b"e", b"")], [(b"k", b"")]),
    (CountRange(b"c", b"", None), 2, 1),
    (CountRange(b"c", b"", b"f"), 1, 0),
    (ListCategories(), [b"c", b"d"], [b"c"]),
]


@pytest.mark.parametrize(("now_ms", "live"), [(0, True), (EXPIRES - 1, True), (EXPIRES, False), (EXPIRES + 1, False)])
def test_every_read_knows_the_time(expiring: SqliteStore, now_ms: int, live: bool) -> None:
    """A row is live if and only if now < expires, on every read path, in a group, among writes and outside."""
    answers = [while_live if live else expired for _, while_live, expired in READS]
    messages = [message for message, _, _ in READS]
    assert [expiring.read(message, now_ms) for message in messages] == answers
    assert expiring.apply(group(*messages), now_ms) == answers
    assert expiring.apply(group(put(b"x", b"", b""), DropRow(b"x", b""), *messages), now_ms)[2:] == answers
    assert expiring.get(b"c", b"e", now_ms) == (b"1" if live else None)
    assert expiring.scan(ScanRange(b"d", b"", None), now_ms) == ([(b"k", b"3")] if live else [])


@pytest.mark.parametrize("live", [True, False])
def test_writes_know_the_time(expiring: SqliteStore, live: bool) -> None:
    """Removals answer only for live rows but take expired ones away too; an expired row is absent to an `Expect`."""
    now_ms = EXPIRES - 1 if live else EXPIRES
    outcomes = expiring.apply(group(batch(Expect(b"c", b"e", 1)), batch(Expect(b"c", b"e", None))), now_ms)
    wrong = outcomes.pop(1 if live else 0)
    assert isinstance(wrong, Failed)
    assert isinstance(wrong.error, Conflict)
    assert (wrong.error.expected, wrong.error.actual) == ((None, 1) if live else (1, None))
    assert outcomes == [4]
    removals = group(DropRow(b"d", b"k"), DropRange(b"c", b"", None), DropRange(b"c", b"", None))
    assert expiring.apply(removals, now_ms) == [live, 1 + live, 0]
    assert expiring.read(ListCategories(), 0) == []


def test_a_range_removal_keeps_expired_rows_outside_it(expiring: SqliteStore) -> None:
    """Removing a range takes expired rows inside it, and leaves those before, after and in other categories."""
    assert expiring.apply(group(DropRange(b"c", b"f", b"z"), DropRange(b"c", b"", b"e")), EXPIRES) == [1, 0]
    assert expiring.get(b"c", b"e", 0) == b"1"
    assert expiring.get(b"d", b"k", 0) == b"3"


@pytest.mark.parametrize("count", [1, 4, 32, 256])
def test_a_plain_put_clears_an_expiry(expiring: SqliteStore, count: int) -> None:
    """A put over a row with an expiry, of whatever size its group is, leaves one without."""
    for rows in (rows_of(count - 1), rows_of(count - 1)[::-1]):
        expiring.apply(group(*rows, put(b"c", b"e", b"new")), EXPIRES)
        row = expiring.read(GetEntry(b"c", b"e"), 10**15)
        assert (row.payload, row.expires_ms) == (b"new", None)


@pytest.mark.parametrize("sets", ["a put", "a touch", "a swap"])
def test_a_point_read_looks_at_ends_as_soon_as_there_are_some(store: SqliteStore, sets: str) -> None:
    """While no row ends its end isn't read; from the first one on it is, and no longer once all of them are reaped."""

    def columns() -> int:
        with statements(store) as ran:
            assert store.get(b"c", b"first", 1) == b"1"
        return max(sql.count("CAST") for sql in ran)

    setting = {
        "a put": SetRow(b"c", b"e", b"v", EXPIRES, b""),
        "a touch": TouchRow(b"c", b"e", EXPIRES),
        "a swap": SwapRow(b"c", b"e", b"v", b"w", EXPIRES),
    }[sets]
    store.apply(group(put(b"c", b"e", b"v")), 1)
    assert columns() == 1
    store.apply(group(setting), 1)
    assert columns() == 2
    assert store.get(b"c", b"e", EXPIRES - 1) is not None
    assert store.get(b"c", b"e", EXPIRES) is None
    assert store.reap(EXPIRES, 10) == 1
    assert columns() == 1


def test_a_point_read_that_comes_first_finds_ends_of_others(root: DirectoryRoot, expiring: SqliteStore) -> None:
    """Nobody has said that there are any, and nothing else was asked before."""
    assert expiring.get(b"c", b"e", EXPIRES - 1) == b"1"
    assert expiring.get(b"c", b"e", EXPIRES) is None


def test_other_tools_may_have_written_text(root: DirectoryRoot) -> None:
    """Rows another tool has put text or numbers into read as bytes on every path, and don't break a thing."""
    root.open("alpha", OPTIONS).close()
    connection = sqlite3.connect(root.path("alpha"))
    rows = [
        (b"c", b"a", "text", 1, None),
        (b"c", b"b", 42, "x", None),
        (b"c", b"c", b"", 3, "never"),
        ("t", b"k", b"", 4, None),
    ]
    connection.executemany("INSERT INTO kv VALUES (?, ?, ?, ?, ?)", rows)
    connection.execute("INSERT INTO kv VALUES (x'63', x'64', CAST(x'ff' AS TEXT), 1.5, 1.5)")
    connection.commit()
    connection.close()
    store = root.open("alpha", OPTIONS)
    assert store.get(b"c", b"a", 1) == b"text"
    assert store.get(b"c", b"d", 0) == b"\xff"
    pairs = store.scan(ScanRange(b"c", b"", None), 0)
    assert all(type(payload) is bytes for _, payload in pairs)
    assert pairs[:2] == [(b"a", b"text"), (b"b", b"42")]
    for key in (b"a", b"b", b"c", b"d"):
        row = store.read(GetEntry(b"c", key), 0)
        assert row is None or type(row.version) is int
        store.apply(group(HasRow(b"c", key), GetRow(b"c", key), batch(Expect(b"c", key, 0)), DropRow(b"c", key)), 0)
    assert store.read(ListCategories(), 0) == []
    store.close()


# -- the log -----------------------------------------------------------------------------------------------------


def test_the_log_is_counted(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log's size is told by its commits; a checkpoint is due at one limit when idle, at another when not."""
    assert isinstance(store, Checkpointing)
    monkeypatch.setattr(sqlite, "CHECKPOINT_IDLE_PAGES", 20)
    monkeypatch.setattr(sqlite, "CHECKPOINT_FORCED_PAGES", 60)
    store.checkpoint()
    assert store.status().wal_bytes == 0
    due = []
    for at in range(12):
        store.apply(group(*rows_of(6, b"%02d" % at, BIG)), 1)
        pages = store.status().wal_bytes // 4096
        assert store.checkpoint_due(idle=True) == (pages >= 20)
        assert store.checkpoint_due(idle=False) == (pages >= 60)
        due.append((store.checkpoint_due(idle=True), store.checkpoint_due(idle=False)))
    assert due[0] == (False, False)
    assert (True, False) in due
    assert due[-1] == (True, True)
    rows = dump(store)
    store.checkpoint()
    assert store.status().wal_bytes == 0
    assert not store.checkpoint_due(idle=True)
    assert dump(store) == rows
    store.apply(group(put(b"c", b"k", b"v")), 1)
    assert 0 < store.status().wal_bytes < 10 * 4096


def test_the_real_limits() -> None:
    """A checkpoint is due at 4,000 pages with nobody waiting, and at 12,000 whoever waits."""
    assert (sqlite.CHECKPOINT_IDLE_PAGES, sqlite.CHECKPOINT_FORCED_PAGES) == (4_000, 12_000)


def test_a_checkpoint_carries_the_log_over(root: DirectoryRoot, store: SqliteStore) -> None:
    """After a checkpoint the rows are in the file itself."""
    store.apply(group(put(b"c", b"k", b"v")), 1)
    store.checkpoint()
    copy = root.directory / "copy"
    copy.write_bytes(root.path("alpha").read_bytes())
    connection = sqlite3.connect(copy)
    assert connection.execute("SELECT payload FROM kv WHERE key = x'6b'").fetchall() == [(b"v",)]
    connection.close()


def test_a_checkpoint_beside_another_reader(root: DirectoryRoot, store: SqliteStore) -> None:
    """Another connection's read keeps a part of the log, says the count; once it is over the whole goes."""
    store.checkpoint()
    other = apsw.Connection(str(root.path("alpha")), flags=apsw.SQLITE_OPEN_READONLY)
    other.execute("BEGIN")
    other.execute("SELECT count(*) FROM kv").fetchall()
    store.apply(group(*rows_of(30, size=BIG)), 1)
    store.checkpoint()
    assert store.status().wal_bytes > 0
    assert other.execute("SELECT count(*) FROM kv").fetchall() == [(1,)]
    other.execute("COMMIT")
    other.close()
    store.checkpoint()
    assert store.status().wal_bytes == 0
    assert store.read(CountRange(b"c", b"", None), 1) == 31


def test_no_checkpoint_runs_inside_a_commit(root: DirectoryRoot, disk: FaultyDisk) -> None:
    """However long the log gets, groups write to the log alone: only `checkpoint` writes to the file."""
    store = DirectoryRoot(root.directory, vfs=disk.name).open("alpha", OPTIONS)
    store.apply(group(put(b"c", b"k", b"v")), 1)
    disk.calls.clear()
    for at in range(4):
        store.apply(group(*rows_of(400, b"%d" % at, BIG)), 1)
    assert store.status().wal_bytes > 1100 * 4096
    assert ("write", "db") not in disk.calls
    store.checkpoint()
    assert ("write", "db") in disk.calls
    store.close()


def test_settling_leaves_the_file_as_a_close_would(root: DirectoryRoot, store: SqliteStore) -> None:
    """`settle` marks the file clean and empties the log, a second time does nothing, and the next group unmarks it."""
    assert meta(root)["clean"] == 0
    store.settle()
    assert meta(root)["clean"] == 1
    assert store.status().wal_bytes == 0
    assert (root.directory / "alpha.db-wal").stat().st_size == 0
    with statements(store) as ran:
        store.settle()
    assert ran == []
    store.get(b"c", b"first", 1)
    store.apply(group(Barrier()), 1)
    assert meta(root)["clean"] == 1
    store.apply(group(put(b"c", b"k", b"v")), 1)
    assert meta(root)["clean"] == 0
    store.settle()
    assert meta(root)["clean"] == 1


def test_closing_leaves_one_file(root: DirectoryRoot) -> None:
    """A close leaves no log, marks the file clean and frees the job; what was written is there."""
    store = root.open("alpha", OPTIONS)
    store.apply(group(put(b"c", b"k", b"v")), 1)
    store.get(b"c", b"k", 1)
    store.close()
    assert sorted(path.name for path in root.directory.iterdir()) == ["alpha.db", "alpha.lock"]
    assert meta(root) == {"job_id": "alpha", "last_version": 1, "clean": 1, "syncs": 0}
    root.open("alpha", OPTIONS).close()
    assert meta(root)["clean"] == 1


CRASH = """
import os, signal, sys
from pathlib import Path
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import StoreOptions
store = DirectoryRoot(Path(sys.argv[1])).open("alpha", StoreOptions())
for at in range(50):
    store.apply([b"c", b"%03d" % at, b"v"], 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_crash_leaves_the_mark_of_one(root: DirectoryRoot) -> None:
    """After a crash the file isn't marked clean, every committed group is there, and the versions go on."""
    run_child(CRASH, root.directory)
    assert (root.directory / "alpha.db-wal").stat().st_size > 0
    assert meta(root)["clean"] == 0
    store = root.open("alpha", OPTIONS)
    assert store.status().last_version == 50
    assert [row.version for row in dump(store)[b"c"]] == list(range(1, 51))
    assert store.apply(group(batch(put(b"c", b"k", b"v"))), 1) == [51]
    store.close()
    assert meta(root)["clean"] == 1


def test_errors_keep_their_kind_and_cause() -> None:
    """SQLite's errors become ours by what can be done about them, with their code and cause."""
    kinds = {
        apsw.SQLITE_FULL: DiskFull, apsw.SQLITE_CORRUPT: Corrupt, apsw.SQLITE_NOTADB: Corrupt,
        apsw.SQLITE_IOERR_DATA: Corrupt,
        apsw.SQLITE_IOERR_CORRUPTFS: Corrupt, apsw.SQLITE_BUSY: Unavailable, apsw.SQLITE_LOCKED: Unavailable,
        apsw.SQLITE_CANTOPEN: Unavailable, apsw.SQLITE_READONLY: Unavailable, apsw.SQLITE_PERM: Unavailable,
        apsw.SQLITE_IOERR_READ: StorageError, apsw.SQLITE_IOERR_WRITE: StorageError,
        apsw.SQLITE_INTERRUPT: StorageError,
    }  # fmt: skip
    for code, kind in kinds.items():
        cause = fault(code)
        error = sqlite.schema.translated(cause, "doing")
        assert type(error) is kind
        assert error.code == code
        assert error.__cause__ is cause
        assert str(error).startswith("doing: ")


def test_a_closed_file_is_released_even_if_closing_fails(root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever goes wrong at close, the job's ownership is given up."""
    store = root.open("alpha", OPTIONS)
    monkeypatch.setattr(store, "settle", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        store.close()
    store._connection.close()
    again = root.open("alpha", OPTIONS)
    again.close()


def test_job_files_are_told_apart(root: DirectoryRoot, tmp_path: Path) -> None:
    """Two jobs of one root, and two of one id in two roots, share nothing."""
    other = DirectoryRoot(tmp_path / "other")
    stores = [root.open("a", OPTIONS), root.open("b", OPTIONS), other.open("a", OPTIONS)]
    for at, each in enumerate(stores):
        each.apply(group(put(b"c", b"k", b"%d" % at)), 1)
    assert [each.get(b"c", b"k", 1) for each in stores] == [b"0", b"1", b"2"]
    for each in stores:
        each.close()


def test_a_point_read_asks_for_the_time_only_where_a_row_ends(store: SqliteStore) -> None:
    """A row without an end is read without a clock; one that has one is held against what the clock says now."""
    asked: list[int] = []

    def now_ms() -> int:
        asked.append(len(asked))
        return 5 + len(asked)

    read = store.point_read(now_ms)
    store.apply(group(SetRow(b"c", b"ends", b"2", 7)), 1)
    assert [read(b"c", b"first"), read(b"c", b"missing"), len(asked)] == [b"1", None, 0]
    assert [read(b"c", b"ends"), read(b"c", b"ends")] == [b"2", None]
    assert len(asked) == 2
    assert store.status().latest_ms == 7  # what somebody was told has ended stays so
