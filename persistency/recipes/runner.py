"""The runner: what a recipe works on, a job or whatever stands for one.

Rules:
  1. A recipe asks for one thing only: `run(fn, *args)`, which calls `fn(tx, *args)` in a transaction of its own and
     answers with a `Reply`. So whatever a recipe does is all or nothing.
  2. A runner whose job other processes may change says so by a `poll`: who waits for a change looks again by itself.
     One without a `poll` (a `Job`) is changed in this process only, and who waits is rung for.

Doesn't know: what is run, or where.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Iterable
from functools import partial
from typing import Any, Protocol, TypeVar, TypeVarTuple

from persistency import Job, Misuse, Reply, Transaction

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class Runner(Protocol):
    """What a recipe works on: a `Job`, or a `Baton` where several processes share one."""

    @property
    def id(self) -> str:
        """The job's id."""
        raise NotImplementedError

    def run(self, fn: Callable[[Transaction, *Ts], T], *args: *Ts) -> Reply[T]:
        """Call `fn(tx, *args)` in one transaction; the reply gives what it returns. It may be called again."""
        raise NotImplementedError


def as_runner(value: Any) -> Runner:
    """Return what a recipe was given to work on. Raises `Misuse` if it is none."""
    if isinstance(getattr(value, "id", None), str) and callable(getattr(value, "run", None)):
        return value  # type: ignore[no-any-return]  # it has what a runner has
    raise Misuse(f"runner must be a Job or a Baton, not {type(value).__name__}: pass what open_job gave, or a Baton")


def check_function(fn: Any) -> None:
    """Raise `Misuse` for what `Job.run` would refuse, at the call."""
    call = fn
    while isinstance(call, partial):
        call = call.func
    if not callable(call):
        raise Misuse(f"fn must be callable, not {type(fn).__name__}: pass a function of the transaction")
    for one in (call, getattr(call, "__call__", None)):  # noqa: B004  # the method itself is looked at
        if inspect.iscoroutinefunction(one) or inspect.isasyncgenfunction(one) or inspect.isgeneratorfunction(one):
            raise Misuse("fn is a coroutine function or a generator: pass a plain def that returns its answer")


def bytes_of(args: Iterable[Any]) -> int:
    """Return the bytes of text and bytes among a function's arguments, which wait with it."""
    return sum(
        one.nbytes if isinstance(one, memoryview) else len(one)
        for one in args
        if isinstance(one, bytes | bytearray | memoryview | str)
    )


def check_transaction(tx: Any, runner: Runner) -> None:
    """Raise `Misuse` for what isn't a transaction of the runner's job."""
    if not isinstance(tx, Transaction):
        raise Misuse(
            f"tx must be a Transaction, not {type(tx).__name__}",
            hint="Pass what the function is given that you have run.",
        )
    if tx.job_id != runner.id:
        raise Misuse(f"the transaction is job {tx.job_id!r}'s, not {runner.id!r}'s: one of the same job is needed")


def poll_of(runner: Runner) -> float | None:
    """Return after how many seconds who waits looks again; `None`: a bell is rung at every change."""
    poll: float | None = getattr(runner, "poll", None)
    return poll


def place_of(runner: Runner) -> Hashable:
    """Return what two runners of this process have in common if they are about the same job."""
    if isinstance(runner, Job):
        return runner if runner.path is None else (str(runner.path.parent), runner.id)
    place: Hashable = getattr(runner, "place", None)
    return id(runner) if place is None else place
