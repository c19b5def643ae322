"""The saver: LangGraph's checkpoints in a job, for graphs that run in threads and in event loops.

    saver = PersistencySaver(job)
    graph = builder.compile(checkpointer=saver)

Rules:
  1. Every verb is written once, as steps that wait for replies; the two forms differ in who takes the steps.
  2. Serializing is done in the caller's thread, never inside a transaction.
  3. A verb that writes returns when its transaction is committed; giving up waiting doesn't undo it.

Doesn't know: where rows lie, how pages are walked.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from persistency import Job, Key, Misuse
from persistency.integrations.langgraph import changing, packing, reading
from persistency.integrations.langgraph.direct import Direct, Head
from persistency.integrations.langgraph.history import history
from persistency.integrations.langgraph.listing import Listing, Query, walk
from persistency.integrations.langgraph.patience import PatientJob, in_loops, in_threads
from persistency.integrations.langgraph.rows import pack_value
from persistency.recipes.runner import Runner, as_runner
from persistency.recipes.waiting import Steps, adrive, drive

_STRATEGIES = ("keep_latest", "delete")


class _Way(NamedTuple):
    """What a form of the verbs asks, the one of threads or that of event loops; `direct` where it is a job."""

    runner: Runner
    direct: Direct | None


class PersistencySaver(BaseCheckpointSaver[str]):
    """A LangGraph checkpoint saver on a job. Any thread and any event loop may use it, both forms of its verbs alike.

    `runner`: a `Job`, or a `Baton` where several processes share one; it stays open until you close it. `name`: the
    category of the rows; two savers with the same name on one job are one. `serde`: LangGraph's own serializer unless
    another one is given; it decides what may be stored, and pickles nothing unless it was told to.

    Raises `Misuse` for a wrong argument, and whatever the job raises. Under an event loop the sync form of a verb
    works too, and blocks the loop meanwhile.
    """

    def __init__(
        self, runner: Runner, *, name: str = "langgraph-checkpoints", serde: SerializerProtocol | None = None
    ) -> None:
        super().__init__(serde=serde)
        if not isinstance(name, str) or not name:
            raise Misuse(f"name must be a text, not {name!r:.40}: pass the name of a category")
        self.name: str = name
        heads: dict[Key, Head] = {}
        self._way = _way(in_threads(as_runner(runner)), name, heads)
        self._awaited = _way(in_loops(runner), name, heads)

    # -- one checkpoint ------------------------------------------------------------------------------------------

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Return the checkpoint a config names, or the thread's latest one; `None` if there is none."""
        return drive(self._get(self._way, config))

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Do what `get_tuple` does, without blocking the event loop."""
        return await adrive(self._get(self._awaited, config))

    def _get(self, way: _Way, config: RunnableConfig) -> Steps[CheckpointTuple | None]:
        target = packing.target_of(config)
        thread, namespace, wanted = target.thread, target.namespace or "", target.checkpoint_id
        found = None if way.direct is None else (yield from way.direct.find(thread, namespace, wanted))
        if found is None:
            found = yield way.runner.run(reading.find, self.name, thread, namespace, wanted)
        return None if found is None else packing.unpack(self.serde, found, None if wanted is None else config)

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Store a checkpoint below the one that the config names, and return the config of the new one."""
        return drive(self._put(self._way, config, checkpoint, metadata, new_versions))

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Do what `put` does, without blocking the event loop."""
        return await adrive(self._put(self._awaited, config, checkpoint, metadata, new_versions))

    def _put(
        self,
        way: _Way,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> Steps[RunnableConfig]:
        packed = packing.pack(self.serde, config, checkpoint, metadata, new_versions)
        place, rows, unchanged, _ = packed
        if way.direct is None or not (yield from way.direct.put(packed)):
            head = yield way.runner.run(changing.put, self.name, place, rows, tuple(unchanged))
            if head is None:  # they are said to be unchanged, but were never put here, or have been deleted
                rows += [(row, pack_value(self.serde.dumps_typed(value))) for row, value in unchanged.items()]
                head = yield way.runner.run(changing.put, self.name, place, rows, ())
            if way.direct is not None:
                way.direct.remember(packed, *head)
        return packing.config_of(place)

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Store what a task has written after the checkpoint that the config names."""
        drive(self._put_writes(self._way, config, writes, task_id, task_path))

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Do what `put_writes` does, without blocking the event loop."""
        await adrive(self._put_writes(self._awaited, config, writes, task_id, task_path))

    def _put_writes(
        self, way: _Way, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> Steps[None]:
        target = packing.target_of(config)
        if target.checkpoint_id is None:
            raise Misuse("the config of writes names no checkpoint: pass the one that put returned")
        place = target.place(target.checkpoint_id)
        written = packing.pack_writes(self.serde, writes, task_id, task_path)
        if written.writes and (way.direct is None or not (yield from way.direct.put_writes(place, written))):
            yield way.runner.run(changing.put_writes, self.name, place, written)

    # -- several -------------------------------------------------------------------------------------------------

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002  # LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Listing:
        """Walk over checkpoints, the latest first: of a namespace, a whole thread, or all threads (`None`).

        Pages are asked for as the walk goes on, and nothing is held in between: it may be left where it is, and others
        write meanwhile. Without a namespace the ids are gathered first.
        """
        return self._list(self._way, config, filter, before, limit)

    def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002  # LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Listing:
        """Do what `list` does, for `async for`."""
        return self._list(self._awaited, config, filter, before, limit)

    def _list(
        self,
        way: _Way,
        config: RunnableConfig | None,
        wanted: dict[str, Any] | None,
        before: RunnableConfig | None,
        limit: int | None,
    ) -> Listing:
        earlier = None if before is None else packing.checkpoint_id_of(before)
        query = Query(None if config is None else packing.target_of(config), earlier, wanted or {}, limit)
        return Listing(walk(way.runner, self.name, self.serde, query))

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Collect what the values of delta channels are made of, from the ancestors of a checkpoint."""
        return drive(history(self._way.runner, self.name, self.serde, config, channels)) if channels else {}

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Do what `get_delta_channel_history` does, without blocking the event loop."""
        return await adrive(history(self._awaited.runner, self.name, self.serde, config, channels)) if channels else {}

    # -- keeping house -------------------------------------------------------------------------------------------

    def delete_thread(self, thread_id: str) -> None:
        """Delete all there is of a thread."""
        self._way.runner.run(changing.delete_thread, self.name, str(thread_id)).result()

    async def adelete_thread(self, thread_id: str) -> None:
        """Do what `delete_thread` does, without blocking the event loop."""
        await self._awaited.runner.run(changing.delete_thread, self.name, str(thread_id))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints of some runs, with their writes, in one transaction.

        A delta channel that was made of them has lost what they wrote: LangGraph's own warning holds here as well.
        """
        self._way.runner.run(changing.delete_runs, self.name, _texts(run_ids, "run_ids")).result()

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Do what `delete_for_runs` does, without blocking the event loop."""
        await self._awaited.runner.run(changing.delete_runs, self.name, _texts(run_ids, "run_ids"))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy all there is of a thread to another one, in one transaction."""
        drive(self._copy(self._way, str(source_thread_id), str(target_thread_id)))

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Do what `copy_thread` does, without blocking the event loop."""
        await adrive(self._copy(self._awaited, str(source_thread_id), str(target_thread_id)))

    def _copy(self, way: _Way, source: str, target: str) -> Steps[None]:
        if source != target:
            yield way.runner.run(changing.copy_thread, self.name, source, target)

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Keep the latest checkpoint of each namespace of some threads (`"keep_latest"`), or none (`"delete"`).

        Ancestors that the delta channels of a kept checkpoint are made of stay as well. A thread is a transaction.
        """
        drive(self._prune(self._way, _texts(thread_ids, "thread_ids"), strategy))

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest") -> None:
        """Do what `prune` does, without blocking the event loop."""
        await adrive(self._prune(self._awaited, _texts(thread_ids, "thread_ids"), strategy))

    def _prune(self, way: _Way, threads: tuple[str, ...], strategy: str) -> Steps[None]:
        if strategy not in _STRATEGIES:
            raise Misuse(f"strategy must be one of {', '.join(_STRATEGIES)}, not {strategy!r:.40}")
        for thread in threads:
            yield way.runner.run(
                changing.prune if strategy == "keep_latest" else changing.delete_thread, self.name, thread
            )

    def get_next_version(self, current: str | None, channel: None) -> str:  # noqa: ARG002  # LangGraph passes it
        """Return the version that follows: a number, and a random one, so that no two branches make the same."""
        before = 0 if current is None else int(str(current).partition(".")[0])
        # Not a secret: two branches of a thread shall differ, as in LangGraph's own savers.
        return f"{before + 1:032}.{random.random():016}"  # noqa: S311


def _way(runner: Runner, name: str, heads: dict[Key, Head]) -> _Way:
    return _Way(runner, Direct(runner, name, heads) if isinstance(runner, Job | PatientJob) else None)


def _texts(values: Sequence[str], argument: str) -> tuple[str, ...]:
    if isinstance(values, str):
        raise Misuse(f"{argument} must be a list of ids, not a text: pass [{values!r:.40}]")
    return tuple(map(str, values))
