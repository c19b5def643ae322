"""What a store does for a group before it has it: the group is none the wiser, and neither is anything else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest

from persistency.errors import Corrupt
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import Barrier, CountRange, Expect, GetRow, ScanRange, StoreOptions
from persistency.storage.sqlite import SqliteStore
from persistency.testing import batch, dump, group, put
from tests.storage.conftest import FaultyDisk, fault, statements


@pytest.fixture
def store(root: DirectoryRoot) -> Iterator[SqliteStore]:
    """An open job with one row, that was read, too."""
    opened = root.open("alpha", StoreOptions())
    opened.apply(group(put(b"c", b"first", b"1")), 1)
    assert opened.get(b"c", b"first", 1) == b"1"
    yield opened
    opened.close()


def words(ran: list[str]) -> list[str]:
    """Return the first word of each statement."""
    return [sql.split()[0] for sql in ran]


def writing(store: SqliteStore) -> bool:
    """Say whether a transaction for writing is open."""
    return store._connection.txn_state("main") == apsw.SQLITE_TXN_WRITE


ROWS = [put(b"c", b"%03d" % at, b"v") for at in range(100)]


@pytest.mark.parametrize("times", [1, 3])
def test_a_prepared_group_of_writes_takes_the_statements_of_any_other(store: SqliteStore, times: int) -> None:
    """The transaction is begun by whichever comes first, once."""
    with statements(store) as of_one:
        store.apply(group(*ROWS), 1)
    for _ in range(times):
        store.prepare()
    assert writing(store)
    store._connection.execute("ROLLBACK")
    with statements(store) as of_prepared:
        store.prepare()
        assert words(of_prepared) == ["BEGIN"]
        store.apply(group(*ROWS), 1)
    assert words(of_prepared) == [word for word in words(of_one) if word != "COMMIT"] + ["COMMIT"]
    assert not store._connection.in_transaction


# Something other than the writes it was prepared for, and what comes of it.
OTHERS: dict[str, Callable[[SqliteStore], Any]] = {
    "a group of reads": lambda store: store.apply(group(GetRow(b"c", b"first"), CountRange(b"c", b"", None)), 1),
    "a barrier": lambda store: store.apply(group(Barrier()), 1),
    "a barrier that syncs": lambda store: store.apply(group(Barrier(sync=True)), 1),
    "writes and a barrier that syncs": lambda store: store.apply(group(put(b"c", b"k", b"v"), Barrier(sync=True)), 1),
    "a check that fails": lambda store: store.apply(group(batch(put(b"c", b"k", b"v"), Expect(b"c", b"k", 9))), 1),
    "a get": lambda store: store.get(b"c", b"first", 1),
    "a scan": lambda store: store.read(ScanRange(b"c", b"", None), 1),
    "a checkpoint": lambda store: store.checkpoint(),
    "a fold": lambda store: store.fold(),
    "settling": lambda store: store.settle(),
    "reaping": lambda store: store.reap(1, 10),
    "nothing": lambda _store: None,
}


@pytest.mark.parametrize("durability", ["process", "power"])
@pytest.mark.parametrize("other", OTHERS)
def test_what_comes_instead_is_as_it_would_be(
    other: str, durability: Any, root: DirectoryRoot, disk: FaultyDisk
) -> None:
    """Its outcome, its syncs and the rows are the same, and so is what is written afterwards, and found again."""
    seen = []
    place = DirectoryRoot(root.directory, vfs=disk.name)
    for prepared in (False, True):
        store = place.open(f"job{prepared}", StoreOptions(durability=durability))
        store.apply(group(put(b"c", b"first", b"1")), 1)
        if prepared:
            store.prepare()
        disk.calls.clear()
        outcome = OTHERS[other](store)
        outcome = [type(each) for each in outcome] if other == "a check that fails" else outcome
        syncs, level = disk.syncs("wal"), store._connection.pragma("synchronous")
        store.apply(group(*ROWS[:5]), 1)
        assert not store._connection.in_transaction
        rows, version = dump(store), store.last_version
        store.close()
        again = place.open(f"job{prepared}", StoreOptions())
        assert (dump(again), again.last_version) == (rows, version)
        again.close()
        seen.append((outcome, syncs, level, rows, version))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("other", ["a group of reads", "a barrier", "a barrier that syncs", "a fold", "settling"])
def test_nothing_is_kept_from_others_any_longer(store: SqliteStore, root: DirectoryRoot, other: str) -> None:
    """Once something else was done, the transaction for writing is over."""
    store.prepare()
    OTHERS[other](store)
    assert not writing(store)


def test_what_cannot_be_prepared_is_for_the_group_to_find(store: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the system at the BEGIN, or a file that was moved: no error before there is somebody to be told."""
    begun = []

    def refuse(_cursor: Any, sql: str, _bindings: Any) -> bool:
        if sql.startswith("BEGIN IMMEDIATE"):
            begun.append(sql)
            raise fault(apsw.SQLITE_IOERR_READ)
        return True

    store._connection.exec_trace = refuse
    store.prepare()
    assert begun
    store._connection.exec_trace = None
    store.apply(group(put(b"c", b"k", b"v")), 1)
    assert store.get(b"c", b"k", 1) == b"v"


@pytest.mark.parametrize("when", ["before", "between"])
def test_a_moved_file_is_seen(when: str, root: DirectoryRoot) -> None:
    """What was looked at for the preparation need not be looked at again; the next group looks in any case."""
    store = root.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"first", b"1")), 1)
    path: Path = root.path("alpha")
    if when == "between":
        store.prepare()
    path.rename(path.with_suffix(".elsewhere"))
    if when == "before":
        store.prepare()
    if when == "between":
        store.apply(group(put(b"c", b"k", b"v")), 1)
    with pytest.raises(Corrupt, match="removed, renamed or replaced"):
        store.apply(group(put(b"c", b"l", b"v")), 1)
    with pytest.raises(Corrupt, match="removed, renamed or replaced"):
        store.close()


def test_a_reader_beside_a_prepared_store_reads(store: SqliteStore, root: DirectoryRoot) -> None:
    """Another connection reads on, as beside any transaction."""
    store.prepare()
    with closing(apsw.Connection(str(root.path("alpha")), flags=apsw.SQLITE_OPEN_READONLY)) as other:
        assert other.execute("SELECT count(*) FROM kv").fetchone() == (1,)
    store.apply(group(put(b"c", b"k", b"v")), 1)
    assert len(dump(store)[b"c"]) == 2
