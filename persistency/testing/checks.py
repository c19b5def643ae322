"""What the checks of a storage adapter are made of: stores opened and closed, groups put together, answers compared.

Rules:
  1. A store is closed whatever happens, and what it was expected to answer is in the message of the error.
  2. Answers are compared with their types: `True` is not 1.

Doesn't know: what is checked, pytest, any adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from persistency.errors import FeedTruncated, QuotaExceeded
from persistency.storage.port import (
    Batch,
    ChangeKind,
    Expect,
    Failed,
    GetEntry,
    Group,
    ListCategories,
    ListChanges,
    Run,
    ScanRange,
    Store,
    StoredChange,
    StoredRow,
    StoreOptions,
    UsedBytes,
    Within,
)

NOW_MS = 1_000_000
END_MS = NOW_MS + 1_000  # when most rows end that do
PLAIN = StoreOptions()
TEN = StoreOptions(max_bytes=10)
KEEPING = StoreOptions(feed_changes_max=1000)
ALL = 10**6  # changes, more than there ever are


def put(category: bytes, key: bytes, payload: bytes) -> Group:
    """Return a plain put as the three places of a group."""
    return [category, key, payload]


def group(*messages: Any) -> Group:
    """Return a group of plain puts (lists of three places, as `put` gives) and messages, in this order."""
    places: Group = []
    for message in messages:
        places += message if isinstance(message, list) else [None, message, None]
    return places


def batch(*items: Any) -> Batch:
    """Return a batch of plain puts, writes and `Expect`s."""
    return Batch(group(*items), len(items), any(isinstance(item, Expect) for item in items))


class Stop(Exception):
    """What the functions of these checks raise."""


def doing(*messages: Any, error: BaseException | None = None) -> Run:
    """Return a run that does these messages and returns their answers and versions, or raises an error after them."""

    def fn(within: Within) -> list[Any]:
        told = [(within.do(message), within.version) for message in messages]
        if error is not None:
            raise error
        return told

    return Run(fn)


def trying(message: Any, then: Callable[[Within, BaseException | None], Any]) -> Run:
    """Return a run that does a message, whatever it raises, and goes on from there."""

    def fn(within: Within) -> Any:
        try:
            within.do(message)
        except BaseException as error:
            return then(within, error)
        return then(within, None)

    return Run(fn)


def wrote(version: int, category: bytes, key: bytes, payload: bytes) -> StoredChange:
    """Return the change of a put."""
    return StoredChange(version, "put", category, key, payload, None)


def told(version: int, kind: ChangeKind, category: bytes, key: bytes, stop: bytes | None = None) -> StoredChange:
    """Return the change of what isn't a put."""
    return StoredChange(version, kind, category, key, None, stop)


def dump(store: Store, now_ms: int = NOW_MS) -> dict[bytes, list[StoredRow]]:
    """Return every live row a store holds, by category, as its reads tell them."""
    return {
        category: [
            store.read(GetEntry(category, key), now_ms)
            for key, _ in store.scan(ScanRange(category, b"", None, keys_only=True), now_ms)
        ]
        for category in store.read(ListCategories(), now_ms)
    }


def used(store: Store, now_ms: int = NOW_MS) -> Any:
    """Return how many bytes a store says are in use."""
    return store.read(UsedBytes(), now_ms)


def changes(store: Store, after: int = 0, limit: int = ALL, now_ms: int = NOW_MS) -> Any:
    """Return what a store answers about its changes."""
    return store.read(ListChanges(after, limit), now_ms)


def same(got: Any, expected: Any, what: str) -> None:
    """Raise `AssertionError` unless what was got equals what was expected, in type too."""
    if got != expected or (isinstance(expected, (bool, int)) and type(got) is not type(expected)):
        raise AssertionError(f"{what}: expected {_short(expected)}, got {_short(got)}")


def answers(got: Sequence[Any], expected: Sequence[Any], what: str) -> None:
    """Raise `AssertionError` unless each answer is the expected one, in type too."""
    same(len(got), len(expected), f"{what}, the number of answers")
    for at, (one, other) in enumerate(zip(got, expected, strict=True)):
        same(one, other, f"{what}, answer {at} of {len(expected)}")


def holds(condition: bool, what: str, got: Any) -> None:
    """Raise `AssertionError` unless something is so."""
    if not condition:
        raise AssertionError(f"expected {what}, got {_short(got)}")


def failed(outcome: Any, kind: type[BaseException], expected: dict[str, Any], what: str) -> None:
    """Raise `AssertionError` unless an outcome is a failure of this kind, whose error has these attributes."""
    if not isinstance(outcome, Failed) or not isinstance(outcome.error, kind):
        raise AssertionError(f"{what}: expected Failed({kind.__name__}), got {_short(outcome)}")
    same({name: getattr(outcome.error, name) for name in expected}, expected, f"{what}, its error")


def refused(outcome: Any, nbytes: int, limit: int, what: str) -> None:
    """Raise `AssertionError` unless an outcome says that so many bytes would have been in use."""
    failed(outcome, QuotaExceeded, {"used": nbytes, "limit": limit}, what)


def at_most(store: Store, end_ms: int, what: str) -> None:
    """Raise `AssertionError` if a store says that no row ends before some time, and one does."""
    got = store.next_expiry_ms
    holds(got is not None and got <= end_ms, f"a next end of at most {end_ms} {what}", got)


def truncated(outcome: Any, oldest: int, what: str) -> None:
    """Raise `AssertionError` unless an outcome says that changes before this version are gone."""
    failed(outcome, FeedTruncated, {"oldest": oldest}, what)


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 300 else repr(value)[:300] + "..."


class Checks:
    """What every set of checks stands on: how a store is opened."""

    def open_store(self, options: StoreOptions) -> Store:
        """Return a new, empty store, opened with these options. To be overridden."""
        raise NotImplementedError("override open_store(options) to return a new, empty store of your adapter")

    def reopen_store(self, options: StoreOptions) -> Store | None:  # noqa: ARG002
        """Return the store opened last, after its `close`, open again; `None` if its rows end with it."""
        return None

    @contextmanager
    def store(self, options: StoreOptions = PLAIN) -> Iterator[Store]:
        """Give a new store and close it whatever happens."""
        store = self.open_store(options)
        try:
            yield store
        finally:
            store.close()

    @contextmanager
    def reopened(self, options: StoreOptions = PLAIN) -> Iterator[Store | None]:
        """Give the store opened last once more and close it whatever happens; `None` if its rows ended with it."""
        store = self.reopen_store(options)
        try:
            yield store
        finally:
            if store is not None:
                store.close()
