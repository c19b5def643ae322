"""Calling: one call of a guest's function, from a fresh instance to the bytes it answers with.

Every call has an instance of its own: nothing a call leaves in memory is there for the next one.

Rules:
  1. Whatever happens, the store is closed, and with it goes all that the guest had.
  2. What a guest returns is a number, and no more: it is checked against the memory before anything is read.
  3. Every way a guest can fail is an error of its own, which names the plugin and the function. wasmtime's own are put
     into words here, and end here.

Doesn't know: threads, lines, who asks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, NamedTuple

from wasmtime import ExitTrap, Func, Memory, Store, Trap, TrapCode, WasiConfig, WasmtimeError

from persistency.plugins import abi
from persistency.plugins.compiling import Compiled
from persistency.plugins.context import CallContext, current
from persistency.plugins.errors import (
    BadAnswer,
    CallFailed,
    FunctionNotFound,
    FunctionNotImplemented,
    OutOfFuel,
    PluginTimeout,
    PluginTrapped,
)
from persistency.plugins.guestmemory import Fault, GuestMemory
from persistency.plugins.linking import PAGE_BYTES, Linked, cut, said
from persistency.plugins.manifest import Limits
from persistency.plugins.services import printable

TABLES_MAX: Final = 4
TABLE_ELEMENTS_MAX: Final = 100_000
_FRAMES_MAX = 8  # of a guest's backtrace
_HOST_FUNCTION = "host_function"  # the reason of a trap that isn't one of wasmtime's: one of its own functions failed
_RAN = "wasm backtrace"  # in what wasmtime says of one: the guest had begun
_BITS = 0xFFFF_FFFF

_Config = Callable[[str], WasiConfig]


class Code(NamedTuple):
    """A plugin's code, ready to be called; `wasi` makes what a store needs for that."""

    plugin: str
    compiled: Compiled
    linked: Linked
    limits: Limits
    wasi: _Config | None


def call(code: Code, name: str, data: bytes, context: CallContext, seconds: float, ticks: int) -> bytes:
    """Call a function and return its answer. The guest is stopped after so many `ticks` of its engine's epoch.

    `seconds`: how long the call may take, all in all, as its caller is told. Raises `CallFailed`, or one of its
    subclasses that says how.
    """
    if name not in code.linked.functions:
        raise FunctionNotFound(f"plugin {code.plugin!r} has no function {name!r} to be called", code.plugin)
    store = Store(code.compiled.engine)
    config: WasiConfig | None = None
    current.call = context
    try:
        limits = code.limits
        store.set_limits(limits.memory_bytes, TABLE_ELEMENTS_MAX, 1, TABLES_MAX, 1)
        store.set_epoch_deadline(ticks)
        if not context.remaining():  # who ends all calls may have been between the ticks and this
            raise PluginTimeout(f"plugin {code.plugin!r}: {name} wasn't begun in time", code.plugin, "unbegun")
        if limits.fuel is not None:
            store.set_fuel(limits.fuel)
        if code.wasi is not None:
            config = code.wasi(code.plugin)
            store.set_wasi(config)
        return _Guest(code, name, context, seconds, store).call(data)
    finally:
        current.call = None
        store.close()
        if config is not None:
            config.close()


class _Guest:
    """One instance, for one call."""

    __slots__ = ("_code", "_context", "_memory", "_name", "_seconds", "_store")

    def __init__(self, code: Code, name: str, context: CallContext, seconds: float, store: Store) -> None:
        self._code = code
        self._name = name
        self._context = context
        self._seconds = seconds
        self._store = store
        self._memory: Memory | None = None

    def call(self, data: bytes) -> bytes:
        store = self._store
        instance = self._enter("instantiate", self._code.linked.pre.instantiate, store)
        export = partial(self._code.linked.export, instance, store)
        memory = self._memory = export(abi.MEMORY)
        if self._code.linked.initializes:
            self._enter(abi.INITIALIZE, export(abi.INITIALIZE), store)
        at = self._place(data, export(abi.ALLOC), memory) if data else 0
        answer = self._enter(self._name, export(self._name), store, _signed(at), _signed(len(data)))
        if not self._context.remaining():  # it had no loop to be stopped in
            raise self._caused(self._too_late(self._who(self._name)))
        if answer == abi.FAILED:
            raise self._failed()
        if answer == abi.NOT_IMPLEMENTED:
            raise FunctionNotImplemented(f"{self._who(self._name)} isn't implemented", self._code.plugin)
        if answer in _NUMBERS and answer != abi.NOT_IMPLEMENTED:
            text = f"{self._who(self._name)} returned {answer}, which is the error number {_NUMBERS[answer]}"
            last = cut(printable(self._context.last_error), 200)
            raise self._caused(BadAnswer(f"{text}: {last}" if last else text, self._code.plugin))
        try:
            return GuestMemory(store, memory).read(answer >> 32 & _BITS, answer & _BITS)
        except Fault as fault:
            text = f"{self._who(self._name)} gave an answer that is none: {fault}"
        raise self._caused(BadAnswer(text, self._code.plugin))

    def _place(self, data: bytes, alloc: Func, memory: Memory) -> int:
        """Have the guest make room for its argument, and put it there; return where that is."""
        at = int(self._enter(abi.ALLOC, alloc, self._store, _signed(len(data)))) & _BITS
        if at == 0:
            raise CallFailed(
                f"{self._who(abi.ALLOC)} found no room for an argument of {len(data)} bytes",
                self._code.plugin,
                hint="Raise limits.memory in the manifest, or pass less.",
            )
        try:
            GuestMemory(self._store, memory).write(at, data)
        except Fault as fault:
            text = f"{self._who(abi.ALLOC)} gave no place for an argument of {len(data)} bytes: {fault}"
        else:
            return at
        raise BadAnswer(text, self._code.plugin, hint="alloc must return where so many bytes are free, or 0.")

    def _enter(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """Let the guest run; what wasmtime raises then is put into our words."""
        try:
            return function(*arguments)
        except BaseException as error:
            failure = self._trapped(name, error)
        raise failure  # here, so that wasmtime's own, and all that its frames hold, isn't kept as its context

    # -- what went wrong -----------------------------------------------------------------------------------------------

    def _who(self, name: str) -> str:
        return f"plugin {self._code.plugin!r}: {printable(name)}"

    def _caused(self, failure: CallFailed) -> CallFailed:
        failure.__cause__ = self._context.fault
        return failure

    def _failed(self) -> CallFailed:
        said = printable(self._context.failure or "")
        return self._caused(
            CallFailed(f"{self._who(self._name)} failed: {said or 'it said no more'}", self._code.plugin)
        )

    def _trapped(self, name: str, error: BaseException) -> CallFailed:
        """Return what a guest that came to its end before its function's end is told as."""
        plugin, who = self._code.plugin, self._who(name)
        if not self._context.deadline:
            failure: PluginTrapped = PluginTimeout(f"{who} was stopped, for the process ends", plugin, "interrupt")
        elif isinstance(error, Trap):
            failure = self._as_trap(who, error)
            failure.add_note(_backtrace(error))
        elif isinstance(error, ExitTrap):
            failure = PluginTrapped(
                f"{who} ended the program, with exit status {error.code}", plugin, "exit",
                hint="A function must return to its caller; build the plugin as a reactor.",
            )  # fmt: skip
        elif isinstance(error, WasmtimeError) and (self._memory is not None or _RAN in str(error)):
            failure = PluginTrapped(
                f"{who} was stopped: {_words(_HOST_FUNCTION)}: {said(error)}", plugin, _HOST_FUNCTION,
                hint="A pointer that the plugin passes is wrong; it may be built for another version of WASI.",
            )  # fmt: skip
        elif isinstance(error, WasmtimeError):
            return self._caused(
                CallFailed(
                    f"{who} wasn't possible: {said(error)}", plugin,
                    hint="See the manifest's limits, and how much memory the process may have.",
                )
            )  # fmt: skip
        else:
            failure = PluginTrapped(
                f"{who} was stopped, and it can't be told why: another user of wasmtime in this process left an "
                "exception behind, which came in place of the cause",
                plugin,
            )
            failure.__cause__ = error.with_traceback(None)
            return failure
        return self._caused(failure)

    def _as_trap(self, who: str, trap: Trap) -> PluginTrapped:
        plugin, code = self._code.plugin, _code(trap)
        if code is TrapCode.INTERRUPT:
            return self._too_late(who)
        if code is TrapCode.OUT_OF_FUEL:
            return OutOfFuel(f"{who} used up its fuel, {self._code.limits.fuel}", plugin, "out_of_fuel")
        reason = "unknown" if code is None else code.name.lower()
        return PluginTrapped(f"{who} was stopped: {_words(reason)}", plugin, reason, hint=self._hint(code))

    def _too_late(self, who: str) -> PluginTimeout:
        text = f"{who} took longer than {self._seconds:g} s, and was stopped"
        return PluginTimeout(text, self._code.plugin, "interrupt")

    def _hint(self, code: TrapCode | None) -> str | None:
        """Return what may help, if that can be told from how the guest ended."""
        if code is TrapCode.STACK_OVERFLOW:
            return "It calls itself too deeply, or keeps too much on its stack."
        bytes_max = self._code.limits.memory_bytes
        if self._memory is not None and self._memory.data_len(self._store) > bytes_max - PAGE_BYTES:
            return f"Its memory stands at its limit, {bytes_max} bytes: raise limits.memory in the manifest."
        return None


def _signed(value: int) -> int:
    """Return an unsigned number of 32 bits as wasmtime takes one."""
    return value - (1 << 32) if value >> 31 else value


def _code(trap: Trap) -> TrapCode | None:
    try:
        return trap.trap_code
    except ValueError:  # one that a newer wasmtime has, and its Python doesn't know
        return None


# What a guest's function may return by mistake: the number it got from a host function.
_NUMBERS = {
    getattr(abi, name): name
    for name in ["TOO_SMALL", "QUOTA", "INVALID", "CLOSED", "STORAGE", "FAULT", "DENIED", "TIMEOUT"]
}

_WORDS = {
    "unreachable": "it came to a place that it says is never reached (a panic, an abort)",
    "memory_out_of_bounds": "it touched a place outside of its memory",
    "stack_overflow": "its stack is used up",
    _HOST_FUNCTION: "a function of WASI found no sense in what it was passed",
    "unknown": "wasmtime gave no reason",
}


def _words(reason: str) -> str:
    return _WORDS.get(reason, reason.replace("_", " "))


def _backtrace(trap: Trap) -> str:
    """Return where in the guest it happened, the innermost function first."""
    frames = trap.frames
    names = [cut(printable(frame.func_name or f"function {frame.func_index}"), 80) for frame in frames[:_FRAMES_MAX]]
    more = ", ..." if len(frames) > _FRAMES_MAX else ""
    return f"In the guest: {', called by '.join(names) or 'before its first function'}{more}"
