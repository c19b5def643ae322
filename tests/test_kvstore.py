"""KVStore: text keys, TTLs, prefixes and a quota, over both adapters, with a clock that the tests move.

Each test names the statements it covers. Where the view is deliberately not as the reference system, the test says so.
"""

from __future__ import annotations

import enum
import sqlite3
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from queue import SimpleQueue
from random import Random
from typing import Any

import apsw
import pytest

from persistency import (
    Closed,
    Corrupt,
    Failure,
    Job,
    Misuse,
    Persistency,
    PersistencyError,
    Put,
    QuotaExceeded,
    Reply,
    Transaction,
    Unavailable,
    WriteFailed,
    key,
)
from persistency.actor.mailbox import Mailbox
from persistency.kvstore import CATEGORY, TEXT_BYTES_MAX, KVStore
from persistency.storage.sqlite import SqliteStore
from tests.loops import InLoop, together

WAIT = 20.0  # seconds a test waits for what must come

Make = Callable[..., KVStore]


class Clock:
    """The time, moved by hand, to the millisecond."""

    def __init__(self) -> None:
        self.ms = 1_700_000_000_000

    def __call__(self) -> float:
        return (self.ms + 0.5) / 1000  # so that no rounding of floats takes a millisecond away

    def forward(self, seconds: float) -> None:
        """Let so much time pass."""
        self.ms += round(seconds * 1000)


@pytest.fixture
def clock() -> Clock:
    """Give a clock that stands still."""
    return Clock()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Name a root that doesn't exist yet."""
    return tmp_path / "root"


@pytest.fixture(params=["memory", "directory"])
def make(request: pytest.FixtureRequest, root: Path, clock: Clock) -> Iterator[Make]:
    """Give a function that opens the store of a plugin, over either adapter."""
    with Persistency(":memory:" if request.param == "memory" else root, clock=clock) as persistency:
        yield lambda plugin="plugin", **options: KVStore(persistency.open_job(plugin, **options))


@pytest.fixture
def store(make: Make) -> KVStore:
    """Give an empty store without a quota, over either adapter."""
    return make()


@pytest.fixture
def persistency(root: Path, clock: Clock) -> Iterator[Persistency]:
    """Give a root on a directory."""
    with Persistency(root, clock=clock) as opened:
        yield opened


@pytest.fixture
def reaped(monkeypatch: pytest.MonkeyPatch) -> SimpleQueue[int]:
    """Give a queue that is told how many rows each cleanup of a file has taken away."""
    counts: SimpleQueue[int] = SimpleQueue()
    reap = SqliteStore.reap

    def telling(self: SqliteStore, now_ms: int, limit: int) -> int:
        count = reap(self, now_ms, limit)
        counts.put(count)
        return count

    monkeypatch.setattr(SqliteStore, "reap", telling)
    return counts


@pytest.fixture
def no_cleanup(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Let every cleanup of a file fail, so that what has ended stays there unless a verb removes it."""

    def refuse(self: SqliteStore, now_ms: int, limit: int) -> int:
        raise Unavailable("no cleanup in this test")

    monkeypatch.setattr(SqliteStore, "reap", refuse)
    return monkeypatch


def look(path: Path | None, sql: str = "SELECT key FROM kv") -> list[Any]:
    """Ask a file something with the standard library; only ever one that no job of this process has open."""
    assert path is not None
    connection = sqlite3.connect(path)
    rows = connection.execute(sql).fetchall()
    connection.close()
    return rows


def fill(store: KVStore, *texts: str, value: bytes = b"x") -> None:
    """Set these keys."""
    for text in texts:
        store.set(text, value).result(WAIT)


def used_and_counted(tx: Transaction) -> tuple[int, int]:
    """Return what the accounts say is used, and what is: to be run inside a job, where nothing comes between."""
    return tx.storage_used(), sum(len(row.payload) for row in tx.scan(CATEGORY))


# -- opening ------------------------------------------------------------------------------------------------------


def test_each_plugin_has_a_store_of_its_own(make: Make) -> None:
    """S0-2: the same key in two plugins is two values, and each has a quota of its own."""
    stores = [make(plugin, max_bytes=10) for plugin in ("a", "b")]
    for store, value in zip(stores, (b"of a", b"and of b"), strict=True):
        store.set("same", value).result(WAIT)
    assert [store.get("same").result(WAIT) for store in stores] == [b"of a", b"and of b"]
    assert [store.storage_used().result(WAIT) for store in stores] == [4, 8]
    assert stores[0].delete_by_prefix("s").result(WAIT) == 1
    assert stores[1].get("same").result(WAIT) == b"and of b"


def test_each_plugin_has_a_file_of_its_own(persistency: Persistency, root: Path) -> None:
    """S0-1: a job per plugin, a file per job; making the view writes nothing."""
    stores = [KVStore(persistency.open_job(plugin)) for plugin in ("plugin-a", "plugin-b")]
    assert [store.job.version().result(WAIT) for store in stores] == [0, 0]
    stores[0].set("k", b"x").result(WAIT)
    persistency.close(WAIT)
    assert sorted(path.name for path in root.glob("*.db")) == ["plugin-a.db", "plugin-b.db"]
    assert [len(look(root / f"plugin-{name}.db")) for name in "ab"] == [1, 0]


def test_data_and_size_survive_a_restart(persistency: Persistency) -> None:
    """S0-5: values, ends and what is used are there again, and the quota goes on from there."""
    store = KVStore(persistency.open_job("a", max_bytes=20))
    store.set("k", b"12345").result(WAIT)
    store.set_with_ttl("ends", b"1234567", 60).result(WAIT)
    store.job.close(WAIT)
    store = KVStore(persistency.open_job("a", max_bytes=20))
    assert store.storage_used().result(WAIT) == 12
    assert store.get_many(["k", "ends"]).result(WAIT) == {"k": b"12345", "ends": b"1234567"}
    with pytest.raises(QuotaExceeded, match="21 of 20"):
        store.set("more", b"123456789").result(WAIT)


def test_a_size_survives_an_opening_without_a_quota(persistency: Persistency) -> None:
    """S0-5: what was written while nobody counted is counted when a quota is wanted again."""
    for max_bytes, expected in [(20, 5), (None, 10), (20, 15), (30, 20)]:
        store = KVStore(persistency.open_job("a", max_bytes=max_bytes))
        store.set(str(expected), b"12345").result(WAIT)
        assert store.storage_used().result(WAIT) == expected
        store.job.close(WAIT)


def test_values_from_before_there_were_ttls_are_permanent(root: Path, clock: Clock) -> None:
    """S0-14: an old file is migrated in place; its rows never end, and they count."""
    root.mkdir()
    connection = sqlite3.connect(root / "a.db")
    connection.execute(
        "CREATE TABLE kv (category BLOB NOT NULL, key BLOB NOT NULL, payload BLOB NOT NULL, "
        "PRIMARY KEY (category, key)) WITHOUT ROWID"
    )
    rows = [(b"kv", bytes(key(text)), text.encode()) for text in ("one", "three")]
    connection.executemany("INSERT INTO kv VALUES (?, ?, ?)", rows)
    connection.execute("PRAGMA user_version = 1")
    connection.commit()
    connection.close()
    clock.ms *= 3
    with Persistency(root, clock=clock) as persistency:
        store = KVStore(persistency.open_job("a", max_bytes=10))
        assert store.list().result(WAIT) == ["one", "three"]
        assert store.get("three").result(WAIT) == b"three"
        assert store.storage_used().result(WAIT) == 8


def test_what_is_no_job_is_refused(store: KVStore) -> None:
    """A store is made of a job and, if need be, a category's name."""
    for job in (None, "plugin", store):
        with pytest.raises(Misuse, match="job"):
            KVStore(job)  # type: ignore[arg-type]
    for category in ("", "x" * 256, "\ud800", None):
        with pytest.raises(Misuse, match="category"):
            KVStore(store.job, category=category)  # type: ignore[arg-type]
    assert "kv" in repr(store)
    assert "plugin" in repr(store)


def test_two_stores_may_share_a_job(store: KVStore) -> None:
    """With a category each, two stores have keys of their own; what is used, as the quota, is the job's."""
    other = KVStore(store.job, category="other")
    store.set("k", b"1").result(WAIT)
    assert (other.has("k").result(WAIT), other.list().result(WAIT), other.delete("k").result(WAIT)) == (
        False,
        [],
        False,
    )
    other.set("k", b"22").result(WAIT)
    other.set_with_ttl("kk", b"333", 60).result(WAIT)
    assert (store.get("k").result(WAIT), other.get("k").result(WAIT)) == (b"1", b"22")
    assert (store.list().result(WAIT), other.list().result(WAIT)) == (["k"], ["k", "kk"])
    assert store.get_many(["k", "kk"]).result(WAIT) == {"k": b"1"}
    assert store.storage_used().result(WAIT) == other.storage_used().result(WAIT) == 6
    assert other.delete_by_prefix("k").result(WAIT) == 2
    assert store.list().result(WAIT) == ["k"]
    assert store.job.categories().result(WAIT) == ["kv"]


def test_rows_are_plain_rows_of_the_job(store: KVStore) -> None:
    """The job's own verbs see a store's rows, under keys of one text."""
    store.set("k", b"1").result(WAIT)
    assert store.job.get(CATEGORY, key("k")).result(WAIT) == b"1"
    store.job.put(CATEGORY, ("posted",), b"2")
    assert store.get("posted").result(WAIT) == b"2"


@pytest.mark.parametrize("foreign", [("a", 1), ("a", "b"), ("", "")])
def test_a_key_of_somebody_else_is_corrupt(foreign: tuple[Any, ...], store: KVStore) -> None:
    """A key that the store can't have written isn't given for one of its own; it says which it is."""
    fill(store, "b")
    store.job.put(CATEGORY, foreign, b"x")
    with pytest.raises(Corrupt, match="'kv'") as caught:
        store.list().result(WAIT)
    assert repr(key(*foreign)) in str(caught.value)
    assert "category" in caught.value.hint
    assert store.list("b").result(WAIT) == ["b"]


# -- set, get, has, delete ------------------------------------------------------------------------------------------


def test_set_and_get(store: KVStore) -> None:
    """S0-15, S0-16, S0-17: what was set is got; a missing key is `None`, no error; setting again overwrites."""
    assert store.get("k").result(WAIT) is None
    assert store.set("k", b"first").result(WAIT) is None
    assert store.get("k").result(WAIT) == b"first"
    store.set("k", b"second").result(WAIT)
    assert store.get("k").result(WAIT) == b"second"
    assert store.list().result(WAIT) == ["k"]


def test_a_value_newly_set_has_a_new_version(store: KVStore) -> None:
    """S0-18: no times of writing are kept; what tells a new value from an old one is its version."""
    versions = []
    for _ in range(3):
        store.set("k", b"same").result(WAIT)
        entry = store.job.entry(CATEGORY, ("k",)).result(WAIT)
        assert entry is not None
        versions.append(entry.version)
    assert versions == sorted(set(versions))


def test_values_are_any_bytes(store: KVStore) -> None:
    """S0-19: NUL, 0xFF, every byte and none at all come back as they were."""
    values = [b"", b"\0", b"\xff", b"\0\xff\0", bytes(range(256)), b"x" * 1_000_000]
    for at, value in enumerate(values):
        store.set(f"k{at}", value).result(WAIT)
    assert [store.get(f"k{at}").result(WAIT) for at in range(len(values))] == values


def test_values_are_copied_at_the_call(store: KVStore) -> None:
    """Any bytes-like object is a value, as it was when it was passed."""
    value = bytearray(b"before")
    replies = [store.set("a", value), store.set_with_ttl("b", memoryview(value), 60)]
    value[:] = b"after."
    for reply in replies:
        reply.result(WAIT)
    assert store.get_many(["a", "b"]).result(WAIT) == {"a": b"before", "b": b"before"}


@pytest.mark.parametrize("value", ["text", None, 5, ["list"]])
def test_what_is_no_bytes_is_refused(value: Any, store: KVStore) -> None:
    """A value that isn't bytes-like is `Misuse` at the call, by the name it has here."""
    with pytest.raises(Misuse, match="value must be bytes-like"):
        store.set("k", value)
    with pytest.raises(Misuse, match="value must be bytes-like"):
        store.set_with_ttl("k", value, 60)
    assert store.job.version().result(WAIT) == 0


VERBS: dict[str, Callable[[KVStore, Any], Reply[Any]]] = {
    "set": lambda store, text: store.set(text, b"x"),
    "set_with_ttl": lambda store, text: store.set_with_ttl(text, b"x", 60),
    "get": lambda store, text: store.get(text),
    "get_many": lambda store, text: store.get_many(["fine", text]),
    "has": lambda store, text: store.has(text),
    "delete": lambda store, text: store.delete(text),
    "list": lambda store, text: store.list(text),
    "list after": lambda store, text: store.list(after=text),
    "delete_by_prefix": lambda store, text: store.delete_by_prefix(text),
}
ANY_TEXT_OR_NONE = ("list", "list after")  # the empty prefix is everything, and no `after` the beginning


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "list"])
def test_a_key_has_at_least_one_byte(verb: str, store: KVStore) -> None:
    """S0-20, S0-22, S0-61: an empty key, or prefix to delete, is refused at the call by every verb alike."""
    with pytest.raises(Misuse, match="cannot be empty"):
        VERBS[verb](store, "")
    assert store.job.version().result(WAIT) == 0


@pytest.mark.parametrize("verb", VERBS)
def test_a_key_has_at_most_256_bytes(verb: str, store: KVStore) -> None:
    """S0-21, S0-22: 256 bytes of UTF-8 are a key, 257 are none, whatever the number of characters; in every verb."""
    assert TEXT_BYTES_MAX == 256
    for good in ("x" * 256, "ü" * 128, "\0" * 256, "\U0001f600" * 64, "\n"):
        VERBS[verb](store, good).result(WAIT)
    before = store.job.version().result(WAIT)
    for bad in ("x" * 257, "x" * 300, "ü" * 128 + "x", "\U0001f600" * 65, "x" * 100_000):
        with pytest.raises(Misuse, match="exceeds the maximum length of 256 bytes"):
            VERBS[verb](store, bad)
    assert store.job.version().result(WAIT) == before


@pytest.mark.parametrize("verb", VERBS)
def test_a_key_is_text_that_utf_8_can_hold(verb: str, store: KVStore) -> None:
    """S0-22, S0-23: lone surrogates, and what isn't text, are refused at the call by every verb alike."""
    for surrogates in ("\ud800", "a\udfffb"):
        with pytest.raises(Misuse, match="surrogate"):
            VERBS[verb](store, surrogates)
    for bad in (b"k", 5, ("k",), key("k"), ["k"], None if verb not in ANY_TEXT_OR_NONE else 1.5):
        with pytest.raises(Misuse, match="must be a str"):
            VERBS[verb](store, bad)
    assert store.job.version().result(WAIT) == 0


def test_a_longest_key_is_stored_and_listed(store: KVStore) -> None:
    """S0-21: keys of 256 bytes are kept whole, also those whose encoding takes twice as many."""
    keys = sorted(["x" * 256, "\0" * 256, "ü" * 128, "x" * 255])
    fill(store, *keys)
    assert store.list().result(WAIT) == keys
    assert store.list("x" * 256).result(WAIT) == ["x" * 256]
    assert store.delete_by_prefix("\0" * 255).result(WAIT) == 1


class Setting(enum.StrEnum):
    """Names of settings, as a program may have them."""

    COLOUR = "colour"


def test_a_kind_of_text_is_the_text(store: KVStore) -> None:
    """Members of a `StrEnum` are keys and prefixes; what comes back is plain text."""
    fill(store, Setting.COLOUR)
    assert store.get("colour").result(WAIT) == store.get(Setting.COLOUR).result(WAIT) == b"x"
    [text] = store.get_many([Setting.COLOUR]).result(WAIT)
    assert (text, type(text)) == ("colour", str)
    assert store.list(Setting.COLOUR).result(WAIT) == ["colour"]


def test_has(store: KVStore) -> None:
    """S0-24: true for a key that is there, also with an empty value; false for one that isn't, or is longer."""
    fill(store, "k", value=b"")
    assert store.has("k").result(WAIT) is True
    assert [store.has(text).result(WAIT) for text in ("K", "k ", "kk", "k\0")] == [False] * 4


def test_delete(store: KVStore) -> None:
    """S0-25, S0-26: a deleted key is gone, and no other; deleting a missing one is no error. It says which it was."""
    fill(store, "k", "kk")
    assert store.delete("k").result(WAIT) is True
    assert store.get("k").result(WAIT) is None
    assert store.delete("k").result(WAIT) is False
    assert store.delete("never").result(WAIT) is False
    assert store.list().result(WAIT) == ["kk"]


def test_delete_removes_what_has_ended(persistency: Persistency, clock: Clock, no_cleanup: pytest.MonkeyPatch) -> None:
    """S0-27: a row that has ended and lies there still is removed from the file too, though it wasn't there."""
    store = KVStore(persistency.open_job("a"))
    for text in ("k", "other"):
        store.set_with_ttl(text, b"x", 1).result(WAIT)
    clock.forward(2)
    assert store.delete("k").result(WAIT) is False
    store.job.close(WAIT)
    assert look(store.job.path) == [(bytes(key("other")),)]


def test_a_failure_nobody_looks_at_is_told(persistency: Persistency) -> None:
    """Who drops the reply of a `set` that fails isn't told, but the owner of the job is."""
    told: SimpleQueue[Failure] = SimpleQueue()
    job = persistency.open_job("a", max_bytes=1, on_error=lambda _job_id, failures: told.put(failures[0]))
    KVStore(job).set("k", b"too much")
    failure = told.get(timeout=WAIT)
    assert isinstance(failure.error, QuotaExceeded)
    assert failure.op == Put(CATEGORY, key("k"), b"too much")


# -- time -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ttl", [10, 10.0, timedelta(seconds=10)])
def test_a_value_lives_as_long_as_it_was_told(ttl: Any, store: KVStore, clock: Clock) -> None:
    """S0-28, S0-31, S0-35, S0-39: there until `now < expires` no longer holds, to the millisecond; then not."""
    assert store.set_with_ttl("k", b"x", ttl).result(WAIT) is None
    for _ in range(2):
        assert store.get("k").result(WAIT) == b"x"
        clock.forward(4.9995)
    clock.ms += 10_000 - 1 - (clock.ms - 1_700_000_000_000)
    assert store.get("k").result(WAIT) == b"x"
    clock.ms += 1
    assert store.get("k").result(WAIT) is None


def test_nothing_that_has_ended_is_seen(store: KVStore, clock: Clock) -> None:
    """S0-31, S0-32, S0-33, S0-34: get, has, list, get_many and delete agree on what is there."""
    fill(store, "a:stays")
    store.set_with_ttl("a:ends", b"x", 1).result(WAIT)
    store.set_with_ttl("a:later", b"x", 2).result(WAIT)
    for ended in ([], ["a:ends"], ["a:ends", "a:later"]):
        live = sorted({"a:stays", "a:ends", "a:later"} - set(ended))
        assert store.list().result(WAIT) == store.list("a:").result(WAIT) == live
        assert list(store.get_many(["a:ends", "a:later", "a:stays"]).result(WAIT)) == live
        for text in live:
            assert store.has(text).result(WAIT) is True
        for text in ended:
            assert store.has(text).result(WAIT) is False
            assert store.get(text).result(WAIT) is None
        clock.forward(1)
    assert store.delete("a:ends").result(WAIT) is False


@pytest.mark.parametrize(
    "ttl",
    [0, -5, 0.0, -0.001, float("nan"), float("-inf"), timedelta(0), timedelta(seconds=-1), None, "1", True, b"1"],
)
def test_a_ttl_is_more_than_nothing(ttl: Any, store: KVStore) -> None:
    """S0-29: zero, less, and what is no time at all are refused at the call; nothing is stored."""
    with pytest.raises(Misuse, match="ttl"):
        store.set_with_ttl("k", b"x", ttl)
    assert store.job.version().result(WAIT) == 0


@pytest.mark.parametrize("ttl", [300_000_000_000, 2**63 - 1, 2**200, 1e300, float("inf"), timedelta.max])
def test_a_giant_ttl_is_refused(ttl: Any, store: KVStore) -> None:
    """S0-41, D-10: a TTL beyond all use is `Misuse`, and makes no key permanent."""
    with pytest.raises(Misuse, match="ttl"):
        store.set_with_ttl("k", b"x", ttl)
    assert store.has("k").result(WAIT) is False


def test_the_longest_ttl_ends(store: KVStore, clock: Clock) -> None:
    """S0-41, D-10: what is just allowed, some 317 years, is kept exactly."""
    store.set_with_ttl("k", b"x", 10_000_000_000).result(WAIT)
    clock.ms += 10_000_000_000_000 - 1
    assert store.has("k").result(WAIT) is True
    clock.ms += 1
    assert store.has("k").result(WAIT) is False


@pytest.mark.parametrize("offset_ms", [0, 1, 499, 500, 999])
def test_no_value_is_born_dead(offset_ms: int, store: KVStore, clock: Clock) -> None:
    """S0-30, D-11: a second is a second wherever in a second it begins, and a few milliseconds are that many."""
    clock.ms += offset_ms
    for ttl_ms in (1000, 3, 1):
        store.set_with_ttl("k", b"x", ttl_ms / 1000).result(WAIT)
        clock.ms += ttl_ms - 1
        assert store.get("k").result(WAIT) == b"x"
        clock.ms += 1
        assert store.get("k").result(WAIT) is None


@pytest.mark.parametrize("ended", [False, True])
def test_set_clears_a_ttl(ended: bool, store: KVStore, clock: Clock) -> None:
    """S0-36: a plain set makes a key permanent, whether the one before it has ended by then or not."""
    store.set_with_ttl("k", b"old", 10).result(WAIT)
    clock.forward(11 if ended else 5)
    assert store.has("k").result(WAIT) is not ended
    store.set("k", b"new").result(WAIT)
    clock.forward(1_000_000)
    assert store.get("k").result(WAIT) == b"new"
    entry = store.job.entry(CATEGORY, ("k",)).result(WAIT)
    assert entry is not None
    assert entry.expires_ms is None


@pytest.mark.parametrize("ended", [False, True])
def test_set_with_ttl_replaces_value_and_ttl(ended: bool, store: KVStore, clock: Clock) -> None:
    """S0-37: the new value and its end count, shorter or longer than before; a key that has ended is there again."""
    store.set_with_ttl("k", b"old", 10).result(WAIT)
    clock.forward(11 if ended else 5)
    store.set_with_ttl("k", b"new", 100).result(WAIT)
    clock.forward(99)
    assert store.get("k").result(WAIT) == b"new"
    store.set_with_ttl("k", b"brief", 0.5).result(WAIT)
    assert store.get("k").result(WAIT) == b"brief"
    clock.forward(0.5)
    assert store.get("k").result(WAIT) is None
    store.set("permanent", b"x").result(WAIT)
    store.set_with_ttl("permanent", b"x", 1).result(WAIT)
    clock.forward(1)
    assert store.list().result(WAIT) == []


def test_a_ttl_survives_reopening_and_a_clock_put_back(persistency: Persistency, clock: Clock) -> None:
    """S0-40: a second after it was set it is gone, after a restart too, and for good: no clock brings it back."""
    store = KVStore(persistency.open_job("a"))
    store.set_with_ttl("k", b"x", 1).result(WAIT)
    store.job.close(WAIT)
    store = KVStore(persistency.open_job("a"))
    assert store.get("k").result(WAIT) == b"x"
    clock.forward(3)
    assert store.get("k").result(WAIT) is None
    clock.forward(-3)
    assert store.get("k").result(WAIT) is None
    store.job.close(WAIT)
    assert KVStore(persistency.open_job("a")).get("k").result(WAIT) is None


def test_cleanup_takes_rows_from_the_file(
    persistency: Persistency, clock: Clock, no_cleanup: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """S0-42, S0-43: what has ended stays in the file until the cleanup, which deletes it; the rest stays."""
    store = KVStore(persistency.open_job("a", max_bytes=100))
    fill(store, "stays")
    for text in ("ends-1", "ends-2"):
        store.set_with_ttl(text, b"x", 1).result(WAIT)
    store.set_with_ttl("later", b"x", 100).result(WAIT)
    clock.forward(2)
    assert store.list().result(WAIT) == ["later", "stays"]
    store.job.close(WAIT)
    assert len(look(store.job.path)) == 4
    no_cleanup.undo()
    reaped: SimpleQueue[int] = request.getfixturevalue("reaped")
    store = KVStore(persistency.open_job("a", max_bytes=100))
    store.set("ring", b"").result(WAIT)
    assert reaped.get(timeout=WAIT) == 2
    assert store.storage_used().result(WAIT) == 2
    store.job.close(WAIT)
    assert look(store.job.path) == [(bytes(key(text)),) for text in ("later", "ring", "stays")]


def test_an_idle_job_cleans_up_by_itself(root: Path, reaped: SimpleQueue[int]) -> None:
    """S0-44: nobody has to call, and nothing is woken by the hour: the job's own worker wakes for the next end."""
    with Persistency(root) as persistency:
        before = set(threading.enumerate())
        store = KVStore(persistency.open_job("a"))
        store.set_with_ttl("k", b"x", 0.05).result(WAIT)
        assert reaped.get(timeout=WAIT) == 1
        assert [thread.name for thread in threading.enumerate() if thread not in before] == ["persistency:a"]
        store.job.close(WAIT)
    assert look(store.job.path) == []


def test_a_close_waits_for_a_slice_of_cleanup_and_no_more(
    persistency: Persistency, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0-45, S0-46: a close in the middle of a cleanup comes after the slice in hand, and begins no other."""
    inside, may_go, closing = threading.Event(), threading.Event(), threading.Event()
    reap, close_mailbox = SqliteStore.reap, Mailbox.close

    def held_up(self: SqliteStore, now_ms: int, limit: int) -> int:
        inside.set()
        assert may_go.wait(WAIT)
        return reap(self, now_ms, limit)

    def telling(self: Mailbox, refusal: Callable[[], PersistencyError]) -> None:
        close_mailbox(self, refusal)
        closing.set()

    monkeypatch.setattr(SqliteStore, "reap", held_up)
    monkeypatch.setattr(Mailbox, "close", telling)
    store = KVStore(persistency.open_job("a"))
    store.job.commit([Put(CATEGORY, (f"ends-{number}",), b"x", 1) for number in range(3_000)]).result(WAIT)
    clock.forward(2)
    store.set("stays", b"").result(WAIT)
    assert inside.wait(WAIT)
    with ThreadPoolExecutor(1) as pool:
        closed = pool.submit(store.job.close, WAIT)
        try:
            assert closing.wait(WAIT)
            assert not closed.done()
        finally:
            may_go.set()
        closed.result(WAIT)
    assert len(look(store.job.path)) == 2_001


def test_closing_never_races_the_cleanup(
    persistency: Persistency, clock: Clock, reaped: SimpleQueue[int], caplog: pytest.LogCaptureFixture
) -> None:
    """S0-46: whenever a close comes, before, between or behind slices, the file is sound and nothing is said."""
    slices = []
    for number in range(12):
        store = KVStore(persistency.open_job(f"job-{number}", max_bytes=10_000))
        puts = [Put(CATEGORY, (f"ends-{at}",), b"x", 1) for at in range(3_000)]
        store.job.commit([*puts, Put(CATEGORY, ("stays",), b"yes")]).result(WAIT)
        clock.forward(2)
        store.set("ring", b"").result(WAIT)
        slices += [reaped.get(timeout=WAIT) for _ in range(number % 4)]
        store.job.close(WAIT)
        assert look(store.job.path, "PRAGMA integrity_check") == [("ok",)]
        store = KVStore(persistency.open_job(f"job-{number}", max_bytes=10_000))
        assert store.list().result(WAIT) == ["ring", "stays"]
        assert store.storage_used().result(WAIT) == 3
        store.job.close(WAIT)
        while not reaped.empty():  # no job is open that could go on
            reaped.get_nowait()
    assert slices == [1_000] * 18
    assert caplog.records == []


def test_a_closed_store_refuses_everything(make: Make) -> None:
    """S0-47, S0-48: every verb of a closed job is `Closed` at the call; closing again is nothing."""
    store = make()
    fill(store, "k")
    store.job.close(WAIT)
    store.job.close(WAIT)
    for verb in VERBS.values():
        with pytest.raises(Closed):
            verb(store, "k")
    with pytest.raises(Closed):
        store.storage_used()
    with pytest.raises(Misuse):
        store.get("")


# -- list -------------------------------------------------------------------------------------------------------------

USERS = ("user:1:name", "user:1:email", "user:2:name", "other")


def test_list(store: KVStore) -> None:
    """S0-49, S0-50, S0-51, S0-52: all keys, those of a prefix, of one that ends in the middle, and of none."""
    assert store.list().result(WAIT) == []
    fill(store, *USERS)
    assert store.list().result(WAIT) == store.list("").result(WAIT) == sorted(USERS)
    assert store.list("user:1:").result(WAIT) == ["user:1:email", "user:1:name"]
    for prefix in ("user:", "user", "u"):
        assert store.list(prefix).result(WAIT) == sorted(USERS[:3])
    for prefix in ("user:3", "user:1:names", "t", "ser"):
        assert store.list(prefix).result(WAIT) == []


def test_nothing_in_a_prefix_is_a_wildcard(store: KVStore) -> None:
    """S0-53, S0-54, S0-58, D-8: `%`, `_`, a backslash and what other tools match by are letters like any other."""
    odd = ["%", "_", "\\", "dir\\", "dir\\file", "dir%", "dir_", "dirX", *"\"'*?^", "[a]", "\0", "a\0", "a"]
    fill(store, *odd)
    for prefix in odd:
        assert store.list(prefix).result(WAIT) == sorted(text for text in odd if text.startswith(prefix))
    assert store.list("dir\\").result(WAIT) == ["dir\\", "dir\\file"]
    assert store.list("%").result(WAIT) == ["%"]
    assert store.list("di_").result(WAIT) == []


def test_letters_are_what_they_are(store: KVStore) -> None:
    """S0-57, D-7: case tells, in ASCII and beyond, and one way to write a letter isn't another."""
    texts = ["user:1", "USER:2", "User:3", "é", "e\u0301", "É", "ß", "SS", "ı", "I", "i", "İ", "K", "\u212a"]
    fill(store, *texts)
    assert store.list("user:").result(WAIT) == ["user:1"]
    assert store.list("USER:").result(WAIT) == ["USER:2"]
    for text in texts:
        assert text in store.list(text).result(WAIT)
        assert store.list(text).result(WAIT) == sorted(other for other in texts if other.startswith(text))


def test_keys_are_sorted_by_their_utf_8(store: KVStore) -> None:
    """S0-55: the order is that of bytes, so upper case comes first and a key before those it begins."""
    texts = ["b", "a", "B", "aa", "a\0", "a ", "~", "\x7f", "\x80", "é", "日", "\uffff", "\U0001f600", "Z", "10", "9"]
    fill(store, *texts)
    assert store.list().result(WAIT) == sorted(texts, key=lambda text: text.encode())


def test_a_long_list_is_asked_for_in_pages(store: KVStore) -> None:
    """S0-56: with `limit` and `after` any number of keys is walked, each once, whatever is written meanwhile."""
    texts = sorted(f"k{number}" for number in range(1_000))
    store.job.commit([Put(CATEGORY, (text,), b"x") for text in [*texts, "j", "l"]]).result(WAIT)
    seen: list[str] = []
    after = None
    while page := store.list("k", limit=64, after=after).result(WAIT):
        assert len(page) == 64 or len(seen) + len(page) == 1_000
        seen += page
        after = page[-1]
        store.delete(after).result(WAIT)  # what is behind needn't be there any more
        store.set("k0 behind", b"x").result(WAIT)
    assert [text for text in seen if text != "k0 behind"] == texts
    assert store.list(limit=1).result(WAIT) == ["j"]
    assert store.list("k", limit=0).result(WAIT) == []


def test_after_is_exact(store: KVStore) -> None:
    """S0-56: `after` leaves out that key and those before it, and nothing else, also outside of the prefix."""
    texts = ["a", "a\0", "a\0\0", "ab", "b", "b\0", "ba", "c"]
    fill(store, *texts)
    for after in [*texts, "0", "aa", "b" * 9, "z", "\U0010ffff"]:
        assert store.list(after=after).result(WAIT) == [text for text in texts if text > after]
        in_b = [text for text in texts if text > after and text.startswith("b")]
        assert store.list("b", after=after).result(WAIT) == in_b
        assert store.list("b", after=after, limit=1).result(WAIT) == in_b[:1]
    for limit in (-1, 1.5, "1", True):
        with pytest.raises(Misuse, match="limit"):
            store.list(limit=limit)  # type: ignore[arg-type]


class Ran:
    """What SQLite has run: the statements begun, and the steps of those that are done, full scans by their text."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Count anew."""
        self.begun: list[str] = []
        self.steps: list[int] = []
        self.scans: list[str] = []

    def watch(self, connection: apsw.Connection) -> None:
        """Take down what a connection runs."""
        connection.trace_v2(apsw.SQLITE_TRACE_STMT | apsw.SQLITE_TRACE_PROFILE, self._note)

    def _note(self, event: dict[str, Any]) -> None:
        if event["code"] == apsw.SQLITE_TRACE_STMT:
            self.begun.append(event["sql"])
            return
        self.steps.append(event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"])
        if event["stmt_status"]["SQLITE_STMTSTATUS_FULLSCAN_STEP"]:
            self.scans.append(event["sql"])


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Give what SQLite runs for the jobs that are opened from now on."""
    ran = Ran()
    monkeypatch.setattr(apsw, "connection_hooks", [*apsw.connection_hooks, ran.watch])
    return ran


@pytest.mark.parametrize("ttl", [None, 60])
def test_a_prefix_is_searched_not_scanned(ttl: Any, persistency: Persistency, ran: Ran) -> None:
    """S0-59: listing and deleting three keys takes as many steps among 20,000 as among 20, with a TTL and without."""
    taken = {}
    for others in (20, 20_000):
        store = KVStore(persistency.open_job(str(others)))
        names = [f"{'z' if number % 2 else 'a'}{number}" for number in range(others)]
        store.job.commit([Put(CATEGORY, (name,), b"x", ttl) for name in [*names, "b1", "b2", "b3"]]).result(WAIT)
        ran.clear()
        assert store.list("b").result(WAIT) == ["b1", "b2", "b3"]
        assert store.delete_by_prefix("b").result(WAIT) == 3
        assert ran.scans == []
        taken[others] = sum(ran.steps)
    assert 0 < taken[20_000] < taken[20] + 500


def test_a_list_reads_no_values(persistency: Persistency, ran: Ran) -> None:
    """S0-56: keys are asked for, and keys alone are read, however long the values are; with ends among them too."""
    store = KVStore(persistency.open_job("a"))
    fill(store, "k1", "k2", value=b"x" * 1_000_000)
    for expected in (["k1", "k2"], ["k1", "k2", "k3"]):
        ran.clear()
        assert store.list("k", limit=10).result(WAIT) == expected
        assert [sql for sql in ran.begun if "payload" in sql] == []
        assert [sql for sql in ran.begun if sql.startswith("SELECT")] != []
        store.set_with_ttl("k3", b"x", 60).result(WAIT)


# -- delete_by_prefix -------------------------------------------------------------------------------------------------


def test_delete_by_prefix(make: Make) -> None:
    """S0-60, S0-62, S0-63: the keys of the prefix go, their number is told, the others stay; so does their size."""
    store = make(max_bytes=100)
    fill(store, "user:1", "user:2", "user", "users", "other", value=b"1234")
    assert store.storage_used().result(WAIT) == 20
    assert store.delete_by_prefix("user:").result(WAIT) == 2
    assert store.list().result(WAIT) == ["other", "user", "users"]
    assert store.storage_used().result(WAIT) == 12
    assert store.delete_by_prefix("user:").result(WAIT) == 0
    assert store.delete_by_prefix("user").result(WAIT) == 2
    assert store.storage_used().result(WAIT) == 4


def test_an_empty_prefix_deletes_nothing(store: KVStore) -> None:
    """S0-61: an empty prefix, which would be everything, is refused at the call."""
    fill(store, "a", "b")
    with pytest.raises(Misuse, match="prefix cannot be empty"):
        store.delete_by_prefix("")
    assert store.list().result(WAIT) == ["a", "b"]


def test_deleting_knows_no_wildcards(store: KVStore) -> None:
    """S0-64, S0-66, D-7, D-8: `%`, `_`, a backslash and case are what they are; nobody else's keys go."""
    texts = ["test%special", "test_special", "testXspecial", "USER:1", "user:1", "dir\\a", "dira"]
    fill(store, *texts)
    for prefix, gone in [("test%", 0), ("user:", 4), ("dir\\", 5), ("test_", 1)]:
        assert store.delete_by_prefix(prefix).result(WAIT) == 1
        assert store.has(texts[gone]).result(WAIT) is False
    assert store.list().result(WAIT) == ["USER:1", "dira", "testXspecial"]


def test_what_has_ended_is_deleted_but_not_counted(
    persistency: Persistency, clock: Clock, no_cleanup: pytest.MonkeyPatch
) -> None:
    """S0-65, otherwise than there: rows that have ended go with the others, but aren't counted: they weren't there."""
    store = KVStore(persistency.open_job("a", max_bytes=100))
    fill(store, "user:1", "user:2", "other")
    for text in ("user:3", "user:4", "other:2"):
        store.set_with_ttl(text, b"x", 1).result(WAIT)
    clock.forward(2)
    assert store.delete_by_prefix("user:").result(WAIT) == 2
    assert store.storage_used().result(WAIT) == 1
    store.job.close(WAIT)
    assert look(store.job.path) == [(bytes(key("other")),), (bytes(key("other:2")),)]


def test_prefixes_are_exact_to_the_byte(store: KVStore) -> None:
    """S0-51, S0-57, S0-58, S0-66, D-7, D-8: 1,000 random prefixes list and delete what `startswith` says."""
    rng = Random(8)
    letters = [*"%_\\aAbB\"'*?[]: ", "\0", "\x01", "\x7f", "\xff", "é", "É", "ß", "\ud7ff", "\ue000", "\U0010ffff"]
    texts = {"".join(rng.choices(letters, k=rng.choice([1, 1, 2, 3, 4]))) for _ in range(600)}
    found = 0
    for _ in range(1_000):
        present = rng.sample(sorted(texts), 30)
        prefix = rng.choice(present)[: rng.choice([1, 1, 2, 3])]
        store.job.commit([Put(CATEGORY, (text,), b"x") for text in present]).result(WAIT)
        expected = sorted(text for text in present if text.startswith(prefix))
        assert store.list(prefix).result(WAIT) == expected
        assert store.delete_by_prefix(prefix).result(WAIT) == len(expected)
        rest = sorted(set(present) - set(expected))
        assert store.list().result(WAIT) == rest
        found += len(expected)
        if rest:
            for first in {text[0] for text in rest}:
                store.delete_by_prefix(first).result(WAIT)
    assert found > 1_500


# -- get_many ---------------------------------------------------------------------------------------------------------


def test_get_many(store: KVStore) -> None:
    """S0-67, S0-68, S0-69, S0-70, S0-72: those that are there, each once, in the order asked; of none, nothing."""
    for text in "abc":
        store.set(text, text.encode() * 2).result(WAIT)
    assert store.get_many(["a", "b", "c"]).result(WAIT) == {"a": b"aa", "b": b"bb", "c": b"cc"}
    found = store.get_many(["c", "missing", "a", "A"]).result(WAIT)
    assert (type(found), list(found.items())) == (dict, [("c", b"cc"), ("a", b"aa")])
    assert list(store.get_many(["b", "a", "b", "b", "a"]).result(WAIT)) == ["b", "a"]
    none: list[Any] = [[], (), iter([])]
    for keys in none:
        assert store.get_many(keys).result(WAIT) == {}
    assert store.get_many(["x", "y"]).result(WAIT) == {}
    assert store.get_many(text for text in "ab").result(WAIT) == {"a": b"aa", "b": b"bb"}


@pytest.mark.parametrize("keys", ["abc", b"abc", None, 5])
def test_one_key_is_not_many(keys: Any, store: KVStore) -> None:
    """S0-69: a text isn't taken for its letters, nor nothing for an empty list."""
    with pytest.raises(Misuse, match="keys must be a list"):
        store.get_many(keys)


def test_any_number_of_keys_is_asked_for(store: KVStore) -> None:
    """S0-71: there is no limit to hit; 40,000 keys, every second of them missing, are one request."""
    texts = [f"k{number}" for number in range(40_000)]
    store.job.commit([Put(CATEGORY, (text,), text.encode()) for text in texts[::2]]).result(WAIT)
    assert store.get_many(texts).result(WAIT) == {text: text.encode() for text in texts[::2]}


def test_get_many_is_one_snapshot(store: KVStore) -> None:
    """S0-73: two keys that are only ever written together are never seen apart, however many are between them."""
    fill(store, *(f"k{number}" for number in range(300)))
    asked = ["first", *(f"k{number}" for number in range(300)), "last"]
    over = threading.Event()

    def write() -> int:
        count = 0
        while not over.is_set():
            value = b"%d" % count
            store.job.commit([Put(CATEGORY, ("first",), value), Put(CATEGORY, ("last",), value)]).result(WAIT)
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        writers = [pool.submit(write), pool.submit(write)]
        try:
            seen: list[dict[str, bytes]] = []
            while len(seen) < 300 or len({found.get("first") for found in seen[-300:]}) < 3:
                seen.append(store.get_many(asked).result(WAIT))
        finally:
            over.set()
        assert sum(writer.result(WAIT) for writer in writers) > 2
    assert all(found.get("first") == found.get("last") for found in seen)


# -- the quota --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"max_bytes": 1_000}])
def test_used_are_the_values_that_live(options: dict[str, Any], make: Make, clock: Clock) -> None:
    """S0-74, S0-75, S0-76, S0-77: bytes of live values, no keys; with a quota and without one, where it's counted."""
    store = make(**options)
    used = store.storage_used
    assert used().result(WAIT) == 0
    for expected, text in ((5, "a"), (10, "b")):
        store.set(text, b"12345").result(WAIT)
        assert used().result(WAIT) == expected
    store.set("a", b"12").result(WAIT)
    assert used().result(WAIT) == 7
    store.set("a", b"12345").result(WAIT)
    assert used().result(WAIT) == 10
    store.set("a", b"54321").result(WAIT)
    assert used().result(WAIT) == 10
    store.delete("a").result(WAIT)
    store.delete("a").result(WAIT)
    assert used().result(WAIT) == 5
    store.set_with_ttl("ends", b"123", 10).result(WAIT)
    assert used().result(WAIT) == 8
    clock.forward(10)
    assert used().result(WAIT) == 5
    store.delete("ends").result(WAIT)
    assert used().result(WAIT) == 5


def test_without_a_quota_nothing_is_refused(make: Make) -> None:
    """S0-78: a job has no limit unless it was given one, in bytes; what isn't a number of bytes opens no job."""
    store = make()
    store.set("k", b"x" * 3 * 2**20).result(WAIT)
    assert store.storage_used().result(WAIT) == 3 * 2**20
    for bad in ("1KB", "lots", -1, 1.5):
        with pytest.raises(Misuse, match="max_bytes"):
            make("other", max_bytes=bad)


@pytest.mark.parametrize("ttl", [None, 60])
def test_what_exceeds_the_quota_is_refused(ttl: Any, make: Make, clock: Clock) -> None:
    """S0-38, S0-79, S0-80, S0-83: by the reply of that very call, with the numbers; nothing has changed then."""
    store = make(max_bytes=10)

    def put(text: str, value: bytes) -> Reply[None]:
        return store.set(text, value) if ttl is None else store.set_with_ttl(text, value, ttl)

    put("a", b"12345").result(WAIT)
    put("b", b"12345").result(WAIT)  # just as much as there may be
    assert store.storage_used().result(WAIT) == 10
    before = store.job.snapshot(CATEGORY).result(WAIT)
    for text, value, used in [("c", b"1", 11), ("a", b"123456", 11), ("c", b"x" * 100, 110)]:
        with pytest.raises(QuotaExceeded) as caught:
            put(text, value).result(WAIT)
        assert str(caught.value) == f"storage limit exceeded: would use {used} of 10 bytes allowed"
        assert (caught.value.used, caught.value.limit) == (used, 10)
    assert store.job.snapshot(CATEGORY).result(WAIT) == before
    assert store.storage_used().result(WAIT) == 10
    put("c", b"").result(WAIT)
    if ttl is not None:
        clock.forward(60)
        assert store.storage_used().result(WAIT) == 0
        put("c", b"x" * 10).result(WAIT)


def test_a_refused_set_keeps_the_end_too(make: Make, clock: Clock) -> None:
    """S0-83: neither value nor TTL of the key has changed when a set of it was refused."""
    store = make(max_bytes=10)
    store.set_with_ttl("k", b"123", 10).result(WAIT)
    with pytest.raises(QuotaExceeded):
        store.set("k", b"x" * 11).result(WAIT)
    with pytest.raises(QuotaExceeded):
        store.set_with_ttl("k", b"x" * 11, 1_000).result(WAIT)
    assert store.get("k").result(WAIT) == b"123"
    clock.forward(10)
    assert store.get("k").result(WAIT) is None


def test_what_does_not_grow_is_always_allowed(persistency: Persistency) -> None:
    """S0-81: above a limit that was lowered, updates as long as before or shorter go through, and only those."""
    store = KVStore(persistency.open_job("a", max_bytes=100))
    fill(store, "a", "b", value=b"x" * 40)
    store.job.close(WAIT)
    store = KVStore(persistency.open_job("a", max_bytes=50))
    assert store.storage_used().result(WAIT) == 80
    for value in (b"y" * 40, b"z" * 39):
        store.set("a", value).result(WAIT)
        assert store.get("a").result(WAIT) == value
    store.set_with_ttl("b", b"w" * 40, 60).result(WAIT)
    store.set("empty", b"").result(WAIT)
    for text, size, used in [("a", 40, 80), ("c", 1, 80), ("empty", 1, 80)]:
        with pytest.raises(QuotaExceeded, match=f"{used} of 50"):
            store.set(text, b"v" * size).result(WAIT)
    assert store.delete("a").result(WAIT) is True
    store.set("a", b"v" * 10).result(WAIT)
    assert store.storage_used().result(WAIT) == 50


def test_what_has_ended_makes_room(make: Make, clock: Clock) -> None:
    """S0-77, S0-82: a row that has ended counts nothing, neither in what is used nor when it is written over."""
    store = make(max_bytes=10)
    store.set_with_ttl("k", b"x" * 8, 5).result(WAIT)
    with pytest.raises(QuotaExceeded, match="13 of 10"):
        store.set("other", b"x" * 5).result(WAIT)
    clock.forward(5)
    store.set("other", b"x" * 5).result(WAIT)
    with pytest.raises(QuotaExceeded, match="11 of 10"):  # 8 bytes that are over don't pay for it
        store.set("k", b"y" * 6).result(WAIT)
    store.set("k", b"y" * 5).result(WAIT)
    assert store.storage_used().result(WAIT) == 10


def test_a_clock_put_back_gives_no_room(persistency: Persistency, clock: Clock) -> None:
    """S0-77, S0-85: while the job is closed the clock is put back; what is set then counts, with a TTL too."""
    store = KVStore(persistency.open_job("a", max_bytes=10))
    store.set("k", b"12").result(WAIT)
    store.job.close(WAIT)
    clock.forward(-1_000_000)
    store = KVStore(persistency.open_job("a", max_bytes=10))
    store.set_with_ttl("ends", b"1234567", 60).result(WAIT)
    assert store.storage_used().result(WAIT) == 9
    with pytest.raises(QuotaExceeded, match="16 of 10"):
        store.set_with_ttl("more", b"1234567", 60).result(WAIT)
    store.job.touch(CATEGORY, ("k",), 60).result(WAIT)
    assert store.get("k").result(WAIT) == b"12"
    assert store.storage_used().result(WAIT) == 9


def test_the_accounts_are_exact_whatever_is_done(make: Make, clock: Clock) -> None:
    """S0-75 to S0-77, S0-79 to S0-83: 1,500 random steps against a plain model; every answer and number agrees."""
    rng = Random(80)
    limit = 60
    store = make(max_bytes=limit)
    texts = ["a", "a\0", "ab", "A", "é", "%", "b"]
    model: dict[str, tuple[bytes, int | None]] = {}
    refused = 0

    def live() -> dict[str, bytes]:
        return {text: value for text, (value, end) in model.items() if end is None or clock.ms < end}

    for _ in range(1_500):
        before, text, kind = live(), rng.choice(texts), rng.random()
        used = sum(map(len, before.values()))
        if kind < 0.6:
            value, ttl = bytes(rng.choice([0, 1, 5, 10, 30])), rng.choice([None, 0.001, 1, 10])
            wanted = used - len(before.get(text, b"")) + len(value)
            reply = store.set(text, value) if ttl is None else store.set_with_ttl(text, value, ttl)
            if limit < wanted > used:
                with pytest.raises(QuotaExceeded) as caught:
                    reply.result(WAIT)
                assert caught.value.used == wanted
                refused += 1
            else:
                assert reply.result(WAIT) is None
                model[text] = value, None if ttl is None else clock.ms + round(ttl * 1000)
        elif kind < 0.7:
            assert store.delete(text).result(WAIT) is (text in before)
            model.pop(text, None)
        elif kind < 0.75:
            gone = [each for each in model if each.startswith(text)]
            assert store.delete_by_prefix(text).result(WAIT) == len(before.keys() & gone)
            for each in gone:
                del model[each]
        else:
            clock.forward(rng.choice([0.001, 0.5, 1, 5]))
        now = live()
        assert store.storage_used().result(WAIT) == sum(map(len, now.values()))
        assert store.get_many(texts).result(WAIT) == now
        assert store.list().result(WAIT) == sorted(now)
    assert refused > 50


PAGES = (apsw.SQLITE_DBSTATUS_CACHE_HIT, apsw.SQLITE_DBSTATUS_CACHE_MISS)


def test_what_is_used_costs_the_same_at_any_size(
    persistency: Persistency, ran: Ran, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S0-84: `storage_used` and a growing `set` run the same statements and steps at 100,000 rows as at 10."""
    made: list[apsw.Connection] = []
    monkeypatch.setattr(apsw, "connection_hooks", [*apsw.connection_hooks, made.append])

    def pages_read(tx: Transaction) -> tuple[int, int]:
        # Inside the actor nobody else uses its connection.
        before = [made[-1].status(counter)[0] for counter in PAGES]
        used = tx.storage_used()
        return used, sum(made[-1].status(counter)[0] for counter in PAGES) - sum(before)

    costs = []
    for rows in (10, 100_000):
        store = KVStore(persistency.open_job(str(rows), max_bytes=10_000_000))
        store.job.commit([Put(CATEGORY, (f"k{number}",), b"12345") for number in range(rows)]).result(WAIT)
        store.set_with_ttl("ends", b"x" * 5, 60).result(WAIT)
        assert store.get("grows").result(WAIT) is None  # the first read also takes room for what is read
        store.set("grows", b"1").result(WAIT)
        used, pages = store.job.run(pages_read).result(WAIT)
        assert used == rows * 5 + 6
        ran.clear()
        assert store.storage_used().result(WAIT) == used
        of_used = list(ran.begun)
        ran.clear()
        store.set("grows", b"12").result(WAIT)
        assert store.storage_used().result(WAIT) == used + 1
        costs.append((pages, of_used, list(ran.begun), list(ran.steps)))
    assert costs[0] == costs[1]
    pages, of_used, of_set, _ = costs[0]
    assert pages == 0
    assert not any("kv" in sql for sql in of_used)
    assert any("INSERT" in sql for sql in of_set)


def test_counting_without_a_quota_is_what_it_costs(persistency: Persistency, ran: Ran) -> None:
    """S0-84: the measure of the test above sees the difference: a job without a quota does read its rows."""
    taken = []
    for rows in (10, 1_000):
        store = KVStore(persistency.open_job(str(rows)))
        store.job.commit([Put(CATEGORY, (f"k{number}",), b"12345") for number in range(rows)]).result(WAIT)
        ran.clear()
        assert store.storage_used().result(WAIT) == rows * 5
        store.job.flush(sync=True).result(WAIT)  # its statement is done when the next one begins
        taken.append(sum(ran.steps))
    assert taken[1] > taken[0] + 990


def test_many_threads_never_exceed_a_quota(make: Make, clock: Clock) -> None:
    """S0-85, D-12: 16 threads fill a job at once; it never has more than it may, exactly counted at any moment."""
    limit = 20_000
    store = make(max_bytes=limit)
    start = threading.Barrier(16)

    def work(number: int) -> tuple[dict[str, int], int]:
        rng = Random(number)
        mine: dict[str, int] = {}
        refused = 0
        start.wait(WAIT)
        for at in range(150):
            text, size = f"{number}:{rng.randrange(40)}", rng.randrange(1, 200)
            kind = rng.random()
            try:
                if kind < 0.1:
                    store.delete(text).result(WAIT)
                    mine.pop(text, None)
                    continue
                if kind < 0.4:
                    store.set_with_ttl(text, b"x" * size, 3_600).result(WAIT)
                else:
                    store.set(text, b"x" * size).result(WAIT)
                mine[text] = size
            except QuotaExceeded as error:
                assert error.used > error.limit == limit
                refused += 1
            assert store.storage_used().result(WAIT) <= limit
            if at % 10 == 0:
                used, counted = store.job.run(used_and_counted).result(WAIT)
                assert used == counted <= limit
        return mine, refused

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(work, range(16)))
    expected = sum(size for mine, _ in results for size in mine.values())
    assert store.storage_used().result(WAIT) == expected <= limit
    assert sorted(text for mine, _ in results for text in mine) == store.list().result(WAIT)
    assert sum(refused for _, refused in results) > 100
    clock.forward(3_600)
    used, counted = store.job.run(used_and_counted).result(WAIT)
    assert used == counted < expected


def test_batches_that_race_are_held_to_the_quota_whole(make: Make) -> None:
    """S0-85, D-12: of batches of eight threads each is taken whole or not at all, until the job is just full."""
    store = make(max_bytes=1_000)

    def work(number: int) -> int:
        taken = 0
        for at in range(50):
            try:
                store.job.commit([Put(CATEGORY, (f"{number}:{at}:{half}",), b"x" * 5) for half in "ab"]).result(WAIT)
                taken += 2
            except QuotaExceeded:
                pass
        return taken

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) == 200
    assert store.storage_used().result(WAIT) == 1_000
    assert len(store.list().result(WAIT)) == 200


def test_posts_are_held_to_the_quota_one_by_one(make: Make) -> None:
    """S0-80, S0-83: what is posted past the view counts too; of many events in one group only the one fails."""
    store = make(max_bytes=10)
    for text, size in [("a", 5), ("b", 5), ("c", 1), ("a", 6), ("b", 4), ("d", 1)]:
        store.job.put(CATEGORY, (text,), b"x" * size)
    with pytest.raises(WriteFailed) as caught:
        store.job.flush().result(WAIT)
    assert [(failure.op.key.parts, str(failure.error)) for failure in caught.value.failures] == [
        (("c",), "storage limit exceeded: would use 11 of 10 bytes allowed"),
        (("a",), "storage limit exceeded: would use 11 of 10 bytes allowed"),
    ]
    assert store.list().result(WAIT) == ["a", "b", "d"]
    assert store.storage_used().result(WAIT) == 10


@pytest.mark.parametrize("ended", [False, True])
def test_what_ends_while_it_waits_never_counts(ended: bool, make: Make, clock: Clock) -> None:
    """S0-77: a value whose time is over before the busy job has come to write it is neither seen nor counted."""
    store = make(max_bytes=10)
    inside, may_go = threading.Event(), threading.Event()

    def hold(_tx: Transaction) -> None:
        inside.set()
        assert may_go.wait(WAIT)

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(lambda: store.job.run(hold).result(WAIT))
        try:
            assert inside.wait(WAIT)
            replies = [store.set_with_ttl(text, b"12345", 1) for text in "ab"]
            clock.forward(1 if ended else 0.999)
        finally:
            may_go.set()
        holding.result(WAIT)
    for reply in replies:
        reply.result(WAIT)
    assert store.list().result(WAIT) == ([] if ended else ["a", "b"])
    assert store.storage_used().result(WAIT) == (0 if ended else 10)
    clock.forward(1)
    store.set("c", b"x" * 10).result(WAIT)
    assert store.storage_used().result(WAIT) == 10


# -- in event loops ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["memory", "directory"])
def test_every_verb_is_awaited(where: str, root: Path, clock: Clock, in_loop: InLoop) -> None:
    """The same calls in an event loop: replies are awaited, many at once, and raise where they are."""

    async def main() -> None:
        async with Persistency(":memory:" if where == "memory" else root, clock=clock) as persistency:
            store = KVStore(await persistency.aopen_job("plugin", max_bytes=1_000))
            await together(*(store.set(f"user:{number}", b"12345") for number in range(100)))
            assert await store.storage_used() == 500
            assert await store.get("user:7") == b"12345"
            assert await store.get("nobody") is None
            assert await store.has("user:7") is True
            assert await store.get_many(["user:1", "nobody"]) == {"user:1": b"12345"}
            assert len(await store.list("user:")) == 100
            with pytest.raises(QuotaExceeded, match="1001 of 1000"):
                await store.set("big", b"x" * 501)
            await store.set_with_ttl("brief", b"x", 1)
            clock.forward(1)
            assert await store.get("brief") is None
            assert await store.delete("user:7") is True
            assert await store.delete_by_prefix("user:1") == 11
            assert await store.storage_used() == 440
            with pytest.raises(Misuse):
                store.get("")

    in_loop(main)


def test_giving_up_takes_back_reads_and_no_writes(store: KVStore) -> None:
    """While the job is busy, a list that nobody wants any more is cancelled; a set that was called is done."""
    inside, may_go = threading.Event(), threading.Event()

    def hold(_tx: Transaction) -> None:
        inside.set()
        assert may_go.wait(WAIT)

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(lambda: store.job.run(hold).result(WAIT))
        try:
            assert inside.wait(WAIT)
            reads: list[Reply[Any]] = [store.list(), store.get_many(["k"]), store.storage_used()]
            write = store.set("k", b"x")
            assert [reply.cancel() for reply in reads] == [True] * 3
            assert write.cancel() is False
            with pytest.raises(TimeoutError):
                write.result(0.001)
        finally:
            may_go.set()
        holding.result(WAIT)
    assert write.result(WAIT) is None
    assert [reply.cancelled() for reply in reads] == [True] * 3
    assert store.get("k").result(WAIT) == b"x"


def test_typed_job_and_category(store: KVStore) -> None:
    """The store says what it is made of."""
    assert isinstance(store.job, Job)
    assert store.category == CATEGORY == "kv"


# -- compare_and_set --------------------------------------------------------------------------------------------------


def test_compare_and_set(store: KVStore) -> None:
    """The new value takes the old one's place only if that is there, byte by byte; the answer says which it was."""
    store.set("k", b"old").result(WAIT)
    for other in (b"", b"ol", b"old\0", b"OLD", None):
        assert store.compare_and_set("k", other, b"new").result(WAIT) is False
    assert store.get("k").result(WAIT) == b"old"
    assert store.compare_and_set("k", bytearray(b"old"), memoryview(b"new")).result(WAIT) is True
    assert store.get("k").result(WAIT) == b"new"


def test_no_such_key_may_stand_on_either_side(store: KVStore) -> None:
    """With `None` expected it creates, with `None` new it deletes; an empty value is a value, not a missing key."""
    assert store.compare_and_set("k", b"", b"x").result(WAIT) is False
    assert store.compare_and_set("k", None, b"").result(WAIT) is True
    assert store.compare_and_set("k", None, b"x").result(WAIT) is False
    assert store.get("k").result(WAIT) == b""
    assert store.compare_and_set("k", b"", None).result(WAIT) is True
    assert store.has("k").result(WAIT) is False
    assert store.compare_and_set("k", None, None).result(WAIT) is True
    assert store.list().result(WAIT) == []


def test_what_has_ended_is_no_such_key_to_compare(store: KVStore, clock: Clock) -> None:
    """A value that has ended isn't there to be expected; what is put in the place of one that ends stays."""
    store.set_with_ttl("k", b"brief", 1).result(WAIT)
    assert store.compare_and_set("k", b"brief", b"stays").result(WAIT) is True
    store.set_with_ttl("gone", b"brief", 1).result(WAIT)
    clock.forward(1)
    assert store.get("k").result(WAIT) == b"stays"
    assert store.compare_and_set("gone", b"brief", b"x").result(WAIT) is False
    assert store.compare_and_set("gone", None, b"anew").result(WAIT) is True
    clock.forward(100)
    assert store.get_many(["gone", "k"]).result(WAIT) == {"gone": b"anew", "k": b"stays"}


def test_compare_and_set_is_held_to_the_quota(make: Make) -> None:
    """A new value that there is no room for is refused, and the old one stays; where nothing is put, there is room."""
    store = make(max_bytes=10)
    fill(store, "k", value=b"12345")
    with pytest.raises(QuotaExceeded, match="11 of 10"):
        store.compare_and_set("k", b"12345", b"x" * 11).result(WAIT)
    assert store.compare_and_set("k", b"no", b"x" * 11).result(WAIT) is False
    assert store.compare_and_set("k", b"12345", b"x" * 10).result(WAIT) is True
    assert store.storage_used().result(WAIT) == 10


def test_compare_and_set_refuses_what_set_refuses(store: KVStore) -> None:
    """The same keys and values are `Misuse` at the call; a closed store refuses it too."""
    for bad in ("", "x" * 257, "\ud800", None, b"k"):
        with pytest.raises(Misuse, match="key"):
            store.compare_and_set(bad, None, b"x")  # type: ignore[arg-type]
    for side in ("expected", "new"):
        values: dict[str, Any] = {"expected": b"", "new": b"", side: "text"}
        with pytest.raises(Misuse, match=f"{side} must be bytes-like"):
            store.compare_and_set("k", **values)
    store.job.close(WAIT)
    with pytest.raises(Closed):
        store.compare_and_set("k", None, b"x")


def test_of_many_that_compare_at_once_each_counts(store: KVStore) -> None:
    """Threads that count up by compare-and-set, trying again where another came first, lose no step."""
    store.set("count", b"0").result(WAIT)

    def count_up(_thread: int) -> None:
        for _ in range(25):
            done = False
            while not done:
                found = store.get("count").result(WAIT)
                assert found is not None
                done = store.compare_and_set("count", found, b"%d" % (int(found) + 1)).result(WAIT)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(count_up, range(4))) == [None] * 4
    assert store.get("count").result(WAIT) == b"100"
