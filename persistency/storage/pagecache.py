"""The page cache: in how much memory the pages of an open file stay that were read.

What isn't there is read from the system again, which takes a point read a quarter longer. SQLite's own 2 MB hold some
14,000 rows of 100 bytes, and are enough to write. A file that is read gets more: 32 MiB if it is the only one, and if n
of them are, the last to come the n-th part of that. So all together never have more than 80 MiB beyond SQLite's own,
however many there are.

Rules:
  1. Nobody gets less than SQLite's own.
  2. A share is taken when somebody reads, and kept until it is given back; memory is taken only as pages are read.

Doesn't know: rows, transactions, when it is time to give a share back.
"""

from __future__ import annotations

import contextlib
import weakref

import apsw

_ALL_KIB = 32 * 1024  # RocksDB and diskcache take as much
_OWN_KIB = 2_000  # SQLite's

_taken: weakref.WeakSet[PageCache] = weakref.WeakSet()


class PageCache:
    """The page cache of one connection."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self.is_large: bool = False

    def enlarge(self) -> None:
        """Take a share, unless there is one."""
        if not self.is_large:
            _taken.add(self)
            self._limit(max(_ALL_KIB // len(_taken), _OWN_KIB))
            self.is_large = True

    def give_back(self) -> None:
        """Give the share back, if there is one, and all that is kept beyond SQLite's own."""
        if self.is_large:
            self.close()
            self._limit(_OWN_KIB)

    def close(self) -> None:
        """Give the share back: the connection is closed, or about to be."""
        self.is_large = False
        _taken.discard(self)

    def _limit(self, kib: int) -> None:
        with contextlib.suppress(apsw.Error):  # what is read is read without it, too
            self._connection.execute(f"PRAGMA cache_size = -{kib}")
