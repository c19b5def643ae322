"""Replacing: what lies at the name of a file that is to be written, and whether a person has to agree first.

Rules:
  1. A former backup is replaced by a backup, and a former export by one in its format, without a question: what is
     done every night goes on by itself. Of any other file that has something in it a person is asked, or `--yes` says.
  2. CSV doesn't say who has written it: it is always asked about.
  3. A job's own file is no backup, however alike they are.
  4. What can't be a file's place is told before anything else is done.

Doesn't know: what is written, and how.
"""

from __future__ import annotations

import os
import re
import stat
import zlib
from pathlib import Path

from persistency.cli.asking import ask
from persistency.cli.ending import Fault
from persistency.cli.rowfile import Format
from persistency.cli.show import as_size
from persistency.codec.values import encode

_HEAD_BYTES = 64 * 1024
_GZIP_MAGIC = b"\x1f\x8b"
_LINE = re.compile(rb'\{"category": "(?:[^"\\]|\\.)*", "key": [\[{]')
_STREAM = encode("persistency") + encode("export")
_DATABASE = b"SQLite format 3\0"
_WITHOUT_A_LOG = b"\1\1"  # a copy needs none; a job that is, or was, at work has two there
_TABLE = b"CREATE TABLE kv (category BLOB NOT NULL, key BLOB NOT NULL"


def agree(path: Path, form: Format | None, *, yes: bool) -> None:
    """Have it agreed that a file is written there: an export in a format, or, without one, a backup.

    Raises `Fault` for what is no place for a file or if the answer is no, `BadParameter` if nobody can be asked.
    """
    if path.is_dir():
        raise Fault(f"{str(path)!r} is a directory", "Pass the path of a file in it.")
    if not path.parent.is_dir():
        if os.path.lexists(path.parent):
            raise Fault(f"{str(path.parent)!r} is no directory", "Pass the path of a file in one.")
        raise Fault(f"there is no directory {str(path.parent)!r}", "Make it first.")
    try:
        found = path.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode) or not found.st_size or _is_former(path, form):
        return
    no = "can be anybody's CSV" if form is Format.csv else f"is no former {_named(form)}"
    ask(f"Replace {str(path)!r}, {as_size(found.st_size)}, which {no}?", yes=yes)


def _named(form: Format | None) -> str:
    return "backup" if form is None else f"export in {'CBOR' if form is Format.cbor else 'JSON lines'}"


def _is_former(path: Path, form: Format | None) -> bool:
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return False  # what can't be looked at can be anything
    if form is None:
        copied = head.startswith(_DATABASE) and head[18:20] == _WITHOUT_A_LOG and _TABLE in head
        return copied and not (path.suffix == ".db" and os.path.lexists(path.with_suffix(".lock")))
    try:
        if head.startswith(_GZIP_MAGIC):
            packed = zlib.decompressobj(31)
            head = packed.decompress(head, _HEAD_BYTES)
            if packed.eof and not head:
                return True  # there is nothing in it: an export of no rows
    except zlib.error:
        return False
    if form is Format.cbor:
        return _STREAM in head[: len(_STREAM) + 1]
    return form is Format.jsonl and _LINE.match(head) is not None
