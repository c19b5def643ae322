"""Objects: codecs, which turn the values of a category into payloads and back.

Rules:
  1. A codec is two functions: `encode` gives bytes or raises `Misuse`; `decode` gives the value or raises `Corrupt`.
  2. What `encode` takes can be read back: types are checked on both sides, and a struct or model is read back first.
  3. `CBOR` and the typed codecs write what `codec.values` writes, and so its limits and its allow-list hold.
  4. A typed value is a CBOR map from field names to values: no class name, no code, readable without the class.
  5. A field that the data lacks gets its default; one that the class lacks is ignored, so that a release that was
     rolled back reads what its successor wrote. (A struct or model that forbids unknown fields says so itself.)
  6. msgspec and pydantic are never imported for somebody who doesn't: only if the class given is theirs.

Doesn't know: categories, keys, jobs, where the bytes go.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from datetime import date, datetime
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from typing import Any, Final, Generic, Protocol, TypeVar
from uuid import UUID

from persistency.codec import values
from persistency.codec.records import Record, Wrong, read, write
from persistency.errors import Corrupt, Misuse

T = TypeVar("T")
_READ_HINT = "Was it written with another codec, or by a class with other fields?"
# What CBOR has types of its own for; msgspec and pydantic would make text of it.
_NATIVE = (bytes, bytearray, datetime, date, UUID, Decimal)
_PLAIN = (bool, int, float, str, Fraction, *_NATIVE)


class Codec(Protocol[T]):
    """How the values of a category become payloads: anything with these two functions."""

    def encode(self, value: T, /) -> bytes:
        """Return the value as bytes. Raises `Misuse` if it can't be."""
        raise NotImplementedError

    def decode(self, data: bytes, /) -> T:
        """Return the value of the bytes. Raises `Corrupt` if they are not one."""
        raise NotImplementedError


class _Cbor:
    """Plain values as CBOR."""

    __slots__ = ()

    def encode(self, value: Any, /) -> bytes:
        return values.encode(value)

    def decode(self, data: bytes, /) -> Any:
        return values.decode(data)

    def __repr__(self) -> str:
        return "CBOR"


class _Raw:
    """Bytes as they are."""

    __slots__ = ()

    def encode(self, value: bytes | bytearray | memoryview, /) -> bytes:
        if type(value) is bytes:
            return value
        try:
            with memoryview(value) as view:
                return view.tobytes()
        except (TypeError, ValueError, BufferError) as error:  # not bytes-like, or a view that was released already
            hint = "Encode it to bytes first, or give the category another codec: CBOR, typed(cls)."
            raise Misuse(f"a RAW value must be bytes-like, not {type(value).__name__}", hint=hint) from error

    def decode(self, data: bytes, /) -> bytes:
        return data

    def __repr__(self) -> str:
        return "RAW"


CBOR: Final[Codec[Any]] = _Cbor()
"""Plain values (help(persistency.codec.values) lists them): what a category uses unless it is told otherwise."""

RAW: Final[Codec[bytes]] = _Raw()
"""Payloads as they are: bytes-like in, bytes out."""


def typed(cls: type[T]) -> Codec[T]:
    """Return the codec of a dataclass, `msgspec.Struct` or pydantic `BaseModel` (the extra `persistency[typed]`).

    Raises `Misuse` for any other class, and for a dataclass with a field whose type can't be stored
    (`help(persistency.codec.records)` lists those that can). A struct or model is checked and converted by the rules
    of its library, and its names in the data are those it declares (msgspec's `rename`, pydantic's aliases).
    """
    if isinstance(cls, type):
        if _derives(cls, "msgspec", "Struct"):
            return _Structs(cls)
        if _derives(cls, "pydantic.main", "BaseModel"):
            return _Models(cls)
        if is_dataclass(cls):
            return _Records(cls)
    raise Misuse(
        f"typed() takes a dataclass, a msgspec.Struct or a pydantic BaseModel, not {cls!r:.80}",
        hint="Pass the class itself (structs and models need the extra 'typed': pip install 'persistency[typed]'); "
        "plain values need no class: use CBOR.",
    )


def _derives(cls: type, module: str, name: str) -> bool:
    """Whether a class derives from one of a module that is perhaps not even imported."""
    base = getattr(sys.modules.get(module), name, None)
    return base is not None and issubclass(cls, base)


def same(one: Any, other: Any) -> bool:
    """Whether two decoded values are deeply equal.

    The order of a map's keys doesn't count, nor whether a sequence is a list or a tuple. Numbers are equal as Python
    says (`1 == 1.0`), but a bool equals bools only, also within containers and among keys. NaN equals NaN.
    """
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, list | tuple):
        return isinstance(other, list | tuple) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return isinstance(other, dict) and _same_members(one, other) and all(same(one[k], other[k]) for k in one)
    if isinstance(one, set | frozenset):
        return isinstance(other, set | frozenset) and _same_members(one, other)
    if is_dataclass(one) and type(one) is type(other):  # its own comparison may be of identity, or leave fields out
        return all(same(getattr(one, f.name, None), getattr(other, f.name, None)) for f in fields(one))
    return bool(one == other) or (one != one and other != other)


def _same_members(one: Iterable[Any], other: Iterable[Any]) -> bool:
    """Whether the keys of two dicts, or the members of two sets, are the same ones."""
    theirs = {member: member for member in other}
    mine = list(one)
    return len(mine) == len(theirs) and all(member in theirs and same(member, theirs[member]) for member in mine)


class _Records(Generic[T]):
    """Dataclasses."""

    __slots__ = ("_cls", "_record")

    def __init__(self, cls: type[T]) -> None:
        self._cls = cls
        try:
            self._record = Record(cls)
        except Wrong as wrong:
            hint = "help(persistency.codec.records) lists the types; others go in as those."
            raise Misuse(f"typed({cls.__name__}): {wrong}", hint=hint) from wrong

    def encode(self, value: T, /) -> bytes:
        try:
            plain = write(self._record, value)
        except Wrong as wrong:
            raise Misuse(f"a {self._cls.__name__} can't be stored: {wrong}", hint="Pass what it declares.") from wrong
        except RecursionError as error:
            raise Misuse(f"a {self._cls.__name__} is nested too deep", hint="Does it contain itself?") from error
        return values.encode(plain)

    def decode(self, data: bytes, /) -> T:
        plain = values.decode(data)
        try:
            return read(self._record, plain)  # type: ignore[no-any-return]  # what the class itself made
        except Wrong as wrong:
            raise Corrupt(f"not a {self._cls.__name__}: {wrong}", hint=_READ_HINT) from wrong

    def __repr__(self) -> str:
        return f"typed({self._cls.__name__})"


class _Foreign(Generic[T]):
    """Objects of a library that has its own rules: they are converted by it, and read back before they are taken."""

    __slots__ = ("_cls",)

    def __init__(self, cls: type[T]) -> None:
        self._cls = cls

    def encode(self, value: T, /) -> bytes:
        name = self._cls.__name__
        if type(value) is not self._cls:
            raise Misuse(f"{name} is expected, not {type(value).__name__}", hint="Fields of a subclass would be lost.")
        try:
            data = values.encode(self._write(value))
            self._read(values.decode(data))
        except (Misuse, MemoryError):
            raise
        except Exception as error:  # validators are free to raise what they like
            told = "it is nested too deep" if isinstance(error, RecursionError) else self._tell(error)
            raise Misuse(f"a {name} can't be stored: {told}", hint="What is stored must be readable.") from error
        return data

    def decode(self, data: bytes, /) -> T:
        plain = values.decode(data)
        try:
            return self._read(plain)
        except (MemoryError, RecursionError):
            raise
        except Exception as error:  # as above
            raise Corrupt(f"not a {self._cls.__name__}: {self._tell(error)}", hint=_READ_HINT) from error

    def _write(self, value: T) -> Any:
        raise NotImplementedError

    def _read(self, plain: Any) -> T:
        raise NotImplementedError

    def _tell(self, error: Exception) -> str:
        return str(error)

    def __repr__(self) -> str:
        return f"typed({self._cls.__name__})"


class _Structs(_Foreign[T]):
    """Subclasses of `msgspec.Struct`."""

    __slots__ = ()

    def __init__(self, cls: type[T]) -> None:
        import msgspec

        super().__init__(cls)
        try:
            msgspec.convert(None, cls)
        except msgspec.ValidationError:
            pass  # None is no struct
        except Exception as error:  # annotations that msgspec doesn't support, or that can't be resolved
            raise Misuse(f"typed({cls.__name__}): {error}", hint="msgspec's own documentation says why.") from error

    def _write(self, value: T) -> Any:
        import msgspec

        return msgspec.to_builtins(value, builtin_types=_NATIVE)

    def _read(self, plain: Any) -> T:
        import msgspec

        return msgspec.convert(plain, self._cls, builtin_types=_NATIVE)


class _Models(_Foreign[T]):
    """Subclasses of pydantic's `BaseModel`."""

    __slots__ = ()

    def _write(self, value: Any) -> Any:
        # The names that validation takes; nothing computed; no warnings, as reading it back decides.
        return _plain(value.model_dump(by_alias=True, round_trip=True, warnings=False))

    def _read(self, plain: Any) -> T:
        cls: Any = self._cls
        return cls.model_validate(plain)  # type: ignore[no-any-return]  # a model gives itself

    def _tell(self, error: Exception) -> str:
        import pydantic

        if not isinstance(error, pydantic.ValidationError):
            return str(error)
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        return "; ".join(f"field {'.'.join(map(str, one['loc']))!r}: {one['msg']}" for one in problems[:3])


def _plain(value: Any) -> Any:
    """What a model was dumped to, with what CBOR lacks as the text or number that pydantic writes in JSON."""
    if value is None or (isinstance(value, _PLAIN) and not isinstance(value, Enum)):
        return value
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, dict):
        return {_plain(k): _plain(member) for k, member in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        kind = next(kind for kind in (list, tuple, set, frozenset) if isinstance(value, kind))
        return kind(map(_plain, value))
    if hasattr(value, "get_secret_value"):
        raise Misuse("a secret would be stored as asterisks", hint="Give the field a serializer, or another type.")
    import pydantic_core

    return pydantic_core.to_jsonable_python(value)
