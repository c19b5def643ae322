"""Driving: a procedure that waits for replies, written once as a generator, run by a thread or by an event loop.

Rules:
  1. The generator yields each reply it has to wait for; what the reply raises is raised there.
  2. A timeout bounds the whole, not each reply.

Doesn't know: what the replies are about.
"""

from __future__ import annotations

from collections.abc import Generator
from time import monotonic
from typing import Any, TypeVar

from persistency.actor.reply import Reply

T = TypeVar("T")


def drive(steps: Generator[Reply[Any], Any, T], timeout: float | None) -> T:
    """Wait for each reply a generator yields, in this thread, for at most `timeout` seconds; return what it returns."""
    deadline = None if timeout is None else monotonic() + timeout
    try:
        reply = next(steps)
        while True:
            try:
                reply.result(None if deadline is None else max(0.0, deadline - monotonic()))
            except Exception as error:
                reply = steps.throw(error)
            else:
                reply = steps.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # what the generator returned
    finally:
        steps.close()


async def adrive(steps: Generator[Reply[Any], Any, T], timeout: float | None) -> T:
    """Wait for each reply a generator yields, in this event loop."""
    deadline = None if timeout is None else monotonic() + timeout
    try:
        reply = next(steps)
        while True:
            try:
                await reply.within(None if deadline is None else max(0.0, deadline - monotonic()))
            except Exception as error:
                reply = steps.throw(error)
            else:
                reply = steps.send(None)
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]  # what the generator returned
    finally:
        steps.close()
