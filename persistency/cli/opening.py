"""Opening: jobs that are there, to be read beside whoever has them, or to be had for one command.

Rules:
  1. What only looks uses a reader: it takes no lock, makes no job and never keeps an owner waiting.
  2. A job that isn't there is made by `put` and `import` alone; to all others it is a fault that says what is there.
     One that was made, and in which nothing was stored after all, is dropped again.
  3. A job that keeps its changes goes on keeping them while a command writes to it: a feed has no gap from here.
  4. Where the disk is full a person would rather be told than wait: a job stalls for a second, no longer.

Doesn't know: what is done with a job.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import time

from persistency import Job, JobLocked, JobNotFound, Misuse, Persistency, PersistencyError, Reader, StoredJob
from persistency.cli.ending import Fault, Locked
from persistency.cli.keys import as_texts, format_key

# The service's own bound isn't in the file: more than any has, so that nothing it still wants is dropped.
_FEED_CHANGES_MAX = 10_000_000
_STALL_TIMEOUT = 1.0
_SHOWN_MAX = 20


class NothingStored(Fault):
    """There is a job's file, but nobody has got as far as to store anything in it."""

    def __init__(self, stored: StoredJob) -> None:
        super().__init__(f"the file of job {stored.job_id!r} is empty: it holds no job yet", f"It is {stored.path}")


@contextmanager
def looking_into(root: str, job_id: str) -> Iterator[Reader]:
    """Give a reader of a job that is there."""
    with Persistency(root) as persistency:
        stored = find(persistency, root, job_id)
        with reading(persistency, stored) as reader:
            yield reader


@contextmanager
def reading(persistency: Persistency, stored: StoredJob) -> Iterator[Reader]:
    """Give a reader of a job that was found. Raises `NothingStored` if there is but an empty file."""
    try:
        reader = persistency.open_reader(stored.job_id)
    except JobNotFound as error:
        raise NothingStored(stored) from error
    with reader:
        yield reader


@contextmanager
def having(root: str, job_id: str, *, make: bool = False, clock: Callable[[], float] | None = None) -> Iterator[Job]:
    """Give a job that is there, or is to be made, and nobody else has."""
    with Persistency(root, clock=clock) as persistency:
        if not make:
            find(persistency, root, job_id)
        unused = False
        try:
            with _opened(persistency, job_id) as job:
                try:
                    yield job
                except BaseException:
                    with suppress(PersistencyError):
                        unused = make and job.version().result() == 0
                    raise
        except BaseException:
            if unused:
                with suppress(PersistencyError, OSError):
                    persistency.drop_job(job_id)
                    if not is_url(root):
                        Path(root).rmdir()  # if there is nothing else in it
            raise


def is_url(root: str) -> bool:
    """Say whether a root is a server's, and no directory."""
    return "://" in root


def check_there(root: str) -> None:
    """Raise `Fault` if there is no such directory."""
    if not is_url(root) and not Path(root).is_dir():
        raise Fault(f"no directory {root}", "A root is made by the first job that is stored in it.")


def find(persistency: Persistency, root: str, job_id: str) -> StoredJob:
    """Return what is stored of a job. Raises `Fault` if it isn't there, or its time is over."""
    jobs = persistency.stored_jobs()
    for stored in jobs:
        if stored.job_id == job_id:
            if stored.expires is not None and stored.expires <= time():
                raise Fault(
                    f"job {job_id!r} in {persistency.root if is_url(root) else root} has ended",
                    "Its files go with: persistency purge ROOT --expired",
                )
            return stored
    has = ", ".join(stored.job_id for stored in jobs[:_SHOWN_MAX]) + (", ..." if len(jobs) > _SHOWN_MAX else "")
    if jobs:
        hint = f"It has: {has}."
    else:
        hint = "There are no jobs in it." if is_url(root) or Path(root).is_dir() else "There is no such directory."
    raise Fault(f"no job {job_id!r} in {persistency.root if is_url(root) else root}", hint)


@contextmanager
def _opened(persistency: Persistency, job_id: str) -> Iterator[Job]:
    try:
        job = persistency.open_job(
            job_id,
            feed_changes_max=_FEED_CHANGES_MAX if _keeps_changes(persistency, job_id) else 0,
            stall_timeout=_STALL_TIMEOUT,
        )
    except JobLocked as error:
        raise owned(error) from error
    with job:
        yield job


def owned(error: JobLocked) -> Locked:
    """Return what says that another process has a job, and what to do about it."""
    stop = "that process" if error.pid is None else f"process {error.pid}"
    return Locked(str(error), f"Have {stop} do it, or close the job there (or stop it) and try again.")


def _keeps_changes(persistency: Persistency, job_id: str) -> bool:
    try:
        with persistency.open_reader(job_id) as reader:
            reader.changes(2**62, 1).result()
    except (JobNotFound, Misuse):
        return False
    return True


def why_nothing(job: Reader, category: str, typed: str | None) -> str:
    """Say what might have been meant where nothing was found."""
    names = job.categories().result()
    if category not in names:
        return f"Category {category!r} is empty; the job has: {', '.join(names) or 'no rows at all'}."
    other = as_texts(typed) if typed is not None else None
    if other is not None and job.scan_prefix(category, other, limit=1).result():
        return f"Its digits were read as numbers. With texts it is there: '{format_key(other)}'"
    first = job.keys(category, limit=1).result()
    return f"The first key is {format_key(first[0])}" if first else f"Category {category!r} is empty."
