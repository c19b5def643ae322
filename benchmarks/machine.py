"""The machine's facts: without them a figure says nothing.

Rules:
  1. What can't be found out is "unknown", never a failure.

Doesn't know: figures.
"""

from __future__ import annotations

import os
import platform
import sqlite3
import sys
from datetime import UTC, datetime
from pathlib import Path

import apsw


def facts(directory: Path) -> dict[str, str | int]:
    """Return what a reader has to know about where figures come from; `directory` is where the files were."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "system": f"{platform.system()} {platform.release()}",
        "cpu": _cpu(),
        "cores": os.cpu_count() or 0,
        "load": _load(),
        "python": f"{platform.python_implementation()} {sys.version.split()[0]}",
        "apsw": apsw.apsw_version(),
        "sqlite": apsw.sqlite_lib_version(),
        "sqlite of the standard library": sqlite3.sqlite_version,
        "filesystem": _filesystem(directory.resolve()),
        "durability": "process (WAL, synchronous=NORMAL)",
    }


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _load() -> str:
    try:
        return f"{os.getloadavg()[0]:.2f}"
    except OSError:
        return "unknown"


def _filesystem(directory: Path) -> str:
    """Return the type of the file system a directory is in: that of the longest mount point above it."""
    kind, longest = "unknown", -1
    try:
        mounts = Path("/proc/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return kind
    for mount in mounts:
        _device, point, name, *_rest = mount.split(" ")
        point = point.replace("\\040", " ")
        if directory.is_relative_to(point) and len(point) >= longest:
            kind, longest = name, len(point)
    return kind
