"""Streams of CBOR items: read one at a time, from files that give little at a time, and from hostile ones."""

from __future__ import annotations

import hashlib
import io
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistency.codec.stream import ARRAY, BYTES, MAP, NUMBER, READ_BYTES_MAX, TEXT, Items, head
from persistency.codec.values import DEPTH_MAX, encode
from persistency.errors import Corrupt, Misuse, Unavailable

BOUND = 4096
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


def dribble(data: bytes, sizes: Callable[[], int]) -> Callable[[int], bytes]:
    """Return a `read` that gives less than it is asked for."""
    file = io.BytesIO(data)
    return lambda count: file.read(min(count, sizes()))


@given(st.lists(PLAIN, max_size=8), st.integers(1, 9))
def test_items_come_back_one_by_one_however_little_is_read_at_a_time(values: list[Any], size: int) -> None:
    """What `codec.values` writes one after another is read one after another, with the sum of all before."""
    encoded = [encode(value) for value in values]
    items = Items(dribble(b"".join(encoded), lambda: size))
    for at, value in enumerate(values):
        assert items.sha256() == hashlib.sha256(b"".join(encoded[:at])).digest()
        assert not items.at_end()
        assert items.kind() == encoded[at][0] >> 5
        assert items.value(len(encoded[at])) == value
    assert items.at_end()
    assert items.sha256() == hashlib.sha256(b"".join(encoded)).digest()


@given(PLAIN.filter(lambda value: len(encode(value)) > 1))
def test_an_item_longer_than_allowed_is_refused(value: Any) -> None:
    """The bound is exact, and holds for the item with all that is in it."""
    data = encode(value)
    with pytest.raises(Corrupt, match=f"an item of more than {len(data) - 1} bytes"):
        Items(io.BytesIO(data).read).value(len(data) - 1)


@pytest.mark.parametrize("number", [0, 23, 24, 255, 256, 65535, 65536, 2**32 - 1, 2**32, 2**64 - 1])
def test_heads_are_those_of_cbor2(number: int) -> None:
    """A head is the shortest there is, and is read back."""
    assert head(NUMBER, number) == cbor2.dumps(number)
    assert Items(io.BytesIO(head(NUMBER, number)).read).number_or_none() == number
    assert Items(io.BytesIO(head(ARRAY, number)).read).array() == number


def test_typed_reads_take_what_they_name() -> None:
    """Each takes its kind of item, longer spellings of a length too, as other programs may write them."""
    data = encode("é") + encode(b"\0\xff") + encode(None) + encode(7) + bytes.fromhex("9a00000002 5900024142")
    items = Items(io.BytesIO(data).read)
    assert items.kind() == TEXT
    assert items.text(2) == "é"
    assert items.kind() == BYTES
    assert items.data(2) == b"\0\xff"
    assert items.number_or_none() is None
    assert items.number_or_none() == 7
    assert items.array() == 2
    assert items.data(2) == b"AB"
    assert items.at_end()


@pytest.mark.parametrize(
    ("data", "take", "told"),
    [
        ("60", "array", "a text instead of an array"),
        ("40", "text", "bytes instead of a text"),
        ("c240", "data", "a tag instead of bytes"),
        ("60", "data", "a text instead of bytes"),
        ("20", "number_or_none", "a negative number instead of a number or null"),
        ("f5", "number_or_none", "a simple value instead of a number or null"),
        ("f816", "number_or_none", "a simple value"),
        ("62ffff", "text", "a text that isn't UTF-8"),
        ("5f4141ff", "data", "an indefinite length"),
        ("7f6161ff", "text", "an indefinite length"),
        ("9f01ff", "array", "an indefinite length"),
        ("bf616101ff", "value", "an indefinite length"),
        ("ff", "value", "an indefinite length"),
        ("1c", "value", "a head that CBOR doesn't have"),
        ("5b0000010000000000", "data", "bytes of 1099511627776 bytes"),
        ("7b0000010000000000", "text", "a text of 1099511627776 bytes"),
        ("5b0000010000000000", "value", "an item of more than"),
        ("9b7fffffffffffffff", "value", "an item of more than"),
        ("bbffffffffffffffff", "value", "an item of more than"),
        ("81" * (DEPTH_MAX + 1) + "80", "value", "not a value"),
        ("a2616101616102", "value", "not a value"),
        ("d81c80", "value", "not a value"),
        ("f7", "value", "not a value"),
        ("", "value", "breaks off"),
        ("", "kind", "breaks off"),
        ("19ff", "number_or_none", "breaks off after byte 2"),
        ("45414141", "data", "breaks off after byte 4"),
        ("8201", "value", "breaks off after byte 2"),
    ],
)
def test_what_is_not_expected_is_corrupt(data: str, take: str, told: str) -> None:
    """No read takes another kind, more than it may, an indefinite length, or what `codec.values` refuses."""
    items = Items(io.BytesIO(bytes.fromhex(data)).read)
    bounds = {"text": (BOUND,), "data": (BOUND,), "value": (BOUND,)}
    with pytest.raises(Corrupt, match=told):
        getattr(items, take)(*bounds.get(take, ()))


@pytest.mark.parametrize("endless", [b"\x81", b"\xa1\x60", b"\xc1", b"\x82\x40"])
def test_an_endless_item_ends_at_its_bound(endless: bytes) -> None:
    """A stream that never ends is read as far as the bound, and costs no more memory than what is read at a time."""
    source = endless * (READ_BYTES_MAX // len(endless) + 1)
    asked = []

    def read(count: int) -> bytes:
        asked.append(count)
        return source[:count]

    tracemalloc.start()
    try:
        with pytest.raises(Corrupt):
            Items(read).value(BOUND)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(asked) <= 2 * READ_BYTES_MAX
    assert peak < 1024 * 1024


def test_a_declared_length_takes_no_memory_before_its_bytes_come() -> None:
    """Of 256 MiB that are declared and not there, nothing is kept but what came."""
    file = io.BytesIO(head(BYTES, 2**28) + b"x" * 1000)
    asked = []

    def read(count: int) -> bytes:
        asked.append(count)
        return file.read(count)

    tracemalloc.start()
    try:
        with pytest.raises(Corrupt, match="breaks off after byte 1005"):
            Items(read).data(2**28)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * READ_BYTES_MAX
    assert max(asked) == READ_BYTES_MAX


def test_random_bytes_give_a_value_or_corrupt() -> None:
    """Whatever the bytes, the only exception is `Corrupt`, and an item ends within its bound."""
    chance = random.Random(20)
    seen = {True: 0, False: 0}
    for _ in range(5_000):
        items = Items(io.BytesIO(chance.randbytes(chance.randrange(1, 40))).read)
        try:
            items.value(30)
        except Corrupt:
            seen[False] += 1
        else:
            seen[True] += 1
    assert min(seen.values()) > 500


def test_a_stream_that_has_ended_is_not_asked_again() -> None:
    """A terminal, say, goes on after its end; what comes then is nothing to the stream."""
    answers = [b"\x01", b"", b"\x02"]
    items = Items(lambda _count: answers.pop(0))
    assert items.number_or_none() == 1
    assert items.at_end()
    assert items.at_end()
    assert answers == [b"\x02"]


@pytest.mark.parametrize(
    ("answer", "error"), [(None, Unavailable), ("text", Misuse), (7, Misuse), (OSError("gone"), OSError)]
)
def test_a_read_that_gives_no_bytes_is_told_apart(answer: Any, error: type[Exception]) -> None:
    """A file that doesn't wait, one of text, and what a file raises itself."""

    def read(_count: int) -> Any:
        if isinstance(answer, Exception):
            raise answer
        return answer

    with pytest.raises(error) as raised:
        Items(read).kind()
    assert not isinstance(answer, Exception) or raised.value is answer


def test_other_kinds_of_bytes_are_taken() -> None:
    """`bytearray` and `memoryview` are as good as bytes."""
    answers: list[Any] = [bytearray(b"\xa1\x61"), memoryview(b"a\x07"), b""]
    items = Items(lambda _count: answers.pop(0))
    assert items.kind() == MAP
    assert items.value(10) == {"a": 7}
    assert items.at_end()
