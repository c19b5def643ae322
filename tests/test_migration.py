"""Migration: what diskcache, sqlitedict and lmdb have written comes over, item by item, and what can't is told."""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diskcache
import lmdb
import pytest
from sqlitedict import SqliteDict, decode_key, encode_key

import persistency.arguments
from persistency import (
    CBOR,
    RAW,
    Category,
    Corrupt,
    Job,
    Key,
    Misuse,
    Persistency,
    QuotaExceeded,
    RawKey,
    Unavailable,
    key,
    typed,
)
from persistency.integrations.migration import (
    Diskcache,
    Lmdb,
    Report,
    Sqlitedict,
    bring,
    bringing,
    jsontext,
    sqlitedict,
)
from persistency.integrations.migration.items import Reason
from tests.conftest import Wall
from tests.migrations import FAR, balance, brought, check_diskcache, check_sqlitedict, digests, make_sqlitedict

COUNT = 10_000  # `python -m tests.soak migration` has a hundred thousand


@dataclass
class User:
    """A value of a class of one's own."""

    name: str
    logins: int = 0


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Give an empty job on disk."""
    with Persistency(tmp_path / "root") as persistency:
        yield persistency.open_job("brought")


def rows(job: Job, category: str = "records") -> dict[tuple[Any, ...], Any]:
    """Return a category as a dict of tuples and values."""
    return dict(Category(job, category).list())


def reasons(report: Report) -> dict[str, int]:
    """Return how many were left, by reason; every item is accounted for."""
    assert balance(report) == 0
    assert report.lost == sum(left.count for left in report.left.values())
    return {reason.name: left.count for reason, left in report.left.items()}


def edited(path: Path, statement: str, *values: Any) -> None:
    """Change a SQLite file behind its owner's back, the way somebody else might."""
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(statement, values)


# -- real data ---------------------------------------------------------------------------------------------------


def test_a_directory_of_diskcache_comes_over_item_by_item(tmp_path: Path) -> None:
    """Issue 7: real records in a cache, of every kind that is stored there, each compared; the cache is untouched."""
    assert list(check_diskcache(tmp_path, COUNT)) == []


def test_a_file_of_sqlitedict_comes_over_item_by_item(tmp_path: Path) -> None:
    """Issue 7: real records in a file, each compared; the file is untouched."""
    assert list(check_sqlitedict(tmp_path, COUNT)) == []


@pytest.mark.parametrize("plant", ["lost", "other", "ends"])
def test_the_comparison_sees_what_is_wrong(plant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a row that is left out, one with another value, or ends that don't come along, it complains."""
    put = bringing._put

    def put_wrong(tx: Any, row: Any) -> Any:
        if row.key == key("page", 8):
            if plant == "lost":
                return True
            if plant == "other":
                row = row._replace(payload=CBOR.encode(0))
        return put(tx, row._replace(ends_ms=None) if plant == "ends" else row)

    monkeypatch.setattr(bringing, "_put", put_wrong)
    wrong = list(check_diskcache(tmp_path, 200))
    assert len(wrong) == (20 if plant == "ends" else 1), wrong


# -- diskcache ---------------------------------------------------------------------------------------------------

MIXED: dict[Any, Any] = {
    "text": "é" * 10, "long text": "é\r\n" * 40_000, "empty": "", b"\0bytes": b"\xff", "long bytes": os.urandom(50_000),
    7: 8,
    2**70: 2**70, -1: -(2**63), 1.5: 2.5, "true": True, "none": None, None: [1], ("page", 1): (1, 2), ("one",): {},
    (): "nothing", "long": ["x" * 50_000], "map": {"a": {1, 2}, 3: b"x"}, ((1, 2), "x"): 1, False: 0,
}  # fmt: skip
KEYS = {name: name if isinstance(name, tuple) and len(name) != 1 else (name,) for name in MIXED}


def test_every_kind_of_key_and_value_of_diskcache_comes(job: Job, tmp_path: Path) -> None:
    """A tuple is the key; a tuple of one isn't taken for its part; long values are read from their files."""
    with diskcache.Cache(tmp_path / "cache") as cache:
        for name, value in MIXED.items():
            cache[name] = value
        cache["one"] = "beside the tuple of one"
    report = bring(job, Diskcache(tmp_path / "cache"), unpickle="plain")
    assert reasons(report) == {}
    assert report.complete
    expected = {KEYS[name]: list(value) if isinstance(value, tuple) else value for name, value in MIXED.items()}
    found = {entry.key: CBOR.decode(entry.payload) for entry in job.snapshot("records").result()}
    expected[("one",)] = "beside the tuple of one"
    assert found == {key(*parts): value for parts, value in expected.items()}


def test_nothing_is_unpickled_unless_it_was_asked_for(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word pickled keys and values are counted, named and left; what isn't pickled comes."""
    with diskcache.Cache(tmp_path / "cache") as cache:
        for name, value in MIXED.items():
            cache[name] = value
    with monkeypatch.context() as patch:
        patch.setattr(pickle, "loads", None)
        patch.setattr(bringing, "reader_of", lambda unpickle: None if unpickle is None else pytest.fail("it is read"))
        report = bring(job, Diskcache(tmp_path / "cache"))
    left = reasons(report)
    assert set(left) == {"pickled_key", "pickled_value"}
    assert report.taken == len(MIXED) - sum(left.values()) == 8
    assert [example.key for example in report.left[Reason.pickled_value].examples] == [
        "'true'", "'none'", "'long'", "'map'",
    ]  # fmt: skip
    names = ("text", "long text", "empty", b"\0bytes", "long bytes", 7, -1, 1.5)
    assert rows(job) == {(name,): MIXED[name] for name in names}


def test_pickles_can_be_kept_as_they_are(job: Job, tmp_path: Path) -> None:
    """On request what isn't read, or can't be stored, is kept as its bytes in a category of its own."""
    with diskcache.Cache(tmp_path / "cache") as cache:
        cache["plain"], cache["mine"], cache["text"] = [1], User("ada"), "x"
    report = bring(job, Diskcache(tmp_path / "cache"), keep_pickles=True)
    assert (report.taken, report.kept, reasons(report)) == (1, 2, {})
    assert report.categories == {"records": 1, "records.pickles": 2}
    kept = Category(job, "records.pickles", RAW)
    assert pickle.loads(kept.get(("mine",)).result() or b"") == User("ada")
    report = bring(job, Diskcache(tmp_path / "cache"), unpickle="plain", keep_pickles=True, category="again")
    assert report.categories == {"again": 2, "again.pickles": 1}
    report = bring(job, Diskcache(tmp_path / "cache"), unpickle="trust", keep_pickles=True, category="cbor")
    assert report.categories == {"cbor": 2, "cbor.pickles": 1}  # CBOR has no word for a User


def test_trusted_pickles_become_objects_of_their_classes(job: Job, tmp_path: Path) -> None:
    """With "trust" and a typed codec objects come over as such; "plain" says which class it has refused."""
    with SqliteDict(str(tmp_path / "users.sqlite"), tablename="users") as table:
        table["ada"] = User("ada", 3)
        table.commit()
    origin = Sqlitedict(tmp_path / "users.sqlite")
    report = bring(job, origin, unpickle="plain")
    assert report.left[Reason.unread].examples == [("users", "'ada'", f"it names {__name__}.User")]
    report = bring(job, origin, unpickle="trust", codec=typed(User))
    assert reasons(report) == {}
    assert Category(job, "users", typed(User)).get(("ada",)).result() == User("ada", 3)
    report = bring(job, origin, unpickle="trust")
    assert "dataclasses.asdict" not in str(report.left[Reason.no_value].examples)
    assert reasons(report) == {"no_value": 1}


def test_an_own_function_reads_pickles(job: Job, tmp_path: Path) -> None:
    """It may allow what it knows; what it raises leaves that item, and no other."""
    with SqliteDict(str(tmp_path / "users.sqlite")) as table:
        table["ada"], table["bob"] = User("ada"), [1]
        table.commit()

    def read(data: bytes) -> Any:
        found = pickle.loads(data)
        if isinstance(found, User):
            return {"name": found.name}
        raise RuntimeError("no")

    report = bring(job, Sqlitedict(tmp_path / "users.sqlite"), unpickle=read)
    assert rows(job, "unnamed") == {("ada",): {"name": "ada"}}
    assert report.left[Reason.unread].examples == [("unnamed", "'bob'", "RuntimeError: no")]


def test_ends_come_along_to_the_millisecond(tmp_path: Path, wall: Wall) -> None:
    """An end is the same moment here; what has ended stays behind and is counted; an infinite one is none."""
    with diskcache.Cache(tmp_path / "cache") as cache:
        for number in range(100):
            cache[number] = number
    file = tmp_path / "cache" / "cache.db"
    now = wall.now
    for number, end in enumerate([now - 1, now, now + 0.001, now + 1.2345, 1e300, float("inf"), -1e300, None]):
        edited(file, "UPDATE Cache SET expire_time = ? WHERE key = ?", end, number)
    edited(file, "UPDATE Cache SET expire_time = 'soon' WHERE key = 9")
    edited(file, "UPDATE Cache SET expire_time = ? WHERE key > 9", FAR + 0.5)
    with Persistency(tmp_path / "root", clock=wall) as persistency:
        job = persistency.open_job("brought")
        report = bring(job, Diskcache(tmp_path / "cache"))
        assert (report.ended, reasons(report)) == (3, {"damaged": 1})
        ends = {entry.key.parts[0]: entry.expires_ms for entry in job.snapshot("records").result()}
    assert ends == {
        **dict.fromkeys((4, 5, 7, 8)), 2: wall.ms + 1, 3: wall.ms + 1_234,
        **dict.fromkeys(range(10, 100), FAR * 1000 + 500),
    }  # fmt: skip


def test_ends_are_exact_while_the_clock_goes_on(tmp_path: Path) -> None:
    """A clock that goes on at every look at it shifts no end."""
    with diskcache.Cache(tmp_path / "cache") as cache:
        cache["a"] = 1
    edited(tmp_path / "cache" / "cache.db", "UPDATE Cache SET expire_time = ?", FAR)
    looks = iter(range(10**9))
    with Persistency(tmp_path / "root", clock=lambda: FAR - 10_000 + next(looks) // 3 / 1000) as persistency:
        job = persistency.open_job("brought")
        bring(job, Diskcache(tmp_path / "cache"))
        [entry] = job.snapshot("records").result()
        assert entry.expires_ms == FAR * 1000


def test_tags_stay_behind_and_are_counted(job: Job, tmp_path: Path) -> None:
    """There is nothing they could become; the report says how many had one."""
    with diskcache.Cache(tmp_path / "cache", tag_index=True) as cache:
        cache.set("a", 1, tag="red")
        cache.set("b", 1)
    assert bring(job, Diskcache(tmp_path / "cache")).tagged == 1


def test_shards_are_one_part_and_nested_caches_others(job: Job, tmp_path: Path) -> None:
    """A FanoutCache comes whole; its caches, deques and indexes become categories of their names."""
    with diskcache.FanoutCache(tmp_path / "cache", shards=4) as fanout:
        for number in range(200):
            fanout[f"k{number}"] = number
        fanout.cache("pages/front")["a"] = 1
        fanout.deque("jobs").extend(["first", "second"])
        fanout.index("by-name")["ada"] = 7
        for nested in (fanout.cache("pages/front"), fanout.deque("jobs")._cache, fanout.index("by-name")._cache):
            nested.close()
    origin = Diskcache(tmp_path / "cache")
    report = bring(job, origin)
    assert report.categories == {"records": 200, "cache/pages/front": 1, "deque/jobs": 2, "index/by-name": 1}
    assert rows(job) == {(f"k{number}",): number for number in range(200)}
    assert list(rows(job, "deque/jobs").values()) == ["first", "second"]
    with pytest.raises(Misuse, match=r"is one, and .* has 4 parts"):
        bring(job, origin, category="all")
    report = bring(job, Diskcache(tmp_path / "cache", tables=["deque/jobs"]), category="jobs")
    assert report.categories == {"jobs": 2}
    with pytest.raises(Misuse, match="has no table 'other'") as raised:
        bring(job, Diskcache(tmp_path / "cache", tables=["other"]))
    assert "'deque/jobs'" in raised.value.hint


def test_a_deque_and_an_index_of_their_own_come(job: Job, tmp_path: Path) -> None:
    """Each is a directory of diskcache as any other."""
    deque, index = diskcache.Deque([1, "two"], str(tmp_path / "deque")), diskcache.Index(str(tmp_path / "index"), a=1)
    deque._cache.close()
    index._cache.close()
    bring(job, Diskcache(tmp_path / "deque"), category="deque")
    bring(job, Diskcache(tmp_path / "index" / "cache.db"), category="index")  # the file in it names it as well
    assert (list(rows(job, "deque").values()), rows(job, "index")) == ([1, "two"], {("a",): 1})


def test_json_disks_come_when_it_is_said(job: Job, tmp_path: Path) -> None:
    """JSONDisk packs keys and values; without a word they are what SQLite has: bytes."""
    with diskcache.Cache(tmp_path / "cache", disk=diskcache.JSONDisk) as cache:
        cache["a"], cache[["page", 1]], cache["long"] = {"x": [1.5, None]}, "é", [os.urandom(40_000).hex()]
        long = cache["long"]
    report = bring(job, Diskcache(tmp_path / "cache", encoded="json"))
    assert reasons(report) == {}
    assert rows(job) == {("a",): {"x": [1.5, None]}, ("page", 1): "é", ("long",): long}
    edited(tmp_path / "cache" / "cache.db", "UPDATE Cache SET value = ? WHERE value NOT NULL", b"x")
    edited(
        tmp_path / "cache" / "cache.db",
        "INSERT INTO Cache (key, raw, mode, value) VALUES (?, 1, 1, 7)",
        zlib.compress(b"["),
    )
    report = bring(job, Diskcache(tmp_path / "cache", encoded="json"))
    assert reasons(report) == {"damaged": 3}


def test_files_are_read_only_within_the_directory(job: Job, tmp_path: Path) -> None:
    """Whatever a file's name says, and wherever links lead: nothing outside of the cache is read, and nobody waits."""
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    names = [
        "../secret", str(secret), "ab/../../secret", "link", "linked/secret", "pipe", "ab", "", ".", "..", "missing",
        "a\0b", "ab//x", "x" * 5_000, 7, b"bytes",
    ]  # fmt: skip
    cache_path = tmp_path / "cache"
    with diskcache.Cache(cache_path) as cache:
        for number, _name in enumerate(names):
            cache[number] = number
        cache["fine"] = "x" * 50_000
    (cache_path / "ab").mkdir(exist_ok=True)
    (cache_path / "link").symlink_to(secret)
    (cache_path / "linked").symlink_to(tmp_path)
    os.mkfifo(cache_path / "pipe")
    for mode in (2, 3, 4):
        for number, name in enumerate(names):
            edited(
                cache_path / "cache.db",
                "UPDATE Cache SET mode = ?, filename = ?, value = NULL, size = 6 WHERE key = ?", mode, name, number,
            )  # fmt: skip
        report = bring(job, Diskcache(cache_path), unpickle="trust")
        assert reasons(report) == {"file": len(names)}
        assert len(report.left[Reason.file].examples) == 10
        assert list(rows(job)) == [("fine",)]


def test_rows_that_are_damaged_are_told_apart(job: Job, tmp_path: Path) -> None:
    """Each row that says something that can't be is left with its reason, and the others come."""
    cache_path = tmp_path / "cache"
    with diskcache.Cache(cache_path) as cache:
        for number in range(12):
            cache[number] = number
        cache["short"] = "x" * 50_000
        cache["lóng"] = "y"
    for number, change in enumerate(
        [
            "mode = 9", "mode = 'x'", "mode = NULL", "mode = 4", "mode = 4, value = X'80052E'", "key = NULL, raw = 1",
            "raw = 0", "mode = 3, value = X'FF'", "value = CAST(X'FF' AS TEXT)", "key = CAST(X'FF' AS TEXT)",
        ]
    ):  # fmt: skip
        edited(cache_path / "cache.db", f"UPDATE Cache SET {change} WHERE key = {number}")
    edited(cache_path / "cache.db", "UPDATE Cache SET size = size - 1 WHERE key = 'short'")
    report = bring(job, Diskcache(cache_path), unpickle="plain")
    assert reasons(report) == {"damaged": 8, "unread": 1, "no_value": 1, "no_key": 1}
    assert rows(job) == {(10,): 10, (11,): 11, ("lóng",): "y"}
    whys = [example.why for example in report.left[Reason.damaged].examples]
    assert "its mode is 9" in whys
    assert any("has 50,000 bytes of 49,999" in why for why in whys)


@pytest.mark.parametrize("kind", [Diskcache, Sqlitedict, Lmdb])
def test_what_is_no_such_store_is_refused(kind: Any, job: Job, tmp_path: Path) -> None:
    """Nothing, an empty directory, a file of something else, a database of something else: each says so."""
    with pytest.raises(FileNotFoundError):
        bring(job, kind(tmp_path / "missing"))
    (tmp_path / "directory").mkdir()
    with pytest.raises(Corrupt):
        bring(job, kind(tmp_path / "directory"))
    for name, data in (("text", b"some text" * 1_000), ("none", b"")):
        (tmp_path / name).write_bytes(data)
        (tmp_path / f"{name}-directory").mkdir()
        for file in ("cache.db", "data.mdb"):
            (tmp_path / f"{name}-directory" / file).write_bytes(data)
        for path in (tmp_path / name, tmp_path / f"{name}-directory"):
            with pytest.raises((Corrupt, Unavailable)):
                bring(job, kind(path))
            assert digests(tmp_path / name)[str(tmp_path / name)]
    other = tmp_path / "other"
    other.mkdir()
    edited(other / "cache.db", "CREATE TABLE Cache (a, b)")
    edited(other / "cache.db", "CREATE VIEW kv AS SELECT a AS key, b AS value FROM Cache")
    with pytest.raises(Corrupt):
        bring(job, kind(other / "cache.db"))
    assert job.categories().result() == []


def test_a_view_in_the_place_of_a_table_is_no_table(job: Job, tmp_path: Path) -> None:
    """What is computed when it is read isn't read: only real tables are."""
    columns = "rowid, key, raw, expire_time, tag, size, mode, filename, value"
    edited(tmp_path / "cache.db", f"CREATE TABLE Other ({columns.replace('rowid, ', '')})")
    edited(tmp_path / "cache.db", f"CREATE VIEW Cache AS SELECT {columns} FROM Other")
    with pytest.raises(Corrupt, match="has no table of diskcache"):
        bring(job, Diskcache(tmp_path))


def test_a_damaged_file_is_told_and_what_came_before_stays(job: Job, tmp_path: Path) -> None:
    """A page in the middle that is gone ends it with `Corrupt`, which names the file; all before it is stored."""
    make_sqlitedict(tmp_path / "packages.sqlite", 3_000)
    data = bytearray((tmp_path / "packages.sqlite").read_bytes())
    middle = len(data) // 2 // 4096 * 4096
    data[middle : middle + 40 * 4096] = os.urandom(40 * 4096)
    (tmp_path / "packages.sqlite").write_bytes(data)
    with pytest.raises(Corrupt, match=r"packages\.sqlite can't be read") as raised:
        bring(job, Sqlitedict(tmp_path / "packages.sqlite"), unpickle="plain")
    stored = job.count("packages").result()
    assert 0 < stored < 3_000
    assert f"{stored:,} items were dealt with before; what of them can come along is stored." in raised.value.__notes__


# -- read only ---------------------------------------------------------------------------------------------------


def test_a_closed_cache_is_left_to_the_byte(tmp_path: Path) -> None:
    """No file is changed, none is made beside it, and none goes."""
    with diskcache.Cache(tmp_path / "cache") as cache:
        cache["a"], cache["b"] = 1, "x" * 50_000
    before = digests(tmp_path / "cache")
    with brought(tmp_path / "root", Diskcache(tmp_path / "cache")) as (_job, report):
        assert report.taken == 2
    assert digests(tmp_path / "cache") == before


KILLED = """
import os, sys, diskcache
cache = diskcache.Cache(sys.argv[1])
for number in range(100):
    cache[number] = number
os._exit(0)
"""


def test_the_log_of_a_killed_process_is_read_and_left(tmp_path: Path) -> None:
    """What is in the log only comes too; file and log stay as they were, for their own program to tidy."""
    subprocess.run([sys.executable, "-c", KILLED, tmp_path / "cache"], check=True, timeout=60)
    before = digests(tmp_path / "cache")
    assert (tmp_path / "cache" / "cache.db-wal").stat().st_size > 0
    with brought(tmp_path / "root", Diskcache(tmp_path / "cache")) as (_job, report):
        assert report.taken == 100
    after = digests(tmp_path / "cache")
    index = str(tmp_path / "cache" / "cache.db-shm")
    assert {**after, index: ""} == {**before, index: ""}
    with diskcache.Cache(tmp_path / "cache") as cache:
        assert len(cache) == 100


HOT = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
db.execute("PRAGMA cache_size = 1")
db.execute("BEGIN")
db.execute("UPDATE packages SET value = zeroblob(2000)")
os._exit(0)
"""


def test_a_file_left_in_the_middle_of_a_write_is_refused(job: Job, tmp_path: Path) -> None:
    """Its journal has to be played back first, which would be a change: the error says who can do that."""
    file = tmp_path / "packages.sqlite"
    make_sqlitedict(file, 500)
    subprocess.run([sys.executable, "-c", HOT, file], check=True, timeout=60)
    before = digests(tmp_path / "packages.sqlite") | digests(tmp_path / "packages.sqlite-journal")
    with pytest.raises(Unavailable, match="can't be read") as raised:
        bring(job, Sqlitedict(file), unpickle="plain")
    assert "Have that program open it once" in raised.value.hint
    assert before == digests(tmp_path / "packages.sqlite") | digests(tmp_path / "packages.sqlite-journal")
    with SqliteDict(str(file), tablename="packages") as table:
        assert len(table) == 500
    assert bring(job, Sqlitedict(file), unpickle="plain").taken == 500


def test_a_service_that_writes_meanwhile_is_neither_missed_nor_kept_waiting(job: Job, tmp_path: Path) -> None:
    """Beside a busy writer, with values in files, all that is there throughout comes; the writer isn't stopped."""
    with diskcache.Cache(tmp_path / "cache", disk_min_file_size=100) as cache, cache.transact():
        for number in range(3_000):
            cache["stays", number] = "x" * (number % 300)
    over = threading.Event()
    written = []

    def write() -> None:
        with diskcache.Cache(tmp_path / "cache", timeout=0) as mine:
            while not over.is_set():
                number = len(written)
                mine["comes", number] = "y" * (number % 300)
                mine["changes"] = "z" * (100 + number % 300)
                mine.delete(("comes", number - 3))
                written.append(number)

    writer = threading.Thread(target=write)
    writer.start()
    reports = []
    while len(written) < 50:
        reports.append(bring(job, Diskcache(tmp_path / "cache"), unpickle="plain"))
    over.set()
    writer.join()
    stays = {parts: value for parts, value in rows(job).items() if parts[0] == "stays"}
    assert stays == {("stays", number): "x" * (number % 300) for number in range(3_000)}
    for report in reports:
        assert set(reasons(report)) <= {"file"}  # deleted between its row and its file
    with diskcache.Cache(tmp_path / "cache") as cache:
        assert cache.check() == []


@pytest.mark.parametrize("kind", ["diskcache", "sqlitedict"])
def test_a_writer_that_comes_in_the_middle_is_noticed(kind: str, job: Job, tmp_path: Path) -> None:
    """What begins as the reading of a file that nobody has open goes on under locks once somebody has."""
    count = 4_000
    if kind == "diskcache":
        with diskcache.Cache(tmp_path / "store") as cache, cache.transact():
            for number in range(count):
                cache[number] = "x" * 200
    else:
        with SqliteDict(str(tmp_path / "store"), encode=str, decode=str) as table:
            table.update({str(number): "x" * 200 for number in range(count)})
            table.commit()
    told = []

    def write(done: int, _total: int) -> None:
        told.append(done)
        if len(told) > 1:
            return
        if kind == "diskcache":
            with diskcache.Cache(tmp_path / "store") as cache, cache.transact():
                for number in range(count):
                    cache[number] = "y" * 300
        else:
            with SqliteDict(str(tmp_path / "store"), encode=str, decode=str) as table:
                table.update({str(number): "y" * 300 for number in range(count)})
                table.commit()

    origin = Diskcache(tmp_path / "store") if kind == "diskcache" else Sqlitedict(tmp_path / "store")
    report = bring(job, origin, progress=write)
    found = rows(job, "records" if kind == "diskcache" else "unnamed")
    assert len(found) == count
    assert set(found.values()) <= {"x" * 200, "y" * 300}
    assert list(found.values()).count("y" * 300) >= count - told[0]
    assert reasons(report) == {}


# -- sqlitedict --------------------------------------------------------------------------------------------------


def test_tables_of_sqlitedict_become_categories(job: Job, tmp_path: Path) -> None:
    """Each table is one, `unnamed` where it has no name; other tables of the file are passed over."""
    file = tmp_path / "store.sqlite"
    for name, value in (("users", 1), ('odd "name"', 2), ("unnamed", 3)):
        with SqliteDict(str(file), tablename=name) as table:
            table["k"] = [value]
            table.commit()
    edited(file, "CREATE TABLE other (id INTEGER, value)")
    edited(file, "CREATE TABLE flat (key PRIMARY KEY, value) WITHOUT ROWID")
    report = bring(job, Sqlitedict(file), unpickle="plain")
    assert report.passed_over == {
        "other": "its columns are id, value, and not key and value",
        "flat": "it has no rowids",
    }
    assert bring(job, Sqlitedict(file, tables=["users"]), unpickle="plain").passed_over == {}
    assert report.categories == {"users": 1, 'odd "name"': 1, "unnamed": 1}
    assert rows(job, 'odd "name"') == {("k",): [2]}
    report = bring(job, Sqlitedict(file, tables=["users"]), unpickle="plain", category="people")
    assert report.categories == {"people": 1}
    for wrong in (["Users"], ["other"]):
        with pytest.raises(Misuse, match="has no table"):
            bring(job, Sqlitedict(file, tables=wrong))


ENCODINGS: dict[str, tuple[Any, list[Any], list[Any]]] = {
    "pickle": (None, [1, {"a": [None]}, "text"], [1, {"a": [None]}, "text"]),
    "zlib": (lambda value: zlib.compress(pickle.dumps(value, 2)), [1, {"a": "x" * 999}], [1, {"a": "x" * 999}]),
    "json": (json.dumps, ["text", 1, [1.5, {"a": None}]], ["text", 1, [1.5, {"a": None}]]),
    "text": (str, ["text", "1", "{", "true"], ["text", "1", "{", "true"]),
    "bytes": (
        bytes,
        [b"", b"\x80", b"\x80\x04.x", zlib.compress(b"x")],
        [b"", b"\x80", b"\x80\x04.x", zlib.compress(b"x")],
    ),
    "numbers": (lambda value: value, [1, 1.5, None], [1, 1.5, None]),
}


@pytest.mark.parametrize("name", ENCODINGS)
def test_what_encode_has_made_is_guessed(name: str, job: Job, tmp_path: Path) -> None:
    """Pickles, packed or not, JSON, text, bytes and numbers come as the objects they were."""
    encode, values, expected = ENCODINGS[name]
    options = {} if encode is None else {"encode": encode, "decode": bytes}
    with SqliteDict(str(tmp_path / "store.sqlite"), **options) as table:
        for number, value in enumerate(values):
            table[str(number)] = value
        table.commit()
    report = bring(job, Sqlitedict(tmp_path / "store.sqlite"), unpickle="plain")
    assert reasons(report) == {}
    assert rows(job, "unnamed") == {(str(number),): value for number, value in enumerate(expected)}


def test_what_can_t_be_guessed_can_be_said(job: Job, tmp_path: Path) -> None:
    """Numbers as text, pickles of the first protocols, bytes that look like pickles."""
    file = tmp_path / "store.sqlite"
    with SqliteDict(str(file), encode=lambda value: value, decode=bytes) as table:
        table["number"], table["old"], table["bytes"] = "7", pickle.dumps({"a": 1}, 0), pickle.dumps([1])
        table.commit()
    bring(job, Sqlitedict(file, encoded="plain"))
    assert rows(job, "unnamed") == {
        ("number",): "7",
        ("old",): pickle.dumps({"a": 1}, 0),
        ("bytes",): pickle.dumps([1]),
    }
    report = bring(job, Sqlitedict(file, encoded="pickle"), unpickle="plain", category="pickle")
    assert rows(job, "pickle") == {("old",): {"a": 1}, ("bytes",): [1]}
    assert reasons(report) == {"damaged": 1}
    report = bring(job, Sqlitedict(file, encoded="json"), category="json")
    assert rows(job, "json") == {("number",): 7}
    assert reasons(report) == {"damaged": 2}
    report = bring(job, Sqlitedict(file), category="auto")
    assert rows(job, "auto") == {("number",): "7", ("old",): pickle.dumps({"a": 1}, 0)}
    assert reasons(report) == {"pickled_value": 1}


def test_keys_that_sqlitedict_has_encoded_are_read(job: Job, tmp_path: Path) -> None:
    """Its own `encode_key` makes the base64 of a pickle; a text that is none stays text."""
    file = tmp_path / "store.sqlite"
    with SqliteDict(str(file), encode_key=encode_key, decode_key=decode_key) as table:
        table[("a", 1)], table["text"] = 1, 2
        table.commit()
    edited(file, "INSERT INTO unnamed VALUES ('YWJj', 3), ('not base64', 4), (NULL, 5), (X'FF', 6)")
    report = bring(job, Sqlitedict(file), unpickle="plain")
    assert rows(job, "unnamed") == {("a", 1): 1, ("text",): 2, ("YWJj",): 3, ("not base64",): 4, (b"\xff",): 6}
    assert reasons(report) == {"damaged": 1}
    assert reasons(bring(job, Sqlitedict(file))) == {"pickled_key": 2, "damaged": 1}
    report = bring(job, Sqlitedict(file, keys="pickle"), unpickle="plain")
    assert reasons(report) == {"unread": 1, "damaged": 3}
    report = bring(job, Sqlitedict(file, keys="text"), unpickle="plain", category="text")
    assert (encode_key("text"),) in rows(job, "text")


def plain_table(path: Path, *statements: str, name: str = "t") -> Path:
    """Make a file with a table that has no index, and an item."""
    edited(path, f'CREATE TABLE "{name}" (key, value)')
    edited(path, f"INSERT INTO \"{name}\" VALUES ('k', 1)")
    for statement in statements:
        edited(path, statement)
    return path


def test_text_is_taken_for_json_only_where_some_of_it_is_nothing_else(job: Job, tmp_path: Path) -> None:
    """Numbers that were written as text stay text; the report says what was guessed, of each table."""
    file = tmp_path / "store.sqlite"
    for name, encode, values in (
        ("zip", str, ["12345", "1e5", "true"]),
        ("json", json.dumps, [1, None, ["x"]]),
        ("text", str, ["{", "1"]),
    ):
        with SqliteDict(str(file), tablename=name, encode=encode, decode=str) as table:
            table.update({str(number): value for number, value in enumerate(values)})
            table.commit()
    report = bring(job, Sqlitedict(file))
    assert list(rows(job, "zip").values()) == ["12345", "1e5", "true"]
    assert list(rows(job, "json").values()) == [1, None, ["x"]]
    assert list(rows(job, "text").values()) == ["{", "1"]
    assert report.guessed == {
        "json": "text was taken for JSON",
        "zip": "text was taken for text, and could be JSON: numbers, true, false, null",
    }
    assert bring(job, Sqlitedict(file, encoded="plain")).guessed == {}


def test_guessing_can_be_stopped(job: Job, tmp_path: Path) -> None:
    """While all text is looked at, and nothing was given yet, `progress` is called, and may raise."""
    with SqliteDict(str(tmp_path / "store"), encode=json.dumps, decode=json.loads) as table:
        table.update({str(number): [number] for number in range(1_000)})
        table.commit()
    told = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bring(job, Sqlitedict(tmp_path / "store"), progress=stop)
    assert told == [(0, 1_000)] * 3
    assert bring(job, Sqlitedict(tmp_path / "store"), progress=lambda _done, _total: None).taken == 1_000


def test_the_file_of_a_diskcache_is_no_file_of_sqlitedict(job: Job, tmp_path: Path) -> None:
    """Its table of settings has the same columns, and isn't what anybody means."""
    with diskcache.Cache(tmp_path / "cache") as cache:
        cache["a"] = 1
    with pytest.raises(Corrupt, match="is the file of a diskcache"):
        bring(job, Sqlitedict(tmp_path / "cache" / "cache.db"))


def test_names_of_tables_may_be_anything(job: Job, tmp_path: Path) -> None:
    """One that has no name goes to `records`; what can't be asked for is told, what is no category refused."""
    file = plain_table(tmp_path / "store")
    plain_table(file, name="")
    plain_table(file, name="xyyx")
    file.write_bytes(file.read_bytes().replace(b"xyyx", b"x\xff\xfex"))
    report = bring(job, Sqlitedict(file))
    assert report.categories == {"t": 1, "records": 1}
    assert report.passed_over == {"x\udcff\udcfex": "its name can't be asked for"}
    assert bring(job, Sqlitedict(file, tables=[""]), category="none").categories == {"none": 1}
    plain_table(file, name="l" * 300)
    with pytest.raises(Misuse, match=r"'l{100}' of .* can't come into category") as raised:
        bring(job, Sqlitedict(file))
    assert "one at a time" in raised.value.hint
    assert bring(job, Sqlitedict(file, tables=["l" * 300]), category="long").categories == {"long": 1}


def test_two_tables_never_become_one_category(job: Job, tmp_path: Path) -> None:
    """Where names, those for kept pickles too, would be the same it is refused before anything is stored."""
    file = plain_table(plain_table(tmp_path / "store", name="a"), name="a.pickles")
    assert bring(job, Sqlitedict(file), dry_run=True).taken == 2
    with pytest.raises(Misuse, match=r"'a' and 'a\.pickles' of .* would come into one category, 'a\.pickles'"):
        bring(job, Sqlitedict(file), keep_pickles=True)
    with lmdb.open(str(tmp_path / "env"), max_dbs=2) as env, env.begin(write=True) as tx:
        tx.put(b"k", b"own")
        tx.put(b"k", b"named", db=env.open_db(b"records", txn=tx))
    with pytest.raises(Misuse, match="would come into one category, 'records'"):
        bring(job, Lmdb(tmp_path / "env"))
    assert job.categories().result() == []
    bring(job, Lmdb(tmp_path / "env", tables=[""], keys="text"), category="own")
    bring(job, Lmdb(tmp_path / "env", tables=["records"], keys="text"))
    assert (rows(job, "own"), rows(job)) == ({("k",): b"own"}, {("k",): b"named"})


# -- files that are forged ---------------------------------------------------------------------------------------


def test_a_link_to_a_file_is_read_with_the_log_of_the_file(job: Job, tmp_path: Path) -> None:
    """The log lies beside the file, not beside the link."""
    file = tmp_path / "there" / "store"
    file.parent.mkdir()
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode = WAL")
        plain_table(file)
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.execute("INSERT INTO t VALUES ('in the log', 2)")
        (tmp_path / "link").symlink_to(file)
        assert bring(job, Sqlitedict(tmp_path / "link")).taken == 2
    assert rows(job, "t") == {("k",): 1, ("in the log",): 2}


@pytest.mark.parametrize("encoded", ["auto", "plain"])
def test_rows_out_of_order_are_damage(encoded: Any, job: Job, tmp_path: Path) -> None:
    """A page whose rows lead back to the ones before isn't read for ever."""
    file = plain_table(tmp_path / "store", "DELETE FROM t")
    edited(file, "INSERT INTO t(rowid, key, value) VALUES (100, 'a', '1'), (101, 'b', '2')")
    data = bytearray(file.read_bytes())
    data[data.index(b"\x65\x03\x0f\x0f")] = 5
    file.write_bytes(data)
    with pytest.raises(Corrupt, match="out of order"):
        bring(job, Sqlitedict(file, encoded=encoded))


@pytest.mark.parametrize("ending", ["-journal", "-wal", "-shm"])
def test_what_is_no_file_isn_t_opened(ending: str, job: Job, tmp_path: Path) -> None:
    """A pipe in the place of a log would be waited for."""
    file = plain_table(tmp_path / "store")
    os.mkfifo(f"{file}{ending}")
    with pytest.raises(Corrupt, match=f"store{ending} is no file"):
        bring(job, Sqlitedict(file))


COLUMNS = "key, raw, expire_time, tag, size, mode, filename, value"


@pytest.mark.parametrize("rowid", ["rowid TEXT", "rowid INTEGER"])
def test_a_column_that_is_called_rowid_is_no_rowid(rowid: str, job: Job, tmp_path: Path) -> None:
    """Rows are counted by what SQLite counts them by, whatever the columns are called."""
    edited(tmp_path / "cache.db", f"CREATE TABLE Cache ({rowid}, {COLUMNS})")
    with closing(sqlite3.connect(tmp_path / "cache.db")) as db, db:
        db.executemany(
            "INSERT INTO Cache (rowid, key, raw, mode, value) VALUES ('5', ?, 1, 1, 1)", [(n,) for n in range(1_000)]
        )
    assert bring(job, Diskcache(tmp_path)).taken == 1_000


@pytest.mark.parametrize(
    "schema", [f"({COLUMNS}, _rowid_)", f"({COLUMNS.replace('key', 'key PRIMARY KEY')}) WITHOUT ROWID"]
)
def test_a_table_that_can_t_be_walked_through_is_refused(schema: str, job: Job, tmp_path: Path) -> None:
    """It isn't what diskcache makes."""
    edited(tmp_path / "cache.db", f"CREATE TABLE Cache {schema}")
    with pytest.raises(Corrupt, match="another table than diskcache makes"):
        bring(job, Diskcache(tmp_path))


@pytest.mark.parametrize("depth", [60, 66, 300, 980, 100_000])
def test_a_nested_key_is_left(depth: int, job: Job, tmp_path: Path) -> None:
    """However deep it is, it ends nothing but itself."""
    with diskcache.Cache(tmp_path / "cache", disk=diskcache.JSONDisk) as cache:
        cache["fine"] = 1
    packed = zlib.compress(b"[" * depth + b"]" * depth)
    edited(
        tmp_path / "cache" / "cache.db", "INSERT INTO Cache (key, raw, mode, value) VALUES (?, 1, 1, ?)",
        packed, zlib.compress(b"1"),
    )  # fmt: skip
    report = bring(job, Diskcache(tmp_path / "cache", encoded="json"))
    assert report.taken == (2 if depth == 60 else 1)
    assert set(reasons(report)) <= {"no_key", "damaged"}


def test_json_is_read_within_bounds(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A short packed text may hold a great many values; commas and brackets within strings are none."""
    many = {
        "containers": b"[" + b"{}," * 600_000 + b"1]",
        "values": b"[" + b"1," * 2_200_000 + b"1]",
        "wide": ("[" + "{}," * 600_000 + "1]").encode("utf-16"),
    }
    text = ',[{"\\' * 600_000
    packed = {name: zlib.compress(data) for name, data in {**many, "text": json.dumps(text).encode()}.items()}
    diskcache.Cache(tmp_path / "cache", disk=diskcache.JSONDisk).close()
    for name, data in packed.items():
        row = zlib.compress(json.dumps(name).encode()), data
        edited(tmp_path / "cache" / "cache.db", "INSERT INTO Cache (key, raw, mode, value) VALUES (?, 1, 1, ?)", *row)
    with monkeypatch.context() as patch:
        patch.setattr(jsontext.json, "loads", lambda found: found)  # which is asked for nothing that is too large
        report = bring(job, Diskcache(tmp_path / "cache", encoded="json"), category="looked at")
    assert reasons(report) == {"large": 3}
    bring(job, Diskcache(tmp_path / "cache", encoded="json"))
    assert rows(job) == {("text",): text}
    monkeypatch.setattr(jsontext, "JSON_BYTES_MAX", 1_000)
    assert reasons(bring(job, Diskcache(tmp_path / "cache", encoded="json"))) == {"large": 4}


def test_long_text_and_long_keys_aren_t_read(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text is measured to its end, also where it has a NUL; what is too long is left, and no more of it is read."""
    monkeypatch.setattr(sqlitedict, "VALUE_BYTES_MAX", 1_000)
    file = plain_table(tmp_path / "store")
    values = ["x" * 1_000, "x\0" + "y" * 1_000, "é" * 501, b"x" * 1_001]
    for number, value in enumerate(values):
        edited(file, "INSERT INTO t VALUES (?, ?)", number, value)
    for long in ("x" * 2_000_000, b"x\0" * 1_000_000):
        edited(file, "INSERT INTO t VALUES (?, 1)", long)
    report = bring(job, Sqlitedict(file))
    assert reasons(report) == {"large": 5}
    assert rows(job, "t") == {("k",): 1, (0,): values[0]}
    assert [example.key for example in report.left[Reason.large].examples][-1] == "(a key of over 1,048,576 bytes)"


def test_shards_of_any_number_come_and_what_can_t_be_read_is_told(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thousandth shard has four digits; links aren't followed, and told; what may not be read is an error."""
    for number in (0, 999, 1_000):
        with diskcache.Cache(tmp_path / "cache" / f"{number:03}") as cache:
            cache[number] = number
    (tmp_path / "cache" / "deque").mkdir()
    (tmp_path / "cache" / "deque" / "jobs").symlink_to(tmp_path)
    report = bring(job, Diskcache(tmp_path / "cache"))
    assert list(rows(job)) == [(0,), (999,), (1_000,)]
    assert report.passed_over == {"deque/jobs": "a link, which isn't followed"}
    scan = os.scandir

    def refused(path: Any) -> Any:
        if str(path).endswith("deque"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(Unavailable, match="deque can't be read: Permission denied"):
        bring(job, Diskcache(tmp_path / "cache"))


# -- lmdb --------------------------------------------------------------------------------------------------------


def fill_lmdb(path: Path, *, subdir: bool = True) -> None:
    """Make an environment with databases of every kind."""
    with lmdb.open(str(path), max_dbs=10, map_size=50_000_000, subdir=subdir) as env:
        users, numbers = env.open_db(b"users"), env.open_db(b"numbers", integerkey=True)
        several = env.open_db("é".encode(), dupsort=True)
        with env.begin(write=True) as tx:
            tx.put(b"own", b"value")
            tx.put(b"like an entry", bytes(48))
            for number in range(1_000):
                tx.put(b"user:%04d" % number, b"x" * (number % 50) * 100, db=users)
                tx.put(number.to_bytes(8, sys.byteorder), b"%d" % number, db=numbers)
                tx.put(b"k%d" % (number % 3), b"%04d" % number, db=several)


@pytest.mark.parametrize("subdir", [True, False])
def test_databases_of_lmdb_become_categories(subdir: bool, job: Job, tmp_path: Path) -> None:
    """Keys and values are bytes; a number is a number, and several values of one key are a list."""
    fill_lmdb(tmp_path / "env", subdir=subdir)
    report = bring(job, Lmdb(tmp_path / "env"))
    assert report.categories == {"records": 2, "users": 1_000, "numbers": 1_000, "é": 3}
    assert reasons(report) == {}
    found = {row.key: row.value for row in Category(job, "records").iterate()}
    assert found == {RawKey(b"own"): b"value", RawKey(b"like an entry"): bytes(48)}
    users = {row.key: row.value for row in Category(job, "users").iterate()}
    assert users == {RawKey(b"user:%04d" % number): b"x" * (number % 50) * 100 for number in range(1_000)}
    assert list(rows(job, "numbers")) == [(number,) for number in range(1_000)]
    several = {bytes(row.key): row.value for row in Category(job, "é").iterate()}
    assert several == {b"k%d" % at: [b"%04d" % number for number in range(at, 1_000, 3)] for at in range(3)}


def test_keys_of_lmdb_may_be_text_or_parts(job: Job, tmp_path: Path) -> None:
    """As text they are tuples of one text, and what isn't UTF-8 is left; as bytes all come."""
    fill_lmdb(tmp_path / "env")
    with lmdb.open(str(tmp_path / "env"), max_dbs=10) as env, env.begin(write=True) as tx:
        tx.put(b"\xff", b"", db=env.open_db(b"users", txn=tx))
    report = bring(job, Lmdb(tmp_path / "env", keys="text", tables=["users"]), codec=RAW)
    assert reasons(report) == {"no_key": 1}
    assert job.get("users", ("user:0007",)).result() == b"x" * 700
    report = bring(job, Lmdb(tmp_path / "env", keys="bytes", tables=["users"]), category="bytes")
    assert rows(job, "bytes")[(b"\xff",)] == b""
    report = bring(job, Lmdb(tmp_path / "env", tables=["é"]), codec=RAW)
    assert reasons(report) == {"no_value": 3}
    with pytest.raises(Misuse, match="has no table 'other'"):
        bring(job, Lmdb(tmp_path / "env", tables=["other"]))


def test_items_that_look_like_databases_are_items(job: Job, tmp_path: Path) -> None:
    """A name ends with a NUL, so a key with one in it is none, though what is before it is the name of one."""
    keys = [b"\0\0\0\7", b"users\0x", b"other\0x", b"\0", b"plain"]
    with lmdb.open(str(tmp_path / "env"), max_dbs=2) as env, env.begin(write=True) as tx:
        tx.put(b"ada", b"1", db=env.open_db(b"users", txn=tx))
        for found in keys:
            tx.put(found, bytes(range(48)))
    report = bring(job, Lmdb(tmp_path / "env", keys="bytes"))
    assert report.categories == {"records": 5, "users": 1}
    assert rows(job) == {(found,): bytes(range(48)) for found in keys}


def test_only_the_databases_that_are_wanted_are_opened(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are more than can be open at once the error says so, and those that are named come."""
    with lmdb.open(str(tmp_path / "env"), max_dbs=20) as env, env.begin(write=True) as tx:
        for number in range(20):
            tx.put(b"k", b"%d" % number, db=env.open_db(b"d%d" % number, txn=tx))
    monkeypatch.setattr("persistency.integrations.migration.lmdb._DATABASES_MAX", 10)
    with pytest.raises(Unavailable) as raised:
        bring(job, Lmdb(tmp_path / "env"))
    assert "over 10 databases" in raised.value.hint
    report = bring(job, Lmdb(tmp_path / "env", tables=["d7", "d19"], keys="text"))
    assert report.categories == {"d7": 1, "d19": 1}
    assert rows(job, "d19") == {("k",): b"19"}


def test_values_under_one_key_aren_t_counted_as_items(job: Job, tmp_path: Path) -> None:
    """How many keys there are can't be told beforehand, so that progress has no total that is never reached."""
    fill_lmdb(tmp_path / "env")
    told = []
    bring(job, Lmdb(tmp_path / "env", tables=["é"]), progress=lambda done, total: told.append((done, total)))
    assert told == [(3, 3)]


def test_an_environment_is_left_to_the_byte(job: Job, tmp_path: Path) -> None:
    """Its data stays; without a lock file none is made."""
    fill_lmdb(tmp_path / "env")
    before = digests(tmp_path / "env" / "data.mdb")
    bring(job, Lmdb(tmp_path / "env"))
    assert digests(tmp_path / "env" / "data.mdb") == before
    (tmp_path / "env" / "lock.mdb").unlink()
    bring(job, Lmdb(tmp_path / "env"))
    assert digests(tmp_path / "env") == before


def test_an_environment_that_grows_meanwhile_is_read_on(job: Job, tmp_path: Path) -> None:
    """A writer in another process makes the map larger in the middle; all that was there comes."""
    fill_lmdb(tmp_path / "env")
    program = """
import lmdb, sys
with lmdb.open(sys.argv[1], max_dbs=10, map_size=200_000_000) as env:
    users = env.open_db(b"users")
    with env.begin(write=True) as tx:
        for number in range(1_000, 3_000):
            tx.put(b"user:%04d" % number, bytes(40_000), db=users)
"""
    told = []

    def write(done: int, _total: int) -> None:
        told.append(done)
        if len(told) == 1:
            subprocess.run([sys.executable, "-c", program, tmp_path / "env"], check=True, timeout=60)

    report = bring(job, Lmdb(tmp_path / "env"), progress=write)
    assert reasons(report) == {}
    assert report.categories["users"] >= 1_000
    assert job.count("users").result() == report.categories["users"]


def test_an_environment_that_is_open_here_is_told(job: Job, tmp_path: Path) -> None:
    """LMDB allows one opening per process; so does this, with a word about it."""
    fill_lmdb(tmp_path / "env")
    with lmdb.open(str(tmp_path / "env")), pytest.raises(Unavailable, match="can't be read"):
        bring(job, Lmdb(tmp_path / "env"))
    (tmp_path / "env" / "lock.mdb").unlink()

    def come(_done: int, _total: int) -> None:
        (tmp_path / "env" / "lock.mdb").touch()

    with pytest.raises(Unavailable, match="somebody has opened"):
        bring(job, Lmdb(tmp_path / "env"), progress=come)


def test_a_missing_lmdb_names_its_extra() -> None:
    """Whoever brings another store over needs it not; who asks for `Lmdb` reads what to install."""
    from tests.test_extras import run

    program = "from persistency.integrations.migration import bring, Diskcache, Sqlitedict\nprint('fine')\n"
    ended = run(program, without=["lmdb", "diskcache", "sqlitedict"])
    assert ended.stdout == "fine\n", ended.stderr
    ended = run(program + "from persistency.integrations.migration import Lmdb", without=["lmdb"])
    assert ended.stderr.splitlines()[-1] == (
        "ModuleNotFoundError: persistency.integrations.migration.lmdb needs the extra 'lmdb': "
        "pip install 'persistency[lmdb]'"
    )


# -- bringing ----------------------------------------------------------------------------------------------------


def numbers(path: Path, count: int) -> Sqlitedict:
    """Make a file with so many numbers."""
    with SqliteDict(str(path), encode=lambda value: value, decode=int) as table:
        table.update({f"k{number:05d}": number for number in range(count)})
        table.commit()
    return Sqlitedict(path)


def test_it_can_be_done_again(job: Job, tmp_path: Path) -> None:
    """The second time writes the same rows, and leaves others alone."""
    origin = numbers(tmp_path / "store", 100)
    job.put("unnamed", ("other",), CBOR.encode("stays"))
    bring(job, origin)
    first = rows(job, "unnamed")
    assert bring(job, origin).taken == 100
    assert rows(job, "unnamed") == first == {("other",): "stays", **{(f"k{at:05d}",): at for at in range(100)}}


def test_a_dry_run_stores_nothing_and_says_the_same(job: Job, tmp_path: Path) -> None:
    """Its numbers are those of the real one, down to what the job would refuse."""
    origin = numbers(tmp_path / "store", 3_000)
    edited(tmp_path / "store", "INSERT INTO unnamed VALUES (?, 1)", "x" * 9_000)
    dry = bring(job, origin, dry_run=True)
    assert job.categories().result() == []
    assert job.version().result() == 0
    real = bring(job, origin)
    assert (dry.dry_run, real.dry_run) == (True, False)
    for report in (dry, real):
        assert (report.records, report.taken, reasons(report)) == (3_001, 3_000, {"no_key": 1})
        assert report.categories == {"unnamed": 3_000}


def test_atomic_is_all_or_nothing(job: Job, tmp_path: Path) -> None:
    """One item that can't come withholds all others, whether that is seen when it is read or when it is stored."""
    origin = numbers(tmp_path / "store", 3_000)
    before = job.version().result()
    report = bring(job, origin, atomic=True)
    assert report.taken == job.count("unnamed").result() == 3_000
    assert job.version().result() - before == 3_000
    for name, value in (("x" * 9_000, 1), ("k", pickle.dumps([1]))):
        edited(tmp_path / "store", "INSERT INTO unnamed VALUES (?, ?)", name, value)
        report = bring(job, origin, atomic=True, category="other")
        assert (report.taken, report.withheld, report.lost) == (0, 3_000, 1)
        assert balance(report) == 0
        assert job.count("other").result() == 0
        edited(tmp_path / "store", "DELETE FROM unnamed WHERE key = ?", name)


def test_atomic_keeps_nothing_once_something_is_lost(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What will never be stored isn't held in memory until the end."""
    origin = numbers(tmp_path / "store", 100)
    edited(tmp_path / "store", "UPDATE unnamed SET value = ? WHERE key = 'k00050'", pickle.dumps([1]))
    held = []

    class Rows(list[Any]):
        def append(self, row: Any) -> None:
            super().append(row)
            held.append(len(self))

    begin = bringing._Bringing.__init__

    def watched(self: Any, *given: Any, **options: Any) -> None:
        begin(self, *given, **options)
        self._rows = Rows()

    monkeypatch.setattr(bringing._Bringing, "__init__", watched)
    report = bring(job, origin, atomic=True)
    assert (report.withheld, report.lost, balance(report)) == (99, 1, 0)
    assert held == list(range(1, 51))


def test_progress_may_stop_it_between_two_batches(job: Job, tmp_path: Path) -> None:
    """What it was told is stored, all of it and nothing more."""
    origin = numbers(tmp_path / "store", 5_000)
    told = []

    def stop(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bring(job, origin, progress=stop)
    assert told == [(1_024, 5_000), (2_048, 5_000), (3_072, 5_000)]
    assert list(rows(job, "unnamed")) == [(f"k{at:05d}",) for at in range(3_072)]


def test_batches_are_bounded_in_bytes(job: Job, tmp_path: Path) -> None:
    """Large values don't pile up: a batch ends with the one that takes it over a megabyte."""
    with diskcache.Cache(tmp_path / "cache") as cache:
        for number in range(12):
            cache[number] = bytes(300_000)
    told: list[int] = []
    bring(job, Diskcache(tmp_path / "cache"), progress=lambda done, _total: told.append(done))
    assert told == [4, 8, 12]


def test_what_the_job_refuses_is_told_with_the_key(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and payloads beyond a job's bounds are left, each with its reason; the others of the batch come."""
    origin = numbers(tmp_path / "store", 10)
    edited(tmp_path / "store", "INSERT INTO unnamed VALUES (?, 1)", "x" * 9_000)
    edited(tmp_path / "store", "INSERT INTO unnamed VALUES ('large', ?)", bytes(2_000))
    monkeypatch.setattr(persistency.arguments, "PAYLOAD_BYTES_MAX", 1_000)
    report = bring(job, origin)
    assert reasons(report) == {"no_key": 1, "large": 1}
    assert report.left[Reason.large].examples[0].key == "'large'"
    assert "8192 bytes" in report.left[Reason.no_key].examples[0].why
    assert report.taken == job.count("unnamed").result() == 10


def test_a_quota_ends_it_with_the_key_and_whole_batches(tmp_path: Path) -> None:
    """What fits stays, a batch is stored whole or not at all, and the error says where it was."""
    with diskcache.Cache(tmp_path / "cache") as cache:
        for number in range(100):
            cache[number] = bytes(100_000)
    with Persistency(tmp_path / "root") as persistency:
        job = persistency.open_job("brought", max_bytes=5_000_000)
        with pytest.raises(QuotaExceeded) as raised:
            bring(job, Diskcache(tmp_path / "cache"))
        told = "\n".join(raised.value.__notes__)
        stored = job.count("records").result()
    assert f"{stored} items were dealt with before" in told
    assert stored == 44  # four batches of eleven
    assert "The batch that failed begins with 44 in 'records', and ends with 54 in 'records'." in told


def test_keys_may_be_said_in_another_way(job: Job, tmp_path: Path) -> None:
    """A function takes text apart, or gives a `Key`; what it refuses is left."""
    with diskcache.Cache(tmp_path / "cache") as cache:
        cache["user:7:name"], cache["page"], cache[3] = "ada", 1, 2

    def apart(found: Any) -> Key | tuple[Any, ...]:
        if not isinstance(found, str):
            raise Misuse("no text")
        return key("page") if found == "page" else tuple(found.split(":"))

    report = bring(job, Diskcache(tmp_path / "cache"), key=apart)
    assert rows(job) == {("user", "7", "name"): "ada", ("page",): 1}
    assert report.left[Reason.no_key].examples == [(None, "3", "no text")]


def test_raw_values_are_payloads(job: Job, tmp_path: Path) -> None:
    """With RAW bytes are stored as they are, and what isn't bytes is left."""
    with diskcache.Cache(tmp_path / "cache") as cache:
        cache["bytes"], cache["text"] = b"\xff", "x"
    report = bring(job, Diskcache(tmp_path / "cache"), codec=RAW)
    assert job.get("records", ("bytes",)).result() == b"\xff"
    assert reasons(report) == {"no_value": 1}


def test_wrong_arguments_are_told_at_the_call(job: Job, tmp_path: Path) -> None:
    """Each raises `Misuse`, and nothing was done."""
    origin = numbers(tmp_path / "store", 1)
    wrong: list[Any] = [
        lambda: bring("job", origin),  # type: ignore[arg-type]
        lambda: bring(job, "diskcache"),  # type: ignore[arg-type]
        lambda: bring(job, origin, unpickle="yes"),  # type: ignore[arg-type]
        lambda: bring(job, origin, category=""),
        lambda: bring(job, origin, category="x" * 300),
        lambda: bring(job, Sqlitedict(job.path or "")),
        lambda: Sqlitedict("x", encoded="yaml"),  # type: ignore[arg-type]
        lambda: Sqlitedict("x", keys="raw"),  # type: ignore[arg-type]
        lambda: Diskcache("x", encoded="pickle"),  # type: ignore[arg-type]
        lambda: Lmdb("x", keys="auto"),  # type: ignore[arg-type]
        lambda: bring(job, Sqlitedict(tmp_path / "store", tables="unnamed")),
        lambda: bring(job, Sqlitedict(tmp_path / "store", tables=[1])),  # type: ignore[list-item]
    ]
    for call in wrong:
        with pytest.raises(Misuse):
            call()
    assert job.categories().result() == []
