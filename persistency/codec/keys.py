r"""Keys: tuples encoded as bytes that sort the way the tuples do.

Rules:
  1. The encoding is the FoundationDB tuple layer, byte for byte (its `design/tuple.md`), plus datetimes at 0x40.
  2. Decoding is exact: encoding the `parts` of accepted bytes gives those bytes; all other bytes are `Misuse`.
  3. What can be encoded can be decoded: both ways have the same limits (an int of 255 bytes, 64 nested tuples).
  4. A `Key` among the parts stands for its own parts. A `RawKey` is its owner's: never decoded, extended or a part.
  5. A prefix ends between parts. No part starts with FF, so `[k, k + FF)` is the key and its children; FF after a
     closing 00 continues a longer text, which so lies outside.

| part | bytes | example |
|---|---|---|
| None | 00; within a nested tuple 00 FF | `key(None)` is 00 |
| bytes-like | 01, the bytes (each 00 becomes 00 FF), 00 | `key(b"a\0b")` is 01 61 00 FF 62 00 |
| str | 02, its UTF-8 (each 00 becomes 00 FF), 00 | `key("a")` is 02 61 00 |
| tuple, NamedTuple, dataclass | 05, the parts, 00 | `key((1, None))` is 05 15 01 00 FF 00 |
| int of n <= 8 bytes | 14 + n, big endian; negative: 14 - n, one's complement | 5 is 15 05, -1 is 13 FE, 0 is 14 |
| int from 2**64 - 1 | 1D, n, n bytes; negative: 0B, n ^ FF, complement | 2**64 is 1D 09 01, then eight 00 |
| float | 21, IEEE 754, its sign flipped; negative: all bits flipped | 1.0 is 21 BF F0, then six 00 |
| bool; UUID | 26 or 27; 30 and its 16 bytes | `key(True)` is 27 |
| aware datetime | 40, microseconds since 1970 UTC + 2**63 | 1970-01-01 is 40 80, then seven 00 |
An Enum counts as its value; a subclass of str, int, float, ... as its base.

Doesn't know: categories, values, files, SQL, which keys exist.
"""

from __future__ import annotations

import struct
import sys
from enum import Enum
from typing import Any, Self

from persistency.codec.parts import (
    DECODERS,
    ENCODERS,
    LARGEST,
    encode_float,
    encode_int,
    encode_text,
    plain_bytes,
    unescape,
)
from persistency.errors import Misuse
from persistency.frozen import Frozen, give

KEY_BYTES_MAX = 8192  # The longest key a job takes, encoded.
# A tuple that holds one tuple twice, which holds another twice, ..., would double its size at each of the levels.
_NESTED_BYTES_MAX = 8 * KEY_BYTES_MAX
_DEPTH_MAX, _MEMO_TEXTS_MAX, _MEMO_CHARS_MAX = 64, 4096, 64


class Key(bytes):
    """An encoded key: immutable, hashed and sorted as the bytes it is, and so in the order of its parts.

    `key(...)` makes it. `Key(data)` wraps encoded bytes as they are: only `parts` looks at them. Slices are bytes.
    """

    __slots__ = ()

    @property
    def parts(self) -> tuple[Any, ...]:
        """The tuple this key encodes (as `key` says), datetimes in UTC. Raises `Misuse` if its bytes are no key."""
        parts: list[Any] = []
        outer: list[list[Any]] = []  # The tuples around this one: no bytes can exhaust the stack.
        code, pos, size = 0, 0, len(self)
        try:
            while pos < size:
                code = self[pos]
                pos += 1
                if code == 0x02 or code == 0x01:
                    end = self.index(0, pos)
                    raw, after = self[pos:end], end + 1
                    if after < size and self[after] == 0xFF:
                        raw, after = unescape(self, pos, after)
                    parts.append(raw.decode() if code == 0x02 else raw)
                    pos = after
                elif 0x14 < code < 0x1C and self[pos]:
                    end = pos + code - 0x14
                    parts.append(int.from_bytes(self[pos:end], "big"))
                    pos = end
                elif 0x0C < code < 0x14 and self[pos] != 0xFF:
                    end = pos + 0x14 - code
                    parts.append(int.from_bytes(self[pos:end], "big") - LARGEST[end - pos])
                    pos = end
                elif code == 0x05:
                    if len(outer) == _DEPTH_MAX:
                        raise ValueError(f"over {_DEPTH_MAX} nested tuples")
                    outer.append(parts)
                    parts = []
                elif code:
                    value, pos = DECODERS[code](self, pos)
                    parts.append(value)
                elif outer and (pos == size or self[pos] != 0xFF):
                    outer[-1].append(tuple(parts))
                    parts = outer.pop()
                else:
                    parts.append(None)
                    pos += 1 if outer else 0
            if outer or pos > size:
                raise ValueError("it ends too early")
        except (ValueError, LookupError, OverflowError, struct.error) as error:
            early = isinstance(error, IndexError | struct.error) or (code < 0x03 and type(error) is ValueError)
            why = "it ends too early" if early else "not supported" if isinstance(error, KeyError) else error
            raise Misuse(f"not a key: at byte {pos - 1}, type code 0x{code:02x}: {why}") from error
        return tuple(parts)

    def __add__(self, other: tuple[Any, ...]) -> Key:  # type: ignore[override]  # parts, not bytes
        """This key with the parts of a tuple appended. Raises `Misuse` for bytes: are they a part, or encoded?"""
        if not isinstance(other, tuple):
            raise Misuse(f"a key is extended by a tuple, not {type(other).__name__}", hint="Write k + (part,).")
        return Key(b"".join((self, pack(other))))

    def __repr__(self) -> str:
        try:
            return f"key({', '.join(map(_shown, self.parts))})"
        except Misuse:
            return f"{type(self).__name__}({bytes.__repr__(self)})"

    __str__ = __repr__


class RawKey(Key):
    """A key in an encoding of your own, verbatim; as a prefix, all keys that start so. Raises `Misuse` if not bytes."""

    __slots__ = ()

    def __new__(cls, data: bytes | bytearray | memoryview) -> Self:  # noqa: D102  # the class says it
        return super().__new__(cls, plain_bytes(data))

    @property
    def parts(self) -> tuple[Any, ...]:
        """Raises `Misuse`: only its owner knows what the bytes mean."""
        raise Misuse("a RawKey has no parts: it is an own encoding", hint="Decode bytes(k) yourself.")

    def __add__(self, other: object) -> Key:
        """Raises `Misuse`: parts can't be appended to an encoding that isn't ours."""
        raise Misuse("a RawKey can't be extended: it is an own encoding", hint="Encode the whole key yourself.")


def key(*parts: Any) -> Key:
    """The key of these parts: None, bytes, str, int, float, bool, UUID, aware datetime, and tuples of those.

    Another key's parts take its place. Raises `Misuse` for any other type, a naive datetime, lone surrogates, an int
    of over 255 bytes, over 64 nested tuples. Source: the FoundationDB tuple layer, `design/tuple.md`.
    """
    # A name and a number or another name are the usual key; without the loop it takes a fifth less time.
    if len(parts) == 2:
        first, second = parts
        if type(first) is str:
            if type(second) is int:
                return Key(_TEXTS[first] + encode_int(second))
            if type(second) is str:
                return Key(_TEXTS[first] + _TEXTS[second])
    return Key(pack(parts))


def as_key(value: Any, argument: str = "key") -> Key:
    """The `Key` that an argument stands for: a key as it is, a tuple encoded.

    Raises `Misuse`, naming the argument, for any other type, a tuple that `key` refuses, and over `KEY_BYTES_MAX`.
    """
    if type(value) is not Key and not isinstance(value, Key):
        if not isinstance(value, tuple):
            instead = {"list": "tuple(parts)", "bytes": "RawKey(data)"}.get(type(value).__name__, "(part,)")
            if isinstance(value, str) and len(value) < 40:
                instead = f'("{value}",)'
            raise Misuse(f"{argument} must be a Key or a tuple of parts, not {type(value).__name__}: pass {instead}")
        try:
            value = Key(pack(value))
        except Misuse as error:
            raise Misuse(f"{argument}: {error}", hint=error.hint) from error
    if len(value) > KEY_BYTES_MAX:
        raise Misuse(f"{argument} must have at most {KEY_BYTES_MAX} bytes encoded, not {len(value)}")
    return value  # type: ignore[no-any-return]  # a Key by now


class KeyRange(Frozen):
    """The keys from `start`, included, to `stop`, excluded; `None` leaves a side open.

    A side may be given as a tuple. Raises `Misuse` for any other type. An empty `start` is the same as none.
    """

    __slots__ = __match_args__ = ("start", "stop")

    start: Key | None
    stop: Key | None

    def __init__(self, start: Key | tuple[Any, ...] | None = None, stop: Key | tuple[Any, ...] | None = None) -> None:
        give(self, "start", _bound(start, "start") or None)
        give(self, "stop", _bound(stop, "stop"))

    @classmethod
    def prefix(cls, prefix: Key | tuple[Any, ...]) -> KeyRange:
        """The key itself and its children, by whole parts: `("a",)` covers `("a", "b")`, but not `("ab",)`.

        Of a `RawKey`: the keys that start with its bytes. Of an empty key: all. Raises `Misuse` for what is no key.
        """
        start = as_key(prefix, "prefix")
        return cls(start, _successor(start) if not start or isinstance(start, RawKey) else Key(b"%b\xff" % start))

    @classmethod
    def text_prefix(cls, parent: Key | tuple[Any, ...], text: str) -> KeyRange:
        """The keys whose next part after `parent`'s is a text that starts with `text`, and their children.

        The bounds end inside a part, so they are `RawKey`s. Raises `Misuse` for a `RawKey` and for other than text.
        """
        parent = as_key(parent, "parent")
        if isinstance(parent, RawKey):
            raise Misuse("parent can't be a RawKey, which has no parts", hint="Use KeyRange.prefix(RawKey(...)).")
        if not isinstance(text, str):
            raise Misuse(f"text must be a str, not {type(text).__name__}")
        # Text without its end. The successor is exact after a NUL (00 FF) too, since nothing sorts between 00 FF and
        # 01 within a text, and there always is one: the type code isn't FF.
        start = b"%b%b" % (parent, encode_text(text)[:-1])
        return cls(RawKey(start), _successor(start))


def _bound(value: Any, argument: str) -> Key | None:
    # The end of the longest key's prefix has a byte more than any key.
    if value is None or (isinstance(value, Key) and len(value) <= KEY_BYTES_MAX + 1):
        return value
    return as_key(value, argument)


def _successor(data: bytes) -> Key | None:
    rest = bytes(data).rstrip(b"\xff")
    return RawKey(rest[:-1] + bytes((rest[-1] + 1,))) if rest else None


def _shown(part: Any) -> str:
    """An expression for the part. Raises `Misuse` for a NaN with bits of its own: there is none."""
    if isinstance(part, tuple):
        return f"({', '.join(map(_shown, part))}{',' if len(part) == 1 else ''})"
    if isinstance(part, float) and part - part != 0:
        if encode_float(float(repr(part))) != encode_float(part):
            raise Misuse("no expression gives this NaN")
        return f"float('{part}')"
    return repr(part)


class _Texts(dict[str, bytes]):
    """The memo of encoded texts, for names repeat in keys. Exact `str` objects only, short ones, not too many."""

    def __missing__(self, text: str) -> bytes:
        encoded = encode_text(text)
        if len(text) <= _MEMO_CHARS_MAX:
            # Dropping all costs each newcomer a few nanoseconds; an order of eviction would cost every hit.
            if len(self) >= _MEMO_TEXTS_MAX:
                self.clear()
            self[text] = encoded
        return encoded


_TEXTS = _Texts()


def pack(parts: tuple[Any, ...], depth: int = 0) -> bytes:
    """The encoded parts of a tuple, with `depth` tuples around it."""
    pieces = []
    for part in parts:
        kind = type(part)
        if kind is str:
            pieces.append(_TEXTS[part])
        elif kind is int:
            pieces.append(encode_int(part))
        elif part is None:
            pieces.append(b"\x00\xff" if depth else b"\x00")
        else:
            encoder = ENCODERS.get(kind)
            pieces.append(encoder(part) if encoder is not None else _encode(part, depth))
    return b"".join(pieces)


def _encode(part: Any, depth: int) -> bytes:
    """One part of a type that holds others or is derived from another."""
    if isinstance(part, Enum):
        return pack((part._value_,), depth)
    if "uuid" in sys.modules and isinstance(part, sys.modules["uuid"].UUID):  # only who has made one has it
        return b"\x30%b" % part.bytes
    if isinstance(part, Key):
        if depth or isinstance(part, RawKey):
            where = "nested tuple" if depth else "key"
            raise Misuse(f"a {type(part).__name__} can't be a part of a {where}", hint="Pass its parts, or bytes(k).")
        return part
    if hasattr(type(part), "__dataclass_fields__") and not isinstance(part, tuple):
        from dataclasses import fields  # loaded by now: the part's class was made with it

        part = tuple(getattr(part, field.name) for field in fields(part))
    if isinstance(part, tuple):
        if depth == _DEPTH_MAX:
            raise Misuse(f"a part of a key is nested too deep: over {_DEPTH_MAX} tuples")
        nested = b"\x05%b\x00" % pack(part, depth + 1)
        if len(nested) > _NESTED_BYTES_MAX:
            raise Misuse(f"a nested tuple in a key is too long: over {_NESTED_BYTES_MAX} bytes")
        return nested
    for base, encoder in ENCODERS.items():
        if isinstance(part, base):
            # What pickle keeps of a text or number is the plain value, whatever operators its subclass has.
            plain = getattr(base, "__getnewargs__", None)
            return encoder(plain(part)[0] if plain is not None else part)
    hint = "Use a tuple: tuple(part)." if isinstance(part, list) else "help(persistency.key) lists the types."
    raise Misuse(f"a part of a key can't be a {type(part).__name__}", hint=hint)
