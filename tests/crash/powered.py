"""Power cuts, simulated: a file system that notes what is written and synced, and what a cut may leave of it.

One job lives through several lives. In each one it is opened from what the last cut, or a kill of the process, has
left, driven by a program that a seed decides, and closed, on a `Disk` that notes every step in a log. Cut that log
anywhere, and there is an image: a set of files. Each image is opened by the engine as a restarted service would, and
held against what was accepted and acknowledged before the cut. `python -m tests.crash.powered --seed S --images N` runs
lives until there are N images; the same command finds the same again.

What a cut leaves, after ext4 and its like, and a little worse than any of them:
  - All that was in a file when its last sync began is there, and so is its name.
  - What was written since is there or not, in pieces of one sector, whatever the order; a piece may be torn or garbage.
    Bytes that weren't written stay as they are: SQLite's own file system relies on that (POWERSAFE_OVERWRITE).
  - A file that grew may have zeros where a piece is missing. Truncations happen in their order, up to any of them.
  - Names come and go in their order, up to any point; a sync of the directory makes them stay, and so does that of a
    file for all that was done before it got its name.
  - The shared-memory file is gone. The lock file isn't: what it says is as loose as all that isn't synced.
A kill leaves all that was written where it was, but no more on the medium than before.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import sys
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from inspect import signature
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple, TypeAlias
from unittest.mock import patch

import apsw

from persistency import (
    Check,
    Conflict,
    Delete,
    DeletePrefix,
    Job,
    Key,
    KeyRange,
    Persistency,
    Put,
    Transaction,
    lifecycle,
)
from persistency import key as make_key
from persistency.storage import sqlite
from persistency.storage.directory import DirectoryRoot
from persistency.storage.pagecache import PageCache
from persistency.storage.port import Durability, StoreOptions
from tests.crash.ledger import Finding

SECTOR_BYTES = 512
NOW = 1_700_000_000  # Unix seconds; the clock stands still, so that no row ends
TTL = 3_600  # seconds, of the rows that have an end
JOB = "job"
LOCK = f"{JOB}.lock"
LIVES = 3
CUTS = 60  # of each life
FINDINGS_MAX = 20

_numbers = itertools.count()

# -- the disk: what happened, step by step -----------------------------------------------------------------------------


class Step(NamedTuple):
    """One entry of a log.

    `what` is found, create, write, truncate, sync (of a `file`, by its number), unlink (of a `name`), names (a sync of
    the directory); or what the program has to say of a version, which is `at`: opened, posted, committed, synced,
    killed (with it as the last one there).
    """

    what: str
    file: int = -1
    at: int = 0
    data: bytes = b""
    name: str = ""


class Disk(apsw.VFS):
    """A file system that notes what is done to a job's files, after what a log says already; `unregister` ends it."""

    def __init__(self, directory: Path, log: list[Step]) -> None:
        self.name = f"noted{next(_numbers)}"
        self.log = list(log)
        self.files = files_after(log)
        self._last = max((step.file for step in log), default=-1)
        self._lock = directory / LOCK
        self._locked = self._lock.read_bytes() if self._lock.exists() else b""
        super().__init__(self.name, "unix")

    def note(self, what: str, file: int = -1, at: int = 0, data: bytes = b"", name: str = "") -> None:
        """Note one step, and before it what has become of the lock file: that one isn't written through here."""
        if self._lock.exists() and (said := self._lock.read_bytes()) != self._locked:
            self._locked = said
            lock = (
                self.opened(self._lock.name, None) if self._lock.name not in self.files else self.files[self._lock.name]
            )
            self.log.append(Step("write", lock, 0, said))
        self.log.append(Step(what, file, at, data, name))

    def opened(self, name: str, data: bytes | None) -> int:
        """Return the number of a file that was opened and isn't known; `data` is what it held (`None`: a new one)."""
        self._last += 1
        self.files[name] = self._last
        self.log.append(Step("create" if data is None else "found", self._last, data=data or b"", name=name))
        return self._last

    def xOpen(self, name: Any, flags: list[int]) -> apsw.VFSFile:  # noqa: N802 - apsw's name
        noted = apsw.SQLITE_OPEN_MAIN_DB | apsw.SQLITE_OPEN_WAL | apsw.SQLITE_OPEN_MAIN_JOURNAL
        return DiskFile(self, name, flags) if flags[0] & noted else apsw.VFSFile("unix", name, flags)

    def xDelete(self, path: str, sync_directory: bool) -> None:  # noqa: N802
        super().xDelete(path, sync_directory)
        name = os.path.basename(path)
        if self.files.pop(name, None) is not None:
            self.note("unlink", name=name)
        if sync_directory:
            self.note("names")


class DiskFile(apsw.VFSFile):
    """One open file of a `Disk`."""

    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        path = Path(name if isinstance(name, str) else name.filename())
        there = path.exists()
        # Only before a connection has it: closing another handle would drop its locks.
        held = path.read_bytes() if there and path.name not in disk.files else None
        super().__init__("unix", name, flags)
        self._note = disk.note
        self.kind = path.name.rpartition("-")[2] if "-" in path.name else "db"
        known = there and path.name in disk.files
        self._file = disk.files[path.name] if known else disk.opened(path.name, held)

    def xWrite(self, data: bytes, offset: int) -> None:  # noqa: N802
        super().xWrite(data, offset)
        self._note("write", self._file, offset, bytes(data))

    def xTruncate(self, size: int) -> None:  # noqa: N802
        super().xTruncate(size)
        self._note("truncate", self._file, size)

    def xSync(self, flags: int) -> None:  # noqa: N802
        super().xSync(flags)
        self._note("sync", self._file)


# -- the medium: what a cut leaves -------------------------------------------------------------------------------------

Piece: TypeAlias = tuple[int, bytes | None]  # where, and what was written; `None`: the file was cut off there
Image: TypeAlias = dict[str, bytearray]
KEEP, LOSE, TEAR, GARBLE = range(4)


def fates(damage: str, rng: random.Random, count: int) -> list[int]:
    """Return what becomes of each of some pieces that were written in this order."""
    some = rng.randint(0, count)
    keep = rng.choice((0.3, 0.6, 0.9, 0.98)) if damage == "any" else rng.choice((0.0, 0.1))
    weights = (keep, (1 - keep) * 0.9, (1 - keep) * 0.05, (1 - keep) * 0.05 + 0.01)
    match damage:
        case "nothing kept":
            return [LOSE] * count
        case "everything kept":
            return [KEEP] * count
        case "any":
            return rng.choices((KEEP, LOSE, TEAR, GARBLE), weights, k=count)
        case "first":
            return [KEEP] * some + rng.choices((KEEP, LOSE, TEAR, GARBLE), weights, k=count - some)
        case "last":
            return rng.choices((KEEP, LOSE, TEAR, GARBLE), weights, k=some) + [KEEP] * (count - some)
        case "all but a few":
            chosen = [KEEP] * count
            for _ in range(rng.randint(1, 3) if count else 0):
                chosen[rng.randrange(count)] = rng.choice((LOSE, TEAR, GARBLE))
            return chosen
    raise AssertionError(damage)


DAMAGES = ("any", "any", "first", "last", "all but a few", "nothing kept", "everything kept")
KILL = "everything kept"  # which is what a kill leaves, too


class Medium:
    """What is surely on the medium at one point of a log, and what isn't yet: `loose` pieces by file, names in order.

    `said` is what the program had said until then: the highest version posted, committed and synced.
    """

    def __init__(self, base: int = 0) -> None:
        self.names: dict[str, int] = {}
        self.renamed: list[tuple[str, int | None]] = []
        self.kept: dict[int, bytearray] = {}
        self.loose: dict[int, list[Piece]] = {}
        self.said = dict.fromkeys(("opened", "posted", "committed", "synced"), base)

    def take(self, step: Step) -> None:
        """Go on by one step."""
        match step.what:
            case "found" | "create":
                self.kept[step.file], self.loose[step.file] = bytearray(step.data), []
                self.renamed.append((step.name, step.file))
                if step.what == "found":
                    self._keep_names(len(self.renamed))
            case "write":
                self.loose[step.file] += in_sectors(step.at, step.data)
            case "truncate":
                self.loose[step.file].append((step.at, None))
            case "sync":
                for piece in self.loose[step.file]:
                    lay(self.kept[step.file], piece)
                self.loose[step.file] = []
                named = [at for at, (_name, file) in enumerate(self.renamed) if file == step.file]
                self._keep_names(named[-1] + 1 if named else 0)
            case "unlink":
                self.renamed.append((step.name, None))
            case "names":
                self._keep_names(len(self.renamed))
            case "killed":
                self.said["posted"] = step.at
            case said:
                self.said[said] = max(step.at, self.said[said])

    def _keep_names(self, count: int) -> None:
        rename(self.names, self.renamed[:count])
        del self.renamed[:count]

    def image(self, damage: str, rng: random.Random) -> Image:
        """Return what a cut at this point may leave."""
        names = dict(self.names)
        rename(names, self.renamed[: how_many(damage, rng, len(self.renamed))])
        return {name: self._content(file, damage, rng) for name, file in names.items()}

    def _content(self, file: int, damage: str, rng: random.Random) -> bytearray:
        content, pieces = bytearray(self.kept[file]), self.loose[file]
        truncations = how_many(damage, rng, sum(data is None for _at, data in pieces))
        size = 0
        for (at, data), fate in zip(pieces, fates(damage, rng, len(pieces)), strict=True):
            if data is not None:
                lay_damaged(content, at, data, fate, rng)
                size = max(size, at + len(data))
            elif truncations:
                truncations -= 1
                lay(content, (at, None))
                size = 0
        if damage != "nothing kept" and rng.random() < 0.3:
            content.extend(bytes(max(0, size - len(content))))
        return content


def files_after(log: list[Step]) -> dict[str, int]:
    """Return the number of each file that has a name at the end of a log."""
    named = [(step.name, step.file if step.what != "unlink" else None) for step in log if step.name]
    files: dict[str, int] = {}
    rename(files, named)
    return files


def how_many(damage: str, rng: random.Random, count: int) -> int:
    """Return how many of some steps that happen in order have happened."""
    return {"nothing kept": 0, "everything kept": count}.get(damage, rng.randint(0, count))


def rename(names: dict[str, int], renamed: list[tuple[str, int | None]]) -> None:
    """Let names come and go."""
    for name, file in renamed:
        names.pop(name, None)
        if file is not None:
            names[name] = file


def in_sectors(at: int, data: bytes) -> list[Piece]:
    """Return what was written as pieces, none of which goes over the end of a sector."""
    end = at + len(data)
    bounds = [at, *range((at // SECTOR_BYTES + 1) * SECTOR_BYTES, end, SECTOR_BYTES), end]
    return [(start, data[start - at : stop - at]) for start, stop in itertools.pairwise(bounds)]


def lay(content: bytearray, piece: Piece) -> None:
    """Write a piece into a file, or cut the file off."""
    at, data = piece
    content.extend(bytes(max(0, at - len(content))))
    if data is None:
        del content[at:]
    else:
        content[at : at + len(data)] = data


def lay_damaged(content: bytearray, at: int, data: bytes, fate: int, rng: random.Random) -> None:
    """Write as much of a piece as its fate leaves."""
    if fate == KEEP:
        lay(content, (at, data))
    elif fate == GARBLE:
        lay(content, (at, rng.randbytes(len(data))))
    elif fate == TEAR:
        torn = rng.randint(0, len(data))
        start, stop = (0, torn) if rng.random() < 0.5 else (torn, len(data))
        lay(content, (at + start, data[start:stop]))


def write_image(image: Image, directory: Path) -> None:
    """Leave no file in a directory but those of an image."""
    for file in directory.iterdir():
        if file.is_file():
            file.unlink()
    for name, content in image.items():
        handle = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.pwrite(handle, content, 0)
        finally:
            os.close(handle)


# -- what was accepted, and what may be found --------------------------------------------------------------------------

Rows: TypeAlias = dict[tuple[bytes, bytes], tuple[bytes, int, int | None]]  # payload, version, end
Stored: TypeAlias = tuple[int, str, bytes, bytes, bytes | None, bytes | None]  # a change
Op: TypeAlias = Put | Delete | DeletePrefix


@dataclass(frozen=True)
class Plan:
    """How a job is run in all its lives. `spills`: with so small a page cache that batches spill into the log early."""

    durability: Durability = "process"
    max_bytes: int | None = None
    feed_changes_max: int = 0
    spills: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """What the job is opened with."""
        given = {"durability": self.durability, "max_bytes": self.max_bytes, "feed_changes_max": self.feed_changes_max}
        # No sync but those the program asks for, where a job makes some of its own.
        return given | (
            {"sync_interval": 3600.0} if "sync_interval" in signature(Persistency.open_job).parameters else {}
        )

    def floor(self, said: dict[str, int], damage: str) -> int:
        """Return up to which version nothing may be lost: by a kill nothing that was committed."""
        return max(said["synced"], said["committed"] if self.durability == "power" or damage == KILL else 0)


class History:
    """What a job holds at each version at which it may be found: where an operation, or a whole batch, ended."""

    def __init__(self, rows: Rows | None = None) -> None:
        self.rows: dict[int, Rows] = {0: rows or {}}
        self.changes: list[Stored] = []

    @property
    def version(self) -> int:
        """The last version given."""
        return max(self.rows)

    def until(self, version: int) -> History:
        """Return the history as it would be had nothing been accepted after a version."""
        shorter = History()
        shorter.rows = {at: rows for at, rows in self.rows.items() if at <= version}
        shorter.changes = [change for change in self.changes if change[0] <= version]
        return shorter

    def accept(self, ops: list[Op]) -> int:
        """Add operations that stand or fall together; return their last version."""
        version = self.version
        rows = dict(self.rows[version])
        for op in ops:
            version += 1
            self._apply(rows, op, version)
        self.rows[version] = rows
        return version

    def _apply(self, rows: Rows, op: Op, version: int) -> None:
        category = op.category.encode()
        match op:
            case Put():
                end = None if op.ttl is None else NOW * 1000 + TTL * 1000
                rows[category, bytes(op.key)] = (bytes(op.payload), version, end)
                self.changes.append((version, "put", category, bytes(op.key), bytes(op.payload), None))
            case Delete():
                if rows.pop((category, bytes(op.key)), None) is not None:
                    self.changes.append((version, "delete", category, bytes(op.key), None, None))
            case DeletePrefix():
                doomed = KeyRange.prefix(op.prefix)
                start, stop = bytes(doomed.start or b""), bytes(doomed.stop or b"")
                gone = [at for at in rows if at[0] == category and start <= at[1] < stop]
                for at in gone:
                    del rows[at]
                if gone:
                    self.changes.append((version, "delete_range", category, start, None, stop))

    def changes_at(self, version: int, keep: int) -> tuple[list[Stored], int]:
        """Return the changes that are kept at a version, and the version of the last one that isn't."""
        count = bisect_right(self.changes, version, key=lambda change: change[0])
        first = max(0, count - keep)
        return self.changes[first:count], self.changes[first - 1][0] if first else 0


class Contents(NamedTuple):
    """What a job held when it was opened again. `notes` are the numbers of its meta table."""

    last_version: int
    rows: Rows
    changes: list[Stored]
    notes: dict[str, Any]


def contents(directory: Path, plan: Plan) -> tuple[Contents | None, list[Finding]]:
    """Open what a cut has left, as the engine does, and read all of it; or say why that can't be done."""
    try:
        options = StoreOptions(plan.durability, plan.max_bytes, plan.feed_changes_max)
        store = DirectoryRoot(directory).open(JOB, options)
    except Exception as error:
        return None, [Finding("file", f"it can't be opened: {error!r}")]
    try:
        execute = store._connection.execute
        verdict = execute("PRAGMA integrity_check").fetchall()
        rows = {
            (row[0], row[1]): row[2:] for row in execute("SELECT category, key, payload, version, expires_ms FROM kv")
        }
        order = "SELECT version, kind, category, key, payload, stop FROM changes ORDER BY version"
        changes: list[Any] = execute(order).fetchall() if plan.feed_changes_max else []
        found = Contents(store.status().last_version, rows, changes, dict(execute("SELECT name, value FROM meta")))
    except Exception as error:
        return None, [Finding("file", f"it can't be read: {error!r}")]
    finally:
        store.close(tidy=False)
    return found, [] if verdict == [("ok",)] else [Finding("file", f"integrity_check says {verdict!r:.200}")]


def judge(found: Contents, plan: Plan, history: History, floor: int, posted: int) -> list[Finding]:
    """Return what is wrong with a job of which `posted` versions were posted, and `floor` acknowledged for good."""
    version = found.last_version
    if found.notes["last_version"] != version:
        return [Finding("version", f"the file says {found.notes['last_version']}, the engine {version}")]
    findings = []
    if version < floor:
        findings.append(Finding("lost", f"version {floor} was acknowledged, {version} is there"))
    if version > posted:
        findings.append(Finding("beyond", f"version {posted} was posted, {version} is there"))
    expected = history.rows.get(version)
    if found.rows != expected:
        prefixes = [at for at, rows in history.rows.items() if rows == found.rows]
        if prefixes:
            findings.append(Finding("version", f"the rows are those of {prefixes}, the last version is {version}"))
        elif expected is None:
            findings.append(Finding("split", f"the last version, {version}, lies inside a batch"))
        else:
            differ = {at for at, _row in found.rows.items() ^ expected.items()}
            findings.append(Finding("hole", f"{len(differ)} rows aren't those of version {version}"))
    if not findings and plan.feed_changes_max:
        changes, dropped = history.changes_at(version, plan.feed_changes_max)
        if found.changes != changes or not dropped <= found.notes["changes_dropped"] <= version:
            findings.append(Finding("hole", f"the changes kept aren't those of version {version}"))
    if not findings and plan.max_bytes is not None and "used_bytes" in found.notes:
        used = sum(len(row[0]) for row in found.rows.values())
        if found.notes["used_bytes"] != used:
            findings.append(Finding("hole", f"{used} bytes are in use, the file says {found.notes['used_bytes']}"))
    return findings


# -- a life ------------------------------------------------------------------------------------------------------------


class Program:
    """Drives one job in this thread alone, so that its log depends on nothing but the seed."""

    def __init__(self, directory: Path, disk: Disk, plan: Plan, history: History, rng: random.Random) -> None:
        self.history = history
        self.findings: list[Finding] = []
        self._begun_at = history.version
        self._directory, self._disk, self._plan, self._rng = directory, disk, plan, rng
        self._numbers = itertools.count()

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Have the job open, without a worker's thread, and with a log that is carried over often."""
        pages = self._rng.choice((4, 15, 40))
        with contextlib.ExitStack() as stack:
            enter = stack.enter_context
            enter(patch.object(lifecycle, "begin", lambda worker, **_how: worker.start_unattended()))
            enter(patch.object(sqlite, "CHECKPOINT_IDLE_PAGES", pages))
            enter(patch.object(sqlite, "CHECKPOINT_FORCED_PAGES", pages))
            open_store = DirectoryRoot.open

            def open_spilling(root: DirectoryRoot, job_id: str, options: StoreOptions) -> sqlite.SqliteStore:
                store = open_store(root, job_id, options)
                store._connection.pragma("cache_size", 5)
                return store

            if self._plan.spills:
                enter(patch.object(DirectoryRoot, "open", open_spilling))
                enter(patch.object(PageCache, "enlarge", lambda _cache: None))
            self._open()
            try:
                yield
            finally:
                self._persistency.close()

    def run(self, steps: int) -> None:
        """Do some things, each of them at random."""
        doings = (self.group, self.puts, self.commit, self.run_inside, self.drop, self.flush, self.reopen)
        for do in self._rng.choices(doings, (8, 3, 4, 2, 2, 2, 1), k=steps):
            do()

    def _open(self) -> None:
        self._persistency = Persistency(self._directory, clock=lambda: NOW)
        self._persistency._site.root._vfs = self._disk.name  # type: ignore[attr-defined]  # a directory's
        self.job: Job = self._persistency.open_job(JOB, **self._plan.options)
        self._disk.note("opened", at=self.history.version)

    def reopen(self) -> None:
        """Close the job, or all of it, and open it again."""
        if self._rng.random() < 0.5:
            self.job.close()
        self._persistency.close()
        self._open()

    def flush(self) -> None:
        """Wait for what was posted."""
        self._flush().result()

    def barrier(self) -> None:
        """Wait until all there is is on the medium."""
        self._flush(sync=True).result()

    def _flush(self, *, sync: bool | None = None) -> Any:
        sync = self._rng.random() < 0.4 if sync is None else sync
        return self._told("synced" if sync else "committed", self.job.flush(sync=sync))

    def group(self) -> None:
        """Post some events and batches that are taken as one group, and wait for them in one of many ways."""
        rng, job = self._rng, self.job
        refused = None
        with job._mailbox._lock:  # nobody takes anything before all is there
            for _ in range(rng.randint(1, 12)):
                if rng.random() < 0.2:
                    job.persist(self._accept(self._ops(rng.randint(2, 8))))
                    continue
                (op,) = self._accept(self._ops(1))
                if isinstance(op, Put):
                    job.put(op.category, op.key, op.payload, ttl=op.ttl)
                else:
                    job.delete(op.category, op.key)
            if rng.random() < 0.2:  # it is undone alone
                refused = job.commit([*self._ops(3), Check("a", make_key(0), 10**9)])
            ways: list[Callable[[], Any]] = [job.version, lambda: job.get("a", make_key(1)), lambda: job.count("b")]
            answer = self._flush() if rng.random() < 0.6 else self._told("committed", rng.choice(ways)())
        job.flush()  # now all of it is taken
        answer.result()
        if refused is not None and not isinstance(refused.exception(), Conflict):
            self.findings.append(Finding("hole", "a batch whose check fails was taken"))

    def puts(self) -> None:
        """Post plain puts that are taken as one group, and wait for nothing."""
        ops = self._ops(self._rng.choice((3, 10, 40)))
        puts = [op for op in ops if isinstance(op, Put) and op.ttl is None]
        for put in puts:
            self._accept([put])
        with self.job._mailbox._lock:
            for put in puts[:-1]:
                self.job.put(put.category, put.key, put.payload)
        for put in puts[-1:]:  # now they are all taken
            self.job.put(put.category, put.key, put.payload)

    def commit(self) -> None:
        """Commit a batch; it is answered in place."""
        reply = self.job.commit(self._accept(self._ops(self._rng.randint(1, 12))))
        version = self._told("committed", reply).result()
        if version != self.history.version:
            self.findings.append(Finding("version", f"version {self.history.version} was answered as {version}"))

    def run_inside(self) -> None:
        """Have a function write some rows."""
        ops = self._accept([op for op in self._ops(self._rng.randint(1, 6)) if isinstance(op, Put)])
        if ops:
            self._told("committed", self.job.run(put_all, ops)).result()

    def drop(self) -> None:
        """Delete a range of rows."""
        (op,) = self._accept([DeletePrefix("b", make_key("of", self._rng.randrange(6)))])
        self._told("committed", self.job.delete_prefix_acked(op.category, op.prefix)).result()

    def _told(self, what: str, reply: Any) -> Any:
        """Have noted, at the very moment a reply is settled, what it acknowledges: all that was posted; return it."""
        version = self.history.version
        # What an earlier life has left, a commit or a barrier of this one brings onto the medium, not a read.
        if what == "synced" or version > self._begun_at:
            reply.add_done_callback(lambda done: self._disk.note(what, at=version) if not done.exception() else None)
        return reply

    def _accept(self, ops: list[Any]) -> list[Any]:
        if ops:
            self._disk.note("posted", at=self.history.accept(ops))
        return ops

    def _ops(self, count: int) -> list[Any]:
        return [self._op() for _ in range(count)]

    def _op(self) -> Op:
        rng = self._rng
        category = rng.choice("ab")
        key: Key = (
            make_key(rng.randrange(60)) if category == "a" else make_key("of", rng.randrange(6), rng.randrange(12))
        )
        if rng.random() < 0.15:
            return Delete(category, key)
        # Mostly small; some that need pages of their own.
        size = rng.choice((rng.randint(0, 300), rng.randint(0, 300), rng.randint(300, 2_000), rng.randint(0, 9_000)))
        payload = b"%d/%d " % (self.history.version, next(self._numbers)) + bytes((rng.randrange(256),)) * size
        return Put(category, key, payload, ttl=TTL if rng.random() < 0.1 else None)


def put_all(tx: Transaction, ops: list[Put]) -> None:
    """Put some rows in one transaction."""
    for op in ops:
        tx.put(op.category, op.key, op.payload, ttl=op.ttl)


class Start(NamedTuple):
    """What a life begins with: the files there are, and the log that says what of them is on the medium.

    `base` is a version that surely was on the medium when that log began.
    """

    image: Image
    log: list[Step]
    base: int


def from_medium(image: Image, version: int = 0) -> Start:
    """Return a start from what is on the medium, and that version with it."""
    files = enumerate(image.items())
    return Start(image, [Step("found", file, data=bytes(data), name=name) for file, (name, data) in files], version)


class Life(NamedTuple):
    """What is known of one life: `log` is what the disk noted, the start's included."""

    start: Start
    plan: Plan
    history: History
    log: list[Step]
    findings: list[Finding]

    @property
    def opened(self) -> int:
        """After how many steps the job was open for the first time."""
        return next(at for at in range(len(self.start.log), len(self.log)) if self.log[at].what == "opened")


def live(
    directory: Path, start: Start, plan: Plan, history: History, rng: random.Random, drive: Callable[[Program], None]
) -> Life:
    """Let the job live one life; what is accepted is added to its history."""
    directory.mkdir()
    write_image(start.image, directory)
    disk = Disk(directory, start.log)
    try:
        program = Program(directory, disk, plan, history, rng)
        with program.opened():
            drive(program)
    finally:
        disk.unregister()
    return Life(start, plan, history, disk.log, program.findings)


# -- many lives, many cuts ---------------------------------------------------------------------------------------------


@dataclass
class Totals:
    """What came of all the images."""

    images: int = 0
    loose: int = 0  # those where something had been written and not synced
    short: int = 0  # those in which some of what was committed was gone
    ahead: int = 0  # those in which there was more than had to be
    compound: int = 0  # those of a job that had gone through a cut before
    accepted: int = 0  # versions
    recovered: int = 0  # versions
    seconds: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)

    def count(self, medium: Medium, found: Contents | None, floor: int, findings: list[Finding], where: str) -> None:
        """Count one image."""
        self.images += 1
        self.loose += any(medium.loose[file] for name, file in medium.names.items() if name != LOCK)
        self.accepted += medium.said["posted"]
        if found is not None:
            self.recovered += found.last_version
            self.short += found.last_version < medium.said["committed"]
            self.ahead += found.last_version > floor
        self.note(findings, where)

    def note(self, findings: list[Finding], where: str) -> None:
        """Keep what was found."""
        for finding in findings:
            self.kinds[finding.kind] = self.kinds.get(finding.kind, 0) + 1
            if len(self.findings) < FINDINGS_MAX:
                self.findings.append(f"{where}: {finding.kind}: {finding.detail}")


Cut: TypeAlias = tuple[int, str, str]  # after how many steps, the damage, and what seeds it


class Sound(NamedTuple):
    """A sound image, and the cut it comes from."""

    at: int
    damage: str
    image: Image
    version: int


def judge_cuts(life: Life, cuts: list[Cut], directory: Path, totals: Totals) -> list[Sound]:
    """Cut a life's log and judge the images, in that directory; return the sound ones.

    The cuts come in the order of the log.
    """
    medium, taken = Medium(life.start.base), 0
    sound = []
    for at, damage, seed in cuts:
        for step in life.log[taken:at]:
            medium.take(step)
        taken = at
        image = medium.image(damage, random.Random(seed))
        write_image(image, directory)
        found, findings = contents(directory, life.plan)
        floor = life.plan.floor(medium.said, damage)
        if found is not None and not findings:
            findings = judge(found, life.plan, life.history, floor, medium.said["posted"])
            if not findings:
                sound.append(Sound(at, damage, image, found.last_version))
        totals.count(medium, found, floor, findings, f"{seed}, cut {at} of {len(life.log)}, {damage}")
    return sound


def random_cuts(life: Life, count: int, rng: random.Random, name: str) -> list[Cut]:
    """Choose cuts of a life, a fifth of them while the job is opened."""
    first, opened, last = len(life.start.log), life.opened, len(life.log)
    places = sorted(rng.randint(first, opened if rng.random() < 0.2 else last) for _ in range(count))
    return [(at, rng.choice(DAMAGES), f"{name}, {rank}") for rank, at in enumerate(places)]


def after_kill(life: Life, sound: Sound) -> Start:
    """Return how a life begins after the process of the one before was killed."""
    return Start(sound.image, [*life.log[: sound.at], Step("killed", at=sound.version)], life.start.base)


def next_start(life: Life, sound: Sound, rng: random.Random) -> Start:
    """Return how the next life begins: after that cut, or, where that is the same, after a kill."""
    killed = sound.damage == KILL and rng.random() < 0.7
    return after_kill(life, sound) if killed else from_medium(sound.image, sound.version)


def lives(name: str, plan: Plan, totals: Totals) -> None:
    """Let one job live some lives, each from what was left of the one before; `name` decides everything."""
    rng = random.Random(name)
    history, start = History(), from_medium({})
    with scratch() as place:
        for number in range(LIVES):
            drive = partial(Program.run, steps=rng.randint(4, 24))
            life = live(place / f"life{number}", start, plan, history, rng, drive)
            totals.note(life.findings, f"{name}, life {number}")
            cuts = random_cuts(life, CUTS, rng, f"{name}, life {number}")
            sound = judge_cuts(life, cuts, place, totals)
            totals.compound += len(cuts) if number else 0
            if not sound:
                return
            kills = [one for one in sound if one.damage == KILL]
            chosen = rng.choice(kills if kills and rng.random() < 0.5 else sound)
            start, history = next_start(life, chosen, rng), history.until(chosen.version)


def do_each(program: Program) -> None:
    """Do one thing of each kind."""
    for do in (program.commit, program.group, program.flush, program.run_inside, program.drop, program.reopen):
        do()
    program.commit()


def every_cut(seed: int, plan: Plan, totals: Totals, image: Image | None = None, rows: Rows | None = None) -> None:
    """Do one thing of each kind, and cut the log after every step of it, with each of three damages.

    The job begins with an image, in which it has those rows.
    """
    with scratch() as place:
        life = live(place / "life", from_medium(image or {}), plan, History(rows), random.Random(seed), do_each)
        totals.note(life.findings, f"seed {seed}")
        places = range(len(life.start.log), len(life.log) + 1)
        cuts = [(at, damage, f"seed {seed}, {at}") for at in places for damage in ("any", "last", "all but a few")]
        judge_cuts(life, cuts, place, totals)


def every_recovery(seed: int, plan: Plan, totals: Totals, *, stride: int = 1) -> None:
    """Cut the same log after every step, or each `stride`-th, and kill there; live on, and cut that four times."""
    rng, numbers = random.Random(seed), itertools.count()
    with scratch() as place:
        life = live(place / "life", from_medium({}), plan, History(), rng, do_each)
        for at in range(0, len(life.log) + 1, stride):
            damages = (rng.choice(DAMAGES), KILL)
            for sound in judge_cuts(life, [(at, damage, f"seed {seed}, {at}") for damage in damages], place, totals):
                start, history = next_start(life, sound, rng), life.history.until(sound.version)
                drive = rng.choice((Program.flush, Program.commit))
                second = live(place / f"life{next(numbers)}", start, plan, history, rng, drive)
                cuts = random_cuts(second, 4, rng, f"seed {seed}, {at}, {sound.damage}")
                judge_cuts(second, cuts, place, totals)
                totals.compound += len(cuts)


def run(seed: int, images: int, durability: Durability, *, seconds: float = float("inf")) -> Iterator[Totals]:
    """Cut the power until there are so many images, or the time is over; gives the totals after each job's lives."""
    totals, begun = Totals(), monotonic()
    for number in itertools.count():
        rng = random.Random(f"{seed}, {number}")
        limit, keep, spills = rng.choice((None, None, 2**30)), rng.choice((0, 0, 25)), rng.random() < 0.3
        lives(f"seed {seed}, job {number}", Plan(durability, limit, keep, spills=spills), totals)
        totals.seconds = round(monotonic() - begun, 3)
        yield totals
        if totals.images >= images or totals.seconds >= seconds:
            return


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Give an empty directory, in memory where there is one: no real power is cut."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
    with tempfile.TemporaryDirectory(prefix="power-", dir=memory) as directory:
        yield Path(os.path.realpath(directory))


def main(given: list[str] | None = None) -> int:
    """Run lives; the exit code is 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--durability", choices=("process", "power"), default="power")
    arguments = parser.parse_args(given)
    *_, totals = run(arguments.seed, arguments.images, arguments.durability)
    print(json.dumps(asdict(totals), indent=1))
    return 1 if totals.kinds else 0


if __name__ == "__main__":
    sys.exit(main())
