"""Leases kept alive: one thread per process renews the leases of whatever takes long.

Rules:
  1. The thread is there as long as there are leases to renew. It posts the renewals, and waits for none of them.
  2. A lease is renewed each time a third of it is over, so that two renewals may fail before it is lost.
  3. A lease that was lost is renewed no more, and its owner is told.

Doesn't know: what is leased.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from time import monotonic
from types import TracebackType
from typing import Self

from persistency import Closed, Reply
from persistency.logfields import about

log: logging.Logger = logging.getLogger("persistency.recipes")


class KeptAlive:
    """A context in which a lease is renewed. Entering and leaving it waits for nothing.

    `renew` posts a renewal, or answers with `None` where there is nothing to be renewed any more.
    """

    def __init__(
        self, job_id: str, seconds: float, renew: Callable[[], Reply[bool] | None], lost: Callable[[], None]
    ) -> None:
        self._job_id = job_id
        self._period = seconds / 3
        self._renew = renew
        self._lost = lost
        self._due = 0.0

    def __enter__(self) -> Self:
        self._due = monotonic() + self._period
        _renewals.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _renewals.discard(self)

    def _post(self) -> None:
        self._due = monotonic() + self._period
        try:
            reply = self._renew()
            if reply is None:
                _renewals.discard(self)
            else:
                reply.add_done_callback(self._answered)
        except Exception as error:  # whatever a runner raises, it is about this lease alone
            self._failed(error)

    def _answered(self, reply: Future[bool]) -> None:
        error = reply.exception()
        if error is not None:
            self._failed(error)
        elif not reply.result():
            _renewals.discard(self)
            self._lost()

    def _failed(self, error: BaseException) -> None:
        if isinstance(error, Closed):
            _renewals.discard(self)
        fields = about("lease_not_renewed", self._job_id, error)
        log.warning("job %r: a lease could not be renewed: %s", self._job_id, error, extra=fields)


class _Renewals:
    """What the thread works through."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._kept: set[KeptAlive] = set()
        self._changed: SimpleQueue[None] = SimpleQueue()
        self._runs = False

    def add(self, one: KeptAlive) -> None:
        with self._lock:
            self._kept.add(one)
            if self._runs:
                self._changed.put(None)
                return
            thread = threading.Thread(target=self._renew, name="persistency-leases", daemon=True)
            self._runs = True
            try:
                thread.start()
            except RuntimeError:  # the interpreter is about to end, and starts no threads any more
                self._runs = False
                self._kept.discard(one)
            except BaseException:
                self._runs = False
                self._kept.discard(one)
                raise

    def discard(self, one: KeptAlive) -> None:
        with self._lock:
            self._kept.discard(one)
            if self._runs:
                self._changed.put(None)

    def _renew(self) -> None:
        while True:
            with self._lock:
                if not self._kept:
                    self._runs = False
                    return
                now = monotonic()
                due = [one for one in self._kept if one._due <= now]
                pause = min(one._due for one in self._kept) - now
            for one in due:
                one._post()
            if not due:
                try:
                    self._changed.get(timeout=pause)
                except Empty:
                    continue


_renewals = _Renewals()


def _in_child() -> None:
    """In a forked child the thread isn't there, and the leases are the parent's."""
    global _renewals  # noqa: PLW0603  # of this process
    _renewals = _Renewals()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
