"""The sleeper: how a worker sleeps while there is nothing to do, and how it is woken.

It sleeps in one of two ways: its thread waits on a bell, for a while or until somebody rings; or it *dozes*, without a
thread, and is woken by a function that gets it a new one. A *nap* is a doze with everything left as it is, so that what
needs no thread can be done meanwhile by whoever comes.

Rules:
  1. Nobody sleeps while there is something to do; a ring that comes in between is not lost.
  2. Ringing never waits and calls no code of anybody's: signal handlers and `__del__` ring too. It leaves a note with
     whoever starts threads.
  3. A nap lasts until a thread has come: every ring until then calls for one, so that a call that an interrupt has cut
     short is made good by the next.

Doesn't know: what there is to do.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock, RLock
from time import monotonic


class Sleeper:
    """The sleep of one worker. `_lock` is the one critical section of whoever builds on it."""

    # Of 40 attributes: in a dict of that many each look at one costs a third more, and a point read takes a dozen.
    __slots__ = ("__weakref__", "_asleep", "_bell", "_lock", "_naps", "_rung", "_wake", "came_at", "dozes")

    def __init__(self) -> None:
        self._lock = RLock()
        # Guarded by the lock:
        self._asleep = False
        self._rung = False
        self._wake: Callable[[], None] | None = None
        self._naps = False
        self.dozes: int = 0  # how often it has dozed off
        # When the first of what waits came, at the earliest; 0: nothing has come yet; below: nobody has ever asked.
        self.came_at: float = -1.0
        self._bell = Lock()
        self._bell.acquire()

    def _stirs(self) -> bool:
        """Say whether there is something to do. To be overridden; the lock is held."""
        return self._rung

    def _ends(self) -> bool:
        """Say whether nothing will ever come any more. To be overridden; the lock is held."""
        return False

    def wait(self, seconds: float | None = None) -> None:
        """Sleep until there is something to do, somebody rings, or `seconds` are over."""
        with self._lock:
            if self._stirs():
                return
            self._asleep = True
        if not self._bell.acquire(timeout=-1 if seconds is None else seconds):
            with self._lock:
                at_last, self._rung, self._asleep = not self._asleep, True, False  # as if somebody had rung
            if at_last:  # somebody has
                self._bell.acquire()

    def ring(self) -> None:
        """Have the worker look after something other than messages."""
        with self._lock:
            self._rung = True  # until somebody has had the turn
            if self._asleep:
                self._ring()

    def doze(self, wake: Callable[[], None]) -> bool:
        """From now on there is no thread that sleeps here: call `wake`, once, when there is something to do.

        Returns whether that is so; not if nothing will ever come.
        """
        with self._lock:
            if self._ends():
                return False
            self._rung = False  # there is nothing to look after but what comes from now on
            self.note_empty()
            self._wake, self._asleep, self.dozes = wake, True, self.dozes + 1
            if self._stirs():
                self._ring()
            return True

    def nap(self, wake: Callable[[], None]) -> bool:
        """As `doze`, but what has rung already counts, and `wake` is called at each ring until `wake_up`."""
        with self._lock:
            if self._ends():
                return False
            self.note_empty()
            self._wake, self._asleep, self._naps = wake, True, True
            if self._stirs():
                self._ring()
            return True

    @property
    def napping(self) -> bool:
        """Whether there is no thread, with everything left as it is."""
        return self._naps

    @property
    def dozing(self) -> bool:
        """Whether nobody is there, nor called for."""
        return self._wake is not None

    def wake_up(self) -> bool:
        """End the dozing without `wake` being called; return whether it was that that had to be ended."""
        with self._lock:
            dozed, self._wake = self._wake is not None, None
            if dozed:
                self._asleep = self._naps = False
            return dozed

    def waited(self, now: float) -> float:
        """Return how many seconds what is begun `now` may have waited. To be asked each time, or never."""
        came_at, self.came_at = self.came_at, now  # while that is done nobody rings
        return now - came_at if came_at > 0 else 0.0

    def note_empty(self) -> None:
        """Note that nothing waits: the next ring says when something comes."""
        if self.came_at > 0:
            self.came_at = 0.0

    def note_busy(self, now: float) -> None:
        """Note that from `now` on nobody rings: something is done, and what comes meanwhile waits for its end."""
        if not self.came_at:
            self.came_at = now

    def _ring(self) -> None:
        # Looked at again: at the entry of a call a signal handler, or `__del__`, may have rung already.
        if not self._asleep:
            return
        if not self.came_at:
            self.came_at = monotonic()
        if self._naps and self._wake is not None:
            self._wake()
            return
        self._asleep = False
        wake, self._wake = self._wake, None
        if wake is None:
            self._bell.release()
        else:
            wake()
