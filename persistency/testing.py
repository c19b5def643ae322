"""What a storage adapter must do to carry jobs: a conformance suite anyone can run against their own.

With pytest, subclass the suite under a name pytest collects, and say how a store is opened:

    from persistency.testing import StoreConformance

    class TestMyStore(StoreConformance):
        def open_store(self):
            return MyRoot(...).open("conformance", StoreOptions())

Rules:
  1. Every check opens one new, empty store by `open_store()` and closes it. An adapter whose jobs outlive their
     store also overrides `reopen_store()`, which opens again what was opened last.
  2. Without pytest, `check_store(open_store)` raises the first `AssertionError`, whose message says what was expected.

Doesn't know: pytest, files, SQL, threads, and any adapter.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from persistency.errors import Conflict
from persistency.storage.port import (
    Barrier,
    Batch,
    CountRange,
    DropRange,
    DropRow,
    Expect,
    Failed,
    GetEntry,
    GetRow,
    GetRows,
    Group,
    HasRow,
    LastVersion,
    ListCategories,
    ScanRange,
    Store,
    StoredRow,
)

__all__ = ["NOW_MS", "StoreConformance", "batch", "check_store", "dump", "group", "put"]

NOW_MS = 1_000_000
GROUP_SIZES = (*range(1, 71), 127, 128, 255, 256, 257, 260, 288, 292, 293, 511, 512, 513, 549, 768, 999, 1000)


def put(category: bytes, key: bytes, payload: bytes) -> Group:
    """Return a plain put as the three places of a group."""
    return [category, key, payload]


def group(*messages: Any) -> Group:
    """Return a group of plain puts (lists of three places, as `put` gives) and messages, in this order."""
    places: Group = []
    for message in messages:
        places += message if isinstance(message, list) else [None, message, None]
    return places


def batch(*items: Any) -> Batch:
    """Return a batch of plain puts, writes and `Expect`s."""
    return Batch(group(*items), len(items), any(isinstance(item, Expect) for item in items))


def dump(store: Store, now_ms: int = NOW_MS) -> dict[bytes, list[StoredRow]]:
    """Return every live row a store holds, by category, as its reads tell them."""
    return {
        category: [
            store.read(GetEntry(category, key), now_ms)
            for key, _ in store.scan(ScanRange(category, b"", None, keys_only=True), now_ms)
        ]
        for category in store.read(ListCategories(), now_ms)
    }


def same(got: Any, expected: Any, what: str) -> None:
    """Raise `AssertionError` unless what was got equals what was expected, in type too."""
    if got != expected or (isinstance(expected, (bool, int)) and type(got) is not type(expected)):
        raise AssertionError(f"{what}: expected {_short(expected)}, got {_short(got)}")


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 300 else repr(value)[:300] + "..."


def _conflict(outcome: Any, key: bytes, expected: int | None, actual: int | None) -> None:
    if not isinstance(outcome, Failed) or not isinstance(outcome.error, Conflict):
        raise AssertionError(f"a failed Expect: expected Failed(Conflict), got {_short(outcome)}")
    error = outcome.error
    same((error.key, error.expected, error.actual), (key, expected, actual), "the conflict's key, expected and actual")


class StoreConformance:
    """The checks: every `test_*` method opens one store and asks it everything its name says."""

    def open_store(self) -> Store:
        """Return a new, empty store. To be overridden."""
        raise NotImplementedError("override open_store() to return a new, empty store of your adapter")

    def reopen_store(self) -> Store | None:
        """Return the store opened last, after its `close`, open again; `None` if its rows end with it."""
        return None

    @contextmanager
    def store(self, store: Store | None = None) -> Iterator[Store]:
        """Give a store, a new one if none is given, and close it whatever happens."""
        store = self.open_store() if store is None else store
        try:
            yield store
        finally:
            store.close()

    def test_a_new_store_is_empty(self) -> None:
        """A new store has no rows, no categories and version 0, in a group and outside one."""
        with self.store() as store:
            reads: list[Any] = [ListCategories(), LastVersion(), GetRow(b"c", b"k"), HasRow(b"c", b"k")]
            reads += [GetEntry(b"c", b"k"), GetRows(b"c", (b"k",))]
            reads += [ScanRange(b"c", b"", None), CountRange(b"c", b"", None)]
            answers = [[], 0, None, False, None, [], [], 0]
            same(store.apply(group(*reads), NOW_MS), answers, "reads of an empty store in a group")
            same([store.read(read, NOW_MS) for read in reads], answers, "reads of an empty store")
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
                got = {(name, row.key): row[1:3] for name, rows in dump(store).items() for row in rows}
                same(got, held, f"all the rows, shape {shape}")

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

            def state(payload: bytes | None, version: int) -> list[Any]:
                if payload is None:
                    return [None, False, None, [], [], 0, [], version]
                pairs = [(b"k", payload)]
                row = StoredRow(b"k", payload, version, None)
                return [payload, True, row, pairs, pairs, 1, [b"c"], version]

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
            _conflict(outcomes[1], b"k", None, 1)
            _conflict(outcomes[2], b"k", None, 1)
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
                _conflict(outcomes[1], b"k", wrong, 1)
                same([outcomes[0], *outcomes[2:]], [None, before + 1, before + 2, before + 2], "the neighbours")
            absent = group(batch(Expect(b"c", b"no", 1), put(b"c", b"no", b"")))
            _conflict(store.apply(absent, NOW_MS)[0], b"no", 1, None)
            same([row.key for row in dump(store)[b"c"]], [b"1", b"2", b"k", b"r"], "the keys")
            same(store.status().last_version, 10, "the last version")

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

    def test_reopening(self) -> None:
        """A store that outlives its closing comes back with every row and its last version, and goes on from there."""
        with self.store() as store:
            store.apply(group(put(b"c", b"k", b"1"), put(b"c", b"gone", b""), DropRow(b"c", b"gone")), NOW_MS)
            held = dump(store)
        again = self.reopen_store()
        if again is None:
            return
        with self.store(again):
            same(dump(again), held, "the rows after reopening")
            same(again.status().last_version, 3, "the last version after reopening")
            same(again.apply(group(batch(put(b"c", b"k", b"2"))), NOW_MS), [4], "the next version")


def _rows(shape: int, size: int, chance: random.Random) -> list[Group]:
    """Return puts: 0 sorted keys, 1 shuffled, 2 repeated, 3 repeated in three categories, 4 reversed and sorted."""
    keys = [b"%06d" % chance.randrange(size if shape in (2, 3) else 10**6) for _ in range(size)]
    if shape in (0, 4):
        keys.sort(reverse=shape == 4)
    names = [b"c%d" % chance.randrange(3) if shape == 3 else b"c" for _ in keys]
    return [put(name, key, b"%d-%d" % (size, at)) for at, (name, key) in enumerate(zip(names, keys, strict=True))]


def check_store(
    open_store: Callable[[], Store],
    reopen_store: Callable[[], Store | None] = lambda: None,
    names: Iterable[str] | None = None,
) -> list[str]:
    """Run the suite, or the checks of these names; return the names. Raises at the first that fails."""
    members = {"open_store": lambda _self: open_store(), "reopen_store": lambda _self: reopen_store()}
    suite = type("Suite", (StoreConformance,), members)()
    ran = [name for name in dir(suite) if name.startswith("test_")] if names is None else list(names)
    for name in ran:
        getattr(suite, name)()
    return ran
