"""Settling: how replies are made and answered, by those who answer.

Rules:
  1. First decide under the gate, then act outside of it: nobody is woken, and no callback run, while it is held.
  2. One group of replies wakes each event loop once.
  3. A reply that is settled stays as it is.

Doesn't know: what is asked or answered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

from persistency.actor.reply import CANCELLED, FINISHED, PENDING, Line, Reply, Unseen, gate

log = logging.getLogger("persistency.actor")


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
    return fill(new_reply(), error, value)


def pending(line: Line, *, reads: bool) -> Reply[Any]:
    """Return a reply for a request that waits in a line; only one that `reads` can be cancelled."""
    reply = new_reply()
    reply._line = line
    if reads:
        reply._reads = True
    return reply


def settle_all(answers: Iterable[tuple[Reply[Any], Any, BaseException | None]]) -> None:
    """Settle a group of replies: each event loop among those who wait is woken once. A settled one stays as it is."""
    settled = []
    with gate:
        for reply, value, error in answers:
            if reply._state == PENDING:
                reply._result = value
                if error is not None:
                    reply._exception = error
                settled.append(reply)
    _settle(settled, FINISHED)


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


def _settle(replies: Iterable[Reply[Any]], state: str) -> None:
    """Give replies their last state and wake everybody: first decide under the gate, then act outside of it."""
    loops: dict[Any, list[Any]] = {}
    called: list[tuple[Reply[Any], Callable[[Any], object]]] = []
    awaited: list[Reply[Any]] = []
    everybody = list(replies)
    with gate:
        for reply in everybody:
            everybody += reply._followers or ()
            if reply._made_condition is None:
                _enter(reply, state, loops, called)
            else:
                awaited.append(reply)
    for reply in awaited:
        # `concurrent.futures.wait` counts under the condition, so the state may only change under it too.
        condition = reply._condition
        with condition:
            with gate:
                for follower in reply._followers or ():  # those that came while the condition was waited for
                    if follower._made_condition is None:
                        _enter(follower, state, loops, called)
                _enter(reply, state, loops, called)
            for waiter in reply._made_waiters:
                (waiter.add_cancelled if state == CANCELLED else waiter.add_result)(reply)
            condition.notify_all()
    for loop, futures in loops.items():
        try:
            loop.call_soon_threadsafe(_wake, futures)
        except RuntimeError:  # The loop was closed under its waiters; there is nobody left to tell.
            log.debug("%d replies came after their event loop was closed", len(futures))
    for reply, fn in called:
        reply._call(fn)


def _enter(
    reply: Reply[Any],
    state: str,
    loops: dict[Any, list[Any]],
    called: list[tuple[Reply[Any], Callable[[Any], object]]],
) -> None:
    """Move a pending reply to its last state and note down whom to wake. The gate is held."""
    if reply._state != PENDING:
        return
    reply._state = state
    reply._line = None
    for loop, future in reply._loops or ():
        loops.setdefault(loop, []).append(future)
    called += ((reply, fn) for fn in reply._callbacks or ())
    reply._callbacks = None
    for bell in reply._bells or ():
        bell.release()


def _wake(futures: list[Any]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
