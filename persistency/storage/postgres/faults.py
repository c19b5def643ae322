"""Faults: what a server's SQLSTATEs, and connections that break, mean to a job.

Rules:
  1. What passes by itself when the same is tried again is a `StorageError` that a job stalls for; what says that
     data is damaged is `Corrupt`.
  2. A failure of the connection is told apart from one the server reported: only after the first is it unknown what
     became of what was sent.

Doesn't know: connections, statements, jobs.
"""

from __future__ import annotations

from persistency.errors import Corrupt, DiskFull, StorageError, Unavailable

SERIALIZATION = frozenset({b"40001", b"40P01"})  # the whole transaction again
FENCED = b"22012"  # what the fence fails with when the job isn't as it was left: a division by zero
TOO_LARGE = frozenset({b"54000"})  # a key that no index can hold
UNKNOWN_SETTING = frozenset({b"42704", b"22023", b"0A000", b"42601", b"42501", b"55P02"})
MISSING = frozenset({b"42P01", b"3F000"})  # a table, a schema
# Two who make the same tables at the same time.
MADE_TWICE = frozenset({b"23505", b"42P06", b"42P07", b"42710", b"XX000"}) | SERIALIZATION

_UNAVAILABLE = frozenset({b"25006", b"57014", b"55P03", b"25P03", b"25P02"})
_DENIED = (b"28", b"42501", b"3D")
_HINT = "Check that the server named in the URL runs, takes connections, and can be written to."


class Refused(Exception):
    """The server has answered with an error: nothing of the transaction was done. `state` is the SQLSTATE."""

    def __init__(self, state: bytes, text: str) -> None:
        super().__init__(state, text)
        self.state: bytes = state
        self.text: str = text

    def __str__(self) -> str:
        return f"{self.text} ({self.state.decode(errors='replace')})"


class Lost(Exception):
    """The connection broke, or the server fell silent."""


class Unsent(Lost):
    """Not all was sent, so nothing of it is committed: not later either, once the connection is closed."""


def translated(error: Refused | Lost, what: str) -> StorageError:
    """Return the error of ours for what went wrong."""
    text = f"{what}: {error}"
    if isinstance(error, Lost):
        return Unavailable(text, hint=_HINT)
    state = error.state
    if state == b"53100":
        return DiskFull(text, hint="Free some space on the server; a stalled job goes on by itself.")
    if state[:3] == b"XX0" and state in (b"XX001", b"XX002"):
        return Corrupt(text, hint="The server says that its data is damaged: see its log.")
    if state.startswith(_DENIED):
        return Unavailable(text, hint="See that the URL's user exists, and may use the schema and its tables.")
    if state in MISSING:
        return Unavailable(text, hint="Somebody has removed the tables, or they were never made.")
    if state in _UNAVAILABLE or state in SERIALIZATION or state[:2] in (b"08", b"53", b"57", b"58"):
        return Unavailable(text, hint=_HINT)
    return StorageError(text, hint="See the server's own log.")
