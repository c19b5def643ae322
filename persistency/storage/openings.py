"""Openings: while a job's file is being opened to be read, nobody of this process removes it or puts another one there.

SQLite finds the log of a file, and the index of that log, by their names, and not before it first looks into the file.
If there is another file by then the two share an index; and within one process there is no lock between them, because
such locks belong to files. What one of them makes of the index the other takes for its own: commits are lost.
See "How To Corrupt An SQLite Database File" of SQLite's documentation, on files that are unlinked while in use.

Rules:
  1. Whoever doesn't own a job opens its file, and looks into it for the first time, `undisturbed`.
  2. Whoever removes or replaces it does so `undisturbed`, too. Nobody has more than one file undisturbed.

Doesn't know: who owns a job; other processes, where the system's locks do hold: `files.remove` says what they need.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from threading import RLock

# Files share locks: that costs a wait now and then, and nothing has to be kept of files that were there once.
_LOCKS_COUNT = 64
# Re-entrant: a signal handler, or `__del__`, may drop a job in the middle of another one's being dropped.
_locks: list[contextlib.AbstractContextManager[bool]] = []


def undisturbed(path: Path) -> contextlib.AbstractContextManager[bool]:
    """Return what is to be held, by `with`, while the file at `path` is opened, removed or replaced."""
    return _locks[hash(str(path)) % _LOCKS_COUNT]


def _begin() -> None:
    # In a forked child, too: who held one there is gone.
    _locks[:] = [RLock() for _ in range(_LOCKS_COUNT)]


_begin()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin)
