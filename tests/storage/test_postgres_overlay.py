"""What a group has changed and not sent yet, as its own reads see it over what the server has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from persistency.storage.port import (
    CountRange,
    DropRange,
    DropRow,
    Failed,
    GetRow,
    ListRows,
    Run,
    ScanRange,
    StoreOptions,
    Within,
)
from persistency.storage.postgres.address import parsed
from persistency.storage.postgres.root import PostgresRoot
from persistency.storage.postgres.store import PostgresStore
from persistency.testing import group, put
from tests.postgres import fresh_url

NOW_MS = 1_000_000
ALL = ScanRange(b"c", b"", None)


@pytest.fixture
def store() -> Iterator[PostgresStore]:
    """A store with the rows a to e, each with its key for a payload."""
    store = PostgresRoot(parsed(fresh_url())).open("j", StoreOptions())
    assert isinstance(store, PostgresStore)
    store.apply(group(*[put(b"c", key, key) for key in (b"a", b"b", b"c", b"d", b"e")]), NOW_MS)
    yield store
    store.close()


def test_a_range_has_what_was_written_behind_the_last_look(store: PostgresStore) -> None:
    """A row that comes after a range was read is in the next one, in its place, whatever order they are written in."""
    messages = group(
        put(b"c", b"y", b"1"), ALL, put(b"c", b"aa", b"2"), ScanRange(b"c", b"aa", b"b"), put(b"c", b"x", b"3"),
        CountRange(b"c", b"aa", b"b"), ALL, DropRange(b"c", b"", b"b"), ALL,
    )  # fmt: skip
    outcomes = store.apply(messages, NOW_MS)
    assert outcomes[3] == [(b"aa", b"2")]
    assert outcomes[5] == 1
    assert [key for key, _ in outcomes[6]] == [b"a", b"aa", b"b", b"c", b"d", b"e", b"x", b"y"]
    assert [key for key, _ in outcomes[8]] == [b"b", b"c", b"d", b"e", b"x", b"y"]
    assert store.read(ALL, NOW_MS) == outcomes[8]


@pytest.mark.parametrize("first", [False, True])
def test_a_range_that_is_taken_back_hides_nothing(store: PostgresStore, first: bool) -> None:
    """Rows dropped by a run that fails are there again, for the group's other messages too; those dropped before
    it aren't.
    """

    def fails(within: Within) -> None:
        within.do(DropRange(b"c", b"b", None))
        assert within.do(GetRow(b"c", b"b")) is None
        raise ValueError("no")

    before = [DropRange(b"c", b"", b"b")] if first else []
    left = [b"b", b"c", b"d", b"e"] if first else [b"a", b"b", b"c", b"d", b"e"]
    outcomes = store.apply(group(*before, Run(fails), GetRow(b"c", b"b"), GetRow(b"c", b"a"), ALL), NOW_MS)[first:]
    assert isinstance(outcomes[0], Failed)
    assert outcomes[1:3] == [b"b", None if first else b"a"]
    assert [key for key, _ in outcomes[3]] == left
    assert [key for key, _ in store.read(ALL, NOW_MS)] == left


def test_a_limit_counts_what_is_left(store: PostgresStore) -> None:
    """Rows that a group has dropped take no room in a range that is read up to so many."""
    reads = [
        ScanRange(b"c", b"", None, limit=2),
        ScanRange(b"c", b"", None, limit=2, reverse=True),
        ListRows(b"c", b"", 2, 10**6),
    ]
    drops = [DropRow(b"c", key) for key in (b"a", b"b", b"e")]
    outcomes = store.apply(group(*drops, *reads), NOW_MS)
    assert [key for key, _ in outcomes[3]] == [b"c", b"d"]
    assert [key for key, _ in outcomes[4]] == [b"d", b"c"]
    assert [row.key for row in outcomes[5]] == [b"c", b"d"]
