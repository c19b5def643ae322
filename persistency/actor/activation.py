"""Activation: a job's store being open, and its leave to be.

A job nobody uses may rest: its store is closed, its slot is somebody else's. It is opened again for the next post.

Rules:
  1. The store is opened, used and closed in a turn.
  2. Whatever goes wrong, a store that was opened is closed, and the slot is given back.
  3. A job rests only with nothing waiting, nobody waiting, and nothing wrong.

Doesn't know: threads, replies, what a group is, which engine the store is.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from time import monotonic

from persistency.actor.clock import Clock
from persistency.actor.mailbox import Mailbox
from persistency.actor.slot import Slot
from persistency.actor.tally import Tally
from persistency.actor.turns import Turns
from persistency.actor.upkeep import Upkeep
from persistency.actor.waiters import Waiters
from persistency.logfields import about
from persistency.storage.port import Store

log: logging.Logger = logging.getLogger("persistency")


class Activation:
    """The store of one job, while it is open. Without a `slot` it never rests."""

    def __init__(
        self,
        job_id: str,
        mailbox: Mailbox,
        turns: Turns,
        tally: Tally,
        waiters: Waiters,
        clock: Clock,
        open_store: Callable[[], Store],
        sync_interval: float | None,
        slot: Slot | None,
    ) -> None:
        self.upkeep: Upkeep | None = None
        self._slot = slot
        self._job_id = job_id
        self._mailbox = mailbox
        self._turns = turns
        self._tally = tally
        self._waiters = waiters
        self._open_store = open_store
        self._clock = clock
        self._sync_interval = sync_interval

    def begin(self) -> None:
        """Open the store, or raise why it can't be. In a turn."""
        try:
            self._turns.store = store = self._open_store()
            found = store.status()
            self._clock.not_before(found.latest_ms)
            self.upkeep = Upkeep(self._job_id, store, self._mailbox, self._clock, self._sync_interval)
            if not found.wal_bytes:
                self.upkeep.note_folded()
            self._turns.used_at = monotonic()
            self._turns.serve_in_place(store, notes_use=self._slot is not None)
            self._tally.state = "live"
        except BaseException:
            self._close(tidy=False)
            raise

    def end(self, *, tidy: bool = True) -> Exception | None:
        """Close the store, if it is open, and give the slot back; return what went wrong. In a turn."""
        try:
            self._close(tidy=tidy)
        except Exception as error:
            fields = about("store_not_closed", self._job_id, error)
            log.exception("job %r: the store couldn't be closed in order", self._job_id, extra=fields)
            if self._turns.store is not None:  # it wasn't even tried
                self._close(tidy=False)
            return error
        finally:
            if self._slot is not None:
                self._slot.give_back()
        return None

    def _close(self, *, tidy: bool) -> None:
        store, self.upkeep = self._turns.store, None
        self._mailbox.serve_in_place(None, None, None)
        self._mailbox.serve_ahead(None)
        if store is None:
            return
        try:
            store.close(tidy=tidy, now_ms=self._clock.last_ms())
        except BaseException:  # nobody else would give the file up
            with contextlib.suppress(Exception):
                store.close(tidy=False)
            raise
        finally:
            self._turns.store = None

    @property
    def looks_idle(self) -> bool:
        """Whether nobody waits for anything, and nothing is wrong."""
        return self._mailbox.idle and not self._waiters and self._tally.state == "live"

    def may_rest(self) -> bool:
        """Say whether it is time to rest: somebody else needs the slot, or the job was left alone for long enough."""
        slot = self._slot
        if slot is None or self._turns.store is None or not self.looks_idle:
            return False
        return slot.wanted() or (slot.idle_ttl is not None and monotonic() - self._turns.used_at >= slot.idle_ttl)

    def pause(self) -> float | None:
        """Return how many seconds it may be before there is something to look after; `None`: for ever."""
        if self._slot is not None and self._slot.pressed() and self.looks_idle:
            return 0.0
        if self._mailbox.taken:
            self._mailbox.ring()  # so that the caller who has the turn rings when it is given back
            return None
        if self.upkeep is None or self._turns.poisoned:
            return None
        pauses = [] if (pause := self.upkeep.pause()) is None else [pause]
        if self._slot is not None and self._slot.idle_ttl is not None:
            left = self._turns.used_at + self._slot.idle_ttl - monotonic()
            pauses.append(left if left > 0 else self._slot.idle_ttl)  # something keeps it from resting
        if (left_ms := self._turns.time_left_ms) is not None:
            pauses.append(max(0.1, left_ms / 1000))
        return min(pauses, default=None)
