"""Bulk: how any number of rows becomes one SQL statement.

SQLite reads the rows from an array by itself, and takes the interpreter lock not once in between. (A statement of many
VALUES is ended and begun again every few hundred rows; beside a thread that keeps the interpreter busy each of these
times costs 5 ms.) A row comes as one blob:

    [place]  its place in the order of arrival, as a character of four bytes of UTF-8; where rows are in key order
    length   of its key, as a character of three bytes
    [end]    sixteen decimal digits, zero for none; where rows have an end
    key, payload

Rules:
  1. A chunk is of one category. Big ones go in key order, because a B-tree takes neighbours together; versions still
     follow the order of arrival.
  2. So many rows go to a statement that the copy of them stays small, however many there are.

Doesn't know: transactions, what is counted or kept beside the rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, islice
from operator import le
from typing import Any, NamedTuple

import apsw

SORT_ROWS_MIN = 64  # below that, sorting costs more than it saves
# At once: the wider they are spread, the more of them come to one page. No more than characters of four bytes in UTF-8.
SORT_ROWS_MAX = 2**17
# Per statement. Fewer would be slower beside threads that keep the interpreter busy, as who puts is one: each statement
# may have to wait 5 ms for it.
TOGETHER_ROWS_MAX = 8_192
# Of those that are spread over the file: for a statement's end SQLite keeps each page as it was before.
SPREAD_ROWS_MAX = 4_096
TOGETHER_BYTES_MAX = 4 * 1024 * 1024  # copied once
_MARKS_KEPT = 65_536
_END_DIGITS = 16

UPSERT = (
    " ON CONFLICT (category, key) DO UPDATE SET"
    " payload = excluded.payload, version = excluded.version, expires_ms = excluded.expires_ms"
)


class Statements(NamedTuple):
    """What writes a chunk's rows, and what notes down that they were put. Bindings: category, version before, array."""

    rows: str
    changes: str


class Rows(NamedTuple):
    """Rows in the order of arrival; `ends` are their expiries, where some have one.

    `before` is the version before the first one's.
    """

    categories: Sequence[bytes]
    keys: Sequence[bytes]
    payloads: Sequence[bytes]
    ends: Sequence[int | None] | None
    before: int

    def part(self, at: int, count: int) -> Rows:
        """Return so many rows from a place on."""
        some = slice(at, at + count)
        ends = None if self.ends is None else self.ends[some]
        return Rows(self.categories[some], self.keys[some], self.payloads[some], ends, self.before + at)


class Chunk(NamedTuple):
    """Rows that one statement takes."""

    statements: Statements
    category: bytes
    before: int  # the version that place 0 stands for, less one
    array: Any
    size: int


def _statements(*, placed: bool, ends: bool) -> Statements:
    at = 5 if placed else 1
    key = at + 3 + (_END_DIGITS if ends else 0)
    length = f"unicode(CAST(substr(value, {at}, 3) AS TEXT)) - 2048"
    version = "?2 + " + ("unicode(CAST(substr(value, 1, 4) AS TEXT)) - 65535" if placed else "rowid")
    end = f", nullif(CAST(CAST(substr(value, {at} + 3, {_END_DIGITS}) AS TEXT) AS INTEGER), 0)" if ends else ""
    columns = f"substr(value, {key}, {length}), substr(value, {key} + {length}), {version}"
    into = "INSERT INTO kv (category, key, payload, version" + (", expires_ms) " if ends else ") ")
    return Statements(
        rows=f"{into}SELECT ?1, {columns}{end} FROM carray(?3) WHERE true{UPSERT}",
        changes="INSERT INTO changes (kind, category, key, payload, version) "
        f"SELECT 'put', ?1, {columns} FROM carray(?3)",
    )


_STATEMENTS = {
    (placed, ends): _statements(placed=placed, ends=ends) for placed in (False, True) for ends in (False, True)
}


class _Marks(dict[int, bytes]):
    """Numbers as single characters in UTF-8, from one on of which all take the same number of bytes."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __missing__(self, number: int) -> bytes:
        mark = self[number] = chr(self._first + number).encode()
        if len(self) > _MARKS_KEPT:
            self.clear()
        return mark


class _Ends(dict[int | None, bytes]):
    """Ends as digits; many rows have the same."""

    def __missing__(self, end: int | None) -> bytes:
        mark = self[end] = b"%0*d" % (_END_DIGITS, end or 0)
        if len(self) > _MARKS_KEPT:
            self.clear()
        return mark


_LENGTHS = _Marks(2048)  # up to 10,240, far below the surrogates
_PLACES = _Marks(65_536)
_ENDS = _Ends()
# Part of SQLite's own source, but a build may leave it out; then each row has its statement.
CARRAY = hasattr(apsw, "carray") and "ENABLE_CARRAY" in apsw.compile_options


def _in_order(keys: Sequence[bytes]) -> bool:
    return all(map(le, keys, islice(keys, 1, None)))


def chunks(rows: Rows) -> Iterator[Chunk]:
    """Give rows as chunks to be written."""
    count = len(rows.keys)
    size = (sum(map(len, rows.keys)) + sum(map(len, rows.payloads))) // count + 1
    step = min(max(1, TOGETHER_BYTES_MAX // size), TOGETHER_ROWS_MAX)
    if count <= SORT_ROWS_MAX:
        yield from _chunks(rows, step)
    else:
        for at in range(0, count, SORT_ROWS_MAX):
            yield from _chunks(rows.part(at, SORT_ROWS_MAX), step)


def _chunks(rows: Rows, step: int) -> Iterator[Chunk]:
    count = len(rows.keys)
    one_category = rows.categories.count(rows.categories[0]) == count
    if not one_category or (count >= SORT_ROWS_MIN and not _in_order(rows.keys)):
        yield from _sorted(rows, min(step, SPREAD_ROWS_MAX))
    elif count <= step:
        yield _as_they_came(rows)
    else:
        for at in range(0, count, step):
            yield _as_they_came(rows.part(at, step))


def _as_they_came(rows: Rows) -> Chunk:
    categories, keys, payloads, ends, before = rows
    parts: list[Iterable[bytes]] = [map(_LENGTHS.__getitem__, map(len, keys)), keys, payloads]
    if ends is not None:
        parts.insert(1, map(_ENDS.__getitem__, ends))
    blobs = tuple(map(b"".join, zip(*parts, strict=True)))
    return Chunk(_STATEMENTS[False, ends is not None], categories[0], before, apsw.carray(blobs), len(blobs))


def _sorted(rows: Rows, step: int) -> Iterator[Chunk]:
    categories, keys, payloads, ends, before = rows
    statements = _STATEMENTS[True, ends is not None]
    # Twice stable: by key, then by category. Of equal keys the later row stays the later one, and wins.
    order = sorted(range(len(keys)), key=keys.__getitem__)
    order.sort(key=categories.__getitem__)
    for category, places in groupby(order, categories.__getitem__):
        while True:
            some = islice(places, step)  # noqa: B031  # the next of them, each time
            if ends is None:
                blobs = tuple(b"".join((_PLACES[at], _LENGTHS[len(keys[at])], keys[at], payloads[at])) for at in some)
            else:
                blobs = tuple(
                    b"".join((_PLACES[at], _LENGTHS[len(keys[at])], _ENDS[ends[at]], keys[at], payloads[at]))
                    for at in some
                )
            if not blobs:
                break
            yield Chunk(statements, category, before, apsw.carray(blobs), len(blobs))
            del blobs
