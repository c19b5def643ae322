"""Records: the lines of a JSON file, plain or gzip, each as a key and a payload.

Rules:
  1. A line is one JSON object; the key is made of the fields named, the payload is the whole record in CBOR. Empty
     lines are skipped.
  2. What is wrong is a `Fault` that names the file and the line; lines are counted from 1.
  3. One line is in memory at a time, and a line has a longest length.
  4. Whether a file is gzip is seen in its first bytes, so that pipes and other names work too.

Doesn't know: jobs, what is done with the records.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from persistency import Key, Misuse, key
from persistency.cli.ending import Fault
from persistency.codec.values import encode

LINE_BYTES_MAX = 64 * 1024 * 1024
_GZIP_MAGIC = b"\x1f\x8b"


class RecordFile:
    """A file of records, read once. `size` and `position` count its bytes as they are on the disk.

    Opening it raises the `OSError` of the file system.
    """

    def __init__(self, path: Path, fields: tuple[str, ...]) -> None:
        self._path = path
        self._fields = fields
        self._line = 0
        self._raw = open(path, "rb")  # noqa: SIM115  # closed by close()
        self._lines: IO[bytes] = self._raw
        # A pipe has no size, and no position either.
        self.size = path.stat().st_size if self._raw.seekable() else None
        self.title = path.name

    @property
    def position(self) -> int:
        """How far it was read, in bytes."""
        return 0 if self.size is None else self._raw.tell()

    @property
    def where(self) -> str:
        """The place that was read last, for messages."""
        return f"{self._path}, line {self._line}"

    def close(self) -> None:
        """Close the file."""
        self._lines.close()
        self._raw.close()

    def __iter__(self) -> Iterator[tuple[Key, bytes]]:
        if self._raw.peek(2)[:2] == _GZIP_MAGIC:
            self._lines = cast("IO[bytes]", gzip.GzipFile(fileobj=self._raw))
        while line := self._next():
            if not line.isspace():
                yield self._record(line)

    def _next(self) -> bytes:
        self._line += 1
        try:
            line = self._lines.readline(LINE_BYTES_MAX + 1)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise Fault(f"{self.where}: the gzip file is damaged: {error}") from error
        if len(line) > LINE_BYTES_MAX:
            raise Fault(f"{self.where}: over {LINE_BYTES_MAX} bytes without an end of line")
        return line

    def _record(self, line: bytes) -> tuple[Key, bytes]:
        try:
            record = json.loads(line.decode("utf-8-sig" if self._line == 1 else "utf-8"))
        except (ValueError, RecursionError) as error:
            raise Fault(f"{self.where}: not JSON: {error}", "Each line must be one JSON object.") from error
        if not isinstance(record, dict):
            raise Fault(f"{self.where}: {_kind(record)}, not an object", "Each line must be one JSON object.")
        parts = [self._part(record, field) for field in self._fields]
        try:
            return key(*parts), encode(record)
        except Misuse as error:
            raise Fault(f"{self.where}: {error}", error.hint) from error

    def _part(self, record: dict[str, Any], field: str) -> Any:
        if field not in record:
            names = ", ".join(list(record)[:20])
            raise Fault(f"{self.where}: no field {field!r}", f"The record has: {names or 'no fields'}.")
        part = record[field]
        if isinstance(part, dict | list):
            hint = "A part of a key is a text, a number, true, false or null."
            raise Fault(f"{self.where}: field {field!r} is {_kind(part)}, which can't be a part of a key", hint)
        return part


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a text", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")
