"""Event loops: which one runs in this thread, and how a task of it sleeps until another thread wakes it.

asyncio and trio, and with them whatever runs on either (anyio). Both come as a *loop* with the same two methods:
`create_future()`, made in its thread, and `call_soon_threadsafe(fn, *args)`, from any.

Rules:
  1. Neither is ever imported here: where nobody has, none of them runs.
  2. Where both run in one thread (trio as the guest of asyncio, or one in the middle of the other) the task that asks
     decides.
  3. Waiting is a checkpoint of trio's: it can be cancelled there, and others get their turn.

Doesn't know: what is waited for. The only door to `asyncio` and `trio`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Generator, Iterable
from time import monotonic
from types import FrameType
from typing import Any, Final, NamedTuple

TURN_S: Final = 0.001  # so often a task that never has to wait gives its loop a turn

_modules: Final = sys.modules


class _Turns(threading.local):
    """When this thread's event loop was last given a turn by a task that didn't have to wait."""

    at: float = 0.0


turns: Final = _Turns()


def running_loop() -> Any | None:
    """Return the event loop running in this thread, or `None`; costs a look-up for each that was never imported."""
    events = _modules.get("asyncio.events")
    try:
        loop = None if events is None else events._get_running_loop()
    except AttributeError:  # The module is on its way in, in another thread: nothing of it can run here.
        loop = None
    lowlevel = _modules.get("trio.lowlevel")
    if lowlevel is None:
        return loop
    # That one may be on its way in too, and have no such function yet.
    runs = getattr(lowlevel, "in_trio_run" if loop is None else "in_trio_task", None)
    if runs is None or not runs() or (loop is not None and not _asks_in_trio(lowlevel, loop)):
        return loop
    return _Trio(lowlevel.current_trio_token())


def _asks_in_trio(lowlevel: Any, loop: Any) -> bool:
    """Say which task asks, where a task of trio's runs in the thread of an asyncio loop: the nearest on the stack.

    As a guest of asyncio trio runs between its tasks; but either can also have been run in the middle of the other.
    """
    task = _modules["asyncio.tasks"].current_task(loop)
    if task is None:
        return True
    in_asyncio = getattr(task.get_coro(), "cr_frame", None)
    in_trio = getattr(lowlevel.current_task().coro, "cr_frame", None)
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame is not in_trio:
        if frame is in_asyncio:
            return False
        frame = frame.f_back
    return True


def turn() -> Generator[Any, None, None]:
    """Give the loop of this task a turn."""
    if type(running_loop()) is _Trio:
        yield from _modules["trio.lowlevel"].checkpoint().__await__()
    else:
        yield  # a bare one is a turn for asyncio
    turns.at = monotonic()


def sleep(loop: Any, future: Any, seconds: float | None) -> Generator[Any, None, None]:
    """Sleep until `wake` is called for the future; raises `TimeoutError` after so many seconds."""
    if type(loop) is _Trio:
        yield from _sleep_in_trio(future, seconds)
        return
    alarm = None if seconds is None else loop.call_later(seconds, _expire, future)
    try:
        if not (yield from future):
            raise TimeoutError
    finally:
        if alarm is not None:
            alarm.cancel()


def wake(futures: Iterable[Any]) -> None:
    """End what sleeps on these. In the thread of their loop; one that doesn't sleep any more is left alone."""
    for future in futures:
        if not future.done():
            future.set_result(True)


def _expire(future: Any) -> None:
    if not future.done():
        future.set_result(False)


class _Trio(NamedTuple):
    """A run of trio's, as a loop. Two of one run are equal: they have its one token."""

    token: Any

    def create_future(self) -> _TrioFuture:
        """Return what a task of this run can sleep on."""
        return _TrioFuture()

    def call_soon_threadsafe(self, fn: Callable[..., object], *args: Any) -> None:
        """Have a function called in the thread of the run; `RuntimeError` if that is over."""
        self.token.run_sync_soon(fn, *args)


class _TrioFuture:
    """What one task of trio's sleeps on, once."""

    __slots__ = ("_sleeper", "_woken")

    def __init__(self) -> None:
        self._woken = False
        self._sleeper: Any = None

    def done(self) -> bool:
        """Say whether it was woken."""
        return self._woken

    def set_result(self, woken: bool) -> None:
        """Wake the task, or have it not fall asleep."""
        self._woken = woken
        sleeper, self._sleeper = self._sleeper, None
        if sleeper is not None:
            _modules["trio.lowlevel"].reschedule(sleeper)

    def __iter__(self) -> Generator[Any, None, None]:
        lowlevel = _modules["trio.lowlevel"]

        def abort(_raise_cancel: Any) -> Any:
            self._sleeper = None  # cancelled: nobody may wake it any more
            return lowlevel.Abort.SUCCEEDED

        if self._woken:
            return
        try:
            self._sleeper = lowlevel.current_task()
            yield from lowlevel.wait_task_rescheduled(abort).__await__()
        finally:
            self._sleeper = None  # an interrupt may have come before it fell asleep: then nobody may wake it


def _sleep_in_trio(future: _TrioFuture, seconds: float | None) -> Generator[Any, None, None]:
    if seconds is None:
        yield from future
        return
    with _modules["trio"].move_on_after(seconds):
        yield from future
    if not future.done():
        raise TimeoutError
