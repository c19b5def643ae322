"""How a stream of rows is cut where a contender takes many at a time.

Rules:
  1. A group has no more rows than this engine's: somebody who is handed rows one after the other can't gather more.
     Of large payloads it has fewer, so that it fits into page caches and write buffers: every peer is faster so.
  2. Where sorting helps it is within a group, for the same reason; of equal keys the last one still wins.

Doesn't know: which contender uses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from operator import itemgetter

from benchmarks.protocol import Pair, PutAll, PutOne

GROUP_ROWS = 8_192
GROUP_BYTES = 2**23
SAMPLE_ROWS = 64


def groups(rows: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """Cut rows into groups, in the order in which they come."""
    size = _group_rows(rows)
    for at in range(0, len(rows), size):
        yield rows[at : at + size]


def sorted_groups(rows: Sequence[Pair]) -> Iterator[Sequence[Pair]]:
    """Cut rows into groups, each of them in key order."""
    for group in groups(rows):
        yield sorted(group, key=itemgetter(0))


def one_by_one(put: PutOne) -> PutAll:
    """Return what puts rows by one call each."""

    def put_all(rows: Sequence[Pair]) -> None:
        for key, payload in rows:
            put(key, payload)

    return put_all


def _group_rows(rows: Sequence[Pair]) -> int:
    # By a sample: adding up the bytes of every row would cost the contenders time that isn't theirs.
    sample = rows[:: max(1, len(rows) // SAMPLE_ROWS)]
    nbytes = sum(len(payload) for _key, payload in sample)
    return max(1, min(GROUP_ROWS, GROUP_BYTES * len(sample) // max(1, nbytes)))
