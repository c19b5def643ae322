"""The directory adapter: a root that is a folder, and in it one SQLite file per job.

Rules:
  1. A job is owned before any of its files is looked into, and until its store is closed.
  2. What the folder holds besides jobs is never touched.

Doesn't know: threads, futures, rows.
"""

from __future__ import annotations

import contextlib
import logging
import os
from pathlib import Path

import apsw

from persistency.errors import Corrupt, Misuse, Unavailable
from persistency.logfields import about
from persistency.storage import copying, files, meta, schema, strangers
from persistency.storage.names import file_name, job_id_of
from persistency.storage.port import StoredJob, StoreOptions
from persistency.storage.reading import SqliteReader
from persistency.storage.sqlite import SqliteStore

log: logging.Logger = logging.getLogger("persistency.storage")


class DirectoryRoot:
    """A directory of jobs, one SQLite file each. `vfs` names another of SQLite's file systems, for tests."""

    lasting: bool = True

    def __init__(self, directory: Path, vfs: str | None = None) -> None:
        self.directory: Path = directory
        self.name: str = str(directory)
        self._vfs = vfs
        self._before = str(directory / "x")[:-1]  # what stands before a file's name

    def path(self, job_id: str) -> Path:
        """Return the file of a job, existing or not."""
        return Path(self._place(job_id))

    def _place(self, job_id: str) -> str:
        # An opening goes by text: to make a `Path`, and a text of it again, cost it as much as a statement.
        return self._before + file_name(job_id)

    def open(self, job_id: str, options: StoreOptions) -> SqliteStore:
        """Open a job's file and take ownership of it."""
        path = self._place(job_id)
        claim = self._own(path)
        try:
            there = files.clear_leftovers(path)
            if there.database is None:
                self._adopt(job_id)
                there = files.clear_leftovers(path)
            connection, stored, there = self._connect(job_id, path, claim, options, there)
            try:
                return SqliteStore(connection, stored, options, path, claim, there, self._vfs)
            except BaseException:
                schema.close(connection)
                raise
        except OSError as error:
            claim.release()
            raise Unavailable(f"can't open {path!r}: {error}") from error
        except BaseException:
            claim.release()
            raise

    def _own(self, path: str) -> files.Claim:
        """Take ownership of a job; without a root there is no place for its lock file, and the root is made."""
        try:
            return files.Claim(path)
        except Unavailable as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
        files.make_root(self.directory)
        return files.Claim(path)

    def look_into(self, job_id: str, now_ms: int) -> SqliteReader:
        """Open a job's file for reading alone."""
        return SqliteReader(self.path(job_id), job_id, now_ms, self._vfs)

    def _connect(
        self, job_id: str, path: str, claim: files.Claim, options: StoreOptions, there: files.Found
    ) -> tuple[apsw.Connection, dict[str, int], files.Found]:
        """Return a connection to the job's file, or to a fresh one, if the job has ended; the file's numbers; and what
        was there before.
        """
        if not there.database:
            if options.must_exist:
                raise Corrupt(
                    f"job {job_id!r} was dropped while it rested",
                    hint="Close the job; opened again it is what is there now.",
                )
            if there.database == 0:
                claim.check(0)
            elif claim.record.version:  # whoever removes a job's file means it
                fields = about("file_gone", job_id, path=path)
                log.warning("job %r: its file, which was there, is gone; it begins anew", job_id, extra=fields)
                claim.note(0, options.now_ms, None)
            files.prepare(path)
        connection = schema.connect(path, options.durability, self._vfs, lambda: claim.check(0), there)
        try:
            stored, its_id = meta.read_meta(connection)
            claim.check(stored["last_version"])
            meta.check_job_id(its_id, job_id, path)
            if there.log:
                schema.cut_off(connection)
            if its_id is None and not stored["last_version"]:
                meta.write_job_id(connection, job_id, path)
            ends_ms = stored.get(schema.ENDS)
            if ends_ms is None or options.now_ms < ends_ms:
                if options.expires_ms is not None:
                    if ends_ms is None and stored["last_version"]:
                        raise Misuse(f"job {job_id!r} is there for good: leave ttl out, or drop the job first")
                    connection.execute(schema.NOTE, (schema.ENDS, options.expires_ms))
                    stored[schema.ENDS] = options.expires_ms
                return connection, stored, there
            # What is to be deleted must be certain. A record that isn't there, or is damaged, contradicts nothing.
            if claim.record.used_ms is not None and claim.record.expires_ms != ends_ms:
                raise Corrupt(f"{path!r} says it has ended, but its lock file doesn't", hint="Drop the job.")
            schema.own_log(connection)
        except BaseException:
            schema.close(connection)
            raise
        schema.close(connection)
        files.remove(path, lock=False)
        claim.note(0, options.now_ms, None)
        return self._connect(job_id, path, claim, options, files.Found())

    def _adopt(self, job_id: str) -> None:
        """Take over a file of the Nim original, which was named by the id as it stands."""
        plain = self._original(job_id)
        if plain is None:
            return
        for beside in files.sidecars(plain):
            files.check_regular(beside)
        if files.check_regular(plain) and strangers.is_format_1(plain, self._vfs):
            plain.rename(self.path(job_id))
            files.sync_directory(self.directory)

    def _original(self, job_id: str) -> Path | None:
        """Return where the original kept a job, if something is there under just that name, and no other of ours."""
        plain = self.directory / f"{job_id}.db"
        # A path is tidied up: "./x" would take what belongs to "x".
        if plain.name != f"{job_id}.db" or plain == self.path(job_id):
            return None
        # By exact name: where names ignore case, another job's file would answer to this one.
        with contextlib.suppress(FileNotFoundError):
            return plain if plain.name in os.listdir(self.directory) else None
        return None

    def stored(self) -> list[StoredJob]:
        """Return every job in the directory, by id."""
        try:
            names = sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise Unavailable(f"can't list the root {str(self.directory)!r}: {error}") from error
        jobs = []
        for name in names:
            job_id = job_id_of(name)
            path = self.directory / name
            if job_id is not None and (size := files.size(path)) is not None:
                record = files.read_record(path.with_suffix(".lock"))
                total = size + sum(files.size(beside) or 0 for beside in files.sidecars(path))
                jobs.append(StoredJob(job_id, path, total, _seconds(record.used_ms), _seconds(record.expires_ms)))
        return sorted(jobs, key=lambda job: job.job_id)

    def restore(self, job_id: str, path: Path) -> None:
        """Put a backup in the place of a job.

        Raises `JobLocked` if another process owns it, and what `copying.restore` does.
        """
        target = self.path(job_id)
        if not files.check_regular(path):  # before anything of the job's is touched
            raise Unavailable(f"{str(path)!r} isn't there", hint="Pass the path of a backup.")
        claim = self._own(str(target))
        try:
            with contextlib.suppress(Corrupt):  # a log without its file: one more reason to restore
                if files.clear_leftovers(target).database is None:
                    self._adopt(job_id)  # else it would be taken for the job at the next opening
            known, was = claim.record, files.identity(target)
            claim.note(0, known.used_ms or 0, None)  # what was known is of what was there before
            try:
                copying.restore(path, target, job_id, vfs=self._vfs)
            except BaseException:
                if was is None and files.identity(target) is None:  # there is no job, and was none
                    claim.path.unlink(missing_ok=True)
                elif files.identity(target) == was:
                    claim.note(known.version, known.used_ms or 0, known.expires_ms)
                raise
        finally:
            claim.release()

    def drop(self, job_id: str) -> list[Path]:
        """Delete a job's files; return those removed.

        Raises `JobLocked` if another process owns it, `Corrupt` or `Unavailable` for what is not this job's.
        """
        path = self.path(job_id)
        there = any(os.path.lexists(file) for file in (path, *files.sidecars(path)))
        # A lock file alone is what a drop that failed half way has left.
        if not there and self._original(job_id) is None and not os.path.lexists(path.with_suffix(".lock")):
            return []
        claim = files.Claim(path)
        try:
            if not there:
                self._adopt(job_id)  # else it would be taken for the job at the next opening
            for file in (path, *files.sidecars(path)):
                files.check_regular(file)
            strangers.check_ours(path, job_id, self._vfs)
            copying.clear_attempts(path)
            return files.remove(path)
        finally:
            claim.release()


def _seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000
