"""Running a program of this folder in a process of its own, with a time limit: a hang is a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]


def command(module: str, *arguments: str, flags: tuple[str, ...] = ()) -> list[str]:
    """Return the command line that runs a module of this Python."""
    return [sys.executable, *flags, "-m", module, *arguments]


def run(module: str, *arguments: str, timeout: float, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run a module to its end. Raises `subprocess.TimeoutExpired` if it doesn't come to one."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": "1"}
    return subprocess.run(
        command(module, *arguments, flags=flags),
        cwd=PROJECT, env=environment, timeout=timeout, capture_output=True, text=True, stdin=subprocess.DEVNULL,
        check=False,
    )  # fmt: skip


def replace_method(owner: type, name: str, method: Callable[..., object]) -> None:
    """Put another method in the place of one, for the rest of the process."""
    assert callable(getattr(owner, name))
    setattr(owner, name, method)


def last_json(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Return what a program printed as the last line of its output, one object of JSON."""
    lines = done.stdout.splitlines()
    assert lines, f"nothing was printed; return code {done.returncode}, stderr:\n{done.stderr}"
    value = json.loads(lines[-1])
    assert isinstance(value, dict)
    return value
