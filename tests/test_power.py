"""Power cuts: what is opened after one is an exact prefix of what was accepted, with all that has to be there.

The cuts are simulated (`tests.crash.powered`; the long form is a part of `tests.soak`). Before the harness is believed
it is shown engines and disks with a planted defect, each of which it has to report.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import PLACES, Barrier, Batch, Durability, Group, StoreOptions
from persistency.storage.sqlite import SqliteStore
from persistency.testing import group, put
from tests.crash import plants, powered
from tests.crash.powered import (
    CUTS,
    DAMAGES,
    KILL,
    LIVES,
    SECTOR_BYTES,
    Contents,
    DiskFile,
    History,
    Life,
    Medium,
    Plan,
    Program,
    Rows,
    Step,
    Totals,
    after_kill,
    contents,
    every_cut,
    every_recovery,
    fates,
    from_medium,
    in_sectors,
    judge,
    judge_cuts,
    live,
    run,
    scratch,
    write_image,
)
from tests.test_original_files import CONTENTS, write_original

SEED = random.SystemRandom().getrandbits(32)
DURABILITIES: tuple[Durability, ...] = ("process", "power")


def one_life(place: Path, seed: int, plan: Plan, steps: int = 12) -> Life:
    """Let a new job live one life in a directory."""
    return live(place, from_medium({}), plan, History(), random.Random(seed), lambda program: program.run(steps))


# -- the promise ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [{}, {"max_bytes": 10**6}, {"feed_changes_max": 10}])
@pytest.mark.parametrize("now", [{}, {"max_bytes": 10**6}, {"feed_changes_max": 10}])
def test_a_log_that_was_left_behind_is_carried_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: dict[str, int], now: dict[str, int]
) -> None:
    """Whatever the job is opened with, and has to read for that: its log isn't gone on with."""
    store = DirectoryRoot(tmp_path).open("a", StoreOptions(**before))  # type: ignore[arg-type]  # two of its numbers
    for number in range(5):
        store.apply(group(put(b"c", b"%d" % number, b"x")), 1)
    left = tmp_path / "left"
    left.mkdir()
    for name in ("a.db", "a.db-wal"):
        shutil.copy(tmp_path / name, left / name)
    store.close()
    store = DirectoryRoot(left).open("a", StoreOptions(**now))  # type: ignore[arg-type]  # as above
    assert (left / "a.db-wal").stat().st_size == 0
    assert not store.unsynced
    assert store.get(b"c", b"4", 1) == b"x"
    store.close()
    assert caplog.records == []


@pytest.mark.parametrize("durability", DURABILITIES)
def test_power_cuts(durability: Durability) -> None:
    """Promise 5: 500 cuts, two thirds of them of jobs that had gone through one before, and nothing is wrong."""
    print(f"python -m tests.crash.powered --seed {SEED} --images 500 --durability {durability}")
    *_, totals = run(SEED, 500, durability)
    assert not totals.findings, totals.findings
    # Otherwise the cuts would have proved nothing.
    assert totals.images >= 500
    assert totals.compound >= totals.images * (LIVES - 1) // LIVES - CUTS
    assert totals.loose >= totals.images // 2
    assert totals.ahead > 0
    assert (totals.short > 0) == (durability == "process")


@pytest.mark.parametrize("plan", [Plan("process"), Plan("power", 2**30, 25, spills=True)], ids=["process", "power"])
def test_a_cut_after_every_step(plan: Plan) -> None:
    """From a new job's first step to its last close there is none after which a cut does harm, with three damages."""
    totals = Totals()
    every_cut(SEED, plan, totals)
    assert not totals.findings, totals.findings
    assert totals.images > 150
    assert totals.loose > totals.images // 3


def test_a_cut_after_every_step_of_a_migration(tmp_path: Path) -> None:
    """A file of the original is migrated whole or not at all, and none of its rows is lost."""
    write_original(tmp_path / "job.db", CONTENTS)
    image = {"job.db": bytearray((tmp_path / "job.db").read_bytes())}
    rows: Rows = {
        (category.encode(), bytes(key)): (payload, 0, None)
        for category, pairs in CONTENTS.items()
        for key, payload in pairs
    }
    totals = Totals()
    every_cut(SEED, Plan("process"), totals, image, rows)
    assert not totals.findings, totals.findings
    assert totals.images > 150


def test_a_cut_while_recovering_from_one() -> None:
    """A cut while a job is opened after a cut, at any step of its life, does no more harm than the first one."""
    totals = Totals()
    every_recovery(SEED, Plan("power"), totals, stride=8)
    assert not totals.findings, totals.findings
    assert totals.compound > 50


@pytest.mark.parametrize("durability", DURABILITIES)
def test_a_barrier_covers_what_a_killed_process_left(durability: Durability) -> None:
    """What was written and not synced when the process was killed is on the medium once `flush(sync=True)` says so."""
    print(f"seed {SEED}")
    totals, rng = Totals(), random.Random(SEED)
    with scratch() as place:
        life = one_life(place / "life", 2, Plan(durability))
        kills = [at for at in range(life.opened, len(life.log)) if life.log[at].what in ("sync", "committed")]
        for at in kills[:20]:
            (left,) = judge_cuts(life, [(at, KILL, f"kill {at}")], place, totals)
            history = life.history.until(left.version)
            second = live(place / f"life{at}", after_kill(life, left), life.plan, history, rng, Program.barrier)
            places = range(second.opened, len(second.log) + 1)
            judge_cuts(second, [(cut, "nothing kept", f"kill {at}, {cut}") for cut in places], place, totals)
    assert not totals.findings, totals.findings
    assert totals.loose > 100


def test_a_cut_while_a_new_file_gets_its_first_page() -> None:
    """A job whose very first opening was cut off can be opened again, however torn the first page is."""
    totals = Totals()
    with scratch() as place:
        life = one_life(place / "life", 1, Plan(), steps=1)
        places = [at for at in range(life.opened) if life.log[at].what == "sync"]
        cuts = [(at, "any", f"{SEED}, {at}, {number}") for at in places for number in range(120)]
        judge_cuts(life, cuts, place, totals)
    assert not totals.findings, totals.findings
    assert totals.images >= 240


# -- the harness itself -----------------------------------------------------------------------------------------------


def test_same_seed_same_log() -> None:
    """What a seed has found can be found again: its log is the same, but for the random salts of SQLite's log file."""
    with scratch() as place:
        both = [one_life(place / name, SEED, Plan("process", None, 25)) for name in ("one", "two")]
    shapes = [[(*step[:3], len(step.data), step.name) for step in life.log] for life in both]
    assert shapes[0] == shapes[1]
    assert both[0].history.rows == both[1].history.rows


def test_lives_do_everything_a_log_can_go_through() -> None:
    """Logs begin anew, are carried over while the job is open, are deleted and made again; some frames come early."""
    seen = dict.fromkeys(("begun anew", "carried over", "deleted", "rewritten", "batches", "barriers", "ends"), 0)
    with scratch() as place:
        for number in range(8):
            life = one_life(place / str(number), number, Plan(spills=True), steps=20)
            log, history = life.log, life.history.rows
            database = log[0].file
            lowest: dict[int, int] = {}
            for step in log[life.opened :]:
                if step.what == "write" and step.file == database:
                    seen["carried over"] += 1
                elif step.what == "write":
                    seen["begun anew"] += step.at == 0
                    seen["rewritten"] += 0 < step.at < lowest.get(step.file, 0)
                    lowest[step.file] = step.at
                seen["deleted"] += step.what == "unlink"
                seen["barriers"] += step.what == "synced"
            seen["batches"] += any(later - earlier > 1 for earlier, later in pairwise(sorted(history)))
            seen["ends"] += any(end for _payload, _version, end in history[max(history)].values())
    assert all(seen.values()), seen


def medium(*steps: Step) -> Medium:
    """Return the medium after some steps."""
    made = Medium()
    for step in steps:
        made.take(step)
    return made


def images(made: Medium, count: int = 400) -> list[powered.Image]:
    """Return what cuts may leave, with every kind of damage."""
    rng = random.Random(SEED)
    return [made.image(damage, rng) for damage in DAMAGES for _ in range(count)]


def test_what_was_synced_stays() -> None:
    """No damage reaches what was synced, nor a byte that wasn't written since, nor a file's name from its sync on."""
    old, new = b"o" * 2_000, b"n" * 700
    made = medium(
        Step("create", 0, name="job.db"), Step("write", 0, 0, old), Step("sync", 0), Step("write", 0, 300, new)
    )  # fmt: skip
    found = [bytes(image["job.db"]) for image in images(made)]
    assert {(content[:300], content[1_000:]) for content in found} == {(old[:300], old[1_000:])}
    assert len({content[300:1_000] for content in found}) > 10
    # In pieces of a sector: the second one may be there without the first.
    second = slice(SECTOR_BYTES, 1_000)
    assert any(content[300:SECTOR_BYTES] == old[300:SECTOR_BYTES] and content[second] == new[:488] for content in found)


def test_what_was_not_synced_may_be_gone() -> None:
    """A file that was never synced may be missing, empty, short or full of holes; nothing and everything come too."""
    made = medium(Step("create", 0, name="job.db"), Step("names"), Step("create", 1, name="job.db-wal"),
                  Step("write", 1, 0, b"w" * 4 * SECTOR_BYTES))  # fmt: skip
    found = [image.get("job.db-wal") for image in images(made)]
    assert None in found
    sizes = {len(content) for content in found if content is not None}
    assert {0, 4 * SECTOR_BYTES} <= sizes
    assert any(content is not None and b"w" in content and 0 in content for content in found)
    assert medium(Step("found", 0, data=b"x", name="job.db")).image("nothing kept", random.Random(0)) == {
        "job.db": bytearray(b"x")
    }


def test_names_and_truncations_happen_in_their_order() -> None:
    """A name that came later never is there without the earlier ones; a sync of its file keeps all of them."""
    steps = [Step("found", 0, name="job.db"), Step("create", 1, name="job.db-journal"),
             Step("unlink", name="job.db-journal"), Step("create", 2, name="job.db-wal")]  # fmt: skip
    names = {tuple(sorted(image)) for image in images(medium(*steps))}
    assert names == {("job.db",), ("job.db", "job.db-journal"), ("job.db", "job.db-wal")}
    kept = medium(*steps, Step("sync", 2))
    assert {tuple(sorted(image)) for image in images(kept)} == {("job.db", "job.db-wal")}
    cut = medium(Step("found", 0, data=b"d" * 900, name="job.db"), Step("truncate", 0, 600), Step("truncate", 0, 100))
    assert {len(image["job.db"]) for image in images(cut)} == {900, 600, 100}


def test_every_damage_leaves_as_many_fates_as_pieces() -> None:
    """Each kind of damage decides about every piece, and among them are pieces lost, torn and turned into garbage."""
    rng = random.Random(SEED)
    seen: dict[str, set[int]] = {damage: set() for damage in DAMAGES}
    for damage in DAMAGES:
        for count in (0, 1, 2, 100, 100, 100, 100):
            chosen = fates(damage, rng, count)
            assert len(chosen) == count
            seen[damage] |= set(chosen)
    assert seen.pop("nothing kept") == {powered.LOSE}
    assert seen.pop("everything kept") == {powered.KEEP}
    assert set().union(*seen.values()) == {powered.KEEP, powered.LOSE, powered.TEAR, powered.GARBLE}


@pytest.mark.parametrize(("at", "size"), [(0, 0), (0, 512), (24, 4096), (511, 2), (512, 513), (32, 24)])
def test_sectors(at: int, size: int) -> None:
    """Pieces are what was written, in order, and none goes over the end of a sector."""
    data = random.Random(at).randbytes(size)
    pieces = in_sectors(at, data)
    assert b"".join(piece or b"" for _, piece in pieces) == data
    assert all(piece is not None and start % SECTOR_BYTES + len(piece) <= SECTOR_BYTES for start, piece in pieces)
    assert [start for start, _ in pieces] == [at, *range((at // 512 + 1) * 512, at + size, 512)]


# -- the judge --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sound() -> tuple[Life, Contents]:
    """A life with batches in it, and what its job holds at the end, with a quota and its changes."""
    with scratch() as place:
        life = one_life(place / "life", 3, Plan("power", 2**30, 25))
        found, findings = contents(place / "life", life.plan)
    assert found is not None
    assert not findings
    return life, found


def kinds(life: Life, found: Contents, floor: int = 0, posted: int | None = None) -> set[str]:
    """Return the kinds of what the judge finds."""
    posted = life.history.version if posted is None else posted
    return {finding.kind for finding in judge(found, life.plan, life.history, floor, posted)}


def test_judge_accepts_a_prefix(sound: tuple[Life, Contents]) -> None:
    """The judge finds nothing in a whole job, nor in an empty one where nothing was acknowledged."""
    life, found = sound
    assert kinds(life, found, life.history.version) == set()
    empty = Contents(0, {}, [], {"last_version": 0, "changes_dropped": 0, "used_bytes": 0})
    assert kinds(life, empty) == set()
    assert kinds(life, empty, floor=1) == {"lost"}
    assert kinds(life, found, posted=life.history.version - 1) == {"beyond"}


def at_version(found: Contents, version: int, rows: Rows) -> Contents:
    """Return contents with another version and other rows."""
    return found._replace(last_version=version, rows=rows, notes=found.notes | {"last_version": version})


def test_judge_refuses_what_is_no_prefix(sound: tuple[Life, Contents]) -> None:
    """The judge names a row too few, a batch in part, a version that isn't the rows', and numbers that differ."""
    life, found = sound
    last = found.last_version
    history = life.history.rows
    earlier = max(version for version in history if version < last)
    fewer = dict(list(found.rows.items())[1:])
    assert kinds(life, at_version(found, last, fewer)) == {"hole"}
    assert kinds(life, at_version(found, earlier, found.rows)) == {"version"}
    assert kinds(life, at_version(found, last, history[earlier])) == {"version"}
    inside = next(version for version in range(last, 0, -1) if version not in history)
    assert kinds(life, at_version(found, inside, fewer)) == {"split"}
    assert kinds(life, found._replace(notes=found.notes | {"last_version": 1})) == {"version"}
    assert kinds(life, found._replace(notes=found.notes | {"used_bytes": 1})) == {"hole"}
    assert kinds(life, found._replace(notes=found.notes | {"changes_dropped": last + 1})) == {"hole"}
    assert kinds(life, found._replace(changes=found.changes[1:])) == {"hole"}


def test_what_can_not_be_opened_or_read_is_reported(tmp_path: Path) -> None:
    """A file of garbage is a finding, and so is one whose pages don't fit together."""
    write_image({"job.db": bytearray(b"garbage" * 1_000)}, tmp_path)
    assert [finding.kind for finding in contents(tmp_path, Plan())[1]] == ["file"]
    with scratch() as place:
        life = one_life(place / "life", 4, Plan("power"), steps=20)
        path = place / "life" / "job.db"
        data = bytearray(path.read_bytes())
        data[4096:] = bytes(len(data) - 4096)
        path.write_bytes(data)
        assert "file" in {finding.kind for finding in contents(place / "life", life.plan)[1]}


# -- planted defects --------------------------------------------------------------------------------------------------

Plant = Callable[[pytest.MonkeyPatch], None]


def deaf(kind: str, during: tuple[str, ...] = ()) -> Plant:
    """Return a disk's defect: it doesn't sync one kind of file, at all or only during some methods of the store."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        within: list[str] = []
        sync = DiskFile.xSync

        def sync_some(file: DiskFile, flags: int) -> None:
            if file.kind != kind or (during and not within):
                sync(file, flags)

        patch.setattr(DiskFile, "xSync", sync_some)
        for name in during:
            patch.setattr(SqliteStore, name, noting(getattr(SqliteStore, name), within))

    return plant


def noting(method: Callable[..., Any], within: list[str]) -> Callable[..., Any]:
    """Return a method that says when it is being run."""

    def run_noted(*args: Any, **kwargs: Any) -> Any:
        within.append("")
        try:
            return method(*args, **kwargs)
        finally:
            within.pop()

    return run_noted


def spoilt_store(spoil: Callable[[SqliteStore], None]) -> Plant:
    """Return an engine's defect: something is done to every store that is opened."""

    def plant(patch: pytest.MonkeyPatch) -> None:
        open_store = DirectoryRoot.open

        def open_spoilt(root: DirectoryRoot, job_id: str, options: StoreOptions) -> SqliteStore:
            store = open_store(root, job_id, options)
            spoil(store)
            return store

        patch.setattr(DirectoryRoot, "open", open_spoilt)

    return plant


def other_apply(apply: Callable[[SqliteStore, Group, int], list[Any]]) -> Plant:
    """Return an engine's defect: groups are written in another way."""
    return lambda patch: patch.setattr(SqliteStore, "apply", apply)


def forget_power(store: SqliteStore) -> None:
    """Have commits not synced."""
    store._connection.pragma("synchronous", "normal")


def touch_nothing(store: SqliteStore) -> None:
    """Have a barrier change no page, so that its commit writes nothing and syncs nothing."""
    execute = store._execute
    store._execute = lambda sql, *values: execute("SELECT 1" if "'syncs'" in sql else sql, *values)


def store_version_apart(store: SqliteStore) -> None:
    """Have the last version written in a transaction of its own, after that of the rows."""
    execute = store._execute
    held: list[Any] = []

    def execute_apart(sql: str, *values: Any) -> Any:
        if "'last_version'" in sql and sql.startswith("UPDATE"):
            held.append((sql, *values))
            return execute("SELECT 1")
        done = execute(sql, *values)
        if sql == "COMMIT" and held:
            execute(*held.pop())
        return done

    store._execute = execute_apart


_apply = SqliteStore.apply


def ignore_barriers(store: SqliteStore, group: Group, now_ms: int) -> list[Any]:
    """Take a barrier for the medium as one that asks for less."""
    return _apply(store, [Barrier() if type(place) is Barrier else place for place in group], now_ms)


def split_batches(store: SqliteStore, group: Group, now_ms: int) -> list[Any]:
    """Write the first half of a batch that comes alone in a transaction of its own."""
    if len(group) == PLACES and type(group[1]) is Batch and not group[1].expects:
        items = group[1].items
        half = len(items) // (2 * PLACES) * PLACES
        _apply(store, items[:half], now_ms)
        rest = Batch(items[half:], group[1].ops - half // PLACES, expects=False)
        return _apply(store, [None, rest, None], now_ms)
    return _apply(store, group, now_ms)


# Each with the durability it is run with, and the kinds of finding of which one at least has to report it.
PLANTS: dict[str, tuple[Plant, Durability, set[str]]] = {
    "log never synced, power": (deaf("wal"), "power", {"lost"}),
    "log never synced, process": (deaf("wal"), "process", {"lost"}),
    "commit not synced": (spoilt_store(forget_power), "power", {"lost"}),
    "barrier without a sync": (other_apply(ignore_barriers), "process", {"lost"}),
    "barrier that changes nothing": (spoilt_store(touch_nothing), "process", {"lost"}),
    "log not synced before it is carried over": (deaf("wal", ("checkpoint", "settle")), "process", {"file", "hole"}),
    "file not synced before its log begins anew": (deaf("db"), "process", {"file", "hole", "version"}),
    "batch lost": (other_apply(plants._lose_batch), "power", {"hole", "version"}),
    "put lost": (other_apply(plants._lose_put), "process", {"hole", "version"}),
    "puts swapped": (other_apply(plants._swap_halves), "process", {"hole"}),
    "batch split": (other_apply(split_batches), "power", {"split"}),
    "version stored apart": (spoilt_store(store_version_apart), "process", {"version"}),
    "answered before commit": (other_apply(plants._answer_early), "power", {"lost"}),
}


@pytest.mark.parametrize("name", PLANTS)
def test_planted_defect_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness reports a disk or an engine that was spoilt on purpose, and as what it is."""
    plant, durability, expected = PLANTS[name]
    monkeypatch.setattr(plants, "_held", [])  # what one of them keeps back
    plant(monkeypatch)
    print(f"seed {SEED}")
    totals = Totals()
    for totals in run(SEED, 3_000, durability):
        if expected & totals.kinds.keys():
            return
    pytest.fail(f"{name} wasn't seen in {totals.images} images; there was {totals.kinds}")
