"""Ctrl-C, heard at once where somebody waits, and between two steps where something must not be torn apart.

Rules:
  1. While `busy` an interrupt is noted, and raised by `done`, when the step is over.
  2. Else it is raised where it falls, as Python does it; that ends a wait for a line of a pipe. So is a second one: a
     step may wait for somebody who never comes.

Doesn't know: what the steps are.
"""

from __future__ import annotations

import contextlib
import signal
from typing import Any, Self


class Interrupts:
    """Decides where Ctrl-C is raised, in the main thread, while it is entered."""

    def __init__(self) -> None:
        self.busy: bool = False
        self._noted = False
        self._before: Any = None

    def __enter__(self) -> Self:
        with contextlib.suppress(ValueError):  # in another thread than the main one there are none
            self._before = signal.signal(signal.SIGINT, self._take)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def done(self) -> None:
        """End a step, and raise what was noted in it."""
        self.busy = False
        if self._noted:
            raise KeyboardInterrupt

    def _take(self, *_: object) -> None:
        if not self.busy or self._noted:
            self.busy = False
            raise KeyboardInterrupt
        self._noted = True
