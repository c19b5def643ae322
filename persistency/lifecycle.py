"""Lifecycle: what happens to open jobs when the interpreter exits.

One hook, registered when this module is imported, so that it runs after the hooks of everybody who imported it:
it has every worker write what waits, tidy its file up and end its thread, all of them side by side, and names on
stderr what could not be written in time. Nothing is closed: whoever posts later, from an earlier hook or a thread
that outlives main, is served in its own thread.

Rules:
  1. Workers are daemon threads: an interpreter that exits never waits for one that sleeps.
  2. No thread is started once the hook has begun.

Doesn't know: roots, leases, what a worker does.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from time import monotonic
from typing import NamedTuple, Self

from persistency.actor.failures import FailureLog
from persistency.actor.worker import Worker

_TELL_SECONDS_MAX = 5.0
_LOOK_SECONDS = 0.1
_INTERRUPTS_MAX = 2  # the second one gives up


class _Charge(NamedTuple):
    job_id: str
    worker: Worker
    failures: FailureLog
    exit_timeout: float


_lock = threading.RLock()  # a signal handler may open a job too
_charges: dict[int, _Charge] = {}
_exiting = False


def look_after(job_id: str, worker: Worker, failures: FailureLog, exit_timeout: float) -> None:
    """Have a worker drained at exit, within `exit_timeout` seconds; once the hook has begun nobody waits any more."""
    with _lock:
        if _exiting:
            return
        _charges[id(worker)] = _Charge(job_id, worker, failures, exit_timeout)


def begin(worker: Worker) -> None:
    """Start a worker: its thread, or, once main has ended, its store alone, which posters then serve themselves."""
    if threading.main_thread().is_alive() and not _exiting:
        worker.start()
    else:
        worker.start_unattended()


def forget(worker: Worker) -> None:
    """Leave a worker that is closed out of it."""
    with _lock:
        _charges.pop(id(worker), None)


class _Interrupts:
    """Counts Ctrl-C while it is entered, instead of letting it tear the exit hook apart."""

    count = 0

    def __enter__(self) -> Self:
        # Elsewhere than in the main thread there are no signals to take.
        with contextlib.suppress(ValueError):
            self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if hasattr(self, "_before"):
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> None:
        self.count += 1


def _at_exit() -> None:
    global _exiting  # noqa: PLW0603  # the one thing a process can be in
    with _Interrupts() as interrupts:
        _exiting = True
        with _lock:
            charges = list(_charges.values())
        begun = monotonic()
        leaving = [(charge, charge.worker.retire()) for charge in charges]
        told = False
        for charge, reply in leaving:
            while not reply.done() and interrupts.count < _INTERRUPTS_MAX:
                left = begun + charge.exit_timeout - monotonic()
                if left <= 0:
                    break
                with contextlib.suppress(TimeoutError):
                    reply.exception(min(left, _LOOK_SECONDS))  # now and then it is looked whether Ctrl-C was typed
                if interrupts.count and not told:
                    told = True
                    pending = sum(charge.worker.statistics().pending for charge, _ in leaving)
                    if pending:
                        _say(f"writing {pending} operations; interrupt again to give up")
            if not reply.done():
                pending = charge.worker.statistics().pending
                within = "" if interrupts.count else f" within {charge.exit_timeout} s"
                _say(f"job {charge.job_id!r}: {pending} operations could not be written{within} at exit")
            charge.failures.wait_told(min(_TELL_SECONDS_MAX, charge.exit_timeout))
        # What is kept here to the very end would keep its users' modules from ending in order.
        _charges.clear()
        others = [thread for thread in threading.enumerate() if not thread.name.startswith("persistency:")]
        if any(thread.daemon for thread in others):
            _keep_for_ever(charges)


def _say(text: str) -> None:
    print(f"persistency: {text}", file=sys.stderr)


def _keep_for_ever(charges: list[_Charge]) -> None:
    """Keep stores from being torn down under a daemon thread that is inside one when the interpreter ends."""
    import ctypes  # only here: most programs end without such threads

    for charge in charges:
        # The store alone: a worker knows functions of its user's, whose modules are to end in order.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(charge.worker.store))


def _in_child() -> None:
    """In a forked child: the parent's workers aren't here, and its jobs are none of the child's business."""
    global _lock  # noqa: PLW0603  # another thread of the parent may have held it
    _lock = threading.RLock()
    _charges.clear()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
