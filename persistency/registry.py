"""The registry: which jobs of a root this process has open, and who holds a lease on each.

Rules:
  1. One worker per job and process. Several `Persistency` objects on one root share it; it lives until the last
     lease on it is given back.
  2. Opening is single-flight: who comes while a job opens takes a lease at once and waits for the same opening.
     A failed opening leaves nothing behind, so it can be tried again.
  3. Who comes while a job closes, or is dropped, waits until it is gone.
  4. The lock guards the tables only; nothing is waited for, opened or closed under it.

Doesn't know: which engine stores the jobs, what is posted to them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from persistency import lifecycle
from persistency.actor.clock import Clock
from persistency.actor.errand import undivided
from persistency.actor.failures import FailureLog
from persistency.actor.mailbox import Mailbox
from persistency.actor.reply import Reply
from persistency.actor.settling import Answer, pending, ready, settle_all
from persistency.actor.worker import GivenUp, Worker
from persistency.errors import Closed, Corrupt, Forked, JobLocked, Misuse, PersistencyError
from persistency.job import Job
from persistency.messages import name_ops
from persistency.options import JobOptions, differing
from persistency.slots import Place, Slots
from persistency.storage.names import file_name
from persistency.storage.port import Barrier, Restoring, Root, Store

if TYPE_CHECKING:
    from persistency.actor.slowness import Slowness

T = TypeVar("T")


class Opener(NamedTuple):
    """What a `Persistency` opens its jobs with. `forget` is called when one of its handles is closed."""

    read_ms: Callable[[], int]
    exit_timeout: float
    slots: Slots | None
    forget: Callable[[Job], None]
    slow_after: float | None = None

    def slowness(self, job_id: str) -> Slowness | None:
        """Return what tells of a job's slow operations, if somebody wants to be told."""
        if self.slow_after is None:
            return None
        from persistency.actor.slowness import Slowness  # only here: few do

        return Slowness(job_id, self.slow_after)


class _Entry:
    """A job that is open, about to be, or about to be gone. `gone` is settled when the next may open it."""

    def __init__(
        self,
        options: JobOptions,
        mailbox: Mailbox,
        worker: Worker | None,
        failures: FailureLog | None,
        place: Place | None = None,
    ) -> None:
        self.options = options
        self.mailbox = mailbox
        self.worker = worker
        self.failures = failures
        self.place = place
        self.leases: set[object] = set()
        self.leaving = worker is None
        self.gone: Reply[None] = pending(mailbox, reads=False)


class Site:
    """One root in this process."""

    def __init__(self, root: Root, *, near: bool = False) -> None:
        self.root = root
        self._near = near  # what opens a store there waits for nobody else's machine
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._entries: dict[str, _Entry] = {}

    def check_here(self) -> None:
        """Raise `Forked` in a child of the process whose site it is."""
        if os.getpid() != self._pid:
            raise Forked("this handle belongs to the process this one was forked from", hint="Open the job anew.")

    def open(
        self, job_id: str, given: dict[str, Any], opener: Opener, *, here: bool
    ) -> Generator[Reply[None], None, Job]:
        """Open a job and return a handle with a lease of its own.

        Yields the replies to wait for on the way. `here`: its store may be opened in this thread.
        """
        file_name(job_id)  # or it is a bad id: nothing is looked up by it
        lease = object()
        while True:
            entry = self._join(job_id, given, lease, opener, here=here and self._near)
            worker = entry.worker
            if worker is None or entry.leaving:
                yield entry.gone
                continue
            try:
                if not worker.opened.done():
                    if entry.mailbox.waits_for_itself():
                        raise Misuse(
                            f"job {job_id!r} is being opened by this very thread, interrupted for this call",
                            hint="In a signal handler use jobs that are open.",
                        )
                    yield worker.opened
                worker.opened.result()
                return self._handle(job_id, entry, lease, opener)
            except GivenUp:  # by somebody else: now it is opened by whoever comes first
                self._leave(entry, lease)
            except BaseException as error:
                why = entry.place.explain() if entry.place is not None and isinstance(error, TimeoutError) else None
                self._leave(entry, lease)
                if why is not None:
                    raise TimeoutError(why) from None
                raise

    def _handle(self, job_id: str, entry: _Entry, lease: object, opener: Opener) -> Job:
        worker = entry.worker
        assert worker is not None

        def release(job: Job, drain: bool, flush: bool) -> Reply[None]:
            reply = self._release(entry, lease, job, drain=drain, flush=flush)
            opener.forget(job)
            return reply

        keeps_changes = entry.options.feed_changes_max > 0
        return Job(
            job_id,
            self.root.path,
            entry.mailbox,
            worker.clock.look_ms,
            worker.statistics,
            release,
            keeps_changes=keeps_changes,
        )

    def drop(self, job_id: str, *, aside: bool) -> Generator[Reply[Any], Any, list[Path]]:
        """Delete a job that nobody here has open; yields the replies to wait for on the way.

        With `aside` the files are deleted in a thread of its own, because that may take a while.
        """
        return (yield from self._alone(job_id, lambda: self.root.drop(job_id), aside=aside))

    def restore(self, job_id: str, path: Path) -> Generator[Reply[Any], Any, None]:
        """Put a backup in the place of a job that nobody here has open."""
        if not isinstance(self.root, Restoring):
            raise Misuse("jobs that have no files can't be restored: use a directory, or import_() an export")
        restore = self.root.restore
        yield from self._alone(job_id, lambda: restore(job_id, path), aside=False)

    def _alone(self, job_id: str, act: Callable[[], T], *, aside: bool) -> Generator[Reply[Any], Any, T]:
        """Do something with a job that nobody has open, and that nobody can open meanwhile."""
        self.root.path(job_id)
        placeholder = _Entry(JobOptions(), Mailbox(JobOptions().bounds), None, None)
        while (entry := self._reserve(job_id, placeholder)) is not placeholder:
            if not entry.leaving:
                raise JobLocked(f"job {job_id!r} is open in this process", os.getpid(), hint="Close it there first.")
            yield entry.gone
        reply: Reply[T] = pending(placeholder.mailbox, reads=False)

        def do() -> None:
            answer: Answer
            try:
                with undivided():
                    answer = (reply, act(), None)
            except BaseException as error:
                answer = (reply, None, error)
            self._gone(job_id, placeholder)
            settle_all([answer])

        if aside:
            try:
                threading.Thread(target=do, name=f"persistency:{job_id}:drop").start()
            except RuntimeError:  # there are no threads any more
                do()
            yield reply
        else:
            do()
        return reply.result()

    def _reserve(self, job_id: str, placeholder: _Entry) -> _Entry:
        with self._lock:
            return self._entries.setdefault(job_id, placeholder)

    def _join(self, job_id: str, given: dict[str, Any], lease: object, opener: Opener, *, here: bool) -> _Entry:
        """Take a lease on an open job, or begin to open it; an entry that is leaving is returned as it is."""
        self.end(job_id)
        entry = fresh = None
        try:
            with self._lock:
                entry = self._entries.get(job_id)
                if entry is not None:
                    if not entry.leaving:
                        self._lease(entry, job_id, given, lease)
                    return entry
                fresh = self._new(job_id, JobOptions(**given), opener)
                # A signal handler that came meanwhile may have opened the job itself.
                entry = self._entries.setdefault(job_id, fresh)
                entry.leases.add(lease)
            if entry is fresh:
                self._begin(job_id, fresh, opener.exit_timeout, here=here)
        except BaseException:  # an interrupt: nobody else knows of the lease
            mine = fresh if entry is None else entry
            if mine is not None and (mine is fresh or lease in mine.leases):
                self._leave(mine, lease)
            raise
        return entry

    def _lease(self, entry: _Entry, job_id: str, given: dict[str, Any], lease: object) -> None:
        """Take a lease on a job that is open. Raises `Misuse` if it was opened with other options."""
        different = differing(entry.options, given)
        if different:
            raise Misuse(
                f"job {job_id!r} is open with another {', '.join(different)}: "
                "leave the option out, or close the job first"
            )
        entry.leases.add(lease)

    def _begin(self, job_id: str, entry: _Entry, exit_timeout: float, *, here: bool) -> None:
        """Have a job opened: `here`, in a thread of its own, or once it has leave to be live."""
        assert entry.worker is not None
        assert entry.failures is not None
        lifecycle.look_after(job_id, entry.worker, entry.failures, exit_timeout)
        if entry.place is not None and entry.place.served and not lifecycle.ends():
            entry.worker.doze()
            entry.mailbox.ring()
        elif here and entry.place is None:
            lifecycle.begin(entry.worker, here=True)
        else:
            lifecycle.begin(entry.worker)

    def _new(self, job_id: str, options: JobOptions, opener: Opener) -> _Entry:
        mailbox = Mailbox(options.bounds)
        failures = FailureLog(job_id, options.on_error, mailbox.never_waits)
        # What doesn't outlive its store would be gone after a rest.
        place = None if opener.slots is None or not self.root.lasting else opener.slots.place(mailbox)
        clock = Clock(opener.read_ms)
        expires_ms = None if options.ttl_ms is None else clock.look_ms() + options.ttl_ms

        last: Store | None = None

        def open_store() -> Store:
            nonlocal last
            now_ms = clock.look_ms()
            if mailbox.has_ended or (expires_ms is not None and expires_ms <= now_ms):  # it rested to its end
                raise Closed(f"job {job_id!r} was temporary, and its time is over")
            was_there = last is not None and last.last_version > 0
            store = self.root.open(job_id, options.store(now_ms, expires_ms, must_exist=was_there))
            try:
                if last is not None and store.last_version < last.last_version:
                    raise Corrupt(
                        f"job {job_id!r} was dropped, or replaced by an older one, while it rested",
                        hint="Close the job; opened again it is what is there now.",
                    )
            except BaseException:
                store.close(tidy=False)
                raise
            last = store
            return store

        slow = opener.slowness(job_id)
        worker = Worker(
            job_id,
            mailbox,
            failures,
            open_store=open_store if slow is None else slow.opening(open_store),
            clock=clock,
            name_ops=name_ops,
            stall_timeout=options.stall_timeout,
            waiters_max=options.requests_max,
            sync_interval=options.sync_interval,
            slot=place,
        )
        worker.turns.slow = slow
        if place is not None:
            place.worker = worker
        entry = _Entry(options, mailbox, worker, failures, place)
        worker.ended = lambda: self._gone(job_id, entry)
        return entry

    def end(self, job_id: str) -> Reply[None] | None:
        """Close a temporary job whose time is over; return what to wait for, or `None` if it isn't one."""
        self.check_here()
        with self._lock:
            entry = self._entries.get(job_id)
            if entry is None or entry.worker is None or not entry.mailbox.has_ended:
                return None
            entry.leaving = True
        entry.worker.close()
        return entry.gone

    def _leave(self, entry: _Entry, lease: object) -> None:
        """Give up a lease on a job that didn't open, or not in time; a late opening is closed again."""
        assert entry.worker is not None
        failed = entry.worker.unborn or (entry.worker.opened.done() and entry.worker.opened.exception() is not None)
        with self._lock:
            entry.leases.discard(lease)
            last = not entry.leaving and (failed or not entry.leases)
            entry.leaving = entry.leaving or last
        if last:
            self._close(entry, drain=True)

    def _release(self, entry: _Entry, lease: object, job: Job, *, drain: bool, flush: bool) -> Reply[None]:
        """Close a handle, and with the last one the job; with others left, `flush` what was posted until now."""
        self.check_here()
        last = False
        closed: Reply[None] | None = None
        try:
            with self._lock:
                if job._closed:
                    closing = entry.worker.closed if entry.worker is not None and entry.leaving else ready()
                    return ready() if closing.done() and closing._unseen is None else closing
                if entry.leaving and entry.worker is not None:  # its time is over, and it was swept away
                    job._shut()
                    return entry.worker.closed
                mailbox = job._shut()
                entry.leases.discard(lease)
                last = not entry.leases and not entry.leaving
                entry.leaving = entry.leaving or last
        finally:
            if last:  # also if an interrupt comes here, and here again: nobody else would do it
                try:
                    closed = self._close(entry, drain=drain)
                except BaseException:
                    self._close(entry, drain=drain)
                    raise
        if closed is not None:
            return closed
        if entry.worker is not None:
            entry.worker.waiters.leave(job, Closed(f"job {job.id!r} is closed"))
        try:
            return mailbox.write(Barrier(), 0, 0, free=True) if drain and flush else ready()
        except PersistencyError as error:  # the job is poisoned, or was closed for good just now, which writes all
            return entry.gone if isinstance(error, Closed) and entry.leaving else ready(error=error)

    def _close(self, entry: _Entry, *, drain: bool) -> Reply[None]:
        assert entry.worker is not None
        return entry.worker.close(drain=drain)

    def _gone(self, job_id: str, entry: _Entry) -> None:
        with self._lock:
            if self._entries.get(job_id) is entry:
                del self._entries[job_id]
        if entry.worker is not None:
            lifecycle.forget(entry.worker)
        if entry.place is not None:
            entry.place.remove()
        settle_all([(entry.gone, None, None)])
