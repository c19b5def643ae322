"""The values of a py-key-value store: JSON objects, as text.

py-key-value promises its users JSON, and its other stores keep just that: a tuple comes back as a list, a `datetime` is
refused. It is what SQLite's own functions read too: `json_extract(payload, '$.name')`.

Rules:
  1. What can be written can be read back. What can't be is refused before anything is sent to the job.
  2. Bytes from a file are never trusted: they give a dict, or raise `DeserializationError`.
  3. Equal values are equal payloads: the members of an object are written in the order of their names.

Doesn't know: where payloads are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, SupportsFloat

from key_value.aio.errors import DeserializationError, InvalidKeyError, InvalidTTLError, SerializationError

from persistency import Key, Misuse, key

KEY_BYTES_MAX = 8192
"""The longest a collection's name and a key may be together, encoded: what a job takes."""
_TTL_SECONDS_MAX = 10_000_000_000  # what a job takes, some 317 years


def encode(value: Mapping[str, Any]) -> bytes:
    """Return a value's payload. Raises `SerializationError` for what JSON can't hold."""
    if not isinstance(value, Mapping):
        raise SerializationError(f"a value must be a mapping, not {type(value).__name__}")
    if not all(isinstance(name, str) for name in value):
        raise SerializationError("a value must be a mapping with text for keys")
    try:
        # NaN and the infinities are no JSON: SQLite, and most that reads it, would refuse the whole value.
        return json.dumps(dict(value), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise SerializationError(f"a value can't be written as JSON: {error}") from error


def decode(payload: bytes) -> dict[str, Any]:
    """Return a payload's value. Raises `DeserializationError` for what isn't one."""
    try:
        value = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise DeserializationError(f"a payload isn't JSON: {error}") from error
    if not isinstance(value, dict):
        raise DeserializationError(f"a payload is a JSON {type(value).__name__}, not an object")
    return value


def as_row(collection: str, name: str) -> Key:
    """Return the row's key of a key. Raises `InvalidKeyError` if it is too long, and for a lone surrogate."""
    if not isinstance(collection, str) or not isinstance(name, str):
        wrong = collection if not isinstance(collection, str) else name
        raise Misuse(f"a key and its collection must be text, not {type(wrong).__name__}: pass a str")
    try:
        row = key(collection, name)
    except Misuse as error:
        raise InvalidKeyError(f"a key or its collection can't be stored: {error}") from error
    if len(row) > KEY_BYTES_MAX:
        raise InvalidKeyError(
            f"a key and its collection have {len(row)} bytes together, encoded; at most {KEY_BYTES_MAX} are allowed"
        )
    return row


def as_collection(collection: str) -> str:
    """Return a collection's name. Raises `InvalidKeyError` if no key could be in it."""
    as_row(collection, "")
    return collection


def check_seed(seed: Mapping[str, Mapping[str, Mapping[str, Any]]] | None, default_collection: str | None) -> None:
    """Raise what is wrong with a seed, before anything is opened for it."""
    if default_collection is not None and not isinstance(default_collection, str):
        raise Misuse(f"default_collection must be text, not {type(default_collection).__name__}: pass a str")
    as_collection(default_collection or "")
    if not isinstance(seed, Mapping | None):
        raise Misuse(f"seed must be a mapping, not {type(seed).__name__}: pass {{collection: {{key: value}}}}")
    for collection, items in (seed or {}).items():
        if not isinstance(items, Mapping):
            raise Misuse(f"a collection of seed must be a mapping, not {type(items).__name__}: pass {{key: value}}")
        for name, value in items.items():
            as_row(collection, name)
            encode(value)


def as_ttl_ms(ttl: SupportsFloat | timedelta | None) -> int | None:
    """Return a TTL, given in seconds, in whole milliseconds, at least one. Raises `InvalidTTLError`."""
    if ttl is None:
        return None
    if isinstance(ttl, timedelta):
        ttl = ttl.total_seconds()
    try:
        seconds = float("nan") if isinstance(ttl, bool | str | bytes) else float(ttl)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidTTLError(ttl=ttl, extra_info={"type": type(ttl).__name__}) from error
    if not 0 < seconds <= _TTL_SECONDS_MAX:  # NaN too
        raise InvalidTTLError(ttl=ttl, extra_info={"type": type(ttl).__name__})
    return max(1, round(seconds * 1000))
