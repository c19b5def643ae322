"""Planted defects: each spoils the engine on a server in this process, in one way that a harness must see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from persistency.storage.port import PLACES, Batch, Group
from tests.crash.running import replace_method
from tests.soak.postgres_fence_plants import nothing_checked


def _store() -> Any:
    from persistency.storage.postgres.store import PostgresStore

    return PostgresStore


def _instead(of: Callable[[Any, Any, Group, int], list[Any]]) -> Callable[[], None]:
    """Return what puts another `apply` in the place of the store's; it gets the one that was there."""

    def plant() -> None:
        apply = _store().apply
        replace_method(_store(), "apply", lambda self, group, now_ms: of(apply, self, group, now_ms))

    return plant


def _lose_put(apply: Any, store: Any, group: Group, now_ms: int) -> list[Any]:
    """Leave a plain put out, and say it was written."""
    if None in group[::PLACES] or len(group) < 2 * PLACES:
        return apply(store, group, now_ms)  # type: ignore[no-any-return]
    return [None, *apply(store, group[PLACES:], now_ms)]


def _lose_batch(apply: Any, store: Any, group: Group, now_ms: int) -> list[Any]:
    """Leave the first batch of every group out, and say it was written."""
    at = next((at for at in range(0, len(group), PLACES) if type(group[at + 1]) is Batch), None)
    if at is None:
        return apply(store, group, now_ms)  # type: ignore[no-any-return]
    outcomes = apply(store, group[:at] + group[at + PLACES :], now_ms)
    outcomes.insert(at // PLACES, store.last_version)
    return outcomes  # type: ignore[no-any-return]


def _answer_early(apply: Any, store: Any, group: Group, now_ms: int) -> list[Any]:
    """Answer plain puts before they are committed: they are with the next group."""
    kept = getattr(_held, "group", [])
    if None not in group[::PLACES]:
        _held.group = [*kept, *group]
        return [None] * (len(group) // PLACES)
    _held.group = []
    return apply(store, [*group, *kept], now_ms)[: len(group) // PLACES]  # type: ignore[no-any-return]


class _Held:
    """What was answered and isn't committed."""

    group: Group


_held = _Held()


def _twice(apply: Any, store: Any, group: Group, now_ms: int) -> list[Any]:
    """Run every group of plain puts twice, as who doesn't look whether it was committed."""
    outcomes = apply(store, group, now_ms)
    if None not in group[::PLACES]:
        apply(store, group, now_ms)
    return outcomes  # type: ignore[no-any-return]


class Plant(NamedTuple):
    """A defect, and the kinds of findings that it may be told as."""

    plant: Callable[[], None]
    kinds: set[str]


PLANTS = {
    "lose-put": Plant(_instead(_lose_put), {"hole", "version"}),
    "lose-batch": Plant(_instead(_lose_batch), {"hole", "version", "split", "lost"}),
    "answer-early": Plant(_instead(_answer_early), {"lost", "hole", "version", "split"}),
    "twice": Plant(_instead(_twice), {"version"}),
}


def _not_synced() -> None:
    """Answer commits that are on no medium, whatever the durability."""
    from persistency.storage.postgres.session import Session

    set_syncs = Session.set_syncs
    replace_method(Session, "set_syncs", lambda self, _on: set_syncs(self, False))


RESTART_PLANTS: dict[str, Callable[[], None]] = {"not-synced": _not_synced, "done-again": nothing_checked}
"""What a server that is restarted shows: the second doesn't look whether what is in doubt has happened."""
