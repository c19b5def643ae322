"""The kv table in SQL: every statement that reads or writes a job's rows.

Rules:
  1. No statement begins or ends a transaction; whoever calls has one open.
  2. Every operation moves `version` on by one, whether it changed a row or not; a swap or a touch that doesn't come to
     pass doesn't.
  3. A row is live if and only if now_ms < expires_ms; no statement answers with one that isn't.
  4. What a job has no use for costs it nothing: without ends, a quota or a change log no statement more is run.

Doesn't know: transactions, groups, files, what an error means.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import Any, Final

import apsw

from persistency.errors import Conflict, Corrupt, Misuse, QuotaExceeded
from persistency.storage.bulk import CARRAY, UPSERT, Rows, chunks
from persistency.storage.changes import DROPPED, ENDED, Changes
from persistency.storage.mark import Mark, make_mark
from persistency.storage.port import (
    CountRange,
    DropRange,
    DropRow,
    Expect,
    Failed,
    GetEntry,
    GetRow,
    GetRows,
    HasRow,
    LastVersion,
    ListCategories,
    ListChanges,
    ListEntries,
    ListRows,
    Reap,
    ScanRange,
    SetRow,
    StoredChange,
    StoredRow,
    SwapRow,
    TouchRow,
    UsedBytes,
)
from persistency.storage.quota import USED, USED_MS, Quota, count_used
from persistency.storage.soundness import check_blobs

TOGETHER_ROWS_MIN = 3  # below that, a statement for each row is as fast
LATEST_MS = "latest_ms"

_ONE = "INSERT INTO kv (category, key, payload, version) VALUES (?1, ?2, ?3, ?4)" + UPSERT
_ONE_ENDING = "INSERT INTO kv (category, key, payload, version, expires_ms) VALUES (?1, ?2, ?3, ?4, ?5)" + UPSERT
_TOUCH = "UPDATE kv SET expires_ms = ?3 WHERE category = ?1 AND key = ?2"

# A column's type is only a wish: another tool, or a damaged file, may have put text or a number there.
POINT = "SELECT CAST(payload AS BLOB), CAST(expires_ms AS INTEGER) FROM kv WHERE category = ? AND key = ?"
_ENTRY_COLUMNS = "SELECT key, CAST(payload AS BLOB), CAST(version AS INTEGER), CAST(expires_ms AS INTEGER)"
_ENTRY = _ENTRY_COLUMNS + " FROM kv WHERE category = ? AND key = ?"
# Without the payload, which may have megabytes.
_HEAD = (
    "SELECT CAST(version AS INTEGER), CAST(expires_ms AS INTEGER), octet_length(payload)"
    " FROM kv WHERE category = ? AND key = ?"
)
_DROP_ROW = "DELETE FROM kv WHERE category = ? AND key = ? RETURNING CAST(expires_ms AS INTEGER)"
_DROP_LIVE_ROW = "DELETE FROM kv WHERE category = ? AND key = ? AND (expires_ms IS NULL OR expires_ms > ?)"
_DROP_ENDED = "DELETE FROM kv WHERE category = ?1 AND key >= ?2 AND expires_ms <= ?3"
_HAS = "SELECT EXISTS (SELECT 1 FROM kv WHERE category = ? AND key = ?)"
_SPAN = " FROM kv WHERE category = ?1 AND key >= ?2 AND (expires_ms IS NULL OR expires_ms > ?3)"
# The expiry stands behind the payload in a row: looking at it walks through all of a large one.
_SPAN_WITHOUT_END = " FROM kv WHERE category = ?1 AND key >= ?2 AND ?3 = ?3"
_NEXT_EXPIRY = "SELECT expires_ms FROM kv WHERE expires_ms IS NOT NULL ORDER BY expires_ms LIMIT 1"
_NEXT_CATEGORY = "SELECT min(category) FROM kv WHERE category > ?"
_REAP = f"DELETE FROM kv WHERE (category, key) IN ({ENDED})"


class Table:
    """A job's rows. `version` is the last operation's, `now_ms` the time that decides what is live.

    `quota` and `changes` are what is kept beside the rows, where the job has them. Where changes were kept once and
    aren't now, `reaping_counts`: it takes a version, so that whoever followed them sees that some are missing.
    """

    def __init__(self, connection: apsw.Connection, version: int, now_ms: int) -> None:
        self.version: int = version
        self.now_ms: int = now_ms
        self.quota: Quota | None = None
        self.changes: Changes | None = None
        self.reaping_counts = False
        self._connection = connection
        # One cursor for everything: running the next statement resets the one before, so no read is left open.
        self.execute: Callable[..., Any] = connection.cursor().execute
        self.next_expiry_ms: int | None = None  # see `learn_ends`, and so is this:
        self.has_ends: bool = True  # there may be a row with one

    # -- what is kept beside the rows ----------------------------------------------------------------------------

    def mark(self) -> Mark:
        """Return what is known now."""
        quota, changes = self.quota, self.changes
        used, used_ms = (0, 0) if quota is None else (quota.used, quota.used_ms)
        kept, dropped = (0, 0) if changes is None else (changes.count, changes.dropped)
        return make_mark((self.version, self.next_expiry_ms, used, used_ms, kept, dropped))

    def back_to(self, mark: Mark) -> None:
        """Know again what was known then, after what came since was undone."""
        self.version, self.next_expiry_ms = mark.version, mark.next_expiry_ms
        if self.quota is not None:
            self.quota.used, self.quota.used_ms = mark.used, mark.used_ms
        if self.changes is not None:
            self.changes.count, self.changes.dropped = mark.changes, mark.dropped

    def refusal(self, mark: Mark) -> QuotaExceeded | None:
        """Return what the quota has against what was written since `mark`, or `None`."""
        return None if self.quota is None else self.quota.refusal(mark.used)

    def used(self) -> int:
        """Return the bytes of all live payloads."""
        if self.quota is None:
            return count_used(self.execute, self.now_ms)
        self.quota.advance(self.now_ms, self.next_expiry_ms)
        return self.quota.used

    def tell(self, now_ms: int) -> None:
        """Say what time it is, before anything is written."""
        self.now_ms = now_ms
        if self.quota is not None:
            self.quota.advance(now_ms, self.next_expiry_ms)

    def notes(self) -> dict[str, int]:
        """Return the numbers that have to be stored with a transaction, besides the version."""
        notes: dict[str, int] = {}
        if self.next_expiry_ms is not None:
            notes[LATEST_MS] = self.now_ms
        if self.quota is not None:
            notes |= {USED: self.quota.used, USED_MS: self.quota.used_ms}
        if self.changes is not None:
            self.changes.trim()
            notes[DROPPED] = self.changes.dropped
        return notes

    # -- writes --------------------------------------------------------------------------------------------------

    def write(
        self,
        categories: Sequence[bytes],
        keys: Sequence[bytes],
        payloads: Sequence[bytes],
        ends: Sequence[int | None] | None = None,
    ) -> None:
        """Write rows in this order; `ends` are their expiries, where some have one."""
        count = len(keys)
        before = self.version
        self.version += count
        if ends is not None:
            self._expect_ends(ends)
        if self.quota is not None and count:
            self.quota.write(categories, keys, payloads, ends)
        if count < TOGETHER_ROWS_MIN or not CARRAY:
            for at in range(count):
                row = categories[at], keys[at], payloads[at], before + at + 1
                self._write_one(row, None if ends is None else ends[at])
            return
        for chunk in chunks(Rows(categories, keys, payloads, ends, before)):
            self.execute(chunk.statements.rows, (chunk.category, chunk.before, chunk.array))
            if self.changes is not None:
                self.changes.add_chunk(chunk)
            del chunk  # before the next one is made

    def _write_one(self, row: tuple[bytes, bytes, bytes, int], end: int | None) -> None:
        if end is None:
            self.execute(_ONE, row)
        else:
            self.execute(_ONE_ENDING, (*row, end))
        if self.changes is not None:
            self.changes.add(row[3], "put", *row[:3])

    def _expect_ends(self, ends: Sequence[int | None]) -> None:
        known = ends if None not in ends else [end for end in ends if end is not None]
        earliest: int | None = min(known, default=None)  # type: ignore[type-var]  # no None is among them
        self.has_ends = self.has_ends or earliest is not None
        if earliest is not None and (self.next_expiry_ms is None or earliest < self.next_expiry_ms):
            self.next_expiry_ms = earliest

    def learn_ends(self) -> None:
        """Look for the first row that ends; text that somebody else has put there stands above every number."""
        found: list[tuple[int]] = self.execute(_NEXT_EXPIRY).fetchall()
        self.has_ends = bool(found)
        self.next_expiry_ms = found[0][0] if found and type(found[0][0]) in (int, float) else None

    def set_row(self, message: SetRow) -> None:
        """Write one row with an end."""
        category, key, payload, end, _ = message
        self.write((category,), (key,), (payload,), (end,))

    def drop_row(self, message: DropRow) -> bool:
        """Remove a row; return whether a live one was there."""
        self.version += 1
        category, key = message
        if self.quota is not None:
            self.quota.drop_row(category, key)
        if self.changes is None:
            row = self.execute(_DROP_ROW, (category, key)).fetchall()
            return bool(row) and (row[0][0] is None or row[0][0] > self.now_ms)
        # One that has ended is left to be reaped: that is when the change log tells of it.
        self.execute(_DROP_LIVE_ROW, (category, key, self.now_ms))
        if not self._connection.changes():
            return False
        self.changes.add(self.version, "delete", category, key)
        return True

    def drop_range(self, message: DropRange) -> int:
        """Remove a range of rows; return how many live ones were there."""
        self.version += 1
        category, start, stop = message
        if self.quota is not None:
            self.quota.drop_range(category, start, stop)
        if self.changes is None and self.next_expiry_ms is not None:
            upper = "" if stop is None else " AND key < ?4"
            bindings = (category, start, self.now_ms) if stop is None else (category, start, self.now_ms, stop)
            self.execute(_DROP_ENDED + upper, bindings)
        sql, bindings = self._span(category, start, stop)
        self.execute("DELETE" + sql, bindings)
        dropped = self._connection.changes()
        if dropped and self.changes is not None:
            self.changes.add(self.version, "delete_range", category, start, None, stop)
        return dropped

    def swap(self, message: SwapRow) -> bool:
        """Put a payload, or nothing, in the place of the one that is expected; return whether it was there."""
        category, key, expected, payload, end = message
        if self.get(category, key, self.now_ms) != expected:
            return False
        if payload is None:
            self.drop_row(DropRow(category, key))
        else:
            self.set_row(SetRow(category, key, payload, end))
        return True

    def touch(self, message: TouchRow) -> bool:
        """Give a live row another end; return whether there was one."""
        category, key, end = message
        head = self._head(category, key)
        if head is None:
            return False
        self.version += 1
        self._expect_ends((end,))
        if self.quota is not None and end is not None and end <= self.quota.used_ms:
            self.quota.used -= head[1]
        self.execute(_TOUCH, (category, key, end))
        return True

    def reap(self, message: Reap) -> int:
        """Take rows away that have ended; return how many. Raises `Corrupt` if the index names what isn't there."""
        slice_ = (self.now_ms, message.limit)
        named = 0 if self.changes is None else self.changes.add_ended(*slice_, self.version)
        self.execute(_REAP, slice_)
        count = self._connection.changes()
        self.version += named or bool(count and self.reaping_counts)
        if count < message.limit:
            self.learn_ends()
        stays = self.next_expiry_ms is not None and self.next_expiry_ms <= self.now_ms
        if (stays and message.limit and not count) or (self.changes is not None and named != count):
            raise Corrupt("the index of ends names rows that aren't there", hint="Restore the job from a backup.")
        return count

    # -- reads ---------------------------------------------------------------------------------------------------

    def get(self, category: bytes, key: bytes, now_ms: int) -> bytes | None:
        """Return a live row's payload, or `None`."""
        row = self.execute(POINT, (category, key)).fetchone()
        payload: bytes | None = None if row is None or (row[1] is not None and row[1] <= now_ms) else row[0]
        return payload

    def has(self, message: HasRow) -> bool:
        """Return whether there is a live row, without reading its payload."""
        if self.next_expiry_ms is not None:
            return self._head(message.category, message.key) is not None
        return bool(self.execute(_HAS, message).fetchone()[0])

    def _head(self, category: bytes, key: bytes) -> tuple[int, int] | None:
        """Return a live row's version and the length of its payload, or `None`."""
        row = self.execute(_HEAD, (category, key)).fetchone()
        return None if row is None or (row[1] is not None and row[1] <= self.now_ms) else (row[0], row[2])

    def entry(self, message: GetEntry) -> StoredRow | None:
        """Return a live row whole, or `None`."""
        row = self.execute(_ENTRY, (message.category, message.key)).fetchone()
        if row is None or (row[3] is not None and row[3] <= self.now_ms):
            return None
        check_blobs(row[:2])
        return StoredRow(*row)

    def conflict(self, message: Expect) -> Conflict | None:
        """Return what stands against an expectation, or `None`."""
        head = self._head(message.category, message.key)
        actual = None if head is None else head[0]
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
        check_blobs(chain.from_iterable(rows))
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
            check_blobs([at])
            sql, bindings = self._span(at, b"", None)
            if self.execute(f"SELECT EXISTS (SELECT 1{sql})", bindings).fetchone()[0]:
                found.append(at)

    def entries(self, message: ListEntries) -> list[StoredRow]:
        """Return a category's live rows in the order of their versions."""
        sql, bindings = self._span(message.category, b"", None)
        rows = [StoredRow(*row) for row in self.execute(f"{_ENTRY_COLUMNS}{sql} ORDER BY version", bindings)]
        check_blobs(value for row in rows for value in row[:2])
        return rows

    def list_rows(self, message: ListRows) -> list[StoredRow]:
        """Return a page of live rows, by key."""
        sql, bindings = self._span(message.category, message.start, None)
        # First how long they are, without reading them: not all of a page need be in memory.
        lengths = f"SELECT ifnull(length(key) + length(payload), 0){sql} ORDER BY key LIMIT ?"
        sizes = [size for (size,) in self.execute(lengths, (*bindings, message.rows_max))]
        within = sum(1 for total in accumulate(sizes) if total < message.bytes_max)
        sql = f"{_ENTRY_COLUMNS}{sql} ORDER BY key LIMIT ?"
        rows = [StoredRow(*row) for row in self.execute(sql, (*bindings, min(within + 1, message.rows_max)))]
        check_blobs(value for row in rows for value in row[:2])
        return rows

    def list_changes(self, message: ListChanges) -> list[StoredChange] | Failed:
        """Return the first changes behind a version."""
        if self.changes is None:
            return Failed(Misuse("this store keeps no changes: open it with feed_changes_max > 0"))
        return self.changes.list(message)

    def _span(
        self, category: bytes, start: bytes, stop: bytes | None, *, filtered: bool = True
    ) -> tuple[str, tuple[Any, ...]]:
        """Return what follows the columns of a statement over a range; not `filtered`: by expiry only if need be."""
        sql = _SPAN if filtered or self.next_expiry_ms is not None else _SPAN_WITHOUT_END
        if stop is None:
            return sql, (category, start, self.now_ms)
        return sql + " AND key < ?4", (category, start, self.now_ms, stop)


# How each kind of message is answered. With the class, not with each table: a job that opens doesn't make it anew, and
# one that is closed is freed at once, because nothing of its own refers to it.
ANSWERS: Final[dict[type, Callable[[Table, Any], Any]]] = {
    SetRow: Table.set_row,
    DropRow: Table.drop_row,
    DropRange: Table.drop_range,
    SwapRow: Table.swap,
    TouchRow: Table.touch,
    Reap: Table.reap,
    GetRow: lambda table, message: table.get(message.category, message.key, table.now_ms),
    HasRow: Table.has,
    GetEntry: Table.entry,
    GetRows: Table.get_rows,
    ScanRange: Table.scan,
    CountRange: Table.count,
    ListCategories: Table.categories,
    ListEntries: Table.entries,
    ListRows: Table.list_rows,
    UsedBytes: lambda table, _message: table.used(),
    ListChanges: Table.list_changes,
    LastVersion: lambda table, _message: table.version,
}
