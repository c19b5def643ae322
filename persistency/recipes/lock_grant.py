"""The grant: a lock that somebody holds, until it is released or lost.

Rules:
  1. Its state goes from "held" to "released" or "lost", once. Whoever finds out that it is lost, be it the keeper, a
     check in a transaction or the holder's own look at the clock, marks it for all.
  2. `lost` is true once the lease is over by the holder's clock, whether or not anybody has been told.
  3. What the job answers is taken in by the thread that settles the reply. A renewal that has failed is tried again as
     long as the lease lasts; one that comes too late changes nothing.
  4. `on_lost` is called once, in a thread of its own, and never for a lock that was released.

Doesn't know: how a lock is got, who waits for it, how its row is kept.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

from persistency import Forked, Job, Misuse, PersistencyError, Reply, Transaction
from persistency.logfields import about
from persistency.recipes.lock_keeper import clock, the_keeper
from persistency.recipes.lock_line import Line
from persistency.recipes.lock_rows import LockRow, free, is_held, prolong
from persistency.recipes.runner import Runner
from persistency.recipes.waiting import unanswered

log: logging.Logger = logging.getLogger("persistency.recipes")

_NEVER = float("inf")


class LockLost(PersistencyError):
    """The lock isn't held by this grant any more: its lease has run out, or it was given back."""

    hint = "What the lock guards may be somebody else's by now: stop, and acquire it anew."


class Terms(NamedTuple):
    """What a grant is given under."""

    runner: Runner
    row: LockRow
    renews: bool
    on_lost: Callable[[Grant], object] | None
    line: Line[Grant]

    @property
    def lease(self) -> float:
        """How long the lock is held without being renewed, in seconds."""
        return self.row.lease_ms / 1000


class Grant:
    """A lock that was granted, until it is released or lost. Made by `Lock`.

    Leaving `with grant:` or `async with grant:` releases it. Any thread may use it. A child of this process may not: it
    gets `Forked`. One that is dropped without being released is no longer renewed, and warns.
    """

    __slots__ = (
        "__weakref__",
        "_asking",
        "_due",
        "_guard",
        "_payload",
        "_pid",
        "_released",
        "_state",
        "_terms",
        "_token",
        "_until",
    )

    def __init__(self, terms: Terms, token: int, until: float, payload: bytes) -> None:
        self._terms = terms
        self._token = token
        self._payload = payload
        self._pid = os.getpid()
        self._guard = threading.RLock()  # `__del__` and signal handlers come here too
        self._state = "held"
        self._asking = False  # the keeper waits for an answer
        self._released: Reply[bool] | None = None
        self._until = until
        self._due = self._next_due()
        error = the_keeper().keep(self, min(self._due, until))
        if error is not None and terms.renews:
            self._warn(error)

    @property
    def token(self) -> int:
        """The fencing token: greater than that of every earlier grant of this lock, and never given again."""
        return self._token

    @property
    def name(self) -> str:
        """The lock's name."""
        return self._terms.row.name

    @property
    def lost(self) -> bool:
        """Whether the lease has run out, or somebody else has the lock. It never turns false again.

        It turns true no later than somebody else can get the lock, if this machine's clocks run at the same rate. In a
        child of the holder's process it is always true.
        """
        if self._pid != os.getpid():
            return True
        if self._state == "held" and clock() >= self._until:
            self._lose("its lease has run out")
        return self._state == "lost"

    @property
    def held(self) -> bool:
        """Whether it is neither lost nor released."""
        return not self.lost and self._state == "held"

    def check_in(self, tx: Transaction) -> None:
        """Raise `LockLost` in a transaction of the lock's job, if the lock isn't this grant's any more.

        So what the transaction writes is fenced: it is committed only if nobody has got the lock since. A transaction
        of another job is `Misuse`: there the lock guards nothing.
        """
        self._check_here()
        if tx.job_id != self._terms.runner.id:
            raise Misuse(
                f"{self!r} is of job {self._terms.runner.id!r}, the transaction of job {tx.job_id!r}",
                hint="Give what is done in another job the grant's token, and compare it with the last one seen there.",
            )
        if self._state == "held" and not is_held(tx, self._terms.row, self._token, self._payload):
            self._lose("its lease has run out in the job")
        if not self.held:
            raise LockLost(f"{self!r} doesn't hold the lock any more")

    def renew(self) -> Reply[bool]:
        """Begin the lease anew; answer whether the lock is still held. With `renew=True` it is done anyway."""
        self._check_here()
        future, reply = unanswered()
        if not self.held:
            future.set_result(False)
            return reply

        def answer(asked: Future[float | None]) -> None:
            error = self._take_in(asked)
            if error is None:
                future.set_result(self.held)
            else:
                future.set_exception(error)

        self._prolong().add_done_callback(answer)
        return reply

    def release(self) -> Reply[bool]:
        """Give the lock back; answer whether it was held until then, `False` if it was lost.

        Asked for again, it gives the same answer. If the job can't be asked, the lock is free when its lease is over.
        """
        self._check_here()
        lost = self.lost
        with self._guard:
            if self._released is not None:
                return self._released
            future, reply = unanswered()
            self._released = reply
            if not lost and self._state == "held":
                self._state = "released"
        the_keeper().forget(self)
        try:
            freed = self._terms.runner.run(free, self._terms.row, self._token)
        except BaseException as error:  # nothing was asked for, so it can be tried again
            self._released = None
            future.set_exception(error)
            reply.exception()  # it is looked at here, whoever else may have it
            raise
        freed.add_done_callback(partial(self._note_freed, future))
        return reply

    def _note_freed(self, future: Future[bool], freed: Future[bool]) -> None:
        error = freed.exception()
        if error is not None:
            future.set_exception(error)
            return
        with self._guard:
            if not freed.result():
                self._state = "lost"
        self._terms.line.ring()
        future.set_result(self._state == "released")

    # -- renewing --------------------------------------------------------------------------------------------------

    def _attend(self) -> float:
        """Renew what is due; return when to look again. For the keeper, in its thread."""
        if not self.held:
            return _NEVER
        with self._guard:
            asks = not self._asking and clock() >= self._due
            self._asking = self._asking or asks
        if asks:
            self._ask()
        with self._guard:
            return self._until if self._asking else min(self._due, self._until)

    def _ask(self) -> None:
        """Ask for a renewal. Where a job's mailbox is full that waits for room, and the keeper doesn't."""
        runner = self._terms.runner

        def ask(_room: Any) -> None:
            try:
                asked = self._prolong()
            except Exception as error:
                self._postpone(error)
            else:
                asked.add_done_callback(take_in)

        def take_in(asked: Future[float | None]) -> None:
            error = self._take_in(asked)
            if error is not None:
                self._postpone(error)

        try:
            if isinstance(runner, Job):
                runner.drain().add_done_callback(ask)
            else:
                ask(None)
        except Exception as error:
            self._postpone(error)

    def _prolong(self) -> Reply[float | None]:
        return self._terms.runner.run(prolong, self._terms.row, self._token)

    def _take_in(self, asked: Future[float | None]) -> BaseException | None:
        """Note what became of a renewal; return why it has failed, if it has."""
        error = asked.exception()
        if error is not None:
            return error
        until = asked.result()
        if until is None:
            self._lose("its lease had run out before it could be renewed")
        elif not self.lost:
            with self._guard:
                self._asking = False
                self._until = max(self._until, until)
                self._due = self._next_due()
                due = self._due
            the_keeper().stir(self, due)
        return None

    def _postpone(self, error: BaseException) -> None:
        """Note that a renewal has failed: there is time for some more attempts."""
        if not self.held:
            return
        self._warn(error)
        with self._guard:
            self._asking = False
            self._due = due = clock() + self._terms.lease / 12
        the_keeper().stir(self, due)

    def _warn(self, error: BaseException) -> None:
        fields = about("lock_not_renewed", self._terms.runner.id, error, lock=self.name, token=self._token)
        log.warning("lock %r couldn't be renewed yet: %s", self.name, error, extra=fields)

    def _next_due(self) -> float:
        """Return when a third of the lease is over."""
        return self._until - self._terms.lease * 2 / 3 if self._terms.renews else _NEVER

    # -- losing ----------------------------------------------------------------------------------------------------

    def _lose(self, why: str) -> None:
        """Note that the lock is lost, once, and tell who wants to know."""
        with self._guard:
            if self._state != "held":
                return
            self._state = "lost"
        the_keeper().forget(self)
        fields = about("lock_lost", self._terms.runner.id, lock=self.name, token=self._token)
        log.warning("job %r: lock %r is lost: %s", self._terms.runner.id, self.name, why, extra=fields)
        on_lost = self._terms.on_lost
        if on_lost is not None:
            # It may take its time, and the keeper has other grants to renew.
            thread = threading.Thread(target=self._tell, args=(on_lost,), name="persistency-lock-lost", daemon=True)
            with contextlib.suppress(RuntimeError):  # while the interpreter ends no thread can be started
                thread.start()

    def _tell(self, on_lost: Callable[[Grant], object]) -> None:
        try:
            on_lost(self)
        except Exception as error:
            fields = about("on_lost_raised", self._terms.runner.id, error, lock=self.name)
            log.exception("on_lost of lock %r raised", self.name, extra=fields)

    # -- as a block ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pid != os.getpid():  # the block ends in a forked child, too; the lock stays the parent's
            return
        if error is None:
            self._insist(self.release().result())
        else:  # which is what is to be known, and not how the release went
            with contextlib.suppress(PersistencyError):
                self.release().result()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pid != os.getpid():
            return
        if error is None:
            self._insist(await self.release())
            return
        with contextlib.suppress(PersistencyError):
            released = self.release()
            if not isinstance(error, GeneratorExit):  # a generator that is being closed can't wait
                await released

    def _insist(self, kept: bool) -> None:
        if not kept:
            raise LockLost(f"{self!r} was lost before the block was over")

    def _check_here(self) -> None:
        if self._pid != os.getpid():
            raise Forked(
                f"{self!r} is the parent process'", hint="Acquire the lock in this process, by a Lock of its own."
            )

    def __del__(self) -> None:
        if self._state == "held" and self._pid == os.getpid() and clock() < self._until:
            warnings.warn(f"unreleased {self!r}", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        return f"<Grant {self._token} of lock {self.name!r} ({self._state})>"
