"""What a storage adapter must do to carry jobs: a conformance suite anyone can run against their own.

With pytest, subclass the suite under a name pytest collects, and say how a store is opened:

    from persistency.testing import StoreConformance

    class TestMyStore(StoreConformance):
        def open_store(self, options):
            return MyRoot(...).open("conformance", options)

Rules:
  1. Every check opens new, empty stores by `open_store(options)` and closes them. An adapter whose jobs outlive their
     store also overrides `reopen_store(options)`, which opens again what was opened last.
  2. Without pytest, `check_store(open_store)` raises the first `AssertionError`, whose message says what was expected.

Doesn't know: pytest, files, SQL, threads, and any adapter.
"""

from __future__ import annotations

from persistency.testing.checks import NOW_MS, batch, dump, group, put
from persistency.testing.suite import StoreConformance, check_store

__all__ = ["NOW_MS", "StoreConformance", "batch", "check_store", "dump", "group", "put"]
