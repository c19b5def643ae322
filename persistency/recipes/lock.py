"""The lock: one holder at a time, for as long as it renews its lease, with a token that fences off who has lost it.

Rules:
  1. It is held until it is released, or its holder is dead, paused or cut off for a whole lease.
  2. Waiters of one process get it in the order they came; a release wakes the first. Where other processes may hold it
     the first looks again every `poll` seconds of its runner, and in any case when the holder's lease is over.
  3. Whoever gives up waiting has given back what may come to him all the same.
  4. Who has entered it by `with` and asks for it again would wait for himself: that is `Misuse`.
  5. A timeout of 0 is one attempt, however long its answer takes. Any other bounds the attempts as well.

Doesn't know: what it is for; its row (`lock_rows`), the holder's side of it (`lock_grant`), renewing (`lock_keeper`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from concurrent.futures import Future
from datetime import timedelta
from types import TracebackType
from typing import Any

from persistency import Forked, Misuse, Reply
from persistency.recipes.lock_grant import Grant, LockLost, Terms
from persistency.recipes.lock_keeper import clock
from persistency.recipes.lock_line import line_of
from persistency.recipes.lock_rows import LockRow, Taken, free, take
from persistency.recipes.runner import Runner, as_runner, place_of, poll_of
from persistency.recipes.waiting import Nap, Steps, adrive, drive

__all__ = ["Grant", "Lock", "LockLost"]

LEASE_SECONDS_MIN = 0.01
LEASE_SECONDS_MAX = 1e9  # who waits for longer waits for ever
_NAME_BYTES_MAX = 1024
_CATEGORY_BYTES_MAX = 255
_FOREVER = float("inf")


class Lock:
    """A lock in a job, by its name: for the threads, tasks and, with a `Baton`, processes that share the job.

    `runner`: a `Job` or a `Baton`. `lease`: for how many seconds (or a `timedelta`) the lock stays held if nothing is
    heard of its holder, from 0.01. `renew`: begin the lease anew in the background every third of it, as long as the
    grant is held; without, it is lost after one lease, unless its holder calls `renew()`. `on_lost`: called with the
    grant, once, when that is lost. `category`: where the job keeps its locks. Any number of `Lock` objects of one name
    are the same lock.

    It is not re-entrant, and has no owner: a `Grant` may be released by any thread. Raises `Misuse`.
    """

    __slots__ = ("_pid", "_terms")

    def __init__(
        self,
        runner: Runner,
        name: str,
        *,
        lease: float | timedelta = 30.0,
        renew: bool = True,
        on_lost: Callable[[Grant], object] | None = None,
        category: str = "locks",
    ) -> None:
        runner = as_runner(runner)
        _check_text(name, "name", _NAME_BYTES_MAX)
        _check_text(category, "category", _CATEGORY_BYTES_MAX)
        lease = _seconds(lease, "lease")
        if not LEASE_SECONDS_MIN <= lease <= LEASE_SECONDS_MAX:
            raise Misuse(f"lease must be {LEASE_SECONDS_MIN} to {LEASE_SECONDS_MAX:.0f} seconds, not {lease!r}")
        if not isinstance(renew, bool):
            raise Misuse(f"renew must be a bool, not {type(renew).__name__}: pass True or False")
        if on_lost is not None and not callable(on_lost):
            raise Misuse(f"on_lost must be callable, not {type(on_lost).__name__}: pass a function of the grant")
        row = LockRow(category, name, round(lease * 1000))
        self._terms = Terms(runner, row, renew, on_lost, line_of((place_of(runner), category, name)))
        self._pid = os.getpid()

    @property
    def name(self) -> str:
        """The lock's name."""
        return self._terms.row.name

    @property
    def lease(self) -> float:
        """For how many seconds the lock stays held if nothing is heard of its holder."""
        return self._terms.lease

    def try_acquire(self) -> Reply[Grant | None]:
        """Answer with a grant, or with `None` if the lock is held.

        Given back is what nobody has looked at when the reply is garbage.
        """
        self._check_here()
        asked = self._terms.runner.run(take, self._terms.row)
        return asked.map(_Offer(self, asked))

    def acquire(self, timeout: float | timedelta | None = None) -> Grant:
        """Wait until the lock is free, and take it.

        Raises `TimeoutError` after `timeout` seconds, or a `timedelta`; with 0, if it isn't free at the one attempt.
        """
        return drive(self._acquiring(timeout))

    async def aacquire(self, timeout: float | timedelta | None = None) -> Grant:
        """Do what `acquire` does, without blocking the event loop. A cancelled task has not got the lock."""
        return await adrive(self._acquiring(timeout))

    def _acquiring(self, timeout: float | timedelta | None) -> Steps[Grant]:
        """Return the steps of waiting for the lock. What can be wrong is found before the first."""
        self._check_here()
        left = _FOREVER if timeout is None else _seconds(timeout, "timeout")
        if self._terms.line.has_entered():
            raise Misuse(
                f"{self!r} is asked for by whoever is inside of it already, and would be waited for without an end",
                hint="It isn't re-entrant: acquire it once, around all that needs it.",
            )
        return self._wait(clock() + left, _FOREVER if left == 0 else clock() + left)

    def _wait(self, until: float, answered_until: float) -> Steps[Grant]:
        runner, row, _, _, line = self._terms
        poll = poll_of(runner)
        turn = line.join()
        asked: Reply[Taken] | None = None
        try:
            while True:
                rung = turn.listen()
                again = clock() + self._terms.lease  # should nobody be left of those before, nobody rings either
                if line.is_first(turn):
                    asked = runner.run(take, row)
                    if not (yield _nap(asked, answered_until)) or asked.cancelled():
                        break
                    taken, asked = asked.result(), None
                    grant = self._granted(taken)
                    if grant is not None:
                        return grant
                    again = clock() + (taken.wait_s if poll is None else min(taken.wait_s, poll))
                if clock() >= until:
                    break
                yield _nap(rung, min(again, until))
                if clock() >= until:  # an attempt would be given up at once
                    break
            raise TimeoutError(f"lock {row.name!r} of job {runner.id!r} wasn't free in time")
        finally:
            if asked is not None:
                asked.add_done_callback(self._give_back)
            line.leave(turn)

    def _granted(self, taken: Taken) -> Grant | None:
        return None if taken.token is None else Grant(self._terms, taken.token, taken.until, taken.payload)

    def _give_back(self, asked: Future[Taken]) -> None:
        """Free what came to somebody who doesn't wait for it any more."""
        if asked.cancelled() or asked.exception() is not None:
            return
        token = asked.result().token
        if token is not None:
            # If the job takes nothing any more, the lock is free when the lease is over.
            with contextlib.suppress(Exception):
                self._terms.runner.run(free, self._terms.row, token).add_done_callback(self._ring)

    def _ring(self, freed: Future[bool]) -> None:
        if freed.exception() is None:
            self._terms.line.ring()

    # -- as a block ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Grant:
        grant = self.acquire()
        self._terms.line.enter(grant)
        return grant

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pid == os.getpid():  # in a forked child the block ends, and the lock stays the parent's
            self._terms.line.exit().__exit__(kind, error, trace)

    async def __aenter__(self) -> Grant:
        grant = await self.aacquire()
        self._terms.line.enter(grant)
        return grant

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pid == os.getpid():
            await self._terms.line.exit().__aexit__(kind, error, trace)

    def _check_here(self) -> None:
        if self._pid != os.getpid():
            raise Forked(f"{self!r} is the parent process'", hint="Make a Lock in this process, over its own runner.")

    def __repr__(self) -> str:
        return f"<Lock {self.name!r} of job {self._terms.runner.id!r}>"


class _Offer:
    """Makes a grant of what an attempt gave, for whoever looks at it; if nobody ever does, it is given back."""

    __slots__ = ("_asked", "_lock", "_pid")

    def __init__(self, lock: Lock, asked: Reply[Taken]) -> None:
        self._lock = lock
        self._pid = os.getpid()
        self._asked: Reply[Taken] | None = asked

    def __call__(self, taken: Taken) -> Grant | None:
        self._asked = None
        return self._lock._granted(taken)

    def __del__(self) -> None:
        asked: Reply[Taken] | None = getattr(self, "_asked", None)
        if asked is not None and self._pid == os.getpid():
            asked.add_done_callback(self._lock._give_back)


def _nap(reply: Reply[Any], until: float) -> Nap:
    return Nap(reply, None if until == _FOREVER else max(0.0, until - clock()))


def _check_text(value: Any, argument: str, most: int) -> None:
    if not isinstance(value, str):
        raise Misuse(f"{argument} must be a str, not {type(value).__name__}: pass a name like 'nightly-report'")
    try:
        nbytes = len(value.encode())
    except UnicodeEncodeError as error:
        raise Misuse(f"{argument} {value!r:.40} holds a lone surrogate: pass text that UTF-8 can hold") from error
    if not 1 <= nbytes <= most:
        raise Misuse(f"{argument} must have 1 to {most} UTF-8 bytes, not {nbytes}: pass a name like 'nightly-report'")


def _seconds(value: Any, argument: str) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise Misuse(f"{argument} must be seconds or a timedelta, not {type(value).__name__}: pass {argument}=30.0")
    if not seconds >= 0:  # NaN too
        raise Misuse(f"{argument} must be 0 or more seconds, not {value!r}")
    return float(seconds) if seconds <= LEASE_SECONDS_MAX else _FOREVER
