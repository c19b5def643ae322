"""The ledger of a kill test: what a writer posts, and what a job may hold after the writer was killed.

Row `number` carries the number, the batch it belongs to (its first row and its size; a plain put is a batch of one) and
the version it must have been given, so that the file alone tells whether it is an exact prefix of what was posted. A
batch of several rows ends with one more operation, on a row of another category, that names the batch.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

ROWS = "rows"
STATE = "state"
STATE_KEY = ("last batch",)

_HEADER = struct.Struct("<QQHQ")
_RECORD = struct.Struct("<cQ")
RECORD_BYTES = _RECORD.size

# What a writer says, each with the number of rows it is about.
OPENED, ANNOUNCED, FLUSHED, ENDED = b"O", b"A", b"F", b"E"


class Posted(NamedTuple):
    """What a row says about itself."""

    number: int
    first: int
    size: int
    version: int


class Found(NamedTuple):
    """A row as the file has it."""

    number: int
    payload: bytes
    version: int


class Contents(NamedTuple):
    """What a job held when it was opened again: `state` is the payload and the version of the state row."""

    rows: list[Found]
    state: tuple[bytes, int] | None
    last_version: int


class Finding(NamedTuple):
    """Something that is not as promised. `kind` is lost, hole, split, beyond, version, payload, file or hang."""

    kind: str
    detail: str


def record(kind: bytes, number: int) -> bytes:
    """Return what a writer sends for one thing it says."""
    return _RECORD.pack(kind, number)


def read_record(data: bytes | bytearray, at: int) -> tuple[bytes, int]:
    """Return the kind and the number of a record."""
    kind, number = _RECORD.unpack_from(data, at)
    return kind, number


def row_payload(posted: Posted) -> bytes:
    """Return the payload of a row: what it says of itself, and a filler that varies in size."""
    number = posted.number
    size = 9_000 if number % 997 == 0 else number * 2_654_435_761 % 240
    return _HEADER.pack(*posted) + bytes((number % 251,)) * size


def state_payload(first: int) -> bytes:
    """Return the payload that a batch leaves in the state row."""
    return b"batch %d" % first


def judge(contents: Contents, flushed: int, announced: int) -> list[Finding]:
    """Return what is wrong with a job of which `flushed` rows were acknowledged and `announced` could be posted."""
    rows = contents.rows
    count = len(rows)
    findings = []
    if count < flushed:
        findings.append(Finding("lost", f"{flushed} rows were acknowledged as committed, {count} are there"))
    if count > announced:
        findings.append(Finding("beyond", f"{announced} rows were announced, {count} are there"))
    for number, row in enumerate(rows):
        if row.number != number:
            findings.append(Finding("hole", f"row {number} is missing, row {row.number} is there"))
            break
    findings += _judge_payloads(rows)
    if not findings or all(finding.kind in ("lost", "beyond") for finding in findings):
        findings += _judge_versions(contents)
    return findings


def _judge_payloads(rows: list[Found]) -> list[Finding]:
    for row in rows:
        posted = Posted(*_HEADER.unpack_from(row.payload)) if len(row.payload) >= _HEADER.size else None
        if posted is None or posted.number != row.number or row_payload(posted) != row.payload:
            return [Finding("payload", f"row {row.number} holds another payload than was posted")]
        if posted.version != row.version:
            return [Finding("version", f"row {row.number} has version {row.version}, posted as {posted.version}")]
    return []


def _judge_versions(contents: Contents) -> list[Finding]:
    """Walk over rows that are a prefix: every operation has taken one version, and every batch is whole."""
    version = 0
    state: tuple[bytes, int] | None = None
    end = 0
    for row in contents.rows:
        posted = Posted(*_HEADER.unpack_from(row.payload))
        version += 1
        end = posted.first + posted.size
        if row.version != version:
            return [Finding("version", f"row {row.number} has version {row.version}, not {version}")]
        if posted.size > 1 and row.number == end - 1:
            version += 1
            state = (state_payload(posted.first), version)
    if end > len(contents.rows):
        return [Finding("split", f"a batch ends with row {end - 1}, the file with row {len(contents.rows) - 1}")]
    if contents.state != state:
        return [Finding("split", f"the last batch left {contents.state}, not {state}")]
    if contents.last_version != version:
        return [Finding("version", f"the last version is {contents.last_version} after {version} operations")]
    return []
