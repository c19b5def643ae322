"""A plugin host beside bare wasmtime: `python -m benchmarks.plugins [--calls N] [--repeat N]`.

One run measures all of it, in turn. Bare is what anybody who calls a guest has to do by hand: a store with limits and
a deadline, an instance of what was linked before, its exports, and the call, in the caller's own thread. A host does
the same on a thread of its own, and answers with a reply. The store's functions, called by a guest, are held against
the same verbs of a `KVStore` in the caller's thread. A second load is one by another host, over the same directory.

Rules:
  1. Both have the same limits, and engines that stop a guest in the same way; bare links once, outside of what is
     measured, as a host does.
  2. Every answer is looked at, and what a guest has stored is read back.
  3. A ratio is made within one repetition; of one call in a host to a bare one it has to be less than 3.

Doesn't know: how a host does it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any, NamedTuple

import typer
import wasmtime
from rich.console import Console
from rich.table import Table

from benchmarks.harness import settled_garbage, timed_parts
from benchmarks.machine import facts
from benchmarks.process import call_apart, resident_kib
from benchmarks.verify import Mismatch, check_answers
from persistency import Persistency
from persistency.kvstore import KVStore
from persistency.plugins import KVGrant, Limits, Manifest, Plugin, PluginHost

app = typer.Typer(add_completion=False)
out = Console()

THREADS, PLUGINS = 8, 4
RATIO_MAX = 3.0
MEMORY_BYTES = 16 * 1024 * 1024
FUEL = 1_000_000
VALUE = b"a value of a hundred bytes, more or less, as they are kept in stores like this one: %06d ......." % 7

GUEST = r"""(module
  (import "persistency" "kv_set" (func $set (param i32 i32 i32 i32) (result i64)))
  (import "persistency" "kv_get" (func $get (param i32 i32 i32 i32) (result i64)))
  (memory (export "memory") 1)
  (func (export "alloc") (param i32) (result i32) (i32.const 1024))
  (func (export "empty") (param i32 i32) (result i64) (i64.const 0))
  (func (export "echo") (param i32 i32) (result i64)
    (i64.or (i64.shl (i64.extend_i32_u (local.get 0)) (i64.const 32)) (i64.extend_i32_u (local.get 1))))
  ;; a key of 8 bytes, and a value behind it
  (func (export "set") (param i32 i32) (result i64)
    (call $set (local.get 0) (i32.const 8)
      (i32.add (local.get 0) (i32.const 8)) (i32.sub (local.get 1) (i32.const 8))))
  (func (export "get") (param i32 i32) (result i64)
    (i64.or (i64.const 0x200000000000)
      (call $get (local.get 0) (local.get 1) (i32.const 0x2000) (i32.const 4096))))
  ;; the same a hundred times, within one call
  (func (export "hundred") (param i32 i32) (result i64)
    (local $left i32) (local $found i64)
    (local.set $left (i32.const 100))
    (loop $again
      (local.set $found (call $get (local.get 0) (local.get 1) (i32.const 0x2000) (i32.const 4096)))
      (br_if $again (local.tee $left (i32.sub (local.get $left) (i32.const 1)))))
    (i64.or (i64.const 0x200000000000) (local.get $found))))
"""


class Measured(NamedTuple):
    """What one row of the table compares: its name, ours and theirs by what they are, and whether there's a target."""

    what: str
    ours: str
    theirs: str
    target: float | None = None


Doing = Callable[[Sequence[Any]], Sequence[Any]]


# -- one call ---------------------------------------------------------------------------------------------------------


class Bare:
    """A guest called by hand, as wasmtime's documentation does it, with what keeps a guest from running away."""

    def __init__(self, metered: bool) -> None:
        config = wasmtime.Config()
        config.epoch_interruption = True
        config.consume_fuel = metered
        self._engine = wasmtime.Engine(config)
        self._metered = metered
        linker = wasmtime.Linker(self._engine)
        number, pointer = wasmtime.ValType.i64(), wasmtime.ValType.i32()
        for name in ("kv_set", "kv_get"):
            linker.define_func("persistency", name, wasmtime.FuncType([pointer] * 4, [number]), lambda *_given: 0)
        self._pre = linker.instantiate_pre(wasmtime.Module(self._engine, GUEST))

    def __call__(self, name: str, data: bytes) -> bytes:
        """Call a function in a fresh instance."""
        store = wasmtime.Store(self._engine)
        try:
            store.set_limits(memory_size=MEMORY_BYTES, instances=1, memories=1)
            store.set_epoch_deadline(3_000)
            if self._metered:
                store.set_fuel(FUEL)
            exports: Any = self._pre.instantiate(store).exports(store)
            at, memory = 0, exports["memory"]
            if data:
                at = exports["alloc"](store, len(data))
                memory.write(store, data, at)
            answer: int = exports[name](store, at, len(data))
            begin, size = answer >> 32, answer & 0xFFFF_FFFF
            return bytes(memory.read(store, begin, begin + size)) if size else b""
        finally:
            store.close()


CALLS = (
    (Measured("an empty function", "host", "bare wasmtime", RATIO_MAX), "empty", b"", False),
    (Measured("an empty function, fuel counted", "host", "bare wasmtime", RATIO_MAX), "empty", b"", True),
    (Measured("1 KiB there and back", "host", "bare wasmtime"), "echo", bytes(range(256)) * 4, False),
)


@contextmanager
def hosted(directory: Path, metered: bool = False) -> Iterator[Plugin]:
    """Load the guest into a host of its own."""
    limits = Limits(memory_bytes=MEMORY_BYTES, fuel=FUEL if metered else None)
    manifest = Manifest("guest", kvstore=KVGrant(max_bytes=1_000_000_000), limits=limits)
    with Persistency(directory) as p, PluginHost(p) as host:
        yield host.load(manifest, GUEST.encode()).result()


def measure_calls(calls: int, repeat: int, parent: Path) -> list[dict[str, Any]]:
    """Call guests, in a host and by hand in turn; return the microseconds of each repetition."""
    rows = []
    for measured, name, data, metered in CALLS:
        bare = Bare(metered)
        with fresh(parent) as directory, hosted(directory, metered) as plugin:

            def ours(items: Sequence[Any], plugin: Plugin = plugin, name: str = name) -> list[bytes]:
                return [plugin.call(name, item).result() for item in items]

            def theirs(items: Sequence[Any], bare: Bare = bare, name: str = name) -> list[bytes]:
                return [bare(name, item) for item in items]

            expected = [data] * calls
            rows.append(compared(measured, (ours, theirs), [data] * calls, expected, repeat))
    return rows


def compared(
    measured: Measured, doing: tuple[Doing, Doing], items: Sequence[Any], expected: Sequence[Any], repeat: int
) -> dict[str, Any]:
    """Do the same by two, in turn, after one round that doesn't count; return the microseconds per item."""
    us: tuple[list[float], list[float]] = [], []
    for turn in range(repeat + 1):
        for who, do, times in zip(measured[1:3], doing, us, strict=True):
            answers, took = timed_parts(do, items)
            check_answers(f"{measured.what}, {who}", answers, expected)
            if turn:
                times.append(took)
    return {
        **measured._asdict(),
        "us": {measured.ours: us[0], measured.theirs: us[1]},
        "ratio": [our / their for our, their in zip(*us, strict=True)],
    }


def measure_store(calls: int, repeat: int, parent: Path) -> list[dict[str, Any]]:
    """Use the store through a guest, and directly; return the microseconds of each repetition."""
    keys = [f"key {number % 1_000:04}" for number in range(calls)]
    rows = []
    with fresh(parent) as directory, hosted(directory) as plugin:
        assert plugin.store is not None
        beside = KVStore(plugin.store.job, category="beside")  # in the same file

        def set_by_guest(items: Sequence[str]) -> list[bytes]:
            return [plugin.call("set", key.encode() + VALUE).result() for key in items]

        def set_directly(items: Sequence[str]) -> list[bytes]:
            return [beside.set(key, VALUE).result() or b"" for key in items]

        def get_by_guest(items: Sequence[str]) -> list[bytes]:
            return [plugin.call("get", key.encode()).result() for key in items]

        def get_directly(items: Sequence[str]) -> list[bytes | None]:
            return [beside.get(key).result() for key in items]

        def hundred_by_guest(items: Sequence[str]) -> list[bytes]:
            return [plugin.call("hundred", key.encode()).result() for key in items]

        def hundred_directly(items: Sequence[str]) -> list[bytes | None]:
            return [[beside.get(key).result() for _ in range(100)][-1] for key in items]

        for name, pair, expected in (
            ("kv_set of 100 bytes", (set_by_guest, set_directly), b""),
            ("kv_get of 100 bytes", (get_by_guest, get_directly), VALUE),
            ("kv_get, a hundred in a call", (hundred_by_guest, hundred_directly), VALUE),
        ):
            measured = Measured(name, "through a guest", "KVStore")
            each = keys[: max(10, calls // 20)] if "hundred" in name else keys
            rows.append(compared(measured, pair, each, [expected] * len(each), repeat))
        stored = [plugin.store.get(key).result() for key in sorted(set(keys))]
        check_answers("the store of the guest, read back", stored, [VALUE] * len(stored))
    return rows


# -- loading ----------------------------------------------------------------------------------------------------------


def big_module(functions: int) -> bytes:
    """Make code that takes a while to compile: so many functions of loops, branches and arithmetic, all different."""
    parts = []
    for number in range(functions):
        steps = "".join(
            f"(local.set $b (i64.add (i64.mul (local.get $b) (i64.const {number * 31 + step}))"
            f" (i64.rotl (local.get $a) (i64.const {step}))))"
            f"(if (i64.lt_u (local.get $b) (local.get $a)) (then (local.set $a (i64.xor (local.get $a)"
            f" (i64.load offset={8 * step} (i32.const {number % 1000}))))))"
            for step in range(20)
        )
        parts.append(
            f"(func $f{number} (param $a i64) (result i64) (local $b i64) (loop $again {steps}"
            "(br_if $again (i64.eq (local.get $a) (i64.const 1)))) (local.get $b))"
        )
    parts.append(
        '(func (export "run") (param i32 i32) (result i64) (i64.store (i32.const 2048)'
        f" (call $f{functions - 1} (i64.const 77))) (i64.const {(2048 << 32) | 8}))"
    )
    head = '(memory (export "memory") 1) (func (export "alloc") (param i32) (result i32) (i32.const 1024))'
    return bytes(wasmtime.wat2wasm(f"(module {head} {''.join(parts)})"))


def measure_loads(functions: int, repeat: int, parent: Path) -> dict[str, Any]:
    """Load code that nobody has compiled yet, and again by another host; return the milliseconds of each repetition."""
    wasm = big_module(functions)
    ms: dict[str, list[float]] = {"compiled": [], "from the cache": []}
    for _ in range(repeat):
        with fresh(parent) as directory, Persistency(directory / "data") as p:
            answers = []
            for times in ms.values():
                with PluginHost(p, cache_dir=directory / "cache") as host, settled_garbage():
                    begun = perf_counter()
                    plugin = host.load({"id": "big"}, wasm).result()
                    times.append((perf_counter() - begun) * 1_000)
                    answers.append(plugin.call("run").result())
            check_answers("the same code, from the cache", answers[1:], answers[:1])
    pairs = zip(ms["compiled"], ms["from the cache"], strict=True)
    return {"bytes": len(wasm), "ms": ms, "ratio": [compiled / cached for compiled, cached in pairs]}


# -- many at once -----------------------------------------------------------------------------------------------------


def measure_crowd(calls: int, parent: Path) -> dict[str, Any]:
    """Call 4 plugins by 8 threads, in a process of its own; return how many calls a second, and how much it grew."""
    from benchmarks.plugins import crowd  # by the name a fresh process has for it, also where this is the program

    with fresh(parent) as directory:
        return call_apart(crowd, calls, str(directory))


def crowd(calls: int, directory: str) -> dict[str, Any]:
    """Call 4 plugins so many times by 8 threads, after a tenth of that to warm up."""
    with Persistency(directory) as p, PluginHost(p) as host:
        manifests = [Manifest(f"guest {number}", kvstore=KVGrant()) for number in range(PLUGINS)]
        plugins = [host.load(manifest, GUEST.encode()).result() for manifest in manifests]
        _crowded(plugins, max(THREADS, calls // 10))
        before = resident_kib()
        begun = perf_counter()
        done = _crowded(plugins, calls)
        took = perf_counter() - begun
        return {"calls": done, "per_second": done / took, "kib_before": before, "kib_after": resident_kib()}


def _crowded(plugins: Sequence[Plugin], calls: int) -> int:
    each, wrong = calls // THREADS, []

    def work(number: int) -> None:
        try:
            for at in range(each):
                plugin, data = plugins[(number + at) % PLUGINS], b"%08d" % at
                answer = plugin.call("echo", data).result()
                if answer != data:
                    raise Mismatch(f"thread {number} got {answer!r:.60} for {data!r}")
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    with settled_garbage():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if wrong:
        raise wrong[0]
    return each * THREADS


# -- the report -------------------------------------------------------------------------------------------------------


@contextmanager
def fresh(parent: Path) -> Iterator[Path]:
    """Give a directory that is gone afterwards."""
    directory = Path(tempfile.mkdtemp(prefix="plugins-", dir=parent))
    try:
        yield directory
    finally:
        shutil.rmtree(directory)


def spread(ratios: Sequence[float]) -> str:
    """Show the median of ratios, and from where to where they go."""
    return f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def _calls_table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="microseconds per call, one after the other")
    for column in ("what", "ours", "us", "beside", "us", "ratio", "target"):
        table.add_column(column, justify="left" if column in ("what", "ours", "beside") else "right")
    for row in rows:
        ours, theirs = (f"{median(times):.1f}" for times in row["us"].values())
        target = "" if row["target"] is None else f"< {row['target']:.0f}"
        table.add_row(row["what"], row["ours"], ours, row["theirs"], theirs, spread(row["ratio"]), target)
    return table


def _others_table(loads: dict[str, Any], many: dict[str, Any]) -> Table:
    table = Table(title="loading, and many at once")
    table.add_column("what")
    table.add_column("measured", justify="right")
    size = f"{loads['bytes'] / 1e6:.1f} MB of code"
    table.add_row(f"load of {size}, compiled, ms", f"{median(loads['ms']['compiled']):.0f}")
    table.add_row(f"load of {size}, from the cache, ms", f"{median(loads['ms']['from the cache']):.1f}")
    table.add_row("compiled / from the cache", spread(loads["ratio"]))
    table.add_row(
        f"{THREADS} threads, {PLUGINS} plugins, {many['calls']:,} calls: a second", f"{many['per_second']:,.0f}"
    )
    if many["kib_before"] is not None:
        before, after = many["kib_before"] / 1024, many["kib_after"] / 1024
        table.add_row("memory before and after, MiB", f"{before:.1f}, {after:.1f} ({after / before - 1:+.1%})")
    return table


@app.command()
def main(
    calls: Annotated[int, typer.Option(min=10, help="Calls of each measurement.")] = 5_000,
    repeat: Annotated[int, typer.Option(min=1, help="Interleaved repetitions.")] = 5,
    functions: Annotated[int, typer.Option(min=1, help="Functions of the code that is loaded.")] = 2_000,
    directory: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Where the files go; the default is for temporary ones."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Measure a plugin host beside bare wasmtime."""
    parent = Path(tempfile.gettempdir()) if directory is None else directory
    machine = {**facts(parent), "wasmtime": version("wasmtime")}
    try:
        rows = measure_calls(calls, repeat, parent) + measure_store(calls, repeat, parent)
        loads = measure_loads(functions, repeat, parent)
        many = measure_crowd(2 * calls, parent)
    except Mismatch as mismatch:
        out.print(f"a wrong result, so nothing counts: {mismatch}", markup=False, highlight=False)
        raise typer.Exit(1) from mismatch
    out.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False)
    out.print(_calls_table(rows))
    out.print(_others_table(loads, many))
    if json_file is not None:
        results = {"calls": rows, "loads": loads, "crowd": many}
        report = {"machine": machine, "calls": calls, "repeat": repeat, "functions": functions, "results": results}
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    missed = [row["what"] for row in rows if row["target"] is not None and median(row["ratio"]) >= row["target"]]
    if missed:
        out.print(f"over the target: {', '.join(missed)}", markup=False, highlight=False)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.plugins")
