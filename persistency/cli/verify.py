"""Checks: what was found against what was posted, each giving a list of faults in words, empty if all is right.

Rules:
  1. A check counts for itself: it believes no number that the part it checks has computed.
  2. It says what the first difference is, and how many rows there are in all.

Doesn't know: jobs, the terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from persistency import Key, Row


def rows_faults(what: str, found: Iterable[Row], expected: Sequence[Key], digests: Mapping[Key, int]) -> list[str]:
    """Compare rows with the keys expected, in that order, and with the digests of their payloads."""
    faults: list[str] = []
    count = 0
    for row in found:
        if not faults and count < len(expected):
            wanted = expected[count]
            if row.key != wanted:
                faults.append(f"{what}: row {count} is {row.key!r}, not {wanted!r}")
            elif hash(row.payload) != digests[wanted]:
                faults.append(f"{what}: {wanted!r} has another payload than was posted")
        count += 1
    return faults + count_faults(what, count, len(expected))


def count_faults(what: str, found: int, expected: int) -> list[str]:
    """Compare two counts."""
    return [] if found == expected else [f"{what}: {found:,} rows, not {expected:,}"]


def prefix_faults(rows: Iterable[Row], expected: Iterable[Row]) -> tuple[int, list[str]]:
    """Compare what survived a kill with what was posted, which must begin with it; return how many rows survived.

    `expected` may go on for ever.
    """
    wanted = iter(expected)
    count = 0
    faults: list[str] = []
    for row in rows:
        if not faults:
            posted = next(wanted, None)
            if posted is None:
                faults.append(f"after the kill: row {count} is {row.key!r}, which was never posted")
            elif row.key != posted.key:
                faults.append(f"after the kill: row {count} is {row.key!r}, not {posted.key!r}: there is a hole")
            elif row.payload != posted.payload:
                faults.append(f"after the kill: {row.key!r} has another payload than was posted")
        count += 1
    return count, faults


def survival_faults(posted: int, flushed: int, recovered: int) -> list[str]:
    """Compare the numbers of a killed writer: nothing flushed may be lost, and nothing be there that wasn't posted.

    `posted` counts the puts that had returned; one more may have been under way.
    """
    faults = []
    if recovered < flushed:
        faults.append(f"after the kill: {recovered:,} rows, but {flushed:,} had been flushed")
    if recovered > posted + 1:
        faults.append(f"after the kill: {recovered:,} rows, but only {posted:,} had been posted")
    return faults
