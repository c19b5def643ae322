"""Working: long work that a job does in a thread of its own, while this one shows it, and hears Ctrl-C and `kill`.

Rules:
  1. Either ends the work at its next step, and is told once the work is at rest; work that was through by then is done.

Doesn't know: what the work is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from persistency import Reply
from persistency.cli.ending import stopped as stopped_by
from persistency.cli.interrupts import Interrupts
from persistency.cli.show import Advance

T = TypeVar("T")


class _Stopped(Exception):
    """What ends the work."""


def carried_out(begin: Callable[[Advance], Reply[T]], advance: Advance, told: str) -> T:
    """Have work begun, with what is told its progress, and wait for it; `told` is what to say if it is stopped."""
    stopped = False

    def step(done: int, total: int | None) -> None:
        if stopped:
            raise _Stopped
        advance(done, total)

    with Interrupts() as interrupts:
        interrupts.busy = True  # work that is begun, and nobody knows of, would be torn off where it stands
        reply = begin(step)
        try:
            interrupts.done()
            return reply.result()
        except (KeyboardInterrupt, SystemExit) as stop:
            stopped = True
            if isinstance(reply.exception(), _Stopped):
                raise stopped_by(stop, told) from None
            if isinstance(stop, SystemExit):
                raise
            return reply.result()
