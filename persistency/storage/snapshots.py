"""Snapshots: what a connection that only reads sees of a job's file, one look after the other.

Rules:
  1. A look is a read transaction; when it is over nothing of it is held.
  2. The answers are those of the owner's own statements.
  3. What is kept beside the rows is read anew whenever somebody has committed, and the file is recognised anew whenever
     its schema has changed: it is somebody else's.

Doesn't know: where the file is, and whether it still is there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import apsw

from persistency.errors import Closed, Corrupt, JobNotFound, Misuse, PersistencyError, Unavailable
from persistency.storage import inherited, meta, schema
from persistency.storage.changes import DROPPED, Changes, has_changes
from persistency.storage.port import Failed, ListChanges
from persistency.storage.quota import USED, USED_MS, Quota
from persistency.storage.table import ANSWERS, LATEST_MS, Table

T = TypeVar("T")

READ_BUSY_MS = 500  # so long a look waits for somebody who opens, recovers or closes the file
_EVERY_CHANGE = 2**62
_FAULTS = (apsw.Error, UnicodeDecodeError, MemoryError)

_ANY_ENDS = "SELECT EXISTS (SELECT 1 FROM kv WHERE expires_ms IS NOT NULL)"


class Snapshots:
    """What one connection sees of a job's file: a snapshot at a time, each no longer than a look."""

    def __init__(self, path: Path, job_id: str, vfs: str | None, *, still: bool) -> None:
        self.version: int = 0
        self.latest_ms: int = 0
        self.expires_ms: int | None = None
        self._path = path
        self._job_id = job_id
        self._table: Table | None = None
        self._changes: Changes | None = None
        self._committed = -1  # as SQLite counts them, when it was last noticed that somebody had
        self._schema = -1
        try:
            self._connection = schema.open_file(path, vfs, immutable=still)
        except (apsw.Error, UnicodeDecodeError) as error:
            raise _translated(error, f"can't open {str(path)!r}") from error
        self._connection.set_busy_timeout(READ_BUSY_MS)
        self._execute: Callable[..., Any] = self._connection.cursor().execute

    def close(self) -> None:
        """Close the connection, and leave what lies beside the file."""
        schema.close(self._connection)

    def disown(self, *, quiet: bool) -> None:
        """Let go of the connection in a forked child, which mustn't end what another thread was doing with it."""
        with contextlib.suppress(apsw.Error):
            if quiet:
                self._connection.close()
                return
            self._connection.authorizer = lambda *_: apsw.SQLITE_DENY
        inherited.keep_for_ever(self._connection)

    def look(self, ask: Callable[[Snapshots], T], now_ms: int) -> T:
        """Return what `ask` finds in a snapshot. Raises `PersistencyError`, whatever SQLite has to say."""
        try:
            self._end()  # an interrupt may have come before the last one was
            self._execute("BEGIN")
            self._notice(now_ms)
            return ask(self)
        except _FAULTS as error:
            raise _translated(error, f"can't read {str(self._path)!r}") from error
        finally:
            self._end()

    def answer(self, message: Any) -> Any:
        """Answer one message from the snapshot."""
        table = self._table
        assert table is not None
        if type(message) is ListChanges and table.changes is None:
            return Failed(Misuse(f"job {self._job_id!r} keeps no changes: have it opened with feed_changes_max=10_000"))
        return ANSWERS[type(message)](table, message)

    def _end(self) -> None:
        if self._connection.in_transaction:
            # By the cursor that has read: what it was doing is over then, and with it the snapshot.
            with contextlib.suppress(apsw.Error):
                self._execute("ROLLBACK")

    def _notice(self, now_ms: int) -> None:
        """Learn what was committed since the last look, and what time it is: never before the file's."""
        committed = self._execute("PRAGMA data_version").fetchone()[0]
        if committed != self._committed or self._table is None:
            self._committed = -1
            self._table = self._read_beside(self._connection)
            self._committed = committed
        self._table.now_ms = now_ms = max(now_ms, self.latest_ms)
        if self.expires_ms is not None and now_ms >= self.expires_ms:
            raise Closed(f"job {self._job_id!r} has ended", hint="It was a temporary job; open_job makes a new one.")

    def _read_beside(self, connection: apsw.Connection) -> Table:
        """Return the table with what is kept beside the rows."""
        version = int(connection.pragma("schema_version"))
        if version != self._schema:
            self._schema = -1
            self._recognise(connection)
            self._schema = version
        stored, _ = meta.read_meta(connection)
        latest_ms = max(stored.get(name, 0) for name in (LATEST_MS, USED_MS))
        if latest_ms > schema.TIME_MS_MAX:
            raise Corrupt(f"the file's time, {latest_ms}, is beyond any clock's", hint="Restore it from a backup.")
        self.version, self.latest_ms = stored["last_version"], max(self.latest_ms, latest_ms)
        self.expires_ms = stored.get(schema.ENDS)
        table = self._table
        if table is None:
            table = Table(connection, 0, 0)
            self._execute = table.execute
        table.version = self.version
        table.next_expiry_ms = 0 if table.execute(_ANY_ENDS).fetchone()[0] else None
        counted = {USED, USED_MS} <= stored.keys()
        table.quota = Quota(table.execute, 0, stored[USED], stored[USED_MS]) if counted else None
        table.changes = self._kept_changes(connection, table, stored.get(DROPPED))
        return table

    def _kept_changes(self, connection: apsw.Connection, table: Table, dropped: int | None) -> Changes | None:
        if dropped is None or not has_changes(connection):
            return None
        if self._changes is None:
            # What is committed was trimmed by its owner, who alone knows how many are kept.
            self._changes = Changes(connection, table.execute, _EVERY_CHANGE, dropped)
        self._changes.dropped = dropped
        return self._changes

    def _recognise(self, connection: apsw.Connection) -> None:
        found = schema.recognise(connection, self._path)
        if found == 0:
            raise not_found(self._job_id, self._path)  # its owner is making it just now
        if found != schema.FORMAT:
            raise Unavailable(
                f"{str(self._path)!r} has format {found}, an earlier one, and a reader changes nothing",
                hint="Open the job once with open_job(job_id): that brings its file up to date.",
            )
        meta.check_job_id(meta.read_job_id(connection, self._path), self._job_id, self._path)


def not_found(job_id: str, path: Path) -> JobNotFound:
    """Return the error that says so."""
    return JobNotFound(
        f"there is no job {job_id!r} in {str(path.parent)!r}",
        hint="Check the id and the root: a reader makes nothing. open_job(job_id) does.",
    )


def _translated(error: Exception, doing: str) -> PersistencyError:
    """Return our error for one of SQLite's; that it has tried too often to get a lock is another word for busy."""
    if isinstance(error, apsw.ProtocolError):
        unavailable = Unavailable(f"{doing}: {error}", getattr(error, "extendedresult", 0))
        unavailable.__cause__ = error
        return unavailable
    return schema.translated(error, doing)
