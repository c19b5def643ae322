"""The clock: a job's own time, which never goes backwards.

Rules:
  1. `now_ms` is for the holder of the turn, one at a time: what it has said once stays the least it ever says, so that
     a row that has ended stays ended whatever the system's clock does.
  2. `look_ms` is for everybody: it moves nothing.

Doesn't know: who asks, and what for.
"""

from __future__ import annotations

import time
from collections.abc import Callable

MS_MAX = 10**15  # some 30,000 years: whatever a clock says, it can be stored and counted on


def system_ms() -> int:
    """Return the system's time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def reading(clock: Callable[[], float]) -> Callable[[], int]:
    """Return what reads a clock of seconds since 1970 in milliseconds; one that says nothing (NaN, infinity) says 0."""

    def read_ms() -> int:
        try:
            # A float may be a little less than what is meant: 1000.024 s are 1,000,023.9999 ms.
            return min(max(int(clock() * 1000 + 0.001), 0), MS_MAX)
        except (ValueError, OverflowError):
            return 0

    return read_ms


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

    def last_ms(self) -> int:
        """Return the time, or the last one known, if it can't be told now."""
        try:
            return self.look_ms()
        except Exception:  # a caller's own clock
            return self._latest

    def read_ms(self) -> int:
        """Return what the system's clock says, though it may have been put back."""
        return self._read_ms()

    def not_before(self, latest_ms: int) -> None:
        """From now on say nothing before this; for a job that is opened again."""
        self._latest = max(self._latest, latest_ms)
