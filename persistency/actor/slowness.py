"""Slowness: telling of what has taken long, in a log of its own, `persistency.slow`.

A job has one of these only if its `Persistency` was given `slow_after`. What is told: groups (and what waited how long
in front of them), single requests that were answered in place, steps of upkeep, and openings.

Rules:
  1. Who isn't asked to tell costs nothing: what is timed is chosen when a store is opened, not at each call.
  2. The clock is read once more per group. What a group was is looked at only when it has been slow.
  3. Functions and categories are named, keys and payloads aren't.
  4. A log that fails harms nobody.

Doesn't know: turns, the mailbox, the store, what is done about it.
"""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Callable
from time import monotonic
from typing import Any, TypeVar

from persistency.logfields import about
from persistency.storage import port
from persistency.storage.port import PLACES, Batch, Group, Run, Store, operations

log: logging.Logger = logging.getLogger("persistency.slow")

T = TypeVar("T")
Get = Callable[[bytes, bytes], bytes | None]

_NAMED_MAX = 5  # functions; of more than so many only the most frequent are named
# What a message is called by who has posted it.
_VERBS: dict[type, str] = {
    port.SetRow: "put",
    port.DropRow: "delete",
    port.DropRange: "delete_range",
    port.SwapRow: "compare_and_set",
    port.TouchRow: "touch",
    port.Batch: "batch",
    port.Run: "run",
    port.GetRow: "get",
    port.GetEntry: "entry",
    port.GetRows: "get_many",
    port.HasRow: "exists",
    port.CountRange: "count",
    port.ScanRange: "scan",
    port.ListEntries: "snapshot",
    port.ListRows: "export",
    port.ListCategories: "categories",
    port.ListChanges: "changes",
    port.LastVersion: "version",
    port.UsedBytes: "storage_used",
    port.Extent: "compact",
    port.GiveBack: "compact",
    port.BackUp: "backup",
    port.CheckUp: "check",
    port.Barrier: "flush",
}


class Slowness:
    """Tells of what has taken one job `after` seconds or longer."""

    def __init__(self, job_id: str, after: float) -> None:
        self.after = after
        self._job_id = job_id

    # -- what is timed, chosen when it is opened -----------------------------------------------------------------

    def opening(self, open_store: Callable[[], Store]) -> Callable[[], Store]:
        """Return a function that opens a store and tells if that was slow, however it went."""

        def open_timed() -> Store:
            begun = monotonic()
            try:
                return open_store()
            finally:
                if (seconds := monotonic() - begun) >= self.after:
                    self._tell("slow_opening", "opening", seconds)

        return open_timed

    def get(self, get: Get) -> Get:
        """Return a point read that tells if it was slow."""
        after = self.after

        def get_timed(category: bytes, key: bytes) -> bytes | None:
            begun = monotonic()
            try:
                return get(category, key)
            finally:
                if (seconds := monotonic() - begun) >= after:
                    self._tell_of([None, port.GetRow(category, key), None], seconds)

        return get_timed

    def request(self, serve: Callable[..., T]) -> Callable[..., T]:
        """Return a function that serves one message in place, given first, and tells if that was slow."""

        def serve_timed(message: Any, *args: Any) -> T:
            begun = monotonic()
            try:
                return serve(message, *args)
            finally:
                if (seconds := monotonic() - begun) >= self.after:
                    self._tell_of([None, message, None], seconds)

        return serve_timed

    # -- what is told --------------------------------------------------------------------------------------------

    def group(self, group: Group, seconds: float, waited: float) -> None:
        """Tell of a group; the first of it has waited so long, at the most, before it was begun."""
        self._tell_of(group, seconds, waited)

    def step(self, name: str, seconds: float) -> None:
        """Tell of a step of upkeep."""
        self._tell("slow_upkeep", name, seconds)

    def _tell_of(self, group: Group, seconds: float, waited: float | None = None) -> None:
        with contextlib.suppress(Exception):
            kinds, categories, functions = _looked_through(group)
            ops = sum(
                1 if category is not None else operations(message)
                for category, message in zip(group[::PLACES], group[1::PLACES], strict=True)
            )
            what = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            frequent = [name for name, _ in categories.most_common(1)]
            if frequent:
                others = f" and {len(categories) - 1} more" if len(categories) > 1 else ""
                what += f" in {frequent[0]!r}{others}"
            named = [name for name, _ in functions.most_common(_NAMED_MAX)]
            what += f" ({', '.join(named)})" if named else ""
            fields: dict[str, Any] = {"kinds": dict(kinds), "operations": ops, "categories": len(categories)}
            fields |= {"category": frequent[0] if frequent else None, "functions": named}
            self._tell("slow_request" if waited is None else "slow_group", what, seconds, waited, **fields)

    def _tell(self, event: str, what: str, seconds: float, waited: float | None = None, **fields: Any) -> None:
        took_ms = round(seconds * 1000, 3)
        with contextlib.suppress(Exception):
            if waited is None:
                extra = about(event, self._job_id, what=what, took_ms=took_ms, **fields)
                log.warning("job %r: slow, %.0f ms: %s", self._job_id, took_ms, what, extra=extra)
                return
            waited_ms = round(waited * 1000, 3)
            extra = about(event, self._job_id, what=what, took_ms=took_ms, waited_ms=waited_ms, **fields)
            text = "job %r: slow, %.0f ms, after up to %.0f ms in line: %s"
            log.warning(text, self._job_id, took_ms, waited_ms, what, extra=extra)


def _looked_through(group: Group) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Return how many messages of each kind a group has, in which categories, and what functions."""
    kinds: Counter[str] = Counter()
    categories: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for at in range(0, len(group), PLACES):
        category, message = group[at], group[at + 1]
        if category is not None:
            kinds["put"] += 1
        elif type(message) is Run:
            _name_function(message, kinds, functions)
        else:
            kinds[_VERBS.get(type(message), type(message).__name__)] += 1
            category = getattr(message, "category", None)
            if type(message) is Batch:
                categories.update(_looked_through(message.items)[1])
        if category is not None:
            categories[category.decode(errors="replace")] += 1
    return kinds, categories, functions


def _name_function(message: Run, kinds: Counter[str], functions: Counter[str]) -> None:
    origin = message.origin[0] if message.origin else message.fn
    if isinstance(origin, str):  # one of the job's own verbs, "increment ..."
        kinds[origin.partition(" ")[0]] += 1
    else:
        kinds["run"] += 1
        functions[str(getattr(origin, "__qualname__", type(origin).__name__))] += 1
