"""A message of a queue, as whoever has taken it sees it, and a dead letter.

Rules:
  1. A value is decoded when it is asked for: one that can't be is a failed attempt of its own message alone.
  2. What a message is told (`ack`, `retry`, ...) is one transaction that shows the token of its taking, and answers
     `False` where that isn't the present one.
  3. As a context a message is acknowledged at the end, tried again after an exception, and given back uncounted where
     its consumer is being stopped (`CancelledError`, `KeyboardInterrupt`); that waits for nothing.

Doesn't know: the rows of a queue, what a value means.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from persistency import Codec, Misuse, PersistencyError, QuotaExceeded, Reply, Transaction
from persistency.logfields import about
from persistency.recipes.queue_alive import KeptAlive
from persistency.recipes.queue_records import ERROR_ROOM, Stored
from persistency.recipes.queue_rows import Rows
from persistency.recipes.runner import Runner, check_transaction
from persistency.recipes.waiting import unanswered

log: logging.Logger = logging.getLogger("persistency.recipes")

T = TypeVar("T")

_ERROR_CHARACTERS_MAX = 1_000
_MS_MAX = 10_000_000_000_000  # some 317 years


def as_ms(value: Any, argument: str, *, above: bool = False) -> int:
    """Return seconds, or a `timedelta`, as milliseconds. Raises `Misuse`."""
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise Misuse(f"{argument} must be seconds or a timedelta, not {type(value).__name__}")
    if not 0 <= seconds <= _MS_MAX / 1000 or (above and seconds == 0):  # NaN too
        raise Misuse(f"{argument} must be {'more than 0' if above else '0 or more'} seconds, not {value!r:.40}")
    return max(1 if seconds else 0, round(seconds * 1000))


class Desk(NamedTuple):
    """Where messages are dealt with: a queue's runner, its rows and its codec."""

    runner: Runner
    rows: Rows
    codec: Codec[Any]


class Letter(Generic[T]):
    """What a message and a dead letter have in common."""

    __slots__ = ("_body", "_desk", "_value", "attempt", "error", "id", "put_ms")

    def __init__(self, desk: Desk, stored: Stored) -> None:
        self._desk = desk
        self._body: bytes | None = stored.body
        self._value: Any = None
        self.id: int = stored.id
        self.attempt: int = stored.state.attempt
        self.error: str | None = stored.state.error
        self.put_ms: int = stored.state.put_ms

    @property
    def value(self) -> T:
        """What was put. Raises `Corrupt` if it isn't what the queue's codec reads."""
        if self._body is not None:
            self._value = self._desk.codec.decode(self._body)
            self._body = None
        return self._value  # type: ignore[no-any-return]  # what the codec made of it


class DeadLetter(Letter[T]):
    """A message that was given up. `died_ms`: since when, in Unix milliseconds; `error`: why."""

    __slots__ = ("died_ms",)

    def __init__(self, desk: Desk, stored: Stored) -> None:
        super().__init__(desk, stored)
        self.died_ms: int = stored.state.when_ms

    def __repr__(self) -> str:
        return f"<DeadLetter {self.id} after {self.attempt} attempts: {self.error}>"


class Message(Letter[T]):
    """A message that was taken: it is this consumer's until its lease ends.

    `id`; `value`; `attempt`, 1 for the first; `error`, why the last attempt failed; `put_ms`, when it was put, and
    `until_ms`, when the lease ends as far as this object knows, in Unix milliseconds.

    The verbs answer whether it still was this consumer's; `False` means that the lease was over and the message is in
    line again, or somebody else's, and that nothing was done. `with message:`, and `async with`, acknowledge it at the
    end of the block; after an exception, which is passed on, they have it tried again. A block that has told the
    message something itself is left at that.
    """

    __slots__ = ("_lease_ms", "_token", "_told", "_told_in", "lost", "until_ms")

    def __init__(self, desk: Desk, stored: Stored, lease_ms: int) -> None:
        super().__init__(desk, stored)
        self._lease_ms = lease_ms
        self._token = stored.state.token
        self._told = False
        self._told_in = False  # by a transaction that may have been undone
        self.until_ms: int = stored.state.when_ms
        self.lost: bool = False
        """Whether it is known that the lease was lost: a verb has said so, or a renewal by `keep_alive`."""

    def ack(self) -> Reply[bool]:
        """Say that it is done: it is deleted."""
        return self._tell(self._desk.rows.ack)

    def ack_in(self, tx: Transaction) -> bool:
        """Say so in a transaction of one's own, on the same job: what it writes and this are done both or neither.

        Returns `False` if the lease was lost; raise then, to have the rest undone.
        """
        check_transaction(tx, self._desk.runner)
        held = self._desk.rows.ack(tx, self.id, self._token)
        self._told_in = self._told_in or held  # only then is its later absence its own doing
        return self._noted(held)

    def retry(self, *, delay: float | timedelta | None = None, error: str | None = None) -> Reply[bool]:
        """Have it tried again after `delay`, or else the queue's backoff; after its last attempt it is dead."""
        delay_ms = None if delay is None else as_ms(delay, "delay")
        return self._tell_why(self._desk.rows.retry, _as_error(error), delay_ms)

    def release(self) -> Reply[bool]:
        """Give it back to where it was in line, as if it had not been taken: the attempt doesn't count."""
        return self._tell(self._desk.rows.release)

    def bury(self, error: str | None = None) -> Reply[bool]:
        """Make it a dead letter at once: trying again is of no use."""
        return self._tell_why(self._desk.rows.bury, _as_error(error))

    def extend(self, lease: float | timedelta | None = None) -> Reply[bool]:
        """Let the lease end so long from now (without: as long as it was taken for)."""
        lease_ms = self._lease_ms if lease is None else as_ms(lease, "lease", above=True)
        rows = self._desk.rows
        return self._desk.runner.run(rows.extend, self.id, self._token, lease_ms).map(self._extended)

    def keep_alive(self, lease: float | timedelta | None = None) -> KeptAlive:
        """Return a context in which the lease is renewed: `with message.keep_alive():`, in async functions too.

        A thread that all messages of the process share renews it. `lost` says if that came too late.
        """
        lease_ms = self._lease_ms if lease is None else as_ms(lease, "lease", above=True)

        def renew() -> Reply[bool] | None:
            return None if self._told else self.extend(lease_ms / 1000)

        return KeptAlive(self._desk.runner.id, lease_ms / 1000, renew, self._lose)

    def _tell(self, verb: Any, *args: Any) -> Reply[bool]:
        before, self._told = self._told, True  # first: a renewal that comes behind it finds nothing
        try:
            reply: Reply[bool] = self._desk.runner.run(verb, self.id, self._token, *args)
        except BaseException:
            self._told = before
            raise
        return reply.map(self._noted)

    def _tell_why(self, verb: Any, error: str | None, *args: Any) -> Reply[bool]:
        """Tell it something with the text of an error, or as much of it as the job has room for."""
        told = self._tell(verb, *args, error)
        if error is None or len(error.encode()) <= ERROR_ROOM:
            return told
        future, reply = unanswered()

        def settle(done: Any) -> None:
            failed = done.exception()
            if failed is None:
                future.set_result(done.result())
            else:
                future.set_exception(failed)

        def settle_or_shorten(done: Any) -> None:
            if not isinstance(done.exception(), QuotaExceeded):
                settle(done)
                return
            short = error.encode()[:ERROR_ROOM].decode(errors="ignore")
            try:
                self._tell(verb, *args, short).add_done_callback(settle)
            except BaseException as failed:
                future.set_exception(failed)

        told.add_done_callback(settle_or_shorten)
        return reply

    def _noted(self, held: bool) -> bool:
        # After `ack_in` it may be gone because of that: what `ack_in` itself has found is what is known.
        self.lost = self.lost or not (held or self._told_in)
        return held

    def _lose(self) -> None:
        self.lost = self.lost or not (self._told or self._told_in)

    def _extended(self, until_ms: int | None) -> bool:
        if until_ms is not None:
            self.until_ms = until_ms
        else:
            self.lost = self.lost or not (self._told or self._told_in)
        return until_ms is not None

    # -- as a context --------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reply = self._ended(error)
        if reply is not None:
            try:
                self._warn(reply.result())
            except PersistencyError as failed:
                self._not_told(error, failed)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        reply = self._ended(error)
        if reply is not None:
            try:
                self._warn(await reply)
            except PersistencyError as failed:
                self._not_told(error, failed)

    def _ended(self, error: BaseException | None) -> Reply[bool] | None:
        """Tell what came of the block, unless it has told that itself; return the reply to wait for."""
        if self._told:
            return None
        if error is None:
            return self.ack()
        if isinstance(error, Exception):
            try:
                return self.retry(error=_text_of(error))
            except PersistencyError as failed:
                self._not_told(error, failed)
                return None
        with suppress(PersistencyError):  # its lease ends by itself
            self.release()
        return None

    def _warn(self, held: bool) -> None:
        if not held and not self._told_in:
            name = self._desk.rows.category
            fields = about("message_lost", self._desk.runner.id, queue=name, message=self.id)
            log.warning("queue %r: message %d took longer than its lease", name, self.id, extra=fields)

    def _not_told(self, error: BaseException | None, failed: PersistencyError) -> None:
        """Pass on what went wrong in the block rather than what went wrong after it."""
        if error is None:
            raise failed
        name = self._desk.rows.category
        fields = about("message_not_told", self._desk.runner.id, failed, queue=name, message=self.id)
        log.error("queue %r: message %d comes again after its lease: %s", name, self.id, failed, extra=fields)

    def __repr__(self) -> str:
        return f"<Message {self.id}, attempt {self.attempt}{' (lost)' if self.lost else ''}>"


def _text_of(error: Exception) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except Exception:  # its text fails in turn: the one that it stands for counts
        return type(error).__name__


def _as_error(error: Any) -> str | None:
    if error is not None and not isinstance(error, str):
        raise Misuse(f"error must be a str, not {type(error).__name__}: pass a few words, or repr(error)")
    # What UTF-8 can't hold isn't kept: it is about to be stored.
    return None if error is None else error[:_ERROR_CHARACTERS_MAX].encode(errors="replace").decode()
