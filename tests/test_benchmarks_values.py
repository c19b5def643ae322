"""The benchmarks of large values, objects, many rows at once and levels of durability: that they measure what they say,
and trust no result they haven't looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cbor2
import pytest

from benchmarks.cases import CASES, batches, values
from benchmarks.contenders import load
from benchmarks.contenders.groups import GROUP_BYTES, GROUP_ROWS, groups
from benchmarks.harness import run_case
from benchmarks.protocol import CATEGORY, Contender, Pair
from benchmarks.verify import Mismatch
from benchmarks.workload import Workload
from persistency import Misuse, Persistency
from persistency.codec import values as cbor
from tests.garbage import heap_left_alone
from tests.test_benchmarks import WORKLOAD, WRONG, crippled

__all__ = ["heap_left_alone"]  # a fixture, for every test here

MINE = [case.name for case in (*values.CASES, *batches.CASES)] + ["put-durable", "commit-durable"]


def listening(contender: Contender, task: str, heard: list[Any]) -> Contender:
    """Return a contender that notes the arguments of each call of a task."""

    def change(call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any) -> Any:
            heard.append(given)
            return call(*given)

        return noted

    return crippled(task, change, contender)


@pytest.mark.parametrize("name", MINE)
def test_every_way_of_this_engine_is_measured_and_verified(name: str, tmp_path: Path) -> None:
    """Each of our ways gives a figure at a tiny size, and the same way with a wrong result ends in a mismatch."""
    ours = load("persistency")
    ways = CASES[name].ways(ours)
    found = run_case(CASES[name], [ours], WORKLOAD, 1, parent=tmp_path)
    assert [one.way for one in found] == [way.label for way in ways] != []
    assert all(one.us > 0 for one in found)
    for way in ways:
        wrong = crippled(way.task, WRONG[way.task], replace(ours, ways=(way,)))
        with pytest.raises(Mismatch, match="persistency"):
            run_case(CASES[name], [wrong], WORKLOAD, 1, parent=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("nbytes", values.SIZES.values())
def test_a_measurement_writes_64_mib_at_most(nbytes: int) -> None:
    """However many rows a run has, so many bytes are put; a small run puts as much as its rows of 1 KiB would have."""
    for rows in (200_000, 10_000_000):
        usual = values.sized(Workload(rows), nbytes)
        assert usual.rows * nbytes == 64 * 2**20
    small = values.sized(Workload(2_000), nbytes)
    assert small.rows * nbytes <= max(2_000 * 1_024, 8 * nbytes)
    assert small.rows >= 8


@pytest.mark.parametrize(("name", "nbytes"), [("1k", 2**10), ("64k", 2**16), ("1m", 2**20)])
def test_payloads_have_the_size_that_a_case_names(name: str, nbytes: int, tmp_path: Path) -> None:
    """What is put has the size, and is a payload of its own for each key."""
    puts: list[tuple[Sequence[Pair]]] = []
    run_case(CASES[f"put-{name}"], [listening(load("persistency"), "put", puts)], WORKLOAD, 1, parent=tmp_path)
    ((rows,),) = puts
    assert {len(payload) for _key, payload in rows} == {nbytes}
    assert len({payload for _key, payload in rows}) == len({key for key, _payload in rows}) == len(rows) >= 8


def test_objects_are_records_that_every_side_can_store() -> None:
    """The records are the same whenever they are made, in the order of their keys, and no two are equal; CBOR gives
    each of them back, on both sides.
    """
    records = values.packages(300)
    assert values.packages.__wrapped__(300) == records
    keys = [key for key, _record in records]
    assert keys == sorted(set(keys))
    for _key, record in records:
        assert cbor2.loads(cbor2.dumps(record)) == cbor.decode(cbor.encode(record)) == record
        assert {type(value) for value in record.values()} >= {str, int, bool, float, list}
    assert len({cbor2.dumps(record) for _key, record in records}) == len(records)


def test_a_hundred_keys_are_asked_for_in_a_call(tmp_path: Path) -> None:
    """Each call has a hundred keys, all of them different."""
    calls: list[tuple[tuple[bytes, ...]]] = []
    run_case(CASES["get-many"], [listening(load("persistency"), "get-many", calls)], WORKLOAD, 1, parent=tmp_path)
    assert len(calls) == len(WORKLOAD.ordered) // 100
    assert {len(set(keys)) for (keys,) in calls} == {100}


@pytest.mark.parametrize(
    "change",
    [
        lambda iterate: lambda: [*iterate(), (b"one", b"more")],
        lambda _iterate: list,
        lambda iterate: lambda: reversed(list(iterate())),
    ],
)
def test_a_walk_is_compared_to_its_end(
    change: Callable[[Callable[..., Any]], Callable[..., Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A row too many, no row at all and another order are mismatches, also where it is compared in several parts."""
    monkeypatch.setattr(batches, "COMPARED", 50)
    run_case(CASES["iterate"], [load("persistency")], WORKLOAD, 1, parent=tmp_path)
    with pytest.raises(Mismatch):
        run_case(CASES["iterate"], [crippled("iterate", change)], WORKLOAD, 1, parent=tmp_path)


@pytest.mark.parametrize("task", ["put-durable", "commit-durable"])
@pytest.mark.parametrize("level", ["process", "power"])
def test_a_job_is_as_durable_as_its_way_says(task: str, level: str, tmp_path: Path) -> None:
    """A way named after a level runs on a job that was opened with it: asking for another one is refused."""
    (way,) = [way for way in load("persistency").ways if way.task == task and way.label == level]
    open_store = load("persistency").open_store
    assert open_store is not None
    other = {"process": "power", "power": "process"}[level]
    with asyncio.Runner() as runner, Persistency(tmp_path) as persistency:
        store = open_store(tmp_path, runner)
        try:
            way.make(store)
            persistency.open_job(CATEGORY, durability=level)  # type: ignore[arg-type]  # one of the two
            with pytest.raises(Misuse, match="durability"):
                persistency.open_job(CATEGORY, durability=other)  # type: ignore[arg-type]  # as above
        finally:
            store.close()


@pytest.mark.parametrize("task", ["put-durable", "commit-durable"])
@pytest.mark.parametrize(("label", "synchronous"), [("synchronous=NORMAL", 1), ("synchronous=FULL", 2)])
def test_bare_apsw_waits_for_the_medium_where_it_says_so(
    task: str, label: str, synchronous: int, tmp_path: Path
) -> None:
    """The connection of a way has the setting that the way is named after."""
    from benchmarks.contenders import apsw

    with asyncio.Runner() as runner:
        store = apsw.Bare(tmp_path, runner)
        try:
            (way,) = [way for way in apsw.CONTENDER.ways if way.task == task and way.label == label]
            way.make(store)
            assert store.execute("PRAGMA synchronous").get == synchronous
        finally:
            store.close()


@pytest.mark.parametrize(
    ("nbytes", "size"), [(100, GROUP_ROWS), (2**10, GROUP_ROWS), (2**16, GROUP_BYTES // 2**16), (2**24, 1)]
)
def test_groups_are_bounded_by_rows_and_by_bytes(nbytes: int, size: int) -> None:
    """All rows come in their order, in groups that are as large as the bounds allow."""
    payload = bytes(nbytes)
    rows = [(row.to_bytes(4, "big"), payload) for row in range(2 * size + 1)]
    found = list(groups(rows))
    assert [len(group) for group in found] == [size, size, 1]
    assert [row for group in found for row in group] == rows
    assert list(groups([])) == []


def test_objects_of_a_peer_are_compared_as_objects(tmp_path: Path) -> None:
    """An encoding is a contender's own business: other bytes for the same object are right, another object is not."""
    ours = load("persistency")
    turned = crippled("put-object", lambda put: lambda rows: put([(key, _turned(value)) for key, value in rows]), ours)
    run_case(CASES["put-object"], [turned], WORKLOAD, 1, parent=tmp_path)
    emptied = crippled("put-object", lambda put: lambda rows: put([(key, None) for key, _value in rows]), ours)
    with pytest.raises(Mismatch, match="read back: answer 0 is None"):
        run_case(CASES["put-object"], [emptied], WORKLOAD, 1, parent=tmp_path)


def _turned(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record with its fields in another order: it is equal, its bytes are not."""
    return dict(reversed(record.items()))
