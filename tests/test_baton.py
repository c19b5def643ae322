"""The baton: one job that several processes, and several users within one, pass to one another."""

from __future__ import annotations

import functools
import gc
import multiprocessing
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from persistency import CBOR, Closed, Forked, JobLocked, Misuse, Overloaded, Persistency, QuotaExceeded, Transaction
from persistency.recipes import Baton, baton_pace, baton_process
from persistency.recipes import baton as baton_module
from persistency.recipes.baton_pace import Pace
from persistency.recipes.runner import as_runner, place_of, poll_of
from persistency.recipes.waiting import Bell, Nap, Steps, adrive, bell_of, drive, unanswered
from tests.loops import InLoop

WAIT = 20.0
PROJECT = Path(__file__).parent.parent


@pytest.fixture
def persistency(tmp_path: Path) -> Iterator[Persistency]:
    """Give an empty root."""
    with Persistency(tmp_path / "root") as opened:
        yield opened


@pytest.fixture
def baton(persistency: Persistency) -> Iterator[Baton]:
    """Give a baton for an empty job."""
    with Baton(persistency, "shared") as made:
        yield made


def count(tx: Transaction) -> int:
    """Count up."""
    return tx.increment("n", ())


def nothing(_tx: Transaction) -> None:
    """Do nothing."""


def started(program: str, root: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a Python program beside the package; `root` and `arguments` are its arguments."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONWARNINGS": "error"}
    command = [sys.executable, "-c", program, root, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


HOLDER = """
import sys
from persistency import Persistency
with Persistency(sys.argv[1]) as p, p.open_job("shared") as job:
    print("open", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(persistency: Persistency) -> Iterator[subprocess.Popen[str]]:
    """Give a process that has the job until it is told something."""
    with started(HOLDER, persistency.root) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
        process.communicate("", timeout=WAIT)
        assert process.returncode == 0


# -- running -------------------------------------------------------------------------------------------------------


def test_it_runs_what_it_is_asked_for_in_order(baton: Baton) -> None:
    """Each call is a transaction of its own, with its arguments; the replies give what the functions return."""
    replies = [baton.run(lambda tx, n: (tx.put("row", (n,), b""), tx.count("row"))[1], n) for n in range(50)]
    assert [reply.result(WAIT) for reply in replies] == list(range(1, 51))


def test_a_function_s_exception_is_its_caller_s_alone(baton: Baton) -> None:
    """What it wrote is undone, and the calls before and behind it are not touched."""

    def fails(tx: Transaction) -> None:
        count(tx)
        raise KeyError("mine")

    before, failed, after = baton.run(count), baton.run(fails), baton.run(count)
    assert (before.result(WAIT), after.result(WAIT)) == (1, 2)
    with pytest.raises(KeyError):
        failed.result(WAIT)

    def leaves(_tx: Transaction) -> None:
        raise SystemExit(3)

    assert isinstance(baton.run(leaves).exception(WAIT), SystemExit)
    assert baton.run(count).result(WAIT) == 3


def test_the_job_is_had_only_while_there_is_work(persistency: Persistency, baton: Baton) -> None:
    """Between two calls anybody may open it, here and elsewhere."""
    baton.run(count).result(WAIT)
    baton.close(WAIT)
    assert not persistency.has_job("shared")
    with started(HOLDER, persistency.root) as process:
        assert process.communicate("", timeout=WAIT) == ("open\n", "")


def test_options_are_those_of_the_job(persistency: Persistency) -> None:
    """They are given to `open_job` each time; a wrong one is told at the first call, an unknown one at once."""
    with Baton(persistency, "small", max_bytes=2) as small, pytest.raises(QuotaExceeded):
        small.run(lambda tx: tx.put("row", (), b"12345")).result(WAIT)
    with pytest.raises(TypeError, match="size"):
        Baton(persistency, "small", size=2)  # type: ignore[call-arg]  # that is the point
    with Baton(persistency, "wrong", max_bytes="2") as wrong, pytest.raises(Misuse):  # type: ignore[typeddict-item]
        wrong.run(nothing).result(WAIT)


async def coroutine(_tx: Transaction) -> None:
    """Not a function that a job runs."""


def generator(_tx: Transaction) -> Iterator[None]:
    """Neither is this."""
    yield


@pytest.mark.parametrize(
    "call",
    [
        lambda p: Baton("root", "a"),  # type: ignore[arg-type]  # these all are wrong
        lambda p: Baton(p, ""),
        lambda p: Baton(Persistency(":memory:"), "a"),
        lambda p: Baton(p, 7),  # type: ignore[arg-type]
        lambda p: Baton(p, "a", wait=-1),
        lambda p: Baton(p, "a", wait=None),  # type: ignore[arg-type]
        lambda p: Baton(p, "a", keep=float("nan")),
        lambda p: Baton(p, "a", poll=0),
        lambda p: Baton(p, "a", exit_timeout=True),
        lambda p: Baton(p, "a").run(None),  # type: ignore[arg-type]
        lambda p: Baton(p, "a").run(coroutine),
        lambda p: Baton(p, "a").run(functools.partial(generator)),
    ],
)
def test_wrong_arguments_raise_at_the_call(persistency: Persistency, call: Callable[[Persistency], Any]) -> None:
    """What is wrong is told where it is written."""
    with pytest.raises(Misuse):
        call(persistency)


def test_it_works_under_every_event_loop(persistency: Persistency, in_loop: InLoop) -> None:
    """A reply is awaited, a baton is left, without the loop being held up."""

    async def main() -> list[int]:
        async with Baton(persistency, "shared") as baton:
            found = [await baton.run(count), await baton.run(count)]
        with pytest.raises(Closed):
            baton.run(count)
        await baton.aclose()
        return found

    assert in_loop(main) == [1, 2]


# -- while others have it ------------------------------------------------------------------------------------------


def test_it_waits_for_the_job(baton: Baton, holder: subprocess.Popen[str]) -> None:
    """What is asked for while another process has the job is done when that has given it back."""
    reply = baton.run(count)
    with pytest.raises(TimeoutError):
        reply.result(0.05)
    assert holder.stdin is not None
    holder.stdin.write("\n")
    holder.stdin.flush()
    assert reply.result(WAIT) == 1


def test_it_gives_up_after_its_wait(persistency: Persistency, holder: subprocess.Popen[str]) -> None:
    """Then the reply says who has the job; each call waits for itself."""
    with Baton(persistency, "shared", wait=0.03) as baton:
        for _ in range(2):
            with pytest.raises(JobLocked) as raised:
                baton.run(count).result(WAIT)
            assert raised.value.pid == holder.pid
    with Baton(persistency, "shared", wait=0) as hasty, pytest.raises(JobLocked):
        hasty.run(count).result(WAIT)


def test_a_full_baton_refuses(
    persistency: Persistency, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory stays bounded, whatever is asked for; what was accepted is done."""
    monkeypatch.setattr(baton_module, "CALLS_MAX", 3)
    with Baton(persistency, "shared") as baton:
        replies = [baton.run(count) for _ in range(3)]
        with pytest.raises(Overloaded):
            baton.run(count)
        holder.communicate("\n", timeout=WAIT)
        assert [reply.result(WAIT) for reply in replies] == [1, 2, 3]


def test_bytes_that_wait_are_bounded_too(
    persistency: Persistency, holder: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few large values are as much as many small ones; one alone is accepted however large it is."""
    monkeypatch.setattr(baton_module, "BYTES_MAX", 100)

    def size(tx: Transaction, body: bytes) -> int:
        tx.put("row", (len(body),), body)
        return len(body)

    with Baton(persistency, "shared") as baton:
        replies = [baton.run(size, bytes(50)), baton.run(size, bytes(50))]
        with pytest.raises(Overloaded):
            baton.run(size, b"x")
        holder.communicate("\n", timeout=WAIT)
        assert [reply.result(WAIT) for reply in replies] == [50, 50]
        assert baton.run(size, bytes(1_000)).result(WAIT) == 1_000
        assert baton._nbytes == 0


def test_an_interrupt_while_its_thread_begins_leaves_one_server(
    persistency: Persistency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The call that was interrupted isn't made, by nobody; the next one is, and closing waits for it."""
    begun: list[threading.Thread] = []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        if not thread.name.startswith("baton:"):
            return
        begun.append(thread)
        monkeypatch.setattr(threading.Thread, "start", start)
        raise KeyboardInterrupt

    with Baton(persistency, "shared") as baton:
        monkeypatch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            baton.run(count)
        begun[0].join(WAIT)
        assert baton._server is None
        assert baton.run(count).result(WAIT) == 1


def test_a_seat_goes_with_the_last_baton_that_wants_it(persistency: Persistency) -> None:
    """A process that has a baton for every tenant it ever served keeps nothing of them."""
    for n in range(20):
        Baton(persistency, f"tenant{n}").close(WAIT)
    one, other = Baton(persistency, "one"), Baton(persistency, "one")
    assert one._seat is other._seat
    gc.collect()
    assert set(baton_process._seats[persistency]) == {"one"}
    one.close(WAIT)
    other.close(WAIT)


def test_a_job_that_cant_be_opened_is_told_to_every_caller(persistency: Persistency) -> None:
    """The real cause comes with each reply, and the next call tries again."""
    path = Path(persistency.root)
    path.mkdir(exist_ok=True)
    (path / "shared.db").write_bytes(b"no database at all" * 100)
    with Baton(persistency, "shared") as baton:
        errors = [reply.exception(WAIT) for reply in [baton.run(count) for _ in range(3)]]
        assert {type(error).__name__ for error in errors} == {"Corrupt"}
        (path / "shared.db").unlink()
        assert baton.run(count).result(WAIT) == 1


def test_a_persistency_that_is_closed(tmp_path: Path) -> None:
    """Nobody can open a job through it any more, and the reply says so."""
    with Persistency(tmp_path) as p:
        baton = Baton(p, "shared")
        assert baton.run(count).result(WAIT) == 1
    with pytest.raises(Closed):
        baton.run(count).result(WAIT)
    baton.close(WAIT)


def test_a_job_that_is_open_here_anyway_is_shared(persistency: Persistency) -> None:
    """The handle of whoever opened it before stays open, through the same `Persistency` and through another."""
    with persistency.open_job("shared") as job, Baton(persistency, "shared") as baton:
        assert baton.run(count).result(WAIT) == 1
        assert job.increment("n", ()).result(WAIT) == 2
        with Persistency(persistency.root) as other, Baton(other, "shared") as theirs:
            assert theirs.run(count).result(WAIT) == 3
        assert not job.closed
        assert baton.run(count).result(WAIT) == 4


def test_batons_of_one_process_take_turns(persistency: Persistency) -> None:
    """Several batons for one job don't close it under one another."""
    batons = [Baton(persistency, "shared") for _ in range(4)]

    def ask(baton: Baton) -> None:
        for _ in range(25):
            baton.run(count).result(WAIT)

    threads = [threading.Thread(target=ask, args=(baton,)) for baton in batons for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert batons[0].run(count).result(WAIT) == 201
    for baton in batons:
        baton.close(WAIT)


def test_it_keeps_the_job_if_it_is_told_to(persistency: Persistency) -> None:
    """`keep`: calls that come one after the other share one opening; closing doesn't wait for the rest of it."""
    opened = 0
    open_job = persistency.open_job

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal opened
        opened += 1
        return open_job(*args, **options)

    persistency.open_job = counted  # type: ignore[method-assign]  # counted on the way
    with Baton(persistency, "shared", keep=3600) as baton:
        assert [baton.run(count).result(WAIT) for _ in range(5)] == [1, 2, 3, 4, 5]
        assert opened == 1
        baton.close(WAIT)


def test_a_job_is_not_kept_from_others_by_work_that_keeps_coming(
    persistency: Persistency, baton: Baton, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process gets its turns while this one asks without a pause."""
    program = """
import sys
from persistency import Persistency
from persistency.recipes import Baton
with Persistency(sys.argv[1]) as p, Baton(p, "shared") as baton:
    for _ in range(10):
        baton.run(lambda tx: tx.increment("theirs", ())).result()
"""
    with started(program, persistency.root) as other:
        while other.poll() is None:
            for reply in [baton.run(count) for _ in range(100)]:
                reply.result(WAIT)
        assert other.communicate(timeout=WAIT) == ("", "")
        assert other.returncode == 0
    assert baton.run(lambda tx: tx.increment("theirs", (), 0)).result(WAIT) == 10


HAMMER = """
import sys
from persistency import Persistency
from persistency.recipes import Baton
with Persistency(sys.argv[1]) as p, Baton(p, "shared", wait=60) as baton:
    sys.stdin.readline()
    for _ in range(int(sys.argv[2])):
        baton.run(lambda tx: tx.increment("n", ())).result()
"""


def test_eight_processes_all_get_through(persistency: Persistency) -> None:
    """Each of those who ask without a pause gets all of its turns within the wait; every one counts."""
    processes = [started(HAMMER, persistency.root, "25") for _ in range(8)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.communicate(timeout=60) == ("", "")
        assert process.returncode == 0
    with persistency.open_job("shared") as job:
        assert job.increment("n", (), 0).result(WAIT) == 200


class Watched(Pace):
    """A pace whose file says what a test says."""

    def __init__(self, said: list[tuple[int, bool] | None]) -> None:
        super().__init__()
        self.path = Path("shared.db")
        self.said = said
        self.looks = 0

    def _look(self) -> tuple[int, bool] | None:
        self.looks += 1
        return self.said[min(self.looks, len(self.said)) - 1]


@pytest.mark.parametrize(
    ("said", "looks"),
    [
        ([(1, True), (1, True), (2, True)], 3),  # it was written as it was closed
        ([(1, True), (1, False)], 2),  # its log was folded in, and is gone
        ([(1, True), None], 2),  # it was removed
    ],
)
def test_who_waits_tries_when_the_file_says_so(
    said: list[tuple[int, bool] | None], looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trying costs much more than looking, and each look is a millisecond later."""
    slept: list[float] = []
    monkeypatch.setattr(baton_pace, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(baton_pace, "sleep", slept.append)
    pace = Watched(said)
    pace.wait(1)
    assert (pace.looks, len(slept)) == (looks, looks - 1)


def test_who_waits_tries_anyway_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was killed leaves the file as it is; before it is known there is nothing to look at."""
    slept: list[float] = []
    monkeypatch.setattr(baton_pace, "monotonic", lambda: sum(slept))
    monkeypatch.setattr(baton_pace, "sleep", slept.append)
    pace = Watched([(1, True)])
    pace.wait(1)
    assert pace.looks > 5
    assert sum(slept) < 0.03
    pace.path = None
    for tries in range(1, 100):
        slept.clear()
        pace.wait(tries)
        assert len(slept) == 1
        assert slept[0] < baton_pace._PAUSE_S  # so that a pause is long enough for everybody


def test_the_pause_comes_after_so_much_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work that is short, or that has pauses of its own, isn't held up."""
    time = 100.0
    slept: list[float] = []
    monkeypatch.setattr(baton_pace, "monotonic", lambda: time)
    monkeypatch.setattr(baton_pace, "sleep", slept.append)
    pace = Pace()
    for free in (0.0, 0.0, 0.01, 0.0, 0.001, 0.0):
        pace.give_others_a_chance()
        assert slept == []
        begun, time = time, time + 0.01
        pace.let_go(begun)
        time += free
    pace.give_others_a_chance()
    assert slept == [pytest.approx(baton_pace._PAUSE_S)]
    pace.let_go(time)
    pace.give_others_a_chance()
    assert len(slept) == 1


# -- what can't be waited for --------------------------------------------------------------------------------------


def test_a_function_that_asks_its_own_baton_is_refused(baton: Baton) -> None:
    """It would wait for itself: `Misuse`, for `run` and `close`, and the baton goes on."""
    with pytest.raises(Misuse):
        baton.run(lambda _tx: baton.run(count)).result(WAIT)
    with pytest.raises(Misuse):
        baton.run(lambda _tx: baton.close()).result(WAIT)
    assert baton.run(count).result(WAIT) == 1


def test_a_callback_may_ask_and_wait(baton: Baton, holder: subprocess.Popen[str]) -> None:
    """In the thread that answers, a call is done at once; it is told when that can't be."""
    found: Future[Any] = Future()

    def ask(_reply: Future[int]) -> None:
        try:
            found.set_result(baton.run(count).result(WAIT))
        except Exception as error:
            found.set_exception(error)

    reply = baton.run(count)
    reply.add_done_callback(ask)
    holder.communicate("\n", timeout=WAIT)
    assert (reply.result(WAIT), found.result(WAIT)) == (1, 2)


def test_a_callback_of_a_call_that_failed_is_told_the_same(persistency: Persistency) -> None:
    """It doesn't wait for a thread that is busy telling it."""
    found: Future[Any] = Future()
    with started(HOLDER, persistency.root) as holder, Baton(persistency, "shared", wait=0.02) as baton:
        assert holder.stdout is not None
        holder.stdout.readline()
        reply = baton.run(count)
        reply.add_done_callback(lambda _reply: found.set_result(baton.run(count).exception(WAIT)))
        assert isinstance(reply.exception(WAIT), JobLocked)
        assert isinstance(found.result(WAIT), JobLocked)
        holder.communicate("\n", timeout=WAIT)


# -- the end -------------------------------------------------------------------------------------------------------


def test_closing_does_what_was_asked_for(persistency: Persistency, holder: subprocess.Popen[str]) -> None:
    """It takes nothing more, and is over when all is done; a `close` that gives up says so."""
    baton = Baton(persistency, "shared")
    replies = [baton.run(count) for _ in range(3)]
    with pytest.raises(TimeoutError):
        baton.close(0.02)
    with pytest.raises(Closed):
        baton.run(count)
    holder.communicate("\n", timeout=WAIT)
    baton.close(WAIT)
    assert baton.closed
    assert [reply.result(0) for reply in replies] == [1, 2, 3]
    baton.close(WAIT)


EXITS = """
import sys, threading, atexit, time
mode, root = sys.argv[2], sys.argv[1]
if mode == "early hook":
    atexit.register(lambda: baton.run(count))  # comes after the package's own hooks
from persistency import Persistency
from persistency.recipes import Baton
def count(tx):
    return tx.increment("n", ())
p = Persistency(root)
baton = Baton(p, "shared", exit_timeout=0.1 if mode == "timeout" else 30)
if mode == "late hook":
    atexit.register(lambda: baton.run(count).result())
elif mode == "thread":
    def late():
        threading.main_thread().join()
        baton.run(count).result()
    threading.Thread(target=late).start()
elif mode == "keep":
    baton = Baton(p, "shared", keep=3600)
replies = [baton.run(count) for _ in range(20)]
if mode == "raise":
    raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("mode", "code", "counted"),
    [
        ("plain", 0, 20),
        ("raise", 3, 20),
        ("keep", 0, 20),
        ("late hook", 0, 21),
        ("early hook", 0, 21),
        ("thread", 0, 21),
    ],
)
def test_the_exit_waits_for_what_was_asked_for(persistency: Persistency, mode: str, code: int, counted: int) -> None:
    """Nothing is lost by returning from main, and hooks and threads that come late are served."""
    with started(EXITS, persistency.root, mode) as process:
        out, err = process.communicate(timeout=60)
    with persistency.open_job("shared") as job:
        assert (process.returncode, out, err, job.increment("n", (), 0).result(WAIT)) == (code, "", "", counted)


def test_what_could_not_be_done_at_exit_is_named(persistency: Persistency, holder: subprocess.Popen[str]) -> None:
    """Another process has the job for longer than the exit may take: stderr says how much is lost."""
    with started(EXITS, persistency.root, "timeout") as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "")
    assert "baton 'shared': 20 calls could not be run at exit" in err
    holder.communicate("\n", timeout=WAIT)


def test_a_forked_child_is_told(baton: Baton, holder: subprocess.Popen[str]) -> None:
    """In a child the parent's baton and its replies raise `Forked`, and nobody waits; the parent goes on."""
    reply = baton.run(count)  # it waits for the holder
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12 on: there are threads
        child = os.fork()
    if child == 0:
        code = 1
        try:
            told = 0
            for ask in (lambda: baton.run(count), baton.close, lambda: reply.result(WAIT)):
                try:
                    ask()
                except Forked:
                    told += 1
            code = 0 if told == 3 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    holder.communicate("\n", timeout=WAIT)
    assert reply.result(WAIT) == 1
    assert baton.run(count).result(WAIT) == 2


def in_child(root: str) -> None:
    """Ask for something and return, in a child of multiprocessing."""
    baton = Baton(Persistency(root), "shared")
    for _ in range(10):
        baton.run(count)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_of_multiprocessing_does_what_it_was_asked_for(persistency: Persistency, method: str) -> None:
    """Its exit is one, too, though `atexit` isn't called there before Python 3.13."""
    process = multiprocessing.get_context(method).Process(target=in_child, args=(persistency.root,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    with persistency.open_job("shared") as job:
        assert CBOR.decode(job.get("n", ()).result(WAIT) or b"\x00") == 10


# -- runners, bells, steps -----------------------------------------------------------------------------------------


def test_a_runner_is_a_job_or_a_baton(persistency: Persistency, baton: Baton) -> None:
    """They are told from everything else, and who waits on a baton looks by itself."""
    with persistency.open_job("shared") as job:
        assert (as_runner(job), as_runner(baton)) == (job, baton)
        assert (poll_of(job), poll_of(baton)) == (None, baton.poll)
        assert place_of(job) == place_of(baton)
    for wrong in (None, "job", persistency):
        with pytest.raises(Misuse):
            as_runner(wrong)


def test_there_is_one_bell_for_a_thing_of_a_job(persistency: Persistency, baton: Baton) -> None:
    """Found through every handle on the job; another name, another job, another memory have their own."""
    with (
        persistency.open_job("shared") as job,
        Persistency(persistency.root) as other,
        other.open_job("shared") as theirs,
        persistency.open_job("b") as b,
        Persistency(":memory:") as memory,
        memory.open_job("shared") as remembered,
    ):
        bells = [bell_of(one, "x") for one in (job, theirs, baton)]
        assert bells[0] is bells[1] is bells[2]
        others = [bell_of(job, "y"), bell_of(b, "x"), bell_of(remembered, "x")]
        assert len({id(bell) for bell in [bells[0], *others]}) == 4


def test_a_bell_wakes_all_or_some() -> None:
    """The longest listening first; who has left is not woken."""
    bell = Bell()
    replies = [bell.listen() for _ in range(4)]
    bell.leave(replies[1])
    bell.ring(2)
    assert [reply.done() for reply in replies] == [True, False, True, False]
    bell.ring()
    assert [reply.done() for reply in replies] == [True, False, True, True]
    assert bell.listeners == 0


def test_one_listener_watches_the_clock() -> None:
    """It is the one who wakes first; when it leaves, another one takes over."""
    bell = Bell()
    first, second = bell.listen(), bell.listen()
    assert bell.lead(first, 10.0)
    assert not bell.lead(second, 11.0)
    assert bell.lead(second, 9.0)
    bell.leave(second)
    assert bell.lead(first, 12.0)


def test_steps_are_driven_by_a_thread_or_a_loop(in_loop: InLoop) -> None:
    """Answers are sent, what a reply raises is thrown, a nap says whether its reply was settled."""

    def steps(fails: bool) -> Steps[list[Any]]:
        found: list[Any] = [(yield Nap(None, 0)), (yield Nap(unanswered()[1], 0.001))]
        future, reply = unanswered()
        timer = threading.Timer(0.001, lambda: future.set_exception(OSError()) if fails else future.set_result(5))
        timer.start()
        found.append((yield Nap(reply, WAIT)))
        try:
            found.append((yield reply))
        except OSError as error:
            found.append(type(error))
        return found

    async def main(fails: bool) -> list[Any]:
        return await adrive(steps(fails))

    for fails, last in ((False, 5), (True, OSError)):
        assert drive(steps(fails)) == [False, False, True, last]
        assert in_loop(main, fails) == [False, False, True, last]


def test_steps_that_are_left_tidy_up(in_loop: InLoop) -> None:
    """Whoever stops driving them closes them, and what they raise is what the driver raises."""
    tidied = []

    def steps() -> Steps[None]:
        try:
            yield Nap(unanswered()[1], 0.001)
            raise LookupError("mine")
        finally:
            tidied.append(1)

    async def main() -> None:
        await adrive(steps())

    with pytest.raises(LookupError):
        drive(steps())
    with pytest.raises(LookupError):
        in_loop(main)
    assert tidied == [1, 1]
