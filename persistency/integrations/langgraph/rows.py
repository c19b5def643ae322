"""Rows: where a checkpoint and its parts lie in a category of the job, and what their payloads are.

| key | payload |
|---|---|
| `("checkpoint", thread, namespace, checkpoint id)` | a `Stored`: all but the large values |
| `("value", thread, namespace, channel, version)` | one value, once, however many checkpoints have it |
| `("head", thread, namespace)` | the id of the namespace's latest checkpoint |
| `("write", thread, namespace, checkpoint id)` | the writes of the first task, and whether there are others |
| `("write", thread, namespace, checkpoint id, task id)` | the writes of another task |
| `("run", run id, thread, namespace, checkpoint id)` | nothing: where a run's checkpoints are |

Rules:
  1. Ids of checkpoints sort by time, so the latest one of a namespace is the last row of a range. Its head says which
     that is, to be read as one row. What adds or deletes checkpoints writes the head anew, or deletes it: a head that
     still has the same version says that nothing has gone.
  2. What the user's serializer made is kept as it is. All that has to be known of a checkpoint without it, to delete
     it or to find its values, stands beside that, as CBOR.
  3. Bytes that are none of these are `Corrupt`.

Doesn't know: serializers, transactions, who asks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple, TypeAlias

from persistency import CBOR, Corrupt, Key, Misuse, key

Typed: TypeAlias = tuple[str, bytes]
"""What a serializer makes of a value: the name of the form, and the bytes."""

Version: TypeAlias = str | int | float
"""A channel's version. LangGraph makes a new one whenever the channel's value changes."""

HEAD, CHECKPOINT, VALUE, WRITE, RUN = "head", "checkpoint", "value", "write", "run"
_HINT = "Is the category used by something else?"


@lru_cache(maxsize=4096)
def prefix(kind: str, thread: str, namespace: str) -> Key:
    """Return what the keys of a kind begin with in a namespace; they follow one another, so it is kept."""
    return key(kind, thread, namespace)


class Place(NamedTuple):
    """Where a checkpoint is."""

    thread: str
    namespace: str
    checkpoint_id: str

    @property
    def head(self) -> Key:
        """The key of its namespace's head."""
        return prefix(HEAD, self.thread, self.namespace)

    @property
    def row(self) -> Key:
        """The key of the checkpoint itself."""
        return prefix(CHECKPOINT, self.thread, self.namespace) + (self.checkpoint_id,)

    @property
    def writes(self) -> Key:
        """The key of its first task's writes, and the prefix of all."""
        return prefix(WRITE, self.thread, self.namespace) + (self.checkpoint_id,)

    def value(self, channel: str, version: Version) -> Key:
        """Return the key of a channel's value in some version."""
        return prefix(VALUE, self.thread, self.namespace) + (channel, version)

    def of_run(self, run_id: str) -> Key:
        """Return the key that says it is a run's."""
        return key(RUN, run_id, *self)

    @classmethod
    def of(cls, row: Key) -> Place:
        """Return the place that the key of a checkpoint, or of one of its writes, names."""
        parts = row.parts
        if len(parts) < 4 or not all(isinstance(part, str) for part in parts[1:4]):
            raise Corrupt(f"{row!r} is no key of a checkpoint", hint=_HINT)
        return cls(*parts[1:4])


def latest_of(head: bytes) -> str:
    """Return the id that a head's payload is."""
    try:
        return head.decode()
    except UnicodeDecodeError as error:
        raise Corrupt("a row of a head is none", hint=_HINT) from error


class Stored(NamedTuple):
    """A checkpoint's row.

    `values`: the versions of the channels whose values have rows of their own. `unstored`: the delta channels that
    have no value here, but one that is made from the writes of the ancestors.
    """

    parent: str | None
    checkpoint: Typed
    metadata: Typed
    values: Mapping[str, Version]
    run_id: str | None
    unstored: tuple[str, ...]

    def pack(self) -> bytes:
        """Return it as a payload."""
        return CBOR.encode(
            [self.parent, *self.checkpoint, *self.metadata, self.values, self.run_id, list(self.unstored)]
        )

    @classmethod
    def unpack(cls, payload: bytes) -> Stored:
        """Return what a payload holds."""
        try:
            parent, form, data, metadata_form, metadata, values, run_id, unstored = CBOR.decode(payload)
            stored = cls(parent, (form, data), (metadata_form, metadata), values, run_id, tuple(unstored))
        except (TypeError, ValueError) as error:
            raise Corrupt("a row of a checkpoint is none", hint=_HINT) from error
        if not isinstance(stored.values, Mapping):
            raise Corrupt("a row of a checkpoint is none", hint=_HINT)
        return stored


class Write(NamedTuple):
    """One write of a task: its number `at` within the task, and the task's path, by which writes are put in order."""

    at: int
    channel: str
    path: str
    value: Typed


class Written(NamedTuple):
    """What a task has written; `more`, in the first task's row: whether there are rows of others."""

    task: str
    more: bool
    writes: Sequence[Write]

    def pack(self) -> bytes:
        """Return it as a payload."""
        return CBOR.encode([self.task, self.more, [[one.at, one.channel, one.path, *one.value] for one in self.writes]])

    @classmethod
    def unpack(cls, payload: bytes) -> Written:
        """Return what a payload holds."""
        try:
            task, more, writes = CBOR.decode(payload)
            return cls(task, more, [Write(at, channel, path, (form, data)) for at, channel, path, form, data in writes])
        except (TypeError, ValueError) as error:
            raise Corrupt("a row of writes is none", hint=_HINT) from error

    def add(self, writes: Iterable[Write]) -> Written:
        """Return this with more writes.

        Of two with the same number the first one stays, but of those with a negative one (errors, interrupts) the last.
        """
        kept = {write.at: write for write in self.writes}
        for write in writes:
            if write.at < 0 or write.at not in kept:
                kept[write.at] = write
        return self._replace(writes=list(kept.values()))


def pack_value(value: Typed) -> bytes:
    """Return a serialized value as a payload."""
    form, data = value
    if "\0" in form:
        raise Misuse(f"the serializer's form {form!r} holds a NUL: give it a name without")
    return form.encode() + b"\0" + data


def unpack_value(payload: bytes) -> Typed:
    """Return the serialized value of a payload."""
    form, end, data = payload.partition(b"\0")
    if not end:
        raise Corrupt("a row of a value is none", hint=_HINT)
    try:
        return form.decode(), data
    except UnicodeDecodeError as error:
        raise Corrupt("a row of a value is none", hint=_HINT) from error
