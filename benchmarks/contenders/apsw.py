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
from operator import itemgetter
from pathlib import Path
from typing import Any

import apsw

from benchmarks.contenders.tables import CATEGORY_BYTES, FILE_NAME, GET, INSERT, PUT, SCAN, SCHEMA, UPSERT, read_back
from benchmarks.protocol import Contender, Get, Pair, PutAll, PutOne, Scan, Way

GROUP_ROWS = 8_192  # this engine's group: the bound of its mailbox
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

    def __init__(self, directory: Path, _runner: asyncio.Runner) -> None:
        self._connection = apsw.Connection(str(directory / FILE_NAME), statementcachesize=64)
        # WAL with NORMAL is SQLite's documented choice for this durability; the auto-checkpoint is off because the
        # policy above does fewer of them.
        self._connection.pragma("journal_mode", "wal")
        self._connection.pragma("synchronous", "normal")
        self._connection.pragma("wal_autocheckpoint", 0)
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

    def close(self) -> None:
        """Close the connection; one that is inside BEGIN ends its transaction."""
        if self._connection.in_transaction:
            self.execute("COMMIT")
        self._connection.close()


def _put_all(store: Bare) -> PutAll:
    def put_all(rows: Sequence[Pair]) -> None:
        for at in range(0, len(rows), GROUP_ROWS):
            store.put_group(rows[at : at + GROUP_ROWS])

    return put_all


def _put_all_sorted(store: Bare) -> PutAll:
    # A B-tree takes neighbours together, so each group is sorted first, as this engine does it.
    def put_all(rows: Sequence[Pair]) -> None:
        for at in range(0, len(rows), GROUP_ROWS):
            store.put_group(sorted(rows[at : at + GROUP_ROWS], key=itemgetter(0)))

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


CONTENDER = Contender(
    name="apsw",
    settings="WAL, synchronous=NORMAL, 8,192 rows a transaction, 512 a statement, checkpoints between transactions",
    ways=(
        Way("put", "512 a statement", _put_all),
        Way("put-random", "groups sorted", _put_all_sorted),
        Way("get", "autocommit", _get),
        Way("get", "inside BEGIN", _get_inside),
        Way("commit", "one statement", _commit),
        Way("commit", "BEGIN, COMMIT", _commit_inside),
        Way("scan", "fetchall", _scan),
    ),
    open_store=Bare,
    read_back=read_back,
)
