"""A plugin's store as its guest sees it: the statements of the reference system, and what else the ABI promises.

Everything goes through a guest, with the time moved by hand, over both adapters; a test names the statements it covers.
Where the service is deliberately not as the reference system, the test says so.
"""

from __future__ import annotations

import sqlite3
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistency import KVStore, Persistency, Poisoned, Put, Reply, Transaction, WriteFailed, key

pytest.importorskip("wasmtime", reason="needs the extra plugins")

import wasmtime

from persistency.plugins import CallFailed, KVGrant, PermissionDenied, PluginHost, PluginTimeout, abi, guestmemory
from persistency.plugins.context import CallContext
from persistency.plugins.guestmemory import Fault, GuestMemory
from persistency.plugins.kvservice import VALUE_BYTES_MAX, functions
from persistency.storage.port import PAYLOAD_BYTES_MAX
from tests.conftest import Wall
from tests.plugins.guests import (
    EVERYTHING,
    FAIL,
    LAST_ERROR,
    READING,
    WAIT,
    WRITING,
    Answer,
    Argument,
    Guest,
    Room,
    a_list,
    listed,
    load,
)
from tests.storage.conftest import FaultyDisk

MB = 1_000_000


@pytest.fixture
def host(persistency: Persistency, compiled: Path) -> Iterator[PluginHost]:
    """Give a host over either adapter."""
    with PluginHost(persistency, cache_dir=compiled) as opened:
        yield opened


@pytest.fixture
def guest(host: PluginHost) -> Guest:
    """Give a guest with an empty store of a megabyte."""
    return load(host, "plugin", KVGrant())


@contextmanager
def on_disk(root: Path, wall: Wall | None = None) -> Iterator[PluginHost]:
    """Open a host on a directory, and close it."""
    with Persistency(root, **({"clock": wall} if wall else {})) as persistency, PluginHost(persistency) as host:
        yield host


def fill(guest: Guest, *keys: bytes, value: bytes = b"x") -> None:
    """Set these keys."""
    for each in keys:
        assert guest.ask("kv_set", each, value).result == 0


def got(guest: Guest, text: bytes) -> bytes | None:
    """Get a value of at most a thousand bytes; `None` if there is no such key."""
    answer = guest.ask("kv_get", text, Room(1_000))
    return None if answer.result == abi.NOT_FOUND else answer.written


def keys_of(guest: Guest, prefix: bytes = b"", *, after: bytes = b"", room: int = 10_000) -> list[bytes | None]:
    """List one page of keys."""
    return listed(guest.ask("kv_list", prefix, after, Room(room)).written)


def many(guest: Guest, *keys: bytes) -> list[bytes | None]:
    """Get several values."""
    return listed(guest.ask("kv_get_many", a_list(*keys), Room(10_000)).written)


def used(guest: Guest) -> int:
    """Ask how many bytes are used."""
    return guest.ask("kv_storage_used").result


def swapped(guest: Guest, text: bytes, expected: bytes | None, new: bytes | None) -> int:
    """Compare and set."""
    return guest.ask("kv_compare_and_set", text, expected, new).result


def why(guest: Guest, *step: Any) -> tuple[int, str]:
    """Have a host function called, and return its error number and what `last_error` says to it."""
    first, told = guest.steps(step, ("last_error", Room(4_096)))
    return first.result, told.written.decode()


# Every function that takes a key or a prefix, and what else it is given.
TAKING_KEYS: dict[str, Callable[[bytes], tuple[Argument, ...]]] = {
    "kv_set": lambda text: (text, b"x"),
    "kv_set_with_ttl": lambda text: (text, b"x", 60_000),
    "kv_get": lambda text: (text, Room(10)),
    "kv_get_many": lambda text: (a_list(b"fine", text), Room(20)),
    "kv_has": lambda text: (text,),
    "kv_list": lambda text: (text, b"", Room(600)),
    "kv_delete": lambda text: (text,),
    "kv_delete_by_prefix": lambda text: (text,),
    "kv_compare_and_set": lambda text: (text, None, b"x"),
}
GOOD = {abi.NOT_FOUND, *range(1_000)}  # what they answer with when nothing is wrong


# -- set, get, has, delete --------------------------------------------------------------------------------------------


def test_the_abi_is_what_guests_were_built_for() -> None:
    """S0-86: the functions and their types are those the guest here has written down by itself."""
    kinds = {"p": "i32", "n": "i32", "l": "i64"}
    there = {(each.name, " ".join(kinds[letter] for letter in each.parameters)) for each in abi.FUNCTIONS}
    assert there == {(each.name, each.parameters) for each in EVERYTHING}
    assert {each.name for each in abi.FUNCTIONS if each.writes} == {each.name for each in WRITING}
    assert {each.name for each in abi.FUNCTIONS if each.service is None} == {LAST_ERROR.name, FAIL.name}


def test_set_and_get(guest: Guest) -> None:
    """S0-15, S0-16, S0-17, S0-89: what was set is got, by a later call too; a missing key is told, the last wins."""
    assert guest.ask("kv_get", b"k", Room(10)) == Answer(abi.NOT_FOUND, b"\xa5" * 10)
    assert guest.ask("kv_set", b"k", b"first") == Answer(0)
    assert got(guest, b"k") == b"first"
    before, after = guest.steps(("kv_set", b"k", b"second"), ("kv_get", b"k", Room(10)))
    assert (before.result, after.written) == (0, b"second")
    assert keys_of(guest) == [b"k"]


def test_values_are_any_bytes(guest: Guest) -> None:
    """S0-19: NUL, 0xFF, every byte, and none at all come back as they were; so do keys with a NUL."""
    values = [b"", b"\0", b"\xff", b"\0\xff\0", bytes(range(256))]
    for number, value in enumerate(values):
        assert guest.ask("kv_set", b"k\0%d" % number, value).result == 0
    assert [got(guest, b"k\0%d" % number) for number in range(len(values))] == values
    assert got(guest, b"k") is None


def test_a_value_comes_whole_or_not_at_all(guest: Guest) -> None:
    """A room that is too small is told how long the value is, and stays as it was; one without bytes asks for that."""
    fill(guest, b"k", value=b"12345")
    for room in (0, 1, 4):
        assert guest.ask("kv_get", b"k", Room(room)) == Answer(5, b"\xa5" * room)
    assert guest.ask("kv_get", b"k", Room(5)) == Answer(5, b"12345")


def test_has_and_delete(guest: Guest) -> None:
    """S0-24, S0-25, S0-26: a key is there or isn't; deleting says which it was, and a missing one is no error."""
    fill(guest, b"k", b"kk", value=b"")
    assert [guest.ask("kv_has", text).result for text in (b"k", b"kk", b"K", b"k ", b"kkk")] == [1, 1, 0, 0, 0]
    assert [guest.ask("kv_delete", b"k").result for _ in range(2)] == [1, 0]
    assert got(guest, b"k") is None
    assert keys_of(guest) == [b"kk"]


@pytest.mark.parametrize("name", TAKING_KEYS)
def test_a_key_has_1_to_256_bytes(name: str, guest: Guest) -> None:
    """S0-20, S0-21, S0-22, S0-61: counted in bytes, by every function alike; only the prefix of a list may be empty."""
    make = TAKING_KEYS[name]
    for good in (b"x", b"\0", b"x" * 256, "ü".encode() * 128, "\U0001f600".encode() * 64):
        assert guest.ask(name, *make(good)).result in GOOD
    before = used(guest), keys_of(guest)
    for bad in (b"x" * 257, b"x" * 300, "ü".encode() * 128 + b"x", b"x" * 60_000):
        number, text = why(guest, name, *make(bad))
        assert number == abi.INVALID
        assert f"{len(bad)} bytes, at most 256" in text or "list of keys" not in text
    if name == "kv_list":
        assert guest.ask(name, *make(b"")).result in GOOD
    else:
        number, text = why(guest, name, *make(b""))
        assert (number, "empty" in text) == (abi.INVALID, True)
    assert (used(guest), keys_of(guest)) == before


@pytest.mark.parametrize("name", TAKING_KEYS)
def test_a_key_is_utf_8(name: str, guest: Guest) -> None:
    """S0-22, S0-23: what isn't UTF-8, surrogates included, is refused by every function, and it says where."""
    for bad in (b"\xff", b"abc\xc3", b"\xed\xa0\x80", b"\xc0\x80"):
        number, text = why(guest, name, *TAKING_KEYS[name](bad))
        assert number == abi.INVALID
        assert "UTF-8" in text
    assert keys_of(guest) == []


@pytest.mark.parametrize("name", TAKING_KEYS)
def test_a_manifest_may_allow_shorter_keys_only(name: str, host: PluginHost) -> None:
    """S0-21: the limit of the grant holds for every function, in bytes."""
    guest = load(host, "short", KVGrant(max_key_bytes=4))
    make = TAKING_KEYS[name]
    assert guest.ask(name, *make("üü".encode())).result in GOOD
    number, text = why(guest, name, *make("üüx".encode()))
    assert number == abi.INVALID
    assert "at most 4" in text or "at most 8000" in text


# -- time to live -----------------------------------------------------------------------------------------------------


def test_a_value_ends_when_its_time_is_over(guest: Guest, wall: Wall) -> None:
    """S0-28, S0-30, S0-31, S0-32, S0-35, S0-39, S0-40: there until the last millisecond, and then for nobody."""
    for ttl_ms in (1, 3, 1_000, 10**13):
        assert guest.ask("kv_set_with_ttl", b"k", b"brief", ttl_ms).result == 0
        wall.ms += ttl_ms - 1
        assert (got(guest, b"k"), guest.ask("kv_has", b"k").result) == (b"brief", 1)
        wall.ms += 1
        assert (got(guest, b"k"), guest.ask("kv_has", b"k").result) == (None, 0)


def test_nothing_that_has_ended_is_seen(guest: Guest, wall: Wall) -> None:
    """S0-27, S0-31, S0-32, S0-33, S0-34, S0-42, S0-65, S0-77: no function gives it, counts it, or has removed it.

    The reference system counts what has ended and is deleted by its prefix; here it wasn't there.
    """
    fill(guest, b"a:stays")
    guest.ask("kv_set_with_ttl", b"a:ends", b"123", 1_000)
    assert (keys_of(guest, b"a:"), used(guest)) == ([b"a:ends", b"a:stays"], 4)
    wall.ms += 1_000
    assert keys_of(guest, b"a:") == keys_of(guest) == [b"a:stays"]
    assert many(guest, b"a:ends", b"a:stays") == [None, b"x"]
    assert used(guest) == 1
    assert swapped(guest, b"a:ends", b"123", b"x") == 0
    assert guest.ask("kv_delete", b"a:ends").result == 0
    guest.ask("kv_set_with_ttl", b"a:more", b"123", 1)
    wall.ms += 1
    assert guest.ask("kv_delete_by_prefix", b"a:").result == 1


@pytest.mark.parametrize("ttl_ms", [0, -1, -5_000, -(2**63), 10**13 + 1, 3 * 10**14, 2**63 - 1])
def test_a_time_to_live_is_more_than_nothing_and_not_for_ever(ttl_ms: int, guest: Guest, wall: Wall) -> None:
    """S0-29, S0-41: none, less, and what is beyond all use are refused, store nothing, and make no key permanent."""
    number, text = why(guest, "kv_set_with_ttl", b"k", b"x", ttl_ms)
    assert number == abi.INVALID
    assert text
    assert keys_of(guest) == []
    wall.ms += 1
    assert got(guest, b"k") is None


@pytest.mark.parametrize("ended", [False, True])
def test_a_plain_set_stays(ended: bool, guest: Guest, wall: Wall) -> None:
    """S0-36: set makes a key permanent that had a time to live, also when that was over."""
    guest.ask("kv_set_with_ttl", b"k", b"old", 1_000)
    wall.ms += 1_000 if ended else 999
    fill(guest, b"k", value=b"new")
    wall.ms += 10**9
    assert got(guest, b"k") == b"new"


@pytest.mark.parametrize("ended", [False, True])
def test_a_key_is_revived_with_another_time_to_live(ended: bool, guest: Guest, wall: Wall) -> None:
    """S0-37: set_with_ttl replaces the value and the time, of a permanent key, one that ends and one that has."""
    fill(guest, b"k")
    for value, ttl_ms in ((b"old", 1_000), (b"new", 5_000)):
        assert guest.ask("kv_set_with_ttl", b"k", value, ttl_ms).result == 0
        wall.ms += 1_000 if ended else 999
    assert got(guest, b"k") == b"new"
    wall.ms += 4_001
    assert got(guest, b"k") is None


# -- list -------------------------------------------------------------------------------------------------------------

USERS = (b"user:1:name", b"user:1:email", b"user:2:name", b"other")


def test_list(guest: Guest) -> None:
    """S0-49, S0-50, S0-51, S0-52, S0-54, S0-55: all keys sorted, those of a prefix, itself included, and of none."""
    assert keys_of(guest) == []
    fill(guest, *USERS, b"user:")
    assert keys_of(guest) == sorted((*USERS, b"user:"))
    assert keys_of(guest, b"user:1:") == [b"user:1:email", b"user:1:name"]
    assert keys_of(guest, b"user:") == keys_of(guest, b"use") == sorted((*USERS[:3], b"user:"))
    assert keys_of(guest, b"user:3") == keys_of(guest, b"ser") == []


def test_nothing_in_a_prefix_is_a_wildcard_or_a_letter_for_another(guest: Guest) -> None:
    """S0-53, S0-57, S0-58, S0-64, S0-66: %, _, a backslash, and the case of letters are what they are, to delete too.

    In the reference system "user:" also means "USER:", and what is behind a backslash is never found.
    """
    fill(guest, b"a%b", b"aXb", b"a_b", b"dir\\f", b"dirf", b"user:1", b"USER:1", b"User:1")
    assert keys_of(guest, b"a%") == [b"a%b"]
    assert keys_of(guest, b"a_") == [b"a_b"]
    assert keys_of(guest, b"dir\\") == [b"dir\\f"]
    assert keys_of(guest, b"user:") == [b"user:1"]
    assert [guest.ask("kv_delete_by_prefix", text).result for text in (b"a_", b"%", b"user:")] == [1, 0, 1]
    assert keys_of(guest) == sorted([b"a%b", b"aXb", b"dir\\f", b"dirf", b"USER:1", b"User:1"])


def test_keys_are_sorted_by_their_bytes(guest: Guest) -> None:
    """S0-55: the order is that of UTF-8, which is that of code points, also beyond the sixteen-bit ones."""
    keys = [text.encode() for text in ("Z", "a", "~", "é", "\uffff", "\U00010000", "a\0", "\0", "aa")]
    fill(guest, *keys)
    assert keys_of(guest) == sorted(keys)


@pytest.mark.parametrize("room", [8, 9, 64, 300, 65_536])
def test_a_list_comes_in_pages(room: int, guest: Guest) -> None:
    """S0-56: as many whole keys as fit, and the rest behind the last of them; nothing twice, nothing left out."""
    keys = sorted(b"%d" % number for number in range(0, 400, 7)) + [b"9999", b"ABCD"]
    fill(guest, *keys)
    found: list[bytes | None] = []
    after: Any = b""
    while page := keys_of(guest, after=after, room=room):
        assert sum(4 + len(text or b"") for text in page) <= room
        found += page
        after = page[-1]
    assert found == sorted(keys)


def test_a_page_is_as_full_as_it_can_be(guest: Guest) -> None:
    """S0-56: the next key wouldn't have fit; a room without even the first is told so, and stays as it was."""
    fill(guest, b"1", b"22", b"333")
    assert [len(keys_of(guest, room=room)) for room in (5, 10, 11, 17, 18, 1_000)] == [1, 1, 2, 2, 3, 3]
    for room in (0, 1, 4):
        assert guest.ask("kv_list", b"", b"", Room(room)) == Answer(abi.TOO_SMALL, b"\xa5" * room)
    assert guest.ask("kv_list", b"333", b"", Room(6)) == Answer(abi.TOO_SMALL, b"\xa5" * 6)
    assert guest.ask("kv_list", b"4", b"", Room(0)).result == 0
    assert "takes 7 bytes, the room has 6" in why(guest, "kv_list", b"333", b"", Room(6))[1]


def test_the_key_a_page_goes_on_after_is_a_place(guest: Guest) -> None:
    """It needn't be there any more, or ever, and not within the prefix; it isn't given itself."""
    fill(guest, b"a", b"b:1", b"b:2", b"c")
    both = [b"b:1", b"b:2"]
    for after, expected in [
        (b"b:1", both[1:]), (b"b:10", both[1:]), (b"a", both), (b"b:", both), (b"b:2", []), (b"z", []),
    ]:  # fmt: skip
        assert keys_of(guest, b"b:", after=after) == expected
    for bad in (b"\xff", b"x" * 257):
        assert guest.ask("kv_list", b"b:", bad, Room(100)).result == abi.INVALID


def test_a_page_has_at_most_a_thousand_keys(host: PluginHost) -> None:
    """However large the room is."""
    guest = load(host, "plugin", KVGrant(), pages=4)
    assert guest.plugin.store is not None
    for number in range(1_001):
        guest.plugin.store.set(f"{number:04}", b"")
    assert len(keys_of(guest, room=100_000)) == abi.KEYS_PER_CALL_MAX == 1_000
    assert keys_of(guest, after=b"0999", room=100_000) == [b"1000"]


# -- delete_by_prefix -------------------------------------------------------------------------------------------------


def test_delete_by_prefix(guest: Guest) -> None:
    """S0-60, S0-61, S0-62, S0-63: what begins with it goes and is counted, other keys stay; an empty one is refused."""
    fill(guest, *USERS, b"user:", value=b"12")
    assert guest.ask("kv_delete_by_prefix", b"user:1:").result == 2
    assert used(guest) == 6
    assert guest.ask("kv_delete_by_prefix", b"none").result == 0
    number, text = why(guest, "kv_delete_by_prefix", b"")
    assert (number, text) == (abi.INVALID, "the prefix is empty")
    assert guest.ask("kv_delete_by_prefix", b"user:").result == 2
    assert keys_of(guest) == [b"other"]


# -- get_many ---------------------------------------------------------------------------------------------------------


def test_get_many(guest: Guest) -> None:
    """S0-67, S0-68, S0-69, S0-70, S0-72: an entry for each key asked, in that order, twice if it is asked twice.

    The reference system answers with an object of keys, without the missing; here the answer has the order of the
    question, and a missing key a length that no value has.
    """
    fill(guest, b"a", value=b"1")
    fill(guest, b"b", value=b"")
    assert many(guest, b"b", b"no", b"a") == [b"", None, b"1"]
    assert many(guest, b"a", b"a", b"no", b"a") == [b"1", b"1", None, b"1"]
    assert many(guest, b"x", b"y") == [None, None]
    assert many(guest) == []
    assert guest.ask("kv_get_many", b"", Room(0)).result == 0


def test_many_values_come_whole_or_not_at_all(guest: Guest) -> None:
    """The length of the whole answer is told; a room that is smaller by a byte stays as it was."""
    fill(guest, b"a", b"b", value=b"12345")
    asked = a_list(b"a", b"no", b"b")
    for room in (0, 9, 21):
        assert guest.ask("kv_get_many", asked, Room(room)) == Answer(22, b"\xa5" * room)
    assert listed(guest.ask("kv_get_many", asked, Room(22)).written) == [b"12345", None, b"12345"]


def test_any_number_of_keys_up_to_a_thousand_is_asked_for(guest: Guest) -> None:
    """S0-71: there is no smaller number at which it would end."""
    fill(guest, b"0", b"999", value=b"x")
    found = many(guest, *(b"%d" % number for number in range(1_000)))
    assert [at for at, value in enumerate(found) if value] == [0, 999]
    assert why(guest, "kv_get_many", a_list(*[b"k"] * 1_001), Room(9))[0] == abi.INVALID


def test_many_values_are_of_one_moment(guest: Guest) -> None:
    """S0-73: of two keys that are always written together a guest never sees one without the other."""
    store, over = guest.plugin.store, threading.Event()
    assert store is not None

    def write() -> int:
        count = 0
        while not over.is_set():
            count += 1
            store.job.commit([Put("kv", (name,), b"%d" % count) for name in ("a", "b")]).result(WAIT)
        return count

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            found = [many(guest, b"a", b"between", b"b") for _ in range(100)]
        finally:
            over.set()
        assert writing.result(WAIT) > 1
    assert all(one == other for one, _, other in found)
    assert len({one for one, _, _ in found}) > 1


@pytest.mark.parametrize(
    "data",
    [
        b"\x01",
        b"\x01\0\0",
        b"\x01\0\0\0",
        b"\x02\0\0\0a",
        b"\xff\xff\xff\xff",
        b"\xff\xff\xff\xffa",
        b"\x01\0\0\0a\x01",
    ],
)
def test_a_list_that_is_none_is_refused(data: bytes, guest: Guest) -> None:
    """A list of keys that ends in the middle of an entry is told so; none of it is looked up."""
    number, text = why(guest, "kv_get_many", data, Room(100))
    assert number == abi.INVALID
    assert "in the middle of entry" in text


# -- the quota --------------------------------------------------------------------------------------------------------


def small(host: PluginHost, max_bytes: int = 10) -> Guest:
    """Load a guest whose store has little room."""
    return load(host, "small", KVGrant(max_bytes=max_bytes))


def test_used_are_the_values_that_live(guest: Guest, wall: Wall) -> None:
    """S0-38, S0-74, S0-75, S0-76: the bytes of values and not of keys, with each set, overwrite, end and delete."""
    assert used(guest) == 0
    told = []
    for step in (
        ("kv_set", b"a long key", b"12345"), ("kv_set", b"b", b"12345"), ("kv_set", b"b", b"12"),
        ("kv_set", b"b", b"1234567"), ("kv_set_with_ttl", b"c", b"123", 1_000), ("kv_delete", b"b"),
        ("kv_compare_and_set", b"d", None, b"1"),
    ):  # fmt: skip
        guest.ask(*step)
        told.append(used(guest))
    assert told == [5, 10, 7, 12, 15, 8, 9]
    wall.ms += 1_000
    assert used(guest) == 6


@pytest.mark.parametrize("name", ["kv_set", "kv_set_with_ttl", "kv_compare_and_set"])
def test_what_exceeds_the_quota_is_refused(name: str, host: PluginHost) -> None:
    """S0-38, S0-79, S0-80, S0-83: as much as there may be is fine, a byte more changes nothing, and says so."""
    guest = small(host)

    def put(text: bytes, old: bytes | None, value: bytes) -> tuple[int, str]:
        more = {"kv_set": (value,), "kv_set_with_ttl": (value, 60_000), "kv_compare_and_set": (old, value)}
        return why(guest, name, text, *more[name])

    done = int(name == "kv_compare_and_set")
    assert put(b"a", None, b"12345")[0] == done
    assert put(b"b", None, b"12345")[0] == done
    assert used(guest) == 10
    for text, old, value in ((b"c", None, b"1"), (b"a", b"12345", b"123456"), (b"c", None, b"x" * 11)):
        number, told = put(text, old, value)
        assert number == abi.QUOTA
        assert "storage limit exceeded" in told
        assert "of 10 bytes allowed" in told
    assert many(guest, b"a", b"b", b"c") == [b"12345", b"12345", None]
    assert used(guest) == 10
    assert put(b"c", None, b"")[0] == done
    assert put(b"a", b"12345", b"1")[0] == done
    assert put(b"c", b"", b"1234")[0] == done


def test_the_quota_is_a_megabyte_unless_another_is_granted(host: PluginHost, guest: Guest) -> None:
    """S0-78: 1 MiB, of which each byte can be used; each plugin has a quota of its own."""
    large = load(host, "large", KVGrant(), pages=20)
    assert large.ask("kv_set", b"k", b"x" * 1_048_576).result == 0
    assert why(large, "kv_set", b"kk", b"x")[0] == abi.QUOTA
    assert guest.ask("kv_set", b"k", b"x").result == 0


def test_what_has_ended_makes_room(host: PluginHost, wall: Wall) -> None:
    """S0-77, S0-82: a value that is over counts nothing, neither in what is used nor when it is written over."""
    guest = small(host)
    guest.ask("kv_set_with_ttl", b"k", b"x" * 8, 5_000)
    assert guest.ask("kv_set", b"other", b"x" * 5).result == abi.QUOTA
    wall.ms += 5_000
    assert guest.ask("kv_set", b"other", b"x" * 5).result == 0
    assert guest.ask("kv_set", b"k", b"y" * 6).result == abi.QUOTA
    assert guest.ask("kv_set", b"k", b"y" * 5).result == 0


def test_what_does_not_grow_is_always_allowed(tmp_path: Path) -> None:
    """S0-81: above a quota that was lowered, values as long as before or shorter are taken, and only those.

    Also those that alone are longer than the quota.
    """
    with on_disk(tmp_path / "root") as host:
        fill(small(host, 200), b"a", b"b", value=b"x" * 80)
    with on_disk(tmp_path / "root") as host:
        guest = small(host, 50)
        assert used(guest) == 160
        assert guest.ask("kv_set", b"a", b"y" * 80).result == 0
        assert guest.ask("kv_set_with_ttl", b"b", b"z" * 79, 60_000).result == 0
        assert swapped(guest, b"b", b"z" * 79, b"w" * 78) == 1
        for text, size in ((b"a", 81), (b"b", 79), (b"c", 1), (b"c", 60), (b"c", 159), (b"a", 1_000)):
            assert guest.ask("kv_set", text, b"v" * size).result == abi.QUOTA
        assert (got(guest, b"a"), got(guest, b"b")) == (b"y" * 80, b"w" * 78)
        assert guest.ask("kv_delete", b"a").result == 1
        assert guest.ask("kv_set", b"b", b"v" * 50).result == 0
        assert guest.ask("kv_set", b"b", b"v" * 51).result == abi.QUOTA


def test_calls_at_once_never_exceed_the_quota(host: PluginHost) -> None:
    """S0-85: four calls at a time, each setting keys of its own, never get more than there is."""
    guest = small(host, 1_000)

    def work(thread: int) -> int:
        answers = guest.steps(*(("kv_set", b"%d:%d" % (thread, number), b"x" * 30) for number in range(20)))
        assert {answer.result for answer in answers} <= {0, abi.QUOTA}
        return [answer.result for answer in answers].count(0)

    with ThreadPoolExecutor(4) as pool:
        taken = sum(pool.map(work, range(4)))
    assert taken == 1_000 // 30
    assert used(guest) == 30 * taken


# -- how many keys ----------------------------------------------------------------------------------------------------


def three(host: PluginHost, **more: Any) -> Guest:
    """Load a guest that may have three keys, and has them, with nothing in them."""
    guest = load(host, "three", KVGrant(max_keys=3, **more))
    fill(guest, b"a1", b"a2", b"b", value=b"")
    return guest


CREATING: dict[str, Callable[[bytes], tuple[Any, ...]]] = {
    "kv_set": lambda text: ("kv_set", text, b""),
    "kv_set_with_ttl": lambda text: ("kv_set_with_ttl", text, b"", 60_000),
    "kv_compare_and_set": lambda text: ("kv_compare_and_set", text, None, b""),
}


@pytest.mark.parametrize("name", CREATING)
def test_a_key_too_many_is_refused(name: str, host: PluginHost) -> None:
    """Keys of no bytes take no room of the quota, and are limited all the same; what is there can be written over."""
    guest, create = three(host), CREATING[name]
    for _ in range(2):
        number, told = why(guest, *create(b"c"))
        assert (number, told) == (
            abi.QUOTA,
            "key limit exceeded: there are 3 keys already, at most 3 are allowed",
        )
    assert keys_of(guest) == [b"a1", b"a2", b"b"]
    assert guest.ask(*create(b"b")).result == 0
    assert swapped(guest, b"b", b"", b"more") == 1
    assert swapped(guest, b"c", b"what isn't there", b"x") == 0
    assert swapped(guest, b"c", None, None) == 1
    assert guest.ask("kv_delete", b"a2").result == 1
    assert guest.ask(*create(b"c")).result == int(name == "kv_compare_and_set")
    assert guest.ask(*create(b"d")).result == abi.QUOTA
    assert keys_of(guest) == [b"a1", b"b", b"c"]


@pytest.mark.parametrize("way", ["kv_delete", "kv_delete_by_prefix", "kv_compare_and_set", "its end", "the host"])
def test_what_goes_makes_room_for_a_key(way: str, host: PluginHost, wall: Wall) -> None:
    """Whichever way it goes: just as many can be created as there were."""
    guest = load(host, "three", KVGrant(max_keys=3))
    fill(guest, b"b", value=b"")
    for text in (b"a1", b"a2"):
        assert guest.ask("kv_set_with_ttl", text, b"", 1_000).result == 0
    assert guest.ask("kv_set", b"c", b"").result == abi.QUOTA
    if way == "kv_delete":
        assert [guest.ask(way, text).result for text in (b"a1", b"a2", b"a2", b"c")] == [1, 1, 0, 0]
    elif way == "kv_delete_by_prefix":
        assert guest.ask(way, b"a").result == 2
    elif way == "kv_compare_and_set":
        assert [swapped(guest, text, b"", None) for text in (b"a1", b"a2", b"a2")] == [1, 1, 0]
    elif way == "its end":
        wall.ms += 1_000
    else:
        assert guest.plugin.store is not None
        assert guest.plugin.store.delete_by_prefix("a").result(WAIT) == 2
    assert [guest.ask("kv_set", text, b"").result for text in (b"c", b"d", b"e")] == [0, 0, abi.QUOTA]


def test_what_the_host_stores_counts_as_well(host: PluginHost) -> None:
    """The host isn't limited; what it puts there takes the plugin's room, whether it came before or meanwhile."""
    guest = load(host, "few", KVGrant(max_keys=10))
    store = guest.plugin.store
    assert store is not None
    fill(guest, b"a")
    for number in range(9):
        store.set(f"h{number}", b"").result(WAIT)
    assert guest.ask("kv_set", b"b", b"").result == abi.QUOTA
    store.job.commit([Put("kv", key(f"more{number}"), b"") for number in range(5)]).result(WAIT)
    assert guest.ask("kv_delete", b"a").result == 1
    number, told = why(guest, "kv_set", b"a", b"")
    assert (number, told) == (abi.QUOTA, "key limit exceeded: there are 14 keys already, at most 10 are allowed")
    assert store.delete_by_prefix("more").result(WAIT) == 5
    store.job.put("other", key(1), b"no key of the store's")
    assert [guest.ask("kv_set", text, b"").result for text in (b"a", b"b")] == [0, abi.QUOTA]


def test_another_limit_holds_from_the_load_on(host: PluginHost) -> None:
    """Above a limit that was lowered nothing is lost, and nothing created; what was there counts from the beginning."""
    guest = three(host)
    fewer = load(host, "three", KVGrant(max_keys=2))
    assert keys_of(fewer) == [b"a1", b"a2", b"b"]
    assert [fewer.ask("kv_set", text, b"x").result for text in (b"b", b"c")] == [0, abi.QUOTA]
    assert fewer.ask("kv_delete_by_prefix", b"a").result == 2
    assert [fewer.ask("kv_set", text, b"").result for text in (b"c", b"d")] == [0, abi.QUOTA]
    more = load(host, "three", KVGrant(max_keys=4))
    assert [more.ask("kv_set", text, b"").result for text in (b"d", b"e", b"f")] == [0, 0, abi.QUOTA]
    assert guest.plugin is more.plugin


def test_calls_at_once_never_exceed_the_limit_and_use_all_of_it(host: PluginHost) -> None:
    """Eight at a time create keys of their own, and then in the place of those they remove."""
    guest = load(host, "crowd", KVGrant(max_keys=50))

    def create(thread: int) -> list[bytes]:
        texts = [b"%d:%d" % (thread, number) for number in range(20)]
        answers = [answer.result for answer in guest.steps(*(("kv_set", text, b"") for text in texts))]
        assert set(answers) <= {0, abi.QUOTA}
        return [text for text, result in zip(texts, answers, strict=True) if result == 0]

    def replace(mine: list[bytes]) -> None:
        for text in mine:
            steps = guest.steps(("kv_delete", text), ("kv_set", b"%s again" % text, b""))
            assert [step.result for step in steps] == [1, 0]  # no other has taken more than it gave back

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(create, range(8)))
        assert sum(map(len, taken)) == len(keys_of(guest)) == 50
        list(pool.map(replace, taken))
    assert len(keys_of(guest)) == 50
    assert guest.ask("kv_set", b"more", b"").result == abi.QUOTA


def test_keys_are_counted_only_where_there_may_be_too_many(
    guest: Guest, host: PluginHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once at the first key that is created, and then not before the limit is near; nothing else is counted for."""
    counted = []
    count = Transaction.count
    monkeypatch.setattr(Transaction, "count", lambda tx, category: counted.append(category) or count(tx, category))
    near = load(host, "near", KVGrant(max_keys=100))
    fill(near, *(b"%d" % number for number in range(100)))
    assert counted == ["kv"]
    for number in range(50):  # in exchange for one another
        assert near.ask("kv_delete", b"%d" % number).result == 1
        assert near.ask("kv_set", b"%d again" % number, b"").result == 0
        assert near.ask("kv_set", b"99", b"%d" % number).result == 0
    assert counted == ["kv"]
    assert near.ask("kv_set", b"one more", b"").result == abi.QUOTA
    assert counted == ["kv"] * 2
    fill(guest, *(b"%d" % number for number in range(300)))
    assert counted == ["kv"] * 3


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["set", "end", "swap", "unswap", "delete", "prefix", "host", "unhost", "time"]),
            st.integers(0, 7),
            st.sampled_from([b"", b"x", b"too long"]),
        ),
        max_size=60,
    )
)
@settings(deadline=None, max_examples=60)
def test_whatever_is_written_the_limit_is_exact(steps: list[tuple[str, int, bytes]]) -> None:
    """Against a model: each write is refused if, and only if, it would create a key too many; or a byte too many."""
    wall = Wall()
    with Persistency(":memory:", clock=wall) as persistency:
        store = KVStore(persistency.open_job("plugins/plugin", max_bytes=7))
        bench = Bench(store, KVGrant(max_bytes=7, max_keys=3))
        model: dict[bytes, tuple[bytes, int | None]] = {}
        for verb, place, value in steps:
            call, text = CallContext(monotonic() + WAIT), b"k%d" % place
            old = model.get(text, (None, None))[0]
            fits = sum(len(each) for each, _ in model.values()) - len(old or b"") + len(value) <= 7
            fits = (fits or len(value) <= len(old or b"")) and (text in model or len(model) < 3)
            if verb in ("set", "end"):
                ttl = () if verb == "set" else (1_000,)
                name = "kv_set" if verb == "set" else "kv_set_with_ttl"
                assert bench.call(name, call, text, value, *ttl) == (0 if fits else abi.QUOTA)
                if fits:
                    model[text] = value, (wall.ms + 1_000 if ttl else None)
            elif verb == "swap":
                assert bench.call("kv_compare_and_set", call, text, old, value) == (1 if fits else abi.QUOTA)
                if fits:
                    model[text] = value, None
            elif verb == "unswap":
                assert bench.call("kv_compare_and_set", call, text, old, None) == 1
                model.pop(text, None)
            elif verb == "delete":
                assert bench.call("kv_delete", call, text) == int(model.pop(text, None) is not None)
            elif verb == "prefix":
                assert bench.call("kv_delete_by_prefix", call, b"k") == len(model)
                model.clear()
            elif verb == "host":
                store.set(text.decode(), b"").result(WAIT)
                model[text] = b"", None
            elif verb == "unhost":
                store.delete(text.decode()).result(WAIT)
                model.pop(text, None)
            else:
                wall.ms += 400
                model = {text: row for text, row in model.items() if row[1] is None or row[1] > wall.ms}
            assert store.list().result(WAIT) == sorted(text.decode() for text in model)
        bench.close()


# -- whose it is ------------------------------------------------------------------------------------------------------


def test_two_plugins_with_one_code_are_isolated(host: PluginHost) -> None:
    """S0-2, S0-88: the same key in both is two values, each has its own quota, and neither sees the other's keys."""
    guests = [load(host, name, KVGrant(max_bytes=10)) for name in ("a", "b")]
    fill(guests[0], b"same", value=b"of a")
    fill(guests[1], b"same", value=b"and of b")
    assert [got(guest, b"same") for guest in guests] == [b"of a", b"and of b"]
    assert [used(guest) for guest in guests] == [4, 8]
    assert guests[0].ask("kv_delete_by_prefix", b"s").result == 1
    assert (keys_of(guests[0]), keys_of(guests[1])) == ([], [b"same"])


def test_each_plugin_has_a_file_of_its_own_and_data_survives(tmp_path: Path, wall: Wall) -> None:
    """S0-1, S0-5, S0-90: a file for each that closing the host lets go of; values, ends and what is used are kept."""
    paths = []
    with on_disk(tmp_path / "root", wall) as host:
        for name in ("a", "b"):
            guest = load(host, name, KVGrant(max_bytes=20))
            fill(guest, b"who", value=name.encode())
            guest.ask("kv_set_with_ttl", b"ends", b"1234567", 60_000)
            assert guest.plugin.store is not None
            assert guest.plugin.store.job.path is not None
            paths.append(guest.plugin.store.job.path)
    assert paths[0] != paths[1]
    for path in paths:
        with sqlite3.connect(path) as connection:
            assert connection.execute("SELECT count(*) FROM kv").fetchone() == (2,)
        connection.close()
    with on_disk(tmp_path / "root", wall) as host:
        for name in ("a", "b"):
            guest = load(host, name, KVGrant(max_bytes=20))
            assert (got(guest, b"who"), used(guest)) == (name.encode(), 8)
            assert guest.ask("kv_set", b"more", b"x" * 13).result == abi.QUOTA
            wall.ms += 60_000
            assert keys_of(guest) == [b"who"]
            fill(guest, b"ends")
            wall.ms -= 60_000


def test_what_the_host_sees_of_a_store(guest: Guest) -> None:
    """`plugin.store` is the guest's very store, under keys that are text; S0-14: rows of no end are permanent."""
    store = guest.plugin.store
    assert isinstance(store, KVStore)
    fill(guest, "clé".encode(), value=b"\xff")
    assert store.get("clé").result(WAIT) == b"\xff"
    store.set("from the host", b"hello").result(WAIT)
    assert got(guest, b"from the host") == b"hello"


# -- compare_and_set --------------------------------------------------------------------------------------------------


def test_compare_and_set(guest: Guest) -> None:
    """The new value takes the place of the old one only if that is there, to the byte."""
    fill(guest, b"k", value=b"old")
    assert [swapped(guest, b"k", other, b"new") for other in (b"", b"ol", b"old\0", b"OLD", None)] == [0] * 5
    assert got(guest, b"k") == b"old"
    assert swapped(guest, b"k", b"old", b"new") == 1
    assert got(guest, b"k") == b"new"


def test_absent_may_stand_on_either_side(guest: Guest) -> None:
    """Without a value expected it creates, without a new one it deletes; an empty value is a value."""
    assert swapped(guest, b"k", b"", b"x") == 0
    assert swapped(guest, b"k", None, b"") == 1
    assert swapped(guest, b"k", None, b"x") == 0
    assert got(guest, b"k") == b""
    assert swapped(guest, b"k", b"", None) == 1
    assert got(guest, b"k") is None
    assert swapped(guest, b"k", None, None) == 1
    assert keys_of(guest) == []


def test_absent_has_no_place(guest: Guest) -> None:
    """The pointer beside the length ABSENT isn't looked at."""
    results, before, after = guest.memory_after(("kv_compare_and_set", 0, 1, 2**32 - 1, 2**32 - 1, 0, 1))
    assert (results, before == after) == ([abi.INVALID], True)  # a key of one 0xA5 is no UTF-8
    fill(guest, b"k")
    assert guest.ask("kv_compare_and_set", b"k", b"x", 2**32 - 1, 2**32 - 1).result == 1
    assert keys_of(guest) == []


def test_what_is_longer_than_the_store_is_not_there(host: PluginHost) -> None:
    """A value expected that no store of that size can have is simply another one."""
    guest = small(host)
    fill(guest, b"k", value=b"12345")
    assert swapped(guest, b"k", b"12345" * 3, b"x") == 0
    assert swapped(guest, b"k", b"12345" * 3, None) == 0
    assert got(guest, b"k") == b"12345"


def test_calls_at_once_count_each_step(guest: Guest) -> None:
    """Four calls at a time count up by compare-and-set, trying again where another came first; no step is lost."""

    def work(_thread: int) -> None:
        for _ in range(10):
            done = 0
            while not done:
                found = got(guest, b"count")
                done = swapped(guest, b"count", found, b"%d" % (int(found or b"0") + 1))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [None] * 4
    assert got(guest, b"count") == b"40"


# -- grants -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TAKING_KEYS)
def test_a_prefix_that_was_granted_is_a_restriction(name: str, host: PluginHost) -> None:
    """What doesn't begin with it is denied, by every function, and not cut to fit; an empty prefix is no way around."""
    guest = load(host, "plugin", KVGrant(prefix="wé:"))
    store = guest.plugin.store
    assert store is not None
    store.set("other", b"secret").result(WAIT)
    make = TAKING_KEYS[name]
    if name == "kv_get_many":
        assert listed(guest.ask(name, a_list("wé:x".encode(), "wé:".encode()), Room(20)).written) == [None, None]
    else:
        assert guest.ask(name, *make("wé:".encode())).result in GOOD
    for bad in (b"other", b"w", "wé".encode(), "WÉ:x".encode(), b"we:x", b"\0"):
        number, text = why(guest, name, *make(bad))
        assert number == abi.DENIED
        assert "'wé:'" in text
    assert guest.ask(name, *make(b"")).result in (abi.DENIED, abi.INVALID)
    assert store.get("other").result(WAIT) == b"secret"
    assert "other" in store.list().result(WAIT)


def test_a_list_within_a_prefix_gives_nothing_else(host: PluginHost) -> None:
    """The place a page goes on after may lie outside of the prefix; the keys it gives don't."""
    guest = load(host, "plugin", KVGrant(prefix="b"))
    store = guest.plugin.store
    assert store is not None
    for text in ("a", "b", "b1", "c"):
        store.set(text, b"x").result(WAIT)
    assert keys_of(guest, b"b") == keys_of(guest, b"b", after=b"a") == [b"b", b"b1"]
    assert keys_of(guest, b"b", after=b"b1") == keys_of(guest, b"b", after=b"c") == []


def test_a_read_only_store_has_no_function_that_writes(host: PluginHost) -> None:
    """S0-88: importing one fails the load and names each; what reads is there, and reads what the host has put."""
    with pytest.raises(PermissionDenied) as caught:
        load(host, "reader", KVGrant(read_only=True))
    assert set(caught.value.functions) == {f"persistency.{each.name}" for each in WRITING}
    guest = load(host, "reader", KVGrant(read_only=True), imports=(LAST_ERROR, FAIL, *READING))
    store = guest.plugin.store
    assert store is not None
    store.set("k", b"value").result(WAIT)
    assert (got(guest, b"k"), keys_of(guest), used(guest)) == (b"value", [b"k"], 5)
    assert many(guest, b"k") == [b"value"]
    assert guest.ask("kv_has", b"k").result == 1


def test_what_writes_is_not_even_made_for_a_reader(store: KVStore) -> None:
    """The service itself gives no function that writes to a read-only grant, whoever would link it."""
    assert {each.name for each in functions(store, KVGrant(read_only=True))} == {each.name for each in READING}
    assert {each.name for each in functions(store, KVGrant())} == {each.name for each in (*READING, *WRITING)}


def test_without_the_permission_there_is_no_store(host: PluginHost) -> None:
    """S0-88: a plugin that wasn't granted one has no function of it, no job, and what everybody has."""
    with pytest.raises(PermissionDenied) as caught:
        load(host, "none")
    assert set(caught.value.functions) == {f"persistency.{each.name}" for each in (*READING, *WRITING)}
    guest = load(host, "none", imports=(LAST_ERROR, FAIL))
    assert guest.plugin.store is None
    assert guest.ask("last_error", Room(10)) == Answer(0, b"\xa5" * 10)


# -- errors -----------------------------------------------------------------------------------------------------------


def test_the_last_error_is_of_this_call_and_the_last(guest: Guest) -> None:
    """What succeeds doesn't wipe it out, the next failure takes its place, and no other call sees it."""
    answers = guest.steps(
        ("last_error", Room(100)),
        ("kv_get", b"missing", Room(1)),
        ("kv_set", b"k", b"x"),
        ("last_error", Room(100)),
        ("kv_has", b""),
        ("last_error", Room(100)),
    )
    assert [answer.result for answer in answers[1::2]] == [abi.NOT_FOUND, len("there is no key 'missing'"), 16]
    assert [answer.written for answer in answers[::2] if answer.room] == [b""]
    assert answers[3].written == b"there is no key 'missing'"
    assert answers[5].written == b"the key is empty"
    assert guest.ask("last_error", Room(100)).written == b""


def test_a_text_comes_whole_or_not_at_all(guest: Guest) -> None:
    """The length of an error's text is told; a room that is too small stays as it was."""
    answers = guest.steps(("kv_has", b""), ("last_error", Room(0)), ("last_error", Room(15)), ("last_error", Room(16)))
    assert [answer.result for answer in answers] == [abi.INVALID, 16, 16, 16]
    assert answers[2].room == b"\xa5" * 15
    assert answers[3].room == b"the key is empty"


def test_a_place_outside_of_the_memory_is_a_fault(guest: Guest) -> None:
    """It is told as such, with a text, before a key is looked at or a time to live; nothing is written."""
    end = 2 * 65_536
    for step in (
        ("kv_set", b"", end - 1, 2), ("kv_set_with_ttl", b"", end, 1, -1), ("kv_get", b"", end + 1, 0),
        ("kv_has", 2**32 - 1, 1), ("kv_has", 2**32 - 1, 2**32 - 1), ("kv_list", b"\xff", b"", 8, end - 7),
        ("kv_compare_and_set", b"", b"x", end - 1, 2), ("fail", end, 1), ("kv_get_many", b"\xff", 0, end + 1),
    ):  # fmt: skip
        number, text = why(guest, *step)
        assert number == abi.FAULT, step
        assert "outside of the guest's memory" in text
    assert guest.ask("kv_set", b"k", end, 0).result == 0  # nothing, right behind the last byte
    assert guest.ask("kv_get", b"k", 0, end).result == 0


def test_what_a_plugin_fails_with_is_its_own_words(guest: Guest) -> None:
    """The last text counts, any bytes are text, and a long one is shortened by whole characters."""
    for said, expected in [
        ([b"first", "zwölf".encode()], "zwölf"),
        ([b"bad \xff\xc3"], "bad \ufffd\ufffd"),
        (["ü".encode() * 3_000], "ü" * 2_048),
        ([b"x" + "ü".encode() * 3_000], "x" + "ü" * 2_047),
        ([b"x" + "\U0001f600".encode() * 2_000], "x" + "\U0001f600" * 1_023),
        ([b"\xff" * 5_000], "\ufffd" * 1_365),
        ([b"x" * 4_096], "x" * 4_096),
    ]:
        with pytest.raises(CallFailed) as caught:
            guest.fail(*(("fail", text) for text in said))
        assert str(caught.value).partition(" failed: ")[2] == expected


def in_time(guest: Guest, name: str, *arguments: Argument) -> int:
    """Have a host function called that won't answer: its number is TIMEOUT, unless the guest is stopped first."""
    try:
        return guest.ask(name, *arguments, timeout=0.1).result
    except PluginTimeout:
        return abi.TIMEOUT


@contextmanager
def stalled(store: KVStore) -> Iterator[None]:
    """Keep a store's job busy meanwhile."""
    inside, may_go = threading.Event(), threading.Event()

    def hold(_tx: Transaction) -> None:
        inside.set()
        assert may_go.wait(WAIT)

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(lambda: store.job.run(hold).result(WAIT))
        try:
            assert inside.wait(WAIT)
            yield
        finally:
            may_go.set()
        holding.result(WAIT)


@pytest.mark.parametrize("name", [*TAKING_KEYS, "kv_storage_used"])
def test_a_store_that_is_closed_says_so(name: str, guest: Guest) -> None:
    """S0-47: every function answers CLOSED, whoever closed the job; wrong keys are told all the same."""
    assert guest.plugin.store is not None
    guest.plugin.store.job.close(WAIT)
    make = TAKING_KEYS.get(name, lambda _text: ())
    number, text = why(guest, name, *make(b"k"))
    assert number == abi.CLOSED
    assert "closed" in text
    if name in TAKING_KEYS:
        assert guest.ask(name, *make(b"\xff")).result == abi.INVALID


@contextmanager
def on_a_bad_disk(root: Path) -> Iterator[tuple[FaultyDisk, Guest]]:
    """Give a guest whose store has rows, none of them in memory, and the disk they are on."""
    disk = FaultyDisk()
    with Persistency(root) as persistency:
        persistency._site.root._vfs = disk.name  # type: ignore[attr-defined]  # a directory's
        with PluginHost(persistency) as host:
            store = load(host, "plugin", KVGrant()).plugin.store
            assert store is not None
            for number in range(200):
                store.set(f"{number:03}", bytes(500))
        with PluginHost(persistency) as host:
            yield disk, load(host, "plugin", KVGrant())
    disk.unregister()


def test_a_disk_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    """S0-91: that is STORAGE, with the engine's words; the next call finds everything as it was."""
    with on_a_bad_disk(tmp_path / "root") as (disk, guest):
        disk.arm("read", 1, apsw.SQLITE_IOERR_READ)
        number, text = why(guest, "kv_get", b"150", Room(1_000))
        assert disk.fired
        assert number == abi.STORAGE
        assert text
        assert got(guest, b"150") == bytes(500)


def test_a_disk_that_takes_nothing_is_waited_for(tmp_path: Path) -> None:
    """A job stalls while its disk is full, and so does a set, up to its end; it goes on when the disk does."""
    with on_a_bad_disk(tmp_path / "root") as (disk, guest):
        disk.arm("write", 1, apsw.SQLITE_FULL, sticky=True)
        assert in_time(guest, "kv_set", b"k", b"x") == abi.TIMEOUT
        assert disk.fired
        disk.disarm()
        assert guest.ask("kv_set", b"k", b"y").result == 0
        assert got(guest, b"k") == b"y"


def test_a_job_that_is_poisoned_says_so(tmp_path: Path) -> None:
    """S0-91: behind an fsync that failed every function is STORAGE, until the plugin is loaded anew."""
    with on_a_bad_disk(tmp_path / "root") as (disk, guest):
        store = guest.plugin.store
        assert store is not None
        disk.arm("sync", 1, apsw.SQLITE_IOERR_FSYNC)
        store.job.put("other", key(1), b"x")
        with pytest.raises(Poisoned):
            store.job.flush(sync=True).result(WAIT)
        for name, make in TAKING_KEYS.items():
            number, text = why(guest, name, *make(b"k"))
            assert number == abi.STORAGE
            assert text
        with pytest.raises(WriteFailed):
            store.job.close(WAIT)


@pytest.mark.parametrize("name", [*TAKING_KEYS, "kv_storage_used"])
def test_waiting_for_a_store_ends_with_the_call(name: str, host: PluginHost) -> None:
    """A job that is stalled is the end of the guest, or TIMEOUT if it's quick, but no hang; others aren't held up."""
    guest, other = (load(host, plugin_id, KVGrant()) for plugin_id in ("plugin", "other"))
    fill(guest, b"k")
    assert guest.plugin.store is not None
    make = TAKING_KEYS.get(name, lambda _text: ())
    with stalled(guest.plugin.store):
        assert in_time(guest, name, *make(b"k")) == abi.TIMEOUT
        assert other.ask(name, *make(b"k")).result in GOOD
    assert guest.ask(name, *make(b"k")).result in GOOD


# -- the bodies by themselves -----------------------------------------------------------------------------------------


class Bench:
    """A memory and the bodies of a store's functions, called on the test's own thread."""

    def __init__(self, store: KVStore, grant: KVGrant | None = None) -> None:
        engine = wasmtime.Engine()
        self._store = wasmtime.Store(engine)
        module = wasmtime.Module(engine, '(module (memory (export "memory") 1))')
        memory = wasmtime.Instance(self._store, module, []).exports(self._store)["memory"]
        assert isinstance(memory, wasmtime.Memory)
        self.memory = GuestMemory(self._store, memory)
        self.bodies = {each.name: each.body for each in functions(store, grant or KVGrant())}

    def call(self, name: str, call: CallContext, *arguments: Argument) -> int:
        """Put the arguments into the memory and call a body with them."""
        numbers: list[int] = []
        at = 0
        for argument in arguments:
            match argument:
                case bytes():
                    self.memory.write(at, argument)
                    numbers += (at, len(argument))
                    at += len(argument)
                case Room(size):
                    numbers += (32_768, size)
                case None:
                    numbers += (0, abi.ABSENT)
                case _:
                    numbers.append(argument)
        return self.bodies[name](self.memory, call, *numbers)

    def close(self) -> None:
        """Give the memory back."""
        self._store.close()


@pytest.fixture
def store(persistency: Persistency) -> KVStore:
    """Give a store that no host knows of."""
    return KVStore(persistency.open_job("plugins/plugin", max_bytes=1_048_576))


@pytest.fixture
def bench(store: KVStore) -> Iterator[Bench]:
    """Give the bodies over that store."""
    made = Bench(store)
    yield made
    made.close()


@pytest.mark.parametrize("name", [*TAKING_KEYS, "kv_storage_used"])
def test_a_wait_ends_when_its_call_does(name: str, store: KVStore, bench: Bench) -> None:
    """TIMEOUT, with a text; also when the end of the call is moved to now while the function waits."""
    arguments = TAKING_KEYS.get(name, lambda _text: ())(b"k")
    with stalled(store):
        call = CallContext(monotonic() + 0.01)
        assert bench.call(name, call, *arguments) == abi.TIMEOUT
        assert "the call" in call.last_error
        call = CallContext(monotonic() + 1_000)  # longer than any test may take
        cut_short = threading.Timer(0.01, setattr, (call, "deadline", 0.0))
        cut_short.start()
        assert bench.call(name, call, *arguments) == abi.TIMEOUT
        cut_short.join(WAIT)
    assert bench.call(name, CallContext(monotonic() + WAIT), *arguments) in GOOD


def test_a_read_that_nobody_waits_for_any_more_is_cancelled(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a call ends in the middle of a read, the read doesn't stay in the job's mailbox."""
    future: Future[bytes] = Future()
    call = CallContext(monotonic() + 1_000)  # longer than any test may take

    def ask(_store: KVStore, _key: str) -> Reply[bytes]:
        call.deadline = 0.0
        return Reply.of(future)

    monkeypatch.setattr(KVStore, "get", ask)
    assert bench.call("kv_get", call, b"k", Room(10)) == abi.TIMEOUT
    assert call.last_error == "the store gave no answer before the end of the call"
    assert future.cancelled()


def test_a_store_may_run_out_of_time_itself(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """An answer that is a `TimeoutError` is given at once, in its own words; the call isn't waited for."""
    future: Future[bytes] = Future()
    future.set_exception(TimeoutError("the disk was asleep"))
    monkeypatch.setattr(KVStore, "get", lambda _store, _key: Reply.of(future))
    call = CallContext(monotonic() + 1_000)  # longer than any test may take
    assert bench.call("kv_get", call, b"k", Room(10)) == abi.TIMEOUT
    assert call.last_error == "the disk was asleep"


@pytest.mark.parametrize("name", [*TAKING_KEYS, "kv_storage_used"])
def test_a_call_that_is_over_asks_the_store_nothing(name: str, store: KVStore, bench: Bench) -> None:
    """A guest that is about to be stopped can't begin another write."""
    version = store.job.version().result(WAIT)
    arguments = TAKING_KEYS.get(name, lambda _text: ())(b"k")
    assert bench.call(name, CallContext(0.0), *arguments) == abi.TIMEOUT
    assert store.job.version().result(WAIT) == version


def test_a_page_is_asked_for_with_as_many_keys_as_may_fit(
    store: KVStore, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store isn't asked for rows that the room can't hold, whatever the room is said to be."""
    limits = []
    ask = KVStore.list

    def noting(self: KVStore, prefix: str = "", *, after: str | None = None, limit: int | None = None) -> Any:
        limits.append(limit)
        return ask(self, prefix, after=after, limit=limit)

    monkeypatch.setattr(KVStore, "list", noting)
    call = CallContext(monotonic() + WAIT)
    for prefix, room in ((b"", 0), (b"", 9), (b"", 10), (b"", 20_000), (b"123456", 20), (b"123456", 19)):
        assert bench.call("kv_list", call, prefix, b"", Room(room)) == 0
    assert limits == [1, 1, 2, 1_000, 2, 1]


def test_a_value_is_at_most_what_a_job_takes(store: KVStore, bench: Bench) -> None:
    """Whatever was granted: one that is longer is INVALID before it is read, as the engine says of it itself."""
    assert VALUE_BYTES_MAX == PAYLOAD_BYTES_MAX

    class Vast(GuestMemory):
        """A memory that says it has all that is asked for, and gives no more than a key."""

        def check(self, at: int, size: int) -> None:
            pass

        def read(self, at: int, size: int) -> bytes:
            assert size == 1
            return super().read(at, size)

    vast = Vast(bench.memory._store, bench.memory._memory)
    bodies = {each.name: each.body for each in functions(store, KVGrant(max_bytes=2**40))}
    bench.memory.write(0, b"k")
    call = CallContext(monotonic() + WAIT)
    for name, arguments in (
        ("kv_set", ()), ("kv_set_with_ttl", (1_000,)), ("kv_compare_and_set", (0, abi.ABSENT)),
    ):  # fmt: skip
        assert bodies[name](vast, call, 0, 1, 0, VALUE_BYTES_MAX + 1, *arguments) == abi.INVALID
        assert f"at most {VALUE_BYTES_MAX} are allowed" in call.last_error


def test_a_memory_ends_where_it_ends(bench: Bench) -> None:
    """The last byte can be read and written, the one behind it can't, and no number is taken for a smaller one."""
    memory, size = bench.memory, 65_536
    memory.write(size - 3, b"end")
    assert memory.read(size - 3, 3) == b"end"
    assert memory.read(size, 0) == memory.read(0, 0) == b""
    assert len(memory.read(0, size)) == size
    for at, length in (
        (size, 1),
        (size - 1, 2),
        (size + 1, 0),
        (0, size + 1),
        (2**32 - 1, 2),
        (2**64 - 4, 8),
        (-1, 1),
        (8, -1),
    ):
        with pytest.raises(Fault):
            memory.check(at, length)
        with pytest.raises(Fault):
            memory.read(at, length)
    for at, data in ((size - 2, b"123"), (size, b"1"), (-1, b"1"), (size + 1, b"")):
        with pytest.raises(Fault):
            memory.write(at, data)
    assert memory.read(size - 3, 3) == b"end"


def test_a_large_place_is_read_whole(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is longer than can be copied at once is copied in parts, with nothing between them."""
    data = bytes(range(250)) * 4
    bench.memory.write(5, data)
    for most in (1, 7, 999, 1_000, 1_001):
        monkeypatch.setattr(guestmemory, "_COPY_BYTES_MAX", most)
        assert bench.memory.read(5, 1_000) == data


# -- what a hostile guest costs its host ------------------------------------------------------------------------------

FAR, HUGE = 2 * MB, 60 * MB  # a place in the memory of a large guest, and its length


@pytest.fixture
def large(persistency: Persistency) -> Iterator[Guest]:
    """Give a guest with a memory of 64 MB, and a store of 2 MB."""
    with PluginHost(persistency) as host:
        yield load(host, "large", KVGrant(max_bytes=2 * MB), pages=1_000)


@contextmanager
def allocating_at_most(limit: int) -> Iterator[None]:
    """Fail if more bytes than that are allocated at any time meanwhile."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - before < limit, f"{peak - before} bytes were allocated"


def test_bytes_are_counted(large: Guest) -> None:
    """The measure of the next tests sees a value that the host does take out of the guest, by its size."""
    assert large.ask("kv_set", b"k", b"").result == 0
    with pytest.raises(AssertionError, match="bytes were allocated"), allocating_at_most(MB):
        large.ask("kv_set", b"k", FAR, 2 * MB)


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (abi.QUOTA, ("kv_set", b"k", FAR, HUGE)),
        (abi.QUOTA, ("kv_set_with_ttl", b"k", FAR, HUGE, 1_000)),
        (abi.QUOTA, ("kv_compare_and_set", b"k", None, FAR, HUGE)),
        (0, ("kv_compare_and_set", b"k", FAR, HUGE, None)),
        (0, ("kv_compare_and_set", b"k", FAR, HUGE, b"x")),
        (abi.INVALID, ("kv_set", FAR, HUGE, b"x")),
        (abi.INVALID, ("kv_delete", FAR, HUGE)),
        (abi.INVALID, ("kv_has", FAR, HUGE)),
        (abi.INVALID, ("kv_delete_by_prefix", FAR, HUGE)),
        (abi.INVALID, ("kv_list", FAR, HUGE, b"", 0, HUGE)),
        (abi.INVALID, ("kv_list", b"", FAR, HUGE, 0, HUGE)),
        (abi.INVALID, ("kv_get_many", FAR, HUGE, 0, HUGE)),
        (abi.NOT_FOUND, ("kv_get", b"k", FAR, HUGE)),
        (0, ("kv_list", b"", b"", FAR, HUGE)),
        (0, ("last_error", FAR, HUGE)),
        (0, ("fail", FAR, HUGE)),
    ],
)
def test_a_length_costs_nothing(number: int, step: tuple[Any, ...], large: Guest) -> None:
    """S0-79: a place of 60 MB is judged by its length: nothing of it is copied, and no room is made for it."""
    with allocating_at_most(MB // 2):
        answer = large.ask(*step)
    assert answer.result == number


def test_asking_for_a_value_a_thousand_times_costs_it_once(large: Guest) -> None:
    """Whether the answer fits or not, the host never has the value more than twice."""
    assert large.ask("kv_set", b"k", FAR, MB).result == 0
    with allocating_at_most(5 * MB // 2):
        assert large.ask("kv_get_many", a_list(*[b"k"] * 1_000), Room(100)).result == 1_000 * (4 + MB)
    with allocating_at_most(5 * MB // 2):
        assert large.ask("kv_get_many", a_list(*[b"k"] * 59), FAR, HUGE).result == 59 * (4 + MB)
    with allocating_at_most(3 * MB):
        assert large.ask("kv_get", b"k", Room(100)).result == MB


def test_a_list_costs_a_page(large: Guest) -> None:
    """Of many long keys a thousand are given at a time, into a room for all of them."""
    store = large.plugin.store
    assert store is not None
    for number in range(3_000):
        store.set(f"{number:0256}", b"")
    store.job.flush().result(WAIT)
    with allocating_at_most(3 * MB):
        assert large.ask("kv_list", b"", b"", FAR, HUGE).result == 1_000 * 260
