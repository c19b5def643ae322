"""A cover: the keys of a category that some ranges have between them, as few ranges that don't touch.

Rules:
  1. A cover never changes: with one more range it is another, so that going back costs nothing.
  2. Ranges are half open; one without an upper bound goes to the last key.

Doesn't know: rows, what it is a cover of.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right


class Cover:
    """Ranges in order that neither overlap nor touch: where each starts, and where it stops (`None`: the last one)."""

    __slots__ = ("_starts", "_stops")

    def __init__(self, starts: tuple[bytes, ...], stops: tuple[bytes | None, ...]) -> None:
        self._starts = starts
        self._stops = stops

    def has(self, key: bytes) -> bool:
        """Say whether a key is in one of them."""
        at = bisect_right(self._starts, key) - 1
        if at < 0:
            return False
        stop = self._stops[at]
        return stop is None or key < stop

    def with_(self, start: bytes, stop: bytes | None) -> Cover:
        """Return the cover that has one range more."""
        if stop is not None and stop <= start:
            return self
        first = bisect_left(self._starts, start)
        if first and ((before := self._stops[first - 1]) is None or before >= start):
            first -= 1  # they touch
            start = self._starts[first]
        last = len(self._starts) if stop is None else bisect_right(self._starts, stop)
        if last > first and stop is not None:
            end = self._stops[last - 1]
            stop = None if end is None else max(stop, end)
        return Cover(
            (*self._starts[:first], start, *self._starts[last:]), (*self._stops[:first], stop, *self._stops[last:])
        )

    def gaps(self, start: bytes, stop: bytes | None) -> list[tuple[bytes, bytes | None]]:
        """Return the parts of a range that aren't covered, in order."""
        if stop is not None and stop <= start:
            return []
        gaps: list[tuple[bytes, bytes | None]] = []
        at = max(0, bisect_right(self._starts, start) - 1)
        here: bytes | None = start
        while here is not None and at < len(self._starts) and (stop is None or self._starts[at] < stop):
            begin, end = self._starts[at], self._stops[at]
            if here < begin:
                gaps.append((here, begin))
            here = None if end is None else max(here, end)
            at += 1
        if here is not None and (stop is None or here < stop):
            gaps.append((here, stop))
        return gaps
