"""Time for calls: none ends early, none much later; nothing ticks while nobody calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistency import Persistency

pytest.importorskip("wasmtime", reason="needs the extra plugins")

from persistency.plugins import PluginHost, PluginTimeout, epochs
from persistency.plugins import plugin as plugins_plugin
from persistency.plugins.context import CallContext
from persistency.plugins.crew import Crew, Telling
from persistency.plugins.epochs import Epochs
from tests.plugins.deeds import DEEDS, WAIT

TICK = 0.01

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("pass"), st.floats(0, 0.05)),
        st.tuples(st.just("pass"), st.floats(0, 30)),
        st.tuples(st.just("enter"), st.floats(0, 0.2)),
        st.tuples(st.just("enter"), st.floats(0, 20)),
        st.tuples(st.sampled_from(["tick", "tick", "leave"]), st.just(0.0)),
    ),
    max_size=80,
)


@given(STEPS, st.floats(0, 1e6))
def test_no_call_ends_early_and_none_much_later(steps: list[tuple[str, float]], now: float) -> None:
    """However late the ticker's thread comes, after breaks of any length: the epoch that ends a call is never reached
    before its deadline, and is reached by the first tick that comes a tick after it.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epochs, "monotonic", lambda: now)
        count = 0

        def increment() -> None:
            nonlocal count
            count += 1

        ticker = Epochs(increment, lambda _: None, TICK)
        ticker._thread = threading.current_thread()  # no other: the steps say when it comes
        inside: list[tuple[float, int]] = []  # of each call its deadline, and the epoch at which it has to end
        for step, seconds in steps:
            if step == "pass":
                now += seconds
            elif step == "enter":
                ticks = ticker.enter(now + seconds)
                assert ticks >= 0
                inside.append((now + seconds, count + ticks))
            elif step == "leave" and inside:
                inside.pop()
                ticker.leave()
            elif step == "tick":
                wait = ticker._tick()
                ticker._thread = threading.current_thread()
                assert wait is None or 0 <= wait <= 10
                for deadline, end in inside:
                    assert count < end or now >= deadline, "a call ended early"
                    assert count >= end or now < deadline + TICK + 1e-6, "a call goes on"


@pytest.fixture
def host(compiled: Path) -> Iterator[PluginHost]:
    """Give a host."""
    with Persistency(":memory:") as p, PluginHost(p, cache_dir=compiled) as host:
        yield host


@pytest.mark.parametrize("timeout", [0.001, 0.01, 0.0333, 0.1])
def test_a_guest_has_all_the_time_it_was_given(host: PluginHost, timeout: float) -> None:
    """From the call to its timeout at least so much passes."""
    plugin = host.load({"id": "d"}, DEEDS).result(WAIT)
    for _ in range(5):
        begun = monotonic()
        error = plugin.call("spin", timeout=timeout).exception(WAIT)
        assert monotonic() - begun >= timeout
        assert isinstance(error, PluginTimeout)


def test_a_call_that_was_held_up_before_its_end_was_set_ends(host: PluginHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ticks that come between the moment its end is counted and the one at which the guest gets it put it off by as
    many: the ticker goes on for it, though nobody else calls.
    """
    plugin = host.load({"id": "d"}, DEEDS).result(WAIT)
    ticks, increment, call = threading.Semaphore(0), host.epochs._increment, plugins_plugin.call

    def counted() -> None:
        increment()
        ticks.release()

    def held_up(*arguments: Any) -> bytes:
        for _ in range(2):
            assert ticks.acquire(timeout=WAIT)
        return call(*arguments)

    monkeypatch.setattr(host.epochs, "_increment", counted)
    monkeypatch.setattr(plugins_plugin, "call", held_up)
    monkeypatch.setattr(CallContext, "remaining", lambda _: 1.0)  # or it would be found to be late before it's begun
    assert isinstance(plugin.call("spin", timeout=0.03).exception(WAIT), PluginTimeout)
    plugin.unload().result(WAIT)


def test_nothing_ticks_while_nobody_calls(host: PluginHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a while without calls the ticker sleeps, then its thread ends; the next call has time again."""
    monkeypatch.setattr(epochs, "_LINGER_S", 0.01)
    monkeypatch.setattr(epochs, "_KEPT_S", 0.01)
    plugin = host.load({"id": "d"}, DEEDS).result(WAIT)
    for _ in range(2):
        assert plugin.call("echo", b"1").result(WAIT) == b"1"
        thread = host.epochs._thread
        if thread is not None:
            thread.join(WAIT)
        assert host.epochs._thread is None
    assert isinstance(plugin.call("spin", timeout=0.02).exception(WAIT), PluginTimeout)


def test_a_tick_that_fails_is_logged_and_the_next_one_comes(caplog: pytest.LogCaptureFixture) -> None:
    """Guests would never be stopped again otherwise."""
    ticks = threading.Semaphore(0)

    def each_tick(_: float) -> None:
        ticks.release()
        raise LookupError("planted")

    ticker = Epochs(lambda: None, each_tick, 0.001)
    ticker.enter(monotonic() + WAIT)
    for _ in range(3):
        assert ticks.acquire(timeout=WAIT)
    ticker.leave()
    ticker.close()
    assert {record.message for record in caplog.records} == {"a tick for the plugins' calls failed"}


def test_interrupting_ends_every_call_and_every_later_one() -> None:
    """At the end of the process: as many increments as the longest of them still has, at once."""
    count = 0

    def increment() -> None:
        nonlocal count
        count += 1

    ticker = Epochs(increment, lambda _: None, 10.0)
    ticks = ticker.enter(monotonic() + 20_000)
    assert ticks > 1_900
    ticker.interrupt_all(WAIT)
    assert count >= ticks
    assert ticker.enter(monotonic() + 20_000) == 0
    ticker.leave()
    ticker.leave()
    ticker.close()


# -- the crew ---------------------------------------------------------------------------------------------------------


class Job:
    """A task made of functions."""

    def __init__(self, work: Callable[[], Any], tell: Telling | None = None, following: Any = None) -> None:
        self._work = work
        self._tell = tell
        self._following = following

    def begin(self) -> bool:
        return True

    def work(self) -> tuple[Telling | None, Any]:
        self._work()
        return self._tell, self._following

    def interrupt(self) -> bool:
        return False

    def late(self, _now: float) -> Telling | None:
        return None


def test_what_comes_next_is_taken_over_from_who_tells_for_long() -> None:
    """At a tick another thread takes it; a telling that takes no time keeps it on its own thread."""
    crew = Crew("a crew of a test")
    done, gate = threading.Event(), threading.Event()
    ran: list[str] = []

    def note() -> None:
        ran.append(threading.current_thread().name + str(threading.get_ident()))

    def last() -> None:
        note()
        done.set()

    crew.run(Job(note, lambda: None, Job(last)))
    assert done.wait(WAIT)
    assert len(set(ran)) == 1
    done.clear()
    ran.clear()
    crew.run(Job(note, lambda: gate.wait(WAIT) and None, Job(last)))
    while not done.wait(0.001):
        crew.tick(monotonic() + 1)
    gate.set()
    assert len(set(ran)) == 2
    crew.end()


def test_work_that_raises_is_logged_and_its_thread_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever it throws, what comes later is done."""

    def throw() -> None:
        raise SystemExit

    crew = Crew("a crew of a test")
    done = threading.Event()
    crew.run(Job(throw))
    crew.run(Job(lambda: None, throw, Job(done.set)))
    assert done.wait(WAIT)
    crew.end()
    assert {record.message for record in caplog.records} <= {
        "work for plugins failed",
        "telling of what a plugin did failed",
    }
    assert len(caplog.records) == 2
