"""Bare apsw, with many files: what a user would write by hand who has one for each job.

Rules:
  1. A file is opened with the pragmas that this engine gives it; its defences, which aren't pragmas, are left out.
  2. It is read once while it is opened: SQLite itself opens a file no sooner.

Doesn't know: its peers.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import apsw

from benchmarks.contenders.tables import CATEGORY_BYTES, GET, PUT, SCHEMA

BUSY_MS = 5_000


class File:
    """A connection to a file, new or existing."""

    def __init__(self, path: Path) -> None:
        fresh = not path.exists()
        self._connection = apsw.Connection(str(path), statementcachesize=64)
        self._connection.set_busy_timeout(BUSY_MS)
        execute = self._execute = self._connection.cursor().execute
        for pragma in ("cell_size_check = 1", "mmap_size = 0", "journal_mode = wal", "wal_autocheckpoint = 0"):
            execute(f"PRAGMA {pragma}").fetchall()
        execute("PRAGMA temp_store = memory")
        execute("PRAGMA synchronous = normal")
        if fresh:
            execute(f"BEGIN IMMEDIATE; {SCHEMA} COMMIT")
        else:
            execute("SELECT payload FROM kv LIMIT 1").fetchone()
        self._version = 0

    def put(self, key: bytes, payload: bytes) -> None:
        """Store a row; a statement outside a transaction is one by itself."""
        self._version += 1
        self._execute(PUT, (CATEGORY_BYTES, key, payload, self._version))

    def get(self, key: bytes) -> bytes | None:
        """Return a payload."""
        found: bytes | None = self._execute(GET, (CATEGORY_BYTES, key)).get
        return found

    def close(self) -> None:
        """Close it; as the last connection it carries the log over, and clears it away."""
        self._connection.close()


class Files:
    """The files of a directory."""

    def __init__(self, directory: Path, _live_max: int | None) -> None:
        self._directory = directory

    def open(self, name: str) -> File:
        """Open a file."""
        return File(self._directory / f"{name}.db")

    def close(self) -> None:
        """Nothing is open but what was given away."""


class Named:
    """A file that is open when it is used."""

    def __init__(self, files: LimitedFiles, name: str) -> None:
        self._files = files
        self._name = name

    def put(self, key: bytes, payload: bytes) -> None:
        """Store a row."""
        self._files.live(self._name).put(key, payload)

    def get(self, key: bytes) -> bytes | None:
        """Return a payload."""
        return self._files.live(self._name).get(key)

    def close(self) -> None:
        """It is closed with all the others."""


class LimitedFiles:
    """The files of a directory, so many of them open at once: those that were used last."""

    def __init__(self, directory: Path, live_max: int | None) -> None:
        assert live_max is not None
        self._directory = directory
        self._live_max = live_max
        self._live: OrderedDict[str, File] = OrderedDict()

    def open(self, name: str) -> Named:
        """Return a file by its name; it is there afterwards."""
        self.live(name)
        return Named(self, name)

    def live(self, name: str) -> File:
        """Return a file that is open; another one may be closed for it."""
        found = self._live.get(name)
        if found is None:
            if len(self._live) >= self._live_max:
                self._live.popitem(last=False)[1].close()
            found = self._live[name] = File(self._directory / f"{name}.db")
        else:
            self._live.move_to_end(name)
        return found

    def close(self) -> None:
        """Close all that are open."""
        while self._live:
            self._live.popitem()[1].close()
