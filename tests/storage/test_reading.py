"""The read-only SQLite store: the owner's own answers, nothing held between calls, and what becomes of the file."""

from __future__ import annotations

import ast
import json
import os
import random
import shutil
import sqlite3
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest

from persistency.errors import (
    Closed,
    Corrupt,
    FeedTruncated,
    Forked,
    JobNotFound,
    Misuse,
    SchemaTooNew,
    StorageError,
    Unavailable,
)
from persistency.storage import reading, schema, snapshots
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import (
    CountRange,
    DropRange,
    DropRow,
    Failed,
    GetEntry,
    GetRow,
    GetRows,
    HasRow,
    LastVersion,
    ListCategories,
    ListChanges,
    ListEntries,
    ScanRange,
    SetRow,
    StoreOptions,
    SwapRow,
    TouchRow,
    UsedBytes,
)
from persistency.storage.reading import SqliteReader
from persistency.storage.snapshots import Snapshots
from persistency.storage.sqlite import SqliteStore
from persistency.testing import batch, group, put
from tests.storage.conftest import FaultyDisk, child_environment, contents, run_child
from tests.storage.test_hostile_files import ATTACK, MAKE

NOW_MS = 1_000
NOBODY = 65534  # the user id that the system keeps for nobody


class Child:
    """Another process that runs Python code sent to it, a piece at a time, and answers each piece."""

    CODE = """
import ast, json, os, signal, sys, threading
from pathlib import Path
import persistency.testing
from persistency import *
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import *
from persistency.storage.reading import SqliteReader
names = dict(globals())
for line in sys.stdin:
    code = json.loads(line)
    try:
        try:
            answer = eval(compile(code, "<told>", "eval"), names)
        except SyntaxError:
            answer = exec(compile(code, "<told>", "exec"), names)
        said = {"answer": repr(answer)}
    except BaseException as error:
        said = {"error": type(error).__name__, "text": str(error), "hint": getattr(error, "hint", "")}
    print(json.dumps(said), flush=True)
"""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.CODE],
            env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def tell(self, code: str) -> None:
        """Have a piece of code run; its answer is to be fetched with `answer`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(code) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return what came of the code told first among those not answered."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"the child died, {self._process.wait(10)}"
        said: dict[str, Any] = json.loads(line)
        return said

    def ask(self, code: str) -> Any:
        """Run code and return the value of its expression, of plain types; it must not fail."""
        self.tell(code)
        said = self.answer()
        assert "error" not in said, said
        return ast.literal_eval(said["answer"])

    def error(self, code: str) -> tuple[str, str]:
        """Run code that must fail; return the kind of its error, and what it says with its hint."""
        self.tell(code)
        said = self.answer()
        assert "error" in said, said
        return said["error"], said["text"] + " " + said["hint"]

    def kill(self) -> None:
        """End it as `kill -9` does, and wait until it is gone."""
        self._process.kill()
        self._process.communicate(timeout=30)

    def end(self) -> None:
        """Let it come to its own end."""
        _, _ = self._process.communicate(timeout=60)
        assert self._process.returncode == 0


@pytest.fixture
def child() -> Iterator[Child]:
    """Another process."""
    made = Child()
    yield made
    made.kill()


@pytest.fixture
def owner(root: DirectoryRoot) -> Iterator[SqliteStore]:
    """The store of job "alpha", open in this process, after one group."""
    opened = root.open("alpha", StoreOptions())
    opened.apply(group(put(b"c", b"k", b"1"), put(b"d", b"k", b"2")), NOW_MS)
    yield opened
    if opened._connection:  # some tests close it themselves
        opened.close()


@pytest.fixture
def reader(owner: SqliteStore, root: DirectoryRoot) -> Iterator[SqliteReader]:
    """A reader of job "alpha"."""
    opened = SqliteReader(root.path("alpha"), "alpha", NOW_MS)
    yield opened
    opened.close()


def outcome(store: SqliteStore | SqliteReader, message: Any, now_ms: int) -> Any:
    """Return a store's answer, with an error as a value that can be compared."""
    answer = store.read(message, now_ms)
    if type(answer) is Failed:
        return type(answer.error), getattr(answer.error, "oldest", None)
    return answer


QUESTIONS = [
    GetRow(b"c", b"k"),
    GetRow(b"c", b"none"),
    HasRow(b"c", b"k"),
    GetEntry(b"c", b"k"),
    GetRows(b"c", (b"z", b"k", b"none")),
    ScanRange(b"c", b"", None),
    ScanRange(b"c", b"", None, keys_only=True, reverse=True, limit=1),
    CountRange(b"c", b"", None),
    ListCategories(),
    ListEntries(b"c"),
    UsedBytes(),
    LastVersion(),
]


# -- the owner's answers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("feed_changes_max", [0, 7])
@pytest.mark.parametrize("max_bytes", [None, 2_000])
def test_a_reader_answers_as_the_owner_does(root: DirectoryRoot, max_bytes: int | None, feed_changes_max: int) -> None:
    """After every group of a random history, whatever is asked, at whatever time, gets the owner's answer."""
    seed = random.randrange(2**32)
    print("seed", seed)
    chance = random.Random(seed)
    options = StoreOptions(max_bytes=max_bytes, feed_changes_max=feed_changes_max)
    owner = root.open("alpha", options)
    reader = SqliteReader(root.path("alpha"), "alpha")
    now_ms = NOW_MS
    for _ in range(150):
        owner.apply(group(*(_any_write(chance, now_ms) for _ in range(chance.randrange(4)))), now_ms)
        now_ms += chance.choice([0, 0, 1, 50])
        if chance.random() < 0.2:
            owner.reap(now_ms, 3)
        if chance.random() < 0.1:
            owner.checkpoint()
        if chance.random() < 0.05:
            owner.close()
            owner = root.open("alpha", options)
        for question in [_any_question(chance) for _ in range(8)]:
            if type(question) is ListChanges and not feed_changes_max:
                continue  # the owner says so in other words
            assert outcome(reader, question, now_ms) == outcome(owner, question, now_ms), (seed, question)
        asked = group(*(_any_question(chance) for _ in range(4)))
        told = [type(answer.error) if type(answer) is Failed else answer for answer in reader.apply(asked, now_ms)]
        assert told == [
            type(answer.error) if type(answer) is Failed else answer for answer in owner.apply(asked, now_ms)
        ]
        assert reader.status().last_version == owner.status().last_version
    reader.close()
    owner.close()


def _any_key(chance: random.Random) -> bytes:
    return chance.choice([b"", b"a", b"b", b"b\x00", b"bb", b"c", b"\xff"])


def _any_write(chance: random.Random, now_ms: int) -> Any:
    category, key = chance.choice([b"c", b"d", b"e"]), _any_key(chance)
    payload = chance.randbytes(chance.choice([0, 1, 30, 300]))
    end = chance.choice([None, now_ms + 1, now_ms + chance.randrange(200)])
    return chance.choice(
        [
            put(category, key, payload),
            SetRow(category, key, payload, end),
            DropRow(category, key),
            DropRange(category, key, chance.choice([None, b"c"])),
            SwapRow(category, key, None, payload, end),
            TouchRow(category, key, end),
            batch(put(category, key, payload), put(b"d", b"a", payload)),
        ]
    )


def _any_question(chance: random.Random) -> Any:
    category, key, stop = chance.choice([b"c", b"d", b"x"]), _any_key(chance), chance.choice([None, b"bb"])
    return chance.choice(
        [
            GetRow(category, key),
            HasRow(category, key),
            GetEntry(category, key),
            GetRows(category, tuple({_any_key(chance) for _ in range(3)})),
            ScanRange(category, key, stop, chance.random() < 0.5, chance.choice([None, 0, 2]), chance.random() < 0.3),
            CountRange(category, key, stop),
            ListCategories(),
            ListEntries(category),
            UsedBytes(),
            LastVersion(),
            ListChanges(chance.randrange(40), 5),
        ]
    )


def test_the_comparison_would_tell_a_stale_answer(owner: SqliteStore, reader: SqliteReader) -> None:
    """An answer given from a snapshot of before the last commit is not the owner's: the check above can fail."""
    stale = [outcome(reader, question, NOW_MS) for question in QUESTIONS]
    assert stale == [outcome(owner, question, NOW_MS) for question in QUESTIONS]
    owner.apply(group(put(b"c", b"k", b"other"), put(b"c", b"z", b""), put(b"e", b"", b"")), NOW_MS)
    fresh = [outcome(owner, question, NOW_MS) for question in QUESTIONS]
    assert sum(one != other for one, other in zip(stale, fresh, strict=True)) >= 9
    assert fresh == [outcome(reader, question, NOW_MS) for question in QUESTIONS]


def test_a_group_is_one_snapshot(owner: SqliteStore, reader: SqliteReader, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed in the middle of a group of reads is seen by none of them, and by all of the next group."""
    answer = Snapshots.answer

    def answer_and_write(self: Any, message: Any) -> Any:
        answered = answer(self, message)
        owner.apply(group(put(b"c", b"k", b"later")), NOW_MS)
        return answered

    asked = group(*[GetRow(b"c", b"k"), LastVersion()] * 3)
    with monkeypatch.context() as patched:
        patched.setattr(Snapshots, "answer", answer_and_write)
        assert reader.apply(asked, NOW_MS) == [b"1", 2] * 3
    assert reader.apply(asked, NOW_MS) == [b"later", 8] * 3


def test_the_time_is_never_before_the_files(root: DirectoryRoot) -> None:
    """A row that has ended by the owner's clock stays ended for a reader whose clock is behind."""
    owner = root.open("alpha", StoreOptions())
    owner.apply(group(SetRow(b"c", b"k", b"", 5_000), SetRow(b"c", b"late", b"", 9_000)), NOW_MS)
    reader = SqliteReader(root.path("alpha"), "alpha", 1)
    assert reader.get(b"c", b"k", 1) == b""
    owner.apply(group(put(b"c", b"x", b"")), 6_000)
    assert reader.get(b"c", b"k", 1) is None
    assert not reader.read(HasRow(b"c", b"k"), 1)
    assert reader.read(CountRange(b"c", b"", None), 1) == 2
    assert reader.get(b"c", b"late", 8_999) == b""
    assert reader.get(b"c", b"late", 9_000) is None
    assert reader.status().latest_ms == 6_000
    reader.close()
    owner.close()


def test_changes_are_read_where_they_are_kept(root: DirectoryRoot) -> None:
    """Changes are listed while the owner keeps them; once it doesn't there are none to be had, and later on again."""
    reader = None
    expected: list[Any] = [None, (1, 2), None, (4, 5)]
    for at, options in enumerate([StoreOptions(), StoreOptions(feed_changes_max=2)] * 2):
        owner = root.open("alpha", options)
        reader = reader or SqliteReader(root.path("alpha"), "alpha")
        owner.apply(group(put(b"c", b"k", b"%d" % at)), NOW_MS)
        found = reader.read(ListChanges(owner.status().last_version - 1, 10), NOW_MS)
        if expected[at] is None:
            assert type(found.error) is Misuse
            assert "keeps no changes" in str(found.error)
        else:
            assert [change.payload for change in found] == [b"%d" % at]
        owner.close()
    assert reader is not None
    truncated = reader.read(ListChanges(0, 10), NOW_MS)
    assert type(truncated.error) is FeedTruncated
    reader.close()


def test_the_owners_count_of_bytes_is_believed(root: DirectoryRoot) -> None:
    """Where its owner counts the bytes in use a reader takes them from there, without looking at every row."""
    owner = root.open("alpha", StoreOptions(max_bytes=1_000))
    owner.apply(group(put(b"c", b"k", b"12345")), NOW_MS)
    reader = SqliteReader(root.path("alpha"), "alpha")
    assert reader.read(UsedBytes(), NOW_MS) == 5
    owner.close()
    with closing(apsw.Connection(str(root.path("alpha")))) as stranger:
        stranger.execute("UPDATE meta SET value = 777 WHERE name = 'used_bytes'")
    assert reader.read(UsedBytes(), NOW_MS) == 777
    with closing(apsw.Connection(str(root.path("alpha")))) as stranger:
        stranger.execute("DELETE FROM meta WHERE name = 'used_bytes'")
    assert reader.read(UsedBytes(), NOW_MS) == 5
    reader.close()


def test_a_temporary_job_ends_for_its_readers_too(root: DirectoryRoot) -> None:
    """Once a job has ended its reader says so, and it is no job any more for who would open another."""
    owner = root.open("alpha", StoreOptions(now_ms=NOW_MS, expires_ms=5_000))
    owner.apply(group(put(b"c", b"k", b"")), NOW_MS)
    reader = SqliteReader(root.path("alpha"), "alpha", NOW_MS)
    assert reader.get(b"c", b"k", 4_999) == b""
    with pytest.raises(Closed, match="has ended"):
        reader.get(b"c", b"k", 5_000)
    assert [type(answer.error) for answer in reader.apply(group(GetRow(b"c", b"k")), 5_000)] == [Closed]
    with pytest.raises(JobNotFound):
        SqliteReader(root.path("alpha"), "alpha", 5_000)
    reader.close()
    owner.close()


# -- nothing is held ---------------------------------------------------------------------------------------------


def cut_off(owner: SqliteStore) -> int:
    """Write something, have the owner cut its log off, and return the bytes that are left of it."""
    owner.apply(group(put(b"x", b"", os.urandom(10))), NOW_MS)
    owner.fold()
    return Path(owner._connection.filename_wal).stat().st_size


@pytest.mark.parametrize("question", [*QUESTIONS, ListChanges(0, 1)], ids=lambda question: type(question).__name__)
def test_between_calls_the_log_can_be_cut_off(owner: SqliteStore, reader: SqliteReader, question: Any) -> None:
    """However it was asked, alone, in a group or in vain, a reader keeps no snapshot that would pin the log."""
    for _ in range(3):
        reader.read(question, NOW_MS)
        assert cut_off(owner) == 0
        reader.apply(group(question, question), NOW_MS)
        assert cut_off(owner) == 0
        reader.get(b"c", b"k", NOW_MS)
        assert cut_off(owner) == 0


def test_a_snapshot_that_is_kept_would_be_seen(owner: SqliteStore, root: DirectoryRoot) -> None:
    """A connection that stays in a read transaction does keep the log from being cut off: the check above can fail."""
    other = apsw.Connection(str(root.path("alpha")), flags=apsw.SQLITE_OPEN_READONLY)
    other.execute("BEGIN; SELECT * FROM kv").fetchall()
    assert cut_off(owner) > 0
    other.execute("COMMIT")
    assert cut_off(owner) == 0
    other.close()


def test_a_read_that_was_interrupted_holds_nothing(
    owner: SqliteStore, reader: SqliteReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt in the middle of a read, or of its very end, leaves no snapshot behind the next one."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    for name in ("answer", "_notice"):
        with monkeypatch.context() as patched:
            patched.setattr(Snapshots, name, interrupt)
            with pytest.raises(KeyboardInterrupt):
                reader.get(b"c", b"k", NOW_MS)
        assert cut_off(owner) == 0
    with monkeypatch.context() as patched:
        patched.setattr(Snapshots, "_end", interrupt)
        with pytest.raises(KeyboardInterrupt):
            reader.get(b"c", b"k", NOW_MS)
    owner.apply(group(put(b"c", b"k", b"new")), NOW_MS)
    assert reader.get(b"c", b"k", NOW_MS) == b"new"
    assert cut_off(owner) == 0


def test_a_reader_owns_nothing(owner: SqliteStore, root: DirectoryRoot, child: Child) -> None:
    """A reader takes no ownership: the owner's lock is as it was, and with no owner another process can be it."""
    child.ask(f"reader = SqliteReader(Path({str(root.path('alpha'))!r}), 'alpha')")
    before = root.path("alpha").with_suffix(".lock").read_bytes()
    owner.close()
    again = root.open("alpha", StoreOptions())
    again.apply(group(put(b"c", b"k", b"again")), NOW_MS)
    assert child.ask("reader.get(b'c', b'k', 1)") == b"again"
    assert before.startswith(b"%d\n" % os.getpid())
    again.close()


def test_a_reader_of_its_own_process_drops_no_locks(owner: SqliteStore, root: DirectoryRoot, child: Child) -> None:
    """Closing a reader in the owner's process leaves the owner's POSIX locks alone: nobody else thinks it is gone."""
    for _ in range(5):
        reader = SqliteReader(root.path("alpha"), "alpha")
        assert reader.get(b"c", b"k", NOW_MS) == b"1"
        reader.close()
    # The last one to close a file clears its log away; whoever finds no locks on it takes itself for that one.
    child.ask("import sqlite3")
    child.ask(f"sqlite3.connect({str(root.path('alpha'))!r}).execute('SELECT count(*) FROM kv').connection.close()")
    assert root.path("alpha").with_name("alpha.db-wal").stat().st_size > 0
    owner.apply(group(put(b"c", b"k", b"still")), NOW_MS)
    assert child.ask(f"SqliteReader(Path({str(root.path('alpha'))!r}), 'alpha').get(b'c', b'k', 1)") == b"still"


def test_what_a_reader_leaves_is_harmless(root: DirectoryRoot) -> None:
    """Of a job that was closed in order a reader leaves an empty log and its index, and the next owner clears them."""
    store = root.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"k", b"1")), NOW_MS)
    store.close()
    path = root.path("alpha")
    before = contents(root.directory)
    mask = os.umask(0)
    try:
        reader = SqliteReader(path, "alpha")
    finally:
        os.umask(mask)
    assert reader.get(b"c", b"k", NOW_MS) == b"1"
    reader.close()
    left = {name: (root.directory / name).stat() for name in contents(root.directory).keys() - before.keys()}
    assert left.keys() == {"alpha.db-wal", "alpha.db-shm"}
    assert left["alpha.db-wal"].st_size == 0
    assert {stat.S_IMODE(found.st_mode) for found in left.values()} == {0o600}
    store = root.open("alpha", StoreOptions())
    assert store.get(b"c", b"k", NOW_MS) == b"1"
    store.apply(group(put(b"c", b"k", b"2")), NOW_MS)
    store.close()
    assert set(os.listdir(root.directory)) == {"alpha.db", "alpha.lock"}
    SqliteReader(path, "alpha").close()
    assert sorted(file.name for file in root.drop("alpha")) == [
        "alpha.db",
        "alpha.db-shm",
        "alpha.db-wal",
        "alpha.lock",
    ]


# -- what becomes of the file ------------------------------------------------------------------------------------


def test_a_job_that_was_dropped_is_not_read_on(owner: SqliteStore, reader: SqliteReader, root: DirectoryRoot) -> None:
    """After a drop reads fail and say so, also when another job has taken the name; the file's room is given back."""
    assert reader.get(b"c", b"k", NOW_MS) == b"1"
    owner.close()
    root.drop("alpha")
    for _ in range(2):
        with pytest.raises(Unavailable, match="can't be read on: its file was removed, so the job was dropped"):
            reader.get(b"c", b"k", NOW_MS)
    assert not _deleted_files(root.directory)
    again = root.open("alpha", StoreOptions())
    again.apply(group(put(b"c", b"k", b"another")), NOW_MS)
    with pytest.raises(Unavailable, match="dropped"):
        reader.read(LastVersion(), NOW_MS)
    (failed,) = reader.apply(group(GetRow(b"c", b"k")), NOW_MS)
    assert type(failed.error) is Unavailable
    other = SqliteReader(root.path("alpha"), "alpha")
    assert other.get(b"c", b"k", NOW_MS) == b"another"
    other.close()
    again.close()


def _deleted_files(directory: Path) -> list[str]:
    """Return the files of a directory that this process holds open though they have no name any more."""
    links = []
    for handle in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{handle}"))
        except OSError:
            continue
    return [link for link in links if link.startswith(str(directory)) and link.endswith("(deleted)")]


def test_a_file_that_was_replaced_is_not_read_on(owner: SqliteStore, reader: SqliteReader, root: DirectoryRoot) -> None:
    """Another file under the job's name is another job's, whatever is in it."""
    path = root.path("alpha")
    owner.close()
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").rename(path)
    with pytest.raises(Unavailable, match="its file was replaced"):
        reader.get(b"c", b"k", NOW_MS)
    other = SqliteReader(path, "alpha")
    assert other.get(b"c", b"k", NOW_MS) == b"1"
    other.close()


def test_a_log_that_was_taken_away_is_noticed(owner: SqliteStore, reader: SqliteReader, root: DirectoryRoot) -> None:
    """Without the log that it has read from, a reader would miss what was committed: it says so instead."""
    log = root.path("alpha").with_name("alpha.db-wal")
    log.rename(log.with_name("elsewhere"))
    with pytest.raises(Unavailable, match="its write-ahead log was removed or replaced"):
        reader.get(b"c", b"k", NOW_MS)
    log.with_name("elsewhere").rename(log)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_job_whose_owner_was_killed_is_read(root: DirectoryRoot, child: Child, when: str) -> None:
    """All that a killed process had committed is there, and the next owner finds it, reader or no reader."""
    child.ask(f"store = DirectoryRoot(Path({str(root.directory)!r})).open('alpha', StoreOptions())")
    for at in range(20):
        child.ask(f"store.apply([b'c', b'{at:02}', bytes(500)], 1)")
    if when == "before":
        reader = SqliteReader(root.path("alpha"), "alpha")
    child.kill()
    if when == "after":
        reader = SqliteReader(root.path("alpha"), "alpha")
    assert reader.read(CountRange(b"c", b"", None), NOW_MS) == 20
    store = root.open("alpha", StoreOptions())
    assert store.status().last_version == 20
    store.apply(group(put(b"c", b"more", b"")), NOW_MS)
    assert reader.read(CountRange(b"c", b"", None), NOW_MS) == 21
    store.close()
    assert reader.read(CountRange(b"c", b"", None), NOW_MS) == 21
    reader.close()
    with closing(apsw.Connection(str(root.path("alpha")))) as connection:
        assert connection.pragma("integrity_check") == "ok"


def test_a_file_without_a_log_of_its_own_is_read(root: DirectoryRoot) -> None:
    """A file that was put into a state without a log, as a backup is, is read, and read on when it gets one."""
    store = root.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"k", b"1")), NOW_MS)
    store.close()
    path = root.path("alpha")
    connection = apsw.Connection(str(path))
    assert connection.pragma("journal_mode", "delete") == "delete"
    connection.close()
    reader = SqliteReader(path, "alpha")
    assert reader.get(b"c", b"k", NOW_MS) == b"1"
    assert not path.with_name("alpha.db-wal").exists()
    store = root.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"k", b"2")), NOW_MS)
    assert reader.get(b"c", b"k", NOW_MS) == b"2"
    reader.close()
    store.close()


def test_a_schema_that_changes_is_looked_at_again(
    owner: SqliteStore, reader: SqliteReader, root: DirectoryRoot
) -> None:
    """A table that is put into the file while it is read makes it a file that isn't ours, until it is gone again."""
    stranger = apsw.Connection(str(root.path("alpha")))  # of the same library: another one would drop its locks
    stranger.execute("CREATE TABLE strange (x)")
    with pytest.raises(Corrupt, match="isn't a job's file"):
        reader.get(b"c", b"k", NOW_MS)
    stranger.execute("DROP TABLE strange")
    assert reader.get(b"c", b"k", NOW_MS) == b"1"
    stranger.execute("UPDATE meta SET value = 'beta' WHERE name = 'job_id'")
    stranger.execute("PRAGMA user_version = 3; VACUUM")
    with pytest.raises(SchemaTooNew):
        reader.get(b"c", b"k", NOW_MS)
    stranger.execute("PRAGMA user_version = 2; VACUUM")
    with pytest.raises(Corrupt, match="belongs to job 'beta'"):
        reader.get(b"c", b"k", NOW_MS)
    stranger.close()


# -- what can't be opened ----------------------------------------------------------------------------------------


def test_there_is_no_such_job(root: DirectoryRoot) -> None:
    """A reader makes nothing: without a root, a file, or anything in the file there is no job to read."""
    with pytest.raises(JobNotFound, match="there is no job 'alpha'"):
        SqliteReader(root.path("alpha"), "alpha")
    assert not root.directory.exists()
    root.directory.mkdir()
    with pytest.raises(JobNotFound):
        SqliteReader(root.path("alpha"), "alpha")
    assert os.listdir(root.directory) == []
    root.path("alpha").touch()
    root.path("alpha").with_name("alpha.db-wal").write_bytes(b"a log that SQLite would delete beside an empty file")
    with pytest.raises(JobNotFound):
        SqliteReader(root.path("alpha"), "alpha")
    assert root.path("alpha").with_name("alpha.db-wal").exists()
    apsw.Connection(str(root.path("beta"))).pragma("journal_mode", "wal")
    with pytest.raises(JobNotFound):
        SqliteReader(root.path("beta"), "beta")


def _original(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(
            "CREATE TABLE kv (category BLOB NOT NULL, key BLOB NOT NULL, payload BLOB NOT NULL,"
            " PRIMARY KEY (category, key)) WITHOUT ROWID"
        )
        connection.execute("PRAGMA user_version = 1")
    connection.close()


def _newer(path: Path) -> None:
    DirectoryRoot(path.parent).open("alpha", StoreOptions()).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version = 3")
    connection.close()


def _foreign(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    connection.close()


def _of_another_job(path: Path) -> None:
    DirectoryRoot(path.parent).open("beta", StoreOptions()).close()
    path.with_name("beta.db").rename(path)


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (_original, Unavailable, "has format 1"),
        (_newer, SchemaTooNew, "has format 3"),
        (_foreign, Corrupt, "isn't a job's file"),
        (_of_another_job, Corrupt, "belongs to job 'beta'"),
        (lambda path: path.write_bytes(b"no database" * 1000), Corrupt, "not a database"),
        (lambda path: path.symlink_to(path.parent), Unavailable, "is a link"),
        (lambda path: path.mkdir(), Unavailable, "is a directory"),
        (lambda path: os.mkfifo(path), Unavailable, "is a pipe"),
        (lambda path: path.with_name("alpha.db-wal").symlink_to(path), Unavailable, "is a link"),
    ],
    ids=["original", "newer", "foreign", "other", "garbage", "link", "directory", "pipe", "linked-log"],
)
def test_a_file_that_is_no_job_of_ours_is_refused(place: Path, make: Any, error: type[Exception], says: str) -> None:
    """A reader refuses what opening refuses, and a file of an older format, which it doesn't bring up to date."""
    path = place / "alpha.db"
    make(path)
    before = contents(place)
    with pytest.raises(error, match=says):
        SqliteReader(path, "alpha")
    assert contents(place) == before


def test_a_file_that_stays_locked_is_unavailable(root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever keeps the file to itself is waited for a little, and then the reader says that it is in use."""
    monkeypatch.setattr(snapshots, "READ_BUSY_MS", 20)
    monkeypatch.setattr(schema, "BUSY_MS", 1_000_000)  # so long an owner may wait: here it would be a hang
    store = root.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"k", b"1")), NOW_MS)
    store.close()
    stranger = apsw.Connection(str(root.path("alpha")))
    stranger.pragma("locking_mode", "exclusive")
    stranger.execute("UPDATE kv SET payload = x'32'")
    with pytest.raises(Unavailable, match="locked") as caught:
        SqliteReader(root.path("alpha"), "alpha")
    assert caught.value.code & 0xFF == apsw.SQLITE_BUSY
    assert caught.value.retryable
    stranger.close()
    reader = SqliteReader(root.path("alpha"), "alpha")
    assert reader.get(b"c", b"k", NOW_MS) == b"2"
    looks = []
    look = Snapshots.look
    monkeypatch.setattr(Snapshots, "look", lambda self, *args: looks.append(1) or look(self, *args))
    path = root.path("alpha")
    path.rename(path.with_name("elsewhere"))
    assert {type(outcome.error) for outcome in reader.apply(group(*QUESTIONS), NOW_MS)} == {Unavailable}
    path.with_name("elsewhere").rename(path)
    assert looks == []
    reader.close()


def test_a_group_waits_for_a_locked_file_only_once(root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for together fails together, after one wait, when somebody keeps the file to himself."""
    monkeypatch.setattr(snapshots, "READ_BUSY_MS", 20)
    root.open("alpha", StoreOptions()).close()
    with closing(apsw.Connection(str(root.path("alpha")))) as stranger:
        stranger.pragma("journal_mode", "delete")
        reader = SqliteReader(root.path("alpha"), "alpha")
        stranger.execute("BEGIN EXCLUSIVE")
        waits = []
        look = Snapshots.look

        def look_and_count(self: Snapshots, *args: Any) -> Any:
            try:
                return look(self, *args)
            except Unavailable:
                waits.append(1)
                raise

        monkeypatch.setattr(Snapshots, "look", look_and_count)
        errors = [outcome.error for outcome in reader.apply(group(*QUESTIONS), NOW_MS)]
        assert {(type(error), error.code) for error in errors} == {(Unavailable, apsw.SQLITE_BUSY)}
        assert len(waits) == 1
        stranger.execute("COMMIT")
    assert reader.read(LastVersion(), NOW_MS) == 0
    reader.close()


def test_a_reader_of_the_parents_is_none_of_the_childs(
    owner: SqliteStore, reader: SqliteReader, root: DirectoryRoot
) -> None:
    """What was disowned, as after a fork, raises `Forked` for good, whether it was in use or not."""
    for quiet in (True, False):
        other = SqliteReader(root.path("alpha"), "alpha")
        other.disown(quiet=quiet)
        with pytest.raises(Forked):
            other.get(b"c", b"k", NOW_MS)
        other.disown(quiet=quiet)
        other.close()
    assert reader.get(b"c", b"k", NOW_MS) == b"1"
    owner.apply(group(put(b"c", b"k", b"2")), NOW_MS)
    assert reader.get(b"c", b"k", NOW_MS) == b"2"


@pytest.mark.parametrize("code", [apsw.SQLITE_IOERR_READ, apsw.SQLITE_CORRUPT, apsw.SQLITE_NOMEM, apsw.SQLITE_PROTOCOL])
@pytest.mark.parametrize("sticky", [False, True])
def test_a_disk_that_fails_a_read(root: DirectoryRoot, disk: FaultyDisk, code: int, sticky: bool) -> None:
    """A failed read tells so and harms nothing else: each of a group fails by itself, and the next call is answered."""
    store = root.open("alpha", StoreOptions())
    for at in range(50):
        store.apply(group(put(b"%d" % at, b"k", bytes(4000))), NOW_MS)
    reader = SqliteReader(root.path("alpha"), "alpha", vfs=disk.name)
    questions = [LastVersion(), ScanRange(b"7", b"", None), CountRange(b"9", b"", None)]
    failures: list[type] = []
    for at in range(1, 200):
        store.apply(group(put(b"new", b"k", b"")), NOW_MS)
        store.fold()  # so that nothing is taken from memory, and everything from the file
        right = [50 + at, [(b"k", bytes(4000))], 1]
        disk.arm("read", at, code, sticky=sticky)
        for question, answer in zip(questions, right, strict=True):
            try:
                assert reader.read(question, NOW_MS) == answer
            except StorageError as error:
                failures.append(type(error))
                assert error.__cause__ is not None
        outcomes = reader.apply(group(*questions), NOW_MS)
        fired = disk.fired
        disk.disarm()
        for outcome, answer in zip(outcomes, right, strict=True):
            assert outcome == answer or isinstance(outcome.error, StorageError)
        assert reader.apply(group(*questions), NOW_MS) == right
        if not fired:
            break
    else:
        pytest.fail("no end of reads")
    assert len(failures) >= 5
    assert (Unavailable in failures) == (code == apsw.SQLITE_PROTOCOL)  # another one was faster, too often
    reader.close()
    store.close()


# -- where nothing can be written --------------------------------------------------------------------------------

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


@pytest.fixture
def open_place() -> Iterator[Path]:
    """An empty directory that everybody may look into."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        os.chmod(directory, 0o755)
        yield Path(os.path.realpath(directory)) / "root"


def _shared(directory: Path, mode: int = 0o555) -> None:
    """Let everybody read what lies in a directory; nobody but root may write there, or whoever `mode` says."""
    for file in directory.iterdir():
        file.chmod(0o644)
    directory.chmod(mode)


@pytest.fixture
def nobody(child: Child) -> Child:
    """A process without any rights."""
    if os.geteuid() == 0:
        child.ask(f"os.seteuid({NOBODY})")
    return child


@pytest.fixture
def shared(open_place: Path) -> DirectoryRoot:
    """A root with a job that was closed in order; others may read it."""
    root = DirectoryRoot(open_place)
    store = root.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"k", b"1")), NOW_MS)
    store.close()
    _shared(open_place)
    return root


def test_a_file_in_a_directory_that_cant_be_written_to(shared: DirectoryRoot, nobody: Child) -> None:
    """A job that was closed in order is read where SQLite can make nothing beside it, and nothing is made."""
    nobody.ask(f"reader = SqliteReader(Path({str(shared.path('alpha'))!r}), 'alpha')")
    assert nobody.ask("reader.get(b'c', b'k', 1)") == b"1"
    assert nobody.ask("reader.apply([None, LastVersion(), None, None, CountRange(b'c', b'', None), None], 1)") == [1, 1]
    assert set(os.listdir(shared.directory)) == {"alpha.db", "alpha.lock"}
    shared.directory.chmod(0o755)


def test_a_still_file_that_is_touched_in_the_middle_of_a_read(
    root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An answer from a file that somebody wrote to meanwhile doesn't count: it is read again, up to three times."""
    store = root.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"k", b"0")), NOW_MS)
    store.close()
    path = root.path("alpha")
    monkeypatch.setattr(reading._Place, "may_have_log", lambda _self: False)
    reader = SqliteReader(path, "alpha")
    answer = Snapshots.answer
    writes = 0

    def answer_and_write(self: Snapshots, message: Any) -> Any:
        nonlocal writes
        answered = answer(self, message)
        if writes:
            writes -= 1
            os.utime(path, ns=(1, writes))  # the time of the last change differs from that of the next
            store = root.open("alpha", StoreOptions())
            store.apply(group(put(b"c", b"k", b"%d" % writes)), NOW_MS)
            store.close()
        return answered

    monkeypatch.setattr(Snapshots, "answer", answer_and_write)
    for last in (1, 2):
        writes = last
        assert reader.get(b"c", b"k", NOW_MS) == b"0"
        assert writes == 0
        assert reader.get(b"c", b"k", NOW_MS) == b"0"
    writes = reading.TRIES
    with pytest.raises(Unavailable, match="is being written to"):
        reader.get(b"c", b"k", NOW_MS)
    assert reader.get(b"c", b"k", NOW_MS) == b"0"
    writes = 0
    shutil.copy(path, path.with_name("copy"))
    path.with_name("copy").rename(path)
    with pytest.raises(Unavailable, match="its file was replaced"):
        reader.get(b"c", b"k", NOW_MS)
    reader.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_still_file_that_is_touched_while_it_is_opened(
    root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch, replaced: bool
) -> None:
    """What is seen while opening isn't relied on if somebody writes, or puts another file there, at that moment."""
    path = root.path("alpha")
    monkeypatch.setattr(reading._Place, "may_have_log", lambda _self: False)

    def write(payload: bytes) -> None:
        store = root.open("alpha", StoreOptions())
        store.apply(group(put(b"c", b"k", payload)), NOW_MS)
        store.close()
        os.utime(path, ns=(1, int(payload)))

    write(b"1")
    reader = SqliteReader(path, "alpha")
    assert reader.get(b"c", b"k", NOW_MS) == b"1"
    look, looks = Snapshots.look, 0

    def look_and_write(self: Snapshots, *args: Any) -> Any:
        nonlocal looks
        found = look(self, *args)
        looks += 1
        if looks == 1:
            write(b"3")
        return found

    write(b"2")
    monkeypatch.setattr(Snapshots, "look", look_and_write)
    if replaced:
        check = reading._Place.check

        def check_and_replace(self: reading._Place, job_id: str) -> None:
            check(self, job_id)
            shutil.copy(path, path.with_name("copy"))
            path.with_name("copy").rename(path)

        monkeypatch.setattr(reading._Place, "check", check_and_replace)
        with pytest.raises(Unavailable, match="its file was replaced"):
            reader.get(b"c", b"k", NOW_MS)
    else:
        assert reader.get(b"c", b"k", NOW_MS) == b"3"
        assert looks >= 3
    reader.close()


def test_a_file_that_was_just_written_to_is_looked_at_again(
    root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a file that lies still, changes that leave no other time of change behind are seen all the same."""
    monkeypatch.setattr(reading, "_TICK_NS", 3_600 * 10**9)
    monkeypatch.setattr(reading._Place, "may_have_log", lambda _self: False)
    path = root.path("alpha")
    reader = None
    for at in range(20):
        store = root.open("alpha", StoreOptions())
        store.apply(group(put(b"c", b"k", b"%02d" % at)), NOW_MS)
        store.close()
        if reader is None:
            just_now = path.stat().st_mtime_ns
        os.utime(path, ns=(just_now, just_now))
        reader = reader or SqliteReader(path, "alpha")
        assert reader.get(b"c", b"k", NOW_MS) == b"%02d" % at
    assert reader is not None
    reader.close()


@needs_root
def test_an_owner_comes_while_a_still_file_is_read(shared: DirectoryRoot, nobody: Child) -> None:
    """Who reads a file as it lies sees at once what a new owner commits, or that it can't be seen: never what was."""
    nobody.ask(f"reader = SqliteReader(Path({str(shared.path('alpha'))!r}), 'alpha')")
    assert nobody.ask("reader.get(b'c', b'k', 1)") == b"1"
    store = shared.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"k", b"2")), NOW_MS)
    assert nobody.ask("reader.get(b'c', b'k', 1)") == b"2"  # its log can be read, its index too
    log = shared.path("alpha").with_name("alpha.db-wal")
    store.close()
    assert nobody.ask("reader.get(b'c', b'k', 1)") == b"2"
    nobody.ask("reader.close()")
    shared.open("alpha", StoreOptions()).close()  # clears the log away
    nobody.ask(f"reader = SqliteReader(Path({str(shared.path('alpha'))!r}), 'alpha')")
    assert nobody.ask("reader.get(b'c', b'k', 1)") == b"2"
    for at in range(20):
        store = shared.open("alpha", StoreOptions())
        log.chmod(0o600)
        assert nobody.ask("reader.get(b'c', b'k', 1)") == (b"2" if at == 0 else b"%d" % (at - 1))  # nothing in the log
        store.apply(group(put(b"c", b"k", b"%d" % at)), NOW_MS)
        kind, text = nobody.error("reader.get(b'c', b'k', 1)")
        assert (kind, "can't be read" in text or "unable to open" in text) == ("Unavailable", True)
        store.close()
        assert nobody.ask("reader.get(b'c', b'k', 1)") == b"%d" % at


@needs_root
def test_a_killed_owners_file_in_such_a_directory(shared: DirectoryRoot, nobody: Child) -> None:
    """With its index beside it a log is read where nothing can be written; without, the reader says what it lacks."""
    code = "import os, signal\nstore.apply([b'c', b'k', b'2'], 1)\nos.kill(os.getpid(), signal.SIGKILL)"
    opening = "store = DirectoryRoot(Path(sys.argv[1])).open('alpha', StoreOptions())"
    imports = "import sys\nfrom pathlib import Path\nfrom persistency.storage.directory import DirectoryRoot"
    imports += "\nfrom persistency.storage.port import StoreOptions"
    run_child("\n".join([imports, opening, code]), shared.directory)
    nobody.ask(f"reader = SqliteReader(Path({str(shared.path('alpha'))!r}), 'alpha')")
    assert nobody.ask("reader.get(b'c', b'k', 1)") == b"2"
    nobody.ask("reader.close()")
    shared.path("alpha").with_name("alpha.db-shm").unlink()
    kind, text = nobody.error(f"SqliteReader(Path({str(shared.path('alpha'))!r}), 'alpha')")
    assert kind == "Unavailable"
    assert "has a write-ahead log that can't be read" in text
    assert "opened and closed once" in text
    shared.open("alpha", StoreOptions()).close()
    assert nobody.ask(f"SqliteReader(Path({str(shared.path('alpha'))!r}), 'alpha').get(b'c', b'k', 1)") == b"2"


@needs_root
def test_a_reader_of_another_user_makes_nothing_that_is_its_own(shared: DirectoryRoot, nobody: Child) -> None:
    """Where everybody may write, a log made by another user would lock the owner out: so none is made."""
    shared.directory.chmod(0o777)
    nobody.ask(f"reader = SqliteReader(Path({str(shared.path('alpha'))!r}), 'alpha')")
    assert nobody.ask("reader.get(b'c', b'k', 1)") == b"1"
    assert set(os.listdir(shared.directory)) == {"alpha.db", "alpha.lock"}
    store = shared.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"k", b"2")), NOW_MS)
    assert nobody.ask("reader.get(b'c', b'k', 1)") == b"2"
    store.close()


@needs_root
@pytest.mark.parametrize("mode", [0o777, 0o755])
def test_a_backup_and_a_check_by_another_user_make_nothing_beside_the_file(
    shared: DirectoryRoot, nobody: Child, mode: int
) -> None:
    """What lies still is copied and checked as it lies there; what somebody writes to meanwhile isn't."""
    shared.directory.chmod(mode)
    path, target = str(shared.path("alpha")), str(shared.directory.parent / "copies" / "copy")
    os.makedirs(os.path.dirname(target))
    os.chmod(os.path.dirname(target), 0o777)
    nobody.ask(f"reader = SqliteReader(Path({path!r}), 'alpha')")
    assert nobody.ask("[*reader.read(CheckUp(), 1)] is not None")
    assert nobody.ask(f"[*reader.read(BackUp(Path({target!r})), 1)] != []")
    assert set(os.listdir(shared.directory)) == {"alpha.db", "alpha.lock"}
    with closing(schema.open_file(Path(target))) as copy:
        assert schema.recognise(copy, Path(target)) == schema.FORMAT
    os.unlink(target)
    nobody.ask(f"steps = reader.read(BackUp(Path({target!r})), 1); next(steps)")
    nobody.ask("looking = reader.read(CheckUp(), 1)")
    store = shared.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"k", b"2")), NOW_MS)
    for steps in ("steps", "looking"):
        kind, says = nobody.error(f"[*{steps}]")
        assert (kind, "was written to while it was read" in says) == ("Unavailable", True)
    store.close()
    assert not os.path.lexists(target)


@needs_root
def test_a_file_that_mustnt_be_read(shared: DirectoryRoot, nobody: Child) -> None:
    """A file that this process has no right to read is `Unavailable`."""
    shared.path("alpha").chmod(0o600)
    kind, text = nobody.error(f"SqliteReader(Path({str(shared.path('alpha'))!r}), 'alpha')")
    assert (kind, "unable to open" in text) == ("Unavailable", True)


# -- hostile files -----------------------------------------------------------------------------------------------

USE = """
def use(store):
    from persistency.testing import dump
    failed = 0
    for now_ms in (1, 2**62):
        rows = dump(store, now_ms)
        for category in rows:
            store.scan(ScanRange(category, b"", None, reverse=True), now_ms)
            for row in rows[category]:
                assert row is None or (type(row.key), type(row.payload), type(row.version)) == (bytes, bytes, int), row
                store.get(category, row.key if row else b"", now_ms)
        messages = [UsedBytes(), ListChanges(0, 100), CountRange(b"c1", b"", None), GetRows(b"c0", (b"001-02",))]
        outcomes = store.apply([place for message in messages for place in (None, message, None)], now_ms)
        for outcome in outcomes:
            assert not isinstance(outcome, Failed) or isinstance(outcome.error, PersistencyError), outcome
            failed += isinstance(outcome, Failed)
    return failed > 2

def never(store):"""


def _attack() -> str:
    changes = {
        "def use(store):": USE,
        'DirectoryRoot(place).open("alpha", StoreOptions())': 'SqliteReader(place / "alpha.db", "alpha")',
        "from persistency.testing import dump": "from persistency.storage.reading import SqliteReader",
    }
    code = ATTACK
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new, 1)
    return code


@pytest.fixture(scope="module")
def left_by(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The files of a job that was closed in order, and of one that was killed."""
    found = {}
    for how in ("closed", "killed"):
        found[how] = tmp_path_factory.mktemp("hostile") / how
        run_child(MAKE, found[how], how)
    return found


@pytest.mark.parametrize(
    ("left", "target", "how"),
    [
        ("closed", "alpha.db", "flip"),
        ("closed", "alpha.db", "cut"),
        ("closed", "alpha.db", "overwrite"),
        ("killed", "alpha.db", "flip"),
        ("killed", "alpha.db-wal", "flip"),
        ("killed", "alpha.db-wal", "cut"),
        ("killed", "alpha.db-shm", "flip"),
        ("killed", "alpha.db-shm", "cut"),
    ],
)
def test_damaged_files_give_only_our_errors(
    left_by: dict[str, Path], place: Path, left: str, target: str, how: str
) -> None:
    """Whatever bits flip or bytes are missing, reading gives rows or our own errors: no crash, no hang, no other."""
    child = run_child(_attack(), left_by[left], place, target, how, 1, 80, timeout=100)
    assert child.returncode == 0, child.stderr[-3000:]
    said = child.stdout.strip()
    assert len(said) == 80
    if target == "alpha.db-shm":
        assert said == "r" * 80  # nobody has it open, so it is made anew
    elif (target, how) != ("alpha.db", "cut"):
        assert said.count("r") >= 1
    if (left, target) == ("closed", "alpha.db"):
        assert said.count("o") + said.count("u") >= 10  # refused when opened, or found while it was read
