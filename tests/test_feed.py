"""Change feeds: nothing missed, nothing twice, nothing that wasn't committed, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import sqlite3
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import apsw
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from persistency import (
    Change,
    Check,
    Closed,
    Conflict,
    Delete,
    DeletePrefix,
    DeleteRange,
    FeedTruncated,
    Job,
    Key,
    KeyRange,
    Misuse,
    Overloaded,
    Persistency,
    Put,
    RawKey,
    Reply,
    Transaction,
    WriteFailed,
    key,
)
from persistency.actor.waiters import Waiters
from persistency.feed import ChangeFeed
from persistency.storage.memory import MemoryStore
from persistency.storage.port import PLACES, ListChanges
from persistency.storage.postgres.store import PostgresStore
from persistency.storage.sqlite import SqliteStore
from tests.loops import LOOPS, GivenUp, InLoop, Task, in_thread, together
from tests.postgres import fresh_url

WAIT = 20.0  # seconds a test waits for what must come
START = 1_700_000_000.0  # the Unix time at which the clock of a test begins
MANY = 1_000_000  # changes: more than a test makes
State = dict[tuple[str, bytes], bytes]


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    """Give a clock."""
    return Clock()


@pytest.fixture(params=["memory", "directory", "server"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    """Name a root of each kind."""
    if request.param == "server":
        return fresh_url()
    return ":memory:" if request.param == "memory" else tmp_path / "root"


@pytest.fixture
def persistency(root: str | Path, clock: Clock) -> Iterator[Persistency]:
    """Give an empty root, on the clock of the test."""
    with Persistency(root, clock=clock) as opened:
        yield opened


@pytest.fixture
def job(persistency: Persistency) -> Job:
    """Give an empty job that keeps its changes."""
    return persistency.open_job("job", feed_changes_max=MANY)


@pytest.fixture
def parked(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Tell, once for each, that a request for changes was put aside to wait."""
    told = threading.Semaphore(0)
    park = Waiters.park

    def telling(waiters: Waiters, message: ListChanges, reply: Reply[Any]) -> BaseException | None:
        refusal = park(waiters, message, reply)
        told.release()
        return refusal

    monkeypatch.setattr(Waiters, "park", telling)
    return told


class Consumer:
    """A thread that takes steps of a feed; what ends it is kept."""

    def __init__(self, feed: ChangeFeed, count: int = MANY) -> None:
        self.changes: list[Change] = []
        self.error: BaseException | None = None
        self._feed = feed
        self._count = count
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            while len(self.changes) < self._count:
                self.changes.append(next(self._feed))
        except BaseException as error:
            self.error = error

    def join(self) -> list[Change]:
        """Wait for its end and return what it was given."""
        self._thread.join(WAIT)
        assert not self._thread.is_alive()
        return self.changes


class Hold:
    """Holds a job up inside a function it runs, until it is released."""

    def __init__(self, job: Job) -> None:
        self._entered = threading.Semaphore(0)
        self._may_go = threading.Event()
        self._job = job
        self._asked = threading.Thread(target=lambda: job.run(self).result())

    def __call__(self, _tx: Transaction) -> None:
        self._entered.release()
        assert self._may_go.wait(WAIT)

    def hold(self) -> Hold:
        """Hold the job up, from a thread that waits for it."""
        self._asked.start()
        return self.wait()

    def wait(self) -> Hold:
        """Wait until the job is in here."""
        assert self._entered.acquire(timeout=WAIT)
        return self

    def release(self) -> None:
        """Let the job go on."""
        self._may_go.set()
        if self._asked.ident is not None:
            self._asked.join(WAIT)


def waiting(persistency: Persistency) -> int:
    """Count the requests for changes that are parked in the worker of the job."""
    worker = persistency._site._entries["job"].worker
    assert worker is not None
    return len(worker.waiters._parked)


def take(feed: ChangeFeed, count: int) -> list[Change]:
    """Take so many changes."""
    return [next(feed) for _ in range(count)]


def until(feed: ChangeFeed, payload: bytes) -> list[Change]:
    """Take the changes up to the put of a payload, without it."""
    changes: list[Change] = []
    for change in feed:
        if change.payload == payload:
            return changes
        changes.append(change)
    raise AssertionError("the feed has ended")


def replay(state: State, changes: Iterable[Change]) -> State:
    """Do to a dict what the changes say."""
    for change in changes:
        match change.kind:
            case "put":
                assert change.payload is not None
                state[change.category, bytes(change.key)] = change.payload
            case "delete" | "expire":
                state.pop((change.category, bytes(change.key)), None)
            case "delete_range":
                for category, at in list(state):
                    if category == change.category and at >= change.key and (change.stop is None or at < change.stop):
                        del state[category, at]
    return state


def state_of(job: Job) -> State:
    """Return every live row of a job."""
    return {
        (category, bytes(row.key)): row.payload
        for category in job.categories().result()
        for row in job.scan(category).result()
    }


# -- in order, each once -------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """A change that a writer knows it will make; its version, once it is known."""

    kind: str
    key: bytes
    payload: bytes | None
    stop: bytes | None


class Writer:
    """Writes what it has planned, in keys of its own, and knows the changes that makes."""

    def __init__(self, name: int) -> None:
        self.expected: list[Expected] = []
        self.versions: dict[int, int] = {}  # by the number of the change, where the job tells
        self.name = name
        self._steps: list[Callable[[Job], object]] = []
        self._keys: set[Key] = set()

    def plan(self, steps: int, chance: random.Random) -> None:
        """Plan what to write next."""
        self._steps = [self._planned(b"%d %d" % (self.name, number), chance) for number in range(steps)]

    def write(self, job: Job) -> None:
        """Do all that is planned."""
        for step in self._steps:
            step(job)

    def _planned(self, payload: bytes, chance: random.Random) -> Callable[[Job], object]:
        at = key(self.name, chance.randrange(4), chance.randrange(3))
        match chance.randrange(7):
            case 0 | 1:
                self._will_put(at, payload)
                return lambda job: job.put("c", at, payload)
            case 2:
                keys = [at + (part,) for part in range(chance.randrange(1, 4))]
                last = self._will_put(*keys, payload)
                puts = [Put("c", one, payload) for one in keys]
                return lambda job: self._note(last, len(keys), job.commit(puts).result(WAIT))
            case 3:
                last = self._will_put(at, at + (0,), payload)
                return lambda job: self._note(last, 2, job.run(put_two, at, payload).result(WAIT))
            case 4:
                if at in self._keys:
                    self.expected.append(Expected("delete", at, None, None))
                    self._keys.discard(at)
                return lambda job: job.delete("c", at)
            case 5:
                stop = b"%b\xff" % at
                inside = {one for one in self._keys if at <= one < stop}
                if inside:
                    self.expected.append(Expected("delete_range", at, None, stop))
                    self._keys -= inside
                return lambda job: job.delete_prefix("c", at)
            case _:  # fails, and is no change
                return lambda job: refused(job, [Put("c", at, b"never"), Check("c", key("none"), 1)])

    def _will_put(self, *keys_and_payload: Any) -> int:
        *keys, payload = keys_and_payload
        self.expected += [Expected("put", at, payload, None) for at in keys]
        self._keys |= set(keys)
        return len(self.expected) - 1

    def _note(self, last: int, count: int, version: int) -> None:
        self.versions |= {last - back: version - back for back in range(count)}

    def check(self, changes: list[Change]) -> None:
        """See that these are its own: every change, once, in order, with the versions it was told."""
        assert [Expected(c.kind, c.key, c.payload, c.stop) for c in changes] == self.expected
        assert {at: changes[at].version for at in self.versions} == self.versions
        assert self.versions


def put_two(tx: Transaction, at: Key, payload: bytes) -> int:
    """Put two rows and return the version of the second one."""
    tx.put("c", at, payload)
    tx.put("c", at + (0,), payload)
    return tx.version()


def refused(job: Job, batch: list[Any]) -> None:
    """Commit a batch whose check fails."""
    with pytest.raises(Conflict):
        job.commit(batch).result(WAIT)


def take_any_way(feed: ChangeFeed, count: int, chance: random.Random) -> list[Change]:
    """Take so many changes, in this thread or in an event loop, and leave the loop."""

    async def take_in_loop() -> list[Change]:
        changes: list[Change] = []
        async for change in feed:
            changes.append(change)
            if len(changes) == count:
                break
        return changes

    if not count:
        return []
    return chance.choice([*LOOPS.values()])(take_in_loop) if chance.random() < 0.3 else take(feed, count)


@pytest.mark.parametrize("seed", [1, 2])
def test_a_consumer_that_stops_and_resumes_misses_nothing(root: str | Path, seed: int) -> None:
    """Beside 8 writers a consumer that stops 100 times at random is given every change once, in order.

    It goes on with the same feed or with a new one behind its last change, in threads and event loops in turn; in a
    file also across closing: of its own lease while the writers go on, and of the job between their rounds, with
    changes that it hasn't seen.
    """
    chance = random.Random(seed)
    rounds = 1 if root == ":memory:" else 5
    writers = [Writer(name) for name in range(8)]
    seen: list[Change] = []
    stopped = 0
    for round_ in range(rounds):
        with Persistency(root) as persistency, Persistency(root) as another:
            job = persistency.open_job("job", feed_changes_max=MANY)
            mine = job if rounds == 1 else another.open_job("job")
            for writer in writers:
                writer.plan(120, chance)
            threads = [threading.Thread(target=writer.write, args=(job,)) for writer in writers]
            for thread in threads:
                thread.start()
            there = sum(len(writer.expected) for writer in writers)
            wanted = there if round_ == rounds - 1 else there - chance.randrange(200)
            stops = sorted(chance.sample(range(len(seen) + 1, wanted), 100 // rounds))
            feed = ChangeFeed(mine, after=seen[-1].version if seen else 0)
            for stop in [*stops, wanted]:
                seen += take_any_way(feed, stop - len(seen), chance)
                assert len(seen) == stop
                stopped += 1
                if rounds > 1 and chance.random() < 0.2:
                    mine.close()
                    mine = another.open_job("job")
                    feed = ChangeFeed(mine, after=seen[-1].version)
                elif chance.random() < 0.7:
                    feed = ChangeFeed(mine, after=seen[-1].version, page=chance.randrange(1, 300))
            for thread in threads:
                thread.join(WAIT)
            if wanted == there:
                assert job.changes(seen[-1].version, 1).result() == []
    assert stopped > 100
    assert all(before.version < change.version for before, change in pairwise(seen))
    for writer in writers:
        writer.check([change for change in seen if change.key.parts[0] == writer.name])
    assert {change.category for change in seen} == {"c"}


@pytest.mark.parametrize("posted", [1, 1000])
def test_a_feed_follows_from_the_moment_it_is_made(job: Job, posted: int) -> None:
    """What was posted before isn't given, committed or not; what is posted after is, whatever is asked in between."""
    for number in range(posted):
        job.put("c", (number,), b"before")
    feed = ChangeFeed(job)
    for number in range(posted):
        job.put("c", (number,), b"after")
    assert [change.payload for change in take(feed, posted)] == [b"after"] * posted
    late = ChangeFeed(job)
    job.put("c", ("late",), b"late")
    assert next(late) == next(feed) == Change(2 * posted + 1, "put", "c", key("late"), b"late", None)


def test_a_feed_made_in_an_event_loop_neither_waits_nor_misses(
    persistency: Persistency, job: Job, in_loop: InLoop
) -> None:
    """Making one while the job is busy returns at once, and still fixes where it begins."""
    hold = Hold(job).hold()

    async def follow() -> list[Change]:
        job.put("c", ("before",), b"")
        feed = ChangeFeed(job)
        job.put("c", ("after",), b"")
        with pytest.raises(Misuse, match="doesn't know yet"):
            feed.after  # noqa: B018  # a property that is refused
        await in_thread(hold.release)
        changes = [await anext(feed)]
        job.put("c", ("last",), b"")
        return [*changes, await anext(feed)]

    assert [change.key.parts for change in in_loop(follow)] == [("after",), ("last",)]
    assert waiting(persistency) == 0


def test_a_cancelled_first_step_keeps_where_the_feed_begins(job: Job, in_loop: InLoop) -> None:
    """The answer that says where a feed begins isn't lost with the task that waited for it."""
    hold = Hold(job).hold()

    async def follow() -> Change:
        job.put("c", ("before",), b"")
        feed = ChangeFeed(job)
        job.put("c", ("after",), b"")
        with anyio.move_on_after(0) as scope:
            await anext(feed)
        assert scope.cancelled_caught
        await in_thread(hold.release)
        return await anext(feed)

    assert in_loop(follow).key.parts == ("after",)


def test_several_feeds_at_once_each_give_all(job: Job, in_loop: InLoop) -> None:
    """Feeds don't take changes from one another, in tasks and threads together."""
    count = 500

    def put_all() -> None:
        for number in range(count):
            job.put("c", (number,), b"")

    async def follow(feed: ChangeFeed) -> list[Change]:
        changes: list[Change] = []
        async for change in feed:
            changes.append(change)
            if len(changes) == count:
                break
        return changes

    async def follow_all() -> list[list[Change]]:
        consumers = [Consumer(ChangeFeed(job), count) for _ in range(3)]
        feeds = [ChangeFeed(job, page=page) for page in (1, 7, 256)]
        writer = threading.Thread(target=put_all)
        writer.start()
        of_tasks = await together(*(follow(feed) for feed in feeds))
        await in_thread(writer.join)
        return [*of_tasks, *[await in_thread(consumer.join) for consumer in consumers]]

    given_to = in_loop(follow_all)
    assert [[change.key.parts[0] for change in changes] for changes in given_to] == [list(range(count))] * 6


def test_for_and_async_for_go_on_with_one_another(job: Job, in_loop: InLoop) -> None:
    """A loop begins where the last one was left, whichever kind it is."""
    feed = ChangeFeed(job)
    for number in range(9):
        job.put("c", (number,), b"")

    async def three() -> list[int]:
        found = []
        async for change in feed:
            found.append(change.key.parts[0])
            if len(found) == 3:
                break
        return found

    found = [change.key.parts[0] for change in take(feed, 3)] + in_loop(three)
    for change in feed:
        found.append(change.key.parts[0])
        if len(found) == 9:
            break
    assert found == list(range(9))


def test_only_what_is_committed_is_given(job: Job) -> None:
    """A batch whose check fails, and a run that raises, show nothing, and their versions belong to others then."""
    feed = ChangeFeed(job)

    def fail(tx: Transaction) -> None:
        tx.put("c", ("run",), b"never")
        tx.delete("c", ("there",))
        raise KeyError("this run")

    job.put("c", ("there",), b"1")
    refused(job, [Put("c", ("batch",), b"never"), Check("c", ("there",), None)])
    with pytest.raises(KeyError):
        job.run(fail).result(WAIT)
    job.persist([Put("c", ("event",), b"never"), Check("c", ("there",), None)])  # fails with nobody to tell
    assert job.compare_and_set("c", ("there",), b"2", b"never").result() is False
    assert job.delete_acked("c", ("missing",)).result() is False
    assert job.touch("c", ("there",), None).result() is True
    job.put("c", ("there",), b"2")
    changes = take(feed, 2)
    assert [(change.key.parts, change.payload) for change in changes] == [(("there",), b"1"), (("there",), b"2")]
    assert changes[-1].version == job.version().result()
    with pytest.raises(WriteFailed):
        job.flush().result()


# -- expiries ------------------------------------------------------------------------------------------------------


def test_expiries_are_changes(job: Job, clock: Clock) -> None:
    """The end of a row is given when it is taken away, in the order of the ends, with a version of its own."""
    feed = ChangeFeed(job)
    for name, ttl in (("third", 30), ("first", 10), ("second", 20), ("kept", 5), ("later", 15)):
        job.put("c", (name,), b"", ttl=ttl)
    job.put("c", ("kept",), b"for ever")
    assert job.touch("c", ("later",), 1000).result()
    assert {change.kind for change in take(feed, 6)} == {"put"}
    clock.now += 60
    job.put("c", ("wakes the job",), b"")
    changes = take(feed, 4)
    kinds = [(change.kind, change.key.parts[0]) for change in changes]
    assert kinds == [("put", "wakes the job"), ("expire", "first"), ("expire", "second"), ("expire", "third")]
    assert [change.version for change in changes] == list(range(changes[0].version, changes[0].version + 4))
    assert {(change.payload, change.stop) for change in changes[1:]} == {(None, None)}


def test_an_idle_job_tells_of_expiries(root: str | Path) -> None:
    """Nobody writes or asks anything: a feed that waits is told of a row's end by the system's own clock."""
    with Persistency(root) as persistency:
        job = persistency.open_job("job", feed_changes_max=10)
        feed = ChangeFeed(job, "c", ("a",))
        job.put("c", ("a", 1), b"", ttl=0.05)
        assert [(change.kind, change.key.parts) for change in take(feed, 2)] == [
            ("put", ("a", 1)), ("expire", ("a", 1)),
        ]  # fmt: skip


# -- filters -------------------------------------------------------------------------------------------------------

FEW_BYTES = st.lists(st.sampled_from([b"\0", b"\1", b"a", b"\xfe", b"\xff"]), max_size=3).map(b"".join)
SOME_KEYS = st.one_of(
    FEW_BYTES.map(RawKey),
    st.lists(st.sampled_from(["", "a", "a\0", "ab", b"\xff", 0, 1, None]), max_size=3).map(lambda parts: key(*parts)),
)
CATEGORIES = st.sampled_from(["c", "d"])
DELETED_RANGES = st.builds(KeyRange, st.none() | SOME_KEYS, st.none() | SOME_KEYS).filter(
    lambda span: span.start is not None or span.stop is not None
)
OPS = st.one_of(
    st.builds(Put, CATEGORIES, SOME_KEYS, st.just(b"")),
    st.builds(Put, CATEGORIES, SOME_KEYS, st.just(b"")),
    st.builds(Delete, CATEGORIES, SOME_KEYS),
    st.builds(DeletePrefix, CATEGORIES, SOME_KEYS.filter(bool)),
    st.builds(DeleteRange, CATEGORIES, DELETED_RANGES),
)


@settings(max_examples=150, deadline=None)
@given(ops=st.lists(OPS, max_size=25), prefix=st.none() | SOME_KEYS, page=st.integers(1, 4))
@example(
    ops=[Put("c", RawKey(b"\xff"), b""), Put("c", key("a"), b""), DeleteRange("c", KeyRange(RawKey(b"a")))],
    prefix=RawKey(b"\xff"),
    page=1,
)
@example(ops=[Put("c", RawKey(b"\1"), b""), Put("c", RawKey(b"\0\xff"), b"")], prefix=RawKey(b"\0"), page=1)
def test_a_filtered_feed_tells_what_the_whole_one_tells_of_its_keys(
    ops: list[Any], prefix: Key | None, page: int
) -> None:
    """Done to a dict, version by version, it gives what the whole feed gives when all other keys are left out.

    So range deletes are cut to the filter: they reach for none of the other keys, and those that meet it in none of its
    keys aren't given.
    """
    with Persistency(":memory:") as persistency:
        job = persistency.open_job("job", feed_changes_max=MANY)
        for number, op in enumerate(ops):
            job.persist(Put(op.category, op.key, b"%d" % number) if isinstance(op, Put) else op)
        job.put("c", () if prefix is None else prefix, b"end")  # the key of a prefix is in it
        whole = until(ChangeFeed(job, after=0), b"end")
        filtered = until(ChangeFeed(job, "c", prefix, after=0, page=page), b"end")
    span = KeyRange() if prefix is None else KeyRange.prefix(prefix)
    start = span.start or b""

    def inside(state: State) -> State:
        return {
            (category, at): payload
            for (category, at), payload in state.items()
            if category == "c" and at >= start and (span.stop is None or at < span.stop)
        }

    everything: State = {}
    ours: State = {}
    of_version = {change.version: change for change in filtered}
    assert len(of_version) == len(filtered)
    assert of_version.keys() <= {change.version for change in whole}
    for change in whole:
        replay(everything, [change])
        mine = of_version.get(change.version)
        if mine is not None:
            replay(ours, [mine])
            assert mine.category == "c"
            assert start <= mine.key
            assert type(mine.key) is Key
            if mine.kind == "delete_range":
                assert span.stop is None or (mine.stop is not None and mine.stop <= span.stop)
                assert mine.stop is None or (mine.key < mine.stop and type(mine.stop) is Key)
        assert ours == inside(everything)


def test_range_deletes_are_cut_to_the_filter(job: Job) -> None:
    """Of a range that overlaps a filter the overlap is given, by the bounds of whichever ends first."""
    inside = KeyRange.prefix(("b",))
    feed = ChangeFeed(job, "c", ("b",))
    deleted = [
        (KeyRange(("a",), ("c",)), inside),
        (KeyRange(("a",), ("b", 2)), KeyRange(("b",), ("b", 2))),
        (KeyRange(("b", 2), ("c",)), KeyRange(("b", 2), inside.stop)),
        (KeyRange(("b", 2)), KeyRange(("b", 2), inside.stop)),
        (KeyRange(None, ("b", 2)), KeyRange(("b",), ("b", 2))),
        (KeyRange(("b", 1), ("b", 3)), KeyRange(("b", 1), ("b", 3))),
        (KeyRange(None, ("b",)), None),
        (KeyRange(("ba",)), None),
    ]
    rows = [Put("c", at, b"") for at in (("a",), ("b", 1), ("b", 2), ("ba",))]
    for span, _ in deleted:
        job.persist(rows)
        job.delete_range("c", span)
    job.put("c", ("b",), b"end")
    given_ranges = [KeyRange(c.key, c.stop) for c in until(feed, b"end") if c.kind == "delete_range"]
    assert given_ranges == [clipped for _, clipped in deleted if clipped is not None]


def test_filters_are_exact(job: Job) -> None:
    """A category leaves out the others; a key's prefix ends between parts, a `RawKey`'s anywhere; expiries too."""
    feeds = {
        "all": ChangeFeed(job),
        "c": ChangeFeed(job, "c"),
        "c a": ChangeFeed(job, "c", ("a",)),
        "c all": ChangeFeed(job, "c", ()),
        "c raw a": ChangeFeed(job, "c", RawKey(b"\2a")),
    }
    for category, at in (("c", "a"), ("d", "a"), ("c", "ab"), ("C", "a"), ("c", "b"), ("c", "a")):
        job.put(category, (at, 1), f"{category} {at}".encode())
    for category in ("c", "d", "C"):
        job.put(category, ("a",), b"end")
    of_c = [b"c a", b"c ab", b"c b", b"c a"]
    found = {name: [change.payload for change in until(feed, b"end")] for name, feed in feeds.items()}
    assert found == {
        "all": [b"c a", b"d a", b"c ab", b"C a", b"c b", b"c a"],
        "c": of_c,
        "c a": [b"c a", b"c a"],
        "c all": of_c,
        "c raw a": [b"c a", b"c ab", b"c a"],
    }


# -- where a feed stands -------------------------------------------------------------------------------------------


def test_after_passes_a_change_when_the_next_is_asked_for(job: Job) -> None:
    """What a consumer was stopped in the middle of comes again behind `after`, and not behind its own version."""
    feed = ChangeFeed(job, after=0)
    assert feed.after == 0
    for number in range(5):
        job.put("c", (number,), b"")
    first = next(feed)
    assert (first.version, feed.after) == (1, 0)
    second = next(feed)
    assert (second.version, feed.after) == (2, 1)
    assert next(ChangeFeed(job, after=feed.after)) == second
    assert next(ChangeFeed(job, after=second.version)).version == 3
    assert [change.version for change in take(feed, 3)] == [3, 4, 5]
    assert ChangeFeed(job).after == 5


def test_after_passes_what_is_filtered_out(persistency: Persistency, job: Job, parked: threading.Semaphore) -> None:
    """A feed that is given nothing for long still gets on, so that it can be resumed when the rest is long gone."""
    feed = ChangeFeed(job, "wanted", page=3)
    job.put("wanted", (), b"1")
    assert next(feed).payload == b"1"
    for number in range(10):
        job.put("other", (number,), b"")
    consumer = Consumer(feed, 1)
    assert parked.acquire(timeout=WAIT)
    assert feed.after == 11
    job.put("other", (), b"")
    assert parked.acquire(timeout=WAIT)  # it was woken, and waits again
    assert feed.after == 12
    job.put("wanted", (), b"2")
    assert consumer.join()[0].payload == b"2"
    assert feed.after == 12


def test_a_filtered_feed_goes_on_across_reopening(tmp_path: Path) -> None:
    """With `after` of the last one, though most of what it has passed is no longer kept."""
    position = 0
    for number in range(4):
        with Persistency(tmp_path) as persistency:
            job = persistency.open_job("job", feed_changes_max=20)
            feed = ChangeFeed(job, "wanted", after=position)
            for at in range(15):
                job.put("other", (at,), b"")
            job.put("wanted", (number,), b"%d" % number)
            job.put("wanted", ("last",), b"last %d" % number)
            assert next(feed).payload == b"%d" % number
            assert next(feed).payload == b"last %d" % number
            position = feed.after + 1  # the last one is dealt with
            assert position == job.version().result()


def test_wherever_a_step_is_interrupted_it_has_missed_nothing(persistency: Persistency, job: Job) -> None:
    """Ctrl-C at the beginning of any function a step calls: the same feed, or a new one `after` it, goes on exactly."""
    for number in range(8):
        job.put("c" if number % 3 else "other", (number,), b"")
    expected = [change for change in job.changes(0, MANY).result() if change.category == "c"]
    interrupts = 0
    while True:
        feed = ChangeFeed(job, "c", after=0, page=2)
        interrupt = Interrupt(interrupts + 1)
        changes: list[Change] = []
        while (at := len(changes)) < len(expected):
            with interrupt:
                changes.append(next(feed))
            if len(changes) == at:
                assert next(ChangeFeed(job, "c", after=feed.after)) in expected[max(at - 1, 0) : at + 1]
        assert changes == expected
        if not interrupt.came:
            break
        interrupts += 1
    assert interrupts > 50
    assert waiting(persistency) == 0


class Interrupt:
    """Raises `KeyboardInterrupt` once, at the entry of the nth function that a step of a feed calls, and takes it."""

    FILES = ("persistency/feed.py", "persistency/job.py", "actor/reply.py", "persistency/messages.py")

    def __init__(self, at: int) -> None:
        self.came = False
        self._left = at

    def _trace(self, frame: Any, event: str, _arg: Any) -> None:
        if event == "call" and frame.f_code.co_filename.endswith(self.FILES):
            self._left -= 1
            if self._left == 0:
                self.came = True
                raise KeyboardInterrupt

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        if not self.came:
            sys.settrace(self._trace)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        sys.settrace(self._before)
        return kind is KeyboardInterrupt


# -- what is no longer kept ----------------------------------------------------------------------------------------


def test_a_feed_that_falls_behind_is_told(persistency: Persistency, in_loop: InLoop) -> None:
    """What it holds already it still gives; then it raises, at every step, with the first version that is kept."""
    job = persistency.open_job("job", feed_changes_max=10)
    feed, beside = ChangeFeed(job, page=2), ChangeFeed(job, after=0)
    for number in range(5):
        job.put("c", (number,), b"")
    first = next(feed)
    for number in range(20):
        job.put("c", (number,), b"")
    job.flush().result()
    assert [first.version, next(feed).version] == [1, 2]
    for _ in range(2):
        with pytest.raises(FeedTruncated) as truncated:
            next(feed)
        assert truncated.value.oldest == 16
    assert feed.after == 2
    with pytest.raises(FeedTruncated):
        next(beside)
    with pytest.raises(FeedTruncated):
        in_loop(step, ChangeFeed(job, "other", after=14))
    resumed = ChangeFeed(job, after=truncated.value.oldest - 1)
    assert [change.version for change in take(resumed, 10)] == list(range(16, 26))


async def step(feed: ChangeFeed) -> Change:
    """Take one step in an event loop."""
    return await anext(feed)


def test_what_is_kept_is_kept_across_reopening(tmp_path: Path) -> None:
    """Behind a change that is kept a feed goes on after a reopening; behind an older one it is truncated."""
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("job", feed_changes_max=10)
        for number in range(30):
            job.put("c", (number,), b"")
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("job", feed_changes_max=10)
        job.put("c", ("new",), b"")
        assert [change.version for change in take(ChangeFeed(job, after=21), 10)] == list(range(22, 32))
        with pytest.raises(FeedTruncated) as truncated:
            next(ChangeFeed(job, after=20))
        assert truncated.value.oldest == 22
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("job", feed_changes_max=3)  # fewer, from the next commit on
        job.put("c", ("newer",), b"")
        assert [change.version for change in take(ChangeFeed(job, after=29), 3)] == [30, 31, 32]
        with pytest.raises(FeedTruncated) as truncated:
            next(ChangeFeed(job, after=28))
        assert truncated.value.oldest == 30


@pytest.mark.parametrize("written", [0, 3])
def test_a_gap_in_keeping_is_told(tmp_path: Path, written: int) -> None:
    """A job that was open without keeping changes has a gap if it was written to then, and none if it wasn't."""
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("job", feed_changes_max=100)
        for number in range(5):
            job.put("c", (number,), b"")
        assert [change.version for change in take(ChangeFeed(job, after=0), 2)] == [1, 2]
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("job")
        for number in range(written):
            job.put("c", (number,), b"unnoted")
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("job", feed_changes_max=100)
        job.put("c", ("new",), b"")
        if written:
            for after in (0, 2, 5, 7):
                with pytest.raises(FeedTruncated) as truncated:
                    next(ChangeFeed(job, after=after))
                assert truncated.value.oldest == 9
            assert next(ChangeFeed(job, after=8)).key.parts == ("new",)
        else:
            assert [change.version for change in take(ChangeFeed(job, after=2), 4)] == [3, 4, 5, 6]


def test_the_rows_from_before_are_no_changes(tmp_path: Path) -> None:
    """A job that begins to keep changes when it has rows already says that what made them is not kept."""
    with Persistency(tmp_path) as persistency:
        persistency.open_job("job").put("c", (), b"")
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("job", feed_changes_max=100)
        with pytest.raises(FeedTruncated) as truncated:
            next(ChangeFeed(job, after=0))
        assert truncated.value.oldest == 2


def test_a_position_beyond_the_last_version_is_told(job: Job) -> None:
    """An `after` the job hasn't come to is another file's, or that of commits a power cut has taken: changes would be
    missed until the versions have passed it.
    """
    job.put("c", (), b"")
    feed = ChangeFeed(job, after=2)
    for number in range(5):
        job.put("c", (number,), b"")
    for _ in range(2):
        with pytest.raises(FeedTruncated, match="before version 2") as truncated:
            next(feed)
    assert "beyond the job's last version, 1" in truncated.value.hint
    assert next(ChangeFeed(job, after=6 - 1)).version == 6
    job.put("c", (), b"")
    assert next(ChangeFeed(job, after=6)).version == 7


# -- what a feed costs ---------------------------------------------------------------------------------------------


def test_a_paused_consumer_costs_the_job_nothing(tmp_path: Path) -> None:
    """With a feed that has stopped in the middle the same statements are run as with none, and no more is kept."""
    counted: list[Counter[str]] = []
    for name in ("without", "with"):
        statements: Counter[str] = Counter()

        def count(event: dict[str, Any], statements: Counter[str] = statements) -> None:
            statements[event["sql"]] += 1

        def watch(connection: apsw.Connection, count: Callable[[dict[str, Any]], None] = count) -> None:
            connection.trace_v2(apsw.SQLITE_TRACE_STMT, count)

        apsw.connection_hooks.append(watch)
        try:
            with Persistency(tmp_path) as persistency:
                job = persistency.open_job(name, feed_changes_max=10)
                for number in range(8):
                    job.commit(Put("c", (number,), b"")).result()
                feed = ChangeFeed(job, after=0, page=4)
                if name == "with":
                    assert next(feed).version == 1
                statements.clear()
                for number in range(100):
                    job.commit(Put("c", (number,), b"")).result()
                counted.append(Counter(statements))
                if name == "with":
                    assert [change.version for change in take(feed, 3)] == [2, 3, 4]
                path = job.path
        finally:
            apsw.connection_hooks.remove(watch)
        assert path is not None
        with sqlite3.connect(path) as file:
            assert file.execute("SELECT count(*), min(version) FROM changes").fetchall() == [(10, 99)]
        file.close()
    assert counted[0] == counted[1]
    assert counted[0]["COMMIT"] >= 100


def test_between_steps_nothing_waits_and_nothing_is_asked(
    persistency: Persistency, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A feed asks only while a step is taken; whatever is written meanwhile, the store hears nothing of it."""
    asked: list[Any] = []
    for kind in (MemoryStore, SqliteStore, PostgresStore):

        def apply(store: Any, group: Any, now_ms: int, real: Any = kind.apply) -> Any:
            asked.extend(message for message in group[1::PLACES] if isinstance(message, ListChanges))
            return real(store, group, now_ms)

        def read(store: Any, message: Any, now_ms: int, real: Any = kind.read) -> Any:
            asked.extend([message] if isinstance(message, ListChanges) else [])
            return real(store, message, now_ms)

        monkeypatch.setattr(kind, "apply", apply)
        monkeypatch.setattr(kind, "read", read)
    feed = ChangeFeed(job, after=0)
    job.put("c", (), b"")
    assert next(feed).version == 1
    asked.clear()
    for number in range(1000):
        job.put("c", (number,), b"")
    job.flush().result()
    assert asked == []
    assert waiting(persistency) == 0
    assert next(feed).version == 2
    assert len(asked) == 1


def test_a_feed_waits_only_at_the_end(job: Job, parked: threading.Semaphore, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there already is read a page at a time as any read is, in place; only at the end a request waits."""
    asked: list[tuple[int, int, bool]] = []
    changes = Job.changes

    def noting(job: Job, after: int, limit: int, *, wait: bool = False) -> Reply[list[Change]]:
        asked.append((after, limit, wait))
        return changes(job, after, limit, wait=wait)

    feed = ChangeFeed(job, after=0, page=2)
    monkeypatch.setattr(Job, "changes", noting)
    for number in range(5):
        job.put("c", (number,), b"")
    consumer = Consumer(feed, 6)
    assert parked.acquire(timeout=WAIT)
    job.put("c", (), b"")
    assert len(consumer.join()) == 6
    assert asked == [(0, 2, False), (2, 2, False), (4, 2, False), (5, 2, True)]


def test_a_job_that_keeps_no_changes_has_no_feed(tmp_path: Path) -> None:
    """`Misuse` when the feed is made, and not a trace of it in the file."""
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("job")
        for after in (None, 0):
            with pytest.raises(Misuse, match="feed_changes_max"):
                ChangeFeed(job, after=after)
        job.put("c", (), b"")
        path = job.path
    assert path is not None
    file = sqlite3.connect(path)
    assert file.execute("SELECT name FROM sqlite_schema WHERE name LIKE '%changes%'").fetchall() == []
    assert file.execute("SELECT name FROM meta WHERE name LIKE '%changes%'").fetchall() == []
    file.close()


# -- the whole state -----------------------------------------------------------------------------------------------


class Anything:
    """Does anything to a job, at random, and now and then notes down the job's state at a version."""

    def __init__(self, seed: int, clock: Clock) -> None:
        self.states: dict[int, State] = {}
        self._chance = random.Random(seed)
        self._clock = clock

    def do(self, job: Job, steps: int) -> None:
        """Take so many steps."""
        for number in range(steps):
            self._step(job, self._chance.choice("cd"), self._key(), b"%d" % number)
            if self._chance.random() < 0.2:
                version, state = job.run(state_inside).result(WAIT)
                self.states[version] = state

    def _key(self) -> Key:
        return key(*[self._chance.choice(("a", "b", 1)) for _ in range(self._chance.randrange(1, 4))])

    def _ttl(self) -> float | None:
        return self._chance.choice((None, None, 3, 10, 30))

    def _step(self, job: Job, category: str, at: Key, payload: bytes) -> None:
        ttl = self._ttl()
        match self._chance.randrange(13):
            case 0 | 1 | 2:
                job.put(category, at, payload, ttl=ttl)
            case 3:
                job.delete(category, at)
            case 4:
                job.delete_prefix(category, at)
            case 5:
                job.delete_range(category, KeyRange(*sorted((at, self._key()))))
            case 6:
                row = job.entry(category, at).result(WAIT)
                version = None if row is None else row.version
                job.persist([Check(category, at, version), Delete(category, at), Put(category, self._key(), payload)])
            case 7:
                refused(job, [Put(category, at, b"never"), DeletePrefix(category, at), Check(category, at, MANY)])
            case 8:
                value = job.get(category, at).result(WAIT)
                new = self._chance.choice((payload, None))
                swapped = job.compare_and_set(category, at, value, new, ttl=None if new is None else ttl)
                assert swapped.result(WAIT)
            case 9:
                job.increment("numbers", at).result(WAIT)
                job.touch("numbers", at, ttl).result(WAIT)
            case 10:
                job.touch(category, at, ttl).result(WAIT)
            case 11:
                job.run(move, category, at, self._key(), ttl).result(WAIT)
                with pytest.raises(KeyError):
                    job.run(move, category, at, None, ttl).result(WAIT)
            case 12:
                job.flush().result(WAIT)  # or a check would be made at another time than it was read for
                self._clock.now += self._chance.choice((1, 5, 20))


def move(tx: Transaction, category: str, at: Key, to: Key | None, ttl: float | None) -> None:
    """Move a row, or what there is in its place; without a place to move it to, fail half way."""
    payload = tx.get(category, at) or b"moved"
    tx.delete_prefix(category, at)
    if to is None:
        raise KeyError(at)
    tx.put(category, to, payload, ttl=ttl)


def state_inside(tx: Transaction) -> tuple[int, State]:
    """Return the version, and every live row."""
    rows = {(category, bytes(row.key)): row.payload for category in tx.categories() for row in tx.scan(category)}
    return tx.version(), rows


@pytest.mark.parametrize("seed", range(6))
def test_a_feed_from_the_beginning_gives_the_state_at_every_version(root: str | Path, clock: Clock, seed: int) -> None:
    """Replayed into a dict it is what the job held then, but for rows that had ended and weren't taken away yet.

    S4-46, S4-49, S4-50, D-15: deletes and expiries are changes too, so who has missed some can catch up.
    """
    anything = Anything(seed, clock)
    for _ in range(1 if root == ":memory:" else 3):
        with Persistency(root, clock=clock) as persistency:
            job = persistency.open_job("job", feed_changes_max=MANY)
            anything.do(job, 150)
            job.flush().result(WAIT)
            clock.now += 60  # whatever has an end has ended
            feed = ChangeFeed(job, after=0, page=50)
            end = job.commit(Put("c", ("end",), b"end")).result(WAIT)
            changes = [next(feed)]
            while changes[-1].version < end:
                changes.append(next(feed))
            final = state_of(job)
            ended = replay({}, changes).keys() - final.keys()
            changes += take(feed, len(ended))
            assert replay({}, changes) == final
            assert [change.kind for change in changes[len(changes) - len(ended) :]] == ["expire"] * len(ended)
            assert job.changes(changes[-1].version, 1).result() == []
    assert {"put", "delete", "delete_range", "expire"} == {change.kind for change in changes}
    check_states(changes, anything.states)


def check_states(changes: list[Change], states: dict[int, State]) -> None:
    """See that the changes up to each version give the state at it; a row more there has ended, as a later one says."""
    assert len(states) > 20
    replayed: State = {}
    more: list[tuple[str, bytes]] = []
    checked = 0
    for before, change in pairwise([Change(0, "delete", "", Key(), None, None), *changes]):
        for version in range(before.version, change.version):
            if version in states:
                checked += 1
                assert states[version].items() <= replayed.items()
                more += replayed.keys() - states[version].keys()
        assert change.kind != "delete" or (change.category, change.key) not in more  # a delete of one is no change
        replay(replayed, [change])
        more = [at for at in more if at in replayed and (at != (change.category, change.key))]
    assert not more
    assert checked == len([version for version in states if version < changes[-1].version])


def test_a_snapshot_and_the_changes_behind_it_give_the_state(job: Job) -> None:
    """S4-46: the rows of a moment, and every change above the highest version among them, reproduce what the job holds.

    So a client begins with `snapshot()` and follows from there, deletes included, while others go on writing.
    """
    writers = [Writer(name) for name in range(4)]
    chance = random.Random(1)
    for writer in writers:
        writer.plan(100, chance)
    threads = [threading.Thread(target=writer.write, args=(job,)) for writer in writers]
    for thread in threads:
        thread.start()
    begun = []
    for _ in range(20):
        entries = job.snapshot("c").result(WAIT)
        state = {("c", bytes(entry.key)): entry.payload for entry in entries}
        begun.append((state, max((entry.version for entry in entries), default=0)))
    for thread in threads:
        thread.join(WAIT)
    final = state_of(job)
    job.put("c", ("end",), b"end")
    assert final
    for state, version in begun:
        assert replay(state, until(ChangeFeed(job, "c", after=version), b"end")) == final


# -- nothing is left behind ----------------------------------------------------------------------------------------


def test_a_cancelled_task_leaves_nothing_behind(
    persistency: Persistency, job: Job, parked: threading.Semaphore, in_loop: InLoop
) -> None:
    """The request of a task that waits is taken back with it, and the feed goes on as if it had never been made."""
    feed = ChangeFeed(job)

    async def wait_and_give_up() -> None:
        for _ in range(3):
            async with anyio.create_task_group() as group:
                task = Task(group, step(feed))
                assert await in_thread(parked.acquire, True, WAIT)
                assert waiting(persistency) == 1
                task.cancel()
            assert task.cancelled
            assert waiting(persistency) == 0

    in_loop(wait_and_give_up)

    async def leave_waiting() -> None:
        kept.append(asyncio.create_task(step(feed)))
        assert await asyncio.to_thread(parked.acquire, timeout=WAIT)  # left to the end of the loop

    kept: list[asyncio.Task[Change]] = []
    asyncio.run(leave_waiting())
    assert kept[0].cancelled()
    assert waiting(persistency) == 0
    job.put("c", (1,), b"")
    job.put("c", (2,), b"")
    assert [change.key.parts for change in take(feed, 2)] == [(1,), (2,)]


def test_a_dropped_step_leaves_nothing_behind(persistency: Persistency, job: Job, parked: threading.Semaphore) -> None:
    """A step that is forgotten while it waits, with its feed and without a word, takes its request back."""

    async def wait_and_forget() -> None:
        feed = ChangeFeed(job)
        job.put("c", (), b"")
        assert (await anext(feed)).version == 1
        waits = feed.__anext__()
        del feed
        assert asyncio.isfuture(waits.send(None))
        assert await asyncio.to_thread(parked.acquire, timeout=WAIT)
        assert waiting(persistency) == 1
        del waits
        gc.collect()
        assert waiting(persistency) == 0

    asyncio.run(wait_and_forget())


def test_leaving_a_loop_leaves_nothing_behind(persistency: Persistency, job: Job, parked: threading.Semaphore) -> None:
    """After `break`, or an error in the loop's body, no request is left; neither is one after a step that waited."""
    feed = ChangeFeed(job)
    consumer = Consumer(feed, 1)
    assert parked.acquire(timeout=WAIT)
    assert waiting(persistency) == 1
    job.put("c", (1,), b"")
    assert len(consumer.join()) == 1
    assert waiting(persistency) == 0
    for number in range(3):
        job.put("c", (number,), b"")
    for change in feed:
        assert change.kind == "put"
        break
    with suppress(ZeroDivisionError):
        for change in feed:
            assert change.version / 0  # the consumer fails
    job.flush().result()
    assert waiting(persistency) == 0
    assert next(feed).version == 4


def test_an_interrupt_in_a_loop_that_waits_leaves_nothing_behind(
    persistency: Persistency, job: Job, parked: threading.Semaphore
) -> None:
    """Ctrl-C ends a `for` that waits; the same feed goes on afterwards."""
    feed = ChangeFeed(job)
    main = threading.get_ident()
    caught = False

    def on_interrupt(_number: int, _frame: object) -> None:
        nonlocal caught
        if not caught:
            caught = True
            raise KeyboardInterrupt

    def interrupt() -> None:
        assert parked.acquire(timeout=WAIT)
        while not caught:
            if sys._current_frames()[main].f_code is Reply._wait.__code__:
                signal.pthread_kill(main, signal.SIGINT)  # one that comes just before a thread sleeps wakes nobody
            parked.acquire(timeout=0.01)  # a pause: nothing else is parked

    before = signal.signal(signal.SIGINT, on_interrupt)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            list(feed)
        thread.join(WAIT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert waiting(persistency) == 0
    job.put("c", ("after",), b"")
    assert next(feed).key.parts == ("after",)


@pytest.mark.parametrize("way", ["close", "cancel"])
def test_a_request_in_the_hands_of_the_job_is_taken_back_too(
    persistency: Persistency, job: Job, way: str, monkeypatch: pytest.MonkeyPatch, in_loop: InLoop
) -> None:
    """A step that is given up when its request was taken from the mailbox, and before it was put aside to wait."""
    posted = threading.Semaphore(0)
    changes = Job.changes

    def telling(job: Job, after: int, limit: int, *, wait: bool = False) -> Reply[list[Change]]:
        reply = changes(job, after, limit, wait=wait)
        if wait:
            posted.release()
        return reply

    monkeypatch.setattr(Job, "changes", telling)
    feed = ChangeFeed(job)
    job.version().result(WAIT)  # and so the feed knows where it begins
    first, second = Hold(job).hold(), Hold(job)
    answer = job.run(second)  # with what follows it is the next group

    async def give_up() -> None:
        async with anyio.create_task_group() as group:
            task = Task(group, step(feed))
            assert await in_thread(posted.acquire, True, WAIT)
            await in_thread(first.release)
            await in_thread(second.wait)
            if way == "close":
                feed.close()
            else:
                task.cancel()
                with pytest.raises(GivenUp):
                    await task
            second.release()
            await answer
            if way == "close":
                with pytest.raises(StopAsyncIteration):
                    await task
        await job.version()

    in_loop(give_up)
    job.version().result(WAIT)  # answered behind whatever was asked to take it back
    assert waiting(persistency) == 0


# -- the end of a feed ---------------------------------------------------------------------------------------------


def test_closing_a_feed_ends_a_loop_that_waits(
    persistency: Persistency, job: Job, parked: threading.Semaphore, in_loop: InLoop
) -> None:
    """In another thread, and in a task, the loop ends as a loop does; nothing is left waiting."""
    feed = ChangeFeed(job)
    consumer = Consumer(feed)
    assert parked.acquire(timeout=WAIT)
    feed.close()
    assert consumer.join() == []
    assert isinstance(consumer.error, StopIteration)
    assert waiting(persistency) == 0

    async def close_beside() -> list[Change]:
        async def follow(feed: ChangeFeed) -> list[Change]:
            return [change async for change in feed]

        async with anyio.create_task_group() as group:
            with ChangeFeed(job) as feed:
                task = Task(group, follow(feed))
                assert await in_thread(parked.acquire, True, WAIT)
                job.put("c", (), b"")
                assert await in_thread(parked.acquire, True, WAIT)
            return await task

    assert len(in_loop(close_beside)) == 1
    assert waiting(persistency) == 0


def test_a_closed_feed_gives_nothing_more(job: Job, in_loop: InLoop) -> None:
    """Not even what it holds already; `after` still says where to go on."""
    job.put("c", (1,), b"")
    job.put("c", (2,), b"")
    job.put("c", (3,), b"")
    with ChangeFeed(job, after=0) as feed:
        assert take(feed, 2)[-1].version == 2
    assert feed.after == 1
    assert list(feed) == []
    feed.close()
    with pytest.raises(StopAsyncIteration):
        in_loop(step, feed)
    assert "closed" in repr(feed)
    never_used = ChangeFeed(job)
    never_used.close()
    assert list(never_used) == []


def test_a_feed_of_a_job_that_is_closed_raises_closed(
    persistency: Persistency, job: Job, parked: threading.Semaphore, in_loop: InLoop
) -> None:
    """Whether it waits just then, in a thread or a task, or asks later; and so does making one."""
    consumer = Consumer(ChangeFeed(job))
    feed = ChangeFeed(job)

    async def close_beside() -> None:
        async with anyio.create_task_group() as group:
            task = Task(group, step(feed))
            for _ in range(2):
                assert await in_thread(parked.acquire, True, WAIT)
            await job.aclose()
            with pytest.raises(Closed):
                await task

    in_loop(close_beside)
    assert consumer.join() == []
    assert isinstance(consumer.error, Closed)
    with pytest.raises(Closed):
        next(feed)
    with pytest.raises(Closed):
        ChangeFeed(job)


def test_a_feed_ends_with_its_own_handle(tmp_path: Path, parked: threading.Semaphore) -> None:
    """A handle that is closed while another `Persistency` has the job open still: its feed is told at once."""
    with Persistency(tmp_path) as persistency, Persistency(tmp_path) as another:
        other = another.open_job("job", feed_changes_max=10)
        job = persistency.open_job("job")
        consumer = Consumer(ChangeFeed(job))
        assert parked.acquire(timeout=WAIT)
        job.close()
        assert consumer.join() == []
        assert isinstance(consumer.error, Closed)
        assert waiting(another) == 0
        other.put("c", (), b"")
        assert next(ChangeFeed(other, after=0)).version == 1


def test_a_feed_that_waits_keeps_no_program_from_ending(tmp_path: Path) -> None:
    """A daemon thread that follows a job when the program ends is told `Closed`; what was written is in the file."""
    program = """
import sys, threading
from persistency import Closed, Persistency
from persistency.feed import ChangeFeed

p = Persistency(sys.argv[1])
job = p.open_job("job", feed_changes_max=10)
begun = threading.Event()

def follow():
    try:
        for change in ChangeFeed(job, after=0):
            begun.set()
    except Closed:
        pass

threading.Thread(target=follow, daemon=True).start()
job.put("c", (1,), b"")
assert begun.wait(20)
job.put("c", (2,), b"last")
"""
    command = [sys.executable, "-W", "ignore::ResourceWarning", "-c", program, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    with Persistency(tmp_path) as persistency:
        assert persistency.open_job("job").get("c", (2,)).result() == b"last"


# -- beside a full mailbox, and one another ------------------------------------------------------------------------


@pytest.fixture
def drained(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Tell, once for each, that somebody waits for room."""
    told = threading.Semaphore(0)
    drain = Job.drain

    def telling(job: Job) -> Reply[None]:
        reply = drain(job)
        told.release()
        return reply

    monkeypatch.setattr(Job, "drain", telling)
    return told


def test_a_step_waits_for_room(persistency: Persistency, drained: threading.Semaphore) -> None:
    """Where the mailbox is full of requests a thread's step waits, though the job was opened with on_full='raise'."""
    job = persistency.open_job("job", feed_changes_max=MANY, requests_max=2, on_full="raise")
    feed = ChangeFeed(job)
    job.version().result(WAIT)  # and so the feed knows where it begins
    hold = Hold(job).hold()
    full = [job.get("c", ()) for _ in range(2)]
    consumer = Consumer(feed, 1)
    assert drained.acquire(timeout=WAIT)
    hold.release()
    job.put("c", (), b"")
    assert [change.version for change in consumer.join()] == [1]
    assert [reply.result(WAIT) for reply in full] == [None] * 2


def test_a_step_in_an_event_loop_waits_for_room(
    persistency: Persistency, drained: threading.Semaphore, in_loop: InLoop
) -> None:
    """There too; only making a feed can't wait, and is refused."""
    job = persistency.open_job("job", feed_changes_max=MANY, requests_max=2)
    feed = ChangeFeed(job)
    job.version().result(WAIT)  # and so the feed knows where it begins
    hold = Hold(job).hold()

    async def follow() -> Change:
        full = [job.get("c", ()) for _ in range(4)]
        with pytest.raises(Overloaded):
            ChangeFeed(job)
        async with anyio.create_task_group() as group:
            task = Task(group, step(feed))
            assert await in_thread(drained.acquire, True, WAIT)
            await in_thread(hold.release)
            job.put("c", (), b"")
            await together(*full)
            return await task

    assert in_loop(follow).version == 1


def test_making_a_feed_in_a_thread_waits_for_room(persistency: Persistency, drained: threading.Semaphore) -> None:
    """A thread may wait, so it isn't refused."""
    job = persistency.open_job("job", feed_changes_max=MANY, requests_max=1, on_full="raise")
    hold = Hold(job).hold()
    full = job.get("c", ())
    made: list[ChangeFeed] = []
    thread = threading.Thread(target=lambda: made.append(ChangeFeed(job)))
    thread.start()
    assert drained.acquire(timeout=WAIT)
    hold.release()
    thread.join(WAIT)
    assert full.result(WAIT) is None
    job.put("c", (), b"")
    assert next(made[0]).version == 1


def test_one_feed_too_many_is_refused_and_doesnt_spin(
    persistency: Persistency, parked: threading.Semaphore, drained: threading.Semaphore
) -> None:
    """So many requests as `requests_max` may wait for changes; room in the mailbox wouldn't help the next one."""
    job = persistency.open_job("job", feed_changes_max=MANY, requests_max=2)
    consumers = [Consumer(ChangeFeed(job), 1) for _ in range(2)]
    for _ in consumers:
        assert parked.acquire(timeout=WAIT)
    refused_one = ChangeFeed(job)
    with pytest.raises(Overloaded, match="wait for changes already"):
        next(refused_one)
    assert not drained.acquire(blocking=False)
    job.put("c", (), b"")
    assert [consumer.join()[0].version for consumer in consumers] == [1, 1]
    assert next(refused_one).version == 1


def test_a_second_loop_beside_one_that_waits_is_refused(job: Job, parked: threading.Semaphore, in_loop: InLoop) -> None:
    """`Misuse` for the second thread or task; the first one goes on undisturbed."""
    feed = ChangeFeed(job)
    consumer = Consumer(feed, 2)
    assert parked.acquire(timeout=WAIT)
    with pytest.raises(Misuse, match="iterated already"):
        next(feed)
    with pytest.raises(Misuse, match="iterated already"):
        in_loop(step, feed)
    job.put("c", (), b"")
    job.put("c", (), b"")
    assert [change.version for change in consumer.join()] == [1, 2]

    async def two_tasks() -> Change:
        async with anyio.create_task_group() as group:
            first = Task(group, step(feed))
            assert await in_thread(parked.acquire, True, WAIT)
            with pytest.raises(Misuse, match="iterated already"):
                await step(feed)
            job.put("c", (), b"")
            return await first

    while parked.acquire(blocking=False):
        pass
    assert in_loop(two_tasks).version == 3


def test_a_feed_has_no_place_inside_a_run(job: Job) -> None:
    """It would wait for the very job that waits for it: `Misuse` at once, for making one and for a step."""
    feed = ChangeFeed(job)

    def inside(_tx: Transaction) -> None:
        with pytest.raises(Misuse):
            ChangeFeed(job)
        with pytest.raises(Misuse):
            next(feed)

    job.run(inside).result(WAIT)
    job.put("c", (), b"")
    assert next(feed).version == 1


# -- arguments -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "named"),
    [
        ((None, ("a",)), {}, "prefix"),
        ((None, ()), {}, "prefix"),
        ((7,), {}, "category"),
        (("",), {}, "category"),
        (("c", "a"), {}, "prefix"),
        (("c", b"a"), {}, "prefix"),
        (("c", (object(),)), {}, "part"),
        ((), {"after": -1}, "after"),
        ((), {"after": True}, "after"),
        ((), {"after": "1"}, "after"),
        ((), {"after": 1.0}, "after"),
        ((), {"page": 0}, "page"),
        ((), {"page": None}, "page"),
    ],
)
def test_wrong_arguments_are_refused(job: Job, arguments: Any, options: Any, named: str) -> None:
    """`Misuse` when the feed is made, with the argument's name."""
    with pytest.raises(Misuse, match=named):
        ChangeFeed(job, *arguments, **options)


def test_a_feed_is_of_a_job() -> None:
    """Anything else is refused, with what to pass."""
    with pytest.raises(Misuse, match="open_job"):
        ChangeFeed("job")  # type: ignore[arg-type]  # as it comes from a caller
