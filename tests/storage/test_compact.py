"""Giving space back: unused pages leave the file in slices, nothing else changes; older files are written anew once."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest

from persistency.errors import StorageError
from persistency.storage import copying, schema
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import Barrier, DropRange, DropRow, Extent, GiveBack, SetRow, StoreOptions
from persistency.storage.sqlite import SqliteStore
from persistency.testing import NOW_MS, dump, group, put
from tests.storage.conftest import FaultyDisk, fault, run_child

OPTIONS = StoreOptions()
ROWS = 3_000
PAYLOAD = bytes(500)
KV_1 = (
    "CREATE TABLE kv (category BLOB NOT NULL, key BLOB NOT NULL, payload BLOB NOT NULL,"
    " PRIMARY KEY (category, key)) WITHOUT ROWID"
)


def pragma(store: SqliteStore, name: str) -> Any:
    """Ask a store's connection for one of its numbers."""
    return store._connection.pragma(name)


def ask(store: SqliteStore, message: Any) -> Any:
    """Have one message answered in a group of its own."""
    return store.apply(group(message), NOW_MS)[0]


def look(path: Path, sql: str) -> list[Any]:
    """Ask a file something with the standard library."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def fill(store: SqliteStore, rows: int = ROWS) -> None:
    """Put rows into a store, here and there, and take most of them away again."""
    keys = [b"%05d" % at for at in range(rows)]
    random.Random(3).shuffle(keys)
    for at in range(0, rows, 500):
        store.apply(group(*[put(b"c", key, PAYLOAD) for key in keys[at : at + 500]]), NOW_MS)
    store.apply(group(DropRange(b"c", b"00100", b"%05d" % (rows - 100))), NOW_MS)


def of_an_earlier_release(path: Path) -> Path:
    """Make a file as it was made before space could be given back in slices."""
    path.parent.mkdir(exist_ok=True)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("VACUUM")  # so that it isn't empty
    assert look(path, "PRAGMA auto_vacuum") == [(0,)]
    return path


# -- which files can ---------------------------------------------------------------------------------------------


def test_a_new_file_can_give_space_back(root: DirectoryRoot) -> None:
    """A new job's file is made so that it can give its space back in slices, and says so to any tool."""
    store = root.open("alpha", OPTIONS)
    assert ask(store, GiveBack(1)) == 0
    store.close()
    assert look(root.path("alpha"), "PRAGMA auto_vacuum") == [(2,)]
    root.path("empty").touch()
    root.open("empty", OPTIONS).close()
    assert look(root.path("empty"), "PRAGMA auto_vacuum") == [(2,)]


@pytest.mark.parametrize("which", ["an earlier release's", "the original's"])
def test_an_older_file_stays_as_it_is(which: str, root: DirectoryRoot) -> None:
    """A file made before can't, and isn't changed by being opened: it answers `None`, and keeps what it has."""
    path = of_an_earlier_release(root.path("alpha"))
    if which == "the original's":
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(KV_1)
            connection.execute("PRAGMA user_version = 1")
    store = root.open("alpha", OPTIONS)
    fill(store)
    before, free = dump(store), pragma(store, "freelist_count")
    assert free > 300
    assert ask(store, GiveBack(100)) is None
    assert (dump(store), pragma(store, "freelist_count")) == (before, free)
    store.close()
    assert look(path, "PRAGMA auto_vacuum") == [(0,)]


# -- in slices ---------------------------------------------------------------------------------------------------


def test_space_is_given_back_in_slices(root: DirectoryRoot) -> None:
    """Slices free what they were told to and no more, until nothing is left; the content stays; the file gets small."""
    store = root.open("alpha", OPTIONS)
    fill(store)
    store.fold()
    before, large = dump(store), root.path("alpha").stat().st_size
    free, pages = pragma(store, "freelist_count"), pragma(store, "page_count")
    assert free > 300
    while free:
        left = ask(store, GiveBack(70))
        assert left == max(0, free - 70) == pragma(store, "freelist_count")
        # A page that only says where others are goes with those that it told of: one in 800.
        assert 0 < pages - pragma(store, "page_count") <= 71
        free, pages = left, pragma(store, "page_count")
        assert dump(store) == before
    assert ask(store, GiveBack(70)) == 0
    assert ask(store, Extent()) == pages * 4096
    assert root.path("alpha").stat().st_size == large
    store.fold()
    assert root.path("alpha").stat().st_size == pages * 4096 < large / 5
    assert store.status().last_version == ROWS + 1
    store.close()
    assert look(root.path("alpha"), "PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("pages", [0, -1])
def test_a_slice_of_nothing(pages: int, root: DirectoryRoot) -> None:
    """A slice of no pages frees none: SQLite itself would take it for all of them."""
    store = root.open("alpha", OPTIONS)
    fill(store)
    free = pragma(store, "freelist_count")
    assert ask(store, GiveBack(pages)) == free
    assert pragma(store, "freelist_count") == free
    store.close()


def test_a_slice_is_undone_with_its_transaction(root: DirectoryRoot) -> None:
    """A slice belongs to the transaction it is in: rolled back, the pages are unused and there as before."""
    store = root.open("alpha", OPTIONS)
    fill(store)
    before, free, pages = dump(store), pragma(store, "freelist_count"), pragma(store, "page_count")
    store._end_read()
    store._execute("BEGIN IMMEDIATE")
    assert copying.give_back(store._connection, 100) == free - 100
    store._execute("ROLLBACK")
    assert (dump(store), pragma(store, "freelist_count"), pragma(store, "page_count")) == (before, free, pages)
    store.close()
    assert look(root.path("alpha"), "PRAGMA integrity_check") == [("ok",)]


def test_slices_among_writes(root: DirectoryRoot) -> None:
    """Slices in one group with writes and reads leave every row right, whatever was written before and after."""
    store = root.open("alpha", StoreOptions(max_bytes=10**9, feed_changes_max=50))
    chance, rows = random.Random(11), {}
    for _ in range(120):
        messages: list[Any] = []
        for _ in range(12):
            key = b"%03d" % chance.randrange(200)
            choice = chance.random()
            if choice < 0.5:
                rows[key] = chance.randbytes(chance.choice([5, 500, 20_000]))
                messages.append(put(b"c", key, rows[key]))
            elif choice < 0.6:
                rows[key] = b"ending"
                messages.append(SetRow(b"c", key, b"ending", NOW_MS * 2))
            elif choice < 0.9:
                rows.pop(key, None)
                messages.append(DropRow(b"c", key))
            else:
                messages.append(GiveBack(chance.choice([1, 5, 50])))
        store.apply(group(*messages), NOW_MS)
        assert {row.key: row.payload for row in dump(store).get(b"c", [])} == rows
    while ask(store, GiveBack(10)):
        pass
    store.close()
    assert look(root.path("alpha"), "PRAGMA integrity_check") == [("ok",)]
    assert look(root.path("alpha"), "PRAGMA freelist_count") == [(0,)]


@pytest.mark.parametrize("operation", ["write", "sync"])
def test_a_slice_survives_any_fault(operation: str, place: Path, disk: FaultyDisk) -> None:
    """Whichever write or sync of a slice, or of carrying it over, fails: no row is lost, and trying again does it."""
    code = apsw.SQLITE_IOERR_WRITE if operation == "write" else apsw.SQLITE_IOERR_FSYNC
    root = DirectoryRoot(place / "root", vfs=disk.name)
    failures, at, fired = 0, 0, 1
    while fired:
        at += 1
        store = root.open(f"job{at}", OPTIONS)
        fill(store, 400)
        store.fold()
        before = dump(store)
        disk.arm(operation, at, code)
        try:
            ask(store, GiveBack(10))
            store.fold()
        except Exception as error:
            failures += 1
            assert isinstance(error, StorageError) or type(error).__name__ == "OutcomeUnknown"
        fired = disk.fired
        disk.disarm()
        assert dump(store) == before
        while ask(store, GiveBack(10)):
            pass
        store.close()
        assert look(root.path(f"job{at}"), "PRAGMA integrity_check") == [("ok",)]
        store = root.open(f"job{at}", OPTIONS)
        assert dump(store) == before
        store.close()
    assert failures >= 2
    assert failures == at - 1


# -- in one ------------------------------------------------------------------------------------------------------


def settings(connection: apsw.Connection) -> list[Any]:
    """Return what a rebuild has to leave as it was."""
    asked = [connection.pragma(name) for name in ("temp_store", "journal_mode", "user_version", "page_size")]
    limits = [connection.limit(limit) for limit, _ in schema._LIMITS]
    return asked + limits + [connection.config(switch, -1) for switch, _ in schema._SWITCHES]


def test_an_older_file_is_rebuilt(root: DirectoryRoot) -> None:
    """A rebuild writes an older file anew, small, with the same content, and slices do for it from then on."""
    path = of_an_earlier_release(root.path("alpha"))
    store = root.open("alpha", StoreOptions(max_bytes=10**9, feed_changes_max=50))
    fill(store)
    store.fold()
    before, large, was = dump(store), path.stat().st_size, settings(store._connection)
    store._end_read()
    copying.rebuild(store._connection)
    assert settings(store._connection) == was
    assert dump(store) == before
    assert pragma(store, "freelist_count") == 0
    store.fold()
    assert path.stat().st_size < large / 5
    fill(store)
    assert ask(store, GiveBack(100)) == pragma(store, "freelist_count") > 100
    assert store.status().last_version == 2 * (ROWS + 1)
    store.close()
    assert look(path, "PRAGMA integrity_check") == [("ok",)]
    assert look(path, "PRAGMA auto_vacuum") == [(2,)]


def test_a_barrier_rebuilds(root: DirectoryRoot) -> None:
    """A barrier that asks for it has the file rebuilt and its log cut off: the file is small when it has answered."""
    path = of_an_earlier_release(root.path("alpha"))
    store = root.open("alpha", OPTIONS)
    fill(store)
    before = dump(store)
    assert ask(store, Barrier(fold=True, rebuild=True)) is None
    assert path.stat().st_size == ask(store, Extent()) < 400_000
    assert dump(store) == before
    store.close()


@pytest.mark.parametrize("code", [apsw.SQLITE_FULL, apsw.SQLITE_IOERR_WRITE])
def test_a_rebuild_that_fails_changes_nothing(code: int, place: Path, disk: FaultyDisk) -> None:
    """Whichever write of a rebuild fails, for want of room or otherwise, the file and the settings are as they were."""
    root = DirectoryRoot(place / "root", vfs=disk.name)
    of_an_earlier_release(root.path("alpha"))
    store = root.open("alpha", OPTIONS)
    fill(store, 300)
    store.fold()
    before, was, failures = dump(store), settings(store._connection), 0
    for at in range(1, 1_000):
        store._end_read()
        disk.arm("write", at, code)
        try:
            copying.rebuild(store._connection)
        except apsw.Error as error:
            failures += 1
            assert type(error) is type(fault(code))
            assert pragma(store, "auto_vacuum") == 0
        fired = disk.fired
        disk.disarm()
        assert settings(store._connection) == was
        assert dump(store) == before
        if not fired:
            break
        store.fold()
    else:
        pytest.fail("never a clean run")
    assert failures > 10
    assert pragma(store, "auto_vacuum") == 2
    store.close()


def test_a_rebuild_takes_no_memory_of_the_files_size(place: Path, disk: FaultyDisk) -> None:
    """While a file is written anew its content lies in a temporary file, not in memory."""
    root = DirectoryRoot(place / "root", vfs=disk.name)
    of_an_earlier_release(root.path("alpha"))
    store = root.open("alpha", OPTIONS)
    store.apply(group(*[put(b"c", b"%04d" % at, bytes(3_000)) for at in range(2_000)]), NOW_MS)
    store._end_read()
    disk.calls.clear()
    copying.rebuild(store._connection)
    assert disk.calls.count(("write", "other")) > 1_000  # pages, but for those that are cached
    store.close()


REBUILDING = """
import os, signal, sys
from pathlib import Path
import apsw
from persistency.storage import copying
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import *

class Disk(apsw.VFS):
    def xOpen(self, name, flags):
        return File("unix", name, flags)

class File(apsw.VFSFile):
    def xWrite(self, data, offset):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        super().xWrite(data, offset)

left = -1
disk = Disk("killing", "unix")
store = DirectoryRoot(Path(sys.argv[1]), vfs="killing").open("alpha", StoreOptions())
left = int(sys.argv[3])
if sys.argv[2] == "rebuild":
    copying.rebuild(store._connection)
else:
    while store.apply([None, GiveBack(20), None], 1)[0]:
        pass
store.fold()
left = -1
store.close()
print("done")
"""


@pytest.mark.parametrize("what", ["slices", "rebuild"])
def test_a_kill_while_space_is_given_back(what: str, root: DirectoryRoot) -> None:
    """Killed in the middle of it, at any write, the job has all its rows, and it can be done again."""
    if what == "rebuild":
        of_an_earlier_release(root.path("alpha"))
    store = root.open("alpha", OPTIONS)
    fill(store, 400)
    before = dump(store)
    store.close()
    ends = set()
    for at in (1, 3, 8, 21, 55, 2_000):
        child = run_child(REBUILDING, root.directory, what, at)
        assert child.returncode in (0, -9), child.stderr[-2000:]
        ends.add(child.returncode)
        store = root.open("alpha", OPTIONS)
        assert dump(store) == before
        fill(store, 400)
        before = dump(store)
        store.close()
        assert look(root.path("alpha"), "PRAGMA integrity_check") == [("ok",)]
        if what == "rebuild" and child.returncode == 0:
            assert look(root.path("alpha"), "PRAGMA auto_vacuum") == [(2,)]
    assert ends == {0, -9}
