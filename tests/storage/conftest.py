"""What the storage tests share: a root, child processes, and a file system that fails when it is told to."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import pytest

import persistency
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import Store, StoreOptions
from persistency.storage.sqlite import SqliteStore

_numbers = itertools.count()


def fault(code: int) -> apsw.Error:
    """Return SQLite's error of an extended code, as its own file system would give it."""
    error: apsw.Error = apsw.exception_for(code)
    error.result, error.extendedresult = code & 0xFF, code
    return error


class FaultyDisk(apsw.VFS):
    """A file system that notes every read, write and sync of a job's files and fails one of them, or all from there.

    `calls` has (operation, kind of file) pairs; `arm` counts from its own call on.
    """

    def __init__(self) -> None:
        self.name = f"faulty{next(_numbers)}"
        self.calls: list[tuple[str, str]] = []
        self.disarm()
        super().__init__(self.name, "unix")

    def arm(self, operation: str, at: int, code: int, *, sticky: bool = False) -> None:
        """Let the `at`-th operation from now on fail, once or (`sticky`) it and all after it."""
        self.operation, self.at, self.code, self.sticky, self.fired = operation, at, code, sticky, 0

    def disarm(self) -> None:
        """Fail no more."""
        self.arm("", 0, 0)

    def note(self, operation: str, kind: str) -> None:
        """Take down a call, and fail if it is its turn."""
        self.calls.append((operation, kind))
        if operation == self.operation:
            self.at -= 1
            if self.at == 0 or (self.at < 0 and self.sticky):
                self.fired += 1
                raise fault(self.code)

    def syncs(self, kind: str = "wal") -> int:
        """Return how many syncs of a kind of file there were since `calls` was cleared."""
        return self.calls.count(("sync", kind))

    def xOpen(self, name: Any, flags: list[int]) -> FaultyFile:  # noqa: N802 - apsw's name
        return FaultyFile(self, name, flags)


class FaultyFile(apsw.VFSFile):
    """One open file of a `FaultyDisk`."""

    def __init__(self, disk: FaultyDisk, name: Any, flags: list[int]) -> None:
        self.disk = disk
        kinds = {apsw.SQLITE_OPEN_WAL: "wal", apsw.SQLITE_OPEN_MAIN_DB: "db"}
        self.kind = next((kind for flag, kind in kinds.items() if flags[0] & flag), "other")
        super().__init__("unix", name, flags)

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802
        self.disk.note("read", self.kind)
        return super().xRead(amount, offset)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        self.disk.note("write", self.kind)
        super().xWrite(data, offset)

    def xSync(self, flags: int) -> None:  # noqa: N802
        self.disk.note("sync", self.kind)
        super().xSync(flags)


@contextmanager
def statements(store: SqliteStore) -> Iterator[list[str]]:
    """Collect the statements a store runs."""
    ran: list[str] = []

    def note(_cursor: Any, sql: str, _bindings: Any) -> bool:
        ran.append(sql)
        return True

    store._connection.exec_trace = note
    try:
        yield ran
    finally:
        store._connection.exec_trace = None


@pytest.fixture
def disk() -> Iterator[FaultyDisk]:
    """A file system that fails on command."""
    made = FaultyDisk()
    yield made
    made.unregister()


@pytest.fixture
def root(place: Path) -> DirectoryRoot:
    """A root that doesn't exist yet, in a directory with nothing else in it."""
    return DirectoryRoot(place / "root")


@pytest.fixture
def fresh(place: Path) -> Callable[[], Store]:
    """A function that opens a new, empty store of SQLite's each time."""
    root = DirectoryRoot(place / "fresh")
    return lambda: root.open(f"job{next(_numbers)}", StoreOptions())


def child_environment() -> dict[str, str]:
    """Return an environment in which a child process finds the package these tests test."""
    return {**os.environ, "PYTHONPATH": str(Path(persistency.__file__).parents[1])}


def run_child(code: str, *arguments: object, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process of its own; one that hangs fails the test."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=child_environment(), capture_output=True, text=True, timeout=timeout, check=False
    )


class Owner:
    """A child process that has a job open, until it is killed; `pid` is its process id."""

    CODE = """
import sys
import tempfile
from pathlib import Path
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import StoreOptions
store = DirectoryRoot(Path(sys.argv[1])).open(sys.argv[2], StoreOptions())
store.apply([b"c", b"k", b"of the child"], 1)
print("open", flush=True)
sys.stdin.read()
"""

    def __init__(self, directory: Path, job_id: str) -> None:
        command = [sys.executable, "-c", self.CODE, str(directory), job_id]
        self._process = subprocess.Popen(
            command, env=child_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "open\n"
        self.pid = self._process.pid

    def kill(self) -> None:
        """End it as `kill -9` does, and wait until it is gone."""
        self._process.kill()
        self._process.communicate(timeout=30)


@pytest.fixture
def owner(root: DirectoryRoot) -> Iterator[Owner]:
    """Another process that has the job "held" of the root open."""
    child = Owner(root.directory, "held")
    yield child
    child.kill()


def contents(directory: Path) -> dict[str, str]:
    """Return a digest of every regular file below a directory and the kind of everything else, but no lock files."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = oct(path.lstat().st_mode)
    return {name: digest for name, digest in found.items() if not name.endswith(".lock")}
