"""The rate limiter: so many per so long, for each key, with room for a burst.

It is the generic cell rate algorithm (GCRA) in its form as virtual scheduling, from the ATM Forum's Traffic Management
Specification 4.0 (af-tm-0056.000, 1996) and ITU-T recommendation I.371. A key has one number, the theoretical arrival
time: when all that was taken would have been taken, had it come evenly, one in each `per / limit`. What comes may be
ahead of that by a burst. So there is nothing to count in windows, and nothing to refill.

| category | key | payload, in CBOR |
|---|---|---|
| limits | the key | [theoretical arrival time, limit]; ends at that time, when it says nothing any more |

Rules:
  1. All is reckoned in whole numbers: times in parts of a millisecond, as many to one as the limit is, so that the
     distance of two of an even flow is whole. The row has the limit with it, and one that was changed converts.
  2. Asking and taking are one transaction, by the job's clock.
  3. In any time of `w` seconds no more is taken than `burst + w * limit / per`.
  4. Who waits has reserved its turn, in the order of asking. Given up, it goes back, if nobody has reserved since.

Doesn't know: what is limited.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from datetime import timedelta
from functools import partial
from time import monotonic
from typing import Any, NamedTuple, TypeAlias

from persistency import CBOR, Corrupt, Key, Misuse, Reply, Transaction, key
from persistency.recipes.runner import Runner, as_runner
from persistency.recipes.waiting import Nap, Steps, adrive, drive

Limited: TypeAlias = Key | tuple[Any, ...] | str | int
"""What is limited: a key, a tuple, or a text or number alone, which stands for the tuple of it."""

LIMIT_MAX = 1_000_000_000
PER_SECONDS_MAX = 1e9


class Verdict(NamedTuple):
    """What a limiter says: `remaining` could be taken at once, or the asked could be after `retry_after` seconds."""

    allowed: bool
    remaining: int
    retry_after: float


class _Rate(NamedTuple):
    """The rate, in parts of a millisecond of which there are `limit` to one."""

    category: str
    limit: int
    step: int  # from one to the next in an even flow; also how many milliseconds `limit` of them take
    burst: int

    @property
    def room(self) -> int:
        """How far ahead of an even flow one may be."""
        return self.burst * self.step


class _Reserved(NamedTuple):
    """A turn: when it comes, by this process' clock, and the arrival time written for it; `None`: it comes too late."""

    due: float
    arrival: int | None


class RateLimiter:
    """Allows `limit` in `per` seconds for each key, evenly, and up to `burst` at once.

    `runner`: a `Job` or a `Baton`; `name`: the category of its rows, one for each key that isn't idle. `burst` is
    `limit` unless it is said: who has been idle may take all at once. So in any `per` seconds there may be
    `limit + burst`, and never more. Raises `Misuse`.
    """

    __slots__ = ("_rate", "_runner")

    def __init__(
        self, runner: Runner, name: str = "limits", *, limit: int, per: float | timedelta, burst: int | None = None
    ) -> None:
        self._runner = as_runner(runner)
        if not _is_name(name):
            raise Misuse(f"name must be a str of 1 to 255 UTF-8 bytes, not {name!r:.40}: pass a name like 'limits'")
        limit = _count(limit, "limit", LIMIT_MAX)
        self._rate = _Rate(name, limit, _per_ms(per), limit if burst is None else _count(burst, "burst", LIMIT_MAX))

    def check(self, key: Limited, n: int = 1) -> Reply[Verdict]:
        """Take `n` if that is allowed now, and answer whether it was. More than the burst never is: `Misuse`."""
        return self._runner.run(_check, self._rate, _as_key(key), self._as_n(n), True)

    def check_in(self, tx: Transaction, key: Limited, n: int = 1) -> Verdict:
        """Do what `check` does as a part of your own transaction: what it takes is taken if that is committed."""
        return _check(tx, self._rate, _as_key(key), self._as_n(n), True)

    def peek(self, key: Limited, n: int = 1) -> Reply[Verdict]:
        """Answer what `check` would, and take nothing."""
        return self._runner.run(_check, self._rate, _as_key(key), self._as_n(n), False)

    def take(self, key: Limited, n: int = 1, timeout: float | None = None) -> None:
        """Take `n`, and wait for the turn it has then.

        Raises `TimeoutError` at once, and takes nothing, if that turn comes later than in `timeout` seconds. Who gives
        up waiting has his turn taken back, if nobody has come after him.
        """
        drive(self._taking(key, n, timeout))

    async def atake(self, key: Limited, n: int = 1, timeout: float | None = None) -> None:
        """Do what `take` does, without blocking the event loop."""
        await adrive(self._taking(key, n, timeout))

    def reset(self, key: Limited) -> Reply[bool]:
        """Forget what was taken; answer whether there was anything."""
        return self._runner.run(_reset, self._rate, _as_key(key))

    def _taking(self, which: Limited, n: int, timeout: float | None) -> Steps[None]:
        """Return the steps of waiting for a turn. What can be wrong is found before the first."""
        until = float("inf") if timeout is None else monotonic() + _seconds(timeout, "timeout")
        return self._turn(_as_key(which), self._as_n(n), until)

    def _turn(self, which: Key, n: int, until: float) -> Steps[None]:
        asked = self._runner.run(_reserve, self._rate, which, n, until)
        came = False
        try:
            left = None if until == float("inf") else max(0.0, until - monotonic())
            if not (yield Nap(asked, left)) or asked.cancelled():
                raise TimeoutError(f"{self!r} couldn't be asked in time")
            reserved = asked.result()
            if reserved.arrival is None:
                raise TimeoutError(f"{self!r} has no turn for {n} of {which!r} in time")
            if reserved.due > monotonic():
                yield Nap(None, reserved.due - monotonic())
            came = True
        finally:
            if not came:
                asked.add_done_callback(partial(self._give_back, which, n))

    def _give_back(self, which: Key, n: int, asked: Future[_Reserved]) -> None:
        """Undo what was reserved for somebody who doesn't wait for it any more."""
        if asked.cancelled() or asked.exception() is not None:
            return
        arrival = asked.result().arrival
        if arrival is not None:
            with contextlib.suppress(Exception):  # if the job takes nothing any more, it counts as taken
                undone = self._runner.run(_undo, self._rate, which, n, arrival)
                undone.add_done_callback(lambda undone: undone.exception())

    def _as_n(self, n: Any) -> int:
        if isinstance(n, bool) or not isinstance(n, int):
            raise Misuse(f"n must be an int, not {type(n).__name__}: pass 1 or more")
        if not 1 <= n <= self._rate.burst:
            raise Misuse(f"n must be 1 to {self._rate.burst}, the burst, not {n!r:.40}: more can never be had at once")
        return n

    def __repr__(self) -> str:
        rate = self._rate
        return (
            f"<RateLimiter {rate.category!r} of job {self._runner.id!r}: "
            f"{rate.limit} in {rate.step / 1000:g} s, burst {rate.burst}>"
        )


# -- inside a transaction ------------------------------------------------------------------------------------------


def _arrival(tx: Transaction, rate: _Rate, which: Key, now: int) -> int:
    """Return a key's theoretical arrival time: `now` at the earliest."""
    payload = tx.get(rate.category, which)
    if payload is None:
        return now
    match CBOR.decode(payload):
        case [int(arrival), int(limit)] if limit > 0:
            # Rounded up, as whoever has changed the limit isn't to get more by it.
            return max(now, -(-arrival * rate.limit // limit))
        case _:
            raise Corrupt(f"{rate.category}, {which!r}: that isn't what a rate limiter writes")


def _write(tx: Transaction, rate: _Rate, which: Key, arrival: int, now: int) -> None:
    """Keep an arrival time until it is past."""
    left_ms = -(-(arrival - now) // rate.limit)
    if left_ms > 0:
        tx.put(rate.category, which, CBOR.encode([arrival, rate.limit]), ttl=timedelta(milliseconds=left_ms))
    else:
        tx.delete(rate.category, which)


def _check(tx: Transaction, rate: _Rate, which: Key, n: int, takes: bool) -> Verdict:
    now = tx.now_ms * rate.limit
    arrival = _arrival(tx, rate, which, now)
    late = arrival + n * rate.step - now - rate.room
    allowed = late <= 0
    if allowed and takes:
        arrival += n * rate.step
        _write(tx, rate, which, arrival, now)
    remaining = max(0, now + rate.room - arrival) // rate.step
    return Verdict(allowed, remaining, 0.0 if allowed else -(-late // rate.limit) / 1000)


def _reserve(tx: Transaction, rate: _Rate, which: Key, n: int, until: float) -> _Reserved:
    """Take `n` in advance, unless their turn comes after `until`."""
    now = tx.now_ms * rate.limit
    arrival = _arrival(tx, rate, which, now) + n * rate.step
    wait_ms = max(0, -(-(arrival - now - rate.room) // rate.limit))
    due = monotonic() + wait_ms / 1000  # read after the job's time, so that nobody comes early
    if wait_ms and due > until:
        return _Reserved(due, None)
    _write(tx, rate, which, arrival, now)
    return _Reserved(due, arrival)


def _undo(tx: Transaction, rate: _Rate, which: Key, n: int, arrival: int) -> None:
    """Take back what was reserved, if nobody has come after it: others rely on when theirs was said to be."""
    if tx.get(rate.category, which) == CBOR.encode([arrival, rate.limit]):
        _write(tx, rate, which, arrival - n * rate.step, tx.now_ms * rate.limit)


def _reset(tx: Transaction, rate: _Rate, which: Key) -> bool:
    return tx.delete_acked(rate.category, which)


# -- arguments -----------------------------------------------------------------------------------------------------


def _as_key(which: Any) -> Key:
    """Return the key of what is limited. Raises `Misuse`."""
    return which if isinstance(which, Key) else key(*which) if isinstance(which, tuple) else key(which)


def _is_name(value: Any) -> bool:
    try:
        return isinstance(value, str) and 1 <= len(value.encode()) <= 255
    except UnicodeEncodeError:  # a lone surrogate
        return False


def _count(value: Any, argument: str, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Misuse(f"{argument} must be an int, not {type(value).__name__}: pass 1 or more")
    if not 1 <= value <= most:
        raise Misuse(f"{argument} must be 1 to {most:,}, not {value!r:.40}")
    return value


def _seconds(value: Any, argument: str) -> float:
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Misuse(f"{argument} must be a number of seconds, not {type(value).__name__}: pass {argument}=60.0")
    if not value >= 0:  # NaN too
        raise Misuse(f"{argument} must be 0 or more seconds, not {value!r}")
    return float(value)


def _per_ms(per: Any) -> int:
    seconds = _seconds(per, "per")
    if not 0.001 <= seconds <= PER_SECONDS_MAX:
        raise Misuse(f"per must be 0.001 to {PER_SECONDS_MAX:,.0f} seconds, not {per!r}")
    return round(seconds * 1000)
