"""The table all SQLite contenders share: the same five columns as this engine's, so that the same work is compared.

Rules:
  1. The schema and the upsert are this engine's, as a user would write them by hand.
  2. A closed store is read back by bare apsw, whoever wrote it.

Doesn't know: which contender uses it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import apsw

from benchmarks.protocol import CATEGORY, Pair

CATEGORY_BYTES = CATEGORY.encode()
FILE_NAME = f"{CATEGORY}.db"

SCHEMA = """
CREATE TABLE kv (category BLOB NOT NULL, key BLOB NOT NULL, payload BLOB NOT NULL,
                 version INTEGER NOT NULL DEFAULT 0, expires_ms INTEGER,
                 PRIMARY KEY (category, key)) WITHOUT ROWID;
CREATE INDEX kv_expires ON kv (expires_ms) WHERE expires_ms IS NOT NULL;
"""
INSERT = "INSERT INTO kv (category, key, payload, version) VALUES "
UPSERT = (
    " ON CONFLICT (category, key) DO UPDATE SET"
    " payload = excluded.payload, version = excluded.version, expires_ms = excluded.expires_ms"
)
PUT = f"{INSERT}(?, ?, ?, ?){UPSERT}"
# Peers aren't made to look at an expiry they don't use.
GET = "SELECT payload FROM kv WHERE category = ? AND key = ?"
GET_MANY = "SELECT key, payload FROM kv WHERE category = ?1 AND key IN (SELECT value FROM carray(?2))"
ALL = "SELECT key, payload FROM kv WHERE category = ? ORDER BY key"
SCAN = "SELECT key, payload FROM kv WHERE category = ? AND key >= ? AND key < ? ORDER BY key"

# This engine's checkpoint policy, as far as SQLite's own auto-checkpoint can follow it: a long log while much is put, a
# shorter one between single commits.
CHECKPOINT_PAGES = 12_000
CHECKPOINT_COMMIT_PAGES = 4_000
# And the page cache it gives a file that is the only one read: all of the table fits. SQLite's own has 2 MB.
CACHE_KIB = 32 * 1024


def places(rows: Iterable[Pair], first: int = 1) -> Iterator[tuple[bytes, bytes, bytes, int]]:
    """Give the bindings of `PUT` for rows; `first` is the version of the first one."""
    return ((CATEGORY_BYTES, key, payload, version) for version, (key, payload) in enumerate(rows, first))


def read_back(directory: Path, keys: Sequence[bytes]) -> tuple[int, list[bytes | None]]:
    """Return how many rows a closed store has, and the payloads of some keys."""
    connection = apsw.Connection(str(directory / FILE_NAME), flags=apsw.SQLITE_OPEN_READWRITE)
    try:
        count = int(connection.execute("SELECT count(*) FROM kv").get)
        found = [connection.execute(GET, (CATEGORY_BYTES, bytes(key))).get for key in keys]
    finally:
        connection.close()
    return count, found
