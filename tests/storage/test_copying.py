"""Copies of a job's file: whole, checked, of one moment; at their place or nowhere; and never beside another's log."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

from persistency.errors import Corrupt, DiskFull, Misuse, SchemaTooNew, StorageError, Unavailable
from persistency.storage import copying, files, schema
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import SetRow, StoreOptions
from persistency.testing import NOW_MS, dump, group, put
from tests.storage.conftest import FaultyDisk, contents, run_child

OPTIONS = StoreOptions()
KV_1 = (
    "CREATE TABLE kv (category BLOB NOT NULL, key BLOB NOT NULL, payload BLOB NOT NULL,"
    " PRIMARY KEY (category, key)) WITHOUT ROWID"
)
Dump = dict[bytes, Any]


def fill(root: DirectoryRoot, job_id: str, payload: bytes, rows: int = 40) -> Dump:
    """Make a job with rows of a payload, or write over its rows; close it and return what it holds."""
    store = root.open(job_id, OPTIONS)
    for at in range(rows):
        store.apply(group(put(b"c%d" % (at % 3), b"%03d" % at, payload)), NOW_MS)
    store.apply(group(SetRow(b"c0", b"ends", payload, NOW_MS * 2)), NOW_MS)
    held = dump(store)
    store.close()
    return held


def held(root: DirectoryRoot, job_id: str) -> Dump:
    """Open a job, return what it holds, and close it; its file must be sound."""
    store = root.open(job_id, OPTIONS)
    try:
        return dump(store)
    finally:
        store.close()
        assert ask(root.path(job_id), "PRAGMA integrity_check") == [("ok",)]


def ask(path: Path, sql: str) -> list[Any]:
    """Ask a file something with the standard library."""
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(sql).fetchall()


def back_up(path: Path, target: Path, vfs: str | None = None) -> list[tuple[int, int | None]]:
    """Back a file up, and return what was told of the progress."""
    return list(copying.back_up(path, target, vfs=vfs))


def restore(root: DirectoryRoot, source: Path, job_id: str, vfs: str | None = None) -> None:
    """Restore a job as whoever owns it does: what its lock file says of the old one no longer counts."""
    path = root.path(job_id)
    files.make_root(root.directory)
    claim = files.Claim(path)
    try:
        copying.restore(source, path, job_id, vfs=vfs)
    finally:
        claim.release()
        claim.path.unlink()


def names(directory: Path) -> list[str]:
    """Return the names in a directory, but for the locks."""
    return sorted(path.name for path in directory.iterdir() if path.suffix != ".lock")


def killed(place: Path, job_id: str, payload: bytes) -> DirectoryRoot:
    """Return a root with a job whose process was killed: half of its rows are in the log alone."""
    run_child(KILLED, place, job_id, payload.decode())
    root = DirectoryRoot(place)
    assert (root.path(job_id).with_name(root.path(job_id).name + "-wal")).stat().st_size > 10_000
    return root


KILLED = """
import os, signal, sys
from pathlib import Path
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import StoreOptions
store = DirectoryRoot(Path(sys.argv[1])).open(sys.argv[2], StoreOptions())
for at in range(40):
    store.apply([b"c%d" % (at % 3), b"%03d" % at, sys.argv[3].encode()], 1)
    if at == 20:
        store.checkpoint()
os.kill(os.getpid(), signal.SIGKILL)
"""


# -- backup ------------------------------------------------------------------------------------------------------


def test_a_backup_is_of_one_moment_and_stops_nobody(root: DirectoryRoot, place: Path) -> None:
    """A backup holds what the job held at its first step; the job writes on between all of them, waiting for none."""
    store = root.open("alpha", OPTIONS)
    for at in range(2_000):
        store.apply(group(put(b"c", b"%05d" % at, bytes([at % 256]) * 2_000)), NOW_MS)
    steps = copying.back_up(root.path("alpha"), place / "copy.db", vfs=None)
    told = [next(steps)]
    before = dump(store)
    before_writes = store.status().last_version
    for at, step in enumerate(steps):
        told.append(step)
        store.apply(group(put(b"c", b"%05d" % at, b"later"), put(b"c", b"new%d" % at, b"x" * 5_000)), NOW_MS)
        store.checkpoint()
    done = [step[0] for step in told]
    assert len(told) > 3
    assert done == sorted(done)
    assert told[-1] == (told[0][1], told[0][1])
    assert store.status().last_version == before_writes + 2 * (len(told) - 1)
    store.close()
    assert (place / "copy.db").stat().st_size == told[0][1]
    restore(root, place / "copy.db", "beta")
    assert held(root, "beta") == before


def test_a_backup_is_one_plain_file(root: DirectoryRoot, place: Path) -> None:
    """A backup needs no log and leaves none: mode 0600, marked as closed in order, read by any tool, no more."""
    store = root.open("alpha", OPTIONS)
    store.apply(group(put(b"c", b"k", b"v")), NOW_MS)
    umask = os.umask(0)
    try:
        (place / "kept").mkdir()
        back_up(root.path("alpha"), place / "kept" / "copy")
    finally:
        os.umask(umask)
    copy = place / "kept" / "copy"
    assert names(copy.parent) == ["copy"]
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert copy.read_bytes()[18:20] == b"\x01\x01"  # written without a log
    with closing(sqlite3.connect(f"{copy.as_uri()}?mode=ro", uri=True)) as connection:
        assert connection.execute("SELECT category, key, payload, version FROM kv").fetchall() == [
            (b"c", b"k", b"v", 1)
        ]
        meta = dict(connection.execute("SELECT name, value FROM meta"))
        assert names(copy.parent) == ["copy"]
    assert (meta["clean"], meta["last_version"], meta["job_id"]) == (1, 1, "alpha")
    assert store._execute("SELECT value FROM meta WHERE name = 'clean'").fetchall() == [(0,)]
    store.close()


def test_a_backup_takes_the_place_of_an_older_one(root: DirectoryRoot, place: Path) -> None:
    """The older backup stays until the new one is whole; another name of its file keeps it as it was."""
    fill(root, "alpha", b"old")
    back_up(root.path("alpha"), place / "copy")
    os.link(place / "copy", place / "yesterday")
    old = (place / "copy").read_bytes()
    new = fill(root, "alpha", b"new")
    steps = copying.back_up(root.path("alpha"), place / "copy")
    for _ in steps:
        assert (place / "copy").read_bytes() == old
    assert (place / "yesterday").read_bytes() == old
    restore(root, place / "copy", "beta")
    assert held(root, "beta") == new
    assert names(place) == ["copy", "root", "yesterday"]


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_backup_given_up_leaves_nothing(steps: int, root: DirectoryRoot, place: Path) -> None:
    """Closing the steps at any point takes the temporary file away, keeps the target, and lets go of the job's log."""
    store = root.open("alpha", OPTIONS)
    store.apply(group(put(b"c", b"k", bytes(3 * copying.STEP_PAGES * 4096))), NOW_MS)
    (place / "copy").write_bytes(b"older")
    backup = copying.back_up(root.path("alpha"), place / "copy")
    for _ in range(steps):
        next(backup)
        assert len(names(place)) == 3
    backup.close()
    assert names(place) == ["copy", "root"]
    assert (place / "copy").read_bytes() == b"older"
    store.settle()
    assert root.path("alpha").with_name("alpha.db-wal").stat().st_size == 0
    store.close()
    assert names(root.directory) == ["alpha.db"]


@pytest.mark.parametrize(
    "target", ["directory", "link", "dangling", "pipe", "nowhere/copy", "file/copy", "directory/..", ".", "x" * 256]
)
def test_no_backup_goes_where_no_file_can_be(target: str, root: DirectoryRoot, place: Path) -> None:
    """A directory, a link, a pipe or no directory at the target is refused at the first step, and nothing changes."""
    fill(root, "alpha", b"old")
    (place / "directory").mkdir()
    (place / "file").write_bytes(b"a file")
    (place / "link").symlink_to("file")
    (place / "dangling").symlink_to("nothing")
    os.mkfifo(place / "pipe")
    before = contents(place)
    with pytest.raises(Unavailable, match=r"can't|is a"):
        next(copying.back_up(root.path("alpha"), place / target))
    assert contents(place) == before


@pytest.mark.parametrize("target", ["nul\0", "lone\ud800", "no text \udcff"])
def test_what_is_no_path_is_misuse(target: str, root: DirectoryRoot, place: Path) -> None:
    """A path no file can have is `Misuse`, for a backup and for restoring."""
    fill(root, "alpha", b"old")
    before = contents(place)
    with pytest.raises(Misuse):
        copying.check_target(root.path("alpha"), place / target)
    with pytest.raises(Misuse):
        restore(root, place / target, "alpha")
    assert contents(place) == before


def test_no_backup_takes_the_place_of_a_jobs_file(root: DirectoryRoot, place: Path) -> None:
    """In the root itself no name is taken that is a job's or would be one where names ignore case; others are."""
    fill(root, "alpha", b"old")
    before = contents(place)
    (place / "way").symlink_to("root")
    for name in ("alpha.db", "beta.db", "ALPHA.DB", "alpha.db-wal", "beta.db-shm", "a.db-Journal", "alpha.lock"):
        for directory in (root.directory, place / "way", place / "root" / ".." / "root"):
            with pytest.raises(Misuse, match="another directory"):
                next(copying.back_up(root.path("alpha"), directory / name))
    (place / "way").unlink()
    assert contents(place) == before
    back_up(root.path("alpha"), root.directory / "alpha.db.bak")
    back_up(root.path("alpha"), place / "alpha.db")
    assert [job.job_id for job in root.stored()] == ["alpha"]


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_no_backup_takes_the_place_of_an_open_database(when: str, root: DirectoryRoot, place: Path) -> None:
    """A target with a log beside it is another root's open job, or was: replaced, it would be read with that log."""
    fill(root, "alpha", b"old")
    other = DirectoryRoot(place / "other")
    if when == "meanwhile":
        held_there = fill(other, "gamma", b"theirs")
        steps = copying.back_up(root.path("alpha"), other.path("gamma"))
        next(steps)
    store = other.open("gamma", OPTIONS)
    if when == "before":
        store.apply(group(put(b"c", b"k", b"theirs")), NOW_MS)
        held_there = dump(store)
        steps = copying.back_up(root.path("alpha"), other.path("gamma"))
    with pytest.raises(Unavailable, match="in use"):
        list(steps)
    store.close()
    assert held(other, "gamma") == held_there
    assert names(other.directory) == ["gamma.db"]


@pytest.mark.parametrize("name", ["a" * 255, "ü" * 127, "a backup of monday", "-x", ".hidden"])
def test_a_backup_has_any_name(name: str, root: DirectoryRoot, place: Path) -> None:
    """Any name that a file can have is one for a backup, the longest too."""
    new = fill(root, "alpha", b"new")
    back_up(root.path("alpha"), place / name)
    assert names(place) == sorted([name, "root"])
    restore(root, place / name, "beta")
    assert held(root, "beta") == new


def test_a_relative_target(root: DirectoryRoot, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is one from the current directory; the links on the way to a target are followed."""
    fill(root, "alpha", b"new")
    (place / "real").mkdir()
    (place / "way").symlink_to("real")
    monkeypatch.chdir(place)
    back_up(root.path("alpha"), Path("copy"))
    back_up(root.path("alpha"), Path("way/copy"))
    assert names(place) == ["copy", "real", "root", "way"]
    assert (place / "real" / "copy").read_bytes() == (place / "copy").read_bytes()


FORKED = """
import os, sys
from pathlib import Path
from persistency.storage import copying
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import StoreOptions
store = DirectoryRoot(Path(sys.argv[1])).open("alpha", StoreOptions())
store.apply([b"c", b"k", bytes(5 * copying.STEP_PAGES * 4096)], 1)
steps = copying.back_up(Path(sys.argv[1], "alpha.db"), Path(sys.argv[2]))
for at in range(3):
    next(steps)
    child = os.fork()
    if child == 0:
        steps.close()
        del steps
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
assert len(list(steps)) > 1
store.close()
"""


def test_a_forked_child_leaves_a_backup_alone(root: DirectoryRoot, place: Path) -> None:
    """What a forked child does with the steps it has inherited is nothing to its parent's backup."""
    child = run_child(FORKED, root.directory, place / "copy")
    assert child.returncode == 0, child.stderr[-2000:]
    assert ask(place / "copy", "SELECT length(payload) FROM kv") == [(5 * copying.STEP_PAGES * 4096,)]
    assert names(place) == ["copy", "root"]


def damage(path: Path) -> None:
    """Change a byte of a key: SQLite's own quick check doesn't see it."""
    data = bytearray(path.read_bytes())
    data[data.rindex(b"020old")] ^= 0x40
    path.write_bytes(data)
    assert ask(path, "PRAGMA quick_check") == [("ok",)]


def test_an_unsound_file_is_not_backed_up(root: DirectoryRoot, place: Path) -> None:
    """What isn't sound doesn't take the place of a backup that is: `Corrupt`, and nothing is left behind."""
    fill(root, "alpha", b"old")
    damage(root.path("alpha"))
    (place / "copy").write_bytes(b"older")
    with pytest.raises(Corrupt, match="sound"):
        back_up(root.path("alpha"), place / "copy")
    assert names(place) == ["copy", "root"]
    assert (place / "copy").read_bytes() == b"older"


LIMITED = """
import resource, signal, sys
from pathlib import Path
from persistency.errors import StorageError
from persistency.storage import copying
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    for done, total in copying.back_up(Path(sys.argv[1]), Path(sys.argv[2])):
        pass
except StorageError as error:
    print(type(error).__name__)
"""


def test_a_backup_past_a_limit_of_the_system(root: DirectoryRoot, place: Path) -> None:
    """A file size limit ends a backup with an error of ours; the job and the older backup are as they were."""
    fill(root, "alpha", bytes(50_000))
    (place / "copy").write_bytes(b"older")
    store = root.open("alpha", OPTIONS)
    before = contents(place)
    child = run_child(LIMITED, root.path("alpha"), place / "copy")
    assert (child.returncode, child.stdout) == (0, "StorageError\n"), child.stderr
    assert contents(place) == before
    store.close()


# -- restore -----------------------------------------------------------------------------------------------------


def test_a_job_is_restored(root: DirectoryRoot, place: Path) -> None:
    """A restored job is what it was when it was backed up, whole: nothing written since is there any more."""
    old = fill(root, "alpha", b"old")
    back_up(root.path("alpha"), place / "copy")
    copy = (place / "copy").read_bytes()
    fill(root, "alpha", b"new", rows=60)
    restore(root, place / "copy", "alpha")
    assert names(root.directory) == ["alpha.db"]
    assert stat.S_IMODE(root.path("alpha").stat().st_mode) == 0o600
    assert held(root, "alpha") == old
    assert (place / "copy").read_bytes() == copy
    assert names(place) == ["copy", "root"]


@pytest.mark.parametrize("job_id", ["beta", "Ünïcode/id", "x" * 190])
def test_a_backup_becomes_another_job(job_id: str, root: DirectoryRoot, place: Path) -> None:
    """A backup can be restored as another job, a new one or one that is there; it is that one's file from then on."""
    old = fill(root, "alpha", b"old")
    back_up(root.path("alpha"), place / "copy")
    for _ in range(2):
        restore(root, place / "copy", job_id)
        assert dict(ask(root.path(job_id), "SELECT name, value FROM meta"))["job_id"] == job_id
        assert held(root, job_id) == old
        fill(root, job_id, b"another")
    assert held(root, "alpha") == old


@pytest.mark.parametrize("state", ["as it was", "damaged", "gone", "empty"])
def test_no_stale_log_is_left_beside_a_restored_file(state: str, root: DirectoryRoot, place: Path) -> None:
    """The log of a killed process doesn't come back to life beside the restored file, whatever became of its own."""
    old = fill(root, "alpha", b"old")
    back_up(root.path("alpha"), place / "copy")
    there = killed(place / "there", "alpha", b"killed")
    path = there.path("alpha")
    # It would be read with that log, if it were put there by hand.
    shutil.copytree(there.directory, place / "byhand")
    shutil.copyfile(place / "copy", place / "byhand" / "alpha.db")
    assert ask(place / "byhand" / "alpha.db", "SELECT count(*) FROM kv WHERE payload = CAST('killed' AS BLOB)") != [
        (0,)
    ]
    if state == "damaged":
        path.write_bytes(b"\x55" * 8192)
    elif state == "gone":
        path.unlink()
    elif state == "empty":
        path.write_bytes(b"")
    restore(there, place / "copy", "alpha")
    assert names(there.directory) == ["alpha.db"]
    assert held(there, "alpha") == old


def test_a_live_job_is_a_source(root: DirectoryRoot, place: Path) -> None:
    """Another job's file in use can be restored from: what it has committed by then is there, and it goes on."""
    store = root.open("alpha", OPTIONS)
    store.apply(group(*[put(b"c", b"%d" % at, bytes(300)) for at in range(100)]), NOW_MS)
    there = DirectoryRoot(place / "there")
    for target, job_id in ((there, "alpha"), (root, "beta")):
        restore(target, root.path("alpha"), job_id)
        assert held(target, job_id) == dump(store)
        store.apply(group(put(b"c", b"more " + job_id.encode(), b"")), NOW_MS)
    store.close()
    assert len(held(root, "alpha")[b"c"]) == 102


def test_a_killed_processs_file_is_a_source(root: DirectoryRoot, place: Path) -> None:
    """A file with a log beside it is read with that log, though nobody has it open."""
    there = killed(place / "there", "alpha", b"killed")
    log = (there.directory / "alpha.db-wal").read_bytes()
    restore(root, there.path("alpha"), "alpha")
    assert (there.directory / "alpha.db-wal").read_bytes() == log
    assert {row.payload for rows in held(root, "alpha").values() for row in rows} == {b"killed"}
    assert sum(map(len, held(root, "alpha").values())) == 40
    assert held(there, "alpha") == held(root, "alpha")


def test_a_closed_file_is_read_as_it_lies_there(root: DirectoryRoot, place: Path) -> None:
    """Restoring from a closed job's file makes no log beside it, so that it can lie where nothing can be written."""
    old = fill(root, "alpha", b"old")
    before = contents(root.directory)
    there = DirectoryRoot(place / "there")
    restore(there, root.path("alpha"), "alpha")
    assert contents(root.directory) == before
    assert held(there, "alpha") == old


def test_a_source_that_changes_meanwhile(root: DirectoryRoot, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source somebody begins to write to meanwhile is no whole one: `Unavailable`, and the job is as it was."""
    fill(root, "alpha", b"old")
    back_up(root.path("alpha"), place / "copy")
    original = copying._copied
    before = contents(root.directory)

    def disturbed(source: apsw.Connection, copy: Path, vfs: str | None) -> copying.Steps:
        yield from original(source, copy, vfs)
        if disturbance == "log":
            (place / "copy-wal").touch()
        else:
            os.utime(place / "copy", ns=(1, 1))

    monkeypatch.setattr(copying, "_copied", disturbed)
    for disturbance in ("time", "log"):  # noqa: B007 - it is looked at in `disturbed`
        with pytest.raises(Unavailable, match="written to"):
            restore(root, place / "copy", "alpha")
        assert contents(root.directory) == before


def test_an_originals_file_is_restored(root: DirectoryRoot, place: Path) -> None:
    """A file of format 1 can be restored; it is migrated when the job is opened."""
    with closing(sqlite3.connect(place / "old")) as connection:
        connection.execute(KV_1)
        connection.execute("INSERT INTO kv VALUES (x'63', x'6b', x'76')")
        connection.execute("PRAGMA user_version = 1")
        connection.commit()
    fill(root, "alpha", b"new")
    restore(root, place / "old", "alpha")
    assert [(row.key, row.payload, row.version) for row in held(root, "alpha")[b"c"]] == [(b"k", b"v", 0)]
    assert ask(root.path("alpha"), "SELECT value FROM meta WHERE name = 'job_id'") == [("alpha",)]


def other_application(path: Path) -> None:
    """Write a database that isn't ours."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE users (id INTEGER PRIMARY KEY, name)")


def altered(statement: str) -> Callable[[Path], None]:
    """Return what makes a backup to which a statement was applied."""

    def make(path: Path) -> None:
        root = DirectoryRoot(path.parent / "made")
        fill(root, "alpha", b"old")
        back_up(root.path("alpha"), path)
        with closing(sqlite3.connect(path)) as connection:
            connection.execute(statement)
            connection.commit()

    return make


def spoilt(path: Path) -> None:
    """Make a backup with a key changed."""
    altered("SELECT 1")(path)
    damage(path)


def cut(path: Path) -> None:
    """Make a backup that lacks its last pages."""
    altered("SELECT 1")(path)
    os.truncate(path, 8192)


def linked(path: Path) -> None:
    """Make a link to a backup."""
    altered("SELECT 1")(path.with_name("real"))
    path.symlink_to("real")


SOURCES: dict[str, tuple[Callable[[Path], object], type[StorageError | SchemaTooNew]]] = {
    "nothing": (lambda path: None, Unavailable),
    "a directory": (Path.mkdir, Unavailable),
    "a pipe": (os.mkfifo, Unavailable),
    "a link": (linked, Unavailable),
    "an empty file": (Path.touch, Corrupt),
    "garbage": (lambda path: path.write_bytes(b"\x55" * 9000), Corrupt),
    "another application's": (other_application, Corrupt),
    "a newer release's": (altered("PRAGMA user_version = 3"), SchemaTooNew),
    "one with a trigger": (altered("CREATE TRIGGER t AFTER INSERT ON kv BEGIN DELETE FROM kv; END"), Corrupt),
    "one without a last version": (altered("DELETE FROM meta WHERE name = 'last_version'"), Corrupt),
    "one from beyond time": (altered("UPDATE meta SET value = 1 << 60 WHERE name = 'latest_ms'"), Corrupt),
    "a changed key": (spoilt, Corrupt),
    "a cut file": (cut, Corrupt),
}


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_no_backup_is_not_restored(source: str, root: DirectoryRoot, place: Path) -> None:
    """What isn't a sound file of ours is refused with the right error, and no byte of the job or of it has changed."""
    make, error = SOURCES[source]
    make(place / "source")
    new = fill(root, "alpha", b"new")
    before = contents(place)
    with pytest.raises(error):
        restore(root, place / "source", "alpha")
    assert contents(place) == before
    assert held(root, "alpha") == new


def test_a_job_is_not_restored_from_itself(root: DirectoryRoot) -> None:
    """Its own file is no backup of a job."""
    old = fill(root, "alpha", b"old")
    with pytest.raises(Misuse, match="own file"):
        restore(root, root.path("alpha"), "alpha")
    assert held(root, "alpha") == old


def foreign(path: Path) -> None:
    """Put another job's file in the place of this one's."""
    fill(DirectoryRoot(path.parent), "beta", b"theirs")
    path.with_name("beta.db").rename(path)


def newer(path: Path) -> None:
    """Put a newer release's file in the place of a job's."""
    altered("PRAGMA user_version = 3")(path)


@pytest.mark.parametrize("there", [other_application, foreign, newer, Path.mkdir, os.mkfifo, linked])
def test_what_is_not_the_jobs_is_not_replaced(
    there: Callable[[Path], object], root: DirectoryRoot, place: Path
) -> None:
    """What lies at the job's place and isn't its file is left as it is."""
    fill(root, "spare", b"old")
    back_up(root.path("spare"), place / "copy")
    there(root.path("alpha"))
    before = contents(place)
    with pytest.raises((Corrupt, SchemaTooNew, Unavailable)):
        restore(root, place / "copy", "alpha")
    assert contents(place) == before


@pytest.mark.parametrize("damage_done", ["garbage", "cut", "first page", "one byte"])
def test_a_damaged_job_is_replaced(damage_done: str, root: DirectoryRoot, place: Path) -> None:
    """Restoring is what a damaged job is in need of: its file may be as damaged as can be."""
    old = fill(root, "alpha", b"old")
    back_up(root.path("alpha"), place / "copy")
    path = root.path("alpha")
    if damage_done == "cut":
        os.truncate(path, 6_000)
    else:
        data = bytearray(path.read_bytes())
        extent = {"garbage": len(data), "first page": 4096, "one byte": 1}[damage_done]
        data[:extent] = b"\xaa" * extent
        path.write_bytes(data)
    with pytest.raises(Corrupt):
        root.open("alpha", OPTIONS)
    restore(root, place / "copy", "alpha")
    assert held(root, "alpha") == old


@pytest.mark.parametrize("operation", ["read", "write", "sync"])
def test_a_job_that_cannot_be_read_is_replaced(
    operation: str, place: Path, disk: FaultyDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A medium that can't read the old file any more is no reason not to replace it; one that can't write is."""
    old = fill(DirectoryRoot(place / "spare"), "alpha", b"old")
    back_up(place / "spare" / "alpha.db", place / "copy")
    root = DirectoryRoot(killed(place / "root", "alpha", b"killed").directory, disk.name)
    original = copying._fold

    def failing(*arguments: Any) -> None:
        disk.arm(operation, 1, CODES[operation], sticky=True)
        try:
            original(*arguments)
        finally:
            assert disk.fired
            disk.disarm()

    monkeypatch.setattr(copying, "_fold", failing)
    if operation == "read":
        restore(root, place / "copy", "alpha", disk.name)
        assert held(root, "alpha") == old
    else:
        with pytest.raises(StorageError):
            restore(root, place / "copy", "alpha", disk.name)
        assert {row.payload for rows in held(root, "alpha").values() for row in rows} == {b"killed"}


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_job_that_is_being_read_is_not_replaced(
    snapshot: bool, root: DirectoryRoot, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While somebody has the job's file open its log can't be cleared away: `Unavailable`, and the job is as it was."""
    monkeypatch.setattr(schema, "BUSY_MS", 10)
    new = fill(root, "alpha", b"new")
    back_up(root.path("alpha"), place / "copy")
    reader = apsw.Connection(str(root.path("alpha")), flags=apsw.SQLITE_OPEN_READONLY)
    if snapshot:
        reader.execute("BEGIN")
    assert reader.execute("SELECT count(*) FROM kv").fetchall() == [(41,)]
    fill(root, "alpha", b"new")
    with pytest.raises(Unavailable):
        restore(root, place / "copy", "alpha")
    reader.close()
    assert {row.payload for rows in held(root, "alpha").values() for row in rows} == {b"new"}
    restore(root, place / "copy", "alpha")
    assert held(root, "alpha") == new


def test_killed_attempts_are_cleared_away(root: DirectoryRoot, place: Path) -> None:
    """The next attempt to restore a job deletes what killed ones have left, and nothing that isn't such."""
    fill(root, "alpha", b"old")
    back_up(root.path("alpha"), place / "copy")
    left = [".alpha.db.0123456789abcdef.tmp", ".alpha.db.0123456789abcdef.tmp-wal"]
    others = [".alpha.db.123.tmp", ".beta.db.0123456789abcdef.tmp", "alpha.db.0123456789abcdef.tmp"]
    others += [".alphaxdb.0123456789abcdef.tmp"]
    for name in left + others:
        (root.directory / name).touch()
    restore(root, place / "copy", "alpha")
    assert names(root.directory) == sorted(["alpha.db", *others])


# -- faults at every step ----------------------------------------------------------------------------------------


class FaultySystem:
    """Lets the `at`-th call of one of the system's functions fail with `code`; counts those there were."""

    NAMES = ("open", "fsync", "replace", "unlink", "lstat", "listdir")

    def __init__(self, at: int, code: int) -> None:
        self.at, self.code = at, code
        self.fired = ""

    @contextmanager
    def failing(self) -> Iterator[None]:
        """Have them fail while the body runs."""
        with pytest.MonkeyPatch.context() as patch:
            for name in self.NAMES:
                patch.setattr(os, name, self._counted(name, getattr(os, name)))
            yield

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            self.at -= 1
            if self.at == 0:
                self.fired = name
                raise OSError(self.code, os.strerror(self.code))
            return original(*arguments, **options)

        return call


CODES = {
    "read": apsw.SQLITE_IOERR_READ,
    "write": apsw.SQLITE_IOERR_WRITE,
    "sync": apsw.SQLITE_IOERR_FSYNC,
    "full": apsw.SQLITE_FULL,
}


def disk_faults(disk: FaultyDisk, do: Callable[[], object]) -> Iterator[tuple[str, StorageError | None]]:
    """Let every n-th operation on files fail, once and from then on, until none is left; give what came of each."""
    for kind, code in CODES.items():
        for sticky in (False, True):
            for at in range(1, 1_000):
                disk.arm("write" if kind == "full" else kind, at, code, sticky=sticky)
                failed = None
                try:
                    do()
                except StorageError as error:
                    failed = error
                fired = disk.fired
                disk.disarm()
                yield kind, failed
                if not fired:
                    break
            else:
                pytest.fail("never a clean run")


def system_faults(do: Callable[[], object]) -> Iterator[tuple[str, StorageError | None]]:
    """Let every n-th call of the system fail, until none is left; give which it was, and what came of it."""
    for code, kind in ((errno.ENOSPC, DiskFull), (errno.EIO, Unavailable)):
        for at in range(1, 1_000):
            system = FaultySystem(at, code)
            failed = None
            with system.failing():
                try:
                    do()
                except StorageError as error:
                    failed = error
                    assert type(error) is kind or system.fired in ("lstat", "open", "listdir"), system.fired
            yield system.fired, failed
            if not system.fired:
                break
        else:
            pytest.fail("never a clean run")


@contextmanager
def noting(path: Path) -> Iterator[list[str]]:
    """Give the list of what is synced, removed and put in its place in the directory of a path, in order."""
    done: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        fsync, replace, unlink = os.fsync, os.replace, os.unlink

        def synced(handle: int) -> None:
            fsync(handle)
            found = os.fstat(handle)
            done.append("sync the directory" if os.path.samestat(found, path.parent.stat()) else "sync the copy")

        def replaced(source: Path, target: Path) -> None:
            replace(source, target)
            done.append(f"put {target.name} there")

        def removed(file: Path) -> None:
            there = file.exists()
            unlink(file)
            if there:
                done.append(f"remove {file.name}")

        for name, call in (("fsync", synced), ("replace", replaced), ("unlink", removed)):
            patch.setattr(os, name, call)
        yield done


def test_what_is_synced_and_when(root: DirectoryRoot, place: Path) -> None:
    """A copy is on the medium before it is put in its place, that no log lies there too; and then that it was."""
    fill(root, "alpha", b"old")
    with noting(place / "copy") as done:
        back_up(root.path("alpha"), place / "copy")
    assert done == ["sync the copy", "put copy there", "sync the directory"]
    path = root.path("alpha")
    path.write_bytes(b"\x55" * 8192)
    for beside in files.sidecars(path):
        beside.write_bytes(b"stale")
    with noting(path) as done:
        copying.restore(place / "copy", path, "alpha")
    assert done == [
        "sync the copy",
        *(f"remove {beside.name}" for beside in files.sidecars(path)),
        "sync the directory",
        "put alpha.db there",
        "sync the directory",
    ]


def test_any_fault_leaves_an_older_backup_or_a_new_one(disk: FaultyDisk, place: Path) -> None:
    """Whichever read, write or sync fails in a backup, the target is the old one or a new one, nothing is left."""
    root = DirectoryRoot(place / "root", vfs=disk.name)
    fill(root, "alpha", b"old", rows=6)
    copy, spare = place / "copy", place / "spare"
    back_up(root.path("alpha"), spare)
    old = spare.read_bytes()
    new = fill(root, "alpha", b"new", rows=6)
    outcomes = set()
    for kind, failed in disk_faults(disk, lambda: back_up(root.path("alpha"), copy, disk.name)):
        outcomes.add((kind, type(failed)))
        assert names(place) == (["copy", "root", "spare"] if copy.exists() else ["root", "spare"])
        if failed is None:
            assert ask(copy, "SELECT DISTINCT payload FROM kv") == [(b"new",)]
        else:
            assert not copy.exists() or copy.read_bytes() == old
        shutil.copyfile(spare, copy)
        assert "not an error" not in str(failed)
    assert ("full", DiskFull) in outcomes
    assert ("read", StorageError) in outcomes
    assert ("write", StorageError) in outcomes
    assert held(root, "alpha") == new


def test_any_refusal_leaves_an_older_backup_or_a_new_one(root: DirectoryRoot, place: Path) -> None:
    """Whatever the system refuses in a backup, the target is the old one or a whole new one, and nothing is left."""
    fill(root, "alpha", b"old", rows=6)
    copy, spare = place / "copy", place / "spare"
    back_up(root.path("alpha"), spare)
    old = spare.read_bytes()
    fill(root, "alpha", b"new", rows=6)
    shutil.copyfile(spare, copy)
    fired = set()
    for name, failed in system_faults(lambda: back_up(root.path("alpha"), copy)):
        fired.add(name)
        assert names(place) == ["copy", "root", "spare"]
        if copy.read_bytes() != old:
            # Only what comes last, the sync of the directory, fails after the new one is in its place.
            assert failed is None or name in ("fsync", "open")
            assert ask(copy, "SELECT DISTINCT payload FROM kv") == [(b"new",)]
        else:
            assert failed is not None
        shutil.copyfile(spare, copy)
    assert fired >= {"open", "fsync", "replace", "lstat", ""}


class Restoring:
    """A root with a job of new rows, left by a killed process, and a backup of old ones; made anew for every try."""

    def __init__(self, place: Path, vfs: str | None = None) -> None:
        spare = DirectoryRoot(place / "spare")
        self.old = fill(spare, "alpha", b"old", rows=6)
        self.copy = place / "copy"
        back_up(spare.path("alpha"), self.copy)
        self.made = killed(place / "made", "alpha", b"killed").directory
        self.root = DirectoryRoot(place / "root", vfs)
        self.renew()
        self.new = held(self.root, "alpha")
        self.renew()
        self.vfs = vfs

    def renew(self) -> None:
        """Put the killed job there again."""
        shutil.rmtree(self.root.directory, ignore_errors=True)
        shutil.copytree(self.made, self.root.directory)

    def restore(self) -> None:
        """Try to restore the job."""
        restore(self.root, self.copy, "alpha", self.vfs)

    def outcome(self) -> str:
        """Say which of the two jobs is there; it must be one of them, whole."""
        found = held(self.root, "alpha")
        assert found in (self.old, self.new)
        return "old" if found == self.new else "new"


def test_any_fault_leaves_the_old_job_or_the_restored_one(disk: FaultyDisk, place: Path) -> None:
    """Whichever read, write or sync fails in restoring, the job is what it was, its log included, or the other."""
    case = Restoring(place, disk.name)
    outcomes = set()
    for kind, failed in disk_faults(disk, case.restore):
        left = [name for name in names(case.root.directory) if name.endswith(".tmp")]
        outcome = case.outcome()
        assert not left
        assert outcome == ("new" if failed is None else "old")
        outcomes.add((kind, outcome))
        case.renew()
    assert outcomes == {(kind, outcome) for kind in CODES for outcome in ("old", "new")}


def test_any_refusal_leaves_the_old_job_or_the_restored_one(place: Path) -> None:
    """Whatever the system refuses in restoring, the job is what it was, its log included, or the other, whole."""
    case = Restoring(place)
    path, fired = case.root.path("alpha"), set()
    for name, failed in system_faults(lambda: copying.restore(case.copy, path, "alpha")):
        (case.root.directory / "alpha.lock").unlink()
        fired.add((name, outcome := case.outcome()))
        assert names(case.root.directory) == ["alpha.db"]
        assert (outcome == "new") == (failed is None) or (outcome, name) in (("new", "fsync"), ("new", "open"))
        case.renew()
    assert fired >= {("unlink", "old"), ("replace", "old"), ("fsync", "old"), ("fsync", "new"), ("", "new")}


# Does something over and over, in a child that is killed before its n-th change to any file, until one comes through.
KILLING = """
import os, shutil, signal, sys
from pathlib import Path
import apsw
from persistency.storage import copying
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import StoreOptions
from persistency.testing import dump

what, made, place, copy = sys.argv[1], *map(Path, sys.argv[2:5])
left = None

def step():
    global left
    if left is not None:
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def stepping(call):
    def stepped(*arguments, **options):
        step()
        return call(*arguments, **options)
    return stepped

class Disk(apsw.VFS):
    def xOpen(self, name, flags):
        step()
        return File("unix", name, flags)
    def xDelete(self, name, sync):
        step()
        super().xDelete(name, sync)

class File(apsw.VFSFile):
    def xWrite(self, data, offset):
        step()
        super().xWrite(data, offset)
    def xTruncate(self, size):
        step()
        super().xTruncate(size)
    def xSync(self, flags):
        step()
        super().xSync(flags)

disk = Disk("killing", "unix")
for name in ("open", "fsync", "replace", "unlink"):
    setattr(os, name, stepping(getattr(os, name)))
root = DirectoryRoot(place)
path = place / "alpha.db"
target = place.parent / "target"
for at in range(1, 10_000):
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(made, place)
    shutil.copyfile(copy, target)
    child = os.fork()
    if child == 0:
        left = at
        if what == "restore":
            copying.restore(copy, path, "alpha", vfs="killing")
        else:
            for _ in copying.back_up(path, target, vfs="killing"):
                pass
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if what == "back_up":
        shutil.rmtree(place)
        copying.restore(target, path, "alpha") if place.mkdir() is None else None
    (place / "alpha.lock").unlink(missing_ok=True)
    store = root.open("alpha", StoreOptions())
    payloads = {row.payload for rows in dump(store).values() for row in rows}
    count = sum(map(len, dump(store).values()))
    store.close()
    assert (payloads, count) in (({b"old"}, 7), ({b"killed"}, 40)), (at, payloads, count)
    print("old" if payloads == {b"old"} else "killed", "done" if status == 0 else "killed", flush=True)
    if status == 0:
        break
    if what == "restore" and at % 7 == 0:
        copying.restore(copy, path, "alpha")
        assert sorted(os.listdir(place)) == ["alpha.db", "alpha.lock"], os.listdir(place)
"""


@pytest.mark.parametrize("what", ["restore", "back_up"])
def test_a_kill_at_any_moment(what: str, place: Path) -> None:
    """Killed before any change to a file, restoring leaves the old job or the new one whole; so does a backup."""
    spare = DirectoryRoot(place / "spare")
    fill(spare, "alpha", b"old", rows=6)
    back_up(spare.path("alpha"), place / "copy")
    made = killed(place / "made", "alpha", b"killed").directory
    child = run_child(KILLING, what, made, place / "root", place / "copy")
    assert child.returncode == 0, (child.stdout[-300:], child.stderr[-3000:])
    before, after = ("killed", "old") if what == "restore" else ("old", "killed")
    said = [line.split() for line in child.stdout.splitlines()]
    outcomes = [outcome for outcome, _ in said]
    assert len(said) > 30
    assert [how for _, how in said] == ["killed"] * (len(said) - 1) + ["done"]
    # Once it is in its place it stays there.
    assert outcomes == sorted(outcomes, key=[before, after].index)
    assert outcomes.count(before) > 20
    assert outcomes.count(after) > 1
