"""Checks of quotas: how many bytes are in use, what is refused, and what is undone with it.

Rules:
  1. What is refused is looked at from all sides: the outcome, the row, the version, the bytes, the neighbours.

Doesn't know: pytest, any adapter.
"""

from __future__ import annotations

import random
from typing import Any

from persistency.errors import Conflict
from persistency.storage.port import (
    DropRange,
    DropRow,
    Expect,
    GetRow,
    LastVersion,
    SetRow,
    Store,
    StoredRow,
    StoreOptions,
    SwapRow,
    TouchRow,
    UsedBytes,
    Within,
)
from persistency.testing.checks import (
    END_MS,
    NOW_MS,
    TEN,
    Checks,
    Stop,
    answers,
    batch,
    doing,
    dump,
    failed,
    group,
    put,
    refused,
    same,
    trying,
    used,
)


def counted(store: Store, now_ms: int) -> int:
    """Return the bytes of all live payloads as the rows themselves tell them."""
    return sum(len(row.payload) for rows in dump(store, now_ms).values() for row in rows)


class QuotaChecks(Checks):
    """What `max_bytes` does."""

    def test_writes_over_the_quota_are_refused(self) -> None:
        """A put, a `SetRow` or a swap that takes the job over its quota fails alone and changes nothing."""
        over: list[Any] = [put(b"c", b"k", b"123456"), SetRow(b"c", b"k", b"123456", None)]
        over += [SetRow(b"c", b"k", b"123456", END_MS), SwapRow(b"c", b"k", b"12", b"123456", None)]
        over += [SwapRow(b"d", b"new", None, b"1234", None), put(b"d", b"new", b"1234"), put(b"c", b"l", b"1234")]
        for message in over:
            with self.store(TEN) as store:
                store.apply(group(put(b"c", b"k", b"12"), put(b"d", b"k", b"12345")), NOW_MS)
                same(used(store), 7, "the bytes in use")
                alone = store.apply(group(message), NOW_MS)
                refused(alone[0], 11, 10, f"{message} alone")
                same(used(store), 7, f"the bytes in use after {message}")
                same(store.status().last_version, 2, f"the version after {message}")
                read = [GetRow(b"c", b"k"), GetRow(b"d", b"new"), LastVersion(), UsedBytes()]
                messages = [put(b"e", b"1", b"1"), message, *read, put(b"e", b"2", b"2")]
                outcomes = store.apply(group(*messages), NOW_MS)
                refused(outcomes.pop(1), 12, 10, f"{message} among others")
                answers(outcomes, [None, b"12", None, 3, 8, None], f"the neighbours of {message}")
                rows = {b"c": [StoredRow(b"k", b"12", 1, None)], b"d": [StoredRow(b"k", b"12345", 2, None)]}
                rows[b"e"] = [StoredRow(b"1", b"1", 3, None), StoredRow(b"2", b"2", 4, None)]
                same(dump(store), rows, f"the rows after {message}")
                same(store.next_expiry_ms, None, f"when the next row ends, {message} having been refused")

    def test_the_quota_can_be_filled(self) -> None:
        """Up to the last byte is allowed, and then what doesn't grow; of one byte too many the error says the sum."""
        with self.store(TEN) as store:
            steps: list[tuple[Any, Any, int]] = [
                (put(b"c", b"a", b"1" * 10), None, 10),
                (put(b"c", b"empty", b""), None, 10),
                (put(b"c", b"a", b"2" * 10), None, 10),
                (SwapRow(b"c", b"a", b"2" * 10, b"3" * 10, None), True, 10),
                (SwapRow(b"c", b"a", b"2" * 10, b"3" * 99, None), False, 10),
                (TouchRow(b"c", b"a", END_MS), True, 10),
                (put(b"c", b"b", b"1"), 11, 10),
                (put(b"c", b"a", b"4" * 11), 11, 10),
                (put(b"c", b"a", b"4" * 4), None, 4),
                (put(b"c", b"b", b"1" * 7), 11, 4),
                (put(b"c", b"b", b"1" * 6), None, 10),
                (DropRow(b"c", b"b"), True, 4),
                (SetRow(b"c", b"b", b"1" * 6, END_MS), None, 10),
                (SwapRow(b"c", b"b", b"1" * 6, None, None), True, 4),
                (put(b"d", b"b", b"1" * 3), None, 7),
                (DropRange(b"c", b"", None), 2, 3),
                (put(b"d", b"c", b"1" * 7), None, 10),
            ]
            for message, answer, nbytes in steps:
                outcome = store.apply(group(message), NOW_MS)[0]
                if type(answer) is int and answer > 10:
                    refused(outcome, answer, 10, f"{message}")
                else:
                    same(outcome, answer, f"{message}")
                same(used(store), nbytes, f"the bytes in use after {message}")
        with self.store(StoreOptions(max_bytes=0)) as store:
            outcomes = store.apply(group(put(b"c", b"a", b""), put(b"c", b"b", b"1"), UsedBytes()), NOW_MS)
            refused(outcomes[1], 1, 0, "a byte where none is allowed")
            same([outcomes[0], outcomes[2]], [None, 0], "a row of no bytes where none is allowed")

    def test_puts_are_judged_one_by_one(self) -> None:
        """In a group of puts each is held to the quota as the ones before it left it, also where keys are repeated."""
        with self.store(TEN) as store:
            sizes = [(b"a", 4), (b"b", 4), (b"c", 4), (b"a", 7), (b"a", 6), (b"c", 1), (b"b", 0), (b"c", 4), (b"c", 5)]
            outcomes = store.apply(group(*[put(b"c", key, b"x" * size) for key, size in sizes]), NOW_MS)
            for at, nbytes in ((2, 12), (3, 11), (5, 11), (8, 11)):
                refused(outcomes[at], nbytes, 10, f"put {at} of a group")
                outcomes[at] = None
            answers(outcomes, [None] * 9, "the other puts of the group")
            rows = [
                StoredRow(b"a", b"x" * 6, 3, None),
                StoredRow(b"b", b"", 4, None),
                StoredRow(b"c", b"x" * 4, 5, None),
            ]
            same(dump(store), {b"c": rows}, "the rows after a group of puts")
        with self.store(StoreOptions(max_bytes=1000)) as store:
            outcomes = store.apply(group(*[put(b"c", b"%04d" % at, b"x" * 3) for at in range(700)]), NOW_MS)
            answers(outcomes[:333], [None] * 333, "puts that fit")
            for at in (333, 334, 500, 699):
                refused(outcomes[at], 1002, 1000, f"put {at} of 700")
            same([len(dump(store)[b"c"]), used(store), store.status().last_version], [333, 999, 333], "what fitted")

    def test_ended_rows_use_nothing(self) -> None:
        """A row counts until its end and no longer, reaped or not, written over or not, stored in time or too late."""
        with self.store(TEN) as store:
            rows = [SetRow(b"c", b"a", b"1" * 5, END_MS), SetRow(b"c", b"b", b"1" * 3, END_MS + 10)]
            store.apply(group(*rows, put(b"c", b"c", b"12")), NOW_MS)
            for now_ms, nbytes in ((NOW_MS, 10), (END_MS - 1, 10), (END_MS, 5), (END_MS, 5), (END_MS + 1, 5)):
                same(used(store, now_ms), nbytes, f"the bytes in use at {now_ms}")
            over = put(b"c", b"d", b"1" * 6)
            refused(store.apply(group(over), END_MS + 1)[0], 11, 10, "a put beside a row that has ended")
            late = SetRow(b"c", b"late", b"1" * 99, END_MS)
            outcomes = store.apply(group(put(b"c", b"a", b"1" * 5), UsedBytes(), late, UsedBytes()), END_MS + 1)
            answers(outcomes, [None, 10, None, 10], "a put over a row that has ended, and a row that comes too late")
            same(store.reap(END_MS + 1, 9), 1, "rows reaped")
            same(used(store, END_MS + 1), 10, "the bytes in use after reaping")
            outcomes = store.apply(group(DropRow(b"c", b"b"), DropRange(b"c", b"b", b"c"), UsedBytes()), END_MS + 10)
            answers(outcomes, [False, 0, 7], "the removal of a row that has ended")
            outcomes = store.apply(group(put(b"c", b"e", b"123"), put(b"c", b"f", b"1")), END_MS + 10)
            same(outcomes[0], None, "a put into the room of a row that has ended")
            refused(outcomes[1], 11, 10, "a put beyond that room")
            same(store.reap(END_MS + 99, 9), 0, "rows reaped that were removed")
            same(used(store, END_MS + 99), 10, "the bytes in use at last")

    def test_touches_and_the_bytes_in_use(self) -> None:
        """A touched row counts until its new end; touched to the past, not at all."""
        with self.store(TEN) as store:
            rows = [SetRow(b"c", b"a", b"1" * 4, END_MS), SetRow(b"c", b"b", b"1" * 3, END_MS), put(b"c", b"c", b"12")]
            store.apply(group(*rows, TouchRow(b"c", b"a", END_MS + 10), TouchRow(b"c", b"b", None)), NOW_MS)
            store.apply(group(TouchRow(b"c", b"c", END_MS + 5), TouchRow(b"c", b"a", END_MS + 10)), NOW_MS)
            for now_ms, nbytes in ((END_MS - 1, 9), (END_MS, 9), (END_MS + 5, 7), (END_MS + 9, 7), (END_MS + 10, 3)):
                same(used(store, now_ms), nbytes, f"the bytes in use {now_ms - END_MS} ms after the first ends")
            now_ms = END_MS + 10
            outcomes = store.apply(group(TouchRow(b"c", b"b", now_ms), UsedBytes(), TouchRow(b"c", b"b", None)), now_ms)
            answers(outcomes, [True, 0, False], "a touch to the past")
            same(store.reap(now_ms, 9), 3, "rows reaped")
            same(used(store, now_ms), 0, "the bytes in use after reaping")

    def test_a_batch_is_judged_by_its_end(self) -> None:
        """A batch may go over the quota on its way; if it ends over it, and higher than it began, it never was."""
        with self.store(TEN) as store:
            store.apply(group(put(b"c", b"a", b"1" * 6), SetRow(b"c", b"ended", b"1" * 9, NOW_MS)), NOW_MS)
            fits = [put(b"c", b"b", b"1" * 8), DropRow(b"c", b"a")]
            bad = batch(put(b"c", b"x", b"1" * 2), DropRow(b"c", b"b"), SetRow(b"c", b"y", b"1" * 9, END_MS))
            conflict = batch(put(b"c", b"x", b"1" * 99), Expect(b"c", b"b", 9))
            messages: list[Any] = [batch(*fits), UsedBytes(), bad, UsedBytes(), LastVersion(), conflict]
            messages += [batch(put(b"c", b"a", b"12")), put(b"c", b"z", b"1"), batch(put(b"c", b"empty", b"")), batch()]
            outcomes = store.apply(group(*messages), NOW_MS)
            refused(outcomes[2], 11, 10, "a batch that ends over the quota")
            failed(outcomes[5], Conflict, {"actual": 3}, "a batch that is refused for two reasons")
            refused(outcomes[7], 11, 10, "a put after batches")
            del outcomes[7], outcomes[5], outcomes[2]
            answers(outcomes, [4, 8, 8, 4, 5, 6, 6], "batches about the quota")
            rows = [
                StoredRow(b"a", b"12", 5, None),
                StoredRow(b"b", b"1" * 8, 3, None),
                StoredRow(b"empty", b"", 6, None),
            ]
            same(dump(store), {b"c": rows}, "the rows after batches")
            same(store.reap(NOW_MS, 9), 1, "rows reaped after batches")
            same(store.next_expiry_ms, None, "when the next row ends, its batch having been refused")

    def test_a_run_is_judged_by_its_end(self) -> None:
        """Within a run nothing is refused, but the outermost as a whole, by where it ends and where it began."""
        with self.store(TEN) as store:
            store.apply(group(put(b"c", b"a", b"1" * 6)), NOW_MS)
            big = [SetRow(b"c", b"b", b"1" * 9, None), SwapRow(b"c", b"c", None, b"1" * 9, None)]
            inner = [
                batch(put(b"c", b"d", b"1" * 9), put(b"c", b"e", b"1" * 9)),
                doing(SetRow(b"c", b"f", b"1" * 9, None)),
            ]
            fits = doing(*big, *inner, UsedBytes(), DropRange(b"c", b"b", None), SetRow(b"c", b"b", b"1234", None))
            outcomes = store.apply(group(fits, UsedBytes()), NOW_MS)
            told = [(None, 2), (True, 3), (5, 5), ([(None, 6)], 6), (51, 6), (5, 7), (None, 8)]
            answers(outcomes, [told, 10], "a run that ends within the quota")
            held = dump(store)
            overs: list[tuple[list[Any], int]] = [([SetRow(b"c", b"c", b"1", None)], 11), ([inner[0]], 28)]
            for over, nbytes in [*overs, ([DropRow(b"c", b"a"), inner[1]], 13)]:
                outcomes = store.apply(group(put(b"n", b"", b""), doing(*over), LastVersion(), UsedBytes()), NOW_MS)
                version = store.status().last_version
                refused(outcomes[1], nbytes, 10, f"a run of {over}")
                answers([outcomes[0], *outcomes[2:]], [None, version, 10], f"what stands beside a run of {over}")
                own = {b"n": [StoredRow(b"", b"", version, None)]}
                same(dump(store), held | own, f"the rows after a run of {over}")
            same(store.status().last_version, 11, "the version after runs")

    def test_what_was_undone_uses_nothing(self) -> None:
        """What a failed run, or a caught failure inside one, has written or removed counts as it did before."""
        with self.store(TEN) as store:
            store.apply(group(put(b"c", b"a", b"1" * 4), SetRow(b"c", b"b", b"1" * 3, END_MS)), NOW_MS)
            bad = doing(
                SetRow(b"c", b"x", b"1" * 99, END_MS), DropRow(b"c", b"a"), TouchRow(b"c", b"b", 1), error=Stop()
            )

            def then(within: Within, error: BaseException | None) -> Any:
                return type(error), within.do(UsedBytes()), within.do(SetRow(b"c", b"c", b"123", None))

            outcomes = store.apply(group(bad, UsedBytes(), trying(bad, then), UsedBytes()), NOW_MS)
            failed(outcomes[0], Stop, {}, "a run that raised")
            answers(outcomes[1:], [7, (Stop, 7, None), 10], "the bytes in use after what was undone")
            refused(store.apply(group(put(b"c", b"d", b"1")), NOW_MS)[0], 11, 10, "a put after what was undone")
            same(used(store, END_MS), 7, "the bytes in use after a row's end that was undone and set again")

    def test_the_count_stays_exact(self) -> None:
        """After any writes, ends and reaps the bytes in use are those of the live rows, with a quota or without."""
        for options in (StoreOptions(max_bytes=60), StoreOptions(max_bytes=10**9), StoreOptions()):
            chance = random.Random(3)  # noqa: S311 - the same writes every time
            with self.store(options) as store:
                now_ms = NOW_MS
                for _ in range(150):
                    now_ms += chance.choice((0, 0, 1, 5))
                    messages = [_any_write(chance, now_ms) for _ in range(chance.choice((1, 2, 9, 80)))]
                    store.apply(group(*messages), now_ms)
                    if chance.random() < 0.2:
                        store.reap(now_ms, chance.randrange(4))
                    same(used(store, now_ms), counted(store, now_ms), f"the bytes in use at {now_ms}")
                    if options.max_bytes == 60 and used(store, now_ms) > 60:
                        raise AssertionError(f"expected at most 60 bytes in use, got {used(store, now_ms)}")
                same(store.apply(group(UsedBytes()), now_ms + 99), [counted(store, now_ms + 99)], "the bytes at last")


def _any_write(chance: random.Random, now_ms: int) -> Any:
    """Return some write of a few keys, half of them with an end that is near or over."""
    category, key, payload = chance.choice((b"c", b"d")), b"%d" % chance.randrange(9), b"x" * chance.randrange(15)
    end_ms = chance.choice((None, now_ms + chance.randrange(-1, 9)))
    writes: list[Any] = [put(category, key, payload), SetRow(category, key, payload, end_ms), DropRow(category, key)]
    writes += [TouchRow(category, key, end_ms), SwapRow(category, key, None, payload, end_ms)]
    writes += [SetRow(category, key, payload, end_ms), DropRange(category, key, b"%d" % chance.randrange(9))]
    kind = chance.randrange(12)
    if kind < len(writes):
        return writes[kind]
    if kind == 10:
        return doing(*[write for write in writes[1:5] if chance.random() < 0.6], error=chance.choice((None, Stop())))
    return batch(*[write for write in writes[:3] if chance.random() < 0.6], *[Expect(b"c", b"0", None)] * (kind == 11))
