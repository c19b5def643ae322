"""The SQLite adapter: one job, one file, one connection.

Rules:
  1. A group is one transaction. BEGIN, COMMIT and ROLLBACK are said here and nowhere else.
  2. A run of reads keeps one read transaction open (a point read then costs half); the next write, barrier or
     checkpoint ends it. That is sound because the job is its file's only writer.
  3. After an error the first exception counts, and whether a transaction is still open is asked, not assumed:
     SQLite has often rolled back already.
  4. Checkpoints run between groups only. Inside COMMIT they could make a committed group look failed.

Doesn't know: threads, futures, key tuples, clocks.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import apsw

from persistency.errors import Corrupt, StorageError
from persistency.storage import schema
from persistency.storage.changes import DROPPED, Changes
from persistency.storage.group import OWN_FAULTS, Groups, ReadFault
from persistency.storage.port import (
    PLACES,
    READS,
    Barrier,
    Failed,
    Group,
    OutcomeUnknown,
    Reap,
    ScanRange,
    Status,
    StoreOptions,
)
from persistency.storage.quota import USED, USED_MS, Quota, count_used
from persistency.storage.table import LATEST_MS, POINT, Table

log = logging.getLogger("persistency.storage")

CHECKPOINT_IDLE_PAGES = 4_000  # with nobody waiting
CHECKPOINT_FORCED_PAGES = 12_000  # 48 MB of log: now, whoever waits


class SqliteStore:
    """A job's rows in one SQLite file. `release` gives up the ownership of the file at `close`."""

    reads_in_place = True

    def __init__(self, connection: apsw.Connection, options: StoreOptions, release: Callable[[], None]) -> None:
        stored = schema.read_meta(connection)
        schema.own_log(connection)
        self.options = options
        self._connection = connection
        self._release = release
        try:
            # What was found to have ended, or counted so, stays so.
            latest_ms = max(stored.get(name, 0) for name in (LATEST_MS, USED_MS))
            if latest_ms > schema.TIME_MS_MAX:
                raise Corrupt(f"the file's time, {latest_ms}, is beyond any clock's", hint="Restore it from a backup.")
            self._table = Table(connection, stored["last_version"], latest_ms)
            self._outdated = keep_beside(connection, self._table, options, stored)
        except (apsw.Error, UnicodeDecodeError) as error:
            raise schema.translated(error, "can't read what is kept beside the rows") from error
        self._groups = Groups(connection, self._table)
        self._execute = self._table.execute
        self._noted: dict[str, int] = {}  # what the file says, of that which is kept beside the rows
        self._clean = stored.get("clean") == 1
        self._wal_pages = 0
        connection.set_wal_hook(self._on_commit)

    # -- the port ------------------------------------------------------------------------------------------------

    def apply(self, group: Group, now_ms: int) -> list[Any]:
        """Run a group in one transaction; see the port."""
        self._table.now_ms = now_ms
        refused: dict[int, Failed] = {}
        run = self._groups.together
        while True:
            try:
                return self._transaction(group, run, refused)
            except ReadFault as fault:
                refused[fault.at] = Failed(fault.error)
            except (apsw.Error, *OWN_FAULTS) as error:
                if run == self._groups.apart or not isinstance(error, OWN_FAULTS):
                    raise schema.translated(error, "a group of writes failed") from error
                run = self._groups.apart

    def get(self, category: bytes, key: bytes, now_ms: int) -> bytes | None:
        """Return the payload of a live row, or `None`."""
        try:
            if not self._connection.in_transaction:
                self._execute("BEGIN")
            # As `Table.get` does; a call would be a twentieth of the whole read.
            row = self._execute(POINT, (category, key)).fetchone()
        except apsw.Error as error:
            raise self._read_failed(error) from error
        if row is None or (row[1] is not None and self._has_ended(row[1], now_ms)):
            return None
        payload: bytes = row[0]
        return payload

    def _has_ended(self, expires_ms: int, now_ms: int) -> bool:
        self._table.now_ms = now_ms  # what somebody was told has ended must have, whenever the job is opened again
        return expires_ms <= now_ms

    def scan(self, span: ScanRange, now_ms: int) -> list[tuple[bytes, bytes]]:
        """Return the live rows of a range."""
        rows: list[tuple[bytes, bytes]] = self.read(span, now_ms)
        return rows

    def read(self, message: Any, now_ms: int) -> Any:
        """Answer one read message outside any group."""
        self._table.now_ms = now_ms
        try:
            self._begin_read()
            return self._groups.answer(message)
        except (apsw.Error, UnicodeDecodeError) as error:
            raise self._read_failed(error) from error

    @property
    def next_expiry_ms(self) -> int | None:
        """No row ends before this."""
        return self._table.next_expiry_ms

    def reap(self, now_ms: int, limit: int) -> int:
        """Take rows away that have ended, in a transaction like any group's."""
        outcome: int = self.apply([None, Reap(limit), None], now_ms)[0]
        return outcome

    def status(self) -> Status:
        """Return the numbers."""
        return Status(self._table.version, self._wal_pages * schema.PAGE_BYTES, self._table.now_ms)

    def checkpoint_due(self, *, idle: bool) -> bool:
        """Say whether the log has grown past its limit."""
        return self._wal_pages >= (CHECKPOINT_IDLE_PAGES if idle else CHECKPOINT_FORCED_PAGES)

    def checkpoint(self) -> None:
        """Carry the log over into the file, as far as no other process is reading from it."""
        try:
            self._end_read()
            total, done = self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.Error as error:
            failed = schema.translated(error, "a checkpoint failed")
            if failed.code == apsw.SQLITE_IOERR_FSYNC:
                raise OutcomeUnknown(str(error)) from failed
            raise failed from error
        self._wal_pages = max(0, total - done)

    def settle(self) -> None:
        """Mark the file as closed in order and carry the whole log over."""
        try:
            self._end_read()
            ends = self._table.next_expiry_ms is not None
            if not self._clean or ends:
                self._execute("BEGIN IMMEDIATE")
                self._execute("UPDATE meta SET value = 1 WHERE name = 'clean'")
                if ends:
                    self._execute(schema.NOTE, (LATEST_MS, self._table.now_ms))
                self._execute("COMMIT")
                self._clean = True
            if self._wal_pages:
                self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
                self._wal_pages = 0
        except apsw.Error as error:
            self._roll_back()
            # Nothing is lost: what was committed is in the log, and the next opening finds it there.
            log.warning("a job's file couldn't be tidied up at close: %s", error)

    def close(self, *, tidy: bool = True) -> None:
        """Close the file, if `tidy` in order, and give up its ownership, whatever happens."""
        try:
            if tidy:
                self.settle()
            else:
                with contextlib.suppress(apsw.Error):
                    self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            schema.close(self._connection)
        finally:
            self._release()

    # -- transactions --------------------------------------------------------------------------------------------

    def _transaction(self, group: Group, run: Callable[..., list[Any]], refused: dict[int, Failed]) -> list[Any]:
        before = self._table.mark()
        writes, sync = _intent(group)
        sync = sync and self.options.durability == "process"  # with "power" every commit is synced already
        if not writes and not sync:
            self._begin_read()
            return run(group, refused)
        try:
            self._end_read()
            if sync:
                self._connection.pragma("synchronous", "full")
            self._execute("BEGIN IMMEDIATE")
            self._table.tell(self._table.now_ms)
            changed = self._connection.total_changes()
            outcomes = run(group, refused)
            self._commit(before.version, writes=self._connection.total_changes() != changed, sync=sync)
            return outcomes
        except BaseException:
            self._roll_back()
            # An interrupt may come after COMMIT has happened, so the file is asked.
            self._noted = {}
            stored = self._stored_version(before.version)
            if stored == before.version:
                self._table.back_to(before)
                self._recall_quota()
            self._table.version = stored
            self._clean = self._clean and stored == before.version
            raise
        finally:
            if sync:
                with contextlib.suppress(apsw.Error):
                    self._connection.pragma("synchronous", "normal")

    def _commit(self, before: int, *, writes: bool, sync: bool) -> None:
        version = self._table.version
        notes: dict[str, int] = {}
        if writes or version != before:
            notes = {name: value for name, value in self._table.notes().items() if self._noted.get(name) != value}
            for note in notes.items():
                self._execute(schema.NOTE, note)
            for name in self._outdated:
                self._execute("DELETE FROM meta WHERE name = ?", (name,))
            if self._clean:
                self._execute("UPDATE meta SET value = 0 WHERE name = 'clean'")
        if version != before:
            self._execute("UPDATE meta SET value = ? WHERE name = 'last_version'", (version,))
        if sync:
            # A page must change, or nothing is written and nothing synced.
            self._execute("UPDATE meta SET value = value + 1 WHERE name = 'syncs'")
        try:
            self._execute("COMMIT")
        except apsw.Error as error:
            if self._connection.in_transaction or not self._happened(error, before):
                raise
        if writes or version != before:
            self._clean, self._outdated = False, ()
            self._noted |= notes

    def _happened(self, error: apsw.Error, before: int) -> bool:
        """After a COMMIT that raised and left no transaction open: find out whether it happened all the same."""
        if getattr(error, "extendedresult", 0) == apsw.SQLITE_IOERR_FSYNC:
            raise OutcomeUnknown(str(error)) from schema.translated(error, "a commit's sync failed")
        if self._table.version == before:
            return False  # a barrier alone: doing it again harms nobody
        try:
            row = self._execute("SELECT value FROM meta WHERE name = 'last_version'").fetchone()
        except apsw.Error:
            raise OutcomeUnknown(str(error)) from schema.translated(error, "a commit failed half way")
        return bool(row[0] == self._table.version)

    def _stored_version(self, otherwise: int) -> int:
        try:
            return int(self._execute("SELECT value FROM meta WHERE name = 'last_version'").fetchone()[0])
        except apsw.Error:
            return otherwise

    def _recall_quota(self) -> None:
        """Take the bytes in use from the file: what has taken no version may have been committed all the same."""
        quota = self._table.quota
        if quota is not None:
            with contextlib.suppress(StorageError):
                stored = schema.read_meta(self._connection)
                if {USED, USED_MS} <= stored.keys():
                    quota.used, quota.used_ms = stored[USED], stored[USED_MS]

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            try:
                self._execute("ROLLBACK")
            except apsw.Error as error:  # The first error counts; this one only says it was over already.
                log.debug("rollback after an error: %s", error)

    # Asked of SQLite, not remembered: an interrupt may come between a statement and a note of it.

    def _begin_read(self) -> None:
        if not self._connection.in_transaction:
            self._execute("BEGIN")

    def _end_read(self) -> None:
        if self._connection.in_transaction:
            self._execute("COMMIT")

    def _read_failed(self, error: Exception) -> StorageError:
        self._roll_back()
        return schema.translated(error, "a read failed")

    def _on_commit(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK


def keep_beside(
    connection: apsw.Connection, table: Table, options: StoreOptions, stored: dict[str, int]
) -> tuple[str, ...]:
    """Give a table the quota and the change log its job is opened with.

    Returns the names of the notes that the first write without them makes wrong.
    """
    outdated = []
    if options.max_bytes is not None:
        used_ms = stored.get(USED_MS, table.now_ms)
        used = stored[USED] if {USED, USED_MS} <= stored.keys() else count_used(table.execute, used_ms)
        table.quota = Quota(table.execute, options.max_bytes, used, used_ms)
    elif USED in stored:
        outdated.append(USED)
    if options.feed_changes_max:
        dropped = schema.keep_changes(connection, stored.get(DROPPED), table.version)
        table.changes = Changes(connection, table.execute, options.feed_changes_max, dropped)
    elif schema.has_changes(connection):
        table.reaping_counts = True
        outdated += [DROPPED] if DROPPED in stored else []
    return tuple(outdated)


def _intent(group: Group) -> tuple[bool, bool]:
    """Return whether a group writes, and whether it has a barrier that wants the medium."""
    categories = group[::PLACES]
    if None not in categories:
        return bool(group), False
    messages = [group[at + 1] for at in range(0, len(group), PLACES) if group[at] is None]
    kinds = {type(message) for message in messages}
    writes = len(messages) < len(categories) or bool(kinds - READS - {Barrier})
    sync = Barrier in kinds and any(type(message) is Barrier and message.sync for message in messages)
    return writes, sync
