"""Direct: the usual verbs by single requests, where the runner is a job: no function has to travel to the data.

A point read is answered in place, under an event loop as in a thread. So a checkpoint is read without waiting for
another thread, where the job is idle.

Rules:
  1. What is met on the way that isn't as expected (a value that has gone meanwhile, another task's writes) is no
     error: the answer is `None`, or `False`, nothing was done, and a function that travels decides.
  2. A checkpoint is put without looking only where its namespace's head still has the version it had when this object
     wrote it last: then what it needs is there, and which checkpoint is the latest is known.
  3. The writes are read before the checkpoint: one that is deleted meanwhile isn't there, rather than without writes.
  4. How many namespaces are remembered is bounded; a forgotten one costs one look.

Doesn't know: serializers, metadata.
"""

from __future__ import annotations

from typing import NamedTuple

from persistency import Check, Conflict, Job, Key, Put
from persistency.integrations.langgraph.packing import Packed
from persistency.integrations.langgraph.patience import PatientJob
from persistency.integrations.langgraph.reading import Found
from persistency.integrations.langgraph.rows import HEAD, Place, Stored, Written, latest_of, prefix
from persistency.recipes.waiting import Steps

_HEADS_MAX = 1024


class Head(NamedTuple):
    """A namespace as this object has left it: its latest checkpoint, the head's version, values that are there."""

    latest: str
    version: int
    values: frozenset[Key]


class Direct:
    """The direct way to the checkpoints in a category of a job. Several may remember the same `heads`."""

    def __init__(self, job: Job | PatientJob, category: str, heads: dict[Key, Head]) -> None:
        self._job = job
        self._category = category
        self._heads = heads

    def find(self, thread: str, namespace: str, checkpoint_id: str | None) -> Steps[Found | None]:
        """Return a checkpoint, or the latest one; `None`: there is none, or not all of it could be read so."""
        get, category = self._job.get, self._category
        if checkpoint_id is None:
            head: bytes | None = yield get(category, prefix(HEAD, thread, namespace))
            if head is None:
                return None
            checkpoint_id = latest_of(head)
        place = Place(thread, namespace, checkpoint_id)
        writes, asked = get(category, place.writes), get(category, place.row)
        first = yield writes
        payload = yield asked
        if payload is None or (first is not None and Written.unpack(first).more):
            return None
        stored = Stored.unpack(payload)
        replies = {channel: get(category, place.value(channel, stored.values[channel])) for channel in stored.values}
        values = {}
        for channel, reply in replies.items():
            values[channel] = yield reply
        if None in values.values():
            return None
        return Found(place, stored, values, [] if first is None else [first])

    def put(self, packed: Packed) -> Steps[bool]:
        """Write a checkpoint, if nothing has changed since this object last did; return whether it is written."""
        place, category = packed.place, self._category
        head = self._heads.get(place.head)
        if head is None or not packed.unchanged.keys() <= head.values:
            return False
        latest = max(head.latest, place.checkpoint_id)
        ops = [Put(category, row, payload) for row, payload in packed.rows]
        check, renewed = Check(category, place.head, head.version), Put(category, place.head, latest.encode())
        try:
            version = yield self._job.commit([check, *ops, renewed])
        except Conflict:
            self._heads.pop(place.head, None)
            return False
        self.remember(packed, latest, version)
        return True

    def remember(self, packed: Packed, latest: str, version: int) -> None:
        """Remember what a namespace is like after a checkpoint was written; the head is the last that was."""
        if len(self._heads) >= _HEADS_MAX:
            self._heads.clear()
        self._heads[packed.place.head] = Head(latest, version, packed.values)

    def put_writes(self, place: Place, written: Written) -> Steps[bool]:
        """Write what the first task of a checkpoint has written; return whether it is."""
        done: bool = yield self._job.compare_and_set(self._category, place.writes, None, written.pack())
        return done
