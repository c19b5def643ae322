"""Processes that end without closing anything: `python -m tests.crash.exits CASE ROOT`.

What a case has to tell goes to stdout.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.crash.held import KEPT, PENDING, Hold, leave_pending, open_all, post, say
from tests.crash.running import replace_method

if TYPE_CHECKING:
    from persistency.storage.port import Group
    from persistency.storage.sqlite import SqliteStore

CASES: dict[str, Callable[[str], None]] = {}


def case(run: Callable[[str], None]) -> Callable[[str], None]:
    """Make a function a case; it gets the root."""
    CASES[run.__name__] = run
    return run


# -- the ways to end --------------------------------------------------------------------------------------------------


@case
def returns(root: str) -> None:
    """Return from main."""
    leave_pending(root)


@case
def returns_from_several(root: str) -> None:
    """Return from main, with three jobs open."""
    leave_pending(root, "alpha", "beta", "gamma")


@case
def drops_handles(root: str) -> None:
    """Return from main with no handle left."""
    leave_pending(root)
    KEPT.clear()


@case
def exits_with_0(root: str) -> None:
    """Call sys.exit(0)."""
    leave_pending(root)
    sys.exit(0)


@case
def exits_with_3(root: str) -> None:
    """Call sys.exit(3)."""
    leave_pending(root)
    sys.exit(3)


@case
def exits_with_a_word(root: str) -> None:
    """Call sys.exit with a message."""
    leave_pending(root)
    sys.exit("good bye")


@case
def raises(root: str) -> None:
    """End by an exception nobody catches."""
    leave_pending(root)
    raise LookupError("nobody catches this")


@case
def raises_in_thread(root: str) -> None:
    """Return from main after a thread has died of an exception."""
    leave_pending(root)

    def die() -> None:
        raise LookupError("nobody catches this")

    thread = threading.Thread(target=die)
    thread.start()
    thread.join()


@case
def posts_in_thread_and_raises(root: str) -> None:
    """Post in a thread that dies of an exception, then return from main."""
    persistency, (job,) = open_all(root, "alpha")
    KEPT.append(persistency)

    def die() -> None:
        post(job, 0, PENDING)
        raise LookupError("nobody catches this")

    threading.Thread(target=die).start()


@case
def interrupted(root: str) -> None:
    """End by SIGINT."""
    leave_pending(root)
    signal.raise_signal(signal.SIGINT)


@case
def interrupted_in_flush(root: str) -> None:
    """End by SIGINT while waiting for a flush."""
    persistency, (job,) = open_all(root, "alpha")
    KEPT.append(persistency)
    hold = Hold()
    post(job, 0, PENDING)
    atexit.register(hold.release)
    flushed = job.flush()
    wait_for = flushed._wait

    def wait(timeout: float | None) -> None:
        signal.raise_signal(signal.SIGINT)
        wait_for(timeout)

    flushed._wait = wait  # type: ignore[method-assign]  # the signal comes when waiting begins
    flushed.result()


@case
def asyncio_run(root: str) -> None:
    """Post in an event loop that ends, then return from main."""
    import asyncio

    async def work() -> None:
        leave_pending(root)

    asyncio.run(work())


@case
def trio_run(root: str) -> None:
    """Post in a run of trio that ends, then return from main."""
    import trio

    async def work() -> None:
        leave_pending(root)

    trio.run(work)


@case
def trio_exits(root: str) -> None:
    """Post in a task of trio's, and exit in it."""
    import trio

    async def work() -> None:
        leave_pending(root)
        sys.exit(3)

    trio.run(work)


@case
def trio_interrupted(root: str) -> None:
    """Post in a task of trio's, and get a Ctrl-C that nobody catches."""
    import trio

    async def work() -> None:
        leave_pending(root)
        signal.raise_signal(signal.SIGINT)
        await trio.sleep_forever()

    trio.run(work)


@case
def closes_too_late(root: str) -> None:
    """Give up waiting for a close, then return from main."""
    persistency, (job,) = open_all(root, "alpha")
    hold = Hold()
    post(job, 0, PENDING)
    try:
        job.close(timeout=0.01)
    except TimeoutError as error:
        say("timeout", error)
    atexit.register(hold.release)
    KEPT.append(persistency)


@case
def os_exit(root: str) -> None:
    """Flush some rows, post more, and end by os._exit."""
    _persistency, (job,) = open_all(root, "alpha")
    post(job, 0, PENDING // 2)
    job.flush().result()
    post(job, PENDING // 2, PENDING)
    os._exit(7)


@case
def terminated(root: str) -> None:
    """Flush some rows, post more, and end by SIGTERM, which nobody handles."""
    _persistency, (job,) = open_all(root, "alpha")
    post(job, 0, PENDING // 2)
    job.flush().result()
    post(job, PENDING // 2, PENDING)
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()


@case
def posts_until_the_end(root: str) -> None:
    """Return from main while a daemon thread goes on posting without a pause."""
    persistency, (job,) = open_all(root, "alpha")
    KEPT.append(persistency)
    begun = threading.Event()

    def work() -> None:
        number = 0
        while True:
            post(job, number, number + 100)
            number += 100
            begun.set()

    threading.Thread(target=work, daemon=True).start()
    begun.wait()


@case
def posts_batches_until_the_end(root: str) -> None:
    """Return from main while a daemon thread goes on posting large batches, each a long transaction."""
    from persistency import Persistency, Put

    persistency = Persistency(root)
    job = persistency.open_job("alpha")
    KEPT.append(persistency)
    begun = threading.Event()

    def work() -> None:
        number = 0
        while True:
            job.persist([Put("rows", (row,), b"%d" % row) for row in range(number, number + 2_000)])
            number += 2_000
            begun.set()

    threading.Thread(target=work, daemon=True).start()
    begun.wait()


@case
def idle(root: str) -> None:
    """Return from main with a job that has nothing to do."""
    persistency, (job,) = open_all(root, "alpha")
    KEPT.append(persistency)
    post(job, 0, 10)
    job.flush().result()
    assert job.get("rows", (3,)).result() == b"3"


# -- faults at exit ---------------------------------------------------------------------------------------------------


@case
def blocked(root: str) -> None:
    """Return from main with a store that never comes back."""
    persistency, (job,) = open_all(root, "alpha", exit_timeout=0.5)
    KEPT.append(persistency)
    hold = Hold()
    post(job, 0, 1)
    hold.reached.wait()
    post(job, 1, PENDING)


@case
def blocked_beside_another(root: str) -> None:
    """Return from main with two jobs, one of whose stores never comes back."""
    persistency, (alpha, beta) = open_all(root, "alpha", "beta", exit_timeout=0.5)
    KEPT.append(persistency)
    Hold(only="beta")
    post(beta, 0, 123)
    post(alpha, 0, PENDING)


def fail_with_full_disk(times: float) -> None:
    """Have the next transactions fail as on a full disk."""
    from persistency.errors import DiskFull
    from persistency.storage.sqlite import SqliteStore

    apply = SqliteStore.apply
    left = times

    def fail(store: SqliteStore, group: Group, now_ms: int) -> list[Any]:
        nonlocal left
        if left > 0:
            left -= 1
            raise DiskFull("no space")
        return apply(store, group, now_ms)

    replace_method(SqliteStore, "apply", fail)


@case
def disk_full(root: str) -> None:
    """Return from main with a disk that stays full."""
    persistency, (job,) = open_all(root, "alpha", exit_timeout=0.5)
    KEPT.append(persistency)
    fail_with_full_disk(float("inf"))
    post(job, 0, PENDING)


@case
def disk_full_for_a_while(root: str) -> None:
    """Return from main with a disk that is full for a while."""
    persistency, (job,) = open_all(root, "alpha")
    KEPT.append(persistency)
    fail_with_full_disk(3)
    post(job, 0, PENDING)


def interrupt_hook(root: str, times: int, then: Callable[[], object]) -> None:
    """Leave rows waiting, and get some SIGINTs while the exit hook waits for the worker; then the worker goes on."""
    from persistency.actor.worker import Worker

    persistency, (job,) = open_all(root, "alpha")
    KEPT.append(persistency)
    retiring, enough = threading.Event(), threading.Event()
    retire = Worker.retire

    def retire_and_tell(worker: Worker, patience: float) -> Any:
        reply = retire(worker, patience)
        retiring.set()
        return reply

    def act() -> None:
        retiring.wait()
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, signal.SIGINT)
        # Two that come close together count as one: again and again, until the hook has given up.
        while times > 1:
            enough.wait(0.02)
            signal.pthread_kill(main, signal.SIGINT)
        then()

    replace_method(Worker, "retire", retire_and_tell)
    signal.signal(signal.SIGINT, lambda *_: None)  # outside of the hook they mean nothing here
    hold = Hold(act)
    post(job, 0, PENDING)
    hold.release()


@case
def interrupted_in_hook(root: str) -> None:
    """Get a SIGINT while the exit hook waits for the worker."""
    interrupt_hook(root, 1, lambda: None)


@case
def interrupted_as_hook_begins(root: str) -> None:
    """Get a SIGINT when the exit hook has just told the worker."""
    from persistency.actor.worker import Worker

    leave_pending(root)
    retire = Worker.retire

    def retire_and_interrupt(worker: Worker, patience: float) -> Any:
        reply = retire(worker, patience)
        signal.raise_signal(signal.SIGINT)
        return reply

    replace_method(Worker, "retire", retire_and_interrupt)


@case
def interrupted_twice_in_hook(root: str) -> None:
    """Get two SIGINTs while the exit hook waits for a worker that never comes back."""
    interrupt_hook(root, 2, threading.Event().wait)


@case
def failed_event(root: str) -> None:
    """Return from main with an event that fails only then, and `on_error` to be told."""
    from persistency import Check, Persistency, Put

    persistency = Persistency(root)
    KEPT.append(persistency)
    job = persistency.open_job("alpha", on_error=lambda job_id, failures: say("failed", job_id, len(failures)))
    hold = Hold()
    post(job, 0, 10)
    job.persist([Check("rows", (0,), 99), Put("rows", (99,), b"never")])
    atexit.register(hold.release)


if __name__ == "__main__":
    CASES[sys.argv[1]](sys.argv[2])
