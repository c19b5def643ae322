"""Plain pickles: reads the data in a pickle of any protocol, 0 to 5, and runs nothing that is in it.

A pickle is a program. Here only those of its instructions are known that make data; no way leads from here to an
import, to a call of what a pickle names, or to an attribute of it.

| what | how it is read |
|---|---|
| None, bool, int, float, str, bytes, bytearray, list, tuple, dict, set, frozenset | as `pickle.loads` reads it |
| datetime, date, timedelta, timezone, Decimal | the same |
| an OrderedDict | as a dict |
| text of Python 2 | as text if it is ASCII, else as bytes |
| whatever else has a name (classes, functions), extension codes, persistent ids, buffers kept elsewhere | refused |

Rules:
  1. An instruction that is neither in the table below nor one of the two that `Reading.run` follows itself is refused.
  2. Whatever the bytes are, the answer is a value or `Refused`.

Doesn't know: where pickles come from, what becomes of the values.
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from persistency.integrations.migration.named import find, make
from persistency.integrations.migration.reading import BYTES_MAX, INT_BYTES_MAX, Reading, Refused

PROTOCOL_MAX: Final = 5


def read_plain(data: bytes) -> Any:
    """Return the value of a pickle that holds plain data and nothing else; what follows its end isn't looked at.

    Plain are None, bool, int, float, str, bytes, bytearray, list, tuple, dict, set and frozenset, datetime, date,
    timedelta, timezone and Decimal, and an OrderedDict, which becomes a dict. Nothing that is in the pickle is run.

    Raises `Refused`, a `ValueError`, for every other: what names a class or a function, is damaged, or costs too much.
    """
    if len(data) > BYTES_MAX:
        raise Refused(f"too large: {len(data):,} bytes")
    try:
        return Reading(bytes(data)).run(_INSTRUCTIONS, _REFUSED)
    except Refused:
        raise
    except (RecursionError, MemoryError):
        raise Refused("too costly: there isn't the memory for it, or it is nested too deeply") from None
    except IndexError as error:
        raise Refused("damaged: it ends too early, or takes what isn't there") from error
    except (ValueError, TypeError, LookupError, ArithmeticError, struct.error, Warning) as error:
        raise Refused(f"damaged: {error}") from error


def _begin(reading: Reading) -> None:
    if (protocol := reading.number(1)) > PROTOCOL_MAX:
        raise Refused(f"a pickle of protocol {protocol}, and {PROTOCOL_MAX} is the latest one known here")


def _int(reading: Reading) -> None:
    digits = reading.digits()
    reading.push(digits == "01" if digits in ("00", "01") else int(digits, 0))


def _long(reading: Reading, size: int) -> None:
    if size > INT_BYTES_MAX:
        raise Refused(f"too large: a number of {size:,} bytes")
    reading.push(reading.signed(size))


def _text(reading: Reading, size: int) -> None:
    reading.push(reading.take(size).decode("utf-8", "surrogatepass"))


def _text_of_python_2(reading: Reading, data: bytes) -> None:
    reading.push(data.decode("ascii") if data.isascii() else data)


def _quoted(reading: Reading) -> None:
    line = reading.line().strip()
    if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b'"', b"'"):
        raise ValueError("a text without quotes")
    _text_of_python_2(reading, codecs.escape_decode(line[1:-1])[0])


def _append(reading: Reading, values: Iterable[Any]) -> None:
    reading.holder(list).extend(values)


def _new_dict(reading: Reading, pairs: Sequence[Any]) -> None:
    reading.push_new({})
    reading.set_items(pairs)


_SPELLED: dict[bytes, Callable[[Reading], object]] = {
    b"\x80": _begin,
    b"\x95": lambda r: r.take(8),  # a frame, which only says how much might be read at once
    b"(": Reading.mark,
    b"0": Reading.drop,
    b"1": Reading.unmark,
    b"2": lambda r: r.share(r.stack[-1]),
    b"N": lambda r: r.push(None),
    b"\x88": lambda r: r.push(True),
    b"\x89": lambda r: r.push(False),
    b"I": _int,
    b"J": lambda r: r.push(r.signed(4)),
    b"K": lambda r: r.push(r.number(1)),
    b"M": lambda r: r.push(r.number(2)),
    b"L": lambda r: r.push(int(r.digits().removesuffix("L"), 0)),
    b"\x8a": lambda r: _long(r, r.number(1)),
    b"\x8b": lambda r: _long(r, r.signed(4)),
    b"F": lambda r: r.push(float(r.digits())),
    b"G": lambda r: r.push(struct.unpack(">d", r.take(8))[0]),
    b"S": _quoted,
    b"T": lambda r: _text_of_python_2(r, r.take(r.signed(4))),
    b"U": lambda r: _text_of_python_2(r, r.take(r.number(1))),
    b"V": lambda r: r.push(r.line().decode("raw-unicode-escape")),
    b"X": lambda r: _text(r, r.number(4)),
    b"\x8d": lambda r: _text(r, r.number(8)),
    b"B": lambda r: r.push(r.take(r.number(4))),
    b"C": lambda r: r.push(r.take(r.number(1))),
    b"\x8e": lambda r: r.push(r.take(r.number(8))),
    b"\x96": lambda r: r.push_new(bytearray(r.take(r.number(8)))),
    b"]": lambda r: r.push_new([]),
    b"l": lambda r: r.push_new(r.unmark()),
    b"a": lambda r: _append(r, r.last(1)),
    b"e": lambda r: _append(r, r.unmark()),
    b")": lambda r: r.push(()),
    b"t": lambda r: r.push(tuple(r.unmark())),
    b"\x85": lambda r: r.push(r.last(1)),
    b"\x86": lambda r: r.push(r.last(2)),
    b"\x87": lambda r: r.push(r.last(3)),
    b"}": lambda r: r.push_new({}),
    b"d": lambda r: _new_dict(r, r.unmark()),
    b"s": lambda r: r.set_items(r.last(2)),
    b"u": lambda r: r.set_items(r.unmark()),
    b"\x8f": lambda r: r.push_new(set()),
    b"\x90": lambda r: r.add_items(r.unmark()),
    b"\x91": lambda r: r.push_frozen(r.unmark()),
    b"p": lambda r: r.remember(int(r.digits())),
    b"q": lambda r: r.remember(r.number(1)),
    b"r": lambda r: r.remember(r.number(4)),
    b"g": lambda r: r.share(r.memo[int(r.digits())]),
    b"h": lambda r: r.share(r.memo[r.number(1)]),
    b"j": lambda r: r.share(r.memo[r.number(4)]),
    b"c": lambda r: find(r, r.line().decode(), r.line().decode()),
    b"\x93": lambda r: find(r, *r.last(2)),
    b"R": make,
}
_INSTRUCTIONS = {code[0]: instruction for code, instruction in _SPELLED.items()}
_REFUSED = {
    **dict.fromkeys(b"iob\x81\x92", "it makes an object of a class"),
    **dict.fromkeys(b"PQ", "it names something outside of it"),
    **dict.fromkeys(b"\x82\x83\x84", "it names something by an extension code"),
    **dict.fromkeys(b"\x97\x98", "a part of it is kept elsewhere"),
}
