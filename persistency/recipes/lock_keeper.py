"""The keeper: the one thread of a process that renews the grants of locks, and says when one is lost.

Rules:
  1. It starts with the first grant, looks after all there are, and ends within a second after the last one is gone.
  2. It waits for no job: a renewal is asked for where there is room for it, and its answer comes to the grant.
  3. A grant that nobody has any more is not renewed: the keeper itself keeps none alive.
  4. Time is counted by a clock that goes on while the machine is suspended, where the system has one.

Doesn't know: what a grant is renewed by, transactions.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from typing import Protocol

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
# How long the keeper sleeps at most: then it sees that there is nothing left to do.
_NAP_S = 1.0


def clock() -> float:
    """Return the seconds since some moment, never going backwards: what leases are counted by at their holders."""
    return time.clock_gettime(_CLOCK)


class Kept(Protocol):
    """What the keeper looks after."""

    def _attend(self) -> float:
        """Do what is due, without waiting or raising; return when to come again. It may be called earlier."""
        raise NotImplementedError


class Keeper:
    """Looks after grants, in a thread of its own."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # its lock is re-entrant: `__del__` and signal handlers come here too
        self._kept: weakref.WeakSet[Kept] = weakref.WeakSet()
        self._thread: threading.Thread | None = None
        self._wakes = float("inf")  # while it sleeps: until when
        self._stirred = False

    def keep(self, kept: Kept, due: float) -> None:
        """Look after it from now on, for the first time at `due`."""
        with self._changed:
            self._kept.add(kept)
            self.stir(due)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="persistency-locks", daemon=True)
                # While the interpreter ends no thread can be started; then leases run out.
                with contextlib.suppress(RuntimeError):
                    self._thread.start()

    def stir(self, due: float) -> None:
        """See that the keeper is awake at `due`."""
        with self._changed:
            if due < self._wakes:
                self._stirred = True
                self._changed.notify()

    def forget(self, kept: Kept) -> None:
        """Look after it no longer."""
        with self._changed:
            self._kept.discard(kept)

    @property
    def runs(self) -> bool:
        """Whether its thread is there."""
        return self._thread is not None

    def _run(self) -> None:
        try:
            while self._look_round():
                pass
        finally:  # whatever was thrown into this thread: the next grant starts another
            with self._changed:
                if self._thread is threading.current_thread():
                    self._thread = None

    def _look_round(self) -> bool:
        """Do what is due, and sleep until something else is; return whether there is anything left to look after."""
        with self._changed:
            kept = list(self._kept)
            if not kept:
                self._thread = None  # before anybody can add one: who does starts the next thread
                return False
            self._stirred = False
            self._wakes = float("inf")
        wakes = min([one._attend() for one in kept])
        kept.clear()  # asleep it keeps none alive
        with self._changed:
            self._wakes = min(wakes, clock() + _NAP_S)
            if not self._stirred:
                self._changed.wait(max(0.0, self._wakes - clock()))
        return True


_keeper = Keeper()


def the_keeper() -> Keeper:
    """Return the one of this process."""
    return _keeper


def _in_child() -> None:
    """In a forked child there is no such thread, and none of the parent's grants is the child's."""
    global _keeper  # noqa: PLW0603  # of this process
    _keeper = Keeper()


os.register_at_fork(after_in_child=_in_child)
