"""The cases by name, in the order in which they are run and shown.

Rules:
  1. A module here holds its `CASES`; adding one means adding it to the list below.

Doesn't know: how anything is measured, who takes part.
"""

from __future__ import annotations

from benchmarks.cases import (
    batches,
    encoding,
    growth,
    jobs,
    lag,
    packages,
    pressure,
    reading,
    starting,
    values,
    writing,
)
from benchmarks.harness import Case

CASES: dict[str, Case] = {
    case.name: case
    for case in (
        *writing.CASES,
        *reading.CASES,
        *batches.CASES,
        *values.CASES,
        *lag.CASES,
        *pressure.CASES,
        *encoding.CASES,
        *starting.CASES,
        *jobs.CASES,
        *packages.CASES,
    )
}
# What takes gigabytes and many minutes: only if it is asked for.
FULL_CASES: dict[str, Case] = {case.name: case for case in (*growth.CASES, *jobs.FULL_CASES)}
