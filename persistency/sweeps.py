"""Sweeps: what a root holds, which jobs are dropped because their time is over, or to make room, and what is put back.

Rules:
  1. A job that is open, here or in another process, is never dropped to make room.
  2. What can't be dropped is passed over, and told to the log; the others go all the same.

Doesn't know: how a job is dropped or put back, threads.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable
from os import PathLike

from persistency.arguments import as_file
from persistency.closing import Closing
from persistency.driving import drive
from persistency.errors import JobLocked, Misuse, PersistencyError
from persistency.logfields import about
from persistency.registry import Site
from persistency.storage.port import StoredJob

log: logging.Logger = logging.getLogger("persistency")

_UNITS = {"": 1, "k": 1_000, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d{1,30}(?:\.\d{1,30})?) *([kmgt]i?)?b?", re.IGNORECASE | re.ASCII)


def as_bytes(value: object, argument: str) -> int:
    """Return a number of bytes, given as an int or as a text like "500MB" or "2GiB". Raises `Misuse`."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = _SIZE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None:
        raise Misuse(f'{argument} must be bytes, not {value!r:.80}: pass 500_000_000, "500MB" or "2GiB"')
    from fractions import Fraction  # only here: hardly any service sets a size as text

    return int(Fraction(found[1]) * _UNITS[(found[2] or "").lower()])


def _dropped_to_fit(stored: Iterable[StoredJob], max_bytes: int, drop: Callable[[str], bool]) -> list[str]:
    """Drop the jobs that were used the longest ago until the others fit; return their ids.

    `drop` says whether a job is gone; one whose last use nobody knows counts as used the longest ago.
    """
    jobs = sorted(stored, key=lambda job: (job.last_used or 0.0, job.job_id))
    total = sum(job.bytes for job in jobs)
    gone = []
    for job in jobs:
        if total <= max_bytes:
            break
        if drop(job.job_id):
            gone.append(job.job_id)
            total -= job.bytes
    return gone


def _dropped_expired(stored: Iterable[StoredJob], now: float, drop: Callable[[str], bool]) -> list[str]:
    """Drop the jobs whose time is over; return their ids."""
    ended = [job.job_id for job in stored if job.expires is not None and job.expires <= now]
    return [job_id for job_id in ended if drop(job_id)]


def _tried(job_id: str, drop: Callable[[], object]) -> bool:
    """Drop a job; return whether it is gone."""
    try:
        drop()
    except JobLocked:
        return False
    except PersistencyError as error:
        log.warning("job %r couldn't be dropped: %s", job_id, error, extra=about("drop_failed", job_id, error))
        return False
    return True


class Sweeping(Closing):
    """What is done with the jobs of a root that needn't be open: listed, dropped, put back."""

    _site: Site
    _read_ms: Callable[[], int]
    _open_timeout: float | None

    def _check_here(self) -> None:
        """Raise `Forked` in a forked child. To be overridden."""

    def _check_open(self) -> None:
        """Raise `Closed` too. To be overridden."""

    def stored_jobs(self) -> list[StoredJob]:
        """Return every job the root keeps, open or not."""
        self._check_here()
        return self._site.root.stored()

    def purge_expired(self) -> list[str]:
        """Drop the temporary jobs whose time is over, and return their ids; those of other processes stay."""
        self._check_open()
        now = self._read_ms() / 1000
        return _dropped_expired(self.stored_jobs(), now, lambda job_id: _tried(job_id, self._end(job_id)))

    def _end(self, job_id: str) -> Callable[[], object]:
        def end() -> None:
            gone = self._site.end(job_id)
            if gone is not None:
                gone.result(self._open_timeout)
            drive(self._site.drop(job_id, aside=False), self._open_timeout)

        return end

    def purge(self, max_bytes: int | str) -> list[str]:
        """Drop the jobs that were used the longest ago, until the root takes no more than `max_bytes`.

        `max_bytes`: a number, or a text like `"500MB"` or `"2GiB"`; 0 is no limit. Returns the ids of those
        dropped. One that is open, here or in another process, is never dropped.
        """
        limit = as_bytes(max_bytes, "max_bytes")
        self._check_open()
        if not limit:
            return []
        return _dropped_to_fit(
            self.stored_jobs(),
            limit,
            lambda job_id: _tried(job_id, lambda: drive(self._site.drop(job_id, aside=False), self._open_timeout)),
        )

    def restore(self, job_id: str, path: str | PathLike[str]) -> None:
        """Make a job of a backup, in the place of what there was; an open job is refused with `JobLocked`.

        The file at `path` stays as it is. Whatever goes wrong, the job is as it was before, or as in the backup.
        Raises `Corrupt` for a file that isn't sound or no job's, `SchemaTooNew`, or another `StorageError`.
        """
        source = as_file(path, "path")
        self._check_open()
        drive(self._site.restore(job_id, source), self._open_timeout)
