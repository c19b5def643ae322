"""The verbs of the port: what a group may hold besides plain puts, and what comes back.

A *group* is one flat list, three places per message, so that a queued write costs three pointers and no
object of its own:

    category, key, payload      a plain put: three `bytes`
    None, message, token        anything else; the token is the actor's own and is never looked at here

Rules:
  1. A message is a tuple of plain values; what it is about is said in its docstring, and what its answer is.
  2. A message is a write, a read, or neither (a barrier, what a store does for itself).

Doesn't know: who runs them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias

ChangeKind: TypeAlias = Literal["put", "delete", "expire", "delete_range"]
Group: TypeAlias = list[Any]
PLACES = 3  # per message of a group


# Writes:


class SetRow(NamedTuple):
    """Store a row that ends at `expires_ms` (`None`: never), as a plain put does one without an end. Answer: `None`.

    `origin` belongs to the caller.
    """

    category: bytes
    key: bytes
    payload: bytes
    expires_ms: int | None
    origin: Any = None


class DropRow(NamedTuple):
    """Remove one row. Answer: whether a live one was there."""

    category: bytes
    key: bytes


class DropRange(NamedTuple):
    """Remove the rows with start <= key < stop (`None`: no upper bound). Answer: how many were live."""

    category: bytes
    start: bytes
    stop: bytes | None


class SwapRow(NamedTuple):
    """Put `payload` in the place of a row that is `expected`; `None` is no row, on either side.

    Answer: whether it was. The new row ends at `expires_ms` (`None`: never).
    """

    category: bytes
    key: bytes
    expected: bytes | None
    payload: bytes | None
    expires_ms: int | None


class TouchRow(NamedTuple):
    """Give a live row another end (`None`: none); payload and version stay. Answer: whether a live one was there."""

    category: bytes
    key: bytes
    expires_ms: int | None


class Expect(NamedTuple):
    """Inside a batch only: the row's version must be this before the batch (`None`: no live row)."""

    category: bytes
    key: bytes
    version: int | None


class Batch(NamedTuple):
    """A group within the group, all or nothing: puts, drops and `Expect`s only. Answer: its last version.

    `ops` is the number of its operations, `expects` whether any is an `Expect`; `origin` belongs to the caller.
    """

    items: Group
    ops: int
    expects: bool
    origin: tuple[Any, ...] = ()


class Run(NamedTuple):
    """Call `fn(within)` inside the transaction, its writes all or nothing. Answer: what it returns.

    If it raises, its writes are undone alone and what it raised is the outcome. It is called again if the transaction
    has to be, so it may have no effects elsewhere. `origin` belongs to the caller.
    """

    fn: Callable[[Within], Any]
    origin: tuple[Any, ...] = ()


class GiveBack(NamedTuple):
    """Give at most so many unused pages of the file back. Answer: how many unused ones are left.

    `None` where the file has no way to do it in parts: then `Barrier.rebuild` does it in one.
    """

    pages: int


class Reap(NamedTuple):
    """Take at most `limit` rows away that are no longer live. Answer: how many. For `Store.reap` alone."""

    limit: int


# Reads and barriers:


class GetRow(NamedTuple):
    """Answer: the payload, or `None`."""

    category: bytes
    key: bytes


class HasRow(NamedTuple):
    """Answer: whether there is a live row; its payload is not read."""

    category: bytes
    key: bytes


class GetEntry(NamedTuple):
    """Answer: a `StoredRow`, or `None`."""

    category: bytes
    key: bytes


class GetRows(NamedTuple):
    """Answer: (key, payload) pairs in the order asked, the missing left out."""

    category: bytes
    keys: tuple[bytes, ...]


class ScanRange(NamedTuple):
    """Answer: (key, payload) pairs with start <= key < stop in key order, at most `limit` of them.

    With `keys_only` the payloads are left empty.
    """

    category: bytes
    start: bytes
    stop: bytes | None
    reverse: bool = False
    limit: int | None = None
    keys_only: bool = False


class CountRange(NamedTuple):
    """Answer: how many live rows have start <= key < stop."""

    category: bytes
    start: bytes
    stop: bytes | None


class ListCategories(NamedTuple):
    """Answer: the categories that have a live row, in byte order."""


class ListEntries(NamedTuple):
    """Answer: every live row of a category as a `StoredRow`, in the order of versions."""

    category: bytes


class ListRows(NamedTuple):
    """Answer: `StoredRow`s of a category in key order, from `start` on: so many at the most, and none behind the one
    that makes keys and payloads come to `bytes_max`.
    """

    category: bytes
    start: bytes
    rows_max: int
    bytes_max: int


class UsedBytes(NamedTuple):
    """Answer: how many bytes the payloads of all live rows have."""


class ListChanges(NamedTuple):
    """Answer: the first `limit` changes with a version above `after`, as `StoredChange`s in order.

    `Failed(FeedTruncated)` if one of those is no longer kept. Whether the caller will `wait` is nothing to a store;
    `origin` belongs to the caller.
    """

    after: int
    limit: int
    wait: bool = False
    origin: Any = None


class LastVersion(NamedTuple):
    """Answer: the version of the last operation applied."""


class Extent(NamedTuple):
    """Answer: how many bytes the rows and what is unused between them take up, the log apart."""


class BackUp(NamedTuple):
    """Answer: the steps that copy the rows as they are when the first is taken to `target`, a file.

    Steps are a generator, to be run beside the job, by any thread: it yields how far it is (bytes done, of how many).
    """

    target: Path


class CheckUp(NamedTuple):
    """Answer: the steps that look for what is wrong with what is kept; what they return is a list of texts."""


class Barrier(NamedTuple):
    """Answer: `None`, once all before it is committed; with `sync`, once it is on the medium.

    With `fold` the log is carried over into the file afterwards and cut off, as far as nobody else is reading from it;
    with `rebuild` the file is written anew before, without its unused pages. Both can't fail by themselves.
    """

    sync: bool = False
    fold: bool = False
    rebuild: bool = False


class StoredRow(NamedTuple):
    """One row as the engine keeps it."""

    key: bytes
    payload: bytes
    version: int
    expires_ms: int | None


class StoredChange(NamedTuple):
    """One change as the engine keeps it. `stop` is a range's (`None`: to the last key), `payload` a put's."""

    version: int
    kind: ChangeKind
    category: bytes
    key: bytes
    payload: bytes | None
    stop: bytes | None


class Failed(NamedTuple):
    """The outcome of a message that failed by itself."""

    error: BaseException


READS: frozenset[type] = frozenset(
    {
        GetRow,
        HasRow,
        GetEntry,
        GetRows,
        ScanRange,
        CountRange,
        ListCategories,
        ListEntries,
        ListRows,
        UsedBytes,
        ListChanges,
        LastVersion,
        Extent,
        BackUp,
        CheckUp,
    }
)
# What a run's function may do.
WITHIN: frozenset[type] = READS | {SetRow, DropRow, DropRange, SwapRow, TouchRow, Batch, Run}
# Messages that are no operation of a caller's.
_NO_OPERATION = READS | {Barrier, Reap, GiveBack}


def operations(message: Any) -> int:
    """Return how many write operations a message is; a read or a barrier is none."""
    kind = type(message)
    if kind is Batch:
        return int(message.ops)
    return 0 if kind in _NO_OPERATION else 1


def writes(group: Group) -> bool:
    """Say whether a group holds a write operation."""
    if len(group) == PLACES and type(group[1]) is GetRow:
        return False  # the usual one
    messages = zip(group[::PLACES], group[1::PLACES], strict=True)
    return any(category is not None or operations(message) for category, message in messages)


class Within(Protocol):
    """What a `Run`'s function gets: the rows as its transaction sees them, its own writes included."""

    @property
    def version(self) -> int:
        """The last version given, the transaction's own included."""
        raise NotImplementedError

    def do(self, message: Any, /) -> Any:
        """Run one message, read or write, now, and return its answer; raise what would be a `Failed` outcome."""


class Doing:
    """A `Within` made of one function; one for all runs of a store, as inner ones see outer ones."""

    __slots__ = ("do", "version")

    def __init__(self, do: Callable[[Any], Any]) -> None:
        self.do: Callable[[Any], Any] = do
        self.version: int = 0
