"""Producers that run far ahead of the disk: `python -m tests.crash.hungry CASE ROOT COUNT`.

Prints one line of JSON: by how many MiB the process grew at its peak over what it was after the import, and the counts.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from persistency import Check, Job, Persistency, Put, WriteFailed, key

MIB = 1024 * 1024
PAYLOAD_BYTES = 100
THREADS = 8
CASES: dict[str, Callable[[str, int], dict[str, Any]]] = {}


def case(run: Callable[[str, int], dict[str, Any]]) -> Callable[[str, int], dict[str, Any]]:
    """Make a function a case; it gets the root and how many operations to run, and returns what to tell."""
    CASES[run.__name__] = run
    return run


def reset_peak() -> float:
    """Forget the peak so far, where the system can, and return the present size in MiB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> float:
    """Return the largest size the process has had since `reset_peak`, in MiB."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / MIB


def payload(number: int) -> bytes:
    """Return a payload of its own for each number: a shared one would cost nothing."""
    return number.to_bytes(8, "big") * (PAYLOAD_BYTES // 8)


def numbers(job: Job) -> dict[str, Any]:
    """Flush, and return what is in the job and what its statistics say."""
    job.flush().result()
    told = job.statistics()
    return {"rows": job.count("rows").result(), "committed": told.committed, "failed": told.failed}


def from_threads(root: str, count: int, post: Callable[[Job, int], None]) -> dict[str, Any]:
    """Have eight threads post into one mailbox of 8 MiB."""
    with Persistency(root) as persistency, persistency.open_job("alpha", mailbox_bytes_max=8 * MIB) as job:

        def produce(lane: int) -> None:
            for number in range(lane, count, THREADS):
                post(job, number)

        threads = [threading.Thread(target=produce, args=(lane,)) for lane in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return numbers(job)


@case
def puts(root: str, count: int) -> dict[str, Any]:
    """Post puts in a plain loop."""
    with Persistency(root) as persistency, persistency.open_job("alpha") as job:
        for number in range(count):
            job.put("rows", key("channel", number), payload(number))
        return numbers(job)


@case
def requests(root: str, count: int) -> dict[str, Any]:
    """Ask for things nobody waits for, behind a put each time, so that they aren't answered in place."""
    with Persistency(root) as persistency, persistency.open_job("alpha") as job:
        for number in range(0, count, 10):
            job.put("rows", key("channel", number), payload(number))
            for _ in range(8):
                job.get("rows", key("channel", number))
            job.exists("rows", key("channel", number))
            job.commit(Put("commits", key("channel", number % 1000), payload(number)))
        told = numbers(job)
        return {**told, "answered": job.get("rows", key("channel", count - 10)).result() == payload(count - 10)}


@case
def loop_puts(root: str, count: int) -> dict[str, Any]:
    """Post puts in an event loop, paced by `await job.drain()`."""

    async def work() -> dict[str, Any]:
        async with Persistency(root) as persistency:
            job = await persistency.aopen_job("alpha")
            for number in range(count):
                job.put("rows", key("channel", number), payload(number))
                if number % 500 == 499:
                    await job.drain()
            await job.flush()
            told = job.statistics()
            return {"rows": await job.count("rows"), "committed": told.committed, "failed": told.failed}

    return asyncio.run(work())


@case
def loop_requests(root: str, count: int) -> dict[str, Any]:
    """Ask for things nobody waits for in an event loop, paced by `await job.drain()`."""

    async def work() -> dict[str, Any]:
        async with Persistency(root) as persistency:
            job = await persistency.aopen_job("alpha")
            for number in range(count):
                if number % 10:
                    job.get("rows", key("channel", number // 10 * 10))
                else:
                    job.commit(Put("rows", key("channel", number), payload(number)))
                if number % 500 == 499:
                    await job.drain()
            await job.flush()
            told = job.statistics()
            return {"rows": await job.count("rows"), "committed": told.committed, "failed": told.failed}

    return asyncio.run(work())


@case
def thread_puts(root: str, count: int) -> dict[str, Any]:
    """Post small payloads from eight threads into a mailbox of 8 MiB."""
    return from_threads(root, count, lambda job, number: job.put("rows", key("channel", number), payload(number)))


@case
def thread_page_puts(root: str, count: int) -> dict[str, Any]:
    """Post payloads of 4 KiB from eight threads into a mailbox of 8 MiB."""
    return from_threads(
        root, count, lambda job, number: job.put("rows", key(number % 2_000), number.to_bytes(8, "big") * 512)
    )


@case
def thread_large_puts(root: str, count: int) -> dict[str, Any]:
    """Post payloads of 1 MiB from eight threads into a mailbox of 8 MiB."""
    return from_threads(
        root, count, lambda job, number: job.put("rows", key(number % 16), bytes((number % 256,)) * MIB)
    )


@case
def failing_events(root: str, count: int) -> dict[str, Any]:
    """Post batches that all fail, with a payload each, and don't flush until the end."""
    logging.getLogger("persistency").setLevel(logging.CRITICAL)
    with Persistency(root) as persistency, persistency.open_job("alpha") as job:
        for number in range(count):
            job.persist([Check("rows", key("never"), 1), Put("rows", key("channel", number), payload(number) * 10)])
        error: WriteFailed | None = None
        try:
            job.flush().result()
        except WriteFailed as failed:
            error = failed
        assert error is not None
        told = {"kept": len(error.failures), "omitted": error.omitted}
        return {**told, **numbers(job)}


def main(name: str, root: str, count: str) -> None:
    """Run a case and print how much it took."""
    before = reset_peak()
    begun = perf_counter()
    told = CASES[name](root, int(count))
    seconds = perf_counter() - begun
    print(json.dumps({"grown": round(peak() - before, 1), "seconds": round(seconds, 2), **told}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
