"""The saver and the store beside LangGraph's own in memory: the same operations give the same answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT
from langgraph.store.base import GetOp, Item, ListNamespacesOp, MatchCondition, PutOp, SearchOp
from langgraph.store.memory import InMemoryStore

from persistency import Misuse, Persistency
from persistency.integrations.langgraph import PersistencyGraphStore, PersistencySaver, changing, packing
from tests.langgraph_given import checkpoint_of, config_of, known, metadata_of, saver_on

SEEDS = range(12)
STEPS = 60
THREADS, NAMESPACES, CHANNELS = ("t", "u", "t/u"), ("", "child:1"), ("a", "b", "messages")


class Mismatch(AssertionError):
    """Two savers have given different answers; it says with which seed, and where."""


def value(rng: random.Random) -> Any:
    """Something a channel may hold, small or large, plain or not."""
    return rng.choice(
        [
            None,
            rng.random(),
            "text" * rng.randrange(200),
            [rng.randrange(9) for _ in range(rng.randrange(400))],
            {"nested": {"list": [1, (2, 3)], "bytes": rng.randbytes(rng.randrange(500))}},
            [HumanMessage("question", id="1"), AIMessage("answer", id="2")],
        ]
    )


class Run:
    """Random operations, done on both savers; `ours` answers as `theirs` does, or `Mismatch` is raised."""

    def __init__(self, ours: PersistencySaver, theirs: InMemorySaver, seed: int) -> None:
        self.ours, self.theirs, self.seed = ours, theirs, seed
        self.rng = random.Random(seed)
        self.stored: list[tuple[str, str, str]] = []
        self.latest: dict[tuple[str, str], Any] = {}

    def go(self, steps: int) -> None:
        """Do so many operations, each followed by a look."""
        doing = [self.put] * 4 + [self.put_writes] * 3 + [self.delete_thread, self.get, self.list]
        for step in range(steps):
            act = doing[self.rng.randrange(len(doing))] if step > 4 else self.put
            self.at = f"seed {self.seed}, step {step}, {act.__name__}"
            act()
        self.at = f"seed {self.seed}, at the end"
        for place in sorted(set(self.stored)):
            self.same(lambda saver, place=place: known(saver.get_tuple(config_of(place[0], place[2], place[1]))))

    def same(self, ask: Callable[[Any], Any]) -> None:
        """Ask both."""
        ours, theirs = ask(self.ours), ask(self.theirs)
        if ours != theirs:
            raise Mismatch(f"{self.at}: {ours!r} is not {theirs!r}")

    def put(self) -> None:
        """Put a checkpoint below the latest one, in which some channels have changed, come or gone."""
        thread, namespace = self.rng.choice(THREADS), self.rng.choice(NAMESPACES)
        parent, values, versions = self.latest.get((thread, namespace), (None, {}, {}))
        changed = self.rng.sample(CHANNELS, self.rng.randrange(3))
        new = {channel: self.theirs.get_next_version(versions.get(channel), None) for channel in changed}
        values, versions = dict(values), versions | new
        for channel in changed:
            values.pop(channel, None)
            if self.rng.random() < 0.8:
                values[channel] = value(self.rng)
        checkpoint_id = f"{len(self.stored):06}-{self.rng.randrange(1000):03}"
        checkpoint = checkpoint_of(checkpoint_id, values, versions)
        metadata = metadata_of(self.rng.randrange(4), score=self.rng.choice([None, 1, 2.5, "high"]))
        for saver in (self.ours, self.theirs):
            saver.put(config_of(thread, parent, namespace), checkpoint, metadata, new)  # type: ignore[arg-type]
        self.stored.append((thread, namespace, checkpoint_id))
        self.latest[thread, namespace] = checkpoint_id, values, versions
        self.get()

    def put_writes(self) -> None:
        """Put writes of a new task or an old one, to any checkpoint, there or not."""
        thread, namespace, checkpoint_id = self.rng.choice(self.stored)
        writes = [
            (self.rng.choice([*CHANNELS, ERROR, INTERRUPT]), value(self.rng)) for _ in range(self.rng.randrange(4))
        ]
        task, path = f"task-{self.rng.randrange(3)}", self.rng.choice(["", "~1", "~2"])
        for saver in (self.ours, self.theirs):
            saver.put_writes(config_of(thread, checkpoint_id, namespace), writes, task, path)
        self.same(lambda saver: known(saver.get_tuple(config_of(thread, checkpoint_id, namespace))))

    def delete_thread(self) -> None:
        """Delete a thread."""
        thread = self.rng.choice(THREADS)
        for saver in (self.ours, self.theirs):
            saver.delete_thread(thread)
        self.latest = {place: one for place, one in self.latest.items() if place[0] != thread}
        self.get()

    def get(self) -> None:
        """Look at the latest checkpoint of somewhere."""
        config = config_of(self.rng.choice(THREADS), None, self.rng.choice(NAMESPACES))
        self.same(lambda saver: known(saver.get_tuple(config)))

    def list(self) -> None:
        """List a namespace with a filter, a limit and a bound, each perhaps."""
        thread, namespace, checkpoint_id = self.rng.choice(self.stored)
        wanted = self.rng.choice([None, {"step": 1}, {"score": None}, {"step": 2, "score": 2.5}, {"none": "such"}])
        before = self.rng.choice([None, config_of(thread, checkpoint_id, namespace)])
        limit = self.rng.choice([None, 0, 1, 5])
        config = config_of(thread, self.rng.choice([None, None, checkpoint_id]), namespace)
        self.same(lambda saver: [known(one) for one in saver.list(config, filter=wanted, before=before, limit=limit)])


@pytest.mark.parametrize("runner", ["job", "baton"])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_saver_answers_as_langgraphs_own_does(seed: int, runner: str, tmp_path: Path) -> None:
    """Random puts, writes, deletions and looks; a failure names its seed and step."""
    with saver_on(runner, str(tmp_path)) as ours:
        Run(ours, InMemorySaver(), seed).go(STEPS)


PLANTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "writes in the order they came": (packing, "writes_sort_key", lambda *_: ()),
    "a task's later writes replace the first": (
        changing.Written,
        "add",
        lambda self, writes: self._replace(writes=[*writes]),
    ),
    "a filter that takes any": (packing, "matches", lambda *_: True),
    "a thread that stays": (changing, "delete_thread", lambda *_: None),
}


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_defect_is_found(plant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness reports a saver that is wrong in one thing."""
    where, name, defect = PLANTS[plant]
    monkeypatch.setattr(where, name, defect)
    with Persistency(tmp_path) as p:
        savers = [PersistencySaver(p.open_job("graphs"), name=f"run-{seed}") for seed in range(40)]
        with pytest.raises(Mismatch, match=r"seed \d+"):
            go(savers)


def go(savers: list[PersistencySaver]) -> None:
    """Do random operations on each of some savers, another seed for each."""
    for seed, saver in enumerate(savers):
        Run(saver, InMemorySaver(), seed).go(STEPS)


# -- the store -----------------------------------------------------------------------------------------------------

LABELS, KEYS = ("a", "b", "ab", "users"), ("k1", "k2", "k3")
FILTERS = (
    None,
    {"n": 1},
    {"n": {"$gt": 1}},
    {"n": {"$gte": 1, "$lt": 3}},
    {"n": {"$ne": 2}},
    {"n": {"$eq": 0}},
    {"tags": ["x", 1]},
    {"nested": {"deep": "yes"}},
    {"nested": {"deep": "yes"}, "n": {"$lte": 2}},
)


def shape(found: Any) -> Any:
    """What of a result can be compared: all but times."""
    if isinstance(found, Item):
        return found.namespace, found.key, found.value
    if isinstance(found, list):
        return [shape(one) for one in found]
    return found


class Stores:
    """Random batches, done on both stores."""

    def __init__(self, ours: PersistencyGraphStore, seed: int) -> None:
        self.ours, self.rng, self.seed = ours, random.Random(seed), seed
        self.live: dict[tuple[tuple[str, ...], str], dict[str, Any]] = {}

    def theirs(self) -> InMemoryStore:
        """A store in memory with what is alive, for LangGraph's own also lists namespaces that are empty."""
        store = InMemoryStore()
        for (namespace, name), one in self.live.items():
            store.put(namespace, name, one)
        return store

    def namespace(self, least: int = 1) -> tuple[str, ...]:
        """Some namespace."""
        return tuple(self.rng.choices(LABELS, k=self.rng.randrange(least, 4)))

    def op(self) -> Any:
        """Some operation."""
        match self.rng.randrange(8):
            case 0:
                return GetOp(self.namespace(), self.rng.choice(KEYS))
            case 1:
                return SearchOp(self.namespace(0)[:2], self.rng.choice(FILTERS), limit=1000)
            case 2:
                path = tuple(self.rng.choices([*LABELS, "*"], k=self.rng.randrange(1, 3)))
                kinds = self.rng.sample(("prefix", "suffix"), self.rng.randrange(3))
                conditions = tuple(MatchCondition(kind, path) for kind in kinds)  # type: ignore[arg-type]
                depth, limit = self.rng.choice([None, 1, 2]), self.rng.choice([2, 1000])
                return ListNamespacesOp(conditions, depth, limit, self.rng.randrange(2))
            case 3:
                return PutOp(self.namespace(), self.rng.choice(KEYS), None)
            case _:
                nested = self.rng.choice([{"deep": "yes"}, {"deep": "no"}, "flat", None])
                one = {"n": self.rng.randrange(4), "tags": ["x", self.rng.randrange(3)], "nested": nested}
                return PutOp(self.namespace(), self.rng.choice(KEYS), one)

    def go(self, batches: int) -> None:
        """Do so many batches."""
        for at in range(batches):
            ops = [self.op() for _ in range(self.rng.randrange(1, 6))]
            # Each alone, on a store of its own: there a get makes a namespace, and a later listing shows it.
            theirs = [self.theirs().batch([op])[0] for op in ops]
            ours = self.ours.batch(ops) if self.rng.random() < 0.5 else asyncio.run(self.ours.abatch(ops))
            for op, one, other in zip(ops, ours, theirs, strict=True):
                order = (lambda found: sorted(found, key=repr)) if isinstance(op, SearchOp) else (lambda found: found)
                if order(shape(one)) != order(shape(other)):
                    raise Mismatch(f"seed {self.seed}, batch {at}, {op}: {shape(one)!r} is not {shape(other)!r}")
            for op in ops:
                if isinstance(op, PutOp):
                    self.live.pop((op.namespace, op.key), None)
                    if op.value is not None:
                        self.live[op.namespace, op.key] = dict(op.value)


@pytest.fixture
def store() -> Iterator[PersistencyGraphStore]:
    """Give an empty store."""
    with Persistency(":memory:") as p:
        yield PersistencyGraphStore(p.open_job("memories"))


@pytest.mark.parametrize("seed", SEEDS)
def test_the_store_answers_as_langgraphs_own_does(store: PersistencyGraphStore, seed: int) -> None:
    """Random batches of gets, puts, deletions, searches with filters, and listings of namespaces."""
    Stores(store, seed).go(60)


def test_the_harness_finds_a_store_that_is_wrong(store: PersistencyGraphStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ignores operators is reported."""
    from persistency.integrations.langgraph import matching

    monkeypatch.setattr(matching, "_holds", lambda *_: True)
    with pytest.raises(Mismatch, match=r"seed 0"):
        Stores(store, 0).go(200)


def test_filters_beyond_langgraphs_own(store: PersistencyGraphStore) -> None:
    """What can't be compared doesn't match, and is no error; texts compare as texts; unknown operators are told."""
    for name, one in {"number": 3, "text": "2026-02-01", "none": None, "list": [1], "numeral": "10"}.items():
        store.put(("a",), name, {"n": one})
    found = {one.key for one in store.search(("a",), filter={"n": {"$gt": 2}})}
    assert found == {"number", "numeral"}
    assert {one.key for one in store.search(("a",), filter={"n": {"$gte": "2026-01-01"}})} == {"text"}
    with pytest.raises(Misuse, match=r"\$near"):
        store.search(("a",), filter={"n": {"$near": 2}})
