"""The intake: rows of a file become rows of a job. The work behind `persistency import`.

Rules:
  1. Each row is posted as an event and forgotten; the mailbox's bound is what paces the reading, so that memory
     stays bounded however long the file is.
  2. It is over when `flush` has said that everything is committed; a write that failed is an error.
  3. The first row is read before the job is opened: a file that is no good makes no job.
  4. Where it stops early, at a bad line, at Ctrl-C or `kill`, what came before is stored, whole lines from the first
     to the one that is named, and nothing behind it.
  5. An atomic intake is one batch: all of the file is read, then all of it is stored or nothing.
  6. An end is a moment, and doesn't move: the clock stands still between the look at it and the row's posting.

Doesn't know: the terminal, how rows are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import chain, islice
from time import monotonic, time

from persistency import Job, Misuse, Poisoned, Put, Reply, StorageError, WriteFailed
from persistency.cli.cborstream import Interrupted, read_stream
from persistency.cli.ending import Fault, hint_of, stopped
from persistency.cli.infile import InFile
from persistency.cli.interrupts import Interrupts
from persistency.cli.opening import having
from persistency.cli.rowfile import RowFile, TakenRow

DEFAULT_CATEGORY = "records"
_ADVANCE_EVERY = 256
_TTL_MS_MAX = 10_000_000_000_000  # the longest that a row may have left
_MAPS = {bytes((byte,)) for byte in range(0xA0, 0xBC)}  # what the first item of an export may begin with
_OF_THE_BEGINNING = "What is stored is the beginning of the file; importing it again does no harm."


@dataclass(slots=True)
class Intake:
    """What was taken in: records read, keys its categories have now, how many of them they didn't have before.

    `ended` counts the rows that had ended by then, and were left out; `line` is the last one that was stored.
    """

    records: int = 0
    keys: int = 0
    new: int = 0
    ended: int = 0
    seconds: float = 0.0
    line: int = 0
    before: dict[str, int] = field(default_factory=dict)


class _Clock:
    """Unix seconds that go on only when they are told to."""

    def __init__(self) -> None:
        self.seconds = time()

    def __call__(self) -> float:
        return self.seconds

    def go_on(self) -> None:
        """Be as late as it is."""
        self.seconds = time()


def take_in(
    root: str, job_id: str, category: str | None, file: RowFile, advance: Callable[[int], None], *, atomic: bool = False
) -> Intake:
    """Put every row of a file into a job, which is made if it isn't there.

    Rows go to `category`; if that is `None`, to the one the file names. Raises `Fault` for a row that is no good,
    `PersistencyError` for what the job refuses, `Stop` with a word about what was done.
    """
    started = monotonic()
    take = _Taking(category, file, advance, atomic=atomic)
    try:
        take.begin()
    except (KeyboardInterrupt, SystemExit) as stop:
        raise stopped(stop, "nothing was stored") from None
    with having(root, job_id, make=True, clock=take.clock) as job:
        take.store(job)
    take.intake.seconds = monotonic() - started
    return take.intake


class _Taking:
    """One intake under way."""

    def __init__(self, category: str | None, file: RowFile, advance: Callable[[int], None], *, atomic: bool) -> None:
        self.clock = _Clock()
        self.intake = Intake()
        self._category = category
        self._file = file
        self._advance = advance
        self._atomic = atomic
        self._batch: Reply[int] | None = None
        self._rows: Iterator[TakenRow] = iter(file)

    def begin(self) -> None:
        """Read the first row, or all if they are to be stored together."""
        if not self._atomic:
            self._rows = chain(list(islice(self._rows, 1)), self._rows)
            return
        rows = []
        for row in self._rows:
            rows.append(row)
            if not len(rows) % _ADVANCE_EVERY:
                self._advance(len(rows))
        self._rows = iter(rows)

    def store(self, job: Job) -> None:
        """Store the rows."""
        try:
            if self._atomic:
                self._store_together(job)
            else:
                self._store_each(job)
        except (KeyboardInterrupt, SystemExit) as stop:
            self._finish(job)
            raise stopped(stop, self._told(job)) from None

    def _store_each(self, job: Job) -> None:
        intake, file = self.intake, self._file
        with Interrupts() as interrupts:
            try:
                for row in self._rows:
                    interrupts.busy = True  # a row is posted and counted, or neither
                    if (put := self._put_of(job, row)) is not None:
                        job.put(put.category, put.key, put.payload, ttl=put.ttl)
                    intake.records += 1
                    intake.line = file.line
                    if not intake.records % _ADVANCE_EVERY:
                        self._advance(intake.records)
                        self.clock.go_on()
                    interrupts.done()
                self._finish(job)
            except (Fault, Misuse) as error:
                interrupts.busy = False
                self._finish(job)
                # A file's own faults say where they are; what the job refuses knows nothing of lines.
                message = str(error) if isinstance(error, Fault) else f"{file.where}: {error}"
                hint = f"{hint_of(error)}\nThe records before it, {intake.records:,}, are stored."
                raise Fault(message, hint.strip()) from error
            except (StorageError, Poisoned, WriteFailed) as error:
                error.hint = f"{error.hint}\n{_OF_THE_BEGINNING}"
                raise

    def _store_together(self, job: Job) -> None:
        rows = list(self._rows)
        with Interrupts() as interrupts:
            try:
                puts = [put for put in (self._put_of(job, row) for row in rows) if put is not None]
                interrupts.busy = True  # a batch that was posted is not taken back: Ctrl-C is too late now
                self._batch = job.commit(puts)
                self._batch.result()
            except Misuse as error:
                raise Fault(f"{self._file.name}: {error}", f"{hint_of(error)}\nNothing was stored.".strip()) from error
            self.intake.records, self.intake.line = len(rows), self._file.line
            self._finish(job)

    def _put_of(self, job: Job, row: TakenRow) -> Put | None:
        """Return the operation of a row, or `None` if its time is over."""
        category = self._category or row.category or DEFAULT_CATEGORY
        if category not in self.intake.before:
            self.intake.before[category] = job.count(category).result()
        if row.expires_ms is None:
            return Put(category, row.key, row.payload)
        left_ms = row.expires_ms - job.now_ms
        if left_ms > _TTL_MS_MAX:
            raise Misuse(f"an end of {row.expires_ms} ms is too far away")
        if left_ms <= 0:
            self.intake.ended += 1
            return None
        return Put(category, row.key, row.payload, timedelta(milliseconds=left_ms))

    def _finish(self, job: Job) -> None:
        job.flush().result()
        self.intake.keys = sum(job.count(category).result() for category in self.intake.before)
        self.intake.new = max(0, self.intake.keys - sum(self.intake.before.values()))

    def _told(self, job: Job) -> str:
        if self._atomic:
            stored = self._batch is not None and self._batch.exception() is None
            return "all of it is stored" if stored else "nothing was stored"
        intake = self.intake
        where = ", ".join(map(repr, intake.before))
        return (
            f"{intake.records:,} records were read, up to line {intake.line:,}, and all of them are stored; "
            f"job {job.id!r} has {intake.keys:,} keys in {where}"
        )


def take_stream(root: str, job_id: str, file: InFile, advance: Callable[[int], None]) -> Intake:
    """Hand an export, in CBOR, to a job, which is made if it isn't there.

    Raises `Fault` for a file that is no such thing, `PersistencyError` for what the job refuses, `Stop` with a
    word about what was done.
    """
    started = monotonic()
    intake = Intake()
    pieces = file.pieces()
    first = next(pieces, b"")
    if first[:1] not in _MAPS:
        raise Fault(f"{file.name} is no export of a job", "Pass what `persistency export` has written.")
    with having(root, job_id, make=True) as job:
        try:
            intake.records = read_stream(job, chain([first], pieces), advance)
        except Interrupted as interrupted:
            told = f"{interrupted.rows:,} rows were read, and all of them are stored"
            raise stopped(interrupted.stop, told) from None
    intake.seconds = monotonic() - started
    return intake
