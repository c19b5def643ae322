"""What isn't used costs nothing: a job without TTLs, quota and feed runs the statements it ran before there were any.

The numbers below were measured by these very functions on the release before (commit 3fb8fe0, the last one whose rows
neither ended nor were counted), with SQLite 3.54.1 on Python 3.11, 3.12 and 3.13; these differ by a few bytes.
"""

from __future__ import annotations

import gc
import os
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import apsw
import pytest

from persistency import Job, Persistency, Put, engine, key
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import Batch, DropRange, DropRow, Expect, GetRow, Group, StoreOptions

NOW_MS = 1_700_000_000_000
ROWS = 1_000
MEASURED_WITH = "3.54.1"

KEYS = [b"%06d" % number for number in range(ROWS)]
SHUFFLED = random.Random(1).sample(KEYS, ROWS)
PAYLOADS = [b"x" * 100] * ROWS
ONE_CATEGORY = [b"c"] * ROWS
THREE_CATEGORIES = [b"c%d" % (number % 3) for number in range(ROWS)]


class Trace:
    """Counts the statements that are stepped, by what they do, and the steps of SQLite's virtual machine."""

    def __init__(self) -> None:
        self.statements: Counter[str] = Counter()
        self.steps = 0
        self._on = False

    def watch(self, connection: apsw.Connection) -> None:
        """Have a new connection traced."""
        connection.trace_v2(apsw.SQLITE_TRACE_STMT | apsw.SQLITE_TRACE_PROFILE, self._note)

    def _note(self, event: dict[str, Any]) -> None:
        if not self._on:
            return
        if event["code"] == apsw.SQLITE_TRACE_STMT:
            words = event["sql"].split()
            self.statements[" ".join(words[: 3 if words[0] == "INSERT" else 1])] += 1
        else:
            self.steps += event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what happens inside."""
        self._on = True
        try:
            yield
        finally:
            self._on = False


@pytest.fixture
def trace() -> Iterator[Trace]:
    """A trace of every connection that is opened while the test runs."""
    trace = Trace()
    apsw.connection_hooks.append(trace.watch)
    yield trace
    apsw.connection_hooks.remove(trace.watch)


def puts(categories: list[bytes], keys: list[bytes]) -> Group:
    """Return plain puts as a group."""
    return [place for row in zip(categories, keys, PAYLOADS, strict=True) for place in row]


def messages(*them: Any) -> Group:
    """Return other messages as a group."""
    return [place for message in them for place in (None, message, None)]


SORTED = puts(ONE_CATEGORY, KEYS)
GROUPS: dict[str, Group] = {
    "sorted puts": SORTED,
    "unsorted puts": puts(ONE_CATEGORY, SHUFFLED),
    "puts into three categories": puts(THREE_CATEGORIES, KEYS),
    "batches of ten puts": messages(*[Batch(SORTED[at : at + 30], 10, False) for at in range(0, len(SORTED), 30)]),
    "puts and gets in turn": [place for k in KEYS for place in (b"c", k, b"y", None, GetRow(b"c", k), None)],
    "checked batches": messages(*[Batch([b"d", k, b"x", None, Expect(b"d", k, None), None], 2, True) for k in KEYS]),
    "deletes": messages(*[DropRow(b"c", k) for k in KEYS]),
    "range deletes": messages(*[DropRange(b"c", k, k + b"a") for k in SHUFFLED]),
    "gets": messages(*[GetRow(b"c", k) for k in KEYS]),
}
TRANSACTION = {"BEGIN": 1, "UPDATE": 1, "COMMIT": 1}
# Statements and steps of a whole group of 1,000.
OF_GROUPS: dict[str, tuple[dict[str, int], int]] = {
    "sorted puts": ({**TRANSACTION, "INSERT INTO kv": 1}, 41_054),
    "unsorted puts": ({**TRANSACTION, "INSERT INTO kv": 1}, 45_057),
    "puts into three categories": ({**TRANSACTION, "INSERT INTO kv": 3}, 45_117),
    "batches of ten puts": ({**TRANSACTION, "INSERT INTO kv": 1}, 41_054),
    "puts and gets in turn": ({**TRANSACTION, "INSERT INTO kv": 1}, 41_054),
    "checked batches": ({**TRANSACTION, "SELECT": 1000, "INSERT INTO kv": 1000}, 40_027),
    "deletes": ({**TRANSACTION, "DELETE": 1000}, 34_027),
    "range deletes": ({**TRANSACTION, "SELECT": 1000, "DELETE": 1000}, 40_027),
    "gets": ({"BEGIN": 1, "SELECT": 1000}, 13_989),
}
REQUESTS: dict[str, Callable[[Job, Any], Any]] = {
    "commits of one put": lambda job, k: job.commit(Put("c", k, b"y" * 100)),
    "gets": lambda job, k: job.get("c", k),
    "entries": lambda job, k: job.entry("c", k),
    "exists": lambda job, k: job.exists("c", k),
    "counts": lambda job, k: job.count("c"),
    "scans": lambda job, k: job.scan("c", limit=5),
    "acknowledged deletes": lambda job, k: job.delete_acked("c", k),
}
EACH = {"BEGIN": 1000, "UPDATE": 1000, "COMMIT": 1000}
# Statements and steps of 1,000 requests, each answered before the next is made, over 1,000 rows.
OF_REQUESTS: dict[str, tuple[dict[str, int], int]] = {
    "commits of one put": ({**EACH, "INSERT INTO kv": 1000}, 75_000),
    "gets": ({"BEGIN": 1, "SELECT": 1000}, 13_989),
    "entries": ({"BEGIN": 1, "SELECT": 1000}, 16_986),
    "exists": ({"BEGIN": 1, "SELECT": 2000}, 31_985),
    "counts": ({"BEGIN": 1, "SELECT": 2000}, 3_025_988),
    "scans": ({"BEGIN": 1, "SELECT": 1000}, 57_003),
    "acknowledged deletes": ({**EACH, "DELETE": 1000}, 61_000),
}
# The peak of the bytes Python allocates while the store applies a group of 1,000 puts.
APPLYING_BYTES = {"sorted puts": 303_968, "unsorted puts": 339_176, "puts into three categories": 256_118}
# The bytes Python allocates for 1,000 puts that wait in the mailbox: 24 each for three pointers, and room to grow.
QUEUED_BYTES = {"ready keys": 27_040, "tuples": 66_127}


def group_cost(place: Path, trace: Trace, name: str) -> None:
    """Trace one group, on a store that has the rows it reads or removes."""
    store = DirectoryRoot(place).open("job", StoreOptions())
    try:
        store.get(b"z", b"z", NOW_MS)  # the first read of a job also takes room for what is read
        store.apply([b"z", b"z", b"z"], NOW_MS)  # the first write also marks its file as open
        if name in ("deletes", "range deletes", "gets"):
            store.apply(SORTED, NOW_MS)
        with trace.counting():
            store.apply(GROUPS[name], NOW_MS)
    finally:
        store.close()


def request_cost(place: Path, trace: Trace, name: str) -> None:
    """Trace 1,000 requests of one kind."""
    ask = REQUESTS[name]
    keys = [key(number) for number in range(ROWS)]
    with Persistency(place) as persistency:
        job = persistency.open_job("job", sync_interval=None)
        job.get("c", keys[0]).result()  # as above
        job.commit([Put("c", k, b"x" * 100) for k in keys]).result()
        with trace.counting():
            for k in keys:
                ask(job, k).result()


def assert_no_more(trace: Trace, statements: dict[str, int], steps: int) -> None:
    """Hold what was traced against what it was before; none more of any kind, and no kind more."""
    more = {name: count for name, count in trace.statements.items() if count > statements.get(name, 0)}
    assert not more, (dict(trace.statements), statements)
    assert trace.statements["COMMIT"] == statements.get("COMMIT", 0)  # or the trace has seen nothing
    if apsw.sqlite_lib_version() == MEASURED_WITH:  # another SQLite makes other programs of the same statements
        assert 0 < trace.steps <= steps


@pytest.mark.parametrize("name", GROUPS)
def test_a_group_steps_no_statement_more_than_before(name: str, tmp_path: Path, trace: Trace) -> None:
    """1,000 operations in one group, without TTL, quota and feed: the statements and steps of the release before."""
    group_cost(tmp_path, trace, name)
    assert_no_more(trace, *OF_GROUPS[name])


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_steps_no_statement_more_than_before(name: str, tmp_path: Path, trace: Trace) -> None:
    """1,000 single requests, without TTL, quota and feed: the statements and steps of the release before."""
    request_cost(tmp_path, trace, name)
    assert_no_more(trace, *OF_REQUESTS[name])


# Counted when the test was written, not on the release before: the statements of an opening, the steps of SQLite's
# virtual machine, and how often the system is asked for something.
OPENING = {"BEGIN;": 1, "PRAGMA": 7, "SELECT": 2, "COMMIT;": 1}
OPENING_STEPS = 98
OPENING_CALLS = {"lstat": 6, "open": 1, "fstat": 1, "pread": 1}
CLOSING_CALLS = {"open": 1, "lstat": 4, "fstat": 2, "pwrite": 1, "close": 2}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count the calls that are made through `os`; SQLite makes its own."""
    counted: Counter[str] = Counter()

    def count(name: str) -> None:
        real = getattr(os, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, counting)

    for name in ("stat", "lstat", "open", "fstat", "fsync", "pread", "pwrite", "close", "access", "listdir", "unlink"):
        count(name)
    return counted


def test_an_opening_takes_so_many_statements_and_calls(tmp_path: Path, trace: Trace, calls: Counter[str]) -> None:
    """Opening a job again that this process had before, and closing it: no statement and no call more than these."""
    root = DirectoryRoot(tmp_path)
    store = root.open("job", StoreOptions())
    store.apply(puts(ONE_CATEGORY, KEYS), NOW_MS)
    store.close()
    # Rows that nobody asks for: a hostile file may have any number of them.
    with closing(apsw.Connection(str(root.path("job")))) as strange:
        strange.execute(
            "WITH RECURSIVE n(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM n WHERE i < 1000)"
            " INSERT INTO meta SELECT 'x' || i, i FROM n"
        )
    calls.clear()
    with trace.counting():
        store = root.open("job", StoreOptions(now_ms=NOW_MS))
    opening = dict(calls)
    calls.clear()
    try:
        kinds = Counter(name.upper() for name in trace.statements.elements())
        assert kinds["SELECT"] == OPENING["SELECT"]  # or the trace has seen nothing
        assert kinds <= Counter(OPENING), dict(trace.statements)
        if apsw.sqlite_lib_version() == MEASURED_WITH:
            assert 0 < trace.steps <= OPENING_STEPS
        assert opening["lstat"] > 0  # or nothing was counted
        assert Counter(opening) <= Counter(OPENING_CALLS), opening
        trace.statements.clear()
    finally:
        with trace.counting():
            store.close()
    assert not trace.statements
    assert calls <= Counter(CLOSING_CALLS), dict(calls)


# Counted when the test was written: how many functions of the package a call goes through when the job is idle, and by
# which of them it is seen that it was answered in place.
CALLS = {"commit": ("Turns._write_in_place", 45), "get": ("SqliteStore.point_read.<locals>.get", 4)}


def calls_of(verb: Callable[[], object]) -> list[str]:
    """Return which functions of the package a call goes through in this thread."""
    names: list[str] = []
    package = str(Path(engine.__file__).parent)

    def note(frame: FrameType, event: str, _argument: object) -> None:
        # A comprehension was a function of its own before Python 3.12.
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(package) and "comp>" not in code.co_name:
            names.append(code.co_qualname)

    sys.setprofile(note)
    try:
        verb()
    finally:
        sys.setprofile(None)
    return names


def test_what_an_idle_job_is_asked_goes_through_no_function_more_than_before(tmp_path: Path) -> None:
    """What a commit in place and a point read cost is mostly Python's calls: one more on their way is seen here."""
    k = key("c", 1)
    with Persistency(tmp_path) as p:
        job = p.open_job("job", sync_interval=None)
        verbs: dict[str, Callable[[], object]] = {
            "commit": lambda: job.commit(Put("c", k, b"x")).result(),
            "get": lambda: job.get("c", k).result(),
        }
        for name, verb in verbs.items():
            # The first ones begin transactions and wake the worker, which then may be the one who answers; and what
            # the collector ends meanwhile isn't theirs.
            found = [calls_of(verb) for _ in range(200)]
            in_place = [len(names) for names in found if CALLS[name][0] in names]
            assert in_place, found[-1]
            assert min(in_place) <= CALLS[name][1], found[-1]


def applying_bytes(place: Path, group: Group) -> int:
    """Return the peak of what Python allocates while a store applies a group, when all caches are warm."""
    store = DirectoryRoot(place).open("job", StoreOptions())
    peaks = []
    try:
        for _ in range(3):
            gc.collect()
            tracemalloc.start()
            try:
                before = tracemalloc.get_traced_memory()[0]
                store.apply(group, NOW_MS)
                peaks.append(tracemalloc.get_traced_memory()[1] - before)
            finally:
                tracemalloc.stop()
    finally:
        store.close()
    return min(peaks)


@pytest.mark.parametrize("name", APPLYING_BYTES)
def test_applying_puts_allocates_no_byte_more_than_before(name: str, tmp_path: Path) -> None:
    """A group of 1,000 plain puts takes no more memory on its way into the file than in the release before."""
    assert applying_bytes(tmp_path, GROUPS[name]) <= APPLYING_BYTES[name]


def queued_bytes(place: Path, name: str) -> int:
    """Return what Python allocates for 1,000 puts while they wait, when all caches are warm."""
    keys: list[Any] = [key("c", number) if name == "ready keys" else ("c", number) for number in range(ROWS)]
    allocated = []
    with Persistency(place) as persistency:
        job = persistency.open_job("job")
        for _ in range(4):
            job.flush().result()
            gc.collect()
            while not job._mailbox._asleep:
                os.sched_yield()
            with job._mailbox._lock:  # so that the worker takes none of them yet,
                job._mailbox._asleep = False  # and isn't woken: what it is in the middle of would be counted too
                tracemalloc.start()
                try:
                    before = tracemalloc.get_traced_memory()[0]
                    for k, payload in zip(keys, PAYLOADS, strict=True):
                        job.put("c", k, payload)
                    allocated.append(tracemalloc.get_traced_memory()[0] - before)
                finally:
                    tracemalloc.stop()
                    job._mailbox._asleep = True
                    job._mailbox.ring()
    return min(allocated)


@pytest.mark.parametrize("name", QUEUED_BYTES)
def test_a_queued_put_allocates_no_byte_more_than_before(name: str, tmp_path: Path) -> None:
    """1,000 plain puts that wait in the mailbox take no more memory than in the release before."""
    assert 24 * ROWS <= queued_bytes(tmp_path, name) <= QUEUED_BYTES[name]


def test_a_file_without_ttl_quota_and_feed_has_nothing_of_them(tmp_path: Path) -> None:
    """No table, and no note in the meta table, is kept for what a job has no use for."""
    with Persistency(tmp_path / "root") as persistency:
        job = persistency.open_job("job")
        for number in range(10):
            job.put("c", (number,), b"x")
        job.increment("n", ("k",)).result()
        job.run(lambda tx: tx.put("c", ("r",), b"")).result()
        job.delete_prefix("c", (1,))
        job.flush().result()
        path = job.path
    connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")}
        notes = {name for (name,) in connection.execute("SELECT name FROM meta")}
    finally:
        connection.close()
    assert tables == {"kv", "meta"}
    assert notes == {"job_id", "last_version", "clean", "syncs"}
