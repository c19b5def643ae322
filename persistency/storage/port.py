"""The storage port: what the actor may ask of a storage engine, in words of groups, rows and ranges.

A *group* is one flat list, three places per message, so that a queued write costs three pointers and no
object of its own:

    category, key, payload      a plain put: three `bytes`
    None, message, token        anything else; the token is the actor's own and is never looked at here

Rules:
  1. `apply` runs a whole group in one transaction, in order, reads among the writes, and returns one outcome
     per message: the answer (`None` for a plain put), or `Failed` for a message that failed by itself and was
     undone alone.
  2. A failed `Expect` is an outcome, never an exception. What `apply` raises is the environment's fault
     (`StorageError`): then nothing of the group was applied. `OutcomeUnknown` is the one exception to that.
  3. Every operation takes one version, in order, but a `SwapRow` or `TouchRow` that doesn't come to pass takes none;
     the last version is written in the group's own transaction.
  4. Time is an argument: a row is live if and only if `now_ms < expires_ms`. A row that isn't is no row, to whatever
     asks; it stays where it is until it is written over or `reap` takes it away.
  5. One user at a time; which thread that is doesn't matter.
  6. What only some engines can do is a protocol of its own, never a method that raises.

Doesn't know: threads, futures, key tuples, SQL, clocks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

Durability: TypeAlias = Literal["process", "power"]
ChangeKind: TypeAlias = Literal["put", "delete", "expire", "delete_range"]
Group: TypeAlias = list[Any]
PLACES = 3  # per message of a group

PAYLOAD_BYTES_MAX = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """What a job's store is opened with.

    `max_bytes` bounds the payloads of all live rows together (`None`: no bound); `feed_changes_max` is how many
    changes are kept (0: none).
    """

    durability: Durability = "process"
    max_bytes: int | None = None
    feed_changes_max: int = 0


# What a group may hold besides plain puts. Writes:


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


class Barrier(NamedTuple):
    """Answer: `None`, once all before it is committed; with `sync`, once it is on the medium."""

    sync: bool = False


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
        UsedBytes,
        ListChanges,
        LastVersion,
    }
)
# Messages that are no operation of a caller's.
_NO_OPERATION = READS | {Barrier, Reap}


def operations(message: Any) -> int:
    """Return how many write operations a message is; a read or a barrier is none."""
    kind = type(message)
    if kind is Batch:
        return int(message.ops)
    return 0 if kind in _NO_OPERATION else 1


def writes(group: Group) -> bool:
    """Say whether a group holds a write operation."""
    messages = zip(group[::PLACES], group[1::PLACES], strict=True)
    return any(category is not None or operations(message) for category, message in messages)


class Within(Protocol):
    """What a `Run`'s function gets: the rows as its transaction sees them, its own writes included."""

    @property
    def version(self) -> int:
        """The last version given, the transaction's own included."""

    def do(self, message: Any) -> Any:
        """Run one message, read or write, now, and return its answer; raise what would be a `Failed` outcome."""


class OutcomeUnknown(Exception):
    """COMMIT failed and whether it happened can't be told on this connection; the cause says why."""


class Status(NamedTuple):
    """Numbers about a store.

    Its last version, the size of its write-ahead log in bytes, and the latest time it was told (that of earlier
    openings too, where rows have an end): a job's time never goes back behind it.
    """

    last_version: int
    wal_bytes: int
    latest_ms: int = 0


class StoredJob(NamedTuple):
    """A job as it lies in its root, open or not: `path` its file, `bytes` the size of all its files."""

    job_id: str
    path: Path
    bytes: int


class Store(Protocol):
    """One job's rows. Used by whoever holds the job's turn, by nobody else."""

    reads_in_place: bool
    """Whether a read is cheap enough to be run by its caller (a network round trip is not)."""

    @property
    def next_expiry_ms(self) -> int | None:
        """No row ends before this (`None`: no row ends). Any thread may look."""

    def apply(self, group: Group, now_ms: int) -> list[Any]:
        """Run a group in one transaction; return one outcome per message, in order."""

    def get(self, category: bytes, key: bytes, now_ms: int) -> bytes | None:
        """Return the payload of a live row, or `None`."""

    def scan(self, span: ScanRange, now_ms: int) -> list[tuple[bytes, bytes]]:
        """Return the live rows of a range."""

    def read(self, message: Any, now_ms: int) -> Any:
        """Answer one read message outside any group; a `Failed` outcome is returned, not raised."""

    def reap(self, now_ms: int, limit: int) -> int:
        """Take at most `limit` rows away that are no longer live; return how many there were."""

    def status(self) -> Status:
        """Return the numbers; any thread may ask."""

    def close(self, *, tidy: bool = True) -> None:
        """Give up everything that is held; nothing is called afterwards. Not `tidy`: without writing anything more."""


@runtime_checkable
class Checkpointing(Protocol):
    """A store whose log wants to be carried over into its file now and then, between groups."""

    def checkpoint_due(self, *, idle: bool) -> bool:
        """Say whether `checkpoint` should be called now; `idle`: nobody is waiting. Any thread may ask."""

    def checkpoint(self) -> None:
        """Carry the log over."""

    def settle(self) -> None:
        """Leave the file as a clean close would, without closing it."""


class Root(Protocol):
    """Where jobs live."""

    def open(self, job_id: str, options: StoreOptions) -> Store:
        """Open a job's store and take ownership of it; raise `JobLocked` if another process has it."""

    def path(self, job_id: str) -> Path | None:
        """Return the file of a job, existing or not; `None` if jobs have none here. Raise `Misuse` for a bad id."""

    def stored(self) -> list[StoredJob]:
        """Return every job that is kept here, open or not, by id."""

    def drop(self, job_id: str) -> list[Path]:
        """Delete a job nobody has open; return the files removed. One that never existed is fine."""
