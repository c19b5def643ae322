"""The compile cache: a directory that keeps native code, so that the next process needn't compile it again.

Who can write into it can have anything run: it is ours alone, or it isn't used. What is wrong with it later, whatever
that is, costs time and never a load.

Rules:
  1. An entry carries a SHA-256 over its name and its data: what is damaged, or another's under this name, is told
     before anybody runs it. That is no proof against whoever may write here; rule 2 is.
  2. The directory and its entries must belong to us, and be writable by nobody else. Links aren't followed.
  3. An entry appears whole or not at all: it is written under another name, and renamed. It needn't survive a power
     cut, so nothing waits for the medium.
  4. What was used the longest ago goes first when there is too much. Only what looks like ours by its name is ever
     removed, from a directory that may hold other things.
  5. Any number of processes and threads may share the directory; nothing is held between two calls.

Doesn't know: wasmtime, plugins, what the code is.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from time import time
from typing import Final

from persistency.errors import Misuse
from persistency.logfields import about

log: logging.Logger = logging.getLogger("persistency.plugins")

ENTRY_BYTES_MAX: Final = 2**30
LEFTOVER_SECONDS: Final = 600  # no attempt takes that long: whoever began it has ended in the middle
_MAGIC = b"PSTYWAC1"
_HEAD_BYTES = len(_MAGIC) + 32
_SUFFIX = ".compiled"
_NAME = re.compile(r"[0-9a-f]{64}-[0-9a-f]{32}")
_ENTRY = re.compile(_NAME.pattern + re.escape(_SUFFIX))
_ATTEMPT = re.compile(rf"\.{_NAME.pattern}\.[0-9a-f]{{16}}\.part")
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC


class CompileCache:
    """Compiled code by name: 64 hexadecimal digits, a hyphen, and 32 more.

    `directory`: made if it is missing, with mode 0700. `bytes_max`: what all entries may take; `None` or 0 for no
    limit. Raises `Misuse` for a directory that is a file, somebody else's, or writable by others; one that can't be
    made or read is told to the log, as is all that goes wrong later.
    """

    def __init__(self, directory: Path, bytes_max: int | None = None) -> None:
        try:
            self._path = Path(os.path.realpath(directory))
        except ValueError as error:
            raise Misuse(f"cache_dir {str(directory)!r} is no path: {error}: pass the path of a directory") from error
        self._bytes_max = bytes_max or None
        self._lock = threading.Lock()
        self._told = False
        try:
            self._make()
            with self._folder() as folder:
                self._purge(folder)
        except (FileExistsError, NotADirectoryError) as error:
            raise Misuse(
                f"cache_dir {str(directory)!r} is, or lies under, a file: pass the path of a directory"
            ) from error
        except OSError as error:
            self._tell(error)

    def get(self, name: str) -> bytes | None:
        """Return what was put under a name, or `None`: it isn't there, not any more, or isn't what was put."""
        _check(name)
        try:
            with self._folder() as folder:
                return self._read(folder, name)
        except FileNotFoundError:
            return None
        except (OSError, Misuse) as error:
            self._tell(error)
            return None

    def put(self, name: str, data: bytes) -> None:
        """Keep data under a name, in the place of what there was. It may be gone again at any time."""
        _check(name)
        size = _HEAD_BYTES + len(data)
        if size > (self._bytes_max or ENTRY_BYTES_MAX) or size > ENTRY_BYTES_MAX:
            return  # it would drive out all the others, and then itself
        try:
            self._make()  # somebody may have cleared it away
            with self._folder() as folder:
                _write(folder, name, data)
                self._purge(folder)
        except (OSError, Misuse) as error:
            self._tell(error)

    def drop(self, name: str) -> None:
        """Remove what is under a name, if there is something."""
        _check(name)
        try:
            with self._folder() as folder:
                _remove(folder, name + _SUFFIX)
        except FileNotFoundError:
            return
        except (OSError, Misuse) as error:
            self._tell(error)

    # -- the directory -----------------------------------------------------------------------------------------------

    def _make(self) -> None:
        if self._path.is_dir():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self._path.mkdir(mode=0o700)
            self._path.chmod(0o700)  # the umask may have taken bits away

    @contextlib.contextmanager
    def _folder(self) -> Iterator[int]:
        """Open the directory and look whose it is: what is done then is done in it, whatever its name leads to."""
        folder = os.open(self._path, _READ | os.O_DIRECTORY)
        try:
            if wrong := _wrong(os.fstat(folder)):
                raise Misuse(
                    f"cache_dir {str(self._path)!r} {wrong}: pass a directory of your own, with mode 0700",
                    hint="Native code is kept there: who can write into it can have anything run.",
                )
            yield folder
        finally:
            os.close(folder)

    def _tell(self, error: BaseException) -> None:
        """Tell the log, the first time: the cause is likely the same at each load."""
        with self._lock:
            told, self._told = self._told, True
        if not told:
            log.warning(
                "the compile cache %r can't be used as it should: %s. Plugins are compiled again at their next load",
                str(self._path), error, extra=about("compile_cache_unusable", None, error, path=self._path),
            )  # fmt: skip

    # -- an entry ----------------------------------------------------------------------------------------------------

    def _read(self, folder: int, name: str) -> bytes | None:
        file_name = name + _SUFFIX
        try:
            handle = os.open(file_name, _READ | os.O_NONBLOCK, dir_fd=folder)  # a pipe isn't waited for
        except FileNotFoundError:
            return None
        except OSError:
            wrong = _wrong_entry(os.stat(file_name, dir_fd=folder, follow_symlinks=False))
            if not wrong:
                raise  # ours, and yet not to be read
            self._damaged(folder, name, wrong)
            return None
        try:
            wrong, data = _wrong_entry(os.fstat(handle)), b""
            if not wrong:
                with os.fdopen(handle, "rb", buffering=0, closefd=False) as file:
                    head, data = file.read(_HEAD_BYTES), file.read()
                if head != _head(name, data):
                    wrong = "isn't what was written"
            if not wrong:
                with contextlib.suppress(OSError):  # a medium that can only be read is of use too
                    os.utime(handle)
                return data
        finally:
            os.close(handle)
        self._damaged(folder, name, wrong)
        return None

    def _damaged(self, folder: int, name: str, wrong: str) -> None:
        log.warning(
            "an entry of the compile cache %s: it is removed, and the code compiled again (%r)",
            wrong, str(self._path / (name + _SUFFIX)),
            extra=about("compile_cache_damaged", path=self._path / (name + _SUFFIX), reason=wrong),
        )  # fmt: skip
        _remove(folder, name + _SUFFIX)

    # -- all of them -------------------------------------------------------------------------------------------------

    def _purge(self, folder: int) -> None:
        """Remove what nobody will finish and what isn't ours, and then the oldest until the others fit."""
        total = 0
        entries = []
        for name, found in _listed(folder):
            is_leftover = name.startswith(".") and abs(time() - found.st_mtime) > LEFTOVER_SECONDS
            if (is_leftover or _wrong_entry(found)) and self._removed(folder, name):
                continue
            total += found.st_size
            if not name.startswith("."):
                entries.append((found.st_mtime_ns, name, found.st_size))
        for _, name, size in sorted(entries):
            if self._bytes_max is None or total <= self._bytes_max:
                break
            if self._removed(folder, name):
                total -= size

    def _removed(self, folder: int, name: str) -> bool:
        """Remove a file; return whether it is gone. One that can't be is passed over, and told."""
        try:
            _remove(folder, name)
        except OSError as error:
            self._tell(error)
            return False
        return True


def _check(name: str) -> None:
    assert _NAME.fullmatch(name), name


def _wrong(found: os.stat_result) -> str:
    """Return what is wrong with whose something is; nothing: it's ours alone."""
    if found.st_uid != os.geteuid():
        return f"belongs to another user (uid {found.st_uid})"
    if stat.S_IMODE(found.st_mode) & 0o022:
        return f"can be written to by others (mode {stat.S_IMODE(found.st_mode):04o})"
    return ""


def _wrong_entry(found: os.stat_result) -> str:
    if not stat.S_ISREG(found.st_mode):
        return "is no regular file"
    if found.st_size > ENTRY_BYTES_MAX:
        return "is larger than any"
    return _wrong(found)


def _head(name: str, data: bytes) -> bytes:
    digest = hashlib.sha256(_MAGIC + name.encode() + b"\0")
    digest.update(data)
    return _MAGIC + digest.digest()


def _write(folder: int, name: str, data: bytes) -> None:
    attempt = f".{name}.{secrets.token_hex(8)}.part"
    handle = os.open(attempt, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        try:
            os.fchmod(handle, 0o600)  # whatever the umask
            with os.fdopen(handle, "wb", closefd=False) as file:
                file.write(_head(name, data))
                file.write(data)
        finally:
            os.close(handle)
        os.replace(attempt, name + _SUFFIX, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(attempt, dir_fd=folder)
        raise


def _remove(folder: int, name: str) -> None:
    """Remove what has a name, be it a directory; that it's gone already is fine. Raises `OSError`."""
    try:
        os.unlink(name, dir_fd=folder)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):  # which of them, for a directory, depends on the system
        with contextlib.suppress(NotADirectoryError):
            os.rmdir(name, dir_fd=folder)
            return
        raise


def _listed(folder: int) -> list[tuple[str, os.stat_result]]:
    """Return what is ours by its name; what can't be looked at is skipped."""
    found = []
    with os.scandir(folder) as there:
        for entry in there:
            if _ENTRY.fullmatch(entry.name) or _ATTEMPT.fullmatch(entry.name):
                with contextlib.suppress(OSError):
                    found.append((entry.name, entry.stat(follow_symlinks=False)))
    return found
