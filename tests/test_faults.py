"""Disks that fail: whatever fails, and when, nothing is lost, nothing is there twice, nobody hangs, and all is told.

The whole engine is played on a file system that fails (`tests.crash.faulty`); here a sample of all there is to fail,
drawn anew each time, in the soak (`tests.soak.faults`) every single call. Before the judge is believed it is shown
engines with a planted defect, each of which it has to report.
"""

from __future__ import annotations

import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import apsw
import pytest

from persistency import Job, Persistency, Poisoned, Put, StorageError, WriteFailed, key
from persistency.actor import turns
from persistency.actor.accounts import Accounts
from persistency.actor.failures import FailureLog
from persistency.errors import Corrupt
from persistency.storage import sqlite
from persistency.storage.port import PLACES, Batch, Group, OutcomeUnknown
from persistency.storage.sqlite import SqliteStore
from tests.crash.faulty import (
    FAULTS,
    NO_FAULT,
    VARIANTS,
    Disk,
    Fault,
    Judge,
    Play,
    Posted,
    Totals,
    Variant,
    full_by_vfs,
    full_in_child,
    memory_disk,
    play_migration,
    play_one,
    rig,
    script,
    sweep,
)

SEED = random.SystemRandom().getrandbits(32)
WAIT = 20.0
SAMPLE = 1  # calls of each operation, for each way it can fail
PLANTED_PLAYS = 80
PLANTED_LIMIT = 0.5  # seconds

WRITE = Fault("write", apsw.SQLITE_IOERR_WRITE)
READ = Fault("read", apsw.SQLITE_IOERR_READ)
SYNC = Fault("sync", apsw.SQLITE_IOERR_FSYNC)
SYNCED = Fault("sync", apsw.SQLITE_IOERR_FSYNC, manner="all")
LIE = Fault("commit", apsw.SQLITE_IOERR_WRITE, manner="all")
GONE = Fault("write", apsw.SQLITE_FULL, sticky=True)


@pytest.fixture
def place() -> Iterator[Path]:
    """An empty directory, in memory where there is one: no power is cut here."""
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory_disk()) as directory:
        yield Path(directory)


@pytest.fixture
def disk() -> Iterator[Disk]:
    """A file system that fails when it is told to."""
    made = Disk()
    yield made
    made.unregister()


def calls_of(disk: Disk, given: Fault) -> int:
    """Return how often what is to fail was called in the last play."""
    return sum(operation == given.operation and given.kind in ("", kind) for operation, kind in disk.calls)


# -- the harness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_clean_play_meets_what_can_fail(variant: Variant, place: Path, disk: Disk) -> None:
    """Without a fault the judge finds nothing, and the script reaches every kind of work that a fault can hit."""
    with rig(hurried=variant.hurried):
        disk.prepare(NO_FAULT, 0)
        play = Play(place / "play", disk, variant, NO_FAULT)
        play.run()
        judge = Judge(play)
        judge.judge()
    assert play.findings == []
    assert play.watch.stalls == len(play.watch.causes) == len(judge.alone) == len(judge.tail) == 0
    called = Counter(disk.calls)
    # The log is written and read, synced and carried over, while the job is open.
    for work, least in ((("write", "wal"), 100), (("read", "wal"), 100), (("sync", "wal"), 5), (("sync", "db"), 5),
                        (("write", "db"), 30), (("read", "db"), 30), (("commit", "main"), 15)):  # fmt: skip
        assert called[work] >= least, called
    assert len(judge.own) == (1 if variant.kept else 0)
    verbs = Counter(entry.asked.verb for entry in play.log if isinstance(entry, Posted))
    assert verbs["increment"] >= 8
    assert verbs["run"] >= 4


def test_no_two_events_are_the_same() -> None:
    """Otherwise it couldn't be told which of them has failed."""
    for variant in VARIANTS:
        events: Counter[Any] = Counter()
        for section in script(variant):
            for asked in section.calls:
                if asked.is_event:
                    events += asked.named
        assert max(events.values()) == 1


# -- planted defects ---------------------------------------------------------------------------------------------------

_apply, _read, _enter, _poison, _intent = (
    SqliteStore.apply,
    SqliteStore.read,
    Accounts._enter,
    turns.Turns.poison,
    sqlite.intent,
)


def swallow() -> Callable[..., Any]:
    """Lose what couldn't be written, and say it was."""

    def apply(self: SqliteStore, group: Group, now_ms: int) -> list[Any]:
        try:
            return _apply(self, group, now_ms)
        except StorageError:
            return [None] * (len(group) // PLACES)

    return apply


def skip() -> Callable[..., Any]:
    """Try again what couldn't be written, but without its first message."""
    failed: list[Any] = []

    def apply(self: SqliteStore, group: Group, now_ms: int) -> list[Any]:
        if failed == group[1:2]:
            failed.clear()
            return [None, *_apply(self, group[PLACES:], now_ms)]
        try:
            return _apply(self, group, now_ms)
        except StorageError:
            failed[:] = group[1:2]
            raise

    return apply


def split() -> Callable[..., Any]:
    """Write all up to the middle of the first large batch of a group that couldn't be written, and give up."""

    def apply(self: SqliteStore, group: Group, now_ms: int) -> list[Any]:
        try:
            return _apply(self, group, now_ms)
        except StorageError as error:
            for at in range(0, len(group), PLACES):
                message = group[at + 1]
                if type(message) is Batch and message.ops > 2:
                    half = message.items[: len(message.items) // (2 * PLACES) * PLACES]
                    _apply(self, [*group[:at], *half], now_ms)
                    raise OutcomeUnknown("half way") from error
            raise

    return apply


def remember() -> Callable[..., Any]:
    """Answer a read that fails with what another one of its kind was told before."""
    told: dict[type, Any] = {}

    def read(self: SqliteStore, message: Any, now_ms: int) -> Any:
        try:
            told[type(message)] = answer = _read(self, message, now_ms)
        except StorageError:
            if type(message) not in told:
                raise
            return told[type(message)]
        return answer

    return read


def deny() -> Callable[..., Any]:
    """Say of what may have been applied that it wasn't."""

    def apply(self: SqliteStore, group: Group, now_ms: int) -> list[Any]:
        try:
            return _apply(self, group, now_ms)
        except OutcomeUnknown as error:
            raise Corrupt("it isn't there", apsw.SQLITE_IOERR_FSYNC) from error

    return apply


def never_sync() -> Callable[..., Any]:
    """Take no barrier for one that wants the medium."""

    def intent(group: Group) -> Any:
        writes, _sync, *rest = _intent(group)
        return writes, False, *rest

    return intent


def count_no_failures() -> Callable[..., Any]:
    """Leave what has failed out of the books."""

    def enter(self: Accounts, committed: int, _failed: int, told: list[Any], answers: list[Any]) -> None:
        _enter(self, committed, 0, told, answers)

    return enter


def answer_nobody() -> Callable[..., Any]:
    """Poison a job, and leave those who wait for it waiting."""

    def poison(self: turns.Turns, cause: BaseException, outcome: str, _answers: list[Any]) -> None:
        _poison(self, cause, outcome, [])

    return poison


class Plant(NamedTuple):
    """A defect: what `make` gives takes the place of something; with `given` failing, one of `kinds` is found."""

    owner: Any
    name: str
    make: Callable[[], Callable[..., Any]]
    given: Fault
    kinds: set[str]
    variant: Variant = Variant()


POWER = Variant("power")
PLANTS = {
    "lost batch": Plant(SqliteStore, "apply", swallow, WRITE, {"lost", "answer", "difference"}),
    "skipped message": Plant(SqliteStore, "apply", skip, WRITE, {"answer", "difference"}),
    "split batch": Plant(SqliteStore, "apply", split, WRITE, {"split", "difference"}),
    "applied twice": Plant(SqliteStore, "_happened", lambda: lambda *_: False, LIE, {"answer", "difference"}),
    "failed sync ignored": Plant(SqliteStore, "_happened", lambda: lambda *_: True, SYNC, {"poison", "lost"}, POWER),
    "skipped sync": Plant(sqlite, "intent", never_sync, NO_FAULT, {"sync"}),
    "stale read": Plant(SqliteStore, "read", remember, READ, {"answer"}),
    "told wrongly": Plant(SqliteStore, "apply", deny, SYNCED, {"beyond"}, POWER),
    "untold failures": Plant(FailureLog, "record", lambda: lambda *_: None, GONE, {"told", "hole", "books", "lost"}),
    "books that don't balance": Plant(Accounts, "_enter", count_no_failures, GONE, {"books"}),
    "nobody answered": Plant(turns.Turns, "poison", answer_nobody, GONE, {"hang"}),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_defect_is_seen(name: str, place: Path, disk: Disk) -> None:
    """An engine that was spoilt on purpose is reported, and as what it is."""
    plant = PLANTS[name]
    totals = Totals()
    with rig():
        play_one(place, disk, plant.variant, NO_FAULT, 0)
        calls = calls_of(disk, plant.given) or 1
        numbers = random.Random(SEED).sample(range(1, calls + 1), min(calls, PLANTED_PLAYS))
        with mock.patch.object(plant.owner, plant.name, plant.make()):
            for at in numbers:
                totals.add(f"call {at}", play_one(place, disk, plant.variant, plant.given, at, limit=PLANTED_LIMIT))
                if plant.kinds & totals.kinds.keys():
                    return
    pytest.fail(f"seed {SEED}: {totals}")


# -- every fault -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_whatever_fails(variant: Variant, place: Path, disk: Disk) -> None:
    """Promises 2, 3, 5, 7: reads, writes, syncs and the rest, failing once or for good, leave nothing but a prefix."""
    rng = random.Random(SEED)
    totals = Totals()
    with rig(hurried=variant.hurried):
        play_one(place, disk, variant, NO_FAULT, 0)
        calls = {given: calls_of(disk, given) for given in FAULTS}
        for given, count in calls.items():
            assert count, given
            for at in rng.sample(range(1, count + 1), min(count, SAMPLE)):
                totals.add(f"{variant}, {given}, call {at}", play_one(place, disk, variant, given, at))
    print(f"seed {SEED}: {totals}")
    assert totals.findings == []
    assert totals.fired >= 0.9 * totals.plays
    assert totals.stalled >= 5
    assert totals.poisoned >= 5


@pytest.mark.parametrize("variant", VARIANTS[1:3], ids=str)
def test_a_commit_that_raised_but_happened_is_not_applied_twice(variant: Variant, place: Path, disk: Disk) -> None:
    """Promise 3: a COMMIT of the script, every other one in turn, raises though it happened; nothing counts twice."""
    totals = Totals()
    with rig(hurried=variant.hurried):
        assert sweep(partial(play_one, place, disk, variant, LIE), str(LIE), totals, stride=2)
    assert totals.findings == []
    assert totals.fired >= 8
    assert totals.poisoned == 0


def test_a_fault_inside_a_checkpoint_fails_no_write(place: Path, disk: Disk) -> None:
    """Promise 5: while only the database file can't be written or cut the job is neither stalled nor poisoned."""
    totals = Totals()
    full = Fault("write", apsw.SQLITE_FULL, sticky=True, kind="db")
    with rig():
        for given in (full, Fault("truncate", apsw.SQLITE_IOERR_TRUNCATE)):
            play = partial(play_one, place, disk, Variant(), given)
            assert sweep(play, str(given), totals, stride=9)
    assert totals.findings == []
    assert totals.fired >= 8
    assert totals.poisoned == totals.stalled == 0


@pytest.mark.parametrize(
    "given", [given for given in FAULTS if not given.kind and given.operation != "commit"], ids=str
)
def test_a_migration_that_fails_leaves_the_old_file_or_the_new(given: Fault, place: Path, disk: Disk) -> None:
    """A file of the original format is migrated whole or not at all, and can be opened once the disk works again."""
    totals = Totals()
    assert sweep(partial(play_migration, place, disk, given), str(given), totals, stride=3)
    assert totals.findings == []
    assert totals.fired >= 1


# -- one fault at a time -----------------------------------------------------------------------------------------------


@pytest.fixture
def job(place: Path, disk: Disk) -> Iterator[Job]:
    """A job on that disk, with rows that are not in memory."""
    with rig(), Persistency(place / "root") as persistency:
        persistency._site.root._vfs = disk.name  # type: ignore[attr-defined]  # a directory's
        with persistency.open_job("job") as job:
            for number in range(200):
                job.put("c", key(number), bytes(500))
        yield persistency.open_job("job")  # anew, so that nothing is in memory, and nothing to be carried over
        disk.disarm()


@pytest.mark.parametrize("how", ["point", "scan", "group"])
def test_a_failed_read_fails_alone(job: Job, disk: Disk, how: str) -> None:
    """Promise 3: a read that meets a read error fails with `StorageError`; the next one, and every write, is fine."""
    # In a group the writes read some pages too, the scan's are by far the most.
    disk.arm("read", 15 if how == "group" else 1, apsw.SQLITE_IOERR_READ)
    if how == "group":
        with job._mailbox._lock:
            job.put("d", key(1), b"before")
            reply: Any = job.scan("c")
            job.put("d", key(2), b"behind")
    else:
        reply = job.get("c", key(7)) if how == "point" else job.scan("c")
    error = reply.exception(WAIT)
    assert isinstance(error, StorageError)
    assert error.code == apsw.SQLITE_IOERR_READ
    assert disk.fired == 1
    assert job.statistics().state == "live"
    assert len(job.scan("c").result(WAIT)) == 200
    assert job.count("d").result(WAIT) == (2 if how == "group" else 0)
    job.flush().result(WAIT)


@pytest.mark.parametrize("manner", ["before", "all"])
def test_a_failed_sync_poisons_at_once_and_says_unknown(job: Job, disk: Disk, manner: str, place: Path) -> None:
    """Promise 3: what a failed fsync was to bring onto the medium is "unknown"; what waits behind it "not applied"."""
    version = job.version().result(WAIT)
    disk.manner = manner
    disk.arm("sync", 1, apsw.SQLITE_IOERR_FSYNC)
    with job._mailbox._lock:
        job.persist([Put("d", key(number), b"x") for number in range(3)])
        flushed = job.flush(sync=True)
    error = flushed.exception(WAIT)
    assert isinstance(error, Poisoned)
    assert isinstance(error.__cause__, StorageError)
    assert error.__cause__.code == apsw.SQLITE_IOERR_FSYNC
    assert job.statistics().state == "poisoned"
    for call in (lambda: job.put("d", key(4), b""), lambda: job.get("d", key(0)), lambda: job.flush()):
        with pytest.raises(Poisoned):
            call()
    with pytest.raises(WriteFailed) as caught:
        job.close()
    assert [(failure.op.key, failure.outcome) for failure in caught.value.failures] == [
        (key(number), "unknown") for number in range(3)
    ]
    disk.disarm()
    with Persistency(place / "root") as persistency, persistency.open_job("job") as again:
        there = again.count("d").result(WAIT)
        assert there in (0, 3)
        assert again.version().result(WAIT) == version + there


# -- full disks --------------------------------------------------------------------------------------------------------

PATIENCE = pytest.mark.parametrize("patient", [True, False], ids=["goes on", "gives up"])


@PATIENCE
def test_a_full_disk(place: Path, patient: bool) -> None:
    """Promises 3, 4: the job stalls and pushes back, and goes on when there is room; or gives up with `DiskFull`."""
    assert full_by_vfs(place / "root", patient=patient) == []


@PATIENCE
def test_a_small_file_system_that_is_full(place: Path, patient: bool) -> None:
    """The same on a file system that is really full, until a file on it is deleted."""
    findings, why_not = full_in_child("ballast", place, patient=patient)
    if why_not:
        pytest.skip(why_not)
    assert findings == []


@PATIENCE
def test_a_limit_to_the_size_of_files(place: Path, patient: bool) -> None:
    """The same where the system lets no file of the process grow (RLIMIT_FSIZE); the process isn't killed by it."""
    findings, why_not = full_in_child("limit", place, patient=patient)
    assert (findings, why_not) == ([], "")
