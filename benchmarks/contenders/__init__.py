"""The contenders by name, one module each, imported only when they are asked for.

Rules:
  1. A module here is named like its contender, with an underscore for a dot, and holds a `CONTENDER`.
  2. A contender whose package isn't installed is `Missing`, with the one line that says what to do.

Doesn't know: what a contender can do.
"""

from __future__ import annotations

from importlib import import_module

from benchmarks.protocol import Contender

OURS = "persistency"
# What each one needs from the package index; `None` is what comes with Python.
PACKAGES = {
    OURS: "persistency",
    "apsw": "apsw",
    "apsw.aio": "apsw",
    "sqlite3": None,
    "aiosqlite": "aiosqlite",
    "diskcache": "diskcache",
    "lmdb": "lmdb",
    "rocksdict": "rocksdict",
    "plyvel": "plyvel",
    "fdb": "foundationdb",
}


class Missing(Exception):
    """A contender's package isn't installed."""


def load(name: str) -> Contender:
    """Import a contender. Raises `Missing` if its package isn't there."""
    try:
        module = import_module(f"benchmarks.contenders.{name.replace('.', '_')}")
    except ImportError as error:
        package = PACKAGES[name]
        remedy = f"pip install {package}" if package else "this Python was built without it"
        raise Missing(f"contender {name!r} is left out: {error}; {remedy}") from error
    contender: Contender = module.CONTENDER
    return contender
