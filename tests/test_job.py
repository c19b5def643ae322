"""A job, verb by verb, over both adapters, from a thread and under asyncio."""

from __future__ import annotations

import asyncio
import copy
import gc
import logging
import pickle
import threading
from array import array
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    CancelledError,
    Future,
    ThreadPoolExecutor,
    as_completed,
    wait,
)
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import Any, TypeVar

import anyio
import pytest

from persistency import (
    Category,
    Check,
    Closed,
    Conflict,
    Corrupt,
    Delete,
    DeletePrefix,
    DeleteRange,
    Entry,
    Failure,
    Found,
    Job,
    Key,
    KeyRange,
    Misuse,
    Op,
    Overloaded,
    Persistency,
    Put,
    RawKey,
    Reply,
    Row,
    WriteFailed,
    key,
)
from persistency.storage.memory import MemoryStore
from persistency.storage.port import PLACES, GetRow, ScanRange
from persistency.storage.sqlite import SqliteStore
from tests.loops import LOOPS, GivenUp, InLoop, Task, bounded, together, turns

WAIT = 20.0  # seconds a test waits for what must come
T = TypeVar("T")
Ask = Callable[[Callable[[], Reply[Any]]], Any]
NEVER = 10**6  # a version no row has: a Check of it fails


class Gate:
    """Stands in front of every store: holds a job's group while it is told to, and notes what stores are asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Any] = []
        self.error: Exception | None = None
        self._may_go = threading.Event()
        self._entered = threading.Semaphore(0)
        for kind in (MemoryStore, SqliteStore):
            monkeypatch.setattr(kind, "apply", self._guarded(kind.apply))

    def _guarded(self, apply: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
        def guarded(store: Any, group: list[Any], now_ms: int) -> list[Any]:
            self.asked += group[1::PLACES]
            if b"held" in group[::PLACES]:
                self._entered.release()
                assert self._may_go.wait(WAIT)
                if self.error is not None:
                    raise self.error
            return apply(store, group, now_ms)

        return guarded

    def hold(self, job: Job) -> None:
        """Bring the job's worker to a halt within a group of its own; that is one put into the category "held"."""
        self._may_go.clear()
        job.put("held", ("held",), b"")
        assert self._entered.acquire(timeout=WAIT)

    def release(self) -> None:
        """Let everybody go on."""
        self._may_go.set()


class Listener:
    """An `on_error` that keeps what it is told, and in which thread."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[Failure]]] = []
        self.threads: list[threading.Thread] = []
        self.called = threading.Semaphore(0)

    def __call__(self, job_id: str, failures: Any) -> None:
        self.calls.append((job_id, list(failures)))
        self.threads.append(threading.current_thread())
        self.called.release()

    def wait(self) -> None:
        """Wait for one call."""
        assert self.called.acquire(timeout=WAIT)


@pytest.fixture(params=["memory", "directory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str | Path:
    """Name a root of either kind."""
    return ":memory:" if request.param == "memory" else tmp_path / "root"


@pytest.fixture
def persistency(root: str | Path) -> Iterator[Persistency]:
    """Give an empty root."""
    with Persistency(root) as opened:
        yield opened


@pytest.fixture
def job(persistency: Persistency) -> Job:
    """Give an empty job."""
    return persistency.open_job("job")


@pytest.fixture
def gate(persistency: Persistency, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    """Give a gate that is open at the end, whatever happened."""
    gate = Gate(monkeypatch)
    yield gate
    gate.release()


@pytest.fixture(params=["thread", *LOOPS])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Make a request and take its answer: in a plain thread, or within an event loop."""
    if request.param == "thread":
        return lambda request_it: request_it().result(WAIT)
    return partial(LOOPS[request.param], bounded)


def run(main: Awaitable[T]) -> T:
    """Run a coroutine in a loop of its own; a hang is a failure."""

    async def bounded() -> T:
        return await asyncio.wait_for(main, WAIT)

    return asyncio.run(bounded())


def in_thread(fn: Callable[[], T]) -> Future[T]:
    """Run a function in a daemon thread of its own; the future has what it returns or raises."""
    future: Future[T] = Future()

    def body() -> None:
        try:
            future.set_result(fn())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=body, daemon=True).start()
    return future


def fill(job: Job, count: int, category: str = "c") -> list[Key]:
    """Put rows of the numbers below `count`; return their keys."""
    keys = [key(number) for number in range(count)]
    for number, k in enumerate(keys):
        job.put(category, k, b"%d" % number)
    return keys


def parts(rows: list[Row]) -> list[tuple[Any, ...]]:
    """Return the decoded keys of rows."""
    return [row.key.parts for row in rows]


def failing(*ops: Op) -> list[Op]:
    """Return a batch of these operations that is going to fail."""
    return [*ops, Check("c", ("never",), NEVER)]


def assert_balanced(job: Job, accepted: int) -> None:
    """Check the numbers of a job where nothing is waiting."""
    numbers = job.statistics()
    assert numbers.accepted == accepted
    assert numbers.committed + numbers.failed == accepted
    assert (numbers.pending, numbers.mailbox_bytes) == (0, 0)


# -- events and point reads ---------------------------------------------------------------------------------------


def test_what_was_put_is_read(job: Job, ask: Ask) -> None:
    """S3-64, S3-52: `get` gives the payload last put, and `None` for a missing key; a put returns None."""
    assert ask(lambda: job.get("c", ("k", 1))) is None
    assert job.put("c", ("k", 1), b"one") is None  # type: ignore[func-returns-value]
    assert ask(lambda: job.get("c", ("k", 1))) == b"one"
    job.put("c", key("k", 1), b"another")
    assert ask(lambda: job.get("c", key("k", 1))) == b"another"
    assert ask(lambda: job.count("c")) == 1


def test_the_empty_key_and_the_empty_payload_are_like_others(job: Job, ask: Ask) -> None:
    """S3-63, S3-75, D-4: an empty key and an empty payload are stored, read, scanned and deleted."""
    job.put("c", (), b"")
    job.put("c", ("k",), b"")
    assert ask(lambda: job.get("c", ())) == b""
    assert ask(lambda: job.exists("c", key())) is True
    assert ask(lambda: job.scan("c")) == [Row(key(), b""), Row(key("k"), b"")]
    assert ask(lambda: job.scan("c", KeyRange((), ("k",)))) == [Row(key(), b"")]
    assert ask(lambda: job.scan_prefix("c", (), reverse=True)) == [Row(key("k"), b""), Row(key(), b"")]
    assert ask(lambda: job.get_many("c", [(), ("k",)])) == {key(): b"", key("k"): b""}
    assert ask(lambda: job.delete_acked("c", ())) is True
    assert ask(lambda: job.count("c")) == 1


def test_payloads_are_copied_at_the_call(job: Job, gate: Gate) -> None:
    """What the caller changes after the call changes nothing of what was posted, nor is its buffer held."""
    gate.hold(job)
    buffer = bytearray(b"before")
    job.put("c", (1,), buffer)
    job.put("c", (2,), memoryview(buffer)[2:])
    job.put("c", (3,), memoryview(buffer)[::-1])
    job.persist(Put("c", (4,), buffer))
    reply = job.commit([Put("c", (5,), buffer)])
    buffer[:] = b"AFTER!"
    buffer += b"and longer"  # a held buffer couldn't grow
    gate.release()
    reply.result(WAIT)
    payloads = [row.payload for row in job.scan("c").result(WAIT)]
    assert payloads == [b"before", b"fore", b"erofeb", b"before", b"before"]
    assert {type(payload) for payload in payloads} == {bytes}


def test_any_bytes_like_object_is_a_payload(job: Job) -> None:
    """Arrays, and bytes of a derived class, are stored as the bytes they are, and come back as plain bytes."""
    job.put("c", (1,), array("H", [1, 2]))  # type: ignore[arg-type]
    job.put("c", (2,), key("a"))
    assert job.get("c", (1,)).result(WAIT) == array("H", [1, 2]).tobytes()
    got = job.get("c", (2,)).result(WAIT)
    assert (type(got), got) == (bytes, bytes(key("a")))


def test_a_payload_of_16_mib_comes_back_whole(job: Job, ask: Ask) -> None:
    """D-2: nothing is too large for the way there and back."""
    payload = bytes(range(256)) * 65_536
    job.put("c", ("big",), payload)
    job.put("c", ("small",), b"x")
    assert ask(lambda: job.get("c", ("big",))) == payload
    assert [len(row.payload) for row in ask(lambda: job.scan("c"))] == [len(payload), 1]


def test_writes_apply_in_the_order_they_were_posted(job: Job, ask: Ask) -> None:
    """S3-60, S3-53: put, delete, put of one key leaves the last; a delete after a put leaves nothing."""
    for payload in (b"1", b"2"):
        job.put("c", ("k",), payload)
        job.delete("c", ("k",))
    job.put("c", ("k",), b"3")
    job.put("c", ("gone",), b"x")
    job.delete("c", ("gone",))
    assert ask(lambda: job.get("c", ("k",))) == b"3"
    assert ask(lambda: job.get("c", ("gone",))) is None


def test_deleting_what_is_not_there_is_fine(job: Job, ask: Ask) -> None:
    """S3-54: no delete of a missing key, prefix or range is an error."""
    job.delete("c", ("k",))
    job.delete_prefix("c", ("k",))
    job.delete_range("c", KeyRange(("a",), ("b",)))
    assert ask(job.flush) is None
    assert ask(lambda: job.delete_acked("c", ("k",))) is False
    assert ask(lambda: job.delete_prefix_acked("c", ("k",))) == 0
    assert ask(lambda: job.delete_range_acked("c", KeyRange(("a",)))) == 0


def test_categories_are_separate(job: Job, ask: Ask) -> None:
    """S3-83, S3-66: one key in two categories is two rows, for every verb."""
    job.put("log", ("k",), b"1")
    job.put("outgoing", ("k",), b"2")
    job.put("outgoing", ("l",), b"3")
    assert ask(lambda: job.get("log", ("k",))) == b"1"
    assert (ask(lambda: job.count("log")), ask(lambda: job.count("outgoing"))) == (1, 2)
    assert ask(lambda: job.exists("log", ("l",))) is False
    assert ask(lambda: job.get_many("log", [("k",), ("l",)])) == {key("k"): b"1"}
    assert ask(lambda: job.delete_range_acked("log", KeyRange(stop=("z",)))) == 1
    assert [row.payload for row in ask(lambda: job.scan("outgoing"))] == [b"2", b"3"]


def test_categories_that_have_rows_are_listed(job: Job, ask: Ask) -> None:
    """`categories` names those that have rows, in byte order, and no longer those that have none."""
    assert ask(job.categories) == []
    for name in ("b", "a", "é", "ab", "Z"):
        job.put(name, ("k",), b"")
    assert ask(job.categories) == ["Z", "a", "ab", "b", "é"]
    job.delete("ab", ("k",))
    job.delete_prefix("é", ("k",))
    assert ask(job.categories) == ["Z", "a", "b"]


def test_an_entry_has_the_version_of_its_last_write(job: Job, ask: Ask) -> None:
    """`entry` gives key, payload and version, no expiry where there is none, and `None` for a missing key."""
    job.put("c", ("k",), b"1")
    job.put("c", ("other",), b"2")
    job.put("c", ("k",), b"3")
    entry = ask(lambda: job.entry("c", ("k",)))
    assert entry == Entry(key("k"), b"3", 3, None)
    assert (type(entry), type(entry.key)) == (Entry, Key)
    assert ask(lambda: job.entry("c", ("missing",))) is None


def test_exists_tells_a_row_with_an_empty_payload_from_none(job: Job, ask: Ask) -> None:
    """S3-65: `exists` is a bool."""
    job.put("c", ("k",), b"")
    assert ask(lambda: job.exists("c", ("k",))) is True
    assert ask(lambda: job.exists("c", ("l",))) is False


def test_parts_of_different_types_are_different_keys(job: Job, ask: Ask) -> None:
    """`True`, `1` and `1.0`, and a str and bytes, stay keys of their own."""
    kinds: list[tuple[Any, ...]] = [(1,), (True,), (1.0,), ("a",), (b"a",), (None,), ((1,),)]
    for number, kind in enumerate(kinds):
        job.put("c", kind, b"%d" % number)
    assert [ask(partial(job.get, "c", kind)) for kind in kinds] == [b"%d" % n for n in range(len(kinds))]


# -- get_many -----------------------------------------------------------------------------------------------------


def test_get_many_keeps_the_order_asked(job: Job, ask: Ask) -> None:
    """`get_many` gives a dict by `Key` in the order asked, each key once, the missing left out."""
    fill(job, 5)
    found = ask(lambda: job.get_many("c", [(3,), key(1), (9,), (3,), (0,)]))
    assert isinstance(found, dict)
    assert list(found.items()) == [(key(3), b"3"), (key(1), b"1"), (key(0), b"0")]
    assert ask(lambda: job.get_many("c", [])) == {}
    assert list(ask(lambda: job.get_many("c", (key(n) for n in (4, 2))))) == [key(4), key(2)]


def test_found_rows_are_looked_up_by_tuple(job: Job, ask: Ask) -> None:
    """Looking up a tuple works, and `(1,)`, `(True,)` and `(1.0,)` are told apart."""
    for kind, payload in (((1,), b"int"), ((True,), b"bool")):
        job.put("c", kind, payload)
    found: Any = ask(lambda: job.get_many("c", [(1,), (True,), (1.0,)]))
    assert type(found).__name__ == Found.__name__
    assert (found[1,], found[True,], found.get((1.0,)), found.get((1.0,), b"-")) == (b"int", b"bool", None, b"-")
    assert (1,) in found
    assert (1.0,) not in found
    assert found[key(True)] == b"bool"
    with pytest.raises(KeyError):
        found[1.0,]
    with pytest.raises(KeyError):
        found["text"]


def test_get_many_is_one_snapshot(job: Job) -> None:
    """All rows of one `get_many` are of one moment, while another thread changes them together."""
    keys = [key(number) for number in range(20)]
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            job.commit([Put("c", k, b"%d" % number) for k in keys]).result(WAIT)

    writer = in_thread(write)
    try:
        for _ in range(300):
            assert len(set(job.get_many("c", keys).result(WAIT).values())) <= 1
    finally:
        stop.set()
        writer.result(WAIT)


# -- scans --------------------------------------------------------------------------------------------------------


def test_scan_is_in_key_order_and_half_open(job: Job, ask: Ask) -> None:
    """S3-68..71, S3-74, S3-76: ascending or reverse, start in and stop out, open sides, empty when turned round."""
    for number in (5, 1, 4, 2, 3):
        job.put("c", (number,), b"%d" % number)

    def numbers(*bounds: Any, **options: Any) -> list[int]:
        return [row.key.parts[0] for row in ask(lambda: job.scan("c", KeyRange(*bounds), **options))]

    assert numbers() == [1, 2, 3, 4, 5]
    assert numbers(reverse=True) == [5, 4, 3, 2, 1]
    assert numbers((2,), (4,)) == [2, 3]
    assert numbers((2,), (4,), reverse=True) == [3, 2]
    assert numbers((4,)) == [4, 5]
    assert numbers(None, key(3)) == [1, 2]
    assert numbers((4,), (2,)) == numbers((3,), (3,)) == []
    for bounds, count in (((), 5), (((2,), (4,)), 2), (((4,),), 2), (((4,), (2,)), 0)):
        assert ask(partial(job.count, "c", KeyRange(*bounds))) == count
    assert ask(lambda: job.count("empty")) == 0


def test_scan_gives_rows_whole_in_a_list(job: Job, ask: Ask) -> None:
    """S3-73: a scan gives `Row`s with a `Key` and plain bytes."""
    job.put("c", ("a", 1), b"x")
    rows = ask(lambda: job.scan("c"))
    assert rows == [Row(key("a", 1), b"x")] == [(key("a", 1), b"x")]
    assert [type(thing) for thing in (rows, rows[0], rows[0].key, rows[0].payload)] == [list, Row, Key, bytes]
    assert rows[0].key.parts == ("a", 1)


@pytest.mark.parametrize(("limit", "count"), [(0, 0), (1, 1), (4, 4), (5, 5), (6, 5), (None, 5)])
def test_limit_cuts_from_the_side_the_scan_begins(job: Job, ask: Ask, limit: int | None, count: int) -> None:
    """A limit of 0 gives nothing, in reverse the last rows come first."""
    keys = fill(job, 5)
    assert [row.key for row in ask(lambda: job.scan("c", limit=limit))] == keys[:count]
    rows = ask(lambda: job.scan_prefix("c", (), limit=limit, reverse=True))
    assert [row.key for row in rows] == keys[::-1][:count]


def test_a_prefix_ends_between_parts(job: Job, ask: Ask) -> None:
    r"""S3-72: the exact key, once, and its children; not `("ab",)`, not `("a\0b",)`, in every verb that takes one."""
    inside = [("a",), ("a", "b"), ("a", "b", 1), ("a", 1), ("a", None)]
    outside = [("ab",), ("a\0b",), ("a\0",), ("A",), (b"a",), (("a",),), ("b", "a"), ()]
    for parted in inside + outside:
        job.put("c", parted, b"x")
    wanted = sorted(key(*parted) for parted in inside)
    assert [row.key for row in ask(lambda: job.scan_prefix("c", ("a",)))] == wanted
    assert [row.key for row in ask(lambda: job.scan_prefix("c", ("a",), reverse=True))] == wanted[::-1]
    assert [row.key for row in ask(lambda: job.scan("c", KeyRange.prefix(("a",))))] == wanted
    assert list(job.iterate("c", prefix=("a",), keys_only=True, page=2)) == wanted
    assert ask(lambda: job.count("c", KeyRange.prefix(key("a")))) == len(inside)
    assert len(ask(lambda: job.scan_prefix("c", ()))) == len(inside) + len(outside)
    assert ask(lambda: job.delete_prefix_acked("c", ("a",))) == len(inside)
    assert sorted(parts(ask(lambda: job.scan("c"))), key=repr) == sorted(outside, key=repr)


@pytest.mark.parametrize(
    ("prefix", "count"), [(b"a", 4), (b"a\x00", 1), (b"ab", 2), (b"\xff", 3), (b"\xff\xff", 2), (b"", 10), (b"c", 0)]
)
def test_a_raw_key_is_a_prefix_byte_by_byte(job: Job, ask: Ask, prefix: bytes, count: int) -> None:
    """S3-56: of a `RawKey` the prefix is the bytes; one of FF alone is open-ended; the empty one is everything."""
    names = [b"a", b"a\x00", b"ab", b"ab\xff\xff", b"b", b"\xff", b"\xff\xff", b"\xff\xff\x00", b"\x00", b"\xfe\xff"]
    for name in names:
        job.put("c", RawKey(name), name)
    rows = ask(lambda: job.scan_prefix("c", RawKey(prefix)))
    assert [row.payload for row in rows] == sorted(name for name in names if name.startswith(prefix))
    assert len(rows) == ask(lambda: job.count("c", KeyRange.prefix(RawKey(prefix)))) == count
    assert [bytes(k) for k in job.iterate("c", prefix=RawKey(prefix), page=1, keys_only=True)] == [
        row.payload for row in rows
    ]
    if prefix:
        assert ask(lambda: job.delete_prefix_acked("c", RawKey(prefix))) == count
        assert ask(lambda: job.count("c")) == len(names) - count


def test_a_text_prefix_ends_within_a_part(job: Job, ask: Ask) -> None:
    """`KeyRange.text_prefix(k, "al")` is the keys whose next part is text that starts so, and their children."""
    inside = [("n", "al"), ("n", "alpha"), ("n", "alpha", 1), ("n", "al\0"), ("n", "al\U0010ffff")]
    outside = [("n",), ("n", "a"), ("n", "am"), ("n", b"al"), ("n", "AL"), ("m", "al"), ("al",), ("n", ("al",))]
    for parted in inside + outside:
        job.put("c", parted, b"x")
    span = KeyRange.text_prefix(("n",), "al")
    assert [row.key for row in ask(lambda: job.scan("c", span))] == sorted(key(*parted) for parted in inside)
    assert ask(lambda: job.delete_range_acked("c", span)) == len(inside)
    assert ask(lambda: job.count("c")) == len(outside)


# -- iterate ------------------------------------------------------------------------------------------------------


async def gather_rows(pages: Any) -> list[Any]:
    """Walk over pages asynchronously."""
    return [row async for row in pages]


@pytest.mark.parametrize("page", [1, 3, 256])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("count", [0, 1, 3, 6, 7, 300])
def test_iterate_gives_what_scan_gives(job: Job, page: int, reverse: bool, count: int) -> None:
    """A walk gives the rows of a scan, whatever the page, forwards and back, by `for` and by `async for`."""
    fill(job, count)
    rows = job.scan("c", reverse=reverse).result(WAIT)
    pages = job.iterate("c", page=page, reverse=reverse)
    assert list(pages) == rows == list(pages)  # each `for` begins anew
    assert run(gather_rows(pages)) == rows
    assert list(job.iterate("c", page=page, reverse=reverse, keys_only=True)) == [row.key for row in rows]
    assert {(type(row), type(row.key)) for row in pages} <= {(Row, Key)}


@pytest.mark.parametrize("reverse", [False, True])
def test_iterate_keeps_to_a_range_or_a_prefix(job: Job, reverse: bool) -> None:
    """The bounds of a walk hold on every page, and its keys are `Key`s."""
    for first in ("a", "b", "ba", "c"):
        for number in range(5):
            job.put("c", (first, number), b"")
    for span in (KeyRange.prefix(("b",)), KeyRange(("a", 3), ("b", 2)), KeyRange(stop=("b",)), KeyRange(("c",))):
        rows = job.scan("c", span, reverse=reverse).result(WAIT)
        assert 0 < len(rows) < 20
        assert list(job.iterate("c", span, page=2, reverse=reverse)) == rows
    by_prefix = list(job.iterate("c", prefix=("b",), page=2, reverse=reverse, keys_only=True))
    assert by_prefix == [row.key for row in job.scan_prefix("c", ("b",), reverse=reverse).result(WAIT)]
    assert {type(k) for k in by_prefix} == {Key}


def test_writing_while_iterating_is_safe(job: Job) -> None:
    """DD9: a key that is there throughout is seen once, whatever is written and deleted around it."""
    keys = fill(job, 100)
    seen = []
    for k in job.iterate("c", page=7, keys_only=True):
        seen.append(k)
        job.put("c", (k.parts[0], "child"), b"")  # just behind the walk
        job.put("c", (-k.parts[0] - 1,), b"")  # before it
        job.put("c", k, b"again")
    assert [k for k in seen if len(k.parts) == 1] == keys
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("reverse", [False, True])
def test_deleting_while_iterating_is_safe(job: Job, reverse: bool) -> None:
    """A walk that deletes each row it is given comes to its end, with every row seen once and none left."""
    keys = fill(job, 50)
    seen = []
    for k in job.iterate("c", page=3, reverse=reverse, keys_only=True):
        seen.append(k)
        job.delete("c", k)
    assert seen == (keys[::-1] if reverse else keys)
    assert job.count("c").result(WAIT) == 0


def test_a_paused_consumer_blocks_nobody(job: Job, persistency: Persistency) -> None:
    """Between pages nothing is held: others write, flush to the medium and read, and the walk goes on."""
    fill(job, 10)
    walk = iter(job.iterate("c", page=2))
    next(walk)
    job.commit([Put("c", (20,), b"x"), Delete("c", (9,))]).result(WAIT)
    job.flush(sync=True).result(WAIT)
    assert persistency.open_job("other").count("c").result(WAIT) == 0
    assert [row.key.parts[0] for row in walk] == [1, 2, 3, 4, 5, 6, 7, 8, 20]


def test_a_walk_may_be_abandoned_half_way(job: Job, persistency: Persistency) -> None:
    """A walk that is dropped leaves nothing behind: the job writes, and closes."""
    fill(job, 10)
    walk = iter(job.iterate("c", page=2))
    next(walk)
    del walk

    async def main() -> None:
        async for _row in job.iterate("c", page=2):
            break
        await job.commit(Put("c", (11,), b""))

    run(main())
    job.close(WAIT)
    with pytest.raises(Closed):
        list(job.iterate("c"))
    assert "job" not in persistency


def test_a_walk_over_a_job_that_is_closed_meanwhile_raises(job: Job) -> None:
    """The next page of a closed job is refused like any read."""
    fill(job, 10)
    walk = iter(job.iterate("c", page=2))
    assert [next(walk).payload, next(walk).payload] == [b"0", b"1"]
    job.close(WAIT)
    with pytest.raises(Closed):
        next(walk)


def test_iterate_waits_for_room_under_an_event_loop(persistency: Persistency, gate: Gate, in_loop: InLoop) -> None:
    """Promise 4: where the mailbox refuses a loop's read, a walk paces itself and is never refused."""
    job = persistency.open_job("small", requests_max=1)
    keys = fill(job, 5)

    async def main() -> list[Key]:
        gate.hold(job)
        waiting = [job.get("c", (1,)), job.get("c", (2,))]  # one over the bound, as a loop may
        with pytest.raises(Overloaded):
            job.get("c", (3,))
        async with anyio.create_task_group() as group:
            walk = Task(group, gather_rows(job.iterate("c", page=2, keys_only=True)))
            await turns()  # for the walk, which is refused now
            assert walk.begun
            gate.release()
            assert await together(*waiting) == [b"1", b"2"]
            return await walk

    assert in_loop(bounded, main) == keys


def test_iterate_waits_for_room_in_a_thread(persistency: Persistency, gate: Gate) -> None:
    """Promise 4: `iterate` waits for room by itself, in a job opened with `on_full="raise"` too."""
    job = persistency.open_job("small", requests_max=1, on_full="raise")
    keys = fill(job, 5)
    gate.hold(job)
    waiting = job.get("c", (1,))
    with pytest.raises(Overloaded):
        job.get("c", (2,))
    walk = in_thread(lambda: list(job.iterate("c", page=2, keys_only=True)))
    with pytest.raises(TimeoutError):  # it neither ends nor is refused while there is no room
        walk.result(0.2)
    gate.release()
    assert walk.result(WAIT) == keys
    assert waiting.result(WAIT) == b"1"


# -- batches, checks, versions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("post", ["persist", "commit"])
def test_a_batch_applies_in_order_and_whole(job: Job, ask: Ask, post: str) -> None:
    """S3-50, S3-53, S3-56: all kinds of operations in one batch, in their order, of an iterable of any kind."""
    for number in range(10):
        job.put("c", ("old", number), b"")
    ops: list[Any] = [
        Put("c", ("k",), b"1"),
        Delete("c", ("k",)),
        Put("c", ("k",), bytearray(b"2")),
        Put("c", ("gone",), b""),
        Delete("c", key("gone")),
        DeletePrefix("c", ("old", 3)),
        DeleteRange("c", KeyRange(("old", 5), ("old", 9))),
        Put("d", ("old", 7), b"3"),
        Put("c", ("old", 7), b"4"),
    ]
    getattr(job, post)(op for op in ops)
    assert ask(lambda: job.scan("c", KeyRange(("old",)))) == [
        *(Row(key("old", number), b"") for number in (0, 1, 2, 4)),
        Row(key("old", 7), b"4"),
        Row(key("old", 9), b""),
    ]
    assert ask(lambda: job.get("c", ("k",))) == b"2"
    assert ask(lambda: job.get("d", ("old", 7))) == b"3"
    assert ask(lambda: job.exists("c", ("gone",))) is False


@pytest.mark.parametrize("post", ["persist", "commit"])
def test_one_operation_is_a_batch_of_one(job: Job, ask: Ask, post: str) -> None:
    """S3-48: an operation alone is the same as a list of it."""
    getattr(job, post)(Put("c", ("k",), b"1"))
    getattr(job, post)([Put("c", ("l",), b"2")])
    assert ask(lambda: job.get_many("c", [("k",), ("l",)])) == {key("k"): b"1", key("l"): b"2"}
    assert ask(job.version) == 2


def test_an_empty_batch_does_nothing(job: Job, ask: Ask) -> None:
    """S3-49: an empty `persist` is nothing, an empty `commit` answers with the current version."""
    assert ask(lambda: job.commit([])) == 0
    fill(job, 3)
    job.persist([])
    job.persist(iter(()))
    assert ask(lambda: job.commit(())) == 3
    assert_balanced(job, 3)


def test_empty_batches_take_no_memory_while_the_worker_is_busy(job: Job, gate: Gate) -> None:
    """Promise 4: memory stays bounded under any producer, of empty batches too."""
    import tracemalloc

    gate.hold(job)
    tracemalloc.start()
    try:
        job.persist([])
        before, _ = tracemalloc.get_traced_memory()
        for _ in range(20_000):
            job.persist([])
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 1_000_000


def test_a_batch_with_a_failed_check_leaves_no_trace(job: Job, ask: Ask) -> None:
    """S3-51, promise 2: of a batch that fails nothing is applied, of its neighbours everything."""
    job.put("c", ("before",), b"")
    job.persist(failing(Put("c", ("k",), b""), DeleteRange("c", KeyRange(stop=("z",)))))
    job.put("c", ("after",), b"")
    with pytest.raises(WriteFailed):
        ask(job.flush)
    assert parts(ask(lambda: job.scan("c"))) == [("after",), ("before",)]
    with pytest.raises(Conflict):
        ask(lambda: job.commit(failing(Put("c", ("k",), b""))))
    assert parts(ask(lambda: job.scan("c"))) == [("after",), ("before",)]


def test_checks_hold_a_version_or_absence(job: Job, ask: Ask) -> None:
    """A `Check` of the row's version, or of `None` where there is no row, lets the batch through; others raise."""
    version = ask(lambda: job.commit([Check("c", ("k",), None), Put("c", ("k",), b"1")]))
    assert ask(lambda: job.entry("c", ("k",))).version == version == 2
    assert ask(lambda: job.commit([Put("c", ("k",), b"2"), Check("c", ("k",), version)])) == 4
    assert ask(lambda: job.commit(Check("c", ("k",), 3))) == 5
    for expected, actual, name in (
        (None, 3, "k"),
        (2, 3, "k"),
        (0, 3, "k"),
        (1, None, "missing"),
        (0, None, "missing"),
    ):
        with pytest.raises(Conflict) as caught:
            ask(partial(job.commit, [Delete("c", ("k",)), Check("c", (name,), expected)]))
        assert (caught.value.key, caught.value.expected, caught.value.actual) == (key(name), expected, actual)
        assert caught.value.retryable is True
    assert ask(lambda: job.get("c", ("k",))) == b"2"


def test_checks_look_at_the_state_before_their_batch(job: Job, ask: Ask) -> None:
    """A check isn't moved by its own batch, but by one posted just before it."""
    ops: list[Op] = [Put("c", ("k",), b"1"), Check("c", ("k",), None), Delete("c", ("k",)), Check("c", ("k",), None)]
    ask(lambda: job.commit(ops))
    job.put("c", ("k",), b"1")
    with pytest.raises(Conflict) as caught:
        ask(lambda: job.commit(Check("c", ("k",), None)))
    assert caught.value.actual == 5
    job.delete("c", ("k",))
    ask(lambda: job.commit([Put("c", ("k",), b"2"), Check("c", ("k",), None)]))
    assert ask(lambda: job.get("c", ("k",))) == b"2"


def test_checks_of_queued_batches_see_each_other(job: Job, gate: Gate) -> None:
    """Of two batches in one group that want a key absent, the first gets it and the second fails alone."""
    gate.hold(job)
    replies = [job.commit([Check("c", ("lock",), None), Put("c", ("lock",), b"%d" % n)]) for n in range(3)]
    gate.release()
    assert replies[0].result(WAIT) == 3
    for reply in replies[1:]:
        assert isinstance(reply.exception(WAIT), Conflict)
    assert job.get("c", ("lock",)).result(WAIT) == b"0"


def test_versions_grow_with_every_operation(job: Job, ask: Ask) -> None:
    """Every operation takes a version, also one that changes nothing; a batch's is that of its last operation."""
    assert ask(job.version) == 0
    job.put("c", ("k",), b"")
    job.put("c", ("k",), b"")
    assert ask(job.version) == 2
    job.delete("c", ("missing",))
    job.delete_prefix("c", ("missing",))
    job.delete_range("c", KeyRange(("missing",)))
    assert ask(job.version) == 5
    assert ask(lambda: job.commit([Put("c", ("a",), b""), Check("c", ("k",), 2), Delete("c", ("a",))])) == 8
    assert ask(lambda: job.delete_acked("c", ("k",))) is True
    assert ask(job.version) == 9


def test_versions_of_a_batch_follow_its_order(job: Job, ask: Ask) -> None:
    """Rows of one big batch, in any order of keys, carry versions in the order they were given."""
    numbers = [(number * 7919) % 1000 for number in range(1000)]
    assert ask(lambda: job.commit([Put("c", (number,), b"") for number in numbers])) == 1000
    for place in (0, 1, 499, 999):
        assert ask(partial(job.entry, "c", (numbers[place],))).version == place + 1


def test_a_version_is_never_given_twice(job: Job, ask: Ask) -> None:
    """Whatever fails in between, committed batches have growing versions, equal to those of their rows."""
    given = []
    for number in range(20):
        with pytest.raises(Conflict):
            ask(lambda: job.commit(failing(Put("c", ("k",), b""))))
        given.append(ask(partial(job.commit, Put("c", (number,), b""))))
        assert ask(partial(job.entry, "c", (number,))).version == given[-1]
    assert all(earlier < later for earlier, later in pairwise(given))


def test_versions_and_rows_survive_reopening(tmp_path: Path) -> None:
    """S3-27: a job that is opened again has its rows, goes on with its versions, and its checks hold."""
    with Persistency(tmp_path) as persistency:
        with persistency.open_job("a") as job:
            version = job.commit([Put("c", ("k",), b"1"), Delete("c", ("l",))]).result(WAIT)
        with persistency.open_job("a") as job:
            assert job.version().result(WAIT) == version == 2
            assert job.entry("c", ("k",)).result(WAIT) == Entry(key("k"), b"1", 1, None)
            assert job.commit([Check("c", ("k",), 1), Put("c", ("k",), b"2")]).result(WAIT) == 4


def test_acknowledged_deletes_tell_what_was_there(job: Job, ask: Ask) -> None:
    """S3-67: the answer is whether the row existed, or how many rows there were, in that very moment."""
    for number in range(10):
        job.put("c", ("a", number), b"")
    assert ask(lambda: job.delete_acked("c", ("a", 3))) is True
    assert ask(lambda: job.delete_acked("c", ("a", 3))) is False
    assert ask(lambda: job.delete_range_acked("c", KeyRange(("a", 2), ("a", 6)))) == 3
    assert ask(lambda: job.delete_range_acked("c", KeyRange(("a", 6), ("a", 2)))) == 0
    assert ask(lambda: job.delete_prefix_acked("c", ("a", 6))) == 1
    job.put("c", ("b",), b"")
    assert ask(lambda: job.delete_prefix_acked("c", ("a",))) == 5
    assert parts(ask(lambda: job.scan("c"))) == [("b",)]


def test_exactly_one_of_many_deletes_finds_the_row(job: Job) -> None:
    """Of acknowledged deletes from many threads one finds the row."""
    job.put("c", ("k",), b"")
    barrier = threading.Barrier(8)

    def delete(_number: int) -> bool:
        barrier.wait(WAIT)
        return job.delete_acked("c", ("k",)).result(WAIT)

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(delete, range(8))) == 1


# -- failures of events -------------------------------------------------------------------------------------------


def test_a_failing_batch_among_a_thousand_fails_alone(job: Job, ask: Ask) -> None:
    """The next flush raises `WriteFailed` with exactly the failed operations, once; 999 batches are applied."""
    bad = failing(Put("c", (500, "bad"), b"bad"))
    for number in range(1000):
        job.persist(bad if number == 500 else Put("c", (number,), b""))
    with pytest.raises(WriteFailed) as caught:
        ask(job.flush)
    failures = caught.value.failures
    assert [failure.op for failure in failures] == bad
    assert [failure.op is op for failure, op in zip(failures, bad, strict=True)] == [True, True]
    assert {(type(failure.error), failure.outcome) for failure in failures} == {(Conflict, "not applied")}
    assert caught.value.omitted == 0
    assert ask(job.flush) is None
    numbers = job.statistics()
    assert (numbers.committed, numbers.failed) == (999, 2)
    assert ask(lambda: job.count("c")) == 999
    assert ask(lambda: job.exists("c", (500, "bad"))) is False


def test_each_failure_is_raised_by_exactly_one_flush(job: Job, gate: Gate) -> None:
    """Of flushes around failures, queued together, each raises what failed before it and after the one before."""
    gate.hold(job)
    replies = []
    for number in range(3):
        job.persist(failing(Put("c", (number,), b"")))
        replies += [job.flush(), job.flush(sync=True)]
    gate.release()
    raised = [reply.exception(WAIT) for reply in replies]
    assert [type(error) for error in raised] == [WriteFailed, type(None)] * 3
    ops = [error.failures[0].op.key for error in raised if isinstance(error, WriteFailed)]
    assert ops == [(0,), (1,), (2,)]


def test_close_raises_what_no_flush_has_raised(persistency: Persistency) -> None:
    """S3-58, promise 3: a failure nobody has flushed is raised by `close`, once; a flushed one is not."""
    first, second = persistency.open_job("first"), persistency.open_job("second")
    for job in (first, second):
        job.persist(failing())
    with pytest.raises(WriteFailed):
        first.flush().result(WAIT)
    first.close(WAIT)
    with pytest.raises(WriteFailed) as caught:
        second.close(WAIT)
    assert len(caught.value.failures) == 1
    second.close(WAIT)


def test_a_request_that_fails_is_no_failure_of_an_event(job: Job, ask: Ask) -> None:
    """A write request's failure goes to its caller; no flush and no close raises it again."""
    with pytest.raises(Conflict):
        ask(lambda: job.commit(failing(Put("c", ("k",), b""))))
    assert ask(job.flush) is None
    assert_balanced(job, 2)
    assert job.statistics().failed == 2
    job.close(WAIT)


def test_on_error_is_called_once_in_a_thread_of_its_own(persistency: Persistency) -> None:
    """`on_error(job_id, failures)` gets exactly the failures, in a thread that is neither caller nor worker."""
    listener = Listener()
    job = persistency.open_job("a", on_error=listener)
    bad = failing(Put("c", ("k",), b"1"))
    job.persist(bad)
    with pytest.raises(WriteFailed) as caught:
        job.flush().result(WAIT)
    listener.wait()
    [(job_id, failures)] = listener.calls
    assert (job_id, failures) == ("a", list(caught.value.failures))
    assert [failure.op for failure in failures] == bad
    worker = next(thread for thread in threading.enumerate() if thread.name == "persistency:a")
    assert listener.threads[0] not in (threading.current_thread(), worker)
    assert listener.threads[0].name.startswith("persistency:a")
    listener.threads[0].join(WAIT)
    assert len(listener.calls) == 1


def test_on_error_that_blocks_holds_nobody_up(persistency: Persistency) -> None:
    """Later groups, reads, flushes and the closing go on while `on_error` blocks; what fails meanwhile is told."""
    may_go, entered = threading.Event(), threading.Semaphore(0)
    told: list[list[Any]] = []

    def on_error(_job_id: str, failures: Any) -> None:
        told.append([failure.op for failure in failures])
        entered.release()
        assert may_go.wait(WAIT)

    job = persistency.open_job("a", on_error=on_error)
    first, second = Check("c", (1,), NEVER), Check("c", (2,), NEVER)
    job.persist(first)
    assert entered.acquire(timeout=WAIT)
    try:
        job.persist(second)
        job.put("c", ("k",), b"1")
        assert job.get("c", ("k",)).result(WAIT) == b"1"
        with pytest.raises(WriteFailed) as caught:
            job.close(WAIT)
        assert [failure.op for failure in caught.value.failures] == [first, second]
    finally:
        may_go.set()
    assert entered.acquire(timeout=WAIT)
    assert told == [[first], [second]]


@pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, KeyboardInterrupt])
def test_on_error_that_raises_harms_nobody(
    persistency: Persistency, caplog: pytest.LogCaptureFixture, error: type[BaseException]
) -> None:
    """What `on_error` raises is logged and ends there; it is called again for the next failure."""
    called = threading.Semaphore(0)

    def on_error(_job_id: str, _failures: Any) -> None:
        called.release()
        raise error("from on_error")

    job = persistency.open_job("a", on_error=on_error)
    for _ in range(2):
        job.persist(failing())
        with pytest.raises(WriteFailed):
            job.flush().result(WAIT)
        assert called.acquire(timeout=WAIT)
        for thread in threading.enumerate():
            if thread.name == "persistency:a:on_error":
                thread.join(WAIT)
    job.put("c", ("k",), b"1")
    assert job.get("c", ("k",)).result(WAIT) == b"1"
    assert sum("on_error raised" in record.getMessage() for record in caplog.records) == 2


def test_on_error_may_use_its_job(persistency: Persistency, gate: Gate) -> None:
    """Promise 4: a callback never waits for room: it posts to a full mailbox, and reads and flushes its job."""
    answers: Future[Any] = Future()
    opened: list[Job] = []

    def on_error(_job_id: str, _failures: Any) -> None:
        [job] = opened
        try:
            gate.hold(job)
            fill(job, 3)
            gate.release()
            job.flush().exception(WAIT)
            answers.set_result(job.count("c").result(WAIT))
        except BaseException as error:
            answers.set_exception(error)

    opened.append(persistency.open_job("a", on_error=on_error, mailbox_ops_max=1, full_timeout=1.0))
    opened[0].persist(failing())
    assert answers.result(WAIT) == 3
    opened[0].flush().exception(WAIT)


def test_a_failed_event_is_logged(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    """The log names the job, the operation and the error, at level ERROR."""
    job.persist(failing(Put("c", ("the key",), b"1")))
    with pytest.raises(WriteFailed):
        job.flush().result(WAIT)
    [record] = [record for record in caplog.records if record.name.startswith("persistency")]
    assert record.levelno == logging.ERROR
    for words in ("'job'", "the key", "expected version"):
        assert words in record.getMessage()


def test_failures_are_kept_up_to_a_thousand(job: Job) -> None:
    """Promise 3: up to 1,000 failures are kept, of those beyond the count, `.omitted`."""
    for number in range(1_500):
        job.persist(Check("c", (number,), NEVER))
    with pytest.raises(WriteFailed) as caught:
        job.flush().result(WAIT)
    assert (len(caught.value.failures), caught.value.omitted) == (1_000, 500)
    assert [failure.op.key for failure in caught.value.failures[:2]] == [(0,), (1,)]
    assert "1500 posted writes failed" in str(caught.value)


def test_failures_are_kept_up_to_a_mebibyte_of_payload(job: Job) -> None:
    """Promise 3: of failed payloads no more than 1 MiB is kept."""
    for number in range(8):
        job.persist([Put("c", (number,), bytes(300_000)), Check("c", (number,), NEVER)])
    with pytest.raises(WriteFailed) as caught:
        job.flush().result(WAIT)
    assert sum(len(getattr(failure.op, "payload", b"")) for failure in caught.value.failures) == 900_000
    assert len(caught.value.failures) + caught.value.omitted == 16


def test_a_failure_is_named_by_what_was_posted(persistency: Persistency, gate: Gate) -> None:
    """Whatever verb an event came by, its failure has an operation that says the same."""
    job = persistency.open_job("a")
    gate.hold(job)
    job.put("c", ("k",), b"1")
    job.delete("c", ("k",))
    job.delete_prefix("c", ("k",))
    job.delete_range("c", KeyRange(("a",), ("b",)))
    batch: list[Op] = [Put("c", ("l",), b"2"), DeletePrefix("c", ("l",))]
    job.persist(batch)
    closing = job._leave(drain=False)
    gate.release()
    failed = closing.exception(WAIT)
    assert isinstance(failed, WriteFailed)
    ops = [failure.op for failure in failed.failures]
    assert ops[:2] == [Put("c", key("k"), b"1"), Delete("c", key("k"))]
    assert ops[2] in (DeletePrefix("c", key("k")), DeleteRange("c", KeyRange.prefix(("k",))))
    assert ops[3:] == [DeleteRange("c", KeyRange(("a",), ("b",))), *batch]
    assert {type(failure.error) for failure in failed.failures} == {Closed}


@pytest.mark.parametrize("in_line", [False, True])
def test_a_failed_request_nobody_looked_at_is_told(
    persistency: Persistency, gate: Gate, caplog: pytest.LogCaptureFixture, in_line: bool
) -> None:
    """Promise 3: if a failed reply is dropped unseen, its failure goes to the log and `on_error`, not to a flush."""
    listener = Listener()
    job = persistency.open_job("a", on_error=listener)
    bad = failing(Put("c", ("k",), b""))
    if in_line:
        gate.hold(job)
    job.commit(bad)
    gate.release()
    job.flush().result(WAIT)
    gc.collect()
    listener.wait()
    assert [failure.op for failure in listener.calls[0][1]] == bad
    assert sum("failed" in record.getMessage() for record in caplog.records) == 1


LOOKS: dict[str, Callable[[Reply[Any]], object]] = {
    "result": lambda reply: pytest.raises(Conflict, reply.result, WAIT),
    "exception": lambda reply: reply.exception(WAIT),
    "await": lambda reply: pytest.raises(Conflict, LOOPS["asyncio"], bounded, lambda: reply),
    "await under trio": lambda reply: pytest.raises(Conflict, LOOPS["trio"], bounded, lambda: reply),
    "wait_for": lambda reply: pytest.raises(Conflict, run, asyncio.wait_for(reply, WAIT)),
    "wrap_future": lambda reply: pytest.raises(Conflict, run, wrapped(reply)),
    "map": lambda reply: pytest.raises(Conflict, reply.map(str).result, WAIT),
}


async def wrapped(reply: Reply[T]) -> T:
    """Await a reply as a future of this loop."""
    return await asyncio.wrap_future(reply)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS.keys())
@pytest.mark.parametrize("in_line", [False, True])
def test_a_failed_request_somebody_looked_at_is_not_told(
    persistency: Persistency,
    gate: Gate,
    caplog: pytest.LogCaptureFixture,
    look: Callable[[Reply[Any]], object],
    in_line: bool,
) -> None:
    """Who has seen a failure, in whatever way, needs no log and no `on_error`."""
    listener = Listener()
    job = persistency.open_job("a", on_error=listener)
    if in_line:
        gate.hold(job)
    reply = job.commit(failing())
    gate.release()
    look(reply)
    del reply
    gc.collect()
    job.close(WAIT)
    assert listener.calls == []
    assert caplog.records == []


# -- statistics ---------------------------------------------------------------------------------------------------


def test_statistics_count_operations(job: Job, gate: Gate) -> None:
    """Accepted, committed, failed and pending count write operations; reads and flushes don't count."""
    numbers = job.statistics()
    assert (numbers.state, numbers.accepted, numbers.commits, numbers.commit_ms_p50) == ("live", 0, 0, 0.0)
    gate.hold(job)
    job.put("c", ("k",), b"payload")
    job.delete("c", ("l",))
    job.persist([Put("c", (number,), b"") for number in range(5)])
    job.persist(failing(Put("c", ("x",), b"")))
    replies: list[Reply[Any]] = [job.get("c", ("k",)), job.commit([Put("c", (9,), b"")])]
    flushed = job.flush()
    numbers = job.statistics()
    assert (numbers.accepted, numbers.committed, numbers.failed, numbers.pending) == (11, 0, 0, 11)
    assert numbers.mailbox_bytes >= len(key("k")) + len(b"payload")
    gate.release()
    assert isinstance(flushed.exception(WAIT), WriteFailed)
    assert [reply.result(WAIT) for reply in replies] == [b"payload", 9]  # what failed took no version
    numbers = job.statistics()
    assert (numbers.accepted, numbers.committed, numbers.failed, numbers.pending) == (11, 9, 2, 0)
    assert numbers.mailbox_bytes == 0
    assert numbers.commits == 2
    assert 0 <= numbers.commit_ms_p50 <= numbers.commit_ms_p99
    job.close(WAIT)
    assert job.statistics().state == "closed"
    assert job.statistics().accepted == 11


def test_statistics_balance_at_every_look(job: Job) -> None:
    """Promise 3: from any thread, at any moment, accepted is committed + failed + pending, and misses no event."""
    begun = returned = 0
    stop = threading.Event()

    def look() -> int:
        looks = 0
        while not stop.is_set() or not looks:
            low = returned
            numbers = job.statistics()
            high = begun
            assert numbers.accepted == numbers.committed + numbers.failed + numbers.pending
            assert low <= numbers.accepted <= high
            looks += 1
        return looks

    watchers = [in_thread(look) for _ in range(2)]
    for number in range(3_000):
        ops: list[Any] = failing(Put("c", (number,), b"")) if number % 50 == 0 else [Put("c", (number,), b"")]
        begun += len(ops)
        if number % 20 == 0:
            job.commit(ops).exception(WAIT)
        else:
            job.persist(ops)
        returned += len(ops)
    stop.set()
    assert all(watcher.result(WAIT) for watcher in watchers)
    job.flush().exception(WAIT)
    assert_balanced(job, begun)


def test_statistics_balance_while_a_job_is_poisoned(job: Job, gate: Gate, caplog: pytest.LogCaptureFixture) -> None:
    """Promise 3: accepted never shrinks, not even between two reports of a job that can't go on."""
    accepted: list[int] = []

    class Watcher(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            accepted.append(job.statistics().accepted)

    watcher = Watcher()
    logging.getLogger("persistency").addHandler(watcher)
    try:
        gate.error = Corrupt("the file is damaged")
        gate.hold(job)
        for number in range(5):
            job.put("c", (number,), b"")
        last = job.flush()
        gate.release()
        assert last.exception(WAIT) is not None
    finally:
        logging.getLogger("persistency").removeHandler(watcher)
    numbers = job.statistics()
    pytest.raises(WriteFailed, job.close, WAIT)
    assert (numbers.state, numbers.accepted, numbers.failed) == ("poisoned", 6, 6)
    assert set(accepted) == {6}


# -- bounds -------------------------------------------------------------------------------------------------------


def test_a_full_mailbox_makes_a_thread_wait(persistency: Persistency, gate: Gate) -> None:
    """Promise 4: a plain thread waits for room, in order, and loses nothing; reads and flushes are not refused."""
    job = persistency.open_job("small", mailbox_ops_max=4)
    gate.hold(job)
    fill(job, 4)

    def post() -> None:
        for number in range(4, 20):
            job.put("c", (number,), b"late")

    poster = in_thread(post)
    read = job.get("c", (0,))
    flushed = job.flush()
    with pytest.raises(TimeoutError):
        poster.result(0.05)
    assert job.statistics().pending == 5
    gate.release()
    poster.result(WAIT)
    assert read.result(WAIT) == b"0"
    flushed.result(WAIT)
    assert job.count("c").result(WAIT) == 20


@pytest.mark.parametrize(("options", "words"), [({"on_full": "raise"}, "on_full"), ({"full_timeout": 0.05}, "0.05 s")])
def test_a_full_mailbox_refuses_whole(
    persistency: Persistency, gate: Gate, options: dict[str, Any], words: str
) -> None:
    """Promise 4: refused at once with `on_full="raise"`, or after `full_timeout`; an operation is wholly refused."""
    job = persistency.open_job("small", mailbox_ops_max=4, **options)
    gate.hold(job)
    fill(job, 3)
    for call in (
        lambda: job.persist([Put("c", ("x",), b""), Put("c", ("y",), b"")]),
        lambda: job.commit([Put("c", ("x",), b""), Put("c", ("y",), b"")]),
    ):
        with pytest.raises(Overloaded, match=words) as caught:
            call()
        assert caught.value.retryable
    job.put("c", (3,), b"")  # there is room for one
    with pytest.raises(Overloaded):
        job.put("c", (4,), b"")
    gate.release()
    job.flush().result(WAIT)
    assert parts(job.scan("c").result(WAIT)) == [(0,), (1,), (2,), (3,)]
    assert_balanced(job, 5)


def test_the_bound_of_bytes_holds(persistency: Persistency, gate: Gate) -> None:
    """Promise 4: writes are bounded by bytes too, and one larger than the bound is taken by an empty mailbox."""
    job = persistency.open_job("small", mailbox_bytes_max=1_000, on_full="raise")
    gate.hold(job)
    job.put("c", (1,), bytes(5_000))
    with pytest.raises(Overloaded):
        job.put("c", (2,), b"")
    gate.release()
    job.flush().result(WAIT)
    job.persist([Put("c", (number,), bytes(900)) for number in range(3, 10)])
    assert job.count("c").result(WAIT) == 8


def test_an_event_loop_is_never_made_to_wait(persistency: Persistency, gate: Gate) -> None:
    """Promise 4: a loop may go over the bound by as much again, then gets `Overloaded`, and paces itself by drain."""
    job = persistency.open_job("small", mailbox_ops_max=4)

    async def main() -> None:
        gate.hold(job)
        fill(job, 8)
        with pytest.raises(Overloaded):
            job.put("c", (8,), b"")
        drained = job.drain()
        assert not drained.done()
        gate.release()
        await drained
        job.put("c", (8,), b"")
        assert await job.count("c") == 9

    run(main())


def test_drain_waits_for_the_low_water_mark(persistency: Persistency, gate: Gate) -> None:
    """`drain` is settled at once below half of the bounds, and otherwise when the worker has taken the line."""
    job = persistency.open_job("small", mailbox_ops_max=4)
    gate.hold(job)
    fill(job, 2)
    assert job.drain().done()
    job.put("c", (2,), b"")
    drained = job.drain()
    assert not drained.done()
    gate.release()
    assert drained.result(WAIT) is None


def test_tasks_that_pace_themselves_are_never_refused(persistency: Persistency, in_loop: InLoop) -> None:
    """Promise 4: as many tasks as the bound counts, each awaiting drain between its puts, all get through."""
    job = persistency.open_job("small", mailbox_ops_max=16)

    async def produce(task: int) -> None:
        for number in range(50):
            await job.drain()
            job.put("c", (task, number), b"")

    async def main() -> int:
        await together(*(produce(task) for task in range(16)))
        return await job.count("c")

    assert in_loop(bounded, main) == 800


# -- closing ------------------------------------------------------------------------------------------------------

CLOSED_VERBS: dict[str, Callable[[Job], object]] = {
    "put": lambda job: job.put("c", (), b""),
    "put of a ready key": lambda job: job.put("c", key("k"), b""),
    "delete": lambda job: job.delete("c", ()),
    "delete_prefix": lambda job: job.delete_prefix("c", ("a",)),
    "delete_range": lambda job: job.delete_range("c", KeyRange(("a",))),
    "persist": lambda job: job.persist(Put("c", (), b"")),
    "persist nothing": lambda job: job.persist([]),
    "get": lambda job: job.get("c", ()),
    "get of a ready key": lambda job: job.get("c", key("k")),
    "entry": lambda job: job.entry("c", ()),
    "get_many": lambda job: job.get_many("c", [()]),
    "exists": lambda job: job.exists("c", ()),
    "count": lambda job: job.count("c"),
    "scan": lambda job: job.scan("c"),
    "scan_prefix": lambda job: job.scan_prefix("c", ()),
    "iterate": lambda job: list(job.iterate("c")),
    "iterate in a loop": lambda job: run(gather_rows(job.iterate("c"))),
    "categories": lambda job: job.categories(),
    "version": lambda job: job.version(),
    "commit": lambda job: job.commit(Put("c", (), b"")),
    "commit nothing": lambda job: job.commit([]),
    "delete_acked": lambda job: job.delete_acked("c", ()),
    "delete_prefix_acked": lambda job: job.delete_prefix_acked("c", ("a",)),
    "delete_range_acked": lambda job: job.delete_range_acked("c", KeyRange(("a",))),
    "flush": lambda job: job.flush(),
    "drain": lambda job: job.drain(),
}


@pytest.mark.parametrize("verb", CLOSED_VERBS.values(), ids=CLOSED_VERBS.keys())
def test_a_closed_handle_refuses_every_verb(job: Job, verb: Callable[[Job], object]) -> None:
    """S3-33: after `close` every verb raises `Closed` at the call, naming the job."""
    job.close(WAIT)
    assert job.closed
    with pytest.raises(Closed, match="'job'"):
        verb(job)


def test_wrong_arguments_of_a_closed_handle_are_still_misuse(job: Job) -> None:
    """Arguments are checked first."""
    job.close(WAIT)
    with pytest.raises(Misuse):
        job.get("c", "text")  # type: ignore[arg-type]


def test_closing_is_idempotent(job: Job) -> None:
    """S3-32, S3-35: a second close, of any kind, is nothing."""
    assert not job.closed
    job.close(WAIT)
    job.close()
    job.close(0.0, drain=False)
    run(job.aclose())
    with job:
        pass
    assert job.closed


def test_close_writes_what_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """D-3, S3-62: what was accepted before `close` is committed by it."""
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("a")
        fill(job, 10_000)
        job.close(WAIT)
        assert_balanced(job, 10_000)
        assert persistency.open_job("a").count("c").result(WAIT) == 10_000


def test_close_without_draining_fails_what_was_not_started(persistency: Persistency, gate: Gate) -> None:
    """`close(drain=False)`: the group that runs is committed, the rest fails with `Closed` and is counted."""
    job = persistency.open_job("a")
    gate.hold(job)
    fill(job, 10)
    read, write, flushed = job.get("c", (1,)), job.commit(Put("c", ("w",), b"")), job.flush()
    scan = job.scan("c")
    closing = job._leave(drain=False)
    gate.release()
    for reply in (read, write, flushed, scan):
        assert isinstance(reply.exception(WAIT), Closed)
    error = closing.exception(WAIT)
    assert isinstance(error, WriteFailed)
    assert [failure.op.key for failure in error.failures] == [key(number) for number in range(10)]
    assert {type(failure.error) for failure in error.failures} == {Closed}
    numbers = job.statistics()
    assert (numbers.accepted, numbers.committed, numbers.failed, numbers.pending) == (12, 1, 11, 0)


def test_a_close_that_takes_too_long_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`close(timeout)` raises `TimeoutError`, says what is left, and keeps closing: nothing is lost."""
    gate = Gate(monkeypatch)
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("a")
        gate.hold(job)
        fill(job, 7)
        try:
            with pytest.raises(TimeoutError, match=r"'a'.*8 operations"):
                job.close(0.05)
            assert job.closed
            pytest.raises(Closed, job.put, "c", (9,), b"")
        finally:
            gate.release()
        again = persistency.open_job("a")  # waits until the other one is closed
        assert again.count("c").result(WAIT) == 7


def test_leaving_a_with_block_closes(persistency: Persistency) -> None:
    """`with` and `async with` close the job; what has failed is raised on the way out."""
    with persistency.open_job("a") as job:
        job.put("c", ("k",), b"1")
    assert job.closed
    with pytest.raises(WriteFailed), persistency.open_job("a") as job:
        job.persist(failing())
    assert job.closed

    async def main() -> None:
        async with await persistency.aopen_job("b") as job:
            job.put("c", ("k",), b"1")
        assert job.closed
        with pytest.raises(WriteFailed):
            async with await persistency.aopen_job("b") as job:
                job.persist(failing())

    run(main())
    assert list(persistency) == []


def test_an_exception_in_the_with_body_is_not_masked(persistency: Persistency) -> None:
    """The body's own exception comes out; what the closing raised is noted on it."""
    with pytest.raises(ZeroDivisionError) as caught, persistency.open_job("a") as job:  # noqa: PT012
        job.persist(failing())
        raise ZeroDivisionError
    assert job.closed
    assert any("WriteFailed" in note and "'a'" in note for note in caught.value.__notes__)

    async def main() -> None:
        async with await persistency.aopen_job("b") as job:
            job.persist(failing())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        run(main())
    assert any("WriteFailed" in note and "'b'" in note for note in caught.value.__notes__)


def test_every_reply_is_settled_by_close(persistency: Persistency, gate: Gate) -> None:
    """Promise 7: requests that wait when the job is closed are answered, in threads and loops."""
    job = persistency.open_job("a")
    gate.hold(job)
    fill(job, 3)
    replies: list[Reply[Any]] = [job.get("c", (1,)), job.scan("c"), job.commit([]), job.flush(), job.drain()]
    waiters = [in_thread(partial(reply.result, WAIT)) for reply in replies]
    closing = job._leave()
    assert job.closed
    gate.release()
    assert waiters[0].result(WAIT) == b"1"
    assert len(waiters[1].result(WAIT)) == 3
    assert [waiter.result(WAIT) for waiter in waiters[2:]] == [4, None, None]
    closing.result(WAIT)


# -- order, under load --------------------------------------------------------------------------------------------


def read_your_writes(job: Job, pairs: int) -> list[Any]:
    """Put and get at once, from 8 threads and 3 loops; return the misses."""
    barrier = threading.Barrier(11)

    def in_a_thread(number: int) -> list[Any]:
        barrier.wait(WAIT)
        misses = []
        for turn in range(pairs // 11):
            payload = b"%d" % turn
            k = key("t", number, turn % 50)
            job.put("c", k, payload)
            if (got := job.get("c", k).result(WAIT)) != payload:
                misses.append((k, payload, got))
        return misses

    async def in_a_loop(number: int) -> list[Any]:
        barrier.wait(WAIT)
        misses = []
        for turn in range(pairs // 11):
            payload = b"%d" % turn
            k = key("l", number, turn % 50)
            job.put("c", k, payload)
            if (got := await job.get("c", k)) != payload:
                misses.append((k, payload, got))
        return misses

    with ThreadPoolExecutor(11) as pool:
        futures = [pool.submit(in_a_thread, number) for number in range(8)]
        futures += [pool.submit(run_one, in_a_loop, number) for number, run_one in enumerate(LOOPS.values())]
        return [miss for future in futures for miss in future.result()]


def test_read_your_writes(root: str | Path, persistency: Persistency) -> None:
    """D-19, S3-80, promise 1: 8 threads and 3 loops, each put followed at once by its get, 100,000 pairs, no miss."""
    pairs = 100_001 if root != ":memory:" else 22_000  # a multiple of eleven
    job = persistency.open_job("a")
    assert read_your_writes(job, pairs) == []
    assert_balanced(job, pairs)


def test_a_read_sees_what_another_thread_posted_before(job: Job) -> None:
    """Promise 1: a read sees every write posted before it, by any thread: posts are handed over by a barrier."""
    barrier = threading.Barrier(2)

    def post() -> None:
        for number in range(500):
            job.put("c", ("k",), b"%d" % number)
            barrier.wait(WAIT)
            barrier.wait(WAIT)

    poster = in_thread(post)
    for number in range(500):
        barrier.wait(WAIT)
        assert job.get("c", ("k",)).result(WAIT) == b"%d" % number
        barrier.wait(WAIT)
    poster.result(WAIT)


def test_posts_of_each_thread_keep_their_order(job: Job) -> None:
    """S3-60: of many threads' posts to one job, each thread's apply in the order it made them."""
    barrier = threading.Barrier(8)

    def post(number: int) -> None:
        barrier.wait(WAIT)
        for turn in range(500):
            job.put("c", (number, turn), b"")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(post, range(8)))
    assert job.count("c").result(WAIT) == 4_000
    for number in range(8):
        versions = [job.entry("c", (number, turn)).result(WAIT) for turn in range(500)]
        assert all(earlier.version < later.version for earlier, later in pairwise(versions) if earlier and later)
        assert None not in versions


@pytest.mark.parametrize(
    ("ask", "count"),
    [("thread", 200_000), ("asyncio", 200_000), ("trio", 20_000), ("anyio", 20_000)],  # the loops only take the answers
    indirect=["ask"],
)
def test_two_hundred_thousand_puts_in_a_plain_loop(job: Job, ask: Ask, count: int) -> None:
    """D-1, S3-61: nothing is dropped, however many are posted before anybody waits."""
    for number in range(count):
        job.put("c", key("k", number), b"payload")
    ask(job.flush)
    assert ask(lambda: job.count("c")) == count
    assert ask(lambda: job.get("c", ("k", count - 1))) == b"payload"
    assert_balanced(job, count)


@pytest.mark.parametrize(("loop", "count"), [("asyncio", 5_000), ("trio", 1_000), ("anyio", 1_000)])
def test_more_than_64_requests_in_flight(job: Job, loop: str, count: int) -> None:
    """S3-82: thousands of requests may wait at once, and all are answered, each with its own."""
    fill(job, 5_000)

    async def main() -> None:
        answers = await together(*(job.get("c", (number,)) for number in range(count)))
        assert answers == [b"%d" % number for number in range(count)]

    LOOPS[loop](bounded, main)
    replies = [job.get("c", (number,)) for number in range(5_000)]
    assert [reply.result(WAIT) for reply in replies] == [b"%d" % number for number in range(5_000)]


# -- replies ------------------------------------------------------------------------------------------------------


def test_replies_are_futures_of_the_standard_library(job: Job, gate: Gate) -> None:
    """`wait` and `as_completed` take replies, settled ones and those that wait, mapped and plain."""
    fill(job, 20)
    done = [job.get("c", (number,)) for number in range(3)]
    gate.hold(job)
    replies: list[Future[Any]] = [*done, *(job.get("c", (number,)) for number in range(3, 10)), job.scan("c")]
    completed, pending = wait(replies, timeout=0.01)
    assert pending
    assert completed.isdisjoint(pending)
    with pytest.raises(TimeoutError):
        list(as_completed(pending, timeout=0.01))
    first = in_thread(lambda: wait(pending, WAIT, FIRST_COMPLETED))
    everything = in_thread(lambda: list(as_completed(replies, WAIT)))
    gate.release()
    assert first.result(WAIT).done
    assert set(everything.result(WAIT)) == set(replies)
    assert wait(replies, WAIT, ALL_COMPLETED) == (set(replies), set())
    assert [reply.result() for reply in replies[:10]] == [b"%d" % number for number in range(10)]
    assert len(replies[10].result()) == 20


def test_a_reply_is_awaited_in_every_way_of_asyncio(job: Job, gate: Gate) -> None:
    """`await`, `gather`, `wait_for`, `shield`, tasks and `wrap_future` take replies, waiting or settled."""
    fill(job, 5)

    async def main() -> None:
        assert await job.get("c", (0,)) == b"0"
        gate.hold(job)
        tasks: list[Awaitable[Any]] = [
            asyncio.wait_for(job.get("c", (1,)), WAIT),
            asyncio.shield(job.get("c", (2,))),
            asyncio.wrap_future(job.get("c", (3,))),
            job.get("c", (4,)),
            asyncio.wrap_future(job.count("c").map(str)),
        ]
        gathered = asyncio.gather(*tasks)
        await asyncio.sleep(0)
        gate.release()
        assert await gathered == [b"1", b"2", b"3", b"4", "5"]
        reply = job.get("c", (1,))
        assert await reply == await reply == b"1"
        with pytest.raises(Conflict):
            await asyncio.gather(job.commit(failing()), job.count("c"))

    run(main())


def test_one_reply_is_awaited_from_many_loops_and_threads(job: Job, gate: Gate) -> None:
    """A reply may be awaited from any loop in any thread, by several at once, and all get the answer."""
    fill(job, 1)
    gate.hold(job)
    reply = job.get("c", (0,))
    barrier = threading.Barrier(7)

    async def awaited() -> Any:
        tasks = [asyncio.ensure_future(reply), asyncio.ensure_future(reply), asyncio.wrap_future(reply)]
        await asyncio.sleep(0)
        barrier.wait(WAIT)
        return await asyncio.gather(*tasks)

    def blocked() -> Any:
        barrier.wait(WAIT)
        return [reply.result(WAIT)]

    answers = [in_thread(lambda: asyncio.run(awaited())) for _ in range(3)] + [in_thread(blocked) for _ in range(3)]
    barrier.wait(WAIT)
    gate.release()
    assert [answer.result(WAIT) for answer in answers] == [[b"0"] * 3] * 3 + [[b"0"]] * 3


def test_a_done_callback_runs_once(job: Job, gate: Gate) -> None:
    """A callback added before or after the settling runs once, with its reply; what it throws harms nobody."""
    fill(job, 1)
    gate.hold(job)
    reply = job.get("c", (0,))
    called: list[Future[Any]] = []
    ran = threading.Semaphore(0)

    def bad(_reply: Future[Any]) -> None:
        raise SystemExit

    def good(settled: Future[Any]) -> None:
        called.append(settled)
        ran.release()

    reply.add_done_callback(bad)
    reply.add_done_callback(good)
    mapped = reply.map(lambda payload: payload and payload.decode())
    mapped.add_done_callback(good)
    gate.release()
    for _ in range(2):
        assert ran.acquire(timeout=WAIT)
    reply.add_done_callback(good)
    assert [id(settled) for settled in called] in (
        [id(reply), id(mapped), id(reply)],
        [id(mapped), id(reply), id(reply)],
    )
    assert mapped.result(WAIT) == "0"
    assert job.get("c", (0,)).result(WAIT) == b"0"


def test_waiting_in_the_workers_own_thread_is_misuse(job: Job, gate: Gate) -> None:
    """A callback in the thread that has to answer can't wait for an answer: it is told, and nothing hangs."""
    caught: Future[Any] = Future()

    def callback(_reply: Future[Any]) -> None:
        try:
            job.put("c", ("k",), b"1")  # the line isn't empty now, so the read has to wait for its turn
            caught.set_result(job.get("c", ("k",)).result(WAIT))
        except BaseException as error:
            caught.set_exception(error)

    gate.hold(job)
    job.get("c", ("k",)).add_done_callback(callback)
    gate.release()
    assert isinstance(caught.exception(WAIT), Misuse)
    assert job.get("c", ("k",)).result(WAIT) == b"1"


def test_map_runs_once_in_the_thread_that_takes_the_result(job: Job, gate: Gate) -> None:
    """The function of `map` runs once, however many take the result, and not before somebody does."""
    fill(job, 1)
    ran: list[threading.Thread] = []

    def decode(payload: bytes | None) -> str:
        ran.append(threading.current_thread())
        return (payload or b"").decode()

    def take(reply: Reply[str]) -> tuple[str, threading.Thread]:
        return reply.result(WAIT), threading.current_thread()

    for held in (False, True):
        if held:
            gate.hold(job)
        ran.clear()
        mapped = job.get("c", (0,)).map(decode)
        longer = mapped.map(lambda text: text * 2)
        gate.release()
        wait([mapped], WAIT)
        assert ran == []
        takers = [in_thread(partial(take, mapped)) for _ in range(4)]
        taken = [taker.result(WAIT) for taker in takers]
        assert {text for text, _ in taken} == {"0"}
        assert longer.result(WAIT) == "00"
        assert len(ran) == 1
        assert ran[0] in [thread for _, thread in taken]
        assert run(wrapped(mapped)) == "0"


def test_what_a_mapped_function_raises_belongs_to_the_taker(job: Job, ask: Ask) -> None:
    """An exception of `map`'s function is raised to whoever takes the result, the same each time; the job goes on."""
    mapped = job.get("c", ("missing",)).map(lambda payload: 1 // 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            mapped.result(WAIT)
    assert isinstance(mapped.exception(WAIT), ZeroDivisionError)
    ran: list[object] = []
    failed = job.commit(failing()).map(ran.append)
    assert isinstance(failed.exception(WAIT), Conflict)
    with pytest.raises(Conflict):
        failed.result(WAIT)
    assert ran == []
    with pytest.raises(ZeroDivisionError):
        ask(lambda: job.get("c", ()).map(lambda _: 1 // 0))


def test_giving_up_waiting_leaves_the_request_going(job: Job, gate: Gate) -> None:
    """Promise 8: a `TimeoutError` of `result` undoes nothing: the answer comes later, for a read and for a write."""
    fill(job, 1)
    gate.hold(job)
    read, write = job.get("c", (0,)), job.commit(Put("c", ("w",), b"1"))
    for reply in (read, write, job.scan("c")):
        with pytest.raises(TimeoutError):
            reply.result(0.01)
        with pytest.raises(TimeoutError):
            reply.exception(0)
        assert not reply.done()
    gate.release()
    assert read.result(WAIT) == b"0"
    assert write.result(WAIT) == 3
    assert job.get("c", ("w",)).result(WAIT) == b"1"


# -- cancellation -------------------------------------------------------------------------------------------------


def test_cancelling_a_queued_read_removes_it(persistency: Persistency, gate: Gate) -> None:
    """Promise 8: a cancelled read never reaches the store and gives its room back; its neighbours are answered."""
    job = persistency.open_job("a", requests_max=3, on_full="raise")
    fill(job, 3)
    gate.hold(job)
    before, doomed, behind = (job.get("c", (number,)) for number in range(3))
    with pytest.raises(Overloaded):
        job.get("c", (0,))
    assert doomed.cancel() is True
    assert doomed.cancel() is True
    assert (doomed.done(), doomed.cancelled()) == (True, True)
    mapped = job.scan("c")
    assert mapped.cancel() is True
    assert mapped.cancelled()
    last = job.count("c")
    gate.release()
    for reply in (doomed, mapped):
        with pytest.raises(CancelledError):
            reply.result(WAIT)
        with pytest.raises(CancelledError):
            reply.exception(WAIT)
    assert (before.result(WAIT), behind.result(WAIT), last.result(WAIT)) == (b"0", b"2", 3)
    reads = [message for message in gate.asked if type(message) in (GetRow, ScanRange)]
    assert [message.key for message in reads] == [key(0), key(2)]


def test_a_cancelled_task_takes_its_read_along(job: Job, gate: Gate) -> None:
    """Promise 8: a task's cancellation, and a `wait_for` that expires, remove the read they waited for."""
    fill(job, 4)

    async def main() -> None:
        gate.hold(job)
        replies = [job.get("c", (number,)) for number in range(4)]
        tasks = [asyncio.ensure_future(replies[0]), asyncio.ensure_future(asyncio.wrap_future(replies[1]))]
        kept = asyncio.ensure_future(replies[3])
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(replies[2], 0.01)
        assert await asyncio.gather(*tasks, return_exceptions=True)
        assert [reply.cancelled() for reply in replies] == [True, True, True, False]
        gate.release()
        assert await kept == b"3"

    run(main())
    assert [message.key for message in gate.asked if type(message) is GetRow] == [key(3)]


def test_a_read_others_wait_for_is_not_taken_away(job: Job, gate: Gate, in_loop: InLoop) -> None:
    """Of several that wait for one reply, one that is cancelled leaves it to the others."""
    fill(job, 1)

    async def main() -> None:
        gate.hold(job)
        reply = job.get("c", (0,))
        mapped = reply.map(lambda payload: payload)
        async with anyio.create_task_group() as group:
            doomed, kept, doomed_mapped, kept_mapped = (Task(group, one) for one in (reply, reply, mapped, mapped))
            await turns()
            for task in (doomed, doomed_mapped):
                task.cancel()
                with pytest.raises(GivenUp):
                    await task
            gate.release()
            assert (await kept, await kept_mapped) == (b"0", b"0")

    in_loop(bounded, main)


def test_a_write_is_never_cancelled(job: Job, gate: Gate) -> None:
    """Promise 8: neither `cancel()`, nor a cancelled task, nor a timeout undoes a request that writes, or a flush."""

    async def main() -> None:
        gate.hold(job)
        replies: list[Reply[Any]] = [
            job.commit(Put("c", (0,), b"")),
            job.commit([Put("c", (1,), b""), Put("c", (2,), b"")]),
            job.delete_acked("held", ("held",)),
            job.delete_prefix_acked("c", ("nothing",)),
            job.flush(),
        ]
        assert [reply.cancel() for reply in replies] == [False] * 5
        tasks = [asyncio.ensure_future(reply) for reply in replies]
        others = [asyncio.ensure_future(asyncio.wrap_future(reply)) for reply in replies]
        await asyncio.sleep(0)
        for task in tasks + others:
            task.cancel()
        await asyncio.wait([*tasks, *others])
        assert all(task.cancelled() for task in tasks + others)
        assert not any(reply.done() for reply in replies)
        gate.release()
        assert await asyncio.gather(*replies) == [2, 4, True, 0, None]

    run(main())
    assert job.count("c").result(WAIT) == 3
    assert_balanced(job, 6)


def test_a_write_is_cancelled_in_no_event_loop(job: Job, gate: Gate, in_loop: InLoop) -> None:
    """Promise 8, with cancelled tasks and scopes of any loop."""

    async def main() -> None:
        gate.hold(job)
        replies: list[Reply[Any]] = [
            job.commit(Put("c", (0,), b"")),
            job.commit([Put("c", (1,), b""), Put("c", (2,), b"")]),
            job.delete_acked("held", ("held",)),
            job.delete_prefix_acked("c", ("nothing",)),
            job.flush(),
        ]
        async with anyio.create_task_group() as group:
            tasks = [Task(group, reply) for reply in replies]
            await turns()
            for task in tasks:
                task.cancel()
        assert all(task.cancelled for task in tasks)
        with anyio.move_on_after(0) as scope:
            await replies[0]
        assert scope.cancelled_caught
        assert not any(reply.done() for reply in replies)
        gate.release()
        assert await together(*replies) == [2, 4, True, 0, None]

    in_loop(bounded, main)
    assert job.count("c").result(WAIT) == 3
    assert_balanced(job, 6)


def test_a_settled_reply_can_not_be_cancelled(job: Job, ask: Ask) -> None:
    """`cancel()` of what is answered, or refused, is False and changes nothing."""
    reply = job.get("c", ("k",))
    assert reply.result(WAIT) is None
    assert reply.cancel() is False
    assert (reply.cancelled(), reply.result()) == (False, None)


def test_cancelling_thousands_of_reads_is_quick(job: Job, gate: Gate) -> None:
    """Who gives up on a full line of reads, one by one, holds nobody up for long."""
    gate.hold(job)
    replies = [job.get("c", (number,)) for number in range(4_000)]
    begun = monotonic()
    assert all(reply.cancel() for reply in reversed(replies))
    assert monotonic() - begun < 30  # not one walk through the whole line for each
    gate.release()
    assert job.get("held", ("held",)).result(WAIT) == b""


def test_cancelled_reads_in_a_storm_harm_no_neighbour(job: Job) -> None:
    """Tasks are cancelled at random beside writers and readers: every other answer is right, nothing is lost."""

    async def client(number: int) -> int:
        cancelled = 0
        for turn in range(100):
            k = key(number, turn)
            job.put("c", k, b"%d" % turn)
            async with anyio.create_task_group() as group:
                doomed, kept = Task(group, job.scan("c", limit=3)), Task(group, job.get("c", k))
                if (turn + number) % 3:
                    await turns()
                doomed.cancel()
                assert await kept == b"%d" % turn
            cancelled += doomed.cancelled
        return cancelled

    async def main() -> int:
        return sum(await together(*(client(number) for number in range(10))))

    with ThreadPoolExecutor(3) as pool:  # one of each kind, at once
        assert min(pool.map(lambda run_one: run_one(bounded, main), LOOPS.values())) > 0
    assert job.count("c").result(WAIT) == 1_000
    assert_balanced(job, 3_000)


# -- the handle ---------------------------------------------------------------------------------------------------


def test_a_handle_knows_its_job(root: str | Path, persistency: Persistency) -> None:
    """`id`, `path` and `closed` are the job's; in memory there is no path."""
    job = persistency.open_job("alpha")
    assert job.id == "alpha"
    assert job.path == (None if root == ":memory:" else Path(root) / "alpha.db")
    assert not job.closed
    assert "alpha" in repr(job)
    job.close(WAIT)
    assert "closed" in repr(job)
    assert job.id == "alpha"


def test_events_return_none_and_requests_a_reply(job: Job) -> None:
    """Section 3: an event returns `None`, a request returns a `Reply`."""
    nothing: list[Any] = [
        job.put("c", (1,), b""),  # type: ignore[func-returns-value]
        job.delete("c", (1,)),  # type: ignore[func-returns-value]
        job.delete_prefix("c", (1,)),  # type: ignore[func-returns-value]
        job.delete_range("c", KeyRange((1,))),  # type: ignore[func-returns-value]
        job.persist([]),  # type: ignore[func-returns-value]
    ]
    replies: list[Any] = [
        job.get("c", ()),
        job.entry("c", ()),
        job.get_many("c", []),
        job.exists("c", ()),
        job.count("c"),
        job.scan("c"),
        job.scan_prefix("c", ()),
        job.categories(),
        job.version(),
        job.commit([]),
        job.delete_acked("c", ()),
        job.delete_prefix_acked("c", (1,)),
        job.delete_range_acked("c", KeyRange((1,))),
        job.flush(),
        job.flush(sync=True),
        job.drain(),
    ]
    assert nothing == [None] * 5
    assert all(isinstance(reply, Reply) and isinstance(reply, Future) for reply in replies)
    wait(replies, WAIT)
    assert [reply.exception() for reply in replies] == [None] * len(replies)


def test_a_failure_keeps_the_payload_as_it_was_posted(persistency: Persistency) -> None:
    """D-17: what a failure shows was copied at the call; the caller may go on writing into its buffer."""
    job = persistency.open_job("copied")
    buffer = bytearray(b"posted")
    job.persist([Put("c", ("k",), buffer), Check("c", ("k",), 99)])
    buffer[:] = b"change"
    with pytest.raises(WriteFailed) as caught:
        job.flush().result(WAIT)
    assert caught.value.failures[0].op == Put("c", ("k",), b"posted")


def test_handles_stay_in_their_process(tmp_path: Path) -> None:
    """A handle that is to be pickled or copied says what to send in its place."""
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("a")
        job.flush().result()
        with persistency.open_reader("a") as reader:
            acts = [(act, handle) for act in (pickle.dumps, copy.copy) for handle in (persistency, job, reader)]
            for act, handle in (*acts, (pickle.dumps, Category(job, "c"))):
                with pytest.raises(Misuse, match="can't be copied, pickled or sent to another process"):
                    act(handle)
