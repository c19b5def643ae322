"""The compile cache under attack: damage, links, strangers, other processes, full disks; and its budget."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from time import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistency import Misuse

pytest.importorskip("wasmtime", reason="needs the extra plugins")

from persistency.plugins import cache as module
from persistency.plugins.cache import ENTRY_BYTES_MAX, LEFTOVER_SECONDS, CompileCache

WAIT = 60.0
PROJECT = Path(__file__).parent.parent
NOBODY = 65_534
HEAD = 40  # bytes before an entry's data

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def name_of(number: int) -> str:
    """Give a name as compiled code has one."""
    return f"{sha256(b'code %d' % number).hexdigest()}-{'5' * 32}"


NAME = name_of(0)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Name a directory that isn't there yet."""
    return tmp_path / "cache"


@pytest.fixture
def cache(directory: Path) -> CompileCache:
    """Give an empty cache."""
    return CompileCache(directory)


def path_of(directory: Path, name: str = NAME) -> Path:
    """Return where an entry is."""
    return directory / f"{name}.compiled"


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the events that were logged, all of them warnings."""
    assert {record.levelno for record in caplog.records} <= {logging.WARNING}
    return [getattr(record, "persistency_event", "") for record in caplog.records]


def filled(directory: Path, sizes: list[int]) -> list[Path]:
    """Make entries of so many bytes, the first the oldest by an hour each."""
    cache = CompileCache(directory)
    paths = []
    for number, size in enumerate(sizes):
        cache.put(name_of(number), bytes(size - HEAD))
        path = path_of(directory, name_of(number))
        used = time() - 3_600 * (len(sizes) - number)
        os.utime(path, (used, used))
        assert path.stat().st_size == size
        paths.append(path)
    return paths


# -- what is kept ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"x", bytes(range(256)) * 5_000])
def test_what_was_put_is_given(directory: Path, data: bytes) -> None:
    """By this cache, by another, after another name was put, and until it's dropped or replaced."""
    cache = CompileCache(directory, None)
    assert cache.get(NAME) is None
    cache.put(NAME, b"what was there before")
    cache.put(NAME, data)
    cache.put(name_of(1), b"other")
    assert cache.get(NAME) == CompileCache(directory).get(NAME) == data
    cache.drop(name_of(1))
    cache.drop(name_of(1))
    assert (cache.get(name_of(1)), cache.get(NAME)) == (None, data)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o777])
def test_what_is_made_is_ours_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    """The directory 0700, an entry 0600."""
    (tmp_path / "above").mkdir()
    before = os.umask(umask)
    try:
        CompileCache(tmp_path / "above" / "cache").put(NAME, b"data")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "above" / "cache").stat().st_mode) == 0o700
    assert stat.S_IMODE(path_of(tmp_path / "above" / "cache").stat().st_mode) == 0o600


def test_a_missing_directory_is_no_error_and_is_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """S1-13: with all that is missing above it; and made again if it's removed."""
    directory = tmp_path / "a" / "b" / "cache"
    cache = CompileCache(directory, 10_000)
    shutil.rmtree(tmp_path / "a")
    assert cache.get(NAME) is None
    cache.drop(NAME)
    assert not directory.exists()
    cache.put(NAME, b"data")
    assert cache.get(NAME) == b"data"
    assert events(caplog) == []


def test_a_link_to_a_directory_is_followed_once(tmp_path: Path) -> None:
    """A link in its path is the service's own business; what it leads to later is somebody else's."""
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    cache = CompileCache(tmp_path / "link")
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("elsewhere")
    cache.put(NAME, b"data")
    assert path_of(tmp_path / "real").exists()
    assert not (tmp_path / "elsewhere").exists()


# -- damage ------------------------------------------------------------------------------------------------------------


def damages() -> Iterator[tuple[str, Callable[[bytes], bytes]]]:
    """Give what may become of a file, each with its name."""

    def flipped(at: int, bit: int) -> Callable[[bytes], bytes]:
        return lambda whole: whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :]

    for at in (*range(HEAD + 2), HEAD + 499, HEAD + 999):
        yield f"bit {at % 8} of byte {at}", flipped(at, at % 8)
    for size in (0, 1, 7, 8, 39, 40, 41, HEAD + 500, HEAD + 999):
        yield f"{size} bytes", lambda whole, size=size: whole[:size]
    yield "longer", lambda whole: whole + b"\0"
    yield "twice", lambda whole: whole * 2
    yield "zeros", lambda whole: bytes(len(whole))
    yield "without its head", lambda whole: whole[HEAD:]
    yield "with another's checksum", lambda whole: whole[:8] + sha256(whole[HEAD:]).digest() + whole[HEAD:]
    yield "of another format", lambda whole: b"PSTYWAC0" + whole[8:]


@pytest.mark.parametrize("damage", [each for _, each in damages()], ids=[name for name, _ in damages()])
def test_a_damaged_entry_is_told_removed_and_not_given(
    directory: Path, cache: CompileCache, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    """A flipped bit wherever it may be, a cut, and a checksum of the data alone."""
    cache.put(NAME, os.urandom(1_000))
    path = path_of(directory)
    path.write_bytes(damage(path.read_bytes()))
    assert cache.get(NAME) is None
    assert events(caplog) == ["compile_cache_damaged"]
    assert path.name in caplog.records[0].message
    assert not path.exists()
    cache.put(NAME, b"compiled again")
    assert cache.get(NAME) == b"compiled again"


@given(st.binary(min_size=1, max_size=300), st.data())
@settings(deadline=None)
def test_no_change_of_an_entry_goes_unseen(tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: Any) -> None:
    """Whatever is written over it, cut off or put behind: it's the very data, or nothing."""
    directory = tmp_path_factory.getbasetemp() / "changed"
    cache = CompileCache(directory)
    cache.put(NAME, whole)
    path = path_of(directory)
    before = path.read_bytes()
    at = data.draw(st.integers(0, len(before)))
    after = before[:at] + data.draw(st.binary(max_size=9)) + before[at + data.draw(st.integers(0, 9)) :]
    path.write_bytes(after)
    assert cache.get(NAME) == (whole if after == before else None)


def test_an_entry_in_the_place_of_another_is_not_given(
    directory: Path, cache: CompileCache, caplog: pytest.LogCaptureFixture
) -> None:
    """The checksum covers the name, and with it the code and what it was compiled for."""
    of_other_code = name_of(1)
    of_other_engine = NAME[:-1] + "6"
    for name in (of_other_code, of_other_engine):
        cache.put(name, b"sound, and another's")
        os.replace(path_of(directory, name), path_of(directory))
        assert cache.get(NAME) is None
        assert not path_of(directory).exists()
    assert events(caplog) == ["compile_cache_damaged"] * 2


# -- strangers ---------------------------------------------------------------------------------------------------------


def linked(path: Path) -> None:
    """Put a link to a sound entry there."""
    path.rename(path.parent.parent / "sound")
    path.symlink_to(path.parent.parent / "sound")


def dangling(path: Path) -> None:
    """Put a link to nothing there."""
    path.unlink()
    path.symlink_to("nowhere")


def piped(path: Path) -> None:
    """Put a pipe there, from which nothing ever comes."""
    path.unlink()
    os.mkfifo(path)


def listening(path: Path) -> None:
    """Put a socket there."""
    path.unlink()
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(path.parent)  # the name of a socket has at most some hundred bytes
        with socket.socket(socket.AF_UNIX) as made:
            made.bind("s")
        os.rename("s", path.name)
    finally:
        os.fchdir(here)
        os.close(here)


def foldered(path: Path) -> None:
    """Put an empty directory there."""
    path.unlink()
    path.mkdir()


def opened(path: Path) -> None:
    """Let everybody write to it."""
    path.chmod(0o666)


def shared(path: Path) -> None:
    """Let a group write to it."""
    path.chmod(0o620)


def given_away(path: Path) -> None:
    """Give it to another user."""
    os.chown(path, NOBODY, -1)


def immense(path: Path) -> None:
    """Make it larger than any, without taking room."""
    os.truncate(path, ENTRY_BYTES_MAX + 1)


STRANGERS = [
    linked, dangling, piped, listening, foldered, opened, shared, immense, pytest.param(given_away, marks=as_root),
]  # fmt: skip


@pytest.mark.parametrize("stranger", STRANGERS)
def test_an_entry_that_is_not_ours_is_not_given_and_removed(
    directory: Path, cache: CompileCache, caplog: pytest.LogCaptureFixture, stranger: Callable[[Path], None]
) -> None:
    """Even with the right bytes in it: who can write to it could have anything run."""
    cache.put(NAME, b"sound")
    stranger(path_of(directory))
    assert cache.get(NAME) is None
    assert events(caplog) == ["compile_cache_damaged"]
    assert not os.path.lexists(path_of(directory))
    if stranger is linked:
        assert (directory.parent / "sound").exists()
    cache.put(NAME, b"ours")
    assert cache.get(NAME) == b"ours"


@pytest.mark.parametrize("stranger", STRANGERS)
def test_writing_replaces_what_is_not_ours(
    directory: Path, cache: CompileCache, caplog: pytest.LogCaptureFixture, stranger: Callable[[Path], None]
) -> None:
    """A link isn't written through; nobody keeps a hand on what is written."""
    cache.put(NAME, b"sound")
    stranger(path_of(directory))
    cache.put(NAME, b"ours")
    if stranger is foldered:  # it can't be renamed over: the purge or the next reader clears it away
        assert events(caplog) == ["compile_cache_unusable"]
        CompileCache(directory)
        cache.put(NAME, b"ours")
    found = path_of(directory).lstat()
    assert stat.S_ISREG(found.st_mode)
    assert (stat.S_IMODE(found.st_mode), found.st_uid) == (0o600, os.geteuid())
    assert cache.get(NAME) == b"ours"
    if stranger is linked:
        assert (directory.parent / "sound").read_bytes()[HEAD:] == b"sound"


@pytest.mark.parametrize("stranger", STRANGERS)
def test_what_is_not_ours_is_cleared_away_at_the_start(directory: Path, stranger: Callable[[Path], None]) -> None:
    """So that it takes no room for ever."""
    CompileCache(directory).put(NAME, b"sound")
    stranger(path_of(directory))
    CompileCache(directory)
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o720, 0o1777, 0o702])
def test_a_directory_that_others_can_write_to_is_refused(directory: Path, mode: int) -> None:
    """A group is others too; the sticky bit doesn't help against new names."""
    directory.mkdir()
    directory.chmod(mode)
    with pytest.raises(
        Misuse, match=rf"cache_dir .* can be written to by others \(mode {mode:04o}\): pass a dir"
    ) as caught:
        CompileCache(directory)
    assert "anything run" in caught.value.hint
    assert stat.S_IMODE(directory.stat().st_mode) == mode


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o750])
def test_a_directory_that_others_can_read_is_taken_as_it_is(directory: Path, mode: int) -> None:
    """There are no secrets in it."""
    directory.mkdir()
    directory.chmod(mode)
    CompileCache(directory).put(NAME, b"data")
    assert stat.S_IMODE(directory.stat().st_mode) == mode


@as_root
def test_a_directory_of_somebody_else_is_refused(directory: Path) -> None:
    """Even by root, who could use it."""
    directory.mkdir(mode=0o700)
    os.chown(directory, NOBODY, -1)
    with pytest.raises(Misuse, match=f"cache_dir .* belongs to another user \\(uid {NOBODY}\\): pass a directory"):
        CompileCache(directory)


@pytest.mark.parametrize("name", ["file", "file/below", "file/further/below"])
def test_a_file_is_no_directory(tmp_path: Path, name: str) -> None:
    """Nor is what lies under one."""
    (tmp_path / "file").write_text("precious")
    with pytest.raises(Misuse, match="is, or lies under, a file: pass the path of a directory"):
        CompileCache(tmp_path / name)
    assert (tmp_path / "file").read_text() == "precious"


def test_what_is_no_path_is_refused() -> None:
    """A NUL ends a path for the system, and only for it."""
    with pytest.raises(Misuse, match="is no path"):
        CompileCache(Path("a\0b"))


def test_a_directory_that_is_opened_to_others_meanwhile_is_not_used_any_more(
    directory: Path, cache: CompileCache, caplog: pytest.LogCaptureFixture
) -> None:
    """It's looked at each time; a load goes on without it, and it's told once."""
    cache.put(NAME, b"sound")
    directory.chmod(0o777)
    assert cache.get(NAME) is None
    cache.put(name_of(1), b"other")
    cache.drop(NAME)
    assert events(caplog) == ["compile_cache_unusable"]
    assert [path.name for path in directory.iterdir()] == [path_of(directory).name]
    directory.chmod(0o700)
    assert cache.get(NAME) == b"sound"


@as_root
def test_a_directory_that_is_replaced_meanwhile_is_not_used(
    directory: Path, cache: CompileCache, caplog: pytest.LogCaptureFixture
) -> None:
    """By somebody else's, with entries that are in order; or by a link to it."""
    cache.put(NAME, b"ours")
    theirs = directory.with_name("theirs")
    shutil.copytree(directory, theirs)
    os.chown(theirs, NOBODY, -1)
    directory.rename(directory.with_name("away"))
    theirs.rename(directory)
    assert cache.get(NAME) is None
    directory.rename(theirs)
    directory.symlink_to(theirs)
    assert cache.get(NAME) is None
    directory.unlink()
    directory.symlink_to(directory.with_name("away"))
    assert cache.get(NAME) is None
    assert events(caplog) == ["compile_cache_unusable"]


# -- what goes wrong ---------------------------------------------------------------------------------------------------


def failing(code: int) -> Callable[..., Any]:
    """Give a call of the system that fails."""

    def fail(*_arguments: object, **_more: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EMFILE])
@pytest.mark.parametrize("call", ["open", "replace", "fchmod", "fdopen", "fstat", "scandir", "mkdir"])
def test_a_failing_disk_is_told_once_and_costs_only_the_entry(
    directory: Path,
    cache: CompileCache,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    code: int,
) -> None:
    """Whichever call fails, and however: nothing is raised, nothing half-written stays, no file is left open."""
    cache.put(NAME, b"old")
    if call == "mkdir":
        shutil.rmtree(directory)
    open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(code))
        for _ in range(3):
            cache.put(NAME, b"new")
            cache.put(name_of(1), b"new")
            cache.get(NAME)
            cache.drop(name_of(1))
        CompileCache(directory)
    assert set(events(caplog)) == {"compile_cache_unusable"}
    assert len(events(caplog)) <= 2  # each of the two caches, once
    assert os.strerror(code) in caplog.records[0].message
    if open_before:
        assert len(os.listdir("/proc/self/fd")) == open_before
    if directory.exists():
        assert {path.name for path in directory.iterdir()} <= {path_of(directory).name}
        assert cache.get(NAME) in (b"old", b"new")
    cache.put(name_of(2), b"after")
    assert cache.get(name_of(2)) == b"after"


def test_a_disk_that_fills_up_in_the_middle_leaves_nothing(
    directory: Path, cache: CompileCache, caplog: pytest.LogCaptureFixture
) -> None:
    """With the real error of a real limit: a file may have no more than so many bytes."""
    program = """
import resource, signal, sys
from pathlib import Path
from persistency.plugins.cache import CompileCache
cache = CompileCache(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
cache.put(sys.argv[2], bytes(1_000_000))
assert cache.get(sys.argv[2]) == b"old", cache.get(sys.argv[2])
cache.put(sys.argv[2], bytes(10_000))
assert cache.get(sys.argv[2]) == bytes(10_000)
"""
    cache.put(NAME, b"old")
    done = run(program, str(directory), NAME)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("can't be used as it should: [Errno 27]") == 1
    assert [path.name for path in directory.iterdir()] == [path_of(directory).name]


def test_an_interrupted_attempt_leaves_nothing(
    directory: Path, cache: CompileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C goes through, and takes its file with it."""

    def interrupt(*_arguments: object, **_more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.put(NAME, b"data")
    assert list(directory.iterdir()) == []


def run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a program beside the package."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment, capture_output=True, text=True, timeout=WAIT, check=False,
    )  # fmt: skip


AS_NOBODY = """
import logging, os, sys
from pathlib import Path
from persistency.plugins.cache import CompileCache
from persistency.errors import Misuse
if os.geteuid() == 0:
    os.seteuid(65_534)  # root may read and write everything
directory, name = Path(sys.argv[1]), sys.argv[2]
"""


@pytest.fixture
def nobodys() -> Iterator[Path]:
    """Give a cache with an entry, for a process that isn't root."""
    with tempfile.TemporaryDirectory(prefix="persistency-cache-") as above:
        directory = Path(above) / "cache"
        CompileCache(directory).put(NAME, b"data")
        if os.geteuid() == 0:
            for path in (directory, path_of(directory)):
                os.chown(path, NOBODY, -1)
            os.chmod(above, 0o755)
            if not all(path.stat().st_mode & 0o001 for path in directory.parents):
                pytest.skip("the directory for temporary files is root's alone")
        yield directory
        directory.chmod(0o700)


def test_a_directory_that_cannot_be_read_is_told_and_no_load_fails(nobodys: Path) -> None:
    """S1-19: neither at the start nor later; nor one in which nothing can be made."""
    program = """
directory.chmod(0)
cache = CompileCache(directory, 10)
assert cache.get(name) is None
cache.put(name, b"new")
directory.chmod(0o500)
assert cache.get(name) == b"data"
cache.put(name, b"new")
assert cache.get(name) == b"data"
cache = CompileCache(directory / "in" / "it")
assert cache.get(name) is None
cache.put(name, b"new")
directory.chmod(0o700)
"""
    done = run(AS_NOBODY + program, str(nobodys), NAME)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("can't be used as it should") == 2
    assert "Permission denied" in done.stderr


def test_an_entry_that_cannot_be_read_is_skipped(nobodys: Path) -> None:
    """S1-19: it's passed over, and replaced when the code is compiled."""
    program = """
(directory / f"{name}.compiled").chmod(0)
cache = CompileCache(directory)
assert cache.get(name) is None
assert (directory / f"{name}.compiled").exists()
cache.put(name, b"new")
assert cache.get(name) == b"new"
"""
    done = run(AS_NOBODY + program, str(nobodys), NAME)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("can't be used as it should") == 1


# -- the budget --------------------------------------------------------------------------------------------------------


def kept(paths: list[Path]) -> list[int]:
    """Say which of the entries are there."""
    return [number for number, path in enumerate(paths) if path.exists()]


@pytest.mark.parametrize("bytes_max", [400, 401, 10**9, 2**70, None, 0])
def test_below_the_budget_nothing_is_removed(directory: Path, bytes_max: int | None) -> None:
    """S1-14, S1-12: total <= limit -> nothing; without a limit, which 0 is too, never."""
    paths = filled(directory, [100] * 4)
    CompileCache(directory, bytes_max)
    assert kept(paths) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("sizes", "bytes_max", "left"),
    [
        ([100, 100, 100, 100], 399, [1, 2, 3]),
        ([100, 100, 100, 100], 300, [1, 2, 3]),
        ([100, 100, 100, 100], 299, [2, 3]),
        ([100, 100, 100, 100], 100, [3]),
        ([100, 100, 100, 100], 99, []),
        ([50, 1_000, 50, 50], 200, [2, 3]),
        ([50, 50, 50, 1_000], 200, []),
        ([1_000, 50, 50, 50], 200, [1, 2, 3]),
    ],
)
def test_the_oldest_go_until_the_others_fit(directory: Path, sizes: list[int], bytes_max: int, left: list[int]) -> None:
    """S1-15, S1-16: by last use, as many as it takes, one that is larger than the budget among them."""
    paths = filled(directory, sizes)
    CompileCache(directory, bytes_max)
    assert kept(paths) == left


def test_an_entry_that_is_used_is_young_again(directory: Path) -> None:
    """The budget goes by last use, not by when it was made."""
    paths = filled(directory, [100] * 4)
    assert CompileCache(directory).get(name_of(0)) is not None
    CompileCache(directory, 200)
    assert kept(paths) == [0, 3]


def test_each_new_entry_keeps_within_the_budget(directory: Path) -> None:
    """The oldest makes room; what is put is the last to go."""
    paths = filled(directory, [100] * 4)
    cache = CompileCache(directory, 400)
    cache.put(name_of(9), bytes(150 - HEAD))
    assert kept(paths) == [2, 3]
    assert cache.get(name_of(9)) == bytes(150 - HEAD)


def test_an_entry_larger_than_the_budget_drives_nothing_out(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It isn't even written; what is larger than any entry may be isn't, either."""
    paths = filled(directory, [100] * 2)
    cache = CompileCache(directory, 250)
    cache.put(name_of(9), bytes(251 - HEAD))
    assert (cache.get(name_of(9)), kept(paths)) == (None, [0, 1])
    cache.put(name_of(9), bytes(250 - HEAD))
    assert (cache.get(name_of(9)), kept(paths)) == (bytes(250 - HEAD), [])
    assert events(caplog) == []


def test_what_is_too_large_for_any_budget_is_not_written(
    directory: Path, cache: CompileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would be refused when it's read isn't kept."""
    monkeypatch.setattr(module, "ENTRY_BYTES_MAX", 100)
    cache.put(NAME, bytes(101 - HEAD))
    assert list(directory.iterdir()) == []
    cache.put(NAME, bytes(100 - HEAD))
    assert cache.get(NAME) == bytes(100 - HEAD)


def test_what_is_not_the_caches_own_is_never_removed_nor_counted(directory: Path) -> None:
    """S1-17: a service may pass a directory that has other things in it; the directory itself stays."""
    paths = filled(directory, [100, 100])
    names = ["notes.txt", "x.compiled", f"{NAME}.compiled.bak", f".{NAME}.part", f"{NAME.upper()}.compiled", ".hidden"]
    others = [directory / name for name in (*names, f"sub/{paths[0].name}")]
    (directory / "sub").mkdir()
    for other in others:
        other.write_bytes(bytes(5_000))
        os.utime(other, (1, 1))
    CompileCache(directory, 150)
    assert kept(paths) == [1]
    assert all(other.exists() for other in others)
    CompileCache(directory, 50)
    assert (kept(paths), directory.is_dir()) == ([], True)


def test_what_cannot_be_removed_is_told_passed_over_and_counted(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1-18: the next oldest goes instead."""
    paths = filled(directory, [100] * 4)
    unlink = os.unlink

    def stubborn(name: str, **more: Any) -> None:
        if name == paths[0].name:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        unlink(name, **more)

    monkeypatch.setattr(os, "unlink", stubborn)
    CompileCache(directory, 300)
    assert kept(paths) == [0, 2, 3]
    assert events(caplog) == ["compile_cache_unusable"]
    CompileCache(directory, 99)
    assert kept(paths) == [0]


def test_a_directory_with_something_in_it_is_passed_over(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    """S1-18: nobody's work is removed, even under an entry's name; the others are purged all the same."""
    paths = filled(directory, [100] * 3)
    paths[0].unlink()
    (paths[0] / "inner").mkdir(parents=True)
    cache = CompileCache(directory, 200)
    assert (paths[0] / "inner").is_dir()
    assert cache.get(name_of(0)) is None
    cache.put(name_of(0), b"data")
    assert (paths[0] / "inner").is_dir()
    assert set(events(caplog)) == {"compile_cache_unusable", "compile_cache_damaged"}
    assert events(caplog).count("compile_cache_unusable") == 1


def test_what_cannot_be_looked_at_is_skipped(
    directory: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1-19: another process may just have removed it; the others are purged."""
    paths = filled(directory, [100] * 3)
    scandir = os.scandir

    class Gone:
        def __init__(self, entry: os.DirEntry[str]) -> None:
            self.entry, self.name = entry, entry.name

        def stat(self, *, follow_symlinks: bool) -> os.stat_result:
            if self.name == paths[0].name:
                raise FileNotFoundError(errno.ENOENT, "No such file or directory")
            return self.entry.stat(follow_symlinks=follow_symlinks)

    class Scan:
        def __init__(self, folder: int) -> None:
            self.there = scandir(folder)

        def __enter__(self) -> list[Gone]:
            return [Gone(entry) for entry in self.there]

        def __exit__(self, *_caught: object) -> None:
            self.there.close()

    monkeypatch.setattr(os, "scandir", Scan)
    CompileCache(directory, 100)
    assert kept(paths) == [0, 2]
    assert events(caplog) == []


# -- leftovers ---------------------------------------------------------------------------------------------------------


def test_attempts_that_nobody_will_finish_are_removed(directory: Path) -> None:
    """An old one, also of a clock that was ahead; one that may be being written is left alone, and counted."""
    paths = filled(directory, [100, 100])
    old, ahead, young = (directory / f".{NAME}.{number:016x}.part" for number in range(3))
    for path, moved in [(old, -LEFTOVER_SECONDS - 60), (ahead, LEFTOVER_SECONDS + 60), (young, 0)]:
        path.write_bytes(bytes(100))
        path.chmod(0o600)
        os.utime(path, (time() + moved,) * 2)
    CompileCache(directory, 250)
    assert [path.exists() for path in (old, ahead, young)] == [False, False, True]
    assert kept(paths) == [1]


def test_a_process_that_dies_in_the_middle_leaves_what_the_next_one_clears_away(directory: Path) -> None:
    """Its attempt is never taken for an entry."""
    program = """
import os, signal, sys
from pathlib import Path
from persistency.plugins import cache
os.replace = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
cache.CompileCache(Path(sys.argv[1])).put(sys.argv[2], bytes(100_000))
"""
    assert run(program, str(directory), NAME).returncode == -9
    (attempt,) = directory.iterdir()
    assert attempt.stat().st_size == 100_000 + HEAD
    cache = CompileCache(directory)
    assert cache.get(NAME) is None
    assert attempt.exists()
    os.utime(attempt, (time() - 2 * LEFTOVER_SECONDS,) * 2)
    cache.put(NAME, b"data")
    assert [path.name for path in directory.iterdir()] == [path_of(directory).name]


# -- several at once ---------------------------------------------------------------------------------------------------


def test_processes_and_threads_share_a_directory(directory: Path) -> None:
    """They write, read, drop and purge the same few names at once: each reads what belongs to the name, or nothing."""
    program = """
import logging, random, sys, threading
from pathlib import Path
from persistency.plugins.cache import CompileCache
names, seed = sys.argv[2].split(","), int(sys.argv[3])
print("seed", seed, flush=True)
wrong = []
def play(at):
    chance = random.Random(seed * 10 + at)
    cache = CompileCache(Path(sys.argv[1]), 250_000)
    for turn in range(150):
        name = chance.choice(names)
        data = name.encode() * 600
        what = chance.random()
        if what < 0.45:
            cache.put(name, data)
        elif what < 0.95:
            if cache.get(name) not in (None, data):
                wrong.append(name)
        else:
            cache.drop(name)
threads = [threading.Thread(target=play, args=(at,)) for at in range(3)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print("wrong", len(wrong), flush=True)
"""
    names = [name_of(number) for number in range(6)]
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda seed: run(program, str(directory), ",".join(names), str(seed)), range(4)))
    for each in done:
        assert (each.returncode, each.stdout.split()[-1], each.stderr) == (0, "0", "")
    there = list(directory.iterdir())
    assert all(path.name.endswith(".compiled") for path in there)
    assert sum(path.stat().st_size for path in there) <= 250_000
    cache = CompileCache(directory)
    found = [cache.get(name) for name in names]
    assert any(found)
    assert all(data in (None, name.encode() * 600) for name, data in zip(names, found, strict=True))


def test_two_who_write_one_entry_at_the_same_time_both_succeed(
    directory: Path, cache: CompileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each writes under a name of its own; the last to rename has it."""
    barrier = threading.Barrier(2)
    replace = os.replace

    def together(*arguments: Any, **more: Any) -> None:
        barrier.wait(WAIT)
        replace(*arguments, **more)

    monkeypatch.setattr(os, "replace", together)
    with ThreadPoolExecutor(2) as pool:
        for written in [pool.submit(cache.put, NAME, data) for data in (b"one", b"two")]:
            written.result(WAIT)
    assert cache.get(NAME) in (b"one", b"two")
    assert len(list(directory.iterdir())) == 1


def test_nothing_is_read_while_it_is_written(
    directory: Path, cache: CompileCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it's renamed there is what there was."""
    cache.put(NAME, b"old")
    seen: list[bytes | None] = []
    replace = os.replace

    def looking(*arguments: Any, **more: Any) -> None:
        seen.append(CompileCache(directory).get(NAME))
        replace(*arguments, **more)

    monkeypatch.setattr(os, "replace", looking)
    cache.put(NAME, b"new")
    assert (seen, cache.get(NAME)) == ([b"old"], b"new")


def test_nothing_outside_of_the_directory_is_ever_opened(cache: CompileCache) -> None:
    """A name is 64 digits, a hyphen, and 32 more; anything else is a defect of who calls, and goes nowhere."""
    for name in ("", "..", "../" + NAME, NAME + "/x", NAME.upper(), NAME + "\n", NAME[:-1]):
        for call in (cache.get, cache.drop, lambda name: cache.put(name, b"")):
            with pytest.raises(AssertionError):
                call(name)
