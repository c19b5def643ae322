"""persistency: an embedded, durable, ordered key-value engine. Fire-and-forget writes you can trust.

    from persistency import Persistency, key

    with Persistency("data") as p, p.open_job("alpha") as job:
        job.put("messages", key("channel-42", 1), b"hello")     # an event: returns None, costs about a microsecond
        rows = job.scan_prefix("messages", key("channel-42")).result()    # a request: a Reply; or await it

A job is an actor: one SQLite file, one worker thread, one mailbox. Reads see every write posted before them. What was
accepted is committed in order, or its failure is told by `flush()`, `close()`, `on_error`, the log and the statistics.

The views are imported when they are asked for: who only opens jobs doesn't wait for them.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from persistency.actor.reply import Reply
from persistency.actor.tally import Statistics
from persistency.codec.keys import Key, KeyRange, RawKey, key
from persistency.engine import Persistency
from persistency.errors import (
    Closed,
    Conflict,
    Corrupt,
    DiskFull,
    Failure,
    FeedTruncated,
    Forked,
    JobLocked,
    JobNotFound,
    LeaseLost,
    Misuse,
    Overloaded,
    PersistencyError,
    Poisoned,
    QuotaExceeded,
    SchemaTooNew,
    StorageError,
    Unavailable,
    WriteFailed,
)
from persistency.job import Job
from persistency.lifecycle import install_signal_handlers
from persistency.ops import Change, Check, Delete, DeletePrefix, DeleteRange, Entry, Found, Op, Put, Row
from persistency.options import OpenOptions
from persistency.reader import Reader
from persistency.storage.port import StoredJob
from persistency.transaction import Transaction

if TYPE_CHECKING:
    from persistency.category import Category
    from persistency.codec.objects import CBOR, RAW, Codec, typed
    from persistency.coding import CategoryEntry, CategoryRow
    from persistency.feed import ChangeFeed
    from persistency.kvstore import KVStore
    from persistency.mapping import CategoryMapping
    from persistency.shared import Collection, MergePool, Record, SharedChange, SharedStore

__all__ = [
    "CBOR",
    "RAW",
    "Category",
    "CategoryEntry",
    "CategoryMapping",
    "CategoryRow",
    "Change",
    "ChangeFeed",
    "Check",
    "Closed",
    "Codec",
    "Collection",
    "Conflict",
    "Corrupt",
    "Delete",
    "DeletePrefix",
    "DeleteRange",
    "DiskFull",
    "Entry",
    "Failure",
    "FeedTruncated",
    "Forked",
    "Found",
    "Job",
    "JobLocked",
    "JobNotFound",
    "KVStore",
    "Key",
    "KeyRange",
    "LeaseLost",
    "MergePool",
    "Misuse",
    "Op",
    "OpenOptions",
    "Overloaded",
    "Persistency",
    "PersistencyError",
    "Poisoned",
    "Put",
    "QuotaExceeded",
    "RawKey",
    "Reader",
    "Record",
    "Reply",
    "Row",
    "SchemaTooNew",
    "SharedChange",
    "SharedStore",
    "Statistics",
    "StorageError",
    "StoredJob",
    "Transaction",
    "Unavailable",
    "WriteFailed",
    "install_signal_handlers",
    "key",
    "typed",
]  # fmt: skip

__version__ = "0.1.0"

# Where each of them is, by name.
_VIEWS = {
    "Category": "category",
    **dict.fromkeys(("CBOR", "RAW", "Codec", "typed"), "codec.objects"),
    **dict.fromkeys(("CategoryEntry", "CategoryRow"), "coding"),
    "ChangeFeed": "feed",
    "KVStore": "kvstore",
    "CategoryMapping": "mapping",
    **dict.fromkeys(("Collection", "MergePool", "Record", "SharedChange", "SharedStore"), "shared"),
}

if not TYPE_CHECKING:  # a type checker would take every misspelled name for one of these

    def __getattr__(name):
        if name not in _VIEWS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(f"{__name__}.{_VIEWS[name]}"), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_VIEWS})
