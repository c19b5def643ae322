"""Looking: how somebody who doesn't own a job begins to read its file.

Rules:
  1. Its log and the index of that are found while nobody removes or replaces it: see `openings`.

Doesn't know: what is looked for, who owns the job.
"""

from __future__ import annotations

from pathlib import Path

import apsw

from persistency.storage import schema
from persistency.storage.openings import undisturbed


def begin(path: Path, vfs: str | None = None, *, immutable: bool = False) -> apsw.Connection:
    """Open a file, as `schema.open_file` does, and begin a read transaction; the caller closes the connection."""
    with undisturbed(path):
        connection = schema.open_file(path, vfs, immutable=immutable)
        try:
            connection.execute("BEGIN")
            connection.pragma("user_version")  # it hasn't looked for a log before
        except BaseException:
            schema.close(connection)
            raise
    return connection
