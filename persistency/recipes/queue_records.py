"""What a queue stores of its messages and of itself, and how that is written down.

Rules:
  1. The head and the states have a fixed width, but for what of an error's text is longer than the room for it. So what
     was put can be taken, and told anything, in a job that is full.
  2. What is read is judged: a damaged state is none, and a head that isn't one is `Corrupt`.

Doesn't know: which rows there are, and when they change.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from persistency import Corrupt

ERROR_ROOM = 24  # a state row has room for an error of so many bytes from the beginning
ATTEMPTS_MAX = 2**32 - 1
_STATE = struct.Struct(">cBIIqqqqH")
_STATE_MARK = b"s"
_HEAD_ROW = struct.Struct(">cq?qqqqq")
_HEAD_MARK = b"q"


class Kind(IntEnum):
    """The states of a message."""

    READY = 0
    DELAYED = 1
    TAKEN = 2
    DEAD = 3


_KINDS = frozenset(int(kind) for kind in Kind)


class State(NamedTuple):
    """What is known of a message. `when_ms` is until when it is delayed or taken, or since when it is dead.

    `attempts_max` is that of the queue by which it was taken: whoever sees that its lease is over goes by it.
    """

    kind: int
    attempt: int
    place: int
    when_ms: int
    token: int
    put_ms: int
    error: str | None
    attempts_max: int = 0

    def encoded(self) -> bytes:
        """Return it as it is stored."""
        kind, attempt, place, when_ms, token, put_ms, error, attempts_max = self
        text = b"" if error is None else error.encode()
        size = 0 if error is None else len(text) + 1  # 0: none, which isn't an empty one
        fixed = _STATE.pack(_STATE_MARK, kind, attempt, attempts_max, place, when_ms, token, put_ms, size)
        return fixed + text.ljust(ERROR_ROOM, b"\0")

    @staticmethod
    def decoded(payload: bytes) -> State | None:
        """Return what was stored, or `None` if that is damaged."""
        try:
            mark, kind, attempt, attempts_max, place, when_ms, token, put_ms, size = _STATE.unpack_from(payload)
            text = payload[_STATE.size :]
            if mark != _STATE_MARK or kind not in _KINDS or len(text) != max(ERROR_ROOM, size - 1):
                return None
            error = text[: size - 1].decode() if size else None
        except (struct.error, UnicodeDecodeError):
            return None
        return State(kind, attempt, place, when_ms, token, put_ms, error, attempts_max)


class Stored(NamedTuple):
    """A message as it is stored."""

    id: int
    body: bytes
    state: State


class Terms(NamedTuple):
    """How often a message is tried, and how long it waits in between."""

    attempts_max: int
    backoff_ms: int
    backoff_max_ms: int

    def pause_ms(self, attempt: int) -> int:
        """Return how long a message waits after an attempt that failed: twice as long after each."""
        return min(self.backoff_max_ms, self.backoff_ms << min(attempt - 1, 62))


class Head:
    """The one row that every verb reads. `wake_ms`: nothing is due before."""

    __slots__ = ("before", "counts", "last", "lined_up", "wake_before_ms", "wake_ms")

    def __init__(self, payload: bytes | None) -> None:
        self.before: bytes | None = payload
        self.lined_up: int = 0
        self.last: int = 0
        self.wake_ms: int | None = None
        self.counts: list[int] = [0, 0, 0, 0]
        if payload is not None:
            if len(payload) != _HEAD_ROW.size or payload[:1] != _HEAD_MARK:
                raise foreign()
            _, self.last, wakes, wake_ms, *self.counts = _HEAD_ROW.unpack(payload)
            self.wake_ms = wake_ms if wakes else None
        self.wake_before_ms: int | None = self.wake_ms

    def encoded(self) -> bytes:
        """Return it as it is stored."""
        wakes, wake_ms = self.wake_ms is not None, self.wake_ms or 0
        return _HEAD_ROW.pack(_HEAD_MARK, self.last, wakes, wake_ms, *self.counts)

    def next_number(self) -> int:
        """Give the next number."""
        self.last += 1
        return self.last


def foreign() -> Corrupt:
    """Return what is raised where a category holds something else."""
    return Corrupt("a queue's category has rows that aren't a queue's", hint="Use another name.")
