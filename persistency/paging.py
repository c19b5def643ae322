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

    async def __aiter__(self) -> AsyncIterator[T]:
        span: tuple[bytes, bytes | None] | None = self._span
        while span is not None:
            try:
                rows = await self._ask(*span, self._page)
            except Overloaded:
                await self._drain()
                continue
            for key, payload in rows:
                yield self._make(key, payload)
            span = self._behind(span, rows)

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
