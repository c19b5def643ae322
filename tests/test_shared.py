"""Shared collections and merge pools: statement by statement, over both adapters, beside threads and in event loops."""

from __future__ import annotations

import gc
import logging
import queue
import random
import string
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistency import (
    Closed,
    Corrupt,
    FeedTruncated,
    Misuse,
    Persistency,
    QuotaExceeded,
    Transaction,
    key,
)
from persistency.codec.values import encode
from persistency.shared import SharedStore
from persistency.shared import following as following_module
from persistency.shared import places as places_module
from persistency.shared import store as shared_module
from persistency.shared.collection import Collection, Record, Snapshot
from persistency.shared.following import Following, Note, SharedChange
from persistency.shared.pool import Document, MergePool, merged
from tests.loops import InLoop, Task, bounded, in_thread, together, turns

WAIT = 20.0  # seconds a test waits for what must come
START = 1_700_000_000.0
HOUR = 3600


class Clock:
    """The time, in Unix seconds, as a test says it is."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Give a clock that stands still until it is moved."""
    return Clock()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Name a root that doesn't exist yet."""
    return tmp_path / "root"


@pytest.fixture(params=["memory", "directory"])
def persistency(request: pytest.FixtureRequest, root: Path, clock: Clock) -> Iterator[Persistency]:
    """Give an empty root of either kind."""
    with Persistency(":memory:" if request.param == "memory" else root, clock=clock) as opened:
        yield opened


@pytest.fixture
def store(persistency: Persistency) -> Iterator[SharedStore]:
    """Give a store in it."""
    with SharedStore(persistency) as opened:
        yield opened


@contextmanager
def in_memory(**options: Any) -> Iterator[SharedStore]:
    """Give a store in memory, for tests that need many."""
    with Persistency(":memory:") as persistency, SharedStore(persistency, **options) as opened:
        yield opened


@contextmanager
def on_disk(root: Path, clock: Clock, **options: Any) -> Iterator[SharedStore]:
    """Give the store of a directory, as a process that starts has it."""
    with Persistency(root, clock=clock) as persistency, SharedStore(persistency, **options) as opened:
        yield opened


class Told:
    """A listener that can be waited for."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[tuple[Any, SharedChange]] = SimpleQueue()

    def __call__(self, source: Any, change: SharedChange) -> None:
        self.queue.put((source, change))

    def next(self) -> tuple[Any, SharedChange]:
        """Return the next change it is told of."""
        return self.queue.get(timeout=WAIT)


@contextmanager
def logged() -> Iterator[SimpleQueue[str]]:
    """Give the messages of the log as they come."""
    messages: SimpleQueue[str] = SimpleQueue()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.put(record.getMessage())

    handler, logger = Handler(), logging.getLogger("persistency.shared")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


class Replica:
    """A client's own copy: it takes what it is sent, in any order, and ignores what it knows better."""

    def __init__(self, snapshot: Snapshot | None = None) -> None:
        self.known = {record.key: (record.seq, record.data) for record in snapshot or []}

    def take(self, change: SharedChange) -> None:
        """Apply a change, unless a later one of the same key was applied already; a delete stays as a tombstone."""
        assert change.key is not None
        if change.seq > self.known.get(change.key, (0, None))[0]:
            self.known[change.key] = change.seq, change.data

    def records(self) -> dict[str, Any]:
        """Return the records, without tombstones."""
        return {key: data for key, (_, data) in self.known.items() if data is not None}


def records_of(collection: Collection) -> dict[str, Any]:
    """Return what the server has."""
    return {record.key: record.data for record in collection.snapshot().result(WAIT)}


def seq_of(source: Collection | MergePool) -> int:
    """Return the seq of the last change."""
    return source.snapshot().result(WAIT).seq


def merge_by_hand(target: Any, patch: Any) -> Any:
    """Merge a JSON patch as the pseudocode of RFC 7396 has it, to the letter."""
    if isinstance(patch, dict):
        target = target if isinstance(target, dict) else {}
        for name, value in patch.items():
            if value is None:
                if name in target:
                    del target[name]
            else:
                target[name] = merge_by_hand(target.get(name), value)
        return target
    return patch


# -- records ------------------------------------------------------------------------------------------------------


def test_set_stores_a_record_by_its_primary_key(store: SharedStore, clock: Clock) -> None:
    """S4-1, S4-8, S4-11: the record comes back with its key, a copy of its data, a fresh seq, and the time."""
    users = store.open("users", primary="name")
    data = {"name": "ada", "age": 36, "tags": ["a", b"\0", None, 1.5]}
    record = users.set(data).result(WAIT)
    assert record == Record("ada", data, 1, START)
    assert users.get("ada").result(WAIT) == record
    assert users.get("bob").result(WAIT) is None
    assert users.get("").result(WAIT) is None


@pytest.mark.parametrize(
    "data",
    [{}, {"name": "x"}, {"id": 1}, {"id": None}, {"id": b"a"}, {"id": ""}, {"id": ["a"]}, [("id", "a")], None, "a"],
)
def test_data_without_a_key_is_refused_at_the_call(store: SharedStore, data: Any) -> None:
    """S4-2: what is no dict, or whose primary is missing, empty or no str, is refused; no seq is consumed."""
    users = store.open()
    with pytest.raises(Misuse):
        users.set(data)
    assert seq_of(users) == 0
    assert users.set({"id": "a"}).result(WAIT).seq == 1


@pytest.mark.parametrize("data", [{"id": "a", "x": object()}, {"id": "\ud800"}, {"id": "a" * 9000}])
def test_data_that_cannot_be_stored_is_refused_at_the_call(store: SharedStore, data: Any) -> None:
    """S4-2: so is what CBOR, or a key, can't hold."""
    users = store.open()
    with pytest.raises(Misuse):
        users.set(data)
    assert seq_of(users) == 0


def test_seq_counts_the_changes_of_each_collection(store: SharedStore) -> None:
    """S4-3, S4-4: it starts at 0 and grows by one with every change; setting a key again gives it a new, higher one."""
    users, rooms = store.open(), store.open()
    assert seq_of(users) == seq_of(rooms) == 0
    assert [users.set({"id": name}).result(WAIT).seq for name in "abab"] == [1, 2, 3, 4]
    assert rooms.set({"id": "a"}).result(WAIT).seq == 1
    assert users.get("a").result(WAIT).seq == 3  # type: ignore[union-attr]  # it is there
    assert (seq_of(users), seq_of(rooms)) == (4, 1)


def test_the_last_one_to_arrive_counts(store: SharedStore) -> None:
    """S4-5: of many who set one key at the same time the one with the highest seq is there in the end."""
    users = store.open()
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda at: users.set({"id": "a", "at": at}).result(WAIT), range(400)))
    last = max(made, key=lambda record: record.seq)
    assert last.seq == 400
    assert users.get("a").result(WAIT) == last


def test_a_delete_takes_a_seq_if_there_was_something(store: SharedStore) -> None:
    """S4-6, S4-7: deleting a record gives a new seq; deleting what isn't there gives None and takes none."""
    users = store.open()
    users.set({"id": "a"}).result(WAIT)
    assert users.delete("b").result(WAIT) is None
    assert users.delete("a").result(WAIT) == 2
    assert users.delete("a").result(WAIT) is None
    assert seq_of(users) == 2
    assert users.get("a").result(WAIT) is None
    assert users.set({"id": "a"}).result(WAIT).seq == 3


def test_a_snapshot_has_all_records_by_seq(store: SharedStore, clock: Clock) -> None:
    """S4-9, S4-10: in the order in which they were last changed; of an empty collection it is an empty list."""
    users = store.open()
    assert users.snapshot().result(WAIT) == []
    for at, name in enumerate(("c", "a", "b", "c", "z", "a")):
        clock.now = START + at
        users.set({"id": name, "at": at}).result(WAIT)
    users.delete("z").result(WAIT)
    snapshot = users.snapshot().result(WAIT)
    assert [(record.key, record.seq, record.updated) for record in snapshot] == [
        ("b", 3, START + 2),
        ("c", 4, START + 3),
        ("a", 6, START + 5),
    ]
    assert snapshot.seq == 7
    assert [record.data["at"] for record in snapshot] == [2, 3, 5]


def test_a_snapshot_of_what_is_empty_again_says_where_it_stands(store: SharedStore) -> None:
    """S4-10, S4-46: with nothing in it there is no record to read a seq off, so the snapshot has its own."""
    users = store.open()
    users.set({"id": "a"}).result(WAIT)
    users.delete("a").result(WAIT)
    snapshot = users.snapshot().result(WAIT)
    assert (snapshot, snapshot.seq) == ([], 2)
    assert users.changes_since(snapshot.seq).result(WAIT) == []


def test_set_replaces_the_whole_record(store: SharedStore) -> None:
    """S4-12: nothing of the former record stays."""
    users = store.open()
    users.set({"id": "a", "x": 1, "deep": {"y": 2}}).result(WAIT)
    users.set({"id": "a", "deep": {"z": 3}}).result(WAIT)
    assert records_of(users) == {"a": {"id": "a", "deep": {"z": 3}}}


def test_updated_is_the_store_s_own_time(store: SharedStore, clock: Clock) -> None:
    """S4-13, S4-35: the clock that was given decides, to the millisecond."""
    users = store.open()
    clock.now = START + 12.345
    assert users.set({"id": "a"}).result(WAIT).updated == START + 12.345
    clock.now = START + 20
    assert users.get("a").result(WAIT).updated == START + 12.345  # type: ignore[union-attr]  # it is there


def test_readers_do_not_wait_for_one_another(store: SharedStore) -> None:
    """S4-15: readers of eight threads beside a writer see whole records, and never an older one than before."""
    users = store.open()
    users.set({"id": "a", "at": 0, "twice": 0}).result(WAIT)

    def read(_: int) -> list[Record]:
        return [users.get("a").result(WAIT) for _ in range(100)]  # type: ignore[misc]  # it is there

    with ThreadPoolExecutor(9) as pool:
        reading = [pool.submit(read, at) for at in range(8)]
        for at in range(1, 200):
            users.set({"id": "a", "at": at, "twice": 2 * at}).result(WAIT)
        for seen in (future.result(WAIT) for future in reading):
            assert [record.seq for record in seen] == sorted(record.seq for record in seen)
            assert all(record.data["twice"] == 2 * record.data["at"] == 2 * (record.seq - 1) for record in seen)


def test_nobody_shares_an_object(store: SharedStore) -> None:
    """D-17: data is copied at the call, and for each who gets it; nested parts too."""
    users, data = store.open(), {"id": "a", "tags": ["x"]}
    told = Told()
    store.on_change(told)
    record = users.set(data).result(WAIT)
    data["tags"].append("later")  # type: ignore[attr-defined]  # a list
    copies = [
        record.data,
        users.get("a").result(WAIT).data,  # type: ignore[union-attr]  # it is there
        users.snapshot().result(WAIT)[0].data,
        users.changes_since(0).result(WAIT)[0].data,
        told.next()[1].data,
    ]
    for copy in copies:
        assert copy == {"id": "a", "tags": ["x"]}
        copy["tags"].append("mine")
    assert records_of(users) == {"a": {"id": "a", "tags": ["x"]}}


def test_data_is_as_deep_as_values_are(store: SharedStore) -> None:
    """S4-1: whatever can be a value can be a record, at the limit of depth too."""
    deep: Any = "x"
    for _ in range(63):
        deep = [deep]
    users, pool = store.open(), store.open_pool()
    assert users.set({"id": "a", "deep": deep}).result(WAIT).data["deep"] == deep
    assert records_of(users)["a"]["deep"] == deep
    assert users.changes_since(0).result(WAIT)[0].data["deep"] == deep
    pool.merge("me", {"deep": deep}).result(WAIT)
    assert pool.snapshot().result(WAIT) == {"deep": deep}


def test_keys_may_be_any_text(store: SharedStore) -> None:
    """S4-1: keys with zeros, separators, case and no ASCII stay apart."""
    users = store.open()
    names = ["a", "A", "a\0", "a\0b", "ä", "a/b", "a b", "%", "\uffff", "𝄞"]
    for name in names:
        users.set({"id": name}).result(WAIT)
    assert [record.key for record in users.snapshot().result(WAIT)] == names
    assert users.delete("a").result(WAIT) == len(names) + 1
    assert sorted(records_of(users)) == sorted(names[1:])


@pytest.mark.parametrize("wrong", [None, 1, b"a", ("a",)])
def test_keys_and_clients_that_are_no_text_are_refused(store: SharedStore, wrong: Any) -> None:
    """S4-2: at the call, whatever the verb."""
    users, pool = store.open(), store.open_pool()
    calls: list[Callable[[], object]] = [
        lambda: users.get(wrong),
        lambda: users.delete(wrong),
        lambda: users.subscribe(wrong),
        lambda: users.unsubscribe(wrong),
        lambda: store.unsubscribe_all(wrong),
        lambda: pool.merge(wrong, {"a": 1}),
        lambda: store.get(wrong),
        lambda: store.open(wrong),
        lambda: store.open_pool(wrong),
    ]
    for call in calls:
        with pytest.raises(Misuse, match="must be a str"):
            call()


# -- followers ----------------------------------------------------------------------------------------------------


def test_subscribing_is_idempotent_and_keeps_its_order(store: SharedStore) -> None:
    """S4-16, S4-17, S4-18: a client is there once, in the order in which they came; an unknown one may be taken out."""
    users = store.open()
    for client in ("c", "a", "b", "a", "c"):
        users.subscribe(client)
    users.unsubscribe("nobody")
    listed = users.subscribers()
    assert listed == ["c", "a", "b"]
    listed.clear()
    users.unsubscribe("a")
    users.unsubscribe("a")
    assert users.subscribers() == ["c", "b"]
    users.subscribe("a")
    assert users.subscribers() == ["c", "b", "a"]


def test_a_change_carries_who_followed_when_it_was_made(store: SharedStore) -> None:
    """S4-14, S4-19: seq and followers come with each change; sending it is the service's."""
    users, told = store.open(), Told()
    store.on_change(told)
    assert users.set({"id": "a"}).result(WAIT).subscribers == ()
    users.subscribe("x")
    assert users.set({"id": "b"}, client="x").result(WAIT).subscribers == ("x",)
    users.subscribe("y")
    users.delete("a").result(WAIT)
    users.unsubscribe("x")
    users.set({"id": "b", "n": 1}).result(WAIT)
    expected = [
        SharedChange(1, "set", "a", {"id": "a"}, None, ()),
        SharedChange(2, "set", "b", {"id": "b"}, "x", ("x",)),
        SharedChange(3, "delete", "a", None, None, ("x", "y")),
        SharedChange(4, "set", "b", {"id": "b", "n": 1}, None, ("y",)),
    ]
    assert users.changes_since(0).result(WAIT) == expected
    assert [told.next() for _ in expected] == [(users, change) for change in expected]
    assert users.get("b").result(WAIT).subscribers == ()  # type: ignore[union-attr]  # it is there


def test_a_client_that_goes_is_taken_out_of_everything(store: SharedStore) -> None:
    """S4-20: of every collection and every pool, and nobody else is."""
    sources = [store.open(), store.open(kind="permanent"), store.open_pool()]
    for source in sources:
        source.subscribe("x")
        source.subscribe("y")
    store.unsubscribe_all("nobody")
    store.unsubscribe_all("x")
    store.unsubscribe_all("x")
    assert [source.subscribers() for source in sources] == [["y"]] * 3
    sources[0].subscribe("x")
    assert sources[0].subscribers() == ["y", "x"]


def test_followers_keep_nothing_alive(store: SharedStore, clock: Clock) -> None:
    """S4-21: a collection that is followed expires like any other."""
    users = store.open("users", ttl=10)
    users.subscribe("x")
    clock.now += 10
    assert store.get("users") is None
    assert store.purge_expired() == 1


def test_those_who_followed_are_told_of_a_purge(store: SharedStore, clock: Clock) -> None:
    """S4-22: a purge tells the listeners, once, who followed; what isn't purged tells nothing."""
    users, pool, stays = store.open("users", ttl=10), store.open_pool("pool", ttl=10), store.open("stays")
    users.subscribe("x")
    users.subscribe("y")
    pool.subscribe("y")
    stays.subscribe("x")
    told = Told()
    store.on_change(told)
    clock.now += 10
    assert store.purge_expired() == 2
    assert store.purge_expired() == 0
    assert [told.next(), told.next()] == [
        (users, SharedChange(0, "closed", None, None, None, ("x", "y"))),
        (pool, SharedChange(0, "closed", None, None, None, ("y",))),
    ]
    assert told.queue.empty()
    assert stays.subscribers() == ["x"]
    store.unsubscribe_all("y")


def test_what_is_purged_is_not_remembered(store: SharedStore, clock: Clock) -> None:
    """S4-21: neither the store nor the clients it knows keep a handle of it."""
    users, stays = store.open("users", ttl=10), store.open("stays")
    for source in (users, stays):
        source.subscribe("x")
    users.set({"id": "a"}).result(WAIT)
    gone = weakref.ref(users)
    clock.now += 10
    assert store.purge_expired() == 1
    del users, source
    gc.collect()
    assert gone() is None
    assert stays.subscribers() == ["x"]


def test_a_store_has_followers_of_its_own(persistency: Persistency) -> None:
    """S4-19: two stores over one job see the same records, and each only its own followers."""
    with SharedStore(persistency) as first, SharedStore(persistency) as second:
        mine, theirs = first.open("users"), second.open("users")
        mine.subscribe("x")
        assert theirs.subscribers() == []
        assert mine.set({"id": "a"}).result(WAIT).subscribers == ("x",)
        assert theirs.set({"id": "b"}).result(WAIT) == Record("b", {"id": "b"}, 2, START)
        assert records_of(mine) == records_of(theirs) == {"a": {"id": "a"}, "b": {"id": "b"}}
        second.close()
        assert mine.set({"id": "c"}).result(WAIT).seq == 3


# -- listeners ----------------------------------------------------------------------------------------------------


def test_changes_are_told_in_the_order_of_their_seqs(store: SharedStore) -> None:
    """D-16, S4-14: beside eight writers and clients that come and go, each client's seqs only ever grow, without a gap
    while it follows; and who followed is what was so when the change was made.
    """
    users, told = store.open(), Told()
    users.subscribe("always")
    store.on_change(told)
    rounds = 100

    def write(me: int) -> None:
        client = f"client-{me}"
        for at in range(rounds):
            users.subscribe(client)
            assert client in users.set({"id": f"{me}-{at}"}).result(WAIT).subscribers
            users.unsubscribe(client)
            assert client not in users.set({"id": f"{me}-{at}", "again": True}).result(WAIT).subscribers

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(write, me) for me in range(8)]:
            done.result(WAIT)
    changes = [told.next()[1] for _ in range(2 * 8 * rounds)]
    assert told.queue.empty()
    assert [change.seq for change in changes] == list(range(1, 2 * 8 * rounds + 1))
    assert all("always" in change.subscribers for change in changes)
    for change in changes:
        client = f"client-{change.key[0]}"  # type: ignore[index]  # a set has a key
        assert (client in change.subscribers) == ("again" not in change.data)
    assert [change[:5] for change in changes] == [change[:5] for change in users.changes_since(0).result(WAIT)]


def test_a_listener_hears_from_when_it_came_until_it_goes(store: SharedStore) -> None:
    """S4-19: what was before isn't told, nor what comes after; ending it twice is fine, and others go on."""
    users, first, second = store.open(), Told(), Told()
    users.set({"id": "a"}).result(WAIT)
    stop = store.on_change(first)
    store.on_change(second)
    users.set({"id": "b"}).result(WAIT)
    assert first.next()[1].seq == second.next()[1].seq == 2
    stop()
    stop()
    users.set({"id": "c"}).result(WAIT)
    assert second.next()[1].seq == 3
    assert first.queue.empty()
    with pytest.raises(Misuse):
        store.on_change("not a function")  # type: ignore[arg-type]  # on purpose


def test_a_listener_that_stops_hears_nothing_that_still_waits(store: SharedStore) -> None:
    """S4-19: what was to be told when it stopped isn't any more; nor is a later one told of it."""
    users, first, second, third = store.open(), Told(), Told(), Told()
    busy, may_go = threading.Event(), threading.Event()

    def listen(source: Collection, change: SharedChange) -> None:
        first(source, change)
        busy.set()
        assert may_go.wait(WAIT)

    store.on_change(listen)
    stop = store.on_change(second)
    users.set({"id": "a"}).result(WAIT)
    assert busy.wait(WAIT)
    users.set({"id": "b"}).result(WAIT)
    users.set({"id": "c"}).result(WAIT)
    told_of = users.changes_since(2).result(WAIT)  # stands behind them, so they are committed
    stop()
    may_go.set()
    assert [first.next()[1].seq for _ in range(3)] == [1, 2, 3]
    store.on_change(third)
    users.set({"id": "d"}).result(WAIT)
    assert first.next()[1].seq == third.next()[1].seq == 4
    assert len(told_of) == 1
    assert second.queue.qsize() <= 1  # the first change may have come before the stop
    assert third.queue.empty()


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_what_a_listener_raises_is_logged(store: SharedStore, error: type[BaseException]) -> None:
    """S4-19: neither the change nor the other listeners suffer from it."""
    users, told = store.open(), Told()

    def fail(_source: object, _change: SharedChange) -> None:
        raise error("on purpose")

    store.on_change(fail)
    store.on_change(told)
    with logged() as messages:
        for seq in (1, 2):
            assert users.set({"id": "a"}).result(WAIT).seq == seq
            assert told.next()[1].seq == seq
            assert f"a listener raised on change {seq}" in messages.get(timeout=WAIT)


def test_a_listener_may_change_things_itself(store: SharedStore) -> None:
    """S4-19: what it does is told after what it was told of."""
    users, told = store.open(), Told()

    def count(source: Collection, change: SharedChange) -> None:
        if change.seq < 5:
            source.set({"id": "count", "seq": change.seq})

    store.on_change(told)
    store.on_change(count)
    users.set({"id": "a"}).result(WAIT)
    assert [told.next()[1].seq for _ in range(5)] == [1, 2, 3, 4, 5]


def test_a_slow_listener_misses_the_oldest_and_holds_up_nobody(
    store: SharedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S4-19: while it is busy the writers go on; it can tell by the gap that something is missing, and ask for it."""
    monkeypatch.setattr(following_module, "UNTOLD_MAX", 10)
    users, told = store.open(), Told()
    busy, may_go = threading.Event(), threading.Event()

    def listen(source: Collection, change: SharedChange) -> None:
        told(source, change)
        if change.seq == 1:
            busy.set()
            assert may_go.wait(WAIT)

    store.on_change(listen)
    users.set({"id": "a"}).result(WAIT)
    assert busy.wait(WAIT)
    for at in range(30):
        users.set({"id": "b", "at": at}).result(WAIT)
    may_go.set()
    assert [told.next()[1].seq for _ in range(11)] == [1, *range(22, 32)]
    assert told.queue.empty()
    assert [change.seq for change in users.changes_since(1, 20).result(WAIT)] == list(range(2, 22))


def test_changes_that_wait_for_a_listener_are_bounded_by_bytes(
    store: SharedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S4-19: big changes as well as many; the newest one is always told."""
    monkeypatch.setattr(following_module, "UNTOLD_BYTES_MAX", 5_000)
    users, told = store.open(), Told()
    busy, may_go = threading.Event(), threading.Event()

    def listen(source: Collection, change: SharedChange) -> None:
        told(source, change)
        if change.seq == 1:
            busy.set()
            assert may_go.wait(WAIT)

    store.on_change(listen)
    users.set({"id": "a"}).result(WAIT)
    assert busy.wait(WAIT)
    for size in (1_000, 1_000, 1_000, 1_000, 1_000, 1_000, 9_000):
        users.set({"id": "b", "text": "x" * size}).result(WAIT)
    users.set({"id": "c"}).result(WAIT)
    users.set({"id": "d"}).result(WAIT)
    may_go.set()
    assert [told.next()[1].seq for _ in range(3)] == [1, 9, 10]
    assert told.queue.empty()


def test_a_change_that_is_undone_is_not_told(persistency: Persistency) -> None:
    """S4-3, S4-48: what goes over the quota takes no seq, is told to its caller and the log, and to no listener."""
    persistency.open_job("shared", max_bytes=2_000)
    with SharedStore(persistency) as store, logged() as messages:
        users, told = store.open(), Told()
        users.subscribe("x")
        store.on_change(told)
        users.set({"id": "a"}).result(WAIT)
        with pytest.raises(QuotaExceeded):
            users.set({"id": "b", "text": "x" * 4_000}).result(WAIT)
        assert users.delete("a").result(WAIT) == 2
        assert [told.next()[1][:3] for _ in range(2)] == [(1, "set", "a"), (2, "delete", "a")]
        assert told.queue.empty()
        assert [change.kind for change in users.changes_since(0).result(WAIT)] == ["set", "delete"]
        assert "a change failed: storage limit exceeded" in messages.get(timeout=WAIT)


def test_a_transaction_that_is_begun_again_is_told_once() -> None:
    """S4-48: what is noted down anew takes the place of what was; nothing is told before it is committed."""
    following, told = Following(), Told()
    users = following_module.Followers(following, "users")
    following.listen(told)
    first, second = (Note("set", name, None, encode({"id": name}), True) for name in "ab")
    users.subscribe("x")
    assert users.note(1, first) == ("x",)
    assert users.note(2, second) == ("x",)
    users.subscribe("y")
    assert users.note(2, second) == ("x", "y")
    users.subscribe("z")
    assert users.note(1, second) == ("x", "y", "z")
    assert told.queue.empty()
    assert (users.at(0), users.at(1), users.at(2)) == ((), ("x", "y", "z"), ("x", "y", "z"))
    users.unsubscribe("z")
    users.committed(1)
    assert told.next() == ("users", SharedChange(1, "set", "b", {"id": "b"}, None, ("x", "y", "z")))
    users.committed(1)
    users.committed(2)
    assert told.queue.empty()
    assert set(following.by_client) == {"x", "y"}  # who follows nothing leaves nothing behind


def test_a_commit_brings_those_before_it_along() -> None:
    """D-16: whoever learns first that changes are committed, they are told in the order of their seqs."""
    following, told = Following(), Told()
    users = following_module.Followers(following, "users")
    following.listen(told)
    for seq in (1, 2, 3):
        users.note(seq, Note("set", "a", None, encode({"id": "a", "seq": seq}), True))
    users.committed(2)
    users.committed(1)
    users.committed(3)
    assert [told.next()[1].data["seq"] for _ in range(3)] == [1, 2, 3]
    assert told.queue.empty()


def test_old_moments_are_forgotten(store: SharedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """S4-14: who followed is remembered for so many different sets of followers, and no more than so many clients."""
    monkeypatch.setattr(following_module, "MOMENTS_MAX", 3)
    users = store.open()
    for at in range(5):
        users.subscribe(f"c{at}")
        users.set({"id": "a"}).result(WAIT)
    users.set({"id": "a"}).result(WAIT)
    assert [len(change.subscribers) for change in users.changes_since(0).result(WAIT)] == [0, 0, 3, 4, 5, 5]
    monkeypatch.setattr(following_module, "MOMENT_CLIENTS_MAX", 6)
    users.unsubscribe("c0")
    users.set({"id": "a"}).result(WAIT)
    assert [len(change.subscribers) for change in users.changes_since(0).result(WAIT)] == [0, 0, 0, 0, 0, 0, 4]


# -- opening ------------------------------------------------------------------------------------------------------


def test_a_collection_is_temporary_unless_it_is_said(store: SharedStore) -> None:
    """S4-23, S4-26, S4-28: the kinds; the primary's name is "id", also when it is given empty."""
    temp, permanent = store.open(), store.open("p", kind="permanent", primary="")
    assert (temp.kind, temp.primary, temp.expires) == ("temp", "id", START + HOUR)
    assert (permanent.kind, permanent.primary, permanent.expires) == ("permanent", "id", None)
    assert repr(permanent) == "<Collection 'p'>"


@pytest.mark.parametrize("kind", ["", "Temp", "forever", None, 1, ["temp"]])
def test_unknown_kinds_are_refused(store: SharedStore, kind: Any) -> None:
    """S4-23: a kind that isn't known is refused, and nothing is opened."""
    with pytest.raises(Misuse, match="kind"):
        store.open("x", kind=kind)
    with pytest.raises(Misuse, match="kind"):
        store.open_pool("x", kind=kind)
    assert store.get("x") is None
    assert store.get_pool("x") is None


def test_opening_an_id_again_gives_the_same_collection(store: SharedStore) -> None:
    """S4-24: the very same object, whoever opens it, with what is in it."""
    users = store.open("users", "permanent", "name")
    users.set({"name": "ada"}).result(WAIT)
    with ThreadPoolExecutor(8) as pool:
        handles = list(pool.map(lambda _: store.open("users", "permanent", "name"), range(32)))
    assert all(handle is users for handle in handles)
    assert store.get("users") is users
    assert records_of(store.open("users", "permanent", "name")) == {"ada": {"name": "ada"}}


def test_racing_openers_of_a_new_id_get_one_collection(store: SharedStore) -> None:
    """S4-24: of many who open an id nobody has opened yet, all get the same."""
    with ThreadPoolExecutor(8) as pool:
        handles = list(pool.map(lambda _: store.open("new"), range(32)))
    assert len(set(map(id, handles))) == 1


@pytest.mark.parametrize(
    "other", [{"kind": "permanent"}, {"primary": "name"}, {"kind": "permanent", "primary": "name"}]
)
def test_opening_an_id_as_something_else_is_refused(store: SharedStore, other: dict[str, Any]) -> None:
    """S4-24: another kind or primary is an error and changes nothing; another ttl is ignored."""
    users = store.open("users")
    with pytest.raises(Misuse, match="users"):
        store.open("users", **other)
    assert store.open("users", ttl=5) is users
    assert (users.kind, users.primary, users.expires) == ("temp", "id", START + HOUR)
    pool = store.open_pool("pool")
    with pytest.raises(Misuse, match="pool"):
        store.open_pool("pool", kind="permanent")
    assert store.open_pool("pool") is pool


def test_without_an_id_there_is_a_fresh_one(store: SharedStore) -> None:
    """S4-25, S4-45: 24 hex digits, which nobody can guess and which open it again."""
    ids = [store.open().id for _ in range(50)] + [store.open_pool().id for _ in range(50)]
    assert len(set(ids)) == 100
    assert all(len(id_) == 24 and set(id_) <= set(string.hexdigits.lower()) for id_ in ids)
    assert store.open(ids[0]) is store.get(ids[0])


@pytest.mark.parametrize("ttl", [0, -1, -0.5, float("nan"), float("inf"), None, "1", True, timedelta(0), 1e11])
def test_a_temporary_one_needs_a_ttl(store: SharedStore, ttl: Any) -> None:
    """S4-27: a ttl that isn't one is refused at the call, as everywhere; the default is an hour."""
    for open_ in (store.open, store.open_pool):
        with pytest.raises(Misuse, match="ttl"):
            open_("x", ttl=ttl)
        assert open_("permanent", kind="permanent", ttl=ttl).expires is None
    assert store.get("x") is None


def test_a_permanent_one_never_ends(store: SharedStore, clock: Clock) -> None:
    """S4-28: whatever its ttl says."""
    users, pool = store.open("users", "permanent", ttl=1), store.open_pool("pool", "permanent", ttl=1)
    users.set({"id": "a"}).result(WAIT)
    clock.now += 10 * 365 * 24 * HOUR
    assert store.purge_expired() == 0
    assert (users.closed, pool.closed) == (False, False)
    assert records_of(users) == {"a": {"id": "a"}}


def test_the_end_is_set_when_it_is_opened(store: SharedStore, clock: Clock) -> None:
    """S4-29, S4-30: neither use, nor opening it again, moves it; it is live if and only if now is before it."""
    users = store.open("users", ttl=timedelta(seconds=10))
    clock.now = START + 9.999
    users.set({"id": "a"}).result(WAIT)
    assert store.open("users", ttl=100) is users
    assert users.expires == START + 10
    assert users.get("a").result(WAIT) is not None
    clock.now = START + 10
    assert users.closed
    assert store.get("users") is None
    with pytest.raises(Closed):
        users.get("a")


def test_get_finds_what_is_live(store: SharedStore, clock: Clock) -> None:
    """S4-31: a missing or expired one is None; collections and pools are asked for apart."""
    assert store.get("users") is None
    users = store.open("users", ttl=10)
    assert store.get("users") is users
    assert store.get_pool("users") is None
    clock.now += 11
    assert store.get("users") is None


def test_opening_what_has_expired_starts_empty(store: SharedStore, clock: Clock) -> None:
    """S4-32, D-18: it is purged by that, starts with nothing and at seq 0, may be of another kind, and lasts anew."""
    users, told = store.open("users", ttl=10), Told()
    users.set({"id": "a"}).result(WAIT)
    users.subscribe("x")
    store.on_change(told)
    clock.now += 10
    again = store.open("users", kind="permanent", primary="name")
    assert again is not users
    assert told.next() == (users, SharedChange(0, "closed", None, None, None, ("x",)))
    assert (again.snapshot().result(WAIT), seq_of(again), again.subscribers()) == ([], 0, [])
    assert again.set({"name": "b"}).result(WAIT).seq == 1
    assert store.get("users") is again
    assert store.purge_expired() == 0
    with pytest.raises(Closed):
        users.set({"id": "c"})
    assert records_of(again) == {"b": {"name": "b"}}


def test_a_clock_that_steps_back_revives_nothing(store: SharedStore, clock: Clock) -> None:
    """S4-30: what has been found expired stays so."""
    users = store.open("users", ttl=10)
    clock.now += 10
    assert store.get("users") is None
    clock.now -= 5
    assert users.closed
    assert store.get("users") is None


def test_purging_removes_what_has_expired(store: SharedStore, persistency: Persistency, clock: Clock) -> None:
    """S4-33: collections and pools, counted together; permanent and live ones stay, and no row of the others does."""
    stays = [store.open("permanent", "permanent"), store.open("long", ttl=100)]
    gone = [store.open(ttl=10), store.open(ttl=5)]
    for collection in [*stays, *gone]:
        for at in range(5):
            collection.set({"id": str(at)}).result(WAIT)
    pool = store.open_pool("pool", ttl=10)
    pool.merge("me", {"a": 1}).result(WAIT)
    job = persistency["shared"]
    before = job.count("shared").result(WAIT)
    assert store.purge_expired() == 0
    clock.now += 10
    assert store.purge_expired() == 3
    assert store.purge_expired() == 0
    # Of each collection: its own row, its seq, five records, five changes; of the pool one field and one change.
    assert job.count("shared").result(WAIT) == before - 2 * 12 - 4
    assert [row.key.parts for row in job.scan("shared.ends").result(WAIT)] == [(1_700_000_100_000, 2)]
    assert job.count("shared.ids").result(WAIT) == 1 + 2
    assert all(len(records_of(collection)) == 5 for collection in stays)


def test_a_big_one_is_purged_in_slices(
    store: SharedStore, persistency: Persistency, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S4-33: no transaction removes more than a slice, also where one is opened again; what is beside it stays."""
    monkeypatch.setattr(places_module, "SLICE_ROWS", 10)
    users, other, left = store.open("users", ttl=10), store.open("other"), []
    for at in range(30):
        users.set({"id": str(at)}).result(WAIT)
        other.set({"id": str(at)}).result(WAIT)
    purge_slice = shared_module.purge_slice

    def counted(tx: Transaction, place: Any) -> bool | None:
        done = purge_slice(tx, place)
        left.append(tx.count("shared", places_module.KeyRange.prefix((place.number,))))
        return done

    monkeypatch.setattr(shared_module, "purge_slice", counted)
    clock.now += 10
    assert store.open("users").id == "users"
    assert left == [51, 41, 31, 21, 11, 1, 0]  # 30 records, 30 changes and the seq
    assert len(records_of(other)) == 30


def test_what_an_interrupted_purge_leaves_is_never_seen(
    store: SharedStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S4-33, S4-36: half a purge shows nobody half a collection, and the next purge goes on with it."""
    monkeypatch.setattr(places_module, "SLICE_ROWS", 10)
    users = store.open("users", ttl=10)
    for at in range(30):
        users.set({"id": str(at)}).result(WAIT)
    clock.now += 10
    purge_slice = shared_module.purge_slice

    def failing(tx: Transaction, place: Any) -> bool | None:
        if tx.count("shared") < 40:
            raise KeyboardInterrupt
        return purge_slice(tx, place)

    with monkeypatch.context() as broken:
        broken.setattr(shared_module, "purge_slice", failing)
        with pytest.raises(KeyboardInterrupt):
            store.purge_expired()
    assert store.get("users") is None
    assert store.purge_expired() == 1


def test_racing_purges_count_each_once(store: SharedStore, clock: Clock) -> None:
    """S4-33: what eight threads remove at the same time is counted by one of them, and told once."""
    for at in range(40):
        store.open(ttl=10).set({"id": str(at)}).result(WAIT)
    told = Told()
    store.on_change(told)
    clock.now += 10
    with ThreadPoolExecutor(8) as pool:
        counts = list(pool.map(lambda _: store.purge_expired(), range(8)))
    assert sum(counts) == 40
    assert len({told.next()[0].id for _ in range(40)}) == 40
    assert told.queue.empty()


def test_a_purge_that_comes_late_takes_only_what_it_was_for(
    store: SharedStore, persistency: Persistency, clock: Clock
) -> None:
    """S4-32, S4-33: what has the id of the one that expired, by now, stays."""
    old = store.open("users", ttl=10)
    clock.now += 10
    again = store.open("users")
    again.set({"id": "a"}).result(WAIT)
    assert persistency["shared"].run(places_module.purge_slice, old._place).result(WAIT) is False
    assert store.get("users") is again
    assert records_of(again) == {"a": {"id": "a"}}


# -- the janitor --------------------------------------------------------------------------------------------------


def janitors() -> list[threading.Thread]:
    """Return the janitors of the job "shared" that run."""
    return [thread for thread in threading.enumerate() if thread.name == "persistency:shared:janitor"]


def test_a_janitor_purges(store: SharedStore, clock: Clock) -> None:
    """S4-34: at intervals, on a daemon thread, until it is stopped; stopping twice is fine."""
    store.open("users", ttl=10).subscribe("x")
    told = Told()
    store.on_change(told)
    stop = store.start_janitor(0.001)
    [thread] = janitors()
    assert thread.daemon
    clock.now += 10
    assert told.next()[1].subscribers == ("x",)
    stop()
    stop()
    thread.join(WAIT)
    assert not thread.is_alive()


@pytest.mark.parametrize("interval", [0, -1, float("nan"), None, "1", True])
def test_a_janitor_needs_an_interval(store: SharedStore, interval: Any) -> None:
    """S4-34, D-34: one that isn't more than 0 is refused, and no thread is started."""
    with pytest.raises(Misuse, match="interval"):
        store.start_janitor(interval)
    assert janitors() == []


def test_a_janitor_survives_a_purge_that_fails(
    store: SharedStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """S4-34: it logs the failure and comes again."""
    calls, twice = [], threading.Event()

    def purge(_store: SharedStore) -> int:
        calls.append(None)
        if len(calls) == 1:
            raise RuntimeError("the disk is full")
        twice.set()
        return 0

    monkeypatch.setattr(SharedStore, "purge_expired", purge)
    stop = store.start_janitor(0.001)
    [thread] = janitors()
    assert twice.wait(WAIT)
    stop()
    thread.join(WAIT)
    assert "a purge failed" in caplog.text


@pytest.mark.parametrize("how", ["store", "job", "dropped"])
def test_a_janitor_ends_with_its_store(how: str) -> None:
    """S4-34: with the store, with its job, and when nobody has the store any more."""
    with Persistency(":memory:") as persistency:
        store = SharedStore(persistency)
        store.open()
        store.start_janitor(HOUR if how != "job" else 0.001)
        [thread] = janitors()
        if how == "store":
            store.close()
        elif how == "job":
            persistency.close_job("shared")
        else:
            del store
            gc.collect()
        thread.join(WAIT)
        assert not thread.is_alive()


# -- handles of what is gone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("purged", [False, True])
def test_handles_of_what_has_expired_are_closed(store: SharedStore, clock: Clock, purged: bool) -> None:
    """S4-36: every verb raises at once, before a purge and after it, and nothing is written anywhere."""
    users, pool = store.open("users", ttl=10), store.open_pool("pool", ttl=10)
    users.set({"id": "a"}).result(WAIT)
    users.subscribe("x")
    clock.now += 10
    if purged:
        assert store.purge_expired() == 2
    calls: list[Callable[[], object]] = [
        lambda: users.set({"id": "b"}),
        lambda: users.get("a"),
        lambda: users.delete("a"),
        users.snapshot,
        lambda: pool.merge("me", {"a": 1}),
        lambda: pool.merge("me", {}),
        pool.snapshot,
    ]
    for source in (users, pool):
        calls += [
            lambda source=source: source.changes_since(0),  # type: ignore[misc]  # bound now
            lambda source=source: source.subscribe("y"),  # type: ignore[misc]
            lambda source=source: source.unsubscribe("x"),  # type: ignore[misc]
            source.subscribers,
        ]
        assert source.closed
    for call in calls:
        with pytest.raises(Closed, match="has expired"):
            call()
    store.unsubscribe_all("x")
    assert store.purge_expired() == (0 if purged else 2)


def test_a_request_that_is_late_is_refused(store: SharedStore, persistency: Persistency, clock: Clock) -> None:
    """S4-36: what was asked in time but comes to the data too late is refused there, with nothing written."""
    users, pool = store.open("users", ttl=10), store.open_pool("pool", ttl=10)
    users.set({"id": "a"}).result(WAIT)
    entered, may_go = threading.Event(), threading.Event()

    def hold(_tx: Transaction) -> None:
        entered.set()
        assert may_go.wait(WAIT)

    with ThreadPoolExecutor(1) as thread:
        holding = thread.submit(lambda: persistency["shared"].run(hold).result(WAIT))
        assert entered.wait(WAIT)
        late = [
            users.set({"id": "b"}),
            users.delete("a"),
            users.get("a"),
            users.snapshot(),
            users.changes_since(0),
            pool.merge("me", {"a": 1}),
            pool.merge("me", {}),
            pool.snapshot(),
        ]
        clock.now += 10
        may_go.set()
        holding.result(WAIT)
    for reply in late:
        with pytest.raises(Closed, match="has expired"):
            reply.result(WAIT)
    assert store.purge_expired() == 2


def test_a_closed_store_refuses(persistency: Persistency) -> None:
    """S4-36: so do its handles; what is stored stays, and closing again is nothing."""
    store = SharedStore(persistency)
    users = store.open("users", "permanent")
    users.set({"id": "a"}).result(WAIT)
    users.subscribe("x")
    told = Told()
    store.on_change(told)
    store.close()
    store.close()
    assert users.closed
    for call in (
        lambda: users.set({"id": "b"}),
        users.subscribers,
        store.open,
        lambda: store.get("users"),
        store.open_pool,
        store.purge_expired,
        lambda: store.start_janitor(1),
        lambda: store.on_change(told),
    ):
        with pytest.raises(Closed):
            call()
    store.unsubscribe_all("x")
    assert told.queue.empty()
    assert "closed" in repr(store)
    with SharedStore(persistency) as again:
        assert records_of(again.open("users", "permanent")) == {"a": {"id": "a"}}


def test_handles_of_a_closed_job_refuse(store: SharedStore, persistency: Persistency) -> None:
    """S4-36: the job may be closed under the store."""
    users = store.open("users")
    persistency.close_job("shared")
    assert users.closed
    for call in (lambda: users.set({"id": "b"}), users.subscribers, lambda: store.get("users"), store.purge_expired):
        with pytest.raises(Closed):
            call()


def test_a_store_is_made_without_opening_anything(root: Path) -> None:
    """S4-45: wrong arguments are refused at once, and the job is opened by the first call that needs it."""
    with Persistency(root) as persistency:
        for wrong in (
            lambda: SharedStore(":memory:"),  # type: ignore[arg-type]  # on purpose
            lambda: SharedStore(persistency, ""),
            lambda: SharedStore(persistency, changes_max=0),
        ):
            with pytest.raises(Misuse):
                wrong()
        with SharedStore(persistency, "mine") as store:
            store.unsubscribe_all("x")
            assert not root.exists()
            store.open()
            assert list(persistency) == ["mine"]


# -- restarts -----------------------------------------------------------------------------------------------------


def test_everything_survives_a_restart(root: Path, clock: Clock) -> None:
    """S4-37, D-14: records, kinds, ends and changes are there again, seq goes on where it was; followers are not."""
    with on_disk(root, clock) as store:
        users, temp = store.open("users", "permanent", "name"), store.open("temp", ttl=100)
        users.subscribe("x")
        for name in ("a", "b", "a"):
            users.set({"name": name}).result(WAIT)
        users.delete("b").result(WAIT)
        temp.set({"id": "t"}).result(WAIT)
        store.open_pool("pool", "permanent").merge("me", {"a": {"b": 1}}).result(WAIT)
    clock.now += 50
    with on_disk(root, clock) as store:
        users = store.get("users")  # type: ignore[assignment]  # it is there
        assert (users.kind, users.primary, users.expires) == ("permanent", "name", None)
        assert users.subscribers() == []
        snapshot = users.snapshot().result(WAIT)
        assert (snapshot, snapshot.seq) == ([Record("a", {"name": "a"}, 3, START)], 4)
        assert [change[:3] for change in users.changes_since(1).result(WAIT)] == [
            (2, "set", "b"),
            (3, "set", "a"),
            (4, "delete", "b"),
        ]
        assert {change.subscribers for change in users.changes_since(0).result(WAIT)} == {()}
        users.subscribe("y")
        assert users.set({"name": "c"}).result(WAIT).seq == 5
        assert [change.subscribers for change in users.changes_since(3).result(WAIT)] == [(), ("y",)]
        assert store.open("temp").expires == START + 100
        with pytest.raises(Misuse):
            store.open("users")
        pool = store.open_pool("pool", "permanent")
        assert pool.merge("me", {"a": {"c": 2}}).result(WAIT) == 2
        assert pool.snapshot().result(WAIT) == {"a": {"b": 1, "c": 2}}
    clock.now += 50
    with on_disk(root, clock) as store:
        assert store.get("temp") is None
        assert store.purge_expired() == 1


def test_numbers_are_not_given_twice(root: Path, clock: Clock) -> None:
    """S4-32, S4-36: what has the id of one that was purged is another one, after a restart too."""
    with on_disk(root, clock) as store:
        store.open("users", ttl=10).set({"id": "a"}).result(WAIT)
    clock.now += 10
    with on_disk(root, clock) as store:
        assert store.purge_expired() == 1
        assert records_of(store.open("users")) == {}
        assert records_of(store.open("other")) == {}


# -- merge pools --------------------------------------------------------------------------------------------------


def test_pools_and_collections_have_ids_of_their_own(store: SharedStore) -> None:
    """S4-39: one id may name both, and neither sees the other."""
    users, pool = store.open("x"), store.open_pool("x")
    users.set({"id": "a"}).result(WAIT)
    pool.merge("me", {"b": 1}).result(WAIT)
    assert records_of(users) == {"a": {"id": "a"}}
    assert pool.snapshot().result(WAIT) == {"b": 1}
    assert store.get_pool("x") is pool


def test_a_pool_lasts_an_hour(store: SharedStore, clock: Clock) -> None:
    """S4-38, S4-39: unless it is said otherwise; it expires like a collection."""
    pool = store.open_pool("pool")
    assert (pool.kind, pool.expires) == ("temp", START + HOUR)
    clock.now += HOUR
    assert store.get_pool("pool") is None
    again = store.open_pool("pool", ttl=1)
    assert again.snapshot().result(WAIT) == {}
    assert again.merge("me", {"a": 1}).result(WAIT) == 1


def test_patches_are_merged_field_by_field(store: SharedStore) -> None:
    """S4-40, S4-41: each merge has a seq; of a field the last to arrive counts, fields not named stay, None deletes."""
    pool = store.open_pool()
    assert pool.snapshot().result(WAIT) == {}
    patches: list[dict[str, Any]] = [
        {"title": "one", "pos": {"x": 1, "y": {"deep": [1, 2]}}},
        {"pos": {"x": 2}},
        {"title": None, "pos": {"y": {"deep": [3], "more": None}}},
        {"missing": None},
        {"pos": {"x": None}, "new": {"a": {"b": None, "c": 1}}},
        {"new": 5, "": "empty", "ä\0": 1},
        {"new": {"again": True}},
    ]
    model: dict[str, Any] = {}
    for at, patch in enumerate(patches, 1):
        model = merge_by_hand(model, patch)
        assert pool.merge(f"c{at}", patch).result(WAIT) == at
        document = pool.snapshot().result(WAIT)
        assert (document, document.seq) == (model, at)
    assert model["pos"] == {"y": {"deep": [3]}}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
PATCHES = st.dictionaries(st.sampled_from("abc"), JSON, max_size=3)


@given(st.lists(PATCHES, max_size=8))
@settings(max_examples=150, deadline=None)
def test_a_pool_is_what_rfc_7396_makes_of_its_patches(patches: list[dict[str, Any]]) -> None:
    """S4-41: any patches, against the RFC's own pseudocode."""
    model: dict[str, Any] = {}
    with in_memory() as store:
        pool = store.open_pool()
        for patch in patches:
            before = encode(patch)
            pool.merge("me", patch).result(WAIT)
            assert encode(patch) == before
            model = merge_by_hand(model, patch)
        document = pool.snapshot().result(WAIT)
        assert document == model
        assert document.seq == sum(1 for patch in patches if patch)


@pytest.mark.parametrize(
    ("target", "patch", "result"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        (["a", "b"], ["c", "d"], ["c", "d"]),
        ({"a": "b"}, ["c"], ["c"]),
        ({"a": "foo"}, None, None),
        ({"a": "foo"}, "bar", "bar"),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
        ([1, 2], {"a": "b", "c": None}, {"a": "b"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
    ],
)
def test_merging_gives_what_rfc_7396_lists(target: Any, patch: Any, result: Any) -> None:
    """S4-41: the test cases of its appendix A, one by one; what is merged stays as it is."""
    before = encode([target, patch])
    assert merged(target, patch) == result
    assert encode([target, patch]) == before


def test_an_empty_patch_changes_nothing(store: SharedStore) -> None:
    """S4-41: it takes no seq, and answers with the last one."""
    pool, told = store.open_pool(), Told()
    store.on_change(told)
    assert pool.merge("me", {}).result(WAIT) == 0
    assert pool.merge("me", {"a": 1}).result(WAIT) == 1
    assert pool.merge("me", {}).result(WAIT) == 1
    assert [change.seq for change in pool.changes_since(0).result(WAIT)] == [1]
    assert told.next()[1].seq == 1
    assert told.queue.empty()


@pytest.mark.parametrize("patch", [None, [], "a", {1: 2}, {"a": object()}, {"a" * 9000: 1}])
def test_what_is_no_patch_is_refused(store: SharedStore, patch: Any) -> None:
    """S4-41: at the call, with no seq taken."""
    pool = store.open_pool()
    with pytest.raises(Misuse):
        pool.merge("me", patch)
    assert seq_of(pool) == 0


def test_a_patch_is_copied_at_the_call(store: SharedStore, persistency: Persistency) -> None:
    """D-17: what the caller does with it afterwards doesn't matter, though it is merged later."""
    pool = store.open_pool()
    entered, may_go = threading.Event(), threading.Event()

    def hold(_tx: Transaction) -> None:
        entered.set()
        assert may_go.wait(WAIT)

    patch = {"a": {"b": 1}}
    with ThreadPoolExecutor(1) as thread:
        holding = thread.submit(lambda: persistency["shared"].run(hold).result(WAIT))
        assert entered.wait(WAIT)
        reply = pool.merge("me", patch)
        patch["a"]["b"] = 2
        patch["c"] = {}
        may_go.set()
        holding.result(WAIT)
    assert reply.result(WAIT) == 1
    assert pool.snapshot().result(WAIT) == {"a": {"b": 1}}


def test_a_pool_is_followed_like_a_collection(store: SharedStore) -> None:
    """S4-42, S4-44: its changes say who made them, what was merged, and who followed."""
    pool, told = store.open_pool(), Told()
    store.on_change(told)
    pool.subscribe("x")
    pool.subscribe("y")
    assert pool.subscribers() == ["x", "y"]
    pool.merge("x", {"a": 1}).result(WAIT)
    pool.unsubscribe("x")
    pool.merge("y", {"a": {"b": None}}).result(WAIT)
    expected = [
        SharedChange(1, "merge", None, {"a": 1}, "x", ("x", "y")),
        SharedChange(2, "merge", None, {"a": {"b": None}}, "y", ("y",)),
    ]
    assert pool.changes_since(0).result(WAIT) == expected
    assert [change.patch for change in expected] == [{"a": 1}, {"a": {"b": None}}]
    assert [told.next() for _ in expected] == [(pool, change) for change in expected]


def test_racing_patches_are_all_merged(store: SharedStore) -> None:
    """S4-40, S4-43, S4-48: eight threads with a field each lose nothing, and a client that merges the patches in the
    order of their seqs gets the same document.
    """
    pool = store.open_pool()

    def push(me: int) -> list[int]:
        name = f"c{me}"
        replies = [pool.merge(name, {"n": {name: at}, "last": name}) for at in range(100)]
        return [reply.result(WAIT) for reply in replies]

    with ThreadPoolExecutor(8) as threads:
        seqs = [seq for made in threads.map(push, range(8)) for seq in made]
    assert sorted(seqs) == list(range(1, 801))
    document = pool.snapshot().result(WAIT)
    assert document["n"] == {f"c{me}": 99 for me in range(8)}
    copy: Any = {}
    for change in pool.changes_since(0).result(WAIT):
        copy = merge_by_hand(copy, change.patch)
    assert (copy, document.seq) == (document, 800)


# -- changes ------------------------------------------------------------------------------------------------------


def test_missed_changes_can_be_asked_for(store: SharedStore) -> None:
    """S4-49, S4-50, D-15: those after a seq, in order, deletes included, and not more than wanted."""
    users = store.open()
    users.set({"id": "a", "n": 1}).result(WAIT)
    users.set({"id": "a", "n": 2}, client="me").result(WAIT)
    users.delete("a", client="you").result(WAIT)
    changes = [
        SharedChange(1, "set", "a", {"id": "a", "n": 1}, None, ()),
        SharedChange(2, "set", "a", {"id": "a", "n": 2}, "me", ()),
        SharedChange(3, "delete", "a", None, "you", ()),
    ]
    for after in range(4):
        assert users.changes_since(after).result(WAIT) == changes[after:]
        assert users.changes_since(after, 1).result(WAIT) == changes[after : after + 1]
        assert users.changes_since(after, limit=0).result(WAIT) == []
    for wrong in (-1, None, "1", True, 1.0):
        with pytest.raises(Misuse):
            users.changes_since(wrong)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(Misuse):
        users.changes_since(0, -1)


def test_changes_no_longer_kept_are_said_to_be(persistency: Persistency) -> None:
    """S4-49: the newest are kept; who is behind them, or ahead of everything, learns that a snapshot is needed."""
    with SharedStore(persistency, changes_max=3) as store:
        users, pool = store.open(), store.open_pool()
        for at in range(5):
            users.set({"id": str(at)}).result(WAIT)
            pool.merge("me", {str(at): at}).result(WAIT)
        for source in (users, pool):
            for after in (0, 1):
                with pytest.raises(FeedTruncated) as truncated:
                    source.changes_since(after).result(WAIT)
                assert truncated.value.oldest == 3
            assert [change.seq for change in source.changes_since(2).result(WAIT)] == [3, 4, 5]
            assert source.changes_since(5).result(WAIT) == []
            with pytest.raises(FeedTruncated):
                source.changes_since(6).result(WAIT)
        assert persistency["shared"].count("shared").result(WAIT) == 2 * (1 + 1 + 5 + 3)
        assert len(records_of(users)) == 5


def test_keeping_fewer_changes_takes_effect(root: Path, clock: Clock) -> None:
    """S4-49: a store that keeps fewer than the last one did removes the rest with the next change."""
    with on_disk(root, clock, changes_max=50) as store:
        users = store.open("users", "permanent")
        for at in range(20):
            users.set({"id": str(at)}).result(WAIT)
    with on_disk(root, clock, changes_max=1) as store:
        users = store.open("users", "permanent")
        assert len(users.changes_since(0).result(WAIT)) == 20
        assert users.set({"id": "x"}).result(WAIT).seq == 21
        with pytest.raises(FeedTruncated) as truncated:
            users.changes_since(19).result(WAIT)
        assert truncated.value.oldest == 21
        assert len(records_of(users)) == 21


MUTATIONS = st.lists(st.tuples(st.booleans(), st.sampled_from("abcd")), max_size=25)


def mutate(collection: Collection, mutations: list[tuple[bool, str]]) -> None:
    """Set, or delete, keys; each record differs from the one before."""
    for at, (sets, name) in enumerate(mutations):
        if sets:
            collection.set({"id": name, "at": at}).result(WAIT)
        else:
            collection.delete(name).result(WAIT)


@given(MUTATIONS, MUTATIONS)
@settings(max_examples=150, deadline=None)
def test_a_snapshot_and_later_changes_make_the_state(
    before: list[tuple[bool, str]], after: list[tuple[bool, str]]
) -> None:
    """S4-46, S4-50: whenever the snapshot was taken, and whether its own seq is used or the highest of its records."""
    with in_memory() as store:
        users = store.open()
        mutate(users, before)
        snapshot = users.snapshot().result(WAIT)
        mutate(users, after)
        for known in (snapshot.seq, max((record.seq for record in snapshot), default=0)):
            replica = Replica(snapshot)
            for change in users.changes_since(known).result(WAIT):
                replica.take(change)
            assert replica.records() == records_of(users)


@given(MUTATIONS, st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_changes_in_any_order_converge(mutations: list[tuple[bool, str]], order: random.Random) -> None:
    """S4-47, D-15: who ignores what is older than it knows of a key gets the same state, some of it twice or late."""
    with in_memory() as store:
        users = store.open()
        mutate(users, mutations)
        changes = users.changes_since(0).result(WAIT)
        assert [change.seq for change in changes] == list(range(1, len(changes) + 1))
        sent = changes + order.sample(changes, len(changes) // 2)
        order.shuffle(sent)
        replica = Replica()
        for change in sent:
            replica.take(change)
        assert replica.records() == records_of(users)


def test_seqs_are_gap_free_beside_eight_threads(store: SharedStore) -> None:
    """S4-48, S4-5: of two collections that eight threads set and delete in, each number is given once, none is left
    out, and the changes kept tell the same story as the answers.
    """
    collections = [store.open(), store.open()]
    made: list[list[tuple[int, str]]] = [[], []]

    def write(me: int) -> None:
        dice = random.Random(me)
        for _ in range(150):
            at, name = dice.randrange(2), dice.choice("abc")
            if dice.random() < 0.6:
                made[at].append((collections[at].set({"id": name, "by": me}).result(WAIT).seq, name))
            elif (seq := collections[at].delete(name).result(WAIT)) is not None:
                made[at].append((seq, name))

    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(write, me) for me in range(8)]:
            done.result(WAIT)
    for collection, answers in zip(collections, made, strict=True):
        assert sorted(seq for seq, _ in answers) == list(range(1, len(answers) + 1))
        changes = collection.changes_since(0).result(WAIT)
        assert [(change.seq, change.key) for change in changes] == sorted(answers)
        replica = Replica()
        for change in changes:
            replica.take(change)
        assert replica.records() == records_of(collection)


def test_a_follower_that_resumes_misses_nothing(store: SharedStore) -> None:
    """S4-46, S4-48: a client that takes a snapshot beside writers, and then asks for changes by pages, has it all."""
    users = store.open()
    stop = threading.Event()

    def write(me: int) -> None:
        dice = random.Random(me)
        while not stop.is_set():
            name = dice.choice("abcdef")
            (users.set({"id": name, "n": dice.random()}) if dice.random() < 0.7 else users.delete(name)).result(WAIT)

    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(write, me) for me in range(4)]
        try:
            snapshot = users.snapshot().result(WAIT)
            replica, known = Replica(snapshot), snapshot.seq
            for _ in range(100):
                for change in users.changes_since(known, 7).result(WAIT):
                    assert change.seq == known + 1
                    replica.take(change)
                    known = change.seq
        finally:
            stop.set()
        for done in writing:
            done.result(WAIT)
    for change in users.changes_since(known).result(WAIT):
        replica.take(change)
    assert replica.records() == records_of(users)


# -- event loops --------------------------------------------------------------------------------------------------


def test_all_of_it_under_an_event_loop(store: SharedStore, clock: Clock, in_loop: InLoop) -> None:
    """S4-44: what a service does: open, set, get, delete, snapshot, follow, and say goodbye to a client that went."""

    async def main() -> None:
        told = queue.SimpleQueue[tuple[Any, SharedChange]]()
        store.on_change(lambda *heard: told.put(heard))

        async def sent(changes: int) -> list[tuple[str, str, int]]:
            """Give what the next changes have the service send: to all who followed, but not to who made it."""
            heard = [await in_thread(told.get, True, WAIT) for _ in range(changes)]
            return [
                (c, source.id, change.seq) for source, change in heard for c in change.subscribers if c != change.client
            ]

        users, pool = await store.aopen("users", ttl=10), await store.aopen_pool("pool", ttl=10)
        assert await store.aopen("users") is await store.aget("users") is users
        assert await store.aopen_pool("pool") is await store.aget_pool("pool") is pool
        assert await store.aget("nothing") is await store.aget_pool("nothing") is None
        users.subscribe("x")
        users.subscribe("y")
        records = await together(*(users.set({"id": str(at)}, client="x") for at in range(50)))
        assert sorted(record.seq for record in records) == list(range(1, 51))
        store.unsubscribe_all("x")
        assert await users.delete("7") == 51
        assert await users.get("7") is None
        assert len(await users.snapshot()) == 49
        assert [change.seq for change in await users.changes_since(48)] == [49, 50, 51]
        assert await pool.merge("y", {"a": 1}) == 1
        assert await pool.snapshot() == {"a": 1}
        assert await sent(52) == [("y", "users", seq) for seq in range(1, 52)]
        clock.now += 10
        with pytest.raises(Closed):
            await users.set({"id": "late"})
        assert await store.apurge_expired() == 2
        assert await sent(2) == [("y", "users", 0)]
        assert (await (await store.aopen("users")).snapshot()).seq == 0

    in_loop(main)


def test_opening_does_not_block_the_event_loop(persistency: Persistency, in_loop: InLoop) -> None:
    """S4-24: while the job is busy other tasks go on."""
    entered, may_go = threading.Event(), threading.Event()

    def hold(_tx: Transaction) -> None:
        entered.set()
        assert may_go.wait(WAIT)

    async def main(store: SharedStore) -> None:
        async with anyio.create_task_group() as group:
            opening = Task(group, store.aopen("users"))
            opening_pool = Task(group, store.aopen_pool("pool"))
            await turns(100)
            assert opening.begun
            assert opening_pool.begun
            assert not opening.done
            assert not opening_pool.done
            may_go.set()
            users, pool = await opening, await opening_pool
        assert (users.id, pool.id) == ("users", "pool")

    job = persistency.open_job("shared")
    with ThreadPoolExecutor(1) as thread, SharedStore(persistency) as store:
        holding = thread.submit(lambda: job.run(hold).result(WAIT))
        assert entered.wait(WAIT)
        in_loop(bounded, main, store)
        holding.result(WAIT)


# -- hostile rows -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "junk", [b"", b"\xff", encode(1), encode([]), encode(["set", 1, None, None]), encode([1, 2, 3])]
)
def test_rows_of_somebody_else_are_corrupt(store: SharedStore, persistency: Persistency, junk: bytes) -> None:
    """S4-8: what a shared store hasn't written is told as such, wherever it stands."""
    users, pool = store.open("users"), store.open_pool("pool")
    users.set({"id": "a"}).result(WAIT)
    pool.merge("me", {"a": {"b": 1}}).result(WAIT)
    job = persistency["shared"]

    def spoil(category: str, *parts: Any) -> None:
        job.put(category, key(*parts), junk)

    spoil("shared", 1, 2, "a")
    spoil("shared", 2, 2, "a")
    spoil("shared", 1, 3, 1)
    for ask in (
        lambda: users.get("a"),
        users.snapshot,
        lambda: users.changes_since(0),
        lambda: pool.merge("me", {"a": {"c": 2}}),
        pool.snapshot,
    ):
        with pytest.raises(Corrupt):
            ask().result(WAIT)
    assert seq_of_pool_is(pool, 1)
    if junk != encode(1):
        spoil("shared", 1, 1)
        with pytest.raises(Corrupt):
            users.set({"id": "b"}).result(WAIT)
    spoil("shared.ids", "collection", "users")
    spoil("shared.ends", 1, 1)
    for call in (lambda: store.open("users"), lambda: store.get("users"), store.purge_expired):
        with pytest.raises(Corrupt):
            call()


def seq_of_pool_is(pool: MergePool, seq: int) -> bool:
    """Say whether a pool whose document can't be read is at a seq."""
    return pool.merge("me", {}).result(WAIT) == seq


def test_snapshots_can_be_copied() -> None:
    """S4-9: as the list and the dict that they are."""
    import pickle

    snapshot, document = Snapshot([Record("a", {"id": "a"}, 1, START, ("x",))], 3), Document({"a": 1}, 4)
    for original in (snapshot, document):
        copy = pickle.loads(pickle.dumps(original))
        assert (type(copy), copy, copy.seq) == (type(original), original, original.seq)


def test_a_dropped_failure_beside_a_listener_is_logged(store: SharedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """S4-19: with a listener, a change that fails is logged, whether or not anybody looks at its reply."""
    users = store.open()
    store.on_change(Told())
    monkeypatch.setattr(Collection, "_last_seq", lambda *_: 1 / 0)
    with logged() as messages:
        users.set({"id": "a"})
        assert "a change failed: division by zero" in messages.get(timeout=WAIT)
