"""The write-ahead log of one file: how long it is, when it is carried over, and who keeps it from being.

Rules:
  1. It is carried over between transactions only, and never waited for: a reader of another process that pins it is
     seen, told of once, and otherwise left alone.
  2. How far it is carried over SQLite says, not the file's size.

Doesn't know: rows, groups, when somebody is waiting.
"""

from __future__ import annotations

import logging

import apsw

from persistency.logfields import about
from persistency.storage.port import OutcomeUnknown
from persistency.storage.schema import BUSY_MS, translated

log: logging.Logger = logging.getLogger("persistency.storage")


class WriteAheadLog:
    """The log beside one connection's file. `pages` is its length, `unsynced` whether it is ahead of the medium."""

    def __init__(self, connection: apsw.Connection, name: str) -> None:
        self.pages: int = 0
        self.pinned: bool = False
        self.unsynced: bool = False
        self._connection = connection
        self._name = name
        self._busy_ms = BUSY_MS
        self._told = False  # of readers who pin it: once is enough
        self._carried = 0  # the length when it was last carried over, as far as that went

    def note_commit(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        """Note what a commit has made of it: the connection's hook."""
        if pages <= self._carried:  # begun anew
            self._carried = 0
            self.pinned = False
        self.pages = pages
        return apsw.SQLITE_OK

    def due(self, pages: int) -> bool:
        """Say whether so many pages have come since it was last carried over."""
        return self.pages - self._carried >= pages

    def wait_for_others(self, seconds: float | None = None) -> None:
        """From now on wait for what another process has locked so long, but no longer than ever (`None`: so long)."""
        self._busy_ms = BUSY_MS if seconds is None else min(BUSY_MS, round(seconds * 1000))
        self._connection.set_busy_timeout(self._busy_ms)

    def carry_over(self) -> None:
        """Bring it onto the medium and into the file, and have the next commit begin it anew, unless somebody reads."""
        self._checkpoint(apsw.SQLITE_CHECKPOINT_RESTART)

    def cut_off(self) -> bool:
        """Carry all of it over and leave an empty one; return whether that could be done."""
        return self._checkpoint(apsw.SQLITE_CHECKPOINT_TRUNCATE)

    def _checkpoint(self, mode: int) -> bool:
        """Run a checkpoint; return whether all went. Raises `StorageError`, or `OutcomeUnknown` for a failed sync."""
        try:
            return self._carry(mode)
        except apsw.Error as error:
            failed = translated(error, "a checkpoint failed")
            if failed.code == apsw.SQLITE_IOERR_FSYNC:
                raise OutcomeUnknown(str(error)) from failed
            raise failed from error

    def _carry(self, mode: int) -> bool:
        self._connection.set_busy_timeout(0)
        try:
            self._connection.wal_checkpoint(mode=mode)
        except apsw.BusyError:
            self._carry_what_goes()
            return False
        finally:
            self._connection.set_busy_timeout(self._busy_ms)
        self.pages = self._carried = 0
        self.unsynced = self.pinned = False
        return True

    def _carry_what_goes(self) -> None:
        try:
            total, done = self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.BusyError:  # somebody else is doing it
            self._carried = self.pages
            return
        # Whether the log was synced for it isn't said: a reader may have kept it from having anything to do.
        # A reader that is at the end keeps the log from being begun anew, but soon there will be another moment.
        if done < total or self._carried:
            self._pin()
        self._carried = total

    def _pin(self) -> None:
        if not self._told:
            log.warning(
                "%s: somebody is reading there, so that its log can't be cut off; it grows on",
                self._name,
                extra=about("log_pinned", path=self._name),
            )
        self.pinned = self._told = True
