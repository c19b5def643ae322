"""What values survive a journey through CBOR, which are refused, and what hostile bytes can't do."""

from __future__ import annotations

import contextlib
import enum
import ipaddress
import itertools
import math
import os
import random
import re
import struct
import subprocess
import sys
import tracemalloc
from collections import ChainMap, Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistency.codec import values
from persistency.codec.values import DEPTH_MAX, INT_BYTES_MAX, LOOSE_KEYS_BYTES_MAX, decode, encode
from persistency.errors import Corrupt, Misuse

ROOT = Path(__file__).parents[2]
HASH_MODULUS = 2**61 - 1
NOON = datetime(2024, 2, 29, 12, 0, tzinfo=UTC)


class Colour(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.StrEnum):
    FAST = "fast"


class Flags(enum.IntFlag):
    A = 1


class Text(str):
    __slots__ = ()


class Identity(str):
    """A str whose equal copies are different map keys."""

    __slots__ = ()
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


class Instant(datetime):
    """A datetime of a library of its own, with an own idea of ISO 8601."""

    def isoformat(self, sep: str = "T", timespec: str = "auto") -> str:
        return "at noon"


class Later(datetime):
    """A well-behaved subclass."""


class Day(date):
    pass


class Money(Decimal):
    pass


class Ratio(Fraction):
    pass


class Id(UUID):
    pass


@dataclass
class Point:
    x: int


class Pair(NamedTuple):
    left: Any
    right: Any


def same(left: Any, right: Any) -> bool:
    """Equality that tells True from 1 and 1.0, and takes every NaN for the same."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return struct.pack(">d", left) == struct.pack(">d", right) or (math.isnan(left) and math.isnan(right))
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return same(list(left), list(right)) and same(list(left.values()), list(right.values()))
    if isinstance(left, datetime):
        return left == right and left.utcoffset() == right.utcoffset()
    if isinstance(left, Decimal) and left:
        return left.as_tuple() == right.as_tuple()
    if isinstance(left, set | frozenset):
        return left == right and Counter(map(type, left)) == Counter(map(type, right))
    return bool(left == right)


def head(major: int, count: int) -> bytes:
    """The head of a CBOR item, its count in eight bytes."""
    return bytes(((major << 5) | 27,)) + count.to_bytes(8, "big")


def mapping(keys: list[Any]) -> bytes:
    """An encoded map with these keys, which needn't be possible as a dict."""
    return head(5, len(keys)) + b"".join(cbor2.dumps(one) + b"\x00" for one in keys)


def run_python(code: str) -> str:
    """Run code in a process of its own, since what it tries could crash it."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


offsets = st.integers(-1439, 1439).map(lambda minutes: timezone(timedelta(minutes=minutes)))
datetimes = st.datetimes(timezones=st.just(UTC) | offsets)
decimals = st.decimals(allow_nan=False, allow_infinity=False).map(lambda one: one or abs(one))
long_integers = st.binary(min_size=8, max_size=INT_BYTES_MAX).map(lambda data: int.from_bytes(data, "big"))
integers = st.integers() | st.integers(-(2**64) - 2, 2**64 + 2) | long_integers | long_integers.map(lambda n: -1 - n)
hashables = st.none() | st.booleans() | integers | st.floats(allow_nan=False) | st.text() | st.binary()
hashables |= st.uuids() | st.dates() | datetimes | decimals


# Composites have short names; those of nested strategies fill pages, which Hypothesis warns of.
@st.composite
def any_atom(draw: st.DrawFn) -> Any:
    """Anything that holds nothing and can be a key."""
    return draw(hashables)


keys = st.recursive(
    any_atom(), lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3), max_leaves=8
)


@st.composite
def any_key(draw: st.DrawFn) -> Any:
    """Anything that can be a key."""
    return draw(keys)


anything = st.recursive(
    any_atom() | st.floats() | st.fractions() | st.sets(any_key(), max_size=3),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(any_key(), inner, max_size=5),
    max_leaves=30,
)


# --- what comes back ---------------------------------------------------------------------------------------------


@given(anything)
@settings(max_examples=600, deadline=None)
def test_round_trip(value: Any) -> None:
    """Every value of the allowed types comes back equal, of the same types, in the same order."""
    assert same(decode(encode(value)), value)


@given(anything)
@settings(max_examples=150, deadline=None)
def test_same_as_cbor2(value: Any) -> None:
    """The bytes are those of `cbor2.dumps` with its defaults: plain RFC 8949, no references."""
    assert encode(value) == cbor2.dumps(value)


@pytest.mark.parametrize(
    ("value", "encoded"),
    [
        (0, "00"),
        (1000000, "1a000f4240"),
        (18446744073709551616, "c249010000000000000000"),
        (-18446744073709551617, "c349010000000000000000"),
        (1.1, "fb3ff199999999999a"),
        (False, "f4"),
        (None, "f6"),
        ("IETF", "6449455446"),
        (b"\x01\x02\x03\x04", "4401020304"),
        ([1, [2, 3]], "8201820203"),
        ({"a": 1, "b": [2, 3]}, "a26161016162820203"),
        (datetime(2013, 3, 21, 20, 4, tzinfo=UTC), "c074323031332d30332d32315432303a30343a30305a"),
        (Decimal("273.15"), "c48221196ab3"),
    ],
)
def test_golden_bytes(value: Any, encoded: str) -> None:
    """The examples of RFC 8949 (appendix A and 3.4.4) are encoded and decoded byte for byte."""
    assert encode(value).hex() == encoded
    assert same(decode(bytes.fromhex(encoded)), value)


@pytest.mark.parametrize(
    ("encoded", "value"),
    [
        ("c11a514b67b0", datetime(2013, 3, 21, 20, 4, tzinfo=UTC)),
        ("c1fb41d452d9ec200000", datetime(2013, 3, 21, 20, 4, 0, 500000, tzinfo=UTC)),
        ("d864193e3d", date(2013, 8, 16)),
        ("d903ec6a323031332d30332d3231", date(2013, 3, 21)),
        ("f93c00", 1.0),
        ("1800", 0),
        ("c2420001", 1),
    ],
)
def test_other_spellings_are_read(encoded: str, value: Any) -> None:
    """Epoch times, epoch days, short floats and long-winded ints of other encoders are read."""
    assert same(decode(bytes.fromhex(encoded)), value)


@pytest.mark.parametrize(
    ("value", "back"),
    [
        ((1, (2,)), [1, [2]]),
        (Pair(1, 2), [1, 2]),
        (frozenset({1}), {1}),
        ([frozenset("a")], [{"a"}]),
        (bytearray(b"a"), b"a"),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (defaultdict(int, a=1), {"a": 1}),
        (Counter("aa"), {"a": 2}),
        (Level.LOW, 1),
        (Flags.A, 1),
        (Mode.FAST, "fast"),
        (Text("a"), "a"),
        ({Mode.FAST: Level.LOW}, {"fast": 1}),
        ({Pair(1, 2): 3}, {(1, 2): 3}),
        ({frozenset({1}): 3}, {frozenset({1}): 3}),
        ({(1, (2, b"x")), None, True}, {(1, (2, b"x")), None, True}),
        (Decimal("-0"), Decimal(0)),
        ([Day(2024, 1, 2), Money("1.50"), Ratio(1, 3)], [date(2024, 1, 2), Decimal("1.50"), Fraction(1, 3)]),
        ({Id(int=1): Id(int=2)}, {UUID(int=1): UUID(int=2)}),
        (Later(2024, 2, 29, 12, tzinfo=UTC), NOON),
        (datetime(2024, 7, 1, tzinfo=ZoneInfo("Etc/GMT-2")), datetime(2024, 7, 1, tzinfo=timezone(timedelta(hours=2)))),
    ],
    ids=lambda one: type(one).__name__,
)
def test_what_changes_on_the_way(value: Any, back: Any) -> None:
    """Types that CBOR doesn't know come back as the type the module's table says, and then stay it."""
    assert same(decode(encode(value)), back)
    assert same(decode(encode(decode(encode(value)))), back)


def test_colliding_types_stay_apart() -> None:
    """In lists, True, 1 and 1.0 stay three values, as do text and bytes, 0.0 and -0.0."""
    value = [True, 1, 1.0, "a", b"a", 0.0, -0.0, None, False, 0, "", b"", [], {}]
    assert same(decode(encode(value)), value)


@pytest.mark.parametrize("size", [255, 4095, 4096, 4097, 65535, 65536, 65537, 1_000_000])
def test_sizes_around_buffers(size: int) -> None:
    """Text, bytes and lists around the buffer sizes of cbor2 come back whole, and a byte after them is noticed."""
    for value in ("é" * size, os.urandom(size), list(range(min(size, 70_000))), {"k" * size: [b"v" * size]}):
        data = encode(value)
        assert decode(data) == value
        with pytest.raises(Corrupt):
            decode(data + b"\x00")
        with pytest.raises(Corrupt):
            decode(data[:-1])


def test_items_form_a_sequence() -> None:
    """Encoded values one after another are a CBOR sequence that any decoder reads item by item."""
    items = [1, "two", {"three": [3.0]}, b"", None]
    path = b"".join(map(encode, items))
    got, pos = [], 0
    for end in itertools.accumulate(len(encode(item)) for item in items):
        got.append(decode(path[pos:end]))
        pos = end
    assert got == items


# --- what is refused at the call ---------------------------------------------------------------------------------

REFUSED: list[tuple[Any, str]] = [
    (memoryview(b"ab"), "bytes(view)"),
    (Colour.RED, "its value"),
    (1 + 2j, "z.real"),
    (timedelta(1), "total_seconds()"),
    (time(1), "isoformat()"),
    (Point(1), "asdict"),
    (Point, "its name"),
    (deque([1]), "list("),
    (range(3), "list("),
    (iter([1]), "list("),
    ({}.keys(), "list("),
    (MappingProxyType({}), "dict("),
    (ChainMap({}), "dict("),
    (cbor2.frozendict({1: 2}), "dict("),
    (re.compile("a"), "str"),
    (ipaddress.ip_address("1.2.3.4"), "str"),
    (cbor2.CBORTag(5, [1, 2]), "str"),
    (cbor2.CBORSimpleValue(99), "str"),
    (cbor2.undefined, "str"),
    (object(), "str"),
    (..., "str"),
    (datetime(2024, 1, 1), "tzinfo=UTC"),
    (Instant(2024, 1, 1, tzinfo=UTC), "plain types"),
    (Decimal("NaN"), "float"),
    (Decimal("sNaN"), "float"),
    (Decimal("-Infinity"), "float"),
    (Decimal("1E+1000000000"), "str(value)"),
    (Decimal("1E-6145"), "str(value)"),
    (Decimal("1" * 2467), "str(value)"),
    (2**8192, "plain types"),
    (-(2**8192) - 1, "plain types"),
    (Fraction(1, 2**8192 + 1), "plain types"),
    ("\ud800", "surrogatepass"),
    ("ok\udfff", "surrogatepass"),
]


@pytest.mark.parametrize(("value", "advice"), REFUSED, ids=lambda one: type(one).__name__)
def test_refused(value: Any, advice: str) -> None:
    """What can't come back as it was is `Misuse` wherever it stands, and the hint says what to pass instead."""
    places: list[Any] = [value, [value], {"a": [1, value]}, ({"b": (value,)},)]
    with contextlib.suppress(TypeError, RuntimeError, ValueError):
        places += [{value: 1}, {value}, {(1, value): 2}, frozenset([(value,)])]
    for place in places:
        with pytest.raises(Misuse) as caught:
            encode(place)
        assert advice in caught.value.hint


@pytest.mark.parametrize("seconds", [1, 59, 61, 1172, -1, -3601, 86399, 0.000001, -0.000001, 3600.5])
def test_offsets_are_whole_minutes(seconds: float) -> None:
    """An offset from UTC with seconds, which RFC 3339 can't express, is refused on both sides."""
    value = datetime(1890, 1, 1, tzinfo=timezone(timedelta(seconds=seconds)))
    with pytest.raises(Misuse, match="whole minutes"):
        encode([value])
    assert decode(encode(value.astimezone(UTC))) == value
    with pytest.raises(Corrupt):
        decode(cbor2.dumps(cbor2.CBORTag(0, "1890-01-01T00:00:00+00:19:32")))


@pytest.mark.parametrize("value", [{Fraction(1, 3): 1}, {Fraction(1, 3)}, {(1, (Fraction(1, 3),)): 1}], ids=str)
def test_fractions_are_no_keys(value: Any) -> None:
    """A Fraction, which is slow to compare, is refused as a map key or set member on both sides."""
    with pytest.raises(Misuse, match="Fraction can't be"):
        encode(value)
    with pytest.raises(Corrupt, match="Fraction can't be"):
        decode(cbor2.dumps(value))


def test_honest_collisions() -> None:
    """Decimals that have one hash in CPython, -1 and -2, are fine as keys."""
    value = {Decimal(-1): 1, Decimal(-2): 2, -3: {Decimal(-1), Decimal(-2)}}
    assert decode(encode(value)) == value


def test_limits_are_exact() -> None:
    """The longest ints, mantissas and exponents are written and read back, and can be printed."""
    for value in (2**8192 - 1, -(2**8192), Decimal("9" * 2466), Decimal("1E+6144"), Decimal("-9E-6144")):
        assert same(decode(encode([value])), [value])
        assert str(value)
    assert same(decode(encode(Fraction(2**8192 - 1, 2**8191))), Fraction(2**8192 - 1, 2**8191))


def test_refused_keeps_the_cause() -> None:
    """The error for a surrogate names its place and keeps Python's own as the cause."""
    with pytest.raises(Misuse, match="index 2") as caught:
        encode({"ok\ud800": 1})
    assert isinstance(caught.value.__cause__, UnicodeEncodeError)


def test_keys_that_become_equal_are_refused() -> None:
    """Map keys that are different objects here and the same bytes there are `Misuse`, not a lost entry."""
    with pytest.raises(Misuse, match="read back"):
        encode({Identity("a"): 1, Identity("a"): 2})


def test_odd_containers_cannot_slip_through() -> None:
    """A subclass that yields without end, or other than its length says, is `Misuse`."""

    class Endless(list[Any]):
        def __iter__(self) -> Any:
            return iter([Endless([1])])

    class Liar(list[Any]):
        def __len__(self) -> int:
            return 5

    with pytest.raises(Misuse):
        encode(Endless([1]))
    with pytest.raises(Misuse):
        encode([Liar([1]), "more"])


def test_text_keys_of_any_number() -> None:
    """Maps with text or bytes keys and sets of text may be as long as a value can be."""
    value = {f"key-{n}": n for n in range(60_000)} | {b"%d" % n: n for n in range(10_000)}
    assert len(encode(value)) > LOOSE_KEYS_BYTES_MAX
    assert decode(encode(value)) == value
    texts = {f"key-{n}" for n in range(60_000)}
    assert decode(encode([texts])) == [texts]


@pytest.mark.parametrize("kind", [dict, set])
def test_other_keys_have_a_limit(kind: Any) -> None:
    """A value with int keys is written up to the limit, and beyond it is `Misuse` that says so."""
    value = dict.fromkeys(range(40_000), 0) if kind is dict else set(range(40_000))
    assert decode(encode(value)) == value
    value = {"pad": "x" * LOOSE_KEYS_BYTES_MAX, "value": value}
    with pytest.raises(Misuse) as caught:
        encode(value)
    assert str(LOOSE_KEYS_BYTES_MAX) in caught.value.hint
    with pytest.raises(Corrupt):
        decode(cbor2.dumps(value))


# --- depth, cycles, size -----------------------------------------------------------------------------------------


def wrapped(leaf: Any, kind: str, levels: int) -> Any:
    """The leaf in so many containers."""
    for _ in range(levels):
        match kind:
            case "list":
                leaf = [leaf]
            case "tuple":
                leaf = (leaf,)
            case "dict":
                leaf = {"k": leaf}
            case "key":
                leaf = frozenset([leaf])
    return leaf


LEAVES: list[Any] = [1, 2**70, NOON, date(2024, 1, 1), Decimal("1.5"), Fraction(1, 3), UUID(int=5), "a", None]


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "key"])
@pytest.mark.parametrize("leaf", LEAVES, ids=str)
def test_depth_is_exact(kind: str, leaf: Any) -> None:
    """A value of 64 levels is written and read back whatever is innermost; one of 65 is refused on both sides."""
    if kind == "key" and isinstance(leaf, Fraction):
        leaf = Decimal(7)
    deepest = wrapped(leaf, kind, DEPTH_MAX)
    assert encode(decode(encode(deepest))) == encode(deepest)
    with pytest.raises(Misuse, match="64 deep"):
        encode(wrapped(leaf, kind, DEPTH_MAX + 1))
    with pytest.raises(Corrupt):
        decode(cbor2.dumps(wrapped(leaf, kind, DEPTH_MAX + 1)))


@pytest.mark.parametrize("empty", [[], {}, (), set(), frozenset()], ids=repr)
def test_an_empty_container_is_a_level(empty: Any) -> None:
    """The innermost container counts also when it is empty, on both sides."""
    assert decode(encode(wrapped(empty, "list", 63)))
    with pytest.raises(Misuse):
        encode(wrapped(empty, "list", 64))
    with pytest.raises(Corrupt):
        decode(cbor2.dumps(wrapped(empty, "list", 64)))


def test_depth_in_map_keys() -> None:
    """Tuples nested in a map key count as the levels they are."""
    assert decode(encode({wrapped(1, "tuple", 63): 1}))
    with pytest.raises(Misuse):
        encode({wrapped(1, "tuple", 64): 1})
    with pytest.raises(Corrupt):
        decode(cbor2.dumps({wrapped(1, "tuple", 64): 1}))


def test_cycles_are_refused() -> None:
    """A list, a dict or a pair of them that contains itself, also twice, is `Misuse`."""
    once: list[Any] = []
    once.append(once)
    twice: list[Any] = []
    twice += [twice, twice]
    inner: dict[str, Any] = {}
    inner["k"] = [inner]
    for value in (once, twice, inner, {"a": [once]}):
        with pytest.raises(Misuse):
            encode(value)


def test_one_object_in_many_places() -> None:
    """An object that is held twice is written twice; one that would double forty times over is `Misuse`."""
    shared = {"a": [1]}
    assert decode(encode([shared, shared])) == [shared, shared]
    bomb: list[Any] = []
    for _ in range(40):
        bomb = [bomb, bomb]
    with pytest.raises(Misuse, match="containers"):
        encode(bomb)


def test_crash_corpus_in_a_process_of_its_own() -> None:
    """Depths of 65 to 100,000 both ways, cycles and doubling neither crash the process nor take over 100 MiB."""
    code = """
import resource
from persistency.codec.values import decode, encode
from persistency.errors import Corrupt, Misuse
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def refused(call, value, error):
    try:
        call(value)
    except error:
        return
    raise SystemExit(f"accepted by {call}")
for depth in (65, 400, 401, 7_000, 7_500, 100_000):
    for wrap in (lambda v: [v], lambda v: (v,), lambda v: {'k': v}, lambda v: {(1, 2): v}):
        value = 1
        for _ in range(depth):
            value = wrap(value)
        refused(encode, value, Misuse)
        while not isinstance(value, int):
            (value,) = value.values() if isinstance(value, dict) else value
    for head in map(bytes.fromhex, ("81", "a1616b", "a1", "c1", "d90102", "d9010281", "c482")):
        refused(decode, head * depth + b"\\x00", Corrupt)
        refused(decode, head * depth, Corrupt)
        refused(decode, b"\\x9f" * depth, Corrupt)
cycle = []
cycle += [cycle, cycle]
refused(encode, cycle, Misuse)
decode(b"\\x9a" + (1_000_000).to_bytes(4, "big") + b"\\xa0" * 1_000_000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    assert int(run_python(code)) <= 100


# --- hostile bytes -----------------------------------------------------------------------------------------------

HOSTILE = {
    "nothing": b"",
    "truncated": encode({"a": [1, 2, 3]})[:-1],
    "trailing zero": b"\x00\x00",
    "trailing item": encode("a") + encode("b"),
    "trailing copy": encode([1]) * 2,
    "break": b"\xff",
    "reserved length": b"\x1c",
    "bad utf-8": b"\x61\xff",
    "surrogate in utf-8": b"\x63\xed\xa0\x80",
    "indefinite list": b"\x9f\x00\xff",
    "indefinite map": b"\xbf\x61a\x00\xff",
    "indefinite bytes": b"\x5f\x41a\xff",
    "indefinite text": b"\x7f\x61a\xff",
    "duplicate text keys": b"\xa2\x61a\x00\x61a\x01",
    "duplicate int keys": b"\xa2\x01\x00\x01\x01",
    "1 and 1.0 as keys": b"\xa2\x01\x00\xf9\x3c\x00\x01",
    "1 and True as keys": b"\xa2\x01\x00\xf5\x01",
    "duplicate keys in a list": b"\x81\xa2\x61a\x00\x61a\x01",
    "undefined": b"\xf7",
    "undefined in a list": b"\x82\x00\xf7",
    "simple value 0": b"\xe0",
    "simple value 19": b"\xf3",
    "simple value 99": b"\x81\xf8\x63",
    "simple value in a key": b"\xa1\xe0\x00",
    "undefined in a set": b"\xd9\x01\x02\x81\xf7",
    "map as a key": b"\xa1\xa0\x00",
    "map in a tuple as a key": b"\xa1\x81\xa0\x00",
    "map in a set": b"\xd9\x01\x02\x81\xa0",
    "naive datetime": cbor2.dumps(cbor2.CBORTag(0, "2024-01-01T00:00:00")),
    "date as a datetime": cbor2.dumps(cbor2.CBORTag(0, "2024-01-01")),
    "number as a datetime": b"\xc0\x00",
    "nonsense as a datetime": b"\xc0\x61a",
    "impossible offset": cbor2.dumps(cbor2.CBORTag(0, "2024-01-01T00:00:00+99:99")),
    "far future": b"\xc1\x1b" + b"\xff" * 8,
    "NaN as a time": b"\xc1\xf9\x7e\x00",
    "infinity as a time": b"\xc1\xf9\x7c\x00",
    "far day": b"\xd8\x64\x1b" + b"\xff" * 8,
    "text as a day": b"\xd9\x03\xec\x61a",
    "int as a bignum": b"\xc2\x00",
    "bignum of a bignum": b"\xc2\xc2\x41\x01",
    "bignum too long": b"\xc2\x59\x04\x01" + b"\x01" * 1025,
    "negative bignum too long": b"\xc3\x59\x04\x01" + b"\x01" * 1025,
    "decimal of one": b"\xc4\x81\x01",
    "decimal of three": b"\xc4\x83\x01\x01\x01",
    "decimal of text": b"\xc4\x82\x01\x61a",
    "decimal of bools": b"\xc4\x82\xf5\xf5",
    "decimal of floats": b"\xc4\x82\xf9\x3c\x00\x01",
    "decimal with a huge exponent": b"\xc4\x82\x1a\x3b\x9a\xca\x00\x01",
    "decimal with a bignum exponent": b"\xc4\x82\xc2\x49\x01" + bytes(8) + b"\x01",
    "decimal with too many digits": b"\xc4\x82\x00\xc2\x59\x04\x00" + b"\xff" * 1024,
    "fraction by zero": b"\xd8\x1e\x82\x01\x00",
    "fraction of bools": b"\xd8\x1e\x82\xf5\xf5",
    "fraction of text": b"\xd8\x1e\x82\x61a\x61b",
    "short UUID": b"\xd8\x25\x41a",
    "text UUID": b"\xd8\x25\x70" + b"a" * 16,
    "set of an int": b"\xd9\x01\x02\x00",
    "set of a map": b"\xd9\x01\x02\xa0",
    "tag without a value": b"\xc0",
}


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_corrupt(data: bytes) -> None:
    """Malformed, ambiguous and foreign bytes are `Corrupt`, alone and inside a value."""
    with pytest.raises(Corrupt):
        decode(data)
    with pytest.raises(Corrupt):
        decode(b"\x82\x00" + data)


@pytest.mark.parametrize("length", [2**40, 2**63, 2**64 - 1])
@pytest.mark.parametrize("major", [2, 3, 4, 5])
def test_declared_lengths_allocate_nothing(major: int, length: int) -> None:
    """A length that the bytes don't have is `Corrupt`, and no memory is taken for it."""
    tracemalloc.start()
    try:
        for data in (head(major, length), b"\xd9\x01\x02" + head(major, length), b"\xa1" + head(major, length)):
            with pytest.raises(Corrupt):
                decode(data + b"abc")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("tag", [5, 16, 21, 24, 25, 28, 29, 32, 35, 36, 43, 52, 54, 256, 260, 261, 43000, 55799, 2**63])
def test_unlisted_tags_are_corrupt(tag: int) -> None:
    """Tags that compile, refer back, share, or are unknown are `Corrupt` with the tag's number, whatever they hold."""
    for inner in ("a", b"a", 0, [], [1, 2], {}, ["a", {"b": 1}]):
        for outer in (lambda one: one, lambda one: [one], lambda one: {"a": one}):
            with pytest.raises(Corrupt, match=str(tag)):
                decode(cbor2.dumps(outer(cbor2.CBORTag(tag, inner))))
    with pytest.raises(Corrupt):
        decode(b"\xa1" + cbor2.dumps(cbor2.CBORTag(tag, "a")) + b"\x00")


def test_references_are_corrupt() -> None:
    """What cbor2 writes with value sharing or string referencing can't be read: it could grow without bound."""
    shared = ["aaaa", "aaaa"]
    for data in (cbor2.dumps([shared, shared], value_sharing=True), cbor2.dumps(shared, string_referencing=True)):
        with pytest.raises(Corrupt):
            decode(data)


def test_corrupt_keeps_the_cause() -> None:
    """`Corrupt` has the decoder's error as its cause, so that a traceback tells what is wrong."""
    with pytest.raises(Corrupt, match="premature end") as caught:
        decode(b"\x82")
    assert isinstance(caught.value.__cause__, cbor2.CBORDecodeError)


@pytest.mark.parametrize(
    "unit",
    ["a0", "80", "a100" * 60 + "00", "a160" * 60 + "00", "d9010280", "d901028160", "c100", "c4820001", "8100"],
)
def test_memory_is_bounded_by_the_bytes(unit: str) -> None:
    """Decoding the densest bytes takes up to 120 times their size in memory."""
    count = 20_000 if len(unit) < 20 else 300
    data = b"\x99" + count.to_bytes(2, "big") + bytes.fromhex(unit) * count
    tracemalloc.start()
    try:
        decode(data)
        assert tracemalloc.get_traced_memory()[1] <= 120 * len(data) + 65_536
    finally:
        tracemalloc.stop()


def collisions() -> dict[str, bytes]:
    """Maps and sets whose keys all have one hash."""
    ints = [HASH_MODULUS * n for n in range(-4, 8)]
    return {
        "bignums": mapping([HASH_MODULUS * n for n in range(1000, 20_000)]),
        "uuids": mapping([UUID(int=HASH_MODULUS * n) for n in range(1000, 13_000)]),
        "uuids in a set": encode([])[:0]
        + b"\xd9\x01\x02"
        + cbor2.dumps([UUID(int=HASH_MODULUS * n) for n in range(9999)]),
        "decimals in tuples": mapping([(Decimal(HASH_MODULUS * n),) for n in range(9000)]),
        "fractions": mapping([Fraction(HASH_MODULUS * n + 1, 2) for n in range(9000)]),
        "a megabyte of ints": mapping([HASH_MODULUS * n for n in range(80_000)]),
        "tuples of uuids": mapping(list(itertools.product([UUID(int=HASH_MODULUS * n) for n in range(16)], repeat=3))),
        "tuples, over the limit": mapping(list(itertools.islice(itertools.product(ints, repeat=5), 9000))),
    }


def test_colliding_keys_are_corrupt() -> None:
    """Keys made to have one hash are refused before they take quadratic time."""
    for name, data in collisions().items():
        started = perf_counter()
        with pytest.raises(Corrupt):
            decode(data)
        assert perf_counter() - started < 2, name


def test_the_worst_tuples_take_bounded_time() -> None:
    """As many colliding tuples as the limit lets through are read in seconds, not minutes."""
    ints = [HASH_MODULUS * n for n in range(-4, 8)]
    data = mapping(list(itertools.islice(itertools.product(ints, repeat=5), 2000)))
    assert len(data) < LOOSE_KEYS_BYTES_MAX
    assert len(decode(data)) == 2000


def test_repeated_keys_are_no_collision() -> None:
    """The same UUID as a key of many maps in one value is what records look like, and fine."""
    value = [{UUID(int=7): n} for n in range(1000)]
    assert decode(encode(value)) == value


def check_any(data: bytes) -> bool:
    """Whether the bytes are a value; if so, it must encode and come back."""
    try:
        value = decode(data)
    except Corrupt:
        return False
    # Sets have no order, and a NaN isn't equal to itself.
    assert len(encode(decode(encode(value)))) == len(encode(value))
    return True


def test_random_bytes() -> None:
    """20,000 random byte strings are `Corrupt` or a value that encodes."""
    source = random.Random(20_000)
    good = sum(check_any(source.randbytes(source.randrange(1, 40))) for _ in range(20_000))
    assert 0 < good < 20_000


def test_mutated_values() -> None:
    """Valid encodings with bits flipped, bytes inserted, cut or repeated are `Corrupt` or a value that encodes."""
    source = random.Random(59)
    seeds = [
        encode(value)
        for value in (
            {"id": 1, "name": "é", "at": NOON, "tags": {"a", "b"}, "blob": b"\x00\xff", "price": Decimal("1.50")},
            {1: [2**70, -(2**70)], (1, "x"): {frozenset({1}), None}, UUID(int=9): Fraction(1, 3)},
            [[[[{"k": [1.5, float("inf"), True, None, date(2024, 1, 1)]}]]]] * 3,
            list(range(30)),
        )
    ]
    seeds += [data for data in HOSTILE.values() if data]
    good = 0
    for _ in range(15_000):
        data = bytearray(source.choice(seeds))
        for _ in range(source.randrange(1, 4)):
            pos = source.randrange(len(data) + 1)
            match source.randrange(5):
                case 0:
                    data[pos : pos + 1] = bytes((source.randrange(256),))
                case 1:
                    data.insert(pos, source.randrange(256))
                case 2:
                    del data[pos : pos + source.randrange(1, 4)]
                case 3:
                    data[pos:pos] = source.choice(seeds)
                case 4 if pos < len(data):
                    data[pos] ^= 1 << source.randrange(8)
        good += check_any(bytes(data))
    assert 0 < good < 15_000


@given(st.binary(max_size=60))
@settings(max_examples=500, deadline=None)
def test_any_bytes(data: bytes) -> None:
    """Any bytes are `Corrupt` or a value that encodes."""
    check_any(data)


# --- around the calls --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["00", 0, None, [0], bytearray(b"\x00"), memoryview(b"\x00")])
def test_decode_takes_bytes(data: Any) -> None:
    """Anything but bytes is `Misuse`: nothing is wrong with the file."""
    with pytest.raises(Misuse):
        decode(data)


class PanicException(BaseException):
    """Named as the panics of Rust code are."""


def raiser(error: BaseException) -> Any:
    """A function that raises it, whatever it is called with."""

    def run(*args: Any, **options: Any) -> Any:
        raise error

    return run


def test_panics_are_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A panic in cbor2, which is no `Exception`, is `Corrupt` on reading and `Misuse` on writing."""
    monkeypatch.setattr(cbor2, "loads", raiser(PanicException("index out of bounds")))
    monkeypatch.setattr(cbor2, "dumps", raiser(PanicException("index out of bounds")))
    with pytest.raises(Corrupt, match="out of bounds"):
        decode(b"\x00")
    with pytest.raises(Misuse, match="out of bounds"):
        encode(0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, RecursionError])
def test_what_is_nobodys_fault_passes(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    """Ctrl-C, exit and a lack of memory pass through, also where cbor2 wraps what one of its callbacks raised."""
    data = encode(NOON)
    with monkeypatch.context() as patch:
        patch.setitem(values._TAGS, 0, raiser(error()))
        with pytest.raises(error):
            decode(data)
        with pytest.raises(error):
            decode(b"\x82" + data + b"\x00")
    with monkeypatch.context() as patch:
        patch.setattr(cbor2, "dumps", raiser(error()))
        with pytest.raises(error):
            encode(0)
    assert decode(data) == NOON


def test_the_value_is_left_alone() -> None:
    """Encoding doesn't change what it is given."""
    value = {"a": [1, {2, 3}], "b": OrderedDict(c=(1, 2))}
    encode(value)
    assert value == {"a": [1, {2, 3}], "b": OrderedDict(c=(1, 2))}
    assert isinstance(value["b"], OrderedDict)


def test_the_limit_of_containers_holds_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many containers as the limit says are written and read; one more is refused on both sides."""
    monkeypatch.setattr(values, "CONTAINERS_MAX", 100)
    value: list[Any] = [[] for _ in range(100)]
    assert decode(encode(value)) == value
    value.append([])
    with pytest.raises(Misuse, match="containers"):
        encode(value)
    with pytest.raises(Corrupt, match="containers"):
        decode(cbor2.dumps(value))


def test_the_longest_int_is_found_among_others() -> None:
    """A too long int is refused also deep in a long value, and one of the longest is not."""
    noise = ["\u00c2\u00d9" * 500, os.urandom(5000), list(range(300))]
    assert decode(encode([*noise, {"n": 2**8192 - 1}])) == [*noise, {"n": 2**8192 - 1}]
    with pytest.raises(Misuse, match=str(INT_BYTES_MAX)):
        encode([*noise, {"n": 2**8192}])
