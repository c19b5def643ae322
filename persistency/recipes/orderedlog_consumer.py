"""Consumers of an ordered log: a name, and the position that is kept for it.

Rules:
  1. A consumer takes what is behind its position in the job. Taking moves nothing, and `commit` does; so what wasn't
     committed comes again, after a crash too.
  2. A position never goes backwards, but by `reset`: of two consumers of one name the one behind is told.
  3. In the process that has the job nobody polls: who waits is woken by whoever appends. A job that was closed or
     can't go on wakes nobody: a flag is looked at for that.
  4. A step of a loop that was left in the middle of its body commits nothing.

Doesn't know: how records are stored, how a job is run.
"""

from __future__ import annotations

from collections import deque
from time import monotonic
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeVar

from persistency import Closed, Codec, Corrupt, Job, Misuse, Reply, Transaction
from persistency.recipes.orderedlog_rows import Rows, Stored
from persistency.recipes.runner import Runner, poll_of
from persistency.recipes.waiting import Nap, Steps, adrive, drive

T = TypeVar("T")

_PAGE = 100
# Who waits for a job of this process looks so often whether it takes anything still: at a flag, not into the job.
_FLAG_LOOK_S = 1.0


class LogRecord(NamedTuple, Generic[T]):
    """A record: its number, its value, and when it was appended, in Unix milliseconds."""

    number: int
    value: T
    at_ms: int


class Consumer(Generic[T]):
    """A named reader of an `OrderedLog`, whose position the job keeps. Made by `OrderedLog.consumer`.

    `for record in consumer:` and `async for` wait for each next record, and commit it when its body is done, that is
    when the next one is asked for: at least once. A body left by `break` or an exception isn't done, and its record
    comes again. They end when the consumer is closed, as leaving `with consumer:` or `async with consumer:` does, and
    raise what its verbs raise.
    """

    def __init__(self, runner: Runner, rows: Rows, codec: Codec[T], name: str, *, at_end: bool) -> None:
        self._runner = runner
        self._rows = rows
        self._codec = codec
        self._name = name
        self._at_end = at_end
        self._closed = False
        # So that its place is kept from now on. Whatever is asked for later enters it too, should this have failed.
        runner.run(rows.position, name, at_end)

    @property
    def name(self) -> str:
        """The consumer's name."""
        return self._name

    # -- verbs ---------------------------------------------------------------------------------------------------

    def take(self, limit: int = 100) -> Reply[list[LogRecord[T]]]:
        """Ask for the first records behind the position, without waiting for any: at most `limit`, or some 16 MiB.

        The reply raises `FeedTruncated` if they were trimmed.
        """
        limit = as_number(limit, "limit", 1)
        return self._runner.run(self._rows.take, self._name, self._at_end, limit).map(self._decoded)

    def commit(self, number: int) -> Reply[bool]:
        """Be done with all records up to `number`, and answer whether the position moved.

        It doesn't where it is there already, or further: another consumer of the same name was here, or this one was
        reset. Raises `Misuse` in the reply for a number that no record has yet.
        """
        number = as_number(number, "number", 1)
        return self._runner.run(self._rows.commit, self._name, self._at_end, number, None)

    def commit_in(self, tx: Transaction, number: int) -> None:
        """Be done with all records up to `number` in a transaction of one's own, on the same job: exactly once.

        Raises `Conflict` where `commit` would answer `False`, so that nothing of the transaction is applied twice.
        """
        self._rows.commit_or_raise(tx, self._name, self._at_end, as_number(number, "number", 1))

    def position(self) -> Reply[int]:
        """Ask for the number of the last record this is done with; 0: none."""
        return self._runner.run(self._rows.position, self._name, self._at_end)

    def lag(self) -> Reply[int]:
        """Ask how many records there are behind the position."""
        return self._runner.run(self._rows.lag, self._name, self._at_end)

    def reset(self, number: int) -> Reply[None]:
        """Go on behind `number`, wherever the position is: 0 is the very beginning.

        Raises `Misuse` in the reply for a number that no record has yet.
        """
        return self._runner.run(self._rows.reset, self._name, as_number(number, "number", 0))

    def close(self) -> None:
        """End the loops over this object, from any thread or task, and have those who wait get `Closed`.

        The position stays in the job: a consumer of the same name goes on there.
        """
        self._closed = True
        self._rows.bell.ring()

    # -- waiting -------------------------------------------------------------------------------------------------

    def next(self, timeout: float | None = None) -> LogRecord[T]:
        """Return the first record behind the position, waiting for one if there is none. It isn't committed.

        Raises `TimeoutError` after `timeout` seconds (0: after one look), `FeedTruncated` if it was trimmed, and
        `Closed` when this object, or the job, is closed meanwhile; `Poisoned` when the job can't go on.
        """
        return drive(self._next(as_timeout(timeout)))

    async def anext(self, timeout: float | None = None) -> LogRecord[T]:
        """Do what `next` does, in an event loop."""
        return await adrive(self._next(as_timeout(timeout)))

    def _next(self, timeout: float | None) -> Steps[LogRecord[T]]:
        records = yield from self._some(1, timeout)
        if not records:
            raise Closed(f"consumer {self._name!r} is closed", hint="Make another one of this name.")
        return records[0]

    def _some(self, limit: int, timeout: float | None) -> Steps[list[LogRecord[T]]]:
        """Return the first records behind the position as soon as there are any; none: the consumer is closed."""
        until = None if timeout is None else monotonic() + timeout
        while not self._closed:
            heard = self._rows.bell.listen()
            try:
                records: list[LogRecord[T]] = yield self.take(limit)
                if records:
                    return records
                if until is not None and monotonic() >= until:
                    raise TimeoutError(f"consumer {self._name!r} had nothing to take for {timeout} s")
                yield from self._nap(heard, until)
            finally:
                self._rows.bell.leave(heard)
        return []

    def _nap(self, heard: Reply[None], until: float | None) -> Steps[None]:
        """Wait until it is worth looking again."""
        poll = poll_of(self._runner)
        while True:
            left = float("inf") if until is None else max(0.0, until - monotonic())
            rung = yield Nap(heard, min(left, _FLAG_LOOK_S if poll is None else poll))
            if rung or poll is not None or not left or self._closed or _is_over(self._runner):
                return

    def __iter__(self) -> Loop[T]:
        return Loop(self)

    def __aiter__(self) -> Loop[T]:
        return Loop(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Consumer {self._name!r} of {self._rows.category!r}{' (closed)' if self._closed else ''}>"

    def _step(self, number: int) -> Reply[bool]:
        """Be done with a record, if the one before it is where the position is."""
        return self._runner.run(self._rows.commit, self._name, self._at_end, number, number - 1)

    def _decoded(self, stored: list[Stored]) -> list[LogRecord[T]]:
        return decoded(self._codec, stored)


class Loop(Generic[T]):
    """One loop over a consumer; an iterator for `for` and `async for`."""

    def __init__(self, consumer: Consumer[T]) -> None:
        self._consumer = consumer
        self._given: int | None = None
        self._page: deque[LogRecord[T]] = deque()

    def __iter__(self) -> Self:
        return self

    def __aiter__(self) -> Self:
        return self

    def __next__(self) -> LogRecord[T]:
        record = drive(self._following())
        if record is None:
            raise StopIteration
        return record

    async def __anext__(self) -> LogRecord[T]:
        record = await adrive(self._following())
        if record is None:
            raise StopAsyncIteration
        return record

    def _following(self) -> Steps[LogRecord[T] | None]:
        """Commit the last record given, and return the next one."""
        given, self._given = self._given, None
        # Whoever finds that the position was moved meanwhile, by another consumer or a reset, looks where it is.
        if given is not None and not (yield self._consumer._step(given)):
            self._page.clear()
        if not self._page and not self._consumer._closed:
            self._page.extend((yield from self._consumer._some(_PAGE, None)))
        if not self._page or self._consumer._closed:
            return None
        record = self._page.popleft()
        self._given = record.number
        return record


# -- what the log has in common with its consumers ---------------------------------------------------------------


def decoded(codec: Codec[T], stored: list[Stored]) -> list[LogRecord[T]]:
    """Return records with their values. Raises `Corrupt`, naming the record, for one that can't be decoded."""
    found = []
    for number, at_ms, encoded in stored:
        try:
            found.append(LogRecord(number, codec.decode(encoded), at_ms))
        except Corrupt as error:
            raise Corrupt(f"record {number}: {error}", hint=error.hint) from error
    return found


def _is_over(runner: Runner) -> bool:
    """Say whether a job takes nothing more: whoever asks it is told why."""
    if isinstance(runner, Job):
        return runner.statistics().state in ("closed", "poisoned")
    return bool(getattr(runner, "closed", False))


def as_number(value: Any, argument: str, least: int) -> int:
    """Return a whole number of at least `least`. Raises `Misuse`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise Misuse(f"{argument} must be an int, not {type(value).__name__}: pass {least} or more")
    if value < least:
        raise Misuse(f"{argument} must be at least {least}, not {value!r:.40}: pass {least} or more")
    return min(int(value), 2**62)


def as_timeout(value: Any) -> float | None:
    """Return a waiting time in seconds; `None`: as long as it takes. Raises `Misuse`."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Misuse(f"timeout must be a number, not {type(value).__name__}: pass seconds, or None")
    if not value >= 0:
        raise Misuse(f"timeout must be 0 or more seconds, not {value!r}")
    return float(value)
