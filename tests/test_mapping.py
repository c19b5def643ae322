"""A category as a mapping: CPython's own tests of mappings, and what they can't know."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from itertools import count
from typing import Any
from uuid import UUID

import pytest

from persistency import Corrupt, Job, Misuse, Persistency, RawKey, key
from persistency.category import Category
from persistency.codec.objects import CBOR, RAW
from persistency.coding import Coding
from persistency.mapping import CategoryMapping

try:
    from test import mapping_tests
except ImportError:
    # Some distributions of Python come without its tests; the tests further down run all the same.
    mapping_tests = None

WAIT = 20.0  # seconds a test waits for what must come


@pytest.fixture(params=["memory", "directory"])
def job(request: pytest.FixtureRequest, tmp_path: Any) -> Iterator[Job]:
    """Give an empty job over either adapter."""
    with Persistency(":memory:" if request.param == "memory" else tmp_path / "root") as persistency:
        yield persistency.open_job("job")


@pytest.fixture
def mapping(job: Job) -> CategoryMapping[Any]:
    """Give an empty mapping."""
    return Category(job, "m").mapping()


# -- CPython's own tests ----------------------------------------------------------------------------------------------


class Fresh(CategoryMapping[Any]):
    """A mapping that knows where another one can live, which a dict always does: in a category of its own.

    So it can be made of nothing, copied and made of keys, as CPython's tests of dicts ask.
    """

    job: Job
    _names = count()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(self.job, Coding(f"fresh {next(self._names)}", CBOR))
        self.update(*args, **kwargs)

    def copy(self) -> Fresh:
        return type(self)(self)

    @classmethod
    def fromkeys(cls, keys: Iterable[Any], value: Any = None) -> Any:
        made = cls()
        for k in keys:
            made[k] = value
        return made


if mapping_tests is None:

    @pytest.mark.skip(reason="this Python comes without its `test` package, and so without its tests of mappings")
    def test_it_passes_the_tests_of_mappings() -> None:
        """See the class of the same meaning."""

else:

    class TestCPythonMappings(mapping_tests.TestHashMappingProtocol):
        """`test.mapping_tests`, all three protocols. What is overridden asks for what only a dict in memory can do."""

        type2test = Fresh

        @pytest.fixture(autouse=True)
        def _open(self) -> Iterator[None]:
            with Persistency(":memory:") as persistency:
                Fresh.job = persistency.open_job("job")
                yield
                Fresh.job.flush().result(WAIT)  # no put has failed behind anybody's back

        def _reference(self) -> dict[Any, Any]:
            # Values that are the same after storage, which the tests ask for: theirs has a tuple, which becomes a list.
            return {"1": "2", "key1": "value1", "key2": b"value2"}

        def test_setdefault(self) -> None:
            # The tests change a list that is in the mapping already. What is read here is a copy; the rest is theirs.
            mapping_tests.BasicTestMappingProtocol.test_setdefault(self)
            d = self._empty_mapping()
            assert d.setdefault("key0") is None
            d.setdefault("key0", [])
            assert d.setdefault("key0") is None
            d.setdefault("key", []).append(3)
            assert d["key"] == []
            d["key"] = [3]
            assert d.setdefault("key", []) == [3]
            self.refuses_strange_keys(lambda d, k: d.setdefault(k, []))

        def test_getitem(self) -> None:
            # The tests use keys with an equality or a hash that raises. Keys are plain values here; other ones raise.
            mapping_tests.TestMappingProtocol.test_getitem(self)
            self.refuses_strange_keys(lambda d, k: d[k])

        def test_pop(self) -> None:
            # As for test_getitem.
            mapping_tests.TestMappingProtocol.test_pop(self)
            self.refuses_strange_keys(lambda d, k: d.pop(k))

        def test_eq(self) -> None:
            # As for test_getitem.
            assert self._empty_mapping() == self._empty_mapping()
            assert self._full_mapping({1: 2}) == self._full_mapping({1: 2})
            assert self._full_mapping({1: 2}) != self._full_mapping({1: 3})
            assert self._full_mapping({1: 2}) != self._full_mapping({2: 2})
            self.refuses_strange_keys(lambda d, k: d.__setitem__(k, 1))

        def test_repr(self) -> None:
            # A repr that reads all rows would be a surprise in a debugger; and a mapping can't contain itself.
            d = self._empty_mapping()
            d[1] = 2
            assert "fresh" in repr(d)
            assert "CategoryMapping" in repr(d)
            with pytest.raises(Misuse):
                d[1] = d

        def test_repr_deep(self) -> None:
            # Mappings in mappings can't be stored: see test_repr.
            with pytest.raises(Misuse):
                self._empty_mapping()[1] = self._empty_mapping()

        def refuses_strange_keys(self, use: Any) -> None:
            """See that a key that can't be stored is a `TypeError`, like one that can't be hashed in a dict."""
            d = self._full_mapping({1: 1})
            for strange in (object(), [1], {1}, 1j, Fresh):
                with pytest.raises(TypeError):
                    use(d, strange)
            assert dict(d) == {1: 1}


# -- keys -------------------------------------------------------------------------------------------------------------


def test_it_is_a_mutable_mapping(mapping: CategoryMapping[Any]) -> None:
    """Code that asks for the abstract class gets one; like a dict, it can't be hashed."""
    assert isinstance(mapping, MutableMapping)
    with pytest.raises(TypeError):
        hash(mapping)


@pytest.mark.parametrize(
    "k",
    [
        "a", "", b"a", 0, -5, 2**80, 1.5, True, None, UUID(int=7), datetime(2024, 1, 1, tzinfo=UTC),
        (), ("a", "b"), ("a", 1, None), ((1, 2),), ((),), ("a", ("b", "c")), (1, (2, (3,))),
    ],
    ids=repr,
)  # fmt: skip
def test_a_key_comes_back_as_it_was(mapping: CategoryMapping[Any], k: Any) -> None:
    """Bare keys bare, tuples as tuples; and what comes back leads to the row it came from."""
    mapping[k] = "value"
    assert list(mapping) == [k]
    assert type(next(iter(mapping))) is type(k)
    assert list(mapping.items()) == [(k, "value")]
    assert [mapping[back] for back in mapping] == ["value"]
    assert mapping.popitem() == (k, "value")
    assert k not in mapping


def test_a_tuple_of_one_is_its_element(mapping: CategoryMapping[Any]) -> None:
    """`m["a"]` and `m[("a",)]` are one row, which comes back bare; but a tuple in a tuple isn't the tuple."""
    mapping["a"] = 1
    mapping["a",] = 2
    assert list(mapping.items()) == [("a", 2)]
    mapping[(1, 2),] = "nested"
    mapping[1, 2] = "flat"
    assert dict(mapping) == {"a": 2, ((1, 2),): "nested", (1, 2): "flat"}
    assert (mapping[((1, 2),)], mapping[(1, 2)]) == ("nested", "flat")


def test_a_key_object_is_the_key_it_is(mapping: CategoryMapping[Any]) -> None:
    """`Key`s go in as they are; the rows are those that the category and the job see."""
    mapping[key("a", 1)] = "v"
    mapping[b"a"] = "bytes"
    assert list(mapping) == [b"a", ("a", 1)]
    assert mapping["a", 1] == mapping[key("a", 1)] == "v"


def test_the_order_is_that_of_keys(mapping: CategoryMapping[Any]) -> None:
    """Not that of insertion: numbers as numbers, parents first; `popitem` takes the last."""
    keys = [(), b"b", "a", ("a", 1), ("a", 2), "b", 1, 2, 10, True]
    for k in reversed(keys):
        mapping[k] = None
    assert list(mapping) == list(mapping.keys()) == keys
    assert list(reversed(mapping)) == keys[::-1]
    assert [mapping.popitem()[0] for _ in keys] == keys[::-1]


def test_one_true_and_one_point_nought_are_three_keys(mapping: CategoryMapping[Any]) -> None:
    """Unlike in a dict, which therefore never equals a mapping that has more than one of them."""
    mapping[1], mapping[1.0], mapping[True] = "int", "float", "bool"
    assert len(mapping) == 3
    assert [mapping[1], mapping[1.0], mapping[True]] == ["int", "float", "bool"]
    assert mapping != dict(mapping.items())
    del mapping[1.0], mapping[True]
    assert mapping == {1: "int"}


def test_a_raw_key_is_reached_but_not_listed(mapping: CategoryMapping[Any], job: Job) -> None:
    """It has no tuple to come back as; and `popitem`, which fails at it, takes nothing away."""
    raw = RawKey(b"\xff")
    mapping[raw] = 1
    assert mapping[raw] == 1
    for call in (lambda: list(mapping), mapping.popitem):
        with pytest.raises(Misuse, match="isn't a tuple"):
            call()
    assert raw in mapping
    assert mapping.pop(raw) == 1


@pytest.mark.parametrize("k", [object(), [1], {"a": 1}, 1j, (object(),), datetime(2024, 1, 1)], ids=[*"abcdef"])
def test_a_key_that_cannot_be_one_is_a_type_error(mapping: CategoryMapping[Any], k: Any) -> None:
    """As a dict says of what it can't hash."""
    for use in (mapping.get, mapping.pop, mapping.setdefault, mapping.__delitem__, mapping.__contains__):
        with pytest.raises(TypeError):
            use(k)
    with pytest.raises(TypeError):
        mapping[k] = 1
    assert len(mapping) == 0


# -- values -----------------------------------------------------------------------------------------------------------


def test_a_missing_key_is_a_key_error_with_the_key_in_it(mapping: CategoryMapping[Any]) -> None:
    """The key as it was asked for; a stored `None` is not missing."""
    mapping["none"] = None
    for use in (mapping.__getitem__, mapping.__delitem__, mapping.pop):
        with pytest.raises(KeyError) as error:
            use(("a", 1))
        assert error.value.args == (("a", 1),)
    assert mapping["none"] is None
    assert mapping.pop("none", 5) is None
    assert mapping.pop("none", 5) == 5


def test_a_value_that_cannot_be_stored_raises_at_the_assignment(mapping: CategoryMapping[Any]) -> None:
    """And nothing is stored."""
    for use in (mapping.__setitem__, mapping.setdefault):
        with pytest.raises(Misuse):
            use("k", object())
    assert mapping == {}


def test_values_are_copies(mapping: CategoryMapping[Any]) -> None:
    """Changing one changes no row, neither what was given nor what was got."""
    given = [1]
    mapping["k"] = given
    given.append(2)
    mapping["k"].append(3)
    mapping.setdefault("other", given).append(4)
    assert mapping == {"k": [1], "other": [1, 2]}


def test_it_has_the_codec_of_its_category(job: Job) -> None:
    """Bytes with RAW, for example; a category and all mappings of it see the same rows."""
    category = Category(job, "raw", RAW)
    mapping = category.mapping()
    mapping["k"] = b"\0"
    category.put(("l",), b"\1")
    assert category.get(("k",)).result(WAIT) == b"\0"
    assert category.mapping() == mapping == {"k": b"\0", "l": b"\1"}
    assert b"\1" in mapping.values()
    assert ("l", b"\1") in mapping.items()
    assert b"\2" not in mapping.values()
    assert ("l", b"\2") not in mapping.items()
    assert repr(mapping) == f"<CategoryMapping 'raw' of {job!r}, RAW>"


def test_it_equals_mappings_only(mapping: CategoryMapping[Any]) -> None:
    """Any other mapping with the same items; not a list of them."""
    mapping.update(a=1, b=2)
    assert mapping == {"b": 2, "a": 1}
    assert {"b": 2, "a": 1} == mapping  # noqa: SIM300  # the other way round
    assert mapping != {"a": 1}
    assert mapping != {"a": 1, "b": 2, "c": 3}
    assert mapping != [("a", 1), ("b", 2)]


def test_what_cannot_be_decoded_is_corrupt_and_stays(job: Job) -> None:
    """A removal that can't give what it removes is undone."""
    mapping = Category(job, "m").mapping()
    job.put("m", ("k",), b"\xff")
    for use in (mapping.__getitem__, mapping.pop, mapping.setdefault):
        with pytest.raises(Corrupt, match=r"category 'm', key\('k'\)"):
            use("k")
    with pytest.raises(Corrupt):
        mapping.popitem()
    assert "k" in mapping
    del mapping["k"]
    assert not mapping


def test_clear_removes_every_kind_of_key_and_nothing_else(job: Job) -> None:
    """The empty key, the first and the last that there can be; the category beside it stays. It is one step."""
    mapping, beside = Category(job, "m").mapping(), Category(job, "n").mapping()
    for k in ((), None, "a", RawKey(b"\0\1"), RawKey(b"\xff" * 8192)):
        mapping[k] = beside[k] = 1
    accepted = job.statistics().accepted
    mapping.clear()
    assert (len(mapping), len(beside)) == (0, 5)
    assert job.statistics().accepted == accepted + 2
    mapping.clear()
    assert not mapping


# -- writes and iteration ---------------------------------------------------------------------------------------------


def test_it_can_be_written_to_while_it_is_read(mapping: CategoryMapping[Any]) -> None:
    """S2-50: no "changed size during iteration": over several pages, what stays is seen once."""
    mapping.update((number, number) for number in range(1_000))
    seen = []
    for k, value in mapping.items():
        seen.append(k)
        if k % 2:
            del mapping[k]
        mapping[k - 1_000] = value
    assert seen == list(range(1_000))
    assert len(mapping) == 1_500


def test_removals_and_defaults_are_atomic(mapping: CategoryMapping[Any]) -> None:
    """Eight threads pop the same keys: each is had by one; sixteen set a default: all get that of one."""
    mapping.update((number, "v") for number in range(200))
    start = threading.Barrier(8)

    def pop_all(_: int) -> tuple[int, int]:
        start.wait(WAIT)
        popped = [mapping.pop(number, None) for number in range(100)]
        taken = 0
        while True:
            try:
                mapping.popitem()
            except KeyError:
                return popped.count("v"), taken
            taken += 1

    with ThreadPoolExecutor(8) as pool:
        assert sum(map(sum, pool.map(pop_all, range(8)))) == 200
        answers = list(pool.map(lambda number: mapping.setdefault("k", number), range(16)))
    assert set(answers) == {mapping["k"]}


def test_assigning_waits_for_nothing_and_is_seen_by_reads(job: Job) -> None:
    """An event: its failure is told by `flush`; order makes the read behind it see it, through whatever handle."""
    mapping = Category(job, "m").mapping()
    for number in range(500):
        mapping["n"] = number
        assert mapping["n"] == number
    assert job.statistics().accepted == 500
    assert Category(job, "m").get(("n",)).result(WAIT) == 499


def test_it_stands_in_for_a_dict_of_objects(job: Job) -> None:
    """A program that was written for a dict: counts of words, with a default, an update and a union in a dict."""
    counts: Mapping[str, int]
    mapping = counts = Category(job, "words").mapping()
    for word in "abacab":
        mapping[word] = mapping.get(word, 0) + 1
    assert dict(counts) == {"a": 3, "b": 2, "c": 1}
    assert {**counts} | {"d": 0} == {"a": 3, "b": 2, "c": 1, "d": 0}
    assert max(counts, key=counts.__getitem__) == "a"
    assert counts.keys() & {"a", "x"} == {"a"}
    assert sum(counts.values()) == 6


def test_it_survives_reopening(tmp_path: Any) -> None:
    """The point of it."""
    with Persistency(tmp_path) as persistency:
        Category(persistency.open_job("job"), "m").mapping().update({"a": [1], ("b", 2): {"c": None}})
    with Persistency(tmp_path) as persistency:
        assert Category(persistency.open_job("job"), "m").mapping() == {"a": [1], ("b", 2): {"c": None}}
