"""Ownership: the leases a process has on jobs, kept alive for as long as it lives.

Whoever opens a job takes it: its row gets the owner's name, a new generation, and an end of the lease by the server's
clock. Every transaction that writes asks for its generation; so once somebody else has taken the job, whoever had it
can't write any more, whatever its own clock says. A commit renews the lease of its job; a thread does it for those that
don't write.

Rules:
  1. A name is used by one root object in one process, and by nobody ever after.
  2. A lease that has run out is still its owner's until somebody takes the job.
  3. What couldn't be renewed isn't given up: the next write finds out.
  4. The thread ends when there is nothing left to look after.

Doesn't know: rows, groups, SQL beyond the statement's name.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

from persistency.logfields import about
from persistency.storage.postgres import packing
from persistency.storage.postgres.address import Address
from persistency.storage.postgres.faults import Lost, Refused
from persistency.storage.postgres.pool import Holder, Pool
from persistency.storage.postgres.schema import Statements
from persistency.storage.postgres.session import Session

log: logging.Logger = logging.getLogger("persistency.storage")

IDLE_SECONDS = 60.0  # after so long a session that nobody uses is closed,
LINGER_SECONDS = 1.0  # or after so long while no job is open
# Never long for a row that a transaction of the job's owner has locked: that one renews the lease itself.
_LOCKED = b"55P03"
_SETTINGS = (b"SET lock_timeout = '500ms'",)


class Lease:
    """A job of ours: under which generation, until when for certain (monotonic), and whether somebody else has it."""

    __slots__ = ("generation", "job", "lost", "until")

    def __init__(self, job: str, generation: int, until: float) -> None:
        self.job: str = job
        self.generation: int = generation
        self.until: float = until
        self.lost: bool = False


class Leases:
    """The leases of one root."""

    def __init__(self, address: Address, statements: Statements, pool: Pool) -> None:
        self.owner: str = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(6)}"
        self.lease_ms: int = address.lease_ms
        self._address = address
        self._statements = statements
        self._pool = pool
        self._lock = threading.RLock()  # a signal handler may open a job too
        self._held: dict[str, Lease] = {}
        self._taking: set[str] = set()
        self._thread: threading.Thread | None = None
        self._nothing = threading.Event()  # is held, since the thread has looked
        self._session: Session | None = None

    @property
    def seconds(self) -> float:
        """For how long a lease is."""
        return self.lease_ms / 1000

    def add(self, job: str, generation: int, asked: float) -> Lease:
        """Look after a job that was taken by what was asked at a time."""
        lease = Lease(job, generation, asked + self.seconds)
        with self._lock:
            self._held[job] = lease
        self.tend()
        return lease

    def tend(self) -> None:
        """See that there is somebody to renew leases, and to close sessions that nobody uses."""
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._keep, name="persistency:leases", daemon=True)
                try:
                    self._thread = thread
                    thread.start()
                except RuntimeError:  # the interpreter ends: what is still to be written renews by itself
                    self._thread = None
                except BaseException:  # an interrupt: one that begins all the same sees that it isn't wanted
                    self._thread = thread if thread.is_alive() else None
                    raise

    @contextmanager
    def taking(self, job: str) -> Iterator[bool]:
        """While a job is taken: say whether it is free here. If so, nobody else takes it by way of this root meanwhile.

        A job that is free here, and on the server has our name, was left so by a taking or a giving back whose answer
        never came.
        """
        with self._lock:
            free = job not in self._held and job not in self._taking
            if free:
                self._taking.add(job)
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._taking.discard(job)

    def remove(self, lease: Lease) -> None:
        """Look after a job no more."""
        with self._lock:
            if self._held.get(lease.job) is lease:
                del self._held[lease.job]
            if not self._held:
                self._nothing.set()

    def give_back(self, lease: Lease, job_id: str, holder: Holder, now_ms: int, *, latest_ms: int) -> None:
        """Give a job back, last used at `now_ms`, with the latest time its rows know of (0: as it was).

        If that fails nothing is lost: others wait for the end of the lease, this root doesn't.
        """
        params = (lease.job.encode(), packing.int8(lease.generation), packing.int8(latest_ms), packing.int8(now_ms))
        begun = monotonic()
        while True:
            try:
                self._pool.borrow(holder).run(self._statements["give_back"], params)
                self._pool.park(holder)
                return
            except (Lost, Refused) as error:
                session = holder.session
                at_hand = session is not None and session.born < begun  # it may have been broken for long
                self._pool.give_up(holder)
                if not at_hand:
                    told = about("job_not_given_back", job_id, error)
                    log.warning("job %r couldn't be given back: %s", job_id, error, extra=told)
                    return

    # -- the thread ------------------------------------------------------------------------------------------------

    def _keep(self) -> None:
        with self._lock:
            if self._thread is not threading.current_thread():  # whoever has started it was interrupted, and has not
                return
        pause = 0.0
        while True:
            self._nothing.wait(pause)
            self._nothing.clear()
            if self._held:
                self._renew_in_spite()
                self._pool.close_idle(IDLE_SECONDS)
                pause = min(self.seconds / 3, IDLE_SECONDS / 4)
                continue
            self._disconnect()
            left = self._pool.close_idle(LINGER_SECONDS)
            pause = LINGER_SECONDS / 2
            with self._lock:
                if not self._held and not left:
                    self._thread = None
                    return

    def _renew_in_spite(self) -> None:
        try:
            self._renew(self._due())
        except (Lost, Refused) as error:
            fields = about("leases_not_renewed", None, error)
            log.warning("leases can't be renewed, it is tried again: %s", error, extra=fields)
            self._disconnect()

    def _due(self) -> list[Lease]:
        """Return the leases that nothing has renewed for a third of their time."""
        soon = monotonic() + 2 * self.seconds / 3
        with self._lock:
            return [lease for lease in self._held.values() if lease.until <= soon + 0.05 and not lease.lost]

    def _renew(self, due: list[Lease]) -> None:
        if not due:
            return
        if self._session is None or self._session.broken:
            self._session = Session(self._address, _SETTINGS)
            self._session.set_syncs(False)
        try:
            self._renew_together(due)
        except Refused as first:
            if first.state != _LOCKED:
                raise
            for lease in due:  # one of them is locked
                try:
                    self._renew_together([lease])
                except Refused as refused:
                    if refused.state != _LOCKED:
                        raise
                    log.debug("job %r: %s", lease.job, refused, extra=about("lease_renewed_later", lease.job, refused))

    def _renew_together(self, due: list[Lease]) -> None:
        assert self._session is not None
        asked = monotonic()
        params = (packing.texts([lease.job for lease in due]), self.owner.encode(), packing.int8(self.lease_ms))
        result = self._session.run(self._statements["renew"], params)
        renewed: dict[str, int] = {}
        for at in range(result.ntuples):
            job, generation = result.get_value(at, 0), result.get_value(at, 1)
            assert job is not None
            assert generation is not None
            renewed[job.decode()] = packing.number(generation)
        for lease in due:
            if renewed.get(lease.job) == lease.generation:
                lease.until = max(lease.until, asked + self.seconds)
            else:
                with self._lock:
                    lease.lost = self._held.get(lease.job) is lease  # else it was given back meanwhile

    def _disconnect(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()

    def forsake(self) -> None:
        """In a forked child: the thread isn't there, its session is the parent's."""
        self._lock = threading.RLock()
        self._taking.clear()
        session, self._session = self._session, None
        if session is not None:
            session.forsake()
