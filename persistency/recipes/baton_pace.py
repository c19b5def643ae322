"""When a baton tries to have its job, and when it leaves the others a chance.

Rules:
  1. After so much work without a pause comes one that is longer than any other process takes to notice that the job is
     free. So whoever waits gets a turn, however much this process is asked for.
  2. To try and fail costs as much as some hundred looks at the file. So who waits looks, and tries when the job's file
     says that it was closed, or has said nothing for a while.
  3. Nobody tries in step with others.

Doesn't know: what is done with the job.
"""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path
from time import monotonic, sleep
from typing import Any, TypeAlias

from persistency import Misuse

HOLD_S = 0.03
_PAUSE_S = 0.007
_LOOK_S = 0.001
_TRY_FIRST_S, _TRY_MAX_S = 0.0005, 0.005  # where the file isn't known yet
_TRY_AFTER_S = 0.02  # where it says nothing

_Seen: TypeAlias = tuple[int, bool] | None


class Pace:
    """The pace of one baton. `path`: the job's file, once it is known."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self._held_s = 0.0  # since others had a chance
        self._let_go = 0.0  # when

    def give_others_a_chance(self) -> None:
        """Pause, if this process has had the job for long enough."""
        left = self._let_go + _PAUSE_S - monotonic()
        if left <= 0:
            self._held_s = 0.0
        elif self._held_s >= HOLD_S:
            sleep(left)
            self._held_s = 0.0

    def let_go(self, begun: float) -> None:
        """Note down that the job was had from then until now."""
        self._let_go = monotonic()
        self._held_s += self._let_go - begun

    def wait(self, tries: int) -> None:
        """Wait until it makes sense to try again, after so many attempts that failed."""
        if self.path is None:
            longest = min(_TRY_FIRST_S * 2 ** min(tries, 10), _TRY_MAX_S)
            sleep(random.uniform(longest / 2, longest))  # noqa: S311  # no secret
            return
        before = self._look()
        until = monotonic() + random.uniform(_TRY_AFTER_S / 2, _TRY_AFTER_S)  # noqa: S311  # as above
        while monotonic() < until:
            sleep(random.uniform(_LOOK_S / 2, _LOOK_S))  # noqa: S311  # as above
            now = self._look()
            if now != before or now is None or not now[1]:
                return

    def _look(self) -> _Seen:
        """Return what changes when the job is closed: when its file was written, and whether it has a log beside it."""
        try:
            return os.stat(str(self.path)).st_mtime_ns, os.path.exists(f"{self.path}-wal")
        except OSError:
            return None


def as_seconds(value: Any, argument: str, *, above: bool = False) -> float:
    """Return a number of seconds that a thread can wait. Raises `Misuse`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Misuse(f"{argument} must be a number, not {type(value).__name__}: pass seconds")
    if not (value > 0 if above else value >= 0):  # NaN too
        raise Misuse(f"{argument} must be {'more than 0' if above else '0 or more'} seconds, not {value!r}")
    return min(float(value), threading.TIMEOUT_MAX / 2)
