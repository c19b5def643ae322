"""Manifests: what is accepted, what is refused and in which words, and that nothing but `Misuse` is ever raised."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import example, find, given, settings
from hypothesis import strategies as st

from persistency import Misuse, Persistency

pytest.importorskip("wasmtime", reason="needs the extra plugins")

from persistency.plugins import manifest as module
from persistency.plugins.manifest import KVGrant, Limits, Manifest, WasiGrant, _shown

WHOLE = {
    "id": "weather",
    "permissions": {
        "kvstore": {
            "reason": "forecasts", "max_size": "1MB", "max_keys": 50, "max_key_bytes": 100, "prefix": "w:",
            "read_only": True,
        },
        "wasi": {"reason": "the time"},
    },
    "limits": {"memory": "16MB", "fuel": 1_000_000, "timeout": 5},
}  # fmt: skip
MADE = Manifest(
    "weather",
    KVGrant("forecasts", max_bytes=1_000_000, max_keys=50, max_key_bytes=100, prefix="w:", read_only=True),
    WasiGrant("the time"),
    Limits(16_000_000, 1_000_000, 5.0),
)


def deep(levels: int) -> Any:
    """A list in a list in a list."""
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


def named(value: Any) -> str:
    """The name of a case, however large its value."""
    return value.__name__ if callable(value) else _shown(value)[:50]


def kv(**fields: Any) -> dict[str, Any]:
    """A manifest with these fields of the permission `kvstore`."""
    return {"id": "weather", "permissions": {"kvstore": fields}}


def limits(**fields: Any) -> dict[str, Any]:
    """A manifest with these limits."""
    return {"id": "weather", "limits": fields}


def refusal(value: Any) -> str:
    """What a manifest is refused with."""
    with pytest.raises(Misuse) as caught:
        Manifest.of(value)
    return str(caught.value)


# -- what is accepted --------------------------------------------------------------------------------------------------


def test_every_form_makes_the_same_manifest(tmp_path: Path) -> None:
    """A mapping of any kind, JSON text, and a file of it, with a byte order mark or without."""
    text = json.dumps(WHOLE)
    (tmp_path / "plain.json").write_text(text)
    (tmp_path / "marked.json").write_text(text, encoding="utf-8-sig")
    forms: list[Any] = [WHOLE, MappingProxyType(WHOLE), text, tmp_path / "plain.json", tmp_path / "marked.json", MADE]
    assert [Manifest.of(form) for form in forms] == [MADE] * 6
    assert Manifest.of(MADE) is MADE


def test_what_is_left_out_is_the_default() -> None:
    """Nothing is granted, and the limits are those documented."""
    bare = Manifest.of({"id": "a"})
    assert bare == Manifest.of({"id": "a", "permissions": {}, "limits": {}}) == Manifest("a")
    assert (bare.kvstore, bare.wasi) == (None, None)
    assert bare.limits == Limits(memory_bytes=67_108_864, fuel=None, timeout=None)
    assert Manifest.of(kv()).kvstore == KVGrant(
        "", max_bytes=1_048_576, max_keys=100_000, max_key_bytes=256, prefix="", read_only=False
    )
    assert Manifest.of({"id": "a", "permissions": {"wasi": {}}}).wasi == WasiGrant("")
    assert Manifest.of(limits(fuel=None, timeout=None)).limits == Limits()


SIZES = [
    (1, 1), (2**62, 2**62), ("1", 1), ("1KB", 1_000), ("10KB", 10_000), ("1KiB", 1_024), ("10KiB", 10_240),
    (" 2 mib ", 2**21), ("1.5k", 1_500), ("", 1_048_576), (None, 1_048_576),
]  # fmt: skip


@pytest.mark.parametrize(("size", "max_bytes"), SIZES)
def test_sizes_are_bytes_or_texts(size: Any, max_bytes: int) -> None:
    """S0-78: decimal and binary units; an empty one is the default of 1 MiB."""
    grant = Manifest.of(kv(max_size=size)).kvstore
    assert grant is not None
    assert grant.max_bytes == max_bytes


@pytest.mark.parametrize(
    "size",
    ["0", 0, "-1", -1, "0.5", " ", "much", "1XB", "1e3", "٣", True, False, 1.0, 1e6, float("nan"), [], {}, b"1",
     2**62 + 1, "9" * 400, "9" * 9_000, -(10**9_000), 10**9_000, "\ud800"],
    ids=named,
)  # fmt: skip
@pytest.mark.parametrize(("make", "path"), [(kv, "permissions.kvstore.max_size"), (limits, "limits.memory")])
def test_what_is_no_size_is_refused(make: Any, path: str, size: Any) -> None:
    """S0-78, S1-12: the field's path is named, what came, and what to pass; 0 would mean two things."""
    said = refusal(make(**{path.rpartition(".")[2]: size}))
    assert said.startswith(f"plugin 'weather': {path} must be ")
    assert ": pass " in said
    assert said.endswith('"1MB" or "1MiB"' if make is kv or "a size, not" in said else '"16MB" or "16MiB"')


@pytest.mark.parametrize("memory", [65_536, "64KiB", 2**32, "4GiB"])
def test_memory_is_a_page_to_all_there_can_be(memory: Any) -> None:
    """From 64 KiB to 4 GiB, both included."""
    assert Manifest.of(limits(memory=memory)).limits.memory_bytes in (65_536, 2**32)
    beyond = 65_535 if memory in (65_536, "64KiB") else 2**32 + 1
    assert f"must be 65536 to 4294967296, not {beyond}" in refusal(limits(memory=beyond))


@pytest.mark.parametrize(("given_", "timeout"), [(5, 5.0), (0.25, 0.25), (1e8, 1e8), (10**8, 1e8)])
def test_a_timeout_is_in_seconds(given_: Any, timeout: float) -> None:
    """Whole or not, it's kept as a float."""
    found = Manifest.of(limits(timeout=given_)).limits.timeout
    assert found == timeout
    assert type(found) is float


def test_what_is_made_is_plain_and_stays_so() -> None:
    """It can be compared, hashed, copied and pickled, and can't be changed."""
    assert copy.deepcopy(MADE) == pickle.loads(pickle.dumps(MADE)) == MADE
    assert len({MADE, Manifest.of(WHOLE), Manifest("weather")}) == 2
    with pytest.raises(FrozenInstanceError):
        MADE.limits.fuel = 3  # type: ignore[misc]

    class Word(str):
        __slots__ = ()

    class Number(int):
        pass

    found = Manifest.of({"id": Word("a"), "limits": {"fuel": Number(3)}})
    assert (type(found.id), type(found.limits.fuel)) == (str, int)


# -- ids ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("id_", ["a", "A.b-c_d", "x" * 128, "天気", "a b", ".hidden", "...x", "é" * 64, "con", "%2F"])
def test_ids_that_are_names(id_: str) -> None:
    """S0-92: what is a name on any system."""
    assert Manifest.of({"id": id_}).id == Manifest(id_).id == id_


@pytest.mark.parametrize(
    ("id_", "why"),
    [
        ("", "1 to 128 bytes of UTF-8, not 0"), ("x" * 129, "not 129"), ("é" * 65, "not 130"),
        (".", "directory"), ("..", "directory"), ("a/b", "slash"), ("/etc/passwd", "slash"), ("a\\b", "slash"),
        ("../x", "slash"), ("a\0b", "control"), ("a\nb", "control"), ("\x7f", "control"), ("a\x85b", "control"),
        ("a\u2028b", "line breaks"), (" a", "space"), ("a ", "space"), ("a\u00a0", "space"), ("a.", "end with a dot"),
        ("...", "end with a dot"), ("\ud800", "lone surrogate"), (None, "must be text"), (7, "must be text"),
        (True, "must be text"), (b"a", "must be text"), (["a"], "must be text"), ({}, "must be text"),
    ],
    ids=named,
)  # fmt: skip
def test_ids_that_are_none(id_: Any, why: str) -> None:
    """S0-92: each is refused with its reason, from a mapping and made directly."""
    for said in (refusal({"id": id_}), refusal(kv() | {"id": id_})):
        assert said.startswith("manifest: id ")
        assert why in said
    with pytest.raises(Misuse, match="manifest: id "):
        Manifest(id_)


@pytest.mark.parametrize("id_", ["x" * 128, "A" * 60, "天" * 20, "a.b" * 42, ".A" + "x" * 126])
def test_an_id_with_a_store_can_be_the_name_of_a_job(tmp_path: Path, id_: str) -> None:
    """Whatever the check lets through, the engine opens a job for."""
    manifest = Manifest(id_, kvstore=KVGrant())
    with Persistency(tmp_path) as persistency:
        persistency.open_job(f"plugins/{manifest.id}").close()


def test_an_id_too_long_for_a_store_is_refused_before_anything_is_made() -> None:
    """The rule of job names is told at the manifest; without a store there is no job."""
    assert Manifest("A" * 61).kvstore is None
    said = refusal({"id": "A" * 61, "permissions": {"kvstore": {}}})
    assert said.startswith(f"plugin '{'A' * 61}': id would take 183 bytes")


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"id": "a", "permisions": {}}, "permisions is no field of a manifest (did you mean 'permissions'?)"),
        ({"id": "a", "permissions": {"kv": {}}}, "kv is no permission of a manifest (did you mean 'kvstore'?)"),
        ({"id": "a", "permissions": {"http": {}}}, "permissions.http is no permission of a manifest: pass kvst"),
        (kv(maxSize="1MB"), "permissions.kvstore.maxSize is no field of a manifest (did you mean 'max_size'?)"),
        (kv(max_bytes=1), "permissions.kvstore.max_bytes is no field of a manifest (did you mean 'max_size'?)"),
        (kv(readonly=True), "permissions.kvstore.readonly is no field of a manifest (did you mean 'read_only'?)"),
        (limits(memory_bytes=1), "limits.memory_bytes is no field of a manifest (did you mean 'memory'?)"),
        ({"id": "a", 7: 1}, "plugin 'a': 7 is no field of a manifest"),
        ({"id": "a", None: 1}, "plugin 'a': None is no field of a manifest"),
        ({"id": "a", "x y\n": 1}, "plugin 'a': 'x y\\n' is no field of a manifest"),
        ({"id": "a", "\ud800": 1}, "plugin 'a': '\\ud800' is no field of a manifest"),
        ({"ID": "a"}, "manifest: id is missing, there is ID"),
        ({}, "manifest: id is missing, there is nothing"),
        ({"id": "a", "permissions": None}, "plugin 'a': permissions must be an object, not None"),
        ({"id": "a", "permissions": ["kvstore"]}, "plugin 'a': permissions must be an object, not ['kvstore']"),
        ({"id": "a", "permissions": {"kvstore": True}}, "permissions.kvstore must be an object, not True: pass {} or"),
        ({"id": "a", "permissions": {"kvstore": None}}, "permissions.kvstore must be an object, not None: pass {} or"),
        ({"id": "a", "permissions": {"wasi": None}}, "permissions.wasi must be an object, not None"),
        ({"id": "a", "limits": None}, "plugin 'a': limits must be an object, not None"),
        (kv(reason=None), "permissions.kvstore.reason must be text, not None"),
        (kv(reason="\udfff"), "permissions.kvstore.reason '\\udfff' holds a lone surrogate"),
        (kv(max_keys=0), "permissions.kvstore.max_keys must be 1 to 4611686018427387904, not 0: pass one like 100000"),
        (kv(max_keys=None), "permissions.kvstore.max_keys must be a whole number, not None: pass one like 100000"),
        (kv(max_keys="1K"), "permissions.kvstore.max_keys must be a whole number, not '1K'"),
        (kv(maxKeys=1), "permissions.kvstore.maxKeys is no field of a manifest (did you mean 'max_keys'?)"),
        (kv(max_key_bytes=0), "permissions.kvstore.max_key_bytes must be 1 to 256, not 0"),
        (kv(max_key_bytes=257), "permissions.kvstore.max_key_bytes must be 1 to 256, not 257"),
        (kv(max_key_bytes="256"), "permissions.kvstore.max_key_bytes must be a whole number, not '256'"),
        (kv(prefix=b"w:"), "permissions.kvstore.prefix must be text, not b'w:'"),
        (kv(prefix="é" * 129), "permissions.kvstore.prefix has 258 bytes, and a key at most 256"),
        (kv(prefix="abc", max_key_bytes=2), "permissions.kvstore.prefix has 3 bytes, and a key at most 2"),
        (kv(read_only=1), "permissions.kvstore.read_only must be true or false, not 1"),
        (kv(read_only="yes"), "permissions.kvstore.read_only must be true or false, not 'yes'"),
        ({"id": "a", "permissions": {"wasi": {"reason": 1}}}, "permissions.wasi.reason must be text, not 1"),
        (limits(fuel=0), "limits.fuel must be 1 to"),
        (limits(fuel=1e6), "limits.fuel must be a whole number, not 1000000.0"),
        (limits(fuel=True), "limits.fuel must be a whole number, not True"),
        (limits(fuel="1M"), "limits.fuel must be a whole number, not '1M'"),
        (limits(timeout=0), "limits.timeout must be more than 0 and at most 100000000 seconds, not 0"),
        (limits(timeout=-1), "limits.timeout must be more than 0"),
        (limits(timeout=float("nan")), "limits.timeout must be more than 0"),
        (limits(timeout=float("inf")), "limits.timeout must be more than 0"),
        (limits(timeout=10**400), "limits.timeout must be more than 0"),
        (limits(timeout="5s"), "limits.timeout must be a number of seconds, not '5s'"),
        (limits(timeout=False), "limits.timeout must be a number of seconds, not False"),
        (kv(reason=deep(100_000)), "permissions.kvstore.reason must be text, not list (it can't be shown)"),
        (kv(max_key_bytes=10**9_000), "kvstore.max_key_bytes must be 1 to 256, not int (it can't be shown)"),
    ],
    ids=named,
)  # fmt: skip
def test_a_bad_manifest_is_refused_in_clear_words(value: Any, said: str) -> None:
    """S1-6: plugin and path, what came, what to pass."""
    found = refusal(value)
    assert said in found
    assert "weather" in found or "'a'" in found or "manifest: id" in found
    assert "pass" in found.lower()
    found.encode()  # a log in UTF-8 can hold it


def test_dataclasses_are_checked_as_they_are_made() -> None:
    """What is made by hand is as right as what is read."""
    for make, said in [
        (lambda: KVGrant(max_bytes=0), "KVGrant.max_bytes must be 1 to"),
        (
            lambda: KVGrant(max_bytes="1MB"),
            "KVGrant.max_bytes must be a whole number, not '1MB': pass a number of bytes like 1000000",
        ),
        (
            lambda: Limits("16MB"),
            "Limits.memory_bytes must be a whole number, not '16MB': pass a number of bytes like 16000000",
        ),
        (lambda: KVGrant(max_keys=0), "KVGrant.max_keys must be 1 to"),
        (lambda: KVGrant(max_keys=1e5), "KVGrant.max_keys must be a whole number, not 100000.0"),
        (lambda: KVGrant(prefix="abc", max_key_bytes=2), "KVGrant.prefix has 3 bytes, and a key at most 2"),
        (lambda: WasiGrant(reason=b""), "WasiGrant.reason must be text, not b''"),
        (lambda: Limits(memory_bytes=1), "Limits.memory_bytes must be 65536 to 4294967296, not 1"),
        (lambda: Limits(timeout="5"), "Limits.timeout must be a number of seconds"),
        (lambda: Manifest("a", kvstore={}), "plugin 'a': kvstore must be a KVGrant, not {}: pass KVGrant()"),
        (lambda: Manifest("a", wasi=True), "plugin 'a': wasi must be a WasiGrant, not True"),
        (lambda: Manifest("a", limits=None), "plugin 'a': limits must be a Limits, not None"),
    ]:
        with pytest.raises(Misuse) as caught:
            make()  # type: ignore[no-untyped-call]
        assert said in str(caught.value)
        assert '"1MB"' not in str(caught.value)  # texts are for mappings


# -- JSON --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "manifest is no JSON: Expecting value"),
        ("weather.json", "or the Path of a file"),
        ('{"id": "a"', "manifest is no JSON"),
        ('{"id": "a"} {}', "manifest is no JSON: Extra data"),
        ('["id"]', "manifest must be a JSON object, not ['id']"),
        ("null", "manifest must be a JSON object, not None"),
        ('"{}"', "manifest must be a JSON object, not '{}'"),
        ('{"id": "a", "id": "b"}', "plugin 'b': id is there twice: pass it once"),
        ('{"id": "a", "limits": {}, "limits": {}}', "plugin 'a': limits is there twice"),
        ('{"id": "a", "permissions": {"wasi": {}, "kvstore": {}, "wasi": {}}}', "'a': permissions.wasi is there twice"),
        ('{"id": "a", "limits": {"fuel": 1, "fuel": 1}}', "plugin 'a': limits.fuel is there twice"),
        ('{"id": "a", "permissions": {"kvstore": {"prefix": "", "prefix": "x"}}}', "kvstore.prefix is there twice"),
        ('{"id": "a", "limits": {"timeout": NaN}}', "limits.timeout must be more than 0 and at most 100000000 seconds"),
        ('{"id": "a", "limits": {"timeout": Infinity}}', "limits.timeout must be more than 0"),
        ('{"id": "a", "limits": {"timeout": 1e999}}', "limits.timeout must be more than 0"),
        ('{"id": "a", "limits": {"fuel": -Infinity}}', "limits.fuel must be a whole number, not -inf"),
        ('{"id": "a", "limits": {"fuel": ' + "9" * 400 + "}}", "limits.fuel must be 1 to"),
        ('{"id": "a", "limits": {"fuel": ' + "9" * 9_000 + "}}", "manifest is no JSON: Exceeds the limit"),
        ('{"id": "\\ud800"}', "manifest: id '\\ud800' holds a lone surrogate"),
        ('{"id": "a\\u0000"}', "manifest: id must not have control characters"),
        ("[" * 200_000, "manifest is no JSON"),
        ('{"id":' * 100_000, "manifest is no JSON"),
        ('{"id": "a", "limits": ' + "[" * 400 + "]" * 400 + "}", "plugin 'a': limits must be an object"),
        (json.dumps(WHOLE) + " " * 1_048_576, "characters, at most 1048576 are allowed"),
    ],
    ids=named,
)  # fmt: skip
def test_bad_json_is_refused_in_clear_words(text: str, said: str, tmp_path: Path) -> None:
    """As a text and as a file, in the same words but for what it's called."""
    assert said in refusal(text)
    path = tmp_path / "it.json"
    path.write_text(text)
    from_file = refusal(path)
    if said.startswith(("manifest is", "manifest must")):
        assert f"manifest {str(path)!r}{said.removeprefix('manifest')}" in from_file
    elif "characters" not in said:
        assert said in from_file


def test_a_path_that_is_no_manifest_is_refused(tmp_path: Path) -> None:
    """Each time the path is named; a pipe isn't waited for, and nothing endless is read."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "latin").write_bytes(b'{"id": "\xe9"}')
    (tmp_path / "large").write_bytes(b" " * 1_048_577)
    (tmp_path / "immense").touch()
    os.truncate(tmp_path / "immense", 2**40)
    for name, why in [
        ("missing", "No such file"), ("folder", ""), ("pipe", "no regular file"), ("latin", "can't be read: 'utf-8'"),
        ("large", "at most 1048576"), ("immense", "at most 1048576"), ("a\0b", "can't be read"),
    ]:  # fmt: skip
        said = refusal(tmp_path / name)
        assert said.startswith(f"manifest {str(tmp_path / name)!r} ")
        assert why in said
    assert "/dev/zero" in refusal(Path("/dev/zero"))


@pytest.mark.parametrize("value", [None, 7, 1.5, True, b"{}", [], [("id", "a")], object(), Manifest, WasiGrant()])
def test_what_is_no_manifest_at_all_is_refused(value: Any) -> None:
    """What may be passed is said."""
    assert "manifest must be a Manifest, a mapping, a JSON text or the Path of a JSON file, not " in refusal(value)


# -- whatever comes ----------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=()), max_size=20) | st.sampled_from(
    ["", "1MB", "10KiB", "0", "-1", "weather", ".", "..", "a/b", "x" * 200, "\ud800", "9" * 5_000]
)
IMMENSE = st.integers(4_000, 6_000).map(lambda digits: 10**digits)  # Python prints some of them, and some not
LEAVES = (
    st.none() | st.booleans() | st.integers() | IMMENSE | IMMENSE.map(int.__neg__) | st.floats() | TEXTS | st.binary()
)
NAMES = TEXTS | st.sampled_from(
    ["id", "permissions", "limits", "kvstore", "wasi", "reason", "max_size", "max_keys", "max_key_bytes"]
    + ["prefix", "read_only", "memory", "fuel", "timeout"]
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.integers() | st.none(), inner, max_size=5),
    max_leaves=12,
)
SIZED = st.integers(-1, 2**33) | st.sampled_from(["64KiB", "1MB", "", None, "0", "16 GiB"]) | LEAVES
NEARLY = st.fixed_dictionaries(
    {"id": st.sampled_from(["weather", "天気"]) | TEXTS},
    optional={
        "permissions": VALUES
        | st.fixed_dictionaries(
            {},
            optional={
                "kvstore": VALUES
                | st.fixed_dictionaries(
                    {},
                    optional={
                        "reason": TEXTS,
                        "max_size": SIZED,
                        "max_keys": st.integers(-1, 2**63) | LEAVES,
                        "max_key_bytes": st.integers(-1, 300) | LEAVES,
                        "prefix": TEXTS,
                        "read_only": st.booleans() | LEAVES,
                    },
                ),
                "wasi": VALUES | st.fixed_dictionaries({}, optional={"reason": TEXTS}),
            },
        ),
        "limits": VALUES
        | st.fixed_dictionaries(
            {}, optional={"memory": SIZED, "fuel": st.integers() | LEAVES, "timeout": st.floats() | LEAVES}
        ),
    },
)


def mapped(manifest: Manifest) -> dict[str, Any]:
    """A manifest as the mapping that makes it again."""
    granted: dict[str, Any] = {}
    if manifest.kvstore is not None:
        of = manifest.kvstore
        granted["kvstore"] = {
            "reason": of.reason, "max_size": of.max_bytes, "max_keys": of.max_keys, "max_key_bytes": of.max_key_bytes,
            "prefix": of.prefix, "read_only": of.read_only,
        }  # fmt: skip
    if manifest.wasi is not None:
        granted["wasi"] = {"reason": manifest.wasi.reason}
    of_limits = manifest.limits
    return {
        "id": manifest.id,
        "permissions": granted,
        "limits": {"memory": of_limits.memory_bytes, "fuel": of_limits.fuel, "timeout": of_limits.timeout},
    }


def accepted_or_refused(value: Any) -> bool:
    """Whether a manifest is made of it. Anything but `Misuse` comes through; what is made can be made again."""
    try:
        made = Manifest.of(value)
    except Misuse as error:
        str(error).encode()
        return False
    assert Manifest.of(mapped(made)) == Manifest.of(json.dumps(mapped(made))) == made
    made.id.encode()
    return True


@given(VALUES | NEARLY)
@settings(deadline=None)
@example(WHOLE)
def test_whatever_is_passed_is_accepted_or_misuse(value: Any) -> None:
    """Values of every kind, and mappings that are nearly right."""
    accepted = accepted_or_refused(value)
    assert not accepted or isinstance(value, Mapping | str)


@given(NEARLY | VALUES)
@settings(deadline=None)
@example(WHOLE)
def test_whatever_a_text_holds_is_accepted_or_misuse(value: Any) -> None:
    """A text says what the mapping it's made from says, where JSON can say it at all."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        return  # bytes, or a number of too many digits
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        assert accepted_or_refused(text) or not accepted_or_refused(value)
    else:
        accepted_or_refused(text)


@given(st.integers(0, len(json.dumps(WHOLE))), st.integers(0, 20), TEXTS | st.sampled_from(list('{}[]",:\\')))
@settings(deadline=None)
def test_a_text_with_a_piece_of_it_replaced_is_accepted_or_misuse(at: int, length: int, piece: str) -> None:
    """What a slip of the hand makes of a right one."""
    text = json.dumps(WHOLE)
    accepted_or_refused(text[:at] + piece + text[at + length :])


def test_the_strategies_reach_what_is_accepted_and_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the three tests above go over isn't all refused at the door, and a planted defect is found."""
    assert find(NEARLY, lambda value: "limits" in value and accepted_or_refused(value))["id"]
    found = find(NEARLY, lambda value: bool((value.get("permissions") or {}) and accepted_or_refused(value)))
    assert found["permissions"]

    def leaks(value: Any) -> bool:
        try:
            return accepted_or_refused(value) and False
        except ValueError:
            return True

    monkeypatch.setattr(module, "_as_text", lambda value, _path: str(value))  # with a lone surrogate in it
    find(VALUES | NEARLY, leaks, settings=settings(max_examples=10_000, deadline=None))
