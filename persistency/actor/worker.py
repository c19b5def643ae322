"""The worker: the life of one job. It opens the store, runs turns, looks after the store, rests, and ends.

A job nobody uses may *rest*: its store is closed and its thread ends; the next post gets it another one, and the store
is opened again. When the interpreter exits, posters serve themselves.

Rules:
  1. Every reply that was taken is settled, whatever happens, to the thread too.
  2. Only the holder of the turn touches the store; it is opened and closed in a turn as well.
  3. A job rests only with nothing waiting, nobody waiting, and nothing wrong.

Doesn't know: SQL, keys, files, which engine the store is, how many workers there may be.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from functools import partial
from threading import get_ident
from time import monotonic
from typing import Any

from persistency.actor.accounts import Accounts, Answer, NameOps
from persistency.actor.clock import Clock
from persistency.actor.failures import FailureLog
from persistency.actor.mailbox import Mailbox
from persistency.actor.reply import Reply
from persistency.actor.settling import pending, ready, settle_all
from persistency.actor.slot import Slot
from persistency.actor.tally import Statistics, Tally
from persistency.actor.turns import Turns
from persistency.actor.upkeep import Upkeep
from persistency.actor.waiters import Waiters
from persistency.errors import Closed, PersistencyError
from persistency.storage.port import PLACES, Barrier, Failed, Group, Store

log = logging.getLogger("persistency")

# So long a late poster waits for another one's turn: a thread frozen in the middle of it never gives it back.
LATE_TURN_SECONDS_MAX = 5.0


class Worker:
    """One job's worker: a daemon thread, and at interpreter exit whoever comes.

    `open_store` is called in the thread that will run the job; `clock` stamps each group; `name_ops` turns a message
    back into operations; `waiters_max` bounds the requests that wait for changes; without a `slot` it never rests.
    """

    def __init__(
        self,
        job_id: str,
        mailbox: Mailbox,
        failures: FailureLog,
        *,
        open_store: Callable[[], Store],
        clock: Clock,
        name_ops: NameOps,
        stall_timeout: float,
        waiters_max: int,
        sync_interval: float | None = None,
        slot: Slot | None = None,
    ) -> None:
        self.opened: Reply[None] = pending(mailbox, reads=False)
        self.closed: Reply[None] = pending(mailbox, reads=False)
        self.clock = clock
        self.waiters = Waiters(waiters_max, mailbox.waits_for_itself)
        self._retired: Reply[None] | None = None
        self._job_id = job_id
        self.mailbox = mailbox
        self._open_store = open_store
        self._sync_interval = sync_interval
        self._slot = slot
        self._tally = Tally()
        self._failures = failures
        self._accounts = Accounts(self._tally, failures, mailbox, self.waiters, name_ops)
        self.turns = Turns(job_id, mailbox, self._accounts, self.waiters, self._tally, clock, stall_timeout)
        self.turns.written = self._after_write_in_place
        self.ended: Callable[[], object] = lambda: None  # called when the store is closed for good
        self._serve_late = partial(self.serve, patience=LATE_TURN_SECONDS_MAX)
        self._upkeep: Upkeep | None = None
        self._resting = False  # without a store and a thread, until somebody posts
        self._over = False  # the thread has nothing left to do
        self._ended = False  # the store is closed, for good
        self._starting = threading.Lock()

    @property
    def store(self) -> Store | None:
        """The store, while it is open."""
        return self.turns.store

    @property
    def looks_idle(self) -> bool:
        """Whether it could rest."""
        return self.mailbox.idle and not self.waiters and self._tally.state == "live" and self.opened.done()

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; `opened` is settled when the store is open, or with why it isn't."""
        thread = threading.Thread(target=self._run, name=f"persistency:{self._job_id}", daemon=True)
        self._begun = False
        try:
            thread.start()
        except BaseException as error:
            with self._starting:
                begun = self._begun
                self._over = not begun
            if begun:  # an interrupt, and the thread lives: whoever has called closes what it opens
                raise
            self.could_not_start(error)

    def start_unattended(self) -> None:
        """Open the store in this thread and serve every poster in its own; for when no thread can be started."""
        self._resting, self._over = False, True
        self.mailbox.unattend(self._serve_late)
        self._serve_late()

    def close(self, *, drain: bool = True) -> Reply[None]:
        """Refuse further posts, run what waits (or fail it with `Closed`), close the store; `closed` tells."""
        if not drain:
            self.turns.discards = True
            self.turns.hurry.set()
        dozed = self._wakes_nobody()
        self.mailbox.close(lambda: Closed(f"job {self._job_id!r} is closed"))
        if dozed and self._slot is not None:
            if self.mailbox.ended:  # there is nothing to be opened for
                self._serve_late()
            else:
                self._slot.wake()
        return self.closed

    def retire(self) -> Reply[None]:
        """Run what waits, tidy the store up and end the thread, but stay open: later posters serve themselves."""
        if self._wakes_nobody():
            self.start_unattended()
        elif self._retired is None:
            self._retired = pending(self.mailbox, reads=False)
            self.mailbox.ring()
        if self._over or self._retired is None:  # without a thread already: whoever asks does it
            self._serve_late()
            return ready()
        return self._retired

    def doze(self) -> None:
        """Wait for the first post, or a ring, before the store is opened. Instead of `start`, where there is a slot."""
        self._resting = True
        self._lie_down()

    def _wakes_nobody(self) -> bool:
        """End the rest of a worker without a thread; return whether it was resting."""
        return self.mailbox.wake_up() or (self._slot is not None and self._slot.withdraw())

    def statistics(self) -> Statistics:
        """Return the numbers of this instant."""
        status = None if (store := self.store) is None else store.status()
        commit_ms, numbers = self._tally.percentiles(), self._tally.statistics
        return self.mailbox.as_one(lambda level: numbers(level.accepted, level.nbytes, status, commit_ms))

    def _run(self) -> None:
        me = get_ident()
        with self._starting:
            if self._over:  # whoever has started this thread was interrupted, and has given up
                return
            self._begun = True
        self.mailbox.worker_thread = me
        self.mailbox.never_waits.add(me)
        self._resting = False
        try:
            self._live()
        finally:
            if not (self._over or self._resting):
                self._die(sys.exception() or SystemExit())
            # The system gives a thread's number to another one later.
            self.mailbox.worker_thread = None
            self.mailbox.never_waits.discard(me)
            if self._resting:
                self._lie_down()

    def _live(self) -> None:
        self.serve()
        while not (self._over or self._resting):
            try:
                self.mailbox.wait(self._pause())
                self.serve()
                self._leave_to_others()
            except BaseException as error:  # thrown into this thread from outside
                settle_all(self.turns.poison(error, "not applied", []))

    def _pause(self) -> float | None:
        if self._slot is not None and self._slot.pressed() and self.looks_idle:
            return 0.0
        if self.mailbox.taken:
            self.mailbox.ring()  # so that the caller who has the turn rings when it is given back
            return None
        if (upkeep := self._upkeep) is None or self.turns.poisoned:
            return None
        pauses = [upkeep.pause()]
        if self._slot is not None and self._slot.idle_ttl is not None:
            left = self.turns.used_at + self._slot.idle_ttl - monotonic()
            pauses.append(left if left > 0 else self._slot.idle_ttl)  # something keeps it from resting
        if (left_ms := self.turns.time_left_ms) is not None:
            pauses.append(max(0.1, left_ms / 1000))
        return min((pause for pause in pauses if pause is not None), default=None)

    def forsake(self, error: PersistencyError, *, quiet: bool) -> list[Reply[Any]]:
        """In a forked child: leave the parent's store alone from now on; return the replies nobody will answer.

        `quiet` says that nobody was in the middle of a turn.
        """
        replies = [*self.mailbox.forsake(error), *self.waiters.forsake(error), self.opened, self.closed]
        store, self.turns.store, self._upkeep = self.store, None, None
        self._over = self._ended = True
        if store is not None:
            store.disown(quiet=quiet)
        return replies if self._retired is None else [*replies, self._retired]

    def _die(self, cause: BaseException) -> None:
        """See that nobody waits for a thread that ends out of turn: poison the job; who closes it serves himself."""
        answers = self.turns.poison(cause, "unknown", [])
        settle_all(answers if self.opened.done() else [*answers, *self._not_opened(cause, [])])
        self._over = True
        self.mailbox.unattend(self._serve_late)

    # -- opening and resting -------------------------------------------------------------------------------------

    def _open(self) -> BaseException | None:
        """Open the store; return why it can't be. In a turn."""
        try:
            store = self._open_store()
        except BaseException as error:
            return error
        self.clock.not_before(store.status().latest_ms)
        self._upkeep = Upkeep(self._job_id, store, self.mailbox, self.clock, self._sync_interval)
        self._tally.state = "live"
        self.turns.used_at = monotonic()
        self.turns.serve_in_place(store, notes_use=self._slot is not None)
        return None

    def _not_opened(self, error: BaseException, group: Group) -> list[Answer]:
        """Tell that the store couldn't be opened; a job that has been open before is tried again by the next post."""
        if self._slot is not None:
            self._slot.give_back()
        if self.opened.done():
            outcomes = [None if type(message) is Barrier else Failed(error) for message in group[1::PLACES]]
            answers = self._accounts.group(group, outcomes)
            self._resting = not self.mailbox.ended
            return answers if self._resting else [*answers, *self._end()]
        self._over = self._ended = True
        self.ended()
        closed = Closed(f"job {self._job_id!r} could not be opened")
        behind = self.mailbox.shut(lambda: closed)
        answers = [(self.opened, None, error), (self.closed, None, None)]
        answers += self._accounts.fail((group, closed, "not applied"), (behind, closed, "not applied"))
        return answers if self._retired is None else [*answers, (self._retired, None, None)]

    def could_not_start(self, error: BaseException) -> None:
        """Tell that nobody could start the worker: what was posted meanwhile fails."""
        token = object()
        self._over = self._resting = False
        group = self.mailbox.take(token) or []
        answers = self._not_opened(error, group)
        self.mailbox.give_back(token)
        settle_all(answers)
        if self._resting:
            self._lie_down()

    def _may_rest(self) -> bool:
        slot = self._slot
        if slot is None or self.store is None or self._over or self._retired is not None or not self.looks_idle:
            return False
        return slot.wanted() or (slot.idle_ttl is not None and monotonic() - self.turns.used_at >= slot.idle_ttl)

    def _put_away(self, *, tidy: bool = True) -> Exception | None:
        """Close the store; return what went wrong. In a turn."""
        store, self.turns.store, self._upkeep = self.store, None, None
        self.mailbox.serve_in_place(None, None, None)
        try:
            if store is not None:
                store.close(tidy=tidy, now_ms=self.clock.last_ms())
        except Exception as error:
            log.exception("job %r: the store couldn't be closed in order", self._job_id)
            return error
        finally:
            if self._slot is not None:
                self._slot.give_back()
        return None

    def _rest(self) -> list[Answer]:
        if (lost := self._put_away()) is not None:
            return self.turns.poison(lost, "not applied", [])
        self._tally.state, self._resting = "idle", True
        return []

    def _lie_down(self) -> None:
        """Doze until somebody posts; or end, if nobody will."""
        assert self._slot is not None
        if not self.mailbox.doze(self._slot.wake):
            self._resting = False
            self._serve_late()
        elif self._retired is not None and self._wakes_nobody():  # the interpreter ends
            self.start_unattended()

    def _leave_to_others(self) -> None:
        """Give the slot of a poisoned job back."""
        if self._slot is not None and self.turns.poisoned and self.store is not None and self.mailbox.hold(self):
            self._put_away(tidy=False)
            self.mailbox.give_back(self)

    # -- one turn ------------------------------------------------------------------------------------------------

    def serve(self, *, patience: float = 0.0) -> None:
        """Run one turn; with `patience`, wait so many seconds for it if somebody else has it."""
        if self._ended:
            return
        token, again = object(), False
        answers: list[Answer] = []
        group: Group | None = None
        try:
            group = self.mailbox.take(token, patience=patience)
            if group is None:
                return
            again = bool(group)
            self._turn(group, answers, again=again)
        except BaseException as error:
            # A defect, or an exception somebody has thrown into this thread: nobody may be left waiting for it.
            answers += self.turns.poison(error, "unknown", group or [])
        finally:
            try:
                self.mailbox.give_back(token)
            except BaseException:  # thrown into this thread; nobody else would give it back
                self.mailbox.give_back(token)
                raise
        settle_all(answers)
        if not self.turns.poisoned and (upkeep := self._upkeep) is not None:
            upkeep.look_after(self.turns, reaps=not self._over)
        if again and self.mailbox.ended:
            # Only now, with the last answers given: what nobody looked at is still to be raised by the closing.
            del answers
            self.serve(patience=patience)

    def _turn(self, group: Group, answers: list[Answer], *, again: bool) -> None:
        if self.store is None and (group or not self.opened.done()) and not self.turns.poisoned:
            unwanted = not group and self.mailbox.ended
            error = Closed(f"job {self._job_id!r} was closed before it was open") if unwanted else self._open()
            if error is not None:
                answers += self._not_opened(error, group)
                return
            if not self.opened.done():
                settle_all([(self.opened, None, None)])
        if group:
            if self._slot is not None:
                self._slot.decline()
            answers += self.turns.decide(group)
            group.clear()  # so that an interrupt from now on fails nothing twice
        answers += self.turns.tell_waiters()
        if self.mailbox.has_ended:
            self.mailbox.close(lambda: Closed(f"job {self._job_id!r} was temporary, and its time is over"))
        if self.mailbox.ended and not again:
            answers += self._end()
        elif self._retired is not None and not self._retired.done():
            answers += self._retire()
        elif not again and self._may_rest():
            answers += self._rest()
        elif self._slot is not None and self._over:  # late posts to many jobs mustn't keep all of their files open
            self._put_away()
        elif self.store is None and self._slot is not None:  # woken for nothing
            self._resting = True
            self._slot.give_back()

    def _after_write_in_place(self) -> None:
        upkeep = self._upkeep
        if upkeep is not None and upkeep.checkpoint_due():
            # By the one who has the turn: a worker that was only rung might never get it beside a busy caller.
            settle_all(upkeep.do(upkeep.checkpoint, self.turns))
        if self.waiters or (upkeep is not None and not upkeep.is_planned()):
            self.mailbox.ring()

    def _end(self) -> list[Answer]:
        error = self._put_away(tidy=not self.turns.poisoned)
        self._over = self._ended = True
        self._tally.state = "closed"
        self.ended()
        answers = self.waiters.refuse(Closed(f"job {self._job_id!r} is closed"))
        answers.append((self.closed, None, self._failures.take() or error))
        return answers if self._retired is None else [*answers, (self._retired, None, None)]

    def _retire(self) -> list[Answer]:
        assert self._retired is not None
        # First the posters are told, then what came until then is run: beside one that never pauses it ends too.
        self.mailbox.unattend(self._serve_late)
        rest = self.mailbox.take_more()
        answers = self.turns.decide(rest) if rest else []
        if self._upkeep is not None and not self.turns.poisoned:
            self._upkeep.settle()
        self._over = True
        answers += self.waiters.refuse(Closed(f"job {self._job_id!r} ends with the interpreter"))
        return [*answers, (self._retired, None, None)]
