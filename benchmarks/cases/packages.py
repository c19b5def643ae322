"""A case with real records: the packages of a Linux distribution, of very different sizes.

Rules:
  1. The folder that `PERSISTENCY_DATA` names holds the records; without it the case says that it is left out.

Doesn't know: contenders, targets.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from benchmarks.cases.writing import put_rows
from benchmarks.harness import Case, Sample
from benchmarks.protocol import Contender, Pair, Way
from benchmarks.workload import Workload, read_packages

VARIABLE = "PERSISTENCY_DATA"
FILE = "debian-packages.jsonl.gz"


def _left_out() -> str | None:
    folder = os.environ.get(VARIABLE)
    if not folder:
        return f"{VARIABLE} isn't set: it names a folder with {FILE}"
    if not (Path(folder) / FILE).is_file():
        return f"the folder that {VARIABLE} names has no {FILE}"
    return None


@cache
def _records(path: Path) -> list[Pair]:
    return read_packages(path)


def _put(contender: Contender, way: Way, workload: Workload, directory: Path) -> Sample:
    records = _records(Path(os.environ[VARIABLE]) / FILE)
    rows = workload.for_contender(contender, records)
    # As many as there are, unless a small run was asked for.
    return put_rows(contender, way, rows[: workload.portion(way, len(rows))], directory)


# The records come nearly in the order of their packages, not of their keys, which begin with the section.
CASES = (Case("packages", "puts of package records, until committed", ("put-random", "put"), _put, _left_out),)
