"""Checks of functions that run inside a transaction: they see what they write, and are undone if they raise.

Rules:
  1. A function has no effects elsewhere but a list of what it was told, for it may be called again.

Doesn't know: pytest, any adapter; quotas and changes of runs are checked elsewhere.
"""

from __future__ import annotations

from typing import Any

from persistency.errors import Conflict, Misuse
from persistency.storage.port import (
    Barrier,
    CountRange,
    DropRange,
    DropRow,
    Expect,
    Failed,
    GetEntry,
    GetRow,
    GetRows,
    HasRow,
    LastVersion,
    ListCategories,
    ListEntries,
    Reap,
    Run,
    ScanRange,
    SetRow,
    StoredRow,
    SwapRow,
    TouchRow,
    UsedBytes,
    Within,
)
from persistency.testing.checks import (
    END_MS,
    NOW_MS,
    Checks,
    Stop,
    answers,
    at_most,
    batch,
    doing,
    dump,
    failed,
    group,
    holds,
    put,
    same,
    trying,
    used,
)


class RunChecks(Checks):
    """What `Run` does."""

    def test_a_run_sees_and_answers(self) -> None:
        """A run's function sees the rows before it and its own; its answer is the run's, its writes the job's."""
        with self.store() as store:
            store.apply(group(put(b"c", b"old", b"o")), NOW_MS)
            steps: list[tuple[Any, Any, int]] = [
                (GetRow(b"c", b"old"), b"o", 2),
                (GetRow(b"c", b"group"), b"g", 2),
                (SetRow(b"c", b"k", b"1", None), None, 3),
                (GetRow(b"c", b"k"), b"1", 3),
                (SetRow(b"c", b"k", b"2", END_MS), None, 4),
                (GetEntry(b"c", b"k"), StoredRow(b"k", b"2", 4, END_MS), 4),
                (HasRow(b"c", b"none"), False, 4),
                (GetRows(b"c", (b"k", b"none", b"old")), [(b"k", b"2"), (b"old", b"o")], 4),
                (SwapRow(b"c", b"k", b"1", b"3", None), False, 4),
                (SwapRow(b"c", b"k", b"2", b"3", None), True, 5),
                (TouchRow(b"c", b"none", None), False, 5),
                (TouchRow(b"c", b"k", END_MS), True, 6),
                (ScanRange(b"c", b"h", None), [(b"k", b"3"), (b"old", b"o")], 6),
                (CountRange(b"c", b"", None), 3, 6),
                (batch(put(b"d", b"a", b"4"), DropRow(b"c", b"old"), Expect(b"d", b"a", None)), 9, 9),
                (DropRow(b"c", b"old"), False, 10),
                (DropRange(b"c", b"g", b"h"), 1, 11),
                (ListCategories(), [b"c", b"d"], 11),
                (ListEntries(b"c"), [StoredRow(b"k", b"3", 5, END_MS)], 11),
                (UsedBytes(), 2, 11),
                (LastVersion(), 11, 11),
            ]
            run = doing(*[message for message, _, _ in steps])
            after = [GetEntry(b"c", b"k"), LastVersion(), put(b"c", b"z", b"5"), LastVersion()]
            outcomes = store.apply(group(put(b"c", b"group", b"g"), run, *after), NOW_MS)
            told = [(answer, version) for _, answer, version in steps]
            answers(outcomes[1], told, "what a run was told")
            answers(outcomes[2:], [StoredRow(b"k", b"3", 5, END_MS), 11, None, 12], "what follows a run")
            of_c = [StoredRow(b"k", b"3", 5, END_MS), StoredRow(b"z", b"5", 12, None)]
            same(dump(store), {b"c": of_c, b"d": [StoredRow(b"a", b"4", 7, None)]}, "the rows after a run")

    def test_a_run_takes_no_version(self) -> None:
        """A run takes the versions of what it does and none of its own; it may answer anything."""
        with self.store() as store:
            something = object()
            versions: list[int] = []
            runs = [Run(lambda within: versions.append(within.version)), Run(lambda _within: something), doing()]
            outcomes = store.apply(group(put(b"c", b"k", b"1"), *runs, doing(GetRow(b"c", b"k"))), NOW_MS)
            same(outcomes, [None, None, something, [], [(b"1", 1)]], "the answers of runs that write nothing")
            same(versions[-1], 1, "the version a run begins with")
            same(store.apply(group(doing(LastVersion())), NOW_MS), [[(1, 1)]], "a run alone")
            same(store.status().last_version, 1, "the version after runs that write nothing")

    def test_a_run_that_raises_is_undone_alone(self) -> None:
        """Whatever a function raises is its outcome; its writes and versions are undone, its neighbours stay."""
        writes = [SetRow(b"c", b"k", b"2", END_MS - 500), SetRow(b"d", b"new", b"12345", None), DropRow(b"c", b"gone")]
        writes += [SwapRow(b"c", b"swap", b"1", None, None), TouchRow(b"c", b"touch", None), DropRange(b"e", b"", None)]
        writes += [batch(put(b"f", b"1", b"1"), put(b"f", b"2", b"2")), SwapRow(b"c", b"swap", None, b"2", None)]
        for error in (Stop("no"), KeyboardInterrupt(), SystemExit(3), GeneratorExit()):
            with self.store() as store:
                held = [put(b"c", key, b"1") for key in (b"k", b"gone", b"swap")]
                held += [put(b"e", b"%d" % at, b"1") for at in range(5)]
                store.apply(group(*held, SetRow(b"c", b"touch", b"1", END_MS)), NOW_MS)
                before, nbytes = dump(store), used(store)
                run = doing(*writes, error=error)
                try:
                    outcomes = store.apply(group(run, UsedBytes(), ListCategories(), LastVersion()), NOW_MS)
                except type(error) as raised:
                    raise AssertionError(f"expected the outcome Failed({error!r}), and it was raised") from raised
                got = outcomes[0].error if isinstance(outcomes[0], Failed) else outcomes[0]
                holds(got is error, f"the run's own {error!r} as its outcome", outcomes[0])
                answers(outcomes[1:], [nbytes, [b"c", b"e"], 9], "reads after a run that raised")
                same(dump(store), before, "the rows after a run that raised")
                at_most(store, END_MS, "after a run that raised")
                both = store.apply(group(put(b"n", b"1", b""), run, put(b"n", b"2", b""), LastVersion()), NOW_MS)
                answers([both[0], *both[2:]], [None, None, 11], "the neighbours of a run that raised")
                rows = [StoredRow(b"1", b"", 10, None), StoredRow(b"2", b"", 11, None)]
                same(dump(store), before | {b"n": rows}, "the rows beside a run that raised")
                same(store.reap(END_MS, 9), 1, "rows reaped after a run that raised")

    def test_what_fails_in_a_run_is_undone_alone(self) -> None:
        """A batch or run that fails inside a run raises there, is undone alone, and the function may go on."""
        bad_batch = batch(put(b"c", b"k", b"bad"), DropRange(b"c", b"", None), Expect(b"c", b"k", 7))
        bad_run = doing(SetRow(b"c", b"k", b"bad", None), DropRange(b"c", b"", None), error=Stop("inner"))
        deep_run = doing(SetRow(b"c", b"k", b"bad", END_MS), bad_run)
        for bad, kind in ((bad_batch, Conflict), (bad_run, Stop), (deep_run, Stop)):
            with self.store() as store:
                store.apply(group(put(b"c", b"k", b"1")), NOW_MS)

                def fn(within: Within, bad: Any = bad, kind: type[BaseException] = kind) -> Any:
                    within.do(SetRow(b"c", b"before", b"2", None))
                    try:
                        within.do(bad)
                    except kind:
                        told = [within.version, within.do(GetRow(b"c", b"k")), within.do(LastVersion())]
                    else:
                        told = []
                    within.do(SetRow(b"c", b"after", b"3", None))
                    return told

                outcomes = store.apply(group(Run(fn), LastVersion()), NOW_MS)
                answers(outcomes, [[2, b"1", 2], 3], f"a run in which {kind.__name__} was raised and caught")
                rows = [(b"after", b"3", 3), (b"before", b"2", 2), (b"k", b"1", 1)]
                same([row[:3] for row in dump(store)[b"c"]], rows, f"the rows after a caught {kind.__name__}")
                outcome = store.apply(group(doing(SetRow(b"c", b"k", b"x", None), bad), LastVersion()), NOW_MS)
                failed(outcome[0], kind, {}, "a run that lets an error through")
                same(outcome[1], 3, "the version after it")
                same([row[:3] for row in dump(store)[b"c"]], rows, "the rows after it")

    def test_a_conflict_in_a_run_says_what_differed(self) -> None:
        """A batch's conflict inside a run is raised with its key and versions; the run's own writes count."""
        with self.store() as store:
            bad = batch(Expect(b"c", b"k", None), put(b"c", b"k", b"2"))
            outcomes = store.apply(group(doing(SetRow(b"c", b"k", b"1", None), bad)), NOW_MS)
            failed(outcomes[0], Conflict, {"key": b"k", "expected": None, "actual": 1}, "a conflict let through")
            same(dump(store), {}, "the rows after it")

    def test_runs_in_runs(self) -> None:
        """An inner run's writes are the outer one's: seen by it when they stay, undone with it when it raises."""
        with self.store() as store:
            inner = doing(SetRow(b"c", b"in", b"1", END_MS), GetRow(b"c", b"out"))
            outer = [SetRow(b"c", b"out", b"1", None), inner, GetRow(b"c", b"in")]
            told = [(None, 1), ([(None, 2), (b"1", 2)], 2), (b"1", 2)]
            answers(store.apply(group(doing(*outer)), NOW_MS), [told], "a run in a run")
            held = dump(store)
            again = doing(DropRange(b"c", b"", None), doing(SetRow(b"c", b"in", b"2", None), doing()), error=Stop())
            failed(store.apply(group(again), NOW_MS)[0], Stop, {}, "a run that raises after an inner one")
            same(dump(store), held, "the rows after a run that raised after an inner one")
            same(store.status().last_version, 2, "the version after it")

    def test_what_a_run_may_not_do(self) -> None:
        """A barrier, a reap and an expectation that stands alone raise `Misuse` in a run, and change nothing."""
        for message in (Barrier(), Barrier(sync=True), Reap(1), Expect(b"c", b"k", None)):
            with self.store() as store:

                def then(within: Within, error: BaseException | None) -> Any:
                    return type(error), within.version, within.do(SetRow(b"c", b"k", b"1", None)), within.version

                store.apply(group(SetRow(b"d", b"ended", b"", NOW_MS)), NOW_MS)
                outcome = store.apply(group(trying(message, then)), NOW_MS)[0]
                same(outcome, (Misuse, 1, None, 2), f"a run that tried {message}")
                failed(store.apply(group(doing(message)), NOW_MS)[0], Misuse, {}, f"a run that did {message}")
                same(dump(store), {b"c": [StoredRow(b"k", b"1", 2, None)]}, "the rows after it")
                same(store.reap(NOW_MS, 9), 1, "the rows it left to reap")

    def test_runs_among_puts(self) -> None:
        """Runs among many puts of one group each see all puts before them, and none after."""
        with self.store() as store:
            messages: list[Any] = []
            expected: list[Any] = []
            for at in range(150):
                key = b"%d" % (at % 11)
                count = SetRow(b"d", b"runs", b"%d" % at, None)
                error = Stop() if at % 5 == 4 else None
                messages += [put(b"c", key, b"%d" % at), doing(GetRow(b"c", key), count, error=error)]
                version = 2 * at + 1 - (at + 1) // 5 + (at % 5 == 4)
                expected += [None, None if error else [(b"%d" % at, version), (None, version + 1)]]
            outcomes = store.apply(group(*messages), NOW_MS)
            for at in range(9, 300, 10):
                failed(outcomes[at], Stop, {}, "a run among puts that raised")
                outcomes[at] = None
            answers(outcomes, expected, "runs among puts")
            same(store.get(b"d", b"runs", NOW_MS), b"148", "the row written by the last run that didn't raise")
            same(store.read(CountRange(b"c", b"", None), NOW_MS), 11, "the rows of the puts")
            same(store.status().last_version, 150 + 120, "the version after puts and runs")
