"""LangGraph: a checkpoint saver and a store on a job (the extra `langgraph`).

    saver = PersistencySaver(job)  # and then builder.compile(checkpointer=saver, store=PersistencyGraphStore(job))

Both have every verb twice, for threads and for event loops, and one object serves both, from any thread and any loop.

Rules:
  1. They stand on the public surface alone: a `Job`, or a `Baton` where several processes share one job.
  2. Each call is one transaction, `list` and `search` aside, which ask page by page and hold nothing in between.
  3. What was put is committed when the call returns.

Doesn't know: graphs, nodes, what the values mean.
"""

from __future__ import annotations

try:
    import langgraph.checkpoint.base
    import langgraph.store.base  # noqa: F401  # both are of one package, and looked for before anything of ours
except ModuleNotFoundError as _missing:
    if (_missing.name or "").partition(".")[0] != "langgraph":
        raise
    raise ModuleNotFoundError(
        "persistency.integrations.langgraph needs the extra 'langgraph': pip install 'persistency[langgraph]'",
        name=_missing.name,
    ) from None

from persistency.integrations.langgraph.listing import Listing
from persistency.integrations.langgraph.saver import PersistencySaver
from persistency.integrations.langgraph.store import PersistencyGraphStore

__all__ = ["Listing", "PersistencyGraphStore", "PersistencySaver"]
