"""The row of a lock, and what is done to it in a transaction.

A lock that is held is one row, which ends when the lease does; while it is free there is none:

| category | key | payload, in CBOR |
|---|---|---|
| locks | (name,) | {"pid": the holder's process, "grant": eight random bytes} |

The row's version is the holder's token: versions grow within a job and none is given twice, and beginning a lease anew
(`touch`) leaves the version as it is. So "is it still mine" is one comparison. The process is for whoever looks into
the file; the random bytes tell the row from one of the same version in another job of the same id.

Rules:
  1. Each function here is one transaction, and compares the token before it changes anything.
  2. The holder counts the lease by a clock of its own, from a moment inside the transaction, before the row's end is
     set. So the lease is over at the holder before it is for anybody else.
  3. They may be called again, as every function of a transaction.

Doesn't know: who holds it, who waits, when a lease is begun anew.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import NamedTuple

from persistency import CBOR, Key, Transaction, key
from persistency.recipes.lock_keeper import clock

# A row ends at a whole millisecond, which may be up to one earlier than the holder's clock would have it.
_MARGIN_MS = 2


class LockRow(NamedTuple):
    """Which row it is, and how long a lease lasts."""

    category: str
    name: str
    lease_ms: int

    @property
    def key(self) -> Key:
        """The row's key."""
        return key(self.name)


class Taken(NamedTuple):
    """What an attempt gave: a token and until when it holds by the holder's clock; or after how long to try again."""

    token: int | None
    until: float
    wait_s: float
    payload: bytes = b""  # of the row that was written


def token_of(tx: Transaction, row: LockRow) -> int | None:
    """Return the token of whoever holds the lock; `None`: it is free."""
    entry = tx.entry(row.category, row.key)
    return None if entry is None else entry.version


def take(tx: Transaction, row: LockRow) -> Taken:
    """Take the lock, if it is free."""
    until = _until(row)
    held = tx.entry(row.category, row.key)
    if held is None:
        payload = CBOR.encode({"pid": os.getpid(), "grant": os.urandom(8)})
        tx.put(row.category, row.key, payload, ttl=_lease(row))
        return Taken(token_of(tx, row), until, 0.0, payload)
    left_ms = row.lease_ms if held.expires_ms is None else held.expires_ms - tx.now_ms
    return Taken(None, until, max(left_ms, 1) / 1000)


def is_held(tx: Transaction, row: LockRow, token: int, payload: bytes) -> bool:
    """Say whether the lock is this token's, in the job in which it was taken."""
    return token_of(tx, row) == token and tx.get(row.category, row.key) == payload


def prolong(tx: Transaction, row: LockRow, token: int) -> float | None:
    """Begin the lease anew, if the lock is this token's; return until when it holds by the holder's clock."""
    until = _until(row)
    if token_of(tx, row) != token or not tx.touch(row.category, row.key, _lease(row)):
        return None
    return until


def free(tx: Transaction, row: LockRow, token: int) -> bool:
    """Give the lock back, if it is this token's; return whether it was."""
    return token_of(tx, row) == token and tx.delete_acked(row.category, row.key)


def _lease(row: LockRow) -> timedelta:
    return timedelta(milliseconds=row.lease_ms)


def _until(row: LockRow) -> float:
    return clock() + (row.lease_ms - _MARGIN_MS) / 1000
