"""Settling: how replies are made and answered, by those who answer.

Rules:
  1. First decide under the gate, then act outside of it: nobody is woken, and no callback run, while it is held.
  2. One group of replies wakes each event loop once.
  3. A reply that is settled stays as it is.

Doesn't know: what is asked or answered.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from typing import Any, TypeAlias

from persistency.actor.failures import Unseen
from persistency.actor.loops import wake
from persistency.actor.reply import CANCELLED, FINISHED, PENDING, Answered, Line, Reply, gate
from persistency.errors import Forked
from persistency.logfields import about

log: logging.Logger = logging.getLogger("persistency.actor")

# A reply, and what is to be its result or its exception.
Answer: TypeAlias = tuple[Reply[Any], Any, BaseException | None]


def new_reply() -> Reply[Any]:
    """Return a fresh reply, without the call of an empty `__init__`."""
    return Reply.__new__(Reply)


def fill(reply: Reply[Any], error: BaseException | None, value: Any = None) -> Reply[Any]:
    """Settle a new reply nobody can be waiting for; so nothing is locked."""
    reply._result = value
    if error is not None:
        reply._exception = error
    reply._state = FINISHED
    return reply


def ready(value: Any = None, error: BaseException | None = None) -> Reply[Any]:
    """Return a reply that is settled already."""
    if error is not None:
        return fill(new_reply(), error)
    reply: Reply[Any] = Answered.__new__(Answered)
    reply._result = value
    return reply


def pending(line: Line, *, reads: bool) -> Reply[Any]:
    """Return a reply for a request that waits in a line; only one that `reads` can be cancelled."""
    reply = new_reply()
    reply._line = line
    if reads:
        reply._reads = True
    return reply


def settle_all(answers: Iterable[Answer]) -> None:
    """Settle a group of replies: each event loop among those who wait is woken once. A settled one stays as it is."""
    settled = []
    with gate:
        for reply, value, error in answers:
            if reply._state == PENDING:
                reply._result = value
                if error is not None:
                    reply._exception = error
                waiting = reply._bells or reply._loops or reply._callbacks or reply._followers
                if waiting or reply._made_condition is not None:
                    settled.append(reply)
                else:  # nobody is to be told
                    reply._state, reply._line = FINISHED, None
    if settled:
        _settle(settled, FINISHED)


class Debts:
    """Answers that are being given: in a forked child nobody else knows of the replies they are for."""

    def __init__(self) -> None:
        self._answers: list[list[Answer]] = []

    def pay(self, answers: list[Answer]) -> None:
        """Settle a group of replies, and forget it."""
        if answers:
            self._answers.append(answers)
            settle_all(answers)
            answers.clear()
            self._answers.remove(answers)  # or another one that was paid

    def replies(self) -> list[Reply[Any]]:
        """Return those that may not be settled yet."""
        return [answer[0] for answers in self._answers for answer in answers]


def cancel(reply: Reply[Any]) -> None:
    """Settle a reply as cancelled."""
    _settle((reply,), CANCELLED)


def abandon(replies: Iterable[Reply[Any]], error: BaseException) -> None:
    """In a forked child: settle the parent's replies without waking anybody, for nobody waits here."""
    gate._at_fork_reinit()  # type: ignore[attr-defined]  # as threading does with its own
    everybody = list(replies)
    for reply in everybody:
        everybody += reply._followers or ()
        if reply._state == PENDING:
            reply._exception, reply._state, reply._made_condition = error, FINISHED, None


def tell_if_unseen(reply: Reply[Any], error: BaseException, tell: Callable[[BaseException], None]) -> None:
    """Have `tell(error)` called if the failed reply is dropped with nobody having looked. Before it is settled."""
    reply._unseen = Unseen(error, tell)


def _settle(replies: Collection[Reply[Any]], state: str) -> None:
    """Give replies their last state and wake everybody: first decide under the gate, then act outside of it."""
    telling = _Telling(replies, state)
    try:
        telling.decide()
        telling.act()
    except BaseException:  # thrown into this thread from outside: whoever wasn't told yet is told now
        telling.decide()
        telling.act()
        raise


class _Telling:
    """Replies on their way to their last state, and who is still to be told of it.

    What is thrown into this thread from outside comes with a call: each step may be the last, and is done again.
    """

    __slots__ = ("_awaited", "_called", "_loops", "_replies", "_state")

    def __init__(self, replies: Collection[Reply[Any]], state: str) -> None:
        self._replies = replies
        self._state = state
        self._loops: dict[Any, list[Any]] = {}
        self._called: deque[tuple[Reply[Any], Callable[[Any], object]]] = deque()
        self._awaited: dict[Reply[Any], int] = {}  # how many of a reply's waiters are told

    def decide(self) -> None:
        """Settle the replies, or note down those that `concurrent.futures` waits for."""
        everybody = list(self._replies)
        with gate:
            for reply in everybody:
                everybody += reply._followers or ()
                if reply._state == PENDING and reply._made_condition is not None:
                    self._awaited.setdefault(reply, 0)
                else:
                    self._enter(reply)

    def act(self) -> None:
        """Wake who was noted down; each is crossed out only then."""
        for reply, told in list(self._awaited.items()):
            self._tell_waiters(reply, told)
            del self._awaited[reply]
        for loop, futures in self._loops.items():  # a second time, if it must be, does no harm
            try:
                loop.call_soon_threadsafe(wake, futures)
            except RuntimeError:  # The loop was closed under its waiters; there is nobody left to tell.
                fields = about("replies_too_late", replies=len(futures))
                log.debug("%d replies came after their event loop was closed", len(futures), extra=fields)
        called = self._called
        while called:
            reply, fn = called[0]
            reply._call(fn)
            called.popleft()

    def _tell_waiters(self, reply: Reply[Any], told: int) -> None:
        # `concurrent.futures.wait` counts under the condition, so the state may only change under it too.
        condition = reply._condition
        with condition:
            with gate:
                for follower in reply._followers or ():  # those that came while the condition was waited for
                    if follower._made_condition is None:
                        self._enter(follower)
                self._enter(reply)
            for waiter in reply._made_waiters[told:]:  # who is told twice counts wrongly
                (waiter.add_cancelled if self._state == CANCELLED else waiter.add_result)(reply)
                self._awaited[reply] += 1
            condition.notify_all()

    def _enter(self, reply: Reply[Any]) -> None:
        """Move a pending reply to its last state and note down whom to wake. The gate is held."""
        if reply._state != PENDING and reply._line is None:
            return
        reply._state = self._state
        for loop, future in reply._loops or ():
            self._loops.setdefault(loop, []).append(future)
        if reply._callbacks:
            self._called += [(reply, fn) for fn in reply._callbacks]
            reply._callbacks = None
        for bell in reply._bells or ():
            if bell.locked():
                bell.release()
        reply._line = None


class _Elsewhere:
    """The line of a reply that somebody's plain future answers."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future
        self._pid = os.getpid()

    @property
    def abandoned(self) -> BaseException | None:
        """Say that whoever would answer isn't there in a forked child."""
        return None if os.getpid() == self._pid else Forked("this reply waits for a future of the parent process")

    def withdraw(self, _reply: Reply[Any], /) -> bool:
        """Cancel the future."""
        return self._future.cancel()

    def waits_for_itself(self) -> bool:
        """Say nothing about who answers: it isn't known here."""
        return False


def _adopt(future: Future[Any]) -> Reply[Any]:
    reply = pending(_Elsewhere(future), reads=True)

    def take_over(future: Future[Any]) -> None:
        if future.cancelled():
            cancel(reply)
        else:
            error = future.exception()
            if error is not None:
                tell_if_unseen(reply, error, _log_unseen)
            settle_all([(reply, None if error is not None else future.result(), error)])

    future.add_done_callback(take_over)
    return reply


def _log_unseen(error: BaseException) -> None:
    log.error("what nobody looked at failed: %s", error, exc_info=error, extra=about("reply_unseen", None, error))


Reply._adopt = staticmethod(_adopt)
