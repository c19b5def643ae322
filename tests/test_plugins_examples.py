"""The examples of plugins: they do what they say, through a real host."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("wasmtime", reason="needs the extra plugins")

from persistency import Persistency
from persistency.plugins import CallFailed, KVGrant, Limits, Manifest, PermissionDenied, Plugin, PluginHost
from tests.compilers import EXAMPLES, NO_C, c_compiler, compiled

WAIT = 60
COUNTER = EXAMPLES / "counter.wat"
NOW = 1_800_000_000.0

needs_c = pytest.mark.skipif(c_compiler() is None, reason=NO_C)


def count(plugin: Plugin, function: str, name: bytes) -> int:
    """Call a function of the counter."""
    answer = plugin.call(function, name).result(WAIT)
    assert len(answer) == 8
    return int.from_bytes(answer, "little")


# -- the counter in the text format -----------------------------------------------------------------------------------


def test_the_counter_counts(tmp_path: Path) -> None:
    """It counts each name by itself, answers with what is stored, and goes on where the process before has ended."""
    for round_ in range(2):
        with Persistency(tmp_path) as p, PluginHost(p) as host:
            counter = host.load(Manifest("counter", kvstore=KVGrant()), COUNTER).result(WAIT)
            assert counter.functions == ("add", "get")
            assert [count(counter, "add", b"a") for _ in range(3)] == [1 + 3 * round_, 2 + 3 * round_, 3 + 3 * round_]
            assert count(counter, "add", "\N{SNOWMAN}".encode()) == round_ + 1
            assert [count(counter, "get", name) for name in (b"a", b"nobody")] == [3 + 3 * round_, 0]


def test_two_plugins_of_one_code_have_a_store_each(tmp_path: Path) -> None:
    """Neither sees what the other counts: each has a job, and a file, of its own (S1-10)."""
    with Persistency(tmp_path) as p, PluginHost(p) as host:
        one, other = (host.load(Manifest(name, kvstore=KVGrant()), COUNTER).result(WAIT) for name in ("one", "other"))
        assert [count(one, "add", b"a"), count(one, "add", b"a"), count(other, "add", b"a")] == [1, 2, 1]
        assert one.store is not None
        assert other.store is not None
        assert one.store.job.path != other.store.job.path
        assert one.sha256 == other.sha256


def test_calls_at_once_lose_no_count(tmp_path: Path) -> None:
    """Eight threads count under one name: each gets a number of its own, and none is left out."""
    with Persistency(tmp_path) as p, PluginHost(p) as host, ThreadPoolExecutor(8) as pool:
        counter = host.load(Manifest("counter", kvstore=KVGrant()), COUNTER).result(WAIT)
        found = list(pool.map(lambda _: count(counter, "add", b"a"), range(200)))
        assert sorted(found) == list(range(1, 201))


def test_what_isnt_a_number_is_refused(tmp_path: Path) -> None:
    """Something else under the name is told in the plugin's words, and stays as it is."""
    with Persistency(tmp_path) as p, PluginHost(p) as host:
        counter = host.load(Manifest("counter", kvstore=KVGrant()), COUNTER).result(WAIT)
        assert counter.store is not None
        counter.store.set("text", b"no").result()
        for function in ("add", "get"):
            with pytest.raises(CallFailed, match="no number can be read under that name"):
                count(counter, function, b"text")
        with pytest.raises(CallFailed, match="no number can be read under that name"):
            count(counter, "add", b"")  # no key
        assert counter.store.get("text").result() == b"no"


def test_an_argument_without_room_is_refused(tmp_path: Path) -> None:
    """`alloc` says that there is none for it; the function isn't called."""
    with Persistency(tmp_path) as p, PluginHost(p) as host:
        counter = host.load(Manifest("counter", kvstore=KVGrant()), COUNTER).result(WAIT)
        with pytest.raises(CallFailed):
            count(counter, "add", bytes(64_513))
        assert count(counter, "get", b"a") == 0


def test_without_its_permission_the_counter_isnt_loaded(tmp_path: Path) -> None:
    """Each function that isn't granted is named; for a store that is read-only those that write."""
    with Persistency(tmp_path) as p, PluginHost(p) as host:
        for grant, missing in (
            (None, {"persistency.kv_get", "persistency.kv_compare_and_set"}),
            (KVGrant(read_only=True), {"persistency.kv_compare_and_set"}),
        ):
            with pytest.raises(PermissionDenied) as denied:
                host.load(Manifest("counter", kvstore=grant), COUNTER).result(WAIT)
            assert set(denied.value.functions) == missing
            assert all(name in str(denied.value) for name in missing)
        assert "counter" not in host


# -- the visits in C --------------------------------------------------------------------------------------------------


@needs_c
def test_a_visitor_counts_once_in_half_an_hour(tmp_path: Path) -> None:
    """The time to live of what the plugin notes down decides, to the millisecond."""
    now = [NOW]
    wasm = compiled(EXAMPLES / "visits.c", tmp_path)
    with Persistency(tmp_path / "data", clock=lambda: now[0]) as p, PluginHost(p) as host:
        visits = host.load(Manifest("visits", kvstore=KVGrant()), wasm).result(WAIT)

        def visit(name: bytes) -> bytes:
            return visits.call("visit", name).result(WAIT)

        assert [visit(b"ada"), visit(b"ada"), visit(b"bob")] == [b"1", b"1", b"1"]
        now[0] += 1_799.999
        assert visit(b"ada") == b"1"
        now[0] += 0.001
        assert [visit(b"ada"), visit(b"ada")] == [b"2", b"2"]
        assert visits.call("report").result(WAIT) == b"2 ada\n1 bob\n"
        assert [visits.call("forget", b"ada").result(WAIT) for _ in range(2)] == [b"1", b"0"]
        assert [visit(b"ada"), visits.call("report").result(WAIT)] == [b"1", b"1 ada\n1 bob\n"]


@needs_c
def test_the_report_has_pages(tmp_path: Path) -> None:
    """More visitors than there is room for at once are all in it, in the order of their names."""
    wasm = compiled(EXAMPLES / "visits.c", tmp_path)
    names = [f"visitor {number:04} {'x' * 100}" for number in range(200)]
    with Persistency(tmp_path / "data") as p, PluginHost(p) as host:
        visits = host.load(Manifest("visits", kvstore=KVGrant(), limits=Limits(memory_bytes=2**20)), wasm).result(WAIT)
        for name in reversed(names):
            visits.call("visit", name.encode()).result(WAIT)
        assert visits.call("report").result(WAIT).decode().splitlines() == [f"1 {name}" for name in names]


@needs_c
def test_the_visits_say_why_they_fail(tmp_path: Path) -> None:
    """What the plugin has to say itself, and what the store said to it."""
    wasm = compiled(EXAMPLES / "visits.c", tmp_path)
    with Persistency(tmp_path / "data") as p, PluginHost(p) as host:
        visits = host.load(Manifest("visits", kvstore=KVGrant(max_bytes=2)), wasm).result(WAIT)
        with pytest.raises(CallFailed, match="a visitor has a name"):
            visits.call("visit").result(WAIT)
        with pytest.raises(CallFailed, match="at most 256"):
            visits.call("visit", b"x" * 300).result(WAIT)
        assert [visits.call("visit", name).result(WAIT) for name in (b"ada", b"bob")] == [b"1", b"1"]
        with pytest.raises(CallFailed, match="storage limit exceeded"):
            visits.call("visit", b"eve").result(WAIT)


@needs_c
def test_the_readme_of_the_examples_works(tmp_path: Path) -> None:
    """Its program runs beside what its command has made."""
    (program,) = re.findall(r"^```python\n(.*?)^```$", (EXAMPLES / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "visits.wasm").write_bytes(compiled(EXAMPLES / "visits.c", tmp_path))
    finished = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent.parent)},
        capture_output=True, text=True, timeout=WAIT, check=False,
    )  # fmt: skip
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == "1 ada\n1 bob\n\n"


def test_the_readme_names_every_example() -> None:
    """No file of the folder is left out."""
    linked = set(re.findall(r"\]\(([\w.]+)\)", (EXAMPLES / "README.md").read_text()))
    assert linked == {path.name for path in EXAMPLES.iterdir() if path.is_file()} - {"README.md"}
