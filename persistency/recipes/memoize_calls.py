"""Calls of memoized functions: what those of plain and of coroutine functions have in common, all but waiting.

Rules:
  1. What waits is written as steps, which a thread or an event loop takes.
  2. A bound method shares with its function all that is known of it; two of one instance are equal, as methods are.
  3. What is logged names the function, and neither arguments nor results.

Doesn't know: threads, event loops, how a job stores anything.
"""

from __future__ import annotations

import functools
import inspect
import logging
import operator
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ClassVar, Generic, ParamSpec, TypeVar
from weakref import WeakSet

from persistency import Corrupt, Job, Key, Misuse, PersistencyError, QuotaExceeded, Reply
from persistency.logfields import about
from persistency.recipes.memoize_flights import Lead, awaited, forget_flights, is_nested, looked
from persistency.recipes.memoize_keys import CallKeys
from persistency.recipes.memoize_options import Options, enter, name_of
from persistency.recipes.memoize_rows import ahead_of, clear, drop, forget
from persistency.recipes.runner import Runner
from persistency.recipes.waiting import Steps

log: logging.Logger = logging.getLogger("persistency.recipes")

P = ParamSpec("P")
R = TypeVar("R")


class _Signature:
    """The signature of a memoized function; of a bound method, without what it is bound to. Classes have none of it."""

    def __get__(self, memo: Memo[..., Any] | None, owner: type) -> inspect.Signature:
        if memo is None:
            raise AttributeError("__signature__")
        return memo._keys.signature_of(len(memo._bound))


class Memo(Generic[P, R]):
    """What both kinds of memoized functions have in common."""

    _is_async: ClassVar[bool]  # else whoever waits blocks its thread
    __signature__: _Signature = _Signature()
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
        self._entered: WeakSet[Runner] = WeakSet()
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

    def __eq__(self, other: object) -> bool:
        """Say whether two are one function, or one method of one instance."""
        if not isinstance(other, Memo):
            return NotImplemented
        bound = len(self._bound) == len(other._bound) and all(map(operator.is_, self._bound, other._bound))
        return self._keys is other._keys and bound

    def __hash__(self) -> int:
        return hash((id(self._keys), *map(id, self._bound)))

    def __reduce__(self) -> Any:
        """Be found again by name, as a plain function is."""
        return (getattr, (*self._bound, self.__name__)) if self._bound else self.__qualname__

    def _bind(self, instance: Any) -> Any:
        """Return what stands for a method of an instance."""
        bound = object.__new__(type(self))
        vars(bound).update(vars(self), _bound=(instance,))
        vars(bound).pop("__signature__", None)  # which the function may have been given: it has `self` in it
        return bound

    # -- the parts of a call, all but those that wait ------------------------------------------------------------

    def _asked(self) -> Runner:
        """Return the runner of this call. Raises `Misuse` if another function keeps its results there as ours."""
        runner = self._runner()
        if runner not in self._entered:
            enter(runner, (self._name, self._keys.prefix, self._is_async), self._fn)
            with suppress(TypeError):  # it can't be referred to weakly
                self._entered.add(runner)
        return runner

    def _look(self, runner: Runner, place: Key) -> Reply[bytes | None] | None:
        """Ask for a result where that is cheap, and needs no time."""
        return looked(runner, self._name, place) if self._reads_first and isinstance(runner, Job) else None

    def _lead(self, runner: Runner, place: Key, *, anew: bool = False) -> Lead:
        return Lead(runner, self._name, place, self._options.lease, anew=anew)

    def _turn(self, runner: Runner, place: Key) -> Steps[bytes | Lead | Exception | None]:
        """Return a kept result, or what its computation raised, or the lead of a flight that is to compute it.

        `None`: compute it beside all others.
        """
        while True:
            lead = self._lead(runner, place)
            flight = lead.board()
            if flight is lead.flight:
                return (yield from self._claimed(lead))
            lead.give_up()
            answer = yield from awaited(flight, runner, self._name, place, blocks=not self._is_async)
            if answer is None or answer.payload is not None:
                return None if answer is None else answer.payload
            if answer.error is not None:
                return answer.error  # raised outside: a generator can't raise a `StopIteration`

    def _claimed(self, lead: Lead) -> Steps[bytes | Lead | None]:
        """Return a lead that has its claim, or what there is by then; see `_turn`."""
        options = self._options
        ahead = ahead_of(options.early, options.random()) if options.early else 0.0
        try:
            # Two processes could wait for each other, each in the middle of what the other one needs.
            patience = options.lease if is_nested(lead, blocks=not self._is_async) else None
            begun = yield from lead.claimed(ahead, patience=patience)
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
        """Deal with a result that was given to all who wait, but that the job hasn't taken: no room, or too large."""
        lead.release()
        self._told_not_kept(lead, error)

    def _told_not_kept(self, lead: Lead, error: PersistencyError) -> None:
        fields = about("memoize_not_kept", lead.runner.id, error, function=self._name)
        log.warning("%s: a result wasn't kept: %s", self._name, error, extra=fields)

    def _instead(self, lead: Lead, error: Exception) -> Steps[bytes | None]:
        """Return what is given in place of a computation that failed: the old result, if that is kept still."""
        kept: bytes | None = None
        if lead.has_old:
            with suppress(PersistencyError):
                kept = yield lead.look()
        if kept is None:
            lead.fail(error)
        else:
            lead.end(kept)
            self._early_failed(lead, error)
        return kept

    def _early_failed(self, lead: Lead, error: Exception) -> None:
        fields = about("memoize_early_failed", lead.runner.id, error, function=self._name)
        log.warning("%s failed ahead of a result's end, which is given still: %r", self._name, error, extra=fields)
