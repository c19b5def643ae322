"""Files of the Nim original (format 1), end to end: a root full of them opens, is migrated, read and written.

The files are built as the original built them: by SQLite itself, in WAL mode, with keys and payloads of its encoding.
What a migration changes in the file, and which files are refused, `tests/storage/test_schema.py` has; the encoding,
byte by byte, `tests/codec/test_fixed.py`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import pytest

from persistency import Check, Conflict, Delete, Entry, Key, KeyRange, Misuse, Persistency, Put, RawKey, Row, key
from persistency.codec.fixed import fixed_key, fixed_payload, i64, u64
from tests.loops import InLoop, bounded, together

WAIT = 20.0  # seconds a test waits for what must come
LOW, HIGH = -(2**63), 2**63 - 1


class Header(NamedTuple):
    """A message's beginning, flattened by the encoding."""

    sender: str
    seq: int


# (channel, lamport time, message number): the original's order of them, which is by the length of a text first.
PLACES = [
    ("", i64(0), u64(0)),
    ("b", i64(LOW), u64(1)),
    ("b", i64(-1), u64(2)),
    ("b", i64(0), u64(3)),
    ("b", i64(1), u64(4)),
    ("b", i64(1), u64(2**64 - 1)),
    ("b", i64(HIGH), u64(5)),
    ("ch", i64(1), u64(7)),
    ("ch", i64(2), u64(8)),
    ("éa", i64(1), u64(9)),
    ("aaaa", i64(1), u64(10)),
]
LOG = [(fixed_key(*place), fixed_payload(Header("alice", at), b"\0\xff" * at)) for at, place in enumerate(PLACES)]
META = [(fixed_key(channel), fixed_payload(True, channel)) for channel in ("", "b", "ch", "éa", "aaaa")]
CONTENTS = {"log": LOG, "meta": META, "raw": [(RawKey(b"\0"), b"\1"), (RawKey(b"\xff\xff"), b"\2")]}


def write_original(path: Path, contents: dict[str, list[tuple[RawKey, bytes]]]) -> None:
    """Write a file as the original did, and close it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    connection = apsw.Connection(str(path))
    assert connection.pragma("journal_mode", "wal") == "wal"
    connection.pragma("synchronous", 1)
    connection.execute(
        "CREATE TABLE IF NOT EXISTS kv (category BLOB NOT NULL, key BLOB NOT NULL, payload BLOB NOT NULL, "
        "PRIMARY KEY (category, key)) WITHOUT ROWID"
    )
    connection.pragma("user_version", 1)
    for category, rows in contents.items():
        for stored, payload in reversed(rows):
            connection.execute(
                "INSERT OR REPLACE INTO kv VALUES (?, ?, ?)", (category.encode(), bytes(stored), payload)
            )
    connection.close()


def look(path: Path, sql: str) -> list[Any]:
    """Ask a closed file something with the standard library."""
    connection = sqlite3.connect(path)
    rows = connection.execute(sql).fetchall()
    connection.close()
    return rows


def rows_of(pairs: Iterable[tuple[RawKey, bytes]]) -> list[Row]:
    """Return pairs as a scan gives them."""
    return [Row(Key(stored), payload) for stored, payload in pairs]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Give a root with one job of the original, "node"."""
    write_original(tmp_path / "root" / "node.db", CONTENTS)
    return tmp_path / "root"


def test_every_read_finds_the_originals_rows(root: Path) -> None:
    """S3-27, S3-83: opened for the first time, its categories and rows are all there, by every read."""
    with Persistency(root) as persistency:
        job = persistency.open_job("node")
        assert job.categories().result(WAIT) == ["log", "meta", "raw"]
        assert job.version().result(WAIT) == 0
        for category, pairs in CONTENTS.items():
            assert [job.get(category, stored).result(WAIT) for stored, _ in pairs] == [p for _, p in pairs]
            assert job.scan(category).result(WAIT) == rows_of(pairs)
            assert job.scan(category, reverse=True).result(WAIT) == rows_of(pairs)[::-1]
            assert list(job.iterate(category, page=2)) == rows_of(pairs)
            assert job.count(category).result(WAIT) == len(pairs)
            assert job.get_many(category, [stored for stored, _ in pairs]).result(WAIT) == dict(pairs)
        assert job.get("log", fixed_key("ch", i64(1), u64(7))).result(WAIT) == LOG[7][1]
        assert job.get("log", fixed_key("ch", i64(1), u64(8))).result(WAIT) is None
        assert job.exists("meta", fixed_key("ch")).result(WAIT) is True
        # It has no versions and no expiries of its own.
        assert job.entry("meta", fixed_key("ch")).result(WAIT) == Entry(Key(META[2][0]), META[2][1], 0, None)


@pytest.mark.parametrize(
    ("prefix", "places"),
    [
        (("b",), range(1, 7)),
        (("b", i64(1)), range(4, 6)),
        (("b", 1, u64(4)), range(4, 5)),
        (("ch",), range(7, 9)),
        (("c",), range(0)),
        (("",), range(1)),
        ((), range(len(LOG))),
    ],
)
def test_a_prefix_of_the_original_is_a_raw_prefix(root: Path, prefix: tuple[Any, ...], places: range) -> None:
    """S3-72, S3-110..114: `fixed_key` of the first fields lists what begins with them, in the original's order."""
    wanted = rows_of(LOG[at] for at in places)
    with Persistency(root) as persistency:
        job = persistency.open_job("node")
        start = fixed_key(*prefix)
        assert job.scan_prefix("log", start).result(WAIT) == wanted
        assert job.scan_prefix("log", start, reverse=True, limit=2).result(WAIT) == wanted[::-1][:2]
        assert list(job.iterate("log", prefix=start, page=1)) == wanted
        assert job.count("log", KeyRange.prefix(start)).result(WAIT) == len(wanted)
        assert job.scan("log", KeyRange(fixed_key("b", -1), fixed_key("b", 1))).result(WAIT) == rows_of(LOG[2:4])


def test_it_is_written_and_reopened(root: Path) -> None:
    """S3-52, S3-54, S3-67, S3-84, S3-88: writes of every kind, another opening, and the file as SQLite sees it."""
    new = fixed_key("ch", i64(3), u64(11))
    with Persistency(root) as persistency:
        job = persistency.open_job("node")
        job.put("log", new, fixed_payload("new"))
        job.put("meta", fixed_key("ch"), b"")
        job.delete("log", fixed_key("ch", i64(1), u64(7)))
        assert job.delete_prefix_acked("log", fixed_key("b", i64(1))).result(WAIT) == 2
        assert job.delete_acked("raw", RawKey(b"\0")).result(WAIT) is True
        job.put("log", key("ch", 1), b"beside the original's")
        assert job.version().result(WAIT) == 6
    left = [pair for at, pair in enumerate(LOG) if at not in (4, 5, 7)]
    added = [Row(Key(new), fixed_payload("new")), Row(key("ch", 1), b"beside the original's")]
    expected = {
        "log": sorted([*rows_of(left), *added]),
        "meta": [Row(stored, b"" if stored == fixed_key("ch") else payload) for stored, payload in rows_of(META)],
        "raw": rows_of(CONTENTS["raw"][1:]),
    }
    with Persistency(root) as persistency:
        job = persistency.open_job("node")
        assert {name: job.scan(name).result(WAIT) for name in job.categories().result(WAIT)} == expected
        assert job.entry("log", new).result(WAIT) == Entry(Key(new), fixed_payload("new"), 1, None)
        assert job.commit(Put("log", new, b"again")).result(WAIT) == 7

    path = root / "node.db"
    assert look(path, "PRAGMA integrity_check") == [("ok",)]
    assert look(path, "PRAGMA user_version") == [(2,)]
    assert look(path, "PRAGMA journal_mode") == [("wal",)]
    stored = look(path, "SELECT category, key, payload FROM kv ORDER BY category, key")
    expected["log"] = [Row(row.key, b"again") if row.key == new else row for row in expected["log"]]
    assert stored == [(name.encode(), bytes(k), payload) for name, rows in expected.items() for k, payload in rows]
    assert look(path, "SELECT count(*) FROM kv WHERE version = 0 AND expires_ms IS NULL") == [(len(left) + 4 + 1,)]
    assert look(path, "SELECT typeof(key), typeof(payload), count(*) FROM kv GROUP BY 1, 2") == [
        ("blob", "blob", len(stored))
    ]


def test_checks_know_the_originals_rows(root: Path) -> None:
    """A row of the original has version 0, which a `Check` takes as any other, until it is written."""
    where = fixed_key("ch")
    with Persistency(root) as persistency:
        job = persistency.open_job("node")
        with pytest.raises(Conflict) as caught:
            job.commit([Check("meta", where, None), Put("meta", where, b"1")]).result(WAIT)
        assert (caught.value.expected, caught.value.actual) == (None, 0)
        version = job.commit([Check("meta", where, 0), Put("meta", where, b"2")]).result(WAIT)
        with pytest.raises(Conflict) as caught:
            job.commit([Check("meta", where, 0), Put("meta", where, b"3")]).result(WAIT)
        assert caught.value.actual == version
        assert job.get("meta", where).result(WAIT) == b"2"


def test_a_log_is_carried_over_to_keys_of_ours(root: Path) -> None:
    """S3-126: a channel is read by its raw prefix and written under tuples in one batch, as a program would move on."""
    with Persistency(root) as persistency:
        job = persistency.open_job("node")
        moved = []
        for row in job.iterate("log", prefix=fixed_key("b"), page=2):
            with pytest.raises(Misuse):
                _ = row.key.parts  # there are no type tags: whoever wrote it knows what it holds
            lamport = int.from_bytes(row.key[3:11], "big") - 2**63
            number = int.from_bytes(row.key[11:19], "big")
            moved += [Put("log", ("b", lamport, number), row.payload), Delete("log", RawKey(row.key))]
        job.commit(moved).result(WAIT)
        assert job.count("log", KeyRange.prefix(fixed_key("b"))).result(WAIT) == 0
        parts = [row.key.parts for row in job.scan_prefix("log", ("b",)).result(WAIT)]
    assert parts == [("b", LOW, 1), ("b", -1, 2), ("b", 0, 3), ("b", 1, 4), ("b", 1, 2**64 - 1), ("b", HIGH, 5)]


UNESCAPED = {"Alice": "%41lice.db", "me@home": "me%40home.db", "a b": "a%20b.db", "Ünï": None, "node.v2": "node.v2.db"}


def test_names_of_the_original_are_adopted(tmp_path: Path) -> None:
    """S3-40: a file under the id as it stands is renamed by its first opening, and is that job's from then on."""
    for job_id in UNESCAPED:
        write_original(tmp_path / f"{job_id}.db", {"log": LOG[:3], "id": [(fixed_key("id"), job_id.encode())]})
    (tmp_path / "notes.txt").write_text("nobody's")
    with Persistency(tmp_path) as persistency:
        for job_id, name in UNESCAPED.items():
            job = persistency.open_job(job_id)
            assert job.get("id", fixed_key("id")).result(WAIT) == job_id.encode()
            assert job.scan("log").result(WAIT) == rows_of(LOG[:3])
            job.put("log", fixed_key("new"), b"new")
            assert job.path is not None
            assert name is None or job.path.name == name
            assert (tmp_path / f"{job_id}.db").exists() == (job.path.name == f"{job_id}.db")
        assert sorted(job.job_id for job in persistency.stored_jobs()) == sorted(UNESCAPED)
    with Persistency(tmp_path) as persistency:
        for job_id in UNESCAPED:
            job = persistency.open_job(job_id)
            assert job.get("log", fixed_key("new")).result(WAIT) == b"new"
            assert job.count("log").result(WAIT) == 4
    databases = sorted(path for path in tmp_path.iterdir() if path.suffix == ".db")
    assert len(databases) == len(UNESCAPED)
    assert all(look(path, "PRAGMA user_version") == [(2,)] for path in databases)
    assert (tmp_path / "notes.txt").read_text() == "nobody's"


def test_many_originals_open_at_once_in_an_event_loop(tmp_path: Path, in_loop: InLoop) -> None:
    """S3-39: the files of a whole root are migrated side by side, each with its own rows."""
    ids = [f"job-{number}" for number in range(8)]
    for job_id in ids:
        write_original(tmp_path / f"{job_id}.db", {"log": [*LOG, (fixed_key("id"), job_id.encode())]})

    async def main() -> list[bytes | None]:
        async with Persistency(tmp_path) as persistency:
            jobs = await together(*map(persistency.aopen_job, ids))
            return await together(*(job.get("log", fixed_key("id")) for job in jobs))

    assert in_loop(bounded, main) == [job_id.encode() for job_id in ids]


def test_a_large_original_keeps_every_row(tmp_path: Path) -> None:
    """S3-84: 20,000 rows in 50 channels come through the migration, in order, and none is lost by a range delete."""
    rows = [(fixed_key(f"ch{at % 50}", i64(at), u64(at)), fixed_payload(at)) for at in range(20_000)]
    write_original(tmp_path / "big.db", {"log": rows})
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("big")
        assert job.scan("log").result(WAIT) == rows_of(sorted(rows))
        assert job.delete_prefix_acked("log", fixed_key("ch7")).result(WAIT) == 400
    path = tmp_path / "big.db"
    assert look(path, "SELECT count(*) FROM kv") == [(19_600,)]
    assert look(path, "PRAGMA integrity_check") == [("ok",)]
