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
import sys
import threading
from time import monotonic
from typing import NamedTuple

from persistency.actor.failures import FailureLog
from persistency.actor.worker import Worker

_TELL_SECONDS_MAX = 5.0


class _Charge(NamedTuple):
    job_id: str
    worker: Worker
    failures: FailureLog
    exit_timeout: float


_lock = threading.Lock()
_charges: dict[int, _Charge] = {}
_exiting = False


def look_after(job_id: str, worker: Worker, failures: FailureLog, exit_timeout: float) -> None:
    """Have a worker drained at exit, within `exit_timeout` seconds."""
    with _lock:
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


def _at_exit() -> None:
    global _exiting  # noqa: PLW0603  # the one thing a process can be in
    _exiting = True
    begun = monotonic()
    with _lock:
        charges = list(_charges.values())
    leaving = [(charge, charge.worker.retire()) for charge in charges]
    patient = True
    for charge, reply in leaving:
        while not reply.done():
            left = begun + charge.exit_timeout - monotonic() if patient else 0.0
            try:
                reply.exception(max(0.0, left))
            except TimeoutError:
                _tell(charge, "at exit" if not patient else f"within {charge.exit_timeout} s at exit")
                break
            except KeyboardInterrupt:
                pending = sum(charge.worker.statistics().pending for charge, reply in leaving if not reply.done())
                if patient:
                    print(f"persistency: writing {pending} operations; interrupt again to give up", file=sys.stderr)
                patient = not patient
        charge.failures.wait_told(min(_TELL_SECONDS_MAX, charge.exit_timeout))


def _tell(charge: _Charge, when: str) -> None:
    pending = charge.worker.statistics().pending
    print(
        f"persistency: job {charge.job_id!r}: {pending} operations could not be written {when}",
        file=sys.stderr,
    )


atexit.register(_at_exit)
