"""Small concurrent histories: what several threads and loops did with one job at once, and whether it fits together.

A history is some ten to forty calls of two to four clients on three keys of a category that nobody has used before.
Every call is stamped from one counter: before it is made, when it returns, and when its answer is there. The job is one
object: batches, scans and functions touch several keys, and every answer that tells a version tells where its call
stood among all the others. What is searched for is one order of the calls in which a plain sequential job gives the
very same answers, and in which no call comes before one that was over when it began (Wing and Gong's search; what was
tried once, as a set of calls and the state behind them, isn't tried again, as Lowe does).

It is searched for twice: with a call over when its answer is there, which is linearizability; and with a call over when
it returns, for a job promises more than that: it works in the order of posting.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

from persistency import Check, Delete, KeyRange, Op, Put, Reply, key
from persistency.codec.values import decode, encode
from persistency.transaction import Transaction

KEYS = (key("a"), key("a", 1), key("b"))
NUMBER = {found: at for at, found in enumerate(KEYS)}
PREFIX = (0, 1)  # the numbers of the keys that begin with ("a",)
TEXT = encode("no number")
LINEAR = "is not linearizable"
POSTING = "is not in the order of posting"


# -- the sequential job -----------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A row."""

    payload: bytes
    version: int


class State(NamedTuple):
    """All there is: the job's last version, and the row of each key."""

    version: int
    rows: tuple[Stored | None, ...]

    def payload(self, at: int) -> bytes | None:
        row = self.rows[at]
        return None if row is None else row.payload

    def write(self, at: int, payload: bytes | None) -> State:
        """Put or, with `None`, delete; either takes a version."""
        version = self.version + 1
        row = None if payload is None else Stored(payload, version)
        return State(version, (*self.rows[:at], row, *self.rows[at + 1 :]))

    def took_one(self) -> State:
        return self._replace(version=self.version + 1)

    def here(self, among: tuple[int, ...] = (0, 1, 2)) -> list[int]:
        return [at for at in among if self.rows[at] is not None]


Step = tuple[Any, State]
Item = tuple[str, int, Any]  # "put", "delete" or "check", a key, a payload or a version


def _batch(state: State, items: tuple[Item, ...]) -> State | tuple[Any, ...]:
    for kind, at, version in items:
        row = state.rows[at]
        actual = None if row is None else row.version
        if kind == "check" and actual != version:
            return ("conflict", at, version, actual)
    for kind, at, payload in items:
        state = state.took_one() if kind == "check" else state.write(at, payload)
    return state


def _commit(state: State, items: tuple[Item, ...]) -> Step:
    after = _batch(state, items)
    return (after.version, after) if isinstance(after, State) else (after, state)


def _persist(state: State, items: tuple[Item, ...]) -> Step:
    after = _batch(state, items)
    assert isinstance(after, State)  # there are no checks in events here
    return None, after


def _swap(state: State, at: int, expected: bytes | None, new: bytes | None) -> Step:
    return (True, state.write(at, new)) if state.payload(at) == expected else (False, state)


def _increment(state: State, at: int, delta: int) -> Step:
    payload = state.payload(at)
    if payload == TEXT:
        return ("conflict", at), state
    total = delta if payload is None else int(decode(payload)) + delta
    return total, state.write(at, encode(total))


def _touch(state: State, at: int) -> Step:
    return (False, state) if state.rows[at] is None else (True, state.took_one())


def _delete_several(state: State, among: tuple[int, ...]) -> Step:
    gone = state.here(among)
    rows = tuple(None if at in gone else row for at, row in enumerate(state.rows))
    return len(gone), State(state.version + 1, rows)


def _exchange(state: State, one: int, other: int) -> Step:
    first, second = state.payload(one), state.payload(other)
    return (first, second), state.write(one, second).write(other, first)


def _scan(state: State, among: tuple[int, ...], reverse: bool, limit: int | None) -> Step:
    found = tuple((at, state.payload(at)) for at in state.here(among))
    return (found[::-1] if reverse else found)[:limit], state


def _snapshot(state: State) -> Step:
    found = [(at, row.payload, row.version) for at, row in enumerate(state.rows) if row is not None]
    return tuple(sorted(found, key=lambda row: row[2])), state


# -- what is called ---------------------------------------------------------------------------------------------------


class Undone(Exception):
    """Raised by a function, so that what it wrote is undone."""


def exchange(tx: Transaction, category: str, one: int, other: int) -> tuple[bytes | None, bytes | None]:
    """Exchange two rows and return what they were."""
    payloads = tx.get(category, KEYS[one]), tx.get(category, KEYS[other])
    for at, payload in zip((one, other), reversed(payloads), strict=True):
        if payload is None:
            tx.delete(category, KEYS[at])
        else:
            tx.put(category, KEYS[at], payload)
    return payloads


def write_and_raise(tx: Transaction, category: str, at: int, payload: bytes) -> None:
    """Write over two rows and think better of it."""
    tx.put(category, KEYS[at], payload)
    tx.delete(category, KEYS[at - 1])
    raise Undone


def ops_of(category: str, items: tuple[Item, ...]) -> Iterator[Op]:
    """Yield the operations of a batch."""
    for kind, at, argument in items:
        if kind == "check":
            yield Check(category, KEYS[at], argument)
        elif argument is None:
            yield Delete(category, KEYS[at])
        else:
            yield Put(category, KEYS[at], argument)


@dataclass(frozen=True)
class Verb:
    """Something a client can do: how it is posted, what a sequential job makes of it, how its answer is noted."""

    post: Callable[..., Reply[Any] | None]
    model: Callable[..., Step]
    noted: Callable[[Any], Any] = lambda answer: answer


def _rows(found: Any) -> tuple[tuple[int, bytes], ...]:
    return tuple((NUMBER[row_key], payload) for row_key, payload in found)


VERBS: dict[str, Verb] = {
    "put": Verb(lambda job, c, at, value: job.put(c, KEYS[at], value), lambda s, at, v: (None, s.write(at, v))),
    "delete": Verb(lambda job, c, at: job.delete(c, KEYS[at]), lambda s, at: (None, s.write(at, None))),
    "persist": Verb(lambda job, c, items: job.persist(ops_of(c, items)), _persist),
    "commit": Verb(lambda job, c, items: job.commit(ops_of(c, items)), _commit),
    "compare_and_set": Verb(lambda job, c, at, old, new: job.compare_and_set(c, KEYS[at], old, new), _swap),
    "increment": Verb(lambda job, c, at, delta: job.increment(c, KEYS[at], delta), _increment),
    "touch": Verb(lambda job, c, at: job.touch(c, KEYS[at], None), _touch),
    "delete_acked": Verb(
        lambda job, c, at: job.delete_acked(c, KEYS[at]), lambda s, at: (s.rows[at] is not None, s.write(at, None))
    ),
    "delete_prefix_acked": Verb(
        lambda job, c: job.delete_prefix_acked(c, KEYS[0]), lambda s: _delete_several(s, PREFIX)
    ),
    "exchange": Verb(lambda job, c, one, other: job.run(exchange, c, one, other), _exchange),
    "write_and_raise": Verb(lambda job, c, at, v: job.run(write_and_raise, c, at, v), lambda s, at, v: ("undone", s)),
    "get": Verb(lambda job, c, at: job.get(c, KEYS[at]), lambda s, at: (s.payload(at), s)),
    "entry": Verb(
        lambda job, c, at: job.entry(c, KEYS[at]),
        lambda s, at: (s.rows[at], s),
        lambda entry: None if entry is None else Stored(entry.payload, entry.version),
    ),
    "exists": Verb(lambda job, c, at: job.exists(c, KEYS[at]), lambda s, at: (s.rows[at] is not None, s)),
    "get_many": Verb(
        lambda job, c, among: job.get_many(c, [KEYS[at] for at in among]),
        lambda s, among: (tuple((at, s.payload(at)) for at in s.here(among)), s),
        lambda found: _rows(found.items()),
    ),
    "count": Verb(lambda job, c: job.count(c), lambda s: (len(s.here()), s)),
    "scan": Verb(
        lambda job, c, reverse, limit: job.scan(c, reverse=reverse, limit=limit),
        lambda s, reverse, limit: _scan(s, (0, 1, 2), reverse, limit),
        _rows,
    ),
    "scan_range": Verb(
        lambda job, c: job.scan(c, KeyRange(KEYS[1], None)), lambda s: _scan(s, (1, 2), False, None), _rows
    ),
    "scan_prefix": Verb(lambda job, c: job.scan_prefix(c, KEYS[0]), lambda s: _scan(s, PREFIX, False, None), _rows),
    "snapshot": Verb(
        lambda job, c: job.snapshot(c),
        _snapshot,
        lambda entries: tuple((NUMBER[entry.key], entry.payload, entry.version) for entry in entries),
    ),
    "version": Verb(lambda job, c: job.version(), lambda s: (s.version, s)),
    "flush": Verb(lambda job, c: job.flush(), lambda s: (None, s)),
}


@dataclass(eq=False)
class Call:
    """One call of a history; its stamps are of before it was made, when it returned, and when it was answered."""

    client: str
    verb: str
    arguments: tuple[Any, ...]
    began: int
    posted: int = 0
    settled: int = 0
    answer: Any = None

    def __str__(self) -> str:
        when = f"{self.began:4} {self.posted:4} {self.settled:4}"
        return f"{when}  {self.client:8} {self.verb}{self.arguments!r} -> {self.answer!r}"


# -- the search -------------------------------------------------------------------------------------------------------


def fits(calls: list[Call], state: State, over: Callable[[Call], int]) -> bool:
    """Say whether there is an order of the calls that explains their answers; a call ends when `over` says."""
    calls = sorted(calls, key=attrgetter("began"))
    ends = [over(call) for call in calls]
    everybody = (1 << len(calls)) - 1
    tried: set[tuple[int, State]] = set()

    def search(done: int, state: State) -> bool:
        if done == everybody:
            return True
        if (done, state) in tried:
            return False
        tried.add((done, state))
        left = [at for at in range(len(calls)) if not done >> at & 1]
        horizon = min(ends[at] for at in left)
        matching = []
        for at in left:
            call = calls[at]
            if call.began > horizon:
                break
            answer, after = VERBS[call.verb].model(state, *call.arguments)
            if answer == call.answer:
                if after == state:  # What changes nothing can as well come now as ever.
                    return search(done | 1 << at, state)
                matching.append((at, after))
        return any(search(done | 1 << at, after) for at, after in matching)

    return search(0, state)


def overlap(calls: list[Call]) -> float:
    """Return with how many others a call was under way at the same time, on average."""
    pairs = sum(
        one.began < other.settled and other.began < one.settled for one, other in itertools.combinations(calls, 2)
    )
    return 2 * pairs / len(calls)


@dataclass
class History:
    """The calls of one history, and what was there when it began."""

    name: str
    before: State
    calls: list[Call] = field(default_factory=list)
    last: list[Call] = field(default_factory=list)  # reads of what is there at the end
    wrong: list[str] = field(default_factory=list)

    def judge(self) -> list[str]:
        """Return what is wrong with it: nothing, or why, and all of it."""
        if not self.wrong:
            every = self.calls + self.last
            if not fits(every, self.before, attrgetter("settled")):
                self.wrong.append(LINEAR)
            elif not fits(every, self.before, attrgetter("posted")):
                self.wrong.append(POSTING)
        if not self.wrong:
            return []
        lines = [f"{self.name} {', '.join(self.wrong)}; before it: {self.before}"]
        return ["\n".join([*lines, *map(str, sorted(self.calls + self.last, key=attrgetter("began")))])]
