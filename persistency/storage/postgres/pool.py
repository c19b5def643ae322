"""The pool: the sessions of one root in this process, and who has them.

A store borrows a session for a turn. When the turn is over the session stays with it, so that the next one costs
nothing, until somebody else needs it and all that may be open are.

Rules:
  1. So many sessions at the most, whoever wants how many.
  2. Who waits for one gets the next that is given back, first come first served, or an error in the end: two who wait
     for one another don't wait for ever.
  3. A session that isn't sound is never lent twice; one that nobody used for a while is closed.

Doesn't know: jobs, statements, transactions.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from time import monotonic

from persistency.storage.postgres.faults import Lost
from persistency.storage.postgres.session import Session

WAIT_SECONDS_MAX = 20.0
SCARCE_SECONDS = 1.0  # after somebody had to do without, whoever has a session keeps it for his own turns alone


class Holder:
    """Somebody who borrows sessions, one at a time."""

    __slots__ = ("session",)

    def __init__(self) -> None:
        self.session: Session | None = None


class Pool:
    """At most `sessions_max` sessions, made by `connect`."""

    def __init__(self, connect: Callable[[], Session], sessions_max: int) -> None:
        self._connect = connect
        self._max = sessions_max
        self._lock = threading.RLock()  # a signal handler may use a job too
        # Counted by what there is: a session that an interrupt has taken out of every hand is gone from here, too.
        self._open: weakref.WeakSet[Session] = weakref.WeakSet()
        self._connecting: set[threading.Event] = set()
        self._free: list[Session] = []
        self._parked: dict[Holder, None] = {}  # who has one and doesn't use it, the longest idle first
        self._waiting: deque[threading.Event] = deque()
        self._scarce_until = 0.0  # monotonic: somebody had to take one from somebody else, or to wait

    def borrow(self, holder: Holder) -> Session:
        """Return a session for a turn: the one it had, if it still has it. Raises `Lost`."""
        while True:
            with self._lock:
                session = holder.session
                if session is not None:
                    self._parked.pop(holder, None)
                elif not self._waiting:
                    session = self._spare(holder)
            if session is None:
                session = self._wait(holder)
            if not (session.broken or session.is_cut_off()):
                return session
            self.give_up(holder)  # while nobody used it

    def at_hand(self, holder: Holder, *, busy: bool = False) -> Session | None:
        """Lend a holder the session it has, if it still has it and that is as `busy`, or not, as is said.

        One that isn't is lent only where nobody else is short of sessions.
        """
        with self._lock:
            session = holder.session
            if session is None or session.broken != busy:
                return None
            if not busy and (monotonic() < self._scarce_until or session.is_cut_off()):
                return None
            self._parked.pop(holder, None)
            return session

    @property
    def _count(self) -> int:
        """How many sessions are open, or about to be."""
        return len(self._open) + len(self._connecting)

    def _spare(self, holder: Holder) -> Session | None:
        """Give a holder one that nobody uses, if there is one and no more may be opened; return it."""
        if self._free:
            holder.session = self._free[-1]  # between the two no call: an interrupt comes with one
            del self._free[-1]
            return holder.session
        if self._count < self._max or not self._parked:
            return None
        self._scarce_until = monotonic() + SCARCE_SECONDS
        other = next((other for other in self._parked if not _is_busy(other)), next(iter(self._parked)))
        if _is_busy(other):  # what it has sent ahead it can send again
            self.give_up(other)
            return None
        holder.session, other.session = other.session, None
        del self._parked[other]
        return holder.session

    def _wait(self, holder: Holder) -> Session:
        deadline = monotonic() + WAIT_SECONDS_MAX
        turn = threading.Event()
        try:
            self._queue_up(holder, turn, deadline)
            if holder.session is None:
                session = self._connect()
                with self._lock:
                    self._open.add(session)
                    holder.session = session
            assert holder.session is not None
            return holder.session
        finally:
            with self._lock:
                self._connecting.discard(turn)
                if turn in self._waiting:
                    self._waiting.remove(turn)
                self._wake()

    def _queue_up(self, holder: Holder, turn: threading.Event, deadline: float) -> None:
        """Wait until the holder has a session, or one may be opened for it."""
        with self._lock:
            self._waiting.append(turn)
        while True:
            with self._lock:
                if self._waiting[0] is turn:
                    if self._spare(holder) is not None:
                        return
                    if self._count < self._max:
                        self._connecting.add(turn)
                        self._waiting.remove(turn)
                        self._wake()
                        return
                turn.clear()
                self._scarce_until = monotonic() + SCARCE_SECONDS
            if not turn.wait(max(0.0, deadline - monotonic())) and monotonic() >= deadline:
                raise Lost(f"all {self._max} connections have been in use for {WAIT_SECONDS_MAX:g} s")

    def _wake(self) -> None:
        if self._waiting:
            self._waiting[0].set()

    def park(self, holder: Holder, *, busy: bool = False) -> None:
        """End a turn: the session stays with its holder, for as long as nobody else needs it; a `busy` one, too."""
        session = holder.session
        if session is None:
            return
        if self._waiting if busy else session.broken or not session.idle:
            self.give_up(holder)
            return
        session.used_at = monotonic()
        with self._lock:
            if self._waiting:
                holder.session = None
                self._free.append(session)
                self._wake()
            else:
                self._parked[holder] = None

    def give_up(self, holder: Holder) -> None:
        """Close a holder's session, whatever state it is in."""
        with self._lock:
            session, holder.session = holder.session, None
            self._parked.pop(holder, None)
            if session is None:
                return
            self._open.discard(session)
            self._wake()
        session.close()

    def leave(self, holder: Holder) -> None:
        """Take a holder's session back for others."""
        with self._lock:
            session, holder.session = holder.session, None
            self._parked.pop(holder, None)
            if session is None:
                return
            if session.idle:
                session.used_at = monotonic()
                self._free.append(session)
                self._wake()
                return
            self._open.discard(session)
            self._wake()
        session.close()

    def close_idle(self, seconds: float) -> int:
        """Close the sessions that nobody has used for so long; return how many there are left."""
        before = monotonic() - seconds
        with self._lock:
            gone = [session for session in self._free if session.used_at <= before]
            self._free = [session for session in self._free if session.used_at > before]
            for holder in [holder for holder in self._parked if holder.session and holder.session.used_at <= before]:
                del self._parked[holder]
                assert holder.session is not None
                gone.append(holder.session)
                holder.session = None
            self._open.difference_update(gone)
            self._wake()
            left = self._count
        for session in gone:
            session.close()
        return left

    def forsake(self, holder: Holder) -> None:
        """In a forked child: let a holder's session go without a word, and without the lock, which may be held."""
        session, holder.session = holder.session, None
        if session is not None:
            session.forsake()
        for other in self._free:
            other.forsake()
        self._free = []


def _is_busy(holder: Holder) -> bool:
    return holder.session is None or holder.session.broken
