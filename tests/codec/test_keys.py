"""The key encoding, held against FoundationDB's own Python package, its published vectors and brute force."""

from __future__ import annotations

import copy
import enum
import math
import pickle
import random
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, NamedTuple
from uuid import UUID

import fdb.tuple
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistency.codec import keys
from persistency.codec.keys import KEY_BYTES_MAX, Key, KeyRange, RawKey, as_key, key
from persistency.errors import Misuse

TEXTS = ["", "a", "ab", "a\0", "a\0b", "\0", "\0\0", "é", "\uffff", "\U0001f600", "channel-42", "x" * 70]
INTS = [
    sign * value + shift
    for bits in (0, 1, 7, 8, 15, 16, 24, 32, 48, 56, 63, 64, 65, 72, 128, 2032, 2039)
    for value in (1 << bits,)
    for sign in (1, -1)
    for shift in (-1, 0, 1)
]
FLOATS = [0.0, -0.0, 1.0, -1.0, 5e-324, -5e-324, 1.7e308, -1.7e308, math.inf, -math.inf, math.nan, -math.nan]


def double(bits: int) -> float:
    """The float of these 64 bits."""
    value: float = struct.unpack(">d", struct.pack(">Q", bits))[0]
    return value


def random_part(rng: random.Random, depth: int = 0) -> Any:
    """A part of any type but datetime, which the oracle lacks."""
    kind = rng.randrange(9 if depth < 3 else 8)
    if kind == 0:
        return None
    if kind == 1:
        return rng.choice([b"", b"\0", b"\xff", b"\0\xff", b"a"]) + rng.randbytes(rng.randrange(5))
    if kind == 2:
        return rng.choice(TEXTS) + rng.choice(["", chr(rng.randrange(0xD800)), "z"])
    if kind == 3:
        return rng.choice(INTS)
    if kind == 4:
        return rng.randrange(-(1 << (bits := rng.randrange(1, 90))), 1 << bits)
    if kind == 5:
        return rng.choice(FLOATS) if rng.random() < 0.5 else double(rng.getrandbits(64))
    if kind == 6:
        return rng.random() < 0.5
    if kind == 7:
        return UUID(int=rng.getrandbits(128))
    return tuple(random_part(rng, depth + 1) for _ in range(rng.randrange(4)))


def random_tuples(seed: int, count: int) -> Iterator[tuple[Any, ...]]:
    """The same generated tuples for the same seed."""
    rng = random.Random(seed)
    for _ in range(count):
        yield tuple(random_part(rng) for _ in range(rng.randrange(4)))


def exact(value: Any) -> Any:
    """The value with its type and bits, so that equal means the same."""
    if isinstance(value, tuple):
        return (tuple, *map(exact, value))
    if isinstance(value, float):
        return (float, struct.pack(">d", value))
    return (type(value), value)


PARTS = st.recursive(
    st.none()
    | st.binary(max_size=20)
    | st.text(max_size=20)
    | st.integers()
    | st.integers(min_value=-(2**2040) + 1, max_value=2**2040 - 1)
    | st.floats()
    | st.booleans()
    | st.uuids(),
    lambda inner: st.lists(inner, max_size=4).map(tuple),
    max_leaves=8,
)
TUPLES = st.lists(PARTS, max_size=5).map(tuple)


# The encoding


def test_bulk_equals_the_oracle_and_decodes_exactly() -> None:
    """100,000 generated tuples encode to the oracle's bytes and decode to what they were, types and bits included."""
    for parts in random_tuples(1, 100_000):
        k = key(*parts)
        assert k == fdb.tuple.pack(parts), parts
        assert exact(k.parts) == exact(parts)


@given(TUPLES)
@settings(max_examples=300, deadline=None)
def test_any_tuple_equals_the_oracle(parts: tuple[Any, ...]) -> None:
    """Any tuple encodes to the oracle's bytes and decodes exactly; its text evaluates to the same key."""
    k = key(*parts)
    assert k == fdb.tuple.pack(parts)
    assert exact(k.parts) == exact(parts)
    shown = eval(repr(k), {"key": key, "Key": Key, "UUID": UUID, "float": float})
    assert type(shown) is Key
    assert shown == k


def test_every_boundary_int_equals_the_oracle() -> None:
    """Ints around every power of two, up to 255 bytes, encode to the oracle's bytes, alone, second and nested."""
    for bits in range(2041):
        for value in {(1 << bits) - 1, (1 << bits) % (1 << 2040), 1 - (1 << bits), 5 << max(bits - 3, 0)}:
            assert key(value) == fdb.tuple.pack((value,)), bits
            assert key("a", value) == fdb.tuple.pack(("a", value))
            assert key((value,)) == fdb.tuple.pack(((value,),))
            assert key(value).parts == (value,)


def test_order_of_bytes_is_the_order_of_tuples() -> None:
    """On 50,000 generated pairs the bytes sort as the oracle compares the tuples."""
    tuples = list(random_tuples(2, 50_000))
    rng = random.Random(3)
    for first in tuples:
        second = rng.choice(tuples) if rng.random() < 0.7 else first[: rng.randrange(3)]
        a, b = key(*first), key(*second)
        assert (a > b) - (a < b) == fdb.tuple.compare(first, second), (first, second)


@given(TUPLES, TUPLES)
@settings(max_examples=200, deadline=None)
def test_order_of_any_pair(first: tuple[Any, ...], second: tuple[Any, ...]) -> None:
    """Any two keys sort as their tuples, and a parent before its children."""
    a, b = key(*first), key(*second)
    assert (a > b) - (a < b) == fdb.tuple.compare(first, second)
    assert key(*first) <= key(*first, *second)


@pytest.mark.parametrize(
    ("parts", "encoded"),
    [
        ((), ""),
        ((None,), "00"),
        ((b"foo\x00bar",), "01 66 6f 6f 00 ff 62 61 72 00"),
        (("F\u00d4O\u0000bar",), "02 46 c3 94 4f 00 ff 62 61 72 00"),
        (((b"foo\x00bar", None, ()),), "05 01 66 6f 6f 00 ff 62 61 72 00 00 ff 05 00 00"),
        ((-5551212,), "11 ab 4b 93"),
        ((0,), "14"),
        ((1,), "15 01"),
        ((-1,), "13 fe"),
        ((255,), "15 ff"),
        ((256,), "16 01 00"),
        ((-256,), "12 fe ff"),
        ((2**64 - 2,), "1c ff ff ff ff ff ff ff fe"),
        ((2**64 - 1,), "1d 08 ff ff ff ff ff ff ff ff"),
        ((-(2**64) + 1,), "0b f7 00 00 00 00 00 00 00 00"),
        ((2**64,), "1d 09 01 00 00 00 00 00 00 00 00"),
        ((-(2**64),), "0b f6 fe ff ff ff ff ff ff ff ff"),
        ((-42.0,), "21 3f ba ff ff ff ff ff ff"),
        ((1.0,), "21 bf f0 00 00 00 00 00 00"),
        ((-0.0,), "21 7f ff ff ff ff ff ff ff"),
        ((False, True), "26 27"),
        ((UUID(int=1),), "30 00 00 00 00 00 00 00 00 00 00 00 00 00 00 00 01"),
        ((datetime(1970, 1, 1, tzinfo=UTC),), "40 80 00 00 00 00 00 00 00"),
        ((datetime(1970, 1, 1, 0, 0, 1, 1, tzinfo=UTC),), "40 80 00 00 00 00 0f 42 41"),
        ((datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),), "40 7f ff ff ff ff ff ff ff"),
        (("channel-42", 123456), "02 63 68 61 6e 6e 65 6c 2d 34 32 00 17 01 e2 40"),
    ],
)
def test_golden_vectors(parts: tuple[Any, ...], encoded: str) -> None:
    """The published test cases of design/tuple.md, and one or more of each type, encode to these very bytes."""
    assert key(*parts).hex(" ") == encoded
    assert exact(key(*parts).parts) == exact(parts)


def test_datetimes_are_exact_and_ordered() -> None:
    """Datetimes of any zone keep every microsecond, sort by instant and come back in UTC."""
    rng = random.Random(4)
    first = datetime.min.replace(tzinfo=UTC)
    span = (datetime.max.replace(tzinfo=UTC) - first) // timedelta(microseconds=1)
    moments = [first + timedelta(microseconds=rng.randrange(span + 1)) for _ in range(2_000)]
    moments += [first, datetime.max.replace(tzinfo=UTC)]
    for moment in moments:
        k = key(moment)
        (back,) = k.parts
        assert back == moment
        assert back.tzinfo is UTC
        if 10 < moment.year < 9990:
            assert key(moment.astimezone(timezone(timedelta(hours=5, minutes=45, microseconds=7)))) == k
    assert sorted(moments) == [k.parts[0] for k in sorted(map(key, moments))]


def test_datetimes_that_cannot_be_keys() -> None:
    """Naive datetimes, and those outside the years 1 to 9999 of UTC, are Misuse in both directions."""
    with pytest.raises(Misuse, match="aware") as caught:
        key(datetime(2024, 1, 1))
    assert "tzinfo=UTC" in caught.value.hint
    with pytest.raises(Misuse, match="years"):
        key(datetime.min.replace(tzinfo=timezone(timedelta(hours=14))))
    with pytest.raises(Misuse, match="years"):
        key(datetime.max.replace(tzinfo=timezone(timedelta(hours=-1))))
    for moment, step in ((datetime.min, -1), (datetime.max, 1)):
        edge = int.from_bytes(key(moment.replace(tzinfo=UTC))[1:], "big")
        for micros in (edge + step, 0, 2**64 - 1):
            with pytest.raises(Misuse):
                _ = Key(b"\x40" + micros.to_bytes(8, "big")).parts


class Point(NamedTuple):
    x: int
    y: str | None


@dataclass
class User:
    name: str
    point: Any


class Colour(enum.Enum):
    RED = "red"
    NOTHING = None
    PAIR = (1, "b")


class Level(enum.IntEnum):
    LOW = 1


class Mode(enum.StrEnum):
    ON = "on"


class Flags(enum.IntFlag):
    A = 1
    B = 2


class Shout(str):
    __slots__ = ()

    def __hash__(self) -> int:
        return hash("other")

    def __eq__(self, other: object) -> bool:
        return other == "other"

    def encode(self, *_: Any) -> bytes:  # type: ignore[override]
        return b"wrong"

    def __str__(self) -> str:
        return "wrong"


class Odd(int):
    def __or__(self, other: Any) -> int:
        return 99

    def __index__(self) -> int:
        return 99

    def __int__(self) -> int:
        return 99


class Blob(bytes):
    def replace(self, *_: Any) -> bytes:
        return b"wrong"


class Real(float):
    def __neg__(self) -> float:
        return 7.0


@pytest.mark.parametrize(
    ("part", "plain"),
    [
        (Point(1, None), (1, None)),
        (User("ann", Point(2, "z")), ("ann", (2, "z"))),
        (Colour.RED, "red"),
        (Colour.NOTHING, None),
        (Colour.PAIR, (1, "b")),
        (Level.LOW, 1),
        (Mode.ON, "on"),
        (Flags.A | Flags.B, 3),
        (Shout("abc"), "abc"),
        (Odd(70_000), 70_000),
        (Blob(b"a\0"), b"a\0"),
        (Real(1.5), 1.5),
        (bytearray(b"a\0b"), b"a\0b"),
        (memoryview(b"abcd")[::2], b"ac"),
    ],
)
def test_parts_that_stand_for_others(part: Any, plain: Any) -> None:
    """NamedTuples, dataclasses, Enums, buffers and subclasses encode as what they hold, at any depth."""
    assert key(part) == fdb.tuple.pack((plain,))
    assert key("a", part) == fdb.tuple.pack(("a", plain))
    assert key((part, None)) == fdb.tuple.pack(((plain, None),))
    assert exact(key(part).parts) == exact((plain,))


def test_numbers_of_different_types_are_different_keys() -> None:
    """True, 1, 1.0 and "1" stay four keys; 0.0 and -0.0 two; the memo of texts never mixes types."""
    assert len({key(part) for part in (True, 1, 1.0, "1", b"1", (1,))}) == 6
    assert key(0.0) != key(-0.0)
    assert [exact(key(part).parts[0]) for part in (True, 1, 1.0)] == [(bool, True), (int, 1), exact(1.0)]
    assert key("other") != key(Shout("abc"))
    assert key("other").parts == ("other",)


@pytest.mark.parametrize("bits", [0x7FF8000000000001, 0x7FF0000000000001, 0xFFF8000000000000, 0xFFFFFFFFFFFFFFFF])
def test_nan_bits_survive(bits: int) -> None:
    """A NaN keeps sign and payload; the text of one that no expression gives shows its bytes."""
    k = key(double(bits))
    assert k == fdb.tuple.pack((double(bits),))
    assert exact(k.parts) == exact((double(bits),))
    assert repr(k).startswith("Key(b'!")


# Bytes that aren't keys


def held(data: bytes) -> bool:
    """Whether the bytes decode; if so, they must be the canonical encoding of what they decode to."""
    try:
        parts = Key(data).parts
    except Misuse:
        return False
    assert key(*parts) == data
    return True


def test_random_bytes_are_misuse_or_canonical() -> None:
    """100,000 random and mutated byte strings are Misuse or round-trip exactly; nothing else ever happens."""
    rng = random.Random(5)
    alphabet = bytes(
        [0, 0, 1, 2, 5, 0x0B, 0x0C, 0x13, 0x14, 0x15, 0x1C, 0x1D, 0x21, 0x26, 0x27, 0x30, 0x40, 97, 0xFF, 8]
    )
    good = 0
    for _ in range(50_000):
        data = (
            bytes(rng.choices(alphabet, k=rng.randrange(14)))
            if rng.random() < 0.7
            else rng.randbytes(rng.randrange(14))
        )
        good += held(data)
    for parts in random_tuples(6, 50_000):
        data = bytearray(key(*parts))
        if data:
            at = rng.randrange(len(data))
            change = rng.randrange(3)
            if change == 0:
                data[at] = rng.choice(alphabet)
            elif change == 1:
                del data[at : at + rng.randrange(1, 4)]
            else:
                data.insert(at, rng.choice(alphabet))
        good += held(bytes(data))
    assert 1_000 < good < 99_000


@given(st.binary(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_misuse_or_canonical(data: bytes) -> None:
    """Any bytes are Misuse or the encoding of their parts, and can always be shown and evaluated again."""
    held(data)
    names = {"key": key, "Key": Key, "UUID": UUID, "datetime": sys.modules["datetime"], "float": float}
    assert eval(repr(Key(data)), names) == data


@pytest.mark.parametrize(
    "data",
    [
        "01", "01 61", "02 61", "02 61 00 ff", "02 ff 00", "02 ed a0 80 00", "02 c0 80 00", "05", "05 15 01",
        "05 00 ff", "15", "15 00", "16 00 01", "17 01", "13", "13 ff", "12 ff 00", "12 fe",
        "1c 00 01 02 03 04 05 06 07",
        "1c ff ff ff ff ff ff ff ff", "0c 00 00 00 00 00 00 00 00", "0c ff 00 00 00 00 00 00 00", "1d", "1d 01 05",
        "1d 00", "0b ff", "0b fe 05", "1d 08 7f ff ff ff ff ff ff ff", "1d 09 00 01 02 03 04 05 06 07 08",
        "1d 09 01 02", "0b", "0b f7 01 00 00 00 00 00 00 00", "0b f6 ff 00 00 00 00 00 00 00 00", "0b f6 fe",
        "0a", "1e", "20 bf 80 00 00", "21", "21 80 00", "22", "25", "28", "30 00", "31", "32",
        "33 00 00 00 00 00 00 00 00 00 00 00 00", "40 80", "41", "03", "04", "ff", "00 ff", "02 61 00 fe",
    ],
)  # fmt: skip
def test_malformed_bytes_are_misuse(data: str) -> None:
    """Missing ends, second spellings, bad UTF-8, foreign types and trailing junk are Misuse, which says where."""
    with pytest.raises(Misuse, match="not a key: at byte"):
        _ = Key(bytes.fromhex(data)).parts
    assert repr(Key(bytes.fromhex(data))).startswith("Key(b")


def test_foreign_types_are_named_unsupported() -> None:
    """FoundationDB's 32-bit floats and versionstamps are refused as types that aren't supported."""
    for data in (fdb.tuple.pack((fdb.tuple.SingleFloat(1.0),)), b"\x33" + b"0123456789ab", b"\x05\x33" + bytes(13)):
        with pytest.raises(Misuse, match="not supported"):
            _ = Key(data).parts


# Limits


def nested(depth: int) -> Any:
    """A text with so many tuples around it."""
    part: Any = "x"
    for _ in range(depth):
        part = (part,)
    return part


def test_depth_limit_is_the_same_both_ways() -> None:
    """64 nested tuples encode and decode; 65, a million, and a tuple that would never end are Misuse."""
    assert key(nested(64)).parts == (nested(64),)
    assert key(nested(64)) == fdb.tuple.pack((nested(64),))
    for depth in (65, 500):
        with pytest.raises(Misuse, match="deep"):
            key(nested(depth))
        with pytest.raises(Misuse, match="64 nested"):
            _ = Key(b"\x05" * depth + b"\x00" * depth).parts
    for data in (b"\x05" * 1_000_000, b"\x05" * 64 + b"\x00" * 63):
        with pytest.raises(Misuse):
            _ = Key(data).parts
    endless = User("loop", None)
    endless.point = endless
    with pytest.raises(Misuse, match="deep"):
        key(endless)


def test_a_doubling_tuple_ends() -> None:
    """A tuple that holds one tuple twice at each level is refused, not encoded for ever."""
    part: Any = ()
    for _ in range(60):
        part = (part, part)
    with pytest.raises(Misuse, match="too long"):
        key(part)


def test_long_hostile_texts_decode_in_linear_time() -> None:
    """A megabyte of escapes decodes, or is refused, without a hang."""
    text = "\0" * 500_000
    assert key(text).parts == (text,)
    with pytest.raises(Misuse):
        _ = Key(key(text)[:-1]).parts
    assert len(Key(b"\x00" * 500_000).parts) == 500_000


def test_int_limit() -> None:
    """Ints of 255 bytes are keys and come back; of 256 bytes, either sign, they are Misuse."""
    for value in (2**2040 - 1, -(2**2040) + 1):
        assert key(value).parts == (value,)
        assert key(value) == fdb.tuple.pack((value,))
    for value in (2**2040, -(2**2040), 10**10_000):
        with pytest.raises(Misuse, match="an int in a key can have at most 255 bytes"):
            key(value)


def test_as_key_limits_the_length() -> None:
    """Tuples, keys and raw keys of up to 8,192 encoded bytes pass; a byte more is Misuse naming the argument."""
    assert KEY_BYTES_MAX == 8192
    assert len(as_key((b"x" * 8190,))) == 8192
    for good in (Key(b"x" * 8192), RawKey(b"x" * 8192)):
        assert as_key(good) is good
    for bad in ((b"x" * 8191,), key("x" * 8191), Key(b"x" * 8193), RawKey(b"x" * 8193)):
        with pytest.raises(Misuse, match="prefix must have at most 8192 bytes encoded, not 8193"):
            as_key(bad, "prefix")


# Misuse


@dataclass
class Holder:
    part: Any


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ([1], "list"),
        ({}, "dict"),
        (Holder, "type"),
        (object(), "object"),
        (1j, "complex"),
        (timedelta(1), "timedelta"),
        (datetime(2024, 1, 1, tzinfo=UTC).date(), "date"),
        ("\ud800", "surrogates"),
        (Shout("\udfff"), "surrogates"),
        (RawKey(b"x"), "RawKey"),
    ],
)
def test_parts_of_other_types_are_misuse(part: Any, said: str) -> None:
    """A part that can't be encoded is Misuse naming its type, wherever it is."""
    for make in (
        lambda: key(part),
        lambda: key("a", part),
        lambda: key("a", (1, (part,))),
        lambda: key(Holder(part)),
        lambda: key("a").__add__((part,)),
        lambda: KeyRange(("a", part)),
    ):
        with pytest.raises(Misuse, match=said):
            make()
    with pytest.raises(Misuse, match=rf"^prefix: .*{said}"):
        as_key((part,), "prefix")


def test_a_list_says_to_use_a_tuple() -> None:
    """The hint for a list names the way out; a released memoryview is Misuse too."""
    with pytest.raises(Misuse) as caught:
        key(["a"])
    assert "tuple" in caught.value.hint
    view = memoryview(b"abc")
    view.release()
    with pytest.raises(Misuse, match="memoryview"):
        key(view)


def test_as_key_names_the_argument_and_the_way_out() -> None:
    """Anything but a Key or a tuple is Misuse with the argument's name, the type and what to pass instead."""
    with pytest.raises(Misuse) as caught:
        as_key("users")
    assert str(caught.value) == 'key must be a Key or a tuple of parts, not str: pass ("users",)'
    for bad, kind in (
        (b"x", "bytes"),
        (5, "int"),
        (None, "NoneType"),
        ([1], "list"),
        ("x" * 99, "str"),
        (1.5, "float"),
    ):
        with pytest.raises(Misuse, match=f"^start must be a Key or a tuple of parts, not {kind}: pass "):
            as_key(bad, "start")
    assert as_key(("a", 1)) == key("a", 1)
    assert type(as_key(Point(1, "b"))) is Key
    k = key("a")
    assert as_key(k) is k


# Key objects


def test_splicing_and_extending() -> None:
    """A key among the parts stands for its parts, a tuple extends a key, and anything else added is Misuse."""
    parent = key("a", 1)
    child, none = ("b",), ()
    assert key(parent, "b") == key("a", 1, "b") == parent + child
    assert key("z", parent) == key("z", "a", 1) == key("z") + (parent,)
    assert type(parent + child) is type(parent + none) is Key
    assert key(parent, key(), key(None)).parts == ("a", 1, None)
    extended = parent
    extended += (None,)
    assert extended.parts == ("a", 1, None)
    for bad in (b"x", key("b"), "x", ["x"], 5):
        with pytest.raises(Misuse, match=type(bad).__name__):
            parent + bad  # type: ignore[operator]
    with pytest.raises(Misuse, match="nested tuple"):
        key("a", (parent,))


def test_a_key_is_bytes() -> None:
    """Keys hash, compare and sort as bytes, slice to plain bytes, hold no dict, and wrap encoded bytes verbatim."""
    k = key("a", 1)
    assert k == bytes(k) == Key(bytes(k))
    assert hash(k) == hash(bytes(k))
    assert {k: 1}[Key(bytes(k))] == 1
    assert type(k[:2]) is bytes
    assert type(k[0]) is int
    assert not hasattr(k, "__dict__")
    assert sorted([key(2), key(-1), key("a"), key(0)]) == [key("a"), key(-1), key(0), key(2)]
    assert Key.__hash__ is bytes.__hash__
    assert Key.__eq__ is bytes.__eq__
    assert "__new__" not in vars(Key)
    assert "__init__" not in vars(Key)


@pytest.mark.parametrize("k", [key(), key("a", (1, None)), RawKey(b"\xff\0"), Key(b"\xff")])
def test_pickle_and_copy_keep_the_type(k: Key) -> None:
    """Keys survive pickle (every protocol), copy and deepcopy with their type."""
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        back = pickle.loads(pickle.dumps(k, protocol))
        assert type(back) is type(k)
        assert back == k
    assert type(copy.copy(k)) is type(copy.deepcopy(k)) is type(k)


def test_repr_is_a_call_that_gives_the_key() -> None:
    """The text of a key is the call that makes it."""
    assert repr(key("channel-42", 123456)) == str(key("channel-42", 123456)) == "key('channel-42', 123456)"
    assert repr(key()) == "key()"
    assert repr(key((1,), ())) == "key((1,), ())"
    assert repr(key(math.inf, -math.inf, math.nan)) == "key(float('inf'), float('-inf'), float('nan'))"
    assert repr(RawKey(b"ab")) == f"{RawKey(b'ab')}" == "RawKey(b'ab')"
    assert repr(Key(b"\xff")) == "Key(b'\\xff')"
    assert repr(KeyRange(("a",), None)) == "KeyRange(start=key('a'), stop=None)"


def test_raw_keys() -> None:
    """A RawKey takes bytes only, keeps them verbatim, and is never decoded, extended or made a part."""
    for data in (b"\x05ab", bytearray(b"\x05ab"), memoryview(b"\x05ab"), key("a")):
        raw = RawKey(data)
        assert type(raw) is RawKey
        assert raw == bytes(data)
        assert as_key(raw) is raw
    for bad in (5, "x", None, [1, 2], True):
        with pytest.raises(Misuse, match=type(bad).__name__):
            RawKey(bad)  # type: ignore[arg-type]
    with pytest.raises(Misuse, match="own encoding"):
        _ = RawKey(b"\x14").parts
    with pytest.raises(Misuse, match="own encoding"):
        RawKey(b"\x14") + ("a",)
    with pytest.raises(Misuse, match="RawKey"):
        key(RawKey(b"\x14"), "a")


# Ranges


def within(bounds: KeyRange, k: bytes) -> bool:
    """Whether a scan of this range would give that key."""
    return (bounds.start is None or bounds.start <= k) and (bounds.stop is None or k < bounds.stop)


def model_tuples(seed: int, count: int) -> list[tuple[Any, ...]]:
    """Tuples that are prefixes of each other more often than chance has it."""
    rng = random.Random(seed)
    pool = [
        "",
        "a",
        "ab",
        "al",
        "alb",
        "al\0",
        "al\0b",
        "a\0",
        "\0",
        "é",
        "am",
        None,
        0,
        5,
        1280,
        (1,),
        (1, None),
        (None,),
        (),
    ]
    pool += [
        b"",
        b"a",
        b"a\0",
        b"al",
        b"\xff",
        True,
        1.0,
        -1,
        2**70,
        UUID(int=7),
        ("al",),
        datetime(2024, 1, 1, tzinfo=UTC),
    ]
    return [tuple(rng.choices(pool, k=rng.randrange(4))) for _ in range(count)]


def test_prefix_covers_the_key_and_its_children_only() -> None:
    """On generated keys, a prefix range holds exactly the tuples that begin with the prefix's parts."""
    tuples = model_tuples(7, 400)
    encoded = [(exact(parts)[1:], key(*parts)) for parts in tuples]
    for prefix in tuples:
        bounds, wanted = KeyRange.prefix(prefix), exact(prefix)[1:]
        assert bounds == KeyRange.prefix(key(*prefix))
        for parts, k in encoded:
            assert within(bounds, k) == (parts[: len(wanted)] == wanted), (prefix, k)


def test_prefix_ends_between_parts() -> None:
    r"""The prefix ("a",) covers ("a", "b"), but neither ("ab",) nor ("a\0b",)."""
    bounds = KeyRange.prefix(("a",))
    assert bounds == KeyRange(key("a"), Key(b"\x02a\x00\xff"))
    assert [within(bounds, key(*parts)) for parts in (("a",), ("a", "b"), ("ab",), ("a\0b",), ("a\0",))] == [
        True, True, False, False, False,
    ]  # fmt: skip
    assert KeyRange.prefix(()) == KeyRange.prefix(key()) == KeyRange.prefix(RawKey(b"")) == KeyRange(None, None)


def test_text_prefix_covers_texts_that_start_so() -> None:
    """On generated keys, a text prefix holds exactly the tuples whose next part is a text starting so."""
    tuples = model_tuples(8, 400)
    for parent in model_tuples(9, 40):
        depth, wanted = len(parent), exact(parent)
        for text in ("", "a", "al", "al\0", "\0", "a\0", "\0\0", "é", "\U0010ffff", "zz"):
            bounds = KeyRange.text_prefix(parent, text)
            for parts in [
                *tuples,
                (*parent, text),
                (*parent, text + "x", 1),
                (*parent, text.encode()),
                (*parent, "\uffff"),
            ]:
                mine = exact(parts[:depth]) == wanted and len(parts) > depth
                mine = mine and isinstance(parts[depth], str) and parts[depth].startswith(text)
                assert within(bounds, key(*parts)) == mine, (parent, text, parts)


@given(TUPLES, st.text(max_size=3), st.text(max_size=3), TUPLES)
@settings(max_examples=200, deadline=None)
def test_any_text_prefix(parent: tuple[Any, ...], text: str, other: str, rest: tuple[Any, ...]) -> None:
    """Whatever the texts, the range decides as `startswith` does."""
    bounds = KeyRange.text_prefix(key(*parent), text)
    assert within(bounds, key(*parent, other, *rest)) == other.startswith(text)
    assert within(bounds, key(*parent, text + other, *rest))
    assert not within(bounds, key(*parent))


def test_prefix_of_a_raw_key_is_the_byte_prefix() -> None:
    """On generated bytes, the prefix of a RawKey holds what starts with its bytes; of FF alone it is open-ended."""
    rng = random.Random(10)
    data = [bytes(rng.choices(b"\x00\x01\xfe\xff", k=rng.randrange(5))) for _ in range(300)]
    for prefix in data:
        bounds = KeyRange.prefix(RawKey(prefix))
        for other in data:
            assert within(bounds, other) == other.startswith(prefix), (prefix, other)
    assert KeyRange.prefix(RawKey(b"a\xff\xff")) == KeyRange(RawKey(b"a\xff\xff"), RawKey(b"b"))
    assert KeyRange.prefix(RawKey(b"\xff\xff")) == KeyRange(RawKey(b"\xff\xff"), None)


def test_ranges_are_values() -> None:
    """Ranges are equal by their bounds, hash, pickle and copy, can't be changed, and encode tuples."""
    bounds = KeyRange(("a", 1), key("b"))
    assert bounds == KeyRange(start=key("a", 1), stop=("b",))
    assert bounds != KeyRange(("a", 1))
    assert len({bounds, KeyRange(("a", 1), ("b",)), KeyRange()}) == 2
    assert not hasattr(bounds, "__dict__")
    for name in ("start", "stop"):
        with pytest.raises(AttributeError):
            setattr(bounds, name, None)
    longest = KeyRange.prefix(Key(b"x" * 8192))
    for value in (bounds, KeyRange(), longest, KeyRange.prefix(RawKey(b"a"))):
        back = pickle.loads(pickle.dumps(value))
        assert back == value
        assert type(back.start) is type(value.start)
        assert copy.deepcopy(value) == copy.copy(value) == value
        assert KeyRange(value.start, value.stop) == value
    assert KeyRange(()) == KeyRange(key()) == KeyRange()
    assert KeyRange(None, ()).stop == b""


def test_range_misuse_names_the_argument() -> None:
    """Bounds and prefixes of other types are Misuse naming the argument and the type."""
    for bad in ("a", b"a", ["a"], 5):
        kind = type(bad).__name__
        with pytest.raises(Misuse, match=f"^start must .* not {kind}"):
            KeyRange(bad)  # type: ignore[arg-type]
        with pytest.raises(Misuse, match=f"^stop must .* not {kind}"):
            KeyRange(None, bad)  # type: ignore[arg-type]
        with pytest.raises(Misuse, match=f"^prefix must .* not {kind}"):
            KeyRange.prefix(bad)  # type: ignore[arg-type]
        with pytest.raises(Misuse, match=f"^parent must .* not {kind}"):
            KeyRange.text_prefix(bad, "a")  # type: ignore[arg-type]
    for text in (b"a", None, 5):
        with pytest.raises(Misuse, match=f"^text must be a str, not {type(text).__name__}"):
            KeyRange.text_prefix(("a",), text)  # type: ignore[arg-type]
    with pytest.raises(Misuse, match="RawKey"):
        KeyRange.text_prefix(RawKey(b"a"), "a")
    with pytest.raises(Misuse, match="surrogates"):
        KeyRange.text_prefix((), "\ud800")


# The memo


def test_the_memo_stays_bounded() -> None:
    """However many texts are encoded, the memo keeps a bounded number of them, and only short ones."""
    for number in range(20_000):
        key(f"text-{number}", number)
        assert len(keys._TEXTS) <= keys._MEMO_TEXTS_MAX
    long = "y" * (keys._MEMO_CHARS_MAX + 1)
    assert key(long) == fdb.tuple.pack((long,))
    assert long not in keys._TEXTS
    key(Shout("abc"), Mode.ON)
    assert {type(text) for text in keys._TEXTS} <= {str}


def test_threads_encode_side_by_side() -> None:
    """Threads that fill and empty the memo together all get the right bytes."""
    wrong: list[Any] = []
    start = threading.Barrier(4)

    def encode(seed: int) -> None:
        rng = random.Random(seed)
        start.wait()
        for _ in range(8_000):
            text, number = f"t{rng.randrange(9_000)}", rng.randrange(1 << 40)
            expected = b"\x02" + text.encode() + b"\x00"
            if not key(text, number).startswith(expected) or key(text, number).parts != (text, number):
                wrong.append((text, number))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=encode, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong
    assert len(keys._TEXTS) <= keys._MEMO_TEXTS_MAX + 4
