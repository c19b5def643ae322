"""Every adapter passes the conformance suite, and the suite catches adapters that don't deserve to."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from persistency.errors import FeedTruncated
from persistency.storage import table
from persistency.storage.directory import DirectoryRoot
from persistency.storage.memory import MemoryRoot, MemoryStore
from persistency.storage.port import (
    PLACES,
    Batch,
    CountRange,
    DropRange,
    DropRow,
    Durability,
    Expect,
    Failed,
    GetRow,
    GetRows,
    LastVersion,
    ListCategories,
    ListChanges,
    ListEntries,
    Run,
    ScanRange,
    SetRow,
    Store,
    StoreOptions,
    SwapRow,
    TouchRow,
    UsedBytes,
)
from persistency.testing import NOW_MS, StoreConformance, check_store
from persistency.testing.reopening import ReopenChecks
from tests.postgres import postgres_url
from tests.storage.conftest import run_child


class TestMemory(StoreConformance):
    """The memory adapter conforms."""

    def open_store(self, options: StoreOptions) -> Store:
        return MemoryRoot().open("conformance", options)


class TestDirectory(StoreConformance):
    """The SQLite adapter conforms."""

    durability: Durability = "process"

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.root = DirectoryRoot(tmp_path / "root")
        self.opened = 0

    def open_store(self, options: StoreOptions) -> Store:
        self.opened += 1
        return self.reopen_store(options)

    def reopen_store(self, options: StoreOptions) -> Store:
        return self.root.open(f"job{self.opened}", options._replace(durability=self.durability))


class TestPostgres(StoreConformance):
    """The PostgreSQL adapter conforms."""

    durability: Durability = "process"

    @pytest.fixture(autouse=True)
    def _place(self) -> None:
        from persistency.storage.postgres.address import parsed
        from persistency.storage.postgres.root import PostgresRoot

        self.root = PostgresRoot(parsed(postgres_url()))
        self.name = secrets.token_hex(8)
        self.opened = 0

    def open_store(self, options: StoreOptions) -> Store:
        self.opened += 1
        return self.reopen_store(options)

    def reopen_store(self, options: StoreOptions) -> Store:
        return self.root.open(f"{self.name}.{self.opened}", options._replace(durability=self.durability))


class TestPostgresWithPower(TestPostgres):
    """The PostgreSQL adapter conforms when every group is synced."""

    durability = "power"


class TestDirectoryWithPower(TestDirectory):
    """The SQLite adapter conforms when every group is synced."""

    durability = "power"


class TestDirectoryWithoutArrays(TestDirectory):
    """The SQLite adapter conforms where SQLite was built without array arguments."""

    @pytest.fixture(autouse=True)
    def _without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(table, "_CARRAY", False, raising=False)


def test_the_suite_runs_without_pytest() -> None:
    """The suite can be used where pytest isn't imported, as a function that names what it checked."""
    code = """
import json, sys
from persistency.testing import check_store
from persistency.storage.memory import MemoryRoot
names = check_store(lambda options: MemoryRoot().open("j", options))
print(json.dumps([names, "pytest" in sys.modules]))
"""
    child = run_child(code)
    assert child.returncode == 0, child.stderr
    names, pytest_imported = json.loads(child.stdout)
    assert names == [name for name in dir(StoreConformance) if name.startswith("test_")]
    assert len(names) >= 65
    assert not pytest_imported


def test_the_suite_must_be_told_how_to_open() -> None:
    """A suite that doesn't say how a store is opened says what is missing."""
    with pytest.raises(NotImplementedError, match="open_store"):
        StoreConformance().test_barriers()


def _each_with(change: Callable[[MemoryStore, Any], Any]) -> type[MemoryStore]:
    """Return a memory adapter whose answers to messages `change` may replace (`NotImplemented`: unchanged)."""

    class Changed(MemoryStore):
        def __init__(self, options: StoreOptions) -> None:
            super().__init__(options)
            for kind, answer in list(self._answers.items()):
                self._answers[kind] = lambda message, answer=answer: self._changed(message, answer)

        def _changed(self, message: Any, answer: Callable[[Any], Any]) -> Any:
            changed = change(self, message)
            return answer(message) if changed is NotImplemented else changed

        def scan(self, span: ScanRange, now_ms: int) -> list[tuple[bytes, bytes]]:
            rows: list[tuple[bytes, bytes]] = self.read(span, now_ms)
            return rows

    return Changed


def _undone_late(store: MemoryStore, message: Any) -> Any:
    """A batch that fails has already taken its versions."""
    if isinstance(message, Batch) and isinstance(outcome := store._batch(message), Failed):
        store._version += message.ops
        return outcome
    return NotImplemented


def _half_applied(store: MemoryStore, message: Any) -> Any:
    """A batch that fails has applied its puts."""
    if isinstance(message, Batch) and isinstance(outcome := store._batch(message), Failed):
        for at in range(0, len(message.items), PLACES):
            if message.items[at] is not None:
                store._put(*message.items[at : at + PLACES])
        return outcome
    return NotImplemented


def _looks_late(store: MemoryStore, message: Any) -> Any:
    """An `Expect` looks at the state after its batch's earlier operations."""
    if isinstance(message, Batch) and message.expects:
        for at in range(0, len(message.items), PLACES):
            item = message.items[at : at + PLACES]
            outcome = store._batch(Batch(item, 1, isinstance(item[1], Expect)))
            if isinstance(outcome, Failed):
                return outcome
        return store._version
    return NotImplemented


def _touched_anew(store: MemoryStore, touch: TouchRow) -> bool:
    row = store._table.row(touch.category, touch.key)
    return row is not None and store._write(touch.category, touch.key, row[0], touch.expires_ms) is None


def _run_not_undone(store: MemoryStore, run: Run) -> Any:
    """A run that raises leaves its writes."""
    raised: list[BaseException] = []

    def fn(within: Any) -> Any:
        try:
            return run.fn(within)
        except BaseException as error:
            raised.append(error)

    outcome = store._run(Run(fn))
    return Failed(raised[0]) if raised else outcome


def _run_keeps_versions(store: MemoryStore, run: Run) -> Any:
    """A run that raises is undone but for the versions it took."""
    versions: list[int] = []

    def fn(within: Any) -> Any:
        try:
            return run.fn(within)
        finally:
            versions.append(within.version)

    outcome = store._run(Run(fn))
    store._version = versions[0]
    return outcome


def _gap_passed_over(store: MemoryStore, ask: ListChanges) -> Any:
    """Changes that are gone are passed over in silence."""
    outcome = store._list_changes(ask)
    if isinstance(outcome, Failed) and isinstance(outcome.error, FeedTruncated):
        return store._list_changes(ask._replace(after=outcome.error.oldest - 1))
    return outcome


def _swap_takes_version(store: MemoryStore, swap: SwapRow) -> Any:
    outcome = store._swap_row(swap)
    store._version += outcome is False
    return outcome


def _touch_told(store: MemoryStore, touch: TouchRow) -> bool:
    done = store._touch_row(touch)
    store._accounts.tell(store._version, "put", touch.category, touch.key)
    return done


def _removal_of_nothing_told(store: MemoryStore, drop: DropRow) -> bool:
    done = store._drop_row(drop)
    if not done:
        store._accounts.tell(store._version, "delete", drop.category, drop.key)
    return done


def _when(kind: type, answer: Callable[[MemoryStore, Any], Any]) -> Callable[[MemoryStore, Any], Any]:
    return lambda store, message: answer(store, message) if isinstance(message, kind) else NotImplemented


# Answers that are wrong, by what is wrong with them.
ANSWERS: dict[str, Callable[[MemoryStore, Any], Any]] = {
    "a failed batch takes versions": _undone_late,
    "a failed batch is half applied": _half_applied,
    "an expectation looks late": _looks_late,
    "expectations always hold": _when(Batch, lambda store, batch: store._batch(batch._replace(expects=False))),
    "a batch answers its size": _when(Batch, lambda store, batch: (store._batch(batch), batch.ops)[1]),
    "a removal always says it was there": _when(DropRow, lambda store, drop: store._drop_row(drop) or True),
    "a removal takes no version": _when(
        DropRow, lambda store, drop: (store._drop_row(drop), setattr(store, "_version", store._version - 1))[0]
    ),
    "a range removal includes its end": _when(
        DropRange, lambda store, span: store._drop_range(span._replace(stop=span.stop and span.stop + b"\0"))
    ),
    "a range removal counts nothing": _when(DropRange, lambda store, span: (store._drop_range(span), 0)[1]),
    "the start isn't in the range": _when(
        ScanRange, lambda store, span: store._table.scan(span._replace(start=span.start + b"\0"))
    ),
    "the stop is in the range": _when(
        ScanRange, lambda store, span: store._table.scan(span._replace(stop=span.stop and span.stop + b"\0"))
    ),
    "the limit is one too many": _when(
        ScanRange, lambda store, span: store._table.scan(span._replace(limit=span.limit and span.limit + 1))
    ),
    "no limit of zero": _when(
        ScanRange, lambda store, span: store._table.scan(span._replace(limit=span.limit or None))
    ),
    "the limit counts from the other end": _when(
        ScanRange, lambda store, span: store._table.scan(span._replace(limit=None))[-(span.limit or 0) :]
    ),
    "reverse is ignored": _when(ScanRange, lambda store, span: store._table.scan(span._replace(reverse=False))),
    "payloads come uninvited": _when(ScanRange, lambda store, span: store._table.scan(span._replace(keys_only=False))),
    "the count ignores the stop": _when(CountRange, lambda store, span: store._table._count(span._replace(stop=None))),
    "an empty payload is no row": _when(GetRow, lambda store, get: store._table.payload(*get) or None),
    "many keys come sorted": _when(GetRows, lambda store, get: sorted(store._table._get_rows(get))),
    "many keys come once": _when(GetRows, lambda store, get: list(dict(store._table._get_rows(get)).items())),
    "categories come unsorted": _when(ListCategories, lambda store, _: list(store._table.categories)),
    "categories stay when they are empty": _when(ListCategories, lambda store, _: sorted(store._table.categories)),
    "the version is one behind": _when(LastVersion, lambda store, _: store._version - 1),
    "rows have no end": _when(SetRow, lambda store, row: store._write(*row[:3], None)),
    "a row that comes too late isn't stored": _when(
        SetRow,
        lambda store, row: (
            None if row.expires_ms is not None and row.expires_ms <= store._table.now_ms else store._write(*row[:4])
        ),
    ),
    "entries come by key": _when(ListEntries, lambda store, ask: sorted(store._table._list_entries(ask))),
    "a swap always comes to pass": _when(
        SwapRow,
        lambda store, swap: store._swap_row(swap._replace(expected=store._table.payload(swap.category, swap.key))),
    ),
    "a swap that doesn't come to pass takes a version": _when(SwapRow, _swap_takes_version),
    "a swap takes an empty payload for no row": _when(
        SwapRow, lambda store, swap: store._swap_row(swap._replace(payload=swap.payload or None))
    ),
    "a swapped row has no end": _when(SwapRow, lambda store, swap: store._swap_row(swap._replace(expires_ms=None))),
    "a touch says it was there": _when(TouchRow, lambda store, touch: store._touch_row(touch) or True),
    "a touch takes no end away": _when(
        TouchRow, lambda store, touch: store._touch_row(touch._replace(expires_ms=touch.expires_ms or 2**60))
    ),
    "a touch changes the row's version": _when(TouchRow, _touched_anew),
    "a touch is a change": _when(TouchRow, _touch_told),
    "a removal of nothing is a change": _when(DropRow, _removal_of_nothing_told),
    "a run that raises isn't undone": _when(Run, _run_not_undone),
    "a run that raises keeps its versions": _when(Run, _run_keeps_versions),
    "a run takes a version of its own": _when(
        Run, lambda store, run: (store._run(run), setattr(store, "_version", store._version + 1))[0]
    ),
    "a run answers nothing": _when(
        Run, lambda store, run: outcome if isinstance(outcome := store._run(run), Failed) else None
    ),
    "rows that have ended use bytes": _when(
        UsedBytes,
        lambda store, _: sum(len(row[0]) for each in store._table.categories.values() for row in each.rows.values()),
    ),
    "the limit of changes is one too many": _when(
        ListChanges, lambda store, ask: store._list_changes(ask._replace(limit=ask.limit + 1))
    ),
    "changes begin one too early": _when(
        ListChanges, lambda store, ask: store._list_changes(ask._replace(after=ask.after - 1))
    ),
    "changes that are gone are passed over": _when(ListChanges, _gap_passed_over),
}


def _with_options(change: Callable[[StoreOptions], StoreOptions]) -> dict[str, Any]:
    return {"__init__": lambda self, options: MemoryStore.__init__(self, change(options))}


def _settling(change: Callable[[MemoryStore], int | None]) -> dict[str, Any]:
    def settle(store: MemoryStore) -> None:
        before = store.next_expiry_ms
        MemoryStore._settle(store)
        store.next_expiry_ms = change(store) if store.next_expiry_ms is not None else before and change(store)

    return {"_settle": settle}


def _keeps_what_it_undoes(store: MemoryStore, mark: Any) -> None:
    """What is undone still uses bytes."""
    used = store._accounts.used
    MemoryStore._take_back(store, mark)
    store._accounts.used = used


def _tells_what_it_undoes(store: MemoryStore, mark: Any) -> None:
    """The changes of what is undone stay."""
    every = store._accounts.changes
    told = [] if every is None else every._changes[mark.accounts.changes :]
    MemoryStore._take_back(store, mark)
    for change in told:
        store._accounts.tell(*change)


def _reaps_in_silence(store: MemoryStore, limit: int) -> list[Any]:
    """Reaping is no change."""
    version, changes = store._version, store._accounts.changes
    store._accounts.changes = None
    try:
        return MemoryStore._reap(store, limit)
    finally:
        store._version, store._accounts.changes = version, changes


# Methods that are wrong, by what is wrong with them.
METHODS: dict[str, dict[str, Any]] = {
    "nobody minds the quota": _with_options(lambda options: options._replace(max_bytes=None)),
    "the quota is a byte less": _with_options(
        lambda options: options._replace(max_bytes=options.max_bytes and options.max_bytes - 1)
    ),
    "one change too many is kept": _with_options(
        lambda options: options._replace(feed_changes_max=options.feed_changes_max and options.feed_changes_max + 1)
    ),
    "batches and runs have no quota": {"_refusal": lambda _self, _limit, _mark: None},
    "what is undone still uses bytes": {"_take_back": _keeps_what_it_undoes},
    "what is undone is still told": {"_take_back": _tells_what_it_undoes},
    "a run may do anything": {"_do": lambda self, message: self._answers[type(message)](message)},
    "a reap has no limit": {"_reap": lambda self, _limit: MemoryStore._reap(self, 10**9)},
    "a reap is told to nobody": {"_reap": _reaps_in_silence},
    "a reap takes versions": {
        "_reap": lambda self, limit: (
            found := MemoryStore._reap(self, limit),
            setattr(self, "_version", self._version + (self._accounts.changes is None) * len(found)),
        )[0]
    },
    "the next end is late": _settling(lambda store: None if store.next_expiry_ms is None else store.next_expiry_ms + 1),
    "the next end stays": _settling(lambda store: store.next_expiry_ms or NOW_MS),
    "time is not remembered": {"status": lambda self: MemoryStore.status(self)._replace(latest_ms=0)},
    "a point read sees rows that have ended": {
        "get": lambda self, category, key, _now_ms: self._table.of(category).rows.get(key, (None,))[0]
    },
}
BROKEN = {name: _each_with(change) for name, change in ANSWERS.items()}
BROKEN |= {name: type("Broken", (MemoryStore,), methods) for name, methods in METHODS.items()}


@pytest.fixture(params=BROKEN)
def broken(request: pytest.FixtureRequest) -> Callable[[StoreOptions], Store]:
    """An adapter with one thing wrong with it."""
    return BROKEN[request.param]


def test_the_suite_catches_a_broken_adapter(broken: Callable[[StoreOptions], Store]) -> None:
    """An adapter with one wrong answer fails at least one check, with an `AssertionError` that says which."""
    with pytest.raises(AssertionError, match="expected"):
        check_store(broken)


def test_the_suite_passes_an_unchanged_adapter() -> None:
    """The adapters above fail for what is wrong with them, not for how they are made."""
    check_store(_each_with(lambda _store, _message: NotImplemented))


@pytest.mark.parametrize("name", [name for name in vars(ReopenChecks) if name.startswith("test_")])
def test_the_suite_catches_a_store_that_forgets(name: str) -> None:
    """An adapter that says its rows outlive a store, and comes back without them, fails every check of that."""
    with pytest.raises(AssertionError, match="expected"):
        check_store(MemoryStore, MemoryStore, [name])
