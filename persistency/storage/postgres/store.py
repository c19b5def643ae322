"""The store: one job of a PostgreSQL root, as whoever owns it uses it.

Rules:
  1. Every transaction that writes asks for the job's generation and last version, under the lock of the job's row:
     who has lost the job, or is late, writes nothing.
  2. A transaction is sent whole, with its commit: while a group is run, or its owner is paused, none is open and no
     lock is held. Who has done anything meanwhile has moved the version, which the fence asks for.
  3. What the server asks to be tried again is tried again whole, for a while.
  4. A group of nothing but puts is one statement; a single read is one; any other group takes two round trips at the
     most, and what its runs and ranges have to ask.

Doesn't know: how sessions are made and shared, what a message does, threads, clocks but the one for leases.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial
from time import monotonic, sleep
from typing import Any, NamedTuple, TypeVar

from psycopg.pq.abc import PGresult

from persistency.errors import Forked, StorageError
from persistency.storage.port import PLACES, READS, Barrier, GetRow, Group, Reap, ScanRange, Status, StoreOptions
from persistency.storage.postgres.ahead import Ahead
from persistency.storage.postgres.books import Books
from persistency.storage.postgres.draft import Draft
from persistency.storage.postgres.faults import FENCED, SERIALIZATION, TOO_LARGE, Lost, Refused, Unsent, translated
from persistency.storage.postgres.overlay import Overlay
from persistency.storage.postgres.ownership import Lease, Leases
from persistency.storage.postgres.packing import int8, number
from persistency.storage.postgres.pool import Holder, Pool
from persistency.storage.postgres.reads import Place, Reads, rows_of, whole
from persistency.storage.postgres.schema import Statements
from persistency.storage.postgres.session import BEGIN, COMMIT, ROLLBACK, Session
from persistency.storage.postgres.standing import Attempt, Standing
from persistency.storage.postgres.writes import Puts, as_puts, asked_by, change_steps, put_step

T = TypeVar("T")

TRIES_MAX = 10  # of what the server asks to be tried again
PAUSE_SECONDS = 0.005  # before the second try, at the most; then twice as long each time
KEY_BYTES_SAFE = 1_000  # no index refuses a key so short

_READS = READS | {Barrier}
_NOTHING: frozenset[Place] = frozenset()
_SYNC: Group = [None, Barrier(sync=True), None]


class Found(NamedTuple):
    """What opening a job has found: its books, its end, whether there are notes beside them that it doesn't keep, and
    changes that it once kept; and whether the server can ring for those who follow them.
    """

    books: Books
    expires_ms: int | None
    outdated: bool
    reaping_counts: bool
    rings: bool = False


class _Overtaken(Exception):
    """The fence found the job otherwise than it was left."""


class PostgresStore:
    """A job's rows on a server, which `lease` says is ours."""

    reads_in_place = False

    def __init__(
        self,
        job_id: str,
        job: bytes,
        options: StoreOptions,
        place: tuple[Pool, Statements, Leases],
        lease: Lease,
        found: Found,
    ) -> None:
        self.options: StoreOptions = options
        self.expires_ms: int | None = found.expires_ms
        self._job_id = job_id
        self._job = job
        self._pool, self._statements, self._leases = place
        self._lease = lease
        self._standing = Standing(job_id, job, lease, self._leases, found.books, options.feed_changes_max)
        self._now_ms = found.books.latest_ms  # the latest time it was told
        self._outdated = found.outdated
        self._rings = found.rings
        self._reaping_counts = found.reaping_counts
        self._syncs = options.durability == "power"
        self._keep = options.feed_changes_max
        self._has_quota = options.max_bytes is not None
        self._holder = Holder()
        self._too_long: dict[Place, None] = {}  # keys that may be, in what the server has refused
        self._ahead = Ahead(self._pool, self._holder, self._standing)
        self._forked = self._given_back = False

    # -- the port --------------------------------------------------------------------------------------------------

    def apply(self, group: Group, now_ms: int) -> list[Any]:
        """Run a group in one transaction; see the port."""
        self._now_ms = now_ms
        if len(group) == PLACES and type(group[1]) is GetRow:  # the usual read, by itself
            ahead = self._ahead.receive() if self._ahead.message is group[1] else None
            return [self._turn(self._get, group[1]) if ahead is None else self._row_of(ahead)]
        categories = group[::PLACES]
        if categories.count(None) == len(categories):
            messages = group[1::PLACES]
            kinds = set(map(type, messages))
            if kinds <= _READS and not (Barrier in kinds and _wants_sync(group)):
                return [None] * len(messages) if kinds <= {Barrier} else self._only_reads(group)
        return self._write(group)

    def get(self, category: bytes, key: bytes, now_ms: int) -> bytes | None:
        """Return the payload of a live row, or `None`."""
        payload: bytes | None = self.read(GetRow(category, key), now_ms)
        return payload

    def scan(self, span: ScanRange, now_ms: int) -> list[tuple[bytes, bytes]]:
        """Return the live rows of a range."""
        rows: list[tuple[bytes, bytes]] = self.read(span, now_ms)
        return rows

    def read(self, message: Any, now_ms: int) -> Any:
        """Answer one read message outside any group."""
        self._now_ms = now_ms
        return self._turn(self._get if type(message) is GetRow else self._answer, message)

    def prefetch(self, message: GetRow) -> None:
        """Send a read ahead of its turn, if that can be done without waiting for anything; see the port."""
        self._ahead.send(message, self._statements["get"], (self._job, message.category, message.key))

    @property
    def next_expiry_ms(self) -> int | None:
        """No row ends before this."""
        return self._standing.books.next_expiry_ms

    def reap(self, now_ms: int, limit: int) -> int:
        """Take rows away that have ended, in a transaction like any group's."""
        outcome: int = self.apply([None, Reap(limit), None], now_ms)[0]
        return outcome

    def status(self) -> Status:
        """Return the numbers; the log is the server's."""
        return Status(self._standing.books.version, 0, self._now_ms)

    @property
    def last_version(self) -> int:
        """The last version given."""
        return self._standing.books.version

    def settle(self, patience: float | None = None) -> None:  # noqa: ARG002 - the lease is locked by nobody else
        """Give the lease back, so that nobody need wait for its end; what comes late is written all the same."""
        self._give_back(self._now_ms)

    def close(self, *, tidy: bool = True, now_ms: int = 0) -> None:
        """Give the job back, and the session to others."""
        if self._forked:
            return
        try:
            self._give_back(max(now_ms, self._now_ms) if tidy else 0)
        finally:
            self._leases.remove(self._lease)
            self._pool.leave(self._holder)

    def _give_back(self, now_ms: int) -> None:
        if not self._given_back and not self._lease.lost:
            self._given_back = True
            self._forget_ahead()
            ends = self._standing.books.next_expiry_ms is not None
            self._leases.give_back(self._lease, self._job_id, self._holder, now_ms, latest_ms=now_ms if ends else 0)
        self._leases.remove(self._lease)

    def disown(self, *, quiet: bool) -> None:  # noqa: ARG002  # nothing is shared with the child but a socket
        """In a forked child: let go without a word."""
        self._forked = True
        self._pool.forsake(self._holder)
        self._leases.forsake()

    def _forget_ahead(self) -> None:
        if self._ahead.message is not None:
            self._ahead.receive()

    # -- turns -----------------------------------------------------------------------------------------------------

    def _turn(self, act: Callable[..., T], *args: Any) -> T:
        """Do something with a session that shows the job as it was left. Raises `StorageError`, `LeaseLost`."""
        if self._forked:
            raise Forked("this handle belongs to the process this one was forked from", hint="Open the job anew.")
        self._forget_ahead()
        pause = PAUSE_SECONDS
        for left in reversed(range(TRIES_MAX)):
            try:
                session = self._pool.borrow(self._holder)
                try:
                    self._standing.make_sure(session, self._statements["where"])
                    return act(session, *args)
                except BaseException:
                    self._standing.unsure = True
                    session.roll_back()
                    raise
            except _Overtaken:
                if not left:
                    raise StorageError("the job's version is never what was read") from None
            except Refused as refused:
                if refused.state not in SERIALIZATION or not left:
                    raise translated(refused, "the server refused a transaction") from refused
            except Lost as lost:
                self._pool.give_up(self._holder)
                failed = translated(lost, "the connection was lost")
                failed.at_commit = self._standing.doubtful
                raise failed from lost
            finally:
                self._pool.park(self._holder)
            sleep(random.uniform(0, pause))  # noqa: S311  # so that those who collide don't again
            pause *= 2
        raise AssertionError

    # -- reads -----------------------------------------------------------------------------------------------------

    def _draft(self, overlay: Overlay, books: Books, too_long: frozenset[Place] = _NOTHING) -> Draft:
        return Draft(overlay, books, self.options, too_long, reaping_counts=self._reaping_counts)

    def _get(self, session: Session, message: GetRow) -> bytes | None:
        return self._row_of(session.run(self._statements["get"], (self._job, message.category, message.key)))

    def _row_of(self, result: PGresult) -> bytes | None:
        if not result.ntuples:
            return None
        ends = result.get_value(0, 1)
        return None if ends is not None and number(ends) <= self._now_ms else result.get_value(0, 0)

    def _answer(self, session: Session, message: Any) -> Any:
        reads = Reads(session, self._statements, self._job, self._now_ms)
        draft = self._draft(Overlay(reads), self._standing.books.copy())
        draft.advance()
        outcome = draft.answer(message)
        self._check_unmoved(session)
        return outcome

    def _only_reads(self, group: Group) -> list[Any]:
        if len(group) == PLACES:
            return [self._turn(self._answer, group[1])]

        def act(session: Session) -> list[Any]:
            overlay = Overlay(Reads(session, self._statements, self._job, self._now_ms))
            for places, payloads in asked_by(group, sizes=False).questions():
                overlay.learn(places, overlay.reads.rows(places, payloads=payloads))
            draft = self._draft(overlay, self._standing.books.copy())
            draft.advance()
            outcomes = draft.run(group)
            self._check_unmoved(session)
            return outcomes

        return self._turn(act)

    def _check_unmoved(self, session: Session) -> None:
        """See that all that was read is of one state, and of this owner's."""
        if self._standing.has_moved(session, self._statements["where"]):
            raise _Overtaken

    # -- writes ----------------------------------------------------------------------------------------------------

    def _write(self, group: Group) -> list[Any]:
        plain = not (self._has_quota or self._keep or self._outdated)
        puts = as_puts(group) if plain else None
        refused = _NOTHING
        while True:
            self._too_long = {}
            try:
                outcomes = self._turn(partial(self._run, group=group, puts=puts, refused=refused))
                self._standing.forget()
                return outcomes
            except StorageError as error:
                if not self._too_long:
                    raise
                more = self._turn(self._find_too_long) - refused
                if not more:
                    raise error
                puts, refused = None, refused | more

    def _run(self, session: Session, group: Group, puts: Puts | None, refused: frozenset[Place]) -> list[Any]:
        syncs = self._syncs or (puts is None and _wants_sync(group))
        session.set_syncs(syncs)
        already = self._standing.already(group)
        if already is not None:
            # A server that went down while this waited for its copy comes back with it, and the copy may lack it.
            # Whoever commits once more waits for all that was committed before.
            if syncs:
                self._transaction(session, _SYNC, _NOTHING)
            return already
        return self._transaction(session, group, refused) if puts is None else self._put(session, group, puts)

    def _put(self, session: Session, group: Group, puts: Puts) -> list[Any]:
        """Run a group of puts in one statement."""
        before, count, outcomes = self._standing.books.version, len(puts.keys), puts.outcomes
        if count != len(outcomes) or any(outcomes):
            outcomes = [None if outcome is None else before + outcome for outcome in outcomes]
        if not count:
            return outcomes
        books = self._standing.books.copy()
        books.version = before + count
        for end in puts.ends or ():
            books.expect_end(end)
        if books.next_expiry_ms is not None:
            books.latest_ms = self._now_ms
        fence = self._lease.generation, before
        number = self._standing.begin(Attempt(group, outcomes, books))
        terms = books.latest_ms, self._now_ms, self._leases.lease_ms, number
        asked = monotonic()
        try:
            result = session.run(*put_step(self._statements, self._job, fence, puts, terms))
        except (Refused, Unsent) as error:
            self._standing.didnt_happen(number)
            self._too_large(error, zip(puts.categories, puts.keys, strict=True))
            raise
        if not result.command_tuples:
            self._standing.didnt_happen(number)
            raise _Overtaken
        self._standing.committed(books, asked)
        self._outdated = False
        return outcomes

    def _transaction(self, session: Session, group: Group, refused: frozenset[Place]) -> list[Any]:
        """Run a group in two round trips: what it has to know, if anything, and what it has changed."""
        books = self._standing.books.copy()
        overlay = Overlay(Reads(session, self._statements, self._job, self._now_ms))
        questions = asked_by(group, sizes=self._has_quota).questions()
        if questions:
            results = session.pipe([overlay.reads.asking(places, payloads=payloads) for places, payloads in questions])
            for (places, _), result in zip(questions, results, strict=True):
                overlay.learn(places, rows_of(result))
        draft = self._draft(overlay, books, refused)
        draft.advance()
        attempt = Attempt(group, draft.run(group), books)
        self._finish(session, attempt, overlay)
        return attempt.outcomes

    def _finish(self, session: Session, attempt: Attempt, overlay: Overlay) -> None:
        """Send what a group has changed, behind the fence, and commit it."""
        group, _, books = attempt
        before = self._standing.books.version
        dropped = books.no_longer_kept(self._keep) if self._keep else 0
        steps = change_steps(self._statements, self._job, overlay, books, ended_too=not self._keep, dropped=dropped)
        asks_end = type(group[1]) is Reap and len(overlay.written) < group[1].limit
        if not steps and books.version == before and not _wants_sync(group):
            books.next_expiry_ms = overlay.reads.next_end() if asks_end else books.next_expiry_ms
            self._check_unmoved(session)
            self._standing.books = books  # what it has learned of ends and of bytes in use
            return
        books.dropped = max(books.dropped, dropped)
        if books.next_expiry_ms is not None:
            books.latest_ms = self._now_ms
        number = self._standing.begin(attempt)
        fence = (
            self._job, int8(self._lease.generation), int8(before), int8(books.version), int8(books.latest_ms),
            int8(self._now_ms), int8(books.used) if self._has_quota else None, int8(books.used_ms),
            int8(books.dropped) if self._keep else None, int8(number), int8(self._leases.lease_ms),
        )  # fmt: skip
        if self._rings and books.fresh:
            steps.append((self._statements["ring"], (b"%d %b" % (books.version, self._job),)))
        steps += [(self._statements["next_end"], (self._job,))] if asks_end else []
        asked = monotonic()
        try:
            results = session.pipe([(BEGIN, ()), (self._statements["fence"], fence), *steps, (COMMIT, ())])
        except (Refused, Unsent) as error:
            self._standing.didnt_happen(number)
            if isinstance(error, Refused) and error.state == FENCED:
                raise _Overtaken from error
            self._too_large(error, overlay.written)
            raise
        if asks_end:
            books.next_expiry_ms = whole(results[-2]) if results[-2].ntuples else None
        self._standing.committed(books, asked)
        self._outdated = False

    def _too_large(self, error: Refused | Unsent, written: Iterable[Place]) -> None:
        """Take note of keys that the server may have refused."""
        if isinstance(error, Refused) and error.state in TOO_LARGE:
            self._too_long = {place: None for place in written if len(place[1]) > KEY_BYTES_SAFE}

    def _find_too_long(self, session: Session) -> frozenset[Place]:
        """Try the keys that may be too long for an index; nothing of it stays. Raises what else is wrong."""
        found = set()
        for category, key in self._too_long:
            try:
                session.pipe([(BEGIN, ()), (self._statements["try"], (self._job, category, key)), (ROLLBACK, ())])
            except Refused as error:
                session.roll_back()
                if error.state not in TOO_LARGE:
                    raise
                found.add((category, bytes(key)))
        return frozenset(found)


def _wants_sync(group: Group) -> bool:
    return any(type(message) is Barrier and message.sync for message in group[1::PLACES])
