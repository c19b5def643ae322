"""The soak's plugins: threads that call plugins, well and badly, while these are reloaded and unloaded under them.

    python -m tests.soak.plugins CALLS SEED [--plant PLANT] [--only STEP ...]

runs one storm in this process and prints a line of JSON: what was wrong, and samples of the process's size. Every
answer is held against what it must be; a plugin counts in its store, and the counts must be those of the calls that
were answered. What is left in the end, of wasmtime's objects and of the host's, must be what was there in the
beginning. A PLANT spoils the host first, in a way that has to be reported.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import monotonic
from types import FunctionType
from typing import Any

import wasmtime

from persistency import Closed, Persistency
from persistency.plugins import (
    BadAnswer,
    CallFailed,
    FunctionNotFound,
    KVGrant,
    Limits,
    Manifest,
    Plugin,
    PluginHost,
    PluginTimeout,
    PluginTrapped,
)
from tests.crash.running import last_json, replace_method, run
from tests.soak.part import Part, Tell

WAIT = 60.0  # seconds for anything that comes at once; a hang, not a slow machine
GROWN_MAX = 0.05  # of the process's size, from one half of a storm to the other
SAMPLES = 80
PAGES = 16  # of a guest's memory, at most
PAGE_BYTES = 65_536
SPIN = 0.02  # seconds that a guest may loop
VERSIONS = 4  # of the code; all plugins have the same, so that what one lets go of is what another one asks for

GUEST = r"""(module
  (import "persistency" "fail" (func $fail (param i32 i32) (result i64)))
  (import "persistency" "kv_get" (func $get (param i32 i32 i32 i32) (result i64)))
  (import "persistency" "kv_compare_and_set" (func $swap (param i32 i32 i32 i32 i32 i32) (result i64)))
  (memory (export "memory") 2)
  (func (export "alloc") (param i32) (result i32) (i32.const 1024))
  (func $answer (param $number i64) (result i64)
    (i64.store (i32.const 0) (local.get $number))
    (i64.const 8))
  (func (export "version") (param i32 i32) (result i64) (call $answer (i64.const VERSION)))
  (func (export "echo") (param i32 i32) (result i64)
    (i64.or (i64.shl (i64.extend_i32_u (local.get 0)) (i64.const 32)) (i64.extend_i32_u (local.get 1))))
  (func (export "fails") (param i32 i32) (result i64)
    (drop (call $fail (local.get 0) (local.get 1)))
    (i64.const -1))
  (func (export "traps") (param i32 i32) (result i64) unreachable)
  (func (export "spins") (param i32 i32) (result i64) (loop $again (br $again)) unreachable)
  (func (export "strays") (param i32 i32) (result i64) (i64.const 0x7fffffff00001000))
  (func (export "grows") (param i32 i32) (result i64)
    (local $at i32)
    (loop $again
      (local.set $at (memory.grow (i32.const 1)))
      (if (i32.ne (local.get $at) (i32.const -1))
        (then
          (i32.store (i32.mul (local.get $at) (i32.const 65536)) (i32.const 1))
          (br $again))))
    (call $answer (i64.extend_i32_u (memory.size))))
  (func (export "add") (param $key i32) (param $size i32) (result i64)
    (local $found i64)
    (i64.store (i32.const 8) (i64.const 0))
    (local.set $found (call $get (local.get $key) (local.get $size) (i32.const 8) (i32.const 8)))
    (if (i64.eq (i64.const 1)
          (call $swap (local.get $key) (local.get $size)
            (i32.const 8) (select (i32.const 8) (i32.const -1) (i64.eq (local.get $found) (i64.const 8)))
            (i32.const 16)
            (block (result i32)
              (i64.store (i32.const 16) (i64.add (i64.load (i32.const 8)) (i64.const 1)))
              (i32.const 8))))
      (then (return (call $answer (i64.load (i32.const 16))))))
    (i64.const -1)))
"""


@dataclass
class Plan:
    """One storm. Everything about it follows from the seed, but for who is faster."""

    calls: int
    seed: int
    threads: int = 8
    plugins: int = 4
    plant: str | None = None
    only: list[str] = field(default_factory=list)  # some of the steps, instead of all


@dataclass
class Outcome:
    """What came of a storm. `kib`: the process's size, so often during it; `left`: what there is more than before."""

    wrong: list[str] = field(default_factory=list)
    done: dict[str, int] = field(default_factory=dict)
    kib: list[int] = field(default_factory=list)
    maps: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)
    left: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0


def guest(version: int) -> bytes:
    """Return the code of a plugin, which differs from version to version."""
    return GUEST.replace("VERSION", str(version)).encode()


# -- what there is ----------------------------------------------------------------------------------------------------


def resident_kib() -> int:
    """Return how much memory this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 1024


def mappings() -> int:
    """Return of how many pieces its memory is made: each store that isn't closed has some."""
    return len(Path("/proc/self/maps").read_text().splitlines())


def things() -> Counter[str]:
    """Count what a host makes and must not keep: wasmtime's objects, the functions it calls, threads, descriptors."""
    gc.collect()
    found: Counter[str] = Counter()
    kinds = tuple(
        getattr(wasmtime, name)
        for name in ("Store", "Module", "Linker", "InstancePre", "Instance", "Func", "Memory", "FuncType", "WasiConfig")
    )
    for one in gc.get_objects():
        if isinstance(one, kinds):
            found[type(one).__name__] += 1
        elif isinstance(one, FunctionType) and "<locals>" in one.__qualname__:
            if one.__module__.startswith("persistency.plugins"):
                found["host functions"] += 1
        elif isinstance(one, Plugin | PluginHost):
            found[type(one).__name__] += 1
    found["threads"] = threading.active_count()
    found["descriptors"] = len(os.listdir("/proc/self/fd"))
    return found


# -- planted defects --------------------------------------------------------------------------------------------------

_kept: list[Any] = []


def _keep_stores() -> None:
    """Never close a store, and never let go of one."""
    replace_method(wasmtime.Store, "close", lambda store: _kept.append(store))


def _keep_modules() -> None:
    """Never let go of code that was linked once."""
    instantiate = wasmtime.Linker.instantiate_pre

    def kept(linker: wasmtime.Linker, module: wasmtime.Module) -> wasmtime.InstancePre:
        _kept.append(module)
        return instantiate(linker, module)

    replace_method(wasmtime.Linker, "instantiate_pre", kept)


def _mix_up() -> None:
    """Give one call in a hundred the answer of the one before."""
    call, last, number = Plugin.call, [b""], [0]

    def mixed(plugin: Plugin, name: str, data: bytes = b"", **options: Any) -> Any:
        def mix(answer: bytes) -> bytes:
            number[0] += 1
            last[0], before = answer, last[0]
            return before if number[0] % 100 == 0 else answer

        return call(plugin, name, data, **options).map(mix)

    replace_method(Plugin, "call", mixed)


PLANTS: dict[str, Callable[[], None]] = {"stores": _keep_stores, "modules": _keep_modules, "mixed": _mix_up}
# What each must be reported as, and in how many calls.
SEEN = {"stores": {"grown", "left"}, "modules": {"left"}, "mixed": {"answer"}}
PLANTED_CALLS = 1_500


# -- the storm --------------------------------------------------------------------------------------------------------


class Slot:
    """A plugin as the threads find it. Whoever unloads it puts another one there."""

    def __init__(self, host: PluginHost, number: int) -> None:
        self.host = host
        self.manifest = Manifest(f"plugin {number}", kvstore=KVGrant(), limits=Limits(memory_bytes=PAGES * PAGE_BYTES))
        self.changing = threading.Lock()
        self._turn = threading.Condition()
        self.version = 1
        self.plugin = host.load(self.manifest, guest(1)).result(WAIT)

    def reload(self, wrong: list[str]) -> None:
        """Put other code in its place; the next call gets it."""
        with self.changing:
            self.version = self.version % VERSIONS + 1
            plugin = self.host.load(self.manifest, guest(self.version)).result(WAIT)
            if plugin is not self.plugin:
                wrong.append(f"reload: version {self.version} of {plugin.id} is another object")
            found = int.from_bytes(plugin.call("version").result(WAIT), "little")
            if found != self.version:
                wrong.append(f"reload: version {self.version} of {plugin.id} answered as {found}")

    def unload(self, wrong: list[str]) -> None:
        """Take it away under those who call it, and load it again."""
        with self.changing:
            old = self.plugin
            self.host.unload(old).result(WAIT)
            try:
                old.call("echo", b"late").result(WAIT)
                wrong.append(f"unload: {old.id} answered a call that came after it was unloaded")
            except Closed:
                pass
            plugin = self.host.load(self.manifest, guest(self.version)).result(WAIT)
            with self._turn:
                self.plugin = plugin
                self._turn.notify_all()

    def behind(self, old: Plugin) -> None:
        """Wait until another one is in its place."""
        with self._turn:
            assert self._turn.wait_for(lambda: self.plugin is not old, WAIT)


class Caller:
    """One of the threads: what it does, and what it has counted in each plugin."""

    def __init__(self, storm: Storm, number: int) -> None:
        self.storm = storm
        self.name = f"thread {number}".encode()
        self.chance = random.Random(storm.plan.seed * 1_000 + number)
        self.counted = [0] * len(storm.slots)
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        # Most calls are good ones; a hundredth each takes long or changes what there is.
        self._steps: dict[Callable[[int], None], int] = {
            self._add: 60, self._echo: 15, self._trap: 6, self._fail: 6, self._stray: 4, self._miss: 3,
            self._grow: 3, self._spin: 1, self._reload: 1, self._unload: 1,
        }  # fmt: skip
        if storm.plan.only:
            self._steps = {getattr(self, f"_{name}"): 1 for name in storm.plan.only}

    def run(self) -> None:
        """Call until all calls of the storm are done."""
        try:
            while self.storm.take():
                (step,) = self.chance.choices(list(self._steps), list(self._steps.values()))
                step(self.chance.randrange(len(self.storm.slots)))
                self.done[step.__name__.strip("_")] += 1
        except BaseException as error:
            self.wrong.append(f"other: {self.name.decode()} ended with {error!r}")

    def _call(self, at: int, name: str, data: bytes = b"", timeout: float | None = None) -> bytes:
        slot = self.storm.slots[at]
        while True:
            plugin = slot.plugin
            try:
                return plugin.call(name, data, timeout=timeout).result(WAIT)
            except Closed:  # it was unloaded; nothing of this call was begun
                slot.behind(plugin)

    def _fails(self, at: int, kind: type[CallFailed], name: str, data: bytes = b"", **options: Any) -> None:
        try:
            answer = self._call(at, name, data, **options)
        except CallFailed as error:
            told = type(error) is kind and error.plugin == self.storm.slots[at].manifest.id
            if not told or (kind is CallFailed and data.decode() not in str(error)):
                self.wrong.append(f"answer: {name} of plugin {at} failed with {error!r}")
        else:
            self.wrong.append(f"answer: {name} of plugin {at} gave {answer!r:.60}")

    def _gives(self, at: int, expected: bytes, name: str, data: bytes = b"") -> None:
        answer = self._call(at, name, data)
        if answer != expected:
            self.wrong.append(f"answer: {name} of plugin {at} gave {answer!r:.60}, not {expected!r:.60}")

    def _add(self, at: int) -> None:
        self.counted[at] += 1
        self._gives(at, self.counted[at].to_bytes(8, "little"), "add", self.name)

    def _echo(self, at: int) -> None:
        data = self.chance.randbytes(self.chance.choice([0, 1, 100, 5_000, PAGE_BYTES]))
        self._gives(at, data, "echo", data)

    def _grow(self, at: int) -> None:
        self._gives(at, PAGES.to_bytes(8, "little"), "grows")

    def _trap(self, at: int) -> None:
        self._fails(at, PluginTrapped, "traps")

    def _fail(self, at: int) -> None:
        self._fails(at, CallFailed, "fails", self.name + b", %d" % self.chance.getrandbits(30))

    def _stray(self, at: int) -> None:
        self._fails(at, BadAnswer, "strays")

    def _miss(self, at: int) -> None:
        self._fails(at, FunctionNotFound, "nothing")

    def _spin(self, at: int) -> None:
        self._fails(at, PluginTimeout, "spins", timeout=SPIN)

    def _reload(self, at: int) -> None:
        self.storm.slots[at].reload(self.wrong)

    def _unload(self, at: int) -> None:
        self.storm.slots[at].unload(self.wrong)


class Storm:
    """All of it: the plugins, how many calls are left, and the samples that are taken meanwhile."""

    def __init__(self, host: PluginHost, plan: Plan, outcome: Outcome) -> None:
        self.plan = plan
        self.outcome = outcome
        self.slots = [Slot(host, number) for number in range(plan.plugins)]
        self._lock = threading.Lock()
        self._left = plan.calls
        self._every = max(1, plan.calls // SAMPLES)

    def take(self) -> bool:
        """Take one of the calls that are left."""
        with self._lock:
            if self._left % self._every == 0:
                self.outcome.kib.append(resident_kib())
                self.outcome.maps.append(mappings())
                self.outcome.threads.append(threading.active_count())
            self._left -= 1
            return self._left >= 0

    def run(self) -> None:
        """Have all threads call, and look at what they have counted."""
        callers = [Caller(self, number) for number in range(self.plan.threads)]
        threads = [threading.Thread(target=caller.run) for caller in callers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        done: Counter[str] = Counter()
        for caller in callers:
            self.outcome.wrong += caller.wrong
            done.update(caller.done)
            for slot, count in zip(self.slots, caller.counted, strict=True):
                stored = None
                with contextlib.suppress(Closed):  # it couldn't be loaded again, which is told
                    assert slot.plugin.store is not None
                    stored = slot.plugin.store.get(caller.name.decode()).result(WAIT)
                if count != int.from_bytes(stored or b"", "little"):
                    self.outcome.wrong.append(f"answer: {slot.plugin.id} holds {stored!r}, not {count}")
        self.outcome.done = dict(done)


def storm(plan: Plan, root: Path) -> Outcome:
    """Run a storm in an empty directory, in this process."""
    outcome, begun = Outcome(), monotonic()
    if plan.plant is not None:
        PLANTS[plan.plant]()
    # What is made once per process, such as a thread of the engine's own, is there before it is counted.
    with Persistency(root / "first") as p, PluginHost(p, cache_dir=root / "cache") as host:
        Slot(host, 0).reload(outcome.wrong)
    before = things()
    with Persistency(root / "data") as p, PluginHost(p, cache_dir=root / "cache") as host:
        Storm(host, plan, outcome).run()
    outcome.left = dict(things() - before)
    outcome.seconds = monotonic() - begun
    return outcome


def grown(kib: list[int]) -> float:
    """Return by which part a process grew from one half of the samples to the other, after a quarter to warm up."""
    warm = kib[len(kib) // 4 :]
    half = len(warm) // 2
    return median(warm[half:]) / median(warm[:half]) - 1


def complaints(outcome: Outcome, *, long: bool) -> list[str]:
    """Return what is wrong, each with its kind in front of the first colon. Only a `long` storm tells of growth."""
    found = list(outcome.wrong)
    if outcome.left:
        found.append(f"left: {', '.join(f'{count} {name}' for name, count in outcome.left.items())}")
    if long and grown(outcome.kib) > GROWN_MAX:
        found.append(f"grown: by {grown(outcome.kib):.1%} from one half to the other, of {outcome.kib[0]} KiB")
    if long and grown(outcome.maps) > GROWN_MAX:
        found.append(f"grown: from {median(outcome.maps)} mappings to {outcome.maps[-1]}")
    return found


# -- processes of their own, and the table ----------------------------------------------------------------------------


def apart(plan: Plan, timeout: float) -> Outcome:
    """Run a storm in a process of its own. Raises `AssertionError` if it ends otherwise than it should."""
    arguments = [str(plan.calls), str(plan.seed)]
    arguments += ["--plant", plan.plant] if plan.plant else []
    arguments += ["--only", *plan.only] if plan.only else []
    done = run("tests.soak.plugins", *arguments, timeout=timeout, flags=("-W", "error"))
    assert not done.returncode, f"return code {done.returncode}: {done.stderr[-2000:]}"
    assert not done.stderr, done.stderr[-2000:]
    return Outcome(**last_json(done))


def planted(name: str, seed: int) -> tuple[set[str], Outcome]:
    """Run a storm over a host that was spoilt; return the kinds of what was reported."""
    outcome = apart(Plan(PLANTED_CALLS, seed, plant=name), timeout=100)
    return {complaint.partition(":")[0] for complaint in complaints(outcome, long=True)}, outcome


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Have planted defects reported; then 8 threads call 4 plugins `10 * cycles` times (10,000), and ten times that.

    And once more with hardly anything but loads: what is shared between versions and between plugins comes and goes.
    """
    part, begun = Part("plugins, planted defects"), monotonic()
    for name, kinds in SEEN.items():
        tell(f"{part.name}: {name}")
        seen, _ = planted(name, given.seed)
        if not kinds <= seen:
            part.wrong.append(f"{name}: not reported as {', '.join(sorted(kinds - seen))}")
    part.cells = {
        "cycles": f"{PLANTED_CALLS * len(SEEN):,}",
        "other": f"{len(SEEN) - len(part.wrong)} of {len(SEEN)} seen",
    }
    part.cells["seconds"] = f"{monotonic() - begun:.1f}"
    yield part
    loads = ["reload", "unload", "echo"]
    for factor, only in ((10, []), (100, []), (20, loads)):
        if monotonic() - begun >= given.seconds:
            return
        calls = max(2_000, factor * given.cycles)
        part = Part(f"plugins, {calls:,} {'loads and calls' if only else 'calls'}")
        tell(part.name)
        try:
            outcome = apart(Plan(calls, given.seed, only=only), timeout=120 + calls / 20)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            part.wrong.append(f"{part.name}: {error}")
            yield part
            continue
        part.wrong = [f"{part.name}: seed {given.seed}: {one}" for one in complaints(outcome, long=True)]
        part.cells = {
            "cycles": f"{sum(outcome.done.values()):,}",
            "in between": f"{max(outcome.threads)} threads at most",
            "other": str(len(part.wrong)),
            "rows": f"{outcome.done.get('add', 0):,} counted",
            "MiB grown": f"{grown(outcome.kib):+.1%} of {median(outcome.kib) / 1024:.0f}",
            "seconds": f"{outcome.seconds:.1f}",
        }
        yield part


def few_arenas() -> None:
    """Have the C library's allocator use two areas for all threads, where it can be told so.

    It gives each thread one of its own, and what is freed in one isn't used for another: so a process with 40 threads
    grows for tens of thousands of calls until all are as large as they ever get, and a leak would be hidden in that.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(-8, 2)  # M_ARENA_MAX


def main(arguments: list[str]) -> int:
    """Run one storm and print what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak.plugins")
    parser.add_argument("calls", type=int)
    parser.add_argument("seed", type=int)
    parser.add_argument("--plant", choices=PLANTS)
    parser.add_argument("--only", nargs="*", default=[])
    plan = Plan(**vars(parser.parse_args(arguments)))
    few_arenas()
    with tempfile.TemporaryDirectory(prefix="plugins-") as root:
        outcome = storm(plan, Path(root))
    print(json.dumps(asdict(outcome)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
