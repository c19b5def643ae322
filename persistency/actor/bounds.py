"""Bounds: how much may wait in a mailbox, how much does, and who waits to get in.

Rules:
  1. Every bound has its unit in its name, and there is none that can't be set.
  2. A poster is let in or refused by whoever makes room; its own thread only sleeps on its bell.
  3. First come, first served, among writes and among requests; neither kind waits behind the other.

Doesn't know: the line itself. Whoever calls holds the mailbox's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from threading import get_ident
from typing import Any, Literal, NamedTuple

from persistency.errors import Overloaded, PersistencyError

OnFull = Literal["block", "raise"]


class Level(NamedTuple):
    """How much is waiting, and how many write operations were accepted in all."""

    ops: int
    nbytes: int
    requests: int
    accepted: int


class Bounds(NamedTuple):
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


def overloaded(level: Level, why: str) -> Overloaded:
    """Return the error that says what is waiting, and why the poster may not."""
    waiting = f"{level.ops} operations, {level.nbytes} bytes, {level.requests} requests waiting"
    return Overloaded(f"the mailbox is full ({waiting}), {why}")


class Poster:
    """A thread that waits for room: what it wants to post, and a bell to wake it."""

    __slots__ = ("bell", "let_in", "nbytes", "ops", "places", "refused", "requests", "thread")

    def __init__(self, places: tuple[Any, Any, Any], ops: int, nbytes: int, requests: int) -> None:
        self.places: tuple[Any, Any, Any] = places
        self.ops: int = ops
        self.nbytes: int = nbytes
        self.requests: int = requests
        self.thread: int = get_ident()
        self.let_in: bool = False
        self.refused: PersistencyError | None = None
        self.bell: threading.Lock = threading.Lock()
        self.bell.acquire()


class Queue:
    """Those who wait for room, in the order they came."""

    def __init__(self) -> None:
        self._posters: list[Poster] = []

    def __len__(self) -> int:
        return len(self._posters)

    def join(self, poster: Poster) -> None:
        """Stand at the end."""
        self._posters.append(poster)

    def ahead(self, ops: int) -> bool:
        """Say whether somebody who wants to post the same kind of message waits already."""
        return any(bool(waiting.ops) == bool(ops) for waiting in self._posters)

    def holds(self, thread: int) -> bool:
        """Say whether a thread waits here."""
        return any(waiting.thread == thread for waiting in self._posters)

    def leave(self, poster: Poster) -> None:
        """Stop waiting."""
        if poster in self._posters:
            self._posters.remove(poster)

    def admit(self, fits: Callable[[Poster], bool], post: Callable[[Poster], None]) -> None:
        """Let in whom there is room for. One by one and in place: an interrupt in between forgets nobody."""
        stuck: set[bool] = set()
        at = 0
        while at < len(self._posters):
            poster = self._posters[at]
            kind = bool(poster.ops)
            if kind in stuck or not fits(poster):
                stuck.add(kind)
                at += 1
            else:
                poster.let_in = True
                del self._posters[at]
                post(poster)
                poster.bell.release()

    def refuse(self, refusal: Callable[[], PersistencyError]) -> None:
        """Tell all of them that there will be no room."""
        while self._posters:
            poster = self._posters.pop(0)
            poster.refused = refusal()
            poster.bell.release()


def standing(line: list[Any]) -> list[Any]:
    """Return a line without the requests that were withdrawn from it."""
    kept = [at for at in range(0, len(line), 3) if line[at] is not None or getattr(line[at + 2], "_ticket", 0) != -1]
    return [place for at in kept for place in line[at : at + 3]]
