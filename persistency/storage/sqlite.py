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

from persistency.errors import StorageError
from persistency.storage import schema
from persistency.storage.port import (
    PLACES,
    READS,
    Barrier,
    Batch,
    Expect,
    Failed,
    GetRow,
    Group,
    OutcomeUnknown,
    ScanRange,
    Status,
    StoreOptions,
)
from persistency.storage.table import POINT, Table

log = logging.getLogger("persistency.storage")

CHECKPOINT_IDLE_PAGES = 4_000  # with nobody waiting
CHECKPOINT_FORCED_PAGES = 12_000  # 48 MB of log: now, whoever waits

# What a message can be guilty of by itself; anything else that is raised is the environment's fault.
_OWN_FAULTS = (
    apsw.TooBigError,
    apsw.NoMemError,
    apsw.ConstraintError,
    apsw.MismatchError,
    apsw.RangeError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)

# What is wrong with writing, even when it is a read that meets it.
_WRITE_FAULTS = (apsw.FullError, apsw.ReadOnlyError)
_WRITE_CODES = (apsw.SQLITE_IOERR_WRITE, apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_TRUNCATE)


class _ReadFault(Exception):
    """A read broke the transaction it stood in; the group is run again without it."""

    def __init__(self, at: int, error: StorageError) -> None:
        super().__init__(at, error)
        self.at = at
        self.error = error


class SqliteStore:
    """A job's rows in one SQLite file. `release` gives up the ownership of the file at `close`."""

    reads_in_place = True

    def __init__(self, connection: apsw.Connection, options: StoreOptions, release: Callable[[], None]) -> None:
        stored = schema.read_meta(connection)
        schema.own_log(connection)
        self.options = options
        self._connection = connection
        self._release = release
        self._table = Table(connection, stored["last_version"])
        self._execute = self._table.execute
        self._clean = stored.get("clean") == 1
        self._wal_pages = 0
        self._answers: dict[type, Callable[[Any], Any]] = {
            **self._table.answers,
            Batch: self._batch,
            Expect: self._expect,
            Barrier: lambda _message: None,
        }
        connection.set_wal_hook(self._on_commit)

    # -- the port ------------------------------------------------------------------------------------------------

    def apply(self, group: Group, now_ms: int) -> list[Any]:
        """Run a group in one transaction; see the port."""
        self._table.now_ms = now_ms
        refused: dict[int, Failed] = {}
        run = self._run
        while True:
            try:
                return self._transaction(group, run, refused)
            except _ReadFault as fault:
                refused[fault.at] = Failed(fault.error)
            except (apsw.Error, *_OWN_FAULTS) as error:
                if run == self._run_apart or not isinstance(error, _OWN_FAULTS):
                    raise schema.translated(error, "a group of writes failed") from error
                run = self._run_apart

    def get(self, category: bytes, key: bytes, now_ms: int) -> bytes | None:
        """Return the payload of a live row, or `None`."""
        try:
            if not self._connection.in_transaction:
                self._execute("BEGIN")
            # As `Table.get` does; a call would be a twentieth of the whole read.
            row = self._execute(POINT, (category, key)).fetchone()
        except apsw.Error as error:
            raise self._read_failed(error) from error
        if row is None or (row[1] is not None and row[1] <= now_ms):
            return None
        payload: bytes = row[0]
        return payload

    def scan(self, span: ScanRange, now_ms: int) -> list[tuple[bytes, bytes]]:
        """Return the live rows of a range."""
        rows: list[tuple[bytes, bytes]] = self.read(span, now_ms)
        return rows

    def read(self, message: Any, now_ms: int) -> Any:
        """Answer one read message outside any group."""
        self._table.now_ms = now_ms
        try:
            self._begin_read()
            return self._answers[type(message)](message)
        except apsw.Error as error:
            raise self._read_failed(error) from error

    def status(self) -> Status:
        """Return the numbers."""
        return Status(self._table.version, self._wal_pages * schema.PAGE_BYTES)

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
            if not self._clean:
                self._execute("BEGIN IMMEDIATE")
                self._execute("UPDATE meta SET value = 1 WHERE name = 'clean'")
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
        before = self._table.version
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
            outcomes = run(group, refused)
            self._commit(before, sync=sync)
            return outcomes
        except BaseException:
            self._roll_back()
            # An interrupt may come after COMMIT has happened, so the file is asked.
            self._table.version = self._stored_version(before)
            self._clean = self._clean and self._table.version == before
            raise
        finally:
            if sync:
                with contextlib.suppress(apsw.Error):
                    self._connection.pragma("synchronous", "normal")

    def _commit(self, before: int, *, sync: bool) -> None:
        version = self._table.version
        if version != before:
            self._execute("UPDATE meta SET value = ? WHERE name = 'last_version'", (version,))
            if self._clean:
                self._execute("UPDATE meta SET value = 0 WHERE name = 'clean'")
        if sync:
            # A page must change, or nothing is written and nothing synced.
            self._execute("UPDATE meta SET value = value + 1 WHERE name = 'syncs'")
        try:
            self._execute("COMMIT")
        except apsw.Error as error:
            if self._connection.in_transaction or not self._happened(error, before):
                raise
        self._clean = self._clean and version == before

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

    def _read_failed(self, error: apsw.Error) -> StorageError:
        self._roll_back()
        return schema.translated(error, "a read failed")

    def _on_commit(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK

    # -- running a group -----------------------------------------------------------------------------------------

    def _run(self, group: Group, refused: dict[int, Failed]) -> list[Any]:
        """Run a group's messages in order inside the open transaction, consecutive puts together."""
        outcomes: list[Any] = [None] * (len(group) // PLACES)
        if None not in group[::PLACES]:
            self._table.write(group)
            return outcomes
        rows: Group = []  # puts not yet written
        recent: dict[tuple[bytes, bytes], bytes] = {}  # the payloads in their first `seen` places
        seen = 0
        for at, place in enumerate(range(0, len(group), PLACES)):
            category, message = group[place], group[place + 1]
            kind = type(message)
            if category is not None:
                rows += (category, message, group[place + 2])
                continue
            if kind is GetRow and rows:
                # Answered from the puts before it, so that pipelined puts and gets still share statements.
                for row in range(seen, len(rows), PLACES):
                    recent[rows[row], rows[row + 1]] = rows[row + 2]
                seen = len(rows)
                outcomes[at] = recent.get((message.category, message.key))
                if outcomes[at] is not None:
                    continue
            elif kind is Batch and None not in message.items[::PLACES]:
                rows += message.items
                outcomes[at] = self._table.version + len(rows) // PLACES
                continue
            elif rows:
                self._table.write(rows)
                rows, recent, seen = [], {}, 0
            outcomes[at] = refused[at] if at in refused else self._answer(message, kind, at)
        self._table.write(rows)
        return outcomes

    def _answer(self, message: Any, kind: type, at: int) -> Any:
        if kind not in READS:
            return self._answers[kind](message)
        try:
            return self._answers[kind](message)
        except apsw.Error as error:
            if isinstance(error, _WRITE_FAULTS) or getattr(error, "extendedresult", 0) in _WRITE_CODES:
                raise  # there was no room to read into: the group's own pages had to be written first
            fault = schema.translated(error, "a read failed")
            if self._connection.in_transaction:
                return Failed(fault)
            raise _ReadFault(at, fault) from error

    def _run_apart(self, group: Group, refused: dict[int, Failed]) -> list[Any]:
        """Run each message in a savepoint of its own, so that one that can't be stored is undone alone."""
        outcomes: list[Any] = []
        for at in range(len(group) // PLACES):
            message = group[at * PLACES : (at + 1) * PLACES]
            before = self._table.version
            self._execute("SAVEPOINT message")
            try:
                outcome = self._run(message, {0: refused[at]} if at in refused else {})[0]
            except _ReadFault as fault:
                raise _ReadFault(at, fault.error) from fault
            except _OWN_FAULTS as error:
                self._execute("ROLLBACK TO message")
                self._table.version = before
                outcome = Failed(schema.translated(error, "it can't be stored"))
            self._execute("RELEASE message")
            outcomes.append(outcome)
        return outcomes

    def _batch(self, batch: Batch) -> int | Failed:
        if batch.expects:
            for message in batch.items[1::PLACES]:
                if type(message) is Expect:
                    conflict = self._table.conflict(message)
                    if conflict is not None:
                        return Failed(conflict)
        self._run(batch.items, {})
        return self._table.version

    def _expect(self, _message: Expect) -> None:
        self._table.version += 1  # its batch has looked already; like every operation it takes a version


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
