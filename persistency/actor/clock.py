"""The clock: a job's own time, which never goes backwards.

Rules:
  1. `now_ms` is for the holder of the turn, one at a time: what it has said once stays the least it ever says, so that
     a row that has ended stays ended whatever the system's clock does.
  2. `look_ms` is for everybody: it moves nothing.

Doesn't know: who asks, and what for.
"""

from __future__ import annotations

from collections.abc import Callable


class Clock:
    """A job's time in milliseconds since 1970. `read_ms` is the system's, or whatever stands for it."""

    __slots__ = ("_latest", "_read_ms")

    def __init__(self, read_ms: Callable[[], int]) -> None:
        self._read_ms = read_ms
        self._latest = 0

    def now_ms(self) -> int:
        """Return the time, and from now on nothing before it."""
        now = self._read_ms()
        if now > self._latest:
            self._latest = now
        return self._latest

    def look_ms(self) -> int:
        """Return the time."""
        now, latest = self._read_ms(), self._latest
        return max(latest, now)

    def not_before(self, latest_ms: int) -> None:
        """From now on say nothing before this; for a job that is opened again."""
        self._latest = max(self._latest, latest_ms)
