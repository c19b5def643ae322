"""Producers that run far ahead of the disk: `python -m tests.crash.hungry CASE ROOT COUNT [PLANT]`.

Prints one line of JSON: by how many MiB the process grew at its peak over what it was after the imports, how much
waited in the mailbox at most, what was kept of what failed, and the counts. `complaints` holds such a line against what
was promised: eight threads and a mailbox of 8 MiB leave a process within 40 MiB of what it was, whether what they post
is written or fails. A PLANT spoils the engine first, in a way that has to be reported.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import resource
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter, sleep
from typing import Any, NamedTuple, Self

from persistency import Check, Failure, Job, Persistency, Put, WriteFailed, key
from persistency.actor import failures
from persistency.actor.bounds import Bounds, Level
from persistency.actor.failures import FailureLog
from persistency.storage.port import Group
from persistency.storage.sqlite import SqliteStore
from tests.crash.running import replace_method

MIB = 1024 * 1024
MILLION = 1_000_000
PAYLOAD_BYTES = 96
THREADS = 8
BYTES_MAX = 8 * MIB  # of the mailbox of eight threads
GROWN_MIB_MAX = 40.0
# With payloads of 1 KiB and more, and where nothing but the bytes is bounded and some 70,000 small rows wait, each an
# object of its own: a full mailbox waits while another is being written, and each thread has one in hand.
LARGE_MIB_MAX = 80.0
FIT = 10  # rows into the quota of those that fail
FAILURES_MAX, FAILED_BYTES_MAX = 1_000, MIB  # what is kept of what failed
NO_BOUND = 10**12
LOOK_EVERY = 500  # puts of a thread
SPREAD = 2_654_435_761  # a prime: multiples of it visit every remainder, far from the one before
STILL_SECONDS = 0.1  # for which nothing may have been posted when a slow disk goes on
WAIT = 300.0  # seconds for which a thread waits for room, however slow the disk is

Told = dict[str, Any]
Run = Callable[[str, int], Told]
Post = Callable[[Job, int], object]


class Case(NamedTuple):
    """A way to produce. `count` is what the long form runs, `grown_mib_max` by how much the process may grow at that.

    `fills` is whether the bytes of the mailbox have to be half full at some time: else the run says nothing of them.
    """

    run: Run
    count: int
    grown_mib_max: float
    fills: bool


CASES: dict[str, Case] = {}


def case(count: int = MILLION, grown_mib_max: float = GROWN_MIB_MAX, *, fills: bool = False) -> Callable[[Run], Run]:
    """Make a function a case; it gets the root and how many operations to run, and returns what to tell."""

    def register(run: Run) -> Run:
        CASES[run.__name__] = Case(run, count, grown_mib_max, fills)
        return run

    return register


# -- what is measured, and what is made of it -------------------------------------------------------------------------


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


def payload(number: int, size: int = PAYLOAD_BYTES) -> bytes:
    """Return a payload of its own for each number: a shared one would cost nothing."""
    return number.to_bytes(8, "big") * (size // 8)


def numbers(job: Job) -> Told:
    """Flush, and return what is in the job, what was kept of what failed, and what the statistics say."""
    kept: Sequence[Failure] = ()
    omitted = 0
    try:
        job.flush().result()
    except WriteFailed as error:
        kept, omitted = error.failures, error.omitted
    return {
        **counted(job),
        "rows": job.count("rows").result(),
        "kept": len(kept),
        "kept_bytes": sum(len(getattr(failure.op, "payload", b"")) for failure in kept),
        "told_of": len(kept) + omitted,
    }


def counted(job: Job) -> Told:
    """Return what the statistics say."""
    told = job.statistics()
    return {"accepted": told.accepted, "committed": told.committed, "failed": told.failed}


def complaints(name: str, count: int, told: Told) -> list[str]:
    """Return what a run of a case has told that it must not have, each with its kind in front of the first colon."""
    case = CASES[name]
    to_fail = told.get("to_fail", 0)
    found = []
    if told["grown"] >= case.grown_mib_max:
        found.append(f"grown: {told['grown']} MiB, and the limit is {case.grown_mib_max:.0f}")
    if told.get("waited_bytes", 0) > BYTES_MAX:
        found.append(f"bound: {told['waited_bytes']} bytes waited in a mailbox of {BYTES_MAX}")
    if case.fills and told["waited_bytes"] < BYTES_MAX / 2:
        found.append(f"idle: {told['waited_bytes']} bytes waited at most, so this says nothing of the bound")
    if told.get("kept", 0) > FAILURES_MAX or told.get("kept_bytes", 0) > FAILED_BYTES_MAX:
        found.append(f"kept: {told['kept']} failures with {told['kept_bytes']} bytes")
    if told.get("told_of", 0) != told.get("to_tell", to_fail):
        found.append(f"failures: {told['told_of']} were told of, not {told.get('to_tell', to_fail)}")
    if told["accepted"] != told["posted"] or told["committed"] != told["posted"] - to_fail or told["failed"] != to_fail:
        found.append(f"counts: {told}")
    if told["rows"] != told["expected"]:
        found.append(f"rows: {told['rows']}, not {told['expected']}")
    return [f"{complaint} ({name}, {count:,})" for complaint in found]


_apply = SqliteStore.apply


class SlowDisk:
    """A disk on which a group takes until nobody has posted anything for a while: all that have to wait, do.

    So the producers are as far ahead as the bounds let them, on any machine. `posted` is what they count up.
    """

    def __init__(self) -> None:
        self.posted = 0

    def __enter__(self) -> Self:
        def apply(store: SqliteStore, group: Group, now_ms: int) -> list[Any]:
            before = -1
            while self.posted != before:
                before = self.posted
                sleep(STILL_SECONDS)
            return _apply(store, group, now_ms)

        replace_method(SqliteStore, "apply", apply)
        return self

    def __exit__(self, *_: object) -> None:
        replace_method(SqliteStore, "apply", _apply)


# -- producers alone: a plain loop, and an event loop -----------------------------------------------------------------


@case()
def puts(root: str, count: int) -> Told:
    """Post puts in a plain loop."""
    with Persistency(root) as persistency, persistency.open_job("alpha") as job:
        for number in range(count):
            job.put("rows", key("channel", number), payload(number))
        return {"posted": count, "expected": count, **numbers(job)}


@case()
def requests(root: str, count: int) -> Told:
    """Ask for things nobody waits for, behind a put each time, so that they aren't answered in place."""
    return ask(root, count, SlowDisk())


def ask(root: str, count: int, disk: SlowDisk) -> Told:
    """Put, ask and commit in turn; tell a disk of it."""
    with Persistency(root) as persistency, persistency.open_job("alpha") as job:
        for number in range(0, count, 10):
            disk.posted += 1
            job.put("rows", key("channel", number), payload(number))
            for _ in range(8):
                job.get("rows", key("channel", number))
            job.exists("rows", key("channel", number))
            job.commit(Put("commits", key("channel", number % 1000), payload(number)))
        told = numbers(job)
        assert job.get("rows", key("channel", count - 10)).result() == payload(count - 10)
        return {"posted": count // 5, "expected": count // 10, **told}


@case()
def loop_puts(root: str, count: int) -> Told:
    """Post puts in an event loop, paced by `await job.drain()`."""

    def post(job: Job, number: int) -> None:
        job.put("rows", key("channel", number), payload(number))

    return {"posted": count, "expected": count, **asyncio.run(in_loop(root, count, post))}


@case()
def loop_requests(root: str, count: int) -> Told:
    """Ask for things nobody waits for in an event loop, paced by `await job.drain()`."""

    def post(job: Job, number: int) -> None:
        if number % 10:
            job.get("rows", key("channel", number // 10 * 10))
        else:
            job.commit(Put("rows", key("channel", number), payload(number)))

    return {"posted": count // 10, "expected": count // 10, **asyncio.run(in_loop(root, count, post))}


async def in_loop(root: str, count: int, post: Post) -> Told:
    """Post in an event loop, with a look at the mailbox every 500 posts."""
    async with Persistency(root) as persistency:
        job = await persistency.aopen_job("alpha")
        for number in range(count):
            post(job, number)
            if number % 500 == 499:
                await job.drain()
        await job.flush()
        return {**counted(job), "rows": await job.count("rows")}


# -- eight threads, and a mailbox of 8 MiB ----------------------------------------------------------------------------


def from_threads(root: str, count: int, post: Post, expected: int, *, ops: int = 1, **options: Any) -> Told:
    """Have eight threads post into one mailbox of 8 MiB, each post of so many operations; flush when all is posted."""
    options = {"mailbox_bytes_max": BYTES_MAX, "full_timeout": WAIT, **options}
    with (
        Persistency(root) as persistency,
        persistency.open_job("alpha", **options) as job,
        ThreadPoolExecutor(THREADS) as threads,
    ):

        def produce(lane: int) -> int:
            waited = 0
            for at, number in enumerate(range(lane, count, THREADS)):
                post(job, number)
                if at % LOOK_EVERY == 0:
                    waited = max(waited, job.statistics().mailbox_bytes)
            return waited

        waited = max(threads.map(produce, range(THREADS)))
        return {"posted": count * ops, "expected": expected, "waited_bytes": waited, **numbers(job)}


def put(job: Job, number: int) -> None:
    """Put a small row behind all others."""
    job.put("rows", key("channel", number), payload(number))


def put_anywhere(job: Job, number: int) -> None:
    """Put a small row somewhere among the others."""
    job.put("rows", key("channel", number * SPREAD % MILLION), payload(number))


@case()
def thread_puts(root: str, count: int) -> Told:
    """Post small rows; the bound on operations is the one that counts."""
    return from_threads(root, count, put, count)


@case()
def thread_random_puts(root: str, count: int) -> Told:
    """Post small rows whose keys are all over the table, so that each changes a page of its own."""
    return from_threads(root, count, put_anywhere, count)


@case(200_000, LARGE_MIB_MAX, fills=True)
def thread_kib_puts(root: str, count: int) -> Told:
    """Post payloads of 1 KiB."""

    def post(job: Job, number: int) -> None:
        job.put("rows", key(number % 20_000), payload(number, 1024))

    return from_threads(root, count, post, min(count, 20_000))


@case(100_000, LARGE_MIB_MAX, fills=True)
def thread_page_puts(root: str, count: int) -> Told:
    """Post payloads of 4 KiB."""

    def post(job: Job, number: int) -> None:
        job.put("rows", key(number % 2_000), payload(number, 4096))

    return from_threads(root, count, post, min(count, 2_000))


@case(1_000, LARGE_MIB_MAX)
def thread_large_puts(root: str, count: int) -> Told:
    """Post payloads of 1 MiB."""

    def post(job: Job, number: int) -> None:
        job.put("rows", key(number % 16), payload(number, MIB))

    return from_threads(root, count, post, min(count, 16))


# -- the same beside a slow disk --------------------------------------------------------------------------------------


def slow(root: str, count: int, **options: Any) -> Told:
    """Post small rows from eight threads to a slow disk."""
    with SlowDisk() as disk:

        def post(job: Job, number: int) -> None:
            put(job, number)
            disk.posted += 1

        return from_threads(root, count, post, count, **options)


@case()
def slow_thread_puts(root: str, count: int) -> Told:
    """Post small rows; the bound on operations is the one that counts."""
    return slow(root, count)


@case(grown_mib_max=LARGE_MIB_MAX, fills=True)
def slow_thread_puts_by_bytes(root: str, count: int) -> Told:
    """Post small rows where nothing but the bytes is bounded."""
    return slow(root, count, mailbox_ops_max=NO_BOUND)


@case(400_000)
def slow_requests(root: str, count: int) -> Told:
    """Ask for things nobody waits for."""
    with SlowDisk() as disk:
        return ask(root, count, disk)


# -- the same, and everything fails -----------------------------------------------------------------------------------


def over_quota(root: str, count: int, **options: Any) -> Told:
    """Have eight threads post puts for which there is no room in the job's quota; nobody flushes before the end."""
    told = from_threads(root, count, put, FIT, max_bytes=FIT * PAYLOAD_BYTES, **options)
    return {**told, "to_fail": count - FIT}


@case()
def failing_puts(root: str, count: int) -> Told:
    """Post puts over a quota, and nobody asks what became of them."""
    return over_quota(root, count)


@case()
def failing_puts_told(root: str, count: int) -> Told:
    """Post puts over a quota, and have them told to a function that looks at every one."""
    heard: list[int] = []
    told = over_quota(root, count, on_error=lambda _job_id, failed: heard.append(len(failed)))
    assert 0 < sum(heard) <= count
    return told


@case()
def failing_puts_told_slowly(root: str, count: int) -> Told:
    """Post puts over a quota, and have them told to a function that takes until all have been posted."""
    posted = threading.Event()

    def listen(_job_id: str, failed: Sequence[Failure]) -> None:
        assert 0 < len(failed) <= FAILURES_MAX
        posted.wait(WAIT)

    def post(job: Job, number: int) -> None:
        put(job, number)
        if number == count - 1:
            posted.set()

    told = from_threads(root, count, post, FIT, max_bytes=FIT * PAYLOAD_BYTES, on_error=listen)
    return {**told, "to_fail": count - FIT}


@case()
def failing_batches(root: str, count: int) -> Told:
    """Post batches with a check that fails, and a put."""

    def post(job: Job, number: int) -> None:
        job.persist([Check("rows", key("never"), 1), Put("rows", key("channel", number), payload(number))])

    return {**from_threads(root, count, post, 0, ops=2), "to_fail": 2 * count}


@case(1_000, LARGE_MIB_MAX)
def failing_large_puts(root: str, count: int) -> Told:
    """Post payloads of 600 KB over a quota, of which one is kept."""

    def post(job: Job, number: int) -> None:
        job.put("rows", key(number), payload(number, 600_000))

    return {**from_threads(root, count, post, 0, max_bytes=1), "to_fail": count}


@case(40_000)
def unseen_requests(root: str, count: int) -> Told:
    """Ask for commits that fail, and drop every reply: they go to `on_error` alone."""

    def post(job: Job, number: int) -> None:
        job.commit([Check("rows", key("never"), 1), Put("rows", key("channel", number), payload(number))])

    heard: list[int] = []
    told = from_threads(root, count, post, 0, ops=2, on_error=lambda _job_id, failed: heard.append(len(failed)))
    assert 0 < sum(heard) <= 2 * count
    return {**told, "to_fail": 2 * count, "to_tell": 0}


# -- planted defects --------------------------------------------------------------------------------------------------

_fit = Bounds.fit
_report = FailureLog.report


def _fit_always(self: Bounds, level: Level, ops: int, nbytes: int, requests: int, factor: int) -> bool:
    """Let everybody in."""
    return True


def _fit_any_bytes(self: Bounds, level: Level, ops: int, nbytes: int, requests: int, factor: int) -> bool:
    """Bound the operations, and not their bytes."""
    return _fit(self._replace(bytes_max=NO_BOUND), level, ops, nbytes, requests, factor)


def _keep_reports(self: FailureLog, failed: Sequence[Failure]) -> None:
    """Keep what was reported."""
    vars(self).setdefault("reports", []).append(failed)
    _report(self, failed)


class Plant(NamedTuple):
    """A defect, the case and the count at which it is reported, and the kinds of complaint that may report it."""

    spoil: Callable[[], None]
    case: str
    count: int
    kinds: set[str]


def keep_failures(count: int, nbytes: int) -> None:
    """Have the engine keep so much of what failed."""
    vars(failures).update(FAILURES_MAX=count, PAYLOAD_BYTES_MAX=nbytes)


PLANTS: dict[str, Plant] = {
    "mailbox without a bound": Plant(
        lambda: replace_method(Bounds, "fit", _fit_always), "slow_thread_puts", 150_000, {"grown"}
    ),
    "bytes without a bound": Plant(
        lambda: replace_method(Bounds, "fit", _fit_any_bytes), "slow_thread_puts_by_bytes", 150_000, {"bound"}
    ),
    "requests without a bound": Plant(
        lambda: replace_method(Bounds, "fit", _fit_always), "slow_requests", 150_000, {"grown"}
    ),
    "every failure kept": Plant(lambda: keep_failures(NO_BOUND, NO_BOUND), "failing_puts", 60_000, {"grown", "kept"}),
    "every payload that failed kept": Plant(
        lambda: keep_failures(FAILURES_MAX, NO_BOUND), "failing_large_puts", 300, {"grown", "kept"}
    ),
    "every report kept": Plant(
        lambda: replace_method(FailureLog, "report", _keep_reports), "failing_puts_told_slowly", 60_000, {"grown"}
    ),
}


def main(name: str, root: str, count: str, plant: str = "") -> None:
    """Run a case and print what it told and took."""
    logging.getLogger("persistency").setLevel(logging.CRITICAL + 1)  # failing is part of it
    if plant:
        PLANTS[plant].spoil()
    before = reset_peak()
    begun = perf_counter()
    told = CASES[name].run(root, int(count))
    seconds = perf_counter() - begun
    print(json.dumps({"grown": round(peak() - before, 1), "seconds": round(seconds, 2), **told}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
