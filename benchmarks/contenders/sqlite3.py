"""The standard library's sqlite3: one connection, one thread, `executemany`.

Rules:
  1. The same durability and the same table as this engine's, and nothing besides them.

Doesn't know: its peers.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

from benchmarks.contenders.groups import groups, sorted_groups
from benchmarks.contenders.tables import (
    CACHE_KIB,
    CATEGORY_BYTES,
    CHECKPOINT_COMMIT_PAGES,
    CHECKPOINT_PAGES,
    FILE_NAME,
    GET,
    PUT,
    SCAN,
    SCHEMA,
    places,
    read_back,
)
from benchmarks.protocol import Contender, Get, Pair, PutAll, PutOne, Scan, Way


class Standard:
    """A connection, and one cursor that is used again and again."""

    def __init__(self, directory: Path, _runner: asyncio.Runner) -> None:
        # Transactions are begun and ended by hand; the module would otherwise begin one before every put.
        self._connection = sqlite3.connect(directory / FILE_NAME, isolation_level=None)
        # SQLite's documented choice for this durability: a commit is in the log file, which outlives the process, and
        # doesn't wait for the medium.
        self._connection.execute("PRAGMA journal_mode = wal")
        self._connection.execute("PRAGMA synchronous = normal")
        self._connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self.checkpoint_at(CHECKPOINT_PAGES)
        self._connection.executescript(SCHEMA)
        self.cursor = self._connection.cursor()
        self.version = 0

    def checkpoint_at(self, pages: int) -> None:
        """Let SQLite carry the log over when a commit has made it so long."""
        self._connection.execute(f"PRAGMA wal_autocheckpoint = {pages}")

    def put_many(self, rows: Iterable[Pair]) -> None:
        """Store rows in one transaction, the way the documentation gives for many rows."""
        self.cursor.execute("BEGIN IMMEDIATE")
        self.cursor.executemany(PUT, places(rows, self.version + 1))
        self.version += self.cursor.rowcount
        self.cursor.execute("COMMIT")

    def fill(self, rows: Sequence[Pair]) -> None:
        """Store rows, and begin the reading with a short log, as this engine does when it is idle."""
        self.put_many(rows)
        self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def close(self) -> None:
        """Close the connection; one that is inside BEGIN ends its transaction."""
        if self._connection.in_transaction:
            self._connection.commit()
        self._connection.close()


def _put_all(store: Standard) -> PutAll:
    # A transaction that fits into the page cache: it makes no difference to small payloads, and large ones are faster.
    def put_all(rows: Sequence[Pair]) -> None:
        for group in groups(rows):
            store.put_many(group)

    return put_all


def _put_all_sorted(store: Standard) -> PutAll:
    # A B-tree takes neighbours together, so each group is sorted first, as this engine does it.
    return lambda rows: store.put_many(chain.from_iterable(sorted_groups(rows)))


def _get(store: Standard) -> Get:
    execute = store.cursor.execute

    def get(key: bytes) -> bytes | None:
        row = execute(GET, (CATEGORY_BYTES, key)).fetchone()
        return None if row is None else row[0]

    return get


def _get_inside(store: Standard) -> Get:
    # As with bare apsw: not what most users write, but the bound of what a read can cost.
    store.cursor.execute("BEGIN")
    return _get(store)


def _commit(store: Standard) -> PutOne:
    # A statement outside a transaction is one by itself; BEGIN and COMMIT would only cost more.
    execute = store.cursor.execute
    store.checkpoint_at(CHECKPOINT_COMMIT_PAGES)

    def commit(key: bytes, payload: bytes) -> None:
        store.version += 1
        execute(PUT, (CATEGORY_BYTES, key, payload, store.version))

    return commit


def _scan(store: Standard) -> Scan:
    execute = store.cursor.execute
    return lambda prefix: execute(SCAN, (CATEGORY_BYTES, prefix, prefix + b"\xff")).fetchall()


CONTENDER = Contender(
    name="sqlite3",
    settings=f"WAL, synchronous=NORMAL, isolation_level=None, wal_autocheckpoint={CHECKPOINT_PAGES:,}, "
    f"for commits {CHECKPOINT_COMMIT_PAGES:,}",
    ways=(
        Way("put", "executemany", _put_all),
        Way("put-random", "executemany, groups sorted", _put_all_sorted),
        Way("get", "autocommit", _get),
        Way("get", "inside BEGIN", _get_inside),
        Way("commit", "one statement", _commit),
        Way("scan", "fetchall", _scan),
    ),
    open_store=Standard,
    read_back=read_back,
)
