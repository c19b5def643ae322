"""The house rules, read off the tree: import order, doors, sizes, docstrings.

A rule that is only written down is forgotten; here it fails.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent / "persistency"

# From the roof down: a module imports only what stands below it. A folder stands for all that is in it, and the
# modules named together don't import one another unless the order says so.
FLOORS = [
    "__main__",
    "cli",
    "integrations",
    "plugins",
    "plugins.host",
    "plugins.loading",
    "plugins.plugin",
    "plugins.calling",
    "plugins.linking",
    "plugins.wasi",
    "plugins.kvservice",
    "plugins.services",
    "plugins.guestmemory",
    "plugins.shape",
    "plugins.errands",
    "plugins.line",
    "plugins.crew",
    "plugins.epochs",
    "plugins.compiling",
    "plugins.compiling_process",
    "plugins.engines",
    "plugins.cache",
    "plugins.manifest",
    "plugins.context",
    "plugins.abi",
    "plugins.errors",
    "recipes",
    "recipes.queue",
    "recipes.queue_message",
    "recipes.queue_alive",
    "recipes.queue_rows",
    "recipes.queue_records",
    "recipes.memoized",
    "recipes.memoize_calls",
    "recipes.memoize_flights",
    "recipes.memoize_rows",
    "recipes.memoize_keys",
    "recipes.memoize_options",
    "recipes.orderedlog",
    "recipes.orderedlog_consumer",
    "recipes.orderedlog_rows",
    "recipes.lock",
    "recipes.lock_grant",
    "recipes.lock_rows",
    "recipes.lock_keeper",
    "recipes.lock_line",
    "recipes.ratelimit",
    "recipes.baton",
    "recipes.baton_pace",
    "recipes.baton_process",
    "recipes.waiting",
    "recipes.runner",
    "testing",
    "testing.suite",
    "testing.batches",
    "testing.care",
    "testing.feed",
    "testing.quota",
    "testing.reaping",
    "testing.reopening",
    "testing.rows",
    "testing.runs",
    "testing.swaps",
    "testing.ends",
    "testing.checks",
    "testing.clock",
    "__init__",
    "shared",
    "shared.store",
    "shared.collection",
    "shared.pool",
    "shared.sequenced",
    "shared.places",
    "shared.following",
    "kvstore",
    "category",
    "mapping",
    "coding",
    "feed",
    "engine",
    "reader",
    "sweeps",
    "driving",
    "registry",
    "slots",
    "lifecycle",
    "options",
    "job",
    "transfer",
    "outside",
    "reads",
    "care",
    "closing",
    "transaction",
    "counting",
    "messages",
    "paging",
    "arguments",
    "actor.errand",
    "actor.worker",
    "actor.serving",
    "actor.starter",
    "actor.activation",
    "actor.upkeep",
    "actor.turns",
    "actor.slowness",
    "actor.slot",
    "actor.accounts",
    "actor.waiters",
    "actor.clock",
    "actor.mailbox",
    "actor.bounds",
    "actor.door",
    "actor.sleeper",
    "actor.settling",
    "actor.reply",
    "actor.loops",
    "actor.failures",
    "actor.tally",
    "actor",
    "storage.postgres",
    "storage.postgres.root",
    "storage.postgres.store",
    "storage.postgres.reading",
    "storage.postgres.bell",
    "storage.postgres.ahead",
    "storage.postgres.standing",
    "storage.postgres.draft",
    "storage.postgres.writes",
    "storage.postgres.overlay",
    "storage.postgres.cover",
    "storage.postgres.reads",
    "storage.postgres.books",
    "storage.postgres.ownership",
    "storage.postgres.pool",
    "storage.postgres.schema",
    "storage.postgres.session",
    "storage.postgres.connecting",
    "storage.postgres.faults",
    "storage.postgres.address",
    "storage.postgres.packing",
    "storage.directory",
    "storage.reading",
    "storage.snapshots",
    "storage.sqlite",
    "storage.folding",
    "storage.beside",
    "storage.group",
    "storage.copying",
    "storage.checking",
    "storage.table",
    "storage.changes",
    "storage.quota",
    "storage.bulk",
    "storage.soundness",
    "storage.wal",
    "storage.watch",
    "storage.looking",
    "storage.strangers",
    "storage.meta",
    "storage.schema",
    "storage.inherited",
    "storage.pagecache",
    "storage.memory",
    "storage.memory_rows",
    "storage.files",
    "storage.names",
    "storage.openings",
    "storage.port",
    "storage.verbs",
    "storage",
    "ops",
    "codec.fixed",
    "codec.objects",
    "codec.records",
    "codec.keys",
    "codec.parts",
    "codec.stream",
    "codec.values",
    "codec",
    "frozen",
    "errors",
    "logfields",
]
SLOW_TO_IMPORT = {"dataclasses", "inspect"}  # together as long as a fifth of the package
ADAPTERS = {
    "storage.directory",
    "storage.sqlite",
    "storage.reading",
    "storage.memory",
    "storage.postgres.root",
    "storage.postgres.store",
    "storage.postgres.reading",
}

# Each outside thing has one door.
DOORS = {
    "apsw": ("storage.",),
    "cbor2": ("codec.values",),
    "asyncio": ("actor.loops",),
    "trio": ("actor.loops",),
    "anyio": (),
    "msgspec": ("codec.objects",),
    "pydantic": ("codec.objects",),
    "pydantic_core": ("codec.objects",),
    "typer": ("cli",),
    "rich": ("cli",),
    "prometheus_client": ("integrations.prometheus",),
    "opentelemetry": ("integrations.opentelemetry",),
    "key_value": ("integrations.keyvalue",),
    "starlette": ("integrations.starlette",),
    "langgraph": ("integrations.langgraph",),
    "langchain_core": ("integrations.langgraph",),
    "django": ("integrations.django",),
    "threading": (
        "shared",
        "engine",
        "registry",
        "lifecycle",
        "slots",
        "transaction",
        "actor.",
        "storage.openings",
        "storage.postgres",
        "cli",
        "plugins",
        "integrations",
        "recipes",
        "testing",
    ),
    "concurrent": ("actor.reply", "actor.settling", "cli", "integrations", "plugins", "recipes"),
    "fcntl": ("storage.files",),
    "atexit": ("lifecycle", "plugins.host", "recipes.baton_process", "integrations.django.places"),
    "signal": ("lifecycle", "cli"),
    "multiprocessing": ("lifecycle", "recipes.baton_process"),
    "pickle": ("integrations.django.values", "integrations.migration.pickles"),
    "sqlite3": ("integrations.migration.foreign",),
    "lmdb": ("integrations.migration.lmdb",),
    "psycopg": ("storage.postgres",),
    "wasmtime": ("plugins",),
    "pytest": (),
}
LINES_MAX = 400
FUNCTION_LINES_MAX = 50


def name_of(path: Path) -> str:
    """The module's name within the package; a folder's is the folder's own."""
    parts = path.relative_to(HOUSE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


MODULES = {name_of(path): path for path in sorted(HOUSE.rglob("*.py"))}


def floor_of(name: str) -> int:
    """The module's floor: its own entry, or its folder's."""
    while name not in FLOORS:
        if "." not in name:
            pytest.fail(f"{name} has no floor in the house")
        name = name.rpartition(".")[0]
    return FLOORS.index(name)


def imports_of(path: Path) -> list[tuple[int, str]]:
    """Every module a file imports, with its line; names imported from a package count as its modules if they are."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = inner.removeprefix("persistency.") in MODULES
                found.append((node.lineno, inner if is_module else str(node.module)))
    return found


def inner(name: str) -> str:
    """The name within the package of one of its modules."""
    return name.partition(".")[2] or "__init__"


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name: str) -> None:
    """A module imports only modules that stand below it in the house."""
    for line, imported in imports_of(MODULES[name]):
        if imported.split(".")[0] == "persistency":
            below = floor_of(inner(imported))
            here = floor_of(name)
            same_room = FLOORS[here] == FLOORS[below] and name.split(".")[0] in {"cli", "integrations", "recipes"}
            assert here < below or same_room, f"{name}:{line} imports {imported}, which stands above it"


@pytest.mark.parametrize("name", MODULES)
def test_outside_things_have_one_door(name: str) -> None:
    """What isn't ours is imported only where its door is."""
    for line, imported in imports_of(MODULES[name]):
        doors = DOORS.get(imported.split(".")[0])
        if doors is not None:
            allowed = any(name == door or name.startswith(door.rstrip(".") + ".") for door in doors)
            assert allowed, f"{name}:{line} imports {imported}, whose door is {doors}"


@pytest.mark.parametrize("name", MODULES)
def test_only_the_engine_names_an_adapter(name: str) -> None:
    """The storage adapters are known to the engine, to one another and to nobody else."""
    for line, imported in imports_of(MODULES[name]):
        if inner(imported) in ADAPTERS:
            assert name in {"engine", *ADAPTERS}, f"{name}:{line} names the adapter {imported}"


@pytest.mark.parametrize("name", MODULES)
def test_rooms_are_small_and_say_what_they_are(name: str) -> None:
    """A module has at most 400 lines, its functions at most 50, and it opens with a docstring."""
    path = MODULES[name]
    text = path.read_text()
    tree = ast.parse(text)
    assert len(text.splitlines()) <= LINES_MAX, f"{name} has over {LINES_MAX} lines"
    opening = ast.get_docstring(tree)
    assert opening, f"{name} doesn't say what it is"
    if path.name != "__init__.py" and path.name != "__main__.py":
        assert "Rules:" in opening, f"{name} doesn't say its rules"
        assert "Doesn't know" in opening, f"{name} doesn't say what it doesn't know"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0  # type: ignore[operator]  # always set
            assert lines <= FUNCTION_LINES_MAX, f"{name}.{node.name} has {lines} lines"


def test_no_room_is_empty() -> None:
    """Every module is imported by another one, or is a door to the outside."""
    front = {"__init__", "__main__", "testing", "codec.fixed", "actor", "storage", "storage.postgres", "codec"}
    used = {inner(imported) for path in MODULES.values() for _, imported in imports_of(path)}
    unused = {name for name in MODULES if name not in used and name not in front and not name.startswith("cli")}
    assert not unused - {name for name in unused if name.split(".")[0] in {"integrations", "recipes", "plugins"}}


def test_importing_the_package_brings_in_only_its_two_dependencies() -> None:
    """`import persistency` needs apsw and cbor2, and neither asyncio nor any extra."""
    program = "import sys; before = set(sys.modules); import persistency; print(*sorted(set(sys.modules) - before))"
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60, cwd=HOUSE.parent
    )
    tops = {name.split(".")[0] for name in found.stdout.split()}
    foreign = tops - set(sys.stdlib_module_names) - {"persistency"}
    assert foreign <= {"apsw", "cbor2", "_cbor2"}, foreign
    assert "asyncio" not in tops


def test_importing_the_package_brings_in_no_view_and_nothing_slow() -> None:
    """What a service that only opens jobs has no use for is imported when it is asked for; no name is missing."""
    program = """
import sys, persistency
print(*sorted(sys.modules))
everything = {name: getattr(persistency, name) for name in persistency.__all__}
assert set(persistency.__all__) <= set(dir(persistency))
from persistency import *
assert all(globals()[name] is value for name, value in everything.items())
assert persistency.Category.__module__ == "persistency.category"
try:
    persistency.Categories
except AttributeError as error:
    assert "Categories" in str(error)
else:
    raise AssertionError
"""
    found = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60, cwd=HOUSE.parent
    )
    views = {"category", "coding", "codec.objects", "codec.records", "mapping", "feed", "kvstore", "shared", "transfer"}
    slow = {f"persistency.{view}" for view in views} | {"hashlib", "random", "tempfile", "persistency.storage.memory"}
    assert not SLOW_TO_IMPORT & set(found.stdout.split())
    assert not slow & set(found.stdout.split())


def test_who_only_reads_and_writes_never_imports_what_is_slow(tmp_path: Path) -> None:
    """A program that opens a job, writes, reads, runs a function and looks at the numbers, which are a dataclass."""
    program = """
import sys
from persistency import Persistency, Put, key
with Persistency(sys.argv[1]) as p, p.open_job("a") as job:
    job.put("c", key("k"), b"x", ttl=60)
    job.commit([Put("c", ("l",), bytearray(b"y"))]).result()
    assert [row.payload for row in job.scan("c").result()] == [b"x", b"y"]
    assert job.run(lambda tx: tx.get("c", ("l",))).result() == b"y"
    numbers = job.statistics()
    print(*sys.modules)
import dataclasses
assert dataclasses.asdict(numbers)["pending"] == 0
"""
    found = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60,
        cwd=HOUSE.parent,
    )  # fmt: skip
    assert not SLOW_TO_IMPORT & set(found.stdout.split())


def test_words_that_never_stay() -> None:
    """No note to self and no name that says nothing stays in the tree."""
    notes = ["TO" + "DO", "FIX" + "ME", "XX" + "X"]
    for name, path in MODULES.items():
        text = path.read_text()
        assert not [note for note in notes if note in text], name
        assert not {"utils", "common", "helpers", "manager"} & set(name.split(".")), name
