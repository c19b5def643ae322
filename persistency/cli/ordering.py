"""Ordering: the rows of a job in the order in which they were last written, which no scan has.

Rules:
  1. It is kept beside, in a job of a temporary directory: by version, the category and the key, no payload. So it
     takes the disk of the keys, and the memory of a page.

Doesn't know: payloads, what the order is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from tempfile import TemporaryDirectory
from typing import TypeAlias

from persistency import Job, Key, Persistency
from persistency.cli.outtake import entries_of
from persistency.codec.values import decode, encode

_ROWS = "rows"
_PAGE = 128
_ADVANCE_EVERY = 256
Place: TypeAlias = tuple[str, Key]
"""A category and a key."""


class Order:
    """Where the rows of a job are, by their versions; `rows` says how many."""

    def __init__(self, kept: Job) -> None:
        self._kept = kept
        self.rows: int = 0

    def add(self, version: int, category: str, at: Key) -> None:
        """Add a row."""
        self._kept.put(_ROWS, (version,), encode([category, bytes(at)]))
        self.rows += 1

    def pages(self) -> Iterator[list[Place]]:
        """Give the places of all rows, the one first that was written first, some at a time."""
        rows = iter(self._kept.iterate(_ROWS, page=_PAGE))
        while page := list(islice(rows, _PAGE)):
            places = (decode(row.payload) for row in page)
            yield [(category, Key(at)) for category, at in places]


@contextmanager
def order_of(job: Job, advance: Callable[[int], None]) -> Iterator[Order]:
    """Give the order of a job's rows, as long as it is needed."""
    with TemporaryDirectory(prefix="persistency-") as directory, Persistency(directory) as persistency:
        order = Order(persistency.open_job("order"))
        for category in job.categories().result():
            for entry in entries_of(job, category):
                order.add(entry.version, category, entry.key)
                if not order.rows % _ADVANCE_EVERY:
                    advance(order.rows)
        yield order
