"""Damage a job's files, use everything there is on them, and again: `python -m tests.crash.damaged KIND --cases N`.

A case copies the files of a job into a folder of its own, damages one of them, and then opens, reads, writes, closes,
reopens and drops the job, beside another one that is sound. A damaged backup is restored over the sound job, a damaged
export is taken in by it. Whatever is damaged, there may come only

    our own errors, within the time a reply may take;
    right answers;
    answers that differ from what was written, where SQLite can't see that a byte has changed.

What is no part of a file's contents (the index of the log, the lock file) must do no harm at all, a damaged log must
leave a state that the job once had, and who refuses a backup or an export has changed nothing. Prints progress as one
line of JSON now and then, and the totals as the last one. This process imports the package once, opens nothing and
stays single-threaded: the cases run in forks of it, so that a crash, or what never ends, is told with the number of its
case. To repeat a case: the same KIND and `--seed`, `--first NUMBER --cases 1`.
"""

from __future__ import annotations

import argparse
import asyncio
import atexit
import contextlib
import faulthandler
import gc
import json
import logging
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from io import BytesIO
from itertools import islice
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import apsw

from persistency import (
    CBOR,
    Category,
    Change,
    Check,
    Conflict,
    Corrupt,
    Delete,
    DeletePrefix,
    Entry,
    Failure,
    FeedTruncated,
    Job,
    JobNotFound,
    Key,
    KeyRange,
    KVStore,
    Op,
    Persistency,
    PersistencyError,
    Poisoned,
    Put,
    QuotaExceeded,
    Reply,
    SchemaTooNew,
    StorageError,
    Transaction,
    WriteFailed,
    key,
)
from persistency.reads import Reads
from persistency.storage.names import file_name
from tests.crash.kills import fork

REPLY_SECONDS = 10.0
CASE_SECONDS = 60.0
STALL_SECONDS = 0.5  # so long a fault is waited out
BATCH, BATCH_PLANTED = 50, 5  # cases that one process runs
ADDRESS_BYTES_MAX = 2 * 2**30
FINDINGS_MAX = 20
WALKED_MAX = 5_000  # rows of a walk that would never end
PROGRESS_SECONDS = 0.5

BEGUN_MS = 1_700_000_000_000
NOW_MS = BEGUN_MS + 60_000  # the time of all cases: rows that were to live for seconds have ended
PAGE, FRAME, HEADER, LOG_HEADER = 4096, 4096 + 24, 100, 32
SECTOR = 512
BESIDE = "beside"
BESIDE_ROWS = 20
KEPT = {"feed_changes_max": 150, "max_bytes": 10_000_000}
JOURNAL_MAGIC = bytes.fromhex("d9d505f920a163d7")


class Found(NamedTuple):
    """What a job says of one key."""

    payload: bytes
    version: int
    expires_ms: int | None


State = dict[str, dict[bytes, Found]]


@dataclass(frozen=True)
class Kind:
    """A kind of file: which one of a job's is damaged (one of several by chance), and how the job was left."""

    files: tuple[str, ...]  # what follows the name without its ".db"
    live: bool = False  # the writer was killed: the newest rows are in the log
    original: bool = False  # format 1
    job_id: str = "alpha"
    options: dict[str, Any] = field(default_factory=dict)
    harmless: bool = False  # no damage may be noticed
    prefix: bool = False  # damage may only bring back a state the job has had
    used: str = ""  # what is done with the file, where it is no part of a job


KINDS = {
    "closed": Kind((".db",)),
    "live": Kind((".db",), live=True),
    "wal": Kind((".db-wal",), live=True, prefix=True),
    "shm": Kind((".db-shm",), live=True, harmless=True),
    "lock": Kind((".lock",), live=True, harmless=True),
    "original": Kind((".db",), original=True, job_id="node"),
    "adopted": Kind((".db",), original=True, job_id="Node"),
    "kept": Kind((".db",), options=KEPT),
    "kept live": Kind((".db", ".db-wal"), live=True, options=KEPT),
    "backup": Kind((".backup",), used="restore"),
    "export": Kind((".cbor",), used="import"),
}


# -- what the files hold ----------------------------------------------------------------------------------------------


def written() -> list[list[list[Op]]]:
    """Return what is written: what each of three writers commits, group by group."""
    rng = random.Random("what the files hold")

    def put(category: str, at: Any, size: int, ttl: float | None = None) -> Put:
        return Put(category, key(*at) if isinstance(at, tuple) else key(at), rng.randbytes(size), ttl)

    groups: list[list[Op]] = []
    for at in range(24):
        ops: list[Op] = [
            put("small", (f"channel-{row % 5}", at * 10 + row), rng.randrange(0, 160)) for row in range(10)
        ]
        ops += [put("large", at, rng.randrange(4_200, 9_000))]
        ops += [put("lasting", (at, row), 40, ttl=3_600) for row in range(2)]
        if at < 8:  # so few that the version after they were reaped isn't that of another group
            ops += [put("ended", at, 40, ttl=10 + at)]
        ops += [Put("objects", key(at), CBOR.encode({"name": f"object {at}", "sizes": [at] * 9, "at": at / 7}))]
        ops += [Put("texts", key(f"setting-{at}"), b"on"), Put("counters", key(at % 3), CBOR.encode(at))]
        if at % 3 == 2:
            ops += [Delete("large", key(at - 1)), DeletePrefix("small", key(f"channel-{at % 5}")), put("small", at, 9)]
        groups.append(ops)
    return [groups[:8], groups[8:16], groups[16:]]


def states(writers: list[list[list[Op]]]) -> dict[int, State]:
    """Return what the job holds after each group, by its version."""
    now: State = {}
    version = 0
    found = {0: now}
    for ops in (group for writer in writers for group in writer):
        now = {category: dict(rows) for category, rows in now.items()}
        for op in ops:
            version += 1
            rows = now.setdefault(op.category, {})
            if isinstance(op, Put):
                ends_ms = None if op.ttl is None else BEGUN_MS + round(op.ttl * 1000)
                rows[bytes(op.key)] = Found(bytes(op.payload), version, ends_ms)
            elif isinstance(op, Delete):
                rows.pop(bytes(op.key), None)
            elif isinstance(op, DeletePrefix):
                prefix = bytes(op.prefix)
                for at in [at for at in rows if prefix <= at < prefix + b"\xff"]:
                    del rows[at]
        found[version] = now
    return found


def visible(state: State, now_ms: int = NOW_MS) -> State:
    """Return what of a state is live at a time."""
    live = {
        category: {at: row for at, row in sorted(rows.items()) if row.expires_ms is None or row.expires_ms > now_ms}
        for category, rows in state.items()
    }
    return {category: rows for category, rows in live.items() if rows}


def original_contents() -> dict[str, list[tuple[Any, bytes]]]:
    """Return the rows of a file of format 1."""
    from persistency.codec.fixed import fixed_key, i64, u64

    rng = random.Random("what the original's file holds")
    log = [(fixed_key(f"ch{at % 5}", i64(at - 100), u64(at)), rng.randbytes(rng.randrange(150))) for at in range(300)]
    return {
        "log": log,
        "large": [(fixed_key(f"l{at}"), rng.randbytes(rng.randrange(4_200, 9_000))) for at in range(20)],
        "meta": [(fixed_key(f"ch{at}"), b"true") for at in range(5)],
    }


@cache
def known_states(original: bool) -> dict[int, State]:
    """Return what the job has held, by its version; of format 1, what is made of it."""
    if not original:
        return states(written())
    rows_of = original_contents().items()
    return {0: {name: {bytes(at): Found(payload, 0, None) for at, payload in rows} for name, rows in rows_of}}


# -- the files, undamaged ---------------------------------------------------------------------------------------------


def in_child(run: Callable[[], None]) -> None:
    """Run a function in a fork of this process; it ends in order, or by killing itself."""
    child, pipe = fork(lambda _pipe: run())
    os.close(pipe)
    status = os.waitpid(child, 0)[1]
    assert status == 0 or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL), status


def commit_groups(root: Path, job_id: str, groups: list[list[Op]], options: dict[str, Any], *, killed: bool) -> None:
    """Commit groups, each in a transaction of its own, and close the job or kill the process."""
    with Persistency(root, clock=lambda: BEGUN_MS / 1000) as persistency:
        job = persistency.open_job(job_id, **options)
        for ops in groups:
            job.commit(ops).result()
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)


def copy_job(root: Path, job_id: str) -> None:
    """Write a backup and an export of a job beside it."""
    with Persistency(root, clock=lambda: BEGUN_MS / 1000) as persistency, persistency.open_job(job_id) as job:
        job.backup(root / f"{job_id}.backup").result()
        job.export(root / f"{job_id}.cbor").result()


def write_format_1(path: Path) -> None:
    """Write a file as the original did, with rows that were taken out again."""
    from tests.test_original_files import write_original

    contents = original_contents()
    write_original(path, {**contents, "dropped": [(at, payload * 2) for at, payload in contents["large"]]})
    connection = apsw.Connection(str(path))
    connection.execute("DELETE FROM kv WHERE category = CAST('dropped' AS BLOB)")
    connection.close()


def make_files(kind: Kind, directory: Path) -> None:
    """Make the files of a kind in `root`, and in `older` what the same job had long before."""
    known_states(kind.original)  # once, for all forks
    root, older = directory / "root", directory / "older"
    older.mkdir(parents=True)
    beside = [[Put("rows", key(at), b"%d" % at)] for at in range(BESIDE_ROWS)]
    in_child(lambda: commit_groups(root, BESIDE, beside, {}, killed=False))
    if kind.original:
        in_child(lambda: write_format_1(root / f"{kind.job_id}.db"))
        return
    first, second, third = written()
    in_child(lambda: commit_groups(root, kind.job_id, first, kind.options, killed=False))
    # The older log has half of what the file will have, so that together they are no state the job ever had.
    in_child(lambda: commit_groups(root, kind.job_id, second[:4], kind.options, killed=True))
    for path in root.glob(f"{kind.job_id}.db*"):
        shutil.copy(path, older)
    in_child(lambda: commit_groups(root, kind.job_id, second[4:], kind.options, killed=False))
    in_child(lambda: commit_groups(root, kind.job_id, third, kind.options, killed=kind.live))
    if kind.used:
        in_child(lambda: copy_job(root, kind.job_id))
    assert (root / f"{kind.job_id}.db-wal").exists() == kind.live


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(data: bytearray, rng: random.Random, unit: int) -> str:
    """Flip one to eight bits, half of them where it hurts: in the heads of pages."""
    places = []
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5, 8))):
        at = rng.randrange(len(data))
        if rng.random() < 0.5:
            at = rng.randrange(0, len(data), unit) + rng.randrange(108)
        if rng.random() < 0.1:
            at = rng.randrange(100)
        at = min(at, len(data) - 1)
        data[at] ^= 1 << rng.randrange(8)
        places.append(at)
    return f"bits flipped in bytes {places}"


def pages_at(data: bytearray, rng: random.Random, unit: int) -> tuple[int, int]:
    """Return where two pages begin, as often as not near to each other, as the leaves of one tree are."""
    first = LOG_HEADER if unit == FRAME else 0
    there = range(first, max(first + 1, len(data) - unit + 1), unit)
    one = rng.randrange(len(there))
    near = range(max(0, one - 3), min(len(there), one + 4)) if rng.random() < 0.5 else range(len(there))
    other = rng.choice([at for at in near if at != one] or [one])
    return there[one], there[other]


def spoil(data: bytearray, how: str, rng: random.Random, unit: int) -> str:
    """Damage the contents of a file in place; return what was done, in words."""
    size = len(data)
    if how == "flip":
        return flip(data, rng, unit)
    if how == "cut":
        # At the end of a sector as often as anywhere.
        del data[rng.randrange(size) if rng.random() < 0.5 else SECTOR * rng.randrange(-(-size // SECTOR)) :]
        return f"cut at {len(data)} of {size}"
    if how == "zero":
        at = pages_at(data, rng, unit)[0]
        data[at : at + unit] = bytes(len(data[at : at + unit]))
        return f"zeroed {unit} bytes at {at}"
    if how in ("swap", "double"):
        one, other = pages_at(data, rng, unit)
        first, second = data[one : one + unit], data[other : other + unit]
        data[other : other + unit] = first
        if how == "swap":
            data[one : one + unit] = second
        return f"{how}: {unit} bytes at {one} and {other}"
    if how == "garbage":
        data[:] = rng.randbytes(size)
        return "garbage of the same size"
    assert how == "empty"
    data.clear()
    return "emptied"


# How often each kind of damage comes, of a hundred.
HOWS = {"flip": 52, "cut": 24, "zero": 6, "swap": 5, "double": 3, "garbage": 2, "empty": 1, "generation": 4, "stray": 3}


def damage(kind: Kind, root: Path, older: Path, rng: random.Random, cut_at: int | None) -> tuple[str, bool]:
    """Damage one of a job's files; return in words what was done, and whether the file has other bytes than before."""
    name = kind.job_id if kind.job_id == "Node" else file_name(kind.job_id)[:-3]
    path = root / f"{name}{rng.choice(kind.files)}"
    how = "cut" if cut_at is not None else rng.choices(list(HOWS), list(HOWS.values()))[0]
    log = path.with_name(f"{name}.db-wal")
    if how == "generation" and not (kind.original or kind.harmless or kind.used == "import"):
        # A log that fits no file: its own earlier one for the log, or for a file that has none.
        aged = path if kind.live else log
        shutil.copy(older / aged.name, aged)
        return f"{aged.suffix} of an earlier generation", False
    if how == "stray" and not (kind.live or kind.used == "import"):
        journal = rng.random() < 0.5
        beside = path.with_name(f"{name}.db-journal") if journal else log
        beside.write_bytes((JOURNAL_MAGIC if journal and rng.random() < 0.5 else b"") + rng.randbytes(20_000))
        return f"garbage as {beside.suffix}", False
    before = path.read_bytes()
    data = bytearray(before)
    if cut_at is not None:
        del data[cut_at:]
        done = f"cut at {cut_at}"
    else:
        how = "flip" if how in ("generation", "stray") else how  # which this kind hasn't
        unit = FRAME if path.suffix == ".db-wal" else PAGE
        done = spoil(data, how, rng, unit)
    path.write_bytes(data)
    return f"{path.suffix}: {done}", data != before


# -- what came of it --------------------------------------------------------------------------------------------------


class Hung(BaseException):
    """A reply that doesn't come: the process the case runs in can't go on."""


@dataclass
class Told:
    """What came of a case."""

    number: int
    damage: str = ""
    refused: bool = False  # it couldn't be opened
    earlier: bool = False  # all that is told is from a state the job had before
    errors: dict[str, int] = field(default_factory=dict)  # by class
    changed: list[str] = field(default_factory=list)  # what of the answers differs from what was written
    findings: list[list[str]] = field(default_factory=list)
    peak_kib: int = 0  # of the process


# What damage may be answered with; the last two where a number, a version or a payload has changed.
PROPER = (StorageError, Poisoned, WriteFailed, SchemaTooNew, Conflict, QuotaExceeded)


class Watch:
    """Notes down what nobody is told: exceptions of threads, of `__del__`, and those that are only logged."""

    def __init__(self) -> None:
        self.seen: list[list[str]] = []
        threading.excepthook = lambda what: self._note("thread", what.exc_value)
        sys.unraisablehook = lambda what: self._note("unraisable", what.exc_value)
        handler = logging.Handler()
        handler.emit = self._log  # type: ignore[method-assign]
        logging.getLogger().addHandler(handler)

    def _note(self, what: str, error: BaseException | None) -> None:
        told = "no exception" if error is None else "".join(traceback.format_exception(error))
        self.seen.append([what, told[-1_500:]])

    def _log(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not isinstance(error, PersistencyError):
            self._note("logged", error)
        elif not record.name.startswith("persistency"):
            self.seen.append(["logged", record.getMessage()])

    def take(self) -> list[list[str]]:
        """Return what was seen since the last time."""
        seen, self.seen = self.seen, []
        return seen


class Judge:
    """Holds the answers of one case against what was written. `strict`: they must be right."""

    def __init__(self, told: Told, patience: float, *, strict: bool) -> None:
        self.told = told
        self.patience = patience
        self.strict = strict
        self.proper: tuple[type[Exception], ...] = PROPER
        self.errors: Counter[str] = Counter()
        self.changed: set[str] = set()

    def find(self, what: str, detail: str) -> None:
        """Note a finding down."""
        self.told.findings.append([what, detail])

    def differ(self, part: str, detail: str) -> None:
        """Note down that an answer isn't what was written."""
        self.changed.add(part)
        if self.strict:
            self.find("wrong", f"{part}: {detail}")

    @contextlib.contextmanager
    def asking(self, what: str) -> Iterator[None]:
        """Take what an answer raises: only errors of ours may come, and soon."""
        try:
            yield
        except TimeoutError as error:
            self.find("hang", f"{what}: no answer within {self.patience} s")
            raise Hung from error
        except PersistencyError as error:
            self.errors[type(error).__name__] += 1
            self.look_at(what, error)
            if self.strict:
                self.find("wrong", f"{what}: {error!r}")
        except (Hung, KeyboardInterrupt):
            raise
        except BaseException:
            self.find("foreign", f"{what}: {traceback.format_exc()[-1_500:]}")

    def look_at(self, what: str, error: BaseException) -> None:
        """Look at an error and what is behind it."""
        if not isinstance(error, self.proper):
            self.find("improper", f"{what}: {error!r} is no answer to a damaged file")
        if isinstance(error, Poisoned) and not isinstance(error.__cause__, StorageError):
            self.find("disguised", f"{what}: a job was poisoned by {error.__cause__!r}")
        elif isinstance(error, Poisoned) and not isinstance(error.__cause__, Corrupt):
            self.find("stalled", f"{what}: damage was waited out like a fault that passes: {error.__cause__!r}")
        if isinstance(error, WriteFailed):
            for failure in error.failures:
                self.look_at(f"{what}, {type(failure.op).__name__}", failure.error)
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError | apsw.NoMemError):
                self.find("memory", f"{what}: {error!r} because of {cause!r}")
            cause = cause.__cause__

    def ask(self, what: str, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Ask for something and wait for it; `None` if there was an error."""
        with self.asking(what):
            answer = call(*args, **options)
            return answer.result(self.patience) if isinstance(answer, Reply) else answer
        return None

    def hold(self, part: str, expected: Any, call: Callable[..., Any], *args: Any) -> None:
        """Ask for something, and hold it against what it should be."""
        before = self.errors.total()
        answer = self.ask(part, call, *args)
        if before == self.errors.total() and answer != expected:
            self.differ(part, f"{answer!r:.200} instead of {expected!r:.200}")

    def hold_rows(self, what: str, expected: Sequence[tuple[bytes, Any]], found: Iterable[Any] | None) -> None:
        """Hold pairs of a key and what is there against those that should be, and say what differs."""
        if found is None:  # an error
            return
        found = [(at, value) for at, value in found]
        if any(type(at) is not Key for at, _ in found):
            self.find("type", f"{what}: keys that are none in {found!r:.300}")
        if any(type(row) is bytes for _, row in expected) and any(type(row) is not bytes for _, row in found):
            self.find("type", f"{what}: payloads that are none in {found!r:.300}")
        if found == list(expected):
            return
        wanted, there = dict(expected), dict(found)
        if there.keys() - wanted.keys():
            self.differ("key", f"{what}: {sorted(there.keys() - wanted.keys())!r:.200} were never written")
        if wanted.keys() - there.keys():
            self.differ("row", f"{what}: {len(wanted.keys() - there.keys())} are missing")
        if any(there[at] != wanted[at] for at in there.keys() & wanted.keys()):
            self.differ("payload", f"{what}: the contents differ")
        if there == wanted:
            self.differ("order", what)


# -- using a job ------------------------------------------------------------------------------------------------------


def read(job: Reads, judge: Judge, expected: State) -> None:
    """Read everything in every way."""
    ask, hold, hold_rows = judge.ask, judge.hold, judge.hold_rows
    hold("category", sorted(expected), job.categories)
    for category, rows in expected.items():
        pairs = [(at, row.payload) for at, row in rows.items()]
        keys = list(map(Key, rows))
        middle = len(keys) // 2
        hold_rows("scan", pairs, ask("scan", job.scan, category))
        hold_rows("scan", pairs[::-1][:50], ask("scan", job.scan, category, reverse=True, limit=50))
        first = ask("scan_prefix", job.scan_prefix, category, keys[0], limit=1)
        hold_rows("scan_prefix", pairs[:1], first)
        hold_rows("iterate", pairs, ask("iterate", walk, judge, job.iterate(category, page=7)))
        walked = ask("iterate", walk, judge, job.iterate(category, reverse=True, page=32, keys_only=True))
        hold_rows("iterate", [(at, None) for at in keys[::-1]], walked and [(at, None) for at in walked])
        hold("count", len(rows), job.count, category)
        hold("count", middle, job.count, category, KeyRange(None, keys[middle]))
        found = ask("get_many", job.get_many, category, keys)
        hold_rows("get_many", pairs, found and found.items())
        for at, row in rows.items():
            hold("payload", row.payload, job.get, category, Key(at))
        for at, row in list(rows.items())[::7]:
            hold("entry", Entry(Key(at), *row), job.entry, category, Key(at))
            hold("row", True, job.exists, category, Key(at))
        snapshot: list[Entry] | None = ask("snapshot", job.snapshot, category)
        if snapshot is not None:
            entries = {entry.key: Found(entry.payload, entry.version, entry.expires_ms) for entry in snapshot}
            if any(type(row.payload) is not bytes or type(row.version) is not int for row in entries.values()):
                judge.find("type", f"snapshot: {snapshot!r:.300}")
            hold_rows("snapshot", list(rows.items()), sorted(entries.items()))
    used = sum(len(row.payload) for rows in expected.values() for row in rows.values())
    hold("used", used, job.storage_used)


def walk(judge: Judge, pages: Iterable[Any]) -> list[Any]:
    """Return what is on all pages; there must be a last one."""
    found = list(islice(pages, WALKED_MAX))
    if len(found) == WALKED_MAX:
        judge.find("endless", f"a walk over a few hundred rows has given {WALKED_MAX:,}")
    return found


def read_views(job: Job, judge: Judge, expected: State) -> None:
    """Read through the views, which decode what they get."""
    objects, texts = Category(job, "objects"), KVStore(job, category="texts")
    values = {Key(at): CBOR.decode(row.payload) for at, row in expected.get("objects", {}).items()}
    found = judge.ask("objects", objects.scan)
    judge.hold_rows("objects", list(values.items()), found and [(row.key, row.value) for row in found])
    for at, value in values.items():
        judge.hold("payload", value, objects.get, at)
    names = sorted(Key(at).parts[0] for at in expected.get("texts", {}))
    judge.hold("row", names, texts.list, "")


def read_changes(job: Reads, judge: Judge) -> None:
    """Read the changes that are kept."""
    after = 0
    with judge.asking("changes"):
        try:
            job.changes(0, 10).result(judge.patience)
        except FeedTruncated as gone:
            after = gone.oldest - 1
    found: list[Change] = []
    while part := judge.ask("changes", job.changes, found[-1].version if found else after, 40):
        found += part
        if len(found) >= WALKED_MAX:
            judge.find("endless", f"{KEPT['feed_changes_max']} changes are kept, and {len(found):,} were given")
            break
    versions = [change.version for change in found]
    if versions != sorted(set(versions)):
        judge.differ("order", f"changes in no order: {versions}")
    if len(found) != KEPT["feed_changes_max"] and not judge.errors:
        judge.differ("changes", f"{len(found)} are kept")


def copy(job: Job, judge: Judge, expected: State, target: Path, *, failed: bool, original: bool) -> None:
    """Look at the job as a whole, and copy it: what is wrong with it, as where reads have `failed`, must be seen."""
    problems = judge.ask("check", job.check)
    if problems == [] and failed:
        judge.find("unseen", f"check() finds nothing wrong, and reads have failed: {dict(judge.errors)}")
    if problems and not original:  # whose keys are no tuples
        judge.differ("problems", f"{problems!r:.300}")
    before = judge.errors.total()
    judge.ask("backup", job.backup, target)
    if before == judge.errors.total() and is_malformed(target, whole=True):
        judge.find("unverified", f"a backup that was made without an error is malformed; check() has said {problems}")
    judge.hold("count", sum(map(len, expected.values())), job.export, BytesIO())


async def read_on_loop(job: Job, judge: Judge, expected: State) -> None:
    """Read under asyncio."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: judge.find("loop", f"{context!r:.1500}"))
    for category, rows in expected.items():
        pairs = [(at, row.payload) for at, row in rows.items()]
        with judge.asking("await"):
            async with asyncio.timeout(judge.patience):
                judge.hold_rows("await scan", pairs, await job.scan(category))
        with judge.asking("await"):
            async with asyncio.timeout(judge.patience):
                found: list[Any] = []
                async for row in job.iterate(category, page=32):
                    found.append(row)
                    if len(found) == WALKED_MAX:
                        judge.find("endless", f"async for has given {WALKED_MAX:,}")
                        break
                judge.hold_rows("async for", pairs, found)
        with judge.asking("await"):
            async with asyncio.timeout(judge.patience):
                await asyncio.gather(*(job.get(category, Key(at)) for at in rows), job.count(category))


# What there is after `write`, where nothing goes wrong.
OWN = {(1,): b"1", (3,): b"three" * 2_000, (4,): b"four", (5,): b"5", (2,): None, ("many", 1): None}


def write(job: Job, judge: Judge, expected: State) -> None:
    """Write in every way, among the rows that should be there as well as beside them."""
    ask = judge.ask
    at = {category: list(map(Key, rows)) for category, rows in expected.items()}
    some = next(iter(at))
    rows = at[some]
    ask("put", job.put, "own", (1,), b"one")
    ask("put", job.put, "own", (2,), b"two", ttl=3_600)
    ask("put", lambda: [job.put("own", ("many", number), b"%d" % number) for number in range(200)])
    ask("put", job.put, some, rows[0], b"x" * 20_000)
    ask("flush", job.flush)
    batch: list[Op] = [Check("own", (3,), None), Put("own", (3,), b"three" * 2_000), Delete("own", (2,))]
    batch += [Put(category, keys[len(keys) // 2], b"anew") for category, keys in at.items()]
    ask("commit", job.commit, batch)
    ask("persist", job.persist, [Put("own", (4,), b"four"), *(Delete(name, at[name][-1]) for name in at)])
    judge.hold("number", 5, job.increment, "own", ("n",), 5)
    judge.hold("number", 12, job.increment, "own", ("n",), 7)
    ask("increment", job.increment, "counters", (0,))
    judge.hold("swap", True, job.compare_and_set, "own", (1,), b"one", b"1")
    ask("touch", job.touch, some, rows[1], 3_600)
    ask("run", job.run, count_and_put, some)
    ask("delete", job.delete, some, rows[2])
    ask("delete_acked", job.delete_acked, some, rows[3])
    ask("delete_prefix", job.delete_prefix, "own", ("many",))
    ask("delete_prefix", job.delete_prefix, "small", ("channel-1",))
    ask("delete_prefix_acked", job.delete_prefix_acked, "small", ("channel-2",))
    ask("delete_range", job.delete_range, "large", KeyRange(at.get("large", rows)[2], None))
    ask("delete_range_acked", job.delete_range_acked, some, KeyRange(rows[1], rows[-1]))
    ask("drain", job.drain)
    ask("flush", job.flush)
    ask("flush", job.flush, sync=True)
    ask("statistics", job.statistics)


def count_and_put(transaction: Transaction, category: str) -> int:
    """Do a little of everything inside a job."""
    transaction.put("own", (5,), b"5")
    return transaction.count(category)


def reread(job: Job, judge: Judge, expected: State, options: dict[str, Any]) -> None:
    """Read what was written, and whatever else there is by now."""
    for at, payload in OWN.items():
        judge.hold("own", payload, job.get, "own", at)
    for category in [*expected, "own"]:
        judge.ask("scan", job.scan, category)
        judge.ask("snapshot", job.snapshot, category)
        judge.ask("count", job.count, category)
    judge.ask("storage_used", job.storage_used)
    if options:
        read_changes(job, judge)


# -- a case -----------------------------------------------------------------------------------------------------------


def contents_of(paths: Iterable[Path]) -> dict[Path, bytes]:
    """Return what files hold, those that are there."""
    return {path: path.read_bytes() for path in paths if path.exists()}


def is_malformed(path: Path, *, whole: bool = False) -> bool:
    """Say whether SQLite takes a file for a damaged one of its own, at a first look or having looked at the whole."""
    uri = path.absolute().as_uri() + "?immutable=1"
    connection = apsw.Connection(uri, flags=apsw.SQLITE_OPEN_READONLY | apsw.SQLITE_OPEN_URI)
    try:
        connection.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        return whole and connection.execute("PRAGMA integrity_check").fetchall() != [("ok",)]
    except apsw.CorruptError:
        return True
    except apsw.Error:
        return False
    finally:
        connection.close()


class Case:
    """A damaged job beside a sound one, from the first opening to the drop."""

    def __init__(self, plan: Plan, told: Told, rng: random.Random) -> None:
        self.kind = plan.kind
        self.told = told
        self.place = plan.work / "place"
        shutil.copytree(plan.work / "base" / "root", self.place)
        cut_at = SECTOR * told.number if plan.sweep else None
        told.damage, self.own = damage(self.kind, self.place, plan.work / "base" / "older", rng, cut_at)
        self.judge = Judge(told, plan.patience, strict=self.kind.harmless)
        name = file_name(self.kind.job_id)
        self.path, self.plain = self.place / name, self.place / f"{self.kind.job_id}.db"
        self.log = self.place / f"{name}-wal"
        self.aside = self.place / f"{self.kind.job_id}{self.kind.files[0]}"  # what is no part of the job
        self.target = plan.work / "copy"
        self.before = contents_of([self.aside] if self.kind.used else [self.path, self.plain, self.log])
        self.on_loop, self.whole = rng.random() < 0.25, rng.random() < 0.35
        # Rows that end have changes of their own: once they are there, and once they aren't.
        self.now_ms = BEGUN_MS if self.kind.options and rng.random() < 0.5 else NOW_MS
        self.known = known_states(self.kind.original)
        self.last = visible(self.known[max(self.known)], self.now_ms)
        self.persistency = Persistency(
            self.place, clock=lambda: self.now_ms / 1000, open_timeout=plan.patience, exit_timeout=plan.patience
        )
        self.beside = self.persistency.open_job(BESIDE)

    def run(self, *, leave_open: bool) -> None:
        """Use everything. `leave_open`: end as a process does that closes nothing."""
        judge = self.judge
        if self.whole and self.kind.job_id != "Node":  # who only reads adopts nothing
            self._look_on()
        if self.kind.used == "restore":
            judge.ask("restore", self.persistency.restore, self.kind.job_id, self.aside)
            self._judge_refusal()
        job = self._open()
        sound = False
        if job is None:
            self.told.refused = True
        else:
            if self.kind.used == "import":
                judge.ask("import_", job.import_, self.aside)
                self._judge_refusal()
            self._use(job)
            sound = not judge.errors
            if leave_open:
                atexit._run_exitfuncs()
                self._judge_beside()
                return
            judge.ask("close", job.close, judge.patience)
        self._judge_files()
        again = self._open()
        if again is not None:
            if sound and not judge.errors:
                reread(again, judge, self.last, self.kind.options)
            judge.ask("close", again.close, judge.patience)
        self._judge_beside()
        self._drop()

    def _look_on(self) -> None:
        """Read as somebody does who doesn't own the job: nothing is changed by it."""
        judge = Judge(self.told, self.judge.patience, strict=self.kind.harmless)
        if not self.before.get(self.path, b"-"):
            judge.proper = (*PROPER, JobNotFound)  # an empty file is no job yet
        reader = judge.ask("open_reader", self.persistency.open_reader, self.kind.job_id)
        if reader is not None:
            judge.strict = judge.strict or (self.kind.prefix and self.own)
            read(reader, judge, self._expected(judge, judge.ask("version", reader.version)))
            judge.ask("close", reader.close)
        for path, data in contents_of(self.before).items():
            if data != self.before[path]:
                judge.find("touched", f"{path.name} was changed by a reader")

    def _use(self, job: Job) -> None:
        judge = self.judge
        judge.strict = judge.strict or (self.kind.prefix and self.own)
        version = judge.ask("version", job.version)
        expected = self._expected(judge, version)
        self.told.earlier = version in self.known and version != max(self.known)
        if self.on_loop:
            asyncio.run(read_on_loop(job, judge, expected))
        before = judge.errors.total()
        read(job, judge, expected)
        if self.whole:
            copy(job, judge, expected, self.target, failed=judge.errors.total() > before, original=self.kind.original)
        read_views(job, judge, expected)
        if self.kind.options:
            read_changes(job, judge)
        write(job, judge, self.last)
        if self.whole:
            judge.ask("compact", job.compact)

    def _expected(self, judge: Judge, version: Any) -> State:
        """Return what is live in the state that ended with a version; of one that none did, in the last."""
        for last, state in reversed(self.known.items()):
            live = visible(state, self.now_ms)
            reaped = sum(map(len, state.values())) - sum(map(len, live.values())) if self.kind.options else 0
            if version in (last, last + reaped):  # where changes are kept, each row that is reaped takes a version
                return live
        judge.differ("version", f"no group ended with {version}")
        return self.last

    def _judge_refusal(self) -> None:
        """Where a file was refused the job must be as it was; one that carries a checksum can't be taken in."""
        judge = self.judge
        self.told.refused = bool(judge.errors)
        if self.own and self.told.refused:
            judge.strict = True
        elif self.own and self.kind.used == "import":
            judge.find("wrong", "a damaged export was taken in")

    def _open(self) -> Job | None:
        def open_job() -> Job:
            return self.persistency.open_job(
                self.kind.job_id, stall_timeout=STALL_SECONDS, on_error=self._on_error, **self.kind.options
            )

        job: Job | None = self.judge.ask("open_job", open_job)
        return job

    def _on_error(self, _job_id: str, failures: Sequence[Failure]) -> None:
        for failure in failures:
            self.judge.look_at("on_error", failure.error)

    def _judge_files(self) -> None:
        """What was there is still there, and as it was if the job couldn't be opened."""
        after = contents_of(self.before)
        for path, data in self.before.items():
            there = after.get(path, b"")
            if path == self.plain != self.path and not there:
                there = contents_of([self.path]).get(self.path, b"")  # it was adopted
            carried = path == self.log and not self.told.refused and self.before.get(self.path)
            untouched = self.told.refused or self.kind.used
            if data and not there and not carried:
                self.judge.find("deleted", f"{path.name} of {len(data)} bytes was deleted by opening it")
            elif there[HEADER:] != data[HEADER:] and untouched:  # the header says how the log is kept
                self.judge.find("touched", f"{path.name} was changed, though it couldn't be opened, or was only read")
        if self.plain != self.path and self.plain.exists() and self.path.exists() and is_malformed(self.plain):
            self.judge.find("vanished", f"{self.plain.name} is damaged, and an empty job was begun beside it")

    def _judge_beside(self) -> None:
        """What happens to one job is no concern of another."""
        beside = self.beside
        try:
            rows = beside.scan("rows").result(self.judge.patience)
            assert rows == [(key(at), b"%d" % at) for at in range(BESIDE_ROWS)], rows
            assert beside.commit(Put("rows", (BESIDE_ROWS,), b"")).result(self.judge.patience) == BESIDE_ROWS + 1
            beside.flush(sync=True).result(self.judge.patience)
            assert beside.statistics().failed == 0
        except Exception as error:
            self.judge.find("neighbour", f"{error!r}")

    def _drop(self) -> None:
        """Drop the job and close everything; nothing of it stays."""
        judge, path = self.judge, self.path
        stored = judge.ask("stored_jobs", self.persistency.stored_jobs)
        if path.exists() and self.kind.job_id not in [found.job_id for found in stored or ()]:
            judge.find("wrong", f"the job isn't among those stored: {stored}")
        dropped = judge.ask("drop_job", self.persistency.drop_job, self.kind.job_id)
        if dropped is not None and path.exists():
            judge.find("wrong", f"dropped {dropped}, but {path.name} is still there")
        judge.ask("close", self.persistency.close, judge.patience)
        for thread in threading.enumerate():
            if thread.name.startswith("persistency:"):
                thread.join(judge.patience)
                if thread.is_alive():
                    judge.find("left", f"the thread {thread.name!r}")
        judge.told.findings += left_open(self.place)


_told_open: set[tuple[int, int]] = set()


def left_open(place: Path) -> list[list[str]]:
    """Return what this process has open below a folder and hasn't been told of yet."""
    findings = []
    for number in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(OSError):
            name, found = os.readlink(f"/proc/self/fd/{number}"), os.fstat(int(number))
            if name.startswith(str(place)) and (found.st_dev, found.st_ino) not in _told_open:
                _told_open.add((found.st_dev, found.st_ino))
                findings.append(["left", f"an open descriptor of {name}"])
    return findings


# -- many cases -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which cases are run, and how. In a `sweep` case n cuts the file at n sectors."""

    kind: Kind
    name: str
    seed: int
    numbers: range
    sweep: bool
    patience: float
    limit: float
    spoil: Callable[[], None] | None  # puts a defect into the engine
    work: Path


def run_batch(plan: Plan, numbers: range, pipe: int) -> None:
    """Run some cases in this process, and say what came of each on the pipe, a line before it and one after it."""
    os.dup2(os.open(plan.work / "stderr", os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_BYTES_MAX, ADDRESS_BYTES_MAX))
    if plan.spoil is not None:
        plan.spoil()
    watch = Watch()
    with os.fdopen(pipe, "w", buffering=1) as stream:
        for number in numbers:
            told = Told(number)
            rng = random.Random(f"{plan.seed} {plan.name} {number} {plan.sweep}")
            shutil.rmtree(plan.work / "place", ignore_errors=True)
            case = Case(plan, told, rng)
            print(json.dumps(asdict(told)), file=stream)
            hung = False
            try:
                # The hooks of the interpreter's exit run once in a process.
                case.run(leave_open=number == numbers[-1])
            except Hung:
                hung = True
            if number == numbers[-1]:
                gc.collect()
            told.findings += watch.take() + said_on_stderr()
            told.errors, told.changed = dict(case.judge.errors), sorted(case.judge.changed)
            told.peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            print(json.dumps(["over", asdict(told)]), file=stream)
            if hung:
                return


def said_on_stderr() -> list[list[str]]:
    """Return what was printed there since the last time, which nothing should be."""
    said = os.pread(2, 4_000, 0).decode(errors="replace")
    os.ftruncate(2, 0)
    return [["said", said]] if said else []


@dataclass
class Totals:
    """What came of all cases."""

    cases: int = 0
    refused: int = 0  # couldn't be opened
    failed: int = 0  # were opened, and errors came later
    changed: int = 0  # without any error, but with answers that differ
    earlier: int = 0  # held a state that was once right: the last groups are missing
    right: int = 0  # nothing that counts was damaged
    parts: dict[str, int] = field(default_factory=dict)  # of the changed: what differs
    errors: dict[str, int] = field(default_factory=dict)  # in how many cases, by class
    peak_mib: float = 0.0
    seconds: float = 0.0
    kinds: dict[str, int] = field(default_factory=dict)  # of findings
    findings: list[str] = field(default_factory=list)

    def add(self, told: Told, where: str) -> None:
        """Count a case."""
        self.cases += 1
        if told.refused:
            self.refused += 1
        elif told.errors:
            self.failed += 1
        elif told.changed:
            self.changed += 1
            self.parts = dict(Counter(self.parts) + Counter(told.changed))
        elif told.earlier:
            self.earlier += 1
        else:
            self.right += 1
        self.errors = dict(Counter(self.errors) + Counter(told.errors.keys()))
        self.peak_mib = max(self.peak_mib, round(told.peak_kib / 1024, 1))
        first = dict(reversed(told.findings))  # of each kind; the others tell the same
        for kind, detail in first.items():
            self.kinds[kind] = self.kinds.get(kind, 0) + 1
            if len(self.findings) < FINDINGS_MAX:
                self.findings.append(f"{where}, {told.damage}: {kind}: {detail}")


class Loop:
    """All cases of a plan, a process for some of them at a time."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.totals = Totals()

    def batch(self, first: int) -> int:
        """Run cases from `first` on; return the number of the next one to be run."""
        plan, numbers = self.plan, self.plan.numbers
        size = BATCH_PLANTED if plan.spoil else BATCH
        part = numbers[numbers.index(first) :][:size]
        child, pipe = fork(lambda pipe: run_batch(plan, part, pipe))
        data = bytearray()
        current: Told | None = None  # the case that runs
        following, stuck = first, False
        while True:
            if not select.select([pipe], [], [], plan.limit)[0]:
                stuck = True
                os.kill(child, signal.SIGABRT)  # what every thread is doing then stands in its stderr
                break
            piece = os.read(pipe, 65536)
            if not piece:
                break
            data += piece
            while (end := data.find(b"\n")) >= 0:
                said = json.loads(data[:end])
                del data[: end + 1]
                if isinstance(said, list):
                    self._add(Told(**said[1]))
                    current, following = None, following + numbers.step
                else:
                    current = Told(**said)
        os.close(pipe)
        status = os.waitpid(child, 0)[1]
        if status:
            current = current or Told(following)
            about = (self.plan.work / "stderr").read_text(errors="replace")[-4_000:]
            current.findings.append(
                ["stuck", f"not over after {plan.limit} s\n{about}"] if stuck
                else ["crash", f"the process ended with status {status}\n{about}"]
            )  # fmt: skip
            self._add(current)
            following = current.number + numbers.step
        return following

    def _add(self, told: Told) -> None:
        plan = self.plan
        sweep = ", sweep" if plan.sweep else ""
        self.totals.add(told, f"{plan.name!r}, seed {plan.seed}{sweep}, case {told.number}")


def planted(work: Path, seed: int) -> dict[str, Totals]:
    """Have every planted defect looked for, up to its first finding; return what came of each."""
    from tests.test_damage import PLANTED_CASES, PLANTS

    told = {}
    for name, plant in PLANTS.items():
        place = work / plant.kind
        if not place.exists():
            make_files(KINDS[plant.kind], place / "base")
        numbers = range(PLANTED_CASES)
        loop = Loop(
            Plan(KINDS[plant.kind], plant.kind, seed, numbers, False, plant.patience, plant.limit, plant.spoil, place)
        )
        following = 0
        while following < numbers.stop and not loop.totals.kinds:
            following = loop.batch(following)
        told[name] = loop.totals
    return told


def damaged(work: Path, given: argparse.Namespace) -> Iterator[Totals]:
    """Run the cases that were asked for; yield what came of them until now."""
    begun = monotonic()
    kind = KINDS[given.kind]
    make_files(kind, work / "base")
    numbers = range(given.first, given.first + given.cases)
    if given.sweep:
        longest = next((work / "base" / "root").glob(f"{kind.job_id}{kind.files[0]}")).stat().st_size
        numbers = range(given.first, -(-longest // SECTOR), given.sweep)
    loop = Loop(Plan(kind, given.kind, given.seed, numbers, given.sweep > 0, REPLY_SECONDS, CASE_SECONDS, None, work))
    following = numbers.start
    while following < numbers.stop and loop.totals.seconds < given.seconds:
        following = loop.batch(following)
        loop.totals.seconds = round(monotonic() - begun, 3)
        yield loop.totals


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; the exit code is 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*KINDS, "planted"], help="or every planted defect, to see it reported")
    parser.add_argument("--cases", type=int, default=1, help="so many random ones")
    parser.add_argument("--first", type=int, default=0, help="the number of the first one")
    parser.add_argument("--sweep", type=int, default=0, metavar="N", help="cut the file at every N-th sector instead")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time, if that comes first")
    parser.add_argument("--seed", type=int, required=True)
    given = parser.parse_args(arguments)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None
    work = Path(tempfile.mkdtemp(prefix="damaged-", dir=memory))  # which no exit hook of a child takes away
    told = 0.0
    totals = Totals()
    try:
        if given.kind == "planted":
            print(json.dumps({name: asdict(found) for name, found in planted(work, given.seed).items()}), flush=True)
            return 0
        for totals in damaged(work, given):
            if totals.seconds - told > PROGRESS_SECONDS:
                told = totals.seconds
                print(json.dumps(asdict(totals)), flush=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(json.dumps(asdict(totals)), flush=True)
    return 1 if totals.kinds else 0


if __name__ == "__main__":
    sys.exit(main())
