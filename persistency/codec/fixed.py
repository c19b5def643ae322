r"""The key and payload encoding of the Nim original, so that its files can be read and written: fields without tags.

Rules:
  1. The bytes are the format below and nothing else: no type codes, no padding, the same on every machine.
  2. Fields stand one after another. A tuple, NamedTuple or dataclass is its fields in order, so
     `fixed_key(("ch", 1)) == fixed_key("ch", 1)`; what begins with the same fields sorts together, the shorter first.
  3. Texts sort by length first, then by bytes: "" < "a" < "b" < "aa". Integers sort by value, but signed and unsigned
     ones don't compare with each other: a field must always have the one type.
  4. Nothing can be decoded without knowing the types of the fields, so there is no decoder and a key is a `RawKey`.

| field | bytes | example |
|---|---|---|
| str, bytes-like | 2 bytes big endian: how many; then the bytes (UTF-8), up to 65,535 | "hi" is 00 02 68 69 |
| int, `i64(n)` (the original's signed integers) | 8 bytes big endian of n + 2**63 | 1 is 80 00 00 00 00 00 00 01 |
| `u64(n)` (its uint16, uint32, uint64) | 8 bytes big endian | u64(7) is 00 00 00 00 00 00 00 07 |
| bool | 1 byte | False is 00, True is 01 |
| `u8(n)` (its byte and char) | 1 byte | u8(0x41) is 41 |
| Enum | as its value; the original's enums are signed ints | an Enum of value 2 is 80 00 00 00 00 00 00 02 |
| Key | its bytes, verbatim | `fixed_key("p", inner)` is `fixed_key("p")` and then `inner` |
`fixed_key("ch", i64(1), u64(7))` is 00 02 63 68, 80 00 00 00 00 00 00 01, 00 00 00 00 00 00 00 07.

Doesn't know: values in CBOR, categories, files, ranges of keys (`KeyRange.prefix` of a `RawKey` is the byte prefix).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Any

from persistency.codec.keys import Key, RawKey
from persistency.errors import Misuse

_TEXT_BYTES_MAX = 0xFFFF
_SIGN = 1 << 63
# A dataclass can hold itself.
_DEPTH_MAX = 64


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a certain width, made by `i64`, `u64` or `u8`. `data` is its encoding."""

    data: bytes


def i64(value: int) -> Field:
    """A signed integer of 8 bytes, as a plain int is too. Raises `Misuse` outside -2**63..2**63 - 1."""
    return Field(_signed(_whole(value, "i64")))


def u64(value: int) -> Field:
    """An unsigned integer of 8 bytes: uint16, uint32, uint64 of the original. Raises `Misuse` outside 0..2**64 - 1."""
    return Field(_unsigned(_whole(value, "u64"), 8))


def u8(value: int) -> Field:
    """One byte: byte or char of the original; of a character, pass its `ord`. Raises `Misuse` outside 0..255."""
    return Field(_unsigned(_whole(value, "u8"), 1))


def fixed_key(*parts: Any) -> RawKey:
    """The key of these fields, in the encoding of the Nim original; without any, the empty key.

    Takes str, bytes-like, int, bool, Enum, `i64`, `u64`, `u8`, Key, and tuples, NamedTuples and dataclass instances of
    those. Raises `Misuse` for other types, over 65,535 bytes of text, ints beyond 64 bits, lone surrogates.
    Source: the Nim original.
    """
    return RawKey(fixed_payload(*parts))


def fixed_payload(*parts: Any) -> bytes:
    """The payload of these fields, encoded as in a key: the parts of the Nim original's `payload` one after another.

    Bytes in an encoding of your own need no call: payloads are stored as they are. Takes and raises the same as
    `fixed_key`. Source: the Nim original.
    """
    pieces: list[bytes] = []
    for part in parts:
        _append(part, pieces, 0)
    return b"".join(pieces)


def _append(part: Any, pieces: list[bytes], depth: int) -> None:
    if isinstance(part, Enum):
        part = part.value
    if isinstance(part, Field):
        pieces.append(part.data)
    elif isinstance(part, Key):
        pieces.append(bytes(part))
    elif isinstance(part, bool):
        pieces.append(b"\x01" if part else b"\x00")
    elif isinstance(part, int):
        pieces.append(_signed(part))
    elif isinstance(part, str):
        pieces += _counted(_utf8(part))
    elif isinstance(part, bytes | bytearray | memoryview):
        pieces += _counted(bytes(part))
    else:
        if depth == _DEPTH_MAX:
            raise Misuse(f"fields can be nested up to {_DEPTH_MAX} deep", hint="Does it contain itself?")
        for field in _fields(part):
            _append(field, pieces, depth + 1)


def _fields(part: Any) -> tuple[Any, ...]:
    if isinstance(part, tuple):
        return part
    if is_dataclass(part) and not isinstance(part, type):
        return tuple(getattr(part, field.name) for field in fields(part))
    hint = "Pass tuple(part)." if isinstance(part, list) else "help(persistency.codec.fixed) lists the types."
    raise Misuse(f"the fixed encoding has no {type(part).__name__}", hint=hint)


def _counted(data: bytes) -> tuple[bytes, bytes]:
    if len(data) > _TEXT_BYTES_MAX:
        raise Misuse(f"a text or bytes field can have up to {_TEXT_BYTES_MAX} bytes, not {len(data)}")
    return len(data).to_bytes(2, "big"), data


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        message = f"a text field can't have lone surrogates, as at index {error.start}"
        raise Misuse(message, hint="Pass it as bytes.") from error


def _whole(value: Any, name: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise Misuse(f"{name} takes an int, not {type(value).__name__}")
    return value


def _signed(value: int) -> bytes:
    if not -_SIGN <= value < _SIGN:
        raise Misuse("a signed int field must be within 64 bits: -2**63..2**63 - 1", hint="Up to 2**64 - 1: u64(n).")
    return (value + _SIGN).to_bytes(8, "big")


def _unsigned(value: int, size: int) -> bytes:
    if not 0 <= value < 1 << 8 * size:
        raise Misuse(f"a field of {size} unsigned bytes must be within 0..2**{8 * size} - 1")
    return value.to_bytes(size, "big")
