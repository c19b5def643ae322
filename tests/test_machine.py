"""A state machine that drives a job beside a plain dict: whatever is done, in whatever order, both say the same.

The machine writes and reads by every verb, alone, within one group and inside `run`, steps the clock forward and back,
reaps, closes and opens again, and drops the handle as a kill would: going on from the files as they are, or from
the server, once the lease is over. Variants are
all adapters, with and without a quota and a feed. `python -m tests.soak machine` runs the long form.
"""

from __future__ import annotations

import asyncio
import queue
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from copy import copy
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import apsw
import pytest
import trio
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from persistency import (
    Change,
    Check,
    Closed,
    Conflict,
    Delete,
    DeletePrefix,
    DeleteRange,
    Entry,
    FeedTruncated,
    Key,
    KeyRange,
    Persistency,
    Put,
    QuotaExceeded,
    RawKey,
    Row,
    WriteFailed,
    key,
)
from persistency.actor import upkeep
from persistency.codec.values import decode, encode
from persistency.errors import Corrupt, JobLocked
from tests.postgres import fresh_url, postgres_url, with_parameters

WAIT = 20.0
T0_MS = 1_700_000_000_000
COLUMNS = "category, key, payload, version, expires_ms"  # of a row, in a file and on a server
SLICE_ROWS = 3  # of reaping, so that a slice is seldom all

CATEGORIES = ["c", "d", "é"]
KEYS = [
    key(),
    key("a"),
    key("a", 1),
    key("a", "b"),
    key("ab"),
    key("b", None),
    key(-1),
    key(2**80),
    RawKey(b"\xff"),
    RawKey(b"\xff\xff"),
]
PAYLOADS = [
    b"",
    b"1",
    b"two",
    b"x" * 30,
    b"\xff\x00" * 40,
    *map(encode, (0, 1, -1, 23, 2**64, "text", True)),
    b"y" * 5_000,
]
TTLS = [0.001, 0.5, 1, 60, timedelta(minutes=1), timedelta(milliseconds=1500), 1e6]


# -- the model -----------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """A row as it is kept; one that has ended is kept until something takes it away."""

    payload: bytes
    version: int
    expires_ms: int | None


def ttl_ms(ttl: Any) -> int:
    """Return a TTL in milliseconds."""
    seconds = ttl.total_seconds() if isinstance(ttl, timedelta) else ttl
    return max(1, round(seconds * 1000))


class Model:
    """What a job must say and do, on a dict. `wants_feed` is how many changes it keeps."""

    def __init__(self, limit: int | None, kept_max: int) -> None:
        self.limit = limit
        self.kept_max = kept_max
        self.rows: dict[tuple[str, Key], Stored] = {}
        self.version = 0
        self.now_ms = T0_MS
        self.changes: list[Change] = []
        self.dropped = 0

    # What is there

    def live(self, category: str, at: Key) -> Stored | None:
        row = self.rows.get((category, at))
        return row if row is not None and (row.expires_ms is None or self.now_ms < row.expires_ms) else None

    def span(self, category: str, span: KeyRange) -> list[tuple[Key, Stored]]:
        """Return the live rows of a range in key order."""
        start, stop = span.start or b"", span.stop
        inside = sorted(
            at for name, at in self.rows if name == category and start <= at and (stop is None or at < stop)
        )
        return [(at, row) for at in inside if (row := self.live(category, at)) is not None]

    def used(self) -> int:
        now_ms = self.now_ms
        return sum(len(payload) for payload, _, end in self.rows.values() if end is None or now_ms < end)

    def ended(self) -> list[tuple[int, bytes, Key]]:
        """Return what is to be reaped, in the order of reaping."""
        return sorted(
            (row.expires_ms, name.encode(), at)
            for (name, at), row in self.rows.items()
            if row.expires_ms is not None and row.expires_ms <= self.now_ms
        )

    # How it changes

    def judged(self, act: Callable[[], Any]) -> Any:
        """Do something whole or not at all; return what it gives, or the exception it fails with."""
        before, used = self.state(), 0 if self.limit is None else self.used()
        try:
            answer = act()
            if self.limit is not None and self.used() > self.limit and self.used() > used:
                raise QuotaExceeded(self.used(), self.limit)
        except BaseException as error:
            self.restore(before)
            return error
        finally:
            self.trim()
        return answer

    def state(self) -> tuple[Any, ...]:
        return copy(self.rows), self.version, copy(self.changes)

    def restore(self, state: tuple[Any, ...]) -> None:
        self.rows, self.version, self.changes = state

    def trim(self) -> None:
        if len(self.changes) > self.kept_max:
            if self.kept_max:
                self.dropped = self.changes[-self.kept_max - 1].version
            self.changes = self.changes[len(self.changes) - self.kept_max :]

    def tell(self, kind: Any, category: str, at: Key, payload: bytes | None = None, stop: Key | None = None) -> None:
        if self.kept_max:
            self.changes.append(Change(self.version, kind, category, at, payload, stop))

    def end(self, ttl: Any) -> int | None:
        return None if ttl is None else self.now_ms + ttl_ms(ttl)

    def put(self, category: str, at: Key, payload: bytes, ttl: Any = None, end: int | None = None) -> None:
        self.version += 1
        self.rows[category, at] = Stored(payload, self.version, end if ttl is None else self.end(ttl))
        self.tell("put", category, at, payload)

    def delete(self, category: str, at: Key) -> bool:
        self.version += 1
        there = self.live(category, at) is not None
        if there or not self.kept_max:  # with a feed one that has ended is left to be reaped, and told of then
            self.rows.pop((category, at), None)
        if there:
            self.tell("delete", category, at)
        return there

    def delete_range(self, category: str, span: KeyRange) -> int:
        self.version += 1
        found = self.span(category, span)
        start, stop = span.start or b"", span.stop
        for name, at in list(self.rows):
            ended = self.live(name, at) is None
            if name == category and start <= at and (stop is None or at < stop) and not (ended and self.kept_max):
                del self.rows[name, at]
        if found:
            self.tell("delete_range", category, Key(start), None, stop)
        return len(found)

    def batch(self, ops: Sequence[Any]) -> int:
        for op in ops:
            if isinstance(op, Check):
                row = self.live(op.category, op.key)  # type: ignore[arg-type]  # Keys only here
                actual = None if row is None else row.version
                if actual != op.version:
                    raise Conflict(op.key, op.version, actual)
        for op in ops:
            match op:
                case Put():
                    self.put(op.category, op.key, bytes(op.payload), op.ttl)  # type: ignore[arg-type]
                case Delete():
                    self.delete(op.category, op.key)  # type: ignore[arg-type]
                case DeletePrefix():
                    self.delete_range(op.category, KeyRange.prefix(op.prefix))  # type: ignore[arg-type]
                case DeleteRange():
                    self.delete_range(op.category, op.key_range)
                case _:
                    self.version += 1
        return self.version

    def swap(self, category: str, at: Key, expected: bytes | None, new: bytes | None, ttl: Any) -> bool:
        row = self.live(category, at)
        if (None if row is None else row.payload) != expected:
            return False
        if new is None:
            self.delete(category, at)
        else:
            self.put(category, at, new, ttl)
        return True

    def increment(self, category: str, at: Key, delta: int) -> int:
        row = self.live(category, at)
        number: Any = 0
        if row is not None:
            try:
                number = decode(row.payload)
            except Corrupt:
                number = None
            if type(number) is not int:
                raise Conflict(at, "a CBOR integer", number)
        self.put(category, at, encode(number + delta), end=None if row is None else row.expires_ms)
        return int(number + delta)

    def touch(self, category: str, at: Key, ttl: Any) -> bool:
        row = self.live(category, at)
        if row is None:
            return False
        self.version += 1
        self.rows[category, at] = row._replace(expires_ms=self.end(ttl))
        return True

    def reap(self, limit: int) -> None:
        for _, name, at in self.ended()[:limit]:
            category = name.decode()
            del self.rows[category, at]
            if self.kept_max:
                self.version += 1
                self.tell("expire", category, at)
        self.trim()

    def reap_untold(self, limit: int) -> None:
        """Reap where changes were kept once, and aren't now: that takes one version, so that the gap shows."""
        if self.ended():
            self.version += 1
            self.reap(limit)

    def since(self, after: int, limit: int) -> list[Change]:
        kept = self.changes[-self.kept_max :]
        dropped = self.changes[-len(kept) - 1].version if len(kept) < len(self.changes) else self.dropped
        if after < dropped:
            raise FeedTruncated(kept[0].version if kept else dropped + 1)
        return [change for change in kept if change.version > after][:limit]

    def entry(self, category: str, at: Key) -> Entry | None:
        row = self.live(category, at)
        return None if row is None else Entry(at, *row)


# -- verbs ---------------------------------------------------------------------------------------------------------


class Verb(NamedTuple):
    """One thing to do. `ask(target)` does it, to a job or a transaction; `expected` is what has to come of it."""

    ask: Callable[[Any], Any]
    expected: Any
    ops: int  # write operations
    is_event: bool


EVENTS = ("put", "delete", "delete_prefix", "delete_range", "persist")

categories = st.sampled_from(CATEGORIES)
keys = st.sampled_from(KEYS)
prefixes = st.sampled_from(KEYS[1:])
payloads = st.sampled_from(PAYLOADS)
ttls = st.one_of(st.none(), st.sampled_from(TTLS))
bounds = st.one_of(st.none(), keys)
ranges = st.builds(KeyRange, bounds, bounds)
doomed = ranges.filter(lambda span: bool(span.start) or span.stop is not None)
aimed = st.integers(0, 9)  # 8 and 9 miss
ops = st.lists(
    st.one_of(
        st.builds(Put, categories, keys, payloads, ttls),
        st.builds(Put, categories, keys, payloads),
        st.builds(Delete, categories, keys),
        st.builds(DeletePrefix, categories, prefixes),
        st.builds(DeleteRange, categories, doomed),
        st.builds(Check, categories, keys, aimed),
    ),
    max_size=5,
)
limits = st.one_of(st.none(), st.integers(0, 6))


def short(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return a strategy that draws from another one, and is not written out whenever it is shown."""

    @st.composite
    def drawn(draw: st.DrawFn) -> Any:
        return draw(strategy)

    return drawn()


def named(name: str, *arguments: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    """Return a strategy of calls: a verb's name and its arguments."""
    return st.tuples(st.just(name), *arguments)


writes = short(
    st.one_of(
        named("put", categories, keys, payloads, ttls),
        named("put", categories, keys, payloads, st.none()),
        named("delete", categories, keys),
        named("delete_prefix", categories, prefixes),
        named("delete_range", categories, doomed),
        named("persist", ops),
        named("commit", ops),
        named("delete_acked", categories, keys),
        named("delete_prefix_acked", categories, prefixes),
        named("delete_range_acked", categories, doomed),
        named("compare_and_set", categories, keys, aimed, st.one_of(st.none(), payloads), ttls),
        named("increment", categories, keys, st.sampled_from([1, -1, 0, 300, 2**70])),
        named("touch", categories, keys, ttls),
    )
)
reads = short(
    st.one_of(
        named("get", categories, keys),
        named("entry", categories, keys),
        named("exists", categories, keys),
        named("count", categories, ranges),
        named("scan", categories, ranges, st.booleans(), limits),
        named("keys", categories, ranges, st.booleans(), limits),
        named("scan_prefix", categories, keys, st.booleans(), limits),
        named("changes", st.one_of(st.none(), st.integers(0, 30)), st.integers(1, 20)),
        named("get_many", categories, st.lists(keys, max_size=5)),
        named("snapshot", categories),
        named("categories"),
        named("storage_used"),
        named("version"),
    )
)
calls = st.one_of(writes, writes, reads)
ENDINGS = [None, None, None, KeyError, SystemExit, KeyboardInterrupt]
endings = st.sampled_from(ENDINGS)
inner_runs = named("run", st.lists(calls, max_size=4), endings)
scripts = st.lists(st.one_of(calls, calls, calls, inner_runs), max_size=6)
runs = named("run", scripts, endings)


class Script:
    """Turns calls into verbs, step by step with the model: what is aimed at is what is there at that moment."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def verb(self, call: tuple[Any, ...], *, inside: bool = False) -> Verb:
        """Return what a call means now, and do it to the model. `inside` a run nothing is judged by the quota."""
        name, *arguments = call
        if name == "run":
            return self.run(*arguments, inside=inside)
        act, ask, ops = getattr(self, name)(*arguments)
        if ops is None:  # a read
            return Verb(ask, act(), 0, is_event=False)
        expected = self.whole(act) if inside else self.model.judged(act)
        is_event = name in EVENTS
        return Verb(ask, None if is_event and not isinstance(expected, BaseException) else expected, ops, is_event)

    def whole(self, act: Callable[[], Any]) -> Any:
        before = self.model.state()
        try:
            return act()
        except BaseException as error:
            self.model.restore(before)
            return error

    def run(self, script: list[tuple[Any, ...]], ending: type[BaseException] | None, *, inside: bool) -> Verb:
        """Return a run of calls, which notes what each of them gave, and returns that or raises."""
        verbs: list[Verb] = []
        given: list[Any] = []

        def act() -> list[Any]:
            verbs.extend(self.verb(call, inside=True) for call in script)
            if ending is not None:
                raise ending("no")  # a new one each time: one that is raised again keeps all its frames
            return [verb.expected for verb in verbs]

        def fn(tx: Any) -> list[Any]:
            reached["runs within runs"] += inside and bool(verbs)
            given.clear()
            for verb in verbs:
                try:
                    given.append(verb.ask(tx))
                except BaseException as error:
                    given.append(error)
            # Compared here, because a run that raises tells nothing of them.
            assert_all_same(given, [verb.expected for verb in verbs])
            if ending is not None:
                raise ending("no")
            return given

        expected = self.whole(act) if inside else self.model.judged(act)
        return Verb(lambda target: target.run(fn), expected, 1, is_event=False)

    def put(self, category: str, at: Key, payload: bytes, ttl: Any) -> tuple[Any, Any, int]:
        model = self.model
        return lambda: model.put(category, at, payload, ttl), lambda to: to.put(category, at, payload, ttl=ttl), 1

    def delete(self, category: str, at: Key) -> tuple[Any, Any, int]:
        return lambda: self.model.delete(category, at), lambda to: to.delete(category, at), 1

    def delete_acked(self, category: str, at: Key) -> tuple[Any, Any, int]:
        return lambda: self.model.delete(category, at), lambda to: to.delete_acked(category, at), 1

    def delete_prefix(self, category: str, at: Key) -> tuple[Any, Any, int]:
        span = KeyRange.prefix(at)
        return lambda: self.model.delete_range(category, span), lambda to: to.delete_prefix(category, at), 1

    def delete_prefix_acked(self, category: str, at: Key) -> tuple[Any, Any, int]:
        span = KeyRange.prefix(at)
        return lambda: self.model.delete_range(category, span), lambda to: to.delete_prefix_acked(category, at), 1

    def delete_range(self, category: str, span: KeyRange) -> tuple[Any, Any, int]:
        return lambda: self.model.delete_range(category, span), lambda to: to.delete_range(category, span), 1

    def delete_range_acked(self, category: str, span: KeyRange) -> tuple[Any, Any, int]:
        return lambda: self.model.delete_range(category, span), lambda to: to.delete_range_acked(category, span), 1

    def _aimed(self, given: list[Any]) -> list[Any]:
        """Give most checks the version that is there."""
        ops = []
        for op in given:
            if isinstance(op, Check):
                assert op.version is not None
                row = self.model.live(op.category, op.key)  # type: ignore[arg-type]  # a Key
                there = None if row is None else row.version
                op = Check(op.category, op.key, there if op.version < 8 else op.version)
            ops.append(op)
        return ops

    def persist(self, given: list[Any]) -> tuple[Any, Any, int]:
        ops = self._aimed(given)
        return lambda: self.model.batch(ops), lambda to: to.persist(ops), len(ops)

    def commit(self, given: list[Any]) -> tuple[Any, Any, int]:
        ops = self._aimed(given)
        return lambda: self.model.batch(ops), lambda to: to.commit(ops), len(ops)

    def compare_and_set(self, category: str, at: Key, aim: int, new: bytes | None, ttl: Any) -> tuple[Any, Any, int]:
        row = self.model.live(category, at)
        there = None if row is None else row.payload
        expected = there if aim < 8 else None if there is not None and aim == 8 else b"something else"
        ttl = None if new is None else ttl
        return (
            lambda: self.model.swap(category, at, expected, new, ttl),
            lambda to: to.compare_and_set(category, at, expected, new, ttl=ttl),
            1,
        )

    def increment(self, category: str, at: Key, delta: int) -> tuple[Any, Any, int]:
        return lambda: self.model.increment(category, at, delta), lambda to: to.increment(category, at, delta), 1

    def touch(self, category: str, at: Key, ttl: Any) -> tuple[Any, Any, int]:
        return lambda: self.model.touch(category, at, ttl), lambda to: to.touch(category, at, ttl), 1

    # Reads

    def get(self, category: str, at: Key) -> tuple[Any, Any, None]:
        def act() -> bytes | None:
            row = self.model.live(category, at)
            return None if row is None else row.payload

        return act, lambda to: to.get(category, at), None

    def entry(self, category: str, at: Key) -> tuple[Any, Any, None]:
        return lambda: self.model.entry(category, at), lambda to: to.entry(category, at), None

    def exists(self, category: str, at: Key) -> tuple[Any, Any, None]:
        return lambda: self.model.live(category, at) is not None, lambda to: to.exists(category, at), None

    def count(self, category: str, span: KeyRange) -> tuple[Any, Any, None]:
        return lambda: len(self.model.span(category, span)), lambda to: to.count(category, span), None

    def _scanned(self, category: str, span: KeyRange, reverse: bool, limit: int | None) -> list[Row]:
        rows = [Row(at, row.payload) for at, row in self.model.span(category, span)]
        return (rows[::-1] if reverse else rows)[:limit]

    def scan(self, category: str, span: KeyRange, reverse: bool, limit: int | None) -> tuple[Any, Any, None]:
        return (
            lambda: self._scanned(category, span, reverse, limit),
            lambda to: to.scan(category, span, reverse=reverse, limit=limit),
            None,
        )

    def keys(self, category: str, span: KeyRange, reverse: bool, limit: int | None) -> tuple[Any, Any, None]:
        return (
            lambda: [Key(row.key) for row in self._scanned(category, span, reverse, limit)],
            lambda to: to.keys(category, span, reverse=reverse, limit=limit),
            None,
        )

    def changes(self, back: int | None, limit: int) -> tuple[Any, Any, None]:
        """Changes since some version, or since the oldest one that is kept; where none are kept, none are asked for."""
        model = self.model
        if not model.kept_max:
            return self.version()
        after = model.dropped if back is None else max(0, model.version - back)
        return lambda: self.whole(lambda: model.since(after, limit)), lambda to: to.changes(after, limit), None

    def scan_prefix(self, category: str, at: Key, reverse: bool, limit: int | None) -> tuple[Any, Any, None]:
        return (
            lambda: self._scanned(category, KeyRange.prefix(at), reverse, limit),
            lambda to: to.scan_prefix(category, at, reverse=reverse, limit=limit),
            None,
        )

    def get_many(self, category: str, several: list[Key]) -> tuple[Any, Any, None]:
        def act() -> dict[Key, bytes]:
            found = ((at, self.model.live(category, at)) for at in dict.fromkeys(several))
            return {at: row.payload for at, row in found if row is not None}

        return act, lambda to: to.get_many(category, several), None

    def snapshot(self, category: str) -> tuple[Any, Any, None]:
        def act() -> list[Entry]:
            entries = [Entry(at, *row) for at, row in self.model.span(category, KeyRange())]
            return sorted(entries, key=lambda entry: entry.version)

        return act, lambda to: to.snapshot(category), None

    def categories(self) -> tuple[Any, Any, None]:
        def act() -> list[str]:
            return sorted(({name for name, at in self.model.rows if self.model.live(name, at)}), key=str.encode)

        return act, lambda to: to.categories(), None

    def storage_used(self) -> tuple[Any, Any, None]:
        return self.model.used, lambda to: to.storage_used(), None

    def version(self) -> tuple[Any, Any, None]:
        return lambda: self.model.version, lambda to: to.version(), None


def plain(outcome: Any) -> Any:
    """Return an outcome in a form that compares exactly: types too, and errors by what they say."""
    if isinstance(outcome, Conflict) and outcome.expected == "a CBOR integer":
        return "not an integer", outcome.key
    if isinstance(outcome, Conflict):
        return "conflict", outcome.key, outcome.expected, outcome.actual
    if isinstance(outcome, QuotaExceeded):
        return "quota", outcome.used, outcome.limit
    if isinstance(outcome, FeedTruncated):
        return "truncated", outcome.oldest
    if isinstance(outcome, AssertionError):
        raise outcome
    if isinstance(outcome, BaseException):
        return type(outcome), outcome.args
    if isinstance(outcome, list):
        return [plain(item) for item in outcome]
    if isinstance(outcome, dict):
        return list(outcome.items())
    return type(outcome), outcome


def assert_all_same(given: list[Any], expected: list[Any]) -> None:
    """Compare outcomes one by one."""
    assert len(given) == len(expected)
    for one, other in zip(given, expected, strict=True):
        reached[type(other).__name__] += 1
        assert plain(one) == plain(other)


# -- the machine ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """What kind of job is driven. `reaps_itself`: else rows are reaped only when the machine says so."""

    place: Literal["memory", "directory", "server"]
    quota: int | None = None
    feed: int = 0
    reaps_itself: bool = False

    def __str__(self) -> str:
        parts: list[str] = [self.place]
        parts += ["quota"] if self.quota is not None else []
        parts += ["feed"] if self.feed else []
        parts += ["reaping"] if self.reaps_itself else []
        return " ".join(parts)


VARIANTS = [
    Variant(place, **options)  # type: ignore[arg-type]
    for place in ("memory", "server", "directory")
    for options in (
        {},
        {"reaps_itself": True, "quota": 200},
        {"quota": 200},
        {"feed": 8},
        {"feed": 60, "quota": 150},
    )
]


reached: Counter[str] = Counter()  # what the machine has come to, in all its runs


class TrioLoop:
    """A loop of trio's that goes on from one request to the next, as asyncio's do: a new one for each costs as much as
    twenty requests. It runs in the calling thread, as a guest, while that waits for an answer.
    """

    def __init__(self) -> None:
        self._turns: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._answers: list[Any] = []
        self._ended: list[Any] = []
        self._ask, self._asked = trio.open_memory_channel[Awaitable[Any]](1)
        trio.lowlevel.start_guest_run(
            self._serve, run_sync_soon_threadsafe=self._turns.put, done_callback=self._ended.append
        )

    async def _serve(self) -> None:
        async for wanted in self._asked:
            self._answers.append(await wanted)

    def __call__(self, wanted: Awaitable[Any]) -> Any:
        """Await something that gives its exceptions as its answer."""
        self._turns.put(lambda: self._ask.send_nowait(wanted))
        while not self._answers and not self._ended:
            self._turns.get(timeout=WAIT)()
        return self._answers.pop()

    def close(self) -> None:
        """End it."""
        self._turns.put(self._ask.close)
        while not self._ended:
            self._turns.get(timeout=WAIT)()
        self._ended[0].unwrap()


class Beside:
    """What runs of the machine on the server share: a schema, in which each run has a job of its own, and a connection
    beside that job's. Neither is what is driven, and they cost more than a run's writes.
    """

    def __init__(self) -> None:
        self._connection: Any = None
        self._url = ""
        self._jobs = 0

    def fresh(self) -> tuple[str, str]:
        """Return a URL, and the id of a job that nobody else has there."""
        self._url = self._url or fresh_url()
        self._jobs += 1
        return self._url, f"job-{self._jobs}"

    @property
    def schema(self) -> str:
        """The schema that they share."""
        return self._url.partition("persistency_schema=")[2]

    def sql(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        """Run one statement; return its rows."""
        import psycopg

        if self._connection is None:
            self._connection = psycopg.connect(postgres_url(), autocommit=True)
        cursor = self._connection.execute(statement, values)
        return cursor.fetchall() if cursor.description else []

    def close(self) -> None:
        """Let them go."""
        if self._connection is not None:
            self._connection.close()
        self._connection, self._url = None, ""


beside = Beside()


class Machine(RuleBasedStateMachine):
    """A job and its model."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.wall_ms = T0_MS
        self.failed = 0  # operations of events that failed, until a flush tells
        self.model = Model(variant.quota, variant.feed)
        self.script = Script(self.model)
        self.loop: asyncio.AbstractEventLoop | TrioLoop | None = None
        self.in_loop: Callable[[Awaitable[Any]], Any] | None = None
        self.places = tempfile.TemporaryDirectory(prefix="machine-", dir=_memory_disk())
        self.openings = 0
        self._patches = [mock.patch.object(upkeep, "REAP_ROWS_MAX", SLICE_ROWS)]
        if not variant.reaps_itself:
            self._patches.append(mock.patch.object(upkeep.Upkeep, "_may_reap", return_value=False))
        for patch in self._patches:
            patch.start()
        self.job_id = "job"
        if variant.place == "server":
            self.root, self.job_id = beside.fresh()
        else:
            self.root = str(Path(self.places.name) / "0") if variant.place == "directory" else ":memory:"
        self._open()

    def _open(self, *, plain: bool = False) -> None:
        self.persistency = Persistency(self.root, clock=lambda: self.wall_ms / 1000)
        self.job = self.persistency.open_job(self.job_id, **self._options(plain=plain))

    def _options(self, *, plain: bool) -> dict[str, Any]:
        return {} if plain else {"max_bytes": self.variant.quota, "feed_changes_max": self.variant.feed}

    @initialize(caller=st.sampled_from(["thread", "asyncio", "trio"]))
    def choose_the_caller(self, caller: str) -> None:
        """Make all requests in a plain thread, or all of them within an event loop."""
        if caller == "asyncio":
            self.loop = asyncio.new_event_loop()
            self.in_loop = self.loop.run_until_complete
        if caller == "trio":
            self.loop = self.in_loop = TrioLoop()

    def answer(self, ask: Callable[[], Any]) -> Any:
        """Make a request and take its answer or its exception."""
        try:
            if self.in_loop is None:
                return ask().result(WAIT)
            return self.in_loop(_awaited(ask))
        except BaseException as error:
            return error

    # Doing

    def _post(self, verb: Verb) -> Any:
        if not verb.is_event:
            return verb.ask(self.job)
        if isinstance(verb.expected, BaseException):
            self.failed += verb.ops
        return verb.ask(self.job)

    @rule(call=st.one_of(calls, calls, runs))
    def do_one(self, call: tuple[Any, ...]) -> None:
        """Do one thing, and wait for its answer."""
        self.one(call)

    def one(self, call: tuple[Any, ...]) -> bool:
        """Do one thing; return whether it is a write."""
        verb = self.script.verb(call)
        if verb.is_event:
            self._post(verb)
        else:
            assert_all_same([self.answer(lambda: verb.ask(self.job))], [verb.expected])
        return verb.ops > 0

    @rule(script=st.lists(st.one_of(calls, calls, calls, runs), min_size=2, max_size=8))
    def several_in_one_group(self, script: list[tuple[Any, ...]]) -> None:
        """Do several things before anybody waits for an answer."""

        def post() -> list[tuple[Any, Any]]:
            with self.job._mailbox._lock:
                verbs = [self.script.verb(call) for call in script]
                return [(self._post(verb), verb.expected) for verb in verbs]

        if self.in_loop is None:
            posted = [
                (reply.exception(WAIT) or reply.result(), expected) for reply, expected in post() if reply is not None
            ]
        else:
            posted = self.in_loop(_gathered(post))
        assert_all_same([given for given, _ in posted], [expected for _, expected in posted])

    @rule(count=st.integers(60, 140), seed=st.integers(0, 2**16), category=categories, ttl=ttls)
    def many_puts(self, count: int, seed: int, category: str, ttl: Any) -> None:
        """Put so many rows at once that they are sorted and written together."""
        with self.job._mailbox._lock:
            for number in range(count):
                at = KEYS[(seed + number * 7) % len(KEYS)] if number % 5 else key(seed % 50, (number * 31) % 97)
                name = CATEGORIES[(seed + number) % 3] if seed % 3 == 0 else category
                end = ttl if (seed + number) % 4 == 0 else None
                self._post(self.script.verb(("put", name, at, b"%d" % number, end)))

    @rule(category=categories, span=ranges, reverse=st.booleans(), page=st.integers(1, 4), keys_only=st.booleans())
    def iterate(self, category: str, span: KeyRange, reverse: bool, page: int, keys_only: bool) -> None:
        """Walk over a range, a few rows at a time."""
        expected: list[Any] = self.script._scanned(category, span, reverse, None)
        pages = self.job.iterate(category, span, reverse=reverse, page=page, keys_only=keys_only)
        assert list(pages) == ([row.key for row in expected] if keys_only else expected)

    @rule()
    def flush(self) -> None:
        """Flush: it tells what has failed, once."""
        outcome = self.answer(self.job.flush)
        failed, self.failed = self.failed, 0
        told = len(outcome.failures) + outcome.omitted if isinstance(outcome, WriteFailed) else outcome
        if isinstance(outcome, WriteFailed):
            reached.update({type(failure.error).__name__ for failure in outcome.failures})
        assert told == (failed or None)
        numbers = self.job.statistics()
        assert (numbers.pending, numbers.mailbox_bytes, numbers.state) == (0, 0, "live")

    @rule()
    def compare_everything(self) -> None:
        """Compare all there is to be seen."""
        self.flush()
        for name in CATEGORIES:
            self.one(("snapshot", name))
            self.one(("scan", name, KeyRange(), False, None))
            self.one(("count", name, KeyRange()))
        for call in (("categories",), ("storage_used",), ("version",)):
            self.one(call)
        self.one(("changes", None, 1_000))

    # Feeds

    @precondition(lambda self: self.variant.feed)
    @rule(back=st.one_of(st.none(), st.integers(0, 30)), limit=st.integers(1, 20))
    def read_changes(self, back: int | None, limit: int) -> None:
        """Read what has changed since some version, or since the oldest one that is kept."""
        self.one(("changes", back, limit))

    @precondition(lambda self: self.variant.feed)
    @rule(category=categories, at=keys, payload=payloads)
    def wait_for_changes(self, category: str, at: Key, payload: bytes) -> None:
        """Wait for a change, then make it; or give up, if the quota doesn't let it be made."""
        self.flush()
        after = self.model.version
        reply = self.job.changes(after, 10, wait=True)
        verb = self.script.verb(("put", category, at, payload, None))
        self._post(verb)
        self.flush()
        if verb.expected is None:
            reached["waited for"] += 1
            assert reply.result(WAIT) == self.model.since(after, 10)
        else:
            assert not reply.done()
            assert reply.cancel()

    # Time

    @rule(step=st.one_of(st.sampled_from([1, 500, 1_000, 60_000, -1, -1_000, -3_600_000]), st.integers(-5_000, 90_000)))
    def step_the_clock(self, step: int) -> None:
        """Set the clock anew, forward or back, and let the job see it."""
        self._set_clock(self.wall_ms + step)

    @rule(which=st.integers(0, 20), offset=st.sampled_from([-1, 0, 0, 1]))
    def step_to_an_end(self, which: int, offset: int) -> None:
        """Set the clock to just where a row ends."""
        ends = sorted({row.expires_ms for row in self.model.rows.values() if row.expires_ms is not None})
        if ends:
            self._set_clock(ends[which % len(ends)] + offset)

    def _set_clock(self, ms: int) -> None:
        self.answer(self.job.version)  # all that was posted was done before
        reached["steps back"] += ms < self.wall_ms
        self.wall_ms = ms
        self.answer(self.job.version)
        self.model.now_ms = max(self.model.now_ms, ms)

    @precondition(lambda self: not self.variant.reaps_itself)
    @rule()
    def reap_a_slice(self) -> None:
        """Have the job's upkeep take a slice of rows away, in a turn of its own."""
        self.answer(self.job.version)
        reached["slices of several"] += len(self.model.ended()) > SLICE_ROWS
        reached["slices"] += bool(self.model.ended())
        worker = self.job._statistics.__self__  # type: ignore[attr-defined]  # a bound method
        upkeep, answers = worker.activation.upkeep, []
        upkeep.do(upkeep._reap, worker.turns, answers)
        assert answers == []
        if self.variant.feed and not self.model.kept_max:
            self.model.reap_untold(SLICE_ROWS)
        else:
            self.model.reap(SLICE_ROWS)

    # Ending and beginning

    def _reopen(self, *, plain: bool = False) -> None:
        self._open(plain=plain)
        # The job's time goes on where it was, wherever that could matter; else it may begin anew by the clock.
        now_ms = self.job.now_ms
        latest_ms = max(self.model.now_ms, self.wall_ms)
        if any(row.expires_ms is not None for row in self._surely_there()):
            assert now_ms == latest_ms
        assert self.wall_ms <= now_ms <= latest_ms
        self.model.now_ms = now_ms

    def _surely_there(self) -> list[Stored]:
        if not self.variant.reaps_itself:
            return list(self.model.rows.values())
        return [row for place in self.model.rows if (row := self.model.live(*place)) is not None]

    @precondition(lambda self: self.variant.place != "memory")
    @rule(step=st.sampled_from([0, 0, 1_000, -1_000, -3_600_000]))
    def close_and_open(self, step: int) -> None:
        """Close the job and open it again, by another clock perhaps."""
        self.flush()
        reached["reopened with ended rows"] += bool(self.model.ended())
        self.persistency.close()
        self.wall_ms += step
        self._reopen()

    @precondition(lambda self: self.variant.place != "memory")
    @rule(step=st.sampled_from([0, 0, 1_000, -1_000, -3_600_000]))
    def kill(self, step: int) -> None:
        """Go on from what is there: what a process leaves that is killed now."""
        # A write, so that the time is in the file too: what was only read is nothing to a killed process' successor.
        verb = self.script.verb(("delete_acked", "c", key("nothing there")))
        assert self.answer(lambda: verb.ask(self.job)) is False
        self.flush()
        reached["killed with rows"] += bool(self.model.rows)
        self.openings += 1
        self.wall_ms += step
        if self.variant.place == "server":
            self._leave_on_the_server()
        else:
            self._leave_files()

    def _leave_files(self) -> None:
        new = Path(self.places.name) / str(self.openings)
        new.mkdir()
        for path in Path(self.root).iterdir():
            if not path.name.endswith("-shm"):
                shutil.copy(path, new)
        self.persistency.close()
        shutil.rmtree(self.root)
        self.root = str(new)
        self._reopen()

    def _leave_on_the_server(self) -> None:
        """Have the lease be over, and take the job as another process would, before the handle is closed."""
        left = self.persistency
        self.root = with_parameters(self.root, application_name=f"after-{self.openings}")
        ends = f"UPDATE {beside.schema}.jobs SET lease_ends = now() - interval '1 hour' WHERE job = %s"
        locked: JobLocked | None = None
        for _ in range(100):  # where the job reaps by itself, a commit of that may renew the lease before it is taken
            beside.sql(ends, self.job_id)
            try:
                self._reopen()
            except JobLocked as error:
                locked = error
            else:
                left.close()
                return
        assert locked is not None
        raise locked

    @precondition(lambda self: self.variant.place != "memory")
    @rule(script=st.lists(calls, max_size=3), reaps=st.booleans())
    def open_without_quota_and_feed_in_between(self, script: list[tuple[Any, ...]], reaps: bool) -> None:
        """Open the job without what is kept beside its rows; work on it, or look only."""
        self.flush()
        self.persistency.close()
        self._reopen(plain=True)
        model = self.model
        changes, model.kept_max, model.limit = model.changes, 0, None
        version, written = model.version, False
        for call in script:
            written |= self.one(call)
        if reaps and not self.variant.reaps_itself:
            self.reap_a_slice()
        self.flush()
        self.persistency.close()
        model.kept_max, model.limit, model.changes = self.variant.feed, self.variant.quota, changes
        self._reopen()
        if model.kept_max and (written or model.version != version):
            # There is a gap now. A write that came to nothing may have left one too, or none.
            gap = self.answer(lambda: self.job.changes(max(0, model.version - 1), 1))
            if model.version != version or isinstance(gap, FeedTruncated) or model.dropped == model.version:
                model.changes, model.dropped = [], model.version
                reached["gaps"] += 1

    @invariant()
    def balanced(self) -> None:
        """Promise 3: whatever was accepted was committed, has failed or is pending, at every moment."""
        numbers = self.job.statistics()
        assert numbers.accepted == numbers.committed + numbers.failed + numbers.pending

    def teardown(self) -> None:
        """Compare once more, and look into the file."""
        try:
            self.compare_everything()
            path = self.job.path
            self.persistency.close()
            with pytest.raises(Closed):
                self.job.get("c", key())
            if path is not None:
                self._look_into(path)
            elif self.variant.place == "server":
                self._compare_rows(
                    beside.sql(f"SELECT {COLUMNS} FROM {beside.schema}.rows WHERE job = %s", self.job_id)
                )
        finally:
            self.persistency.close()
            if self.loop is not None:
                self.loop.close()
            for patch in self._patches:
                patch.stop()
            self.places.cleanup()

    def _look_into(self, path: Path) -> None:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        try:
            assert connection.pragma("integrity_check") == "ok"
            rows = connection.execute(f"SELECT {COLUMNS} FROM kv").fetchall()
        finally:
            connection.close()
        self._compare_rows(rows)

    def _compare_rows(self, rows: list[Any]) -> None:
        there = {(name.decode(), Key(at)): Stored(*row) for name, at, *row in rows}
        if not self.variant.reaps_itself:
            assert there == self.model.rows
        else:
            assert {place: row for place, row in there.items() if self.model.live(*place)} == {
                place: row for place in self.model.rows if (row := self.model.live(*place)) is not None
            }


async def _awaited(ask: Callable[[], Any]) -> Any:
    """Take an answer or an exception within the loop: an interrupt that left it would end the loop too."""
    try:
        return await ask()
    except BaseException as error:
        return error


async def _gathered(post: Callable[[], list[tuple[Any, Any]]]) -> list[tuple[Any, Any]]:
    posted = [(reply, expected) for reply, expected in post() if reply is not None]
    return [(await _awaited(lambda reply=reply: reply), expected) for reply, expected in posted]  # type: ignore[misc]


def _memory_disk() -> str | None:
    """Return a directory in memory where there is one: no power is cut here, and thousands of jobs are opened."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def drive(variant: Variant, *, runs: int, steps: int, **options: Any) -> None:
    """Run the machine so many times for so many steps. Raises what Hypothesis found, if it finds anything."""
    try:
        run_state_machine_as_test(
            partial(Machine, variant),
            settings=settings(
                max_examples=runs,
                stateful_step_count=steps,
                deadline=None,
                suppress_health_check=list(HealthCheck),
                phases=set(Phase) - {Phase.explain},  # which traces every line
                **options,
            ),
        )
    finally:
        beside.close()


@pytest.mark.timeout(300)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_a_job_does_what_a_dict_would(variant: Variant) -> None:
    """S0-28 to S0-43, S2-7 to S2-33, S3-47 to S3-80 and the quota: no difference in 40 runs of 30 steps."""
    drive(variant, runs=40, steps=30)


@pytest.mark.timeout(300)
def test_the_machine_comes_to_what_it_should() -> None:
    """Its runs hold ended rows, slices, conflicts, refusals, gaps, kills, steps back and so on, often enough."""
    reached.clear()
    names = ["Conflict", "QuotaExceeded", "FeedTruncated", "KeyError", "KeyboardInterrupt", "SystemExit", "Entry"]
    names += ["steps back", "slices", "slices of several", "reopened with ended rows", "killed with rows", "gaps"]
    names += ["waited for", "runs within runs"]
    for _ in range(96):  # what a round of few runs comes to is chance, so each must be another one, in CI too
        for variant in (VARIANTS[-1], VARIANTS[-2]):
            drive(variant, runs=5, steps=40, database=None, derandomize=False)
        if all(reached[name] >= 3 for name in names):
            break
    assert {name: reached[name] for name in names if reached[name] < 3} == {}
