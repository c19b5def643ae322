"""Many jobs through few slots: who is live, who rests for whom, and whether every value is right all the same.

Two harnesses. `address` takes one step after the other and holds the order in which jobs go to rest against a model of
a few lines; `roam` has several threads address thousands of jobs at random, counts the stores and the workers that are
there at every instant, and looks at every value, at the end in a fresh `Persistency` too. Both were first run on
engines that were spoilt on purpose: see `PLANTS`.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import threading
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

from persistency import Job, Persistency, Put
from persistency.actor.mailbox import Mailbox
from persistency.actor.sleeper import Sleeper
from persistency.actor.turns import Turns
from persistency.slots import Slots
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import PLACES, Group
from persistency.storage.sqlite import SqliteStore
from tests.soak.part import Part, Tell

WAIT = 20.0  # seconds for what must come
WRONG_MAX = 20
JOBS_EACH = 10  # for every cycle
STEPS_EACH = 30
LIVE_MAX = 64

# -- who is there ------------------------------------------------------------------------------------------------------


def _threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("persistency:")]


def workers() -> list[str]:
    """Return the names of the jobs whose workers have a thread."""
    names = (thread.name.removeprefix("persistency:") for thread in _threads())
    return [name for name in names if name != "opener"]


class Census:
    """Counts the stores that are open, at every instant, and notes in which order they are opened and closed.

    A store counts from before it is opened until it is closed. `threads` are those in which one was opened. The threads
    of workers are counted at every opening; one that goes to rest gives its slot back a little before it has ended.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.threads: set[int] = set()
        self.most = 0
        self.most_workers = 0
        self._live: Counter[str] = Counter()
        self._names: weakref.WeakKeyDictionary[SqliteStore, str] = weakref.WeakKeyDictionary()
        self._changed = threading.Condition()
        really_open, really_close = DirectoryRoot.open, SqliteStore.close

        def open_store(root: DirectoryRoot, job_id: str, *args: Any) -> SqliteStore:
            self._come(job_id)
            try:
                store = really_open(root, job_id, *args)
            except BaseException:
                self._go(job_id)
                raise
            self._names[store] = job_id
            return store

        def close_store(store: SqliteStore, **how: Any) -> None:
            try:
                really_close(store, **how)
            finally:
                self._go(self._names[store])

        patch.setattr(DirectoryRoot, "open", open_store)
        patch.setattr(SqliteStore, "close", close_store)

    @property
    def live(self) -> list[str]:
        """The jobs whose store is open, by name."""
        with self._changed:
            return sorted(self._live.elements())

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so, looking whenever a store was opened or closed."""
        with self._changed:
            assert self._changed.wait_for(condition, WAIT), f"live: {self.live}, opened: {self.opened[-20:]}"

    def _come(self, job_id: str) -> None:
        with self._changed:
            self.opened.append(job_id)
            self.threads.add(threading.get_ident())
            self._live[job_id] += 1
            self.most = max(self.most, self._live.total())
            self.most_workers = max(self.most_workers, len(workers()))
            self._changed.notify_all()

    def _go(self, job_id: str) -> None:
        with self._changed:
            self.closed.append(job_id)
            self._live[job_id] -= 1
            self._changed.notify_all()


class Quiet:
    """Tells when a job's worker has gone to sleep and has nothing left to do: only then may it be asked to rest."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._asleep: dict[Sleeper, float | None] = {}  # for how many seconds
        self._sleeps: Counter[Sleeper] = Counter()
        self._changed = threading.Condition()
        really_wait = Sleeper.wait

        def wait(sleeper: Sleeper, seconds: float | None = None) -> None:
            with self._changed:
                self._asleep[sleeper] = seconds
                self._sleeps[sleeper] += 1
                self._changed.notify_all()
            try:
                really_wait(sleeper, seconds)
            finally:
                with self._changed:
                    del self._asleep[sleeper]

        patch.setattr(Sleeper, "wait", wait)

    def wait(self, job: Job) -> None:
        """Wait until the worker of a job sleeps."""
        assert self._wait(job, WAIT), job

    def wait_or(self, job: Job, condition: Callable[[], bool]) -> None:
        """Wait until the worker of a job sleeps, or something is so instead."""
        until = monotonic() + WAIT
        while not condition() and not self._wait(job, 0.05):
            assert monotonic() < until, job

    def sleeps(self, job: Job) -> int:
        """Return how often its worker has gone to sleep."""
        return self._sleeps[job._mailbox]

    def seconds(self, job: Job) -> float | None:
        """Return for how long its worker sleeps, once it does; `None`: until somebody comes."""
        self.wait(job)
        with self._changed:
            return self._asleep.get(job._mailbox)  # one without a thread naps until somebody comes

    def _wait(self, job: Job, seconds: float) -> bool:
        mailbox: Mailbox = job._mailbox
        with self._changed:
            return self._changed.wait_for(
                lambda: (mailbox in self._asleep or mailbox.napping) and mailbox.idle, seconds
            )


# -- one step after the other ------------------------------------------------------------------------------------------

_VERBS: tuple[Callable[[Job, int], Any], ...] = (
    lambda job, number: job.put("c", (number,), b"%d" % number),
    lambda job, number: job.get("c", (number,)).result(WAIT),
    lambda job, number: job.count("c").result(WAIT),
    lambda job, number: job.commit([Put("c", (number,), b"")]).result(WAIT),
    lambda job, number: job.run(lambda tx: tx.count("c")).result(WAIT),
    lambda job, number: job.flush().result(WAIT),
    lambda job, number: list(job.iterate("c")),
)


def address(place: Path, seed: int, *, steps: int, jobs: int, live_max: int) -> list[str]:
    """Use jobs at random, one step after the other; return in which step not the one unused the longest has rested."""
    rng = random.Random(seed)
    wrong: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        census, quiet = Census(patch), Quiet(patch)
        with Persistency(place, max_live_jobs=live_max) as persistency:
            used: OrderedDict[str, None] = OrderedDict()  # the model: the first was used the longest ago
            rested: list[str] = []
            handles: dict[str, Job] = {}
            for step in range(steps):
                job_id = f"job{rng.randrange(jobs)}"
                if job_id not in used and len(used) == live_max:
                    rested.append(used.popitem(last=False)[0])
                used[job_id] = None
                used.move_to_end(job_id)
                if job_id not in handles:
                    handles[job_id] = persistency.open_job(job_id, sync_interval=None)
                rng.choice(_VERBS)(handles[job_id], step)
                census.wait(lambda job_id=job_id: job_id in census.live)  # type: ignore[misc]  # a put was only posted
                quiet.wait(handles[job_id])
                if census.closed != rested or census.live != sorted(used):
                    due, really = rested[-1:], census.closed[len(rested) - 1 :]
                    wrong.append(f"order: step {step}: due to rest: {due}, rested: {really}, live: {census.live}")
                    break
                if census.most > live_max:
                    wrong.append(f"limit: step {step}: {census.most} stores were open, at most {live_max} may be")
                    break
    return wrong


# -- all at once -------------------------------------------------------------------------------------------------------


@dataclass
class Walk:
    """What came of a walk through many jobs."""

    wrong: list[str] = field(default_factory=list)
    steps: int = 0
    openings: int = 0
    most: int = 0
    most_workers: int = 0
    rows: int = 0

    def complain(self, text: str) -> None:
        """Keep what is wrong; the first few will do."""
        if len(self.wrong) < WRONG_MAX:
            self.wrong.append(text)


class Walker:
    """One thread's walk: it alone writes to the jobs of its share, so that it knows what each one must hold."""

    def __init__(self, walk: Walk, persistency: Persistency, share: list[str], rng: random.Random) -> None:
        self._walk = walk
        self._persistency = persistency
        self._share = share
        self._rng = rng
        self._handles: dict[str, Job] = {}
        self.rows: dict[str, dict[str, bytes]] = {job_id: {} for job_id in share}
        self.counts: Counter[str] = Counter()

    def go(self, steps: int, until: float) -> None:
        """Open every job once, then use them at random."""
        for job_id in self._share:
            self._handles[job_id] = self._persistency.open_job(job_id)
            self._step(job_id, 0)
            if monotonic() > until:
                return
        for number in range(1, steps + 1):
            self._step(self._rng.choice(self._share), number)
            if monotonic() > until:
                return

    def _step(self, job_id: str, number: int) -> None:
        job, rows, name = self._handles[job_id], self.rows[job_id], f"k{self._rng.randrange(4)}"
        payload = b"%s %d" % (job_id.encode(), number)
        self._walk.steps += 1
        match self._rng.randrange(8):
            case 0 | 1 | 2:
                job.put("rows", (name,), payload)
                rows[name] = payload
            case 3:
                job.commit([Put("rows", (name,), payload), Put("rows", ("twin",), payload)]).result(WAIT)
                rows[name] = rows["twin"] = payload
            case 4:
                self.counts[job_id] += 1
                self._check(job_id, "count", self.counts[job_id], job.increment("counts", ("n",)).result(WAIT))
            case 5:
                found = {row.key.parts[0]: row.payload for row in job.scan("rows").result(WAIT)}
                self._check(job_id, "scan", rows, found)
            case 6:
                job.flush().result(WAIT)
                numbers = job.statistics()
                self._check(job_id, "failed", 0, numbers.failed)
                self._check(job_id, "accepted", numbers.committed, numbers.accepted)
            case _:
                self._check(job_id, name, rows.get(name), job.get("rows", (name,)).result(WAIT))

    def _check(self, job_id: str, what: str, due: Any, found: Any) -> None:
        if due != found:
            self._walk.complain(f"value: {job_id}: {what} is {found!r}, {due!r} was due")


def roam(
    place: Path,
    seed: int,
    *,
    jobs: int,
    live_max: int,
    steps: int,
    threads: int = 4,
    seconds: float = float("inf"),
    tell: Tell = lambda _text: None,
) -> Walk:
    """Have threads use `jobs` jobs in `steps` steps at random; then look at every value once more."""
    walk, rng = Walk(), random.Random(seed)
    until = monotonic() + seconds
    with pytest.MonkeyPatch.context() as patch:
        census = Census(patch)
        with Persistency(place, max_live_jobs=live_max) as persistency, ThreadPoolExecutor(threads) as pool:
            shares = [[f"job{number}" for number in range(at, jobs, threads)] for at in range(threads)]
            walkers = [Walker(walk, persistency, share, random.Random(rng.getrandbits(64))) for share in shares]
            going = [pool.submit(walker.go, steps // threads, until) for walker in walkers]
            while not all(future.done() for future in going):
                tell(f"{walk.steps:,} steps, {len(census.opened):,} openings")
                next((future for future in going if not future.done()), going[0]).exception()
            for future in going:
                if (error := future.exception()) is not None:
                    walk.complain(f"error: {error!r}")
        walk.openings, walk.most, walk.most_workers = len(census.opened), census.most, census.most_workers
    if walk.most > live_max:
        walk.complain(f"limit: {walk.most} stores were open at once, at most {live_max} may be")
    if walk.most_workers > 2 * live_max:  # those that are ending are not through with it yet
        walk.complain(f"limit: {walk.most_workers} workers had a thread at once, at most {live_max} may have")
    for thread in _threads():
        thread.join(WAIT)
        if thread.is_alive():
            walk.complain(f"limit: {thread.name} is there after the end")
    look_again(place, walk, walkers)
    return walk


def look_again(place: Path, walk: Walk, walkers: list[Walker]) -> None:
    """Hold every job, opened anew, against what was written to it."""
    with Persistency(place) as persistency:
        for walker in walkers:
            for job_id, rows in walker.rows.items():
                with persistency.open_job(job_id) as job:
                    found = {row.key.parts[0]: row.payload for row in job.scan("rows").result(WAIT)}
                    counted = job.increment("counts", ("n",), 0).result(WAIT)
                walk.rows += len(found)
                if found != rows or counted != walker.counts[job_id]:
                    walk.complain(f"lost: {job_id}: {found} and {counted}, {rows} and {walker.counts[job_id]} were due")


# -- planted defects ---------------------------------------------------------------------------------------------------


def _rest_the_latest(patch: pytest.MonkeyPatch) -> None:
    def get(turns: Turns) -> float:
        return -float(vars(turns)["used"])

    def put(turns: Turns, at: float) -> None:
        vars(turns)["used"] = at

    patch.setattr(Turns, "used_at", property(get, put), raising=False)


def _one_too_many(patch: pytest.MonkeyPatch) -> None:
    really = Slots.__init__

    def init(slots: Slots, live_max: int, *args: Any) -> None:
        really(slots, live_max + 1, *args)

    patch.setattr(Slots, "__init__", init)


def _lose_a_post(patch: pytest.MonkeyPatch) -> None:
    """Leave out the first put after an opening, and say it was written."""
    really = SqliteStore.apply

    def apply(store: SqliteStore, group: Group, now_ms: int) -> list[Any]:
        if group[0] is None or hasattr(store, "spoilt"):
            return really(store, group, now_ms)
        store.spoilt = True  # type: ignore[attr-defined]  # once for each opening
        return [None, *(really(store, group[PLACES:], now_ms) if len(group) > PLACES else [])]

    patch.setattr(SqliteStore, "apply", apply)


# Each with the kinds of finding that may report it.
PLANTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], set[str]]] = {
    "the one used last rests": (_rest_the_latest, {"order"}),
    "one live too many": (_one_too_many, {"limit", "order"}),
    "a post to a resting job is lost": (_lose_a_post, {"value", "lost"}),
}


def planted(name: str, place: Path, seed: int) -> list[str]:
    """Show both harnesses an engine with a planted defect; return what they found of the kinds that may report it."""
    with pytest.MonkeyPatch.context() as patch:
        spoil, kinds = PLANTS[name]
        spoil(patch)
        wrong = address(place / "address", seed, steps=60, jobs=6, live_max=3)
        wrong += roam(place / "roam", seed, jobs=30, live_max=3, steps=150).wrong
    return [finding for finding in wrong if finding.partition(":")[0] in kinds]


# -- the long form -----------------------------------------------------------------------------------------------------


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Have every planted defect reported, then address ten jobs for each cycle (10,000), thirty steps for each."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK | os.X_OK) else None  # no power is cut here
    with tempfile.TemporaryDirectory(prefix="lives-", dir=memory) as name:
        place = Path(name)
        part, begun = Part("resting jobs, planted defects"), monotonic()
        for number, plant in enumerate(PLANTS):
            tell(f"{part.name}: {plant}")
            if not planted(plant, place / str(number), given.seed):
                part.wrong.append(f"{plant}: not reported")
        part.cells = {
            "other": f"{len(PLANTS) - len(part.wrong)} of {len(PLANTS)} seen",
            "seconds": f"{monotonic() - begun:.1f}",
        }
        yield part
        part, begun = Part("resting jobs, in what order"), monotonic()
        tell(part.name)
        steps = 3 * given.cycles
        part.wrong = address(place / "order", given.seed, steps=steps, jobs=24, live_max=8)
        part.cells = {"cycles": f"{steps:,}", "seconds": f"{monotonic() - begun:.1f}"}
        yield part
        jobs, begun = JOBS_EACH * given.cycles, monotonic()
        part = Part(f"{jobs:,} jobs through {LIVE_MAX} slots")
        walk = roam(
            place / "roam",
            given.seed,
            jobs=jobs,
            live_max=LIVE_MAX,
            steps=STEPS_EACH * given.cycles,
            seconds=given.seconds,
            tell=lambda text: tell(f"{part.name}: {text}"),
        )
        part.wrong = walk.wrong
        part.cells = {
            "cycles": f"{walk.steps:,}",
            "in between": f"{walk.openings:,} openings",
            "lost": str(sum(finding.startswith("lost") for finding in walk.wrong)),
            "other": f"{walk.most} stores, {walk.most_workers} workers",
            "rows": f"{walk.rows:,}",
            "seconds": f"{monotonic() - begun:.1f}",
        }
        yield part
