"""Late users of a job: in exit hooks, in threads that outlive main, in a `__del__` at the interpreter's end.

`python -m tests.crash.late PLACE VERB ROOT`; `done` on stdout says that all of it came back with the right answers.
"""

from __future__ import annotations

import atexit
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.crash.held import KEPT, PENDING, leave_pending, open_all, post, say

if TYPE_CHECKING:
    from persistency import Job, Persistency


def late_put(job: Job, _persistency: Persistency) -> None:
    """Post rows and nothing else."""
    post(job, PENDING, PENDING + 20)
    say("done")


def late_persist(job: Job, _persistency: Persistency) -> None:
    """Post a batch and nothing else."""
    job.persist([WORDS["Put"]("rows", (number,), b"%d" % number) for number in range(PENDING, PENDING + 20)])
    say("done")


def late_commit(job: Job, _persistency: Persistency) -> None:
    """Commit, and wait for the answer."""
    for number in range(PENDING, PENDING + 20):
        version = job.commit(WORDS["Put"]("rows", (number,), b"%d" % number)).result(10)
        assert version == number + 1, version
    say("done")


def late_get(job: Job, _persistency: Persistency) -> None:
    """Read what was written before, and what is written now."""
    post(job, PENDING, PENDING + 20)
    assert job.get("rows", (PENDING + 19,)).result(10) == b"%d" % (PENDING + 19)
    assert job.get("rows", (17,)).result(10) == b"17"
    assert job.count("rows").result(10) == PENDING + 20
    say("done")


def late_flush(job: Job, _persistency: Persistency) -> None:
    """Flush, also to the medium, and drain."""
    post(job, PENDING, PENDING + 20)
    job.flush().result(10)
    job.flush(sync=True).result(10)
    job.drain().result(10)
    assert job.statistics().pending == 0
    assert job.statistics().committed == PENDING + 20
    say("done")


def late_close(job: Job, persistency: Persistency) -> None:
    """Close the job, then everything."""
    post(job, PENDING, PENDING + 20)
    job.close(10)
    persistency.close(10)
    say("done")


def late_reopen(job: Job, persistency: Persistency) -> None:
    """Close the job and open it again."""
    job.close(10)
    job = persistency.open_job("alpha")
    post(job, PENDING, PENDING + 20)
    say("done")


def late_open(_job: Job, persistency: Persistency) -> None:
    """Open a job for the first time, write to it, read from it."""
    beta = persistency.open_job("beta")
    post(beta, 0, 20)
    assert beta.get("rows", (19,)).result(10) == b"19"
    beta.commit(WORDS["Put"]("rows", (20,), b"20")).result(10)
    say("done")


WORDS: dict[str, Any] = {}

VERBS: dict[str, Callable[[Job, Persistency], None]] = {
    "put": late_put,
    "persist": late_persist,
    "commit": late_commit,
    "get": late_get,
    "flush": late_flush,
    "close": late_close,
    "reopen": late_reopen,
    "open": late_open,
}


class Late:
    """Calls something when it dies."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act = act

    def __del__(self) -> None:
        self.act()


def in_hook(root: str, verb: str) -> None:
    """Use a job in a hook that runs after the package's own."""
    late: list[Callable[[], None]] = []
    atexit.register(lambda: late[0]())
    assert "persistency" not in sys.modules
    leave_pending(root)
    act = _bind(verb)
    late.append(act)


def in_thread(root: str, verb: str) -> None:
    """Use a job in a thread that goes on after main has ended."""
    hold = leave_pending(root)
    act = _bind(verb)
    main = threading.main_thread()

    def work() -> None:
        main.join()
        if verb not in ("put", "persist"):
            hold.release()  # the exit hooks, the first of which would do it, wait for this thread
        act()

    threading.Thread(target=work).start()


def in_del(root: str, verb: str) -> None:
    """Use a job in the `__del__` of an object that a module keeps until the end."""
    leave_pending(root)
    KEPT.append(Late(_bind(verb)))


def in_thread_beside_hook(root: str, verb: str) -> None:
    """Use a job in a daemon thread while the exit hooks run, after the package's own."""
    done = threading.Event()
    begin = threading.Event()

    def wait() -> None:
        begin.set()
        assert done.wait(10)

    atexit.register(wait)
    leave_pending(root)
    act = _bind(verb)

    def work() -> None:
        begin.wait()
        act()
        done.set()

    threading.Thread(target=work, daemon=True).start()


def _bind(verb: str) -> Callable[[], None]:
    from persistency import Put

    WORDS["Put"] = Put  # imports don't work any more where this is used
    persistency: Any = KEPT[0]
    job, act = persistency["alpha"], VERBS[verb]
    return lambda: act(job, persistency)


PLACES: dict[str, Callable[[str, str], None]] = {
    "hook": in_hook,
    "thread": in_thread,
    "del": in_del,
    "daemon": in_thread_beside_hook,
}


def first_use_in_hook(root: str, _verb: str) -> None:
    """Use the package for the first time in a hook: open, write, read, and leave it."""

    def use() -> None:
        persistency, (job,) = open_all(root, "alpha")
        KEPT.append(persistency)
        post(job, 0, 100)
        assert job.get("rows", (99,)).result(10) == b"99"
        say("done")

    atexit.register(use)
    import persistency

    KEPT.append(persistency)


def import_in_hook(root: str, _verb: str) -> None:
    """Import the package in a hook: its own runs right after."""

    def use() -> None:
        persistency, (job,) = open_all(root, "alpha")
        KEPT.append(persistency)
        post(job, 0, 100)
        say("done")

    atexit.register(use)


FIRST: dict[str, Callable[[str, str], None]] = {"first-use": first_use_in_hook, "first-import": import_in_hook}


if __name__ == "__main__":
    _place, _verb, _root = sys.argv[1:]
    (PLACES | FIRST)[_place](_root, _verb)
