"""Arguments: what a caller may pass, checked once, in the caller's own thread.

Rules:
  1. What is wrong raises `Misuse` at the call, with a message that names the argument, what came, and what to pass
     instead; nothing was done then.
  2. What the caller could still change (a bytearray, a memoryview) is copied here.
  3. The right types cost next to nothing: names of categories are remembered, exact `bytes` pass as they are.

Doesn't know: mailboxes, threads, SQL.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from datetime import timedelta
from os import PathLike, fspath
from pathlib import Path
from types import FunctionType
from typing import Any

from persistency.codec.keys import KEY_BYTES_MAX, Key, KeyRange, as_key, pack
from persistency.errors import Misuse
from persistency.storage.port import PAYLOAD_BYTES_MAX

CATEGORY_BYTES_MAX = 255
TTL_SECONDS_MAX = 10_000_000_000  # some 317 years; nobody who means to set an end sets one beyond
_NAMES_KEPT = 4_096
_UNDONE = 0x20 | 0x80 | 0x200  # what `inspect` calls CO_GENERATOR, CO_COROUTINE and CO_ASYNC_GENERATOR


class _Categories(dict[str, bytes]):
    """The encoded names seen so far, so that a name costs one look-up; forgotten when there are too many."""

    def __missing__(self, name: str) -> bytes:
        if not isinstance(name, str):
            raise Misuse(f"category must be a str, not {type(name).__name__}: pass a name like 'messages'")
        try:
            encoded = name.encode()
        except UnicodeEncodeError as error:
            raise Misuse(f"category {name!r} holds a lone surrogate: pass text that UTF-8 can hold") from error
        if not 1 <= len(encoded) <= CATEGORY_BYTES_MAX:
            raise Misuse(
                f"category must have 1 to {CATEGORY_BYTES_MAX} UTF-8 bytes, not {len(encoded)}: "
                "pass a name like 'messages'"
            )
        if len(self) >= _NAMES_KEPT:
            self.clear()
        self[str(name)] = encoded
        return encoded


CATEGORIES = _Categories()


def shown(value: Any) -> str:
    """Return what somebody has passed in a few characters."""
    try:
        return f"{value!r:.40}"
    except ValueError:  # Python prints no int of more than 4,300 digits
        return "a number of thousands of digits"


def as_category(value: str) -> bytes:
    """Return the bytes of a category's name."""
    try:
        return CATEGORIES[value]
    except TypeError as error:  # it can't even be hashed
        if isinstance(error, Misuse):
            raise
        raise Misuse(f"category must be a str, not {type(value).__name__}: pass a name like 'messages'") from error


def as_key_bytes(value: Key | tuple[Any, ...]) -> bytes:
    """Return a key's bytes, a tuple's without making a `Key` of them: what waits in a mailbox is nothing to the
    garbage collector then, which walks over every object of a class made in Python.
    """
    if isinstance(value, tuple):
        try:
            data = pack(value)
        except Misuse:
            return as_key(value)  # raises it again, with the argument's name
        if len(data) <= KEY_BYTES_MAX:
            return data
    return as_key(value)


def as_payload(value: Any, argument: str = "payload") -> bytes:
    """Return a payload as bytes of its own."""
    if type(value) is not bytes:
        try:
            with memoryview(value) as view:
                value = bytes(view)
        except (TypeError, ValueError, BufferError) as error:  # not bytes-like, or a view that was released already
            instead = "encode it, as in text.encode()" if isinstance(value, str) else "encode it to bytes first"
            raise Misuse(f"{argument} must be bytes-like, not {type(value).__name__}: {instead}") from error
    if len(value) > PAYLOAD_BYTES_MAX:
        raise Misuse(f"{argument} has {len(value)} bytes, at most {PAYLOAD_BYTES_MAX} are allowed: store it in parts")
    return value  # type: ignore[no-any-return]  # exact bytes by now


def as_bounds(value: KeyRange, argument: str = "key_range") -> tuple[bytes, bytes | None]:
    """Return a range's start (empty: from the first key) and its stop (`None`: to the last)."""
    if not isinstance(value, KeyRange):
        raise Misuse(
            f"{argument} must be a KeyRange, not {type(value).__name__}: "
            "pass KeyRange(start, stop) or KeyRange.prefix(key)"
        )
    return (b"" if value.start is None else value.start), value.stop


def as_doomed_range(value: KeyRange) -> tuple[bytes, bytes | None]:
    """Return a range that is to be deleted; one without any bound is refused."""
    start, stop = as_bounds(value)
    if not start and stop is None:
        raise Misuse("key_range is unbounded, which would delete the whole category: give it a start or a stop")
    return start, stop


def as_doomed_prefix(value: Key | tuple[Any, ...]) -> tuple[bytes, bytes | None]:
    """Return the range of a prefix that is to be deleted; an empty one is refused."""
    prefix = as_key(value, "prefix")
    if not prefix:
        raise Misuse("prefix is empty, which would delete the whole category: pass at least one part")
    return as_bounds(KeyRange.prefix(prefix))


def as_prefix_range(value: Key | tuple[Any, ...]) -> tuple[bytes, bytes | None]:
    """Return the range of a prefix."""
    return as_bounds(KeyRange.prefix(as_key(value, "prefix")))


def as_keys(values: Iterable[Key | tuple[Any, ...]]) -> tuple[Key, ...]:
    """Return several keys, each once, in the order asked."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise Misuse(f"keys must be a list (or another iterable) of keys, not {type(values).__name__}: pass [key, ...]")
    return tuple(dict.fromkeys(as_key(value, "each of keys") for value in values))


def as_count(value: Any, argument: str, least: int) -> int:
    """Return a whole number that is at least `least`."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise Misuse(f"{argument} must be an int, not {type(value).__name__}: pass {least} or more")
    if value < least:
        raise Misuse(f"{argument} must be at least {least}, not {shown(value)}: pass {least} or more")
    return min(int(value), 2**62)  # more than there can be of anything, and still a number for every engine


def as_limit(value: Any, argument: str = "limit") -> int | None:
    """Return how many rows at the most; `None`: all of them."""
    return None if value is None else as_count(value, argument, 0)


def as_flag(value: Any, argument: str) -> bool:
    """Return a truth value; only a bool is one."""
    if not isinstance(value, bool):
        raise Misuse(f"{argument} must be a bool, not {type(value).__name__} ({shown(value)}): pass True or False")
    return value


def as_seconds(value: Any, argument: str, *, optional: bool = True) -> float | None:
    """Return a waiting time in seconds; `None`, where it is allowed, for as long as it takes."""
    if value is None and optional:
        return None
    if not isinstance(value, int | float) or isinstance(value, bool):
        instead = "a number of seconds" + (", or None for no limit" if optional else "")
        raise Misuse(f"{argument} must be a number, not {type(value).__name__}: pass {instead}")
    if not value >= 0:  # NaN too
        raise Misuse(f"{argument} must be 0 or more seconds, not {shown(value)}")
    return float(min(value, 1e8))  # longer than a lock can be told to wait


def as_choice(value: Any, argument: str, choices: tuple[str, ...]) -> Any:
    """Return one of a few words."""
    if value not in choices:
        raise Misuse(f"{argument} must be one of {', '.join(map(repr, choices))}, not {shown(value)}")
    return value


def as_file(value: Any, argument: str) -> Path:
    """Return the absolute path of a file to be."""
    if not isinstance(value, str | PathLike) or not isinstance(fspath(value), str):
        raise Misuse(f"{argument} must be a path, not {type(value).__name__}: pass the path of a file")
    if not fspath(value) or "\0" in fspath(value):
        raise Misuse(f"{argument} is no path: {shown(value)}: pass the path of a file")
    return Path(value).absolute()


def as_progress(value: Any) -> Any:
    """Return what is told of progress, or `None`."""
    if value is not None and not callable(value):
        raise Misuse(f"progress must be callable, not {type(value).__name__}: pass f(done, total)")
    return value


def as_ttl_ms(value: Any, argument: str = "ttl") -> int:
    """Return how long something lives, in whole milliseconds, at least one; given as seconds or a `timedelta`."""
    if type(value) is int and 0 < value <= TTL_SECONDS_MAX:
        return value * 1000
    if isinstance(value, timedelta):
        seconds: float = value.total_seconds()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = value
    else:
        raise Misuse(f"{argument} must be seconds or a timedelta, not {type(value).__name__}: pass {argument}=60.0")
    if not 0 < seconds <= TTL_SECONDS_MAX:  # NaN too
        raise Misuse(
            f"{argument} must be more than 0 and at most {TTL_SECONDS_MAX:,} seconds, not {shown(value)}: "
            "leave it out for what shall not end"
        )
    return max(1, round(seconds * 1000))


def as_end(ttl: Any, now_ms: Callable[[], int]) -> int | None:
    """Return the Unix time in milliseconds at which what lives so long from now ends; `None`: never."""
    return None if ttl is None else now_ms() + as_ttl_ms(ttl)


def as_swapped(value: Any, argument: str) -> bytes | None:
    """Return a payload that is expected, or put in its place; `None`: no row."""
    return None if value is None else as_payload(value, argument)


def as_function(value: Any) -> Callable[..., Any]:
    """Return a function to be run inside the actor; one that doesn't do its work when it is called is refused."""
    if not callable(value):
        raise Misuse(f"fn must be callable, not {type(value).__name__}: pass a function of the transaction")
    if type(value) is FunctionType and not (value.__code__.co_flags & _UNDONE or value.__dict__):
        return value  # the usual one; what is marked, or wraps another one, has a dict with something in it
    import inspect  # only here: it takes as long to import as a fifth of this package

    call = value
    while isinstance(call, functools.partial):
        call = call.func
    for bad in (call, getattr(call, "__call__", None)):  # noqa: B004  # the method itself is looked at
        if inspect.iscoroutinefunction(bad) or inspect.isasyncgenfunction(bad):
            raise Misuse(
                "fn is a coroutine function: pass a plain def",
                hint="It runs inside the actor, where nothing is awaited; the transaction answers directly.",
            )
        if inspect.isgeneratorfunction(bad):
            raise Misuse("fn is a generator function: pass a plain def that returns its answer")
    return value  # type: ignore[no-any-return]  # callable by now
