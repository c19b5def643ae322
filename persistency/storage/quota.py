"""The quota: how many bytes the payloads of a job's live rows have, kept up to date in the transaction of each write.

    used_bytes, used_ms     in the meta table: the bytes, and the time that decided which rows are live; where they are
                            missing, somebody has written without counting

Rules:
  1. The number is exact and costs nothing to read: a row is counted when it is written, when it is removed or written
     over, and once when it ends.
  2. Only a job that has a quota counts.
  3. What doesn't grow is allowed, even above the limit.

Doesn't know: what is refused, transactions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import apsw

from persistency.errors import QuotaExceeded
from persistency.storage.bulk import CARRAY

USED, USED_MS = "used_bytes", "used_ms"

_LIVE = " AND (expires_ms IS NULL OR expires_ms > ?)"
_ALL = "SELECT coalesce(sum(octet_length(payload)), 0) FROM kv WHERE true" + _LIVE
_ENDED = "SELECT coalesce(sum(octet_length(payload)), 0) FROM kv WHERE expires_ms > ? AND expires_ms <= ?"
_ROW = "SELECT coalesce(sum(octet_length(payload)), 0) FROM kv WHERE category = ? AND key = ?" + _LIVE
_ROWS = (
    "SELECT coalesce(sum(octet_length(kv.payload)), 0) FROM carray(?2) AS asked"
    " CROSS JOIN kv ON kv.category = ?1 AND kv.key = asked.value WHERE (expires_ms IS NULL OR expires_ms > ?3)"
)
_SPAN = "SELECT coalesce(sum(octet_length(payload)), 0) FROM kv WHERE category = ?1 AND key >= ?2" + _LIVE.replace(
    "?", "?3"
)


def count_used(execute: Callable[..., Any], now_ms: int) -> int:
    """Return the bytes of all live payloads, by looking at every row."""
    return int(execute(_ALL, (now_ms,)).fetchone()[0])


class Quota:
    """The bytes in use, and their limit. `used_ms` is the time up to which ended rows were taken out of them."""

    def __init__(self, execute: Callable[..., Any], limit: int, used: int, used_ms: int) -> None:
        self.limit = limit
        self.used: int = used
        self.used_ms: int = used_ms
        self._execute = execute

    def advance(self, now_ms: int, next_expiry_ms: int | None) -> None:
        """Take out the rows that have ended since the last time."""
        if now_ms > self.used_ms:
            if next_expiry_ms is not None and next_expiry_ms <= now_ms:
                self.used -= int(self._execute(_ENDED, (self.used_ms, now_ms)).fetchone()[0])
            self.used_ms = now_ms

    def refusal(self, before: int) -> QuotaExceeded | None:
        """Return what stands against what has been written since `before` bytes were in use, or `None`."""
        return QuotaExceeded(self.used, self.limit) if self.used > self.limit and self.used > before else None

    def write(
        self,
        categories: Sequence[bytes],
        keys: Sequence[bytes],
        payloads: Sequence[bytes],
        ends: Sequence[int | None] | None,
    ) -> None:
        """Count rows that are about to be written."""
        if len(keys) == 1:
            self._count(categories[0], {keys[0]: self._live_bytes(payloads[0], None if ends is None else ends[0])})
            return
        by_category: dict[bytes, dict[bytes, int]] = {}
        for at, category in enumerate(categories):  # of two rows with one key the later one stays
            end = None if ends is None else ends[at]
            by_category.setdefault(category, {})[keys[at]] = self._live_bytes(payloads[at], end)
        for category, nbytes in by_category.items():
            self._count(category, nbytes)

    def drop_row(self, category: bytes, key: bytes) -> None:
        """Count a row that is about to be removed, if there is one."""
        self.used -= int(self._execute(_ROW, (category, key, self.used_ms)).fetchone()[0])

    def drop_range(self, category: bytes, start: bytes, stop: bytes | None) -> None:
        """Count the rows of a range that is about to be removed."""
        bindings = (category, start, self.used_ms) if stop is None else (category, start, self.used_ms, stop)
        sql = _SPAN if stop is None else _SPAN + " AND key < ?4"
        self.used -= int(self._execute(sql, bindings).fetchone()[0])

    def _live_bytes(self, payload: bytes, end: int | None) -> int:
        return len(payload) if end is None or end > self.used_ms else 0

    def _count(self, category: bytes, nbytes: dict[bytes, int]) -> None:
        if len(nbytes) < 3 or not CARRAY:
            for key in nbytes:
                self.drop_row(category, key)
        else:
            keys = apsw.carray(tuple(nbytes))
            self.used -= int(self._execute(_ROWS, (category, keys, self.used_ms)).fetchone()[0])
        self.used += sum(nbytes.values())
