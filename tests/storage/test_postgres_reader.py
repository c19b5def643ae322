"""Readers over PostgreSQL: a job as another process sees it, and feeds that follow what another process writes."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persistency import ChangeFeed, Persistency
from persistency.errors import Closed, FeedTruncated, JobNotFound, Misuse, Unavailable
from persistency.storage.port import GetRow, LastVersion, ListChanges, ScanRange, StoreOptions
from persistency.storage.postgres import bell as bell_module
from persistency.storage.postgres.address import parsed
from persistency.storage.postgres.bell import Bell
from persistency.storage.postgres.reading import PostgresReader
from persistency.storage.postgres.reads import Reads
from persistency.storage.postgres.root import PostgresRoot
from persistency.testing import group, put
from tests.postgres import fresh_url, sql, until, with_parameters

WAIT = 60
NOW_MS = 1_000_000
HOUSE = Path(__file__).parent.parent.parent
OWNER = """
import sys
from persistency import Persistency
with Persistency(sys.argv[1]) as p, p.open_job("j", feed_changes_max=100) as job:
    print("open", flush=True)
    for line in sys.stdin:
        word, number = line.split()
        if word == "put":
            job.put("c", (int(number),), number.encode())
        elif word == "prefix":
            job.delete_prefix("c", (int(number),))
        elif word == "drop":
            break
        job.flush().result(30)
        print("done", flush=True)
"""


class Owner:
    """A process that owns a job, and does what it is told."""

    def __init__(self, url: str) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", OWNER, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=HOUSE
        )
        assert self._line() == "open"

    def _line(self) -> str:
        assert self._child.stdout is not None
        return self._child.stdout.readline().strip()

    def do(self, word: str, number: int = 0) -> None:
        """Have it do something, committed."""
        self.begin(word, number)
        assert self._line() == "done"

    def begin(self, word: str, number: int = 0) -> None:
        """Have it do something."""
        assert self._child.stdin is not None
        self._child.stdin.write(f"{word} {number}\n")
        self._child.stdin.flush()

    def end(self) -> None:
        """Have it close the job and end."""
        self._child.communicate(timeout=WAIT)


@pytest.fixture
def url() -> str:
    """A place of its own."""
    return fresh_url(persistency_lease=5)


@pytest.fixture
def owner(url: str) -> Iterator[Owner]:
    """Another process that owns the job."""
    owner = Owner(url)
    yield owner
    owner.end()


@pytest.fixture(params=["bell", "polling"])
def told(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the server can be listened to; where not, its versions are asked for."""
    if request.param == "polling":
        monkeypatch.setattr(bell_module, "POLL_SECONDS", 0.05)
        monkeypatch.setattr(Bell, "_listen", lambda _self, _session: False)
    else:  # nothing but the bell tells
        monkeypatch.setattr(bell_module, "LOOK_SECONDS", 10_000.0)


def test_a_reader_sees_what_was_committed(url: str, owner: Owner) -> None:
    """Beside a process that owns a job every verb that reads answers as of the last commit, and nobody waits."""
    with Persistency(url) as persistency:
        reader = persistency.open_reader("j")
        assert reader.version().result(WAIT) == 0
        for number in range(3):
            owner.do("put", number)
            assert reader.get("c", (number,)).result(WAIT) == b"%d" % number
            assert [row.payload for row in reader.scan("c").result(WAIT)] == [b"%d" % at for at in range(number + 1)]
            assert reader.version().result(WAIT) == number + 1
            assert reader.count("c").result(WAIT) == number + 1
        assert [change.version for change in reader.changes(1, 10).result(WAIT)] == [2, 3]
        assert reader.categories().result(WAIT) == ["c"]
        assert [entry.version for entry in reader.snapshot("c").result(WAIT)] == [1, 2, 3]
        assert list(reader.get_many("c", [(0,), (7,)]).result(WAIT).values()) == [b"0"]
        assert list(reader.iterate("c", keys_only=True))
        assert reader.path is None
        reader.close()


def test_a_group_is_answered_from_one_snapshot(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is committed between its messages is in none of their answers, and in all of the next group's."""
    store = PostgresRoot(parsed(url)).open("j", StoreOptions(feed_changes_max=5))
    store.apply(group(put(b"c", b"k", b"1")), NOW_MS)
    reader = PostgresRoot(parsed(with_parameters(url, application_name="other"))).look_into("j", NOW_MS)
    answer, commits = PostgresReader._answer, iter([b"2", b"3"])

    def beside(self: PostgresReader, reads: Reads, message: Any) -> Any:
        found = answer(self, reads, message)
        for payload in commits:
            store.apply(group(put(b"c", b"k", payload), put(b"c", payload, payload)), NOW_MS)
        return found

    monkeypatch.setattr(PostgresReader, "_answer", beside)
    messages = group(
        GetRow(b"c", b"k"), GetRow(b"c", b"k"), ScanRange(b"c", b"", None), LastVersion(), ListChanges(0, 9)
    )
    for payload, version in ((b"1", 1), (b"3", 5)):
        outcomes = reader.apply(messages, NOW_MS)
        assert outcomes[:2] == [payload, payload]
        assert outcomes[2][-1] == (b"k", payload)
        assert outcomes[3] == version == len(outcomes[4])
    reader.close()
    store.close()


def test_there_is_no_reader_of_nothing(url: str) -> None:
    """A job that doesn't exist has no reader, whether there are tables or not, and none is made."""
    with Persistency(url) as persistency:
        with pytest.raises(JobNotFound):
            persistency.open_reader("j")
        persistency.open_job("k").close()
        with pytest.raises(JobNotFound):
            persistency.open_reader("j")
        assert [job.job_id for job in persistency.stored_jobs()] == ["k"]


def test_a_reader_of_a_dropped_job_says_so(url: str) -> None:
    """Once its job is dropped, or made again, a reader reads no more; another one reads what is there now."""
    with Persistency(url) as persistency, Persistency(with_parameters(url, application_name="other")) as other:
        for again in (False, True):
            persistency.open_job("j").close()
            reader = other.open_reader("j")
            assert reader.get("c", ("k",)).result(WAIT) is None
            persistency.drop_job("j")
            if again:
                persistency.open_job("j").close()
            with pytest.raises(Unavailable, match="dropped"):
                reader.get("c", ("k",)).result(WAIT)
            reader.close()
        with other.open_reader("j") as reader:
            assert reader.version().result(WAIT) == 0


def test_a_reader_of_a_job_that_went_back_says_so(url: str) -> None:
    """Of a server that has lost commits which it has read a reader reads no more."""
    store = PostgresRoot(parsed(url)).open("j", StoreOptions())
    store.apply(group(put(b"c", b"k", b"1")), NOW_MS)
    reader = PostgresRoot(parsed(url)).look_into("j", NOW_MS)
    assert reader.get(b"c", b"k", NOW_MS) == b"1"
    sql(url, f"UPDATE {parsed(url).schema}.jobs SET last_version = 0")
    (failed,) = reader.apply(group(GetRow(b"c", b"k")), NOW_MS)
    assert "has lost its last commits" in str(failed.error)
    reader.close()
    store.close()


def test_a_reader_of_a_job_without_changes(url: str) -> None:
    """Of a job that keeps no changes a reader has none, and says what is missing."""
    with Persistency(url) as persistency, persistency.open_job("j") as job:
        job.put("c", ("k",), b"v")
        job.flush().result(WAIT)
        with persistency.open_reader("j") as reader:
            assert reader.get("c", ("k",)).result(WAIT) == b"v"
            with pytest.raises(Misuse, match="keeps no changes"):
                reader.changes(0, 1).result(WAIT)
            with pytest.raises(Misuse, match="keeps no changes"):
                next(ChangeFeed(reader))


@pytest.mark.usefixtures("told")
def test_a_feed_follows_a_job_of_another_process(url: str, owner: Owner) -> None:
    """Every change that another process commits comes, once and in order, to whoever waits for it here."""
    owner.do("put", 1)
    with Persistency(url) as persistency, persistency.open_reader("j") as reader:
        feed, all_of_it = ChangeFeed(reader), ChangeFeed(reader, after=0)
        assert reader.version().result(WAIT) == 1
        for number in range(2, 6):
            owner.begin("put", number)
            change = next(feed)
            assert (change.version, change.kind, change.payload) == (number, "put", b"%d" % number)
            assert owner._line() == "done"
        owner.begin("prefix", 1)
        assert next(feed).kind == "delete_range"
        assert owner._line() == "done"
        assert [next(all_of_it).version for _ in range(6)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.usefixtures("told")
def test_a_feed_under_an_event_loop(url: str, owner: Owner) -> None:
    """The same, awaited, by several at once; what waits at the end is closed with its reader."""

    async def follow() -> list[list[int]]:
        persistency = Persistency(url)
        reader = await persistency.aopen_reader("j")
        feeds = [ChangeFeed(reader, after=0) for _ in range(3)]

        async def five(feed: ChangeFeed) -> list[int]:
            return [(await anext(feed)).version for _ in range(5)]

        tasks = [asyncio.create_task(five(feed)) for feed in feeds]
        for number in range(5):
            await asyncio.to_thread(owner.do, "put", number)
        seen = await asyncio.gather(*tasks)
        late = asyncio.create_task(anext(feeds[0]))  # type: ignore[arg-type]  # a coroutine, in truth
        await reader.version()
        await reader.aclose()
        with pytest.raises(Closed):
            await late
        await persistency.aclose()
        return seen

    assert asyncio.run(follow()) == [[1, 2, 3, 4, 5]] * 3


@pytest.mark.usefixtures("told")
def test_a_feed_that_waits_learns_of_the_end(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a change of a job that is dropped is told so, instead of waiting for ever."""
    monkeypatch.setattr(bell_module, "LOOK_SECONDS", 0.1)
    with Persistency(url) as persistency, Persistency(with_parameters(url, application_name="other")) as other:
        persistency.open_job("j", feed_changes_max=5).close()
        reader = other.open_reader("j")
        reply = reader.changes(0, 1, wait=True)
        persistency.drop_job("j")
        with pytest.raises(Unavailable, match="dropped"):
            reply.result(WAIT)
        reader.close()


@pytest.mark.usefixtures("told")
def test_the_bell_rings_for_a_job_that_is_gone(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not as long as there is nothing new; once its job is dropped whoever follows is told to look, bell or none."""
    monkeypatch.setattr(bell_module, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(bell_module, "POLL_SECONDS", 0.05)
    root = PostgresRoot(parsed(url))
    root.open("j", StoreOptions(feed_changes_max=5)).close()
    reader, rung = root.look_into("j", NOW_MS), threading.Event()
    asked, ask = threading.Semaphore(0), Bell._ask
    monkeypatch.setattr(Bell, "_ask", lambda self, session: (ask(self, session), asked.release()))
    reader.follow(rung.set)
    for _ in range(3):
        assert asked.acquire(timeout=WAIT)
    assert not rung.is_set()
    root.drop("j")
    for _ in range(2):  # one may have been under way
        assert asked.acquire(timeout=WAIT)
    assert rung.is_set()
    reader.close()


def test_a_feed_that_falls_behind_is_told(url: str, owner: Owner) -> None:
    """Changes that are no longer kept are missed by nobody in silence."""
    for number in range(110):
        owner.do("put", number)
    with Persistency(url) as persistency, persistency.open_reader("j") as reader:
        with pytest.raises(FeedTruncated) as truncated:
            next(ChangeFeed(reader, after=3))
        assert truncated.value.oldest == 11


def test_the_bell_is_gone_when_nobody_follows(url: str) -> None:
    """With the last reader its thread and connection go."""
    with Persistency(url) as persistency:
        persistency.open_job("j", feed_changes_max=5).close()
        bell: Bell = persistency._site.root._bell  # type: ignore[attr-defined]  # of this adapter alone
        reader = persistency.open_reader("j")
        assert bell._thread is not None
        reader.close()
        until(lambda: bell._thread is None, "the bell's thread ends")


def test_a_file_has_no_feed_for_readers(tmp_path: Path) -> None:
    """Of a job that is a file nobody tells its readers: a feed of one is refused at once."""
    with Persistency(tmp_path) as persistency:
        persistency.open_job("j", feed_changes_max=5).close()
        with persistency.open_reader("j") as reader, pytest.raises(Misuse, match="can't wait for changes"):
            ChangeFeed(reader)
