"""Files that are written out: plain or gzip, a file or stdout.

Rules:
  1. A file is there whole or not at all: it is written beside its name, for its owner alone, and takes the name once
     all is in it and on the medium. What isn't a regular file (a pipe, a device) is written as it comes.
  2. A name that ends in .gz is written packed.
  3. A job's file is never written over.

Doesn't know: what is written.
"""

from __future__ import annotations

import gzip
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

from persistency.cli.ending import Fault

STDOUT = "-"
_JOBS_FILE = re.compile(r"\.(db(-wal|-shm|-journal)?|lock)$", re.IGNORECASE)
_NAME_CHARS_MAX = 60  # of the file's own name within that of the draft


@contextmanager
def writing(path: Path) -> Iterator[IO[bytes]]:
    """Give a file to write to, that takes its name at the end."""
    if str(path) == STDOUT:
        # With buffers of its own, whatever stdout has: a write without them may be cut short by a signal.
        sys.stdout.flush()
        with open(sys.stdout.fileno(), "wb", closefd=False) as file:
            yield file
        return
    try:
        with _written(path) as file:
            yield file
    except OSError as error:
        if error.filename is None or os.fsdecode(error.filename).endswith(".tmp"):
            error.filename = str(path)  # who has typed this knows nothing of a draft
        raise


def check_name(path: Path) -> None:
    """Refuse a name that is kept for a job's files."""
    if any(_JOBS_FILE.search(name) for name in (path.name, os.path.realpath(path))):
        raise Fault(f"{str(path)!r} is a name for a job's files", "Pass another one.")


@contextmanager
def _written(path: Path) -> Iterator[IO[bytes]]:
    check_name(path)
    packed = path.suffix.lower() == ".gz"
    if not _is_replaceable(path):
        with path.open("wb") as file, _packing(file, packed=packed) as into:
            yield into
        return
    draft = path.with_name(f".{path.name[:_NAME_CHARS_MAX]}.{os.urandom(8).hex()}.tmp")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with open(handle, "wb") as file:
            with _packing(file, packed=packed) as into:
                yield into
            file.flush()
            os.fsync(handle)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


@contextmanager
def _packing(file: IO[bytes], *, packed: bool) -> Iterator[IO[bytes]]:
    if not packed:
        yield file
        return
    # Without a name and a time in it the same rows make the same file.
    with gzip.GzipFile(filename="", fileobj=file, mode="wb", mtime=0) as into:
        yield cast("IO[bytes]", into)


def _is_replaceable(path: Path) -> bool:
    """Say whether a file of that name is a regular one, or is to be made."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except FileNotFoundError:
        return True
