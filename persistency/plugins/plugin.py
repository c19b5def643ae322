"""Plugins: the handle of one that is loaded, through which its functions are called.

Rules:
  1. A call is an answer to come: whoever calls waits for it as for any `Reply`, in a thread or in an event loop.
  2. A call's time begins with the call. Where it ends before the function was begun, the function isn't begun. Where a
     guest can't be stopped at once, in the middle of one long instruction, its caller is told all the same.
  3. A call runs the code that is there when it gets its place; what comes later is for those that come later.
  4. Once a plugin is closed every call raises `Closed`; those that run end as they would have.

Doesn't know: how a plugin is loaded, or what its code does.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final, NamedTuple, Protocol, TypeVar
from weakref import WeakSet

from persistency import Closed, KVStore, Misuse, Reply
from persistency.arguments import as_payload, as_seconds
from persistency.plugins.calling import Code, call
from persistency.plugins.compiling import Compiled
from persistency.plugins.context import CallContext
from persistency.plugins.crew import Crew, Telling
from persistency.plugins.epochs import Epochs
from persistency.plugins.errors import PluginBusy, PluginError, PluginTimeout, PluginTrapped
from persistency.plugins.line import Line
from persistency.plugins.manifest import Manifest
from persistency.plugins.shape import Shape

T = TypeVar("T")

GIVE_UP_S: Final = 1.0  # after a call's end, and its guest is still at it: then its caller waits no longer


@dataclass(frozen=True)
class PluginStatistics:
    """A plugin's numbers at one moment; `calls` is the sum of all the others but `trapped` and `timeouts`.

    answered, failed: those that ran to their end, and those that raised; of these `trapped` were stopped in the middle,
      and `timeouts` of those because their time was over.
    busy: those that waited too long. withdrawn: those that were cancelled while they waited, or turned away because the
      plugin was unloaded.
    running, waiting: those that do just now.
    """

    calls: int = 0
    answered: int = 0
    failed: int = 0
    trapped: int = 0
    timeouts: int = 0
    busy: int = 0
    withdrawn: int = 0
    running: int = 0
    waiting: int = 0


class Build(NamedTuple):
    """Compiled code, and what it is to be allowed."""

    manifest: Manifest
    sha256: str
    compiled: Compiled
    shape: Shape


class Held(NamedTuple):
    """A plugin's store, and whether its job is `ours` to close."""

    store: KVStore
    ours: bool


class Version(NamedTuple):
    """What a plugin is at one time: it changes as a whole. `seconds`: how long a call may take."""

    build: Build
    code: Code
    held: Held | None
    seconds: float


class Owner(Protocol):
    """Who has loaded a plugin."""

    crew: Crew
    epochs: Epochs
    calls_wait: float
    lined_up: set[Plugin]  # those in whose line somebody may wait

    def check_here(self) -> None:
        """Raise `Forked` in a forked child."""
        raise NotImplementedError

    def unload(self, plugin: Plugin) -> Reply[None]:
        """Unload one of its plugins."""
        raise NotImplementedError


class Plugin:
    """A plugin that is loaded, until it is unloaded; made by `PluginHost.load`. Any thread.

    When it is loaded anew with other code or another manifest, this stays its handle.
    """

    def __init__(self, owner: Owner, version: Version, calls_max: int) -> None:
        self._owner = owner
        self._line: Line[Call, Version] = Line(calls_max, version)
        self._closed = False
        self.id: str = version.build.manifest.id
        everywhere.add(self)

    @property
    def manifest(self) -> Manifest:
        """Its manifest."""
        return self._version.build.manifest

    @property
    def functions(self) -> tuple[str, ...]:
        """The names of what can be called, sorted."""
        return tuple(sorted(self._version.code.linked.functions))

    @property
    def sha256(self) -> str:
        """The SHA-256 of its code, as it was given, in 64 hexadecimal digits."""
        return self._version.build.sha256

    @property
    def store(self) -> KVStore | None:
        """What the plugin keeps, for its host's use; `None` without the permission. It ends with the plugin.

        When the plugin is loaded anew with another quota it is another object.
        """
        held = self._version.held
        return None if held is None else held.store

    @property
    def closed(self) -> bool:
        """Whether it is unloaded, or about to be."""
        return self._closed

    def call(self, name: str, data: Any = b"", *, timeout: float | None = None) -> Reply[bytes]:
        """Call a function of the plugin with bytes; the reply gives the bytes it answers with.

        `timeout`: seconds from now to the answer, waiting in line included; it can only shorten what the manifest and
        the host allow. Cancelling the reply takes a call that waits out of the line; one that runs goes on.

        Raises `Misuse`, `Closed` and `Forked` at once. The reply raises `CallFailed`, or what says more: one of
        `FunctionNotFound`, `FunctionNotImplemented`, `BadAnswer`, `PluginTrapped`, `OutOfFuel`, `PluginTimeout`, and
        `PluginBusy` for one that waited too long; or `Closed`, if the plugin was unloaded while it waited.
        """
        if not isinstance(name, str):
            raise Misuse(f"name must be a str, not {type(name).__name__}: pass the name of a function")
        data = as_payload(data, "data")
        seconds = self._version.seconds
        if timeout is not None:
            seconds = min(seconds, as_seconds(timeout, "timeout", optional=False) or 0.0)
        self._owner.check_here()
        if self._closed:
            raise self._is_closed()
        made = Call(self, name, data, seconds)
        reply = Reply.of(made.future)
        try:
            self._owner.crew.run(made)
        except RuntimeError as error:  # there is no thread, and there can be none
            self._line.count("busy")
            made.fail(PluginBusy(f"plugin {self.id!r}: no thread could be started for a call", self.id), error)
        return reply

    def unload(self) -> Reply[None]:
        """Unload the plugin: see `PluginHost.unload`."""
        return self._owner.unload(self)

    def statistics(self) -> PluginStatistics:
        """Return the plugin's numbers, since it was first loaded."""
        running, waiting, counts = self._line.numbers()
        trapped = counts.get("trapped", 0) + counts.get("timeouts", 0)
        failed = counts.get("failed", 0) + trapped
        answered, busy, withdrawn = (counts.get(name, 0) for name in ("answered", "busy", "withdrawn"))
        return PluginStatistics(
            calls=answered + failed + busy + withdrawn + running + waiting,
            answered=answered,
            failed=failed,
            trapped=trapped,
            timeouts=counts.get("timeouts", 0),
            busy=busy,
            withdrawn=withdrawn,
            running=running,
            waiting=waiting,
        )

    def __repr__(self) -> str:
        return f"<Plugin {self.id!r}{' (closed)' if self._closed else ''}>"

    @property
    def _version(self) -> Version:
        return self._line.given

    # -- for whoever has loaded it -----------------------------------------------------------------------------------

    def _is_closed(self) -> Closed:
        return Closed(f"plugin {self.id!r} was unloaded", hint="Load it again with host.load(manifest, wasm).")

    def _shut(self) -> None:
        """Refuse every call from now on, and turn those away that wait."""
        self._closed = True
        for waiting in self._line.shut():
            waiting.refuse(self._is_closed())

    def _look(self, now: float) -> bool:
        """Turn those away that have waited too long; return whether others wait."""
        for late in self._line.overdue(now):
            late.refuse(late.too_late())
        return self._line.has_waiting()

    def _become(self, version: Version) -> None:
        """Be another version, for every call that gets a place from now on."""
        self._line.give(version)

    def _pause(self) -> Future[None]:
        """Begin no more calls; the future is done when none runs."""
        self._line.pause()
        return self._idle()

    def _idle(self) -> Future[None]:
        """Return a future that is done when no call runs."""
        idle: Future[None] = Future()
        self._line.when_empty(lambda: idle.set_result(None))
        return idle

    def _resume(self) -> None:
        """Go on after a pause."""
        for granted in self._line.resume():
            self._owner.crew.run(granted)


everywhere: WeakSet[Plugin] = WeakSet()


class Call:
    """One call, from the caller's thread to its end on one of the crew's."""

    __slots__ = (
        "_awaited",
        "_data",
        "_name",
        "_plugin",
        "_refusal",
        "_seconds",
        "_waited",
        "context",
        "future",
        "granted",
        "until",
    )

    def __init__(self, plugin: Plugin, name: str, data: bytes, seconds: float) -> None:
        now = monotonic()
        self._plugin = plugin
        self._name = name
        self._data = data
        self._seconds = seconds
        self._waited = False
        self._awaited = False  # by its caller, while it runs
        self._refusal: BaseException | None = None
        self.granted: Version | None = None
        self.context: CallContext = CallContext(now + seconds)
        self.until: float = now + min(seconds, plugin._owner.calls_wait)
        self.future: Future[bytes] = Future()

    # -- in line -----------------------------------------------------------------------------------------------------

    def begin(self) -> bool:
        """Take a place, or stand in the line."""
        if self.granted is not None or self._refusal is not None:
            return True
        line = self._plugin._line
        if self.future.cancelled():
            line.count("withdrawn")
            return False
        entered = line.enter(self)
        if entered is None:
            line.count("withdrawn")
            self._refusal = self._plugin._is_closed()
            return True
        if not entered:
            self._waited = True
            self._plugin._owner.lined_up.add(self._plugin)
            self.future.add_done_callback(self._withdraw)
        return entered

    def _withdraw(self, future: Future[bytes]) -> None:
        if future.cancelled():
            self._plugin._line.withdraw(self)

    def refuse(self, error: BaseException) -> None:
        """Turn it away, out of the line; it is told by one of the crew's threads."""
        self._refusal = error
        self._plugin._owner.crew.run(self)

    def fail(self, error: BaseException, cause: BaseException | None = None) -> None:
        """Have it end with an error, unless it was cancelled."""
        error.__cause__ = cause
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)

    def too_late(self) -> PluginError:
        """Return what is told to one whose time was over before it was begun."""
        plugin = self._plugin.id
        if not self.context.deadline:
            return PluginTimeout(
                f"plugin {plugin!r}: {self._name} wasn't begun, for the process ends", plugin, "unbegun"
            )
        if not self._waited:
            return PluginTimeout(f"plugin {plugin!r}: {self._name} had {self._seconds:g} s, too few", plugin, "unbegun")
        waited = min(self._seconds, self._plugin._owner.calls_wait)
        return PluginBusy(f"plugin {plugin!r}: {self._name} wasn't begun within {waited:g} s: others ran", plugin)

    # -- at its turn -------------------------------------------------------------------------------------------------

    def work(self) -> tuple[Telling | None, Call | None]:
        """Call the function, and give the place to the next one."""
        refusal = self._refusal
        if refusal is not None:
            return lambda: self.fail(refusal), None
        outcome = "withdrawn"
        tell: Telling | None = None
        try:
            if self.future.set_running_or_notify_cancel():
                self._awaited = True
                outcome, tell = self._made()
        finally:
            self._data, self.granted = b"", None  # they may be large, and somebody may keep the future
            following = self._plugin._line.leave(outcome)
        return tell, following

    def _made(self) -> tuple[str, Telling]:
        """Call the function; return what became of it, in one word, and what tells of it."""
        future, context, epochs = self.future, self.context, self._plugin._owner.epochs
        assert self.granted is not None, "who has no place isn't called"
        try:
            try:
                ticks = epochs.enter(context.deadline)
            except RuntimeError as error:  # no thread keeps the time
                raise PluginBusy(f"plugin {self._plugin.id!r}: no thread could be started", self._plugin.id) from error
            try:
                if not context.remaining():
                    raise self.too_late()
                answer = call(self.granted.code, self._name, self._data, context, self._seconds, ticks)
            finally:
                epochs.leave()
        except BaseException as error:
            failure = error.with_traceback(None)  # which has the frames of this thread, and all that they hold
            return _outcome(error), lambda: _settle(future.set_exception, failure)
        return "answered", lambda: _settle(future.set_result, answer)

    def interrupt(self) -> bool:
        """Let its time be over; the guest is stopped as for that."""
        self.context.deadline = 0.0
        return True

    def late(self, now: float, /) -> Telling | None:
        """Have the caller told, though the guest hasn't come to a place yet where it can be stopped."""
        if not self._awaited or now < self.context.deadline + GIVE_UP_S:
            return None
        self._awaited = False
        text = f"plugin {self._plugin.id!r}: {self._name} took longer than {self._seconds:g} s, and hasn't stopped yet"
        return lambda: _settle(self.future.set_exception, PluginTimeout(text, self._plugin.id, "interrupt"))


def _settle(give: Callable[[T], None], what: T) -> None:
    with suppress(InvalidStateError):  # its caller was told long ago that it was late
        give(what)


def _outcome(error: BaseException) -> str:
    if isinstance(error, PluginBusy):
        return "busy"
    if isinstance(error, PluginTimeout):
        return "timeouts"
    return "trapped" if isinstance(error, PluginTrapped) else "failed"
