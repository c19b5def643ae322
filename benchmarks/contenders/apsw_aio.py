"""apsw.aio: apsw's own asyncio support, a connection behind a thread of its own.

Rules:
  1. The same durability and the same table as this engine's, and nothing besides them.

Doesn't know: its peers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextvars import ContextVar
from itertools import chain
from pathlib import Path
from typing import Any

import apsw
import apsw.aio

from benchmarks.contenders.awaited import put_in_turn
from benchmarks.contenders.groups import groups, sorted_groups
from benchmarks.contenders.tables import (
    CACHE_KIB,
    CATEGORY_BYTES,
    CHECKPOINT_COMMIT_PAGES,
    CHECKPOINT_PAGES,
    FILE_NAME,
    GET,
    PUT,
    SCHEMA,
    places,
    read_back,
)
from benchmarks.protocol import AwaitedGet, AwaitedPut, Contender, Pair, PostSome, PutAll, Way


class Awaited:
    """An asynchronous connection that lives in the event loop of its runner."""

    def __init__(self, directory: Path, runner: asyncio.Runner) -> None:
        self.runner = runner
        # The same class in both uses: its calls are awaited in the loop, and give their result at once inside the
        # functions that its thread runs for `async_run`. No one annotation fits both.
        self.connection: Any = runner.run(self._connect(directory / FILE_NAME))

    async def _connect(self, path: Path) -> Any:
        # Its controller for asyncio, named: left to itself it goes by which packages happen to be imported.
        controller: ContextVar[Any] = apsw.async_controller
        chosen = controller.set(apsw.aio.AsyncIO)
        try:
            connection: Any = await apsw.Connection.as_async(str(path))
        finally:
            controller.reset(chosen)
        # SQLite's documented choice for this durability; without WAL every commit would wait for the medium.
        await connection.pragma("journal_mode", "wal")
        await connection.pragma("synchronous", "normal")
        await connection.pragma("wal_autocheckpoint", CHECKPOINT_PAGES)
        await connection.pragma("cache_size", -CACHE_KIB)
        await connection.execute(SCHEMA)
        return connection

    def checkpoint_at(self, pages: int) -> None:
        """Let SQLite carry the log over when a commit has made it so long."""

        async def change() -> None:
            await self.connection.pragma("wal_autocheckpoint", pages)

        self.runner.run(change())

    async def put_many(self, rows: Iterable[Pair]) -> None:
        """Store rows in one transaction, the way the documentation gives for many rows."""
        async with self.connection:
            await self.connection.executemany(PUT, places(rows))

    def run_put(self, rows: Iterable[Pair]) -> None:
        """Do the same, for somebody outside the loop."""
        self.runner.run(self.put_many(rows))

    def fill(self, rows: Sequence[Pair]) -> None:
        """Store rows, and begin the reading with a short log, as this engine does when it is idle."""
        self.runner.run(self._fill(rows))

    async def _fill(self, rows: Sequence[Pair]) -> None:
        await self.put_many(rows)
        await self.connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)

    def close(self) -> None:
        """Close the connection and end its thread."""
        self.runner.run(self.connection.aclose())


def _put_all_many(store: Awaited) -> PutAll:
    # As with sqlite3: a transaction that fits into the page cache.
    def put_all(rows: Sequence[Pair]) -> None:
        for group in groups(rows):
            store.run_put(group)

    return put_all


def _put_all_sorted(store: Awaited) -> PutAll:
    # A B-tree takes neighbours together, so each group is sorted first, as this engine does it.
    return lambda rows: store.run_put(chain.from_iterable(sorted_groups(rows)))


def _put_all_single(store: Awaited) -> PutAll:
    # Each row is committed when it was awaited; a single put of this engine is what it is compared with.
    put = _acommit(store)
    return lambda rows: put_in_turn(store.runner, put, rows)


def _aget(store: Awaited) -> AwaitedGet:
    # The way of its documentation, two hops to the thread: execute, then the row.
    connection = store.connection

    async def get(key: bytes) -> bytes | None:
        found: bytes | None = await (await connection.execute(GET, (CATEGORY_BYTES, key))).get
        return found

    return get


def _aget_run(store: Awaited) -> AwaitedGet:
    # A function of one's own in the connection's thread: a single hop, the fastest it has.
    connection = store.connection

    def read(key: bytes) -> Any:
        return connection.execute(GET, (CATEGORY_BYTES, key)).get

    def get(key: bytes) -> Any:
        return connection.async_run(read, key)

    return get


def _acommit(store: Awaited) -> AwaitedPut:
    # A statement outside a transaction is one by itself, and needs a single hop.
    connection = store.connection
    store.checkpoint_at(CHECKPOINT_COMMIT_PAGES)

    def put(key: bytes, payload: bytes) -> Any:
        return connection.execute(PUT, (CATEGORY_BYTES, key, payload, 1))

    return put


def _post(store: Awaited) -> PostSome:
    # A few rows to a transaction, with a single hop; `put_many` would need three.
    connection = store.connection

    def put_some(rows: Sequence[Pair]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(PUT, places(rows))
        connection.execute("COMMIT")

    async def post(rows: Sequence[Pair]) -> int:
        await connection.async_run(put_some, rows)
        return len(rows)

    return post


CONTENDER = Contender(
    name="apsw.aio",
    settings=f"WAL, synchronous=NORMAL, wal_autocheckpoint={CHECKPOINT_PAGES:,}, "
    f"for commits {CHECKPOINT_COMMIT_PAGES:,}",
    ways=(
        Way("put", "execute", _put_all_single, share=0.02),
        Way("put", "executemany", _put_all_many),
        Way("put-random", "executemany, groups sorted", _put_all_sorted),
        Way("aget", "execute, get", _aget, share=0.1),
        Way("aget", "async_run", _aget_run, share=0.2),
        Way("acommit", "execute", _acommit),
        Way("post", "async_run", _post),
    ),
    open_store=Awaited,
    read_back=read_back,
)
