"""Working: long work that a job does in a thread of its own, while this one waits, shows it, and hears Ctrl-C.

Rules:
  1. Ctrl-C ends the work at its next step, and is told once the work is at rest; work that was through by then is done.

Doesn't know: what the work is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from persistency import Reply
from persistency.cli.show import Advance

T = TypeVar("T")


class _Stopped(Exception):
    """What ends the work."""


def carried_out(begin: Callable[[Advance], Reply[T]], advance: Advance, told: str) -> T:
    """Have work begun, with what is told its progress, and wait for it; `told` is what to say of it at Ctrl-C."""
    stopped = False

    def step(done: int, total: int | None) -> None:
        if stopped:
            raise _Stopped
        advance(done, total)

    reply = begin(step)
    try:
        return reply.result()
    except KeyboardInterrupt:
        stopped = True
        if isinstance(reply.exception(), _Stopped):
            raise KeyboardInterrupt(told) from None
        return reply.result()
