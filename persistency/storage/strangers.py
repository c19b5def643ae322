"""Strangers: files that lie where a job's would, and may not be ours to take over or delete.

Rules:
  1. They are looked at without changing them.

Doesn't know: groups, threads.
"""

from __future__ import annotations

from pathlib import Path

import apsw

from persistency.errors import Corrupt, SchemaTooNew
from persistency.storage import meta, schema
from persistency.storage.files import size


def check_ours(path: Path, job_id: str, vfs: str | None = None) -> None:
    """Refuse a file that is plainly not this job's, for who is about to delete it; a damaged one of ours passes."""
    if not size(path):
        return
    connection = schema.open_file(path, vfs, immutable=True)
    try:
        if schema.recognise(connection, path) == schema.FORMAT:
            meta.check_job_id(meta.read_job_id(connection, path), job_id, path)
    except apsw.NotADBError as error:
        raise schema.translated(error, f"{str(path)!r} isn't a job's file") from error
    except (apsw.Error, UnicodeDecodeError):
        pass  # a SQLite file that can't be read: nobody else's, as far as anyone can tell
    finally:
        schema.close(connection)


def is_format_1(path: Path, vfs: str | None = None) -> bool:
    """Return whether a file is the Nim original's, and leave it in one piece, with no log beside it, if it is."""
    try:
        connection = schema.open_file(path, vfs, write=True)
    except apsw.Error:
        return False
    try:
        if schema.recognise(connection, path) != 1:
            return False
        schema.own_log(connection)
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
    except apsw.CorruptError as error:  # it is somebody's rows, and must not be passed over for an empty job
        raise schema.translated(error, f"can't read {str(path)!r}") from error
    except (apsw.Error, UnicodeDecodeError, Corrupt, SchemaTooNew):
        return False
    finally:
        schema.close(connection)
    return True
