"""The ends of plugins: unloaded, closed with their host, at the interpreter's exit, in a forked child, forgotten."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from persistency import Closed, Misuse, Persistency, Reply

pytest.importorskip("wasmtime", reason="needs the extra plugins")

from persistency.plugins import KVGrant, Manifest, Plugin, PluginHost, PluginNotFound, PluginStatistics, crew, loading
from persistency.plugins import host as host_module
from persistency.plugins.services import host_function
from tests.crash.running import PROJECT
from tests.loops import InLoop, in_loop
from tests.plugins.deeds import DEEDS, KEEPER, WAIT, held, until

__all__ = ["in_loop"]


@pytest.fixture
def p(tmp_path: Path) -> Iterator[Persistency]:
    """Give a root on disk."""
    with Persistency(tmp_path / "data") as p:
        yield p


@pytest.fixture
def host(p: Persistency, compiled: Path) -> Iterator[PluginHost]:
    """Give a host where one call of a plugin runs at a time."""
    with PluginHost(p, cache_dir=compiled, calls_max=1, calls_wait=None) as host:
        yield host


@pytest.fixture
def keeper(host: PluginHost) -> Plugin:
    """Give a plugin whose calls a test can hold."""
    return host.load(Manifest("keeper", kvstore=KVGrant()), KEEPER).result(WAIT)


def get(plugin: Plugin) -> Reply[bytes]:
    """Call what waits for the store."""
    return plugin.call("get", b"key")


def threads() -> list[threading.Thread]:
    """Return the threads of hosts."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("persistency-plugins")]


# -- unloading --------------------------------------------------------------------------------------------------------


def test_unloading_lets_calls_that_run_end_and_refuses_others(host: PluginHost, keeper: Plugin) -> None:
    """S0-90: those in line get `Closed`, new ones raise it, the one that runs gets its answer; then the job closes."""
    with held(keeper):
        running = get(keeper)
        until(keeper, lambda now: now.running == 1)
        waiting = get(keeper)
        until(keeper, lambda now: now.waiting == 1)
        gone = host.unload("keeper")
        with pytest.raises(Closed, match="plugin 'keeper' was unloaded"):
            get(keeper)
        assert isinstance(waiting.exception(WAIT), Closed)
        assert keeper.closed
        assert "keeper" not in host
        assert not gone.done()
        assert host.persistency.has_job("plugins/keeper")
    assert running.result(WAIT) == b""
    gone.result(WAIT)
    assert not host.persistency.has_job("plugins/keeper")
    assert keeper.statistics().withdrawn == 1
    assert repr(keeper) == "<Plugin 'keeper' (closed)>"


def test_unloading_again_is_fine(host: PluginHost, keeper: Plugin) -> None:
    """By the handle; an id that nobody knows is told."""
    with held(keeper):
        running = get(keeper)
        until(keeper, lambda now: now.running == 1)
        replies = [keeper.unload(), host.unload(keeper), host.unload("keeper")]
    for reply in (running, *replies, keeper.unload()):
        reply.result(WAIT)
    with pytest.raises(PluginNotFound):
        host.unload("keeper")
    with pytest.raises(Misuse):
        host.unload(7)  # type: ignore[arg-type]  # what is tested


def test_an_old_handle_unloads_nothing_new(host: PluginHost, keeper: Plugin) -> None:
    """Its id may have been loaded again since."""
    keeper.unload().result(WAIT)
    new = host.load(Manifest("keeper", kvstore=KVGrant()), KEEPER).result(WAIT)
    assert new is not keeper
    keeper.unload().result(WAIT)
    assert not new.closed
    assert get(new).result(WAIT) == b""


def test_a_handle_of_another_host_is_refused(p: Persistency, host: PluginHost) -> None:
    """It isn't taken for one that was unloaded before, and neither plugin of that id is."""
    mine = host.load({"id": "d"}, DEEDS).result(WAIT)
    with PluginHost(p) as other:
        theirs = other.load({"id": "d"}, DEEDS).result(WAIT)
        with pytest.raises(Misuse, match="another host's"):
            host.unload(theirs)
        for plugin in (mine, theirs):
            assert plugin.call("echo", b"1").result(WAIT) == b"1"


def test_late_calls_are_refused_and_counted_once(host: PluginHost, keeper: Plugin) -> None:
    """Those in line are told once, and counted; those that come later are refused at the call, and aren't."""
    told: list[int] = []

    def late() -> None:
        for _ in range(5):
            with pytest.raises(Closed):
                get(keeper)

    with held(keeper):
        running = get(keeper)
        until(keeper, lambda now: now.running == 1)
        waiting = [get(keeper) for _ in range(20)]
        until(keeper, lambda now: now.waiting == 20)
        for number, reply in enumerate(waiting):
            reply.add_done_callback(lambda _, number=number: told.append(number))
        replies = [keeper.unload(), host.unload("keeper"), host.unload(keeper)]
        late()
        assert all(isinstance(reply.exception(WAIT), Closed) for reply in waiting)
        assert keeper.statistics() == PluginStatistics(calls=21, running=1, withdrawn=20)
    assert running.result(WAIT) == b""
    for reply in replies:
        reply.result(WAIT)
    late()
    assert keeper.statistics() == PluginStatistics(calls=21, answered=1, withdrawn=20)
    assert sorted(told) == list(range(20))


def test_a_call_on_its_way_to_the_line_when_that_is_shut_is_refused_and_counted_once(
    host: PluginHost, keeper: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was accepted, and no thread has looked at it yet."""
    run, late = host.crew.run, list[Any]()
    monkeypatch.setattr(host.crew, "run", late.append)
    reply = get(keeper)
    monkeypatch.undo()
    keeper.unload().result(WAIT)
    assert not reply.done()
    run(*late)
    assert isinstance(reply.exception(WAIT), Closed)
    assert keeper.statistics() == PluginStatistics(calls=1, withdrawn=1)


@pytest.mark.parametrize("end", ["unload", "close"])
def test_each_call_that_comes_at_the_end_is_answered_or_refused_once(p: Persistency, end: str) -> None:
    """Four threads call while the plugin goes: what has a reply is counted under what that says, and nothing else."""
    with PluginHost(p, calls_max=2, calls_wait=None) as host:
        plugin = host.load({"id": "d"}, DEEDS).result(WAIT)
        replies: list[Reply[bytes]] = []

        def on_and_on() -> None:
            with suppress(Closed):
                while True:
                    replies.append(plugin.call("echo", b"1"))
                    replies[-1].exception(WAIT)

        callers = [threading.Thread(target=on_and_on) for _ in range(4)]
        for thread in callers:
            thread.start()
        until(plugin, lambda now: now.answered > 20)
        host.unload("d").result(WAIT) if end == "unload" else host.close(WAIT)
        for thread in callers:
            thread.join()
        errors = [reply.exception(WAIT) for reply in replies]
        assert {type(error) for error in errors} <= {type(None), Closed}
        now = plugin.statistics()
        assert now == PluginStatistics(
            calls=len(replies), answered=errors.count(None), withdrawn=len(errors) - errors.count(None)
        )


def test_what_a_plugin_kept_is_there_again(host: PluginHost, keeper: Plugin) -> None:
    """Unloading closes a store, and removes nothing."""
    assert keeper.store is not None
    keeper.store.set("key", b"value").result(WAIT)
    keeper.unload().result(WAIT)
    assert get(host.load(Manifest("keeper", kvstore=KVGrant()), KEEPER).result(WAIT)).result(WAIT) == b"value"


def test_a_plugin_on_its_way_can_be_unloaded(host: PluginHost) -> None:
    """Then it comes, and goes."""
    reply = host.load({"id": "d"}, DEEDS)
    host.unload("d").result(WAIT)
    assert reply.result(WAIT).closed
    failed = host.load({"id": "d"}, b"(module")
    host.unload("d").result(WAIT)
    assert failed.exception(WAIT) is not None
    assert len(host) == 0


# -- closing ----------------------------------------------------------------------------------------------------------


def test_closing_waits_for_what_is_on_its_way(p: Persistency) -> None:
    """S1-52: calls that are begun end as they would have, loads too unless they still compile; others are refused."""
    host = PluginHost(p)
    plugin = host.load(Manifest("keeper", kvstore=KVGrant()), KEEPER).result(WAIT)
    late = host.load({"id": "late"}, DEEDS)
    with held(plugin):
        reply = get(plugin)
        until(plugin, lambda now: now.running == 1)
        with pytest.raises(TimeoutError, match=r"still closing after 0\.02 s: 'keeper'"):
            host.close(timeout=0.02)
        with pytest.raises(Closed):
            get(plugin)
        with pytest.raises(Closed):
            host.load({"id": "more"}, DEEDS)
        assert host.closed
    host.close(WAIT)
    host.close()
    assert reply.result(WAIT) == b""
    assert isinstance(late.exception(WAIT), Closed) or late.result(WAIT).closed
    assert not p.has_job("plugins/keeper")
    assert p.open_job("ours").id == "ours"


def test_closing_in_an_event_loop(p: Persistency, in_loop: InLoop) -> None:
    """`aclose` and `async with`; a second one is nothing."""

    async def everything() -> None:
        async with PluginHost(p) as host:
            await host.load({"id": "d"}, DEEDS)
        await host.aclose()
        assert host.closed

    in_loop(everything)


def test_closing_ends_all_threads(p: Persistency) -> None:
    """None of the host's is left, whatever it did before."""
    before = threads()
    with PluginHost(p, calls_max=8) as host:
        plugin = host.load(Manifest("keeper", kvstore=KVGrant()), KEEPER).result(WAIT)
        with held(plugin):
            replies = [get(plugin) for _ in range(20)]
            until(plugin, lambda now: now.running == 8)
        assert [reply.result(WAIT) for reply in replies] == [b""] * 20
        mine = set(threads()) - set(before)
        assert len(mine) >= 8
    for thread in mine:
        thread.join(WAIT)
        assert not thread.is_alive()


def test_closing_while_many_load(p: Persistency) -> None:
    """Each load is loaded and unloaded again, or refused: none is forgotten."""
    with PluginHost(p) as host:
        replies = [host.load({"id": f"p{number}"}, DEEDS + b" " * number) for number in range(30)]
    for reply in replies:
        error = reply.exception(WAIT)
        assert isinstance(error, Closed) or reply.result(WAIT).closed


def test_closing_from_inside_of_a_call_is_refused(p: Persistency, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would wait for itself."""
    found: list[BaseException] = []

    def close(*_: Any) -> int:
        try:
            host.close()
        except Misuse as error:
            found.append(error)
        return 0

    fail = next(function for function in loading.everybody() if function.name == "fail")
    monkeypatch.setattr(loading, "everybody", lambda: [host_function("last_error", close), fail])
    code = b"""(module (import "persistency" "last_error" (func $ask (param i32 i32) (result i64)))
      (memory (export "memory") 1) (func (export "alloc") (param i32) (result i32) (i32.const 8))
      (func (export "run") (param i32 i32) (result i64) (call $ask (i32.const 0) (i32.const 0))))"""
    with PluginHost(p) as host:
        assert host.load({"id": "own"}, code).result(WAIT).call("run").result(WAIT) == b""
        assert "inside of a call" in str(found[0])
    closed_there: list[bool] = []
    other = PluginHost(p)
    reply = other.load({"id": "own"}, DEEDS).result(WAIT).call("echo")
    done = threading.Event()

    def close_other(_: object) -> None:  # a callback isn't inside of a call any more
        other.close(WAIT)
        closed_there.append(other.closed)
        done.set()

    reply.add_done_callback(close_other)
    assert done.wait(WAIT)
    assert closed_there == [True]


def test_a_host_that_is_forgotten_warns_and_goes(tmp_path: Path) -> None:
    """It isn't kept alive by its threads or its plugins; like an open file, it says that it wasn't closed."""
    with Persistency(tmp_path) as p:
        host = PluginHost(p)
        host.load({"id": "d"}, DEEDS).result(WAIT).call("echo").result(WAIT)
        gone = weakref.ref(host)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            del host
            while gone() is not None:
                gc.collect()
        assert [str(one.message) for one in caught if one.category is ResourceWarning] == [
            f"unclosed <PluginHost of {p!r}>"
        ]


def test_hosts_cannot_be_copied_or_sent(host: PluginHost) -> None:
    """What is tied to threads and native code stays where it is."""
    import pickle

    with pytest.raises(Misuse):
        pickle.dumps(host)


@pytest.mark.parametrize("when", ["before", "after"])
def test_threads_have_stack_enough(p: Persistency, when: str) -> None:
    """A service that makes its threads' stacks small, sooner or later, doesn't make guests crash; its setting stays."""
    others = set(threads())  # of hosts that other tests left: they may never end
    before = threading.stack_size(256 * 1024 if when == "before" else 0)
    try:
        with PluginHost(p) as host:
            threading.stack_size(256 * 1024)
            plugin = host.load({"id": "d"}, DEEDS).result(WAIT)
            assert plugin.call("deep").exception(WAIT).reason == "stack_overflow"  # type: ignore[union-attr]  # it fails
            mine = set(threads()) - others
        assert mine
        for thread in mine:
            thread.join(WAIT)
            assert not thread.is_alive()
        assert threading.stack_size() == 256 * 1024
    finally:
        threading.stack_size(before)


def test_a_stack_size_that_is_set_while_a_thread_starts_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one for the whole process: what another thread says in the middle of that isn't undone."""
    start = threading.Thread.start
    before = threading.stack_size(256 * 1024)

    def setting(thread: threading.Thread) -> None:
        threading.stack_size(512 * 1024)
        start(thread)

    try:
        monkeypatch.setattr(threading.Thread, "start", setting)
        done, own = threading.Event(), crew.Crew("a crew of a test")
        own.run(crew.Do(done.set))
        monkeypatch.undo()
        assert done.wait(WAIT)
        own.end()
        assert threading.stack_size(256 * 1024) == 512 * 1024
    finally:
        threading.stack_size(before)


# -- processes of their own -------------------------------------------------------------------------------------------

HEAD = """
import atexit, os, sys, threading
from persistency import Closed, Forked, Persistency
from persistency.plugins import *
from tests.plugins.deeds import *
p = Persistency(sys.argv[1])
host = PluginHost(p, call_timeout=600, calls_max=4)
plugin = host.load(Manifest("deeds", kvstore=KVGrant()), DEEDS).result(WAIT)
def busy(*names):
    replies = [plugin.call(name) for name in names]
    until(plugin, lambda now: now.running == len(names))
    for reply in replies:
        reply.add_done_callback(lambda reply: reply.exception())
    return replies
"""

ENDS = {
    "in a loop": ("busy('spin')", 0),
    "in four loops": ("replies = busy('spin', 'ask', 'ask', 'spin')", 0),
    "with all handles dropped": ("busy('ask'); del plugin, host, p", 0),
    "by sys.exit": ("busy('ask'); sys.exit(3)", 3),
    "by an exception": ("busy('ask'); raise LookupError", 1),
    "by sys.exit in a thread": (
        "thread = threading.Thread(target=lambda: (busy('spin'), sys.exit(5))); thread.start(); thread.join()",
        0,
    ),
    "with a closed root": ("busy('ask'); p.close()", 0),
    "with calls in line": ("busy('ask', 'ask', 'ask', 'ask'); more = [plugin.call('echo') for _ in range(100)]", 0),
    "with threads that call": (
        """
def on_and_on(name):
    while True:
        try:
            plugin.call(name).exception()
        except Closed:
            return
for name in ('echo', 'trap', 'size', 'says', 'ask'):
    threading.Thread(target=on_and_on, args=(name,), daemon=True).start()
until(plugin, lambda now: now.calls > 50)
""",
        0,
    ),
    "in a load": ("replies = [host.load({'id': f'p{n}'}, DEEDS + b' ' * n) for n in range(40)]", 0),
    "with hooks that come later": (
        """
def refused():
    for act in (lambda: plugin.call('echo'), lambda: host.load({'id': 'x'}, DEEDS)):
        try:
            act()
        except Closed:
            print('closed')
    host.close(WAIT)
from persistency.plugins import host as module
atexit.unregister(module._at_exit)
atexit.register(refused)
atexit.register(module._at_exit)
busy('ask', 'spin')
""",
        0,
    ),
}


def run(program: str, root: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own. A hang is a failure."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", HEAD + program, str(root)],
        cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    print(done.stdout, done.stderr)
    return done


@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_with_guests_at_work(end: str, tmp_path: Path) -> None:
    """Neither a guest in an endless loop nor anything else that is on its way keeps it, or has it abort."""
    program, code = ENDS[end]
    done = run(program, tmp_path)
    assert done.returncode == code
    assert "Fatal" not in done.stderr
    assert "panicked" not in done.stderr
    assert end != "with hooks that come later" or done.stdout == "closed\nclosed\n"


def test_a_host_that_is_made_at_the_very_end_is_refused(tmp_path: Path) -> None:
    """Nobody would stop its guests any more; one that is found in the middle of being made isn't missed either."""
    program = """
def late():
    try:
        PluginHost(p)
    except Closed:
        print('closed')
from persistency.plugins import host as module
atexit.unregister(module._at_exit)
atexit.register(late)
atexit.register(module._at_exit)
"""
    done = run(program, tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")


def test_an_interrupt_of_the_end_ends_only_its_first_attempt(tmp_path: Path) -> None:
    """Guests are stopped by the second one."""
    program = """
from persistency.plugins import host as module
stop, calls = module.PluginHost._stop, []
def interrupted(host):
    calls.append(host)
    if len(calls) == 1:
        raise KeyboardInterrupt
    stop(host)
    print('stopped')
module.PluginHost._stop = interrupted
busy('spin', 'ask')
"""
    done = run(program, tmp_path)
    assert done.stdout == "stopped\n"
    assert "Fatal" not in done.stderr


def test_a_host_made_while_others_are_found_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The set they are in changes then; the hooks at the process's end and at a fork ask again."""

    class Growing(list[int]):
        tries = 0

        def __iter__(self) -> Iterator[int]:
            self.tries += 1
            if self.tries == 1:
                raise RuntimeError("Set changed size during iteration")
            return super().__iter__()

    monkeypatch.setattr(host_module, "_hosts", Growing([1, 2]))
    assert host_module._all_hosts() == [1, 2]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
def test_a_small_limit_on_stacks_does_not_make_guests_crash(tmp_path: Path) -> None:
    """`ulimit -s 256`: that is then what a thread gets that says nothing, and a guest alone may take as much."""
    program = """
print(plugin.call("deep").exception(WAIT).reason)
"""
    limited = (
        "import os, resource, sys; resource.setrlimit(resource.RLIMIT_STACK, (256 * 1024,) * 2);"
        "os.execv(sys.executable, [sys.executable, '-c', *sys.argv[1:]])"
    )
    done = subprocess.run(
        [sys.executable, "-c", limited, HEAD + program, str(tmp_path)],
        cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    print(done.stderr)
    assert (done.returncode, done.stdout) == (0, "stack_overflow\n")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_frees_nothing_of_its_parents(tmp_path: Path) -> None:
    """Wasmtime takes a lock for that, which another thread may have had: neither when all is dropped nor at the end."""
    program = """
import gc, warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
import wasmtime
closed = PluginHost(p)
unloaded = closed.load({"id": "other"}, DEEDS).result(WAIT)
closed.close()
dropped = PluginHost(p).load({"id": "dropped"}, DEEDS).result(WAIT)
replies = busy("ask", "spin")
sys.stdout.flush()
pid = os.fork()
if pid == 0:
    def freed(self, pointer, write=os.write):
        write(1, b"freed ")
        write(1, type(self).__name__.encode())
    for kind in (wasmtime.Engine, wasmtime.Module, wasmtime.Store, wasmtime.Linker, wasmtime._instance_pre.InstancePre):
        assert "_delete" in vars(kind)
        kind._delete = freed
    del host, plugin, replies, closed, unloaded, dropped, p
    gc.collect()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
print("end")
"""
    done = run(program, tmp_path / "data")
    assert (done.returncode, done.stdout) == (0, "end\n")


@pytest.mark.parametrize("at", ["idle", "busy"])
def test_a_forked_child_is_refused_and_has_hosts_of_its_own(at: str, tmp_path: Path) -> None:
    """Every verb of the parent's raises `Forked`; the parent's calls go on; the child's own host works, and it ends."""
    program = f"""
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads
at = {at!r}
replies = busy("ask", "spin") if at == "busy" else []
sys.stdout.flush()
pid = os.fork()
if pid == 0:
    for name, act in (
        ("call", lambda: plugin.call("echo")), ("load", lambda: host.load({{"id": "x"}}, DEEDS)),
        ("unload", lambda: host.unload("deeds")), ("unload", plugin.unload), ("ready", lambda: host.ready("deeds")),
        ("plugin", lambda: host.plugin("deeds")), ("plugins", host.plugins), ("len", lambda: len(host)),
        ("close", host.close), *((f"reply {{n}}", reply.result) for n, reply in enumerate(replies)),
    ):
        try:
            act()
        except Forked:
            continue
        print("not refused:", name, flush=True)
    with Persistency(sys.argv[1] + "-child") as mine, PluginHost(mine) as own:
        again = own.load(Manifest("deeds", kvstore=KVGrant()), DEEDS).result(WAIT)
        assert again.call("echo", b"child").result(WAIT) == b"child"
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
assert plugin.call("echo", b"parent").result(WAIT) == b"parent"
assert not any(reply.done() for reply in replies)
print("end")
"""
    done = run(program, tmp_path / "data")
    assert (done.returncode, done.stdout) == (0, "end\n")


def test_the_core_does_not_need_the_extra(tmp_path: Path) -> None:
    """Without wasmtime the package imports as ever, and `persistency.plugins` says which extra is missing."""
    program = """
import sys
sys.modules["wasmtime"] = None
import persistency
assert not [name for name in sys.modules if name.startswith("persistency.plugins")]
try:
    import persistency.plugins
except ModuleNotFoundError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "persistency.plugins needs the extra 'plugins': pip install 'persistency[plugins]'\n"
