"""Upkeep: what a job does for itself between turns. It syncs what was committed, carries its log over, and reaps the
rows that have ended.

Rules:
  1. Each step is a turn of its own, so that nobody's answer waits for more than one.
  2. What was committed is on the medium within `sync_interval`; so much a power cut can take.
  3. A slice of reaping takes `REAP_ROWS_MAX` rows at the most, and begins only while nobody waits for the job; under a
     steady trickle one slice a second begins all the same.
  4. A job sleeps until the next of these is due; one that has nothing of the kind until somebody comes.
  5. What goes wrong here harms nobody: it is tried again later. Only what poisons a job is passed on.

Doesn't know: what waits in the mailbox, replies, SQL.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from time import monotonic
from typing import cast

from persistency.actor.clock import Clock
from persistency.actor.mailbox import Mailbox
from persistency.actor.settling import Answer, settle_all
from persistency.actor.turns import Harm, Turns
from persistency.errors import Corrupt, LeaseLost, StorageError
from persistency.logfields import about
from persistency.storage.port import Barrier, Checkpointing, OutcomeUnknown, Settling, Store

log: logging.Logger = logging.getLogger("persistency")

REAP_ROWS_MAX = 1_000
REAP_SECONDS = 1.0  # between slices while the mailbox has work, or after one that failed
# A system's clock may be set anew while a job sleeps; so long it may sleep on by the old one.
SLEEP_SECONDS_MAX = 300.0
RETRY_SECONDS = 1.0  # after a sync or a checkpoint that failed
FOLD_SECONDS = 5.0  # without a write, and the log is cut off
FOLD_AGAIN_SECONDS = 60.0  # after somebody who reads there has kept it from being


class Upkeep:
    """The upkeep of one open store. `sync_interval` is in seconds; `None`: syncing is left to whoever asks for it."""

    def __init__(
        self, job_id: str, store: Store, mailbox: Mailbox, clock: Clock, sync_interval: float | None = None
    ) -> None:
        self._job_id = job_id
        self._store = store
        self._log = _log_of(store)
        self._mailbox = mailbox
        self._clock = clock
        self._sync_interval = sync_interval
        self._sync_at: float | None = None  # when what was committed has to be synced
        self._carry_at = 0.0  # not before, after one that failed
        self._fold_at: float | None = None  # when the log is to be cut off, if nothing is written until then
        self._version = 0  # of the last write seen
        self._reap_at = 0.0  # not before, while there is work
        self._failed = False
        self._told = ""  # of what can't be done, so that it is told once
        self._planned_ms: int | None = None
        self._slept_at = (0, 0.0)  # what the clock said, and until when the worker was to sleep

    def note_folded(self) -> None:
        """Note that nothing was found in the log when the store was opened: there is nothing to be cut off."""
        if self._log is not None and not self._log.unsynced:
            self._version = self._store.last_version

    def pause(self) -> float | None:
        """Return how many seconds the worker may sleep; `None`: until somebody comes."""
        if self._mailbox.idle:
            self._mailbox.note_empty()
        self._look()
        rows = self._pause_for_rows()
        times = [at for at in (self._sync_at, self._fold_at, self._carry_at) if at]
        if not times:
            return rows
        pause = max(0.0, min(times) - monotonic())
        return pause if rows is None else min(pause, rows)

    def _pause_for_rows(self) -> float | None:
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
        """Say whether the worker will wake in time for the next row that ends, and for what is to be synced."""
        if self._log is not None:
            if self._sync_at is None and self._sync_interval is not None and self._log.unsynced:
                return False
            if self._fold_at is None and self._store.last_version != self._version:
                return False
        ends_ms = self._store.next_expiry_ms
        if ends_ms is None:
            return True
        return self._planned_ms is not None and self._planned_ms <= ends_ms and ends_ms > self._clock.look_ms()

    def do(self, step: Callable[[], None], turns: Turns, answers: list[Answer]) -> None:
        """Take one step, for who has the turn; add what is to be answered."""
        slow, begun = turns.slow, 0.0
        if slow is not None:
            begun = monotonic()
            self._mailbox.note_busy(begun)
        try:
            step()
        except Harm as harm:
            turns.poison(harm.cause, harm.outcome, answers)
        if slow is not None and (seconds := monotonic() - begun) >= slow.after:
            slow.step(step.__name__.strip("_"), seconds)

    def step(self, step: Callable[[], None], turns: Turns, answers: list[Answer]) -> None:
        """Take one step, and answer who waits for changes: some rows may have ended."""
        self.do(step, turns, answers)
        turns.tell_waiters(answers)

    def next_step(self, *, reaps: bool) -> Callable[[], None] | None:
        """Return what should be done now, in a turn of its own."""
        idle = self._mailbox.idle
        if self._log is not None:
            self._look()
            now = monotonic()
            # Somebody who asks beside a producer waits for short ones rather than, now and then, for a long one.
            if now >= self._carry_at and self._log.checkpoint_due(idle=idle or self._mailbox.asked):
                return self.checkpoint
            if self._sync_at is not None and now >= self._sync_at:
                return self._sync
            if idle and self._fold_at is not None and now >= self._fold_at:
                return self._fold
        return self._reap if reaps and self._may_reap(idle=idle) else None

    def checkpoint_due(self) -> bool:
        """Say whether the log should be carried over, if nobody waits."""
        return self._log is not None and self._log.checkpoint_due(idle=True) and monotonic() >= self._carry_at

    def carry_over(self, turns: Turns) -> None:
        """Carry the log over for a caller who has the turn, and settle what is answered if that poisons the job.

        A worker that was only rung might never get the turn beside a busy caller.
        """
        answers: list[Answer] = []
        self.do(self.checkpoint, turns, answers)
        settle_all(answers)

    def settle(self, patience: float | None) -> None:
        """Leave the store as a clean close would; wait for others `patience` seconds at the most (`None`: as ever)."""
        if isinstance(self._store, Settling):
            self._store.settle(patience)

    def checkpoint(self) -> None:
        """Carry the log over. Raises `Harm`."""
        assert self._log is not None
        self._carry_at = monotonic() + RETRY_SECONDS
        self._mailbox.asked = False
        if self._tried(self._log.checkpoint):
            self._carry_at = 0.0

    def _look(self) -> None:
        """See whether something was written since the last time, and when what follows from it is due."""
        if self._log is None:
            return
        if self._carry_at and not self._log.checkpoint_due(idle=True):
            self._carry_at = 0.0
        if not self._log.unsynced:
            self._sync_at = None
        elif self._sync_at is None and self._sync_interval is not None:
            self._sync_at = monotonic() + self._sync_interval
        version = self._store.last_version
        if version != self._version:
            self._version = version
            self._fold_at = monotonic() + FOLD_SECONDS

    def _sync(self) -> None:
        self._sync_at = monotonic() + RETRY_SECONDS
        self._tried(lambda: self._store.apply([None, Barrier(sync=True), None], self._clock.now_ms()))

    def _fold(self) -> None:
        assert self._log is not None
        log, self._fold_at = self._log, monotonic() + FOLD_AGAIN_SECONDS
        folded: list[bool] = []
        if self._tried(lambda: folded.append(log.fold())) and folded[0]:
            self._fold_at = None

    def _tried(self, act: Callable[[], object]) -> bool:
        try:
            act()
            self._told = ""
            return True
        except OutcomeUnknown as error:
            raise Harm(error.__cause__ or error) from error
        except (Corrupt, LeaseLost) as error:
            raise Harm(error) from error
        except StorageError as error:
            # Nothing is lost by it: it is tried again, and until then the log grows on.
            if str(error) != self._told:
                self._told = str(error)
                fields = about("upkeep_failed", self._job_id, error)
                log.warning("job %r: %s; it is tried again", self._job_id, error, extra=fields)
            return False

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
        except (Corrupt, LeaseLost) as error:
            raise Harm(error) from error
        except StorageError as error:
            fields = about("reaping_failed", self._job_id, error)
            log.warning("job %r: rows that have ended couldn't be taken away: %s", self._job_id, error, extra=fields)
        finally:
            self._reap_at = monotonic() + REAP_SECONDS


def _log_of(store: Store) -> Checkpointing | None:
    """Return the store itself, if it has a log that wants to be carried over."""
    # By one of its methods: on Python 3.11 asking for all of the protocol took 45 us, a tenth of an opening. An answer
    # kept for each class would keep the class, and what it refers to, from ending in order with the interpreter.
    return cast(Checkpointing, store) if hasattr(store, "checkpoint_due") else None
