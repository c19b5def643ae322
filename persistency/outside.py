"""Outside: files that are no job's, read from or written to: those a caller has open, and those of a path.

Rules:
  1. A path is written through a temporary file beside it, `.<name>.<random>.tmp` with mode 0600, that takes its name
     once all is in it and on the medium: the file is there whole or not at all.
  2. What a caller's own file raises is raised as it is; what the system says about a path is a `StorageError`.
  3. A caller's file is neither closed nor moved within, and may take or give less at a time than it is asked to.

Doesn't know: what is in a file, jobs.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from persistency.arguments import as_file, shown
from persistency.errors import DiskFull, Misuse, StorageError, Unavailable
from persistency.storage.files import sync_directory

# Where names ignore case these may.
_JOBS_FILE = re.compile(r"\.(db(-wal|-shm|-journal)?|lock)$", re.IGNORECASE)
_NAME_CHARS_MAX = 60  # of the path's own within that of the temporary file
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Sink(Protocol):
    """An open file that takes bytes."""

    def write(self, data: bytes, /) -> object:
        """Take bytes; a raw file, or another that counts, answers how many."""


class Source(Protocol):
    """An open file that gives bytes."""

    def read(self, size: int, /) -> bytes | None:
        """Give up to so many bytes, and none at the end."""


def as_target(value: Any, argument: str, database: Path | None) -> Any:
    """Return what is to be written: an open file, or the path of one to be. Raises `Misuse`.

    `database` is a job's file: names like those in its directory are refused, and so is any file of a job.
    """
    if not isinstance(value, str | os.PathLike):
        return _as_open_file(value, argument, "write", "writable")
    path = as_file(value, argument)
    named = _JOBS_FILE.search(path.name)
    if named is not None:
        lock = path.with_name(path.name[: named.start()] + ".lock")
        at_home = database is not None and os.path.realpath(path.parent) == os.path.realpath(database.parent)
        if at_home or os.path.lexists(lock):
            raise Misuse(f"{argument} is {str(path)!r}, which is kept for a job's files: pass another path")
    return path


def as_source(value: Any, argument: str) -> Any:
    """Return what is to be read: an open file, or the path of one. Raises `Misuse`."""
    if isinstance(value, str | os.PathLike):
        return as_file(value, argument)
    return _as_open_file(value, argument, "read", "readable")


def _as_open_file(value: Any, argument: str, verb: str, ability: str) -> Any:
    instead = f"pass a path, or a file opened in binary mode that has {verb}()"
    method = getattr(value, verb, None)
    if not callable(method) or isinstance(value, type):
        raise Misuse(f"{argument} must be a path or an open file, not {type(value).__name__}: {instead}")
    import inspect  # only here: it takes as long to import as a fifth of this package

    if inspect.iscoroutinefunction(method):
        raise Misuse(f"{argument}.{verb}() is a coroutine function, and is to be called in a plain thread: {instead}")
    # The wrappers of text files that `tempfile` and `codecs` have are known by their encoding.
    if isinstance(value, io.TextIOBase) or isinstance(getattr(value, "encoding", None), str):
        raise Misuse(f"{argument} is a text file: {instead}")
    if getattr(value, "closed", False) is True:
        raise Misuse(f"{argument} is a closed file: {instead}")
    able = getattr(value, ability, None)
    if callable(able) and able() is False:
        raise Misuse(f"{argument} isn't {ability}: {instead}")
    return value


@contextmanager
def writing(file: Any) -> Iterator[Callable[[bytes], None]]:
    """Give what writes bytes to a file, all of them; at the end they have left our hands, or have taken the path."""
    if not isinstance(file, Path):
        yield lambda data: _write_all(file, data)
        flush = getattr(file, "flush", None)
        if callable(flush):
            flush()  # what it has kept to itself and can't write, it should say now
        return
    try:
        with _published(file) as draft:
            yield lambda data: _write_all(draft, data)
    except OSError as error:
        raise _fault(error, f"can't write {str(file)!r}") from error


@contextmanager
def reading(file: Any) -> Iterator[Callable[[int], Any]]:
    """Give the `read` of a file."""
    if not isinstance(file, Path):
        yield file.read
        return
    try:
        with file.open("rb", buffering=0) as opened:
            yield opened.read
    except OSError as error:
        raise _fault(error, f"can't read {str(file)!r}") from error


def _write_all(file: Any, data: bytes) -> None:
    rest: bytes | memoryview = data
    while rest:
        taken = file.write(rest)
        if type(taken) is not int and not isinstance(file, io.RawIOBase):
            return  # it doesn't count; by `None` a raw one says that it had no room
        if type(taken) is not int or not 0 < taken <= len(rest):
            message = f"file.write() of {len(rest)} bytes answered {shown(taken)}"
            raise Unavailable(message, hint="Pass a file that waits until it has written (a blocking one).")
        rest = memoryview(rest)[taken:]


@contextmanager
def _published(path: Path) -> Iterator[io.RawIOBase]:
    _check_replaceable(path)
    draft = path.with_name(f".{path.name[:_NAME_CHARS_MAX]}.{os.urandom(8).hex()}.tmp")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    owner = os.getpid()
    try:
        with io.FileIO(handle, "w") as file:
            os.fchmod(handle, 0o600)  # the umask may have taken bits away
            yield file
            os.fsync(handle)
        draft.replace(path)
    except BaseException:
        if os.getpid() == owner:  # in a forked child nobody has asked for this file
            draft.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def _check_replaceable(path: Path) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        hint = "Pass the path of a file that may be replaced, or open it yourself and pass that."
        raise Unavailable(f"{str(path)!r} is there, and isn't a regular file", hint=hint)


def _fault(error: OSError, doing: str) -> StorageError:
    """Return our error for one of the system's about a path."""
    if error.errno in _FULL:
        return DiskFull(f"{doing}: {error}", hint="Free some space and do it again; nothing else is harmed.")
    kind = StorageError if error.errno == errno.EIO else Unavailable
    return kind(f"{doing}: {error}")
