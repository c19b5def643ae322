r"""Prefix lists and prefix deletes are exact to the byte: 10,000 random cases against a plain model, on both adapters.

A case has a category of its own with a few rows, most of them lookalikes of the prefix that is asked for: another
case, a wildcard spelled out, a NUL, 0xFF or a letter more, a type that prints alike. Three kinds of prefix are asked
for: whole parts of tuples, the beginning of a text, and raw bytes. What is expected comes from the model below, which
knows tuples, text and `startswith`, and nothing of the encoding of keys. A case is made of its kind and its seed
alone; a failure names both, and `check_case(job, kind, seed)` runs it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import apsw
import pytest

from persistency import DeletePrefix, DeleteRange, Job, Key, KeyRange, Misuse, Persistency, Put, RawKey, Row, key

WAIT = 20.0  # seconds a test waits for what must come
CASES = {"parts": 2_000, "text": 1_500, "bytes": 1_500}  # of each kind, for each of the two adapters

LETTERS = [*"%_\\%_\\%_\\aAbBzZ\"'*?[]^$.:/ ", "\0", "\x01", "\x7f", "\xff", "é", "É", "ß", "ı", "İ", "K", "\ud7ff"]
LETTERS += ["\ue000", "\uffff", "\U0001f600", "\U0010ffff"]
BYTES = [*b'%_\\aA"', 0x00, 0x00, 0x01, 0x02, 0x05, 0x7F, 0x80, 0xFE, 0xFF, 0xFF, 0xFF]
INTS = [0, 1, 2, 9, 10, 127, 128, 255, 256, 257, 65_535, 65_536, 2**32, 2**63, 2**64 - 1, 2**64, 2**80]


NAMES = ["Ab", "x%_", 'B"', "a\\", "É"]  # of categories


@pytest.fixture(params=["memory", "directory"])
def job(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Job]:
    """Give an empty job over either adapter."""
    with Persistency(":memory:" if request.param == "memory" else tmp_path / "root") as persistency:
        yield persistency.open_job("job")


# -- the model ----------------------------------------------------------------------------------------------------

RANKS = {type(None): 0, bytes: 1, str: 2, tuple: 3, int: 4, float: 5, bool: 6}


def place(part: Any) -> tuple[int, Any]:
    """Return what a part sorts and compares by: its type, then its value; so `1`, `1.0` and `True` are three."""
    inner = tuple(map(place, part)) if type(part) is tuple else 0 if part is None else part
    return RANKS[type(part)], inner


def places(parts: tuple[Any, ...]) -> tuple[tuple[int, Any], ...]:
    """Return what a tuple sorts and compares by."""
    return tuple(map(place, parts))


@dataclass
class Case:
    """A prefix, how to ask for it, and the rows around it.

    `sorts` is what a plain key sorts by, `matches` whether it begins with the prefix, `encoded` the key to store.
    """

    names: list[Any]
    prefix: Any  # what scan_prefix and its like take; `None`: only a range can say it
    span: KeyRange
    sorts: Callable[[Any], Any]
    matches: Callable[[Any], bool]
    encoded: Callable[[Any], Key]


def parts_case(rng: Random) -> Case:
    """Make a case of tuples and a prefix of whole parts."""
    base = tuple(some_part(rng) for _ in range(rng.randint(1, 3)))
    names = [base, *(base + (some_part(rng),) for _ in range(rng.randint(0, 3)))]
    for _ in range(rng.randint(2, 6)):
        at = rng.randrange(len(base))
        similar = base[:at] + (lookalike(rng, base[at]),) + base[at + 1 :]
        names.append(rng.choice([similar, similar + (some_part(rng),), similar[: at + 1]]))
    names.append(rng.choice([(), base[:-1], (some_part(rng),), (base,)]))
    prefix = rng.choice([base, base, base, rng.choice(names), base[:-1], base + (None,)])
    wanted = places(prefix)
    return Case(
        names,
        rng.choice([prefix, key(*prefix)]),
        KeyRange.prefix(prefix),
        places,
        lambda name: places(name)[: len(wanted)] == wanted,
        lambda name: key(*name),
    )


def text_case(rng: Random) -> Case:
    """Make a case of tuples and the beginning of a text that is their next part."""
    parent = tuple(some_part(rng) for _ in range(rng.choice([0, 1, 1, 2])))
    text = some_text(rng)
    names: list[tuple[Any, ...]] = [parent, parent + (text,)]
    for _ in range(rng.randint(4, 9)):
        start = rng.choice([text, text, lookalike(rng, text)])
        part = start + some_text(rng) if isinstance(start, str) and rng.random() < 0.6 else start
        tail = (some_part(rng),) if rng.random() < 0.3 else ()
        names.append((parent[:-1] if rng.random() < 0.15 else parent) + (part,) + tail)
    depth, wanted = len(parent), places(parent)

    def matches(name: tuple[Any, ...]) -> bool:
        begins = len(name) > depth and places(name[:depth]) == wanted
        return begins and type(name[depth]) is str and name[depth].startswith(text)

    return Case(names, None, KeyRange.text_prefix(parent, text), places, matches, lambda name: key(*name))


def bytes_case(rng: Random) -> Case:
    """Make a case of keys in an encoding of their own and a prefix of bytes."""
    base = some_bytes(rng)
    names = [base, *(base + some_bytes(rng) for _ in range(rng.randint(1, 4)))]
    names += [similar_bytes(rng, base) + rng.choice([b"", some_bytes(rng)]) for _ in range(rng.randint(2, 6))]
    prefix = rng.choice([base, base, base, base[:-1], b"\xff" * rng.randint(1, 3), rng.choice(names)])
    wanted = RawKey(prefix)
    return Case(names, wanted, KeyRange.prefix(wanted), bytes, lambda name: name.startswith(prefix), RawKey)


KINDS: dict[str, Callable[[Random], Case]] = {"parts": parts_case, "text": text_case, "bytes": bytes_case}


# -- nasty things -------------------------------------------------------------------------------------------------


def some_text(rng: Random) -> str:
    """A short text of nasty letters."""
    return "".join(rng.choices(LETTERS, k=rng.choice([0, 1, 1, 2, 2, 3, 5])))


def some_bytes(rng: Random) -> bytes:
    """A few nasty bytes."""
    return bytes(rng.choices(BYTES, k=rng.choice([0, 1, 1, 2, 3, 4])))


def some_part(rng: Random, depth: int = 0) -> Any:
    """A part of a key, texts more often than others."""
    kinds = rng.random()
    if kinds < 0.45:
        return some_text(rng)
    if kinds < 0.65:
        return some_bytes(rng)
    if kinds < 0.85:
        return rng.choice(INTS) * rng.choice([1, -1])
    if kinds < 0.95 and depth < 3:
        return tuple(some_part(rng, depth + 1) for _ in range(rng.randint(0, 2)))
    return rng.choice([None, True, False, 0.0, 1.0, -1.5])


def lookalike(rng: Random, part: Any) -> Any:
    """Return another part that a careless comparison takes for this one, or for one that begins with it."""
    if isinstance(part, str):
        other: Any = similar_text(rng, part)
        return rng.choice([other] * 8 + [part.encode(), (part,), part + other])
    if isinstance(part, bytes):
        return rng.choice([similar_bytes(rng, part)] * 4 + [part.decode("latin-1"), (part,)])
    if isinstance(part, tuple):
        others = [part + (None,), part[:-1], (part,), part + (b"\xff",)]
        if part:
            others += [(lookalike(rng, part[0]), *part[1:]), (*part[:-1], lookalike(rng, part[-1])), part[0]]
        return rng.choice(others)
    if part is None:
        return rng.choice([0, b"", "", (), False])
    number = int(part)
    return rng.choice([number + 1, number - 1, -number, number * 256, float(number % 1000), str(number), bool(number)])


def similar_text(rng: Random, text: str) -> str:
    """Return another text that a careless comparison takes for this one, or for its beginning."""
    at = rng.randrange(len(text) + 1)
    letter = text[at : at + 1]
    wild = letter in ("%", "_", "\\", "*", "?")
    changes = [
        text.swapcase(),
        text.upper(),
        text.casefold(),
        text[:at] + ("xY" if wild else "") + text[at + 1 :],
        text[:at] + ("x" if wild else "_") + text[at + 1 :],
        text[:at] + "\\" + text[at:],
        text.replace("%", "zz").replace("_", "q").replace("\\", ""),
        text + rng.choice(["\0", "\xff", "\U0010ffff", "%", "_", "\0\xff"]),
        text[:-1],
        text[:-1] + next_letter(text[-1:]),
    ]
    return rng.choice(changes)


def next_letter(letter: str) -> str:
    """Return the letter behind one; text of other letters than these must not begin with it."""
    return chr(ord(letter) + 1) if letter and letter not in ("\ud7ff", "\U0010ffff") else "\0"


def similar_bytes(rng: Random, data: bytes) -> bytes:
    """Return other bytes that a careless comparison takes for these, or for their beginning."""
    changes = [
        data.swapcase(),
        data + rng.choice([b"\0", b"\xff", b"\xff\xff", b"\0\xff", b"%"]),
        data[:-1],
        data[:-1] + bytes((min(data[-1] + 1, 255),)) if data else b"\0",
        data[:-1] + bytes((max(data[-1] - 1, 0),)) if data else b"\xff",
        data.replace(b"%", b"zz").replace(b"_", b"q").replace(b"\\", b""),
        data.rstrip(b"\xff"),
    ]
    return rng.choice(changes)


# -- cases --------------------------------------------------------------------------------------------------------

Contents = dict[str, list[Row]]


def check_case(job: Job, kind: str, seed: int, kept: Contents | None = None) -> None:
    """Run a case in categories of its own; add to `kept` what they have to hold afterwards."""
    rng = Random(f"{kind} {seed}")
    case = KINDS[kind](rng)
    named = {case.sorts(name): name for name in case.names}
    stored, inside, outside = [], [], []
    for place_of_name in sorted(named):
        name = named[place_of_name]
        row = Row(case.encoded(name), rng.randbytes(rng.choice([0, 1, 9])))
        stored.append(row)
        (inside if case.matches(name) else outside).append(row)
    category = f"{rng.choice(NAMES)} {kind} {seed}"
    holding = {category: stored}
    if rng.random() < 0.3:
        holding[category.swapcase()] = stored  # the same rows next door
    puts = [Put(name, row.key, row.payload) for name, held in holding.items() for row in held]
    job.persist(rng.sample(puts, len(puts)))

    check_lists(job, category, case, inside, rng)
    if case.span == KeyRange():
        assert not outside
        with pytest.raises(Misuse):
            job.delete_prefix_acked(category, case.prefix)
    else:
        delete(job, category, case, len(inside), rng)
        holding[category] = outside
    assert job.scan(category).result(WAIT) == holding[category]
    if kept is not None:
        kept |= holding


def check_lists(job: Job, category: str, case: Case, inside: list[Row], rng: Random) -> None:
    """Ask for the rows of a case's prefix in every way there is."""
    backwards, limit, page = inside[::-1], rng.randint(0, 5), rng.randint(1, 4)
    if case.prefix is not None:
        assert job.scan_prefix(category, case.prefix).result(WAIT) == inside
        assert job.scan_prefix(category, case.prefix, reverse=True).result(WAIT) == backwards
        assert job.scan_prefix(category, case.prefix, limit=limit).result(WAIT) == inside[:limit]
        walk = job.iterate(category, prefix=case.prefix, page=page)
        keys = job.iterate(category, prefix=case.prefix, page=page, reverse=True, keys_only=True)
    else:
        walk = job.iterate(category, case.span, page=page)
        keys = job.iterate(category, case.span, page=page, reverse=True, keys_only=True)
    assert list(walk) == inside
    assert list(keys) == [row.key for row in backwards]
    assert job.count(category, case.span).result(WAIT) == len(inside)
    assert job.scan(category, case.span).result(WAIT) == inside
    assert job.scan(category, case.span, reverse=True, limit=limit).result(WAIT) == backwards[:limit]


def delete(job: Job, category: str, case: Case, count: int, rng: Random) -> None:
    """Delete the rows of a case's prefix by one of the verbs that do."""
    way = rng.choice(["acked", "acked", "acked", "event", "commit"])
    if case.prefix is None or rng.random() < 0.2:
        if way == "acked":
            assert job.delete_range_acked(category, case.span).result(WAIT) == count
        elif way == "event":
            job.delete_range(category, case.span)
        else:
            job.commit(DeleteRange(category, case.span)).result(WAIT)
    elif way == "acked":
        assert job.delete_prefix_acked(category, case.prefix).result(WAIT) == count
    elif way == "event":
        job.delete_prefix(category, case.prefix)
    else:
        job.commit(DeletePrefix(category, case.prefix)).result(WAIT)
    assert job.count(category, case.span).result(WAIT) == 0
    if way == "acked":
        assert job.delete_range_acked(category, case.span).result(WAIT) == 0


def test_prefixes_are_exact_to_the_byte(job: Job) -> None:
    """S0-50..58, S0-60, S0-62, S0-64, S0-66, S2-36..41, S2-43..47, D-7, D-8, D-9: 5,000 random cases an adapter.

    Every list, in both directions, limited and paged, every count and every delete gives the model's rows and no
    others; what other categories hold, the same keys among them, is what it was.
    """
    kept: Contents = {}
    for kind, count in CASES.items():
        for seed in range(count):
            try:
                check_case(job, kind, seed, kept)
            except BaseException as error:
                error.add_note(f"the case: kind {kind!r}, seed {seed}")
                raise
    held = {name: rows for name, rows in kept.items() if rows}
    assert job.categories().result(WAIT) == sorted(held, key=str.encode)
    assert {name: job.scan(name).result(WAIT) for name in held} == held


def test_the_cases_are_nasty() -> None:
    """The random cases have what they are for: matches, lookalikes that don't, open ends, and every nasty letter."""
    for kind, count in CASES.items():
        cases = [KINDS[kind](Random(f"{kind} {seed}")) for seed in range(count)]
        hits = [sum(map(case.matches, case.names)) for case in cases]
        misses = [len(case.names) - found for case, found in zip(cases, hits, strict=True)]
        assert sum(found > 0 for found in hits) > 0.7 * count
        assert sum(left > 0 for left in misses) > 0.7 * count
        encoded = b"".join(case.encoded(name) for case in cases for name in case.names)
        assert {0x00, 0x22, 0x25, 0x5C, 0x5F, 0xFF} <= set(encoded)
        if kind == "bytes":
            assert sum(case.span.stop is None and case.span.start is not None for case in cases) > 50
        else:
            assert "é".encode() in encoded
            assert "\U0001f600".encode() in encoded


# -- statement by statement ---------------------------------------------------------------------------------------


def texts(job: Job, prefix: str, **options: Any) -> list[str]:
    """List the keys of one text that begin with a prefix."""
    rows = job.scan("c", KeyRange.text_prefix((), prefix), **options).result(WAIT)
    return [row.key.parts[0] for row in rows]


def test_a_prefix_of_text_is_plain_text(job: Job) -> None:
    r"""S0-49..58: it may end anywhere; `%`, `_` and `\` stand for themselves; case counts; the key itself is there."""
    names = [
        "user:1:a",
        "user:1:b",
        "user:2",
        "user",
        "USER:2",
        "User:3",
        "test%x",
        "test_x",
        "testXx",
        "dir\\a",
        "dira",
    ]
    for name in names:
        job.put("c", (name,), name.encode())
    assert texts(job, "") == sorted(names)
    assert texts(job, "user:1:") == ["user:1:a", "user:1:b"]
    assert texts(job, "user:") == ["user:1:a", "user:1:b", "user:2"]
    assert texts(job, "user") == ["user", "user:1:a", "user:1:b", "user:2"]
    assert texts(job, "user:2") == ["user:2"]
    assert texts(job, "nobody") == []
    assert texts(job, "test%") == ["test%x"]
    assert texts(job, "test_") == ["test_x"]
    assert texts(job, "%") == texts(job, "_") == []
    assert texts(job, "USER:") == ["USER:2"]
    assert texts(job, "dir\\") == ["dir\\a"]
    assert texts(job, "user", limit=2, reverse=True) == ["user:2", "user:1:b"]


def test_deleting_a_prefix_of_text(job: Job) -> None:
    r"""S0-60, S0-62, S0-64, S0-66: it deletes what matches, tells how many, and leaves lookalikes alone."""
    names = ["user:1", "user:2", "USER:1", "User:2", "test%special", "test_special", "testXspecial", "other"]
    for name in names:
        job.put("c", (name,), b"x")
    assert job.delete_range_acked("c", KeyRange.text_prefix((), "user:")).result(WAIT) == 2
    assert job.delete_range_acked("c", KeyRange.text_prefix((), "user:")).result(WAIT) == 0
    assert job.delete_range_acked("c", KeyRange.text_prefix((), "test%")).result(WAIT) == 1
    assert texts(job, "") == sorted(["USER:1", "User:2", "test_special", "testXspecial", "other"])


def test_an_empty_prefix_deletes_nothing(job: Job) -> None:
    """S0-61: an empty prefix is refused at the call, however it is spelled; listing by it gives everything."""
    job.put("c", ("k",), b"x")
    for empty in ((), key(), RawKey(b""), Key(b"")):
        for call in (job.delete_prefix, job.delete_prefix_acked, lambda c, p: job.commit(DeletePrefix(c, p))):
            with pytest.raises(Misuse, match="empty"):
                call("c", empty)
        assert job.scan_prefix("c", empty).result(WAIT) == [Row(key("k"), b"x")]


def parts_of(job: Job, *prefix: Any) -> list[tuple[Any, ...]]:
    """List the tuples that begin with the parts of a prefix."""
    return [row.key.parts for row in job.scan_prefix("c", prefix).result(WAIT)]


def test_a_prefix_of_parts(job: Job) -> None:
    r"""S2-35..41, S2-43..47: whole parts, decoded, the exact key once and first; no wildcard, no case, all as it is."""
    names = [
        ("prefix",), ("prefix", "a"), ("prefix", "b"), ("prefix", "nested", "c"), ("other", "x"), ("prefixed", "x"),
        ("a",), ("b",), ("ab",), ("a_b", "1"), ("aXb", "1"), ("A_B", "1"), ("100%", "1"), ("100zz", "1"),
        ('q"', "1"), ("q\\", "1"), ("q\\\\", "1"), ("t",), ("t", "10"), ("t", "10", "a"), ("t", "9"),
    ]  # fmt: skip
    for name in names:
        job.put("c", name, b"x")
    assert parts_of(job, "prefix") == [("prefix",), ("prefix", "a"), ("prefix", "b"), ("prefix", "nested", "c")]
    assert parts_of(job, "prefix", "nested") == [("prefix", "nested", "c")]
    assert parts_of(job, "a") == [("a",)]
    assert parts_of(job, "nothing") == []
    assert parts_of(job, "a_b") == [("a_b", "1")]
    assert parts_of(job, "100%") == [("100%", "1")]
    assert parts_of(job, 'q"') == [('q"', "1")]
    assert parts_of(job, "q\\") == [("q\\", "1")]
    assert parts_of(job, "t") == [("t",), ("t", "10"), ("t", "10", "a"), ("t", "9")]
    assert parts_of(job) == sorted(names)


@pytest.mark.parametrize("memory", [False, True])
def test_a_prefix_passes_over_rows_that_have_ended(memory: bool, tmp_path: Path) -> None:
    """S2-42, S0-65: ended rows aren't listed, counted or told of by a delete, which still takes them along."""
    now = [1000.0]
    with Persistency(":memory:" if memory else tmp_path, clock=lambda: now[0]) as persistency:
        job = persistency.open_job("job")
        for number in range(10):
            job.put("c", ("p", number), b"x", ttl=5 if number % 2 else None)
        assert job.count("c", KeyRange.prefix(("p",))).result(WAIT) == 10
        now[0] += 5
        evens = [("p", number) for number in range(0, 10, 2)]
        assert parts_of(job, "p") == evens
        assert [k.parts for k in job.iterate("c", prefix=("p",), page=2, keys_only=True)] == evens
        assert job.count("c", KeyRange.prefix(("p",))).result(WAIT) == 5
        assert job.delete_prefix_acked("c", ("p",)).result(WAIT) == 5
        assert job.delete_prefix_acked("c", ("p",)).result(WAIT) == 0
        now[0] -= 5
        assert parts_of(job, "p") == []


@pytest.mark.parametrize("max_bytes", [None, 1000])
def test_deleting_a_prefix_gives_its_bytes_back(max_bytes: int | None, tmp_path: Path) -> None:
    """S0-63: what is used shrinks by the payloads that went, and by no lookalike's."""
    for root in (":memory:", tmp_path):
        with Persistency(root) as persistency:
            job = persistency.open_job("job", max_bytes=max_bytes)
            for name in ("a_b", "aXb", "A_B", "a_bc"):
                job.put("c", (name, 1), b"x" * 10)
            assert job.storage_used().result(WAIT) == 40
            assert job.delete_prefix_acked("c", ("a_b",)).result(WAIT) == 1
            assert job.storage_used().result(WAIT) == 30
            assert job.delete_range_acked("c", KeyRange.text_prefix((), "a")).result(WAIT) == 2
            assert job.storage_used().result(WAIT) == 10


def test_an_open_end(job: Job) -> None:
    """A raw prefix of FF alone has nothing behind it, and still lists and deletes nothing before it."""
    names = [b"", b"\x00", b"\xfe", b"\xfe\xff\xff", b"\xff", b"\xff\x00", b"\xff\xff", b"\xff\xff\xff"]
    for name in names:
        job.put("c", RawKey(name), name)
    assert [row.payload for row in job.scan_prefix("c", RawKey(b"\xff\xff")).result(WAIT)] == names[6:]
    assert job.delete_prefix_acked("c", RawKey(b"\xff")).result(WAIT) == 4
    assert [row.payload for row in job.scan("c").result(WAIT)] == names[:4]


def test_a_prefix_is_an_index_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """S0-59, S2-46: listing, counting and deleting a prefix take as many steps among 20,000 rows as among 20."""
    counted: list[int] = []
    scanned: list[str] = []  # statements that went over a table or an index without a place to begin

    def watch(connection: apsw.Connection) -> None:
        connection.trace_v2(apsw.SQLITE_TRACE_PROFILE, note)

    def note(event: dict[str, Any]) -> None:
        counted.append(event["stmt_status"]["SQLITE_STMTSTATUS_VM_STEP"])
        if event["stmt_status"]["SQLITE_STMTSTATUS_FULLSCAN_STEP"]:
            scanned.append(event["sql"])

    monkeypatch.setattr(apsw, "connection_hooks", [*apsw.connection_hooks, watch])
    steps = {}
    for others in (20, 20_000):
        with Persistency(tmp_path / str(others)) as persistency:
            job = persistency.open_job("job")
            job.persist([Put("c", ("a_c" if number % 2 else "a_a", number), b"x") for number in range(others)])
            job.persist([Put("c", ("a_b", number), b"x") for number in range(3)])
            job.flush().result(WAIT)
            counted.clear()
            scanned.clear()
            assert len(job.scan_prefix("c", ("a_b",)).result(WAIT)) == 3
            assert job.count("c", KeyRange.text_prefix((), "a_b")).result(WAIT) == 3
            assert job.delete_prefix_acked("c", ("a_b",)).result(WAIT) == 3
            steps[others] = sum(counted)
            assert scanned == []
    assert 0 < steps[20_000] < steps[20] + 1_000
