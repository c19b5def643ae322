"""What `memoize` is given, checked at the call.

Rules:
  1. What is wrong is `Misuse`, and says what to pass instead.
  2. A runner may be given later: as a function that is asked for it at each call.
  3. Two functions have no results in common unnoticed. A function that was defined anew is the same one, and a plain
     and a coroutine function may share a name, as two forms of one thing.

Doesn't know: functions, but for their names and whether they can be called; what any of it is for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from random import random as default_random
from typing import Any, Self, TypeAlias
from weakref import WeakKeyDictionary, WeakValueDictionary

from persistency import Codec, Key, Misuse
from persistency.recipes.runner import Runner, as_runner

NAME_BYTES_MAX = 255
SECONDS_MAX = 10_000_000_000
LEASE_SECONDS_MIN = 0.01
HOW = "Write @memoize(job) above the def, and @classmethod or @staticmethod above that."


@dataclass(frozen=True, slots=True)
class Options:
    """What `memoize` was given."""

    runner: Callable[[], Runner]
    name: str | None
    ttl: float | None
    version: int | str
    ignore: Collection[str]
    chosen: Callable[..., Any] | None
    codec: Codec[Any]
    early: float
    lease: float
    random: Callable[[], float]

    @classmethod
    def checked(
        cls,
        *,
        runner: Any,
        name: Any,
        ttl: Any,
        version: Any,
        ignore: Any,
        chosen: Any,
        codec: Any,
        early: Any,
        lease: Any,
        random: Callable[[], float] | None,
    ) -> Self:
        """Return the options, or raise `Misuse`; what depends on the function is checked when there is one."""
        if chosen is not None and not callable(chosen):
            raise Misuse(f"key must be callable, not {type(chosen).__name__}: pass a function of the arguments")
        if not all(callable(getattr(codec, function, None)) for function in ("encode", "decode")):
            raise Misuse(f"codec must be a codec, not {codec!r:.80}: pass CBOR, RAW or typed(cls)")
        if isinstance(early, bool) or not isinstance(early, int | float) or not 0 <= early < float("inf"):
            raise Misuse(f"early must be 0 or more, not {early!r:.40}: pass 1.0, or 0 to wait for a result's end")
        if early and ttl is None:
            raise Misuse("early is given without a ttl: what doesn't end isn't computed before its end")
        if random is not None and not callable(random):
            raise Misuse(f"random must be callable, not {type(random).__name__}: pass one like random.random")
        return cls(
            runner=_as_source(runner),
            name=None if name is None else _as_name(name),
            ttl=None if ttl is None else _as_seconds(ttl, "ttl"),
            version=version,
            ignore=ignore,
            chosen=chosen,
            codec=codec,
            early=early,
            lease=_as_seconds(lease, "lease", LEASE_SECONDS_MIN),
            random=default_random if random is None else random,
        )


def name_of(fn: Any) -> str:
    """Return a function's full name. Raises `Misuse` if it has none of its own."""
    name = getattr(fn, "__qualname__", None)
    if not isinstance(name, str) or "<lambda>" in name:
        raise Misuse(f"a {type(fn).__name__} without a name of its own needs one: pass memoize(runner, 'name')")
    return _as_name(f"{fn.__module__}.{name}")


def _as_source(runner: Any) -> Callable[[], Runner]:
    """Return what gives the runner at each call."""
    if callable(runner) and not isinstance(getattr(runner, "id", None), str):
        if not _gives_something(runner):
            hint = f"{HOW} Where there is no job yet, pass a function without parameters that gives it."
            raise Misuse(f"memoize takes a runner, not {name_or_kind(runner)}", hint=hint)
        return lambda: as_runner(runner())
    return partial(_same, as_runner(runner))


def _gives_something(call: Callable[..., Any]) -> bool:
    """Say whether it can be called as it is, and gives its answer then."""
    if inspect.iscoroutinefunction(call):
        return False
    try:
        inspect.signature(call).bind()
    except TypeError:
        return False
    except ValueError:  # some functions written in C don't tell
        return True
    return True


def name_or_kind(value: Any) -> str:
    """Return what errors call something that was given in a wrong place."""
    return getattr(value, "__qualname__", None) or type(value).__name__


def _same(runner: Runner) -> Runner:
    return runner


def _as_name(name: Any) -> str:
    if not isinstance(name, str):
        raise Misuse(f"name must be a str, not {type(name).__name__}: pass a name like 'weather'")
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise Misuse(f"name {name!r:.80} holds a lone surrogate: pass text that UTF-8 can hold") from error
    if not 1 <= size <= NAME_BYTES_MAX:
        raise Misuse(f"name must have 1 to {NAME_BYTES_MAX} UTF-8 bytes, not {size}: pass a name like 'weather'")
    return name


def _as_seconds(value: Any, argument: str, least: float = 0.0) -> float:
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise Misuse(f"{argument} must be seconds or a timedelta, not {type(value).__name__}: pass {argument}=60.0")
    if not 0 < seconds <= SECONDS_MAX:
        raise Misuse(f"{argument} must be more than 0 and at most {SECONDS_MAX:,} seconds, not {value!r:.40}")
    if seconds < least:
        raise Misuse(f"{argument} must be at least {least} seconds, not {value!r:.40}")
    return float(seconds)


# -- whose a name is -------------------------------------------------------------------------------------------

Use: TypeAlias = tuple[str, Key, bool]
"""A name, what all keys of a function begin with, and whether it is a coroutine function."""
_uses: WeakKeyDictionary[Any, WeakValueDictionary[Use, Any]] = WeakKeyDictionary()  # by runner


def enter(runner: Runner, use: Use, fn: Callable[..., Any]) -> None:
    """Have a function keep its results in a runner. Raises `Misuse` if another one has them in the same place."""
    try:
        uses = _uses.setdefault(runner, WeakValueDictionary())
        other = uses.setdefault(use, fn)
        mine, its = _origin(fn), _origin(other)
        if mine == its:
            uses[use] = fn
            return
    except TypeError:  # a runner or a function of a class of its own that nobody can refer to weakly
        return
    hint = "Give one of them another name=, or another version= if it is to replace the other one."
    raise Misuse(f"{mine} and {its} both keep results as {use[0]!r} in job {runner.id!r}", hint=hint)


def _origin(fn: Any) -> str:
    """Return where a function was defined."""
    while isinstance(fn, partial):
        fn = fn.func
    named = fn if isinstance(getattr(fn, "__qualname__", None), str) else type(fn)
    return f"{named.__module__}.{named.__qualname__}"
