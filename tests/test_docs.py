"""The documentation: it builds without a warning, every public name is in it, and under the name its users import."""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from types import FunctionType

import pytest

import persistency
import persistency.integrations.migration
import persistency.testing
from persistency.storage import port

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("sphinx", "furo", "myst_parser", "sphinx_copybutton")),
    reason="the extra 'docs' isn't installed",
)

METHODS = (FunctionType, property, classmethod, staticmethod)
TOP = Path(__file__).parent.parent
# What else a reader may import, and from where: each name, or the whole module.
ELSEWHERE = {
    "persistency.testing": persistency.testing.__all__,
    "persistency.codec.fixed": None,
    "persistency.plugins": [
        "BadAnswer",
        "CallFailed",
        "FunctionNotFound",
        "FunctionNotImplemented",
        "KVGrant",
        "Limits",
        "LoadFailed",
        "Manifest",
        "OutOfFuel",
        "PermissionDenied",
        "Plugin",
        "PluginBusy",
        "PluginError",
        "PluginHost",
        "PluginNotFound",
        "PluginStatistics",
        "PluginTimeout",
        "PluginTrapped",
        "WasiGrant",
    ],
    "persistency.integrations.prometheus": None,
    "persistency.integrations.opentelemetry": None,
    "persistency.integrations.keyvalue": ["KeyValue", "PersistencyStore", "SyncPersistencyStore"],
    "persistency.integrations.langgraph": ["Listing", "PersistencySaver", "PersistencyGraphStore"],
    "persistency.integrations.django": ["PersistencyCache", "release"],
    "persistency.integrations.starlette": [
        "Session",
        "SessionInfo",
        "SessionMiddleware",
        "SessionStore",
        "handle_of",
        "regenerate",
        "save",
    ],
    "persistency.integrations.migration": persistency.integrations.migration.__all__,
    "persistency.recipes": [
        "AsyncMemoized",
        "Baton",
        "Consumer",
        "DeadLetter",
        "LogRecord",
        "Memoized",
        "Memoizing",
        "Message",
        "OrderedLog",
        "Queue",
        "QueueCounts",
        "Runner",
        "memoize",
    ],
    "persistency.storage.port": ["Root", "Store", "StoreOptions", "Status", "Checkpointing", "Restoring"],
}


def written_in(module: str) -> list[str]:
    """The public classes and functions that a module makes itself."""
    members = vars(importlib.import_module(module)).items()
    ours = [name for name, found in members if getattr(found, "__module__", None) == module and callable(found)]
    return [name for name in ours if not name.startswith("_")]


# Libraries of the other extras. Where the tests run they are installed, and would hide that the pages need them.
ABSENT = [
    "prometheus_client",
    "opentelemetry",
    "key_value",
    "starlette",
    "django",
    "asgiref",
    "langgraph",
    "langchain_core",
    "lmdb",
    "wasmtime",
    "typer",
    "rich",
    "pydantic",
    "msgspec",
    "pytest",
    "hypothesis",
]
# What `python -m sphinx` is where only the extra `docs` is installed.
SPHINX = f"""
import sys
from sphinx.cmd.build import main

class Absent:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site into an empty directory, every warning an error; once, for all processes that run these tests."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    built, whole = shared / "docs-site", shared / "docs-site-is-built"
    with (shared / "docs-site.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            options = ["-W", "--keep-going", "-q", "-E", "-b", "html", "-d", built / "doctrees"]
            command = [sys.executable, "-c", SPHINX, *options, TOP / "docs", built / "html"]
            finished = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
            assert (finished.returncode, finished.stderr) == (0, "")
            whole.touch()
    return built / "html"


@pytest.fixture(scope="module")
def inventory(site: Path) -> dict[str, str]:
    """The names the site describes, each with its page: what other sites link to."""
    head, _, packed = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    assert b"inventory version 2" in head
    lines = zlib.decompress(packed).decode().splitlines()
    entries = [re.fullmatch(r"(.+?) (py:\w+) -?\d+ (\S*) .*", line) for line in lines]
    return {entry[1]: entry[3].partition("#")[0] for entry in entries if entry is not None}


def described(cls: type) -> Iterator[str]:
    """The public methods and properties of a class that this package has written, inherited ones too."""
    for base in cls.__mro__:
        if base.__module__.partition(".")[0] == "persistency":
            for name, member in vars(base).items():
                if not name.startswith("_") and isinstance(member, METHODS):
                    yield name


def test_every_public_name_is_in_the_reference(inventory: dict[str, str]) -> None:
    """What `from persistency import *` gives, and what its other doors give, has an entry in the reference."""
    names = [f"persistency.{name}" for name in persistency.__all__]
    names += [f"{module}.{name}" for module, some in ELSEWHERE.items() for name in some or written_in(module)]
    assert len(names) > 60
    assert [name for name in names if not inventory.get(name, "").startswith("reference/")] == []


def test_every_public_method_is_in_the_reference(inventory: dict[str, str]) -> None:
    """Each method and property of a public class has an entry of its own, below the class's public name."""
    classes = {name: found for name in persistency.__all__ if inspect.isclass(found := getattr(persistency, name))}
    assert len(classes) > 40
    wanted = {f"persistency.{name}.{method}" for name, cls in classes.items() for method in described(cls)}
    wanted |= {
        f"{cls.__module__}.{cls.__name__}.{method}"
        for cls in (port.Root, port.Store, port.Checkpointing, port.Restoring)
        for method in described(cls)
    }
    assert {"persistency.Job.get", "persistency.Reader.get", "persistency.SharedStore.open"} <= wanted
    assert sorted(wanted - inventory.keys()) == []


def test_public_names_appear_under_their_public_paths(site: Path) -> None:
    """`persistency.Job` is described once, as that, and not where it happens to be written."""
    anchors = set()
    for page in (site / "reference").glob("*.html"):
        anchors |= set(re.findall(r'<dt class="sig[^>]* id="([^"]+)"', page.read_text()))
    written = {
        f"{found.__module__}.{name}"
        for name in persistency.__all__
        if hasattr(found := getattr(persistency, name), "__qualname__")
    }
    assert "persistency.Job.get" in anchors
    assert "persistency.job.Job" in written
    assert sorted(written & anchors) == []


def test_docstrings_are_shown_without_their_marks(site: Path) -> None:
    """No backtick is left over in the reference, nor any markup that wasn't understood."""
    for page in sorted((site / "reference").glob("*.html")):
        body = page.read_text().partition("<article")[2].partition("</article>")[0]
        text = unescape(re.sub(r"<[^>]+>", "", body))
        assert len(text) > 500
        for left in ("`", ":py:", ":class:", "<default>", "ForwardRef", "object at 0x", "<function"):
            assert left not in text, f"{page.name}: {left}"


def test_options_are_shown_with_their_defaults(site: Path) -> None:
    """The signature of `open_job` has the values a caller gets, not the mark of those that weren't given."""
    text = unescape(re.sub(r"<[^>]+>", "", (site / "reference" / "persistency.html").read_text()))
    assert re.search(r"durability: Durability = 'process'", text)
    assert re.search(r"mailbox_ops_max: int = 8192", text)


def test_every_page_is_reached_from_the_first_one(site: Path) -> None:
    """Whoever begins at the index gets to every page."""
    pages = {str(page.relative_to(TOP / "docs").with_suffix(".html")) for page in (TOP / "docs").rglob("*.md")}
    pages |= {str(page.relative_to(TOP / "docs").with_suffix(".html")) for page in (TOP / "docs").rglob("*.rst")}
    linked = set(re.findall(r'href="([\w./-]+\.html)', (site / "index.html").read_text()))
    assert {"care.html", "reference/job.html"} <= pages
    assert sorted(pages - linked - {"index.html"}) == []


def test_every_how_to_page_is_in_the_table_of_the_first_page() -> None:
    """Whoever looks for what to get done finds each how-to page in the table, not in the side bar alone."""
    table = re.findall(r"^\|.*$", (TOP / "docs" / "index.md").read_text(), re.MULTILINE)
    linked = set(re.findall(r"\]\((howto/[\w-]+\.md)", "\n".join(table)))
    there = {f"howto/{page.name}" for page in (TOP / "docs" / "howto").glob("*.md")}
    assert len(there) > 5
    assert linked == there
