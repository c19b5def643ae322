"""Rows as JSON lines: `{"category": ..., "key": [...], "value": ..., "expires_ms": ...}`, or records without a key.

Rules:
  1. What is written here is read back as the same rows, to the byte of each payload and the millisecond of each end.
  2. A line may leave out its category and its end.
  3. Records whose fields make the key are stored as they stand: nothing in them has another meaning than JSON's.

Doesn't know: jobs, files but for their lines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from persistency import Entry, Key
from persistency.cli.ending import Fault
from persistency.cli.infile import InFile
from persistency.cli.jsonable import exact_json, payload_from_json
from persistency.cli.keys import key_from_json, key_to_json
from persistency.cli.records import objects_of, records_of
from persistency.cli.rowfile import TakenRow

_MEMBERS = {"category", "key", "value", "expires_ms"}
_HINT = 'A line is {"key": [...], "value": ...}; of other records name the fields that make the key: --key section,name'


def line_of(category: str, entry: Entry) -> bytes:
    """Return the line of a row."""
    line = {"category": category, "key": key_to_json(entry.key), "value": exact_json(entry.payload)}
    if entry.expires_ms is not None:
        line["expires_ms"] = entry.expires_ms
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def rows_of(file: InFile, fields: tuple[str, ...] | None) -> Iterator[TakenRow]:
    """Give the rows of a file's lines; with `fields`, of records whose fields make the key."""
    if fields is not None:
        for key, payload in records_of(file, fields):
            yield TakenRow(None, key, payload)
        return
    for line in objects_of(file):
        yield _row(file, line)


def _row(file: InFile, line: dict[str, Any]) -> TakenRow:
    lacking = {"key", "value"} - line.keys()
    if lacking:
        raise Fault(f"{file.where}: no {' and no '.join(repr(name) for name in sorted(lacking))}", _HINT)
    if beyond := sorted(line.keys() - _MEMBERS):
        raise Fault(f"{file.where}: {beyond[0]!r} is nothing a row has", _HINT)
    category, expires_ms = line.get("category"), line.get("expires_ms")
    if not isinstance(category, str | None):
        raise Fault(f"{file.where}: the category isn't a text")
    if expires_ms is not None and type(expires_ms) is not int:
        raise Fault(f"{file.where}: expires_ms isn't a number of milliseconds")
    try:
        key: Key = key_from_json(line["key"])
        return TakenRow(category, key, payload_from_json(line["value"]), expires_ms)
    except ValueError as error:
        raise Fault(f"{file.where}: {error}") from error
