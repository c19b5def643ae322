"""Values as JSON data: what a payload says, for machines and for people.

Rules:
  1. A payload that is CBOR is the value it holds; any other is {"base64": ...}.
  2. What JSON has no word for is an object with one member that names it: base64, datetime, date, decimal, fraction,
     uuid, float (nan, inf), set (a list) and map (pairs, where the keys aren't text).

Doesn't know: keys, jobs, the terminal.
"""

from __future__ import annotations

from base64 import b64encode
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID

from persistency import Corrupt
from persistency.codec.values import decode


def payload_to_json(payload: bytes) -> Any:
    """Return a payload as JSON data."""
    try:
        value = decode(payload)
    except Corrupt:
        value = payload
    return value_to_json(value)


def value_to_json(value: Any) -> Any:
    """Return a value as JSON data."""
    match value:
        case dict():
            if all(isinstance(name, str) for name in value):
                return {name: value_to_json(member) for name, member in value.items()}
            return {"map": [[value_to_json(name), value_to_json(member)] for name, member in value.items()]}
        case list() | tuple():
            return [value_to_json(member) for member in value]
        case set() | frozenset():
            return {"set": [value_to_json(member) for member in value]}
        case bytes():
            return {"base64": b64encode(value).decode()}
        case float() if value - value != 0:
            return {"float": str(value)}
        case datetime():  # before date, which it derives from
            return {"datetime": value.isoformat()}
        case date():
            return {"date": value.isoformat()}
        case Decimal() | Fraction() | UUID():
            return {type(value).__name__.lower(): str(value)}
    return value
