"""Frozen values: operations, ranges of keys, a job's numbers. To `dataclasses` they are frozen dataclasses.

Rules:
  1. The fields are slots, and `__match_args__` has their order; `__init__` sets each once with `give`, and nobody does
     afterwards.
  2. Two values are equal if they are of one class and so are their fields.
  3. `dataclasses` is imported by whoever asks a value what it is as a dataclass, never before: it and each class made
     with it would be a fifth of what it takes to import the package.

Doesn't know: what the fields are about.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

if TYPE_CHECKING:
    from dataclasses import Field

give: Callable[[object, str, Any], None] = object.__setattr__  # past the freezing: for `__init__` alone


class _FieldsOnDemand:
    """What `dataclasses` knows a dataclass by, made for a class when it is asked for."""

    def __get__(self, _value: object, kind: type[Frozen]) -> dict[str, Field[Any]]:
        from dataclasses import field, make_dataclass
        from inspect import signature

        # What is derived from a value, and has no fields of its own, has those of the value.
        kind = next((one for one in kind.__mro__ if "__match_args__" in vars(one)), Frozen)
        given = signature(kind).parameters
        fields = [
            (name, kind.__annotations__[name], field() if default is given[name].empty else field(default=default))
            for name in _names(kind)
            for default in [given[name].default]
        ]
        known: Any = make_dataclass(kind.__name__, fields, frozen=True)
        kind.__dataclass_params__ = known.__dataclass_params__
        if kind is not Frozen:  # there it would stand before what makes those of all others
            kind.__dataclass_fields__ = known.__dataclass_fields__
        return known.__dataclass_fields__  # type: ignore[no-any-return]  # as `dataclasses` makes them


def _names(kind: type[Frozen]) -> tuple[str, ...]:
    # Not declared where it is empty: type checkers take those of each class for what they are.
    return getattr(kind, "__match_args__", ())


class Frozen:
    """A value whose fields can't be set again; it can be hashed if they can."""

    __slots__ = ()

    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]
        __dataclass_params__: ClassVar[Any]
    else:
        __dataclass_fields__ = _FieldsOnDemand()

    def __setattr__(self, name: str, value: object) -> NoReturn:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"can't set {name!r}: a {type(self).__name__} is frozen, make another one")

    def __delattr__(self, name: str) -> NoReturn:
        from dataclasses import FrozenInstanceError

        raise FrozenInstanceError(f"can't delete {name!r}: a {type(self).__name__} is frozen, make another one")

    def _fields(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in _names(type(self)))

    def __eq__(self, other: object) -> bool:
        return self._fields() == other._fields() if type(other) is type(self) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._fields())

    def __repr__(self) -> str:
        fields = zip(_names(type(self)), self._fields(), strict=True)
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in fields)})"

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...]]:
        return type(self), self._fields()

    def __replace__(self, **changes: Any) -> Self:  # what `copy.replace` calls, from Python 3.13 on
        return type(self)(**dict(zip(_names(type(self)), self._fields(), strict=True)) | changes)
