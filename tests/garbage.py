"""Garbage collections of the benchmarks, in tests that aren't about them.

Each measurement begins with a full collection, and in a run of all tests one of those walks through some 700,000
objects of test modules, a third of a second long: the benchmarks' tests would spend most of their time in it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator

import pytest


@pytest.fixture(autouse=True)
def heap_left_alone() -> Iterator[Callable[[], object]]:
    """Collect only what a test makes; where it is imported, every test has it.

    What is there when the test begins stays frozen until it ends. What this gives undoes it, for a test that looks at
    what the benchmarks freeze.
    """
    unfreeze = gc.unfreeze
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)  # the benchmarks', after each measurement

        def undo() -> None:
            patch.undo()
            unfreeze()

        yield undo
    unfreeze()
