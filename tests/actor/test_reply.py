"""Replies: waiting in threads and loops, settling, cancelling, mapping, being dropped."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import itertools
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fakes import WAIT, Actor

from persistency.actor import reply as reply_module
from persistency.actor.reply import Reply
from persistency.actor.settling import cancel, new_reply, pending, ready, settle_all, tell_if_unseen
from persistency.errors import Misuse
from tests.loops import LOOPS, GivenUp, InLoop, Task, bounded, in_thread, together, turns


class Line:
    """A line that gives up what it is asked for, and belongs to nobody's thread."""

    abandoned: BaseException | None = None

    withdrawn = 0

    def withdraw(self, reply: Reply[Any]) -> bool:
        """Settle the reply as cancelled."""
        self.withdrawn += 1
        cancel(reply)
        return True

    def waits_for_itself(self) -> bool:
        """Never."""
        return False


def asked(*, reads: bool = True) -> Reply[Any]:
    """Return a pending reply."""
    return pending(Line(), reads=reads)


def settle_soon(reply: Reply[Any], value: Any = None, error: BaseException | None = None) -> threading.Thread:
    """Settle a reply from another thread, once somebody waits for it."""

    def run() -> None:
        while not reply._wanted():
            pass
        settle_all([(reply, value, error)])

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_a_reply_costs_nothing_until_somebody_waits() -> None:
    """No lock, no condition, no list is made for a reply that is ready, or that nobody waits for."""
    settled = ready(5)
    assert settled.result() == 5
    lonely = asked()
    settle_all([(lonely, 6, None)])
    assert lonely.result() == 6
    for reply in (settled, lonely):
        assert reply._made_condition is None
        assert reply._callbacks is None
        assert reply._loops is None


def test_result_and_exception_in_threads() -> None:
    """A thread that waits gets the answer, or the error itself."""
    good, bad = asked(), asked()
    settle_soon(good, "answer")
    assert good.result(WAIT) == "answer"
    assert good.exception() is None
    error = ValueError("no")
    settle_soon(bad, error=error)
    with pytest.raises(ValueError, match="no"):
        bad.result(WAIT)
    assert bad.exception() is error


def test_a_timeout_says_that_the_request_goes_on() -> None:
    """Giving up waiting is a TimeoutError and changes nothing about the request."""
    reply = asked(reads=False)
    with pytest.raises(TimeoutError, match="the request goes on"):
        reply.result(0)
    settle_all([(reply, 1, None)])
    assert reply.result() == 1


def test_wait_and_as_completed_take_replies() -> None:
    """`concurrent.futures.wait` and `as_completed` work, with ready, mapped and pending ones together."""
    replies = [asked() for _ in range(20)]
    settle_all([(replies[3], 3, None)])
    mixed: list[Reply[Any]] = [*replies, *(reply.map(lambda value: -value) for reply in replies[:5]), ready("now")]
    order = list(range(20))
    random.shuffle(order)

    def settle() -> None:
        for number in order:
            settle_all([(replies[number], number, None)])

    thread = threading.Thread(target=settle)
    waiter: list[Any] = []
    other = threading.Thread(target=lambda: waiter.append(concurrent.futures.wait(mixed, WAIT)))
    other.start()
    thread.start()
    completed = {id(reply) for reply in concurrent.futures.as_completed(mixed, WAIT)}
    thread.join(WAIT)
    other.join(WAIT)
    assert completed == {id(reply) for reply in mixed}
    assert waiter[0].done == set(mixed)
    assert not waiter[0].not_done
    assert [reply.result() for reply in mixed] == [*range(20), 0, -1, -2, -3, -4, "now"]


def test_wait_for_the_first_of_many_under_a_storm() -> None:
    """`wait` never counts a reply twice, however settling and installing its waiters interleave."""
    for _ in range(300):
        replies = [asked() for _ in range(4)]
        thread = threading.Thread(target=lambda replies=replies: [settle_all([(r, 0, None)]) for r in replies])
        thread.start()
        done, rest = concurrent.futures.wait(replies, WAIT)
        assert (len(done), len(rest)) == (4, 0)
        thread.join(WAIT)


def test_await_from_several_loops_in_several_threads() -> None:
    """One reply may be awaited by many tasks, in any loop of any thread."""
    reply = asked(reads=False)
    results: list[int] = []
    waiting = threading.Barrier(4)

    async def waits() -> int:
        return await reply

    async def several() -> list[int]:
        async with anyio.create_task_group() as group:
            tasks = [Task(group, waits) for _ in range(3)]
            await turns()
            assert all(task.begun for task in tasks)
            await in_thread(waiting.wait, WAIT)
            return [await task for task in tasks]

    runs = LOOPS.values()
    threads = [threading.Thread(target=lambda run=run: results.extend(run(several))) for run in runs]  # type: ignore[misc]
    for thread in threads:
        thread.start()
    waiting.wait(WAIT)
    settle_all([(reply, 7, None)])
    for thread in threads:
        thread.join(WAIT)
    assert results == [7] * 9


def test_a_group_wakes_each_loop_once() -> None:
    """One group of replies is one call_soon_threadsafe per event loop, however many tasks wait (trio's: test_loops)."""
    replies = [asked() for _ in range(50)]
    wakeups = 0

    async def waits(reply: Reply[Any]) -> Any:
        return await reply

    async def main() -> list[Any]:
        nonlocal wakeups
        loop = asyncio.get_running_loop()
        original = loop.call_soon_threadsafe

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal wakeups
            wakeups += 1
            return original(*args, **kwargs)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        tasks = [asyncio.ensure_future(waits(reply)) for reply in replies]
        await asyncio.sleep(0)
        thread = threading.Thread(target=settle_all, args=([(r, at, None) for at, r in enumerate(replies)],))
        thread.start()
        found = await asyncio.gather(*tasks)
        thread.join(WAIT)
        return found

    assert asyncio.run(main()) == list(range(50))
    assert wakeups == 1


def test_wrap_future_and_wait_for() -> None:
    """`asyncio.wrap_future` and `wait_for` work; giving up a write leaves it alone, giving up a read cancels it."""

    async def main() -> None:
        reply = asked()
        settle_soon(reply, 8)
        assert await asyncio.wrap_future(reply) == 8
        write, read = asked(reads=False), asked()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(write, 0.001)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(read, 0.001)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.wrap_future(write), 0.001)
        assert not write.done()
        assert read.cancelled()
        settle_all([(write, 9, None)])
        assert await write == 9
        assert await ready(10).within(1) == 10
        with pytest.raises(TimeoutError):
            await asked(reads=False).within(0.001)

    asyncio.run(main())


def test_a_cancelled_task_withdraws_its_read_unless_others_want_it(in_loop: InLoop) -> None:
    """Promise 8: the last one to give up a read takes it out of the line; others aren't touched."""

    async def main() -> None:
        reply = asked()
        mapped = reply.map(str)

        async with anyio.create_task_group() as group:
            first, second = Task(group, reply), Task(group, mapped)
            await turns()
            first.cancel()
            await turns()
            assert first.cancelled
            assert not reply.cancelled()
            second.cancel()
            with pytest.raises(GivenUp):
                await second
        assert reply.cancelled()
        assert mapped.cancelled()
        assert mapped.done()

    in_loop(main)


def test_a_loop_that_was_closed_harms_nobody() -> None:
    """A reply that comes after its loop was closed settles the others all the same."""
    reply, other = asked(reads=False), asked(reads=False)
    loop = asyncio.new_event_loop()

    async def waits() -> None:
        await reply

    task = loop.create_task(waits())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    settle_all([(reply, 1, None), (other, 2, None)])
    assert reply.result() == 1
    assert other.result() == 2
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # it is meant to be left behind
    task.get_coro().close()  # type: ignore[union-attr]


def test_ready_replies_give_the_loop_a_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Awaiting answers that are ready at once gives the loop's other work a turn in each millisecond, and no more."""
    now = time.monotonic()  # later than any turn that was given in this thread
    monkeypatch.setattr("persistency.actor.reply.monotonic", lambda: now)
    monkeypatch.setattr("persistency.actor.loops.monotonic", lambda: now)

    async def main() -> list[float]:
        nonlocal now
        turns: list[float] = []
        busy = True

        async def other() -> None:
            while busy:
                turns.append(now)
                await asyncio.sleep(0)

        task = asyncio.ensure_future(other())
        for _ in range(1_000):
            now += 0.0001
            await ready(1)
        busy = False
        await task
        return turns

    turns = asyncio.run(main())
    assert 85 <= len(turns) <= 101  # of 100 milliseconds
    assert max(later - earlier for earlier, later in itertools.pairwise(turns)) < 0.0013


def test_callbacks_run_once_in_the_settling_thread_and_may_throw_anything() -> None:
    """A callback's exception, SystemExit included, reaches neither the settling thread nor the other callbacks."""
    reply = asked()
    seen: list[Any] = []

    def bad(_reply: object) -> None:
        raise SystemExit

    reply.add_done_callback(bad)
    reply.add_done_callback(lambda settled: seen.append((settled is reply, threading.get_ident())))
    thread = threading.Thread(target=settle_all, args=([(reply, 1, None)],))
    thread.start()
    thread.join(WAIT)
    assert seen == [(True, thread.ident)]
    reply.add_done_callback(lambda _settled: seen.append("at once"))
    assert seen[1:] == ["at once"]


def test_map_runs_once_in_the_thread_that_takes_the_result() -> None:
    """`map` is lazy, runs once, keeps what it raised, and passes on errors and cancellation of its source."""
    source = asked()
    ran: list[int] = []

    def doubled(value: int) -> int:
        ran.append(threading.get_ident())
        return value * 2

    mapped = source.map(doubled)
    again = mapped.map(lambda value: value + 1)
    settle_soon(source, 4)
    assert again.result(WAIT) == 9
    assert mapped.result() == 8
    assert ran == [threading.get_ident()]
    assert mapped.done()
    failing = ready("x").map(int)
    with pytest.raises(ValueError, match="invalid literal"):
        failing.result()
    assert isinstance(failing.exception(), ValueError)
    assert isinstance(ready(error=KeyError(1)).map(int).exception(), KeyError)
    cancelled = asked()
    mapped = cancelled.map(str)
    assert mapped.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        mapped.result()


def test_a_dropped_failure_is_told_once_and_a_seen_one_never() -> None:
    """Promise 3: a write request's failure nobody looked at is told when its reply is dropped."""
    told: list[BaseException] = []
    looks = [
        lambda reply: reply.exception(),
        lambda reply: pytest.raises(ValueError, reply.result),
        lambda reply: reply.map(str).exception(),
        lambda reply: None,
    ]
    for look in looks:
        reply = asked(reads=False)
        error = ValueError("unseen")
        tell_if_unseen(reply, error, told.append)
        settle_all([(reply, None, error)])
        look(reply)
        del reply
        gc.collect()
    assert len(told) == 1


def test_a_settled_reply_stays_as_it_is() -> None:
    """Settling twice, or cancelling what is settled, changes nothing."""
    reply = asked()
    settle_all([(reply, 1, None)])
    settle_all([(reply, 2, None)])
    assert reply.result() == 1
    assert not asked(reads=False).cancel()
    cancel(reply)
    assert not reply.cancelled()


def test_waiting_for_oneself_is_refused() -> None:
    """Promise 7: asking for a result in the thread that has to answer raises instead of waiting for ever."""
    with Actor() as actor:
        actor.hold()
        caught: list[BaseException | None] = []
        done = threading.Event()

        def asks(_reply: object) -> None:
            actor.put(b"in the way")
            try:
                actor.mailbox.get(b"c", b"1").result()
            except Misuse as error:
                caught.append(error)
            done.set()

        actor.mailbox.get(b"c", b"1").add_done_callback(asks)
        actor.let_go()
        assert done.wait(WAIT)
        assert len(caught) == 1


def test_awaiting_without_a_loop_is_refused() -> None:
    """A pending reply can only be awaited where a loop runs; the error says what to do instead."""
    with pytest.raises(Misuse, match=r"reply\.result\(\)"):
        asked().__await__().send(None)


def test_replies_do_not_keep_their_tracebacks_alive() -> None:
    """Raising a failure makes no cycle through the reply."""
    gc.collect()
    gc.disable()
    try:
        reply = ready(error=ValueError("no"))
        seen = weakref.ref(reply)
        for _ in range(3):
            with pytest.raises(ValueError, match="no"):
                reply.result()
        error = reply.exception()
        del reply
        assert error is not None
        error.__traceback__ = None
        assert seen() is None
    finally:
        gc.enable()


def test_a_storm_of_settling_cancelling_and_waiting_settles_everything(in_loop: InLoop) -> None:
    """Promise 7: every reply is settled, whoever waits for it how."""
    rng = random.Random(5)
    with Actor() as actor:

        async def one() -> None:
            reply = actor.mailbox.ask(reply_message(), reads=True)
            kind = rng.randrange(3)
            if kind == 0:
                await reply
            elif kind == 1:
                async with anyio.create_task_group() as group:
                    task = Task(group, reply.within(5))
                    await anyio.lowlevel.checkpoint()
                    task.cancel()
            else:
                reply.cancel()
            try:
                await bounded(lambda: reply)
            except concurrent.futures.CancelledError:
                assert reply.cancelled()
            assert reply.done()

        async def main() -> None:
            await together(*(one() for _ in range(500)))

        for _ in range(4):
            in_loop(main)


def reply_message() -> Any:
    """A read that any store answers."""
    from persistency.storage.port import LastVersion

    return LastVersion()


def test_the_running_loop_is_found_without_importing_asyncio() -> None:
    """Outside a loop there is none; inside, it is the running one."""
    assert reply_module.running_loop() is None

    async def main() -> bool:
        return reply_module.running_loop() is asyncio.get_running_loop()

    assert asyncio.run(main())
    assert new_reply().done() is False


def test_a_reply_mapped_while_its_source_is_settled_is_settled_too() -> None:
    """Promise 7: `map` at the very moment of settling gives a reply that `wait` and callbacks see settled."""
    source = asked()
    condition = source._condition  # as `concurrent.futures.wait` holds it
    seen: list[Any] = []
    with condition:
        thread = threading.Thread(target=settle_all, args=([(source, 4, None)],))
        thread.start()
        while source._result is None:
            pass
        mapped = source.map(lambda value: value + 1)
        mapped.add_done_callback(seen.append)
    thread.join(WAIT)
    assert concurrent.futures.wait([mapped], WAIT).not_done == set()
    assert seen == [mapped]
    assert mapped.result() == 5


@pytest.mark.parametrize(
    "use",
    [
        bool, len, list, lambda reply: reply[0], lambda reply: b"x" in reply, lambda reply: reply == b"x",
        lambda reply: reply != "x", lambda reply: reply == None, lambda reply: reply == [], aiter,  # noqa: E711
    ],
)  # fmt: skip
def test_a_reply_is_not_its_answer(use: Callable[[Any], object]) -> None:
    """Whoever forgets `result()`, or `await`, is told so, and gets no wrong answer."""
    with pytest.raises(Misuse, match=r"ask for reply\.result\(\), or await it"):
        use(ready(b"x"))


def test_replies_are_told_apart() -> None:
    """A reply equals itself alone, and may be in sets and dicts, whatever else is in there."""
    one, other = ready(1), ready(1)
    assert one == one
    assert one != other
    assert {one: 1, other: 2}[other] == 2
    assert one in [other, one]
    assert one != object()
