"""Turns: what is done with the store by whoever has the turn, and what is answered for it.

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
  2. Only the holder of the turn calls anything here.

Doesn't know: threads that come and go, SQL, keys, files, which engine the store is.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any, TypeVar, cast

from persistency.actor.accounts import Accounts
from persistency.actor.clock import Clock
from persistency.actor.mailbox import Mailbox
from persistency.actor.reply import Reply
from persistency.actor.settling import Answer, fill, new_reply, pending, ready, settle_all
from persistency.actor.tally import Tally
from persistency.actor.waiters import Waiters
from persistency.errors import Closed, Corrupt, LeaseLost, Poisoned, StorageError
from persistency.logfields import about
from persistency.storage.port import (
    Barrier,
    Failed,
    Group,
    OutcomeUnknown,
    PointReading,
    Prefetching,
    Preparing,
    Store,
    writes,
)

if TYPE_CHECKING:
    from persistency.actor.slowness import Slowness

log: logging.Logger = logging.getLogger("persistency")

T = TypeVar("T")

RETRY_SECONDS_MIN = 0.05
RETRY_SECONDS_MAX = 1.0


def nothing() -> None:
    """Do nothing, for whom nobody has to be told."""


class Harm(Exception):
    """What poisons a job. `cause` is why, `outcome` what became of the group in hand."""

    def __init__(self, cause: BaseException, outcome: str = "not applied") -> None:
        super().__init__(cause, outcome)
        self.cause = cause
        self.outcome = outcome


class Turns:
    """Runs what is asked of one job against its store. `written` is called after a write in place."""

    def __init__(
        self,
        job_id: str,
        mailbox: Mailbox,
        accounts: Accounts,
        waiters: Waiters,
        tally: Tally,
        clock: Clock,
        stall_timeout: float,
    ) -> None:
        self.slow: Slowness | None = None  # set before a store is opened, where somebody wants to be told
        self.store: Store | None = None
        self._ends_ms: int | None = None
        self._doubtful = False  # the group in hand has failed at its commit: its bytes may be there all the same
        self.used_at: float = monotonic()
        self._hurry: threading.Event | None = None  # made by the first stall; set: don't wait for what stalls
        self.discards: bool = False
        self.written: Callable[[], None] = nothing
        self._job_id = job_id
        self._mailbox = mailbox
        self._accounts = accounts
        self._waiters = waiters
        self._tally = tally
        self._now_ms = clock.now_ms
        self._look_ms = clock.look_ms
        self._stall_timeout = stall_timeout

    @property
    def poisoned(self) -> bool:
        """Whether nothing more will be done."""
        return self._tally.state == "poisoned"

    def serve_in_place(self, store: Store, *, notes_use: bool) -> None:
        """Have callers answered in place, if the store's reads are cheap enough."""
        self.store = store
        self._ends_ms = store.expires_ms
        if store.expires_ms is not None:
            self._mailbox.end_by(self._check_time)
        if not store.reads_in_place:
            self._mailbox.serve_ahead(store.prefetch if isinstance(store, Prefetching) else None)
            return
        get = self._point_read(store)

        def get_and_note(category: bytes, key: bytes) -> bytes | None:
            self.used_at = monotonic()
            if store.expires_ms is not None:
                self._check_time()
            return get(category, key)

        chosen = get_and_note if notes_use or store.expires_ms is not None else get
        slow = self.slow
        if slow is None:
            self._mailbox.serve_in_place(chosen, self._read_in_place, self._write_in_place)
        else:
            self._mailbox.serve_in_place(
                slow.get(chosen), slow.request(self._read_in_place), slow.request(self._write_in_place)
            )

    def _point_read(self, store: Store) -> Callable[[bytes, bytes], bytes | None]:
        now_ms = self._now_ms
        if hasattr(store, "point_read"):  # by name: to ask for a protocol takes longer than all the rest of this
            return cast(PointReading, store).point_read(now_ms)
        # Where no row ends nobody needs the time.
        return lambda category, key: store.get(category, key, now_ms() if store.next_expiry_ms else 0)

    @property
    def time_left_ms(self) -> int | None:
        """How long the job has still got; `None`: for ever."""
        return None if self._ends_ms is None else self._ends_ms - self._look_ms()

    def _check_time(self) -> None:
        """Raise `Closed` if the job's time is over."""
        if self._ends_ms is not None and self._ends_ms <= self._look_ms():
            raise Closed(f"job {self._job_id!r} was temporary, and its time is over")

    def discard(self) -> None:
        """From now on fail what is to be run, and wait for nothing that stalls."""
        self.discards = True  # first: who begins to wait meanwhile looks once more
        if self._hurry is not None:
            self._hurry.set()

    def prepare(self) -> None:
        """Have the store begin with a group of many that is about to be taken."""
        store = self.store
        if not (store is None or self.discards or self.poisoned) and hasattr(store, "prepare"):
            cast(Preparing, store).prepare()

    def decide(self, group: Group, answers: list[Answer]) -> None:
        """Run a group; add what is to be answered."""
        self.used_at = begun = monotonic()
        slow, waited = self.slow, 0.0
        if slow is not None:
            waited = self._mailbox.waited(begun)
        if self.discards:
            closed = Closed(f"job {self._job_id!r} was closed without draining")
            self._accounts.fail([(group, closed, "not applied")], answers)
            return
        try:
            outcomes = self._apply(group)
        except Harm as harm:
            self.poison(harm.cause, harm.outcome, answers)
            return
        self._accounts.group(group, outcomes, answers)
        if slow is not None and (seconds := monotonic() - begun) >= slow.after:
            slow.group(group, seconds, waited)

    def _apply(self, group: Group) -> list[Any]:
        """Have the store run a group, as often as it takes; raises `Harm` when there is no point in going on."""
        store, begun = self.store, 0.0
        assert store is not None

        def attempt() -> list[Any]:
            nonlocal begun
            begun = perf_counter()
            return store.apply(group, self._now_ms())

        outcomes = self.insist(attempt)
        if writes(group):
            self._tally.commit(perf_counter() - begun)
        return outcomes

    def insist(self, attempt: Callable[[], T]) -> T:
        """Have something done in spite of the environment's faults: the job stalls until it is, in order.

        Raises `Harm` when there is no point in going on; `JobLocked` and `Closed` as they come.
        """
        deadline = 0.0
        pause = RETRY_SECONDS_MIN
        while True:
            try:
                outcome = attempt()
            except OutcomeUnknown as error:
                raise Harm(error.__cause__ or error, "unknown") from error
            except (Corrupt, LeaseLost) as error:
                raise Harm(error, "unknown" if self._doubtful else "not applied") from error
            except StorageError as error:
                if not deadline:
                    deadline = monotonic() + self._stall_timeout
                    self._tally.state = "stalled"
                    fields = about("job_stalls", self._job_id, error)
                    log.warning("job %r stalls: %s", self._job_id, error, extra=fields)
                self._doubtful |= error.at_commit
                hurry = self._hurry = self._hurry or threading.Event()
                if self.discards or monotonic() >= deadline:
                    raise Harm(error, "unknown" if self._doubtful else "not applied") from error
                hurry.wait(min(pause, max(0.0, deadline - monotonic())))
                pause = min(pause * 2, RETRY_SECONDS_MAX)
                continue
            self._doubtful = False
            if deadline:
                self._tally.state = "live"
                log.warning("job %r goes on", self._job_id, extra=about("job_goes_on", self._job_id))
            return outcome

    def tell_waiters(self, answers: list[Answer]) -> None:
        """Answer the requests that wait for changes, if there are some for them."""
        if self._waiters and (store := self.store) is not None:
            self._waiters.answer(lambda message: store.read(message, self._now_ms()), store.last_version, answers)

    def poison(self, cause: BaseException, outcome: str, answers: list[Answer]) -> None:
        """Refuse everything from now on; fail what is in hand, with this outcome, and all that waits behind it."""

        def refusal() -> Poisoned:
            poisoned = Poisoned(f"job {self._job_id!r} can't go on: {cause}")
            poisoned.__cause__ = cause
            return poisoned

        fields = about("job_poisoned", self._job_id, cause, outcome=outcome)
        log.error("job %r is poisoned: %s", self._job_id, cause, exc_info=cause, extra=fields)
        self._tally.state = "poisoned"
        begun = len(self._mailbox.in_hand)
        self._mailbox.shut(refusal)
        self._waiters.refuse(refusal(), answers)
        taken = enumerate(self._mailbox.in_hand)
        self._accounts.fail(
            [(group, refusal(), outcome if at < begun else "not applied") for at, group in taken], answers
        )

    # -- in place: in the caller's thread, which has the turn ------------------------------------------------------

    def _read_in_place(self, message: Any) -> Reply[Any]:
        assert self.store is not None
        self._check_time()
        self.used_at = monotonic()
        try:
            outcome = self.store.read(message, self._now_ms())
        except StorageError as error:
            return ready(error=error)
        return ready(error=outcome.error) if type(outcome) is Failed else ready(outcome)

    def _write_in_place(self, message: Any, ops: int) -> Reply[Any]:
        """Run one write request for a caller that holds the turn. Raises `StorageError` if nothing was applied."""
        store = self.store  # in a child forked by the function that is run here, there is none afterwards
        assert store is not None
        self._check_time()
        self.used_at = monotonic()
        begun, before = perf_counter(), store.last_version
        try:
            outcome = store.apply([None, message, None], self._now_ms())[0]
        except OutcomeUnknown as error:
            reply: Reply[Any] = pending(self._mailbox, reads=False)
            self._mailbox.as_one(self._tally.decided, ops, 0, 0)
            self._mailbox.in_hand = [[None, message, reply]]
            answers: list[Answer] = []
            self.poison(error.__cause__ or error, "unknown", answers)
            settle_all(answers)
            return reply
        except StorageError as error:
            self._doubtful |= error.at_commit
            raise
        except BaseException:
            # An interrupt: whether the message was committed before it came, its version tells.
            if store.last_version != before:
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
        self.written()
        if type(message) is Barrier:
            reply = new_reply()
            return fill(reply, self._accounts.flushed(reply))
        return ready(outcome)
