"""The keeper: the one thread of a process that renews the grants of locks, and says when one is lost.

Rules:
  1. It starts with the first grant, looks after all there are, and ends within a second after the last one is gone.
  2. It looks only at those that are due; the others cost it nothing.
  3. It waits for no job: a renewal is asked for where there is room for it, and its answer comes to the grant.
  4. A grant that nobody has any more is not renewed: the keeper itself keeps none alive.
  5. If its thread can't be started, whoever wanted it is told, and the next one tries again.
  6. Time is counted by a clock that goes on while the machine is suspended, where the system has one.

Doesn't know: what a grant is renewed by, transactions.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Protocol

_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
# How long the keeper sleeps at most: then it sees that there is nothing left to do.
_NAP_S = 1.0
_NEVER = float("inf")
# As many passed-over entries may be among those that are due, beside one for each grant.
_STALE_MAX = 64


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
        self._kept: weakref.WeakKeyDictionary[Kept, float] = weakref.WeakKeyDictionary()  # when each is due
        # The same, the next one first. What doesn't agree with `_kept` any more is passed over.
        self._due: list[tuple[float, int, weakref.ref[Kept]]] = []
        self._count = count()
        self._thread: threading.Thread | None = None
        self._wakes = _NEVER  # while it sleeps: until when
        self._stirred = False

    def keep(self, kept: Kept, due: float) -> RuntimeError | None:
        """Look after it from now on, for the first time at `due`; return why no thread could be started, if so."""
        with self._changed:
            self._kept[kept] = _NEVER
            return self.stir(kept, due)

    def stir(self, kept: Kept, due: float) -> RuntimeError | None:
        """See that it is looked after at `due`, or earlier; return why no thread could be started, if so."""
        with self._changed:
            self._note(kept, due)
            if due < self._wakes:
                self._stirred = True
                self._changed.notify()
            return self._start() if self._thread is None and self._kept else None

    def forget(self, kept: Kept) -> None:
        """Look after it no longer."""
        with self._changed:
            self._kept.pop(kept, None)

    @property
    def runs(self) -> bool:
        """Whether its thread is there."""
        return self._thread is not None

    def _start(self) -> RuntimeError | None:
        self._thread = threading.Thread(target=self._run, name="persistency-locks", daemon=True)
        try:
            self._thread.start()
        except RuntimeError as error:  # there are too many, or the interpreter ends
            self._thread = None
            return error
        except BaseException:  # should it have started all the same, it sees that it isn't the one
            self._thread = None
            raise
        return None

    def _note(self, kept: Kept, due: float) -> None:
        if due < self._kept.get(kept, -_NEVER):
            self._kept[kept] = due
            heappush(self._due, (due, next(self._count), weakref.ref(kept)))

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
            if self._thread is not threading.current_thread():
                return False
            if not self._kept:
                self._thread = None  # before anybody can add one: who does starts the next thread
                return False
            self._stirred = False
            self._wakes = _NEVER
        self._attend_due()
        with self._changed:
            self._drop_stale()
            self._wakes = min(self._due[0][0] if self._due else _NEVER, clock() + _NAP_S)
            if not self._stirred:
                self._changed.wait(max(0.0, self._wakes - clock()))
        return True

    def _attend_due(self) -> None:
        due = []
        with self._changed:
            now = clock()
            while self._due and self._due[0][0] <= now:
                at, _, reference = heappop(self._due)
                one = reference()
                if one is not None and self._kept.get(one) == at:
                    self._kept[one] = _NEVER
                    due.append(one)
        for one in due:
            again = one._attend()
            with self._changed:
                self._note(one, again)

    def _drop_stale(self) -> None:
        """Forget what would be passed over, if that is most of it: grants that were released long before their time."""
        if len(self._due) > 2 * len(self._kept) + _STALE_MAX:
            self._due = [entry for entry in self._due if self._is_current(*entry)]
            heapify(self._due)

    def _is_current(self, at: float, _order: int, reference: weakref.ref[Kept]) -> bool:
        kept = reference()
        return kept is not None and self._kept.get(kept) == at


_keeper = Keeper()


def the_keeper() -> Keeper:
    """Return the one of this process."""
    return _keeper


def _in_child() -> None:
    """In a forked child there is no such thread, and none of the parent's grants is the child's."""
    global _keeper  # noqa: PLW0603  # of this process
    _keeper = Keeper()


os.register_at_fork(after_in_child=_in_child)
