"""Concurrent histories: whatever threads and loops do at once, the job did it in one order, that of posting.

Histories are made by `tests.crash.clients` and judged by `tests.crash.histories`. Before they are believed they are
shown engines with a planted defect, each of which they have to report. `python -m tests.soak linear` is the long form.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from persistency import Reply
from persistency.actor.mailbox import Mailbox
from persistency.actor.settling import pending, ready, settle_all
from persistency.storage.memory import MemoryStore
from persistency.storage.port import PLACES, READS, Batch, DropRow, Group, SetRow, SwapRow, operations
from persistency.storage.sqlite import SqliteStore
from tests.crash.clients import survey
from tests.crash.histories import LINEAR, POSTING, Call, History, State, Stored, overlap

SEED = random.SystemRandom().getrandbits(32)
HISTORIES = 400
PLANTED_MAX = 400  # a planted defect must be reported within so many
OVERLAP_MIN = 3.0


# -- planted defects --------------------------------------------------------------------------------------------------

_get = Mailbox.get
_write = Mailbox.write
Apply = Callable[[Any, Group, int], list[Any]]


def stale_reads() -> Any:
    """Answer a point read from what was read last, wherever something stands in line."""
    last: dict[tuple[Mailbox, bytes, bytes], Any] = {}

    def get(self: Mailbox, category: bytes, at: bytes) -> Reply[bytes | None]:
        if self._messages and (self, category, at) in last:
            return ready(last[self, category, at])
        reply = _get(self, category, at)
        reply.add_done_callback(lambda reply: last.__setitem__((self, category, at), reply.result()))
        return reply

    return mock.patch.object(Mailbox, "get", get)


def split_commits() -> Any:
    """Post a batch without checks as two, so that others may come between them."""

    def write(self: Mailbox, message: Any, ops: int, nbytes: int, *, free: bool = False) -> Reply[Any]:
        if type(message) is Batch and message.ops > 1 and not message.expects:
            first, rest = message.items[:PLACES], message.items[PLACES:]
            self.tell(Batch(first, 1, False), 1, nbytes)
            message, ops = Batch(rest, ops - 1, False), ops - 1
        return _write(self, message, ops, nbytes, free=free)

    return mock.patch.object(Mailbox, "write", write)


def swaps_in_two_steps() -> Any:
    """Compare first, and set afterwards."""

    def write(self: Mailbox, message: Any, ops: int, nbytes: int, *, free: bool = False) -> Reply[Any]:
        if type(message) is not SwapRow:
            return _write(self, message, ops, nbytes, free=free)
        answer = pending(self, reads=False)

        def set_if_it_was(read: Any) -> None:
            found = read.result() == message.expected
            if found and message.payload is None:
                self.tell(DropRow(message.category, message.key), 1, 0)
            elif found:
                self.tell(SetRow(*message[:2], message.payload, None), 1, 0)
            settle_all([(answer, found, None)])

        _get(self, message.category, message.key).add_done_callback(set_if_it_was)
        return answer

    return mock.patch.object(Mailbox, "write", write)


@contextmanager
def applying(spoilt: Callable[[Apply], Apply]) -> Iterator[None]:
    """Have both stores run their groups in another way."""
    with ExitStack() as stack:
        for kind in (MemoryStore, SqliteStore):
            stack.enter_context(mock.patch.object(kind, "apply", spoilt(kind.apply)))
        yield


def losing_batches(apply: Apply) -> Apply:
    """Leave the first batch of a group out, and say it was written."""

    def lose(self: Any, group: Group, now_ms: int) -> list[Any]:
        batches = [at for at in range(0, len(group), PLACES) if type(group[at + 1]) is Batch]
        if not batches:
            return apply(self, group, now_ms)
        at = batches[0]
        version = self.status().last_version + group[at + 1].ops
        outcomes = apply(self, group[:at] + group[at + PLACES :], now_ms)
        return [*outcomes[: at // PLACES], version, *outcomes[at // PLACES :]]

    return lose


def turned(order: Callable[[Group], list[int]]) -> Callable[[Apply], Apply]:
    """Return what has groups run in another order of their messages."""

    def spoil(apply: Apply) -> Apply:
        def turn(self: Any, group: Group, now_ms: int) -> list[Any]:
            numbers = order(group)
            other = [place for at in numbers for place in group[at * PLACES : (at + 1) * PLACES]]
            outcomes = dict(zip(numbers, apply(self, other, now_ms), strict=True))
            return [outcomes[at] for at in range(len(numbers))]

        return turn

    return spoil


def reads_first(group: Group) -> list[int]:
    """Return the numbers of a group's messages, those of its reads first."""
    return sorted(range(len(group) // PLACES), key=lambda at: type(group[at * PLACES + 1]) not in READS)


def neighbours_turned(group: Group) -> list[int]:
    """Return the numbers of a group's messages, two requests that write and stand side by side in turned order."""
    numbers = list(range(len(group) // PLACES))
    acked = [group[at * PLACES] is None and group[at * PLACES + 2] is not None for at in numbers]
    writing = [acked[at] and operations(group[at * PLACES + 1]) > 0 for at in numbers]
    at = 0
    while at + 1 < len(numbers):
        if writing[at] and writing[at + 1]:
            numbers[at : at + 2] = at + 1, at
            at += 1
        at += 1
    return numbers


# Each with what it has to be reported as. Turned requests both wait for their answers: only their order is wrong.
PLANTS: dict[str, tuple[Callable[[], Any], str]] = {
    "stale read": (stale_reads, LINEAR),
    "overtaking read": (lambda: applying(turned(reads_first)), LINEAR),
    "lost batch": (lambda: applying(losing_batches), LINEAR),
    "split batch": (split_commits, LINEAR),
    "compare_and_set in two steps": (swaps_in_two_steps, LINEAR),
    "turned requests": (lambda: applying(turned(neighbours_turned)), POSTING),
}


def survey_planted(name: str, place: Path, seed: int) -> tuple[int, list[str]]:
    """Make histories with an engine that was spoilt on purpose, until one is wrong in the way it has to be.

    Returns how many it took, and the complaints about it.
    """
    spoilt, complaint = PLANTS[name]
    with spoilt():
        told = survey(place, seed, PLANTED_MAX, until=complaint)
    return told.histories, [wrong for wrong in told.wrong if complaint in wrong]


@pytest.mark.parametrize("name", PLANTS)
def test_planted_defect_is_seen(tmp_path: Path, name: str) -> None:
    """The histories report an engine that was spoilt on purpose, and as what it is."""
    histories, complaints = survey_planted(name, tmp_path / "root", SEED)
    print(f"seed {SEED}: {name}, {histories} histories\n", *complaints)
    assert complaints


# -- the engine -------------------------------------------------------------------------------------------------------


def test_concurrent_calls_have_one_order(tmp_path: Path) -> None:
    """Promises 1 and 2: of several hundred histories each has one order that explains all answers: that of posting."""
    told = survey(tmp_path / "root", SEED, HISTORIES)
    print(f"seed {SEED}: {told.histories} histories, {told.calls} calls, overlap {told.overlap:.1f}")
    assert not told.wrong, told.wrong[0]
    assert told.histories == HISTORIES
    # Otherwise they would have proved nothing.
    assert told.overlap >= OVERLAP_MIN


# -- the judge --------------------------------------------------------------------------------------------------------

EMPTY = State(7, (None, None, None))
Line = tuple[int, int, int, str, tuple[Any, ...], Any]


def judged(*lines: Line, before: State = EMPTY) -> str:
    """Return what the judge says of calls, given as their stamps, verb, arguments and answer; "" if it is content."""
    calls = [
        Call("client", verb, arguments, began, posted, settled, answer)
        for began, posted, settled, verb, arguments, answer in lines
    ]
    wrong = History("history", before, calls).judge()
    return wrong[0].partition(";")[0].removeprefix("history ") if wrong else ""


PUT: Line = (1, 2, 2, "put", (0, b"x"), None)
TWO_PUTS = (("put", 0, b"x"), ("put", 2, b"y"))
CHECKED = {version: (("check", 0, version), ("put", 0, b"y")) for version in (7, 8)}


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [PUT, (3, 4, 4, "get", (0,), b"x"), (5, 6, 6, "version", (), 8)],
        # Beside a write a read may see the state before it or behind it.
        [(1, 3, 6, "commit", (TWO_PUTS,), 9), (2, 4, 5, "get", (0,), b"x")],
        [(1, 3, 6, "commit", (TWO_PUTS,), 9), (2, 4, 5, "get", (0,), None)],
        # Of two comparisons with the same row one comes first.
        [(1, 3, 5, "compare_and_set", (0, None, b"x"), False), (2, 4, 6, "compare_and_set", (0, None, b"y"), True)],
        [PUT, (3, 4, 4, "commit", (CHECKED[8],), 10), (5, 6, 6, "entry", (0,), Stored(b"y", 10))],
        [PUT, (3, 4, 4, "commit", (CHECKED[7],), ("conflict", 0, 7, 8)), (5, 6, 6, "count", (), 1)],
    ],
)  # fmt: skip
def test_judge_accepts_what_has_an_order(lines: list[Line]) -> None:
    """The judge is content with calls one after the other, and with those that overlap if some order explains them."""
    assert judged(*lines) == ""


@pytest.mark.parametrize(
    "lines",
    [
        # A write that was over is not seen, or seen before it began.
        [PUT, (3, 4, 4, "get", (0,), None)],
        [(1, 2, 2, "get", (0,), b"x"), (3, 4, 4, "put", (0, b"x"), None)],
        # It is seen, and then it isn't any more.
        [(1, 2, 9, "commit", (TWO_PUTS,), 9), (3, 4, 4, "get", (0,), b"x"), (5, 6, 6, "get", (0,), None)],
        # Half of a batch.
        [(1, 3, 6, "commit", (TWO_PUTS,), 9), (2, 4, 5, "get_many", ((0, 2),), ((0, b"x"),))],
        # Both comparisons with the same row came true; both increments gave the same.
        [(1, 3, 5, "compare_and_set", (0, None, b"x"), True), (2, 4, 6, "compare_and_set", (0, None, b"y"), True)],
        [(1, 3, 5, "increment", (0, 1), 1), (2, 4, 6, "increment", (0, 1), 1)],
        # A version given twice, and one too high.
        [(1, 3, 5, "commit", ((("put", 0, b"x"),),), 8), (2, 4, 6, "commit", ((("put", 1, b"x"),),), 8)],
        [PUT, (3, 4, 4, "version", (), 9)],
        # A conflict that wasn't one, and one that was.
        [PUT, (3, 4, 4, "commit", (CHECKED[8],), ("conflict", 0, 8, 9))],
        [PUT, (3, 4, 4, "commit", (CHECKED[7],), 10)],
        # What was undone is there.
        [(1, 2, 2, "write_and_raise", (0, b"x"), "undone"), (3, 4, 4, "exists", (0,), True)],
    ],
)  # fmt: skip
def test_judge_refuses_what_has_none(lines: list[Line]) -> None:
    """The judge objects to answers that no order explains."""
    assert judged(*lines) == LINEAR


def test_judge_holds_the_order_of_posting() -> None:
    """Calls that wait together may be worked in any order, says linearizability; the order they came in, says a job."""
    first = (1, 2, 9, "commit", ((("put", 0, b"x"),),), 9)
    second = (3, 4, 8, "commit", ((("put", 1, b"y"),),), 8)
    assert judged(first, second) == POSTING
    assert judged((*first[:5], 8), (*second[:5], 9)) == ""


def test_overlap_is_the_average_number_of_others_under_way() -> None:
    """Three calls at once overlap with two others each; calls one after the other with none."""
    calls = [Call("client", "count", (), began, began, settled) for began, settled in ((1, 10), (2, 11), (3, 12))]
    assert overlap(calls) == 2
    assert overlap([*calls, Call("client", "count", (), 13, 14, 14)]) == 1.5
