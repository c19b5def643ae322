"""The directory adapter: a root that is a folder, and in it one SQLite file per job.

Rules:
  1. A job is owned before any of its files is looked into, and until its store is closed.
  2. What the folder holds besides jobs is never touched.

Doesn't know: threads, futures, rows.
"""

from __future__ import annotations

import os
from pathlib import Path

from persistency.storage import files, schema
from persistency.storage.port import StoredJob, StoreOptions
from persistency.storage.sqlite import SqliteStore


class DirectoryRoot:
    """A directory of jobs, one SQLite file each. `vfs` names another of SQLite's file systems, for tests."""

    def __init__(self, directory: Path, vfs: str | None = None) -> None:
        self.directory = directory
        self._vfs = vfs

    def path(self, job_id: str) -> Path:
        """Return the file of a job, existing or not."""
        return self.directory / files.file_name(job_id)

    def open(self, job_id: str, options: StoreOptions) -> SqliteStore:
        """Open a job's file and take ownership of it."""
        path = self.path(job_id)
        files.make_root(self.directory)
        claim = files.Claim(path)
        try:
            self._adopt(job_id, path)
            files.prepare(path)
            connection = schema.connect(path, options.durability, self._vfs)
            try:
                schema.check_job_id(connection, job_id, path)
                return SqliteStore(connection, options, claim.release)
            except BaseException:
                connection.close()
                raise
        except BaseException:
            claim.release()
            raise

    def _adopt(self, job_id: str, path: Path) -> None:
        """Take over a file of the Nim original, which was named by the id as it stands."""
        plain = self.directory / f"{job_id}.db"
        if path.exists() or plain.name == path.name or plain.parent != self.directory or "\0" in job_id:
            return
        # By exact name: where names ignore case, another job's file would answer to this one.
        if plain.name not in os.listdir(self.directory):
            return
        if files.check_regular(plain) and schema.is_format_1(plain, self._vfs):
            plain.rename(path)
            files.sync_directory(self.directory)

    def stored(self) -> list[StoredJob]:
        """Return every job in the directory, by id."""
        try:
            names = sorted(os.listdir(self.directory))
        except FileNotFoundError:
            return []
        jobs = []
        for name in names:
            job_id = files.job_id_of(name)
            path = self.directory / name
            if job_id is not None and not path.is_symlink() and path.is_file():
                sizes = [beside.stat().st_size for beside in (path, *files.sidecars(path)) if beside.exists()]
                jobs.append(StoredJob(job_id, path, sum(sizes)))
        return sorted(jobs)

    def drop(self, job_id: str) -> list[Path]:
        """Delete a job's files; return those removed. Raises `JobLocked` if another process owns it."""
        path = self.path(job_id)
        if not any(file.exists() or file.is_symlink() for file in (path, *files.sidecars(path))):
            return []
        claim = files.Claim(path)
        try:
            return files.remove(path)
        finally:
            claim.release()
