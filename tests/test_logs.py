"""Log records: every one carries fields for machines, and docs/watching.md names every event with its level."""

from __future__ import annotations

import ast
import gc
import json
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persistency import Check, Misuse, Persistency, Put, WriteFailed, key
from persistency.errors import Corrupt, DiskFull, StorageError
from persistency.logfields import about
from persistency.shared import SharedStore
from tests.actor.fakes import WAIT, Actor
from tests.test_house import HOUSE, MODULES

LEVELS = {"debug": "DEBUG", "info": "INFO", "warning": "WARNING", "error": "ERROR", "exception": "ERROR"}
PAGE = HOUSE.parent / "docs" / "watching.md"
ROWS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.read_text().splitlines()]
DOCUMENTED = {
    row[0].strip("`"): (row[1], row[2].strip("`"), set(re.findall(r"[.\w]+", row[4])))
    for row in ROWS
    if len(row) == 5 and row[2].startswith("`persistency")
}


class Records(logging.Handler):
    """Keeps every record of the package; none may have fields that JSON doesn't know."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.found: list[dict[str, Any]] = []
        self._came = threading.Condition()

    def emit(self, record: logging.LogRecord) -> None:
        fields = {name: value for name, value in vars(record).items() if name.startswith("persistency_")}
        line = {name.removeprefix("persistency_"): value for name, value in json.loads(json.dumps(fields)).items()}
        level, logger, more = DOCUMENTED[line["event"]]
        assert (record.levelname, record.name) == (level, logger)
        assert line.keys() - {"event", "job", "error", "code"} <= more | {"what"} or "..." in more
        with self._came:
            self.found.append({**line, "message": record.getMessage()})
            self._came.notify_all()

    def wait_for(self, event: str) -> dict[str, Any]:
        """Return the first record of an event, once it has come."""
        with self._came:
            assert self._came.wait_for(lambda: any(line["event"] == event for line in self.found), WAIT), event
            return next(line for line in self.found if line["event"] == event)


@pytest.fixture
def records() -> Iterator[Records]:
    """Give the records of the package."""
    handler, log = Records(), logging.getLogger("persistency")
    before = log.level
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)
    log.setLevel(before)


# -- every call -------------------------------------------------------------------------------------------------------


def log_calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Give every call that logs in a module, with its level, and nothing else that is called `log`."""
    tree = ast.parse(MODULES[name].read_text())
    for node in ast.walk(tree):
        func = node.func if isinstance(node, ast.Call) else None
        if isinstance(func, ast.Attribute) and ast.unparse(func.value) == "log" and func.attr in LEVELS:
            assert isinstance(node, ast.Call)
            yield LEVELS[func.attr], node


def about_calls(name: str) -> dict[int, tuple[str | None, set[str]]]:
    """Return the calls of `about` in a module by their line: the event, if it is written there, and the fields."""
    found = {}
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "about":
            event = node.args[0].value if isinstance(node.args[0], ast.Constant) else None
            found[node.lineno] = (event, {str(keyword.arg) for keyword in node.keywords})  # type: ignore[assignment]
    return found  # type: ignore[return-value]  # events are text


def logger_of(name: str) -> str | None:
    """Return the logger that a module calls `log`."""
    found = re.search(
        r'^log: logging\.Logger = logging\.getLogger\("([\w.]+)"\)$', MODULES[name].read_text(), re.MULTILINE
    )
    return found and found[1]


LOGGING = [name for name in MODULES if logger_of(name)]


def test_no_logger_is_passed_over() -> None:
    """Every module that imports logging has a logger that is found here; so the next test is of all of them."""
    assert len(LOGGING) > 10
    importing = {
        name for name, path in MODULES.items() if re.search(r"^import logging$", path.read_text(), re.MULTILINE)
    }
    assert importing - {name for name in importing if name.startswith("cli")} == set(LOGGING) - {"cli"}


@pytest.mark.parametrize("name", LOGGING)
def test_every_log_call_has_fields_that_are_documented(name: str) -> None:
    """Each has `extra=about("event", ...)`, there or on the lines before, and the page says the same of it."""
    abouts = about_calls(name)
    for level, call in log_calls(name):
        extra = next((keyword.value for keyword in call.keywords if keyword.arg == "extra"), None)
        assert extra is not None, f"{name}:{call.lineno} logs without fields"
        line = max(line for line in abouts if line <= (extra.end_lineno or 0))
        assert line >= call.lineno - 4, f"{name}:{call.lineno} takes its fields from afar"
        event, fields = abouts[line]
        if event is None:  # one of several, see the next test
            assert name == "actor.slowness"
            continue
        documented = DOCUMENTED[event]
        assert documented[:2] == (level, logger_of(name)), f"{name}:{call.lineno} {event}"
        assert documented[2] >= fields, f"{name}:{call.lineno} {event}"


def test_every_event_of_the_page_exists() -> None:
    """The page names no event that nobody logs; none has two names or two places."""
    logged = [event for name in MODULES for event, _ in about_calls(name).values() if event is not None]
    slow = set(re.findall(r'"(slow_\w+)"', MODULES["actor.slowness"].read_text()))
    assert sorted(logged) == sorted(set(logged))
    assert set(logged) | slow == set(DOCUMENTED)


def test_fields_are_plain() -> None:
    """A path becomes text; an error its class and SQLite's code; event and job are always there."""
    assert about("x") == {"persistency_event": "x", "persistency_job": None}
    fields = about("x", "a", DiskFull("full", 13), path=Path("/p"), seq=7, kinds={"put": 1})
    assert fields == {
        "persistency_event": "x", "persistency_job": "a", "persistency_error": "DiskFull", "persistency_code": 13,
        "persistency_path": "/p", "persistency_seq": 7, "persistency_kinds": {"put": 1},
    }  # fmt: skip
    assert "persistency_code" not in about("x", None, ValueError())


# -- some of them, as they come ---------------------------------------------------------------------------------------


def test_what_failed_events_say(root: str, records: Records) -> None:
    """A failed batch: how many operations, why, whose job; and `on_error` that raises. No payload, no key."""

    def on_error(_job_id: str, _failures: Any) -> None:
        raise RuntimeError("on purpose")

    with Persistency(root) as persistency:
        job = persistency.open_job("a", on_error=on_error)
        job.persist([Check("c", ("hidden",), 7), Put("c", ("hidden",), b"a secret")])
        with pytest.raises(WriteFailed):
            job.flush().result(WAIT)
        failed, raised = records.wait_for("writes_failed"), records.wait_for("on_error_raised")
    assert (failed["job"], failed["operations"], failed["outcome"]) == ("a", 2, "not applied")
    assert (failed["error"], raised["job"], raised["error"]) == ("Conflict", "a", "RuntimeError")
    del failed["message"]
    assert "hidden" not in str(failed)
    assert "secret" not in str(records.found)


def test_what_a_stall_and_its_end_say(records: Records) -> None:
    """The error's class and SQLite's code are there while it stalls; then that it goes on."""
    with Actor() as actor:
        actor.store.errors = [DiskFull("full", 13)]
        actor.put(b"k")
        assert actor.mailbox.get(b"c", b"k").result(WAIT) == b"x"
    stalls = records.wait_for("job_stalls")
    assert (stalls["job"], stalls["error"], stalls["code"]) == ("job", "DiskFull", 13)
    assert records.wait_for("job_goes_on")["job"] == "job"


def test_what_a_poisoned_job_says(records: Records) -> None:
    """Why, and what became of the group in hand."""
    with Actor() as actor:
        actor.store.errors = [Corrupt("damaged", 11)]
        actor.put(b"k")
        poisoned = records.wait_for("job_poisoned")
    assert (poisoned["job"], poisoned["error"], poisoned["code"]) == ("job", "Corrupt", 11)
    assert poisoned["outcome"] == "not applied"


@pytest.mark.parametrize("job_id", ["a", "with:colons:in:it"])
def test_what_a_dropped_errand_says(job_id: str, tmp_path: Path, records: Records) -> None:
    """Whose it was and what, apart, though the thread's name has both."""
    with Persistency(tmp_path / "root") as persistency:
        job = persistency.open_job(job_id)
        job.put("c", ("k",), b"x")

        def refuse(_done: int, _total: int | None) -> None:
            raise RuntimeError("on purpose")

        job.export(tmp_path / "file", refuse)  # nobody looks at the reply
        for thread in threading.enumerate():
            if thread.name.endswith(":export"):
                thread.join(WAIT)
        gc.collect()  # what has failed knows the frames it came through
        failed = records.wait_for("errand_failed")
    assert (failed["job"], failed["errand"], failed["error"]) == (job_id, "export", "RuntimeError")


def test_what_is_told_at_an_opening(tmp_path: Path, records: Records) -> None:
    """A file that is gone: which one, and whose."""
    with Persistency(tmp_path) as persistency:
        with persistency.open_job("a") as job:
            job.put("c", ("k",), b"x")
        assert job.path is not None
        job.path.unlink()
        persistency.open_job("a")
    gone = records.wait_for("file_gone")
    assert (gone["job"], gone["path"]) == ("a", str(job.path))


def test_what_callbacks_and_listeners_that_raise_say(root: str, records: Records) -> None:
    """A reply's callback, and a listener of a shared collection, each with what it raised."""

    def refuse(*_args: Any) -> None:
        raise Misuse("on purpose")

    with Persistency(root) as persistency:
        job = persistency.open_job("a")
        reply = job.get("c", key("k"))
        reply.add_done_callback(refuse)
        assert records.wait_for("callback_raised")["error"] == "Misuse"
        store = SharedStore(persistency)
        things = store.open("things", kind="permanent")
        store.on_change(refuse)
        things.set({"id": "x"}).result(WAIT)
        raised = records.wait_for("listener_raised")
        assert (raised["seq"], raised["error"]) == (1, "Misuse")
        store.close()


def test_what_upkeep_that_fails_says(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that couldn't be done, with the error's class and code."""
    from persistency.actor.clock import Clock
    from persistency.actor.upkeep import Upkeep

    with Actor() as actor:
        upkeep = Upkeep("job", actor.store, actor.mailbox, Clock(int))

        def refuse() -> None:
            raise StorageError("no", 778)

        assert not upkeep._tried(refuse)
    failed = records.wait_for("upkeep_failed")
    assert (failed["job"], failed["error"], failed["code"]) == ("job", "StorageError", 778)
