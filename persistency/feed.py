"""A change feed: what is written to a job, change by change, for `for` and `async for` alike.

The changes are those the job keeps in its file. A feed asks for them a page at a time, and at their end has one request
wait for the next commit; so a consumer that is slow, paused or gone costs the job nothing.

Rules:
  1. Changes come in commit order, each once, and only committed ones; a step that raises has given nothing.
  2. Where a feed begins is asked for when it is made, and whatever is posted later comes later, as the mailbox is first
     in, first out.
  3. `after` passes a change when the next one is asked for, and those that are filtered out as they are passed.
  4. Between steps nothing is held, and no request waits: a step that ends, in whatever way, takes its request back.
  5. Where the mailbox is full a step waits for room, in a thread and under an event loop, whatever `on_full` says.

Doesn't know: how changes are kept, threads, SQL, files.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from persistency.actor.loops import running_loop
from persistency.actor.reply import Reply
from persistency.arguments import as_category, as_count, as_prefix_range
from persistency.codec.keys import Key
from persistency.errors import FeedTruncated, Misuse, Overloaded
from persistency.job import Job
from persistency.ops import Change, KeyLike
from persistency.reader import Reader

_NO_VERSION = 2**62  # above every version there can be


class ChangeFeed:
    """The changes of a job that was opened with `feed_changes_max`, as they are committed.

    `job` is a job that is open here; or, where jobs are on PostgreSQL, a reader of one that another process owns.

    `category`, and a `prefix` in it (a tuple or `Key`: that key and its children; a `RawKey`: the keys that start with
    its bytes), leave out all others; a range delete is cut to what it takes of them. Without `after` the feed follows
    from its making; with it, from behind that version: the `version` of the last change that was dealt with, or the
    `after` of an earlier feed. `page` is how many changes it asks for at a time.

    It has no end of its own: `break`, or `close()` from anywhere, ends a loop. A loop goes on where the last one was
    left, and one of them at a time. Raises from the iteration: `FeedTruncated` if a change to come is no longer kept,
    or if the job's last version is below `after` (then its file was replaced, or has lost its last commits); `Closed`
    when the job is closed, also while a step waits; `Misuse` for a second loop beside one that waits.

    Raises `Misuse` for wrong arguments and for a job that keeps no changes, and `Overloaded` if it is made in the
    thread of an event loop and the mailbox has no room for a request.
    """

    __slots__ = (
        "_after",
        "_asked",
        "_begin",
        "_category",
        "_changes",
        "_closed",
        "_follows",
        "_given",
        "_job",
        "_page",
        "_span",
        "_stepping",
        "_waits",
    )

    def __init__(
        self,
        job: Job | Reader,
        category: str | None = None,
        prefix: KeyLike | None = None,
        *,
        after: int | None = None,
        page: int = 256,
    ) -> None:
        if not isinstance(job, Job | Reader):
            raise Misuse(f"job must be a Job, not {type(job).__name__}: pass what open_job gave")
        if isinstance(job, Reader):
            job._check_told()
        if category is not None:
            as_category(category)
        elif prefix is not None:
            raise Misuse("prefix was given without a category: pass the category whose keys it is about")
        self._job = job
        self._category = category
        self._span = None if prefix is None else as_prefix_range(prefix)
        self._page = as_count(page, "page", 1)
        self._follows = after is None
        self._after = 0 if after is None else as_count(after, "after", 0)
        self._given = self._after  # the version of what was given last; the next step is what says it is done with
        self._changes: Iterator[Change] = iter(())
        self._waits = self._follows  # whether to ask for what isn't there yet: where the end is supposed to be
        self._asked: Reply[list[Change]] | None = None
        self._stepping = self._closed = False
        self._begin: Reply[int] | None = _asked_version(job)
        # Somebody who wants it: a cancelled task, alone with it, would take the request back.
        self._begin.add_done_callback(_wants)

    @property
    def after(self) -> int:
        """The version up to which all changes were dealt with: a new feed with this `after` goes on from there.

        It passes a change only when the next one is asked for, so that one whose consumer has failed, or was stopped in
        the middle of it, isn't lost: it comes again. To go on exactly behind a change, keep its `version`. Raises
        `Misuse` in the thread of an event loop if the job hasn't told yet where a feed begins: take a step first.
        """
        begin = self._begin
        if begin is None or not self._follows:
            return self._after
        if not begin.done() and running_loop() is not None:
            raise Misuse(
                "the feed doesn't know yet where it begins, and this thread runs an event loop, which must not wait",
                hint="Take a step first, or await any other request to the job.",
            )
        return begin.result()

    def close(self) -> None:
        """End the feed, from any thread or task: a loop that waits for a change ends too. Closing again is nothing."""
        self._closed = True
        asked = self._asked
        if asked is not None:
            self._take_back(asked)

    # -- iteration -----------------------------------------------------------------------------------------------

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Change:
        self._enter()
        try:
            if self._begin is not None:
                self._begin_at(self._begin.result())
            while not self._closed:
                change = self._next_wanted()
                if change is not None:
                    return change
                reply = self._ask()
                try:
                    self._take(reply.result())
                except Exception:
                    if not self._closed:
                        raise
                finally:
                    self._take_back(reply)
            raise StopIteration
        except BaseException:
            self._rewind()
            raise
        finally:
            self._stepping = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Change:
        self._enter()
        try:
            if self._begin is not None:
                self._begin_at(await self._begin)
            while not self._closed:
                change = self._next_wanted()
                if change is not None:
                    return change
                reply = self._ask()
                try:
                    self._take(await reply)
                except Exception:
                    if not self._closed:
                        raise
                finally:
                    self._take_back(reply)
            raise StopAsyncIteration
        except BaseException:
            self._rewind()
            raise
        finally:
            self._stepping = False

    def _enter(self) -> None:
        if self._stepping:
            raise Misuse(
                "the feed is being iterated already, in another thread or task",
                hint="Make a feed for each consumer: each gives all changes.",
            )
        # Between the look and this nothing is called, so no other thread gets in.
        self._stepping = True
        self._after = self._given

    def _rewind(self) -> None:
        """Go back to behind what was dealt with: wherever a step was interrupted, it has missed nothing then."""
        self._given = self._after
        self._changes = iter(())

    def _begin_at(self, version: int) -> None:
        if self._follows:
            self._after = self._given = version
        elif self._after > version:
            hint = f"The feed's after={self._after} is beyond the job's last version, {version}: read the state anew."
            raise FeedTruncated(version + 1, hint=hint)
        self._begin = None

    def _next_wanted(self) -> Change | None:
        """Return the next change of the page that the filter lets through, or `None` when there are no more."""
        for change in self._changes:
            wanted = self._wanted(change)
            self._given = change.version
            if wanted is not None:
                return wanted
            self._after = change.version
        return None

    def _wanted(self, change: Change) -> Change | None:
        """Return what the filter leaves of a change."""
        if self._category is None:
            return change
        if change.category != self._category:
            return None
        return change if self._span is None else _clipped(change, *self._span)

    # -- requests ------------------------------------------------------------------------------------------------

    def _ask(self) -> Reply[list[Change]]:
        """Ask for the next page; where the mailbox is full, for room, with an empty page for an answer."""
        try:
            reply = self._job.changes(self._after, self._page, wait=self._waits)
        except Overloaded:
            reply = _room(self._job).map(_no_changes)
        self._asked = reply
        if self._closed:  # meanwhile, and whoever did it hasn't seen the reply
            self._take_back(reply)
        return reply

    def _take(self, changes: list[Change]) -> None:
        self._changes = iter(changes)
        self._waits = len(changes) < self._page

    def _take_back(self, reply: Reply[list[Change]]) -> None:
        """Leave no request behind that still waits."""
        self._asked = None
        reply.cancel()

    # -- the rest ------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        of = "" if self._category is None else f" {self._category!r}"
        return f"<ChangeFeed{of} of {self._job!r}{' (closed)' if self._closed else ''}>"


def _asked_version(job: Job | Reader) -> Reply[int]:
    """Ask a job that keeps changes for its version; a thread waits for room, if need be. Raises `Misuse`."""
    kept = False
    while True:
        try:
            if not kept:
                job.changes(_NO_VERSION, 1).cancel()  # refused where none are kept
                kept = True  # one request after the other: there may be room for one at a time
            return job.version()
        except Overloaded:
            if running_loop() is not None:
                raise
            _room(job).result()


def _room(job: Job | Reader) -> Reply[None]:
    """Return a reply that is settled when there is room for a request."""
    return job.drain() if isinstance(job, Job) else job._pace()


def _wants(_reply: Any) -> None:
    """Be somebody who waits for a reply."""


def _no_changes(_answer: None) -> list[Change]:
    return []


def _clipped(change: Change, start: bytes, stop: bytes | None) -> Change | None:
    """Return a change as far as it is about the keys from `start` up to `stop`."""
    if change.kind != "delete_range":
        return change if start <= change.key and (stop is None or change.key < stop) else None
    first = max(change.key, start)
    last = min((bound for bound in (change.stop, stop) if bound is not None), default=None)
    if last is not None and first >= last:
        return None
    return change._replace(key=Key(first), stop=None if last is None else Key(last))
