"""What is PostgreSQL's own: keys too long for an index, ids that text can't hold, what is listed and dropped."""

from __future__ import annotations

import random
from typing import Any, TypeAlias

import pytest

from persistency import Persistency, Put
from persistency.codec.keys import RawKey
from persistency.errors import Corrupt, JobLocked, Misuse, StorageError, WriteFailed
from persistency.storage.port import (
    Batch,
    DropRow,
    Failed,
    GetRow,
    ListEntries,
    Run,
    ScanRange,
    SetRow,
    StoreOptions,
    SwapRow,
    TouchRow,
    Within,
)
from persistency.storage.postgres import session as session_module
from persistency.storage.postgres import writes
from persistency.storage.postgres.address import parsed
from persistency.storage.postgres.packing import number
from persistency.storage.postgres.root import PostgresRoot
from persistency.storage.postgres.session import Session, Statement
from persistency.storage.postgres.store import PostgresStore
from persistency.testing import batch, group, put
from tests.postgres import fresh_url, sql

WAIT = 60
NOW_MS = 1_000_000
LONG = random.Random(1).randbytes(8192)  # which no compression makes shorter


@pytest.fixture
def url() -> str:
    """A place of its own."""
    return fresh_url()


@pytest.mark.parametrize("kept", [0, 10])
@pytest.mark.parametrize("shape", ["put", "row", "batch", "run"])
def test_a_key_too_long_for_an_index_fails_alone(url: str, shape: str, kept: int) -> None:
    """Its message fails by itself and takes no version; its neighbours are stored, and the job goes on."""
    store = PostgresRoot(parsed(url)).open("j", StoreOptions(feed_changes_max=kept))

    def fn(within: Within) -> None:
        within.do(SetRow(b"c", b"in", b"", None))
        within.do(SetRow(b"c", LONG, b"", None))

    shapes = {
        "put": put(b"c", LONG, b"long"),
        "row": SetRow(b"c", LONG, b"long", NOW_MS + 5),
        "batch": batch(put(b"c", b"in", b""), put(b"c", LONG, b"long")),
        "run": Run(fn),
    }
    outcomes = store.apply(group(put(b"c", b"a", b"1"), shapes[shape], put(b"c", b"b" * 8192, b"2")), NOW_MS)
    assert isinstance(outcomes[1], Failed)
    assert isinstance(outcomes[1].error, StorageError)
    assert "key of 8192 bytes" in str(outcomes[1].error)
    assert [outcomes[0], outcomes[2]] == [None, None]
    assert store.last_version == 2
    assert [row.key for row in store.read(ListEntries(b"c"), NOW_MS)] == [b"a", b"b" * 8192]
    assert store.get(b"c", LONG, NOW_MS) is None
    assert store.apply(group(put(b"c", LONG, b"x")), NOW_MS)[0].error
    assert store.apply(group(put(b"c", b"d", b"3"), GetRow(b"c", LONG)), NOW_MS) == [None, None]
    store.close()


def test_such_a_key_is_reported_like_any_failed_write(url: str) -> None:
    """As an event it is told by the next flush, as a request to whoever made it."""
    with Persistency(url) as persistency, persistency.open_job("j") as job:
        job.put("c", RawKey(LONG), b"v")
        job.put("c", ("k",), b"v")
        with pytest.raises(WriteFailed) as failed:
            job.flush().result(WAIT)
        assert [failure.outcome for failure in failed.value.failures] == ["not applied"]
        with pytest.raises(StorageError):
            job.commit(Put("c", RawKey(LONG), b"v")).result(WAIT)
        assert job.get("c", ("k",)).result(WAIT) == b"v"
        assert job.statistics().state == "live"


@pytest.mark.parametrize("job_id", ["a", "A b", "a%b", "a\0b", "%00", "ünï", "x" * 190, "../a", "a;DROP TABLE"])
def test_ids_of_all_kinds(url: str, job_id: str) -> None:
    """An id is kept as it is, meets no other, and is dropped alone."""
    with Persistency(url) as persistency:
        with persistency.open_job(job_id) as job, persistency.open_job("other") as other:
            job.put("c", ("k",), job_id.encode())
            other.put("c", ("k",), b"other")
        assert sorted(stored.job_id for stored in persistency.stored_jobs()) == sorted([job_id, "other"])
        with persistency.open_job(job_id) as job:
            assert job.path is None
            assert job.get("c", ("k",)).result(WAIT) == job_id.encode()
        assert persistency.drop_job(job_id) == []
        assert [stored.job_id for stored in persistency.stored_jobs()] == ["other"]


@pytest.mark.parametrize("job_id", ["", "x" * 300, "\udc80"])
def test_ids_that_are_refused(url: str, job_id: str) -> None:
    """What no file can be called no job is called here either."""
    with Persistency(url) as persistency, pytest.raises(Misuse):
        persistency.open_job(job_id)


def test_what_is_stored(url: str) -> None:
    """Each job has the bytes of its keys, payloads and changes, when it was last used, and when it ends."""
    now = [1_700_000_000.0]
    with Persistency(url, clock=lambda: now[0]) as persistency:
        with persistency.open_job("a") as job:
            job.put("c", RawKey(b"12"), b"345")
        now[0] += 10
        with persistency.open_job("b", ttl=60) as job:
            job.put("c", RawKey(b"1"), b"")
        a, b = persistency.stored_jobs()
        assert (a.job_id, a.path, a.bytes, a.expires) == ("a", None, 5, None)
        assert (b.job_id, b.bytes, b.expires) == ("b", 1, now[0] + 60)
        assert a.last_used == now[0] - 10
        assert b.last_used == now[0]
        now[0] += 60
        assert persistency.purge_expired() == ["b"]
        with persistency.open_job("c", feed_changes_max=5) as job:
            job.put("c", RawKey(b"1"), b"22")
            job.flush().result(WAIT)
            assert persistency.purge(3) == ["a"]  # and never one that is open
        assert [job.job_id for job in persistency.stored_jobs()] == ["c"]
        assert persistency.stored_jobs()[0].bytes == 6


def test_changes_that_are_no_longer_kept_are_gone(url: str) -> None:
    """Neither the table nor the memory has more of them than a job keeps, opened anew or not, and none once dropped."""
    root, schema = PostgresRoot(parsed(url)), parsed(url).schema
    versions = f"SELECT version FROM {schema}.changes ORDER BY version"
    for opening in range(2):
        store = root.open("j", StoreOptions(feed_changes_max=3))
        for at in range(1, 6):
            store.apply(group(*[put(b"c", b"k", b"") for _ in range(at)]), NOW_MS)
            last = store.last_version
            assert sql(url, versions) == [(version,) for version in range(max(1, last - 2), last + 1)]
            assert list(store._standing.books.kept) == [version for (version,) in sql(url, versions)]
        assert last == 15 * (opening + 1)
        store.close()
    root.drop("j")
    assert [sql(url, f"SELECT count(*) FROM {schema}.{table}") for table in ("changes", "rows", "jobs")] == [[(0,)]] * 3


def test_a_temporary_job_begins_anew_when_it_has_ended(url: str) -> None:
    """Opened after its end it is empty, whatever was there; who had it before is fenced."""
    now = [1_700_000_000.0]
    with Persistency(url, clock=lambda: now[0]) as persistency:
        with persistency.open_job("a", ttl=60, feed_changes_max=5) as job:
            job.put("c", ("k",), b"v")
        now[0] += 61
        with persistency.open_job("a", feed_changes_max=5) as job:
            assert job.get("c", ("k",)).result(WAIT) is None
            assert job.version().result(WAIT) == 0
            assert job.changes(0, 5).result(WAIT) == []
        with pytest.raises(Misuse, match="there for good"):
            persistency.open_job("a", ttl=5) if _written(persistency) else None


@pytest.mark.parametrize("kept", [0, 5])
def test_nothing_stays_of_a_temporary_job_that_has_ended(url: str, kept: int) -> None:
    """Whoever has its name then, with changes or without, finds no row and no change of it in the tables."""
    root, schema = PostgresRoot(parsed(url)), parsed(url).schema
    store = root.open("j", StoreOptions(feed_changes_max=5, expires_ms=NOW_MS + 10, now_ms=NOW_MS))
    store.apply(group(put(b"c", b"k", b"")), NOW_MS)
    store.close()
    store = root.open("j", StoreOptions(feed_changes_max=kept, now_ms=NOW_MS + 10))
    assert store.last_version == 0
    assert [sql(url, f"SELECT count(*) FROM {schema}.{table}") for table in ("changes", "rows")] == [[(0,)]] * 2
    store.apply(group(SetRow(b"c", b"k", b"", NOW_MS + 20)), NOW_MS + 10)
    assert store.reap(NOW_MS + 20, 1) == 1
    assert store.last_version == (2 if kept else 1)  # without changes it takes none
    store.close()


def _written(persistency: Persistency) -> bool:
    with persistency.open_job("a") as job:
        job.put("c", ("k",), b"v")
    return True


def test_the_latest_time_is_given_back(url: str) -> None:
    """A row that has ended for whoever read it last is ended for the next owner, whose clock may be behind."""
    root = PostgresRoot(parsed(url))
    store = root.open("j", StoreOptions(now_ms=NOW_MS))
    store.apply(group(SetRow(b"c", b"k", b"", NOW_MS + 10)), NOW_MS)
    assert store.get(b"c", b"k", NOW_MS + 20) is None
    store.close(now_ms=NOW_MS)
    store = root.open("j", StoreOptions(now_ms=NOW_MS))
    assert store.status().latest_ms == NOW_MS + 20
    store.close()


def test_a_session_made_anew_is_not_read_from_unseen(url: str) -> None:
    """A connection that was replaced while nobody used it may lead to a server that has lost what was answered."""
    store = PostgresRoot(parsed(url)).open("j", StoreOptions())
    assert isinstance(store, PostgresStore)
    store.apply(group(put(b"c", b"k", b"1")), NOW_MS)
    sql(url, f"UPDATE {parsed(url).schema}.jobs SET last_version = 0")
    store._pool.give_up(store._holder)
    with pytest.raises(Corrupt, match="it lost what was answered"):
        store.get(b"c", b"k", NOW_MS)
    store.close()


@pytest.mark.parametrize("kept", [0, 5])
def test_what_was_refused_is_in_no_doubt(url: str, kept: int) -> None:
    """A group that the server has refused didn't happen: it isn't waited for, nor kept."""
    store = PostgresRoot(parsed(url)).open("j", StoreOptions(feed_changes_max=kept))
    assert isinstance(store, PostgresStore)
    sql(url, f"ALTER TABLE {parsed(url).schema}.rows ADD CONSTRAINT short CHECK (octet_length(payload) < 5)")
    with pytest.raises(StorageError, match="short") as refused:
        store.apply(group(put(b"c", b"k", b"12345")), NOW_MS)
    assert not refused.value.at_commit
    assert not store._standing.doubtful
    assert store.apply(group(put(b"c", b"k", b"1")), NOW_MS) == [None]
    assert store.last_version == 1
    store.close()


def test_a_job_rests_and_wakes(url: str) -> None:
    """With one live job at a time others rest, given back; each post wakes its own, with all that was there."""
    with Persistency(url, max_live_jobs=1) as persistency:
        jobs = [persistency.open_job(f"j{at}") for at in range(3)]
        for number in range(3):
            for job in jobs:
                job.put("c", (number,), b"v")
                job.flush().result(WAIT)
        owned = f"SELECT count(*) FROM {parsed(url).schema}.jobs WHERE owner IS NOT NULL"
        assert sql(url, owned)[0][0] <= 1
        assert [job.count("c").result(WAIT) for job in jobs] == [3, 3, 3]


def test_a_job_that_was_taken_while_it_rested(url: str) -> None:
    """What was posted to a job that another process has by then fails with `JobLocked`."""
    with Persistency(url, max_live_jobs=1) as persistency:
        one, other = persistency.open_job("one"), persistency.open_job("other")
        one.put("c", ("k",), b"v")
        one.flush().result(WAIT)
        other.put("c", ("k",), b"v")
        other.flush().result(WAIT)
        statement = f"UPDATE {parsed(url).schema}.jobs SET owner = 'x:1:y', lease_ends = now() + interval '1 hour'"
        sql(url, statement + " WHERE job = 'one'")
        with pytest.raises(JobLocked, match="x:1:y"):
            one.commit(Put("c", ("k",), b"w")).result(WAIT)
        sql(url, f"UPDATE {parsed(url).schema}.jobs SET owner = NULL WHERE job = 'one'")
        assert one.commit(Put("c", ("k",), b"w")).result(WAIT) == 2


def test_large_payloads_and_groups(url: str) -> None:
    """Payloads of megabytes, and batches of many thousand rows, go through in one transaction each."""
    store = PostgresRoot(parsed(url)).open("j", StoreOptions(max_bytes=10**9))
    large = bytes(range(256)) * (32 * 1024)  # 8 MiB
    places = group(*[put(b"c", b"%d" % at, large) for at in range(10)])
    assert store.apply(places, NOW_MS) == [None] * 10
    assert store.scan(ScanRange(b"c", b"3", b"4"), NOW_MS) == [(b"3", large)]
    many = Batch(group(*[put(b"d", b"%06d" % at, b"") for at in range(20_000)]), 20_000, False)
    assert store.apply(group(many), NOW_MS) == [20_010]
    assert len(store.scan(ScanRange(b"d", b"", None, keys_only=True), NOW_MS)) == 20_000
    store.close()


Sizes: TypeAlias = list[tuple[bytes, int]]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sizes:
    """Have statements be of some 4,000 bytes at most; return the name and the size of each that is sent."""
    found: Sizes = []
    pipe = Session.pipe

    def counting(self: Session, steps: Any) -> Any:
        found.extend((name.rpartition(b".")[2], sum(map(len, filter(None, params)))) for (name, _), params in steps)
        return pipe(self, steps)

    monkeypatch.setattr(writes, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(Session, "pipe", counting)
    return found


@pytest.mark.parametrize("kept", [0, 100])
@pytest.mark.parametrize("batched", [False, True])
def test_a_group_too_large_for_a_statement(url: str, sent: Sizes, kept: int, *, batched: bool) -> None:
    """It is sent in several, of one transaction; what it changes otherwise, and asks, comes in parts as well."""
    store = PostgresRoot(parsed(url)).open("j", StoreOptions(feed_changes_max=kept))
    sent.clear()
    items = group(*[put(b"c", b"%03d" % at, b"%d" % at * 1500) for at in range(10)])
    store.apply(group(Batch(items, 10, False)) if batched else items, NOW_MS)
    names = [name for name, _ in sent]
    assert names.count(b"upsert") == 5
    assert names.count(b"add_changes") == (5 if kept else 0)
    assert (names.count(b"begin"), names.count(b"commit")) == (1, 1)
    assert max(nbytes for _, nbytes in sent) < 4500
    assert store.last_version == 10
    assert [payload for _, payload in store.scan(ScanRange(b"c", b"", None), NOW_MS)] == items[2::3]
    sent.clear()
    keys = [b"%03d" % at + b"k" * 997 for at in range(9)]  # three to a statement
    store.apply(group(*[put(b"c", key, b"") for key in keys]), NOW_MS)
    store.apply(group(*[TouchRow(b"c", key, NOW_MS + 5) for key in keys]), NOW_MS)
    store.apply(group(*[DropRow(b"c", key) for key in keys]), NOW_MS)
    names = [name for name, _ in sent]
    assert [names.count(name) for name in (b"upsert", b"touch", b"delete", b"heads")] == [3, 3, 3, 6]
    assert max(nbytes for _, nbytes in sent) < 4500
    assert len(store.scan(ScanRange(b"c", b"", None), NOW_MS)) == 10
    store.close()


def test_a_group_that_fits_is_one_statement(url: str, sent: Sizes) -> None:
    """Puts that are small enough aren't sent as a transaction, however many they are."""
    store = PostgresRoot(parsed(url)).open("j", StoreOptions())
    sent.clear()
    store.apply(group(*[put(b"c", b"%03d" % at, b"x" * 700) for at in range(5)]), NOW_MS)
    assert {name for name, _ in sent} - {b"syncs_not"} == {b"put"}
    store.close()


@pytest.mark.parametrize("shape", ["put", "row", "batch", "swap"])
def test_a_row_too_large_for_a_message_fails_alone(
    url: str, monkeypatch: pytest.MonkeyPatch, sent: Sizes, shape: str
) -> None:
    """It is refused before it is sent; its neighbours are stored, and the job goes on."""
    monkeypatch.setattr(session_module, "MESSAGE_BYTES_MAX", 5000)
    store = PostgresRoot(parsed(url)).open("j", StoreOptions())
    large = b"x" * 5000
    shapes = {
        "put": put(b"c", b"k", large),
        "row": SetRow(b"c", b"k", large, NOW_MS + 5),
        "batch": batch(put(b"c", b"in", b""), put(b"c", b"k", large)),
        "swap": SwapRow(b"c", b"k", None, large, None),
    }
    outcomes = store.apply(group(put(b"c", b"a", b"1"), shapes[shape], put(b"c", b"b", b"2")), NOW_MS)
    assert [outcomes[0], outcomes[2]] == [None, None]
    assert isinstance(outcomes[1], Failed)
    assert isinstance(outcomes[1].error, StorageError)
    assert "5000 bytes" in str(outcomes[1].error)
    assert max(nbytes for _, nbytes in sent) < 4500
    assert [row.key for row in store.read(ListEntries(b"c"), NOW_MS)] == [b"a", b"b"]
    assert store.last_version == 2
    store.close()


def test_libpq_is_handed_no_more_than_it_gets_rid_of(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the statements of a large pipeline it is waited for what was handed over to be on its way."""
    session = Session(parsed(url))
    monkeypatch.setattr(session_module, "UNSENT_BYTES", 1000)
    flushes: list[int] = []
    flush, every = Session._flush, Session._all

    def counting(self: Session) -> None:
        flushes.append(1)
        flush(self)

    monkeypatch.setattr(Session, "_flush", counting)
    monkeypatch.setattr(Session, "_all", lambda self, count, syncs: (flushes.append(0), every(self, count, syncs))[1])
    length = Statement(b"length", b"SELECT length($1::bytea)::bigint")
    results = session.pipe([(length, (bytes(size),)) for size in (400, 400, 400, 2000, 10)])
    assert [number(result.get_value(0, 0) or b"") for result in results] == [400, 400, 400, 2000, 10]
    assert flushes[:4] == [1, 1, 1, 0]
    session.close()


def test_keys_are_in_the_order_of_bytes(url: str) -> None:
    """Whatever collation the database has: keys, and ids, are ordered as bytes are."""
    keys = sorted([b"a", b"B", b"\xc3\xa4", b"a b", b"a-b", b"_", b"\0", b"\xff", b"ab"])
    store = PostgresRoot(parsed(url)).open("j", StoreOptions())
    store.apply(group(*[put(b"c", key, b"") for key in reversed(keys)]), NOW_MS)
    assert [key for key, _ in store.scan(ScanRange(b"c", b"", None), NOW_MS)] == keys
    store.close()
    with Persistency(url) as persistency:
        for job_id in ("b", "B", "a-b", "ab", "_", "Ä"):
            persistency.open_job(job_id).close()
        ids = [stored.job_id for stored in persistency.stored_jobs()]
        assert ids == sorted(ids)
