"""What is closed is freed at once, by its last reference: no garbage collection is needed for it.

A service may open and close jobs all the time, and have the collector switched off. (What has failed is Python's own
matter: an error knows the frames it came through, and they know it.)
"""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from persistency import Job, Persistency, Put, key
from persistency.actor.worker import Worker
from persistency.storage.sqlite import SqliteStore
from persistency.storage.table import Table

WAIT = 60
OF_A_JOB = (Worker, SqliteStore, Table)
K = key("k")


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[object]]]:
    """What is made for jobs meanwhile, without the collector."""
    found: list[weakref.ref[object]] = []

    def watch(kind: type) -> None:
        real = kind.__init__  # type: ignore[misc]  # each kind's own

        def init(self: object, *args: object, **options: object) -> None:
            found.append(weakref.ref(self))
            real(self, *args, **options)

        monkeypatch.setattr(kind, "__init__", init)

    for kind in OF_A_JOB:
        watch(kind)
    gc.collect()
    gc.disable()
    try:
        yield found
    finally:
        gc.enable()


def read(job: Job) -> None:
    """Ask, and be answered in place: there never is a thread."""
    assert job.get("c", K).result(WAIT) is None


def write(job: Job) -> None:
    """Have a thread, and all kinds of answers."""
    job.put("c", K, b"v")
    job.delete("c", K)
    job.flush().result(WAIT)
    assert job.commit([Put("c", K, b"w")]).result(WAIT) == 3
    assert len(job.scan("c").result(WAIT)) == 1
    assert job.run(lambda tx: tx.get("c", K)).result(WAIT) == b"w"


def nobody_works() -> None:
    """Wait until the threads of jobs are gone: they are told of a closing in the middle of their last turn."""
    for thread in threading.enumerate():
        if thread.name == "persistency:j":
            thread.join(WAIT)
            assert not thread.is_alive()


@pytest.mark.parametrize("use", [read, write])
def test_a_closed_job_is_freed(tmp_path: Path, made: list[weakref.ref[object]], use: Callable[[Job], None]) -> None:
    """With the last handle goes all that was its job's."""
    with Persistency(tmp_path) as persistency:
        for _ in range(3):
            job = persistency.open_job("j")
            use(job)
            job.close()
            del job
            nobody_works()
            assert made
            assert [ref() for ref in made if ref() is not None] == []
            persistency.drop_job("j")


def test_a_closed_job_of_a_loop_is_freed(tmp_path: Path, made: list[weakref.ref[object]]) -> None:
    """The same under asyncio, where a thread opens it and another one closes it."""

    async def go() -> None:
        persistency = Persistency(tmp_path)
        job = await persistency.aopen_job("j")
        job.put("c", K, b"v")
        assert await job.get("c", K) == b"v"
        await persistency.aclose()

    asyncio.run(go())
    nobody_works()
    assert made
    assert [ref() for ref in made if ref() is not None] == []
