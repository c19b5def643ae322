"""Checks of rows that end: a row is live until its end, to the millisecond, to whatever asks.

Rules:
  1. Time only goes forward within a store, and is given; no check waits for it.

Doesn't know: pytest, any adapter; how ended rows are taken away is checked elsewhere.
"""

from __future__ import annotations

import random
from typing import Any

from persistency.errors import Conflict
from persistency.storage.port import (
    CountRange,
    DropRange,
    DropRow,
    Expect,
    GetEntry,
    GetRow,
    GetRows,
    HasRow,
    LastVersion,
    ListCategories,
    ListEntries,
    ScanRange,
    SetRow,
    Store,
    StoredRow,
    SwapRow,
    TouchRow,
    UsedBytes,
)
from persistency.testing.checks import (
    END_MS,
    NOW_MS,
    Checks,
    answers,
    batch,
    dump,
    failed,
    group,
    put,
    same,
    used,
)

# Every way to ask for the row that ends; beside it, in its category, is one that doesn't.
_READS: list[Any] = [
    GetRow(b"c", b"k"),
    HasRow(b"c", b"k"),
    GetEntry(b"c", b"k"),
    GetRows(b"c", (b"l", b"k")),
    ScanRange(b"c", b"", None),
    ScanRange(b"c", b"", None, reverse=True, limit=2),
    ScanRange(b"c", b"k", b"l", keys_only=True),
    ScanRange(b"c", b"", None, limit=1),
    ScanRange(b"d", b"", None, reverse=True),
    CountRange(b"c", b"", None),
    CountRange(b"c", b"k", b"l"),
    ListCategories(),
    ListEntries(b"c"),
    ListEntries(b"d"),
    UsedBytes(),
]


def _told(end_ms: int | None) -> list[Any]:
    """Return the answers to `_READS` while the row is live, or, with `None`, once it has ended."""
    pair, other = (b"k", b"1"), (b"l", b"22")
    entry = StoredRow(b"l", b"22", 2, None)
    if end_ms is None:
        return [None, False, None, [other], [other], [other], [], [other], [], 1, 0, [b"c"], [entry], [], 2]
    row, third = StoredRow(b"k", b"1", 1, end_ms), StoredRow(b"k", b"333", 3, end_ms)
    scans = [[pair, other], [other, pair], [(b"k", b"")], [pair], [(b"k", b"333")]]
    return [b"1", True, row, [other, pair], *scans, 2, 1, [b"c", b"d"], [row, entry], [third], 6]


class EndChecks(Checks):
    """What rows with an end do."""

    def test_a_row_is_live_until_its_end(self) -> None:
        """A row is there until the millisecond before its end, and from then on to no read, in a group or outside."""
        for end_ms in (NOW_MS + 1, END_MS, 2**53):
            with self.store() as store:
                rows = [SetRow(b"c", b"k", b"1", end_ms), put(b"c", b"l", b"22"), SetRow(b"d", b"k", b"333", end_ms)]
                answers(store.apply(group(*rows), NOW_MS), [None, None, None], "the outcomes of rows with ends")
                for now_ms in (NOW_MS, end_ms - 1, end_ms, end_ms + 1, end_ms + 10**9):
                    told = _told(end_ms if now_ms < end_ms else None)
                    when = f"{now_ms - end_ms} ms after the end"
                    answers([store.read(read, now_ms) for read in _READS], told, f"reads {when}")
                    answers(store.apply(group(*_READS), now_ms), told, f"reads in a group {when}")
                    among = store.apply(group(DropRow(b"x", b"x"), *_READS), now_ms)
                    answers(among, [False, *told], f"reads among writes {when}")
                    got = [store.get(b"c", b"k", now_ms), store.scan(_READS[4], now_ms)]
                    answers(got, [told[0], told[4]], f"get and scan {when}")

    def test_a_put_clears_an_end(self) -> None:
        """The last write of a row decides its end: a plain put, or `SetRow` with `None`, takes it away."""
        steps: list[tuple[Any, int | None]] = [
            (SetRow(b"c", b"k", b"1", END_MS), END_MS),
            (put(b"c", b"k", b"2"), None),
            (SetRow(b"c", b"k", b"3", END_MS + 5), END_MS + 5),
            (SetRow(b"c", b"k", b"4", None), None),
            (SetRow(b"c", b"k", b"5", END_MS + 9), END_MS + 9),
            (SetRow(b"c", b"k", b"6", END_MS), END_MS),
            (batch(put(b"c", b"k", b"7")), None),
            (batch(SetRow(b"c", b"k", b"8", END_MS)), END_MS),
            (batch(SetRow(b"c", b"k", b"8", END_MS), put(b"c", b"k", b"9")), None),
        ]
        for apart in (True, False):
            with self.store() as store:
                read = GetEntry(b"c", b"k")
                messages = [message for step, _ in steps for message in (step, read)]
                groups = [group(message) for message in messages] if apart else [group(*messages)]
                outcomes = [outcome for places in groups for outcome in store.apply(places, NOW_MS)]
                ends = [outcome.expires_ms for outcome in outcomes[1::2]]
                same(ends, [end_ms for _, end_ms in steps], f"the row's ends, {'apart' if apart else 'in one group'}")
                same(store.get(b"c", b"k", 2**53), b"9", "the row without an end, long after")
                same(store.status().last_version, 10, "the version after that")

    def test_rows_that_come_too_late(self) -> None:
        """A row that has ended before it is stored takes the place of another and a version, and is no row at once."""
        for end_ms in (NOW_MS, NOW_MS - 1, 1):
            with self.store() as store:
                store.apply(group(put(b"c", b"k", b"1"), put(b"c", b"l", b"2")), NOW_MS)
                late = SetRow(b"c", b"k", b"late", end_ms)
                messages = [late, *_READS[:3], LastVersion(), put(b"c", b"k", b"3"), GetRow(b"c", b"k"), late]
                messages += [GetRow(b"c", b"k"), batch(late), ListCategories(), UsedBytes()]
                expected = [None, None, False, None, 3, None, b"3", None, None, 6, [b"c"], 1]
                answers(store.apply(group(*messages), NOW_MS), expected, "rows that come too late")
                same(dump(store), {b"c": [StoredRow(b"l", b"2", 2, None)]}, "the rows left")

    def test_writes_see_no_ended_row(self) -> None:
        """To a removal, an expectation, a swap and a touch a row that has ended is none."""
        ended = [SetRow(b"c", key, key, END_MS) for key in (b"a", b"b", b"d", b"e", b"f")]
        rows = [*ended, put(b"c", b"c", b"c"), SetRow(b"c", b"g", b"g", END_MS + 1)]
        with self.store() as store:
            store.apply(group(*rows), NOW_MS)
            messages: list[Any] = [DropRow(b"c", b"a"), batch(Expect(b"c", b"b", 2)), batch(Expect(b"c", b"b", None))]
            messages += [TouchRow(b"c", b"d", None), SwapRow(b"c", b"e", b"e", b"E", None)]
            messages += [SwapRow(b"c", b"e", None, b"E", None), TouchRow(b"c", b"g", None), DropRange(b"c", b"", None)]
            outcomes = store.apply(group(*messages), END_MS)
            failed(outcomes.pop(1), Conflict, {"key": b"b", "expected": 2, "actual": None}, "an expected ended row")
            answers(outcomes, [False, 9, False, False, True, True, 3], "writes that meet ended rows")
            same(dump(store, END_MS), {}, "the rows left")
            same(store.status().last_version, 12, "the version after writes that meet ended rows")

    def test_ended_rows_are_written_over(self) -> None:
        """A row stored where one has ended is a new row: it is there, and the other's end is not its own."""
        with self.store() as store:
            store.apply(group(*[SetRow(b"c", key, b"old", END_MS) for key in (b"a", b"b", b"c", b"d")]), NOW_MS)
            over = [put(b"c", b"a", b"1"), SetRow(b"c", b"b", b"2", END_MS + 9), batch(put(b"c", b"c", b"3"))]
            store.apply(group(*over, GetRow(b"c", b"a"), SwapRow(b"c", b"d", None, b"4", None)), END_MS + 1)
            rows = [StoredRow(b"a", b"1", 5, None), StoredRow(b"b", b"2", 6, END_MS + 9)]
            rows += [StoredRow(b"c", b"3", 7, None), StoredRow(b"d", b"4", 8, None)]
            same(dump(store, END_MS + 1), {b"c": rows}, "the rows over ended ones")
            del rows[1]
            same(dump(store, END_MS + 9), {b"c": rows}, "the rows once one of them has ended again")

    def test_limits_count_live_rows(self) -> None:
        """A scan's limit counts the rows it gives, not those that have ended between them, from either side."""
        with self.store() as store:
            keys = [b"%03d" % at for at in range(90)]
            ends = [None if at % 9 == 4 else END_MS + at for at in range(90)]
            store.apply(group(*[SetRow(b"c", *row) for row in zip(keys, keys, ends, strict=True)]), NOW_MS)
            now_ms = END_MS + 60
            live = [key for key, end_ms in zip(keys, ends, strict=True) if end_ms is None or now_ms < end_ms]
            for start, stop in ((b"", None), (b"005", b"070"), (b"061", b"062"), (b"058", b"059")):
                inside = [key for key in live if start <= key and (stop is None or key < stop)]
                for reverse in (False, True):
                    for limit in (None, 0, 1, 2, 5, 1000):
                        span = ScanRange(b"c", start, stop, reverse, limit)
                        rows = [(key, key) for key in (inside[::-1] if reverse else inside)][:limit]
                        same(store.scan(span, now_ms), rows, repr(span))
                same(store.read(CountRange(b"c", start, stop), now_ms), len(inside), f"count [{start!r}, {stop!r})")
            same(store.read(GetRows(b"c", tuple(keys)), now_ms), [(key, key) for key in live], "rows by key")

    def test_groups_with_ends_of_every_size(self) -> None:
        """Groups of 1 to 600 rows, some with an end and some without, keep each row's own."""
        chance = random.Random(2)  # noqa: S311 - the same groups every time
        for mixed in (False, True):
            with self.store() as store:
                held: dict[bytes, StoredRow] = {}
                for size in (1, 2, 3, 7, 63, 64, 65, 127, 128, 129, 300, 513, 600):
                    held.update(_write_rows(store, size, chance, mixed=mixed))
                for now_ms in (NOW_MS, END_MS, END_MS + 5, END_MS + 10):
                    live = [row for _, row in sorted(held.items()) if row.expires_ms is None or now_ms < row.expires_ms]
                    same(dump(store, now_ms), {b"c": live} if live else {}, f"the rows at {now_ms}, mixed: {mixed}")
                    same(used(store, now_ms), sum(len(row.payload) for row in live), f"the bytes in use at {now_ms}")

    def test_point_reads_of_pending_ends(self) -> None:
        """Point reads among rows with and without an end answer by the last of them, ended or not."""
        with self.store() as store:
            messages: list[Any] = []
            expected: list[Any] = []
            for at in range(200):
                key, payload = b"%d" % (at % 7), b"%d" % at
                end_ms = (None, END_MS, NOW_MS, NOW_MS - 1)[at % 4]
                other = b"%d" % ((at + 3) % 7)  # written four steps before, with the same kind of end
                messages += [SetRow(b"c", key, payload, end_ms), GetRow(b"c", key), GetRow(b"c", other)]
                gone = at % 4 > 1
                expected += [None, None if gone else payload, None if gone or at < 4 else b"%d" % (at - 4)]
                messages += [put(b"d", key, payload), GetRow(b"d", key)]
                expected += [None, payload]
            answers(store.apply(group(*messages), NOW_MS), expected, "rows with ends and gets in turn")


def _write_rows(store: Store, size: int, chance: random.Random, *, mixed: bool) -> dict[bytes, StoredRow]:
    """Write so many rows in one group, with an end or (`mixed`) some of them without; return the last of each key."""
    version = store.status().last_version
    held, messages = {}, []
    for _ in range(size):
        version += 1
        key, payload = b"%04d" % chance.randrange(2 * size), b"%d" % version
        end_ms = None if mixed and chance.random() < 0.5 else END_MS + chance.randrange(10)
        plain = end_ms is None and chance.random() < 0.5
        messages.append(put(b"c", key, payload) if plain else SetRow(b"c", key, payload, end_ms))
        held[key] = StoredRow(key, payload, version, end_ms)
    same(store.apply(group(*messages), NOW_MS), [None] * size, f"the outcomes of {size} rows")
    return held
