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
from collections import deque
from collections.abc import Callable
from time import monotonic

from persistency.storage.postgres.faults import Lost
from persistency.storage.postgres.session import Session

WAIT_SECONDS_MAX = 20.0


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
        self._count = 0  # open, or about to be
        self._free: list[Session] = []
        self._parked: dict[Holder, None] = {}  # who has one and doesn't use it, the longest idle first
        self._waiting: deque[threading.Event] = deque()

    def borrow(self, holder: Holder) -> Session:
        """Return a session for a turn: the one it had, if it still has it. Raises `Lost`."""
        while True:
            with self._lock:
                session = holder.session
                if session is not None:
                    self._parked.pop(holder, None)
                elif not self._waiting:
                    session = holder.session = self._spare()
            if session is None:
                session = holder.session = self._wait()
            if not (session.broken or session.is_cut_off()):
                return session
            self.give_up(holder)  # while nobody used it

    def at_hand(self, holder: Holder, *, busy: bool = False) -> Session | None:
        """Lend a holder the session it has, if it still has it and that is as `busy`, or not, as is said."""
        with self._lock:
            session = holder.session
            if session is None or session.broken != busy or not (busy or not session.is_cut_off()):
                return None
            self._parked.pop(holder, None)
            return session

    def _spare(self) -> Session | None:
        if self._free:
            return self._free.pop()
        if self._count < self._max or not self._parked:
            return None
        holder = next((holder for holder in self._parked if not _is_busy(holder)), next(iter(self._parked)))
        del self._parked[holder]
        session, holder.session = holder.session, None
        if session is not None and session.broken:  # what its holder has sent ahead can be sent again
            self._count -= 1
            session.close()
            return None
        return session

    def _wait(self) -> Session:
        deadline = monotonic() + WAIT_SECONDS_MAX
        turn = threading.Event()
        with self._lock:
            self._waiting.append(turn)
        try:
            while True:
                with self._lock:
                    if self._waiting[0] is turn:
                        session = self._spare()
                        if session is not None:
                            return session
                        if self._count < self._max:
                            self._count += 1
                            break
                    turn.clear()
                if not turn.wait(max(0.0, deadline - monotonic())) and monotonic() >= deadline:
                    raise Lost(f"all {self._max} connections have been in use for {WAIT_SECONDS_MAX:g} s")
        finally:
            with self._lock:
                self._waiting.remove(turn)
                self._wake()
        try:
            return self._connect()
        except BaseException:
            with self._lock:
                self._count -= 1
                self._wake()
            raise

    def _wake(self) -> None:
        if self._waiting:
            self._waiting[0].set()

    def park(self, holder: Holder, *, busy: bool = False) -> None:
        """End a turn: the session stays with its holder, for as long as nobody else needs it; a `busy` one, too."""
        session = holder.session
        if session is None:
            return
        if bool(self._waiting) if busy else session.broken or not session.idle:
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
            self._count -= 1
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
            self._count -= 1
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
            self._count -= len(gone)
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
