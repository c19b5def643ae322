"""The two adapters give the same answers, outcome by outcome, to random groups; the memory adapter is the model."""

from __future__ import annotations

import itertools
import random
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from persistency.errors import Conflict
from persistency.storage.directory import DirectoryRoot
from persistency.storage.memory import MemoryRoot
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
    ScanRange,
    Store,
    StoreOptions,
)
from persistency.testing import batch, dump, group, put

NOW_MS = 5
REOPEN = "close the store and open it again"
KEYS = [b"", b"\0", b"a", b"a\0", b"a\xff", b"b", b"\xff", b"\xff\xff"]

categories = st.sampled_from([b"c", b"d", b"\xff"])
keys = st.sampled_from(KEYS)
starts = st.sampled_from([*KEYS, b"a\0\0", b"\xfe"])
stops = st.one_of(st.none(), starts)
payloads = st.binary(max_size=6)
versions = st.one_of(st.none(), st.integers(0, 9))
limits = st.one_of(st.none(), st.integers(0, 9))

puts = st.builds(put, categories, keys, payloads)
drops = st.one_of(st.builds(DropRow, categories, keys), st.builds(DropRange, categories, starts, stops))
expects = st.builds(Expect, categories, keys, versions)
reads = st.one_of(
    st.builds(GetRow, categories, keys),
    st.builds(HasRow, categories, keys),
    st.builds(GetEntry, categories, keys),
    st.builds(GetRows, categories, st.lists(keys, max_size=5).map(tuple)),
    st.builds(ScanRange, categories, starts, stops, st.booleans(), limits, st.booleans()),
    st.builds(CountRange, categories, starts, stops),
    st.builds(ListCategories),
    st.builds(LastVersion),
)
# Half of the expectations are aimed at what is really there, when the group is made: see `aimed`.
checked = st.lists(st.one_of(puts, drops, expects), min_size=1, max_size=6).map(lambda items: batch(*items))
batches = st.one_of(st.lists(puts, max_size=5).map(lambda items: batch(*items)), checked, checked)


def many_puts(seed: int, size: int) -> Group:
    """Return so many puts that they are sorted and written many to a statement, as one message list."""
    chance = random.Random(seed)
    span = chance.choice([4, 60, 10**6])
    rows = [put(chance.choice([b"c", b"d"]), b"%06d" % chance.randrange(span), b"%d" % at) for at in range(size)]
    return [place for row in rows for place in row]


messages = st.one_of(puts, puts, reads, drops, batches, st.builds(Barrier, st.just(False)))
groups = st.one_of(
    st.lists(st.one_of(puts, batches), min_size=2, max_size=6).map(lambda items: group(*items)),
    st.lists(st.one_of(checked, checked, puts, reads), min_size=2, max_size=6).map(lambda items: group(*items)),
    st.lists(messages, min_size=2, max_size=12).map(lambda items: group(*items)),
    st.lists(puts, min_size=1, max_size=12).map(lambda items: group(*items)),
    st.builds(many_puts, st.integers(0, 2**16), st.integers(1, 340)),
    st.tuples(st.builds(many_puts, st.integers(0, 2**16), st.integers(60, 130)), st.lists(messages, max_size=6)).map(
        lambda both: both[0] + group(*both[1]) + both[0][: 3 * 65]
    ),
)
others = st.one_of(reads, st.just(REOPEN), st.tuples(categories, keys))
steps = st.lists(st.one_of(groups, groups, others), min_size=1, max_size=12)


def plain(outcome: Any) -> Any:
    """Return an outcome in a form that compares: a conflict as its parts."""
    if isinstance(outcome, Failed):
        assert isinstance(outcome.error, Conflict), outcome
        return "conflict", outcome.error.key, outcome.error.expected, outcome.error.actual
    return type(outcome), outcome


def aimed(places: Group, model: Store) -> Group:
    """Turn every other expectation of a group's batches into one that holds before the group."""
    for message in places[1::3]:
        if hasattr(message, "items"):
            for at in range(1, len(message.items), 3):
                item = message.items[at]
                if isinstance(item, Expect) and item.version is not None and item.version % 2:
                    row = model.read(GetEntry(item.category, item.key), NOW_MS)
                    message.items[at] = item._replace(version=row and row.version)
    return places


numbers = itertools.count()


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(script=steps)
def test_both_adapters_answer_alike(root: DirectoryRoot, script: list[Any]) -> None:
    """Any script of groups and reads gives the same outcomes, rows and versions in both adapters, across reopenings."""
    job_id = f"job{next(numbers)}"
    model = MemoryRoot().open(job_id, StoreOptions())
    store: Store = root.open(job_id, StoreOptions())
    try:
        for step in script:
            if step == REOPEN:
                store.close()
                store = root.open(job_id, StoreOptions())
            elif isinstance(step, list):
                places = aimed(step, model)
                outcomes = [plain(outcome) for outcome in store.apply(places, NOW_MS)]
                assert outcomes == [plain(outcome) for outcome in model.apply(places, NOW_MS)]
            elif type(step) is tuple:
                assert store.get(*step, NOW_MS) == model.get(*step, NOW_MS)
            else:
                assert plain(store.read(step, NOW_MS)) == plain(model.read(step, NOW_MS))
            assert store.status().last_version == model.status().last_version
        assert dump(store, NOW_MS) == dump(model, NOW_MS)
    finally:
        store.close()
    root.drop(job_id)


def test_the_scripts_reach_what_they_should() -> None:
    """The random scripts hold conflicts, batches that pass their expectations, big groups and reopenings."""
    seen = dict.fromkeys(["conflict", "expected", "sorted", "reopened", "mixed"], 0)

    @settings(max_examples=200, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(script=steps)
    def look(script: list[Any]) -> None:
        model = MemoryRoot().open("job", StoreOptions())
        for step in script:
            seen["reopened"] += step == REOPEN
            if isinstance(step, list):
                seen["sorted"] += len(step) >= 3 * 64
                seen["mixed"] += None in step[::3] and len(step) >= 9
                outcomes = model.apply(aimed(step, model), NOW_MS)
                seen["conflict"] += any(isinstance(outcome, Failed) for outcome in outcomes)
                for message, outcome in zip(step[1::3], outcomes, strict=True):
                    seen["expected"] += getattr(message, "expects", False) and not isinstance(outcome, Failed)

    look()
    assert all(count >= 5 for count in seen.values()), seen
