"""Replies: answers that arrive later, for threads and event loops alike.

A `Reply` is a `concurrent.futures.Future` that costs next to nothing until somebody has to wait for it: its lock,
its waiters and its callbacks are made on demand. `wait`, `as_completed` and `wrap_future` take it.

Rules:
  1. A reply is settled exactly once, by `actor.settling`; whoever waits, in any thread or loop, is woken.
  2. One group of replies wakes each event loop once.
  3. A request that writes can't be cancelled; a read can, as long as it waits in the mailbox.
  4. A failure nobody has looked at, when its reply is dropped, goes to the reply's `unseen` hook.
  5. A reply that was answered at once still gives the event loop a turn, at least once a millisecond.

Doesn't know: what is asked or answered, mailboxes, workers, whose the event loops are.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Generator
from concurrent.futures import CancelledError, Future
from time import monotonic
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

from persistency.actor.failures import Unseen
from persistency.actor.loops import TURN_S, running_loop, sleep, turn, turns
from persistency.errors import Misuse
from persistency.logfields import about

log: logging.Logger = logging.getLogger("persistency.actor")

T = TypeVar("T")
U = TypeVar("U")

# The names `concurrent.futures` knows.
PENDING, FINISHED, CANCELLED = "PENDING", "FINISHED", "CANCELLED_AND_NOTIFIED"
_DONE = (FINISHED, CANCELLED)
# What answers are made of: nobody has a reason to compare a reply with these.
_ANSWERS = frozenset((bytes, str, int, float, bool, list, dict, tuple, type(None)))
_FORGOTTEN = "A request gives a Reply at once, and the answer later."

# Guards every change of a reply's state, and the making of its waiting apparatus. One for all: it is held for
# microseconds, and once per group. Re-entrant, because signal handlers and `__del__` settle replies too.
gate: threading.RLock = threading.RLock()


class Line(Protocol):
    """Where a pending reply waits."""

    @property
    def abandoned(self) -> BaseException | None:
        """Why nobody will answer there any more: in a forked child."""

    def withdraw(self, reply: Reply[Any], /) -> bool:
        """Take a read that hasn't started out of the line and settle it as cancelled; return whether it was there."""
        raise NotImplementedError  # a docstring alone would be read as one that returns None

    def waits_for_itself(self) -> bool:
        """Say whether the calling thread is the one that would have to answer."""
        raise NotImplementedError  # a docstring alone would be read as one that returns None


class Reply(Future[T]):
    """The answer to a request: `result(timeout=None)`, or `await` it in any loop of any thread.

    Made by the engine. `cancel()` takes a read that hasn't started out of the mailbox and returns whether it did;
    it never touches a request that writes. Callbacks run in the thread that settles the reply. To use it as if it were
    the answer (its truth, its length, comparing it, walking over it) is `Misuse`.
    """

    # Class attributes stand in for `Future.__init__`: a reply that is ready at once sets two of them.
    _state = PENDING
    _result: Any = None
    _exception: BaseException | None = None
    _line: Line | None = None
    _reads = False
    _unwanted = False
    _ticket = -2  # the generation of the line it stands in; -1: withdrawn
    _unseen: Unseen | None = None
    _made_condition: threading.Condition | None = None
    _made_waiters: list[Any] = []  # noqa: RUF012  # replaced, never filled, before anybody can wait
    _loops: list[tuple[Any, Any]] | None = None
    _bells: list[Any] | None = None
    _callbacks: list[Callable[[Any], object]] | None = None
    _followers: list[Reply[Any]] | None = None

    def __init__(self) -> None:
        """Do nothing: `Future`'s own would make a lock, a condition and two lists for every reply."""

    def done(self) -> bool:
        """Say whether the reply is settled."""
        return self._state in _DONE or self._is_abandoned()

    def running(self) -> bool:
        """Say whether the request can no longer be cancelled, but isn't settled yet."""
        return self._state == PENDING and not self._reads

    def cancelled(self) -> bool:
        """Say whether the request was cancelled."""
        return self._state == CANCELLED

    def result(self, timeout: float | None = None) -> T:
        """Return the answer, or raise what went wrong.

        `timeout` is in seconds. Raises `TimeoutError` when it is over (the request goes on), `CancelledError` if the
        request was cancelled, and `Misuse` where waiting could never end: inside the job's own `run`.
        """
        if self._state != FINISHED:
            if self._state == PENDING:
                self._wait(timeout)
            if self._state == CANCELLED:
                raise CancelledError
        if self._exception is None:
            return self._result  # type: ignore[no-any-return]  # Any, by construction a T
        self._look()
        try:
            raise self._exception
        finally:
            # Or the traceback and the reply would keep each other alive; `self` is what the frame has of it.
            self = None  # type: ignore[assignment]  # noqa: PLW0642

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what went wrong, or `None`; waits and raises like `result`."""
        if self._state == PENDING:
            self._wait(timeout)
        if self._state == CANCELLED:
            raise CancelledError
        self._look()
        return self._exception

    def cancel(self) -> bool:
        """Take a read that hasn't started out of the mailbox. Returns whether the request is now cancelled."""
        line = self._line
        if self._state == CANCELLED or not self._reads or line is None or line.abandoned is not None:
            return self._state == CANCELLED
        if line.withdraw(self):
            return True
        # On its way from one line to another: then whoever comes second of the two sees that it isn't wanted.
        self._unwanted = True
        return self._line is not None and self._line is not line and self._line.withdraw(self)

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Call `fn(reply)` when the reply is settled: at once if it is, else in the thread that settles it."""
        if not callable(fn):
            raise Misuse(f"fn must be callable, not {type(fn).__name__}: pass a function of the reply")
        self._is_abandoned()
        with gate:
            if self._state == PENDING:
                self._callbacks = [*(self._callbacks or ()), fn]
                return
        self._call(fn)

    @classmethod
    def of(cls, future: Future[T]) -> Reply[T]:
        """Return a reply that is settled as a plain future is: something to await, in any loop.

        Cancelling the reply, or giving up the last wait for it, cancels the future, if that can still be. A failure is
        logged if the reply is dropped with nobody having looked.
        """
        if not isinstance(future, Future):
            raise Misuse(f"future must be a concurrent.futures.Future, not {type(future).__name__}")
        return cls._adopt(future)

    _adopt: ClassVar[Callable[[Future[Any]], Reply[Any]]]  # given by `actor.settling`, which knows how one is settled

    def map(self, fn: Callable[[T], U]) -> Reply[U]:
        """Return a reply of `fn(answer)`; `fn` runs once, in the thread that takes the result."""
        if not callable(fn):
            raise Misuse(f"fn must be callable, not {type(fn).__name__}: pass a function of the answer")
        return _Mapped(self, fn)

    def __await__(self) -> Generator[Any, None, T]:
        if self._state == PENDING:
            yield from self._wait_in_loop()
        elif monotonic() - turns.at > TURN_S:
            yield from turn()
        return self.result()

    # -- waiting -------------------------------------------------------------------------------------------------

    def _have_condition(self) -> threading.Condition:
        self._is_abandoned()
        with gate:
            if self._made_condition is None:
                self._made_waiters = []
                self._made_condition = threading.Condition()
            return self._made_condition

    def _have_waiters(self) -> list[Any]:
        return self._made_waiters

    # Attributes to whoever looks at types, as `Future` has them and `as_completed` asks for; made on demand.
    _condition: threading.Condition = property(_have_condition)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    _waiters: list[Any] = property(_have_waiters)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]

    def _wait(self, timeout: float | None) -> None:
        _check(timeout)
        if self._is_abandoned():
            return
        if self._line is not None and self._line.waits_for_itself():
            raise Misuse(
                "a request's result was asked for in the thread that has to answer it",
                hint="In a callback take the reply it is given; inside run() use the transaction it is given.",
            )
        # A bare lock, not the condition: an interrupt can leave a `Condition` locked for ever, and the worker with it.
        bell = threading.Lock()
        bell.acquire()
        with gate:
            if self._state != PENDING:
                return
            self._bells = [*(self._bells or ()), bell]
        if not bell.acquire(timeout=-1 if timeout is None else min(max(timeout, 0), threading.TIMEOUT_MAX)):
            with gate:
                if self._state == PENDING:
                    self._bells = [other for other in self._bells or () if other is not bell]
                    raise TimeoutError(f"no answer within {timeout} s; the request goes on")

    def _is_abandoned(self) -> bool:
        """Settle the reply, if it is the parent's in a forked child; return whether that was so."""
        line = self._line
        if line is None or line.abandoned is None or self._state != PENDING:
            return False
        # A thread that isn't here may have had the condition.
        self._exception, self._state, self._made_condition = line.abandoned, FINISHED, None
        return True

    async def within(self, timeout: float | None) -> T:
        """Await the answer for at most `timeout` seconds, then raise `TimeoutError`; the request goes on."""
        _check(timeout)
        if self._state == PENDING:
            await _Wait(self, timeout)
        return await self

    def _wait_in_loop(self, timeout: float | None = None) -> Generator[Any, None, None]:
        loop = running_loop()
        if loop is None:
            raise Misuse("a reply is awaited outside of any event loop (asyncio or trio): use reply.result()")
        if self._is_abandoned():
            return
        future = loop.create_future()
        with gate:
            if self._state != PENDING:
                return
            self._loops = [*(self._loops or ()), (loop, future)]
        try:
            yield from sleep(loop, future, timeout)
        except TimeoutError:
            self._give_up(future)
            raise TimeoutError(f"no answer within {timeout} s; the request goes on") from None
        except BaseException:
            self._give_up(future)
            raise

    def _give_up(self, future: Any) -> None:
        """Stop waiting; with nobody else left who wants it, a read that hasn't started needn't be run."""
        with gate:
            self._loops = [waiting for waiting in self._loops or () if waiting[1] is not future]
            wanted = self._wanted()
        if not wanted:
            self.cancel()

    def _wanted(self) -> bool:
        return bool(
            self._loops
            or self._callbacks
            or self._bells
            or self._made_condition is not None
            or any(follower._wanted() for follower in self._followers or ())
        )

    def _look(self) -> None:
        if self._unseen is not None:
            self._unseen.tell = None
            self._unseen = None

    def _call(self, fn: Callable[[Any], object]) -> None:
        try:
            fn(self)
        except BaseException as error:
            # Whatever a callback throws, SystemExit included, the thread that settles must go on.
            log.exception("a callback of %r raised", self, extra=about("callback_raised", None, error))

    # Where `result()` is forgotten every answer would be true, and equal to none. Type checkers see that by themselves.
    if not TYPE_CHECKING:

        def _is_no_answer(self, *_):
            raise Misuse("a Reply is not its answer: ask for reply.result(), or await it", hint=_FORGOTTEN)

        __bool__ = __len__ = __iter__ = __aiter__ = __getitem__ = __contains__ = _is_no_answer

        def __eq__(self, other):
            if type(other) in _ANSWERS:
                self._is_no_answer()
            return NotImplemented

        __hash__ = object.__hash__

    def __repr__(self) -> str:
        outcome = f" raised {type(self._exception).__name__}" if self._exception is not None else ""
        return f"<Reply {self._state.split('_')[0].lower()}{outcome}>"


def _check(timeout: Any) -> None:
    if timeout is None:
        return
    if not isinstance(timeout, int | float) or isinstance(timeout, bool):
        raise Misuse(f"timeout must be a number, not {type(timeout).__name__}: pass seconds, or None")
    if not timeout >= 0:  # NaN too
        raise Misuse(f"timeout must be 0 or more seconds, not {timeout!r}")


class _Wait:
    """An awaitable that ends when a reply is settled, or its time is over."""

    def __init__(self, reply: Reply[Any], timeout: float | None) -> None:
        self._reply = reply
        self._timeout = timeout

    def __await__(self) -> Generator[Any, None, None]:
        yield from self._reply._wait_in_loop(self._timeout)


class Answered(Reply[T]):
    """A reply that had its answer before anybody had the reply: nothing to wait for, and nothing that has failed."""

    _state = FINISHED

    def result(self, timeout: float | None = None) -> T:  # noqa: ARG002  # as that of all replies
        """Return the answer, at once."""
        return self._result  # type: ignore[no-any-return]  # Any, by construction a T

    def __await__(self) -> Generator[Any, None, T]:
        if monotonic() - turns.at > TURN_S:
            yield from turn()
        return self._result  # type: ignore[no-any-return]  # as above


class _Mapped(Reply[U], Generic[T, U]):
    """A reply whose answer is made of another's, by the thread that takes it."""

    def __init__(self, source: Reply[T], fn: Callable[[T], U]) -> None:
        self._source = source
        self._fn: Callable[[T], U] | None = fn
        self._making = threading.Lock()
        with gate:
            if source._state == PENDING:
                source._followers = [*(source._followers or ()), self]
            else:
                self._state = source._state

    def done(self) -> bool:
        return self._source.done()

    def cancelled(self) -> bool:
        return self._source.cancelled()

    def running(self) -> bool:
        return self._source.running()

    def cancel(self) -> bool:
        return self._source.cancel()

    def result(self, timeout: float | None = None) -> U:
        self._make(self._source.result(timeout))
        if self._exception is not None:
            raise self._exception
        return self._result  # type: ignore[no-any-return]  # what fn returned

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = self._source.exception(timeout)
        if error is None:
            self._make(self._source.result())
            error = self._exception
        return error

    def __await__(self) -> Generator[Any, None, U]:
        yield from self._source.__await__()
        return self.result()

    def _make(self, value: T) -> None:
        with self._making:
            if self._fn is not None:
                try:
                    self._result = self._fn(value)
                except Exception as error:  # it belongs to whoever takes the result
                    self._exception = error
                self._fn = None


for _kind in (Answered, _Mapped):
    _kind.__name__ = _kind.__qualname__ = "Reply"  # so that errors speak of what its users know
