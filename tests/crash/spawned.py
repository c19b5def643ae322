"""Children by `multiprocessing`: `python -m tests.crash.spawned METHOD HOW END ROOT`.

METHOD is how they are started (fork, spawn, forkserver), HOW by what (process, pool, executor), END how their work
ends. Each posts to a job of its own, whose worker is held until the exit hook, and closes nothing; so does the parent,
beside them. Printed is one object of JSON: `wrong` is a list of complaints, `jobs` says how many rows each must have.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from tests.crash.forked import PLANTS, hold_until_retired, missing, play
from tests.crash.held import KEPT, MAILBOX_OPS_MAX, PENDING, post

CHILDREN = 2
LATE = 100
WAIT = 30.0


def use(root: str, job_id: str, count: int, *, hold: bool = True) -> Any:
    """Post rows to a job of this process, whose worker doesn't write them before the exit hook; return it."""
    from persistency import Persistency

    if hold:
        HELD.append(hold_until_retired())
    persistency = Persistency(root)
    KEPT.append(persistency)
    job = persistency.open_job(job_id, mailbox_ops_max=MAILBOX_OPS_MAX)
    post(job, 0, count)
    return job


# -- what a child does ------------------------------------------------------------------------------------------------


def returns(root: str, job_id: str) -> int:
    """Post and return."""
    job = use(root, job_id, PENDING)
    return int(job.statistics().pending)


def exits(root: str, job_id: str) -> int:
    """Post and call sys.exit(3)."""
    use(root, job_id, PENDING)
    sys.exit(3)


def raises(root: str, job_id: str) -> int:
    """Post and raise."""
    use(root, job_id, PENDING)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it is known what is said of it
    raise LookupError("nobody catches this")


def late(root: str, job_id: str) -> int:
    """Post, and leave a thread that posts more when the child's work is over; and opens another job for that."""
    job = use(root, job_id, PENDING)
    main = threading.main_thread()

    def work() -> None:
        main.join()
        post(job, PENDING, PENDING + LATE)
        HELD[0].set()  # from Python 3.13 on the hook waits for this thread
        assert job.get("rows", (PENDING,)).result(WAIT) == b"%d" % PENDING
        use(root, f"{job_id}-late", LATE, hold=False)

    threading.Thread(target=work).start()
    return PENDING


def nests(root: str, job_id: str) -> int:
    """Post, and have a child of its own do so as well."""
    use(root, job_id, PENDING)
    context = multiprocessing.get_context()
    child = context.Process(target=returns, args=(root, f"{job_id}-nested"))
    child.start()
    child.join(WAIT)
    assert child.exitcode == 0, child.exitcode
    return PENDING


def inherits(root: str, job_id: str) -> int:
    """Try what the parent has, in a child that has it by fork; then do as `returns`."""
    from persistency import Forked, Persistency

    for call in (
        lambda: OPEN[0].put("rows", (0,), b"child"),
        lambda: OPEN[0].flush().result(WAIT),
        Persistency.instance,
    ):
        try:
            call()
        except Forked:
            continue
        raise AssertionError("an inherited handle was served")
    Persistency.reset()
    KEPT.append(Persistency.instance(root))
    return returns(root, job_id)


HELD: list[threading.Event] = []  # each, set, lets this process' workers go
OPEN: list[Any] = []  # the parent's handles

# Each with the exit code of a process that ends so.
WORK: dict[str, tuple[Callable[[str, str], int], int]] = {
    "returns": (returns, 0),
    "exits": (exits, 3),
    "raises": (raises, 1),
    "late": (late, 0),
    "nests": (nests, 0),
    "inherits": (inherits, 0),
}


def work(end: str, root: str, job_id: str, plant: str | None) -> int:
    """Do a child's work, with the engine spoilt."""
    if plant:
        PLANTS[plant]()
    return WORK[end][0](root, job_id)


# -- how children are started -----------------------------------------------------------------------------------------

Start = Callable[[BaseContext, str, "list[tuple[Any, ...]]"], "list[str]"]


def by_process(context: BaseContext, end: str, tasks: list[tuple[Any, ...]]) -> list[str]:
    """Have a process for each task."""
    children = [context.Process(target=work, args=task) for task in tasks]  # type: ignore[attr-defined]
    for child in children:
        child.start()
    wrong = []
    for child in children:
        child.join(WAIT)
        if child.exitcode is None:
            wrong.append("hang: a child is still there")
            child.kill()
            child.join()
        elif child.exitcode != WORK[end][1]:
            wrong.append(f"end: a child ended with {child.exitcode}, not {WORK[end][1]}")
    return wrong


def by_pool(context: BaseContext, _end: str, tasks: list[tuple[Any, ...]]) -> list[str]:
    """Have the tasks done by a pool, in processes that go on after each."""
    pool = context.Pool(CHILDREN)
    told = pool.starmap_async(work, tasks, chunksize=1).get(WAIT)
    pool.close()
    pool.join()
    return [] if told == [PENDING] * len(tasks) else [f"other: the pool told {told}"]


def by_executor(context: BaseContext, _end: str, tasks: list[tuple[Any, ...]]) -> list[str]:
    """Have the tasks done by an executor."""
    with ProcessPoolExecutor(CHILDREN, mp_context=context) as executor:
        told = [future.result(WAIT) for future in [executor.submit(work, *task) for task in tasks]]
    return [] if told == [PENDING] * len(tasks) else [f"other: the executor told {told}"]


STARTS: dict[str, Start] = {"process": by_process, "pool": by_pool, "executor": by_executor}


def run(method: str, how: str, end: str, root: str, plant: str | None) -> tuple[list[str], dict[str, int]]:
    """Start children beside a busy job of the parent's; return what is wrong, and how many rows each job must have."""
    from persistency import Persistency

    context = multiprocessing.get_context(method)
    multiprocessing.set_start_method(method)  # for their children, too
    persistency = Persistency.instance(root)
    own = persistency.open_job("parent", mailbox_ops_max=MAILBOX_OPS_MAX)
    OPEN.append(own)
    post(own, 0, LATE)
    own.flush().result(WAIT)
    posted, over = LATE, threading.Event()

    def keep_posting() -> None:
        nonlocal posted
        while not over.is_set():
            post(own, posted, posted + 10)
            posted += 10
            own.flush().result(WAIT)

    poster = threading.Thread(target=keep_posting)
    poster.start()
    jobs = {f"child-{number}": PENDING for number in range(CHILDREN)}
    try:
        wrong = STARTS[how](context, end, [(end, root, job_id, plant) for job_id in jobs])
    finally:
        over.set()
        poster.join(WAIT)
    if end == "late":
        jobs = dict.fromkeys(jobs, PENDING + LATE) | {f"{job_id}-late": LATE for job_id in jobs}
    elif end == "nests":
        jobs |= {f"{job_id}-nested": PENDING for job_id in jobs}
    # And what the parent leaves is written by its own hook.
    hold_until_retired()
    post(own, posted, posted + PENDING)
    return wrong, {**jobs, "parent": posted + PENDING}


def play_spawned(
    place: Path, method: str, how: str, end: str, *, plant: str | None = None, python: str = sys.executable
) -> list[str]:
    """Run one form in a process of its own; return what is wrong, and what is lost."""
    from persistency import Persistency

    root = place / "root"
    done, wrong = play("spawned", method, how, end, root, *(("--plant", plant) if plant else ()), python=python)
    if wrong or done.returncode or done.stderr:
        return [*wrong, f"end: {done.returncode} {done.stderr}"]
    jobs = json.loads(done.stdout.splitlines()[-1])["jobs"]
    with Persistency(root) as persistency:
        for job_id, count in jobs.items():
            with persistency.open_job(job_id) as job:
                wrong += missing(job_id, job, count)
    return wrong


def main() -> None:
    """Run one form, and print what came of it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("method", choices=multiprocessing.get_all_start_methods())
    parser.add_argument("how", choices=STARTS)
    parser.add_argument("end", choices=WORK)
    parser.add_argument("root")
    parser.add_argument("--plant", choices=PLANTS)
    given = parser.parse_args()
    if given.plant and given.plant != "no exit hook":  # the children's only; the parent has to end in order
        PLANTS[given.plant]()
    with contextlib.suppress(BrokenPipeError):
        wrong, jobs = run(given.method, given.how, given.end, given.root, given.plant)
        print(json.dumps({"wrong": wrong, "jobs": jobs}), flush=True)


if __name__ == "__main__":
    main()
