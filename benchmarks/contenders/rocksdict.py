"""rocksdict: RocksDB, a log-structured merge tree, behind a wrapper written in Rust.

Rules:
  1. Raw mode: keys and payloads are bytes, without the type tags and the pickle it has otherwise.

Doesn't know: its peers.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import rocksdict

from benchmarks.contenders.groups import groups, one_by_one
from benchmarks.protocol import Contender, Get, GetMany, Iterate, Pair, PutAll, PutOne, Scan, Way

CACHE_BYTES = 2**28
BLOOM_BITS = 10
WRITE_BUFFER_BYTES = 2**26  # its default


def _options() -> rocksdict.Options:
    # The first steps of its tuning guide: threads for all cores, a filter, a block cache that holds what is read. No
    # compression, for the others have none, and payloads that repeat would flatter it.
    blocks = rocksdict.BlockBasedOptions()
    blocks.set_bloom_filter(BLOOM_BITS, False)
    blocks.set_block_cache(rocksdict.Cache(CACHE_BYTES))
    options = rocksdict.Options(raw_mode=True)
    options.set_block_based_table_factory(blocks)
    options.set_write_buffer_size(WRITE_BUFFER_BYTES)
    options.set_compression_type(rocksdict.DBCompressionType.none())
    options.increase_parallelism(os.cpu_count() or 1)
    return options


class Merged:
    """An `Rdict` in raw mode.

    A write is in the log when it returns: handed to the system, so that it outlives the process, and not waited for on
    the medium (its defaults: `sync` is off, the log is on). That is what WAL with NORMAL gives the others.
    """

    def __init__(self, directory: Path, _runner: asyncio.Runner) -> None:
        self.database = rocksdict.Rdict(str(directory), _options())

    def fill(self, rows: Sequence[Pair]) -> None:
        """Store rows."""
        _put_all(self)(rows)

    def close(self) -> None:
        """Close the database."""
        self.database.close()


def _put_all(store: Merged) -> PutAll:
    def put_all(rows: Sequence[Pair]) -> None:
        for group in groups(rows):
            batch = rocksdict.WriteBatch(raw_mode=True)
            put = batch.put
            for key, payload in group:
                put(key, payload)
            store.database.write(batch)

    return put_all


def _put_single(store: Merged) -> PutAll:
    # Each put is in the log when it returns; a single put of this engine is what it is compared with.
    return one_by_one(store.database.put)


def _get(store: Merged) -> Get:
    get: Get = store.database.get
    return get


def _commit(store: Merged) -> PutOne:
    put: PutOne = store.database.put
    return put


def _scan(store: Merged) -> Scan:
    # With an upper bound the database itself ends the scan. The iterator only borrows the bound, which has to outlive
    # it: so the rows are read here, and not by the caller.
    def scan(prefix: bytes) -> list[Pair]:
        bounds = rocksdict.ReadOptions()
        bounds.set_iterate_upper_bound(prefix + b"\xff")
        rows: Any = store.database.items(from_key=prefix, read_opt=bounds)
        return list(rows)

    return scan


def _get_many(store: Merged) -> GetMany:
    # A list of keys is its documented way to get many.
    get: Any = store.database.get
    return lambda keys: dict(zip(keys, get(list(keys)), strict=True))


def _iterate(store: Merged) -> Iterate:
    items: Any = store.database.items
    return cast(Iterate, items)


def read_back(directory: Path, keys: Sequence[bytes]) -> tuple[int, list[bytes | None]]:
    """Return how many rows a closed database has, and the payloads of some keys."""
    with rocksdict.Rdict(str(directory), _options()) as database:
        return sum(1 for _row in database.items()), [database.get(bytes(key)) for key in keys]


CONTENDER = Contender(
    name="rocksdict",
    settings=f"raw mode, WAL, sync=False, no compression, write buffer {WRITE_BUFFER_BYTES:,} bytes, block cache "
    f"{CACHE_BYTES:,} bytes, bloom filter {BLOOM_BITS} bits",
    ways=(
        Way("put", "WriteBatch of 8,192", _put_all),
        Way("put", "put", _put_single),
        Way("get", "get", _get),
        Way("commit", "put", _commit),
        Way("scan", "items", _scan),
        Way("get-many", "get of a list", _get_many),
        Way("iterate", "items", _iterate),
    ),
    open_store=Merged,
    read_back=read_back,
)
