"""The workload: rows, keys and payloads, all ready before anything is measured.

Rules:
  1. The same for every contender and every repetition; random orders come from a fixed seed.
  2. Peers get plain `bytes`: a subclass would cost them a conversion that isn't theirs.

Doesn't know: cases, contenders' stores.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from benchmarks.protocol import Contender, Pair, Way
from persistency import key
from persistency.codec import values

NAMES = 10  # so that a category holds a few long runs of neighbours, like the channels of a chat
OPERATIONS_MIN = 50
SCANNED = key("scanned")
SCANNED_ROWS = 10_000


def _payload(row: int, size: int) -> bytes:
    return (row.to_bytes(8, "big") * (size // 8 + 1))[:size]


@dataclass
class Workload:
    """`rows` rows with payloads of `payload_bytes`, in key order, and `scanned_rows` besides, which scans read."""

    rows: int = 200_000
    payload_bytes: int = 100
    scanned_rows: int = SCANNED_ROWS
    _plain: dict[int, list[Pair]] = field(default_factory=dict)

    @cached_property
    def ordered(self) -> list[Pair]:
        """The rows in key order."""
        per_name = -(-self.rows // NAMES)
        return [
            (key(f"channel-{row // per_name:02}", 100_000 + row % per_name), _payload(row, self.payload_bytes))
            for row in range(self.rows)
        ]

    @cached_property
    def shuffled(self) -> list[Pair]:
        """The same rows in random order."""
        return random.Random(1).sample(self.ordered, self.rows)

    @cached_property
    def scanned(self) -> list[Pair]:
        """Rows of a name of their own, in key order; `SCANNED` is the prefix of their keys."""
        return [(SCANNED + (row,), _payload(row, self.payload_bytes)) for row in range(self.scanned_rows)]

    def for_contender(self, contender: Contender, rows: list[Pair]) -> list[Pair]:
        """Return rows as a contender takes them."""
        if contender.takes_keys:
            return rows
        if id(rows) not in self._plain:
            self._plain[id(rows)] = [(bytes(encoded), payload) for encoded, payload in rows]
        return self._plain[id(rows)]

    def portion(self, way: Way, operations: int) -> int:
        """Return how many operations a way is measured with: all of them, or its share."""
        operations = min(operations, self.rows)
        return min(operations, max(OPERATIONS_MIN, int(operations * way.share)))


def read_packages(path: Path) -> list[Pair]:
    """Return the records of a package list: CBOR under the key of section and package."""
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [(key(record["section"], record["package"]), values.encode(record)) for record in records]


def picked(rows: Sequence[Pair], count: int) -> list[Pair]:
    """Return rows picked at random, some of them more than once."""
    return random.Random(2).choices(rows, k=count)
