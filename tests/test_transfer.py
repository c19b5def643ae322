"""Export and import: what comes back, beside whom it works, and what damaged and hostile streams can't do."""

from __future__ import annotations

import errno
import gzip
import hashlib
import io
import os
import socket
import sqlite3
import stat
import tempfile
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, repeat
from pathlib import Path
from random import Random
from typing import Any

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistency import (
    Closed,
    Corrupt,
    DiskFull,
    Job,
    KeyRange,
    Misuse,
    Overloaded,
    Persistency,
    PersistencyError,
    QuotaExceeded,
    RawKey,
    SchemaTooNew,
    StorageError,
    Unavailable,
    key,
    transfer,
)
from persistency.actor.mailbox import Mailbox
from persistency.codec.stream import Items
from persistency.codec.values import encode
from persistency.storage.port import ListRows, StoredRow
from tests.conftest import T0_MS, Wall
from tests.loops import InLoop, together, turns
from tests.test_real_data import NEEDS_FOLDER, made_commits, made_packages, stored_lines

WAIT = 60.0
State = dict[tuple[str, bytes], tuple[bytes, int | None]]
OPENING = {"persistency": "export", "format": 1, "job_id": "old", "last_version": 9, "exported_ms": T0_MS}
SMALL = st.text("ab\0é", min_size=1, max_size=3)
ROWS = st.lists(
    st.tuples(
        SMALL,
        st.binary(max_size=4).map(RawKey) | st.builds(key, st.integers() | SMALL),
        st.binary(max_size=3) | st.sampled_from([0, 23, 24, 255, 256, 65_535, 65_536, 70_000]).map(lambda n: b"x" * n),
        st.none() | st.integers(1, 10**10),
    ),
    max_size=12,
)


def state(job: Job) -> State:
    """Return every row of a job, with its expiry."""
    return {
        (category, bytes(entry.key)): (entry.payload, entry.expires_ms)
        for category in job.categories().result(WAIT)
        for entry in job.snapshot(category).result(WAIT)
    }


def exported(job: Job) -> bytes:
    """Return the export of a job."""
    file = io.BytesIO()
    job.export(file).result(WAIT)
    return file.getvalue()


def items_of(stream: bytes) -> list[Any]:
    """Decode a stream with nothing of ours."""
    file = io.BytesIO(stream)
    found = []
    while file.tell() < len(stream):
        found.append(cbor2.load(file))
    return found


def stream_of(*rows: Any, opening: Any = OPENING, **closing: Any) -> bytes:
    """Make a stream of rows as they are given, sound unless something else is said."""
    body = encode(opening) + b"".join(row if isinstance(row, bytes) else encode(row) for row in rows)
    return body + encode({"rows": len(rows), "sha256": hashlib.sha256(body).digest(), **closing})


def fill(job: Job, count: int) -> None:
    """Put rows of several categories, every third with an end."""
    for at in range(count):
        ttl = 1000 + at if at % 3 == 0 else None
        job.put(f"c{at % 4}", key("row", at), b"payload %d" % at, ttl=ttl)


@pytest.fixture
def job(persistency: Persistency) -> Job:
    """Give an empty job of either kind."""
    return persistency.open_job("here")


@pytest.fixture
def other(persistency: Persistency) -> Job:
    """Give another one."""
    return persistency.open_job("there")


@pytest.fixture
def memory(wall: Wall) -> Iterator[Job]:
    """Give an empty job in memory, where the kind makes no difference."""
    with Persistency(":memory:", clock=wall) as persistency:
        yield persistency.open_job("here")


# -- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["memory", "directory"])
@settings(max_examples=60, deadline=None)
@given(rows=ROWS)
def test_what_is_exported_is_imported(kind: str, rows: list[tuple[str, RawKey, bytes, int | None]]) -> None:
    """Rows, payloads and ends are the same in the job that takes them in, whatever they are."""
    with (
        tempfile.TemporaryDirectory() as folder,
        Persistency(":memory:" if kind == "memory" else folder) as persistency,
    ):
        job, other = persistency.open_job("here"), persistency.open_job("there")
        for category, k, payload, ttl in rows:
            job.put(category, k, payload, ttl=ttl)
        before = state(job)
        file = io.BytesIO()
        assert job.export(file).result(WAIT) == len(before)
        file.seek(0)
        assert other.import_(file).result(WAIT) == len(before)
        assert state(other) == before == state(job)


@pytest.mark.parametrize("source", [pytest.param("real", marks=NEEDS_FOLDER), "made"])
def test_real_records_survive_a_file(source: str, job: Job, other: Job, tmp_path: Path) -> None:
    """Every package and commit is the same after a journey through a file of that path."""
    made = source == "made"
    packages = made_packages().lines if made else stored_lines("debian-packages.jsonl.gz")
    commits = made_commits().lines if made else stored_lines("commits.jsonl.gz")
    for category, lines in (("packages", packages), ("commits", commits)):
        for at, line in enumerate(lines):
            job.put(category, (at % 97, at), line, ttl=3600 + at if at % 2 else None)
    before = state(job)
    assert len(before) == len(packages) + len(commits)
    assert job.export(tmp_path / "records.cbor").result(WAIT) == len(before)
    assert other.import_(tmp_path / "records.cbor").result(WAIT) == len(before)
    assert state(other) == before


def test_pages_are_bounded_and_nothing_is_missing_between_them(
    job: Job, other: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows come in category and key order; a page is full at 256 rows, or with the row that passes a mebibyte."""
    pages: list[list[StoredRow]] = []
    write_rows = transfer._Sink.write_rows

    def noted(sink: transfer._Sink, opening: bytes, rows: list[StoredRow]) -> None:
        pages.append(rows)
        write_rows(sink, opening, rows)

    monkeypatch.setattr(transfer._Sink, "write_rows", noted)
    chance = Random(5)
    for at in range(3_000):
        job.put("b" if at % 2 else "a", (at,), b"x" * 10, ttl=100 if at % 5 == 0 else None)
    for at in range(30):
        job.put("large", (at,), chance.randbytes(chance.choice([10, 70_000, 400_000, 1_500_000])))
    before = state(job)
    stream = exported(job)
    rows = [(category.encode(), k) for category, k, _, _ in items_of(stream)[1:-1]]
    assert rows == sorted(rows)
    assert len(rows) == len(set(rows)) == 3_030
    assert max(map(len, pages)) == transfer.PAGE_ROWS_MAX
    sizes = [[len(row.key) + len(row.payload) for row in page] for page in pages]
    assert all(sum(page[:-1]) < transfer.BYTES_MAX for page in sizes)
    assert max(map(sum, sizes)) > transfer.BYTES_MAX
    assert len(pages) < 60
    assert other.import_(io.BytesIO(stream)).result(WAIT) == 3_030
    assert state(other) == before


def test_an_import_replaces_rows_of_the_same_keys_and_leaves_others(job: Job, other: Job) -> None:
    """A row that had an end and has none in the stream has none; what isn't in the stream stays."""
    job.put("c", ("both",), b"new")
    job.put("c", ("ends",), b"new", ttl=50)
    other.put("c", ("both",), b"old", ttl=10)
    other.put("c", ("mine",), b"old", ttl=20)
    other.put("d", ("mine",), b"old")
    assert other.import_(io.BytesIO(exported(job))).result(WAIT) == 2
    assert state(other) == {
        ("c", key("both")): (b"new", None),
        ("c", key("ends")): (b"new", T0_MS + 50_000),
        ("c", key("mine")): (b"old", T0_MS + 20_000),
        ("d", key("mine")): (b"old", None),
    }


def test_rows_that_have_ended_are_left_out_on_both_sides(job: Job, other: Job, wall: Wall) -> None:
    """An end is a moment, not a time to live: it doesn't move, and what has ended since the export isn't taken in."""
    for seconds in (1, 2, 3):
        job.put("c", (seconds,), b"x", ttl=seconds)
    wall.ms += 1000
    stream = exported(job)
    assert [row[1] for row in items_of(stream)[1:-1]] == [key(2), key(3)]
    other.put("c", (2,), b"mine")
    wall.ms += 1000
    assert other.import_(io.BytesIO(stream)).result(WAIT) == 1
    assert state(other) == {("c", key(2)): (b"mine", None), ("c", key(3)): (b"x", T0_MS + 3000)}
    wall.ms += 1000
    assert other.import_(io.BytesIO(stream)).result(WAIT) == 0
    assert state(other) == {("c", key(2)): (b"mine", None)}


def test_an_empty_job_has_an_export_too(job: Job, other: Job) -> None:
    """It has a first and a last item, and nothing to take in."""
    stream = exported(job)
    assert [type(item) for item in items_of(stream)] == [dict, dict]
    assert other.import_(io.BytesIO(stream)).result(WAIT) == 0
    assert state(other) == {}


def test_an_export_reads_only(job: Job) -> None:
    """It takes no version, and the job is what it was."""
    fill(job, 1_000)
    before, version = state(job), job.version().result(WAIT)
    exported(job)
    assert job.version().result(WAIT) == version
    assert state(job) == before


def test_an_end_that_no_clock_reaches_is_exported_as_the_last_one(tmp_path: Path) -> None:
    """Another program may have written it; the export can be imported all the same."""
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("here")
        job.put("c", ("a",), b"x", ttl=100)
        job.close()
        with sqlite3.connect(str(job.path)) as connection:
            connection.execute("UPDATE kv SET expires_ms = ?", (2**62,))
        connection.close()
        stream = exported(persistency.open_job("here"))
        other = persistency.open_job("there")
        assert other.import_(io.BytesIO(stream)).result(WAIT) == 1
        assert state(other) == {("c", key("a")): (b"x", transfer.EXPIRES_MS_MAX)}


# -- the format --------------------------------------------------------------------------------------------------

GOLDEN = (
    "a56b70657273697374656e6379666578706f727466666f726d617401666a6f625f696466676f6c64656e6c6c6173745f"
    "76657273696f6e036b6578706f727465645f6d731b0000018bcfe5680084656e6f7465734302610040f684656e6f7465"
    "734502610015014474657874f68462c3a94200ff58187878787878787878787878787878787878787878787878781b00"
    "00018bcfe65260a264726f77730366736861323536582030f9b948cf7e0841174f3619d66e28c84f9188787e2dfe7415"
    "b4a647b841b80f"
)


def golden_rows(job: Job) -> None:
    """Put the rows of the golden stream."""
    job.put("notes", ("a",), b"")
    job.put("notes", ("a", 1), b"text")
    job.put("é", RawKey(b"\0\xff"), b"x" * 24, ttl=60)


def test_format_1_is_what_it_was(memory: Job, wall: Wall) -> None:
    """A stream that was written in this format, byte by byte: it can be read, and is written the same today."""
    golden = bytes.fromhex(GOLDEN)
    assert memory.import_(io.BytesIO(golden)).result(WAIT) == 3
    assert state(memory) == {
        ("notes", key("a")): (b"", None),
        ("notes", key("a", 1)): (b"text", None),
        ("é", b"\0\xff"): (b"x" * 24, T0_MS + 60_000),
    }
    with Persistency(":memory:", clock=wall) as persistency:
        job = persistency.open_job("golden")
        golden_rows(job)
        assert exported(job) == golden


def test_a_stream_says_what_it_is_and_what_it_amounts_to(job: Job) -> None:
    """Read by nothing of ours: the first item, the rows, and the last with the sum of all bytes before it."""
    fill(job, 700)
    before, version = state(job), job.version().result(WAIT)
    stream = exported(job)
    opening, *rows, closing = items_of(stream)
    assert opening == {
        "persistency": "export", "format": 1, "job_id": "here", "last_version": version, "exported_ms": T0_MS,
    }  # fmt: skip
    assert {(category, k): (payload, end) for category, k, payload, end in rows} == before
    assert stream.endswith(encode(closing))
    assert closing == {"rows": 700, "sha256": hashlib.sha256(stream[: -len(encode(closing))]).digest()}


def test_what_other_programs_write_is_taken(memory: Job) -> None:
    """Rows in any order, more in the first item, the last item's entries in any order, lengths in a longer form."""
    row = bytes.fromhex("980479000163590002414258014af6")  # ["c", h'4142', h'4a', null]
    body = encode({**OPENING, "written_by": ["somebody", 2]}) + encode(["z", b"k", b"p", 2**53 - 1]) + row
    stream = body + encode({"sha256": hashlib.sha256(body).digest(), "rows": 2})
    assert memory.import_(io.BytesIO(stream)).result(WAIT) == 2
    assert state(memory) == {("z", b"k"): (b"p", 2**53 - 1), ("c", b"AB"): (b"J", None)}


# -- files -------------------------------------------------------------------------------------------------------


def test_a_path_is_there_whole_with_its_mode(job: Job, tmp_path: Path) -> None:
    """What was there is replaced; the file is its owner's alone, whatever the umask; nothing else is left."""
    fill(job, 500)
    folder = tmp_path / "exports"
    folder.mkdir()
    (folder / "a.cbor").write_bytes(b"before")
    (folder / "a.cbor").chmod(0o666)
    mask = os.umask(0o777)
    try:
        assert job.export(str(folder / "a.cbor")).result(WAIT) == 500
    finally:
        os.umask(mask)
    assert [path.name for path in folder.iterdir()] == ["a.cbor"]
    assert stat.S_IMODE((folder / "a.cbor").stat().st_mode) == 0o600
    assert len(items_of((folder / "a.cbor").read_bytes())) == 502


def test_a_path_is_on_the_medium_before_it_has_its_name(
    memory: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the name is, too, before there is an answer: a power cut leaves the old file or the new one."""
    done = []
    fsync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        fsync(handle)
        done.append("directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")

    def replaced(source: Any, target: Any) -> None:
        replace(source, target)
        done.append("name")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    memory.export(tmp_path / "a").result(WAIT)
    assert done == ["file", "name", "directory"]


def test_a_name_as_long_as_can_be_is_no_matter(memory: Job, tmp_path: Path) -> None:
    """The temporary file's name is within what a file system takes."""
    path = tmp_path / ("é" * 127)
    assert memory.export(path).result(WAIT) == 0
    assert [found.name for found in tmp_path.iterdir()] == [path.name]


def refused_paths(folder: Path) -> Iterator[tuple[Path, type[Exception]]]:
    """Make places where no export can be."""
    (folder / "folder").mkdir()
    yield folder / "folder", Unavailable
    (folder / "file").write_bytes(b"")
    (folder / "link").symlink_to(folder / "file")
    yield folder / "link", Unavailable
    os.mkfifo(folder / "pipe")
    yield folder / "pipe", Unavailable
    yield folder / "missing" / "file", Unavailable
    yield folder / "file" / "below", Unavailable


def test_what_is_no_place_for_a_file_is_unavailable(memory: Job, tmp_path: Path) -> None:
    """Directories, links and pipes aren't replaced, and missing directories not made."""
    for path, error in refused_paths(tmp_path):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error):
            memory.export(path).result(WAIT)
        assert sorted(tmp_path.rglob("*")) == before


def test_files_of_jobs_are_not_replaced(tmp_path: Path) -> None:
    """Neither this job's, nor another's of any root, nor what would be taken for one."""
    with Persistency(tmp_path / "root") as persistency, Persistency(tmp_path / "else") as elsewhere:
        job = persistency.open_job("here")
        foreign = elsewhere.open_job("there").path
        assert job.path is not None
        assert foreign is not None
        for path in (job.path, foreign, foreign.with_suffix(".lock"), job.path.with_name("new.db")):
            for name in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-journal")):
                if name.suffix != ".lock-wal" and name.suffix != ".lock-journal":
                    with pytest.raises(Misuse, match="kept for a job's files"):
                        job.export(name)
        assert job.export(tmp_path / "mine.db").result(WAIT) == 0


class Broken(Exception):
    """What a file of a caller's raises."""


class Failing(io.BytesIO):
    """A file that takes or gives so many times, and then raises."""

    def __init__(self, error: BaseException, times: int, data: bytes = b"") -> None:
        super().__init__(data)
        self.error = error
        self.times = times

    def _count(self) -> None:
        self.times -= 1
        if self.times < 0:
            raise self.error

    def write(self, data: Any) -> int:
        self._count()
        return super().write(data)

    def read(self, size: int | None = -1) -> bytes:
        self._count()
        return super().read(min(size or 0, 500))


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), Broken("odd"), SystemExit(3)], ids=repr)
@pytest.mark.parametrize("times", [0, 1, 3])
def test_what_the_callers_file_raises_is_the_answer(job: Job, error: BaseException, times: int) -> None:
    """That very exception; the job goes on, and so does the next export."""
    fill(job, 600)
    before = state(job)
    assert job.export(Failing(error, times)).exception(WAIT) is error
    assert job.import_(Failing(error, times, exported(job))).exception(WAIT) is error
    assert state(job) == before
    assert len(items_of(exported(job))) == 602


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_file_that_keeps_what_it_cannot_write_has_to_say_so(memory: Job) -> None:
    """A buffered file is flushed, so that its `OSError` is the export's and not only its closing's."""
    memory.put("c", ("a",), b"x")
    with open("/dev/full", "wb", buffering=0) as raw:
        buffered = io.BufferedWriter(raw)
        error = memory.export(buffered).exception(WAIT)
        with pytest.raises(OSError, match="No space left"):
            buffered.close()
    assert isinstance(error, OSError)
    assert error.errno == errno.ENOSPC


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, DiskFull), (errno.EDQUOT, DiskFull), (errno.EIO, StorageError), (errno.EROFS, Unavailable)],
)
def test_what_the_system_says_about_a_path_is_a_storage_error(
    memory: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StorageError]
) -> None:
    """Sorted by what can be done about it, its cause kept, and nothing left behind; what was there stays."""
    target = tmp_path / "a.cbor"
    target.write_bytes(b"before")

    def fails(_handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fails)
        error = memory.export(target).exception(WAIT)
    assert type(error) is kind
    assert isinstance(error.__cause__, OSError)
    assert [path.name for path in tmp_path.iterdir()] == ["a.cbor"]
    assert target.read_bytes() == b"before"
    with pytest.raises(Unavailable, match="No such file"):
        memory.import_(tmp_path / "missing").result(WAIT)
    with pytest.raises(Unavailable, match="directory"):
        memory.import_(tmp_path).result(WAIT)


class Dribbling(io.RawIOBase):
    """A raw file: it takes and gives a few bytes at a time."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.chance = Random(7)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        taken = bytes(data)[: self.chance.randrange(1, 20)]
        self.data += taken
        return len(taken)

    def read(self, size: int = -1) -> bytes:
        given = bytes(self.data[: min(size, self.chance.randrange(1, 20))])
        del self.data[: len(given)]
        return given


class Uncounted:
    """The least that a file can be."""

    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes) -> None:
        self.data += data


def test_files_may_take_and_give_little_at_a_time(job: Job, other: Job) -> None:
    """A raw file's short writes and reads, a file that doesn't count, and one that compresses."""
    fill(job, 300)
    whole, dribbling, uncounted, packed = exported(job), Dribbling(), Uncounted(), io.BytesIO()
    assert job.export(dribbling).result(WAIT) == 300
    assert job.export(uncounted).result(WAIT) == 300
    with gzip.open(packed, "wb") as file:
        assert job.export(file).result(WAIT) == 300
    assert bytes(dribbling.data) == uncounted.data == gzip.decompress(packed.getvalue()) == whole
    assert other.import_(dribbling).result(WAIT) == 300
    assert state(other) == state(job)
    assert not dribbling.closed


def test_a_stream_may_come_from_one_job_to_another_through_a_socket(job: Job, other: Job) -> None:
    """One exports into it while the other imports out of it."""
    fill(job, 2_000)
    left, right = socket.socketpair()
    with left, right, right.makefile("rb", buffering=0) as source:
        taken = other.import_(source)
        with left.makefile("wb", buffering=0) as sink:
            assert job.export(sink).result(WAIT) == 2_000
        left.shutdown(socket.SHUT_WR)
        assert taken.result(WAIT) == 2_000
    assert state(other) == state(job)


class Unready(io.RawIOBase):
    """A file that doesn't wait, and isn't ready."""

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def read(self, _size: int = -1) -> None:
        return None

    def write(self, _data: Any) -> None:
        return None


class Wrong:
    """A file whose `write` answers what no file does."""

    def __init__(self, answer: int) -> None:
        self.answer = answer

    def write(self, _data: bytes) -> int:
        return self.answer


def test_a_file_that_does_not_wait_is_unavailable(memory: Job) -> None:
    """Nor is one that takes nothing, or more than there was: nobody would know what is in it."""
    for file in (Unready(), Wrong(0), Wrong(10**9), Wrong(-1)):
        with pytest.raises(Unavailable):
            memory.export(file).result(WAIT)
    with pytest.raises(Unavailable):
        memory.import_(Unready()).result(WAIT)


class Asynchronous:
    async def read(self, _size: int) -> bytes:
        return b""

    async def write(self, _data: bytes) -> int:
        return 0


def test_what_is_no_file_is_misuse_at_the_call(memory: Job, tmp_path: Path) -> None:
    """Wrong types, text files of every kind, closed ones, ones for the other direction, and wrong callbacks."""
    path = tmp_path / "file"
    path.write_bytes(b"")
    closed = io.BytesIO()
    closed.close()
    with (
        tempfile.TemporaryFile("w+") as text,
        tempfile.NamedTemporaryFile("w+") as wrapped,
        path.open("rb") as source,
        path.open("ab") as sink,
    ):
        neither: list[Any] = [
            None, 7, b"path", object(), io.BytesIO, io.StringIO(), text, wrapped, closed, Asynchronous(), "", "a\0b",
        ]  # fmt: skip
        for file in [*neither, source]:
            with pytest.raises(Misuse):
                memory.export(file)
        for file in [*neither, sink]:
            with pytest.raises(Misuse):
                memory.import_(file)
    for progress in (1, "no"):
        with pytest.raises(Misuse):
            memory.export(io.BytesIO(), progress)  # type: ignore[arg-type]  # that is what is tested
        with pytest.raises(Misuse):
            memory.import_(io.BytesIO(), progress)  # type: ignore[arg-type]  # that is what is tested


def test_a_file_of_text_that_hides_it_is_found_by_what_it_gives(memory: Job) -> None:
    """Then it is the reply's error."""

    class Hidden:
        def read(self, _size: int) -> str:
            return "text"

    with pytest.raises(Misuse, match="gave str"):
        memory.import_(Hidden()).result(WAIT)  # type: ignore[arg-type]  # that is what is tested


# -- beside the job's work ---------------------------------------------------------------------------------------


class Gated(io.BytesIO):
    """A file that takes nothing before its gate is opened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()

    def write(self, data: Any) -> int:
        assert self.gate.wait(WAIT)
        return super().write(data)


def test_both_are_awaited_in_an_event_loop(job: Job, other: Job, in_loop: InLoop) -> None:
    """The event loop goes on meanwhile, and can do what the work waits for."""

    async def main() -> None:
        fill(job, 1_000)
        file = Gated()
        reply = job.export(file)
        assert not reply.done()

        async def open_gate() -> None:
            await turns()
            file.gate.set()

        assert await together(reply, open_gate) == [1_000, None]
        file.seek(0)
        assert await other.import_(file) == 1_000
        with pytest.raises(Corrupt):
            await other.import_(file)  # which is at its end
        with pytest.raises(Unavailable):
            await job.export("/missing/file")

    in_loop(main)
    assert state(other) == state(job)


def test_progress_is_told_with_growing_numbers(job: Job, other: Job, wall: Wall) -> None:
    """Of rows, the last one all of them; an import's are those read, taken in or not."""
    fill(job, 3_000)
    told: list[tuple[int, int | None]] = []
    file = io.BytesIO()
    job.export(file, lambda done, total: told.append((done, total))).result(WAIT)
    numbers = [done for done, _ in told]
    assert numbers == sorted(set(numbers))
    assert len(numbers) > 10
    assert told[-1] == (3_000, None)
    told.clear()
    file.seek(0)
    wall.ms += 10**7  # every third has ended
    assert other.import_(file, lambda done, total: told.append((done, total))).result(WAIT) == 2_000
    assert told == [(1024, None), (2048, None), (3_000, None)]


@pytest.mark.parametrize("error", [Broken("enough"), KeyboardInterrupt()], ids=repr)
def test_a_progress_that_raises_stops_it(job: Job, other: Job, tmp_path: Path, error: BaseException) -> None:
    """That error is the answer; the temporary file is gone, and what was at the path is still there."""
    fill(job, 3_000)
    folder = tmp_path / "exports"
    folder.mkdir()
    target = folder / "a.cbor"
    target.write_bytes(b"before")
    seen: list[list[str]] = []

    def stops(done: int, _total: int | None) -> None:
        seen.append(sorted(path.name for path in folder.iterdir()))
        if done > 500:
            raise error

    assert job.export(target, stops).exception(WAIT) is error
    assert all(len(names) == 2 and names[0].startswith(".a.cbor.") for names in seen)
    assert len(seen) > 1
    assert [path.name for path in folder.iterdir()] == ["a.cbor"]
    assert target.read_bytes() == b"before"
    assert other.import_(io.BytesIO(exported(job)), stops).exception(WAIT) is error
    assert len(state(other)) == transfer.BATCH_ROWS_MAX


def test_a_job_that_is_closed_meanwhile_ends_it(persistency: Persistency, tmp_path: Path) -> None:
    """With `Closed`, and nothing at the path; a closed job refuses at the call."""
    job = persistency.open_job("brief")
    fill(job, 2_000)
    folder = tmp_path / "exports"
    folder.mkdir()
    with pytest.raises(Closed):
        job.export(folder / "a", lambda _done, _total: job.close()).result(WAIT)
    assert list(folder.iterdir()) == []
    for call in (job.export, job.import_):
        with pytest.raises(Closed):
            call(io.BytesIO())


def test_inside_of_run_both_are_misuse(job: Job) -> None:
    """They would wait for what waits for them."""
    for call in (job.export, job.import_):
        with pytest.raises(Misuse, match="inside its own run"):
            job.run(lambda _tx, call=call: call(io.BytesIO())).result(WAIT)  # type: ignore[misc]  # bound now


def test_a_forked_child_leaves_the_temporary_file_to_its_parent(memory: Job, tmp_path: Path) -> None:
    """It has a copy of the work and nobody who goes on with it; the parent's goes on."""
    fill(memory, 1_000)
    steps = transfer.exported("here", lambda: memory._mailbox, lambda: memory.now_ms, tmp_path / "a")
    next(steps)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: that is what is tested
        child = os.fork()
    if not child:
        try:
            steps.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert [done for done, _ in steps][-1] == 1_000
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("verb", ["export", "import_"])
def test_a_full_mailbox_is_waited_for(persistency: Persistency, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever `on_full` says: with room again it goes on."""
    job = persistency.open_job("narrow", requests_max=2, on_full="raise")
    job.put("c", ("a",), b"x")
    stream = exported(job)
    held, may_go, waits = threading.Event(), threading.Event(), threading.Event()

    def hold(_tx: Any) -> None:
        held.set()
        assert may_go.wait(WAIT)

    holder = threading.Thread(target=lambda: job.run(hold).result(WAIT))
    holder.start()
    assert held.wait(WAIT)
    line = [job.version(), job.version()]
    with pytest.raises(Overloaded):
        job.version()
    drain = Mailbox.drain

    def drained(mailbox: Mailbox) -> Any:
        waits.set()
        return drain(mailbox)

    monkeypatch.setattr(Mailbox, "drain", drained)
    pending = getattr(job, verb)(io.BytesIO(stream))
    assert waits.wait(WAIT)
    assert not pending.done()
    may_go.set()
    assert pending.result(WAIT) == 1
    holder.join(WAIT)
    assert [reply.result(WAIT) for reply in line] == [1, 1]


def test_batches_are_bounded_in_bytes(job: Job, other: Job) -> None:
    """A batch is full with the row that passes a mebibyte, of keys and payloads together."""
    for at in range(60):
        job.put("c", (at,), b"x" * 100_000)
    told: list[int] = []
    assert other.import_(io.BytesIO(exported(job)), lambda done, _total: told.append(done)).result(WAIT) == 60
    assert told == [11, 22, 33, 44, 55, 60]


def test_a_large_row_takes_few_copies(memory: Job, tmp_path: Path) -> None:
    """None to be written, for it goes to the file as it is; two to be read: as it comes, and whole."""
    size = 32 * 1024 * 1024
    memory.put("c", ("large",), bytes(size))
    memory.flush().result(WAIT)
    tracemalloc.start()
    try:
        assert memory.export(tmp_path / "large").result(WAIT) == 1
        _, written = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        assert memory.import_(tmp_path / "large").result(WAIT) == 1
        _, read = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert written < size // 4
    assert read < size * 2.5


# -- beside writers ----------------------------------------------------------------------------------------------

STEADY = 4_000
WRITERS = 4


class Writers:
    """Threads that write between the steady rows of a job, and over them, while an export goes on."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.written = threading.Semaphore(0)
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self._write, args=(number,)) for number in range(WRITERS)]

    def _write(self, number: int) -> None:
        chance = Random(number)
        while not self.over.is_set():
            at = chance.randrange(STEADY)
            match chance.randrange(4):
                case 0:
                    self.job.put("c", (at,), b"steady %d by %d" % (at, number))
                case 1:
                    self.job.put("c", (at, number), b"passing", ttl=chance.choice([None, 100]))
                case 2:
                    self.job.delete("c", (at, chance.randrange(WRITERS)))
                case _:
                    self.job.delete_range("c", KeyRange((at, 0), (at, WRITERS)))
            self.job.flush().result(WAIT)
            self.written.release()

    def progress(self, _done: int, _total: int | None) -> None:
        """Between two pages, wait until there were some writes."""
        for _ in range(3 * WRITERS):
            assert self.written.acquire(timeout=WAIT)


def steady_rows_in(job: Job) -> dict[bytes, list[bytes]]:
    """Export a job beside its writers; return the payloads that each steady row has in the stream."""
    writers = Writers(job)
    file = io.BytesIO()
    for at in range(STEADY):
        job.put("c", (at,), b"steady %d" % at)
    for thread in writers.threads:
        thread.start()
    try:
        count = job.export(file, writers.progress).result(WAIT)
    finally:
        writers.over.set()
        for thread in writers.threads:
            thread.join(WAIT)
    rows = items_of(file.getvalue())[1:-1]
    assert len(rows) == count
    found: dict[bytes, list[bytes]] = {key(at): [] for at in range(STEADY)}
    for _, k, payload, _ in rows:
        if k in found:
            found[k].append(payload)
    return found


def missing_or_twice(found: dict[bytes, list[bytes]]) -> list[bytes]:
    """Return the keys of steady rows that aren't there once, with a payload of theirs."""
    return [
        k
        for at, (k, payloads) in enumerate(found.items())
        if len(payloads) != 1 or not (payloads[0] + b" ").startswith(b"steady %d " % at)
    ]


def test_beside_writers_every_row_that_stays_is_exported_once(job: Job) -> None:
    """Four threads put, delete and overwrite between its pages; payloads are of the rows they stand at."""
    assert missing_or_twice(steady_rows_in(job)) == []


@pytest.mark.parametrize("defect", ["skips", "repeats"])
def test_the_writers_find_a_page_that_starts_at_the_wrong_key(
    memory: Job, defect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the next page starts a row too far, or a row too early."""
    read = transfer._Line.read

    def planted(line: Any, message: Any) -> Any:
        if type(message) is not ListRows or not message.start:
            return read(line, message)
        if defect == "repeats":
            rows = read(line, message._replace(start=message.start.removesuffix(b"\0")))
            return rows if len(rows) > 1 else []
        return read(line, message)[1:]

    monkeypatch.setattr(transfer._Line, "read", planted)
    assert len(missing_or_twice(steady_rows_in(memory))) >= 3


# -- what a stream can't do --------------------------------------------------------------------------------------

HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no export"),
    "another array": (encode([1, 2]), "no export"),
    "text": (b'{"persistency": "export"}', "no export"),
    "a picture": (b"\x89PNG\r\n\x1a\n" * 100, "no export"),
    "a database": (b"SQLite format 3\0" + bytes(4096), "no export"),
    "another map": (stream_of(opening={"format": 1}), "no export"),
    "another kind": (stream_of(opening={**OPENING, "persistency": "backup"}), "no export"),
    "a list in its place": (stream_of(opening={**OPENING, "persistency": ["export"]}), "no export"),
    "no format": (stream_of(opening={**OPENING, "format": None}), "no export"),
    "format true": (stream_of(opening={**OPENING, "format": True}), "no export"),
    "format 0": (stream_of(opening={**OPENING, "format": 0}), "no export"),
    "format -1": (stream_of(opening={**OPENING, "format": -1}), "no export"),
    "format 1.0": (stream_of(opening={**OPENING, "format": 1.0}), "no export"),
    "no job": (stream_of(opening={**OPENING, "job_id": 7}), "no export"),
    "no version": (stream_of(opening={**OPENING, "last_version": -1}), "no export"),
    "no time": (stream_of(opening={**OPENING, "exported_ms": "now"}), "no export"),
    "a deep first item": (b"\xa1\x01" * 30_000 + b"\0", "not a value"),
    "a long first item": (stream_of(opening={**OPENING, "x": bytes(70_000)}), "more than 65536"),
    "a first item of many": (b"\xbb" + b"\xff" * 8, "more than 65536"),
    "a first item twice": (b"\xa2\x61a\x01\x61a\x02", "not a value"),
    "an indefinite first item": (b"\xbf" + encode(OPENING)[1:] + b"\xff", "indefinite"),
    "a first item with a tag": (b"\xa1\x61a\xd8\x1c\x80", "not a value"),
    "an array for the last item": (encode(OPENING) + encode(["rows", 0, "sha256", b""]), "bytes instead of|instead of"),
    "a first item for the last": (encode(OPENING) * 2, "isn't the last item"),
    "more in the last item": (stream_of(more=1), "isn't the last item"),
    "a wrong count": (stream_of(["c", b"k", b"p", None], rows=2), "2 rows were written"),
    "a count that is true": (stream_of(["c", b"k", b"p", None], rows=True), "rows were written"),
    "a huge count": (stream_of(rows=2**5000), "rows were written"),
    "a wrong sum": (stream_of(sha256=bytes(32)), "checksum"),
    "a sum of another type": (stream_of(sha256="0" * 32), "checksum"),
    "something behind": (stream_of() + b"\0", "not of the stream"),
    "two streams": (stream_of() * 2, "not of the stream"),
    "three columns": (stream_of(["c", b"k", b"p"]), "a row has 4"),
    "five columns": (stream_of(["c", b"k", b"p", None, 1]), "a row has 4"),
    "a category of bytes": (stream_of([b"c", b"k", b"p", None]), "instead of a text"),
    "a category without a name": (stream_of(["", b"k", b"p", None]), "without a name"),
    "a long category": (stream_of(["c" * 256, b"k", b"p", None]), "at most 255"),
    "a category that is no text": (stream_of(b"\x84\x61\xff\x41k\x41p\xf6"), "UTF-8"),
    "a key of text": (stream_of(["c", "k", b"p", None]), "instead of bytes"),
    "a long key": (stream_of(["c", b"k" * 8193, b"p", None]), "at most 8192"),
    "a payload of text": (stream_of(["c", b"k", "p", None]), "instead of bytes"),
    "a nested payload": (stream_of(["c", b"k", [[b"p"]], None]), "instead of bytes"),
    "a tagged payload": (stream_of(b"\x84\x61c\x41k\xc2\x41p\xf6"), "a tag instead of bytes"),
    "a payload in pieces": (stream_of(b"\x84\x61c\x41k\x5f\x41p\xff\xf6"), "indefinite"),
    "a payload of a tebibyte": (encode(OPENING) + b"\x84\x61c\x41k\x5b\0\0\1\0\0\0\0\0" + bytes(99), "at most 2684"),
    "a payload that isn't there": (encode(OPENING) + b"\x84\x61c\x41k\x5a\x10\0\0\0" + bytes(99), "breaks off"),
    "an array without an end": (encode(OPENING) + b"\x9f\x61c\x41k\x41p\xf6\xff", "indefinite"),
    "an array of many": (encode(OPENING) + b"\x9b" + b"\xff" * 8, "a row has 4"),
    "a negative end": (stream_of(["c", b"k", b"p", -1]), "instead of a number"),
    "an end of a float": (stream_of(["c", b"k", b"p", 1.5]), "instead of a number"),
    "an end of no clock": (stream_of(["c", b"k", b"p", 2**53]), "an expiry of"),
    "a number for a row": (stream_of(7), "neither a row"),
    "nothing behind the first item": (encode(OPENING), "breaks off"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_stream_is_corrupt(name: str, memory: Job) -> None:
    """Nothing of it is taken in, no more is kept than what is read at a time, and the job goes on."""
    stream, told = HOSTILE[name]
    tracemalloc.start()
    try:
        with pytest.raises(Corrupt, match=told):
            memory.import_(io.BytesIO(stream)).result(WAIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 12 * 1024 * 1024
    assert memory.version().result(WAIT) == 0
    memory.put("c", ("a",), b"x")
    assert memory.count("c").result(WAIT) == 1


@pytest.mark.parametrize("number", [2, 99, 2**64 - 1, 2**5000])
def test_a_newer_format_is_told_apart(memory: Job, number: int) -> None:
    """Whatever else it may hold: nothing of it is taken in."""
    opening = encode({"persistency": "export", "format": number, "what": {"comes": "then"}})
    with pytest.raises(SchemaTooNew, match="1 is the latest"):
        memory.import_(io.BytesIO(opening + b"\xff\xff")).result(WAIT)
    assert memory.version().result(WAIT) == 0


class Endless(io.RawIOBase):
    """A stream that begins, and then never ends."""

    def __init__(self, opening: bytes, again: bytes) -> None:
        self.rest = chain([opening], repeat(again))

    def readable(self) -> bool:
        return True

    def read(self, _size: int = -1) -> bytes:
        return next(self.rest)


@pytest.mark.parametrize("again", [b"\0" * 4096, b"\x81" * 4096, b"\xa1" * 4096, b"\x5b" * 4096, b"\xff" * 4096])
def test_endless_bytes_end_at_once(memory: Job, again: bytes) -> None:
    """From the first byte, behind the first item, and behind the last."""
    for opening in (b"", encode(OPENING)[:20], encode(OPENING), stream_of()):
        with pytest.raises(Corrupt):
            memory.import_(Endless(opening, again)).result(WAIT)


def test_endless_rows_take_no_memory_and_can_be_stopped(memory: Job, wall: Wall) -> None:
    """Those that have ended aren't taken in, and yet progress is told of them; a progress that raises ends it."""
    row = encode(["c", b"k", b"p" * 1000, wall.ms - 1])

    def stops(done: int, _total: int | None) -> None:
        if done > 50_000:
            raise Broken(done)

    tracemalloc.start()
    try:
        with pytest.raises(Broken):
            memory.import_(Endless(encode(OPENING), row * 50), stops).result(WAIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * 1024 * 1024
    assert memory.version().result(WAIT) == 0


def test_rows_that_cannot_be_stored_end_it_with_that_error(persistency: Persistency, job: Job) -> None:
    """A quota is met by a batch as a whole; those before stay, and a note says how many there were."""
    for at in range(1_500):
        job.put("c", (at,), b"x" * 100)
    small = persistency.open_job("small", max_bytes=120_000)
    with pytest.raises(QuotaExceeded) as raised:
        small.import_(io.BytesIO(exported(job))).result(WAIT)
    assert "import_: 1,024 rows were taken in before, and stay." in raised.value.__notes__
    assert small.count("c").result(WAIT) == 1_024
    small.flush().result(WAIT)  # the import was told, nobody else needs to be


def test_a_large_stream_that_breaks_off_says_how_many_rows_were_taken_in(job: Job, other: Job) -> None:
    """Batches before the damage stay, each of them whole; nothing of the one in which it is."""
    for at in range(4_000):
        job.put("c", (at,), b"x" * 50)
    stream = exported(job)
    for share in (0.1, 0.4, 0.7, 0.999):
        job_id = f"taken {share}"
        cut = stream[: int(len(stream) * share)]
        with pytest.raises(Corrupt) as raised:
            other.import_(io.BytesIO(cut)).result(WAIT)
        whole = int(share * 4_000) // transfer.BATCH_ROWS_MAX * transfer.BATCH_ROWS_MAX
        assert f"; {whole:,} rows were taken in before, and stay" in str(raised.value), job_id
        assert other.count("c").result(WAIT) == whole
    assert other.import_(io.BytesIO(stream)).result(WAIT) == 4_000
    assert state(other) == state(job)


# -- damage ------------------------------------------------------------------------------------------------------


def damaged_stream() -> bytes:
    """Return a sound stream with rows of every shape."""
    with Persistency(":memory:", clock=Wall()) as persistency:
        job = persistency.open_job("damaged")
        for at in range(40):
            ttl = 1000 + at if at % 3 == 0 else None
            job.put("a" if at % 2 else "bé", (at, "x" * (at % 5)), bytes(range(at * 2)), ttl=ttl)
        return exported(job)


def undetected(job: Job, streams: Iterable[bytes]) -> list[bytes]:
    """Import streams; return those that were taken for sound, or raised anything but a `PersistencyError`."""
    return [
        stream
        for stream in streams
        if not isinstance(job.import_(io.BytesIO(stream)).exception(WAIT), PersistencyError)
    ]


def flipped(stream: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Give streams with some bits the other way round, mostly one."""
    chance = Random(seed)
    for _ in range(count):
        bits = int.from_bytes(stream, "big")
        places = {chance.randrange(len(stream) * 8) for _ in range(chance.choice([1, 1, 1, 2, 8]))}
        for place in places:
            bits ^= 1 << place
        yield bits.to_bytes(len(stream), "big")


def reshaped(stream: bytes, seed: int, count: int) -> Iterator[bytes]:
    """Give streams with parts zeroed, doubled, left out or exchanged, as bad copies have."""
    chance = Random(seed)
    for _ in range(count):
        a, b, c = sorted(chance.sample(range(len(stream) + 1), 3))
        for other in (
            stream[:a] + bytes(b - a) + stream[b:],
            stream[:b] + stream[a:],
            stream[:a] + stream[b:],
            stream[:a] + stream[b:c] + stream[a:b] + stream[c:],
        ):
            if other != stream:
                yield other


def test_every_truncation_is_found(memory: Job) -> None:
    """A stream that lacks anything at its end is no export, and nothing of this one is taken in."""
    stream = damaged_stream()
    assert undetected(memory, (stream[:length] for length in range(len(stream)))) == []
    assert memory.version().result(WAIT) == 0
    assert memory.import_(io.BytesIO(stream)).result(WAIT) == 40


@pytest.mark.parametrize("damage", [flipped, reshaped])
def test_random_damage_is_found(memory: Job, damage: Callable[[bytes, int, int], Iterator[bytes]]) -> None:
    """500 times bits the other way round, and as many bad copies: no damage is taken for sound."""
    seed = Random().randrange(2**32)
    print(f"seed {seed}")
    assert undetected(memory, damage(damaged_stream(), seed, 500)) == []
    assert memory.version().result(WAIT) == 0


def test_the_damage_is_seen_by_whoever_does_not_look_at_the_sum(memory: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: a sum that is always right. Then some of the same damage is taken for sound, and found to be."""
    stream = damaged_stream()
    monkeypatch.setattr(Items, "sha256", lambda _items: stream[-32:])
    assert len(undetected(memory, flipped(stream, 1, 500))) > 50
    assert len(undetected(memory, reshaped(stream, 1, 100))) >= 1
