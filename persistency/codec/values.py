"""Values: plain Python objects to CBOR (RFC 8949) and back, and the only door to `cbor2`.

Rules:
  1. What can be written can be read back: one inspection holds on both sides, and a value with something unusual in
     it is read back before `encode` returns.
  2. Bytes are never trusted: `decode` gives a value that `encode` takes, or raises `Corrupt`. It runs no code, makes no
     cycles, reads no references, and knows ten tags.
  3. The inspection comes before `cbor2.dumps`, which a list nested some 7,000 deep crashes, and recurses nowhere.
  4. Every list, tuple, dict, set and frozenset counts one level of depth, empty ones too; at most `DEPTH_MAX`.
  5. What CBOR would change beyond recognition is refused, with the advice what to pass instead.
  6. One encoded value is one CBOR item, so encoded values one after another are a CBOR sequence (RFC 8742).

| written | read back as |
|---|---|
| None, bool, int of up to 1,024 bytes, float, str, bytes | the same; a NaN without its payload bits |
| list, dict, set; as a key or set member also tuple, frozenset | the same, a dict in its order |
| tuple, NamedTuple; frozenset (not as a key or member) | list; set |
| bytearray; subclasses of the types above (OrderedDict, IntEnum, StrEnum) | bytes; the type they derive from |
| aware datetime (tag 0; tag 1 is read), date (1004; 100 is read) | the same, with a fixed offset; no `fold` |
| Decimal (4): finite, exponent within 6,144, 2,466 digits | the same; Decimal("-0") as Decimal("0") |
| Fraction (30), not as a key or set member; UUID (37) | the same |
Refused: naive datetimes, offsets that aren't whole minutes (RFC 3339 has none), lone surrogates, memoryview (it would
become a list of ints), Decimal NaN and infinities (they would become floats), Enums that are neither int nor str,
complex, time, timedelta, patterns, addresses, and all else.

Costs that hostile bytes can cause: decoding takes up to 120 times the bytes in memory (dicts of one pair, nested), so a
reader bounds what it passes. Text and bytes have secret hashes. Other map keys and set members may collide, which
takes quadratic time, so a value that has any may have up to `LOOSE_KEYS_BYTES_MAX` bytes, at most three different long
ints, Decimals or UUIDs of one hash among them, and no Fractions: a few seconds at the worst.

Doesn't know: keys, categories, files, where the bytes come from, how values are framed in a file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from datetime import date, datetime, time, timedelta
from decimal import Context, Decimal
from enum import Enum
from fractions import Fraction
from functools import partial
from typing import Any, TypeAlias
from uuid import UUID, uuid4

import cbor2

from persistency.errors import Corrupt, Misuse

DEPTH_MAX = 64
"""How deep containers nest in a value."""
INT_BYTES_MAX = 1024
"""The longest int: its decimal text stays below the 4,300 digits that Python agrees to print."""
CONTAINERS_MAX = 1 << 22
"""How many containers a value holds; one that is held twice counts twice, as it is written twice."""
LOOSE_KEYS_BYTES_MAX = 256 * 1024
"""How long a value may be, encoded, that has map keys or set members other than text and bytes."""

# The length of ints is looked at in what they are encoded to.
_ATOMS = frozenset((str, bytes, int, float, bool, type(None), bytearray))
_HOLDERS = frozenset((list, dict, tuple))
_CONTAINERS = (list, tuple, dict, set, frozenset)
_BASES = (str, bytes, int, float, bytearray)
_TEXTS = frozenset((str, bytes))
_LONG_INT = re.compile(rb"[\xc2\xc3][\x59-\x5b]")  # The head of one of over 255 bytes.
_EXPONENT_MAX = 6144  # That of the decimal128 format.
_DIGITS_MAX = 2466  # Any so long mantissa is within INT_BYTES_MAX.
_SAME_HASH_MAX = 3  # Of honest values, two may: -1 and -2 have one hash in CPython.
# Wide enough that nothing is rounded: the length of a mantissa and every exponent that is allowed.
_EXACT = Context(prec=2 * _DIGITS_MAX, Emax=4 * _EXPONENT_MAX, Emin=-4 * _EXPONENT_MAX)

# `loads` ignores what follows an item, so the item is read as the first of a pair whose second is this text. Nobody
# who writes a file knows it, and so no bytes can bring their own. (A stream and its position do too, and are slower.)
_MARK = uuid4().hex
_PAIR, _END = b"\x82", cbor2.dumps(_MARK)
# Where none of these bytes is, there is no simple value and no `undefined`. The mark has none of them.
_SIMPLE = bytes((*range(0xE0, 0xF4), 0xF7, 0xF8))
# Within the pair; a set in a set takes two of cbor2's levels (a tag, an array), and a Decimal two more.
_DEPTH_CHECKED = 1 + 2 * DEPTH_MAX + 2

_Encoder: TypeAlias = Callable[[cbor2.CBOREncoder, Any], None]
_DERIVED: tuple[tuple[type, _Encoder], ...] = (
    (datetime, cbor2.CBOREncoder.encode_datetime),
    (date, cbor2.CBOREncoder.encode_date),
    (Decimal, cbor2.CBOREncoder.encode_decimal),
    (Fraction, cbor2.CBOREncoder.encode_rational),
    (UUID, cbor2.CBOREncoder.encode_uuid),
)
_Decoder: TypeAlias = Callable[[Any, bool], Any]
_ADVICE: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (memoryview, "Pass bytes(view)."),
    (complex, "Pass [z.real, z.imag]."),
    (timedelta, "Pass its total_seconds()."),
    (time, "Pass its isoformat()."),
    (Enum, "Pass its value."),
    (type, "Pass its name."),
    (Mapping, "Pass dict(...) of it."),
    (Iterable, "Pass list(...) of it."),
)


def encode(value: Any) -> bytes:
    """The value as one CBOR item.

    Raises `Misuse` for a type that isn't in the table above, for more depth, digits or containers than the limits
    say, for a value that contains itself, and for one that couldn't be read back. Source: RFC 8949.
    """
    plain = _inspect(value)
    try:
        data = cbor2.dumps(value, default=_encode_derived)
    except UnicodeEncodeError as error:
        hint = "Pass bytes: text.encode('utf-8', 'surrogatepass')."
        raise Misuse(f"a str can't have lone surrogates, as at index {error.start}", hint=hint) from error
    except BaseException as error:
        _raise_if_foreign(error)
        raise Misuse(f"a value can't be encoded: {_told(error)}", hint="Pass plain types.") from error
    # The tag of a long int is C2 or C3 and seldom there; looking for its bytes finds other things now and then.
    if len(data) > INT_BYTES_MAX and (b"\xc2" in data or b"\xc3" in data) and _LONG_INT.search(data):
        plain = False
    if not plain:
        _prove(data)
    return data


def decode(data: bytes) -> Any:
    """The value of one CBOR item, which has to be all of `data`.

    Raises `Corrupt` for everything else: damaged or truncated bytes, bytes after the item, unlisted tags, indefinite
    lengths, duplicate keys, simple values, and what goes over the limits of `encode`. Raises `Misuse` if `data` isn't
    bytes. Source: RFC 8949.
    """
    if not isinstance(data, bytes):
        raise Misuse(f"decode takes bytes, not {type(data).__name__}", hint="Pass bytes(...) of it.")
    pair = b"".join((_PAIR, data, _END))
    try:
        # With the pair around it, what these limits pass has at most 64 levels (an empty innermost one isn't counted),
        # and no key that has to be looked at.
        value = _read(pair, DEPTH_MAX, _TAGS, strict=True)
    except Corrupt:
        pass
    else:
        if len(data) > CONTAINERS_MAX or len(pair.translate(None, _SIMPLE)) != len(pair):
            _check(value)
        return value
    return _read_unusual(data)


def _read_unusual(data: bytes) -> Any:
    """The value of bytes that may have any keys and depth: slower, or refused with the reason."""
    # Long ones are refused before their keys are hashed.
    strict = len(data) > LOOSE_KEYS_BYTES_MAX
    value = _read(b"".join((_PAIR, data, _END)), _DEPTH_CHECKED, _careful_tags(), strict=strict)
    _check(value)
    return value


def _check(value: Any) -> None:
    try:
        _inspect(value)
    except Misuse as error:
        raise Corrupt(f"not a value: {error}") from error


def _read(pair: bytes, depth: int, tags: Mapping[int, _Decoder], *, strict: bool) -> Any:
    try:
        value, mark = cbor2.loads(
            pair,
            semantic_decoders=tags,
            max_depth=depth,
            allow_indefinite=False,
            allow_duplicate_keys=False,
            strict_hashable_types=strict,
        )
    except BaseException as error:
        _raise_if_foreign(error)
        raise Corrupt(f"not a value: {_told(error)}") from error
    if mark != _MARK:
        raise Corrupt("not a value: something follows its end")
    return value


def _prove(data: bytes) -> None:
    """Raise `Misuse` if an unusual value, once encoded, can't be read back: keys that became equal, for example."""
    try:
        _read_unusual(data)
    except Corrupt as error:
        hint = "Pass plain types, and str keys."
        if len(data) > LOOSE_KEYS_BYTES_MAX:
            hint = (
                f"With map keys or set members other than str and bytes, a value takes up to {LOOSE_KEYS_BYTES_MAX} "
                "bytes encoded: pass str keys, a list instead of a set, or several values."
            )
        raise Misuse(f"a value couldn't be read back: {error}", hint=hint) from error


def _raise_if_foreign(error: BaseException) -> None:
    """Raise what neither the value nor the bytes are to blame for.

    That is Ctrl-C and its like, also where cbor2 has wrapped them, and a lack of memory or stack. A panic in cbor2's
    Rust code is no `Exception` either, but is due to the value.
    """
    cause: BaseException | None = error
    while cause is not None:
        foreign = not isinstance(cause, Exception) and type(cause).__name__ != "PanicException"
        if foreign or isinstance(cause, MemoryError | RecursionError):
            raise cause
        cause = cause.__cause__


def _told(error: BaseException) -> str:
    return f"{error}: {error.__cause__}" if error.__cause__ is not None else str(error)


def _inspect(value: Any) -> bool:
    """Whether all in the value is of the plainest kind, which needs no proof. Raises `Misuse` for what is refused.

    It goes level by level, so that neither depth nor a cycle can exhaust the stack.
    """
    level: list[Any] = []
    plain = _take(value, level)
    count = 0
    for _ in range(DEPTH_MAX):
        below: list[Any] = []
        for holder in level:
            members: Iterable[Any] = holder
            kind = type(holder)
            if kind is dict and _TEXTS.issuperset(map(type, holder)):
                members = holder.values()
            elif kind is not list and kind is not tuple:
                members, usual = _members(holder)
                plain = plain and usual
            for member in members:
                kind = type(member)
                if kind in _ATOMS:
                    continue
                if kind in _HOLDERS:
                    below.append(member)
                elif not _take(member, below):
                    plain = False
        if not below:
            return plain
        count += len(below)
        if count > CONTAINERS_MAX:
            raise Misuse(f"a value can hold up to {CONTAINERS_MAX} containers", hint="Split it into several.")
        level = below
    raise Misuse(f"a value can be nested up to {DEPTH_MAX} deep", hint="Flatten it; does it contain itself?")


def _members(holder: Any) -> tuple[Iterable[Any], bool]:
    """What is to be inspected in a rarer container, and whether all that gets hashed is text or bytes."""
    if isinstance(holder, list | tuple):
        return holder, True
    loose = [key for key in holder if type(key) not in _TEXTS]
    members = holder.values() if isinstance(holder, dict) else ()
    return [*loose, *members], not loose


def _take(member: Any, below: list[Any]) -> bool:
    """Whether a member needs no proof; a container goes to `below`. Raises `Misuse` for what is refused."""
    kind = type(member)
    if kind in _ATOMS:
        return True
    if isinstance(member, _CONTAINERS):
        below.append(member)
        return kind in _CONTAINERS
    if isinstance(member, datetime):
        _check_datetime(member)
        return kind is datetime
    if isinstance(member, Decimal):
        _check_decimal(member)
        return kind is Decimal
    if isinstance(member, (date, UUID, Fraction)):
        return kind in (date, UUID, Fraction)
    if isinstance(member, _BASES):
        return False
    raise _refusal(member)


def _encode_derived(encoder: cbor2.CBOREncoder, member: Any) -> None:
    """What cbor2 calls for a type it doesn't know: the classes of other libraries that derive from one it does."""
    for base, encode_base in _DERIVED:
        if isinstance(member, base):
            encode_base(encoder, member)
            return
    raise _refusal(member)


def _refusal(member: Any) -> Misuse:
    hint = "Pass a str, number, bytes, list, dict, set, aware datetime, Decimal or UUID."
    if is_dataclass(member) and not isinstance(member, type):
        hint = "Pass dataclasses.asdict(...) of it, or use a typed codec."
    else:
        hint = next((advice for kinds, advice in _ADVICE if isinstance(member, kinds)), hint)
    return Misuse(f"a value can't hold a {type(member).__module__}.{type(member).__qualname__}", hint=hint)


def _check_datetime(value: datetime) -> None:
    offset = value.utcoffset()
    if offset is None:
        raise Misuse("a datetime must be aware, not naive", hint="If it is UTC: value.replace(tzinfo=UTC).")
    # RFC 3339 has no finer ones, and Python itself misreads some of what it then writes.
    if offset.seconds % 60 or offset.microseconds:
        raise Misuse("a datetime's offset must be whole minutes", hint="Pass value.astimezone(UTC).")


def _check_decimal(value: Decimal) -> None:
    _, digits, exponent = value.as_tuple()
    if not isinstance(exponent, int):
        raise Misuse(f"a Decimal must be finite, not {value}", hint="Pass a float, None or a str.")
    if abs(exponent) > _EXPONENT_MAX or len(digits) > _DIGITS_MAX:
        message = f"a Decimal can have {_DIGITS_MAX} digits and an exponent within {_EXPONENT_MAX}"
        raise Misuse(message, hint="Pass str(value).")


def _read_datetime(value: Any, _: bool) -> datetime:
    result = datetime.fromisoformat(value)
    _check_datetime(result)
    return result


def _read_int(value: Any, _: bool, *, negative: bool) -> int:
    if not isinstance(value, bytes) or len(value) > INT_BYTES_MAX:
        raise ValueError(f"an int must be up to {INT_BYTES_MAX} bytes")
    number = int.from_bytes(value, "big")
    return -1 - number if negative else number


def _two_ints(value: Any) -> tuple[int, int]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(one) is int for one in value):
        raise ValueError("two ints are expected")
    return value[0], value[1]


def _read_decimal(value: Any, _: bool) -> Decimal:
    exponent, mantissa = _two_ints(value)
    if abs(exponent) > _EXPONENT_MAX:
        raise ValueError(f"the exponent of a Decimal must be within {_EXPONENT_MAX}")
    result = Decimal(mantissa).scaleb(exponent, _EXACT)
    _check_decimal(result)
    return result


def _read_fraction(value: Any, _: bool) -> Fraction:
    return Fraction(*_two_ints(value))


def _read_uuid(value: Any, _: bool) -> UUID:
    return UUID(bytes=value)


class _Tags(dict[int, _Decoder]):
    """The allow-list as cbor2 asks for it: our decoder, `KeyError` for its own, any other error for a refusal."""

    __slots__ = ()

    def __missing__(self, tag: int) -> _Decoder:
        # Epoch time, epoch date, set, date: what cbor2 makes of them is what we want.
        if tag in (1, 100, 258, 1004):
            raise KeyError(tag)
        raise ValueError(f"tag {tag} is not allowed")


_TAGS = _Tags(
    {
        0: _read_datetime,
        2: partial(_read_int, negative=False),
        3: partial(_read_int, negative=True),
        4: _read_decimal,
        30: _read_fraction,
        37: _read_uuid,
    }
)


def _careful_tags() -> _Tags:
    """The allow-list for one reading in which anything may be a key: tagged numbers and UUIDs can all have one hash.

    Their comparisons are slow, too. What is in a key or a set is what cbor2 wants immutable.
    """
    seen: dict[int, list[Any]] = {}

    def careful(decoder: _Decoder, value: Any, immutable: bool) -> Any:
        result = decoder(value, immutable)
        if immutable:
            if isinstance(result, Fraction):
                raise ValueError("a Fraction can't be a map key or set member")
            same = seen.setdefault(hash(result), [])
            if result not in same:
                same.append(result)
            if len(same) > _SAME_HASH_MAX:
                raise ValueError("too many keys have one hash")
        return result

    return _Tags({tag: partial(careful, decoder) for tag, decoder in _TAGS.items()})
