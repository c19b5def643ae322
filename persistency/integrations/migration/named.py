"""What a plain pickle may name: a few makers of data, each of them a function of this module.

Rules:
  1. A name is looked up in one small table, `_MADE`, and nowhere else: nothing is imported for a pickle.
  2. A maker takes what `pickle.dumps` writes of its kind, and nothing else.
  3. What a maker copies is charged: its argument may be one that is memorised, and come again and again.

Doesn't know: the instructions of pickles, where these come from.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

from persistency.integrations.migration.reading import DIGITS_MAX, Name, Reading, Refused, named


def find(reading: Reading, module: Any, name: Any) -> None:
    """Push what is named. Raises `Refused` if it isn't in the table."""
    if type(module) is not str or type(name) is not str:  # which is never spelled: it may be of any size
        raise Refused("damaged: a name that isn't text")
    found = Name(module[:100], name[:100])
    if found not in _MADE:
        raise named(found)
    reading.shared = True  # so that it is seen if it stays in the value
    reading.push(found)


def make(reading: Reading) -> None:
    """Push what is made, of the name and the arguments on top."""
    name, args = reading.last(2)
    if type(name) is not Name or type(args) is not tuple:
        raise TypeError("a call of something that has no name")
    reading.push_new(_MADE[name](reading, *args))


def _bytes(reading: Reading, text: Any, encoding: Any) -> bytes:
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise TypeError("bytes of another encoding")
    reading.charge_bytes(len(text))
    return text.encode("latin-1")


def _no_bytes(_reading: Reading) -> bytes:
    return b""


def _bytearray(reading: Reading, data: Any = b"", encoding: Any = "latin-1") -> bytearray:
    if type(data) is not bytes:
        return bytearray(_bytes(reading, data, encoding))
    reading.charge_bytes(len(data))
    return bytearray(data)


def _set(reading: Reading, members: Any = ()) -> set[Any]:
    if type(members) not in (list, tuple):
        raise TypeError("a set of something else than a list")
    return reading.new_set(members)


def _frozenset(reading: Reading, members: Any = ()) -> frozenset[Any]:
    return frozenset(_set(reading, members))


def _dict(_reading: Reading) -> dict[Any, Any]:
    return {}


def _state(data: Any, size: int) -> Any:
    """Return the packed state of a date, which is text in the protocols that have no bytes."""
    state = data.encode("latin-1") if type(data) is str else data
    if type(state) is not bytes or len(state) != size:
        raise TypeError("a date of another form")
    return state


def _datetime(_reading: Reading, data: Any, zone: Any = None) -> datetime:
    if type(zone) not in (timezone, type(None)):
        raise TypeError("a time zone of another kind")
    made: Any = datetime  # which takes its packed state too
    return made(_state(data, 10), zone)  # type: ignore[no-any-return]  # a datetime


def _date(_reading: Reading, data: Any) -> date:
    made: Any = date
    return made(_state(data, 4))  # type: ignore[no-any-return]  # a date


def _timedelta(_reading: Reading, days: Any, seconds: Any = 0, microseconds: Any = 0) -> timedelta:
    if not type(days) is type(seconds) is type(microseconds) is int:
        raise TypeError("a span of time that isn't whole numbers")
    return timedelta(days, seconds, microseconds)


def _timezone(_reading: Reading, *args: Any) -> timezone:
    return timezone(*args)


def _decimal(reading: Reading, text: Any) -> Decimal:
    if type(text) is not str or len(text) > DIGITS_MAX:
        raise TypeError("a Decimal that isn't text, or too long")
    reading.charge_bytes(len(text))
    return Decimal(text)


_MADE: dict[Name, Callable[..., Any]] = {
    Name("_codecs", "encode"): _bytes,
    Name("datetime", "datetime"): _datetime,
    Name("datetime", "date"): _date,
    Name("datetime", "timedelta"): _timedelta,
    Name("datetime", "timezone"): _timezone,
    Name("decimal", "Decimal"): _decimal,
    Name("collections", "OrderedDict"): _dict,
}
for _module in ("builtins", "__builtin__"):
    _MADE |= {Name(_module, "bytes"): _no_bytes, Name(_module, "bytearray"): _bytearray}
    _MADE |= {Name(_module, "set"): _set, Name(_module, "frozenset"): _frozenset}
