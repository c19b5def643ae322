"""Typed keys: the text that a person types for a key, the key it stands for, and back.

    games/0ad               ("games", "0ad")
    users/ada/7             ("users", "ada", 7)     a part of digits, with a minus or not, is a number
    '["users","ada","7"]'   ("users", "ada", "7")   a JSON array says it exactly

Rules:
  1. Text that begins with `[` is a JSON array of the parts; a nested array is a nested tuple. What JSON has no word
     for is an object with one member, in both directions: {"base64": ...}, {"uuid": ...}, {"datetime": ...},
     {"float": "nan"}. Text that begins with `{` is such an object for a whole key in an encoding of its own.
  2. Other text is split at each slash. Only the usual spelling of a number is one: 007 is a text. No part is empty,
     but one slash at the end is allowed, as it is for a folder.
  3. `format_key` gives the shortest text that `parse_key` reads as the same key.

Doesn't know: jobs, the terminal.
"""

from __future__ import annotations

import json
import re
from base64 import b64decode, b64encode
from collections.abc import Callable
from datetime import datetime
from typing import Any
from uuid import UUID

from persistency import Key, Misuse, RawKey, key

_NUMBER = re.compile(r"0|-?[1-9][0-9]*")
_READERS: dict[str, Callable[[str], Any]] = {
    "base64": lambda text: b64decode(text, validate=True),
    "uuid": UUID,
    "datetime": datetime.fromisoformat,
    "float": float,
}


def parse_key(text: str) -> Key:
    """Return the key that a person typed. Raises `ValueError` with what is wrong."""
    if text[:1] in ("[", "{"):
        return key_from_json(_loads(text))
    parts = text.removesuffix("/").split("/")
    if "" in parts:
        raise ValueError(f'{text!r} has an empty part; a JSON array says it exactly, like \'["users", ""]\'')
    try:
        return key(*(int(part) if _NUMBER.fullmatch(part) else part for part in parts))
    except Misuse as error:
        raise ValueError(str(error)) from error


def as_texts(text: str) -> Key | None:
    """Return the key that was typed with its numbers taken for text, or `None` if that makes no difference."""
    if text[:1] in ("[", "{"):
        return None
    other = key(*text.removesuffix("/").split("/"))
    return other if other != parse_key(text) else None


def format_key(value: Key) -> str:
    """Return the text to type for a key."""
    try:
        parts = value.parts
    except Misuse:
        parts = ()
    if parts and all(type(part) in (str, int) for part in parts):
        text = "/".join(map(str, parts))
        if text.isprintable():
            try:
                if parse_key(text) == value:
                    return text
            except ValueError:
                pass  # an empty part, or a text that looks like JSON
    return json.dumps(key_to_json(value), ensure_ascii=False)


def key_to_json(value: Key) -> Any:
    """Return a key as JSON data: the list of its parts; one in an encoding of its own as {"base64": ...}."""
    try:
        return [_part_to_json(part) for part in value.parts]
    except Misuse:
        return {"base64": b64encode(value).decode()}


def key_from_json(data: Any) -> Key:
    """Return the key of JSON data. Raises `ValueError` with what is wrong."""
    try:
        if isinstance(data, dict):
            if list(data) != ["base64"]:
                raise ValueError('a key that isn\'t a JSON array must be {"base64": ...}')
            return RawKey(_part_from_json(data))
        if not isinstance(data, list):
            raise ValueError('a key must be a JSON array of its parts, like ["users", "ada", 7]')
        return key(*map(_part_from_json, data))
    except Misuse as error:
        raise ValueError(str(error)) from error


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{text!r} isn't JSON: {error}") from error


def _part_to_json(part: Any) -> Any:
    match part:
        case tuple():
            return [_part_to_json(inner) for inner in part]
        case bytes():
            return {"base64": b64encode(part).decode()}
        case UUID():
            return {"uuid": str(part)}
        case datetime():
            return {"datetime": part.isoformat()}
        case float() if part - part != 0:
            return {"float": str(part)}
    return part


def _part_from_json(part: Any) -> Any:
    if isinstance(part, list):
        return tuple(map(_part_from_json, part))
    if not isinstance(part, dict):
        return part
    [(name, text)] = part.items() if len(part) == 1 else [("", "")]
    reader = _READERS.get(name)
    if reader is None or not isinstance(text, str):
        raise ValueError(f"a part can't be {json.dumps(part)}; {', '.join(_READERS)} are known")
    return reader(text)
