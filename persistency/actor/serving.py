"""Serving: what is done in a turn of one job, by whoever takes it.

The store is opened by the first turn there is anything for; it is closed by the one that finds the mailbox closed and
empty, or that it is time to rest.

Rules:
  1. Every reply that was taken is settled, whatever happens in the turn.
  2. Only the holder of the turn touches the store.

Doesn't know: threads that come and go, SQL, keys, files, which engine the store is, how many workers there may be.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import get_ident

from persistency.actor.accounts import Accounts, NameOps
from persistency.actor.activation import Activation
from persistency.actor.clock import Clock
from persistency.actor.failures import FailureLog
from persistency.actor.mailbox import Mailbox
from persistency.actor.reply import Reply
from persistency.actor.settling import Answer, Debts, pending, settle_all, tell_if_unseen
from persistency.actor.slot import Slot
from persistency.actor.tally import Statistics, Tally
from persistency.actor.turns import Harm, Turns, nothing
from persistency.actor.waiters import Waiters
from persistency.errors import Closed, PersistencyError
from persistency.storage.port import PLACES, Barrier, Failed, Group, Store, writes

# So long a late poster waits for another one's turn: a thread frozen in the middle of it never gives it back.
LATE_TURN_SECONDS_MAX = 5.0


class Serving:
    """The turns of one job; see `persistency.actor.worker` for what it is made with."""

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
        self.waiters: Waiters = Waiters(waiters_max, mailbox.waits_for_itself)
        self._retired: Reply[None] | None = None
        self._patience: float | None = None  # for others, in seconds, when it is retired
        self._job_id = job_id
        self.mailbox = mailbox
        self._tally = Tally()
        self._failures = failures
        self._accounts = Accounts(self._tally, failures, mailbox, self.waiters, name_ops)
        self.turns: Turns = Turns(job_id, mailbox, self._accounts, self.waiters, self._tally, clock, stall_timeout)
        self.turns.written = self._after_write_in_place
        self.activation: Activation = Activation(
            job_id, mailbox, self.turns, self._tally, self.waiters, clock, open_store, sync_interval, slot
        )
        self._slot = slot
        self.ended: Callable[[], object] = nothing  # called when the store is closed for good
        self._resting = False  # without a store and a thread, until somebody posts
        self._over = False  # the thread has nothing left to do
        self._ended = False  # the store is closed, for good
        self._debts = Debts()

    @property
    def store(self) -> Store | None:
        """The store, while it is open."""
        return self.turns.store

    @property
    def looks_idle(self) -> bool:
        """Whether it could rest."""
        return self.activation.looks_idle and self.opened.done()

    def statistics(self) -> Statistics:
        """Return the numbers of this instant."""
        status = None if (store := self.store) is None else store.status()
        commit_ms, numbers = self._tally.percentiles(), self._tally.statistics

        def count() -> Statistics:
            level = self.mailbox.level()
            return numbers(level.accepted, level.nbytes, status, commit_ms)

        return self.mailbox.as_one(count, 0)

    def _fail(self, cause: BaseException, answers: list[Answer]) -> None:
        """Poison the job for a defect, or what somebody has thrown into this thread: nobody may be left waiting."""
        # Of one that is closed, with nothing in hand, nothing can be harmed: its closing is gone on with.
        if not self._ended and (self.mailbox.in_hand or not self.mailbox.ended):
            self.turns.poison(cause, "unknown", answers)
        if not self.opened.done():
            self._not_opened(cause, answers)

    def _not_opened(self, error: BaseException, answers: list[Answer]) -> None:
        """Tell that the store couldn't be opened; a job that has been open before is tried again by the next post."""
        self.activation.end(tidy=False)
        if self.opened.done():
            for group in self.mailbox.in_hand:
                outcomes = [None if type(message) is Barrier else Failed(error) for message in group[1::PLACES]]
                self._accounts.group(group, outcomes, answers)
            self._resting = not self.mailbox.ended
            if not self._resting:
                self._end(answers)
            return
        closed = Closed(f"job {self._job_id!r} could not be opened")
        self.mailbox.shut(lambda: closed)
        self._accounts.fail([(group, closed, "not applied") for group in self.mailbox.in_hand], answers)
        self.ended()
        answers += [(self.opened, None, error), *self._last_answers(None)]
        self._over = self._ended = True
        self._let_go()

    # -- one turn ------------------------------------------------------------------------------------------------

    def _serve_late(self) -> None:
        self.serve(patience=LATE_TURN_SECONDS_MAX)

    def serve(self, *, patience: float = 0.0) -> None:
        """Run one turn; with `patience`, wait so many seconds for it if somebody else has it."""
        again = True
        while again and not self._ended:
            taken: list[Group] = []
            if not self._in_turn(partial(self._turn, taken), patience):
                return
            upkeep = self.activation.upkeep
            while upkeep is not None and not self.turns.poisoned and (step := upkeep.next_step(reaps=not self._over)):
                if not self._in_turn(partial(upkeep.step, step, self.turns)):
                    return
            # Only now, with the last answers given: what nobody looked at is still to be raised by the closing.
            again = bool(taken) and self.mailbox.ended

    def _in_turn(self, act: Callable[[list[Answer]], object], patience: float = 0.0) -> bool:
        """Take the turn, act, give it back, and only then settle what is answered; return whether it was free."""
        token = object()
        answers: list[Answer] = []
        try:
            if not self.mailbox.hold(token, patience):
                return False
            act(answers)
        except BaseException as error:
            mine = self.mailbox.worker_thread == get_ident()
            if mine or self.mailbox.is_held_by(token):
                self._fail(error, answers)
            if not mine:
                raise  # a caller's Ctrl-C
        finally:
            try:
                self.mailbox.give_back(token)
                self._debts.pay(answers)
            except BaseException:  # thrown into this thread; nobody else would do it
                self.mailbox.give_back(token)
                self.mailbox.ring()
                self._debts.pay(answers)
                raise
        return True

    def _turn(self, taken: list[Group], answers: list[Answer]) -> None:
        if self.mailbox.crowded:
            self.turns.prepare()
        group = self.mailbox.take(answers_ring=True)
        if group:
            taken.append(group)
        wanted = self.store is None and (group or not self.opened.done()) and not self.turns.poisoned
        if wanted and not self._begin(group, answers):
            return
        if group:
            if self._slot is not None:
                self._slot.decline()
            self.turns.decide(group, answers)
        self.turns.tell_waiters(answers)
        if self.mailbox.has_ended:
            self.mailbox.close(lambda: Closed(f"job {self._job_id!r} was temporary, and its time is over"))
        self._after(answers, worked=bool(group))

    def _begin(self, group: Group, answers: list[Answer]) -> bool:
        """Open the store; return whether that went well. What was accepted already isn't skipped for a fault."""
        try:
            if not group and self.mailbox.ended:
                raise Closed(f"job {self._job_id!r} was closed before it was open")
            if self.opened.done() and writes(group):
                self.turns.insist(self.activation.begin)
            else:
                self.activation.begin()
        except Harm as harm:
            self.turns.poison(harm.cause, "not applied", answers)
            return False
        except Exception as error:
            if self.opened.done() and not isinstance(error, PersistencyError):
                raise  # a defect, or thrown into this thread: `_in_turn` knows what to do
            self._not_opened(error, answers)
            return False
        if not self.opened.done():
            settle_all([(self.opened, None, None)])
        return True

    def _after(self, answers: list[Answer], *, worked: bool) -> None:
        """End, rest, or go on, with nothing left in hand."""
        if self.mailbox.ended and not worked:
            self._end(answers)
        elif self._retired is not None and not self._retired.done():
            self._retire(answers)
        elif not (worked or self._over) and self._retired is None and self.opened.done() and self.activation.may_rest():
            self._tally.state = "idle"  # first: who gets the slot may look at once
            if (lost := self.activation.end()) is not None:
                self.turns.poison(lost, "not applied", answers)
            self._resting = lost is None
        elif self._slot is not None and self._over:  # late posts to many jobs mustn't keep all of their files open
            self.activation.end()
        elif self.store is None and self._slot is not None:  # woken for nothing
            self._resting = True
            self._slot.give_back()

    def _after_write_in_place(self) -> None:
        upkeep = self.activation.upkeep
        if upkeep is not None and upkeep.checkpoint_due():
            upkeep.carry_over(self.turns)
        if self.waiters or (upkeep is not None and not upkeep.is_planned()):
            self.mailbox.ring()

    def _end(self, answers: list[Answer]) -> None:
        error = self.activation.end(tidy=not self.turns.poisoned)
        self._tally.state = "closed"
        self.waiters.refuse(Closed(f"job {self._job_id!r} is closed"), answers)
        self.ended()
        answers += self._last_answers(self._failures.take() or error)
        self._over = self._ended = True
        self._let_go()

    def _let_go(self) -> None:
        """Have nobody refer to this any more but who has asked: so it is freed with the last handle, at once."""
        self.ended = self.turns.written = nothing
        self.mailbox.unattend(nothing)

    def _last_answers(self, error: BaseException | None) -> list[Answer]:
        if error is not None:
            tell_if_unseen(self.closed, error, lambda _error: None)  # so that a later `close` knows whether anybody has
        closed: Answer = (self.closed, None, error)
        return [closed] if self._retired is None else [closed, (self._retired, None, None)]

    def _retire(self, answers: list[Answer]) -> None:
        assert self._retired is not None
        self.mailbox.unattend(self._serve_late)  # first, for beside one who never pauses it has to end, too
        rest = self.mailbox.take()
        if rest and (self.store is not None or self._begin(rest, answers)):
            self.turns.decide(rest, answers)
        if self.activation.upkeep is not None and not self.turns.poisoned:
            self.activation.upkeep.settle(self._patience)
        self.waiters.refuse(Closed(f"job {self._job_id!r} ends with the interpreter"), answers)
        answers.append((self._retired, None, None))
        self._over = True
