"""Following: the changes of a job that keeps them, as they are committed, beside whoever writes them.

Rules:
  1. It asks as a reader does, again and again: nobody tells a reader of a commit, and its owner isn't kept waiting.
  2. Changes come in the order of their commits, each once, range deletes cut to what is asked for.
  3. Between two looks it waits for its own output: when nobody reads that any more, it ends.

Doesn't know: the terminal, how a change is shown.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Iterator

from persistency import Change, FeedTruncated, Key, KeyRange, Misuse, Reader
from persistency.cli.ending import Fault

PAGE = 256


def begin_at(reader: Reader, after: int | None) -> int:
    """Return the version behind which to begin. Raises `Fault` if the job keeps no changes, or not those."""
    version = reader.version().result()
    begin = version if after is None else after
    if begin > version:
        hint = "Another job, or an older copy of it? Read the rows anew, and follow from there."
        raise Fault(f"the last version of job {reader.id!r} is {version:,}: there is nothing after {after:,} yet", hint)
    _changes(reader, begin, 1)
    return begin


def follow(reader: Reader, after: int, interval: float) -> Iterator[list[Change]]:
    """Give the changes behind a version, a page at a time, for ever."""
    while True:
        changes = _changes(reader, after, PAGE)
        if changes:
            after = changes[-1].version
            yield changes
        if len(changes) < PAGE:
            _rest(interval)


def wanted(change: Change, category: str | None, span: KeyRange) -> Change | None:
    """Return what of a change is about a category and a range of its keys, or `None`."""
    if category is not None and change.category != category:
        return None
    start, stop = span.start or Key(b""), span.stop
    if change.kind != "delete_range":
        return change if start <= change.key and (stop is None or change.key < stop) else None
    first = max(change.key, start)
    last = min((bound for bound in (change.stop, stop) if bound is not None), default=None)
    return None if last is not None and first >= last else change._replace(key=first, stop=last)


def _changes(reader: Reader, after: int, limit: int) -> list[Change]:
    try:
        return reader.changes(after, limit).result()
    except FeedTruncated as error:
        hint = (
            f"Read the rows anew and follow from now on; the oldest that is kept comes with --after {error.oldest - 1}."
        )
        raise Fault(f"job {reader.id!r} no longer keeps the changes behind version {after:,}", hint) from error
    except Misuse as error:
        hint = "Have its service open it with feed_changes_max=10_000; it keeps them from then on."
        raise Fault(f"job {reader.id!r} keeps no changes", hint) from error


def _rest(seconds: float) -> None:
    """Wait; raises `BrokenPipeError` as soon as nobody can read the output any more."""
    looking = select.poll()
    looking.register(sys.stdout.fileno(), 0)  # its reader's end alone
    if looking.poll(seconds * 1000):
        raise BrokenPipeError
