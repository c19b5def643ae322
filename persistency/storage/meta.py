"""The meta table of a file: what it says of the job, its id and its numbers.

Rules:
  1. Whatever a damaged or hostile file has in that table, only so many of its rows are looked at.
  2. A number that can't be is as good as missing.

Doesn't know: what the numbers are for, transactions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apsw

from persistency.errors import Corrupt
from persistency.storage.schema import translated

_NUMBER_MAX = 2**62

# An id of ours is a text, and short; any other isn't read.
_ID_BYTES_MAX = 1024
_ID = f"CASE WHEN typeof(value) = 'text' AND octet_length(value) <= {_ID_BYTES_MAX} THEN value ELSE 0 END"
_JOB_ID = f"SELECT {_ID} FROM meta WHERE name = 'job_id'"
# Ours are at most nine rows, and the first ones up to `used_ms`, in any file but one that others write notes into.
_META_ROWS_MAX = 9
_META = f"SELECT name, value FROM meta WHERE name <= 'used_ms' LIMIT {_META_ROWS_MAX + 1}"
# There by `IN`, though it takes twice as long: what looks at each row has no end in a hostile file.
_META_AMONG_OTHERS = (
    f"SELECT name, CASE name WHEN 'job_id' THEN {_ID} ELSE value END FROM meta WHERE name IN"
    " ('job_id', 'last_version', 'clean', 'latest_ms', 'used_bytes', 'used_ms', 'changes_dropped', 'expires_ms')"
    " AND (typeof(value) = 'integer' OR name = 'job_id')"
)


def read_job_id(connection: apsw.Connection, path: Path) -> object:
    """Return the id in a file, or `None` if it has none."""
    try:
        stored = connection.execute(_JOB_ID).fetchone()
    except (apsw.Error, UnicodeDecodeError) as error:
        raise translated(error, f"can't read the job id in {str(path)!r}") from error
    return None if stored is None else stored[0]


def write_job_id(connection: apsw.Connection, job_id: str, path: str | Path) -> None:
    """Write the id into a new file."""
    try:
        connection.execute("INSERT INTO meta VALUES ('job_id', ?)", (job_id,))
    except apsw.Error as error:
        raise translated(error, f"can't write the job id into {str(path)!r}") from error


def check_job_id(stored: object, job_id: str, path: str | Path) -> None:
    """Hold the id in a file, if it has one, against the one asked for."""
    if stored is not None and stored != job_id:
        raise Corrupt(
            f"{str(path)!r} belongs to job {stored!r}, not {job_id!r}",
            hint="Files can't be renamed into another job; bring back the right file.",
        )


def read_meta(connection: apsw.Connection) -> tuple[dict[str, int], object]:
    """Return the numbers in a file's meta table, and the job's id. Raises `Corrupt` if the last version isn't one."""
    try:
        stored = _notes(connection)
    except (apsw.Error, UnicodeDecodeError) as error:
        raise translated(error, "can't read the last version") from error
    job_id = stored.pop("job_id", None)
    # What can't be is as good as missing: it is counted anew.
    numbers = {name: value for name, value in stored.items() if type(value) is int and 0 <= value <= _NUMBER_MAX}
    if "last_version" not in numbers:
        raise Corrupt("the file's last version can't be read", hint="Restore the job from a backup.")
    return numbers, job_id


def _notes(connection: apsw.Connection) -> dict[str, Any]:
    # SQLite refuses what takes up more than a page: to say so in SQL takes twice as long.
    limit = connection.limit(apsw.SQLITE_LIMIT_LENGTH, _ID_BYTES_MAX)
    try:
        found: list[tuple[Any, ...]] = connection.execute(_META).fetchall()
        if len(found) <= _META_ROWS_MAX:
            stored = dict(found)
            its_id = stored.get("job_id", "")
            if type(its_id) is not str or len(its_id) > _ID_BYTES_MAX:
                stored["job_id"] = 0  # as in the other
            return stored
    except (UnicodeDecodeError, apsw.TooBigError):  # in a name of somebody else's, or in the job's id
        pass
    finally:
        connection.limit(apsw.SQLITE_LIMIT_LENGTH, limit)
    return dict(connection.execute(_META_AMONG_OTHERS))
