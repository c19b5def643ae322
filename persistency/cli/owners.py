"""Owners: which process has a job open, told without touching the job or its lock.

A job's lock file says in its first line which process has the job, or had it last. To try the lock would be to take it,
for a moment in which a service that wants it would be refused; so it is looked whether that process still has the file.

Rules:
  1. Nothing is locked, written or made.
  2. Where the system can say which files a process has open (`/proc`) that decides; elsewhere, and about processes of
     other users, it counts as the owner as long as it lives.

Doesn't know: jobs that are open, what their owners do.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeAlias

from persistency import StoredJob

_PROCESSES = Path("/proc")
_LINE_BYTES_MAX = 32
_File: TypeAlias = tuple[int, int]
"""Device and inode: what tells a file from all others."""


class Owners:
    """What is known of the processes that have jobs open. Each process is looked at once."""

    def __init__(self) -> None:
        self._open: dict[int, set[_File] | None] = {}

    def of(self, stored: StoredJob) -> int | None:
        """Return the id of the process that has a job open, or `None`."""
        if stored.path is None:
            return None
        try:
            # Never through a link, and never waiting for whoever has put a pipe there.
            handle = os.open(stored.path.with_suffix(".lock"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return None
        try:
            first = os.read(handle, _LINE_BYTES_MAX).split(b"\n")[0].strip()
            found = os.fstat(handle)
        except OSError:
            return None
        finally:
            os.close(handle)
        if not first.isdigit() or not (pid := int(first)):
            return None
        if pid not in self._open:
            self._open[pid] = _files_of(pid)
        files = self._open[pid]
        return pid if files is None or (found.st_dev, found.st_ino) in files else None


def _files_of(pid: int) -> set[_File] | None:
    """Return the files a process has open; none of one that has ended, and `None` if nobody can tell."""
    if not _lives(pid):
        return set()
    if not (_PROCESSES / "self" / "fd").exists():
        return None
    files = set()
    try:
        for name in os.listdir(_PROCESSES / str(pid) / "fd"):
            try:
                found = os.stat(_PROCESSES / str(pid) / "fd" / name)
            except FileNotFoundError:
                continue  # closed meanwhile
            files.add((found.st_dev, found.st_ino))
    except FileNotFoundError:
        return set()
    except OSError:
        return None
    return files


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True
