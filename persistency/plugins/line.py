"""The line: so many at once, first come, first served, and nobody waits in it for longer than they mean to.

Rules:
  1. A place that becomes free goes to the one that came first of those that wait: nobody comes in between. With it
     goes what everybody is given who gets one at that time.
  2. Whoever waited too long, or is turned away, is handed to whoever found that out, who tells them: no one is called
     from here.
  3. The numbers are those of one moment: each that came is running, waiting, or counted under what became of it.

Doesn't know: what is waited for, threads, who tells.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable
from math import inf
from typing import Any, Generic, Protocol, TypeVar


class Waiter(Protocol):
    """Who may stand in a line, until `until` on the monotonic clock; `granted`: what came with a place, or `None`."""

    until: float
    granted: Any


W = TypeVar("W", bound=Waiter)
V = TypeVar("V")


class Line(Generic[W, V]):
    """A line in front of `at_once` places; `given` is what comes with each, until something else is put there."""

    def __init__(self, at_once: int, given: V) -> None:
        self._at_once = at_once
        self._lock = threading.RLock()  # a signal handler may cancel a call, in the middle of that
        # Guarded by the lock:
        self._given = given
        self._waiting: deque[W] = deque()
        self._running = 0
        self._earliest = inf  # when one of those that wait has waited too long, at the earliest
        self._paused = False
        self._shut = False
        self._counts: Counter[str] = Counter()
        self._when_empty: list[Callable[[], None]] = []

    def enter(self, waiter: W) -> bool | None:
        """Come: `True` with a place, `False` in the line, `None` if it is shut."""
        with self._lock:
            if self._shut:
                return None
            if self._running < self._at_once and not self._paused and not self._waiting:
                self._running += 1
                waiter.granted = self._given
                return True
            self._waiting.append(waiter)
            self._earliest = min(self._earliest, waiter.until)
            return False

    @property
    def given(self) -> V:
        """What comes with a place now."""
        return self._given

    def give(self, given: V) -> None:
        """Have something else come with each place from now on."""
        with self._lock:
            self._given = given

    def leave(self, outcome: str) -> W | None:
        """Give a place back; return who has it now."""
        with self._lock:
            self._counts[outcome] += 1
            self._running -= 1
            following = self._grant()
            empty = self._emptied()
        for tell in empty:
            tell()
        return following

    def count(self, outcome: str) -> None:
        """Count one that neither had a place nor waited."""
        with self._lock:
            self._counts[outcome] += 1

    def withdraw(self, waiter: W) -> bool:
        """Take somebody out of the line; return whether they stood there."""
        with self._lock:
            try:
                self._waiting.remove(waiter)
            except ValueError:
                return False
            self._counts["withdrawn"] += 1
            return True

    def overdue(self, now: float) -> list[W]:
        """Take out those that have waited too long."""
        if now < self._earliest:
            return []
        with self._lock:
            overdue = [waiter for waiter in self._waiting if waiter.until <= now]
            if overdue:
                self._waiting = deque(waiter for waiter in self._waiting if waiter.until > now)
                self._counts["busy"] += len(overdue)
            self._earliest = min((waiter.until for waiter in self._waiting), default=inf)
            return overdue

    def shut(self) -> list[W]:
        """Let nobody come any more; take out all that wait. Who has a place keeps it."""
        with self._lock:
            self._shut = True
            waiting, self._waiting, self._earliest = list(self._waiting), deque(), inf
            self._counts["withdrawn"] += len(waiting)
            return waiting

    def pause(self) -> None:
        """Give nobody a place, until `resume`."""
        with self._lock:
            self._paused = True

    def resume(self) -> list[W]:
        """Go on after a pause; return those who have a place now."""
        with self._lock:
            self._paused = False
            granted = []
            while (following := self._grant()) is not None:
                granted.append(following)
            return granted

    def when_empty(self, tell: Callable[[], None]) -> None:
        """Have `tell()` called, once, when nobody has a place: at once, if that is so."""
        with self._lock:
            if self._running:
                self._when_empty.append(tell)
                return
        tell()

    def has_waiting(self) -> bool:
        """Return whether anybody waits."""
        return bool(self._waiting)

    def numbers(self) -> tuple[int, int, dict[str, int]]:
        """Return how many have a place, how many wait, and what became of the others."""
        with self._lock:
            return self._running, len(self._waiting), dict(self._counts)

    def _grant(self) -> W | None:
        """Give a free place to who came first. The lock is held."""
        if self._paused or not self._waiting or self._running >= self._at_once:
            return None
        self._running += 1
        following = self._waiting.popleft()
        following.granted = self._given
        return following

    def _emptied(self) -> list[Callable[[], None]]:
        """Return whom to tell that nobody has a place. The lock is held."""
        if self._running:
            return []
        telling, self._when_empty = self._when_empty, []
        return telling
