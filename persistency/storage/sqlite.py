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
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import apsw

from persistency.errors import Corrupt, StorageError
from persistency.logfields import about
from persistency.storage import checking, copying, meta, schema
from persistency.storage.beside import keep_beside
from persistency.storage.files import Claim, Found, identity
from persistency.storage.folding import Folding
from persistency.storage.group import OWN_FAULTS, Groups, ReadFault, intent
from persistency.storage.pagecache import PageCache
from persistency.storage.port import (
    PLACES,
    BackUp,
    Barrier,
    CheckUp,
    Extent,
    Failed,
    GiveBack,
    Group,
    OutcomeUnknown,
    Reap,
    ScanRange,
    Status,
    StoreOptions,
)
from persistency.storage.quota import USED, USED_MS
from persistency.storage.table import LATEST_MS, POINT, Table
from persistency.storage.wal import WriteAheadLog
from persistency.storage.watch import Watch

log: logging.Logger = logging.getLogger("persistency.storage")

T = TypeVar("T")

CHECKPOINT_IDLE_PAGES = 4_000  # with nobody waiting, or somebody for whom it had better be short
CHECKPOINT_FORCED_PAGES = 12_000  # 48 MB of log: now, whoever waits

_PAYLOAD = "SELECT CAST(payload AS BLOB) FROM kv WHERE category = ? AND key = ?"  # where no row ends


class SqliteStore(Folding):
    """A job's rows in one SQLite file, `path`, whose ownership, `claim`, is given up at `close`.

    `stored` are its numbers, `found` is what was there before it was opened.
    """

    reads_in_place = True

    def __init__(
        self,
        connection: apsw.Connection,
        stored: dict[str, int],
        options: StoreOptions,
        path: str,
        claim: Claim,
        found: Found,
        vfs: str | None = None,
    ) -> None:
        schema.own_log(connection)
        self.options = options
        self.expires_ms: int | None = stored.get(schema.ENDS)
        self._connection = connection
        self._claim = claim
        self._log = WriteAheadLog(connection, path)
        self._cache = PageCache(connection)
        try:
            # What was found to have ended, or counted so, stays so.
            latest_ms = max(stored.get(LATEST_MS, 0), stored.get(USED_MS, 0))
            if latest_ms > schema.TIME_MS_MAX:
                raise Corrupt(f"the file's time, {latest_ms}, is beyond any clock's", hint="Restore it from a backup.")
            self._table = Table(connection, stored["last_version"], latest_ms)
            self._knows_ends = False
            if LATEST_MS in stored:
                self._learn_ends()
            self._outdated = keep_beside(connection, self._table, options, stored)
        except (apsw.Error, UnicodeDecodeError) as error:
            raise schema.translated(error, "can't read what is kept beside the rows") from error
        self._groups = Groups(connection, self._table, partial(_answer, connection, path, vfs))
        self._execute = self._table.execute
        self._committing = False  # when the error came that is on its way
        self._short_read = False  # the last error was one
        self._noted: dict[str, int] = {}  # what the file says, of that which is kept beside the rows
        self._clean = stored.get("clean") == 1
        self._watch = Watch(path, found.identity or identity(path))
        try:
            connection.set_wal_hook(self._log.note_commit)
            if found.log:
                self._take_over(max(options.now_ms, latest_ms))
            self._take_note(opening=True)
        except BaseException:
            self._watch.close()
            raise

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
                    raise self._failed(error) from error
                run = self._groups.apart

    def prepare(self) -> None:
        """Begin the transaction of a group that is about to be taken; see the port.

        Whoever waits for room goes on when the group is taken, and has the interpreter's lock as soon as it is given
        away for a statement. Let that be the long one, beside which there is time for it, and not this.
        """
        with contextlib.suppress(apsw.Error, StorageError):
            self._watch.check()
            self._end_read()
            self._execute("BEGIN IMMEDIATE")

    def _learn_ends(self) -> None:
        # With the opening only if the file says that there are any: else before anything is done with the rows, for
        # somebody else may have put one there.
        self._table.learn_ends()
        self._knows_ends = True

    def _failed(self, error: Exception) -> StorageError:
        failed = schema.translated(error, "a group of writes failed")
        if failed.code in (apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_DIR_FSYNC):
            # Wherever it came: the system may have dropped what it was asked to sync, and says so only once.
            raise OutcomeUnknown(str(error)) from failed
        failed.at_commit, self._committing = self._committing, False
        again, self._short_read = self._short_read, failed.code == apsw.SQLITE_IOERR_SHORT_READ
        if again and self._short_read:  # the end of a file isn't a fault that passes
            raise Corrupt(str(failed), failed.code) from error
        return failed

    def get(self, category: bytes, key: bytes, now_ms: int) -> bytes | None:
        """Return the payload of a live row, or `None`."""
        return self.point_read(lambda: now_ms)(category, key)

    def point_read(self, now_ms: Callable[[], int]) -> Callable[[bytes, bytes], bytes | None]:
        """Return a function for point reads; see the port. A call more would be a twentieth of the whole read."""
        connection, execute, table = self._connection, self._execute, self._table

        def get(category: bytes, key: bytes) -> bytes | None:
            try:
                if not connection.in_transaction:
                    if not self._knows_ends:
                        self._learn_ends()
                    self._cache.enlarge()
                    self._begin_read()
                if not table.has_ends:
                    row = execute(_PAYLOAD, (category, key)).fetchone()
                    return None if row is None else row[0]
                row = execute(POINT, (category, key)).fetchone()  # as `Table.get` does
            except apsw.Error as error:
                raise self._read_failed(error) from error
            if row is None:
                return None
            payload: bytes
            payload, expires_ms = row
            if expires_ms is not None:
                table.now_ms = now = now_ms()  # what somebody was told has ended must have, whenever it is opened again
                if expires_ms <= now:
                    return None
            return payload

        return get

    def scan(self, span: ScanRange, now_ms: int) -> list[tuple[bytes, bytes]]:
        """Return the live rows of a range."""
        rows: list[tuple[bytes, bytes]] = self.read(span, now_ms)
        return rows

    def read(self, message: Any, now_ms: int) -> Any:
        """Answer one read message outside any group."""
        self._table.now_ms = now_ms
        try:
            if not self._knows_ends:
                self._learn_ends()
            self._cache.enlarge()
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
        log = self._log
        return Status(self._table.version, log.pages * schema.PAGE_BYTES, self._table.now_ms, log.pinned)

    @property
    def last_version(self) -> int:
        """The last version given."""
        return self._table.version

    @property
    def unsynced(self) -> bool:
        """Whether something was committed that isn't on the medium yet."""
        return self._log.unsynced

    def checkpoint_due(self, *, idle: bool) -> bool:
        """Say whether the log has grown past its limit."""
        return self._log.due(CHECKPOINT_IDLE_PAGES if idle else CHECKPOINT_FORCED_PAGES)

    # -- transactions --------------------------------------------------------------------------------------------

    def _transaction(self, group: Group, run: Callable[..., list[Any]], refused: dict[int, Failed]) -> list[Any]:
        if not self._knows_ends:
            self._learn_ends()
        before = self._table.mark()
        writes, sync, barriers = intent(group)
        # With "power" every commit is synced already, but not what a killed process has left.
        sync = sync and (self.options.durability == "process" or self._log.unsynced)
        # Asked of SQLite, not remembered: who prepared it may have been interrupted.
        prepared = self._connection.txn_state("main") == apsw.SQLITE_TXN_WRITE and not sync
        if not writes and not sync:
            if prepared:
                self._end_read()
            if barriers:  # what they say is committed has to be there
                self._watch.check()
            if len(group) > len(barriers) * PLACES:
                self._cache.enlarge()
            self._begin_read()
            outcomes = run(group, refused)
            self._make_smaller(barriers)
            return outcomes
        if not prepared:
            self._watch.check(thorough=sync)
        try:
            if not prepared:
                self._end_read()
                if sync:
                    self._connection.pragma("synchronous", "full")
                self._execute("BEGIN IMMEDIATE")
            self._table.tell(self._table.now_ms)
            changed = self._connection.total_changes()
            outcomes = run(group, refused)
            self._commit(before.version, changed=changed, sync=sync)
            self._make_smaller(barriers)
            self._short_read = False
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
                    self._connection.pragma("synchronous", schema.SYNCHRONOUS[self.options.durability])

    def _commit(self, before: int, *, changed: int, sync: bool) -> None:
        version = self._table.version
        writes = version != before or self._connection.total_changes() != changed
        notes: dict[str, int] = {}
        if writes:
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
                self._committing = True
                raise
        if writes:
            self._clean, self._outdated = False, ()
            self._noted |= notes
            self._log.unsynced = self.options.durability == "process"
        if sync or self.options.durability == "power":
            self._log.unsynced = False
            self._take_note()

    def _happened(self, error: apsw.Error, before: int) -> bool:
        """After a COMMIT that raised and left no transaction open: find out whether it happened all the same."""
        if getattr(error, "extendedresult", 0) == apsw.SQLITE_IOERR_FSYNC:
            raise OutcomeUnknown(str(error)) from schema.translated(error, "a commit's sync failed")
        if self._table.version == before:
            return False  # a barrier alone: doing it again harms nobody
        stored = self._stored_version(None)
        if stored is None:
            raise OutcomeUnknown(str(error)) from schema.translated(error, "a commit failed half way")
        return stored == self._table.version

    def _stored_version(self, otherwise: T) -> int | T:
        try:
            row = self._execute("SELECT value FROM meta WHERE name = 'last_version'").fetchone()
        except apsw.Error:
            return otherwise
        # Of a damaged file there may be anything: the error that came first counts, not one about this.
        return row[0] if row is not None and type(row[0]) is int else otherwise

    def _recall_quota(self) -> None:
        """Take the bytes in use from the file: what has taken no version may have been committed all the same."""
        quota = self._table.quota
        if quota is not None:
            with contextlib.suppress(StorageError):
                stored, _ = meta.read_meta(self._connection)
                if {USED, USED_MS} <= stored.keys():
                    quota.used, quota.used_ms = stored[USED], stored[USED_MS]

    def _roll_back(self) -> None:
        if self._connection.in_transaction:
            try:
                self._execute("ROLLBACK")
            except apsw.Error as error:  # The first error counts; this one only says it was over already.
                log.debug("rollback after an error: %s", error, extra=about("rollback_failed", None, error))

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

    def _make_smaller(self, barriers: list[Barrier]) -> None:
        """Do what barriers want done outside of a transaction. It can't fail them: what they follow is committed."""
        try:
            for barrier in barriers:
                if barrier.rebuild:
                    self._end_read()
                    self._cache.give_back()  # it would be taken twice: what is written beside the file has one as large
                    copying.rebuild(self._connection)
                if barrier.rebuild or barrier.fold:
                    self.fold()
        except (apsw.Error, StorageError) as error:
            fields = about("file_not_made_smaller", None, error, path=self._claim.path)
            log.warning("a job's file couldn't be made smaller: %s", error, extra=fields)


# How messages about the whole file are answered.
_OF_FILE: dict[type, Callable[[apsw.Connection, Path, str | None, Any], Any]] = {
    BackUp: lambda _connection, path, vfs, message: copying.back_up(path, message.target, vfs=vfs),
    CheckUp: lambda _connection, path, vfs, _message: checking.check(path, vfs=vfs),
    Extent: lambda connection, _path, _vfs, _message: connection.pragma("page_count") * schema.PAGE_BYTES,
    GiveBack: lambda connection, _path, _vfs, message: copying.give_back(connection, message.pages),
}


def _answer(connection: apsw.Connection, path: str, vfs: str | None, message: Any) -> Any:
    return _OF_FILE[type(message)](connection, Path(path), vfs, message)
