"""Frozen values: operations, ranges and statistics are what a frozen dataclass would be, to `dataclasses` too."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import subprocess
import sys
from typing import Any

import pytest

from persistency import Check, Delete, DeletePrefix, DeleteRange, KeyRange, Put, Statistics, key

RANGE = KeyRange(("a",), ("b",))
NUMBERS: dict[str, Any] = {
    "state": "live", "accepted": 3, "committed": 1, "failed": 0, "pending": 2, "mailbox_bytes": 20, "commits": 1,
    "commit_ms_p50": 0.1, "commit_ms_p99": 0.2, "wal_bytes": 4096,
}  # fmt: skip
VALUES: list[tuple[Any, dict[str, Any]]] = [
    (Put("c", key("a"), b"x"), {"category": "c", "key": key("a"), "payload": b"x", "ttl": None}),
    (Put("c", ("a", 1), b"x", 2.5), {"category": "c", "key": ("a", 1), "payload": b"x", "ttl": 2.5}),
    (Delete("c", key("a")), {"category": "c", "key": key("a")}),
    (DeletePrefix("c", key("a")), {"category": "c", "prefix": key("a")}),
    (DeleteRange("c", RANGE), {"category": "c", "key_range": RANGE}),
    (Check("c", key("a"), None), {"category": "c", "key": key("a"), "version": None}),
    (RANGE, {"start": key("a"), "stop": key("b")}),
    (KeyRange(), {"start": None, "stop": None}),
    (Statistics(**(NUMBERS | {"wal_pinned": True, "opening": 7})), NUMBERS | {"wal_pinned": True, "opening": 7}),
]


@pytest.mark.parametrize(("value", "fields"), VALUES)
def test_a_value_is_what_its_fields_are(value: Any, fields: dict[str, Any]) -> None:
    """Made by position or by name, compared, hashed, shown, matched, pickled and copied by its fields."""
    kind = type(value)
    assert {name: getattr(value, name) for name in kind.__match_args__} == fields
    assert kind.__slots__ == kind.__match_args__ == tuple(fields)
    assert repr(value) == f"{kind.__name__}({', '.join(f'{name}={field!r}' for name, field in fields.items())})"
    twins = [kind(*fields.values()), kind(**fields), pickle.loads(pickle.dumps(value)), copy.deepcopy(value)]
    assert all(twin == value and hash(twin) == hash(value) and repr(twin) == repr(value) for twin in twins)
    assert not hasattr(value, "__dict__")


@pytest.mark.parametrize(("value", "fields"), VALUES)
def test_a_value_is_frozen(value: Any, fields: dict[str, Any]) -> None:
    """No field can be set again or deleted, and none added."""
    for name in [*fields, "another"]:
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"can't set '{name}': a {type(value).__name__}"):
            setattr(value, name, None)
    for name in fields:
        with pytest.raises(dataclasses.FrozenInstanceError, match=f"can't delete '{name}'"):
            delattr(value, name)
    assert {name: getattr(value, name) for name in fields} == fields


def test_values_of_two_classes_or_with_other_fields_are_never_equal() -> None:
    """A `Delete` of a key isn't a `DeletePrefix` of it, and no value is the tuple of its fields."""
    values = [value for value, _ in VALUES]
    assert len({*values}) == len(values)
    assert all((one == other) is (at == beside) for at, one in enumerate(values) for beside, other in enumerate(values))
    assert Delete("c", ("a",)) != ("c", ("a",))


@pytest.mark.parametrize(("value", "fields"), VALUES)
def test_another_value_is_made_with_other_fields(value: Any, fields: dict[str, Any]) -> None:
    """As `copy.replace` does, from Python 3.13 on; the first one stays as it is."""
    name = next(iter(fields))
    changed = key("0") if name == "start" else "idle"
    ways = [dataclasses.replace, lambda one, **changes: one.__replace__(**changes)]
    if sys.version_info >= (3, 13):
        ways.append(copy.replace)
    for replace in ways:
        other = replace(value, **{name: changed})
        assert type(other) is type(value)
        assert {field: getattr(other, field) for field in fields} == fields | {name: changed}
        assert getattr(value, name) == fields[name]
        with pytest.raises(TypeError):
            replace(value, wrong=1)


@pytest.mark.parametrize(("value", "fields"), VALUES)
def test_a_value_is_a_dataclass_to_whoever_asks(value: Any, fields: dict[str, Any]) -> None:
    """`fields`, `asdict` and `astuple` know it, and its class, with the types and defaults of its fields."""
    assert dataclasses.is_dataclass(value)
    assert dataclasses.is_dataclass(type(value))
    known = dataclasses.fields(value)
    assert [field.name for field in known] == [field.name for field in dataclasses.fields(type(value))] == list(fields)
    assert {field.name: field.type for field in known} == type(value).__annotations__
    inner = {name: dataclasses.asdict(one) if isinstance(one, KeyRange) else one for name, one in fields.items()}
    assert dataclasses.asdict(value) == inner
    assert dataclasses.astuple(value)[:1] == tuple(inner.values())[:1]
    required = {field.name: fields[field.name] for field in known if field.default is dataclasses.MISSING}
    assert {name: getattr(type(value)(**required), name) for name in fields} == {
        field.name: fields[field.name] if field.default is dataclasses.MISSING else field.default for field in known
    }


def test_a_dataclass_may_be_derived_from_a_value() -> None:
    """With fields of its own behind those of the value; only a frozen one."""

    @dataclasses.dataclass(frozen=True)
    class Named(Delete):
        name: str = "?"

    one = Named("c", key("a"), "x")
    assert dataclasses.asdict(one) == {"category": "c", "key": key("a"), "name": "x"}
    assert [field.name for field in dataclasses.fields(Delete)] == ["category", "key"]
    with pytest.raises(TypeError, match="non-frozen"):

        @dataclasses.dataclass
        class Thawed(Delete):
            name: str = "?"


def test_what_is_derived_without_fields_of_its_own_is_known_by_those_of_the_value() -> None:
    """Compared, shown, hashed and made again by them, with slots of its own or without."""

    class Plain(Delete):
        pass

    class Slotted(Delete):
        __slots__ = ()

    for kind in (Plain, Slotted):
        one, other = kind("c", ("a",)), kind("c", ("b",))
        assert one == kind("c", ("a",)) != other
        assert one != Delete("c", ("a",))
        assert hash(one) == hash(kind("c", ("a",)))
        assert repr(one) == f"{kind.__name__}(category='c', key=('a',))"
        assert dataclasses.asdict(one) == {"category": "c", "key": ("a",)}
        assert dataclasses.replace(one, key=("b",)) == other


FIRST = {
    "an instance": "fields(Delete('c', ('a',)))",
    "the class": "fields(Delete)",
    "a class derived from it": "fields(Plain)",
    "a dataclass derived from it": "fields(dataclass(frozen=True)(Plain))",
    "what all are derived from": "[*fields(Delete.__mro__[1]), *fields(Delete)]",
}


@pytest.mark.parametrize("first", FIRST)
def test_a_value_is_a_dataclass_to_whoever_asks_first(first: str) -> None:
    """Whatever is asked first in a fresh interpreter, all know their own fields afterwards."""
    program = f"""
import sys
from persistency import Delete, Put
class Plain(Delete): pass
assert "dataclasses" not in sys.modules
from dataclasses import dataclass, fields
print(*(field.name for field in {FIRST[first]}))
print(*(field.name for kind in (Put, Delete, Plain) for field in fields(kind)))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.splitlines() == ["category key", "category key payload ttl category key category key"]
