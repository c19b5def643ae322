"""The bell of a PostgreSQL root: what anybody can ring, threads that come to harm, and commits that a server lost."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from persistency import ChangeFeed, Job, Persistency, Reader
from persistency.storage.postgres import bell as bell_module
from persistency.storage.postgres.address import parsed
from persistency.storage.postgres.bell import Bell
from persistency.storage.postgres.schema import Statements
from persistency.storage.postgres.session import Session, Statement
from tests.postgres import fresh_url, sql, until, with_parameters

WAIT = 60
SCHEMA_CHARS_MAX = 63


@pytest.fixture
def url() -> str:
    """A place of its own."""
    return fresh_url(persistency_lease=5)


@pytest.fixture
def job(url: str) -> Iterator[Job]:
    """A job that keeps its changes, with one."""
    with Persistency(url) as persistency, persistency.open_job("j", feed_changes_max=100) as job:
        job.put("c", ("k",), b"1")
        job.flush().result(WAIT)
        yield job


@pytest.fixture
def reader(url: str, job: Job) -> Iterator[Reader]:
    """A reader beside it, of a root of its own."""
    with Persistency(with_parameters(url, application_name="other")) as other, other.open_reader(job.id) as reader:
        yield reader


@pytest.fixture
def rung(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the bell has heard; and nothing but the bell tells."""
    heard: list[str] = []
    real = Session.told

    def told(session: Session, seconds: float) -> list[str]:
        found = real(session, seconds)
        heard.extend(found)
        return found

    monkeypatch.setattr(Session, "told", told)
    monkeypatch.setattr(bell_module, "LOOK_SECONDS", 10_000.0)
    return heard


def bell_of(reader_or_job: Reader | Job) -> Bell:
    """Return the bell that a reader listens to."""
    store: Any = reader_or_job._worker.store  # type: ignore[union-attr]  # a reader's
    bell: Bell = store._bell
    return bell


def ring(url: str, text: str) -> None:
    """Ring as anybody can who may connect."""
    sql(url, f"SELECT pg_notify('{Statements(parsed(url).schema).channel}', %s)", text)


@pytest.mark.parametrize(
    "text", ["hello", "", "999999 j", "-1 j", "x j", " j", "1 k", "9" * 5000 + " j", "j", "é \U0001f514 j"]
)
def test_who_rings_in_vain_silences_nobody(url: str, job: Job, reader: Reader, rung: list[str], text: str) -> None:
    """Anybody may ring, with anything: followers go on, with the same thread, and see every commit."""
    feed = ChangeFeed(reader, after=1)
    thread = bell_of(reader)._thread
    until(lambda: ring(url, text) or text in rung, "it was heard")  # type: ignore[func-returns-value]  # it gives None
    for number in range(2, 5):
        reply = reader.changes(number - 1, 10, wait=True)
        assert reader.version().result(WAIT) == number - 1  # by now the other one waits
        job.put("c", ("k",), b"%d" % number)
        assert [change.version for change in reply.result(WAIT)] == [number]
    assert [next(feed).version for _ in range(3)] == [2, 3, 4]
    assert bell_of(reader)._thread is thread
    assert thread is not None
    assert thread.is_alive()


def test_a_ring_in_vain_tells_nobody(url: str, rung: list[str], reader: Reader) -> None:
    """A ring for a job that isn't followed here is no reason to look, and one for a job is one, however it is put."""
    bell, told = bell_of(reader), []
    token = bell.follow("other", lambda state: told.append(state))
    try:
        until(lambda: ring(url, "listens") or "listens" in rung, "it listens")  # type: ignore[func-returns-value]  # it gives None
        told.clear()  # the versions were asked for when it began to listen, with the other one or without
        for text in ("hello", "7 j", "7 another", "7  other", "7 other "):
            ring(url, text)
        ring(url, "seven other")
        until(lambda: rung[-1:] == ["seven other"], "all was heard")
        until(lambda: told != [], "it is told to look")
    finally:
        bell.leave(token)
    assert told == [None]


def test_schemas_with_long_names_have_bells_of_their_own() -> None:
    """No two schemas have one channel, or a statement of one name, and the server cuts none of the names off."""
    schemas = [Statements("s" * length + end) for length in range(SCHEMA_CHARS_MAX) for end in "ab"]
    channels = {statements.channel for statements in schemas}
    assert len(channels) == len(schemas)
    names = [statement.name for statements in schemas for statement in statements._of.values()]
    assert len(set(names)) == len(names)
    assert max(map(len, [*channels, *names])) <= SCHEMA_CHARS_MAX


def test_the_bell_of_a_schema_with_a_long_name() -> None:
    """Where a schema's name leaves no room for a channel's, followers are told by the bell all the same."""
    url = fresh_url()
    long = parsed(url).schema.ljust(SCHEMA_CHARS_MAX, "x")
    url = url.replace(parsed(url).schema, long)
    try:
        with Persistency(url) as persistency, persistency.open_job("j", feed_changes_max=9) as job:
            with closing(Session(parsed(url))) as session:
                session.run(Statement(b"", f'LISTEN "{Statements(long).channel}"'.encode()), ())
                job.put("c", ("k",), b"v")
                job.flush().result(WAIT)
                assert next(filter(None, (session.told(1.0) for _ in range(WAIT)))) == ["1 j"]
            with persistency.open_reader("j") as reader:
                job.put("c", ("k",), b"v")
                assert next(ChangeFeed(reader, after=1)).version == 2
    finally:
        sql(url, f"DROP SCHEMA IF EXISTS {long} CASCADE")


def test_what_nobody_foresaw_is_told_and_tried_again(
    job: Job, reader: Reader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever is raised in the bell's thread, it goes on with another connection, and says so once."""
    failures = [ZeroDivisionError("of all things")] * 3
    real: Callable[..., None] = Bell._ask

    def ask(bell: Bell, session: Session) -> None:
        if failures:
            raise failures.pop()
        real(bell, session)

    monkeypatch.setattr(Bell, "_ask", ask)
    monkeypatch.setattr(bell_module, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(bell_module, "LOOK_SECONDS", 0.1)
    bell = bell_of(reader)
    with caplog.at_level(logging.WARNING, "persistency.storage"):
        until(lambda: not failures, "it was tried four times")
        job.put("c", ("k",), b"2")
        assert next(ChangeFeed(reader, after=1)).version == 2
    assert [record.persistency_error for record in caplog.records] == ["ZeroDivisionError"]  # type: ignore[attr-defined]  # by `extra`
    assert bell._thread is not None


def test_a_bell_whose_thread_is_gone_gets_another(job: Job, reader: Reader, url: str) -> None:
    """A thread that has died, of what nobody can catch, is replaced when the next one follows."""
    bell = bell_of(reader)
    until(lambda: bell._session is not None, "the bell listens")
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join(WAIT)
    bell._thread = thread  # the other one sees that it isn't the bell's, and ends
    tokens = [bell.follow("j", lambda _state: None) for _ in range(2)]
    assert bell._thread is not thread
    job.put("c", ("k",), b"2")
    assert next(ChangeFeed(reader, after=1)).version == 2
    until(lambda: sum(thread.name == "persistency:bell" for thread in threading.enumerate()) == 1, "one bell is left")
    for token in tokens:
        bell.leave(token)


@pytest.mark.parametrize("starts", [False, True])
def test_a_ctrl_c_while_the_bell_starts(url: str, monkeypatch: pytest.MonkeyPatch, *, starts: bool) -> None:
    """Whether the thread was started before the Ctrl-C or not: nothing stays behind, and the next follower is told."""
    address = parsed(url)
    with Persistency(url) as persistency:
        persistency.open_job("j", feed_changes_max=9).close()
    bell = Bell(address, Statements(address.schema))
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if starts:
            real(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        with pytest.raises(KeyboardInterrupt):
            bell.follow("j", lambda _state: None)
    assert not bell._followers
    until(lambda: bell._thread is None, "no thread is held to be there")
    told = threading.Event()
    token = bell.follow("j", lambda _state: told.set())
    assert told.wait(WAIT)
    bell.leave(token)
    until(lambda: bell._thread is None, "the bell's thread ends")


def test_what_came_with_an_answer_is_heard_at_once(url: str) -> None:
    """What was told along with the answer to something else is there already: the socket isn't waited for."""

    class Silent:
        def poll(self, _milliseconds: float) -> list[Any]:
            pytest.fail("the socket has nothing more")

    session = Session(parsed(url))
    session.run(Statement(b"", b"LISTEN here"), ())
    session.run(Statement(b"", b"SELECT pg_notify('here', 'now')"), ())
    session._poll = Silent()  # type: ignore[assignment]  # a look at it fails
    assert session.told(WAIT) == ["now"]
    session.close()
