"""The context of one call of a guest: until when it may run, and what its host functions have had to say meanwhile.

A host function is given no word about which call it is part of; a call stays on one thread from its first instruction
to its last, so that thread's `current` is it.

Rules:
  1. One call at a time per thread: a guest that is running can't be called from its own host functions.
  2. What a host function meets as an exception is kept here, and never raised through a guest: wasmtime keeps a single
     exception for all threads, and would hand it to whichever of them traps next.

Doesn't know: wasmtime, what the functions do.
"""

from __future__ import annotations

import threading
from time import monotonic

TEXT_BYTES_MAX = 4_096  # of what a guest may say with `fail`, and is told by `last_error`


class CallContext:
    """One call: `deadline` on the monotonic clock, `last_error` as the guest may ask for it, `failure` in its words.

    `fault` is an exception no host function foresaw: the call's own failure, if it ends in a trap, has it as its cause.
    """

    __slots__ = ("deadline", "failure", "fault", "last_error")

    def __init__(self, deadline: float) -> None:
        self.deadline: float = deadline
        self.last_error: str = ""
        self.failure: str | None = None
        self.fault: BaseException | None = None

    def remaining(self) -> float:
        """Return how many seconds are left, 0 or more."""
        return max(0.0, self.deadline - monotonic())


class _Current(threading.local):
    call: CallContext | None = None


current: _Current = _Current()
