"""For tests: a clock for those of a service, and what a storage adapter must do to carry jobs.

`ManualClock` is a clock that stands still until a test moves it. pytest has it, a store and a job as fixtures, by the
plugin `pytest_persistency` that comes with this package.

`StoreConformance` is a conformance suite anyone can run against an adapter of their own. With pytest, subclass it under
a name pytest collects, and say how a store is opened:

    from persistency.testing import StoreConformance

    class TestMyStore(StoreConformance):
        def open_store(self, options):
            return MyRoot(...).open("conformance", options)

Rules:
  1. Every check opens new, empty stores by `open_store(options)` and closes them. An adapter whose jobs outlive their
     store also overrides `reopen_store(options)`, which opens again what was opened last.
  2. Without pytest, `check_store(open_store)` raises the first `AssertionError`, whose message says what was expected.
  3. Whoever wants the clock doesn't import the checks.

Doesn't know: pytest, files, SQL, threads, and any adapter.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from persistency.testing.checks import NOW_MS, batch, dump, group, put
    from persistency.testing.clock import ManualClock
    from persistency.testing.suite import StoreConformance, check_store

__all__ = ["NOW_MS", "ManualClock", "StoreConformance", "batch", "check_store", "dump", "group", "put"]

# Where each of them is, by name.
_PLACES = {
    **dict.fromkeys(("NOW_MS", "batch", "dump", "group", "put"), "checks"),
    "ManualClock": "clock",
    **dict.fromkeys(("StoreConformance", "check_store"), "suite"),
}

if not TYPE_CHECKING:  # a type checker would take every misspelled name for one of these

    def __getattr__(name):
        if name not in _PLACES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PLACES})
