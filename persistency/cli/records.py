"""Records: the lines of a JSON file, plain or gzip, each as a key and a payload.

Rules:
  1. A line is one JSON object; the key is made of the fields named, the payload is the whole record in CBOR. Empty
     lines are skipped.
  2. What is wrong is a `Fault` that names the file and the line; lines are counted from 1.
  3. One line is in memory at a time, and a line has a longest length.

Doesn't know: jobs, what is done with the records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from persistency import Key, Misuse, key
from persistency.cli.ending import Fault, hint_of
from persistency.cli.infile import InFile
from persistency.cli.jsonable import loads
from persistency.codec.values import encode

LINE_BYTES_MAX = 64 * 1024 * 1024
_LINE_HINT = "Each line must be one JSON object; of another format say --format csv or cbor."


class RecordFile:
    """A file of records, read once. `size` and `position` count its bytes as they are on the disk.

    Opening it raises the `OSError` of the file system.
    """

    def __init__(self, path: Path, fields: tuple[str, ...]) -> None:
        self._file = InFile(path)
        self._fields = fields
        self.size: int | None = self._file.size
        self.title: str = self._file.title

    @property
    def position(self) -> int:
        """How far it was read, in bytes."""
        return self._file.position

    @property
    def where(self) -> str:
        """The place that was read last, for messages."""
        return self._file.where

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __iter__(self) -> Iterator[tuple[Key, bytes]]:
        return records_of(self._file, self._fields)


def records_of(file: InFile, fields: tuple[str, ...]) -> Iterator[tuple[Key, bytes]]:
    """Give the keys and payloads of a file's records."""
    for record in objects_of(file):
        key_of_it = record_key(file, record, fields)
        try:
            payload = encode(record)
        except Misuse as error:
            raise Fault(f"{file.where}: {error}", hint_of(error)) from error
        yield key_of_it, payload


def objects_of(file: InFile) -> Iterator[dict[str, Any]]:
    """Give the JSON object of each line that isn't empty."""
    while line := file.next_line(LINE_BYTES_MAX):
        if line.isspace():
            continue
        try:
            record = loads(line.decode("utf-8-sig" if file.line == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise Fault(f"{file.where}: not JSON: {error}", _LINE_HINT) from error
        except ValueError as error:
            raise Fault(f"{file.where}: {error}", _LINE_HINT) from error
        if not isinstance(record, dict):
            raise Fault(f"{file.where}: {kind_of(record)}, not an object", _LINE_HINT)
        yield record


def record_key(file: InFile, record: Mapping[str, Any], fields: tuple[str, ...]) -> Key:
    """Return the key that the named fields of a record make."""
    try:
        return key(*(_part(file, record, field) for field in fields))
    except Misuse as error:
        raise Fault(f"{file.where}: {error}", hint_of(error)) from error


def _part(file: InFile, record: Mapping[str, Any], field: str) -> Any:
    if field not in record:
        names = ", ".join(list(record)[:20])
        raise Fault(f"{file.where}: no field {field!r}", f"The record has: {names or 'no fields'}.")
    part = record[field]
    if isinstance(part, dict | list):
        hint = "A part of a key is a text, a number, true, false or null."
        raise Fault(f"{file.where}: field {field!r} is {kind_of(part)}, which can't be a part of a key", hint)
    return part


def kind_of(value: Any) -> str:
    """Return what JSON calls a value."""
    names = {dict: "an object", list: "an array", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
