"""The cases under pressure: that threads spin and put while it is measured, and are gone whatever happened."""

from __future__ import annotations

import asyncio
import gc
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cases import CASES, pressure
from benchmarks.cases.pressure import Produced, producing, spinning
from benchmarks.contenders import Missing, load
from benchmarks.contenders.persistency import Ours
from benchmarks.harness import opened, run_case
from benchmarks.protocol import CATEGORY, Contender, Pair, Queue, Way
from benchmarks.verify import Mismatch
from benchmarks.workload import Workload
from persistency import key
from tests.garbage import heap_left_alone

__all__ = ["heap_left_alone"]  # a fixture, for every test here

WORKLOAD = Workload(rows=200, payload_bytes=10, scanned_rows=1_000)
ROWS: list[Pair] = [(bytes([row]), b"payload") for row in range(10)]
Changed = Callable[[Callable[..., Any]], Callable[..., Any]]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in threading.enumerate() if thread not in before]
    assert not [name for name in left if name.startswith(("spinner", "producer"))]


@pytest.fixture(autouse=True)
def _few_scans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure, "SCANS_SPINNING", 3)


def ways(case: str) -> list[Way]:
    """Return this engine's ways in a case."""
    return CASES[case].ways(load("persistency"))


def crippled(way: Way, change: Changed) -> Contender:
    """Return this engine with one way alone, whose function is changed."""
    changed = replace(way, make=lambda store: change(way.make(store)))
    return replace(load("persistency"), ways=(changed,))


LABELS = {
    "put-spinning": ["alone", "beside one thread", "beside four threads"],
    "get-spinning": ["get"],
    "scan-spinning": ["scan_prefix"],
    "get-producer": ["get"],
    "aget-producer": ["await get"],
    "collect": ["in the mailbox", "a list of tuples"],
}
# For each case a result that is nearly right.
WRONG: dict[str, Changed] = {
    "put-spinning": lambda put: lambda rows: put([*rows[:-1], (rows[-1][0], b"")]),
    "get-spinning": lambda get: lambda wanted: get(wanted)[1:],
    "scan-spinning": lambda scan: lambda prefix: scan(prefix)[:-1],
    "get-producer": lambda get: lambda wanted: get(wanted)[1:],
    "aget-producer": lambda get: lambda wanted: asyncio.sleep(0, b""),
    "collect": lambda queue: lambda rows: queue(list(rows)[1:]),
}


def test_every_case_is_known_here() -> None:
    """The tables above name every case of the module, so that none is left without a test."""
    assert [case.name for case in pressure.CASES] == list(LABELS) == list(WRONG)


@pytest.mark.parametrize("case", LABELS)
def test_every_way_is_measured_and_verified(case: str, tmp_path: Path) -> None:
    """Each way of this engine gives a figure, and the same way with a wrong result ends in a mismatch."""
    found = run_case(CASES[case], [load("persistency")], WORKLOAD, 1, parent=tmp_path)
    assert [one.way for one in found] == LABELS[case]
    assert all(one.us > 0 and one.samples[0].operations > 0 for one in found)
    for way in ways(case):
        with pytest.raises(Mismatch, match="persistency"):
            run_case(CASES[case], [crippled(way, WRONG[case])], WORKLOAD, 1, parent=tmp_path)
    assert list(tmp_path.iterdir()) == []


# -- threads that spin -------------------------------------------------------------------------------------------------


def spinners() -> list[threading.Thread]:
    """Return the threads that spin now."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("spinner")]


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_as_many_threads_spin_as_asked_for(threads: int) -> None:
    """Inside they all run; afterwards they have ended, without an exception and with one."""
    with spinning(threads) as started:
        assert spinners() == started
        assert len(started) == threads
    assert not any(thread.is_alive() for thread in started)
    with pytest.raises(KeyboardInterrupt), spinning(threads) as started:
        raise KeyboardInterrupt
    assert not any(thread.is_alive() for thread in started)


def test_a_thread_that_cant_be_started_leaves_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the second thread can't be started the first one is stopped, and the error is the one of the start."""
    start = threading.Thread.start
    begun: list[threading.Thread] = []

    def once(thread: threading.Thread) -> None:
        if begun:
            raise RuntimeError("can't start new thread")
        begun.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", once)
    with pytest.raises(RuntimeError, match="can't start"), spinning(2):
        pass
    assert not begun[0].is_alive()


@pytest.mark.parametrize("case", ["put-spinning", "get-spinning", "scan-spinning"])
@pytest.mark.parametrize("name", ["persistency", "apsw"])
def test_the_threads_spin_while_it_is_measured(case: str, name: str, tmp_path: Path) -> None:
    """While the function runs there are as many spinning threads as the way says, and none once the case is over."""
    peer = load(name)
    counted: list[int] = []

    def counting(make: Callable[[Any], Callable[..., Any]]) -> Callable[[Any], Callable[..., Any]]:
        def made(store: Any) -> Callable[..., Any]:
            call = make(store)

            def counted_call(wanted: Any) -> Any:
                counted.append(len(spinners()))
                return call(wanted)

            return counted_call

        return made

    for way in CASES[case].ways(peer):
        counted.clear()
        one = replace(peer, ways=(replace(way, make=counting(way.make)),))
        run_case(CASES[case], [one], WORKLOAD, 1, parent=tmp_path)
        assert set(counted) == {way.spinning}
        assert spinners() == []


@pytest.mark.parametrize("case", LABELS)
def test_a_case_that_fails_leaves_no_thread(case: str, tmp_path: Path) -> None:
    """An exception in what is measured comes out of the case, whose threads have ended and whose files are gone."""

    def failing(_call: Callable[..., Any]) -> Callable[..., Any]:
        def fail(_wanted: Any) -> Any:
            raise ZeroDivisionError

        return fail

    for way in ways(case):
        with pytest.raises(ZeroDivisionError):
            run_case(CASES[case], [crippled(way, failing)], WORKLOAD, 1, parent=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_slow_calls_are_few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Once the time is over no further call is begun; the one there is counts, and is verified."""
    monkeypatch.setattr(pressure, "SPINNING_NS_MAX", 0)
    for case in ("get-spinning", "scan-spinning"):
        (found,) = run_case(CASES[case], [load("persistency")], WORKLOAD, 1, parent=tmp_path)
        assert [sample.operations for sample in found.samples] == [1]


# -- a thread that puts ------------------------------------------------------------------------------------------------


def test_a_producer_puts_the_rows_over_and_over() -> None:
    """It has put some rows when this begins, goes on while it lasts, and has counted what it put when it is over."""
    put: list[Pair] = []
    again = threading.Event()

    def put_all(rows: Sequence[Pair]) -> None:
        put.extend(rows)
        if len(put) > 3 * len(ROWS):
            again.set()

    with producing(put_all, ROWS) as produced:
        assert produced.rows >= len(ROWS)
        assert again.wait(60)
    assert produced == Produced(len(put))
    assert put == ROWS * (len(put) // len(ROWS))


def test_what_a_producer_fails_with_is_raised() -> None:
    """At the end, and not at all if something else was raised: that is what somebody wants to know first."""

    def fail(_rows: Sequence[Pair]) -> None:
        raise ZeroDivisionError

    seen: list[Produced] = []
    with pytest.raises(ZeroDivisionError), producing(fail, ROWS) as produced:
        seen.append(produced)
    assert isinstance(seen[0].error, ZeroDivisionError)
    assert seen[0].rows == 0
    with pytest.raises(KeyError), producing(fail, ROWS):
        raise KeyError


@pytest.mark.parametrize("interrupt", [ValueError, KeyboardInterrupt])
def test_a_producer_is_stopped_whatever_happens(interrupt: type[BaseException]) -> None:
    """An exception, or an interrupt, stops and joins it."""
    seen: list[threading.Thread] = []
    with pytest.raises(interrupt), producing(lambda rows: seen.append(threading.current_thread()), ROWS):
        raise interrupt
    assert not seen[0].is_alive()


@pytest.mark.parametrize("case", ["get-producer", "aget-producer"])
def test_a_producer_that_fails_ends_the_case(case: str, tmp_path: Path) -> None:
    """Reads beside a producer that is no more aren't counted: the case ends with what ended the producer."""
    (way,) = ways(case)
    assert way.producer is not None
    make_producer = way.producer

    def failing(store: Any) -> Callable[[Sequence[Pair]], None]:
        put_all, calls = make_producer(store), iter(range(2))

        def put_twice(rows: Sequence[Pair]) -> None:
            if next(calls, None) is None:
                raise ZeroDivisionError
            put_all(rows)

        return put_twice

    one = replace(load("persistency"), ways=(replace(way, producer=failing),))
    with pytest.raises(ZeroDivisionError):
        run_case(CASES[case], [one], Workload(rows=2_000, payload_bytes=10), 1, parent=tmp_path)


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("persistency", "get-producer"),
        ("persistency", "aget-producer"),
        ("apsw", "get-producer"),
        ("lmdb", "get-producer"),
    ],
)
def test_a_producer_that_loses_rows_is_seen(name: str, case: str, tmp_path: Path) -> None:
    """What was put beside the reads is read back too: half of its rows were not there before."""
    try:
        peer = load(name)
    except Missing as missing:
        pytest.skip(str(missing))
    (way,) = CASES[case].ways(peer)
    (found,) = run_case(CASES[case], [peer], WORKLOAD, 1, parent=tmp_path)
    assert found.samples[0].per_second is not None
    lossy = replace(way, producer=lambda store: lambda rows: way.producer(store)(rows[:-1]) if way.producer else None)
    with pytest.raises(Mismatch, match=re.escape(f"{name}: 199 rows are stored, not 200")):
        run_case(CASES[case], [replace(peer, ways=(lossy,))], WORKLOAD, 1, parent=tmp_path)


def test_reads_go_on_until_enough_was_put(tmp_path: Path) -> None:
    """Reads that are over in no time are made until the producer has put all rows twice."""
    (way,) = ways("get-producer")
    put: list[int] = []
    producer = way.producer
    assert producer is not None

    def counting(store: Any) -> Callable[[Sequence[Pair]], None]:
        put_all = producer(store)

        def put_counted(rows: Sequence[Pair]) -> None:
            put_all(rows)
            put.append(len(rows))

        return put_counted

    answers = dict(WORKLOAD.ordered)
    at_once = replace(way, make=lambda _store: answers.get, producer=counting)
    one = replace(load("persistency"), ways=(at_once,))
    (found,) = run_case(CASES["get-producer"], [one], WORKLOAD, 1, parent=tmp_path)
    assert sum(put) >= 2 * WORKLOAD.rows
    assert found.samples[0].operations >= 20


# -- a long queue ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("label", "waiting"), [("in the mailbox", 201), ("a list of tuples", 0)])
def test_what_is_queued_waits_until_it_is_let_go(label: str, waiting: int, tmp_path: Path) -> None:
    """Inside the context nothing is committed, however long it lasts; when it has ended everything is."""
    ours = load("persistency")
    (way,) = (way for way in ways("collect") if way.label == label)
    with opened(ours, tmp_path) as (store, _runner):
        assert isinstance(store, Ours)
        queue: Queue = way.make(store)
        with queue(WORKLOAD.ordered):
            assert store.job.statistics().pending == waiting
            assert store.job.statistics().committed == 0
        assert store.job.statistics().pending == 0
        assert store.job.count(CATEGORY).result() == WORKLOAD.rows


def test_a_queue_is_let_go_whatever_happens(tmp_path: Path) -> None:
    """An exception while rows wait, or while they are put, lets the worker go on: the store can be closed."""
    ours = load("persistency")
    way = ways("collect")[0]
    with opened(ours, tmp_path) as (store, _runner):
        assert isinstance(store, Ours)
        with pytest.raises(ZeroDivisionError), way.make(store)(WORKLOAD.ordered):
            raise ZeroDivisionError
        with pytest.raises(TypeError), way.make(store)([*WORKLOAD.ordered, None]):
            pass
        store.job.flush().result(60)
        assert store.job.count(CATEGORY).result(60) == WORKLOAD.rows


def test_the_queue_is_all_that_is_collected(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, heap_left_alone: Callable[[], object]
) -> None:
    """While a collection is timed its rows wait: five for each row of the workload, with a key each, and no more."""
    heap_left_alone()  # no more
    way = ways("collect")[0]
    queued: list[int] = []
    pending: list[int] = []
    stores: list[Ours] = []
    collect = gc.collect

    def collect_and_look() -> int:
        if queued:
            pending.append(stores[-1].job.statistics().pending)
        return collect()

    def make(store: Ours) -> Callable[..., Any]:
        stores.append(store)
        queue = way.make(store)

        def counted(rows: Iterable[Pair]) -> Any:
            ready = list(rows)
            queued.append(len({wanted for wanted, _payload in ready}))
            return queue(ready)

        return counted

    monkeypatch.setattr(gc, "collect", collect_and_look)
    one = replace(load("persistency"), ways=(replace(way, make=make),))
    run_case(CASES["collect"], [one], WORKLOAD, 1, parent=tmp_path)
    assert queued == [5 * WORKLOAD.rows]
    assert pending == [1 + 5 * WORKLOAD.rows] * 5
    assert gc.get_freeze_count() == 0
    monkeypatch.setattr(pressure, "QUEUED", 300)
    run_case(CASES["collect"], [one], WORKLOAD, 1, parent=tmp_path)
    assert queued[1:] == [300]


def test_two_connections_of_bare_apsw_share_a_file(tmp_path: Path) -> None:
    """What another connection puts is read by the first one, and both are closed together."""
    peer = load("apsw")
    rows = [(bytes(one), payload) for one, payload in ((key("row", row), b"x") for row in range(20))]
    with opened(peer, tmp_path) as (store, _runner):
        (way,) = CASES["get-producer"].ways(peer)
        assert way.producer is not None
        get = way.make(store)
        way.producer(store)(rows)
        assert [get(one) for one, _payload in rows] == [b"x"] * 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.db"]
