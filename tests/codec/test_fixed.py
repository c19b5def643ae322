"""The encoding of the Nim original, statement by statement, with golden bytes."""

from __future__ import annotations

import enum
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistency.codec.fixed import fixed_key, fixed_payload, i64, u8, u64
from persistency.codec.keys import Key, KeyRange, RawKey
from persistency.errors import Misuse

LOW, HIGH = -(2**63), 2**63 - 1
UHIGH = 2**64 - 1


class Colour(enum.Enum):
    RED = 0
    GREEN = 1
    BLUE = 2


class Level(enum.IntEnum):
    LOW = -1
    HIGH = 7


class Header(NamedTuple):
    sender: str
    seq: int


@dataclass(frozen=True)
class Message:
    header: Header
    colour: Colour
    body: bytes
    urgent: bool


@dataclass
class Loop:
    inner: Any = None


texts = st.text(max_size=40).filter(lambda text: text.isprintable())
signed = st.integers(LOW, HIGH)
unsigned = st.integers(0, UHIGH)

GOLDEN = [
    ((), ""),
    (("",), "0000"),
    (("hi",), "00026869"),
    (("é",), "0002c3a9"),
    (("a\0b",), "0003610062"),
    ((b"\xff\x00",), "0002ff00"),
    ((bytearray(b"a"),), "000161"),
    ((memoryview(b"a"),), "000161"),
    ((0,), "8000000000000000"),
    ((1,), "8000000000000001"),
    ((-1,), "7fffffffffffffff"),
    ((LOW,), "0000000000000000"),
    ((HIGH,), "ffffffffffffffff"),
    ((i64(-2),), "7ffffffffffffffe"),
    ((u64(0),), "0000000000000000"),
    ((u64(7),), "0000000000000007"),
    ((u64(UHIGH),), "ffffffffffffffff"),
    ((u8(0),), "00"),
    ((u8(0x41),), "41"),
    ((u8(255),), "ff"),
    ((False,), "00"),
    ((True,), "01"),
    ((Colour.BLUE,), "8000000000000002"),
    ((Level.LOW,), "7fffffffffffffff"),
    (("ch", i64(1), u64(7)), "00026368" + "8000000000000001" + "0000000000000007"),
    ((Header("alice", 5),), "0005616c696365" + "8000000000000005"),
    (
        (Message(Header("a", 5), Colour.GREEN, b"xy", True),),
        "000161" + "8000000000000005" + "8000000000000001" + "00027879" + "01",
    ),
    (("p", RawKey(b"\xff\x00")), "000170" + "ff00"),
]


@pytest.mark.parametrize(("parts", "encoded"), GOLDEN, ids=[str(n) for n in range(len(GOLDEN))])
def test_golden_bytes(parts: tuple[Any, ...], encoded: str) -> None:
    """S3-108: the bytes of every type of field are fixed, in keys and payloads alike."""
    assert fixed_key(*parts).hex() == encoded
    assert fixed_payload(*parts).hex() == encoded
    assert type(fixed_key(*parts)) is RawKey
    assert type(fixed_payload(*parts)) is bytes


def test_the_longest_text() -> None:
    """S3-91: a text or bytes field is its length in two bytes and its bytes; over 65,535 bytes are `Misuse`."""
    assert fixed_key("x" * 65_535) == b"\xff\xff" + b"x" * 65_535
    for part in ("x" * 65_536, b"x" * 65_536, "é" * 32_768, bytearray(65_536), ("a", ["x" * 65_536][0])):
        with pytest.raises(Misuse, match="65535"):
            fixed_key(part)


def test_texts_sort_by_length_first() -> None:
    """S3-92: texts sort by their length, then by bytes: "" < "a" < "b" < "aa" < "ab"."""
    encoded = [fixed_key(text) for text in ("", "a", "b", "aa", "ab")]
    assert encoded == sorted(encoded)


@given(texts, texts)
def test_texts_of_one_length_sort_as_bytes(left: str, right: str) -> None:
    """S3-93: texts of the same length sort by their bytes, others by length."""
    expected = (len(left.encode()), left.encode()) < (len(right.encode()), right.encode())
    assert (fixed_key(left) < fixed_key(right)) == expected


def test_signed_order() -> None:
    """S3-94: signed integers sort by value: low < -2 < -1 < 0 < 1 < 2 < high."""
    encoded = [fixed_key(number) for number in (LOW, -2, -1, 0, 1, 2, HIGH)]
    assert encoded == sorted(encoded)
    assert len(set(encoded)) == 7


@given(signed, signed)
def test_signed_order_of_any(left: int, right: int) -> None:
    """S3-94: any two signed integers compare as their keys do, and `i64(n)` is the plain int."""
    assert (left < right) == (fixed_key(left) < fixed_key(right))
    assert fixed_key(i64(left)) == fixed_key(left)


@pytest.mark.parametrize(
    "number", [LOW - 1, HIGH + 1, 2**64, -(2**200), 1 << 70_000], ids=lambda number: str(number.bit_length())
)
def test_signed_range(number: int) -> None:
    """S3-94: integers beyond 64 bits are `Misuse`, at once."""
    for call in (fixed_key, fixed_payload, i64):
        with pytest.raises(Misuse):
            call(number)


@given(unsigned, unsigned)
def test_unsigned_order(left: int, right: int) -> None:
    """S3-95: unsigned integers keep their order up to 2**64 - 1."""
    assert (left < right) == (fixed_key(u64(left)) < fixed_key(u64(right)))


@pytest.mark.parametrize("number", [-1, 2**64, True, 1.0, "1", None])
def test_unsigned_range(number: Any) -> None:
    """S3-95: anything but an int within 64 unsigned bits is `Misuse`."""
    for value in (number, 1 << 70_000):
        with pytest.raises(Misuse):
            u64(value)


def test_signed_and_unsigned_do_not_mix() -> None:
    """S3-96: the signed and the unsigned encoding of a number differ and don't compare by value."""
    assert fixed_key(5) != fixed_key(u64(5))
    assert fixed_key(u64(9)) < fixed_key(-9)


@pytest.mark.parametrize("number", [-1, 256, True, "a", b"a", None])
def test_bytes_and_bools(number: Any) -> None:
    """S3-97: a bool is one byte, 0 or 1, and so is a byte or char, of 0..255."""
    assert (fixed_key(False), fixed_key(True)) == (b"\x00", b"\x01")
    assert fixed_key(u8(ord("a")), u8(255)) == b"a\xff"
    with pytest.raises(Misuse):
        u8(number)


def test_enums() -> None:
    """S3-98: an enum is its value as a signed integer, IntEnum or not."""
    assert fixed_key("c", Colour.BLUE) == fixed_key("c", 2)
    assert fixed_key(Level.LOW) == fixed_key(i64(-1))


def test_flattening() -> None:
    """S3-99: tuples, NamedTuples and dataclasses are their fields in order, however nested."""
    assert fixed_key(("ch", 1)) == fixed_key("ch", 1)
    assert fixed_key("v1", Header("alice", 5)) == fixed_key("v1", "alice", 5)
    assert fixed_key((("ch",), ((1,), ()))) == fixed_key("ch", 1)
    message = Message(Header("alice", 5), Colour.RED, b"x", False)
    assert fixed_key(message) == fixed_key("alice", 5, 0, b"x", False)


def test_embedded_keys() -> None:
    """S3-100: a key among the fields stands for its bytes, verbatim."""
    inner = fixed_key("a", 7)
    assert fixed_key("prefix", inner) == fixed_key("prefix", "a", 7)
    assert fixed_key("prefix", (inner,)) == fixed_key("prefix", "a", 7)
    assert fixed_key(Key(b"\x01\x02"), "x") == b"\x01\x02\x00\x01x"


@given(st.one_of(texts, signed, st.booleans(), st.binary(max_size=9), st.tuples(texts, signed)))
def test_one_value(value: Any) -> None:
    """S3-101: the key of one value is the key of a tuple of it alone."""
    assert fixed_key(value) == fixed_key((value,))


@given(st.tuples(texts, texts), st.tuples(texts, texts))
def test_composite_order_of_texts(left: tuple[str, str], right: tuple[str, str]) -> None:
    """S3-102: keys of two texts sort by the first text, then by the second."""
    first, second = ([(len(text.encode()), text.encode()) for text in pair] for pair in (left, right))
    assert (first < second) == (fixed_key(left) < fixed_key(right))


@given(st.tuples(texts, signed), st.tuples(texts, signed))
def test_composite_order_of_text_and_number(left: tuple[str, int], right: tuple[str, int]) -> None:
    """S3-102: keys of a text and a number sort by the text, then by the number."""
    first, second = ((len(text.encode()), text.encode(), number) for text, number in (left, right))
    assert (first < second) == (fixed_key(*left) < fixed_key(*right))


def test_shorter_before_longer() -> None:
    """S3-103: a key comes before every longer one that begins with the same fields."""
    assert fixed_key("a") < fixed_key("a", 0)
    assert fixed_key("a") < fixed_key("a", LOW)
    assert fixed_key("a") < fixed_key("a", "")
    assert fixed_key("a", "x") < fixed_key("a", "x", "y")


@given(st.binary(max_size=9), st.binary(max_size=9))
def test_keys_compare_as_bytes(left: bytes, right: bytes) -> None:
    """S3-104: keys are equal when their bytes are, and sort by bytes, then length."""
    assert (RawKey(left) == RawKey(right)) == (left == right)
    assert (RawKey(left) < RawKey(right)) == (left < right)
    assert (RawKey(left) <= RawKey(right)) == (left <= right)


def test_own_encoding() -> None:
    """S3-105: `RawKey(data)` bypasses every encoding."""
    assert RawKey(b"\x00\xff") == b"\x00\xff"
    assert fixed_key(RawKey(b"\x00\xff")) == b"\x00\xff"


def test_empty_key() -> None:
    """S3-106: without fields the key is empty, and sorts before all others."""
    assert fixed_key() == b""
    assert fixed_key(()) == b""
    assert fixed_key() < fixed_key(u8(0))


def test_extending() -> None:
    """S3-107: a key is extended by embedding it in a new one."""
    start = fixed_key("a")
    assert fixed_key(start, 7, "b") == fixed_key("a", 7, "b")
    assert start == fixed_key("a")


def test_the_same_in_another_process() -> None:
    """S3-108: another interpreter, with another hash seed, gives the same bytes."""
    code = "from persistency.codec.fixed import *; print(fixed_key('ch', i64(1), u64(7), 'é', True, u8(3)).hex())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stdout.strip() == fixed_key("ch", i64(1), u64(7), "é", True, u8(3)).hex()


def test_keys_do_not_decode() -> None:
    """S3-109: there are no type tags, so asking a key for its parts is `Misuse`."""
    with pytest.raises(Misuse):
        _ = fixed_key("a", 1).parts


def test_prefix_range() -> None:
    """S3-110, S3-111, S3-112: the range of a prefix holds it and all its extensions, and no sibling."""
    prefix = fixed_key("a")
    keys = KeyRange.prefix(prefix)
    assert keys.start == prefix
    assert keys.stop is not None
    for extension in ((), (LOW,), (0,), (HIGH,), ("x",), (u64(UHIGH),), (True,)):
        assert prefix <= fixed_key("a", *extension) < keys.stop
    for sibling in ("b", "ab"):
        assert not fixed_key(sibling) < keys.stop
    assert fixed_key("") < prefix


def test_prefix_of_the_highest_bytes() -> None:
    """S3-113: a prefix of 0xFF alone is open-ended; trailing ones are trimmed before the increment."""
    assert KeyRange.prefix(fixed_key(u64(UHIGH))).stop is None
    assert KeyRange.prefix(fixed_key(u8(1), HIGH)).stop == b"\x02"


@given(texts, texts, signed)
def test_prefix_is_exact(left: str, right: str, number: int) -> None:
    """S3-114: the length is part of the prefix, so the key of "c" never matches that of "ch"."""
    assert fixed_key(right, number).startswith(fixed_key(left)) == (left == right)


def test_payload_of_primitives() -> None:
    """S3-115: the payload of "hi" has 4 bytes, of an int 8; True is one byte 1, False one byte 0."""
    assert len(fixed_payload("hi")) == 4
    assert len(fixed_payload(1)) == len(fixed_payload(u64(1))) == 8
    assert (fixed_payload(True), fixed_payload(False)) == (b"\x01", b"\x00")


def test_payload_of_objects() -> None:
    """S3-116: objects are their fields one by one, nested ones too; enums are ints, bytes have their length."""
    message = Message(Header("alice", 5), Colour.BLUE, b"xyz", True)
    assert fixed_payload(message) == b"".join(map(fixed_payload, ("alice", 5, 2, b"xyz", True)))


@given(st.lists(st.one_of(texts, signed, st.booleans(), st.binary(max_size=9)), max_size=6))
def test_payload_concatenates(parts: list[Any]) -> None:
    """S3-117: the payload of several parts is their payloads one after another."""
    assert fixed_payload(*parts) == b"".join(map(fixed_payload, parts))


def test_own_payloads_are_bytes() -> None:
    """S3-118: a payload is plain bytes, so one in an encoding of your own takes its place untouched."""
    assert type(fixed_payload("a")) is bytes
    assert type(fixed_payload(fixed_key("a"))) is bytes


@pytest.mark.parametrize(
    "part", [None, 1.5, [1], {"a": 1}, {1}, object(), Header, Colour, Message, 1j], ids=lambda part: type(part).__name__
)
def test_other_types(part: Any) -> None:
    """A type that the original hasn't is `Misuse` that names it, wherever it stands."""
    for call in (fixed_key, fixed_payload):
        with pytest.raises(Misuse, match=type(part).__name__):
            call("a", ("b", part))


def test_surrogates() -> None:
    """A lone surrogate is `Misuse` with the place in the text."""
    with pytest.raises(Misuse, match="index 2") as caught:
        fixed_key("ok\ud800")
    assert isinstance(caught.value.__cause__, UnicodeEncodeError)


def test_deep_and_cyclic() -> None:
    """Fields may be nested 64 deep; more, or an object that holds itself, is `Misuse`."""
    nested: tuple[Any, ...] = ("a",)
    for _ in range(63):
        nested = (nested,)
    assert fixed_key(nested) == fixed_key("a")
    loop = Loop()
    loop.inner = loop
    for part in ((nested,), loop):
        with pytest.raises(Misuse, match="deep"):
            fixed_key(part)
