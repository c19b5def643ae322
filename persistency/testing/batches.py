"""Checks of batches: all or nothing, in order, held to what was expected before them.

Rules:
  1. A conflict is an outcome: what stands beside it in its group is looked at too.

Doesn't know: pytest, any adapter.
"""

from __future__ import annotations

from typing import Any

from persistency.errors import Conflict
from persistency.storage.port import DropRange, DropRow, Expect, GetEntry, LastVersion, StoredRow
from persistency.testing.checks import NOW_MS, Checks, batch, dump, failed, group, put, same


def conflict(outcome: Any, key: bytes, expected: int | None, actual: int | None) -> None:
    """Raise `AssertionError` unless an outcome is the conflict of this key and these versions."""
    failed(outcome, Conflict, {"key": key, "expected": expected, "actual": actual}, "a failed Expect")


class BatchChecks(Checks):
    """What batches do."""

    def test_batches_answer_their_last_version(self) -> None:
        """A batch answers the version of its last operation, every operation takes one, an empty one none."""
        with self.store() as store:
            messages = [put(b"c", b"k", b"0"), batch(put(b"c", b"a", b"1"), put(b"c", b"b", b"2")), batch()]
            messages += [batch(put(b"c", b"a", b"3"), DropRow(b"c", b"b"), DropRange(b"x", b"", None)), batch()]
            messages += [batch(Expect(b"c", b"a", 4), put(b"c", b"a", b"4")), batch(Expect(b"c", b"z", None))]
            messages += [LastVersion(), put(b"c", b"z", b"5"), LastVersion()]
            same(store.apply(group(*messages), NOW_MS), [None, 3, 3, 6, 6, 8, 9, 9, None, 10], "the batches' versions")
            rows = [StoredRow(b"a", b"4", 8, None), StoredRow(b"k", b"0", 1, None), StoredRow(b"z", b"5", 10, None)]
            same(dump(store), {b"c": rows}, "the rows")

    def test_a_batch_applies_in_order(self) -> None:
        """Within a batch the later operation on a key wins: put, drop, put; drop, put, drop."""
        with self.store() as store:
            first = batch(put(b"c", b"k", b"1"), DropRow(b"c", b"k"), put(b"c", b"k", b"2"))
            second = batch(DropRow(b"c", b"k"), put(b"c", b"k", b"3"), DropRange(b"c", b"", None))
            third = batch(*[put(b"c", b"k", b"%d" % at) for at in range(100)])
            read = GetEntry(b"c", b"k")
            expected = [3, StoredRow(b"k", b"2", 3, None), 6, None, 106, StoredRow(b"k", b"99", 106, None)]
            same(store.apply(group(first, read, second, read, third, read), NOW_MS), expected, "batches and the row")

    def test_expectations_that_hold(self) -> None:
        """An `Expect` holds for the row's exact version, or for `None` where there is no row, wherever it stands."""
        with self.store() as store:
            store.apply(group(put(b"c", b"k", b"1")), NOW_MS)
            holds = batch(put(b"c", b"k", b"2"), Expect(b"c", b"k", 1), Expect(b"d", b"k", None))
            same(store.apply(group(holds), NOW_MS), [4], "a batch whose expectations hold")
            same(store.read(GetEntry(b"c", b"k"), NOW_MS), StoredRow(b"k", b"2", 2, None), "the row")

    def test_expectations_look_before_the_batch(self) -> None:
        """An `Expect` looks at the state before its batch, but after all that the group did before it."""
        with self.store() as store:
            make = batch(put(b"c", b"k", b"1"), Expect(b"c", b"k", None))
            again = batch(put(b"c", b"k", b"2"), Expect(b"c", b"k", None))
            own = batch(DropRow(b"c", b"k"), Expect(b"c", b"k", None))
            follow = batch(Expect(b"c", b"k", 4), put(b"c", b"k", b"4"))
            outcomes = store.apply(group(make, again, own, put(b"c", b"x", b""), put(b"c", b"k", b"3"), follow), NOW_MS)
            same(outcomes[0], 2, "the first batch")
            conflict(outcomes[1], b"k", None, 1)
            conflict(outcomes[2], b"k", None, 1)
            same(outcomes[3:], [None, None, 6], "what follows the conflicts")
            rows = [StoredRow(b"k", b"4", 6, None), StoredRow(b"x", b"", 3, None)]
            same(dump(store), {b"c": rows}, "the rows")

    def test_a_failed_batch_is_undone_alone(self) -> None:
        """A failed `Expect` undoes its whole batch, takes no version, and leaves its neighbours in the group."""
        with self.store() as store:
            store.apply(group(put(b"c", b"k", b"0"), put(b"c", b"r", b"0")), NOW_MS)
            for wrong in (None, 0, 2, 2**62):
                before = store.status().last_version
                bad = batch(put(b"c", b"bad", b""), DropRange(b"c", b"", None), Expect(b"c", b"k", wrong))
                messages = [put(b"c", b"1", b"1"), bad, LastVersion(), batch(put(b"c", b"2", b"2")), LastVersion()]
                outcomes = store.apply(group(*messages), NOW_MS)
                conflict(outcomes[1], b"k", wrong, 1)
                same([outcomes[0], *outcomes[2:]], [None, before + 1, before + 2, before + 2], "the neighbours")
            absent = group(batch(Expect(b"c", b"no", 1), put(b"c", b"no", b"")))
            conflict(store.apply(absent, NOW_MS)[0], b"no", 1, None)
            same([row.key for row in dump(store)[b"c"]], [b"1", b"2", b"k", b"r"], "the keys")
            same(store.status().last_version, 10, "the last version")
