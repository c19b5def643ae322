"""aiosqlite: the standard library's SQLite behind a thread, awaited.

Rules:
  1. The same durability and the same table as this engine's.

Doesn't know: its peers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import aiosqlite

from benchmarks.contenders.awaited import put_in_turn
from benchmarks.contenders.tables import (
    CACHE_KIB,
    CATEGORY_BYTES,
    CHECKPOINT_COMMIT_PAGES,
    FILE_NAME,
    GET,
    PUT,
    SCHEMA,
    places,
    read_back,
)
from benchmarks.protocol import AwaitedGet, AwaitedPut, Contender, Pair, PostSome, PutAll, Way


class Awaited:
    """A connection that lives in the event loop of its runner."""

    def __init__(self, directory: Path, runner: asyncio.Runner) -> None:
        self.runner = runner
        self._path = directory / FILE_NAME
        self.connection = runner.run(self._connect())

    async def _connect(self, **settings: Any) -> aiosqlite.Connection:
        fresh = not self._path.exists()
        connection = await aiosqlite.connect(self._path, **settings)
        # SQLite's documented choice for this durability; without WAL every commit would wait for the medium.
        await connection.execute("PRAGMA journal_mode = wal")
        await connection.execute("PRAGMA synchronous = normal")
        await connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        # As with all others whose commits are of one row, or of a few: fewer checkpoints than SQLite's default.
        await connection.execute_fetchall(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_COMMIT_PAGES}")
        if fresh:
            await connection.executescript(SCHEMA)
        return connection

    def reopen(self, **settings: Any) -> None:
        """Connect again, with settings of `sqlite3.connect`."""
        self.close()
        self.connection = self.runner.run(self._connect(**settings))

    def fill(self, rows: Sequence[Pair]) -> None:
        """Store rows in one transaction, and begin the reading with a short log, as this engine does when idle."""
        self.runner.run(self._fill(rows))

    async def _fill(self, rows: Sequence[Pair]) -> None:
        await self.connection.executemany(PUT, places(rows))
        await self.connection.commit()
        await self.connection.execute_fetchall("PRAGMA wal_checkpoint(PASSIVE)")

    def close(self) -> None:
        """Close the connection and end its thread."""
        self.runner.run(self.connection.close())


def _aget(store: Awaited) -> AwaitedGet:
    # The way of its documentation: the cursor is closed by the context manager.
    connection = store.connection

    async def get(key: bytes) -> bytes | None:
        async with connection.execute(GET, (CATEGORY_BYTES, key)) as cursor:
            row = await cursor.fetchone()
        return None if row is None else row[0]

    return get


def _aget_fetchall(store: Awaited) -> AwaitedGet:
    # Its shortcut with a single hop to the thread, the fastest it has.
    connection = store.connection

    async def get(key: bytes) -> bytes | None:
        rows = await connection.execute_fetchall(GET, (CATEGORY_BYTES, key))
        for row in rows:
            payload: bytes = row[0]
            return payload
        return None

    return get


def _acommit(store: Awaited) -> AwaitedPut:
    # The way of its documentation, two hops: execute and commit.
    connection = store.connection

    async def put(key: bytes, payload: bytes) -> None:
        await connection.execute(PUT, (CATEGORY_BYTES, key, payload, 1))
        await connection.commit()

    return put


def _acommit_statement(store: Awaited) -> AwaitedPut:
    # The standard library's setting for transactions by hand: a statement outside one is one by itself, with a single
    # hop, the fastest it has.
    store.reopen(isolation_level=None)
    connection = store.connection

    async def put(key: bytes, payload: bytes) -> None:
        await connection.execute(PUT, (CATEGORY_BYTES, key, payload, 1))

    return put


def _post(store: Awaited) -> PostSome:
    # Row by row it can't keep any such pace; a few rows to a transaction is what its users write by hand.
    connection = store.connection

    async def post(rows: Sequence[Pair]) -> int:
        await connection.executemany(PUT, [(CATEGORY_BYTES, key, payload, 1) for key, payload in rows])
        await connection.commit()
        return len(rows)

    return post


def _put_all(store: Awaited) -> PutAll:
    put = _acommit(store)
    return lambda rows: put_in_turn(store.runner, put, rows)


CONTENDER = Contender(
    name="aiosqlite",
    settings=f"WAL, synchronous=NORMAL, wal_autocheckpoint={CHECKPOINT_COMMIT_PAGES:,}",
    ways=(
        Way("put", "execute, commit", _put_all, share=0.01),
        Way("aget", "execute", _aget, share=0.1),
        Way("aget", "execute_fetchall", _aget_fetchall, share=0.2),
        Way("acommit", "execute, commit", _acommit),
        Way("acommit", "execute, isolation_level=None", _acommit_statement),
        Way("post", "executemany, commit", _post),
    ),
    open_store=Awaited,
    read_back=read_back,
)
