"""Waiting: bells that are rung at a change, and procedures that wait, written once for threads and event loops.

Rules:
  1. A procedure is a generator. It yields a `Reply` and is sent its answer, or what that raised is thrown into it; or
     it yields a `Nap`, and is sent whether the nap's reply was settled.
  2. Whoever leaves off driving it (a cancelled task, an interrupt) closes the generator: its `finally` tidies up, and
     waits for nothing.
  3. Who is about to wait listens first and looks then. So no change falls between the look and the wait.
  4. There is one bell per job and name in a process. It lives as long as somebody has it.

Doesn't know: what is waited for, event loops.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Hashable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from itertools import islice
from typing import Any, NamedTuple, TypeAlias, TypeVar
from weakref import WeakValueDictionary

from persistency import Reply
from persistency.recipes.runner import Runner, place_of

T = TypeVar("T")


class Nap(NamedTuple):
    """To wait for a reply for at most so many seconds (`None`: as long as it takes; of no reply: the time alone)."""

    reply: Reply[Any] | None
    seconds: float | None


Steps: TypeAlias = Generator[Reply[Any] | Nap, Any, T]
"""A procedure that waits, and returns a `T`."""


def drive(steps: Steps[T]) -> T:
    """Take the steps in this thread, and return what they return."""
    try:
        step = next(steps)
        while True:
            try:
                if isinstance(step, Nap):
                    answer: Any = _napped(step)
                else:
                    answer = step.result()
            except Exception as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # what the generator returned
    finally:
        steps.close()


async def adrive(steps: Steps[T]) -> T:
    """Take the steps in this event loop, and return what they return."""
    try:
        step = next(steps)
        while True:
            try:
                if isinstance(step, Nap):
                    answer: Any = await _anapped(step)
                else:
                    answer = await step
            except Exception as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # what the generator returned
    finally:
        steps.close()


def _napped(nap: Nap) -> bool:
    reply = unanswered()[1] if nap.reply is None else nap.reply
    with suppress(TimeoutError, CancelledError):
        reply.exception(None if nap.seconds is None else max(0.0, nap.seconds))
    return reply.done()


async def _anapped(nap: Nap) -> bool:
    reply = unanswered()[1] if nap.reply is None else nap.reply
    with suppress(Exception):  # what the reply raises, it raises again for whoever asks for its result
        await reply.within(None if nap.seconds is None else max(0.0, nap.seconds))
    return reply.done()


def unanswered() -> tuple[Future[Any], Reply[Any]]:
    """Return a future and the reply that is settled with it; who gives up waiting doesn't cancel it."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future, Reply.of(future)


class Bell:
    """What those wait for who wait for a change of something. Made by `bell_of`, or alone for one object's own use."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # `__del__` and signal handlers ring too
        self._listening: dict[int, tuple[Future[None], Reply[None]]] = {}  # by the reply's identity, the oldest first
        self._leader: tuple[Reply[None], float] | None = None

    def listen(self) -> Reply[None]:
        """Return a reply that is settled when the bell is rung for its listener."""
        future, reply = unanswered()
        with self._lock:
            self._listening[id(reply)] = future, reply
        return reply

    def leave(self, reply: Reply[None]) -> None:
        """Listen no longer. Where rings are counted, who leaves rings once: a ring may have been for it."""
        with self._lock:
            self._listening.pop(id(reply), None)
            if self._leader is not None and self._leader[0] is reply:
                self._leader = None

    def lead(self, reply: Reply[None], until: float) -> bool:
        """Say whether this listener is the one that wakes by itself, at `until`, for all of them.

        So it is if nobody else does so earlier; it is over when it leaves, or when another one is to wake earlier.
        """
        with self._lock:
            leader = self._leader
            if leader is None or leader[0] is reply or until < leader[1]:
                self._leader = reply, until
                return True
            return False

    def ring(self, count: int | None = None) -> None:
        """Wake everybody who listens, or the `count` who have listened longest."""
        with self._lock:
            chosen = list(islice(self._listening, count))
            futures = [self._listening.pop(one)[0] for one in chosen]
        for future in futures:
            future.set_result(None)

    @property
    def listeners(self) -> int:
        """How many listen."""
        return len(self._listening)


_bells: WeakValueDictionary[tuple[Hashable, str], Bell] = WeakValueDictionary()
_bells_lock = threading.RLock()


def bell_of(runner: Runner, name: str) -> Bell:
    """Return the bell of what is called `name` in a job: the same one for whoever waits and whoever changes."""
    place = place_of(runner), name
    with _bells_lock:
        bell = _bells.get(place)
        if bell is None:
            bell = _bells[place] = _PlacedBell(place)
        return bell


class _PlacedBell(Bell):
    """A bell that keeps its place from being given to another job as long as it hangs there."""

    def __init__(self, place: Hashable) -> None:
        super().__init__()
        self.place: Hashable = place


def _in_child() -> None:
    """In a forked child nobody listens yet, and another thread of the parent may have had the lock."""
    global _bells_lock  # noqa: PLW0603  # of this process
    _bells_lock = threading.RLock()
    _bells.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
