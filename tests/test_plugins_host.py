"""The host: plugins are loaded, loaded anew and refused, each with what it was granted and a store of its own."""

from __future__ import annotations

import hashlib
import json
import logging
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persistency import Closed, Misuse, Persistency, QuotaExceeded

pytest.importorskip("wasmtime", reason="needs the extra plugins")

import wasmtime

from persistency.plugins import (
    FunctionNotFound,
    KVGrant,
    Limits,
    LoadFailed,
    Manifest,
    PermissionDenied,
    Plugin,
    PluginError,
    PluginHost,
    PluginNotFound,
    WasiGrant,
    abi,
    crew,
)
from persistency.plugins.shape import shape_of
from tests.loops import InLoop, in_loop
from tests.plugins.deeds import DEEDS, KEEPER, WAIT, deeds, held, until, version

__all__ = ["in_loop"]

MEMORY = '(memory (export "memory") 1)'
ALLOC = '(func (export "alloc") (param i32) (result i32) (i32.const 8))'
RUN = '(func (export "run") (param i32 i32) (result i64) (i64.const 0))'


@pytest.fixture
def p(tmp_path: Path) -> Iterator[Persistency]:
    """Give a root on disk."""
    with Persistency(tmp_path / "data") as p:
        yield p


@pytest.fixture
def host(p: Persistency) -> Iterator[PluginHost]:
    """Give a host."""
    with PluginHost(p) as host:
        yield host


def module(*parts: str) -> bytes:
    """Return a module in the text format."""
    return f"(module {' '.join(parts)})".encode()


def imported(module: str, name: str, parameters: str = "i32 i32", result: str = "i64") -> str:
    """Return the import of a function."""
    kind = f"(param {parameters}) (result {result})"
    return f'(import "{module}" "{name}" (func {kind}))'


# -- loading ----------------------------------------------------------------------------------------------------------


def test_code_comes_as_text_as_binary_and_as_a_file(host: PluginHost, tmp_path: Path) -> None:
    """All three are the same plugin in the end; its SHA-256 is that of what was given."""
    binary = bytes(wasmtime.wat2wasm(DEEDS.decode()))
    (tmp_path / "deeds.wasm").write_bytes(binary)
    for number, code in enumerate((DEEDS, binary, bytearray(binary), tmp_path / "deeds.wasm")):
        plugin = host.load({"id": f"p{number}"}, code).result(WAIT)  # type: ignore[arg-type]  # a bytearray is as good
        assert plugin.call("echo", b"hello").result(WAIT) == b"hello"
        assert plugin.sha256 == hashlib.sha256(DEEDS if number == 0 else binary).hexdigest()


def test_a_manifest_comes_in_any_form(host: PluginHost, tmp_path: Path) -> None:
    """S1-10: as an object, a mapping, a JSON text or a file; the plugin's id is its identity, and not its code."""
    given = {"id": "a", "limits": {"memory": "2MB"}}
    (tmp_path / "b.json").write_text(json.dumps({**given, "id": "b"}))
    host.load(given, DEEDS)
    host.load(tmp_path / "b.json", DEEDS)
    host.load(json.dumps({**given, "id": "c"}), DEEDS)
    host.load(Manifest("d", limits=Limits(memory_bytes=2_000_000)), DEEDS)
    plugins = [host.ready(name).result(WAIT) for name in "abcd"]
    assert {plugin.manifest.limits for plugin in plugins} == {Limits(memory_bytes=2_000_000)}
    assert [plugin.id for plugin in host.plugins()] == ["a", "b", "c", "d"]


@pytest.mark.parametrize(
    ("manifest", "wasm", "wrong"),
    [
        ({"id": "../up"}, DEEDS, "id"),
        ({"id": "a", "permissions": {"kvstor": {}}}, DEEDS, "did you mean 'kvstore'"),
        ({"id": "a"}, "(module)", "wasm must be bytes or a path, not str"),
        ({"id": "a"}, None, "wasm must be bytes-like"),
        (None, DEEDS, "manifest must be"),
    ],
)
def test_wrong_arguments_are_refused_at_the_call(host: PluginHost, manifest: Any, wasm: Any, wrong: str) -> None:
    """S1-6: a bad manifest is told at once, and nothing is on its way."""
    with pytest.raises(Misuse, match=wrong):
        host.load(manifest, wasm)
    with pytest.raises(PluginNotFound):
        host.ready("a")


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"calls_max": 0}, "calls_max must be at least 1"),
        ({"compiles_max": 0}, "compiles_max must be at least 1"),
        ({"call_timeout": 0}, "call_timeout must be more than 0"),
        ({"call_timeout": 3601}, "at most 3600"),
        ({"call_timeout": None}, "call_timeout must be a number"),
        ({"calls_wait": -1}, "calls_wait must be 0 or more"),
        ({"cache_max": "much"}, "cache_max must be bytes"),
        ({"cache_dir": 5}, "cache_dir must be a path"),
        ({"cache_dir": ""}, "cache_dir must be a path"),
    ],
)
def test_wrong_options_are_refused(p: Persistency, options: dict[str, Any], wrong: str) -> None:
    """Each is `Misuse`, and names the option."""
    with pytest.raises(Misuse, match=wrong):
        PluginHost(p, **options)
    with pytest.raises(Misuse, match="persistency must be a Persistency"):
        PluginHost("data")  # type: ignore[arg-type]  # a path isn't enough


# What is to be done about what is wrong with code, where the error's usual words wouldn't tell.
HINTS = {
    "couldn't be compiled": "See the cause; the module must be valid WebAssembly.",
    "no memory named": "Have it export, as 'memory', the memory that its pointers point into.",
    "no function 'alloc'": "Have it export 'alloc', of the type (i32) -> (i32).",
    "imports a memory": "Build the plugin with a memory of its own.",
    "imports a table": "Build the plugin with a table of its own.",
    "imports a global": "Build the plugin with a global of its own.",
    "bytes of memory": "Raise limits.memory in the manifest, or build the plugin with less.",
    "and it is": "Build the plugin for this version of the ABI.",
}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (b"", "couldn't be compiled"),
        (b"\0asm\1\0\0\0\xff", "couldn't be compiled"),
        (b"(module (func (i32.add)))", "couldn't be compiled"),
        (b"(component)", "couldn't be compiled"),
        (b"\xff\xfe", "couldn't be compiled: the code is neither"),
        (module(ALLOC, RUN), "exports no memory named 'memory'"),
        (module(ALLOC, RUN, '(global (export "memory") i32 (i32.const 0))'), "exports no memory named 'memory'"),
        (module(MEMORY, RUN), "exports no function 'alloc'"),
        (module(MEMORY, RUN, '(func (export "alloc") (param i64) (result i32) (i32.const 8))'), "'alloc' must be"),
        (module(MEMORY, ALLOC, RUN, '(func (export "_initialize") (param i32))'), "'_initialize' must be"),
        (module('(memory (export "memory") 1025)', ALLOC, RUN), "begins with 67174400 bytes of memory"),
        (module('(import "env" "memory" (memory 1))', ALLOC), "imports a memory, env.memory"),
        (module('(import "env" "table" (table 1 funcref))', MEMORY), "imports a table, env.table"),
        (module('(import "env" "base" (global i32))', MEMORY), "imports a global, env.base"),
        (module(MEMORY, ALLOC, *(f'(export "e{at}" (memory 0))' for at in range(1_000))), "exports 1002 things"),
        (module(MEMORY, ALLOC, *(f'(export "e{at}{"x" * 7_000}" (memory 0))' for at in range(10))), "exports names of"),
        (module(*(imported("persistency", "fail") for _ in range(1_001)), MEMORY), "imports 1001 things, and may 1000"),
        (module(imported("persistency", "fail", "i32 i64"), MEMORY), "as (i32, i64) -> (i64), and it is (i32, i32)"),
        (module(imported("persistency", "fail", "i32 i32", "i32"), MEMORY), "-> (i32), and it is"),
    ],
)
def test_code_that_is_no_plugin_is_refused(host: PluginHost, code: bytes, said: str) -> None:
    """The load fails with the cause in words, nothing is left of it, and the id can be loaded with something else."""
    error = host.load(Manifest("bad", kvstore=KVGrant()), code).exception(WAIT)
    assert type(error) is LoadFailed
    assert error.plugin == "bad"
    assert said in str(error)
    hint = next((hint for part, hint in HINTS.items() if part in said), LoadFailed.hint)
    assert error.hint == hint
    with pytest.raises(PluginNotFound):
        host.plugin("bad")
    assert host.persistency.stored_jobs() == []
    assert host.load({"id": "bad"}, DEEDS).result(WAIT).call("echo", b"1").result(WAIT) == b"1"


def test_a_guest_without_functions_needs_no_alloc(host: PluginHost) -> None:
    """What can't be called takes no arguments."""
    assert host.load({"id": "still"}, module(MEMORY)).result(WAIT).functions == ()


def test_a_file_that_cannot_be_read_is_told(host: PluginHost, tmp_path: Path) -> None:
    """In the reply, for the file is read in the background; and it is read anew each time."""
    path = tmp_path / "late.wasm"
    assert "No such file" in str(host.load({"id": "late"}, path).exception(WAIT))
    assert "no regular file" in str(host.load({"id": "late"}, tmp_path).exception(WAIT))
    path.write_bytes(DEEDS)
    assert host.load({"id": "late"}, path).result(WAIT).id == "late"


def test_a_host_function_that_is_handed_on_cannot_be_called(host: PluginHost) -> None:
    """Nothing of the plugin's would run: it isn't among its functions, and is no `alloc`."""
    asks = imported("persistency", "last_error").replace("(func", "(func $ask")
    on = '(export "on" (func $ask))'
    plugin = host.load({"id": "on"}, module(asks, MEMORY, ALLOC, RUN, on)).result(WAIT)
    assert plugin.functions == ("run",)
    assert type(plugin.call("on").exception(WAIT)) is FunctionNotFound
    assert plugin.call("run").result(WAIT) == b""
    assert host.load({"id": "on"}, module(asks, MEMORY, on)).result(WAIT).functions == ()
    syncs = '(func (export "alloc") (import "wasi_snapshot_preview1" "fd_sync") (param i32) (result i32))'
    error = host.load(Manifest("syncs", wasi=WasiGrant()), module(syncs, MEMORY, RUN)).exception(WAIT)
    assert type(error) is LoadFailed
    assert "its export 'alloc' is a function it imports" in str(error)


@pytest.mark.parametrize(
    "code",
    [
        b'(module (memory (export "a\\1b[31m\\0d\\0a") 1) (export "a\\1b[31m\\0d\\0a" (memory 0)))',
        '(module (memory (export "a\x1b[31m\u202e\x85 WARNING'.encode(),
        b"(module\n  (memory 1)\n  (nothing \x1b[2J))",
    ],
)
def test_what_wasmtime_says_of_code_is_one_printable_line(
    host: PluginHost, code: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """It quotes names and whole lines of the code."""
    error = host.load({"id": "loud"}, code).exception(WAIT)
    assert type(error) is LoadFailed
    assert "couldn't be compiled: " in str(error)
    assert str(error).isprintable()
    assert all(record.getMessage().isprintable() for record in caplog.records)


@pytest.mark.parametrize("where", ["(func", "(import"])
def test_functions_of_vectors_do_no_harm(host: PluginHost, where: str) -> None:
    """A C interface of wasmtime's would end the process if it was asked for the parameters of one."""
    if where == "(func":
        more = '(func (export "vector") (param v128) (result v128) (local.get 0))'
        assert host.load({"id": "v"}, deeds(more)).result(WAIT).call("echo", b"1").result(WAIT) == b"1"
    else:
        denied = host.load({"id": "v"}, module(imported("env", "v", "v128", "v128"), MEMORY)).exception(WAIT)
        assert isinstance(denied, PermissionDenied)
        granted = Manifest("v", wasi=WasiGrant())
        code = module(imported("wasi_snapshot_preview1", "fd_write", "v128", "v128"), MEMORY)
        assert "couldn't be linked" in str(host.load(granted, code).exception(WAIT))


def test_the_shape_is_that_which_wasmtime_sees() -> None:
    """What is read off the binary format is what wasmtime tells, where it can."""
    code = wasmtime.wat2wasm(DEEDS.decode())
    compiled = wasmtime.Module(wasmtime.Engine(), code)
    shape = shape_of(bytes(code))
    assert list(shape.exports) == [export.name for export in compiled.exports]
    assert [(each.module, each.name) for each in shape.imports] == [
        (each.module, each.name) for each in compiled.imports
    ]
    for export in compiled.exports:
        kind = export.type
        if isinstance(kind, wasmtime.FuncType):
            names = tuple(map(str, kind.params)), tuple(map(str, kind.results))
            assert shape.exports[export.name].signature == names
    assert shape.exports["memory"].pages == 1


# -- permissions ------------------------------------------------------------------------------------------------------


def test_every_function_that_was_not_granted_is_named(host: PluginHost) -> None:
    """S1-9, S0-88: the load fails, the error says what would grant each, and no store is made."""
    code = module(
        imported("persistency", "last_error"),
        imported("persistency", "kv_get", "i32 i32 i32 i32"),
        imported("persistency", "kv_erase"),
        imported("wasi_snapshot_preview1", "fd_write", "i32 i32 i32 i32", "i32"),
        imported("env", "abort"),
        MEMORY,
    )
    error = host.load({"id": "greedy"}, code).exception(WAIT)
    assert isinstance(error, PermissionDenied)
    assert error.functions == (
        "persistency.kv_get", "persistency.kv_erase", "wasi_snapshot_preview1.fd_write", "env.abort"
    )  # fmt: skip
    assert str(error) == (
        "plugin 'greedy' imports what it wasn't granted: persistency.kv_get (permission kvstore), "
        "persistency.kv_erase (there is no such function), wasi_snapshot_preview1.fd_write (permission wasi), "
        "env.abort (there is no such function)"
    )
    assert error.hint == "No permission grants what isn't there: build the plugin without it."
    code = module(imported("persistency", "kv_get", "i32 i32 i32 i32"), MEMORY)
    error = host.load({"id": "greedy"}, code).exception(WAIT)
    assert isinstance(error, PermissionDenied)
    assert error.hint == "Grant it in the manifest's permissions, or build the plugin without it."
    assert host.persistency.stored_jobs() == []
    assert len(host) == 0


@pytest.mark.parametrize("signature", [each for each in abi.FUNCTIONS if each.service], ids=lambda each: each.name)
def test_each_service_function_needs_its_permission(host: PluginHost, signature: abi.Signature) -> None:
    """S0-88, S1-5: without `kvstore` none is there; with `read_only` those that write aren't."""
    parameters = " ".join("i64" if letter == "l" else "i32" for letter in signature.parameters)
    code = module(imported(abi.MODULE, signature.name, parameters), MEMORY)
    name = f"persistency.{signature.name}"
    for manifest, allowed in (
        (Manifest("none"), False),
        (Manifest("wasi", wasi=WasiGrant()), False),
        (Manifest("reads", kvstore=KVGrant(read_only=True)), not signature.writes),
        (Manifest("writes", kvstore=KVGrant()), True),
    ):
        error = host.load(manifest, code).exception(WAIT)
        assert allowed == (error is None)
        assert allowed or (isinstance(error, PermissionDenied) and error.functions == (name,))


def test_names_that_a_module_makes_up_cannot_spoil_a_log(host: PluginHost) -> None:
    """A name may be as long as it likes, and hold anything: the message is cut, and on one line."""
    many = [imported("env", f"f{number}") for number in range(900)]
    code = module(imported("env", "a\\0a\\1b" + "x" * 10_000), *many, MEMORY)
    error = host.load({"id": "loud"}, code).exception(WAIT)
    assert isinstance(error, PermissionDenied)
    assert len(error.functions) == 901
    assert "\n" not in str(error)
    assert str(error).endswith("and 881 more")
    assert len(str(error)) < 3_000


# -- one flight, and one after the other ------------------------------------------------------------------------------


def test_who_loads_the_same_at_once_gets_the_same(host: PluginHost) -> None:
    """S1-2, S1-28: eight threads load one plugin; it is compiled once, and all have the same handle."""
    replies: list[Any] = []
    barrier = threading.Barrier(8)

    def load() -> None:
        barrier.wait(WAIT)
        replies.append(host.load({"id": "one"}, DEEDS))

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(reply.result(WAIT)) for reply in replies}) == 1
    assert host.compiler.compiled == 1
    assert host.load({"id": "one"}, DEEDS).result(WAIT) is host.plugin("one")


def test_two_plugins_with_one_code_are_isolated(host: PluginHost, tmp_path: Path) -> None:
    """S0-89, S1-10: they share compiled code, and have a file each."""
    code = b"""(module (import "persistency" "kv_set" (func $set (param i32 i32 i32 i32) (result i64)))
      (import "persistency" "kv_get" (func $get (param i32 i32 i32 i32) (result i64)))
      (memory (export "memory") 1) (func (export "alloc") (param i32) (result i32) (i32.const 64))
      (func (export "set") (param i32 i32) (result i64)
        (i64.mul (call $set (local.get 0) (i32.const 1) (local.get 0) (local.get 1)) (i64.const 0)))
      (func (export "get") (param i32 i32) (result i64)
        (call $get (local.get 0) (local.get 1) (i32.const 0) (i32.const 64))))"""
    one, other = (host.load(Manifest(name, kvstore=KVGrant()), code).result(WAIT) for name in ("one", "other"))
    assert host.compiler.compiled == 1
    one.call("set", b"k1").result(WAIT)
    other.call("set", b"k2").result(WAIT)
    assert [plugin.call("get", b"k").result(WAIT) for plugin in (one, other)] == [b"k1", b"k2"]
    assert [job.job_id for job in host.persistency.stored_jobs()] == ["plugins/one", "plugins/other"]
    assert len(list((tmp_path / "data").rglob("*.db"))) == 2


def test_loads_of_one_id_are_done_in_their_order(host: PluginHost) -> None:
    """Twenty versions in a row: each takes its place after the one before, and the last one stays."""
    replies = [host.load(Manifest("v", kvstore=KVGrant()), version(number)) for number in range(20)]
    plugins = [reply.result(WAIT) for reply in replies]
    assert len({id(plugin) for plugin in plugins}) == 1
    assert plugins[0].call("version").result(WAIT) == b"0019"
    mixed = [host.load({"id": "m"}, DEEDS), host.unload("m"), host.load({"id": "m"}, DEEDS)]
    first, _, last = (reply.result(WAIT) for reply in mixed)
    assert first is not last
    assert (first.closed, last.closed) == (True, False)


def test_a_failed_load_is_told_to_all_who_wait_and_can_be_tried_again(host: PluginHost) -> None:
    """S1-25, D-33: the failure isn't kept."""
    replies = [host.load({"id": "x"}, b"(module") for _ in range(3)]
    assert all(isinstance(reply.exception(WAIT), LoadFailed) for reply in replies)
    assert host.load({"id": "x"}, DEEDS).result(WAIT).functions


def test_a_callback_of_a_load_may_wait_for_another_load(p: Persistency, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may be on their way at once, and more: who is told has given its place back."""
    told = threading.Semaphore(0)
    others: list[str] = []
    with PluginHost(p, compiles_max=1) as host:
        gate, compile_it = threading.Event(), host.compiler.compile

        def slow(wasm: bytes, *, fuel: bool) -> Any:
            assert gate.wait(WAIT)
            return compile_it(wasm, fuel=fuel)

        def load_another(reply: Any) -> None:
            others.append(host.load({"id": f"after {reply.result().id}"}, DEEDS).result(WAIT).id)
            told.release()

        monkeypatch.setattr(host.compiler, "compile", slow)
        for number in range(6):
            host.load({"id": str(number)}, DEEDS).add_done_callback(load_another)
        gate.set()
        assert all(told.acquire(timeout=WAIT) for _ in range(6))
    assert sorted(others) == [f"after {number}" for number in range(6)]


def test_without_threads_a_load_fails_in_its_reply(p: Persistency, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an unload does; nothing is left of either, and both can be tried again."""
    start = threading.Thread.start

    def refused(thread: threading.Thread) -> None:
        if thread.name == "persistency-plugins":
            raise RuntimeError("can't start new thread")
        start(thread)

    def without_threads() -> None:
        monkeypatch.setattr(crew, "_IDLE_S", 0.0)
        host.crew.end()
        while host.crew._threads:
            threading.Event().wait(0.001)
        monkeypatch.setattr(threading.Thread, "start", refused)

    with PluginHost(p) as host:
        without_threads()
        error = host.load({"id": "d"}, DEEDS).exception(WAIT)
        assert type(error) is LoadFailed
        assert "no thread could be started" in str(error)
        assert isinstance(error.__cause__, RuntimeError)
        with pytest.raises(PluginNotFound):
            host.ready("d")
        monkeypatch.undo()
        plugin = host.load({"id": "d"}, DEEDS).result(WAIT)
        without_threads()
        error = host.unload("d").exception(WAIT)
        assert isinstance(error, PluginError)
        assert isinstance(error.__cause__, RuntimeError)
        assert plugin.closed
        monkeypatch.undo()
        again = host.load({"id": "d"}, DEEDS).result(WAIT)
        assert again is not plugin
        assert again.call("echo", b"1").result(WAIT) == b"1"
        assert host._loads.numbers()[:2] == (0, 0)
        without_threads()
        again.unload().exception(WAIT)
        monkeypatch.undo()
        again.unload().result(WAIT)
        assert "d" not in host


# -- finding ----------------------------------------------------------------------------------------------------------


def test_plugins_are_found_by_their_ids(host: PluginHost) -> None:
    """S1-26: what is loaded, what is on its way, and what nobody knows."""
    assert (len(host), bool(host), list(host), "a" in host, 5 in host) == (0, True, [], False, False)
    with pytest.raises(PluginNotFound, match="'a'"):
        host.ready("a")
    with pytest.raises(KeyError):
        host.plugin("a")
    reply = host.load({"id": "a"}, DEEDS)
    plugin = host.ready("a").result(WAIT)
    assert reply.result(WAIT) is plugin is host.plugin("a")
    assert (len(host), list(host), "a" in host, host.plugins()) == (1, ["a"], True, [plugin])
    assert repr(plugin) == "<Plugin 'a'>"
    for wrong in (5, None):
        with pytest.raises(Misuse, match="plugin_id must be a str"):
            host.plugin(wrong)  # type: ignore[arg-type]  # what is tested


def test_waiting_for_a_load_has_a_timeout(host: PluginHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """S1-24: who waits gives up after a while; the load goes on."""
    gate = threading.Event()
    compile_it = host.compiler.compile

    def slow(wasm: bytes, *, fuel: bool) -> Any:
        assert gate.wait(WAIT)
        return compile_it(wasm, fuel=fuel)

    monkeypatch.setattr(host.compiler, "compile", slow)
    host.load({"id": "slow"}, DEEDS)
    reply = host.ready("slow")
    with pytest.raises(TimeoutError):
        reply.result(0.01)
    assert not reply.cancel()
    assert "slow" not in host
    gate.set()
    assert reply.result(WAIT) is host.plugin("slow")


def test_ready_gives_the_load_on_its_way_whatever_comes_after_it(
    host: PluginHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1-24, S1-26: an unload behind the load or before it changes nothing."""
    gate, compile_it = threading.Event(), host.compiler.compile

    def slow(wasm: bytes, *, fuel: bool) -> Any:
        assert gate.wait(WAIT)
        return compile_it(wasm, fuel=fuel)

    monkeypatch.setattr(host.compiler, "compile", slow)
    first = host.load({"id": "d"}, DEEDS)
    gone = host.unload("d")
    ready = host.ready("d")
    assert not ready.done()
    second = host.load({"id": "d"}, DEEDS)
    after = host.ready("d")
    gate.set()
    assert ready.result(WAIT) is first.result(WAIT)
    gone.result(WAIT)
    assert after.result(WAIT) is second.result(WAIT) is host.plugin("d")
    assert first.result(WAIT) is not second.result(WAIT)


def test_ready_of_a_host_that_is_closed_or_closing_raises_closed(p: Persistency) -> None:
    """And not that there is no such plugin."""
    host = PluginHost(p)
    plugin = host.load(Manifest("keeper", kvstore=KVGrant()), KEEPER).result(WAIT)
    with held(plugin):
        reply = plugin.call("get", b"key")
        until(plugin, lambda now: now.running == 1)
        with pytest.raises(TimeoutError):
            host.close(timeout=0)
        for name in ("keeper", "nobody"):
            with pytest.raises(Closed):
                host.ready(name)
    assert reply.result(WAIT) == b""
    host.close(WAIT)
    with pytest.raises(Closed):
        host.ready("keeper")


def test_loading_is_awaited_in_any_loop(p: Persistency, in_loop: InLoop) -> None:
    """`async with`, `await`: nothing blocks the loop."""

    async def everything() -> bytes:
        async with PluginHost(p) as host:
            plugin = await host.load({"id": "a"}, DEEDS)
            answer = await plugin.call("echo", b"there")
            await host.unload("a")
            await (await host.load({"id": "b"}, DEEDS)).unload()
            return answer

    assert in_loop(everything) == b"there"


# -- loading anew -----------------------------------------------------------------------------------------------------


def test_new_code_takes_effect_in_the_same_handle(host: PluginHost) -> None:
    """D-31: calls that run end with the code they began with; new ones run the new code."""
    manifest = Manifest("v", kvstore=KVGrant())
    plugin = host.load(manifest, version(1)).result(WAIT)
    store = plugin.store
    with held(plugin):
        old = plugin.call("held")
        until(plugin, lambda now: now.running == 1)
        assert host.load(manifest, version(2)).result(WAIT) is plugin
        assert plugin.call("version").result(WAIT) == b"0002"
        assert not old.done()
    assert old.result(WAIT) == b"0001"
    assert plugin.store is store
    assert plugin.sha256 == hashlib.sha256(version(2)).hexdigest()


def test_a_failed_reload_leaves_the_plugin_as_it_was(host: PluginHost) -> None:
    """Whatever it fails by: the old one answers, and has its manifest and its store."""
    manifest = Manifest("v", kvstore=KVGrant())
    plugin = host.load(manifest, version(1)).result(WAIT)
    store = plugin.store
    for worse, code in (
        (manifest, b"(module"),
        (manifest, module(imported("env", "f"), MEMORY)),
        ({"id": "v"}, version(2)),
    ):
        assert isinstance(host.load(worse, code).exception(WAIT), LoadFailed)  # the last one lost its store
        assert plugin.call("held").result(WAIT) == b"0001"
        assert (plugin.manifest, plugin.store, plugin.closed) == (manifest, store, False)
    assert host.plugin("v") is plugin


def test_a_new_manifest_takes_effect(host: PluginHost) -> None:
    """Limits and permissions are those of the last load, though the code is the same."""
    plugin = host.load({"id": "d", "limits": {"memory": "1MiB"}}, DEEDS).result(WAIT)
    size = plugin.call("size").result(WAIT)
    assert host.load({"id": "d", "limits": {"memory": "64KiB"}}, DEEDS).result(WAIT) is plugin
    assert (size, plugin.call("size").result(WAIT)) == (struct.pack("<I", 4), struct.pack("<I", 1))
    assert plugin.manifest.limits.memory_bytes == 65_536
    assert host.compiler.compiled == 1


@pytest.mark.parametrize(("before", "after"), [(10, 100), (100, 10), (100, None), (None, 100)])
def test_another_quota_is_that_of_the_store(host: PluginHost, before: int | None, after: int | None) -> None:
    """Its job is opened anew, or closed, when no call runs that began with the old one; what it keeps stays."""

    def manifest(quota: int | None) -> Manifest:
        return Manifest("d", kvstore=None if quota is None else KVGrant(max_bytes=quota))

    plugin = host.load(manifest(before), DEEDS).result(WAIT)
    if plugin.store is not None:
        plugin.store.set("k", b"12345").result(WAIT)
    assert host.load(manifest(after), DEEDS).result(WAIT) is plugin
    assert host.persistency.has_job("plugins/d") == (after is not None)
    if after is None:
        assert plugin.store is None
        return
    assert plugin.store is not None
    assert plugin.store.get("k").result(WAIT) == (None if before is None else b"12345")
    plugin.store.set("more", b"x" * (after - 5)).result(WAIT)
    with pytest.raises(QuotaExceeded):
        plugin.store.set("much", b"x" * 6).result(WAIT)


def test_another_quota_waits_for_calls_that_run(host: PluginHost) -> None:
    """Meanwhile calls wait in line; then they find the new store. Their waiting limit counts as ever."""
    plugin = host.load(Manifest("k", kvstore=KVGrant(max_bytes=10)), KEEPER).result(WAIT)
    assert plugin.store is not None
    plugin.store.set("key", b"value").result(WAIT)
    with held(plugin):
        running = plugin.call("get", b"key")
        until(plugin, lambda now: now.running == 1)
        reply = host.load(Manifest("k", kvstore=KVGrant(max_bytes=20)), KEEPER)
        while not plugin._line._paused:
            threading.Event().wait(0.001)
        waiting = plugin.call("get", b"key")
        hasty = plugin.call("get", b"key", timeout=0.02)
        assert isinstance(hasty.exception(WAIT), TimeoutError)
        until(plugin, lambda now: now.waiting == 1)
        assert not reply.done()
    assert [running.result(WAIT), reply.result(WAIT), waiting.result(WAIT)] == [b"value", plugin, b"value"]
    assert plugin.store.storage_used().result(WAIT) == 5


def test_a_load_that_waits_for_calls_keeps_no_other_from_loading(p: Persistency) -> None:
    """Two are all that may be on their way; both wait for calls that run, and a third is loaded meanwhile."""
    with PluginHost(p, compiles_max=1) as host:
        one, other = (host.load(Manifest(name, kvstore=KVGrant()), KEEPER).result(WAIT) for name in ("one", "other"))
        with held(one), held(other):
            running = [plugin.call("get", b"key") for plugin in (one, other)]
            for plugin in (one, other):
                until(plugin, lambda now: now.running == 1)
            waiting = [host.load({"id": plugin.id}, DEEDS) for plugin in (one, other)]
            while not (one._line._paused and other._line._paused):
                threading.Event().wait(0.001)
            assert host.load({"id": "third"}, DEEDS).result(WAIT).id == "third"
            assert not any(reply.done() for reply in waiting)
        assert [reply.result(WAIT) for reply in running] == [b"", b""]
        assert [reply.result(WAIT) for reply in waiting] == [one, other]
        assert host._loads.numbers()[:2] == (0, 0)


def test_a_quota_that_cannot_be_had_leaves_the_old_one(p: Persistency, host: PluginHost) -> None:
    """Somebody else has the job open with its quota: the load fails, and the plugin goes on as it was."""
    manifest = Manifest("k", kvstore=KVGrant(max_bytes=10))
    plugin = host.load(manifest, KEEPER).result(WAIT)
    assert plugin.store is not None
    plugin.store.set("key", b"value").result(WAIT)
    with Persistency(p.root) as other, other.open_job("plugins/k"):
        error = host.load(Manifest("k", kvstore=KVGrant(max_bytes=20)), KEEPER).exception(WAIT)
        assert isinstance(error, LoadFailed)
        assert "its store couldn't be opened: job 'plugins/k' is open with another max_bytes" in str(error)
        assert plugin.call("get", b"key").result(WAIT) == b"value"
        assert plugin.manifest == manifest


def test_a_job_that_was_open_already_stays_open(p: Persistency, host: PluginHost) -> None:
    """Whoever opened it closes it."""
    job = p.open_job("plugins/k", max_bytes=100)
    plugin = host.load(Manifest("k", kvstore=KVGrant(max_bytes=100)), KEEPER).result(WAIT)
    assert plugin.store is not None
    assert plugin.store.job is job
    plugin.unload().result(WAIT)
    assert not job.closed
    job.close()


def test_a_store_that_cannot_be_opened_fails_the_load(p: Persistency, host: PluginHost) -> None:
    """S0-91: it is told as that, and not as a missing import; the plugin can be loaded once it can."""
    with p.open_job("plugins/k", max_bytes=5):
        error = host.load(Manifest("k", kvstore=KVGrant()), KEEPER).exception(WAIT)
        assert isinstance(error, LoadFailed)
        assert "its store couldn't be opened" in str(error)
        assert isinstance(error.__cause__, Misuse)
    assert host.load(Manifest("k", kvstore=KVGrant()), KEEPER).result(WAIT).call("get", b"k").result(WAIT) == b""
    closed = Persistency(":memory:")
    closed.close()
    with PluginHost(closed) as other:
        error = other.load(Manifest("k", kvstore=KVGrant()), KEEPER).exception(WAIT)
        assert isinstance(error.__cause__, Closed)
        assert other.load({"id": "d"}, DEEDS).result(WAIT).call("echo", b"1").result(WAIT) == b"1"


def test_ids_of_every_kind_have_a_store(host: PluginHost) -> None:
    """S0-92: what is allowed as an id is one, for the job's name too."""
    for name in ("a.b", "Ümläut", "a b", "%2f", "CON", "x" * 128):
        plugin: Plugin = host.load(Manifest(name, kvstore=KVGrant()), KEEPER).result(WAIT)
        assert plugin.call("get", b"k").result(WAIT) == b""
        assert plugin.store is not None
        assert plugin.store.job.id == f"plugins/{name}"


# -- what is looked at -------------------------------------------------------------------------------------------------


def test_a_tick_looks_only_at_plugins_in_whose_line_somebody_waits(
    p: Persistency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thousands of idle plugins cost it nothing."""
    looked: list[str] = []
    look = Plugin._look

    def counted(plugin: Plugin, now: float) -> bool:
        looked.append(plugin.id)
        return look(plugin, now)

    monkeypatch.setattr(Plugin, "_look", counted)
    with PluginHost(p, calls_max=1, calls_wait=None) as host:
        for number in range(20):
            host.load({"id": f"idle{number}"}, DEEDS).result(WAIT).call("echo").result(WAIT)
        keeper = host.load(Manifest("keeper", kvstore=KVGrant()), KEEPER).result(WAIT)
        with held(keeper):
            replies = [keeper.call("get", b"key")]
            until(keeper, lambda now: now.running == 1)
            host._look(0.0)
            assert looked == []
            replies.append(keeper.call("get", b"key"))
            until(keeper, lambda now: now.waiting == 1)
            while not host.lined_up:
                threading.Event().wait(0.001)
            host._look(0.0)
            assert set(looked) == {"keeper"}
            assert host.lined_up == {keeper}
        assert [reply.result(WAIT) for reply in replies] == [b"", b""]
        host._look(0.0)
        assert host.lined_up == set()


# -- the log ----------------------------------------------------------------------------------------------------------


def test_what_happens_to_plugins_is_logged(host: PluginHost, caplog: pytest.LogCaptureFixture) -> None:
    """Each event has its fields for machines; a failure is a warning."""
    caplog.set_level(logging.INFO, logger="persistency.plugins")
    manifest = Manifest("v", kvstore=KVGrant())
    host.load(manifest, version(1)).result(WAIT)
    host.load(manifest, version(1)).result(WAIT)  # nothing happens
    host.load(manifest, version(2)).result(WAIT)
    host.load({"id": "w"}, b"(module").exception(WAIT)
    host.unload("v").result(WAIT)
    told = [
        (record.levelname, record.persistency_event, record.persistency_plugin, record.persistency_job)  # type: ignore[attr-defined]  # what `about` adds
        for record in caplog.records
        if record.name == "persistency.plugins"
    ]
    assert told == [
        ("INFO", "plugin_loaded", "v", "plugins/v"),
        ("INFO", "plugin_reloaded", "v", "plugins/v"),
        ("WARNING", "plugin_load_failed", "w", None),
        ("INFO", "plugin_unloaded", "v", "plugins/v"),
    ]
