"""Readers: a job as another process sees it, live, killed, reopened or dropped; and that nobody ever waits for one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from persistency import (
    Closed,
    Corrupt,
    FeedTruncated,
    Job,
    JobNotFound,
    KeyRange,
    Misuse,
    Persistency,
    Put,
    Reader,
    Unavailable,
    key,
)
from persistency.storage import schema, sqlite, wal
from persistency.storage.port import GetRow
from persistency.storage.reading import SqliteReader
from tests.conftest import Wall
from tests.loops import InLoop, Task, together
from tests.storage.conftest import child_environment
from tests.storage.test_reading import Child

ACCOUNTS = 10


@pytest.fixture
def child() -> Iterator[Child]:
    """Another process."""
    made = Child()
    yield made
    made.kill()


@pytest.fixture
def p(tmp_path: Path, wall: Wall) -> Iterator[Persistency]:
    """A root in a directory that doesn't exist yet."""
    with Persistency(tmp_path / "root", clock=wall) as opened:
        yield opened


def rows(job: Job | Reader, category: str = "c") -> list[bytes]:
    """Return the payloads of a category."""
    return [row.payload for row in job.scan(category).result()]


# -- another process' job ----------------------------------------------------------------------------------------


def test_commits_of_another_process_are_seen_at_once(p: Persistency, child: Child) -> None:
    """What another process has been told is committed, the next read of a reader sees, whatever it is."""
    child.ask(f"p = Persistency({p.root!r}); job = p.open_job('alpha')")
    child.ask("job.put('c', key(0), b'first'); job.flush().result()")
    with p.open_reader("alpha") as reader:
        assert (reader.id, reader.path) == ("alpha", Path(p.root) / "alpha.db")
        for at in range(200):
            child.ask(f"job.put('c', key({at}), b'{at}'); job.flush().result()")
            assert reader.get("c", key(at)).result() == b"%d" % at
            assert reader.version().result() == at + 2
        child.ask("job.delete_range_acked('c', KeyRange(key(0), key(150))).result()")
        assert reader.count("c").result() == 50
        assert not reader.exists("c", key(3)).result()
    child.ask("p.close()")


def test_a_reader_in_another_process_sees_this_ones_commits(p: Persistency, child: Child) -> None:
    """The owner is here and the reader elsewhere: it is the same."""
    job = p.open_job("alpha")
    job.commit(Put("c", key(0), b"")).result()
    child.ask(f"p = Persistency({p.root!r}); reader = p.open_reader('alpha')")
    for at in range(200):
        version = job.commit([Put("c", key(at), b"%d" % at), Put("d", key(at), b"")]).result()
        assert child.ask(f"reader.version().result(), reader.get('c', key({at})).result()") == (version, b"%d" % at)
    child.ask("p.close()")


def test_a_reader_of_this_process_own_job(p: Persistency) -> None:
    """The same process may read its own job through a reader: it sees what is committed, not what is only posted."""
    job = p.open_job("alpha")
    job.put("c", key(1), b"1")
    job.flush().result()
    with p.open_reader("alpha") as reader:
        entered, leave = threading.Event(), threading.Event()
        running = threading.Thread(target=lambda: job.run(lambda _tx: (entered.set(), leave.wait(30))).result())
        running.start()
        assert entered.wait(30)
        job.put("c", key(1), b"2")
        assert reader.get("c", key(1)).result() == b"1"
        leave.set()
        running.join()
        job.flush().result()
        assert reader.get("c", key(1)).result() == b"2"
    assert job.get("c", key(1)).result() == b"2"


WRITER = """
def write():
    written = 0
    while not stop.is_set():
        written += 1
        ops = [Put(f'c{at % 3}', key(at), b'%d' % written) for at in range(ACCOUNTS)]
        for part in (ops,) if whole else (ops[:5], ops[5:]):
            job.persist(part)
        if not whole or written % 5 == 0:
            job.flush().result()
    return written
"""


def torn(reader: Reader) -> str | None:
    """Return what is seen of a batch that wasn't seen whole, with one read and over all categories."""
    seen = {category: {row.payload for row in reader.scan(category).result()} for category in ("c0", "c1", "c2")}
    return next((f"{category}: {payloads}" for category, payloads in seen.items() if len(payloads) != 1), None)


def test_batches_are_seen_whole(p: Persistency, child: Child) -> None:
    """2,000 scans beside a writer that changes all rows in every batch find all of them changed, or none."""
    child.ask(f"p = Persistency({p.root!r}); job = p.open_job('alpha'); ACCOUNTS = {ACCOUNTS}; whole = True")
    child.ask("stop = threading.Event(); job.persist([Put(f'c{at % 3}', key(at), b'0') for at in range(ACCOUNTS)])")
    child.ask("job.flush().result()")
    child.ask(WRITER)
    child.ask("written = []; thread = threading.Thread(target=lambda: written.append(write())); thread.start()")
    with p.open_reader("alpha") as reader:
        generations = set()
        for _ in range(700):
            assert torn(reader) is None
            generations.add(rows(reader, "c0")[0])
        everything = reader.get_many("c0", [key(at) for at in range(0, ACCOUNTS, 3)])
        assert len(set(everything.result().values())) == 1
    child.ask("stop.set(); thread.join()")
    assert child.ask("written[0]") >= len(generations) > 20
    child.ask("p.close()")


def test_a_batch_that_is_split_would_be_seen(p: Persistency, child: Child) -> None:
    """A writer that commits its batches in two halves is found out by the same look: the check above can fail."""
    child.ask(f"p = Persistency({p.root!r}); job = p.open_job('alpha'); ACCOUNTS = {ACCOUNTS}; whole = False")
    child.ask("job.persist([Put(f'c{at % 3}', key(at), b'0') for at in range(ACCOUNTS)]); job.flush().result()")
    with p.open_reader("alpha") as reader:
        assert torn(reader) is None
        child.ask("job.persist([Put(f'c{at % 3}', key(at), b'1') for at in range(5)]); job.flush().result()")
        assert torn(reader) is not None
    child.ask("p.close()")


# -- every verb --------------------------------------------------------------------------------------------------

QUESTIONS: dict[str, Callable[[Job | Reader], Any]] = {
    "get": lambda job: [job.get("c", at).result() for at in (key(), key(1), key(1, "a"), key("none"), ("t", 1))],
    "entry": lambda job: [job.entry("c", at).result() for at in (key(), key(1), key("none"), key("ends"))],
    "get_many": lambda job: list(job.get_many("c", [key(9), key("none"), key(1), key("ends")]).result().items()),
    "exists": lambda job: [job.exists("c", at).result() for at in (key(), key("none"), key("ends"), key("big"))],
    "count": lambda job: [job.count("c").result(), job.count("c", KeyRange(key(2), key(7))).result()],
    "scan": lambda job: job.scan("c").result(),
    "scan reversed": lambda job: job.scan("c", KeyRange(key(2), key(7)), reverse=True, limit=3).result(),
    "keys": lambda job: job.keys("c", KeyRange(key(2)), limit=100).result(),
    "scan_prefix": lambda job: job.scan_prefix("c", key(1)).result() + job.scan_prefix("c", key(1), limit=1).result(),
    "iterate": lambda job: list(job.iterate("c", page=3)),
    "iterate keys": lambda job: list(job.iterate("c", prefix=key(1), page=2, keys_only=True, reverse=True)),
    "snapshot": lambda job: job.snapshot("c").result(),
    "categories": lambda job: job.categories().result(),
    "version": lambda job: job.version().result(),
    "changes": lambda job: job.changes(15, 500).result(),
    "storage_used": lambda job: job.storage_used().result(),
    "check": lambda job: job.check().result(),
}


@pytest.mark.parametrize("max_bytes", [None, 10_000_000])
def test_every_verb_gives_the_owners_answer(p: Persistency, wall: Wall, max_bytes: int | None) -> None:
    """Every read verb of a reader gives what the job's own handle gives: nested keys, large and ended rows, changes."""
    job = p.open_job("alpha", max_bytes=max_bytes, feed_changes_max=1_000)
    for at in range(12):
        job.put("c", key(at), bytes([at]) * at)
        job.put("c", key(at, "a", None), b"child")
    job.persist([Put("c", key(), b""), Put("c", ("t", 1), b"t"), Put("été", key(1), b"\xff")])
    job.put("c", key("big"), random.Random(1).randbytes(1_000_000))
    job.put("c", key("ends"), b"soon", ttl=5)
    job.put("e", key("ends"), b"all of its category", ttl=timedelta(seconds=7))
    job.delete("c", key(3))
    job.delete_prefix("c", key(4))
    job.increment("c", key("n"), 7).result()
    with p.open_reader("alpha") as reader:
        assert {name for name in dir(Reader) if not name.startswith("_")} - {"path", "id"} == {
            *(name.split()[0] for name in QUESTIONS), "backup", "close", "aclose", "closed", "now_ms",
        }  # fmt: skip
        for seconds in (0, 5, 2):
            wall.now += seconds
            for name, ask in QUESTIONS.items():
                assert ask(reader) == ask(job), (seconds, name)
        assert reader.now_ms == wall.ms
        assert reader.categories().result() == ["c", "été"]


def test_a_reader_has_no_verb_that_writes() -> None:
    """What a job has beyond reading a reader hasn't got at all."""
    writing = {
        "put",
        "delete",
        "persist",
        "commit",
        "run",
        "increment",
        "touch",
        "flush",
        "compact",
        "import_",
    }
    assert writing <= set(dir(Job))
    assert not writing & set(dir(Reader))


def test_time_ends_rows_for_readers_too(p: Persistency, wall: Wall) -> None:
    """A row is gone for a reader at the millisecond its TTL is over, though its owner has yet to reclaim it."""
    job = p.open_job("alpha")
    job.put("c", key(1), b"1", ttl=1.5)
    job.flush().result()
    with p.open_reader("alpha") as reader:
        wall.ms += 1_499
        assert reader.get("c", key(1)).result() == b"1"
        wall.ms += 1
        assert reader.get("c", key(1)).result() is None
        assert reader.scan("c").result() == []
        wall.ms -= 1_000  # a job's time never goes back, and a reader's neither
        assert reader.get("c", key(1)).result() is None


def test_changes_can_be_followed_by_asking_again(p: Persistency) -> None:
    """A reader lists the changes that a job keeps; it can't wait for one, and where none are kept it says so."""
    job = p.open_job("alpha", feed_changes_max=10)
    with p.open_reader("alpha") as reader:
        seen: list[bytes | None] = []
        after = 0
        for at in range(30):
            job.put("c", key(at), b"%d" % at)
            job.flush().result()
            for change in reader.changes(after, 100).result():
                seen.append(change.payload)
                after = change.version
        assert seen == [b"%d" % at for at in range(30)]
        assert reader.changes(after, 1).result() == []
        with pytest.raises(FeedTruncated):
            reader.changes(0, 100).result()
        with pytest.raises(Misuse, match="can't wait for changes"):
            reader.changes(after, 1, wait=True)
        with pytest.raises(Misuse, match="limit"):
            reader.changes(after, 0)
    other = p.open_job("beta")
    other.commit(Put("c", key(1), b"")).result()
    with p.open_reader("beta") as reader, pytest.raises(Misuse, match="keeps no changes"):
        reader.changes(0, 100).result()


# -- what the owner does meanwhile -------------------------------------------------------------------------------


def test_a_reader_stays_while_owners_come_and_go(p: Persistency, child: Child) -> None:
    """Closing, reopening, being killed, recovered: a reader that is open all the while sees all that was committed."""
    child.ask(
        f"p = Persistency({p.root!r}); job = p.open_job('alpha'); job.put('c', key(0), b'0'); job.flush().result()"
    )
    with p.open_reader("alpha") as reader:
        assert rows(reader) == [b"0"]
        child.ask("job.put('c', key(1), b'1'); p.close()")
        assert rows(reader) == [b"0", b"1"]
        child.ask(f"p = Persistency({p.root!r}); job = p.open_job('alpha')")
        assert rows(reader) == [b"0", b"1"]
        child.ask("job.put('c', key(2), b'2'); job.flush().result()")
        child.kill()
        assert rows(reader) == [b"0", b"1", b"2"]
        job = p.open_job("alpha")
        assert rows(job) == rows(reader) == [b"0", b"1", b"2"]
        job.put("c", key(3), b"3")
        job.close()
        assert rows(reader) == [b"0", b"1", b"2", b"3"]
        assert p.drop_job("alpha") != []
        with pytest.raises(Unavailable, match="so the job was dropped"):
            reader.get("c", key(0)).result()
        job = p.open_job("alpha")
        job.commit(Put("c", key(0), b"another")).result()
        with pytest.raises(Unavailable, match="so the job was dropped"):
            reader.scan("c").result()
    with p.open_reader("alpha") as reader:
        assert rows(reader) == [b"another"]
        assert job.check().result() == []


COUNTING = """
at = 0
while True:
    at += 1
    job.put('c', key(0), b'%d' % (start + at))
    job.put('d', key(at), b'x' * 300)
    if at == 40:
        job.flush().result()
        print('"40 are committed"', flush=True)
"""


@pytest.mark.parametrize("stays", [True, False])
def test_readers_beside_owners_that_are_killed(p: Persistency, stays: bool) -> None:
    """Over and over an owner is killed in the middle of its work, and another recovers the file, beside a reader.

    The reader, one that stays open or one that is opened between the kill and the recovery, never sees less than was
    acknowledged, never goes back, and its next read never fails.
    """
    seen, failures, stop = [0], [], threading.Event()
    reader: Reader | None = None

    def read_on() -> None:
        while not stop.is_set():
            try:
                assert reader is not None
                found = int(reader.get("c", key(0)).result() or 0)
                if found < seen[-1]:
                    failures.append(AssertionError(f"{found} after {seen[-1]}"))
                seen.append(found)
            except Exception as error:
                failures.append(error)

    p.open_job("alpha").close()
    for _ in range(6):
        child = Child()
        child.ask(f"p = Persistency({p.root!r}); job = p.open_job('alpha')")  # recovers what the last one has left
        child.ask("start = int(job.get('c', key(0)).result() or 0)")
        start = child.ask("start")
        assert start >= seen[-1]
        reader = reader or p.open_reader("alpha")
        stop.clear()
        thread = threading.Thread(target=read_on)
        thread.start()
        child.tell(COUNTING)
        assert child.answer() == "40 are committed"
        child.kill()
        assert int(reader.get("c", key(0)).result() or 0) >= start + 40
        stop.set()
        thread.join()
        assert failures == []
        if not stays:
            reader.close()
            reader = p.open_reader("alpha")  # it is the first to look into what was left, and recovers it
            assert int(reader.get("c", key(0)).result() or 0) >= seen[-1]
    assert len(seen) > 100
    job = p.open_job("alpha")
    assert job.check().result() == []
    assert reader is not None
    assert rows(job, "d") == rows(reader, "d")
    assert rows(job) == rows(reader)
    reader.close()


LOOKING = """
def look():
    looks = 0
    while not stop.is_set():
        looks += bool(reader.scan('c').result() and reader.get('c', key(1)).result())
    return looks
"""


def times_begun_anew(job: Job, *, enough: int, commits_max: int) -> int:
    """Write until a job's log was begun anew often enough, or so many commits; return how often it was."""
    chance = random.Random(1)
    times = longest = 0
    for _ in range(commits_max):
        for at in chance.sample(range(500), 40):
            job.put("c", key(at), chance.randbytes(100))
        job.flush().result()
        pages = job.statistics().wal_bytes // 4096
        if 0 < pages < longest:
            times, longest = times + 1, 0
        longest = max(longest, pages)
        if times == enough:
            break
    return times


def test_the_log_stays_bounded_beside_a_reader(p: Persistency, child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a reader that reads all the time the owner's log is carried over and begun anew, and cut off at the end.

    Beside somebody who holds a snapshot it isn't: the check can fail. The owner goes on either way.
    """
    monkeypatch.setattr(sqlite, "CHECKPOINT_IDLE_PAGES", 100)
    monkeypatch.setattr(sqlite, "CHECKPOINT_FORCED_PAGES", 300)
    job = p.open_job("alpha")
    log = Path(p.root) / "alpha.db-wal"
    for at in range(500):
        job.put("c", key(at), bytes(100))
    job.flush().result()
    child.ask(f"stop = threading.Event(); p = Persistency({p.root!r}); reader = p.open_reader('alpha')")
    child.ask(LOOKING)
    child.ask("looks = []; thread = threading.Thread(target=lambda: looks.append(look())); thread.start()")
    assert times_begun_anew(job, enough=10, commits_max=20_000) == 10
    child.ask("stop.set(); thread.join()")
    assert child.ask("looks[0]") > 20
    job.close()
    assert log.stat().st_size == 0  # it is still there, because somebody has the file open
    job = p.open_job("alpha")
    child.ask("import apsw")
    child.ask(f"other = apsw.Connection({str(job.path)!r}); other.execute('BEGIN; SELECT * FROM kv').fetchall()")
    assert times_begun_anew(job, enough=1, commits_max=1_000) == 0
    assert job.statistics().wal_bytes > 4_000 * 4096
    job.close()
    assert log.stat().st_size > 0
    assert child.ask("len(reader.scan('c').result())") == 500
    child.ask("other.close(); p.close()")
    p.open_job("alpha").close()
    assert not log.exists()


def test_an_owner_never_waits_for_a_reader(p: Persistency, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a reader's read the owner commits, checkpoints and closes, and waits for nothing."""
    for module in (schema, wal):
        monkeypatch.setattr(module, "BUSY_MS", 1_000_000)  # to wait for a lock is to hang, here
    job = p.open_job("alpha")
    job.commit(Put("c", key(1), b"1")).result()
    within, go_on = threading.Event(), threading.Event()
    question = GetRow(b"c", key(1))
    with p.open_reader("alpha") as reader:
        store = reader._worker.store
        assert isinstance(store, SqliteReader)

        def dwell(snapshots: Any) -> Any:
            before = snapshots.answer(question)
            within.set()
            assert go_on.wait(60)
            return before, snapshots.answer(question)

        answers: list[Any] = []
        thread = threading.Thread(target=lambda: answers.append(store._ask(dwell, 1)))
        thread.start()
        assert within.wait(60)
        for at in range(2, 50):
            job.commit(Put("c", key(1), b"%d" % at)).result()
        job.flush(sync=True).result()
        job.compact().result()
        job.close()
        job = p.open_job("alpha")
        assert job.get("c", key(1)).result() == b"49"
        go_on.set()
        thread.join()
        assert answers == [(b"1", b"1")]
        assert reader.get("c", key(1)).result() == b"49"


def test_readers_at_every_moment_of_an_owners_life(p: Persistency) -> None:
    """Readers are opened while an owner opens, writes, closes, drops the job: they read something, or say why not."""
    stop = threading.Event()
    seen: dict[str, int] = {}
    wrong: list[BaseException] = []

    def read_on() -> None:
        while not stop.is_set():
            try:
                with p.open_reader("alpha") as reader:
                    found = rows(reader)
                    assert found in ([], [b"1"]), found
                    seen["read"] = seen.get("read", 0) + 1
            except (JobNotFound, Unavailable) as error:
                seen[type(error).__name__] = seen.get(type(error).__name__, 0) + 1
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=read_on) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(60):
        with p.open_job("alpha") as job:
            job.put("c", key(1), b"1")
        with p.open_job("alpha") as job:
            assert rows(job) == [b"1"]
        p.drop_job("alpha")
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert seen["read"] > 5
    assert seen["JobNotFound"] > 0


# -- handles -----------------------------------------------------------------------------------------------------


def test_what_cant_be_opened(p: Persistency, tmp_path: Path) -> None:
    """Bad ids and jobs in memory are `Misuse`; a job that was never made isn't there, and isn't made."""
    with pytest.raises(JobNotFound, match="there is no job 'alpha'") as caught:
        p.open_reader("alpha")
    assert "open_job(job_id)" in caught.value.hint
    assert not (tmp_path / "root").exists()
    for bad in ("", "x" * 300, "\ud800", None, 3):
        with pytest.raises(Misuse, match="job_id"):
            p.open_reader(bad)  # type: ignore[arg-type]  # as somebody may
    with Persistency(":memory:") as memory:
        memory.open_job("alpha")
        with pytest.raises(Misuse, match="jobs in memory have no readers"):
            memory.open_reader("alpha")
    p.open_job("alpha").close()
    (tmp_path / "root" / "beta.db").write_bytes((tmp_path / "root" / "alpha.db").read_bytes())
    with pytest.raises(Corrupt, match="belongs to job 'alpha'"):
        p.open_reader("beta")
    assert list(p) == []
    assert not p.has_job("beta")
    p.close()
    with pytest.raises(Closed):
        p.open_reader("alpha")


def test_an_id_of_any_text_is_read(p: Persistency) -> None:
    """A reader finds a job under the same id as its owner, whatever text it is."""
    for job_id in ("Ärger/..", "con", "%41", "x.y", "a b\n"):
        with p.open_job(job_id) as job:
            job.put("c", key(1), job_id.encode())
        with p.open_reader(job_id) as reader:
            assert rows(reader) == [job_id.encode()]


def test_a_closed_reader_refuses(p: Persistency) -> None:
    """After `close`, which may be called again, every verb raises `Closed` at the call, and the thread is gone."""
    p.open_job("alpha").close()
    before = threading.active_count()
    with p.open_reader("alpha") as reader:
        assert not reader.closed
        assert repr(reader) == "<Reader of 'alpha'>"
        assert threading.active_count() == before + 1
    reader.close()
    assert reader.closed
    assert repr(reader) == "<Reader of 'alpha' (closed)>"
    for ask in (lambda: reader.get("c", key(1)), lambda: reader.scan("c"), lambda: list(reader.iterate("c"))):
        with pytest.raises(Closed, match="the reader of job 'alpha' is closed"):
            ask()
    assert reader._worker.store is None
    for thread in threading.enumerate():
        if thread.name == "persistency:alpha":
            thread.join(30)
    assert threading.active_count() == before


def test_closing_the_root_closes_its_readers(p: Persistency) -> None:
    """`Persistency.close` closes every reader it has opened, and no other's; the job's own handle needs none."""
    other = Persistency(p.root)
    job = other.open_job("alpha")
    readers = [p.open_reader("alpha") for _ in range(3)]
    stays = other.open_reader("alpha")
    readers[0].close()
    p.close()
    assert all(reader.closed for reader in readers)
    with pytest.raises(Closed):
        readers[1].count("c")
    assert stays.count("c").result() == 0
    job.commit(Put("c", key(1), b"")).result()
    assert stays.count("c").result() == 1
    other.close()
    assert stays.closed


def test_what_was_asked_before_the_close_is_answered(p: Persistency, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests that wait when a reader is closed get their answers first; every reply is settled."""
    job = p.open_job("alpha")
    job.commit(Put("c", key(1), b"1")).result()
    within, go_on = threading.Event(), threading.Event()
    read = SqliteReader.read

    def dwell(self: SqliteReader, message: Any, now_ms: int) -> Any:
        within.set()
        assert go_on.wait(60)
        return read(self, message, now_ms)

    reader = p.open_reader("alpha")
    with monkeypatch.context() as patched:
        patched.setattr(SqliteReader, "read", dwell)
        thread = threading.Thread(target=lambda: reader.scan("c").result())
        thread.start()
        assert within.wait(60)
        waiting = [reader.get("c", key(1)) for _ in range(50)]
        cancelled = reader.get("c", key(1))
        assert cancelled.cancel()
        closer = threading.Thread(target=reader.close)
        closer.start()
        assert not any(reply.done() for reply in waiting)
        go_on.set()
    closer.join()
    thread.join()
    assert [reply.result(0) for reply in waiting] == [b"1"] * 50
    assert cancelled.cancelled()


def test_a_dropped_reader_leaves_with_a_warning(p: Persistency) -> None:
    """A reader nobody holds any more warns, answers what it was asked, and gives file and thread up."""
    p.open_job("alpha").close()
    reader = p.open_reader("alpha")
    closed = reader._worker.closed
    holding = [reader]
    del reader
    with pytest.warns(ResourceWarning, match="unclosed <Reader of 'alpha'>"):
        holding.clear()
    closed.result(60)
    with p.open_reader("alpha") as reader, warnings.catch_warnings():
        warnings.simplefilter("error")
        closed = reader._worker.closed
    del reader
    assert closed.done()


def test_an_opening_that_fails_leaves_nothing(p: Persistency, tmp_path: Path) -> None:
    """A failed opening leaves no thread, can be tried again, and raises the real cause each time."""
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "alpha.db").write_bytes(b"not a database" * 500)
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(Corrupt, match="not a database"):
            p.open_reader("alpha")
    for thread in threading.enumerate():
        if thread.name == "persistency:alpha":
            thread.join(30)
    assert threading.active_count() == before
    (tmp_path / "root" / "alpha.db").unlink()
    p.open_job("alpha").close()
    p.open_reader("alpha").close()


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """Openings that wait: the first event says that one has begun, the second lets them go on."""
    begun, go_on = threading.Event(), threading.Event()
    connect = SqliteReader._connect

    def wait_and_connect(self: SqliteReader, now_ms: int) -> None:
        begun.set()
        assert go_on.wait(60)
        connect(self, now_ms)

    monkeypatch.setattr(SqliteReader, "_connect", wait_and_connect)
    yield begun, go_on
    go_on.set()


def test_an_opening_that_takes_too_long(p: Persistency, held: tuple[threading.Event, threading.Event]) -> None:
    """After `open_timeout` the caller is told, and what opens all the same, later, is closed again."""
    p.open_job("alpha").close()
    begun, go_on = held
    before = set(threading.enumerate())
    with Persistency(p.root, open_timeout=0.01) as hasty:
        with pytest.raises(TimeoutError):
            hasty.open_reader("alpha")
        assert begun.wait(60)
        left = set(threading.enumerate()) - before
        assert len(left) == 1
        go_on.set()
        for thread in left:
            thread.join(60)
            assert not thread.is_alive()
    with p.open_reader("alpha") as reader:
        assert rows(reader) == []


def test_a_root_that_is_closed_while_a_reader_opens(
    p: Persistency, held: tuple[threading.Event, threading.Event]
) -> None:
    """Who opens a reader of a root that is closed meanwhile is told so, and no reader stays behind."""
    p.open_job("alpha").close()
    begun, go_on = held
    before = set(threading.enumerate())
    raised: list[BaseException] = []

    def open_one() -> None:
        try:
            p.open_reader("alpha")
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=open_one)
    thread.start()
    assert begun.wait(60)
    p.close()
    go_on.set()
    thread.join()
    assert [type(error) for error in raised] == [Closed]
    for left in set(threading.enumerate()) - before:
        left.join(60)
    assert set(threading.enumerate()) <= before


# -- event loops -----------------------------------------------------------------------------------------------------


def test_in_event_loops(p: Persistency, in_loop: InLoop) -> None:
    """Readers are opened, asked, walked over and closed without blocking the loop; no read runs in its thread."""
    job = p.open_job("alpha")
    for at in range(100):
        job.put("c", key(at), b"%d" % at)
    job.flush().result()
    threads: set[int] = set()
    ask = SqliteReader._ask

    def note(self: SqliteReader, *args: Any) -> Any:
        threads.add(threading.get_ident())
        return ask(self, *args)

    async def main() -> None:
        async with await p.aopen_reader("alpha") as reader:
            assert await reader.get("c", key(7)) == b"7"
            assert len(await together(*(reader.get("c", key(at)) for at in range(100)))) == 100
            assert await reader.count("c") == 100
            assert [row.key async for row in reader.iterate("c", page=9)] == [key(at) for at in range(100)]
            for at in range(50):
                await job.commit(Put("c", key(0), b"%d" % at))
                assert await reader.get("c", key(0)) == b"%d" % at
            async with anyio.create_task_group() as group:
                slow = Task(group, reader.scan("c").within(30))
                slow.cancel()
            assert slow.cancelled
            assert await reader.exists("c", key(1))
        with pytest.raises(Closed):
            reader.get("c", key(1))
        with pytest.raises(JobNotFound):
            await p.aopen_reader("beta")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SqliteReader, "_ask", note)
        in_loop(main)
    assert threads
    assert threading.get_ident() not in threads


def test_many_threads_share_a_reader(p: Persistency) -> None:
    """Eight threads that ask one reader at once get the right answers."""
    job = p.open_job("alpha")
    for at in range(200):
        job.put("c", key(at), b"%d" % at)
    job.flush().result()
    wrong: list[Any] = []

    def ask(seed: int, reader: Reader) -> None:
        chance = random.Random(seed)
        for _ in range(150):
            at = chance.randrange(200)
            if reader.get("c", key(at)).result() != b"%d" % at or reader.count("c").result() != 200:
                wrong.append(at)

    with p.open_reader("alpha") as reader:
        threads = [threading.Thread(target=ask, args=(seed, reader)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# -- the end of a process ----------------------------------------------------------------------------------------

# -- as a whole --------------------------------------------------------------------------------------------------


def test_a_reader_backs_up_and_checks_a_job_beside_its_owner(p: Persistency, child: Child, tmp_path: Path) -> None:
    """A copy that is made while another process writes is of one moment, sound, and whole; the writer goes on."""
    child.ask(f"p = Persistency({p.root!r}); job = p.open_job('alpha'); ACCOUNTS = {ACCOUNTS}; whole = True")
    child.ask("stop = threading.Event(); job.persist([Put(f'c{at % 3}', key(at), b'0') for at in range(ACCOUNTS)])")
    child.ask("job.flush().result()")
    child.ask(WRITER)
    child.ask("written = []; thread = threading.Thread(target=lambda: written.append(write())); thread.start()")
    told: list[tuple[int, int | None]] = []
    with p.open_reader("alpha") as reader:
        for number in range(5):
            reader.backup(tmp_path / f"{number}.backup", lambda *step: told.append(step)).result()
            assert reader.check().result() == []
    child.ask("stop.set(); thread.join()")
    assert child.ask("written[0] > 0 and job.flush().result() is None")
    child.ask("p.close()")
    versions = []
    for number in range(5):
        p.restore(f"copy{number}", tmp_path / f"{number}.backup")
        with p.open_reader(f"copy{number}") as copy:
            assert torn(copy) is None
            assert copy.check().result() == []
            versions.append(copy.version().result())
    assert versions == sorted(versions)
    assert versions[-1] > versions[0] > 0
    assert told[-1][0] == told[-1][1]


def test_a_reader_finds_damage(p: Persistency, child: Child) -> None:
    """What is wrong with a job that another process has open is told, and harms nobody."""
    child.ask(f"p = Persistency({p.root!r}); job = p.open_job('alpha')")
    child.ask("job.put('c', RawKey(b'\\xff'), b''); job.flush().result()")
    with p.open_reader("alpha") as reader:
        [problem] = reader.check().result()
        assert "1 keys are no encoded tuples" in problem
        for path in (p.root + "/alpha.db", p.root + "/beta.db"):
            with pytest.raises(Misuse):
                reader.backup(path).result()
    with pytest.raises(Closed):
        reader.backup("x")
    with pytest.raises(Closed):
        reader.check()
    child.ask("job.put('c', key(1), b'1'); p.close()")


LATE = """
import atexit, sys
def late():
    print(reader.get("c", key(1)).result(), flush=True)
    fresh = Persistency(sys.argv[1]).open_reader("alpha")
    print(fresh.get("c", key(1)).result(), flush=True)
    fresh.close()
atexit.register(late)
from persistency import Persistency, key
reader = Persistency(sys.argv[1]).open_reader("alpha")
print(reader.get("c", key(1)).result(), flush=True)
"""


def test_a_process_ends_with_readers_open(p: Persistency) -> None:
    """A reader that is left open hangs no exit, and is there for what other exit hooks ask it, as are new ones."""
    job = p.open_job("alpha")
    job.commit(Put("c", key(1), b"1")).result()
    done = subprocess.run(
        [sys.executable, "-c", LATE, p.root],
        env=child_environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "b'1'\n" * 3, "")
    assert job.get("c", key(1)).result() == b"1"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_no_part_in_a_reader(p: Persistency) -> None:
    """In a forked child an inherited reader raises `Forked`, a new one works, and the parent's reads on as before."""
    program = """
import os, sys, warnings
from persistency import Persistency, Forked, key
p = Persistency(sys.argv[1])
reader = p.open_reader("alpha")
assert reader.get("c", key(1)).result() == b"1"
if (pid := os.fork()) == 0:
    for ask in (lambda: reader.get("c", key(1)).result(), lambda: reader.scan("c").result(), reader.close):
        try:
            ask()
        except Forked:
            print("forked", flush=True)
    with Persistency(sys.argv[1]) as mine, mine.open_reader("alpha") as other:
        print(other.get("c", key(1)).result(), flush=True)
    del ask, reader
    sys.exit(0)
assert os.waitpid(pid, 0)[1] == 0
print(reader.get("c", key(1)).result(), flush=True)
p.close()
"""
    job = p.open_job("alpha")
    job.commit(Put("c", key(1), b"1")).result()
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program, p.root],
        env=child_environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "forked\n" * 3 + "b'1'\n" * 2, "")
    job.commit(Put("c", key(1), b"2")).result()
    with p.open_reader("alpha") as reader:
        assert reader.get("c", key(1)).result() == b"2"
