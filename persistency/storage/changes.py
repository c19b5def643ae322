"""The change log: what was written to a job, in order, as far back as it is kept.

A job that is opened to keep its changes notes each of them down in the same transaction. Consumers pull from here, so
one that is slow or paused costs the job nothing.

    changes             by version: kind (put, delete, expire, delete_range), category, key, payload, stop
    changes_dropped     in the meta table: the highest version that is no longer kept; where it is missing, somebody has
                        written without noting down

Rules:
  1. Every change has the version of its operation; an expiry takes one of its own when its row is reaped.
  2. The newest `keep` changes are kept, no more, at every commit.
  3. Nothing is answered that would leave a gap.

Doesn't know: what is asked for, transactions.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import apsw

from persistency.errors import Corrupt, FeedTruncated
from persistency.storage import schema
from persistency.storage.bulk import Chunk
from persistency.storage.port import ChangeKind, Failed, ListChanges, StoredChange

DROPPED = "changes_dropped"

_KINDS: dict[bytes, ChangeKind] = {kind.encode(): kind for kind in get_args(ChangeKind)}
_ADD = "INSERT INTO changes (version, kind, category, key, payload, stop) VALUES (?, ?, ?, ?, ?, ?)"
# A column's type is only a wish: another tool, or a damaged file, may have put something else there.
_LIST = (
    "SELECT version, CAST(kind AS BLOB), CAST(category AS BLOB), CAST(key AS BLOB), CAST(payload AS BLOB),"
    " CAST(stop AS BLOB) FROM changes WHERE version > ? ORDER BY version LIMIT ?"
)
# The rows that a slice of reaping takes away, and their changes: the versions follow the order in which they ended.
ENDED = "SELECT category, key FROM kv WHERE expires_ms <= ?1 ORDER BY expires_ms, category, key LIMIT ?2"
_ADD_ENDED = (
    "INSERT INTO changes (version, kind, category, key)"
    f" SELECT ?3 + row_number() OVER (), 'expire', category, key FROM ({ENDED})"
)
_OLDEST = "SELECT min(version) FROM changes WHERE version > ?"
_LAST_OF_OLDEST = "SELECT version FROM changes ORDER BY version LIMIT 1 OFFSET ?"
_DROP = "DELETE FROM changes WHERE version <= ?"


def has_changes(connection: apsw.Connection) -> bool:
    """Say whether a file has a table of changes."""
    return connection.table_exists("main", "changes")


def keep_changes(connection: apsw.Connection, dropped: int | None, last_version: int) -> int:
    """Give a file its table of changes; return the highest version that is no longer kept.

    `dropped` is what the file says of that; if it says nothing there is a gap, and those it has are of no use.
    """
    there = has_changes(connection)
    if there and dropped is not None and dropped <= last_version:
        beyond = connection.execute("SELECT 1 FROM changes WHERE version > ? LIMIT 1", (last_version,)).fetchone()
        if beyond is None:  # else somebody else has written there
            return dropped
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("DELETE FROM changes" if there else schema.CHANGES)
    connection.execute(schema.NOTE, (DROPPED, last_version))
    connection.execute("COMMIT")
    return last_version


class Changes:
    """The changes a job keeps. `dropped` is the highest version that is no longer there."""

    def __init__(self, connection: apsw.Connection, execute: Callable[..., Any], keep: int, dropped: int) -> None:
        self.dropped: int = dropped
        self.count: int = int(execute("SELECT count(*) FROM changes").fetchall()[0][0])
        self._execute = execute
        self._changed = connection.changes
        self._keep = keep

    def add(
        self,
        version: int,
        kind: ChangeKind,
        category: bytes,
        key: bytes,
        payload: bytes | None = None,
        stop: bytes | None = None,
    ) -> None:
        """Note down one change."""
        self._execute(_ADD, (version, kind, category, key, payload, stop))
        self.count += 1

    def add_chunk(self, chunk: Chunk) -> None:
        """Note down the puts of a chunk."""
        self._execute(chunk.statements.changes, (chunk.category, chunk.before, chunk.array))
        self.count += chunk.size

    def add_ended(self, now_ms: int, limit: int, version: int) -> int:
        """Note down the first `limit` rows that have ended, with the versions behind `version`; return how many."""
        self._execute(_ADD_ENDED, (now_ms, limit, version))
        added = self._changed()
        self.count += added
        return added

    def trim(self) -> None:
        """Drop the oldest beyond those that are kept."""
        if self.count > self._keep:
            self.dropped = self._no_longer_kept()
            self._execute(_DROP, (self.dropped,))
            self.count = self._keep

    def list(self, message: ListChanges) -> list[StoredChange] | Failed:
        """Return the first changes behind a version, or that they are gone: in the middle of a group as at its end."""
        dropped = self._no_longer_kept()
        if message.after < dropped:
            oldest = self._execute(_OLDEST, (dropped,)).fetchone()[0]
            return Failed(FeedTruncated(dropped + 1 if oldest is None else int(oldest)))
        changes = [_as_change(*row) for row in self._execute(_LIST, (message.after, message.limit))]
        versions = [message.after, *(change.version for change in changes)]
        if any(later <= earlier for earlier, later in pairwise(versions)):
            raise Corrupt("the changes are out of order", hint="Restore the job from a backup.")
        return changes

    def _no_longer_kept(self) -> int:
        """Return the highest version that is, or is about to be, dropped."""
        beyond = self.count - self._keep
        if beyond <= 0:
            return self.dropped
        return int(self._execute(_LAST_OF_OLDEST, (beyond - 1,)).fetchone()[0])


def _as_change(version: int, kind: bytes, *rest: Any) -> StoredChange:
    known = _KINDS.get(kind)
    if known is None:
        raise Corrupt(f"change {version} is of a kind that isn't known, {kind!r:.40}")
    return StoredChange(version, known, *rest)
