"""The soak's large tables: a million rows that end, gone from the file in bounded slices; a million rows counted."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

import pytest

from tests.soak.part import Part, Tell
from tests.test_quota import compare_costs
from tests.test_time import Slices, check_slices, vanish

ROWS = 1_000_000


def soak(_given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Let a million rows end, and count a million rows."""
    with tempfile.TemporaryDirectory(prefix="large-") as place:
        part, since = Part(f"{ROWS:,} rows that end"), monotonic()
        with pytest.MonkeyPatch.context() as patch:
            slices = Slices(patch)
            left = vanish(f"{place}/ending", ROWS, slices, lambda left: tell(f"{part.name}: {left:,} are left"))
        try:
            check_slices(slices, ROWS, left)
        except AssertionError as error:
            part.wrong.append(f"{part.name}: {error}")
        part.cells = {"cycles": f"{len(slices.counts):,}", "seconds": f"{monotonic() - since:.1f}"}
        yield part
        part, since = Part(f"storage_used of {ROWS:,} rows"), monotonic()
        tell(part.name)
        try:
            compare_costs(Path(place), ROWS)
        except AssertionError as error:
            part.wrong.append(f"{part.name}: {error}")
        part.cells = {"rows": f"{ROWS:,}", "seconds": f"{monotonic() - since:.1f}"}
        yield part
