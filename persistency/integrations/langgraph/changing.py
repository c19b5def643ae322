"""Changing: what travels to the data to write and delete checkpoints, each function within one transaction.

Rules:
  1. A value's row stays as long as a checkpoint of its namespace names it.
  2. A checkpoint is written only if all values it names are there, or come with it.
  3. What adds or deletes checkpoints of a namespace writes its head anew, or deletes it.
  4. What a delta channel needs of its ancestors is never pruned away.

Doesn't know: serializers, metadata.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

from persistency import Key, KeyRange, Put, Transaction, key
from persistency.integrations.langgraph.rows import (
    CHECKPOINT,
    HEAD,
    RUN,
    VALUE,
    WRITE,
    Place,
    Stored,
    Written,
    latest_of,
    prefix,
)


def put(
    tx: Transaction, category: str, place: Place, rows: Sequence[tuple[Key, bytes]], needed: Sequence[Key]
) -> tuple[str, int] | None:
    """Write the rows of a checkpoint, if the values it needs are there; `None` if they aren't, and nothing was done.

    Returns what the namespace's head says then, and the head's version.
    """
    if not all(tx.exists(category, row) for row in needed):
        return None
    before = tx.get(category, place.head)
    latest = place.checkpoint_id if before is None else max(latest_of(before), place.checkpoint_id)
    ops = [Put(category, row, payload) for row, payload in rows]
    return latest, tx.commit([*ops, Put(category, place.head, latest.encode())])


def put_writes(tx: Transaction, category: str, place: Place, written: Written) -> None:
    """Add writes to those of a task."""
    payload = tx.get(category, place.writes)
    if payload is None:
        tx.put(category, place.writes, written.pack())
        return
    first = Written.unpack(payload)
    if first.task == written.task:
        tx.put(category, place.writes, first.add(written.writes).pack())
        return
    row = place.writes + (written.task,)
    before = tx.get(category, row)
    tx.put(category, row, (written if before is None else Written.unpack(before).add(written.writes)).pack())
    if not first.more:
        tx.put(category, place.writes, first._replace(more=True).pack())


def delete_thread(tx: Transaction, category: str, thread: str) -> None:
    """Delete all there is of a thread."""
    for row in tx.iterate(category, prefix=key(CHECKPOINT, thread)):
        _leave_run(tx, category, Place.of(row.key), Stored.unpack(row.payload))
    for kind in (HEAD, CHECKPOINT, VALUE, WRITE):
        tx.delete_prefix(category, key(kind, thread))


def delete_runs(tx: Transaction, category: str, runs: Iterable[str]) -> None:
    """Delete the checkpoints of some runs with their writes, and the values that no other checkpoint has."""
    changed = set()
    for run in runs:
        for row in tx.keys(category, KeyRange.prefix(key(RUN, run))):
            place = Place(*row.parts[2:])
            payload = tx.get(category, place.row)
            # One that was put again under the same id, by another run, is that run's.
            if payload is not None and (stored := Stored.unpack(payload)).run_id == run:
                _delete(tx, category, place, stored)
                changed.add((place.thread, place.namespace))
            tx.delete(category, row)
    for thread, namespace in changed:
        left = tx.iterate(category, prefix=key(CHECKPOINT, thread, namespace))
        _delete_values(tx, category, thread, namespace, (Stored.unpack(row.payload) for row in left))
        _renew_head(tx, category, thread, namespace)


def prune(tx: Transaction, category: str, thread: str) -> None:
    """Keep the latest checkpoint of each namespace, and those of its ancestors that its delta channels are made of."""
    rows = tx.iterate(category, prefix=key(CHECKPOINT, thread))
    stored = ((Place.of(row.key), Stored.unpack(row.payload)) for row in rows)
    # Without what was serialized: of all a namespace's checkpoints that would be much.
    bare = ((place, one._replace(checkpoint=("", b""), metadata=("", b""))) for place, one in stored)
    for namespace, group in groupby(bare, lambda pair: pair[0].namespace):
        there = dict(group)
        kept = _needed(there)
        for place, one in there.items():
            if place not in kept:
                _delete(tx, category, place, one)
        _delete_values(tx, category, thread, namespace, (there[place] for place in kept))
        _renew_head(tx, category, thread, namespace)


def copy_thread(tx: Transaction, category: str, source: str, target: str) -> None:
    """Copy all there is of a thread to another one, which keeps what it has under other ids."""
    for kind in (CHECKPOINT, VALUE, WRITE):
        for row in tx.iterate(category, prefix=key(kind, source)):
            copied = key(kind, target, *row.key.parts[2:])
            tx.put(category, copied, row.payload)
            if kind == CHECKPOINT and (run := Stored.unpack(row.payload).run_id) is not None:
                tx.put(category, Place.of(copied).of_run(run), b"")
    for head in tx.keys(category, KeyRange.prefix(key(HEAD, source))):
        _renew_head(tx, category, target, head.parts[2])


def _needed(there: dict[Place, Stored]) -> set[Place]:
    """Return which checkpoints of a namespace stay when it is pruned; they come in the order of their ids."""
    place = next(reversed(there))
    kept = {place}
    unstored = set(there[place].unstored)
    while unstored and (parent := there[place].parent) is not None:
        place = place._replace(checkpoint_id=parent)
        if place not in there or place in kept:
            break
        kept.add(place)
        unstored -= there[place].values.keys()
    return kept


def _delete(tx: Transaction, category: str, place: Place, stored: Stored) -> None:
    tx.delete(category, place.row)
    tx.delete_prefix(category, place.writes)
    _leave_run(tx, category, place, stored)


def _leave_run(tx: Transaction, category: str, place: Place, stored: Stored) -> None:
    if stored.run_id is not None:
        tx.delete(category, place.of_run(stored.run_id))


def _renew_head(tx: Transaction, category: str, thread: str, namespace: str) -> None:
    """Write a namespace's head anew, with another version, or delete it with the last checkpoint."""
    rows = tx.keys(category, KeyRange.prefix(prefix(CHECKPOINT, thread, namespace)), reverse=True, limit=1)
    head = prefix(HEAD, thread, namespace)
    if rows:
        tx.put(category, head, Place.of(rows[0]).checkpoint_id.encode())
    else:
        tx.delete(category, head)


def _delete_values(tx: Transaction, category: str, thread: str, namespace: str, left: Iterable[Stored]) -> None:
    """Delete the values of a namespace that none of the checkpoints that are left has."""
    held = {(channel, str(version)) for one in left for channel, version in one.values.items()}
    rows = tx.iterate(category, prefix=key(VALUE, thread, namespace), keys_only=True)
    for row in [row for row in rows if (row.parts[3], str(row.parts[4])) not in held]:
        tx.delete(category, row)
