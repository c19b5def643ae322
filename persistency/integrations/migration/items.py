"""Items: what an origin has, as it is found there, and what can be said of one that can't come along.

Rules:
  1. An origin gives every item it has, the damaged ones too: what can't be read stands there as `Lost`.
  2. What is a pickle stands there as `Pickled`, its bytes: no origin reads one.
  3. An origin that has to look for long before it gives something gives `None` meanwhile, so that it can be stopped.
  4. What is costly to get, such as the value in a file of its own, is got when it is asked for, by `Later`.

Doesn't know: where items come from, and where they go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from persistency import Misuse


class Reason(StrEnum):
    """Why an item can't come along."""

    pickled_value = "the value is a pickle"
    """Nobody has asked to read pickles."""
    pickled_key = "the key is a pickle"
    """The same, of a key."""
    unread = "a pickle can't be read"
    """It holds more than plain data, costs too much, or is damaged; or reading it has failed, where it is trusted."""
    damaged = "damaged"
    """The origin itself can't have meant this: bytes that aren't what they are said to be."""
    file = "its file can't be read"
    """Of diskcache: the file of a value is missing, or isn't a file within the directory of the cache."""
    no_key = "no key for it"
    """The key is of a type that a key's part can't have, or too long."""
    no_value = "no value for it"
    """The value is of a type that the codec can't encode."""
    large = "too large"
    """The value is larger than a payload may be."""


class Lost(Exception):
    """An item, or a part of it, that can't come along."""

    def __init__(self, reason: Reason, why: str) -> None:
        super().__init__(reason, why)
        self.reason: Reason = reason
        self.why: str = why


class Pickled(NamedTuple):
    """A key or a value that is a pickle."""

    data: bytes


class Later(NamedTuple):
    """A value that is read when it is wanted."""

    read: Callable[[], Any]


class Item(NamedTuple):
    """One item of an origin.

    `key` and `value` are the objects, or `Pickled`, or `Lost`; `value` may be `Later`. `ends`: Unix seconds, `None`
    for never. `tagged` says that it has something which stays behind, such as a tag.
    """

    key: Any
    value: Any
    ends: float | None = None
    tagged: bool = False


class Part(Protocol):
    """A table of an origin: what becomes one category."""

    @property
    def name(self) -> str | None:
        """Its name; `None` if it is what its origin consists of."""
        raise NotImplementedError

    @property
    def count(self) -> int:
        """How many items it had when it was opened; 0 if that can't be told."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Item | None]:
        """Give its items, and `None` now and then where the next one takes long."""
        raise NotImplementedError


class Parts(list[Part]):
    """The parts of an origin, and what else is in it.

    `passed_over`: what isn't taken for a part, by name, with why. `guessed`: what was taken for something that nothing
    says it is, by the name of the part; it is complete once all parts have given their items.
    """

    def __init__(self, parts: Iterable[Part], passed_over: dict[str, str], guessed: dict[str, str]) -> None:
        super().__init__(parts)
        self.passed_over: dict[str, str] = passed_over
        self.guessed: dict[str, str] = guessed


class Origin(Protocol):
    """Where items come from: a kind of store, and a place.

    `path` is the file or directory. `open` gives its parts, to be read until the context is left: a `Parts`, where
    something of it is passed over or guessed. It raises
    `FileNotFoundError` if nothing is there, `Corrupt` if it is nothing of the kind, `Misuse` for what was asked for
    and isn't there.
    """

    @property
    def path(self) -> Path:
        """The file or directory."""
        raise NotImplementedError

    def open(self) -> AbstractContextManager[Sequence[Part]]:
        """Open it, to be read and never written."""
        raise NotImplementedError


def chosen(names: Sequence[str | None], tables: Iterable[str] | None, path: Path) -> set[str | None]:
    """Return the names of the parts that are wanted; `None`: all. Raises `Misuse` for one that isn't there.

    The empty name stands for the part that has none.
    """
    if tables is None:
        return set(names)
    wanted: list[Any] = [None] if isinstance(tables, str) else list(tables)
    if not all(isinstance(table, str) for table in wanted):
        raise Misuse("tables must be a list of names: pass ['users']")
    if None in names:
        wanted = [table or None for table in wanted]
    for table in wanted:
        if table not in names:
            there = ", ".join(repr(name) for name in names if name is not None)
            raise Misuse(f"{path} has no table {table!r}", hint=f"It has: {there or 'none that has a name'}.")
    return set(wanted)
