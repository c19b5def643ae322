"""A category verb by verb, over both adapters: values as objects, swaps by value, lists, what can't be decoded."""

from __future__ import annotations

import gzip
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import anyio
import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistency import (
    Closed,
    Conflict,
    Corrupt,
    Found,
    Job,
    KeyRange,
    Misuse,
    Persistency,
    RawKey,
    Reply,
    key,
)
from persistency.category import Category
from persistency.codec.objects import CBOR, RAW, same, typed
from persistency.codec.values import encode
from persistency.coding import CategoryEntry, CategoryRow
from tests.loops import LOOPS, InLoop, bounded, gather

WAIT = 20.0  # seconds a test waits for what must come
START = 1_700_000_000.0  # the Unix time at which the clock of a test begins
FOLDER = os.environ.get("PERSISTENCY_DATA")
NEEDS_FOLDER = pytest.mark.skipif(FOLDER is None, reason="PERSISTENCY_DATA doesn't name a folder of real records")
T = TypeVar("T")
Ask = Callable[[Callable[[], Reply[Any]]], Any]


class Clock:
    """A clock that stands still until it is told to go on."""

    def __init__(self) -> None:
        self.now = START

    def __call__(self) -> float:
        return self.now


@dataclass
class User:
    name: str
    age: int = 0


class Struct(msgspec.Struct):
    name: str


class Model(pydantic.BaseModel):
    name: str


class Upper:
    """A codec of a program's own: text in capitals. It fails in its own way."""

    def encode(self, value: str) -> bytes:
        return value.upper().encode("ascii")

    def decode(self, data: bytes) -> str:
        return data.decode("ascii")


@pytest.fixture
def clock() -> Clock:
    """Give a clock."""
    return Clock()


@pytest.fixture(params=["memory", "directory"])
def job(request: pytest.FixtureRequest, tmp_path: Path, clock: Clock) -> Iterator[Job]:
    """Give an empty job over either adapter, on the clock of the test."""
    root = ":memory:" if request.param == "memory" else tmp_path / "root"
    with Persistency(root, clock=clock) as persistency:
        yield persistency.open_job("job")


@pytest.fixture
def plain(job: Job) -> Category[Any]:
    """Give a category of plain values."""
    return Category(job, "plain")


@pytest.fixture(params=["thread", *LOOPS])
def ask(request: pytest.FixtureRequest) -> Ask:
    """Give the ways of getting an answer: waiting in a thread, and awaiting in each event loop."""
    if request.param == "thread":
        return lambda request: request().result(WAIT)
    return partial(LOOPS[request.param], bounded)


def drained(walk: Any) -> list[Any]:
    """Return what a walk gives to `async for`, which is the same in each event loop."""
    found = [run(bounded, gather, walk) for run in LOOPS.values()]
    assert found[1:] == found[:1] * 2
    return found[0]


# -- verbs ------------------------------------------------------------------------------------------------------------


def test_every_verb_speaks_of_values(job: Job, ask: Ask) -> None:
    """S2-34: the verbs of a job, all there, with the category bound and objects for payloads, awaited or waited for."""
    users = Category(job, "users", typed(User))
    ada, eva = User("ada", 36), User("eva")
    assert users.put(("a", 1), ada) is None  # type: ignore[func-returns-value]  # an event answers nothing
    users.put(("a", 2), eva)
    users.put(("b",), eva)
    assert ask(lambda: users.get(("a", 1))) == ada
    assert ask(lambda: users.get(("c",))) is None
    assert ask(lambda: users.get(("c",), eva)) is eva
    assert ask(lambda: users.entry(("a", 1))) == CategoryEntry(key("a", 1), ada, 1, None)
    assert ask(lambda: users.entry(("c",))) is None
    found = ask(lambda: users.get_many([("b",), key("a", 1), ("c",)]))
    assert list(found.items()) == [(key("b"), eva), (key("a", 1), ada)]
    assert type(found) is Found
    assert found["a", 1] == ada
    assert ("c",) not in found
    assert [ask(lambda: users.exists(("b",))), ask(lambda: users.exists(("c",)))] == [True, False]
    assert [ask(users.count), ask(lambda: users.count(KeyRange.prefix(("a",))))] == [3, 2]
    rows = [CategoryRow(key("a", 1), ada), CategoryRow(key("a", 2), eva), CategoryRow(key("b"), eva)]
    assert ask(users.scan) == rows
    assert ask(lambda: users.scan(KeyRange(("a", 2)), limit=1)) == rows[1:2]
    assert ask(lambda: users.scan_prefix(("a",), reverse=True)) == rows[1::-1]
    assert ask(users.snapshot) == [CategoryEntry(*row, version, None) for version, row in enumerate(rows, 1)]
    assert ask(lambda: users.delete_acked(("b",))) is True
    assert ask(lambda: users.delete_acked(("b",))) is False
    users.delete(("a", 1))
    assert ask(lambda: users.delete_prefix_acked(("a",))) == 1
    for number in range(6):
        users.put((number,), eva)
    users.delete_range(KeyRange((0,), (2,)))
    users.delete_prefix((2,))
    assert ask(lambda: users.delete_range_acked(KeyRange((4,)))) == 2
    assert ask(lambda: users.scan()) == [CategoryRow(key(3), eva)]


def test_requests_give_replies_and_categories_are_apart(job: Job) -> None:
    """What a category answers is a `Reply` like the job's; two names are two categories, one name is one."""
    one, other, same_one = Category(job, "one"), Category(job, "other"), Category(job, "one", RAW)
    one.put(("k",), 1)
    other.put(("k",), 2)
    for reply in (
        one.get(("k",)),
        one.scan(),
        one.snapshot(),
        one.compare_and_set(("x",), None, 1),
        one.touch(("x",), 1),
    ):
        assert isinstance(reply, Reply)
        reply.result(WAIT)
    assert (one.get(("k",)).result(WAIT), other.get(("k",)).result(WAIT)) == (1, 2)
    assert same_one.get(("k",)).result(WAIT) == job.get("one", ("k",)).result(WAIT) == encode(1)
    assert (one.name, one.job, one.codec) == ("one", job, CBOR)
    assert repr(one) == f"<Category 'one' of {job!r}, CBOR>"


def test_keys_are_tuples_of_any_text(plain: Category[Any]) -> None:
    """S2-1, S2-2, S2-56: a part may hold anything; the beginning of a stored key is none; parts never run together."""
    keys = [("a",), ("a", "b"), ("a", "b", ""), ("ab",), ("a:b",), ("a::b",), ("", "a"), ("a\0b",), ("é", "☃"), ()]
    for number, k in enumerate(keys):
        plain.put((*k, "end"), number)
    for number, k in enumerate(keys):
        assert plain.get((*k, "end")).result(WAIT) == number
        assert plain.get(k).result(WAIT) is None
    assert plain.count().result(WAIT) == len(keys)


@pytest.mark.parametrize(
    "value", [None, False, 0, 0.0, "", b"", [], {}, {"a": [None, False, {"b": 0}]}, [[1], "x"]], ids=repr
)
def test_any_value_comes_back_and_is_there(plain: Category[Any], value: Any) -> None:
    """S2-3, S2-4, S2-6, DD21: falsy values and a stored `None` are values: present, and not the default."""
    plain.put(("k",), value)
    assert same(plain.get(("k",), "missing").result(WAIT), value)
    assert plain.exists(("k",)).result(WAIT)
    entry = plain.entry(("k",)).result(WAIT)
    assert entry is not None
    assert same(entry.value, value)
    assert list(plain.list()) == [(("k",), value)]


def test_an_upsert_leaves_one_row_and_a_delete_none(plain: Category[Any]) -> None:
    """S2-10, S2-13: the last value put is the one; deleting what isn't there is fine."""
    plain.put(("k",), 1)
    plain.put(("k",), 2)
    assert plain.count().result(WAIT) == 1
    plain.delete(("k",))
    plain.delete(("k",))
    assert (plain.get(("k",)).result(WAIT), plain.count().result(WAIT)) == (None, 0)
    plain.job.flush().result(WAIT)


def test_values_survive_reopening(tmp_path: Path) -> None:
    """DD21: what one process wrote, the next one reads, by the same class or by none."""
    with Persistency(tmp_path) as persistency:
        Category(persistency.open_job("job"), "users", typed(User)).put(("ada",), User("ada", 36))
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("job")
        assert Category(job, "users", typed(User)).get(("ada",)).result(WAIT) == User("ada", 36)
        assert Category(job, "users").get(("ada",)).result(WAIT) == {"name": "ada", "age": 36}


@pytest.mark.parametrize(
    ("codec", "value"),
    [(RAW, b"\0"), (typed(User), User("a")), (typed(Struct), Struct("a")), (typed(Model), Model(name="a"))],
    ids=repr,
)
def test_every_codec_goes_through_every_read(job: Job, codec: Any, value: Any) -> None:
    """S0-93, DD21: bytes, dataclasses, structs and models, each out of a category of its own."""
    category: Category[Any] = Category(job, "values", codec)
    category.put(("k",), value)
    entry = category.entry(("k",)).result(WAIT)
    assert entry is not None
    assert [
        category.get(("k",)).result(WAIT),
        entry.value,
        category.get_many([("k",)]).result(WAIT)["k",],
        category.scan().result(WAIT)[0].value,
        category.snapshot().result(WAIT)[0].value,
        next(iter(category.iterate())).value,
        next(iter(category.list()))[1],
        category.mapping()["k"],
    ] == [value] * 8
    assert category.compare_and_set(("k",), value, None).result(WAIT)


# -- what can't be ----------------------------------------------------------------------------------------------------


def refuses(call: Callable[[], object]) -> bool:
    """Say whether a call is `Misuse`."""
    try:
        call()
    except Misuse:
        return True
    return False


def test_wrong_arguments_raise_at_the_call(plain: Category[Any]) -> None:
    """Nothing is posted, and nothing but `Misuse` is raised."""
    job = plain.job
    users = Category(job, "users", typed(User))
    wrong: list[Callable[[], object]] = [
        lambda: Category("job", "x"),  # type: ignore[arg-type]
        lambda: Category(job, ""),
        lambda: Category(job, "x" * 256),
        lambda: Category(job, 5),  # type: ignore[arg-type]
        lambda: Category(job, "x", User),  # type: ignore[arg-type]
        lambda: Category(job, "x", None),  # type: ignore[arg-type]
        lambda: plain.put("k", 1),  # type: ignore[arg-type]
        lambda: plain.put((object(),), 1),
        lambda: plain.put(("k",), object()),
        lambda: plain.put(("k",), 1, ttl=0),
        lambda: plain.get("k"),  # type: ignore[arg-type]
        lambda: plain.delete_prefix(()),
        lambda: plain.delete_prefix_acked(()),
        lambda: plain.delete_range(KeyRange()),
        lambda: plain.delete_range_acked(KeyRange()),
        lambda: plain.scan(limit=-1),
        lambda: plain.list("k"),  # type: ignore[arg-type]
        lambda: plain.list(page=0),
        lambda: plain.iterate(KeyRange(("a",)), prefix=("b",)),
        lambda: plain.compare_and_set("k", 1, 2),  # type: ignore[arg-type]
        lambda: plain.compare_and_set(("k",), object(), 2),
        lambda: plain.compare_and_set(("k",), 1, object()),
        lambda: plain.compare_and_set(("k",), 1, 2, ttl=0),
        lambda: plain.compare_and_set(("k",), 1, 2, ttl=float("nan")),
        lambda: plain.compare_and_set(("k",), 1, None, ttl=1),
        lambda: plain.compare_and_set(("k",), None, None, ttl=1),
        lambda: plain.increment(("k",), 1.5),  # type: ignore[arg-type]
        lambda: plain.touch(("k",), -1),
        lambda: users.put(("k",), {"name": "ada"}),  # type: ignore[arg-type]
        lambda: users.put(("k",), User(5)),  # type: ignore[arg-type]
        lambda: users.increment(("k",)),
        lambda: Category(job, "x", RAW).increment(("k",)),
        lambda: Category(job, "x", RAW).put(("k",), "text"),  # type: ignore[arg-type]
    ]
    taken = [number for number, call in enumerate(wrong) if not refuses(call)]
    assert taken == []
    assert job.statistics().accepted == 0


def test_a_payload_that_cannot_be_decoded_is_corrupt_and_told_by_name(job: Job) -> None:
    """The reply raises, naming category and key; the rows beside it, and the job, go on."""
    users = Category(job, "users", typed(User))
    users.put(("good",), User("eva"))
    job.put("users", ("odd", 1), b"\xff")
    for reply in (
        users.get(("odd", 1)),
        users.entry(("odd", 1)),
        users.get_many([("good",), ("odd", 1)]),
        users.scan(),
        users.snapshot(),
        users.compare_and_set(("odd", 1), User("x"), User("y")),
    ):
        with pytest.raises(Corrupt, match=r"category 'users', key\('odd', 1\): the value can't be decoded"):
            reply.result(WAIT)
    for walk in (users.list(), users.iterate(), users.mapping().values()):
        with pytest.raises(Corrupt, match=r"'users', key\('odd', 1\)"):
            list(walk)
    job.put("users", ("odd", 1), encode({"name": 5}))
    with pytest.raises(Corrupt, match=r"key\('odd', 1\).*field 'name': str is expected, not int") as error:
        users.get(("odd", 1)).result(WAIT)
    assert "another codec" in error.value.hint
    assert [row.key.parts for row in users.scan(KeyRange((), ("odd",))).result(WAIT)] == [("good",)]
    assert job.flush().result(WAIT) is None


def test_decoding_happens_where_the_answer_is_taken(job: Job) -> None:
    """The worker never decodes for a reader: that costs the one who asked."""
    threads = []

    class Watching:
        def encode(self, value: bytes) -> bytes:
            return value

        def decode(self, data: bytes) -> bytes:
            threads.append(threading.current_thread())
            return data

    category = Category(job, "watched", Watching())
    category.put(("k",), b"v")
    reply = category.get(("k",))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(reply.result, WAIT).result(WAIT) == b"v"
        taker = pool.submit(threading.current_thread).result(WAIT)
    assert reply.result(WAIT) == b"v"
    assert threads == [taker]


def test_a_codec_of_ones_own_may_fail_in_its_own_way(job: Job) -> None:
    """Whatever it raises: `Misuse` at the call, `Corrupt` from the reply, its error as the cause."""
    texts = Category(job, "texts", Upper())
    texts.put(("k",), "abc")
    assert texts.get(("k",)).result(WAIT) == "ABC"
    assert texts.compare_and_set(("k",), "AbC", "x").result(WAIT)
    with pytest.raises(Misuse, match="category 'texts': the value can't be encoded") as wrong:
        texts.put(("k",), "é")
    assert isinstance(wrong.value.__cause__, UnicodeEncodeError)
    job.put("texts", ("k",), b"\xe9")
    with pytest.raises(Corrupt, match="category 'texts'") as corrupt:
        texts.get(("k",)).result(WAIT)
    assert isinstance(corrupt.value.__cause__, UnicodeDecodeError)


def test_a_codec_that_runs_out_of_memory_says_just_that(job: Job) -> None:
    """Neither the value nor the bytes are to blame then."""

    class Hungry:
        def encode(self, value: Any) -> bytes:
            raise MemoryError

        def decode(self, data: bytes) -> Any:
            raise MemoryError

    category = Category(job, "hungry", Hungry())
    job.put("hungry", ("k",), b"")
    with pytest.raises(MemoryError):
        category.put(("k",), 1)
    with pytest.raises(MemoryError):
        category.get(("k",)).result(WAIT)


def test_a_closed_job_closes_its_categories(job: Job) -> None:
    """A category holds nothing of its own."""
    category: Category[Any] = Category(job, "x")
    category.put(("k",), 1)
    job.close()
    for call in (
        lambda: category.put(("k",), 1),
        lambda: category.get(("k",)),
        lambda: category.compare_and_set(("k",), 1, 2),
    ):
        with pytest.raises(Closed):
            call()


# -- time -------------------------------------------------------------------------------------------------------------


def test_a_value_with_a_ttl_ends(plain: Category[Any], clock: Clock) -> None:
    """S2-7, S2-8, S2-12, S2-14: live until the very millisecond, then gone from all reads; a plain put clears a TTL."""
    plain.put(("day",), 1, ttl=timedelta(days=1))
    plain.put(("short",), 2, ttl=1.5)
    plain.put(("kept",), 3, ttl=1.5)
    plain.put(("kept",), 3)
    day = plain.entry(("day",)).result(WAIT)
    assert day is not None
    assert day.expires_ms == (START + 86_400) * 1000
    clock.now = START + 1.499
    assert plain.get(("short",)).result(WAIT) == 2
    clock.now = START + 1.5
    assert plain.get(("short",), "gone").result(WAIT) == "gone"
    assert not plain.exists(("short",)).result(WAIT)
    assert [k for k, _ in plain.list()] == [("day",), ("kept",)]
    assert len(plain.snapshot().result(WAIT)) == plain.count().result(WAIT) == 2
    assert plain.touch(("day",), None).result(WAIT)
    assert not plain.touch(("short",), 5).result(WAIT)
    clock.now = START + 90_000
    assert [k for k, _ in plain.list()] == [("day",), ("kept",)]


def test_a_ttl_of_nothing_is_refused(plain: Category[Any]) -> None:
    """S2-9: a TTL of 0 is a delete in disguise, and `Misuse` here."""
    for ttl in (0, -1, float("inf"), timedelta(0)):
        with pytest.raises(Misuse):
            plain.put(("k",), 1, ttl=ttl)
    assert plain.count().result(WAIT) == 0


# -- compare and set --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["CBOR", "RAW", "typed"])
def test_a_swap_needs_the_value_that_is_there(job: Job, codec: str, ask: Ask) -> None:
    """S2-20 to S2-25: replaced only if equal, created only if absent, deleted only if equal."""
    pick: dict[str, tuple[Any, Any, Any]] = {
        "CBOR": (CBOR, {"n": 1}, {"n": 2}),
        "RAW": (RAW, b"1", b"2"),
        "typed": (typed(User), User("a"), User("b")),
    }
    kind, one, two = pick[codec]
    category: Category[Any] = Category(job, "x", kind)

    def swap(expected: Any, new: Any) -> tuple[bool, Any]:
        swapped = ask(lambda: category.compare_and_set(("k",), expected, new))
        return swapped, ask(lambda: category.get(("k",)))

    assert swap(one, two) == (False, None)
    assert swap(None, None) == (True, None)
    assert swap(None, one) == (True, one)
    assert swap(None, two) == (False, one)
    assert swap(None, None) == (False, one)
    assert swap(two, one) == (False, one)
    assert swap(two, None) == (False, one)
    assert swap(one, two) == (True, two)
    assert swap(one, None) == (False, two)
    assert swap(two, None) == (True, None)
    assert swap(two, None) == (False, None)


@pytest.mark.parametrize(
    ("stored", "expected", "equal"),
    [
        ({"a": 1, "b": {"c": 2, "d": 3}}, {"b": {"d": 3, "c": 2}, "a": 1}, True),
        ((1, 2), [1, 2], True),
        ({1, 2}, {2, 1}, True),
        (1, 1.0, True),
        (float("nan"), float("nan"), True),
        (False, False, True),
        (0, False, False),
        (1, True, False),
        ({"a": True}, {"a": 1}, False),
        ("", b"", False),
        ("", [], False),
        (0, "", False),
        ([1, 2], [2, 1], False),
        ({"a": 1}, {"a": 1, "b": None}, False),
    ],
    ids=repr,
)
def test_values_are_compared_deeply(plain: Category[Any], stored: Any, expected: Any, equal: bool) -> None:
    """S2-6, S2-26: the order of keys doesn't count; what is false is false, not zero."""
    plain.put(("k",), stored)
    assert plain.compare_and_set(("k",), expected, "new").result(WAIT) is equal
    assert same(plain.get(("k",)).result(WAIT), "new" if equal else stored)


def test_an_object_equals_data_of_an_older_class(job: Job) -> None:
    """S2-26: what is compared is what would be read: a field that the data lacks has its default."""
    users = Category(job, "users", typed(User))
    job.put("users", ("k",), encode({"name": "ada", "gone": 1}))
    assert not users.compare_and_set(("k",), User("ada", 1), None).result(WAIT)
    assert users.compare_and_set(("k",), User("ada", 0), User("ada", 1)).result(WAIT)
    assert users.get(("k",)).result(WAIT) == User("ada", 1)


def test_a_stored_none_cannot_be_swapped(plain: Category[Any]) -> None:
    """S2-4: `None` stands for no row in a swap, so one that is stored is neither it nor anything else."""
    plain.put(("k",), None)
    assert not plain.compare_and_set(("k",), None, 1).result(WAIT)
    assert not plain.compare_and_set(("k",), None, None).result(WAIT)
    assert not plain.compare_and_set(("k",), 0, 1).result(WAIT)
    assert plain.get(("k",), "missing").result(WAIT) is None


@pytest.mark.parametrize("codec", [CBOR, RAW], ids=repr)
def test_what_has_ended_is_absent_to_a_swap(job: Job, clock: Clock, codec: Any) -> None:
    """S2-27, S2-28: an expired value isn't there to be expected; a swap sets a TTL, or clears it."""
    category: Category[bytes] = Category(job, "x", codec)
    category.put(("k",), b"old", ttl=1)
    clock.now += 1
    assert not category.compare_and_set(("k",), b"old", b"new").result(WAIT)
    assert category.compare_and_set(("k",), None, b"one", ttl=1).result(WAIT)
    assert category.compare_and_set(("k",), b"one", b"two", ttl=2).result(WAIT)
    entry = category.entry(("k",)).result(WAIT)
    assert entry is not None
    assert entry.expires_ms == round((clock.now + 2) * 1000)
    clock.now += 1.5
    assert category.compare_and_set(("k",), b"two", b"three").result(WAIT)
    clock.now += 1_000
    assert category.get(("k",)).result(WAIT) == b"three"


@pytest.mark.parametrize("ended", [False, True], ids=["missing", "expired"])
def test_of_racing_creators_exactly_one_wins(plain: Category[Any], clock: Clock, ended: bool) -> None:
    """S2-29: sixteen at once, on a key that is missing or has ended."""
    if ended:
        plain.put(("lock",), "old", ttl=1)
        clock.now += 2
    start = threading.Barrier(16)

    def create(number: int) -> bool:
        start.wait(WAIT)
        return plain.compare_and_set(("lock",), None, number).result(WAIT)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(create, range(16)))
    assert won.count(True) == 1
    assert plain.get(("lock",)).result(WAIT) == won.index(True)


def test_racing_swaps_lose_no_update(plain: Category[Any]) -> None:
    """S2-33: a retried swap of a value that isn't its bytes loses nothing: eight threads add 100 each."""
    plain.put(("sum",), {"n": 0, "by": "x"})

    def add(_: int) -> None:
        for _ in range(100):
            while True:
                now = plain.get(("sum",)).result(WAIT)
                if plain.compare_and_set(("sum",), {"by": "x", "n": now["n"]}, {"n": now["n"] + 1, "by": "x"}).result(
                    WAIT
                ):
                    break

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert plain.get(("sum",)).result(WAIT) == {"n": 800, "by": "x"}


def test_a_stale_token_releases_no_lock(plain: Category[Any], clock: Clock) -> None:
    """S2-27, S2-30: whose lock ran out doesn't release the one that was taken since."""
    assert plain.compare_and_set(("lock",), None, "mine", ttl=10).result(WAIT)
    clock.now += 10
    assert plain.compare_and_set(("lock",), None, "theirs", ttl=10).result(WAIT)
    assert not plain.compare_and_set(("lock",), "mine", None).result(WAIT)
    assert plain.get(("lock",)).result(WAIT) == "theirs"


def test_a_swap_that_fails_changes_nothing(job: Job) -> None:
    """S2-31: an error within it is raised to the caller, and everything is as it was, TTL and version too."""
    users = Category(job, "users", typed(User))
    job.put("users", ("k",), b"not a user", ttl=60)
    before = job.entry("users", ("k",)).result(WAIT)
    with pytest.raises(Corrupt):
        users.compare_and_set(("k",), User("a"), User("b")).result(WAIT)
    assert job.entry("users", ("k",)).result(WAIT) == before
    users.put(("k",), User("a"))
    assert users.compare_and_set(("k",), User("a"), User("b")).result(WAIT)


def test_a_nonce_is_taken_once(plain: Category[Any]) -> None:
    """S2-32: of eight that take it, one has it."""
    plain.put(("nonce", "x"), True)
    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: plain.compare_and_set(("nonce", "x"), True, None).result(WAIT), range(8)))
    assert taken.count(True) == 1
    assert not plain.exists(("nonce", "x")).result(WAIT)


def test_increment_counts_a_plain_integer(plain: Category[Any], clock: Clock) -> None:
    """What it stores is what `put` would; a TTL stays; what isn't an integer is a `Conflict`."""
    assert [plain.increment(("n",)).result(WAIT), plain.increment(("n",), 5).result(WAIT)] == [1, 6]
    assert plain.get(("n",)).result(WAIT) == 6
    plain.put(("m",), -3, ttl=5)
    assert plain.increment(("m",), -1).result(WAIT) == -4
    entry = plain.entry(("m",)).result(WAIT)
    assert entry is not None
    assert entry.expires_ms == (START + 5) * 1000
    plain.put(("t",), "text")
    with pytest.raises(Conflict):
        plain.increment(("t",)).result(WAIT)


# -- listing ----------------------------------------------------------------------------------------------------------


def listed(category: Category[Any], prefix: Any = (), **options: Any) -> list[Any]:
    """Return the keys that `list` gives, asked in both ways."""
    pairs = list(category.list(prefix, **options))
    assert drained(category.list(prefix, **options)) == pairs
    return [k for k, _ in pairs]


def test_a_list_gives_decoded_keys_and_values(plain: Category[Any]) -> None:
    """S2-35 to S2-41: by whole parts, the exact key included once and first, everything for no prefix, else nothing."""
    values = {("prefix",): 0, ("prefix", "a"): 1, ("prefix", "b"): 2, ("prefix", "nested", "c"): 3, ("other", "x"): 4}
    values |= {("a",): 5, ("ab",): 6, ("b",): 7, (): 8}
    for k, value in values.items():
        plain.put(k, value)
    assert list(plain.list(("prefix",))) == [(k, v) for k, v in values.items() if k[:1] == ("prefix",)]
    assert listed(plain, key("prefix")) == [("prefix",), ("prefix", "a"), ("prefix", "b"), ("prefix", "nested", "c")]
    assert listed(plain, ("a",)) == [("a",)]
    assert listed(plain, ("c",)) == []
    assert listed(plain, ("prefix", "n")) == []
    assert dict(plain.list()) == dict(plain.list(())) == values
    assert listed(plain) == sorted(values)


LITERAL = [
    "a_b",
    "aXb",
    "A_B",
    "100%",
    "100zz",
    "100",
    'say "x"',
    "say 'x'",
    "back\\slash",
    "back\\",
    "\\",
    "%",
    "_",
    "*",
    "?",
    "[a]",
    "é",
    "É",
    "e\u0301",
    "\0",
    "\uffff",
    "",
]


def test_a_part_is_text_not_a_pattern(plain: Category[Any]) -> None:
    r"""S2-43 to S2-46: `%`, `_`, `\`, quotes, case and NUL mean nothing: each prefix lists itself and its child."""
    for part in LITERAL:
        plain.put(("t", part), part)
        plain.put(("t", part, "child"), part)
    for part in LITERAL:
        assert list(plain.list(("t", part))) == [(("t", part), part), (("t", part, "child"), part)]
    assert plain.delete_prefix_acked(("t", "a_b")).result(WAIT) == 2
    assert plain.delete_prefix_acked(("t", "%")).result(WAIT) == 2
    assert plain.count().result(WAIT) == 2 * len(LITERAL) - 4


def test_a_parent_comes_before_its_children(plain: Category[Any]) -> None:
    """S2-47: in the order of the parts, not of some text of them."""
    keys = [("t",), ("t", "1"), ("t", "10"), ("t", "10", "a"), ("t", "100"), ("t", "2"), ("t", 2), ("t", 10), ("u",)]
    for k in reversed(keys):
        plain.put(k, None)
    assert listed(plain) == keys
    assert listed(plain, reverse=True) == keys[::-1]
    assert listed(plain, ("t", "10")) == [("t", "10"), ("t", "10", "a")]


def test_a_list_leaves_out_what_has_ended(plain: Category[Any], clock: Clock) -> None:
    """S2-42, S2-51: by the clock of the moment a page is read."""
    for number in range(6):
        plain.put(("k", number), number, ttl=number + 1)
    clock.now += 3
    assert listed(plain, ("k",)) == [("k", 3), ("k", 4), ("k", 5)]
    walk = iter(plain.list(("k",), page=1))
    assert next(walk) == (("k", 3), 3)
    clock.now += 2
    assert list(walk) == [(("k", 5), 5)]


def test_a_list_asks_for_a_page_at_a_time(job: Job) -> None:
    """S2-48, S2-49, S2-53: whoever wants ten reads a page, from either end; only what is given is decoded."""
    decoded = count()

    class Counting:
        def encode(self, value: bytes) -> bytes:
            return value

        def decode(self, data: bytes) -> bytes:
            next(decoded)
            return data

    category = Category(job, "many", Counting())
    for number in range(1_000):
        category.put(("t", number), b"%d" % number)
    assert [k for k, _ in islice(category.list(("t",), page=10), 5)] == [("t", number) for number in range(5)]
    assert next(decoded) == 5
    newest = [k for k, _ in islice(category.list(("t",), reverse=True, page=10), 3)]
    assert newest == [("t", 999), ("t", 998), ("t", 997)]
    assert [len(list(category.list(page=page))) for page in (1_000, 999, 7)] == [1_000] * 3
    walk = iter(category.list(page=10))
    assert next(walk)[0] == ("t", 0)
    category.delete_range(KeyRange(("t", 12)))
    assert [k[1] for k, _ in walk] == [*range(1, 12)]  # the rest hadn't been read yet


def test_a_list_can_be_written_to_while_it_is_read(plain: Category[Any]) -> None:
    """S2-50, S2-55: swapping, deleting and adding on the way: what stays is seen once, what is new behind is seen."""
    for number in range(100):
        plain.put(("circuit", number), {"open": number % 2 == 0})
        plain.put(("circuit", number, "detail"), number)
    seen = []
    for k, value in plain.list(("circuit",), page=7):
        if len(k) == 2:
            seen.append(k[1])
            if value["open"]:
                assert plain.compare_and_set(k, {"open": True}, {"open": False}).result(WAIT)
            else:
                plain.delete_prefix(k)
            if k[1] == 50:
                plain.put(("circuit", 1000), {"open": False})
    assert seen == [*range(100), 1000]
    left = dict(plain.list(("circuit",)))
    assert left == {
        k: v for n in range(0, 100, 2) for k, v in ((("circuit", n), {"open": False}), (("circuit", n, "detail"), n))
    }


def test_writing_while_listing_works_under_an_event_loop(plain: Category[Any], in_loop: InLoop) -> None:
    """S2-48, S2-50: an `async for` in one task, swaps in another, both on one loop."""
    for number in range(200):
        plain.put(("k", number), 0)

    async def main() -> list[Any]:
        async def touch_all() -> None:
            for number in range(200):
                assert await plain.compare_and_set(("k", number), 0, 1)

        async with anyio.create_task_group() as group:
            group.start_soon(touch_all)
            return [k async for k, _ in plain.list(("k",), page=9)]

    assert in_loop(bounded, main) == [("k", number) for number in range(200)]
    assert {value for _, value in plain.list()} == {1}


def test_iterate_gives_rows_or_keys(plain: Category[Any]) -> None:
    """The walk of a job, with values: a range or a prefix, both ways, and keys alone without decoding anything."""
    for number in range(10):
        plain.put((number,), number)
    plain.job.put("plain", (10,), b"\xff")
    rows = [CategoryRow(key(number), number) for number in range(2, 5)]
    assert list(plain.iterate(KeyRange((2,), (5,)), page=2)) == rows
    assert drained(plain.iterate(KeyRange((2,), (5,)), reverse=True)) == rows[::-1]
    assert list(plain.iterate(prefix=(3,))) == rows[1:2]
    assert list(plain.iterate(keys_only=True)) == [key(number) for number in range(11)]
    walk = plain.iterate(KeyRange((0,), (3,)))
    assert list(walk) == list(walk)


def test_a_raw_key_is_told_not_decoded(plain: Category[Any]) -> None:
    """A list speaks of tuples; a key of somebody's own encoding is `Misuse` there, and `iterate` gives it."""
    raw = RawKey(b"\xff\x00own")
    plain.put(raw, 1)
    assert plain.get(raw).result(WAIT) == 1
    assert list(plain.iterate()) == [CategoryRow(raw, 1)]
    with pytest.raises(Misuse, match="category 'plain' has a key that isn't a tuple") as error:
        list(plain.list())
    assert "iterate()" in error.value.hint


def test_recent_traces_come_without_reading_all(plain: Category[Any]) -> None:
    """S2-52 to S2-54: spans under (traces, id, span), recent ones under their time: newest first, as many as asked."""
    for number in range(50):
        plain.put(("traces", f"t{number % 5}", number), {"span": number})
        plain.put(("recent", 1_700_000_000 + number, f"t{number % 5}"), None)
    spans = [value["span"] for _, value in plain.list(("traces", "t3"))]
    assert spans == list(range(3, 50, 5))
    recent = [k[2] for k, _ in islice(plain.list(("recent",), reverse=True), 3)]
    assert recent == ["t4", "t3", "t2"]
    assert plain.delete_prefix_acked(("traces", "t3")).result(WAIT) == 10


# -- against a model --------------------------------------------------------------------------------------------------

PARTS = st.sampled_from(["a", "b", "a\0", "%", "", 0, 1, -1, 1.0, True, None, b"a"])
KEYS = st.lists(PARTS, max_size=3).map(tuple)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "x", 1.0]),
    lambda one: st.lists(one, max_size=2) | st.dictionaries(st.sampled_from("xyz"), one, max_size=3),
    max_leaves=6,
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("put"), KEYS, VALUES),
        st.tuples(st.just("delete"), KEYS, st.none()),
        st.tuples(st.just("delete_prefix"), KEYS.filter(bool), st.none()),
        st.tuples(st.just("swap"), KEYS, st.tuples(VALUES, VALUES)),
        st.tuples(st.just("swap_present"), KEYS, VALUES),
        st.tuples(st.just("list"), KEYS, st.integers(1, 3)),
    ),
    max_size=20,
)


def test_random_steps_agree_with_a_dict() -> None:
    """S2-20 to S2-41: puts, deletes, swaps and lists in any order give what a plain dict gives."""
    names = count()
    with Persistency(":memory:") as persistency:
        job = persistency.open_job("job")

        @given(STEPS)
        @settings(deadline=None)
        def run(steps: list[Any]) -> None:
            play(Category(job, f"c{next(names)}"), steps)

        run()


def play(category: Category[Any], steps: list[Any]) -> None:
    """Do the same with a category and with a dict, and compare."""
    model: dict[Any, Any] = {}  # by Key: as keys of a dict, 1 and True would be one
    for verb, k, argument in steps:
        at = key(*k)
        if verb == "put":
            category.put(k, argument)
            model[at] = argument
        elif verb == "delete":
            assert category.delete_acked(k).result(WAIT) == (at in model)
            model.pop(at, None)
        elif verb == "delete_prefix":
            gone = {one for one in model if one.parts[: len(k)] == k and one[: len(at)] == at}
            assert category.delete_prefix_acked(k).result(WAIT) == len(gone)
            model = {one: value for one, value in model.items() if one not in gone}
        elif verb == "list":
            expected = [one for one in sorted(model) if one.parts[: len(k)] == k and one[: len(at)] == at]
            assert [key(*one) for one, _ in category.list(k, page=argument)] == expected
        else:
            expected_value, new = argument if verb == "swap" else (model.get(at), argument)
            there = at not in model if expected_value is None else at in model and same(model[at], expected_value)
            assert category.compare_and_set(k, expected_value, new).result(WAIT) == there
            if there and new is None:
                model.pop(at, None)
            elif there:
                model[at] = new
    stored = list(category.iterate())
    assert [row.key for row in stored] == sorted(model)
    assert all(same(row.value, model[row.key]) for row in stored)


# -- real records -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    package: str
    version: str
    section: str
    architecture: str
    size: int
    depends: list[str]
    tags: list[str]
    seen: int = 0


def real_packages() -> list[dict[str, Any]]:
    """Return the first records of the file."""
    with gzip.open(Path(FOLDER or "") / "debian-packages.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, 5_000)]


def made_packages() -> list[dict[str, Any]]:
    """Make records of the same shape."""
    random = Random(3)
    return [
        {
            "package": f"{random.choice(['lib', 'python3-', 'g++-'])}{number:x}",
            "version": "1.0-1",
            "section": random.choice(["games", "libs", "libdevel", "non-free/libs"]),
            "architecture": random.choice(["all", "amd64"]),
            "size": random.randrange(2**31),
            "sha256": f"{random.getrandbits(256):064x}",
            "depends": [f"libc6 (>= 2.{one})" for one in range(number % 5)],
            "tags": [],
        }
        for number in range(1_000)
    ]


@pytest.mark.parametrize(
    "source", [pytest.param(real_packages, marks=NEEDS_FOLDER), made_packages], ids=["real", "made"]
)
def test_packages_are_kept_as_objects(tmp_path: Path, source: Callable[[], list[dict[str, Any]]]) -> None:
    """Records of packages as a typed category: scanned by section, updated by value, read back after reopening."""
    records = source()
    fields = [name for name in Package.__dataclass_fields__ if name != "seen"]
    packages = [Package(**{name: record[name] for name in fields}) for record in records]
    expected = {key(one.section, one.package): one for one in packages}
    with Persistency(tmp_path) as persistency:
        job = persistency.open_job("debian")
        category = Category(job, "packages", typed(Package))
        for record, one in zip(records, packages, strict=True):
            # Half of them as a newer release might have left them: with fields that the class lacks.
            if one.size % 2:
                category.put((one.section, one.package), one)
            else:
                job.put("packages", (one.section, one.package), encode(record))
        section = packages[0].section
        for row in category.scan_prefix((section,)).result(WAIT):
            assert category.compare_and_set(row.key, row.value, replace(row.value, seen=1)).result(WAIT)
    assert len(expected) > 900
    with Persistency(tmp_path) as persistency:
        category = Category(persistency.open_job("debian"), "packages", typed(Package))
        stored = {key(*k): one for k, one in category.list()}
    assert list(stored) == sorted(expected)
    assert stored == {k: replace(one, seen=int(one.section == section)) for k, one in expected.items()}


@pytest.mark.parametrize(("ttl", "left"), [(30, 20), (10, None), (5, None)])
def test_the_ttl_of_a_swap_counts_from_the_call(
    plain: Category[Any], clock: Clock, ttl: float, left: int | None
) -> None:
    """A swap that waits while its time runs stores what is left of it; what has ended by then was never there."""
    entered, let_go = threading.Event(), threading.Event()

    def hold(_tx: Any) -> None:
        entered.set()
        assert let_go.wait(WAIT)

    plain.put(("k",), {"a": 1})
    plain.job.flush().result()
    with ThreadPoolExecutor(2) as pool:
        held = pool.submit(lambda: plain.job.run(hold).result(WAIT))
        assert entered.wait(WAIT)
        swapped = plain.compare_and_set(("k",), {"a": 1}, 2, ttl=ttl)
        clock.now += 10
        let_go.set()
        held.result(WAIT)
    assert swapped.result(WAIT) is True
    entry = plain.entry(("k",)).result()
    assert (None if entry is None else (entry.value, entry.expires_ms)) == (
        None if left is None else (2, round((clock.now + left) * 1000))
    )
