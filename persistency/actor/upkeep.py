"""Upkeep: what a job does for itself between turns. It carries its log over and reaps the rows that have ended.

Rules:
  1. Each step is a turn of its own, so that nobody's answer waits for more than one.
  2. A slice of reaping takes `REAP_ROWS_MAX` rows at the most, and begins only while nobody waits for the job; under a
     steady trickle one slice a second begins all the same.
  3. A job sleeps until its next row ends; one without such rows until somebody comes.
  4. What goes wrong here harms nobody: it is tried again later. Only what poisons a job is passed on.

Doesn't know: what waits in the mailbox, replies, SQL.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic

from persistency.actor.clock import Clock
from persistency.actor.mailbox import Mailbox
from persistency.errors import Corrupt, StorageError
from persistency.storage.port import Checkpointing, OutcomeUnknown, Store

log = logging.getLogger("persistency")

REAP_ROWS_MAX = 1_000
REAP_SECONDS = 1.0  # between slices while the mailbox has work, or after one that failed
# A system's clock may be set anew while a job sleeps; so long it may sleep on by the old one.
SLEEP_SECONDS_MAX = 300.0


class Harm(Exception):
    """What poisons a job. `cause` is why, `outcome` what became of the group in hand."""

    def __init__(self, cause: BaseException, outcome: str = "not applied") -> None:
        super().__init__(cause, outcome)
        self.cause = cause
        self.outcome = outcome


class Upkeep:
    """The upkeep of one open store."""

    def __init__(self, job_id: str, store: Store, mailbox: Mailbox, clock: Clock) -> None:
        self._job_id = job_id
        self._store = store
        self._checkpointing = store if isinstance(store, Checkpointing) else None
        self._mailbox = mailbox
        self._clock = clock
        self._reap_at = 0.0  # not before, while there is work
        self._failed = False
        self._planned_ms: int | None = None
        self._slept_at = (0, 0.0)  # what the clock said, and until when the worker was to sleep

    def pause(self) -> float | None:
        """Return how many seconds the worker may sleep; `None`: until somebody comes."""
        # In this order: whoever writes meanwhile finds no plan, and rings.
        self._planned_ms = None
        self._planned_ms = ends_ms = self._store.next_expiry_ms
        if ends_ms is None:
            return None
        clock_ms, now = self._clock.read_ms(), monotonic()
        seconds = (ends_ms - clock_ms) / 1000
        stands_still = clock_ms == self._slept_at[0] and now >= self._slept_at[1]
        if seconds <= 0 or (stands_still and seconds < REAP_SECONDS):
            seconds = REAP_SECONDS
        seconds = min(seconds, SLEEP_SECONDS_MAX)
        self._slept_at = (clock_ms, now + seconds)
        return seconds

    def is_planned(self) -> bool:
        """Say whether the worker will wake in time for the next row that ends."""
        ends_ms = self._store.next_expiry_ms
        if ends_ms is None:
            return True
        return self._planned_ms is not None and self._planned_ms <= ends_ms and ends_ms > self._clock.look_ms()

    def next_step(self, *, reaps: bool) -> Callable[[], None] | None:
        """Return what should be done now, in a turn of its own."""
        idle = self._mailbox.idle
        if self._checkpointing is not None and self._checkpointing.checkpoint_due(idle=idle):
            return self.checkpoint
        return self._reap if reaps and self._may_reap(idle=idle) else None

    def checkpoint_due(self) -> bool:
        """Say whether the log should be carried over, if nobody waits."""
        return self._checkpointing is not None and self._checkpointing.checkpoint_due(idle=True)

    def settle(self) -> None:
        """Leave the store as a clean close would."""
        if self._checkpointing is not None:
            self._checkpointing.settle()

    def checkpoint(self) -> None:
        """Carry the log over. Raises `Harm`."""
        assert self._checkpointing is not None
        try:
            self._checkpointing.checkpoint()
        except OutcomeUnknown as error:
            raise Harm(error.__cause__ or error) from error
        except StorageError as error:
            # Nothing is lost by it: the log only grows on until a later one gets through.
            log.warning("job %r: %s", self._job_id, error)

    def _may_reap(self, *, idle: bool) -> bool:
        ends_ms = self._store.next_expiry_ms
        if ends_ms is None or ends_ms > self._clock.look_ms():
            return False
        return (idle and not self._failed) or monotonic() >= self._reap_at

    def _reap(self) -> None:
        self._failed = True
        try:
            self._store.reap(self._clock.now_ms(), REAP_ROWS_MAX)
            self._failed = False
        except OutcomeUnknown as error:
            raise Harm(error.__cause__ or error) from error
        except Corrupt as error:
            raise Harm(error) from error
        except StorageError as error:
            log.warning("job %r: rows that have ended couldn't be taken away: %s", self._job_id, error)
        finally:
            self._reap_at = monotonic() + REAP_SECONDS
