"""Reads sent ahead of their turn: one round trip instead of two hops and one, and never another answer."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator

import pytest

from persistency import Job, Persistency
from persistency.codec.keys import RawKey
from persistency.errors import Forked
from persistency.storage.port import GetRow, Prefetching, StoreOptions
from persistency.storage.postgres import store as store_module
from persistency.storage.postgres.address import parsed
from persistency.storage.postgres.ahead import Ahead
from persistency.storage.postgres.root import PostgresRoot
from persistency.storage.postgres.session import Params, Session, Statement
from persistency.storage.postgres.store import PostgresStore
from persistency.testing import group, put
from persistency.testing.rows import RowChecks
from tests.loops import InLoop, in_loop
from tests.postgres import fresh_url, sql, with_parameters
from tests.postgres_proxy import Proxy

__all__ = ["in_loop"]

WAIT = 60
NOW_MS = 1_000_000
READ = GetRow(b"c", b"k")


@pytest.fixture
def url() -> str:
    """A place of its own."""
    return fresh_url()


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The names of the statements that are sent one by one, in order."""
    names: list[bytes] = []
    send = Session.send

    def noting(self: Session, statement: Statement, params: Params) -> bool:
        done = send(self, statement, params)
        names.extend([statement.name] * done)
        return done

    monkeypatch.setattr(Session, "send", noting)
    return names


def opened(url: str, job_id: str = "j") -> PostgresStore:
    """Return a store with a row, whose reads are known to its session."""
    store = PostgresRoot(parsed(url)).open(job_id, StoreOptions())
    assert isinstance(store, PostgresStore)
    assert isinstance(store, Prefetching)
    store.apply(group(put(b"c", b"k", b"0")), NOW_MS)
    assert store.read(READ, NOW_MS) == b"0"
    return store


def test_what_was_sent_ahead_is_not_sent_again(url: str, sent: list[bytes]) -> None:
    """The next group is that very read, and takes what is there already."""
    store = opened(url)
    del sent[:]
    store.prefetch(READ)
    assert len(sent) == 1
    assert store.apply(group(READ), NOW_MS) == [b"0"]
    assert len(sent) == 1
    store.close()


@pytest.mark.parametrize("does", ["apply", "apply another read", "read", "reap", "settle", "close", "prefetch"])
def test_whatever_comes_first_takes_it_off(url: str, does: str) -> None:
    """The session is sound afterwards, and the read is asked in its turn."""
    store = opened(url)
    session = store._holder.session
    outcomes: list[object] = []
    store.prefetch(READ)
    {
        "apply": lambda: store.apply(group(put(b"c", b"k", b"1")), NOW_MS),
        "apply another read": lambda: outcomes.extend(store.apply(group(GetRow(b"c", b"other")), NOW_MS)),
        "read": lambda: outcomes.append(store.read(GetRow(b"c", b"other"), NOW_MS)),
        "reap": lambda: store.reap(NOW_MS, 1),
        "settle": store.settle,
        "close": store.close,
        "prefetch": lambda: store.prefetch(GetRow(b"c", b"other")),
    }[does]()
    assert outcomes == [None] * does.endswith("read")  # the other row's, which isn't there
    if does != "close":
        assert store.apply(group(GetRow(b"c", b"k")), NOW_MS) == [b"1" if does == "apply" else b"0"]
        assert store._holder.session is session
        store.close()
    with Persistency(url) as p, p.open_job("j") as job:  # it was given back
        assert job.get("c", RawKey(b"k")).result(WAIT) is not None


def test_a_lost_connection_is_asked_anew(url: str) -> None:
    """Cut off behind what was sent, or before the answer: the read is asked elsewhere."""
    for when in ("before", "after"):
        with Proxy(url) as proxy:
            store = opened(proxy.url, f"j-{when}")
            if when == "before":
                proxy.break_all()
                store.prefetch(READ)
            else:
                store.prefetch(READ)
                proxy.break_all()
            assert store.apply(group(READ), NOW_MS) == [b"0"]
            store.close()


def test_a_terminated_session_is_no_answer(url: str) -> None:
    """What the server says instead of an answer isn't taken for one."""
    store = opened(url)
    session = store._holder.session
    assert session is not None
    pid = session._connection.backend_pid
    store.prefetch(READ)
    sql(url, "SELECT pg_terminate_backend(%s)", pid)
    assert store.apply(group(READ), NOW_MS) == [b"0"]
    store.prefetch(READ)
    assert store.apply(group(READ), NOW_MS) == [b"0"]
    store.close()


@pytest.mark.parametrize("why", ["unsure", "lease over", "never run before", "no session", "in use"])
def test_what_may_have_to_wait_is_not_sent(url: str, why: str, sent: list[bytes]) -> None:
    """Where more than a packet would be needed, or the job may not be ours any more, the read waits for its turn."""
    store = opened(url)
    pool, holder, standing = store._pool, store._holder, store._standing
    assert holder.session is not None
    known, lease_end = set[bytes](), standing.lease.until
    del sent[:]
    if why == "unsure":
        standing.unsure = True
    elif why == "lease over":
        standing.lease.until = 0.0
    elif why == "never run before":
        known, holder.session._known = holder.session._known, set()
    elif why == "no session":
        pool.give_up(holder)
    else:
        holder.session.broken = True
    store.prefetch(READ)
    assert store._ahead.message is None
    assert sent == []
    if holder.session is not None:
        holder.session.broken = False
        holder.session._known |= known
    standing.lease.until = lease_end
    assert store.apply(group(READ), NOW_MS) == [b"0"]
    store.close()


def test_somebody_who_needs_the_session_gets_one(url: str) -> None:
    """With fewer connections than jobs: a read that was sent ahead and left alone keeps nobody else from it."""
    with Persistency(with_parameters(url, persistency_connections=3)) as p:
        jobs = [p.open_job(f"j{at}") for at in range(4)]
        for job in jobs:
            job.put("c", RawKey(b"k"), job.id.encode())
            job.flush().result(WAIT)
            assert job.get("c", RawKey(b"k")).result(WAIT) == job.id.encode()
        for _ in range(20):
            for job in jobs:
                assert job._mailbox.prefetch is not None
                job._mailbox.prefetch(GetRow(b"c", b"k"))  # as by a caller who is interrupted before the post
            for job in jobs:
                assert job.get("c", RawKey(b"k")).result(WAIT) == job.id.encode()


@pytest.fixture
def job(url: str) -> Iterator[Job]:
    """Give a job on a server."""
    with Persistency(url) as p, p.open_job("j") as job:
        yield job


def test_one_who_reads_row_by_row_is_always_ahead(job: Job, in_loop: InLoop, sent: list[bytes]) -> None:
    """Awaited or not: each read is one statement, and sent by the thread that asks."""
    for at in range(50):
        job.put("c", RawKey(b"%d" % at), b"%d" % at)
    job.flush().result(WAIT)
    senders: set[int] = set()
    send = Ahead.send

    def noting(self: Ahead, message: object, statement: Statement, params: Params) -> None:
        send(self, message, statement, params)
        if self.message is message:
            senders.add(threading.get_ident())

    async def read() -> None:
        senders.add(threading.get_ident())
        for at in range(50):
            assert await job.get("c", RawKey(b"%d" % at)) == b"%d" % at

    assert job.get("c", RawKey(b"0")).result(WAIT) == b"0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ahead, "send", noting)
        del sent[:]
        in_loop(read)
    assert len(senders) == 1
    assert len(sent) == 50


def test_every_reader_sees_what_it_wrote(url: str) -> None:
    """Beside others who write and read the same job, in threads and in a loop, nobody ever gets an older row."""
    with Persistency(url) as p, p.open_job("j") as job:
        failures: list[object] = []

        def thread(name: int) -> None:
            for at in range(150):
                job.put("c", RawKey(b"%d" % name), b"%d" % at)
                if job.get("c", RawKey(b"%d" % name)).result(WAIT) != b"%d" % at:
                    failures.append((name, at))
                if job.get("c", RawKey(b"%d" % name)).result(WAIT) != b"%d" % at:
                    failures.append((name, at, "again"))

        async def task(name: int) -> None:
            for at in range(150):
                job.put("c", RawKey(b"%d" % name), b"%d" % at)
                if await job.get("c", RawKey(b"%d" % name)) != b"%d" % at:
                    failures.append((name, at))
                if await job.get("c", RawKey(b"%d" % name)) != b"%d" % at:
                    failures.append((name, at, "again"))

        async def tasks() -> None:
            await asyncio.gather(*(task(10 + name) for name in range(2)))

        threads = [threading.Thread(target=thread, args=(name,)) for name in range(2)]
        threads.append(threading.Thread(target=lambda: asyncio.run(tasks())))
        for one in threads:
            one.start()
        for one in threads:
            one.join(WAIT)
        assert failures == []


def test_readers_in_a_forked_child_are_told(url: str) -> None:
    """A read under way belongs to the parent: the child's is refused, the parent gets its answer."""
    store = opened(url)
    session = store._holder.session
    store.prefetch(READ)
    if (pid := os.fork()) == 0:
        store.disown(quiet=True)
        try:
            store.apply(group(READ), NOW_MS)
        except Forked:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    for _ in range(2):  # over the session it had: the child has said no word on it
        assert store.apply(group(READ), NOW_MS) == [b"0"]
        assert store._holder.session is session
    store.close()


class _KeepsOldAnswers(Ahead):
    """A defect: what was asked ahead is taken whenever that message comes."""

    kept: object = None

    def receive(self):  # type: ignore[no-untyped-def]  # a defect
        message = self.message
        result = super().receive()
        self.kept = (message, result)
        return result


def test_planted_defect_is_seen(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that takes an answer from before a write for the one behind it fails the check."""
    apply = PostgresStore.apply

    def stale(self: PostgresStore, messages, now_ms: int):  # type: ignore[no-untyped-def]  # a defect
        ahead = self._ahead
        assert isinstance(ahead, _KeepsOldAnswers)
        if len(messages) == 3 and ahead.message is None and ahead.kept and ahead.kept[0] is messages[1]:
            return [self._row_of(ahead.kept[1])]
        return apply(self, messages, now_ms)

    monkeypatch.setattr(store_module, "Ahead", _KeepsOldAnswers)
    monkeypatch.setattr(PostgresStore, "apply", stale)

    class Run(RowChecks):
        def open_store(self, options: StoreOptions) -> PostgresStore:
            store = PostgresRoot(parsed(url)).open("planted", options)
            assert isinstance(store, PostgresStore)
            return store

    with pytest.raises(AssertionError, match="what was asked ahead"):
        Run().test_reads_ahead_of_their_turn()
