"""Compiling apart: hostile code costs a child process and nothing more, and of that nothing is left."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from persistency import Closed, Misuse, Persistency

pytest.importorskip("wasmtime", reason="needs the extra plugins")

from wasmtime import Module, WasmtimeError, wat2wasm

from persistency.plugins import LoadFailed, PluginHost, compiling_process
from persistency.plugins.compiling import COMPILE_BYTES_MAX, Compiler
from persistency.plugins.compiling_process import OUTLINE_BYTES_MAX, Children, Native, compile_apart
from persistency.plugins.engines import Engines
from persistency.plugins.shape import shape_of

WAIT = 120.0
GOOD = b"""(module (memory (export "memory") 1)
  (func (export "alloc") (param i32) (result i32) (i32.const 64))
  (func (export "echo") (param i32 i32) (result i64)
    (i64.or (i64.shl (i64.extend_i32_u (local.get 0)) (i64.const 32)) (i64.extend_i32_u (local.get 1)))))"""
BINARY = bytes(wat2wasm(GOOD.decode()))


def memory_bomb() -> bytes:
    """Give some kilobytes of code, blocks of a thousand parameters, that take wasmtime gigabytes to compile."""
    many = " ".join(["i64"] * 1000)
    zeros = "i64.const 0 " * 1000
    block = f"(block (param {many}) (result {many}) (br_if 0 (i32.const 0))) "
    text = f"(module (func {zeros} {block * 1500} {'drop ' * 1000}))"
    binary = bytes(wat2wasm(text))
    assert len(binary) < 20_000
    return binary


def time_bomb() -> bytes:
    """Give 210 KB of code, loops within loops, that take wasmtime minutes to compile."""
    depth = 30_000
    body = b"\0" + b"\x03\x40" * depth + b"\x20\x00\x0d\x00\x0b" * depth + b"\x0b"
    return (
        b"\0asm\1\0\0\0"
        + section(1, b"\1\x60\1\x7f\0")
        + section(3, b"\1\0")
        + section(10, b"\1" + leb(len(body)) + body)
    )


def leb(number: int) -> bytes:
    """Give a number as WebAssembly has it."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def section(kind: int, data: bytes) -> bytes:
    """Give a section of a module."""
    return bytes([kind]) + leb(len(data)) + data


class Started:
    """Watches the children that are started: `born` is released for each."""

    def __init__(self) -> None:
        self.born = threading.Semaphore(0)
        self.children: list[subprocess.Popen[bytes]] = []

    def over(self, start: Callable[[], subprocess.Popen[bytes]]) -> Callable[[], subprocess.Popen[bytes]]:
        """Watch what `start` starts."""

        def started() -> subprocess.Popen[bytes]:
            self.children.append(start())
            self.born.release()
            return self.children[-1]

        return started


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    """Watch the children; when the test is over each was waited for, and no descriptor is left."""
    watched = Started()
    compile_apart(BINARY, fuel=False, seconds=WAIT, memory_bytes=COMPILE_BYTES_MAX)  # what opens something once
    before = sorted(os.listdir("/proc/self/fd")) if sys.platform == "linux" else []
    monkeypatch.setattr(compiling_process, "_started", watched.over(compiling_process._started))
    yield watched
    for child in watched.children:
        assert child.returncode is not None
        with pytest.raises(ChildProcessError):
            os.waitpid(child.pid, os.WNOHANG)
        assert child.stdin is not None
        assert child.stdin.closed
        assert child.stdout is not None
        assert child.stdout.closed
        assert child.stderr is not None
        assert child.stderr.closed
    if sys.platform == "linux":
        assert sorted(os.listdir("/proc/self/fd")) == before


def apart(code: bytes, **other: Any) -> Native:
    """Compile with the limits that a host has, or others."""
    limits = {"fuel": False, "seconds": WAIT, "memory_bytes": COMPILE_BYTES_MAX, **other}
    return compile_apart(code, **limits)


@pytest.mark.parametrize("fuel", [False, True])
def test_the_child_gives_what_this_process_would_have_made(started: Started, fuel: bool) -> None:
    """It has the same settings: the engine here takes the code, the other engine doesn't."""
    data = apart(BINARY, fuel=fuel).module
    module = Module.deserialize(Engines().engine(fuel), data)
    assert [export.name for export in module.exports] == ["memory", "alloc", "echo"]
    with pytest.raises(WasmtimeError):
        Module.deserialize(Engines().engine(not fuel), data)
    assert len(started.children) == 1


@pytest.mark.parametrize("fuel", [False, True])
def test_the_fingerprint_is_the_same_in_the_child(monkeypatch: pytest.MonkeyPatch, fuel: bool) -> None:
    """The same release of wasmtime, found by the same path; what is kept under it is what the child made."""
    asked = """
from persistency.plugins.engines import Engines
sys.stdout.write(Engines().fingerprint(order["fuel"]))
"""
    program = compiling_process._PROGRAM.partition("from persistency.plugins.compiling_process")[0] + asked
    monkeypatch.setattr(compiling_process, "_PROGRAM", program)
    with compiling_process._started() as child:
        order = json.dumps(compiling_process._order(fuel, WAIT, 0)).encode()
        said, errors = child.communicate(order + b"\n", WAIT)
    assert (said.decode(), errors) == (Engines().fingerprint(fuel), b"")


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (b"", "unexpected end-of-file"),
        (BINARY[:-3], "unexpected end"),
        (bytes(wat2wasm("(module (func))")) + b"\0", "unexpected end"),
    ],
)
def test_bad_code_is_told_in_wasmtimes_words(started: Started, code: bytes, words: str) -> None:
    """As if it had been compiled here."""
    with pytest.raises(WasmtimeError) as here:
        Module(Engines().engine(False), code)
    with pytest.raises(WasmtimeError, match=words) as there:
        apart(code)
    assert str(there.value) == str(here.value)
    assert len(started.children) == 1


def test_code_that_needs_too_much_memory_is_refused(started: Started) -> None:
    """It ends the child, whose limit is named."""
    with pytest.raises(ValueError, match="needs more than 536870912 bytes of memory to compile"):
        apart(memory_bomb(), memory_bytes=512 * 1_048_576)
    assert len(started.children) == 1


def test_code_that_takes_too_long_is_refused(started: Started) -> None:
    """The child is killed, and the limit is named."""
    with pytest.raises(TimeoutError, match="longer than 2 s to compile"):
        apart(time_bomb(), seconds=2.0)
    assert [child.returncode for child in started.children] == [-9]


def test_the_host_and_its_other_plugins_outlive_both_bombs(started: Started) -> None:
    """Each is a `LoadFailed` that says why; a plugin that was loaded answers, and another one is loaded."""
    with Persistency(":memory:") as p, PluginHost(p, compile_timeout=WAIT) as host:
        plugin = host.load({"id": "good"}, GOOD).result(WAIT)
        host.compiler._memory_bytes = 512 * 1_048_576
        with pytest.raises(LoadFailed, match="'fat' couldn't be compiled: the code needs more than 536870912 bytes"):
            host.load({"id": "fat"}, memory_bomb()).result(WAIT)
        host.compiler._seconds = 2.0
        with pytest.raises(LoadFailed, match="'slow' couldn't be compiled: the code takes longer than 2 s") as caught:
            host.load({"id": "slow"}, time_bomb()).result(WAIT)
        assert "compile_timeout" in str(caught.value.hint)
        assert plugin.call("echo", b"still here").result(WAIT) == b"still here"
        host.compiler._seconds = WAIT
        other = host.load({"id": "other"}, GOOD.replace(b"i32.const 64", b"i32.const 128")).result(WAIT)
        assert other.call("echo", b"so am I").result(WAIT) == b"so am I"
        assert list(host) == ["good", "other"]
    assert len(started.children) == 4


def text_bomb() -> bytes:
    """Give 16 MB of text, short for millions of values on the stack, that take gigabytes to translate."""
    return b"(module (func (local " + b"i32 " * 4_000_000 + b")))"


def test_text_is_translated_in_the_child(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole modules, and those that take too much memory for that alone: this process looks at none."""
    assert apart(GOOD).outline == apart(BINARY).outline
    with pytest.raises(ValueError, match="needs more than 536870912 bytes of memory to compile"):
        apart(text_bomb(), memory_bytes=512 * 1_048_576)
    monkeypatch.setattr(compiling_process, "wat2wasm", pytest.fail)
    compiler = Compiler(None, 1, None)
    assert compiler.compile(GOOD, fuel=False).module.exports
    assert len(started.children) == 4


def test_nothing_else_translates_text() -> None:
    """Of all modules of the package: a load would do in this process what the child is there for."""
    package = Path(compiling_process.__file__).parent
    assert [path.stem for path in package.glob("*.py") if "wat2wasm" in path.read_text()] == ["compiling_process"]


def test_the_outline_is_all_that_is_said_of_a_module(started: Started) -> None:
    """Without code, data and names, whichever format it came in; it is what the shape is read off."""
    text = b"""(module (type (func (param v128))) (import "a" "b" (func $f (param i32))) (memory (export "m") 3)
      (table funcref (elem $f)) (global i32 (i32.const 1)) (data (i32.const 0) "secret") (@custom "c" "custom")
      (func (export "g") (result i64) (i64.const 1)) (func (export "h") (type 0)))"""
    whole = bytes(wat2wasm(text.decode()))
    for code in (text, whole, whole + section(0, b"\1x" + bytes(3 * OUTLINE_BYTES_MAX))):
        outline = apart(code).outline
        assert shape_of(outline) == shape_of(whole)
        assert len(outline) < len(whole)
        assert b"secret" not in outline
        assert b"custom" not in outline


def test_code_with_too_much_to_list_is_refused(started: Started) -> None:
    """Sixty thousand types of a thousand parameters would take this process many seconds to read."""
    types = b"\x60" + leb(1_000) + b"\x7f" * 1_000 + b"\0"
    for count, is_fine in ((1_000, True), (1_100, False)):
        code = b"\0asm\1\0\0\0" + section(1, leb(count) + types * count)
        if is_fine:
            assert len(apart(code).outline) == len(code)
            continue
        with pytest.raises(ValueError, match=f"take {len(code)} bytes to list, at most {OUTLINE_BYTES_MAX} are"):
            apart(code)


def test_native_code_is_packed_and_unpacked() -> None:
    """And anything else becomes what is no module."""
    for native in (Native(b"", b""), Native(b"outline", b""), Native(b"", b"module"), Native(b"outline", b"module")):
        assert Native.unpacked(native.packed()) == native
    assert {Native.unpacked(data).module for data in (b"", b"x", bytes(8), b"\x7fELF" * 9)} == {b""}


def test_what_is_said_of_a_text_cannot_move_a_terminal(started: Started) -> None:
    """Wasmtime quotes the line that it finds wrong."""
    for code in ("(module (\x1b[31mred\r\x9b\u202e)", '(module (func $"\x1b[31m") (func $"\x1b[31m"))'):
        with pytest.raises(WasmtimeError) as caught:
            apart(code.encode())
        said = str(caught.value)
        assert said.replace("\n", "").isprintable()
        assert "\\x1b[31m" in said


def test_a_child_that_somebody_else_kills_is_told(started: Started) -> None:
    """With the signal; the same code is compiled by the next one."""
    with Persistency(":memory:") as p, PluginHost(p) as host:
        reply = host.load({"id": "slow"}, time_bomb())
        assert started.born.acquire(timeout=WAIT)
        os.kill(started.children[0].pid, 15)
        with pytest.raises(LoadFailed, match="process that compiled the code was ended by signal 15") as caught:
            reply.result(WAIT)
        assert isinstance(caught.value.__cause__, ChildProcessError)
        assert host.load({"id": "slow"}, GOOD).result(WAIT).call("echo", b"x").result(WAIT) == b"x"


def test_a_host_that_is_closed_waits_for_no_bomb(started: Started) -> None:
    """What is compiled is killed, what waits for its turn isn't begun: both loads raise `Closed`."""
    with Persistency(":memory:") as p:
        host = PluginHost(p, compiles_max=1, compile_timeout=10 * WAIT)
        replies = [
            host.load({"id": f"slow-{number}"}, time_bomb() + section(0, bytes([1, 97 + number]))) for number in (0, 1)
        ]
        assert started.born.acquire(timeout=WAIT)
        host.close(WAIT)
        for reply in replies:
            with pytest.raises(Closed):
                reply.result(WAIT)
    assert [child.returncode for child in started.children] == [-9]


def test_children_that_are_started_too_late_are_killed_too(started: Started) -> None:
    """Between the look whether it is closed and the start of a child, it may be closed."""
    children = Children()
    children.kill()
    with pytest.raises(ChildProcessError, match="signal 9"):
        apart(BINARY, among=children)
    compiler = Compiler(None, 1, None)
    compiler._children.kill()
    with pytest.raises(ChildProcessError, match="signal 9"):
        compiler.compile(BINARY, fuel=False)
    compiler.close()
    with pytest.raises(Closed):
        compiler.compile(BINARY, fuel=False)


def test_many_are_compiled_at_once(started: Started) -> None:
    """Each gets its own answer."""
    codes = [bytes(wat2wasm(f'(module (func (export "f{number}")))')) for number in range(8)]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(apart, codes))
    engine = Engines().engine(False)
    names = [Module.deserialize(engine, each.module).exports[0].name for each in made]
    assert names == [f"f{number}" for number in range(8)]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it ends when its processor time is used up")
def test_a_child_ends_with_its_parent() -> None:
    """A parent that is killed while a bomb is compiled leaves nobody behind."""
    program = """
import sys
from persistency.plugins import compiling_process
start = compiling_process._started
def started():
    child = start()
    close = child.stdin.close
    def closed():  # when the child has read the code, which is more than a pipe holds
        close()
        print(child.pid, flush=True)
    child.stdin.close = closed
    return child
compiling_process._started = started
compiling_process.compile_apart(sys.stdin.buffer.read(), fuel=False, seconds=600, memory_bytes=2**31)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        parent.stdin.write(time_bomb())
        parent.stdin.close()
        child = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            parent.wait(WAIT)
            ready, _, _ = select.select([child], [], [], WAIT)
            assert ready == [child]
        finally:
            os.close(child)


@pytest.mark.parametrize("missing", ["", "frozen", "gone"])
def test_where_no_process_can_be_started_it_is_said(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """An embedded or frozen interpreter, or one whose file is gone."""
    if missing == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    else:
        monkeypatch.setattr(sys, "executable", missing and "/nowhere/python")
    words = "No such file" if missing == "gone" else "no sys.executable that is a Python"
    with (
        Persistency(":memory:") as p,
        PluginHost(p) as host,
        pytest.raises(LoadFailed, match=f"couldn't be compiled: .*{words}") as caught,
    ):
        host.load({"id": "a"}, GOOD).result(WAIT)
    assert isinstance(caught.value.__cause__, OSError)


def test_the_environment_and_open_files_stay_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The child has what it needs to start."""
    monkeypatch.setenv("SECRET_OF_THE_SERVICE", "1")
    monkeypatch.setenv("PYTHONSTARTUP", "x")
    asked = "import os, sys; print(sorted(os.environ), os.getsid(0) == os.getpid())"
    monkeypatch.setattr(compiling_process, "_PROGRAM", asked)
    with compiling_process._started() as child:
        said, _ = child.communicate(timeout=WAIT)
    assert b"SECRET" not in said
    assert b"PYTHON" not in said
    assert said.strip().endswith(b"True")


@pytest.mark.parametrize("said", [b"", b"M", b"M" + bytes(8), b"M" + (5).to_bytes(8, "big") + b"four", b"?" + bytes(8)])
def test_an_answer_that_is_not_whole_is_none(said: bytes) -> None:
    """However the child ended: where signals of children are ignored its status isn't known."""
    if said == b"M" + bytes(8):
        assert compiling_process._understood(said, "", 0, 1.0, 1) == (b"", b"")
        return
    with pytest.raises(ChildProcessError, match="ended with status 0: odd"):
        compiling_process._understood(said, "odd", 0, 1.0, 1)


def test_processor_time_that_is_used_up_is_time() -> None:
    """Of a child whose parent was stopped."""
    with pytest.raises(TimeoutError, match="longer than 3 s"):
        compiling_process._understood(b"", "", -24, 3.0, 1)


@pytest.mark.parametrize("value", [0, -1, None, "1", float("nan")])
def test_a_compile_timeout_is_a_time(value: Any) -> None:
    """More than no time at all."""
    with Persistency(":memory:") as p, pytest.raises(Misuse, match="compile_timeout must be"):
        PluginHost(p, compile_timeout=value)
