"""The Django cache: every verb in both forms, time, limits, options, and what Django itself does with a cache."""

from __future__ import annotations

import ast
import asyncio
import random
import re
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import django
import pytest
from django.conf import settings
from django.core.cache import CacheKeyWarning, caches
from django.core.cache.backends import base, locmem
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import request_finished
from django.http import HttpResponse
from django.template import engines
from django.test import RequestFactory, override_settings
from django.utils.safestring import SafeString, mark_safe
from django.views.decorators.cache import cache_page

from persistency import Closed, Misuse, Persistency, Poisoned
from persistency.integrations.django import PersistencyCache, release
from persistency.integrations.django.options import checked
from persistency.integrations.django.places import Stale, place_of
from persistency.integrations.django.rows import AGES, VALUES, row_key
from persistency.testing import ManualClock

SEED = random.SystemRandom().getrandbits(32)
OURS = "persistency.integrations.django.PersistencyCache"

if not settings.configured:
    settings.configure(
        SECRET_KEY="of the tests",
        LOGGING_CONFIG=None,
        USE_TZ=True,
        ALLOWED_HOSTS=["testserver"],
        ROOT_URLCONF="tests.test_django",
        SESSION_ENGINE="django.contrib.sessions.backends.cache",
        TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates"}],
    )
    django.setup()

urlpatterns: list[Any] = []


def made(location: Any, *, params: dict[str, Any] | None = None, **options: Any) -> PersistencyCache:
    """Make a cache as Django does."""
    return PersistencyCache(location, {**(params or {}), "OPTIONS": options})


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    """Close what a test has left open."""
    yield
    release()


@pytest.fixture(params=["shared", "alone", "memory"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., PersistencyCache]:
    """Give a function that makes caches of one place, of each kind."""
    location = ":memory:" if request.param == "memory" else tmp_path
    kind = {"SHARED": False} if request.param == "alone" else {}
    return lambda **more: made(location, **kind, **more)


def rows_of(cache: PersistencyCache) -> tuple[set[int], set[int], int]:
    """The versions of the values, the rows of age, and how many entries there are."""

    def look(tx: Any) -> tuple[set[int], set[int], int]:
        ages = {row.key.parts[0] for row in tx.scan(AGES)}
        return {entry.version for entry in tx.snapshot(VALUES)}, ages, tx.count(VALUES)

    place = place_of(cache._settings)
    place.open()
    return place.run(look).result()


# -- every verb ------------------------------------------------------------------------------------------------------


def test_every_verb_does_what_django_says(make: Callable[..., PersistencyCache]) -> None:
    """Each one, once as it goes well and once as it doesn't."""
    cache = make()
    assert cache.get("a") is None
    assert cache.get("a", "other") == "other"
    cache.set("a", 1)
    assert (cache.get("a"), "a" in cache, cache.has_key("a"), "b" in cache) == (1, True, True, False)
    assert (cache.add("a", 2), cache.add("b", 2), cache.get("b")) == (False, True, 2)
    assert cache.set_many({"c": 3, "d": None}) == []
    assert cache.get_many(iter(["d", "a", "zz", "c"])) == {"d": None, "a": 1, "c": 3}
    assert (cache.incr("a", 5), cache.decr("a"), cache.incr("a", -10)) == (6, 5, -5)
    with pytest.raises(ValueError, match="'zz' not found"):
        cache.incr("zz")
    assert (cache.delete("a"), cache.delete("a")) == (True, False)
    cache.delete_many(["b", "zz"])
    cache.delete_many([])
    assert cache.get_many(["a", "b", "c"]) == {"c": 3}
    assert (cache.touch("c", 10), cache.touch("a")) == (True, False)
    assert (cache.incr_version("c"), cache.get("c"), cache.get("c", version=2)) == (2, None, 3)
    assert (cache.decr_version("c", version=2), cache.get("c")) == (1, 3)
    with pytest.raises(ValueError, match="'zz' not found"):
        cache.incr_version("zz")
    assert cache.incr_version("c", 0) == 1
    assert cache.get("c") == 3
    assert (cache.get_or_set("e", lambda: 5), cache.get_or_set("e", 6)) == (5, 5)
    cache.close()
    assert cache.get("e") == 5
    cache.clear()
    assert cache.get_many(["c", "d", "e"]) == {}
    assert rows_of(cache) == (set(), set(), 0)


def test_every_verb_has_its_async_form(make: Callable[..., PersistencyCache]) -> None:
    """The same, awaited; none of them is Django's default, which would take a thread."""

    async def play() -> None:
        cache = make()
        assert await cache.aget("a", "other") == "other"
        await cache.aset("a", 1)
        assert (await cache.aget("a"), await cache.ahas_key("a"), await cache.ahas_key("b")) == (1, True, False)
        assert (await cache.aadd("a", 2), await cache.aadd("b", (2,))) == (False, True)
        assert await cache.aset_many({"c": 3, "d": None}) == []
        assert await cache.aget_many(["d", "b", "zz"]) == {"d": None, "b": (2,)}
        assert (await cache.aincr("a", 5), await cache.adecr("a")) == (6, 5)
        with pytest.raises(ValueError, match="not found"):
            await cache.aincr("zz")
        assert (await cache.adelete("a"), await cache.adelete("a")) == (True, False)
        await cache.adelete_many(["b"])
        assert (await cache.atouch("c", 10), await cache.atouch("b")) == (True, False)
        assert (await cache.aincr_version("c"), await cache.aget("c", version=2)) == (2, 3)
        assert await cache.adecr_version("c", version=2) == 1
        assert (await cache.aget_or_set("e", lambda: 5), await cache.aget_or_set("e", 6)) == (5, 5)
        await asyncio.gather(*(cache.aincr("e") for _ in range(50)))
        assert await cache.aget("e") == 55
        await cache.aclose()
        await cache.aclear()
        assert await cache.aget("e") is None

    asyncio.run(play())
    inherited = {"adecr", "adecr_version", "aget_or_set"}  # made of others
    forms = {name for name in vars(base.BaseCache) if name.startswith("a") and name[1:] in vars(base.BaseCache)}
    assert {"aget", "aset", "aclear"} < forms
    assert forms - inherited <= vars(PersistencyCache).keys()


def test_integers_are_counted_by_the_engine_and_keep_their_end(tmp_path: Path) -> None:
    """What isn't an int, or is counted up by none, is added to as Python adds; an int too long for CBOR is pickled."""
    clock = ManualClock()
    cache = made(tmp_path, SHARED=False, CLOCK=clock)
    for value, delta in ((1, 2), (True, 1), (1.5, 1), (1, 1.5), ("ab", "c"), (2**9000, 1), (1, 2**9000), ((1,), (2,))):
        cache.set("n", value, 60)
        clock.advance(59)
        assert cache.incr("n", delta) == value + delta
        assert cache.get("n") == value + delta
        assert type(cache.get("n")) is type(value + delta)
        clock.advance(1)
        assert cache.get("n") is None
    cache.set("n", None)
    with pytest.raises(TypeError):
        cache.incr("n")
    cache.set("n", 1, None)
    assert cache.incr("n") == 2
    assert rows_of(cache)[0] == rows_of(cache)[1]


@pytest.mark.parametrize("key", ["a" * 20_000, "\ud800", "", "key with spaces and 清", "a\0b"])
def test_any_text_is_a_key(tmp_path: Path, key: str) -> None:
    """Django warns where memcached couldn't, and it works all the same."""
    cache = made(tmp_path, SHARED=False, params={"KEY_FUNCTION": lambda key, _prefix, version: f"{key}{version}"})
    cache.validate_key = lambda _key: None
    for value in (1, (1,)):
        cache.set(key, value)
        cache.set(key, 2, version=2)
        assert cache.get(key) == value
        assert cache.get_many([key, "b"]) == {key: value}
        assert cache.incr_version(key) == 2
        assert (cache.get(key), cache.get(key, version=2)) == (None, value)
    assert row_key("a" * 20_000) != row_key("a" * 20_001)


def test_keys_that_memcached_refuses_are_warned_of(tmp_path: Path) -> None:
    """By each verb, as by Django's own backends, before anything is done."""
    cache = made(tmp_path)
    for verb, given in (("get", "a b"), ("has_key", "a b"), ("get_many", ["c", "a b"]), ("delete", "a b")):
        with pytest.warns(CacheKeyWarning, match="a b"):
            getattr(cache, verb)(given)
    with pytest.warns(CacheKeyWarning, match="longer than 250"):
        cache.set("a" * 250, 1)


def test_prefixes_and_versions_are_apart_and_clear_is_of_all(tmp_path: Path) -> None:
    """Aliases of one job see each other's entries where their keys are the same, and only there."""
    one, two = made(tmp_path), made(tmp_path, params={"KEY_PREFIX": "two", "VERSION": 7})
    one.set("k", 1)
    two.set("k", 2)
    assert (one.get("k"), two.get("k"), two.get("k", version=1)) == (1, 2, None)
    other = made(tmp_path, JOB="other")
    other.set("k", 3)
    two.clear()
    assert (one.get("k"), two.get("k"), other.get("k")) == (None, None, 3)


# -- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [True, False])
def test_time_is_exact_to_the_millisecond(tmp_path: Path, shared: bool) -> None:
    """An entry is there until its moment, for every verb; the engine gives its room to others."""
    clock = ManualClock()
    cache = made(tmp_path, SHARED=shared, CLOCK=clock, params={"TIMEOUT": 2})
    cache.set("default", 1)
    cache.set("short", 1, 0.25)
    cache.set("ever", 1, None)
    cache.set("touched", 1, 0.25)
    assert cache.touch("touched", 1)
    clock.advance(0.249)
    assert cache.get_many(["default", "short", "ever", "touched"]).keys() == {"default", "short", "ever", "touched"}
    clock.advance(0.001)
    assert cache.get("short") is None
    assert not cache.has_key("short")
    assert not cache.touch("short")
    assert not cache.delete("short")
    with pytest.raises(ValueError, match="not found"):
        cache.incr("short")
    assert cache.add("short", 2, 0.1)
    clock.advance(0.749)
    assert (cache.get("touched"), cache.get("short")) == (1, None)
    clock.advance(0.001)
    assert (cache.get("touched"), cache.get("default")) == (None, 1)
    clock.advance(1)
    assert (cache.get("default"), cache.get("ever")) == (None, 1)
    assert rows_of(cache)[0] == rows_of(cache)[1]


@pytest.mark.parametrize("timeout", [0, -1, -0.5])
def test_a_timeout_of_nothing_is_over_at_once(tmp_path: Path, timeout: float) -> None:
    """As in Django: it is as if it had been set, and nothing is there, nor is what was there before."""
    cache = made(tmp_path, SHARED=False)
    cache.set("a", 1)
    cache.set("a", 2, timeout)
    assert cache.get("a") is None
    assert cache.add("a", 3, timeout)
    assert not cache.has_key("a")
    cache.set("a", 4)
    assert not cache.add("a", 5, timeout)
    assert cache.get("a") == 4
    assert cache.touch("a", timeout)
    assert cache.get("a") is None
    assert cache.set_many({"a": 1, "b": 2}, timeout) == []
    assert cache.get_many(["a", "b"]) == {}
    assert rows_of(cache) == (set(), set(), 0)


def test_a_timeout_beyond_all_time_is_no_end(tmp_path: Path) -> None:
    """However large, and also as the cache's own."""
    cache = made(tmp_path, SHARED=False, params={"TIMEOUT": None})
    cache.set("a", 1)
    cache.set("b", 1, 10**30)
    cache.set("c", 1, float("inf"))
    assert cache.get_many(["a", "b", "c"]) == {"a": 1, "b": 1, "c": 1}
    assert made(tmp_path, SHARED=False, params={"TIMEOUT": 0})._ttl(base.DEFAULT_TIMEOUT) == 0


# -- beside Django's own backend -------------------------------------------------------------------------------------


def moves(rng: random.Random, clock: ManualClock) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
    """One random call."""
    key, version = rng.choice("abcde"), rng.choice([None, 1, 2])
    value = rng.choice([0, 1, -7, True, None, 1.5, "x", SafeString("s"), [1, (2,)], (1, 2), {"k": b"v"}, {1, 2}])
    timeout = {} if rng.random() < 0.3 else {"timeout": rng.choice([None, 0, -1, 0.5, 1, 2, 100])}
    verb = rng.choice(
        [
            "get",
            "set",
            "add",
            "touch",
            "delete",
            "get_many",
            "set_many",
            "delete_many",
            "has_key",
            "incr",
            "decr",
            "incr_version",
            "get_or_set",
        ]
    )
    if rng.random() < 0.02:
        return "clear", (), {}
    many = rng.sample("abcde", rng.randrange(4))
    arguments: dict[str, tuple[Any, ...]] = {
        "set": (key, value),
        "add": (key, value),
        "get_or_set": (key, value),
        "get_many": (many,),
        "delete_many": (many,),
        "set_many": (dict.fromkeys(many, value),),
        "incr": (key, rng.choice([1, 5, -3, 0.5])),
        "decr": (key,),
    }
    more = timeout if verb in {"set", "add", "touch", "set_many", "get_or_set"} else {}
    return verb, arguments.get(verb, (key,)), {**more, "version": version}


def outcome(cache: Any, verb: str, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What a call returns, with its types, or raises."""
    try:
        found = getattr(cache, verb)(*given, **named)
    except (ValueError, TypeError) as error:
        return type(error)
    members = found.values() if isinstance(found, dict) else [found]
    return found, [type(one) for one in members]


class Oracle(locmem.LocMemCache):  # type: ignore[misc]  # Django has no types
    """Django's own, but that what has ended isn't there to be deleted: its own says that it was."""

    def _delete(self, key: str) -> bool:
        expired = self._has_expired(key)
        return bool(super()._delete(key)) and not expired


@pytest.mark.parametrize("shared", [True, False])
def test_it_does_what_locmem_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """2,000 random calls give the same results and types as Django's own backend in memory, time passing meanwhile."""
    rng, clock = random.Random(SEED), ManualClock()
    for module in (base, locmem):
        monkeypatch.setattr(module, "time", SimpleNamespace(time=clock))
    oracle = Oracle(str(tmp_path), {"TIMEOUT": 3})
    cache = made(tmp_path, SHARED=shared, CLOCK=clock, params={"TIMEOUT": 3})
    calls = 2_000 if not shared else 500
    for number in range(calls):
        verb, given, named = moves(rng, clock)
        wanted = outcome(oracle, verb, given, named)
        assert outcome(cache, verb, given, named) == wanted, (SEED, number, verb, given, named)
        if rng.random() < 0.2:
            clock.advance(rng.choice([0.25, 0.5, 1]))
    values, ages, _ = rows_of(cache)
    assert values == ages


# -- limits ----------------------------------------------------------------------------------------------------------


class Ordered:
    """What culling has to do: entries in the order in which they were written, each with its end."""

    def __init__(self, clock: ManualClock, entries: int, frequency: int) -> None:
        self.clock, self.entries, self.frequency = clock, entries, frequency
        self.kept: dict[str, float] = {}

    def set(self, key: str, timeout: float) -> None:
        self.kept = {one: end for one, end in self.kept.items() if end > self.clock.now}
        if self.kept.pop(key, None) is None and len(self.kept) >= self.entries:
            count = len(self.kept)
            part = count // self.frequency if self.frequency else count
            for one in list(self.kept)[: max(part, count - self.entries + 1)]:
                del self.kept[one]
        self.kept[key] = self.clock.now + timeout

    def live(self) -> set[str]:
        return {one for one, end in self.kept.items() if end > self.clock.now}


@pytest.mark.parametrize(("entries", "frequency"), [(8, 3), (8, 0), (8, 1), (8, 100), (1, 3), (2, 3)])
def test_the_oldest_are_culled_and_never_one_too_many(tmp_path: Path, entries: int, frequency: int) -> None:
    """A model of it, with seeded random calls: at every moment the very entries that are to be there are."""
    rng, clock = random.Random(SEED), ManualClock()
    model = Ordered(clock, entries, frequency)
    cache = made(tmp_path, SHARED=False, CLOCK=clock, MAX_ENTRIES=entries, CULL_FREQUENCY=frequency)
    names = [f"k{number}" for number in range(2 * entries + 3)]
    for number in range(250):
        name, ttl, dice = rng.choice(names), rng.choice([1, 5, 1000]), rng.random()
        if dice < 0.5:
            cache.set(name, 1, ttl)
            model.set(name, ttl)
        elif dice < 0.7:
            some = rng.sample(names, min(4, len(names)))
            cache.set_many(dict.fromkeys(some, 1), ttl)
            for one in some:
                model.set(one, ttl)
        elif dice < 0.8:
            cache.delete(name)
            model.kept.pop(name, None)
        elif dice < 0.9:
            if name in model.live():  # it gets younger, and keeps its end
                assert cache.incr(name, rng.choice([1, 0.5])) > 1
                model.kept[name] = model.kept.pop(name)
        elif cache.touch(name, ttl):
            model.kept[name] = clock.now + ttl
        if rng.random() < 0.2:
            clock.advance(1)
        assert set(cache.get_many(names)) == model.live(), (SEED, number)
        values, ages, count = rows_of(cache)
        assert values == ages
        assert count <= entries


def test_a_count_that_was_undone_misleads_nobody(tmp_path: Path) -> None:
    """A transaction that fails after it has counted leaves a count that is never too low."""
    cache = made(tmp_path, SHARED=False, MAX_ENTRIES=5)
    place = place_of(cache._settings)
    place.open()

    def fail(tx: Any) -> None:
        for number in range(20):
            tx.put("else", (number,), b"")
        assert place.census.count(tx) == 0
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        place.run(fail).result()
    for number in range(30):
        cache.set(f"k{number}", 1)
        assert rows_of(cache)[2] <= 5


def test_max_entries_that_came_down_holds_after_the_next_write(tmp_path: Path) -> None:
    """And `None` is no limit."""
    made(tmp_path, MAX_ENTRIES=None).set_many({f"k{number}": number for number in range(1_500)})
    cache = made(tmp_path, MAX_ENTRIES=10)
    assert rows_of(cache)[2] == 1_500
    cache.set("k0", "again")  # no new one
    assert rows_of(cache)[2] == 1_500
    cache.set("new", 1)
    assert rows_of(cache)[2] == 10
    assert cache.get_many(["k0", "new"]) == {"k0": "again", "new": 1}


@pytest.mark.parametrize("frequency", [3, 0, 50])
def test_max_bytes_culls_the_oldest(tmp_path: Path, frequency: int) -> None:
    """What was written last is there, and the bytes are within their limit, however sizes vary."""
    rng = random.Random(SEED)
    cache = made(tmp_path, SHARED=False, MAX_BYTES=2_000, MAX_ENTRIES=None, CULL_FREQUENCY=frequency)
    place = place_of(cache._settings)
    for number in range(150):
        key, value = f"k{rng.randrange(12)}", "x" * rng.choice([1, 100, 900, 1_500])
        dice = rng.random()
        if dice < 0.1:
            cache.set("n", 23)
            assert cache.incr("n", 10**12) == 23 + 10**12
        else:
            assert cache.set_many({key: value, "last": number}) == []
            assert cache.get("last") == number, (SEED, number)
            assert frequency == 0 or len(value) > 1_000 or cache.get(key) == value, (SEED, number)
        assert place.run(lambda tx: tx.storage_used()).result() <= 2_000
        values, ages, _ = rows_of(cache)
        assert values == ages


def test_what_is_larger_than_max_bytes_is_not_cached_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nor is what was there before, which would be out of date; the others stay."""
    cache = made(tmp_path, MAX_BYTES=500)
    cache.set_many({"a": 1, "b": 2})
    cache.set("a", "x" * 1_000)
    assert cache.get_many(["a", "b"]) == {"b": 2}
    assert cache.set_many({"c": 3, "a": "x" * 1_000}) == ["a"]
    assert not cache.add("a", "x" * 1_000)
    assert cache.get_many(["a", "b", "c"]) == {"b": 2, "c": 3}
    told = [record for record in caplog.records if record.name == "persistency.django"]
    assert [record.persistency_event for record in told] == ["cache_value_too_large"] * 3  # type: ignore[attr-defined]
    assert "MAX_BYTES is 500" in told[0].getMessage()


@pytest.mark.parametrize(("value", "delta", "kept"), [("a", "b" * 50, False), (1, 10**100, False), (1, 2, True)])
def test_a_sum_that_has_no_room_is_told(value: Any, delta: Any, kept: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It is returned, isn't there, and the log says so; of one that has room nothing is said."""
    cache = made(":memory:", MAX_BYTES=40)
    cache.set("n", value)
    assert cache.incr("n", delta) == value + delta
    assert cache.get("n") == (value + delta if kept else None)
    told = [getattr(record, "persistency_event", "") for record in caplog.records]
    assert told == ([] if kept else ["cache_value_too_large"])


# -- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("location", "options", "told"),
    [
        ("", {}, "LOCATION must be a directory"),
        (None, {}, "LOCATION"),
        (b"x", {}, "LOCATION"),
        ("x", {"MAX_ENTRYS": 5}, "no 'MAX_ENTRYS'; there are JOB, SHARED"),
        ("x", {"JOB": ""}, "JOB must be the id of a job"),
        ("x", {"SHARED": 1}, "SHARED must be True or False, not 1"),
        ("x", {"PICKLE": "no"}, "PICKLE must be True or False"),
        ("x", {"MAX_ENTRIES": 0}, "MAX_ENTRIES must be an int of at least 1, or None"),
        ("x", {"MAX_ENTRIES": "many"}, "MAX_ENTRIES"),
        ("x", {"CULL_FREQUENCY": -1}, "CULL_FREQUENCY must be an int of at least 0, not -1"),
        ("x", {"CULL_FREQUENCY": None}, "CULL_FREQUENCY"),
        ("x", {"MAX_BYTES": True}, "MAX_BYTES"),
        ("x", {"KEEP": -1}, "KEEP must be a number of seconds"),
        ("x", {"WAIT": float("inf")}, "WAIT"),
        ("x", {"DURABILITY": "much"}, "DURABILITY must be 'process' or 'power'"),
        ("x", {"CLOCK": 5}, "CLOCK must be a function like time.time"),
        ("x", {"CLOCK": "no.such"}, "CLOCK can't be imported"),
        (":memory:", {"SHARED": True}, "of one process alone"),
        ("x", {"CLOCK": "os.getcwd"}, "CLOCK must be a function like time.time, which returns seconds"),
        ("x", {"CLOCK": "json.loads"}, "CLOCK can't be read: TypeError"),
        ("x", {"JOB": "x" * 300}, "JOB 'xxx.*' can't be: job_id is too long"),
        ("x", {"JOB": "\ud800"}, "JOB .* can't be"),
        ("a\0b", {}, "LOCATION must be a directory"),
        ("redis://127.0.0.1:6379/1", {}, "LOCATION must be a directory, or ':memory:', not 'redis:"),
        (__file__, {}, "a cache in LOCATION .* can't be: .* is a file"),
        (Path(__file__) / "x", {}, "LOCATION .* which is a file"),
        ("x", ["JOB"], "OPTIONS must be a dict, not list"),
        ("x", None, "OPTIONS must be a dict, not NoneType"),
    ],
)
def test_a_wrong_option_is_told_when_the_cache_is_made(location: Any, options: Any, told: str) -> None:
    """With its name, and what it has to be."""
    with pytest.raises(ImproperlyConfigured, match=told):
        checked(location, options)
    with pytest.raises(ImproperlyConfigured, match=told):
        PersistencyCache(location, {"OPTIONS": options})


def test_what_is_in_force_without_options_is_what_the_page_and_the_class_say(tmp_path: Path) -> None:
    """Each row of the page's table, and each number of the docstring."""
    cache = made(tmp_path)
    found = cache._settings
    in_force = {
        "JOB": found.job_id,
        "SHARED": found.shared,
        "PICKLE": checked(tmp_path, {})[1],
        "MAX_ENTRIES": cache._max_entries,
        "CULL_FREQUENCY": cache._cull_frequency,
        "MAX_BYTES": found.max_bytes,
        "KEEP": found.keep,
        "WAIT": found.wait,
        "DURABILITY": found.durability,
        "CLOCK": found.clock,
    }
    page = (Path(__file__).parent.parent / "docs" / "adapters" / "django.md").read_text()
    told = dict(re.findall(r"^\| `([A-Z_]+)` \|.*\| ([^|]+) \|$", page, re.MULTILINE))
    none = {"any number": None, "the system's": None}
    of_page = {
        name: none[cell]
        if cell in none
        else ast.literal_eval(re.split("[ ,]", cell.replace("`", ""), maxsplit=1)[0])
        if "`" not in cell or cell.startswith(("`T", '`"'))
        else cell
        for name, cell in told.items()
    }
    assert of_page == in_force
    seconds = dict(re.findall(r"^ *(KEEP|WAIT): .*?\(([\d.]+)\)", str(PersistencyCache.__doc__), re.MULTILINE))
    assert {name: float(text) for name, text in seconds.items()} == {"KEEP": found.keep, "WAIT": found.wait}


def test_two_caches_of_one_job_agree_on_how_it_is_opened(tmp_path: Path) -> None:
    """What is a cache's own may differ; what is the job's may not."""
    made(tmp_path, CLOCK="time.time").set("a", 1)
    assert made(tmp_path, CLOCK="time.time", MAX_ENTRIES=5, PICKLE=False).get("a") == 1
    with pytest.raises(ImproperlyConfigured, match="differ in CLOCK, MAX_BYTES"):
        made(tmp_path, MAX_BYTES=10).get("a")


# -- what is open ----------------------------------------------------------------------------------------------------


def test_nothing_is_opened_before_it_is_used(tmp_path: Path) -> None:
    """Neither by making a cache nor by asking an empty one; the first write makes the root."""
    cache = made(tmp_path / "root")
    assert cache.get("a") is None
    assert cache.get_many(["a"]) == {}
    assert not cache.has_key("a")
    assert not (tmp_path / "root").exists()
    cache.set("a", 1)
    assert (tmp_path / "root" / "cache.db").exists()
    assert cache.get("a") == 1


def test_threads_share_what_is_open_and_requests_leave_it_open(tmp_path: Path) -> None:
    """Django makes an object for each thread, and closes it after each request."""
    with override_settings(CACHES={"default": {"BACKEND": OURS, "LOCATION": tmp_path, "OPTIONS": {"SHARED": False}}}):
        objects, found = [], []

        def serve() -> None:
            objects.append(caches["default"])
            found.append(caches["default"].incr("visits"))
            request_finished.send(None)

        caches["default"].set("visits", 0)
        job = place_of(caches["default"]._settings)._job  # type: ignore[attr-defined]  # what must stay as it is
        threads = [threading.Thread(target=serve) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(one) for one in objects}) == 5
        assert sorted(found) == [1, 2, 3, 4, 5]
        assert place_of(caches["default"]._settings)._job is job  # type: ignore[attr-defined]
        assert not job.closed
    assert job.closed  # by the end of these settings


@pytest.mark.parametrize("shared", [True, False])
def test_32_threads_count_without_losing_one(tmp_path: Path, shared: bool) -> None:
    """Neither of an int, which the engine counts, nor of a float, which is swapped."""
    cache = made(tmp_path, SHARED=shared)
    cache.set_many({"int": 0, "float": 0.0})

    def count() -> None:
        for _ in range(5):
            cache.incr("int")
            cache.incr("float", 0.5)

    threads = [threading.Thread(target=count) for _ in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.get_many(["int", "float"]) == {"int": 160, "float": 80.0}


def test_a_file_that_was_removed_is_a_new_cache(tmp_path: Path) -> None:
    """By whoever tidied up: the reader finds another file, or none, and goes on."""
    cache = made(tmp_path, KEEP=0)
    cache.set("a", 1)
    assert cache.get("a") == 1
    release()  # whoever has it open finds out by itself; here the file goes between two requests
    assert cache.get("a") == 1
    for path in tmp_path.iterdir():
        path.unlink()
    assert cache.get("a") is None
    cache.set("a", 2)
    assert cache.get("a") == 2


def test_a_job_that_was_poisoned_is_opened_anew(tmp_path: Path) -> None:
    """Alone: its file was removed under it. A read is tried again; who was about to write is told, once."""
    cache = made(tmp_path, SHARED=False)
    cache.set("a", 1)
    for path in tmp_path.iterdir():
        if path.name != "cache.lock":
            path.unlink()
    with pytest.raises(Poisoned):
        cache.set_many({"b": 1})
    cache.set("b", 2)
    assert cache.get("b") == 2
    assert (tmp_path / "cache.db").exists()


@pytest.mark.parametrize("shared", [True, False])
def test_what_was_closed_while_it_was_opened_is_tried_anew(tmp_path: Path, shared: bool) -> None:
    """By another thread's `release()`: nothing was asked yet, so nobody is told."""
    cache = made(tmp_path, SHARED=shared)
    cache.set("a", 1)
    release()
    place = place_of(cache._settings)
    place._persistency.close()  # type: ignore[attr-defined]  # as `release` does, in the middle of it
    with pytest.raises(Stale) as raised:
        place.open()
    assert isinstance(raised.value.__cause__, Closed)
    with pytest.raises(Stale):
        asyncio.run(place.aopen())


@pytest.mark.parametrize(("wait", "stall"), [(0.5, 0.5), (600, 60)])
def test_a_full_disk_keeps_the_job_no_longer_than_others_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait: float, stall: float
) -> None:
    """Whatever the engine would wait by itself."""
    asked = []
    opened = Persistency.open_job

    def look(self: Persistency, job_id: str, **options: Any) -> Any:
        asked.append(options["stall_timeout"])
        return opened(self, job_id, **options)

    monkeypatch.setattr(Persistency, "open_job", look)
    made(tmp_path, WAIT=wait).set("a", 1)
    assert set(asked) == {stall}


def test_release_closes_what_is_in_memory_for_good() -> None:
    """And what is opened anew is empty."""
    cache = made(":memory:")
    cache.set("a", 1)
    release(10)
    assert cache.get("a") is None


# -- what Django does with it ----------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> Iterator[None]:
    """Put the cache in force as the default one."""
    with override_settings(CACHES={"default": {"BACKEND": OURS, "LOCATION": tmp_path}}):
        yield


def test_pages_are_cached(site: None) -> None:
    """The middleware's: an `HttpResponse` comes back with its headers and cookies, and the view isn't asked again."""
    calls = []

    @cache_page(60)
    def view(_request: Any) -> HttpResponse:
        calls.append(1)
        response = HttpResponse("page", headers={"X-Number": str(len(calls))})
        response.set_cookie("a", "b")
        return response

    first, second = (view(RequestFactory().get("/page")) for _ in range(2))
    assert len(calls) == 1
    assert (second.content, second["X-Number"], second.cookies) == (first.content, "1", first.cookies)


def test_sessions_are_kept(site: None) -> None:
    """Django's session engine on the cache: made, read by another request, changed, ended."""
    from django.contrib.sessions.backends.cache import SessionStore

    session = SessionStore()
    session["user"] = 42
    session["at"] = datetime(2026, 1, 1, tzinfo=UTC)
    session.save()
    again = SessionStore(session.session_key)
    assert dict(again.items()) == {"user": 42, "at": datetime(2026, 1, 1, tzinfo=UTC)}
    again["user"] = 43
    again.save()
    assert SessionStore(session.session_key)["user"] == 43
    assert session.exists(str(session.session_key))
    again.flush()
    assert not session.exists(str(session.session_key))


def test_template_fragments_are_cached(site: None) -> None:
    """A fragment is a `SafeString`, and stays one: it isn't escaped a second time."""
    template = engines["django"].from_string("{% load cache %}{% cache 60 part who %}<b>{{ text }}</b>{% endcache %}")
    assert template.render({"who": 1, "text": "first"}) == "<b>first</b>"
    assert template.render({"who": 1, "text": "second"}) == "<b>first</b>"
    assert template.render({"who": 2, "text": "second"}) == "<b>second</b>"
    caches["default"].set("html", mark_safe("<i>"))
    assert type(caches["default"].get("html")) is SafeString


def test_a_cache_without_pickles_says_what_it_cant_hold(tmp_path: Path) -> None:
    """At the call, with what to pass instead; nothing is written."""
    cache = made(tmp_path, PICKLE=False)
    with pytest.raises(Misuse, match=r'a value of type tuple would have to be pickled.*"PICKLE": False') as raised:
        cache.set("a", (1, 2))
    assert "a tuple as a list" in raised.value.hint
    with pytest.raises(Misuse):
        cache.set_many({"b": 1, "a": object()})
    assert cache.get_many(["a", "b"]) == {}
    cache.set("a", [1, 2])
    assert cache.get("a") == [1, 2]
