"""Shared collections and pools: state that a server owns, and that many clients change and follow."""

from persistency.shared.collection import Collection, Record, Snapshot
from persistency.shared.following import SharedChange
from persistency.shared.pool import Document, MergePool
from persistency.shared.store import CHANGES_MAX, SharedStore

__all__ = ["CHANGES_MAX", "Collection", "Document", "MergePool", "Record", "SharedChange", "SharedStore", "Snapshot"]
