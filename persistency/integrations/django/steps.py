"""Steps: a procedure that waits, written once as a generator, taken by a thread or by an event loop.

Rules:
  1. It yields a `Reply` and is sent its answer; or a piece of `Work` and is sent what that returns. What they raise is
     thrown into it.
  2. Work is what other people's classes do, to be pickled for example: it may ask a database. A thread does it there
     and then; an event loop has it done where Django has synchronous code done.
  3. So is what takes its time as there is so much of it. All of it is one piece, however many values there are.

Doesn't know: what is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any, Final, NamedTuple, TypeAlias, TypeVar, TypeVarTuple

from asgiref.sync import sync_to_async

from persistency import Reply

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
SMALL: Final = 64 * 1024  # bytes; what is larger would hold an event loop up


class Work(NamedTuple):
    """A call that may take its time, or need to be outside of an event loop."""

    fn: Callable[..., Any]
    args: tuple[Any, ...]


Steps: TypeAlias = Generator[Reply[Any] | Work, Any, T]
"""A procedure that waits, and returns a `T`."""


def by_size(nbytes: float, fn: Callable[[*Ts], T], *args: *Ts) -> Steps[T]:
    """Return what a call returns: there and then if it is about few bytes, and as work else."""
    if nbytes <= SMALL:
        return fn(*args)
    return (yield Work(fn, args))  # type: ignore[no-any-return]  # what it returned


def drive(steps: Steps[T]) -> T:
    """Take the steps in this thread, and return what they return."""
    try:
        step = next(steps)
        while True:
            try:
                answer = step.fn(*step.args) if isinstance(step, Work) else step.result()
            except Exception as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # what the generator returned
    finally:
        steps.close()


async def adrive(steps: Steps[T]) -> T:
    """Take the steps in this event loop, and return what they return."""
    try:
        step = next(steps)
        while True:
            try:
                answer = await (sync_to_async(step.fn)(*step.args) if isinstance(step, Work) else step)
            except Exception as error:
                step = steps.throw(error)
            else:
                step = steps.send(answer)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # what the generator returned
    finally:
        steps.close()
