"""Bounds: how much may wait in a mailbox, how much does, and who waits to get in.

Rules:
  1. Every bound has its unit in its name, and there is none that can't be set.
  2. A poster is let in or refused by whoever makes room; its own thread only sleeps on its bell.

Doesn't know: the line itself.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from typing import Any, Literal

from persistency.errors import PersistencyError

OnFull = Literal["block", "raise"]
Refusal = Callable[[], PersistencyError]


@dataclass(frozen=True, slots=True)
class Level:
    """How much is waiting, and how many write operations were taken but aren't decided yet."""

    ops: int
    nbytes: int
    requests: int
    in_flight: int


@dataclass(frozen=True, slots=True)
class Bounds:
    """How much may wait: write operations, their bytes, requests; and what a plain thread does where it is full."""

    ops_max: int = 8192
    bytes_max: int = 32 * 1024 * 1024
    requests_max: int = 8192
    on_full: OnFull = "block"
    full_timeout: float | None = 60.0
    inline: bool = True

    def fit(self, level: Level, ops: int, nbytes: int, requests: int, factor: int) -> bool:
        """Say whether so much more fits under the bounds times a factor; writes fit into an empty line, however big."""
        if requests and level.requests + requests > self.requests_max * factor:
            return False
        if not ops or not level.ops:
            return True
        return level.ops + ops <= self.ops_max * factor and level.nbytes + nbytes <= self.bytes_max * factor

    def low(self, level: Level) -> bool:
        """Say whether no more than half of every bound is waiting."""
        return (
            level.ops <= self.ops_max // 2
            and level.nbytes <= self.bytes_max // 2
            and level.requests <= self.requests_max // 2
        )


class Poster:
    """A thread that waits for room: what it wants to post, and a bell to wake it."""

    __slots__ = ("bell", "nbytes", "ops", "places", "refused", "requests", "thread")

    def __init__(self, places: tuple[Any, Any, Any], ops: int, nbytes: int, requests: int) -> None:
        self.places = places
        self.ops = ops
        self.nbytes = nbytes
        self.requests = requests
        self.thread = get_ident()
        self.refused: PersistencyError | None = None
        self.bell = threading.Lock()
        self.bell.acquire()
