"""Matching: which items a search wants, and which namespaces a listing does.

Rules:
  1. A filter means what it does in LangGraph's own stores: equal values, nested ones too, or operators.
  2. `$gt`, `$gte`, `$lt`, `$lte` compare as numbers whatever reads as one, and other texts as texts; what can't be
     compared doesn't match, and is no error.
  3. An unknown operator is `Misuse`.

Doesn't know: where items come from.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from itertools import takewhile
from typing import Any, Final

from langgraph.store.base import MatchCondition

from persistency import Misuse
from persistency.integrations.langgraph.items import Namespace

_ORDERS: Final[Mapping[str, Callable[[Any, Any], bool]]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}


def matches(value: Mapping[str, Any], wanted: Mapping[str, Any] | None) -> bool:
    """Say whether an item's value has what a filter wants."""
    return not wanted or all(_fits(value.get(name), one) for name, one in wanted.items())


def _fits(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        if any(str(name).startswith("$") for name in wanted):
            return all(_holds(value, name, other) for name, other in wanted.items())
        return isinstance(value, Mapping) and all(_fits(value.get(name), one) for name, one in wanted.items())
    if isinstance(wanted, list | tuple):
        return isinstance(value, list | tuple) and len(value) == len(wanted) and all(map(_fits, value, wanted))
    return bool(value == wanted)


def _holds(value: Any, name: str, other: Any) -> bool:
    if name == "$eq":
        return bool(value == other)
    if name == "$ne":
        return bool(value != other)
    if name not in _ORDERS:
        raise Misuse(f"a filter has the operator {name!r:.40}; there are $eq, $ne, {', '.join(_ORDERS)}")
    try:
        return _ORDERS[name](float(value), float(other))
    except (TypeError, ValueError, OverflowError):
        return isinstance(value, str) and isinstance(other, str) and _ORDERS[name](value, other)


def is_wanted(namespace: Namespace, conditions: Iterable[MatchCondition]) -> bool:
    """Say whether a namespace meets all conditions; `*` stands for any one label."""
    return all(_meets(namespace, condition) for condition in conditions)


def _meets(namespace: Namespace, condition: MatchCondition) -> bool:
    if condition.match_type not in ("prefix", "suffix"):
        raise Misuse(f"a match condition is of type {condition.match_type!r:.40}; there are prefix and suffix")
    path, labels = condition.path, namespace
    if condition.match_type == "suffix":
        path, labels = path[::-1], labels[::-1]
    return len(labels) >= len(path) and all(one in ("*", label) for one, label in zip(path, labels, strict=False))


def beginning(conditions: Iterable[MatchCondition]) -> Namespace:
    """Return the longest namespace that all those that meet the conditions begin with, as far as it is plain to see."""
    prefixes = (condition.path for condition in conditions if condition.match_type == "prefix")
    return max((tuple(takewhile(lambda label: label != "*", path)) for path in prefixes), key=len, default=())
