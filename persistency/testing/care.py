"""Checks of what is asked of a store as a whole: pages of rows, its extent, unused space, checking, backing up.

Rules:
  1. What only some engines can do may be refused, as `Failed`; what is answered must be right.

Doesn't know: pytest, any adapter.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from persistency.storage.port import (
    BackUp,
    Barrier,
    CheckUp,
    DropRange,
    Extent,
    Failed,
    GiveBack,
    ListRows,
    SetRow,
    StoredRow,
)
from persistency.testing.checks import END_MS, NOW_MS, Checks, dump, group, put, same


class CareChecks(Checks):
    """What is done with a store as a whole."""

    def test_pages_of_rows(self) -> None:
        """A page has so many live rows in key order, with their ends, and none behind the one that fills it."""
        with self.store() as store:
            rows = [put(b"c", b"%d" % at, b"x" * 10) for at in range(6)]
            store.apply(group(*rows, SetRow(b"c", b"6", b"y", END_MS), put(b"d", b"0", b"")), NOW_MS)
            plain = [StoredRow(b"%d" % at, b"x" * 10, at + 1, None) for at in range(6)]
            every = [*plain, StoredRow(b"6", b"y", 7, END_MS)]
            same(store.read(ListRows(b"c", b"", 10, 1000), NOW_MS), every, "a page with room for all")
            same(store.read(ListRows(b"c", b"2", 2, 1000), NOW_MS), every[2:4], "a page of two rows")
            same(store.read(ListRows(b"c", b"", 10, 22), NOW_MS), every[:2], "a page that is full with the second")
            same(store.read(ListRows(b"c", b"", 10, 1), NOW_MS), every[:1], "a page that is full with the first")
            same(store.read(ListRows(b"c", b"", 10, 1000), END_MS), plain, "a page when one row has ended")
            same(store.apply(group(ListRows(b"none", b"", 10, 10)), NOW_MS), [[]], "a page of no category")

    def test_unused_space(self) -> None:
        """Giving space back changes no row and no version; an extent is a number of bytes that never grows by it."""
        with self.store() as store:
            store.apply(group(*[put(b"c", b"%04d" % at, b"x" * 1000) for at in range(300)]), NOW_MS)
            store.apply(group(DropRange(b"c", b"0010", None)), NOW_MS)
            rows, version, before = dump(store), store.status().last_version, store.read(Extent(), NOW_MS)
            left: int | None = None  # nobody knows yet
            for _ in range(1000):
                left = store.apply(group(GiveBack(10)), NOW_MS)[0]
                if not left:
                    break
            store.apply(group(Barrier(fold=True, rebuild=left is None)), NOW_MS)
            same(left or 0, 0, "the unused pages left")
            same(dump(store), rows, "the rows after space was given back")
            same(store.status().last_version, version, "the version after space was given back")
            same(store.read(Extent(), NOW_MS) <= before, True, "that the extent has not grown")

    def test_a_sound_store_is_found_sound(self) -> None:
        """Checking finds nothing, beside rows with an end and without one."""
        with self.store() as store:
            store.apply(group(put(b"c", b"k", b"v"), SetRow(b"c", b"e", b"v", END_MS)), NOW_MS)
            same(_walked(store.read(CheckUp(), NOW_MS)), [], "the problems found")

    def test_a_backup_holds_the_rows(self) -> None:
        """A backup is a file, and there when its steps are over; or it is refused."""
        with self.store() as store, tempfile.TemporaryDirectory() as place:
            store.apply(group(put(b"c", b"k", b"v")), NOW_MS)
            target = Path(place) / "copy"
            steps = store.read(BackUp(target), NOW_MS)
            if type(steps) is not Failed:
                _walked(steps)
            same(target.is_file(), type(steps) is not Failed, "whether there is a backup")


def _walked(steps: Generator[Any, None, Any]) -> Any:
    """Take all steps; return their answer."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value
