"""The process: what it uses of the machine, and how to do something in a fresh one.

Memory is measured in a process of its own: one that has measured other things before has room left from them.

Rules:
  1. What a fresh process answers, or the `Mismatch` it ends with, is the caller's; anything else it ends with is an
     error that shows what it said.
  2. What the system doesn't tell is `None`, never a guess.

Doesn't know: what is measured.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from benchmarks.verify import Mismatch

T = TypeVar("T")

HOME = Path(__file__).parent.parent  # where both packages are imported from
_PROC = Path("/proc/self")
_PROGRAM = """
import json, sys
from importlib import import_module
from benchmarks.verify import Mismatch
module, name, arguments = sys.argv[1:]
try:
    answer = {"answer": getattr(import_module(module), name)(*json.loads(arguments))}
except Mismatch as mismatch:
    answer = {"mismatch": str(mismatch)}
print(json.dumps(answer))
"""


def resident_kib() -> float | None:
    """Return how much memory this process has now."""
    try:
        pages = int((_PROC / "statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * resource.getpagesize() / 1024


def peak_kib() -> float | None:
    """Return how much memory this process has had at most; unlike that of `getrusage` it isn't the parent's."""
    try:
        lines = (_PROC / "status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((float(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def descriptors() -> int | None:
    """Return how many files and the like this process has open."""
    try:
        return len(os.listdir(_PROC / "fd")) - 1  # one is that of the listing itself
    except OSError:
        return None


def allow_descriptors(count: int) -> None:
    """Let this process have so many more open than now, as far as the system permits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + (descriptors() or 256)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def run_program(program: str, *arguments: str) -> str:
    """Run a program of Python's in a fresh interpreter, with this one's modules at hand; return what it printed."""
    # Without its cache of compiled modules an import would be measured that no user has twice.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=HOME,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"a process of its own ended with {done.returncode}: {done.stderr.strip()}")
    return done.stdout


def call_apart(function: Callable[..., T], *arguments: object) -> T:
    """Call a function of a module in a fresh process; its arguments and its answer go there and back as JSON."""
    printed = run_program(_PROGRAM, function.__module__, function.__name__, json.dumps(arguments))
    answer = json.loads(printed.splitlines()[-1])
    if "mismatch" in answer:
        raise Mismatch(answer["mismatch"])
    found: T = answer["answer"]
    return found
