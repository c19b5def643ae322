"""Forks at random moments beside all that a process can be doing: `python -m tests.crash.forkstorm ROOT --forks N`.

Eight threads write and read; others open and close jobs, let them rest, back them up, check, export, restore and drop
them. In every child all that is inherited must be refused, and jobs of its own must work; the parent must lose nothing.
Progress is printed as objects of JSON, the last of which has `wrong`: every complaint, "kind: what".

Delays are load here; nothing relies on their length.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from pathlib import Path
from time import monotonic
from typing import Any

from persistency import Category, Forked, Job, JobLocked, KVStore, Persistency, Put, Reply, Transaction
from tests.crash import inherited
from tests.crash.forked import CHILD_SECONDS, ENDS, WAIT, Leave, forked, limit_children, missing
from tests.crash.held import KEPT, post

PRODUCERS = 8
KEYS = 500  # of each producer; so the file stays small however long it goes on
OWN_ROWS = 100
PAUSE_MS_MAX = 3
WRONG_MAX = 20
PLACES = {"main": 12, "thread": 2, "run": 2, "callback": 1, "grandchild": 1}


class Producer:
    """One thread that writes and reads rows of its own, and knows what they have to be."""

    def __init__(self, storm: Storm, me: int) -> None:
        self.rows: dict[int, bytes] = {}
        self.counted = 0
        self._storm, self._job, self._me = storm, storm.job, me
        self._rng = random.Random(f"{storm.seed} {me}")
        self._fresh = itertools.count()

    def run(self) -> None:
        """Work until the storm is over."""
        verbs = [self.put] * 3
        verbs += [self.persist, self.commit, self.get, self.ask, self.run_it, self.count, self.flush]
        while not self._storm.over.is_set():
            for _ in range(self._rng.randrange(30)):
                self._rng.choice(verbs)()
            self._storm.over.wait(self._rng.random() * PAUSE_MS_MAX / 1000)

    def _row(self) -> Put:
        at, payload = self._rng.randrange(KEYS), b"%d" % next(self._fresh)
        self.rows[at] = payload
        return Put("rows", (self._me, at), payload)

    def put(self) -> None:
        row = self._row()
        self._job.put(row.category, row.key, row.payload)

    def persist(self) -> None:
        self._job.persist([self._row() for _ in range(3)])

    def commit(self) -> None:
        self._job.commit([self._row() for _ in range(2)]).result(WAIT)

    def get(self) -> None:
        at = self._rng.randrange(KEYS)
        found, wanted = self._job.get("rows", (self._me, at)).result(WAIT), self.rows.get(at)
        if found != wanted:
            self._storm.complain(f"lost: row {self._me}, {at} is {found!r}, not {wanted!r}")

    def ask(self) -> None:
        """Ask for something, and leave the reply to whoever may be forked."""
        verb = self._rng.choice(["get", "scan", "flush", "increment"])
        if verb == "increment":
            self.counted += 1
            self._storm.recent.append(self._job.increment("counters", (self._me,)))
        else:
            ask: dict[str, Callable[[], Reply[Any]]] = {
                "get": lambda: self._job.get("rows", (self._me, 0)),
                "scan": lambda: self._job.scan("rows", limit=5).map(len),
                "flush": self._job.flush,
            }
            self._storm.recent.append(ask[verb]())

    def run_it(self) -> None:
        row = self._row()

        def swap(tx: Transaction) -> None:
            tx.get("rows", row.key)
            tx.put("rows", row.key, row.payload)

        self._job.run(swap).result(WAIT)

    def count(self) -> None:
        self.counted += 1
        self._job.increment("counters", (self._me,)).result(WAIT)

    def flush(self) -> None:
        self._job.flush(sync=self._rng.random() < 0.1).result(WAIT)


class Storm:
    """A process that does all it can at once, and forks."""

    def __init__(self, place: Path, seed: int, progress: Callable[[Storm], None]) -> None:
        self.seed = seed
        self.wrong: list[str] = []
        self.forks = 0
        self.over = threading.Event()
        self.recent: collections.deque[Reply[Any]] = collections.deque(maxlen=12)
        self._place, self._progress = place, progress
        self._busy, self._other, self._copy = place / "busy", place / "other", place / "copy.db"
        self._rng = random.Random(seed)
        self._checker = Persistency(self._busy)
        self.persistency = Persistency.instance(self._busy)
        self.job = self.persistency.open_job("alpha", feed_changes_max=1_000)
        self.job.put("counters", ("begun",), b"")
        self.job.backup(self._copy).result(WAIT)
        self._producers = [Producer(self, me) for me in range(PRODUCERS)]
        self._doors = self._rested = 0

    def complain(self, complaint: str) -> None:
        """Note what is wrong."""
        self.wrong.append(complaint)

    def rage(self, forks: int) -> None:
        """Fork so many times, or until too much is wrong; then look at what is left."""
        work = [producer.run for producer in self._producers]
        work += [self._open_and_close, self._rest, self._errands, self._put_back]
        threads = [threading.Thread(target=self._guarded, args=(act,), name=f"storm:{act.__name__}") for act in work]
        for thread in threads:
            thread.start()
        log = (self._busy / "alpha.db-wal").stat().st_ino
        while self.forks < forks and len(self.wrong) < WRONG_MAX:
            time.sleep(self._rng.random() * PAUSE_MS_MAX / 1000)
            self._fork_somewhere()
            self.forks += 1
            with contextlib.suppress(FileNotFoundError):
                if (self._busy / "alpha.db-wal").stat().st_ino == log:
                    self._progress(self)
                    continue
            self.complain(f"file: the parent's log is gone or another one, after fork {self.forks}")
        self.over.set()
        for thread in threads:
            thread.join(WAIT)
            if thread.is_alive():
                self.complain(f"hang: {thread.name} doesn't come to its end")
        if not any(complaint.startswith("hang: storm") for complaint in self.wrong):
            self._look()

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except BaseException as error:
            if not self.over.is_set():
                self.complain(f"thread: {act.__qualname__}: {error!r}")

    # -- what else goes on -------------------------------------------------------------------------------------------

    def _open_and_close(self) -> None:
        persistency = Persistency(self._busy)
        KEPT.append(persistency)
        while not self.over.is_set():
            with persistency.open_job("doors", sync_interval=None) as job:
                job.put("rows", (self._doors,), b"%d" % self._doors)
                self._doors += 1

    def _rest(self) -> None:
        persistency = Persistency(self._busy, max_live_jobs=1)
        KEPT.append(persistency)
        jobs = [persistency.open_job(job_id) for job_id in ("rest-0", "rest-1")]
        while not self.over.is_set():
            for job in jobs:
                job.put("rows", (self._rested,), b"%d" % self._rested)
            self._rested += 1
            jobs[self._rested % 2].flush().result(WAIT)
        for job in jobs:
            job.close()

    def _errands(self) -> None:
        acts: list[Callable[[], Any]] = [
            lambda: self.job.backup(self._place / "backup.db"),
            self.job.check,
            lambda: self.job.export(self._place / "export"),
            self.job.compact,
        ]
        for act in itertools.cycle(acts):
            if self.over.is_set():
                return
            found = act().result(WAIT)
            if act == self.job.check and found:
                self.complain(f"unsound: {found}")
            with self._checker.open_reader("alpha") as reader:
                reader.count("rows").result(WAIT)

    def _put_back(self) -> None:
        persistency = Persistency(self._other)
        KEPT.append(persistency)
        while not self.over.is_set():
            persistency.restore("restored", self._copy)
            persistency.open_job("dropped", sync_interval=None).close()
            persistency.drop_job("dropped")

    # -- forks -------------------------------------------------------------------------------------------------------

    def _fork_somewhere(self) -> None:
        (place,) = self._rng.choices([*PLACES], [*PLACES.values()])
        end = self._rng.choice([*ENDS]) if place == "main" else "_exit"
        name = f"child {self.forks} ({place}, {end})"

        def fork(*_: object) -> None:
            for complaint in forked(lambda: self._be(place, end), end=end, name=name):
                self.complain(f"{complaint} ({name})")

        if place == "thread":
            thread = threading.Thread(target=fork)
            thread.start()
            thread.join()
        elif place == "run":
            self.job.run(fork).result(2 * CHILD_SECONDS)
        elif place == "callback":
            done = threading.Event()
            self.job.scan("rows", limit=3).add_done_callback(lambda _reply: (fork(), done.set()))
            done.wait(2 * CHILD_SECONDS)
        else:
            fork()

    def _be(self, place: str, end: str) -> Iterator[str]:
        """Do what a child does."""
        parent, own = os.getppid(), f"child-{self.forks}"
        recent = list(self.recent)
        yield from answered(recent)
        handles = inherited.Handles()
        # Inside of the job's own `run` a request to it is a mistake in any process.
        verbs = inherited.JOB if place != "run" else {"put": inherited.JOB["put"]}
        handles.add("job", self.job, verbs)
        handles.add("persistency", self.persistency, inherited.PERSISTENCY)
        handles.add("category", Category(self.job, "rows"), inherited.CATEGORY if place != "run" else {})
        handles.add("store", KVStore(self.job), inherited.KVSTORE if place != "run" else {})
        handles.add("class", Persistency, {"instance": lambda kind: kind.instance()})
        yield from handles.wrong()
        Persistency.reset()
        mine, other = Persistency.instance(self._busy), Persistency(self._other)
        try:
            mine.open_job("alpha")
            yield "lock: the child has opened the parent's job"
        except JobLocked as error:
            if error.pid != parent:
                yield f"lock: the child was told of {error.pid}, not {parent}"
        for persistency in (mine, other):
            KEPT.append(persistency)
            job = persistency.open_job(own, sync_interval=None)
            half = threading.Thread(target=lambda job=job: post(job, 0, OWN_ROWS // 2))
            half.start()
            post(job, OWN_ROWS // 2, OWN_ROWS)
            half.join()
            if job.get("rows", (7,)).result(WAIT) != b"7":
                yield "lost: the child doesn't read what it has written"
        if place == "grandchild":
            job = mine[own]
            limit_children(CHILD_SECONDS / 2)  # it must be seen by somebody who is still there
            yield from forked(lambda: self._be_grandchild(mine, job), name="a grandchild")
        if end == "_exit":
            mine.close()
            other.close()

    def _be_grandchild(self, persistency: Persistency, job: Job) -> Iterator[str]:
        yield from inherited.not_forked("grandchild's job.put", lambda: job.put("rows", (0,), b"grandchild"))
        yield from inherited.not_forked("grandchild's open_job", lambda: persistency.open_job("beta"))
        yield from inherited.not_forked("the parent's job.flush", self.job.flush)
        with Persistency(self._busy) as mine, mine.open_job("grandchild") as own:
            post(own, 0, 10)
            yield from missing("the grandchild's job", own, 10)

    # -- the end -----------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """See that the parent has lost nothing."""
        self.job.flush().result(WAIT)
        there = {row.key.parts: row.payload for row in self.job.scan("rows").result(WAIT)}
        wanted = {(me, at): row for me, one in enumerate(self._producers) for at, row in one.rows.items()}
        different = [at for at in there | wanted if there.get(at) != wanted.get(at)]
        if different:
            self.complain(f"lost: {len(different)} rows differ, the first: {different[0]}")
        for me, one in enumerate(self._producers):
            counted = self.job.increment("counters", (me,), 0).result(WAIT)
            if counted != one.counted:
                self.complain(f"lost: counter {me} is {counted}, not {one.counted}")
        numbers = self.job.statistics()
        if numbers.failed or numbers.pending or numbers.accepted != numbers.committed:
            self.complain(f"lost: {numbers}")
        self.wrong += [f"unsound: {problem}" for problem in self.job.check().result(WAIT)]
        for job_id, count in (("doors", self._doors), ("rest-0", self._rested), ("rest-1", self._rested)):
            with self._checker.open_job(job_id) as job:
                self.wrong += missing(job_id, job, count)
        for root, number in itertools.product((self._busy, self._other), range(self.forks)):
            with Persistency(root) as persistency, persistency.open_job(f"child-{number}") as job:
                found = job.count("rows").result(WAIT)
                if found != OWN_ROWS:
                    self.complain(f"lost: child {number} has {found} rows of {OWN_ROWS} in {root.name}")


def answered(replies: list[Reply[Any]]) -> Iterator[str]:
    """Complain of replies that in the child have neither the answer they had at the fork nor `Forked`."""
    done, not_done = wait(replies, timeout=inherited.SECONDS)
    for reply in not_done:
        yield f"reply: {reply!r} isn't settled"
    for reply in done:
        try:
            reply.result(inherited.SECONDS)
        except Forked:
            pass
        except BaseException as error:
            yield f"reply: {error!r}"


def main() -> None:
    """Rage, and print what is wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--forks", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=CHILD_SECONDS)
    given = parser.parse_args()
    limit_children(given.limit)
    begun = monotonic()

    def tell(storm: Storm) -> None:
        numbers = storm.job.statistics()
        told = {"forks": storm.forks, "rows": numbers.accepted, "seconds": round(monotonic() - begun, 1)}
        print(json.dumps({**told, "wrong": storm.wrong}), flush=True)

    with contextlib.suppress(Leave):
        storm = Storm(given.root, given.seed, tell)
        storm.rage(given.forks)
        tell(storm)
        Persistency.reset()


if __name__ == "__main__":
    main()
