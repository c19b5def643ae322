"""The writers that are killed: they post numbered rows without end and say what they do before and after it."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

from persistency import Job, Persistency, Put, key
from persistency.storage import sqlite
from persistency.storage.port import Durability
from tests.crash.ledger import (
    ANNOUNCED,
    ENDED,
    FLUSHED,
    OPENED,
    ROWS,
    STATE,
    STATE_KEY,
    Posted,
    record,
    row_payload,
    state_payload,
)

ROWS_MAX = 60_000  # per life of a writer: far more than the time it has is enough for


class Writer:
    """One job, opened to be written to until the end."""

    def __init__(self, job: Job, tell: int, rng: random.Random) -> None:
        self.job = job
        self.rng = rng
        self._pipe = tell
        self.number = job.count(ROWS).result()
        self.version = job.version().result()
        self.tell(OPENED)

    def tell(self, kind: bytes, ahead: int = 0) -> None:
        """Say something about the rows up to the current one, or to one ahead of it."""
        os.write(self._pipe, record(kind, self.number + ahead))

    def batch(self, size: int) -> list[Put]:
        """Return the next batch; its last operation marks it in the state row."""
        first, version = self.number, self.version
        posted = [Posted(first + at, first, size, version + at + 1) for at in range(size)]
        ops = [Put(ROWS, key(row.number), row_payload(row)) for row in posted]
        if size > 1:
            ops.append(Put(STATE, key(*STATE_KEY), state_payload(first)))
        self.number += size
        self.version += len(ops)
        return ops

    def post_puts(self, count: int) -> None:
        """Post plain puts."""
        put, number, version = self.job.put, self.number, self.version
        for at in range(count):
            put(ROWS, key(number + at), row_payload(Posted(number + at, number + at, 1, version + at + 1)))
        self.number += count
        self.version += count

    def post_block(self) -> None:
        """Announce a block of rows, then post it in one of the ways there are."""
        rng = self.rng
        way = rng.random()
        if way < 0.55:
            count = rng.randint(1, 150)
            self.tell(ANNOUNCED, count)
            self.post_puts(count)
        elif way < 0.85:
            sizes = [rng.randint(2, 9) for _ in range(rng.randint(1, 12))]
            self.tell(ANNOUNCED, sum(sizes))
            for size in sizes:
                self.job.persist(self.batch(size))
        elif way < 0.95:
            self.tell(ANNOUNCED, 20)
            for _ in range(20):
                self.post_puts(1)
                self.job.get(ROWS, key(self.number - 1))  # nobody waits for it
        else:
            size = rng.choice((1, 2, 40))
            self.tell(ANNOUNCED, size)
            self.job.commit(self.batch(size)).result()
            self.tell(FLUSHED)  # what is answered is committed, and all that was posted before it


def write(root: Path, job_id: str, durability: Durability, seed: int, tell: int) -> None:
    """Post rows and flush now and then, until killed."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        # Checkpoints all the time, so that kills fall into them as well.
        sqlite.CHECKPOINT_IDLE_PAGES, sqlite.CHECKPOINT_FORCED_PAGES = 40, 120
    persistency = Persistency(root)
    writer = Writer(persistency.open_job(job_id, durability=durability), tell, rng)
    end = writer.number + ROWS_MAX
    while writer.number < end:
        for _ in range(rng.randint(1, 25)):
            writer.post_block()
        writer.job.flush(sync=rng.random() < 0.05).result()
        writer.tell(FLUSHED)
    writer.tell(ENDED)
    signal.pause()


def write_and_reopen(root: Path, job_id: str, durability: Durability, seed: int, tell: int) -> None:
    """Open the job, post a little, close it, and so on, until killed: the kill falls into an opening or a closing."""
    rng = random.Random(seed)
    persistency = Persistency(root)
    for _ in range(2_000):
        job = persistency.open_job(job_id, durability=durability)
        writer = Writer(job, tell, rng)
        for _ in range(rng.randint(0, 3)):
            writer.post_block()
        job.close()
        writer.tell(FLUSHED)
    writer.tell(ENDED)
    signal.pause()


WRITERS = {"stream": write, "doors": write_and_reopen}
