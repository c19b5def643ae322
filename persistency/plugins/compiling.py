"""Compiling: from a plugin's code to a module that can be run, once, however many ask for it.

Rules:
  1. One code is compiled once at a time: who asks for it meanwhile gets the same module, or the same failure. The next
     one to ask after a failure tries again.
  2. No lock is held while code is read, compiled or written. At most `compiles_max` are compiled at once; what is in
     memory or in the cache doesn't wait for them.
  3. Two plugins with one code share a module for as long as somebody holds on to it; nothing else is kept here.
  4. The cache saves time and nothing else: whatever is wrong with it, the code is compiled.
  5. What isn't in the cache is compiled in a process of its own, within bounds on time and memory: hostile code would
     otherwise end this one, or never come to an end. Here it is hashed, and not looked at.

Doesn't know: plugins, what is done with a module.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from pathlib import Path
from typing import Final
from weakref import WeakValueDictionary

from wasmtime import Engine, Module, WasmtimeError

from persistency.errors import Closed
from persistency.logfields import about
from persistency.plugins.cache import CompileCache
from persistency.plugins.compiling_process import Children, Native, compile_apart
from persistency.plugins.engines import Engines

log: logging.Logger = logging.getLogger("persistency.plugins")

WASM_BYTES_MAX: Final = 64 * 1_048_576
COMPILE_SECONDS: Final = 60.0
COMPILE_BYTES_MAX: Final = 2 * 1_073_741_824
_Key = tuple[str, bool]  # the SHA-256 of the code, and whether its instructions are counted


class Compiled:
    """A module, and the engine it is for; shared by all who ask for that code as long as one of them holds on to it.

    `outline`: a module in the binary format with the same types, functions, imports, exports and memories, and nothing
    else; short.

    It is what is kept weakly, not the module: wasmtime frees that in its `__del__`, before references to it that are
    weak are gone, and another thread could still get it by one of them, with nothing in it.
    """

    __slots__ = ("__weakref__", "engine", "module", "outline")

    def __init__(self, engine: Engine, module: Module, outline: bytes) -> None:
        self.engine: Final = engine
        self.module: Final = module
        self.outline: Final = outline


class _Flight:
    """One compilation that is on its way, and what came of it."""

    __slots__ = ("compiled", "error", "landed")

    def __init__(self) -> None:
        self.landed = threading.Event()
        self.compiled: Compiled | None = None
        self.error: BaseException | None = None


class Compiler:
    """Compiles the code of one host's plugins. Any thread.

    `cache_dir`: where compiled code is kept; `None`: nowhere. `compiles_max`: how many compilations may run at once.
    `cache_max`: how many bytes the cache may take; `None` or 0 for no limit. `seconds`, `memory_bytes`: how long one
    compilation may take, and how much address space. Raises what `CompileCache` does.
    """

    def __init__(
        self,
        cache_dir: Path | None,
        compiles_max: int,
        cache_max: int | None,
        seconds: float = COMPILE_SECONDS,
        memory_bytes: int = COMPILE_BYTES_MAX,
    ) -> None:
        self.engines: Engines = Engines()
        self.compiled: int = 0
        self.from_cache: int = 0
        self._cache = None if cache_dir is None else CompileCache(cache_dir, cache_max)
        self._room = threading.Semaphore(compiles_max)
        self._lock = threading.Lock()
        self._flights: dict[_Key, _Flight] = {}
        self._shared: WeakValueDictionary[_Key, Compiled] = WeakValueDictionary()
        self._closed = False
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._children = Children()

    def compile(self, wasm: bytes, *, fuel: bool) -> Compiled:
        """Return the module of a code; wait until it's there.

        `wasm`: the binary format, or the text format (WAT) in UTF-8. `fuel`: whether its instructions are counted.
        Raises `WasmtimeError` in wasmtime's words for what is no module, `ValueError` for what isn't even code, or too
        much of it, or needs too much memory, `TimeoutError` for what takes too long, another `OSError` if there is no
        process to compile it, and `Closed`. Hold on to what is returned: it is shared for as long as somebody does.
        """
        if len(wasm) > WASM_BYTES_MAX:
            raise ValueError(f"the code has {len(wasm)} bytes, at most {WASM_BYTES_MAX} are allowed")
        key = hashlib.sha256(wasm).hexdigest(), fuel
        while True:
            with self._lock:
                if self._closed:
                    raise _closed()
                found = self._shared.get(key)
                if found is not None:
                    return found
                flight = self._flights.get(key)
                is_ours = flight is None
                if flight is None:
                    flight = self._flights[key] = _Flight()
            try:
                found = self._fly(flight, key, wasm) if is_ours else _awaited(flight)
            finally:
                del flight  # it has the error, which has this frame
            if found is not None:
                return found

    def close(self) -> None:
        """Refuse what is asked for from now on, what waits for its turn, and what is being compiled: it is killed."""
        with self._lock:
            self._closed = True
        self._children.kill()

    # -- one compilation ---------------------------------------------------------------------------------------------

    def _fly(self, flight: _Flight, key: _Key, wasm: bytes) -> Compiled:
        try:
            flight.compiled = self._made(key, wasm)
            return flight.compiled
        except BaseException as error:
            flight.error = error
            raise
        finally:
            with self._lock:
                del self._flights[key]
                if flight.compiled is not None:
                    self._shared[key] = flight.compiled
            flight.landed.set()
            del flight

    def _made(self, key: _Key, wasm: bytes) -> Compiled:
        sha256, fuel = key
        engine = self.engines.engine(fuel)
        name = f"{sha256}-{self.engines.fingerprint(fuel)}"
        kept = None if self._cache is None else self._kept(engine, name)
        if kept is not None:
            with self._lock:
                self.from_cache += 1
            return kept
        with self._room:
            if self._closed:
                raise _closed()
            native = self._apart(wasm, fuel)
        compiled = _ready(engine, native)
        with self._lock:
            self.compiled += 1
        if self._cache is not None:
            self._cache.put(name, native.packed())
        return compiled

    def _apart(self, wasm: bytes, fuel: bool) -> Native:
        seconds, memory_bytes, among = self._seconds, self._memory_bytes, self._children
        try:
            return compile_apart(wasm, fuel=fuel, seconds=seconds, memory_bytes=memory_bytes, among=among)
        except OSError:
            if self._closed:  # it was killed for that
                raise _closed() from None
            raise

    def _kept(self, engine: Engine, name: str) -> Compiled | None:
        """Return what the cache has, or `None`."""
        assert self._cache is not None
        data = self._cache.get(name)
        if data is None:
            return None
        try:
            return _ready(engine, Native.unpacked(data))
        except WasmtimeError as error:
            log.info(
                "compiled code in the cache was made for another machine (%s): it is compiled again for this one",
                error,
                extra=about("compile_cache_foreign", None, error),
            )
            self._cache.drop(name)
            return None


def _awaited(flight: _Flight) -> Compiled | None:
    """Return what came of a compilation that another thread is at; `None`: that thread was interrupted."""
    try:
        flight.landed.wait()
        if isinstance(flight.error, Exception):
            raise flight.error
        return flight.compiled
    finally:
        del flight


def _ready(engine: Engine, native: Native) -> Compiled:
    """Return compiled code as it can be run. Raises `WasmtimeError` for what is none, or another engine's."""
    return Compiled(engine, Module.deserialize(engine, native.module), native.outline)


def _closed() -> Closed:
    return Closed("the host of the plugins is closed", hint="Make another PluginHost.")
