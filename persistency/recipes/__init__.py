"""Recipes: what services build of a job again and again, built once, each a small module.

A recipe works on a *runner*: a `Job`, or a `Baton`, by which several processes pass one job to one another.

Rules:
  1. They stand on the public surface of the package alone: what they do a service could do itself.
  2. Whatever one does is one transaction; its rows are one category: the recipe's `name`, or `locks`, which all locks
     share.
  3. A verb that answers at once or later gives a `Reply`; one that waits for something to happen has two forms, for
     threads and for event loops.
  4. They are imported when they are asked for, and nothing below them imports them.

Doesn't know: how a job is run, or stored.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persistency.recipes.baton import Baton
    from persistency.recipes.lock import Grant, Lock, LockLost
    from persistency.recipes.memoized import AsyncMemoized, Memoized, Memoizing, memoize
    from persistency.recipes.orderedlog import Consumer, LogRecord, OrderedLog
    from persistency.recipes.queue import DeadLetter, Message, Queue, QueueCounts
    from persistency.recipes.ratelimit import RateLimiter, Verdict
    from persistency.recipes.runner import Runner

__all__ = [
    "AsyncMemoized",
    "Baton",
    "Consumer",
    "DeadLetter",
    "Grant",
    "Lock",
    "LockLost",
    "LogRecord",
    "Memoized",
    "Memoizing",
    "Message",
    "OrderedLog",
    "Queue",
    "QueueCounts",
    "RateLimiter",
    "Runner",
    "Verdict",
    "memoize",
]  # fmt: skip

# Where each of them is, by name.
_RECIPES = {
    "Baton": "baton",
    **dict.fromkeys(("Grant", "Lock", "LockLost"), "lock"),
    **dict.fromkeys(("AsyncMemoized", "Memoized", "Memoizing", "memoize"), "memoized"),
    **dict.fromkeys(("Consumer", "LogRecord", "OrderedLog"), "orderedlog"),
    **dict.fromkeys(("DeadLetter", "Message", "Queue", "QueueCounts"), "queue"),
    **dict.fromkeys(("RateLimiter", "Verdict"), "ratelimit"),
    "Runner": "runner",
}

if not TYPE_CHECKING:  # a type checker would take every misspelled name for one of these

    def __getattr__(name):
        if name not in _RECIPES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(f"{__name__}.{_RECIPES[name]}"), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_RECIPES})
