"""History: what a delta channel's value is made of, collected from the ancestors of a checkpoint.

Rules:
  1. The chain of parents is followed, not the order of ids: of a forked thread only what is on the path counts.
  2. It ends for each channel at the nearest ancestor that has a value for it; that ancestor's own writes count.
  3. A page of ancestors at a time is read, and only the values and writes of the channels asked for are deserialized.

Doesn't know: how a value is made of its writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import DeltaChannelHistory, PendingWrite
from langgraph.checkpoint.serde.base import SerializerProtocol

from persistency.integrations.langgraph import packing, reading
from persistency.integrations.langgraph.reading import Found
from persistency.integrations.langgraph.rows import Place, unpack_value
from persistency.recipes.runner import Runner
from persistency.recipes.waiting import Steps

PAGE = 64


def history(
    runner: Runner, category: str, serde: SerializerProtocol, config: RunnableConfig, channels: Sequence[str]
) -> Steps[Mapping[str, DeltaChannelHistory]]:
    """Collect the writes of some channels since they last had a value, and that value as the `seed`."""
    target = packing.target_of(config)
    writes: dict[str, list[PendingWrite]] = {channel: [] for channel in channels}
    seeds: dict[str, Any] = {}
    seen: set[Place] = set()
    here: Place | None = yield runner.run(
        reading.parent, category, target.thread, target.namespace or "", target.checkpoint_id
    )
    while here is not None and here not in seen and len(seeds) < len(writes):
        open_channels = writes.keys() - seeds.keys()
        links: list[Found]
        links, here = yield runner.run(reading.chain, category, here, open_channels, PAGE)
        for link in links:
            if link.place in seen:
                return _told(writes, seeds)
            seen.add(link.place)
            _take(serde, link, writes, seeds)
    return _told(writes, seeds)


def _take(serde: SerializerProtocol, link: Found, writes: dict[str, list[PendingWrite]], seeds: dict[str, Any]) -> None:
    """Take what an ancestor has: its writes, the last one first, as all are turned round in the end; and its values."""
    open_channels = frozenset(writes) - seeds.keys()
    for write in reversed(packing.unpack_pending(serde, link.writes, open_channels)):
        writes[write[1]].append(write)
    within: Mapping[str, Any] = serde.loads_typed(link.stored.checkpoint).get("channel_values") or {}
    for channel in open_channels:
        if channel in link.values:
            seeds[channel] = serde.loads_typed(unpack_value(link.values[channel]))
        elif channel in within:
            seeds[channel] = within[channel]


def _told(writes: Mapping[str, list[PendingWrite]], seeds: Mapping[str, Any]) -> Mapping[str, DeltaChannelHistory]:
    told: dict[str, DeltaChannelHistory] = {}
    for channel, found in writes.items():
        told[channel] = {"writes": found[::-1]}
        if channel in seeds:
            told[channel]["seed"] = seeds[channel]
    return told
