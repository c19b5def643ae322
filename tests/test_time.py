"""Time: a row is live if and only if now < expires, to the millisecond, whoever asks and however the clock goes."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any

import apsw
import pytest

from persistency import (
    Check,
    Conflict,
    DeleteRange,
    Entry,
    Job,
    Key,
    KeyRange,
    Misuse,
    Persistency,
    Put,
    Row,
    key,
)
from persistency.actor.upkeep import REAP_ROWS_MAX, REAP_SECONDS, Upkeep
from persistency.arguments import TTL_SECONDS_MAX
from persistency.storage.memory import MemoryStore
from persistency.storage.sqlite import SqliteStore
from tests.conftest import T0_MS, Wall
from tests.loops import LOOPS

WAIT = 20.0
K = key("k")
Seen = dict[str, Any]
View = Callable[[Job], Seen]


@pytest.fixture(params=[{}, {"max_bytes": 10_000}, {"feed_changes_max": 100}], ids=["plain", "quota", "feed"])
def job(request: pytest.FixtureRequest, persistency: Persistency) -> Job:
    """Give an empty job: with nothing beside its rows, with a quota, or with a feed."""
    return persistency.open_job("job", **request.param)


@pytest.fixture
def unreaped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the rows that have ended where they are."""
    monkeypatch.setattr(Upkeep, "_may_reap", lambda _upkeep, *, idle: False)


# -- the boundary -------------------------------------------------------------------------------------------------


READS: dict[str, Callable[[Any], Any]] = {
    "get": lambda to: to.get("c", K),
    "entry": lambda to: to.entry("c", K),
    "exists": lambda to: to.exists("c", K),
    "count": lambda to: to.count("c"),
    "count of a range": lambda to: to.count("c", KeyRange(K, ("l",))),
    "scan": lambda to: to.scan("c"),
    "scan in reverse": lambda to: to.scan("c", reverse=True, limit=5),
    "scan_prefix": lambda to: to.scan_prefix("c", K),
    "get_many": lambda to: to.get_many("c", [K, ("none",)]),
    "snapshot": lambda to: to.snapshot("c"),
    "categories": lambda to: to.categories(),
    "storage_used": lambda to: to.storage_used(),
}
LIVE: Seen = {
    "get": b"payload",
    "entry": Entry(K, b"payload", 1, T0_MS + 1_000),
    "exists": True,
    "count": 1,
    "count of a range": 1,
    "scan": [Row(K, b"payload")],
    "scan in reverse": [Row(K, b"payload")],
    "scan_prefix": [Row(K, b"payload")],
    "get_many": {K: b"payload"},
    "snapshot": [Entry(K, b"payload", 1, T0_MS + 1_000)],
    "categories": ["c"],
    "storage_used": 7,
    "iterate": [Row(K, b"payload")],
    "iterate over keys": [K],
}
ENDED: Seen = {
    **{name: [] for name in LIVE},
    "get": None,
    "entry": None,
    "exists": False,
    "count": 0,
    "count of a range": 0,
    "get_many": {},
    "storage_used": 0,
}


def in_thread(job: Job) -> Seen:
    """Read in place: in a plain thread that finds the job idle."""
    seen = {name: read(job).result(WAIT) for name, read in READS.items()}
    seen["iterate"] = list(job.iterate("c", page=1))
    return {**seen, "iterate over keys": list(job.iterate("c", keys_only=True))}


def in_task(job: Job, loop: str = "asyncio") -> Seen:
    """Read through the worker, each request alone."""

    async def main() -> Seen:
        seen = {name: await read(job) for name, read in READS.items()}
        seen["iterate"] = [row async for row in job.iterate("c", page=1)]
        return {**seen, "iterate over keys": [k async for k in job.iterate("c", keys_only=True)]}

    return LOOPS[loop](main)


def in_trio(job: Job) -> Seen:
    """Read the same in a task of trio's."""
    return in_task(job, "trio")


def in_group(job: Job) -> Seen:
    """Read through the worker, all in one group with a write among them."""
    with job._mailbox._lock:
        job.put("other", ("k",), b"")
        replies = {name: read(job) for name, read in READS.items()}
        job.delete("other", ("k",))
    seen = {name: reply.result(WAIT) for name, reply in replies.items()}
    seen["categories"] = [name for name in seen["categories"] if name != "other"]
    return {**in_thread(job), **seen}


def in_run(job: Job) -> Seen:
    """Read inside a transaction."""

    def fn(tx: Any) -> Seen:
        seen = {name: read(tx) for name, read in READS.items()}
        seen["iterate"] = list(tx.iterate("c", page=1))
        return {**seen, "iterate over keys": list(tx.iterate("c", keys_only=True))}

    return job.run(fn).result(WAIT)


@pytest.mark.parametrize("view", [in_thread, in_task, in_trio, in_group, in_run])
def test_every_read_sees_a_row_until_its_very_end(job: Job, wall: Wall, view: View) -> None:
    """S0-28, S0-31 to S0-35, S0-39, S2-12, S2-14: live at expires - 1 ms, gone at expires, on every read path."""
    job.put("c", K, b"payload", ttl=1)
    assert view(job) == LIVE
    wall.ms += 999
    assert view(job) == LIVE
    wall.ms += 1
    assert view(job) == ENDED
    wall.ms += 10**9
    assert view(job) == ENDED


@pytest.mark.usefixtures("unreaped")
@pytest.mark.parametrize("view", [in_thread, in_task, in_trio, in_group, in_run])
def test_no_read_relies_on_what_was_reaped(job: Job, wall: Wall, view: View) -> None:
    """S0-42: rows that have ended are not seen although they are still there."""
    job.put("c", K, b"payload", ttl=1)
    job.flush().result(WAIT)
    wall.ms += 1_000
    assert view(job) == ENDED


@pytest.mark.usefixtures("unreaped")
def test_a_range_has_only_its_live_rows(job: Job, wall: Wall) -> None:
    """S0-33, S0-34, S2-42: among ended rows the live ones are found, in order, up to the limit, in both directions."""
    for number in range(20):
        job.put("c", (number,), b"%d" % number, ttl=1 + number % 2)
    job.put("ended", (1,), b"", ttl=1)
    wall.ms += 1_000
    odd = [Row(key(number), b"%d" % number) for number in range(1, 20, 2)]
    assert job.scan("c").result(WAIT) == odd
    assert job.scan("c", reverse=True, limit=3).result(WAIT) == odd[:-4:-1]
    assert job.scan("c", KeyRange((4,), (10,)), limit=2).result(WAIT) == odd[2:4]
    assert list(job.iterate("c", page=2)) == odd
    assert list(job.iterate("c", page=3, reverse=True, keys_only=True)) == [row.key for row in odd[::-1]]
    assert job.count("c", KeyRange((0,), (5,))).result(WAIT) == 2
    assert [entry.key for entry in job.snapshot("c").result(WAIT)] == [row.key for row in odd]
    assert job.get_many("c", [(number,) for number in range(4)]).result(WAIT) == {key(1): b"1", key(3): b"3"}
    assert job.categories().result(WAIT) == ["c"]


# -- writes that look ----------------------------------------------------------------------------------------------


def ending_rows(job: Job, wall: Wall, *, ended: bool) -> None:
    """Put three rows that end together, and go to just before or to their end."""
    for number in range(3):
        job.put("c", (number,), b"x", ttl=60)
    job.flush().result(WAIT)
    wall.ms += 60_000 - (not ended)


@pytest.mark.usefixtures("unreaped")
@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_deletes_count_live_rows_only(job: Job, wall: Wall, ended: bool, within: bool) -> None:
    """S0-27, S0-65 (not so here), S2-13: an acknowledged delete tells what was really there; ended isn't."""
    ending_rows(job, wall, ended=ended)

    def deletes(to: Any) -> list[Any]:
        return [
            to.delete_acked("c", (0,)),
            to.delete_prefix_acked("c", (1,)),
            to.delete_range_acked("c", KeyRange((0,))),
        ]

    answers = job.run(deletes).result(WAIT) if within else [reply.result(WAIT) for reply in deletes(job)]
    assert answers == ([False, 0, 0] if ended else [True, 1, 1])
    assert job.count("c").result(WAIT) == 0


@pytest.mark.usefixtures("unreaped")
@pytest.mark.parametrize("within", [False, True])
def test_checks_take_an_ended_row_for_absent(job: Job, wall: Wall, within: bool) -> None:
    """S2-27: a check of absence holds from the end on, one of the version holds until then."""
    job.put("c", K, b"x", ttl=60)

    def commit(*ops: Any) -> Any:
        return job.run(lambda tx: tx.commit(ops)).result(WAIT) if within else job.commit(ops).result(WAIT)

    wall.ms += 59_999
    assert commit(Check("c", K, 1)) == 2
    with pytest.raises(Conflict) as caught:
        commit(Check("c", K, None), Put("c", K, b"y"))
    assert (caught.value.expected, caught.value.actual) == (None, 1)
    wall.ms += 1
    with pytest.raises(Conflict) as caught:
        commit(Check("c", K, 1), Put("c", K, b"y"))
    assert (caught.value.expected, caught.value.actual) == (1, None)
    assert commit(Check("c", K, None), Put("c", K, b"y")) == 4
    assert job.entry("c", K).result(WAIT) == Entry(K, b"y", 4, None)


@pytest.mark.usefixtures("unreaped")
@pytest.mark.parametrize("within", [False, True])
def test_the_other_verbs_take_it_for_absent_too(job: Job, wall: Wall, within: bool) -> None:
    """S2-27, S0-36: compare_and_set, increment and touch find nothing at the end; what they write doesn't end."""
    job.increment("n", K, 41).result(WAIT)
    job.touch("n", K, 60).result(WAIT)
    job.put("c", K, b"x", ttl=60)

    def verbs(to: Any) -> list[Any]:
        return [
            to.touch("c", K, 60),
            to.compare_and_set("c", K, b"x", b"y"),
            to.compare_and_set("c", K, None, b"z"),
            to.increment("n", K),
        ]

    def ask() -> list[Any]:
        return job.run(verbs).result(WAIT) if within else [reply.result(WAIT) for reply in verbs(job)]

    job.flush().result(WAIT)
    wall.ms += 60_000
    assert ask() == [False, False, True, 1]
    assert job.entry("c", K).result(WAIT)[1:] == (b"z", job.version().result(WAIT) - 1, None)  # type: ignore[index]
    assert job.entry("n", K).result(WAIT).expires_ms is None  # type: ignore[union-attr]  # it is there


@pytest.mark.usefixtures("unreaped")
@pytest.mark.parametrize("after_ms", [0, 59_999, 60_000])
def test_a_plain_put_clears_the_end(job: Job, wall: Wall, after_ms: int) -> None:
    """S0-36, S2-7: whatever way a row is put without a TTL, it doesn't end, even if the one before has ended."""
    puts: list[Callable[[Key], Any]] = [
        lambda k: job.put("c", k, b"new"),
        lambda k: job.persist(Put("c", k, b"new")),
        lambda k: job.commit([Put("c", k, b"new")]).result(WAIT),
        lambda k: job.compare_and_set("c", k, b"x" if after_ms < 60_000 else None, b"new").result(WAIT),
        lambda k: job.run(lambda tx: tx.put("c", k, b"new")).result(WAIT),
        lambda k: job.run(lambda tx: tx.commit(Put("c", k, b"new"))).result(WAIT),
    ]
    for number in range(len(puts)):
        job.put("c", (number,), b"x", ttl=60)
    job.flush().result(WAIT)
    wall.ms += after_ms
    for number, put in enumerate(puts):
        put(key(number))
    job.flush().result(WAIT)
    wall.ms += 10**12
    entries = job.snapshot("c").result(WAIT)
    assert [(entry.payload, entry.expires_ms) for entry in entries] == [(b"new", None)] * len(puts)


@pytest.mark.usefixtures("unreaped")
def test_a_put_with_a_ttl_revives_a_row_that_has_ended(job: Job, wall: Wall) -> None:
    """S0-37, S2-28: value and end are replaced, as by every write that has a TTL."""
    job.put("c", K, b"1", ttl=1)
    job.flush().result(WAIT)
    wall.ms += 5_000
    job.put("c", K, b"2", ttl=2)
    assert job.entry("c", K).result(WAIT) == Entry(K, b"2", 2, wall.ms + 2_000)
    assert job.compare_and_set("c", K, b"2", b"3", ttl=3).result(WAIT) is True
    assert job.entry("c", K).result(WAIT) == Entry(K, b"3", 3, wall.ms + 3_000)
    wall.ms += 3_000
    assert job.get("c", K).result(WAIT) is None


def test_touch_moves_the_end_and_nothing_else(job: Job, wall: Wall) -> None:
    """`touch` lengthens, shortens, sets and clears an end; payload and version stay, and it takes a version itself."""
    job.put("c", K, b"x")
    for ttl, end_ms in ((10, 10_000), (100, 100_000), (1, 1_000), (None, None), (timedelta(seconds=5), 5_000)):
        assert job.touch("c", K, ttl).result(WAIT) is True
        expected = None if end_ms is None else wall.ms + end_ms
        assert job.entry("c", K).result(WAIT) == Entry(K, b"x", 1, expected)
    assert job.version().result(WAIT) == 6
    assert job.touch("c", ("none",), 1).result(WAIT) is False
    assert job.version().result(WAIT) == 6
    wall.ms += 5_000
    assert job.get("c", K).result(WAIT) is None


# -- from when it counts -------------------------------------------------------------------------------------------


class Hold:
    """Holds every store at the door of its next group."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._may_go, self._entered = threading.Event(), threading.Semaphore(0)
        for kind in (MemoryStore, SqliteStore):
            monkeypatch.setattr(kind, "apply", self._held(kind.apply))

    def _held(self, apply: Callable[..., Any]) -> Callable[..., Any]:
        def held(store: Any, group: list[Any], now_ms: int) -> Any:
            if b"held" in group[::3]:
                self._entered.release()
                assert self._may_go.wait(WAIT)
            return apply(store, group, now_ms)

        return held

    def hold(self, job: Job) -> None:
        """Bring the worker to a halt in a group of its own."""
        job.put("held", K, b"")
        assert self._entered.acquire(timeout=WAIT)

    def let_go(self) -> None:
        """Let it go on."""
        self._may_go.set()


@pytest.fixture
def hold(persistency: Persistency, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hold]:
    """Give a hold that is let go at the end, whatever happened."""
    hold = Hold(monkeypatch)
    yield hold
    hold.let_go()


def test_a_ttl_counts_from_the_call(job: Job, wall: Wall, hold: Hold) -> None:
    """Promise 9: not from when the worker gets to it, for every verb that takes one."""
    job.put("c", ("touched",), b"x")
    job.put("c", ("swapped",), b"x")
    job.flush().result(WAIT)
    hold.hold(job)
    job.put("c", ("put",), b"x", ttl=60)
    job.persist([Put("c", ("batched",), b"x", 60), Put("c", ("lasting",), b"x")])
    posted = [
        job.commit(Put("c", ("committed",), b"x", timedelta(minutes=1))),
        job.touch("c", ("touched",), 60),
        job.compare_and_set("c", ("swapped",), b"x", b"y", ttl=60),
    ]
    wall.ms += 59_000
    hold.let_go()
    for reply in posted:
        reply.result(WAIT)
    ends = {entry.key.parts[0]: entry.expires_ms for entry in job.snapshot("c").result(WAIT)}
    names = ["put", "batched", "committed", "touched", "swapped"]
    assert ends == {**dict.fromkeys(names, T0_MS + 60_000), "lasting": None}
    wall.ms += 1_000
    assert [row.key.parts[0] for row in job.scan("c").result(WAIT)] == ["lasting"]


def test_a_row_that_has_ended_before_it_is_written_is_never_seen(job: Job, wall: Wall, hold: Hold) -> None:
    """Promise 9: a put that waited longer than its TTL leaves nothing, in its own group or later."""
    hold.hold(job)
    job.put("c", K, b"x" * 50, ttl=1)
    job.persist([Put("c", ("l",), b"x" * 50, 1)])
    seen = [read(job) for read in READS.values()]
    swapped = job.compare_and_set("c", ("m",), None, b"x", ttl=1)
    touched = job.touch("c", K, 100)
    wall.ms += 1_000
    hold.let_go()
    assert dict(zip(READS, (reply.result(WAIT) for reply in seen), strict=True)) == {
        **{name: ENDED[name] for name in READS},
        "categories": ["held"],
    }
    assert (swapped.result(WAIT), touched.result(WAIT)) == (True, False)
    assert job.get("c", ("m",)).result(WAIT) is None
    job.flush().result(WAIT)
    numbers = job.statistics()
    assert (numbers.failed, numbers.pending) == (0, 0)


def test_inside_a_run_a_ttl_counts_from_the_call_too(job: Job, wall: Wall) -> None:
    """The transaction's verbs stamp as the job's do, and every read of the transaction is by one time."""

    def fn(tx: Any) -> None:
        assert tx.now_ms == wall.ms
        tx.put("c", (1,), b"x", ttl=10)
        wall.ms += 10_000
        tx.put("c", (2,), b"x", ttl=10)
        tx.commit(Put("c", (3,), b"x", 10))
        assert tx.compare_and_set("c", (4,), None, b"x", ttl=10)

    job.run(fn).result(WAIT)
    ends = [entry.expires_ms for entry in job.snapshot("c").result(WAIT)]
    assert ends == [T0_MS + 20_000] * 3


# -- what a TTL may be --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ttl", "ms"),
    [
        (1, 1_000),
        (1.0, 1_000),
        (0.001, 1),
        (0.0014, 1),
        (0.0016, 2),
        (1e-9, 1),
        (5e-324, 1),
        (1.5, 1_500),
        (86_400, 86_400_000),
        (timedelta(days=1), 86_400_000),
        (timedelta(milliseconds=1), 1),
        (timedelta(microseconds=1), 1),
        (timedelta(days=1, microseconds=1), 86_400_000),
        (TTL_SECONDS_MAX, TTL_SECONDS_MAX * 1_000),
        (float(TTL_SECONDS_MAX), TTL_SECONDS_MAX * 1_000),
        (timedelta(seconds=TTL_SECONDS_MAX), TTL_SECONDS_MAX * 1_000),
    ],
)
def test_ttls_are_milliseconds_of_any_length(persistency: Persistency, wall: Wall, ttl: Any, ms: int) -> None:
    """S0-30, S2-8, D-11: seconds of any fraction, or a timedelta; at least one millisecond, and never born ended."""
    job = persistency.open_job("job")
    job.put("c", (1,), b"", ttl=ttl)
    job.commit(Put("c", (2,), b"", ttl)).result(WAIT)
    assert job.compare_and_set("c", (3,), None, b"", ttl=ttl).result(WAIT)
    job.put("c", (4,), b"")
    assert job.touch("c", (4,), ttl).result(WAIT)
    entries = job.snapshot("c").result(WAIT)
    assert [entry.expires_ms for entry in entries] == [wall.ms + ms] * 4


BAD_TTLS: list[Any] = [
    float("nan"),
    0,
    0.0,
    -0.0,
    -1,
    -5,
    -1e-9,
    float("inf"),
    float("-inf"),
    1e300,
    TTL_SECONDS_MAX + 1,
    2**63 - 1,
    10**5_000,
    -(10**5_000),
    True,
    False,
    "60",
    b"60",
    [60],
    Decimal(60),
    Fraction(60),
    1 + 0j,
    object(),
    timedelta(0),
    timedelta(seconds=-1),
    timedelta.max,
    timedelta.min,
]
VERBS_WITH_TTL: dict[str, Callable[[Any, Any], Any]] = {
    "put": lambda to, ttl: to.put("c", K, b"x", ttl=ttl),
    "persist": lambda to, ttl: to.persist(Put("c", K, b"x", ttl)),
    "persist of several": lambda to, ttl: to.persist([Put("c", K, b"x"), Put("c", K, b"x", ttl)]),
    "commit": lambda to, ttl: to.commit([Put("c", K, b"x", 60), Put("c", K, b"x", ttl)]),
    "compare_and_set": lambda to, ttl: to.compare_and_set("c", K, None, b"x", ttl=ttl),
    "touch": lambda to, ttl: to.touch("c", K, ttl),
}


@pytest.mark.parametrize("verb", VERBS_WITH_TTL)
def test_what_is_no_ttl_is_refused_at_the_call(persistency: Persistency, verb: str) -> None:
    """S0-29, S0-41, S2-9, D-10: NaN, zero, negative, giant or no number: Misuse at the call, nothing posted."""
    job = persistency.open_job("job")
    call = VERBS_WITH_TTL[verb]
    for ttl in BAD_TTLS:
        with pytest.raises(Misuse, match="ttl"):
            call(job, ttl)
    assert job.statistics().accepted == 0

    def fn(tx: Any) -> None:
        for ttl in BAD_TTLS:
            with pytest.raises(Misuse, match="ttl"):
                call(tx, ttl)

    job.run(fn).result(WAIT)
    assert (job.count("c").result(WAIT), job.version().result(WAIT)) == (0, 0)


def test_a_ttl_for_a_deletion_is_refused(persistency: Persistency) -> None:
    """`compare_and_set(..., None, ttl=...)` would set an end to nothing."""
    job = persistency.open_job("job")
    with pytest.raises(Misuse, match="ttl"):
        job.compare_and_set("c", K, b"x", None, ttl=60)
    with pytest.raises(Misuse, match="ttl"):
        job.run(lambda tx: tx.compare_and_set("c", K, b"x", None, ttl=60)).result(WAIT)
    with pytest.raises(TypeError):
        job.touch("c", K)  # type: ignore[call-arg]  # no TTL is no answer to "until when"


# -- the clock ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", [in_thread, in_task, in_trio, in_group, in_run])
def test_a_clock_that_steps_back_revives_nothing(job: Job, wall: Wall, view: View) -> None:
    """Promise 9: a job's time never goes back, so what has ended stays so, reaped or not."""
    job.put("c", K, b"payload", ttl=1)
    job.put("c", ("later",), b"payload", ttl=100)
    wall.ms += 1_000
    assert job.exists("c", K).result(WAIT) is False
    for back_ms in (1, 1_000, 10**9):
        wall.ms -= back_ms
        assert job.get("c", K).result(WAIT) is None
        seen = view(job)
        assert seen["entry"] is None
        assert seen["scan"] == [Row(key("later"), b"payload")]
        assert seen["storage_used"] == 7


def test_after_a_step_back_ttls_count_from_the_job_s_time(job: Job, wall: Wall) -> None:
    """Promise 9: a new TTL is counted from the time that stands still until the clock has caught up."""
    wall.ms += 5_000
    job.version().result(WAIT)
    wall.ms -= 4_000
    job.put("c", K, b"x", ttl=1)
    assert job.entry("c", K).result(WAIT).expires_ms == T0_MS + 6_000  # type: ignore[union-attr]  # it is there
    wall.ms = T0_MS + 5_999
    assert job.exists("c", K).result(WAIT)
    wall.ms += 1
    assert not job.exists("c", K).result(WAIT)


@pytest.mark.usefixtures("unreaped")
@pytest.mark.parametrize("reading", ["get", "exists", "scan", "count", "write"])
def test_what_has_ended_stays_so_across_reopening(tmp_path: Path, wall: Wall, reading: str) -> None:
    """Promise 9: what somebody was told has ended doesn't come back by a clock that was set back in between."""
    asks: dict[str, Callable[[Job], Any]] = {
        "get": lambda job: job.get("c", K).result(WAIT),
        "exists": lambda job: job.exists("c", K).result(WAIT),
        "scan": lambda job: job.scan("c").result(WAIT),
        "count": lambda job: job.count("c").result(WAIT),
        "write": lambda job: job.delete_acked("c", ("none",)).result(WAIT),
    }
    with Persistency(tmp_path, clock=wall) as persistency:
        job = persistency.open_job("job")
        job.put("c", K, b"x", ttl=60)
        job.flush().result(WAIT)
        wall.ms += 60_000
        assert not asks[reading](job)
    wall.ms -= 3_600_000
    with Persistency(tmp_path, clock=wall) as persistency:
        job = persistency.open_job("job")
        assert job.get("c", K).result(WAIT) is None
        assert job.compare_and_set("c", K, None, b"y", ttl=1).result(WAIT) is True
        assert job.entry("c", K).result(WAIT).expires_ms == T0_MS + 61_000  # type: ignore[union-attr]


@pytest.mark.usefixtures("unreaped")
def test_what_has_ended_stays_so_after_a_kill(tmp_path: Path, wall: Wall) -> None:
    """Promise 9: the time of the last commit is in the file with it, and nothing goes back behind that."""
    with Persistency(tmp_path / "a", clock=wall) as persistency:
        job = persistency.open_job("job")
        job.put("c", K, b"x", ttl=60)
        job.flush().result(WAIT)
        wall.ms += 60_000
        job.commit(Put("c", ("l",), b"x")).result(WAIT)
        (tmp_path / "b").mkdir()
        for path in (tmp_path / "a").iterdir():
            shutil.copy(path, tmp_path / "b")
    wall.ms -= 3_600_000
    with Persistency(tmp_path / "b", clock=wall) as persistency:
        job = persistency.open_job("job")
        assert [row.key.parts for row in job.scan("c").result(WAIT)] == [("l",)]


def test_a_job_opened_with_a_quota_again_knows_the_time_it_had(tmp_path: Path, wall: Wall) -> None:
    """Promise 9: whatever a job is opened with, its time goes on from where it was, and no row ends early by it."""
    with Persistency(tmp_path, clock=wall) as persistency:
        persistency.open_job("job", max_bytes=100).put("c", (1,), b"x")
    wall.ms -= 1_000_000
    with Persistency(tmp_path, clock=wall) as persistency:
        persistency.open_job("job").put("c", (2,), b"y", ttl=500)
    with Persistency(tmp_path, clock=wall) as persistency:
        assert persistency.open_job("job", max_bytes=100).get("c", (2,)).result(WAIT) == b"y"


def test_two_jobs_have_each_their_own_time(persistency: Persistency, wall: Wall) -> None:
    """What one job has seen of the clock is nothing to another."""
    early, late = persistency.open_job("early"), persistency.open_job("late")
    wall.ms += 10_000
    late.version().result(WAIT)
    wall.ms -= 10_000
    for job in (early, late):
        job.put("c", K, b"x", ttl=1)
    ends = [job.entry("c", K).result(WAIT).expires_ms for job in (early, late)]  # type: ignore[union-attr]
    assert ends == [T0_MS + 1_000, T0_MS + 11_000]


@pytest.mark.parametrize("seconds", [0.0, -5.0, -1e20, 1e20])
def test_no_clock_can_say_what_can_not_be_stored(root: str, seconds: float) -> None:
    """Whatever a clock says, rows with a TTL are written, read and end."""
    now = seconds
    with Persistency(root, clock=lambda: now) as persistency:
        job = persistency.open_job("job")
        job.put("c", K, b"x", ttl=1)
        assert job.get("c", K).result(WAIT) == b"x"
        now = max(now, 0.0) + 1
        if seconds < 1e12:
            assert job.get("c", K).result(WAIT) is None


# -- taking them away -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unreaped")
def test_writes_do_not_sweep(tmp_path: Path, wall: Wall) -> None:
    """S2-15, D-43: beside 2,000 ended rows a put runs the statements it always runs; nothing sweeps after a write."""
    statements: list[str] = []

    def watch(connection: apsw.Connection) -> None:
        connection.trace_v2(apsw.SQLITE_TRACE_STMT, lambda event: statements.append(event["sql"]))

    apsw.connection_hooks.append(watch)
    try:
        with Persistency(tmp_path, clock=wall) as persistency:
            job = persistency.open_job("job")
            job.commit([Put("c", (number,), b"x", 60) for number in range(2_000)]).result(WAIT)
            del statements[:]
            job.commit(Put("c", ("before",), b"x")).result(WAIT)
            before = list(statements)
            wall.ms += 60_000
            del statements[:]
            job.commit(Put("c", ("after",), b"x")).result(WAIT)
            # The time may have to be noted anew; nothing else is different.
            assert [sql for sql in statements if " meta " not in sql] == [sql for sql in before if " meta " not in sql]
            assert not [sql for sql in statements if sql.startswith("DELETE")]
    finally:
        apsw.connection_hooks.remove(watch)


class Slices:
    """Notes what every store reaps, and when, and whether there was work meanwhile."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.counts: list[int] = []
        self.begun: list[tuple[bool, float]] = []  # idle or not, and when
        self._idle = True
        may_reap, reap = Upkeep._may_reap, Upkeep._reap

        def noted_may(upkeep: Upkeep, *, idle: bool) -> bool:
            self._idle = idle
            return may_reap(upkeep, idle=idle)

        def noted_reap(upkeep: Upkeep) -> None:
            self.begun.append((self._idle, monotonic()))
            reap(upkeep)

        monkeypatch.setattr(Upkeep, "_may_reap", noted_may)
        monkeypatch.setattr(Upkeep, "_reap", noted_reap)
        for kind in (MemoryStore, SqliteStore):
            monkeypatch.setattr(kind, "reap", self._counted(kind.reap))

    def _counted(self, reap: Callable[..., int]) -> Callable[..., int]:
        def counted(store: Any, now_ms: int, limit: int) -> int:
            count = reap(store, now_ms, limit)
            self.counts.append(count)
            return count

        return counted

    def too_early(self) -> list[float]:
        """Return how long after the one before those slices began that began too early beside work."""
        gaps = ((later[0], later[1] - earlier[1]) for earlier, later in pairwise(self.begun))
        return [gap for idle, gap in gaps if not idle and gap < REAP_SECONDS]


def vanish(root: str, count: int, slices: Slices, told: Callable[[int], None] = lambda _left: None) -> set[str]:
    """Let so many rows end, and put others until they are gone; return the categories that are left in the store."""
    wall = Wall()
    with Persistency(root, clock=wall) as persistency:
        job = persistency.open_job("job")
        for number in range(count):
            job.put("ending", (number,), b"x" * 20, ttl=1.0)
        job.flush().result(600)
        assert job.count("ending").result(600) == count
        assert slices.counts == []
        wall.ms += 1_000
        put = 0
        while sum(slices.counts) < count:
            job.put("lasting", (put,), b"y")
            put += 1
            job.flush().result(WAIT)
            told(count - sum(slices.counts))
        assert job.count("lasting").result(WAIT) == put > 0
        return kept(job)


def check_slices(slices: Slices, count: int, left: set[str]) -> None:
    """Check that so many rows were reaped as they should be, and what is left."""
    assert left == {"lasting"}
    assert sum(slices.counts) == count
    assert max(slices.counts) <= REAP_ROWS_MAX
    assert slices.too_early() == []


def kept(job: Job) -> set[str]:
    """Return the categories that have rows in a job's store, whether those have ended or not."""
    store = job._statistics.__self__.store  # type: ignore[attr-defined]  # a bound method, of its worker

    def look(_tx: Any) -> set[bytes]:
        if isinstance(store, MemoryStore):
            return {name for name, rows in store._table.categories.items() if rows.rows}
        return {name for (name,) in store._execute("SELECT DISTINCT category FROM kv")}

    return {name.decode() for name in job.run(look).result(600)}


def test_rows_that_have_ended_vanish_beside_puts_without_being_read(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """S0-40, S0-43 to S0-45: 100,000 rows with a TTL of 1 s are gone from the store while puts go on, in slices.

    `python -m tests.soak large` does it with a million.
    """
    slices = Slices(monkeypatch)
    check_slices(slices, 100_000, vanish(root, 100_000, slices))


@pytest.mark.usefixtures("unreaped")
def test_rows_that_have_ended_are_there_until_they_are_reaped_or_deleted(persistency: Persistency, wall: Wall) -> None:
    """S0-27, S0-42: where nothing is reaped an ended row stays where it is; deleting it takes it away."""
    job = persistency.open_job("job")
    for category in ("left", "deleted", "range"):
        job.put(category, K, b"x", ttl=1)
    job.flush().result(WAIT)
    wall.ms += 1_000
    assert kept(job) == {"left", "deleted", "range"}
    assert job.delete_acked("deleted", K).result(WAIT) is False
    assert job.commit(DeleteRange("range", KeyRange(K))).result(WAIT) == 5
    assert kept(job) == {"left"}
