"""Manifests: what a plugin is called, what it is granted, and how much it may use.

Rules:
  1. A manifest that is there is right: it is checked as it is made, by whichever way, and can't be changed.
  2. What is wrong is `Misuse`, which names the plugin, the field's full path, what came, and what to pass instead.
  3. What isn't known is refused: a misspelled permission would grant nothing, a misspelled limit would limit nothing.
  4. What isn't granted in so many words isn't granted: `null` is no permission.

Doesn't know: what the permissions do, code.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Final, NamedTuple
from unicodedata import category

from persistency.errors import Misuse
from persistency.kvstore import TEXT_BYTES_MAX
from persistency.sweeps import as_bytes

ID_BYTES_MAX: Final = 128
JSON_BYTES_MAX: Final = 1_048_576
KV_BYTES_DEFAULT: Final = 1_048_576
KV_KEYS_DEFAULT: Final = 100_000
MEMORY_BYTES_MIN: Final = 65_536  # a page of WebAssembly
MEMORY_BYTES_MAX: Final = 2**32  # what an i32 can point to
MEMORY_BYTES_DEFAULT: Final = 64 * 1_048_576
TIMEOUT_SECONDS_MAX: Final = 100_000_000  # some three years
_NUMBER_MAX = 2**62
_SHOWN_MAX = 60  # characters of what came, in a message
_FILE_NAME_BYTES_MAX = 180  # for an id within the name of its job's file, where most bytes take three
_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-.")
_SLIPS = {"max_bytes": "max_size", "memory_bytes": "memory", "kv": "kvstore", "permission": "permissions"}


@dataclass(frozen=True, slots=True)
class KVGrant:
    """The permission `kvstore`: a store of the plugin's own.

    `reason`: what for, in the plugin author's words. `max_bytes`: of all its values together, without their keys.
    `max_keys`: how many keys there may be. `max_key_bytes`: of a key, in UTF-8. `prefix`: what every key must begin
    with. `read_only`: the functions that write aren't there. Raises `Misuse`.
    """

    reason: str = ""
    max_bytes: int = KV_BYTES_DEFAULT
    max_keys: int = KV_KEYS_DEFAULT
    max_key_bytes: int = TEXT_BYTES_MAX
    prefix: str = ""
    read_only: bool = False

    def __post_init__(self) -> None:
        _settle(self, _KVSTORE)
        _check_prefix(self.prefix, self.max_key_bytes, "KVGrant.")


@dataclass(frozen=True, slots=True)
class WasiGrant:
    """The permission `wasi`: a clock, randomness, and output into the host's log. Raises `Misuse`.

    `reason`: what for, in the plugin author's words.
    """

    reason: str = ""

    def __post_init__(self) -> None:
        _settle(self, _WASI)


@dataclass(frozen=True, slots=True)
class Limits:
    """What one call may use. Raises `Misuse`.

    `memory_bytes`: of the guest's memory. `fuel`: about as many instructions; `None`: they aren't counted. `timeout`:
    seconds, from the call to its answer; `None`: as the host says, which no manifest can lengthen.
    """

    memory_bytes: int = MEMORY_BYTES_DEFAULT
    fuel: int | None = None
    timeout: float | None = None

    def __post_init__(self) -> None:
        _settle(self, _LIMITS)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A plugin's manifest: its `id`, its permissions (`None`: not granted) and its `limits`. Raises `Misuse`.

    An id has 1 to 128 bytes of UTF-8, no slash, backslash or control character, no space at its ends and no dot at its
    last; `"."` and `".."` are none.
    """

    id: str
    kvstore: KVGrant | None = None
    wasi: WasiGrant | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", _as_id(self.id, "manifest: id"))
        granted: dict[str, type] = {"kvstore": KVGrant, "wasi": WasiGrant, "limits": Limits}
        for name, kind in granted.items():
            value = getattr(self, name)
            if not isinstance(value, kind) and (value is not None or name == "limits"):
                raise Misuse(
                    f"plugin {self.id!r}: {name} must be a {kind.__name__}, not {_shown(value)}: "
                    f"pass {kind.__name__}(), or the whole as a mapping to Manifest.of"
                )
        size = sum(1 if byte in _PLAIN else 3 for byte in self.id.encode())
        if self.kvstore is not None and size > _FILE_NAME_BYTES_MAX:
            raise Misuse(
                f"plugin {self.id!r}: id would take {size} bytes in the name of its store's file, at most "
                f"{_FILE_NAME_BYTES_MAX} are allowed (every byte outside [a-z0-9_.-] takes three): pass a shorter id"
            )

    @classmethod
    def of(cls, value: Manifest | Mapping[str, Any] | str | os.PathLike[str]) -> Manifest:
        """Return the manifest that a mapping, a JSON text, or the JSON file at a path is; one that is one, as it is.

            {"id": "weather",
             "permissions": {"kvstore": {"reason": "forecasts", "max_size": "1MB", "max_keys": 100000,
                                         "max_key_bytes": 256, "prefix": "w:", "read_only": false},
                             "wasi": {"reason": "the time"}},
             "limits": {"memory": "16MB", "fuel": 1000000, "timeout": 5}}

        Everything but `id` may be left out. Sizes are bytes, or texts like `"1MB"` (10**6) and `"1MiB"` (2**20);
        empty or `null`, they are the default. Raises `Misuse`.
        """
        if isinstance(value, Manifest):
            return value
        if isinstance(value, os.PathLike):
            value = _of_json(_read(value), f"manifest {os.fspath(value)!r}")
        elif isinstance(value, str):
            value = _of_json(value, "manifest")
        if not isinstance(value, Mapping):
            raise Misuse(
                f"manifest must be a Manifest, a mapping, a JSON text or the Path of a JSON file, not {_shown(value)}: "
                'pass {"id": ...}'
            )
        if "id" not in value:
            raise Misuse(f'manifest: id is missing, there is {_listed(value)}: pass {{"id": "weather", ...}}')
        plugin = f"plugin {_as_id(value['id'], 'manifest: id')!r}: "
        _check_names(value, ("id", "permissions", "limits"), plugin, "")
        granted = value.get("permissions", {})
        _check_names(granted, ("kvstore", "wasi"), plugin, "permissions")
        made: dict[str, Any] = {"id": value["id"]}
        if "kvstore" in granted:
            found = _checked(granted["kvstore"], _KVSTORE, plugin, "permissions.kvstore")
            _check_prefix(found.get("prefix", ""), found.get("max_key_bytes"), f"{plugin}permissions.kvstore.")
            made["kvstore"] = KVGrant(**found)
        if "wasi" in granted:
            made["wasi"] = WasiGrant(**_checked(granted["wasi"], _WASI, plugin, "permissions.wasi"))
        made["limits"] = Limits(**_checked(value.get("limits", {}), _LIMITS, plugin, "limits"))
        return cls(**made)


# -- where it comes from ---------------------------------------------------------------------------------------------


class _Object(dict[str, Any]):
    """An object of a JSON text, which knows the first name that is in it twice."""

    twice: str | None = None


def _object(pairs: list[tuple[str, Any]]) -> _Object:
    made = _Object()
    for name, value in pairs:
        if name in made and made.twice is None:
            made.twice = name
        made[name] = value
    return made


def _of_json(text: str, what: str) -> Any:
    if len(text) > JSON_BYTES_MAX:
        raise Misuse(f"{what} has {len(text)} characters, at most {JSON_BYTES_MAX} are allowed: pass a shorter text")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        instead = 'a text like \'{"id": "weather"}\', or the Path of a file'
        raise Misuse(f"{what} is no JSON: {error}, in {_shown(text)}: pass {instead}") from error
    if not isinstance(value, _Object):
        raise Misuse(f'{what} must be a JSON object, not {_shown(value)}: pass {{"id": ...}}')
    return value


def _read(path: os.PathLike[str]) -> str:
    what = f"manifest {os.fspath(path)!r}"
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe isn't waited for
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise Misuse(f"{what} is no regular file: pass the path of a JSON file")
            data = file.read(JSON_BYTES_MAX + 1)
        text = data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, Misuse):
            raise
        raise Misuse(f"{what} can't be read: {error}: pass the path of a JSON file in UTF-8") from error
    return text


# -- what may be in it -----------------------------------------------------------------------------------------------


class _Field(NamedTuple):
    """A field: its name in a mapping, the attribute it becomes, and its check, which is told the path of the field.

    `check_size`: that of a size in a mapping, where it may be a text.
    """

    name: str
    attribute: str
    check: Callable[[Any, str], Any]
    check_size: Callable[[Any, str], Any] | None = None


def _as_text(value: Any, path: str) -> str:
    if not isinstance(value, str):
        raise Misuse(f"{path} must be text, not {_shown(value)}: pass a str")
    try:
        str.encode(value)
    except UnicodeEncodeError as error:
        raise Misuse(f"{path} {_shown(value)} holds a lone surrogate: pass text that UTF-8 can hold") from error
    return str(value)


def _as_id(value: Any, path: str) -> str:
    text = _as_text(value, path)
    wrong = ""
    if not 1 <= len(text.encode()) <= ID_BYTES_MAX:
        wrong = f"must have 1 to {ID_BYTES_MAX} bytes of UTF-8, not {len(text.encode())}"
    elif text in (".", ".."):
        wrong = "must not be the name of a directory"
    elif "/" in text or "\\" in text:
        wrong = "must not have a slash or backslash"
    elif any(category(character) in ("Cc", "Zl", "Zp") for character in text):
        wrong = "must not have control characters or line breaks"
    elif text != text.strip() or text.endswith("."):
        wrong = "must not begin or end with a space, or end with a dot"
    if wrong:
        raise Misuse(f"{path} {wrong}: it is {_shown(value)}: pass a name like 'weather'")
    return text


def _count(least: int, most: int, instead: str, *, optional: bool = False) -> Callable[[Any, str], int | None]:
    """Return the check of a whole number."""

    def check(value: Any, path: str) -> int | None:
        if value is None and optional:
            return None
        if not isinstance(value, int) or isinstance(value, bool):
            raise Misuse(f"{path} must be a whole number, not {_shown(value)}: pass {instead}")
        if not least <= value <= most:
            raise Misuse(f"{path} must be {least} to {most}, not {_shown(value)}: pass {instead}")
        return int(value)

    return check


def _as_flag(value: Any, path: str) -> bool:
    if not isinstance(value, bool):
        raise Misuse(f"{path} must be true or false, not {_shown(value)}: pass one of them")
    return value


def _as_timeout(value: Any, path: str) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise Misuse(f"{path} must be a number of seconds, not {_shown(value)}: pass one like 5 or 0.5")
    if not 0 < value <= TIMEOUT_SECONDS_MAX:  # NaN too
        raise Misuse(
            f"{path} must be more than 0 and at most {TIMEOUT_SECONDS_MAX} seconds, not {_shown(value)}: "
            "pass one like 5, or leave it out"
        )
    return float(value)


def _size(name: str, attribute: str, least: int, most: int, example: int) -> _Field:
    """Return the field of a size: a number of bytes, or in a mapping a text too."""
    millions = example // 1_000_000
    check_number = _count(least, most, f'a size like {example}, "{millions}MB" or "{millions}MiB"')

    def check(value: Any, path: str) -> int | None:
        if isinstance(value, str):
            try:
                value = as_bytes(value, path)
            except ValueError as error:  # `Misuse` too: a number of thousands of digits is none that Python reads
                text = f'{path} must be a size, not {_shown(value)}: pass one like 1000000, "1MB" or "1MiB"'
                raise Misuse(text) from error
        return check_number(value, path)

    return _Field(name, attribute, _count(least, most, f"a number of bytes like {example}"), check)


_KVSTORE = (
    _Field("reason", "reason", _as_text),
    # 0 would be no store to one reader, and one without a limit to another.
    _size("max_size", "max_bytes", 1, _NUMBER_MAX, 1_000_000),
    _Field("max_keys", "max_keys", _count(1, _NUMBER_MAX, f"one like {KV_KEYS_DEFAULT}")),
    _Field("max_key_bytes", "max_key_bytes", _count(1, TEXT_BYTES_MAX, f"one like {TEXT_BYTES_MAX}")),
    _Field("prefix", "prefix", _as_text),
    _Field("read_only", "read_only", _as_flag),
)
_WASI = (_Field("reason", "reason", _as_text),)
_LIMITS = (
    _size("memory", "memory_bytes", MEMORY_BYTES_MIN, MEMORY_BYTES_MAX, 16_000_000),
    _Field("fuel", "fuel", _count(1, _NUMBER_MAX, "one like 1000000, or leave it out", optional=True)),
    _Field("timeout", "timeout", _as_timeout),
)


def _settle(made: Any, fields: Sequence[_Field]) -> None:
    """Check what a dataclass was made of, and make plain values of it."""
    kind = type(made).__name__
    for each in fields:
        object.__setattr__(made, each.attribute, each.check(getattr(made, each.attribute), f"{kind}.{each.attribute}"))


def _checked(given: Any, fields: Sequence[_Field], plugin: str, path: str) -> dict[str, Any]:
    """Return the attributes that an object of a manifest sets, each one checked."""
    _check_names(given, [each.name for each in fields], plugin, path)
    found: dict[str, Any] = {}
    for each in fields:
        if each.name not in given:
            continue
        value, where = given[each.name], f"{plugin}{path}.{each.name}"
        if each.check_size is not None and value in (None, ""):
            continue  # it says nothing: the default
        found[each.attribute] = (each.check_size or each.check)(value, where)
    return found


def _check_prefix(prefix: str, key_bytes_max: int | None, path: str) -> None:
    """Raise `Misuse` for a prefix that no key has room for."""
    size, most = len(prefix.encode()), TEXT_BYTES_MAX if key_bytes_max is None else key_bytes_max
    if size > most:
        raise Misuse(f"{path}prefix has {size} bytes, and a key at most {most}: pass a shorter one")


def _check_names(given: Any, known: Sequence[str], plugin: str, path: str) -> None:
    """Raise `Misuse` for what isn't a mapping, or has a field that nobody knows, or one twice."""
    if not isinstance(given, Mapping):
        raise Misuse(f"{plugin}{path} must be an object, not {_shown(given)}: pass {{}} or leave it out")
    dotted = f"{path}." if path else ""
    if isinstance(given, _Object) and given.twice is not None:
        raise Misuse(f"{plugin}{dotted}{_name(given.twice)} is there twice: pass it once")
    for name in given:
        if name not in known:
            near = [_SLIPS[name]] if name in _SLIPS else get_close_matches(str(name)[:80].lower(), known, 1)
            meant = f" (did you mean {near[0]!r}?)" if near and near[0] in known else ""
            what = "permission" if path == "permissions" else "field"
            raise Misuse(f"{plugin}{dotted}{_name(name)} is no {what} of a manifest{meant}: pass {' or '.join(known)}")


def _name(name: Any) -> str:
    """Return the name of a field as it is, if that is one to be read."""
    return name if isinstance(name, str) and name.isidentifier() and len(name) <= 40 else _shown(name)


def _listed(given: Mapping[Any, Any]) -> str:
    names = ", ".join(_name(name) for _, name in zip(range(5), given, strict=False))
    return names or "nothing"


def _shown(value: Any) -> str:
    """Return what somebody has passed in a few characters."""
    try:
        text = repr(value)
    except Exception:  # nested too deeply, a number of too many digits, an object that can't say what it is
        return f"{type(value).__name__} (it can't be shown)"
    return text if len(text) <= _SHOWN_MAX else f"{text[: _SHOWN_MAX - 3]}..."
