"""Linking: a module's imports against what its plugin was granted, and the guard around each host function.

Rules:
  1. What wasn't granted isn't there: a module that imports it isn't linked, and the error names every such function.
  2. A module is looked at before it is linked: what it lacks, or has in another shape, is told in one sentence.
  3. A host function never raises into a guest: wasmtime keeps one exception for all threads, and hands it to whichever
     of them traps next. Only while the process ends one does: nobody is told then why a guest has stopped.

Doesn't know: what the functions do, calls, where the code comes from.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Mapping, Sequence
from time import monotonic
from typing import Any, Final, NamedTuple

from wasmtime import (
    Caller,
    FuncType,
    Instance,
    InstancePre,
    Linker,
    Memory,
    Store,
    ValType,
    WasmtimeError,
)

from persistency.plugins import abi, wasi
from persistency.plugins.compiling import Compiled
from persistency.plugins.context import current
from persistency.plugins.errors import LoadFailed, PermissionDenied
from persistency.plugins.guestmemory import Fault, GuestMemory
from persistency.plugins.manifest import Manifest
from persistency.plugins.services import SIGNATURES, HostFunction, printable
from persistency.plugins.shape import FUNCTION, MEMORY, Export, Import, Shape, Signature, shape_of


def _inner(name: str) -> Any:
    """Return one of the modules that wasmtime's Python is made of, or `None` where it isn't there any more."""
    try:
        return importlib.import_module(f"wasmtime.{name}")
    except ImportError:
        return None


# Wasmtime's own Python asks for all of an instance's exports, and each by going over those before it: with a thousand
# of them that took a call 40 ms. What it is built on can give one by its name, but isn't promised to stay.
_ffi, _extern = _inner("_ffi"), _inner("_extern")
_ONE_BY_ONE = (
    hasattr(_ffi, "wasmtime_instance_export_get") and hasattr(_extern, "wrap_extern") and hasattr(Store, "_context")
)
PAGE_BYTES: Final = 65_536
# What every call of a guest goes through, once more, in Python.
EXPORTS_MAX: Final = 1_000
IMPORTS_MAX: Final = 1_000
NAMES_CHARACTERS_MAX: Final = 65_536
_NAMED_MAX = 20  # functions, in a message
_NOBODY_HAS = "there is no such function"
_CALLABLE: Final[Signature] = (("i32", "i32"), ("i64",))
_ALLOC: Final[Signature] = (("i32",), ("i32",))
_INITIALIZE: Final[Signature] = ((), ())
_TYPES: Final = {"p": "i32", "n": "i32", "l": "i64"}


class Interrupted(BaseException):
    """Raised into a guest that calls a host function while the process ends: nobody else's trap is told any more."""


class Linked(NamedTuple):
    """A module that is ready to be instantiated: what of it can be called, and whether it wants to be initialised.

    `names`: those of the exports that a call asks for, as C has them.
    """

    pre: InstancePre
    functions: frozenset[str]
    initializes: bool
    names: Mapping[str, ctypes.Array[ctypes.c_char]]

    def export(self, instance: Instance, store: Store, name: str) -> Any:
        """Return one of the exports of an instance that a call asks for."""
        if _ONE_BY_ONE:
            text, found = self.names[name], _ffi.wasmtime_extern_t()
            size, place = len(text) - 1, ctypes.byref(instance._instance)  # without the NUL at its end
            if _ffi.wasmtime_instance_export_get(store._context(), place, text, size, ctypes.byref(found)):
                return _extern.wrap_extern(found)
        return instance.exports(store)[name]


def shape_of_code(plugin_id: str, outline: bytes) -> Shape:
    """Return what code imports and exports, by the outline it was compiled with. Raises `LoadFailed`."""
    try:
        return shape_of(outline)
    except ValueError as error:
        raise LoadFailed(f"plugin {plugin_id!r} couldn't be read: {said(error)}", plugin_id) from error


def check(manifest: Manifest, shape: Shape) -> None:
    """Raise `PermissionDenied` for a module that imports what its manifest doesn't grant.

    Raises `LoadFailed` for one that isn't of the shape the ABI asks for, or has too much of something.
    """
    for what, found, most in (("imports", shape.imports, IMPORTS_MAX), ("exports", shape.exports, EXPORTS_MAX)):
        if len(found) > most:
            raise LoadFailed(f"plugin {manifest.id!r} {what} {len(found)} things, and may {most}", manifest.id)
    if sum(map(len, shape.exports)) > NAMES_CHARACTERS_MAX:
        raise LoadFailed(f"plugin {manifest.id!r} exports names of over {NAMES_CHARACTERS_MAX} characters", manifest.id)
    _check_imports(manifest.id, shape.imports, _granted(manifest), wasi_granted=manifest.wasi is not None)
    _check_exports(manifest.id, shape.exports, manifest.limits.memory_bytes)


def link(
    plugin_id: str,
    compiled: Compiled,
    shape: Shape,
    functions: Sequence[HostFunction],
    *,
    wasi_granted: bool,
) -> Linked:
    """Link a module that was checked with the functions it was granted. Raises `LoadFailed`."""
    imported = {(each.module, each.name) for each in shape.imports}
    linker = Linker(compiled.engine)
    try:
        if wasi_granted:
            wasi.define(linker)
        for function in functions:
            if (function.module, function.name) in imported:
                parameters, results = _signature(function.parameters)
                kind = FuncType([_value(name) for name in parameters], [_value(name) for name in results])
                linker.define_func(function.module, function.name, kind, guarded(function), access_caller=True)
        pre = linker.instantiate_pre(compiled.module)
    except WasmtimeError as error:
        raise LoadFailed(f"plugin {plugin_id!r} couldn't be linked: {said(error)}", plugin_id) from error
    finally:
        linker.close()
    names = _callable(shape.exports)
    as_c = {name: ctypes.create_string_buffer(name.encode()) for name in names | abi.RESERVED}
    return Linked(pre, names, abi.INITIALIZE in shape.exports, as_c)


def guarded(function: HostFunction) -> Callable[..., int]:
    """Return a host function as wasmtime calls it: pointers and lengths unsigned, and nothing raised.

    A guest whose time is over gets TIMEOUT at once, and is stopped at its next loop or call of its own.
    """
    body = function.body
    longs = [place for place, letter in enumerate(function.parameters) if letter == "l"]

    def guard(caller: Caller, *arguments: int) -> int:
        call = current.call
        if call is not None and monotonic() > call.deadline:
            if not call.deadline:
                raise Interrupted
            call.last_error = "the call is over"
            return abi.TIMEOUT
        try:
            assert call is not None, "a guest runs without a call"
            memory = caller.get(abi.MEMORY)
            assert isinstance(memory, Memory), "a guest without a memory was linked"
            unsigned = [argument & 0xFFFF_FFFF for argument in arguments]
            for place in longs:
                unsigned[place] = arguments[place]
            return body(GuestMemory(caller, memory), call, *unsigned)
        except Fault as fault:
            if call is not None:
                call.last_error = str(fault)
            return abi.FAULT
        except BaseException as error:
            if call is not None:
                call.fault = error.with_traceback(None)  # which would keep this frame, and the guest's caller
                call.last_error = f"the host failed: {type(error).__name__}"
            return abi.STORAGE

    return guard


def cut(text: str, most: int = 1_000) -> str:
    """Return a text that a guest may have made as long as it likes, without its end."""
    text = text.strip()
    return text if len(text) <= most else f"{text[:most]} ..."


def said(error: BaseException) -> str:
    """Return what wasmtime says of a guest, who chose some of the words: on one line, printable, not too long."""
    return cut(printable(" ".join(str(error).split())))


# -- the module's shape ----------------------------------------------------------------------------------------------


def _granted(manifest: Manifest) -> dict[tuple[str, str], Signature]:
    """Return the functions of the ABI that a manifest grants."""
    kvstore = manifest.kvstore
    return {
        (abi.MODULE, each.name): _signature(each.parameters)
        for each in abi.FUNCTIONS
        if each.service is None or (kvstore is not None and not (each.writes and kvstore.read_only))
    }


def _callable(exports: Mapping[str, Export]) -> frozenset[str]:
    """Return the names of the functions that can be called; a host function that is handed on isn't one."""
    return frozenset(
        name
        for name, each in exports.items()
        if name not in abi.RESERVED and each.signature == _CALLABLE and not each.imported
    )


def _check_exports(plugin_id: str, exports: Mapping[str, Export], memory_bytes: int) -> None:
    memory = exports.get(abi.MEMORY)
    if memory is None or memory.kind != MEMORY:
        hint = f"Have it export, as {abi.MEMORY!r}, the memory that its pointers point into."
        raise LoadFailed(f"plugin {plugin_id!r} exports no memory named {abi.MEMORY!r}", plugin_id, hint=hint)
    least = memory.pages * PAGE_BYTES
    if least > memory_bytes:
        raise LoadFailed(
            f"plugin {plugin_id!r} begins with {least} bytes of memory, and may have {memory_bytes}",
            plugin_id,
            hint="Raise limits.memory in the manifest, or build the plugin with less.",
        )
    for name, signature in ((abi.ALLOC, _ALLOC), (abi.INITIALIZE, _INITIALIZE)):
        if name in exports and exports[name].signature != signature:
            raise LoadFailed(f"plugin {plugin_id!r}: its export {name!r} must be {_shown(signature)}", plugin_id)
        if name in exports and exports[name].imported:
            raise LoadFailed(f"plugin {plugin_id!r}: its export {name!r} is a function it imports", plugin_id)
    if abi.ALLOC not in exports and _callable(exports):
        text = f"plugin {plugin_id!r} exports no function {abi.ALLOC!r}: arguments have no place"
        raise LoadFailed(text, plugin_id, hint=f"Have it export {abi.ALLOC!r}, of the type {_shown(_ALLOC)}.")


def _check_imports(
    plugin_id: str,
    imports: Sequence[Import],
    granted: Mapping[tuple[str, str], Signature],
    *,
    wasi_granted: bool,
) -> None:
    """Check the functions a module imports; the types of those of WASI wasmtime checks."""
    denied: dict[str, str] = {}
    for each in imports:
        name = f"{each.module}.{each.name}"
        shown = cut(name if name.isprintable() else repr(name), 200)
        if each.kind != FUNCTION or each.signature is None:
            text = f"plugin {plugin_id!r} imports a {each.kind}, {shown}: only functions can be imported"
            raise LoadFailed(text, plugin_id, hint=f"Build the plugin with a {each.kind} of its own.")
        wanted = granted.get((each.module, each.name))
        if wanted is not None:
            if each.signature != wanted:
                raise LoadFailed(
                    f"plugin {plugin_id!r} imports {shown} as {_shown(each.signature)}, and it is {_shown(wanted)}",
                    plugin_id,
                    hint="Build the plugin for this version of the ABI.",
                )
        elif not (wasi_granted and each.module == wasi.MODULE and each.name in wasi.FUNCTIONS):
            denied[name] = f"{shown} ({_why(each.module, each.name)})"
    if denied:
        names = list(denied.values())
        more = f" and {len(names) - _NAMED_MAX} more" if len(names) > _NAMED_MAX else ""
        text = f"plugin {plugin_id!r} imports what it wasn't granted: {', '.join(names[:_NAMED_MAX])}{more}"
        lacking = any(why.endswith(f"({_NOBODY_HAS})") for why in names)
        hint = "No permission grants what isn't there: build the plugin without it." if lacking else None
        raise PermissionDenied(text, plugin_id, list(denied), hint=hint)


def _why(module: str, name: str) -> str:
    """Say in a few words what would grant a function."""
    signature = SIGNATURES.get(name) if module == abi.MODULE else None
    if signature is not None and signature.service is not None:
        return f"permission {signature.service}" + (", not read_only" if signature.writes else "")
    if module == wasi.MODULE and name in wasi.FUNCTIONS:
        return "permission wasi"
    return _NOBODY_HAS


def _signature(parameters: str) -> Signature:
    return tuple(_TYPES[letter] for letter in parameters), ("i64",)


def _value(name: str) -> ValType:
    return ValType.i64() if name == "i64" else ValType.i32()


def _shown(signature: Signature) -> str:
    parameters, results = (", ".join(names) for names in signature)
    return f"({parameters}) -> ({results})"
