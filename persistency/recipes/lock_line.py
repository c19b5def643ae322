"""The line in front of a lock: who waits for it in this process, in the order they came.

Rules:
  1. Only the first of the line asks the store for the lock; the others wait for their turn, and cost it nothing.
  2. There is one line per job, category and name in a process, whichever objects the waiters came through.
  3. A release wakes the first. Who leaves the line, with the lock or without, makes the next one the first.
  4. Who has entered a lock by `with` is known by the task, or where there was none by the thread and the context
     (`contextvars`), so that nobody waits for himself. A pool's thread that runs each call in a context of its own, as
     those of asyncio and anyio do, isn't taken for whoever it worked for before.
  5. Who waited in a loop that was closed waits no more, and holds nobody up.

Doesn't know: leases, tokens, how the lock is asked for.
"""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections.abc import Hashable
from concurrent.futures import Future
from contextvars import ContextVar
from typing import Any, Generic, Protocol, TypeVar

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

    __slots__ = ("_future", "_loop")

    def __init__(self) -> None:
        self._future: Future[Any] | None = None
        self._loop = _running_loop()

    @property
    def gone(self) -> bool:
        """Whether the event loop that waits was closed: nobody is there any more who could leave."""
        return self._loop is not None and self._loop.is_closed()

    def listen(self) -> Reply[None]:
        """Return a reply that is settled when this waiter has become the first, or the lock was released."""
        self._future, reply = unanswered()
        return reply

    def ring(self) -> None:
        """Settle it, once."""
        future, self._future = self._future, None
        if future is not None:
            future.set_result(None)


class _Block(Generic[E]):
    """A `with` that was entered: by whom, and with what."""

    __slots__ = ("__weakref__", "grant", "task", "thread")

    def __init__(self, grant: E) -> None:
        self.grant = grant
        self.thread = threading.get_ident()
        self.task = _task()

    def is_here(self) -> bool:
        """Say whether it is around whoever asks."""
        if self.thread != threading.get_ident():
            return False
        if self.task is not None:
            return self.task is _task()
        return any(reference() is self for reference in _around.get())


# The blocks that were entered in this context, outside of any task.
_around: ContextVar[tuple[weakref.ref[_Block[Any]], ...]] = ContextVar("persistency_lock_blocks", default=())


class Line(Generic[E]):
    """Those who wait for one lock, and those who have entered it by `with`."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # signal handlers and `__del__` release too
        self._turns: list[Turn] = []
        self._entered: list[_Block[E]] = []

    def join(self) -> Turn:
        """Stand at the end."""
        turn = Turn()
        with self._lock:
            self._turns.append(turn)
        return turn

    def is_first(self, turn: Turn) -> bool:
        """Say whether it is this one's turn."""
        return self._first() is turn

    def _first(self) -> Turn | None:
        with self._lock:
            while self._turns and self._turns[0].gone:
                del self._turns[0]
            return self._turns[0] if self._turns else None

    def leave(self, turn: Turn) -> None:
        """Wait no longer."""
        with self._lock:
            first = self._first() is turn
            if turn in self._turns:
                self._turns.remove(turn)
        if first:
            self.ring()

    def ring(self) -> None:
        """Wake the first: the lock may be free, or it is its turn now."""
        first = self._first()
        if first is not None:
            first.ring()

    # -- who has entered it by `with` ------------------------------------------------------------------------------

    def enter(self, grant: E) -> None:
        """Note that this task, or thread, has entered."""
        with self._lock:
            block = _Block(grant)
            self._entered.append(block)
        if block.task is None:
            _around.set((*(outer for outer in _around.get() if outer() is not None), weakref.ref(block)))

    def has_entered(self) -> bool:
        """Say whether whoever asks is inside, so that it would wait for itself."""
        with self._lock:
            return any(block.is_here() and block.grant.held for block in self._entered)

    def exit(self) -> E:
        """Return what whoever leaves has entered with, and forget it.

        Two are inside only where one has lost the lock. Who leaves in another thread than it entered in (as generators
        may that a framework drives) is taken for that one.
        """
        with self._lock:
            own = [at for at, block in enumerate(self._entered) if block.is_here()]
            lost = [at for at, block in enumerate(self._entered) if not block.grant.held]
            return self._entered.pop([*reversed(own), *lost, -1][0]).grant


def _task() -> Any:
    """Return the task of asyncio or trio that is running in this thread, if one is."""
    task = None
    for module, name in (("asyncio", "current_task"), ("trio.lowlevel", "current_task")):
        current = getattr(sys.modules.get(module), name, None)  # neither is imported for somebody who hasn't
        try:
            task = task if current is None else current() or task
        except RuntimeError:  # no such loop runs in this thread
            continue
    return task


def _running_loop() -> Any:
    """Return the loop of asyncio that runs in this thread. Trio's isn't closed before all of its tasks have ended."""
    running: Any = getattr(sys.modules.get("asyncio.events"), "_get_running_loop", None)
    return None if running is None else running()


_lines: weakref.WeakValueDictionary[Hashable, Line[Any]] = weakref.WeakValueDictionary()
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
