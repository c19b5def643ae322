"""Values as JSON data, and back: what a payload says, for machines and for people.

Rules:
  1. A payload that is CBOR is the value it holds. Any other, and one that is CBOR of nothing but bytes, is
     {"base64": ...}: the payload as it is stored.
  2. What JSON has no word for is an object with one member that names it: base64, datetime, date, decimal, fraction,
     uuid, float (nan, inf), set (a list) and map (pairs, where the keys aren't text, or a map that would look like one
     of these).
  3. What is read back is the value that was shown. `exact_json` is of the payload too, to the byte: where the value
     alone wouldn't give it back, as with CBOR of another spelling, it is the base64 of it.

Doesn't know: keys, jobs, the terminal.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from datetime import date, datetime
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any
from uuid import UUID

from persistency import Corrupt, Misuse
from persistency.codec.values import decode, encode

_RATIO = re.compile(r"-?[0-9]{1,1000}/[0-9]{1,1000}|-?[0-9]{1,1000}")
_SET = b"\xd9\x01\x02"  # how CBOR begins one, tag 258; where it is something else base64 does no harm


def payload_to_json(payload: bytes) -> Any:
    """Return a payload as JSON data."""
    try:
        value = decode(payload)
    except Corrupt:
        return _in_base64(payload)
    return _in_base64(payload) if isinstance(value, bytes) else value_to_json(value)


def exact_json(payload: bytes) -> Any:
    """Return a payload as JSON data that `payload_from_json` makes the very same payload of."""
    if _SET in payload:  # whose members are spelled in another order by every process
        return _in_base64(payload)
    data = payload_to_json(payload)
    try:
        if payload_from_json(data) == payload:
            return data
    except ValueError:
        pass  # a value that JSON can show and Python can't spell
    return _in_base64(payload)


def payload_from_json(data: Any) -> bytes:
    """Return the payload of JSON data as it was shown. Raises `ValueError` with what is wrong."""
    if isinstance(data, dict) and list(data) == ["base64"]:
        value: bytes = _of_form("base64", data["base64"])
        return value
    return payload_of(value_from_json(data))


def payload_of(value: Any) -> bytes:
    """Return the CBOR of a value. Raises `ValueError` with what is wrong."""
    try:
        return encode(value)
    except Misuse as error:
        raise ValueError(str(error)) from error


def loads(text: str | bytes) -> Any:
    """Return what JSON text says. Raises `ValueError` with what is wrong."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("not JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error


def value_to_json(value: Any) -> Any:
    """Return a value as JSON data."""
    match value:
        case dict():
            if all(isinstance(name, str) for name in value) and not _looks_like_a_form(value):
                return {name: value_to_json(member) for name, member in value.items()}
            return {"map": [[value_to_json(name), value_to_json(member)] for name, member in value.items()]}
        case list() | tuple():
            return [value_to_json(member) for member in value]
        case set() | frozenset():
            # Their own order is another one in every process, for it is that of their hashes.
            return {"set": sorted((value_to_json(member) for member in value), key=json.dumps)}
        case bytes():
            return _in_base64(value)
        case float() if value - value != 0:
            return {"float": str(value)}
        case datetime():  # before date, which it derives from
            return {"datetime": value.isoformat()}
        case date():
            return {"date": value.isoformat()}
        case Decimal() | Fraction() | UUID():
            return {type(value).__name__.lower(): str(value)}
    return value


def value_from_json(data: Any) -> Any:
    """Return the value of JSON data as it was shown. Raises `ValueError` with what is wrong."""
    try:
        return _value(data)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _value(data: Any) -> Any:
    if isinstance(data, list):
        return [_value(member) for member in data]
    if not isinstance(data, dict):
        return data
    if _looks_like_a_form(data):
        [(name, member)] = data.items()
        return _of_form(name, member)
    return {name: _value(member) for name, member in data.items()}


def _looks_like_a_form(value: dict[Any, Any]) -> bool:
    return len(value) == 1 and next(iter(value)) in _FORMS


def _of_form(name: str, member: Any) -> Any:
    kind, read = _FORMS[name]
    if not isinstance(member, kind):
        wanted = "a list" if kind is list else "a text"
        raise ValueError(f"{{{name!r}: ...}} takes {wanted}; a map with just that member is {{'map': [[...]]}}")
    try:
        return read(member)
    except (ValueError, TypeError, InvalidOperation, ZeroDivisionError) as error:
        raise ValueError(f"{json.dumps({name: member}, ensure_ascii=False)[:100]} can't be read: {error}") from error


def _in_base64(data: bytes) -> dict[str, str]:
    return {"base64": b64encode(data).decode()}


def _read_fraction(text: str) -> Fraction:
    if not _RATIO.fullmatch(text):  # an exponent could have any size
        raise ValueError("a fraction is like 1/3")
    return Fraction(text)


def _read_set(members: list[Any]) -> set[Any]:
    return {_hashable(_value(member)) for member in members}


def _read_map(pairs: list[Any]) -> dict[Any, Any]:
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise ValueError("a map is a list of pairs")
    return {_hashable(_value(name)): _value(member) for name, member in pairs}


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    return frozenset(value) if isinstance(value, set) else value


_FORMS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "base64": (str, lambda text: b64decode(text, validate=True)),
    "datetime": (str, datetime.fromisoformat),
    "date": (str, date.fromisoformat),
    "decimal": (str, Decimal),
    "fraction": (str, _read_fraction),
    "uuid": (str, UUID),
    "float": (str, float),
    "set": (list, _read_set),
    "map": (list, _read_map),
}
