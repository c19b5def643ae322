"""The door of a mailbox: whether it takes anything, from whom, and until when; and what is answered at it, in place.

Rules:
  1. What closed it first is what everybody is told.
  2. Who would wait for himself is told so, at the call.

Doesn't know: the line behind it, what is posted.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import get_ident
from typing import Any

from persistency.actor.reply import Reply
from persistency.actor.sleeper import Sleeper
from persistency.errors import Closed, Misuse, PersistencyError
from persistency.storage.port import GetRow

Refusal = Callable[[], PersistencyError]


class Door(Sleeper):
    """The door of one mailbox, and who has its turn."""

    __slots__ = (
        "_attendant", "_closed", "_ending", "_holder", "_holder_thread", "_open_ops", "_refusal", "abandoned",
        "get_in_place", "inside", "never_waits", "prefetch", "read_in_place", "worker_thread", "write_in_place",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.worker_thread: int | None = None
        self.never_waits: set[int] = set()  # threads that must not wait for room here
        self.inside: int | None = None  # the thread that is in a caller's function now
        self.abandoned: PersistencyError | None = None  # in a forked child: nobody answers here any more
        # Run by whoever has the turn.
        self.get_in_place: Callable[[bytes, bytes], bytes | None] | None = None
        self.read_in_place: Callable[[Any], Reply[Any]] | None = None
        self.write_in_place: Callable[[Any, int], Reply[Any]] | None = None
        self.prefetch: Callable[[GetRow], None] | None = None  # begins a read that is about to be posted
        # Guarded by the lock:
        self._open_ops = 0  # up to where a plain put needn't look closer
        self._refusal: Refusal | None = None
        self._closed = False
        self._ending: Callable[[], None] | None = None
        self._holder: object | None = None
        self._holder_thread = 0
        self._attendant: Callable[[], None] | None = None

    def serve_in_place(
        self,
        get: Callable[[bytes, bytes], bytes | None] | None,
        read: Callable[[Any], Reply[Any]] | None,
        write: Callable[[Any, int], Reply[Any]] | None,
    ) -> None:
        """Say how whoever has the turn is answered in place; `None`: not at all."""
        with self._lock:
            if self._refusal is None:
                self.get_in_place, self.read_in_place, self.write_in_place = get, read, write

    def serve_ahead(self, prefetch: Callable[[GetRow], None] | None) -> None:
        """Say how whoever has the turn begins a read that is about to be posted; `None`: not at all."""
        with self._lock:
            if self._refusal is None:
                self.prefetch = prefetch

    def unattend(self, attendant: Callable[[], None]) -> None:
        """From now on whoever posts calls `attendant` afterwards; the worker sleeps no more."""
        with self._lock:
            self._attendant = attendant
            self._open_ops = 0

    def leave_to_thread(self) -> None:
        """Note that a thread is about to come: nobody has to serve himself any more."""
        self._attendant = None

    def attend(self) -> None:
        """Note that the calling thread is the worker's."""
        self.worker_thread = get_ident()
        self.never_waits.add(self.worker_thread)

    def leave(self) -> None:
        """Note that the calling thread is the worker's no more: the system gives its number to another one later."""
        self.worker_thread = None
        self.never_waits.discard(get_ident())

    def nap(self, wake: Callable[[], None]) -> bool:
        """Nap as a sleeper does. Every post looks closer meanwhile: if no thread can be had, its poster is to serve."""
        with self._lock:
            naps = super().nap(wake)
            if naps and self._wake is not None:  # else no thread can be had, and there is somebody to serve already
                self._attendant, self._open_ops = None, 0
            return naps

    def _serve_nobody(self) -> None:
        self.get_in_place = self.read_in_place = self.write_in_place = self.prefetch = None

    def check(self) -> None:
        """Raise what the mailbox was closed with, if it was."""
        if self._refusal is not None:
            raise self._refusal()
        if self._ending is not None:
            self._ending()

    def check_here(self) -> None:
        """Raise `Forked` in a child of the process whose mailbox it is."""
        if self.abandoned is not None:
            raise self.abandoned

    def end_by(self, ending: Callable[[], None]) -> None:
        """From now on ask `ending` at every post; it raises `Closed` when the job's time is over."""
        with self._lock:
            self._ending = ending
            self._open_ops = 0

    @property
    def has_ended(self) -> bool:
        """Whether the job's time is over."""
        try:
            if self._ending is not None:
                self._ending()
        except Closed:
            return True
        return False

    def check_outside(self) -> None:
        """Raise `Misuse` in a function that this very job runs: it would wait for itself."""
        self.check_here()
        if self.inside == get_ident():
            raise Misuse("a request to a job inside its own run()", hint="Use the transaction the function is given.")

    @property
    def taken(self) -> bool:
        """Whether somebody has the turn."""
        return self._holder is not None

    @property
    def taken_here(self) -> bool:
        """Whether the calling thread has the turn."""
        return self._holder is not None and self._holder_thread == get_ident()

    def waits_for_itself(self) -> bool:
        """Say whether the calling thread is the one that would have to answer."""
        return get_ident() in (self.worker_thread, None if self._holder is None else self._holder_thread)
