"""Checks of how rows that have ended are taken away, and of when the next one ends.

Rules:
  1. Rows that have ended can't be seen: what was taken away is told by the counts alone, or by the changes kept.

Doesn't know: pytest, any adapter.
"""

from __future__ import annotations

from typing import Any

from persistency.storage.port import (
    DropRange,
    DropRow,
    LastVersion,
    SetRow,
    Store,
    StoredRow,
    SwapRow,
    TouchRow,
)
from persistency.testing.checks import END_MS, NOW_MS, Checks, at_most, batch, dump, group, holds, put, same


def after(store: Store, now_ms: int, what: str) -> None:
    """Raise `AssertionError` if a store wants to be woken for what is over, or no longer there."""
    got = store.next_expiry_ms
    holds(got is None or got > now_ms, f"a next end after {now_ms}, or none, {what}", got)


class ReapChecks(Checks):
    """What reaping does."""

    def test_reaping_takes_ended_rows(self) -> None:
        """Reaping takes ended rows alone, at most as many as it may, and says how many; it takes no version."""
        with self.store() as store:
            rows = [SetRow(b"c%d" % (at % 3), b"%d" % at, b"x", END_MS + at) for at in range(10)]
            store.apply(group(*rows, put(b"c0", b"stays", b"1"), SetRow(b"c1", b"stays", b"2", END_MS + 99)), NOW_MS)
            same(store.reap(NOW_MS, 100), 0, "rows reaped before the first end")
            same(store.reap(END_MS - 1, 100), 0, "rows reaped a millisecond before the first end")
            same(store.reap(END_MS, 100), 1, "rows reaped at the first end")
            now_ms = END_MS + 20
            for limit, count in ((0, 0), (1, 1), (3, 3), (4, 4), (100, 1), (100, 0)):
                held = dump(store, now_ms)
                same(store.reap(now_ms, limit), count, f"rows reaped of at most {limit}")
                same(dump(store, now_ms), held, "the live rows after reaping")
            stay = {b"c0": [StoredRow(b"stays", b"1", 11, None)], b"c1": [StoredRow(b"stays", b"2", 12, END_MS + 99)]}
            same(dump(store, now_ms), stay, "the rows after reaping")
            same(store.status().last_version, 12, "the version after reaping")
            same(store.apply(group(LastVersion(), put(b"c", b"k", b"")), now_ms), [12, None], "a group after reaping")
            same(store.reap(END_MS + 99, 100), 1, "rows reaped at the last end")

    def test_what_was_written_over_is_not_reaped(self) -> None:
        """A row whose end was cleared or put off, or that was removed or swapped, isn't reaped at its old end."""
        writes: list[tuple[Any, int]] = [
            (put(b"c", b"k", b"2"), 0),
            (SetRow(b"c", b"k", b"2", None), 0),
            (SetRow(b"c", b"k", b"2", END_MS + 10), 1),
            (SetRow(b"c", b"k", b"2", END_MS), 1),
            (TouchRow(b"c", b"k", None), 0),
            (TouchRow(b"c", b"k", END_MS + 10), 1),
            (TouchRow(b"c", b"k", NOW_MS - 5), 1),
            (SwapRow(b"c", b"k", b"1", b"2", None), 0),
            (SwapRow(b"c", b"k", b"1", b"2", END_MS + 10), 1),
            (SwapRow(b"c", b"k", b"1", None, None), 0),
            (DropRow(b"c", b"k"), 0),
            (DropRange(b"c", b"", None), 0),
            (batch(DropRow(b"c", b"k"), put(b"c", b"k", b"3")), 0),
        ]
        for message, count in writes:
            with self.store() as store:
                store.apply(group(SetRow(b"c", b"k", b"1", END_MS)), NOW_MS)
                store.apply(group(message), NOW_MS)
                held = [row for row in dump(store).get(b"c", []) if row.expires_ms is None]
                late = count == 1 and not (isinstance(message, TouchRow) and message.expires_ms == NOW_MS - 5)
                same(store.reap(NOW_MS, 9), 0 if late else count, f"rows reaped at once after {message}")
                same(store.reap(END_MS + 10, 9), count if late else 0, f"rows reaped later after {message}")
                same(dump(store, END_MS + 10).get(b"c", []), held, f"the rows left after {message}")

    def test_rows_stored_too_late_are_reaped(self) -> None:
        """A row that had ended before it was stored is there to be reaped; one written over an ended one isn't."""
        with self.store() as store:
            late = [SetRow(b"c", b"%d" % at, b"x", NOW_MS - at) for at in range(4)]
            store.apply(group(*late, put(b"c", b"3", b"y"), SetRow(b"c", b"2", b"z", END_MS)), NOW_MS)
            at_most(store, NOW_MS - 1, "after rows that came too late")
            same(store.reap(NOW_MS, 9), 2, "rows reaped that came too late")
            same([row.payload for row in dump(store)[b"c"]], [b"z", b"y"], "the payloads left")

    def test_many_rows_are_reaped_in_slices(self) -> None:
        """3,000 ended rows go in slices of 1,000, the earlier ends first, and others may be written in between."""
        with self.store() as store:
            for at in range(0, 3000, 500):
                rows = [SetRow(b"c", b"%04d" % (key * 7 % 3000), b"x", END_MS + key) for key in range(at, at + 500)]
                store.apply(group(*rows), NOW_MS)
            now_ms = END_MS + 5000
            for at in range(3):
                at_most(store, END_MS + 1000 * at, f"with {3000 - 1000 * at} rows to reap")
                same(store.reap(now_ms, 1000), 1000, "rows reaped in a slice")
                store.apply(group(put(b"c", b"new%d" % at, b"")), now_ms)
            same(store.reap(now_ms, 1000), 0, "rows reaped when all are gone")
            same(store.next_expiry_ms, None, "when the next row ends, with none left")
            same([row.key for row in dump(store, now_ms)[b"c"]], [b"new0", b"new1", b"new2"], "the keys left")

    def test_next_expiry(self) -> None:
        """No row ends before `next_expiry_ms`: it sinks with every earlier end, of whatever write."""
        with self.store() as store:
            store.apply(group(put(b"c", b"k", b"1"), SetRow(b"c", b"l", b"1", None)), NOW_MS)
            same(store.next_expiry_ms, None, "when the first row ends, where none does")
            writes: list[Any] = [
                SetRow(b"c", b"k", b"2", END_MS),
                TouchRow(b"c", b"l", END_MS - 1),
                SwapRow(b"c", b"m", None, b"1", END_MS - 2),
                batch(SetRow(b"c", b"n", b"1", END_MS - 3), put(b"c", b"o", b"1")),
                SetRow(b"c", b"p", b"1", NOW_MS - 1),
            ]
            for at, message in enumerate(writes):
                store.apply(group(message), NOW_MS)
                at_most(store, NOW_MS - 1 if at == 4 else END_MS - at, f"after {message}")
            same(store.reap(NOW_MS, 9), 1, "rows reaped before the first end to come")
            for at, now_ms in enumerate((END_MS - 3, END_MS - 2, END_MS - 1)):
                at_most(store, now_ms, "after reaping")
                same(store.reap(now_ms, 9), 1, "rows reaped at the next end")
                after(store, now_ms, f"after {at + 1} rows were reaped")
            same(store.reap(END_MS, 9), 1, "rows reaped at the last end")
            same(store.reap(END_MS, 9), 0, "rows reaped when none is left")
            same(store.next_expiry_ms, None, "when the next row ends, with none left")

    def test_nobody_is_woken_for_nothing(self) -> None:
        """Once a reap has found nothing, the next end is one to come, or none where no row has one any more."""
        ended = SetRow(b"c", b"k", b"1", END_MS)
        for message in (
            put(b"c", b"k", b"2"),
            TouchRow(b"c", b"k", None),
            DropRow(b"c", b"k"),
            DropRange(b"c", b"", None),
        ):
            for now_ms in (NOW_MS, END_MS - 1, END_MS, END_MS + 1):
                with self.store() as store:
                    store.apply(group(ended), NOW_MS)
                    store.apply(group(message), NOW_MS)
                    same(store.reap(now_ms, 9), 0, f"rows reaped after {message}")
                    same(store.next_expiry_ms, None, f"when the next row ends after {message} and reaping")
            with self.store() as store:
                store.apply(group(ended, SetRow(b"d", b"k", b"1", END_MS + 50), message), NOW_MS)
                same(store.reap(END_MS + 1, 9), 0, f"rows reaped beside {message}")
                after(store, END_MS + 1, f"after {message} and reaping")
                at_most(store, END_MS + 50, f"after {message} and reaping")
        with self.store() as store:
            same(store.reap(NOW_MS, 9), 0, "rows reaped in an empty store")
            same(store.next_expiry_ms, None, "when the first row of an empty store ends")

    def test_the_latest_time(self) -> None:
        """Where rows have an end, a store knows the latest time it was told, by a group, a read or a reap."""
        with self.store() as store:
            store.apply(group(SetRow(b"c", b"k", b"1", END_MS)), NOW_MS)
            same(store.status().latest_ms, NOW_MS, "the latest time after a group")
            store.read(LastVersion(), NOW_MS + 1)
            same(store.status().latest_ms, NOW_MS + 1, "the latest time after a read")
            store.reap(NOW_MS + 2, 9)
            same(store.status().latest_ms, NOW_MS + 2, "the latest time after a reap")
            same(store.get(b"c", b"k", END_MS + 3), None, "a row that has ended")
            same(store.status().latest_ms, END_MS + 3, "the latest time after a row was seen to have ended")
