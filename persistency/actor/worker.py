"""The worker: runs one job, a group at a time.

Group commit, step by step. Whoever has the turn
  1. takes everything that waits in the mailbox as one group; nobody is ever asked to wait for company;
  2. has the store run it in one transaction, reads among the writes, each batch whole or not at all;
  3. counts what became of every operation, and keeps the failures of events for the next flush;
  4. gives the turn back, and only then settles the replies, one wake-up for each event loop.
So a write costs its caller an append; one commit pays for all that came while the last one ran; a read sees every
write posted before it, because it stands behind them; and what a caller is told has been committed.

Rules:
  1. A fault of the environment never skips a group: it is tried again, in order, while the job is stalled; what
     can't be waited out poisons the job. So what the store holds is always a prefix of what was accepted.
  2. Every reply that was taken is settled, whatever happens.
  3. Only the holder of the turn touches the store.

Doesn't know: SQL, keys, files, which engine the store is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from threading import get_ident
from time import monotonic, perf_counter
from typing import Any

from persistency.actor.accounts import Accounts, Answer, NameOps
from persistency.actor.clock import Clock
from persistency.actor.failures import FailureLog
from persistency.actor.mailbox import Mailbox
from persistency.actor.reply import Reply
from persistency.actor.settling import fill, new_reply, pending, ready, settle_all
from persistency.actor.tally import Statistics, Tally
from persistency.actor.upkeep import Harm, Upkeep
from persistency.actor.waiters import Waiters
from persistency.errors import Closed, Corrupt, Poisoned, StorageError
from persistency.storage.port import (
    Barrier,
    Failed,
    Group,
    OutcomeUnknown,
    Store,
    writes,
)

log = logging.getLogger("persistency")

RETRY_SECONDS_MIN = 0.05
RETRY_SECONDS_MAX = 1.0
# How long a late poster waits for another one's turn: a thread that was frozen in the middle of it never gives it back.
LATE_TURN_SECONDS_MAX = 5.0


class Worker:
    """One job's worker: a daemon thread, and at interpreter exit whoever comes.

    `open_store` is called once, in the thread that will run the job; `clock` stamps each group; `name_ops` turns a
    message back into the operations its caller posted; `waiters_max` bounds the requests that wait for changes.
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
    ) -> None:
        self.opened: Reply[None] = pending(mailbox, reads=False)
        self.closed: Reply[None] = pending(mailbox, reads=False)
        self._retired: Reply[None] | None = None
        self._job_id = job_id
        self._mailbox = mailbox
        self._open_store = open_store
        self.clock = clock
        self._now_ms = clock.now_ms
        self._stall_timeout = stall_timeout
        self._tally = Tally()
        self._failures = failures
        self.waiters = Waiters(waiters_max, mailbox.waits_for_itself)
        self._accounts = Accounts(self._tally, failures, mailbox, self.waiters, name_ops)
        self.store: Store | None = None
        self._upkeep: Upkeep | None = None
        self._over = False  # the thread has nothing left to do
        self._ended = False  # the store is closed
        self._discards = False
        self._hurry = threading.Event()
        self._starting = threading.Lock()
        self._begun = False  # the thread has

    # -- life ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the thread; `opened` is settled when the store is open, or with why it isn't."""
        thread = threading.Thread(target=self._run, name=f"persistency:{self._job_id}", daemon=True)
        try:
            thread.start()
        except BaseException as error:
            with self._starting:
                begun, self._over = self._begun, True
            if begun:  # an interrupt, and the thread lives: whoever has called closes what it opens
                self._over = False
                raise
            self._not_opened(error)

    def start_unattended(self) -> None:
        """Open the store in this thread and serve every poster in its own; for when no thread can be started."""
        if self._open():
            self._over = True
            self._mailbox.unattend(self._serve_late)
            self._serve_late()  # what a second opener has posted since `opened` was settled

    def close(self, *, drain: bool = True) -> Reply[None]:
        """Refuse further posts, run what waits (or fail it with `Closed`), close the store; `closed` tells."""
        if not drain:
            self._discards = True
            self._hurry.set()
        self._mailbox.close(lambda: Closed(f"job {self._job_id!r} is closed"))
        return self.closed

    def retire(self) -> Reply[None]:
        """Run what waits, tidy the store up and end the thread, but stay open: later posters serve themselves.

        What they write is committed as ever, but the file isn't tidied up again: there is no last moment to do it in.
        """
        if self._retired is None:
            self._retired = pending(self._mailbox, reads=False)
            self._mailbox.ring()
        if self._over:  # without a thread already: whoever asks does it
            self._serve_late()
            return ready()
        return self._retired

    def statistics(self) -> Statistics:
        """Return the numbers of this instant."""
        store = self.store
        wal_bytes = 0 if store is None else store.status().wal_bytes
        commit_ms = self._tally.percentiles()
        now: Statistics = self._mailbox.as_one(
            lambda level: self._tally.statistics(level.accepted, level.nbytes, wal_bytes, commit_ms)
        )
        return now

    def _run(self) -> None:
        me = get_ident()
        with self._starting:
            if self._over:  # whoever has started this thread was interrupted, and has given up
                return
            self._begun = True
        self._mailbox.worker_thread = me
        self._mailbox.never_waits.add(me)
        try:
            self._live()
        finally:
            # The system gives a thread's number to another one later.
            self._mailbox.worker_thread = None
            self._mailbox.never_waits.discard(me)

    def _live(self) -> None:
        if not self._open():
            return
        while not self._over:
            try:
                upkeep = self._upkeep  # another thread may poison the job at any moment
                self._mailbox.wait(None if upkeep is None else upkeep.pause())
                self.serve()
            except BaseException as error:  # thrown into this thread from outside
                settle_all(self._poison(error, "not applied", []))

    def _open(self) -> bool:
        try:
            self.store = store = self._open_store()
        except BaseException as error:
            self._not_opened(error)
            return False
        self.clock.not_before(store.status().latest_ms)
        self._upkeep = Upkeep(self._job_id, store, self._mailbox, self.clock)
        if store.reads_in_place:
            get, now_ms = store.get, self._now_ms
            # Where no row ends nobody needs the time.
            self._mailbox.get_in_place = lambda category, key: get(
                category, key, now_ms() if store.next_expiry_ms else 0
            )
            self._mailbox.read_in_place = self._read_in_place
            self._mailbox.write_in_place = self._write_in_place
        settle_all([(self.opened, None, None)])
        return True

    def _not_opened(self, error: BaseException) -> None:
        self._over = self._ended = True
        self._mailbox.shut(lambda: Closed(f"job {self._job_id!r} could not be opened"))
        answers: list[Answer] = [(self.opened, None, error), (self.closed, None, None)]
        settle_all(answers if self._retired is None else [*answers, (self._retired, None, None)])

    # -- one turn ------------------------------------------------------------------------------------------------

    def _serve_late(self) -> None:
        self.serve(patience=LATE_TURN_SECONDS_MAX)

    def serve(self, *, patience: float = 0.0) -> None:
        """Run one turn; with `patience`, wait so many seconds for it if somebody else has it."""
        if self._ended:
            return
        token = object()
        answers: list[Answer] = []
        group: Group | None = None
        again = False
        try:
            group = self._mailbox.take(token, patience=patience)
            if group is None:
                return
            again = bool(group)
            if group:
                answers = self._decide(group)
                group = []
            answers += self._tell_waiters()
            if self._mailbox.ended and not again:
                answers += self._end()
            elif self._retired is not None and not self._retired.done():
                answers += self._retire()
        except BaseException as error:
            # A defect, or an exception somebody has thrown into this thread: nobody may be left waiting for it.
            answers += self._poison(error, "unknown", group or [])
        finally:
            self._mailbox.give_back(token)
        settle_all(answers)
        self._look_after()
        if again and self._mailbox.ended:
            # Only now, with the last answers given: what nobody looked at is still to be raised by the closing.
            del answers
            self.serve(patience=patience)

    def _decide(self, group: Group) -> list[Answer]:
        if self._discards:
            closed = Closed(f"job {self._job_id!r} was closed without draining")
            return self._accounts.fail((group, closed, "not applied"))
        try:
            outcomes = self._apply(group)
        except Harm as harm:
            return self._poison(harm.cause, harm.outcome, group)
        return self._accounts.group(group, outcomes)

    def _apply(self, group: Group) -> list[Any]:
        """Have the store run a group, as often as it takes; raises `Harm` when there is no point in going on."""
        assert self.store is not None
        deadline = 0.0
        pause = RETRY_SECONDS_MIN
        while True:
            begun = perf_counter()
            try:
                outcomes = self.store.apply(group, self._now_ms())
            except OutcomeUnknown as error:
                raise Harm(error.__cause__ or error, "unknown") from error
            except Corrupt as error:
                raise Harm(error) from error
            except StorageError as error:
                if not deadline:
                    deadline = monotonic() + self._stall_timeout
                    self._tally.state = "stalled"
                    log.warning("job %r stalls: %s", self._job_id, error)
                if self._discards or monotonic() >= deadline:
                    raise Harm(error) from error
                self._hurry.wait(min(pause, max(0.0, deadline - monotonic())))
                pause = min(pause * 2, RETRY_SECONDS_MAX)
                continue
            if deadline:
                self._tally.state = "live"
                log.warning("job %r goes on", self._job_id)
            if writes(group):
                self._tally.commit(perf_counter() - begun)
            return outcomes

    def _read_in_place(self, message: Any) -> Reply[Any]:
        assert self.store is not None
        try:
            outcome = self.store.read(message, self._now_ms())
        except StorageError as error:
            return ready(error=error)
        return ready(error=outcome.error) if type(outcome) is Failed else ready(outcome)

    def _write_in_place(self, message: Any, ops: int) -> Reply[Any]:
        """Run one write request for a caller that holds the turn. Raises `StorageError` if nothing was applied."""
        assert self.store is not None
        begun, before = perf_counter(), self.store.status().last_version
        try:
            outcome = self.store.apply([None, message, None], self._now_ms())[0]
        except OutcomeUnknown as error:
            reply: Reply[Any] = pending(self._mailbox, reads=False)
            self._mailbox.as_one(lambda _level: None, taken=ops)
            settle_all(self._poison(error.__cause__ or error, "unknown", [None, message, reply]))
            return reply
        except StorageError:
            raise
        except BaseException:
            # An interrupt: whether the message was committed before it came, its version tells.
            if self.store.status().last_version != before:
                self._accounts.count(ops, 0, in_place=True)
            raise
        if type(outcome) is Failed:
            self._accounts.count(0, ops, in_place=True)
            reply = ready(error=outcome.error)
            self._accounts.watch(reply, message, outcome.error, "not applied")
            return reply
        if ops:
            self._tally.commit(perf_counter() - begun)
            self._accounts.count(ops, 0, in_place=True)
        self._after_write_in_place()
        if type(message) is Barrier:
            reply = new_reply()
            return fill(reply, self._accounts.flushed(reply))
        return ready(outcome)

    def _after_write_in_place(self) -> None:
        upkeep = self._upkeep
        if upkeep is not None and upkeep.checkpoint_due():
            # By the one who has the turn: a worker that was only rung might never get it beside a busy caller.
            settle_all(self._keep_up(upkeep.checkpoint))
        if self.waiters or (upkeep is not None and not upkeep.is_planned()):
            self._mailbox.ring()

    # -- between turns -------------------------------------------------------------------------------------------

    def _look_after(self) -> None:
        """Do what the job has to do for itself: in turns of their own, because nobody's answer should wait for it."""
        while (upkeep := self._upkeep) is not None:
            step = upkeep.next_step(reaps=not self._over)
            if step is None:
                return
            token = object()
            try:
                if not self._mailbox.hold(token):
                    return
                answers = self._keep_up(step) + self._tell_waiters()
            finally:
                self._mailbox.give_back(token)
            settle_all(answers)

    def _keep_up(self, step: Callable[[], None]) -> list[Answer]:
        try:
            step()
        except Harm as harm:
            return self._poison(harm.cause, harm.outcome, [])
        return []

    def _tell_waiters(self) -> list[Answer]:
        """Answer the requests that wait for changes, if there are some for them."""
        if not self.waiters or (store := self.store) is None:
            return []
        last_version = store.status().last_version
        return self.waiters.answer(lambda message: store.read(message, self._now_ms()), last_version)

    def _poison(self, cause: BaseException, outcome: str, group: Group) -> list[Answer]:
        """Refuse everything from now on; fail the group and all that waits behind it."""

        def refusal() -> Poisoned:
            poisoned = Poisoned(f"job {self._job_id!r} can't go on: {cause}")
            poisoned.__cause__ = cause
            return poisoned

        log.error("job %r is poisoned: %s", self._job_id, cause, exc_info=cause)
        self._tally.state = "poisoned"
        self._upkeep = None
        behind = self._mailbox.shut(refusal)
        answers = self.waiters.refuse(refusal())
        return answers + self._accounts.fail((group, refusal(), outcome), (behind, refusal(), "not applied"))

    def _end(self) -> list[Answer]:
        error: BaseException | None = None
        if self.store is not None:
            try:
                self.store.close(tidy=self._tally.state != "poisoned")
            except Exception as failure:
                log.exception("job %r: the store couldn't be closed in order", self._job_id)
                error = failure
            self.store = self._upkeep = None
        self._over = self._ended = True
        self._tally.state = "closed"
        answers = self.waiters.refuse(Closed(f"job {self._job_id!r} is closed"))
        answers.append((self.closed, None, self._failures.take() or error))
        return answers if self._retired is None else [*answers, (self._retired, None, None)]

    def _retire(self) -> list[Answer]:
        assert self._retired is not None
        # First the posters are told, then what came until then is run: beside one that never pauses it ends too.
        self._mailbox.unattend(self._serve_late)
        rest = self._mailbox.take_more()
        answers = self._decide(rest) if rest else []
        if self._upkeep is not None:
            self._upkeep.settle()
        self._over = True
        answers += self.waiters.refuse(Closed(f"job {self._job_id!r} ends with the interpreter"))
        return [*answers, (self._retired, None, None)]
