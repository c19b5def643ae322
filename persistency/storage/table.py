"""The kv table in SQL: every statement that reads or writes a job's rows.

Rules:
  1. No statement begins or ends a transaction; whoever calls has one open.
  2. Consecutive plain puts are written by one statement; big runs of them in key order, because a B-tree takes
     neighbours together. Versions still follow the order of arrival.
  3. Every operation moves `version` on by one, whether it changed a row or not.
  4. A row is live if and only if now_ms < expires_ms; no statement answers with one that isn't.

Doesn't know: transactions, groups, files, what an error means.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, islice
from operator import le
from typing import Any

import apsw

from persistency.errors import Conflict
from persistency.storage.port import (
    PLACES,
    CountRange,
    DropRange,
    DropRow,
    Expect,
    GetEntry,
    GetRow,
    GetRows,
    Group,
    HasRow,
    LastVersion,
    ListCategories,
    ScanRange,
    StoredRow,
)

SORT_ROWS_MIN = 64  # below that, sorting costs more than it saves
TOGETHER_ROWS_MIN = 3  # below that, a statement for each row is as fast
TOGETHER_BYTES_MAX = 4 * 1024 * 1024  # per statement: its rows are copied once
_PLACES_MAX = 2**20  # as many as there are characters of four bytes in UTF-8, and a few less

_UPSERT = (
    " ON CONFLICT (category, key) DO UPDATE SET"
    " payload = excluded.payload, version = excluded.version, expires_ms = excluded.expires_ms"
)
_INSERT = "INSERT INTO kv (category, key, payload, version) "
_ONE = _INSERT + "VALUES (?1, ?2, ?3, ?4)" + _UPSERT
# Any number of rows in one statement: SQLite reads them from an array by itself, and takes the interpreter lock not
# once in between. (A statement of many VALUES is ended and begun again every few hundred rows; beside a thread that
# keeps the interpreter busy each of these times costs 5 ms.) A row comes as one blob: the length of its key as a
# character, which takes three bytes of UTF-8, then key and payload.
_LENGTH = "unicode(CAST(substr(value, {at}, 3) AS TEXT)) - 2048"
_ROWS = "SELECT ?1, substr(value, {at} + 3, {length}), substr(value, {at} + 3 + {length}), {version} FROM carray(?3)"
# In order of arrival: ?2 is the version before the first row's.
_RUN = _INSERT + _ROWS.format(at=1, length=_LENGTH.format(at=1), version="?2 + rowid") + " WHERE true" + _UPSERT
# In order of keys: its place in the order of arrival stands before a row, as a character of four bytes.
_PLACE = "unicode(CAST(substr(value, 1, 4) AS TEXT)) - 65535"
_SORTED = _INSERT + _ROWS.format(at=5, length=_LENGTH.format(at=5), version=f"?2 + {_PLACE}") + " WHERE true" + _UPSERT

# A column's type is only a wish: another tool, or a damaged file, may have put text or a number there.
POINT = "SELECT CAST(payload AS BLOB), CAST(expires_ms AS INTEGER) FROM kv WHERE category = ? AND key = ?"
_ENTRY = (
    "SELECT key, CAST(payload AS BLOB), CAST(version AS INTEGER), CAST(expires_ms AS INTEGER)"
    " FROM kv WHERE category = ? AND key = ?"
)
_DROP_ROW = "DELETE FROM kv WHERE category = ? AND key = ? RETURNING CAST(expires_ms AS INTEGER)"
_EXPIRED = "DELETE FROM kv WHERE category = ?1 AND key >= ?2 AND expires_ms <= ?3"
_HAS = "SELECT EXISTS (SELECT 1 FROM kv WHERE category = ? AND key = ?)"
_SPAN = " FROM kv WHERE category = ?1 AND key >= ?2 AND (expires_ms IS NULL OR expires_ms > ?3)"
# The expiry stands behind the payload in a row: looking at it walks through all of a large one.
_SPAN_WITHOUT_EXPIRY = " FROM kv WHERE category = ?1 AND key >= ?2 AND ?3 = ?3"
_ANY_EXPIRY = "SELECT EXISTS (SELECT 1 FROM kv WHERE expires_ms IS NOT NULL)"
_NEXT_CATEGORY = "SELECT min(category) FROM kv WHERE category > ?"


class _Marks(dict[int, bytes]):
    """Numbers as single characters in UTF-8, from one on of which all take the same number of bytes."""

    def __init__(self, first: int) -> None:
        self._first = first

    def __missing__(self, number: int) -> bytes:
        mark = self[number] = chr(self._first + number).encode()
        if len(self) > _MARKS_KEPT:
            self.clear()
        return mark


_MARKS_KEPT = 65_536
_LENGTHS = _Marks(2048)  # up to 10,240, far below the surrogates
_PLACE_MARKS = _Marks(65_536)
# Part of SQLite's own source, but a build may leave it out; then each row has its statement.
_CARRAY = hasattr(apsw, "carray") and "ENABLE_CARRAY" in apsw.compile_options


def _in_order(keys: list[bytes]) -> bool:
    return all(map(le, keys, islice(keys, 1, None)))


class Table:
    """A job's rows. `version` is the last operation's, `now_ms` the time that decides what is live."""

    def __init__(self, connection: apsw.Connection, version: int) -> None:
        self.version = version
        self.now_ms = 0
        self._connection = connection
        # One cursor for everything: running the next statement resets the one before, so no read is left open.
        self.execute: Callable[..., Any] = connection.cursor().execute
        self.answers: dict[type, Callable[[Any], Any]] = {
            DropRow: self.drop_row,
            DropRange: self.drop_range,
            GetRow: lambda message: self.get(message.category, message.key, self.now_ms),
            HasRow: self.has,
            GetEntry: self.entry,
            GetRows: self.get_rows,
            ScanRange: self.scan,
            CountRange: self.count,
            ListCategories: self.categories,
            LastVersion: lambda _message: self.version,
        }

    def write(self, rows: Group) -> None:
        """Write plain puts: a flat list of category, key, payload."""
        count = len(rows) // PLACES
        before = self.version
        self.version += count
        if count < TOGETHER_ROWS_MIN or not _CARRAY:
            for at in range(count):
                self.execute(_ONE, (*rows[at * PLACES : (at + 1) * PLACES], before + at + 1))
            return
        # So many rows to a statement that the copy of them stays small, whatever the group has.
        size = sum(map(len, rows)) // count + 1
        step = min(max(1, TOGETHER_BYTES_MAX // size), _PLACES_MAX)
        for at in range(0, count, step):
            self._write_together(rows[at * PLACES : (at + step) * PLACES], before + at)

    def _write_together(self, rows: Group, before: int) -> None:
        categories, keys, payloads = rows[::PLACES], rows[1::PLACES], rows[2::PLACES]
        alone = categories.count(categories[0]) == len(categories)
        if alone and (len(keys) < SORT_ROWS_MIN or _in_order(keys)):
            blobs = map(b"".join, zip(map(_LENGTHS.__getitem__, map(len, keys)), keys, payloads, strict=True))
            self.execute(_RUN, (categories[0], before, apsw.carray(tuple(blobs))))
            return
        # Twice stable: by key, then by category. Of equal keys the later row stays the later one, and wins.
        order = sorted(range(len(keys)), key=keys.__getitem__)
        order.sort(key=categories.__getitem__)
        for category, run in groupby(order, categories.__getitem__):
            sorted_blobs = tuple(
                b"".join((_PLACE_MARKS[at], _LENGTHS[len(keys[at])], keys[at], payloads[at])) for at in run
            )
            self.execute(_SORTED, (category, before, apsw.carray(sorted_blobs)))

    def get(self, category: bytes, key: bytes, now_ms: int) -> bytes | None:
        """Return a live row's payload, or `None`."""
        row = self.execute(POINT, (category, key)).fetchone()
        if row is None or (row[1] is not None and row[1] <= now_ms):
            return None
        payload: bytes = row[0]
        return payload

    def has(self, message: HasRow) -> bool:
        """Return whether there is a live row, without reading its payload."""
        if self._any_expiry():
            return self.entry(message) is not None
        return bool(self.execute(_HAS, message).fetchone()[0])

    def entry(self, message: GetEntry | HasRow | Expect) -> StoredRow | None:
        """Return a live row whole, or `None`."""
        row = self.execute(_ENTRY, (message.category, message.key)).fetchone()
        if row is None or (row[3] is not None and row[3] <= self.now_ms):
            return None
        return StoredRow(*row)

    def conflict(self, message: Expect) -> Conflict | None:
        """Return what stands against an expectation, or `None`."""
        row = self.entry(message)
        actual = None if row is None else row.version
        return None if actual == message.version else Conflict(message.key, message.version, actual)

    def get_rows(self, message: GetRows) -> list[tuple[bytes, bytes]]:
        """Return the rows of these keys that are there, in the order asked."""
        get, category, now_ms = self.get, message.category, self.now_ms
        found = ((key, get(category, key, now_ms)) for key in message.keys)
        return [(key, payload) for key, payload in found if payload is not None]

    def scan(self, message: ScanRange) -> list[tuple[bytes, bytes]]:
        """Return the live rows of a range, in key order or in reverse."""
        columns = "key, x''" if message.keys_only else "key, CAST(payload AS BLOB)"
        payloads = not message.keys_only
        sql, bindings = self._span(message.category, message.start, message.stop, filtered=payloads)
        sql = f"SELECT {columns}{sql} ORDER BY key {'DESC' if message.reverse else 'ASC'} LIMIT ?"
        limit = -1 if message.limit is None else message.limit
        rows: list[tuple[bytes, bytes]] = self.execute(sql, (*bindings, limit)).fetchall()
        return rows

    def count(self, message: CountRange) -> int:
        """Return how many live rows are in a range."""
        sql, bindings = self._span(message.category, message.start, message.stop, filtered=False)
        return int(self.execute("SELECT count(*)" + sql, bindings).fetchone()[0])

    def categories(self, _message: ListCategories) -> list[bytes]:
        """Return the categories with a live row, stepping from one to the next by the index."""
        found: list[bytes] = []
        at: bytes | None = b""
        while True:
            at = self.execute(_NEXT_CATEGORY, (at,)).fetchone()[0]
            if at is None:
                return found
            sql, bindings = self._span(at, b"", None)
            if self.execute(f"SELECT EXISTS (SELECT 1{sql})", bindings).fetchone()[0]:
                found.append(at)

    def drop_row(self, message: DropRow) -> bool:
        """Remove a row; return whether a live one was there."""
        self.version += 1
        row = self.execute(_DROP_ROW, (message.category, message.key)).fetchall()
        return bool(row) and (row[0][0] is None or row[0][0] > self.now_ms)

    def drop_range(self, message: DropRange) -> int:
        """Remove a range of rows; return how many live ones were there."""
        self.version += 1
        category, start, stop = message
        if self._any_expiry():
            upper = "" if stop is None else " AND key < ?4"
            bindings = (category, start, self.now_ms) if stop is None else (category, start, self.now_ms, stop)
            self.execute(_EXPIRED + upper, bindings)
        sql, bindings = self._span(category, start, stop)
        self.execute("DELETE" + sql, bindings)
        return self._connection.changes()

    def _any_expiry(self) -> bool:
        """Return whether any row has an expiry; the partial index knows at once."""
        return bool(self.execute(_ANY_EXPIRY).fetchone()[0])

    def _span(
        self, category: bytes, start: bytes, stop: bytes | None, *, filtered: bool = True
    ) -> tuple[str, tuple[Any, ...]]:
        """Return what follows the columns of a statement over a range; not `filtered`: by expiry only if need be."""
        sql = _SPAN if filtered or self._any_expiry() else _SPAN_WITHOUT_EXPIRY
        if stop is None:
            return sql, (category, start, self.now_ms)
        return sql + " AND key < ?4", (category, start, self.now_ms, stop)
