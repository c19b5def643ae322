"""Plugin errors: what can go wrong with a plugin, by what its host can do about it.

Rules:
  1. Each names the plugin (`plugin`, its id) and says what happened in the words of whoever wrote or loads it.
  2. A bad manifest or argument is `Misuse` at the call, a plugin or host that is closed is `Closed`: those are the
     engine's.
  3. Waiting or running for too long is a `TimeoutError` too.

Doesn't know: wasmtime, jobs, threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from persistency.errors import PersistencyError


class PluginError(PersistencyError):
    """The base of what is a plugin's own fault, or its host's with it. `plugin` is its id."""

    hint = "Other plugins, and the next call of this one, are not affected."

    def __init__(self, message: str, plugin: str, *more: Any, hint: str | None = None) -> None:
        super().__init__(message, plugin, *more, hint=hint)
        self.plugin: str = plugin
        if isinstance(self, OSError):
            _mend(self, (message, plugin, *more))


def _mend(error: OSError, args: tuple[Any, ...]) -> None:
    """Give a `TimeoutError` what it was given: `OSError` took that for an errno, its text and the name of a file."""
    error.args = args
    error.errno = error.strerror = None
    if error.filename is not None:  # one that was set, be it to `None`, is pickled as another argument
        error.filename = None


class PluginNotFound(PluginError, KeyError):
    """No plugin of that id is loaded, or on its way."""

    hint = "Load it first with host.load(manifest, wasm)."


class LoadFailed(PluginError):
    """The plugin couldn't be compiled, linked or given its store; nothing of it is left. See `__cause__`."""

    hint = "Mend the cause and load it again."


class PermissionDenied(LoadFailed):
    """The code imports what its manifest wasn't granted. `functions` names each, as `"module.name"`."""

    hint = "Grant it in the manifest's permissions, or build the plugin without it."

    def __init__(self, message: str, plugin: str, functions: Sequence[str] = (), *, hint: str | None = None) -> None:
        super().__init__(message, plugin, tuple(functions), hint=hint)
        self.functions: tuple[str, ...] = tuple(functions)


class CallFailed(PluginError):
    """The call came to nothing. As itself: the plugin said so, and its words are the message."""

    hint = "The plugin's author knows what its message means."


class FunctionNotFound(CallFailed):
    """The code exports no function of that name that takes `(i32, i32)` and gives an `i64`."""

    hint = "plugin.functions lists what can be called."


class FunctionNotImplemented(CallFailed):
    """The function is there, and answered that it does nothing."""

    hint = "The plugin exports the function for form's sake: treat it as not there."


class BadAnswer(CallFailed):
    """What the function returned is no answer: a place outside the plugin's memory."""

    hint = "The function must return (pointer << 32) | length, within its memory."


class PluginTrapped(CallFailed):
    """The code did what WebAssembly forbids, and was stopped. `reason` is one word, such as `"unreachable"`."""

    hint = "A trap is a defect of the plugin's code; each call starts afresh."

    def __init__(self, message: str, plugin: str, reason: str = "", *, hint: str | None = None) -> None:
        super().__init__(message, plugin, reason, hint=hint)
        self.reason: str = reason


class OutOfFuel(PluginTrapped):
    """The code used up the instructions its manifest allows a call."""

    hint = "Raise limits.fuel in the manifest, or have the plugin do less in one call."


class PluginTimeout(PluginTrapped, TimeoutError):
    """The call took longer than it may, and the code was stopped in the middle."""

    hint = "Raise the timeout, or have the plugin do less in one call."


class PluginBusy(CallFailed, TimeoutError):
    """As many calls as may run at once ran for as long as one may wait; the function wasn't begun."""

    hint = "Call it less often at once, or raise calls_max."
    retryable = True
