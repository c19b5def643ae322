"""Flights: computations in progress in this process, so that many who want one result have it computed once.

The first to want a result leads its flight: it begins with a claim in the job, computes, keeps, and lands. All others
wait for that, in threads, asyncio and trio alike, and are given the payload, or what the computation raised.

Rules:
  1. A flight ends in whatever way its leader does: it lands, or fails, or is given up; then the next one leads.
  2. Who is in the middle of a computation doesn't wait for one that waits for it: it computes by itself. Whoever blocks
     its thread is in the middle of all that is computed in that thread.
  3. While a result is computed before its end others get the old one, as long as it is kept.
  4. What has ended holds neither a result nor an error: a context that lives on, as that of a task started in the
     middle, has the flight in it.
  5. Nothing here locks: a dict's `setdefault` decides who leads, and a future settles once.

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
from typing import NamedTuple, Self, TypeAlias

from persistency import Job, Key, PersistencyError, QuotaExceeded, Reply
from persistency.recipes.memoize_rows import Begun, Claim, begin, keep, look, packed, release, renew
from persistency.recipes.runner import Runner, place_of, poll_of
from persistency.recipes.waiting import Nap, Steps, unanswered

# A job has one owner, so a claim in it that isn't of this process is of one that is gone, and none is waited for. The
# lease only has the rows of killed processes end.
_ALONE_LEASE_S = 7 * 86_400.0
_RENEWALS = 3  # in the time of one lease

Place: TypeAlias = tuple[Hashable, str, Key]

_flights: dict[Place, Flight] = {}
_leading: ContextVar[tuple[Flight, ...]] = ContextVar("leading", default=())


class _Here(threading.local):
    """The flights that are led in this thread, whichever task does."""

    def __init__(self) -> None:
        self.flights: list[Flight] = []


_here = _Here()


class Answer(NamedTuple):
    """The payload of a flight, or what its computation raised; neither, if it was given up."""

    payload: bytes | None
    error: Exception | None = None


class Stage(NamedTuple):
    """What those who come to a flight now wait for; with `has_old` only if the kept result has ended."""

    reply: Reply[Answer]
    has_old: bool


class Flight:
    """One computation in progress, for those who wait for it."""

    __slots__ = ("_future", "stage", "waits")

    def __init__(self) -> None:
        # An error is an answer too: whoever waits raises it; and if nobody does, it isn't one that nobody has seen.
        self._future: Future[Answer] | None
        self._future, reply = unanswered()
        self.stage: Stage | None = Stage(reply, has_old=False)  # `None`: it has ended
        self.waits: list[Flight] = []  # for which others those in the middle of it wait

    def share(self, payload: bytes) -> None:
        """Tell those who wait what there is still. Who comes later looks whether it is."""
        told = self._future
        self._future, reply = unanswered()
        self.stage = Stage(reply, has_old=True)
        if told is not None:
            told.set_result(Answer(payload))

    def settle(self, payload: bytes | None, error: Exception | None = None) -> None:
        """Tell those who wait, and end."""
        told, self._future, self.stage = self._future, None, None
        if told is not None:
            told.set_result(Answer(payload, error))


class Lead:
    """Who computes. Within `with lead:` the computation runs; a lead that is dropped gives its flight up."""

    def __init__(self, runner: Runner, category: str, place: Key, lease: float, *, anew: bool = False) -> None:
        """`anew` is a computation of its own, whose result replaces those of all that have begun before it."""
        self.runner = runner
        self._alone = poll_of(runner) is None
        self._anew = anew
        self._lease = _ALONE_LEASE_S if self._alone else lease
        self.claim: Claim = Claim(category, place, secrets.token_bytes(16), self._lease)
        self.flight: Flight = Flight()
        self.has_old: bool = False  # there was a kept result when this began
        self._place: Place = (place_of(runner), category, place)
        self._began_ms = 0
        self._claimed = self._over = False
        self._renewing: threading.Event | None = None
        self._token: Token[tuple[Flight, ...]] | None = None
        self._here = _here.flights  # of this thread, whichever one ends this
        self._here.append(self.flight)

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
            begun: Begun
            try:
                begun = yield self.runner.run(begin, self.claim, ahead, waits, self._anew)
            except QuotaExceeded:  # not even a claim has room; a result that is to end soon is good until then
                kept = None if self._anew else (yield self.look())
                if kept is None:
                    raise
                begun = Begun(kept, None)
            if begun.began_ms is not None:
                self._began_ms = begun.began_ms
                self._keep_renewing()
                return begun
            self._claimed = False
            if begun.payload is not None or (until is not None and monotonic() >= until):
                return begun
            # Not all who wait at the same moments.
            yield Nap(None, (poll_of(self.runner) or 0.0) * random.uniform(0.5, 1.0))  # noqa: S311  # no secret

    def look(self) -> Reply[bytes | None]:
        """Ask for what is kept now."""
        _, category, place = self._place
        return looked(self.runner, category, place)

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
        with suppress(ValueError):  # of a fork's parent
            self._here.remove(flight)
        del self.flight  # or an error, whose traceback has this lead in it, would keep itself alive
        flight.settle(payload, error)

    def release(self) -> None:
        """Have the claim ended, if it stands."""
        self._claimed = False
        # Nobody waits for that: what ends here may have been cancelled. If it fails, the lease ends by itself.
        with suppress(PersistencyError):
            self.runner.run(release, self.claim).add_done_callback(_looked_at)

    def share(self, payload: bytes) -> None:
        """Tell those who wait what there is still, while the next result is computed."""
        self.has_old = True
        self.flight.share(payload)

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


def awaited(flight: Flight, runner: Runner, category: str, place: Key, *, blocks: bool) -> Steps[Answer | None]:
    """Wait for a flight and return its answer; `None`: it can't be waited for, as it waits for us.

    `blocks`: this thread does nothing else meanwhile.
    """
    stage = flight.stage
    if stage is None:  # it has ended since it was found
        return Answer(None)
    if stage.has_old:
        kept: bytes | None = yield looked(runner, category, place)
        if kept is not None:
            return Answer(kept)
    with _waiting_for(flight, _mine(blocks)) as waits_for_us:
        if waits_for_us:
            return None
        answer: Answer = yield stage.reply
        return answer


def looked(runner: Runner, category: str, place: Key) -> Reply[bytes | None]:
    """Ask for what is kept, in the cheapest way."""
    return runner.get(category, place) if isinstance(runner, Job) else runner.run(look, category, place)


def is_nested(lead: Lead, *, blocks: bool) -> bool:
    """Say whether this thread or task is in the middle of a computation, beside the one that it is to lead."""
    return any(one is not lead.flight for one in _mine(blocks))


def _mine(blocks: bool) -> tuple[Flight, ...]:
    """Return the flights that end no earlier than what this thread or task waits for."""
    return (*_leading.get(), *_here.flights) if blocks else _leading.get()


@contextmanager
def _waiting_for(flight: Flight, mine: tuple[Flight, ...]) -> Iterator[bool]:
    """Enter that one's own flights wait for another one; say whether that one waits for them."""
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


def _in_child() -> None:
    """In a forked child nobody leads the parent's flights."""
    _flights.clear()
    _here.flights = []


os.register_at_fork(after_in_child=_in_child)
