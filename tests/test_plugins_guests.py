"""The ABI's page and the guest library: they say what `persistency.plugins.abi` says, and their examples work."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wasmtime", reason="needs the extra plugins")

from persistency import Persistency
from persistency.plugins import (
    BadAnswer,
    CallFailed,
    KVGrant,
    Limits,
    Manifest,
    Plugin,
    PluginHost,
    PluginTrapped,
    abi,
    calling,
    linking,
    wasi,
)
from persistency.plugins.compiling import COMPILE_BYTES_MAX, WASM_BYTES_MAX
from persistency.plugins.compiling_process import OUTLINE_BYTES_MAX
from persistency.plugins.context import TEXT_BYTES_MAX
from persistency.plugins.engines import _SETTINGS, STACK_BYTES_MAX
from tests.compilers import EXAMPLES, NO_C, OPTIONS, c_compiler, compiled

PAGE = Path(__file__).parent.parent / "docs" / "plugin-abi.md"
TEXT = PAGE.read_text()
PROSE = " ".join(TEXT.split())
HEADER = (EXAMPLES / "persistency.h").read_text()
BLOCKS = dict(re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL))
TYPES = {"p": "i32", "n": "i32", "l": "i64"}
WAIT = 60

needs_c = pytest.mark.skipif(c_compiler() is None, reason=NO_C)


def numbers(module: Any, names: list[str]) -> dict[str, int]:
    """The numbers of some names of a module."""
    return {name: getattr(module, name) for name in names}


ERRORS = numbers(abi, [name for name, number in vars(abi).items() if isinstance(number, int) and number < 0])
RETURNED = numbers(abi, ["FAILED", "NOT_IMPLEMENTED"])
for name in RETURNED:
    del ERRORS[name]


# -- what is written is what there is ---------------------------------------------------------------------------------


def section(title: str) -> str:
    """The text below a title of the page."""
    return TEXT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def table(text: str, columns: int) -> list[list[str]]:
    """The rows of all tables of so many columns in a text, without their heads."""
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in rows if len(row) == columns]


def test_the_page_has_every_function_with_its_parameters() -> None:
    """No function is missing in the table, none is too many, and each has its parameters, types and permission."""
    rows = {}
    for function, type_, granted, _answer in table(section("What a plugin imports"), 4)[1:]:
        name, parameters = re.fullmatch(r"`(\w+)\((.*)\)`", function).groups()  # type: ignore[union-attr]
        letters = "".join(
            "n" if one.endswith("_len") else "l" if one.endswith("_ms") else "p"
            for one in re.findall(r"\w+", parameters)
        )
        rows[name] = letters, type_.strip("`"), None if granted == "nothing" else granted.strip("`")
    assert rows == {
        one.name: (one.parameters, f"({', '.join(TYPES[letter] for letter in one.parameters)}) -> i64", one.service)
        for one in abi.FUNCTIONS
    }


def test_the_page_names_the_functions_that_write() -> None:
    """Whoever has a store that is read-only is told which functions aren't there."""
    (listed,) = re.findall(r"Those that write \(([^)]*)\)", PROSE)
    assert re.findall(r"\w+", listed) == [one.name for one in abi.FUNCTIONS if one.writes]


def test_the_page_has_every_error_number() -> None:
    """Those of the host's functions, and those that a guest returns."""

    def listed(text: str) -> dict[str, int]:
        return {name: int(number) for number, name, _ in table(text, 3) if re.fullmatch(r"-\d", number)}

    assert listed(section("Error numbers")) == ERRORS
    assert listed(section("A call")) == RETURNED


def test_the_page_has_the_other_numbers() -> None:
    """The module's name, limits, what ABSENT is, and the names that are exported."""
    assert f"from the module `{abi.MODULE}`" in PROSE
    assert f"ABSENT ({abi.ABSENT}, which is -1 as a signed i32)" in PROSE
    assert f"at most {abi.KEYS_PER_CALL_MAX}, in the order" in PROSE
    assert f"one of at most {abi.KEYS_PER_CALL_MAX} keys" in PROSE
    assert f"`fail` have at most {TEXT_BYTES_MAX} bytes" in PROSE
    assert f"of 1 to {KVGrant().max_key_bytes} bytes" in PROSE
    assert f"The code is at most {WASM_BYTES_MAX // 2**20} MiB" in PROSE
    assert f"how many keys there are, {KVGrant().max_keys:,} unless it says otherwise" in PROSE
    exports = {row[0].strip("`") for row in table(section("What a plugin exports"), 3)}
    assert exports == {"export", *abi.RESERVED, "any other name"} - {"_start"}
    assert "`_start`, which isn't called" in PROSE


def test_the_page_has_the_limits_of_a_module_and_of_wasi() -> None:
    """Each number is the one that the code has."""
    rows = {name: said for name, said in table(section("What a module may be made of"), 2) if name.strip("-|")}
    assert rows.pop("of a module") == "at most"
    limits = {name: [int(each.replace(",", "")) for each in re.findall(r"[\d,]+", said)] for name, said in rows.items()}
    assert limits == {
        "imports; exports": [linking.IMPORTS_MAX],
        "names of exports": [linking.NAMES_CHARACTERS_MAX],
        "types, functions, imports and exports, as the binary format lists them": [OUTLINE_BYTES_MAX // 2**20],
        "tables": [calling.TABLES_MAX, calling.TABLE_ELEMENTS_MAX],
        "its stack, for what WebAssembly itself keeps there": [STACK_BYTES_MAX // 1024],
    }
    assert linking.EXPORTS_MAX == linking.IMPORTS_MAX
    assert f"`compile_timeout` and {COMPILE_BYTES_MAX // 2**30} GiB of address space" in PROSE
    assert f"A call has {wasi.LINES_PER_CALL_MAX} lines, of {wasi.LINE_BYTES_MAX} bytes each" in PROSE
    assert f"takes {wasi._WRITE_BYTES_MAX:,} bytes at most" in PROSE
    assert PROSE.count(f"Over {wasi._BUFFERS_MAX} ") == 2
    assert f"answer INTR ({wasi._INTR})" in PROSE


def test_the_page_shows_lists_as_they_are() -> None:
    """The bytes of the example are those that the ABI makes."""
    rows = {name: bytes.fromhex(shown.replace("`", "")) for name, shown in table(section("Lists"), 2)[1:]}
    assert rows == {
        "the keys `ada` and `bob`": abi.packed(b"ada") + abi.packed(b"bob"),
        "their values: `42`, and none": abi.packed(b"42") + abi.packed(None),
    }


def test_the_page_says_which_features_there_are() -> None:
    """What the engines are set to is what the page lists."""
    there = {"wasm_bulk_memory", "wasm_multi_value", "wasm_reference_types", "wasm_simd", "wasm_tail_call"}
    features = {name for name, value in _SETTINGS.items() if name.startswith("wasm_") and value is True}
    assert {name for name in features if not name.startswith("wasm_relaxed_simd")} == there


def test_the_header_has_every_function_with_its_parameters() -> None:
    """The library imports each function of the ABI by its name and type, and wraps it."""
    found = {}
    for name, declared, parameters in re.findall(
        r"^PERSISTENCY_IMPORT\((\w+)\)\s+int64_t persistency_host_(\w+)\(([^;]*)\);", HEADER, re.MULTILINE
    ):
        assert name == declared
        given = [] if parameters == "void" else [" ".join(one.split()) for one in parameters.split(",")]
        found[name] = "".join("p" if "*" in one else "l" if one.startswith("int64_t ") else "n" for one in given)
        lengths = [one for one in given if one.startswith("uint32_t ")]
        assert all(one.endswith("_len") for one in lengths)
    assert found == {one.name: one.parameters for one in abi.FUNCTIONS}
    for one in abi.FUNCTIONS:
        assert re.search(rf"\bpersistency_{one.name}\(", HEADER), one.name


def test_the_header_has_every_number() -> None:
    """Each is defined as the ABI has it, and there is no other."""
    defined = re.findall(r"^#define PERSISTENCY_(\w+) \(?(-?\w+?)u?\)?(?: +/\*.*)?$", HEADER, re.MULTILINE)
    assert {name: int(number, 0) for name, number in defined} == {
        **ERRORS,
        **RETURNED,
        **numbers(abi, ["ABSENT", "KEYS_PER_CALL_MAX"]),
        "TEXT_BYTES_MAX": TEXT_BYTES_MAX,
    }


def test_the_pages_and_the_library_have_the_options_that_are_tested() -> None:
    """What an author is told to type is what the tests here compile with."""
    for text in (TEXT, HEADER, (EXAMPLES / "README.md").read_text()):
        assert " ".join(OPTIONS) in " ".join(text.split())


# -- the page's example, in four languages ----------------------------------------------------------------------------


def check_enter(wasm: bytes, tmp_path: Path) -> None:
    """Have the plugin of the page do what the page says, and fail as it should."""
    with Persistency(tmp_path / "data") as p, PluginHost(p) as host:
        plugin = host.load(Manifest("door", kvstore=KVGrant(max_bytes=5_000)), wasm).result(WAIT)
        assert plugin.functions == ("enter",)
        names = [b"ada", b"bob", "\N{GREEK SMALL LETTER ALPHA}\0".encode(), b"", b"x" * 2_000, b"eve"]
        answers = [plugin.call("enter", name).result(WAIT) for name in names]
        assert answers == [b"nobody", *names[:-1]]
        with pytest.raises(CallFailed) as failed:
            plugin.call("enter", b"y" * 6_000).result(WAIT)
        assert type(failed.value) is CallFailed
        assert re.search(r"the store failed|storage limit exceeded", str(failed.value))
        assert plugin.store is not None
        assert plugin.store.get("last").result() == b"eve"


def test_the_example_in_the_text_format(tmp_path: Path) -> None:
    """A host takes it as it stands on the page."""
    check_enter(BLOCKS["wat"].encode(), tmp_path)


@needs_c
def test_the_example_in_c(tmp_path: Path) -> None:
    """It compiles as the page says, with the library beside it and nothing else."""
    check_enter(compiled(BLOCKS["c"], tmp_path), tmp_path)


def test_the_example_in_rust(tmp_path: Path) -> None:
    """It compiles to a plugin where Rust's target is installed; else its types are checked for this machine."""
    rustc = shutil.which("rustc")
    if rustc is None:
        pytest.skip("no rustc")
    source, target = tmp_path / "lib.rs", "wasm32-unknown-unknown"
    source.write_text(BLOCKS["rust"])
    asked = [rustc, "--print", "target-libdir", "--target", target]
    found = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip())
    options = ["--edition", "2021", "-D", "warnings", "-o", str(tmp_path / "plugin.wasm"), str(source)]
    if found.is_dir() and any(found.glob("libcore-*")):
        run([rustc, "--crate-type", "cdylib", "-O", "--target", target, *options])
        check_enter((tmp_path / "plugin.wasm").read_bytes(), tmp_path)
    else:
        run([rustc, "--crate-type", "lib", "--emit", "metadata", *options])


def test_the_example_in_go(tmp_path: Path) -> None:
    """It compiles to a plugin where TinyGo is installed."""
    tinygo = shutil.which("tinygo")
    if tinygo is None:
        pytest.skip("no tinygo")
    (tmp_path / "main.go").write_text(BLOCKS["go"])
    run([tinygo, "build", "-target=wasm-unknown", "-o", str(tmp_path / "plugin.wasm"), str(tmp_path / "main.go")])
    check_enter((tmp_path / "plugin.wasm").read_bytes(), tmp_path)


def run(command: list[str]) -> None:
    """Run a compiler."""
    finished = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert finished.returncode == 0, finished.stderr


def test_the_page_has_these_examples_and_no_other() -> None:
    """Each block of the page is of a language that is looked at here."""
    assert list(BLOCKS) == ["wat", "c", "rust", "go"]
    assert len(re.findall(r"^```\w+$", TEXT, re.MULTILINE)) == len(BLOCKS)


# -- the library in C -------------------------------------------------------------------------------------------------

EVERY = r"""
#include "persistency.h"

static persistency_buffer answers;

static void note(int64_t number)
{
    persistency_put_entry(&answers, persistency_bytes_of(&number, sizeof number));
}

static persistency_bytes last_error(void)
{
    uint8_t *room = persistency_make(PERSISTENCY_TEXT_BYTES_MAX);
    int64_t size = persistency_last_error(room, PERSISTENCY_TEXT_BYTES_MAX);
    return persistency_bytes_of(room, (uint32_t)size);
}

/* Call everything once, with a large value as the argument, and note down what came of it. */
PERSISTENCY_EXPORT(every) int64_t every(const uint8_t *data, uint32_t size)
{
    persistency_bytes large = persistency_bytes_of(data, size), none = persistency_none(), found, entry;
    persistency_bytes a = persistency_text("key/a"), b = persistency_text("key/b"), c = persistency_text("other");
    uint8_t room[16];
    answers = persistency_buffer_new();
    note(persistency_kv_set(a, persistency_text("1")));
    note(persistency_kv_set_with_ttl(b, large, 3600 * 1000));
    note(persistency_kv_get(a, room, sizeof room));
    note(room[0]);
    note(persistency_kv_get(b, room, sizeof room));
    note(persistency_kv_get(b, NULL, 0));
    note(persistency_kv_read(b, &found));
    persistency_put_entry(&answers, found);
    note(persistency_kv_read(c, &found));
    note(persistency_is_none(found));
    persistency_put_entry(&answers, last_error());
    persistency_buffer keys = persistency_buffer_new();
    persistency_put_entry(&keys, c);
    persistency_put_entry(&keys, a);
    note(persistency_kv_get_many(persistency_buffer_bytes(keys), room, sizeof room));
    note(persistency_kv_read_many(persistency_buffer_bytes(keys), &found));
    while (persistency_next(&found, &entry)) {
        persistency_put_entry(&answers, entry);
    }
    note(persistency_kv_has(a));
    note(persistency_kv_has(c));
    note(persistency_kv_list(persistency_text("key/"), persistency_text(""), room, 8));
    note(persistency_kv_read_page(persistency_text("key/"), a, &found));
    note(persistency_next(&found, &entry));
    persistency_put_entry(&answers, entry);
    note(persistency_next(&found, &entry));
    note(persistency_kv_compare_and_set(c, none, persistency_text("new")));
    note(persistency_kv_compare_and_set(c, none, persistency_text("newer")));
    note(persistency_kv_compare_and_set(c, persistency_text("new"), none));
    note(persistency_kv_storage_used());
    note(persistency_kv_delete(a));
    note(persistency_kv_delete(a));
    note(persistency_kv_delete_by_prefix(persistency_text("key")));
    note(persistency_kv_set(persistency_text(""), a));
    note(persistency_kv_set_with_ttl(a, a, 0));
    note(persistency_kv_set(a, persistency_bytes_of(data, 0x7fffffff)));
    persistency_put_entry(&answers, persistency_joined(a, c));
    return persistency_answer(persistency_buffer_bytes(answers));
}

PERSISTENCY_EXPORT(refused) int64_t refused(const uint8_t *data, uint32_t size)
{
    (void)data, (void)size;
    return persistency_fail("for a reason");
}

PERSISTENCY_EXPORT(passed_on) int64_t passed_on(const uint8_t *data, uint32_t size)
{
    persistency_kv_set(persistency_bytes_of(data, size), persistency_text(""));
    return persistency_fail_again();
}

PERSISTENCY_EXPORT(too_much) int64_t too_much(const uint8_t *data, uint32_t size)
{
    persistency_buffer buffer = persistency_buffer_new();
    for (;;) {
        persistency_put(&buffer, persistency_bytes_of(data, size));
    }
}

PERSISTENCY_EXPORT(not_yet) int64_t not_yet(const uint8_t *data, uint32_t size)
{
    (void)data, (void)size;
    return PERSISTENCY_NOT_IMPLEMENTED;
}
"""

OWN_ALLOC = r"""
#define PERSISTENCY_OWN_ALLOC
#include "persistency.h"

static uint8_t place[100];
static int taken;

void *persistency_alloc(uint32_t size)
{
    return size > sizeof place || taken++ ? NULL : place;
}

PERSISTENCY_EXPORT(echo) int64_t echo(const uint8_t *data, uint32_t size)
{
    return persistency_answer(persistency_bytes_of(data, data == place ? size : 0));
}
"""


def parts(data: bytes) -> list[bytes | None]:
    """The entries of a list, `None` for none."""
    found: list[bytes | None] = []
    while data:
        size, data = int.from_bytes(data[:4], "little"), data[4:]
        absent = size == abi.ABSENT
        found.append(None if absent else data[:size])
        data = data if absent else data[size:]
    return found


def number(value: int) -> bytes:
    """A number as the example in C notes it down."""
    return struct.pack("<q", value)


def loaded(host: PluginHost, wasm: bytes, **limits: Any) -> Plugin:
    """Load code that may use the store."""
    return host.load(Manifest("tried", kvstore=KVGrant(), limits=Limits(**limits)), wasm).result(WAIT)


@needs_c
@pytest.mark.parametrize("language", ["c", "c++"])
def test_every_function_of_the_library_works(language: str, tmp_path: Path) -> None:
    """Each wrapper passes its arguments to its function and gives its answer; the helpers do what they say.

    In C and in C++ alike. Covers S0-86 and S0-87 from the guest's side.
    """
    if c_compiler(language) is None:
        pytest.skip(NO_C)
    wasm = compiled(EVERY, tmp_path, language=language)
    large = bytes(range(256)) * 4
    with Persistency(tmp_path / "data") as p, PluginHost(p) as host:
        plugin = loaded(host, wasm)
        found = parts(plugin.call("every", large).result(WAIT))
        told = found.pop(10)
        assert told == b"there is no key 'other'"
        assert found == [
            *(number(value) for value in (0, 0, 1, ord("1"), 1_024, 1_024, 1_024)), large,  # set, get, read
            *(number(value) for value in (abi.NOT_FOUND, 1, 9, 9)), None, b"1",  # get_many
            *(number(value) for value in (1, 0, abi.TOO_SMALL, 9, 1)), b"key/b", number(0),  # has, list
            *(number(value) for value in (1, 0, 1, 1_025, 1, 0, 1)),  # compare_and_set, storage_used, delete
            *(number(value) for value in (abi.INVALID, abi.INVALID, abi.FAULT)), b"key/aother",
        ]  # fmt: skip


@needs_c
def test_how_a_plugin_in_c_fails(tmp_path: Path) -> None:
    """It says why, passes on what the store said, says that it does nothing, or has no memory left: that is a trap."""
    wasm = compiled(EVERY, tmp_path)
    with Persistency(tmp_path / "data") as p, PluginHost(p) as host:
        plugin = loaded(host, wasm, memory_bytes=2**20)
        with pytest.raises(CallFailed, match="for a reason"):
            plugin.call("refused").result(WAIT)
        with pytest.raises(CallFailed, match="key"):
            plugin.call("passed_on", b"").result(WAIT)
        with pytest.raises(PluginTrapped) as trapped:
            plugin.call("too_much", bytes(1_000)).result(WAIT)
        assert trapped.value.reason == "unreachable"
        with pytest.raises(CallFailed):
            plugin.call("not_yet").result(WAIT)
        with pytest.raises(CallFailed):
            plugin.call("every", bytes(2**20)).result(WAIT)
        assert len(plugin.call("every", bytes(100_000)).result(WAIT)) > 100_000


@needs_c
def test_an_allocator_of_ones_own(tmp_path: Path) -> None:
    """A plugin may have its own: the host uses that one, once in a call, and there may be no room."""
    wasm = compiled(OWN_ALLOC, tmp_path)
    with Persistency(tmp_path / "data") as p, PluginHost(p) as host:
        plugin = loaded(host, wasm)
        for size in (0, 1, 100):
            assert plugin.call("echo", bytes(size)).result(WAIT) == bytes(size)
        with pytest.raises(CallFailed) as failed:
            plugin.call("echo", bytes(101)).result(WAIT)
        assert not isinstance(failed.value, BadAnswer | PluginTrapped)


@needs_c
def test_the_library_in_several_files(tmp_path: Path) -> None:
    """Two files of one plugin may both include it."""
    (tmp_path / "other.c").write_text(
        '#include "persistency.h"\npersistency_bytes other(void);\n'
        'persistency_bytes other(void) { return persistency_joined(persistency_text("a"), persistency_text("b")); }\n'
    )
    source = (
        '#include "persistency.h"\npersistency_bytes other(void);\n'
        "PERSISTENCY_EXPORT(both) int64_t both(const uint8_t *data, uint32_t size)\n"
        "{ return persistency_answer(persistency_joined(persistency_bytes_of(data, size), other())); }\n"
    )
    wasm = compiled(source, tmp_path, "other.c")
    with Persistency(tmp_path / "data") as p, PluginHost(p) as host:
        plugin = host.load({"id": "both"}, wasm).result(WAIT)  # granted nothing: what it doesn't use isn't imported
        assert plugin.call("both", b"c").result(WAIT) == b"cab"
