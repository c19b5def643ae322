"""Checks of swaps and touches: writes that come to pass only where a row is as they say.

Rules:
  1. What doesn't come to pass changes nothing and takes no version.

Doesn't know: pytest, any adapter.
"""

from __future__ import annotations

from typing import Any

from persistency.storage.port import (
    DropRow,
    Expect,
    GetEntry,
    GetRow,
    LastVersion,
    ListCategories,
    ScanRange,
    SetRow,
    StoredRow,
    SwapRow,
    TouchRow,
)
from persistency.testing.checks import END_MS, NOW_MS, Checks, answers, batch, dump, group, put, same


class SwapChecks(Checks):
    """What `SwapRow` and `TouchRow` do."""

    def test_swaps(self) -> None:
        """A swap puts a row, or none, in the place of exactly the payload expected; else it does nothing at all."""
        befores = [None, put(b"c", b"k", b""), put(b"c", b"k", b"1"), SetRow(b"c", b"k", b"1", END_MS)]
        befores.append(SetRow(b"c", b"k", b"1", NOW_MS))
        for before in befores:
            ended = isinstance(before, SetRow) and before.expires_ms == NOW_MS
            held = None if before is None or ended else before[2]
            for expected in (None, b"", b"1", b"2", b"1\0"):
                for payload in (None, b"", b"1", b"new"):
                    for end_ms in (None, END_MS + 5):
                        with self.store() as store:
                            store.apply(group(*([] if before is None else [before])), NOW_MS)
                            old = store.read(GetEntry(b"c", b"k"), NOW_MS)
                            swap = SwapRow(b"c", b"k", expected, payload, end_ms)
                            what = f"{swap} over {before}"
                            done = expected == held
                            version = int(before is not None) + int(done)
                            outcomes = store.apply(group(swap, LastVersion()), NOW_MS)
                            answers(outcomes, [done, version], what)
                            row = None if payload is None else StoredRow(b"k", payload, version, end_ms)
                            got = store.read(GetEntry(b"c", b"k"), NOW_MS)
                            same(got, row if done else old, f"the row after {what}")

    def test_swaps_among_writes(self) -> None:
        """A swap sees all that its group did before it, and what follows sees the swap."""
        with self.store() as store:
            read = GetRow(b"c", b"k")
            steps: list[tuple[Any, Any]] = [
                (SwapRow(b"c", b"k", b"1", b"2", None), False),
                (put(b"c", b"k", b"1"), None),
                (SwapRow(b"c", b"k", b"1", b"2", None), True),
                (read, b"2"),
                (SwapRow(b"c", b"k", b"1", b"3", None), False),
                (read, b"2"),
                (put(b"c", b"k", b"4"), None),
                (SwapRow(b"c", b"k", b"4", None, None), True),
                (read, None),
                (ListCategories(), []),
                (SwapRow(b"c", b"k", None, b"5", END_MS), True),
                (batch(put(b"c", b"k", b"6")), 6),
                (SwapRow(b"c", b"k", b"5", None, None), False),
                (DropRow(b"c", b"k"), True),
                (SwapRow(b"c", b"k", None, b"7", None), True),
                (batch(Expect(b"c", b"k", 8), put(b"c", b"l", b"8")), 10),
                (SwapRow(b"c", b"x", None, None, None), True),
                (LastVersion(), 11),
                (ScanRange(b"c", b"", None), [(b"k", b"7"), (b"l", b"8")]),
            ]
            outcomes = store.apply(group(*[message for message, _ in steps]), NOW_MS)
            answers(outcomes, [answer for _, answer in steps], "swaps among writes")
            same(dump(store)[b"c"][0], StoredRow(b"k", b"7", 8, None), "the row after swaps")

    def test_only_one_swap_of_many_wins(self) -> None:
        """Of many swaps that expect the same row the first comes to pass, and touches no other key or category."""
        with self.store() as store:
            store.apply(group(put(b"c", b"k\0", b"other"), put(b"d", b"k", b"other")), NOW_MS)
            swaps = [SwapRow(b"c", b"k", None, b"%d" % at, END_MS) for at in range(70)]
            answers(store.apply(group(*swaps, LastVersion()), NOW_MS), [True, *[False] * 69, 3], "swaps of one key")
            again = [swap._replace(expires_ms=None) for swap in swaps]
            answers(store.apply(group(*again), END_MS), [True, *[False] * 69], "swaps once that row has ended")
            rows = [StoredRow(b"k", b"0", 4, None), StoredRow(b"k\0", b"other", 1, None)]
            same(dump(store, END_MS), {b"c": rows, b"d": [StoredRow(b"k", b"other", 2, None)]}, "the rows after swaps")

    def test_touches(self) -> None:
        """A touch gives a live row another end or none: payload and version stay, and it takes a version of its own."""
        with self.store() as store:
            store.apply(group(put(b"c", b"k", b"1"), SetRow(b"c", b"l", b"2", END_MS), put(b"d", b"k", b"3")), NOW_MS)
            version = 3
            for end_ms in (END_MS + 9, None, END_MS, END_MS, 2**53):
                for key, payload, own in ((b"k", b"1", 1), (b"l", b"2", 2)):
                    version += 1
                    messages = [TouchRow(b"c", key, end_ms), GetEntry(b"c", key), LastVersion()]
                    expected = [True, StoredRow(key, payload, own, end_ms), version]
                    answers(store.apply(group(*messages), NOW_MS), expected, f"a touch to {end_ms}")
            missing = [TouchRow(b"c", b"", None), TouchRow(b"e", b"k", END_MS), TouchRow(b"c", b"k\0", None)]
            answers(store.apply(group(*missing, LastVersion()), NOW_MS), [False, False, False, 13], "touches of no row")
            same(dump(store)[b"d"], [StoredRow(b"k", b"3", 3, None)], "the row of another category")
            same(store.get(b"c", b"k", 2**53 - 1), b"1", "a row touched to live long")

    def test_touches_to_the_past(self) -> None:
        """A touch to a time that is over ends the row, and none brings it back."""
        with self.store() as store:
            store.apply(group(put(b"c", b"k", b"1")), NOW_MS)
            messages = [TouchRow(b"c", b"k", NOW_MS), GetRow(b"c", b"k"), TouchRow(b"c", b"k", None), LastVersion()]
            answers(store.apply(group(*messages), NOW_MS), [True, None, False, 2], "touches to the past")
            same(dump(store), {}, "the rows after a touch to the past")

    def test_touches_of_pending_rows(self) -> None:
        """A touch meets the rows its group has just written, and a put after it clears the end again."""
        with self.store() as store:
            messages = [put(b"c", b"k", b"1"), TouchRow(b"c", b"k", END_MS), put(b"c", b"l", b"2")]
            messages += [TouchRow(b"c", b"l", END_MS), put(b"c", b"l", b"3"), LastVersion()]
            answers(store.apply(group(*messages), NOW_MS), [None, True, None, True, None, 5], "touches of pending rows")
            rows = [StoredRow(b"k", b"1", 1, END_MS), StoredRow(b"l", b"3", 5, None)]
            same(dump(store), {b"c": rows}, "the rows after touches")
