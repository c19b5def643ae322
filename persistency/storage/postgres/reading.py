"""The read-only PostgreSQL store: a job beside whoever owns it, in this process or in another.

Rules:
  1. Every call is a read-only transaction of its own, a snapshot, over before it returns.
  2. Nothing is written and nothing claimed; an owner never waits for it.
  3. A job that was dropped isn't read on: what has its name now is another one.
  4. A read that fails is a `Failed` outcome, whatever the reason.

Doesn't know: threads, futures, key tuples, clocks, who owns the job.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from persistency.errors import Closed, FeedTruncated, Forked, JobNotFound, Misuse, PersistencyError, Unavailable
from persistency.storage.port import PLACES, Failed, GetRow, Group, ListChanges, ScanRange, Status, StoreOptions
from persistency.storage.postgres.bell import Bell
from persistency.storage.postgres.books import Books
from persistency.storage.postgres.draft import Draft
from persistency.storage.postgres.faults import SERIALIZATION, Lost, Refused, translated
from persistency.storage.postgres.overlay import Overlay
from persistency.storage.postgres.packing import int8, number_or_none
from persistency.storage.postgres.pool import Holder, Pool
from persistency.storage.postgres.reads import Reads, State, state_of, whole
from persistency.storage.postgres.schema import GENERATION_BITS, Statements
from persistency.storage.postgres.session import COMMIT, Session, Statement

T = TypeVar("T")

TRIES_MAX = 5
_BEGIN = Statement(b"begin_reading", b"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
_NEVER_MS = 2**62
_ANY_VERSION = 2**62  # above every version there can be


class PostgresReader:
    """The rows of a job for reading alone; `now_ms` is when it is opened. Raises `JobNotFound` if there is no job."""

    reads_in_place = False
    expires_ms: int | None = None  # a job's end is looked at by every call: its owner may have put it off

    def __init__(self, job_id: str, job: bytes, place: tuple[Pool, Statements, Bell], now_ms: int = 0) -> None:
        self._job_id = job_id
        self._job = job
        self._pool, self._statements, self._bell = place
        self._holder = Holder()
        self._status = Status(0, 0)
        self._seen: State | None = None  # by the last call
        self._told: State | None = None  # by the bell
        self._rings = self._looked = 0  # how often it was rung, and of these how many before the last call began
        self._doubtful = False  # whether what was seen may be lost: changes would then have a gap
        self._forked = False
        self._dropped: int | None = None  # the highest version whose change isn't kept; `None`: none are
        self._following: object | None = None
        self._ask(lambda _reads: None, now_ms)

    # -- the port ------------------------------------------------------------------------------------------------

    @property
    def next_expiry_ms(self) -> int:
        """A moment that never comes: rows end at any time here, but taking them away is their owner's work."""
        return _NEVER_MS

    def apply(self, group: Group, now_ms: int) -> list[Any]:
        """Answer a group of reads in one snapshot."""
        messages = group[1::PLACES]
        try:
            return self._ask(lambda reads: [self._answer(reads, message) for message in messages], now_ms)
        except PersistencyError as error:
            return [Failed(error)] * len(messages)

    def get(self, category: bytes, key: bytes, now_ms: int) -> bytes | None:
        """Return the payload of a live row, or `None`."""
        payload: bytes | None = self.read(GetRow(category, key), now_ms)
        return payload

    def scan(self, span: ScanRange, now_ms: int) -> list[tuple[bytes, bytes]]:
        """Return the live rows of a range."""
        rows: list[tuple[bytes, bytes]] = self.read(span, now_ms)
        return rows

    def read(self, message: Any, now_ms: int) -> Any:
        """Answer one read."""
        return self.apply([None, message, None], now_ms)[0]

    def reap(self, now_ms: int, limit: int) -> int:  # noqa: ARG002  # the port has them
        """Take nothing away: that is its owner's work."""
        return 0

    def status(self) -> Status:
        """Return the numbers, as of the last call. The log is the server's."""
        return self._status

    @property
    def last_version(self) -> int:
        """The last version that is known to be there; above all others while there may be something to be seen."""
        return self._status.last_version if self._looked == self._rings else _ANY_VERSION

    def follow(self, ring: Callable[[], None]) -> None:
        """Call `ring`, from any thread, whenever the job may be another than was seen; until it is closed.

        A version that has gone back, or another owner's, is as much worth a look as a higher one: what was seen may be
        lost.
        """

        def tell(state: State | None) -> None:
            if state is None or state not in (self._seen, self._told):
                self._told = state
                self._rings += 1
                ring()

        self._following = self._bell.follow(self._job.decode(), tell)

    def close(self, *, tidy: bool = True, now_ms: int = 0) -> None:  # noqa: ARG002  # the port has it
        """Give up everything that is held."""
        if not self._forked:
            self._bell.leave(self._following)
            self._pool.leave(self._holder)

    def disown(self, *, quiet: bool) -> None:  # noqa: ARG002  # the port has it
        """In a forked child: let go without a word."""
        self._forked = True
        self._pool.forsake(self._holder)
        self._bell.forsake()

    # -- one call ------------------------------------------------------------------------------------------------

    def _ask(self, ask: Callable[[Reads], T], now_ms: int) -> T:
        """Return what `ask` finds in one snapshot."""
        if self._forked:
            raise Forked(f"the reader of job {self._job_id!r} is the parent process'", hint="Open another one here.")
        what = f"job {self._job_id!r} can't be read"
        for left in reversed(range(TRIES_MAX)):
            try:
                session = self._pool.borrow(self._holder)
                try:
                    return self._look(session, ask, now_ms)
                except BaseException:
                    session.roll_back()
                    raise
            except Refused as error:
                if error.state not in SERIALIZATION or not left:
                    raise translated(error, what) from error
            except Lost as error:  # over another connection, if there can be one
                self._pool.give_up(self._holder)
                if not left:
                    raise translated(error, what) from error
            finally:
                self._pool.park(self._holder)
        raise AssertionError

    def _look(self, session: Session, ask: Callable[[Reads], T], now_ms: int) -> T:
        rings = self._rings
        found = session.pipe([(_BEGIN, ()), (self._statements["reading"], (self._job,))])[1]
        if not found.ntuples:
            if self._seen is None:
                hint = "Check the id and the root: a reader makes nothing. open_job(job_id) does."
                raise JobNotFound(f"there is no job {self._job_id!r} here", hint=hint)
            raise self._gone("it was dropped")
        state, latest_ms, ends_ms = state_of(found), whole(found, 0, 3), number_or_none(found.get_value(0, 4))
        if self._seen is not None and self._is_lost(session, self._seen, state):
            raise self._gone("it was dropped and made anew, or has lost its last commits")
        now_ms = max(now_ms, latest_ms)
        if ends_ms is not None and now_ms >= ends_ms:
            if self._seen is None:
                raise JobNotFound(f"there is no job {self._job_id!r} here: it has ended")
            raise Closed(f"job {self._job_id!r} has ended", hint="It was a temporary job; open_job makes a new one.")
        self._status = Status(state.version, 0, latest_ms)
        self._seen, self._looked = state, rings
        self._dropped = number_or_none(found.get_value(0, 5))
        answer = ask(Reads(session, self._statements, self._job, now_ms))
        session.run(COMMIT, ())
        return answer

    def _is_lost(self, session: Session, seen: State, now: State) -> bool:
        """Say whether what was seen is no longer what the job is made of, by how it stood then and stands now.

        An owner whose commits were lost goes on no more. So that happens where it was taken anew: at a version below
        what was seen, however far its owner has come since.
        """
        if now.generation >> GENERATION_BITS != seen.generation >> GENERATION_BITS or now.version < seen.version:
            return True
        if (now.generation, now.mark) == (seen.generation, seen.mark) or self._dropped is None:  # nobody followed
            return False
        found = session.run(self._statements["takes_since"], (self._job, int8(seen.generation)))
        count, lowest, mark = whole(found, 0, 0), whole(found, 0, 1), number_or_none(found.get_value(0, 2))
        if now.generation < seen.generation or (count and lowest < seen.version):
            return True
        if mark != seen.mark and None not in (mark, seen.mark):
            return True
        # Of takes of long ago there is no note.
        self._doubtful |= count != now.generation - seen.generation or mark != seen.mark
        return False

    def _gone(self, why: str) -> Unavailable:
        return Unavailable(
            f"job {self._job_id!r} can't be read on: {why}",
            hint="Close this reader; another one reads what is there now.",
        )

    def _answer(self, reads: Reads, message: Any) -> Any:
        if type(message) is ListChanges:
            return self._changes(reads, message)
        books = Books(self._status.last_version)
        return Draft(Overlay(reads), books, StoreOptions(), frozenset(), reaping_counts=False).answer(message)

    def _changes(self, reads: Reads, message: ListChanges) -> Any:
        dropped = self._dropped
        if dropped is None:
            return Failed(Misuse(f"job {self._job_id!r} keeps no changes: have it opened with feed_changes_max=10_000"))
        if self._doubtful:
            return Failed(self._gone("it has changed hands too often to tell whether it has lost commits"))
        if message.after < dropped:
            oldest = reads.changes(dropped, 1)
            return Failed(FeedTruncated(oldest[0].version if oldest else dropped + 1))
        return reads.changes(message.after, message.limit)
