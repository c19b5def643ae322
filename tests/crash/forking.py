"""Processes that fork while they have jobs open: `python -m tests.crash.forking CASE ROOT [ARGUMENT ...]`.

With `--plant NAME` the engine is spoilt first, with `--limit SECONDS` a child has no longer than that. What a case has
found is printed as one object of JSON: `wrong` is a list of complaints, each "kind: what".
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import faulthandler
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from tests.crash.forked import (
    CHILD_SECONDS,
    ENDS,
    PLANTS,
    WAIT,
    Gate,
    Leave,
    be_child,
    files,
    forked,
    hold_until_retired,
    limit_children,
    missing,
    no_upkeep,
    numbers,
    play,
    third_process,
    touched,
    watch,
)
from tests.crash.held import KEPT, PENDING, post

if TYPE_CHECKING:
    from persistency import Job, Persistency

CASES: dict[str, Callable[..., list[str]]] = {}


def case(run: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """Make a function a case; it gets the root and what else was said, and returns its complaints."""
    CASES[run.__name__] = run
    return run


# -- every handle -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def aside(act: Callable[[], object]) -> Iterator[threading.Thread]:
    """Have something done in another thread, which is waited for at the end."""
    thread = threading.Thread(target=act)
    thread.start()
    try:
        yield thread
    finally:
        if threading.current_thread().ident != thread.ident and thread.is_alive():
            thread.join(WAIT)


def handled(root: Path, persistency: Persistency, job: Job) -> Any:
    """Return every kind of handle there is to a job."""
    from tests.crash import inherited

    handles = inherited.Handles()
    handles.add_views(persistency, job)
    handles.add("job", job, inherited.JOB | inherited.backup_verb(root.parent / "copy.db"))
    handles.add("persistency", persistency, inherited.PERSISTENCY)
    return handles


@case
def idle(root: Path) -> list[str]:
    """Fork with a job that has nothing to do, and with requests that wait for changes."""
    from persistency import Persistency
    from tests.crash.inherited import READS, backup_verb

    no_upkeep()
    persistency = Persistency.instance(root)
    job = persistency.open_job("alpha", feed_changes_max=100, sync_interval=None)
    post(job, 0, 100)
    handles = handled(root, persistency, job)
    handles.add("reader", persistency.open_reader("alpha"), READS | backup_verb(root.parent / "copy.db"))
    handles.add("class", Persistency, {
        "instance": lambda kind: kind.instance(),
        "instance of the root": lambda kind: kind.instance(root),
        "instance of another": lambda kind: kind.instance(root.parent / "another"),
    })  # fmt: skip
    last = job.version().result()
    handles.waiting = {f"changes {at}": job.changes(last, 1, wait=True) for at in range(3)}
    handles.waiting["changes, mapped"] = job.changes(last, 1, wait=True).map(len)
    job.flush(sync=True).result()
    before = files(root)
    wrong = forked(handles.wrong)
    wrong += touched(before, files(root))
    if wrong:
        return wrong  # the parent may not be able to go on
    post(job, 100, 110)
    told = [reply.result(WAIT) for reply in handles.waiting.values()]
    wrong += [] if told[0][0].version > last and told[3] == 1 else [f"lost: those who wait were told {told}"]
    return wrong + missing("the parent's job", job, 110)


@case
def busy(root: Path) -> list[str]:
    """Fork while a group is being written, with requests in it and behind it, and no end to be seen."""
    from persistency import Persistency, Put

    no_upkeep()
    persistency = Persistency(root)
    job = persistency.open_job("alpha", feed_changes_max=100, sync_interval=None)
    gate = Gate()
    post(job, 0, 50)
    handles = handled(root, persistency, job)
    gate.close()
    job.put("rows", (50,), b"50")
    gate.wait()

    def ask(name: str) -> None:
        handles.waiting |= {
            f"get {name}": job.get("rows", (1,)),
            f"get {name}, mapped": job.get("rows", (1,)).map(len),
            f"scan {name}": job.scan("rows"),
            f"commit {name}": job.commit(Put("others", (name,), b"")),
            f"flush {name}": job.flush(),
        }

    ask("in the group")
    gate.let_one_through()
    gate.wait()
    ask("behind it")
    handles.waiting["drain"] = job.drain() if not job.drain().done() else handles.waiting["flush behind it"]
    before = files(root)
    wrong = forked(handles.wrong)
    wrong += touched(before, files(root))
    gate.open()
    for name, reply in handles.waiting.items():
        answer = reply.result(WAIT)
        if name.startswith("get") and answer not in (b"1", 1):
            wrong.append(f"lost: {name} was answered with {answer!r}")
    return wrong + missing("the parent's job", job, 51)


@case
def settling(root: Path) -> list[str]:
    """Fork when answers have left the worker's hands, and haven't come to those who wait."""
    from persistency import Persistency
    from persistency.actor import settling
    from tests.crash.inherited import Handles

    job = Persistency(root).open_job("alpha")
    gate, between, go_on = Gate(), threading.Event(), threading.Event()
    settle_all = settling.settle_all

    def slowly(answers: Any) -> None:
        if answers and threading.current_thread().name == "persistency:alpha":
            between.set()
            go_on.wait(WAIT)
        settle_all(answers)

    gate.close()
    job.put("rows", (0,), b"0")
    gate.wait()
    handles = Handles()
    handles.waiting = {"get": job.get("rows", (0,)), "mapped": job.get("rows", (0,)).map(len), "flush": job.flush()}
    settling.settle_all = slowly
    gate.let_one_through()
    gate.wait()
    gate.open()
    assert between.wait(WAIT)
    # Of these nobody knows any more but the thread that was about to settle them.
    wrong = forked(handles.wrong)
    go_on.set()
    told = [reply.result(WAIT) for reply in handles.waiting.values()]
    return wrong + ([] if told == [b"0", 1, None] else [f"lost: the answers were {told}"])


@case
def resting(root: Path) -> list[str]:
    """Fork while a job rests, with requests that wait for a place."""
    from persistency import Persistency

    no_upkeep()
    persistency = Persistency(root, max_live_jobs=1)
    job, other = persistency.open_job("alpha", feed_changes_max=100, sync_interval=None), None
    post(job, 0, 20)
    handles = handled(root, persistency, job)
    persistency.close_job("shared")
    handles.tried = [tried for tried in handles.tried if tried[0] not in ("shared", "collection", "pool")]
    job.flush(sync=True).result()
    other = persistency.open_job("other")
    begun, end = threading.Event(), threading.Event()

    def keep(_tx: Any) -> None:
        begun.set()
        end.wait(WAIT)

    with aside(lambda: other.run(keep).result(WAIT)):
        assert begun.wait(WAIT)
        assert job.statistics().state == "idle"
        before = files(root)
        job.put("rows", (20,), b"20")
        handles.waiting = {"get": job.get("rows", (20,)), "count": job.count("rows"), "flush": job.flush()}
        wrong = forked(handles.wrong)
        wrong += touched(before, files(root))
        end.set()
        told = [reply.result(WAIT) for reply in handles.waiting.values()]
    wrong += [] if told == [b"20", 21, None] else [f"lost: the answers were {told}"]
    return wrong + missing("the parent's job", job, 21)


@case
def memory(root: Path) -> list[str]:
    """Fork with a job in memory: the child's is another one, and begins empty."""
    from persistency import Persistency
    from tests.crash import inherited

    persistency = Persistency(":memory:")
    job = persistency.open_job("alpha", feed_changes_max=100)
    post(job, 0, 20)
    handles = inherited.Handles()
    handles.add_views(persistency, job)
    handles.add("job", job, inherited.JOB)
    handles.add("persistency", persistency, {**inherited.PERSISTENCY})

    def act() -> list[str]:
        wrong = list(handles.wrong())
        with Persistency(":memory:") as mine, mine.open_job("alpha") as own:
            found = numbers(own)
            post(own, 0, 5)
            return wrong + ([f"other: it begins with {found}"] if found else []) + missing("the child's", own, 5)

    return forked(act) + missing("the parent's job", job, 20)


# -- inside of run ----------------------------------------------------------------------------------------------------


@case
def in_run(root: Path, where: str) -> list[str]:
    """Fork inside of a function that a job runs, in the caller's thread or in the worker's."""
    import asyncio

    from persistency import Forked, Persistency, Transaction
    from tests.crash.inherited import not_forked

    job = Persistency(root).open_job("alpha")
    wrong: list[str] = []
    mine = threading.get_ident()

    def fork_here(tx: Transaction) -> str:
        tx.put("rows", (0,), b"0")
        assert (threading.get_ident() == mine) == (where == "caller")

        def act() -> list[str]:
            verbs: dict[str, Callable[[], object]] = {
                "tx.put": lambda: tx.put("rows", (9,), b"child"),
                "tx.get": lambda: tx.get("rows", (0,)),
                "tx.count": lambda: tx.count("rows"),
                "tx.delete_range_acked": lambda: tx.increment("rows", ("counter",)),
                "job.put": lambda: job.put("rows", (9,), b"child"),
                "job.get": lambda: job.get("rows", (9,)),
                "job.flush": job.flush,
                "job.close": job.close,
            }
            found = [wrong for verb, call in verbs.items() for wrong in not_forked(verb, call)]
            with Persistency(root) as persistency, persistency.open_job("child") as own:
                post(own, 0, 10)
            return found

        wrong.extend(forked(act))
        tx.put("rows", (1,), b"1")
        return "done"

    async def awaited() -> str:
        return await job.run(fork_here)

    answer = job.run(fork_here).result(WAIT) if where == "caller" else asyncio.run(awaited())
    wrong += [] if answer == "done" else [f"other: the parent's run answered {answer!r}"]
    wrong += missing("the parent's job", job, 2)
    # And one whose child goes on where it is: the function returns there as well.
    read, write = os.pipe()
    parent = os.getpid()

    def fork_and_return(tx: Transaction) -> int:
        tx.put("rows", (2,), b"2")
        return os.fork()

    if where == "caller":
        try:
            pid = job.run(fork_and_return).result(WAIT)
        except BaseException as error:
            if os.getpid() == parent:
                raise
            told = [] if isinstance(error, Forked) else [f"handle: run raised {error!r} in the child"]
            be_child(lambda: told, write, "_exit")
        if not pid:
            be_child(lambda: ["handle: run was answered in the child"], write, "_exit")
        os.close(write)
        wrong += watch(pid, read, 0, "the child of run")
        wrong += missing("the parent's job", job, 3)
    job.close()
    with Persistency(root) as persistency, persistency.open_job("child") as own:
        return wrong + missing("the child's job", own, 10)


# -- a child's own jobs -----------------------------------------------------------------------------------------------


@case
def own_jobs(root: Path, end: str) -> list[str]:
    """Fork beside a busy worker; the child leaves rows waiting in jobs of its own and ends."""
    from persistency import JobLocked, Persistency

    job = Persistency.instance(root / "one").open_job("alpha")
    post(job, 0, 1_000)
    parent = os.getpid()
    log = root / "one" / "alpha.db-wal"
    job.flush().result(WAIT)
    before = log.stat().st_ino

    def act() -> list[str]:
        wrong = []
        Persistency.reset()
        mine = Persistency.instance(root / "one")
        other = Persistency(root / "two")
        try:
            mine.open_job("alpha")
            wrong.append("lock: the child has opened the parent's job")
        except JobLocked as error:
            wrong += [] if error.pid == parent else [f"lock: the child was told of {error.pid}, not {parent}"]
        if end != "_exit":
            hold_until_retired()
        for at, persistency in enumerate((mine, other)):
            KEPT.append(persistency)
            own = persistency.open_job(f"child-{end}", mailbox_ops_max=4 * PENDING)
            post(own, 0, PENDING)
            if end == "_exit":
                own.close()
            elif at == 0 and own.statistics().pending != PENDING:
                wrong.append(f"other: {own.statistics().pending} operations wait, not {PENDING}")
        return wrong

    with aside(lambda: post(job, 1_000, 3_000)):
        wrong = forked(act, end=end)
    post(job, 3_000, 4_000)
    wrong += missing("the parent's job", job, 4_000)
    if log.stat().st_ino != before:
        wrong.append("file: the parent's log was replaced")
    for place in ("one", "two"):
        with Persistency(root / place) as persistency, persistency.open_job(f"child-{end}") as own:
            wrong += missing(f"the child's job in {place}", own, PENDING)
    return wrong


@case
def locks(root: Path) -> list[str]:
    """A job stays its process' while children come and go; and is free when that gives it up, while a child lives."""
    from persistency import Persistency

    persistency = Persistency(root)
    job = persistency.open_job("alpha")
    post(job, 0, 10)
    wrong = []
    for end in ENDS:
        wrong += forked(list, end=end)
    read, write = os.pipe()
    alive, held = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(held)
        os.read(alive, 1)  # until the parent lets it go
        be_child(list, write, "return")
    os.close(write)
    if (told := third_process(root)) != {"pid": os.getpid()}:
        wrong.append(f"lock: beside its owner {told}")
    persistency.close()
    if (told := third_process(root)) != {"open": 10}:
        wrong.append(f"lock: after its owner has closed it {told}")
    with Persistency(root) as again, again.open_job("alpha") as job:
        wrong += missing("the parent's job", job, 10)
        if (told := third_process(root)) != {"pid": os.getpid()}:
            wrong.append(f"lock: opened again {told}")
        os.close(held)
        wrong += watch(pid, read, 0, "the child that lives on")
        if (told := third_process(root)) != {"pid": os.getpid()}:
            wrong.append(f"lock: with the child gone {told}")
    return wrong


@case
def reopening(root: Path, beside: str) -> list[str]:
    """Close jobs and open them again while another thread starts processes: nobody else has them."""
    from persistency import JobLocked, Persistency

    stop = threading.Event()
    wrong: list[str] = []

    def start() -> None:
        while not stop.is_set():
            if beside == "forks":
                wrong.extend(forked(list))
            else:
                subprocess.run([sys.executable, "-S", "-c", ""], check=True)

    with Persistency(root) as persistency, aside(start):
        try:
            for number in range(40):
                with persistency.open_job("alpha") as job:
                    job.put("rows", (number,), b"%d" % number)
                if number % 5 == 4:
                    persistency.open_job("beta").close()
                    persistency.drop_job("beta")
        except JobLocked as error:
            wrong.append(f"lock: opened for the {number + 1}th time: {error!r}")
        finally:
            stop.set()
    with Persistency(root) as persistency, persistency.open_job("alpha") as job:
        return wrong[:5] + missing("the job", job, number + 1)


@case
def reports(root: Path) -> list[str]:
    """What has failed in the parent is told there, and by nobody else."""
    import gc
    import logging

    from persistency import Check, Conflict, Persistency, Put, WriteFailed

    told: list[int] = []
    persistency = Persistency(root)
    job = persistency.open_job("alpha", on_error=lambda _job_id, failures: told.append(len(failures)))
    logging.getLogger("persistency").addHandler(logging.NullHandler())
    logging.getLogger("persistency").propagate = False
    failing = [Check("rows", (0,), 99), Put("rows", (0,), b"never")]
    replies = [job.commit(failing)]
    job.persist(failing)
    job.version().result()
    while not told:  # on_error has a thread of its own
        threading.Event().wait(0.001)
    before = list(told)

    def act() -> list[str]:
        replies.clear()
        gc.collect()
        return [] if told == before else [f"other: the child was told of {told}"]

    wrong = forked(act, end="return")
    try:
        replies.pop().result()
        wrong.append("other: the parent's commit didn't fail")
    except Conflict:
        pass
    try:
        job.flush().result()
        wrong.append("lost: the parent's flush raised nothing")
    except WriteFailed as failed:
        wrong += [] if len(failed.failures) == 2 else [f"lost: {failed!r}"]
    return wrong


# -- awkward places ---------------------------------------------------------------------------------------------------


def use_own(root: Path, name: str, job: Job) -> Iterator[str]:
    """In a child: see that the parent's job is refused, and write to one of its own."""
    from persistency import Persistency
    from tests.crash.inherited import not_forked

    yield from not_forked("job.delete_acked", lambda: job.delete_acked("rows", (0,)))
    yield from not_forked("job.put", lambda: job.put("rows", (-1,), b"child"))
    yield from not_forked("job.flush", job.flush)
    with Persistency(root) as persistency, persistency.open_job(name) as own:
        post(own, 0, 10)
        yield from missing("the child's job", own, 10)


@case
def plain(root: Path) -> list[str]:
    """Fork beside a job that has nothing to do."""
    from persistency import Persistency

    job = Persistency(root).open_job("alpha")
    post(job, 0, 10)
    job.flush().result(WAIT)
    return forked(lambda: use_own(root, "child", job)) + missing("the parent's job", job, 10)


@case
def in_handler(root: Path) -> list[str]:
    """Fork in a signal handler, whatever the thread was doing: posting, waiting, or forking itself."""
    from persistency import Persistency

    job = Persistency(root).open_job("alpha")
    wrong: list[str] = []
    children = 0

    def handler(*_: object) -> None:
        nonlocal children
        children += 1
        wrong.extend(forked(lambda: use_own(root, f"child-{children}", job)))
        again.release()

    signal.signal(signal.SIGUSR1, handler)
    main, stop, again = threading.get_ident(), threading.Event(), threading.Semaphore(1)

    def interrupt() -> None:
        while again.acquire(timeout=WAIT) and not stop.wait(0.001 * (children % 4)):
            signal.pthread_kill(main, signal.SIGUSR1)

    number = 0
    deadline = monotonic() + WAIT
    with aside(interrupt):
        while children < 15 and monotonic() < deadline:
            job.put("rows", (number,), b"%d" % number)
            number += 1
            if number % 7 == 0:
                job.get("rows", (number - 1,)).result(WAIT)
            if number % 31 == 0:
                job.flush().result(WAIT)
            if number % 50 == 0:
                wrong.extend(forked(partial(use_own, root, f"plain-{number}", job)))
        stop.set()
        again.release()
    wrong += [] if children >= 10 else [f"other: only {children} forks in a handler"]
    job.flush().result(WAIT)
    return wrong + missing("the parent's job", job, number)


@case
def nested(root: Path) -> list[str]:
    """Fork in a signal handler that has come in the middle of another fork, between its hooks."""
    from persistency import Persistency, lifecycle

    job = Persistency(root).open_job("alpha")
    wrong: list[str] = []
    make, depth = lifecycle._Fork, 0

    def handler(*_: object) -> None:
        wrong.extend(forked(lambda: use_own(root, "inner", job)))

    class Interrupted(make):  # type: ignore[misc, valid-type]  # the same, and a signal comes when it has begun
        def __init__(self) -> None:
            nonlocal depth
            super().__init__()
            depth += 1
            if depth == 1:
                signal.raise_signal(signal.SIGUSR1)

    signal.signal(signal.SIGUSR1, handler)
    lifecycle._Fork = Interrupted  # type: ignore[misc]
    post(job, 0, 10)
    wrong += forked(lambda: use_own(root, "outer", job))
    assert depth == 2
    post(job, 10, 20)
    job.flush().result(WAIT)
    return wrong + missing("the parent's job", job, 20)


@case
def in_threads(root: Path) -> list[str]:
    """Fork in several threads at once, beside one that posts."""
    from persistency import Persistency

    job = Persistency(root).open_job("alpha")
    wrong: list[str] = []
    started = threading.Barrier(5)

    def work(me: int) -> None:
        started.wait(WAIT)
        for number in range(4):
            name = f"child-{me}-{number}"
            wrong.extend(forked(partial(use_own, root, name, job), name=name))

    threads = [threading.Thread(target=work, args=(me,)) for me in range(4)]
    for thread in threads:
        thread.start()
    started.wait(WAIT)
    number = 0
    while any(thread.is_alive() for thread in threads):
        post(job, number, number + 10)
        number += 10
        job.flush().result(WAIT)
    return wrong + missing("the parent's job", job, number)


@case
def in_callbacks(root: Path) -> list[str]:
    """Fork in a reply's callback, in `on_error`, in an errand's progress, and in an event loop."""
    import asyncio
    import logging

    from persistency import Check, Persistency

    logging.getLogger("persistency").addHandler(logging.NullHandler())
    logging.getLogger("persistency").propagate = False
    wrong: list[str] = []
    places: list[str] = []
    told = threading.Event()

    def fork_in(place: str) -> None:
        places.append(place)
        wrong.extend(f"{wrong} (in {place})" for wrong in forked(lambda: use_own(root, place, job)))

    def on_error(_job_id: str, _failures: object) -> None:
        fork_in("on_error")
        told.set()

    job = Persistency(root).open_job("alpha", on_error=on_error)
    post(job, 0, 1_000)
    gate = Gate()
    gate.close()
    post(job, 1_000, 1_001)
    gate.wait()
    reply = job.get("rows", (0,))
    reply.add_done_callback(lambda _reply: fork_in("callback"))
    gate.open()
    reply.result(WAIT)
    job.persist(Check("rows", (0,), 10**6))
    told.wait(WAIT)
    job.backup(root.parent / "copy.db", lambda *_: "progress" in places or fork_in("progress")).result(WAIT)

    async def main() -> None:
        waiting = asyncio.ensure_future(asyncio.wait_for(job.count("rows"), WAIT))
        fork_in("loop")
        assert await waiting == 1_001

    asyncio.run(main())
    wrong += [] if places == ["callback", "on_error", "progress", "loop"] else [f"other: only {places}"]
    with contextlib.suppress(Exception):  # what has failed was looked at above
        job.flush().result(WAIT)
    return wrong + missing("the parent's job", job, 1_001)


@case
def in_hooks(root: Path) -> list[str]:
    """Fork in exit hooks, one before and one after the package's: see `forks_in_a_late_hook`."""
    from persistency import Persistency

    job = Persistency(root).open_job("alpha")
    KEPT.append(job)
    post(job, 0, 10)
    atexit.register(lambda: _tell(_forked_late(lambda: use_own(root, "before", job))))
    LATE.append(lambda: _tell(_forked_late(lambda: use_own(root, "after", job)) + missing("the parent's job", job, 10)))
    return []


def _forked_late(act: Callable[[], list[str]]) -> list[str]:
    try:
        return forked(act)
    except RuntimeError as error:
        if sys.version_info[:2] == (3, 12) and "can't fork at interpreter shutdown" in str(error):
            return []  # this Python forks no more when its hooks run, whatever is imported
        raise


LATE: list[Callable[[], None]] = []  # what is done in a hook that runs after the package's


@case
def spawning(root: Path) -> list[str]:
    """Start programs: plain ones, with a function to call before, and with every descriptor handed down."""
    from persistency import Persistency

    persistency = Persistency(root)
    job = persistency.open_job("alpha")
    post(job, 0, 10)
    sleeper = subprocess.Popen(
        [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE, close_fds=False
    )
    wrong = []
    program = [sys.executable, "-S", "-c", "print('hello')"]
    for options in ({}, {"preexec_fn": lambda: None}, {"close_fds": False}, {"start_new_session": True}):
        done = subprocess.run(program, capture_output=True, text=True, timeout=WAIT, check=False, **options)  # type: ignore[call-overload]
        wrong += [] if (done.stdout, done.stderr) == ("hello\n", "") else [f"other: {options}: {done}"]
    wrong += missing("the parent's job", job, 10)
    persistency.close()
    if (told := third_process(root)) != {"open": 10}:
        wrong.append(f"lock: beside a program that was handed every descriptor {told}")
    assert sleeper.stdin is not None
    sleeper.stdin.close()
    sleeper.wait(WAIT)
    return wrong


# -- a child that outlives its parent ---------------------------------------------------------------------------------


@contextlib.contextmanager
def halfway(act: Callable[[], object], owner: Any, name: str) -> Iterator[None]:
    """Have something done in another thread come to the call of a function, and wait there until the block is left."""
    inside, go_on, before, mine = threading.Event(), threading.Event(), getattr(owner, name), threading.get_ident()

    def slowly(*args: Any, **how: Any) -> Any:
        if threading.get_ident() != mine and not inside.is_set():
            inside.set()
            go_on.wait(WAIT)
        return before(*args, **how)

    setattr(owner, name, slowly)
    with aside(act):
        assert inside.wait(WAIT)
        yield
        setattr(owner, name, before)
        go_on.set()


@contextlib.contextmanager
def _errand(job: Job, begin: Callable[[Callable[..., None]], Any]) -> Iterator[None]:
    begun, go_on = threading.Event(), threading.Event()

    def progress(*_: object) -> None:
        begun.set()
        go_on.wait(WAIT)

    reply = begin(progress)
    assert begun.wait(WAIT)
    yield
    go_on.set()
    reply.result(WAIT)


@contextlib.contextmanager
def _running(job: Job, write: bool) -> Iterator[None]:
    begun, go_on = threading.Event(), threading.Event()

    def keep(tx: Any) -> None:
        if write:
            tx.put("long", (0,), b"")
        tx.count("rows")
        begun.set()
        go_on.wait(WAIT)

    with aside(lambda: job.run(keep).result(WAIT)):
        assert begun.wait(WAIT)
        yield
        go_on.set()


@contextlib.contextmanager
def situation(name: str, root: Path, persistency: Persistency, job: Job) -> Iterator[None]:
    """Bring about what there is at the fork, and see it through afterwards."""
    from persistency.storage import copying, schema
    from persistency.storage.sqlite import SqliteStore

    copy = root.parent / "copy.db"
    with contextlib.ExitStack() as stack:
        if name == "reader":
            reader = stack.enter_context(persistency.open_reader("alpha"))
            assert reader.count("rows").result() > 0
        elif name == "backup":
            stack.enter_context(_errand(job, lambda progress: job.backup(copy, progress)))
        elif name == "check":
            stack.enter_context(_errand(job, job.check))
        elif name == "export":
            stack.enter_context(_errand(job, lambda progress: job.export(root.parent / "out", progress)))
        elif name == "run":
            stack.enter_context(_running(job, write=True))
        elif name == "reading":
            job.get("rows", (0,)).result()  # it keeps a read transaction open
        elif name == "opening":
            job.close()
            stack.enter_context(halfway(lambda: persistency.open_job("alpha"), SqliteStore, "_take_note"))
        elif name == "closing":
            stack.enter_context(halfway(job.close, schema, "close"))
        elif name == "restoring":
            job.backup(copy).result(WAIT)
            job.close()
            stack.enter_context(halfway(lambda: persistency.restore("alpha", copy), copying, "_publish"))
        elif name == "dropping":
            persistency.open_job("other").close()
            stack.enter_context(halfway(lambda: persistency.drop_job("other"), copying, "clear_attempts"))
        yield


SITUATIONS = (
    "nothing", "reading", "reader", "backup", "check", "export", "run", "opening", "closing", "restoring", "dropping",
)  # fmt: skip
# In these something is in the middle of using a file, for longer than a fork waits: the child is refused the job's,
# for who is inside SQLite may hold what all of its connections need.
REFUSED = ("backup", "check", "run", "opening", "closing", "dropping")
FLUSHED = 3_000


@case
def outlive(root: Path, name: str, end: str) -> list[str]:
    """Fork a child that goes on when the parent has closed its job, or was killed, and then opens that job itself."""
    from persistency import Persistency

    persistency = Persistency(root)
    job = persistency.open_job("alpha")
    for number in range(FLUSHED):
        job.put("rows", (number,), b"%d" % number + bytes(1_000 if name in ("backup", "check", "export") else 0))
    job.flush().result(WAIT)
    gone, living = os.pipe()
    read, write = os.pipe()
    parent = os.getpid()
    with situation(name, root, persistency, job):
        pid = os.fork()
        if pid == 0:
            os.close(living)
            if end == "killed":  # nobody is left to watch it
                faulthandler.dump_traceback_later(CHILD_SECONDS, exit=True)
                died = os.pidfd_open(parent)
                os.read(gone, 1)
                # The pipe may be closed before its locks are given back: they are when the process is a zombie.
                select.select([died], [], [])
                os.close(died)
                _tell(_told(_inherit(root, may_be_refused=name in REFUSED)))
                os.kill(os.getpid(), signal.SIGKILL)
            os.read(gone, 1)
            be_child(lambda: _inherit(root, may_be_refused=name in REFUSED), write, "return")
        if end == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
    persistency.close()
    os.close(write)
    os.close(living)
    wrong = watch(pid, read, 0, "the child")
    with Persistency(root) as persistency, persistency.open_job("alpha") as job:
        return wrong + _left(job, name)


def _left(job: Job, name: str) -> list[str]:
    """Complain unless a job has what its owner and that one's child have flushed."""
    found = numbers(job)
    possible = [FLUSHED + 200, FLUSHED] if name in REFUSED else [FLUSHED + 200]
    wrong = [] if found in [list(range(count)) for count in possible] else [f"lost: {len(found)} rows of {possible}"]
    return wrong + [f"unsound: {problem}" for problem in job.check().result(WAIT)]


def _told(complaints: Iterator[str]) -> list[str]:
    told = []
    try:
        told += complaints
    except BaseException as error:
        told.append(f"raised: {error!r}")
    return told


def _inherit(root: Path, *, may_be_refused: bool) -> Iterator[str]:
    """Open a job that was the parent's, and write to it beside a stranger."""
    from persistency import Forked, Persistency

    try:
        persistency = Persistency(root)
        job = persistency.open_job("alpha")
    except Forked as error:
        if not may_be_refused:
            yield f"refused: {error}"
        return
    yield from missing("what the child inherits", job, FLUSHED)
    post(job, FLUSHED, FLUSHED + 100)
    job.flush().result(WAIT)
    log = root / "alpha.db-wal"
    before = log.stat().st_ino
    told = third_process(root, foreign=True)
    if told != {"count": FLUSHED + 100, "pid": os.getpid()}:
        yield f"lost: beside the child {told}, not {os.getpid()}"
    if not log.exists() or log.stat().st_ino != before:
        yield "file: a stranger that closed the file has removed the log"
    post(job, FLUSHED + 100, FLUSHED + 200)
    job.flush().result(WAIT)


# -- planted defects --------------------------------------------------------------------------------------------------

# Each with a case that reports it, and the kinds of complaint that have to be among those.
PLANTED: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "no fork hooks": (("plain",), {"handle", "lost"}),
    "connection carried over": (("idle",), {"file"}),
    "connection kept": (("outlive", "reading", "closed"), {"refused"}),
    "lock kept": (("outlive", "nothing", "killed"), {"raised"}),
    "replies left": (("idle",), {"reply"}),
    "handles left": (("idle",), {"handle"}),
    "no exit hook": (("own_jobs", "return"), {"lost"}),
}


def play_case(place: Path, *case: str, python: str = sys.executable) -> list[str]:
    """Run a case in a process of its own; return its complaints, and what is wrong with its end."""
    name, *rest = case
    killed = rest[-1:] == ["killed"]
    done, wrong = play("forking", name, place / "root", *rest, python=python)
    if done.returncode != (-signal.SIGKILL if killed else 0) or not done.stdout or done.stderr:
        wrong.append(f"end: {done.returncode}: {done.stderr}")
    if killed:  # its child went on, and was killed too
        from persistency import Persistency

        with Persistency(place / "root") as persistency, persistency.open_job("alpha") as job:
            wrong += _left(job, rest[0])
    return wrong


def unseen(place: Path, plant: str, python: str = sys.executable) -> list[str]:
    """Have an engine looked at that was spoilt on purpose; complain unless it is reported as what it is."""
    (name, *rest), kinds = PLANTED[plant]
    done, wrong = play("forking", name, place / "root", *rest, "--plant", plant, "--limit", 1.5, python=python)
    left = kinds - {complaint.partition(":")[0] for complaint in wrong}
    return [f"unseen: {plant}: no {', '.join(sorted(left))}: {wrong} {done.stderr}"] if left else []


# -- the program ------------------------------------------------------------------------------------------------------


def _tell(wrong: list[str]) -> None:
    os.write(1, (json.dumps({"wrong": wrong}) + "\n").encode())


def main() -> None:
    """Run one case and print what is wrong."""
    atexit.register(lambda: [act() for act in LATE])  # before the package registers its own, so after it
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("root", type=Path)
    parser.add_argument("rest", nargs="*")
    parser.add_argument("--plant", choices=PLANTS)
    parser.add_argument("--limit", type=float, default=CHILD_SECONDS)
    given = parser.parse_args()
    limit_children(given.limit)
    if given.plant:
        PLANTS[given.plant]()
    with contextlib.suppress(Leave):
        _tell(CASES[given.case](given.root, *given.rest))


if __name__ == "__main__":
    main()
