"""The memory adapter: jobs that live as long as their process, and the reference the SQLite one is compared with.

Rules:
  1. Same answers as any other adapter, to the byte; that is what the conformance suite and the mirror test hold.
  2. Keys are sorted when somebody scans, not when somebody writes: a put is a dict assignment.
  3. A batch is decided before its first write; only an interrupt in the middle of a group makes it undo anything.

Doesn't know: files, SQL, threads, futures, clocks.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from persistency.errors import Conflict
from persistency.storage.files import file_name
from persistency.storage.port import (
    PLACES,
    Barrier,
    Batch,
    CountRange,
    DropRange,
    DropRow,
    Expect,
    Failed,
    GetEntry,
    GetRow,
    GetRows,
    Group,
    HasRow,
    LastVersion,
    ListCategories,
    ScanRange,
    Status,
    StoredJob,
    StoredRow,
    StoreOptions,
)

_Row: TypeAlias = tuple[bytes, int, int | None]  # payload, version, expires_ms
_INSORT_MAX = 64  # up to so many new keys are sorted in one by one, beyond that all at once


class _Category:
    """The rows of one category: a dict for points, and a list of its keys that is sorted on demand."""

    __slots__ = ("_fresh", "_sorted", "rows")

    def __init__(self) -> None:
        self.rows: dict[bytes, _Row] = {}
        self._sorted: list[bytes] = []
        self._fresh: list[bytes] = []

    def put(self, key: bytes, row: _Row) -> None:
        if key not in self.rows:
            self._fresh.append(key)
        self.rows[key] = row

    def restore(self, key: bytes, row: _Row | None) -> None:
        """Put back what was there, `None` for nothing; the keys are sorted anew when somebody scans."""
        self.rows.pop(key, None)
        if row is not None:
            self.rows[key] = row
        self._sorted, self._fresh = [], list(self.rows)

    def remove(self, keys: list[bytes]) -> None:
        self.keys()
        for key in keys:
            del self.rows[key]
        if len(keys) == 1:
            del self._sorted[bisect_left(self._sorted, keys[0])]
        else:
            self._sorted = [key for key in self._sorted if key in self.rows]

    def keys(self) -> list[bytes]:
        if len(self._fresh) <= _INSORT_MAX:
            for key in self._fresh:
                insort(self._sorted, key)
        else:
            self._sorted += self._fresh
            self._sorted.sort()
        self._fresh.clear()
        return self._sorted

    def span(self, start: bytes, stop: bytes | None) -> list[bytes]:
        keys = self.keys()
        end = len(keys) if stop is None else bisect_left(keys, stop)
        return keys[bisect_left(keys, start) : end]


def _live(row: _Row | None, now_ms: int) -> bool:
    return row is not None and (row[2] is None or now_ms < row[2])


class MemoryStore:
    """A job's rows in dicts. Options make no difference: memory survives neither process nor power."""

    reads_in_place = True

    def __init__(self, options: StoreOptions) -> None:
        self.options = options
        self._categories: dict[bytes, _Category] = {}
        self._version = 0
        self._now_ms = 0
        self._undo: list[tuple[bytes, bytes, _Row | None]] = []  # what the group in hand has changed
        self._answers: dict[type, Callable[[Any], Any]] = {
            Batch: self._batch,
            Expect: self._expect,
            DropRow: self._drop_row,
            DropRange: self._drop_range,
            GetRow: self._get_row,
            HasRow: lambda message: self._row(message.category, message.key) is not None,
            GetEntry: self._get_entry,
            GetRows: self._get_rows,
            ScanRange: self._scan,
            CountRange: self._count,
            ListCategories: self._list_categories,
            LastVersion: lambda _message: self._version,
            Barrier: lambda _message: None,
        }

    def apply(self, group: Group, now_ms: int) -> list[Any]:
        """Run a group; see the port."""
        self._now_ms = now_ms
        before, self._undo = self._version, []
        try:
            return list(self._each(group))
        except BaseException:  # an interrupt, or no memory: then nothing of the group was applied
            for category, key, row in reversed(self._undo):
                self._categories[category].restore(key, row)
            self._version = before
            raise

    def get(self, category: bytes, key: bytes, now_ms: int) -> bytes | None:
        """Return the payload of a live row, or `None`."""
        self._now_ms = now_ms
        return self._get_row(GetRow(category, key))

    def scan(self, span: ScanRange, now_ms: int) -> list[tuple[bytes, bytes]]:
        """Return the live rows of a range."""
        self._now_ms = now_ms
        return self._scan(span)

    def read(self, message: Any, now_ms: int) -> Any:
        """Answer one read message."""
        self._now_ms = now_ms
        return self._answers[type(message)](message)

    def status(self) -> Status:
        """Return the numbers; there is no log."""
        return Status(self._version, 0)

    def close(self, *, tidy: bool = True) -> None:  # noqa: ARG002  # there is nothing to tidy up
        """Forget everything."""
        self._categories.clear()

    def _each(self, group: Group) -> Iterator[Any]:
        places = iter(group)
        for category, key, payload in zip(places, places, places, strict=True):
            if category is None:
                yield self._answers[type(key)](key)
            else:
                self._put(category, key, payload)
                yield None

    def _put(self, category: bytes, key: bytes, payload: bytes) -> None:
        self._version += 1
        rows = self._categories.get(category)
        if rows is None:
            rows = self._categories[category] = _Category()
        self._undo.append((category, bytes(key), rows.rows.get(key)))
        rows.put(bytes(key), (payload, self._version, None))

    def _batch(self, batch: Batch) -> int | Failed:
        for message in batch.items[1::PLACES] if batch.expects else ():
            if type(message) is Expect:
                row = self._row(message.category, message.key)
                actual = None if row is None else row[1]
                if actual != message.version:
                    return Failed(Conflict(message.key, message.version, actual))
        for _ in self._each(batch.items):
            pass
        return self._version

    def _expect(self, _message: Expect) -> None:
        self._version += 1  # its batch has looked already; like every operation it takes a version

    def _row(self, category: bytes, key: bytes) -> _Row | None:
        rows = self._categories.get(category)
        row = None if rows is None else rows.rows.get(key)
        return row if _live(row, self._now_ms) else None

    def _drop_row(self, message: DropRow) -> bool:
        self._version += 1
        rows = self._categories.get(message.category)
        if rows is None or message.key not in rows.rows:
            return False
        live = _live(rows.rows[message.key], self._now_ms)
        self._undo.append((message.category, message.key, rows.rows[message.key]))
        rows.remove([message.key])
        return live

    def _drop_range(self, message: DropRange) -> int:
        self._version += 1
        rows = self._categories.get(message.category)
        if rows is None:
            return 0
        doomed = rows.span(message.start, message.stop)
        live = sum(_live(rows.rows[key], self._now_ms) for key in doomed)
        self._undo += ((message.category, key, rows.rows[key]) for key in doomed)
        rows.remove(doomed)
        return live

    def _get_row(self, message: GetRow) -> bytes | None:
        row = self._row(message.category, message.key)
        return None if row is None else row[0]

    def _get_entry(self, message: GetEntry) -> StoredRow | None:
        row = self._row(message.category, message.key)
        return None if row is None else StoredRow(bytes(message.key), *row)

    def _get_rows(self, message: GetRows) -> list[tuple[bytes, bytes]]:
        found = ((key, self._row(message.category, key)) for key in message.keys)
        return [(key, row[0]) for key, row in found if row is not None]

    def _live_rows(self, category: bytes, start: bytes, stop: bytes | None) -> list[tuple[bytes, bytes]]:
        rows = self._categories.get(category)
        if rows is None:
            return []
        return [(key, rows.rows[key][0]) for key in rows.span(start, stop) if _live(rows.rows[key], self._now_ms)]

    def _scan(self, span: ScanRange) -> list[tuple[bytes, bytes]]:
        rows = self._live_rows(span.category, span.start, span.stop)
        if span.reverse:
            rows.reverse()
        del rows[len(rows) if span.limit is None else span.limit :]
        return [(key, b"") for key, _ in rows] if span.keys_only else rows

    def _count(self, message: CountRange) -> int:
        return len(self._live_rows(message.category, message.start, message.stop))

    def _list_categories(self, _message: ListCategories) -> list[bytes]:
        return sorted(category for category in self._categories if self._live_rows(category, b"", None))


class MemoryRoot:
    """Jobs in memory, for one `Persistency` alone; a job ends when it is closed."""

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
