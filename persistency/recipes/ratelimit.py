"""The rate limiter: so many per so long, for each key, with room for a burst.

It is the generic cell rate algorithm (GCRA) in its form as virtual scheduling, from the ATM Forum's Traffic Management
Specification 4.0 (af-tm-0056.000, 1996) and ITU-T recommendation I.371. A key has one number, the theoretical arrival
time: when all that was taken would have been taken, had it come evenly, one in each `per / limit`. What comes may be
ahead of that by a burst. So there is nothing to count in windows, and nothing to refill.

| category | key | payload, in CBOR |
|---|---|---|
| limits | the key | [theoretical arrival time, limit]; ends at that time, when it says nothing any more |

Where turns were given up that others came after, a map follows: of the arrival time of each, how far it had moved it.

Rules:
  1. All is reckoned in whole numbers: times in parts of a millisecond, as many to one as the limit is, so that the
     distance of two of an even flow is whole. The row has the limit with it, and one that was changed converts.
  2. Asking and taking are one transaction, by the job's clock.
  3. In any time of `w` seconds no more is taken than `burst + w * limit / per`.
  4. Who waits has reserved its turn, in the order of asking. Given up, it goes back as soon as nobody who came after it
     relies on his own any more.

Doesn't know: what is limited.
"""

from __future__ import annotations

import contextlib
from concurrent.futures import Future
from datetime import timedelta
from decimal import Decimal
from functools import partial
from math import ceil
from time import monotonic
from typing import Any, NamedTuple, TypeAlias, TypeGuard

from persistency import CBOR, Corrupt, Key, Misuse, Reply, Transaction, key
from persistency.recipes.runner import Runner, as_runner
from persistency.recipes.waiting import Nap, Steps, adrive, drive

Limited: TypeAlias = Key | tuple[Any, ...] | str | int
"""What is limited: a key, a tuple, or a text or number alone, which stands for the tuple of it."""

LIMIT_MAX = 1_000_000_000
_FOREVER = float("inf")
PER_SECONDS_MAX = 1e9
# A row remembers as many turns that were given up; of more than these the first ones stay taken.
_GIVEN_UP_MAX = 1_000


class Verdict(NamedTuple):
    """What a limiter says: `remaining` could be taken at once, or the asked could be after `retry_after` seconds."""

    allowed: bool
    remaining: int
    retry_after: float


class _Rate(NamedTuple):
    """The rate; its times are in parts of a millisecond, of which there are `limit` to one."""

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


class _Row(NamedTuple):
    """What a key's row says, by a rate."""

    arrival: int
    given_up: dict[int, int]
    of_other_limit: bool = False


class RateLimiter:
    """Allows `limit` in `per` seconds for each key, evenly, and up to `burst` at once.

    `runner`: a `Job` or a `Baton`; `name`: the category of its rows, one for each key that isn't idle. `burst` is
    `limit` unless it is said: who has been idle may take all at once. So in any `per` seconds there may be
    `limit + burst`, and never more. `per`: in seconds, or a `timedelta`; it counts in whole milliseconds, rounded up.
    Raises `Misuse`.
    """

    __slots__ = ("_rate", "_runner")

    def __init__(
        self, runner: Runner, name: str = "limits", *, limit: int, per: float | timedelta, burst: int | None = None
    ) -> None:
        self._runner = as_runner(runner)
        if not _is_name(name):
            raise Misuse(f"name must be a str of 1 to 255 UTF-8 bytes, not {name!r:.40}: pass a name like 'limits'")
        limit = _count(limit, "limit", LIMIT_MAX)
        burst = limit if burst is None else _count(burst, "burst", LIMIT_MAX)
        self._rate = _Rate(name, limit, _per_ms(per), burst)
        if self._rate.room > PER_SECONDS_MAX * 1000 * limit:
            raise Misuse(
                f"burst * per / limit must be at most {PER_SECONDS_MAX:,.0f} seconds, which a burst of {burst:,} isn't",
                hint="So long it takes until another burst can be taken: choose a smaller one.",
            )

    def check(self, key: Limited, n: int = 1) -> Reply[Verdict]:
        """Take `n` if that is allowed now, and answer whether it was. More than the burst never is: `Misuse`."""
        return self._runner.run(_check, self._rate, _as_key(key), self._as_n(n), True)

    def check_in(self, tx: Transaction, key: Limited, n: int = 1) -> Verdict:
        """Do what `check` does as a part of your own transaction: what it takes is taken if that is committed.

        The transaction is one of the limiter's own job; else it is `Misuse`.
        """
        if tx.job_id != self._runner.id:
            raise Misuse(
                f"{self!r} is asked in a transaction of job {tx.job_id!r}",
                hint="What it counts is in its own job: ask it there, or make a limiter over this one.",
            )
        return _check(tx, self._rate, _as_key(key), self._as_n(n), True)

    def peek(self, key: Limited, n: int = 1) -> Reply[Verdict]:
        """Answer what `check` would, and take nothing."""
        return self._runner.run(_check, self._rate, _as_key(key), self._as_n(n), False)

    def take(self, key: Limited, n: int = 1, timeout: float | timedelta | None = None) -> None:
        """Take `n`, and wait for the turn it has then.

        Raises `TimeoutError` at once, and takes nothing, if that turn comes later than in `timeout` seconds, or a
        `timedelta`; with 0, if it isn't now. Who gives up waiting has his turn taken back, once all who came after him
        have given up theirs.
        """
        drive(self._taking(key, n, timeout))

    async def atake(self, key: Limited, n: int = 1, timeout: float | timedelta | None = None) -> None:
        """Do what `take` does, without blocking the event loop."""
        await adrive(self._taking(key, n, timeout))

    def reset(self, key: Limited) -> Reply[bool]:
        """Forget what was taken; answer whether there was anything."""
        return self._runner.run(_reset, self._rate, _as_key(key))

    def _taking(self, which: Limited, n: int, timeout: float | timedelta | None) -> Steps[None]:
        """Return the steps of waiting for a turn. What can be wrong is found before the first."""
        left = _FOREVER if timeout is None else _seconds(timeout, "timeout")
        until = monotonic() + left
        # With a timeout of 0 the answer is waited for all the same: it is whether the turn is now.
        return self._turn(_as_key(which), self._as_n(n), until, _FOREVER if left == 0 else until)

    def _turn(self, which: Key, n: int, until: float, answered_until: float) -> Steps[None]:
        asked = self._runner.run(_reserve, self._rate, which, n, until)
        came = False
        try:
            left = None if answered_until == _FOREVER else max(0.0, answered_until - monotonic())
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
                asked.add_done_callback(partial(self._give_back, which, n * self._rate.step))

    def _give_back(self, which: Key, span: int, asked: Future[_Reserved]) -> None:
        """Undo what was reserved for somebody who doesn't wait for it any more."""
        if asked.cancelled() or asked.exception() is not None:
            return
        arrival = asked.result().arrival
        if arrival is not None:
            with contextlib.suppress(Exception):  # if the job takes nothing any more, it counts as taken
                undone = self._runner.run(_undo, self._rate, which, span, arrival)
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


def _read(tx: Transaction, rate: _Rate, which: Key, now: int) -> _Row:
    """Return a key's theoretical arrival time, `now` at the earliest, and the turns given up that are still to come."""
    payload = tx.get(rate.category, which)
    if payload is None:
        return _Row(now, {})
    match CBOR.decode(payload):
        case [int(arrival), int(limit), *more] if limit > 0 and len(more) < 2:
            given_up = more[0] if more else {}
            if _is_given_up(given_up):
                # Rounded up, as whoever has changed the limit isn't to get more by it.
                first = max(now, -(-arrival * rate.limit // limit))
                if limit != rate.limit:  # then turns that were given up stay taken
                    return _Row(first, {}, True)
                return _Row(first, {at: span for at, span in given_up.items() if at > now})
    raise Corrupt(f"{rate.category}, {which!r}: that isn't what a rate limiter writes")


def _is_given_up(value: Any) -> TypeGuard[dict[int, int]]:
    return isinstance(value, dict) and all(isinstance(one, int) for item in value.items() for one in item)


def _write(tx: Transaction, rate: _Rate, which: Key, row: _Row, now: int) -> None:
    """Keep an arrival time until it is past."""
    left_ms = -(-(row.arrival - now) // rate.limit)
    if left_ms > 0:
        given_up = [row.given_up] if row.given_up else []
        payload = CBOR.encode([row.arrival, rate.limit, *given_up])
        tx.put(rate.category, which, payload, ttl=timedelta(milliseconds=left_ms))
    else:
        tx.delete(rate.category, which)


def _check(tx: Transaction, rate: _Rate, which: Key, n: int, takes: bool) -> Verdict:
    now = tx.now_ms * rate.limit
    arrival, given_up, _ = _read(tx, rate, which, now)
    late = arrival + n * rate.step - now - rate.room
    allowed = late <= 0
    if allowed and takes:
        arrival += n * rate.step
        _write(tx, rate, which, _Row(arrival, given_up), now)
    remaining = max(0, now + rate.room - arrival) // rate.step
    return Verdict(allowed, remaining, 0.0 if allowed else -(-late // rate.limit) / 1000)


def _reserve(tx: Transaction, rate: _Rate, which: Key, n: int, until: float) -> _Reserved:
    """Take `n` in advance, unless their turn comes after `until`."""
    now = tx.now_ms * rate.limit
    arrival, given_up, _ = _read(tx, rate, which, now)
    arrival += n * rate.step
    wait_ms = max(0, -(-(arrival - now - rate.room) // rate.limit))
    due = monotonic() + wait_ms / 1000  # read after the job's time, so that nobody comes early
    if wait_ms and due > until:
        return _Reserved(due, None)
    _write(tx, rate, which, _Row(arrival, given_up), now)
    return _Reserved(due, arrival)


def _undo(tx: Transaction, rate: _Rate, which: Key, span: int, arrival: int) -> None:
    """Take back what was reserved, and what was given up before it. Not while anybody has his turn after it: others
    rely on when theirs was said to be. Then it is remembered, until they have given up theirs, or it is past.
    """
    now = tx.now_ms * rate.limit
    last, given_up, of_other_limit = _read(tx, rate, which, now)
    if of_other_limit or not now < arrival <= last:
        return
    given_up[arrival] = span
    while last in given_up:
        last -= given_up.pop(last)
    _write(tx, rate, which, _Row(last, dict(sorted(given_up.items())[-_GIVEN_UP_MAX:])), now)


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
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise Misuse(f"{argument} must be seconds or a timedelta, not {type(value).__name__}: pass {argument}=60.0")
    if not seconds >= 0:  # NaN too
        raise Misuse(f"{argument} must be 0 or more seconds, not {value!r}")
    return float(seconds) if seconds <= PER_SECONDS_MAX else _FOREVER


def _per_ms(per: Any) -> int:
    seconds = _seconds(per, "per")
    if not 0.001 <= seconds <= PER_SECONDS_MAX:
        raise Misuse(f"per must be 0.001 to {PER_SECONDS_MAX:,.0f} seconds, not {per!r}")
    # Rounded up, so that no more gets through than was promised; of the number as it was written: 0.069 is 69 ms.
    return ceil(Decimal(repr(seconds)) * 1000)
