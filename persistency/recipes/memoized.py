"""memoize: a function whose results are kept in a job, and computed once however many ask for them at once.

What can be in a key, and so an argument: None, bool, int, float, str, bytes; tuples, lists, dicts and sets of such;
dates and timedeltas, times in a `ZoneInfo`, a `timezone` or none; Decimal, Fraction, UUID, paths; Enums, NamedTuples
and dataclasses (which count as their class and their fields); classes. A class must be found by its name, so one that
a function has made isn't among them. For anything else there are `ignore=` and `key=`.

Rules:
  1. What a call gives is always what was kept, decoded anew: the first call gives no other types than the second, and
     nobody changes what others are given.
  2. Of many who ask for what isn't there one computes. The others get its result, or what it raised; if it was
     cancelled, the next one computes.
  3. What the function raises is never kept. A result that can't be kept, for want of room or as it is too large, is
     given, and logged; one that can't be encoded is `Misuse`.
  4. A result that was forgotten while it was computed is given to those who wait for it, and not kept.

Doesn't know: threads, event loops, how a job stores anything.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Coroutine
from datetime import timedelta
from typing import Any, Concatenate, ParamSpec, Protocol, Self, TypeVar, overload

from persistency import CBOR, Codec, Corrupt, Misuse, PersistencyError
from persistency.recipes.memoize_calls import Memo
from persistency.recipes.memoize_flights import Lead
from persistency.recipes.memoize_options import HOW, Options
from persistency.recipes.memoize_rows import unpacked
from persistency.recipes.runner import Runner
from persistency.recipes.waiting import adrive, drive

P = ParamSpec("P")
P2 = ParamSpec("P2")
R = TypeVar("R")
S = TypeVar("S")


class Memoized(Memo[P, R]):
    """A function whose results are kept. It is called as the function itself, by any thread."""

    _is_async = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the kept result of these arguments, or compute it, or wait for whoever does."""
        arguments = self._bound + args
        place, runner = self._keys.key(arguments, kwargs), self._asked()
        asked = self._look(runner, place)
        payload = None if asked is None else asked.result()
        while True:
            if payload is None:
                found = drive(self._turn(runner, place))
                if isinstance(found, Exception):
                    raise found
                if not isinstance(found, bytes):
                    return self._computed(found, arguments, kwargs)
                payload = found
            try:
                return self._decoded(unpacked(payload))
            except Corrupt as error:
                self._spoilt(runner, place, payload, error).result()
                payload = None

    def refresh(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute a result anew, whatever is kept, and keep it. Until then others get what was kept."""
        arguments = self._bound + args
        lead = self._lead(self._asked(), self._keys.key(arguments, kwargs), anew=True)
        drive(self._claimed(lead))
        return self._computed(lead, arguments, kwargs)

    def _computed(self, lead: Lead | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        if lead is None:
            return self._decoded(self._encoded(self._fn(*args, **kwargs)))
        with lead:
            try:
                encoded = self._encoded(self._fn(*args, **kwargs))
            except Exception as error:
                kept = drive(self._instead(lead, error))
                if kept is None:
                    raise
                return self._decoded(unpacked(kept))
            try:
                lead.keep(encoded, self._options.ttl).result()
            except PersistencyError as error:
                self._not_kept(lead, error)
        return self._decoded(encoded)

    @overload
    def __get__(self, instance: None, owner: type | None = None, /) -> Self: ...
    @overload
    def __get__(
        self: Memoized[Concatenate[S, P2], R], instance: S, owner: type | None = None, /
    ) -> Memoized[P2, R]: ...
    def __get__(self, instance: Any, owner: type | None = None, /) -> Any:
        """Be a method: of an instance, the function with that for its first argument."""
        return self if instance is None else self._bind(instance)


class AsyncMemoized(Memo[P, R]):
    """A coroutine function whose results are kept. It is called as the function itself, in any event loop."""

    _is_async = True

    def __init__(self, fn: Callable[..., Any], options: Options) -> None:
        super().__init__(fn, options)
        mark = getattr(inspect, "markcoroutinefunction", None)  # since Python 3.12
        if mark is not None:
            mark(self)

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the kept result of these arguments, or compute it, or wait for whoever does."""
        arguments = self._bound + args
        place, runner = self._keys.key(arguments, kwargs), self._asked()
        asked = self._look(runner, place)
        payload = None if asked is None else await asked
        while True:
            if payload is None:
                found = await adrive(self._turn(runner, place))
                if isinstance(found, Exception):
                    raise found
                if not isinstance(found, bytes):
                    return await self._computed(found, arguments, kwargs)
                payload = found
            try:
                return self._decoded(unpacked(payload))
            except Corrupt as error:
                await self._spoilt(runner, place, payload, error)
                payload = None

    async def refresh(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Compute a result anew, whatever is kept, and keep it. Until then others get what was kept."""
        arguments = self._bound + args
        lead = self._lead(self._asked(), self._keys.key(arguments, kwargs), anew=True)
        await adrive(self._claimed(lead))
        return await self._computed(lead, arguments, kwargs)

    async def _computed(self, lead: Lead | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        if lead is None:
            return self._decoded(self._encoded(await self._fn(*args, **kwargs)))
        with lead:
            try:
                encoded = self._encoded(await self._fn(*args, **kwargs))
            except Exception as error:
                kept = await adrive(self._instead(lead, error))
                if kept is None:
                    raise
                return self._decoded(unpacked(kept))
            try:
                await lead.keep(encoded, self._options.ttl)
            except PersistencyError as error:
                self._not_kept(lead, error)
        return self._decoded(encoded)

    @overload
    def __get__(self, instance: None, owner: type | None = None, /) -> Self: ...
    @overload
    def __get__(
        self: AsyncMemoized[Concatenate[S, P2], R], instance: S, owner: type | None = None, /
    ) -> AsyncMemoized[P2, R]: ...
    def __get__(self, instance: Any, owner: type | None = None, /) -> Any:
        """Be a method: of an instance, the function with that for its first argument."""
        return self if instance is None else self._bind(instance)


class Memoizing(Protocol):
    """What `memoize` returns: the decorator itself."""

    # Whoever has a plain function's type for a coroutine function sees it as one that returns a coroutine.
    @overload
    def __call__(  # type: ignore[overload-overlap]  # as above
        self, fn: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncMemoized[P, R]: ...  # pyright: ignore[reportOverlappingOverload]
    @overload
    def __call__(self, fn: Callable[P, R], /) -> Memoized[P, R]: ...


def memoize(
    runner: Runner | Callable[[], Runner],
    name: str | None = None,
    *,
    ttl: float | timedelta | None = None,
    version: int | str = 1,
    ignore: Collection[str] = (),
    key: Callable[..., Any] | None = None,
    codec: Codec[Any] = CBOR,
    early: float = 0.0,
    lease: float | timedelta = 10.0,
    random: Callable[[], float] | None = None,
) -> Memoizing:
    """Return a decorator that keeps the results of a function, or of a coroutine function, in a job.

    `runner`: a `Job`, a `Baton`, or a function that gives one at each call. `name`: the category the results are in;
    by default the function's module and qualified name. `ttl`: for how long they are kept, in seconds or as a
    `timedelta`; without one they stay. `version`: a part of the key; a function that was changed gets another one, and
    reads nothing of what the old one has kept. `ignore`: names of parameters that aren't in the key; `self`, say.
    `key`: a function of the arguments that gives what is in the key in their place. `codec`: `CBOR`, `RAW` or
    `typed(cls)`. `early`: how early a result that is about to end is computed anew, by one of those who ask for it: 1.0
    is the usual choice, 0 turns it off. `lease`: after how many seconds another process of a `Baton` computes what
    one that was killed had begun; one that lives renews it. `random`: gives numbers from 0 up to 1, for `early`, in
    place of `random.random`.

    Raises `Misuse` for wrong arguments, and where the decorator is given what it can't memoize.
    """
    options = Options.checked(
        runner=runner,
        name=name,
        ttl=ttl,
        version=version,
        ignore=ignore,
        chosen=key,
        codec=codec,
        early=early,
        lease=lease,
        random=random,
    )
    return functools.partial(_memoized, options)


def _memoized(options: Options, /, *given: Any, **named: Any) -> Any:
    if named or len(given) != 1:
        raise Misuse("memoize decorates one function, and was called as if it were that", hint=HOW)
    fn = given[0]
    if not callable(fn) or isinstance(fn, staticmethod | classmethod):
        raise Misuse(f"memoize decorates a function, not {type(fn).__name__}", hint=HOW)
    call = fn
    while isinstance(call, functools.partial):
        call = call.func
    for kind in (call, getattr(call, "__call__", None)):  # noqa: B004  # the method itself is looked at
        if inspect.isgeneratorfunction(kind) or inspect.isasyncgenfunction(kind):
            raise Misuse("memoize can't keep what a generator gives: return a list of it")
        if inspect.iscoroutinefunction(kind):
            return AsyncMemoized(fn, options)
    return Memoized(fn, options)
