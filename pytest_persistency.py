"""The pytest plugin of persistency: a store, a job in it and a clock, for the tests of a service.

pytest finds it by its entry point; `-p no:persistency` leaves it out. Fixtures: `persistency_store`, `persistency_job`,
`persistency_clock`, `persistency_root`. Settings: the ini option `persistency_root` (`disk` or `memory`), and the
markers `persistency_store(root=..., **options)` and `persistency_job(**options)`.

Rules:
  1. Every run of pytest where the package is installed imports this module, and so it imports nothing of the package:
     that is for whoever asks for a fixture. It stands outside, as importing anything inside imports all of the core.
  2. The entry point has the module's own name, so that who names it again (`-p`, `pytest_plugins`) loads it once.
  3. A write that failed behind a test's back fails it.
  4. The package is imported as it is, not rewritten: its asserts are no test's.

Doesn't know: what is tested, event loops.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from persistency import Job, Persistency, WriteFailed
    from persistency.testing import ManualClock

ROOTS = ("disk", "memory")
CLOSE_SECONDS = 60.0
_FAILURES_SHOWN = 20
_ID_BYTES_MAX = 60  # a file's name has room for 200, and escaping may treble them
_MARKERS = (
    "persistency_store(root='disk'|'memory', **options): where the test's store is, and options of Persistency",
    "persistency_job(**options): options of open_job for the test's job, such as feed_changes_max=100",
)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Declare the ini option, and leave the package out of what pytest compiles anew.

    pytest rewrites the asserts of all modules of a distribution that brings a plugin. Where no bytecode is kept, as in
    many containers, each run would compile the whole package for that.
    """
    marked: object = getattr(pluginmanager.rewrite_hook, "_must_rewrite", None)
    if isinstance(marked, set):
        marked.discard("persistency")
    parser.addini("persistency_root", "where a test's store is: disk (in its tmp_path) or memory", default=ROOTS[0])


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers. Raises `UsageError` for a root that there isn't."""
    for line in _MARKERS:
        config.addinivalue_line("markers", line)
    _check_root(config.getini("persistency_root"), "the ini option persistency_root")


@pytest.fixture
def persistency_clock() -> ManualClock:
    """The clock of the test's store: it stands still until `persistency_clock.advance(seconds)`."""
    from persistency.testing import ManualClock

    return ManualClock()


@pytest.fixture
def persistency_root(request: pytest.FixtureRequest) -> str | Path:
    """Where the test's store is: a directory in its `tmp_path`, or `":memory:"`."""
    root = _marked(request, "persistency_store").get("root", request.config.getini("persistency_root"))
    _check_root(root, "root in the marker persistency_store")
    if root == "memory":
        return ":memory:"
    tmp_path: Path = request.getfixturevalue("tmp_path")
    return tmp_path / "persistency"


@pytest.fixture
def persistency_store(
    request: pytest.FixtureRequest, persistency_root: str | Path, persistency_clock: ManualClock
) -> Iterator[Persistency]:
    """An empty `Persistency` on the test's clock, closed after the test; a write that failed unseen fails the test."""
    from persistency import Persistency, WriteFailed

    options = {"clock": persistency_clock, **_marked(request, "persistency_store")}
    options.pop("root", None)
    store = Persistency(persistency_root, **options)
    persistency_clock.attach(store)
    yield store
    unseen = None
    try:
        store.close(CLOSE_SECONDS)
    except WriteFailed as failed:
        unseen = failed
    if unseen is not None:  # outside of the `except`, or pytest would show both
        pytest.fail(_told(unseen), pytrace=False)


@pytest.fixture
def persistency_job(request: pytest.FixtureRequest, persistency_store: Persistency) -> Job:
    """An open, empty job of the test's store, named after the test."""
    named = {"job_id": _job_id(request.node.name)}
    return persistency_store.open_job(**{**named, **_marked(request, "persistency_job")})


def _check_root(root: object, where: str) -> None:
    if root not in ROOTS:
        raise pytest.UsageError(f"{where} must be one of {', '.join(ROOTS)}, not {root!r}")


def _marked(request: pytest.FixtureRequest, marker: str) -> dict[str, Any]:
    """Return the options that the markers of this name give to a test, the closest of them last."""
    options: dict[str, Any] = {}
    for mark in reversed(list(request.node.iter_markers(marker))):
        if mark.args:
            raise pytest.UsageError(f"the marker {marker} takes options by their names, not {mark.args[0]!r}")
        options |= mark.kwargs
    return options


def _job_id(name: str) -> str:
    """Return the name of a test as far as there is room for it in that of a file."""
    return name.encode(errors="replace")[:_ID_BYTES_MAX].decode(errors="ignore")


def _told(failed: WriteFailed) -> str:
    """Return what a test is to be told of writes that failed after it had posted them."""
    from persistency.errors import shown

    total, first = len(failed.failures) + failed.omitted, failed.failures[:_FAILURES_SHOWN]
    lines = [f"{total} posted write{'s' if total != 1 else ''} failed, and the test didn't look:"]
    lines += [f"  {shown(one.op)}: {type(one.error).__name__}: {one.error} ({one.outcome})" for one in first]
    if total > len(first):
        lines.append(f"  and {total - len(first)} more")
    lines.append("A test that expects it asks for it: `with pytest.raises(WriteFailed): job.flush().result()`.")
    return "\n".join(lines)
