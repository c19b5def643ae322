"""Plain pickles: every protocol is read as `pickle` reads it, nothing is ever run, and none costs without bound."""

from __future__ import annotations

import base64
import collections
import decimal
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import uuid
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persistency import CBOR, Misuse
from persistency.integrations.migration import Refused, read_plain, reading

HOUSE = Path(__file__).parent.parent
PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 255, 256, 65_536, -(2**31), 2**31, 2**63, -(10**30), 10**300, 0.0, -1.5, 1e300,
    float("inf"), "", "text", "é\n\\u1234\0", "\ud800", "x" * 300, b"", b"\0\xff", b"y" * 300, bytearray(b"z"),
    [], [1, [2, [3]]], (), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, {"a": {"b": None}}, {1: 2, (1, "a"): 3, 1.5: 4},
    set(), {1, 2}, frozenset(), frozenset({"a", (1, 2)}), list(range(3_000)), {str(n): n for n in range(3_000)},
    datetime(2024, 2, 29, 12, 30, 1, 5), datetime(2024, 1, 1, tzinfo=UTC),
    datetime(2024, 1, 1, tzinfo=timezone(timedelta(hours=-3), "here")), date(1, 1, 1), timedelta(-1, 2, 3),
    Decimal("-1.50"), Decimal("1E+100"), collections.OrderedDict(a=1, b=[2]),
]  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_plain_data_of_every_protocol_is_read(protocol: int) -> None:
    """Each value comes back equal and of the same type, alone and together, shared parts too."""
    same = ["shared" * 20]
    for value in [*VALUES, VALUES, [same, same, (same, {"k": same})]]:
        found = read_plain(pickle.dumps(value, protocol))
        assert found == (dict(value) if isinstance(value, collections.OrderedDict) else value)
        assert type(found) is (dict if isinstance(value, collections.OrderedDict) else type(value))
    assert str(read_plain(pickle.dumps(float("nan"), protocol))) == "nan"


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary() | st.dates(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.floats(allow_nan=False)), inner)
        | st.frozensets(st.text() | st.integers())
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(PLAIN, st.sampled_from(PROTOCOLS))
def test_what_pickle_writes_is_read_the_same(value: Any, protocol: int) -> None:
    """Any plain value comes back, whatever the protocol."""
    assert read_plain(pickle.dumps(value, protocol)) == value


class Reference(pickle._Unpickler):  # type: ignore[name-defined]  # written in Python, and so without its memory bombs
    """What the standard library makes of a pickle, where only what makes data can be named."""

    NAMES: ClassVar = {
        *((module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset", "bytearray")),
        *(("datetime", name) for name in ("datetime", "date", "timedelta", "timezone")),
        *(("builtins", "bytes"), ("__builtin__", "bytes")),
        *(("decimal", "Decimal"), ("_codecs", "encode"), ("collections", "OrderedDict")),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.NAMES:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def test_damaged_pickles_are_refused_or_read_as_pickle_reads_them() -> None:
    """Bytes flipped, cut and doubled at random: a value that pickle itself would give, or `Refused`, nothing else."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    corpus = [pickle.dumps(value, protocol) for value in VALUES if value != VALUES[41] for protocol in PROTOCOLS]
    corpus = [data for data in corpus if len(data) < 2_000]
    read = 0
    for _ in range(6_000):
        data = bytearray(chance.choice(corpus))
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(data) + 1)
            data[at : at + chance.randrange(3)] = bytes(chance.randrange(256) for _ in range(chance.randrange(3)))
        try:
            found = read_plain(bytes(data))
        except Refused:
            continue
        try:
            expected = Reference(io.BytesIO(data), encoding="latin-1").load()
        except Exception:  # a text of Python 2 that isn't ASCII, or another spelling that is harmless
            continue
        read += 1
        if not any(code in data for code in b"STU"):  # whose encoding is a matter of choice
            assert repr(found).replace("OrderedDict", "") == repr(expected).replace("OrderedDict", "") or (
                isinstance(expected, collections.OrderedDict) and found == dict(expected)
            ), bytes(data)
    assert read > 100


def test_text_of_python_2_is_text_or_bytes() -> None:
    """What was a `str` there is text if it is ASCII, and bytes if it isn't: nobody knows its encoding."""
    assert read_plain(b"S'plain \\'quoted\\' \\n'\np0\n.") == "plain 'quoted' \n"
    assert read_plain(b"U\x03abc.") == "abc"
    assert read_plain(b"T\x02\0\0\0\xc3\xa9.") == "é".encode()
    assert read_plain(b"S'\\xc3\\xa9'\n.") == "é".encode()
    assert read_plain(b"I01\n.") is True
    assert read_plain(b"I7\n.") == read_plain(b"L7L\n.") == 7


class Runs:
    """What runs a command when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch it-was-run",)


class Builds:
    """An object of a class of somebody's own."""

    def __init__(self) -> None:
        self.state = {"a": 1}


def short(text: str) -> bytes:
    """A text as protocol 4 spells it."""
    return b"\x8c" + bytes((len(text),)) + text.encode()


def named(module: str, name: str) -> bytes:
    """A name as protocol 4 spells it."""
    return short(module) + short(name) + b"\x93"


ATTACKS: dict[str, bytes] = {
    **{f"reduce-{protocol}": pickle.dumps(Runs(), protocol) for protocol in PROTOCOLS},
    **{f"class-{protocol}": pickle.dumps(Builds(), protocol) for protocol in PROTOCOLS},
    **{f"nested-{protocol}": pickle.dumps({"a": [1, Runs()]}, protocol) for protocol in PROTOCOLS},
    **{f"uuid-{protocol}": pickle.dumps(uuid.UUID(int=1), protocol) for protocol in PROTOCOLS},
    "system": b"cos\nsystem\n(S'touch it-was-run'\ntR.",
    "posix": b"cposix\nsystem\n(S'touch it-was-run'\ntR.",
    "inst": b"(S'touch it-was-run'\nios\nsystem\n.",
    "obj": b"(cos\nsystem\nS'touch it-was-run'\no.",
    "eval": named("builtins", "eval") + short("__import__('os').system('touch it-was-run')") + b"\x85R.",
    "exec": b'c__builtin__\nexec\n(S\'open("it-was-run","w")\'\ntR.',
    "getattr": named("builtins", "getattr") + named("builtins", "__import__") + short("x") + b"\x86R.",
    "dotted": named("datetime", "datetime.fromisoformat") + short("2024-01-01") + b"\x85R.",
    "dotted-codecs": named("_codecs", "encode.__class__") + b")R.",
    "codec": named("_codecs", "encode") + short("x") + short("idna") + b"\x86R.",
    "codec-of-bytes": named("_codecs", "encode") + b"C\x01x" + short("latin1") + b"\x86R.",
    "newobj": named("builtins", "set") + b")\x81.",
    "newobj-ex": named("builtins", "set") + b")}\x92.",
    "build": named("builtins", "set") + b"(K\x01lR}" + short("__class__") + b"K\x01sb.",
    "build-on-name": named("datetime", "datetime") + b"}b.",
    "extension": b"\x82\x01.",
    "extension-2": b"\x83\x01\x00.",
    "extension-4": b"\x84\x01\x00\x00\x00.",
    "persistent": b"P1\n.",
    "persistent-binary": b"K\x01Q.",
    "buffer": b"\x97.",
    "buffer-read-only": b"\x97\x98.",
    "a-name-alone": named("builtins", "set") + b".",
    "a-name-in-a-list": b"]" + named("builtins", "set") + b"a.",
    "a-name-in-a-tuple-in-a-dict": b"}" + short("k") + named("builtins", "set") + b"\x85s.",
    "a-name-as-a-key": b"}" + named("builtins", "set") + b"K\x01s.",
    "a-name-memorised": named("builtins", "set") + b"\x940](h\x00a.",
    "a-name-as-an-argument": named("builtins", "set") + b"(" + named("builtins", "set") + b"lR.",
    "a-module-that-is-a-list": b"]" + short("x") + b"\x93.",
    "a-name-that-is-a-list": short("builtins") + b"]\x93.",
    "a-call-of-text": short("x") + b")R.",
    "a-call-of-a-set": named("builtins", "set") + b")R)R.",
    "a-call-with-a-list": named("builtins", "set") + b"]R.",
    "a-set-of-text": named("builtins", "set") + short("abc") + b"\x85R.",
    "a-set-of-lists": named("builtins", "set") + b"(](K\x01elR.",
    "a-datetime-of-numbers": named("datetime", "datetime") + b"(M\xe8\x07K\x01K\x01tR.",
    "a-datetime-with-a-zone-of-text": named("datetime", "datetime") + b"C\n\x07\xe8\x01\x01\0\0\0\0\0\0K\x01\x86R.",
    "a-date-too-long": named("datetime", "date") + b"C\x05\x07\xe8\x01\x01\0\x85R.",
    "a-timedelta-too-long": named("datetime", "timedelta") + b"\x8a\x08" + b"\x7f" * 8 + b"K\0K\0\x87R.",
    "a-decimal-of-a-number": named("decimal", "Decimal") + b"K\x01\x85R.",
    "a-list-as-a-key": b"}]K\x01s.",
    "a-dict-in-a-set": b"\x8f(}\x90.",
    "append-to-a-tuple": b")K\x01a.",
    "append-to-a-dict": b"}(K\x01e.",
    "set-in-a-list": b"](K\x01K\x02u.",
    "an-odd-dict": b"}(K\x01u.",
    "nothing": b"",
    "stop": b".",
    "no-stop": b"K\x01",
    "no-mark": b"t.",
    "no-memo": b"h\x07.",
    "negative-memo": b"K\x01p-1\n0g-1\n",
    "protocol-6": b"\x80\x06N.",
    "cut-text": b"X\xff\xff\xff\x00abc.",
    "negative-text": b"T\xff\xff\xff\xffabc.",
    "no-line": b"I12",
    "no-utf-8": b"\x8c\x01\xff.",
    "no-number": b"Ia\n.",
    "no-quotes": b"Sabc\n.",
    "unknown": b"\xff.",
}

# Run where every import, every process and every file that is opened is a finding.
WATCHED = """
import base64, json, sys
from persistency.integrations.migration.plain import read_plain
from persistency.integrations.migration.reading import Refused
attacks = json.load(sys.stdin)
seen = []
def hook(event, args):
    if event.startswith(("import", "exec", "compile", "os.", "subprocess", "open", "pickle", "socket", "code.__new__")):
        seen.append((event, repr(args)[:100]))
b"x".decode("raw-unicode-escape")  # which Python imports when it is first used
sys.addaudithook(hook)
told = {}
for name, data in attacks.items():
    try:
        read_plain(base64.b64decode(data))
        told[name] = "read"
    except Refused as error:
        told[name] = str(error)
print(json.dumps([told, seen]))
"""


def test_no_pickle_is_ever_run(tmp_path: Path) -> None:
    """Of a whole corpus of malicious and damaged pickles each is refused; nothing is imported, opened or executed."""
    told, seen = watched(ATTACKS, tmp_path)
    assert {name for name, said in told.items() if said == "read"} == set()
    assert seen == []
    assert list(tmp_path.iterdir()) == []
    assert told["system"] == "it names os.system"
    assert told["eval"] == "it names builtins.eval"
    assert told["class-5"] == f"it names {__name__}.Builds"
    assert told["newobj"] == "it makes an object of a class"


def test_the_harness_sees_a_pickle_that_is_run(tmp_path: Path) -> None:
    """With the standard library's reader in the place of ours the corpus runs, and the harness tells it."""
    planted = WATCHED.replace("        read_plain(base64", "        pickle.loads(base64").replace(
        "json, sys", "json, pickle, sys"
    )
    planted = planted.replace("except Refused as error", "except Exception as error")
    attacks = {name: ATTACKS[name] for name in ("reduce-4", "system", "eval", "uuid-4")}
    told, seen = watched(attacks, tmp_path, planted)
    assert [name for name, said in told.items() if said == "read"] == ["reduce-4", "system", "eval", "uuid-4"]
    assert {event for event, _ in seen} >= {"pickle.find_class", "os.system"}
    assert (tmp_path / "it-was-run").exists()


def watched(attacks: dict[str, bytes], place: Path, program: str = WATCHED) -> tuple[dict[str, str], list[Any]]:
    """Read pickles in a process that watches itself; return what came of each, and what was seen."""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        input=json.dumps({name: base64.b64encode(data).decode() for name, data in attacks.items()}),
        capture_output=True, text=True, timeout=60, check=True, cwd=place, env={**os.environ, "PYTHONPATH": str(HOUSE)},
    )  # fmt: skip
    told, seen = json.loads(ended.stdout)
    return told, seen


def doubled(opening: bytes, pair: bytes, times: int = 60) -> bytes:
    """A pickle in which something holds the one before twice, which holds another one twice, ..."""
    return (
        opening + b"\x94" + b"".join(b"0h" + bytes((at,)) + b"h" + bytes((at,)) + pair + b"\x94" for at in range(times))
    )


def number(value: int) -> bytes:
    """An int as protocol 2 spells it."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes((len(data),)) + data


def made(maker: bytes, arguments: bytes, times: int) -> bytes:
    """A pickle that has something made again and again, of arguments that it has memorised, and keeps it or not."""
    return b"(" + b"".join([maker, b"h\x00" + arguments + b"R"]) * times + b"l."


def long_text(count: int) -> bytes:
    """A text, memorised as the first thing."""
    return b"X" + struct.pack("<I", count) + b"1" * count + b"\x940"


def after_a_look(count: int) -> bytes:
    """A dict whose keys are honest when they are looked at, and all others of one hash."""
    same = b"".join(number((2**61 - 1) * at) + b"N" for at in range(8, count))
    honest = b"".join(number(at) + b"N" for at in range(1, count + 100))
    return b"}(" + honest + b"u(" + number((2**61 - 1) * 7) + b"Nu(" + same + b"u."


def long_parts(times: int) -> bytes:
    """A dict with two keys that are equal, and long, and aren't the same one: it compares them each time."""
    text = b"X" + struct.pack("<I", 60_000) + b"x" * 60_000
    key = b"(" + text + b"2" * 60 + b"t\x94"
    return key + b"0" + key + b"0}h\x00Ns" + b"h\x01Ns" * times + b"."


def made_bombs() -> dict[str, bytes]:
    """Pickles that are not very large, and stand for far more; it takes a second to make them."""
    numbers = b"](" + b"".join(number(at) for at in range(200_000)) + b"e\x940"
    colliding = b"".join(number((2**61 - 1) * at) for at in range(1, 50_000))
    return {
        "memo": b"Nr\xff\xff\xff\x7f.",
        "memo-digits": b"Np99999999999999999999\n.",
        "bytes": b"\x8e" + struct.pack("<Q", 2**62) + b"x.",
        "text": b"\x8d" + struct.pack("<Q", 2**62) + b"x.",
        "array": b"\x96" + struct.pack("<Q", 2**40) + b"x.",
        "bytes-4": b"B\xff\xff\xff\xffx.",
        "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N",
        "digits": b"I" + b"9" * 1_000_000 + b"\n.",
        "long-digits": b"L" + b"9" * 1_000_000 + b"L\n.",
        "float-digits": b"F" + b"9" * 1_000_000 + b"\n.",
        "long": b"\x8b" + struct.pack("<i", 10_000_000) + b"\x7f" * 10_000_000 + b".",
        "decimal": named("decimal", "Decimal") + b"X" + struct.pack("<I", 1_000_000) + b"9" * 1_000_000 + b"\x85R.",
        "laughing-tuples": doubled(b")", b"\x86") + b".",
        "laughing-lists": b"]\x94"
        + b"".join(b"](h" + bytes((at,)) * 1 + b"h" + bytes((at,)) + b"e\x94" for at in range(60))
        + b".",
        "laughing-key": b"}" + doubled(b")", b"\x86")[:-1] + b"\x94h<K\x01s.",
        "laughing-member": b"\x8f(" + doubled(b")", b"\x86")[:-1] + b"\x90.",
        "laughing-frozen": b"(" + doubled(b")", b"\x86")[:-1] + b"\x91.",
        "long-text-often": b"(X"
        + struct.pack("<I", 1_000_000)
        + b"x" * 1_000_000
        + b"\x94"
        + b"h\x00" * 500_000
        + b"l.",
        "itself": b"]\x94h\x00a.",
        "itself-in-a-dict": b"}\x94" + short("k") + b"h\x00s.",
        "sets": b"(" + b"\x8f" * 3_000_000 + b"l.",
        "nothings": b"(" + b"N" * 3_000_000 + b"l.",
        "deep": b"]" * 400_000 + b"a" * 399_999 + b".",
        "deep-tuples": b")" + b"\x85" * 1_000_000 + b".",
        "deep-key": b"})" + b"\x85" * 1_000_000 + b"K\x01s.",
        "marks": b"(" * 3_000_000 + b".",
        "colliding-dict": b"}(" + b"".join(number((2**61 - 1) * at) + b"N" for at in range(1, 50_000)) + b"u.",
        "colliding-set": b"\x8f(" + colliding + b"\x90.",
        "colliding-frozenset": b"(" + colliding + b"\x91.",
        "colliding-one-by-one": b"}" + b"".join(number((2**61 - 1) * at) + b"Ns" for at in range(1, 50_000)) + b".",
        "colliding-two-by-two": b"\x8f"
        + b"".join(b"(" + number((2**61 - 1) * at) + b"\x90" for at in range(1, 50_000))
        + b".",
        "colliding-set-of-old": named("builtins", "set") + b"(" + colliding + b"l\x85R.",
        "named-by-itself": b"](K\x01e\x94"
        + b"".join(b"](" + (b"h" + bytes((at,))) * 10 + b"e\x94" for at in range(9))
        + short("x")
        + b"\x93.",
        "named-deep": b"]" * 5_000 + b"a" * 4_999 + short("x") + b"\x93.",
        "sets-of-old": numbers + made(named("builtins", "set"), b"\x85", 2_000),
        "frozensets-of-old": numbers + made(named("builtins", "frozenset"), b"\x85", 2_000),
        "arrays-of-old": b"C\x01x0B"
        + struct.pack("<I", 1 << 20)
        + bytes(1 << 20)
        + b"\x940"
        + made(named("builtins", "bytearray"), b"\x85", 3_000),
        "bytes-of-old": long_text(1 << 20) + made(named("_codecs", "encode"), short("latin1") + b"\x86", 3_000),
        "arrays-of-old-text": long_text(1 << 20)
        + made(named("builtins", "bytearray"), short("latin1") + b"\x86", 3_000),
        "decimals-of-old": long_text(4_300) + made(named("decimal", "Decimal"), b"\x85", 100_000),
        "long-number-often": b"\x8b"
        + struct.pack("<i", 1_024)
        + b"\x01" * 1_024
        + b"\x940("
        + b"h\x00" * 700_000
        + b"l.",
        "long-decimal-often": named("decimal", "Decimal")
        + b"X"
        + struct.pack("<I", 4_000)
        + b"7" * 4_000
        + b"\x85R\x940("
        + b"h\x00" * 700_000
        + b"l.",
        "late-collisions": after_a_look(40_000),
        "long-parts-of-keys": long_parts(500_000),
        "long-keys": b"}X" + struct.pack("<I", 1_000_000) + b"x" * 1_000_000 + b"Ns.",
    }


BOUNDED = """
import pickle, resource, sys
from persistency import CBOR, Misuse
from persistency.integrations.migration.plain import read_plain
from persistency.integrations.migration.reading import Refused
bombs = pickle.load(sys.stdin.buffer)
resource.setrlimit(resource.RLIMIT_AS, (1_500_000_000, 1_500_000_000))
for name, data in bombs.items():
    print(name, end=": ", flush=True)
    try:
        value = read_plain(data)
        try:
            print("read, and", len(CBOR.encode(value)))
        except Misuse as error:
            print("no value:", error)
    except Refused as error:
        print("refused:", error)
    value = None
"""


def test_no_pickle_costs_without_bound() -> None:
    """Bombs of every kind end soon, within 1.5 GB of address space, in a refusal; so does what they hold, as CBOR."""
    bombs = made_bombs()
    ended = subprocess.run(
        [sys.executable, "-c", BOUNDED],
        input=pickle.dumps(bombs),
        capture_output=True,
        timeout=100,
        check=False,
        cwd=HOUSE,
    )
    said = dict(line.split(": ", 1) for line in ended.stdout.decode().splitlines())
    assert (ended.returncode, said.keys()) == (0, bombs.keys()), (ended.stdout[-300:], ended.stderr[-500:])
    for name in ("memo", "memo-digits"):  # a place is a number, and nothing is set aside for those before it
        assert said.pop(name) == "read, and 1"
    for name in ("deep", "deep-tuples"):
        assert said.pop(name).startswith("no value: a value can be nested")
    assert [(name, told) for name, told in said.items() if not told.startswith("refused: ")] == []
    for name in ("laughing-tuples", "laughing-lists", "itself", "itself-in-a-dict", "long-text-often"):
        assert said[name] == "refused: too large: it holds the same things over and over, or itself"
    assert {said["named-by-itself"], said["named-deep"]} == {"refused: damaged: a name that isn't text"}
    assert said["late-collisions"] == "refused: too costly: its keys take over 2 s"
    for name in ("long-number-often", "long-decimal-often"):
        assert said[name] == said["long-text-often"]
    assert {told.split(",")[0] for name, told in said.items() if name.endswith(("-of-old", "-of-old-text"))} == {
        "refused: too large: sets of more than 2",
        "refused: too large: more than 268",
        "refused: too costly: many keys of one hash",
    }
    assert {told for name, told in said.items() if name.startswith("colliding")} == {
        "refused: too costly: many keys of one hash"
    }


def test_keys_that_take_long_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """What their hashes hide is seen by the processor time that they take, in dicts, sets and frozensets alike."""
    clock = iter(range(1_000_000))
    monkeypatch.setattr(reading, "thread_time", lambda: next(clock) / 10)
    few, many = dict.fromkeys(range(4_000)), dict.fromkeys(range(6_000))  # 16 and 24 looks at the clock
    assert read_plain(pickle.dumps(few)) == few
    assert read_plain(pickle.dumps(dict.fromkeys(map(str, many)))) == dict.fromkeys(map(str, many))
    for value in (many, set(many), frozenset(many), [dict.fromkeys(range(100))] * 2 + [few, few.copy(), set(many)]):
        for protocol in PROTOCOLS:
            with pytest.raises(Refused, match="its keys take over 2 s"):
                read_plain(pickle.dumps(value, protocol))


def test_running_out_of_memory_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is being nested too deeply anything else, wherever it is met."""
    for error in (MemoryError, RecursionError):

        def fail(*_: object, error: type[Exception] = error) -> None:
            raise error

        monkeypatch.setattr(reading.Reading, "run", fail)
        with pytest.raises(Refused, match="there isn't the memory for it"):
            read_plain(pickle.dumps([1]))


def test_honest_values_of_some_size_are_read() -> None:
    """The bounds are far beyond what a cache holds: a hundred thousand records, and a table with numbers for keys."""
    rows = [{"name": f"n{number}", "size": number} for number in range(100_000)]
    assert read_plain(pickle.dumps(rows)) == rows
    table = {(number, number / 7): number for number in range(50_000)}
    assert read_plain(pickle.dumps(table)) == table
    floats = {number / 7 for number in range(100_000)}
    assert read_plain(pickle.dumps(floats)) == floats
    assert read_plain(pickle.dumps("x" * 5_000_000)) == "x" * 5_000_000
    assert read_plain(memoryview(pickle.dumps([1]))) == [1]  # type: ignore[arg-type]  # who has one needn't copy it


def test_what_is_read_is_a_value_or_told_not_to_be() -> None:
    """Values that CBOR has no word for are read, and then refused by it with a hint."""
    for value in (timedelta(1), datetime(2024, 1, 1)):
        with pytest.raises(Misuse):
            CBOR.encode(read_plain(pickle.dumps(value)))
    assert CBOR.decode(CBOR.encode(read_plain(pickle.dumps(decimal.Decimal("1.50"))))) == Decimal("1.50")
