"""The stores for py-key-value-aio: what its protocols ask of a store, held by both twins on all they can stand on.

Its own suite isn't in the package that is installed. `test_their_own_suite_passes_unmodified` runs it from a checkout
of py-key-value where `PERSISTENCY_KEY_VALUE_SUITE` names one; what the suite asks for is asked for here as well.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import subprocess
import sys
import textwrap
import time
import uuid
import xml.etree.ElementTree as ET
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, cast

import anyio
import pytest
from key_value.aio.errors import (
    DeserializationError,
    EntryTooLargeError,
    InvalidKeyError,
    InvalidTTLError,
    ReadOnlyError,
    SerializationError,
    StoreSetupError,
)
from key_value.aio.protocols import key_value as protocols
from key_value.aio.wrappers.compression import CompressionWrapper
from key_value.aio.wrappers.default_value import DefaultValueWrapper
from key_value.aio.wrappers.limit_size import LimitSizeWrapper
from key_value.aio.wrappers.passthrough_cache import PassthroughCacheWrapper
from key_value.aio.wrappers.prefix_collections import PrefixCollectionsWrapper
from key_value.aio.wrappers.prefix_keys import PrefixKeysWrapper
from key_value.aio.wrappers.read_only import ReadOnlyWrapper
from key_value.aio.wrappers.retry import RetryWrapper
from key_value.aio.wrappers.single_collection import SingleCollectionWrapper
from key_value.aio.wrappers.statistics import StatisticsWrapper
from key_value.aio.wrappers.timeout import TimeoutWrapper
from key_value.aio.wrappers.ttl_clamp import TTLClampWrapper

from persistency import Closed, Corrupt, Misuse, Persistency, PersistencyError, QuotaExceeded, key
from persistency.integrations.keyvalue import KeyValue, PersistencyStore, SyncPersistencyStore
from persistency.integrations.keyvalue.values import KEY_BYTES_MAX
from persistency.recipes import Baton
from persistency.testing import ManualClock
from tests.loops import InLoop, bounded

Body = Callable[[Any], Awaitable[None]]
SUITE = os.environ.get("PERSISTENCY_KEY_VALUE_SUITE", "")


class Shim:
    """The sync twin as those call it who await, so that a test is written once."""

    def __init__(self, store: SyncPersistencyStore) -> None:
        self.store = store

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self.store, name)

        async def call(*args: Any, **options: Any) -> Any:
            return verb(*args, **options)

        return call


class Kind:
    """One way to have a store, all on one root, under one clock."""

    def __init__(self, kind: str, root: Path) -> None:
        self.kind, self.root, self.clock = kind, root, ManualClock()

    def use(self, body: Body, **options: Any) -> None:
        """Run a test's body with a store of this kind, in an event loop of its own."""
        asyncio.run(bounded(self._use, body, options))

    async def _use(self, body: Body, options: dict[str, Any]) -> None:
        if self.kind == "directory":
            async with PersistencyStore(directory=self.root, **options) as store:
                await body(store)
            return
        async with Persistency(self.root, clock=self.clock) as p:
            if self.kind == "baton":
                baton = Baton(p, "keyvalue")
                await body(PersistencyStore(baton, **options))
                await baton.aclose()
            else:
                job = await p.aopen_job("keyvalue")
                await body(
                    PersistencyStore(job, **options)
                    if self.kind == "job"
                    else Shim(SyncPersistencyStore(job, **options))
                )


@pytest.fixture(params=["job", "baton", "directory", "sync"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    """Give every kind of store in turn."""
    return Kind(request.param, tmp_path / "root")


@pytest.fixture(params=["job", "sync"])
def twin(request: pytest.FixtureRequest, tmp_path: Path) -> Kind:
    """Give both twins, on a job."""
    return Kind(request.param, tmp_path / "root")


def stored(root: Path) -> list[tuple[bytes, str]]:
    """What is in the file of a job that is closed, or has written all that it has: keys and payloads."""
    with closing(sqlite3.connect(f"file:{root / 'keyvalue.db'}?mode=ro", uri=True)) as file:
        return file.execute(
            "SELECT key, CAST(payload AS TEXT) FROM kv WHERE category = CAST('keyvalue' AS BLOB)"
        ).fetchall()


# -- single values ---------------------------------------------------------------------------------------------------


def test_what_was_put_is_there_until_it_is_deleted(kind: Kind) -> None:
    """A value is got, replaced and deleted once; what isn't there is `None`, and deleting it `False`."""

    async def body(store: Any) -> None:
        assert await store.get("a", collection="c") is None
        assert await store.ttl("a", collection="c") == (None, None)
        assert await store.delete("a", collection="c") is False
        await store.put("a", {"n": 1}, collection="c")
        assert await store.get("a", collection="c") == {"n": 1}
        await store.put("a", {"n": 2}, collection="c")
        assert await store.ttl("a", collection="c") == ({"n": 2}, None)
        assert await store.get("a", collection="other") is None
        assert await store.delete("a", collection="c") is True
        assert await store.delete("a", collection="c") is False
        assert await store.get("a", collection="c") is None

    kind.use(body)


VALUES: list[dict[str, Any]] = [
    {},
    {"": None, "none": [None, {"n": None}], "null": "null"},
    {"yes": True, "no": False, "1": "1", "true": "true"},
    {"n": -42, "large": 10**18, "larger": 2**200, "zero": 0},
    {"f": 1.5, "large": 1.5e300, "small": -5e-324},
    {"text": "Hello 世界 🌍 é", "lines": "a\nb\tc\0", "quote": '"\\', "lone": "\ud800"},
    {"long": "a" * 1_000_000},
    {"deep": {"a": {"b": {"c": [[[{"d": 1}]]]}}}},
    {"many": [{"id": n, "name": f"item {n}"} for n in range(1000)]},
    {"date": "2025-01-01T00:00:00+00:00", "uuid": str(uuid.UUID(int=1))},
]


def test_values_come_back_as_json_has_them(kind: Kind) -> None:
    """Every JSON value comes back equal, of the same types; a tuple comes back as a list."""

    async def body(store: Any) -> None:
        names = [f"value {n}" for n in range(len(VALUES))]
        for name, value in zip(names, VALUES, strict=True):
            await store.put(name, value)
        for value, found in zip(VALUES, await store.get_many(names), strict=True):
            assert found == value
            assert repr(sorted(found.items(), key=str)) == repr(sorted(value.items(), key=str))
        await store.put("tuple", {"t": (1, "two", (3.0,)), "keys": {1: 2}})
        assert await store.get("tuple") == {"t": [1, "two", [3.0]], "keys": {"1": 2}}

    kind.use(body)


def nested(depth: int) -> list[Any]:
    """A list in a list, and so on."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


def circular() -> list[Any]:
    """A list that contains itself."""
    value: list[Any] = []
    value.append(value)
    return value


REFUSED: list[Any] = [
    datetime(2025, 1, 1, tzinfo=UTC),
    date(2025, 1, 1),
    uuid.UUID(int=1),
    b"bytes",
    {1, 2},
    object(),
    {1: "a", "1": "b"},  # as JSON these would be one key
    circular(),
    nested(100_000),
    10**5000,
    float("nan"),
    [{"n": float("-inf")}],
]


@pytest.mark.parametrize("value", REFUSED, ids=lambda value: type(value).__name__)
def test_what_json_cant_hold_is_refused_and_nothing_is_written(twin: Kind, value: Any) -> None:
    """It is a `SerializationError` at the call; of a `put_many` with one such value nothing is there."""

    async def body(store: Any) -> None:
        with pytest.raises(SerializationError):
            await store.put("bad", {"value": value})
        with pytest.raises(SerializationError):
            await store.put_many(["good", "bad"], [{"n": 1}, {"value": value}])
        assert await store.keys() == []
        assert await store.collections() == []

    twin.use(body)


def test_a_value_is_written_as_json_text(twin: Kind) -> None:
    """The payload is JSON that any SQLite tool reads, equal ones in equal bytes; nothing in it is ever executed."""

    async def body(store: Any) -> None:
        await store.put("one", {"b": [1, 2], "a": "x"})
        await store.put("two", {"a": "x", "b": (1, 2)})

    twin.use(body)
    payloads = [payload for _, payload in stored(twin.root)]
    assert payloads == ['{"a":"x","b":[1,2]}'] * 2


@pytest.mark.parametrize("payload", [b"", b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000, b"\x80\x04N."])
def test_a_payload_that_isnt_a_value_is_told_as_such(tmp_path: Path, payload: bytes) -> None:
    """Foreign or damaged bytes, a pickle among them, raise `DeserializationError` and disturb no other key."""
    with Persistency(tmp_path) as p:
        job = p.open_job("keyvalue")
        store = SyncPersistencyStore(job)
        store.put("sound", {"n": 1})
        job.put("keyvalue", key("default_collection", "bad"), payload)
        with pytest.raises(DeserializationError):
            store.get("bad")
        with pytest.raises(DeserializationError):
            asyncio.run(PersistencyStore(job).get("bad"))
        assert store.get("sound") == {"n": 1}


def test_a_row_that_is_no_key_is_corrupt(tmp_path: Path) -> None:
    """A store that shares its category with others' rows says so when it lists, and passes over what isn't text."""
    with Persistency(tmp_path) as p:
        job = p.open_job("keyvalue")
        store = SyncPersistencyStore(job)
        store.put("sound", {})
        job.put("keyvalue", (1, 2), b"{}")
        assert store.collections() == ["default_collection"]
        job.put("keyvalue", ("default_collection", "a", "b"), b"{}")
        with pytest.raises(Corrupt, match="category of its own"):
            store.keys()


# -- several values --------------------------------------------------------------------------------------------------


def test_several_values_at_once(kind: Kind) -> None:
    """Answers are in the order asked, with `None` for what is missing; counts are of what was there, once."""

    async def body(store: Any) -> None:
        assert await store.get_many(["a", "b"]) == [None, None]
        assert await store.delete_many(["a", "b"]) == 0
        await store.put_many(["a", "b", "c"], ({"n": 1}, {"n": 2}, {"n": 3}))
        assert await store.get_many(["c", "x", "a", "c"]) == [{"n": 3}, None, {"n": 1}, {"n": 3}]
        await store.put_many(["a", "a"], [{"n": 8}, {"n": 9}], ttl=60)
        assert await store.get("a") == {"n": 9}
        (value, left), missing, (other, forever) = await store.ttl_many(["a", "x", "b"])
        assert (value, missing, other, forever) == ({"n": 9}, (None, None), {"n": 2}, None)
        assert 55 < left <= 60
        assert await store.delete_many(["a", "a", "x", "b"]) == 2
        assert await store.get_many(["a", "b", "c"]) == [None, None, {"n": 3}]
        assert await store.get_many([]) == []
        assert await store.ttl_many([]) == []
        assert await store.delete_many([]) == 0
        await store.put_many([], [])
        with pytest.raises(ValueError, match="put_many"):
            await store.put_many(["a", "b"], [{"n": 1}])
        assert await store.keys() == ["c"]

    kind.use(body)


# -- time ------------------------------------------------------------------------------------------------------------


def test_a_ttl_is_exact_for_every_verb(twin: Kind) -> None:
    """Up to its last millisecond a value is there, then it is for no verb: `get`, `ttl`, lists, deletes."""

    async def body(store: Any) -> None:
        await store.put("a", {"n": 1}, ttl=10)
        await store.put_many(["b", "c"], [{}, {}], ttl=0.5, collection="soon")
        await store.put("forever", {})
        twin.clock.advance(0.499)
        assert await store.keys("soon") == ["b", "c"]
        assert await store.ttl("b", collection="soon") == ({}, pytest.approx(0.001, abs=0.001))
        twin.clock.advance(0.001)
        assert await store.keys("soon") == []
        assert await store.collections() == ["default_collection"]
        assert await store.delete_many(["b", "c"], collection="soon") == 0
        twin.clock.advance(9.499)
        assert await store.get("a") == {"n": 1}
        twin.clock.advance(0.001)
        assert await store.get("a") is None
        assert await store.ttl_many(["a"]) == [(None, None)]
        assert await store.delete("a") is False
        assert await store.destroy_collection("soon") is False
        assert await store.get("forever") == {}

    twin.use(body)


def test_a_plain_put_clears_a_ttl(twin: Kind) -> None:
    """What is put again without a TTL stays."""

    async def body(store: Any) -> None:
        await store.put("a", {"n": 1}, ttl=1)
        await store.put("a", {"n": 2})
        twin.clock.advance(1_000_000)
        assert await store.ttl("a") == ({"n": 2}, None)

    twin.use(body)


BAD_TTLS = [0, -1, -0.5, True, 10**11, 1e12, 10**400, float("nan"), float("inf"), "5", b"5", object()]


@pytest.mark.parametrize("ttl", BAD_TTLS, ids=lambda ttl: f"{ttl!r:.12}".partition(" at")[0])
def test_a_ttl_that_is_none_is_refused(kind: Kind, ttl: Any) -> None:
    """No time, less than none, no number, more than a job takes: an `InvalidTTLError`, and nothing is written."""

    async def body(store: Any) -> None:
        with pytest.raises(InvalidTTLError):
            await store.put("a", {}, ttl=ttl)
        with pytest.raises(InvalidTTLError):
            await store.put_many(["a"], [{}], ttl=ttl)
        assert await store.keys() == []

    kind.use(body)


def test_a_ttl_has_a_millisecond_at_least(twin: Kind) -> None:
    """However short, it is one, and the value is there until it is over; a long one is as long as a job takes."""

    async def body(store: Any) -> None:
        await store.put("soon", {}, ttl=1e-9)
        await store.put_many(["late"], [{}], ttl=10**10)
        assert await store.keys() == ["late", "soon"]
        twin.clock.advance(0.001)
        assert await store.keys() == ["late"]

    twin.use(body)


def test_what_has_ended_is_reclaimed_by_itself(tmp_path: Path) -> None:
    """Nobody reads, culls or writes any more: the rows that have ended leave the file all the same."""
    clock = ManualClock()
    with Persistency(tmp_path, clock=clock) as p:
        clock.attach(p)
        job = p.open_job("keyvalue", feed_changes_max=1000)
        store = SyncPersistencyStore(job)
        store.put_many([f"k{n}" for n in range(100)], [{"n": n} for n in range(100)], ttl=60)
        store.put("stays", {})
        seen = job.version().result()
        assert len(stored(tmp_path)) == 101
        clock.advance(60)
        while seen is not None:
            changes = job.changes(seen, 1000, wait=True).result(30)
            seen = (
                None
                if sum(change.kind == "expire" for change in job.changes(0, 1000).result()) == 100
                else changes[-1].version
            )
        assert len(stored(tmp_path)) == 1


@pytest.mark.parametrize("kind", ["job", "baton", "directory", "sync"], indirect=True)
def test_culling_takes_nothing_that_lives(kind: Kind) -> None:
    """`cull()` may be called at any time; what hasn't ended is still there."""

    async def body(store: Any) -> None:
        await store.put("a", {}, ttl=60)
        await store.put("b", {})
        assert await store.cull() is None
        assert await store.keys() == ["a", "b"]

    kind.use(body)


def test_a_ttl_counts_from_the_call(tmp_path: Path) -> None:
    """A write that waited for its job for longer than its TTL is over when it is done, and removes what was there."""
    with Persistency(tmp_path) as p:
        baton = Baton(p, "keyvalue")
        store = SyncPersistencyStore(baton)
        store.put("a", {"n": 1})
        slow = baton.run(lambda tx: time.sleep(0.02))
        late = store._rows.put_many([(key("default_collection", "a"), b"{}")], 1)
        slow.result()
        late.result()
        assert store.get("a") is None
        assert store.keys() == []
        baton.close()


# -- names -----------------------------------------------------------------------------------------------------------

NAMES = [
    "",
    " ",
    "a/b",
    "../../etc/passwd",
    "!@#$%^&*()",
    "a\0b",
    "a\nb",
    "世界🌍",
    "H_x",
    "S_x",
    "a" * 1500,
    "%",
    "*",
    "\x7f",
]


def test_any_text_is_a_name(kind: Kind) -> None:
    """Keys and collections of any characters, and long ones, work and come back as they are; none is another."""

    async def body(store: Any) -> None:
        for name in NAMES:
            await store.put_many(NAMES, [{"in": name, "key": each} for each in NAMES], collection=name or None)
        for name in NAMES:
            assert await store.get_many(NAMES, collection=name or None) == [{"in": name, "key": each} for each in NAMES]
            assert sorted(await store.keys(name or None)) == sorted(NAMES)
        assert sorted(await store.collections()) == sorted([*NAMES[1:], "default_collection"])

    kind.use(body)


def test_a_collection_and_a_key_dont_run_into_one_another(twin: Kind) -> None:
    """`("ab", "c")` and `("a", "bc")` are two, and destroying "a" leaves "ab" alone."""

    async def body(store: Any) -> None:
        for collection, name in (("a", "bc"), ("ab", "c"), ("a\0", "c"), ("a", "\0c")):
            await store.put(name, {"in": collection}, collection=collection)
        assert await store.get("bc", collection="a") == {"in": "a"}
        assert await store.get("c", collection="ab") == {"in": "ab"}
        assert await store.destroy_collection("a") is True
        assert await store.collections() == ["a\0", "ab"]

    twin.use(body)


def test_names_up_to_the_limit_work_and_longer_ones_fail_clearly(kind: Kind) -> None:
    """To the byte what a job takes as a key; a byte more is an `InvalidKeyError` for every verb, as is a surrogate."""
    longest = "k" * (KEY_BYTES_MAX - len(key("c", "")))

    async def body(store: Any) -> None:
        await store.put(longest, {"n": 1}, collection="c")
        assert await store.get(longest, collection="c") == {"n": 1}
        assert await store.keys("c") == [longest]
        for bad in (longest + "k", "\ud800"):
            for verb in (store.get, store.ttl, store.delete):
                with pytest.raises(InvalidKeyError):
                    await verb(bad, collection="c")
            with pytest.raises(InvalidKeyError):
                await store.put(bad, {}, collection="c")
            with pytest.raises(InvalidKeyError):
                await store.put_many(["fine", bad], [{}, {}], collection="c")
            with pytest.raises(InvalidKeyError):
                await store.get_many([bad], collection="c")
        assert await store.delete(longest, collection="c") is True
        assert await store.keys("c") == []

    kind.use(body)


def test_a_collection_that_none_can_be_is_told_as_such(kind: Kind) -> None:
    """Listing or destroying one whose name is too long, or has a lone surrogate, is an `InvalidKeyError` too."""

    async def body(store: Any) -> None:
        for bad in ("c" * 9000, "\ud800"):
            for verb in (store.keys, store.destroy_collection):
                with pytest.raises(InvalidKeyError):
                    await verb(bad)

    kind.use(body)


def test_the_limit_of_names_is_the_engines(tmp_path: Path) -> None:
    """One byte more than `KEY_BYTES_MAX` is what a job itself refuses."""
    with Persistency(tmp_path) as p:
        job = p.open_job("a")
        job.put("c", key("k" * (KEY_BYTES_MAX - 2)), b"")
        with pytest.raises(Misuse):
            job.put("c", key("k" * (KEY_BYTES_MAX - 1)), b"")


# -- lists, and the whole --------------------------------------------------------------------------------------------


def test_keys_and_collections_are_listed_in_order(kind: Kind) -> None:
    """All of them or the first few; a collection whose last key has gone is none any more."""

    async def body(store: Any) -> None:
        assert await store.keys() == []
        assert await store.collections() == []
        for collection in ("c", "a", "b"):
            await store.put_many(["z", "x", "y"], [{}, {}, {}], collection=collection)
        await store.put("default", {})
        assert await store.keys("a") == ["x", "y", "z"]
        assert await store.keys("a", limit=2) == ["x", "y"]
        assert await store.keys("a", limit=0) == []
        assert await store.keys() == ["default"]
        assert await store.collections() == ["a", "b", "c", "default_collection"]
        assert await store.collections(limit=2) == ["a", "b"]
        assert await store.collections(limit=0) == []
        await store.delete_many(["x", "y", "z"], collection="b")
        assert await store.collections() == ["a", "c", "default_collection"]
        for bad in (-1, True):
            with pytest.raises(Misuse):
                await store.keys(limit=bad)
            with pytest.raises(Misuse):
                await store.collections(limit=bad)

    kind.use(body)


def test_destroying_takes_what_is_the_stores_and_no_more(kind: Kind) -> None:
    """A collection, or all of them; a store of another name in the same job keeps what it has."""

    async def body(store: Any) -> None:
        await store.put("k", {"n": 1}, collection="a")
        await store.put("k", {"n": 2}, collection="b")
        assert await store.destroy_collection("a") is True
        assert await store.destroy_collection("a") is False
        assert await store.get("k", collection="a") is None
        assert await store.get("k", collection="b") == {"n": 2}
        assert await store.destroy() is True
        assert await store.collections() == []
        await store.put("k", {"n": 3}, collection="b")  # and goes on
        assert await store.get("k", collection="b") == {"n": 3}

    kind.use(body)


def test_stores_of_several_names_share_a_job(tmp_path: Path) -> None:
    """Each has rows of its own, also beside what the service itself keeps in the job."""
    with Persistency(tmp_path) as p:
        job = p.open_job("a")
        one, two = SyncPersistencyStore(job, name="one"), SyncPersistencyStore(job, name="two")
        job.put("mine", (1,), b"x")
        one.put("k", {"n": 1})
        two.put("k", {"n": 2})
        assert one.destroy()
        assert (one.get("k"), two.get("k"), job.get("mine", (1,)).result()) == (None, {"n": 2}, b"x")


def test_a_seed_and_a_default_collection(kind: Kind) -> None:
    """What is given as a seed is there at the first use; keys without a collection are in the default one."""
    seed = {"c": {"a": {"n": 1}, "b": {"n": 2}}, "d": {"a": {"n": 3}}}

    async def body(store: Any) -> None:
        assert await store.get_many(["a", "b"], collection="c") == [{"n": 1}, {"n": 2}]
        assert await store.collections() == ["c", "d"]
        assert await store.get("a") == {"n": 3}
        await store.put("x", {})
        assert await store.keys("d") == ["a", "x"]

    kind.use(body, seed=seed, default_collection="d")


def test_a_seed_is_written_over_what_is_there(kind: Kind) -> None:
    """By every store that has one, once; what else was stored stays."""

    async def body(store: Any) -> None:
        assert await store.get("a") == {"n": 1}
        await store.put_many(["a", "b"], [{"n": 2}, {"n": 2}])
        assert await store.get("a") == {"n": 2}

    async def again(store: Any) -> None:
        assert await store.get_many(["a", "b"]) == [{"n": 1}, {"n": 2}]

    seed = {"default_collection": {"a": {"n": 1}}}
    kind.use(body, seed=seed)
    kind.use(again, seed=seed)


# -- the twins, and what they stand on -------------------------------------------------------------------------------


def test_it_is_all_that_the_protocols_name(tmp_path: Path) -> None:
    """The store is an `AsyncKeyValue` with every ability; its twin has the same verbs with the same arguments."""
    store = PersistencyStore(directory=tmp_path)
    for ability in (
        protocols.AsyncKeyValue,
        protocols.AsyncCullProtocol,
        protocols.AsyncEnumerateKeysProtocol,
        protocols.AsyncEnumerateCollectionsProtocol,
        protocols.AsyncDestroyStoreProtocol,
        protocols.AsyncDestroyCollectionProtocol,
    ):
        assert isinstance(store, ability)
        for name in vars(ability):
            assert name.startswith("_") or callable(getattr(SyncPersistencyStore, name)), name
    with SyncPersistencyStore(directory=tmp_path) as sync:
        assert isinstance(sync, KeyValue)
    mirrored = {name for name in vars(protocols.AsyncKeyValueProtocol) if not name.startswith("_")}
    assert mirrored == {name for name in vars(KeyValue) if not name.startswith("_")}


def test_what_one_twin_writes_the_other_reads(tmp_path: Path) -> None:
    """Both are the same rows: values, ends, lists and deletes."""
    with Persistency(tmp_path) as p:
        job = p.open_job("a")
        sync, store = SyncPersistencyStore(job), PersistencyStore(job)

        async def body() -> None:
            await store.put_many(["a", "b"], [{"n": 1}, {"n": 2}], collection="c", ttl=100)
            assert sync.get_many(["a", "b"], collection="c") == [{"n": 1}, {"n": 2}]
            assert 90 < cast(float, sync.ttl("a", collection="c")[1]) <= 100
            sync.put("x", {"n": 3})
            assert sync.delete("a", collection="c")
            assert await store.keys("c") == ["b"]
            assert await store.get("x") == {"n": 3}
            assert await store.collections() == sync.collections() == ["c", "default_collection"]

        asyncio.run(body())


def test_it_works_under_every_event_loop(in_loop: InLoop, tmp_path: Path) -> None:
    """asyncio, trio and anyio: a store that opens and closes its own job, and what was written is there again."""

    async def body() -> None:
        async with PersistencyStore(directory=tmp_path) as store:
            await store.put("a", {"n": 1}, ttl=100)
            await store.put_many(["b"], [{"n": 2}])
            assert await store.get_many(["a", "b"]) == [{"n": 1}, {"n": 2}]
            assert await store.keys() == ["a", "b"]
        async with PersistencyStore(directory=tmp_path) as store:
            assert await store.delete_many(["a", "b"]) == 2

    in_loop(bounded, body)


def test_many_tasks_set_a_store_up_once_under_every_event_loop(in_loop: InLoop, tmp_path: Path) -> None:
    """They come to one that nobody has entered: one opens the job, the others wait, and are told if it can't."""

    async def tell(store: PersistencyStore, n: int) -> None:
        await store.put(str(n), {"n": n})
        told.append("fine")

    async def fail(store: PersistencyStore) -> None:
        try:
            await store.get("a")
        except StoreSetupError as error:
            told.append(type(error.__cause__))

    async def body() -> None:
        store = PersistencyStore(directory=tmp_path / "root")
        async with anyio.create_task_group() as tasks:
            for n in range(8):
                tasks.start_soon(tell, store, n)
        assert len(await store.keys()) == 8
        await store.close()
        broken = PersistencyStore(directory=tmp_path / "broken")
        async with anyio.create_task_group() as tasks:
            for _ in range(8):
                tasks.start_soon(fail, broken)
        await fail(broken)
        await broken.close()

    told: list[Any] = []
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "keyvalue.db").write_bytes(b"no database" * 1000)
    in_loop(bounded, body)
    assert told[:8] == ["fine"] * 8
    assert len(told[8:]) == 9
    assert all(issubclass(cause, PersistencyError) for cause in told[8:])


def test_what_a_seed_cant_be_stored_for_stays_told(in_loop: InLoop, tmp_path: Path) -> None:
    """A seed that is too much for the job fails whoever comes, under every event loop, and leaves the job closed."""
    seed = {"c": {"a": {"text": "x" * 100}}}

    async def body() -> None:
        store = PersistencyStore(directory=tmp_path, max_bytes=10, seed=seed)
        for _ in range(2):
            with pytest.raises(StoreSetupError) as failed:
                await store.get("a")
            assert isinstance(failed.value.__cause__, QuotaExceeded)
        await store.close()

    in_loop(bounded, body)
    with pytest.raises(QuotaExceeded):
        SyncPersistencyStore(directory=tmp_path, max_bytes=10, seed=seed)
    with Persistency(tmp_path) as p:
        assert p.open_job("keyvalue", max_bytes=None).count("keyvalue").result() == 0


def test_a_setup_that_is_cancelled_is_made_up_for(in_loop: InLoop, tmp_path: Path) -> None:
    """Who waited for it is told; the next one sets the store up."""

    async def body() -> None:
        store = PersistencyStore(directory=tmp_path)
        with anyio.CancelScope() as scope:
            scope.cancel()
            await store.get("a")
        assert scope.cancelled_caught
        await store.put("a", {"n": 1})
        assert await store.get("a") == {"n": 1}
        await store.close()

    in_loop(bounded, body)


def test_what_is_given_stays_open_and_what_is_opened_is_closed(tmp_path: Path) -> None:
    """Closing a store leaves a job alone that it was given; its own it closes, and the file is free for others."""

    async def body() -> None:
        async with Persistency(tmp_path / "one") as p:
            job = await p.aopen_job("a")
            async with PersistencyStore(job) as store:
                await store.put("a", {})
            await store.close()
            assert await job.count("keyvalue") == 1
        store = PersistencyStore(directory=tmp_path / "two", job_id="mine", durability="power")
        await store.put("a", {"n": 1})
        assert "two" not in repr(store)
        await store.close()
        with pytest.raises(Closed, match="new store"):
            await store.get("a")
        with pytest.raises(Closed, match="new store"):
            await store.__aenter__()
        with SyncPersistencyStore(directory=tmp_path / "two", job_id="mine") as sync:
            assert sync.get("a") == {"n": 1}
        sync.close()
        with pytest.raises(Closed, match="new store"):
            sync.get("a")
        assert "mine" in repr(sync)
        async with PersistencyStore(directory=tmp_path / "two", job_id="mine") as store:
            assert await store.get("a") == {"n": 1}
        with pytest.raises(Closed, match="new store"):
            await store.get("a")

    asyncio.run(bounded(body))


OWNER = """
import sys
from persistency import Persistency
with Persistency(sys.argv[1]) as p:
    p.open_job("keyvalue")
    print("open", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def owned_elsewhere(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Have another process own the job, until its input is closed."""
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "open\n"
        yield owner
        assert owner.stdin is not None
        owner.stdin.close()


def test_a_job_that_another_process_owns_is_told_and_can_be_tried_again(
    tmp_path: Path, owned_elsewhere: subprocess.Popen[str]
) -> None:
    """It is their `StoreSetupError`, which says why; once the job is free the same store works."""

    async def body() -> None:
        store = PersistencyStore(directory=tmp_path)
        with pytest.raises(StoreSetupError, match="process"):
            await store.get("a")
        with pytest.raises(StoreSetupError, match="process"):
            SyncPersistencyStore(directory=tmp_path)
        assert owned_elsewhere.stdin is not None
        owned_elsewhere.stdin.close()
        owned_elsewhere.wait(30)
        await store.put("a", {"n": 1})
        assert await store.get("a") == {"n": 1}
        await store.close()

    asyncio.run(bounded(body))


def test_wrong_arguments_are_told_at_the_call(tmp_path: Path) -> None:
    """`Misuse` for what a store can't be made of, or asked for; an unknown option is Python's own error."""
    with Persistency(tmp_path) as p:
        job = p.open_job("a")
        for store in (PersistencyStore, SyncPersistencyStore):
            made = cast(Any, store)
            for arguments in (
                {},
                {"runner": job, "directory": tmp_path},
                {"runner": p},
                {"runner": "data"},
                {"runner": job, "durability": "power"},
                {"runner": job, "name": ""},
                {"runner": job, "name": "n" * 256},
                {"runner": job, "name": "\ud800"},
                {"runner": job, "name": 5},
                {"directory": 5},
                {"directory": ""},
                {"directory": tmp_path / "new", "job_id": ""},
                {"directory": tmp_path / "new", "default_collection": 5},
                {"directory": tmp_path / "new", "seed": [1]},
                {"directory": tmp_path / "new", "seed": {"c": 5}},
            ):
                with pytest.raises(Misuse):
                    made(**arguments)
            with pytest.raises(TypeError, match="durabillity"):
                made(directory=tmp_path / "new", durabillity="power")
            with pytest.raises(SerializationError):
                made(directory=tmp_path / "new", seed={"c": {"a": {"x": object()}}})
            with pytest.raises(InvalidKeyError):
                made(directory=tmp_path / "new", seed={"c": {"\ud800": {}}})
        assert not (tmp_path / "new").exists()
        late = PersistencyStore(directory=tmp_path / "new", durability=cast(Any, "x"))
        for _ in range(2):
            with pytest.raises(Misuse, match="durability"):
                asyncio.run(late.get("a"))
        with pytest.raises(Misuse, match="durability"):
            SyncPersistencyStore(directory=tmp_path / "new", durability=cast(Any, "x"))
        sync = cast(Any, SyncPersistencyStore(job))
        for call in (
            lambda: sync.get(5),
            lambda: sync.put("a", {}, collection=5),
            lambda: sync.keys(limit="2"),
            lambda: sync.keys(5),
            lambda: sync.destroy_collection(5),
        ):
            with pytest.raises(TypeError):
                call()


# -- at once ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["job", "baton", "directory"], indirect=True)
def test_sixty_four_tasks_at_once(kind: Kind) -> None:
    """Each of 64 tasks, which all begin with a store that isn't set up, finds just what it has written itself."""

    async def body(store: Any) -> None:
        async def work(task: int) -> None:
            for round_ in range(5):
                name = f"{task}-{round_}"
                assert await store.get(name) is None
                await store.put(name, {"task": task})
                await store.put_many([name, f"{name}-b"], [{"task": task, "n": 2}, {}], collection=f"c{task}")
                assert await store.get_many([name], collection=f"c{task}") == [{"task": task, "n": 2}]
                assert await store.delete(name)

        await asyncio.gather(*map(work, range(64)))
        assert len(await store.collections()) == 64
        assert await store.keys() == []

    kind.use(body)


def test_bulk_writes_are_seen_whole(twin: Kind) -> None:
    """Readers of ten keys never see two writes mixed: a bulk write is one step, and a bulk read one state."""
    names = [f"k{n}" for n in range(10)]

    async def body(store: Any) -> None:
        async def write(writer: int) -> None:
            for n in range(20):
                await store.put_many(names, [{"by": (writer, n)}] * len(names))
                if n % 5 == 4:
                    await store.delete_many(names)

        async def read() -> None:
            for _ in range(60):
                seen = await store.get_many(names)
                assert all(value == seen[0] for value in seen), seen

        await asyncio.gather(*map(write, range(4)), *(read() for _ in range(4)))

    twin.use(body)


@pytest.mark.parametrize("kind", ["job", "baton", "directory"], indirect=True)
def test_who_stops_waiting_harms_nobody(kind: Kind) -> None:
    """Writes that are cancelled at any moment are there whole or not at all, and the store goes on."""
    names = [f"k{n}" for n in range(10)]

    async def body(store: Any) -> None:
        for turns in range(12):
            task = asyncio.ensure_future(store.put_many(names, [{"turn": turns}] * len(names)))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            seen = await store.get_many(names)
            assert all(value == seen[0] for value in seen), seen
        await store.put_many(names, [{"turn": "last"}] * len(names))
        assert await store.get_many(names) == [{"turn": "last"}] * len(names)

    kind.use(body)


WORKER = """
import sys
from persistency import Persistency
from persistency.integrations.keyvalue import SyncPersistencyStore
from persistency.recipes import Baton
root, name = sys.argv[1:]
with Persistency(root) as p:
    baton = Baton(p, "keyvalue")
    store = SyncPersistencyStore(baton)
    for n in range(30):
        store.put(f"{name}-{n}", {"by": name, "n": n})
        assert store.get(f"{name}-{n}") == {"by": name, "n": n}
    baton.close()
"""


def test_several_processes_share_a_store_by_a_baton(tmp_path: Path) -> None:
    """Two processes write at once, and each finds what it has written; afterwards all of it is there."""
    workers = [subprocess.Popen([sys.executable, "-W", "error", "-c", WORKER, str(tmp_path), name]) for name in "ab"]
    assert [worker.wait(60) for worker in workers] == [0, 0]
    with SyncPersistencyStore(directory=tmp_path) as store:
        assert len(store.keys()) == 60
        assert store.get("b-29") == {"by": "b", "n": 29}


# -- their wrappers --------------------------------------------------------------------------------------------------


def beside(store: PersistencyStore) -> PersistencyStore:
    """Another store in the same job."""
    return PersistencyStore(store._rows.runner, name="cache")


TRANSPARENT: dict[str, Callable[[Any], Any]] = {
    "compression": lambda store: CompressionWrapper(store, min_size_to_compress=16),
    "prefix_keys": lambda store: PrefixKeysWrapper(store, prefix="p"),
    "prefix_collections": lambda store: PrefixCollectionsWrapper(store, prefix="p"),
    "single_collection": lambda store: SingleCollectionWrapper(store, single_collection="all"),
    "ttl_clamp": lambda store: TTLClampWrapper(store, min_ttl=1, max_ttl=1000),
    "statistics": StatisticsWrapper,
    "retry": RetryWrapper,
    "timeout": lambda store: TimeoutWrapper(store, timeout=30.0),
    "passthrough_cache": lambda store: PassthroughCacheWrapper(store, cache_key_value=beside(store)),
    "several": lambda store: StatisticsWrapper(PrefixKeysWrapper(CompressionWrapper(store), prefix="p")),
}  # fmt: skip


@pytest.mark.parametrize("wrap", TRANSPARENT.values(), ids=TRANSPARENT)
def test_their_wrappers_work_on_top(tmp_path: Path, wrap: Callable[[Any], Any]) -> None:
    """Through each of them a store answers as it does without."""

    async def body(plain: Any) -> None:
        store = wrap(plain)
        value = {"text": "long enough to be worth compressing " * 20}
        await store.put("a", value, collection="c", ttl=100)
        await store.put_many(["b", "d"], [{"n": 1}, {"n": 2}], collection="c")
        assert await store.get("a", collection="c") == value
        found, left = await store.ttl("a", collection="c")
        assert found == value
        assert 90 < left <= 100
        assert await store.get_many(["a", "b", "x"], collection="c") == [value, {"n": 1}, None]
        assert await store.delete("a", collection="c") is True
        assert await store.delete_many(["a", "b"], collection="c") == 1
        assert await store.get("a", collection="c") is None

    Kind("job", tmp_path).use(body)


def test_their_guarding_wrappers_guard(tmp_path: Path) -> None:
    """What a wrapper keeps out is kept out, and never reaches the store."""

    async def body(store: Any) -> None:
        with pytest.raises(ReadOnlyError):
            await ReadOnlyWrapper(store, raise_on_write=True).put("a", {})
        with pytest.raises(EntryTooLargeError):
            await LimitSizeWrapper(store, max_size=100, raise_on_too_large=True).put("a", {"text": "x" * 200})
        assert await DefaultValueWrapper(store, default_value={"n": 0}).get("a") == {"n": 0}
        assert await store.keys() == []

    Kind("job", tmp_path).use(body)


# -- their own suite -------------------------------------------------------------------------------------------------

# One test of theirs is for caches alone: `test_not_unbounded` wants the first of a thousand values to be gone. A store
# that is durable drops nothing; several of their own stores leave that test out for the same reason.
DRIVER = """
import tempfile
from pathlib import Path

import pytest

from persistency import Persistency
from persistency.integrations.keyvalue import PersistencyStore, SyncPersistencyStore
from persistency.recipes import Baton
from tests.stores.base import BaseStoreTests, ContextManagerStoreTestMixin


class TestJob(BaseStoreTests):
    test_not_unbounded = None

    @pytest.fixture
    async def store(self):
        async with Persistency(":memory:") as p:
            yield PersistencyStore(await p.aopen_job("a"))


class TestDirectory(ContextManagerStoreTestMixin, BaseStoreTests):
    test_not_unbounded = None

    @pytest.fixture
    async def store(self, per_test_temp_dir: Path):
        return PersistencyStore(directory=per_test_temp_dir)


class TestBaton(BaseStoreTests):
    test_not_unbounded = None

    @pytest.fixture
    async def store(self, per_test_temp_dir: Path):
        async with Persistency(per_test_temp_dir) as p:
            baton = Baton(p, "a")
            yield PersistencyStore(baton)
            await baton.aclose()


class Shim:
    def __init__(self, store):
        for name in ("get", "get_many", "ttl", "ttl_many", "put", "put_many", "delete", "delete_many"):
            setattr(self, name, self.awaited(getattr(store, name)))

    @staticmethod
    def awaited(verb):
        async def call(*args, **options):
            return verb(*args, **options)

        return call


class TestSyncTwin(BaseStoreTests):
    test_not_unbounded = None

    @pytest.fixture
    async def store(self):
        with Persistency(":memory:") as p:
            yield Shim(SyncPersistencyStore(p.open_job("a")))
"""
PER_CLASS = {"TestJob": 1, "TestDirectory": 2, "TestBaton": 1, "TestSyncTwin": 1}  # how often each test is run there


# Warnings aren't errors there: importing the suite makes an event loop that nobody closes.
@pytest.mark.skipif(not SUITE, reason="PERSISTENCY_KEY_VALUE_SUITE names no checkout of py-key-value")
def test_their_own_suite_passes_unmodified(tmp_path: Path) -> None:
    """Every test of their `BaseStoreTests` passes for each kind of store, and none is skipped."""
    (tmp_path / "test_driver.py").write_text(DRIVER)
    (tmp_path / "pytest.ini").write_text(
        textwrap.dedent("""\
            [pytest]
            asyncio_mode = auto
            asyncio_default_fixture_loop_scope = function
            """)
    )
    report = tmp_path / "report.xml"
    plugins = ["-p", "pytest_asyncio.plugin", "-p", "no:anyio", "-p", "no:cacheprovider", "-p", "no:xdist"]
    options = ["-c", str(tmp_path / "pytest.ini"), "--rootdir", str(tmp_path), f"--junitxml={report}", "-q"]
    options.append(f"--basetemp={tmp_path / 'base'}")
    path = os.pathsep.join([SUITE, str(Path(__file__).parent.parent)])  # their `tests` before ours
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *plugins, *options, str(tmp_path / "test_driver.py")],
        env={**os.environ, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-1000:]
    suite = ET.parse(report).getroot().find("testsuite")
    assert suite is not None
    cases = [case.get("classname", "").rpartition(".")[2] for case in suite.iter("testcase")]
    assert {suite.get(what) for what in ("failures", "errors", "skipped")} == {"0"}
    once = cases.count("TestJob")
    assert once > 60
    assert {name: cases.count(name) for name in PER_CLASS} == {name: once * times for name, times in PER_CLASS.items()}
    print(json.dumps({"passed": len(cases)}))
