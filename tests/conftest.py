"""What every test relies on, however pytest was started; and a clock and a root, for those who ask for them by name."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from persistency import Persistency
from tests import postgres
from tests.loops import in_loop

__all__ = ["in_loop"]  # a fixture, for every test

# A job in the background of a shell without job control is started with SIGINT ignored, and its children too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Take what was collected out of the collecting of garbage: it is most of a million objects, and looking through
    them took 0.3 s each time.
    """
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Leave nothing on a server that is somebody else's, and to pytest's plugins the garbage as it was."""
    gc.unfreeze()
    postgres.drop_schemas()


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory, in memory where there is one: jobs are opened by the hundred, and no power is cut."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as directory:
        yield Path(os.path.realpath(directory))


T0_MS = 1_700_000_000_000


class Wall:
    """A wall clock in Unix milliseconds that only a test moves; `now` is the same in seconds."""

    def __init__(self) -> None:
        self.ms = T0_MS

    def __call__(self) -> float:
        return self.ms / 1000

    @property
    def now(self) -> float:
        """The time in Unix seconds."""
        return self.ms / 1000

    @now.setter
    def now(self, seconds: float) -> None:
        self.ms = round(seconds * 1000)


@pytest.fixture
def wall() -> Wall:
    """A clock that stands still."""
    return Wall()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a compile cache to hosts in tests that aren't about compiling, which takes a process for each module."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(params=["memory", "directory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Name a root of either kind."""
    return ":memory:" if request.param == "memory" else str(tmp_path / "root")


@pytest.fixture
def persistency(root: str, wall: Wall) -> Iterator[Persistency]:
    """Give an empty root."""
    with Persistency(root, clock=wall) as opened:
        yield opened
