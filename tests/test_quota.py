"""The quota: `max_bytes` on live payload bytes, exact whatever was written, ended, undone or reopened."""

from __future__ import annotations

import random
import shutil
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import pytest

from persistency import (
    Check,
    Conflict,
    Delete,
    Job,
    KeyRange,
    Misuse,
    Persistency,
    Put,
    QuotaExceeded,
    WriteFailed,
    key,
)
from persistency.storage.directory import DirectoryRoot
from persistency.storage.memory import MemoryRoot
from persistency.storage.port import (
    Batch,
    DropRange,
    DropRow,
    Expect,
    Group,
    ListCategories,
    ListEntries,
    Run,
    SetRow,
    StoreOptions,
    SwapRow,
    TouchRow,
    UsedBytes,
)
from persistency.storage.sqlite import SqliteStore
from tests.conftest import Wall

WAIT = 20.0
T0 = 1_700_000_000.0


def used(job: Job) -> int:
    """Return the job's bytes in use."""
    return job.storage_used().result(WAIT)


def refused(ask: Callable[[], Any]) -> QuotaExceeded:
    """Return what a request is refused with by the quota."""
    with pytest.raises(QuotaExceeded) as caught:
        ask().result(WAIT)
    return caught.value


# -- what counts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_bytes", [None, 1_000])
def test_used_is_the_bytes_of_live_payloads(persistency: Persistency, max_bytes: int | None) -> None:
    """S0-74, S0-75, S0-76: payloads count, keys and categories don't; overwriting and deleting adjust it."""
    job = persistency.open_job("job", max_bytes=max_bytes)
    assert used(job) == 0
    job.put("c", ("a long key that counts for nothing",), b"12345")
    assert used(job) == 5
    job.put("d", ("k",), b"12345")
    assert used(job) == 10
    job.put("d", ("k",), b"12")
    assert used(job) == 7
    job.put("d", ("k",), b"12345")
    job.put("d", ("empty",), b"")
    assert used(job) == 10
    job.delete("c", ("a long key that counts for nothing",))
    assert used(job) == 5
    job.delete("c", ("missing",))
    assert job.delete_range_acked("d", KeyRange(("a",))).result(WAIT) == 2
    assert used(job) == 0


@pytest.mark.parametrize("max_bytes", [None, 1_000])
def test_rows_that_have_ended_do_not_count(persistency: Persistency, wall: Wall, max_bytes: int | None) -> None:
    """S0-38, S0-77, S0-82: a row counts until its very end, touched or not, and never again."""
    job = persistency.open_job("job", max_bytes=max_bytes)
    job.put("c", (1,), b"1" * 10, ttl=10)
    job.put("c", (2,), b"2" * 20, ttl=timedelta(seconds=20))
    job.put("c", (3,), b"3" * 40)
    assert job.touch("c", (3,), 30).result(WAIT)
    assert used(job) == 70
    wall.now += 9.999
    assert used(job) == 70
    wall.now += 0.001
    assert used(job) == 60
    assert job.touch("c", (1,), 100).result(WAIT) is False
    assert job.touch("c", (2,), 100).result(WAIT) is True
    wall.now += 10
    assert used(job) == 60
    wall.now += 10
    assert used(job) == 20
    wall.now -= 1_000
    assert used(job) == 20
    wall.now += 1_000 + 80
    assert used(job) == 0


def test_up_to_the_limit_and_not_a_byte_beyond(persistency: Persistency) -> None:
    """S0-79, S0-80, S0-83: equal to the limit is allowed; beyond it is refused, told, and nothing changes."""
    job = persistency.open_job("job", max_bytes=10)
    job.commit(Put("c", (1,), b"1234567890")).result(WAIT)
    job.commit(Put("c", (2,), b"")).result(WAIT)
    version = job.version().result(WAIT)
    error = refused(lambda: job.commit(Put("c", (2,), b"x")))
    assert (error.used, error.limit, error.retryable) == (11, 10, False)
    assert str(error) == "storage limit exceeded: would use 11 of 10 bytes allowed"
    assert "max_bytes" in error.hint
    assert job.entry("c", (2,)).result(WAIT)[1:] == (b"", 2, None)  # type: ignore[index]  # an Entry
    assert (used(job), job.version().result(WAIT)) == (10, version)


def test_what_does_not_grow_is_always_allowed(root: str, persistency: Persistency) -> None:
    """S0-81: an update that doesn't grow passes even above the limit; one that grows doesn't."""
    job = persistency.open_job("job", max_bytes=10)
    job.commit([Put("c", (1,), b"12345"), Put("c", (2,), b"12345")]).result(WAIT)
    job.commit(Put("c", (1,), b"54321")).result(WAIT)
    job.commit(Put("c", (1,), b"5432")).result(WAIT)
    assert refused(lambda: job.commit(Put("c", (1,), b"543210"))).used == 11
    job.commit([Put("c", (1,), b"543210"), Put("c", (2,), b"1234")]).result(WAIT)
    assert used(job) == 10


def test_a_job_opened_with_less_than_it_has_may_only_shrink(tmp_path: Path, wall: Wall) -> None:
    """S0-81: above the limit from the start, everything that doesn't grow goes on working, and nothing else."""
    with Persistency(tmp_path, clock=wall) as persistency:
        job = persistency.open_job("job", max_bytes=1_000)
        for number in range(10):
            job.put("c", (number,), b"x" * 100)
    with Persistency(tmp_path, clock=wall) as persistency:
        job = persistency.open_job("job", max_bytes=150)
        assert used(job) == 1_000
        for grows in (Put("c", (0,), b"x" * 101), Put("c", (99,), b"x"), Put("d", (0,), b"x", ttl=5)):
            assert refused(lambda grows=grows: job.commit(grows)).limit == 150  # type: ignore[misc]
        assert refused(lambda: job.run(lambda tx: tx.put("c", (99,), b"x"))).used == 1_001
        job.commit(Put("c", (0,), b"y" * 100)).result(WAIT)
        job.commit(Put("c", (0,), b"y" * 99)).result(WAIT)
        job.commit(Put("c", (99,), b"")).result(WAIT)
        job.commit([Delete("c", (1,)), Put("c", (99,), b"z" * 100)]).result(WAIT)
        assert job.compare_and_set("c", (0,), b"y" * 99, b"y").result(WAIT) is True
        assert job.touch("c", (2,), 5).result(WAIT) is True
        assert used(job) == 901
        wall.now += 5
        assert used(job) == 801
        assert job.delete_range_acked("c", KeyRange((2,), (9,))).result(WAIT) == 6
        assert used(job) == 201
        assert refused(lambda: job.increment("n", ("k",))).used == 202
        job.delete("c", (9,))
        assert job.increment("n", ("k",)).result(WAIT) == 1
        assert used(job) == 102


def test_a_quota_of_nothing_allows_empty_payloads(persistency: Persistency) -> None:
    """max_bytes=0 is a limit like any other."""
    job = persistency.open_job("job", max_bytes=0)
    job.commit(Put("c", (1,), b"")).result(WAIT)
    assert refused(lambda: job.commit(Put("c", (1,), b"x"))).used == 1
    assert job.count("c").result(WAIT) == 1


@pytest.mark.parametrize("max_bytes", [-1, 1.5, "1MB", True])
def test_a_quota_is_a_number_of_bytes(persistency: Persistency, max_bytes: Any) -> None:
    """Anything else is refused when the job is opened."""
    with pytest.raises(Misuse, match="max_bytes"):
        persistency.open_job("job", max_bytes=max_bytes)


# -- who is told, and who isn't harmed -----------------------------------------------------------------------------


def test_an_event_over_the_quota_is_told_by_flush(persistency: Persistency) -> None:
    """Promise 3: a put that is refused is named by exactly one flush, counted as failed, and undone alone."""
    job = persistency.open_job("job", max_bytes=10)
    with job._mailbox._lock:  # all of them in one group
        job.put("c", (1,), b"12345")
        job.put("c", (2,), b"123456")
        job.put("c", (3,), b"1234", ttl=60)
        job.put("c", (4,), b"12", ttl=60)
        job.persist([Put("c", (5,), b"1"), Put("c", (6,), b"1")])
        job.put("c", (7,), b"1")
    with pytest.raises(WriteFailed) as caught:
        job.flush().result(WAIT)
    job.flush().result(WAIT)
    batch = [Put("c", (5,), b"1"), Put("c", (6,), b"1")]
    assert [failure.op for failure in caught.value.failures] == [
        Put("c", key(2), b"123456"),
        Put("c", key(4), b"12", 60),
        *batch,
    ]
    assert [failure.error.used for failure in caught.value.failures] == [11, 11, 11, 11]  # type: ignore[attr-defined]
    assert {failure.outcome for failure in caught.value.failures} == {"not applied"}
    assert [row.key.parts for row in job.scan("c").result(WAIT)] == [(1,), (3,), (7,)]
    numbers = job.statistics()
    assert (numbers.accepted, numbers.committed, numbers.failed, numbers.pending) == (7, 3, 4, 0)
    assert (used(job), job.version().result(WAIT)) == (10, 3)


def test_a_batch_or_a_run_is_judged_as_a_whole(persistency: Persistency) -> None:
    """Promise 2: what a batch or a run adds up to in the end decides, not where it was in between."""
    job = persistency.open_job("job", max_bytes=10)
    job.commit(Put("c", (1,), b"12345678")).result(WAIT)
    job.commit([Put("c", (2,), b"1234567890"), Delete("c", (1,))]).result(WAIT)
    assert used(job) == 10

    def through_more(tx: Any) -> int:
        tx.put("c", (3,), b"x" * 1_000)
        over: int = tx.storage_used()
        tx.delete("c", (3,))
        tx.run(lambda inner: inner.put("c", (4,), b"y" * 1_000))
        tx.delete_range("c", KeyRange((4,)))
        return over

    assert job.run(through_more).result(WAIT) == 1_010
    assert used(job) == 10
    assert job.categories().result(WAIT) == ["c"]

    def too_much(tx: Any) -> None:
        tx.delete("c", (2,))
        for number in range(11):
            tx.put("d", (number,), b"x")

    assert refused(lambda: job.run(too_much)).used == 11
    assert (used(job), job.categories().result(WAIT)) == (10, ["c"])
    assert refused(lambda: job.commit([Delete("c", (2,)), *(Put("d", (n,), b"x") for n in range(12))])).used == 12
    assert job.get("c", (2,)).result(WAIT) == b"1234567890"


def test_a_failed_check_comes_before_the_quota(persistency: Persistency) -> None:
    """A batch that fails by its check and by the quota raises Conflict: it would not have been applied anyway."""
    job = persistency.open_job("job", max_bytes=10)
    with pytest.raises(Conflict):
        job.commit([Put("c", (1,), b"x" * 11), Check("c", (2,), 7)]).result(WAIT)
    assert used(job) == 0


def test_every_request_that_grows_is_refused_at_the_call_s_reply(persistency: Persistency) -> None:
    """The quota holds for compare_and_set, increment and run as for puts, and undoes them."""
    job = persistency.open_job("job", max_bytes=10)
    job.put("c", (1,), b"123456789")
    assert refused(lambda: job.compare_and_set("c", (1,), b"123456789", b"12345678901")).used == 11
    assert refused(lambda: job.compare_and_set("c", (2,), None, b"xx", ttl=5)).used == 11
    assert job.compare_and_set("c", (2,), None, b"x").result(WAIT) is True
    assert refused(lambda: job.increment("n", (1,))).used == 11
    assert job.compare_and_set("c", (2,), b"x", None).result(WAIT) is True
    assert job.increment("n", (1,), 23).result(WAIT) == 23  # one byte of CBOR
    assert refused(lambda: job.increment("n", (1,))).used == 11  # 24 takes two
    assert job.increment("n", (1,), -1).result(WAIT) == 22
    assert (used(job), job.get("c", (1,)).result(WAIT)) == (10, b"123456789")


# -- over reopenings -----------------------------------------------------------------------------------------------


def test_the_number_survives_reopening_and_a_kill(tmp_path: Path, wall: Wall) -> None:
    """S0-5: the bytes in use are those of the rows, after a close and from the files a killed process leaves."""
    with Persistency(tmp_path / "a", clock=wall) as persistency:
        job = persistency.open_job("job", max_bytes=1_000)
        job.put("c", (1,), b"x" * 300)
        job.put("c", (2,), b"x" * 200, ttl=60)
        job.flush().result(WAIT)
        (tmp_path / "b").mkdir()
        for path in (tmp_path / "a").iterdir():
            shutil.copy(path, tmp_path / "b")
    for place in ("a", "b"):
        wall.now = T0
        with Persistency(tmp_path / place, clock=wall) as persistency:
            job = persistency.open_job("job", max_bytes=1_000)
            assert used(job) == 500
            assert refused(lambda job=job: job.commit(Put("c", (3,), b"x" * 501))).used == 1_001  # type: ignore[misc]
            wall.now += 60
            assert used(job) == 300
            job.commit(Put("c", (3,), b"x" * 501)).result(WAIT)
    with Persistency(tmp_path / "b", clock=wall) as persistency:
        assert used(persistency.open_job("job", max_bytes=1_000)) == 801


def test_what_was_written_without_a_quota_is_counted_when_there_is_one_again(tmp_path: Path, wall: Wall) -> None:
    """A job that was opened without its quota in between has an exact number afterwards, time and again."""
    rows = 0
    for turn in range(3):
        with Persistency(tmp_path, clock=wall) as persistency:
            job = persistency.open_job("job", max_bytes=10_000)
            assert used(job) == rows * 100
            job.put("c", (rows,), b"x" * 100)
            rows += 1
            assert used(job) == rows * 100
        with Persistency(tmp_path, clock=wall) as persistency:
            job = persistency.open_job("job")
            if turn != 1:  # once it only reads
                job.put("c", (rows,), b"x" * 100)
                job.put("c", ("ends", turn), b"x" * 7, ttl=30)
                rows += 1
            assert job.count("c").result(WAIT) == rows + (turn != 1)
        wall.now += 30
    with Persistency(tmp_path, clock=wall) as persistency:
        assert used(persistency.open_job("job", max_bytes=10_000)) == rows * 100


def test_a_clock_that_went_back_between_two_openings_keeps_the_number_exact(tmp_path: Path, wall: Wall) -> None:
    """Rows written by an earlier clock than the job has known are live, and count."""
    with Persistency(tmp_path, clock=wall) as persistency:
        persistency.open_job("job", max_bytes=100).put("c", (1,), b"12345")
    wall.now -= 100_000
    with Persistency(tmp_path, clock=wall) as persistency:
        job = persistency.open_job("job", max_bytes=100)
        job.put("c", (2,), b"12345", ttl=60)
        assert job.get("c", (2,)).result(WAIT) == b"12345"
        assert used(job) == 10
        assert refused(lambda: job.commit(Put("c", (3,), b"x" * 91, 60))).used == 101
        job.delete("c", (2,))
        assert used(job) == 5


# -- many at once --------------------------------------------------------------------------------------------------


def test_sixteen_threads_never_exceed_it(persistency: Persistency) -> None:
    """S0-85, D-12: 16 threads that fill a job by puts, batches, runs and swaps end at the limit, never above."""
    limit, size = 40_000, 97
    job = persistency.open_job("job", max_bytes=limit)
    highest = [0] * 16
    start = threading.Barrier(16)

    def fill(me: int) -> None:
        start.wait(WAIT)
        for number in range(10_000):
            k = (me, number)
            try:
                if me % 4 == 0:
                    job.commit(Put("c", k, b"x" * size)).result(WAIT)
                elif me % 4 == 1:
                    job.run(lambda tx, k=k: tx.put("c", k, b"x" * size)).result(WAIT)
                elif me % 4 == 2:
                    assert job.compare_and_set("c", k, None, b"x" * size, ttl=1_000).result(WAIT)
                else:
                    job.put("c", k, b"x" * size)
                    job.get("c", k).result(WAIT)
            except QuotaExceeded:
                return
            highest[me] = max(highest[me], used(job))
            if me % 4 == 3 and highest[me] + size > limit:
                return

    threads = [threading.Thread(target=fill, args=(me,)) for me in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    try:
        job.flush().result(WAIT)
    except WriteFailed as failed:
        assert {type(failure.error) for failure in failed.failures} == {QuotaExceeded}
    assert limit - size < used(job) <= limit
    assert max(highest) <= limit
    assert used(job) == job.count("c").result(WAIT) * size
    numbers = job.statistics()
    assert numbers.accepted == numbers.committed + numbers.failed
    assert numbers.committed == job.count("c").result(WAIT)


# -- against a model -----------------------------------------------------------------------------------------------

CATEGORIES = ["c", "d"]
SPANS = [(None, 3), (2, None), (1, 4), (4, 2)]


class Model:
    """The rows as a plain dict, and what the quota has to say of any change of them."""

    def __init__(self, wall: Wall, limit: int | None) -> None:
        self.wall = wall
        self.limit = limit
        self.rows: dict[tuple[str, int], tuple[bytes, int | None]] = {}
        self.now_ms = 0
        self.look()

    def look(self) -> None:
        """Take notice of the time, which never goes back."""
        self.now_ms = max(self.now_ms, int(self.wall.now * 1000))
        self.rows = {at: row for at, row in self.rows.items() if row[1] is None or self.now_ms < row[1]}

    def used(self) -> int:
        return sum(len(payload) for payload, _ in self.rows.values())

    def end(self, ttl: int | None) -> int | None:
        return None if ttl is None else self.now_ms + ttl * 1000

    def change(self, act: Callable[[], Any]) -> bool:
        """Make a change if the quota allows it; return whether it does."""
        before, rows = self.used(), dict(self.rows)
        act()
        if self.limit is not None and self.used() > self.limit and self.used() > before:
            self.rows = rows
            return False
        return True

    def drop_span(self, category: str, start: int | None, stop: int | None) -> None:
        for name, number in list(self.rows):
            if name == category and (start is None or number >= start) and (stop is None or number < stop):
                del self.rows[name, number]


class Player:
    """Makes the same random changes to a job and to the model, and compares them after every one."""

    def __init__(self, root: str, seed: int, *, feed: bool) -> None:
        self.chance = random.Random(seed)
        self.wall = Wall()
        self.root = root
        self.feed = {"feed_changes_max": 50} if feed else {}
        self.model = Model(self.wall, 300)
        self.refused = self.allowed = 0
        self.open(300)

    def open(self, limit: int | None) -> None:
        self.persistency = Persistency(self.root, clock=self.wall)
        self.job = self.persistency.open_job("job", max_bytes=limit, **self.feed)
        self.model.limit = limit

    def place(self) -> tuple[str, int]:
        return self.chance.choice(CATEGORIES), self.chance.randrange(6)

    def payload(self) -> bytes:
        return b"x" * self.chance.choice([0, 1, 20, 50, 50, 90, 140, 310])

    def ttl(self) -> int | None:
        return self.chance.choice([None, None, 10, 20, 1_000])

    def play(self, steps: int) -> None:
        """Take so many steps."""
        try:
            for _ in range(steps):
                self.model.look()
                self.chance.choice(
                    [self.put, self.put, self.batch, self.run, self.swap, self.touch, self.delete, self.delete_span]
                    + [self.group, self.time, self.time, self.reopen]
                )()
                self.model.look()
                assert used(self.job) == self.model.used()
        finally:
            self.persistency.close()

    def ask(self, request: Callable[[], Any], act: Callable[[], Any]) -> Any:
        """Make a request, and expect of it what the model says."""
        allowed = self.model.change(act)
        self.allowed += allowed
        self.refused += not allowed
        if not allowed:
            error = refused(request)
            assert error.limit == self.model.limit
            assert error.used > error.limit
            return None
        return request().result(WAIT)

    def put(self) -> None:
        at, payload, ttl = self.place(), self.payload(), self.ttl()
        self.ask(
            lambda: self.job.commit(Put(at[0], (at[1],), payload, ttl)),
            lambda: self.model.rows.__setitem__(at, (payload, self.model.end(ttl))),
        )

    def _ops(self) -> tuple[list[Any], Callable[[], None]]:
        ops: list[Any] = []
        acts: list[Callable[[], Any]] = []
        for _ in range(self.chance.randrange(1, 6)):
            at, payload, ttl = self.place(), self.payload(), self.ttl()
            if self.chance.random() < 0.3:
                ops.append(Delete(at[0], (at[1],)))
                acts.append(lambda at=at: self.model.rows.pop(at, None))
            else:
                ops.append(Put(at[0], (at[1],), payload, ttl))
                row = (payload, self.model.end(ttl))
                acts.append(lambda at=at, row=row: self.model.rows.__setitem__(at, row))
        return ops, lambda: [act() for act in acts] and None

    def batch(self) -> None:
        ops, act = self._ops()
        self.ask(lambda: self.job.commit(ops), act)

    def run(self) -> None:
        ops, act = self._ops()
        raises = self.chance.random() < 0.3

        def fn(tx: Any) -> None:
            for op in ops:
                tx.commit([op]) if self.chance.random() < 0.5 else tx.run(lambda inner, op=op: inner.persist(op))
            if raises:
                raise KeyError("no")

        if raises:
            with pytest.raises(KeyError):
                self.job.run(fn).result(WAIT)
        else:
            self.ask(lambda: self.job.run(fn), act)

    def swap(self) -> None:
        at, payload, ttl = self.place(), self.payload(), self.ttl()
        there = self.model.rows.get(at, (None, None))[0]
        expected = there if self.chance.random() < 0.8 else b"something else"
        new = None if self.chance.random() < 0.2 else payload
        ttl = None if new is None else ttl

        def act() -> None:
            if expected == there:
                self.model.rows.pop(at, None)
                if new is not None:
                    self.model.rows[at] = (new, self.model.end(ttl))

        done = self.ask(lambda: self.job.compare_and_set(at[0], (at[1],), expected, new, ttl=ttl), act)
        assert done in (None, expected == there)

    def touch(self) -> None:
        at, ttl = self.place(), self.ttl()
        row = self.model.rows.get(at)
        if row is not None:
            self.model.rows[at] = (row[0], self.model.end(ttl))
        assert self.job.touch(at[0], (at[1],), ttl).result(WAIT) is (row is not None)

    def delete(self) -> None:
        at = self.place()
        there = self.model.rows.pop(at, None)
        assert self.job.delete_acked(at[0], (at[1],)).result(WAIT) is (there is not None)

    def delete_span(self) -> None:
        category, (start, stop) = self.chance.choice(CATEGORIES), self.chance.choice(SPANS)
        before = len(self.model.rows)
        self.model.drop_span(category, start, stop)
        span = KeyRange(None if start is None else (start,), None if stop is None else (stop,))
        assert self.job.delete_range_acked(category, span).result(WAIT) == before - len(self.model.rows)

    def group(self) -> None:
        """Several events in one group: each is judged alone, in order."""
        failing = 0
        with self.job._mailbox._lock:
            for _ in range(self.chance.randrange(1, 9)):
                ops, act = self._ops()
                if self.chance.random() < 0.5:
                    ops = ops[:1]
                    op = ops[0]
                    at = (op.category, op.key[0])
                    if isinstance(op, Put):
                        row = (bytes(op.payload), self.model.end(op.ttl))  # type: ignore[arg-type]  # an int
                        act = lambda at=at, row=row: self.model.rows.__setitem__(at, row)  # noqa: E731
                        self.job.put(op.category, op.key, op.payload, ttl=op.ttl)
                    else:
                        act = lambda at=at: self.model.rows.pop(at, None)  # type: ignore[misc,return-value]  # noqa: E731
                        self.job.delete(op.category, op.key)
                else:
                    self.job.persist(ops)
                failing += 0 if self.model.change(act) else len(ops)
        try:
            self.job.flush().result(WAIT)
            failed = 0
        except WriteFailed as error:
            failed = len(error.failures)
        assert failed == failing
        self.refused += failing

    def time(self) -> None:
        self.wall.now += self.chance.choice([-500, -1, 0.001, 5, 9.999, 10, 20])

    def reopen(self) -> None:
        if self.root == ":memory:" or self.chance.random() < 0.7:
            return
        used(self.job)  # so that the job has seen the time it will go on from
        self.persistency.close()
        if self.chance.random() < 0.4:
            self.open(None)
            for _ in range(self.chance.randrange(3)):
                self.put()
            used(self.job)
            self.persistency.close()
        self.open(self.chance.choice([0, 100, 300, 300, 300, 10_000]))


@pytest.mark.parametrize("feed", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_it_is_exact_against_a_model(root: str, seed: int, feed: bool) -> None:
    """S0-74 to S0-83: whatever is written, undone, ended or reopened, the number and every refusal are right."""
    player = Player(root, seed, feed=feed)
    player.play(150)
    assert player.refused > 5
    assert player.allowed > 20


# -- interrupts ----------------------------------------------------------------------------------------------------


class Stop(BaseException):
    """An interrupt."""


def interrupted(act: Callable[[], Any], at: int) -> bool:
    """Do something, and throw an exception at a step of it within the storage; return whether it came to that."""
    steps = 0

    def step(frame: Any, _event: str, _argument: Any) -> Any:
        nonlocal steps
        if f"{Path('persistency') / 'storage'}" not in frame.f_code.co_filename:
            return None
        steps += 1
        if steps == at:
            sys.settrace(None)
            raise Stop
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        act()
    except Stop:
        return True
    finally:
        sys.settrace(before)
    return False


def many_kinds(number: int) -> Group:
    """Return a group of every kind of write."""

    def fn(within: Any) -> None:
        within.do(SetRow(b"c", b"run", b"run", 50))
        within.do(DropRow(b"c", b"3"))

    name = b"%d" % number
    messages = [
        SetRow(b"c", b"t" + name, b"zzz", 20 + number),
        SwapRow(b"c", name, b"x" * number, b"swapped", 40),
        TouchRow(b"d", name, 30 + number),
        Batch([b"e", b"1", b"xx", None, DropRange(b"c", b"t0", b"t5"), None], 2, False),
        Run(fn),
        Batch([b"e", b"1", b"x" * 400, None, Expect(b"c", b"none", None), None], 2, True),
    ]
    puts = [b"c", name, b"x" * number, b"d", name, b"y" * (number + 1)]
    return puts + [place for message in messages for place in (None, message, None)]


@pytest.mark.parametrize("options", [StoreOptions(max_bytes=300), StoreOptions(max_bytes=300, feed_changes_max=15)])
@pytest.mark.parametrize("kind", ["memory", "directory"])
@pytest.mark.parametrize("what", ["group", "slice"])
def test_an_interrupt_at_any_moment_leaves_it_exact(
    tmp_path: Path, kind: str, options: StoreOptions, what: str
) -> None:
    """A group, or a slice of reaping, that is interrupted is done whole or not at all, and so is what it counts."""
    at, more = 1, True
    while more:
        root = MemoryRoot() if kind == "memory" else DirectoryRoot(tmp_path)
        store = root.open(f"job{at}", options)
        for number in range(1, 4):
            store.apply(many_kinds(number), number)
        act = partial(store.apply, many_kinds(7), 25) if what == "group" else partial(store.reap, 35, 3)
        more = interrupted(act, at)
        for now_ms in (35, 36, 1_000):
            live = [
                row for name in store.read(ListCategories(), now_ms) for row in store.read(ListEntries(name), now_ms)
            ]
            assert store.read(UsedBytes(), now_ms) == sum(len(row.payload) for row in live), at
            store.apply([b"z", b"z", b"zz"], now_ms)
            store.reap(now_ms, 3)
        store.close()
        at += 9
    assert at > 100


# -- what it costs to read -----------------------------------------------------------------------------------------


def cost_to_read(store: SqliteStore, now_ms: int) -> tuple[int, int, int]:
    """Return the statements, the steps and the pages it takes to read the bytes in use."""
    statements = steps = 0

    def note(event: dict[str, Any]) -> None:
        nonlocal statements, steps
        if event["code"] == apsw.SQLITE_TRACE_STMT:
            statements += 1
        else:
            steps += event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]

    connection = store._connection
    pages = [apsw.SQLITE_DBSTATUS_CACHE_HIT, apsw.SQLITE_DBSTATUS_CACHE_MISS]
    before = sum(connection.status(page)[0] for page in pages)
    connection.trace_v2(apsw.SQLITE_TRACE_STMT | apsw.SQLITE_TRACE_PROFILE, note)
    store.read(UsedBytes(), now_ms)
    connection.trace_v2(0)
    return statements, steps, sum(connection.status(page)[0] for page in pages) - before


def filled(place: Path, job_id: str, rows: int) -> SqliteStore:
    """Return a store with a quota and so many rows."""
    store = DirectoryRoot(place).open(job_id, StoreOptions(max_bytes=2**40))
    assert isinstance(store, SqliteStore)
    for at in range(0, rows, 10_000):
        group = [place for number in range(at, min(at + 10_000, rows)) for place in (b"c", b"%09d" % number, b"x" * 9)]
        store.apply(group, 1)
    return store


def compare_costs(place: Path, rows: int) -> None:
    """Read the bytes in use of a small job and of a large one; both cost the same, and next to nothing."""
    costs = []
    for job_id, count in (("small", 10), ("large", rows)):
        store = filled(place, job_id, count)
        assert store.read(UsedBytes(), 1) == 9 * count
        costs.append(cost_to_read(store, 2))
        store.close()
        store = filled(place, job_id, 0)
        assert store.read(UsedBytes(), 3) == 9 * count  # not counted anew at opening either
        costs.append(cost_to_read(store, 4))
        store.close()
    assert len(set(costs)) == 1, costs
    assert costs[0] == (0, 0, 0)  # the transaction of the read before is still open


def test_reading_it_costs_the_same_at_any_size(tmp_path: Path) -> None:
    """S0-84, D-41: `storage_used` of 100,000 rows takes the statements, steps and pages of ten: none."""
    compare_costs(tmp_path, 100_000)


def opening_steps(place: Path, job_id: str) -> int:
    """Return the steps of SQLite's virtual machine it takes to open a job with a quota."""
    steps = 0

    def note(event: dict[str, Any]) -> None:
        nonlocal steps
        steps += event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"]

    def watch(connection: apsw.Connection) -> None:
        connection.trace_v2(apsw.SQLITE_TRACE_PROFILE, note)

    apsw.connection_hooks.append(watch)
    try:
        filled(place, job_id, 0).close()
    finally:
        apsw.connection_hooks.remove(watch)
    return steps


def test_opening_a_job_with_a_quota_does_not_count_its_rows(tmp_path: Path) -> None:
    """The number is stored with the rows: opening a large job takes the steps of opening a small one."""
    for job_id, count in (("small", 10), ("large", 20_000)):
        filled(tmp_path, job_id, count).close()
    assert opening_steps(tmp_path, "small") == opening_steps(tmp_path, "large") > 0
