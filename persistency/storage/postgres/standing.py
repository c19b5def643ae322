"""The standing of a job: what its owner holds to be so of it on the server, and what became of commits in doubt.

A connection that breaks while a commit is under way leaves that in doubt, and what was sent may even be done later than
the next thing that is asked. So every attempt has a number, which it writes into the job's row: whoever finds the
version otherwise than it was left sees which attempt it was.

Rules:
  1. Whenever it isn't certain that the job is as it was left, its row is read before anything else is done.
  2. What has happened is never done again. A version that has gone back means that something answered was lost: then
     nothing is done any more.

Doesn't know: what a group is, what is read and written, how sessions are had.
"""

from __future__ import annotations

from time import monotonic
from typing import Any, NamedTuple

from persistency.errors import Corrupt, LeaseLost
from persistency.storage.port import Group
from persistency.storage.postgres.books import Books
from persistency.storage.postgres.ownership import Lease, Leases
from persistency.storage.postgres.reads import whole
from persistency.storage.postgres.session import Session, Statement


class Attempt(NamedTuple):
    """A commit: of which group, what it answers, and the books as they are if it has happened."""

    group: Group
    outcomes: list[Any]
    books: Books


class Standing:
    """The standing of one job, which `books` say; `keep` changes are kept of it."""

    def __init__(self, job_id: str, job: bytes, lease: Lease, leases: Leases, books: Books, keep: int) -> None:
        self.books: Books = books
        self.lease: Lease = lease
        self.unsure: bool = False
        self._job_id = job_id
        self._job = job
        self._leases = leases
        self._keep = keep
        self._seen = monotonic()  # by then the server was known to have what the books say
        self._attempts: dict[int, Attempt] = {}  # of which it isn't known what became
        self._number = 0
        self._done: Attempt | None = None  # the one that turned out to have happened

    @property
    def doubtful(self) -> bool:
        """Whether a commit may have happened, or may still."""
        return bool(self._attempts)

    def is_sure(self, session: Session) -> bool:
        """Say whether it is certain that the job is as it was left."""
        lease = self.lease
        return not (self.unsure or session.born > self._seen or lease.lost or monotonic() >= lease.until)

    def make_sure(self, session: Session, where: Statement) -> None:
        """See that the job is as it was left, where that isn't certain. Raises `LeaseLost` or `Corrupt`."""
        if not self.is_sure(session):
            self._look(session, where)

    def has_moved(self, session: Session, where: Statement) -> bool:
        """Say, behind reads that nothing is committed with, whether something was done between them.

        That takes a lease that has run out, or an attempt in doubt that was done late. Raises `LeaseLost` or `Corrupt`.
        """
        if not self._attempts and not self.lease.lost and monotonic() < self.lease.until:
            return False
        before = self.books
        self._look(session, where)
        return self.books is not before

    def _look(self, session: Session, where: Statement) -> None:
        asked = monotonic()
        result = session.run(where, (self._job,))
        if not result.ntuples or whole(result, 0, 0) != self.lease.generation:
            self.lease.lost = True
            self._leases.remove(self.lease)
            raise LeaseLost(f"job {self._job_id!r} was taken over by another owner, or dropped")
        version, number, mine = whole(result, 0, 1), whole(result, 0, 2), self.books.version
        happened = self._attempts.get(number)
        if version != mine and happened is not None and happened.books.version == version:
            self.committed(happened.books, asked)
            self._done = happened
        elif version < mine:
            raise Corrupt(
                f"job {self._job_id!r} was at version {mine}, and the server has {version}: it lost what was answered",
                hint='Open the job again to go on from there; with durability="power" nothing is lost so.',
            )
        elif version > mine:
            raise Corrupt(f"job {self._job_id!r} has version {version}, but its owner is at {mine}")
        self._seen, self.unsure = max(self._seen, asked), False

    # -- commits ---------------------------------------------------------------------------------------------------

    def already(self, group: Group) -> list[Any] | None:
        """Return what a group answers that turned out to be committed, until forgotten; `None` for any other."""
        return self._done.outcomes if self._done is not None and self._done.group is group else None

    def forget(self) -> None:
        """Let go of a group that is about to be answered."""
        self._done = None

    def begin(self, attempt: Attempt) -> int:
        """Note down what is about to be committed; return its number."""
        self._number += 1
        self.unsure = True
        self._attempts[self._number] = attempt
        return self._number

    def didnt_happen(self, number: int) -> None:
        """Take note that an attempt was refused."""
        del self._attempts[number]

    def committed(self, books: Books, asked: float) -> None:
        """Take over what a commit has made of the books; it was `asked` for at a time, and renewed the lease."""
        books.settle(self._keep)
        self.books = books
        self._attempts.clear()  # none of the others can happen any more: the version is another
        self.unsure = False
        self._seen = max(self._seen, asked)
        self.lease.until = max(self.lease.until, asked + self._leases.seconds)
