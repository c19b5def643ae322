"""The soak's forks, children and signals, on every Python there is: forks beside a busy worker, and every kind of exit.

The environment variable `PERSISTENCY_PYTHONS` names interpreters that have the dependencies, separated by colons;
without it there is only the one that runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from time import monotonic

from persistency import Persistency
from tests.crash.forked import ENDS, FLAGS, play
from tests.crash.forking import PLANTED, SITUATIONS, play_case, unseen
from tests.crash.held import PENDING
from tests.crash.running import PROJECT
from tests.crash.signalled import ORDERLY, judge, rows, signal_from_outside
from tests.crash.spawned import STARTS, WORK, play_spawned
from tests.soak.exits import EXITS
from tests.soak.part import Part, Tell

Act = Callable[[Path], "list[str]"]

SECONDS_PER_FORK = 15.0
CASES: tuple[tuple[str, ...], ...] = (
    ("idle",), ("busy",), ("settling",), ("resting",), ("memory",), ("in_run", "caller"), ("in_run", "worker"),
    ("locks",), ("reopening", "forks"), ("reopening", "programs"), ("reports",), ("spawning",),
    ("plain",), ("in_handler",), ("nested",), ("in_threads",), ("in_callbacks",), ("in_hooks",),
    *(("own_jobs", end) for end in ENDS),
    *(("outlive", situation, end) for situation in SITUATIONS for end in ("closed", "killed")),
)  # fmt: skip
SIGNALS = (*ORDERLY, "waiting_for_room", "three_times", "without", "own_handlers")
INTERRUPTS = ("interrupts", "hook_begins", "hook_storm")
FROM_OUTSIDE = 5


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """On each Python fork `cycles // 2` times (500), and try every other form `cycles // 500` times (2)."""
    for python in os.environ.get("PERSISTENCY_PYTHONS", sys.executable).split(":"):
        name = _version(python)
        yield storm(f"forks at random, {name}", python, max(1, given.cycles // 2), given, tell)
        times = max(1, given.cycles // 500)
        forms: dict[str, Iterable[tuple[str, Act]]] = {
            "forks, planted defects": [(plant, partial(_unseen, python, plant)) for plant in PLANTED],
            "forks in every place": _forks(python),
            "exits": _exits(python),
            "children of multiprocessing": _children(python),
            "signals": _signals(python, given.seed),
        }
        for kind, tried in forms.items():
            yield repeated(f"{kind}, {name}", [*tried] * times, given, tell)


def _version(python: str) -> str:
    done = subprocess.run([python, "--version"], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout.strip()


def storm(name: str, python: str, forks: int, given: argparse.Namespace, tell: Tell) -> Part:
    """Fork at random moments; return the table's row."""
    part, begun, told = Part(name), monotonic(), {"forks": 0, "rows": 0, "wrong": []}
    until = begun + min(given.seconds, SECONDS_PER_FORK * forks + 60)
    with tempfile.TemporaryDirectory(prefix="forks-") as place:
        options = ["--forks", str(forks), "--seed", str(given.seed)]
        with subprocess.Popen(
            [python, *FLAGS, "-m", "tests.crash.forkstorm", place, *options],
            cwd=PROJECT, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdout is not None
            for line in process.stdout:
                told = json.loads(line)
                tell(f"{name}: {told['forks']} of {forks}")
                if monotonic() > until:
                    process.kill()
    part.wrong = [f"{name}: {wrong}" for wrong in told["wrong"]]
    if process.returncode and monotonic() - begun < given.seconds:
        part.wrong.append(f"{name}: the storm ended with {process.returncode} after {told['forks']} forks")
    _fill(part, told["forks"], begun)
    part.cells["rows"] = f"{told['rows']:,}"
    return part


def repeated(name: str, tried: list[tuple[str, Act]], given: argparse.Namespace, tell: Tell) -> Part:
    """Try forms one after the other, each in a place of its own; return the table's row."""
    part, begun, done = Part(name), monotonic(), 0
    for what, act in tried:
        if monotonic() - begun >= given.seconds:
            break
        tell(f"{name}: {done} of {len(tried)}, {what}")
        with tempfile.TemporaryDirectory(prefix="forks-") as place:
            part.wrong += [f"{name}: {what}: {wrong}" for wrong in act(Path(place))]
        done += 1
    _fill(part, done, begun)
    return part


def _fill(part: Part, count: int, begun: float) -> None:
    lost = sum("lost: " in wrong for wrong in part.wrong)
    part.cells = {
        "cycles": f"{count:,}",
        "lost": str(lost),
        "other": str(len(part.wrong) - lost),
        "seconds": f"{monotonic() - begun:.1f}",
    }


# -- what is tried ----------------------------------------------------------------------------------------------------


def _unseen(python: str, plant: str, place: Path) -> list[str]:
    return unseen(place, plant, python)


def _forks(python: str) -> Iterator[tuple[str, Act]]:
    for case in CASES:
        yield " ".join(case), partial(_fork, python, case)


def _fork(python: str, case: tuple[str, ...], place: Path) -> list[str]:
    return play_case(place, *case, python=python)


def _exits(python: str) -> Iterator[tuple[str, Act]]:
    for case, code in EXITS.items():
        yield case, partial(_exit, python, case, code)


def _exit(python: str, case: str, code: int, place: Path) -> list[str]:
    """End a process with 10,000 rows waiting; every job it had must have them all."""
    program, *arguments = case.split() if " " in case else ("exits", case)
    done, wrong = play(program, *arguments, place, python=python)
    wrong += [] if done.returncode == code else [f"end: {done.returncode}, not {code}: {done.stderr[-1000:]}"]
    with Persistency(place) as persistency:
        counts = {stored.job_id: len(rows(place, stored.job_id)) for stored in persistency.stored_jobs()}
    wrong += [f"lost: job {job_id!r} has {count} rows" for job_id, count in counts.items() if count < PENDING]
    return wrong if counts else [*wrong, "lost: there is no job"]


def _children(python: str) -> Iterator[tuple[str, Act]]:
    for method, how, end in itertools.product(multiprocessing.get_all_start_methods(), STARTS, WORK):
        # What ends a pool's worker breaks the pool; and only by fork a child inherits anything.
        if (how == "process" or end == "returns") and (end != "inherits" or method == "fork"):
            yield f"{method} {how} {end}", partial(_child, python, method, how, end)


def _child(python: str, method: str, how: str, end: str, place: Path) -> list[str]:
    return play_spawned(place, method, how, end, python=python)


def _signals(python: str, seed: int) -> Iterator[tuple[str, Act]]:
    for name, number in itertools.product(SIGNALS, (signal.SIGTERM, signal.SIGHUP)):
        yield f"{name} {number.name}", partial(_signal, python, name, number)
    for name in INTERRUPTS:
        yield name, partial(_signal, python, name, seed)
    yield "terminated_child", partial(_signal, python, "terminated_child", 0)
    for at in range(FROM_OUTSIDE):
        yield "from outside", partial(_from_outside, python, seed + at)


def _signal(python: str, name: str, number: int, place: Path) -> list[str]:
    done, wrong = play("signalled", name, place, number, python=python)
    return wrong or judge(name, number, place, done)


def _from_outside(python: str, seed: int, place: Path) -> list[str]:
    return signal_from_outside(place, signal.SIGTERM, random.Random(seed), python)
