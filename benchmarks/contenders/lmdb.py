"""py-lmdb: a B+ tree in a memory map, without a log.

Rules:
  1. Keys and payloads are stored as they are: a key may have at most 511 bytes, and there is nothing beside it.
  2. A payload that is read is copied out of the map, since `bytes` are what was asked for.

Doesn't know: its peers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import cast

import lmdb

from benchmarks.contenders.groups import groups, sorted_groups
from benchmarks.protocol import Contender, Get, GetMany, Iterate, Pair, PutAll, PutOne, Scan, Way

# The bound of the file, which is sparse; it must be larger than anything that is measured.
MAP_BYTES = 2**34


# A commit changes the shared map, whose pages belong to the system and outlive the process, and doesn't wait for the
# medium: what WAL with NORMAL gives the others. (After a power cut SQLite's file is at least whole; this one may be
# damaged.)
SETTINGS = {"writemap": True, "map_async": True}
# The same durability, with each page written by a call: slower in single commits, faster in a large transaction.
WITHOUT_WRITEMAP = {"sync": False}


def _open(directory: Path, settings: dict[str, bool]) -> lmdb.Environment:
    # One finished read transaction is kept for the next, so that beginning one costs no allocation.
    return lmdb.open(str(directory), map_size=MAP_BYTES, max_spare_txns=1, **settings)


class Mapped:
    """An environment with its one unnamed database."""

    def __init__(self, directory: Path, _runner: asyncio.Runner) -> None:
        self._directory = directory
        self.environment = _open(directory, SETTINGS)
        self._reading: lmdb.Transaction | None = None

    def reopen(self, settings: dict[str, bool]) -> None:
        """Open the environment again, with other settings."""
        self.environment.close()
        self.environment = _open(self._directory, settings)

    def reading(self) -> lmdb.Transaction:
        """Begin a read transaction that stays open until the store is closed."""
        self._reading = self.environment.begin()
        return self._reading

    def put_many(self, rows: Iterable[Pair]) -> None:
        """Store rows in one transaction, with one call, the way the documentation gives for many rows."""
        # Without `append`, which only somebody who knows that all keys come in order may ask for.
        with self.environment.begin(write=True) as transaction, transaction.cursor() as cursor:
            cursor.putmulti(rows)

    def fill(self, rows: Sequence[Pair]) -> None:
        """Store rows."""
        self.put_many(rows)

    def close(self) -> None:
        """End a transaction that is still open, and close the environment."""
        if self._reading is not None:
            self._reading.abort()
        self.environment.close()


def _put_all(store: Mapped) -> PutAll:
    # A transaction keeps all pages it has changed until its end; several small ones take less time than a large one.
    def put_all(rows: Sequence[Pair]) -> None:
        for group in groups(rows):
            store.put_many(group)

    return put_all


def _put_all_at_once(store: Mapped) -> PutAll:
    # Keys in random order come to the same pages again and again: here a large transaction takes less time.
    return store.put_many


def _put_all_without_writemap(store: Mapped) -> PutAll:
    store.reopen(WITHOUT_WRITEMAP)
    return _put_all(store)


def _put_all_sorted(store: Mapped) -> PutAll:
    # A B-tree takes neighbours together, so each group is sorted first, as this engine does it.
    return lambda rows: store.put_many(chain.from_iterable(sorted_groups(rows)))


def _put_all_sorted_without_writemap(store: Mapped) -> PutAll:
    store.reopen(WITHOUT_WRITEMAP)
    return _put_all_sorted(store)


def _get(store: Mapped) -> Get:
    # A read transaction for each read sees what was committed last, as a read of this engine does.
    begin = store.environment.begin

    def get(key: bytes) -> bytes | None:
        with begin() as transaction:
            found: bytes | None = transaction.get(key)
        return found

    return get


def _get_inside(store: Mapped) -> Get:
    # One that stays open sees no later commit; it is the bound of what a read can cost.
    return cast(Get, store.reading().get)


def _commit(store: Mapped) -> PutOne:
    begin = store.environment.begin

    def commit(key: bytes, payload: bytes) -> None:
        with begin(write=True) as transaction:
            transaction.put(key, payload)

    return commit


def _commit_without_writemap(store: Mapped) -> PutOne:
    store.reopen(WITHOUT_WRITEMAP)
    return _commit(store)


def _scan(store: Mapped) -> Scan:
    begin = store.environment.begin

    def scan(prefix: bytes) -> list[Pair]:
        end = prefix + b"\xff"
        rows: list[Pair] = []
        with begin() as transaction, transaction.cursor() as cursor:
            if cursor.set_range(prefix):
                for row in cursor:
                    if row[0] >= end:
                        break
                    rows.append(row)
        return rows

    return scan


def _get_many(store: Mapped) -> GetMany:
    begin = store.environment.begin

    def get_many(keys: tuple[bytes, ...]) -> dict[bytes, bytes]:
        with begin() as transaction, transaction.cursor() as cursor:
            return dict(cursor.getmulti(keys))

    return get_many


def _iterate(store: Mapped) -> Iterate:
    cursor = store.reading().cursor()

    def iterate() -> Iterable[Pair]:
        cursor.first()
        return cast(Iterable[Pair], iter(cursor))

    return iterate


def read_back(directory: Path, keys: Sequence[bytes]) -> tuple[int, list[bytes | None]]:
    """Return how many rows a closed environment has, and the payloads of some keys."""
    with _open(directory, SETTINGS) as environment, environment.begin() as transaction:
        return int(transaction.stat()["entries"]), [transaction.get(bytes(key)) for key in keys]


CONTENDER = Contender(
    name="lmdb",
    settings=f"writemap, map_async, max_spare_txns=1, map_size={MAP_BYTES:,}; where said sync=False without writemap",
    ways=(
        Way("put", "putmulti", _put_all),
        Way("put", "putmulti, sync=False", _put_all_without_writemap),
        Way("put-random", "putmulti, one transaction", _put_all_at_once),
        Way("put-random", "putmulti, groups sorted", _put_all_sorted),
        Way("put-random", "groups sorted, sync=False", _put_all_sorted_without_writemap),
        Way("get", "a transaction each", _get),
        Way("get", "inside a transaction", _get_inside),
        Way("commit", "a transaction each", _commit),
        Way("commit", "a transaction each, sync=False", _commit_without_writemap),
        Way("scan", "cursor", _scan),
        Way("get-many", "getmulti", _get_many),
        Way("iterate", "cursor", _iterate),
        # One environment for all threads, as its documentation has it; readers and the writer never wait.
        Way("get-producer", "a transaction each", _get, producer=_put_all),
    ),
    open_store=Mapped,
    read_back=read_back,
)
