"""Checks of rows without an end: puts, reads, removals, ranges, in groups of every size.

Rules:
  1. Each check asks on both ways there are: in a group, among its writes, and outside one.

Doesn't know: pytest, any adapter; time, batches, quotas and changes are checked elsewhere.
"""

from __future__ import annotations

import random
from typing import Any

from persistency.storage.port import (
    Barrier,
    Batch,
    CountRange,
    DropRange,
    DropRow,
    GetEntry,
    GetRow,
    GetRows,
    Group,
    HasRow,
    LastVersion,
    ListCategories,
    ListEntries,
    Prefetching,
    ScanRange,
    SetRow,
    StoredRow,
    UsedBytes,
)
from persistency.testing.checks import NOW_MS, Checks, answers, batch, dump, group, put, same, used

GROUP_SIZES = (*range(1, 71), 127, 128, 255, 256, 257, 260, 288, 292, 293, 511, 512, 513, 549, 768, 999, 1000)


class RowChecks(Checks):
    """What plain puts, removals and reads do."""

    def test_a_new_store_is_empty(self) -> None:
        """A new store has no rows, no categories and version 0, in a group and outside one."""
        with self.store() as store:
            reads: list[Any] = [ListCategories(), LastVersion(), GetRow(b"c", b"k"), HasRow(b"c", b"k")]
            reads += [GetEntry(b"c", b"k"), GetRows(b"c", (b"k",))]
            reads += [ScanRange(b"c", b"", None), CountRange(b"c", b"", None), ListEntries(b"c"), UsedBytes()]
            empty = [[], 0, None, False, None, [], [], 0, [], 0]
            answers(store.apply(group(*reads), NOW_MS), empty, "reads of an empty store in a group")
            answers([store.read(read, NOW_MS) for read in reads], empty, "reads of an empty store")
            same(store.next_expiry_ms, None, "when the first row of an empty store ends")
            same(store.apply([], NOW_MS), [], "an empty group")
            same(store.status().last_version, 0, "the last version of an empty store")
            same(type(store.reads_in_place), bool, "the type of reads_in_place")

    def test_puts_are_kept_in_order(self) -> None:
        """A group of plain puts answers `None` each, the later of two puts of a key wins, versions follow arrival."""
        with self.store() as store:
            rows = [put(b"c", b"b", b"1"), put(b"c", b"a", b"2"), put(b"d", b"b", b"3"), put(b"c", b"b", b"4")]
            same(store.apply(group(*rows), NOW_MS), [None] * 4, "the outcomes of puts")
            of_c = [StoredRow(b"a", b"2", 2, None), StoredRow(b"b", b"4", 4, None)]
            same(dump(store), {b"c": of_c, b"d": [StoredRow(b"b", b"3", 3, None)]}, "the rows")
            same(store.status().last_version, 4, "the last version")

    def test_groups_of_every_size(self) -> None:
        """Groups of 1 to 1,000 puts keep every row and version: keys sorted, shuffled, repeated, categories mixed."""
        chance = random.Random(1)  # noqa: S311 - the same groups every time
        for shape in range(5):
            with self.store() as store:
                version, held = 0, dict[tuple[bytes, bytes], tuple[bytes, int]]()
                for size in GROUP_SIZES:
                    rows = _rows(shape, size, chance)
                    same(store.apply(group(*rows), NOW_MS), [None] * size, f"the outcomes of {size} puts")
                    for category, key, payload in rows:
                        version += 1
                        held[category, key] = payload, version
                    same(store.status().last_version, version, f"the last version after {size} puts")
                    for category, key, _ in chance.sample(rows, min(size, 8)):
                        got = store.read(GetEntry(category, key), NOW_MS)
                        same(got, StoredRow(key, *held[category, key], None), f"a row of {size} puts, shape {shape}")
                names = sorted({category for category, _ in held})
                same(store.read(ListCategories(), NOW_MS), names, f"the categories, shape {shape}")
                for name in names:  # by what tells many rows at once: they are thousands
                    every = [StoredRow(key, *row, None) for (category, key), row in held.items() if category == name]
                    every.sort(key=lambda row: row.version)
                    same(store.read(ListEntries(name), NOW_MS), every, f"all the rows by version, shape {shape}")
                    in_order = sorted((row.key, row.payload) for row in every)
                    same(store.scan(ScanRange(name, b"", None), NOW_MS), in_order, f"all the rows, shape {shape}")

    def test_bytes_at_the_bounds(self) -> None:
        """Keys and payloads are any bytes: empty, NUL, 0xFF, 8 KiB keys, 255-byte categories, 1 MiB payloads."""
        keys = [b"", b"\0", b"\0\0", b"\0\xff", b"a", b"a\0", b"a\0b", b"a\xff", b"b", b"\xff", b"\xff\0", b"\xff\xff"]
        keys += [b"k" * 8192, b"k" * 8191 + b"l"]
        keys.sort()
        with self.store() as store:
            for category in (b"\0", b"c", b"\xff" * 255):
                rows = [(key, b"" if at % 3 == 0 else key[::-1]) for at, key in enumerate(keys)]
                puts = [put(category, *row) for row in reversed(rows)]
                for places in [group(*puts)] if category == b"c" else puts:
                    store.apply(places, NOW_MS)
                same(store.scan(ScanRange(category, b"", None), NOW_MS), rows, "odd keys in order")
                same([store.get(category, key, NOW_MS) for key in keys], [row[1] for row in rows], "odd keys by get")
            large = bytes(range(256)) * 4096
            for some in ([large], [large, b"", *(large[at:] for at in range(9))]):
                expected = list(enumerate(some, store.status().last_version + 1))
                store.apply(group(*[put(b"e", b"%02d" % at, payload) for at, payload in enumerate(some)]), NOW_MS)
                same([(row.version, row.payload) for row in dump(store)[b"e"]], expected, "payloads of 1 MiB")

    def test_reads_among_writes(self) -> None:
        """A read in a group sees exactly the writes before it in the group, of every kind, and none after."""
        with self.store() as store:
            reads: list[Any] = [GetRow(b"c", b"k"), HasRow(b"c", b"k"), GetEntry(b"c", b"k"), GetRows(b"c", (b"k",))]
            reads += [ScanRange(b"c", b"", None), CountRange(b"c", b"", None), ListCategories(), LastVersion()]
            reads += [ListEntries(b"c"), UsedBytes()]

            def state(payload: bytes | None, version: int) -> list[Any]:
                if payload is None:
                    return [None, False, None, [], [], 0, [], version, [], 0]
                pairs = [(b"k", payload)]
                row = StoredRow(b"k", payload, version, None)
                return [payload, True, row, pairs, pairs, 1, [b"c"], version, [row], len(payload)]

            steps: list[tuple[Any, Any, bytes | None]] = [
                (put(b"c", b"k", b"1"), None, b"1"),
                (put(b"c", b"k", b""), None, b""),
                (DropRow(b"c", b"k"), True, None),
                (DropRow(b"c", b"k"), False, None),
                (put(b"c", b"k", b"2"), None, b"2"),
                (batch(put(b"c", b"k", b"3")), 6, b"3"),
                (DropRange(b"c", b"", None), 1, None),
                (batch(DropRow(b"c", b"k"), put(b"c", b"k", b"4")), 9, b"4"),
                (batch(put(b"c", b"k", b"5"), DropRow(b"c", b"k")), 11, None),
                (put(b"c", b"k", b"6"), None, b"6"),
            ]
            messages, expected, version = list(reads), state(None, 0), 0
            for message, answer, payload in steps:
                version += message.ops if isinstance(message, Batch) else 1
                messages += [message, *reads]
                expected += [answer, *state(payload, version)]
            same(store.apply(group(*messages), NOW_MS), expected, "reads among writes")

    def test_point_reads_of_pending_puts(self) -> None:
        """Runs of puts and point reads answer from the group itself or from the rows before it, whichever is later."""
        with self.store() as store:
            store.apply(group(put(b"c", b"old", b"o"), put(b"c", b"both", b"o")), NOW_MS)
            messages: list[Any] = []
            expected: list[Any] = []
            for at in range(300):
                key = b"%d" % (at % 7)
                messages += [put(b"c", key, b"%d" % at), GetRow(b"c", key), GetRow(b"c", b"old"), GetRow(b"d", key)]
                expected += [None, b"%d" % at, b"o", None]
                messages += [put(b"c", b"both", key), GetRow(b"c", b"both"), GetRow(b"c", b"%d" % ((at + 1) % 7))]
                expected += [None, key, b"%d" % (at - 6) if at >= 6 else None]
            same(store.apply(group(*messages), NOW_MS), expected, "puts and gets in turn")
            same(store.status().last_version, 602, "the version after puts and gets in turn")

    def test_point_reads_after_removals(self) -> None:
        """A point read after a removal never answers from a put before it, and sees the put after it."""
        read = GetRow(b"c", b"k")
        for drop in (DropRow(b"c", b"k"), DropRange(b"c", b"", None), batch(DropRow(b"c", b"k"))):
            with self.store() as store:
                messages = [put(b"c", b"k", b"1"), read, drop, read, put(b"c", b"k", b"2"), read]
                outcomes = store.apply(group(*messages), NOW_MS)
                same([outcomes[1], outcomes[3], outcomes[5]], [b"1", None, b"2"], f"reads around {drop}")
                same(store.get(b"c", b"k", NOW_MS), b"2", "the row afterwards")

    def test_reads_ahead_of_their_turn(self) -> None:
        """A read that was begun before it was posted answers as of its turn, whatever was done in between."""
        with self.store() as store:
            if not isinstance(store, Prefetching):
                return
            read, other = GetRow(b"c", b"k"), GetRow(b"c", b"other")
            between: list[tuple[Group, bytes | None]] = [
                ([], b"0"),
                (group(put(b"c", b"k", b"1")), b"1"),
                (group(other), b"1"),
                (group(SetRow(b"c", b"k", b"2", NOW_MS + 1), other), b"2"),
                (group(DropRow(b"c", b"k")), None),
                (group(put(b"c", b"k", b"3"), Barrier()), b"3"),
            ]
            store.apply(group(put(b"c", b"k", b"0"), put(b"c", b"other", b"x")), NOW_MS)
            store.prefetch(other)
            same(store.read(ScanRange(b"c", b"", None), NOW_MS), [(b"k", b"0"), (b"other", b"x")], "another read")
            for messages, payload in between:
                store.prefetch(read)
                if messages:
                    store.apply(messages, NOW_MS)
                same(store.apply(group(read), NOW_MS), [payload], f"what was asked ahead of {messages}")
                store.prefetch(read)
                same(store.apply(group(read, other), NOW_MS), [payload, b"x"], "two reads, of which one is ahead")
            store.apply(group(SetRow(b"c", b"k", b"4", NOW_MS + 5)), NOW_MS)
            for now_ms, payload in ((NOW_MS + 4, b"4"), (NOW_MS + 5, None)):
                store.prefetch(read)
                same(store.apply(group(read), now_ms), [payload], "a row that ends meanwhile")
            store.prefetch(read)  # and nothing more: it is closed all the same

    def test_drop_row(self) -> None:
        """Dropping a row answers whether it was there, takes a version either way, and touches no other row."""
        with self.store() as store:
            store.apply(group(put(b"c", b"a", b"1"), put(b"c", b"b", b"2"), put(b"d", b"a", b"3")), NOW_MS)
            drops = [DropRow(*place) for place in ((b"c", b"a"), (b"c", b"a"), (b"c", b""), (b"e", b"a"))]
            same(store.apply(group(*drops, LastVersion()), NOW_MS), [True, False, False, False, 7], "dropping rows")
            held = {b"c": [StoredRow(b"b", b"2", 2, None)], b"d": [StoredRow(b"a", b"3", 3, None)]}
            same(dump(store), held, "the rows left")

    def test_drop_range(self) -> None:
        """Dropping a range removes start <= key < stop in one category, answers how many, and takes one version."""
        keys = [b"", b"a", b"a\0", b"b", b"b\xff", b"c", b"\xff", b"\xff\xff"]
        spans = [(b"", b""), (b"b", b"a"), (b"a", b"a"), (b"a", b"a\0"), (b"a", b"b"), (b"b", b"c"), (b"", b"b")]
        for start, stop in [*spans, (b"c", None), (b"\xff\xff\xff", None), (b"", None), (b"aa", b"\xff")]:
            with self.store() as store:
                store.apply(group(*[put(name, key, key) for name in (b"c", b"d") for key in keys]), NOW_MS)
                doomed = [key for key in keys if start <= key and (stop is None or key < stop)]
                outcomes = store.apply(group(DropRange(b"c", start, stop), LastVersion()), NOW_MS)
                same(outcomes, [len(doomed), 2 * len(keys) + 1], f"dropping [{start!r}, {stop!r})")
                pairs = [(key, key) for key in keys if key not in doomed]
                same(store.scan(ScanRange(b"c", b"", None), NOW_MS), pairs, f"left by [{start!r}, {stop!r})")
                same(store.read(CountRange(b"d", b"", None), NOW_MS), len(keys), "the other category")

    def test_scans(self) -> None:
        """Ranges are half open, in key order or reversed, limited from where they start, with payloads or not."""
        keys = [b"", b"\0", b"a", b"a\0", b"aa", b"b", b"b\xff", b"c", b"\xff", b"\xff\xff"]
        with self.store() as store:
            store.apply(group(*[put(b"c", key, b"p" + key) for key in reversed(keys)], put(b"d", b"a", b"d")), NOW_MS)
            spans: list[tuple[bytes, bytes | None]] = [(start, stop) for start in keys for stop in [*keys, None]]
            for start, stop in spans:
                inside = [key for key in keys if start <= key and (stop is None or key < stop)]
                same(store.read(CountRange(b"c", start, stop), NOW_MS), len(inside), f"count [{start!r}, {stop!r})")
                for reverse in (False, True):
                    for limit in (None, 0, 1, 3, 100):
                        span = ScanRange(b"c", start, stop, reverse, limit)
                        rows = [(key, b"p" + key) for key in (inside[::-1] if reverse else inside)][:limit]
                        same(store.scan(span, NOW_MS), rows, repr(span))
                        bare = [(key, b"") for key, _ in rows]
                        same(store.read(span._replace(keys_only=True), NOW_MS), bare, f"keys only, {span!r}")
            same(store.read(CountRange(b"none", b"", None), NOW_MS), 0, "the count of a category without rows")

    def test_categories_are_apart(self) -> None:
        """One key in two categories is two rows; categories come in byte order, and only those with a row."""
        names = [b"\0", b"A", b"a", b"a\0", b"a" * 255, b"aa", b"b", "é".encode(), b"\xff"]
        with self.store() as store:
            store.apply(group(*[put(name, b"k", name) for name in sorted(names, reverse=True)]), NOW_MS)
            same(store.read(ListCategories(), NOW_MS), sorted(names), "the categories")
            same([store.get(name, b"k", NOW_MS) for name in names], names, "one key in many categories")
            outcomes = store.apply(group(DropRow(b"a", b"k"), DropRange(b"aa", b"", None), ListCategories()), NOW_MS)
            same(outcomes, [True, 1, sorted({*names} - {b"a", b"aa"})], "the categories left")

    def test_get_rows(self) -> None:
        """Many keys at once come in the order asked, repeated if asked twice, the missing left out."""
        with self.store() as store:
            store.apply(group(*[put(b"c", b"%d" % at, b"p%d" % at) for at in range(10)]), NOW_MS)
            asked = (b"7", b"none", b"3", b"", b"9", b"3", b"0")
            rows = [(key, b"p" + key) for key in (b"7", b"3", b"9", b"3", b"0")]
            same(store.read(GetRows(b"c", asked), NOW_MS), rows, "rows by key")
            same(store.read(GetRows(b"c", ()), NOW_MS), [], "no keys")
            same(store.apply(group(GetRows(b"d", asked)), NOW_MS), [[]], "keys of another category")

    def test_barriers(self) -> None:
        """A barrier answers `None`, alone or among others, with `sync` or without, and takes no version."""
        with self.store() as store:
            same(store.apply(group(Barrier(), Barrier(sync=True)), NOW_MS), [None, None], "barriers alone")
            messages = [put(b"c", b"k", b"1"), Barrier(sync=True), GetRow(b"c", b"k"), Barrier(), LastVersion()]
            same(store.apply(group(*messages), NOW_MS), [None, None, b"1", None, 1], "barriers among others")
            same(store.apply(group(Barrier(sync=True)), NOW_MS), [None], "a barrier after it")
            same(store.status().last_version, 1, "the version after barriers")

    def test_entries_by_version(self) -> None:
        """A category's entries come in the order of their versions, whatever their keys, and of that category alone."""
        with self.store() as store:
            keys = [b"b", b"", b"\xff", b"a", b"b", b"c", b"a"]
            store.apply(group(*[put(b"c", key, b"%d" % at) for at, key in enumerate(keys)]), NOW_MS)
            store.apply(group(put(b"d", b"k", b"")), NOW_MS)
            left = [(b"", 2), (b"\xff", 3), (b"b", 5), (b"c", 6), (b"a", 7)]
            entries = [StoredRow(key, b"%d" % (version - 1), version, None) for key, version in left]
            same(store.read(ListEntries(b"c"), NOW_MS), entries, "the entries")
            messages = [DropRow(b"c", b"b"), ListEntries(b"c"), ListEntries(b"none")]
            same(store.apply(group(*messages), NOW_MS), [True, entries[:2] + entries[3:], []], "the entries in a group")

    def test_used_bytes(self) -> None:
        """The bytes in use are those of all rows' payloads, over all categories, as they are written and removed."""
        with self.store() as store:
            rows = [put(b"c", b"key", b"12345"), put(b"d", b"key", b"123"), put(b"c", b"", b"1"), put(b"c", b"e", b"")]
            answers(store.apply(group(*rows, UsedBytes()), NOW_MS), [*[None] * 4, 9], "the bytes in use after puts")
            steps = [(put(b"c", b"key", b"12"), 6), (DropRow(b"d", b"key"), 3), (DropRow(b"d", b"key"), 3)]
            for message, nbytes in [*steps, (DropRange(b"c", b"a", None), 1)]:
                store.apply(group(message), NOW_MS)
                same(used(store), nbytes, f"the bytes in use after {message}")


def _rows(shape: int, size: int, chance: random.Random) -> list[Group]:
    """Return puts: 0 sorted keys, 1 shuffled, 2 repeated, 3 repeated in three categories, 4 reversed and sorted."""
    keys = [b"%06d" % chance.randrange(size if shape in (2, 3) else 10**6) for _ in range(size)]
    if shape in (0, 4):
        keys.sort(reverse=shape == 4)
    names = [b"c%d" % chance.randrange(3) if shape == 3 else b"c" for _ in keys]
    return [put(name, key, b"%d-%d" % (size, at)) for at, (name, key) in enumerate(zip(names, keys, strict=True))]
