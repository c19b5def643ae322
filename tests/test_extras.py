"""Extras: the core needs two packages and no more, and whoever uses an extra that is missing reads what to install."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HOUSE = Path(__file__).parent.parent
PROJECT = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
# What an extra brings for whoever runs it; the others are for those who work on the package.
EXTRAS = {
    "cli": ["typer", "rich"],
    "typed": ["msgspec", "pydantic"],
    "prometheus": ["prometheus_client"],
    "opentelemetry": ["opentelemetry"],
    "keyvalue": ["key_value"],
    "starlette": ["starlette"],
    "langgraph": ["langgraph"],
    "django": ["django"],
    "lmdb": ["lmdb"],
    "postgres": ["psycopg"],
    "plugins": ["wasmtime"],
}

# Packages that are imported under another name than they are installed by.
IMPORTED_AS = {
    "opentelemetry_api": "opentelemetry",
    "py_key_value_aio": "key_value",
    "langgraph_checkpoint": "langgraph",
}

# Before anything is imported: as if these had never been installed.
WITHOUT = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""


def run(program: str, *, without: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program where some packages are missing."""
    text = (WITHOUT.format(missing=set(without)) if without else "") + program
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", text],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        cwd=HOUSE,
    )


def test_the_core_needs_two_packages() -> None:
    """Two are declared, and what is loaded by `import persistency` is theirs, ours, or Python's."""
    names = [re.split(r"[><=\[ ]", dependency)[0] for dependency in PROJECT["dependencies"]]
    assert names == ["apsw", "cbor2"]
    program = """
import sys
before = set(sys.modules)
import persistency
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
"""
    found = run(program)
    assert found.stderr == ""
    assert set(found.stdout.split()) <= {"persistency", "apsw", "cbor2", "_cbor2"}


def test_the_core_works_without_any_extra() -> None:
    """With every package of every extra missing a job is opened, written, read and followed, objects and all."""
    program = """
from dataclasses import dataclass
from persistency import Category, ChangeFeed, KVStore, Persistency, typed

@dataclass
class Point:
    x: int

with Persistency(":memory:", slow_after=0) as p:
    job = p.open_job("a", feed_changes_max=10)
    feed = ChangeFeed(job)
    points = Category(job, "points", typed(Point))
    points.put((1,), Point(2))
    assert points.get((1,)).result() == Point(2)
    assert next(feed).category == "points"
    KVStore(job).set("k", b"x").result()
print("done")
"""
    ended = run(program, without=sorted({name for names in EXTRAS.values() for name in names}))
    assert ended.stdout == "done\n", ended.stderr


@pytest.mark.parametrize("extra", ["prometheus", "opentelemetry", "keyvalue", "starlette", "langgraph", "django"])
def test_a_missing_integration_names_its_extra(extra: str) -> None:
    """Importing it raises one line, without the import that failed before it, and can be caught as any import error."""
    module = f"persistency.integrations.{extra}"
    ended = run(f"import {module}", without=EXTRAS[extra])
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == (
        f"ModuleNotFoundError: {module} needs the extra '{extra}': pip install 'persistency[{extra}]'"
    )
    assert ended.stderr.count("Traceback") == 1
    caught = run(
        f"try:\n    import {module}\nexcept ImportError as error:\n    print(error.name)", without=EXTRAS[extra]
    )
    assert caught.stdout == f"{EXTRAS[extra][0]}\n"


def test_a_missing_driver_names_its_extra() -> None:
    """A root on PostgreSQL is refused in one line where the driver is missing; it is loaded for nothing else."""
    program = """
import sys
from persistency import Misuse, Persistency
assert "psycopg" not in sys.modules
try:
    Persistency("postgresql://user:secret@host/db")
except Misuse as error:
    print(error, error.hint)
"""
    ended = run(program, without=EXTRAS["postgres"])
    assert "pip install 'persistency[postgres]'" in ended.stdout, ended.stderr
    assert "secret" not in ended.stdout
    assert len(ended.stdout.splitlines()) == 1
    assert run(program).stdout == ""


@pytest.mark.parametrize(("extra", "inner"), [("prometheus", "http"), ("opentelemetry", "contextvars")])
def test_a_defect_isnt_taken_for_a_missing_extra(extra: str, inner: str) -> None:
    """If a module of our own, or one that the extra's own package needs, can't be found, that is what is said."""
    program = f"import persistency.integrations.{extra}"
    ended = run("sys.modules['persistency.integrations.census'] = None\n" + program, without=["nothing"])
    assert "persistency.integrations.census" in ended.stderr.splitlines()[-1]
    assert "pip install" not in ended.stderr
    broken = run(program, without=[inner])
    assert broken.stderr.splitlines()[-1].startswith(f"ModuleNotFoundError: No module named '{inner}")


@pytest.mark.parametrize("missing", EXTRAS["cli"])
def test_a_missing_command_line_names_its_extra(missing: str) -> None:
    """Without typer or rich the command says what to install, and nothing else."""
    ended = run("import sys\nfrom persistency.cli import main\nsys.exit(main())", without=[missing])
    assert ended.returncode == 1
    assert ended.stderr == "persistency: the command line needs the extra 'cli': pip install 'persistency[cli]'\n"


def test_a_class_of_no_known_library_is_told_of_the_extra() -> None:
    """What `typed` can't take names what it takes, and the extra that has two of them."""
    program = """
from persistency import typed
from persistency.errors import Misuse

class Point:
    x: int

try:
    typed(Point)
except Misuse as error:
    print(error.hint)
"""
    ended = run(program, without=EXTRAS["typed"])
    assert "need the extra 'typed'" in ended.stdout
    assert "pip install 'persistency[typed]'" in ended.stdout
    assert len(ended.stdout.splitlines()) == 1


def test_every_extra_is_declared_with_what_it_brings() -> None:
    """What is imported for an extra is what it requires; each is known to these tests, or is for ourselves."""
    declared = PROJECT["optional-dependencies"]
    for extra, packages in EXTRAS.items():
        brought = {re.split(r"[><=\[ ]", requirement)[0].replace("-", "_") for requirement in declared[extra]}
        assert {IMPORTED_AS.get(name, name) for name in brought} == set(packages)
    assert set(declared) - set(EXTRAS) == {"docs", "test", "bench", "dev"}
