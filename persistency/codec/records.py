r"""Records: dataclasses as maps of their fields, by the annotations of the class.

Rules:
  1. A class is looked at once, when its `Record` is made; a field whose type can't be stored is refused then.
  2. Types are checked on both sides, so that what is written can be read back; what doesn't fit is named by its path.
  3. An alternative of a union is told by the type of the data alone; alternatives that share one are refused.
  4. A field that the data lacks gets its default; one that the class lacks is ignored.
  5. An object is made by the class' own `__init__`, by keywords; fields that it doesn't take are set afterwards.

| annotation | in the data |
|---|---|
| None, bool, int, str, bytes, aware datetime, date, UUID, Decimal, Fraction | the same |
| float | the same; an int, given or read, becomes a float if one has its value |
| Enum, Literal | its plain value; a Flag is an int |
| list, tuple, set, frozenset, dict, of any of these | the same, a tuple as a list (as a key or member: a tuple) |
| another dataclass, also itself | a map |
| Any | what `codec.values` takes, as it is |
| X \| Y, Optional, NewType, Annotated | what is in it |
Stricter than Python: a bool is no int, a datetime is no date, and an object of a subclass isn't one of the class,
because the fields that it adds would be lost.

Doesn't know: bytes, the encoding of the data, codecs, keys.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import Enum, Flag
from fractions import Fraction
from types import NoneType, UnionType
from typing import Any, Literal, NewType, TypeAlias, Union, get_args, get_origin, get_type_hints
from uuid import UUID

_ATOMS = frozenset((NoneType, bool, int, str, bytes, datetime, date, UUID, Decimal, Fraction))
# A bool is an int to Python, and a datetime is a date; not here.
_UNLIKE: dict[type, type] = {int: bool, date: datetime}


class Wrong(Exception):
    """What doesn't fit, and where: the path of fields and indexes grows on its way out."""

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(problem)
        self.path = path

    def __str__(self) -> str:
        where = f"field {self.path.removeprefix('.')!r}: " if self.path else ""
        return where + str(self.args[0])


class _Shape:
    """How one annotation is checked, written and read. This one is that of `Any`: what CBOR holds, as it is."""

    name = "any value"
    kinds: frozenset[type] = frozenset()
    """The types of the data it is read from; none: any."""
    hashable = True
    """Whether it can be a map key or set member in the data."""

    def takes(self, _value: Any) -> bool:
        """Say whether an object in memory is of this shape, as seen from outside."""
        return True

    def convert(self, value: Any, _way: _Way) -> Any:
        """Return what a value, seen from outside already, is in the data (`write`), or what the data stands for."""
        return value


_Way: TypeAlias = Callable[[_Shape, Any], Any]


def write(shape: _Shape, value: Any) -> Any:
    """Return a value of a shape as data. Raises `Wrong` if it isn't one."""
    if not shape.takes(value):
        raise Wrong(f"{shape.name} is expected, not {type(value).__name__}")
    return shape.convert(value, write)


def read(shape: _Shape, data: Any) -> Any:
    """Return the value of a shape that data stands for. Raises `Wrong` if it stands for none."""
    if shape.kinds and type(data) not in shape.kinds:
        raise Wrong(f"{shape.name} is expected, not {type(data).__name__}")
    return shape.convert(data, read)


def _step(way: _Way, shape: _Shape, value: Any, step: str) -> Any:
    """Go one step deeper; what is wrong there gets the step into its path."""
    try:
        return way(shape, value)
    except Wrong as wrong:
        wrong.path = step + wrong.path
        raise


class _Atom(_Shape):
    """A type that the data has, too."""

    def __init__(self, kind: type) -> None:
        self.name = "None" if kind is NoneType else kind.__name__
        self.kinds = frozenset((kind,))
        self._kind = kind
        self._unlike: Any = _UNLIKE.get(kind, ())

    def takes(self, value: Any) -> bool:
        return isinstance(value, self._kind) and not isinstance(value, self._unlike)


class _Real(_Shape):
    """A float, also given or stored as an int of the same value."""

    name = "float"
    kinds = frozenset((float, int))

    def takes(self, value: Any) -> bool:
        return isinstance(value, float | int) and not isinstance(value, bool)

    def convert(self, value: Any, _way: _Way) -> Any:
        try:
            number = float(value)
        except OverflowError:
            number = float("inf")
        if isinstance(value, int) and number != value:
            raise Wrong("float is expected, not an int that no float equals")
        return number


_REAL = _Real()


class _Choice(_Shape):
    """One of a few plain values, each standing for an object: those of a Literal or an Enum."""

    def __init__(self, name: str, choices: list[tuple[Any, Any]]) -> None:
        self.name = name
        self.kinds = frozenset(type(plain) for plain, _ in choices)
        if not self.kinds <= {NoneType, bool, int, float, str, bytes}:
            raise Wrong(f"{name} has other values than None, numbers, text and bytes")
        # By type as well, for 1 == True == 1.0.
        self._objects = {(type(plain), plain): one for plain, one in choices}
        self._plain = {(type(one), one): plain for plain, one in choices}

    def takes(self, value: Any) -> bool:
        try:
            return (type(value), value) in self._plain
        except TypeError:  # it can't even be hashed
            return False

    def convert(self, value: Any, way: _Way) -> Any:
        if way is write:
            return self._plain[type(value), value]
        if (type(value), value) not in self._objects:
            raise Wrong(f"{self.name} is expected, not {value!r:.40}")
        return self._objects[type(value), value]


class _Flags(_Shape):
    """A Flag, whose members combine."""

    kinds = frozenset((int,))

    def __init__(self, cls: type[Flag]) -> None:
        self.name = cls.__name__
        self._cls = cls

    def takes(self, value: Any) -> bool:
        return type(value) is self._cls

    def convert(self, value: Any, way: _Way) -> Any:
        if way is write:
            return int(value.value)
        try:
            return self._cls(value)
        except ValueError as error:
            raise Wrong(f"{self.name} is expected, not {value!r:.40}") from error


class _Many(_Shape):
    """Any number of members of one shape: a list, tuple, set or frozenset."""

    def __init__(self, kind: type, member: _Shape) -> None:
        self.name = kind.__name__
        self.kinds = frozenset((list, tuple) if kind in (list, tuple) else (set, frozenset))
        self.hashable = kind in (tuple, frozenset) and member.hashable
        self._kind: Any = kind
        self._member = member
        if not member.hashable and kind in (set, frozenset):
            raise Wrong(f"a set in the data can't hold {member.name}")

    def takes(self, value: Any) -> bool:
        return isinstance(value, self._kind)

    def convert(self, value: Any, way: _Way) -> Any:
        return self._kind([_step(way, self._member, member, f"[{index}]") for index, member in enumerate(value)])


class _Fixed(_Shape):
    """A tuple whose members have a shape each."""

    kinds = frozenset((list, tuple))

    def __init__(self, members: list[_Shape]) -> None:
        self.name = f"tuple of {len(members)}"
        self.hashable = all(member.hashable for member in members)
        self._members = members

    def takes(self, value: Any) -> bool:
        return isinstance(value, tuple)

    def convert(self, value: Any, way: _Way) -> Any:
        if len(value) != len(self._members):
            raise Wrong(f"{self.name} is expected, not of {len(value)}")
        pairs = zip(self._members, value, strict=True)
        return tuple([_step(way, shape, member, f"[{index}]") for index, (shape, member) in enumerate(pairs)])


class _Map(_Shape):
    """A dict with keys of one shape and values of another."""

    name = "dict"
    kinds: frozenset[type] = frozenset((dict,))
    hashable = False

    def __init__(self, key: _Shape, value: _Shape) -> None:
        if not key.hashable:
            raise Wrong(f"a map's keys in the data can't be {key.name}")
        self._key = key
        self._value = value

    def takes(self, value: Any) -> bool:
        return isinstance(value, dict)

    def convert(self, value: Any, way: _Way) -> Any:
        made = {}
        for k, member in value.items():
            step = f"[{k!r:.40}]"
            made[_step(way, self._key, k, step)] = _step(way, self._value, member, step)
        return made


class _Either(_Shape):
    """One of several shapes, told apart by the types of the data."""

    def __init__(self, shapes: list[_Shape]) -> None:
        if any(not shape.kinds for shape in shapes):
            shapes = [_Shape()]
        elif any(int in shape.kinds for shape in shapes if shape is not _REAL):
            shapes = [_Atom(float) if shape is _REAL else shape for shape in shapes]
        self.name = " | ".join(dict.fromkeys(shape.name for shape in shapes))
        self.hashable = all(shape.hashable for shape in shapes)
        self._shapes = shapes
        self._by_kind = {kind: shape for shape in shapes for kind in shape.kinds}
        self.kinds = frozenset(self._by_kind)
        if len(self._by_kind) < sum(len(shape.kinds) for shape in shapes):
            raise Wrong(f"the alternatives of {self.name} can't be told apart in the data")

    def takes(self, value: Any) -> bool:
        return any(shape.takes(value) for shape in self._shapes)

    def convert(self, value: Any, way: _Way) -> Any:
        if way is write:
            return way(next(shape for shape in self._shapes if shape.takes(value)), value)
        return way(self._by_kind.get(type(value), self._shapes[0]), value)


class Record(_Shape):
    """A dataclass, as a map. Raises `Wrong` for a class that can't be stored."""

    kinds: frozenset[type] = frozenset((dict,))
    hashable = False

    def __init__(self, cls: type, known: dict[type, Record] | None = None) -> None:
        known = {} if known is None else known
        known[cls] = self  # before its fields, which may be of this very class
        self.name: str = cls.__name__
        self._cls: Any = cls
        _check_init(cls)
        try:
            hints = get_type_hints(cls)
        except (NameError, TypeError, AttributeError, SyntaxError) as error:
            raise Wrong(f"its annotations can't be resolved: {error}") from error
        self._fields: list[tuple[Field[Any], str, _Shape]] = []
        for field in fields(cls):
            step = f".{field.name}"
            try:
                self._fields.append((field, step, _shape_of(hints[field.name], known)))
            except Wrong as wrong:
                wrong.path = step + wrong.path
                raise

    def takes(self, value: Any) -> bool:
        """Say whether an object is one of the class itself."""
        return type(value) is self._cls

    def convert(self, value: Any, way: _Way) -> Any:
        """Return an object's fields, or the object made of them."""
        return self._write(value) if way is write else self._read(value)

    def _write(self, value: Any) -> dict[str, Any]:
        made = {}
        for field, step, shape in self._fields:
            member = getattr(value, field.name, MISSING)
            if member is not MISSING:
                made[field.name] = _step(write, shape, member, step)
            elif field.init:  # any other one was never set, and so needn't be set again
                raise Wrong("it isn't set", step)
        return made

    def _read(self, data: Any) -> Any:
        taken: dict[str, Any] = {}
        rest: dict[str, Any] = {}
        for field, step, shape in self._fields:
            if field.name in data:
                (taken if field.init else rest)[field.name] = _step(read, shape, data[field.name], step)
            elif field.init and field.default is MISSING and field.default_factory is MISSING:
                raise Wrong("it is missing", step)
        try:
            made = self._cls(**taken)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # its own __post_init__ has its own errors
            raise Wrong(f"{self.name} refuses it: {error}") from error
        for name, member in rest.items():
            object.__setattr__(made, name, member)  # of a frozen one, too
        return made


def _check_init(cls: type) -> None:
    """Raise `Wrong` if the class can't be called with exactly its fields."""
    wanted = {field.name for field in fields(cls) if field.init}
    parameters = inspect.signature(cls).parameters.values()
    named = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    needed = {one.name for one in parameters if one.default is one.empty and one.name in named}
    if not needed <= wanted <= named:
        raise Wrong(f"its __init__ takes {', '.join(sorted(named))}, not its fields, {', '.join(sorted(wanted))}")


def _shape_of(hint: Any, known: dict[type, Record]) -> _Shape:
    while isinstance(hint, NewType):
        hint = hint.__supertype__
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return _Shape()
    if hint is float:
        return _REAL
    if hint in _ATOMS:
        return _Atom(hint)
    if origin is Union or origin is UnionType:
        return _Either([_shape_of(one, known) for one in args])
    if origin is Literal:
        return _Choice(str(hint), [(_plain(one), one) for one in args])
    if (origin or hint) in (list, set, frozenset, tuple, dict):
        return _container(origin or hint, args, bare=origin is None, known=known)
    return _class(hint, known)


def _container(kind: type, args: tuple[Any, ...], *, bare: bool, known: dict[type, Record]) -> _Shape:
    inner = [_shape_of(one, known) for one in args if one is not ...]
    if kind is dict:
        return _Map(*(inner or (_Shape(), _Shape())))
    if kind is tuple and not bare and ... not in args:
        return _Fixed(inner)
    return _Many(kind, inner[0] if inner else _Shape())


def _class(hint: Any, known: dict[type, Record]) -> _Shape:
    if isinstance(hint, type):
        if issubclass(hint, Flag):
            return _Flags(hint)
        if issubclass(hint, Enum):
            return _Choice(hint.__name__, [(_plain(one), one) for one in hint])
        if is_dataclass(hint):
            return known[hint] if hint in known else Record(hint, known)
    name = f"{hint.__module__}.{hint.__qualname__}" if isinstance(hint, type) else str(hint)
    raise Wrong(f"{name} isn't a type that can be stored")


def _plain(one: Any) -> Any:
    """What CBOR makes of an Enum's value: text of a subclass of str is text."""
    value = one.value if isinstance(one, Enum) else one
    bases: tuple[Any, ...] = (bool, int, float, str, bytes)
    for base in bases:
        if isinstance(value, base):
            return base(value)
    return value
