"""A job's files: names that can't escape or meet, modes, links refused, one owner at a time, removal."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import socket
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistency.errors import Corrupt, JobLocked, Misuse, PersistencyError, StorageError, Unavailable
from persistency.storage import files
from persistency.storage.directory import DirectoryRoot
from persistency.storage.memory import MemoryRoot
from persistency.storage.names import file_name, job_id_of
from persistency.storage.port import StoreOptions
from tests.storage.conftest import Owner, contents, run_child

OPTIONS = StoreOptions()
RESERVED = {"con", "prn", "aux", "nul"} | {f"{port}{at}" for port in ("com", "lpt") for at in range(10)}

IDS = [
    "alpha", "Alpha", "ALPHA", "alphA", "a", "A", "0", "-", "_", "a-b_c", "../x", "..", ".", "...", "/", "/abs",
    "/etc/passwd",
    "a/b", "a\\b", "..\\x", "./x", "x/.", "x/", "x", "~", "~root", "CON", "con", "Con", "nul", "NUL", "aux.txt",
    "aux", "AUX.TXT",
    "com1", "com0", "lpt9", "com1.tar.gz", "com10", "con.db", "console", "c:", "a:b", "c:\\x", ":memory:",
    "file:x?mode=memory",
    "file:x", ".hidden", "trailing.", "trailing..", " leading", "trailing ", " ", "in side", "a.b", "a..b", "a.db",
    "a.db-wal",
    "a.lock", "alpha.db", "a.db-shm", "%", "%41", "%61", "%2E", "a%00b", "\0", "a\0b", "a\nb", "\r", "\x7f",
    "'", '"', "`id`", "$HOME",
    "*", "?", "<", ">", "|", ";", "&", "é", "e\u0301", "É", "ß", "ſ", "ı", "İ", "K", "\u2126", "Ω", "ﬁ", "fi", "名前",
    "🙂", "\u202e",
    "\ufeff", "\u200b", "\U0010ffff", "a" * 197, "a" * 196 + "b", "%" * 65, "é" * 32, "-rf", "--help", "lost+found",
    "sqlite_x", "x" * 64,
]  # fmt: skip
TOO_LONG = ["a" * 198, "%" * 66, "é" * 33, "x" * 10_000, "." + "a" * 195, "con." + "a" * 192, "A" + "a" * 195]


def random_ids(count: int) -> Iterator[str]:
    """Yield so many ids, the same every time, from alphabets that are hard on file systems."""
    chance = random.Random(61)
    alphabets = [
        "ab",
        "aA",
        "a.",
        "./",
        "%4A1a",
        "cConNuUlLmM1.",
        "aé\u0301e",
        "\0\n\r\t ",
        "abcdefghijklmnopqrstuvwxyz0123456789_-.",
    ]
    for _ in range(count):
        if chance.random() < 0.3:
            points = [chance.choice([chance.randrange(0xD800), chance.randrange(0xE000, 0x110000)]) for _ in range(5)]
            yield "".join(map(chr, points[: chance.randint(1, 5)]))
        else:
            alphabet = chance.choice(alphabets)
            yield "".join(chance.choice(alphabet) for _ in range(chance.randint(1, 12)))


# -- names -------------------------------------------------------------------------------------------------------


def check_name(job_id: str, name: str) -> None:
    """Hold everything a file name must be."""
    assert job_id_of(name) == job_id
    assert name.isascii()
    assert name.isprintable()
    assert not set(name) & set("/\\:*?\"<>|\0 ~'`$&;")
    assert name.endswith(".db")
    assert len(name) <= 200
    stem = name[:-3]
    assert not stem.startswith(".")
    assert not stem.endswith(".")
    assert not stem.startswith("sqlite_") or job_id.startswith("sqlite_")
    assert stem.split(".")[0].lower() not in RESERVED


def test_names_of_the_corpus_round_trip_and_never_meet() -> None:
    """Every id has a name of its own, also where case is ignored; the name is harmless everywhere."""
    names = [file_name(job_id) for job_id in IDS]
    for job_id, name in zip(IDS, names, strict=True):
        check_name(job_id, name)
    assert len({name.casefold() for name in names}) == len(set(IDS)) == len(IDS)


def test_names_of_random_ids_round_trip_and_never_meet() -> None:
    """10,000 random ids have as many names, also where case is ignored, and every name gives its id back."""
    named: dict[str, str] = {}
    for job_id in random_ids(10_000):
        name = file_name(job_id)
        check_name(job_id, name)
        assert named.setdefault(name.casefold(), job_id) == job_id


@given(st.text(min_size=1, max_size=16, alphabet=st.characters(codec="utf-8")))
def test_any_text_round_trips(job_id: str) -> None:
    """Any text that fits has a name that gives it back."""
    check_name(job_id, file_name(job_id))


@given(st.text(alphabet="aA%41e.2E0/dbDB\xe9", max_size=12))
def test_only_our_own_names_are_jobs(stem: str) -> None:
    """A file name is a job's only if it is exactly the name that its id has."""
    for name in (stem, stem + ".db"):
        job_id = job_id_of(name)
        assert job_id is None or file_name(job_id) == name


@pytest.mark.parametrize(
    "name",
    [".db", "a.db-wal", "a.db-shm", "a.db-journal", "a.lock", "a.DB", "A.db", "%61.db", "%4a.db", "con.db",
    "%FF.db", "%.db",
     "%4.db", ".a.db", "a..db", "a b.db", "é.db", "a", "", "db", "%2.db", "a" * 198 + ".db", os.fsdecode(b"\xff.db")],
)  # fmt: skip
def test_other_names_are_nobodys(name: str) -> None:
    """What no id is called is no job's file."""
    assert job_id_of(name) is None


def test_readable_ids_stay_readable() -> None:
    """Ids of [a-z0-9_-] and inner dots are their own names; everything else is percent-encoded in capitals."""
    expected = {
        "alpha": "alpha.db", "a.b": "a.b.db", "a-b_c.9": "a-b_c.9.db", "Alice": "%41lice.db", ".a": "%2Ea.db",
        "a.": "a%2E.db",
        "a/b": "a%2Fb.db", "é": "%C3%A9.db", "con": "%63on.db", "com1.x": "%63om1.x.db", "a%b": "a%25b.db",
        "\0": "%00.db",
    }  # fmt: skip
    assert {job_id: file_name(job_id) for job_id in expected} == expected


def test_the_length_limit_is_exact() -> None:
    """A name of 200 bytes with its `.db` is taken, one of 201 is `Misuse` that says how long it would be."""
    assert len(file_name("a" * 197)) == 200
    assert len(file_name("a" * 2 + "%" * 65)) == 200
    with pytest.raises(Misuse, match="201 bytes"):
        file_name("a" * 198)
    with pytest.raises(Misuse, match="201 bytes"):
        file_name("%" * 66)


@pytest.mark.parametrize("job_id", [*TOO_LONG, "", "\ud800", "a\udfffb", None, b"alpha", 7, 1.5, ("a",), Path("a")])
def test_bad_ids_are_misuse(job_id: Any, root: DirectoryRoot) -> None:
    """An id that is empty, too long, not text, or not writable as UTF-8 is `Misuse` everywhere, and makes no file."""
    for ask in (file_name, root.path, root.drop, lambda bad: root.open(bad, OPTIONS), MemoryRoot().path,
                MemoryRoot().drop, lambda bad: MemoryRoot().open(bad, OPTIONS)):  # fmt: skip
        with pytest.raises(Misuse, match="job_id"):
            ask(job_id)
    assert not root.directory.exists()


def test_nothing_leaves_the_root(root: DirectoryRoot) -> None:
    """Jobs of hostile ids can all be open at once, lie flat in the root, are listed and can be dropped."""
    outside = root.directory.parent / "x.db"
    outside.write_bytes(b"not yours")
    stores = {job_id: root.open(job_id, OPTIONS) for job_id in IDS}
    for job_id, store in stores.items():
        store.apply([b"c", b"k", job_id.encode()], 1)
    assert sorted(path.name for path in root.directory.parent.iterdir()) == ["root", "x.db"]
    assert all(path.is_file() for path in root.directory.iterdir())
    assert [job.job_id for job in root.stored()] == sorted(IDS)
    assert all(job.path == root.path(job.job_id) and job.path.parent == root.directory for job in root.stored())
    assert all(store.get(b"c", b"k", 1) == job_id.encode() for job_id, store in stores.items())
    for job_id, store in stores.items():
        store.close()
        assert root.drop(job_id)[0] == root.path(job_id)
    assert list(root.directory.iterdir()) == []
    assert outside.read_bytes() == b"not yours"


def test_stored_tells_the_jobs_and_their_sizes(root: DirectoryRoot) -> None:
    """Listing gives the jobs by id with the bytes of all their files, and nothing that isn't a job's regular file."""
    assert root.stored() == []
    for job_id in ("b", "A", "a"):
        root.open(job_id, OPTIONS).close()
    opened = root.open("a", OPTIONS)
    opened.apply([b"c", b"k", b"x" * 50_000], 1)
    place = root.directory
    (place / "notes.txt").write_text("mine")
    (place / "Z.db").write_text("no job is called so")
    Path(os.fsdecode(os.fsencode(place) + b"/\xff.db")).write_text("nor so, for this is no UTF-8")
    (place / "link.db").symlink_to(place / "b.db")
    (place / "folder.db").mkdir()
    os.mkfifo(place / "pipe.db")
    listed = root.stored()
    assert [job.job_id for job in listed] == ["A", "a", "b"]
    sizes = {job.job_id: job.bytes for job in listed}
    assert sizes["b"] == (place / "b.db").stat().st_size
    assert sizes["a"] == sum((place / f"a.db{suffix}").stat().st_size for suffix in ("", "-wal", "-shm"))
    assert sizes["a"] > 50_000
    opened.close()


def test_stored_survives_files_that_vanish(root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that another process removes while the root is being listed is left out, not an error."""
    for job_id in ("a", "b"):
        root.open(job_id, OPTIONS).close()
    (root.directory / "a.db-wal").write_bytes(b"x" * 10)
    real, gone = Path.stat, {"a.db-wal", "b.db"}

    def vanishing(path: Path, **options: Any) -> os.stat_result:
        found = real(path, **options)
        if path.name in gone:
            path.unlink(missing_ok=True)
        return found

    monkeypatch.setattr(Path, "stat", vanishing)
    assert {job.job_id for job in root.stored()} <= {"a", "b"}
    monkeypatch.undo()
    assert [job.job_id for job in root.stored()] == ["a"]


def test_a_root_that_cannot_be_listed_is_a_storage_error(tmp_path: Path) -> None:
    """Listing and opening in a root that turned out to be a file, or lies under one, is `Unavailable`."""
    (tmp_path / "file").write_text("x")
    for directory in (tmp_path / "file", tmp_path / "file" / "under"):
        root = DirectoryRoot(directory)
        with pytest.raises(Unavailable):
            root.open("a", OPTIONS)
        with pytest.raises(Unavailable):
            root.stored()
    assert (tmp_path / "file").read_text() == "x"


# -- modes and the root ------------------------------------------------------------------------------------------


@pytest.fixture(params=[0, 0o022, 0o077, 0o777], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    """The process' umask, put back afterwards."""
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_whatever_the_umask(root: DirectoryRoot, umask: int) -> None:
    """The root has mode 0700 and every file of a job 0600, whatever the umask."""
    store = root.open("alpha", OPTIONS)
    store.apply([b"c", b"k", b"v"], 1)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in root.directory.iterdir()}
    assert modes == dict.fromkeys(["alpha.db", "alpha.db-wal", "alpha.db-shm", "alpha.lock"], 0o600)
    assert stat.S_IMODE(root.directory.stat().st_mode) == 0o700
    store.close()


def test_an_existing_root_keeps_its_mode(root: DirectoryRoot) -> None:
    """A root that was there before keeps its mode; one whose parents are missing is made with them."""
    root.directory.mkdir()
    root.directory.chmod(0o755)
    root.open("a", OPTIONS).close()
    assert stat.S_IMODE(root.directory.stat().st_mode) == 0o755
    deep = DirectoryRoot(root.directory / "x" / "y" / "z")
    deep.open("a", OPTIONS).close()
    assert stat.S_IMODE(deep.directory.stat().st_mode) == 0o700


def test_real_roots(tmp_path: Path) -> None:
    """A root's links are resolved; a file, a path under a file, a link loop and a NUL in it are `Misuse`."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "file").write_text("x")
    (tmp_path / "to-file").symlink_to(tmp_path / "file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    base = Path(os.path.realpath(tmp_path))
    assert files.real_root(tmp_path / "link") == base / "real"
    assert files.real_root(str(tmp_path / "link" / "new" / "er")) == base / "real" / "new" / "er"
    assert files.real_root(tmp_path / "link" / ".." / "new") == base / "new"
    for bad in ("file", "file/under", "file/far/under", "to-file", "to-file/under", "loop", "loop/under"):
        with pytest.raises(Misuse, match="root"):
            files.real_root(tmp_path / bad)
    with pytest.raises(Misuse, match="root"):
        files.real_root("a\0b")


# -- what stands in the place of a job's files -------------------------------------------------------------------


def place_link(path: Path, victim: Path) -> None:
    """Put a link to the victim there."""
    path.symlink_to(victim)


def place_dangling_link(path: Path, victim: Path) -> None:
    """Put a link to nothing there."""
    path.symlink_to(victim.with_name("nowhere"))


def place_hard_link(path: Path, victim: Path) -> None:
    """Put another name of the victim there."""
    path.hardlink_to(victim)


def place_pipe(path: Path, _victim: Path) -> None:
    """Put a pipe there."""
    os.mkfifo(path)


def place_directory(path: Path, _victim: Path) -> None:
    """Put a directory there."""
    path.mkdir()


def place_socket(path: Path, _victim: Path) -> None:
    """Put a socket there."""
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{folder}/{path.name}")  # a socket's path must be short
    os.close(folder)


PLACES = [place_link, place_dangling_link, place_hard_link, place_pipe, place_directory, place_socket]


@pytest.mark.parametrize("job", ["new", "old", "original"])
@pytest.mark.parametrize("suffix", [".db", ".db-wal", ".db-shm", ".db-journal", ".lock"])
@pytest.mark.parametrize("put_there", PLACES, ids=lambda put_there: put_there.__name__[6:])
def test_strange_files_are_refused_untouched(
    put_there: Callable[[Path, Path], None], suffix: str, job: str, root: DirectoryRoot
) -> None:
    """A link, pipe, directory or socket in the place of any of a job's files is refused at once, untouched."""
    if job == "original" and suffix == ".lock":
        return  # the original's files have none
    victim = root.directory.parent / "victim"
    root.open("neighbour", OPTIONS).close()
    job_id = "Alice" if job == "original" else "alice"
    if job == "original":
        write_format_1(root.directory / "Alice.db")
    elif job == "old":
        root.open(job_id, OPTIONS).close()
    strange = root.directory / f"{job_id}{suffix}"
    if strange.exists():
        strange.rename(victim)
    else:
        victim.write_bytes(b"precious" * 1000)
    put_there(strange, victim)
    before = contents(root.directory.parent)
    with pytest.raises(Unavailable) as caught:
        root.open(job_id, OPTIONS)
    assert strange.name in str(caught.value)
    assert contents(root.directory.parent) == before
    strange.rmdir() if strange.is_dir() and not strange.is_symlink() else strange.unlink()
    root.open(job_id, OPTIONS).close()  # nothing is left behind that would keep it from being opened


def write_format_1(path: Path) -> None:
    """Write a file as the Nim original does."""
    with sqlite3.connect(path) as connection:
        connection.executescript(
            "PRAGMA journal_mode = WAL; PRAGMA user_version = 1;"
            "CREATE TABLE kv (category BLOB NOT NULL, key BLOB NOT NULL, payload BLOB NOT NULL,"
            " PRIMARY KEY (category, key)) WITHOUT ROWID;"
        )
    connection.close()


def test_a_lost_file_with_its_log_is_corrupt(root: DirectoryRoot) -> None:
    """A log whose database file is gone is refused as `Corrupt` and kept; `drop` clears it away."""
    root.directory.mkdir()
    log = root.directory / "alpha.db-wal"
    log.write_bytes(b"the log of a file that is gone")
    before = contents(root.directory)
    with pytest.raises(Corrupt, match="gone"):
        root.open("alpha", OPTIONS)
    assert contents(root.directory) == before
    assert root.drop("alpha") == [log, root.directory / "alpha.lock"]
    root.open("alpha", OPTIONS).close()


def test_leftovers_without_content_are_cleared(root: DirectoryRoot) -> None:
    """An empty log, an index of shared memory and a journal beside no file are cleared away, not applied."""
    root.directory.mkdir()
    (root.directory / "alpha.db-wal").touch()
    (root.directory / "alpha.db-shm").write_bytes(b"x" * 32768)
    (root.directory / "alpha.db-journal").write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" + b"\1" * 600)
    store = root.open("alpha", OPTIONS)
    store.apply([b"c", b"k", b"v"], 1)
    store.close()
    assert sorted(path.name for path in root.directory.iterdir()) == ["alpha.db", "alpha.lock"]
    assert root.open("alpha", OPTIONS).get(b"c", b"k", 1) == b"v"


# -- ownership ---------------------------------------------------------------------------------------------------


def test_another_process_gets_job_locked(root: DirectoryRoot, owner: Owner) -> None:
    """A job that another process owns can be neither opened nor dropped: `JobLocked` at once, with its pid."""
    for act in (lambda: root.open("held", OPTIONS), lambda: root.drop("held"), lambda: files.Claim(root.path("held"))):
        with pytest.raises(JobLocked) as caught:
            act()
        assert caught.value.pid == owner.pid
        assert caught.value.retryable
    assert root.path("held").exists()
    root.open("other", OPTIONS).close()


def test_a_killed_owner_lets_go(root: DirectoryRoot, owner: Owner) -> None:
    """After `kill -9` of its owner a job is free, and what the owner committed is there."""
    owner.kill()
    store = root.open("held", OPTIONS)
    assert store.get(b"c", b"k", 1) == b"of the child"
    store.close()


LOCK_CHECK = """
import sys
from pathlib import Path
from persistency.errors import JobLocked
from persistency.storage.files import Claim
try:
    Claim(Path(sys.argv[1]))
except JobLocked as error:
    print(error.pid)
else:
    print("free")
"""


def test_the_lock_survives_other_handles_on_the_file(root: DirectoryRoot) -> None:
    """Opening and closing a job's files here, by sqlite3 or plainly, leaves the job locked for other processes."""
    store = root.open("alpha", OPTIONS)
    store.apply([b"c", b"k", b"v"], 1)
    path = root.path("alpha")
    other = sqlite3.connect(path)
    assert other.execute("SELECT payload FROM kv").fetchall() == [(b"v",)]
    other.close()
    for file in root.directory.iterdir():
        file.open("rb").close()
    assert run_child(LOCK_CHECK, path).stdout.strip() == str(os.getpid())
    with contextlib.suppress(Corrupt):  # the other library may have taken itself for the last one, and the log away
        store.close()
    assert run_child(LOCK_CHECK, path).stdout.strip() == "free"


def test_one_claim_at_a_time_in_one_process(tmp_path: Path) -> None:
    """A second claim in the same process is refused too, until the first is released; releasing twice is nothing."""
    first = files.Claim(tmp_path / "a.db")
    with pytest.raises(JobLocked) as caught:
        files.Claim(tmp_path / "a.db")
    assert caught.value.pid == os.getpid()
    assert (tmp_path / "a.lock").read_text().splitlines()[0] == str(os.getpid())
    first.release()
    second = files.Claim(tmp_path / "a.db")
    first.release()  # must not close the descriptor that the second has now
    with pytest.raises(JobLocked):
        files.Claim(tmp_path / "a.db")
    second.release()
    assert [path.name for path in tmp_path.iterdir()] == ["a.lock"]


@pytest.mark.parametrize("text", [b"", b"not a number", b"\xff" * 40, b"12 34"])
def test_an_owner_that_left_no_pid(text: bytes, tmp_path: Path) -> None:
    """A locked job whose lock file holds no number is still `JobLocked`, with no pid."""
    with (tmp_path / "a.lock").open("wb") as held:
        held.write(text)
        held.flush()
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(JobLocked) as caught:
            files.Claim(tmp_path / "a.db")
    assert caught.value.pid is None
    files.Claim(tmp_path / "a.db").release()


def test_a_lock_file_left_behind_is_no_lock(tmp_path: Path) -> None:
    """A lock file with an old, longer pid in it is taken over, and holds the new pid alone."""
    (tmp_path / "a.lock").write_bytes(b"99999999999999\n")
    claim = files.Claim(tmp_path / "a.db")
    assert (tmp_path / "a.lock").read_text().splitlines()[0] == str(os.getpid())
    claim.release()


@pytest.mark.parametrize(
    "lines",
    [
        "{pid}\n",
        "{pid}\nversion 7\ncrc 1\n",
        "{pid}\nversion 7\nused_ms 1\ncrc 99\n",
        "0{pid}\nversion 7\nused_ms 1\n{crc}",
        "{pid}\nversion 07\nused_ms 1\n{crc}",
        "{pid}\nversion 7\nused_ms 1\nmore 1\n{crc}",
        "{pid}\nused_ms 1\nversion 7\n{crc}",
        "{pid}\nversion 7\nused_ms -1\n{crc}",
        "{pid}\nused_ms 1\n{crc}",
        "{pid}\nversion 7 \nused_ms 1\n{crc}",
        "{pid}\nversion 7\nused_ms 1\n{crc}x",
    ],
)
def test_a_record_that_isnt_whole_says_who_had_the_job_and_no_more(lines: str, tmp_path: Path) -> None:
    """Also one whose sum is right: what isn't as it is written is believed nothing of, and written anew."""
    body = lines.format(pid=os.getpid(), crc="")
    lock = tmp_path / "a.lock"
    lock.write_bytes(lines.format(pid=os.getpid(), crc=f"crc {crc32(body.rstrip('x').encode())}\n").encode())
    assert files.read_record(lock) == files.Record(os.getpid())
    files.Claim(tmp_path / "a.db").release()
    assert lock.read_bytes().split()[:3] == [b"%d" % os.getpid(), b"version", b"0"]
    assert lock.stat().st_size == 128


@pytest.mark.parametrize(
    ("record", "writes"),
    [
        ((7, 2_000, 9_000), 0),
        ((7, 3_000, 9_000), 0),
        ((7, 3_001, 9_000), 1),
        ((7, 1_999, 9_000), 1),
        ((8, 2_000, 9_000), 1),
        ((7, 2_000, None), 1),
        ((7, 2_000, 9_001), 1),
    ],
)
def test_an_opening_is_noted_unless_it_comes_right_after_the_last_use(
    record: tuple[int, int, int | None], writes: int, tmp_path: Path
) -> None:
    """Within a second the record stays as it is; whatever else has changed is written, and the next use in any case."""
    claim = files.Claim(tmp_path / "a.db")
    claim.note(7, 2_000, 9_000)
    before = (tmp_path / "a.lock").read_bytes()
    claim.note_opening(*record)
    after = (tmp_path / "a.lock").read_bytes()
    assert (after != before) == bool(writes)
    assert claim.record[1:] == (record if writes else (7, 2_000, 9_000))
    claim.note(7, 2_500, 9_000)
    assert files.read_record(tmp_path / "a.lock") == files.Record(os.getpid(), 7, 2_500, 9_000)
    claim.release()


def test_an_opening_is_noted_where_nothing_was_known(tmp_path: Path) -> None:
    """A lock file without a record gets one, whenever the job was used."""
    claim = files.Claim(tmp_path / "a.db")
    claim.note_opening(0, 0, None)
    assert files.read_record(tmp_path / "a.lock") == files.Record(os.getpid(), 0, 0, None)
    claim.release()


def test_a_record_is_written_where_another_process_had_the_job(tmp_path: Path) -> None:
    """As soon as the job is claimed, its lock file says by whom, and what it said of the job is still there."""
    lock = tmp_path / "a.lock"
    for pid in (os.getpid(), os.getpid() + 1, 1):
        claim = files.Claim(tmp_path / "a.db")
        claim.note(7, 1_000, 2_000)
        claim.release()
        text = lock.read_bytes()
        body = b"%d\n" % pid + text.partition(b"\n")[2].partition(b"crc ")[0]
        lock.write_bytes((body + b"crc %d\n" % crc32(body)).ljust(128))
        assert files.read_record(lock) == files.Record(pid, 7, 1_000, 2_000)
        claim = files.Claim(tmp_path / "a.db")
        assert claim.record == files.Record(pid, 7, 1_000, 2_000)
        assert files.read_record(lock) == files.Record(os.getpid(), 7, 1_000, 2_000)
        claim.release()


def test_a_lock_file_dropped_under_the_claim_is_not_owned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever locks a file that was unlinked meanwhile tries again, and ends up with the file the name means."""
    lock, real = tmp_path / "a.lock", fcntl.flock
    losses = iter([lock.unlink, lambda: (lock.unlink(), lock.touch())])

    def losing(handle: int, operation: int) -> None:
        next(losses, lambda: None)()
        real(handle, operation)

    monkeypatch.setattr(files.fcntl, "flock", losing)
    claim = files.Claim(tmp_path / "a.db")
    monkeypatch.undo()
    assert lock.read_text().splitlines()[0] == str(os.getpid())
    with pytest.raises(JobLocked):
        files.Claim(tmp_path / "a.db")
    assert run_child(LOCK_CHECK, tmp_path / "a.db").stdout.strip() == str(os.getpid())
    claim.release()


def descriptors(root: DirectoryRoot) -> list[str]:
    """Return the files of a root that this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the listing's own
            found.append(os.readlink(f"/proc/self/fd/{number}"))
    return [name for name in found if name.startswith(str(root.directory))]


def test_a_failed_open_gives_the_job_up(root: DirectoryRoot) -> None:
    """An opening that fails, at whatever point, leaves no lock and no descriptor behind, and can be tried again."""
    root.directory.mkdir()
    path = root.path("alpha")
    path.write_bytes(b"garbage" * 1000)
    for _ in range(5):
        with pytest.raises(Corrupt):
            root.open("alpha", OPTIONS)
    assert descriptors(root) == []
    assert run_child(LOCK_CHECK, path).stdout.strip() == "free"
    path.unlink()
    root.open("alpha", OPTIONS).close()


def test_open_and_close_leak_no_descriptor(root: DirectoryRoot) -> None:
    """Opening, using and closing a job leaves no descriptor open."""
    root.open("alpha", OPTIONS).close()
    for _ in range(5):
        store = root.open("alpha", OPTIONS)
        store.apply([b"c", b"k", b"v"], 1)
        assert descriptors(root)
        store.close()
    assert descriptors(root) == []


@pytest.mark.parametrize("late", [False, True])
def test_a_moved_file_is_seen_without_a_descriptor_to_be_had(
    root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """What is at hand in any case, the names, is looked at for every commit; nothing else fails for it."""
    store = root.open("alpha", OPTIONS)
    if late:
        store.apply([b"c", b"k", b"v"], 1)

    def refuse(*_args: object) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    with monkeypatch.context() as patch:
        if not late:
            patch.setattr(os, "open", refuse)
        store.apply([b"c", b"l", b"v"], 1)
        store.apply([b"c", b"m", b"v"], 1)
        path = root.path("alpha")
        path.rename(path.with_suffix(".elsewhere"))
        with pytest.raises(Corrupt, match="removed, renamed or replaced"):
            store.apply([b"c", b"n", b"v"], 1)
    with pytest.raises(Corrupt, match="removed, renamed or replaced"):
        store.close()
    assert descriptors(root) == []


# -- removal -----------------------------------------------------------------------------------------------------


def test_drop_removes_a_jobs_files_and_no_others(root: DirectoryRoot) -> None:
    """Dropping a job removes its files and tells which, leaves the others', and a second time there is nothing."""
    place = root.directory
    for job_id in ("alpha", "alpha.db", "alpha2"):
        root.open(job_id, OPTIONS).close()
    for suffix in ("-wal", "-shm", "-journal"):
        (place / f"alpha.db{suffix}").write_bytes(b"left by a crash")
    (place / "alpha.db.bak").write_bytes(b"somebody's")
    others = {name: digest for name, digest in contents(place).items() if not name.startswith("alpha.db-")}
    del others["alpha.db"]
    names = ["alpha.db", "alpha.db-wal", "alpha.db-shm", "alpha.db-journal", "alpha.lock"]
    assert root.drop("alpha") == [place / name for name in names]
    assert contents(place) == others
    assert root.drop("alpha") == []
    assert root.drop("never existed") == []
    assert contents(place) == others


def test_drop_in_a_root_that_does_not_exist(root: DirectoryRoot) -> None:
    """Dropping a job of a root that isn't there is fine, and doesn't make the root."""
    assert root.drop("alpha") == []
    assert not root.directory.exists()


def test_drop_refuses_what_is_not_a_file(root: DirectoryRoot) -> None:
    """Promise 11: a link in a job's place isn't deleted, nor what it names."""
    root.directory.mkdir()
    target = root.directory.parent / "precious"
    target.write_text("x")
    (root.directory / "alpha.db").symlink_to(target)
    with pytest.raises(Unavailable, match="is a link"):
        root.drop("alpha")
    assert target.read_text() == "x"
    assert (root.directory / "alpha.db").is_symlink()


@pytest.mark.parametrize("kind", ["text", "another program's database", "another job's"])
def test_drop_refuses_what_is_not_ours(kind: str, root: DirectoryRoot) -> None:
    """Promise 11: a file that isn't this job's stays when the job is dropped."""
    path = root.path("alpha")
    if kind == "another job's":
        root.open("beta", StoreOptions()).close()
        root.path("beta").rename(path)
    else:
        root.directory.mkdir()
        if kind == "text":
            path.write_text("not a database at all, but a text somebody has kept here\n" * 100)
        else:
            connection = sqlite3.connect(path)
            connection.execute("CREATE TABLE bookmarks (url TEXT)")
            connection.close()
    before = path.read_bytes()
    with pytest.raises(Corrupt):
        root.drop("alpha")
    assert path.read_bytes() == before


def test_drop_takes_a_damaged_file_of_ours(root: DirectoryRoot) -> None:
    """A job that can't be read any more can still be dropped."""
    root.open("alpha", StoreOptions()).close()
    path = root.path("alpha")
    path.write_bytes(path.read_bytes()[:100] + b"\xff" * (path.stat().st_size - 100))
    assert path in root.drop("alpha")
    assert not path.exists()


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_drop_that_cannot_delete_is_an_error(suffix: str, root: DirectoryRoot) -> None:
    """What can't be deleted is `Unavailable`, names the file, and gives the job up again."""
    root.directory.mkdir()
    stuck = root.directory / f"alpha.db{suffix}"
    stuck.mkdir()
    for _ in range(2):
        with pytest.raises(Unavailable, match=stuck.name):
            root.drop("alpha")
    stuck.rmdir()
    root.open("alpha", OPTIONS).close()


def test_drop_without_permission_is_an_error(root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that refuses the deletion makes it `Unavailable` with the cause, and the job is whole still."""
    store = root.open("alpha", OPTIONS)
    store.apply([b"c", b"k", b"v"], 1)
    store.close()
    before = contents(root.directory)

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(Unavailable, match=r"alpha\.db") as caught:
        root.drop("alpha")
    monkeypatch.undo()
    assert isinstance(caught.value.__cause__, PermissionError)
    assert contents(root.directory) == before
    assert root.open("alpha", OPTIONS).get(b"c", b"k", 1) == b"v"


def test_the_database_is_deleted_first(root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """A drop that is cut short has removed the rows' file first, so what is left can't come back as half a job."""
    store = root.open("alpha", OPTIONS)
    store.apply([b"c", b"k", b"v"], 1)
    store.close()
    (root.directory / "alpha.db-wal").write_bytes(b"left")
    real, removed = Path.unlink, []

    def once(path: Path, missing_ok: bool = False) -> None:
        if removed:
            raise OSError(5, "Input/output error")
        real(path)
        removed.append(path.name)

    monkeypatch.setattr(Path, "unlink", once)
    with pytest.raises(Unavailable):
        root.drop("alpha")
    monkeypatch.undo()
    assert removed == ["alpha.db"]
    store = root.open("alpha", OPTIONS)
    assert store.last_version == 0
    assert store.get(b"c", b"k", 1) is None
    store.close()


@pytest.mark.parametrize("name", ["open", "fsync", "fchmod"])
def test_what_the_system_refuses_is_unavailable(
    name: str, root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the operating system while a job is opened is `Unavailable`, never a bare `OSError`."""
    root.directory.mkdir()

    def refuse(*_arguments: Any, **_options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, name, refuse)
    with pytest.raises(StorageError) as caught:
        root.open("alpha", OPTIONS)
    monkeypatch.undo()
    assert isinstance(caught.value, PersistencyError)
    assert run_child(LOCK_CHECK, root.path("alpha")).stdout.strip() == "free"
    root.open("alpha", OPTIONS).close()
