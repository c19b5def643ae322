"""A clock under a test's control: it stands still until it is told to go on.

Rules:
  1. Time is kept in whole milliseconds, as a job counts it, so that what a test reckons comes out exactly.
  2. Moving it wakes the jobs of whoever is `attach`ed: an open job sleeps until the system's clock says that a row
     ends, and no clock of a test's says that to it.

Doesn't know: pytest, what the time is used for.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from datetime import timedelta
from typing import TYPE_CHECKING

from persistency.errors import Misuse, PersistencyError

if TYPE_CHECKING:
    from persistency.engine import Persistency

_START = 2_000_000_000  # 2033-05-18 03:33:20 UTC: every run of a test is at the same time, and none looks like now


class ManualClock:
    """A wall clock that only a test moves: `Persistency(root, clock=clock)`, and from then on `clock.advance(60)`.

    `start` is in Unix seconds; without it every clock begins at the same moment, in 2033.
    """

    def __init__(self, start: float = _START) -> None:
        self._ms = _as_ms(start, "start")
        self._attached: weakref.WeakSet[Persistency] = weakref.WeakSet()

    def __call__(self) -> float:
        """Return the time, in Unix seconds: what `Persistency` asks."""
        return self._ms / 1000

    @property
    def now(self) -> float:
        """The time in Unix seconds. It can be set, also to the past; but a job's own time never goes backwards."""
        return self._ms / 1000

    @now.setter
    def now(self, seconds: float) -> None:
        self._ms = _as_ms(seconds, "now")
        self._wake()

    def advance(self, seconds: float | timedelta) -> None:
        """Let time pass: seconds or a `timedelta`, to the millisecond. Raises `Misuse` if it is less than none."""
        passed_ms = _as_ms(seconds.total_seconds() if isinstance(seconds, timedelta) else seconds, "seconds")
        if passed_ms < 0:
            raise Misuse(f"seconds must be 0 or more, not {seconds!r}: to put the clock back, set `now`")
        self._ms += passed_ms
        self._wake()

    def attach(self, persistency: Persistency) -> None:
        """Have the open jobs of a `Persistency` notice when this clock moves, so that feeds tell of rows that ended.

        Each is asked to `touch` a row that isn't there, which changes nothing, but counts as an operation. What is read
        needs no attaching: every read looks at the clock.
        """
        self._attached.add(persistency)

    def _wake(self) -> None:
        for persistency in list(self._attached):
            # A job that is closed, full or poisoned says so to whoever has business with it.
            with contextlib.suppress(PersistencyError):
                for job_id in persistency:
                    with contextlib.suppress(PersistencyError):
                        persistency.job(job_id).touch("clock", ("moved",), None)

    def __repr__(self) -> str:
        return f"<ManualClock at {self.now}>"


def _as_ms(seconds: float, argument: str) -> int:
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not math.isfinite(seconds):
        raise Misuse(f"{argument} must be a finite number of seconds, not {seconds!r}: pass 60, or 0.5")
    return round(seconds * 1000)
