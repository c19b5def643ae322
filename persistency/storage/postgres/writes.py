"""Writes: what is sent for a group, in as few statements as can be, and what is asked before it.

Rules:
  1. A group of nothing but puts is one statement, which commits by itself: fence, rows and numbers together. If they
     are too large for one statement it is sent like any other group.
  2. Any other is asked about in one round trip and sent in another. The order in which it is sent, behind the fence:
     new ends of rows that stay, ranges that go, rows that go, rows that come.
  3. No statement has more than `CHUNK_BYTES`, unless it is of one row.

Doesn't know: what a message answers, what becomes of errors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

from persistency.storage.port import (
    PLACES,
    Barrier,
    Batch,
    DropRow,
    Expect,
    GetEntry,
    GetRow,
    GetRows,
    Group,
    HasRow,
    SetRow,
    StoredChange,
    SwapRow,
    TouchRow,
)
from persistency.storage.postgres.books import Books
from persistency.storage.postgres.overlay import Overlay
from persistency.storage.postgres.packing import (
    INT8_MAX,
    INT8_MIN,
    blobs,
    blobs_or_nulls,
    int8,
    numbers,
    numbers_or_nulls,
)
from persistency.storage.postgres.reads import Place, Row
from persistency.storage.postgres.schema import KINDS, Statements
from persistency.storage.postgres.session import Params, Statement

Step: TypeAlias = tuple[Statement, Params]
T = TypeVar("T")

CHUNK_BYTES = 16 * 1024 * 1024  # in one statement: a message of the protocol has room for a gigabyte
ITEM_BYTES = 40  # of an item beside its category, key and payload: lengths, a version, an end
CHANGES_MAX = 4096  # in one statement
_OF_ONE_ROW = (GetRow, GetEntry, HasRow, DropRow, TouchRow, SwapRow)
_KIND_NUMBERS = {kind: number for number, kind in enumerate(KINDS)}


class Puts(NamedTuple):
    """A group of nothing but puts, as columns; `ends` is `None` where no row ends."""

    categories: list[bytes]
    keys: list[bytes]
    payloads: list[bytes]
    ends: list[int | None] | None
    outcomes: list[Any]  # with the versions of batches, counted from 0


def as_puts(group: Group) -> Puts | None:
    """Return a group as columns, if it is puts and nothing else, and not too large for one statement."""
    categories = group[::PLACES]
    if None not in categories:
        found = Puts(categories, group[1::PLACES], group[2::PLACES], None, [None] * len(categories))
    else:
        found = Puts([], [], [], [], [])
        if not _collect(group, found, found.outcomes):
            return None
        found = _named(found)
    return found if _size(found) <= CHUNK_BYTES else None


def _size(puts: Puts) -> int:
    nbytes = sum(map(len, puts.payloads)) + sum(map(len, puts.keys)) + sum(map(len, puts.categories))
    return nbytes + ITEM_BYTES * len(puts.keys)


def _named(found: Puts) -> Puts:
    ends = found.ends
    return found._replace(ends=None) if ends is None or ends.count(None) == len(ends) else found


def _collect(group: Group, found: Puts, outcomes: list[Any]) -> bool:
    categories, keys, payloads, ends, _ = found
    assert ends is not None
    places = iter(group)
    for category, message, payload in zip(places, places, places, strict=True):
        if category is not None:
            categories.append(category)
            keys.append(message)
            payloads.append(payload)
            ends.append(None)
            outcomes.append(None)
        elif type(message) is SetRow:
            end = message.expires_ms
            if end is not None and not INT8_MIN <= end <= INT8_MAX:
                return False
            categories.append(message.category)
            keys.append(message.key)
            payloads.append(message.payload)
            ends.append(end)
            outcomes.append(None)
        elif type(message) is Batch and not message.expects:
            if not _collect(message.items, found, []):
                return False
            outcomes.append(len(keys))
        elif type(message) is Barrier and not message.sync:
            outcomes.append(None)
        else:
            return False
    return True


def put_step(
    statements: Statements, job: bytes, fence: tuple[int, int], puts: Puts, terms: tuple[int, int, int, int]
) -> Step:
    """Return the one statement of a group of puts.

    `fence`: generation and last version; `terms`: the latest time and the time, both in Unix milliseconds, the lease
    in milliseconds, and the number of the attempt.
    """
    generation, before = fence
    categories, keys, payloads, ends, _ = puts
    count = len(keys)
    head = (job, int8(generation), int8(before), int8(before + count), *map(int8, terms))
    if count == 1:
        end = None if ends is None or ends[0] is None else int8(ends[0])
        return statements["put_one"], (*head, categories[0], keys[0], payloads[0], end)
    versions: Sequence[int] = range(before + 1, before + count + 1)
    last = dict(zip(zip(categories, keys, strict=True), range(count), strict=True))
    if len(last) < count:  # of two with one key the later one stays
        at = list(last.values())
        categories, keys, payloads = [categories[i] for i in at], [keys[i] for i in at], [payloads[i] for i in at]
        versions = [versions[i] for i in at]
        ends = None if ends is None else [ends[i] for i in at]
    if ends is None and categories.count(categories[0]) == len(categories):
        return statements["put"], (*head, categories[0], blobs(keys), blobs(payloads), numbers(versions))
    of_rows = numbers_or_nulls([None] * len(keys) if ends is None else ends)
    return statements["put_mixed"], (
        *head, blobs(categories), blobs(keys), blobs(payloads), numbers(versions), of_rows,
    )  # fmt: skip


class Asked(NamedTuple):
    """The rows a group's messages look at: those whose payload matters, and those of which the rest is enough."""

    whole: dict[Place, None]
    heads: dict[Place, None]

    def questions(self) -> list[tuple[list[Place], bool]]:
        """Return the places to be asked about, and whether with their payloads."""
        kinds = (self.whole, True), (self.heads, False)
        return [(part, payloads) for places, payloads in kinds for part in _parts(list(places), _place_size)]


def asked_by(group: Group, *, sizes: bool) -> Asked:
    """Return what should be known before a group is run; with `sizes`, also of rows that are written over."""
    asked = Asked({}, {})
    _ask(group, asked, set(), sizes=sizes)
    for place in asked.whole:
        asked.heads.pop(place, None)
    return asked


def _ask(group: Group, asked: Asked, written: set[Place], *, sizes: bool) -> None:
    places = iter(group)
    for category, message, _ in zip(places, places, places, strict=True):
        kind = type(message)
        if category is not None or kind is SetRow:
            place = (message.category, message.key) if category is None else (category, message)
            if sizes and place not in written:
                asked.heads[place] = None
            written.add(place)
        elif kind is Batch:
            expects = [item for item in message.items[1::PLACES] if type(item) is Expect] if message.expects else []
            asked.heads.update(((item.category, item.key), None) for item in expects)
            _ask(message.items, asked, written, sizes=sizes)
        elif kind is GetRows:
            asked.whole.update(((message.category, key), None) for key in message.keys)
        elif kind in _OF_ONE_ROW and (place := (message.category, message.key)) not in written:
            whole = kind in (GetRow, GetEntry) or (kind is SwapRow and message.expected is not None)
            (asked.whole if whole else asked.heads)[place] = None


def change_steps(
    statements: Statements, job: bytes, overlay: Overlay, books: Books, *, ended_too: bool, dropped: int
) -> list[Step]:
    """Return the statements that do what a group has changed; `dropped`: changes up to there go."""
    touched: list[tuple[Place, Row]] = []
    gone: list[Place] = []
    rows: list[tuple[Place, Row]] = []
    for place, row in overlay.written.items():
        if row is None:
            gone.append(place)
        elif row.touched:
            touched.append((place, row))
        else:
            rows.append((place, row))
    steps: list[Step] = []
    for some in _parts(touched, lambda row: _place_size(row[0])):
        columns = _columns([place for place, _ in some])
        ends = numbers_or_nulls([row.expires_ms for _, row in some])
        steps.append((statements["touch"], (job, *columns, ends)))
    for category, start, stop in overlay.holes:
        params = [job, category, start, int8(overlay.now_ms)]
        name = "drop_all" if ended_too else "drop_live"
        steps.append((statements[name], params) if stop is None else (statements[name + "_to"], [*params, stop]))
    steps += [(statements["delete"], (job, *_columns(part))) for part in _parts(gone, _place_size)]
    for some in _parts(rows, lambda row: _place_size(row[0]) + row[1].size):
        versions = numbers([row.version for _, row in some])
        ends = numbers_or_nulls([row.expires_ms for _, row in some])
        payloads = blobs([row.payload or b"" for _, row in some])
        steps.append((statements["upsert"], (job, *_columns([place for place, _ in some]), payloads, versions, ends)))
    for changes in _parts(books.fresh, _change_size, CHANGES_MAX):
        steps.append((statements["add_changes"], (job, *_change_columns(changes))))
    if dropped > books.dropped:
        steps.append((statements["drop_old_changes"], (job, int8(dropped))))
    return steps


def _columns(places: list[Place]) -> tuple[bytes, bytes]:
    return blobs([place[0] for place in places]), blobs([place[1] for place in places])


def _change_columns(changes: list[Any]) -> tuple[bytes, ...]:
    return (
        numbers([change.version for change in changes]),
        numbers([_KIND_NUMBERS[change.kind] for change in changes]),
        blobs([change.category for change in changes]),
        blobs([change.key for change in changes]),
        blobs_or_nulls([change.payload for change in changes]),
        blobs_or_nulls([change.stop for change in changes]),
    )


def _place_size(place: Place) -> int:
    return len(place[0]) + len(place[1]) + ITEM_BYTES


def _change_size(change: StoredChange) -> int:
    return _place_size((change.category, change.key)) + len(change.payload or b"") + len(change.stop or b"")


def _parts(items: list[T], nbytes: Callable[[T], int], most: int = sys.maxsize) -> list[list[T]]:
    """Return items in parts that fit into a statement each, and have so many at the most."""
    parts: list[list[T]] = []
    total = 0
    for item in items:
        size = nbytes(item)
        if not parts or total + size > CHUNK_BYTES or len(parts[-1]) == most:
            parts.append([])
            total = 0
        parts[-1].append(item)
        total += size
    return parts
