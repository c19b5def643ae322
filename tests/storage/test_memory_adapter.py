"""The memory adapter by itself: interrupted anywhere it is as it was, and it keeps no more accounts than it must."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest

from persistency.storage.memory import MemoryRoot, MemoryStore
from persistency.storage.memory_rows import Accounts, Changes, Ends, Rows
from persistency.storage.port import (
    DropRange,
    DropRow,
    Failed,
    GetRow,
    ListChanges,
    ListEntries,
    Run,
    ScanRange,
    SetRow,
    StoreOptions,
    SwapRow,
    TouchRow,
    UsedBytes,
)
from persistency.testing import NOW_MS, batch, dump, group, put

# The steps of each action, each of which an interrupt may come before or after.
WRITING = [(Rows, "put"), (Rows, "remove"), (Ends, "add"), (Ends, "advance"), (Ends, "first_ms"), (Changes, "add")]
WRITING += [(Changes, "trim"), (Accounts, "tell"), (Accounts, "counted"), (MemoryStore, "_settle")]
REAPING = [(Rows, "remove"), (Ends, "advance"), (Ends, "take"), (Ends, "first_ms"), (Changes, "add"), (Changes, "trim")]
STEPS = [("a group", *place) for place in WRITING] + [("a reap", *place) for place in REAPING]
ALL_KINDS = StoreOptions(max_bytes=100, feed_changes_max=5)
END_MS = NOW_MS + 10


def opened(options: StoreOptions) -> MemoryStore:
    """Return a store with rows of all sorts, some of which have ended at `END_MS`."""
    store = MemoryRoot().open("job", options)
    rows = [SetRow(b"c", b"%d" % at, b"x" * at, END_MS + at - 4) for at in range(9)]
    store.apply(group(*rows, put(b"c", b"plain", b"1"), put(b"d", b"plain", b"2")), NOW_MS)
    return store


def busy() -> list[Any]:
    """Return a group in which everything is changed, and much of it more than once."""
    messages = [put(b"c", b"8", b"put"), SetRow(b"c", b"new", b"set", END_MS + 50), DropRow(b"c", b"7")]
    messages += [SwapRow(b"c", b"plain", b"1", b"swapped", END_MS + 1), TouchRow(b"d", b"plain", END_MS + 2)]
    messages += [batch(put(b"e", b"1", b"1"), SetRow(b"c", b"8", b"22", END_MS + 3), DropRow(b"d", b"plain"))]
    messages += [put(b"c", b"7", b"again"), DropRange(b"c", b"4", b"7"), SwapRow(b"c", b"8", b"22", None, None)]
    return group(*messages, SetRow(b"c", b"0", b"late", END_MS - 9))


def told(store: MemoryStore) -> list[Any]:
    """Return all that a store tells at `END_MS`."""
    reads = [UsedBytes(), ListChanges(6, 99), ListEntries(b"c"), ScanRange(b"c", b"", None), ScanRange(b"d", b"", None)]
    answers = [repr(store.read(read, END_MS)) for read in reads]  # errors compare by what they say
    return [store.status().last_version, dump(store, END_MS), *answers]


def interrupting(monkeypatch: pytest.MonkeyPatch, place: tuple[type, str], at: int, *, late: bool) -> None:
    """Interrupt the call number `at` of a method, before or (`late`) after it has done its work."""
    calls = itertools.count()
    method: Callable[..., Any] = getattr(*place)

    def interrupted(*arguments: Any, **more: Any) -> Any:
        mine = next(calls) == at
        if mine and not late:
            raise KeyboardInterrupt
        answer = method(*arguments, **more)
        if mine:
            raise KeyboardInterrupt
        return answer

    monkeypatch.setattr(*place, interrupted)


ACTIONS: dict[str, Callable[[MemoryStore], Any]] = {
    "a group": lambda store: store.apply(busy(), END_MS),
    "a reap": lambda store: store.reap(END_MS, 3),
}


@pytest.mark.parametrize(("action", "kind", "method"), STEPS)
def test_an_interrupted_group_was_never_there(
    monkeypatch: pytest.MonkeyPatch, action: str, kind: type, method: str
) -> None:
    """An interrupt at any step leaves rows, versions, bytes, changes and ends as they were for the next group."""
    act = ACTIONS[action]
    for at, late in itertools.product(range(1000), (False, True)):
        store, other = opened(ALL_KINDS), opened(ALL_KINDS)
        before = told(store)
        with monkeypatch.context() as patch:
            interrupting(patch, (kind, method), at, late=late)
            try:
                act(store)
            except KeyboardInterrupt:
                pass
            else:
                break  # it has fewer calls of this method
        assert told(store) == before
        assert store.next_expiry_ms == other.next_expiry_ms == END_MS - 4
        assert act(store) == act(other)
        assert told(store) == told(other)
        assert store.reap(END_MS + 99, 99) == other.reap(END_MS + 99, 99)
        assert store.next_expiry_ms is None
    assert 0 < at < 999


def test_an_interrupted_run_is_undone_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt inside a run is the run's own outcome; its neighbours stay."""
    run = Run(lambda within: [within.do(DropRow(b"c", b"8")), within.do(SetRow(b"c", b"plain", b"no", END_MS))])
    store, other = opened(ALL_KINDS), opened(ALL_KINDS)
    with monkeypatch.context() as patch:
        interrupting(patch, (Rows, "put"), 1, late=True)
        outcomes = store.apply(group(put(b"n", b"1", b""), run, put(b"n", b"2", b"")), NOW_MS)
    assert isinstance(outcomes[1], Failed)
    assert isinstance(outcomes[1].error, KeyboardInterrupt)
    other.apply(group(put(b"n", b"1", b""), put(b"n", b"2", b"")), NOW_MS)
    assert told(store) == told(other)


def test_a_job_without_ends_quota_and_feed_keeps_no_accounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody asked for a TTL, a quota or a feed, puts and removals pass none of what these take."""
    store = MemoryRoot().open("job", StoreOptions())

    def plain_writes() -> None:
        store.apply(group(put(b"c", b"k", b"1"), batch(put(b"c", b"k", b"2")), GetRow(b"c", b"k")), NOW_MS)

    with monkeypatch.context() as patch:
        for place in ((MemoryStore, "_write"), (MemoryStore, "_settle"), (Accounts, "advance"), (Accounts, "counted")):
            interrupting(patch, place, 0, late=False)
        plain_writes()
        assert store.reap(NOW_MS, 9) == 0
    store.apply(group(SetRow(b"c", b"k", b"3", END_MS)), NOW_MS)
    store.apply(group(put(b"c", b"k", b"4")), NOW_MS)
    with monkeypatch.context() as patch:
        interrupting(patch, (MemoryStore, "_write"), 0, late=False)
        plain_writes()  # no row has an end any more


def test_notes_of_ends_do_not_pile_up() -> None:
    """A row whose end is set again and again, and keys that come and go, leave nothing behind that grows."""
    store = MemoryRoot().open("job", ALL_KINDS)
    for at in range(300):
        rows = [SetRow(b"c", b"%d" % (key % 5), b"", END_MS + at + key) for key in range(20)]
        store.apply(group(*rows, put(b"c", b"n%d" % at, b""), DropRow(b"c", b"n%d" % at)), NOW_MS)
    ends, rows_of_c = store._accounts.ends, store._table.categories[b"c"]
    assert len(ends._coming) + len(ends._past) <= 64 + 20
    assert len(rows_of_c._fresh) + len(rows_of_c._gone) <= 200
    changes = store._accounts.changes
    assert changes is not None
    assert len(changes) <= 5 + 64 + 22
