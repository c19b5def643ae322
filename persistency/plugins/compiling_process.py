"""Compiling apart: in a child process, so that hostile code takes no more time and memory than it is given.

A few kilobytes of WebAssembly can make wasmtime allocate gigabytes, whose lack ends a process, or compute for minutes
without a way to stop it; so can some megabytes of its text format that are merely translated. Here that is a child's
end.

Rules:
  1. The child bounds its own memory and processor time before it reads any code. The parent bounds the time on the
     clock: it kills the child.
  2. The child doesn't outlive its parent: on Linux it ends with it, elsewhere when its processor time is used up.
  3. What the child says counts only when it is whole. Otherwise how it ended says what is told.
  4. The code is looked at in the child alone. What comes back of it, besides native code, is short.
  5. The child has the parent's packages, the settings of `engines`, and nothing else: not the environment, no open
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
from typing import Any, Final, NamedTuple

import wasmtime
from wasmtime import Module, WasmtimeError, wat2wasm

from persistency.plugins.engines import Engines

OUTLINE_BYTES_MAX: Final = 1_048_576
# What the child says is one of these, a length, and bytes.
_MODULE, _WORDS, _WRONG, _MEMORY, _OTHER = b"M", b"W", b"V", b"N", b"O"
_LENGTH: Final = 8
_SIGKILL, _SIGXCPU = 9, 24
_PR_SET_PDEATHSIG: Final = 1
_KEPT: Final = ("LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_LIBRARY_PATH")  # without these some Pythons don't start
_NO_MEMORY: Final = ("memory allocation of", "out of memory", "Cannot allocate memory", "os error 12")

_MAGIC: Final = b"\0asm\1\0\0\0"
_OUTLINING: Final = (1, 2, 3, 5, 7)  # the sections of types, imports, functions, memories and exports

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


class Native(NamedTuple):
    """Compiled code: the `module` as `Module.serialize` gives it, and an `outline`.

    That is what the code says of its types, functions, imports, exports and memories, and of nothing else: sections of
    the binary format, as they were.
    """

    outline: bytes
    module: bytes

    def packed(self) -> bytes:
        """Return both as one."""
        return len(self.outline).to_bytes(_LENGTH, "big") + self.outline + self.module

    @classmethod
    def unpacked(cls, data: bytes) -> Native:
        """Return what `packed` was made of; for anything else, something that is no module."""
        end = _LENGTH + int.from_bytes(data[:_LENGTH], "big")
        return cls(data[_LENGTH:end], data[end:])


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
    code: bytes, *, fuel: bool, seconds: float, memory_bytes: int, among: Children | None = None
) -> Native:
    """Compile a module, in the binary format or as text in UTF-8, in a process of its own.

    `fuel`: whether its instructions are counted. `memory_bytes`: of address space, with what the child begins with.
    `among`: the children it is killed with. Raises `WasmtimeError` in wasmtime's words, made printable, for what is no
    module, `TimeoutError` after `seconds`, `ValueError` for what isn't even code or needs more memory, and `OSError` if
    there is no such process or it ended otherwise.
    """
    child = _started()
    children = Children() if among is None else among
    try:
        children._add(child)
        order = json.dumps(_order(fuel, seconds, memory_bytes)).encode() + b"\n"
        said, errors = child.communicate(order + code, seconds)
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


def _understood(said: bytes, errors: str, status: int, seconds: float, memory_bytes: int) -> Native:
    """Return the module that a child gave, or raise what it said or ended of."""
    kind, rest = said[:1], said[1 + _LENGTH :]
    whole = len(said) > _LENGTH and int.from_bytes(said[1 : 1 + _LENGTH], "big") == len(rest)
    if whole and kind == _MODULE:
        return Native.unpacked(rest)
    words = _plain(rest.decode(errors="replace")) if whole else ""
    if kind == _MEMORY or any(sign in words or sign in errors for sign in _NO_MEMORY):
        raise ValueError(f"the code needs more than {memory_bytes} bytes of memory to compile")
    if whole and kind == _WORDS:
        raise WasmtimeError(words)
    if whole and kind == _WRONG:
        raise ValueError(words)
    if status == -_SIGXCPU:
        raise _too_long(seconds)
    how = f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
    told = (words or _plain(errors)).strip()
    raise ChildProcessError(f"the process that compiled the code {how}{f': {told}' if told else ''}")


def _plain(words: str) -> str:
    """Return words without what moves a terminal's cursor: wasmtime's quote the text of a module. Lines stay lines."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode() for each in words
    )


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
        binary = _binary(sys.stdin.buffer.read())
        module = bytes(Module(engine, binary).serialize())  # only then is the binary known to be sound
        _say(_MODULE, Native(_outline(binary), module).packed())
    except WasmtimeError as error:
        _say(_WORDS, str(error).encode())
    except _Wrong as error:
        _say(_WRONG, str(error).encode())
    except MemoryError:
        _say(_MEMORY, b"")
    except Exception as error:
        _say(_OTHER, f"{type(error).__name__}: {error}".encode(errors="replace"))
    os._exit(0)


class _Wrong(Exception):
    """What is the matter with code that wasmtime wasn't asked about, or found nothing wrong with."""


def _binary(code: bytes) -> bytes:
    """Return code in the binary format."""
    if code[:1] in (b"", b"\0"):
        return code  # an empty one too: wasmtime says what's wrong with it
    try:
        text = code.decode()
    except UnicodeDecodeError as error:
        raise _Wrong(
            f"the code is neither WebAssembly, which begins with b'\\0asm', nor its text format in UTF-8: "
            f"it begins with {code[:8]!r}"
        ) from error
    return bytes(wat2wasm(text))


def _outline(binary: bytes) -> bytes:
    """Return the sections of a sound module that say what it imports and exports, and of which types."""
    outline, at = bytearray(_MAGIC), len(_MAGIC)
    while at < len(binary):
        begin, size, shift = at, 0, 0
        while True:  # the size of the section, seven bits to a byte
            at += 1
            size |= (binary[at] & 0x7F) << shift
            shift += 7
            if binary[at] < 0x80:
                break
        at += 1 + size
        if binary[begin] in _OUTLINING:
            outline += binary[begin:at]
    if len(outline) > OUTLINE_BYTES_MAX:
        raise _Wrong(
            f"the code's types, functions, imports and exports take {len(outline)} bytes to list, "
            f"at most {OUTLINE_BYTES_MAX} are allowed"
        )
    return bytes(outline)


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
