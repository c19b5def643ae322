"""Counting: the message of an increment, which reads a number, adds to it and writes it, where the rows are.

Rules:
  1. A number is a CBOR integer. What is there and isn't one is a `Conflict` that trying again won't mend.

Doesn't know: jobs, SQL. It is imported by the first increment: no other verb of a job needs to know of values.
"""

from __future__ import annotations

from typing import Any

from persistency.arguments import as_category
from persistency.codec.keys import Key, as_key
from persistency.codec.values import INT_BYTES_MAX, decode, encode
from persistency.errors import Conflict, Corrupt, Misuse
from persistency.ops import KeyLike
from persistency.storage.port import GetEntry, Run, SetRow, StoredRow, Within


def add(category: str, key: KeyLike, delta: int) -> Run:
    """Return the message of an increment: all of it is one transaction."""
    name, at, by = as_category(category), as_key(key), _as_delta(delta)

    def run(within: Within) -> int:
        row: StoredRow | None = within.do(GetEntry(name, at))
        total = by if row is None else _as_integer(at, row.payload) + by
        try:
            payload = encode(total)
        except Misuse as error:
            raise Conflict(at, f"a sum of at most {INT_BYTES_MAX} bytes", "a larger one") from error
        within.do(SetRow(name, at, payload, None if row is None else row.expires_ms))
        return total

    return Run(run, (f"increment {category!r} {at!r}",))


def _as_delta(value: Any) -> int:
    """Return by how much to count; any int but a bool."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise Misuse(f"delta must be an int, not {type(value).__name__}: pass 1, or -1")
    if value.bit_length() > 8 * INT_BYTES_MAX - 1:
        raise Misuse(f"delta is too large to be stored: pass an int of up to {INT_BYTES_MAX} bytes")
    return int(value)


def _as_integer(key: Key, payload: bytes) -> int:
    try:
        value = decode(payload)
    except Corrupt as error:
        raise _not_countable(key, "bytes that aren't CBOR") from error
    if not isinstance(value, int) or isinstance(value, bool):
        raise _not_countable(key, f"a {type(value).__name__}")
    return value


def _not_countable(key: Key, found: str) -> Conflict:
    conflict = Conflict(key, "a CBOR integer", found, hint="Count under a key of its own.")
    conflict.retryable = False  # type: ignore[misc]  # of other conflicts; this one stays
    return conflict
