"""What the tests of the LangGraph integration have in common: checkpoints, configs, and a saver on either runner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import Checkpoint, CheckpointMetadata, CheckpointTuple

from persistency import Persistency
from persistency.integrations.langgraph import PersistencySaver
from persistency.recipes import Baton

RUNNERS = ("job", "baton")


@contextmanager
def saver_on(runner: str, root: str, **options: Any) -> Iterator[PersistencySaver]:
    """Give a saver on a job, or on a baton."""
    with Persistency(root) as p:
        if runner == "job":
            yield PersistencySaver(p.open_job("graphs"), **options)
        else:
            with Baton(p, "graphs", keep=5.0) as baton:
                yield PersistencySaver(baton, **options)


def config_of(thread: str, checkpoint_id: str | None = None, namespace: str | None = "") -> RunnableConfig:
    """Return a config that names a thread, a namespace unless it is `None`, and perhaps a checkpoint."""
    configurable: dict[str, Any] = {"thread_id": thread}
    if namespace is not None:
        configurable["checkpoint_ns"] = namespace
    if checkpoint_id is not None:
        configurable["checkpoint_id"] = checkpoint_id
    return {"configurable": configurable}


def checkpoint_of(
    checkpoint_id: str, values: dict[str, Any] | None = None, versions: dict[str, Any] | None = None
) -> Checkpoint:
    """Return a checkpoint; without `versions` every channel has its first one."""
    values = values or {}
    return {
        "v": 4,
        "id": checkpoint_id,
        "ts": "2026-01-01T00:00:00+00:00",
        "channel_values": values,
        "channel_versions": dict.fromkeys(values, "1") if versions is None else versions,
        "versions_seen": {},
        "updated_channels": None,
    }


def metadata_of(step: int = 0, **more: Any) -> CheckpointMetadata:
    """Return the metadata of a step."""
    found: Any = {"source": "loop", "step": step, "parents": {}, **more}
    return found  # type: ignore[no-any-return]  # a TypedDict of whatever is given


def put(
    saver: Any, thread: str, checkpoint_id: str, values: dict[str, Any] | None = None, **more: Any
) -> RunnableConfig:
    """Put a checkpoint that has no parent, unless `parent` says so; all its values are new."""
    parent, namespace = more.pop("parent", None), more.pop("namespace", "")
    checkpoint = checkpoint_of(checkpoint_id, values, more.pop("versions", None))
    config = config_of(thread, parent, namespace)
    stored: RunnableConfig = saver.put(config, checkpoint, metadata_of(**more), checkpoint["channel_versions"])
    return stored


def ids(found: Any) -> list[str]:
    """Return the checkpoints' ids of what was listed."""
    return [one.checkpoint["id"] for one in found]


def known(one: CheckpointTuple | None) -> Any:
    """Return all there is of a checkpoint, in a form that can be compared."""
    if one is None:
        return None
    configurable = one.config["configurable"]
    return (
        {name: configurable[name] for name in ("thread_id", "checkpoint_ns", "checkpoint_id")},
        one.checkpoint,
        one.metadata,
        one.parent_config,
        one.pending_writes,
    )
