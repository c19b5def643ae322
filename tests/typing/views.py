"""A program as a user would write it, about views: it has no type error, and what it says of types is so."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_type

import msgspec
import pydantic

from persistency import (
    CBOR,
    RAW,
    Category,
    CategoryEntry,
    CategoryMapping,
    CategoryRow,
    Change,
    ChangeFeed,
    Codec,
    Collection,
    Job,
    Key,
    KVStore,
    Persistency,
    Record,
    Reply,
    SharedStore,
    key,
    typed,
)


@dataclass
class User:
    """A dataclass."""

    name: str
    logins: int = 0


class Point(msgspec.Struct):
    """A struct."""

    x: int


class Order(pydantic.BaseModel):
    """A model."""

    number: int


class Text:
    """A codec of the program's own."""

    def encode(self, value: str) -> bytes:
        return value.encode()

    def decode(self, data: bytes) -> str:
        return data.decode()


def codecs(job: Job) -> None:
    """The codec says what the values are."""
    assert_type(typed(User), Codec[User])
    assert_type(Category(job, "a"), Category[tuple[Any, ...], Any])
    assert_type(Category(job, "a", CBOR), Category[tuple[Any, ...], Any])
    assert_type(Category(job, "a", RAW), Category[tuple[Any, ...], bytes])
    assert_type(Category(job, "a", Text()), Category[tuple[Any, ...], str])
    assert_type(Category(job, "a", typed(User)), Category[tuple[Any, ...], User])
    assert_type(Category(job, "a", typed(Point)), Category[tuple[Any, ...], Point])
    assert_type(Category(job, "a", typed(Order)), Category[tuple[Any, ...], Order])


def keys_said(job: Job) -> None:
    """The type of the keys is said by an annotation, or where the category is made."""
    users: Category[tuple[str, int], User] = Category(job, "users", typed(User))
    assert_type(users, Category[tuple[str, int], User])
    assert_type(Category[tuple[str, int], User](job, "users", typed(User)), Category[tuple[str, int], User])
    counts = Category[tuple[str], dict[str, int]](job, "counts")
    counts.put(("a",), {"n": 1})
    assert_type(counts.get(("a",)).result(), dict[str, int] | None)
    assert_type(Category[tuple[str]](job, "counts"), Category[tuple[str], Any])
    takes_users(users)
    takes_users(Category(job, "users", typed(User)))
    takes_any(users)


def takes_users(users: Category[tuple[str, int], User]) -> None:
    """Take one of a kind."""
    users.put(("eu", 7), User("ada"))
    for place, user in users.list(("eu",)):
        assert_type(place, tuple[str, int])
        assert_type(user, User)
        region, number = place
        assert_type(region, str)
        assert_type(number + 1, int)
    assert_type(users.get_many([("eu", 7)]).result()["eu", 7], User)


def takes_any(category: Category) -> int:
    """Take whatever category it is."""
    return category.count().result()


def keys_unsaid(job: Job) -> None:
    """Without, any tuple is a key."""
    users = Category(job, "users", typed(User))
    users.put(("eu", 7), User("ada"), ttl=60)
    users.put(key("eu", 8), User("bob"))
    users.put(("one",), User("eve"))
    assert_type(users.get(("eu", 7)), Reply[User | None])
    assert_type(users.get(("eu", 7)).result(), User | None)
    assert_type(users.get(("eu", 7), User("nobody")).result(), User)
    assert_type(users.get(("eu", 7), 0).result(), User | int)
    assert_type(users.entry(("eu", 7)).result(), CategoryEntry[User] | None)
    found = users.get_many([("eu", 7), key("eu", 8)]).result()
    assert_type(found["eu", 7], User)
    assert_type(found[key("eu", 8)], User)
    assert_type(found.get(("eu", 9)), User | None)
    assert_type(list(found.values()), list[User])
    assert_type(users.scan(limit=1).result(), list[CategoryRow[User]])
    for row in users.scan_prefix(("eu",)).result():
        assert_type(row.key, Key)
        assert_type(row.value.name, str)
    assert_type(users.snapshot().result()[0].value, User)
    for each in users.iterate():
        assert_type(each, CategoryRow[User])
    for one in users.iterate(keys_only=True):
        assert_type(one, Key)
    for place, user in users.list():
        assert_type(place, tuple[Any, ...])
        assert_type(user, User)
    assert_type(users.compare_and_set(("eu", 7), None, User("ada")).result(), bool)
    assert_type(users.compare_and_set(("eu", 7), User("ada"), None).result(), bool)
    assert_type(Category(job, "numbers").increment(("a",)).result(), int)
    assert_type(users.delete_acked(("eu", 7)).result(), bool)
    assert_type(users.job, Job)
    assert_type(users.codec, Codec[User])


def mappings(job: Job) -> None:
    """A mapping's keys are bare or tuples: anything, unless the program says what its own are."""
    ages = Category(job, "ages", Text()).mapping()
    assert_type(ages, CategoryMapping[Any, str])
    ages["ada"] = "36"
    ages["eu", 7] = "37"
    assert_type(ages["ada"], str)
    assert_type(ages.get("ada"), str | None)
    assert_type(ages.get("ada", ""), str)
    assert_type(ages.get("ada", 0), str | int)
    assert_type(ages.pop("ada"), str)
    assert_type(ages.pop("ada", None), str | None)
    assert_type(ages.setdefault("ada", "38"), str)
    del ages["ada"]
    counts: CategoryMapping[str, int] = Category(job, "counts").mapping()
    counts["ada"] = counts.get("ada", 0) + 1
    counts[key("ada")] += 1
    assert_type(list(counts), list[str])
    assert_type(dict(counts), dict[str, int])
    assert_type(list(counts.items()), list[tuple[str, int]])
    assert_type(max(counts.values()), int)
    assert_type(counts.popitem(), tuple[str, int])
    plain: Mapping[str, int] = counts
    mutable: MutableMapping[str, int] = Category(job, "counts").mapping()
    assert len(plain) == len(mutable) == 0


def texts(job: Job) -> None:
    """Text keys and bytes."""
    store = KVStore(job)
    store.set("city:berlin", b"52.5").result()
    store.set_with_ttl("forecast", bytearray(b"sunny"), ttl=3600).result()
    assert_type(store.get("city:berlin"), Reply[bytes | None])
    assert_type(store.get_many(["city:berlin"]).result(), dict[str, bytes])
    assert_type(store.has("city:berlin").result(), bool)
    assert_type(store.list("city:", limit=3).result(), list[str])
    assert_type(store.delete("city:berlin").result(), bool)
    assert_type(store.delete_by_prefix("city:").result(), int)
    assert_type(store.storage_used().result(), int)


def shared(p: Persistency) -> None:
    """Collections that clients follow."""
    with SharedStore(p) as store:
        users = store.open("users", kind="permanent", primary="name")
        assert_type(users, Collection)
        record = users.set({"name": "ada"}).result()
        assert_type(record, Record)
        assert_type(record.seq, int)
        assert_type(users.delete("ada").result(), int | None)


async def loops(root: Path) -> None:
    """The same under an event loop."""
    async with Persistency(root) as p:
        job = await p.aopen_job("async", feed_changes_max=100)
        feed = ChangeFeed(job, "users")
        users: Category[tuple[str], User] = Category(job, "users", typed(User))
        users.put(("ada",), User("ada"))
        assert_type(await users.get(("ada",)), User | None)
        async for place, user in users.list():
            assert_type(place, tuple[str])
            assert_type(user, User)
        async for row in users.iterate():
            assert_type(row, CategoryRow[User])
        async for change in feed:
            assert_type(change, Change)
            assert_type(change.payload, bytes | None)
            break
        feed.close()


if __name__ == "__main__":
    with Persistency(Path(sys.argv[1])) as opened:
        alpha = opened.open_job("alpha")
        codecs(alpha)
        keys_said(alpha)
        texts(alpha)
        alpha.delete_prefix("users", ("eu",))
        keys_unsaid(alpha)
        mappings(opened.open_job("mappings"))
        shared(opened)
    asyncio.run(loops(Path(sys.argv[1])))
