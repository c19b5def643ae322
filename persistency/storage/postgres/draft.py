"""The draft: a group's messages, run in order against what the server has and what they have changed themselves.

It is the same program as the memory adapter's, over an overlay in the place of dicts: nothing is sent to the server
but questions, until all of the group is decided.

Rules:
  1. A message is run whole or not at all, and its outcome is its own.
  2. What a question meets that the message isn't to blame for is raised, whatever a run's function makes of it.

Doesn't know: how what was changed is sent, transactions, leases.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

from persistency.errors import Conflict, FeedTruncated, Misuse, QuotaExceeded, StorageError
from persistency.storage.port import (
    PLACES,
    WITHIN,
    BackUp,
    Barrier,
    Batch,
    ChangeKind,
    CheckUp,
    CountRange,
    Doing,
    DropRange,
    DropRow,
    Expect,
    Extent,
    Failed,
    GetEntry,
    GetRow,
    GetRows,
    GiveBack,
    Group,
    HasRow,
    LastVersion,
    ListCategories,
    ListChanges,
    ListEntries,
    ListRows,
    Reap,
    Run,
    ScanRange,
    SetRow,
    StoredChange,
    StoredRow,
    StoreOptions,
    SwapRow,
    TouchRow,
    UsedBytes,
)
from persistency.storage.postgres import session
from persistency.storage.postgres.books import Books
from persistency.storage.postgres.faults import Lost, Refused, translated
from persistency.storage.postgres.overlay import Overlay
from persistency.storage.postgres.packing import INT8_MAX, INT8_MIN
from persistency.storage.postgres.reads import Place, Row

_NO_FILE = Misuse("this job is on a server: it has no file", hint="Use export(file).")


class _Mark(NamedTuple):
    overlay: tuple[int, int]
    version: int
    used: int
    next_expiry_ms: int | None
    fresh: int


class Draft:
    """What a group makes of a job. `too_long` are places whose keys the server was found to refuse."""

    def __init__(
        self, overlay: Overlay, books: Books, options: StoreOptions, too_long: frozenset[Place], *, reaping_counts: bool
    ) -> None:
        self.overlay: Overlay = overlay
        self.books: Books = books
        self.now_ms: int = overlay.now_ms
        self._options = options
        self._keeps = options.feed_changes_max > 0
        self._has_quota = options.max_bytes is not None
        self._limit = options.max_bytes  # what a single write is held to: inside a batch or a run, nothing
        self._too_long = too_long
        self._reaping_counts = reaping_counts
        self._broken: Lost | Refused | None = None
        self._within = Doing(self._do)
        self._answers: dict[type, Callable[[Any], Any]] = {
            SetRow: lambda message: self._write(*message[:4]),
            DropRow: self._drop_row,
            DropRange: self._drop_range,
            SwapRow: self._swap_row,
            TouchRow: self._touch_row,
            Expect: self._expect,
            Batch: self._batch,
            Run: self._run,
            Reap: self._reap,
            GetRow: self._get_row,
            HasRow: lambda message: overlay.live_row((message.category, message.key)) is not None,
            GetEntry: self._get_entry,
            GetRows: self._get_rows,
            ScanRange: self._scan,
            CountRange: lambda message: overlay.count(message)[0],
            ListCategories: lambda _message: overlay.categories(),
            ListEntries: self._list_entries,
            ListRows: lambda message: overlay.page(*message),
            UsedBytes: lambda _message: books.used if self._has_quota else overlay.all_bytes(),
            ListChanges: self._list_changes,
            LastVersion: lambda _message: books.version,
            Barrier: lambda _message: None,
            Extent: lambda _message: overlay.reads.extent(),
            GiveBack: lambda _message: 0,
            CheckUp: lambda _message: _nothing_wrong(),
            BackUp: lambda _message: Failed(_NO_FILE),
        }

    def run(self, group: Group) -> list[Any]:
        """Run a group; return its outcomes."""
        return list(self._each(group))

    def answer(self, message: Any) -> Any:
        """Run one message; return its outcome."""
        return self._answers[type(message)](message)

    def advance(self) -> None:
        """Let the rows that have ended by now use no bytes any more."""
        books = self.books
        if self._has_quota and self.now_ms > books.used_ms:
            if books.next_expiry_ms is not None and books.next_expiry_ms <= self.now_ms:
                books.used -= self.overlay.reads.ended_bytes(books.used_ms, self.now_ms)
            books.used_ms = self.now_ms

    def _each(self, group: Group) -> Iterator[Any]:
        places = iter(group)
        for category, key, payload in zip(places, places, places, strict=True):
            if category is None:
                yield self._answers[type(key)](key)
            else:
                yield self._write(category, key, payload, None)

    # -- batches and runs ------------------------------------------------------------------------------------------

    def _mark(self) -> _Mark:
        books = self.books
        return _Mark(self.overlay.mark(), books.version, books.used, books.next_expiry_ms, len(books.fresh))

    def _take_back(self, mark: _Mark) -> None:
        books = self.books
        self.overlay.back_to(mark.overlay)
        books.version, books.used, books.next_expiry_ms = mark.version, mark.used, mark.next_expiry_ms
        del books.fresh[mark.fresh :]

    def _batch(self, batch: Batch) -> int | Failed:
        for message in batch.items[1::PLACES] if batch.expects else ():
            if type(message) is Expect:
                row = self.overlay.live_row((message.category, message.key))
                actual = None if row is None else row.version
                if actual != message.version:
                    return Failed(Conflict(message.key, message.version, actual))
        mark = self._mark()
        limit, self._limit = self._limit, None
        try:
            for outcome in self._each(batch.items):
                if type(outcome) is Failed:
                    self._take_back(mark)
                    return outcome
        finally:
            self._limit = limit
        return self._refusal(limit, mark) or self.books.version

    def _run(self, run: Run) -> Any:
        mark = self._mark()
        limit, self._limit = self._limit, None
        self._within.version = self.books.version
        try:
            answer = run.fn(self._within)  # pyright: ignore[reportArgumentType]  # takes the slot `do` for a method
        except BaseException as error:  # even an interrupt is the function's own outcome
            self._check_broken()
            self._take_back(mark)
            return Failed(error)
        finally:
            self._limit = limit
        self._check_broken()
        return self._refusal(limit, mark) or answer

    def _check_broken(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _do(self, message: Any) -> Any:
        """Run one message of a `Run`'s function; raise what it fails with, everything of it undone."""
        if self._broken is not None:
            raise translated(self._broken, "the transaction is broken") from self._broken
        if type(message) not in WITHIN:
            raise Misuse(f"a run's function can't do {message!r}", hint="Reads, writes, batches and runs only.")
        mark = self._mark()
        try:
            outcome = self._answers[type(message)](message)
        except (Lost, Refused) as error:
            self._broken = self._broken or error
            raise translated(error, "the transaction is broken") from error
        except BaseException:
            self._take_back(mark)
            raise
        finally:
            self._within.version = self.books.version
        if type(outcome) is Failed:
            raise outcome.error
        return outcome

    def _refusal(self, limit: int | None, mark: _Mark) -> Failed | None:
        """Judge what was done since the mark as a whole, and undo it if it takes the job over its quota."""
        used = self.books.used
        if limit is None or used <= limit or used <= mark.used:
            return None
        self._take_back(mark)
        return Failed(QuotaExceeded(used, limit))

    # -- writes ----------------------------------------------------------------------------------------------------

    def _counted(self, row: Row | None) -> int:
        """Return how many bytes of the quota a row takes up."""
        if row is None or not self._has_quota:
            return 0
        return row.size if row.expires_ms is None or self.books.used_ms < row.expires_ms else 0

    def _tell(
        self, kind: ChangeKind, category: bytes, key: bytes, payload: bytes | None = None, stop: bytes | None = None
    ) -> None:
        if self._keeps:
            self.books.fresh.append(StoredChange(self.books.version, kind, category, key, payload, stop))

    def _write(self, category: bytes, key: bytes, payload: bytes, expires_ms: int | None) -> Failed | None:
        place = category, bytes(key)
        if expires_ms is not None and not INT8_MIN <= expires_ms <= INT8_MAX:
            return Failed(StorageError(f"it can't be stored: an end of {expires_ms} is beyond any clock's"))
        if len(category) + len(place[1]) + len(payload) > session.MESSAGE_BYTES_MAX:
            return Failed(too_large(len(payload)))
        if self._too_long and place in self._too_long:
            return Failed(too_long(key))
        books = self.books
        if self._has_quota:
            row = Row(0, expires_ms, len(payload), payload)
            used = books.used - self._counted(self.overlay.row(place)) + self._counted(row)
            if self._limit is not None and books.used < used > self._limit:
                return Failed(QuotaExceeded(used, self._limit))
            books.used = used
        books.version += 1
        self.overlay.write(place, Row(books.version, expires_ms, len(payload), payload))
        books.expect_end(expires_ms)
        self._tell("put", category, place[1], payload)
        return None

    def _drop_row(self, message: DropRow) -> bool:
        self.books.version += 1
        place = message.category, bytes(message.key)
        row = self.overlay.row(place)
        if row is None:
            return False
        alive = row.expires_ms is None or self.now_ms < row.expires_ms
        if alive or not self._keeps:  # else reaping it will tell
            self.books.used -= self._counted(row)
            self.overlay.write(place, None)
        if alive:
            self._tell("delete", *place)
        return alive

    def _drop_range(self, message: DropRange) -> int:
        self.books.version += 1
        stop = None if message.stop is None else bytes(message.stop)
        span = message.category, bytes(message.start), stop
        count, nbytes = self.overlay.drop(span, ended_too=not self._keeps)
        self.books.used -= nbytes if self._has_quota else 0
        if count:
            self._tell("delete_range", span[0], span[1], stop=stop)
        return count

    def _swap_row(self, message: SwapRow) -> bool | Failed:
        category, key, expected, payload, expires_ms = message[:5]
        row = self.overlay.live_row((category, bytes(key)), payload=expected is not None)
        if (None if row is None else row.payload if expected is not None else b"") != expected:
            return False
        if payload is None:
            self._drop_row(DropRow(category, key))
            return True
        return self._write(category, key, payload, expires_ms) or True

    def _touch_row(self, message: TouchRow) -> bool | Failed:
        place, end = (message.category, bytes(message.key)), message.expires_ms
        if end is not None and not INT8_MIN <= end <= INT8_MAX:
            return Failed(StorageError(f"it can't be stored: an end of {end} is beyond any clock's"))
        row = self.overlay.live_row(place)
        if row is None:
            return False
        self.books.version += 1
        touched = row.touched or place not in self.overlay.written
        fresh = row._replace(expires_ms=end, touched=touched)
        self.books.used += self._counted(fresh) - self._counted(row)
        self.overlay.write(place, fresh)
        self.books.expect_end(end)
        return True

    def _expect(self, _message: Expect) -> None:
        self.books.version += 1  # its batch has looked already; like every operation it takes a version

    def _reap(self, message: Reap) -> int:
        ended = self.overlay.reads.ended(message.limit)
        for place in ended:
            self.overlay.write(place, None)
            if self._keeps:
                self.books.version += 1
                self._tell("expire", *place)
        if self._reaping_counts and ended:
            self.books.version += 1
        return len(ended)

    # -- reads -----------------------------------------------------------------------------------------------------

    def _get_row(self, message: GetRow) -> bytes | None:
        row = self.overlay.live_row((message.category, message.key), payload=True)
        return None if row is None else row.payload

    def _get_entry(self, message: GetEntry) -> StoredRow | None:
        row = self.overlay.live_row((message.category, message.key), payload=True)
        return None if row is None else StoredRow(bytes(message.key), row.payload or b"", row.version, row.expires_ms)

    def _get_rows(self, message: GetRows) -> list[tuple[bytes, bytes]]:
        found = ((key, self.overlay.live_row((message.category, key), payload=True)) for key in message.keys)
        return [(key, row.payload or b"") for key, row in found if row is not None]

    def _scan(self, message: ScanRange) -> list[tuple[bytes, bytes]]:
        span = message.category, message.start, message.stop
        return self.overlay.pairs(span, message.limit, reverse=message.reverse, keys_only=message.keys_only)

    def _list_entries(self, message: ListEntries) -> list[StoredRow]:
        rows = [StoredRow(*entry) for entry in self.overlay.entries((message.category, b"", None))]
        rows.sort(key=lambda row: row.version)
        return rows

    def _list_changes(self, message: ListChanges) -> list[StoredChange] | Failed:
        books, keep = self.books, self._options.feed_changes_max
        if not self._keeps:
            return Failed(Misuse("this job keeps no changes", hint="Open it with feed_changes_max."))
        dropped = books.no_longer_kept(keep)
        if message.after < dropped:
            return Failed(FeedTruncated(books.oldest_after(dropped)))
        found: list[StoredChange] = []
        if books.kept and books.kept[-1] > message.after and message.limit > 0:
            found = self.overlay.reads.changes(message.after, message.limit)
        found += [change for change in books.fresh if change.version > message.after]
        return found[: message.limit]


def too_long(key: bytes) -> StorageError:
    """Return why a row can't be stored."""
    return StorageError(
        f"it can't be stored: the server has no room in an index for its key of {len(key)} bytes",
        hint="PostgreSQL takes keys of some 2,600 bytes, and longer ones only as far as they can be compressed.",
    )


def too_large(nbytes: int) -> StorageError:
    """Return why a row can't be sent."""
    return StorageError(
        f"it can't be stored: a message to the server has no room for its payload of {nbytes} bytes",
        hint="PostgreSQL's protocol has room for a gigabyte: store it in parts.",
    )


def _nothing_wrong() -> Generator[tuple[int, int | None], None, list[str]]:
    """Find nothing: what is stored is looked after by the server."""
    yield 0, 0
    return []
