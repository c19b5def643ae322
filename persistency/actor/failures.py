"""Failures: what became of what was accepted and then failed, until somebody has been told.

Rules:
  1. A failed event is reported four ways: the log, `on_error` (on a thread of its own), the statistics (not kept
     here), and exactly one `take()`, by a flush or a close.
  2. Kept are up to 1,000 failures and 1 MiB of payload; of what is beyond only the count.
  3. The failure of a request is told by its reply; one whose reply was dropped unseen, by whoever made the reply.
  4. Nothing a callback throws reaches the worker, and a slow callback holds nobody up.

Doesn't know: mailboxes, the store, what the operations mean.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence

from persistency.errors import Failure, WriteFailed, shown
from persistency.logfields import about

log: logging.Logger = logging.getLogger("persistency")

FAILURES_MAX = 1_000
PAYLOAD_BYTES_MAX = 1024 * 1024

OnError = Callable[[str, Sequence[Failure]], object]


class Unseen:
    """Kept by a failed reply nobody has looked at: when it is dropped with the reply, it tells."""

    __slots__ = ("error", "tell")

    def __init__(self, error: BaseException, tell: Callable[[BaseException], None]) -> None:
        self.error: BaseException = error
        self.tell: Callable[[BaseException], None] | None = tell

    def __del__(self) -> None:
        tell = getattr(self, "tell", None)  # it has none if an interrupt came while it was made
        if tell is not None:
            tell(self.error)


class _Kept:
    """Failures up to the bound, and the count of those beyond. Not locked."""

    def __init__(self) -> None:
        self.failures: list[Failure] = []
        self.payload_bytes = 0
        self.omitted = 0

    def add(self, failures: Sequence[Failure]) -> None:
        for failure in failures:
            nbytes = len(getattr(failure.op, "payload", b""))
            if len(self.failures) < FAILURES_MAX and self.payload_bytes + nbytes <= PAYLOAD_BYTES_MAX:
                self.failures.append(failure)
                self.payload_bytes += nbytes
            else:
                self.omitted += 1


class FailureLog:
    """One job's failed events. `never_waits` gets the id of the thread that runs `on_error`, while it runs."""

    def __init__(self, job_id: str, on_error: OnError | None, never_waits: set[int]) -> None:
        self._job_id = job_id
        self._on_error = on_error
        self._never_waits = never_waits
        # Re-entrant: a dropped reply reports from `__del__`, which may run in the middle of another report.
        self._lock = threading.RLock()
        self._untaken = _Kept()
        self._untold = _Kept()
        self._teller: threading.Thread | None = None
        self._pid = os.getpid()

    def record(self, failures: Sequence[Failure]) -> None:
        """Keep failed events for the next `take`, and report them."""
        if failures:
            with self._lock:
                self._untaken.add(failures)
            self.report(failures)

    def report(self, failures: Sequence[Failure]) -> None:
        """Report failures to the log and `on_error` alone: those of requests whose reply nobody looked at."""
        if os.getpid() != self._pid:  # in a forked child they are the parent's, which tells of them itself
            return
        first = failures[0]
        log.error(
            "job %r: %d operation(s) failed (%s), the first: %s: %s",
            self._job_id, len(failures), first.outcome, shown(first.op), first.error,
            extra=about(
                "writes_failed", self._job_id, first.error, operations=len(failures), outcome=first.outcome
            ),
        )  # fmt: skip
        if self._on_error is None:
            return
        with self._lock:
            self._untold.add(failures)
            if self._teller is not None:
                return
            self._teller = threading.Thread(target=self._tell, name=f"persistency:{self._job_id}:on_error", daemon=True)
            teller = self._teller
        if sys.is_finalizing():  # A thread that is started now never runs, and whoever starts it may wait for ever.
            self._tell()
            return
        try:
            teller.start()
        except RuntimeError:  # The interpreter is shutting down and starts no threads any more.
            self._tell()

    def take(self) -> WriteFailed | None:
        """Return what has failed since the last time, for one flush or close to raise; or `None`."""
        with self._lock:
            if not self._untaken.failures and not self._untaken.omitted:
                return None
            taken, self._untaken = self._untaken, _Kept()
        return WriteFailed(taken.failures, taken.omitted)

    def put_back(self, failed: WriteFailed) -> None:
        """Keep for the next `take` what a flush took, but nobody looked at."""
        with self._lock:
            later, self._untaken = self._untaken, _Kept()
            self._untaken.add(failed.failures)
            self._untaken.add(later.failures)
            self._untaken.omitted += failed.omitted + later.omitted

    def wait_told(self, timeout: float) -> None:
        """Give `on_error` up to `timeout` seconds to come back."""
        teller = self._teller
        if teller is not None and teller is not threading.current_thread() and teller.is_alive():
            teller.join(timeout)

    def _tell(self) -> None:
        me = threading.get_ident()
        alone = me not in self._never_waits  # else it is the worker itself, which stays among them
        self._never_waits.add(me)
        try:
            while True:
                with self._lock:
                    told, self._untold = self._untold, _Kept()
                    if not told.failures and not told.omitted:
                        self._teller = None
                        return
                if told.omitted:
                    fields = about("failures_omitted", self._job_id, operations=told.omitted)
                    log.error(
                        "job %r: %d more failures are not passed to on_error", self._job_id, told.omitted, extra=fields
                    )
                self._call(told.failures)
        finally:
            if alone:
                self._never_waits.discard(me)

    def _call(self, failures: Sequence[Failure]) -> None:
        assert self._on_error is not None
        try:
            self._on_error(self._job_id, failures)
        except BaseException as error:
            log.exception("job %r: on_error raised", self._job_id, extra=about("on_error_raised", self._job_id, error))
