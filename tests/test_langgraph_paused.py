"""Paused listings: who walks over checkpoints and stops for as long as he likes keeps nobody waiting.

In LangGraph's own SQLite saver a paused `alist` holds the saver's lock, and all its writers wait (`langgraph#8558`).
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing
from pathlib import Path

import anyio
import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

from persistency.integrations.langgraph import PersistencySaver
from tests.langgraph_given import RUNNERS, checkpoint_of, config_of, ids, metadata_of, put, saver_on
from tests.loops import InLoop

CONVERSATIONS, BEFORE, DURING = 32, 20, 5
BIG = list(range(500))
WAIT = 60.0  # seconds until it is taken for certain that nobody comes on


async def converse(saver: BaseCheckpointSaver[str]) -> list[list[str]]:
    """Have 32 conversations each pause within a listing while all of them write and read; then finish the listings."""
    listed: list[list[str]] = [[] for _ in range(CONVERSATIONS)]
    paused = 0
    all_paused, all_done = anyio.Event(), anyio.Event()
    done = 0

    async def conversation(at: int) -> None:
        nonlocal paused, done
        thread = f"conversation-{at}"
        for step in range(BEFORE):
            await saver.aput(config_of(thread), checkpoint_of(f"{step:03}", {"a": BIG}), metadata_of(step), {"a": "1"})
        listing = saver.alist(config_of(thread))
        listed[at].append((await anext(listing)).checkpoint["id"])
        paused += 1
        if paused == CONVERSATIONS:
            all_paused.set()
        await all_paused.wait()
        for step in range(BEFORE, BEFORE + DURING):
            stored = await saver.aput(
                config_of(thread), checkpoint_of(f"{step:03}", {"a": BIG}), metadata_of(step), {"a": "1"}
            )
            await saver.aput_writes(stored, [("a", step)], "task")
            neighbour = await saver.aget_tuple(config_of(f"conversation-{(at + 1) % CONVERSATIONS}"))
            assert neighbour is not None
            assert neighbour.checkpoint["channel_values"] == {"a": BIG}
        done += 1
        if done == CONVERSATIONS:
            all_done.set()
        await all_done.wait()
        listed[at] += [one.checkpoint["id"] async for one in listing]

    async with anyio.create_task_group() as group:
        for at in range(CONVERSATIONS):
            group.start_soon(conversation, at)
    return listed


@pytest.mark.parametrize("runner", RUNNERS)
def test_32_paused_listings_keep_no_task_waiting(runner: str, tmp_path: Path, in_loop: InLoop) -> None:
    """Tasks of one loop: all write and read while all have a listing open, and each listing then goes on to its end."""
    with saver_on(runner, str(tmp_path)) as saver:

        async def bounded() -> list[list[str]]:
            with anyio.fail_after(WAIT):
                return await converse(saver)

        listed = in_loop(bounded)
        assert listed == [[f"{step:03}" for step in reversed(range(BEFORE))]] * CONVERSATIONS
        assert len(ids(saver.list(None))) == CONVERSATIONS * (BEFORE + DURING)


@pytest.mark.parametrize("runner", RUNNERS)
def test_32_paused_listings_keep_no_thread_waiting(runner: str, tmp_path: Path) -> None:
    """Threads of the system, with the synchronous verbs: the same."""
    with saver_on(runner, str(tmp_path)) as saver:
        all_paused, all_done = threading.Barrier(CONVERSATIONS), threading.Barrier(CONVERSATIONS)
        listed: dict[int, list[str]] = {}

        def conversation(at: int) -> None:
            thread = f"conversation-{at}"
            for step in range(BEFORE):
                put(saver, thread, f"{step:03}", {"a": BIG})
            with closing(saver.list(config_of(thread))) as listing:
                first = next(listing)
                all_paused.wait(WAIT)
                for step in range(BEFORE, BEFORE + DURING):
                    saver.put_writes(put(saver, thread, f"{step:03}", {"a": BIG}), [("a", step)], "task")
                    assert saver.get_tuple(config_of(f"conversation-{(at + 1) % CONVERSATIONS}")) is not None
                all_done.wait(WAIT)
                listed[at] = [first.checkpoint["id"], *ids(listing)]

        threads = [threading.Thread(target=conversation, args=(at,), daemon=True) for at in range(CONVERSATIONS)]
        for one in threads:
            one.start()
        for one in threads:
            one.join(WAIT)
        newest = [f"{step:03}" for step in reversed(range(BEFORE))]
        assert [listed.get(at) for at in range(CONVERSATIONS)] == [newest] * CONVERSATIONS


def test_listings_in_a_loop_and_in_threads_stop_neither(tmp_path: Path) -> None:
    """With 32 listings paused in threads a loop converses as well."""
    with saver_on("job", str(tmp_path)) as saver:
        for step in range(BEFORE):
            put(saver, "other", f"{step:03}", {"a": BIG})
        paused = [saver.list(config_of("other")) for _ in range(CONVERSATIONS)]
        assert {one.checkpoint["id"] for one in map(next, paused)} == {f"{BEFORE - 1:03}"}
        assert len(asyncio.run(asyncio.wait_for(converse(saver), WAIT))) == CONVERSATIONS
        assert [len(list(listing)) for listing in paused] == [BEFORE - 1] * CONVERSATIONS


def test_this_test_finds_a_saver_whose_listings_hold_a_lock(tmp_path: Path) -> None:
    """LangGraph's own asynchronous SQLite saver wouldn't come to an end: its writers wait for the paused listing."""

    async def theirs() -> None:
        async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "theirs.db")) as saver:
            for step in range(3):
                await saver.aput(config_of("t"), checkpoint_of(f"{step}"), metadata_of(step), {})
            listing = saver.alist(config_of("t"))
            await anext(listing)
            write = asyncio.ensure_future(saver.aput(config_of("u"), checkpoint_of("9"), metadata_of(), {}))
            for _ in range(50):
                await asyncio.sleep(0)
            assert saver.lock.locked()
            assert not write.done()
            await listing.aclose()  # type: ignore[attr-defined]  # an async generator
            await write

    asyncio.run(asyncio.wait_for(theirs(), WAIT))


def test_a_listing_asked_by_two_at_once_says_so(tmp_path: Path, in_loop: InLoop) -> None:
    """One listing is one walk: a second task that asks while the first one waits gets `Misuse`, and harms nobody."""
    with saver_on("baton", str(tmp_path)) as saver:
        put(saver, "t", "1")
        put(saver, "t", "2")
        wrong: list[ValueError] = []
        found: list[str] = []

        async def ask(listing: object) -> None:
            try:
                found.append((await anext(listing)).checkpoint["id"])  # type: ignore[call-overload]
            except ValueError as error:
                wrong.append(error)

        async def both() -> None:
            listing = PersistencySaver.alist(saver, config_of("t"))
            async with anyio.create_task_group() as group:
                group.start_soon(ask, listing)
                group.start_soon(ask, listing)
            found.extend([one.checkpoint["id"] async for one in listing])

        in_loop(both)
        assert found == ["2", "1"]
        assert len(wrong) == 1
