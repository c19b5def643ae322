"""The job: a tenant's handle. It checks what it is given and posts it to the mailbox; that is all.

Two sentences cover it: an *event* returns `None`, a *request* returns a `Reply`. And wrong arguments raise `Misuse`
at the call, in the caller's thread, never later in the worker.

Rules:
  1. A job holds its identity and its mailbox. Who runs what is posted, where and when, is none of its business.
  2. Arguments are encoded and checked before anything is posted.
  3. A closed job's mailbox is one that refuses everything, so being closed costs an open job nothing.

Doesn't know: threads, SQL, files, which engine stores the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

from persistency import care, messages, outside
from persistency.actor.bounds import Bounds
from persistency.actor.errand import Progress
from persistency.actor.mailbox import Mailbox
from persistency.actor.reply import Reply
from persistency.actor.tally import Statistics
from persistency.arguments import (
    CATEGORIES,
    as_category,
    as_flag,
    as_key_bytes,
    as_payload,
    as_progress,
    as_seconds,
)
from persistency.codec.keys import KEY_BYTES_MAX, Key, KeyRange
from persistency.errors import Closed
from persistency.ops import KeyLike, Op, Payload, Ttl
from persistency.reads import Reads
from persistency.storage.port import Barrier
from persistency.transaction import Transaction, program

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Job(Reads):
    """An open job. Made by `Persistency.open_job`; any thread and any event loop may use it."""

    __slots__ = ("_release", "_statistics")

    def __init__(
        self,
        job_id: str,
        find_path: Callable[[str], Path | None],
        mailbox: Mailbox,
        now_ms: Callable[[], int],
        statistics: Callable[[], Statistics],
        release: Callable[[Job, bool, bool], Reply[None]],
        *,
        keeps_changes: bool,
    ) -> None:
        super().__init__(job_id, find_path, mailbox, now_ms, keeps_changes=keeps_changes)
        self._statistics = statistics
        self._release = release

    # -- events: they return None, and a failure is raised by the next flush() or close() ------------------------

    def put(self, category: str, key: KeyLike, payload: Payload, *, ttl: Ttl | None = None) -> None:
        """Store a payload (bytes-like, empty allowed, up to 256 MiB) under a key, whatever was there.

        With a `ttl` (seconds or a `timedelta`, counted from this call) the row ends after so long; without, it stays.
        """
        if ttl is not None:
            message = messages.set_row(category, key, payload, ttl, self._now_ms)
            self._mailbox.put(None, message, None, len(message.key) + len(message.payload))
            return
        # The usual call, without a function for each argument: a third of the time.
        if type(key) is Key and type(payload) is bytes:
            nbytes = len(key) + len(payload)
            if nbytes <= KEY_BYTES_MAX and type(category) is str:
                self._mailbox.put(CATEGORIES[category], key, payload, nbytes)
                return
        encoded, payload = as_key_bytes(key), as_payload(payload)
        self._mailbox.put(as_category(category), encoded, payload, len(encoded) + len(payload))

    def delete(self, category: str, key: KeyLike) -> None:
        """Remove one row; a missing one is fine."""
        self._tell(messages.drop_row(category, key))

    def delete_prefix(self, category: str, prefix: KeyLike) -> None:
        """Remove the row of the key `prefix` and those of all its children. An empty prefix is `Misuse`."""
        self._tell(messages.drop_prefix(category, prefix))

    def delete_range(self, category: str, key_range: KeyRange) -> None:
        """Remove the rows of a range, start in, stop out. One without any bound is `Misuse`."""
        self._tell(messages.drop_range(category, key_range))

    def persist(self, ops: Op | Iterable[Op]) -> None:
        """Post one operation or several, all or nothing: `Put`, `Delete`, `DeletePrefix`, `DeleteRange`, `Check`."""
        batch, nbytes = messages.batch(ops, self._now_ms)
        if batch.ops:
            self._mailbox.tell(batch, batch.ops, nbytes)
        else:
            self._mailbox.check()

    def _tell(self, message: Any) -> None:
        self._mailbox.tell(message, 1, messages.message_bytes(message))

    # -- requests that write -------------------------------------------------------------------------------------

    def commit(self, ops: Op | Iterable[Op]) -> Reply[int]:
        """Apply operations, all or nothing, and answer with the version of the last one (of none: the current).

        `Check`s look at the state before the batch; if one fails the reply raises `Conflict` and nothing is applied.
        """
        batch, nbytes = messages.batch(ops, self._now_ms)
        if not batch.ops:
            return self.version()
        return self._mailbox.write(batch, batch.ops, nbytes)

    def delete_acked(self, category: str, key: KeyLike) -> Reply[bool]:
        """Remove one row and answer whether it was there."""
        return self._write(messages.drop_row(category, key))

    def delete_prefix_acked(self, category: str, prefix: KeyLike) -> Reply[int]:
        """Remove a key and its children and answer how many rows were there. An empty prefix is `Misuse`."""
        return self._write(messages.drop_prefix(category, prefix))

    def delete_range_acked(self, category: str, key_range: KeyRange) -> Reply[int]:
        """Remove the rows of a range and answer how many there were. One without any bound is `Misuse`."""
        return self._write(messages.drop_range(category, key_range))

    def compare_and_set(
        self,
        category: str,
        key: KeyLike,
        expected: Payload | None,
        new: Payload | None,
        *,
        ttl: Ttl | None = None,
    ) -> Reply[bool]:
        """Put `new` in the place of `expected`, and answer whether that was there; `None` is no row, on either side.

        So `None, new` creates a row only if there is none, and `expected, None` deletes one only if it is still that.
        """
        return self._write(messages.swap_row(category, key, expected, new, ttl, self._now_ms))

    def increment(self, category: str, key: KeyLike, delta: int = 1) -> Reply[int]:
        """Count up and answer with the new number, which is stored as a CBOR integer.

        A missing row counts as 0; an expiry stays. Raises `Conflict` if what is there isn't an integer.
        """
        from persistency.counting import add  # only here: few count, and it needs to know of values

        return self._write(add(category, key, delta))

    def touch(self, category: str, key: KeyLike, ttl: Ttl | None) -> Reply[bool]:
        """Have a row end after `ttl` from now (`None`: not at all), and answer whether there was one.

        Payload and version of the row stay, and it is no change for those who follow them.
        """
        return self._write(messages.touch_row(category, key, ttl, self._now_ms))

    def run(self, fn: Callable[[Transaction, *Ts], T], *args: *Ts) -> Reply[T]:
        """Send a function to the data: `fn(tx, *args)` is run inside the actor, in one transaction.

        `tx` is a `Transaction`: the same verbs, answering directly. The reply gives what `fn` returns. If it raises,
        everything it wrote is undone and the reply raises that. It holds up the whole job while it runs, and is called
        again if its transaction has to be: let it be short, and have no effects but through `tx`. Requests to the job
        itself raise `Misuse` inside of it; its events are posted, and no part of the transaction. Generators and
        coroutine functions are refused; keyword arguments go into a `functools.partial`. A plain thread that finds the
        job idle runs `fn` itself, before this returns: a timeout for the reply begins after that.
        """
        message = program(fn, args, self.id, self._now_ms, self._mailbox)
        return self._mailbox.write(message, 1, messages.argument_bytes(args))

    def _write(self, message: Any) -> Reply[Any]:
        return self._mailbox.write(message, 1, messages.message_bytes(message))

    def flush(self, *, sync: bool = False) -> Reply[None]:
        """Answer when all earlier writes are committed; with `sync`, when they are on the medium (one fsync).

        Raises `WriteFailed`, once, if events have failed since the last flush.
        """
        return self._mailbox.write(Barrier(as_flag(sync, "sync")), 0, 0, free=True)

    def drain(self) -> Reply[None]:
        """Answer when less than half of the mailbox's bounds is waiting: `await` it to pace a producer."""
        self._mailbox.check_outside()
        return self._mailbox.drain()

    # -- as a whole: done beside the job's work, in a thread of its own ------------------------------------------

    def compact(self, progress: Progress | None = None) -> Reply[int]:
        """Give the file's unused pages back, a slice of 4 MB at a time; answer how many bytes it lost.

        The first time on a file that was migrated from an older format it is written anew in one piece.
        """
        self._check_outside()
        self._mailbox.check()
        steps = care.compacted(lambda message: self._mailbox.write(message, 0, 0, free=True))
        return self._errand("compact", steps, as_progress(progress))

    def export(self, file: str | PathLike[str] | outside.Sink, progress: Progress | None = None) -> Reply[int]:
        """Write every row, with its expiry, as CBOR items that any release reads; answer how many there were.

        `file` is open for writing bytes, and used by another thread until the answer is there; or a path: then the file
        is there whole or not at all. `progress(done, None)` is told the rows. It is no snapshot of one moment, as a
        `backup` is: rows that are there throughout are in it once, of others it may have some. What the open file
        raises is what the reply raises; about a path it is a `StorageError`.
        """
        self._check_outside()
        self._mailbox.check()
        target = outside.as_target(file, "file", self.path)
        from persistency import transfer  # only here: it brings along what makes checksums

        steps = transfer.exported(self.id, lambda: self._mailbox, self._now_ms, target)
        return self._errand("export", steps, as_progress(progress))

    def import_(self, file: str | PathLike[str] | outside.Source, progress: Progress | None = None) -> Reply[int]:
        """Take in the rows of an export, read to its end, and answer how many; those that have ended are left out.

        Rows under the same keys are replaced, others stay. A batch at a time is committed: what has gone wrong later
        (`Corrupt`, `QuotaExceeded`, ...) leaves those before it. `SchemaTooNew` if a newer release has written it.
        `file` as for `export`; `progress(done, None)` is told the rows read.
        """
        self._check_outside()
        self._mailbox.check()
        source = outside.as_source(file, "file")
        from persistency import transfer  # as above

        steps = transfer.imported(lambda: self._mailbox, self._now_ms, source)
        return self._errand("import", steps, as_progress(progress))

    # -- the handle ----------------------------------------------------------------------------------------------

    def statistics(self) -> Statistics:
        """Return the job's numbers of this instant."""
        numbers = self._statistics()
        return numbers.__replace__(state="closed") if self._closed else numbers

    def close(self, timeout: float | None = None, *, drain: bool = True) -> None:
        """Write what waits and close the job for its `Persistency`; the last one that has it open closes the file.

        With `drain=False` what wasn't started fails with `Closed`. Raises `WriteFailed` if events have failed since
        the last flush, and `TimeoutError` after `timeout` seconds, which says what is left and keeps closing.
        """
        timeout = as_seconds(timeout, "timeout")
        reply = self._leave(drain=as_flag(drain, "drain"))
        try:
            reply.result(timeout)
        except TimeoutError:
            if reply.done():
                raise
            left = self._statistics().pending
            raise TimeoutError(
                f"job {self.id!r} is still closing after {timeout} s, with {left} operations left; it keeps closing"
            ) from None

    async def aclose(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        await self._leave()

    def _leave(self, *, drain: bool = True, flush: bool = True) -> Reply[None]:
        """Begin to close; the reply is what `close` waits for. Without `flush` failures are left to other handles."""
        self._check_outside()
        self._mailbox.check_here()
        return self._release(self, drain, flush)

    def _check_outside(self) -> None:
        """Raise `Misuse` inside the job's own `run`, where nobody can wait for its end."""
        self._mailbox.check_outside()

    def _shut(self) -> Mailbox:
        """Make this handle refuse everything from now on; return the mailbox it had. For the engine."""
        had, self._mailbox = self._mailbox, _refusing(self.id)
        self._closed = True
        return had

    def __repr__(self) -> str:
        return f"<Job {self.id!r}{' (closed)' if self._closed else ''}>"


def _refusing(job_id: str) -> Mailbox:
    """Return a mailbox that refuses everything with `Closed`."""
    mailbox = Mailbox(Bounds())
    mailbox.shut(lambda: Closed(f"job {job_id!r} is closed"))
    return mailbox
