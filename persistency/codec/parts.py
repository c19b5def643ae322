"""Parts: the parts of a key that hold no others, as bytes and back. `codec.keys` has the table of what is encoded how.

Rules:
  1. An encoded part is told from the next one by itself, and bytes sort as parts do.
  2. A decoder takes the bytes and the place behind a part's type code, and gives the part and the place behind it. What
     it raises for bytes that are none (`ValueError`, `LookupError`, ...) its caller makes a `Misuse`.

Doesn't know: keys, tuples, limits of whole keys.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from persistency.errors import Misuse

# An int's type code stands in front of its bytes, so one `to_bytes` writes both; the smallest are ready made.
_POSITIVE = tuple((0x14 + n) << 8 * n for n in range(9))
LARGEST = tuple((1 << 8 * n) - 1 for n in range(256))
_NEGATIVE = tuple(((0x14 - n) << 8 * n) + LARGEST[n] for n in range(9))
_BYTE_INTS = (b"\x14", *(bytes((0x15, value)) for value in range(1, 256)))
_pack_four = struct.Struct(">I").pack
_DOUBLE, _EIGHT, _CODE_DOUBLE, _CODE_EIGHT = map(struct.Struct, (">d", ">Q", ">Bd", ">BQ"))
_SIGN, _ALL_BITS = 1 << 63, (1 << 64) - 1
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROS_MIN, _MICROS_MAX = -62_135_596_800_000_000, 253_402_300_799_999_999  # The years 1 to 9999.


def encode_text(text: str) -> bytes:
    """A text as a part."""
    try:
        return b"\x02" + str.encode(text).replace(b"\x00", b"\x00\xff") + b"\x00"
    except UnicodeEncodeError as error:
        raise Misuse(f"a str in a key can't have lone surrogates: {error}", hint="Pass it as bytes.") from error


def _bytes(value: bytes) -> bytes:
    return b"\x01" + value.replace(b"\x00", b"\x00\xff") + b"\x00"


def plain_bytes(value: bytes | bytearray | memoryview) -> bytes:
    """Bytes-like data as bytes."""
    try:
        return memoryview(value).tobytes()
    except (TypeError, ValueError) as error:
        raise Misuse(f"can't take bytes from {type(value).__name__}: {error}", hint="RawKey takes bytes.") from error


def encode_int(value: int) -> bytes:
    """An int as a part."""
    if 0 <= value < 0x1000000:
        if value < 0x100:
            return _BYTE_INTS[value]
        if value >= 0x10000:
            return _pack_four(value | 0x17000000)
    size = (value.bit_length() + 7) >> 3
    # The Python package of FoundationDB writes the limit itself, which eight bytes would hold, in the long form.
    if -_ALL_BITS < value < _ALL_BITS:
        return (value + (_POSITIVE if value > 0 else _NEGATIVE)[size]).to_bytes(size + 1, "big")
    if size > 255:
        raise Misuse(f"an int in a key can have at most 255 bytes, not {size}")
    if value > 0:
        return bytes((0x1D, size)) + value.to_bytes(size, "big")
    return bytes((0x0B, size ^ 0xFF)) + (value + LARGEST[size]).to_bytes(size, "big")


def encode_float(value: float) -> bytes:
    """A float as a part."""
    if value > 0:
        return _CODE_DOUBLE.pack(0x21, -value)
    (bits,) = _EIGHT.unpack(_DOUBLE.pack(value))
    return _CODE_EIGHT.pack(0x21, bits ^ (_ALL_BITS if bits & _SIGN else _SIGN))


def _datetime(value: datetime) -> bytes:
    if value.utcoffset() is None:
        raise Misuse("a datetime in a key must be aware, not naive", hint="If it is UTC: value.replace(tzinfo=UTC).")
    # The base's own subtraction: a subclass may answer in a type of its own.
    since = datetime.__sub__(value, _EPOCH)
    micros = (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds
    if not _MICROS_MIN <= micros <= _MICROS_MAX:
        raise Misuse("a datetime in a key must lie within the years 1 to 9999 of UTC")
    return _CODE_EIGHT.pack(0x40, micros + _SIGN)


# Looked up by exact type first, so that a bool is no int; subclasses are found by their base afterwards.
ENCODERS: dict[type, Callable[[Any], bytes]] = {
    str: encode_text,
    int: encode_int,
    bytes: _bytes,
    float: encode_float,
    bool: lambda value: b"\x27" if value else b"\x26",
    datetime: _datetime,
    bytearray: lambda value: _bytes(plain_bytes(value)),
    memoryview: lambda value: _bytes(plain_bytes(value)),
}


def unescape(data: bytes, start: int, pos: int) -> tuple[bytes, int]:
    """The text or bytes from `start` that go on behind a zero in them, which an FF at `pos` follows; and their end."""
    while data[pos : pos + 1] == b"\xff":
        pos = data.index(0, pos) + 1
    return data[start : pos - 1].replace(b"\x00\xff", b"\x00"), pos


def _decode_int(data: bytes, pos: int) -> tuple[int, int]:
    """Any int; encoding it again refuses every second spelling (leading zeros, the long form of a short one)."""
    start, code = pos - 1, data[pos - 1]
    size = abs(code - 0x14)
    if size == 9:
        size = data[pos] ^ (0xFF if code == 0x0B else 0)
        pos += 1
    end = pos + size
    value = int.from_bytes(data[pos:end], "big") - (LARGEST[size] if code < 0x14 else 0)
    if encode_int(value) != data[start:end]:
        raise ValueError("an int in another spelling than ours")
    return value, end


def _decode_float(data: bytes, pos: int) -> tuple[float, int]:
    # Where the encoding has flipped the sign alone, the minus flips it back, of a NaN too.
    if data[pos] & 0x80:
        return -_DOUBLE.unpack_from(data, pos)[0], pos + 8
    return _DOUBLE.unpack(_EIGHT.pack(_EIGHT.unpack_from(data, pos)[0] ^ _ALL_BITS))[0], pos + 8


def _decode_uuid(data: bytes, pos: int) -> tuple[Any, int]:
    from uuid import UUID  # only here: it takes a twentieth of the whole start

    return UUID(bytes=data[pos : pos + 16]), pos + 16


DECODERS: dict[int, Callable[[bytes, int], tuple[Any, int]]] = {
    **dict.fromkeys(range(0x0B, 0x1E), _decode_int),
    0x21: _decode_float,
    0x26: lambda _, pos: (False, pos),
    0x27: lambda _, pos: (True, pos),
    0x30: _decode_uuid,
    0x40: lambda data, pos: (_EPOCH + timedelta(microseconds=_EIGHT.unpack_from(data, pos)[0] - _SIGN), pos + 8),
}
