"""The pace: how fast the machine is just now, beside how fast it has been at its best.

A machine that is shared has slow minutes, and in them code in Python loses more than code in C does: even ratios shift.
So a fixed piece of Python is timed before and after each measurement, and who has patience has those made again at
whose ends it was slow.

Rules:
  1. It looks at the machine alone: whether a measurement is made again depends neither on what it gave nor on whose it
     is.
  2. Patience is bounded, in all and for each; when it is over, what is measured counts as it comes.
  3. How many measurements were made again, and how many count although the machine was slow, is told with the figures.

Doesn't know: what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import monotonic, perf_counter_ns, sleep
from typing import TypeVar

T = TypeVar("T")

SLOW = 1.2  # times the best; at rest it moves by a tenth, beside a busy neighbour it doubles
_PAUSE_SECONDS = 0.5
_PART = 20  # so many of the longest ones use up all patience: none may have it for itself
_LOOKS = 5
_ROUNDS = 5_000


class Pace:
    """The machine's pace in one run. `patience` is how many seconds may be waited and thrown away in all."""

    def __init__(
        self,
        patience: float = 0.0,
        *,
        look: Callable[[], float] | None = None,
        clock: Callable[[], float] = monotonic,
        pause: Callable[[float], None] = sleep,
    ) -> None:
        self.again: int = 0  # measurements that were thrown away
        self._left = self._patience = patience
        self._look = look or _look
        self._clock = clock
        self._pause = pause
        self._best = self._look()
        self._ends: list[float] = []  # of what counts: the slower one of both ends of each

    def measured(self, measure: Callable[..., T], *, once: bool = False) -> T:
        """Have something measured until the machine was at its pace before and afterwards, or patience is over.

        Only the last time counts. `measure` is told whether it is done `again`. `once`: it can't be done again.
        """
        again = False
        least = max(0.0, self._left - self._patience / _PART)  # of the patience, to be left to the others
        while True:
            before, begun = self._wait(least), self._clock()
            found = measure(again=again)
            took, slower = self._clock() - begun, max(before, self._now())
            if once or slower <= self._best * SLOW or self._left - took < least:
                self._ends.append(slower)
                return found
            self._left -= took
            self.again += 1
            again = True

    def _wait(self, least: float) -> float:
        """Wait for the machine to be at its pace until only so much patience is left; return the pace."""
        while (now := self._now()) > self._best * SLOW and self._left - _PAUSE_SECONDS >= least:
            self._pause(_PAUSE_SECONDS)
            self._left -= _PAUSE_SECONDS
        return now

    def _now(self) -> float:
        now = self._look()
        self._best = min(self._best, now)
        return now

    @property
    def slow(self) -> int:
        """How many of the measurements that count were made while the machine was slow, by the best known now."""
        return sum(end > self._best * SLOW for end in self._ends)

    def facts(self) -> dict[str, str | int]:
        """Return what a reader has to know about the machine's pace while it was measured."""
        worst = max(self._ends, default=self._best)
        return {
            "measurements": len(self._ends),
            "made while the machine was slow": self.slow,
            "made again": self.again,
            "slowest pace": f"{worst / self._best:.2f} x the best",
        }


def _look() -> float:
    """Return the nanoseconds that a fixed piece of Python takes now."""
    return median(_work() for _ in range(_LOOKS))


def _work() -> int:
    seen: dict[int, tuple[bytes, list[int]]] = {}
    kept: list[int] = []
    begun = perf_counter_ns()
    for number in range(_ROUNDS):
        seen[number % 97] = (number.to_bytes(4, "big"), kept)
        if seen.get(number) is None:
            kept.append(number)
    return perf_counter_ns() - begun
