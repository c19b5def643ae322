"""Files that are read in: plain or gzip, a file or stdin, in lines or in pieces.

Rules:
  1. Whether it is gzip is seen in its first bytes, so that pipes and other names work too.
  2. What is wrong is a `Fault` that names the file; lines are counted from 1, and a line has a longest length.
  3. One line, or one piece, is in memory at a time.

Doesn't know: what is in the lines.
"""

from __future__ import annotations

import gzip
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path
from typing import IO, cast

from persistency.cli.ending import Fault

STDIN = "-"
_GZIP_MAGIC = b"\x1f\x8b"
_PIECE_BYTES = 64 * 1024


class InFile:
    """A file that is read once; `-` is stdin. `size` and `position` count its bytes as they are on the disk.

    Opening it raises the `OSError` of the file system.
    """

    def __init__(self, path: Path) -> None:
        self.name: str = "stdin" if str(path) == STDIN else str(path)
        self.title: str = "stdin" if str(path) == STDIN else path.name
        self.line: int = 0
        self._raw = cast("BufferedReader", sys.stdin.buffer) if str(path) == STDIN else path.open("rb")
        self._content: IO[bytes] | None = None
        found = os.fstat(self._raw.fileno())
        # A pipe has no size, and no position either.
        self.size: int | None = found.st_size if stat.S_ISREG(found.st_mode) else None

    @property
    def position(self) -> int:
        """How far it was read, in bytes."""
        return 0 if self.size is None else self._raw.tell()

    @property
    def where(self) -> str:
        """The place that was read last, for messages."""
        return f"{self.name}, line {self.line}"

    def close(self) -> None:
        """Close the file."""
        if self._content is not None:
            self._content.close()
        self._raw.close()

    def next_line(self, bytes_max: int) -> bytes:
        """Return the next line with its end; nothing at the end of the file."""
        self.line += 1
        line = self._read(lambda content: content.readline(bytes_max + 1))
        if len(line) > bytes_max:
            raise Fault(f"{self.where}: over {bytes_max} bytes without an end of line")
        if not line:
            self.line -= 1  # there is none
        return line

    def pieces(self) -> Iterator[bytes]:
        """Give what is in it, a piece at a time."""
        while piece := self._read(lambda content: content.read1(_PIECE_BYTES)):  # type: ignore[attr-defined]
            yield piece

    def _read(self, read: Callable[[IO[bytes]], bytes]) -> bytes:
        if self._content is None:
            packed = self._raw.peek(2)[:2] == _GZIP_MAGIC
            self._content = cast("IO[bytes]", gzip.GzipFile(fileobj=self._raw)) if packed else self._raw
        try:
            return read(self._content)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            where = self.where if self.line else self.name
            raise Fault(f"{where}: the gzip file is damaged: {error}") from error
