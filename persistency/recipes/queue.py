"""The queue: first in, first out, or delayed; with acknowledgement, retries and dead letters.

Rules:
  1. A message is delivered until somebody acknowledges it or it has failed too often: at least once, and exactly once
     for effects that are written in the transaction of `ack_in`. What was acknowledged is never delivered again.
  2. Every verb is one transaction, whose cost doesn't grow with the queue.
  3. In the process that has the job nobody polls: who waits is woken by whoever puts, or when something is due. One of
     those who wait watches the clock for all of them; of several messages that come each wakes one of them.
     While something is due it looks again every few seconds, as a clock may be set.
  4. What somebody has taken who has given up waiting goes back to its place in line.

Doesn't know: how its rows look, how a job is run.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from time import monotonic
from typing import Any, Generic, NamedTuple, Self, TypeVar

from persistency import CBOR, Closed, Codec, Misuse, PersistencyError, Reply, Transaction
from persistency.recipes.queue_message import DeadLetter, Desk, Message, as_ms
from persistency.recipes.queue_records import Stored, Terms
from persistency.recipes.queue_rows import Rows
from persistency.recipes.runner import Runner, as_runner, check_transaction, poll_of
from persistency.recipes.waiting import Nap, Steps, adrive, bell_of, drive

__all__ = ["DeadLetter", "Message", "Queue", "QueueCounts"]

T = TypeVar("T")

_NAME_BYTES_MAX = 255
_BATCH_MAX = 10_000
# Who watches the clock looks so often whether the job was closed, or has failed: at its numbers, not at its rows.
_STATE_LOOK_S = 1.0
# While something is due it looks so often at the rows: the job's clock may jump, and the machine may have slept.
_DUE_LOOK_S = 5.0
_POLLS_TO_SLOW = 16  # the first look at what other processes do comes so much earlier than the later ones


class QueueCounts(NamedTuple):
    """How many messages are ready, delayed, taken, and dead letters."""

    ready: int
    delayed: int
    taken: int
    dead: int


class Queue(Generic[T]):
    """A durable queue in a job, or in a `Baton`.

    `name`: the category its rows are in. `lease`: how many seconds, or a `timedelta`, a consumer has for a message
    before it is delivered again. `attempts_max`: after so many failed attempts a message is a dead letter. `backoff`:
    how long it waits after the first one, twice as long after each, up to `backoff_max`. `codec`: how values are stored
    (`CBOR`, `RAW`, `typed(cls)`). Each `Queue` object goes by its own; with a message that is taken its
    taker's `attempts_max` is stored, for whoever sees the lease end.

    Any thread and any event loop may use it. `close` ends the loops over this object, and nothing else.
    """

    def __init__(
        self,
        runner: Runner,
        name: str = "queue",
        *,
        lease: float | timedelta = 30.0,
        attempts_max: int = 5,
        backoff: float | timedelta = 1.0,
        backoff_max: float | timedelta = 3600.0,
        codec: Codec[T] = CBOR,
    ) -> None:
        self._runner = as_runner(runner)
        if not isinstance(name, str) or not 1 <= len(name.encode(errors="ignore")) <= _NAME_BYTES_MAX:
            raise Misuse(f"name must be a str of 1 to {_NAME_BYTES_MAX} UTF-8 bytes, not {name!r:.40}")
        if name != name.encode(errors="ignore").decode():
            raise Misuse(f"name must be text that UTF-8 can hold, not {name!r:.40}")
        if not (callable(getattr(codec, "encode", None)) and callable(getattr(codec, "decode", None))):
            raise Misuse(f"codec must have encode and decode, not {codec!r:.40}: pass CBOR, RAW, typed(cls)")
        self._name = name
        self._lease_ms = as_ms(lease, "lease", above=True)
        self._codec: Codec[T] = codec
        self._bell = bell_of(runner, name)
        terms = Terms(
            _as_count(attempts_max, "attempts_max"), as_ms(backoff, "backoff"), as_ms(backoff_max, "backoff_max")
        )
        self._rows = Rows(name, terms, self._bell)
        self._desk = Desk(self._runner, self._rows, codec)
        self._closed = False

    @property
    def name(self) -> str:
        """The category its rows are in."""
        return self._name

    # -- putting -------------------------------------------------------------------------------------------------

    def put(self, value: T, *, delay: float | timedelta | None = None) -> Reply[int]:
        """Put a message at the end of the line, or let it wait for `delay` first; answer with its id.

        Ids grow. Raises `Misuse` for a value the codec can't encode.
        """
        return self._runner.run(self._rows.put, _as_delay(delay), self._codec.encode(value)).map(_first)

    def put_many(self, values: Iterable[T], *, delay: float | timedelta | None = None) -> Reply[list[int]]:
        """Put several, all or none, up to 10,000; answer with their ids."""
        bodies = [self._codec.encode(value) for value in values]
        if len(bodies) > _BATCH_MAX:
            raise Misuse(f"{len(bodies):,} messages at once are too many: put up to {_BATCH_MAX:,}")
        return self._runner.run(self._rows.put, _as_delay(delay), *bodies)

    def put_in(self, tx: Transaction, value: T, *, delay: float | timedelta | None = None) -> int:
        """Put a message in a transaction of one's own, on the same job: it is there if, and only if, the rest is."""
        check_transaction(tx, self._runner)
        return self._rows.put(tx, _as_delay(delay), self._codec.encode(value))[0]

    def cancel(self, id: int) -> Reply[bool]:  # noqa: A002  # what it is
        """Delete a message that waits, in line or for its time; answer whether it did: taken and dead ones stay."""
        return self._runner.run(self._rows.cancel, _as_count(id, "id"))

    # -- taking --------------------------------------------------------------------------------------------------

    def take(self, *, lease: float | timedelta | None = None) -> Reply[Message[T] | None]:
        """Take the first message in line, or answer `None` if there is none now."""
        lease_ms = self._as_lease(lease)

        def one(found: tuple[list[Stored], int | None]) -> Message[T] | None:
            return Message(self._desk, found[0][0], lease_ms) if found[0] else None

        return self._runner.run(self._rows.take, lease_ms, 1).map(one)

    def take_many(self, limit: int, *, lease: float | timedelta | None = None) -> Reply[list[Message[T]]]:
        """Take up to `limit` messages at once, and no more than some 16 MiB; an empty list if there is none now."""
        lease_ms = self._as_lease(lease)
        limit = min(_as_count(limit, "limit"), _BATCH_MAX)

        def all_(found: tuple[list[Stored], int | None]) -> list[Message[T]]:
            return [Message(self._desk, stored, lease_ms) for stored in found[0]]

        return self._runner.run(self._rows.take, lease_ms, limit).map(all_)

    def receive(self, timeout: float | None = None, *, lease: float | timedelta | None = None) -> Message[T]:
        """Take the first message, waiting for one if there is none.

        Raises `TimeoutError` after `timeout` seconds (0: after one look), and `Closed` when this object, or the job, is
        closed meanwhile.
        """
        return drive(self._receiving(_as_timeout(timeout), self._as_lease(lease)))

    async def areceive(self, timeout: float | None = None, *, lease: float | timedelta | None = None) -> Message[T]:
        """Do what `receive` does, in an event loop. A task that is cancelled meanwhile takes no message along."""
        return await adrive(self._receiving(_as_timeout(timeout), self._as_lease(lease)))

    def _receiving(self, timeout: float | None, lease_ms: int) -> Steps[Message[T]]:
        deadline = float("inf") if timeout is None else monotonic() + timeout
        poll = poll_of(self._runner)
        pause = None if poll is None else poll / _POLLS_TO_SLOW
        listening = asked = None
        try:
            while True:
                self._check_open()
                asked = self._runner.run(self._rows.take, lease_ms, 1)
                # With a timeout of 0 this is the one look, however long it takes.
                if timeout and not (yield Nap(asked, deadline - monotonic())):
                    raise TimeoutError(f"no message within {timeout} s")
                found, due_ms = yield asked
                asked = None
                if found:
                    return Message(self._desk, found[0], lease_ms)
                if monotonic() >= deadline:
                    raise TimeoutError(f"no message within {timeout} s")
                if listening is None:  # whatever came before this is seen by another look
                    listening = self._bell.listen()
                    continue
                wake = float("inf") if due_ms is None else monotonic() + due_ms / 1000
                if pause is not None and poll is not None:
                    wake, pause = min(wake, monotonic() + pause), min(2 * pause, poll)
                yield from self._napping(listening, wake, deadline)
                self._bell.leave(listening)
                listening = self._bell.listen()
        finally:
            if asked is not None:
                asked.add_done_callback(self._give_back)
            if listening is not None:
                self._bell.leave(listening)
                self._bell.ring(1)  # somebody else is to watch the clock, or to have the ring that was for this one

    def _napping(self, listening: Reply[None], wake: float, deadline: float) -> Steps[None]:
        """Wait until the bell is rung; whoever leads, until something is due, too."""
        begun = monotonic()
        while not listening.done():
            leads = self._bell.lead(listening, wake)
            now = monotonic()
            end = min(wake, deadline, now + _STATE_LOOK_S) if leads else deadline
            if end <= now or (yield Nap(listening, None if end == float("inf") else end - now)):
                return
            state = self._state_of_job()
            if self._closed or state in ("closed", "poisoned"):
                self._bell.ring()  # all of them are to see it
                return
            if leads and wake != float("inf") and state != "idle" and monotonic() >= begun + _DUE_LOOK_S:
                return
            if monotonic() >= min(wake if leads else deadline, deadline):
                return

    def _state_of_job(self) -> str:
        """Return the state of the job, as far as the runner knows it. One that is idle isn't opened for a look."""
        if getattr(self._runner, "closed", False):
            return "closed"
        statistics: Any = getattr(self._runner, "statistics", None)
        return "" if statistics is None else str(statistics().state)

    def _give_back(self, asked: Any) -> None:
        """Put back what came when nobody waited for it any more."""
        if asked.cancelled() or asked.exception() is not None:
            return
        for stored in asked.result()[0]:
            with suppress(PersistencyError):  # then its lease ends by itself
                self._runner.run(self._rows.release, stored.id, stored.state.token)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Message[T]:
        try:
            return self.receive()
        except Closed:
            if not self._closed:
                raise
            raise StopIteration from None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message[T]:
        try:
            return await self.areceive()
        except Closed:
            if not self._closed:
                raise
            raise StopAsyncIteration from None

    # -- dead letters --------------------------------------------------------------------------------------------

    def dead(self, limit: int = 100) -> Reply[list[DeadLetter[T]]]:
        """Answer with dead letters, the longest dead first."""

        def letters(found: list[Stored]) -> list[DeadLetter[T]]:
            return [DeadLetter(self._desk, stored) for stored in found]

        return self._runner.run(self._rows.dead, min(_as_count(limit, "limit"), _BATCH_MAX)).map(letters)

    def revive(self, id: int | None = None, *, limit: int = 1_000) -> Reply[int]:  # noqa: A002  # what it is
        """Put a dead letter at the end of the line, with all its attempts before it; answer how many that was.

        Without an id, the longest dead, up to `limit` of them: call it again until the answer is 0.
        """
        limit = min(_as_count(limit, "limit"), _BATCH_MAX)
        return self._runner.run(self._rows.revive, None if id is None else _as_count(id, "id"), limit)

    def purge_dead(self, older_than: float | timedelta = 0, *, limit: int = 1_000) -> Reply[int]:
        """Delete dead letters that died so long ago, up to `limit` of them; answer how many that was."""
        limit = min(_as_count(limit, "limit"), _BATCH_MAX)
        return self._runner.run(self._rows.purge, as_ms(older_than, "older_than"), limit)

    # -- the rest ------------------------------------------------------------------------------------------------

    def counts(self) -> Reply[QueueCounts]:
        """Answer how many messages are in which state. What is due is put in line first, some at a time."""
        return self._runner.run(self._rows.count).map(lambda counts: QueueCounts(*counts))

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return self._closed

    def close(self) -> None:
        """End the loops over this object and the waiting of its `receive`s. The messages stay, and so does the job."""
        self._closed = True
        self._bell.ring()

    def _check_open(self) -> None:
        if self._closed:
            raise Closed(f"{self!r} is closed", hint="Make a new Queue.")

    def _as_lease(self, lease: Any) -> int:
        return self._lease_ms if lease is None else as_ms(lease, "lease", above=True)

    def __repr__(self) -> str:
        return f"<Queue {self._name!r} of {self._runner!r}{' (closed)' if self._closed else ''}>"


def _as_count(value: Any, argument: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise Misuse(f"{argument} must be an int, not {type(value).__name__}")
    if value < 1:
        raise Misuse(f"{argument} must be 1 or more, not {value}")
    return value


def _as_delay(delay: Any) -> int:
    return 0 if delay is None else as_ms(delay, "delay")


def _as_timeout(timeout: Any) -> float | None:
    return None if timeout is None else as_ms(timeout, "timeout") / 1000


def _first(ids: list[int]) -> int:
    return ids[0]
