"""Calls of plugins: what goes in, what comes out, and every way a guest can fail, told as what it is."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import random
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persistency import Misuse, Persistency

pytest.importorskip("wasmtime", reason="needs the extra plugins")

import wasmtime

from persistency.plugins import (
    BadAnswer,
    CallFailed,
    FunctionNotFound,
    FunctionNotImplemented,
    KVGrant,
    Limits,
    Manifest,
    OutOfFuel,
    Plugin,
    PluginBusy,
    PluginError,
    PluginHost,
    PluginTimeout,
    PluginTrapped,
    WasiGrant,
    abi,
    linking,
    loading,
)
from persistency.plugins.services import host_function
from tests.plugins.deeds import DEEDS, NAMES, WAIT, deeds, until

SEED = random.SystemRandom().getrandbits(32)
MEMORY = 2 * 1_048_576


@pytest.fixture
def host(compiled: Path) -> Iterator[PluginHost]:
    """Give a host."""
    with Persistency(":memory:") as p, PluginHost(p, cache_dir=compiled) as host:
        yield host


@pytest.fixture
def plugin(host: PluginHost) -> Plugin:
    """Give the guest that does everything."""
    return host.load(Manifest("deeds", limits=Limits(memory_bytes=MEMORY)), DEEDS).result(WAIT)


def loaded(host: PluginHost, wat: bytes, **limits: Any) -> Plugin:
    """Load a guest of a test's own."""
    return host.load(Manifest("own", limits=Limits(**limits)), wat).result(WAIT)


def called(plugin: Plugin, name: str, data: Any = b"", timeout: float | None = None) -> bytes:
    """Call a function and wait for its answer."""
    return plugin.call(name, data, timeout=timeout).result(WAIT)


def failure(plugin: Plugin, name: str, data: Any = b"", timeout: float | None = None) -> Any:
    """Call a function that fails, and return how."""
    error = plugin.call(name, data, timeout=timeout).exception(WAIT)
    assert isinstance(error, CallFailed), error
    assert error.plugin == plugin.id
    assert repr(plugin.id) in str(error)
    return error


def stopped(plugin: Plugin, name: str, within: float = 0.05) -> Any:
    """Call a function that loops, with as much time as this machine needs to begin it, and return how it fails."""
    while (error := failure(plugin, name, timeout=within)).reason == "unbegun":
        within *= 2
    return error


# -- what goes in and comes out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"a\0b\0", bytes(range(256)), bytearray(b"changed later"), memoryview(b"seen"), b"x" * 100_000]
)
def test_bytes_come_back_as_they_went(plugin: Plugin, data: Any) -> None:
    """S0-89, S1-47: any bytes, NUL and nothing among them, in and out."""
    assert called(plugin, "echo", data) == bytes(data)


def test_no_data_is_passed_as_nothing_without_alloc(host: PluginHost) -> None:
    """A function that takes nothing needs no room: `alloc` isn't called, and it gets (0, 0)."""
    guest = """(module (memory (export "memory") 1)
      (func (export "alloc") (param i32) (result i32) unreachable)
      (func (export "what") (param i32 i32) (result i64)
        (i32.store (i32.const 16) (local.get 0)) (i32.store (i32.const 20) (local.get 1))
        (i64.const 0x1000000008)))"""
    plugin = loaded(host, guest.encode())
    assert called(plugin, "what") == bytes(8)
    assert failure(plugin, "what", b"x").args[0].startswith("plugin 'own': alloc was stopped")


def test_each_call_finds_a_fresh_instance(plugin: Plugin) -> None:
    """S1-49: what a call leaves in memory and globals isn't there for the next one."""
    assert [called(plugin, "count") for _ in range(3)] == [struct.pack("<ii", 1, 1)] * 3


def test_initialize_runs_before_every_call(host: PluginHost) -> None:
    """S1-48: `_initialize` is called once per instance, and can't be called from outside."""
    guest = """(module (memory (export "memory") 1)
      (func (export "alloc") (param i32) (result i32) (i32.const 64))
      (func (export "_initialize") (i32.store8 (i32.const 8) (i32.add (i32.load8_u (i32.const 8)) (i32.const 65))))
      (func (export "said") (param i32 i32) (result i64) (i64.const 0x800000001)))"""
    plugin = loaded(host, guest.encode())
    assert plugin.functions == ("said",)
    assert [called(plugin, "said"), called(plugin, "said")] == [b"A", b"A"]


def test_pointers_and_lengths_are_unsigned(host: PluginHost) -> None:
    """A place in the upper half of a memory of over 2 GiB is a place like any other."""
    guest = """(module (memory (export "memory") 36000)
      (func (export "alloc") (param i32) (result i32) (i32.const 0x88000000))
      (func (export "echo") (param i32 i32) (result i64)
        (i64.or (i64.shl (i64.extend_i32_u (local.get 0)) (i64.const 32)) (i64.extend_i32_u (local.get 1)))))"""
    plugin = loaded(host, guest.encode(), memory_bytes=2**32)
    assert called(plugin, "echo", b"far away") == b"far away"


def test_functions_are_listed(plugin: Plugin) -> None:
    """S1-54: what can be called is told; `alloc` and the memory can't."""
    assert plugin.functions == NAMES


@pytest.mark.parametrize(
    ("name", "data", "timeout", "wrong"),
    [
        (b"echo", b"", None, "name must be a str"),
        ("echo", "text", None, "data must be bytes-like"),
        ("echo", None, None, "data must be bytes-like"),
        ("echo", b"", "1", "timeout must be a number"),
        ("echo", b"", -1, "timeout must be 0 or more"),
        ("echo", b"", float("nan"), "timeout must be 0 or more"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(
    plugin: Plugin, name: Any, data: Any, timeout: Any, wrong: str
) -> None:
    """They are `Misuse`, name the argument, and nothing is begun."""
    with pytest.raises(Misuse, match=wrong):
        plugin.call(name, data, timeout=timeout)
    assert plugin.statistics().calls == 0


# -- answers that are none --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at", "size"), [(0, 65_537 * 2), (131_071, 2), (131_073, 0), (2**31, 1), (2**32 - 1, 2**32 - 99), (1, 2**32 - 1)]
)
def test_an_answer_outside_of_the_memory_is_told(plugin: Plugin, at: int, size: int) -> None:
    """Nothing is read, and the error says what the function gave, unsigned."""
    error = failure(plugin, "answer", struct.pack("<II", size, at))
    assert type(error) is BadAnswer
    assert str(error) == (
        f"plugin 'deeds': answer gave an answer that is none: {size} bytes at {at} reach outside of the guest's "
        "memory, which has 131072 bytes"
    )


@pytest.mark.parametrize("name", ["TOO_SMALL", "QUOTA", "INVALID", "CLOSED", "STORAGE", "FAULT", "DENIED", "TIMEOUT"])
def test_an_error_number_of_the_host_returned_as_an_answer_is_told_as_such(plugin: Plugin, name: str) -> None:
    """Returning what `kv_set` gave is the first mistake there is; -2 is NOT_IMPLEMENTED as an answer."""
    number = getattr(abi, name)
    error = failure(plugin, "answer", struct.pack("<II", number & 0xFFFF_FFFF, 0xFFFF_FFFF))
    if number == abi.NOT_IMPLEMENTED:
        assert type(error) is FunctionNotImplemented
    else:
        assert type(error) is BadAnswer
        assert str(error) == f"plugin 'deeds': answer returned {number}, which is the error number {name}"


@pytest.mark.parametrize(("at", "size"), [(0, 0), (131_072, 0), (131_071, 1), (0, 131_072)])
def test_an_answer_at_the_edge_is_one(plugin: Plugin, at: int, size: int) -> None:
    """The last byte belongs to the memory, and an empty place may be right behind it."""
    assert len(called(plugin, "answer", struct.pack("<II", size, at))) == size


@pytest.mark.parametrize(
    ("alloc", "size", "error", "said"),
    [
        ("(i32.const 0)", 5, CallFailed, "alloc found no room for an argument of 5 bytes"),
        ("(i32.const 65532)", 5, BadAnswer, "alloc gave no place for an argument of 5 bytes: 5 bytes at 65532"),
        ("(i32.const -1)", 1, BadAnswer, "alloc gave no place for an argument of 1 bytes: 1 bytes at 4294967295"),
        ("unreachable", 5, PluginTrapped, "alloc was stopped: it came to a place that it says is never reached"),
    ],
)
def test_an_alloc_that_fails_is_told_by_name(
    host: PluginHost, alloc: str, size: int, error: type[CallFailed], said: str
) -> None:
    """The function itself isn't called then."""
    plugin = loaded(host, deeds(alloc=f'(func (export "alloc") (param i32) (result i32) {alloc})'))
    found = failure(plugin, "trap", b"x" * size)
    assert type(found) is error
    assert said in str(found)


def test_an_argument_over_the_memory_limit_finds_no_room(plugin: Plugin) -> None:
    """A guest that can't grow says so with 0; its host is told what to raise."""
    error = failure(plugin, "echo", b"x" * (MEMORY + 1))
    assert "found no room for an argument of 2097153 bytes" in str(error)
    assert "limits.memory" in error.hint


# -- failing in order -------------------------------------------------------------------------------------------------


def test_a_function_that_isnt_there(plugin: Plugin) -> None:
    """S1-54: it isn't found, and neither is an export of another shape."""
    for name in ("nope", "memory", "alloc", "", "echo "):
        error = failure(plugin, name)
        assert type(error) is FunctionNotFound
        assert repr(name) in str(error)


def test_a_function_that_isnt_implemented(plugin: Plugin) -> None:
    """S1-54: -2 is told apart from a function that isn't there, and from one that failed."""
    assert type(failure(plugin, "answer", struct.pack("<q", -2))) is FunctionNotImplemented


def test_a_function_that_says_what_is_wrong(plugin: Plugin) -> None:
    """What it says with `fail` is the message; who says nothing is told as that."""
    assert str(failure(plugin, "says", "kein Wetter für heute".encode())) == (
        "plugin 'deeds': says failed: kein Wetter für heute"
    )
    assert str(failure(plugin, "answer", struct.pack("<q", -1))) == "plugin 'deeds': answer failed: it said no more"


# -- traps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("trap", "unreachable"),
        ("divide", "integer_division_by_zero"),
        ("stray", "memory_out_of_bounds"),
        ("deep", "stack_overflow"),
        ("null", "indirect_call_to_null"),
    ],
)
def test_traps_are_told_by_their_reason(plugin: Plugin, name: str, reason: str) -> None:
    """Each is the guest's own error, says where it was, and does no harm to the next call."""
    error = failure(plugin, name)
    assert type(error) is PluginTrapped
    assert error.reason == reason
    assert any(note.startswith("In the guest: ") for note in error.__notes__)
    assert called(plugin, "echo", b"still here") == b"still here"


def test_errors_of_guests_can_be_pickled_and_hold_nothing(plugin: Plugin) -> None:
    """Each goes to another process as it is; none keeps what wasmtime raised, or the frames of the crew's thread."""
    for name in ("trap", "spin", "says", "nope"):
        error = failure(plugin, name, timeout=0.05)
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), copy.plugin, copy.hint) == (type(error), str(error), "deeds", error.hint)
        assert error.__context__ is None
        assert error.__traceback__ is None


@pytest.mark.parametrize("kind", [PluginTimeout, PluginBusy])
def test_errors_that_are_timeouts_keep_what_they_say(kind: type[CallFailed]) -> None:
    """As an `OSError` each would take two arguments for an errno and its text, and a third for the name of a file."""
    error = kind("plugin 'd': too late", "d", *(["interrupt"] if kind is PluginTimeout else []), hint="Wait.")
    args = ("plugin 'd': too late", "d", *(["interrupt"] if kind is PluginTimeout else []))
    assert isinstance(error, TimeoutError)
    for each in (error, pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(each) is kind
        assert each.args == args
        assert str(each) == "plugin 'd': too late"
        assert repr(each) == f"{kind.__name__}{args!r}"
        assert (each.plugin, each.hint, each.__notes__) == ("d", "Wait.", ["Hint: Wait."])
        assert getattr(each, "reason", "interrupt") == "interrupt"
        assert (each.errno, each.strerror, each.filename) == (None, None, None)  # type: ignore[attr-defined]  # an OSError


NASTY = "no\x1b[31m red\r\nWARNING of nothing\x07\u202e\x9b"


def test_what_a_guest_says_cannot_move_a_terminal_or_fake_a_line(host: PluginHost) -> None:
    """Its words, the names of its functions, and what wasmtime says of them: each message and note is printable."""
    name = "".join(f"\\{byte:02x}" for byte in NASTY.encode())
    more = f"""(func $"{name}" (export "{name}") (param i32 i32) (result i64) unreachable)
      (import "wasi_snapshot_preview1" "args_sizes_get" (func $sizes (param i32 i32) (result i32)))
      (func $"x{name}" (export "x{name}") (param i32 i32) (result i64)
        (drop (call $sizes (i32.const -16) (i32.const 99))) (i64.const 0))"""
    start = deeds().index(b"(import")
    code = deeds(more.replace(imported := more[more.index("(import") : more.index('(func $"x')], ""))
    plugin = host.load(Manifest("own", wasi=WasiGrant()), code[:start] + imported.encode() + code[start:]).result(WAIT)
    assert NASTY in plugin.functions
    for function, data in (("says", NASTY.encode()), (NASTY, b""), (f"x{NASTY}", b""), (f"y{NASTY}", b"")):
        error = failure(plugin, function, data)
        for text in (str(error), *error.__notes__):
            assert text.isprintable(), text
            assert "WARNING of nothing" in text or text.startswith(("Hint: ", "In the guest: "))


def test_memory_ends_at_its_limit(plugin: Plugin) -> None:
    """S1: `memory.grow` is refused at the limit; a guest that gives up because of that is told what to raise."""
    error = failure(plugin, "fill")
    assert (type(error), error.reason) == (PluginTrapped, "unreachable")
    assert error.hint == f"Its memory stands at its limit, {MEMORY} bytes: raise limits.memory in the manifest."
    assert called(plugin, "size") == struct.pack("<I", 4)


def test_fuel_ends(host: PluginHost) -> None:
    """A guest that may use so many instructions is stopped after them, every time."""
    plugin = loaded(host, DEEDS, fuel=10_000)
    assert called(plugin, "echo", b"cheap") == b"cheap"
    for _ in range(2):
        error = failure(plugin, "spin")
        assert type(error) is OutOfFuel
        assert "10000" in str(error)


@pytest.mark.parametrize("name", ["spin", "ask"])
def test_time_ends(plugin: Plugin, name: str) -> None:
    """S1-50: a guest that loops, in its own code or over a host function, is stopped in the middle."""
    error = stopped(plugin, name)
    assert type(error) is PluginTimeout
    assert isinstance(error, TimeoutError)
    assert error.reason == "interrupt"
    assert re.fullmatch(rf"plugin 'deeds': {name} took longer than [0-9.]+ s, and was stopped", str(error))


def test_a_guest_without_loops_is_stopped_in_its_next_host_function(host: PluginHost) -> None:
    """Wasmtime looks at the time in loops and at calls; a guest that has neither asks its host often enough."""
    asks = "(drop (call $last_error (i32.const 0) (i32.const 0)))" * 50_000
    plugin = loaded(host, deeds(f'(func (export "on") (param i32 i32) (result i64) {asks} (i64.const 0))'))
    error = stopped(plugin, "on", within=0.01)
    assert type(error) is PluginTimeout
    assert plugin.call("trap").exception(WAIT).reason == "unreachable"  # type: ignore[union-attr]  # it fails


def test_a_caller_is_told_though_its_guest_cannot_be_stopped_yet(
    host: PluginHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host function that hangs: the caller waits no longer, the place is kept until the guest's end."""
    gate = threading.Event()
    fail = next(function for function in loading.everybody() if function.name == "fail")
    hanging = host_function("last_error", lambda *_: int(not gate.wait(WAIT)))
    monkeypatch.setattr(loading, "everybody", lambda: [hanging, fail])
    plugin = loaded(host, DEEDS)
    error = stopped(plugin, "ask")
    assert type(error) is PluginTimeout
    assert str(error).endswith("and hasn't stopped yet")
    assert plugin.statistics().running == 1
    gate.set()
    assert until(plugin, lambda now: not now.running).timeouts >= 1


def test_a_call_without_time_isnt_begun(plugin: Plugin) -> None:
    """It fails as what it is."""
    error = failure(plugin, "echo", timeout=0)
    assert (type(error), error.reason) == (PluginTimeout, "unbegun")


def test_the_shortest_time_limit_counts() -> None:
    """The host's, the manifest's and the call's: none of them can lengthen another."""
    with Persistency(":memory:") as p, PluginHost(p, call_timeout=0.2) as host:
        own = host.load(Manifest("own", limits=Limits(timeout=0.1)), DEEDS).result(WAIT)
        more = host.load(Manifest("more", limits=Limits(timeout=1000)), DEEDS).result(WAIT)
        for plugin, timeout, said in ((own, None, "0.1"), (own, 100, "0.1"), (own, 0.05, "0.05"), (more, 50, "0.2")):
            assert re.search(f"(longer than|had) {said} s", str(failure(plugin, "spin", timeout=timeout)))


@pytest.mark.parametrize("where", ["start", "_initialize"])
def test_a_guest_that_traps_before_its_function_is_told_the_same_way(host: PluginHost, where: str) -> None:
    """The start function and `_initialize` are the plugin's code too."""
    name = "instantiate" if where == "start" else where
    head = "(start $boom)" if where == "start" else '(export "_initialize" (func $boom))'
    plugin = loaded(host, deeds(f"(func $boom unreachable) {head}"))
    error = failure(plugin, "echo", b"x")
    assert (type(error), error.reason) == (PluginTrapped, "unreachable")
    assert str(error).startswith(f"plugin 'own': {name} was stopped")
    looping = loaded(host, deeds(f"(func $boom (loop $again (br $again))) {head}"))
    assert str(stopped(looping, "echo")).startswith(f"plugin 'own': {name} took longer than")


@pytest.mark.parametrize("table", ["(table 200000 funcref)", "(table 1 funcref)" * 6])
def test_tables_are_bounded(host: PluginHost, table: str) -> None:
    """What a module takes of the host's memory for tables has a limit; it is told at the call."""
    error = failure(loaded(host, deeds(table)), "empty")
    assert type(error) is CallFailed
    assert "instantiate wasn't possible" in str(error)


def test_a_program_that_exits_is_told(host: PluginHost) -> None:
    """WASI's `proc_exit` ends the call, and not the process."""
    guest = b"""(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1) (func (export "alloc") (param i32) (result i32) (i32.const 8))
      (func (export "leave") (param i32 i32) (result i64) (call $exit (i32.const 3)) (i64.const 0)))"""
    plugin = host.load(Manifest("exits", wasi=WasiGrant()), guest).result(WAIT)
    error = failure(plugin, "leave")
    assert isinstance(error, PluginTrapped)
    assert (error.reason, "exit status 3" in str(error)) == ("exit", True)


@pytest.mark.parametrize("where", ["function", "start"])
def test_a_wild_pointer_passed_to_wasi_is_a_trap(host: PluginHost, where: str) -> None:
    """Wasmtime's own functions stop the guest then, and don't answer; it is no question of the host's limits."""
    guest = """(module (import "wasi_snapshot_preview1" "args_sizes_get" (func $sizes (param i32 i32) (result i32)))
      (memory (export "memory") 1) (func (export "alloc") (param i32) (result i32) (i32.const 8))
      (func $wild (drop (call $sizes (i32.const -16) (i32.const 96)))) START
      (func (export "run") (param i32 i32) (result i64) (call $wild) (i64.const 0)))"""
    code = guest.replace("START", "(start $wild)" if where == "start" else "")
    plugin = host.load(Manifest("wild", wasi=WasiGrant()), code.encode()).result(WAIT)
    error = failure(plugin, "run")
    assert (type(error), error.reason) == (PluginTrapped, "host_function")
    assert "Pointer out of bounds" in str(error)
    assert "wild" in str(error)
    assert plugin.statistics().trapped == 1


@pytest.mark.parametrize("one_by_one", [True, False])
def test_a_call_asks_only_for_the_exports_it_needs(
    host: PluginHost, one_by_one: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wasmtime's own Python goes over all of them, which takes long where there are many; without the other way it's
    that one.
    """
    assert linking._ONE_BY_ONE
    asked: list[object] = []
    exports = wasmtime.Instance.exports

    def counted(instance: wasmtime.Instance, store: Any) -> Any:
        asked.append(instance)
        return exports(instance, store)

    monkeypatch.setattr(wasmtime.Instance, "exports", counted)
    monkeypatch.setattr(linking, "_ONE_BY_ONE", one_by_one)
    more = "".join(f'(func (export "Ä{number}") (param i32 i32) (result i64) (i64.const 0))' for number in range(900))
    plugin = loaded(host, deeds(more + '(func (export "_initialize"))'))
    assert called(plugin, "echo", b"1") == b"1"
    assert called(plugin, "Ä899") == b""
    assert (not asked) is one_by_one


# -- the host's own failures, and wasmtime's one exception -------------------------------------------------------------


def spoiled(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Have the host function `last_error` raise."""

    def body(*_: Any) -> int:
        raise error

    fail = next(function for function in loading.everybody() if function.name == "fail")
    monkeypatch.setattr(loading, "everybody", lambda: [host_function("last_error", body), fail])


@pytest.mark.parametrize("error", [LookupError("nobody foresaw this"), KeyboardInterrupt(), MemoryError()])
def test_what_a_host_function_raises_stays_in_its_call(
    host: PluginHost, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """The guest gets a number; a call that then fails has it as its cause, and no other call ever sees it."""
    guest = b"""(module (import "persistency" "last_error" (func $ask (param i32 i32) (result i64)))
      (memory (export "memory") 1) (func (export "alloc") (param i32) (result i32) (i32.const 8))
      (func (export "number") (param i32 i32) (result i64)
        (i64.store (i32.const 8) (call $ask (i32.const 0) (i32.const 0))) (i64.const 0x800000008))
      (func (export "gives_up") (param i32 i32) (result i64)
        (drop (call $ask (i32.const 0) (i32.const 0))) (i64.const -1))
      (func (export "panics") (param i32 i32) (result i64)
        (drop (call $ask (i32.const 0) (i32.const 0))) unreachable))"""
    other = loaded(host, DEEDS)
    spoiled(monkeypatch, error)
    plugin = host.load({"id": "unlucky"}, guest).result(WAIT)
    assert called(plugin, "number") == struct.pack("<q", abi.STORAGE)
    assert failure(plugin, "gives_up").__cause__ is error
    assert failure(plugin, "panics").__cause__ is error
    assert failure(other, "trap").__cause__ is None


def test_an_exception_that_others_left_in_wasmtime_is_told_as_that(plugin: Plugin) -> None:
    """Another user of wasmtime in the process may leave one; it comes in place of our trap, once."""
    wasmtime._func.LAST_EXCEPTION = foreign = ValueError("somebody else's")  # type: ignore[attr-defined]  # no other way
    error = failure(plugin, "trap")
    assert type(error) is PluginTrapped
    assert "another user of wasmtime" in str(error)
    assert error.__cause__ is foreign
    assert failure(plugin, "trap").reason == "unreachable"


def test_plugins_that_fail_at_the_same_time_get_their_own_errors(host: PluginHost) -> None:
    """Four plugins, four ways to fail, eight threads: each of 4,000 calls gets what is its own."""
    ways: dict[str, tuple[str, bytes, str]] = {
        "traps": ("trap", b"", "trap was stopped: it came"),
        "divides": ("divide", b"", "integer division by zero"),
        "says": ("says", b"word", "says failed: word"),
        "strays": ("answer", struct.pack("<II", 9, 2**31), "9 bytes at 2147483648"),
    }
    plugins = {name: host.load({"id": name}, DEEDS).result(WAIT) for name in ways}
    wrong: list[str] = []

    def storm(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(500):
            name, (function, data, said) = chance.choice(list(ways.items()))
            error = plugins[name].call(function, data).exception(WAIT)
            if not isinstance(error, PluginError) or error.plugin != name or said not in str(error):
                wrong.append(f"{name}: {error!r}")

    threads = [threading.Thread(target=storm, args=(SEED + number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, (SEED, wrong[:3])
    assert sum(each.statistics().failed for each in plugins.values()) == 4_000


def test_traps_beside_calls_that_run_out_of_time_get_their_own_errors(host: PluginHost) -> None:
    """Two threads whose guests are stopped for their time, in loops over host functions and without; two whose guests
    trap meanwhile: wasmtime keeps one exception for all of them.
    """
    ways = {"trap": "unreachable", "divide": "integer_division_by_zero", "ask": "interrupt", "spin": "interrupt"}
    plugins = {name: host.load({"id": name}, DEEDS).result(WAIT) for name in ways}
    found: dict[str, set[tuple[type, str]]] = {name: set() for name in ways}
    stop = threading.Event()

    def time_out(name: str) -> None:
        for _ in range(25):
            error = stopped(plugins[name], name, within=0.02)
            found[name].add((type(error), error.reason))

    def trap(name: str) -> None:
        while not stop.is_set():
            error = failure(plugins[name], name)
            found[name].add((type(error), error.reason))

    late = [threading.Thread(target=time_out, args=(name,)) for name in ("ask", "spin")]
    trapping = [threading.Thread(target=trap, args=(name,)) for name in ("trap", "divide")]
    for thread in (*late, *trapping):
        thread.start()
    for thread in late:
        thread.join()
    stop.set()
    for thread in trapping:
        thread.join()
    assert found == {
        name: {(PluginTimeout if reason == "interrupt" else PluginTrapped, reason)} for name, reason in ways.items()
    }
    assert all(plugin.statistics().failed for plugin in plugins.values())


# -- nothing is left --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["echo", "trap", "says", "nope"])
def test_a_call_leaves_nothing_behind(plugin: Plugin, name: str) -> None:
    """However it ends, its store is closed at once, and none of wasmtime's objects stays."""
    kinds = (wasmtime.Store, wasmtime.Instance, wasmtime.Trap, wasmtime.WasmtimeError)

    def count() -> int:
        gc.collect()
        return sum(isinstance(each, kinds) for each in gc.get_objects())

    plugin.call(name, b"first").exception(WAIT)
    before = count()
    for _ in range(20):
        plugin.call(name, b"more").exception(WAIT)
    assert count() == before


def test_calls_log_nothing(plugin: Plugin, caplog: pytest.LogCaptureFixture) -> None:
    """A guest that fails can't fill the host's log."""
    with caplog.at_level(logging.DEBUG):
        for name in ("echo", "trap", "says", "nope"):
            plugin.call(name, b"x").exception(WAIT)
    assert [record.message for record in caplog.records if record.name.startswith("persistency.plugins")] == []


def test_a_store_answers_while_others_trap(host: PluginHost) -> None:
    """A plugin with a store and one that traps don't get in each other's way."""
    guest = b"""(module (import "persistency" "kv_set" (func $set (param i32 i32 i32 i32) (result i64)))
      (memory (export "memory") 1) (func (export "alloc") (param i32) (result i32) (i32.const 64))
      (func (export "set") (param i32 i32) (result i64)
        (drop (call $set (local.get 0) (local.get 1) (local.get 0) (local.get 1))) (i64.const 0)))"""
    keeper = host.load(Manifest("keeper", kvstore=KVGrant()), guest).result(WAIT)
    other = loaded(host, DEEDS)
    replies = [(keeper.call("set", b"key %d" % number), other.call("trap")) for number in range(100)]
    assert all(kept.result(WAIT) == b"" and trapped.exception(WAIT) is not None for kept, trapped in replies)
    assert keeper.store is not None
    assert len(keeper.store.list().result(WAIT)) == 100
