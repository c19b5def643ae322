"""Packing: what goes to the server and what comes back, in the binary form of its protocol.

Rules:
  1. A value is packed once, into the very bytes that are sent; arrays have one dimension and no NULL but where said.

Doesn't know: statements, connections.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import repeat
from struct import Struct

BYTEA, INT8, TEXT = 17, 20, 25

_pack_length = Struct("!i").pack
_pack_int8 = Struct("!q").pack
_pack_element = Struct("!iq").pack
_pack_header = Struct("!iiIii").pack
_unpack_int8 = Struct("!q").unpack
_NULL = _pack_length(-1)
INT8_MIN, INT8_MAX = -(2**63), 2**63 - 1


def int8(value: int) -> bytes:
    """Pack a bigint."""
    return _pack_int8(value)


def number(value: bytes) -> int:
    """Unpack a bigint."""
    found: int = _unpack_int8(value)[0]
    return found


def number_or_none(value: bytes | None) -> int | None:
    """Unpack a bigint, or NULL."""
    return None if value is None else _unpack_int8(value)[0]


def blobs(values: Sequence[bytes]) -> bytes:
    """Pack a bytea[]."""
    return _strings(values, BYTEA)


def texts(values: Iterable[str]) -> bytes:
    """Pack a text[]."""
    return _strings([value.encode() for value in values], TEXT)


def _strings(values: Sequence[bytes], kind: int) -> bytes:
    count = len(values)
    parts = [b""] * (2 * count + 1)
    parts[0] = _pack_header(1, 0, kind, count, 1)
    parts[1::2] = map(_pack_length, map(len, values))
    parts[2::2] = values
    return b"".join(parts)


def blobs_or_nulls(values: Sequence[bytes | None]) -> bytes:
    """Pack a bytea[] some of whose elements may be NULL."""
    parts = [_pack_header(1, 1, BYTEA, len(values), 1)]
    for value in values:
        parts += [_NULL] if value is None else [_pack_length(len(value)), value]
    return b"".join(parts)


def numbers(values: Sequence[int]) -> bytes:
    """Pack a bigint[]."""
    return _pack_header(1, 0, INT8, len(values), 1) + b"".join(map(_pack_element, repeat(8), values))


def numbers_or_nulls(values: Sequence[int | None]) -> bytes:
    """Pack a bigint[] some of whose elements may be NULL."""
    header = _pack_header(1, 1, INT8, len(values), 1)
    return header + b"".join(_NULL if value is None else _pack_element(8, value) for value in values)
