"""Checks of what outlives a store: rows, ends, bytes in use, changes and the latest time, opened again in many ways.

Rules:
  1. An adapter whose rows end with their store passes all of them: there is nothing to open again.
  2. What was closed in order and what wasn't (`tidy=False`) are both looked at.

Doesn't know: pytest, files, any adapter.
"""

from __future__ import annotations

from typing import Any

from persistency.storage.port import (
    Batch,
    DropRange,
    DropRow,
    GetRow,
    LastVersion,
    SetRow,
    Store,
    StoredRow,
    StoreOptions,
    TouchRow,
)
from persistency.testing.checks import (
    END_MS,
    KEEPING,
    NOW_MS,
    PLAIN,
    TEN,
    Checks,
    answers,
    at_most,
    batch,
    changes,
    dump,
    group,
    holds,
    put,
    refused,
    same,
    told,
    truncated,
    used,
    wrote,
)

SMALL = StoreOptions(max_bytes=5)


def write(store: Store, *messages: Any, now_ms: int = NOW_MS) -> None:
    """Write a group none of whose messages may fail."""
    kinds = [int if isinstance(message, Batch) else type(None) for message in messages]
    same([type(outcome) for outcome in store.apply(group(*messages), now_ms)], kinds, f"the outcomes of {messages}")


class ReopenChecks(Checks):
    """What a store opened again knows."""

    def test_reopening(self) -> None:
        """A store that outlives its closing comes back with every row and its last version, and goes on from there."""
        with self.store() as store:
            store.apply(group(put(b"c", b"k", b"1"), put(b"c", b"gone", b""), DropRow(b"c", b"gone")), NOW_MS)
            held = dump(store)
        with self.reopened() as again:
            if again is None:
                return
            same(dump(again), held, "the rows after reopening")
            same(again.status().last_version, 3, "the last version after reopening")
            same(again.next_expiry_ms, None, "when the next row ends, after reopening")
            same(again.apply(group(batch(put(b"c", b"k", b"2"))), NOW_MS), [4], "the next version")

    def test_ends_outlive_a_store(self) -> None:
        """Rows keep their ends over reopening: they end then, are reaped then, and it is known when."""
        for tidy in (True, False):
            store = self.open_store(PLAIN)
            try:
                rows = [SetRow(b"c", b"a", b"1", END_MS), SetRow(b"c", b"b", b"2", END_MS + 5), put(b"c", b"c", b"3")]
                write(store, *rows, SetRow(b"c", b"ended", b"4", NOW_MS), SetRow(b"c", b"over", b"5", END_MS))
                write(store, put(b"c", b"over", b"6"))
                store.apply(group(TouchRow(b"c", b"c", END_MS + 9)), NOW_MS)
                held = dump(store)
            finally:
                store.close(tidy=tidy)
            with self.reopened() as again:
                if again is None:
                    return
                same(dump(again), held, "the rows after reopening")
                at_most(again, NOW_MS, "after reopening")
                counts = [(again.reap(now_ms, 9), again.reap(now_ms, 9)) for now_ms in (NOW_MS, END_MS, END_MS + 5)]
                same(counts, [(1, 0), (1, 0), (1, 0)], "rows reaped after reopening")
                at_most(again, END_MS + 9, "after reaping what came back")
                left = [row for row in held[b"c"] if row.key in (b"c", b"over")]
                same(dump(again, END_MS + 5), {b"c": left}, "the rows left after reaping what came back")

    def test_the_latest_time_outlives_a_store(self) -> None:
        """Where a row has an end, a store opened again knows at least the time of the last group it was written in."""
        for tidy in (True, False):
            for message in (SetRow(b"c", b"k", b"1", END_MS), batch(SetRow(b"c", b"k", b"1", END_MS))):
                store = self.open_store(PLAIN)
                try:
                    write(store, put(b"c", b"l", b"1"))
                    write(store, message, now_ms=NOW_MS + 7)
                    if not tidy:
                        write(store, SetRow(b"c", b"m", b"", END_MS), now_ms=NOW_MS + 9)
                finally:
                    store.close(tidy=tidy)
                with self.reopened() as again:
                    if again is None:
                        return
                    got = again.status().latest_ms
                    holds(got >= NOW_MS + (7 if tidy else 9), f"a latest time of {NOW_MS + 7} or more, {tidy=}", got)

    def test_what_has_ended_stays_ended(self) -> None:
        """Whatever told somebody that a row has ended is a time that a store closed in order still knows afterwards."""
        asks: list[Any] = [
            lambda store: store.get(b"c", b"k", END_MS + 1),
            lambda store: store.read(GetRow(b"c", b"k"), END_MS + 1),
            lambda store: store.apply(group(GetRow(b"c", b"k")), END_MS + 1)[0],
            lambda store: store.apply(group(DropRow(b"c", b"none"), GetRow(b"c", b"k")), END_MS + 1)[1],
        ]
        for ask in asks:
            with self.store() as store:
                write(store, SetRow(b"c", b"k", b"1", END_MS), SetRow(b"c", b"later", b"2", END_MS + 99))
                same(ask(store), None, "a row that has ended")
            with self.reopened() as again:
                if again is None:
                    return
                got = again.status().latest_ms
                holds(got >= END_MS + 1, f"a latest time of {END_MS + 1} or more after closing in order", got)

    def test_bytes_in_use_outlive_a_store(self) -> None:
        """The bytes in use are exact after reopening, with rows that ended meanwhile, or written without a quota."""
        for tidy in (True, False):
            store = self.open_store(TEN)
            try:
                write(store, put(b"c", b"a", b"123"), SetRow(b"c", b"b", b"12", END_MS))
                write(store, SetRow(b"c", b"c", b"1", END_MS + 9))
            finally:
                store.close(tidy=tidy)
            with self.reopened(TEN) as again:
                if again is None:
                    return
                same(used(again), 6, "the bytes in use after reopening")
                refused(again.apply(group(put(b"c", b"d", b"12345")), NOW_MS)[0], 11, 10, "a put after reopening")
                write(again, put(b"c", b"d", b"1234"))
            for _ in range(2):  # the first of them is told the time, and writes nothing
                with self.reopened(TEN) as again:
                    assert again is not None
                    same(used(again, END_MS), 8, "the bytes in use once a row has ended")
            with self.reopened() as again:
                assert again is not None
                same(used(again, END_MS), 8, "the bytes in use without a quota")
                rows = [put(b"c", b"a", b""), put(b"d", b"e", b"1" * 20), SetRow(b"d", b"f", b"12", END_MS + 9)]
                write(again, *rows, now_ms=END_MS)
                again.apply(group(DropRow(b"c", b"d")), END_MS)
            for now_ms, nbytes in ((END_MS + 1, 23), (END_MS + 9, 20)):
                with self.reopened(TEN) as again:
                    assert again is not None
                    same(used(again, now_ms), nbytes, "the bytes in use after writes without a quota")

    def test_a_quota_below_what_is_there(self) -> None:
        """A job opened with a quota it is over already may write what doesn't grow, and shrink, and nothing else."""
        with self.store() as store:
            write(store, put(b"c", b"a", b"1" * 6), put(b"c", b"b", b"1" * 6))
        with self.reopened(SMALL) as again:
            if again is None:
                return
            refused(again.apply(group(put(b"c", b"c", b"1")), NOW_MS)[0], 13, 5, "a put over a smaller quota")
            bigger = batch(put(b"c", b"a", b""), put(b"c", b"b", b"1" * 13))
            refused(again.apply(group(bigger), NOW_MS)[0], 13, 5, "a batch over a smaller quota")
            write(again, put(b"c", b"c", b""), put(b"c", b"a", b"2" * 6), put(b"c", b"a", b"3" * 5))
            write(again, batch(put(b"c", b"c", b"123456"), put(b"c", b"b", b"")))
            same(used(again), 11, "the bytes in use over a smaller quota")
            same(again.apply(group(DropRange(b"c", b"b", None)), NOW_MS), [2], "a removal over a smaller quota")
            same(dump(again)[b"c"], [StoredRow(b"a", b"3" * 5, 5, None)], "the rows under a smaller quota")
            refused(again.apply(group(put(b"c", b"d", b"1")), NOW_MS)[0], 6, 5, "a put beyond a full quota")

    def test_changes_outlive_a_store(self) -> None:
        """Changes are kept over reopening, as many as are asked for then, and go on with the next version."""
        for tidy in (True, False):
            store = self.open_store(KEEPING)
            try:
                write(store, put(b"c", b"a", b"1"), SetRow(b"c", b"b", b"2", END_MS), put(b"c", b"c", b"3"))
                same(store.reap(END_MS, 9), 1, "rows reaped")
            finally:
                store.close(tidy=tidy)
            with self.reopened(KEEPING) as again:
                if again is None:
                    return
                write(again, put(b"c", b"d", b""), now_ms=END_MS)
                every = [wrote(1, b"c", b"a", b"1"), wrote(2, b"c", b"b", b"2"), wrote(3, b"c", b"c", b"3")]
                every += [told(4, "expire", b"c", b"b"), wrote(5, b"c", b"d", b"")]
                answers(changes(again), every, "the changes after reopening")
            with self.reopened(StoreOptions(feed_changes_max=3)) as again:
                assert again is not None
                write(again, put(b"c", b"e", b""), now_ms=END_MS)
                every.append(wrote(6, b"c", b"e", b""))
                truncated(changes(again, 2), 4, "changes of which fewer are kept after reopening")
                answers(changes(again, 3), every[3:], "the changes that are kept after reopening")
            with self.reopened(KEEPING) as again:
                assert again is not None
                truncated(changes(again, 2), 4, "changes that were dropped before reopening")
                answers(changes(again, 3), every[3:], "the changes when more are kept again")

    def test_writes_that_no_change_tells_of(self) -> None:
        """What was written while no changes were kept is never passed over: to whom it is missing that is told."""
        with self.store() as store:
            write(store, put(b"c", b"a", b"1"), put(b"c", b"b", b"2"))
        with self.reopened(KEEPING) as again:
            if again is None:
                return
            for after in (0, 1):
                truncated(changes(again, after), 3, f"changes after {after} that were never kept")
            same(changes(again, 2), [], "changes after what was never kept")
            write(again, put(b"c", b"c", b"3"))
            truncated(changes(again, 1), 3, "changes that were never kept, before one that is")
            same(changes(again, 2), [wrote(3, b"c", b"c", b"3")], "the first change kept")
        with self.reopened() as again:
            assert again is not None
            write(again, put(b"c", b"d", b"4"))
        for written in range(3):
            with self.reopened(KEEPING) as again:
                assert again is not None
                every = [wrote(5 + at, b"c", b"%d" % at, b"") for at in range(written)]
                for after in (0, 2, 3):
                    truncated(changes(again, after), 5, f"changes after {after}, not all of them kept")
                same(changes(again, 4), every, "the changes after what was not kept")
                write(again, put(b"c", b"%d" % written, b""))
        with self.reopened() as again:
            assert again is not None
            same(again.apply(group(LastVersion()), NOW_MS), [7], "the version at last")
            same([row.version for row in dump(again)[b"c"]], [5, 6, 7, 1, 2, 3, 4], "the rows' versions at last")

    def test_what_was_reaped_where_no_changes_were_kept(self) -> None:
        """Who follows the changes is told that some are missing, though reaping was all that happened meanwhile."""
        with self.store(KEEPING) as store:
            write(store, SetRow(b"c", b"k", b"v", END_MS))
        with self.reopened(PLAIN) as again:
            if again is None:
                return
            same(again.reap(END_MS, 10), 1, "rows reaped without keeping changes")
        with self.reopened(KEEPING) as again:
            if again is not None:
                last = again.status().last_version
                truncated(changes(again, 1), last + 1, "changes after a row was reaped that nobody was told of")
                same(changes(again, last), [], "changes after the last version")
