"""The error family, sorted by what the caller can do about it.

Rules:
  1. Every error here is a `PersistencyError`; its message says what happened, its `hint` what to do next.
  2. `retryable` says whether the same call can succeed later without anybody changing the code.
  3. Errors travel as objects between threads, never as text, and keep their `__cause__`.
  4. Every error survives `pickle` (process pools send them between processes).
  5. Waiting too long is the builtin `TimeoutError`; a missing key is never an error.

Doesn't know: jobs, threads, SQL. The storage adapters translate what their engines raise into these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple


class PersistencyError(Exception):
    """The base of every error this package raises.

    `hint` is a sentence for the person who reads the traceback; each class has a default one, and the place
    that raises may give a better one.
    """

    hint: str = "See the cause for what happened underneath."
    retryable: ClassVar[bool] = False

    def __init__(self, *args: Any, hint: str | None = None) -> None:
        super().__init__(*args)
        if hint is not None:
            self.hint = hint
        self.add_note(f"Hint: {self.hint}")  # so that a traceback shows it

    def __str__(self) -> str:
        """The message alone (`KeyError` among the bases would quote it)."""
        return str(self.args[0]) if self.args else type(self).__name__


class Misuse(PersistencyError, ValueError, TypeError):
    """The call was wrong: an argument of the wrong type or value, or a request that could never be answered."""

    hint = "Fix the call; nothing was done."


class JobNotFound(PersistencyError, KeyError):
    """No job of that id is open here."""

    hint = "Open it first with open_job(job_id)."


class Closed(PersistencyError):
    """The job or its Persistency is closed, or its work was discarded by `close(drain=False)`."""

    hint = "Open the job again with open_job(job_id)."


class Forked(PersistencyError):
    """The handle was inherited through a fork; it belongs to the parent process."""

    hint = "Create a Persistency of its own in the child process."


class Conflict(PersistencyError):
    """What a write required of a key wasn't so, and nothing of that batch was applied.

    Attributes: `key` (the key that differed), `expected` and `actual`: versions, `None` stands for absent; texts where
    `increment` found something that isn't a number, and trying again is of no use (`retryable` is false then).
    """

    hint = "Read the key again and decide anew."
    retryable = True

    def __init__(self, key: Any, expected: Any = None, actual: Any = None, *, hint: str | None = None) -> None:
        super().__init__(key, expected, actual, hint=hint)
        self.key = key
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return f"{self.key!r}: expected {_version(self.expected)}, found {_version(self.actual)}"


def _version(value: Any) -> str:
    if value is None:
        return "no row"
    return f"version {value}" if type(value) is int else value if isinstance(value, str) else repr(value)


class QuotaExceeded(PersistencyError):
    """The write would take the job over its `max_bytes`. Attributes: `used` (it would be) and `limit`, in bytes."""

    hint = "Delete something, or open the job with a larger max_bytes."

    def __init__(self, used: int, limit: int, *, hint: str | None = None) -> None:
        super().__init__(used, limit, hint=hint)
        self.used = used
        self.limit = limit

    def __str__(self) -> str:
        return f"storage limit exceeded: would use {self.used} of {self.limit} bytes allowed"


class Overloaded(PersistencyError):
    """The job's mailbox is full. The operation wasn't accepted."""

    hint = "Slow down: `await job.drain()` in an event loop, or post from a thread that may wait (on_full='block')."
    retryable = True


class Failure(NamedTuple):
    """One operation that was accepted and then failed.

    `op` is the `Put`, `Delete`, ... as it was given; `outcome` is `"not applied"`, or `"unknown"` when the
    COMMIT of its group failed half way and only reopening the job tells.
    """

    op: Any
    error: BaseException
    outcome: str = "not applied"


class WriteFailed(PersistencyError):
    """Events that were accepted have failed since the last report.

    Attributes: `failures` (a tuple of `Failure`, the oldest first) and `omitted` (how many more there were
    than are kept). Raised by exactly one `flush()` or `close()`.
    """

    hint = "Look at .failures: each has the operation and its error. Other writes were not affected."

    def __init__(self, failures: Sequence[Failure], omitted: int = 0, *, hint: str | None = None) -> None:
        super().__init__(tuple(failures), omitted, hint=hint)
        self.failures: tuple[Failure, ...] = tuple(failures)
        self.omitted = omitted

    def __str__(self) -> str:
        count = len(self.failures) + self.omitted
        first = f"; the first: {shown(self.failures[0].op)}: {self.failures[0].error}" if self.failures else ""
        return f"{count} posted write{'s' if count != 1 else ''} failed{first}"


def shown(op: Any) -> str:
    """Return an operation in a few words: a payload may have megabytes, and be nobody else's business."""
    if isinstance(op, str):
        return op
    if callable(op):
        return f"run {getattr(op, '__qualname__', op)!s:.400}"
    parts = [
        type(op).__name__,
        *(repr(getattr(op, name)) for name in ("category", "key", "prefix") if hasattr(op, name)),
    ]
    payload = getattr(op, "payload", None)
    return " ".join(parts)[:400] + ("" if payload is None else f" ({len(payload)} bytes)")


class Poisoned(PersistencyError):
    """The job met a fault it can't go on from; its `__cause__` is that fault."""

    hint = "Mend the cause (see __cause__), close the job and open it again."


class JobLocked(PersistencyError):
    """Another process owns the job. `pid` is its process id, or `None` if it can't be told."""

    hint = "Use the job through the process that owns it, or share it by a Baton (persistency.recipes)."
    retryable = True

    def __init__(self, message: str, pid: int | None = None, *, hint: str | None = None) -> None:
        super().__init__(message, pid, hint=hint)
        self.pid = pid


class LeaseLost(PersistencyError):
    """Another owner has taken the job over, after this one's lease had run out: nothing more can be written here."""

    hint = "Close the job and open it again, unless its new owner is to keep it."


class FeedTruncated(PersistencyError):
    """The changes asked for are no longer kept. `oldest` is the first version that still is."""

    hint = "Read the current state with snapshot() and follow from there."

    def __init__(self, oldest: int, *, hint: str | None = None) -> None:
        super().__init__(oldest, hint=hint)
        self.oldest = oldest

    def __str__(self) -> str:
        return f"changes before version {self.oldest} are no longer kept"


class SchemaTooNew(PersistencyError):
    """The file was written by a newer release; it was left untouched."""

    hint = "Upgrade persistency."


class StorageError(PersistencyError):
    """The storage engine or the file system failed. `code` is SQLite's extended result code (0: not SQLite's)."""

    hint = "See the cause; the file system's own log may say more."
    at_commit = False  # it was the commit that failed: what it was to write may be there all the same

    def __init__(self, message: str, code: int = 0, *, hint: str | None = None) -> None:
        super().__init__(message, code, hint=hint)
        self.code = code


class DiskFull(StorageError):
    """No room on the medium."""

    hint = "Free some space; a stalled job goes on by itself."
    retryable = True


class Corrupt(StorageError):
    """A file or a value isn't what was written: damaged, replaced, or not ours."""

    hint = "Restore the job from a backup. The file was left as it is."


class Unavailable(StorageError):
    """The file can't be reached or is in use just now."""

    hint = "Check that the path exists, its permissions, and that nobody else writes to the file."
    retryable = True
