"""The reader: a job as whoever doesn't own it sees it, with every verb that changes nothing.

Rules:
  1. It asks nothing of the job's owner and holds nothing of the file between two reads: it never keeps anybody waiting.
  2. It sees what was committed before the read began; what waits in the owner's mailbox it doesn't.
  3. Where jobs are files nobody tells a reader of a commit: there it has no request that waits for one.
  4. Under an event loop another thread reads: how long a file is in use, some other process decides.

Doesn't know: which engine stores the rows, who owns the job.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Generator
from pathlib import Path

from persistency import lifecycle
from persistency.actor.clock import Clock
from persistency.actor.failures import FailureLog
from persistency.actor.mailbox import Mailbox
from persistency.actor.reply import Reply
from persistency.actor.worker import Worker
from persistency.arguments import as_flag
from persistency.closing import Closing
from persistency.driving import adrive, drive
from persistency.errors import Closed, Misuse
from persistency.messages import name_ops
from persistency.ops import Change
from persistency.options import JobOptions
from persistency.reads import Reads
from persistency.registry import Site
from persistency.storage.port import Following, Readable, Store

_OPTIONS = JobOptions(inline=False)


class Reader(Reads):
    """A read-only view of a job. Made by `Persistency.open_reader`; any thread and any event loop may use it."""

    __slots__ = ("_told", "_worker")

    def __init__(self, job_id: str, find_path: Callable[[str], Path | None], mailbox: Mailbox, worker: Worker) -> None:
        super().__init__(job_id, find_path, mailbox, worker.clock.look_ms, keeps_changes=True)
        self._worker = worker
        self._told = isinstance(worker.store, Following)  # of what others commit

    def changes(self, after: int, limit: int, *, wait: bool = False) -> Reply[list[Change]]:
        """Ask for the first `limit` changes with a version above `after`, of a job that keeps them.

        The reply raises `FeedTruncated` if one of them is no longer kept, and `Misuse` if the job keeps none. To `wait`
        for one is `Misuse` as well where jobs are files: nobody would tell. Ask again later.
        """
        if as_flag(wait, "wait"):
            self._check_told()
        return super().changes(after, limit, wait=wait)

    def _check_told(self) -> None:
        """Raise `Misuse` if nobody tells this reader of what its owner commits, so that it can't wait for that."""
        if not self._told:
            raise Misuse(f"a reader of job {self.id!r} can't wait for changes: ask again later, without wait")

    def close(self) -> None:
        """Answer what was asked for and give everything up; a second call is nothing."""
        self._leave().result()

    async def aclose(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        await self._leave()

    def _leave(self) -> Reply[None]:
        """Begin to close; the reply is what `close` waits for."""
        self._mailbox.check_here()
        self._closed = True
        self._mailbox.close(lambda: Closed(f"the reader of job {self.id!r} is closed", hint="Open another one."))
        return self._worker.close()

    def __repr__(self) -> str:
        return f"<Reader of {self.id!r}{' (closed)' if self._closed else ''}>"

    def __del__(self) -> None:
        if not self._closed and self._mailbox.abandoned is None:  # in a forked child it is the parent's
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)
            self._leave()


class Readers:
    """The readers that one `Persistency` has open; one that is dropped leaves by itself."""

    def __init__(self) -> None:
        self._closed = False
        self._open: dict[int, weakref.ref[Reader]] = {}

    def opening(
        self,
        job_id: str,
        root: Readable,
        find_path: Callable[[str], Path | None],
        read_ms: Callable[[], int],
        exit_timeout: float,
    ) -> Generator[Reply[None], None, Reader]:
        """Open a reader of a job; yields the reply to wait for."""
        mailbox = Mailbox(_OPTIONS.bounds)
        failures = FailureLog(job_id, None, mailbox.never_waits)

        def open_store() -> Store:
            store = root.look_into(job_id, read_ms())
            if isinstance(store, Following):
                store.follow(mailbox.ring)
            return store

        worker = Worker(
            job_id,
            mailbox,
            failures,
            open_store=open_store,
            clock=Clock(read_ms),
            name_ops=name_ops,
            stall_timeout=0.0,
            waiters_max=_OPTIONS.requests_max,
        )
        worker.closed.add_done_callback(lambda _closed: lifecycle.forget(worker))
        try:
            lifecycle.look_after(job_id, worker, failures, exit_timeout)
            lifecycle.begin(worker)
            yield worker.opened
        except BaseException:
            worker.close()
            raise
        return self._keep(Reader(job_id, find_path, mailbox, worker))

    def _keep(self, reader: Reader) -> Reader:
        at, left = id(reader), self._open
        left[at] = weakref.ref(reader, lambda _gone: left.pop(at, None))
        if self._closed:
            reader._leave()
            raise Closed(f"the Persistency was closed while a reader of job {reader.id!r} opened")
        return reader

    def leave(self) -> dict[str, Reply[None]]:
        """Begin to close all of them, and those that are just being opened; return the replies to wait for, by name."""
        self._closed = True
        readers = [reader for reader in (found() for found in list(self._open.values())) if reader is not None]
        return {f"reader {at} of {reader.id}": reader._leave() for at, reader in enumerate(readers, 1)}


class Reading(Closing):
    """How a `Persistency` opens readers."""

    _readers: Readers
    _site: Site
    _read_ms: Callable[[], int]
    _open_timeout: float | None
    _exit_timeout: float

    def _check_open(self) -> None:
        """Raise `Closed`, or `Forked`. To be overridden."""

    def open_reader(self, job_id: str) -> Reader:
        """Open a read-only view of a job, which another process may own, or nobody; it never keeps an owner waiting.

        Raises `JobNotFound` if there is no such job, `Misuse` for a bad id or for jobs in memory, `Unavailable`,
        `Corrupt`, `SchemaTooNew` or another `StorageError` if its file can't be read, `TimeoutError`.
        """
        return drive(self._reading(job_id), self._open_timeout)

    async def aopen_reader(self, job_id: str) -> Reader:
        """Do what `open_reader` does, without blocking the event loop."""
        return await adrive(self._reading(job_id), self._open_timeout)

    def _reading(self, job_id: str) -> Generator[Reply[None], None, Reader]:
        self._check_open()
        root = self._site.root
        root.path(job_id)
        if not isinstance(root, Readable):
            raise Misuse("jobs in memory have no readers: read them through their own handles")
        return self._readers.opening(job_id, root, root.path, self._read_ms, self._exit_timeout)
