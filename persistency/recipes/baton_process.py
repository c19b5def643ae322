"""What the batons of a process have in common: who of them may have a job, the process' exit, and a fork.

Rules:
  1. Of the batons of one `Persistency` one at a time has a job: they would close its handle under one another.
  2. The exit waits for what batons were asked for, before the engine's own hook, which was registered first.
  3. Under `multiprocessing` a child's end is an exit, too.
  4. A forked child has no batons: those of its parent are none of its business.

Doesn't know: what batons do with their jobs.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from time import monotonic
from typing import Protocol
from weakref import WeakKeyDictionary, WeakSet, WeakValueDictionary

from persistency import Persistency

_gate = threading.RLock()
_seats: WeakKeyDictionary[Persistency, WeakValueDictionary[str, Seat]] = WeakKeyDictionary()
_looked_after: WeakSet[LookedAfter] = WeakSet()
_exiting = False
_finalized_in: int | None = None  # the process in which multiprocessing calls the hook, too


class Seat:
    """What whoever has a job through a `Persistency` holds: a lock that is there as long as a baton may want it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def acquire(self, timeout: float) -> bool:
        """Take it within so many seconds; return whether that was possible."""
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        """Leave it to the next one."""
        self._lock.release()


class LookedAfter(Protocol):
    """What the exit waits for."""

    exit_timeout: float

    @property
    def id(self) -> str:
        """The job's id."""
        raise NotImplementedError

    def finish(self, deadline: float, /) -> int:
        """Wait, until a moment of the monotonic clock, for what was asked for; return how much could not be done."""
        raise NotImplementedError


def seat_of(persistency: Persistency, job_id: str) -> Seat:
    """Return what whoever has a job through a `Persistency` holds."""
    with _gate:
        return _seats.setdefault(persistency, WeakValueDictionary()).setdefault(job_id, Seat())


def look_after(baton: LookedAfter) -> None:
    """Have the exit wait for a baton."""
    with _gate:
        _looked_after.add(baton)
    _finalize_child()


def ends() -> bool:
    """Say whether the exit has begun: no thread that is started now comes to its end."""
    return _exiting


def _at_exit() -> None:
    global _exiting  # noqa: PLW0603  # the one thing a process can be in
    _exiting = True
    begun = monotonic()
    with _gate:
        batons = list(_looked_after)
    for baton in batons:
        try:
            left = baton.finish(begun + baton.exit_timeout)
        except KeyboardInterrupt:
            begun = float("-inf")  # nobody is waited for any longer
            left = baton.finish(begun)
        if left:
            print(f"persistency: baton {baton.id!r}: {left} calls could not be run at exit", file=sys.stderr)


def _finalize_child() -> None:
    """In a child of multiprocessing see that the hook runs: before Python 3.13 `atexit` doesn't there."""
    global _finalized_in  # noqa: PLW0603  # of this process
    process = sys.modules.get("multiprocessing.process")
    if process is None or process.parent_process() is None or _finalized_in == os.getpid():
        return
    from multiprocessing.util import Finalize  # it is there already: this is one of its children

    _finalized_in = os.getpid()
    Finalize(None, _at_exit, exitpriority=-50)  # before the engine's own, -100


def _in_child() -> None:
    global _gate, _exiting  # noqa: PLW0603  # another thread of the parent may have had it
    _gate = threading.RLock()
    _exiting = False
    _seats.clear()
    _looked_after.clear()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
