"""Engines and compiling: what a guest may use of WebAssembly, and that a code is compiled once, whatever happens."""

from __future__ import annotations

import errno
import gc
import logging
import os
import platform
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistency import Closed, Misuse

pytest.importorskip("wasmtime", reason="needs the extra plugins")

from wasmtime import Config, Engine, Instance, Module, Store, Trap, TrapCode, WasmtimeError, wat2wasm

from persistency.plugins import compiling, engines
from persistency.plugins.compiling import WASM_BYTES_MAX, Compiled, Compiler
from persistency.plugins.compiling_process import Native
from persistency.plugins.engines import Engines

WAIT = 60.0
PROJECT = Path(__file__).parent.parent
WAT = '(module (func (export "answer") (result i32) i32.const 42))'
BINARY = bytes(wat2wasm(WAT))
LOOP = '(module (func (export "loop") (loop $again (br $again))))'


def numbered(number: int) -> bytes:
    """Give a code that is like no other."""
    return WAT.replace("42", str(number)).encode()


def answer(compiled: Compiled, *, fuel: bool = False) -> int:
    """Run the module's function."""
    with Store(compiled.engine) as store:
        store.set_epoch_deadline(1)
        if fuel:
            store.set_fuel(1_000)
        return int(Instance(store, compiled.module, []).exports(store)["answer"](store))  # type: ignore[operator]


class Making:
    """Stands for `compile_apart`: counts compilations, and holds each until the test lets it go on."""

    def __init__(self) -> None:
        self.made = self.running = self.most = 0
        self.lock = threading.Lock()
        self.entered = threading.Semaphore(0)
        self.go = threading.Event()
        self.fails: list[BaseException] = []
        self.engines = Engines()

    def __call__(self, code: bytes, *, fuel: bool, **limits: Any) -> Native:
        with self.lock:
            self.made += 1
            self.running += 1
            self.most = max(self.most, self.running)
            error = self.fails.pop() if self.fails else None
        self.entered.release()
        assert self.go.wait(WAIT)
        with self.lock:
            self.running -= 1
        if error is not None:
            raise error
        return Native(b"", bytes(Module(self.engines.engine(fuel), code).serialize()))


@pytest.fixture
def making(monkeypatch: pytest.MonkeyPatch) -> Iterator[Making]:
    """Hold compilations; none is held when the test is over."""
    made = Making()
    monkeypatch.setattr(compiling, "compile_apart", made)
    yield made
    made.go.set()


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Count those who begin to wait for somebody else's compilation."""
    arrived = threading.Semaphore(0)
    awaited = compiling._awaited

    def counted(flight: Any) -> Module | None:
        arrived.release()
        try:
            return awaited(flight)
        finally:
            del flight  # or an error that comes through would be kept by this frame, which it has

    monkeypatch.setattr(compiling, "_awaited", counted)
    return arrived


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    """Give as many threads as a test asks for."""
    with ThreadPoolExecutor(64) as pool:
        yield pool


def arrive(semaphore: threading.Semaphore, count: int) -> None:
    """Wait until so many have come."""
    for _ in range(count):
        assert semaphore.acquire(timeout=WAIT)


# -- one code, many who ask for it -------------------------------------------------------------------------------------


def test_a_storm_for_one_code_compiles_it_once(
    making: Making, arrivals: threading.Semaphore, threads: ThreadPoolExecutor
) -> None:
    """S1-28, S1-2 (BEAT: the reference builds two and throws one away): all sixteen get the same module."""
    compiler = Compiler(None, 2, None)
    asked = [threads.submit(compiler.compile, BINARY, fuel=False) for _ in range(16)]
    arrive(arrivals, 15)
    making.go.set()
    found = {future.result(WAIT) for future in asked}
    assert len(found) == 1
    assert (making.made, compiler.compiled) == (1, 1)
    assert answer(found.pop()) == 42


def test_codes_and_their_engines_are_told_apart(threads: ThreadPoolExecutor) -> None:
    """S1-27, S1-56: other bytes are another module; so is the same code where instructions are counted."""
    compiler = Compiler(None, 2, None)
    asked = {
        (number, fuel): threads.submit(compiler.compile, numbered(number), fuel=fuel)
        for number in range(8)
        for fuel in (False, True)
    }
    found = {key: future.result(WAIT) for key, future in asked.items()}
    assert len({id(compiled.module) for compiled in found.values()}) == compiler.compiled == 16
    assert len({id(compiled.engine) for compiled in found.values()}) == 2
    for (number, fuel), compiled in found.items():
        assert answer(compiled, fuel=fuel) == number


def test_at_most_so_many_are_compiled_at_once(
    making: Making, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1-21: the third waits for its turn, and is given it."""
    arrived = threading.Semaphore(0)

    class Room(threading.Semaphore):
        def __enter__(self) -> bool:
            arrived.release()
            return super().__enter__()

    monkeypatch.setattr(compiling.threading, "Semaphore", Room)
    compiler = Compiler(None, 2, None)
    asked = [threads.submit(compiler.compile, numbered(number), fuel=False) for number in range(12)]
    arrive(arrived, 12)
    arrive(making.entered, 2)
    making.go.set()
    assert [answer(future.result(WAIT)) for future in asked] == list(range(12))
    assert (making.most, making.made) == (2, 12)


def test_no_lock_is_held_while_code_is_compiled(
    making: Making, arrivals: threading.Semaphore, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """What is in memory or in the cache is given at once, even while as many are compiled as may be."""
    making.go.set()
    Compiler(tmp_path, 2, None).compile(numbered(1), fuel=False)
    compiler = Compiler(tmp_path, 2, None)
    shared = compiler.compile(numbered(2), fuel=False)
    making.go.clear()
    arrive(making.entered, 2)
    asked = [threads.submit(compiler.compile, numbered(number), fuel=False) for number in (3, 4, 4)]
    arrive(making.entered, 2)
    arrive(arrivals, 1)
    for lock in (compiler._lock, compiler.engines._lock):
        assert lock.acquire(blocking=False)
        lock.release()
    assert compiler.compile(numbered(2), fuel=False) == shared
    assert answer(compiler.compile(numbered(1), fuel=False)) == 1
    assert (compiler.compiled, compiler.from_cache) == (1, 1)
    assert not any(future.done() for future in asked)
    making.go.set()
    assert [answer(future.result(WAIT)) for future in asked] == [3, 4, 4]


def test_a_failure_reaches_all_who_wait_and_is_tried_again(
    making: Making, arrivals: threading.Semaphore, threads: ThreadPoolExecutor
) -> None:
    """S1-23, S1-25, S1-4 (BEAT: sticky, or forgotten): each gets the cause itself; the next one may succeed."""
    compiler = Compiler(None, 2, None)
    cause = WasmtimeError("the moon is in the wrong place")
    making.fails.append(cause)
    asked = [threads.submit(compiler.compile, BINARY, fuel=False) for _ in range(16)]
    arrive(arrivals, 15)
    making.go.set()
    assert [future.exception(WAIT) for future in asked] == [cause] * 16
    assert compiler.compiled == 0
    assert answer(compiler.compile(BINARY, fuel=False)) == 42
    assert (making.made, compiler.compiled) == (2, 1)


def test_who_waits_for_one_that_was_interrupted_compiles_it_itself(
    making: Making, arrivals: threading.Semaphore, threads: ThreadPoolExecutor
) -> None:
    """S1-23: Ctrl-C is its thread's own; another of those who waited takes over, and it's still compiled once."""
    compiler = Compiler(None, 2, None)
    making.fails.append(KeyboardInterrupt())

    def interrupted() -> None:
        with pytest.raises(KeyboardInterrupt):
            compiler.compile(BINARY, fuel=False)

    first = threads.submit(interrupted)
    arrive(making.entered, 1)
    others = [threads.submit(compiler.compile, BINARY, fuel=False) for _ in range(8)]
    arrive(arrivals, 8)
    making.go.set()
    first.result(WAIT)
    assert len({future.result(WAIT) for future in others}) == 1
    assert (making.made, compiler.compiled) == (2, 1)


def test_nothing_of_a_failure_stays(making: Making, arrivals: threading.Semaphore) -> None:
    """Its error, and the code with it, are gone as soon as nobody has them any more, without the collector."""
    compiler = Compiler(None, 2, None)
    left: list[weakref.ref[WasmtimeError]] = []

    def fail() -> None:
        try:
            compiler.compile(b"\0asm", fuel=False)
        except WasmtimeError as error:
            left.append(weakref.ref(error))

    gc.collect()
    gc.disable()
    try:
        asked = [threading.Thread(target=fail) for _ in range(3)]
        for thread in asked:
            thread.start()
        arrive(arrivals, 2)
        making.go.set()
        for thread in asked:
            thread.join(WAIT)
        assert [error() for error in left] == [None] * 3
        assert compiler._flights == {}
    finally:
        gc.enable()


def test_a_module_that_is_being_freed_is_given_to_nobody(
    threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asks while wasmtime frees a module, which lets other threads run, gets another one: not what is left."""
    freeing, go = threading.Event(), threading.Event()
    free = Module._delete

    def slow(module: Module, pointer: Any) -> None:
        freeing.set()
        assert go.wait(WAIT)
        free(module, pointer)

    compiler = Compiler(None, 2, None)
    held = [compiler.compile(BINARY, fuel=False)]
    monkeypatch.setattr(Module, "_delete", slow)
    last = threads.submit(held.clear)
    assert freeing.wait(WAIT)
    found = compiler.compile(BINARY, fuel=False)
    go.set()
    last.result(WAIT)
    monkeypatch.undo()
    assert answer(found) == 42
    assert compiler.compiled == 2


def test_a_module_is_shared_while_somebody_has_it(tmp_path: Path) -> None:
    """S1-27, S1-29: two plugins with one code have one module; when both are gone it comes from the cache again."""
    compiler = Compiler(tmp_path, 2, None)
    first = compiler.compile(BINARY, fuel=False)
    second = compiler.compile(bytes(bytearray(BINARY)), fuel=False)
    assert first == second
    assert (compiler.compiled, compiler.from_cache) == (1, 0)
    of_first = weakref.ref(first.module)
    del first
    assert compiler.compile(BINARY, fuel=False) == second
    del second
    gc.collect()
    assert of_first() is None
    assert answer(compiler.compile(BINARY, fuel=False)) == 42
    assert (compiler.compiled, compiler.from_cache) == (1, 1)


def test_a_closed_compiler_refuses_what_comes_and_what_waits(
    making: Making, threads: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for its turn is refused too, without being compiled."""
    arrived = threading.Semaphore(0)

    class Room(threading.Semaphore):
        def __enter__(self) -> bool:
            arrived.release()
            return super().__enter__()

    monkeypatch.setattr(compiling.threading, "Semaphore", Room)
    compiler = Compiler(None, 1, None)
    first = threads.submit(compiler.compile, numbered(1), fuel=False)
    arrive(making.entered, 1)
    second = threads.submit(compiler.compile, numbered(2), fuel=False)
    arrive(arrived, 2)
    compiler.close()
    compiler.close()
    with pytest.raises(Closed, match="closed"):
        compiler.compile(numbered(3), fuel=False)
    making.go.set()
    assert answer(first.result(WAIT)) == 1
    assert isinstance(second.exception(WAIT), Closed)
    assert making.made == 1


def test_a_storm_of_codes_some_of_which_are_bad(threads: ThreadPoolExecutor, tmp_path: Path) -> None:
    """Each gets what its own code deserves, whoever else asks at the same time; nothing is left on its way."""
    compiler = Compiler(tmp_path, 3, None)
    asked: list[tuple[int, Future[tuple[Engine, Module]]]] = []
    for turn in range(240):
        number = turn % 12
        code = numbered(number) if number % 3 else b"\0asm\1\0\0\0" + bytes([number + 100])
        asked.append((number, threads.submit(compiler.compile, code, fuel=number % 2 == 0)))
    wait([future for _, future in asked], WAIT)
    for number, future in asked:
        if number % 3:
            assert answer(future.result(), fuel=number % 2 == 0) == number
        else:
            assert isinstance(future.exception(), WasmtimeError)
    assert compiler._flights == {}
    assert compiler.compiled == 8


# -- what is code ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [BINARY, WAT.encode(), f"\n ;; é\n{WAT}".encode()])
@pytest.mark.parametrize("fuel", [False, True])
def test_both_formats_are_code(code: bytes, fuel: bool) -> None:
    """Binary, and WAT in UTF-8."""
    assert answer(Compiler(None, 1, None).compile(code, fuel=fuel), fuel=fuel) == 42


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (b"", WasmtimeError, "unexpected end-of-file"),
        (b"\0", WasmtimeError, "unexpected end-of-file"),
        (b"\0asm", WasmtimeError, "unexpected end-of-file"),
        (b"\0asm\2\0\0\0", WasmtimeError, "unknown binary version"),
        (b"\0ELF\1\0\0\0", WasmtimeError, "magic header not detected"),
        (BINARY[:-3], WasmtimeError, "unexpected end"),
        (BINARY + b"\0", WasmtimeError, "unexpected end"),
        (b"\0asm\x0d\0\1\0", WasmtimeError, "component model"),
        (b"(component)", WasmtimeError, "component model"),
        (b"(module", WasmtimeError, "expected"),
        (b"(module (func (result i32)))", WasmtimeError, "type mismatch"),
        (b"hello", WasmtimeError, "expected"),
        (b"(" * 100_000, WasmtimeError, "expected"),
        (b"\x7fELF\2\1\1\0\xff", ValueError, "neither WebAssembly, which begins with b'\\0asm', nor its text"),
        (b"\x89PNG\r\n\x1a\n", ValueError, "it begins with b'\\x89PNG"),
        (b"\xff\xfe(\0m\0", ValueError, "neither WebAssembly"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_code_says_why(code: bytes, kind: type[Exception], words: str) -> None:
    """S1-25: the raw error, in its own words; and again each time it's asked for."""
    compiler = Compiler(None, 1, None)
    for _ in range(2):
        with pytest.raises(kind) as caught:
            compiler.compile(code, fuel=False)
        assert words in str(caught.value)
    assert compiler.compiled == 0


def test_too_much_code_is_refused_before_it_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit is told; what is just within it is code like any other."""
    compiler = Compiler(None, 1, None)
    with pytest.raises(ValueError, match=f"the code has {WASM_BYTES_MAX + 1} bytes, at most {WASM_BYTES_MAX}"):
        compiler.compile(bytes(WASM_BYTES_MAX + 1), fuel=False)
    monkeypatch.setattr(compiling, "WASM_BYTES_MAX", len(BINARY))
    assert answer(compiler.compile(BINARY, fuel=False)) == 42
    with pytest.raises(ValueError, match="at most"):
        compiler.compile(BINARY + b"\0", fuel=False)


@given(st.data())
@settings(deadline=None, max_examples=30)  # each is a process
def test_whatever_comes_is_a_module_or_an_error_in_words(data: st.DataObject) -> None:
    """Bytes of any kind, and right ones with a piece replaced: never anything but a module or one of the two errors."""
    base = data.draw(st.sampled_from([BINARY, WAT.encode(), LOOP.encode(), bytes(wat2wasm(LOOP)), b""]))
    at = data.draw(st.integers(0, len(base)))
    code = base[:at] + data.draw(st.binary(max_size=12)) + base[at + data.draw(st.integers(0, 8)) :]
    compiler = Compiler(None, 1, None)
    try:
        compiled = compiler.compile(code, fuel=False)
    except (WasmtimeError, ValueError) as error:
        assert str(error)
        assert not isinstance(error, Misuse)
    else:
        assert isinstance(compiled.engine, Engine)
        assert isinstance(compiled.module, Module)


# -- the engines -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("(module (memory 1) (memory 1))", "multiple memories"),
        ("(module (memory i64 1))", "memory64"),
        ("(module (memory 1 1 shared))", "threads"),
        ('(module (import "a" "m" (memory 1 1 shared)))', "threads"),
        ("(module (memory 1 (pagesize 1)))", "custom"),
        ("(module (tag (param i32)))", "exceptions"),
        ("(module (type (struct)))", "gc"),
        ("(module (func (param externref)))", "gc"),
        ("(module (type $f (func)) (func (param (ref $f))))", "function references"),
        ("(module (func (result i64 i64) (i64.mul_wide_s (i64.const 1) (i64.const 2))))", "wide arithmetic"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("fuel", [False, True])
def test_what_a_guest_may_not_use_is_told_as_it_is_compiled(code: str, words: str, fuel: bool) -> None:
    """Whatever the next wasmtime takes for granted."""
    with pytest.raises(WasmtimeError) as caught:
        Compiler(None, 1, None).compile(code.encode(), fuel=fuel)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "code",
    [
        "(module (func (result i32 i32) i32.const 1 i32.const 2))",
        "(module (memory 1) (func (memory.fill (i32.const 0) (i32.const 1) (i32.const 2))))",
        "(module (table 1 funcref) (func (param funcref)))",
        "(module (func (result v128) (i32x4.splat (i32.const 1))))",
        "(module (func $f (return_call $f)))",
    ],
)
def test_what_compilers_make_today_is_taken(code: str) -> None:
    """Several results, bulk memory, tables of functions, SIMD, tail calls."""
    compiler = Compiler(None, 1, None)
    compiler.compile(code.encode(), fuel=False)
    assert compiler.compiled == 1


def test_each_setting_is_one_that_wasmtime_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelled one would set nothing, and say nothing."""
    for name in engines._SETTINGS:
        assert isinstance(vars(Config)[name], property), name
    monkeypatch.setitem(engines._SETTINGS, "wasm_thread", False)
    with pytest.raises(AttributeError, match="wasm_thread"):
        Engines().engine(False)


def test_engines_are_made_once(threads: ThreadPoolExecutor) -> None:
    """Sixteen threads that ask at once get the same two."""
    made = Engines()
    made.increment_epoch()  # there is none yet
    asked = [threads.submit(made.engine, turn % 2 == 0) for turn in range(16)]
    assert {future.result(WAIT) for future in asked} == {made.engine(True), made.engine(False)}
    assert len(made._made) == 2


@pytest.mark.parametrize("fuel", [False, True])
def test_a_tick_stops_guests_of_both_engines(fuel: bool) -> None:
    """S1-50: each engine that was made is ticked."""
    compiler = Compiler(None, 1, None)
    compiler.engines.engine(not fuel)
    compiled = compiler.compile(LOOP.encode(), fuel=fuel)
    with Store(compiled.engine) as store:
        store.set_epoch_deadline(1)
        if fuel:
            store.set_fuel(2**62)
        loop: Callable[[Store], None] = Instance(store, compiled.module, []).exports(store)["loop"]  # type: ignore[assignment]
        compiler.engines.increment_epoch()
        with pytest.raises(Trap) as caught:
            loop(store)
        assert caught.value.trap_code == TrapCode.INTERRUPT


def test_instructions_are_counted_only_where_that_was_asked_for() -> None:
    """The same loop runs out of fuel by one engine; by the other, fuel can't even be set."""
    compiler = Compiler(None, 1, None)
    compiled = compiler.compile(LOOP.encode(), fuel=True)
    with Store(compiled.engine) as store:
        store.set_epoch_deadline(1)
        store.set_fuel(1_000)
        loop: Callable[[Store], None] = Instance(store, compiled.module, []).exports(store)["loop"]  # type: ignore[assignment]
        with pytest.raises(Trap) as caught:
            loop(store)
        assert caught.value.trap_code == TrapCode.OUT_OF_FUEL
    with Store(compiler.engines.engine(False)) as store, pytest.raises(WasmtimeError, match="fuel"):
        store.set_fuel(1_000)


def test_a_guest_has_a_stack_of_its_own_measure() -> None:
    """It is stopped long before the thread's own stack ends."""
    code = '(module (func $f (export "loop") (param i64) (result i64) (i64.add (call $f (local.get 0)) (local.get 0))))'
    compiled = Compiler(None, 1, None).compile(code.encode(), fuel=False)
    with Store(compiled.engine) as store:
        store.set_epoch_deadline(1)
        loop: Any = Instance(store, compiled.module, []).exports(store)["loop"]
        with pytest.raises(Trap) as caught:
            loop(store, 1)
        assert caught.value.trap_code == TrapCode.STACK_OVERFLOW


def test_the_fingerprint_tells_apart_what_code_is_compiled_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The release of wasmtime, every setting, the system and the machine; and nothing that changes from run to run."""
    fingerprints = [Engines().fingerprint(fuel) for fuel in (False, True)]
    assert fingerprints == [Engines().fingerprint(fuel) for fuel in (False, True)]

    def differs() -> None:
        fingerprints.append(Engines().fingerprint(False))
        assert len(set(fingerprints)) == len(fingerprints)

    for name, value in engines._SETTINGS.items():
        with monkeypatch.context() as patch:
            patch.setitem(engines._SETTINGS, name, not value if isinstance(value, bool) else "other")
            differs()
    for owner, name, other in [(platform, "machine", lambda: "vax"), (engines, "_version", lambda: "50.0.0")]:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, other)
            differs()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "plan9")
        differs()


def run(program: str) -> str:
    """Run a program beside the package; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=WAIT, check=False
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


def test_a_bad_access_is_a_trap_whoever_handles_signals() -> None:
    """A service may switch `faulthandler` on at any time: a guest's fault must not be the end of the process."""
    program = """
import faulthandler
from wasmtime import Instance, Store, Trap
from persistency.plugins.compiling import Compiler
compiler = Compiler(None, 1, None)
code = b'''(module (memory 1) (table 1 funcref)
  (func (export "read") (drop (i32.load (i32.const 0x7ffffff0))))
  (func (export "write") (i32.store offset=0xfffffff0 (i32.const -1) (i32.const 1)))
  (func (export "end") unreachable)
  (func (export "divide") (param i32) (drop (i32.div_s (i32.const 1) (local.get 0))))
  (func (export "nobody") (call_indirect (i32.const 0)))
  (func $deep (export "deep") (call $deep) (call $deep)))'''
for turn in range(2):
    for fuel in (False, True):
        compiled = compiler.compile(code, fuel=fuel)
        for name in ("read", "write", "end", "divide", "nobody", "deep"):
            with Store(compiled.engine) as store:
                store.set_epoch_deadline(1)
                if fuel:
                    store.set_fuel(10**9)
                try:
                    Instance(store, compiled.module, []).exports(store)[name](store, *[0] * (name == "divide"))
                except Trap as trap:
                    print(trap.trap_code.name)
    faulthandler.enable()
"""
    codes = "MEMORY_OUT_OF_BOUNDS MEMORY_OUT_OF_BOUNDS UNREACHABLE INTEGER_DIVISION_BY_ZERO INDIRECT_CALL_TO_NULL"
    assert run(program).split() == [*codes.split(), "STACK_OVERFLOW"] * 4


def test_a_forked_child_can_compile_with_a_compiler_of_its_own() -> None:
    """The threads that wasmtime could share the work among don't outlive a fork: the child would wait for them."""
    program = f"""
import os, signal
from persistency.plugins.compiling import Compiler
code = {WAT!r}.replace("(func", '(func (export "x")) (func').encode()
kept = Compiler(None, 1, None)
kept.compile(code, fuel=False)
child = os.fork()
if child == 0:
    signal.alarm(20)
    Compiler(None, 1, None).compile(code, fuel=False)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    assert run(program) == "7\n"


# -- with a cache ------------------------------------------------------------------------------------------------------


def entry_of(directory: Path) -> Path:
    """Return the one file in the cache."""
    (path,) = directory.iterdir()
    return path


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the events that were logged."""
    return [getattr(record, "persistency_event", "") for record in caplog.records]


@pytest.mark.parametrize("fuel", [False, True])
@pytest.mark.parametrize("code", [BINARY, WAT.encode()], ids=["binary", "text"])
def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path, code: bytes, fuel: bool) -> None:
    """S1-3, S1-27: the code isn't even looked at then; it runs the same, down to the fuel it takes."""
    used = []
    for is_compiled in (1, 0):
        compiler = Compiler(tmp_path, 2, None)
        compiled = compiler.compile(code, fuel=fuel)
        assert (compiler.compiled, compiler.from_cache) == (is_compiled, 1 - is_compiled)
        assert answer(compiled, fuel=fuel) == 42
        with Store(compiled.engine) as store:
            store.set_epoch_deadline(1)
            if fuel:
                store.set_fuel(1_000)
            Instance(store, compiled.module, []).exports(store)["answer"](store)  # type: ignore[operator]
            used.append(store.get_fuel() if fuel else 0)
    assert used[0] == used[1]


def test_a_storm_for_a_cached_code_reads_it_once(
    monkeypatch: pytest.MonkeyPatch, arrivals: threading.Semaphore, threads: ThreadPoolExecutor, tmp_path: Path
) -> None:
    """S1-28: what comes from the cache comes once, too."""
    Compiler(tmp_path, 2, None).compile(BINARY, fuel=False)
    compiler = Compiler(tmp_path, 2, None)
    assert compiler._cache is not None
    go, get, reads = threading.Event(), compiler._cache.get, []

    def held(name: str) -> bytes | None:
        reads.append(name)
        assert go.wait(WAIT)
        return get(name)

    monkeypatch.setattr(compiler._cache, "get", held)
    asked = [threads.submit(compiler.compile, BINARY, fuel=False) for _ in range(16)]
    arrive(arrivals, 15)
    go.set()
    assert len({future.result(WAIT) for future in asked}) == 1
    assert (len(reads), compiler.compiled, compiler.from_cache) == (1, 0, 1)


def test_a_damaged_entry_is_told_compiled_again_and_replaced(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A flipped bit in native code is never run."""
    Compiler(tmp_path, 2, None).compile(BINARY, fuel=False)
    path = entry_of(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100] + bytes([whole[-100] ^ 1]) + whole[-99:])
    compiler = Compiler(tmp_path, 2, None)
    assert answer(compiler.compile(BINARY, fuel=False)) == 42
    assert (compiler.compiled, compiler.from_cache) == (1, 0)
    assert events(caplog) == ["compile_cache_damaged"]
    assert caplog.records[0].levelno == logging.WARNING
    assert path.name in caplog.records[0].message
    again = Compiler(tmp_path, 2, None)
    assert answer(again.compile(BINARY, fuel=False)) == 42
    assert (again.compiled, again.from_cache) == (0, 1)


@pytest.mark.parametrize("foreign", ["other settings", "garbage", "nothing", "no module"])
def test_code_that_wasmtime_refuses_is_compiled_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, foreign: str
) -> None:
    """A sound entry made for another processor, or by another build: told as such, and replaced."""
    caplog.set_level(logging.INFO)
    compiler = Compiler(tmp_path, 2, None)
    config = Config()
    config.cranelift_opt_level = "none"
    config.epoch_interruption = False
    data = {
        "other settings": Native(b"", bytes(Module(Engine(config), BINARY).serialize())).packed(),
        "garbage": b"native code" * 1_000,
        "nothing": b"",
        "no module": Native(b"x", b"").packed(),
    }[foreign]
    name = compiling.hashlib.sha256(BINARY).hexdigest() + "-" + compiler.engines.fingerprint(False)
    assert compiler._cache is not None
    compiler._cache.put(name, data)
    assert answer(compiler.compile(BINARY, fuel=False)) == 42
    assert (compiler.compiled, compiler.from_cache) == (1, 0)
    assert events(caplog) == ["compile_cache_foreign"]
    again = Compiler(tmp_path, 2, None)
    again.compile(BINARY, fuel=False)
    assert (again.compiled, again.from_cache) == (0, 1)


def test_another_release_of_wasmtime_has_entries_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two services with two releases share a directory, and don't undo one another's."""
    for release in ("50.0.1", "51.0.0", "50.0.1", "51.0.0"):
        monkeypatch.setattr(engines, "_version", lambda release=release: release)
        compiler = Compiler(tmp_path, 2, None)
        compiler.compile(BINARY, fuel=False)
        made = compiler.compiled
    assert (made, len(list(tmp_path.iterdir()))) == (0, 2)


def test_a_full_disk_fails_no_load_and_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each code is compiled, and nothing half-written stays; once there is room again it is kept again."""
    compiler = Compiler(tmp_path, 2, None)

    def full(*_arguments: object, **_more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert [answer(compiler.compile(numbered(number), fuel=False)) for number in range(4)] == [0, 1, 2, 3]
    assert compiler.compiled == 4
    assert events(caplog) == ["compile_cache_unusable"]
    assert "No space left" in caplog.records[0].message
    assert list(tmp_path.iterdir()) == []
    compiler.compile(numbered(5), fuel=False)
    assert len(list(tmp_path.iterdir())) == 1


def test_a_directory_that_vanished_is_made_again(tmp_path: Path) -> None:
    """Somebody may clear caches away while the service runs."""
    directory = tmp_path / "cache"
    compiler = Compiler(directory, 2, None)
    compiler.compile(numbered(1), fuel=False)
    entry_of(directory).unlink()
    directory.rmdir()
    compiler.compile(numbered(2), fuel=False)
    assert entry_of(directory).stat().st_size > 1_000


def test_a_bad_directory_is_refused_as_the_compiler_is_made(tmp_path: Path) -> None:
    """Before any plugin is loaded."""
    tmp_path.chmod(0o777)
    with pytest.raises(Misuse, match=r"cache_dir .* can be written to by others \(mode 0777\): pass a directory"):
        Compiler(tmp_path, 2, None)


def test_without_a_directory_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cache_dir=None` touches no disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compiling, "CompileCache", pytest.fail)
    Compiler(None, 2, 1_000).compile(BINARY, fuel=False)
    assert list(tmp_path.iterdir()) == []
