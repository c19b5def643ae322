"""Reading: what travels to the data to fetch checkpoints, each function within one transaction.

Rules:
  1. A checkpoint comes with its values and its pending writes, as they were at one moment.
  2. At most as many rows are read as are asked for, and a value that several of them have is read once.
  3. A value that a checkpoint names and that isn't there is `Corrupt`, never left out.

Doesn't know: serializers: what it returns is bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from persistency import Corrupt, Key, KeyRange, Transaction
from persistency.integrations.langgraph.rows import HEAD, Place, Stored, Written, latest_of, prefix


class Found(NamedTuple):
    """A checkpoint as it is stored: its row, the payloads of its values by channel, and of its writes."""

    place: Place
    stored: Stored
    values: dict[str, bytes]
    writes: list[bytes]


def find(tx: Transaction, category: str, thread: str, namespace: str, checkpoint_id: str | None) -> Found | None:
    """Return a checkpoint, or the latest one where no id is given."""
    row = _row(tx, category, thread, namespace, checkpoint_id)
    return None if row is None else _found(tx, category, *row, {})


def parent(tx: Transaction, category: str, thread: str, namespace: str, checkpoint_id: str | None) -> Place | None:
    """Return where the parent of a checkpoint is, or that of the latest one where no id is given."""
    row = _row(tx, category, thread, namespace, checkpoint_id)
    above = None if row is None else Stored.unpack(row[1]).parent
    return None if above is None else Place(thread, namespace, above)


def page(tx: Transaction, category: str, span: KeyRange, limit: int) -> list[Found]:
    """Return the last checkpoints of a range, the latest first."""
    read: dict[Key, bytes] = {}
    rows = tx.scan(category, span, reverse=True, limit=limit)
    return [_found(tx, category, Place.of(row.key), row.payload, read) for row in rows]


def bare_page(tx: Transaction, category: str, span: KeyRange, limit: int) -> list[tuple[Place, Stored]]:
    """Return the last checkpoints of a range, the latest first, without values and writes."""
    rows = tx.scan(category, span, reverse=True, limit=limit)
    return [(Place.of(row.key), Stored.unpack(row.payload)) for row in rows]


def bare_some(tx: Transaction, category: str, places: Sequence[Place]) -> list[tuple[Place, Stored]]:
    """Return those of some checkpoints that are still there, without values and writes."""
    payloads = [(place, tx.get(category, place.row)) for place in places]
    return [(place, Stored.unpack(payload)) for place, payload in payloads if payload is not None]


def some(tx: Transaction, category: str, places: Sequence[Place]) -> list[Found]:
    """Return those of some checkpoints that are still there."""
    read: dict[Key, bytes] = {}
    payloads = [(place, tx.get(category, place.row)) for place in places]
    return [_found(tx, category, place, payload, read) for place, payload in payloads if payload is not None]


def places(tx: Transaction, category: str, span: KeyRange, limit: int) -> list[Place]:
    """Return where the last checkpoints of a range are; their rows aren't read."""
    return [Place.of(row) for row in tx.keys(category, span, reverse=True, limit=limit)]


def chain(
    tx: Transaction, category: str, place: Place, channels: Collection[str], limit: int
) -> tuple[list[Found], Place | None]:
    """Return a checkpoint and its ancestors, and where to go on: at most `limit`, or until all `channels` have a value.

    Only the values of those channels are read, and of each only the nearest one that has a row.
    """
    links: list[Found] = []
    wanted = set(channels)
    following: Place | None = place
    while following is not None and wanted and len(links) < limit:
        payload = tx.get(category, following.row)
        if payload is None:
            return links, None
        stored = Stored.unpack(payload)
        here = wanted & stored.values.keys()
        values = {channel: _value(tx, category, following, channel, stored) for channel in here}
        links.append(Found(following, stored, values, _writes(tx, category, following)))
        wanted -= here
        following = None if stored.parent is None else following._replace(checkpoint_id=stored.parent)
    return links, following if wanted else None


def _row(
    tx: Transaction, category: str, thread: str, namespace: str, checkpoint_id: str | None
) -> tuple[Place, bytes] | None:
    if checkpoint_id is None:
        head = tx.get(category, prefix(HEAD, thread, namespace))
        if head is None:
            return None
        checkpoint_id = latest_of(head)
    place = Place(thread, namespace, checkpoint_id)
    payload = tx.get(category, place.row)
    return None if payload is None else (place, payload)


def _found(tx: Transaction, category: str, place: Place, payload: bytes, read: dict[Key, bytes]) -> Found:
    stored = Stored.unpack(payload)
    values = {}
    for channel, version in stored.values.items():
        row = place.value(channel, version)
        if row not in read:
            read[row] = _value(tx, category, place, channel, stored)
        values[channel] = read[row]
    return Found(place, stored, values, _writes(tx, category, place))


def _writes(tx: Transaction, category: str, place: Place) -> list[bytes]:
    first = tx.get(category, place.writes)
    if first is None or not Written.unpack(first).more:
        return [] if first is None else [first]
    return [row.payload for row in tx.scan_prefix(category, place.writes)]


def _value(tx: Transaction, category: str, place: Place, channel: str, stored: Stored) -> bytes:
    payload = tx.get(category, place.value(channel, stored.values[channel]))
    if payload is None:
        raise Corrupt(
            f"thread {place.thread!r}, checkpoint {place.checkpoint_id!r}: the value of {channel!r} is gone",
            hint="Were rows of the category deleted by hand?",
        )
    return payload
