"""Bulk: however a group is cut into statements, what is stored is what was posted, in the order it was posted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import apsw
import pytest

from persistency.storage import bulk
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import Group, SetRow, StoreOptions

MEASURED_ROWS = 40_000


def stored(place: Path, group: Group) -> tuple[Any, ...]:
    """Apply a group to a new file; return its rows, its changes, and the last version."""
    store = DirectoryRoot(place).open("a", StoreOptions(feed_changes_max=10_000))
    try:
        outcomes = store.apply(list(group), 1)
        rows = store._connection.execute("SELECT * FROM kv ORDER BY category, key").fetchall()
        changes = store._connection.execute("SELECT * FROM changes ORDER BY version").fetchall()
        return rows, changes, store.last_version, len(outcomes)
    finally:
        store.close()


def group_of(rng: random.Random, *, in_order: bool, categories: int, ends: bool) -> Group:
    """Return some hundred puts, some of the same keys, and some longer than a statement should be."""
    rows = []
    for number in range(700):
        at = number if in_order else rng.randrange(400)
        category = b"c%d" % rng.randrange(categories)
        end = rng.choice([None, 10**12, 10**12 + 1]) if ends else None
        rows.append((category, b"%06d" % at, rng.randbytes(rng.choice([0, 1, 30, 700])), end))
    group: Group = []
    for category, at, payload, end in rows:
        # A row with an end comes as a message.
        group += [category, at, payload] if end is None else [None, SetRow(category, at, payload, end), None]
    return group


@pytest.mark.parametrize("ends", [False, True], ids=["without ends", "with ends"])
@pytest.mark.parametrize("categories", [1, 3])
@pytest.mark.parametrize("in_order", [True, False], ids=["in order", "not in order"])
def test_however_a_group_is_cut_the_same_is_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_order: bool, categories: int, ends: bool
) -> None:
    """Promise 1: the later of equal keys wins, across statements and across what is sorted at once; versions too."""
    group = group_of(random.Random(7), in_order=in_order, categories=categories, ends=ends)
    with monkeypatch.context() as patch:
        patch.setattr("persistency.storage.table.CARRAY", False)  # a statement for each row
        expected = stored(tmp_path / "apart", group)
    assert expected[2] == 700
    for at_once, rows, nbytes in (
        (2**17, 4_096, 2**22),
        (2**17, 50, 2**22),
        (2**17, 4_096, 500),
        (97, 30, 500),
        (1, 1, 1),
    ):
        monkeypatch.setattr(bulk, "SORT_ROWS_MAX", at_once)
        monkeypatch.setattr(bulk, "TOGETHER_ROWS_MAX", rows)
        monkeypatch.setattr(bulk, "TOGETHER_BYTES_MAX", nbytes)
        assert stored(tmp_path / f"{at_once} {rows} {nbytes}", group) == expected


def test_a_big_group_takes_little_memory_of_sqlites(tmp_path: Path) -> None:
    """Promise 4: SQLite keeps the pages a statement changes; so none changes many, however far the keys are spread."""
    rng = random.Random(7)
    store = DirectoryRoot(tmp_path).open("a", StoreOptions())
    try:
        for _ in range(3):
            keys = [rng.randbytes(16) for _ in range(MEASURED_ROWS)]
            group = [place for key in keys for place in (b"c", key, b"x" * 100)]
            apsw.memory_high_water(True)
            store.apply(group, 1)
        assert apsw.memory_high_water() < 8 * 2**20
    finally:
        store.close()
