"""PostgreSQL beside a connection that breaks at the worst moment: nothing lost, nothing twice, nobody left waiting."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from persistency import Delete, Job, Persistency, Put
from persistency.errors import Corrupt, LeaseLost, Poisoned, Unavailable, WriteFailed
from persistency.storage.port import Durability, StoreOptions
from persistency.storage.postgres import session as session_module
from persistency.storage.postgres import store as store_module
from persistency.storage.postgres.address import parsed
from persistency.storage.postgres.faults import Refused
from persistency.storage.postgres.root import PostgresRoot
from persistency.storage.postgres.session import Session
from persistency.transaction import Transaction
from tests.postgres import Server, fresh_url, missing, until, url_of, with_parameters
from tests.postgres_proxy import Proxy, When
from tests.storage.conftest import run_child

WAIT = 60


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """What the connections of a test go through."""
    with Proxy(fresh_url()) as proxy:
        yield proxy


@pytest.fixture
def job(proxy: Proxy) -> Iterator[Job]:
    """A job behind the proxy."""
    persistency = Persistency(proxy.url)
    yield persistency.open_job("j", feed_changes_max=0)
    with contextlib.suppress(WriteFailed, Poisoned, Unavailable):
        persistency.close(WAIT)


def add_one(transaction: Transaction) -> int:
    """Count in a row: whatever is done twice, or not at all, shows."""
    number = int(transaction.get("c", ("n",)) or b"0") + 1
    transaction.put("c", ("n",), b"%d" % number)
    return number


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_is_done_once_whenever_the_connection_breaks(proxy: Proxy, job: Job, when: When) -> None:
    """A transaction whose COMMIT is never sent is run again; one whose answer is lost is not."""
    for number in range(1, 6):
        cut = proxy.cut("commit", when)
        assert job.run(add_one).result(WAIT) == number
        assert cut.done.is_set()
    assert job.get("c", ("n",)).result(WAIT) == b"5"
    assert job.version().result(WAIT) == 5


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("statement", "size"), [("put_one", 1), ("put", 3), ("put_mixed", 2)])
def test_puts_are_committed_once(proxy: Proxy, job: Job, when: When, statement: str, size: int) -> None:
    """A group of puts, one statement, takes its versions once, whether or not its answer came."""
    rows = [(f"c{at}" if statement == "put_mixed" else "c", ("k", at)) for at in range(size)]
    for number in range(1, 4):
        cut = proxy.cut(f".{statement}", when)
        assert job.commit([Put(category, key, b"%d" % number) for category, key in rows]).result(WAIT) == number * size
        assert cut.done.is_set()
    entries = [job.entry(category, key).result(WAIT) for category, key in rows]
    assert [entry and (entry.payload, entry.version) for entry in entries] == [
        (b"3", 2 * size + at + 1) for at in range(size)
    ]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("statement", [".whole", ".pairs", ".fence", ".get"])
def test_reads_are_asked_again(proxy: Proxy, job: Job, when: When, statement: str) -> None:
    """A read whose connection breaks is answered over the next one, and the writes beside it are done once."""
    job.put("c", ("k",), b"v")
    job.flush().result(WAIT)
    cut = proxy.cut(statement, when)
    requests: dict[str, Callable[[], Any]] = {
        ".whole": lambda: job.run(lambda within: within.get("c", ("k",))).result(WAIT),
        ".pairs": lambda: job.scan("c").result(WAIT)[0].payload,
        ".fence": lambda: (job.run(add_one).result(WAIT), b"v")[1],
        ".get": lambda: job.get("c", ("k",)).result(WAIT),
    }
    assert requests[statement]() == b"v"
    assert cut.done.is_set()
    assert job.version().result(WAIT) == (2 if statement == ".fence" else 1)


@pytest.mark.parametrize(("statement", "size"), [("put_one", 1), ("put", 3), ("put_mixed", 2)])
def test_a_statement_that_arrives_late_does_nothing(proxy: Proxy, job: Job, statement: str, size: int) -> None:
    """Puts that the server sees only after they were done over another connection change nothing any more."""
    rows = [(f"c{at}" if statement == "put_mixed" else "c", ("k", at)) for at in range(size)]
    cut = proxy.cut(f".{statement}", "late")
    for number in range(1, 3):
        assert job.commit([Put(category, key, b"%d" % number) for category, key in rows]).result(WAIT) == number * size
    assert cut.done.is_set()
    cut.release.set()
    assert cut.delivered.wait(WAIT)
    entries = [job.entry(category, key).result(WAIT) for category, key in rows]
    assert [entry and (entry.payload, entry.version) for entry in entries] == [
        (b"2", size + at + 1) for at in range(size)
    ]
    assert job.version().result(WAIT) == 2 * size


def test_a_transaction_that_arrives_late_does_nothing(proxy: Proxy, job: Job) -> None:
    """A run that the server sees only after it was done over another connection isn't done a second time."""
    cut = proxy.cut(".fence", "late")
    assert [job.run(add_one).result(WAIT) for _ in range(2)] == [1, 2]
    assert cut.done.is_set()
    cut.release.set()
    assert cut.delivered.wait(WAIT)
    entry = job.entry("c", ("n",)).result(WAIT)
    assert entry is not None
    assert (entry.payload, entry.version) == (b"2", 2)
    assert job.run(add_one).result(WAIT) == 3
    assert job.version().result(WAIT) == 3


def test_a_statement_that_arrives_before_its_sender_comes_back_counts(proxy: Proxy, job: Job) -> None:
    """A put that the server sees while its sender is still away is found to be done when he comes back."""
    cut = proxy.cut(".put_one", "late")
    proxy.away = True
    job.put("c", ("k",), b"1")
    assert cut.done.wait(WAIT)
    cut.release.set()
    assert cut.delivered.wait(WAIT)
    proxy.away = False
    job.flush().result(WAIT)
    assert job.run(add_one).result(WAIT) == 1
    assert job.version().result(WAIT) == 2


def test_a_late_commit_lands_before_it_is_tried_again(proxy: Proxy, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who finds his own late write done, and has nothing to write any more, answers what that one has answered."""
    cut = proxy.cut("commit", "late")
    run = Session.run

    def run_late(self: Session, statement: Any, params: Any) -> Any:
        result = run(self, statement, params)
        if statement.name.endswith(b".where") and cut.done.is_set() and not cut.release.is_set():
            cut.release.set()
            assert cut.delivered.wait(WAIT)
        return result

    monkeypatch.setattr(Session, "run", run_late)
    assert job.compare_and_set("c", ("k",), None, b"1").result(WAIT) is True
    assert cut.delivered.is_set()
    assert job.version().result(WAIT) == 1
    assert job.get("c", ("k",)).result(WAIT) == b"1"


def test_the_version_moves_between_the_look_and_the_try(
    proxy: Proxy, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A late put that comes after its sender has looked, and before he tries again, isn't done twice either."""
    cut = proxy.cut(".put_one", "late")
    run = Session.run

    def run_late(self: Session, statement: Any, params: Any) -> Any:
        result = run(self, statement, params)
        if statement.name.endswith(b".where") and cut.done.is_set() and not cut.release.is_set():
            cut.release.set()
            assert cut.delivered.wait(WAIT)
        return result

    monkeypatch.setattr(Session, "run", run_late)
    job.put("c", ("k",), b"1")
    job.flush().result(WAIT)
    assert cut.delivered.is_set()
    assert job.version().result(WAIT) == 1
    entry = job.entry("c", ("k",)).result(WAIT)
    assert entry is not None
    assert entry.version == 1


def test_a_group_in_doubt_isnt_taken_for_another(proxy: Proxy) -> None:
    """A reaping whose answer was lost, and the put behind it, take the same version: each is done once."""
    from persistency.storage.port import Reap, SetRow, StoreOptions

    store = PostgresRoot(parsed(proxy.url)).open("j", StoreOptions(feed_changes_max=10))
    store.apply([None, SetRow(b"c", b"ended", b"", 5), None], 1)
    proxy.cut("commit", "after")
    with pytest.raises(Unavailable):
        store.apply([None, Reap(5), None], 10)
    assert store.apply([b"c", b"k", b"v"], 10) == [None]
    assert store.last_version == 3
    assert store.get(b"c", b"k", 10) == b"v"
    store.close()


def test_a_job_stalls_while_the_server_is_away_and_goes_on(proxy: Proxy, job: Job) -> None:
    """What is posted while there is no server waits, in order, and is there when it is back."""
    job.put("c", (0,), b"0")
    job.flush().result(WAIT)
    proxy.away = True
    proxy.break_all()
    for number in range(1, 50):
        job.put("c", (number,), b"%d" % number)
    until(lambda: job.statistics().state == "stalled", "the job stalls")
    reply = job.get("c", (49,))
    assert not reply.done()
    proxy.away = False
    assert reply.result(WAIT) == b"49"
    assert [row.payload for row in job.scan("c").result(WAIT)] == [b"%d" % number for number in range(50)]
    assert job.version().result(WAIT) == 50


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_server_that_stays_away_poisons(proxy: Proxy, when: When) -> None:
    """After `stall_timeout` everybody is told, and that nobody knows what became of the group in hand."""
    persistency = Persistency(proxy.url)
    failed: queue.Queue[Any] = queue.Queue()
    job = persistency.open_job("j", stall_timeout=0.3, on_error=lambda _job_id, failures: failed.put(failures))
    proxy.cut(".put_one", when)
    proxy.away = True
    job.put("c", ("k",), b"v")
    assert [failure.outcome for failure in failed.get(timeout=WAIT)] == ["unknown"]
    with pytest.raises(Poisoned) as poisoned:
        job.get("c", ("k",)).result(WAIT)
    assert isinstance(poisoned.value.__cause__, Unavailable)
    proxy.away = False
    with contextlib.suppress(Exception):
        persistency.close(WAIT)
    with Persistency(proxy.url) as again, again.open_job("j") as found:
        assert found.version().result(WAIT) == (1 if when == "after" else 0)


def test_who_was_taken_over_while_in_doubt_is_told_so(proxy: Proxy, job: Job) -> None:
    """An owner that loses its connection and then the job can't go on, whatever it was about to write."""
    url = proxy.url
    job.put("c", ("k",), b"1")
    job.flush().result(WAIT)
    schema = parsed(url).schema
    proxy.away = True
    proxy.break_all()
    job.put("c", ("k",), b"2")
    until(lambda: job.statistics().state == "stalled", "the job stalls")
    _direct(proxy, f"UPDATE {schema}.jobs SET generation = generation + 1, owner = 'another'")
    proxy.away = False
    with pytest.raises(Poisoned) as poisoned:
        job.flush().result(WAIT)
    assert isinstance(poisoned.value.__cause__, LeaseLost)
    assert _direct(proxy, f"SELECT payload, version FROM {schema}.rows") == [(b"1", 1)]


def test_what_the_server_wants_again_is_run_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transaction that is refused with 40001 is run again whole, the function of a run too; others wait behind it."""
    pipe, refusals = Session.pipe, iter([b"40001", b"40P01", b"40001"])

    def refuse(self: Session, steps: Any) -> Any:
        state = next(refusals, None) if steps[-1][0].name == b"commit" else None
        if state is not None:
            raise Refused(state, "try again")
        return pipe(self, steps)

    monkeypatch.setattr(Session, "pipe", refuse)
    calls: list[int] = []

    def counting(transaction: Transaction) -> int:
        calls.append(1)
        return add_one(transaction)

    assert job.run(counting).result(WAIT) == 1
    assert len(calls) == 4
    assert job.get("c", ("n",)).result(WAIT) == b"1"
    assert job.statistics().state == "live"


def test_a_real_serialization_failure(proxy: Proxy) -> None:
    """Under REPEATABLE READ a row that somebody else has changed meanwhile is refused: it is tried again."""
    url = proxy.url + "&options=-c%20default_transaction_isolation%3Drepeatable%5C%20read"
    schema = parsed(url).schema
    with Persistency(url) as persistency, persistency.open_job("j") as job:
        job.put("c", ("k",), b"1")
        job.flush().result(WAIT)
        import psycopg

        with psycopg.connect(**_settings(proxy)) as other:  # type: ignore[arg-type]
            other.execute(f"UPDATE {schema}.jobs SET last_used_ms = last_used_ms + 1")
            reply = job.commit([])  # nothing, so that it doesn't wait
            assert reply.result(WAIT) == 1
            job.put("c", ("k",), b"2")
            until(lambda: _waits(proxy), "the put waits for the row")
        job.flush().result(WAIT)
        assert job.version().result(WAIT) == 2


PIECES = """
import sys
from persistency import Persistency
from tests.postgres_proxy import Proxy

WAIT = 30
with Proxy(sys.argv[1]) as proxy, Persistency(proxy.url) as p, p.open_job("j", feed_changes_max=10) as job:
    for number in range(10):
        proxy.splits = number > 1  # not before all statements are prepared
        job.put("c", ("k",), b"%d" % number)
        job.flush().result(WAIT)
        assert job.get("c", ("k",)).result(WAIT) == b"%d" % number
        assert job.run(lambda tx: tx.get("c", ("k",))).result(WAIT) == b"%d" % number
        assert len(job.scan("c").result(WAIT)) == 1
"""


def test_no_thread_is_kept_from_running_by_half_an_answer() -> None:
    """An answer whose end is still under way is waited for as anything is: others of the process run meanwhile.

    In a process of its own: if nobody else ran in it, nobody could tell.
    """
    done = run_child(PIECES, fresh_url())
    assert done.returncode == 0, done.stderr


def test_a_silent_server_is_given_up_when_it_takes_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server whose processes are all stopped stalls the job; once it goes on, so does the job, in order."""
    monkeypatch.setattr(session_module, "SILENT_SECONDS", 0.3)
    with _server() as server, Persistency(server.url + "?connect_timeout=1") as persistency:
        job = persistency.open_job("j")
        job.put("c", (1,), b"1")
        job.flush().result(WAIT)
        pids = [row[0] for row in server.sql("SELECT pid FROM pg_stat_activity WHERE application_name = 'persistency'")]
        assert server.pid is not None
        stopped = [server.pid, *pids]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            job.put("c", (2,), b"2")
            until(lambda: job.statistics().state == "stalled", "the job stalls")
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)
        job.flush().result(WAIT)
        assert [row.payload for row in job.scan("c").result(WAIT)] == [b"1", b"2"]
        assert job.version().result(WAIT) == 2


def test_a_silent_server_is_given_up_though_another_host_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """With all processes of the old primary stopped, its host alive, jobs go on where the replica was promoted."""
    monkeypatch.setattr(session_module, "SILENT_SECONDS", 0.3)
    with _server() as server, server.standby() as standby:
        persistency = Persistency(url_of(server, standby, connect_timeout=1))
        job = persistency.open_job("j", stall_timeout=WAIT)
        job.put("c", (1,), b"1")
        job.flush(sync=True).result(WAIT)
        pids = server.sql("SELECT pid FROM pg_stat_activity WHERE pid <> pg_backend_pid()")
        assert server.pid is not None
        stopped = [server.pid, *(pid for (pid,) in pids)]
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        try:
            job.put("c", (2,), b"2")
            standby.promote()
            job.flush().result(WAIT)
            assert [row.payload for row in job.scan("c").result(WAIT)] == [b"1", b"2"]
            assert job.version().result(WAIT) == 2
            persistency.close(WAIT)
        finally:
            for pid in stopped:
                os.kill(pid, signal.SIGCONT)


RECEIVING = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'walreceiver'"


@contextlib.contextmanager
def _held(standby: Server) -> Iterator[None]:
    """Hold what receives a server's log for its copy."""
    stopped = [pid for (pid,) in standby.sql(RECEIVING)]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)


@pytest.mark.parametrize(("durability", "batch"), [("power", False), ("power", True), ("process", True)])
def test_what_was_found_done_is_answered_once_the_copy_has_it(durability: Durability, batch: bool) -> None:
    """A server that went down while a commit waited for its copy comes back with it; the copy lacks it."""
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
    with _server() as server, server.standby() as standby, Persistency(url_of(server, standby)) as persistency:
        job = persistency.open_job("j", durability=durability, stall_timeout=WAIT)
        job.commit(Put("c", (0,), b"0")).result(WAIT)
        with _held(standby):
            if batch:
                job.persist([Put("c", (1,), b"1"), Delete("c", (0,))])
            else:
                job.put("c", (1,), b"1")
            flushed = job.flush(sync=durability == "process")
            until(lambda: server.sql(waiting), "the commit waits for the copy")
            server.restart(immediate=True)
            until(lambda: flushed.done() or server.sql(waiting), "the commit is answered, or waited for again")
            assert not flushed.done()
        flushed.result(WAIT)
        server.stop(immediate=True)
        standby.promote()
        assert job.get("c", (1,)).result(WAIT) == b"1"
        assert job.version().result(WAIT) == (3 if batch else 2)


def _refused_by_libpq(monkeypatch: pytest.MonkeyPatch, refusals: list[int]) -> None:
    """Have every write ask libpq for more than it sends, as long as there are refusals left."""
    put_step, change_steps = store_module.put_step, store_module.change_steps
    too_many: list[bytes] = [b""] * 70_000
    monkeypatch.setattr(session_module, "_BINARY", (1,) * 70_000)

    def put_too_much(*args: Any) -> Any:
        statement, params = put_step(*args)
        return statement, too_many if refusals and refusals.pop() else params

    def change_too_much(*args: Any, **options: Any) -> Any:
        steps = change_steps(*args, **options)
        return [*steps, (steps[-1][0], too_many)] if refusals and refusals.pop() else steps

    monkeypatch.setattr(store_module, "put_step", put_too_much)
    monkeypatch.setattr(store_module, "change_steps", change_too_much)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("kept", [0, 5])
def test_what_libpq_doesnt_send_is_in_no_doubt(monkeypatch: pytest.MonkeyPatch, kept: int, *, prepared: bool) -> None:
    """It fails with libpq's reason, the session is given up, and nobody believes that it may have happened."""
    store = PostgresRoot(parsed(fresh_url())).open("j", StoreOptions(feed_changes_max=kept))
    if prepared:
        store.apply([b"c", b"k", b"0"], 1)
    before, session = store.last_version, store._holder.session
    _refused_by_libpq(monkeypatch, [1])
    with pytest.raises(Unavailable, match="number of parameters") as unavailable:
        store.apply([b"c", b"k", b"1"], 1)
    assert not unavailable.value.at_commit
    assert not store._standing.doubtful
    assert store.apply([b"c", b"k", b"2"], 1) == [None]
    assert store._holder.session is not session or session is None
    assert store.last_version == before + 1
    assert store.get(b"c", b"k", 1) == b"2"
    store.close()


def test_what_was_never_sent_is_reported_as_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that is poisoned by it says what was the matter."""
    failed: queue.Queue[Any] = queue.Queue()
    persistency = Persistency(fresh_url())
    job = persistency.open_job("j", stall_timeout=0.2, on_error=lambda _job_id, failures: failed.put(failures))
    _refused_by_libpq(monkeypatch, [1] * 10_000)
    job.put("c", ("k",), b"v")
    assert [failure.outcome for failure in failed.get(timeout=WAIT)] == ["not applied"]
    with pytest.raises(Poisoned, match="number of parameters"):
        job.flush().result(WAIT)
    with contextlib.suppress(WriteFailed, Poisoned):
        persistency.close(WAIT)


def test_a_busy_server_isnt_given_up(monkeypatch: pytest.MonkeyPatch, proxy: Proxy, job: Job) -> None:
    """One that is silent for long, because somebody else holds the row, is waited for while it answers others."""
    monkeypatch.setattr(session_module, "SILENT_SECONDS", 0.1)
    job.put("c", ("k",), b"1")
    job.flush().result(WAIT)
    schema = parsed(proxy.url).schema
    import psycopg

    asked: list[int] = []
    ask_around = Session._ask_around
    monkeypatch.setattr(Session, "_ask_around", lambda self: (ask_around(self), asked.append(1)))
    with psycopg.connect(**_settings(proxy)) as other:  # type: ignore[arg-type]
        other.execute(f"UPDATE {schema}.jobs SET last_used_ms = last_used_ms + 1")
        job.put("c", ("k",), b"2")
        until(lambda: len(asked) >= 3, "it was asked whether the server lives")
    job.flush().result(WAIT)
    assert job.version().result(WAIT) == 2
    assert job.statistics().state == "live"


def test_what_a_crash_took_poisons(monkeypatch: pytest.MonkeyPatch) -> None:
    """With "process" a crash of the server may take the last commits: the job finds out and doesn't go on."""
    with _server(wal_writer_delay="10s", wal_writer_flush_after="0") as server:
        persistency = Persistency(server.url + "?persistency_lease=60")
        job = persistency.open_job("j")
        job.put("c", (0,), b"kept")
        job.flush(sync=True).result(WAIT)
        for number in range(20):
            job.put("c", (number,), b"lost")
        job.flush().result(WAIT)
        assert job.version().result(WAIT) == 21
        server.stop(immediate=True)
        server.start()
        with pytest.raises(Poisoned) as poisoned:
            job.get("c", (0,)).result(WAIT)
        assert isinstance(poisoned.value.__cause__, Corrupt)
        assert "lost what was answered" in str(poisoned.value)
        with contextlib.suppress(Exception):
            persistency.close(WAIT)
        with Persistency(server.url) as again, again.open_job("j") as found:
            assert found.get("c", (0,)).result(WAIT) == b"kept"
            assert found.version().result(WAIT) == 1


def test_power_loses_nothing_in_a_crash() -> None:
    """With "power", and after `flush(sync=True)`, what was answered is there after a crash; the job goes on."""
    with _server(wal_writer_delay="10s", wal_writer_flush_after="0") as server:
        url = server.url + "?persistency_lease=60"
        with Persistency(url) as persistency:
            job, other = persistency.open_job("j", durability="power"), persistency.open_job("k")
            for number in range(20):
                job.put("c", (number,), b"%d" % number)
                other.put("c", (number,), b"%d" % number)
            job.flush().result(WAIT)
            other.flush(sync=True).result(WAIT)
            server.stop(immediate=True)
            server.start()
            for one in (job, other):
                assert [row.payload for row in one.scan("c").result(WAIT)] == [b"%d" % number for number in range(20)]
                one.put("c", (20,), b"20")
                one.flush().result(WAIT)
                assert one.version().result(WAIT) == 21


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_taking_whose_answer_was_lost(proxy: Proxy, when: When) -> None:
    """An opening whose connection breaks at its commit fails, or is tried again; the next one has the job at once."""
    with Persistency(proxy.url + "&persistency_lease=3600") as persistency:
        for fresh in (True, False):
            cut = proxy.cut("commit", when)
            if fresh:
                with pytest.raises(Unavailable):
                    persistency.open_job("j")
            else:
                persistency.open_job("j").close()
            assert cut.done.is_set()
            persistency.open_job("j").close()


def test_a_giving_back_whose_answer_was_lost(proxy: Proxy) -> None:
    """It is done again over another connection: whoever comes next, in another process too, has the job at once."""
    url = proxy.url + "&persistency_lease=3600"
    for when in ("before", "after"):
        with Persistency(url) as persistency:
            job = persistency.open_job("j")
            cut = proxy.cut(".give_back", when)  # type: ignore[arg-type]  # it is one of them
            job.close()
            assert cut.done.is_set()
        with Persistency(with_parameters(url, application_name="another")) as other:
            other.open_job("j").close()


def test_a_job_is_closed_while_the_server_is_away(proxy: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    """It was all written: closing fails no more than that others wait for the lease; the same process doesn't."""
    with Persistency(proxy.url + "&persistency_lease=3600") as persistency:
        job = persistency.open_job("j")
        job.put("c", ("k",), b"v")
        job.flush().result(WAIT)
        proxy.away = True
        proxy.break_all()
        job.close()
        proxy.away = False
        told = [record.getMessage() for record in caplog.records if record.name == "persistency.storage"]
        assert len(told) == 1
        assert "couldn't be given back" in told[0]
        with persistency.open_job("j") as again:
            assert again.get("c", ("k",)).result(WAIT) == b"v"


def test_a_restart_while_nobody_asked(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Connections that were cut while nobody used them are made anew, and no job stalls for it."""
    monkeypatch.setattr(session_module, "UNSEEN_SECONDS", 0.0)
    with Persistency(proxy.url) as persistency:
        job = persistency.open_job("j")
        for number in range(3):
            job.put("c", ("k",), b"%d" % number)
            job.flush().result(WAIT)
            proxy.break_all()
            persistency.open_job(f"other{number}").close()
        assert job.get("c", ("k",)).result(WAIT) == b"2"
        assert job.version().result(WAIT) == 3
    assert not [record for record in caplog.records if "stalls" in record.getMessage()]


def test_nobody_waits_for_ever_for_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that waits for another job, while all connections are in use, ends with an error, and all goes on."""
    from persistency.storage.postgres import pool

    monkeypatch.setattr(pool, "WAIT_SECONDS_MAX", 0.2)
    with Persistency(fresh_url(persistency_connections=3)) as persistency:
        one, other = persistency.open_job("one"), persistency.open_job("other", stall_timeout=0.5)
        begun = threading.Event()

        def waits(_transaction: Transaction) -> str:
            begun.set()
            try:
                other.get("c", ("k",)).result(WAIT)
            except Poisoned as error:
                return str(error)
            return ""

        reply = one.run(waits)
        assert begun.wait(WAIT)
        assert "connections have been in use" in reply.result(WAIT)
        assert one.run(add_one).result(WAIT) == 1


def _settings(proxy: Proxy) -> dict[str, Any]:
    host, port = proxy._target
    return {"host": host, "port": port, "user": "postgres", "dbname": "postgres"}


def _direct(proxy: Proxy, statement: str) -> list[tuple[Any, ...]]:
    """Run a statement beside the proxy."""
    import psycopg

    with psycopg.connect(**_settings(proxy), autocommit=True) as connection:
        cursor = connection.execute(statement)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else []


def _waits(proxy: Proxy) -> bool:
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND application_name = 'persistency'"
    return bool(_direct(proxy, query)[0][0])


def _server(**settings: str) -> Server:
    from tests.postgres import NoPostgres

    try:
        return Server(**settings)
    except NoPostgres as error:
        missing(str(error))
