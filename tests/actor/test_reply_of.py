"""Replies of plain futures: settled as those are, awaited in any loop, looked after when nobody looks."""

from __future__ import annotations

import concurrent.futures
import logging
import os
from concurrent.futures import CancelledError, Future
from typing import Any

import anyio
import pytest
from fakes import WAIT

from persistency import Forked, Misuse, Reply
from tests.loops import InLoop


def test_it_is_settled_as_the_future_is() -> None:
    """With its result, its exception, or as cancelled; whether it was done before or not."""
    early: Future[int] = Future()
    early.set_result(7)
    assert Reply.of(early).result(WAIT) == 7

    late: Future[int] = Future()
    reply = Reply.of(late)
    assert not reply.done()
    late.set_result(8)
    assert reply.done()
    assert reply.result() == 8

    failed: Future[int] = Future()
    reply = Reply.of(failed)
    failed.set_exception(KeyError("gone"))
    with pytest.raises(KeyError, match="gone"):
        reply.result(WAIT)

    ended: Future[int] = Future()
    reply = Reply.of(ended)
    assert ended.cancel()
    assert reply.cancelled()
    with pytest.raises(CancelledError):
        reply.result(WAIT)


def test_its_cancelling_is_the_future_s() -> None:
    """One that can still be cancelled is; one that runs isn't, and answers."""
    waits: Future[int] = Future()
    reply = Reply.of(waits)
    assert reply.cancel()
    assert waits.cancelled()
    assert reply.cancelled()

    runs: Future[int] = Future()
    runs.set_running_or_notify_cancel()
    reply = Reply.of(runs)
    assert not reply.cancel()
    runs.set_result(1)
    assert reply.result(WAIT) == 1


def test_it_is_what_a_reply_is() -> None:
    """It maps, calls back, is waited for by `concurrent.futures`, and gives up with `TimeoutError`."""
    future: Future[int] = Future()
    reply, told = Reply.of(future), []
    doubled = reply.map(lambda number: 2 * number)
    reply.add_done_callback(lambda one: told.append(one.result()))
    with pytest.raises(TimeoutError):
        reply.result(0)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        waiting = pool.submit(concurrent.futures.wait, [reply], WAIT)
        future.set_result(21)
        assert waiting.result(WAIT).done == {reply}
    assert doubled.result(WAIT) == 42
    assert told == [21]


def test_it_is_awaited_in_any_loop(in_loop: InLoop) -> None:
    """Settled from a thread, and given up: the last who gives up cancels the future, if that can be."""

    async def main() -> None:
        with concurrent.futures.ThreadPoolExecutor() as pool:
            assert await Reply.of(pool.submit(sum, (1, 2, 3))) == 6
            assert await Reply.of(pool.submit(sum, (1, 2, 3))).within(WAIT) == 6
            with pytest.raises(ZeroDivisionError):
                await Reply.of(pool.submit(divmod, 1, 0))
        never: Future[int] = Future()
        with pytest.raises(TimeoutError):
            await Reply.of(never).within(0)
        assert never.cancelled()
        unwanted: Future[int] = Future()
        with anyio.move_on_after(0) as scope:
            await Reply.of(unwanted)
        assert scope.cancelled_caught
        assert unwanted.cancelled()

    in_loop(main)


def test_a_failure_nobody_looked_at_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Promise 3: once, when the reply is dropped; never if somebody has looked."""
    caplog.set_level(logging.ERROR, "persistency")

    def fail(look: bool) -> None:
        future: Future[Any] = Future()
        reply = Reply.of(future)
        future.set_exception(OSError("no such thing"))
        if look:
            assert isinstance(reply.exception(WAIT), OSError)

    fail(look=True)
    assert not caplog.records
    fail(look=False)
    assert [record.__dict__["persistency_event"] for record in caplog.records] == ["reply_unseen"]
    assert "no such thing" in caplog.text


def test_a_forked_child_gets_forked() -> None:
    """Promise 7: whoever would answer isn't there in the child; nobody waits there for ever."""
    future: Future[int] = Future()
    reply = Reply.of(future)
    child = os.fork()
    if child == 0:
        try:
            reply.result(WAIT)
        except Forked:
            os._exit(0)
        except BaseException:
            os._exit(2)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    future.set_result(3)
    assert reply.result(WAIT) == 3


def test_what_is_no_future_is_misuse() -> None:
    """At the call, by its type."""
    wrong: Any = 7
    with pytest.raises(Misuse, match=r"concurrent\.futures\.Future, not int"):
        Reply.of(wrong)
