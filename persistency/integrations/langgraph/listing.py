"""Listing: a walk over checkpoints, the latest first, for `for` and `async for` alike.

Rules:
  1. Between pages nothing is held: no lock, no transaction. A paused consumer blocks nobody.
  2. The next page begins behind the last one's end, so a checkpoint that is there throughout is given once.
  3. Where a filter is given it is looked at before values and writes are read.
  4. Over several namespaces, or all threads, the ids are gathered first and sorted; what has gone since is left out.

Doesn't know: how a checkpoint is stored.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator, Iterator, Mapping
from typing import Any, NamedTuple

from langgraph.checkpoint.base import CheckpointTuple
from langgraph.checkpoint.serde.base import SerializerProtocol

from persistency import Key, KeyRange, Misuse, Reply, key
from persistency.integrations.langgraph import packing, reading
from persistency.integrations.langgraph.packing import Target
from persistency.integrations.langgraph.reading import Found
from persistency.integrations.langgraph.rows import CHECKPOINT, Place, Stored
from persistency.recipes.runner import Runner

PAGE, BARE_PAGE, IDS_PAGE = 16, 64, 1024


class Query(NamedTuple):
    """What is listed: where (`None`: everywhere), those before an id, whose metadata has what `wanted` says.

    At most `limit` of them.
    """

    target: Target | None
    before: str | None
    wanted: Mapping[str, Any]
    limit: int | None


# What the walk is made of: a reply is sent its answer, a checkpoint is what the consumer gets.
Walk = Generator["Reply[Any] | CheckpointTuple", Any, None]


class Listing(Iterator[CheckpointTuple], AsyncIterator[CheckpointTuple]):
    """Checkpoints that match a query: an iterator and an asynchronous iterator; either may be left where it is."""

    def __init__(self, walk: Walk) -> None:
        self._walk = walk
        self._waits = False

    def __iter__(self) -> Listing:
        return self

    def __aiter__(self) -> Listing:
        return self

    def __next__(self) -> CheckpointTuple:
        self._check()
        try:
            step = next(self._walk)
            while isinstance(step, Reply):
                step = self._walk.send(step.result())
        except BaseException:
            self._walk.close()  # as a generator is, when something has been raised in it
            raise
        return step

    async def __anext__(self) -> CheckpointTuple:
        self._check()
        self._waits = True
        try:
            step = next(self._walk)
            while isinstance(step, Reply):
                step = self._walk.send(await step)
        except StopIteration:
            raise StopAsyncIteration from None
        except BaseException:
            self._walk.close()  # as above
            raise
        finally:
            self._waits = False
        return step

    def _check(self) -> None:
        if self._waits:
            raise Misuse("a listing is asked for its next checkpoint before it has given the one before")

    def close(self) -> None:
        """End the walk; it gives nothing more."""
        self._walk.close()

    async def aclose(self) -> None:
        """End the walk; it gives nothing more."""
        self._walk.close()


def walk(runner: Runner, category: str, serde: SerializerProtocol, query: Query) -> Walk:
    """Walk over the checkpoints that match a query."""
    left = query.limit
    pages = (
        _by_range(runner, category, serde, query) if _is_one_range(query) else _by_id(runner, category, serde, query)
    )
    step = next(pages, None)
    while step is not None and (left is None or left > 0):
        if isinstance(step, Reply):
            answer = yield step
            step = _sent(pages, answer)
            continue
        for found in step if left is None else step[:left]:
            yield packing.unpack(serde, found)
        left = None if left is None else left - len(step)
        step = next(pages, None)


# What gives the pages: replies, each sent its answer, and lists of what was found.
_Pages = Generator["Reply[Any] | list[Found]", Any, None]


def _sent(pages: _Pages, answer: Any) -> Reply[Any] | list[Found] | None:
    try:
        return pages.send(answer)
    except StopIteration:
        return None


def _is_one_range(query: Query) -> bool:
    """Whether the key order is the order that is asked for."""
    return query.target is not None and query.target.namespace is not None


def _size(query: Query, size: int) -> int:
    """A page's size: no more is read than is asked for, where that is known."""
    return size if query.limit is None or query.wanted else max(1, min(size, query.limit))


def _span(query: Query) -> KeyRange:
    """Return the range of keys that a query is about."""
    target = query.target
    if target is None:
        return KeyRange.prefix(key(CHECKPOINT))
    if target.namespace is None:
        return KeyRange.prefix(key(CHECKPOINT, target.thread))
    parts = [CHECKPOINT, target.thread, target.namespace]
    whole = KeyRange.prefix(key(*parts, *([] if target.checkpoint_id is None else [target.checkpoint_id])))
    before = whole.stop if query.before is None else key(*parts, query.before)
    return KeyRange(whole.start, min(filter(None, (whole.stop, before)), key=bytes))


def _by_range(runner: Runner, category: str, serde: SerializerProtocol, query: Query) -> _Pages:
    """Walk over one namespace, or look at one checkpoint."""
    span: KeyRange | None = _span(query)
    size = _size(query, BARE_PAGE if query.wanted else PAGE)
    while span is not None:
        if span.start is not None and span.stop is not None and bytes(span.stop) <= bytes(span.start):
            return
        last: Key | None = None
        if query.wanted:
            bare: list[tuple[Place, Stored]] = yield runner.run(reading.bare_page, category, span, size)
            last = bare[-1][0].row if len(bare) == size else None
            yield from _matching(runner, category, serde, query, bare)
        else:
            found: list[Found] = yield runner.run(reading.page, category, span, size)
            last = found[-1].place.row if len(found) == size else None
            yield found
        span = None if last is None else KeyRange(span.start, last)


def _by_id(runner: Runner, category: str, serde: SerializerProtocol, query: Query) -> _Pages:
    """Walk over several namespaces, or all threads."""
    span: KeyRange | None = _span(query)
    places: list[Place] = []
    while span is not None:
        some: list[Place] = yield runner.run(reading.places, category, span, IDS_PAGE)
        places += [place for place in some if _is_asked_for(query, place)]
        span = KeyRange(span.start, some[-1].row) if len(some) == IDS_PAGE else None
    places.sort()
    places.sort(key=lambda place: place.checkpoint_id, reverse=True)
    size = _size(query, BARE_PAGE if query.wanted else PAGE)
    for at in range(0, len(places), size):
        part = places[at : at + size]
        if query.wanted:
            bare: list[tuple[Place, Stored]] = yield runner.run(reading.bare_some, category, part)
            yield from _matching(runner, category, serde, query, bare)
        else:
            found: list[Found] = yield runner.run(reading.some, category, part)
            yield found


def _is_asked_for(query: Query, place: Place) -> bool:
    wanted = None if query.target is None else query.target.checkpoint_id
    return (wanted is None or place.checkpoint_id == wanted) and (
        query.before is None or place.checkpoint_id < query.before
    )


def _matching(
    runner: Runner, category: str, serde: SerializerProtocol, query: Query, bare: list[tuple[Place, Stored]]
) -> _Pages:
    """Give those of a page that match the filter, with their values and writes."""
    places = [place for place, stored in bare if packing.matches(serde, stored, query.wanted)]
    for at in range(0, len(places), PAGE):
        found: list[Found] = yield runner.run(reading.some, category, places[at : at + PAGE])
        yield found
