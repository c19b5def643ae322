"""Loading: the steps by which a plugin is loaded, loaded anew, and unloaded.

Rules:
  1. Nothing is there until all of it is there: what fails half way is undone, and leaves what was there before.
  2. What a module imports is looked at before its store is opened: one that is refused leaves no file.
  3. A store's quota can change only while nobody has it open. A plugin that is loaded anew with another quota, or
     without a store, begins no call until those that run have ended; then its store is opened anew.

Doesn't know: who asks, threads, how code is compiled, linked or called.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from wasmtime import WasmtimeError

from persistency import Closed, KVStore, Misuse, Persistency, PersistencyError
from persistency.arguments import as_file, as_payload, shown
from persistency.logfields import about
from persistency.plugins import kvservice, wasi
from persistency.plugins.calling import Code
from persistency.plugins.compiling import WASM_BYTES_MAX, Compiler
from persistency.plugins.errands import Queue, Steps
from persistency.plugins.errors import LoadFailed
from persistency.plugins.linking import check, link, said, shape_of_code
from persistency.plugins.manifest import Manifest
from persistency.plugins.plugin import Build, Held, Owner, Plugin, Version
from persistency.plugins.services import everybody

log: logging.Logger = logging.getLogger("persistency.plugins")


class Host(Owner, Protocol):
    """Whose plugins they are."""

    persistency: Persistency
    compiler: Compiler
    call_timeout: float
    calls_max: int

    @property
    def closed(self) -> bool:
        """Whether nothing is to be loaded any more."""
        raise NotImplementedError


class Place:
    """The place of one id: its plugin, if it is loaded, and what is to be done with it."""

    def __init__(self, queue: Queue) -> None:
        self.queue: Queue = queue
        self.plugin: Plugin | None = None


# -- the steps -------------------------------------------------------------------------------------------------------


def loading(host: Host, place: Place, manifest: Manifest, source: bytes | Path) -> Steps[Plugin]:
    """Load a plugin, or load it anew; return it. Raises `LoadFailed`, or `Closed`."""
    plugin_id = manifest.id
    if host.closed:
        raise Closed(f"plugin {plugin_id!r} wasn't loaded before its host was closed", hint="Make another PluginHost.")
    try:
        if place.plugin is not None and place.plugin.closed:  # it is to be unloaded, and this one comes in its place
            yield from unloading(place)
            yield None
        plugin = place.plugin
        wasm = _read(plugin_id, source)
        sha256 = hashlib.sha256(wasm).hexdigest()
        if plugin is not None and (plugin.sha256, plugin.manifest) == (sha256, manifest):
            return plugin
        build = _built(host, manifest, wasm, sha256)
        if plugin is None:
            with ExitStack() as undo:
                version = _version(host, build, _open(host, manifest, undo))
                undo.pop_all()
            plugin = place.plugin = Plugin(host, version, host.calls_max)
            fields = about("plugin_loaded", _job_id(manifest), plugin=plugin_id, sha256=sha256)
            log.info("plugin %r is loaded, code %.12s", plugin_id, sha256, extra=fields)
        else:
            yield from _anew(host, plugin, build)
            fields = about("plugin_reloaded", _job_id(manifest), plugin=plugin_id, sha256=sha256)
            log.info("plugin %r is loaded anew, code %.12s", plugin_id, sha256, extra=fields)
    except Exception as error:
        fields = about("plugin_load_failed", _job_id(manifest), error, plugin=plugin_id)
        log.warning("plugin %r couldn't be loaded: %s", plugin_id, error, extra=fields)
        raise
    return plugin


def unloading(place: Place) -> Steps[None]:
    """End a plugin after its last call, and give its job back; raises what closing that does."""
    plugin = place.plugin
    if plugin is None:  # it couldn't be loaded
        return
    plugin._shut()
    yield plugin._idle()
    place.plugin = None
    fields = about("plugin_unloaded", _job_id(plugin.manifest), plugin=plugin.id)
    log.info("plugin %r is unloaded", plugin.id, extra=fields)
    _close(plugin._version)


def _anew(host: Host, plugin: Plugin, build: Build) -> Steps[None]:
    """Put another version in the place of a plugin's."""
    old = plugin._version
    if old.held is not None and _quota(old.build.manifest) != _quota(build.manifest):
        yield from _exchanged(host, plugin, build)
        return
    with ExitStack() as undo:
        held = _open(host, build.manifest, undo) if old.held is None else old.held
        plugin._become(_version(host, build, held))
        undo.pop_all()


def _exchanged(host: Host, plugin: Plugin, build: Build) -> Steps[None]:
    """Put another version in the place of a plugin's, whose store has another quota, or isn't there any more."""
    old = plugin._version
    yield plugin._pause()
    try:
        _close(old)
        try:
            with ExitStack() as undo:
                plugin._become(_version(host, build, _open(host, build.manifest, undo)))
                undo.pop_all()
        except Exception as error:
            try:
                with ExitStack() as undo:
                    plugin._become(_version(host, old.build, _open(host, old.build.manifest, undo)))
                    undo.pop_all()
            except Exception as again:
                error.add_note(f"Its store couldn't be opened as it was before either: {again}")
            raise
    finally:
        plugin._resume()


# -- what they are made of -------------------------------------------------------------------------------------------


def as_id(value: Any) -> str:
    """Check what is to be an id. Raises `Misuse`."""
    if not isinstance(value, str):
        raise Misuse(f"plugin_id must be a str, not {type(value).__name__}: pass a plugin's id")
    return value


def as_directory(value: Any) -> Path:
    """Check what is to be a directory for compiled code. Raises `Misuse`."""
    if not isinstance(value, str | os.PathLike) or not isinstance(os.fspath(value), str) or not os.fspath(value):
        raise Misuse(f"cache_dir must be a path, not {shown(value)}: pass that of a directory, or None")
    return Path(value).absolute()


def as_code(value: Any) -> bytes | Path:
    """Check what is to be loaded. Raises `Misuse`."""
    if isinstance(value, os.PathLike):
        return as_file(value, "wasm")
    if isinstance(value, str):
        raise Misuse("wasm must be bytes or a path, not str: pass a Path, or text.encode() of the text format")
    return as_payload(value, "wasm")


def _read(plugin_id: str, source: bytes | Path) -> bytes:
    if isinstance(source, bytes):
        return source
    try:
        handle = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe isn't waited for
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise LoadFailed(f"plugin {plugin_id!r}: {str(source)!r} is no regular file", plugin_id)
            with os.fdopen(handle, "rb", closefd=False) as file:
                return file.read(WASM_BYTES_MAX + 1)  # one more than is allowed, so that it is refused
        finally:
            os.close(handle)
    except OSError as error:
        raise LoadFailed(f"plugin {plugin_id!r}: its code couldn't be read: {error}", plugin_id) from error


def _built(host: Host, manifest: Manifest, wasm: bytes, sha256: str) -> Build:
    try:
        compiled = host.compiler.compile(wasm, fuel=manifest.limits.fuel is not None)
    except (WasmtimeError, ValueError) as error:
        text = f"plugin {manifest.id!r} couldn't be compiled: {said(error)}"
        raise LoadFailed(text, manifest.id, hint="See the cause; the module must be valid WebAssembly.") from error
    except TimeoutError as error:
        text = f"plugin {manifest.id!r} couldn't be compiled: {said(error)}"
        raise LoadFailed(text, manifest.id, hint="Raise the host's compile_timeout if the code is trusted.") from error
    except OSError as error:
        text = f"plugin {manifest.id!r} couldn't be compiled: {said(error)}"
        raise LoadFailed(text, manifest.id, hint="Code is compiled by a child process; try again.") from error
    shape = shape_of_code(manifest.id, compiled.outline)
    check(manifest, shape)
    return Build(manifest, sha256, compiled, shape)


def _open(host: Host, manifest: Manifest, undo: ExitStack) -> Held | None:
    """Open a plugin's store, if it has one; `undo` closes it again."""
    if manifest.kvstore is None:
        return None
    name = job_id(manifest.id)
    ours = not host.persistency.has_job(name)
    try:
        job = host.persistency.open_job(name, max_bytes=manifest.kvstore.max_bytes)
    except (PersistencyError, TimeoutError) as error:
        raise LoadFailed(f"plugin {manifest.id!r}: its store couldn't be opened: {error}", manifest.id) from error
    if ours:
        undo.callback(job.close)
    return Held(KVStore(job), ours)


def _version(host: Host, build: Build, held: Held | None) -> Version:
    manifest = build.manifest
    functions = everybody()
    if held is not None and manifest.kvstore is not None:
        functions += kvservice.functions(held.store, manifest.kvstore)
    granted = manifest.wasi is not None
    linked = link(manifest.id, build.compiled, build.shape, functions, wasi_granted=granted)
    code = Code(manifest.id, build.compiled, linked, manifest.limits, wasi.config if granted else None)
    limit = manifest.limits.timeout
    return Version(build, code, held, host.call_timeout if limit is None else min(limit, host.call_timeout))


def _close(version: Version) -> None:
    if version.held is not None and version.held.ours:
        version.held.store.job.close()


def _quota(manifest: Manifest) -> int | None:
    return None if manifest.kvstore is None else manifest.kvstore.max_bytes


def job_id(plugin_id: str) -> str:
    """Return the id of the job that a plugin's store is in."""
    return f"plugins/{plugin_id}"


def _job_id(manifest: Manifest) -> str | None:
    return None if manifest.kvstore is None else job_id(manifest.id)
