"""The memory adapter: jobs that live as long as their process, and the reference the SQLite one is compared with.

Rules:
  1. Same answers as any other adapter, to the byte; that is what the conformance suite and the mirror test hold.
  2. Every change of a row is noted in `_undo` before it is made, so that a group, a batch or a run can be taken back.
  3. A job whose rows don't end, without a quota and a feed, is not `_watched`: its puts keep no accounts.
  4. The accounts (used bytes, ends, changes) of an interrupted group are made up anew, not taken back.

Doesn't know: files, SQL, threads, futures, clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from persistency.errors import Conflict, Misuse, QuotaExceeded
from persistency.storage.memory_rows import Accounts, AccountsMark, Row, Rows, Table, live
from persistency.storage.names import file_name
from persistency.storage.port import (
    PLACES,
    WITHIN,
    BackUp,
    Barrier,
    Batch,
    CheckUp,
    Doing,
    DropRange,
    DropRow,
    Expect,
    Extent,
    Failed,
    GiveBack,
    Group,
    LastVersion,
    ListChanges,
    Run,
    ScanRange,
    SetRow,
    Status,
    StoredChange,
    StoredJob,
    StoreOptions,
    SwapRow,
    TouchRow,
    UsedBytes,
)


class _Mark(NamedTuple):
    """Where a store stands, to come back to."""

    undo: int
    version: int
    accounts: AccountsMark


class MemoryStore:
    """A job's rows in dicts. Durability makes no difference: memory survives neither process nor power."""

    reads_in_place = True

    def __init__(self, options: StoreOptions) -> None:
        self.options = options
        self.expires_ms: int | None = options.expires_ms
        self.next_expiry_ms: int | None = None
        self._table = Table()
        self._version = 0
        self._undo: list[tuple[bytes, bytes, Row | None]] = []  # what the group in hand has changed
        self._accounts = Accounts(self._table, options)
        self._watched = self._accounts.always
        self._limit = options.max_bytes  # what a single write is held to: inside a batch or a run, nothing
        self._within = Doing(self._do)
        self._answers: dict[type, Callable[[Any], Any]] = {
            **self._table.answers,
            SetRow: lambda message: self._write(*message[:4]),
            DropRow: self._drop_row,
            DropRange: self._drop_range,
            SwapRow: self._swap_row,
            TouchRow: self._touch_row,
            Expect: self._expect,
            Batch: self._batch,
            Run: self._run,
            UsedBytes: self._used_bytes,
            ListChanges: self._list_changes,
            LastVersion: lambda _message: self._version,
            Barrier: lambda _message: None,
            Extent: lambda _message: 0,
            GiveBack: lambda _message: 0,
            CheckUp: lambda _message: _check(),
            BackUp: lambda _message: Failed(Misuse("this job is in memory: it has no file", hint="Use export(file).")),
        }

    # -- the port ------------------------------------------------------------------------------------------------

    def apply(self, group: Group, now_ms: int) -> list[Any]:
        """Run a group; see the port."""
        return self._transaction(lambda: list(self._each(group)), now_ms)

    def get(self, category: bytes, key: bytes, now_ms: int) -> bytes | None:
        """Return the payload of a live row, or `None`."""
        self._table.now_ms = now_ms
        return self._table.payload(category, key)

    def scan(self, span: ScanRange, now_ms: int) -> list[tuple[bytes, bytes]]:
        """Return the live rows of a range."""
        self._table.now_ms = now_ms
        return self._table.scan(span)

    def read(self, message: Any, now_ms: int) -> Any:
        """Answer one read message."""
        self._table.now_ms = now_ms
        return self._answers[type(message)](message)

    def reap(self, now_ms: int, limit: int) -> int:
        """Take at most `limit` rows away that are no longer live; return how many there were."""
        self._table.now_ms = now_ms
        return len(self._transaction(lambda: self._reap(limit), now_ms)) if self._watched else 0

    def status(self) -> Status:
        """Return the numbers; there is no log."""
        return Status(self._version, 0, self._table.now_ms)

    @property
    def last_version(self) -> int:
        """The last version given."""
        return self._version

    def close(self, *, tidy: bool = True, now_ms: int = 0) -> None:  # noqa: ARG002  # there is nothing to tidy up
        """Forget everything."""
        self._table.categories.clear()
        self._accounts = Accounts(self._table, self.options)

    def disown(self, *, quiet: bool) -> None:
        """Do nothing: the child has a copy of its own, and nobody looks at it."""

    # -- transactions --------------------------------------------------------------------------------------------

    def _transaction(self, run: Callable[[], list[Any]], now_ms: int) -> list[Any]:
        self._table.now_ms = now_ms
        self._undo = []
        self._limit = self.options.max_bytes  # an interrupt may have come before it was put back
        if self._watched:
            self._accounts.advance()
            if self._accounts.changes is not None:
                self._accounts.changes.forget()
        mark = self._mark()
        try:
            answer = run()
            if self._watched:
                self._settle()
            return answer
        except BaseException:  # an interrupt, or no memory: then nothing of the group was applied
            self._take_back(mark)
            if self._watched:
                self._accounts.recount()
                self._settle()
            raise

    def _mark(self) -> _Mark:
        return _Mark(len(self._undo), self._version, self._accounts.mark())

    def _take_back(self, mark: _Mark) -> None:
        """Undo what was done since the mark, the newest first."""
        for category, key, row in reversed(self._undo[mark.undo :]):
            self._table.categories[category].restore(key, row)
            if row is not None:
                self._note_end(category, key, row)
        del self._undo[mark.undo :]
        self._version = mark.version
        self._accounts.back_to(mark.accounts)

    def _settle(self) -> None:
        """Do what is due at the end of a group."""
        self.next_expiry_ms = self._accounts.ends.first_ms()
        self._watched = self._accounts.always or self.next_expiry_ms is not None
        if self._accounts.changes is not None:
            self._accounts.changes.trim()

    def _each(self, group: Group) -> Iterator[Any]:
        places = iter(group)
        for category, key, payload in zip(places, places, places, strict=True):
            yield self._answers[type(key)](key) if category is None else self._put(category, key, payload)

    def _batch(self, batch: Batch) -> int | Failed:
        for message in batch.items[1::PLACES] if batch.expects else ():
            if type(message) is Expect:
                row = self._table.row(message.category, message.key)
                actual = None if row is None else row[1]
                if actual != message.version:
                    return Failed(Conflict(message.key, message.version, actual))
        mark = self._mark()
        limit, self._limit = self._limit, None
        try:
            for _ in self._each(batch.items):
                pass
        finally:
            self._limit = limit
        return self._refusal(limit, mark) or self._version

    def _run(self, run: Run) -> Any:
        mark = self._mark()
        limit, self._limit = self._limit, None
        self._within.version = self._version
        try:
            answer = run.fn(self._within)  # pyright: ignore[reportArgumentType]  # takes the slot `do` for a method
        except BaseException as error:  # even an interrupt is the function's own outcome
            self._take_back(mark)
            return Failed(error)
        finally:
            self._limit = limit
        return self._refusal(limit, mark) or answer

    def _do(self, message: Any) -> Any:
        """Run one message of a `Run`'s function; raise what it fails with, everything of it undone."""
        if type(message) not in WITHIN:
            raise Misuse(f"a run's function can't do {message!r}", hint="Reads, writes, batches and runs only.")
        mark = self._mark()
        try:
            outcome = self._answers[type(message)](message)
        except BaseException:
            self._take_back(mark)
            raise
        finally:
            self._within.version = self._version
        if type(outcome) is Failed:
            raise outcome.error
        return outcome

    def _refusal(self, limit: int | None, mark: _Mark) -> Failed | None:
        """Judge what was done since the mark as a whole, and undo it if it takes the job over its quota."""
        used = self._accounts.used
        if limit is None or used <= limit or used <= mark.accounts.used:
            return None
        self._take_back(mark)
        return Failed(QuotaExceeded(used, limit))

    # -- writes --------------------------------------------------------------------------------------------------

    def _put(self, category: bytes, key: bytes, payload: bytes) -> Failed | None:
        if self._watched:
            return self._write(category, key, payload, None)
        self._version += 1
        rows = self._table.categories.get(category)
        if rows is None:
            rows = self._table.categories[category] = Rows()
        self._undo.append((category, bytes(key), rows.rows.get(key)))
        rows.put(bytes(key), (payload, self._version, None))
        return None

    def _write(self, category: bytes, key: bytes, payload: bytes, expires_ms: int | None) -> Failed | None:
        key, row = bytes(key), (payload, self._version + 1, expires_ms)
        accounts, old = self._accounts, self._table.of(category).rows.get(key)
        used = accounts.used - accounts.counted(old) + accounts.counted(row)
        if self._limit is not None and accounts.used < used > self._limit:
            return Failed(QuotaExceeded(used, self._limit))
        self._version += 1
        self._replace(category, key, row)
        accounts.tell(self._version, "put", category, key, payload)
        return None

    def _replace(self, category: bytes, key: bytes, row: Row) -> None:
        """Put a row in the place of what is there, if anything is."""
        rows = self._table.categories[category]
        old = rows.rows.get(key)
        self._undo.append((category, key, old))
        rows.put(key, row)
        self._accounts.used += self._accounts.counted(row) - self._accounts.counted(old)
        self._note_end(category, key, row)

    def _note_end(self, category: bytes, key: bytes, row: Row) -> None:
        if row[2] is not None:
            self._watched = True
            self._accounts.ends.add(category, key, row[2], self._table.now_ms)

    def _remove(self, category: bytes, keys: list[bytes]) -> int:
        """Remove the rows of these keys; return how many were live. Where changes are kept, the dead ones stay."""
        rows = self._table.categories[category]
        alive = 0
        for key in keys:
            row = rows.rows[key]
            ended = not live(row, self._table.now_ms)
            if ended and self._accounts.changes is not None:
                continue  # reaping it will tell
            self._undo.append((category, key, row))
            rows.remove(key)
            self._accounts.used -= self._accounts.counted(row)
            alive += not ended
        return alive

    def _drop_row(self, message: DropRow) -> bool:
        self._version += 1
        rows = self._table.categories.get(message.category)
        if rows is None or message.key not in rows.rows:
            return False
        was_live = self._remove(message.category, [bytes(message.key)]) == 1
        if was_live:
            self._accounts.tell(self._version, "delete", message.category, bytes(message.key))
        return was_live

    def _drop_range(self, message: DropRange) -> int:
        self._version += 1
        rows = self._table.categories.get(message.category)
        if rows is None:
            return 0
        count = self._remove(message.category, rows.span(message.start, message.stop))
        if count:
            stop = None if message.stop is None else bytes(message.stop)
            self._accounts.tell(self._version, "delete_range", message.category, bytes(message.start), stop=stop)
        return count

    def _swap_row(self, message: SwapRow) -> bool | Failed:
        category, key, expected, payload, expires_ms = message[:5]
        if self._table.payload(category, key) != expected:
            return False
        if payload is None:
            self._drop_row(DropRow(category, key))
            return True
        return self._write(category, key, payload, expires_ms) or True

    def _touch_row(self, message: TouchRow) -> bool:
        row = self._table.row(message.category, message.key)
        if row is None:
            return False
        self._version += 1
        self._replace(message.category, bytes(message.key), (row[0], row[1], message.expires_ms))
        return True

    def _expect(self, _message: Expect) -> None:
        self._version += 1  # its batch has looked already; like every operation it takes a version

    def _reap(self, limit: int) -> list[Any]:
        ended = self._accounts.ends.take(limit)
        for _, category, key in ended:
            rows = self._table.categories[category]
            self._undo.append((category, key, rows.rows[key]))
            rows.remove(key)
            if self._accounts.changes is not None:
                self._version += 1
                self._accounts.tell(self._version, "expire", category, key)
        return ended

    # -- reads beside the table's ----------------------------------------------------------------------------------

    def _used_bytes(self, _message: UsedBytes) -> int:
        if self.options.max_bytes is None:
            return self._table.live_bytes()
        self._accounts.advance()
        return self._accounts.used

    def _list_changes(self, message: ListChanges) -> list[StoredChange] | Failed:
        if self._accounts.changes is None:
            return Failed(Misuse("this job keeps no changes", hint="Open it with feed_changes_max."))
        return self._accounts.changes.since(message.after, message.limit)


def _check() -> Generator[tuple[int, int | None], None, list[str]]:
    """Find nothing: what is in memory is what was put there."""
    yield 0, 0
    return []


class MemoryRoot:
    """Jobs in memory, for one `Persistency` alone; a job ends when it is closed."""

    lasting: bool = False
    name: str = ":memory:"

    def open(self, job_id: str, options: StoreOptions) -> MemoryStore:
        """Return a new, empty store."""
        self.path(job_id)
        return MemoryStore(options)

    def path(self, job_id: str) -> Path | None:
        """Return `None`: there is no file. The id is checked as a file's would be."""
        file_name(job_id)
        return None

    def stored(self) -> list[StoredJob]:
        """Return nothing: what isn't open doesn't exist."""
        return []

    def drop(self, job_id: str) -> list[Path]:
        """Return no file; closing the job has already forgotten it."""
        self.path(job_id)
        return []
