"""The page cache: what was read once is read from memory, within a share, until nobody has used it for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import apsw
import pytest

from persistency.storage import pagecache
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import Barrier, GetRow, StoreOptions
from persistency.storage.sqlite import SqliteStore
from persistency.testing import group, put

ROWS = 30_000
PAYLOAD = bytes(200)
OWN_KIB = 2_000  # SQLite's
KIB = 1024


def keys() -> list[bytes]:
    """Return the keys of all rows."""
    return [b"%06d" % at for at in range(ROWS)]


@pytest.fixture
def store(root: DirectoryRoot) -> Iterator[SqliteStore]:
    """A job of some 7 MB: three times what SQLite's own cache holds."""
    opened = root.open("alpha", StoreOptions())
    opened.apply(group(*(put(b"c", key, PAYLOAD) for key in keys())), 1)
    opened.fold()
    yield opened
    opened.close()


def read_all(store: SqliteStore) -> int:
    """Read each row; return how many pages had to be read from the file for it."""
    store._connection.status(apsw.SQLITE_DBSTATUS_CACHE_MISS, True)
    for key in keys():
        assert store.get(b"c", key, 1) == PAYLOAD
    return store._connection.status(apsw.SQLITE_DBSTATUS_CACHE_MISS)[0]


def used(store: SqliteStore) -> int:
    """Return how many bytes a store's cache takes."""
    return store._connection.status(apsw.SQLITE_DBSTATUS_CACHE_USED)[0]


def test_what_was_read_once_is_not_read_again(store: SqliteStore) -> None:
    """A job larger than SQLite's own cache is read from its file once, and again only after a fold."""
    assert read_all(store) > 1_000
    assert read_all(store) == 0
    before = used(store)
    assert store.fold()
    assert used(store) < 3_000 * KIB < before
    assert read_all(store) > 1_000


def test_a_write_leaves_what_was_read_in_memory(store: SqliteStore) -> None:
    """A commit takes no page out of the cache: the next pass reads none from the file."""
    read_all(store)
    store.apply(group(put(b"c", keys()[7], PAYLOAD)), 1)
    assert read_all(store) == 0


def limit_kib(store: SqliteStore) -> int:
    """Return how many KiB a store's cache may take."""
    return -int(store._connection.pragma("cache_size"))


def test_who_only_writes_takes_no_more_than_sqlites_own(root: DirectoryRoot) -> None:
    """A share is taken with the first read, and given back by a fold; the next read takes it again."""
    others = len(pagecache._taken)
    store = root.open("alpha", StoreOptions())
    store.apply(group(*(put(b"c", key, PAYLOAD) for key in keys())), 1)
    assert (limit_kib(store), used(store) < 3_000 * KIB, len(pagecache._taken)) == (OWN_KIB, True, others)
    store.get(b"c", b"k", 1)
    store.read(GetRow(b"c", b"k"), 1)
    assert (limit_kib(store), len(pagecache._taken)) == (32 * KIB // (others + 1), others + 1)
    store.fold()
    assert (limit_kib(store), len(pagecache._taken)) == (OWN_KIB, others)
    store.read(GetRow(b"c", b"k"), 1)
    assert len(pagecache._taken) == others + 1
    store.close()
    assert len(pagecache._taken) == others


def test_the_more_are_read_the_less_each_gets(root: DirectoryRoot) -> None:
    """The first file gets all, the n-th its part, nobody less than SQLite's own; who closes makes room."""
    others = len(pagecache._taken)
    with contextlib.ExitStack() as stack:

        def opened(at: int) -> int:
            store = root.open(f"job{at}", StoreOptions())
            stack.callback(store.close)
            store.get(b"c", b"k", 1)
            return limit_kib(store)

        shares = [opened(at) for at in range(40)]
        assert shares == [max(32 * KIB // (others + at), OWN_KIB) for at in range(1, 41)]
        assert shares[-1] == OWN_KIB
    assert len(pagecache._taken) == others
    with contextlib.ExitStack() as stack:
        assert opened(0) == shares[0]


def test_all_together_get_little_more_than_their_own() -> None:
    """However many files are read at once, what they may have beyond SQLite's own has a bound."""
    connections = [apsw.Connection("") for _ in range(1_000)]
    caches = [pagecache.PageCache(connection) for connection in connections]
    for cache in caches:
        cache.enlarge()
        cache.enlarge()  # a second time is fine
    shares = [-int(connection.pragma("cache_size")) for connection in connections]
    assert sum(shares) - len(shares) * OWN_KIB <= 80 * KIB
    assert min(shares) == OWN_KIB
    for cache, connection in zip(caches, connections, strict=True):
        cache.give_back()
        assert connection.pragma("cache_size") == -OWN_KIB
        connection.close()
    assert not pagecache._taken.intersection(caches)


@pytest.mark.parametrize("barrier", [Barrier(), Barrier(sync=True), Barrier(fold=True), Barrier(rebuild=True)], ids=str)
def test_who_flushes_or_compacts_takes_no_share(barrier: Barrier, root: DirectoryRoot) -> None:
    """Nothing is read for a barrier; and what a rebuild writes beside the file would have a cache as large."""
    others = len(pagecache._taken)
    store = root.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"k", PAYLOAD)), 1)
    store.apply(group(barrier), 1)
    store.apply(group(barrier), 1)  # with nothing written since
    assert (limit_kib(store), len(pagecache._taken)) == (OWN_KIB, others)
    store.get(b"c", b"k", 1)
    limits: list[int] = []
    store._connection.trace_v2(
        apsw.SQLITE_TRACE_STMT, lambda event: limits.append(limit_kib(store)) if "VACUUM" in event["sql"] else None
    )
    store.apply(group(barrier), 1)
    store._connection.trace_v2(0, None)
    assert set(limits) == ({OWN_KIB} if barrier.rebuild else set())
    store.close()


def test_a_log_that_was_left_takes_no_share(root: DirectoryRoot) -> None:
    """To open what a killed process has left reads no row."""
    others = len(pagecache._taken)
    store = root.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"k", PAYLOAD)), 1)
    store.close(tidy=False)
    assert root.path("alpha").with_name("alpha.db-wal").exists()
    store = root.open("alpha", StoreOptions())
    assert (limit_kib(store), len(pagecache._taken)) == (OWN_KIB, others)
    store.close()


def test_a_read_goes_on_without_a_larger_cache(root: DirectoryRoot) -> None:
    """SQLite says no to the larger cache: the row is read all the same, and a fold gives the share back."""
    others = len(pagecache._taken)
    store = root.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"k", PAYLOAD)), 1)

    def refuse(_cursor: object, sql: str, _bindings: object) -> bool:
        return "cache_size" not in sql

    store._connection.exec_trace = refuse
    assert store.get(b"c", b"k", 1) == PAYLOAD
    store.fold()
    assert len(pagecache._taken) == others
    store._connection.exec_trace = None
    store.close()
