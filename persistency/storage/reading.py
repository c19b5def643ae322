"""The read-only SQLite store: a job's file beside whoever writes it, in this process or in another.

SQLite wants a log and its index beside a file it reads, and makes empty ones where they are missing. Where it can't, or
where they would belong to somebody else than the file does, a file that *lies still*, with nothing in a log, is read as
it is: without locks, and an answer counts only if nobody has touched the file meanwhile.

Rules:
  1. Every call is a read transaction of its own, over before it returns: between two calls there is no snapshot that
     would keep the owner's log from being cut off.
  2. Nothing is written, carried over or deleted, and nothing is claimed.
  3. A file that was removed or replaced is not read on: what is under its name now may be another job.
  4. What was committed is seen by the next call.

Doesn't know: threads, futures, key tuples, clocks, who owns the file.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from time import time_ns
from typing import Any, NamedTuple, TypeAlias, TypeVar

import apsw

from persistency.errors import Closed, Forked, PersistencyError, Unavailable
from persistency.storage import checking, copying, files
from persistency.storage.openings import undisturbed
from persistency.storage.port import PLACES, BackUp, CheckUp, Failed, GetRow, Group, ScanRange, Status
from persistency.storage.snapshots import Snapshots, not_found

T = TypeVar("T")
# What tells which file it is, and whether it was written to, without opening it: device, inode, bytes, changed when.
_Stamp: TypeAlias = tuple[int, int, int, int]

TRIES = 3  # to read a file that lay still, and then didn't
_NEVER_MS = 2**62
_TICK_NS = 100_000_000  # two changes within one tick of the file system's clock look like one
# What reads the whole file in steps, by a connection and in a transaction of its own.
_BESIDE: dict[type, Callable[[Path, Any, str | None, Callable[[], None] | None], Any]] = {
    BackUp: lambda path, message, vfs, still: copying.back_up(path, message.target, vfs=vfs, lies_still=still),
    CheckUp: lambda path, _message, vfs, still: checking.check(path, vfs=vfs, lies_still=still),
}
_NOTHING_BESIDE = (apsw.SQLITE_CANTOPEN, apsw.SQLITE_READONLY)  # SQLite can't have what it wants beside the file


class SqliteReader:
    """The rows of a job, whose file is at `path`, for reading alone; `now_ms` is when it is opened.

    Raises `JobNotFound` if there is no such job (any more), and else what opening it would: `Corrupt`, `SchemaTooNew`,
    `Unavailable` or another `StorageError`. `vfs` names another of SQLite's file systems, for tests.
    """

    reads_in_place = True
    expires_ms: int | None = None  # a job's end is looked at by every call: its owner may have put it off

    def __init__(self, path: Path, job_id: str, now_ms: int = 0, vfs: str | None = None) -> None:
        self._place = _Place(path)
        self._job_id = job_id
        self._vfs = vfs
        self._opened = _Look(None, None)  # what the place looked like then
        self._still = False  # it is read as one that lies still,
        self._fresh = False  # and that was written to so shortly before that it might be again without looking so
        self._forked = False
        self._gone: str | None = None  # why it can't be read on
        self._status = Status(0, 0)
        self._snapshots: Snapshots | None = None
        try:
            self._connect(now_ms)
        except Closed as error:
            raise not_found(job_id, path) from error  # it has ended, and its files go with the next sweep

    # -- the port ------------------------------------------------------------------------------------------------

    @property
    def next_expiry_ms(self) -> int:
        """A moment that never comes: rows end at any time here, but taking them away is their owner's work."""
        return _NEVER_MS

    def apply(self, group: Group, now_ms: int) -> list[Any]:
        """Answer a group of reads in one snapshot. A read that fails is a `Failed` outcome, whatever the reason."""
        messages = group[1::PLACES]
        if not _BESIDE.keys().isdisjoint(map(type, messages)):
            return [self._alone(message, now_ms) for message in messages]
        try:
            return self._ask(lambda snapshots: [snapshots.answer(message) for message in messages], now_ms)
        except (Unavailable, Closed) as error:
            return [Failed(error)] * len(messages)
        except PersistencyError:
            return [self._alone(message, now_ms) for message in messages]  # one of them can't be answered

    def get(self, category: bytes, key: bytes, now_ms: int) -> bytes | None:
        """Return the payload of a live row, or `None`."""
        payload: bytes | None = self.read(GetRow(category, key), now_ms)
        return payload

    def scan(self, span: ScanRange, now_ms: int) -> list[tuple[bytes, bytes]]:
        """Return the live rows of a range."""
        rows: list[tuple[bytes, bytes]] = self.read(span, now_ms)
        return rows

    def read(self, message: Any, now_ms: int) -> Any:
        """Answer one read."""
        if (beside := _BESIDE.get(type(message))) is not None:
            self._look_closely(now_ms)
            return beside(self._place.path, message, self._vfs, self._check_untouched if self._still else None)
        return self._ask(lambda snapshots: snapshots.answer(message), now_ms)

    def reap(self, now_ms: int, limit: int) -> int:  # noqa: ARG002  # the port has them
        """Take nothing away: that is its owner's work."""
        return 0

    def status(self) -> Status:
        """Return the numbers, as of the last call. The log is the owner's."""
        return self._status

    @property
    def last_version(self) -> int:
        """The last version seen."""
        return self._status.last_version

    def close(self, *, tidy: bool = True, now_ms: int = 0) -> None:  # noqa: ARG002  # the port has it
        """Give up everything that is held; the files stay as they are."""
        snapshots, self._snapshots = self._snapshots, None
        if snapshots is not None:
            snapshots.close()

    def disown(self, *, quiet: bool) -> None:
        """In a forked child: let go without touching the file."""
        self._forked = True
        snapshots, self._snapshots = self._snapshots, None
        if snapshots is not None:
            snapshots.disown(quiet=quiet)

    # -- one call ------------------------------------------------------------------------------------------------

    def _ask(self, ask: Callable[[Snapshots], T], now_ms: int) -> T:
        """Return what `ask` finds in one snapshot."""
        for _ in range(TRIES):
            snapshots = self._look_closely(now_ms)
            fault: PersistencyError | None = None
            try:
                answer = snapshots.look(ask, now_ms)
                self._learn(snapshots)
            except PersistencyError as error:
                fault = error
            if self._still and self._place.look() != self._opened:
                continue
            if fault is not None:
                self._look_closely(now_ms)  # if it was removed meanwhile that is what is to be said
                raise fault
            return answer  # pyright: ignore[reportPossiblyUnboundVariable, reportReturnType]  # without a fault there is one
        raise Unavailable(f"{str(self._place.path)!r} is being written to, and its write-ahead log can't be read")

    def _check_untouched(self) -> None:
        """Raise `Unavailable` if a file that lay still was touched since it was looked into last."""
        if self._place.look() != self._opened:
            raise Unavailable(f"{str(self._place.path)!r} was written to while it was read", hint="Try again.")

    def _alone(self, message: Any, now_ms: int) -> Any:
        try:
            return self.read(message, now_ms)
        except PersistencyError as error:
            return Failed(error)

    def _learn(self, snapshots: Snapshots) -> None:
        self._status = Status(snapshots.version, 0, snapshots.latest_ms)

    # -- the file ------------------------------------------------------------------------------------------------

    def _look_closely(self, now_ms: int) -> Snapshots:
        """Return what to read with, if the file is still the one that was opened."""
        if self._forked:
            raise Forked(f"the reader of job {self._job_id!r} is the parent process'", hint="Open another one here.")
        if self._gone is None:
            found = self._place.look()
            self._gone = _difference(self._opened, found, still=self._still)
            touched = self._still and (found != self._opened or self._fresh)
            if self._gone is None and (self._snapshots is None or touched):
                self._connect(now_ms)  # there may be a log now
                self._gone = _difference(found, self._opened, still=True)
        if self._gone is not None:
            self.close()
            raise Unavailable(
                f"job {self._job_id!r} can't be read on: {self._gone}",
                hint="Close this reader; another one reads what is there now.",
            )
        assert self._snapshots is not None
        return self._snapshots

    def _connect(self, now_ms: int) -> None:
        """Open the file, with its log if that is possible, and look into it once."""
        self.close()
        for _ in range(TRIES):
            self._place.check(self._job_id)
            if self._place.is_alone():
                self._open(now_ms, still=True)  # what isn't ours is refused before there is a log beside it
            if self._place.may_have_log():
                try:
                    self._open(now_ms, still=False)
                except Unavailable as error:
                    if error.code & 0xFF not in _NOTHING_BESIDE:
                        raise
            if self._snapshots is None:
                self._open(now_ms, still=True)
            if self._snapshots is not None:
                return
        raise Unavailable(f"{str(self._place.path)!r} was changed, over and over, while it was opened")

    def _open(self, now_ms: int, *, still: bool) -> None:
        """Open the file one way or the other, look into it and go on with that; with what it was, if it has changed."""
        before = self._place.look()
        if still and not self._place.lies_still(before):
            raise Unavailable(
                f"{str(self._place.path)!r} has a write-ahead log that can't be read without writing beside it",
                hint="Read it with the rights of the file's owner, or have the job opened and closed once.",
            )
        snapshots: Snapshots | None = None
        fault: PersistencyError | None = None
        try:
            with undisturbed(self._place.path):
                snapshots = Snapshots(self._place.path, self._job_id, self._vfs, still=still)
                snapshots.look(lambda _snapshots: None, now_ms)
        except PersistencyError as error:
            fault = error
        opened = self._place.look()
        if not still and opened.log is None and fault is None and snapshots is not None:
            # It keeps no log. Who looks into it later, when its owner has opened it, would look for one by its name.
            snapshots.close()
            return
        changed = opened != before if still else _difference(before, opened, still=True) is not None
        if changed or fault is not None or snapshots is None:
            if snapshots is not None:
                snapshots.close()
            if fault is not None and not changed:
                raise fault
            return
        self.close()
        self._snapshots, self._opened, self._still = snapshots, opened, still
        self._fresh = opened.file is not None and time_ns() - opened.file[3] < _TICK_NS
        self._learn(snapshots)


class _Look(NamedTuple):
    """What lies in a job's place: its file, and its log."""

    file: _Stamp | None
    log: _Stamp | None


class _Place:
    """The names of a job's files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log, self._index, self._journal = files.sidecars(path)
        self._names = str(path), str(self._log)  # as text: looking at a `Path` takes three times as long

    def look(self) -> _Look:
        """Return what is there now."""
        return _Look(*map(_stamp, self._names))

    def check(self, job_id: str) -> None:
        """Raise `JobNotFound` if there is no file, or an empty one; `Unavailable` if something else is there."""
        for beside in (self._log, self._index, self._journal):
            files.check_regular(beside)
        if not files.check_regular(self.path) or not files.size(self.path):
            raise not_found(job_id, self.path)

    def may_have_log(self) -> bool:
        """Say whether what SQLite makes beside the file would belong to whom the file belongs to."""
        if os.path.lexists(self._log) and os.path.lexists(self._index):
            return True  # it makes nothing
        try:
            return os.geteuid() in (0, self.path.lstat().st_uid)
        except OSError:
            return False

    def is_alone(self) -> bool:
        """Say whether nothing of SQLite's is beside the file, so that nobody has it open."""
        return not any(map(os.path.lexists, (self._log, self._index, self._journal)))

    def lies_still(self, look: _Look) -> bool:
        """Say whether all there is to be read is in the file."""
        return (look.log is None or not look.log[2]) and not files.size(self._journal)


def _stamp(path: str) -> _Stamp | None:
    try:
        found = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise Unavailable(f"{path!r} can't be looked at: {error}") from error
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _difference(before: _Look, now: _Look, *, still: bool) -> str | None:
    """Return what has become of the files, if they are not the same; of one that lies still the log doesn't count."""
    if now.file is None:
        return "its file was removed, so the job was dropped, or moved"
    if before.file is not None and before.file[:2] != now.file[:2]:
        return "its file was replaced"
    if still or before.log is None or (now.log is not None and before.log[:2] == now.log[:2]):
        return None
    return "its write-ahead log was removed or replaced"
