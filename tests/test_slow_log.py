"""The slow-operation log: what is told of what takes long, and that nobody pays for it who hasn't asked."""

from __future__ import annotations

import json
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from persistency import Check, Delete, Job, Misuse, Persistency, Put, Transaction, WriteFailed, key
from persistency.actor import sleeper, slowness, turns, upkeep
from persistency.actor.slowness import Slowness
from persistency.storage.port import Barrier
from persistency.storage.sqlite import SqliteStore
from tests.actor.fakes import Actor
from tests.loops import InLoop, together
from tests.soak.lives import Quiet
from tests.test_engine import WAIT

SLOW = "persistency.slow"


class Told(logging.Handler):
    """Keeps what the slow log says."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []
        self.came = threading.Semaphore(0)

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)
        self.came.release()

    def of(self, event: str) -> list[dict[str, Any]]:
        """Return the fields of an event's records, in order, as they come out of JSON."""
        fields = [
            {name.removeprefix("persistency_"): value for name, value in vars(record).items() if "persistency_" in name}
            for record in self.records
        ]
        return [json.loads(json.dumps(given)) for given in fields if given["event"] == event]


@pytest.fixture
def told() -> Iterator[Told]:
    """Give what the slow log says."""
    handler, log = Told(), logging.getLogger(SLOW)
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


class Hands:
    """A clock whose hands only a test moves, wherever something is timed."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        self.reads = 0
        for module in (sleeper, slowness, turns, upkeep):
            patch.setattr(module, "monotonic", self)

    def __call__(self) -> float:
        self.reads += 1
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    """Give a clock that stands still."""
    return Hands(monkeypatch)


# -- what is told -----------------------------------------------------------------------------------------------------


def ship(tx: Transaction, number: int) -> None:
    """Write a row, as a service's function would."""
    tx.put("orders", (number,), b"shipped")


@pytest.mark.parametrize(
    ("ask", "kinds", "category", "operations"),
    [
        (lambda job: job.get("c", ("k",)), {"get": 1}, "c", 0),
        (lambda job: job.entry("c", ("k",)), {"entry": 1}, "c", 0),
        (lambda job: job.scan("c"), {"scan": 1}, "c", 0),
        (lambda job: job.categories(), {"categories": 1}, None, 0),
        (lambda job: job.commit([Put("c", ("k",), b"x"), Delete("c", ("l",))]), {"batch": 1}, "c", 2),
        (lambda job: job.increment("n", ("secret",)), {"increment": 1}, None, 1),
        (lambda job: job.compare_and_set("c", ("k",), None, b"x"), {"compare_and_set": 1}, "c", 1),
        (lambda job: job.run(ship, 7), {"run": 1}, None, 1),
        (lambda job: job.flush(), {"flush": 1}, None, 0),
    ],
)
def test_a_request_in_place_is_told(
    ask: Callable[[Job], Any], kinds: dict[str, int], category: str | None, operations: int, root: str, told: Told
) -> None:
    """Each verb by its name, with its category and how many operations it was, and whose job it was."""
    with Persistency(root, slow_after=0) as persistency:
        job = persistency.open_job("a")
        told.records.clear()
        ask(job).result(WAIT)
        (fields,) = told.of("slow_request")
    assert (fields["job"], fields["kinds"], fields["category"]) == ("a", kinds, category)
    assert fields["operations"] == operations
    assert fields["took_ms"] >= 0
    assert fields["functions"] == (["ship"] if "run" in kinds else [])
    assert "secret" not in str(fields)


def test_a_group_is_told_with_all_that_was_in_it(told: Told) -> None:
    """What was posted while the job was busy: kinds, operations, the category most of it was in, and how many more."""
    with Actor() as actor:
        actor.worker.turns.slow = Slowness("job", 0.0)
        actor.hold()
        for number in range(5):
            actor.put(b"%d" % number)
        actor.mailbox.put(b"other", b"k", b"secret", 7)
        read = actor.mailbox.get(b"c", b"1")
        actor.let_go()
        assert read.result(WAIT) == b"x"
    first, second = told.of("slow_group")[:2]
    assert (first["kinds"], first["operations"]) == ({"put": 1}, 1)
    assert (second["kinds"], second["operations"]) == ({"put": 6, "get": 1}, 6)
    assert (second["category"], second["categories"]) == ("c", 2)
    assert told.records[1].getMessage().endswith("in line: 6 put, 1 get in 'c' and 1 more")
    assert told.records[1].levelno == logging.WARNING
    assert "secret" not in str(told.of("slow_group"))


def test_functions_in_a_group_are_named(tmp_path: Path, told: Told, in_loop: InLoop) -> None:
    """In an event loop functions go through the line; each is named, the most frequent first."""

    async def ask() -> None:
        async with Persistency(tmp_path, slow_after=0) as persistency:
            job = await persistency.aopen_job("a")
            await together(*(job.run(ship, number) for number in range(3)), job.run(lambda _tx: None))

    in_loop(ask)
    named = Counter(name for fields in told.of("slow_group") for name in fields["functions"])
    assert set(named) == {"ship", "test_functions_in_a_group_are_named.<locals>.ask.<locals>.<lambda>"}
    assert sum(fields["kinds"].get("run", 0) for fields in told.of("slow_group")) == 4


def test_openings_are_told_however_they_go(tmp_path: Path, told: Told) -> None:
    """One that works, one after a rest, and one that fails."""
    with Persistency(tmp_path, slow_after=0) as persistency:
        persistency.open_job("a").close()
        (tmp_path / "b.db").write_bytes(b"something else, and long enough to be looked at" * 100)
        with pytest.raises(Exception, match="database"):
            persistency.open_job("b")
    assert [fields["job"] for fields in told.of("slow_opening")] == ["a", "b"]


def test_upkeep_is_told(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint, and the sync that a commit is followed by, are told by their names."""
    monkeypatch.setattr(SqliteStore, "checkpoint_due", lambda store, *, idle: store._log.pages > 0)
    with Persistency(tmp_path, slow_after=0) as persistency:
        job = persistency.open_job("a", sync_interval=0)
        job.put("c", ("k",), b"x")
        job.flush().result(WAIT)
        job.commit(Put("c", ("k",), b"y")).result(WAIT)
    assert "checkpoint" in {fields["what"] for fields in told.of("slow_upkeep")}
    assert {fields["what"] for fields in told.of("slow_upkeep")} <= {"checkpoint", "sync", "fold", "reap"}


def test_what_is_fast_isnt_told(tmp_path: Path, told: Told, hands: Hands, in_loop: InLoop) -> None:
    """Only from `slow_after` on, in place and in groups, to the very moment; what failed is told of, too."""
    with Persistency(tmp_path, slow_after=0.5) as persistency:
        job = persistency.open_job("a")

        def take(_tx: Transaction, seconds: float, *, fail: bool = False) -> None:
            hands.now += seconds
            if fail:
                raise ValueError("on purpose")

        job.run(take, 0.499).result(WAIT)
        assert told.records == []
        job.run(take, 0.5).result(WAIT)
        job.run(lambda tx: take(tx, 2, fail=True)).exception(WAIT)
        assert [fields["took_ms"] for fields in told.of("slow_request")] == [500.0, 2000.0]

        async def ask() -> None:
            await job.run(take, 0.25)
            await job.run(take, 0.75)

        in_loop(ask)
        assert [fields["took_ms"] for fields in told.of("slow_group")] == [750.0]


# -- how long it has waited -------------------------------------------------------------------------------------------


def test_what_came_while_the_job_was_busy_has_waited_since_then(told: Told, hands: Hands) -> None:
    """What a group finds when it is through came, at the earliest, when it was begun."""
    with Actor() as actor:
        actor.worker.turns.slow = Slowness("job", 0.0)
        actor.hold()
        hands.now += 2
        actor.put(b"k")
        hands.now += 3
        actor.let_go()
        actor.mailbox.get(b"c", b"k").result(WAIT)
    first, second = told.of("slow_group")[:2]
    assert (first["took_ms"], first["waited_ms"]) == (5000.0, 0.0)
    assert (second["took_ms"], second["waited_ms"]) == (0.0, 5000.0)


def test_what_wakes_a_job_has_waited_since_it_rang(told: Told, hands: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the job has slept before: nobody has waited for it then."""
    quiet = Quiet(monkeypatch)
    with Actor() as actor:
        actor.worker.turns.slow = Slowness("job", 0.0)
        for number in range(3):
            quiet.wait(SimpleNamespace(_mailbox=actor.mailbox))  # type: ignore[arg-type]  # all it looks at
            hands.now += 3600
            actor.put(b"%d" % number)
        quiet.wait(SimpleNamespace(_mailbox=actor.mailbox))  # type: ignore[arg-type]  # all it looks at
    assert [fields["waited_ms"] for fields in told.of("slow_group")] == [0.0, 0.0, 0.0]


def test_what_waits_for_the_turn_has_waited_since_it_rang(
    told: Told, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A caller is answered in place, and takes his time: what rings meanwhile waits from then on."""
    quiet = Quiet(monkeypatch)
    with Actor() as actor:
        actor.worker.turns.slow = Slowness("job", 0.0)
        actor.put(b"first")
        quiet.wait(SimpleNamespace(_mailbox=actor.mailbox))  # type: ignore[arg-type]  # all it looks at
        token = object()
        assert actor.mailbox.hold(token, WAIT)
        hands.now += 100
        actor.put(b"k")
        hands.now += 5
        actor.mailbox.give_back(token)
        actor.mailbox.get(b"c", b"k").result(WAIT)
    assert told.of("slow_group")[1]["waited_ms"] == 5000.0


def test_what_wakes_a_job_that_rests_hasnt_waited_for_its_rest(
    tmp_path: Path, told: Told, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was rung, to make room for another one, and rested for an hour: then something came."""
    quiet = Quiet(monkeypatch)
    with Persistency(tmp_path, max_live_jobs=1, slow_after=0) as persistency:
        job = persistency.open_job("a")
        job.put("c", ("k",), b"x")
        quiet.wait(job)
        persistency.open_job("b")  # for which `a` has to rest
        assert job.statistics().state == "idle"
        told.records.clear()
        hands.now += 3600
        job.put("c", ("k",), b"y")
        assert job.get("c", ("k",)).result(WAIT) == b"y"
        assert next(fields["waited_ms"] for fields in told.of("slow_group") if fields["job"] == "a") == 0.0


def test_what_comes_during_upkeep_has_waited_for_its_end(
    tmp_path: Path, told: Told, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync takes long: what was posted meanwhile, and rang nobody, has waited for it, and not for longer."""
    applied = SqliteStore.apply
    slowly: list[Job] = []

    def apply(store: SqliteStore, group: list[Any], now_ms: int) -> list[Any]:
        if slowly and group[1] == Barrier(sync=True):
            slowly.pop().put("c", ("k",), b"x")
            hands.now += 4
        return applied(store, group, now_ms)

    monkeypatch.setattr(SqliteStore, "apply", apply)
    with Persistency(tmp_path, slow_after=0) as persistency:
        job = persistency.open_job("a", sync_interval=0.01)
        job.put("c", ("first",), b"x")
        job.flush().result(WAIT)
        told.records.clear()
        slowly.append(job)
        hands.now += 3600  # now it is due, and the worker's sleep ends by itself
        while not told.of("slow_group"):
            assert told.came.acquire(timeout=WAIT)
        assert ("sync", 4000.0) in [(fields["what"], fields["took_ms"]) for fields in told.of("slow_upkeep")]
        assert told.of("slow_group")[0]["waited_ms"] == 4000.0


# -- what it costs ----------------------------------------------------------------------------------------------------


def in_place(job: Job) -> list[str]:
    """Return the names of what answers in place."""
    mailbox = job._mailbox
    return [serve.__qualname__ for serve in (mailbox.get_in_place, mailbox.read_in_place, mailbox.write_in_place)]  # type: ignore[union-attr]


def test_who_doesnt_ask_pays_nothing(tmp_path: Path) -> None:
    """Without `slow_after` a caller is answered by the very same functions; with it each is put into one that times."""
    with Persistency(tmp_path / "off") as off, Persistency(tmp_path / "on", slow_after=1) as on:
        assert not any("timed" in name for name in in_place(off.open_job("a")))
        assert all("timed" in name for name in in_place(on.open_job("a")))


@pytest.mark.parametrize(("slow", "reads"), [(None, 1), (Slowness("job", 1.0), 2)])
def test_the_clock_is_read_once_more_per_group(slow: Slowness | None, reads: int, hands: Hands) -> None:
    """1,000 operations in a group: the clock is read once to run it, and once more to time it."""
    with Actor() as actor:
        actor.worker.turns.slow = slow
        actor.hold()
        for number in range(1_000):
            actor.put(b"%d" % number)
        decide, counted = actor.worker.turns.decide, []

        def counting(*args: Any) -> None:
            before = hands.reads
            decide(*args)
            counted.append(hands.reads - before)

        actor.worker.turns.decide = counting  # type: ignore[method-assign]
        actor.let_go()
        actor.mailbox.get(b"c", b"1").result(WAIT)
    assert counted[0] == reads


def test_the_module_is_imported_by_those_who_ask(tmp_path: Path) -> None:
    """A service that wants to be told of nothing doesn't load it."""
    import subprocess
    import sys

    program = """
import sys
from persistency import Persistency
with Persistency(sys.argv[1]) as p:
    p.open_job("a").get("c", ("k",)).result()
print("persistency.actor.slowness" in sys.modules)
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout == "False\n"


# -- and harms nobody -------------------------------------------------------------------------------------------------


def test_a_log_that_raises_harms_nobody(root: str, told: Told) -> None:
    """A filter that raises, of the service's own, takes no answer from anybody."""

    def refuse(_record: logging.LogRecord) -> bool:
        raise ValueError("on purpose")

    log = logging.getLogger(SLOW)
    log.addFilter(refuse)
    try:
        with Persistency(root, slow_after=0) as persistency:
            job = persistency.open_job("a")
            job.put("c", ("k",), b"x")
            job.commit(Put("c", ("l",), b"y")).result(WAIT)
            assert job.get("c", ("k",)).result(WAIT) == b"x"
            job.persist(Check("c", ("k",), None))
            with pytest.raises(WriteFailed):
                job.flush().result(WAIT)
            assert job.statistics().state == "live"
    finally:
        log.removeFilter(refuse)
    assert told.records == []


def test_a_handler_may_post(root: str) -> None:
    """A handler that writes into the very job that was slow waits for nobody."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if len(kept) < 10:
                kept.append(record)
                job.put("log", (len(kept),), record.getMessage().encode())

    kept: list[logging.LogRecord] = []
    log, handler = logging.getLogger(SLOW), Keep()
    with Persistency(root, slow_after=0) as persistency:
        job = persistency.open_job("a")
        log.addHandler(handler)
        try:
            for _ in range(3):
                job.get("c", ("k",)).result(WAIT)
            job.flush().result(WAIT)
        finally:
            log.removeHandler(handler)
        assert job.get("log", key(1)).result(WAIT) is not None


@pytest.mark.parametrize("wrong", ["1", True, -1, float("nan")])
def test_a_wrong_threshold_is_misuse(wrong: Any, tmp_path: Path) -> None:
    """At the call, and nothing was made."""
    with pytest.raises(Misuse, match="slow_after"):
        Persistency(tmp_path / "root", slow_after=wrong)
    assert not (tmp_path / "root").exists()


def test_the_threshold_is_that_of_who_opened_first(tmp_path: Path, told: Told) -> None:
    """Jobs are shared by root: what is told of one is settled by the `Persistency` that has opened it."""
    with Persistency(tmp_path, slow_after=0) as first, Persistency(tmp_path) as second:
        first.open_job("told")
        job, quiet = second.open_job("told"), second.open_job("untold")
        told.records.clear()
        job.get("c", ("k",)).result(WAIT)
        quiet.get("c", ("k",)).result(WAIT)
        first.open_job("untold").get("c", ("k",)).result(WAIT)
    assert {fields["job"] for fields in told.of("slow_request")} == {"told"}


def test_resting_and_waking_goes_on_telling(tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was woken is timed as before; its opening is told, and the wait for it isn't that of its rest."""
    quiet = Quiet(monkeypatch)
    with Persistency(tmp_path, max_live_jobs=1, slow_after=0) as persistency:
        jobs = [persistency.open_job(name) for name in "ab"]
        for job in (*jobs, *jobs):
            job.put("c", ("k",), b"x")
            job.flush().result(WAIT)
            quiet.wait(job)
        assert len(told.of("slow_opening")) >= 4
        assert threading.active_count() < 10
