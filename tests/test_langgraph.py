"""The LangGraph saver: the ecosystem's own suite, and what that leaves open."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import ALL_CAPABILITIES
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT, _DeltaSnapshot

from persistency import CBOR, Corrupt, Job, KeyRange, Misuse, Persistency, RawKey, key
from persistency.integrations.langgraph import PersistencySaver
from tests.langgraph_given import RUNNERS, checkpoint_of, config_of, ids, known, metadata_of, put, saver_on
from tests.loops import InLoop

BIG = list(range(1000))  # what has a row of its own


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Give an empty job."""
    with Persistency(tmp_path / "root") as p:
        yield p.open_job("graphs")


@pytest.fixture
def saver(job: Job) -> PersistencySaver:
    """Give a saver on an empty job."""
    return PersistencySaver(job)


@pytest.fixture(params=RUNNERS)
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[PersistencySaver]:
    """Give a saver on a job, and one on a baton."""
    with saver_on(request.param, str(tmp_path / "root")) as made:
        yield made


def rows(saver: PersistencySaver, job: Job, kind: str) -> int:
    """Count the rows of a kind."""
    return job.count(saver.name, KeyRange.prefix(key(kind))).result()


# -- the ecosystem's own suite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("runner", RUNNERS)
def test_the_conformance_suite_passes_with_every_capability(runner: str, tmp_path: Path) -> None:
    """`langgraph-checkpoint-conformance`, as it is, finds all capabilities and nothing wrong with any."""
    roots = iter(range(100))

    @checkpointer_test(name=f"PersistencySaver on a {runner}")
    async def factory() -> AsyncGenerator[BaseCheckpointSaver[str], None]:
        with saver_on(runner, str(tmp_path / str(next(roots)))) as saver:
            yield saver

    report = asyncio.run(validate(factory))
    found = report.to_dict()
    assert {name for name, one in found["results"].items() if one["detected"]} == {
        one.value for one in ALL_CAPABILITIES
    }
    assert [one["failures"] for one in found["results"].values() if one["failures"]] == []
    assert found["conformance_level"] == "FULL"
    assert sum(one["tests_passed"] for one in found["results"].values()) > 70


# -- one object for threads and loops ------------------------------------------------------------------------------


def test_both_forms_of_every_verb_do_the_same_in_every_loop(tmp_path: Path, in_loop: InLoop) -> None:
    """What one form has put the other one reads, under asyncio, trio and anyio, on one object."""
    with saver_on("job", str(tmp_path)) as saver:

        async def everything() -> None:
            first = await saver.aput(
                config_of("t"), checkpoint_of("1", {"a": BIG}), metadata_of(run_id="r"), {"a": "1"}
            )
            await saver.aput_writes(first, [("a", "written")], "task")
            one = await saver.aget_tuple(config_of("t"))
            assert known(one) == known(saver.get_tuple(config_of("t")))
            assert one is not None
            assert one.pending_writes == [("task", "a", "written")]
            assert ids([one async for one in saver.alist(config_of("t"))]) == ids(saver.list(config_of("t"))) == ["1"]
            await saver.acopy_thread("t", "u")
            assert known(saver.get_tuple(config_of("u")))[1:3] == known(one)[1:3]
            await saver.aprune(["u"])
            assert ids(saver.list(config_of("u"))) == ["1"]
            await saver.adelete_for_runs(["r"])
            assert ids(saver.list(None)) == []
            await saver.aput(config_of("t"), checkpoint_of("2"), metadata_of(), {})
            assert await saver.aget_delta_channel_history(config=config_of("t"), channels=["a"]) == {
                "a": {"writes": []}
            }
            await saver.adelete_thread("t")
            assert saver.get_tuple(config_of("t")) is None

        in_loop(everything)


def test_one_saver_is_used_by_several_loops_and_threads_at_once(saver: PersistencySaver) -> None:
    """Loops in threads of their own and plain threads put and read on one object; each sees all of its own."""
    wrong: list[BaseException] = []

    async def awaited(thread: str) -> None:
        for step in range(20):
            await saver.aput(
                config_of(thread), checkpoint_of(f"{step:03}", {"n": [step]}), metadata_of(step), {"n": "1"}
            )
            one = await saver.aget_tuple(config_of(thread))
            assert one is not None
            assert one.metadata["step"] == step

    def plain(thread: str) -> None:
        for step in range(20):
            put(saver, thread, f"{step:03}", {"n": [step]}, step=step)
            one = saver.get_tuple(config_of(thread))
            assert one is not None
            assert one.metadata["step"] == step

    def work(at: int) -> None:
        try:
            if at % 2:
                plain(f"plain-{at}")
            else:
                asyncio.run(awaited(f"loop-{at}"))
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert len(list(saver.list(None))) == 8 * 20


def test_the_sync_verbs_work_within_a_running_loop(saver: PersistencySaver) -> None:
    """Where LangGraph's own asynchronous saver refuses, a synchronous call in the loop's thread is answered."""

    async def within() -> None:
        stored = put(saver, "t", "1", {"a": BIG})
        saver.put_writes(stored, [("a", 1)], "task")
        one = saver.get_tuple(config_of("t"))
        assert one is not None
        assert one.checkpoint["channel_values"] == {"a": BIG}
        assert ids(saver.list(config_of("t"))) == ["1"]
        saver.delete_thread("t")

    asyncio.run(within())
    assert saver.get_tuple(config_of("t")) is None


# -- values --------------------------------------------------------------------------------------------------------


def test_a_value_that_hasnt_changed_is_stored_once(saver: PersistencySaver, job: Job) -> None:
    """Checkpoints that share a large value share its row, and each gives it whole; small ones need none."""
    put(saver, "t", "1", {"documents": BIG, "n": 1, "few": [1, "two"]})
    for step in range(2, 10):
        checkpoint = checkpoint_of(str(step), {"documents": BIG, "n": step, "few": [step, "two"]})
        saver.put(config_of("t", str(step - 1)), checkpoint, metadata_of(step), {"n": str(step), "few": str(step)})
    assert rows(saver, job, "checkpoint") == 9
    assert rows(saver, job, "value") == 1
    found = {one.checkpoint["id"]: one.checkpoint["channel_values"] for one in saver.list(config_of("t"))}
    assert found == {str(step): {"documents": BIG, "n": step, "few": [step, "two"]} for step in range(1, 10)}


@pytest.mark.parametrize("parent", [None, "0", "1"], ids=["no parent", "missing parent", "parent without it"])
def test_a_value_said_to_be_unchanged_but_never_put_is_stored(either: PersistencySaver, parent: str | None) -> None:
    """A checkpoint whose caller leaves a channel out of `new_versions` has its value all the same."""
    put(either, "t", "1", {"other": BIG})
    checkpoint = checkpoint_of("2", {"a": BIG[::-1], "b": 2})
    either.put(config_of("t", parent), checkpoint, metadata_of(), {})
    one = either.get_tuple(config_of("t", "2"))
    assert one is not None
    assert one.checkpoint == checkpoint


def test_a_value_without_a_version_stays_within_its_checkpoint(saver: PersistencySaver, job: Job) -> None:
    """What has no version in `channel_versions` comes back too, and has no row of its own."""
    put(saver, "t", "1", {"a": BIG}, versions={})
    one = saver.get_tuple(config_of("t"))
    assert one is not None
    assert one.checkpoint["channel_values"] == {"a": BIG}
    assert rows(saver, job, "value") == 0


def test_a_value_that_was_lost_is_told_and_not_left_out(either: PersistencySaver) -> None:
    """If a value's row is gone, reading its checkpoint is `Corrupt`."""
    put(either, "t", "1", {"a": BIG})
    either._way.runner.run(lambda tx: tx.delete_prefix(either.name, key("value"))).result()
    with pytest.raises(Corrupt, match="the value of 'a' is gone"):
        either.get_tuple(config_of("t"))
    with pytest.raises(Corrupt, match="the value of 'a' is gone"):
        list(either.list(config_of("t")))


def test_the_serializer_is_the_users(job: Job) -> None:
    """Nothing is pickled unless the serializer given does; with one that does, an object comes back."""
    value = {1, 2, threading.Lock}
    saver = PersistencySaver(job)
    with pytest.raises(TypeError):
        put(saver, "t", "1", {"a": lambda: None})
    assert saver.get_tuple(config_of("t")) is None
    pickling = PersistencySaver(job, name="pickled", serde=JsonPlusSerializer(pickle_fallback=True))
    put(pickling, "t", "1", {"a": value})
    one = pickling.get_tuple(config_of("t"))
    assert one is not None
    assert one.checkpoint["channel_values"]["a"] == value


def test_versions_grow_and_differ(saver: PersistencySaver) -> None:
    """Each version is greater than the one it follows, and two branches don't make the same one."""
    first = saver.get_next_version(None, None)
    second, other = saver.get_next_version(first, None), saver.get_next_version(first, None)
    assert first < second
    assert first < other
    assert second != other
    assert saver.get_next_version("41", None).startswith(f"{42:032}.")


def test_the_latest_is_the_one_with_the_greatest_id_whoever_puts_it_when(job: Job) -> None:
    """Two savers on one job put in turn, and not in the order of ids; each sees what the other one has put."""
    savers = [PersistencySaver(job) for _ in range(2)]
    latest = ""
    for at, checkpoint_id in enumerate(["2", "5", "3", "4", "1", "7", "6", "9", "8"]):
        put(savers[at // 2 % 2], "t", checkpoint_id, {"a": BIG}, versions={"a": checkpoint_id})
        latest = max(latest, checkpoint_id)
        assert [ids([saver.get_tuple(config_of("t"))]) for saver in savers] == [[latest]] * 2
    savers[0].delete_thread("t")
    put(savers[1], "t", "0")
    assert [ids([saver.get_tuple(config_of("t"))]) for saver in savers] == [["0"]] * 2


@pytest.mark.parametrize("how", ["delete_thread", "prune", "delete_for_runs"])
def test_a_value_deleted_behind_a_savers_back_is_stored_again(job: Job, how: str) -> None:
    """What one saver remembers to be there another one has deleted: the next checkpoint that has it brings it."""
    saver, other = PersistencySaver(job), PersistencySaver(job)
    put(saver, "t", "1", {"a": BIG}, versions={"a": "1"}, run_id="r")
    if how == "delete_thread":
        other.delete_thread("t")
    elif how == "prune":
        put(other, "t", "2")
        other.prune(["t"])
    else:
        other.delete_for_runs(["r"])
    checkpoint = checkpoint_of("3", {"a": BIG}, {"a": "1"})
    saver.put(config_of("t", "1"), checkpoint, metadata_of(), {})
    one = other.get_tuple(config_of("t"))
    assert one is not None
    assert one.checkpoint == checkpoint


def test_more_threads_than_are_remembered_are_put_all_the_same(saver: PersistencySaver, job: Job) -> None:
    """What a saver remembers is bounded."""
    for turn in range(2):
        for at in range(1100):
            checkpoint = checkpoint_of(f"{turn}", {"a": BIG})
            saver.put(config_of(f"t{at}"), checkpoint, metadata_of(), {"a": "1"} if turn == 0 else {})
    assert saver._way.direct is not None
    assert len(saver._way.direct._heads) <= 1024
    assert rows(saver, job, "checkpoint") == 2200
    assert rows(saver, job, "value") == 1100
    assert job.statistics().failed == 0


# -- writes --------------------------------------------------------------------------------------------------------


def test_writes_of_several_tasks_come_in_the_order_they_are_applied(either: PersistencySaver) -> None:
    """By task path, task and number, whatever order they were put in; a task's second batch adds to its first."""
    stored = put(either, "t", "1")
    either.put_writes(stored, [("a", "third")], "task-1", "~path, 2")
    either.put_writes(stored, [("a", "first"), ("b", "second")], "task-9", "~path, 1")
    either.put_writes(stored, [(ERROR, "fourth")], "task-1", "~path, 2")
    one = either.get_tuple(stored)
    assert one is not None
    assert one.pending_writes == [
        ("task-9", "a", "first"),
        ("task-9", "b", "second"),
        ("task-1", ERROR, "fourth"),
        ("task-1", "a", "third"),
    ]
    assert known(next(either.list(config_of("t")))) == known(one)


def test_writes_stay_as_they_were_first_but_errors_and_interrupts_are_replaced(either: PersistencySaver) -> None:
    """A task that is run again doesn't change what it has written, only how it has ended; its neighbours nothing."""
    stored = put(either, "t", "1")
    for task in ("first", "second"):
        either.put_writes(stored, [("a", 1), (INTERRUPT, "one")], task)
        either.put_writes(stored, [("a", 2), (INTERRUPT, "two"), ("b", 3)], task)
    one = either.get_tuple(stored)
    assert one is not None
    expected = [("a", 1), (INTERRUPT, "two"), ("b", 3)]
    for task in ("first", "second"):
        found = [(channel, value) for name, channel, value in one.pending_writes or () if name == task]
        assert sorted(found) == sorted(expected)


# -- listing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 15, 16, 17, 64, 65, 150])
def test_listing_gives_every_checkpoint_once_whatever_the_page(saver: PersistencySaver, count: int) -> None:
    """At, below and beyond the sizes of pages; with a filter, a limit, before, and without a namespace."""
    for at in range(count):
        put(saver, "t", f"{at:04}", {"a": BIG[: at % 7]}, step=at % 3)
    newest = [f"{at:04}" for at in reversed(range(count))]
    config = config_of("t")
    assert ids(saver.list(config)) == newest
    assert ids(saver.list(config, filter={"step": 1})) == [one for one in newest if int(one) % 3 == 1]
    for limit in (0, 1, 16, 17):
        assert ids(saver.list(config, limit=limit)) == newest[:limit]
        assert (
            ids(saver.list(config, filter={"step": 0}, limit=limit))
            == [one for one in newest if int(one) % 3 == 0][:limit]
        )
    before = config_of("t", f"{count // 2:04}")
    assert ids(saver.list(config, before=before)) == [one for one in newest if int(one) < count // 2]
    assert ids(saver.list(None, before=before, limit=3)) == [one for one in newest if int(one) < count // 2][:3]
    assert ids(saver.list({"configurable": {"thread_id": "t"}})) == newest


def test_listing_without_a_namespace_is_by_time_over_all_of_them(saver: PersistencySaver) -> None:
    """A thread's namespaces, and all threads, are one list, the latest first; a checkpoint's id chooses one."""
    for at in range(30):
        put(saver, f"t{at % 2}", f"{at:04}", namespace=("", "child:1", "child:2")[at % 3])
    assert ids(saver.list(None)) == [f"{at:04}" for at in reversed(range(30))]
    assert ids(saver.list(config_of("t1", namespace=None))) == [f"{at:04}" for at in reversed(range(1, 30, 2))]
    assert ids(saver.list(config_of("t1", "0007", namespace=None))) == ["0007"]
    assert ids(saver.list(config_of("t1", "0007", namespace="child:1"))) == ["0007"]
    assert ids(saver.list(config_of("t1", "0007"))) == []
    assert ids(saver.list(config_of("t1", "0007", namespace="child:1"), before=config_of("t1", "0007"))) == []


def test_what_goes_while_it_is_listed_is_left_out(saver: PersistencySaver) -> None:
    """Deleting a thread under a listing that has begun gives no error and none of what is gone and wasn't read."""
    for at in range(100):
        put(saver, f"t{at % 2}", f"{at:04}", {"a": BIG})
    everything, one_thread = saver.list(None), saver.list(config_of("t0"))
    assert ids([next(everything), next(one_thread)]) == ["0099", "0098"]
    saver.delete_thread("t0")
    assert all(one.config["configurable"]["thread_id"] == "t1" for one in list(everything)[15:])
    assert len(list(one_thread)) == 15


def test_a_listing_that_is_left_or_closed_gives_nothing_more(saver: PersistencySaver, in_loop: InLoop) -> None:
    """It can be left where it is without a warning; after `close` it is at its end."""
    for at in range(40):
        put(saver, "t", f"{at:04}")

    async def left() -> None:
        async for _ in saver.alist(config_of("t")):
            break
        closed = saver.alist(config_of("t"))
        await anext(closed)
        await closed.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(closed)

    in_loop(left)
    closed = saver.list(config_of("t"))
    next(closed)
    closed.close()
    assert list(closed) == []


# -- keeping house -------------------------------------------------------------------------------------------------


def test_deleting_a_run_leaves_what_others_share(saver: PersistencySaver, job: Job) -> None:
    """Its checkpoints, their writes and the values only they have go; the values of others stay."""
    put(saver, "t", "1", {"a": BIG, "b": BIG}, versions={"a": "1", "b": "1"}, run_id="keep")
    second = put(saver, "t", "2", {"a": BIG, "b": BIG[1:]}, versions={"a": "1", "b": "2"}, run_id="drop")
    saver.put_writes(second, [("a", 1)], "task")
    put(saver, "t", "2", {"c": BIG}, namespace="child", run_id="drop")
    put(saver, "u", "3", {"a": BIG}, run_id="drop")
    assert rows(saver, job, "value") == 5
    saver.delete_for_runs(["drop", "unknown"])
    assert ids(saver.list(None)) == ["1"]
    one = saver.get_tuple(config_of("t"))
    assert one is not None
    assert one.checkpoint["channel_values"] == {"a": BIG, "b": BIG}
    assert [rows(saver, job, kind) for kind in ("checkpoint", "value", "write", "run")] == [1, 2, 0, 1]


def test_a_checkpoint_put_again_by_another_run_is_that_runs(saver: PersistencySaver) -> None:
    """Deleting the first run leaves it alone."""
    put(saver, "t", "1", run_id="first")
    put(saver, "t", "1", run_id="second")
    saver.delete_for_runs(["first"])
    assert ids(saver.list(None)) == ["1"]
    saver.delete_for_runs(["second"])
    assert ids(saver.list(None)) == []


def test_pruning_keeps_the_latest_of_each_namespace_with_its_values(saver: PersistencySaver, job: Job) -> None:
    """And nothing else: no value, no writes, no trace of a run."""
    for namespace in ("", "child"):
        for at in range(5):
            versions = {"same": "1", "changing": str(at)}
            stored = put(
                saver,
                "t",
                f"{at}",
                {"same": BIG, "changing": BIG[at:]},
                versions=versions,
                namespace=namespace,
                run_id="r",
            )
            saver.put_writes(stored, [("a", at)], "task")
    put(saver, "other", "0", {"a": BIG})
    saver.prune(["t", "unknown"])
    for namespace in ("", "child"):
        (one,) = saver.list(config_of("t", namespace=namespace))
        assert one.checkpoint["channel_values"] == {"same": BIG, "changing": BIG[4:]}
        assert one.pending_writes == [("task", "a", 4)]
    assert [rows(saver, job, kind) for kind in ("checkpoint", "value", "write", "run")] == [3, 5, 2, 2]
    saver.prune(["t"], strategy="delete")
    assert ids(saver.list(None)) == ["0"]
    assert [rows(saver, job, kind) for kind in ("checkpoint", "value", "write", "run")] == [1, 1, 0, 0]


def test_pruning_keeps_what_a_delta_channel_is_made_of(either: PersistencySaver) -> None:
    """The ancestors back to its last snapshot stay, with their writes; those before go."""
    counters = {"counters_since_delta_snapshot": {"messages": (1, 1)}}
    for at in range(6):
        snapshot = {"messages": _DeltaSnapshot([*range(at), *BIG])} if at == 2 else {}
        more = {} if at == 2 else counters
        stored = put(either, "t", f"{at}", snapshot, parent=None if at == 0 else f"{at - 1}", **more)
        either.put_writes(stored, [("messages", at), ("other", at)], "task")
    before = either.get_delta_channel_history(config=config_of("t"), channels=["messages"])
    assert before["messages"]["seed"] == _DeltaSnapshot([0, 1, *BIG])
    assert [value for _, _, value in before["messages"]["writes"]] == [2, 3, 4]
    either.prune(["t"])
    assert ids(either.list(config_of("t"))) == ["5", "4", "3", "2"]
    assert either.get_delta_channel_history(config=config_of("t"), channels=["messages"]) == before


def test_the_history_of_delta_channels_is_what_langgraphs_own_walk_gives(either: PersistencySaver) -> None:
    """Over a chain longer than a page, with forks, seeds of several kinds, and parents that go round in a circle."""
    parent = None
    for at in range(140):
        values: dict[str, Any] = {}
        if at == 3:
            values["a"] = BIG
        if at == 70:
            values["b"] = "a short text"
        stored = put(either, "t", f"{at:04}", values, parent=parent)
        either.put_writes(stored, [("a", at), ("b", at), ("c", at)], f"task-{at % 2}")
        put(either, "t", f"{at:04}-fork", {"a": [at]}, parent=parent)
        parent = f"{at:04}"
    for target in ("0139", "0070", "0004", "0003", "0000", "0100-fork"):
        config = config_of("t", target)
        expected = BaseCheckpointSaver.get_delta_channel_history(either, config=config, channels=["a", "b", "c"])
        assert either.get_delta_channel_history(config=config, channels=["a", "b", "c"]) == expected
        assert either.get_delta_channel_history(config=config, channels=["b"]) == {"b": expected["b"]}
    assert either.get_delta_channel_history(config=config_of("unknown"), channels=["a"]) == {"a": {"writes": []}}
    assert either.get_delta_channel_history(config=config_of("t"), channels=[]) == {}
    put(either, "t", "0000", {}, parent="0002")  # LangGraph's own walk would never end
    found = either.get_delta_channel_history(config=config_of("t", "0002"), channels=["c"])
    assert {value for _, _, value in found["c"]["writes"]} == {0, 1, 2}


def test_a_copy_is_a_thread_of_its_own(either: PersistencySaver) -> None:
    """It has all there is, namespaces and runs included, and stays when the other one goes."""
    stored = put(either, "t", "1", {"a": BIG}, run_id="r")
    put(either, "t", "2", {"b": BIG}, namespace="child")
    either.put_writes(stored, [("a", 1)], "task")
    before = [known(one)[1:3] for one in either.list(config_of("t", namespace=None))]
    either.copy_thread("t", "u")
    either.copy_thread("t", "t")
    either.delete_thread("t")
    assert [known(one)[1:3] for one in either.list(config_of("u", namespace=None))] == before
    one = either.get_tuple(config_of("u"))
    assert one is not None
    assert one.pending_writes == [("task", "a", 1)]
    either.delete_for_runs(["r"])
    assert ids(either.list(None)) == ["2"]


# -- wrong arguments -----------------------------------------------------------------------------------------------


def test_wrong_arguments_are_misuse_at_the_call(saver: PersistencySaver, job: Job) -> None:
    """And nothing was done."""
    for wrong in (lambda: PersistencySaver("job"), lambda: PersistencySaver(job, name="")):  # type: ignore[arg-type]
        with pytest.raises(Misuse):
            wrong()
    with pytest.raises(Misuse, match="names no thread"):
        saver.get_tuple({"configurable": {}})
    with pytest.raises(Misuse, match="names no thread"):
        saver.list({})
    for wrong_config in (config_of("t", namespace=7), config_of("t", 7), config_of("t", b"1")):  # type: ignore[arg-type]
        with pytest.raises(Misuse, match="must be a text"):
            saver.get_tuple(wrong_config)
        with pytest.raises(Misuse, match="must be a text"):
            saver.list(wrong_config)
        with pytest.raises(Misuse, match="must be a text"):
            saver.put(wrong_config, checkpoint_of("1"), metadata_of(), {})
    for wrong_id in (7, None):
        with pytest.raises(Misuse, match="must be a text"):
            saver.put(config_of("t"), checkpoint_of(wrong_id), metadata_of(), {})  # type: ignore[arg-type]
    with pytest.raises(Misuse, match="must be a text"):
        saver.list(None, before=config_of("t", 7))  # type: ignore[arg-type]
    with pytest.raises(Misuse, match="names no checkpoint"):
        saver.put_writes(config_of("t"), [("a", 1)], "task")
    with pytest.raises(Misuse, match="keep_latest, delete"):
        saver.prune(["t"], strategy="all")
    with pytest.raises(Misuse, match="a list of ids"):
        saver.prune("t")
    with pytest.raises(Misuse, match="a list of ids"):
        saver.delete_for_runs("r")
    assert job.categories().result() == []


def test_threads_are_named_by_text_whatever_is_given(saver: PersistencySaver) -> None:
    """A number or a UUID as a `thread_id` is the thread of that text, as in LangGraph's own SQLite saver."""
    saver.put(config_of(7), checkpoint_of("1"), metadata_of(), {})  # type: ignore[arg-type]
    assert saver.get_tuple(config_of("7")) is not None
    saver.delete_thread(7)  # type: ignore[arg-type]
    assert saver.get_tuple(config_of("7")) is None


def test_rows_of_something_else_are_corrupt(saver: PersistencySaver, job: Job) -> None:
    """A category that somebody else has written into is told, not guessed at."""
    job.put(saver.name, key("checkpoint", "t", "", "1"), b"\x00")
    with pytest.raises(Corrupt):
        saver.get_tuple(config_of("t", "1"))
    job.put(saver.name, RawKey(bytes(key("checkpoint", "t", "")) + b"\x15\x01"), b"")
    with pytest.raises(Corrupt):
        list(saver.list(config_of("t")))
    job.put(saver.name, key("checkpoint", "t", "", "1"), CBOR.encode([None, "t", b"", "t", b"", 5, None, []]))
    with pytest.raises(Corrupt):
        saver.get_tuple(config_of("t", "1"))
    put(saver, "u", "1", {"a": BIG})
    job.put(saver.name, key("value", "u", "", "a", "1"), b"\xff\0")
    with pytest.raises(Corrupt):
        saver.get_tuple(config_of("u"))
    job.put(saver.name, key("head", "u", ""), b"\xff")
    with pytest.raises(Corrupt):
        saver.get_tuple(config_of("u"))
    with pytest.raises(Corrupt):
        put(PersistencySaver(job), "u", "2")


def test_metadata_may_say_none_of_delta_channels(saver: PersistencySaver) -> None:
    """`None` where LangGraph has a mapping is stored as it is."""
    put(saver, "t", "1", counters_since_delta_snapshot=None)
    one = saver.get_tuple(config_of("t"))
    assert one is not None
    assert one.metadata["counters_since_delta_snapshot"] is None
