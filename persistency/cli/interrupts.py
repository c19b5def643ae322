"""Ctrl-C and `kill`, heard at once where somebody waits, and between two steps where none must be torn apart.

Rules:
  1. While `busy` an interrupt is noted, and raised by `done`, when the step is over.
  2. Else it is raised where it falls, as Python does it; that ends a wait for a line of a pipe. So is a second one: a
     step may wait for somebody who never comes.

Doesn't know: what the steps are.
"""

from __future__ import annotations

import contextlib
import signal
from typing import Any, NoReturn, Self


class Interrupts:
    """Decides where Ctrl-C and `kill` are raised, in the main thread, while it is entered."""

    def __init__(self) -> None:
        self.busy: bool = False
        self._noted = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        with contextlib.suppress(ValueError):  # in another thread than the main one there are none
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if callable(before := signal.getsignal(number)):  # who ignores a signal, or dies of it, goes on so
                    self._before[number] = before
                    signal.signal(number, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def done(self) -> None:
        """End a step, and raise what was noted in it."""
        self.busy = False
        if self._noted:
            _raise(self._noted)

    def _take(self, number: int, _frame: object) -> None:
        if not self.busy or self._noted:
            self.busy = False
            _raise(number)
        self._noted = number


def _raise(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
