"""The host of plugins: loads them, keeps them by their ids, unloads them, and ends them all with the process.

Rules:
  1. What is done with one id is done one after the other, in the order it was asked for; different ids don't wait for
     one another, but for the bound on loads at once.
  2. A load that fails leaves what was there before: nothing, or the plugin as it was. It can be tried again.
  3. Code that changes takes its place in one step: a call runs what was there when it began.
  4. A plugin's job is opened for it and closed after its last call. One that was open already, by the host's own
     doing, stays open.
  5. When the interpreter ends every guest is stopped first: a thread that came out of one after that would abort the
     process.

Doesn't know: how code is compiled, linked or called.
"""

from __future__ import annotations

import atexit
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from time import monotonic
from typing import Any, TypeVar

from persistency import Closed, Forked, Misuse, Persistency, Reply
from persistency.arguments import as_count, as_seconds
from persistency.closing import Closing
from persistency.plugins import crew
from persistency.plugins.compiling import COMPILE_SECONDS, Compiler
from persistency.plugins.context import current
from persistency.plugins.crew import Crew, Do
from persistency.plugins.engines import keep_for_ever
from persistency.plugins.epochs import Epochs
from persistency.plugins.errands import Errand, Queue, Steps, done, failed
from persistency.plugins.errors import LoadFailed, PluginError, PluginNotFound
from persistency.plugins.line import Line
from persistency.plugins.loading import Place, as_code, as_directory, as_id, loading, unloading
from persistency.plugins.manifest import Manifest
from persistency.plugins.plugin import Plugin, everywhere
from persistency.sweeps import as_bytes

T = TypeVar("T")

CALL_SECONDS_MAX = 3_600  # what is counted in ticks is counted to its end, all at once, when the process ends
_EXIT_S = 2.0  # so long the end of the process waits for guests to come to theirs
_LEAVE_S = 0.1  # of these, for those that leave by themselves
_NO_THREAD = "Try again when there are fewer threads."


class PluginHost(Closing):
    """A host for plugins, over a `Persistency` that stays its maker's to close. Any thread.

    cache_dir: the directory compiled code is kept in (`None`: it is compiled anew by each process); `cache_max`: how
      much it may take, in bytes or as a text like `"100MB"` (`None`: any amount).
    compiles_max: how many plugins may be compiled at once.
    compile_timeout: how many seconds compiling one may take; beyond that it isn't loaded.
    call_timeout: how many seconds a call may take, at most an hour; a manifest or a call can only shorten it.
    calls_max: how many calls of one plugin may run at once; more of them wait in line, each for `calls_wait` seconds
      at most (`None`: to the end of its time).

    Raises `Misuse`, also for a `cache_dir` that others can write to, and `Closed` when the interpreter ends.
    """

    _closed = True  # until it is known to be sound; see __del__
    _forked = False

    def __init__(
        self,
        persistency: Persistency,
        *,
        cache_dir: str | PathLike[str] | None = None,
        compiles_max: int = 2,
        compile_timeout: float = COMPILE_SECONDS,
        cache_max: int | str | None = "100MB",
        call_timeout: float = 30.0,
        calls_max: int = 10,
        calls_wait: float | None = 5.0,
    ) -> None:
        if not isinstance(persistency, Persistency):
            raise Misuse(f"persistency must be a Persistency, not {type(persistency).__name__}: pass Persistency(root)")
        self.persistency: Persistency = persistency
        self.calls_max: int = as_count(calls_max, "calls_max", 1)
        self.call_timeout: float = as_seconds(call_timeout, "call_timeout", optional=False) or 0.0
        if not 0 < self.call_timeout <= CALL_SECONDS_MAX:
            raise Misuse(f"call_timeout must be more than 0 and at most {CALL_SECONDS_MAX} s, not {call_timeout!r}")
        wait = as_seconds(calls_wait, "calls_wait")
        self.calls_wait: float = self.call_timeout if wait is None else wait
        compiles_max = as_count(compiles_max, "compiles_max", 1)
        bytes_max = None if cache_max is None else as_bytes(cache_max, "cache_max")
        directory = None if cache_dir is None else as_directory(cache_dir)
        seconds = as_seconds(compile_timeout, "compile_timeout", optional=False) or 0.0
        if not seconds:
            raise Misuse("compile_timeout must be more than 0 s: pass how long compiling may take")
        self.compiler: Compiler = Compiler(directory, compiles_max, bytes_max, seconds)
        self.crew: Crew = Crew("persistency-plugins")
        self.epochs: Epochs = Epochs(self.compiler.engines.increment_epoch, _looking(weakref.ref(self)))
        # Beside those that compile, as many may find their code compiled already.
        self._loads: Line[Errand[Any], bool] = Line(2 * compiles_max, True)
        self._lock = threading.RLock()
        self.lined_up: set[Plugin] = set()
        self._places: dict[str, Place] = {}  # of the ids that are loaded, or that something is done with
        self._closing: Errand[None] | None = None
        self._closing_begun = False
        self._closed = False
        _hosts.add(self)
        if _exit_until is not None:  # asked only now: who was added before is found by the hook
            self._closed = True
            raise Closed("the interpreter ends: nobody would stop the plugins of a host any more")

    # -- plugins -----------------------------------------------------------------------------------------------------

    def load(
        self, manifest: Manifest | Mapping[str, Any] | str | PathLike[str], wasm: bytes | PathLike[str]
    ) -> Reply[Plugin]:
        """Load a plugin in the background; the reply gives it, and then it can be called.

        manifest: a `Manifest`, or what `Manifest.of` makes one of. wasm: a module, in WebAssembly's binary format or in
        its text format in UTF-8; or the path of a file with one, read in the background.

        An id that is loaded already gets the new code and manifest, if they differ: the `Plugin` stays the same, calls
        that run end with what they began with. With another quota, or without its store, those that run are waited for
        first. Loads of one id are done one after the other.

        Raises `Misuse`, `Closed` and `Forked` at once. The reply raises `LoadFailed`, `PermissionDenied` (naming each
        function that wasn't granted), or `Closed`; what was there before is there still, and it can be tried again.
        """
        manifest = Manifest.of(manifest)
        source = as_code(wasm)
        self._check_open()
        with self._lock:
            place = self._place(manifest.id)
            last = place.queue.last()
            if last is not None and isinstance(source, bytes) and last.what == (manifest, source):
                return Reply.of(last.future)
            errand = Errand(loading(self, place, manifest, source), self._loads, (manifest, source))
            try:
                place.queue.add(errand)
            except RuntimeError as error:
                self._tidy(manifest.id)
                text = f"plugin {manifest.id!r} wasn't loaded: no thread could be started"
                return failed(LoadFailed(text, manifest.id, hint=_NO_THREAD), error)
        return Reply.of(errand.future)

    def unload(self, plugin: str | Plugin) -> Reply[None]:
        """Unload a plugin, given by its id or its handle: from now on its calls raise `Closed`, also those in line.

        The reply is there when those that run have ended and its store is closed. What the store keeps stays. One that
        is unloaded already is fine; for an id that isn't known, raises `PluginNotFound`, and `Misuse` for another
        host's handle.
        """
        self.check_here()
        plugin_id = plugin.id if isinstance(plugin, Plugin) else as_id(plugin)
        if isinstance(plugin, Plugin) and plugin._owner is not self:
            raise Misuse(f"{plugin!r} is another host's: pass one of this host's, or call its own unload()")
        with self._lock:
            place = self._places.get(plugin_id)
            errand: Errand[None] | None = None
            if isinstance(plugin, Plugin):
                if place is None or place.plugin is not plugin:  # it was unloaded before
                    return done(None)
                errand = place.queue.find(lambda what: what is plugin)
            if place is None:
                raise PluginNotFound(f"no plugin with id {plugin_id!r}", plugin_id)
            try:
                return Reply.of((errand or self._unload(place)).future)
            except RuntimeError as error:
                text = f"plugin {plugin_id!r} wasn't unloaded: no thread could be started"
                return failed(PluginError(text, plugin_id, hint=_NO_THREAD), error)

    def ready(self, plugin_id: str) -> Reply[Plugin]:
        """Wait for a plugin: the reply is that of the load on its way, or the plugin that is loaded.

        A load counts until it is over, whatever is to be done after it. Raises `PluginNotFound` if there is neither,
        and `Closed`.
        """
        self._check_open()
        as_id(plugin_id)
        with self._lock:
            place = self._places.get(plugin_id)
            load = None if place is None else place.queue.find(lambda what: isinstance(what, tuple))
            if load is not None:
                return Reply.of(load.future)
        return done(self.plugin(plugin_id))

    def plugin(self, plugin_id: str) -> Plugin:
        """Return a plugin that is loaded. Raises `PluginNotFound`."""
        self.check_here()
        place = self._places.get(as_id(plugin_id))
        found = None if place is None else place.plugin
        if found is None or found.closed:
            raise PluginNotFound(f"no plugin with id {plugin_id!r} is loaded", plugin_id)
        return found

    def plugins(self) -> list[Plugin]:
        """Return the plugins that are loaded, by the order of their ids."""
        self.check_here()
        with self._lock:
            found = [place.plugin for _, place in sorted(self._places.items())]
        return [plugin for plugin in found if plugin is not None and not plugin.closed]

    def __contains__(self, plugin_id: object) -> bool:
        return plugin_id in list(self)

    def __iter__(self) -> Iterator[str]:
        return iter([plugin.id for plugin in self.plugins()])

    def __len__(self) -> int:
        return len(self.plugins())

    def __bool__(self) -> bool:
        return True  # an empty one is still there

    # -- closing -----------------------------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether it is closed, or about to be."""
        return self._closed

    def close(self, timeout: float | None = None) -> None:
        """Unload every plugin, after the loads and calls that are on their way; a second call waits for the same.

        A load whose code is still being compiled raises `Closed`: nothing waits for it. Raises `TimeoutError` after
        `timeout` seconds, naming those that are still closing; they keep closing. Whatever closing a plugin's store
        raises, the first of it.
        """
        timeout = as_seconds(timeout, "timeout")
        reply = self._leave()
        try:
            reply.result(timeout)
        except TimeoutError:
            if reply.done():
                raise
            late = ", ".join(map(repr, sorted(self._places)))
            raise TimeoutError(f"still closing after {timeout:g} s: {late}; they keep closing") from None

    async def aclose(self) -> None:
        """Do what `close` does, without blocking the event loop."""
        await self._leave()

    def _leave(self) -> Reply[None]:
        """Begin to close. Each call sees to it that it is begun: an interrupt may have come into the one before."""
        self.check_here()
        if current.call is not None:
            raise Misuse("a host can't be closed by what runs inside of a call of its plugin: close it elsewhere")
        with self._lock:
            self._closed = True
            closing = self._closing
            if closing is None:
                closing = self._closing = Errand(self._steps_to_close())
        self.compiler.close()
        for plugin in self._loaded():
            plugin._shut()
        self.crew.run(Do(self._begin_to_close))
        return Reply.of(closing.future)

    def _begin_to_close(self) -> None:
        with self._lock:
            if self._closing is not None and not self._closing_begun:
                self._closing_begun = True
                Queue(self.crew, _nothing).add(self._closing)

    def _steps_to_close(self) -> Steps[None]:
        with self._lock:
            unloading = [self._unload(place).future for place in self._places.values()]
        yield from unloading
        self.epochs.close()
        self.crew.end()
        for error in filter(None, (future.exception() for future in unloading)):
            raise error

    def __repr__(self) -> str:
        return f"<PluginHost of {self.persistency!r}{' (closed)' if self._closed else ''}>"

    def __del__(self) -> None:
        if not self._closed and not self._forked and self._places:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, source=self, stacklevel=2)

    # -- within ------------------------------------------------------------------------------------------------------

    def check_here(self) -> None:
        """Raise `Forked` in a child of the process whose host it is."""
        if self._forked:
            raise Forked(f"{self!r} is the parent process'", hint="Make a new PluginHost in this process.")

    def _check_open(self) -> None:
        self.check_here()
        if self._closed:
            raise Closed(f"{self!r} is closed", hint="Make a new PluginHost.")

    def _place(self, plugin_id: str) -> Place:
        """Return the place of an id, made if it isn't there. The lock is held."""
        place = self._places.get(plugin_id)
        if place is None:
            place = self._places[plugin_id] = Place(Queue(self.crew, lambda: self._tidy(plugin_id)))
        return place

    def _tidy(self, plugin_id: str) -> None:
        """Forget an id that nothing is loaded under, and that nothing is done with."""
        with self._lock:
            place = self._places.get(plugin_id)
            if place is not None and place.plugin is None and place.queue.last() is None:
                del self._places[plugin_id]

    def _unload(self, place: Place) -> Errand[None]:
        """Begin to unload what is there, and is on its way. The lock is held."""
        if place.plugin is not None:
            place.plugin._shut()
        last = place.queue.last()
        if last is not None and not isinstance(last.what, tuple):
            return last
        errand = Errand(unloading(place), what=place.plugin)
        place.queue.add(errand)
        return errand

    def _loaded(self) -> list[Plugin]:
        with self._lock:
            return [place.plugin for place in self._places.values() if place.plugin is not None]

    def _look(self, now: float) -> None:
        """Do what is due at a tick."""
        self.crew.tick(now)
        for plugin in list(self.lined_up):
            self.lined_up.discard(plugin)  # first: whoever comes to its line after it was looked at adds it again
            if plugin._look(now):
                self.lined_up.add(plugin)

    def _stop(self) -> None:
        """Refuse everything from now on, and have every call end."""
        self._closed = True
        self.compiler.close()
        for plugin in self._loaded():
            plugin._shut()
        self.crew.interrupt(0.0)


def _looking(host: weakref.ref[PluginHost]) -> Callable[[float], None]:
    """Return what is called at each tick, without keeping the host alive."""

    def look(now: float) -> None:
        found = host()
        if found is not None:
            found._look(now)

    return look


def _nothing() -> None:
    """Nothing is to be done when the host's own errand is over."""


# -- the process --------------------------------------------------------------------------------------------------

_hosts: weakref.WeakSet[PluginHost] = weakref.WeakSet()
_exit_until: float | None = None  # on the monotonic clock, as soon as the process ends


def _all_hosts() -> list[PluginHost]:
    while True:
        try:
            return list(_hosts)
        except RuntimeError:  # another thread made one in the middle of that
            continue


def _at_exit() -> None:
    """Have every guest come to its end. The engine's own hook comes later: jobs still answer until then."""
    global _exit_until  # noqa: PLW0603  # of this process
    _exit_until = until = _exit_until or monotonic() + _EXIT_S  # from now on nobody makes a host
    hosts = [host for host in _all_hosts() if not host._forked]
    for host in hosts:
        host._stop()
    for host in hosts:  # those that call host functions end by that, and are out of the way of those that don't
        host.crew.interrupt(_LEAVE_S)
    for host in hosts:
        host.epochs.interrupt_all(max(0.0, until - monotonic()))
    for host in hosts:
        host.crew.interrupt(max(0.0, until - monotonic()))


def _in_child() -> None:
    global _exit_until  # noqa: PLW0603  # as above
    _exit_until = None
    hosts = _all_hosts()
    for host in hosts:
        host._forked = True
    keep_for_ever([*hosts, *everywhere])
    crew.forget_parent()


# Twice: a Ctrl-C at the very beginning of it ends only the first.
atexit.register(_at_exit)
atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)
