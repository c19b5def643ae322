"""plyvel: LevelDB, a log-structured merge tree.

Rules:
  1. Keys and payloads are stored as they are, and there is nothing beside them.

Doesn't know: its peers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import plyvel

from benchmarks.contenders.groups import groups, one_by_one
from benchmarks.protocol import Contender, Get, Iterate, Pair, PutAll, PutOne, Scan, Way

SETTINGS = {
    "write_buffer_size": 2**26,  # RocksDB's default: LevelDB names it as what makes many puts faster
    "lru_cache_size": 2**28,  # holds what is read
    "bloom_filter_bits": 10,  # what its documentation suggests
    "compression": None,  # the others have none, and payloads that repeat would flatter it
}


class Levels:
    """A `plyvel.DB`.

    A write is in the log when it returns: handed to the system, so that it outlives the process, and, with `sync` off
    (the default), not waited for on the medium. That is what WAL with NORMAL gives the others.
    """

    def __init__(self, directory: Path, _runner: asyncio.Runner) -> None:
        self.database = plyvel.DB(str(directory), create_if_missing=True, **SETTINGS)

    def fill(self, rows: Sequence[Pair]) -> None:
        """Store rows."""
        _put_all(self)(rows)

    def close(self) -> None:
        """Close the database."""
        self.database.close()


def _put_all(store: Levels) -> PutAll:
    def put_all(rows: Sequence[Pair]) -> None:
        for group in groups(rows):
            with store.database.write_batch(sync=False) as batch:
                put = batch.put
                for key, payload in group:
                    put(key, payload)

    return put_all


def _put_single(store: Levels) -> PutAll:
    # Each put is in the log when it returns; a single put of this engine is what it is compared with.
    return one_by_one(store.database.put)


def _get(store: Levels) -> Get:
    get: Get = store.database.get
    return get


def _commit(store: Levels) -> PutOne:
    put: PutOne = store.database.put
    return put


def _scan(store: Levels) -> Scan:
    iterator = store.database.iterator

    def scan(prefix: bytes) -> list[Pair]:
        with iterator(prefix=prefix) as rows:
            return list(rows)

    return scan


def _iterate(store: Levels) -> Iterate:
    iterate: Iterate = store.database.iterator
    return iterate


def read_back(directory: Path, keys: Sequence[bytes]) -> tuple[int, list[bytes | None]]:
    """Return how many rows a closed database has, and the payloads of some keys."""
    database = plyvel.DB(str(directory), **SETTINGS)
    try:
        with database.iterator(include_value=False) as every:
            count = sum(1 for _key in every)
        return count, [database.get(bytes(key)) for key in keys]
    finally:
        database.close()


CONTENDER = Contender(
    name="plyvel",
    settings="sync=False, " + ", ".join(f"{name}={value}" for name, value in SETTINGS.items()),
    ways=(
        Way("put", "write_batch of 8,192", _put_all),
        Way("put", "put", _put_single),
        Way("get", "get", _get),
        Way("commit", "put", _commit),
        Way("scan", "iterator", _scan),
        Way("iterate", "iterator", _iterate),
    ),
    open_store=Levels,
    read_back=read_back,
)
