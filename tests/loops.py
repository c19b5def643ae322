"""Event loops for tests: what is written once, with anyio's tools, runs under each of them.

A test asks for the fixture `in_loop` and is run three times: `in_loop(fn, *args)` runs an async function by
`asyncio.run`, `trio.run` and `anyio.run`. Inside, tasks, waiting and cancelling are anyio's, which speaks to each.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Awaitable, Callable, Generator
from functools import partial
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

import anyio
import anyio.abc
import anyio.lowlevel
import pytest
import trio

T = TypeVar("T")

# A reply, a coroutine, or what gives one when it is called.
Wanted: TypeAlias = "Awaitable[T] | Callable[[], Awaitable[T]]"

WAIT = 30.0  # seconds a test waits for what must come


class InLoop(Protocol):
    """Runs what an (async) function gives to await in an event loop of its own, and returns what comes of it."""

    def __call__(self, fn: Callable[..., Awaitable[T]], *args: Any, **options: Any) -> T: ...


async def _awaited(fn: Callable[..., Awaitable[T]], args: tuple[Any, ...], options: dict[str, Any]) -> T:
    return await fn(*args, **options)


def _in_asyncio(fn: Callable[..., Awaitable[T]], *args: Any, **options: Any) -> T:
    return asyncio.run(_awaited(fn, args, options))


def _in_trio(fn: Callable[..., Awaitable[T]], *args: Any, **options: Any) -> T:
    return trio.run(_awaited, fn, args, options)


def _in_anyio(fn: Callable[..., Awaitable[T]], *args: Any, **options: Any) -> T:
    return anyio.run(_awaited, fn, args, options)


# By name: `anyio` is what a service on anyio runs that has chosen no loop.
LOOPS: dict[str, InLoop] = {"asyncio": _in_asyncio, "trio": _in_trio, "anyio": _in_anyio}


@pytest.fixture(params=LOOPS)
def in_loop(request: pytest.FixtureRequest) -> InLoop:
    """Run the test under each of the loops."""
    return LOOPS[request.param]


async def bounded(fn: Callable[..., Awaitable[T]], *args: Any, **options: Any) -> T:
    """Await what a function gives, for at most `WAIT` seconds."""
    with anyio.fail_after(WAIT):
        return await fn(*args, **options)


async def in_thread(fn: Callable[..., T], *args: Any) -> T:
    """Run a function that waits in a thread of its own, and await it."""
    return await anyio.to_thread.run_sync(partial(fn, *args), abandon_on_cancel=True)


def _begun(wanted: Wanted[T]) -> Awaitable[T]:
    return wanted() if callable(wanted) else wanted


async def turns(count: int = 1) -> None:
    """Let every task that can run do so, so many times."""
    for _ in range(2 * count):  # trio runs those of one turn in any order, this task perhaps first
        await anyio.lowlevel.checkpoint()


async def gather(items: AsyncIterable[T]) -> list[T]:
    """Return what an async iterable gives."""
    return [item async for item in items]


async def together(*wanted: Wanted[T]) -> list[T]:
    """Await many things at once; what came of them, in their order. The first error ends the others.

    It is raised as it is, not in a group; for one that comes beside others, the group is.
    """
    found: dict[int, T] = {}

    async def one(index: int, what: Wanted[T]) -> None:
        found[index] = await _begun(what)

    try:
        async with anyio.create_task_group() as group:
            for index, what in enumerate(wanted):
                group.start_soon(one, index, what)
    except ExceptionGroup as errors:
        if len(errors.exceptions) > 1:
            raise
        raise errors.exceptions[0] from None
    return [found[index] for index in range(len(wanted))]


class GivenUp(Exception):
    """A task was awaited that had been cancelled."""


class Task(Generic[T]):
    """Something awaited beside, in a task of a group: to be cancelled alone, or awaited for its outcome."""

    def __init__(self, group: anyio.abc.TaskGroup, wanted: Wanted[T]) -> None:
        self.begun: bool = False
        self.error: BaseException | None = None
        self._ended = anyio.Event()
        self._scope = anyio.CancelScope()
        self._found: list[T] = []
        group.start_soon(self._run, wanted)

    async def _run(self, wanted: Wanted[T]) -> None:
        try:
            with self._scope:
                self.begun = True
                try:
                    self._found.append(await _begun(wanted))
                except Exception as error:  # it belongs to whoever awaits the task
                    self.error = error
        finally:
            self._ended.set()

    def cancel(self) -> None:
        """Have what it awaits given up."""
        self._scope.cancel()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_set()

    @property
    def cancelled(self) -> bool:
        """Whether it ended because it was cancelled."""
        return self.done and not self._found and self.error is None

    def __await__(self) -> Generator[Any, None, T]:
        yield from self._ended.wait().__await__()
        if self.error is not None:
            raise self.error
        if not self._found:
            raise GivenUp
        return self._found[0]
