"""The store: LangGraph's long-term memory in a job, for graphs that run in threads and in event loops.

    store = PersistencyGraphStore(job, ttl={"default_ttl": 60})
    graph = builder.compile(checkpointer=saver, store=store)

Rules:
  1. A batch reads what was there before it, and what it writes is one transaction, in which the last write to a key
     counts. Its searches and listings walk page by page before that.
  2. TTLs are exact: an item that has ended is in no answer, whether its row was reclaimed or not.
  3. What an embedding makes is made in the caller's thread, before anything is written.

Doesn't know: where items lie, how pages are walked.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from langgraph.store.base import (
    BaseStore,
    GetOp,
    IndexConfig,
    InvalidNamespaceError,
    ListNamespacesOp,
    Op,
    PutOp,
    Result,
    SearchOp,
    TTLConfig,
    validate_op_namespace,
)

from persistency import CBOR, Misuse
from persistency.integrations.langgraph import items, searching, vectors
from persistency.integrations.langgraph.patience import in_loops, in_threads
from persistency.integrations.langgraph.vectors import Index
from persistency.recipes.runner import Runner, as_runner
from persistency.recipes.waiting import Steps, adrive, drive


class _Batch(NamedTuple):
    """A batch: its operations in order, and of those that write the last one of each key with the texts to embed."""

    ops: list[Op]
    puts: list[tuple[PutOp, list[str]]]


class _Made(NamedTuple):
    """What an embedding has made: the vectors of the texts of items, and those of queries."""

    texts: dict[str, array[float]]
    queries: dict[str, array[float]]


class PersistencyGraphStore(BaseStore):
    """A LangGraph store on a job. Any thread and any event loop may use it, both forms of its verbs alike.

    `runner`: a `Job`, or a `Baton` where several processes share one; it stays open until you close it. `name`: the
    category of the rows. `index`: LangGraph's `IndexConfig`; then items are found by meaning too, every vector of the
    namespace being compared with the query's. `ttl`: LangGraph's `TTLConfig`, in minutes; its `omit_expired` is always
    so, and its `sweep_interval_minutes` has no meaning, as the job reclaims what has ended by itself.

    Values are mappings of what CBOR holds, which is all of JSON and more. Raises `Misuse` for a wrong argument, and
    whatever the job raises.
    """

    supports_ttl: bool = True

    def __init__(
        self,
        runner: Runner,
        *,
        name: str = "langgraph-store",
        index: IndexConfig | None = None,
        ttl: TTLConfig | None = None,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise Misuse(f"name must be a text, not {name!r:.40}: pass the name of a category")
        self.name: str = name
        self.ttl_config: TTLConfig | None = ttl
        self._runner, self._awaited = in_threads(as_runner(runner)), in_loops(runner)
        self._index = None if index is None else Index(index)

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Do what LangGraph's operations say, and return their results in order."""
        batch, made = self._batch(ops), _Made({}, {})
        if self._index is not None:
            embeddings = self._index.embeddings
            texts, queries = _texts(batch), _queries(batch)
            made.texts.update(self._index.units(texts, embeddings.embed_documents(texts) if texts else []))
            made.queries.update(self._index.units(queries, [embeddings.embed_query(query) for query in queries]))
        return drive(self._steps(self._runner, batch, made))

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """Do what `batch` does, without blocking the event loop."""
        batch, made = self._batch(ops), _Made({}, {})
        if self._index is not None:
            embeddings = self._index.embeddings
            texts, queries = _texts(batch), _queries(batch)
            made.texts.update(self._index.units(texts, await embeddings.aembed_documents(texts) if texts else []))
            made.queries.update(self._index.units(queries, [await embeddings.aembed_query(query) for query in queries]))
        return await adrive(self._steps(self._awaited, batch, made))

    def sweep_ttl(self) -> int:
        """Do nothing and return 0: the job reclaims by itself what has ended, and nobody sees it meanwhile.

        LangGraph's own stores have it, and whoever runs them calls it.
        """
        return 0

    def _batch(self, ops: Iterable[Op]) -> _Batch:
        every = list(ops)
        last: dict[tuple[items.Namespace, str], PutOp] = {}
        for op in every:
            if not isinstance(op, GetOp | PutOp | SearchOp | ListNamespacesOp):
                raise Misuse(f"a batch is made of LangGraph's operations, not of {type(op).__name__}")
            validate_op_namespace(op)
            if isinstance(op, PutOp):
                if not op.namespace:
                    raise InvalidNamespaceError("Namespace cannot be empty.")
                if op.value is not None and not isinstance(op.value, Mapping):
                    raise Misuse(f"a value must be a mapping, not {op.value!r:.40}")
                last[op.namespace, op.key] = op
        return _Batch(every, [(op, self._texts_of(op)) for op in last.values()])

    def _texts_of(self, op: PutOp) -> list[str]:
        """Return the texts of an item that are to be found by meaning."""
        if self._index is None or op.value is None or op.index is False:
            return []
        return self._index.texts(op.value, op.index)

    def _steps(self, runner: Runner, batch: _Batch, made: _Made) -> Steps[list[Result]]:
        results: list[Result] = [None] * len(batch.ops)
        gets: dict[int, GetOp] = {}
        for at, op in enumerate(batch.ops):
            if isinstance(op, SearchOp):
                query = made.queries.get(op.query) if op.query else None
                results[at] = yield from searching.search(runner, self.name, op, query)
            elif isinstance(op, ListNamespacesOp):
                results[at] = yield from searching.list_namespaces(runner, self.name, op)
            elif isinstance(op, GetOp):
                gets[at] = op
        sets = [_set(op, [made.texts[text] for text in texts]) for op, texts in batch.puts]
        if gets or sets:
            entries = yield runner.run(items.apply, self.name, [items.Get(*op) for op in gets.values()], sets)
            for (at, op), entry in zip(gets.items(), entries, strict=True):
                results[at] = None if entry is None else searching.item_of(op.namespace, op.key, entry)
        return results


def _set(op: PutOp, made: list[array[float]]) -> items.Set:
    value = None if op.value is None else CBOR.encode(dict(op.value))
    return items.Set(op.namespace, op.key, value, vectors.pack(made) if made else None, op.ttl)


def _texts(batch: _Batch) -> list[str]:
    return list(dict.fromkeys(text for _, texts in batch.puts for text in texts))


def _queries(batch: _Batch) -> list[str]:
    return list(dict.fromkeys(op.query for op in batch.ops if isinstance(op, SearchOp) and op.query))
