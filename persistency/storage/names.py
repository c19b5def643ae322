"""Names: how a job's file is called, and which job a file's name is of.

Rules:
  1. A name keeps `[a-z0-9_-]` and inner dots; every other byte of the id's UTF-8 is `%XX`. So two ids never meet in one
     file, also where names ignore case; a name that some systems reserve gets its first byte escaped.
  2. An id never names a place outside of its directory.

Doesn't know: directories, what is in a file.
"""

from __future__ import annotations

import re
from functools import lru_cache

from persistency.errors import Misuse

FILE_NAME_BYTES_MAX = 200
_NAMES_KEPT_MAX = 256

_PLAIN = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789_-.")
_WRITTEN = {byte: chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in range(256)}
_ESCAPED = re.compile(rb"%([0-9A-F]{2})")
_RESERVED = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in "0123456789")]
)


def file_name(job_id: str) -> str:
    """Return the name of a job's database file, with its `.db`.

    Raises `Misuse` for an id that isn't text, is empty, can't be written as UTF-8, or gives too long a name.
    """
    if not isinstance(job_id, str):
        raise Misuse(f"job_id must be a str, not {type(job_id).__name__}: pass the id as text")
    return _named(job_id)


# An opening asks twice, and so does whoever goes by id, at each call.
@lru_cache(_NAMES_KEPT_MAX)
def _named(job_id: str) -> str:
    if not job_id:
        raise Misuse("job_id is empty: pass a text of at least one character, or none for a fresh id")
    try:
        data = job_id.encode()
    except UnicodeEncodeError as error:
        raise Misuse(f"job_id {job_id!r} holds a lone surrogate: pass text that can be written as UTF-8") from error
    name = data.decode("latin-1").translate(_WRITTEN)
    if name[0] == ".":
        name = "%2E" + name[1:]
    if name[-1] == ".":
        name = name[:-1] + "%2E"
    if name.partition(".")[0] in _RESERVED:
        name = f"%{data[0]:02X}{name[1:]}"
    if len(name) + 3 > FILE_NAME_BYTES_MAX:
        raise Misuse(
            f"job_id is too long: its file name would have {len(name) + 3} bytes, at most {FILE_NAME_BYTES_MAX} are "
            "allowed (every byte outside [a-z0-9_-] takes three): pass a shorter id, or a hash of it"
        )
    return name + ".db"


def job_id_of(name: str) -> str | None:
    """Return the id whose file is called `name`, or `None` if that is no job's file."""
    if not name.endswith(".db"):
        return None
    try:
        job_id = _ESCAPED.sub(lambda found: bytes.fromhex(found[1].decode()), name[:-3].encode()).decode()
        return job_id if file_name(job_id) == name else None
    except (UnicodeError, Misuse):  # a file's name may be any bytes
        return None
