"""Wrong arguments: every verb and option refuses them at the call, says what is wrong, and has done nothing."""

from __future__ import annotations

import copy
import mmap
import os
import pickle
import threading
from array import array
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from persistency import (
    Check,
    Closed,
    Conflict,
    Corrupt,
    Delete,
    DeletePrefix,
    DeleteRange,
    DiskFull,
    Failure,
    FeedTruncated,
    Forked,
    Job,
    JobLocked,
    JobNotFound,
    KeyRange,
    LeaseLost,
    Misuse,
    Op,
    Overloaded,
    Persistency,
    PersistencyError,
    Poisoned,
    Put,
    QuotaExceeded,
    RawKey,
    SchemaTooNew,
    StorageError,
    Unavailable,
    WriteFailed,
    key,
)
from tests.loops import LOOPS, InLoop

WAIT = 20.0
KEY_BYTES_MAX = 8192
PAYLOAD_BYTES_MAX = 256 * 1024 * 1024

Call = Callable[[Job, Any], object]


class BytesPath:
    """A path-like object whose path is bytes."""

    def __fspath__(self) -> bytes:
        return b"data"


def nested(depth: int) -> tuple[Any, ...]:
    """Return tuples within each other."""
    value: tuple[Any, ...] = ()
    for _ in range(depth):
        value = (value,)
    return value


def released() -> memoryview:
    """Return a view whose memory was given back."""
    view = memoryview(b"bytes")
    view.release()
    return view


def made_by(kind: type) -> Callable[..., Call]:
    """Return what makes a verb of an operation: posted, and committed."""

    def verb(post: str, *fields: Any) -> Call:
        def call(job: Job, value: Any) -> object:
            op = kind(*(value if field is ... else field for field in fields))
            return getattr(job, post)([Put("c", ("fine",), b""), op])

        return call

    return verb


def posted(name: str, kind: type, *fields: Any) -> dict[str, Call]:
    """Return an operation as an argument of both verbs that take operations."""
    return {f"{post}({name})": made_by(kind)(post, *fields) for post in ("persist", "commit")}


KEY_VERBS: dict[str, Call] = {
    "put": lambda job, value: job.put("c", value, b""),
    "delete": lambda job, value: job.delete("c", value),
    "get": lambda job, value: job.get("c", value),
    "entry": lambda job, value: job.entry("c", value),
    "exists": lambda job, value: job.exists("c", value),
    "delete_acked": lambda job, value: job.delete_acked("c", value),
    **posted("Put", Put, "c", ..., b""),
    **posted("Delete", Delete, "c", ...),
    **posted("Check", Check, "c", ..., None),
}
PREFIX_VERBS: dict[str, Call] = {
    "delete_prefix": lambda job, value: job.delete_prefix("c", value),
    "delete_prefix_acked": lambda job, value: job.delete_prefix_acked("c", value),
    "scan_prefix": lambda job, value: job.scan_prefix("c", value),
    **posted("DeletePrefix", DeletePrefix, "c", ...),
}
ITERATE_PREFIX: dict[str, Call] = {"iterate": lambda job, value: job.iterate("c", prefix=value)}
KEYS_VERBS: dict[str, Call] = {"get_many": lambda job, value: job.get_many("c", [("fine",), value])}
RANGE_VERBS: dict[str, Call] = {
    "delete_range": lambda job, value: job.delete_range("c", value),
    "delete_range_acked": lambda job, value: job.delete_range_acked("c", value),
    "count": lambda job, value: job.count("c", value),
    "scan": lambda job, value: job.scan("c", value),
    "iterate": lambda job, value: job.iterate("c", value),
    **posted("DeleteRange", DeleteRange, "c", ...),
}
CATEGORY_VERBS: dict[str, Call] = {
    "put": lambda job, value: job.put(value, ("k",), b""),
    "put of a ready key": lambda job, value: job.put(value, key("k"), b""),
    "delete": lambda job, value: job.delete(value, ("k",)),
    "delete_prefix": lambda job, value: job.delete_prefix(value, ("k",)),
    "delete_range": lambda job, value: job.delete_range(value, KeyRange(("k",))),
    "get": lambda job, value: job.get(value, ("k",)),
    "get of a ready key": lambda job, value: job.get(value, key("k")),
    "entry": lambda job, value: job.entry(value, ("k",)),
    "get_many": lambda job, value: job.get_many(value, [("k",)]),
    "exists": lambda job, value: job.exists(value, ("k",)),
    "count": lambda job, value: job.count(value),
    "scan": lambda job, value: job.scan(value),
    "scan_prefix": lambda job, value: job.scan_prefix(value, ("k",)),
    "iterate": lambda job, value: job.iterate(value),
    "delete_acked": lambda job, value: job.delete_acked(value, ("k",)),
    "delete_prefix_acked": lambda job, value: job.delete_prefix_acked(value, ("k",)),
    "delete_range_acked": lambda job, value: job.delete_range_acked(value, KeyRange(("k",))),
    **posted("Put", Put, ..., ("k",), b""),
    **posted("Delete", Delete, ..., ("k",)),
    **posted("DeletePrefix", DeletePrefix, ..., ("k",)),
    **posted("DeleteRange", DeleteRange, ..., KeyRange(("k",))),
    **posted("Check", Check, ..., ("k",), None),
}
PAYLOAD_VERBS: dict[str, Call] = {
    "put": lambda job, value: job.put("c", ("k",), value),
    "put of a ready key": lambda job, value: job.put("c", key("k"), value),
    **posted("Put", Put, "c", ("k",), ...),
}
OPS_VERBS: dict[str, Call] = {
    "persist": lambda job, value: job.persist(value),
    "commit": lambda job, value: job.commit(value),
}

# What comes, and what its message has to say about it besides the argument's name.
BAD_KEYS: dict[str, tuple[Any, str, str]] = {
    "a str": ("text", "str", '("text",)'),
    "bytes": (b"bytes", "bytes", "RawKey(data)"),
    "a list": (["a"], "list", "tuple(parts)"),
    "an int": (5, "int", "(part,)"),
    "a float": (1.5, "float", "(part,)"),
    "a dict": ({"a": 1}, "dict", "(part,)"),
    "a KeyRange": (KeyRange(), "KeyRange", "(part,)"),
    "a bytearray": (bytearray(b"x"), "bytearray", "pass"),
    "an object": (object(), "object", "(part,)"),
    "a list among the parts": (("a", ["b"]), "list", "tuple(part)"),
    "a set in a nested tuple": (("a", ("b", {"c"})), "set", "lists the types"),
    "an object among the parts": (("a", object()), "object", "lists the types"),
    "a complex among the parts": ((1 + 2j,), "complex", "lists the types"),
    "a surrogate": (("\ud800",), "surrogate", "bytes"),
    "a naive datetime": ((datetime(2024, 1, 1),), "naive", "UTC"),
    "an int of 256 bytes": ((1 << 2047,), "256", "at most 255"),
    "65 nested tuples": (nested(66), "nested too deep", "64"),
    "a RawKey among the parts": ((RawKey(b"x"), 1), "RawKey", "parts"),
    "a tuple too long": (("x" * KEY_BYTES_MAX,), str(KEY_BYTES_MAX + 2), f"at most {KEY_BYTES_MAX}"),
    "a Key too long": (key("x" * KEY_BYTES_MAX), str(KEY_BYTES_MAX + 2), f"at most {KEY_BYTES_MAX}"),
    "a RawKey too long": (RawKey(b"x" * (KEY_BYTES_MAX + 1)), str(KEY_BYTES_MAX + 1), f"at most {KEY_BYTES_MAX}"),
}
NO_KEY: tuple[Any, str, str] = (None, "NoneType", "(part,)")
BAD_CATEGORIES: dict[str, tuple[Any, str, str]] = {
    "bytes": (b"c", "bytes", "pass a name"),
    "an int": (5, "int", "pass a name"),
    "None": (None, "NoneType", "pass a name"),
    "a tuple": (("c",), "tuple", "pass a name"),
    "a list": (["c"], "list", "pass a name"),
    "a dict": ({}, "dict", "pass a name"),
    "empty": ("", "0", "1 to 255"),
    "256 letters": ("x" * 256, "256", "1 to 255"),
    "128 letters of two bytes": ("é" * 128, "256", "1 to 255"),
    "a surrogate": ("a\udc80", "surrogate", "UTF-8"),
}
BAD_PAYLOADS: dict[str, tuple[Any, str, str]] = {
    "a str": ("text", "str", "encode()"),
    "an int": (5, "int", "encode"),
    "None": (None, "NoneType", "encode"),
    "a list": ([1, 2], "list", "encode"),
    "a float": (1.5, "float", "encode"),
    "a dict": ({}, "dict", "encode"),
    "a tuple": ((b"x",), "tuple", "encode"),
    "an object": (object(), "object", "encode"),
    "a released memoryview": (released(), "memoryview", ""),
}
BAD_RANGES: dict[str, tuple[Any, str, str]] = {
    "a tuple": (("a",), "tuple", "KeyRange.prefix(key)"),
    "a Key": (key("a"), "Key", "KeyRange(start, stop)"),
    "None": (None, "NoneType", "KeyRange(start, stop)"),
    "bytes": (b"a", "bytes", "KeyRange(start, stop)"),
    "a range": (range(3), "range", "KeyRange(start, stop)"),
    "a slice": (slice(1, 2), "slice", "KeyRange(start, stop)"),
    "the class": (KeyRange, "type", "KeyRange(start, stop)"),
}
BAD_OPS: dict[str, tuple[Any, str, str]] = {
    "a str": ("ops", "str", "[Put(...), ...]"),
    "an empty str": ("", "str", "[Put(...), ...]"),
    "bytes": (b"ops", "bytes", "[Put(...), ...]"),
    "a dict": ({}, "dict", "[Put(...), ...]"),
    "a dict of ops": ({Delete("c", ("k",)): 1}, "dict", "[Put(...), ...]"),
    "an int": (5, "int", "[Put(...), ...]"),
    "None": (None, "NoneType", "[Put(...), ...]"),
    "the class": (Put, "type", "[Put(...), ...]"),
    "a list of ints": ([1], "int", "Put, Delete"),
    "a tuple that would be a put": (("put", "c", ("k",), b""), "str", "Put, Delete"),
    "a list in the list": ([[Put("c", ("k",), b"")]], "list", "Put, Delete"),
    "a class in the list": ([Put], "type", "Put, Delete"),
    "None behind an op": ([Put("c", ("k",), b""), None], "NoneType", "Put, Delete"),
    "a dict in the list": ([{"op": "put"}], "dict", "Put, Delete"),
}
BAD_COUNTS: dict[str, tuple[Any, str, str]] = {
    "negative": (-1, "-1", "at least"),
    "a bool": (True, "bool", "int"),
    "a float": (1.5, "float", "int"),
    "a str": ("1", "str", "int"),
    "a list": ([1], "list", "int"),
}
BAD_FLAGS: dict[str, tuple[Any, str, str]] = {
    "1": (1, "1", "True or False"),
    "0": (0, "0", "True or False"),
    "None": (None, "None", "True or False"),
    "a str": ("yes", "'yes'", "True or False"),
}
BAD_SECONDS: dict[str, tuple[Any, str, str]] = {
    "negative": (-1, "-1", "0 or more"),
    "negative, small": (-1e-9, "-1e-09", "0 or more"),
    "negative infinity": (float("-inf"), "-inf", "0 or more"),
    "NaN": (float("nan"), "nan", "0 or more"),
    "a bool": (True, "bool", "seconds"),
    "a str": ("1", "str", "seconds"),
    "a list": ([1], "list", "seconds"),
}
NO_SECONDS: dict[str, tuple[Any, str, str]] = {"None": (None, "NoneType", "seconds")}


def table(
    verbs: dict[str, Call], bad: dict[str, tuple[Any, str, str]], argument: str
) -> list[Any]:  # of pytest's parameters
    """Return a row of each verb with each wrong argument."""
    return [
        pytest.param(call, argument, *row, id=f"{verb}-{name}")
        for verb, call in verbs.items()
        for name, row in bad.items()
    ]


@pytest.fixture(scope="module")
def job() -> Iterator[Job]:
    """Give one job to all: nothing may ever arrive in it."""
    with Persistency(":memory:") as persistency, persistency.open_job("all") as opened:
        yield opened


def assert_told(error: Misuse, argument: str, got: str, instead: str) -> None:
    """Check the error's classes, and that it says what is wrong and what would be right."""
    assert isinstance(error, PersistencyError)
    assert isinstance(error, ValueError)
    assert isinstance(error, TypeError)
    assert argument in str(error)
    assert got in str(error)
    assert instead in f"{error} {error.hint}"
    assert error.hint
    assert error.retryable is False


def assert_refused(job: Job, call: Callable[[], object], argument: str, got: str, instead: str) -> None:
    """Check that a call raises at once, and has posted nothing."""
    before = job.statistics().accepted, job.version().result(WAIT)
    with pytest.raises(Misuse) as caught:
        call()
    assert_told(caught.value, argument, got, instead)
    assert (job.statistics().accepted, job.version().result(WAIT)) == before == (0, 0)
    assert not job.closed


ROWS = [
    *table(KEY_VERBS, BAD_KEYS | {"None": NO_KEY}, "key"),
    *table(PREFIX_VERBS, BAD_KEYS | {"None": NO_KEY}, "prefix"),
    *table(ITERATE_PREFIX, BAD_KEYS, "prefix"),
    *table(KEYS_VERBS, BAD_KEYS | {"None": NO_KEY}, "keys"),
    *table(CATEGORY_VERBS, BAD_CATEGORIES, "category"),
    *table(PAYLOAD_VERBS, BAD_PAYLOADS, "payload"),
    *table(RANGE_VERBS, BAD_RANGES, "key_range"),
    *table(OPS_VERBS, BAD_OPS, "ops"),
    *table(
        {
            "scan": lambda job, value: job.scan("c", limit=value),
            "scan_prefix": lambda job, value: job.scan_prefix("c", (), limit=value),
        },
        BAD_COUNTS,
        "limit",
    ),
    *table(
        {"iterate": lambda job, value: job.iterate("c", page=value)},
        BAD_COUNTS | {"0": (0, "0", "at least 1"), "None": (None, "NoneType", "int")},
        "page",
    ),
    *table(
        posted("Check", Check, "c", ("k",), ...), BAD_COUNTS | {"bytes": (b"1", "bytes", "int")}, "version"
    ),
    *table(
        {
            "scan": lambda job, value: job.scan("c", reverse=value),
            "scan_prefix": lambda job, value: job.scan_prefix("c", (), reverse=value),
            "iterate": lambda job, value: job.iterate("c", reverse=value),
        },
        BAD_FLAGS,
        "reverse",
    ),
    *table({"iterate": lambda job, value: job.iterate("c", keys_only=value)}, BAD_FLAGS, "keys_only"),
    *table({"flush": lambda job, value: job.flush(sync=value)}, BAD_FLAGS, "sync"),
    *table({"close": lambda job, value: job.close(drain=value)}, BAD_FLAGS, "drain"),
    *table({"close": lambda job, value: job.close(value)}, BAD_SECONDS, "timeout"),
    *table(
        {"get_many": lambda job, value: job.get_many("c", value)},
        {
            "a str": ("keys", "str", "[key, ...]"),
            "bytes": (b"keys", "bytes", "[key, ...]"),
            "a Key": (key("a"), "Key", "[key, ...]"),
            "None": (None, "NoneType", "[key, ...]"),
            "an int": (5, "int", "[key, ...]"),
            "the parts of one": (("a", 1), "str", '("a",)'),
            "a bytearray": (bytearray(b"a"), "int", "(part,)"),
        },
        "keys",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "argument", "value", "got", "instead"), ROWS)
def test_a_wrong_argument_is_refused_at_the_call(
    job: Job, call: Call, argument: str, value: Any, got: str, instead: str
) -> None:
    """Promise of section 3: a wrong argument raises `Misuse` at the call, names itself, and nothing is posted."""
    assert_refused(job, lambda: call(job, value), argument, got, instead)


def test_a_wrong_argument_is_refused_in_the_callers_thread_of_an_event_loop(job: Job, in_loop: InLoop) -> None:
    """In an event loop, too, the call itself raises, not the awaiting of its reply."""

    async def main() -> None:
        anything: Any = job
        assert_told(pytest.raises(Misuse, anything.get, "c", "text").value, "key", "str", "pass")
        assert_told(pytest.raises(Misuse, anything.commit, 5).value, "ops", "int", "pass")
        assert_told(pytest.raises(Misuse, anything.put, "", ("k",), b"").value, "category", "0", "1 to 255")

    in_loop(main)
    assert job.statistics().accepted == 0


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda job: job.delete_prefix("c", ()), "prefix"),
        (lambda job: job.delete_prefix("c", key()), "prefix"),
        (lambda job: job.delete_prefix("c", RawKey(b"")), "prefix"),
        (lambda job: job.delete_prefix_acked("c", ()), "prefix"),
        (lambda job: job.delete_prefix_acked("c", RawKey(b"")), "prefix"),
        (lambda job: job.persist(DeletePrefix("c", ())), "prefix"),
        (lambda job: job.commit([DeletePrefix("c", ())]), "prefix"),
        (lambda job: job.delete_range("c", KeyRange()), "key_range"),
        (lambda job: job.delete_range("c", KeyRange((), None)), "key_range"),
        (lambda job: job.delete_range("c", KeyRange.prefix(())), "key_range"),
        (lambda job: job.delete_range_acked("c", KeyRange()), "key_range"),
        (lambda job: job.persist(DeleteRange("c", KeyRange())), "key_range"),
        (lambda job: job.commit([DeleteRange("c", KeyRange())]), "key_range"),
    ],
)
def test_deleting_a_whole_category_by_an_empty_argument_is_refused(
    job: Job, call: Callable[[Job], object], argument: str
) -> None:
    """An empty prefix or an unbounded range deletes nothing: it is `Misuse` (D-46 of other engines deleted it all)."""
    assert_refused(job, lambda: call(job), argument, "would delete the whole category", "at")


def test_a_range_and_a_prefix_together_are_refused(job: Job) -> None:
    """`iterate` takes a range or a prefix, not both."""
    assert_refused(job, lambda: job.iterate("c", KeyRange(("a",)), prefix=("b",)), "prefix", "key_range", "one of them")


def test_a_payload_at_the_limit_is_taken_and_one_byte_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of a payload is exact, for `put` and in operations."""
    monkeypatch.setattr("persistency.arguments.PAYLOAD_BYTES_MAX", 9_000)
    with Persistency(":memory:") as persistency, persistency.open_job() as job:
        job.put("c", key("k"), bytes(9_000))
        job.persist(Put("c", ("k",), bytes(9_000)))
        for payload in (bytes(9_001), bytearray(9_001), memoryview(bytes(9_001)), array("B", bytes(9_001))):
            for call in PAYLOAD_VERBS.values():
                with pytest.raises(Misuse, match="payload has 9001 bytes, at most 9000"):
                    call(job, payload)
        assert job.statistics().accepted == 2


def test_a_payload_over_256_mib_is_refused(job: Job) -> None:
    """A payload of 256 MiB and a byte is `Misuse`, whatever bytes-like object it comes in."""
    with mmap.mmap(-1, PAYLOAD_BYTES_MAX + 1) as sparse:
        got, instead = str(PAYLOAD_BYTES_MAX + 1), f"at most {PAYLOAD_BYTES_MAX}"
        assert_refused(job, lambda: job.put("c", ("k",), sparse), "payload", got, instead)  # type: ignore[arg-type]


def test_keys_of_8_kib_are_taken_by_every_verb() -> None:
    """The limit of a key is exact: 8,192 bytes are stored, read, scanned and deleted."""
    longest = key("x" * (KEY_BYTES_MAX - 2))
    assert len(longest) == KEY_BYTES_MAX
    with Persistency(":memory:") as persistency, persistency.open_job() as job:
        job.put("c", longest, b"1")
        assert job.get("c", longest).result(WAIT) == b"1"
        assert [row.key for row in job.scan_prefix("c", longest).result(WAIT)] == [longest]
        assert list(job.iterate("c", prefix=longest, keys_only=True)) == [longest]
        assert job.delete_prefix_acked("c", longest).result(WAIT) == 1


def test_names_of_255_bytes_are_taken() -> None:
    """The limit of a category's name is exact, in UTF-8 bytes."""
    names = ["x" * 255, "é" * 127 + "x", "a", "\0"]
    with Persistency(":memory:") as persistency, persistency.open_job() as job:
        for name in names:
            job.put(name, (), b"")
        assert sorted(job.categories().result(WAIT)) == sorted(names)


@pytest.mark.parametrize("huge", [2**31, 2**63 - 1, 2**63, 2**200])
@pytest.mark.parametrize("memory", [True, False])
def test_a_limit_larger_than_any_table_is_no_limit(tmp_path: Path, memory: bool, huge: int, in_loop: InLoop) -> None:
    """A limit, a page or a version of any size is a whole number like others, in a thread and in a loop."""
    with Persistency(":memory:" if memory else tmp_path) as persistency, persistency.open_job() as job:
        job.put("c", ("k",), b"1")
        assert len(job.scan("c", limit=huge).result(WAIT)) == 1
        assert len(job.scan_prefix("c", (), limit=huge).result(WAIT)) == 1
        assert len(list(job.iterate("c", page=huge))) == 1
        with pytest.raises(Conflict):
            job.commit(Check("c", ("k",), huge)).result(WAIT)

        async def main() -> int:
            return len(await job.scan("c", limit=huge)) + len([row async for row in job.iterate("c", page=huge)])

        assert in_loop(main) == 2


@pytest.mark.parametrize("post", ["persist", "commit"])
@pytest.mark.parametrize("memory", [True, False])
def test_a_generator_of_ops_that_raises_posts_nothing(tmp_path: Path, post: str, memory: bool) -> None:
    """Operations may come from a generator; if it raises, its error comes out and nothing was posted."""

    def ops() -> Iterator[Op]:
        yield Put("c", ("k",), b"")
        raise ZeroDivisionError

    with Persistency(":memory:" if memory else tmp_path) as persistency, persistency.open_job() as job:
        with pytest.raises(ZeroDivisionError):
            getattr(job, post)(ops())
        with pytest.raises(ZeroDivisionError):
            job.get_many("c", (1 / 0 for _ in range(3)))  # type: ignore[misc]
        assert job.statistics().accepted == job.version().result(WAIT) == job.count("c").result(WAIT) == 0


# -- unknown keywords, and how arguments are passed -------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda job: job.put("c", (), b"", nonsense=1),
        lambda job: job.delete("c", (), nonsense=1),
        lambda job: job.delete_prefix("c", ("a",), nonsense=1),
        lambda job: job.delete_range("c", KeyRange(("a",)), nonsense=1),
        lambda job: job.persist([], nonsense=1),
        lambda job: job.get("c", (), nonsense=1),
        lambda job: job.entry("c", (), nonsense=1),
        lambda job: job.get_many("c", [], nonsense=1),
        lambda job: job.exists("c", (), nonsense=1),
        lambda job: job.count("c", nonsense=1),
        lambda job: job.scan("c", nonsense=1),
        lambda job: job.scan_prefix("c", (), nonsense=1),
        lambda job: job.iterate("c", nonsense=1),
        lambda job: job.categories(nonsense=1),
        lambda job: job.commit([], nonsense=1),
        lambda job: job.delete_acked("c", (), nonsense=1),
        lambda job: job.delete_prefix_acked("c", ("a",), nonsense=1),
        lambda job: job.delete_range_acked("c", KeyRange(("a",)), nonsense=1),
        lambda job: job.version(nonsense=1),
        lambda job: job.flush(nonsense=1),
        lambda job: job.drain(nonsense=1),
        lambda job: job.statistics(nonsense=1),
        lambda job: job.close(nonsense=1),
        lambda _job: Put("c", (), b"", nonsense=1),  # type: ignore[call-arg]
        lambda _job: Check("c", (), None, nonsense=1),  # type: ignore[call-arg]
        lambda _job: Persistency(":memory:", nonsense=1),  # type: ignore[call-arg]
        lambda _job: Persistency(":memory:").open_job("a", nonsense=1),  # type: ignore[call-arg]
        *(
            lambda _job, run=run: run(Persistency(":memory:").aopen_job, "a", nonsense=1)  # type: ignore[misc]
            for run in LOOPS.values()
        ),
    ],
)
def test_an_unknown_keyword_is_pythons_own_type_error(job: Job, call: Callable[[Any], object]) -> None:
    """An unknown keyword is a plain `TypeError` that names it."""
    with pytest.raises(TypeError, match="nonsense") as caught:
        call(job)
    assert not isinstance(caught.value, PersistencyError)
    assert job.statistics().accepted == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda job: job.scan("c", KeyRange(), True),
        lambda job: job.scan_prefix("c", (), True),
        lambda job: job.iterate("c", KeyRange(), ("a",)),
        lambda job: job.flush(True),
        lambda job: job.close(1.0, False),
        lambda _job: Persistency(":memory:", 1.0),  # type: ignore[call-arg]
        lambda _job: Persistency(":memory:").open_job("a", "power"),  # type: ignore[call-arg]
    ],
)
def test_options_are_passed_by_name(job: Job, call: Callable[[Any], object]) -> None:
    """What changes how a verb works has to be named at the call."""
    with pytest.raises(TypeError, match="positional argument"):
        call(job)
    assert not job.closed


# -- the root -----------------------------------------------------------------------------------------------------


def lies_under_a_file(folder: Path) -> Path:
    """Return a path below a file."""
    (folder / "file").write_text("x")
    return folder / "file" / "below" / "deeper"


def is_a_file(folder: Path) -> str:
    """Return the path of a file."""
    (folder / "file").write_text("x")
    return str(folder / "file")


def is_a_pipe(folder: Path) -> Path:
    """Return the path of a pipe."""
    os.mkfifo(folder / "pipe")
    return folder / "pipe"


BAD_ROOTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "S3-1: empty": (lambda _folder: "", "empty"),
    "S3-2: a file": (is_a_file, "is a file"),
    "S3-3: under a file": (lies_under_a_file, "lies under"),
    "a pipe": (is_a_pipe, "pipe"),
    "bytes": (lambda _folder: b"data", "bytes"),
    "an int": (lambda _folder: 5, "int"),
    "None": (lambda _folder: None, "NoneType"),
    "a list": (lambda _folder: ["data"], "list"),
    "a path of bytes": (lambda _folder: BytesPath(), "BytesPath"),
    "a NUL": (lambda folder: f"{folder}/a\0b", "root"),
    "a NUL in the middle": (lambda folder: f"{folder}/a\0b/c", "root"),
    "a URL of an unknown scheme": (lambda _folder: "redis://localhost/0", "redis"),
    "a URL of an engine that isn't there": (lambda _folder: "mysql://localhost/db", "mysql"),
    "a URL with a parameter that isn't one": (
        lambda _folder: "postgresql://h/db?persistency_leese=5",
        "persistency_leese",
    ),
    "a URL with a parameter out of bounds": (
        lambda _folder: "postgresql://h/db?persistency_lease=0",
        "persistency_lease",
    ),
}


@pytest.mark.parametrize(("make", "got"), BAD_ROOTS.values(), ids=BAD_ROOTS.keys())
@pytest.mark.parametrize("entrance", ["constructor", "instance"])
def test_a_wrong_root_is_refused_at_construction(
    tmp_path: Path, make: Callable[[Path], Any], got: str, entrance: str
) -> None:
    """S3-1..3: a root that can't be a directory is `Misuse` at once, and nothing is created or changed."""
    root = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    if entrance == "instance" and root is None:
        pytest.raises(Closed, Persistency.instance, root)  # S3-10: no root named, and none made yet
        return
    with pytest.raises(Misuse) as caught:
        Persistency(root) if entrance == "constructor" else Persistency.instance(root)
    assert_told(caught.value, "root", got, "pass")
    assert sorted(tmp_path.rglob("*")) == before
    pytest.raises(Closed, Persistency.instance)


def test_a_file_that_stands_as_the_root_later_is_reported_by_the_opening(tmp_path: Path) -> None:
    """S3-7: a root that can't be created when the first job opens raises with the system's error as the cause."""
    with Persistency(tmp_path / "root") as persistency:
        (tmp_path / "root").write_text("in the way")
        with pytest.raises(Unavailable) as caught:
            persistency.open_job("a")
        assert isinstance(caught.value.__cause__, OSError)
        (tmp_path / "root").unlink()
        persistency.open_job("a")


ENGINE_ROWS = [
    pytest.param({option: row[0]}, option, *row[1:], id=f"{option}-{name}")
    for option, bad in (
        ("open_timeout", BAD_SECONDS),
        ("exit_timeout", BAD_SECONDS | NO_SECONDS),
        ("clock", {"an int": (5, "int", "time.time"), "a str": ("now", "str", "time.time")}),
    )
    for name, row in bad.items()
]


@pytest.mark.parametrize(("options", "argument", "got", "instead"), ENGINE_ROWS)
def test_a_wrong_option_of_the_root_is_refused(options: dict[str, Any], argument: str, got: str, instead: str) -> None:
    """An option of `Persistency` is checked when it is made."""
    assert_told(pytest.raises(Misuse, Persistency, ":memory:", **options).value, argument, got, instead)


# -- opening a job ------------------------------------------------------------------------------------------------

BAD_IDS: dict[str, tuple[Any, str, str]] = {
    "empty": ("", "empty", "at least one character"),
    "an int": (5, "int", "as text"),
    "bytes": (b"a", "bytes", "as text"),
    "a list": (["a"], "list", "as text"),
    "a path": (Path("a"), "Path", "as text"),
    "a surrogate": ("a\udc80", "surrogate", "UTF-8"),
    "too long": ("a" * 198, "201", "shorter"),
    "too long once escaped": ("é" * 33, "201", "shorter"),
}
BAD_OPTIONS: dict[str, dict[str, tuple[Any, str, str]]] = {
    **dict.fromkeys(
        ("mailbox_ops_max", "mailbox_bytes_max", "requests_max"),
        BAD_COUNTS | {"0": (0, "0", "at least 1"), "None": (None, "NoneType", "int")},
    ),
    "durability": {
        "paranoid": ("paranoid", "'paranoid'", "'process', 'power'"),
        "None": (None, "None", "'process', 'power'"),
        "a list": (["power"], "['power']", "'process', 'power'"),
    },
    "on_full": {
        "drop": ("drop", "'drop'", "'block', 'raise'"),
        "None": (None, "None", "'block', 'raise'"),
        "a bool": (True, "True", "'block', 'raise'"),
    },
    "full_timeout": BAD_SECONDS,
    "stall_timeout": BAD_SECONDS | NO_SECONDS,
    "inline": BAD_FLAGS,
    "on_error": {"a str": ("print", "str", "f(job_id, failures)"), "an int": (5, "int", "f(job_id, failures)")},
}
OPTION_ROWS = [
    pytest.param(option, *row, id=f"{option}-{name}")
    for option, bad in BAD_OPTIONS.items()
    for name, row in bad.items()
]


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Persistency]:
    """Give a root that doesn't exist yet, and check that no call has created it."""
    with Persistency(tmp_path / "root") as persistency:
        threads = set(threading.enumerate())
        yield persistency
        assert list(persistency) == []
        assert list(tmp_path.iterdir()) == []
        assert set(threading.enumerate()) <= threads


@pytest.mark.parametrize(("option", "value", "got", "instead"), OPTION_ROWS)
def test_a_wrong_option_of_a_job_is_refused(
    fresh: Persistency, option: str, value: Any, got: str, instead: str, in_loop: InLoop
) -> None:
    """An option of `open_job` is checked at the call: no file and no thread comes of it."""
    assert_told(pytest.raises(Misuse, fresh.open_job, "a", **{option: value}).value, option, got, instead)

    async def main() -> None:
        with pytest.raises(Misuse) as caught:
            await fresh.aopen_job("a", **{option: value})
        assert_told(caught.value, option, got, instead)

    in_loop(main)


ID_VERBS: dict[str, Callable[[Persistency, Any], object]] = {
    "open_job": lambda persistency, value: persistency.open_job(value),
    "aopen_job": lambda persistency, value: LOOPS["asyncio"](persistency.aopen_job, value),
    "aopen_job under trio": lambda persistency, value: LOOPS["trio"](persistency.aopen_job, value),
    "job": lambda persistency, value: persistency.job(value),
    "[]": lambda persistency, value: persistency[value],
    "drop_job": lambda persistency, value: persistency.drop_job(value),
    "adrop_job": lambda persistency, value: LOOPS["asyncio"](persistency.adrop_job, value),
    "adrop_job under trio": lambda persistency, value: LOOPS["trio"](persistency.adrop_job, value),
    "close_job": lambda persistency, value: persistency.close_job(value),
    "has_job": lambda persistency, value: persistency.has_job(value),
}
ID_ROWS = [
    pytest.param(call, *row, id=f"{verb}-{name}") for verb, call in ID_VERBS.items() for name, row in BAD_IDS.items()
]


@pytest.mark.parametrize(("call", "value", "got", "instead"), ID_ROWS)
def test_a_wrong_job_id_is_refused(
    fresh: Persistency, call: Callable[[Persistency, Any], object], value: Any, got: str, instead: str
) -> None:
    """Every verb by id refuses what can be no id, also where it would find nothing anyway."""
    with pytest.raises(Misuse) as caught:
        call(fresh, value)
    assert_told(caught.value, "job_id", got, instead)


@pytest.mark.parametrize("value", [5, b"a", None, ["a"], "", "\udc80"])
def test_what_can_be_no_id_is_not_in_a_persistency(fresh: Persistency, value: Any) -> None:
    """`in` answers False for whatever isn't an open id, as containers do."""
    assert (value in fresh) is False


@pytest.mark.parametrize("memory", [True, False])
def test_the_longest_job_id_is_taken(tmp_path: Path, memory: bool) -> None:
    """The limit of an id is exact, and the same in memory."""
    with Persistency(":memory:" if memory else tmp_path) as persistency:
        for job_id in ("a" * 197, "é" * 32 + "aaaaa"):
            assert persistency.open_job(job_id).id == job_id
            pytest.raises(Misuse, persistency.open_job, job_id + "a")


@pytest.mark.parametrize("value", [row[0] for row in BAD_SECONDS.values()])
def test_a_wrong_timeout_leaves_everything_open(value: Any) -> None:
    """A wrong timeout of `close_job`, or of closing all, is refused before anything is closed or forgotten."""
    with Persistency(":memory:") as persistency, persistency.open_job("a") as job:
        assert_told(pytest.raises(Misuse, persistency.close_job, "a", value).value, "timeout", "", "seconds")
        assert_told(pytest.raises(Misuse, persistency.close, value).value, "timeout", "", "seconds")
        assert persistency["a"] is job
        job.put("c", ("k",), b"1")
        assert job.get("c", ("k",)).result(WAIT) == b"1"


@pytest.mark.parametrize("seconds", [0, 1e300, float("inf"), 10**400], ids=["0", "1e300", "inf", "10**400"])
def test_a_timeout_of_any_length_is_taken(seconds: float) -> None:
    """Zero is a timeout, and one longer than a lock can be told to wait is as long as it takes."""
    with Persistency(":memory:", exit_timeout=seconds) as persistency:
        job = persistency.open_job("a", full_timeout=seconds, stall_timeout=seconds)
        if seconds:
            job.close(seconds)


# -- keys and ranges as such --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "argument", "got"),
    [
        (lambda: KeyRange("a"), "start", "str"),  # type: ignore[arg-type]
        (lambda: KeyRange(b"a"), "start", "bytes"),  # type: ignore[arg-type]
        (lambda: KeyRange(None, "b"), "stop", "str"),  # type: ignore[arg-type]
        (lambda: KeyRange(stop=5), "stop", "int"),  # type: ignore[arg-type]
        (lambda: KeyRange(("x" * KEY_BYTES_MAX,)), "start", str(KEY_BYTES_MAX + 2)),
        (lambda: KeyRange.prefix("a"), "prefix", "str"),  # type: ignore[arg-type]
        (lambda: KeyRange.prefix(["a"]), "prefix", "list"),  # type: ignore[arg-type]
        (lambda: KeyRange.text_prefix(("a",), b"x"), "text", "bytes"),  # type: ignore[arg-type]
        (lambda: KeyRange.text_prefix("a", "x"), "parent", "str"),  # type: ignore[arg-type]
        (lambda: KeyRange.text_prefix(RawKey(b"a"), "x"), "parent", "RawKey"),
    ],
)
def test_a_wrong_bound_of_a_range_is_refused(call: Callable[[], object], argument: str, got: str) -> None:
    """A range is checked when it is made, and its error names the side."""
    assert_told(pytest.raises(Misuse, call).value, argument, got, "")


# -- the errors themselves ----------------------------------------------------------------------------------------

FAILURE = Failure(Put("c", key("k"), b"1"), Conflict(key("k"), 1, None))
ERRORS: list[tuple[PersistencyError, bool]] = [
    (PersistencyError("words"), False),
    (Misuse("words"), False),
    (JobNotFound("words"), False),
    (Closed("words"), False),
    (Forked("words"), False),
    (Conflict(key("k", 1), 3, 4), True),
    (Conflict(key("k", 1), None, 4), True),
    (QuotaExceeded(11, 10), False),
    (Overloaded("words"), True),
    (WriteFailed([FAILURE], 3), False),
    (Poisoned("words"), False),
    (JobLocked("words", 42), True),
    (LeaseLost("words"), False),
    (FeedTruncated(7), False),
    (SchemaTooNew("words"), False),
    (StorageError("words", 266), False),
    (DiskFull("words", 13), True),
    (Corrupt("words", 11), False),
    (Unavailable("words", 14), True),
    (Closed("words", hint="A hint of its own."), False),
]


def told(error: BaseException) -> Any:
    """Return all that an error tells, in a form that can be compared."""
    kept = {name: told(value) if isinstance(value, BaseException) else value for name, value in vars(error).items()}
    if isinstance(error, WriteFailed):
        kept["failures"] = [(failure.op, told(failure.error), failure.outcome) for failure in error.failures]
    return type(error), str(error), getattr(error, "hint", None), getattr(error, "retryable", None), kept


@pytest.mark.parametrize(
    "duplicate",
    [
        copy.copy,
        copy.deepcopy,
        *(
            lambda error, protocol=protocol: pickle.loads(pickle.dumps(error, protocol))
            for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
        ),
    ],
)
@pytest.mark.parametrize(("error", "retryable"), ERRORS, ids=lambda value: type(value).__name__)
def test_every_error_survives_pickle_and_copy(
    error: PersistencyError, retryable: bool, duplicate: Callable[[Any], Any]
) -> None:
    """Every error has a hint and says whether trying again can help, and is the same after pickle and copy."""
    assert error.retryable is retryable
    assert isinstance(error.hint, str)
    assert error.hint.strip()
    assert told(duplicate(error)) == told(error)


def test_the_list_of_errors_is_complete() -> None:
    """No public error is missing in the list above."""

    def family(kind: type[PersistencyError]) -> set[type[PersistencyError]]:
        return {kind}.union(*(family(below) for below in kind.__subclasses__()))

    assert {kind for kind in family(PersistencyError) if kind.__module__ == "persistency.errors"} == {
        type(error) for error, _ in ERRORS
    }


def test_errors_carry_what_the_caller_needs() -> None:
    """The attributes of the errors are those of section 3, and the messages are whole sentences about them."""
    conflict, locked, quota = Conflict(key("k"), 1, None), JobLocked("words", 42), QuotaExceeded(11, 10)
    failed = WriteFailed([FAILURE], 3)
    assert (conflict.key, conflict.expected, conflict.actual) == (key("k"), 1, None)
    assert str(conflict) == "key('k'): expected version 1, found no row"
    assert (locked.pid, JobLocked("words").pid) == (42, None)
    assert (quota.used, quota.limit) == (11, 10)
    assert (failed.failures, failed.omitted) == ((FAILURE,), 3)
    assert str(failed).startswith("4 posted writes failed; the first: ")
    assert str(JobNotFound("no open job")) == "no open job"
    assert (StorageError("words", 266).code, FeedTruncated(7).oldest) == (266, 7)
