"""Errands: what is done with one id, one after the other; each a row of steps, done on the crew's threads.

Rules:
  1. Errands of one id begin in the order they came, each when the one before it is over.
  2. A step that waits for something keeps neither a thread nor a place in the line: the errand goes on when that has
     come, without a place unless it asks for one.
  3. Whoever gives up waiting for an errand doesn't keep it from being done: others may wait for it as well.

Doesn't know: what the steps do.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from math import inf
from typing import Any, Generic, TypeVar

from persistency import Reply
from persistency.plugins.crew import Crew, Do, Telling
from persistency.plugins.line import Line

T = TypeVar("T")

# Yields what it waits for, and none of these may fail; `None`: another turn in the line.
Steps = Generator[Future[None] | None, None, T]


class Errand(Generic[T]):
    """A row of steps as a task; `what` it is, for whoever looks for one. With a `line` it waits for its turn there."""

    def __init__(self, steps: Steps[T], line: Line[Errand[Any], bool] | None = None, what: Any = None) -> None:
        self._steps = steps
        self._line = line
        self._in_turn = line is not None  # what comes next is done with a place in the line
        self.what: Any = what
        self.until: float = inf
        self.granted: bool | None = None
        self.queue: Queue | None = None  # the one it is in
        self.future: Future[T] = Future()
        self.future.set_running_or_notify_cancel()

    def begin(self) -> bool:
        """Take a place in the line, for what needs one."""
        return self._line is None or not self._in_turn or self.granted is not None or bool(self._line.enter(self))

    def work(self) -> tuple[Telling | None, Errand[Any] | None]:
        """Go on to the next thing to wait for, or to the end."""
        future, queue = self.future, self.queue
        assert queue is not None, "an errand is done in its queue's turn"
        try:
            waited = next(self._steps)
        except StopIteration as stop:
            answer: T = stop.value
            tell: Telling = lambda: future.set_result(answer)  # noqa: E731  # told later
        except BaseException as error:
            failure = error.with_traceback(None)  # which has the frames of this thread, and all that they hold
            tell = lambda: future.set_exception(failure)  # noqa: E731  # as above
        else:
            following = self._leave()  # and then nothing more in here: another thread may go on with it at once
            self._in_turn = waited is None
            if waited is None:
                queue.crew.run(self)
            else:
                waited.add_done_callback(lambda _: queue.crew.run(self))
            return None, following
        following = self._leave()
        queue.end()
        return tell, following

    def _leave(self) -> Errand[Any] | None:
        """Give the place back, if it has one; return who has it now."""
        if self._line is None or self.granted is None:
            return None
        self.granted = None
        return self._line.leave("done")

    def interrupt(self) -> bool:
        """Say that it ends by itself."""
        return False

    def late(self, _now: float, /) -> Telling | None:
        """Say nothing: it takes as long as it takes."""
        return None


class Queue:
    """The errands of one id. `empty` is called when there are no more."""

    def __init__(self, crew: Crew, empty: Callable[[], None]) -> None:
        self.crew: Crew = crew
        self._empty = empty
        self._lock = threading.RLock()
        self._errands: deque[Errand[Any]] = deque()  # the first one is being done, if `_busy`
        self._busy = False

    def add(self, errand: Errand[Any]) -> None:
        """Have an errand done after those that are there. Raises `RuntimeError` where there can be no thread."""
        errand.queue = self
        self._errands.append(errand)
        try:
            self._go()
        except RuntimeError:
            with self._lock:
                self._errands.remove(errand)
            raise
        except BaseException:  # an interrupt: it may have come before anybody was told
            self._go()
            raise

    def last(self) -> Errand[Any] | None:
        """Return the errand that came last, if it isn't over."""
        with self._lock:
            return self._errands[-1] if self._errands else None

    def find(self, wanted: Callable[[Any], bool]) -> Errand[Any] | None:
        """Return the last errand that is wanted by `what` it is, and isn't over."""
        with self._lock:
            return next((errand for errand in reversed(self._errands) if wanted(errand.what)), None)

    def end(self) -> None:
        """Note that the first errand is over."""
        with self._lock:
            self._errands.popleft()
            self._busy = False
            more = bool(self._errands)
        if more:
            self._go()
        else:
            self._empty()

    def _go(self) -> None:
        self.crew.run(Do(self._next))

    def _next(self) -> None:
        """Begin the first errand, if none has begun; on one of the crew's threads, where no interrupt comes."""
        with self._lock:
            if self._busy or not self._errands:
                return
            self._busy = True
            errand = self._errands[0]
        self.crew.run(errand)


# -- what needs none -------------------------------------------------------------------------------------------------


def done(answer: T) -> Reply[T]:
    """Return the reply of what is done already."""
    future: Future[T] = Future()
    future.set_result(answer)
    return Reply.of(future)


def failed(error: BaseException, cause: BaseException) -> Reply[Any]:
    """Return the reply of what couldn't be begun."""
    error.__cause__ = cause
    future: Future[Any] = Future()
    future.set_exception(error)
    return Reply.of(future)
