"""Groups: how the messages of one group are run against the table, inside the transaction that is open.

First all together: consecutive puts share statements, and reads that stand among them are answered from what is still
to be written. Where a message turns out to be at fault by itself, or the job's quota is near, the group is run again
with each message apart, so that what has to be refused is undone alone.

Rules:
  1. A message is run whole or not at all, and its outcome is its own.
  2. What a message can't be blamed for is raised: it is the environment's fault, and the whole group's.
  3. Reads see every write before them.

Doesn't know: BEGIN, COMMIT and ROLLBACK, files, what becomes of an outcome.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import apsw

from persistency.errors import Misuse, PersistencyError, StorageError
from persistency.storage.port import (
    PLACES,
    READS,
    Barrier,
    Batch,
    Expect,
    Failed,
    GetRow,
    Group,
    Reap,
    Run,
    SetRow,
    SwapRow,
)
from persistency.storage.schema import translated
from persistency.storage.table import ANSWERS, Table

# What a message can be guilty of by itself; anything else that is raised is the environment's fault.
OWN_FAULTS = (
    apsw.TooBigError,
    apsw.NoMemError,
    apsw.ConstraintError,
    apsw.MismatchError,
    apsw.RangeError,
    MemoryError,
    OverflowError,
    TypeError,
    ValueError,
)

# What is wrong with writing, even when it is a read that meets it.
_WRITE_FAULTS = (apsw.FullError, apsw.ReadOnlyError)
_WRITE_CODES = (apsw.SQLITE_IOERR_WRITE, apsw.SQLITE_IOERR_FSYNC, apsw.SQLITE_IOERR_TRUNCATE)

Refused = dict[int, Failed]


class ReadFault(Exception):
    """A read broke the transaction it stood in; the group is run again without it."""

    def __init__(self, at: int, error: StorageError) -> None:
        super().__init__(at, error)
        self.at = at
        self.error = error


class Groups:
    """Runs groups against a table; `more` answers messages of the kinds that aren't about rows."""

    def __init__(self, connection: apsw.Connection, table: Table, more: Callable[[Any], Any]) -> None:
        self._connection = connection
        self._table = table
        self._execute = table.execute
        self._more = more

    def answer(self, message: Any) -> Any:
        """Return the answer of one message."""
        kind = type(message)
        if kind in ANSWERS:
            return ANSWERS[kind](self._table, message)
        return self._more(message) if kind not in _OWN else _OWN[kind](self, message)

    def together(self, group: Group, refused: Refused) -> list[Any]:
        """Run a group, neighbours together; `refused` are the outcomes already known, by the message's number."""
        quota = self._table.quota
        if quota is not None and quota.used + _incoming(group) > quota.limit:
            return self.apart(group, refused)
        return self._each(group, refused)

    def apart(self, group: Group, refused: Refused) -> list[Any]:
        """Run each message in a savepoint of its own, so that one that can't be stored is undone alone."""
        outcomes: list[Any] = []
        for at in range(len(group) // PLACES):
            message = group[at * PLACES : (at + 1) * PLACES]
            mark = self._table.mark()
            self._execute("SAVEPOINT message")
            over: PersistencyError | None
            outcome: Any = None  # where it is refused, what it is refused with takes the place
            try:
                outcome = self._each(message, {0: refused[at]} if at in refused else {})[0]
                over = self._table.refusal(mark)
            except ReadFault as fault:
                raise ReadFault(at, fault.error) from fault
            except OWN_FAULTS as error:
                over = translated(error, "it can't be stored")
            if over is not None:
                self._execute("ROLLBACK TO message")
                self._table.back_to(mark)
                outcome = Failed(over)
            self._execute("RELEASE message")
            outcomes.append(outcome)
        return outcomes

    def _each(self, group: Group, refused: Refused) -> list[Any]:
        if len(group) == PLACES and type(group[1]) is Batch:
            return [self._batch(group[1])]
        outcomes: list[Any] = [None] * (len(group) // PLACES)
        categories = group[::PLACES]
        if None not in categories:
            self._table.write(categories, group[1::PLACES], group[2::PLACES])
            return outcomes
        if set(map(type, group[1::PLACES])) == {SetRow}:
            columns: list[Any] = list(zip(*group[1::PLACES], strict=True))
            self._table.write(*columns[:4])
            return outcomes
        rows: Group = []  # puts not yet written
        ends: dict[int, int | None] = {}  # of those that have one, by number
        recent: dict[tuple[bytes, bytes], bytes] = {}  # the payloads in their first `seen` places
        seen = 0
        for at, place in enumerate(range(0, len(group), PLACES)):
            category, message = group[place], group[place + 1]
            kind = type(message)
            if category is not None:
                rows += (category, message, group[place + 2])
                continue
            if kind is SetRow:
                ends[len(rows) // PLACES] = message.expires_ms
                rows += message[:PLACES]
                continue
            if kind is GetRow and rows and not ends:
                # Answered from the puts before it, so that pipelined puts and gets still share statements.
                for row in range(seen, len(rows), PLACES):
                    recent[rows[row], rows[row + 1]] = rows[row + 2]
                seen = len(rows)
                outcomes[at] = recent.get((message.category, message.key))
                if outcomes[at] is not None:
                    continue
            elif kind is Batch and None not in message.items[::PLACES]:
                rows += message.items
                outcomes[at] = self._table.version + len(rows) // PLACES
                continue
            elif rows:
                self._write(rows, ends)
                rows, ends, recent, seen = [], {}, {}, 0
            outcomes[at] = refused[at] if at in refused else self.one(message, kind, at)
        self._write(rows, ends)
        return outcomes

    def _write(self, rows: Group, ends: dict[int, int | None]) -> None:
        of_rows = [ends.get(at) for at in range(len(rows) // PLACES)] if ends else None
        self._table.write(rows[::PLACES], rows[1::PLACES], rows[2::PLACES], of_rows)

    def one(self, message: Any, kind: type, at: int) -> Any:
        """Run one message, the group's number `at`, when all before it is written."""
        if kind is Run:
            return self._run(message, at)
        if kind not in READS:
            return self.answer(message)
        try:
            return self.answer(message)
        except (apsw.Error, UnicodeDecodeError) as error:
            if is_write_fault(error):
                raise  # there was no room to read into: the group's own pages had to be written first
            fault = translated(error, "a read failed")
            if self._connection.in_transaction:
                return Failed(fault)
            raise ReadFault(at, fault) from error

    def _batch(self, batch: Batch) -> int | Failed:
        if batch.expects:
            for message in batch.items[1::PLACES]:
                if type(message) is Expect:
                    conflict = self._table.conflict(message)
                    if conflict is not None:
                        return Failed(conflict)
        self._each(batch.items, {})
        return self._table.version

    def _expect(self, _message: Expect) -> None:
        self._table.version += 1  # its batch has looked already; like every operation it takes a version

    def _run(self, message: Run, at: int) -> Any:
        """Call a caller's function in a savepoint of its own."""
        mark = self._table.mark()
        within = Inside(self, self._table)
        self._execute("SAVEPOINT run")
        outcome: Any
        try:
            outcome = message.fn(within)
        except BaseException as error:
            outcome = Failed(error)
        # What the transaction met counts, whatever the function has made of it.
        if within.broken is not None:
            if isinstance(within.broken, StorageError):
                raise ReadFault(at, within.broken)
            if not isinstance(within.broken, OWN_FAULTS):
                raise within.broken
            outcome = Failed(translated(within.broken, "it can't be stored"))
        if type(outcome) is Failed:
            self._execute("ROLLBACK TO run")
            self._table.back_to(mark)
        self._execute("RELEASE run")
        return outcome


# What is answered here, and not by the table.
_OWN: dict[type, Callable[[Groups, Any], Any]] = {
    Batch: Groups._batch,
    Expect: Groups._expect,
    Barrier: lambda _groups, _message: None,
}


class Inside:
    """What a run's function gets. `broken` is what has ended its transaction, or harmed it: a read's `StorageError` or
    a write's own exception.
    """

    def __init__(self, groups: Groups, table: Table) -> None:
        self.broken: Exception | None = None
        self._groups = groups
        self._table = table

    @property
    def version(self) -> int:
        """The last version given."""
        return self._table.version

    def do(self, message: Any) -> Any:
        """Run one message; see the port."""
        if self.broken is not None:
            raise translated(self.broken, "the transaction is broken")
        kind = type(message)
        if kind in (Reap, Expect) or not (kind in ANSWERS or kind in (Batch, Run)):
            raise Misuse(f"{kind.__name__} has no place inside a run")
        outcome = self._read(message, kind) if kind in READS else self._apply(message, kind)
        if type(outcome) is Failed:
            raise outcome.error
        return outcome

    def _read(self, message: Any, kind: type) -> Any:
        try:
            return self._groups.one(message, kind, 0)
        except ReadFault as fault:
            self.broken = fault.error
            raise fault.error from fault
        except apsw.Error as error:
            self.broken = error
            raise translated(error, "the disk failed a read") from error

    def _apply(self, message: Any, kind: type) -> Any:
        try:
            # What can fail here has either written nothing yet, or has undone it.
            return self._groups.one(message, kind, 0)
        except ReadFault as fault:
            self.broken = fault.error
            raise fault.error from fault
        except (apsw.Error, *OWN_FAULTS) as error:
            self.broken = error
            raise translated(error, "a write failed") from error


def is_write_fault(error: Exception) -> bool:
    """Say whether an error is about writing, whoever met it."""
    return isinstance(error, _WRITE_FAULTS) or getattr(error, "extendedresult", 0) in _WRITE_CODES


def _incoming(group: Group) -> int:
    """Return the most a group can add to what is stored, in bytes of payload."""
    categories = group[::PLACES]
    if None not in categories:
        return sum(map(len, group[2::PLACES]))
    places = zip(categories, group[1::PLACES], group[2::PLACES], strict=True)
    return sum(_adds(message) if category is None else len(payload) for category, message, payload in places)


def _adds(message: Any) -> int:
    match message:
        case SetRow():
            return len(message.payload)
        case SwapRow():
            return len(message.payload or b"")
        case Batch():
            return _incoming(message.items)
        case Run():
            return 2**63  # nobody knows before it was run
        case _:
            return 0


def intent(group: Group) -> tuple[bool, bool, list[Barrier]]:
    """Return whether a group writes, whether it has a barrier that wants the medium, and its barriers."""
    if len(group) == PLACES and type(group[1]) is Batch:  # a commit in place: the usual group
        return True, False, []
    categories = group[::PLACES]
    if None not in categories:
        return bool(group), False, []
    messages = [group[at + 1] for at in range(0, len(group), PLACES) if group[at] is None]
    kinds = {type(message) for message in messages}
    writes = len(messages) < len(categories) or bool(kinds - READS - {Barrier})
    barriers = [message for message in messages if type(message) is Barrier] if Barrier in kinds else []
    sync = any(barrier.sync for barrier in barriers)
    return writes, sync, barriers


assert PLACES == 3, "a put's places are written out in this module"
