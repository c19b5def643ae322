"""Planted defects: each spoils the engine in this process in one way that a kill test must see."""

from __future__ import annotations

import os
import signal
from typing import Any

from persistency import Job
from persistency.actor.settling import ready
from persistency.storage.port import PLACES, Barrier, Batch, Group
from persistency.storage.sqlite import SqliteStore
from tests.crash.running import replace_method

_apply = SqliteStore.apply


def _batches(group: Group) -> list[int]:
    return [at for at in range(0, len(group), PLACES) if type(group[at + 1]) is Batch]


def _lose_batch(self: SqliteStore, group: Group, now_ms: int) -> list[Any]:
    """Leave the first batch of every group out, and say it was written."""
    batches = _batches(group)
    if not batches:
        return _apply(self, group, now_ms)
    at = batches[0]
    outcomes = _apply(self, group[:at] + group[at + PLACES :], now_ms)
    outcomes.insert(at // PLACES, self.status().last_version)
    return outcomes


def _split_batch(self: SqliteStore, group: Group, now_ms: int) -> list[Any]:
    """Write a batch in two transactions, and die between them."""
    batches = _batches(group)
    # The rows that were flushed before are what tells a death in the middle from one at the start.
    if not batches or self.status().last_version < 500:
        return _apply(self, group, now_ms)
    items = group[batches[0] + 1].items
    half = len(items) // (2 * PLACES) * PLACES
    _apply(self, [*group[: batches[0]], *items[:half]], now_ms)
    os.kill(os.getpid(), signal.SIGKILL)
    return []


def _swap_halves(self: SqliteStore, group: Group, now_ms: int) -> list[Any]:
    """Write the second half of every group of plain puts before the first."""
    if None in group[::PLACES] or len(group) < 2 * PLACES:
        return _apply(self, group, now_ms)
    half = len(group) // (2 * PLACES) * PLACES
    return _apply(self, group[half:] + group[:half], now_ms)


def _lose_put(self: SqliteStore, group: Group, now_ms: int) -> list[Any]:
    """Leave a plain put out, and say it was written."""
    if None in group[::PLACES] or len(group) < 2 * PLACES:
        return _apply(self, group, now_ms)
    return [None, *_apply(self, group[PLACES:], now_ms)]


_held: Group = []


def _answer_early(self: SqliteStore, group: Group, now_ms: int) -> list[Any]:
    """Answer a group with a barrier in it without writing it; what it holds is written with the next one."""
    before = len(_held) // PLACES
    _held.extend(group)
    if any(type(message) is Barrier for message in group[1::PLACES]):
        return [None] * (len(group) // PLACES)
    outcomes = _apply(self, _held, now_ms)[before:]
    _held.clear()
    return outcomes


def _commit_without_version(self: SqliteStore, _before: int, **_how: bool) -> None:
    self._execute("COMMIT")


def plant(name: str) -> None:
    """Spoil the engine of this process."""
    if name == "answer before posting":
        replace_method(Job, "flush", lambda _self, *, sync=False: ready())  # a barrier that is none
    elif name == "version not stored":
        replace_method(SqliteStore, "_commit", _commit_without_version)
    else:
        replace_method(SqliteStore, "apply", _APPLIES[name])


_APPLIES: dict[str, Any] = {
    "lost batch": _lose_batch,
    "lost put": _lose_put,
    "split batch": _split_batch,
    "swapped halves": _swap_halves,
    "answer before commit": _answer_early,
}

# Each with the kinds of finding that may report it.
PLANTS: dict[str, set[str]] = {
    "lost batch": {"hole", "lost", "version"},
    "lost put": {"hole", "lost", "version"},
    "split batch": {"split"},
    "swapped halves": {"hole", "version"},
    "answer before commit": {"lost"},
    "answer before posting": {"lost"},
    "version not stored": {"version", "file"},  # or opening says that writes are lost
}
