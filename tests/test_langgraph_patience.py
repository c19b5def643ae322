"""The LangGraph saver and store where there is no room: in a loop a verb waits for some, and nothing is refused."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from persistency import Closed, Job, Misuse, Overloaded, Persistency, Transaction
from persistency.integrations.langgraph import PersistencyGraphStore, PersistencySaver
from persistency.recipes import Baton
from tests.langgraph_given import checkpoint_of, config_of, ids, metadata_of, put
from tests.loops import InLoop

TASKS = 60
WAIT = 60.0  # seconds until it is taken for certain that nobody comes on
TEXT = "some text " * 500
SMALL: dict[str, Any] = {"mailbox_ops_max": 8, "mailbox_bytes_max": 16 * 1024, "requests_max": 8}


@contextmanager
def busy(job: Job) -> Iterator[Callable[[], None]]:
    """Keep the job from taking anything out of its mailbox until what is given is called."""
    begun, released = threading.Event(), threading.Event()

    def wait(_tx: Transaction) -> None:
        begun.set()
        released.wait(WAIT)

    # Of an idle job's mailbox nothing is taken: it may do at once, in the caller's thread, what it is asked for.
    elsewhere = threading.Thread(target=lambda: job.run(wait).result(WAIT))
    elsewhere.start()
    assert begun.wait(WAIT)
    try:
        yield released.set
    finally:
        released.set()
        elsewhere.join(WAIT)


async def all_at_once(acts: Sequence[Callable[[], Awaitable[Any]]], then: Callable[[], object]) -> list[Any]:
    """Begin all of them, each in a task of its own, call `then` when each has asked; return what they return."""
    done: list[Any] = []
    asked = 0

    async def one(act: Callable[[], Awaitable[Any]]) -> None:
        nonlocal asked
        asked += 1
        done.append(await act())

    with anyio.fail_after(WAIT):
        async with anyio.create_task_group() as group:
            for act in acts:
                group.start_soon(one, act)
            while asked < len(acts):
                await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            then()
    return done


def verbs(saver: PersistencySaver, store: PersistencyGraphStore) -> dict[str, Callable[[int], Awaitable[Any]]]:
    """Return what a task does, by its name; some of them twice, for they go two ways."""

    async def first(walk: Any) -> Any:
        return await anext(walk)

    def checkpoint(at: int) -> Any:
        return checkpoint_of("2", {"a": [TEXT, at]}, {"a": "2"}), metadata_of(), {"a": "2"}

    return {
        "aput": lambda at: saver.aput(config_of(f"{at}", "1"), *checkpoint(at)),
        "aput of a new thread": lambda at: saver.aput(config_of(f"new {at}"), *checkpoint(at)),
        "aput_writes": lambda at: saver.aput_writes(config_of(f"{at}", "1"), [("a", TEXT)], "task"),
        "aget_tuple": lambda at: saver.aget_tuple(config_of(f"{at}")),
        "aget_tuple of none": lambda at: saver.aget_tuple(config_of(f"none {at}")),
        "alist": lambda at: first(saver.alist(config_of(f"{at}"))),
        "history": lambda at: saver.aget_delta_channel_history(config=config_of(f"{at}"), channels=["a"]),
        "copy": lambda at: saver.acopy_thread(f"{at}", f"copy {at}"),
        "prune": lambda at: saver.aprune([f"{at}"]),
        "delete": lambda at: saver.adelete_thread(f"{at}"),
        "runs": lambda at: saver.adelete_for_runs([f"{at}"]),
        "store.aput": lambda at: store.aput(("a",), f"{at}", {"text": TEXT}),
        "store.asearch": lambda at: store.asearch((f"{at}",)),
    }


VERBS = list(verbs(None, None))  # type: ignore[arg-type]  # only their names


@pytest.mark.parametrize("verb", VERBS)
def test_in_a_loop_a_full_mailbox_is_waited_for(verb: str, tmp_path: Path, in_loop: InLoop) -> None:
    """More tasks than a mailbox takes, all at once, beside a job that does something else: each gets its answer."""
    with Persistency(tmp_path) as p:
        job = p.open_job("graphs", **SMALL)
        saver, store = PersistencySaver(job), PersistencyGraphStore(job)
        for at in range(TASKS):
            put(saver, f"{at}", "1", {"a": [TEXT]})
        act = verbs(saver, store)[verb]
        failed = job.statistics().failed

        async def everything() -> None:
            with busy(job) as release:
                acts = [partial(act, at) for at in range(TASKS)]
                assert len(await all_at_once(acts, release)) == TASKS

        in_loop(everything)
        assert job.statistics().failed == failed
        if verb == "aput":
            for at in range(TASKS):
                one = saver.get_tuple(config_of(f"{at}"))
                assert one is not None
                assert one.checkpoint["channel_values"] == {"a": [TEXT, at]}
        if verb == "store.aput":
            assert len(store.search(("a",), limit=TASKS)) == TASKS


def test_what_is_larger_than_the_mailbox_waits_behind_the_others(tmp_path: Path, in_loop: InLoop) -> None:
    """A state beyond all bounds is put among small ones."""
    with Persistency(tmp_path) as p:
        job = p.open_job("graphs", **SMALL)
        saver = PersistencySaver(job)
        for at in range(TASKS):
            put(saver, f"{at}", "1")

        def act(at: int) -> Awaitable[Any]:
            checkpoint = checkpoint_of("2", {"a": TEXT * (20 if at % 7 == 3 else 1)}, {"a": "2"})
            return saver.aput(config_of(f"{at}", "1"), checkpoint, metadata_of(), {"a": "2"})

        async def everything() -> None:
            with busy(job) as release:
                await all_at_once([partial(act, at) for at in range(TASKS)], release)

        in_loop(everything)
        assert ids(saver.list(None, limit=TASKS)) == ["2"] * TASKS


def test_a_thread_is_refused_as_its_job_was_opened_to_do(tmp_path: Path) -> None:
    """With `on_full="raise"` the sync verbs raise `Overloaded`, and nothing was done."""
    with Persistency(tmp_path) as p:
        job = p.open_job("graphs", on_full="raise", **SMALL)
        saver = PersistencySaver(job)
        with busy(job):
            for at in range(SMALL["mailbox_ops_max"]):
                job.put("other", (at,), b"")
            with pytest.raises(Overloaded):
                put(saver, "t", "1")
        assert saver.get_tuple(config_of("t")) is None


def test_who_waits_for_room_in_a_job_that_is_closed_is_told(tmp_path: Path, in_loop: InLoop) -> None:
    """Nobody waits forever: each either was done or raises `Closed`."""
    with Persistency(tmp_path) as p:
        job = p.open_job("graphs", **SMALL)
        saver = PersistencySaver(job)

        async def act(at: int) -> str:
            try:
                await saver.aput_writes(config_of(f"{at}", "1"), [("a", TEXT)], "task")
            except Closed:
                return "closed"
            return "done"

        async def everything() -> list[str]:
            with busy(job) as release:

                def close() -> None:
                    closing = threading.Thread(target=p.close_job, args=("graphs",))
                    closing.start()
                    threads.append(closing)
                    release()

                return await all_at_once([partial(act, at) for at in range(TASKS)], close)

        threads: list[threading.Thread] = []
        told = in_loop(everything)
        for one in threads:
            one.join(WAIT)
        assert len(told) == TASKS
        assert set(told) <= {"done", "closed"}


@pytest.mark.parametrize("form", ["threads", "loop"])
def test_on_a_baton_more_bytes_than_may_wait_are_waited_for(form: str, tmp_path: Path, in_loop: InLoop) -> None:
    """A baton keeps nobody waiting for room, in threads neither; the saver does."""
    large = "x" * 3_000_000
    with Persistency(tmp_path) as p, Baton(p, "graphs", keep=5.0) as baton:
        saver = PersistencySaver(baton)
        begun, released = threading.Event(), threading.Event()

        def wait(_tx: Transaction) -> None:
            begun.set()
            released.wait(WAIT)

        def act(at: int) -> None:
            put(saver, f"{at}", "1", {"a": large})

        async def aact(at: int) -> Any:
            return await saver.aput(config_of(f"{at}"), checkpoint_of("1", {"a": large}), metadata_of(), {"a": "1"})

        blocked = baton.run(wait)
        begun.wait(WAIT)
        if form == "loop":
            in_loop(lambda: all_at_once([partial(aact, at) for at in range(16)], released.set))
        else:
            threads = [threading.Thread(target=act, args=(at,), daemon=True) for at in range(16)]
            for one in threads:
                one.start()
            released.set()
            for one in threads:
                one.join(WAIT)
        blocked.result(WAIT)
        assert len(list(saver.list(None))) == 16


@pytest.mark.parametrize("after", range(1, 6))
def test_a_checkpoint_deleted_while_it_is_read_is_whole_or_not_there(after: int, tmp_path: Path) -> None:
    """Whatever it is that was read before another thread deletes it: never a checkpoint without its writes."""
    with Persistency(tmp_path) as p:
        job = p.open_job("graphs")
        saver = PersistencySaver(job)
        stored = put(saver, "t", "1", {"a": [TEXT], "b": 1})
        put(saver, "small", "1")
        saver.put_writes(stored, [("a", 1)], "task")
        saver.put_writes(config_of("small", "1"), [("a", 1)], "task")

        class Beside:
            """The job; after some reads somebody deletes the thread."""

            left = after

            def get(self, *asked: Any) -> Any:
                reply = job.get(*asked)
                self.left -= 1
                if self.left == 0:
                    saver.delete_thread("t")
                    saver.delete_thread("small")
                return reply

        assert saver._way.direct is not None
        direct: Any = saver._way.direct
        for thread, values in (("small", {}), ("t", {"a": [TEXT], "b": 1})):
            direct._job = Beside()
            one = saver.get_tuple(config_of(thread))
            direct._job = job
            if one is not None:
                assert one.pending_writes == [("task", "a", 1)]
                assert one.checkpoint["channel_values"] == values


def test_a_listing_asked_in_both_forms_at_once_says_so(tmp_path: Path, in_loop: InLoop) -> None:
    """`next` beside an `anext` that waits is `Misuse`, and the one that waits gets its checkpoint."""
    with Persistency(tmp_path) as p:
        job = p.open_job("graphs")
        saver = PersistencySaver(job)
        put(saver, "t", "1")
        put(saver, "t", "2")

        async def both() -> list[str]:
            listing = saver.alist(config_of("t"))

            def then() -> None:
                with pytest.raises(Misuse):
                    next(listing)
                release()

            with busy(job) as release:
                found = ids(await all_at_once([listing.__anext__], then))
            return found + ids([one async for one in listing])

        assert in_loop(both) == ["2", "1"]
