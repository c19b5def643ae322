"""Reads: every verb that asks a job for something and changes nothing.

Rules:
  1. Each verb checks and encodes its arguments, posts one message and returns a `Reply`; that is all.
  2. Whoever has a mailbox and somebody who answers can have them: an open job, and a reader of another's job.

Doesn't know: who answers, where the rows come from, writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from persistency import care, messages
from persistency.actor.errand import Progress, Steps, errand
from persistency.actor.mailbox import Mailbox
from persistency.actor.reply import Reply
from persistency.arguments import CATEGORIES, as_category, as_count, as_file, as_flag, as_progress
from persistency.closing import Closing
from persistency.codec.keys import KEY_BYTES_MAX, Key, KeyRange, as_key
from persistency.errors import Misuse
from persistency.ops import Change, Entry, Found, KeyLike, Row
from persistency.paging import Pages
from persistency.storage.port import BackUp, CheckUp, LastVersion, ListCategories, ScanRange, UsedBytes

T = TypeVar("T")

_EVERYTHING = KeyRange()


class Reads(Closing):
    """What can be asked of a job. `id` is the job's."""

    __slots__ = ("__weakref__", "_closed", "_find_path", "_keeps_changes", "_mailbox", "_now_ms", "id")

    def __init__(
        self,
        job_id: str,
        find_path: Callable[[str], Path | None],
        mailbox: Mailbox,
        now_ms: Callable[[], int],
        *,
        keeps_changes: bool,
    ) -> None:
        self.id: str = job_id
        self._find_path = find_path
        self._mailbox = mailbox
        self._now_ms = now_ms
        self._keeps_changes = keeps_changes
        self._closed = False

    @property
    def path(self) -> Path | None:
        """The job's file; `None` if it has none."""
        return self._find_path(self.id)  # few ask, and a `Path` costs as much as a statement

    def get(self, category: str, key: KeyLike) -> Reply[bytes | None]:
        """Ask for a payload; `None` if there is no such row."""
        if type(category) is str and type(key) is Key and len(key) <= KEY_BYTES_MAX:
            return self._mailbox.get(CATEGORIES[category], key)
        return self._mailbox.get(as_category(category), as_key(key))

    def entry(self, category: str, key: KeyLike) -> Reply[Entry | None]:
        """Ask for a row with its version and expiry."""
        return self._mailbox.read(messages.get_entry(category, key), point=True).map(messages.entry)

    def get_many(self, category: str, keys: Iterable[KeyLike]) -> Reply[Found]:
        """Ask for several payloads in one snapshot: a dict by `Key` in the order asked, the missing left out."""
        return self._mailbox.read(messages.get_rows(category, keys)).map(Found)

    def exists(self, category: str, key: KeyLike) -> Reply[bool]:
        """Ask whether there is such a row."""
        return self._mailbox.read(messages.has_row(category, key), point=True)

    def count(self, category: str, key_range: KeyRange = _EVERYTHING) -> Reply[int]:
        """Ask how many rows a range has."""
        return self._mailbox.read(messages.count_range(category, key_range))

    def scan(
        self, category: str, key_range: KeyRange = _EVERYTHING, *, reverse: bool = False, limit: int | None = None
    ) -> Reply[list[Row]]:
        """Ask for the rows of a range in key order, start in, stop out, at most `limit` of them."""
        return self._mailbox.read(messages.scan_range(category, key_range, reverse, limit)).map(messages.rows)

    def keys(
        self, category: str, key_range: KeyRange = _EVERYTHING, *, reverse: bool = False, limit: int | None = None
    ) -> Reply[list[Key]]:
        """Ask for the keys of a range alone, as `scan` does for its rows; no payload is read."""
        message = messages.scan_range(category, key_range, reverse, limit)
        return self._mailbox.read(message._replace(keys_only=True)).map(messages.keys)

    def scan_prefix(
        self, category: str, prefix: KeyLike, *, reverse: bool = False, limit: int | None = None
    ) -> Reply[list[Row]]:
        """Ask for the row of the key `prefix` itself and those of all its children."""
        return self._mailbox.read(messages.scan_prefix(category, prefix, reverse, limit)).map(messages.rows)

    @overload
    def iterate(
        self,
        category: str,
        key_range: KeyRange = ...,
        *,
        prefix: KeyLike | None = ...,
        reverse: bool = ...,
        page: int = ...,
        keys_only: Literal[False] = ...,
    ) -> Pages[Row]: ...
    @overload
    def iterate(
        self,
        category: str,
        key_range: KeyRange = ...,
        *,
        prefix: KeyLike | None = ...,
        reverse: bool = ...,
        page: int = ...,
        keys_only: Literal[True],
    ) -> Pages[Key]: ...
    @overload
    def iterate(
        self,
        category: str,
        key_range: KeyRange = ...,
        *,
        prefix: KeyLike | None = ...,
        reverse: bool = ...,
        page: int = ...,
        keys_only: bool,
    ) -> Pages[Any]: ...
    def iterate(
        self,
        category: str,
        key_range: KeyRange = _EVERYTHING,
        *,
        prefix: KeyLike | None = None,
        reverse: bool = False,
        page: int = 256,
        keys_only: bool = False,
    ) -> Pages[Any]:
        """Walk over a range, or a prefix, with `for` or `async for`, asking for a page of rows at a time.

        Gives `Row`s, or `Key`s with `keys_only`. Nothing is held between pages: writing meanwhile is safe, and a key
        that is there throughout is seen once.
        """
        span = messages.walked_range(key_range, prefix)
        name, reverse, keys_only = as_category(category), as_flag(reverse, "reverse"), as_flag(keys_only, "keys_only")

        def ask(start: bytes, stop: bytes | None, limit: int) -> Reply[Any]:
            return self._mailbox.read(ScanRange(name, start, stop, reverse, limit, keys_only))

        make = messages.key_alone if keys_only else messages.row
        return Pages(ask, self._pace, make, span, reverse=reverse, page=as_count(page, "page", 1))

    def snapshot(self, category: str) -> Reply[list[Entry]]:
        """Ask for a category's rows in the order of their versions: the last written last."""
        return self._mailbox.read(messages.list_entries(category)).map(messages.entries)

    def categories(self) -> Reply[list[str]]:
        """Ask for the categories that have rows."""
        return self._mailbox.read(ListCategories()).map(messages.names)

    def version(self) -> Reply[int]:
        """Ask for the version of the last operation."""
        return self._mailbox.read(LastVersion(), point=True)

    def changes(self, after: int, limit: int, *, wait: bool = False) -> Reply[list[Change]]:
        """Ask for the first `limit` changes with a version above `after`; with `wait`, as soon as there is one.

        Raises `FeedTruncated` if one of them is no longer kept, and `Misuse` if the job keeps none: open it with
        `feed_changes_max`. Cancel a reply that waits and that nobody wants any more: `requests_max` of them may wait.
        """
        message = messages.list_changes(after, limit, wait, self)
        if not self._keeps_changes and not self._closed:
            raise Misuse(f"job {self.id!r} keeps no changes: open it with feed_changes_max=10_000")
        reply = self._mailbox.ask(message, reads=True) if wait else self._mailbox.read(message)
        return reply.map(messages.changes)

    def storage_used(self) -> Reply[int]:
        """Ask how many bytes the payloads of all rows have; known where the job has `max_bytes`, elsewhere counted."""
        return self._mailbox.read(UsedBytes())

    # -- as a whole: done beside whoever uses the job, in a thread of its own ------------------------------------------

    def backup(self, path: str | PathLike[str], progress: Progress | None = None) -> Reply[None]:
        """Copy the job, as it is now or a little later, to a file: verified, and there whole or not at all.

        The copy is a job's file like any other; `Persistency.restore` makes a job of it. What was at `path` is
        replaced. `progress(done, total)` is told the bytes. What goes wrong with the target (`DiskFull`,
        `Unavailable`) harms the copy alone. Raises `Misuse` for a path that is another job's.
        """
        message, progress = BackUp(as_file(path, "path")), as_progress(progress)
        return self._errand("backup", care.begun(self._mailbox.ask(message, reads=False)), progress)

    def check(self, progress: Progress | None = None) -> Reply[list[str]]:
        """Look for what is wrong with the file and for keys that don't decode; an empty list when all is sound."""
        progress = as_progress(progress)
        stored = self._mailbox.ask(CheckUp(), reads=False)
        steps = care.checked(stored, self.categories, lambda category: self.iterate(category, keys_only=True))
        return self._errand("check", steps, progress)

    def _errand(self, name: str, steps: Steps[T], progress: Progress | None) -> Reply[T]:
        return errand(f"persistency:{self.id}:{name}", steps, progress)

    # -- the handle ----------------------------------------------------------------------------------------------

    @property
    def now_ms(self) -> int:
        """The job's time, in Unix milliseconds: what decides which rows have ended, and where a TTL begins."""
        return self._now_ms()

    @property
    def closed(self) -> bool:
        """Whether this handle was closed, or the job is over, if it was a temporary one."""
        return self._closed or self._mailbox.has_ended

    def _pace(self) -> Reply[None]:
        """Return a reply that is settled when there is room for another page's request."""
        return self._mailbox.drain()
