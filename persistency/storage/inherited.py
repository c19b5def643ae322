"""Inherited: the connections a forked child has of its parent.

SQLite keeps books of the locks that a process has on its files. A child has them too, of locks that aren't its own: a
second connection to a file of the parent's would rely on them, and so would closing the one that was inherited.

Rules:
  1. What a child inherited is never torn down, and a file that its parent was in the middle of isn't opened there.

Doesn't know: jobs, what is in a file.
"""

from __future__ import annotations

import contextlib
import os
import weakref

import apsw

from persistency.errors import Forked

_opened: weakref.WeakKeyDictionary[apsw.Connection, str] = weakref.WeakKeyDictionary()
_inherited: list[tuple[apsw.Connection, str]] = []  # in a forked child: what its parent had, and of which file


def note(connection: apsw.Connection, name: str) -> None:
    """Note a connection that is open, and to which file."""
    _opened[connection] = name


def some() -> bool:
    """Say whether this process was forked from one that had files open."""
    return bool(_inherited)


def check(name: str) -> None:
    """Refuse a file whose locks this process would take for its own, because its parent has them."""
    for connection in [connection for connection, opened in _inherited if opened == name]:
        with contextlib.suppress(apsw.ConnectionClosedError):
            with contextlib.suppress(apsw.ThreadingViolationError):  # the parent was in the middle of it
                connection.total_changes()
            raise Forked(
                f"{name!r} was in use by the parent when this process was forked, in the middle of something",
                hint="Open it in a process of its own, or fork while nothing is under way.",
            )


def keep_for_ever(connection: apsw.Connection) -> None:
    """Keep a connection from ever being torn down: that would close it."""
    import ctypes  # only here: hardly anybody gets here

    ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))


def _in_child() -> None:
    _inherited[:] = _opened.items()
    for connection, _ in _inherited:
        keep_for_ever(connection)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
