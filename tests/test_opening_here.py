"""Opening a job in the caller's own thread: no thread is started before there is something for one.

What is counted here are threads that are started and stores that are opened, not how long it takes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from persistency import Closed, Corrupt, Forked, Job, Misuse, Persistency, lifecycle
from persistency.actor import starter
from persistency.actor.worker import Worker
from persistency.registry import Site
from persistency.storage import files
from persistency.storage.directory import DirectoryRoot
from persistency.storage.files import Claim
from persistency.storage.sqlite import SqliteStore

from .test_worker_death import Interrupter

WAIT = 20.0


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every thread that is started from now on, by its name; "starter": the one that starts others."""
    names: list[str] = []
    start, start_new = threading.Thread.start, starter.start_new_thread

    def starts(thread: threading.Thread) -> None:
        names.append(thread.name)
        start(thread)

    def starts_new(*args: Any) -> int:
        names.append("starter")
        return start_new(*args)

    monkeypatch.setattr(threading.Thread, "start", starts)
    monkeypatch.setattr(starter, "start_new_thread", starts_new)
    return names


@pytest.fixture(params=["directory", "memory"])
def persistency(request: pytest.FixtureRequest, place: Path) -> Iterator[Persistency]:
    """Give a root of each near kind."""
    with Persistency(place / "root" if request.param == "directory" else ":memory:") as opened:
        yield opened


def in_thread(fn: Callable[[], Any]) -> Future[Any]:
    """Run a function in a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(fn())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="asks", daemon=True).start()
    return future


def openings(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], object]) -> list[int]:
    """Call `before` with its number at each opening of a file; return the threads that did."""
    threads: list[int] = []
    real = DirectoryRoot.open

    def opens(root: DirectoryRoot, *args: Any) -> SqliteStore:
        threads.append(threading.get_ident())
        before(len(threads))
        return real(root, *args)

    monkeypatch.setattr(DirectoryRoot, "open", opens)
    return threads


# -- when a thread comes -----------------------------------------------------------------------------------------------


def test_opening_reading_and_closing_start_no_thread(persistency: Persistency, started: list[str]) -> None:
    """However often a job is opened, asked and closed: a thread comes with the first post."""
    for _ in range(20):
        job = persistency.open_job("a")
        assert job.get("c", (1,)).result(WAIT) is None
        assert job.count("c").result(WAIT) == 0
        job.close(WAIT)
    assert started == []


def test_the_first_post_gets_a_job_its_thread_and_later_ones_none(persistency: Persistency, started: list[str]) -> None:
    """One thread that starts it, and it: whatever is posted until it comes, and afterwards."""
    job = persistency.open_job("a")
    for number in range(2000):
        job.put("c", (number,), b"x")
    job.flush().result(WAIT)
    assert started == ["starter", "persistency:a"]
    job.put("c", (0,), b"y")
    job.flush().result(WAIT)
    assert job.count("c").result(WAIT) == 2000
    assert started == ["starter", "persistency:a"]


def test_the_starter_ends_with_its_last_note(place: Path, started: list[str]) -> None:
    """It is there only as long as there is something to be started."""
    with Persistency(place) as p:
        for number in range(5):
            p.open_job(f"{number}").put("c", (1,), b"x")
            p[f"{number}"].flush().result(WAIT)
    assert sorted(name for name in started if name != "starter") == [f"persistency:{number}" for number in range(5)]
    assert 1 <= started.count("starter") <= 5


def test_what_a_write_in_place_leaves_to_be_done_gets_a_thread(place: Path, started: list[str]) -> None:
    """A commit is run by its caller; it has to be synced within `sync_interval`, and that is the job's business."""
    with Persistency(place) as p:
        job = p.open_job("a")
        job.increment("c", (1,)).result(WAIT)
        job.flush().result(WAIT)
        assert started == ["starter", "persistency:a"]


def test_what_is_due_at_once_gets_a_thread_at_once(place: Path, started: list[str]) -> None:
    """Rows that end, and a job that does: their thread is there when `open_job` returns, without a starter."""
    with Persistency(place) as p:
        p.open_job("rows").put("c", (1,), b"x", ttl=3600)
        p.close_job("rows", WAIT)
        del started[:]
        p.open_job("rows")
        assert started == ["persistency:rows"]
        p.open_job("ends", ttl=3600)
        assert started == ["persistency:rows", "persistency:ends"]


def test_nobody_serves_himself_while_the_thread_of_a_job_is_on_its_way(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Something was due at once: `open_job` returns with the thread started, but it hasn't done anything yet."""
    may_go = threading.Event()
    live = Worker._live
    threads: list[int] = []
    apply = SqliteStore.apply

    def waits(worker: Worker) -> None:
        assert may_go.wait(WAIT)
        live(worker)

    def applies(store: SqliteStore, *args: Any) -> list[Any]:
        threads.append(threading.get_ident())
        return apply(store, *args)

    with Persistency(place) as p:
        p.open_job("rows").put("c", (1,), b"x", ttl=3600)
        p.close_job("rows", WAIT)
        monkeypatch.setattr(Worker, "_live", waits)
        monkeypatch.setattr(SqliteStore, "apply", applies)
        job = p.open_job("rows")
        job.put("c", (2,), b"x")
        assert threads == []
        may_go.set()
        job.flush().result(WAIT)
        assert threading.get_ident() not in threads[:1]


def test_a_log_that_was_left_behind_and_stays_gets_a_thread_at_once(place: Path, started: list[str]) -> None:
    """It couldn't be cut off while it was opened, for somebody reads there: it is to be, and to be synced, later."""
    dies = "import os, sys; from persistency import Persistency; job = Persistency(sys.argv[1]).open_job('a')\n"
    dies += "job.put('c', (1,), b'x'); job.flush().result(); os._exit(0)"
    subprocess.run([sys.executable, "-c", dies, str(place)], check=True, timeout=60)
    reads = "import sqlite3, sys; file = sqlite3.connect(sys.argv[1]); file.execute('BEGIN')\n"
    reads += "file.execute('SELECT count(*) FROM meta').fetchone(); print('reads', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", reads, str(place / "a.db")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as reader:
        assert reader.stdout is not None
        assert reader.stdout.readline() == "reads\n"
        with Persistency(place) as p:
            assert p.open_job("a").get("c", (1,)).result(WAIT) == b"x"
            assert started == ["persistency:a"]
            reader.communicate()


@pytest.mark.parametrize("options", [{"open_timeout": 1.0}, {"max_live_jobs": 2}], ids=str)
def test_what_has_to_be_bounded_or_needs_leave_is_opened_by_a_thread(
    place: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """A short `open_timeout` bounds the opening itself; where there are slots, one has to be free."""
    threads = openings(monkeypatch, lambda _number: None)
    with Persistency(place, **options) as p:
        p.open_job("a")
        assert threading.get_ident() not in threads


def test_under_an_event_loop_files_are_opened_and_closed_elsewhere(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`aopen_job` and `aclose` leave it to the job's thread, whoever has opened it."""
    threads = openings(monkeypatch, lambda _number: None)
    closed: list[int] = []
    close = SqliteStore.close
    monkeypatch.setattr(
        SqliteStore, "close", lambda store, **how: (closed.append(threading.get_ident()), close(store, **how))[1]
    )

    async def main(p: Persistency) -> None:
        await (await p.aopen_job("a")).aclose()
        await p["b"].aclose()

    with Persistency(place) as p:
        p.open_job("b")
        assert threads == [threading.get_ident()]
        asyncio.run(main(p))
    assert len(closed) == 2
    assert threading.get_ident() not in [*threads[1:], *closed]


# -- who posts first ---------------------------------------------------------------------------------------------------


def test_the_first_post_may_come_in_the_middle_of_anything(place: Path) -> None:
    """From a signal handler or `__del__` while `threading` itself is locked: it waits for nothing of it."""

    class Dropped:
        def __init__(self, job: Job) -> None:
            self.job = job

        def __del__(self) -> None:
            self.job.put("c", ("dropped",), b"x")

    with Persistency(place) as p:
        jobs = [p.open_job(name) for name in ("handled", "dropped")]
        dropped = [Dropped(jobs[1])]
        before = signal.signal(signal.SIGUSR1, lambda *_: jobs[0].put("c", ("handled",), b"x"))
        try:
            with threading._active_limbo_lock:  # type: ignore[attr-defined]  # what starting a thread waits for
                signal.raise_signal(signal.SIGUSR1)
                dropped.clear()
        finally:
            signal.signal(signal.SIGUSR1, before)
        for job in jobs:
            job.flush().result(WAIT)
            assert job.get("c", (job.id,)).result(WAIT) == b"x"


def out_of_threads(*_: Any) -> None:
    """Refuse, as the system does."""
    raise RuntimeError("can't start new thread")


def out_of_memory(*_: Any) -> None:
    """Refuse, as Python does where there is none for what a thread begins with."""
    raise MemoryError


@pytest.mark.parametrize("refuses", [out_of_threads, out_of_memory])
@pytest.mark.parametrize("who", ["starter", "thread"])
def test_without_a_thread_to_be_had_posts_are_served_all_the_same(
    place: Path, monkeypatch: pytest.MonkeyPatch, who: str, refuses: Callable[..., None]
) -> None:
    """Out of threads: by the poster himself, or by whoever should have started it."""
    with Persistency(place) as p:
        job = p.open_job("a")
        if who == "starter":
            monkeypatch.setattr(starter, "start_new_thread", refuses)
        else:
            start = threading.Thread.start
            monkeypatch.setattr(
                threading.Thread,
                "start",
                lambda thread: refuses() if thread.name == "persistency:a" else start(thread),
            )
        job.put("c", (1,), b"x")
        if who == "starter":
            assert job.statistics().committed == 1  # there is nobody else
        job.put("c", (2,), b"x")
        job.flush().result(WAIT)
        assert job.count("c").result(WAIT) == 2
        job.close(WAIT)
        assert p.open_job("a").count("c").result(WAIT) == 2


def test_what_is_thrown_into_the_starter_leaves_nobody_waiting(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is told, and the job is served all the same, as are those that come after it."""
    start = Worker.start

    def thrown(_worker: Worker) -> None:
        monkeypatch.setattr(Worker, "start", start)
        raise SystemExit

    with Persistency(place) as p:
        monkeypatch.setattr(Worker, "start", thrown)
        for name in ("a", "b"):
            p.open_job(name).put("c", (1,), b"x")
            p[name].flush().result(WAIT)
            assert p[name].count("c").result(WAIT) == 1
    assert [record.persistency_event for record in caplog.records] == ["start_failed"]  # type: ignore[attr-defined]


def test_a_call_for_a_thread_that_was_cut_short_is_made_good(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in the middle of the very first post: the next one calls again, and both are written."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with Persistency(place) as p:
        job = p.open_job("a")
        with monkeypatch.context() as patch:
            patch.setattr(starter, "start_new_thread", interrupted)
            pytest.raises(KeyboardInterrupt, job.put, "c", (1,), b"x")
        other = p.open_job("b")
        for late in (other, job):
            late.put("c", (2,), b"x")
            late.flush().result(WAIT)
        assert job.count("c").result(WAIT) == 2
        assert other.count("c").result(WAIT) == 1


def test_of_two_first_posters_without_a_thread_to_be_had_neither_relies_on_the_other(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of threads: who came while another one tried in vain is served all the same."""
    tries, may_go = threading.Event(), threading.Event()

    def tries_in_vain(*_: Any) -> None:
        if not tries.is_set():
            tries.set()
            assert may_go.wait(WAIT)
        out_of_threads()

    with Persistency(place) as p:
        first, second = p.open_job("a"), p.open_job("b")
        monkeypatch.setattr(starter, "start_new_thread", tries_in_vain)
        posting = in_thread(lambda: first.put("c", (1,), b"x"))
        assert tries.wait(WAIT)
        second.put("c", (1,), b"x")
        may_go.set()
        posting.result(WAIT)
        for job in (first, second):
            job.flush().result(WAIT)
            assert job.statistics().committed == 1


# -- opening at once ---------------------------------------------------------------------------------------------------


def test_a_signal_handler_that_opens_what_it_interrupts_is_told(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else could open it before the handler is over; whoever was interrupted gets the job."""
    told: list[BaseException] = []

    def handle(*_: object) -> None:
        with pytest.raises(Misuse, match="is being opened by this very thread") as caught:
            p.open_job("a")
        told.append(caught.value)
        with p.open_job("b") as other:  # any other is opened as ever
            other.put("c", (1,), b"x")

    before = signal.signal(signal.SIGUSR1, handle)
    openings(monkeypatch, lambda number: number == 1 and signal.raise_signal(signal.SIGUSR1))
    try:
        with Persistency(place) as p:
            job = p.open_job("a")
            assert len(told) == 1
            job.put("c", (1,), b"x")
            job.flush().result(WAIT)
            assert p.open_job("a") is job
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_of_many_who_open_at_once_one_opens(place: Path, monkeypatch: pytest.MonkeyPatch, started: list[str]) -> None:
    """The others wait for it, and all have the same handle."""
    may_open = threading.Event()
    threads = openings(monkeypatch, lambda _number: may_open.wait(WAIT))
    with Persistency(place) as p:
        asking = [in_thread(lambda: p.open_job("a")) for _ in range(4)]
        may_open.set()
        assert len({id(future.result(WAIT)) for future in asking}) == 1
        assert len(threads) == 1
    assert [name for name in started if name != "asks"] == []


@pytest.mark.parametrize("kind", [KeyboardInterrupt, Corrupt])
def test_who_waits_for_an_opening_that_fails_is_told_or_opens_it_himself(
    place: Path, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    """A failure is everybody's; an interrupt only of him it came to."""
    opens, joined = threading.Event(), threading.Event()
    lease = Site._lease

    def fails(number: int) -> None:
        if number == 1:
            opens.set()
            assert joined.wait(WAIT)
            raise kind("now")

    def joins(site: Site, *args: Any) -> None:
        lease(site, *args)
        joined.set()

    monkeypatch.setattr(Site, "_lease", joins)
    with Persistency(place) as p:
        threads = openings(monkeypatch, fails)
        first = in_thread(lambda: p.open_job("a"))
        assert opens.wait(WAIT)
        second = in_thread(lambda: p.open_job("a"))
        assert isinstance(first.exception(WAIT), kind)
        if kind is Corrupt:
            assert isinstance(second.exception(WAIT), Corrupt)
        else:
            assert second.result(WAIT).count("c").result(WAIT) == 0
        assert len(threads) == (1 if kind is Corrupt else 2)
        assert p.open_job("a").count("c").result(WAIT) == 0


def test_a_closing_beside_somebody_who_is_answered_in_place_comes_after_him(place: Path, started: list[str]) -> None:
    """A job without a thread is closed by its caller only if nobody has the turn."""
    inside, may_go = threading.Event(), threading.Event()

    def takes_its_time(_transaction: Any) -> str:
        inside.set()
        assert may_go.wait(WAIT)
        return "done"

    with Persistency(place) as p:
        job = p.open_job("a")
        running = in_thread(lambda: job.run(takes_its_time).result(WAIT))
        assert inside.wait(WAIT)
        closing = job._leave()
        assert not closing.done()
        may_go.set()
        assert running.result(WAIT) == "done"
        closing.result(WAIT)
        pytest.raises(Closed, job.get, "c", (1,))
        assert started == ["asks", "starter", "persistency:a"]


# -- interrupts --------------------------------------------------------------------------------------------------------


def opened_interrupted(place: Path, at: int, *, existing: bool) -> int:
    """Open a job with an interrupt at some place of it; see that nothing is left of it; return the places."""
    if existing:
        with Persistency(place) as p:
            p.open_job("a").put("c", (0,), b"0")
    with Persistency(place, open_timeout=WAIT) as p:
        with contextlib.suppress(KeyboardInterrupt), Interrupter(at) as interrupter:
            p.open_job("a")
        job = p.open_job("a")
        job.put("c", (1,), b"x")
        job.flush().result(WAIT)
        assert job.count("c").result(WAIT) == (2 if existing else 1)
        p.close(WAIT)
        Claim(p._site.root.path("a")).release()  # type: ignore[arg-type]  # it has files
    return interrupter.places


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_an_interrupted_opening_leaves_nothing(place: Path, existing: bool) -> None:
    """Wherever a Ctrl-C comes in `open_job`, nobody waits for it, nothing stays locked, and it can be opened again."""
    places = opened_interrupted(place / "count", 10**9, existing=existing)
    assert places > 100
    for at in range(1, places + 1):
        opened_interrupted(place / str(at), at, existing=existing)


def test_an_interrupted_closing_of_a_job_without_a_thread_closes_it(
    place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same for `close`, which is done by its caller; nothing was in hand, so nothing is told as harmed."""

    def closed_interrupted(at: int) -> int:
        with Persistency(place / str(at)) as p:
            job = p.open_job("a")
            with contextlib.suppress(KeyboardInterrupt), Interrupter(at) as interrupter:
                job.close(WAIT)
            job.close(WAIT)
            assert p.open_job("a").count("c").result(WAIT) == 0
        return interrupter.places

    places = closed_interrupted(10**9)
    assert places > 50
    for at in range(1, places + 1):
        closed_interrupted(at)
    assert [record.message for record in caplog.records if "poisoned" in record.message] == []


def test_an_interrupt_while_main_is_asked_whether_it_lives_is_no_end(
    place: Path, monkeypatch: pytest.MonkeyPatch, started: list[str]
) -> None:
    """Before Python 3.13 main counted as dead ever after, and every poster as one that comes after the end."""
    is_alive = threading.Thread.is_alive

    def interrupted(thread: threading.Thread) -> bool:
        if thread is threading.current_thread():
            raise KeyboardInterrupt
        return is_alive(thread)

    if sys.version_info < (3, 13):
        monkeypatch.setattr(threading.Thread, "is_alive", interrupted)
    with Persistency(place) as p:
        p.open_job("a").put("c", (1,), b"x")
        p["a"].flush().result(WAIT)
    assert started == ["starter", "persistency:a"]


def test_a_claim_that_is_dropped_is_given_up(place: Path) -> None:
    """An interrupt may come when it is had, and nobody has it in hand yet."""
    Claim(place / "a.db")
    Claim(place / "a.db").release()
    assert not list(files._claims)


# -- forks and exits ---------------------------------------------------------------------------------------------------


def child(act: Callable[[], object]) -> int:
    """Fork; return how the child ended: 0 if `act` went well there."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            act()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks beside threads
def test_a_fork_leaves_a_job_without_a_thread_as_it_is(place: Path, started: list[str]) -> None:
    """In the child its handle is `Forked`, and other jobs have threads of their own; the parent's goes on napping."""
    with Persistency(place) as p:
        job = p.open_job("a")

        def in_child() -> None:
            pytest.raises(Forked, job.get, "c", (1,))
            pytest.raises(Forked, job.put, "c", (1,), b"x")
            with Persistency(place) as own:
                own.open_job("b").put("c", (1,), b"x")
                own["b"].flush().result(WAIT)

        assert child(in_child) == 0
        assert started == []
        job.put("c", (1,), b"x")
        job.flush().result(WAIT)
        assert started == ["starter", "persistency:a"]
        assert p.open_job("b").get("c", (1,)).result(WAIT) == b"x"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks beside threads
def test_a_fork_in_the_middle_of_an_opening_opens_nothing_in_the_child(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller's clock, or a signal handler, may fork just then."""
    real = DirectoryRoot.open
    mine, codes = os.getpid(), []

    def forks(root: DirectoryRoot, *args: Any) -> SqliteStore:
        store = real(root, *args)
        pid = os.fork()
        if pid:
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        return store

    monkeypatch.setattr(DirectoryRoot, "open", forks)
    p = Persistency(place)
    try:
        job = p.open_job("a")
    except Forked:
        os._exit(7 if os.getpid() != mine else 1)
    except BaseException:
        os._exit(2)
    if os.getpid() != mine:
        os._exit(3)
    assert codes == [7]
    job.put("c", (1,), b"x")
    job.flush().result(WAIT)
    p.close(WAIT)


@pytest.mark.parametrize("write", [False, True])
def test_a_job_without_a_thread_is_left_in_order_at_exit(place: Path, write: bool) -> None:
    """Without `close`: what was committed is there, no log is left, and nothing is said."""
    ends = "import sys; from persistency import Persistency; job = Persistency(sys.argv[1]).open_job('a')\n"
    ends += "job.put('c', (1,), b'x')\n" if write else "job.get('c', (1,)).result()\n"
    ended = subprocess.run(
        [sys.executable, "-c", ends, str(place)], check=False, timeout=60, capture_output=True, text=True
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    log = place / "a.db-wal"
    assert not log.exists() or log.stat().st_size == 0
    with contextlib.closing(sqlite3.connect(place / "a.db")) as found:
        assert found.execute("SELECT value FROM meta WHERE name = 'clean'").fetchone() == (1,)
        assert found.execute("SELECT count(*) FROM kv").fetchone() == (int(write),)


LOCKED = 12  # with five seconds for each the test's time would be over

LEAVES_UNTIDY = f"""
import os, sys
from persistency import Persistency
p = Persistency(sys.argv[1])
for number in range({LOCKED}):
    job = p.open_job(f"job-{{number}}")
    job.put("c", (1,), b"x")
    job.flush().result()
os._exit(0)
"""

ENDS_BESIDE_OTHERS = f"""
import sys
from persistency import Persistency
p = Persistency(sys.argv[1], exit_timeout=float(sys.argv[2]))
jobs = [p.open_job(f"job-{{number}}") for number in range({LOCKED})]
print(*(job.get("c", (1,)).result().decode() for job in jobs), flush=True)
sys.stdin.readline()
"""


@pytest.mark.parametrize("seconds", ["0", "0.5"])
def test_jobs_without_a_thread_whose_files_are_locked_hold_no_exit_up(place: Path, seconds: str) -> None:
    """However many there are: they are tidied up one after another, within `exit_timeout`, and nothing is lost."""
    subprocess.run([sys.executable, "-c", LEAVES_UNTIDY, str(place)], check=True, timeout=60)
    command = [sys.executable, "-c", ENDS_BESIDE_OTHERS, str(place), seconds]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as ending,
        contextlib.ExitStack() as others,
    ):
        assert ending.stdin
        assert ending.stdout
        assert ending.stdout.readline().split() == [b"x"] * LOCKED
        for number in range(LOCKED):
            other = others.enter_context(contextlib.closing(sqlite3.connect(place / f"job-{number}.db", timeout=WAIT)))
            other.execute("BEGIN IMMEDIATE")
        _, said = ending.communicate(b"\n", timeout=30)
    assert ending.returncode == 0
    told = said.decode().splitlines()
    assert all("couldn't be tidied up" in line for line in told)
    assert bool(told) == (seconds != "0")  # the first was waited for, as long as that
    with Persistency(place) as p:
        for number in range(LOCKED):
            assert p.open_job(f"job-{number}").get("c", (1,)).result(WAIT) == b"x"


def test_a_late_first_post_at_exit_is_written(place: Path) -> None:
    """From a hook that runs after ours: there are no threads any more, and its poster serves himself."""
    late = "import atexit, sys\natexit.register(lambda: (job.put('c', (1,), b'x'), job.flush().result()))\n"
    late += "from persistency import Persistency; job = Persistency(sys.argv[1]).open_job('a')"
    ended = subprocess.run([sys.executable, "-c", late, str(place)], check=False, timeout=60, capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, b"")
    with Persistency(place) as p:
        assert p.open_job("a").get("c", (1,)).result(WAIT) == b"x"


def test_what_waits_for_a_thread_that_was_called_for_is_not_written_by_whoever_ends_the_interpreter(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is locked, or a full disk, would hold the exit up beyond `exit_timeout`."""
    may_come = threading.Event()
    come, apply = Worker.come, SqliteStore.apply
    threads: list[int] = []

    def comes(worker: Worker, *args: Any) -> None:
        assert may_come.wait(WAIT)
        come(worker, *args)

    def applies(store: SqliteStore, *args: Any) -> list[Any]:
        threads.append(threading.get_ident())
        return apply(store, *args)

    monkeypatch.setattr(Worker, "come", comes)
    monkeypatch.setattr(SqliteStore, "apply", applies)
    with Persistency(place) as p:
        job = p.open_job("a")
        job.put("c", (1,), b"x")
        worker = p._site._entries["a"].worker
        assert worker is not None
        with monkeypatch.context() as patch:
            patch.setattr(lifecycle, "_exiting", True)
            retired = worker.retire()
            assert not retired.done()
            may_come.set()
            retired.result(WAIT)
        assert job.statistics().committed == 1
        assert threads
        assert threading.get_ident() not in threads
