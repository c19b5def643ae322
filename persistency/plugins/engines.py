"""Engines: wasmtime's, as plugins are compiled and run by them, and what tells code for one from code for another.

Counting instructions slows a guest down: there are two engines, one that does, one that doesn't, made when they are
asked for.

Rules:
  1. What a guest may use of WebAssembly is said here, feature by feature: a newer wasmtime doesn't add to it.
  2. Nothing here starts a thread. wasmtime's own, for compiling, would be missing in a forked child, and be waited for.
  3. Every setting is part of the fingerprint: native code is never given to an engine that has others.

Doesn't know: code, plugins, calls.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import platform
import sys
import threading
from importlib import metadata
from typing import Any, Final

from wasmtime import Config, Engine

STACK_BYTES_MAX: Final = 256 * 1024  # of a guest; the threads it runs on need as much, and some for the host functions

_SETTINGS: Final[dict[str, Any]] = {
    # A guest that runs for too long is stopped at its next loop or call. It costs a few percent.
    "epoch_interruption": True,
    "max_wasm_stack": STACK_BYTES_MAX,
    # A guest's bad access is told by a comparison before it, and not by SIGSEGV after it: whoever calls
    # `faulthandler.enable()` later takes that signal over, and the first such trap would be the end of the process. It
    # costs a guest that does nothing but read and write memory a quarter, and others nothing.
    "signals_based_traps": False,
    # One thread per compilation: the bound on how many there are at once bounds the cores they take. And the pool that
    # wasmtime shares the work among doesn't outlive a fork, in whose child the first compilation would wait for ever.
    "parallel_compilation": False,
    "cranelift_opt_level": "speed",
    # A guest has one thread and one memory, with pointers of 32 bits, which grows by whole pages of 64 KiB: that is
    # what the host functions check pointers against, and what `Store.set_limits` counts.
    "wasm_threads": False,
    "shared_memory": False,
    "wasm_memory64": False,
    "wasm_multi_memory": False,
    "wasm_custom_page_sizes": False,
    # What compilers make by default today.
    "wasm_bulk_memory": True,
    "wasm_multi_value": True,
    "wasm_reference_types": True,
    "wasm_simd": True,
    "wasm_tail_call": True,
    # The same answer on every machine, where it costs nothing unless it's used. The bits of a NaN aren't made the same:
    # that would cost every operation on floats.
    "wasm_relaxed_simd": True,
    "wasm_relaxed_simd_deterministic": True,
    "cranelift_nan_canonicalization": False,
    # No heap that the limit on memory doesn't count, and nothing that unwinds through the host's functions. With it go
    # references to the host's objects, of which there are none.
    "gc_support": False,
    "wasm_gc": False,
    "wasm_function_references": False,
    "wasm_exceptions": False,
    "wasm_stack_switching": False,
    "wasm_wide_arithmetic": False,
    # A component isn't a module: told as soon as it's read.
    "wasm_component_model": False,
}


class Engines:
    """The engines of one host. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engines: dict[bool, Engine] = {}
        self._made: tuple[Engine, ...] = ()  # replaced, not changed: the ticker goes over it without the lock

    def engine(self, fuel: bool) -> Engine:
        """Return the engine that counts instructions, or the one that doesn't; it's always the same one."""
        found = self._engines.get(fuel)
        if found is None:
            with self._lock:
                found = self._engines.get(fuel)
                if found is None:
                    found = self._engines[fuel] = _engine(fuel)
                    self._made = tuple(self._engines.values())
        return found

    def fingerprint(self, fuel: bool) -> str:
        """Return, in 32 hexadecimal digits, what code must have been compiled by and for to be of use to an engine.

        Features of the processor aren't in it: wasmtime looks at those itself, and refuses code that needs others.
        """
        return _fingerprint(fuel)

    def increment_epoch(self) -> None:
        """Let a tick pass for every guest that runs."""
        for engine in self._made:
            engine.increment_epoch()


def _engine(fuel: bool) -> Engine:
    config = Config()
    config.consume_fuel = fuel
    for name, value in _SETTINGS.items():
        getattr(Config, name).__set__(config, value)  # an AttributeError, where `setattr` would set nothing
    return Engine(config)


def keep_for_ever(whoever: list[Any]) -> None:
    """Keep objects, and all they hold, to the end of the process and beyond that of the interpreter.

    In a forked child what the parent had of wasmtime's can't be freed: that takes a lock which another thread of the
    parent may have had at that moment, and its destructor would wait for ever.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(whoever))


@functools.cache
def _version() -> str:
    """Return wasmtime's release, down to the last number: each may compile otherwise, to mend something."""
    try:
        return metadata.version("wasmtime")
    except metadata.PackageNotFoundError:  # it was put into the service without its papers
        return "unknown"


def _fingerprint(fuel: bool) -> str:
    parts = [_version(), sys.platform, platform.machine(), f"fuel={fuel}", *(f"{k}={v}" for k, v in _SETTINGS.items())]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
