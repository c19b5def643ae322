"""Flights: computations in progress in this process, so that many who want one result have it computed once.

The first to want a result leads its flight: it begins with a claim in the job, computes, keeps, and lands. All others
wait for that, in threads, asyncio and trio alike, and are given the payload, or what the computation raised.

Rules:
  1. A flight ends in whatever way its leader does: it lands, or fails, or is given up; then the next one leads.
  2. Who is in the middle of a computation doesn't wait for one that waits for it: it computes by itself.
  3. Nothing here locks: a dict's `setdefault` decides who leads, and a future settles once.

Doesn't know: functions, arguments, how results are encoded.
"""

from __future__ import annotations

import os
import random
import secrets
import threading
from collections.abc import Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from contextvars import ContextVar, Token
from time import monotonic
from types import TracebackType
from typing import Self, TypeAlias

from persistency import Key, PersistencyError, Reply
from persistency.recipes.memoize_rows import Begun, Claim, begin, keep, packed, release, renew
from persistency.recipes.runner import Runner, place_of, poll_of
from persistency.recipes.waiting import Nap, Steps, unanswered

# A job has one owner, so a claim in it that isn't of this process is of one that is gone, and none is waited for. The
# lease only has the rows of killed processes end.
_ALONE_LEASE_S = 7 * 86_400.0
_RENEWALS = 3  # in the time of one lease

Place: TypeAlias = tuple[Hashable, str, Key]

_flights: dict[Place, Flight] = {}
_leading: ContextVar[tuple[Flight, ...]] = ContextVar("leading", default=())


class Flight:
    """One computation in progress, for those who wait for it."""

    __slots__ = ("_future", "reply", "waits")

    def __init__(self) -> None:
        # The payload, or what the computation raised; neither, if it was given up. An error is an answer too: whoever
        # waits raises it, and if nobody does, it isn't one that nobody has looked at.
        self._future: Future[tuple[bytes | None, Exception | None]]
        self.reply: Reply[tuple[bytes | None, Exception | None]]
        self._future, self.reply = unanswered()
        self.waits: list[Flight] = []  # for which others those in the middle of it wait

    def settle(self, payload: bytes | None, error: Exception | None = None) -> None:
        """Tell those who wait, if they weren't told yet."""
        if not self._future.done():
            self._future.set_result((payload, error))


class Lead:
    """Who computes. Within `with lead:` the computation runs; a lead that is dropped gives its flight up."""

    def __init__(self, runner: Runner, category: str, place: Key, lease: float, *, anew: bool = False) -> None:
        """`anew` is a computation of its own, whose result replaces those of all that have begun before it."""
        self.runner = runner
        self._alone = poll_of(runner) is None
        self._anew = anew
        self._lease = _ALONE_LEASE_S if self._alone else lease
        self.claim = Claim(category, place, secrets.token_bytes(16), self._lease)
        self.flight = Flight()
        self.old: bytes | None = None  # a kept result that is still good
        self._place: Place = (place_of(runner), category, place)
        self._began_ms = 0
        self._claimed = self._over = False
        self._renewing: threading.Event | None = None
        self._token: Token[tuple[Flight, ...]] | None = None

    def board(self) -> Flight:
        """Return the flight there is to this result: one's own, if there was none."""
        return _flights.setdefault(self._place, self.flight)

    def claimed(self, ahead: float, *, patience: float | None) -> Steps[Begun]:
        """Begin, as soon as no other process is at it; for at most `patience` seconds.

        With neither a payload nor a time in what is returned that took too long.
        """
        until = None if patience is None else monotonic() + patience
        waits = not self._alone and not self._anew
        while True:
            self._claimed = True
            begun: Begun = yield self.runner.run(begin, self.claim, ahead, waits, self._anew)
            if begun.began_ms is not None:
                self._began_ms = begun.began_ms
                self._keep_renewing()
                return begun
            self._claimed = False
            if begun.payload is not None or (until is not None and monotonic() >= until):
                return begun
            # Not all who wait at the same moments.
            yield Nap(None, (poll_of(self.runner) or 0.0) * random.uniform(0.5, 1.0))  # noqa: S311  # no secret

    # -- how it ends ---------------------------------------------------------------------------------------------

    def keep(self, encoded: bytes, ttl: float | None) -> Reply[bool]:
        """Have a result kept, and tell those who wait; the reply says whether it was, or why it couldn't be."""
        try:
            kept = self.runner.run(keep, self.claim, encoded, self._began_ms, ttl)
            self._claimed = False
            return kept
        finally:
            self.end(packed(encoded))

    def end(self, payload: bytes | None) -> None:
        """Tell those who wait what there is, and end the flight; `None`: the next one who waits leads another."""
        self._end(payload)

    def fail(self, error: Exception) -> None:
        """Tell those who wait what went wrong, and end the flight."""
        self._end(None, error)

    def give_up(self) -> None:
        """End the flight without a result, if it hasn't ended."""
        self._end(None)

    def _end(self, payload: bytes | None, error: Exception | None = None) -> None:
        if self._over:
            return
        self._over = True
        if self._renewing is not None:
            self._renewing.set()
        if self._claimed:
            self.release()
        flight = self.flight
        if _flights.get(self._place) is flight:
            _flights.pop(self._place, None)
        del self.flight  # or an error, whose traceback has this lead in it, would keep itself alive
        flight.settle(payload, error)

    def release(self) -> None:
        """Have the claim ended, if it stands."""
        self._claimed = False
        # Nobody waits for that: what ends here may have been cancelled. If it fails, the lease ends by itself.
        with suppress(PersistencyError):
            self.runner.run(release, self.claim).add_done_callback(_looked_at)

    def share(self, payload: bytes) -> None:
        """Tell those who wait, now and while it is computed, what there is still."""
        self.old = payload
        self.flight.settle(payload)

    def _keep_renewing(self) -> None:
        if not self._alone:
            self._renewing = threading.Event()
            args = self.runner, self.claim, self._renewing
            threading.Thread(target=_renew, args=args, name="persistency memoize", daemon=True).start()

    def __enter__(self) -> Self:
        self._token = _leading.set((*_leading.get(), self.flight))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._token is not None:
            _leading.reset(self._token)
            self._token = None
        self.give_up()

    def __del__(self) -> None:
        # An interrupt came between two steps, or a coroutine was left behind in the middle of it.
        if not getattr(self, "_over", True):
            self.give_up()


def _looked_at(reply: Future[bool]) -> None:
    """Look at how a release went, so that nobody else is told of it."""
    reply.exception()


def _renew(runner: Runner, claim: Claim, over: threading.Event) -> None:
    """Renew a lease until its computation is over, so that only a process that is gone is replaced."""
    while not over.wait(claim.lease / _RENEWALS):
        try:
            if not runner.run(renew, claim).result():
                return  # forgotten meanwhile, or too late
        except PersistencyError:
            continue  # the next one may get through


# -- those who wait --------------------------------------------------------------------------------------------


def awaited(flight: Flight) -> Steps[tuple[bytes | None, bool]]:
    """Wait for a flight; return its payload, and whether it can't be waited for, as it waits for us.

    Raises what the computation raised.
    """
    with _waiting_for(flight) as waits_for_us:
        if waits_for_us:
            return None, True
        payload, error = yield flight.reply
        if error is not None:
            raise error
        return payload, False


def is_nested() -> bool:
    """Say whether this thread or task is in the middle of a computation."""
    return bool(_leading.get())


@contextmanager
def _waiting_for(flight: Flight) -> Iterator[bool]:
    """Enter that all computations this is in the middle of wait for a flight; say whether that one waits for them."""
    mine = _leading.get()
    for one in mine:
        one.waits.append(flight)
    try:
        # Entered first and looked then: of two who begin to wait for each other at once, one sees the other.
        yield bool(mine) and _reaches(flight, mine)
    finally:
        for one in mine:
            one.waits.remove(flight)


def _reaches(flight: Flight, mine: tuple[Flight, ...]) -> bool:
    seen: set[int] = set()
    to_see = [flight]
    while to_see:
        one = to_see.pop()
        if any(one is other for other in mine):
            return True
        if id(one) not in seen:
            seen.add(id(one))
            to_see += one.waits
    return False


def forget_flights(runner: Runner, category: str, place: Key | None = None) -> None:
    """Have whoever comes from now on not join the flights to a result (`None`: to any of a function)."""
    where = place_of(runner), category
    for found in list(_flights) if place is None else [(*where, place)]:
        if found[:2] == where:
            _flights.pop(found, None)


os.register_at_fork(after_in_child=_flights.clear)  # whoever leads them isn't there
