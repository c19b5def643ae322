"""Errands: work that takes long, done in a thread of its own, step by step, and answered by a reply.

A backup, a check, an export: nobody should wait behind one. It asks the job for what it needs like any other client, or
reads the file through a connection of its own.

Rules:
  1. The work is a generator: what it yields is how far it has come, what it returns is the answer.
  2. What touches files beside a job's turn is `undivided`: a fork waits for its end, and none begins meanwhile. Asking
     a job isn't: it may be the job that forks.
  3. What goes wrong, in the work or in the callback that is told of its progress, ends the errand and is its answer.

Doesn't know: what the work is.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Generator, Iterator
from threading import get_ident
from time import monotonic
from typing import Any, TypeAlias, TypeVar

from persistency.actor.reply import Reply
from persistency.actor.settling import pending, settle_all, tell_if_unseen
from persistency.logfields import about

log: logging.Logger = logging.getLogger("persistency")

T = TypeVar("T")

Steps: TypeAlias = Generator[tuple[int, int | None], None, T]
"""Yields (done, of how much; `None`: nobody knows), in the unit of the work."""
Progress: TypeAlias = Callable[[int, int | None], object]

_going: set[_Errand] = set()
_undivided: set[_Step] = set()  # under way
_gate = threading.RLock()  # who forks has it; what is undivided begins behind it


def errand(name: str, steps: Steps[T], progress: Progress | None = None) -> Reply[T]:
    """Run steps in a thread called `name`, telling `progress(done, total)` after each; the reply gives their answer."""
    going = _Errand(name, steps, progress)
    _going.add(going)
    thread = threading.Thread(target=going.run, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the interpreter is shutting down and starts no threads any more
        going.run()
    except BaseException:
        if going.thread is None:  # an interrupt, and it will never run
            _going.discard(going)
        raise
    return going.reply


def going() -> list[Reply[Any]]:
    """Return the replies of the errands that are under way."""
    return [one.reply for one in list(_going)]


class Pause:
    """All that is undivided held back, for the time of a fork."""

    def __init__(self) -> None:
        self.complete: bool = False
        self._held: list[_Step] = []
        self._gated = False

    def hold(self, seconds: float) -> None:
        """Keep any from beginning, wait so long for the end of those there are; then it is `complete`."""
        deadline = monotonic() + seconds
        me = get_ident()
        self._gated = True  # first: an interrupt may come as soon as it is so
        self._gated = _gate.acquire(timeout=seconds)
        others = [step for step in list(_undivided) if step.thread != me]
        for step in others:
            step.hold(deadline - monotonic(), self._held)
        self.complete = self._gated and len(self._held) == len(others)

    def end(self) -> None:
        """Let them begin."""
        for step in self._held:
            step.let_go()
        if self._gated:
            with contextlib.suppress(RuntimeError):  # an interrupt came before it was had
                _gate.release()

    def forsake(self, error: BaseException) -> list[Reply[Any]]:
        """In the child, where their threads aren't: return the replies nobody will answer."""
        global _gate  # noqa: PLW0603  # another thread of the parent may have it
        _gate = threading.RLock()
        _undivided.clear()
        left = list(_going)
        _going.clear()
        for one in left:
            one.abandoned = error
        return [one.reply for one in left]


class _Step:
    """Something undivided."""

    def __init__(self) -> None:
        self.thread: int | None = None
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with _gate:
            self.thread = get_ident()  # first: a signal handler may fork here
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.thread = None
        self._lock.release()

    def hold(self, seconds: float, held: list[_Step]) -> None:
        """Keep it from beginning anew, waiting for its end; it is put among those `held` then."""
        if self._lock.acquire(timeout=max(0.0, seconds)):
            held.append(self)

    def let_go(self) -> None:
        """Let it begin."""
        self._lock.release()


@contextlib.contextmanager
def undivided() -> Iterator[None]:
    """Do something in the middle of which no process should be forked."""
    step = _Step()
    _undivided.add(step)
    try:
        with step:
            yield
    finally:
        _undivided.discard(step)


def undivided_each(steps: Steps[T]) -> Steps[T]:
    """Take steps each of which is undivided."""
    try:
        while True:
            with undivided():
                try:
                    so_far = next(steps)
                except StopIteration as stop:
                    answer: T = stop.value
                    return answer
            yield so_far
    finally:
        with undivided():
            steps.close()


class _Errand:
    """One errand. The line its own reply waits in, too: it can't be withdrawn."""

    def __init__(self, name: str, steps: Steps[Any], progress: Progress | None) -> None:
        self.reply: Reply[Any] = pending(self, reads=False)
        self.thread: int | None = None
        self.abandoned: BaseException | None = None
        self._name = name
        self._steps = steps
        self._progress = progress

    def run(self) -> None:
        """Take every step, and settle the reply."""
        self.thread = get_ident()
        value, error = None, None
        try:
            value = self._walk()
        except BaseException as failed:
            error = failed
            tell_if_unseen(self.reply, failed, self._tell)
        finally:
            self._steps.close()
            _going.discard(self)
            self.thread = None
        settle_all([(self.reply, value, error)])

    def _tell(self, error: BaseException) -> None:
        _, _, rest = self._name.partition(":")  # persistency:<job id>:<what>
        job_id, _, what = rest.rpartition(":")
        log.error("%s failed: %s", self._name, error, extra=about("errand_failed", job_id, error, errand=what))

    def _walk(self) -> Any:
        while True:
            try:
                done, total = next(self._steps)
            except StopIteration as stop:
                return stop.value
            if self._progress is not None:
                self._progress(done, total)

    def withdraw(self, _reply: Reply[Any]) -> bool:
        """Say that an errand isn't called back."""
        return False

    def waits_for_itself(self) -> bool:
        """Say whether the calling thread is the one that runs it."""
        return self.thread == get_ident()
