"""The adapters give the same answers, outcome by outcome, to random groups; the memory adapter is the model."""

from __future__ import annotations

import itertools
import random
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persistency.errors import Conflict, FeedTruncated, Misuse, PersistencyError, QuotaExceeded
from persistency.storage.directory import DirectoryRoot
from persistency.storage.memory import MemoryRoot, MemoryStore
from persistency.storage.port import (
    Barrier,
    CountRange,
    DropRange,
    DropRow,
    Expect,
    Failed,
    GetEntry,
    GetRow,
    GetRows,
    Group,
    HasRow,
    LastVersion,
    ListCategories,
    ListChanges,
    ListEntries,
    Reap,
    Root,
    Run,
    ScanRange,
    SetRow,
    Store,
    StoreOptions,
    SwapRow,
    TouchRow,
    UsedBytes,
    Within,
)
from persistency.storage.postgres.address import parsed
from persistency.storage.postgres.root import PostgresRoot
from persistency.testing import batch, dump, group, put
from tests.postgres import fresh_url

NOW_MS = 5
REOPEN = "close the store and open it again"
KEYS = [b"", b"\0", b"a", b"a\0", b"a\xff", b"b", b"\xff", b"\xff\xff"]


class Wait(NamedTuple):
    """Let time go by."""

    ms: int


class Stop(Exception):
    """What a run of these scripts raises by itself."""


def run_of(parts: list[tuple[Any, bool]], *, raises: bool) -> Run:
    """Return a run that does each message, goes on after one that fails if it is to, and tells what it was told."""

    def fn(within: Within) -> list[Any]:
        told = []
        for message, go_on in parts:
            try:
                answer = plain(within.do(message))
            except (PersistencyError, Stop) as error:
                if not go_on:
                    raise
                answer = plain(Failed(error))
            told.append((answer, within.version))
        if raises:
            raise Stop("it was to raise")
        return told

    return Run(fn)


def choice(*some: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return one of some, each as likely as another; `one_of` would count the choices within them too."""
    return st.sampled_from(some).flatmap(lambda one: one)


categories = st.sampled_from([b"c", b"d", b"\xff"])
keys = st.sampled_from(KEYS)
starts = st.sampled_from([*KEYS, b"a\0\0", b"\xfe"])
stops = st.one_of(st.none(), starts)
payloads = st.one_of(st.binary(max_size=6), st.sampled_from([b"", b"1", b"22"]))
found = st.one_of(st.none(), st.sampled_from([b"", b"1", b"22"]))
versions = st.one_of(st.none(), st.integers(0, 9))
limits = st.one_of(st.none(), st.integers(0, 9))
ends = st.one_of(st.none(), st.integers(1, 30))

puts = st.builds(put, categories, keys, payloads)
rows = st.tuples(categories, keys, payloads, ends).map(lambda row: SetRow(*row))
drops = st.one_of(st.builds(DropRow, categories, keys), st.builds(DropRange, categories, starts, stops))
touches = st.builds(TouchRow, categories, keys, ends)
swaps = choice(
    st.builds(SwapRow, categories, keys, found, found, ends),
    st.builds(SwapRow, categories, keys, st.none(), payloads, ends),
    touches,
    touches,
)
expects = st.builds(Expect, categories, keys, versions)
reads = st.one_of(
    st.builds(GetRow, categories, keys),
    st.builds(HasRow, categories, keys),
    st.builds(GetEntry, categories, keys),
    st.builds(GetRows, categories, st.lists(keys, max_size=5).map(tuple)),
    st.builds(ScanRange, categories, starts, stops, st.booleans(), limits, st.booleans()),
    st.builds(CountRange, categories, starts, stops),
    st.builds(ListCategories),
    st.builds(ListEntries, categories),
    st.builds(UsedBytes),
    st.builds(LastVersion),
)
pages = st.tuples(st.one_of(st.integers(0, 9), st.integers(0, 200)), st.integers(0, 9)).map(
    lambda page: ListChanges(*page)
)
# Half of the expectations are aimed at what is really there, when the group is made: see `aimed`.
checked = st.lists(st.one_of(puts, rows, drops, expects), min_size=1, max_size=6).map(lambda items: batch(*items))
batches = st.one_of(st.lists(puts, max_size=5).map(lambda items: batch(*items)), checked, checked)
inner = choice(rows, rows, drops, swaps, reads, pages, batches)
runs = st.recursive(
    st.builds(run_of, st.lists(st.tuples(inner, st.booleans()), max_size=5), raises=st.booleans()),
    lambda deeper: st.builds(
        run_of, st.lists(st.tuples(choice(inner, inner, deeper), st.booleans()), max_size=5), raises=st.booleans()
    ),
    max_leaves=4,
)


def many_puts(seed: int, size: int) -> Group:
    """Return so many puts that they are sorted and written many to a statement, as one message list."""
    chance = random.Random(seed)
    span = chance.choice([4, 60, 10**6])
    some = [put(chance.choice([b"c", b"d"]), b"%06d" % chance.randrange(span), b"%d" % at) for at in range(size)]
    return [place for row in some for place in row]


def many_rows(seed: int, size: int) -> Group:
    """Return as many rows with an end, one in four without."""
    chance = random.Random(seed)
    places = many_puts(seed, size)
    some = zip(places[::3], places[1::3], places[2::3], strict=True)
    return group(*[SetRow(*row, chance.choice([None, chance.randrange(1, 40), 20, 21])) for row in some])


messages = choice(puts, puts, rows, reads, pages, drops, swaps, batches, runs, st.builds(Barrier, st.just(False)))
groups = choice(
    st.lists(choice(puts, batches), min_size=2, max_size=6).map(lambda items: group(*items)),
    st.lists(choice(checked, checked, puts, reads), min_size=2, max_size=6).map(lambda items: group(*items)),
    st.lists(choice(rows, swaps, reads, pages, runs), min_size=2, max_size=12).map(lambda items: group(*items)),
    st.lists(choice(rows, swaps, swaps), min_size=4, max_size=12).map(lambda items: group(*items)),
    st.lists(messages, min_size=2, max_size=12).map(lambda items: group(*items)),
    st.lists(puts, min_size=1, max_size=12).map(lambda items: group(*items)),
    st.builds(many_puts, st.integers(0, 2**16), st.integers(1, 340)),
    st.builds(many_rows, st.integers(0, 2**16), st.integers(1, 340)),
    st.tuples(st.builds(many_puts, st.integers(0, 2**16), st.integers(60, 130)), st.lists(messages, max_size=6)).map(
        lambda both: both[0] + group(*both[1]) + both[0][: 3 * 65]
    ),
)
waits = st.builds(Wait, st.integers(0, 12))
reaps = st.builds(Reap, st.sampled_from([0, 1, 3, 1000]))
ending = st.lists(rows, min_size=2, max_size=8).map(lambda items: group(*items))
step = choice(groups, groups, groups, waits, reaps, reads, pages, st.just(REOPEN), st.tuples(categories, keys))
steps = st.lists(
    choice(st.tuples(step), st.tuples(step), st.tuples(ending, waits, groups, waits, reaps)), min_size=1, max_size=9
).map(lambda some: list(itertools.chain(*some)))
kept = st.builds(
    lambda max_bytes, feed_changes_max: StoreOptions(max_bytes=max_bytes, feed_changes_max=feed_changes_max),
    max_bytes=st.sampled_from([None, None, 12, 200, 1000]),
    feed_changes_max=st.sampled_from([0, 3, 40, 10_000]),
)


def plain(outcome: Any) -> Any:
    """Return an outcome in a form that compares: an error as its parts."""
    if not isinstance(outcome, Failed):
        return type(outcome), outcome
    match outcome.error:
        case Conflict() as error:
            return "conflict", error.key, error.expected, error.actual
        case QuotaExceeded() as error:
            return "refused", error.used, error.limit
        case FeedTruncated() as error:
            return "truncated", error.oldest
        case error:
            assert isinstance(error, (Misuse, Stop)), outcome
            return type(error).__name__, ()


def aimed(places: Group, model: Store, now_ms: int) -> Group:
    """Turn every other expectation of a group's batches into one that holds before the group."""
    for message in places[1::3]:
        if hasattr(message, "items"):
            for at in range(1, len(message.items), 3):
                item = message.items[at]
                if isinstance(item, Expect) and item.version is not None and item.version % 2:
                    row = model.read(GetEntry(item.category, item.key), now_ms)
                    message.items[at] = item._replace(version=row and row.version)
    return places


numbers = itertools.count()


class Pair:
    """A store of SQLite's or PostgreSQL's and one in memory, which are told the same."""

    def __init__(self, root: Root, options: StoreOptions) -> None:
        self.root, self.options, self.job_id = root, options, f"job{next(numbers)}"
        self.now_ms = NOW_MS
        self.model: MemoryStore = MemoryRoot().open(self.job_id, options)
        self.store: Store = root.open(self.job_id, options)

    def take(self, step: Any) -> None:
        """Do one step with both and compare what they say."""
        now_ms, store, model = self.now_ms, self.store, self.model
        if step == REOPEN:
            store.close()
            self.store = self.root.open(self.job_id, self.options)
        elif isinstance(step, Wait):
            self.now_ms += step.ms
        elif isinstance(step, list):
            places = aimed(step, model, now_ms)
            outcomes = [plain(outcome) for outcome in store.apply(places, now_ms)]
            assert outcomes == [plain(outcome) for outcome in model.apply(places, now_ms)]
        elif isinstance(step, Reap):
            count = store.reap(now_ms, step.limit)
            assert count == model.reap(now_ms, step.limit)
            if count < step.limit:
                assert store.next_expiry_ms is None or store.next_expiry_ms > now_ms
                assert (store.next_expiry_ms is None) == (model.next_expiry_ms is None)
        elif type(step) is tuple:
            assert store.get(*step, now_ms) == model.get(*step, now_ms)
        else:
            assert plain(store.read(step, now_ms)) == plain(model.read(step, now_ms))

    def compare(self) -> None:
        """Compare what both say about themselves."""
        assert self.store.status().last_version == self.model.status().last_version
        if self.model.next_expiry_ms is not None:  # the model's is exact
            assert self.store.next_expiry_ms is not None
            assert self.store.next_expiry_ms <= self.model.next_expiry_ms

    def compare_all(self) -> None:
        """Compare all that can be read, now and once everything has ended."""
        for _ in range(2):
            self.take(ListCategories())
            for name, kept in dump(self.model, self.now_ms).items():
                self.take(ListEntries(name))  # all rows at once: a question for each of hundreds costs too much
                self.take(ScanRange(name, b"", None))
                for row in kept[:8]:
                    self.take(GetEntry(name, row.key))
            recent = max(0, self.model.status().last_version - 2)
            for read in (UsedBytes(), ListChanges(0, 10**6), ListChanges(recent, 9)):
                self.take(read)
            self.now_ms += 1000
            self.take(Reap(10**6))


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=steps, options=kept)
def test_both_adapters_answer_alike(root: DirectoryRoot, script: list[Any], options: StoreOptions) -> None:
    """Any script of groups, reads and reaps gives the same in both adapters, whatever is kept, across reopenings."""
    mirror(root, script, options)


@pytest.fixture(scope="module")
def server() -> PostgresRoot:
    """A root on the session's server."""
    return PostgresRoot(parsed(fresh_url()))


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=steps, options=kept)
def test_postgresql_answers_alike(server: PostgresRoot, script: list[Any], options: StoreOptions) -> None:
    """The same over PostgreSQL."""
    mirror(server, script, options)


def mirror(root: Root, script: list[Any], options: StoreOptions) -> None:
    """Tell a script to a store of a root and to the model, and compare all they say."""
    pair = Pair(root, options)
    try:
        for step in script:
            pair.take(step)
            pair.compare()
        pair.compare_all()
    finally:
        pair.store.close()
    root.drop(pair.job_id)


SEEN = ("conflict", "expected", "sorted", "reopened", "mixed", "ended", "refused", "truncated", "Stop", "swapped")
SEEN += ("touched", "reaped", "expire")


def test_the_scripts_reach_what_they_should() -> None:
    """The random scripts hold what each rule is about, from conflicts to rows that ended and were told."""
    seen = dict.fromkeys(SEEN, 0)

    @settings(max_examples=300, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(script=steps, options=kept)
    def look(script: list[Any], options: StoreOptions) -> None:
        model, now_ms = MemoryRoot().open("job", options), NOW_MS
        for step in script:
            seen["reopened"] += step == REOPEN
            if isinstance(step, Wait):
                before = dump(model, now_ms)
                now_ms += step.ms
                seen["ended"] += before != dump(model, now_ms)
            elif isinstance(step, Reap):
                version = model.status().last_version
                seen["reaped"] += bool(model.reap(now_ms, step.limit))
                seen["expire"] += model.status().last_version > version
            elif isinstance(step, ListChanges):
                seen["truncated"] += plain(model.read(step, now_ms))[0] == "truncated"
            elif isinstance(step, list):
                seen["sorted"] += len(step) >= 3 * 64
                seen["mixed"] += None in step[::3] and len(step) >= 9
                outcomes = model.apply(aimed(step, model, now_ms), now_ms)
                kinds = {plain(outcome)[0] for outcome in outcomes}
                for kind in ("conflict", "refused", "truncated", "Stop"):
                    seen[kind] += kind in kinds
                for message, outcome in zip(step[1::3], outcomes, strict=True):
                    seen["expected"] += getattr(message, "expects", False) and not isinstance(outcome, Failed)
                    seen["swapped"] += isinstance(message, SwapRow) and outcome is True
                    seen["touched"] += isinstance(message, TouchRow) and outcome is True

    look()
    assert all(count >= 5 for count in seen.values()), seen
