"""The stream: records posted as fire-and-forget events, while another thread reads back what was posted before.

Rules:
  1. A key is read back only after its put has returned; the read must then give that payload, or a later one of the
     same key, or it is a fault.
  2. The reader asks once per `READ_EVERY` posted records, so that it measures a read beside the stream, and not how
     fast two threads can take turns. Its time runs from the call to the answer, in a thread of its own.
  3. What was posted is remembered as a digest per key, against which everything is checked afterwards.

Doesn't know: where records come from, the terminal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from time import monotonic, perf_counter

from persistency import Job, Key, PersistencyError

READ_EVERY = 50
_ADVANCE_EVERY = 256
_STRIDE = 7_919  # a prime: visits what was posted in no order that storage could like


@dataclass(slots=True)
class Posted:
    """What was posted: the digest of each key's last payload, and of those that replaced an earlier one."""

    records: int = 0
    digests: dict[Key, int] = field(default_factory=dict)
    again: dict[Key, list[int]] = field(default_factory=dict)
    keys: list[Key] = field(default_factory=list)

    def put(self, job: Job, category: str, key: Key, payload: bytes) -> None:
        """Post a record and remember it; its key can be read back from then on."""
        digest = hash(payload)
        if key in self.digests:
            # Told before the put: whoever reads meanwhile may get either payload.
            self.again.setdefault(key, []).append(digest)
        job.put(category, key, payload)
        self.digests[key] = digest
        self.keys.append(key)
        self.records += 1


class Beside(threading.Thread):
    """The reader: gets keys that were posted before, checks what it gets, and keeps the times."""

    def __init__(self, job: Job, category: str, posted: Posted) -> None:
        super().__init__(name="reads beside the stream", daemon=True)
        self.seconds: list[float] = []
        self.faults: list[str] = []
        self._job = job
        self._category = category
        self._posted = posted
        self._turn = threading.Event()
        self._over = False

    def take_turn(self) -> None:
        """Let it read once; turns that come while it reads are one."""
        self._turn.set()

    def stop(self) -> None:
        """Let it read a last time, and wait for that."""
        self._over = True
        self._turn.set()
        self.join()

    def run(self) -> None:
        """Read at every turn until it is over, or something is wrong."""
        over = False
        while not over and not self.faults:
            self._turn.wait()
            self._turn.clear()
            over = self._over
            try:
                self._read()
            except (PersistencyError, TimeoutError) as error:
                self.faults.append(f"a read beside the stream failed: {error!r}")

    def _read(self) -> None:
        keys = self._posted.keys
        if not keys:
            return  # stopped before the first record
        key = keys[len(self.seconds) * _STRIDE % len(keys)]
        posted = self._posted.digests[key]
        started = perf_counter()
        payload = self._job.get(self._category, key).result()
        self.seconds.append(perf_counter() - started)
        if payload is None:
            self.faults.append(f"{key!r} was posted, and a read after that didn't find it")
        elif hash(payload) != posted and hash(payload) not in self._posted.again.get(key, ()):
            self.faults.append(f"{key!r} was posted, and a read after that gave another payload")


@dataclass(frozen=True, slots=True)
class Streamed:
    """How the stream went: until everything was committed, and the reads beside it."""

    seconds: float
    reads: int
    read_ms_p50: float
    read_ms_p99: float
    faults: list[str]


def stream(
    job: Job, category: str, records: Iterable[tuple[Key, bytes]], posted: Posted, advance: Callable[[int], None]
) -> Streamed:
    """Post every record into a job, with reads beside it, and wait until all are committed."""
    beside = Beside(job, category, posted)
    beside.start()
    started = monotonic()
    try:
        for key, payload in records:
            posted.put(job, category, key, payload)
            if not posted.records % READ_EVERY:
                beside.take_turn()
            if not posted.records % _ADVANCE_EVERY:
                advance(posted.records)
        job.flush().result()
        seconds = monotonic() - started
    finally:
        beside.stop()
    times = sorted(beside.seconds)
    return Streamed(seconds, len(times), percentile_ms(times, 0.50), percentile_ms(times, 0.99), beside.faults)


def percentile_ms(ordered: list[float], part: float) -> float:
    """Return a percentile of sorted seconds, in milliseconds; 0.0 of none."""
    return round(ordered[int(part * (len(ordered) - 1))] * 1000, 3) if ordered else 0.0
