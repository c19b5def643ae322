"""The line in front of a lock: who waits for it in this process, in the order they came.

Rules:
  1. Only the first of the line asks the store for the lock; the others wait for their turn, and cost it nothing.
  2. There is one line per job, category and name in a process, whichever objects the waiters came through.
  3. A release wakes the first. Who leaves the line, with the lock or without, makes the next one the first.
  4. Who has entered a lock by `with` is known by thread and task, so that nobody waits for himself.

Doesn't know: leases, tokens, how the lock is asked for.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Hashable
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakValueDictionary

from persistency import Reply
from persistency.recipes.waiting import unanswered


class Entered(Protocol):
    """What somebody has who has entered a lock."""

    @property
    def held(self) -> bool:
        """Whether it is neither lost nor given back."""
        raise NotImplementedError


E = TypeVar("E", bound=Entered)


class Turn:
    """One waiter's place in a line."""

    __slots__ = ("_future",)

    def __init__(self) -> None:
        self._future: Future[Any] | None = None

    def listen(self) -> Reply[None]:
        """Return a reply that is settled when this waiter has become the first, or the lock was released."""
        self._future, reply = unanswered()
        return reply

    def ring(self) -> None:
        """Settle it, once."""
        future, self._future = self._future, None
        if future is not None:
            future.set_result(None)


class Line(Generic[E]):
    """Those who wait for one lock, and those who have entered it by `with`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # signal handlers and `__del__` release too
        self._turns: list[Turn] = []
        self._entered: list[tuple[Hashable, E]] = []

    def join(self) -> Turn:
        """Stand at the end."""
        turn = Turn()
        with self._lock:
            self._turns.append(turn)
        return turn

    def is_first(self, turn: Turn) -> bool:
        """Say whether it is this one's turn."""
        with self._lock:
            return self._turns[0] is turn

    def leave(self, turn: Turn) -> None:
        """Wait no longer."""
        with self._lock:
            first = self._turns[0] is turn
            self._turns.remove(turn)
        if first:
            self.ring()

    def ring(self) -> None:
        """Wake the first: the lock may be free, or it is its turn now."""
        with self._lock:
            first = self._turns[0] if self._turns else None
        if first is not None:
            first.ring()

    # -- who has entered it by `with` ------------------------------------------------------------------------------

    def enter(self, grant: E) -> None:
        """Note that this thread, or task, has entered."""
        with self._lock:
            self._entered.append((_who(), grant))

    def has_entered(self) -> bool:
        """Say whether this thread, or task, is inside, so that it would wait for itself."""
        with self._lock:
            return bool(self._entered) and any(who == _who() and grant.held for who, grant in self._entered)

    def exit(self) -> E:
        """Return what this thread, or task, has entered with, and forget it.

        Two are inside only where one has lost the lock. Who leaves in another thread than it entered in (as generators
        may that a framework drives) is taken for that one.
        """
        with self._lock:
            me = _who()
            own = [at for at, (who, _) in enumerate(self._entered) if who == me]
            lost = [at for at, (_, grant) in enumerate(self._entered) if not grant.held]
            return self._entered.pop([*reversed(own), *lost, -1][0])[1]


def _who() -> Hashable:
    """Return who is running: the thread, and the task of asyncio or trio in it."""
    task = None
    for module, name in (("asyncio", "current_task"), ("trio.lowlevel", "current_task")):
        current = getattr(sys.modules.get(module), name, None)  # neither is imported for somebody who hasn't
        try:
            task = task if current is None else current() or task
        except RuntimeError:  # no such loop runs in this thread
            continue
    return threading.get_ident(), task


_lines: WeakValueDictionary[Hashable, Line[Any]] = WeakValueDictionary()
_lines_lock = threading.RLock()


def line_of(place: Hashable) -> Line[Any]:
    """Return the line of a place: the same one for all who wait there."""
    with _lines_lock:
        line = _lines.get(place)
        if line is None:
            line = _lines[place] = Line()
        return line


def _in_child() -> None:
    """In a forked child nobody waits yet, and another thread of the parent may have had the lock."""
    global _lines_lock  # noqa: PLW0603  # of this process
    _lines_lock = threading.RLock()
    _lines.clear()


os.register_at_fork(after_in_child=_in_child)
