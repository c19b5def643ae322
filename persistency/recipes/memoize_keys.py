"""Call keys: the key under which the result of a call is kept, made of the function's bound arguments.

Rules:
  1. However a call is spelled, by position, by keyword or by default, it has one key; and calls whose arguments differ
     in type or value have two. (`1`, `1.0` and `True` are three arguments, and two equal lists are one.)
  2. An argument that can't be told from another by its value alone is refused by name. No `repr`, hash or pickle
     stands for it. A class is told by its name, if it is found by that; what derives from a text, a number, bytes or a
     date, by its class and what it derives from.
  3. The names of the parameters are in the key, so that a function with others doesn't read what this one has kept.
  4. Arguments of over 1 KiB, encoded, are represented by their SHA-256; so is a container within one.
  5. What is in a container several times is looked at once.

A tuple that begins with `None` says what the rest of it was: `(None, "date", "2026-11-22")`. One of the caller's own
that begins so becomes `(None, "tuple", None, ...)`, and so nothing can be taken for something else.

Doesn't know: what is kept, where, for how long.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import fields, is_dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PosixPath, PurePath, PurePosixPath, PureWindowsPath, WindowsPath
from typing import Any, Final, TypeAlias
from uuid import UUID
from zoneinfo import ZoneInfo

from persistency import Key, Misuse, RawKey, key

ARGUMENTS_BYTES_MAX: Final = 1024
DEPTH_MAX: Final = 32
VERSION_CHARS_MAX: Final = 200

_HEAP_TYPE = 1 << 9  # a flag of classes that can be made several times; those of C code that are static can't
_PLAIN = frozenset((str, int, float, bool, bytes, type(None), UUID))
RESULTS: Final = key("result")
"""All results of a function are its children."""
CLAIMS: Final = key("claim")
"""All claims of a function's computations."""


class CallKeys:
    """The keys of one function's calls."""

    def __init__(
        self,
        fn: Callable[..., Any],
        label: str,
        *,
        version: int | str,
        ignore: Collection[str],
        chosen: Callable[..., Any] | None,
    ) -> None:
        """`label` is what errors call the function; `chosen` makes a key's parts of a call, in place of its arguments.

        Raises `Misuse` for a function without a signature, a version that is neither int nor text, and for names to
        ignore that the function doesn't have.
        """
        self._label = label
        self._signature = _signature_of(fn, label)
        self._ignored = _names(ignore, self._signature, label)
        self._chosen = chosen
        parameters = list(self._signature.parameters.values())
        kept = [p for p in parameters if p.name not in self._ignored]
        shape = ",".join(_STARS.get(p.kind, "") + p.name for p in kept) if chosen is None else "key()"
        self.prefix: Key = key(RESULTS, _as_version(version, label), shape)
        """What all keys begin with."""
        # The usual kinds of parameters are bound here: a tenth of the time of `Signature.bind`.
        self._usual = chosen is None and all(
            p.kind in (*_BY_POSITION, inspect.Parameter.KEYWORD_ONLY) for p in parameters
        )
        self._by_position = sum(p.kind in _BY_POSITION for p in parameters)
        self._by_position_only = any(p.kind is inspect.Parameter.POSITIONAL_ONLY for p in parameters)
        self._defaults = [(p.name, p.default) for p in parameters]
        self._kept = [place for place, p in enumerate(parameters) if p.name not in self._ignored]

    def key(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Key:
        """Return the key of the result of a call.

        Raises `TypeError` for a call that doesn't fit the function, `Misuse` for an argument that can't be in a key.
        """
        values = self._values(args, kwargs)
        try:
            for value in values:
                if type(value) not in _PLAIN:
                    seen: _Seen = {}
                    values = tuple([_plain(value, seen) for value in values])
                    break
            found = self.prefix + values
        except Misuse:
            self._blame(args, kwargs)
            raise
        if len(found) - len(self.prefix) > ARGUMENTS_BYTES_MAX:
            return self.prefix + (_digest("call", found[len(self.prefix) :]),)
        return found

    def signature_of(self, bound: int) -> inspect.Signature:
        """Return the function's signature, without the first parameter if that is `bound`."""
        parameters = list(self._signature.parameters.values())
        if bound and parameters and parameters[0].kind in _BY_POSITION:
            return self._signature.replace(parameters=parameters[1:])
        return self._signature

    def _values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """Return what is in the key of a call, as it was given."""
        if self._usual and len(args) <= self._by_position:
            values = self._usual_values(args, kwargs)
            if values is not None:
                return values if len(self._kept) == len(values) else tuple([values[place] for place in self._kept])
        if self._chosen is not None:
            chosen = self._chosen(*args, **kwargs)
            return chosen if type(chosen) is tuple else (chosen,)
        return tuple(value for _, value in self._bound(args, kwargs))

    def _usual_values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """Return the values of all parameters; `None` where `Signature.bind` has to look, or to complain."""
        if not kwargs and len(args) == len(self._defaults):
            return args
        if kwargs and self._by_position_only:
            return None
        values, named = list(args), 0
        for name, default in self._defaults[len(args) :]:
            if name in kwargs:
                values.append(kwargs[name])
                named += 1
            elif default is inspect.Parameter.empty:
                return None
            else:
                values.append(default)
        return tuple(values) if named == len(kwargs) else None

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[str, Any]]:
        """Return the arguments of a call with their names, in the order of the parameters."""
        bound = self._signature.bind(*args, **kwargs)
        bound.apply_defaults()
        values = []
        for name, value in bound.arguments.items():
            if name in self._ignored:
                continue
            if self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                value = {key: given for key, given in value.items() if key not in self._ignored}
            values.append((name, value))
        return values

    def _blame(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise a `Misuse` that names the argument that can't be in a key."""
        if self._chosen is not None:
            named = [("what key= gave", self._values(args, kwargs))]
        else:
            named = [(f"argument {name!r}", value) for name, value in self._bound(args, kwargs)]
        for name, value in named:
            try:
                key(_plain(value, {}))
            except Misuse as error:
                hint = (
                    "Leave the argument out by ignore=(name,), or have key= make the key's parts of a call; "
                    "help(persistency.recipes.memoized) lists what can be in a key."
                )
                raise Misuse(f"{self._label}: {name} can't be in a key: {error}", hint=hint) from error


def claim_of(result: Key) -> Key:
    """Return the key of the claim that belongs to the key of a result."""
    return Key(b"%b%b" % (CLAIMS, result[len(RESULTS) :]))


# -- arguments as parts of a key -------------------------------------------------------------------------------


_Seen: TypeAlias = dict[int, tuple[Any, int, Any]]
"""What was looked at, by identity: itself, so that nothing else gets that, how deep it was, and what stands for it."""


def _plain(value: Any, seen: _Seen, depth: int = 0) -> Any:
    """Return what stands for an argument in a key: a value that no other argument has."""
    if type(value) in _PLAIN:
        return value
    if depth > DEPTH_MAX:
        raise Misuse(f"it is nested over {DEPTH_MAX} deep")
    before = seen.get(id(value))
    if before is not None and depth <= before[1]:
        return before[2]
    found = _one(value)
    if found is None:
        found = _bounded(_several(value, seen, depth + 1))
    seen[id(value)] = value, depth, found
    return found


def _one(value: Any) -> tuple[Any, ...] | None:
    """Return what stands for something that holds nothing else; `None` if it does."""
    kind = type(value)
    for base, spelled in _SPELLED:
        if isinstance(value, base):
            parts = spelled(value)
            return (None, *parts) if kind is base or base in _TELL_THEIR_CLASS else (None, "of", _class(kind), *parts)
    if isinstance(value, type):
        return (None, "type", _class(value))
    return None


def _several(value: Any, seen: _Seen, depth: int) -> tuple[Any, ...]:
    """Return what stands for something that holds others, before it is bounded."""
    kind = type(value)
    if kind is tuple:
        items = tuple([_plain(item, seen, depth) for item in value])
        return items if items[:1] != (None,) else (None, "tuple", *items)
    holds = _held(value)
    if holds is not None:
        return (None, holds[0], *[_plain(item, seen, depth) for item in holds[1]])
    if kind is dict:
        pairs = sorted(((_plain(k, seen, depth), _plain(v, seen, depth)) for k, v in value.items()), key=_by_key)
        return (None, "dict", *(part for pair in pairs for part in pair))
    if kind is set or kind is frozenset:
        members = sorted(((_plain(member, seen, depth),) for member in value), key=_by_key)
        return (None, kind.__name__, *(member for (member,) in members))
    raise Misuse(f"a {_name_of(kind)} can't be told from another by its value")


def _held(value: Any) -> tuple[str, Iterable[Any]] | None:
    """Return the name and the members of what holds others in an order of its own; `None` if it doesn't."""
    kind = type(value)
    if kind is list:
        return "list", value
    if isinstance(value, tuple):  # with a class of its own, as a NamedTuple's
        return _class(kind), value
    if is_dataclass(kind):
        return _class(kind), [getattr(value, field.name) for field in fields(value)]
    return None


def _bounded(items: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the parts of a container, or what represents them if they are long."""
    encoded = key(*items)
    return _digest("sha256", encoded) if len(encoded) > ARGUMENTS_BYTES_MAX else items


def _digest(what: str, encoded: bytes) -> tuple[Any, ...]:
    return (None, what, hashlib.sha256(encoded).digest())


def _by_key(parts: tuple[Any, ...]) -> bytes:
    return key(parts[0])


def _name_of(kind: type) -> str:
    """Return a class's full name; that of a built-in one has no dot."""
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _class(kind: type) -> str:
    """Return a class's full name. Raises `Misuse` if it isn't found by that: another one could have it, too."""
    if kind.__flags__ & _HEAP_TYPE:
        found: Any = sys.modules.get(kind.__module__)
        for name in kind.__qualname__.split("."):
            found = getattr(found, name, None)
        if found is not kind:
            raise Misuse(f"class {_name_of(kind)} isn't found by its name, so it can't be told from another one")
    return _name_of(kind)


def _enum_parts(value: Enum) -> tuple[Any, ...]:
    # A combination of flags needn't have a name.
    return (_class(type(value)), value.name if value.name is not None else _plain(value.value, {}))


def _zoned(value: datetime | time) -> tuple[Any, ...]:
    """Return what stands for a time: as the clock on the wall has it, which of two such, and the zone."""
    zone, local = value.tzinfo, value.replace(tzinfo=None).isoformat()
    if zone is None:
        return local, value.fold
    if type(zone) is ZoneInfo and zone.key is not None:
        return local, value.fold, "zone", zone.key
    if type(zone) is timezone:
        offset = zone.utcoffset(None)
        return local, value.fold, "offset", offset // timedelta(microseconds=1), zone.tzname(None)
    kind = _name_of(type(zone))
    raise Misuse(f"the zone of a time, a {kind}, can't be told from another: pass times in a ZoneInfo or a timezone")


def _path_parts(value: PurePath) -> tuple[Any, ...]:
    kind = type(value)
    return ("path", kind.__name__ if kind in _PATHS else _class(kind), os.fspath(value))


# What has an exact spelling of its own. A datetime is a date too, and a member of an Enum may be a text.
_SPELLED: tuple[tuple[type, Callable[[Any], tuple[Any, ...]]], ...] = (
    (Enum, _enum_parts),
    (RawKey, lambda value: ("raw key", bytes(value))),
    (Key, lambda value: ("key", bytes(value))),
    (datetime, lambda value: ("datetime", *_zoned(value))),
    (date, lambda value: ("date", value.isoformat())),
    (time, lambda value: ("time", *_zoned(value))),
    (timedelta, lambda value: ("timedelta", value.days, value.seconds, value.microseconds)),
    (Decimal, lambda value: ("decimal", str(value))),
    (Fraction, lambda value: ("fraction", value.numerator, value.denominator)),
    (PurePath, _path_parts),
    (bytearray, lambda value: ("bytearray", bytes(value))),
    (memoryview, lambda value: ("memoryview", value.format, value.shape, value.tobytes())),
    # What derives from these; they themselves are in a key as they are.
    (str, lambda value: (str.__str__(value),)),
    (int, lambda value: (int.__int__(value),)),
    (float, lambda value: (float.__float__(value),)),
    (bytes, lambda value: (bytes.__bytes__(value),)),
    (UUID, lambda value: (UUID(int=value.int),)),
)
_TELL_THEIR_CLASS = (Enum, PurePath)
_PATHS = (PurePosixPath, PureWindowsPath, PosixPath, WindowsPath)
_BY_POSITION = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


# -- what the decorator was given ------------------------------------------------------------------------------


def _signature_of(fn: Callable[..., Any], label: str) -> inspect.Signature:
    try:
        return inspect.signature(fn)
    except (TypeError, ValueError) as error:  # some functions written in C have none
        hint = "Wrap it in a def with the parameters it takes."
        raise Misuse(f"{label} has no signature that tells its parameters", hint=hint) from error


def _names(ignore: Any, signature: inspect.Signature, label: str) -> frozenset[str]:
    if isinstance(ignore, str) or not isinstance(ignore, Collection):
        raise Misuse(f"ignore must be a tuple of names, not {type(ignore).__name__}: pass ignore=('self',)")
    parameters = signature.parameters.values()
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    for name in ignore:
        if not isinstance(name, str) or (name not in signature.parameters and not anything):
            raise Misuse(f"ignore has {name!r:.80}, which is no parameter of {label}")
    return frozenset(ignore)


def _as_version(version: Any, label: str) -> int | str:
    if isinstance(version, bool) or not isinstance(version, int | str):
        raise Misuse(f"version of {label} must be an int or a str, not {type(version).__name__}: pass version=2")
    if len(str(version)) > VERSION_CHARS_MAX:
        raise Misuse(f"version of {label} is too long: at most {VERSION_CHARS_MAX} characters")
    return version
