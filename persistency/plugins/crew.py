"""The crew: the threads that plugins run on. Made when there is work for them, kept for a while when there is none.

A guest never runs on a thread of its caller's: an interrupt (Ctrl-C) comes in Python's main thread, and must not come
in a function that a guest calls.

Rules:
  1. Whoever brings work only leaves it and rings: what an interrupt there can lose is the ring, which is rung again.
  2. Work is begun in the order it came, but first of all what waited for work that is done now. Of the idle threads
     the one is woken that was used last, so that those that aren't needed end.
  3. Who is told of an outcome may do anything in this thread, and take any time: what was to come next on it is then
     taken over by another one.
  4. No work is lost with an error: it is logged, and the thread goes on.

Doesn't know: plugins, guests, what the work is.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Protocol

from persistency.logfields import about

log: logging.Logger = logging.getLogger("persistency.plugins")

# For a guest's stack, and for Python's below and above it. What the system gives a thread may be less (`ulimit -s`, and
# musl's 128 KiB): where the service has said nothing it is what Linux gives as a rule, and else not less than it takes.
STACK_BYTES = 2 * 1_048_576
_STACK_UNSAID_BYTES = 8 * 1_048_576
_IDLE_S = 10.0  # without work, before a thread ends
_RUNG_S = 0.05  # so long a thread that was rung for may take to come
_LOOK_S = 0.05

Telling = Callable[[], None]


class Task(Protocol):
    """Something to be done by the crew."""

    def begin(self) -> bool:
        """Say whether it is to be done now, by this thread. Called in the order the tasks came; it calls nobody."""
        raise NotImplementedError

    def work(self) -> tuple[Telling | None, Task | None]:
        """Do it. Return what then tells of the outcome, and what has to be done next, for it waited for this."""
        raise NotImplementedError

    def interrupt(self) -> bool:
        """Have it end early, and return whether it can; called by another thread."""
        raise NotImplementedError

    def late(self, now: float, /) -> Telling | None:
        """Return what tells that it doesn't end as it should, if that is to be told now; called at every tick."""
        raise NotImplementedError


class Do:
    """A function as a task."""

    def __init__(self, act: Telling) -> None:
        self._act = act

    def begin(self) -> bool:
        """Say that it is to be done."""
        return True

    def work(self) -> tuple[Telling | None, Task | None]:
        """Leave it to the telling: it may take its time."""
        return self._act, None

    def interrupt(self) -> bool:
        """Say that it ends by itself."""
        return False

    def late(self, _now: float, /) -> Telling | None:
        """Say nothing: nobody waits for it."""
        return None


class Crew:
    """The threads of one host."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._ready: deque[Task] = deque()
        self._idle: list[SimpleQueue[None]] = []  # the bells of those that sleep; the last one was used last
        self._taking = threading.Lock()  # held by who takes from what is ready
        self._threads: set[threading.Thread] = set()
        self._working: set[Task] = set()
        self._telling: set[SimpleQueue[None]] = set()  # the bells of those that tell; nobody knows for how long
        self._rung_at = 0.0  # 0: nobody is on the way
        self._over = False
        self._left: SimpleQueue[None] | None = None  # rung by who is through with a task, if somebody waits for that

    def run(self, task: Task) -> None:
        """Have a task done as soon as a thread is free, or made. Any thread; it doesn't wait.

        Raises `RuntimeError` if there is no thread, and there can be none; the task is forgotten then.
        """
        self._ready.append(task)
        try:
            if monotonic() - self._rung_at > _RUNG_S:
                self._ring()
        except RuntimeError:
            self._rung_at = 0.0
            if self._threads:  # one of them will have time for it
                return
            try:
                self._ready.remove(task)
            except ValueError:  # one came by in its last moment
                return
            raise
        except BaseException:  # an interrupt, perhaps between taking a bell and ringing it
            self._ring(surely=True)
            raise

    def tick(self, now: float) -> None:
        """Have it told what is late; called at every tick."""
        for tell in [task.late(now) for task in list(self._working)]:
            if tell is not None:
                self.run(Do(tell))
        if self._ready and now - self._rung_at > _RUNG_S:  # a ring was lost with an interrupt
            self._ring_for_more(surely=True)

    def interrupt(self, seconds: float) -> bool:
        """Have all tasks end early that can; return whether they have within `seconds`."""
        left = self._left = SimpleQueue[None]()
        until = monotonic() + seconds
        while True:
            lasting = [task for task in list(self._working) if task.interrupt()]
            remaining = until - monotonic()
            if not lasting or remaining <= 0:
                return not lasting
            with contextlib.suppress(Empty):
                left.get(timeout=min(remaining, _LOOK_S))

    def end(self) -> None:
        """Let every thread end that has nothing to do; those that have do it before."""
        self._over = True
        with contextlib.suppress(IndexError):
            while True:
                self._idle.pop().put(None)

    # -- threads -------------------------------------------------------------------------------------------------

    def _ring(self, *, surely: bool = False) -> None:
        """Wake a thread, or make one, unless enough are on the way."""
        self._rung_at = monotonic()
        try:
            bell = self._idle.pop()
        except IndexError:
            coming = len(self._threads) - len(self._idle) - len(self._working) - len(self._telling)
            if surely or coming < len(self._ready):
                self._start()
        else:
            bell.put(None)

    def _start(self) -> None:
        # Not one of the engine's own threads by its name: it may be inside a store when the interpreter ends.
        thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
        with _starting:
            before = threading.stack_size(_STACK_UNSAID_BYTES)
            ours = max(before, STACK_BYTES) if before else _STACK_UNSAID_BYTES
            try:
                threading.stack_size(ours)
                thread.start()
            finally:
                found = threading.stack_size(before)
                if found != ours:  # the service has set it meanwhile
                    threading.stack_size(found)

    def _serve(self) -> None:
        bell: SimpleQueue[None] = SimpleQueue()
        me = threading.current_thread()
        self._threads.add(me)
        while True:
            try:
                while (task := self._take()) is not None:
                    self._do(task, bell)
            except BaseException as error:  # whatever is thrown in here, others wait for this thread
                log.exception("work for plugins failed", extra=about("crew_failed", None, error))
                continue
            self._idle.append(bell)
            if self._ready:  # it came in between, and may not have rung for this one
                self._withdraw(bell)
                continue
            try:
                bell.get(timeout=0 if self._over else _IDLE_S)
                if bell in self._idle:  # it was rung for an earlier idleness
                    self._withdraw(bell)
            except Empty:
                if not self._withdraw(bell):  # somebody is about to ring
                    continue
                self._threads.discard(me)
                if not self._ready:
                    return
                self._threads.add(me)

    def _withdraw(self, bell: SimpleQueue[None]) -> bool:
        """Make a thread one that isn't idle any more; return whether nobody else has."""
        try:
            self._idle.remove(bell)
        except ValueError:
            return False
        return True

    def _take(self) -> Task | None:
        with self._taking:
            self._rung_at = 0.0
            while self._ready:
                task = self._ready.popleft()
                if task.begin():
                    self._working.add(task)
                    break
            else:
                return None
        if self._ready:
            self._ring_for_more()
        return task

    def _ring_for_more(self, *, surely: bool = False) -> None:
        try:
            self._ring(surely=surely)
        except RuntimeError as error:  # no more threads: those that are there do it, one after the other
            log.debug("no thread more for plugins: %s", error, extra=about("crew_full", None, error))

    def _do(self, task: Task, bell: SimpleQueue[None]) -> None:
        """Do a task that was taken; what comes next because of it comes first of what is ready."""
        try:
            tell, following = task.work()
        finally:
            self._working.discard(task)
            if self._left is not None:
                self._left.put(None)
        if following is not None:
            self._ready.appendleft(following)
        if tell is not None:
            if following is not None:
                self._ring_for_more()
            self._telling.add(bell)
            _tell(tell)
            self._telling.discard(bell)


def _tell(tell: Telling) -> None:
    try:
        tell()
    except BaseException as error:  # whoever is told: what comes next comes
        log.exception("telling of what a plugin did failed", extra=about("crew_telling_failed", None, error))


_starting = threading.RLock()  # `threading.stack_size` is one for all threads


def forget_parent() -> None:
    """In a forked child: have a lock of our own, for another thread of the parent may have had it."""
    global _starting  # noqa: PLW0603  # as above
    _starting = threading.RLock()
