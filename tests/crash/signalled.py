"""Processes that get signals: `python -m tests.crash.signalled CASE ROOT NUMBER [PLANT]`.

NUMBER is the signal's, or a seed. Rows 0, 1, 2, ... go to the job `alpha`. Where nothing else is said its worker is
held until the exit hook, so that all of them are pending when the signal comes. What a case has to tell is printed.
"""

from __future__ import annotations

import asyncio
import atexit
import json
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tests.crash.forked import FLAGS, PLANTS, WAIT, hold_until_retired, numbers
from tests.crash.held import KEPT, PENDING, Hold, open_all, post, say
from tests.crash.running import PROJECT

CASES: dict[str, Callable[..., None]] = {}
INTERRUPTS = 300


def case(run: Callable[..., None]) -> Callable[..., None]:
    """Make a function a case; it gets the root, and the signal's number or a seed."""
    CASES[run.__name__] = run
    return run


def begin(root: str, count: int = PENDING) -> Any:
    """Install the handlers, and leave rows waiting; return their job."""
    from persistency import install_signal_handlers

    install_signal_handlers()
    hold_until_retired()
    persistency, (job,) = open_all(root, "alpha")
    KEPT.append(persistency)
    post(job, 0, count)
    return job


def wait_for_ever() -> NoReturn:
    """Do nothing, until a signal has this raise something."""
    while True:
        signal.pause()


def signal_when_waiting(reply: Any, number: int) -> None:
    """Have a signal come when somebody has begun to wait for a reply."""
    wait = reply._wait

    def signal_and_wait(timeout: float | None) -> None:
        signal.raise_signal(number)
        wait(timeout)

    reply._wait = signal_and_wait


def call_when_retired(act: Callable[[], None]) -> None:
    """Have something done in another thread once the exit hook has begun to wait for the workers."""
    from persistency import lifecycle

    wait, begun = lifecycle._wait, threading.Event()

    def note_and_wait(*args: Any) -> None:
        begun.set()
        wait(*args)

    lifecycle._wait = note_and_wait
    threading.Thread(target=lambda: begun.wait() and act(), daemon=True).start()


def to_main(number: int) -> None:
    """Send a signal to the main thread."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, number)


# -- with the handlers ------------------------------------------------------------------------------------------------


@case
def idle(root: str, number: int) -> None:
    """Get a signal while main does nothing."""
    begin(root)
    os.kill(os.getpid(), number)
    wait_for_ever()


@case
def flushing(root: str, number: int) -> None:
    """Get a signal while main waits for a flush."""
    flushed = begin(root).flush()
    signal_when_waiting(flushed, number)
    flushed.result()


@case
def waiting_for_room(root: str, number: int) -> None:
    """Get a signal while main waits for room in a full mailbox: that post isn't made."""
    from persistency import Persistency, install_signal_handlers
    from persistency.actor.bounds import Poster

    install_signal_handlers()
    hold_until_retired()
    persistency = Persistency(root)
    KEPT.append(persistency)
    job = persistency.open_job("alpha", mailbox_ops_max=PENDING)

    class Bell:
        """Stands for the lock a poster waits at."""

        def acquire(self, timeout: float) -> None:
            signal.raise_signal(number)
            threading.Event().wait(timeout)

    make = Poster.__init__

    def make_and_replace(poster: Any, *args: Any) -> None:
        make(poster, *args)
        poster.bell = Bell()

    Poster.__init__ = make_and_replace  # type: ignore[method-assign]
    posted = 0
    try:
        while True:
            job.put("rows", (posted,), b"%d" % posted)
            posted += 1
    finally:
        say("posted", posted)


@case
def in_finally(root: str, number: int) -> None:
    """Get a signal, and post in the `finally` blocks it unwinds."""
    job = begin(root, PENDING // 2)
    try:
        os.kill(os.getpid(), number)
        wait_for_ever()
    finally:
        post(job, PENDING // 2, PENDING)


@case
def in_loop(root: str, number: int) -> None:
    """Get a signal in an event loop, from a coroutine, with tasks that wait for the job."""
    job = begin(root)

    async def wait_for_flush() -> None:
        await job.flush()

    async def main() -> None:
        KEPT.append(asyncio.ensure_future(wait_for_flush()))
        await asyncio.sleep(0)
        os.kill(os.getpid(), number)
        await asyncio.sleep(WAIT)

    asyncio.run(main())


@case
def in_idle_loop(root: str, number: int) -> None:
    """Get a signal from another thread while an event loop waits for a flush."""
    job = begin(root)

    async def main() -> None:
        flushed = asyncio.ensure_future(asyncio.wrap_future(job.flush()))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_soon(threading.Thread(target=to_main, args=(number,)).start)
        await flushed

    asyncio.run(main())


def end_again(root: str, number: int, times: int) -> None:
    """Get a signal, and again while the exit hook waits for a worker; that comes back after the second one."""
    from persistency import install_signal_handlers, lifecycle

    install_signal_handlers()
    persistency, (job,) = open_all(root, "alpha")
    KEPT.append(persistency)
    hold, tell, told = Hold(), lifecycle._say, threading.Event()
    post(job, 0, PENDING)

    def tell_and_note(text: str) -> None:
        tell(text)
        told.set()

    def again() -> None:
        for _ in range(times):
            told.clear()
            to_main(number)
            told.wait(WAIT)
        if times == 1:
            hold.release()

    lifecycle._say = tell_and_note
    call_when_retired(again)
    signal.raise_signal(number)


@case
def twice(root: str, number: int) -> None:
    """Get the signal again while the exit hook waits."""
    end_again(root, number, 1)


@case
def three_times(root: str, number: int) -> None:
    """Get the signal twice more while the exit hook waits, for a worker that never comes back."""
    end_again(root, number, 2)


@case
def between_end_and_hook(root: str, number: int) -> None:
    """Get the signal again in an exit hook that runs before the package's, and while threads are waited for."""
    job = begin(root, PENDING // 2)
    atexit.register(signal.raise_signal, number)
    main = threading.main_thread()
    begun = threading.Event()

    def outlive() -> None:
        begun.set()
        main.join()
        post(job, PENDING // 2, PENDING)
        to_main(number)  # it no longer waits for this thread then

    threading.Thread(target=outlive).start()
    begun.wait()
    signal.raise_signal(number)


@case
def own_handlers(_root: str, number: int) -> None:
    """Have handlers of one's own, which are left alone; so are those that ignore a signal."""
    from persistency import install_signal_handlers

    told = []
    signal.signal(number, lambda *_: told.append(number))
    other = signal.SIGHUP if number == signal.SIGTERM else signal.SIGTERM
    signal.signal(other, signal.SIG_IGN)
    install_signal_handlers()
    signal.raise_signal(number)
    signal.raise_signal(other)
    say("told", *told)


@case
def without(root: str, number: int) -> None:
    """Get a signal without the handlers."""
    persistency, (job,) = open_all(root, "alpha")
    KEPT.append(persistency)
    post(job, 0, PENDING // 2)
    job.flush().result(WAIT)
    post(job, PENDING // 2, PENDING)
    os.kill(os.getpid(), number)
    wait_for_ever()


@case
def busy(root: str, _number: int) -> None:
    """Post in three threads without an end, and note in a file how far each has come: for signals from outside."""
    from persistency import install_signal_handlers

    install_signal_handlers()
    persistency, jobs = open_all(root, "row-0", "row-1", "row-2")
    KEPT.append(persistency)
    notes = os.open(f"{root}/notes", os.O_RDWR | os.O_CREAT)
    begun = threading.Semaphore(0)

    def produce(me: int) -> None:
        number = 0
        while True:
            jobs[me].put("rows", (number,), b"%d" % number)
            number += 1
            os.pwrite(notes, number.to_bytes(8, "big"), 8 * me)  # from here on it may not be lost
            if number == 100:
                begun.release()
            if number % 500 == 0:
                jobs[me].flush().result(WAIT)

    for me in (1, 2):
        threading.Thread(target=produce, args=(me,), daemon=True).start()
    for _ in (1, 2):
        begun.acquire()
    say("ready")
    produce(0)


def work(root: str, ready: Any) -> None:
    """Post as a child that is told to end."""
    begin(root)
    ready.set()
    wait_for_ever()


@case
def terminated_child(root: str, _number: int) -> None:
    """Terminate children of multiprocessing that have the handlers."""
    for method in multiprocessing.get_all_start_methods():
        context: Any = multiprocessing.get_context(method)
        ready = context.Event()
        child = context.Process(target=work, args=(f"{root}/{method}", ready))
        child.start()
        assert ready.wait(WAIT)
        child.terminate()
        child.join(WAIT)
        say(method, child.exitcode)


# -- SIGINT -----------------------------------------------------------------------------------------------------------


@case
def interrupts(root: str, seed: int) -> None:
    """Get SIGINT at any moment of posting, reading and waiting: each call is made or not, and the job goes on."""
    from persistency import Persistency, Put, Transaction

    rng = random.Random(seed)
    persistency = Persistency(root)
    job = persistency.open_job("alpha")
    made: dict[int, bool] = {}  # whether the call came back
    inside, left = False, INTERRUPTS
    again, main = threading.Semaphore(0), threading.get_ident()
    beside = persistency.open_job("beside")
    posted = 0

    def interrupt(*_: object) -> None:
        if inside:
            raise KeyboardInterrupt
        again.release()

    def send() -> None:
        nonlocal posted
        while again.acquire() and left > 0:
            post(beside, posted, posted + 5)
            posted += 5
            threading.Event().wait(rng.random() * 0.002)
            signal.pthread_kill(main, signal.SIGINT)

    def add(tx: Transaction, number: int) -> None:
        tx.put("rows", (number,), b"%d" % number)

    verbs: list[Callable[[int], object]] = [
        lambda number: job.put("rows", (number,), b"%d" % number),
        lambda number: job.persist([Put("rows", (number,), b"%d" % number)]),
        lambda number: job.commit(Put("rows", (number,), b"%d" % number)).result(WAIT),
        lambda number: job.run(add, number).result(WAIT),
    ]
    reads: list[Callable[[int], object]] = [
        lambda _number: job.flush().result(WAIT),
        lambda number: job.get("rows", (number,)).result(WAIT),
        lambda _number: job.count("rows").result(WAIT),
        lambda _number: list(job.iterate("rows", page=50)),
        lambda _number: job.drain().result(WAIT),
        lambda _number: job.statistics(),
    ]
    signal.signal(signal.SIGINT, interrupt)
    sender = threading.Thread(target=send)
    sender.start()
    again.release()
    number = 0
    while left > 0:
        try:
            while left > 0:
                number += 1
                made[number] = False
                inside = True
                rng.choice(verbs)(number)
                made[number] = True
                rng.choice(reads)(number)
                inside = False
        except KeyboardInterrupt:
            inside = False
            left -= 1
            again.release()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    again.release()
    sender.join()
    job.flush().result(WAIT)
    found = {row.key.parts[0] for row in job.scan("rows").result(WAIT)}
    lost = [at for at, came_back in made.items() if came_back and at not in found]
    numbers = job.statistics()
    wrong = [f"lost: {len(lost)} calls that came back, the first: {lost[0]}"] if lost else []
    wrong += [f"other: {len(found - made.keys())} rows nobody has made"] if found - made.keys() else []
    # A call that is interrupted inside of its transaction has failed.
    halves = sum(not came_back for came_back in made.values())
    if numbers.pending or numbers.failed > halves or numbers.accepted != numbers.committed + numbers.failed:
        wrong.append(f"other: {numbers}")
    if numbers.committed != len(found):
        wrong.append(f"other: {numbers.committed} operations were committed, and there are {len(found)} rows")
    if beside.count("rows").result(WAIT) != posted:
        wrong.append("lost: rows of the job beside it")
    wrong += job.check().result(WAIT)
    persistency.close(WAIT)
    print(json.dumps({"wrong": wrong, "calls": number, "halves": halves}))


@case
def hook_begins(root: str, number: int) -> None:
    """Get SIGINT as the exit hook is entered, before it has done anything."""
    from persistency import lifecycle

    signal.signal(signal.SIGINT, signal.default_int_handler)
    persistency, (job,) = open_all(root, "alpha")
    KEPT.append(persistency)
    hold_until_retired()
    post(job, 0, PENDING)
    enter, come = lifecycle._Interrupts.__enter__, []

    def interrupt_and_enter(interrupts: Any) -> Any:
        if not come:
            come.append(number)
            signal.raise_signal(signal.SIGINT)
        return enter(interrupts)

    lifecycle._Interrupts.__enter__ = interrupt_and_enter  # type: ignore[method-assign]


@case
def hook_storm(root: str, seed: int) -> None:
    """Get SIGINT again and again, from before main's end on, while a file says how many rows were posted."""
    rng = random.Random(seed)
    persistency, (job,) = open_all(root, "alpha")
    KEPT.append(persistency)
    hold_until_retired()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    post(job, 0, PENDING)
    notes = os.open(f"{root}/notes", os.O_RDWR | os.O_CREAT)

    def send() -> None:
        while True:
            threading.Event().wait(rng.random() * 0.005)
            to_main(signal.SIGINT)

    threading.Thread(target=send, daemon=True).start()
    number = PENDING
    while True:
        os.pwrite(notes, number.to_bytes(8, "big"), 0)
        job.put("rows", (number,), b"%d" % number)
        number += 1


# -- what must have come of it ----------------------------------------------------------------------------------------

# Those that end as `sys.exit(128 + number)` does, with every row written.
ORDERLY = ("idle", "flushing", "in_finally", "in_loop", "in_idle_loop", "twice", "between_end_and_hook")
# What stderr must say of them.
SAID = {
    "twice": f"writing {PENDING} operations",
    "three_times": f"job 'alpha': {PENDING} operations could not be written",
}


def judge(name: str, number: int, root: Path, done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return what is wrong with what a case has left behind, and said."""
    if name == "interrupts":
        return list(json.loads(done.stdout)["wrong"]) if done.returncode == 0 else [f"end: {done.stderr}"]
    if name == "terminated_child":
        told = dict(zip(done.stdout.split()[::2], done.stdout.split()[1::2], strict=True))
        wrong = [f"end: by {method} {code}" for method, code in told.items() if code != "143"]
        return wrong + [f"lost: rows of {at}" for at in told if rows(root / at, "alpha") != list(range(PENDING))]
    code, count = _wanted(name, number, root, done)
    found = rows(root, "alpha")
    told_of = sum(map(int, re.findall(r"(\d+) operations could not be written", done.stderr)))
    wrong = [] if found == list(range(len(found))) else ["hole: the rows are no prefix"]
    if len(found) + told_of < count:
        wrong.append(f"lost: {count - len(found)} rows of {count}, and {told_of} were told")
    if done.returncode != code:
        wrong.append(f"end: {done.returncode}, not {code}: {done.stderr}")
    if SAID.get(name, "") not in done.stderr:
        wrong.append(f"untold: {done.stderr}")
    return wrong


def _wanted(name: str, number: int, root: Path, done: subprocess.CompletedProcess[str]) -> tuple[int, int]:
    """Return the code a case has to end with, and how many rows must be written or told of."""
    if name == "without":
        return -number, PENDING // 2
    if name == "waiting_for_room":
        return 128 + number, int(done.stdout.split()[1])
    if name == "own_handlers":
        return 0 if done.stdout == f"told {number}\n" else -1, 0
    if name == "hook_begins":
        return 0, PENDING
    if name == "hook_storm":
        return done.returncode, int.from_bytes((root / "notes").read_bytes(), "big")
    return 128 + number, PENDING


def rows(root: Path, job_id: str) -> list[int]:
    """Open a job and return the numbers of its rows."""
    from persistency import Persistency

    with Persistency(root) as persistency, persistency.open_job(job_id) as job:
        return numbers(job)


def signal_from_outside(root: Path, number: int, rng: random.Random, python: str = sys.executable) -> list[str]:
    """Send a signal, or two, to a process that posts without an end, at any moment; return what is wrong then."""
    root.mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(
        [python, *FLAGS, "-m", "tests.crash.signalled", "busy", str(root), "0"],
        cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        times = rng.choice([1, 2])
        for _ in range(times):
            time.sleep(rng.random() * 0.1)  # load; nothing relies on its length
            process.send_signal(number)
        try:
            _, errors = process.communicate(timeout=2 * WAIT)
        except subprocess.TimeoutExpired:
            process.kill()
            return [f"hang: still there after {2 * WAIT} s"]
    # At the interpreter's very end, behind every hook, Python gives signals their default meaning again.
    codes = (128 + number, -number)[:times]
    wrong = [] if process.returncode in codes else [f"end: {process.returncode}: {errors[-500:]}"]
    notes = (root / "notes").read_bytes()
    for me in range(3):
        found, posted = rows(root, f"row-{me}"), int.from_bytes(notes[8 * me : 8 * me + 8], "big")
        wrong += [] if found == list(range(len(found))) else [f"hole: job {me}"]
        wrong += [] if len(found) >= posted else [f"lost: {posted - len(found)} rows of job {me}"]
    return wrong


def main() -> None:
    """Run one case."""
    name, root, number, *plants = sys.argv[1:]
    for plant in plants:
        PLANTS[plant]()
    CASES[name](root, int(getattr(signal, number, number)))


if __name__ == "__main__":
    main()
