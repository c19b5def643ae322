"""The census: the numbers of all jobs of one `Persistency`, taken together, for whoever shows them.

Rules:
  1. Counters never go backwards, whichever jobs have been closed since the last time. So a handle that was open then is
     kept until its last numbers have been counted; of what is opened and closed in between nothing is known.
  2. Each job is asked once. Asking wakes nobody, and takes no turn: a job at rest stays at rest.
  3. A `Persistency` isn't kept alive by being counted. In a forked child there is nothing to count.

Doesn't know: what the numbers are shown with.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Collection
from typing import Any, Final, Literal, NamedTuple, TypeVar

from persistency import Job, Persistency, PersistencyError, Statistics

K = TypeVar("K")

# The states of a job that is open.
STATES: Final[tuple[Literal["live", "idle", "stalled", "poisoned"], ...]] = ("live", "idle", "stalled", "poisoned")
# So many that were closed are remembered, in case that they are opened again.
_LEFT_MAX = 10_000


class Counters(NamedTuple):
    """What only grows, as in `Statistics`."""

    accepted: int = 0
    committed: int = 0
    failed: int = 0
    commits: int = 0


class Counted(NamedTuple):
    """One open job. Its counters go on where those of an earlier opening have ended."""

    job_id: str
    counters: Counters
    numbers: Statistics


class Census(NamedTuple):
    """All jobs that are open, and what these and those that were closed have counted up to now."""

    total: Counters
    jobs: list[Counted]

    def by_state(self) -> dict[str, int]:
        """Return how many jobs are in each state."""
        states = [job.numbers.state for job in self.jobs]
        return {state: states.count(state) for state in STATES}


class Counting:
    """Takes the census of a `Persistency`, as often as it is asked to. Any thread may ask.

    With `by_job` the counters of each job are remembered over its openings too.
    """

    def __init__(self, persistency: Persistency, *, by_job: bool) -> None:
        self._find: weakref.ref[Persistency] = weakref.ref(persistency)
        self._by_job = by_job
        self._pid = os.getpid()
        self._lock = threading.RLock()  # a signal handler may ask in the middle of it
        # Guarded by the lock:
        self._total = Counters()
        self._of_job: dict[str, Counters] = {}
        self._counted: dict[int, Counters] = {}  # by opening: how much of it is in the total
        self._held: dict[Job, int] = {}  # the handles that aren't counted to their end, and their openings

    @property
    def here(self) -> bool:
        """Whether this is the process whose jobs are counted, and not a child forked from it."""
        return os.getpid() == self._pid

    def take(self) -> Census:
        """Count; in a forked child there is nothing to count."""
        if not self.here:  # the lock may be held, for ever, by a thread that isn't here
            return Census(Counters(), [])
        with self._lock:
            there = set(self._open())
            jobs: list[Counted] = []
            held: dict[Job, int] = {}
            for job in (*there, *(self._held.keys() - there)):
                try:
                    numbers = job.statistics()
                except PersistencyError:  # forked, meanwhile
                    continue
                counters = self._count(job.id, numbers)
                if job in there and numbers.state != "closed":
                    jobs.append(Counted(job.id, counters, numbers))
                if job in there or numbers.pending:
                    held[job] = numbers.opening
            self._held = held
            _trim(self._counted, held.values())
            _trim(self._of_job, [job.id for job in held])
            return Census(self._total, jobs)

    def _open(self) -> list[Job]:
        persistency = self._find()
        if persistency is None:
            return []
        found = []
        try:
            for job_id in persistency:
                try:
                    found.append(persistency[job_id])
                except KeyError:  # closed, meanwhile
                    continue
        except PersistencyError:
            return []
        return found

    def _count(self, job_id: str, numbers: Statistics) -> Counters:
        """Add what is new of a job; return its counters."""
        now = Counters(numbers.accepted, numbers.committed, numbers.failed, numbers.commits)
        known = self._counted.get(numbers.opening, Counters())
        self._counted[numbers.opening] = now
        self._total = _grown(self._total, known, now)
        if not self._by_job:
            return now
        counters = self._of_job[job_id] = _grown(self._of_job.get(job_id, Counters()), known, now)
        return counters


def _grown(total: Counters, known: Counters, now: Counters) -> Counters:
    return Counters(*(so_far + new - old for so_far, old, new in zip(total, known, now, strict=True)))


def _trim(table: dict[K, Any], kept: Collection[K]) -> None:
    """Forget the oldest of a table, down to the bound, but those that are still needed."""
    too_many = len(table) - len(kept) - _LEFT_MAX
    if too_many > 0:
        needed = set(kept)
        for key in [key for key in table if key not in needed][:too_many]:
            del table[key]
