"""persistency: an embedded, durable, ordered key-value engine. Fire-and-forget writes you can trust.

    from persistency import Persistency, key

    with Persistency("data") as p, p.open_job("alpha") as job:
        job.put("messages", key("channel-42", 1), b"hello")     # an event: returns None, costs about a microsecond
        rows = job.scan_prefix("messages", key("channel-42")).result()    # a request: a Reply; or await it

A job is an actor: one SQLite file, one worker thread, one mailbox. Reads see every write posted before them. What was
accepted is committed in order, or its failure is told by `flush()`, `close()`, `on_error`, the log and the statistics.
"""

from persistency.actor.reply import Reply
from persistency.actor.tally import Statistics
from persistency.category import Category
from persistency.codec.keys import Key, KeyRange, RawKey, key
from persistency.codec.objects import CBOR, RAW, Codec, typed
from persistency.coding import CategoryEntry, CategoryRow
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
from persistency.feed import ChangeFeed
from persistency.job import Job
from persistency.kvstore import KVStore
from persistency.lifecycle import install_signal_handlers
from persistency.mapping import CategoryMapping
from persistency.ops import Change, Check, Delete, DeletePrefix, DeleteRange, Entry, Found, Op, Put, Row
from persistency.reader import Reader
from persistency.shared import Collection, MergePool, Record, SharedChange, SharedStore
from persistency.storage.port import StoredJob
from persistency.transaction import Transaction

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
    "MergePool",
    "Misuse",
    "Op",
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
