"""The whole engine on a disk that fails: a scripted job, a model beside it, and a judge of what came of it.

A *play* runs one script on a file system that fails the n-th call of one operation, once or from there on. Everything
goes through the public verbs: events, requests in place, in groups and under an event loop, reads, barriers, rows that
end, checkpoints, closing and opening again. Afterwards the disk works, the job is opened again, and the judge holds
what it has, and all that was answered, against the model: an exact prefix of what was accepted, with everything that
was acknowledged, nothing twice, each failure told. A *sweep* lets n grow until a play comes through without the fault.

A disk that runs full under a producer, and has room again later, is played by other means: see `FullDisk`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, Self
from unittest import mock

import apsw

from persistency import (
    Check,
    Delete,
    DeletePrefix,
    DeleteRange,
    Failure,
    Job,
    Key,
    KeyRange,
    Overloaded,
    Persistency,
    PersistencyError,
    Poisoned,
    Put,
    QuotaExceeded,
    StorageError,
    WriteFailed,
    key,
)
from persistency.actor import turns, upkeep
from persistency.codec.keys import as_key
from persistency.storage import schema, sqlite
from persistency.storage.pagecache import PageCache
from persistency.storage.wal import WriteAheadLog
from tests.conftest import Wall
from tests.crash.running import PROJECT, command
from tests.storage.conftest import FaultyDisk, FaultyFile, fault
from tests.test_machine import Model, plain

HANG_SECONDS = 20.0
STALL_SECONDS = 0.05  # where the disk doesn't recover
AT_MAX = 5_000
MODEL_KEEPS = 100_000  # changes: all of them
FINDINGS_MAX = 20

# -- the disk ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """What fails, and how.

    `manner` says how much of a call that fails has been done: nothing ("before"), "half", or "all"; `kind` which kind
    of file fails ("": any).
    """

    operation: str
    code: int
    sticky: bool = False
    manner: str = "before"
    kind: str = ""

    @property
    def lies(self) -> bool:
        """Whether the disk gives wrong data: what it cuts short in the database file SQLite takes for zeros."""
        return self.code == apsw.SQLITE_IOERR_SHORT_READ and self.kind != "wal"

    def __str__(self) -> str:
        name = apsw.mapping_extended_result_codes.get(self.code) or apsw.mapping_result_codes[self.code]
        manner = "" if self.manner == "before" else f", {self.manner} done"
        kind = f"{self.kind} " if self.kind else ""
        often = "for good" if self.sticky else "once"
        return f"{kind}{self.operation} {str(name).removeprefix('SQLITE_')}{manner}, {often}"


NO_FAULT = Fault("", 0)


class Fired(NamedTuple):
    """A call that failed: what was going on then, the operation, and the kind of file."""

    phase: str
    operation: str
    kind: str


class Disk(FaultyDisk):
    """A `FaultyDisk` that also cuts files, runs full, and can fail when, or although, the work is done.

    `phase` is set by whoever plays. `synced` counts the syncs that came through, by kind of file. With `room` set, so
    many more bytes can be written.
    """

    by_name: dict[str, Disk] = {}  # noqa: RUF012  # the disks that are there

    def __init__(self) -> None:
        self.phase = ""
        self.manner = "before"
        self.only = ""
        self.room: int | None = None
        self.changed = threading.Condition()  # what is counted has
        self.times_full = 0
        self.cut = 0  # how often a log was cut off
        self.failed: list[Fired] = []
        self.synced: Counter[str] = Counter()
        super().__init__()
        self.by_name[self.name] = self

    def unregister(self) -> None:
        del self.by_name[self.name]
        super().unregister()

    def prepare(self, given: Fault, at: int) -> None:
        """Forget what was, and let the `at`-th call of an operation fail."""
        self.cut = self.times_full = 0
        self.phase, self.manner, self.only, self.room = "", given.manner, given.kind, None
        self.calls.clear()
        self.failed.clear()
        self.synced.clear()
        if given.operation:
            self.arm(given.operation, at, given.code, sticky=given.sticky)
        else:
            self.disarm()

    def note(self, operation: str, kind: str) -> None:
        """Take down a call, and fail if it is its turn."""
        if self.only in ("", kind):
            super().note(operation, kind)

    def do(self, operation: str, kind: str, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Do the work of a call, or as much of it as is done before it fails."""
        try:
            self.note(operation, kind)
        except apsw.Error as error:
            with self.changed:
                self.failed.append(Fired(self.phase, operation, kind))
                self.changed.notify_all()
            if self.manner == "all":
                act()
            elif half is not None and (self.manner == "half" or self.code == apsw.SQLITE_IOERR_SHORT_READ):
                answer = half()
                if self.code == apsw.SQLITE_IOERR_SHORT_READ:
                    return answer
            raise error
        return act()

    def take(self, size: int) -> None:
        """Take room for so many bytes; fail if there isn't so much."""
        if self.room is not None:
            if self.room < size:
                self.note_full()
                raise fault(apsw.SQLITE_FULL)
            self.room -= size

    def make_room(self, size: int | None) -> None:
        """From now on there is room for so many bytes (`None`: for all)."""
        self.room = size

    def note_full(self) -> None:
        """Note down that the disk was full, and wake who waits for that."""
        with self.changed:
            self.times_full += 1
            self.changed.notify_all()

    def wait_full(self, times: int) -> bool:
        """Wait until the disk was found full so many times; return whether it was."""
        with self.changed:
            return self.changed.wait_for(lambda: self.times_full >= times, HANG_SECONDS)

    def xOpen(self, name: Any, flags: list[int]) -> File:  # noqa: N802 - apsw's name
        kind = "wal" if flags[0] & apsw.SQLITE_OPEN_WAL else "db" if flags[0] & apsw.SQLITE_OPEN_MAIN_DB else "other"
        path = name.filename() if isinstance(name, apsw.URIFilename) else name
        if path is not None and ".tmp" in path:  # a copy that is being made
            kind = "copy"
        opened: File = self.do("open", kind, lambda: File(self, name, flags))
        opened.kind = kind
        return opened

    def xDelete(self, name: str, sync: bool) -> None:  # noqa: N802 - apsw's name
        self.do("delete", "wal" if name.endswith("-wal") else "other", lambda: apsw.VFS.xDelete(self, name, sync))

    def excepthook(self, etype: Any, evalue: Any, etraceback: Any) -> bool:
        """Say nothing where SQLite swallows an error that was asked for."""
        return isinstance(evalue, apsw.Error) or apsw.VFS.excepthook(self, etype, evalue, etraceback)


class File(FaultyFile):
    """One open file of a `Disk`."""

    disk: Disk  # type: ignore[assignment]  # not any faulty one

    def xRead(self, amount: int, offset: int) -> bytes:  # noqa: N802 - apsw's name
        read = apsw.VFSFile.xRead
        data: bytes = self.disk.do(
            "read", self.kind, lambda: read(self, amount, offset), lambda: read(self, amount // 2, offset)
        )
        return data

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802 - apsw's name
        def write(some: bytes) -> None:
            self.disk.take(len(some))
            try:
                apsw.VFSFile.xWrite(self, some, offset)
            except apsw.Error:  # the real disk is full, or the file as long as it may get
                self.disk.note_full()
                raise

        self.disk.do("write", self.kind, lambda: write(data), lambda: write(data[: len(data) // 2]))

    def xSync(self, flags: int) -> None:  # noqa: N802 - apsw's name
        self.disk.do("sync", self.kind, lambda: apsw.VFSFile.xSync(self, flags))
        self.disk.synced[self.kind] += 1

    def xTruncate(self, size: int) -> None:  # noqa: N802 - apsw's name
        self.disk.do("truncate", self.kind, lambda: apsw.VFSFile.xTruncate(self, size))
        if self.kind == "wal":
            with self.disk.changed:
                self.disk.cut += 1
                self.disk.changed.notify_all()

    def xFileSize(self) -> int:  # noqa: N802 - apsw's name
        size: int = self.disk.do("size", self.kind, lambda: apsw.VFSFile.xFileSize(self))
        return size

    def excepthook(self, etype: Any, evalue: Any, etraceback: Any) -> bool:
        """Say nothing where SQLite swallows an error that was asked for."""
        return isinstance(evalue, apsw.Error) or apsw.VFSFile.excepthook(self, etype, evalue, etraceback)


_connect, _note_commit = schema.connect, WriteAheadLog.note_commit


def _connect_with_small_cache(*arguments: Any) -> apsw.Connection:
    """Open a job's file with so small a cache that a group doesn't fit, and that rows are read from the disk again."""
    connection = _connect(*arguments)
    connection.pragma("cache_size", 8)
    return connection


def _commit_that_lies(self: WriteAheadLog, connection: apsw.Connection, name: str, pages: int) -> int:
    """Have COMMIT raise though it has happened, if that is what should fail: SQLite passes on what its hook says."""
    answer = _note_commit(self, connection, name, pages)
    disk = Disk.by_name.get(connection.open_vfs)
    try:
        return answer if disk is None else disk.do("commit", name, lambda: answer)
    except apsw.Error as error:
        return error.extendedresult


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Say nothing of an error that was asked for and that SQLite has swallowed: some are only told to Python's hook."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, apsw.Error):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def rig(*, hurried: bool = False) -> Iterator[None]:
    """Make the engine checkpoint often, cache little and try again soon, so that a short script meets every fault.

    `hurried`: the log is cut off whenever nothing was written for a moment.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (sqlite, "CHECKPOINT_IDLE_PAGES", 12),
            (sqlite, "CHECKPOINT_FORCED_PAGES", 30),
            (upkeep, "REAP_SECONDS", 0.01),
            (upkeep, "RETRY_SECONDS", 0.01),
            (upkeep, "FOLD_SECONDS", 0.001 if hurried else 5.0),
            (turns, "RETRY_SECONDS_MIN", 0.002),
            (turns, "RETRY_SECONDS_MAX", 0.02),
            (schema, "connect", _connect_with_small_cache),
            (PageCache, "enlarge", lambda _cache: None),
            (WriteAheadLog, "note_commit", _commit_that_lies),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.enter_context(quiet())
        yield


# -- the script --------------------------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A verb of a job and what it is called with."""

    verb: str
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def is_event(self) -> bool:
        return self.verb in ("put", "delete", "delete_prefix", "delete_range", "persist")

    @property
    def ops(self) -> int:
        """How many write operations it is."""
        if self.verb in ("persist", "commit"):
            return len(self.args[0])
        return int(self.is_event or self.verb in _WRITE_REQUESTS)

    @property
    def named(self) -> Counter[Any]:
        """What an event's operations are called where they are told to have failed."""
        match self.verb:
            case "persist":
                return Counter(map(named, self.args[0]))
            case "put":
                return Counter([named(Put(*self.args))])
            case "delete":
                return Counter([named(Delete(*self.args))])
            case _:
                return Counter([named(DeleteRange(self.args[0], KeyRange.prefix(self.args[1])))])

    def __str__(self) -> str:
        return f"{self.verb}{self.args!r:.80}"


CARE = ("check", "compact", "backup")
_WRITE_REQUESTS = ("delete_acked", "delete_prefix_acked", "compare_and_set", "increment", "touch", "run")


def call(verb: str, *args: Any, **options: Any) -> Call:
    """Return a call of a verb."""
    return Call(verb, args, options)


def named(op: Any) -> tuple[Any, ...]:
    """Return an operation in a form that compares, however it was written."""
    match op:
        case Put():
            return "put", op.category, bytes(as_key(op.key)), bytes(op.payload)
        case Delete():
            return "delete", op.category, bytes(as_key(op.key))
        case DeletePrefix():
            span = KeyRange.prefix(op.prefix)
            return "range", op.category, span.start, span.stop
        case DeleteRange():
            return "range", op.category, op.key_range.start, op.key_range.stop
        case Check():
            return "check", op.category, bytes(as_key(op.key)), op.version
        case _:
            return "other", str(op)


class Section(NamedTuple):
    """A part of the script.

    `how`: "alone" (one call after the other), "group" (all of them in one), "events" (nobody waits), "loop" (under an
    event loop), "pass" (time, in milliseconds), "rest" (until the log was cut off), or "reopen".
    """

    how: str
    calls: tuple[Call, ...] = ()
    ms: int = 0


class Undone(Exception):
    """What a function of the script raises."""


def transfer(tx: Any, amount: int) -> list[Any]:
    """Count two rows against one another, and note it down."""
    left, right = tx.increment("n", key("left"), -amount), tx.increment("n", key("right"), amount)
    tx.put("log", key(right), b"%d" % left)
    return [left, right, tx.count("log", KeyRange())]


def undone(tx: Any) -> None:
    """Write, and then raise."""
    tx.put("c", key("undone"), bytes(900))
    tx.increment("n", key("a"), 1000)
    raise Undone("as written")


A, B = key("a"), key("b")
EVERYTHING = KeyRange()
TOO_MUCH = b"too much" * 5_000
QUOTA_BYTES = 64_000


def _row(number: int, size: int = 500) -> bytes:
    return (b"%06d." % number * (size // 7 + 1))[:size]


def _puts(first: int, count: int, part: str, size: int, **options: Any) -> list[Call]:
    # In an order that isn't that of the keys.
    order = [first + at * 11 % count for at in range(count)]
    return [call("put", "c", key(part, number), _row(number, size), **options) for number in order]


def script(variant: Variant) -> list[Section]:
    """Return what a play does. No two events of it are the same."""
    one = _row(1001)
    first = [
        *_puts(0, 10, "r", 500),
        call("get", "c", key("r", 3)),
        call("persist", [Put("d", A, _row(1)), Put("d", B, _row(2)), Delete("c", key("r", 9))]),
        call("count", "c", EVERYTHING),
        call("commit", [Check("e", A, None), Put("e", A, one)]),
        call("scan", "c", EVERYTHING),
        call("snapshot", "d"),
    ]
    alone = [
        call("increment", "n", A),
        call("increment", "n", A, 5),
        call("compare_and_set", "e", A, one, _row(1002)),
        call("compare_and_set", "e", A, one, _row(1003)),
        call("entry", "e", A),
        call("commit", [Put("c", key("never"), b""), Check("e", A, 1)]),
        call("delete_acked", "c", key("r", 0)),
        call("touch", "c", key("missing"), 5),
        call("run", transfer, 7),
        call("run", undone),
    ]
    events = [
        *_puts(20, 14, "s", 900),
        call("delete", "c", key("r", 1)),
        call("persist", [Put("d", A, _row(3)), DeletePrefix("c", key("r")), Put("c", key("r", 50), _row(50))]),
    ]
    loop = [
        call("put", "d", key("loop"), _row(4)),
        call("increment", "n", A, 10),
        call("get", "n", A),
        call("commit", [Put("d", key("loop", 2), _row(5)), Delete("d", B)]),
        call("scan_prefix", "c", key("s")),
        call("increment", "n", B),
    ]
    ending = [
        *_puts(60, 4, "t", 300, ttl=5),
        call("put", "c", key("t", 70), _row(70), ttl=500),
        call("persist", [Put("c", key("t", 71), _row(71), 5), Put("c", key("t", 72), _row(72))]),
        call("touch", "c", key("t", 61), 500),
        call("compare_and_set", "c", key("t", 73), None, _row(73), ttl=5),
        call("count", "c", EVERYTHING),
    ]
    ended = [
        call("count", "c", KeyRange.prefix(key("t"))),
        call("get", "c", key("t", 60)),
        call("entry", "c", key("t", 61)),
        call("compare_and_set", "c", key("t", 62), None, _row(74)),
        call("delete_acked", "c", key("t", 63)),
    ]
    big: list[Call] = []
    for at, put in enumerate(_puts(100, 24, "b", 1_000)):
        big += [put, call("get", "c", key("b", 100 + at))]
    big += [
        call("increment", "n", A, 100),
        call("run", transfer, 1),
        call("put", "d", key("too much"), TOO_MUCH),  # where there is a quota it stands above it
        call("persist", [*(Put("d", key("many", at), _row(200 + at, 120)) for at in range(40)), Delete("d", A)]),
        call("put", "d", key("too much"), b""),
        call("run", undone),
        call("count", "d", EVERYTHING),
        call("delete_prefix", "c", key("s")),
        call("increment", "n", A, 1),
    ]
    again = [
        call("count", "c", EVERYTHING),
        call("iterate", "c", page=7),
        call("get_many", "c", [key("b", 100), key("missing"), key("t", 72)]),
        call("snapshot", "n"),
        call("categories"),
        call("storage_used"),
        call("scan", "d", EVERYTHING, reverse=True, limit=9),
        call("version"),
        call("increment", "n", A),
        call("commit", [Put("e", B, _row(6)), Put("e", key("c"), _row(7))]),
        call("delete_prefix_acked", "d", key("many")),
    ]
    last = [
        call("put", "e", key("last"), _row(8)),
        call("increment", "n", A, 1),
        call("increment", "n", B, 1),
        call("run", transfer, 3),
        call("persist", [Put("e", key("last", at), _row(300 + at, 200)) for at in range(6)]),
        call("get", "n", A),
    ]
    flush, sync = call("flush"), call("flush", sync=True)

    def rest(number: int) -> list[Section]:
        put = call("put", "e", key("rest", number), _row(500 + number))
        return [Section("rest", (put,))] if variant.hurried else []

    def care(number: int) -> list[Section]:
        calls = call("check"), call("compact"), call("backup", f"copy-{number}"), call("check")
        return [Section("alone", calls)] if variant.cared else []

    return [
        Section("group", tuple(first)),
        Section("alone", tuple(alone)),
        Section("events", tuple(events)),
        Section("alone", (sync,)),
        *rest(1),
        *care(1),
        Section("loop", tuple(loop)),
        Section("group", tuple(ending)),
        Section("alone", (flush,)),
        Section("pass", ms=6_000),
        Section("alone", tuple(ended)),
        Section("group", tuple(big)),
        Section("alone", (flush,)),
        *rest(2),
        *care(2),
        Section("reopen"),
        Section("alone", tuple(again)),
        Section("group", tuple(last)),
        Section("alone", (sync, call("increment", "n", A))),
        *rest(3),
        Section("events", tuple(_puts(400, 5, "z", 700))),
    ]


class Book:
    """Does to a model what a call does to a job. For a function that is sent to the data it is the transaction."""

    def __init__(self, variant: Variant) -> None:
        self.model = Model(QUOTA_BYTES if variant.kept else None, MODEL_KEEPS if variant.kept else 0)

    def expected(self, asked: Call) -> Any:
        """Do a call; return what has to come of it, an answer or an exception."""
        act = getattr(self, asked.verb)
        answer = self.model.judged(lambda: act(*asked.args, **asked.options))
        return None if asked.is_event and not isinstance(answer, BaseException) else answer

    def put(self, category: str, at: Key, payload: bytes, *, ttl: Any = None) -> None:
        self.model.put(category, at, payload, ttl)

    def delete(self, category: str, at: Key) -> bool:
        return self.model.delete(category, at)

    delete_acked = delete

    def delete_prefix(self, category: str, at: Key) -> int:
        return self.model.delete_range(category, KeyRange.prefix(at))

    delete_prefix_acked = delete_prefix

    def persist(self, ops: list[Any]) -> int:
        return self.model.batch(ops)

    commit = persist

    def compare_and_set(self, category: str, at: Key, expected: Any, new: Any, *, ttl: Any = None) -> bool:
        return self.model.swap(category, at, expected, new, ttl)

    def increment(self, category: str, at: Key, delta: int = 1) -> int:
        return self.model.increment(category, at, delta)

    def touch(self, category: str, at: Key, ttl: Any) -> bool:
        return self.model.touch(category, at, ttl)

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        return fn(self, *args)

    def flush(self, *, sync: bool = False) -> None:
        """Nothing comes of it."""

    def get(self, category: str, at: Key) -> bytes | None:
        row = self.model.live(category, at)
        return None if row is None else row.payload

    def entry(self, category: str, at: Key) -> Any:
        return self.model.entry(category, at)

    def get_many(self, category: str, several: list[Key]) -> dict[Key, bytes]:
        found = {at: self.get(category, at) for at in several}
        return {at: payload for at, payload in found.items() if payload is not None}

    def count(self, category: str, span: KeyRange) -> int:
        return len(self.model.span(category, span))

    def scan(self, category: str, span: KeyRange, *, reverse: bool = False, limit: int | None = None) -> list[Any]:
        rows = [(at, row.payload) for at, row in self.model.span(category, span)]
        return (rows[::-1] if reverse else rows)[:limit]

    def scan_prefix(self, category: str, prefix: Key) -> list[Any]:
        return self.scan(category, KeyRange.prefix(prefix))

    def iterate(self, category: str, *, page: int) -> list[Any]:
        return self.scan(category, EVERYTHING)

    def snapshot(self, category: str) -> list[Any]:
        entries = [self.entry(category, at) for at, _ in self.model.span(category, EVERYTHING)]
        return sorted(entries, key=lambda entry: entry.version)

    def categories(self) -> list[str]:
        return sorted({name for name, at in self.model.rows if self.model.live(name, at)})

    def storage_used(self) -> int:
        return self.model.used()

    def version(self) -> int:
        return self.model.version


# -- the play ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What kind of job plays.

    `kept`: it has a quota and keeps its changes; `hurried`: it syncs, and cuts its log off, all the time; `cared`: it
    is checked, compacted and backed up.
    """

    durability: str = "process"
    kept: bool = False
    hurried: bool = False
    cared: bool = False

    def __str__(self) -> str:
        more = {"quota and changes": self.kept, "hurried": self.hurried, "cared for": self.cared}
        return ", ".join([self.durability, *(name for name, is_so in more.items() if is_so)])

    @property
    def options(self) -> dict[str, Any]:
        kept = {"max_bytes": QUOTA_BYTES, "feed_changes_max": MODEL_KEEPS} if self.kept else {}
        hurried = {"sync_interval": 0.001} if self.hurried else {}
        return {"durability": self.durability, **kept, **hurried}


VARIANTS = (Variant(), Variant("power"), Variant(kept=True), Variant(hurried=True), Variant(cared=True))


class Finding(NamedTuple):
    """Something that is not as promised.

    `kind` is hang, answer (another one than the model's), lost, beyond (more than can be there), difference, hole,
    split, books, told (failures not told, or wrongly), poison, error (of a wrong kind), sync, file or copy.
    """

    kind: str
    detail: str


@dataclass
class Posted:
    """A call that was accepted, and what came of it."""

    asked: Call
    opening: int  # which one of the job
    section: int
    grouped: bool  # whether it was posted in one group with the others of its section
    reply: Any = None
    answer: Any = None
    error: BaseException | None = None


@dataclass
class Passed:
    """Time that went by. `reaped`: the rows that ended then were surely taken away."""

    ms: int
    reaped: bool = False


class _Over(Exception):
    """The play can't go on."""


class Watch(logging.Handler):
    """Listens to the engine's log: how often a job stalled, why it was poisoned, how many operations failed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.causes: list[BaseException] = []
        self.failed = 0
        self.stalls = 0

    def emit(self, record: logging.LogRecord) -> None:
        if "is poisoned" in record.msg and isinstance(record.args, tuple):
            self.causes.append(record.args[1])  # type: ignore[arg-type]  # the cause
        elif "stalls" in record.msg:
            self.stalls += 1
        elif "operation(s) failed" in record.msg and isinstance(record.args, tuple):
            self.failed += int(record.args[1])  # type: ignore[call-overload]  # a count

    def __enter__(self) -> Self:
        logger = logging.getLogger("persistency")
        self._before = logger.level, logger.propagate
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("persistency")
        logger.removeHandler(self)
        logger.level, logger.propagate = self._before


class Play:
    """One run of the script. `limit` is how many seconds anything may take."""

    def __init__(self, place: Path, disk: Disk, variant: Variant, given: Fault, limit: float = HANG_SECONDS) -> None:
        self.place = place
        self.copies = place.with_name("copies")
        self.disk = disk
        self.variant = variant
        self.fault = given
        self.limit = limit
        self.wall = Wall()
        self.log: list[Posted | Passed] = []
        self.findings: list[Finding] = []
        self.poisoned: list[Poisoned] = []
        self.told: list[list[Failure]] = []  # by flush and close, by opening
        self.called: list[list[Failure]] = []  # by on_error
        self.watch = Watch()
        self._heard = threading.Condition()
        self._section = 0
        self._loop = asyncio.new_event_loop()
        self._job: Job | None = None

    def find(self, kind: str, detail: str) -> None:
        """Take down what isn't as promised."""
        self.findings.append(Finding(kind, detail))

    def run(self) -> None:
        """Play the script to its end, or until the job is poisoned."""
        self.copies.mkdir()
        self.persistency = Persistency(self.place, clock=self.wall)
        self.persistency._site.root._vfs = self.disk.name  # type: ignore[attr-defined]  # a directory's
        with self.watch:
            try:
                self._open()
                for section in script(self.variant):
                    self._section += 1
                    self._play(section)
            except _Over:
                pass
            finally:
                self._finish()

    def _finish(self) -> None:
        self._close()
        if self.poisoned and self.fault.sticky:
            self._open_in_vain()
        self.persistency.close()
        self.disk.disarm()
        self.disk.phase = "over"
        self._loop.close()

    def look_from_outside(self, version: int) -> None:
        """Look at what a closed job has left, with other means than ours; its last version is known."""
        look_from_outside(self, version)

    def open_only(self) -> None:
        """Open the job and close it again."""
        self.persistency = Persistency(self.place, clock=self.wall)
        self.persistency._site.root._vfs = self.disk.name  # type: ignore[attr-defined]  # a directory's
        with self.watch, contextlib.suppress(_Over):
            self._open()
        with self.watch:
            self._finish()

    # Opening and closing

    def _open(self) -> None:
        """Open the job; an opening that a passing fault lets fail is to be tried again."""
        self.disk.phase = "open"
        for last in (False, True):
            try:
                self._job = self.persistency.open_job(
                    "job",
                    stall_timeout=STALL_SECONDS if self.fault.sticky else 3 * self.limit,
                    on_error=self._on_error,
                    **self.variant.options,
                )
            except StorageError:
                if last and not self.fault.sticky:
                    self.find("error", "an opening failed that was tried again")
            except Exception as error:
                self.find("error", f"opening failed with {error!r}")
            else:
                self.told.append([])
                self.called.append([])
                self.disk.phase = "live"
                return
        raise _Over

    def _open_in_vain(self) -> None:
        """Open what a poisoned job has left while the disk still fails: it may be refused, or be of little use."""
        self.disk.phase = "open"
        options = {**self.variant.options, "stall_timeout": STALL_SECONDS}
        with mock.patch.object(upkeep.Upkeep, "_may_reap", return_value=False):
            try:
                job = self.persistency.open_job("job", **options)
                try:
                    job.count("c").result(self.limit)
                finally:
                    job.close(self.limit)
            except (StorageError, Poisoned):
                pass
            except Exception as error:
                self.find("error", f"opening a poisoned job again, the disk still failing, gave {error!r}")

    def _close(self) -> None:
        """Close the job and look at its books for the last time."""
        job, self._job = self._job, None
        if job is None:
            return
        self.disk.phase = "close"
        try:
            job.close(self.limit)
        except WriteFailed as failed:
            self._take(failed)
        except TimeoutError as error:
            self.find("hang", f"closing: {error}")
            with contextlib.suppress(Exception):
                job.close(1.0, drain=False)
            return
        except Exception as error:
            self.find("error", f"closing failed with {error!r}")
        numbers = self._look(job)
        told = self.told[-1]
        with self._heard:
            if not self._heard.wait_for(lambda: len(self.called[-1]) >= len(told), self.limit):
                self.find(
                    "told", f"on_error was told of {len(self.called[-1])} failures, flush and close of {len(told)}"
                )
        if numbers.pending:
            self.find("books", f"a closed job has something pending: {numbers}")
        opening = len(self.told) - 1
        mine = [entry for entry in self.log if isinstance(entry, Posted) and entry.opening == opening]
        accepted = sum(entry.asked.ops for entry in mine)
        failed_requests = sum(entry.asked.ops for entry in mine if entry.error is not None)
        expected = accepted, len(told) + failed_requests
        if (numbers.accepted, numbers.failed) != expected:
            self.find("books", f"accepted and failed are {expected}, the statistics say {numbers}")

    def _look(self, job: Job) -> Any:
        numbers = job.statistics()
        if numbers.accepted != numbers.committed + numbers.failed + numbers.pending or numbers.pending < 0:
            self.find("books", f"{numbers}")
        return numbers

    def _on_error(self, _job_id: str, failures: Any) -> None:
        if self._job is not None:
            self._look(self._job)
        with self._heard:
            self.called[-1] += failures
            self._heard.notify_all()

    def _take(self, failed: WriteFailed) -> None:
        self.told[-1] += failed.failures
        if failed.omitted:
            self.find("told", f"{failed.omitted} failures were omitted")

    # Sections

    def _play(self, section: Section) -> None:
        match section.how:
            case "pass":
                self._pass(section.ms)
            case "rest":
                self._rest(section.calls[0])
            case "reopen":
                self._close()
                if not self.poisoned:
                    self._open()
            case _:
                self._do(section)
        if self._job is not None:
            self._look(self._job)
        if self.poisoned:
            raise _Over

    def _do(self, section: Section) -> None:
        match section.how:
            case "alone":
                for asked in section.calls:
                    self._alone(asked)
            case "group":
                assert self._job is not None
                with self._job._mailbox._lock:  # nothing is taken before all of it is there
                    posted = [self._post(asked, grouped=True) for asked in section.calls]
                for entry in posted:
                    self._wait(entry)
            case "events":
                for asked in section.calls:
                    self._post(asked)
            case _:
                self._loop.run_until_complete(self._under_loop(section.calls))

    def _post(self, asked: Call, *, grouped: bool = False) -> Posted:
        """Post a call; one that is refused, because the job is poisoned, is none."""
        assert self._job is not None
        entry = Posted(asked, len(self.told) - 1, self._section, grouped)
        try:
            args = [self.copies / asked.args[0]] if asked.verb == "backup" else asked.args
            entry.reply = getattr(self._job, asked.verb)(*args, **asked.options)
        except Poisoned as error:
            self.poisoned.append(error)
        except Exception as error:
            self.find("error", f"{asked}: the call raised {error!r}")
        else:
            self.log.append(entry)
        return entry

    def _alone(self, asked: Call) -> None:
        synced = self.disk.synced["wal"]
        entry = self._post(asked)
        if entry.reply is None:
            return
        if asked.verb == "iterate":
            try:
                entry.answer = list(entry.reply)
            except Exception as error:
                self._failed(entry, error)
            return
        self._wait(entry)
        # With durability "power" what comes before a barrier has been synced already.
        to_medium = asked.ops if self.variant.durability == "power" else asked.options.get("sync")
        applied = entry.error is None and entry.answer is not False
        if to_medium and applied and self.disk.synced["wal"] == synced:
            self.find("sync", f"{asked} was answered without any sync")

    async def _under_loop(self, calls: tuple[Call, ...]) -> None:
        posted = [self._post(asked) for asked in calls]
        for entry in posted:
            if entry.reply is not None:
                try:
                    entry.answer = await entry.reply.within(self.limit)
                except Exception as error:
                    self._failed(entry, error)

    def _wait(self, entry: Posted) -> None:
        if entry.reply is not None:
            try:
                entry.answer = entry.reply.result(self.limit)
            except Exception as error:
                self._failed(entry, error)

    def _failed(self, entry: Posted, error: BaseException) -> None:
        if isinstance(error, TimeoutError):
            self.find("hang", f"{entry.asked} wasn't answered within {self.limit} s")
            raise _Over
        if isinstance(error, WriteFailed):
            self._take(error)
            return
        entry.error = error
        if isinstance(error, Poisoned):
            self.poisoned.append(error)

    def _rest(self, asked: Call) -> None:
        """Write something, and wait until the job has synced it, carried its log over and cut it off; or couldn't."""
        disk = self.disk
        cut, failed = disk.cut, len(disk.failed)
        self._post(asked)
        self._alone(call("flush"))
        if self.poisoned:
            return
        with disk.changed:
            rested = disk.changed.wait_for(lambda: disk.cut > cut or len(disk.failed) > failed, self.limit)
        if not rested and not self.fault.sticky:
            self.find("hang", "an idle job doesn't cut its log off")

    def _pass(self, ms: int) -> None:
        """Let time go by. Where changes are kept a reaping is one, so it is waited for."""
        assert self._job is not None
        passed = Passed(ms)
        if not self.variant.kept:
            self.wall.ms += ms
            self.log.append(passed)
            return
        before: int | None = None
        deadline = monotonic() + (10 * STALL_SECONDS if self.fault.sticky or self.fault.lies else self.limit)
        while True:
            try:
                if before is None:
                    before = self._job.version().result(self.limit)
                    self.wall.ms += ms
                    self.log.append(passed)
                self._job.changes(before, 1, wait=True).result(max(0.0, deadline - monotonic()))
            except Poisoned as error:
                self.poisoned.append(error)
                return
            except StorageError:
                continue
            except TimeoutError:
                if not self.fault.sticky and not self.fault.lies:
                    self.find("hang", "rows that have ended weren't taken away")
                raise _Over from None  # nobody knows whether they will be
            passed.reaped = True
            return


# -- the judge ---------------------------------------------------------------------------------------------------------


class Contents(NamedTuple):
    """What a job holds: its live rows, its last version, its changes."""

    rows: dict[tuple[str, Key], tuple[bytes, int, int | None]]
    version: int
    changes: list[Any]
    used: int


def contents(play: Play) -> Contents:
    """Open a job again, on a disk that works, and return what it holds."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(upkeep.Upkeep, "_may_reap", return_value=False))
        persistency = stack.enter_context(Persistency(play.place, clock=play.wall))
        persistency._site.root._vfs = None  # type: ignore[attr-defined]  # a directory's
        job = stack.enter_context(persistency.open_job("job", **play.variant.options))
        rows = {
            (category, entry.key): (entry.payload, entry.version, entry.expires_ms)
            for category in job.categories().result(play.limit)
            for entry in job.snapshot(category).result(play.limit)
        }
        version = job.version().result(play.limit)
        changes = job.changes(0, MODEL_KEEPS).result(play.limit) if play.variant.kept else []
        used = job.storage_used().result(play.limit)
    return Contents(rows, version, changes, used)


def look_from_outside(play: Play, version: int) -> None:
    """Look at the closed file of a job whose last version is known."""
    connection = apsw.Connection(str(play.place / "job.db"), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        verdict = connection.execute("PRAGMA integrity_check").fetchall()
        meta = dict(connection.execute("SELECT name, value FROM meta"))
    finally:
        connection.close()
    if verdict != [("ok",)]:
        play.find("file", f"integrity_check says {verdict}")
    if meta["last_version"] != version or meta["clean"] != 1:
        play.find("file", f"after a close in order, with last version {version}, meta says {meta}")


def _copied(path: Path) -> Any:
    """Return the rows of a copy that have no end, and what SQLite says of it."""
    connection = apsw.Connection(path.as_uri() + "?immutable=1", flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
    try:
        rows = connection.execute("SELECT category, key, payload, version FROM kv WHERE expires_ms IS NULL").fetchall()
        return sorted(rows), connection.pragma("integrity_check")
    finally:
        connection.close()


def _live(model: Model) -> Any:
    """Return what `_copied` must give."""
    rows = [(name.encode(), bytes(at), *row[:2]) for (name, at), row in model.rows.items() if row.expires_ms is None]
    return sorted(rows), "ok"


def modelled(model: Model) -> Contents:
    """Return what a model holds."""
    live = {(category, at): tuple(row) for (category, at), row in model.rows.items() if model.live(category, at)}
    return Contents(live, model.version, list(model.changes), model.used())  # type: ignore[arg-type]  # rows of three


class Judge:
    """Holds what was answered in a play, and what is there afterwards, against the model."""

    def __init__(self, play: Play) -> None:
        self.play = play
        self.book = Book(play.variant)
        self.tail: list[tuple[Posted, str | None]] = []  # writes that failed with the job, and what was said of them
        self.unsure = False  # whether rows that have ended were taken away
        self.alone: list[Posted] = []  # requests that failed by themselves for the disk's sake
        self.own: list[Posted] = []  # events that failed by themselves
        self._told: list[dict[Any, list[Failure]]] = []
        for opening, failures in enumerate(play.told):
            told: dict[Any, list[Failure]] = {}
            for failure in failures:
                told.setdefault(named(failure.op), []).append(failure)
            self._told.append(told)
            if Counter(map(_named, failures)) != Counter(map(_named, play.called[opening])):
                play.find(
                    "told", f"flush and close told of {failures!r:.300}, on_error of {play.called[opening]!r:.300}"
                )

    def judge(self) -> None:
        """Find everything that is wrong."""
        play = self.play
        if play.fault.lies:
            self._judge_loosely()
            return
        for entry in play.log:
            self._walk(entry)
        untold = [failure for told in self._told for failures in told.values() for failure in failures]
        if untold:
            play.find("told", f"failed, but never accepted: {untold!r:.300}")
        try:
            found = contents(play)
            play.look_from_outside(found.version)
        except Exception as error:
            play.find("file", f"the job can't be opened again: {error!r}")
        else:
            self._compare(found)
        self._look_at_consequences()

    def _judge_loosely(self) -> None:
        """Where the disk lies nobody knows what is right; but nothing hangs, or fails with anything but our errors."""
        play = self.play
        play.findings[:] = [finding for finding in play.findings if finding.kind in ("hang", "books")]
        errors = [entry.error for entry in play.log if isinstance(entry, Posted) and entry.error is not None]
        for error in errors:
            if not isinstance(error, PersistencyError | Undone):
                play.find("error", f"a disk that lies gave {error!r}")
        try:
            contents(play)
        except PersistencyError:
            pass
        except Exception as error:
            play.find("file", f"opening the job again gave {error!r}")

    def _failures_of(self, entry: Posted) -> list[Failure]:
        """Take out, and return, what was told of an event."""
        told = self._told[entry.opening]
        found = [told[name].pop() for name in entry.asked.named.elements() if told.get(name)]
        if found and len(found) != entry.asked.ops:
            self.play.find(
                "split", f"{entry.asked}: {len(found)} of {entry.asked.ops} operations were told to have failed"
            )
        if len({(type(failure.error), failure.outcome) for failure in found}) > 1:
            self.play.find("split", f"{entry.asked}: its operations failed in different ways: {found!r:.300}")
        return found

    def _walk(self, entry: Posted | Passed) -> None:
        """Hold one thing that was done against the model."""
        if isinstance(entry, Passed):
            self._let_pass(entry)
            return
        play, error, outcome = self.play, entry.error, None
        if entry.asked.is_event:
            failures = self._failures_of(entry)
            if failures:
                error, outcome = failures[0].error, failures[0].outcome
        if isinstance(error, Poisoned):
            if entry.asked.ops:
                self.tail.append((entry, outcome))
        elif entry.asked.verb in CARE:
            self._look_after(entry)
        elif isinstance(error, StorageError):
            if entry.asked.is_event or entry.asked.verb == "flush":
                play.find("error", f"{entry.asked} failed by itself with {error!r}")
            self.alone.append(entry)
        elif self.tail:
            play.find("hole", f"{entry.asked} was answered, though {self.tail[0][0].asked} before it has failed")
        else:
            self._compare_answer(entry, error, outcome)

    def _look_after(self, entry: Posted) -> None:
        """Look at what came of work beside the job: it may fail for the disk's sake, but leaves no half of a copy."""
        play, error = self.play, entry.error
        if error is not None and not (isinstance(error, StorageError) and play.disk.failed):
            play.find("error", f"{entry.asked} failed with {error!r}")
        if entry.asked.verb == "check" and entry.answer and not play.disk.failed:
            play.find("answer", f"a check found {entry.answer}")
        if entry.asked.verb != "backup":
            return
        copy = play.copies / entry.asked.args[0]
        if error is not None:
            left = [path.name for path in play.copies.iterdir() if copy.name in path.name]
            if left:
                play.find("copy", f"a backup that failed left {left}")
        elif _copied(copy) != _live(self.book.model):
            play.find("copy", f"a backup holds {_copied(copy)!r:.300}")

    def _let_pass(self, passed: Passed) -> None:
        self.book.model.now_ms += passed.ms
        if self.play.variant.kept:
            self.unsure = not passed.reaped
            if passed.reaped:
                self.book.model.reap(MODEL_KEEPS)

    def _compare_answer(self, entry: Posted, error: BaseException | None, outcome: str | None) -> None:
        """Hold what was answered, or failed by itself, against what has to come of it."""
        expected = self.book.expected(entry.asked)
        given = entry.answer if error is None else error
        if entry.asked.is_event and isinstance(expected, QuotaExceeded):
            self.own.append(entry)
            if not isinstance(error, QuotaExceeded) or outcome != "not applied":
                self.play.find("told", f"{entry.asked} stands above the quota: {error!r}, {outcome}")
        elif _plain(given) != _plain(expected) and not (isinstance(given, Undone) and isinstance(expected, Undone)):
            self.play.find("answer", f"{entry.asked} gave {given!r:.200}, not {expected!r:.200}")

    def _compare(self, found: Contents) -> None:
        """Find the prefix of what was accepted that the file holds."""
        play = self.play
        upper = next((at for at, (_, outcome) in enumerate(self.tail) if outcome == "not applied"), len(self.tail))
        states = [modelled(self.book.model)]
        for entry, _ in self.tail:
            self.book.expected(entry.asked)
            states.append(modelled(self.book.model))
        if self.unsure:
            assert not self.tail
            self.book.model.reap(MODEL_KEEPS)
            if modelled(self.book.model) == found:
                return
        matches = [at for at, state in enumerate(states) if state == found]
        if not matches:
            play.find(*self._diagnosis(found, states))
        elif matches[0] > upper:
            play.find("beyond", f"{self.tail[upper][0].asked} is there, and was told not to have been applied")
        elif any(outcome == "unknown" for _, outcome in self.tail) and not any(map(self._is_whole, matches)):
            play.find("split", f"the group of {self.tail[matches[0]][0].asked} is there in part")

    def _is_whole(self, at: int) -> bool:
        """Say whether a prefix of the tail ends where a group does."""
        if at in (0, len(self.tail)):
            return True
        before, behind = self.tail[at - 1][0], self.tail[at][0]
        return not (before.grouped and before.section == behind.section)

    def _diagnosis(self, found: Contents, states: list[Contents]) -> tuple[str, str]:
        book = Book(self.play.variant)
        model, book_of_all, self.book = book.model, self.book, book
        try:
            for entry in self.play.log:
                if modelled(model) == found:
                    return "lost", f"the file ends with version {found.version}, {states[0].version} was acknowledged"
                if isinstance(entry, Passed):
                    model.now_ms += entry.ms
                    if self.play.variant.kept:
                        model.reap(MODEL_KEEPS)
                elif entry not in self.alone:
                    book.expected(entry.asked)
        finally:
            self.book = book_of_all
        nearest = min(states, key=lambda state: abs(state.version - found.version))
        differing = sorted(
            place
            for place in nearest.rows.keys() | found.rows.keys()
            if nearest.rows.get(place) != found.rows.get(place)
        )
        shown = [(place, nearest.rows.get(place), found.rows.get(place)) for place in differing[:3]]
        kind = "lost" if found.version < states[0].version else "difference"
        return kind, (
            f"version {found.version}, the model's {nearest.version}; {len(differing)} rows differ: {shown!r:.600}; "
            f"changes {'agree' if nearest.changes == found.changes else 'differ'}, used {found.used}, {nearest.used}"
        )

    def _look_at_consequences(self) -> None:
        """Hold what the fault did to the job against what it may do."""
        play, given = self.play, self.play.fault
        failed = play.disk.failed
        causes = [*play.watch.causes, *(error.__cause__ for error in play.poisoned)]
        for cause in causes:
            if not isinstance(cause, StorageError) or cause.code != given.code or not failed:
                play.find("poison", f"the job was poisoned by {cause!r}")
        for entry in self.alone:
            if not isinstance(entry.error, StorageError) or entry.error.code != given.code or not failed:
                play.find("error", f"{entry.asked} failed with {entry.error!r}")
        live = [one for one in failed if one.phase == "live" and one.kind in ("db", "wal")]
        if given.code == apsw.SQLITE_IOERR_FSYNC:
            if live and not causes:
                play.find("poison", "a sync has failed, and the job isn't poisoned")
        elif causes and not given.sticky:
            play.find("poison", f"a fault that passed has poisoned the job: {causes[0]!r}")
        if self.alone and given.operation not in READING:
            play.find("error", f"{self.alone[0].asked} failed, but no read has: {self.alone[0].error!r}")
        if len(self.alone) > 1 and not given.sticky:
            play.find("error", f"one fault has failed {len(self.alone)} requests")
        carrying = failed and all(one.kind == "db" and one.operation in ("write", "truncate") for one in failed)
        if carrying and (play.watch.stalls or causes or self.alone):
            play.find("error", "a fault in a checkpoint is felt outside of it")
        if any(failures for failures in play.told) and not play.watch.failed:
            play.find("told", "failures weren't told to the log")


READING = ("read", "size", "open")


def _plain(given: Any) -> Any:
    if isinstance(given, list):
        return [_plain(tuple(item)) if isinstance(item, tuple) else item for item in given]
    return plain(given)


def _named(failure: Failure) -> tuple[Any, ...]:
    return named(failure.op), type(failure.error), failure.outcome


# -- sweeps ------------------------------------------------------------------------------------------------------------

FAULTS = tuple(
    Fault(operation, code, sticky, manner)
    for operation, code, manners in (
        ("write", apsw.SQLITE_IOERR_WRITE, ("before", "half", "all")),
        ("write", apsw.SQLITE_FULL, ("before", "half")),
        ("sync", apsw.SQLITE_IOERR_FSYNC, ("before", "all")),
        ("read", apsw.SQLITE_IOERR_READ, ("before",)),
        ("truncate", apsw.SQLITE_IOERR_TRUNCATE, ("before", "all")),
        ("commit", apsw.SQLITE_IOERR_WRITE, ("all",)),
        ("commit", apsw.SQLITE_FULL, ("all",)),
        ("commit", apsw.SQLITE_IOERR_FSYNC, ("all",)),
        ("size", apsw.SQLITE_IOERR_FSTAT, ("before",)),
        ("open", apsw.SQLITE_CANTOPEN, ("before",)),
        ("delete", apsw.SQLITE_IOERR_DELETE, ("before",)),
    )
    for manner in manners
    for sticky in (False, True)
) + (
    Fault("write", apsw.SQLITE_FULL, sticky=True, kind="db"),
    *(
        Fault("read", apsw.SQLITE_IOERR_SHORT_READ, sticky, kind=kind)
        for kind in ("wal", "db")
        for sticky in (False, True)
    ),
)


@dataclass
class Totals:
    """What came of some plays."""

    plays: int = 0
    fired: int = 0  # plays in which the fault was met
    stalled: int = 0  # plays in which the job stalled
    poisoned: int = 0  # plays that ended with a poisoned job
    kinds: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)

    def add(self, name: str, play: Play) -> None:
        """Count a play."""
        self.plays += 1
        self.fired += bool(play.disk.failed)
        self.stalled += bool(play.watch.stalls)
        self.poisoned += bool(play.watch.causes)
        for finding in play.findings:
            self.kinds[finding.kind] += 1
            if len(self.findings) < FINDINGS_MAX:
                self.findings.append(f"{name}: {finding.kind}: {finding.detail}")


def memory_disk() -> str | None:
    """Return a directory in memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None


def play_one(root: Path, disk: Disk, variant: Variant, given: Fault, at: int, *, limit: float = HANG_SECONDS) -> Play:
    """Play the script with the `at`-th call failing, and judge it. The engine has been rigged."""
    place = root / "play"
    disk.prepare(given, at)
    play = Play(place, disk, variant, given, limit)
    play.run()
    Judge(play).judge()
    shutil.rmtree(place)
    shutil.rmtree(play.copies)
    return play


def sweep(
    one: Callable[[int], Play], name: str, totals: Totals, *, stride: int = 1, until: float = float("inf")
) -> bool:
    """Let each call, or each `stride`-th, fail in turn, until a play comes through clean; return whether one did.

    `one` plays with a call of some number failing. After the monotonic time `until` no other play begins.
    """
    for at in range(1, AT_MAX, stride):
        if monotonic() > until:
            return True
        play = one(at)
        totals.add(f"{name}, call {at}", play)
        if not play.disk.failed:
            return True
    totals.kinds["endless"] += 1
    totals.findings.append(f"{name}: never a clean play")
    return False


# -- migrations --------------------------------------------------------------------------------------------------------

OLD_ROWS = {(b"c", bytes(key("old", number))): _row(number, 900) for number in range(40)}


def play_migration(root: Path, disk: Disk, given: Fault, at: int) -> Play:
    """Open a file of the oldest format with the `at`-th call failing: it is migrated whole, or stays as it was."""
    place = root / "play"
    place.mkdir()
    connection = apsw.Connection(str(place / "job.db"))
    connection.execute(
        "CREATE TABLE kv (category BLOB NOT NULL, key BLOB NOT NULL, payload BLOB NOT NULL,"
        " PRIMARY KEY (category, key)) WITHOUT ROWID"
    )
    connection.pragma("user_version", 1)
    for (category, at_key), payload in OLD_ROWS.items():
        connection.execute("INSERT INTO kv VALUES (?, ?, ?)", (category, at_key, payload))
    connection.close()
    disk.prepare(given, at)
    play = Play(place, disk, Variant(), given)
    with quiet():
        play.open_only()
    found = contents(play)
    look_from_outside(play, found.version)
    rows = found.rows
    if {(category.encode(), bytes(at_key)): row[0] for (category, at_key), row in rows.items()} != OLD_ROWS:
        play.find("difference", f"{len(rows)} rows are left of {len(OLD_ROWS)}")
    shutil.rmtree(place)
    return play


# -- full disks --------------------------------------------------------------------------------------------------------

FULL_ROWS = 400
FULL_ROW_BYTES = 1_000
FULL_BYTES = 100_000  # are left
POSTS_MAX = 10 * FULL_ROWS
MOUNTED_MIB = 16
NOT_PERMITTED = 77  # the return code of a child that may not mount


class FullDisk:
    """A disk that runs full under a producer (`fill`), and has room again later (`free`).

    `code` is the extended code of the error that tells of it; `opens` says whether a new job can still be opened.
    """

    def __init__(
        self,
        place: Path,
        disk: Disk,
        fill: Callable[[], object],
        free: Callable[[], object],
        code: int = apsw.SQLITE_FULL,
        *,
        opens: bool = False,
    ) -> None:
        self.place = place
        self.disk = disk
        self.fill = fill
        self.free = free
        self.code = code
        self.opens = opens
        self.findings: list[str] = []

    def check(self, holds: bool, what: str) -> None:
        """Take down what isn't so."""
        if not holds:
            self.findings.append(what)

    def run(self, *, patient: bool) -> list[str]:
        """Have room again before (`patient`), or after, the jobs have given up; return what was not as promised."""
        if patient:
            self._resume()
        else:
            self._poison()
        return self.findings

    def _open(self, **options: Any) -> tuple[Persistency, list[Job]]:
        """Open three jobs with small bounds, and let the disk run full."""
        persistency = Persistency(self.place)
        persistency._site.root._vfs = self.disk.name  # type: ignore[attr-defined]  # a directory's
        jobs = [
            persistency.open_job("patient", mailbox_ops_max=16, **options),
            persistency.open_job("hasty", mailbox_ops_max=16, **{"full_timeout": 0.01, **options}),
            persistency.open_job("looped", mailbox_ops_max=16, **options),
        ]
        for job in jobs:
            job.commit([Put("c", key(0), bytes(FULL_ROW_BYTES))]).result(HANG_SECONDS)
        self.fill()
        return persistency, jobs

    def _until(self, holds: Callable[[], bool]) -> bool:
        """Look after every failed write whether something is so; return whether it came to be."""
        while not holds():
            if not self.disk.wait_full(self.disk.times_full + 1):
                return False
        return True

    def _resume(self) -> None:
        """Stall, push back, and go on."""
        persistency, (patient, hasty, looped) = self._open()
        with persistency:
            producer = Producer(patient)
            producer.start()
            self.check(self._until(lambda: patient.statistics().state == "stalled"), "it never stalled")
            self.check(self._until(lambda: len(patient._mailbox._queue) == 1), "the producer doesn't wait")
            self.check(producer.posted < FULL_ROWS, "the producer wasn't held up")
            read = patient.count("c")
            posted = {"hasty": _until_overloaded(hasty)}
            posted["looped"] = asyncio.run(_until_overloaded_in_loop(looped))
            numbers = patient.statistics()
            self.check(numbers.state == "stalled" and numbers.pending >= 16, f"a stalled job says {numbers}")
            self.check(numbers.accepted == numbers.committed + numbers.failed + numbers.pending, f"{numbers}")
            try:
                persistency.open_job("late")
            except StorageError as error:
                self.check(error.code in (0, self.code), f"opening a job failed with {error!r}")
            else:
                self.check(self.opens, "a job was opened on a full disk")
            self.free()
            producer.join(HANG_SECONDS)
            self.check(not producer.is_alive() and producer.posted == FULL_ROWS, f"{producer.posted} rows were posted")
            posted["patient"] = producer.posted
            self.check(isinstance(read.result(HANG_SECONDS), int), "the read isn't answered")
            for job in (patient, hasty, looped):
                job.flush().result(HANG_SECONDS)
                numbers = job.statistics()
                books = numbers.accepted, numbers.committed, numbers.failed, numbers.pending
                expected = posted[job.id] + 1
                self.check(books == (expected, expected, 0, 0), f"{job.id}: posted {expected}, {numbers}")
                self.check(numbers.state == "live", f"{job.id} is {numbers.state}")
            persistency.open_job("late").commit([Put("c", key(0), b"")]).result(HANG_SECONDS)
        for name, count in posted.items():
            self._look(name, count, count)

    def _poison(self) -> None:
        """Stay full for longer than the jobs wait."""
        persistency, jobs = self._open(stall_timeout=STALL_SECONDS, full_timeout=None)
        producers = [Producer(job) for job in jobs]
        for producer in producers:
            producer.start()
        for producer in producers:
            producer.join(HANG_SECONDS)
            self.check(not producer.is_alive(), "a producer hangs")
        counts = {}
        for job, producer in zip(jobs, producers, strict=True):
            cause = None if producer.refused is None else producer.refused.__cause__
            self.check(isinstance(cause, StorageError) and cause.code == self.code, f"{job.id}: poisoned by {cause!r}")
            failures: list[Failure] = []
            try:
                job.close(HANG_SECONDS)
            except WriteFailed as failed:
                failures = list(failed.failures)
                self.check(not failed.omitted, f"{failed.omitted} failures were omitted")
            numbers = job.statistics()
            books = numbers.accepted, numbers.failed, numbers.pending
            self.check(books == (producer.posted + 1, len(failures), 0), f"{producer.posted} posted, {numbers}")
            told = [key_of(failure) for failure in failures]
            first = producer.posted + 1 - len(failures)
            self.check(told == list(range(first, producer.posted + 1)), f"{job.id}: failures tell of rows {told}")
            self.check(bool(failures), f"{job.id}: no failure was told")
            unknown = [failure.outcome for failure in failures].count("unknown")
            counts[job.id] = first - 1, first - 1 + unknown
        persistency.close()
        self.free()
        for name, (least, most) in counts.items():
            self._look(name, least, most)

    def _look(self, name: str, least: int, most: int) -> None:
        """Open a job again: it has its first row and so many more, without a gap, and its file is sound."""
        with Persistency(self.place) as persistency:
            persistency._site.root._vfs = None  # type: ignore[attr-defined]  # a directory's
            with persistency.open_job(name) as job:
                numbers = [row.key.parts[0] for row in job.scan("c").result(HANG_SECONDS)]
                version = job.version().result(HANG_SECONDS)
                path = job.path
        self.check(numbers == list(range(len(numbers))), f"{name}: there is a hole in {numbers}")
        self.check(least <= len(numbers) - 1 <= most, f"{name}: {len(numbers) - 1} rows, not {least} to {most}")
        self.check(version == len(numbers), f"{name}: {len(numbers)} rows, version {version}")
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        self.check(connection.pragma("integrity_check") == "ok", f"{name}: the file isn't sound")
        connection.close()


class Producer(threading.Thread):
    """Posts rows, one after the other, until all are or the job is poisoned; a full mailbox makes it wait."""

    def __init__(self, job: Job) -> None:
        super().__init__(daemon=True)
        self.posted = 0
        self.refused: PersistencyError | None = None
        self._job = job

    def run(self) -> None:
        try:
            while self.posted < FULL_ROWS:
                self._job.put("c", key(self.posted + 1), bytes(FULL_ROW_BYTES))
                self.posted += 1
        except PersistencyError as error:
            self.refused = error


def _until_overloaded(job: Job) -> int:
    """Post rows until one is refused; return how many were not."""
    for number in range(POSTS_MAX):
        try:
            job.put("c", key(number + 1), bytes(FULL_ROW_BYTES))
        except Overloaded:
            return number
    raise AssertionError("a full mailbox refuses nothing")


async def _until_overloaded_in_loop(job: Job) -> int:
    """Do the same in an event loop, whose thread never waits; until the job stalls, the worker is given its chance."""
    posted = 0
    while posted < POSTS_MAX:
        try:
            job.put("c", key(posted + 1), bytes(FULL_ROW_BYTES))
        except Overloaded:
            return posted
        posted += 1
        if posted % 8 == 0 and job.statistics().state != "stalled":
            await asyncio.sleep(0)
    raise AssertionError("a full mailbox refuses nothing")


def key_of(failure: Failure) -> int:
    """Return the number of the row that a failure is of."""
    return int(as_key(failure.op.key).parts[0])


def full_by_vfs(place: Path, *, patient: bool) -> list[str]:
    """Let a file system of our own run full; return what was not as promised."""
    disk = Disk()
    try:
        return FullDisk(place, disk, lambda: disk.make_room(FULL_BYTES), lambda: disk.make_room(None)).run(
            patient=patient
        )
    finally:
        disk.unregister()


def full_by_ballast(place: Path, *, patient: bool) -> list[str]:
    """Fill a small file system, all that is below `place`, but for a little, with a file that is deleted later."""
    ballast = place / "ballast"
    disk = Disk()

    def fill() -> None:
        found = os.statvfs(place)
        with ballast.open("wb", buffering=0) as file:
            left = found.f_bavail * found.f_frsize - FULL_BYTES
            while left > 0:
                left -= file.write(bytes(min(left, 65_536)))

    try:
        return FullDisk(place / "root", disk, fill, ballast.unlink).run(patient=patient)
    finally:
        disk.unregister()


def full_by_limit(place: Path, *, patient: bool) -> list[str]:
    """Let no file of this process grow beyond a size; return what was not as promised."""
    disk = Disk()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE)
    try:
        return FullDisk(
            place,
            disk,
            lambda: limit((FULL_BYTES, before[1])),
            lambda: limit(before),
            apsw.SQLITE_IOERR_WRITE,
            opens=True,
        ).run(patient=patient)
    finally:
        limit(before)
        disk.unregister()


def full_in_child(form: str, place: Path, *, patient: bool) -> tuple[list[str], str]:
    """Run a full disk in a process of its own, by a `limit`, or by a `ballast` on a file system that it mounts.

    Returns what was not as promised, and why it couldn't be run ("": it was).
    """
    flags = ["--mount"] if os.getuid() == 0 else ["--mount", "--map-root-user"]
    within = ["unshare", *flags] if form == "ballast" else []
    if within and shutil.which("unshare") is None:
        return [], "there is no unshare, which would give a process mounts of its own"
    done = subprocess.run(
        [*within, *command("tests.crash.faulty", form, "patient" if patient else "impatient", str(place))],
        cwd=PROJECT, timeout=5 * HANG_SECONDS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode == NOT_PERMITTED or (within and not done.stdout and "unshare" in done.stderr):
        return [], f"mounting is not permitted here: {done.stderr.strip()}"
    try:
        findings: list[str] = json.loads(done.stdout)
    except ValueError:
        findings = [f"return code {done.returncode}: {done.stderr[-1000:]}"]
    return findings, ""


def main(given: list[str]) -> int:
    """Run one form of a full disk in this process: see `full_in_child`."""
    form, patient, place = given[0], given[1] == "patient", Path(given[2])
    if form == "ballast":
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={MOUNTED_MIB}m", "faulty", place], check=False)
        if mounted.returncode:
            return NOT_PERMITTED
    logging.getLogger("persistency").setLevel(logging.CRITICAL)
    findings = (full_by_ballast if form == "ballast" else full_by_limit)(place, patient=patient)
    print(json.dumps(findings))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
