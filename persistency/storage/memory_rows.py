"""What the memory adapter keeps its rows in: categories, the ends of rows, the changes of a feed.

Rules:
  1. Keys are sorted when somebody scans, not when somebody writes or removes: both cost a dict's price.
  2. A row's end is noted when it is set and never looked for when it changes: a note that its row no longer bears
     out is passed over when its turn comes, and all such notes are dropped once they outnumber the others.
  3. Each row dies once: that is when its bytes stop counting, whoever asks and whether or not it is still there.

Doesn't know: groups, writes, how anything is undone, who asks.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heappush
from itertools import islice
from operator import attrgetter
from typing import Any, NamedTuple, TypeAlias

from persistency.errors import FeedTruncated
from persistency.storage.port import (
    ChangeKind,
    CountRange,
    Failed,
    GetEntry,
    GetRow,
    GetRows,
    HasRow,
    ListCategories,
    ListEntries,
    ListRows,
    ScanRange,
    StoredChange,
    StoredRow,
    StoreOptions,
)

Row: TypeAlias = tuple[bytes, int, int | None]  # payload, version, expires_ms
End: TypeAlias = tuple[int, bytes, bytes]  # expires_ms, category, key

_INSORT_MAX = 64  # up to so many keys are sorted in or taken out one by one, beyond that all at once
_NOTES_MIN = 64  # up to so many notes of ends, those nobody needs do no harm
_SPARE_MIN = 64  # so many changes too many, and a quarter of those kept, are given up at once

_version = attrgetter("version")


def live(row: Row | None, now_ms: int) -> bool:
    """Say whether there is a row and it hasn't ended."""
    return row is not None and (row[2] is None or now_ms < row[2])


class Rows:
    """The rows of one category: a dict for points, and a list of its keys that is sorted on demand."""

    __slots__ = ("_fresh", "_gone", "_sorted", "rows")

    def __init__(self) -> None:
        self.rows: dict[bytes, Row] = {}
        # Its keys in order, once the fresh are sorted in and the gone taken out, each as often as it is there.
        self._sorted: list[bytes] | None = []
        self._fresh: list[bytes] = []
        self._gone: list[bytes] = []

    def put(self, key: bytes, row: Row) -> None:
        """Store a row, over the one that is there."""
        if key not in self.rows:
            self._fresh.append(key)
        self.rows[key] = row

    def remove(self, key: bytes) -> None:
        """Remove a row that is there."""
        del self.rows[key]
        self._gone.append(key)
        if len(self._gone) > len(self.rows) + _INSORT_MAX:
            self.keys()  # or a job that never scans would keep every key it ever removed

    def restore(self, key: bytes, row: Row | None) -> None:
        """Put back what was there; `None` is no row."""
        if row is not None:
            self.put(key, row)
        elif key in self.rows:
            self.remove(key)

    def keys(self) -> list[bytes]:
        """Return the keys in order."""
        ordered, fresh, gone = self._sorted, self._fresh, self._gone
        # An interrupt may come between a row and its key: then there is one key too many, and never one too few.
        if ordered is None or len(ordered) + len(fresh) - len(gone) != len(self.rows):
            ordered, fresh, gone = sorted(self.rows), [], []
        elif fresh or gone:
            self._sorted = None  # until all is done: an interrupt may come here too
            if len(fresh) + len(gone) <= _INSORT_MAX:
                for key in fresh:
                    insort(ordered, key)
                for key in gone:
                    del ordered[bisect_left(ordered, key)]
            else:
                ordered += fresh
                ordered.sort()
                if gone:
                    ordered = [key for key in dict.fromkeys(ordered) if key in self.rows]
        else:
            return ordered
        self._fresh, self._gone = [], []
        self._sorted = ordered
        return ordered

    def span(self, start: bytes, stop: bytes | None) -> list[bytes]:
        """Return the keys with start <= key < stop in order."""
        keys, places = self.places(start, stop)
        return keys[places.start : places.stop]

    def places(self, start: bytes, stop: bytes | None) -> tuple[list[bytes], range]:
        """Return all keys in order, and the places of those with start <= key < stop: nothing is copied."""
        keys = self.keys()
        begin = bisect_left(keys, start)
        return keys, range(begin, max(begin, len(keys) if stop is None else bisect_left(keys, stop)))


_NO_ROWS = Rows()


class Table:
    """All rows of a job, and the answers to the reads of them."""

    def __init__(self) -> None:
        self.categories: dict[bytes, Rows] = {}
        self.now_ms = 0  # what decides which rows are live
        self.answers: dict[type, Callable[[Any], Any]] = {
            GetRow: lambda message: self.payload(message.category, message.key),
            HasRow: lambda message: self.row(message.category, message.key) is not None,
            GetEntry: self._get_entry,
            GetRows: self._get_rows,
            ScanRange: self.scan,
            CountRange: self._count,
            ListCategories: self._list_categories,
            ListEntries: self._list_entries,
            ListRows: self._list_rows,
        }

    def of(self, category: bytes) -> Rows:
        """Return a category's rows, to be added to."""
        rows = self.categories.get(category)
        if rows is None:
            rows = self.categories[category] = Rows()
        return rows

    def row(self, category: bytes, key: bytes) -> Row | None:
        """Return a live row, or `None`."""
        rows = self.categories.get(category)
        row = None if rows is None else rows.rows.get(key)
        return row if live(row, self.now_ms) else None

    def payload(self, category: bytes, key: bytes) -> bytes | None:
        """Return a live row's payload, or `None`."""
        row = self.row(category, key)
        return None if row is None else row[0]

    def scan(self, span: ScanRange) -> list[tuple[bytes, bytes]]:
        """Return the keys and payloads of the live rows in a range."""
        found = self._live(span.category, span.start, span.stop, reverse=span.reverse)
        return [(key, b"" if span.keys_only else row[0]) for key, row in islice(found, span.limit)]

    def live_bytes(self) -> int:
        """Return how many bytes the payloads of all live rows have."""
        every = (row for rows in self.categories.values() for row in rows.rows.values())
        return sum(len(row[0]) for row in every if live(row, self.now_ms))

    def _live(
        self, category: bytes, start: bytes, stop: bytes | None, *, reverse: bool = False
    ) -> Iterator[tuple[bytes, Row]]:
        rows = self.categories.get(category, _NO_ROWS)
        keys, places = rows.places(start, stop)
        now_ms = self.now_ms
        found = map(keys.__getitem__, reversed(places) if reverse else places)
        return ((key, row) for key in found if live(row := rows.rows[key], now_ms))

    def _get_entry(self, message: GetEntry) -> StoredRow | None:
        row = self.row(message.category, message.key)
        return None if row is None else StoredRow(bytes(message.key), *row)

    def _list_rows(self, message: ListRows) -> list[StoredRow]:
        rows: list[StoredRow] = []
        nbytes = 0
        for key, row in islice(self._live(message.category, message.start, None), message.rows_max):
            rows.append(StoredRow(key, *row))
            nbytes += len(key) + len(row[0])
            if nbytes >= message.bytes_max:
                break
        return rows

    def _get_rows(self, message: GetRows) -> list[tuple[bytes, bytes]]:
        found = ((key, self.row(message.category, key)) for key in message.keys)
        return [(key, row[0]) for key, row in found if row is not None]

    def _count(self, message: CountRange) -> int:
        return sum(1 for _ in self._live(message.category, message.start, message.stop))

    def _list_categories(self, _message: ListCategories) -> list[bytes]:
        now_ms = self.now_ms
        every = self.categories.items()
        return sorted(category for category, rows in every if any(live(row, now_ms) for row in rows.rows.values()))

    def _list_entries(self, message: ListEntries) -> list[StoredRow]:
        rows = self.categories.get(message.category, _NO_ROWS)
        entries = [StoredRow(key, *row) for key, row in rows.rows.items() if live(row, self.now_ms)]
        return sorted(entries, key=_version)


class Ends:
    """Which rows end when: notes of the ends to come, and of those that have been."""

    def __init__(self, categories: dict[bytes, Rows]) -> None:
        self._categories = categories
        self._coming: list[End] = []  # both are heaps
        self._past: list[End] = []
        self._notes_max = _NOTES_MIN

    def add(self, category: bytes, key: bytes, expires_ms: int, now_ms: int) -> None:
        """Note a row's end, which may be over already."""
        heappush(self._past if expires_ms <= now_ms else self._coming, (expires_ms, category, key))

    def advance(self, now_ms: int) -> int:
        """Take notice of the rows that have ended by now; return how many bytes their payloads have."""
        died = 0
        coming = self._coming
        while coming and coming[0][0] <= now_ms:
            end = heappop(coming)
            row = self._row(end)
            if row is not None and not (coming and coming[0] == end):  # else the next note says the same
                died += len(row[0])
                heappush(self._past, end)
        return died

    def take(self, limit: int) -> list[End]:
        """Return the first rows of those noticed to have ended, at most `limit`, and forget them."""
        taken: list[End] = []
        past = self._past
        while past and len(taken) < limit:
            end = heappop(past)
            if self._row(end) is not None and (not taken or taken[-1] != end):
                taken.append(end)
        return taken

    def first_ms(self) -> int | None:
        """Return when the first row ends or ended, in Unix milliseconds; `None` if no row does."""
        if len(self._coming) + len(self._past) > self._notes_max:
            for notes in (self._coming, self._past):
                notes[:] = sorted({end for end in notes if self._row(end) is not None})
            self._notes_max = max(_NOTES_MIN, 2 * (len(self._coming) + len(self._past)))
        for notes in (self._past, self._coming):
            while notes and self._row(notes[0]) is None:
                heappop(notes)
        return min((notes[0][0] for notes in (self._past, self._coming) if notes), default=None)

    def rebuild(self, now_ms: int) -> None:
        """Note the ends of all rows anew."""
        ends = [
            (row[2], category, key)
            for category, rows in self._categories.items()
            for key, row in rows.rows.items()
            if row[2] is not None
        ]
        self._past[:] = [end for end in ends if end[0] <= now_ms]
        self._coming[:] = [end for end in ends if end[0] > now_ms]
        heapify(self._past)
        heapify(self._coming)

    def _row(self, end: End) -> Row | None:
        """Return the row a note is of, `None` if it has no such end any more."""
        expires_ms, category, key = end
        row = self._categories[category].rows.get(key)
        return row if row is not None and row[2] == expires_ms else None


class Changes:
    """The newest changes of a job, in the order of versions."""

    def __init__(self, kept_max: int) -> None:
        self.first: int = 0  # where in the list the kept ones begin
        self._kept_max = kept_max
        self._changes: list[StoredChange] = []

    def __len__(self) -> int:
        """Return the place of the next change."""
        return len(self._changes)

    def add(self, change: StoredChange) -> None:
        """Keep one more."""
        self._changes.append(change)

    def back_to(self, length: int, first: int) -> None:
        """Forget what was added since there were so many and the kept ones began there."""
        del self._changes[length:]
        self.first = first

    def forget(self) -> None:
        """Give up most of what isn't kept; it can't be taken back afterwards."""
        if self.first > _SPARE_MIN + self._kept_max // 4:
            self._changes, self.first = self._changes[self.first - 1 :], 1  # the last of them says what is missing

    def trim(self) -> None:
        """Keep the newest only."""
        self.first = max(self.first, len(self._changes) - self._kept_max)

    def since(self, after: int, limit: int) -> list[StoredChange] | Failed:
        """Return the first `limit` changes with a version above `after`; `FeedTruncated` if one of them isn't kept."""
        first = max(self.first, len(self._changes) - self._kept_max)  # in the middle of a group as at its end
        if first and self._changes[first - 1].version > after:
            return Failed(FeedTruncated(self._changes[first].version))
        at = bisect_right(self._changes, after, lo=first, key=_version)
        return self._changes[at : at + limit]


class AccountsMark(NamedTuple):
    """Where the accounts stand, to come back to."""

    used: int
    changes: int
    first_change: int


class Accounts:
    """What is kept up with every change of a row, as far as a job wants it: used bytes, ends, changes."""

    def __init__(self, table: Table, options: StoreOptions) -> None:
        self.ends: Ends = Ends(table.categories)
        self.changes: Changes | None = Changes(options.feed_changes_max) if options.feed_changes_max > 0 else None
        self.used: int = 0  # bytes; stays 0 without a quota
        self._has_quota = options.max_bytes is not None
        self._table = table

    @property
    def always(self) -> bool:
        """Whether they are wanted even where no row ends."""
        return self._has_quota or self.changes is not None

    def counted(self, row: Row | None) -> int:
        """Return how many bytes of the quota a row takes up, if there is one."""
        return len(row[0]) if self._has_quota and row is not None and live(row, self._table.now_ms) else 0

    def tell(
        self,
        version: int,
        kind: ChangeKind,
        category: bytes,
        key: bytes,
        payload: bytes | None = None,
        stop: bytes | None = None,
    ) -> None:
        """Keep a change, if changes are kept."""
        if self.changes is not None:
            self.changes.add(StoredChange(version, kind, category, key, payload, stop))

    def mark(self) -> AccountsMark:
        """Return where the accounts stand."""
        changes = self.changes
        return AccountsMark(self.used, *((0, 0) if changes is None else (len(changes), changes.first)))

    def back_to(self, mark: AccountsMark) -> None:
        """Take back what was added to used bytes and changes; the rows' ends are up to who puts the rows back."""
        self.used = mark.used
        if self.changes is not None:
            self.changes.back_to(mark.changes, mark.first_change)

    def advance(self) -> None:
        """Let the rows that have ended by now count no more."""
        try:
            died = self.ends.advance(self._table.now_ms)
            self.used -= died if self._has_quota else 0
        except BaseException:  # an interrupt came between a row and its bytes
            self.recount()
            raise

    def recount(self) -> None:
        """Make up ends and used bytes anew, from the rows."""
        self.ends.rebuild(self._table.now_ms)
        self.used = self._table.live_bytes() if self._has_quota else 0
