"""Checking a job's file: nothing is found in what the engine has written, and whatever else is there is found."""

from __future__ import annotations

import os
import random
import sqlite3
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from persistency.errors import Corrupt, SchemaTooNew, StorageError, Unavailable
from persistency.storage import checking
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import DropRange, DropRow, SetRow, Store, StoreOptions, SwapRow, TouchRow
from persistency.testing import NOW_MS, batch, group, put
from tests.storage.conftest import FaultyDisk, contents, run_child

WITH_ALL = StoreOptions(max_bytes=10**9, feed_changes_max=40)
KV_1 = (
    "CREATE TABLE kv (category BLOB NOT NULL, key BLOB NOT NULL, payload BLOB NOT NULL,"
    " PRIMARY KEY (category, key)) WITHOUT ROWID"
)


def check(path: Path, vfs: str | None = None) -> list[str]:
    """Check a file to the end; return the problems."""
    return finish(checking.check(path, vfs=vfs))


def finish(steps: Generator[object, None, list[str]]) -> list[str]:
    """Take all steps; return what they return."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            problems: list[str] = stop.value
            return problems


def change(path: Path, *statements: str) -> None:
    """Change a file with the standard library."""
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def use(store: Store, chance: random.Random, now_ms: int) -> None:
    """Apply a group of anything."""
    keys = [b"%02d" % at for at in range(30)]
    messages: list[object] = []
    for _ in range(20):
        category, key = chance.choice([b"c", b"d", b"\xc3\xa9"]), chance.choice(keys)
        end = now_ms + chance.randrange(100) if chance.random() < 0.3 else None
        payload = chance.randbytes(chance.choice([0, 10, 10, 9_000]))
        messages.append(
            chance.choice(
                [
                    put(category, key, payload),
                    batch(put(category, key, payload), DropRow(category, chance.choice(keys))),
                    SetRow(category, key, payload, end),
                    DropRow(category, key),
                    DropRange(category, key, key + b"9"),
                    SwapRow(category, key, None, payload, end),
                    TouchRow(category, key, end),
                ]
            )
        )
    store.apply(group(*messages), now_ms)


@pytest.fixture
def made(root: DirectoryRoot) -> Path:
    """A closed job's file with everything in it that can be: a quota, changes, ends, versions."""
    store = root.open("alpha", WITH_ALL)
    chance = random.Random(7)
    for at in range(30):
        use(store, chance, NOW_MS + at)
    store.apply(group(SetRow(b"c", b"ends", b"soon", NOW_MS * 2), put(b"c", b"marked", b"here")), NOW_MS)
    store.close()
    return root.path("alpha")


@pytest.fixture
def small(root: DirectoryRoot) -> Path:
    """A closed job's file full of small rows."""
    store = root.open("small", WITH_ALL)
    store.apply(group(*[put(b"c%d" % (at % 2), b"key-%03d" % at, b"payload %d" % at) for at in range(600)]), NOW_MS)
    store.close()
    return root.path("small")


# -- what is sound -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [StoreOptions(), WITH_ALL, StoreOptions(max_bytes=10**9)])
@pytest.mark.parametrize("seed", range(5))
def test_what_the_engine_writes_is_sound(seed: int, options: StoreOptions, root: DirectoryRoot) -> None:
    """Whatever a job does, with or without a quota and changes, its file is sound at every moment, open and closed."""
    chance = random.Random(seed)
    now_ms = NOW_MS
    for _ in range(4):
        store = root.open("alpha", chance.choice([options, StoreOptions()]))
        for _ in range(6):
            now_ms += chance.randrange(60)
            use(store, chance, now_ms)
            assert check(root.path("alpha")) == []
            store.reap(now_ms, 10)
            assert check(root.path("alpha")) == []
        store.close()
        assert check(root.path("alpha")) == []


def test_a_new_job_is_sound(root: DirectoryRoot) -> None:
    """A job without rows is sound; a file of the Nim original, which has nothing but rows, too."""
    root.open("alpha", WITH_ALL).close()
    assert check(root.path("alpha")) == []
    change(root.directory / "old", KV_1, "INSERT INTO kv VALUES (x'63', x'6b', x'76')", "PRAGMA user_version = 1")
    assert check(root.directory / "old") == []


def test_checking_stops_nobody(root: DirectoryRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job writes on between all steps and what is checked stays of one moment; what was looked at is told."""
    monkeypatch.setattr(checking, "_SPAN", checking._SPAN.replace(str(checking.SLICE_ROWS), "10"))
    store = root.open("alpha", WITH_ALL)
    store.apply(group(*[put(b"c%d" % (at % 2), b"%03d" % at, b"v") for at in range(95)]), NOW_MS)
    steps = checking.check(root.path("alpha"))
    told = []
    try:
        while True:
            told.append(next(steps))
            store.apply(group(put(b"c0", b"more %d" % len(told), b"v"), DropRow(b"c1", b"%03d" % len(told))), NOW_MS)
            store.checkpoint()
    except StopIteration as stop:
        assert stop.value == []
    assert told[-1] == (95 + 40, None)
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert len(told) > 10
    store.close()


def test_a_check_given_up_lets_go(root: DirectoryRoot) -> None:
    """Closing the steps ends the read transaction: the job's log can be carried over and cut off."""
    store = root.open("alpha", StoreOptions())
    store.apply(group(put(b"c", b"k", b"v")), NOW_MS)
    for steps in range(4):
        checks = checking.check(root.path("alpha"))
        for _ in range(steps):
            next(checks)
        checks.close()
        store.apply(group(put(b"c", b"k", b"%d" % steps)), NOW_MS)
        store.settle()
        assert root.path("alpha").with_name("alpha.db-wal").stat().st_size == 0
    store.close()


# -- what isn't --------------------------------------------------------------------------------------------------

ROW = "WHERE category = x'63' AND key = CAST('marked' AS BLOB)"
INTO = "INSERT INTO kv (category, key, payload, version, expires_ms) VALUES "
CHANGE = "INSERT INTO changes (version, kind, category, key, payload, stop) VALUES "
LAST = "(SELECT value FROM meta WHERE name = 'last_version')"
MANY = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 250) "
PROBLEMS: dict[str, tuple[str, str]] = {
    "a text for a payload": (f"UPDATE kv SET payload = 'text' {ROW}", "row b'c', b'marked': its payload is text"),
    "a number for a payload": (f"UPDATE kv SET payload = 5 {ROW}", "its payload is integer"),
    "a text for a version": (f"UPDATE kv SET version = 'one' {ROW}", "its version is text"),
    "a fraction for a version": (f"UPDATE kv SET version = 1.5 {ROW}", "its version is real"),
    "a version below all": (f"UPDATE kv SET version = -1 {ROW}", "its version, -1, was never given"),
    "a version never given": (f"UPDATE kv SET version = 1 + {LAST} {ROW}", "was never given"),
    "a text for an end": (f"UPDATE kv SET expires_ms = 'soon' {ROW}", "its expires_ms is text"),
    "a text for a key": (INTO + "(x'63', 'k', x'', 1, NULL)", "row b'c', b'k': its key is text"),
    "a number for a key": (INTO + "(x'63', 5, x'', 1, NULL)", "its key is integer"),
    "a text for a category": (INTO + "('c', x'6b', x'', 1, NULL)", "row b'c', b'k': its category is text"),
    "no text of a category": (INTO + "(CAST(x'ff' AS TEXT), x'6b', x'', 1, NULL)", "row b'\\xff', b'k': its cat"),
    "a category of no text": (INTO + "(x'ff', x'6b', x'', 1, NULL)", "category b'\\xff' is not 1 to 255 bytes"),
    "a long category": (INTO + f"(x'{'61' * 256}', x'6b', x'', 1, NULL)", "is not 1 to 255 bytes"),
    "an empty category": (INTO + "(x'', x'6b', x'', 1, NULL)", "category b'' is not 1 to 255 bytes"),
    "no last version": ("DELETE FROM meta WHERE name = 'last_version'", "meta: last_version is missing"),
    "a text for the last version": ("UPDATE meta SET value = 'x' WHERE name = 'last_version'", "last_version is no"),
    "a last version below all": ("UPDATE meta SET value = -5 WHERE name = 'last_version'", "last_version is no"),
    "no count of syncs": ("DELETE FROM meta WHERE name = 'syncs'", "meta: syncs is missing"),
    "no job id": ("DELETE FROM meta WHERE name = 'job_id'", "meta: job_id is missing"),
    "a number for the job id": ("UPDATE meta SET value = 5 WHERE name = 'job_id'", "meta: job_id is no text"),
    "no text of a job id": ("UPDATE meta SET value = CAST(x'ff' AS TEXT) WHERE name = 'job_id'", "job_id is no text"),
    "a time beyond clocks": ("UPDATE meta SET value = 1 << 60 WHERE name = 'latest_ms'", "latest_ms is beyond"),
    "other bytes in use": ("UPDATE meta SET value = value + 1 WHERE name = 'used_bytes'", "meta: used_bytes is "),
    "a row not counted": (INTO + "(x'63', x'6e6577', x'0102', 1, NULL)", "meta: used_bytes is "),
    "a row that had ended, counted": (
        f"{INTO} (x'63', x'6e6577', x'0102', 1, 5); UPDATE meta SET value = value + 2 WHERE name = 'used_bytes'",
        "meta: used_bytes is ",
    ),
    "a change never given": (f"{CHANGE} (1 + {LAST}, 'put', x'63', x'6b', x'', NULL)", "its version was never given"),
    "a change below all": (f"{CHANGE} (-7, 'put', x'63', x'6b', x'', NULL)", "change -7: its version was never given"),
    "a change no longer kept": (f"{CHANGE} (1, 'put', x'63', x'6b', x'', NULL)", "change 1: it should no longer be"),
    "changes dropped ahead": (
        f"UPDATE meta SET value = 1 + {LAST} WHERE name = 'changes_dropped'",
        "changes_dropped is",
    ),
    "an unknown kind": ("UPDATE changes SET kind = 'push'", "its kind is unknown"),
    "a kind of bytes": ("UPDATE changes SET kind = x'707574'", "its kind is unknown"),
    "a put without a payload": ("UPDATE changes SET payload = NULL WHERE kind = 'put'", "its payload is null"),
    "a put of text": ("UPDATE changes SET payload = 'text' WHERE kind = 'put'", "its payload is text"),
    "a delete with a payload": ("UPDATE changes SET payload = x'' WHERE kind = 'delete'", "its payload is blob"),
    "a change of a text": ("UPDATE changes SET key = 'k'", "its category or key is no bytes"),
    "a put up to somewhere": ("UPDATE changes SET stop = x'6b' WHERE kind = 'put'", "its stop is blob"),
    "a range up to a text": ("UPDATE changes SET stop = 'k' WHERE kind = 'delete_range'", "its stop is text"),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_what_is_wrong_is_found(problem: str, made: Path) -> None:
    """Each thing that the engine wouldn't have written is told of, alone, by the row or the name it is about."""
    statements, expected = PROBLEMS[problem]
    assert check(made) == []
    with closing(sqlite3.connect(made)) as connection:
        connection.executescript(statements)
    problems = check(made)
    assert [text for text in problems if expected in text], problems
    assert len({text.partition(": ")[2] or text for text in problems if "used_bytes" not in text}) <= 1, problems


def test_many_problems_are_counted(made: Path) -> None:
    """Of many problems a hundred are told, and how many more there are."""
    change(made, f"{MANY} {INTO.removesuffix('VALUES ')} SELECT x'63', i, x'', -i, NULL FROM n")
    change(made, f"{MANY} {INTO.removesuffix('VALUES ')} SELECT x'63', CAST('n' || i AS BLOB), x'', -i, NULL FROM n")
    problems = check(made)
    assert len(problems) == 101
    assert problems[100] == "and 400 more"


def test_problems_are_short(made: Path) -> None:
    """A key of thousands of bytes doesn't make a problem's text as long."""
    change(made, INTO + f"(x'{'63' * 255}', x'{'6b' * 8000}', 'text', 1, NULL)")
    problems = [text for text in check(made) if "payload is text" in text]
    assert len(problems) == 1
    assert len(problems[0]) < 250


def test_a_changed_key_is_found(small: Path) -> None:
    """A byte of a key that has changed, which SQLite's own quick check doesn't see, is found."""
    data = bytearray(small.read_bytes())
    data[data.index(b"key-300payload") + 4] ^= 0x40
    small.write_bytes(data)
    with closing(sqlite3.connect(small)) as connection:
        assert connection.execute("PRAGMA quick_check").fetchall() == [("ok",)]
    assert check(small) != []


def test_a_damaged_page_is_told_of(small: Path) -> None:
    """A page of garbage in the middle is a problem among others, not an exception."""
    data = bytearray(small.read_bytes())
    found = data.index(b"key-300payload") // 4096 * 4096
    data[found : found + 4096] = b"\xaa" * 4096
    small.write_bytes(data)
    problems = check(small)
    assert any("page" in text for text in problems)
    assert any("to its end" in text for text in problems)


def test_a_medium_that_cannot_be_read_is_told_of(made: Path, disk: FaultyDisk) -> None:
    """A read that fails, whichever it is, is a problem once the file is known for a job's; before that it is raised."""
    outcomes = []
    for at in range(1, 1_000):
        disk.arm("read", at, apsw.SQLITE_IOERR_READ, sticky=True)
        try:
            outcomes.append(len(check(made, disk.name)))
        except StorageError:
            outcomes.append(-1)
        fired = disk.fired
        disk.disarm()
        if not fired:
            break
    assert outcomes[0] == -1
    assert outcomes[-1] == 0
    assert all(outcome != 0 for outcome in outcomes[:-1])
    assert any(outcome > 0 for outcome in outcomes)


def test_what_is_no_job_is_refused(made: Path, place: Path) -> None:
    """A file that isn't there, or isn't a job's, or is too new, is an error, and stays as it is."""
    (place / "directory").mkdir()
    (place / "link").symlink_to("root/alpha.db")
    (place / "garbage").write_bytes(b"\x55" * 9_000)
    change(place / "other", "CREATE TABLE users (id INTEGER PRIMARY KEY, name)")
    change(made, "PRAGMA user_version = 3")
    made.rename(place / "newer")
    before = contents(place)
    for name, error in (
        ("nothing", Unavailable),
        ("directory", StorageError),
        ("link", StorageError),
        ("garbage", Corrupt),
        ("other", Corrupt),
        ("newer", SchemaTooNew),
    ):
        with pytest.raises(error):
            check(place / name)
    after = contents(place)
    assert {name: after[name] for name in before} == before


# -- what is damaged on purpose ----------------------------------------------------------------------------------

FLIPPING = """
import random, resource, sys
from pathlib import Path
from persistency.errors import StorageError, SchemaTooNew
from persistency.storage import checking
resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
data, place, chance = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), random.Random(int(sys.argv[3]))
said = ""
for at in range(int(sys.argv[4])):
    damaged = bytearray(data)
    for _ in range(chance.choice([1, 1, 2, 8])):
        flipped = 4096 * chance.randrange(len(data) // 4096) + chance.randrange(108)
        if chance.random() < 0.5:
            flipped = chance.randrange(len(data))
        damaged[flipped] ^= 1 << chance.randrange(8)
    if chance.random() < 0.1:
        del damaged[chance.randrange(len(damaged)) :]
    place.write_bytes(damaged)
    steps = checking.check(place)
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        assert all(type(text) is str for text in stop.value)
        assert len(stop.value) <= 101
        said += "p" if stop.value else "s"
    except (StorageError, SchemaTooNew):
        said += "e"
print(said)
"""


@pytest.mark.parametrize("seed", range(3))
def test_any_damage_gives_problems_or_our_errors(seed: int, small: Path, place: Path) -> None:
    """Whatever bits are flipped and bytes missing, a check ends soon, with texts or an error of ours."""
    child = run_child(FLIPPING, small, place / "damaged", seed, 150, timeout=60)
    assert child.returncode == 0, (seed, child.stderr[-3000:])
    said = child.stdout.strip()
    assert len(said) == 150
    assert set(said) <= set("pse")
    assert said.count("p") > 40
    assert said.count("e") > 5


CHECKING = """
import sys
from pathlib import Path
from persistency.storage import checking
steps = checking.check(Path(sys.argv[1]))
count = 0
try:
    while True:
        next(steps)
        count += 1
except StopIteration as stop:
    print(count, *stop.value, sep="\\n")
"""


def test_a_file_that_goes_in_circles(small: Path) -> None:
    """Pages that name one page over and over, level by level, hold more rows than anyone could count: a check ends."""
    with closing(sqlite3.connect(small)) as connection:
        first = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'kv'").fetchone()[0]
    data = bytearray(small.read_bytes())
    inner = data[(first - 1) * 4096 : first * 4096]
    assert inner[0] == 2  # an inner page of an index
    cells = int.from_bytes(inner[3:5], "big")
    assert cells > 3

    def naming(child: int) -> bytes:
        page = inner[:]
        page[8:12] = child.to_bytes(4, "big")  # the rightmost
        for cell in range(cells):
            at = int.from_bytes(page[12 + 2 * cell : 14 + 2 * cell], "big")
            page[at : at + 4] = child.to_bytes(4, "big")
        return bytes(page)

    pages, leaf, levels = len(data) // 4096, int.from_bytes(inner[8:12], "big"), 16
    data[(first - 1) * 4096 : first * 4096] = naming(pages + 1)
    for level in range(1, levels + 1):
        data += naming(pages + level + 1 if level < levels else leaf)
    data[28:32] = (len(data) // 4096).to_bytes(4, "big")
    small.write_bytes(data)
    child = run_child(CHECKING, small, timeout=30)
    assert child.returncode == 0, child.stderr[-3000:]
    assert "2nd reference" in child.stdout
    assert int(child.stdout.split()[0]) < 1_000


def test_no_more_rows_than_there_is_room_for(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk that has seen more rows than the file's pages could hold is given up."""
    monkeypatch.setattr(checking, "_ROW_BYTES_MIN", 1_000)
    assert any("more than the file has room for" in text for text in check(small))


def test_the_flips_would_tell_an_exception(small: Path, place: Path) -> None:
    """The check of flipped bits fails where another exception comes out: it is one that can fail."""
    broken = FLIPPING.replace("next(steps)", "next(steps); 1 / 0")
    assert run_child(broken, small, place / "damaged", 0, 20).returncode == 1
    assert os.path.exists(place / "damaged")
