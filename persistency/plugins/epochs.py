"""Epochs: the ticker that lets time pass for guests. A guest is stopped by it, wherever it is in its own code.

wasmtime compares a number, the epoch, with the one at which a call has to end. Here it is incremented once a tick.

Rules:
  1. The n-th increment since the ticking began never comes before n ticks are over: no call ends early. A tick that
     comes late is made up for by the next one, so that none ends much later either.
  2. While nobody calls, nothing ticks: after a second the thread sleeps, after a while longer it is gone.
  3. Nobody's code runs on this thread, and nothing is waited for: every call's deadline depends on it.

Doesn't know: wasmtime, calls, lines.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from time import monotonic

from persistency.logfields import about

log: logging.Logger = logging.getLogger("persistency.plugins")

TICK_S = 0.01
_LINGER_S = 1.0  # without a call, before it stops ticking
_KEPT_S = 10.0  # asleep, before its thread ends


class Epochs:
    """Ticks as long as a call is inside. `increment` lets one tick pass; `each_tick(now)` is called after it."""

    def __init__(
        self, increment: Callable[[], None], each_tick: Callable[[float], None], tick_s: float = TICK_S
    ) -> None:
        self._increment = increment
        self._each_tick = each_tick
        self._tick_s = tick_s
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._thread: threading.Thread | None = None
        self._inside = 0
        self._ticking = False
        self._begun = 0.0  # when the ticking began
        self._count = 0  # of the increments since then
        self._furthest = 0  # the increment at which the last of those who came has to end
        self._left = 0.0  # when the last one left
        self._over = False

    def enter(self, deadline: float) -> int:
        """Begin a call: return after how many increments, counted from now, its `deadline` has come, and not before.

        Raises `RuntimeError` if there can be no thread: nothing would ever stop the call.
        """
        with self._lock:
            if self._over:
                self._inside += 1
                return 0
            if not self._ticking:
                self._wake()
            self._inside += 1
            last = max(self._count, math.ceil((deadline - self._begun) / self._tick_s))
            while self._begun + last * self._tick_s < deadline:  # what was lost in the division
                last += 1
            self._furthest = max(self._furthest, last)
            return last - self._count

    def leave(self) -> None:
        """End a call."""
        with self._lock:
            self._inside -= 1
            self._left = monotonic()

    def interrupt_all(self, seconds: float) -> None:
        """Let the time of every call be over, now and from now on; that takes `seconds` at the most."""
        until = monotonic() + seconds
        with self._lock:
            self._over = True
            last = self._furthest + self._count  # an end may have been put off by as many ticks as there were
            while self._inside and self._count < last and monotonic() < until:
                self._increment()
                self._count += 1

    def close(self) -> None:
        """End the ticking, when every call has ended."""
        with self._lock:
            self._over = True
            thread = self._thread
        self._bell.put(None)
        if thread is not None:
            thread.join(_LINGER_S)

    # -- the thread --------------------------------------------------------------------------------------------------

    def _wake(self) -> None:
        """Begin to tick. The lock is held."""
        if self._thread is None:
            thread = threading.Thread(target=self._run, name="persistency-plugins-ticker", daemon=True)
            thread.start()
            self._thread = thread
        self._restart()
        self._ticking = True
        self._bell.put(None)

    def _restart(self) -> None:
        """Count from now on, where nobody is left whose end was counted from before. The lock is held."""
        self._begun, self._count, self._furthest = monotonic(), 0, 0

    def _run(self) -> None:
        while True:
            wait: float | None = self._tick_s
            try:
                wait = self._tick()
            except BaseException as error:  # whatever is thrown in here, guests would never be stopped again
                log.exception("a tick for the plugins' calls failed", extra=about("tick_failed", None, error))
            if wait is None:
                return
            with contextlib.suppress(Empty):
                self._bell.get(timeout=wait)

    def _tick(self) -> float | None:
        """Do what is due; return how many seconds to wait for what comes next, or `None` at the end."""
        with self._lock:
            now = monotonic()
            if not self._inside and (self._over or now - max(self._left, self._begun) >= _LINGER_S):
                if self._over or (not self._ticking and now - max(self._left, self._begun) >= _LINGER_S + _KEPT_S):
                    self._thread = None
                    return None
                self._ticking = False
                return _KEPT_S
            due = 0
            # As long as anybody is inside, and not only up to the furthest end: ticks that came between `enter` and the
            # moment at which the guest was given its end have put that off by as many.
            while self._inside and self._begun + (self._count + due + 1) * self._tick_s <= now:
                due += 1
            for _ in range(due):
                self._increment()
                self._count += 1  # one by one, and only then: a call that counts on one too many would end early
            if not self._inside and now >= self._begun + self._tick_s:
                self._restart()
            following = self._begun + (self._count + 1) * self._tick_s
        self._each_tick(now)
        return max(0.0, following - monotonic())
