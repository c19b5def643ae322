"""Exactness: which values CBOR gives back as they were, each of the very type it had.

Rules:
  1. Yes means equal and of the same types all the way down. A value that would come back changed, a tuple as a list or
     a `SafeString` as a `str`, is a no, and so is whatever isn't known here.
  2. Yes doesn't mean that it can be written: limits of depth and size are the codec's, which says so itself.
  3. Nothing recurses, and values that contain themselves end at a bound.

Doesn't know: what becomes of a value that is a no.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, date, datetime
from decimal import Decimal
from fractions import Fraction
from typing import Any
from uuid import UUID

CONTAINERS_MAX = 1 << 20
"""How many containers, and members that aren't plain, are looked at; one that is held twice counts twice."""
_MEMBER_BYTES = 64  # about what a member takes that is no text

_PLAIN = frozenset((str, bytes, int, float, bool, type(None)))
_SINGLE = frozenset((*_PLAIN, date, UUID, Fraction))


def is_exact(value: Any) -> bool:
    """Say whether a value is given back by CBOR equal and with its types."""
    if type(value) in _PLAIN:
        return True
    values, hashed = [value], list[Any]()
    left = CONTAINERS_MAX - 1
    while values or hashed:
        in_values = bool(values)
        member = values.pop() if in_values else hashed.pop()
        if type(member) in _SINGLE:
            continue
        found = _inside(member) if in_values else _inside_hashed(member)
        if found is None:
            return False
        below = [one for one in found[0] if type(one) not in _SINGLE]
        keys = [one for one in found[1] if type(one) not in _SINGLE]
        left -= len(below) + len(keys)  # before they are kept: a list that holds itself often would take all memory
        if left < 0:
            return False
        values += below
        hashed += keys
    return True


def is_small(values: list[Any], nbytes: int) -> bool:
    """Say whether values are plain, in lists and dicts at the most, and take about so many bytes; looks at no more."""
    left, waiting = nbytes - _MEMBER_BYTES * len(values), list(values)
    while waiting and left >= 0:
        member = waiting.pop()
        kind = type(member)
        if kind is str or kind is bytes:
            left -= len(member)
        elif kind is int:
            left -= member.bit_length() // 8
        elif kind is list or kind is dict:
            left -= 2 * _MEMBER_BYTES * len(member)
            if left >= 0:
                waiting += (*member, *member.values()) if kind is dict else member
        elif kind not in _SINGLE:
            return False
    return left >= 0


def _inside(member: Any) -> tuple[Iterable[Any], Iterable[Any]] | None:
    """Return a value's own values, and what is hashed in it; `None` if it is a no."""
    kind = type(member)
    if kind is list:
        return member, ()
    if kind is dict:
        return member.values(), member
    if kind is set:
        return (), member
    return ((), ()) if _is_exact_single(member) else None


def _inside_hashed(member: Any) -> tuple[Iterable[Any], Iterable[Any]] | None:
    """Do the same for a key of a dict or a member of a set: there tuples and frozensets keep their types."""
    if type(member) is tuple or type(member) is frozenset:
        return (), member
    return ((), ()) if _is_exact_single(member) else None


def _is_exact_single(member: Any) -> bool:
    if type(member) is datetime:
        # Another zone comes back as an offset, and which of two equal hours it was isn't kept.
        return member.tzinfo is UTC and not member.fold
    if type(member) is Decimal:
        return member.is_finite() and not (member.is_zero() and member.is_signed())  # there is no -0
    return False
