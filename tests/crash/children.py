"""Programs that have children, or are told to end: run by tests/test_children.py in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading

from persistency import Forked, Persistency, install_signal_handlers

ROWS = 500


def post(root: str, job_id: str) -> None:
    """Post rows and return, without closing anything."""
    job = Persistency(root).open_job(job_id)
    for number in range(ROWS):
        job.put("rows", (number,), b"x")


def start_children(root: str, method: str) -> None:
    """Have three children post, beside a job of the parent's own."""
    context = multiprocessing.get_context(method)
    with Persistency(root) as persistency:
        own = persistency.open_job("own")
        children = [context.Process(target=post, args=(root, f"child{number}")) for number in range(3)]
        for child in children:
            child.start()
        for number in range(ROWS):
            own.put("rows", (number,), b"x")
        for child in children:
            child.join(60)
            assert child.exitcode == 0, child.exitcode


def fork_often(root: str, times: str) -> None:
    """Fork beside a busy worker; each child finds its parent's handles refusing, and uses a job of its own."""
    persistency = Persistency(root)
    job = persistency.open_job("own")
    done = threading.Event()
    posted = 0

    def produce() -> None:
        nonlocal posted
        while not done.is_set():
            job.put("rows", (posted,), b"x" * 100)
            posted += 1
            if posted % 1000 == 0:
                job.flush().result(60)

    producer = threading.Thread(target=produce)
    producer.start()
    for number in range(int(times)):
        pid = os.fork()
        if pid == 0:
            os._exit(in_child(root, number, persistency))
        _, status = os.waitpid(pid, 0)
        assert status == 0, (number, status)
    done.set()
    producer.join()
    assert job.count("rows").result(60) == posted
    persistency.close()


def in_child(root: str, number: int, persistency: Persistency) -> int:
    """Use what was inherited, and a job of one's own; return the exit code."""
    signal.alarm(10)  # a hang is a failure
    job = persistency.job  # the method is the parent's too
    for use in (lambda: job("own"), lambda: persistency.open_job("own"), persistency.close):
        try:
            use()
        except Forked:
            continue
        return 1
    with Persistency(root) as mine, mine.open_job(f"child{number}") as fresh:
        fresh.put("rows", (number,), b"x")
        return 0 if fresh.count("rows").result(10) == 1 else 2


def be_terminated(root: str, name: str) -> None:
    """Post rows, and be told to end by a signal."""
    install_signal_handlers()
    post(root, "own")
    os.kill(os.getpid(), getattr(signal, name))
    raise AssertionError("still there")


if __name__ == "__main__":
    {"start": start_children, "fork": fork_often, "end": be_terminated}[sys.argv[1]](*sys.argv[2:])
