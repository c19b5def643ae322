"""A job that is dropped, made anew or restored at the very moment somebody opens its file to read it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest

from persistency.errors import JobNotFound, Unavailable
from persistency.storage import checking, copying, files, openings, schema
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import GetRow, ScanRange, StoreOptions
from persistency.storage.reading import SqliteReader
from persistency.testing import group, put
from tests.storage.test_checking import check
from tests.storage.test_reading import Child, child  # noqa: F401  # a fixture

NOW_MS = 1_000
ROWS = 50
EVERYTHING = ScanRange(b"c", b"", None)


class Disk(apsw.VFS):
    """A file system that calls somebody when a log was opened, once."""

    NAME = "told"

    def __init__(self, opened: Callable[[], object]) -> None:
        super().__init__(self.NAME, base="")
        self.opened: Callable[[], object] | None = opened

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802  # SQLite's name
        """Open a file."""
        file = apsw.VFSFile("", name, flags)
        if flags[0] & apsw.SQLITE_OPEN_WAL and self.opened is not None:
            opened, self.opened = self.opened, None
            opened()
        return file


class Watched:
    """The lock of all files, which says when somebody has to wait for it."""

    def __init__(self) -> None:
        self.waited = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.waited.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@pytest.fixture
def root(tmp_path: Path) -> DirectoryRoot:
    """A root with a job of 50 rows of "x" in it."""
    root = DirectoryRoot(tmp_path)
    store = root.open("alpha", StoreOptions())
    for at in range(ROWS):
        store.apply(group(put(b"c", b"%d" % at, b"x")), NOW_MS)
    store.close()
    return root


@pytest.fixture
def locks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    """The lock that stands for all of them."""
    watched = Watched()
    monkeypatch.setattr(openings, "_locks", [watched] * openings._LOCKS_COUNT)
    yield watched
    with watched:
        pass  # nobody has kept it


def full_log(root: DirectoryRoot) -> apsw.Connection:
    """Leave the job's log beside its file, full, and return what keeps it there: somebody in the middle of a read."""
    store = root.open("alpha", StoreOptions())
    connection = schema.open_file(root.path("alpha"))
    for at in range(ROWS):
        if at == ROWS - 1:
            connection.execute("BEGIN; SELECT count(*) FROM kv")
        store.apply(group(put(b"c", b"%d" % at, b"x")), NOW_MS)
    store.close()
    assert (files.size(files.sidecars(root.path("alpha"))[0]) or 0) > 0
    return connection


def write_twice(root: DirectoryRoot, between: Callable[[], object] = lambda: None) -> None:
    """Write 100 rows of "y", each a commit; they must be there, in a sound file, before it is closed and after."""
    store = root.open("alpha", StoreOptions())
    for at in range(2 * ROWS):
        store.apply(group(put(b"c", b"%d" % at, b"y")), NOW_MS)
    between()
    for _ in range(2):
        assert [payload for _, payload in store.scan(EVERYTHING, NOW_MS)] == [b"y"] * 2 * ROWS
        store.close()
        assert check(root.path("alpha")) == []
        store = root.open("alpha", StoreOptions())
    store.close()


def beside(locks: Watched, act: Callable[[Callable[[], None]], None]) -> tuple[Callable[[], None], Callable[[], None]]:
    """Return how to begin something in a thread, until it waits for a lock or as far as it gets, and how to end it.

    `act` is told what to call where it has come as far as it could without waiting.
    """
    wrong: list[BaseException] = []
    over = threading.Event()

    def as_far_as_it_gets() -> None:
        locks.waited.set()
        assert over.wait(60)

    def run() -> None:
        try:
            act(as_far_as_it_gets)
        except BaseException as error:
            wrong.append(error)
            locks.waited.set()

    thread = threading.Thread(target=run)

    def begin() -> None:
        thread.start()
        assert locks.waited.wait(60)

    def end() -> None:
        over.set()
        thread.join(60)
        assert not thread.is_alive()
        if wrong:
            raise wrong[0]

    return begin, end


def read_file(root: DirectoryRoot, vfs: str) -> None:
    """Open a reader."""
    SqliteReader(root.path("alpha"), "alpha", vfs=vfs).close()


def check_file(root: DirectoryRoot, vfs: str) -> None:
    """Check the file."""
    check(root.path("alpha"), vfs)


def back_file_up(root: DirectoryRoot, vfs: str) -> None:
    """Back the file up."""
    for _ in copying.back_up(root.path("alpha"), root.directory / "another", vfs=vfs):
        pass


@pytest.mark.parametrize("look", [read_file, check_file, back_file_up])
def test_a_job_that_is_made_anew_while_somebody_opens_it(
    root: DirectoryRoot, locks: Watched, look: Callable[[DirectoryRoot, str], None]
) -> None:
    """Whoever drops it waits until the other one has its log's index; the new file's is nobody else's."""
    keeper = full_log(root)

    def make_anew(as_far_as_it_gets: Callable[[], None]) -> None:
        root.drop("alpha")
        write_twice(root, as_far_as_it_gets)

    begin, end = beside(locks, make_anew)
    disk = Disk(lambda: (keeper.close(), begin()))
    with contextlib.suppress(JobNotFound, Unavailable):  # who is told in time
        look(root, disk.NAME)
    assert disk.opened is None
    end()


def test_a_job_that_is_restored_while_a_reader_opens_it(root: DirectoryRoot, locks: Watched) -> None:
    """Whoever restores it waits, too, and then finds it being read."""
    back_up(root)
    keeper = full_log(root)
    begin, end = beside(locks, lambda _: root.restore("alpha", root.directory / "backup"))
    disk = Disk(lambda: (keeper.close(), begin()))
    reader = SqliteReader(root.path("alpha"), "alpha", vfs=disk.NAME)
    assert disk.opened is None
    with pytest.raises(Unavailable, match="is being read"):
        end()
    assert reader.get(b"c", b"1", NOW_MS) == b"x"
    reader.close()


def test_a_job_that_is_made_anew_while_a_reader_finds_that_it_has_a_log_by_now(
    root: DirectoryRoot, locks: Watched
) -> None:
    """A restored file keeps no log until its owner opens it: who has begun to read it before looks for it then."""
    back_up(root)
    root.restore("alpha", root.directory / "backup")
    began: list[Callable[[], None]] = []
    disk = Disk(lambda: began.pop()())
    reader = SqliteReader(root.path("alpha"), "alpha", vfs=disk.NAME)
    assert reader.get(b"c", b"1", NOW_MS) == b"x"
    store = root.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"1", b"z")), NOW_MS)

    def make_anew(as_far_as_it_gets: Callable[[], None]) -> None:
        root.drop("alpha")
        write_twice(root, as_far_as_it_gets)

    begin, end = beside(locks, make_anew)
    began.append(lambda: (store.close(), begin())[1])
    with contextlib.suppress(JobNotFound, Unavailable):
        assert reader.get(b"c", b"1", NOW_MS) in (b"x", b"z")
    assert disk.opened is None
    end()
    reader.close()


def test_a_job_that_is_dropped_in_the_middle_of_another_drop(root: DirectoryRoot) -> None:
    """A signal handler, or `__del__`, may drop one whose lock this thread has already."""
    with openings.undisturbed(root.path("alpha")):
        assert root.drop("alpha") != []


def test_a_job_that_is_dropped_while_it_is_backed_up_or_checked(root: DirectoryRoot) -> None:
    """Its log is gone, and what is missing in the middle of the work is told as what it is."""
    for look in (lambda: copying.back_up(root.path("alpha"), root.directory / "another"), lambda: checking_of(root)):
        store = root.open("alpha", StoreOptions())
        for at in range(ROWS):
            store.apply(group(put(b"c", b"%d" % at, b"x" * 50_000)), NOW_MS)
        steps = look()
        next(steps)
        store.close()
        root.drop("alpha")
        with pytest.raises(Unavailable, match="was removed or replaced while it was"):
            for _ in steps:
                pass


def checking_of(root: DirectoryRoot) -> Iterator[Any]:
    """Check the file, a step at a time."""
    return checking.check(root.path("alpha"))


def back_up(root: DirectoryRoot) -> None:
    """Make a backup of the job."""
    for _ in copying.back_up(root.path("alpha"), root.directory / "backup"):
        pass


OPENING = """
import apsw
from persistency.storage.snapshots import Snapshots
opened, go_on, looked, end = [threading.Event() for _ in range(4)]
class Disk(apsw.VFS):
    def __init__(self):
        super().__init__("slow", base="")
    def xOpen(self, name, flags):
        file = apsw.VFSFile("", name, flags)
        if flags[0] & apsw.SQLITE_OPEN_WAL and not opened.is_set():
            opened.set()
            go_on.wait(60)
        return file
disk = Disk()
look = Snapshots.look
def look_long(*args):
    try:
        return look(*args)
    finally:
        looked.set()
        end.wait(60)
Snapshots.look = look_long
said = []
def read():
    try:
        SqliteReader(Path(path), "alpha", vfs="slow").close()
        said.append("read")
    except PersistencyError as error:
        said.append(type(error).__name__)
thread = threading.Thread(target=read)
thread.start()
assert opened.wait(60)
"""


def test_a_job_that_is_made_anew_while_another_process_opens_it(
    root: DirectoryRoot,
    child: Child,  # noqa: F811  # the fixture
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reader has opened the log of a job that is dropped, and makes the next one's index: of an empty log."""
    keeper = full_log(root)
    child.ask(f"path = {str(root.path('alpha'))!r}")
    child.ask(OPENING)
    keeper.close()
    with files.sidecars(root.path("alpha"))[0].open("rb") as log:
        root.drop("alpha")
        assert log.read() == b""
    prepare = files.prepare

    def prepare_late(path: Path) -> bool:
        made = prepare(path)
        assert child.ask("go_on.set() or looked.wait(60)")  # here it makes the index
        return made

    monkeypatch.setattr(files, "prepare", prepare_late)
    store = root.open("alpha", StoreOptions())
    monkeypatch.undo()
    store.close()
    write_twice(root)
    assert child.ask("end.set() or thread.join(60) or said") == ["read"]  # what is there by then


def test_a_job_that_is_dropped_while_it_is_read(root: DirectoryRoot) -> None:
    """A reader in the middle of its answer says that the job is gone, not that its log ends too soon."""
    store = root.open("alpha", StoreOptions())
    reader = SqliteReader(root.path("alpha"), "alpha")
    for at in range(ROWS):
        store.apply(group(put(b"c", b"%d" % at, b"x" * 5_000)), NOW_MS)

    def dropped_meanwhile(snapshots: Any) -> Any:
        assert snapshots.answer(GetRow(b"c", b"1")) == b"x" * 5_000
        store.close()
        root.drop("alpha")
        return snapshots.answer(EVERYTHING)

    with pytest.raises(Unavailable, match="its file was removed"):
        reader._ask(dropped_meanwhile, NOW_MS)
    reader.close()
