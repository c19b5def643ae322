"""Comparing: whether a job's copy has the same rows, in the same order, and no others.

Rules:
  1. Every row is read again on both sides, as it is stored there; nothing that the copying has counted is believed.
  2. Rows are the same by category, key, payload and end. Versions are of each side's own: they must grow alike.
  3. It takes the memory of a page, and of no more.

Doesn't know: how the copy was made, roots, the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256

from persistency import Entry, Job
from persistency.cli.ending import Fault
from persistency.cli.keys import format_key
from persistency.cli.ordering import Order
from persistency.codec.values import encode

_ADVANCE_EVERY = 256


@dataclass(slots=True)
class Compared:
    """What both sides have: rows, bytes of keys and payloads, rows by category, and the digest of all of it."""

    rows: int
    nbytes: int
    categories: dict[str, int]
    sha256: str


def compare(one: Job, other: Job, order: Order, beside: str, advance: Callable[[int], None]) -> Compared:
    """Read all rows of an order on both sides; `beside` is a category that only the other one has, and no row of it.

    Raises `Fault` for the first row that differs.
    """
    sums = sha256(), sha256()
    found = Compared(0, 0, {}, "")
    latest = 0
    for category, ours, theirs in _pairs(one, other, order):
        if ours is None:
            raise Fault(f"a row of category {category!r} has gone from job {one.id!r} meanwhile")
        at = f"{format_key(ours.key)} in category {category!r}"
        if theirs is None:
            raise Fault(f"the copy lacks {at}")
        for digest, entry in zip(sums, (ours, theirs), strict=True):
            digest.update(b"".join(map(encode, (category, bytes(entry.key), entry.payload, entry.expires_ms))))
        if sums[0].digest() != sums[1].digest():
            raise Fault(f"the copy has another payload or end of {at}")
        if theirs.version <= latest:
            raise Fault(f"the copy has {at} in another place of the order in which rows were written")
        latest = theirs.version
        found.rows += 1
        found.nbytes += len(ours.key) + len(ours.payload)
        found.categories[category] = found.categories.get(category, 0) + 1
        if not found.rows % _ADVANCE_EVERY:
            advance(found.rows)
    for job in (one, other):
        _check_counts(job, found, beside)
    found.categories = dict(sorted(found.categories.items()))
    found.sha256 = sums[0].hexdigest()
    return found


def _pairs(one: Job, other: Job, order: Order) -> Iterator[tuple[str, Entry | None, Entry | None]]:
    for page in order.pages():
        # All are asked for before the first is waited for: one turn of the job, not one for each row.
        asked = [(category, one.entry(category, at), other.entry(category, at)) for category, at in page]
        for category, ours, theirs in asked:
            yield category, ours.result(), theirs.result()


def _check_counts(job: Job, found: Compared, beside: str) -> None:
    """Raise `Fault` if a job has rows that weren't compared."""
    counts = {name: job.count(name).result() for name in job.categories().result() if name != beside}
    if counts != found.categories:
        raise Fault(f"{found.rows:,} rows were compared, and job {job.id!r} has {sum(counts.values()):,}")
