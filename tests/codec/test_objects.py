"""Codecs: which values come back as they were, what is refused at the call, and what strange data can't do."""

from __future__ import annotations

import math
import subprocess
import sys
from array import array
from dataclasses import InitVar, dataclass, field, make_dataclass, replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum, Flag, IntEnum, StrEnum, auto
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NewType, Optional, Union
from uuid import UUID

import cbor2
import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistency.codec import values
from persistency.codec.objects import CBOR, RAW, same, typed
from persistency.errors import Corrupt, Misuse

ROOT = Path(__file__).parents[2]
NOON = datetime(2024, 2, 29, 12, 0, tzinfo=UTC)
UserId = NewType("UserId", int)


class Colour(Enum):
    RED = "r"
    ONE = 1
    SOME = 1.5
    CRIMSON = "r"  # noqa: PIE796  # an alias, on purpose


class Shade(Enum):
    DARK = "d"
    PALE = "p"


class Level(IntEnum):
    LOW = 1
    HIGH = 2


class Mode(StrEnum):
    FAST = "fast"


class Right(Flag):
    READ = auto()
    WRITE = auto()


NO_RIGHT = Right(0)


class Point(NamedTuple):
    x: int
    y: int


class Opaque:
    """A class that no codec knows."""


@dataclass
class Address:
    city: str
    zip: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    id: UserId
    name: str
    score: float = 0.0
    tags: set[str] = field(default_factory=set)
    address: Address | None = None
    others: list[Address] = field(default_factory=list)
    by_name: dict[str, Address] = field(default_factory=dict)
    colour: Colour = Colour.RED
    levels: tuple[Level, ...] = ()
    modes: frozenset[Mode] = frozenset()
    rights: Right = NO_RIGHT
    pair: tuple[int, str] = (0, "")
    born: date | None = None
    seen: datetime | None = None
    token: UUID | None = None
    price: Decimal | None = None
    share: Fraction = Fraction(0)
    blob: bytes = b""
    active: bool = True
    mixed: int | float | str | bool | list[int] | None = None
    wide: Optional[Union[float, str]] = None  # noqa: UP007, UP045  # the older spelling, too
    kind: Literal["a", 1, b"c", None] = "a"  # noqa: PYI061  # a None among the choices, on purpose
    noted: Annotated[int, "a note"] = 0
    spots: dict[tuple[int, int], str] = field(default_factory=dict)
    anything: Any = None


@dataclass
class Tree:
    value: int
    branches: list[Tree] = field(default_factory=list)


@dataclass
class Sealed:
    """Made by its own rules: checks itself, derives a field, and keeps one that its constructor doesn't take."""

    low: int
    high: int
    width: int = field(init=False)
    visits: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low is above high")
        self.width = self.high - self.low


@dataclass(eq=False)
class Unequal:
    name: str


class Struct(msgspec.Struct, rename="camel"):
    user_name: str
    ids: set[int] = set()
    when: datetime | None = None
    span: timedelta = timedelta(0)
    shade: Shade = Shade.DARK
    by_id: dict[int, str] = {}
    blob: bytes = b""
    price: Decimal | None = None
    born: date | None = None
    token: UUID | None = None
    pair: tuple[int, str] = (0, "")
    address: Address | None = None
    inner: list[Struct] = []


class Model(pydantic.BaseModel):
    user_name: str
    ids: set[int] = set()
    when: datetime | None = None
    span: timedelta = timedelta(0)
    shade: Shade = Shade.DARK
    by_id: dict[int, str] = {}
    blob: bytes = b""
    price: Decimal | None = None
    born: date | None = None
    token: UUID | None = None
    pair: tuple[int, str] = (0, "")
    folder: Path = Path("/")
    site: pydantic.HttpUrl | None = None
    address: Address | None = None
    inner: list[Model] = []
    limit: int = pydantic.Field(default=3, alias="upperLimit")

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def shout(self) -> str:
        return self.user_name.upper()


USER = User(id=UserId(7), name="ada")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
INTS = st.integers(-(2**70), 2**70)
FLOATS = st.floats(allow_nan=False)
MOMENTS = st.datetimes(timezones=st.just(UTC))
DECIMALS = st.decimals(allow_nan=False, allow_infinity=False).filter(lambda one: one != 0 or not one.is_signed())
ADDRESSES = st.builds(Address, TEXTS, st.none() | INTS)
USERS = st.builds(
    User,
    id=INTS,
    name=TEXTS,
    score=FLOATS,
    tags=st.sets(TEXTS, max_size=3),
    address=st.none() | ADDRESSES,
    others=st.lists(ADDRESSES, max_size=3),
    by_name=st.dictionaries(TEXTS, ADDRESSES, max_size=3),
    colour=st.sampled_from(Colour),
    levels=st.lists(st.sampled_from(Level), max_size=3).map(tuple),
    modes=st.frozensets(st.sampled_from(Mode)),
    rights=st.sampled_from([Right(0), Right.READ, Right.READ | Right.WRITE]),
    pair=st.tuples(INTS, TEXTS),
    born=st.none() | st.dates(),
    seen=st.none() | MOMENTS,
    token=st.none() | st.uuids(),
    price=st.none() | DECIMALS,
    share=st.fractions(),
    blob=st.binary(max_size=8),
    active=st.booleans(),
    mixed=INTS | FLOATS | TEXTS | st.booleans() | st.none() | st.lists(INTS, max_size=3),
    wide=st.none() | FLOATS | TEXTS,
    kind=st.sampled_from(["a", 1, b"c", None]),
    noted=INTS,
    spots=st.dictionaries(st.tuples(INTS, INTS), TEXTS, max_size=3),
    anything=st.recursive(st.none() | st.booleans() | INTS | TEXTS, lambda one: st.lists(one, max_size=3)),
)
TREES = st.recursive(st.builds(Tree, INTS), lambda one: st.builds(Tree, INTS, st.lists(one, max_size=3)), max_leaves=9)


def told(error: pytest.ExceptionInfo[Any]) -> str:
    """Return what an error says."""
    return str(error.value)


# -- plain values and bytes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [None, False, 0, "", b"", [], {}, 0.0, {"a": [1, {"b": None}], "c": [True, "x"]}, NOON, {1: {2, 3}}],
    ids=repr,
)
def test_cbor_keeps_any_plain_value(value: Any) -> None:
    """S2-3, S2-6, DD21: nested, empty and false values come back as they were, and as of the type they were."""
    back = CBOR.decode(CBOR.encode(value))
    assert back == value
    assert type(back) is type(value)


def test_cbor_refuses_what_it_cannot_keep() -> None:
    """S2-5: there is no value that stands for "undefined"; what isn't plain raises at the call."""
    for value in (object(), Opaque(), USER, datetime(2024, 1, 1)):  # naive on purpose
        with pytest.raises(Misuse):
            CBOR.encode(value)
    with pytest.raises(Corrupt):
        CBOR.decode(b"\xff")


def test_raw_keeps_bytes_and_copies_what_may_change() -> None:
    """DD21: any bytes-like goes in, bytes come out; a buffer that is written to later isn't the one that was stored."""
    assert RAW.decode(RAW.encode(b"\0\xff")) == b"\0\xff"
    buffer = bytearray(b"ab")
    taken = [RAW.encode(buffer), RAW.encode(memoryview(buffer)[1:]), RAW.encode(array("B", b"xy"))]  # type: ignore[arg-type]
    buffer[:] = b"zz"
    assert taken == [b"ab", b"b", b"xy"]
    assert {type(one) for one in taken} == {bytes}


@pytest.mark.parametrize("value", ["text", 5, None, [1], {}], ids=repr)
def test_raw_refuses_what_is_not_bytes(value: Any) -> None:
    """A text isn't encoded by guess."""
    with pytest.raises(Misuse, match=f"bytes-like, not {type(value).__name__}"):
        RAW.encode(value)


def test_raw_refuses_a_released_view() -> None:
    """A view that was given back can't be read any more."""
    view = memoryview(b"ab")
    view.release()
    with pytest.raises(Misuse):
        RAW.encode(view)  # type: ignore[arg-type]


# -- dataclasses ------------------------------------------------------------------------------------------------------


@given(USERS)
@settings(deadline=None)
def test_a_dataclass_comes_back_equal_and_of_the_same_types(user: User) -> None:
    """DD21: every kind of field comes back with its value and its type."""
    codec = typed(User)
    back = codec.decode(codec.encode(user))
    assert back == user
    assert same(back, user)
    for name in User.__slots__:
        assert type(getattr(back, name)) is type(getattr(user, name)), name


@given(TREES)
@settings(deadline=None)
def test_a_dataclass_may_hold_itself(tree: Tree) -> None:
    """A class that names itself in its annotations is one shape, however deep its objects are."""
    codec = typed(Tree)
    assert codec.decode(codec.encode(tree)) == tree


def test_a_dataclass_is_stored_as_a_map_of_its_fields() -> None:
    """What is in a file is readable without the class: these bytes are the format, and stay so."""
    data = typed(Address).encode(Address("Wien", 1010))
    assert data.hex() == "a26463697479645769656e637a69701903f2"
    assert cbor2.loads(data) == {"city": "Wien", "zip": 1010}
    everything = cbor2.loads(typed(User).encode(replace(USER, colour=Colour.SOME, rights=Right.READ | Right.WRITE)))
    assert list(everything) == list(User.__slots__)
    assert (everything["colour"], everything["rights"], everything["id"]) == (1.5, 3, 7)


def test_data_of_an_older_class_gets_the_defaults() -> None:
    """A field that was added since, with a default or a factory, has it; one without a default is missed by name."""
    codec = typed(User)
    old = codec.decode(values.encode({"id": 1, "name": "eva"}))
    assert old == User(id=UserId(1), name="eva")
    assert codec.decode(values.encode({"id": 1, "name": "eva"})).tags is not old.tags
    with pytest.raises(Corrupt, match="field 'name': it is missing"):
        codec.decode(values.encode({"id": 1}))
    with pytest.raises(Corrupt, match=r"field 'others\[1\].city': it is missing"):
        codec.decode(values.encode({"id": 1, "name": "eva", "others": [{"city": "x"}, {"zip": 1}]}))


def test_data_of_a_newer_class_is_read_without_its_new_fields() -> None:
    """A release that was rolled back reads what its successor wrote: unknown fields are ignored, nested ones too."""
    data = values.encode({"city": "x", "zip": 1, "country": "AT", "street": {"name": "y"}})
    assert typed(Address).decode(data) == Address("x", 1)


@pytest.mark.parametrize(
    ("change", "field_path", "expected"),
    [
        ({"id": "7"}, "id", "int is expected, not str"),
        ({"id": True}, "id", "int is expected, not bool"),
        ({"active": 1}, "active", "bool is expected, not int"),
        ({"name": b"ada"}, "name", "str is expected, not bytes"),
        ({"score": "1"}, "score", "float is expected, not str"),
        ({"score": 2**53 + 1}, "score", "no float equals"),
        ({"score": 2**1030}, "score", "no float equals"),
        ({"address": {"city": 1}}, "address.city", "str is expected, not int"),
        ({"address": [1]}, "address", "Address | None is expected, not list"),
        ({"others": [{"city": "x"}, {"city": None}]}, "others[1].city", "str is expected, not NoneType"),
        ({"others": {}}, "others", "list is expected, not dict"),
        ({"by_name": {"k": {"city": 2}}}, "by_name['k'].city", "str is expected, not int"),
        ({"by_name": {1: {"city": "x"}}}, "by_name[1]", "str is expected, not int"),
        ({"colour": "blue"}, "colour", "Colour is expected, not 'blue'"),
        ({"colour": True}, "colour", "Colour is expected, not bool"),
        ({"levels": [1, 3]}, "levels[1]", "Level is expected, not 3"),
        ({"rights": 8}, "rights", "Right is expected, not 8"),
        ({"rights": "r"}, "rights", "Right is expected, not str"),
        ({"pair": [1]}, "pair", "tuple of 2 is expected, not of 1"),
        ({"pair": [1, 2]}, "pair[1]", "str is expected, not int"),
        ({"tags": ["a"]}, "tags", "set is expected, not list"),
        ({"seen": date(2024, 1, 1)}, "seen", "datetime | None is expected, not date"),
        ({"born": NOON}, "born", "date | None is expected, not datetime"),
        ({"kind": True}, "kind", "is expected, not bool"),
        ({"kind": 2}, "kind", "is expected, not 2"),
        ({"mixed": b""}, "mixed", "is expected, not bytes"),
        ({"mixed": ["x"]}, "mixed[0]", "int is expected, not str"),
    ],
    ids=repr,
)
def test_data_of_another_type_is_corrupt_and_names_the_field(
    change: dict[str, Any], field_path: str, expected: str
) -> None:
    """Bytes are never trusted: what doesn't fit the class isn't made an object of it."""
    data = values.encode(values.decode(typed(User).encode(USER)) | change)
    with pytest.raises(Corrupt) as error:
        typed(User).decode(data)
    assert f"field '{field_path}': " in told(error).replace('"', "'")
    assert expected in told(error)


@pytest.mark.parametrize(
    ("change", "field_path"),
    [
        ({"id": True}, "id"),
        ({"name": None}, "name"),
        ({"score": 2**53 + 1}, "score"),
        ({"address": Address(3)}, "address.city"),  # type: ignore[arg-type]
        ({"others": [Address("x"), Address("y", "1")]}, "others[1].zip"),  # type: ignore[arg-type]
        ({"by_name": {"k": Address(None)}}, "by_name['k'].city"),  # type: ignore[arg-type]
        ({"colour": "r"}, "colour"),
        ({"levels": (1,)}, "levels[0]"),
        ({"rights": 1}, "rights"),
        ({"pair": (1, "a", 2)}, "pair"),
        ({"pair": [1, "a"]}, "pair"),
        ({"tags": ["a"]}, "tags"),
        ({"born": NOON}, "born"),
        ({"seen": NOON.date()}, "seen"),
        ({"kind": True}, "kind"),
        ({"kind": []}, "kind"),
        ({"mixed": {}}, "mixed"),
        ({"wide": 1j}, "wide"),
    ],
    ids=repr,
)
def test_an_object_with_a_wrong_field_is_refused_at_the_call(change: dict[str, Any], field_path: str) -> None:
    """Python lets a field hold anything; what couldn't be read back is `Misuse`, and the field is named."""
    with pytest.raises(Misuse) as error:
        typed(User).encode(replace(USER, **change))
    assert f"field '{field_path}': " in told(error).replace('"', "'")


def test_an_int_in_a_float_field_becomes_that_float() -> None:
    """An int is taken for a float, and stored as one, as annotations are read; beside `int` it stays an int."""
    codec = typed(User)
    back = codec.decode(codec.encode(replace(USER, score=3, wide=4, mixed=5)))
    assert [(type(one), one) for one in (back.score, back.wide, back.mixed)] == [(float, 3.0), (float, 4.0), (int, 5)]
    read = codec.decode(values.encode({"id": 1, "name": "x", "score": 2}))
    assert type(read.score) is float
    assert math.isnan(codec.decode(codec.encode(replace(USER, score=math.nan))).score)


def test_an_object_of_a_subclass_is_refused() -> None:
    """Its own fields would be lost silently."""

    @dataclass
    class Longer(Address):
        street: str = ""

    with pytest.raises(Misuse, match="Address is expected, not Longer"):
        typed(Address).encode(Longer("x"))
    with pytest.raises(Misuse, match="field 'address'"):
        typed(User).encode(replace(USER, address=Longer("x")))
    with pytest.raises(Misuse, match="Address is expected, not dict"):
        typed(Address).encode({"city": "x"})  # type: ignore[arg-type]


def test_an_object_is_made_by_its_own_init() -> None:
    """What `__post_init__` refuses is `Corrupt`; fields that `__init__` doesn't take come back as they were."""
    codec = typed(Sealed)
    one = Sealed(1, 4)
    one.visits = 9
    back = codec.decode(codec.encode(one))
    assert (back, back.width, back.visits) == (one, 3, 9)
    with pytest.raises(Corrupt, match="Sealed refuses it: low is above high") as error:
        codec.decode(values.encode({"low": 2, "high": 1}))
    assert isinstance(error.value.__cause__.__cause__, ValueError)  # type: ignore[union-attr]
    del one.visits  # what is left is the default of the class
    assert codec.decode(codec.encode(one)).visits == 0
    del one.low
    with pytest.raises(Misuse, match="field 'low': it isn't set"):
        codec.encode(one)


def test_an_object_that_contains_itself_is_refused() -> None:
    """Neither a cycle nor depth exhausts the stack."""
    tree = Tree(1)
    tree.branches.append(tree)
    with pytest.raises(Misuse, match="nested too deep"):
        typed(Tree).encode(tree)
    deep = Tree(0)
    for _ in range(40):  # two levels each: over 64
        deep = Tree(0, [deep])
    with pytest.raises(Misuse, match="64 deep"):
        typed(Tree).encode(deep)


def test_what_any_holds_is_checked_by_cbor() -> None:
    """Any isn't a way around the allow-list."""
    with pytest.raises(Misuse, match=r"Opaque"):
        typed(User).encode(replace(USER, anything=[Opaque()]))
    with pytest.raises(Misuse, match="naive"):
        typed(User).encode(replace(USER, seen=datetime(2024, 1, 1)))  # naive on purpose
    with pytest.raises(Corrupt):
        typed(Address).decode(b"\xa1\x64city\xd9\x03\xe7\x61x")  # an unlisted tag around the text


def needs(hint: Any) -> type:
    """Make a dataclass with one field."""
    return make_dataclass("One", [("it", hint)])


@pytest.mark.parametrize(
    ("hint", "why"),
    [
        (Opaque, "Opaque isn't a type that can be stored"),
        (timedelta, "datetime.timedelta isn't a type that can be stored"),
        (list[Opaque], "Opaque isn't a type that can be stored"),
        (Point, "Point isn't a type that can be stored"),
        (Struct, "Struct isn't a type that can be stored"),
        (set[Address], "a set in the data can't hold Address"),
        (frozenset[tuple[Address, int]], "a set in the data can't hold"),
        (dict[Address, int], "a map's keys in the data can't be Address"),
        (dict[frozenset[list[int]], int], "a set in the data can't hold list"),
        (str | Mode, "can't be told apart"),
        (list[int] | tuple[int, ...], "can't be told apart"),
        (Address | dict[str, int], "can't be told apart"),
        (Address | Tree, "can't be told apart"),
        (Enum("Odd", {"A": (1, 2)}), "other values than None, numbers, text and bytes"),
        ("Nowhere", "its annotations can't be resolved: name 'Nowhere' is not defined"),
    ],
    ids=str,
)
def test_a_dataclass_that_cannot_be_stored_is_refused_before_any_value(hint: Any, why: str) -> None:
    """`typed()` itself says so, and names the field."""
    with pytest.raises(Misuse) as error:
        typed(needs(hint))
    assert why in told(error)
    assert "field 'it': " in told(error) or hint == "Nowhere"


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int | Any, {"k": [1]}),
        (list, [1, "a", None]),
        (tuple, (1, "a")),
        (tuple[()], ()),
        (dict, {1: {"k": None}}),
        (set, {1, "a"}),
        (set[tuple[int, Any]], {(1, "a"), (2, None)}),
        (None, None),
    ],
    ids=lambda given: type(given).__name__ if isinstance(given, set) else str(given),
)
def test_a_loose_annotation_takes_what_cbor_takes(hint: Any, value: Any) -> None:
    """Bare containers hold anything plain; a union with Any is Any."""
    cls = needs(hint)
    codec = typed(cls)
    back = codec.decode(codec.encode(cls(value)))
    assert same(back, cls(value))
    assert type(back.it) is type(value)
    with pytest.raises(Misuse):
        codec.encode(cls(Opaque()))


def test_a_dataclass_with_an_init_of_its_own_is_refused() -> None:
    """What its fields don't tell can't be given to its `__init__`."""

    @dataclass
    class Hungry:
        it: int
        more: InitVar[int]

    @dataclass(init=False)
    class Own:
        it: int

        def __init__(self, number: int) -> None:
            self.it = number

    @dataclass(init=False)
    class Fixed:
        it: int

        def __init__(self) -> None:
            self.it = 1

    for cls in (Hungry, Own, Fixed):
        with pytest.raises(Misuse, match="not its fields, it"):
            typed(cls)


@pytest.mark.parametrize("cls", [Opaque, int, dict, Point, USER, list[int], "User", None], ids=repr)
def test_typed_takes_classes_it_knows(cls: Any) -> None:
    """Anything else is `Misuse`, with the advice to use plain values."""
    with pytest.raises(Misuse, match=r"typed\(\) takes a dataclass"):
        typed(cls)


# -- structs and models -----------------------------------------------------------------------------------------------

FOREIGN = {
    "user_name": TEXTS,
    "ids": st.sets(INTS.filter(lambda one: abs(one) < 2**63), max_size=3),
    "when": st.none() | MOMENTS,
    "span": st.timedeltas(timedelta(-9), timedelta(9)),
    "shade": st.sampled_from(Shade),
    "by_id": st.dictionaries(st.integers(-9, 9), TEXTS, max_size=3),
    "blob": st.binary(max_size=8),
    "price": st.none() | DECIMALS,
    "born": st.none() | st.dates(),
    "token": st.none() | st.uuids(),
    "pair": st.tuples(st.integers(-9, 9), TEXTS),
    "address": st.none() | st.builds(Address, TEXTS, st.none() | st.integers(-9, 9)),
}


@given(st.builds(Struct, **FOREIGN))
@settings(deadline=None)
def test_a_struct_comes_back_equal(one: Struct) -> None:
    """DD21: a struct with every kind of field, and one in another."""
    codec = typed(Struct)
    holder = Struct("holder", inner=[one])
    assert codec.decode(codec.encode(one)) == one
    assert codec.decode(codec.encode(holder)) == holder


@given(st.builds(Model, folder=st.just(Path("/a b")), site=st.just("https://example.org/x"), **FOREIGN))
@settings(deadline=None)
def test_a_model_comes_back_equal(one: Model) -> None:
    """DD21: a model with every kind of field, and one in another; what CBOR has no type for is text in the data."""
    codec = typed(Model)
    holder = Model(user_name="holder", inner=[one], upperLimit=4)
    assert codec.decode(codec.encode(one)) == one
    assert codec.decode(codec.encode(holder)) == holder


def test_structs_and_models_are_stored_as_maps_of_the_names_they_declare() -> None:
    """Renamed fields and aliases are what the class itself calls its data; nothing computed is stored."""
    stored = cbor2.loads(typed(Struct).encode(Struct("ada", when=NOON, price=Decimal("1.50"))))
    assert stored["userName"] == "ada"
    assert (stored["when"], stored["price"]) == (NOON, Decimal("1.50"))
    stored = cbor2.loads(typed(Model).encode(Model(user_name="ada", when=NOON, upperLimit=9)))
    assert (stored["user_name"], stored["when"], stored["upperLimit"]) == ("ada", NOON, 9)
    assert "shout" not in stored
    assert "limit" not in stored


@pytest.mark.parametrize("cls", [Struct, Model])
def test_a_struct_or_model_follows_its_class_through_changes(cls: type[Any]) -> None:
    """A missing field has its default, an unknown one is ignored, a wrong one is `Corrupt` and named."""
    name = "userName" if cls is Struct else "user_name"
    codec = typed(cls)
    assert codec.decode(values.encode({name: "ada", "unknown": 1})) == cls(user_name="ada")
    with pytest.raises(Corrupt, match=name):
        codec.decode(values.encode({name: 5}))
    with pytest.raises(Corrupt, match=name):
        codec.decode(values.encode({}))
    with pytest.raises(Corrupt, match="shade"):
        codec.decode(values.encode({name: "ada", "shade": "blue"}))
    with pytest.raises(Corrupt):
        codec.decode(b"\x9f")


@pytest.mark.parametrize("cls", [Struct, Model])
def test_a_struct_or_model_that_could_not_be_read_back_is_refused_at_the_call(cls: type[Any]) -> None:
    """Its library checks fields when it is made, not when they are set."""
    codec = typed(cls)
    one = cls(user_name="ada")
    one.user_name = 5
    with pytest.raises(Misuse, match=r"can't be stored: .*user_?[nN]ame"):
        codec.encode(one)
    one = cls(user_name="ada")
    one.address = Opaque()
    with pytest.raises(Misuse, match="can't be stored"):
        codec.encode(one)
    one = cls(user_name="ada", when=datetime(2024, 1, 1))  # naive on purpose
    with pytest.raises(Misuse, match="naive"):
        codec.encode(one)
    one = cls(user_name="ada")
    one.inner.append(one)
    with pytest.raises(Misuse):
        codec.encode(one)
    with pytest.raises(Misuse, match=f"{cls.__name__} is expected, not dict"):
        codec.encode({"user_name": "ada"})

    class Longer(cls):  # type: ignore[misc]  # a class made here
        more: int = 0

    with pytest.raises(Misuse, match="is expected, not Longer"):
        codec.encode(Longer(user_name="ada"))


def test_a_secret_of_a_model_is_not_turned_into_asterisks() -> None:
    """What pydantic writes of a secret isn't the secret: it is refused, instead of being lost."""

    class Login(pydantic.BaseModel):
        word: pydantic.SecretStr

    with pytest.raises(Misuse, match="secret"):
        typed(Login).encode(Login(word=pydantic.SecretStr("x")))


def test_a_model_whose_validator_fails_in_its_own_way_is_corrupt() -> None:
    """Validators may raise what they like; the caller gets one error for data that doesn't fit."""

    class Odd(pydantic.BaseModel):
        it: int

        @pydantic.field_validator("it")
        @classmethod
        def refuse(cls, value: int) -> int:
            if value < 0:
                raise LookupError("nothing below zero")
            return value

    with pytest.raises(Corrupt, match="not a Odd: nothing below zero"):
        typed(Odd).decode(values.encode({"it": -1}))


def test_a_struct_that_msgspec_cannot_convert_is_refused_before_any_value() -> None:
    """As for a dataclass: `typed()` itself says so."""

    class Unclear(msgspec.Struct):
        it: Address | Tree

    class Mixed(msgspec.Struct):
        it: Colour

    for cls in (Unclear, Mixed):
        with pytest.raises(Misuse, match=rf"typed\({cls.__name__}\): "):
            typed(cls)


# -- equality ---------------------------------------------------------------------------------------------------------

EQUAL = [
    ({"a": 1, "b": [1, 2]}, {"b": (1, 2), "a": 1}),
    (1, 1.0),
    (math.nan, float("nan")),
    ([math.nan], [math.nan]),
    ({1, 2}, frozenset((2, 1))),
    ({(1, 2): 1}, {(1, 2): 1.0}),
    (Unequal("x"), Unequal("x")),
    (Tree(1, [Tree(2)]), Tree(1, [Tree(2)])),
    (None, None),
]
DIFFERENT = [
    (1, True),
    (0, False),
    ([1], [True]),
    ({"a": 1}, {"a": True}),
    ({1: "x"}, {True: "x"}),
    ({1}, {True}),
    ({(1,)}, {(True,)}),
    ({"a": 1}, {"a": 1, "b": 2}),
    ({"a": None}, {"b": None}),
    ([1, 2], [1, 2, 3]),
    ([1, 2], [2, 1]),
    ("a", b"a"),
    ("", None),
    (0, None),
    ([], None),
    ([], {}),
    ({1}, [1]),
    (math.nan, 1.0),
    (Unequal("x"), Unequal("y")),
    (Tree(1), Address("1")),
]


@pytest.mark.parametrize(("one", "other"), EQUAL, ids=repr)
def test_equal_values_are_the_same(one: Any, other: Any) -> None:
    """S2-26: the order of keys doesn't count; numbers are equal as numbers."""
    assert same(one, other)
    assert same(other, one)


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=repr)
def test_different_values_are_not_the_same(one: Any, other: Any) -> None:
    """S2-6, S2-26: a bool is no number, however deep it is; falsy values are not one another."""
    assert not same(one, other)
    assert not same(other, one)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "a", b"a", 1.0, 0.5]),
    lambda one: st.lists(one, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", 1, 2]), one, max_size=3),
    max_leaves=8,
)


def model_of(value: Any) -> Any:
    """Return something whose own equality is the one that is meant."""
    if isinstance(value, bool):
        return ("bool", str(value))
    if isinstance(value, list | tuple):
        return ("list", tuple(map(model_of, value)))
    if isinstance(value, dict):
        return ("dict", frozenset((model_of(k), model_of(one)) for k, one in value.items()))
    return ("atom", value)


@given(PLAIN, PLAIN)
def test_sameness_agrees_with_a_model(one: Any, other: Any) -> None:
    """Of any two values, and of one and its copy out of CBOR."""
    assert same(one, other) == (model_of(one) == model_of(other))
    assert same(one, CBOR.decode(CBOR.encode(one)))


# -- the extras -------------------------------------------------------------------------------------------------------


def test_the_extras_are_not_imported_for_somebody_who_does_not() -> None:
    """`import persistency`, and a typed dataclass, need neither msgspec nor pydantic."""
    program = """
import sys
import persistency, persistency.category
from dataclasses import dataclass
from persistency.codec.objects import typed
@dataclass
class One:
    it: int
codec = typed(One)
assert codec.decode(codec.encode(One(1))) == One(1)
try:
    typed(int)
except persistency.Misuse:
    pass
print(*({"msgspec", "pydantic", "pydantic_core"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", program]
    found = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert (found.returncode, found.stdout.strip()) == (0, ""), found.stderr
