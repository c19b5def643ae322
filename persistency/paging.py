"""Paging: walking over any number of rows, a page at a time, for `for` and `async for` alike.

Rules:
  1. Between pages nothing is held: no lock, no read transaction. A paused consumer blocks nobody.
  2. The next page starts behind the last key given, so writing while iterating is safe: a key that is there
     throughout is seen exactly once.
  3. Where the mailbox is full a page waits for room, in a thread and under an event loop, whatever `on_full` says.

Doesn't know: where the pages come from.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from persistency.errors import Corrupt, Overloaded

T = TypeVar("T")


class _Reply(Protocol):
    def result(self) -> Any: ...
    def __await__(self) -> Any: ...


class Pages(Generic[T]):
    """Rows of a range. Each `for`, and each `async for`, walks from the beginning, a page at a time."""

    def __init__(
        self,
        ask: Callable[[bytes, bytes | None, int], _Reply],
        drain: Callable[[], _Reply],
        make: Callable[[bytes, bytes], T],
        span: tuple[bytes, bytes | None],
        *,
        reverse: bool,
        page: int,
    ) -> None:
        """`ask(start, stop, limit)` requests a page as (key, payload) pairs; `drain()` is waited for where that is
        refused for want of room; `make(key, payload)` makes what the consumer sees.
        """
        self._ask = ask
        self._drain = drain
        self._make = make
        self._span = span
        self._reverse = reverse
        self._page = page

    def __iter__(self) -> Iterator[T]:
        span: tuple[bytes, bytes | None] | None = self._span
        while span is not None:
            try:
                rows = self._ask(*span, self._page).result()
            except Overloaded:
                self._drain().result()
                continue
            for key, payload in rows:
                yield self._make(key, payload)
            span = self._behind(span, rows)

    def __aiter__(self) -> AsyncIterator[T]:
        return _Walk(self)

    def _behind(
        self, span: tuple[bytes, bytes | None], rows: list[tuple[bytes, bytes]]
    ) -> tuple[bytes, bytes | None] | None:
        """Return the range behind a page, or `None` after the last one."""
        if len(rows) < self._page:
            return None
        last = rows[-1][0]
        if not (span[0] <= last and (span[1] is None or last < span[1])):
            # Or a damaged file, whose rows are out of order, would be walked round for ever.
            raise Corrupt("rows are out of order", hint="Restore the job from a backup.")
        # The smallest key greater than `last` is `last` and a zero byte; the stop is not included anyway.
        return (span[0], last) if self._reverse else (last + b"\0", span[1])


class _Walk(Generic[T]):
    """One `async for` over rows. No generator: there is nothing to clean up where one is left in the middle."""

    def __init__(self, pages: Pages[T]) -> None:
        self._pages = pages
        self._span: tuple[bytes, bytes | None] | None = pages._span
        self._rows: list[tuple[bytes, bytes]] | None = None  # the present page
        self._left: Iterator[tuple[bytes, bytes]] = iter(())  # what of it is still to be given

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        for key, payload in self._left:
            return self._pages._make(key, payload)
        while await self._turn_over():
            for key, payload in self._left:
                return self._pages._make(key, payload)
        raise StopAsyncIteration

    async def _turn_over(self) -> bool:
        """Get the next page; return whether there is one."""
        if self._rows is not None and self._span is not None:
            self._span, self._rows = self._pages._behind(self._span, self._rows), None
        while self._rows is None and self._span is not None:
            try:
                self._rows = await self._pages._ask(*self._span, self._pages._page)
            except Overloaded:
                await self._pages._drain()
        self._left = iter(self._rows or ())
        return self._rows is not None
