"""Versions, checks, compare_and_set and increment: what is decided by what is there, whoever else is at it."""

from __future__ import annotations

import itertools
import pickle
import random
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pytest

from persistency import (
    Check,
    Conflict,
    Delete,
    DeletePrefix,
    DeleteRange,
    Entry,
    Job,
    KeyRange,
    Misuse,
    Persistency,
    Put,
    Reply,
    WriteFailed,
    key,
)
from persistency.codec.values import decode, encode
from tests.conftest import T0_MS, Wall
from tests.loops import LOOPS, InLoop, bounded, together

WAIT = 20.0
K = key("k")
T = TypeVar("T")
Ask = Callable[[Callable[[], Reply[Any]]], Any]


@pytest.fixture
def job(persistency: Persistency) -> Job:
    """Give an empty job."""
    return persistency.open_job("job")


@pytest.fixture(params=["thread", *LOOPS])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Make a request and take its answer: in a plain thread, or within an event loop."""
    if request.param == "thread":
        return lambda request_it: request_it().result(WAIT)
    return partial(LOOPS[request.param], bounded)


def race(count: int, act: Callable[[int], T]) -> list[T]:
    """Have so many threads do something at the same moment; return what each has got. What one raises is raised."""
    start = threading.Barrier(count)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def body(me: int) -> None:
        try:
            start.wait(WAIT)
            results[me] = act(me)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(me,)) for me in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]
    return [results[me] for me in range(count)]


def assert_balanced(job: Job, committed: int, failed: int = 0) -> None:
    """Check the numbers of a job where nothing is waiting."""
    numbers = job.statistics()
    assert (numbers.committed, numbers.failed, numbers.pending) == (committed, failed, 0)
    assert numbers.accepted == committed + failed


# -- versions -----------------------------------------------------------------------------------------------------


def test_every_operation_takes_a_version(job: Job, ask: Ask) -> None:
    """`version` grows with every op, whether it changed anything or not; what doesn't come to pass takes none."""
    steps: list[tuple[Callable[[], Any], int]] = [
        (lambda: job.put("c", (1,), b"x"), 1),
        (lambda: job.put("c", (1,), b"x"), 2),
        (lambda: job.put("c", (2,), b"x", ttl=60), 3),
        (lambda: job.delete("c", ("none",)), 4),
        (lambda: job.delete_prefix("c", ("none",)), 5),
        (lambda: job.delete_range("c", KeyRange(("none",), ("nonf",))), 6),
        (lambda: job.persist([]), 6),
        (lambda: job.persist([Put("c", (1,), b"y"), Delete("c", (9,)), Check("c", (9,), None)]), 9),
        (lambda: ask(lambda: job.delete_acked("c", ("none",))), 10),
        (lambda: ask(lambda: job.delete_prefix_acked("c", ("none",))), 11),
        (lambda: ask(lambda: job.delete_range_acked("c", KeyRange(("none",), ("nonf",)))), 12),
        (lambda: ask(lambda: job.compare_and_set("c", (1,), b"wrong", b"z")), 12),
        (lambda: ask(lambda: job.compare_and_set("c", (1,), b"y", b"z")), 13),
        (lambda: ask(lambda: job.compare_and_set("c", (1,), b"z", None)), 14),
        (lambda: ask(lambda: job.compare_and_set("c", (1,), None, None)), 15),
        (lambda: ask(lambda: job.touch("c", (2,), None)), 16),
        (lambda: ask(lambda: job.touch("c", ("none",), 60)), 16),
        (lambda: ask(lambda: job.increment("n", (1,))), 17),
        (lambda: ask(lambda: job.run(lambda tx: tx.version())), 17),
        (lambda: ask(lambda: job.run(lambda tx: [tx.put("c", (n,), b"") for n in range(3)])), 20),
    ]
    for number, (step, version) in enumerate(steps):
        step()
        assert ask(job.version) == version, number


def test_an_entry_s_version_is_its_last_write_s(job: Job, ask: Ask) -> None:
    """Each op of a batch has its own, a batch answers its last; a touch leaves the row's as it was."""
    job.put("c", (0,), b"x")
    assert ask(lambda: job.commit([Put("c", (n,), b"%d" % n) for n in range(1, 5)])) == 5
    assert [entry.version for entry in ask(lambda: job.snapshot("c"))] == [1, 2, 3, 4, 5]
    assert ask(lambda: job.commit([Put("c", (2,), b"a"), Put("c", (2,), b"b"), Delete("c", (4,))])) == 8
    assert ask(lambda: job.entry("c", (2,))) == Entry(key(2), b"b", 7, None)
    assert ask(lambda: job.touch("c", (2,), 60)) is True
    assert ask(lambda: job.entry("c", (2,))) == Entry(key(2), b"b", 7, T0_MS + 60_000)
    assert ask(lambda: job.commit([])) == 9
    assert ask(lambda: job.increment("c", (0, 0))) == 1
    assert ask(lambda: job.entry("c", (0, 0))).version == 10


def test_versions_of_many_rows_follow_the_order_of_arrival(job: Job) -> None:
    """However rows are sorted on their way into the file, versions are those of the order they were posted in."""
    numbers = random.Random(7).sample(range(3_000), 3_000)
    with job._mailbox._lock:
        for number in numbers:
            job.put("cd"[number % 2], (number,), b"x", ttl=60 if number % 3 == 0 else None)
    expected = {number: at + 1 for at, number in enumerate(numbers)}
    for category in "cd":
        entries = job.snapshot(category).result(WAIT)
        assert [expected[entry.key.parts[0]] for entry in entries] == [entry.version for entry in entries]
        assert [entry.version for entry in entries] == sorted(entry.version for entry in entries)
        assert len(entries) == 1_500


def test_versions_survive_reopening(tmp_path: Path) -> None:
    """D-14: the next version follows the last one, also of what left no row behind."""
    for turn in range(3):
        with Persistency(tmp_path) as persistency:
            job = persistency.open_job("job")
            assert job.version().result(WAIT) == 4 * turn
            job.put("c", K, b"x")
            assert job.commit([Put("c", (1,), b""), Delete("c", (1,))]).result(WAIT) == 4 * turn + 3
            job.delete("c", ("none",))
    with Persistency(tmp_path) as persistency:
        entry = persistency.open_job("job").entry("c", K).result(WAIT)
        assert entry == Entry(K, b"x", 9, None)


# -- checks -------------------------------------------------------------------------------------------------------


def test_a_conflict_says_what_differed(job: Job, ask: Ask) -> None:
    """`Conflict` has the key, the version that was asked for and the one that is there; nothing was applied."""
    job.put("c", K, b"x")
    for expected, at, actual in ((None, K, 1), (0, K, 1), (2, K, 1), (1, key("none"), None), (2**63, K, 1)):
        with pytest.raises(Conflict) as caught:
            ask(
                lambda expected=expected, at=at: job.commit(  # type: ignore[misc]  # a lambda of its own each time
                    [Put("c", ("new",), b"x"), DeletePrefix("c", K), Check("c", at, expected)]
                )
            )
        assert caught.value.key == at
        assert caught.value.actual == actual
        assert caught.value.expected in (expected, 2**62)
        assert caught.value.retryable
        again = pickle.loads(pickle.dumps(caught.value))
        assert (again.key, again.actual) == (at, actual)
    assert ask(job.version) == 1
    assert [row.payload for row in ask(lambda: job.scan("c"))] == [b"x"]
    assert_balanced(job, committed=1, failed=15)


def test_checks_look_at_the_state_before_their_batch(job: Job, ask: Ask) -> None:
    """Wherever a check stands in its batch; but it sees all that was posted before the batch."""
    job.put("c", K, b"1")
    job.put("c", K, b"2")
    assert ask(lambda: job.commit([Put("c", K, b"3"), Delete("c", K), Check("c", K, 2), Put("c", K, b"4")])) == 6
    job.delete("c", K)
    assert ask(lambda: job.commit([Put("c", K, b"5"), Check("c", K, None)])) == 9
    with pytest.raises(Conflict):
        ask(lambda: job.commit([DeleteRange("c", KeyRange(K)), Check("c", K, None)]))


def test_a_failed_check_of_an_event_is_told_by_flush(job: Job) -> None:
    """Promise 3: the whole batch is named, with its Conflict, and its neighbours are committed."""
    ops = [Put("c", (2,), b"x"), Check("c", (9,), 7)]
    with job._mailbox._lock:
        job.put("c", (1,), b"x")
        job.persist(ops)
        job.put("c", (3,), b"x")
    with pytest.raises(WriteFailed) as caught:
        job.flush().result(WAIT)
    assert [failure.op for failure in caught.value.failures] == ops
    assert {type(failure.error) for failure in caught.value.failures} == {Conflict}
    assert [row.key.parts for row in job.scan("c").result(WAIT)] == [(1,), (3,)]
    assert_balanced(job, committed=2, failed=2)


def test_optimistic_writers_lose_nothing(job: Job) -> None:
    """D-13: read the entry, commit with a check, again on Conflict: no update is lost between 8 threads."""
    job.commit(Put("c", K, b"0")).result(WAIT)

    def add(_me: int) -> int:
        conflicts = 0
        for _ in range(50):
            while True:
                entry = job.entry("c", K).result(WAIT)
                assert entry is not None
                new = b"%d" % (int(entry.payload) + 1)
                try:
                    job.commit([Check("c", K, entry.version), Put("c", K, new)]).result(WAIT)
                except Conflict:
                    conflicts += 1
                else:
                    break
        return conflicts

    conflicts = sum(race(8, add))
    assert job.get("c", K).result(WAIT) == b"400"
    assert_balanced(job, committed=801, failed=2 * conflicts)


# -- compare_and_set ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [None, b"", b"0", b"false", b"null", b"x" * 10_000])
@pytest.mark.parametrize("expected", [None, b"", b"0", b"false", b"null", b"x" * 10_000])
@pytest.mark.parametrize("new", [None, b"", b"new"])
def test_every_pair_of_expected_and_new(
    job: Job, there: bytes | None, expected: bytes | None, new: bytes | None
) -> None:
    """S2-6, S2-20 to S2-25: it comes to pass if and only if what is there is what is expected, absent included."""
    if there is not None:
        job.put("c", K, there)
    holds = there == expected
    assert job.compare_and_set("c", K, expected, new).result(WAIT) is holds
    assert job.get("c", K).result(WAIT) == (new if holds else there)
    assert_balanced(job, committed=(there is not None) + 1)


def test_it_is_the_same_within_a_loop_a_run_and_a_group(job: Job, ask: Ask) -> None:
    """S2-20 to S2-25: in place, by the worker, in a transaction, among other writes of one group."""
    assert ask(lambda: job.compare_and_set("c", K, None, b"1")) is True
    assert ask(lambda: job.compare_and_set("c", K, None, b"2")) is False
    assert ask(lambda: job.compare_and_set("c", K, b"1", b"2")) is True
    assert ask(lambda: job.run(lambda tx: tx.compare_and_set("c", K, b"1", b"3"))) is False
    assert ask(lambda: job.run(lambda tx: tx.compare_and_set("c", K, b"2", b"3"))) is True
    with job._mailbox._lock:
        job.put("c", K, b"4")
        replies = [job.compare_and_set("c", K, b"3", b"5"), job.compare_and_set("c", K, b"4", b"6")]
        job.put("c", K, b"7")
        replies += [job.compare_and_set("c", K, b"7", None), job.compare_and_set("c", K, None, None)]
    assert [reply.result(WAIT) for reply in replies] == [False, True, True, True]
    assert ask(lambda: job.exists("c", K)) is False


def test_what_is_compared_and_set_is_copied_at_the_call(job: Job) -> None:
    """Any bytes-like object will do, and what the caller changes afterwards changes nothing."""
    buffer = bytearray(b"before")
    with job._mailbox._lock:
        job.put("c", K, b"before")
        reply = job.compare_and_set("c", K, memoryview(buffer), buffer)
        buffer[:] = b"AFTER!"
    assert reply.result(WAIT) is True
    assert job.get("c", K).result(WAIT) == b"before"
    for bad in ("text", 5, object()):
        with pytest.raises(Misuse, match="expected"):
            job.compare_and_set("c", K, bad, b"x")  # type: ignore[arg-type]
        with pytest.raises(Misuse, match="new"):
            job.compare_and_set("c", K, b"x", bad)  # type: ignore[arg-type]


def test_a_ttl_of_a_swap(job: Job, wall: Wall, ask: Ask) -> None:
    """S2-28: a swap may set an end; without a TTL it clears the one there was."""
    job.put("c", K, b"1", ttl=10)
    assert ask(lambda: job.compare_and_set("c", K, b"1", b"2", ttl=timedelta(seconds=20))) is True
    assert ask(lambda: job.entry("c", K)).expires_ms == wall.ms + 20_000
    assert ask(lambda: job.compare_and_set("c", K, b"no", b"3", ttl=1)) is False
    assert ask(lambda: job.entry("c", K)).expires_ms == wall.ms + 20_000
    assert ask(lambda: job.compare_and_set("c", K, b"2", b"2")) is True
    assert ask(lambda: job.entry("c", K)) == Entry(K, b"2", 3, None)


def test_one_that_does_not_come_to_pass_has_not_failed(job: Job, ask: Ask) -> None:
    """`failed` counts neither a compare_and_set nor a touch that gives False; both are committed operations."""
    for _ in range(5):
        assert ask(lambda: job.compare_and_set("c", K, b"x", b"y")) is False
        assert ask(lambda: job.touch("c", K, 60)) is False
    assert_balanced(job, committed=10)
    assert ask(job.version) == 0
    job.flush().result(WAIT)


def test_of_sixteen_racing_creations_one_wins(job: Job) -> None:
    """S2-23, S2-29: create-if-absent, and again on a row that has ended: exactly one of 16 threads wins each round."""
    for round_ in range(50):
        won = race(16, lambda me, k=(round_,): job.compare_and_set("c", k, None, b"%d" % me).result(WAIT))
        assert won.count(True) == 1
        assert job.get("c", (round_,)).result(WAIT) == b"%d" % won.index(True)


def test_of_sixteen_racing_creations_on_an_ended_row_one_wins(job: Job, wall: Wall) -> None:
    """S2-27, S2-29: a row that has ended is absent to all of them, and then to none but the first."""
    job.put("c", K, b"old", ttl=1)
    for _ in range(20):
        job.flush().result(WAIT)
        wall.ms += 60_000
        won = race(16, lambda me: job.compare_and_set("c", K, None, b"%d" % me, ttl=60).result(WAIT))
        assert won.count(True) == 1


def test_of_sixteen_racing_tasks_one_wins(job: Job, in_loop: InLoop) -> None:
    """S2-29: the same within one event loop."""

    async def main() -> list[bool]:
        return await together(*(_create(job, b"%d" % me) for me in range(16)))

    won = in_loop(bounded, main)
    assert won.count(True) == 1
    assert job.get("c", K).result(WAIT) == b"%d" % won.index(True)


async def _create(job: Job, payload: bytes) -> bool:
    return await job.compare_and_set("c", K, None, payload)


def test_a_nonce_is_consumed_once(job: Job) -> None:
    """S2-24, S2-32: delete-if-equal by 16 threads takes each row exactly once."""
    for number in range(40):
        job.put("nonces", (number,), b"true")
    taken = race(
        16,
        lambda me: [job.compare_and_set("nonces", (n,), b"true", None).result(WAIT) for n in range(40)].count(True),
    )
    assert sum(taken) == 40
    assert job.count("nonces").result(WAIT) == 0


def test_a_stale_token_releases_nothing(job: Job, wall: Wall) -> None:
    """S2-30: who held the lock before can't release it for who holds it now."""
    assert job.compare_and_set("locks", K, None, b"first", ttl=10).result(WAIT)
    wall.ms += 10_000
    assert job.compare_and_set("locks", K, None, b"second", ttl=10).result(WAIT)
    assert job.compare_and_set("locks", K, b"first", None).result(WAIT) is False
    assert job.get("locks", K).result(WAIT) == b"second"
    assert job.compare_and_set("locks", K, b"second", None).result(WAIT) is True


def test_a_lock_is_never_held_by_two(job: Job, wall: Wall) -> None:
    """S2-27, S2-30: 8 threads take a lock by create-if-absent with a TTL while the clock runs; never two at a time.

    Who holds it works within its time, counted from its call, or loses it: the clock steps past the end only when the
    holder has stopped working.
    """
    ttl = 10
    turns = 200
    inside = 0
    holders: list[int] = []
    overlaps: list[int] = []
    lost = [0] * 8
    numbers = itertools.count()

    def compete(me: int) -> None:
        nonlocal inside
        while len(holders) < turns:
            token, called_ms = b"%d" % next(numbers), wall.ms
            if not job.compare_and_set("locks", K, None, token, ttl=ttl).result(WAIT):
                continue
            if wall.ms >= called_ms + ttl * 1_000:
                # The clock has stepped since the call: its time may be over already.
                job.compare_and_set("locks", K, token, None).result(WAIT)
                continue
            inside += 1
            if inside != 1:
                overlaps.append(me)
            holders.append(me)
            entry = job.entry("locks", K).result(WAIT)
            if entry is None or entry.payload != token:
                overlaps.append(me)
            inside -= 1
            if len(holders) % 3 == 0:
                wall.ms += ttl * 1_000  # forgets to release it; its time is over
                lost[me] += 1
                if job.compare_and_set("locks", K, token, None).result(WAIT):
                    overlaps.append(me)
            elif not job.compare_and_set("locks", K, token, None).result(WAIT):
                overlaps.append(me)

    race(8, compete)
    assert overlaps == []
    assert len(holders) >= turns
    assert sum(lost) >= turns // 3


# -- increment ----------------------------------------------------------------------------------------------------


def test_counting(job: Job, ask: Ask) -> None:
    """Absent counts as 0; any int may be added; what is stored is a CBOR integer."""
    assert ask(lambda: job.increment("n", K)) == 1
    assert ask(lambda: job.increment("n", K)) == 2
    assert ask(lambda: job.increment("n", K, -5)) == -3
    assert ask(lambda: job.increment("n", K, 0)) == -3
    assert ask(lambda: job.increment("n", ("zero",), 0)) == 0
    assert ask(lambda: job.get("n", K)) == encode(-3)
    assert ask(lambda: job.get("n", ("zero",))) == encode(0)
    job.put("n", K, encode(41))
    assert ask(lambda: job.increment("n", K)) == 42
    answer = ask(lambda: job.increment("n", K, delta=1))
    assert (answer, type(answer)) == (43, int)


def test_counting_far(job: Job) -> None:
    """Over every border of the encoding, in both directions, and with numbers no machine word holds."""
    total = 0
    for delta in (23, 1, 231, 1, 2**16, 2**32, 2**63, 2**64, -(2**65), -(2**200), 10**300, -(10**300)):
        total += delta
        assert job.increment("n", K, delta).result(WAIT) == total
        payload = job.get("n", K).result(WAIT)
        assert payload is not None
        assert decode(payload) == total
    big = 2**8_000
    assert job.increment("n", ("big",), big).result(WAIT) == big
    assert job.increment("n", ("big",), -big).result(WAIT) == 0


def test_a_sum_beyond_all_bounds_is_a_conflict(job: Job) -> None:
    """What could be written and not be read back is refused: a delta at the call, a sum when it is made."""
    with pytest.raises(Misuse, match="delta"):
        job.increment("n", K, 1 << 8_000_000)
    assert job.statistics().accepted == 0
    big = 2**8_190
    for sign in (1, -1):
        for times in (1, 2, 3):
            assert job.increment("n", (sign,), sign * big).result(WAIT) == sign * times * big
        with pytest.raises(Conflict, match="larger") as caught:
            job.increment("n", (sign,), sign * (big + 5)).result(WAIT)
        assert caught.value.key == key(sign)
        payload = job.get("n", (sign,)).result(WAIT)
        assert payload is not None
        assert decode(payload) == sign * 3 * big
        assert job.increment("n", (sign,), -sign * big).result(WAIT) == sign * 2 * big


@pytest.mark.parametrize("delta", [1.0, True, "1", None, b"1", 1j])
def test_only_an_int_can_be_added(job: Job, delta: Any) -> None:
    """Anything else is Misuse at the call, to a job and in a run."""
    with pytest.raises(Misuse, match="delta"):
        job.increment("n", K, delta)
    with pytest.raises(Misuse, match="delta"):
        job.run(lambda tx: tx.increment("n", K, delta)).result(WAIT)
    assert job.exists("n", K).result(WAIT) is False


@pytest.mark.parametrize(
    "payload",
    [b"", b"12", b"\xff", encode("1"), encode(1.0), encode(True), encode(None), encode([1]), encode(1) + b"\x00"],
)
def test_what_is_no_integer_is_a_conflict(job: Job, ask: Ask, payload: bytes) -> None:
    """It names the key, says what was expected, and leaves the row as it is."""
    job.put("n", K, payload, ttl=60)
    with pytest.raises(Conflict, match="integer") as caught:
        ask(lambda: job.increment("n", K))
    assert caught.value.key == K
    assert ask(lambda: job.entry("n", K)) == Entry(K, payload, 1, T0_MS + 60_000)
    assert_balanced(job, committed=1, failed=1)


def test_counting_leaves_the_end_as_it_is(job: Job, wall: Wall, ask: Ask) -> None:
    """A TTL stays, a row without one doesn't end; when the row has ended, counting begins anew and doesn't end."""
    job.put("n", K, encode(5), ttl=10)
    assert ask(lambda: job.increment("n", K)) == 6
    wall.ms += 4_000
    assert ask(lambda: job.increment("n", K)) == 7
    assert ask(lambda: job.entry("n", K)).expires_ms == T0_MS + 10_000
    wall.ms += 5_999
    assert ask(lambda: job.increment("n", K)) == 8
    wall.ms += 1
    assert ask(lambda: job.increment("n", K)) == 1
    assert ask(lambda: job.entry("n", K)).expires_ms is None


@pytest.mark.parametrize("inline", [True, False])
def test_sixteen_threads_count_to_16_000(persistency: Persistency, inline: bool) -> None:
    """S2-33, D-13: 16 threads that increment one counter 1,000 times each give 16,000; no number is given twice."""
    job = persistency.open_job("job", inline=inline)
    given = race(16, lambda _me: [job.increment("n", K).result(WAIT) for _ in range(1_000)])
    assert job.get("n", K).result(WAIT) == encode(16_000)
    assert sorted(itertools.chain(*given)) == list(range(1, 16_001))
    for numbers in given:
        assert numbers == sorted(numbers)
    assert_balanced(job, committed=16_000)
    assert job.version().result(WAIT) == 16_000


def test_tasks_and_threads_count_together(job: Job, in_loop: InLoop) -> None:
    """S2-33: an event loop with 100 tasks beside 4 threads, none of them losing a step."""

    async def tasks() -> None:
        await together(*(_count(job, 20) for _ in range(100)))

    def act(me: int) -> None:
        if me == 0:
            in_loop(bounded, tasks)
        else:
            for _ in range(500):
                job.increment("n", K, 2).result(WAIT)

    race(5, act)
    assert job.get("n", K).result(WAIT) == encode(2_000 + 4_000)


async def _count(job: Job, times: int) -> None:
    for _ in range(times):
        await job.increment("n", K)


def test_an_increment_nobody_waits_for_is_done_all_the_same(job: Job) -> None:
    """A request that writes is never undone by its reply being dropped or given up."""
    for _ in range(10):
        job.increment("n", K)
    assert job.increment("n", K).cancel() is False
    assert job.increment("n", K).result(WAIT) == 12


def test_the_numbers_balance_throughout(job: Job) -> None:
    """Promise 3: accepted == committed + failed + pending at every moment, beside threads that make all of them."""
    over = threading.Event()
    looks = 0

    def act(me: int) -> None:
        nonlocal looks
        if me == 0:
            while not over.is_set():
                numbers = job.statistics()
                assert numbers.accepted == numbers.committed + numbers.failed + numbers.pending
                assert numbers.pending >= 0
                looks += 1
            return
        chance = random.Random(me)
        try:
            for number in range(150):
                match chance.randrange(6):
                    case 0:
                        job.put("c", (me, number), b"x")
                    case 1:
                        job.compare_and_set("c", K, b"%d" % chance.randrange(3), b"%d" % chance.randrange(3))
                    case 2:
                        job.compare_and_set("c", K, None, b"0").result(WAIT)
                    case 3:
                        job.increment("c", (me,)).exception(WAIT)
                    case 4:
                        job.commit([Put("c", (me, number), b"x"), Check("c", ("none",), 7)]).exception(WAIT)
                    case _:
                        job.touch("c", (me, number - 1), 60).result(WAIT)
        finally:
            if me == 1:
                over.set()

    race(6, act)
    job.flush().result(WAIT)
    assert looks > 0
    numbers = job.statistics()
    assert (numbers.accepted, numbers.pending) == (numbers.committed + numbers.failed, 0)
    assert numbers.failed > 0
    assert numbers.failed % 2 == 0  # only the batches of two have


def test_the_old_value_stays_if_a_swap_can_not_be_written(persistency: Persistency) -> None:
    """S2-31: what goes wrong while it is swapped undoes it, and is raised to the caller."""
    job = persistency.open_job("small", max_bytes=10)
    assert job.compare_and_set("c", K, None, b"12345").result(WAIT) is True
    for _ in range(2):
        error = job.compare_and_set("c", K, b"12345", b"x" * 11).exception(WAIT)
        assert type(error).__name__ == "QuotaExceeded"
    assert job.entry("c", K).result(WAIT) == Entry(K, b"12345", 1, None)
    assert_balanced(job, committed=1, failed=2)
