"""Every adapter passes the conformance suite, and the suite catches adapters that don't deserve to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

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
    ScanRange,
    Store,
    StoreOptions,
)
from persistency.testing import StoreConformance, check_store
from tests.storage.conftest import run_child


class TestMemory(StoreConformance):
    """The memory adapter conforms."""

    def open_store(self) -> Store:
        return MemoryRoot().open("conformance", StoreOptions())


class TestDirectory(StoreConformance):
    """The SQLite adapter conforms."""

    durability: Durability = "process"

    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path) -> None:
        self.root = DirectoryRoot(tmp_path / "root")
        self.opened = 0

    def open_store(self) -> Store:
        self.opened += 1
        return self.reopen_store()

    def reopen_store(self) -> Store:
        return self.root.open(f"job{self.opened}", StoreOptions(self.durability))


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
from persistency.storage.port import StoreOptions
names = check_store(lambda: MemoryRoot().open("j", StoreOptions()))
print(json.dumps([names, "pytest" in sys.modules]))
"""
    child = run_child(code)
    assert child.returncode == 0, child.stderr
    names, pytest_imported = json.loads(child.stdout)
    assert names == [name for name in dir(StoreConformance) if name.startswith("test_")]
    assert len(names) >= 19
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


def _when(kind: type, answer: Callable[[MemoryStore, Any], Any]) -> Callable[[MemoryStore, Any], Any]:
    return lambda store, message: answer(store, message) if isinstance(message, kind) else NotImplemented


BROKEN: dict[str, Callable[[MemoryStore, Any], Any]] = {
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
        ScanRange, lambda store, span: store._scan(span._replace(start=span.start + b"\0"))
    ),
    "the stop is in the range": _when(
        ScanRange, lambda store, span: store._scan(span._replace(stop=span.stop and span.stop + b"\0"))
    ),
    "the limit is one too many": _when(
        ScanRange, lambda store, span: store._scan(span._replace(limit=span.limit and span.limit + 1))
    ),
    "no limit of zero": _when(ScanRange, lambda store, span: store._scan(span._replace(limit=span.limit or None))),
    "the limit counts from the other end": _when(
        ScanRange, lambda store, span: store._scan(span._replace(limit=None))[-(span.limit or 0) :]
    ),
    "reverse is ignored": _when(ScanRange, lambda store, span: store._scan(span._replace(reverse=False))),
    "payloads come uninvited": _when(ScanRange, lambda store, span: store._scan(span._replace(keys_only=False))),
    "the count ignores the stop": _when(CountRange, lambda store, span: store._count(span._replace(stop=None))),
    "an empty payload is no row": _when(GetRow, lambda store, get: store._get_row(get) or None),
    "many keys come sorted": _when(GetRows, lambda store, get: sorted(store._get_rows(get))),
    "many keys come once": _when(GetRows, lambda store, get: list(dict(store._get_rows(get)).items())),
    "categories come unsorted": _when(ListCategories, lambda store, _: list(store._categories)),
    "categories stay when they are empty": _when(ListCategories, lambda store, _: sorted(store._categories)),
    "the version is one behind": _when(LastVersion, lambda store, _: store._version - 1),
}


@pytest.fixture(params=BROKEN)
def broken(request: pytest.FixtureRequest) -> Iterator[type[MemoryStore]]:
    """An adapter with one thing wrong with it."""
    return _each_with(BROKEN[request.param])


def test_the_suite_catches_a_broken_adapter(broken: type[MemoryStore]) -> None:
    """An adapter with one wrong answer fails at least one check, with an `AssertionError` that says which."""
    with pytest.raises(AssertionError, match="expected"):
        check_store(lambda: broken(StoreOptions()))


def test_the_suite_passes_an_unchanged_adapter() -> None:
    """The adapters above fail for what is wrong with them, not for how they are made."""
    check_store(lambda: _each_with(lambda _store, _message: NotImplemented)(StoreOptions()))


def test_the_suite_catches_a_store_that_forgets() -> None:
    """An adapter that says its rows outlive a store, and comes back without them, fails."""
    with pytest.raises(AssertionError, match="after reopening"):
        check_store(lambda: MemoryStore(StoreOptions()), lambda: MemoryStore(StoreOptions()))
