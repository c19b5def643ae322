"""The LangGraph store: times, TTLs, order, and finding by meaning. `test_langgraph_oracle` has the rest."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from langgraph.store.base import GetOp, InvalidNamespaceError, ListNamespacesOp, MatchCondition, PutOp, SearchOp
from langgraph.store.memory import InMemoryStore

from persistency import Corrupt, Job, Misuse, Persistency, key
from persistency.integrations.langgraph import PersistencyGraphStore
from persistency.recipes import Baton
from persistency.testing import ManualClock
from tests.loops import InLoop

MINUTE = 60


@pytest.fixture
def clock() -> ManualClock:
    """A clock that stands still."""
    return ManualClock()


@pytest.fixture
def job(clock: ManualClock, tmp_path: Path) -> Iterator[Job]:
    """Give an empty job."""
    with Persistency(tmp_path / "root", clock=clock) as p:
        yield p.open_job("memories")


@pytest.fixture
def store(job: Job) -> PersistencyGraphStore:
    """Give an empty store."""
    return PersistencyGraphStore(job)


def keys(found: Sequence[Any]) -> list[str]:
    """The keys of what was found."""
    return [one.key for one in found]


# -- items ---------------------------------------------------------------------------------------------------------


def test_both_forms_of_every_verb_do_the_same_in_every_loop(tmp_path: Path, in_loop: InLoop) -> None:
    """Under asyncio, trio and anyio, and beside threads, on one object."""
    with Persistency(tmp_path) as p, Baton(p, "memories") as baton:
        store = PersistencyGraphStore(baton)

        async def everything() -> None:
            await store.aput(("a", "b"), "k", {"n": 1})
            assert store.get(("a", "b"), "k") == await store.aget(("a", "b"), "k")
            assert store.search(("a",)) == await store.asearch(("a",))
            assert store.list_namespaces() == await store.alist_namespaces() == [("a", "b")]
            await store.adelete(("a", "b"), "k")
            assert store.get(("a", "b"), "k") is None

        in_loop(everything)


def test_an_item_keeps_its_time_of_creation(store: PersistencyGraphStore, clock: ManualClock) -> None:
    """Putting it again changes when it was updated; deleting it makes the next one new."""
    created = datetime.fromtimestamp(clock.now, UTC)
    store.put(("a",), "k", {"n": 1})
    clock.advance(1.5)
    store.put(("a",), "k", {"n": 2})
    item = store.get(("a",), "k")
    assert item is not None
    assert (item.value, item.created_at, (item.updated_at - created).total_seconds()) == ({"n": 2}, created, 1.5)
    store.delete(("a",), "k")
    store.put(("a",), "k", {"n": 3})
    item = store.get(("a",), "k")
    assert item is not None
    assert item.created_at == item.updated_at > created


def test_a_search_gives_the_last_updated_first(store: PersistencyGraphStore, clock: ManualClock) -> None:
    """Over pages, with a limit and an offset, each item once; those of one moment in the order of their keys."""
    order = [f"{at:04}" for at in range(250)]
    random.Random(7).shuffle(order)
    for name in order:
        store.put(("a", name[-1]), name, {"n": int(name)})
        clock.advance(0.001)
    newest = order[::-1]
    assert keys(store.search(("a",), limit=1000)) == newest
    assert keys(store.search(("a",))) == newest[:10]
    assert keys(store.search(("a",), limit=7, offset=100)) == newest[100:107]
    assert keys(store.search(("a",), limit=7, offset=248)) == newest[248:]
    assert store.search(("a",), limit=0) == []
    assert keys(store.search(("a", "3"), limit=1000)) == [name for name in newest if name[-1] == "3"]
    assert keys(store.search((), filter={"n": {"$lt": 5}}, limit=3)) == [one for one in newest if int(one) < 5][:3]
    store.batch([PutOp(("z",), name, {}) for name in ("b", "a", "c")])
    assert keys(store.search(("z",))) == ["a", "b", "c"]


def test_namespaces_that_begin_alike_are_apart(store: PersistencyGraphStore) -> None:
    """A prefix is of whole labels; a key that is called like a label of a namespace is no namespace."""
    for namespace in (("a",), ("a", "b"), ("ab",), ("a", "b", "c")):
        store.put(namespace, "b", {"where": list(namespace)})
    found = [one.namespace for one in store.search(("a",))]
    assert sorted(found) == [("a",), ("a", "b"), ("a", "b", "c")]
    assert store.list_namespaces(max_depth=1) == [("a",), ("ab",)]
    assert store.list_namespaces(prefix=("a", "*"), suffix=("c",)) == [("a", "b", "c")]
    assert store.list_namespaces(limit=2, offset=1) == [("a", "b"), ("a", "b", "c")]


def test_a_namespace_with_many_items_is_found_at_once(store: PersistencyGraphStore) -> None:
    """Listing looks at one key of each: several pages of namespaces, whatever is in them."""
    namespaces = [("user", f"{at:03}") for at in range(300)]
    store.batch([PutOp(one, f"k{at}", {}) for one in namespaces for at in range(3)])
    assert store.list_namespaces(limit=1000) == namespaces
    assert store.list_namespaces(limit=10, offset=260) == namespaces[260:270]


def test_a_batch_reads_what_was_before_it_and_writes_all_or_nothing(store: PersistencyGraphStore) -> None:
    """The last write to a key counts; a value that can't be stored leaves everything as it was."""
    store.put(("a",), "k", {"n": 1})
    results = store.batch(
        [PutOp(("a",), "k", {"n": 2}), GetOp(("a",), "k"), PutOp(("a",), "k", {"n": 3}), SearchOp(("a",))]
    )
    assert results[0] is None
    assert results[1].value == {"n": 1}  # type: ignore[union-attr]
    assert [one.value for one in results[3]] == [{"n": 1}]  # type: ignore[union-attr]
    assert store.get(("a",), "k").value == {"n": 3}  # type: ignore[union-attr]
    with pytest.raises(Misuse):
        store.batch([PutOp(("a",), "k", {"n": 4}), PutOp(("a",), "other", {"n": object()})])
    assert store.get(("a",), "k").value == {"n": 3}  # type: ignore[union-attr]
    assert store.batch([]) == []


# -- TTLs ----------------------------------------------------------------------------------------------------------


def test_an_item_that_has_ended_is_in_no_answer(store: PersistencyGraphStore, job: Job, clock: ManualClock) -> None:
    """From the millisecond on (`langgraph#8902`): not got, not found, its namespace not listed; and then reclaimed."""
    store.put(("a",), "ends", {"n": 1}, ttl=10)
    store.put(("b",), "stays", {"n": 1})
    clock.advance(10 * MINUTE - 0.001)
    found = store.batch([GetOp(("a",), "ends", False), SearchOp((), refresh_ttl=False), ListNamespacesOp()])
    assert [found[0].key, keys(found[1]), found[2]] == ["ends", ["ends", "stays"], [("a",), ("b",)]]  # type: ignore[union-attr, arg-type]
    clock.advance(0.001)
    found = store.batch([GetOp(("a",), "ends"), SearchOp(()), ListNamespacesOp()])
    assert [found[0], keys(found[1]), found[2]] == [None, ["stays"], [("b",)]]  # type: ignore[arg-type]
    assert store.sweep_ttl() == 0
    assert job.count(store.name).result() == 1


@pytest.mark.parametrize("how", ["get", "search"])
def test_reading_lets_a_ttl_begin_anew_unless_it_is_told_not_to(how: str, job: Job, clock: ManualClock) -> None:
    """As `TTLConfig` says, and as the call says where it does; an item without a TTL gets none."""

    def read(store: PersistencyGraphStore, **options: Any) -> Any:
        if how == "get":
            return store.get(("a",), "k", **options)
        return store.search(("a",), **options)[0] if store.search(("a",), **options) else None

    store = PersistencyGraphStore(job, ttl={"default_ttl": 10})
    store.put(("a",), "k", {"n": 1})
    for _ in range(3):
        clock.advance(6 * MINUTE)
        assert read(store) is not None
    clock.advance(6 * MINUTE)
    assert read(store, refresh_ttl=False) is not None
    clock.advance(6 * MINUTE)
    assert read(store) is None
    still = PersistencyGraphStore(job, ttl={"default_ttl": 10, "refresh_on_read": False})
    still.put(("a",), "k", {"n": 1})
    still.put(("a",), "for ever", {"n": 1}, ttl=None)
    clock.advance(6 * MINUTE)
    assert read(still) is not None
    clock.advance(6 * MINUTE)
    assert still.get(("a",), "k") is None
    assert still.get(("a",), "for ever") is not None


def test_putting_an_item_again_sets_its_ttl_anew(store: PersistencyGraphStore, clock: ManualClock) -> None:
    """Also to none."""
    store.put(("a",), "k", {"n": 1}, ttl=1)
    store.put(("a",), "k", {"n": 2})
    clock.advance(2 * MINUTE)
    assert store.get(("a",), "k") is not None


# -- finding by meaning --------------------------------------------------------------------------------------------


def embed(texts: Sequence[str]) -> list[list[float]]:
    """Make vectors of texts: how often each letter is there."""
    return [[float(text.count(letter)) for letter in "abcdefgh"] for text in texts]


async def aembed(texts: Sequence[str]) -> list[list[float]]:
    """Make the same vectors, asynchronously."""
    return embed(texts)


WORDS = ("abba", "bad", "cabbage", "dad", "egg", "face", "gaffe", "hedge", "beach", "chafe", "zzz")


def filled(store: Any) -> Any:
    """Put some words, one of them without vectors."""
    for at, word in enumerate(WORDS):
        store.put(("words", word[0]), word, {"text": word, "more": [word[::-1] + "-", "h"], "n": at})
    store.put(("words", "a"), "apart", {"text": "abba", "n": 9}, index=False)
    return store


@pytest.mark.parametrize("fields", [None, ["text"], ["text", "more[*]"], ["more[-1]"]])
def test_items_are_found_by_meaning_as_in_langgraphs_own_store(job: Job, fields: list[str] | None) -> None:
    """The same items, as near, for a query, with a filter, a limit and an offset."""
    index: Any = {"dims": 8, "embed": embed, "fields": fields or ["$"]}
    ours, theirs = filled(PersistencyGraphStore(job, index=index)), filled(InMemoryStore(index=index))
    for options in ({"limit": 20}, {"limit": 3}, {"filter": {"n": {"$gt": 4}}, "limit": 20}, {"limit": 2, "offset": 4}):
        for query in ("abba", "decade", "hhh"):
            one, other = (store.search(("words",), query=query, **options) for store in (ours, theirs))
            scores = [found.score for found in one]
            expected = [found.score for found in other]
            assert len(one) == len(other)
            assert [score is None for score in scores] == [score is None for score in expected]
            assert all(math.isclose(a or 0, b or 0, abs_tol=1e-6) for a, b in zip(scores, expected, strict=True))
            near = {found.key: found.score for found in theirs.search(("words",), query=query, limit=20)}
            assert all(math.isclose(found.score or 0, near[found.key] or 0, abs_tol=1e-6) for found in one)


def test_vectors_follow_their_item(job: Job, clock: ManualClock) -> None:
    """They change with it, end with it, and go with it."""
    store = PersistencyGraphStore(job, index={"dims": 8, "embed": embed, "fields": ["text"]})
    store.put(("a",), "k", {"text": "aaa"}, ttl=1)
    assert store.search(("a",), query="a")[0].score == pytest.approx(1.0)
    clock.advance(0.9 * MINUTE)
    assert store.search(("a",), query="a")[0].score == pytest.approx(1.0)
    clock.advance(0.9 * MINUTE)
    assert store.search(("a",), query="a", refresh_ttl=False)[0].score == pytest.approx(1.0)
    store.put(("a",), "k", {"text": "bbb"})
    assert store.search(("a",), query="a")[0].score == pytest.approx(0.0)
    store.put(("a",), "k", {"text": "aaa"}, index=False)
    assert store.search(("a",), query="a")[0].score is None
    store.put(("a",), "k", {"text": "aaa"})
    store.delete(("a",), "k")
    assert job.count(store.name).result() == 0


def test_an_asynchronous_embedding_is_awaited_in_every_loop(tmp_path: Path, in_loop: InLoop) -> None:
    """Under asyncio, trio and anyio."""
    with Persistency(tmp_path) as p:
        store = PersistencyGraphStore(p.open_job("memories"), index={"dims": 8, "embed": aembed, "fields": ["text"]})

        async def everything() -> None:
            for word in WORDS:
                await store.aput(("words",), word, {"text": word})
            found = await store.asearch(("words",), query="egg", limit=2)
            assert keys(found)[0] == "egg"
            assert found[0].score == pytest.approx(1.0)

        in_loop(everything)


def test_an_embedding_of_other_dimensions_is_told(job: Job) -> None:
    """At the put where the index says how many; at the search where what is stored has others."""
    wrong = PersistencyGraphStore(job, index={"dims": 9, "embed": embed})
    with pytest.raises(Misuse, match="8 dimensions"):
        wrong.put(("a",), "k", {"text": "a"})
    assert wrong.get(("a",), "k") is None
    PersistencyGraphStore(job, index={"dims": 8, "embed": embed}).put(("a",), "k", {"text": "a"})
    longer = PersistencyGraphStore(job, index={"dims": 9, "embed": lambda texts: [[*one, 1.0] for one in embed(texts)]})
    with pytest.raises(Corrupt, match="8 dimensions"):
        longer.search(("a",), query="a")


def test_without_an_index_a_query_is_ignored(store: PersistencyGraphStore) -> None:
    """As in LangGraph's own stores: what is found has no score."""
    store.put(("a",), "k", {"text": "a"}, index=["text"])
    assert [(one.key, one.score) for one in store.search(("a",), query="a")] == [("k", None)]


# -- wrong arguments -----------------------------------------------------------------------------------------------


def test_wrong_arguments_are_told_at_the_call(store: PersistencyGraphStore, job: Job) -> None:
    """LangGraph's own errors where it has some, else `Misuse`; nothing was done."""
    for wrong in ((), ("",), ("a.b",), ("langgraph",)):
        with pytest.raises(InvalidNamespaceError):
            store.put(wrong, "k", {})
    with pytest.raises(InvalidNamespaceError):
        store.batch([PutOp((), "k", {})])
    with pytest.raises(Misuse, match="limit"):
        store.search(("a",), limit=-1)
    with pytest.raises(Misuse, match="offset"):
        store.list_namespaces(offset=-1)
    store.put(("a",), "k", {})
    with pytest.raises(Misuse, match="prefix and suffix"):
        store.batch([ListNamespacesOp((MatchCondition("infix", ("a",)),))])  # type: ignore[arg-type]
    with pytest.raises(Misuse, match="of str"):
        store.batch(["get"])  # type: ignore[list-item]
    with pytest.raises(Misuse):
        store.put(("a",), "other", {}, ttl=0)
    for wrong_value in (["text"], "text", 5, [("a", 1)]):
        with pytest.raises(Misuse, match="a mapping"):
            store.put(("a",), "other", wrong_value)  # type: ignore[arg-type]
    for wrong_store in (lambda: PersistencyGraphStore("job"), lambda: PersistencyGraphStore(job, name="")):  # type: ignore[arg-type]
        with pytest.raises(Misuse):
            wrong_store()
    assert keys(store.search(())) == ["k"]


def test_rows_of_something_else_are_corrupt(store: PersistencyGraphStore, job: Job) -> None:
    """A category that somebody else has written into is told, not guessed at."""
    job.put(store.name, key("item", "a", None, "k"), b"\x00")
    with pytest.raises(Corrupt):
        store.get(("a",), "k")
    job.put(store.name, key("item", "a", "k"), b"\x80")
    with pytest.raises(Corrupt):
        store.list_namespaces()
