"""The accounts: what became of every operation of a group, and who has to be told.

Rules:
  1. An operation is counted once, as committed or as failed, in one step with its leaving the mailbox's level.
  2. A failed event goes to the failure log; a failed request to its reply.
  3. A request for changes that aren't there yet goes to the waiters.
  4. A flush gives what failed before it, and not what failed behind it in the same group.

Doesn't know: the store, threads, how a group was run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from persistency.actor.failures import FailureLog
from persistency.actor.mailbox import Mailbox
from persistency.actor.reply import Reply
from persistency.actor.settling import Answer, tell_if_unseen
from persistency.actor.tally import Tally
from persistency.actor.waiters import Waiters
from persistency.errors import Failure, PersistencyError, WriteFailed
from persistency.storage.port import PLACES, Barrier, Failed, GetRow, Group, ListChanges, SetRow, operations

NameOps = Callable[[Any, Any, Any], tuple[Any, ...]]


class Accounts:
    """The books of one worker. `name_ops` turns a message back into the operations its caller posted."""

    def __init__(
        self, tally: Tally, failures: FailureLog, mailbox: Mailbox, waiters: Waiters, name_ops: NameOps
    ) -> None:
        self._tally = tally
        self._failures = failures
        self._mailbox = mailbox
        self._waiters = waiters
        self._name_ops = name_ops

    def group(self, group: Group, outcomes: list[Any], answers: list[Answer]) -> None:
        """Count what became of a group, keep the failures of events, add the answers of requests."""
        if len(group) == PLACES and type(group[1]) is GetRow and type(outcomes[0]) is not Failed:
            answers.append((group[2], outcomes[0], None))  # a lone read is no operation: there is nothing to count
            self._mailbox.in_hand = []
            return
        if Failed not in map(type, outcomes) and (
            None not in group[::PLACES] or set(map(type, group[1::PLACES])) == {SetRow}
        ):
            self._enter(len(outcomes), 0, [], answers)
            return
        told, committed, failed = self._tell(group, outcomes, "not applied")
        self._enter(committed, failed, told, answers)

    def _tell(self, group: Group, outcomes: list[Any], outcome: str) -> tuple[list[Answer], int, int]:
        """Keep the failures of events; return the answers of requests, and how many operations went well, and not."""
        answers: list[Answer] = []
        failed_events: list[Failure] = []
        committed = failed = 0
        for at, result in enumerate(outcomes):
            category, message, reply = group[at * PLACES : (at + 1) * PLACES]
            ops = 1 if category is not None else operations(message)
            if type(result) is Failed:
                failed += ops
                if category is not None or reply is None:
                    ops_named = self._name_ops(category, message, reply)
                    failed_events += (Failure(op, result.error, outcome) for op in ops_named)
                else:
                    self.watch(reply, message, result.error, outcome)
                    answers.append((reply, None, result.error))
                continue
            committed += ops
            if category is None and reply is not None:
                if type(message) is Barrier:
                    self._failures.record(failed_events)
                    failed_events = []
                    answers.append((reply, None, self.flushed(reply)))
                elif type(message) is ListChanges and message.wait and not result:
                    refused = self._waiters.park(message, reply)
                    answers += [] if refused is None else [(reply, None, refused)]
                else:
                    answers.append((reply, result, None))
        self._failures.record(failed_events)
        return answers, committed, failed

    def watch(self, reply: Reply[Any], message: Any, error: BaseException, outcome: str) -> None:
        """See that a failed request is told of, if its reply is dropped with nobody having looked."""
        named = [Failure(op, error, outcome) for op in self._name_ops(None, message, None)]
        if named:
            tell_if_unseen(reply, error, lambda _error: self._failures.report(named))

    def flushed(self, reply: Reply[Any]) -> WriteFailed | None:
        """Return what a flush has to raise; if its reply is dropped unseen, the next one has to."""
        failed = self._failures.take()
        if failed is not None:
            tell_if_unseen(reply, failed, lambda _error: self._failures.put_back(failed))
        return failed

    def count(self, committed: int, failed: int, *, in_place: bool = False) -> None:
        """Count operations as decided; those of a write `in_place` are accepted at the same moment."""
        self._mailbox.as_one(self._tally.decided, committed + failed if in_place else 0, committed, failed)

    def fail(self, groups: Iterable[tuple[Group, PersistencyError, str]], answers: list[Answer]) -> None:
        """Fail groups whole, each with its error and outcome, as one step for whoever looks at the numbers."""
        everybody: list[Answer] = []
        failed = 0
        for group, error, outcome in groups:
            told, _, ops = self._tell(group, [Failed(error)] * (len(group) // PLACES), outcome)
            everybody += told
            failed += ops
        self._enter(0, failed, everybody, answers)

    def _enter(self, committed: int, failed: int, told: list[Answer], answers: list[Answer]) -> None:
        """Count what was in hand, and have it answered: both, or neither, whatever is thrown into this thread."""

        def enter() -> None:
            into = answers
            self._tally.decided(committed, failed)
            into += told
            self._mailbox.in_hand = []

        self._mailbox.as_one(enter, 0)
