"""The values of the Django cache: what comes back is what went in, and nothing that was put there is ever executed."""

from __future__ import annotations

import contextlib
import enum
import logging
import pickle
import random
import tracemalloc
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from django.test import override_settings
from django.utils.safestring import SafeString
from hypothesis import given
from hypothesis import strategies as st

from persistency import CBOR, Misuse
from persistency.integrations.django import PersistencyCache, exact, release
from persistency.integrations.django.exact import is_exact
from persistency.integrations.django.places import place_of
from persistency.integrations.django.rows import VALUES, row_key
from persistency.integrations.django.steps import SMALL, Steps, Work, drive
from persistency.integrations.django.values import Values
from tests.test_django import made

SEED = random.SystemRandom().getrandbits(32)
SIGNED = b"\xff\x01"

Pair = namedtuple("Pair", "a b")  # noqa: PYI024  # as users write them


class Number(enum.IntEnum):
    ONE = 1


class Word(str):
    __slots__ = ()


class Table(dict[str, int]):
    pass


executed: list[str] = []


class Evil:
    """What somebody would like to have executed."""

    def __reduce__(self) -> Any:
        return executed.append, ("here",)


def evil() -> bytes:
    """Its pickle."""
    return pickle.dumps(Evil())


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    """Close what a test has left open; nothing was executed."""
    executed.clear()
    yield
    release()
    assert executed == []


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal, with the same types all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(mine, its) and same(one[mine], other[its]) for mine, its in zip(one, other, strict=True)
        )
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, set | frozenset):
        return len(one) == len(other) and all(any(same(mine, its) for its in other) for mine in one)
    if isinstance(one, datetime):
        return repr(one) == repr(other) and type(one.tzinfo) is type(other.tzinfo) and one.fold == other.fold
    if isinstance(one, Decimal | float):
        return repr(one) == repr(other)
    return bool(one == other)


def there_and_back(value: Any) -> tuple[bytes, Any]:
    """The payload of a value, and what comes back."""
    values = Values("job", pickles=True)
    (payload,) = drive(values.encode([("key", value)]))
    (back,) = drive(values.decode([("key", payload)]))
    return payload, back


KEYS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.dates(),
    lambda below: st.tuples(below, below) | st.frozensets(below, max_size=2),
    max_leaves=4,
)
ANY = st.recursive(
    KEYS
    | st.integers(-(2**9000), 2**9000)
    | st.text(st.characters())
    | st.text().map(SafeString)
    | st.uuids()
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.datetimes(timezones=st.sampled_from([None, UTC, timezone(timedelta(hours=1))]))
    | st.binary().map(bytearray)
    | st.just(Number.ONE)
    | st.just(Pair(1, 2)),
    lambda below: (
        st.lists(below, max_size=3)
        | st.tuples(below)
        | st.dictionaries(KEYS, below, max_size=3)
        | st.dictionaries(KEYS, below, max_size=3).map(OrderedDict)
        | st.sets(KEYS, max_size=3)
        | st.tuples(below, below).map(lambda pair: Pair(*pair))
    ),
    max_leaves=12,
)


@given(ANY)
def test_whatever_is_cached_comes_back_equal_and_of_its_type(value: Any) -> None:
    """For any value: in CBOR where that keeps it, and in a pickle else."""
    payload, back = there_and_back(value)
    assert same(back, value), (SEED, payload)
    if payload[:1] != SIGNED[:1]:
        assert is_exact(value)
        assert CBOR.decode(payload) == value


@pytest.mark.parametrize(
    "value",
    [
        None, True, 0, -1, 2**64, 1.5, -0.0, "text", b"bytes", "", [], {}, set(), [1, [2, {"a": {"b": [None]}}]],
        {1: 2, None: 3, (1, ("x",)): 4, frozenset([1]): 5}, {1, "a", (1,)}, date(2026, 1, 1), UUID(int=5),
        Fraction(1, 3), Decimal("1.10"), datetime(2026, 1, 1, 1, 2, 3, 4, tzinfo=UTC), {UUID(int=5): Decimal(5)},
        {True: 1},
    ],
    ids=lambda value: type(value).__name__,  # the same in every process
)  # fmt: skip
def test_what_cbor_keeps_is_cbor(value: Any) -> None:
    """It can be read in any language, and the engine counts its ints up."""
    payload, back = there_and_back(value)
    assert payload == CBOR.encode(value)
    assert same(back, value)


@pytest.mark.parametrize(
    "value",
    [
        (), (1, 2), [(1,)], {"a": ()}, frozenset(), [frozenset([1])], bytearray(b"x"), SafeString("<b>"),
        [SafeString("<b>")], {SafeString("k"): 1}, {(1, Word("w")): 2}, {Number.ONE}, Number.ONE, Word("w"), Pair(1, 2),
        {"p": Pair(1, 2)}, Table(a=1), OrderedDict(a=1), [OrderedDict()], datetime(2026, 1, 1),
        datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=1))), datetime(2026, 1, 1, tzinfo=UTC, fold=1),
        Decimal("-0"), Decimal("NaN"), Decimal("1e9999"), 2**9000, "\ud800", {Fraction(1, 3): 1}, timedelta(1), 1j,
        int, len, {None: Number.ONE},
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_cbor_would_change_is_a_signed_pickle(value: Any) -> None:
    """A tuple would be a list, a `SafeString` a `str`, another zone an offset, -0 be 0."""
    payload, back = there_and_back(value)
    assert payload[:2] == SIGNED
    assert same(back, value) or repr(back) == repr(value)


def test_values_that_contain_themselves_and_deep_ones_are_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing recurses and nothing is walked over without end."""
    monkeypatch.setattr(exact, "CONTAINERS_MAX", 10_000)
    loop: list[Any] = [1]
    loop.append(loop)
    _, back = there_and_back(loop)
    assert back[1] is back
    deep: Any = []
    for _ in range(100):
        deep = [deep]
    payload, back = there_and_back(deep)
    assert payload[:2] == SIGNED
    assert same(back, deep)
    wide: Any = []
    for _ in range(60):
        wide = [wide, wide]  # 2**60 lists, if each were counted where it is held
    payload, back = there_and_back(wide)
    assert payload[:2] == SIGNED
    assert back[0] is back[1]


def test_a_list_that_holds_itself_often_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept to be looked at is bounded, and not only how often it is looked."""
    monkeypatch.setattr(exact, "CONTAINERS_MAX", 30_000)
    loop: list[Any] = []
    loop.extend([loop] * 10_000)
    tracemalloc.start()
    try:
        assert not is_exact(loop)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000
    finally:
        tracemalloc.stop()


def works(steps: Steps[Any]) -> tuple[int, Any]:
    """How many pieces of work there are among the steps, and what they return."""
    count, answer = 0, None
    try:
        while True:
            step = steps.send(answer)
            count += isinstance(step, Work)
            answer = step.fn(*step.args) if isinstance(step, Work) else step.result()
    except StopIteration as stop:
        return count, stop.value


ROWS: list[Any] = [{"id": number, "tags": ["a", "b"]} for number in range(5_000)]


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        (1, 0), (None, 0), ("x" * 1_000, 0), ({"user": 42, "at": ["a", {"b": b"c"}]}, 0), ("x" * 100_000, 1), (ROWS, 1),
        ([b"x" * 100_000], 1), ({"a": {str(number): number for number in range(20_000)}}, 1), ((1,), 1),
        ((b"x" * 100_000,), 1),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_large_or_pickled_is_work_and_what_is_small_is_not(value: Any, parts: int) -> None:
    """Work is what an event loop has another thread do: to make the payload, and to read it."""
    values = Values("job", pickles=True)
    made_in, (payload,) = works(values.encode([("k", value)]))
    read_in, back = works(values.decode([("k", payload)]))
    assert (made_in, read_in, back) == (parts, parts, [value])
    large = value == (b"x" * 100_000,)
    assert works(values.check("k", payload)) == (int(large), None)
    assert works(values.move("k", payload, "k")) == (int(len(payload) > SMALL), payload)


def test_all_values_of_a_call_are_one_piece_of_work(tmp_path: Path) -> None:
    """However many there are: each one would wait for a thread."""
    site = Site(tmp_path)
    many = {f"k{number}": (number,) for number in range(50)}
    assert works(site.cache._set_many(site.place, many, None, None)) == (1, [])
    assert works(site.cache._get_many(site.place, list(many), None)) == (1, many)
    assert works(site.cache._get_many(site.place, [], None)) == (0, {})


def test_what_cant_be_pickled_raises_what_pickle_raises(tmp_path: Path) -> None:
    """At the call, and the entry stays as it was."""
    cache = made(tmp_path, SHARED=False)
    cache.set("a", 1)
    with pytest.raises((pickle.PicklingError, AttributeError)):
        cache.set("a", lambda: None)
    assert cache.get("a") == 1


# -- attacks ---------------------------------------------------------------------------------------------------------


class Site:
    """A cache, and somebody who can write to its file."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.cache: PersistencyCache = made(root, SHARED=False, **options)
        self.place = place_of(self.cache._settings)
        self.place.open()

    def stored(self, key: str) -> bytes:
        """The payload of a key."""
        found = self.place.run(lambda tx: tx.get(VALUES, row_key(self.cache.make_key(key)))).result()
        assert found is not None
        return found

    def plant(self, key: str, payload: bytes, version: int | None = None) -> None:
        """Put a payload under a key."""
        at = row_key(self.cache.make_key(key, version))
        self.place.run(lambda tx: tx.put(VALUES, at, payload)).result()


def refusals(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What was told of payloads that were refused, since the last time."""
    found = [record for record in caplog.records if getattr(record, "persistency_event", "") == "cache_value_refused"]
    caplog.clear()
    return found


def assert_refused(
    site: Site, key: str, caplog: pytest.LogCaptureFixture, why: str, version: int | None = None
) -> None:
    """A payload is a miss for every verb that reads it, is told each time, and is gone."""
    at = row_key(site.cache.make_key(key, version))
    payload = site.place.run(lambda tx: tx.get(VALUES, at)).result()
    assert payload is not None
    reads = [
        lambda: site.cache.get(key, "miss", version=version) == "miss",
        lambda: site.cache.get_many([key], version=version) == {},
        lambda: _raises_not_found(lambda: site.cache.incr(key, version=version)),
    ]
    if payload[:1] == SIGNED[:1]:  # what isn't a pickle these two don't look into
        reads.append(lambda: not site.cache.has_key(key, version=version))
        reads.append(lambda: not site.cache.touch(key, version=version))
        reads.append(lambda: not site.cache.delete(key, version=version))
        reads.append(lambda: _raises_not_found(lambda: site.cache.incr_version(key, version=version)))
    for read in reads:
        site.plant(key, payload, version)
        assert read()
        (told,) = refusals(caplog)
        assert why in told.getMessage()
        assert site.place.run(lambda tx: tx.get(VALUES, at)).result() is None
    if payload[:1] == SIGNED[:1]:
        site.plant(key, payload, version)
        assert site.cache.add(key, "first", version=version)
        assert len(refusals(caplog)) == 1
        site.cache.delete(key, version=version)
    assert site.cache.add(key, "new", version=version)
    assert site.cache.get(key, version=version) == "new"
    site.cache.delete(key, version=version)


def _raises_not_found(change: Callable[[], Any]) -> bool:
    with pytest.raises(ValueError, match="not found"):
        change()
    return True


def test_an_unsigned_pickle_is_never_loaded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Bare, with a signature of zeros, with one that is cut off, with that of another pickle."""
    site = Site(tmp_path)
    site.cache.set("other", (1, 2))
    signature = site.stored("other")[2:34]
    for payload in (SIGNED + b"\0" * 32 + evil(), SIGNED + signature + evil(), SIGNED + evil(), b"\xff\x02" + evil()):
        site.plant("k", payload)
        assert_refused(site, "k", caplog, "its signature isn't")
    site.plant("k", SIGNED)
    assert_refused(site, "k", caplog, "its signature isn't")
    site.plant("k", evil())
    assert_refused(site, "k", caplog, "it isn't a value")
    site.plant("k", b"")
    assert_refused(site, "k", caplog, "it isn't a value")
    assert executed == []


def test_a_tampered_payload_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Any bit of it that is another one, and any byte more or less."""
    site = Site(tmp_path)
    site.cache.set("k", Pair("a", "b"))
    payload = site.stored("k")
    values = site.cache._values
    name = site.cache.make_key("k")
    assert drive(values.decode([(name, payload)])) == [Pair("a", "b")]
    for at in range(1, len(payload)):
        for bit in range(8):
            changed = bytearray(payload)
            changed[at] ^= 1 << bit
            assert "its signature isn't" in str(values.refusal(name, bytes(changed)))
    for changed_payload in (payload + b"\0", payload[:-1], payload[:2] + payload[3:]):
        site.plant("k", changed_payload)
        assert_refused(site, "k", caplog, "its signature isn't")


def test_a_payload_is_of_no_use_under_another_key(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nor in another version, under another prefix, or in another job."""
    site = Site(tmp_path)
    site.cache.set("mine", Pair("my", "rights"))
    payload = site.stored("mine")
    site.plant("yours", payload)
    assert_refused(site, "yours", caplog, "its signature isn't")
    site.plant("mine", payload, version=2)
    assert_refused(site, "mine", caplog, "its signature isn't", version=2)
    other = Site(tmp_path, JOB="other")
    other.plant("mine", payload)
    assert_refused(other, "mine", caplog, "its signature isn't")
    assert site.cache.get("mine") == Pair("my", "rights")


def test_names_can_t_be_shifted_into_one_another() -> None:
    """The job `a` with the key `bc` and the job `ab` with the key `c` sign differently."""
    (payload,) = drive(Values("a", pickles=True).encode([("bc", (1,))]))
    assert Values("a", pickles=True).refusal("bc", payload) is None
    assert "its signature isn't" in str(Values("ab", pickles=True).refusal("c", payload))


def test_a_file_of_another_secret_key_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A key that was replaced is accepted as long as it is among the fallbacks; new payloads are of the new key."""
    site = Site(tmp_path)
    site.cache.set_many({"plain": [1], "pickled": (1,)})
    with override_settings(SECRET_KEY="another"):
        assert site.cache.get("plain") == [1]
        with override_settings(SECRET_KEY_FALLBACKS=["older", "of the tests"]):
            assert site.cache.get("pickled") == (1,)
            site.cache.set("newer", (2,))
        assert site.cache.get("newer") == (2,)
        assert_refused(site, "pickled", caplog, "its signature isn't")
    assert site.cache.get("newer") is None


def test_a_cache_without_pickles_loads_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not even one that was rightly signed when they were allowed."""
    Site(tmp_path).cache.set("k", (1,))
    assert_refused(Site(tmp_path, PICKLE=False), "k", caplog, '"PICKLE": False')


def test_a_class_that_has_moved_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """After a release that has renamed it: told with what `pickle` says, and removed."""
    site = Site(tmp_path)
    site.cache.set("k", Pair(1, 2))
    globals()["Pair"], kept = None, Pair
    try:
        assert site.cache.get("k", "miss") == "miss"
    finally:
        globals()["Pair"] = kept
    (told,) = refusals(caplog)
    assert "its pickle can't be loaded" in told.getMessage()
    assert not site.cache.has_key("k")


def test_random_bytes_are_a_value_or_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever stands in the file, nothing else is raised, and nothing executed."""
    rng = random.Random(SEED)
    site = Site(tmp_path)
    for _ in range(300):
        begin = rng.choice([b"", SIGNED, b"\xff", b"\x80", b"\xc2", b"\xd9\x01\x02"])
        site.plant("k", begin + rng.randbytes(rng.randrange(60)) + rng.choice([b"", evil()]))
        site.cache.get("k")
        site.plant("k", begin + rng.randbytes(rng.randrange(20)))
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            site.cache.incr("k")
    assert refusals(caplog)
    assert executed == [], SEED


def test_a_value_that_was_written_over_meanwhile_is_not_removed(tmp_path: Path) -> None:
    """Only what was found wanting goes."""
    site = Site(tmp_path)
    site.plant("k", b"\xff")
    steps = site.cache._get(site.place, "k", "miss", None)
    reply = next(steps)
    asked = reply.result()  # type: ignore[union-attr]  # it waits for a read
    site.cache.set("k", "new")
    work = steps.send(asked)
    assert isinstance(work, Work)  # whether it is signed
    with pytest.raises(StopIteration) as stop:
        steps.send(work.fn(*work.args))
    assert stop.value.value == "miss"
    assert site.cache.get("k") == "new"  # asked for after the removal


def test_pickles_are_refused_as_misuse() -> None:
    """It is an error of the caller's, as other wrong arguments are."""
    with pytest.raises(Misuse):
        drive(Values("job", pickles=False).encode([("k", (1,))]))
