"""The books: the numbers of a job that are kept in step with its rows, as of its last commit or in a group's middle.

Rules:
  1. A group changes a copy, which takes the place of what was there when it is committed.
  2. A job without a quota or a feed keeps no account of them.

Doesn't know: rows, statements, sessions.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from dataclasses import dataclass, field, replace

from persistency.storage.port import StoredChange


@dataclass(slots=True)
class Books:
    """`version` is the last one given; no row ends before `next_expiry_ms`; `used` bytes count until `used_ms`.

    `kept` are the versions of the changes that are kept, in order, `dropped` is the highest that isn't any more.
    """

    version: int = 0
    next_expiry_ms: int | None = None
    latest_ms: int = 0
    used: int = 0
    used_ms: int = 0
    dropped: int = 0
    kept: array[int] = field(default_factory=lambda: array("q"))
    fresh: list[StoredChange] = field(default_factory=list)  # changes of the group in hand

    def copy(self) -> Books:
        """Return a copy for a group; the changes that are kept are shared until it is committed."""
        return replace(self, fresh=[])

    def expect_end(self, expires_ms: int | None) -> None:
        """Take notice of a row's end."""
        if expires_ms is not None and (self.next_expiry_ms is None or expires_ms < self.next_expiry_ms):
            self.next_expiry_ms = expires_ms

    def no_longer_kept(self, keep: int) -> int:
        """Return the highest version that is, or is about to be, dropped."""
        beyond = len(self.kept) + len(self.fresh) - keep
        if beyond <= 0:
            return self.dropped
        return self.kept[beyond - 1] if beyond <= len(self.kept) else self.fresh[beyond - len(self.kept) - 1].version

    def oldest_after(self, version: int) -> int:
        """Return the first version kept behind one; the next one, if none is."""
        at = bisect_right(self.kept, version)
        if at < len(self.kept):
            return self.kept[at]
        return next((change.version for change in self.fresh if change.version > version), version + 1)

    def settle(self, keep: int) -> None:
        """Take the group's changes over, now that they are committed."""
        if self.fresh:
            self.kept.extend(change.version for change in self.fresh)
            self.fresh = []
        if len(self.kept) > keep:
            del self.kept[: len(self.kept) - keep]
