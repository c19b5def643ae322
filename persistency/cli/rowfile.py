"""Row files: what an import reads, whatever its format, and how formats are told apart.

Rules:
  1. A format is named by `--format`, else by the suffix, before a .gz.
  2. A source knows the line it is at: what is told of an import is told in lines.

Doesn't know: jobs, how a format is spelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import NamedTuple

from persistency import Key
from persistency.cli.infile import InFile


class Format(StrEnum):
    """The formats rows are moved in."""

    jsonl = "jsonl"
    csv = "csv"
    cbor = "cbor"


_SUFFIXES = {".jsonl": Format.jsonl, ".ndjson": Format.jsonl, ".csv": Format.csv, ".cbor": Format.cbor}


def format_of(path: Path) -> Format | None:
    """Return the format that a file's name says, if it says one."""
    inner = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return _SUFFIXES.get(inner.suffix.lower())


class TakenRow(NamedTuple):
    """A row as a file has it; `None` for what the file doesn't say: the category, and an end."""

    category: str | None
    key: Key
    payload: bytes
    expires_ms: int | None = None


class RowFile:
    """A file of rows, read once, by what reads its format."""

    def __init__(self, file: InFile, rows: Callable[[InFile], Iterator[TakenRow]]) -> None:
        self._file = file
        self._rows = rows
        self.size: int | None = file.size
        self.title: str = file.title
        self.name: str = file.name

    @property
    def position(self) -> int:
        """How far it was read, in bytes."""
        return self._file.position

    @property
    def line(self) -> int:
        """The line that was read last, from 1."""
        return self._file.line

    @property
    def where(self) -> str:
        """The place that was read last, for messages."""
        return self._file.where

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __iter__(self) -> Iterator[TakenRow]:
        return self._rows(self._file)
