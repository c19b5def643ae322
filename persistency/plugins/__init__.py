"""Plugins: WebAssembly guests, each with a store of its own (the extra `plugins`).

    with Persistency("data") as p, PluginHost(p) as host:
        manifest = {"id": "weather", "permissions": {"kvstore": {"reason": "forecasts", "max_size": "1MB"}}}
        plugin = host.load(manifest, Path("weather.wasm")).result()
        print(plugin.call("forecast", b"Berlin").result())

Rules:
  1. A guest has what its manifest grants, and nothing else of the host's.
  2. Whatever a guest does, it harms neither the process nor another plugin, and every call of it has an end.

Doesn't know: what the plugins are for.
"""

from __future__ import annotations

try:
    import wasmtime  # noqa: F401  # to tell which extra is missing, before anything needs it
except ModuleNotFoundError as _missing:
    if (_missing.name or "").partition(".")[0] != "wasmtime":
        raise
    raise ModuleNotFoundError(
        "persistency.plugins needs the extra 'plugins': pip install 'persistency[plugins]'", name=_missing.name
    ) from None

from persistency.plugins.errors import (
    BadAnswer,
    CallFailed,
    FunctionNotFound,
    FunctionNotImplemented,
    LoadFailed,
    OutOfFuel,
    PermissionDenied,
    PluginBusy,
    PluginError,
    PluginNotFound,
    PluginTimeout,
    PluginTrapped,
)
from persistency.plugins.host import PluginHost
from persistency.plugins.manifest import KVGrant, Limits, Manifest, WasiGrant
from persistency.plugins.plugin import Plugin, PluginStatistics

__all__ = [
    "BadAnswer",
    "CallFailed",
    "FunctionNotFound",
    "FunctionNotImplemented",
    "KVGrant",
    "Limits",
    "LoadFailed",
    "Manifest",
    "OutOfFuel",
    "PermissionDenied",
    "Plugin",
    "PluginBusy",
    "PluginError",
    "PluginHost",
    "PluginNotFound",
    "PluginStatistics",
    "PluginTimeout",
    "PluginTrapped",
    "WasiGrant",
]
