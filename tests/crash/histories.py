"""Small concurrent histories: what several threads and event loops did with one job at once, and whether it fits together.

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

import asyncio
import itertools
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, NamedTuple

from persistency import Check, Conflict, Delete, Job, KeyRange, Op, Overloaded, Put, Reply, key
from persistency.codec.values import decode, encode
from persistency.transaction import Transaction

WAIT = 20.0  # seconds for what must come
SWITCH_SECONDS = 1e-6  # threads take turns as often as the interpreter can have them
KEYS = (key("a"), key("a", 1), key("b"))
NUMBER = {found: at for at, found in enumerate(KEYS)}
PREFIX = (0, 1)  # the numbers of the keys that begin with ("a",)
TEXT = encode("no number")


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
    "delete_prefix_acked": Verb(lambda job, c: job.delete_prefix_acked(c, KEYS[0]), lambda s: _delete_several(s, PREFIX)),
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
    """One call of a history. The stamps: `began` before it was made, `posted` when it returned, `settled` when answered."""

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
                self.wrong.append("is not linearizable")
            elif not fits(every, self.before, attrgetter("posted")):
                self.wrong.append("is not in the order of posting")
        if not self.wrong:
            return []
        lines = [f"{self.name} {', '.join(self.wrong)}; before it: {self.before}"]
        return ["\n".join([*lines, *map(str, sorted(self.calls + self.last, key=attrgetter("began")))])]


# -- making them ------------------------------------------------------------------------------------------------------


class Client:
    """One thread or task of a history: it posts calls, and takes their answers at once or some calls later."""

    def __init__(self, maker: Maker, name: str, rng: random.Random) -> None:
        self._maker = maker
        self._name = name
        self._rng = rng
        self._steps = rng.randint(3, 10)
        self._window = rng.choice((1, 2, 4, 6))
        self._waiting: list[tuple[Call, Reply[Any]]] = []

    def in_thread(self) -> None:
        """Make the calls in a plain thread."""
        for _ in range(self._steps):
            self._post()
            if len(self._waiting) >= self._window:
                self._take_all()
        self._take_all()

    def _take_all(self) -> None:
        self._maker.about_to_wait()
        for call, reply in self._waiting:
            with self._noting(call):
                self._note(call, reply.result(WAIT))
        self._waiting.clear()

    async def in_loop(self) -> None:
        """Make the calls in a task of an event loop."""
        for _ in range(self._steps):
            self._post()
            if len(self._waiting) >= self._window:
                await self._atake_all()
            elif self._rng.randrange(2):
                await asyncio.sleep(0)
        await self._atake_all()

    async def _atake_all(self) -> None:
        self._maker.about_to_wait()
        waiting, self._waiting = self._waiting, []
        for call, reply in waiting:
            with self._noting(call):
                self._note(call, await asyncio.wait_for(reply, WAIT))

    def _post(self) -> None:
        maker, rng = self._maker, self._rng
        verb = rng.choice(CHOICES)
        arguments = ARGUMENTS.get(verb, lambda _rng, _maker: ())(rng, maker)
        post = VERBS[verb].post
        call = Call(self._name, verb, arguments, next(maker.stamps))
        try:
            reply = post(maker.job, maker.category, *arguments)
        except Overloaded:  # refused whole: as if it had never been
            return
        call.posted = call.settled = next(maker.stamps)
        maker.calls.append(call)
        if reply is None:
            return
        if not reply.done():
            call.settled = 0
            if rng.randrange(2):
                reply.add_done_callback(lambda _reply: maker.stamp(call))
        self._waiting.append((call, reply))

    def _note(self, call: Call, answer: Any) -> None:
        call.answer = VERBS[call.verb].noted(answer)
        maker = self._maker
        if call.verb == "get":
            maker.payloads[call.arguments[0]] = answer
        elif call.verb == "entry":
            maker.versions[call.arguments[0]] = None if answer is None else answer.version
        elif call.verb == "commit":
            maker.versions[call.arguments[0][-1][1]] = answer

    @contextmanager
    def _noting(self, call: Call) -> Iterator[None]:
        try:
            yield
        except Conflict as error:
            at = NUMBER[error.key]
            call.answer = ("conflict", at) if call.verb == "increment" else ("conflict", at, error.expected, error.actual)
        except Undone:
            call.answer = "undone"
        except Exception as error:
            call.answer = repr(error)
            self._maker.failures.append(f"raised {error!r} at {call}")
        finally:
            self._maker.stamp(call)


class Maker:
    """Makes one history with a job."""

    def __init__(self, job: Job, name: str, seed: int, *, holds: bool) -> None:
        self.job = job
        self.category = self.name = name
        self.stamps = itertools.count(1)
        self.calls: list[Call] = []
        self.failures: list[str] = []
        # What was seen last, so that a comparison has a chance.
        self.payloads: list[bytes | None] = [None] * len(KEYS)
        self.versions: list[int | None] = [None] * len(KEYS)
        self._fresh = itertools.count()
        self._rng = random.Random(seed)
        self._holds = holds
        self._go = threading.Event()
        self._wait_left = 0

    def value(self) -> bytes:
        """Return a payload that is nowhere else, mostly."""
        return encode(1000 * next(self._fresh)) if self._rng.randrange(8) else TEXT

    def stamp(self, call: Call) -> None:
        """Note that a call has its answer, unless that was noted before."""
        stamp = next(self.stamps)
        call.settled = call.settled or stamp

    def about_to_wait(self) -> None:
        """Be told of a client that won't go on without answers."""
        self._wait_left -= 1
        if self._wait_left <= 0:
            self._go.set()

    def make(self) -> History:
        """Make the history."""
        version = self.job.version().result(WAIT)
        history = History(self.name, State(version, (None,) * len(KEYS)), self.calls)
        clients = self._clients()
        start = threading.Barrier(len(clients) + 1)
        threads = [threading.Thread(target=self._run, args=(start, client)) for client in clients]
        for thread in threads:
            thread.start()
        if self._holds and self._rng.randrange(2):
            # The turn is held until some of the clients have to wait, so that the others' calls stand in line.
            self._wait_left = self._rng.randint(1, len(clients))
            self.job.run(lambda _tx: (start.wait(WAIT), self._go.wait(WAIT))).result(WAIT)
        else:
            start.wait(WAIT)
        for thread in threads:
            thread.join(2 * WAIT)
        history.wrong = self.failures + [f"has left {thread}" for thread in threads if thread.is_alive()]
        for verb in ("snapshot", "version") if not history.wrong else ():
            began = next(self.stamps)
            reply = VERBS[verb].post(self.job, self.category)
            assert reply is not None
            answer = VERBS[verb].noted(reply.result(WAIT))
            history.last.append(Call("end", verb, (), began, next(self.stamps), next(self.stamps), answer))
        return history

    def _clients(self) -> list[Callable[[], None]]:
        clients: list[Callable[[], None]] = []
        for number in range(self._rng.randint(2, 4)):
            if self._rng.randrange(2):
                clients.append(Client(self, f"thread {number}", self._other()).in_thread)
            else:
                tasks = [Client(self, f"task {number}.{task}", self._other()) for task in range(self._rng.randint(1, 2))]
                clients.append(lambda tasks=tasks: asyncio.run(_gather(tasks)))  # type: ignore[misc]  # bound now
        return clients

    def _other(self) -> random.Random:
        return random.Random(self._rng.getrandbits(64))

    def _run(self, start: threading.Barrier, client: Callable[[], None]) -> None:
        try:
            start.wait(WAIT)
            client()
        except BaseException as error:
            self.failures.append(f"ended with {error!r}")
        finally:
            self._go.set()


async def _gather(tasks: list[Client]) -> None:
    await asyncio.gather(*(task.in_loop() for task in tasks))
