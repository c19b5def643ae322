"""Packing: checkpoints as LangGraph has them, to rows and back, by the serializer the saver was given.

Rules:
  1. A channel's value gets a row of its own, under the channel's version, and is serialized when it changes only. What
     is small (a number, a short text, nothing) and what has no version stays within its checkpoint.
  2. Which of the two it is depends on the value alone, never on when it is put.
  3. What comes out is what was put in, as far as the serializer says so.

Doesn't know: transactions, jobs, how rows are found.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any, NamedTuple, cast

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    PendingWrite,
    get_checkpoint_metadata,
    writes_sort_key,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from persistency import Key, Misuse
from persistency.integrations.langgraph.reading import Found
from persistency.integrations.langgraph.rows import Place, Stored, Write, Written, pack_value, unpack_value

# What has at most so much of numbers, characters and members is serialized anew with each checkpoint.
_SMALL = 256
_PLAIN = (type(None), bool, int, float)


class Packed(NamedTuple):
    """A checkpoint's rows, and the values that aren't among them since they haven't changed: those have rows already.

    `unchanged` has those values by the keys their rows must be under; `values` are the keys of all its values' rows.
    """

    place: Place
    rows: list[tuple[Key, bytes]]
    unchanged: dict[Key, Any]
    values: frozenset[Key]


class Target(NamedTuple):
    """What a config names: a thread, a namespace (`None`: it says none), a checkpoint (`None`: it says none)."""

    thread: str
    namespace: str | None
    checkpoint_id: str | None

    def place(self, checkpoint_id: str) -> Place:
        """Return the place of a checkpoint there; where no namespace is named that is the root's."""
        return Place(self.thread, self.namespace or "", checkpoint_id)


def target_of(config: RunnableConfig) -> Target:
    """Return what a config names. Raises `Misuse` if it has no `thread_id`, or a namespace or an id that is no text."""
    configurable = config.get("configurable") or {}
    if configurable.get("thread_id") is None:
        raise Misuse(
            "the config names no thread",
            hint='Pass {"configurable": {"thread_id": "..."}}, the one of the conversation.',
        )
    namespace = configurable.get("checkpoint_ns")
    return Target(
        str(configurable["thread_id"]),
        None if namespace is None else _text(namespace, "checkpoint_ns"),
        checkpoint_id_of(config),
    )


def checkpoint_id_of(config: RunnableConfig) -> str | None:
    """Return the checkpoint's id that a config has, whether it names a thread or not."""
    checkpoint_id = (config.get("configurable") or {}).get("checkpoint_id") or None
    return None if checkpoint_id is None else _text(checkpoint_id, "checkpoint_id")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Misuse(f"{name} must be a text, not {value!r:.40}")
    return value


def config_of(place: Place) -> RunnableConfig:
    """Return the config that names a checkpoint."""
    return {
        "configurable": {
            "thread_id": place.thread,
            "checkpoint_ns": place.namespace,
            "checkpoint_id": place.checkpoint_id,
        }
    }


def pack(
    serde: SerializerProtocol,
    config: RunnableConfig,
    checkpoint: Checkpoint,
    metadata: CheckpointMetadata,
    new_versions: ChannelVersions,
) -> Packed:
    """Return the rows of a checkpoint."""
    target = target_of(config)
    place = target.place(_text(checkpoint["id"], "a checkpoint's id"))
    versions = checkpoint.get("channel_versions") or {}
    within, apart, unchanged = {}, {}, {}
    rows, values = [], []
    for channel, value in (checkpoint.get("channel_values") or {}).items():
        version = versions.get(channel)
        if version is None or _left(value, _SMALL) >= 0:
            within[channel] = value
            continue
        apart[channel] = version
        row = place.value(channel, version)
        values.append(row)
        if channel in new_versions:
            rows.append((row, pack_value(serde.dumps_typed(value))))
        else:
            unchanged[row] = value
    known = get_checkpoint_metadata(config, metadata)
    run_id = known.get("run_id")
    stored = Stored(
        target.checkpoint_id,
        serde.dumps_typed({**checkpoint, "channel_values": within}),
        serde.dumps_typed(known),
        apart,
        None if run_id is None else str(run_id),
        tuple((known.get("counters_since_delta_snapshot") or {}).keys() - within.keys() - apart.keys()),
    )
    rows.append((place.row, stored.pack()))
    if stored.run_id is not None:
        rows.append((place.of_run(stored.run_id), b""))
    return Packed(place, rows, unchanged, frozenset(values))


def _left(value: Any, left: int) -> int:
    """Return what a plain value leaves of `left` numbers, characters and members; less than 0 for any other value."""
    kind = type(value)
    if kind in _PLAIN:
        return left - 1
    if kind is str or kind is bytes:
        return left - 1 - len(value)
    if kind is dict:
        value = (*value, *value.values())
    elif kind is not list and kind is not tuple:
        return -1
    left -= 1 + len(value)
    for member in value:
        if left < 0:
            break
        left = _left(member, left)
    return left


def pack_writes(serde: SerializerProtocol, writes: Sequence[tuple[str, Any]], task: str, path: str) -> Written:
    """Return a task's writes, those of the channels LangGraph keeps for itself under numbers of their own."""
    packed = (
        Write(WRITES_IDX_MAP.get(channel, index), channel, path, serde.dumps_typed(value))
        for index, (channel, value) in enumerate(writes)
    )
    return Written(task, False, ()).add(packed)


def metadata_of(serde: SerializerProtocol, stored: Stored) -> CheckpointMetadata:
    """Return a checkpoint's metadata."""
    return cast(CheckpointMetadata, serde.loads_typed(stored.metadata))


def matches(serde: SerializerProtocol, stored: Stored, wanted: Mapping[str, Any]) -> bool:
    """Say whether a checkpoint's metadata has what a filter wants."""
    metadata: Mapping[str, Any] = serde.loads_typed(stored.metadata)
    return all(metadata.get(name) == value for name, value in wanted.items())


def unpack(serde: SerializerProtocol, found: Found, config: RunnableConfig | None = None) -> CheckpointTuple:
    """Return a checkpoint as LangGraph has it, under the config that was asked with, or one that names it."""
    place, stored = found.place, found.stored
    checkpoint: Checkpoint = serde.loads_typed(stored.checkpoint)
    for channel, payload in found.values.items():
        checkpoint["channel_values"][channel] = serde.loads_typed(unpack_value(payload))
    return CheckpointTuple(
        config=config or config_of(place),
        checkpoint=checkpoint,
        metadata=metadata_of(serde, stored),
        parent_config=None if stored.parent is None else config_of(place._replace(checkpoint_id=stored.parent)),
        pending_writes=unpack_pending(serde, found.writes),
    )


def unpack_pending(
    serde: SerializerProtocol, payloads: Iterable[bytes], channels: frozenset[str] | None = None
) -> list[PendingWrite]:
    """Return the writes in rows, of some channels or of all, in the order in which they are applied."""
    writes = [
        (writes_sort_key(write.path, written.task, write.at), written.task, write)
        for written in map(Written.unpack, payloads)
        for write in written.writes
        if channels is None or write.channel in channels
    ]
    writes.sort(key=itemgetter(0))
    return [(task, write.channel, serde.loads_typed(write.value)) for _, task, write in writes]
