"""Who owns a job on PostgreSQL: taken by one, given back at once, taken over when its owner is silent, fenced then."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest

from persistency import Persistency, Put
from persistency.errors import Forked, JobLocked, LeaseLost, Poisoned, SchemaTooNew
from persistency.storage.port import Group, SetRow, StoreOptions, SwapRow
from persistency.storage.postgres import standing
from persistency.storage.postgres.address import parsed
from persistency.storage.postgres.ownership import Leases
from persistency.storage.postgres.root import PostgresRoot
from persistency.storage.postgres.session import Session, Statement
from persistency.testing import group, put
from tests.postgres import fresh_url, sql, until, with_parameters
from tests.storage.conftest import run_child

WAIT = 60
NOW_MS = 1_000_000
PLAIN = StoreOptions()


@pytest.fixture
def url() -> str:
    """A place of its own, with a lease of a second."""
    return fresh_url(persistency_lease=1)


def another(url: str) -> str:
    """Return a URL of the same place which is another root to this process."""
    return with_parameters(url, application_name="another")


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody renews a lease but whoever commits."""
    monkeypatch.setattr(Leases, "_renew_in_spite", lambda _self: None)


def lapse(url: str) -> None:
    """Let the lease of every job run out, by the server's clock."""
    sql(url, f"UPDATE {parsed(url).schema}.jobs SET lease_ends = statement_timestamp() - interval '1 second'")


def test_a_second_owner_is_refused_with_the_first_ones_name(url: str) -> None:
    """Whoever opens a job that is owned gets `JobLocked` at once, with the owner's host, process and name."""
    with Persistency(url) as first, Persistency(another(url)) as second:
        job = first.open_job("j")
        with pytest.raises(JobLocked, match=rf"owned by .+:{os.getpid()}:[0-9a-f]+") as locked:
            second.open_job("j")
        assert locked.value.pid == os.getpid()
        with pytest.raises(JobLocked):
            second.drop_job("j")
        job.close()
        second.open_job("j").close()
    sql(url, f"UPDATE {parsed(url).schema}.jobs SET owner = 'elsewhere:1:ab', lease_ends = now() + interval '1 hour'")
    with Persistency(url) as first, pytest.raises(JobLocked, match="elsewhere:1:ab") as locked:
        first.open_job("j")
    assert locked.value.pid is None


def test_closing_gives_a_job_back_at_once() -> None:
    """With a lease of an hour the next one has the job as soon as the first has closed it, in order or not."""
    url = fresh_url(persistency_lease=3600)
    for _ in range(3):
        for tidy in (True, False):
            store = PostgresRoot(parsed(url)).open("j", PLAIN)
            store.apply([b"c", b"k", b"v"], NOW_MS)
            store.close(tidy=tidy)
    with Persistency(url) as persistency, persistency.open_job("j") as job:
        assert job.version().result(WAIT) == 6


def test_the_exit_gives_a_job_back_at_once() -> None:
    """A process that ends without closing its jobs has written everything and doesn't leave its lease behind."""
    url = fresh_url(persistency_lease=3600)
    program = f"""
from persistency import Persistency
job = Persistency({url!r}).open_job("j")
for number in range(100):
    job.put("c", (number,), b"x")
"""
    child = run_child(program)
    assert child.returncode == 0, child.stderr
    with Persistency(url) as persistency, persistency.open_job("j") as job:
        assert job.count("c").result(WAIT) == 100


def test_who_writes_after_the_exit_hook_is_served(url: str) -> None:
    """Once its lease was given back at exit, a job takes what comes still later, as long as nobody else has it."""
    program = f"""
import atexit
late = []
atexit.register(lambda: late[0].put("c", ("late",), b"x"))  # after the hook of the package, which comes later
from persistency import Persistency
job = Persistency({url!r}).open_job("j")
late.append(job)
job.put("c", ("early",), b"x")
"""
    child = run_child(program)
    assert child.returncode == 0, child.stderr
    with Persistency(url) as persistency, persistency.open_job("j") as job:
        assert job.count("c").result(WAIT) == 2


def test_a_dead_owners_job_is_taken_over_when_its_lease_runs_out(url: str) -> None:
    """The job of a process that was killed is refused until then, and whole afterwards."""
    program = f"""
import os, signal
from persistency import Persistency
job = Persistency({url!r}).open_job("j")
job.put("c", ("k",), b"v")
job.flush().result(30)
os.kill(os.getpid(), signal.SIGKILL)
"""
    run_child(program)
    with Persistency(url) as persistency:
        refusals = []

        def opened() -> bool:
            try:
                persistency.open_job("j")
            except JobLocked as error:
                refusals.append(error)
                return False
            return True

        until(opened, "the lease runs out")
        assert persistency["j"].get("c", ("k",)).result(WAIT) == b"v"


def test_an_idle_owner_renews(url: str) -> None:
    """A job that nobody writes to is kept: its lease moves on, and nobody else gets it."""
    with Persistency(url) as persistency:
        persistency.open_job("j")
        ends = f"SELECT lease_ends FROM {parsed(url).schema}.jobs"
        seen = {sql(url, ends)[0][0]}
        until(lambda: seen.add(sql(url, ends)[0][0]) or len(seen) >= 3, "the lease is renewed twice")
        with Persistency(another(url)) as other, pytest.raises(JobLocked):
            other.open_job("j")


def test_a_renewal_waits_for_no_transaction(url: str) -> None:
    """A transaction whose function waits keeps no lease from being renewed: not its own job's, nor another's."""
    with Persistency(url) as persistency:
        busy, idle = persistency.open_job("busy"), persistency.open_job("idle")
        begun, release = threading.Event(), threading.Event()

        def long(_transaction: Any) -> None:
            begun.set()
            release.wait(WAIT)

        reply = busy.run(long)
        assert begun.wait(WAIT)
        for job in ("idle", "busy"):
            ends = f"SELECT lease_ends FROM {parsed(url).schema}.jobs WHERE job = '{job}'"
            seen = {sql(url, ends)[0][0]}
            until(lambda ends=ends, seen=seen: seen.add(sql(url, ends)[0][0]) or len(seen) >= 3, "it is renewed twice")
        release.set()
        reply.result(WAIT)
        idle.put("c", ("k",), b"v")
        idle.flush().result(WAIT)
        busy.put("c", ("k",), b"v")
        busy.flush().result(WAIT)


@pytest.mark.usefixtures("silent")
def test_a_paused_owner_goes_on_if_nobody_came(url: str) -> None:
    """An owner that wakes up after its lease, with the job as it left it, still has it."""
    with Persistency(url) as persistency:
        job = persistency.open_job("j")
        lapse(url)
        job.put("c", ("k",), b"v")
        job.flush().result(WAIT)
        with Persistency(another(url)) as other, pytest.raises(JobLocked):
            other.open_job("j")  # the commit has renewed it


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("write", ["put", "puts", "run", "read"])
def test_a_paused_owner_is_fenced(url: str, write: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An owner that wakes up when another has the job writes nothing and is told, whatever it does first."""
    first, second = Persistency(url), Persistency(another(url))
    job = first.open_job("j")
    job.put("c", ("k",), b"1")
    job.flush().result(WAIT)
    lapse(url)
    other = second.open_job("j")
    other.put("c", ("k",), b"2")
    other.flush().result(WAIT)
    requests: dict[str, Callable[[], Any]] = {
        "put": lambda: job.commit(Put("c", ("k",), b"3")),
        "puts": lambda: job.commit([Put("c", ("k", at), b"3") for at in range(5)]),
        "run": lambda: job.run(lambda transaction: transaction.put("c", ("k",), b"3")),
        "read": lambda: job.get("c", ("k",)),
    }
    if write == "read":
        monkeypatch.setattr(standing, "monotonic", lambda: monotonic() + 5)  # as after a pause
    with pytest.raises(Poisoned) as poisoned:
        requests[write]().result(WAIT)
    assert isinstance(poisoned.value.__cause__, LeaseLost)
    assert not poisoned.value.__cause__.retryable
    assert other.get("c", ("k",)).result(WAIT) == b"2"
    assert other.version().result(WAIT) == 2
    with contextlib.suppress(Poisoned):
        first.close(WAIT)
    other.put("c", ("k",), b"4")  # what the first gave back wasn't this one's
    second.close(WAIT)


@pytest.mark.usefixtures("silent")
def test_a_job_that_was_dropped_and_made_again_is_another(url: str) -> None:
    """An owner of long ago writes nothing into a job of the same name, even though its generation began anew."""
    early, late = PostgresRoot(parsed(url)), PostgresRoot(parsed(another(url)))
    store = early.open("j", PLAIN)
    lapse(url)
    late.drop("j")
    again = late.open("j", PLAIN)
    with pytest.raises(LeaseLost):
        store.apply([b"c", b"k", b"1"], NOW_MS)
    with pytest.raises(LeaseLost):
        store.apply([None, SetRow(b"c", b"k", b"1", 5), None], NOW_MS)
    assert again.get(b"c", b"k", NOW_MS) is None
    store.close(tidy=False)
    again.apply([b"c", b"k", b"2"], NOW_MS)
    again.close()


@pytest.mark.usefixtures("silent")
@pytest.mark.parametrize("shape", ["put", "puts", "puts of several categories", "transaction"])
def test_a_paused_owner_is_fenced_before_the_next_one_writes(url: str, shape: str) -> None:
    """It is the generation that tells: the version is still the one the owner of before has left."""
    shapes: dict[str, Group] = {
        "put": group(put(b"c", b"k", b"1")),
        "puts": group(*[put(b"c", b"%d" % at, b"1") for at in range(3)]),
        "puts of several categories": group(*[put(b"%d" % at, b"k", b"1") for at in range(3)]),
        "transaction": group(SwapRow(b"c", b"k", None, b"1", None)),
    }
    early, late = PostgresRoot(parsed(url)), PostgresRoot(parsed(another(url)))
    store = early.open("j", PLAIN)
    lapse(url)
    taken = late.open("j", PLAIN)
    assert taken.last_version == store.last_version
    with pytest.raises(LeaseLost):
        store.apply(shapes[shape], NOW_MS)
    assert sql(url, f"SELECT count(*) FROM {parsed(url).schema}.rows") == [(0,)]
    store.close(tidy=False)
    assert taken.apply(group(put(b"c", b"k", b"2")), NOW_MS) == [None]
    assert taken.last_version == 1
    taken.close()


@pytest.mark.usefixtures("silent")
def test_who_was_taken_over_gives_back_nothing(url: str) -> None:
    """An owner that closes a job which another has by then, without having noticed, leaves it to that one."""
    early, late = PostgresRoot(parsed(url)), PostgresRoot(parsed(another(url)))
    store = early.open("j", PLAIN)
    lapse(url)
    taken = late.open("j", PLAIN)
    store.close()
    assert sql(url, f"SELECT owner FROM {parsed(url).schema}.jobs") == [(late._leases.owner,)]
    with pytest.raises(JobLocked):
        early.open("j", PLAIN)
    taken.close()


def test_who_was_taken_over_renews_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lease of whoever has the job now is left as it is, and who had it before knows that it is lost."""
    renew = Leases._renew_in_spite
    monkeypatch.setattr(Leases, "_renew_in_spite", lambda _self: None)
    early, late = PostgresRoot(parsed(url)), PostgresRoot(parsed(another(url)))
    store = early.open("j", PLAIN)
    lapse(url)
    taken = late.open("j", PLAIN)
    ends = f"SELECT lease_ends FROM {parsed(url).schema}.jobs"
    before = sql(url, ends)
    store._lease.until = 0.0  # so that its renewal is due
    renew(early._leases)
    assert sql(url, ends) == before
    assert store._lease.lost
    store.close()
    taken.close()


@pytest.mark.usefixtures("silent")
def test_a_lease_counts_from_before_it_was_asked_for(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long an answer takes: an owner never holds its lease for longer than the server does."""
    sent: dict[str, float] = {}
    pipe, send = Session.pipe, Session.send

    def note(*statements: Statement) -> None:
        sent.update((statement.name.decode().rpartition(".")[2], monotonic()) for statement in statements)

    def noting_pipe(self: Session, steps: Any) -> Any:
        note(*(step[0] for step in steps))
        return pipe(self, steps)

    def noting_send(self: Session, statement: Statement, params: Any) -> Any:
        note(statement)
        return send(self, statement, params)

    monkeypatch.setattr(Session, "pipe", noting_pipe)
    monkeypatch.setattr(Session, "send", noting_send)
    root = PostgresRoot(parsed(url))
    store = root.open("j", PLAIN)
    lease, until_before = store._lease, 0.0
    acts: dict[str, Callable[[], object]] = {
        "take": lambda: None,
        "put_one": lambda: store.apply(group(put(b"c", b"k", b"1")), NOW_MS),
        "fence": lambda: store.apply(group(SwapRow(b"c", b"k", b"1", b"2", None)), NOW_MS),
        "renew": lambda: root._leases._renew([lease]),
    }
    for name, act in acts.items():
        act()
        assert until_before < lease.until <= sent[name] + root._leases.seconds, name
        until_before = lease.until
    store.close()


@pytest.mark.usefixtures("silent")
def test_a_lease_is_renewed_with_time_to_spare(url: str) -> None:
    """It is due when a third of its time is over, long before it runs out; and not once somebody else has the job."""
    root = PostgresRoot(parsed(with_parameters(url, persistency_lease=3600)))
    store = root.open("j", PLAIN)
    leases, lease = root._leases, store._lease
    assert leases._due() == []
    lease.until = monotonic() + 2 * leases.seconds / 3
    assert leases._due() == [lease]
    lease.lost = True
    assert leases._due() == []
    lease.lost = False
    store.close()
    assert leases._due() == []


@pytest.mark.usefixtures("silent")
def test_every_commit_renews_the_lease(url: str) -> None:
    """Whatever statement a group becomes: behind it the lease is as long as it ever is, by the server's clock."""
    store = PostgresRoot(parsed(with_parameters(url, persistency_lease=3600))).open("j", PLAIN)
    left = f"SELECT lease_ends > statement_timestamp() + interval '30 minutes' FROM {parsed(url).schema}.jobs"
    for messages in (
        group(put(b"c", b"k", b"1")),
        group(*[put(b"c", b"%d" % at, b"1") for at in range(3)]),
        group(*[put(b"%d" % at, b"k", b"1") for at in range(3)]),
        group(SwapRow(b"c", b"k", b"1", b"2", None)),
    ):
        lapse(url)
        store.apply(messages, NOW_MS)
        assert sql(url, left) == [(True,)]
    store.close()


@pytest.mark.usefixtures("silent")
def test_a_paused_function_holds_no_lock(url: str) -> None:
    """A job is taken over, and written to, while a function of its owner waits; of what that does nothing is there."""
    with Persistency(url) as first, Persistency(another(url)) as second:
        job = first.open_job("j", max_bytes=1000)
        begun, release = threading.Event(), threading.Event()

        def waits(transaction: Any) -> bytes:
            transaction.put("c", ("k",), b"1")
            begun.set()
            release.wait(WAIT)
            return bytes(transaction.get("c", ("other",)) or b"")

        reply = job.run(waits)
        assert begun.wait(WAIT)
        rows = sql(url, f"SELECT generation FROM {parsed(url).schema}.jobs WHERE job = 'j' FOR UPDATE NOWAIT")
        assert len(rows) == 1
        lapse(url)
        other = second.open_job("j")
        other.put("c", ("other",), b"2")
        other.flush().result(WAIT)
        release.set()
        with pytest.raises(Poisoned) as poisoned:
            reply.result(WAIT)
        assert isinstance(poisoned.value.__cause__, LeaseLost)
        assert other.get("c", ("k",)).result(WAIT) is None
        assert other.version().result(WAIT) == 1
        with contextlib.suppress(Poisoned):
            job.close(WAIT)


@pytest.mark.usefixtures("silent")
def test_a_function_that_only_reads_answers_of_one_owner(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a function has read partly before its job was taken over, and partly afterwards, isn't answered."""
    with Persistency(url) as first, Persistency(another(url)) as second:
        job = first.open_job("j")

        def reads(transaction: Any) -> list[Any]:
            found = [transaction.get("c", ("a",))]
            lapse(url)
            with second.open_job("j") as other:
                other.put("c", ("b",), b"2")
            monkeypatch.setattr(standing, "monotonic", lambda: monotonic() + 5)  # as after a pause
            return [*found, transaction.get("c", ("b",))]

        with pytest.raises(Poisoned) as poisoned:
            job.run(reads).result(WAIT)
        assert isinstance(poisoned.value.__cause__, LeaseLost)
        with contextlib.suppress(Poisoned):
            job.close(WAIT)


@pytest.mark.parametrize("roots_max", [8, 1])
def test_of_many_takers_one_wins(url: str, roots_max: int) -> None:
    """Of many who open a free job at once, in places that know nothing of one another, or in one, one gets it."""
    roots = [PostgresRoot(parsed(with_parameters(url, application_name=f"n{at}"))) for at in range(roots_max)]
    roots *= 8 // roots_max
    won: list[Any] = []
    lost: list[Any] = []
    start = threading.Barrier(len(roots))

    def take(root: PostgresRoot) -> None:
        start.wait(WAIT)
        try:
            won.append(root.open("j", PLAIN))
        except JobLocked as error:
            lost.append(error)

    threads = [threading.Thread(target=take, args=(root,)) for root in roots]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert (len(won), len(lost)) == (1, 7)
    assert won[0].apply([b"c", b"k", b"v"], NOW_MS) == [None]
    won[0].close()


def test_a_forked_child_leaves_the_parents_job_alone(url: str) -> None:
    """In a child every handle raises `Forked`, the parent's session and lease go on; the child opens its own."""
    with Persistency(url) as persistency:
        job = persistency.open_job("j")
        job.put("c", ("k",), b"1")
        job.flush().result(WAIT)
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            told = b""
            try:
                try:
                    job.put("c", ("k",), b"2")
                except Forked:
                    told += b"F"
                with Persistency(url) as mine:
                    with mine.open_job("mine") as own:
                        own.put("c", ("k",), b"3")
                        own.flush().result(WAIT)
                    try:
                        mine.open_job("j")
                    except JobLocked:
                        told += b"L"
            finally:
                os.write(write, told)
                os._exit(0)
        os.close(write)
        os.waitpid(pid, 0)
        assert os.read(read, 10) == b"FL"
        os.close(read)
        for number in range(3):
            job.put("c", ("k",), b"%d" % number)
            job.flush().result(WAIT)
        assert job.statistics().state == "live"
        connections = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'persistency'"
        assert sql(url, connections)[0][0] >= 1
        with persistency.open_job("mine") as own:
            assert own.get("c", ("k",)).result(WAIT) == b"3"


def test_the_tables_are_made_once_by_many(url: str) -> None:
    """Many who come first at the same time all find the tables, and each its job."""
    roots = [PostgresRoot(parsed(with_parameters(url, application_name=f"n{at}"))) for at in range(8)]
    start = threading.Barrier(len(roots))
    stores: list[Any] = []
    errors: list[BaseException] = []

    def come(at: int) -> None:
        start.wait(WAIT)
        try:
            stores.append(roots[at].open(f"j{at}", PLAIN))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=come, args=(at,)) for at in range(len(roots))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not errors
    assert len(stores) == 8
    for store in stores:
        store.close()


def test_tables_of_a_later_release_are_left_alone(url: str) -> None:
    """A schema whose format is newer than what is known is refused, and nothing in it is touched."""
    with Persistency(url) as persistency:
        persistency.open_job("j").close()
    sql(url, f"UPDATE {parsed(url).schema}.meta SET value = 99")
    with Persistency(another(url)) as persistency:
        with pytest.raises(SchemaTooNew, match="99"):
            persistency.open_job("j")
        with pytest.raises(SchemaTooNew):
            persistency.stored_jobs()


def test_an_interrupt_while_the_renewing_begins_is_made_good(url: str) -> None:
    """A Ctrl-C before the thread was started leaves none that is taken for one: the next job is renewed."""
    parts = PostgresRoot(parsed(with_parameters(url, persistency_lease=1)))
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if thread.name == "persistency:leases":
            raise KeyboardInterrupt
        start(thread)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            parts.stored()
    store = parts.open("j", StoreOptions())
    first = store._lease.until
    until(lambda: store._lease.until > first, "the lease is renewed")
    store.close()


def test_making_one_touches_nothing() -> None:
    """Nothing is connected to, and nothing made, before the first job; what isn't there is an empty list."""
    url = fresh_url()
    with Persistency(with_parameters(url, host="/nowhere", port=1)) as persistency:
        assert not list(persistency)
    with Persistency(url) as persistency:
        assert persistency.stored_jobs() == []
        assert persistency.drop_job("none") == []
    assert sql(url, "SELECT 1 FROM pg_namespace WHERE nspname = %s", parsed(url).schema) == []
