"""The root: a schema on a server, and in it the rows of every job.

Rules:
  1. Nothing is touched before the first job is opened, listed or dropped.
  2. A job is owned before any of its rows is looked at, and until its store is closed.

Doesn't know: threads, groups, what is asked of a store.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import TypeVar

from psycopg.pq.abc import PGresult

from persistency.errors import Corrupt, JobLocked, JobNotFound, Misuse, SchemaTooNew, StorageError
from persistency.logfields import about
from persistency.storage.names import file_name
from persistency.storage.port import StoredJob, StoreOptions
from persistency.storage.postgres.address import Address
from persistency.storage.postgres.bell import Bell
from persistency.storage.postgres.books import Books
from persistency.storage.postgres.faults import MADE_TWICE, MISSING, SERIALIZATION, Lost, Refused, translated
from persistency.storage.postgres.ownership import Leases
from persistency.storage.postgres.packing import int8, number_or_none
from persistency.storage.postgres.pool import Holder, Pool
from persistency.storage.postgres.reading import PostgresReader
from persistency.storage.postgres.reads import Reads, value, whole
from persistency.storage.postgres.schema import FORMAT, GENERATION_BITS, TAKES_MAX, Statements
from persistency.storage.postgres.session import BEGIN, COMMIT, Session, Statement
from persistency.storage.postgres.store import Found, PostgresStore

log: logging.Logger = logging.getLogger("persistency.storage")

T = TypeVar("T")

_TRIES_MAX = 20


class PostgresRoot:
    """The jobs at an address."""

    lasting: bool = True

    def __init__(self, address: Address) -> None:
        self.address: Address = address
        self.name: str = address.shown
        self._statements = Statements(address.schema)
        # One more is for the leases, and one for the bell.
        self._pool = Pool(lambda: Session(address), address.connections_max - 2)
        self._leases = Leases(address, self._statements, self._pool)
        self._bell = Bell(address, self._statements)
        self._made = False
        self._rings: bool | None = None  # whether the server can; `None`: nobody has asked yet

    def path(self, job_id: str) -> Path | None:
        """Return `None`: there is no file. The id is checked as a file's would be."""
        file_name(job_id)
        return None

    # -- opening ---------------------------------------------------------------------------------------------------

    def open(self, job_id: str, options: StoreOptions) -> PostgresStore:
        """Take a job and open it."""
        job = _stored_id(job_id)

        def act(session: Session) -> PostgresStore:
            asked = monotonic()
            session.set_syncs(True)
            rings = options.feed_changes_max > 0 and self._can_ring(session)
            session.run(BEGIN, ())
            generation, found = self._take(session, job_id, job, options)
            session.run(COMMIT, ())
            lease = self._leases.add(job.decode(), generation, asked)
            try:
                place = self._pool, self._statements, self._leases
                return PostgresStore(job_id, job, options, place, lease, found._replace(rings=rings))
            except BaseException:
                self._leases.remove(lease)
                raise

        with self._taking(job_id, job):
            return self._turn(act, f"job {job_id!r} can't be opened")

    @contextmanager
    def _taking(self, job_id: str, job: bytes) -> Iterator[None]:
        """Take a job that nobody has open here. Raises `JobLocked`."""
        with self._leases.taking(job.decode()) as free:
            if not free:
                raise _locked(job_id, self._leases.owner)
            yield

    def look_into(self, job_id: str, now_ms: int) -> PostgresReader:
        """Open a job for reading alone."""
        job = _stored_id(job_id)

        if not self._turn(self._has_tables, f"job {job_id!r} can't be read", makes=False):
            hint = "Check the id and the root: a reader makes nothing. open_job(job_id) does."
            raise JobNotFound(f"there is no job {job_id!r} in {self.name}", hint=hint)
        return PostgresReader(job_id, job, (self._pool, self._statements, self._bell), now_ms)

    def _can_ring(self, session: Session) -> bool:
        """Say whether the server has a bell; in a job's transaction one that has none would be the end of it."""
        if self._rings is None:
            try:
                session.run(self._statements["ring"], (b"0 ",))
                self._rings = True
            except Refused as error:
                log.info("the server has no bell: %s", error, extra=about("bell_missing", None, error))
                self._rings = False
        return self._rings

    def _take(self, session: Session, job_id: str, job: bytes, options: StoreOptions) -> tuple[int, Found]:
        """Take a job inside a transaction, and look at what is there."""
        there = session.run(self._statements["where"], (job,)).ntuples
        if options.must_exist and not there:
            raise Corrupt(
                f"job {job_id!r} was dropped while it rested",
                hint="Close the job; opened again it is what is there now.",
            )
        taken = self._taken(session, job_id, job, options.now_ms)
        notes: tuple[int | None, int | None] = (None, None)
        ends_ms = number_or_none(taken.get_value(0, 3))
        generation = whole(taken, 0, 0)
        if ends_ms is not None and ends_ms <= options.now_ms:
            generation = _new_generation()
            for name in ("drop_rows", "drop_changes", "drop_takes"):
                session.run(self._statements[name], (job,))
            session.run(self._statements["begin_anew"], (job, int8(generation)))
            books, ends_ms = Books(latest_ms=whole(taken, 0, 2)), None
        else:
            books = Books(whole(taken, 0, 1), latest_ms=whole(taken, 0, 2), used_ms=whole(taken, 0, 5))
            notes = number_or_none(taken.get_value(0, 4)), number_or_none(taken.get_value(0, 6))
        if options.expires_ms is not None:
            if ends_ms is None and books.version:
                raise Misuse(f"job {job_id!r} is there for good: leave ttl out, or drop the job first")
            session.run(self._statements["set_end"], (job, int8(options.expires_ms)))
            ends_ms = options.expires_ms
        books.latest_ms = max(books.latest_ms, books.used_ms)
        if options.feed_changes_max or notes[1] is not None:  # who follows tells by it whether what was seen is lost
            note = (generation, books.version, secrets.randbits(62), TAKES_MAX)
            session.run(self._statements["note_take"], (job, *map(int8, note)))
        outdated, reaping_counts = self._beside(session, job, options, books, notes)
        return generation, Found(books, ends_ms, outdated, reaping_counts)

    def _beside(
        self, session: Session, job: bytes, options: StoreOptions, books: Books, notes: tuple[int | None, int | None]
    ) -> tuple[bool, bool]:
        """Find what is kept beside the rows; return whether there are notes that this opening doesn't keep, and
        whether reaping takes a version.
        """
        used, dropped = notes
        reads = Reads(session, self._statements, job, books.used_ms if used is not None else books.latest_ms)
        books.next_expiry_ms = reads.next_end()
        if options.max_bytes is not None:
            books.used_ms = reads.now_ms
            books.used = reads.all_bytes() if used is None else used
        outdated = used is not None and options.max_bytes is None
        if not options.feed_changes_max:
            return outdated or dropped is not None, dropped is not None or reads.has_changes()
        if dropped is None:
            session.run(self._statements["drop_changes"], (job,))
            session.run(self._statements["set_feed"], (job, int8(books.version)))
            dropped = books.version
        books.dropped = dropped
        books.kept.extend(reads.kept_versions())
        return outdated, False

    def _taken(self, session: Session, job_id: str, job: bytes, now_ms: int) -> PGresult:
        owner = self._leases.owner.encode()
        params = (job, int8(_new_generation()), owner, int8(self._leases.lease_ms), int8(now_ms))
        for _ in range(_TRIES_MAX):
            taken = session.run(self._statements["take"], params)
            if taken.ntuples:
                return taken
            found = session.run(self._statements["owner"], (job,))
            if found.ntuples and (name := found.get_value(0, 0)) is not None:
                raise _locked(job_id, name.decode())
        raise JobLocked(f"job {job_id!r} changes hands all the time")

    # -- what needn't be open --------------------------------------------------------------------------------------

    def stored(self) -> list[StoredJob]:
        """Return every job here, by id; their bytes are those of keys, payloads and changes."""

        def act(session: Session) -> list[StoredJob]:
            result = session.run(self._statements["stored"], ())
            jobs = []
            for at in range(result.ntuples):
                ends_ms = number_or_none(result.get_value(at, 3))
                job_id = _job_id(value(result, at, 0).decode())
                expires = None if ends_ms is None else ends_ms / 1000
                jobs.append(StoredJob(job_id, None, whole(result, at, 1), whole(result, at, 2) / 1000, expires))
            return sorted(jobs, key=lambda job: job.job_id)

        return self._turn(act, "the jobs can't be listed", makes=False) or []

    def drop(self, job_id: str) -> list[Path]:
        """Delete a job; return no file. Raises `JobLocked` if somebody owns it."""
        job = _stored_id(job_id)

        def act(session: Session) -> list[Path]:
            session.set_syncs(True)
            session.run(BEGIN, ())
            if session.run(self._statements["where"], (job,)).ntuples:
                self._taken(session, job_id, job, 0)
                for name in ("drop_rows", "drop_changes", "drop_takes", "drop_job"):
                    session.run(self._statements[name], (job,))
            session.run(COMMIT, ())
            return []

        with self._taking(job_id, job):
            return self._turn(act, f"job {job_id!r} can't be dropped", makes=False) or []

    # -- turns -----------------------------------------------------------------------------------------------------

    def _turn(self, act: Callable[[Session], T], what: str, *, makes: bool = True) -> T:
        """Do something with a session, again if the server asks for it. Without `makes` nothing is made: then it is
        nothing where there are no tables.
        """
        holder, begun = Holder(), monotonic()
        for left in reversed(range(_TRIES_MAX)):
            try:
                session = self._pool.borrow(holder)
                try:
                    if self._has_tables(session) or makes:
                        self._make(session)
                        return act(session)
                    return None  # type: ignore[return-value]  # said above
                except BaseException:
                    session.roll_back()
                    raise
            except Refused as error:
                if not left or error.state not in SERIALIZATION:
                    raise translated(error, what) from error
            except Lost as error:
                at_hand = holder.session is not None and holder.session.born < begun
                self._pool.give_up(holder)
                if not at_hand or not left:
                    raise translated(error, what) from error
                continue  # it may have been broken for long
            finally:
                self._pool.leave(holder)
                self._leases.tend()
            sleep(random.uniform(0, 0.05))  # noqa: S311  # so that those who collide don't again
        raise AssertionError

    def _has_tables(self, session: Session) -> bool:
        """Say whether the tables are there. Raises `SchemaTooNew` for those of a later release."""
        if self._made:
            return True
        try:
            result = session.run(self._statements["format"], ())
        except Refused as error:
            if error.state in MISSING:
                return False
            raise
        found = whole(result) if result.ntuples else 0
        if found > FORMAT:
            raise SchemaTooNew(f"the tables in schema {self.address.schema!r} are of format {found}")
        self._made = found == FORMAT
        return found > 0

    def _make(self, session: Session) -> None:
        """Make the tables that aren't there: whoever does the same meanwhile is waited for."""
        for left in reversed(range(_TRIES_MAX)):
            self._has_tables(session)
            if self._made:
                return
            try:
                for sql in self._statements.making():
                    session.run(Statement(b"", sql.encode()), ())
                session.run(BEGIN, ())
                session.run(self._statements["new_meta"], ())
                if whole(session.run(self._statements["locked_format"], ())) < FORMAT:
                    for sql in self._statements.tables():
                        session.run(Statement(b"", sql.encode()), ())
                    session.run(self._statements["set_format"], (int8(FORMAT),))
                session.run(COMMIT, ())
            except Refused as error:
                session.roll_back()
                if not left or error.state not in MADE_TWICE:
                    raise
                sleep(random.uniform(0, 0.05))  # noqa: S311  # as above
        raise StorageError(f"the tables in schema {self.address.schema!r} can't be made")


def _new_generation() -> int:
    """Return where the generations of a new job begin: one that was dropped and made again meets none of its past."""
    return secrets.randbits(40) << GENERATION_BITS


def _stored_id(job_id: str) -> bytes:
    """Return an id as the tables have it: text has no NUL there."""
    file_name(job_id)
    return job_id.replace("%", "%25").replace("\0", "%00").encode()


def _job_id(stored: str) -> str:
    return stored.replace("%00", "\0").replace("%25", "%")


def _locked(job_id: str, owner: str) -> JobLocked:
    host, pid = (owner.split(":") + [""])[:2]
    here = host == socket.gethostname() and pid.isdigit()
    whose = " (this process)" if here and int(pid) == os.getpid() else ""
    return JobLocked(f"job {job_id!r} is owned by {owner}{whose}", int(pid) if here else None)
