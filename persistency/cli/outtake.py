"""The outtake: rows of a job become a file. The work behind `persistency export`.

Rules:
  1. It reads as a reader does, a few rows at a time: a job may be in use meanwhile, and of any size.
  2. It is no snapshot: a row that is there throughout is in it once, of others it may have some.
  3. CSV is read twice, for its columns come before its rows.

Doesn't know: the terminal, how a format is spelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import IO

from persistency import Entry, Job, Key, Reader
from persistency.cli import cborstream, csvrows, jsonlines
from persistency.cli.rowfile import Format

_ASKED_AT_ONCE = 128
_BYTES_AT_ONCE = 4 * 1024 * 1024
_ADVANCE_EVERY = 256


def give_out(
    reader: Reader,
    categories: list[str],
    into: IO[bytes],
    form: Format,
    fields: tuple[str, ...] | None,
    advance: Callable[[int], None],
) -> int:
    """Write the rows of some categories to a file; return how many there were.

    Raises `Fault` for what the format can't hold. CSV takes one category.
    """
    rows = _rows_of(reader, categories)
    if form is Format.cbor:
        return _counted(cborstream.write_stream(reader, rows, into.write), advance)
    if form is Format.jsonl:
        return _counted(_lines(rows, into), advance)
    table = csvrows.Table(fields)
    for _category, entry in rows:
        table.widen(entry)
    again = (entry for _category, entry in _rows_of(reader, categories))
    return _counted(table.write_rows(again, lambda text: into.write(text.encode())), advance)


def _rows_of(reader: Reader, categories: list[str]) -> Iterator[tuple[str, Entry]]:
    for category in categories:
        for entry in entries_of(reader, category):
            yield category, entry


def entries_of(reader: Reader | Job, category: str) -> Iterator[Entry]:
    """Give the rows of a category with their ends, in the order of their keys."""
    keys: Iterator[Key] = iter(reader.iterate(category, keys_only=True))
    at_once = _ASKED_AT_ONCE
    while page := list(islice(keys, at_once)):
        found = [reply.result() for reply in [reader.entry(category, key) for key in page]]
        nbytes = 0
        for entry in found:
            if entry is not None:  # else it was deleted meanwhile
                nbytes += len(entry.payload)
                yield entry
        at_once = _ASKED_AT_ONCE if nbytes < _BYTES_AT_ONCE else 1


def _lines(rows: Iterable[tuple[str, Entry]], into: IO[bytes]) -> Iterator[int]:
    for count, (category, entry) in enumerate(rows, 1):
        into.write(jsonlines.line_of(category, entry))
        yield count


def _counted(counts: Iterator[int], advance: Callable[[int], None]) -> int:
    count = 0
    for count in counts:
        if not count % _ADVANCE_EVERY:
            advance(count)
    return count
