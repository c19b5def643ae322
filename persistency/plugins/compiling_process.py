"""Compiling apart: in a child process, so that hostile code takes no more time and memory than it is given.

A few kilobytes of WebAssembly can make wasmtime allocate gigabytes, whose lack ends a process, or compute for minutes
without a way to stop it. Here that is a child's end.

Rules:
  1. The child bounds its own memory and processor time before it reads any code. The parent bounds the time on the
     clock: it kills the child.
  2. The child doesn't outlive its parent: on Linux it ends with it, elsewhere when its processor time is used up.
  3. What the child says counts only when it is whole. Otherwise how it ended says what is told.
  4. The child has the parent's packages, the settings of `engines`, and nothing else: not the environment, no open
     file, no terminal. A signal from the terminal doesn't reach it.

Doesn't know: plugins, the cache, how many are compiled at once.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import resource
import subprocess
import sys
import threading
from typing import Any, Final

import wasmtime
from wasmtime import Module, WasmtimeError

from persistency.plugins.engines import Engines

_MODULE, _WORDS, _MEMORY, _OTHER = b"M", b"W", b"N", b"O"  # what the child says is one of these, a length, and bytes
_LENGTH: Final = 8
_SIGKILL, _SIGXCPU = 9, 24
_PR_SET_PDEATHSIG: Final = 1
_KEPT: Final = ("LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH")  # without these some Pythons don't start
_NO_MEMORY: Final = ("memory allocation of", "out of memory", "Cannot allocate memory", "os error 12")

# The packages are there by their paths alone: importing all of persistency would take longer than most compilations.
_PROGRAM: Final = """
import json, sys, types
order = json.loads(sys.stdin.buffer.readline())
sys.path[:] = order["path"]
for name, path in order["packages"].items():
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = path
from persistency.plugins.compiling_process import _child
_child(order)
"""


class Children:
    """The processes that compile for one compiler. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._killed = False

    def kill(self) -> None:
        """Kill those that run, and each that is started from now on; who waits for one is told that it was killed."""
        with self._lock:
            self._killed = True
            for child in self._running:
                child.kill()

    def _add(self, child: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._running.add(child)
            if self._killed:
                child.kill()

    def _remove(self, child: subprocess.Popen[bytes]) -> None:
        with self._lock:
            self._running.discard(child)


def compile_apart(
    binary: bytes, *, fuel: bool, seconds: float, memory_bytes: int, among: Children | None = None
) -> bytes:
    """Compile a module in a process of its own; return it as `Module.serialize` does.

    `fuel`: whether its instructions are counted. `memory_bytes`: of address space, with what the child begins with.
    `among`: the children it is killed with. Raises `WasmtimeError` in wasmtime's words
    for what is no module, `TimeoutError` after `seconds`, `ValueError` for what needs more memory, and `OSError` if
    there is no such process or it ended otherwise.
    """
    child = _started()
    children = Children() if among is None else among
    try:
        children._add(child)
        order = json.dumps(_order(fuel, seconds, memory_bytes)).encode() + b"\n"
        said, errors = child.communicate(order + binary, seconds)
    except subprocess.TimeoutExpired:
        raise _too_long(seconds) from None
    finally:
        children._remove(child)
        child.kill()  # one that has ended isn't signalled
        child.__exit__(None, None, None)  # closes the pipes and waits
    return _understood(said, errors.decode(errors="replace"), child.returncode, seconds, memory_bytes)


def _started() -> subprocess.Popen[bytes]:
    if not sys.executable or getattr(sys, "frozen", False):
        # That of a frozen program is the program: it would be started a second time.
        raise OSError("code is compiled in a process of its own, and there is no sys.executable that is a Python")
    return subprocess.Popen(  # noqa: S603  # the interpreter that runs this, with a program of our own
        [sys.executable, "-I", "-S", "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={name: os.environ[name] for name in _KEPT if name in os.environ},
        start_new_session=True,
    )


def _order(fuel: bool, seconds: float, memory_bytes: int) -> dict[str, Any]:
    path = [os.path.abspath(entry) for entry in sys.path if isinstance(entry, str)]
    names = ("persistency", "persistency.plugins")
    return {
        "path": [*path, *(os.path.dirname(entry) for entry in wasmtime.__path__)],
        "packages": {name: list(sys.modules[name].__path__) for name in names},
        "parent": os.getpid(),
        "fuel": fuel,
        "seconds": seconds,
        "memory_bytes": memory_bytes,
    }


def _understood(said: bytes, errors: str, status: int, seconds: float, memory_bytes: int) -> bytes:
    """Return the module that a child gave, or raise what it said or ended of."""
    kind, rest = said[:1], said[1 + _LENGTH :]
    whole = len(said) > _LENGTH and int.from_bytes(said[1 : 1 + _LENGTH], "big") == len(rest)
    if whole and kind == _MODULE:
        return rest
    words = rest.decode(errors="replace") if whole else ""
    if kind == _MEMORY or any(sign in words or sign in errors for sign in _NO_MEMORY):
        raise ValueError(f"the code needs more than {memory_bytes} bytes of memory to compile")
    if whole and kind == _WORDS:
        raise WasmtimeError(words)
    if status == -_SIGXCPU:
        raise _too_long(seconds)
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    told = (words or errors).strip()
    raise ChildProcessError(f"the process that compiled the code {how}{f': {told}' if told else ''}")


def _too_long(seconds: float) -> TimeoutError:
    return TimeoutError(f"the code takes longer than {seconds:g} s to compile")


# -- in the child ----------------------------------------------------------------------------------------------------


def _child(order: dict[str, Any]) -> None:
    """Read code, compile it, say what came of it, and end."""
    try:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
        if os.getppid() != order["parent"]:  # it ended before that
            os._exit(1)
        _limit(resource.RLIMIT_CORE, 0)
        _limit(resource.RLIMIT_CPU, math.ceil(order["seconds"]) + 1)
        _limit(resource.RLIMIT_AS, order["memory_bytes"])
        engine = Engines().engine(order["fuel"])
        _say(_MODULE, bytes(Module(engine, sys.stdin.buffer.read()).serialize()))
    except WasmtimeError as error:
        _say(_WORDS, str(error).encode())
    except MemoryError:
        _say(_MEMORY, b"")
    except Exception as error:
        _say(_OTHER, f"{type(error).__name__}: {error}".encode(errors="replace"))
    os._exit(0)


def _limit(what: int, wanted: int) -> None:
    _, hard = resource.getrlimit(what)
    try:
        resource.setrlimit(what, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))
    except (OSError, ValueError):
        if sys.platform == "linux":  # elsewhere the system may not know it
            raise


def _say(kind: bytes, data: bytes) -> None:
    out = sys.stdout.buffer
    out.write(kind + len(data).to_bytes(_LENGTH, "big"))
    out.write(data)
    out.flush()
