"""Rows as CSV (RFC 4180): a header, then a record per row, with its key in a column of its own or in named columns.

    key,name,size                   section,package,size
    games/chess,Chess,1             games,chess,1

A cell is a text, unless it is spelled just as JSON spells a number, `true`, `false` or `null`: then it is that. A text
that looks like one of those, or is empty, is written as a JSON string: `"7"`. An empty cell is a field that isn't
there.

Rules:
  1. What is written here is read back as the same keys with equal values. What a table can't hold (a value that is no
     record, a list in a field, a row that ends) is a fault that names the key; nothing is left out.
  2. The columns are all fields there are, in the order in which they first appear.

Doesn't know: jobs, files but for their lines.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from persistency import Corrupt, Entry, Key, Misuse, key
from persistency.cli.ending import Fault
from persistency.cli.infile import InFile
from persistency.cli.jsonable import payload_of
from persistency.cli.keys import format_key, parse_key
from persistency.cli.records import LINE_BYTES_MAX, record_key
from persistency.cli.rowfile import TakenRow
from persistency.codec.values import decode

KEY_COLUMN = "key"
FIELDS_MAX = 10_000
_WORDS = {"null": None, "true": True, "false": False}
_INSTEAD = "Export JSON lines or CBOR: they hold everything."


# -- written -----------------------------------------------------------------------------------------------------


class Table:
    """The columns of a CSV file and what is written in them. `fields` make the key, if they are given."""

    def __init__(self, fields: tuple[str, ...] | None) -> None:
        self._fields = fields
        self._columns: dict[str, None] = {} if fields is not None else {KEY_COLUMN: None}

    def widen(self, entry: Entry) -> None:
        """Take in the columns of a row to come."""
        self._columns.update(dict.fromkeys(self._record(entry)))
        if len(self._columns) > FIELDS_MAX:
            raise Fault(f"the records have more than {FIELDS_MAX:,} different fields", _INSTEAD)

    def write_rows(self, entries: Iterable[Entry], write: Callable[[str], object]) -> Iterator[int]:
        """Write the header and every row; give how many were written, after each."""
        writer = csv.writer(_Lines(write), lineterminator="\r\n")
        writer.writerow(self._columns)
        for count, entry in enumerate(entries, 1):
            record = self._record(entry)
            if strange := record.keys() - self._columns.keys():
                raise _refused(entry.key, f"got the field {min(strange)!r} meanwhile", "Do it again.")
            writer.writerow([self._cell(entry.key, name, record) for name in self._columns])
            yield count

    def _cell(self, key_: Key, name: str, record: dict[str, Any]) -> str:
        if name not in record:
            return ""
        if name == KEY_COLUMN and self._fields is None:
            return str(record[name])
        value = record[name]
        if isinstance(value, str):
            return value if value and read_cell(value) == value else json.dumps(value, ensure_ascii=False)
        if not isinstance(value, bool | int | float | None) or (isinstance(value, float) and value - value != 0):
            raise _refused(key_, f"its field {name!r} is neither a text nor a number, true, false or null")
        return json.dumps(value)

    def _record(self, entry: Entry) -> dict[str, Any]:
        """Return a row as a record: with its key in a column, or as it stands, if its fields make the key."""
        if entry.expires_ms is not None:
            raise _refused(entry.key, "has an end")
        try:
            record = decode(entry.payload)
        except Corrupt:
            record = None
        if not isinstance(record, dict) or not all(isinstance(name, str) and name for name in record):
            raise _refused(entry.key, "its value is no record (a map from names to values)")
        if self._fields is None:
            if KEY_COLUMN in record:
                raise _refused(entry.key, f"has a field {KEY_COLUMN!r} besides its key")
            return {KEY_COLUMN: format_key(entry.key)} | record
        try:
            made = key(*(record[name] for name in self._fields))
        except (KeyError, Misuse):
            made = None
        if made != entry.key:
            hint = "Without --key, or with other fields, it can be exported."
            raise _refused(entry.key, f"its key isn't made of the record's {', '.join(self._fields)}", hint)
        return record


class _Lines:
    """What a `csv.writer` writes to."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self.write = write


def _refused(key_: Key, why: str, hint: str = _INSTEAD) -> Fault:
    return Fault(f"CSV can't hold {format_key(key_)}: {why}", hint)


# -- read --------------------------------------------------------------------------------------------------------


def rows_of(file: InFile, fields: tuple[str, ...] | None) -> Iterator[TakenRow]:
    """Give the rows of a CSV file; with `fields`, those columns make the key, and are stored like the others."""
    csv.field_size_limit(LINE_BYTES_MAX)
    lines = csv.reader(_lines(file), strict=True)
    header: list[str] | None = None
    while (cells := _next(file, lines)) is not None:
        if not cells:
            continue  # an empty line
        if header is None:
            header = _checked_header(file, cells, fields)
            continue
        if len(cells) != len(header):
            raise Fault(f"{file.where}: {len(cells)} cells, and the header has {len(header)}")
        yield _row(file, dict(zip(header, cells, strict=True)), fields)


def _row(file: InFile, cells: dict[str, str], fields: tuple[str, ...] | None) -> TakenRow:
    record = {name: read_cell(cell) for name, cell in cells.items() if cell and (fields or name != KEY_COLUMN)}
    try:
        made = parse_key(cells[KEY_COLUMN]) if fields is None else record_key(file, record, fields)
        return TakenRow(None, made, payload_of(record))
    except ValueError as error:
        raise Fault(f"{file.where}: {error}") from error


def read_cell(text: str) -> Any:
    """Return what a cell says: a number, true, false or null if it is spelled just so, and else a text."""
    if text in _WORDS:
        return _WORDS[text]
    if text[:1] not in '"-0123456789':
        return text
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if text[:1] == '"':
        return value
    return value if type(value) in (int, float) and json.dumps(value) == text and value - value == 0 else text


def _checked_header(file: InFile, names: list[str], fields: tuple[str, ...] | None) -> list[str]:
    if "" in names or len(set(names)) != len(names):
        raise Fault(f"{file.where}: two columns have one name, or one has none")
    lacking = [name for name in fields or (KEY_COLUMN,) if name not in names]
    if lacking:
        hint = f"The columns are: {', '.join(names[:20])}. Name those that make the key: --key {names[0]}"
        if len(names) == 1 and (other := next((mark for mark in ";\t|" if mark in names[0]), None)):
            hint = f"There is {other!r} between its cells; CSV has commas."
        raise Fault(f"{file.where}: no column {lacking[0]!r}", hint)
    return names


def _next(file: InFile, lines: Iterator[list[str]]) -> list[str] | None:
    begun = file.line + 1
    try:
        return next(lines, None)
    except csv.Error as error:
        if "new-line character" in str(error):  # its own words are about the arguments of `open`
            raise Fault(f"{file.where}: not CSV: a carriage return in the middle of a line") from error
        hint = "A quote that was opened in it isn't closed." if file.line > begun else ""
        raise Fault(f"{file.name}, line {begun}: not CSV: {error}", hint) from error


def _lines(file: InFile) -> Iterator[str]:
    while line := file.next_line(LINE_BYTES_MAX):
        try:
            text = line.decode("utf-8-sig" if file.line == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise Fault(f"{file.where}: not CSV in UTF-8: {error}") from error
        if file.line == 1 and _is_json(text):
            raise Fault(f"{file.where}: it looks like JSON, not CSV", "Pass --format jsonl.")
        yield text


def _is_json(line: str) -> bool:
    if not line.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
