"""How a stream of rows is cut where a contender takes many at a time.

Rules:
  1. A group is as large as this engine's: somebody who is handed rows one after the other can't gather more of them.
  2. Where sorting helps it is within a group, for the same reason; of equal keys the last one still wins.

Doesn't know: which contender uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter

from benchmarks.protocol import Pair

GROUP_ROWS = 8_192


def groups(rows: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """Cut rows into groups, in the order in which they come."""
    for at in range(0, len(rows), GROUP_ROWS):
        yield rows[at : at + GROUP_ROWS]


def sorted_groups(rows: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """Cut rows into groups, each of them in key order."""
    for group in groups(rows):
        yield sorted(group, key=itemgetter(0))
