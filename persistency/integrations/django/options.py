"""Options: what stands in `CACHES`, checked, so that a mistake is told when the cache is made and not when it is used.

Rules:
  1. Whatever is wrong is `ImproperlyConfigured`, with the name of the option and what it has to be.
  2. An option that isn't known is wrong, too.
  3. Nothing is opened or made.

Doesn't know: what the options do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from math import isfinite
from os import PathLike, fspath
from typing import Any, Final, NamedTuple, NoReturn

from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from persistency import Misuse, Persistency

MEMORY: Final = ":memory:"
_KNOWN: Final = (
    "JOB",
    "SHARED",
    "PICKLE",
    "KEEP",
    "WAIT",
    "MAX_ENTRIES",
    "CULL_FREQUENCY",
    "MAX_BYTES",
    "DURABILITY",
    "CLOCK",
)


class Settings(NamedTuple):
    """How one job is opened. `keep` and `wait` are in seconds; `clock` is like `time.time`."""

    root: str
    job_id: str
    shared: bool
    keep: float
    wait: float
    max_bytes: int | None
    durability: str
    clock: Callable[[], float] | None

    @property
    def place(self) -> tuple[str, str]:
        """Which job it is."""
        return self.root, self.job_id

    def differing(self, other: Settings) -> list[str]:
        """Return the names of the options in which two settings of one job differ."""
        pairs = zip(self._fields, self, other, strict=True)
        return sorted(name.upper() for name, mine, theirs in pairs if mine != theirs)


def checked(location: Any, options: Any) -> tuple[Settings, bool]:
    """Return how to open the job, and whether pickles are allowed. Raises `ImproperlyConfigured`."""
    if not isinstance(options, Mapping):
        raise ImproperlyConfigured(f"OPTIONS must be a dict, not {type(options).__name__}")
    unknown = sorted(str(name) for name in options if name not in _KNOWN)
    if unknown:
        raise ImproperlyConfigured(f"OPTIONS has no {unknown[0]!r}; there are {', '.join(_KNOWN)}")
    root = _root(location)
    job_id = options.get("JOB", "cache")
    if not isinstance(job_id, str) or not job_id:
        _refuse("JOB", "the id of a job, such as 'cache'", job_id)
    shared = _flag(options, "SHARED", default=root != MEMORY)
    if shared and root == MEMORY:
        raise ImproperlyConfigured(f"a cache in {MEMORY!r} is of one process alone: leave out SHARED")
    _count(options, "MAX_ENTRIES", 1, optional=True)
    _count(options, "CULL_FREQUENCY", 0, optional=False)
    _check_place(root, job_id)
    settings = Settings(
        root,
        job_id,
        shared,
        _seconds(options, "KEEP", 0.003),
        _seconds(options, "WAIT", 60.0),
        _count(options, "MAX_BYTES", 1, optional=True),
        _durability(options),
        _clock(options),
    )
    return settings, _flag(options, "PICKLE", default=True)


def _root(location: Any) -> str:
    if not isinstance(location, str | PathLike) or not isinstance(fspath(location), str) or not fspath(location):
        _refuse("LOCATION", "a directory, or ':memory:'", location)
    path: str = fspath(location)
    if "://" in path or "\0" in path:  # the address of a server, from the settings of another backend
        _refuse("LOCATION", "a directory, or ':memory:'", location)
    return path if path == MEMORY else os.path.realpath(path)


@lru_cache(maxsize=64)
def _check_place(root: str, job_id: str) -> None:
    """Ask the engine whether it can have a root and a job of these names; it makes neither."""
    try:
        with Persistency(root) as persistency:
            persistency.has_job(job_id)
    except (Misuse, UnicodeError) as error:
        raise ImproperlyConfigured(f"a cache in LOCATION {root!r} with JOB {job_id!r} can't be: {error}") from error


def _flag(options: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = options.get(name, default)
    if not isinstance(value, bool):
        _refuse(name, "True or False", value)
    return value


def _count(options: Mapping[str, Any], name: str, least: int, *, optional: bool) -> int | None:
    value = options.get(name)
    if value is None and (optional or name not in options):
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        _refuse(name, f"an int of at least {least}{', or None' if optional else ''}", value)
    return value


def _seconds(options: Mapping[str, Any], name: str, default: float) -> float:
    value = options.get(name, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < float("inf"):
        _refuse(name, "a number of seconds, 0 or more", value)
    return float(value)


def _durability(options: Mapping[str, Any]) -> str:
    value = options.get("DURABILITY", "process")
    if value not in ("process", "power"):
        _refuse("DURABILITY", "'process' or 'power'", value)
    return str(value)


def _clock(options: Mapping[str, Any]) -> Callable[[], float] | None:
    value = options.get("CLOCK")
    if isinstance(value, str):
        try:
            value = import_string(value)
        except ImportError as error:
            raise ImproperlyConfigured(f"CLOCK can't be imported: {error}") from error
    if value is not None and not callable(value):
        _refuse("CLOCK", "a function like time.time, or its dotted path", value)
    if value is not None:
        _check_clock(value)
    found: Any = value
    return found  # type: ignore[no-any-return]  # the engine looks at what it returns


def _check_clock(clock: Callable[[], Any]) -> None:
    try:
        seconds = clock()
    except Exception as error:
        raise ImproperlyConfigured(f"CLOCK can't be read: {type(error).__name__}: {error}") from error
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not isfinite(seconds):
        _refuse("CLOCK", "a function like time.time, which returns seconds", seconds)


def _refuse(name: str, wanted: str, found: Any) -> NoReturn:
    raise ImproperlyConfigured(f"{name} must be {wanted}, not {found!r:.80}")
