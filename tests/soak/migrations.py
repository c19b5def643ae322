"""The soak's migrations: a hundred thousand real items out of diskcache and out of sqlitedict, each one compared."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic

from tests.migrations import check_diskcache, check_sqlitedict
from tests.soak.part import Part, Tell

ITEMS_PER_CYCLE = 100  # a hundred thousand in the full form


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Bring a cache and a file of records over, and compare item by item."""
    count = ITEMS_PER_CYCLE * given.cycles
    for name, check in (("diskcache", check_diskcache), ("sqlitedict", check_sqlitedict)):
        tell(f"{name}: {count:,} items")
        part, since = Part(f"{name} brought over"), monotonic()
        with tempfile.TemporaryDirectory(prefix="migration-") as place:
            part.wrong = [f"{name}: {complaint}" for complaint in check(Path(place), count)]
        part.cells = {
            "cycles": "1",
            "lost": str(len(part.wrong)),
            "rows": f"{count:,}",
            "seconds": f"{monotonic() - since:.1f}",
        }
        yield part
