"""The intake: records of a file become rows of a job. The work behind `persistency import`.

Rules:
  1. Each record is posted as an event and forgotten; the mailbox's bound is what paces the reading, so that memory
     stays bounded however long the file is.
  2. It is over when `flush` has said that everything is committed; a write that failed is an error.
  3. The first record is read before the job is opened: a file that is no good makes no job.
  4. Where it stops early, at a bad line or at Ctrl-C, what came before is stored, and the message says how much.

Doesn't know: the terminal, how records are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice
from time import monotonic

from persistency import Job, Misuse, Persistency
from persistency.cli.ending import Fault
from persistency.cli.records import RecordFile

_ADVANCE_EVERY = 256


@dataclass(slots=True)
class Intake:
    """What was taken in: records read, keys the category has now, how many of them it didn't have before."""

    records: int = 0
    keys: int = 0
    new: int = 0
    seconds: float = 0.0


def take_in(root: str, job_id: str, category: str, file: RecordFile, advance: Callable[[int], None]) -> Intake:
    """Put every record of a file into a job, which is made if it isn't there.

    Raises `Fault` for a record that is no good, `PersistencyError` for what the job refuses, `KeyboardInterrupt` with
    a word about what was done.
    """
    intake = Intake()
    records = iter(file)
    first = list(islice(records, 1))
    started = monotonic()
    with Persistency(root) as persistency, persistency.open_job(job_id) as job:
        before = job.count(category).result()
        try:
            for key, payload in chain(first, records):
                job.put(category, key, payload)
                intake.records += 1
                if not intake.records % _ADVANCE_EVERY:
                    advance(intake.records)
            _finish(intake, job, category, before)
        except (Fault, Misuse) as error:
            _finish(intake, job, category, before)
            # A file's own faults say where they are; what the job refuses knows nothing of lines.
            message = str(error) if isinstance(error, Fault) else f"{file.where}: {error}"
            hint = f"{error.hint}\nThe records before it, {intake.records:,}, are stored."
            raise Fault(message, hint.strip()) from error
        except KeyboardInterrupt:
            _finish(intake, job, category, before)
            done = f"{intake.records:,} records were read, and the job has {intake.keys:,} keys in {category!r}"
            raise KeyboardInterrupt(done) from None
    intake.seconds = monotonic() - started
    return intake


def _finish(intake: Intake, job: Job, category: str, before: int) -> None:
    job.flush().result()
    intake.keys = job.count(category).result()
    intake.new = intake.keys - before
