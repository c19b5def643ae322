"""Every host function with 10,000 wild argument tuples: what it answers and what it writes is held against a model.

The guest's memory is filled with a pattern before each call, and compared to the last byte after it: whatever wasn't
promised to be written must be as it was. The model is of another make than the service: it looks at a plain copy of the
memory and keeps the rows in a dict. A failure names the seed, and the number of the call.
"""

from __future__ import annotations

import ctypes
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from persistency import Persistency

pytest.importorskip("wasmtime", reason="needs the extra plugins")

from persistency.plugins import KVGrant, PluginHost, kvservice
from persistency.plugins.guestmemory import Fault, GuestMemory
from tests.plugins.guests import ABSENT, EVERYTHING, PAGE_BYTES, PAYLOAD, WAIT, Guest, Room, a_list, load

SEED = random.SystemRandom().getrandbits(32)

CALLS = 10_000
PAGES = 2
END = PAGES * PAGE_BYTES
TTL_MS_MAX = 10**13

NOT_FOUND, TOO_SMALL, QUOTA, INVALID, STORAGE, FAULT, DENIED = -1, -2, -3, -4, -6, -7, -8

GRANTS = {
    "plain": KVGrant(max_bytes=3_000, max_key_bytes=20),
    "prefix": KVGrant(max_bytes=1_000, prefix="k"),
}


class Complaint(Exception):
    """Something isn't as the model says."""


class Refused(Exception):
    """The model's own way out: an error number."""


class Place(NamedTuple):
    """A pointer and a length, as unsigned numbers."""

    at: int
    size: int


class Model:
    """What the functions must do, on a dict and a copy of the memory. The clock stands still."""

    def __init__(self, grant: KVGrant) -> None:
        self.grant = grant
        self.rows: dict[bytes, bytes] = {}

    def call(self, name: str, numbers: Sequence[int], before: bytes) -> tuple[int, bytes]:
        """Return what the function must answer, and what the memory must be then."""
        self.memory = bytearray(before)
        places = [Place(at % 2**32, size % 2**32) for at, size in zip(numbers[0:6:2], numbers[1:6:2], strict=False)]
        try:
            for number, place in enumerate(places):
                optional = name == "kv_compare_and_set" and number > 0 and place.size == ABSENT
                if not optional and place.at + place.size > len(before):
                    raise Refused(FAULT)
            more = numbers[2 * len(places) :]
            result = getattr(self, name)(*places, *more)
        except Refused as refused:
            (result,) = refused.args
        return result, bytes(self.memory)

    # -- the functions -------------------------------------------------------------------------------------------

    def last_error(self, _room: Place) -> int:
        return 0

    def fail(self, _text: Place) -> int:
        return 0

    def kv_set(self, key: Place, value: Place) -> int:
        text, data = self.key(key), self.read(value)
        self.afford(text, data)
        self.rows[text] = data
        return 0

    def kv_set_with_ttl(self, key: Place, value: Place, ttl_ms: int) -> int:
        self.key(key)
        if ttl_ms <= 0:
            raise Refused(INVALID)
        if value.size > self.grant.max_bytes:
            raise Refused(QUOTA)
        if ttl_ms > TTL_MS_MAX:
            raise Refused(INVALID)
        return self.kv_set(key, value)

    def kv_get(self, key: Place, room: Place) -> int:
        found = self.rows.get(self.key(key))
        if found is None:
            raise Refused(NOT_FOUND)
        return self.give(room, found)

    def kv_get_many(self, keys: Place, room: Place) -> int:
        values = [self.rows.get(self.permitted(text)) for text in self.listed(self.read(keys))]
        return self.give(room, b"".join(b"\xff" * 4 if value is None else a_list(value) for value in values))

    def kv_has(self, key: Place) -> int:
        return int(self.key(key) in self.rows)

    def kv_list(self, prefix: Place, after: Place, room: Place) -> int:
        beginning = self.permitted(self.text(self.read(prefix)))
        behind = self.text(self.read(after))
        found = [text for text in sorted(self.rows) if text.startswith(beginning) and (not behind or text > behind)]
        page = b""
        for text in found[:1_000]:
            if len(page) + 4 + len(text) > room.size:
                break
            page += a_list(text)
        if found and not page:
            raise Refused(TOO_SMALL)
        return self.give(room, page)

    def kv_delete(self, key: Place) -> int:
        return int(self.rows.pop(self.key(key), None) is not None)

    def kv_delete_by_prefix(self, prefix: Place) -> int:
        beginning = self.key(prefix)
        doomed = [text for text in self.rows if text.startswith(beginning)]
        for text in doomed:
            del self.rows[text]
        return len(doomed)

    def kv_storage_used(self) -> int:
        return sum(map(len, self.rows.values()))

    def kv_compare_and_set(self, key: Place, expected: Place, new: Place) -> int:
        text = self.key(key)
        if new.size != ABSENT and new.size > self.grant.max_bytes:
            raise Refused(QUOTA)
        there = self.rows.get(text)
        if there != (None if expected.size == ABSENT else self.read(expected)):
            return 0
        if new.size == ABSENT:
            self.rows.pop(text, None)
        else:
            self.afford(text, self.read(new))
            self.rows[text] = self.read(new)
        return 1

    # -- what they are made of -----------------------------------------------------------------------------------

    def read(self, place: Place) -> bytes:
        return bytes(self.memory[place.at : place.at + place.size])

    def give(self, room: Place, data: bytes) -> int:
        if len(data) <= room.size:
            self.memory[room.at : room.at + len(data)] = data
        return len(data)

    def key(self, place: Place) -> bytes:
        if not place.size:
            raise Refused(INVALID)
        return self.permitted(self.text(self.read(place)))

    def text(self, data: bytes) -> bytes:
        if len(data) > self.grant.max_key_bytes or "\ufffd" in data.decode(errors="replace"):
            raise Refused(INVALID)
        return data

    def permitted(self, text: bytes) -> bytes:
        if not text.startswith(self.grant.prefix.encode()):
            raise Refused(DENIED)
        return text

    def listed(self, data: bytes) -> list[bytes]:
        parts = []
        while data:
            size = int.from_bytes(data[:4], "little")
            if len(data) < 4 + size or len(parts) == 1_000:
                raise Refused(INVALID)
            parts.append(data[4 : 4 + size])
            data = data[4 + size :]
        for part in parts:
            if not part:
                raise Refused(INVALID)
            self.permitted(self.text(part))
        return parts

    def afford(self, text: bytes, data: bytes) -> None:
        before = len(self.rows.get(text, b""))
        if len(data) > before and self.kv_storage_used() - before + len(data) > self.grant.max_bytes:
            raise Refused(QUOTA)


# -- arguments --------------------------------------------------------------------------------------------------------

KEYS = (b"k", b"k1", b"k2", "kö".encode(), b"k\0", b"other", b"k" * 20, b"o%")
BAD_KEYS = (b"", b"k" * 21, b"k" * 257, b"\xff", b"k\xed\xa0\x80", b"\xa5", b"k" * 5_000)
EDGES = (0, 1, 4, 255, 256, 257, PAYLOAD, END - 1, END, END + 1, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1)


class Tuples:
    """Wild arguments from a seed: good ones, ones that nearly are, and ones that are anything."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def call(self) -> tuple[str, list[int], bytes]:
        """Return a function, its arguments, and the bytes that are put into the memory at `PAYLOAD`."""
        chosen = self.random.choice(EVERYTHING)
        kinds = chosen.parameters.split()
        self.payload = b""
        wild = self.random.random() < 0.5
        numbers: list[int] = []
        for number in range(len(kinds) // 2):
            place = self.good(chosen.name, number)
            numbers += self.spoiled(place) if wild and self.random.random() < 0.6 else place
        if len(kinds) % 2:
            numbers.append(self.ttl_ms())
        return chosen.name, numbers, self.payload

    def good(self, name: str, number: int) -> Place:
        """Return a place with something that the function may take there."""
        is_room = (name, number) in {("kv_get", 1), ("kv_get_many", 1), ("kv_list", 2), ("last_error", 0)}
        if is_room:
            size = self.random.choice([0, 1, 2, 3, 4, 5, 9, 50, 400, 3_000, 60_000])
            return Place(self.random.choice([PAYLOAD + 8_000, END - size, 0]), size)
        if name == "kv_get_many":
            count = self.random.choice([0, 1, 3, 20, 1_000, 1_001])
            return self.put(a_list(*self.random.choices(KEYS[: 5 if count > 3 else 8], k=count)))
        if number == 0 and name != "fail":
            return self.put(self.random.choice(KEYS if self.random.random() < 0.9 else BAD_KEYS))
        if name == "kv_list":
            return self.put(self.random.choice([b"", b"", *KEYS]))
        if name == "kv_compare_and_set" and self.random.random() < 0.3:
            return Place(0, ABSENT)
        return self.put(bytes((self.random.randrange(3),)) * self.random.choice([0, 1, 1, 2, 100, 900, 3_000, 3_001]))

    def put(self, data: bytes) -> Place:
        """Add bytes to the payload; return where they are."""
        place = Place(PAYLOAD + len(self.payload), len(data))
        self.payload += data
        return place

    def spoiled(self, place: Place) -> Place:
        """Return a place that is a little or altogether another one."""
        at, size = place
        near = self.random.choice([-1, 1, 2, 8, -(2**31)])
        match self.random.randrange(8):
            case 0:
                at = self.random.choice(EDGES)
            case 1:
                size = self.random.choice(EDGES)
            case 2:
                at, size = self.random.choice(EDGES), self.random.choice(EDGES)
            case 3:
                at, size = self.random.getrandbits(32), self.random.getrandbits(32)
            case 4:
                size = END - at + self.random.choice([-1, 0, 1])  # around the end of the memory
            case 5:
                size = 2**32 - at + self.random.choice([0, 1, 8, 100])  # around the end of all numbers
            case 6:
                at = END - size + self.random.choice([-1, 0, 1])
            case _:
                at, size = (at + near, size) if self.random.random() < 0.5 else (at, size + near)
        # Negative numbers are passed as such: what arrives at the function has 32 bits.
        return Place(at, size)

    def ttl_ms(self) -> int:
        """Return a time to live."""
        wild = [0, -1, -(2**63), 2**63 - 1, TTL_MS_MAX + 1, 2**32, self.random.getrandbits(63)]
        return self.random.choice(wild if self.random.random() < 0.3 else [1, 1_000, TTL_MS_MAX])


# -- the fuzz ---------------------------------------------------------------------------------------------------------


def rows_of(guest: Guest) -> dict[bytes, bytes]:
    """Return what is in a plugin's store, asked beside the guest."""
    store = guest.plugin.store
    assert store is not None
    return {text.encode(): value for text, value in store.get_many(store.list().result(WAIT)).result(WAIT).items()}


def empty(guest: Guest) -> None:
    """Remove all that is in a plugin's store."""
    store = guest.plugin.store
    assert store is not None
    for text in store.list().result(WAIT):
        assert store.delete(text).result(WAIT)


def changed(one: bytes, other: bytes) -> str:
    """Say where two memories differ."""
    places = [at for at, (left, right) in enumerate(zip(one, other, strict=True)) if left != right]
    return f"{len(places)} bytes differ, from {places[0]} to {places[-1]}" if places else "they are equal"


def fuzz(guest: Guest, bystander: Guest, grant: KVGrant, seed: int, calls: int) -> Counter[tuple[str, int]]:
    """Call so many times; return how often which function gave which error number, 0 standing for an answer."""
    tuples, model, tally = Tuples(seed), Model(grant), Counter[tuple[str, int]]()
    assert bystander.ask("kv_set", b"kept", b"as it was").result == 0
    for number in range(calls):
        name, numbers, payload = tuples.call()
        at = f"seed {seed}, call {number}: {name}({', '.join(map(hex, numbers))})"
        try:
            step = (name, *map(signed, numbers))
            (result,), before, after = guest.memory_after(step, payload=payload, function=name)
        except Exception as error:
            raise Complaint(f"{at} ended in {error!r}") from error
        expected, memory = model.call(name, numbers, before)
        memory = memory[: PAYLOAD - 8] + bytes(8) + memory[PAYLOAD:]  # where the guest has put the result
        if result != expected:
            raise Complaint(f"{at} returned {result} instead of {expected}")
        if after != memory:
            raise Complaint(f"{at} left another memory than it should: {changed(memory, after)}")
        tally[name, min(result, 0)] += 1
        if number % 500 == 499:
            if rows_of(guest) != model.rows:
                raise Complaint(f"{at}, or one before it, left other rows than it should")
            if bystander.ask("kv_get", b"kept", Room(20)).written != b"as it was" or len(rows_of(bystander)) != 1:
                raise Complaint(f"{at}, or one before it, has reached into another plugin's store")
            empty(guest)  # or a key that nobody comes upon again would keep it full
            model.rows.clear()
    return tally


def signed(number: int) -> int:
    """Return a number as an i64 can hold it: what is cut off to 32 bits then is the same."""
    return (number + 2**63) % 2**64 - 2**63


@pytest.fixture
def host(compiled: Path) -> Any:
    """Give a host in memory: the rows are compared, not the files."""
    with (
        Persistency(":memory:", clock=lambda: 1_700_000_000.0) as persistency,
        PluginHost(persistency, cache_dir=compiled) as opened,
    ):
        yield opened


def run(host: PluginHost, grant: KVGrant, seed: int, calls: int) -> Counter[tuple[str, int]]:
    """Load two plugins of the same code, and fuzz one."""
    guest, bystander = load(host, "fuzzed", grant, pages=PAGES), load(host, "bystander", KVGrant(), pages=PAGES)
    return fuzz(guest, bystander, grant, seed, calls)


# -- defects that it must find ----------------------------------------------------------------------------------------

# Spoiled memories reach only as far as the real one: what lies behind it would end this process.
_read, _write = GuestMemory.read, GuestMemory.write


def _clipped_read(self: GuestMemory, at: int, size: int) -> bytes:
    self.check(at, size)
    inside = min(at, END)
    return ctypes.string_at(self._address() + inside, max(0, min(size, END - inside)))


def _clipped_write(self: GuestMemory, at: int, data: bytes) -> None:
    self.check(at, len(data))
    data = data[: max(0, END - at)]
    if data:
        ctypes.memmove(self._address() + at, data, len(data))


def _wrapping(_self: GuestMemory, at: int, size: int) -> None:
    if (at + size) % 2**32 > END:
        raise Fault


def _off_by_one(_self: GuestMemory, at: int, size: int) -> None:
    if at + size > END + 1:
        raise Fault


def _starts_inside(_self: GuestMemory, at: int, size: int) -> None:
    if at >= END and size:
        raise Fault


def _writing_too_much(self: GuestMemory, at: int, data: bytes) -> None:
    _write(self, at, data)
    if data and at + len(data) < END:
        _write(self, at + len(data), b"\0")


def _cutting_off(memory: GuestMemory, at: int, room: int, data: bytes) -> int:
    memory.check(at, room)
    memory.write(at, data[:room])
    return len(data)


def _raising(_memory: GuestMemory, at: int, room: int, data: bytes) -> int:
    raise RuntimeError("nobody foresaw this")


def _check_with(check: Callable[[GuestMemory, int, int], None]) -> Callable[[pytest.MonkeyPatch], None]:
    def spoil(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(GuestMemory, "check", check)
        patch.setattr(GuestMemory, "read", _clipped_read)
        patch.setattr(GuestMemory, "write", _clipped_write)

    return spoil


PLANTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a bounds check that wraps": _check_with(_wrapping),
    "a bounds check that is off by one": _check_with(_off_by_one),
    "a bounds check of the first byte alone": _check_with(_starts_inside),
    "a write that is a byte too long": lambda patch: patch.setattr(GuestMemory, "write", _writing_too_much),
    "an answer cut off to fit": lambda patch: patch.setattr(kvservice, "written", _cutting_off),
    "a body that raises": lambda patch: patch.setattr(kvservice, "written", _raising),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_defect_is_found(name: str, host: PluginHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each defect is found, well within the number of calls that the fuzz has, from whatever seed."""
    PLANTS[name](monkeypatch)
    with pytest.raises(Complaint) as caught:
        run(host, GRANTS["plain"], SEED, CALLS // 2)
    print(name, "->", caught.value)


@pytest.mark.parametrize("name", GRANTS)
def test_wild_arguments_do_no_harm(name: str, host: PluginHost) -> None:
    """No exception, no other answer and not one other byte than the model says; every outcome has come up."""
    print(f"seed {SEED}")
    tally = run(host, GRANTS[name], SEED, CALLS if name == "plain" else CALLS // 2)
    for each in EVERYTHING:
        assert tally[each.name, 0], f"{each.name} was never called well"
        assert tally[each.name, FAULT] or not each.parameters, f"{each.name} never got a wild pointer"
    there = {number for _, number in tally}
    wanted = {0, NOT_FOUND, TOO_SMALL, QUOTA, INVALID, FAULT}
    assert there == wanted | ({DENIED} if GRANTS[name].prefix else set())
