"""Searching: items of a namespace and those below it, by a filter, by nearness or by neither; and namespaces.

Rules:
  1. A page of items at a time is read, and nothing is held in between: a search isn't a view of one moment.
  2. Without a query the last updated come first, with one the nearest; then those that have no vectors.
  3. No more than `offset + limit` items are kept while it walks, however many there are.

Doesn't know: how a batch is put together.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, NamedTuple

from langgraph.store.base import Item, ListNamespacesOp, SearchItem, SearchOp

from persistency import CBOR, Key, KeyRange, Misuse
from persistency.integrations.langgraph import items, matching, vectors
from persistency.integrations.langgraph.items import Entry, Namespace, Page
from persistency.recipes.runner import Runner
from persistency.recipes.waiting import Steps

PAGE, NAMESPACES_PAGE = 100, 250
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Candidate(NamedTuple):
    """An item that may be among those wanted; they sort by `rank`, the best first, and then by their keys."""

    rank: tuple[float, int]
    row: Key
    entry: Entry
    score: float | None


def item_of(namespace: Namespace, name: str, entry: Entry) -> Item:
    """Return an item as LangGraph has it."""
    return Item(
        value=CBOR.decode(entry.value),
        key=name,
        namespace=namespace,
        created_at=_time(entry.created_ms),
        updated_at=_time(entry.updated_ms),
    )


def search(runner: Runner, category: str, op: SearchOp, query: array[float] | None) -> Steps[list[SearchItem]]:
    """Find the items that an operation asks for; `query` is the vector of its query, if it has one."""
    wanted = _least(op.limit, "limit") + _least(op.offset, "offset")
    best: list[_Candidate] = []
    span: KeyRange | None = items.span_of(op.namespace_prefix)
    while span is not None and wanted:
        page: Page = yield runner.run(partial(items.page, vectors=query is not None), category, span, PAGE)
        best = heapq.nsmallest(wanted, [*best, *_candidates(page, op, query)])
        span = page.following
    found = best[op.offset :]
    lasting = [items.place_of(one.row) for one in found if one.entry.ttl is not None]
    if lasting and op.refresh_ttl:
        yield runner.run(items.refresh, category, lasting)
    return [_search_item(one) for one in found]


def list_namespaces(runner: Runner, category: str, op: ListNamespacesOp) -> Steps[list[Namespace]]:
    """Find the namespaces that an operation asks for, in order."""
    wanted = _least(op.limit, "limit") + _least(op.offset, "offset")
    conditions = op.match_conditions or ()
    found: dict[Namespace, None] = {}
    span: KeyRange | None = items.span_of(matching.beginning(conditions))
    while span is not None and len(found) < wanted:
        some, span = yield runner.run(items.namespaces, category, span, NAMESPACES_PAGE)
        found |= dict.fromkeys(one[: op.max_depth] for one in some if matching.is_wanted(one, conditions))
    return list(found)[op.offset : wanted]


def _candidates(page: Page, op: SearchOp, query: array[float] | None) -> Iterable[_Candidate]:
    for row, payload in zip(page.rows, page.vectors, strict=True):
        entry = Entry.unpack(row.payload)
        if op.filter and not matching.matches(CBOR.decode(entry.value), op.filter):
            continue
        score = None if query is None or payload is None else vectors.nearness(query, payload)
        yield _Candidate((2.0 if score is None else -score, -entry.updated_ms), row.key, entry, score)


def _search_item(found: _Candidate) -> SearchItem:
    namespace, name = items.place_of(found.row)
    item = item_of(namespace, name, found.entry)
    return SearchItem(namespace, name, item.value, item.created_at, item.updated_at, found.score)


def _least(value: Any, argument: str) -> int:
    if not isinstance(value, int) or value < 0:
        raise Misuse(f"{argument} must be a whole number from 0, not {value!r:.40}")
    return value


def _time(ms: int) -> datetime:
    return _EPOCH + timedelta(milliseconds=ms)
