"""What the programs that end, and those that write late, have in common: jobs whose workers are held.

Rows 0, 1, 2, ... are posted to the job `alpha`, so that the file tells what was lost. Nothing of the package is
imported with this module: some programs register their exit hooks first.
"""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.crash.running import replace_method

if TYPE_CHECKING:
    from persistency import Job, Persistency
    from persistency.storage.port import Group

PENDING = 10_000
MAILBOX_OPS_MAX = 4 * PENDING


def say(*words: object) -> None:
    """Print a line, also where little of the interpreter is left."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def post(job: Job, start: int, stop: int) -> None:
    """Post some rows."""
    for number in range(start, stop):
        job.put("rows", (number,), b"%d" % number)


class Hold:
    """Holds every worker before its next group until `release`; then `act` runs in each before the group is written."""

    def __init__(self, act: Callable[[], None] = lambda: None, only: str = "") -> None:
        from persistency.storage.sqlite import SqliteStore

        self.gate = threading.Event()
        self.reached = threading.Event()
        apply = SqliteStore.apply

        def held(store: SqliteStore, group: Group, now_ms: int) -> list[Any]:
            if only in threading.current_thread().name:
                self.reached.set()
                self.gate.wait()
                act()
            return apply(store, group, now_ms)

        replace_method(SqliteStore, "apply", held)

    def release(self) -> None:
        """Let the workers go."""
        self.gate.set()


def open_all(root: str, *job_ids: str, **options: Any) -> tuple[Persistency, list[Job]]:
    """Open jobs; the bounds are wide enough for all that is to wait."""
    from persistency import Persistency

    persistency = Persistency(root, **options)
    return persistency, [persistency.open_job(job_id, mailbox_ops_max=MAILBOX_OPS_MAX) for job_id in job_ids]


KEPT: list[object] = []  # what lives until the interpreter's end


def leave_pending(root: str, *job_ids: str) -> Hold:
    """Leave rows waiting in some jobs until the exit hooks begin; the first of them counts, and lets the workers go."""
    persistency, jobs = open_all(root, *(job_ids or ("alpha",)))
    hold = Hold()
    for job in jobs:
        post(job, 0, PENDING)

    def begin_exit() -> None:
        say("pending", *(job.statistics().pending for job in jobs))
        hold.release()

    atexit.register(begin_exit)
    KEPT.append(persistency)
    return hold
