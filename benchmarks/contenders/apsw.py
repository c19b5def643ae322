"""Bare apsw: what a careful user would write by hand around one connection, for one thread.

Rules:
  1. The same durability and the same table as this engine's, and nothing besides them: no mailbox, no version kept
     across restarts, no expiry looked at.

Doesn't know: its peers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import apsw
import cbor2

from benchmarks.contenders.files import Files, LimitedFiles
from benchmarks.contenders.groups import GROUP_ROWS, groups, sorted_groups
from benchmarks.contenders.tables import (
    ALL,
    CACHE_KIB,
    CATEGORY_BYTES,
    FILE_NAME,
    GET,
    GET_MANY,
    INSERT,
    PUT,
    SCAN,
    SCHEMA,
    UPSERT,
    read_back,
)
from benchmarks.protocol import (
    Contender,
    Get,
    GetMany,
    GetObject,
    Iterate,
    Object,
    Pair,
    PutAll,
    PutObjects,
    PutOne,
    Scan,
    Way,
)

STATEMENT_ROWS = 512
# Only keys and payloads are bound for each row: the category is one parameter, versions count up from another. So the
# statement stays under the 16 KB up to which apsw caches it, and a third of the bindings is saved.
_MANY = (
    INSERT + "(?1,?3,?4,?2)," + ",".join(f"(?1,?,?,?2+{row})" for row in range(1, STATEMENT_ROWS)) + UPSERT
)  # fmt: skip
# This engine's checkpoint policy: while there is work only when the log is long, else sooner.
CHECKPOINT_FORCED_PAGES = 12_000
CHECKPOINT_IDLE_PAGES = 4_000


class Bare:
    """A connection, and one cursor that is used again and again (apsw keeps its prepared statements)."""

    def __init__(self, directory: Path, runner: asyncio.Runner) -> None:
        self._directory = directory
        self._runner = runner
        self._others: list[Bare] = []
        self._connection = apsw.Connection(str(directory / FILE_NAME), statementcachesize=64)
        # WAL with NORMAL is SQLite's documented choice for this durability; the auto-checkpoint is off because the
        # policy above does fewer of them.
        self._connection.pragma("journal_mode", "wal")
        self._connection.pragma("synchronous", "normal")
        self._connection.pragma("wal_autocheckpoint", 0)
        self._connection.pragma("cache_size", -CACHE_KIB)
        if not self._connection.table_exists("main", "kv"):
            self._connection.execute(SCHEMA)
        self._wal_pages = 0
        self._connection.set_wal_hook(self._on_commit)
        self.execute: Callable[..., Any] = self._connection.cursor().execute
        self.version = 0

    def _on_commit(self, _connection: apsw.Connection, _name: str, pages: int) -> int:
        self._wal_pages = pages
        return apsw.SQLITE_OK

    def checkpoint(self, pages: int) -> None:
        """Carry the log over if it has grown to so many pages."""
        if self._wal_pages >= pages:
            self._connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
            self._wal_pages = 0

    def put_group(self, group: Sequence[Pair]) -> None:
        """Store rows in one transaction, many to a statement."""
        execute = self.execute
        execute("BEGIN IMMEDIATE")
        at = 0
        while at + STATEMENT_ROWS <= len(group):
            places = chain.from_iterable(group[at : at + STATEMENT_ROWS])
            execute(_MANY, (CATEGORY_BYTES, self.version + 1, *places))
            self.version += STATEMENT_ROWS
            at += STATEMENT_ROWS
        for key, payload in group[at:]:
            self.version += 1
            execute(PUT, (CATEGORY_BYTES, key, payload, self.version))
        execute("COMMIT")
        self.checkpoint(CHECKPOINT_FORCED_PAGES)

    def fill(self, rows: Sequence[Pair]) -> None:
        """Store rows, and begin the reading with a short log, as this engine does when it is idle."""
        _put_all(self)(rows)
        self.checkpoint(CHECKPOINT_IDLE_PAGES)

    def another(self) -> Bare:
        """Open another connection to the same file, for another thread; it is closed with this one."""
        other = Bare(self._directory, self._runner)
        other.version = self.version
        self._others.append(other)
        return other

    def synchronous(self, level: str) -> None:
        """Set what a commit waits for."""
        self._connection.pragma("synchronous", level)

    def close(self) -> None:
        """Close the connection, the others first; one that is inside BEGIN ends its transaction."""
        for other in self._others:
            other.close()
        if self._connection.in_transaction:
            self.execute("COMMIT")
        self._connection.close()


def _put_all(store: Bare) -> PutAll:
    def put_all(rows: Sequence[Pair]) -> None:
        for group in groups(rows):
            store.put_group(group)

    return put_all


def _put_all_sorted(store: Bare) -> PutAll:
    # A B-tree takes neighbours together, so each group is sorted first, as this engine does it.
    def put_all(rows: Sequence[Pair]) -> None:
        for group in sorted_groups(rows):
            store.put_group(group)

    return put_all


def _get(store: Bare) -> Get:
    execute = store.execute
    return lambda key: execute(GET, (CATEGORY_BYTES, key)).get


def _get_inside(store: Bare) -> Get:
    # Not what most users write, for somebody has to end the transaction; it is the bound of what a read can cost.
    store.execute("BEGIN")
    return _get(store)


def _commit(store: Bare) -> PutOne:
    # A statement outside a transaction is one by itself; BEGIN and COMMIT would only cost more.
    execute = store.execute

    def commit(key: bytes, payload: bytes) -> None:
        store.version += 1
        execute(PUT, (CATEGORY_BYTES, key, payload, store.version))
        store.checkpoint(CHECKPOINT_IDLE_PAGES)

    return commit


def _commit_inside(store: Bare) -> PutOne:
    execute = store.execute

    def commit(key: bytes, payload: bytes) -> None:
        store.version += 1
        execute("BEGIN IMMEDIATE")
        execute(PUT, (CATEGORY_BYTES, key, payload, store.version))
        execute("COMMIT")
        store.checkpoint(CHECKPOINT_IDLE_PAGES)

    return commit


def _scan(store: Bare) -> Scan:
    execute = store.execute
    return lambda prefix: execute(SCAN, (CATEGORY_BYTES, prefix, prefix + b"\xff")).fetchall()


def _put_beside(store: Bare) -> PutAll:
    # SQLite's documentation for threads is a connection each; under WAL neither waits for the other one's locks.
    return _put_all(store.another())


def _put_objects(store: Bare) -> PutObjects:
    # The codec of this engine, used by hand: CBOR in its C implementation.
    def put_all(rows: Sequence[tuple[bytes, Object]]) -> None:
        dumps = cbor2.dumps
        for at in range(0, len(rows), GROUP_ROWS):
            store.put_group([(key, dumps(value)) for key, value in rows[at : at + GROUP_ROWS]])

    return put_all


def _get_object(store: Bare) -> GetObject:
    execute, loads = store.execute, cbor2.loads
    return lambda key: loads(execute(GET, (CATEGORY_BYTES, key)).get)


def _get_object_inside(store: Bare) -> GetObject:
    store.execute("BEGIN")
    return _get_object(store)


def _put_all_synced(store: Bare) -> PutAll:
    # FULL is SQLite's documented choice for a commit that outlives a power cut: each one waits for the medium.
    store.synchronous("full")
    return _put_all(store)


def _commit_synced(store: Bare) -> PutOne:
    store.synchronous("full")
    return _commit(store)


def _get_many(store: Bare) -> GetMany:
    # SQLite reads the keys from the tuple by itself, sorts them, and walks the tree once: faster than as many `?`, and
    # than as many point reads.
    execute, carray = store.execute, apsw.carray
    return lambda keys: dict(execute(GET_MANY, (CATEGORY_BYTES, carray(keys))))


def _get_many_points(store: Bare) -> GetMany:
    # The other way, for one state of the data: a transaction around prepared point reads.
    execute = store.execute

    def get_many(keys: tuple[bytes, ...]) -> dict[bytes, bytes]:
        execute("BEGIN")
        found = {key: execute(GET, (CATEGORY_BYTES, key)).get for key in keys}
        execute("COMMIT")
        return found

    return get_many


def _iterate(store: Bare) -> Iterate:
    # A cursor that is walked to its end: a read transaction all the while.
    execute = store.execute
    return lambda: execute(ALL, (CATEGORY_BYTES,))


CONTENDER = Contender(
    name="apsw",
    settings="WAL, synchronous=NORMAL unless said, 8,192 rows or 8 MiB a transaction, 512 a statement, checkpoints "
    "between transactions",
    ways=(
        Way("put", "512 a statement", _put_all),
        Way("put-random", "groups sorted", _put_all_sorted),
        Way("get", "autocommit", _get),
        Way("get", "inside BEGIN", _get_inside),
        Way("commit", "one statement", _commit),
        Way("commit", "BEGIN, COMMIT", _commit_inside),
        Way("scan", "fetchall", _scan),
        Way("put-spinning", "alone", _put_all),
        Way("put-spinning", "beside one thread", _put_all, spinning=1),
        Way("put-spinning", "beside four threads", _put_all, spinning=4, share=0.25),
        Way("get-spinning", "autocommit", _get, spinning=1),
        Way("get-spinning", "inside BEGIN", _get_inside, spinning=1),
        Way("scan-spinning", "fetchall", _scan, spinning=1),
        Way("open", "same pragmas", lambda _store: Files),
        Way("evict", "64 connections by hand", lambda _store: LimitedFiles),
        Way("get-producer", "autocommit", _get, producer=_put_beside),
        Way("put-object", "cbor2, 512 a statement", _put_objects),
        Way("get-object", "cbor2, autocommit", _get_object),
        Way("get-object", "cbor2, inside BEGIN", _get_object_inside),
        Way("put-durable", "synchronous=NORMAL", _put_all),
        Way("put-durable", "synchronous=FULL", _put_all_synced),
        Way("commit-durable", "synchronous=NORMAL", _commit),
        Way("commit-durable", "synchronous=FULL", _commit_synced, share=0.1),
        Way("get-many", "IN carray", _get_many),
        Way("get-many", "point reads inside BEGIN", _get_many_points),
        Way("iterate", "cursor", _iterate),
    ),
    open_store=Bare,
    read_back=read_back,
)
