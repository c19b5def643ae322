"""Folding: how a job's file is brought up to its log, tidied up, closed, and given up in a forked child.

Rules:
  1. What was committed is never at risk here: what can't be done is left to the next opening.
  2. What is noted beside the file is on the medium by then.
  3. The ownership of the file is given up whatever happens.

Doesn't know: groups, transactions, when it is time for it.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import apsw

from persistency.errors import Corrupt, PersistencyError, StorageError
from persistency.logfields import about
from persistency.storage import schema
from persistency.storage.files import Claim
from persistency.storage.pagecache import PageCache
from persistency.storage.port import Barrier, Group, OutcomeUnknown, StoreOptions
from persistency.storage.table import LATEST_MS, Table
from persistency.storage.wal import WriteAheadLog
from persistency.storage.watch import Watch

log: logging.Logger = logging.getLogger("persistency.storage")

T = TypeVar("T")


class Folding:
    """The part of a store that looks after its file."""

    options: StoreOptions
    expires_ms: int | None
    _connection: apsw.Connection
    _execute: Callable[..., Any]
    _table: Table
    _log: WriteAheadLog
    _watch: Watch
    _claim: Claim
    _cache: PageCache
    _clean: bool

    def apply(self, group: Group, now_ms: int) -> list[Any]:
        """Run a group. To be overridden."""
        raise NotImplementedError

    def _begin_read(self) -> None:
        """Begin a read transaction, unless there is one. To be overridden."""

    def _end_read(self) -> None:
        """End what is left of a read transaction. To be overridden."""

    def _roll_back(self) -> None:
        """End what is left of a transaction. To be overridden."""

    def _take_over(self, now_ms: int) -> None:
        """Fold the log that a killed process, or a power cut, has left.

        It may not be on the medium, whoever has read it. And it mustn't be gone on with: SQLite writes behind the last
        commit that is whole, and where the same is written again the lost commits behind that one count anew.
        """
        self._log.unsynced = True
        self._begin_read()  # ends what was read while it was opened, beside which nothing is carried over
        self._end_read()
        try:
            if self._log.cut_off():
                return
            if self.options.durability == "power":
                self.apply([None, Barrier(sync=True), None], now_ms)
        except OutcomeUnknown as error:  # nobody was told of anything yet
            raise (error.__cause__ or error) from None
        except Corrupt:
            raise
        except StorageError as error:
            fields = about("left_log_stays", None, error, path=self._claim.path)
            log.warning("a log that was left behind stays as it is: %s", error, extra=fields)

    def checkpoint(self) -> None:
        """Carry the log over into the file, as far as no other process is reading from it."""
        self._checkpointed(self._log.carry_over)

    def fold(self) -> bool:
        """Carry the whole log over and cut it off, if no other process is reading from it; return whether it was."""
        done = self._checkpointed(self._log.cut_off)
        self._cache.give_back()  # nobody has written for a while, and who reads on takes it again
        return done

    def _checkpointed(self, checkpoint: Callable[[], T]) -> T:
        self._end_read()
        done = checkpoint()
        if not self._log.unsynced:
            self._take_note()
        return done

    def settle(self, patience: float | None = None) -> None:
        """Mark the file as closed in order and carry the whole log over; see the port."""
        self._log.wait_for_others(patience)
        try:
            self._watch.check()
            self._end_read()
            ends = self._table.next_expiry_ms is not None
            if not self._clean or ends:
                self._execute("BEGIN IMMEDIATE")
                self._execute("UPDATE meta SET value = 1 WHERE name = 'clean'")
                if ends:
                    self._execute(schema.NOTE, (LATEST_MS, self._table.now_ms))
                self._execute("COMMIT")
                self._clean = True
            if (self._log.pages and not self._log.cut_off()) or self._log.unsynced:
                self.apply([None, Barrier(sync=True), None], self._table.now_ms)
            self._take_note()
        except (apsw.Error, PersistencyError, OutcomeUnknown) as error:
            self._roll_back()
            # Nothing is lost: what was committed is in the log, and the next opening finds it there.
            fields = about("file_not_tidied", None, error, path=self._claim.path)
            log.warning("a job's file couldn't be tidied up at close: %s", error, extra=fields)
        finally:
            self._log.wait_for_others()

    def _take_note(self, *, opening: bool = False) -> None:
        """Write down, beside the file, what it must hold from now on whatever happens to its log."""
        version = self._claim.record.version if self._log.unsynced else self._table.version
        used_ms = max(self._table.now_ms, self.options.now_ms)
        note = self._claim.note_opening if opening else self._claim.note
        note(version, used_ms, self.expires_ms)

    def close(self, *, tidy: bool = True, now_ms: int = 0) -> None:
        """Close the file, if `tidy` in order, and give up its ownership, whatever happens.

        Raises `Corrupt` if it isn't there any more: what was committed is lost.
        """
        # An `ExitStack` for the three below took a tenth of a whole closing.
        try:
            if tidy:
                self._table.now_ms = max(self._table.now_ms, now_ms)
                self.settle()
                self._watch.check(thorough=True)
            else:
                with contextlib.suppress(apsw.Error):
                    self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        finally:
            try:
                self._cache.close()
                schema.close(self._connection)
            finally:
                try:
                    self._watch.close()
                finally:
                    self._claim.release()

    def disown(self, *, quiet: bool) -> None:
        """In a forked child: close the connection without touching the file, or have it refuse everything.

        Closing is better: else SQLite's books of this process' locks, the parent's, stand in the way of the child's own
        connection to the file. It writes nothing. In the middle of a transaction there is no such way.
        """
        self._watch.close()
        self._cache.close()
        with contextlib.suppress(apsw.Error):  # another thread of the parent may have been in the middle of it
            self._connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
            if quiet:
                self._connection.close()
                return
        with contextlib.suppress(apsw.Error):
            self._connection.authorizer = lambda *_: apsw.SQLITE_DENY  # it refuses everything
