"""Checks of the changes a job keeps: which there are, how many, and what is said of those that are gone.

Rules:
  1. A change is what its operation's version says it is; those of what was undone never happened.

Doesn't know: pytest, any adapter.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from persistency.errors import FeedTruncated, Misuse
from persistency.storage.port import (
    DropRange,
    DropRow,
    Expect,
    Failed,
    LastVersion,
    ListChanges,
    ListEntries,
    SetRow,
    Store,
    StoredChange,
    StoredRow,
    StoreOptions,
    SwapRow,
    TouchRow,
    Within,
)
from persistency.testing.checks import (
    ALL,
    END_MS,
    KEEPING,
    NOW_MS,
    Checks,
    Stop,
    answers,
    batch,
    changes,
    doing,
    dump,
    failed,
    group,
    holds,
    put,
    same,
    told,
    truncated,
    trying,
    wrote,
)


def replay(held: dict[tuple[bytes, bytes], bytes], some: Sequence[StoredChange]) -> None:
    """Do to a copy of the rows what changes say was done to them."""
    for change in some:
        if change.kind == "put":
            held[change.category, change.key] = change.payload or b""
        elif change.kind == "delete_range":
            for category, key in list(held):
                if category == change.category and change.key <= key and (change.stop is None or key < change.stop):
                    del held[category, key]
        else:
            held.pop((change.category, change.key), None)


def follow(store: Store, held: dict[tuple[bytes, bytes], bytes], seen: int, now_ms: int) -> int:
    """Do to a copy of the rows, page by page, what has been done since a version; return the last one."""
    for _ in range(100):
        page = changes(store, seen, 7, now_ms)
        same(type(page), list, f"the type of the answer about changes after {seen}")
        if not page:
            return seen
        versions = [change.version for change in page]
        same(versions, sorted({*versions}), "the versions of a page")
        holds(versions[0] > seen, f"a page that begins after version {seen}", versions)
        seen = versions[-1]
        replay(held, page)
    raise AssertionError(f"expected an end of the changes, got 100 pages up to version {seen}")


class FeedChecks(Checks):
    """What `feed_changes_max` does."""

    def test_every_write_is_a_change(self) -> None:
        """A put, a removal and a swap are changes of their own version, whatever they stand in; a touch is none."""
        with self.store(KEEPING) as store:
            same(changes(store), [], "the changes of a new store")
            run = doing(SetRow(b"r", b"1", b"in", None), doing(DropRow(b"r", b"1")), batch(put(b"r", b"2", b"")))
            messages = [put(b"c", b"k", b"1"), SetRow(b"c", b"k", b"2", END_MS), put(b"c", b"", b"")]
            messages += [TouchRow(b"c", b"k", None), SwapRow(b"c", b"k", b"2", b"3", END_MS)]
            messages += [SwapRow(b"c", b"k", b"3", None, None), SwapRow(b"c", b"k", None, b"4", None)]
            messages += [batch(put(b"d", b"a", b"5"), Expect(b"d", b"a", None), DropRow(b"c", b"k")), run]
            messages += [DropRow(b"r", b"2"), put(b"r", b"3", b""), DropRange(b"r", b"1", b"4")]
            messages += [DropRange(b"c", b"", None), LastVersion()]
            same(store.apply(group(*messages), NOW_MS)[-1], 17, "the last version")
            expected = [wrote(1, b"c", b"k", b"1"), wrote(2, b"c", b"k", b"2"), wrote(3, b"c", b"", b"")]
            expected += [wrote(5, b"c", b"k", b"3"), told(6, "delete", b"c", b"k"), wrote(7, b"c", b"k", b"4")]
            expected += [wrote(8, b"d", b"a", b"5"), told(10, "delete", b"c", b"k"), wrote(11, b"r", b"1", b"in")]
            expected += [told(12, "delete", b"r", b"1"), wrote(13, b"r", b"2", b""), told(14, "delete", b"r", b"2")]
            expected += [wrote(15, b"r", b"3", b""), told(16, "delete_range", b"r", b"1", b"4")]
            expected += [told(17, "delete_range", b"c", b"")]
            answers(changes(store), expected, "the changes")
            answers(store.apply(group(ListChanges(0, ALL)), NOW_MS)[0], expected, "the changes, asked in a group")

    def test_what_changes_nothing_is_no_change(self) -> None:
        """A removal of no live row, a touch, an expectation, a swap that doesn't come to pass: none is a change."""
        with self.store(KEEPING) as store:
            store.apply(group(SetRow(b"c", b"ended", b"", NOW_MS), put(b"c", b"k", b"1")), NOW_MS)
            messages: list[Any] = [DropRow(b"c", b"ended"), DropRow(b"c", b"none"), DropRange(b"c", b"a", b"k")]
            messages += [DropRange(b"none", b"", None), DropRange(b"c", b"k\0", None), TouchRow(b"c", b"k", END_MS)]
            messages += [TouchRow(b"c", b"ended", None), batch(Expect(b"c", b"ended", None)), batch()]
            messages += [SwapRow(b"c", b"k", b"2", b"3", None), SwapRow(b"c", b"ended", b"", None, None), doing()]
            outcomes = store.apply(group(*messages), NOW_MS)
            answers(
                outcomes, [False, False, 0, 0, 0, True, False, 9, 9, False, False, []], "writes that change nothing"
            )
            answers(changes(store), [wrote(1, b"c", b"ended", b""), wrote(2, b"c", b"k", b"1")], "the changes")

    def test_expiries_are_changes(self) -> None:
        """A reaped row is a change with a version of its own, in the order of ends; one removed before isn't."""
        with self.store(KEEPING) as store:
            rows = [(b"c", b"late", 3), (b"c", b"b", 1), (b"b", b"z", 1), (b"c", b"a", 1), (b"c", b"first", 0)]
            messages: list[Any] = [SetRow(category, key, b"x", END_MS + end_ms) for category, key, end_ms in rows]
            messages += [SetRow(b"c", b"dropped", b"", END_MS), DropRow(b"c", b"dropped")]
            messages.append(SetRow(b"c", b"over", b"", END_MS))
            store.apply(group(*messages), NOW_MS)
            now_ms = END_MS + 5
            store.apply(group(put(b"c", b"over", b"")), now_ms)
            same(changes(store, 8, now_ms=now_ms), [wrote(9, b"c", b"over", b"")], "the changes before reaping")
            for limit, count in ((0, 0), (2, 2), (9, 3), (9, 0)):
                same(store.reap(now_ms, limit), count, f"rows reaped of at most {limit}")
            ended = [(b"c", b"first"), (b"b", b"z"), (b"c", b"a"), (b"c", b"b"), (b"c", b"late")]
            expected = [told(10 + at, "expire", *place) for at, place in enumerate(ended)]
            answers(changes(store, 9, now_ms=now_ms), expected, "the changes of reaping")
            same(store.status().last_version, 14, "the version after reaping")
            same(store.apply(group(put(b"c", b"k", b""), LastVersion()), now_ms), [None, 15], "a put after reaping")

    def test_removals_leave_ended_rows_to_reaping(self) -> None:
        """Where changes are kept, a removal that meets ended rows leaves them, so that their expiry is told as well."""
        for drop in (DropRow(b"c", b"b"), DropRange(b"c", b"", None), DropRange(b"c", b"b", b"c")):
            with self.store(KEEPING) as store:
                rows = [
                    SetRow(b"c", b"a", b"1", None),
                    SetRow(b"c", b"b", b"2", END_MS),
                    SetRow(b"c", b"c", b"3", None),
                ]
                store.apply(group(*rows), NOW_MS)
                count = store.apply(group(drop), END_MS)[0]
                wide = isinstance(drop, DropRange) and drop.stop is None
                same(count, 2 if wide else False if isinstance(drop, DropRow) else 0, f"{drop} over an ended row")
                same(store.reap(END_MS, 9), 1, f"rows reaped after {drop}")
                expected = [told(4, "delete_range", b"c", b"")] if wide else []
                expected.append(told(5, "expire", b"c", b"b"))
                answers(changes(store, 3, now_ms=END_MS), expected, f"the changes of {drop} and reaping")

    def test_what_was_undone_never_happened(self) -> None:
        """A failed batch or run, or one caught inside a run, and what is over the quota, leave no change behind."""
        with self.store(StoreOptions(max_bytes=10, feed_changes_max=1000)) as store:
            bad = doing(SetRow(b"c", b"bad", b"", None), DropRange(b"c", b"", None), error=Stop())

            def then(within: Within, error: BaseException | None) -> Any:
                within.do(SetRow(b"c", b"then", b"", None))
                return type(error), len(within.do(ListChanges(0, ALL)))

            messages = [put(b"c", b"k", b"1"), bad, trying(bad, then), put(b"c", b"big", b"1" * 10)]
            messages += [batch(put(b"c", b"x", b""), Expect(b"c", b"k", 9)), SwapRow(b"c", b"y", None, b"1" * 10, None)]
            messages += [
                batch(put(b"c", b"x", b""), put(b"c", b"x", b"1" * 10)),
                doing(SetRow(b"c", b"x", b"1" * 10, None)),
            ]
            outcomes = store.apply(group(*messages, put(b"c", b"l", b"2")), NOW_MS)
            kinds = [type(outcome) for outcome in outcomes]
            same(kinds, [type(None), Failed, tuple, *[Failed] * 5, type(None)], "the kinds of outcomes")
            same(outcomes[2], (Stop, 2), "the changes that a run saw after what it caught")
            expected = [wrote(1, b"c", b"k", b"1"), wrote(2, b"c", b"then", b""), wrote(3, b"c", b"l", b"2")]
            answers(changes(store), expected, "the changes beside what was undone")

    def test_changes_come_in_pages(self) -> None:
        """The first `limit` changes after a version come in order, whether or not that version was a change."""
        with self.store(KEEPING) as store:
            messages = [put(b"c", b"%d" % at, b"") if at % 3 else DropRow(b"c", b"none") for at in range(90)]
            store.apply(group(*messages), NOW_MS)
            every = [wrote(at + 1, b"c", b"%d" % at, b"") for at in range(90) if at % 3]
            for after in (0, 1, 2, 3, 4, 45, 88, 89, 90, 91, 1000):
                for limit in (0, 1, 2, 7, ALL):
                    expected = [change for change in every if change.version > after][:limit]
                    same(changes(store, after, limit), expected, f"{limit} changes after {after}")

    def test_the_newest_changes_are_kept(self) -> None:
        """So many changes as were asked for are kept; to whom an older one is missing the oldest kept is told."""
        for kept in (1, 3, 64):
            for size in (1, 5, 100, 700):
                with self.store(StoreOptions(feed_changes_max=kept)) as store:
                    places = group(*[put(b"c", b"%04d" % (at % 50), b"%d" % at) for at in range(size)])
                    for times in (1, 2, 3):
                        store.apply(places, NOW_MS)
                        last = times * size
                        first = max(1, last - kept + 1)
                        what = f"{last} changes, {kept} kept"
                        every = [wrote(v, b"c", b"%04d" % ((v - 1) % size % 50), b"%d" % ((v - 1) % size))
                                 for v in range(first, last + 1)]  # fmt: skip
                        answers(changes(store, first - 1), every, what)
                        same(changes(store, last), [], f"{what}, none asked for")
                        same(changes(store, last - 1), every[-1:], f"{what}, the last asked for")
                        for after in {0, first // 2, first - 2}:
                            if 0 <= after < first - 1:
                                truncated(changes(store, after), first, f"{what}, asked after {after}")
                                outcome = store.apply(group(ListChanges(after, 0)), NOW_MS)[0]
                                truncated(outcome, first, f"{what}, asked after {after} in a group")

    def test_the_newest_are_kept_in_the_middle_of_a_group_too(self) -> None:
        """A read between writes tells what would be kept if the group ended there."""
        with self.store(StoreOptions(feed_changes_max=3)) as store:
            puts = [put(b"c", b"%d" % number, b"") for number in range(1, 6)]
            everything, newest = ListChanges(0, 10), ListChanges(2, 10)
            outcomes = store.apply(group(*puts, everything, newest, put(b"c", b"6", b""), newest), NOW_MS)
            truncated(outcomes[5], 3, "all changes, in the middle of a group")
            same(outcomes[6], [wrote(at, b"c", b"%d" % at, b"") for at in (3, 4, 5)], "the newest, in the middle")
            truncated(outcomes[8], 4, "the same after one more")

    def test_versions_that_changed_nothing_are_not_missed(self) -> None:
        """Only a change that was dropped is missing: versions that never were a change can be asked for."""
        with self.store(StoreOptions(feed_changes_max=2)) as store:
            nothing = [DropRow(b"c", b"none")] * 5
            store.apply(group(*nothing, put(b"c", b"a", b""), *nothing, put(b"c", b"b", b"")), NOW_MS)
            both = [wrote(6, b"c", b"a", b""), wrote(12, b"c", b"b", b"")]
            same(changes(store, 0), both, "the changes when none was dropped")
            store.apply(group(*nothing, put(b"c", b"c", b"")), NOW_MS)
            for after in (0, 5):
                truncated(changes(store, after), 12, f"the changes after {after} when the one of 6 was dropped")
            for after in (6, 11):
                same(changes(store, after, 1), both[1:], f"the first change after {after}")
            store.apply(group(SetRow(b"c", b"d", b"", END_MS), *nothing), NOW_MS)
            same(store.reap(END_MS, 1), 1, "rows reaped")
            truncated(changes(store, 17, now_ms=END_MS), 19, "the changes after 17 when reaping dropped one")
            expected = [wrote(19, b"c", b"d", b""), told(25, "expire", b"c", b"d")]
            same(changes(store, 18, now_ms=END_MS), expected, "the changes when reaping dropped one")

    def test_a_store_that_keeps_none(self) -> None:
        """Without a feed, asking for changes is `Misuse`, an outcome like others; a run has it raised."""
        with self.store() as store:
            outcomes = store.apply(group(put(b"c", b"k", b"1"), ListChanges(0, 1), put(b"c", b"l", b"2")), NOW_MS)
            failed(outcomes[1], Misuse, {}, "changes in a group")
            same([outcomes[0], outcomes[2]], [None, None], "what stands beside it")
            failed(changes(store), Misuse, {}, "changes outside one")
            failed(store.apply(group(doing(ListChanges(0, 1))), NOW_MS)[0], Misuse, {}, "changes in a run")
            kept = trying(ListChanges(0, 1), lambda within, error: (type(error), within.do(DropRow(b"c", b"k"))))
            same(store.apply(group(kept), NOW_MS), [(Misuse, True)], "a run that goes on without")
            same(dump(store), {b"c": [StoredRow(b"l", b"2", 2, None)]}, "the rows")

    def test_changes_missing_in_a_run(self) -> None:
        """A run that asks for changes which are gone has `FeedTruncated` raised, and may go on."""
        with self.store(StoreOptions(feed_changes_max=1)) as store:
            store.apply(group(put(b"c", b"k", b"1"), put(b"c", b"k", b"2")), NOW_MS)
            truncated(store.apply(group(doing(ListChanges(0, 1))), NOW_MS)[0], 2, "changes asked for in a run")
            kept = trying(ListChanges(0, 1), lambda within, error: (type(error), within.do(ListChanges(1, 9))))
            expected = (FeedTruncated, [wrote(2, b"c", b"k", b"2")])
            same(store.apply(group(kept), NOW_MS), [expected], "a run that asks again")

    def test_changes_lead_to_the_rows(self) -> None:
        """Whoever does what the changes say, page by page, has the rows, and everything once and in order."""
        for kept in (5000, 40):
            chance = random.Random(4)  # noqa: S311 - the same writes every time
            with self.store(StoreOptions(feed_changes_max=kept)) as store:
                now_ms, seen, held = NOW_MS, 0, dict[tuple[bytes, bytes], bytes]()
                for _ in range(200):
                    now_ms += chance.choice((0, 1, 9))
                    store.apply(group(*[_any_write(chance, now_ms) for _ in range(chance.randrange(12))]), now_ms)
                    for limit in (3, ALL):
                        store.reap(now_ms, limit)
                    seen = follow(store, held, seen, now_ms)
                    rows = {(name, row.key): row.payload for name in (b"c", b"d")
                            for row in store.read(ListEntries(name), now_ms)}  # fmt: skip
                    same(held, rows, f"the rows that the changes lead to, {kept} kept")


def _any_write(chance: random.Random, now_ms: int) -> Any:
    """Return some write of a few keys that has about as many changes as operations."""
    category, key, payload = chance.choice((b"c", b"d")), b"%d" % chance.randrange(9), b"%d" % chance.randrange(3)
    end_ms = chance.choice((None, now_ms + chance.randrange(-1, 20)))
    writes: list[Any] = [put(category, key, payload), SetRow(category, key, payload, end_ms), DropRow(category, key)]
    writes += [DropRange(category, key, b"%d" % chance.randrange(9)), TouchRow(category, key, end_ms)]
    writes += [SwapRow(category, key, payload, chance.choice((None, b"new")), end_ms)]
    some = [write for write in writes[1:4] if chance.random() < 0.5]
    return chance.choice([*writes, batch(*some), doing(*some), doing(*some, error=Stop())])
