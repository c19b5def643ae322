"""Cases that start: the import of a package, the opening of a file that is there.

Rules:
  1. Imports are measured in interpreters that have imported nothing but what the package depends on; the first one,
     which may have to compile it, isn't counted.
  2. All open the same file, which this engine has made and closed, and every opening is seen to find a row of it.

Doesn't know: contenders besides this engine, targets.
"""

from __future__ import annotations

import json
import random
from collections.abc import Generator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter_ns

from benchmarks.contenders import OURS, load
from benchmarks.harness import TURNS, Case, Measuring, Sample, opened, parts, percentiles
from benchmarks.process import run_program
from benchmarks.protocol import CATEGORY, Contender, Jobs, Way
from benchmarks.verify import Mismatch, check_answers
from benchmarks.workload import Workload

INTERPRETERS = 10
ROWS_EACH = 10_000  # a smaller run has fewer interpreters, one for so many rows
INTERPRETERS_MIN = 3
OPENINGS = 200
ROWS_STORED = 1_000
# Nothing else is imported before the clock runs: what the package needs of the standard library counts.
PROGRAM = """
import sys
from time import perf_counter
import apsw, cbor2
name = sys.argv[1]
before = name in sys.modules
begun = perf_counter()
__import__(name)
took = perf_counter() - begun
import json
file = getattr(sys.modules[name], "__file__", None)
print(json.dumps({"us": took * 1e6, "file": file, "before": before}))
"""


def _import(contender: Contender, way: Way, workload: Workload, _directory: Path) -> Sample:
    name = way.make(None)()
    spec = find_spec(contender.name)
    assert spec is not None
    times = []
    for _ in range(1 + max(INTERPRETERS_MIN, min(INTERPRETERS, workload.rows // ROWS_EACH))):
        found = json.loads(run_program(PROGRAM, name))
        if found["before"] or found["file"] != spec.origin:
            raise Mismatch(
                f"{contender.name}: what was imported is {found['file']}, not {spec.origin} for the first time"
            )
        times.append(round(found["us"] * 1000))
    del times[0]
    return Sample(len(times), median(times) / 1000)


def _open(contender: Contender, way: Way, workload: Workload, directory: Path) -> Measuring:
    _store(workload, directory)
    rows = workload.for_contender(contender, workload.ordered)[:ROWS_STORED]
    reads = random.Random(3).choices(rows, k=workload.portion(way, OPENINGS))
    with closing(way.make(None)(directory, None)) as jobs:
        opening, closed, answers = yield from _open_each(jobs, [key for key, _payload in reads])
    check_answers(contender.name, answers, (payload for _key, payload in reads))
    p50, p99 = percentiles(opening)
    return Sample(len(reads), p50, p50, p99, more={"us to close": percentiles(closed)[0]})


def _store(workload: Workload, directory: Path) -> None:
    """Have this engine make the file, whoever opens it."""
    with opened(load(OURS), directory) as (store, _runner):
        store.fill(workload.ordered[:ROWS_STORED])


def _open_each(jobs: Jobs, keys: list[bytes]) -> Generator[None, None, tuple[list[int], list[int], list[bytes | None]]]:
    """Open a job, read one row, close it again, for each key; return what opening and closing took, and the answers."""
    opening, closed, answers = [], [], []
    for part in parts(keys, TURNS):
        yield
        for key in part:
            begun = perf_counter_ns()
            job = jobs.open(CATEGORY)
            opening.append(perf_counter_ns() - begun)
            answers.append(job.get(key))
            begun = perf_counter_ns()
            job.close()
            del job  # what that frees belongs to closing, not to the next opening
            closed.append(perf_counter_ns() - begun)
    return opening, closed, answers


CASES = (
    Case("import", "import in a fresh interpreter, beyond apsw and cbor2", ("import",), _import),
    Case("open", "opening an existing file of 1,000 rows, median", ("open",), _open, in_turn=True),
)
