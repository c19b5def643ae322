"""Patience: a runner as event loops use it. What finds no room in it waits for some, instead of being refused.

A thread waits for room in a job's mailbox by itself. A thread that runs an event loop must not, and is refused; here
the reply is settled later instead, and it is the task that waits.

Rules:
  1. Everything is asked for at once. Only what is refused waits, in the order it came.
  2. Where a job's mailbox is fuller than half, nothing of what waits is posted; then one after the other.
  3. What waits is done, whether anybody still waits for its reply or not.

Doesn't know: what is asked for.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar, TypeVarTuple

from persistency import Check, Job, Key, Overloaded, PersistencyError, Put, Reply, Transaction
from persistency.recipes.runner import Runner
from persistency.recipes.waiting import unanswered

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Patient:
    """A runner that has patience: a `Baton`, in threads too, as it keeps nobody waiting for room; or a job."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._lock = threading.RLock()  # a signal handler asks too
        self._waiting: deque[tuple[Callable[[], Reply[Any]], Future[Any]]] = deque()

    @property
    def id(self) -> str:
        """The job's id."""
        return self._runner.id

    def run(self, fn: Callable[[Transaction, *Ts], T], *args: *Ts) -> Reply[T]:
        """Do what the runner's `run` does, once there is room."""
        return self.ask(partial(self._runner.run, fn, *args))

    def ask(self, post: Callable[[], Reply[T]]) -> Reply[T]:
        """Return what `post` returns; if it is refused for want of room, a reply that is settled as its will be."""
        try:
            return post()
        except Overloaded:
            future, reply = unanswered()
        with self._lock:
            self._waiting.append((post, future))
            is_first = len(self._waiting) == 1
        if is_first:
            self._go_on()
        return reply

    def _go_on(self, _room: object = None) -> None:
        """Post what waits, as far as there is room; for the rest this is called again."""
        while self._waiting and self._has_room():
            with self._lock:
                if not self._waiting:
                    return
                post, future = self._waiting.popleft()
            try:
                post().add_done_callback(partial(_settle, future))
            except Overloaded as error:
                if self._comes_after_others(post, future, error):
                    return
            except BaseException as error:
                future.set_exception(error)

    def _has_room(self) -> bool:
        """Say whether to post; if not, it goes on when there is room."""
        if not isinstance(self._runner, Job):
            return True  # nothing says so but a refusal
        try:
            room = self._runner.drain()
        except PersistencyError:
            return True  # it is closed, say: whoever posts is told
        if room.done():
            return True
        room.add_done_callback(self._go_on)
        return False

    def _comes_after_others(self, post: Callable[[], Reply[Any]], future: Future[Any], error: Overloaded) -> bool:
        """Put back what is too large beside what waits in the runner, and go on behind that; if so, return `True`."""
        try:
            behind = self._runner.run(_nothing)
        except PersistencyError:
            future.set_exception(error)
            return False
        with self._lock:
            self._waiting.appendleft((post, future))
        behind.add_done_callback(self._go_on)
        return True


class PatientJob(Patient):
    """A job that has patience, with what of its requests are needed here."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._job = job

    def get(self, category: str, key: Key) -> Reply[bytes | None]:
        """Do what the job's `get` does, once there is room."""
        return self.ask(partial(self._job.get, category, key))

    def commit(self, ops: Iterable[Put | Check]) -> Reply[int]:
        """Do what the job's `commit` does, once there is room."""
        return self.ask(partial(self._job.commit, list(ops)))

    def compare_and_set(self, category: str, key: Key, expected: bytes | None, new: bytes) -> Reply[bool]:
        """Do what the job's `compare_and_set` does, once there is room."""
        return self.ask(partial(self._job.compare_and_set, category, key, expected, new))


def in_threads(runner: Runner) -> Runner:
    """Return what threads use: a job itself, which has them wait for room as it was opened to do."""
    return runner if isinstance(runner, Job) else Patient(runner)


def in_loops(runner: Runner) -> Runner:
    """Return what event loops use."""
    return PatientJob(runner) if isinstance(runner, Job) else Patient(runner)


def _nothing(_tx: Transaction) -> None:
    """Run behind what waits in a runner."""


def _settle(future: Future[Any], reply: Future[Any]) -> None:
    try:
        future.set_result(reply.result())
    except BaseException as error:
        future.set_exception(error)
