"""The conformance suite: all checks together, and a way to run them.

Rules:
  1. A check is a method whose name begins with `test_`; each stands for itself, in any order.

Doesn't know: what is checked, pytest, any adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from persistency.storage.port import Store, StoreOptions
from persistency.testing.batches import BatchChecks
from persistency.testing.care import CareChecks
from persistency.testing.ends import EndChecks
from persistency.testing.feed import FeedChecks
from persistency.testing.quota import QuotaChecks
from persistency.testing.reaping import ReapChecks
from persistency.testing.reopening import ReopenChecks
from persistency.testing.rows import RowChecks
from persistency.testing.runs import RunChecks
from persistency.testing.swaps import SwapChecks


class StoreConformance(
    RowChecks,
    BatchChecks,
    EndChecks,
    ReapChecks,
    SwapChecks,
    RunChecks,
    QuotaChecks,
    FeedChecks,
    ReopenChecks,
    CareChecks,
):
    """The checks: every `test_*` method opens stores and asks them everything its name says."""


def check_store(
    open_store: Callable[[StoreOptions], Store],
    reopen_store: Callable[[StoreOptions], Store | None] = lambda _options: None,
    names: Iterable[str] | None = None,
) -> list[str]:
    """Run the suite, or the checks of these names; return the names. Raises at the first that fails."""
    members = {
        "open_store": lambda _self, options: open_store(options),
        "reopen_store": lambda _self, options: reopen_store(options),
    }
    suite = type("Suite", (StoreConformance,), members)()
    ran = [name for name in dir(suite) if name.startswith("test_")] if names is None else list(names)
    for name in ran:
        getattr(suite, name)()
    return ran
