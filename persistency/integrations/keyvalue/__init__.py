"""py-key-value: a job as a store for `py-key-value-aio` (the extra `keyvalue`), and its twin for threads.

    store = PersistencyStore(directory="data")  # for FastMCP, and whatever else takes an `AsyncKeyValue`
    store = SyncPersistencyStore(job)           # the same rows, without `await`

Rules:
  1. Both twins ask for the same rows in the same way: what one writes the other reads.
  2. What py-key-value has an error for raises that error; all else raises what the engine says.

Doesn't know: who uses the store, and for what.
"""

from __future__ import annotations

try:
    import key_value.aio.stores.base  # noqa: F401  # to tell which extra is missing, before anything needs it
except ModuleNotFoundError as _missing:
    if (_missing.name or "").partition(".")[0] != "key_value":
        raise
    raise ModuleNotFoundError(
        "persistency.integrations.keyvalue needs the extra 'keyvalue': pip install 'persistency[keyvalue]'",
        name=_missing.name,
    ) from None

from persistency.integrations.keyvalue.store import PersistencyStore
from persistency.integrations.keyvalue.sync import KeyValue, SyncPersistencyStore

__all__ = ["KeyValue", "PersistencyStore", "SyncPersistencyStore"]
