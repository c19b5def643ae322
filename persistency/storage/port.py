"""The storage port: what the actor may ask of a storage engine, in words of groups, rows and ranges.

What a group is, and the messages it may hold, `storage.verbs` says; they are this module's names too.

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
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from persistency.storage.verbs import (
    PLACES,
    READS,
    WITHIN,
    BackUp,
    Barrier,
    Batch,
    ChangeKind,
    CheckUp,
    CountRange,
    Doing,
    DropRange,
    DropRow,
    Expect,
    Extent,
    Failed,
    GetEntry,
    GetRow,
    GetRows,
    GiveBack,
    Group,
    HasRow,
    LastVersion,
    ListCategories,
    ListChanges,
    ListEntries,
    ListRows,
    Reap,
    Run,
    ScanRange,
    SetRow,
    StoredChange,
    StoredRow,
    SwapRow,
    TouchRow,
    UsedBytes,
    Within,
    operations,
    writes,
)

__all__ = [
    "PAYLOAD_BYTES_MAX",
    "PLACES",
    "READS",
    "WITHIN",
    "BackUp",
    "Barrier",
    "Batch",
    "ChangeKind",
    "CheckUp",
    "Checkpointing",
    "CountRange",
    "Doing",
    "DropRange",
    "DropRow",
    "Durability",
    "Expect",
    "Extent",
    "Failed",
    "Following",
    "GetEntry",
    "GetRow",
    "GetRows",
    "GiveBack",
    "Group",
    "HasRow",
    "LastVersion",
    "ListCategories",
    "ListChanges",
    "ListEntries",
    "ListRows",
    "OutcomeUnknown",
    "Prefetching",
    "Preparing",
    "Readable",
    "Reap",
    "Restoring",
    "Root",
    "Run",
    "ScanRange",
    "SetRow",
    "Settling",
    "Status",
    "Store",
    "StoreOptions",
    "StoredChange",
    "StoredJob",
    "StoredRow",
    "SwapRow",
    "TouchRow",
    "UsedBytes",
    "Within",
    "operations",
    "writes",
]

Durability: TypeAlias = Literal["process", "power"]

PAYLOAD_BYTES_MAX = 256 * 1024 * 1024


class StoreOptions(NamedTuple):
    """What a job's store is opened with.

    `max_bytes` bounds the payloads of all live rows together (`None`: no bound); `feed_changes_max` is how many
    changes are kept (0: none). `now_ms` is when it is opened; a job that has ended by then starts empty. `expires_ms`
    is when this one ends (`None`: as it was, and a new one never does). One that `must_exist` isn't made: it was there
    before, and was removed by somebody.
    """

    durability: Durability = "process"
    max_bytes: int | None = None
    feed_changes_max: int = 0
    now_ms: int = 0
    expires_ms: int | None = None
    must_exist: bool = False


class OutcomeUnknown(Exception):
    """COMMIT failed and whether it happened can't be told on this connection; the cause says why."""


class Status(NamedTuple):
    """Numbers about a store.

    Its last version, the size of its write-ahead log in bytes, the latest time it was told (that of earlier
    openings too, where rows have an end): a job's time never goes back behind it; and whether somebody else, who
    reads there, keeps the log from being carried over.
    """

    last_version: int
    wal_bytes: int
    latest_ms: int = 0
    wal_pinned: bool = False


class StoredJob(NamedTuple):
    """A job as it lies in its root, open or not: `path` its file (`None`: it has none), `bytes` the size of all of it.

    `last_used` is when it was last opened, written to or closed, `expires` when it ends, both in Unix seconds; `None`:
    nobody knows, and never.
    """

    job_id: str
    path: Path | None
    bytes: int
    last_used: float | None = None
    expires: float | None = None


class Store(Protocol):
    """One job's rows. Used by whoever holds the job's turn, by nobody else."""

    reads_in_place: bool
    """Whether a read is cheap enough to be run by its caller (a network round trip is not)."""

    expires_ms: int | None
    """When the job itself ends (`None`: never)."""

    @property
    def next_expiry_ms(self) -> int | None:
        """No row ends before this (`None`: no row ends). Any thread may look."""

    def apply(self, group: Group, now_ms: int) -> list[Any]:
        """Run a group in one transaction; return one outcome per message, in order."""
        raise NotImplementedError

    def get(self, category: bytes, key: bytes, now_ms: int) -> bytes | None:
        """Return the payload of a live row, or `None`."""

    def scan(self, span: ScanRange, now_ms: int) -> list[tuple[bytes, bytes]]:
        """Return the live rows of a range."""
        raise NotImplementedError

    def read(self, message: Any, now_ms: int) -> Any:
        """Answer one read message outside any group; a `Failed` outcome is returned, not raised."""

    def reap(self, now_ms: int, limit: int) -> int:
        """Take at most `limit` rows away that are no longer live; return how many there were."""
        raise NotImplementedError

    def status(self) -> Status:
        """Return the numbers; any thread may ask."""
        raise NotImplementedError

    @property
    def last_version(self) -> int:
        """The last version given. Any thread may look."""
        raise NotImplementedError

    def close(self, *, tidy: bool = True, now_ms: int = 0) -> None:
        """Give up everything that is held; nothing is called afterwards.

        Not `tidy`: without writing anything more. `now_ms` is when it was last used, if later than all it knows.
        """

    def disown(self, *, quiet: bool) -> None:
        """In a forked child: change nothing that is the parent's; what is still called here fails with `Forked`.

        `quiet` says that nobody was using the store when the process was forked.
        """


@runtime_checkable
class Checkpointing(Protocol):
    """A store whose log wants to be carried over into its file now and then, between groups."""

    @property
    def unsynced(self) -> bool:
        """Whether something was committed that isn't on the medium yet. Any thread may look."""
        raise NotImplementedError

    def checkpoint_due(self, *, idle: bool) -> bool:
        """Say whether `checkpoint` should be called now; any thread may ask.

        `idle`: nobody is waiting, or somebody who had better wait for a short one now than for a long one later.
        """
        raise NotImplementedError

    def checkpoint(self) -> None:
        """Carry the log over."""

    def fold(self) -> bool:
        """Carry all of the log over and cut it off, if nobody else reads there; return whether it could be done."""
        raise NotImplementedError

    def settle(self, patience: float | None = None) -> None:
        """Leave the file as a clean close would, without closing it; see `Settling`."""


@runtime_checkable
class Settling(Protocol):
    """A store that others can be spared to wait for, when it may not be closed any more but is about to end."""

    def settle(self, patience: float | None = None) -> None:
        """Leave everything as a clean close would, without closing; nothing is lost if it can't be done.

        Wait for what another process has locked, but no longer than `patience` seconds (`None`: as long as ever).
        """


@runtime_checkable
class PointReading(Protocol):
    """A store with a short way for the read that is asked most, where `reads_in_place` is true."""

    def point_read(self, now_ms: Callable[[], int]) -> Callable[[bytes, bytes], bytes | None]:
        """Return what `get` does, as a function that asks `now_ms` for the time itself: only for a row that ends."""
        raise NotImplementedError


@runtime_checkable
class Preparing(Protocol):
    """A store that can begin with a group before it has it."""

    def prepare(self) -> None:
        """Do what can be done for a group of many writes before it is taken; what fails is for `apply` to find.

        In a turn. Nothing is owed for it: the next thing asked for may be another.
        """


@runtime_checkable
class Prefetching(Protocol):
    """A store whose reads take long, and can be begun before their turn has come."""

    def prefetch(self, message: GetRow) -> None:
        """Begin a read that is about to be posted, without waiting for anything. In a turn; nothing is owed for it.

        Its answer counts if the next group is nothing but this very message.
        """


class Root(Protocol):
    """Where jobs live."""

    lasting: bool
    """Whether a job outlives its store, so that it can be closed and opened again."""

    @property
    def name(self) -> str:
        """What it is called: a path, or a URL without a password."""
        raise NotImplementedError

    def open(self, job_id: str, options: StoreOptions) -> Store:
        """Open a job's store and take ownership of it; raise `JobLocked` if another process has it."""
        raise NotImplementedError

    def path(self, job_id: str) -> Path | None:
        """Return the file of a job, existing or not; `None` if jobs have none here. Raise `Misuse` for a bad id."""

    def stored(self) -> list[StoredJob]:
        """Return every job that is kept here, open or not, by id."""
        raise NotImplementedError

    def drop(self, job_id: str) -> list[Path]:
        """Delete a job nobody has open; return the files removed. One that never existed is fine."""
        raise NotImplementedError


@runtime_checkable
class Readable(Protocol):
    """A root whose jobs can be read by who doesn't own them."""

    def look_into(self, job_id: str, now_ms: int) -> Store:
        """Open a job for reading alone. Raises `JobNotFound` if there is none."""
        raise NotImplementedError


@runtime_checkable
class Following(Protocol):
    """A store, for reading alone, that is told of what others commit."""

    def follow(self, ring: Callable[[], None]) -> None:
        """Call `ring`, from any thread, when `last_version` has gone up without being asked, or something may have been
        lost; until it is closed.
        """


@runtime_checkable
class Restoring(Protocol):
    """A root that can put a backup in the place of a job."""

    def restore(self, job_id: str, path: Path) -> None:
        """Make a job nobody has open of the file at `path`: in whole, or not at all."""
