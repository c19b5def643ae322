"""The cases by name, in the order in which they are run and shown.

Rules:
  1. A module here holds its `CASES`; adding one means adding it to the list below.

Doesn't know: how anything is measured, who takes part.
"""

from __future__ import annotations

from benchmarks.cases import encoding, lag, packages, reading, writing
from benchmarks.harness import Case

CASES: dict[str, Case] = {
    case.name: case for case in (*writing.CASES, *reading.CASES, *lag.CASES, *encoding.CASES, *packages.CASES)
}
