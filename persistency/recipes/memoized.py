"""memoize: a function whose results are kept in a job, and computed once however many ask for them at once.

What can be in a key, and so an argument: None, bool, int, float, str, bytes; tuples, lists, dicts and sets of such;
dates, times, timedeltas; Decimal, Fraction, UUID, paths; Enums, NamedTuples and dataclasses (which count as their class
and their fields); classes. For anything else there are `ignore=` and `key=`.

Rules:
  1. What a call gives is always what was kept, decoded anew: the first call gives no other types than the second, and
     nobody changes what others are given.
  2. Of many who ask for what isn't there one computes. The others get its result, or what it raised; if it was
     cancelled, the next one computes.
  3. What the function raises is never kept. A result that can't be kept for want of room is given, and logged; one that
     can't be encoded is `Misuse`.
  4. A result that was forgotten while it was computed is given to those who wait for it, and not kept.

Doesn't know: threads, event loops, how a job stores anything.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Collection, Coroutine
from datetime import timedelta
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar, overload

from persistency import CBOR, Codec, Corrupt, Job, Key, Misuse, PersistencyError, QuotaExceeded, Reply
from persistency.logfields import about
from persistency.recipes.memoize_flights import Lead, awaited, forget_flights, is_nested
from persistency.recipes.memoize_keys import CallKeys
from persistency.recipes.memoize_options import Options, name_of
from persistency.recipes.memoize_rows import ahead_of, clear, drop, forget, unpacked
from persistency.recipes.runner import Runner
from persistency.recipes.waiting import Steps, adrive, drive

log: logging.Logger = logging.getLogger("persistency.recipes")

P = ParamSpec("P")
P2 = ParamSpec("P2")
R = TypeVar("R")
S = TypeVar("S")


class _Memo(Generic[P, R]):
    """What both kinds of memoized functions have in common."""

    __wrapped__: Callable[..., Any]
    __name__: str
    __qualname__: str

    def __init__(self, fn: Callable[..., Any], options: Options) -> None:
        wrapper: Any = self
        functools.update_wrapper(wrapper, fn)
        self._fn = fn
        self._options = options
        self._runner: Callable[[], Runner] = options.runner
        self._reads_first = not options.early  # a result that doesn't end early is good if it is there
        self._name = options.name if options.name is not None else name_of(fn)
        self._bound: tuple[Any, ...] = ()
        self._keys = CallKeys(fn, self._name, version=options.version, ignore=options.ignore, chosen=options.chosen)

    @property
    def name(self) -> str:
        """The function's name in the job: the category its results are in."""
        return self._name

    def key(self, *args: P.args, **kwargs: P.kwargs) -> Key:
        """Return the key of a call's result in the category `name`. Raises `Misuse` as the call itself does."""
        return self._keys.key(self._bound + args, kwargs)

    def forget(self, *args: P.args, **kwargs: P.kwargs) -> Reply[bool]:
        """Remove the result of a call, and answer whether there was one.

        What is being computed meanwhile is given to those who wait for it, and not kept: who calls the function after
        this, in this process, gets what was computed after this.
        """
        place, runner = self._keys.key(self._bound + args, kwargs), self._runner()
        removed = runner.run(forget, self._name, place)
        forget_flights(runner, self._name, place)
        return removed

    def clear(self) -> Reply[int]:
        """Remove all results, of every version, and answer how many there were; see `forget`."""
        runner = self._runner()
        removed = runner.run(clear, self._name)
        forget_flights(runner, self._name)
        return removed

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._name!r}>"

    def __reduce__(self) -> Any:
        """Be found again by name, as a plain function is."""
        return (getattr, (*self._bound, self.__name__)) if self._bound else self.__qualname__

    def _bind(self, instance: Any) -> Any:
        """Return what stands for a method of an instance."""
        bound = object.__new__(type(self))
        vars(bound).update(vars(self), _bound=(instance,))
        return bound

    # -- the parts of a call, all but those that wait ------------------------------------------------------------

    def _look(self, runner: Runner, place: Key) -> Reply[bytes | None] | None:
        """Ask for a result where that is cheap, and needs no time."""
        return runner.get(self._name, place) if self._reads_first and isinstance(runner, Job) else None

    def _lead(self, runner: Runner, place: Key, *, anew: bool = False) -> Lead:
        return Lead(runner, self._name, place, self._options.lease, anew=anew)

    def _turn(self, runner: Runner, place: Key) -> Steps[bytes | Lead | None]:
        """Return a kept result, or the lead of a flight that is to compute it; `None`: compute it beside all others."""
        while True:
            lead = self._lead(runner, place)
            flight = lead.board()
            if flight is lead.flight:
                return (yield from self._claimed(lead))
            lead.give_up()
            payload, waits_for_us = yield from awaited(flight)
            if payload is not None or waits_for_us:
                return payload

    def _claimed(self, lead: Lead) -> Steps[bytes | Lead | None]:
        """Return a lead that has its claim, or what there is by then; see `_turn`."""
        options = self._options
        ahead = ahead_of(options.early, options.random()) if options.early else 0.0
        try:
            # Two processes could wait for each other, each in the middle of what the other one needs.
            begun = yield from lead.claimed(ahead, patience=options.lease if is_nested() else None)
        except QuotaExceeded as error:  # not even a claim has room: it is computed all the same, for those here
            self._told_not_kept(lead, error)
            return lead
        except Exception as error:  # of the job: it is the same for all who wait
            lead.fail(error)
            raise
        except BaseException:
            lead.give_up()
            raise
        if begun.began_ms is None:
            lead.end(begun.payload)
            return begun.payload
        if begun.payload is not None:
            lead.share(begun.payload)
        return lead

    def _encoded(self, value: Any) -> bytes:
        try:
            return self._options.codec.encode(value)
        except Misuse as error:
            if inspect.iscoroutine(value):
                value.close()
            hint = "Return plain values (help(persistency.codec.values) lists them), or give memoize codec=typed(cls)."
            raise Misuse(f"{self._name} returned what can't be kept: {error}", hint=hint) from error

    def _decoded(self, encoded: bytes) -> R:
        return self._options.codec.decode(encoded)  # type: ignore[no-any-return]  # what the function returns

    def _spoilt(self, runner: Runner, place: Key, payload: bytes, error: Corrupt) -> Reply[bool]:
        """Remove what can't be read, so that it is computed anew."""
        fields = about("memoize_unreadable", runner.id, error, function=self._name)
        log.warning("%s: a kept result can't be read and is computed anew: %s", self._name, error, extra=fields)
        return runner.run(drop, self._name, place, payload)

    def _not_kept(self, lead: Lead, error: PersistencyError) -> None:
        """Deal with a result that was given to all who wait, but that the job hasn't taken."""
        lead.release()
        if isinstance(error, Misuse):
            raise Misuse(f"{self._name} returned what can't be kept: {error}", hint=error.hint) from error
        self._told_not_kept(lead, error)

    def _told_not_kept(self, lead: Lead, error: PersistencyError) -> None:
        fields = about("memoize_not_kept", lead.runner.id, error, function=self._name)
        log.warning("%s: a result wasn't kept: %s", self._name, error, extra=fields)

    def _early_failed(self, lead: Lead, error: Exception) -> None:
        fields = about("memoize_early_failed", lead.runner.id, error, function=self._name)
        log.warning("%s failed ahead of a result's end, which is given still: %r", self._name, error, extra=fields)


class Memoized(_Memo[P, R]):
    """A function whose results are kept. It is called as the function itself, by any thread."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the kept result of these arguments, or compute it, or wait for whoever does."""
        arguments = self._bound + args
        place, runner = self._keys.key(arguments, kwargs), self._runner()
        asked = self._look(runner, place)
        payload = None if asked is None else asked.result()
        while True:
            if payload is None:
                found = drive(self._turn(runner, place))
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
        lead = self._lead(self._runner(), self._keys.key(arguments, kwargs), anew=True)
        drive(self._claimed(lead))
        return self._computed(lead, arguments, kwargs)

    def _computed(self, lead: Lead | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        if lead is None:
            return self._decoded(self._encoded(self._fn(*args, **kwargs)))
        with lead:
            try:
                encoded = self._encoded(self._fn(*args, **kwargs))
            except Exception as error:
                if lead.old is None:
                    lead.fail(error)
                    raise
                self._early_failed(lead, error)
                return self._decoded(unpacked(lead.old))
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


class AsyncMemoized(_Memo[P, R]):
    """A coroutine function whose results are kept. It is called as the function itself, in any event loop."""

    def __init__(self, fn: Callable[..., Any], options: Options) -> None:
        super().__init__(fn, options)
        mark = getattr(inspect, "markcoroutinefunction", None)  # since Python 3.12
        if mark is not None:
            mark(self)

    async def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Return the kept result of these arguments, or compute it, or wait for whoever does."""
        arguments = self._bound + args
        place, runner = self._keys.key(arguments, kwargs), self._runner()
        asked = self._look(runner, place)
        payload = None if asked is None else await asked
        while True:
            if payload is None:
                found = await adrive(self._turn(runner, place))
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
        lead = self._lead(self._runner(), self._keys.key(arguments, kwargs), anew=True)
        await adrive(self._claimed(lead))
        return await self._computed(lead, arguments, kwargs)

    async def _computed(self, lead: Lead | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> R:
        if lead is None:
            return self._decoded(self._encoded(await self._fn(*args, **kwargs)))
        with lead:
            try:
                encoded = self._encoded(await self._fn(*args, **kwargs))
            except Exception as error:
                if lead.old is None:
                    lead.fail(error)
                    raise
                self._early_failed(lead, error)
                return self._decoded(unpacked(lead.old))
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


def _memoized(options: Options, fn: Any, /) -> Any:
    if not callable(fn):
        hint = "Write @memoize(job) above the def, and @classmethod or @staticmethod above that."
        raise Misuse(f"memoize decorates a function, not {type(fn).__name__}", hint=hint)
    call = fn
    while isinstance(call, functools.partial):
        call = call.func
    for kind in (call, getattr(call, "__call__", None)):  # noqa: B004  # the method itself is looked at
        if inspect.isgeneratorfunction(kind) or inspect.isasyncgenfunction(kind):
            raise Misuse("memoize can't keep what a generator gives: return a list of it")
        if inspect.iscoroutinefunction(kind):
            return AsyncMemoized(fn, options)
    return Memoized(fn, options)
