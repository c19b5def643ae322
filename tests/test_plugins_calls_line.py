"""Calls in line: so many at once, first come first served, given up in time, cancelled, asked for from anywhere."""

from __future__ import annotations

import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, as_completed
from functools import partial
from linecache import getline
from pathlib import Path
from types import FrameType
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistency import Persistency, Reply

pytest.importorskip("wasmtime", reason="needs the extra plugins")

from persistency.plugins import CallFailed, KVGrant, Manifest, Plugin, PluginBusy, PluginHost, PluginTimeout, crew, host
from persistency.plugins.line import Line
from persistency.plugins.plugin import PluginStatistics
from tests.loops import InLoop, in_loop
from tests.plugins.deeds import DEEDS, KEEPER, WAIT, held, until

__all__ = ["in_loop"]

SEED = random.SystemRandom().getrandbits(32)


@pytest.fixture
def plugins(compiled: Path) -> Iterator[Callable[..., Plugin]]:
    """Load a keeper, whose calls a test can hold, by a host with options of its own."""
    with Persistency(":memory:") as p:
        hosts: list[PluginHost] = []

        def load(**options: Any) -> Plugin:
            hosts.append(PluginHost(p, cache_dir=compiled, **options))
            return hosts[-1].load(Manifest(f"keeper{len(hosts)}", kvstore=KVGrant()), KEEPER).result(WAIT)

        yield load
        for each in hosts:
            each.close(WAIT)


def get(plugin: Plugin, timeout: float | None = None) -> Reply[bytes]:
    """Call what waits for the store."""
    return plugin.call("get", b"key", timeout=timeout)


# -- so many at once --------------------------------------------------------------------------------------------------


def test_only_so_many_run_at_once(plugins: Callable[..., Plugin]) -> None:
    """S1-31: of ten calls three run and seven wait, until one is through."""
    plugin = plugins(calls_max=3, calls_wait=None)
    with held(plugin):
        replies = [get(plugin) for _ in range(10)]
        until(plugin, lambda now: now.running == 3 and now.waiting == 7)
    assert [reply.result(WAIT) for reply in replies] == [b""] * 10
    assert plugin.statistics() == PluginStatistics(calls=10, answered=10)


@pytest.mark.parametrize("calls_max", [1, 2])
def test_first_come_first_served(
    plugins: Callable[..., Plugin], calls_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1-38: a call that ends lets the one in that came first of those that wait; nobody comes in between."""
    plugin = plugins(calls_max=calls_max, calls_wait=None)
    order: list[int] = []
    let_in: list[int] = []
    grant = Line._grant

    def grants(line: Line[Any, Any]) -> Any:
        following = grant(line)
        if following is not None:
            let_in.append(int(following._data))
        return following

    monkeypatch.setattr(Line, "_grant", grants)
    with held(plugin):
        first = [get(plugin) for _ in range(calls_max)]
        until(plugin, lambda now: now.running == calls_max)
        replies = []
        for number in range(50):
            replies.append(plugin.call("get", b"%d" % number))
            replies[-1].add_done_callback(lambda _, number=number: order.append(number))
    for reply in (*first, *replies):
        reply.result(WAIT)
    assert let_in == list(range(50))
    assert (order if calls_max == 1 else sorted(order)) == let_in  # of two that run at once one may tell much later


def test_a_plugin_that_is_busy_keeps_no_other_waiting(plugins: Callable[..., Plugin]) -> None:
    """Each plugin has a line of its own."""
    plugin, other = plugins(calls_max=1), plugins(calls_max=1)
    with held(plugin):
        reply = get(plugin)
        until(plugin, lambda now: now.running == 1)
        assert get(other).result(WAIT) == b""
        assert not reply.done()
    reply.result(WAIT)


def test_who_waits_too_long_is_told_so_and_never_begun(plugins: Callable[..., Plugin]) -> None:
    """S1-37: after `calls_wait` seconds a call fails as `PluginBusy`, which can be tried again."""
    plugin = plugins(calls_max=1, calls_wait=0.05)
    with held(plugin):
        first = get(plugin)
        until(plugin, lambda now: now.running == 1)
        late = [get(plugin), get(plugin)]
        for reply in late:
            error = reply.exception(WAIT)
            assert isinstance(error, PluginBusy)
            assert error.retryable
            assert "get wasn't begun within 0.05 s" in str(error)
        assert plugin.statistics() == PluginStatistics(calls=3, busy=2, running=1)
    assert first.result(WAIT) == b""
    assert get(plugin).result(WAIT) == b""
    assert plugin.statistics() == PluginStatistics(calls=4, busy=2, answered=2)


def test_a_deadline_that_passes_in_line_ends_the_wait(plugins: Callable[..., Plugin]) -> None:
    """A call's own time counts from the call, waiting included."""
    plugin = plugins(calls_max=1)
    with held(plugin):
        first = get(plugin)
        until(plugin, lambda now: now.running == 1)
        short, patient = get(plugin, timeout=0.03), get(plugin)
        assert isinstance(short.exception(WAIT), PluginBusy)
        assert plugin.statistics().waiting == 1
    assert [first.result(WAIT), patient.result(WAIT)] == [b"", b""]


def test_a_call_that_runs_too_long_in_its_store_is_stopped(plugins: Callable[..., Plugin]) -> None:
    """S1-50: waiting for the store ends with the call; then the guest is stopped, or answers that it got nothing."""
    plugin = plugins()
    with held(plugin):
        reply = get(plugin, timeout=0.05)
        error = reply.exception(WAIT)
    assert error is None or isinstance(error, PluginTimeout)
    assert get(plugin).result(WAIT) == b""


def test_the_numbers_add_up(plugins: Callable[..., Plugin]) -> None:
    """Whatever becomes of a call, it is counted once."""
    plugin = plugins(calls_max=2, calls_wait=0.2)
    chance = random.Random(SEED)
    print("seed", SEED)
    replies = []
    for _ in range(300):
        reply = plugin.call(chance.choice(["get", "nope"]), b"k", timeout=chance.choice([None, 0, 0.01, 1]))
        if chance.random() < 0.2:
            reply.cancel()
        replies.append(reply)
    for reply in as_completed(replies, WAIT):
        assert reply.cancelled() or isinstance(reply.exception(), CallFailed | None)
    now = until(plugin, lambda now: now.calls == 300 and not now.running)
    assert now.answered + now.failed + now.busy + now.withdrawn == 300
    assert now.withdrawn == sum(reply.cancelled() for reply in replies)


# -- cancelling -------------------------------------------------------------------------------------------------------


def test_cancelling_takes_a_call_out_of_the_line(plugins: Callable[..., Plugin]) -> None:
    """S1-39: one that waits is cancelled and never begun; one that runs isn't."""
    plugin = plugins(calls_max=1, calls_wait=None)
    with held(plugin):
        first = get(plugin)
        until(plugin, lambda now: now.running == 1)
        second, third = get(plugin), get(plugin)
        until(plugin, lambda now: now.waiting == 2)
        assert second.cancel()
        assert plugin.statistics() == PluginStatistics(calls=3, running=1, waiting=1, withdrawn=1)
        assert not first.cancel()
    assert [first.result(WAIT), third.result(WAIT)] == [b"", b""]
    with pytest.raises(CancelledError):
        second.result(WAIT)


def test_an_event_loop_that_gives_up_takes_its_call_out(plugins: Callable[..., Plugin], in_loop: InLoop) -> None:
    """Whatever loop it is: a wait that is cancelled leaves nothing in the line."""
    plugin = plugins(calls_max=1, calls_wait=None)

    async def give_up() -> None:
        with anyio.move_on_after(0.05):
            await get(plugin)

    with held(plugin):
        first = get(plugin)
        until(plugin, lambda now: now.running == 1)
        in_loop(give_up)
        assert until(plugin, lambda now: now.withdrawn == 1).waiting == 0
    assert first.result(WAIT) == b""


def test_calls_are_awaited_in_any_loop(plugins: Callable[..., Plugin], in_loop: InLoop) -> None:
    """Fifty tasks of one loop call and get their own answers."""
    plugin = plugins(calls_max=4, calls_wait=None)
    echo = plugin._owner.load({"id": "echo"}, DEEDS).result(WAIT)  # type: ignore[attr-defined]  # it is a host
    answers: dict[int, bytes] = {}

    async def one(number: int) -> None:
        answers[number] = await echo.call("echo", b"%d" % number)

    async def everybody() -> None:
        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(one, number)

    in_loop(everybody)
    assert answers == {number: b"%d" % number for number in range(50)}


# -- whose thread it is -----------------------------------------------------------------------------------------------


def test_a_callback_may_call_the_plugin_again_and_wait(plugins: Callable[..., Plugin]) -> None:
    """It runs on a thread of the crew's; what was to run there next is taken over by another."""
    plugin = plugins(calls_max=1, calls_wait=None)
    answers: list[bytes] = []
    done = threading.Event()

    def again(reply: Any) -> None:
        answers.append(get(plugin).result(WAIT))
        done.set()

    with held(plugin):
        first = get(plugin)
        first.add_done_callback(again)
        until(plugin, lambda now: now.running == 1)
        others = [get(plugin) for _ in range(5)]
        until(plugin, lambda now: now.waiting == 5)
    assert done.wait(WAIT)
    assert answers == [b""]
    assert [other.result(WAIT) for other in others] == [b""] * 5


def test_a_callback_that_raises_harms_nobody(plugins: Callable[..., Plugin], caplog: pytest.LogCaptureFixture) -> None:
    """What it throws is logged, and its thread goes on."""

    def throw(_reply: object) -> None:
        raise SystemExit(3)

    plugin = plugins(calls_max=1)
    for _ in range(3):
        reply = get(plugin)
        reply.add_done_callback(throw)
        assert reply.result(WAIT) == b""
    assert get(plugin).result(WAIT) == b""
    assert {record.levelname for record in caplog.records} <= {"ERROR"}


def test_many_calls_at_once_make_few_threads(plugins: Callable[..., Plugin]) -> None:
    """A burst of 1,000 calls of which two may run has threads for these, and one or two who look at the rest."""
    plugin = plugins(calls_max=2, calls_wait=None)
    replies = [get(plugin) for _ in range(1_000)]
    threads = [thread for thread in threading.enumerate() if thread.name == "persistency-plugins"]
    assert [reply.result(WAIT) for reply in replies] == [b""] * 1_000
    assert len(threads) <= 6, len(threads)


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="interrupts come in main threads")
def test_an_interrupt_while_waiting_leaves_everything_usable(plugins: Callable[..., Plugin]) -> None:
    """Ctrl-C ends the wait, and neither the call nor the plugin."""
    plugin = plugins(calls_max=1)
    main = threading.main_thread().ident
    assert main is not None
    seen = threading.Event()

    def once(*_: object) -> None:
        if not seen.is_set():
            seen.set()
            raise KeyboardInterrupt

    def type_it() -> None:  # again and again: one that comes right before the wait is noticed only after it
        while not seen.wait(0.01):
            signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, once)
    typing = threading.Thread(target=type_it)
    try:
        with held(plugin) as go_on:
            reply = get(plugin)
            until(plugin, lambda now: now.running == 1)
            with pytest.raises(KeyboardInterrupt):
                typing.start() or reply.result(WAIT)  # type: ignore[func-returns-value]  # the interrupt may come in both
            assert plugin.statistics().running == 1
            go_on()
            assert reply.result(WAIT) == b""
        assert get(plugin).result(WAIT) == b""
    finally:
        seen.set()
        typing.join(WAIT)
        signal.signal(signal.SIGINT, before)


class Interrupting:
    """Raises `KeyboardInterrupt` at the n-th line that this thread runs of some modules.

    Not at a `with`, which is run once more when its block is left, nor at a `try`: no signal comes in between there.
    """

    def __init__(self, modules: set[str], at: int) -> None:
        self.files = {sys.modules[name].__file__ for name in modules}
        self.left = at
        self.seen = 0

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code.co_filename not in self.files:
            return None
        if event == "line" and not getline(frame.f_code.co_filename, frame.f_lineno).lstrip().startswith(
            ("with ", "try:")
        ):
            self.seen += 1
            if self.seen == self.left:
                raise KeyboardInterrupt
        return self


INTERRUPTED = {"persistency.plugins.plugin", "persistency.plugins.crew", "persistency.plugins.host"}


def interrupted_everywhere(act: Callable[[], object], check: Callable[[], object]) -> int:
    """Do something again and again, each time interrupted one line later; return how many lines there were."""
    at = 0
    while True:
        at += 1
        interrupting = Interrupting(INTERRUPTED | {"persistency.plugins.errands"}, at)
        sys.settrace(interrupting)
        try:
            act()
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(None)
        check()
        if interrupting.seen < at:
            return at - 1


def test_an_interrupt_anywhere_in_a_call_leaves_everything_usable(plugins: Callable[..., Plugin]) -> None:
    """Line by line, with and without idle threads: the next call is answered, and no place is lost."""
    plugin = plugins(calls_max=1)

    def check() -> None:
        assert get(plugin).result(WAIT) == b""
        until(plugin, lambda now: not now.running and not now.waiting)

    assert interrupted_everywhere(lambda: get(plugin).result(WAIT), check) > 20
    crew_of = plugin._owner.crew

    def call_with_none_idle() -> None:
        crew_of._idle.clear()  # as if all of them were at work
        get(plugin).result(WAIT)

    assert interrupted_everywhere(call_with_none_idle, check) > 20


def test_an_interrupt_anywhere_in_a_load_leaves_everything_usable() -> None:
    """Line by line of `load` and `unload`: the next load is answered."""
    with Persistency(":memory:") as p, PluginHost(p) as own:

        def load() -> None:
            own.load({"id": "own"}, DEEDS).result(WAIT)
            own.unload("own").result(WAIT)

        def check() -> None:
            assert own.load({"id": "own"}, DEEDS).result(WAIT).call("echo", b"1").result(WAIT) == b"1"

        assert interrupted_everywhere(load, check) > 20


def test_without_threads_a_call_fails_and_the_next_one_does_not(
    plugins: Callable[..., Plugin], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no thread can be started, those that are there do it; where there is none, it is told at once."""
    plugin = plugins()
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == "persistency-plugins":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(crew, "_IDLE_S", 0.0)
    assert get(plugin).result(WAIT) == b""
    monkeypatch.setattr(threading.Thread, "start", refused)
    plugin._owner.crew.end()
    while plugin._owner.crew._threads:
        threading.Event().wait(0.001)
    error = get(plugin).exception(WAIT)
    assert isinstance(error, PluginBusy)
    assert isinstance(error.__cause__, RuntimeError)
    assert plugin.statistics() == PluginStatistics(calls=2, answered=1, busy=1)
    monkeypatch.undo()
    assert get(plugin).result(WAIT) == b""


# -- the line by itself -----------------------------------------------------------------------------------------------


class Somebody:
    """Somebody in a line."""

    def __init__(self, until: float) -> None:
        self.until = until
        self.granted: str | None = None


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.integers(1, 9)),
        st.tuples(st.sampled_from(["leave", "withdraw"]), st.integers(0, 9)),
        st.tuples(st.just("tick"), st.integers(1, 3)),
        st.tuples(st.sampled_from(["pause", "resume"]), st.just(0)),
    ),
    max_size=60,
)


@given(st.integers(1, 3), STEPS)
def test_a_line_serves_whoever_came_first(at_once: int, steps: list[tuple[str, int]]) -> None:
    """Against a plain model: who has a place, who waits and in which order, who waited too long, whether it adds up."""
    line: Line[Somebody, str] = Line(at_once, "place")
    inside: list[Somebody] = []
    waiting: list[Somebody] = []
    gone, now, paused = 0, 0, False

    def let_in() -> list[Somebody]:
        free = 0 if paused else max(0, at_once - len(inside))
        entering = waiting[:free]
        del waiting[:free]
        inside.extend(entering)
        return entering

    for step, number in steps:
        if step == "enter":
            somebody = Somebody(now + number)
            waiting.append(somebody)
            assert line.enter(somebody) == (somebody in let_in())
        elif step == "leave" and inside:
            inside.pop(number % len(inside))
            gone += 1
            assert [line.leave("gone")] == (let_in() or [None])
        elif step == "withdraw" and waiting:
            assert line.withdraw(waiting.pop(number % len(waiting)))
            gone += 1
        elif step == "tick":
            now += number
            late = [somebody for somebody in waiting if somebody.until <= now]
            waiting[:] = [somebody for somebody in waiting if somebody.until > now]
            assert line.overdue(now) == late
            gone += len(late)
        elif step in ("pause", "resume"):
            paused = step == "pause"
            line.pause() if paused else None
            assert paused or line.resume() == let_in()
        running, waits, counts = line.numbers()
        assert (running, waits, sum(counts.values())) == (len(inside), len(waiting), gone)
        assert {somebody.granted for somebody in inside} <= {"place"}
    empty: list[bool] = []
    line.when_empty(partial(empty.append, True))
    assert line.shut() == waiting
    assert line.enter(Somebody(now + 1)) is None
    for _ in inside:
        assert not empty
        line.leave("gone")
    assert empty == [True]


def test_the_bound_on_loads_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """S1-21: of many loads at once only so many are on their way; the others wait in the order they came."""
    with Persistency(":memory:") as p, PluginHost(p, compiles_max=1) as own:
        gate, begun = threading.Event(), []
        compile_it = own.compiler.compile

        def slow(wasm: bytes, *, fuel: bool) -> Any:
            begun.append(wasm)
            assert gate.wait(WAIT)
            return compile_it(wasm, fuel=fuel)

        monkeypatch.setattr(own.compiler, "compile", slow)
        codes = [DEEDS + b" " * number for number in range(8)]
        replies = [own.load({"id": f"p{number}"}, code) for number, code in enumerate(codes)]
        while len(begun) < 2:
            threading.Event().wait(0.001)
        assert own._loads.numbers()[0] == 2
        gate.set()
        assert [reply.result(WAIT).id for reply in replies] == [f"p{number}" for number in range(8)]
        assert sorted(begun) == sorted(codes)
        assert host.PluginHost is PluginHost
