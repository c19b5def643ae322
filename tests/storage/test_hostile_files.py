"""Damaged files: whatever bits flip or bytes are missing, only our own errors come out, soon, and nothing crashes."""

from __future__ import annotations

import os
import shutil
import signal
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from persistency.errors import Corrupt
from persistency.storage import meta
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import ScanRange, StoreOptions
from persistency.storage.reading import SqliteReader
from persistency.testing import batch, group, put
from tests.storage.conftest import run_child

FLIPS = 300
BATCHES = 4

MAKE = """
import os, signal, sys
from pathlib import Path
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import StoreOptions
store = DirectoryRoot(Path(sys.argv[1])).open("alpha", StoreOptions())
for at in range(12):
    group = []
    for row in range(20):
        group += [b"c%d" % (row % 3), b"%03d-%02d" % (row, at), bytes([at]) * (row * 30)]
    store.apply(group, 1)
    if at == 5:
        store.checkpoint()
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
store.close()
"""

# Damages the files given, opens the job, reads and writes everything; says what came of it, one letter per damage.
ATTACK = """
import random, resource, shutil, sys, traceback
from pathlib import Path
from persistency.errors import PersistencyError
from persistency.storage.directory import DirectoryRoot
from persistency.storage.port import *
from persistency.testing import dump

resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30, 2 * 2**30))
source, work, target, how, seed, count = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:5], *map(int, sys.argv[5:7])
chance = random.Random(seed)

def damage(path):
    data = bytearray(path.read_bytes())
    if how == "flip":
        for _ in range(chance.choice([1, 1, 1, 2, 8])):
            # Half of the damage where it hurts: the file's header and the heads of pages.
            at = 4096 * chance.randrange(len(data) // 4096) + chance.randrange(108)
            if chance.random() < 0.5:
                at = chance.randrange(len(data))
            data[at] ^= 1 << chance.randrange(8)
    elif how == "cut":
        del data[chance.choice([chance.randrange(len(data)), 512 * chance.randrange(len(data) // 512)]):]
    else:
        at = 512 * chance.randrange(len(data) // 512)
        data[at : at + 512] = chance.randbytes(512)
    path.write_bytes(data)

def use(store):
    failed = 0
    for now_ms in (1, 2**62):
        rows = dump(store, now_ms)
        for category in rows:
            store.scan(ScanRange(category, b"", None, reverse=True), now_ms)
            store.read(CountRange(category, b"", None), now_ms)
            for row in rows[category]:
                assert row is None or (type(row.key), type(row.payload), type(row.version)) == (bytes, bytes, int), row
                store.get(category, row.key if row else b"", now_ms)
    group = [None, ScanRange(b"c1", b"", None), None, b"c1", b"new", b"1", None, DropRow(b"c1", b"001-02"), None]
    group += [None, DropRange(b"c2", b"", b"004"), None, None, Barrier(sync=True), None]
    failed += any(isinstance(outcome, Failed) for outcome in store.apply(group, 1))
    store.checkpoint()
    return failed

said = ""
for at in range(count):
    place = work / f"{seed}-{at}"
    shutil.copytree(source, place)
    damage(place / target)
    print(".", end="", file=sys.stderr, flush=True)
    store = None
    try:
        store = DirectoryRoot(place).open("alpha", StoreOptions())
        said += "f" if use(store) else "r"
    except (PersistencyError, OutcomeUnknown) as error:
        said += "u" if store else "o"
    except MemoryError:
        traceback.print_exc()
        raise SystemExit(3)
    finally:
        if store:
            store.close()
    shutil.rmtree(place)
print(said)
"""


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job's files as a killed process leaves them: rows in the file and in the log."""
    directory = tmp_path_factory.mktemp("hostile") / "killed"
    run_child(MAKE, directory, "killed")
    (directory / "alpha.db-shm").unlink()
    assert (directory / "alpha.db").stat().st_size > 20_000
    assert (directory / "alpha.db-wal").stat().st_size > 20_000
    return directory


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A job's file as a close leaves it: all the rows are in it, and no log hides its pages."""
    directory = tmp_path_factory.mktemp("hostile") / "closed"
    run_child(MAKE, directory, "closed")
    assert not (directory / "alpha.db-wal").exists()
    return directory


def attack(source: Path, work: Path, target: str, how: str, count: int) -> str:
    """Damage and use the files so often, in child processes; return what came of each."""
    said = ""
    for seed in range(BATCHES):
        child = run_child(ATTACK, source, work, target, how, seed, count // BATCHES, timeout=60)
        assert child.returncode == 0, (seed, child.returncode, child.stderr[-3000:])
        said += child.stdout.strip()
    assert len(said) == count
    return said


@pytest.mark.parametrize("how", ["flip", "cut", "overwrite"])
def test_a_damaged_file_gives_only_our_errors(how: str, closed: Path, place: Path) -> None:
    """Opening, reading and writing a damaged file gives rows or our own errors: no crash, no hang, no other."""
    said = attack(closed, place, "alpha.db", how, FLIPS if how == "flip" else 100)
    assert said.count("o") >= 2  # refused when opened
    if how != "cut":
        assert said.count("u") >= 2  # found while it was used
        assert said.count("r") >= 5  # not noticed


@pytest.mark.parametrize("how", ["flip", "cut", "overwrite"])
def test_a_damaged_log_gives_only_our_errors(how: str, killed: Path, place: Path) -> None:
    """Opening, reading and writing beside a damaged log gives rows or our own errors: no crash, no hang, no other."""
    said = attack(killed, place, "alpha.db-wal", how, FLIPS if how == "flip" else 100)
    assert said.count("r") >= 50


def test_undamaged_files_are_used_whole(killed: Path, place: Path) -> None:
    """The same attack without damage reads and writes everything: what fails above fails for the damage."""
    harmless = ATTACK.replace("    path.write_bytes(data)", "    pass")
    child = run_child(harmless, killed, place, "alpha.db", "flip", 1, 3)
    assert (child.returncode, child.stdout.strip()) == (0, "rrr"), child.stderr


@pytest.mark.parametrize("size", [0, 1, 31, 32, 56, 4120, -1])
def test_a_cut_log_keeps_a_prefix(size: int, killed: Path, place: Path) -> None:
    """A log that is cut short gives the rows of whole groups up to some version, in order, and no half of one."""
    shutil.copytree(killed, place / "root")
    log = place / "root" / "alpha.db-wal"
    os.truncate(log, log.stat().st_size - 1 if size < 0 else size)
    store = DirectoryRoot(place / "root").open("alpha", StoreOptions())
    version = store.status().last_version
    assert version % 20 == 0
    assert version in ((220,) if size < 0 else (120,))
    keys = sorted(key for category in (b"c0", b"c1", b"c2") for key, _ in store.scan(ScanRange(category, b"", None), 1))
    assert keys == sorted(b"%03d-%02d" % (row, at) for at in range(version // 20) for row in range(20))
    assert store.apply(group(batch(put(b"c0", b"new", b""))), 1) == [version + 1]
    store.close()


def test_every_prefix_of_a_small_file(killed: Path, place: Path) -> None:
    """A file cut at every 512 bytes, with its log and without, is refused or read; nothing else happens."""
    cutting = "    path.write_bytes(path.read_bytes()[: 512 * seed])\n    return\n    data = bytearray("
    alone = "shutil.copytree(source, place)\n    if how == 'alone':\n        (place / 'alpha.db-wal').unlink()"
    changes = {
        "def use(store):": "def use(store):\n    return len(dump(store, 1)) and 0\n\ndef never(store):",
        "    data = bytearray(": cutting,
        "shutil.copytree(source, place)": alone,
        'said = ""': 'said = ""\nlast = (source / target).stat().st_size // 512',
        "for at in range(count):": "for seed in range(last):\n    at = 0",
    }
    code = ATTACK
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    for how in ("alone", "with log"):
        child = run_child(code, killed, place, "alpha.db", how, 0, 1)
        assert child.returncode == 0, child.stderr[-3000:]
        assert set(child.stdout.strip()) <= set("rou")
        assert len(child.stdout.strip()) >= 40


def test_the_attack_would_tell_a_crash(killed: Path, place: Path) -> None:
    """A child that dies by a signal, or lets another error out, fails the test: the check itself works."""
    crash = ATTACK.replace(
        '        said += "f"', '        import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n        said += "f"'
    )
    assert run_child(crash, killed, place, "alpha.db-wal", "cut", 0, 1).returncode == -signal.SIGSEGV
    error = ATTACK.replace('        said += "f"', '        1 / 0\n        said += "f"')
    assert run_child(error, killed, place, "alpha.db-wal", "cut", 1, 1).returncode == 1


# -- the notes of a file -----------------------------------------------------------------------------------------


def tampered(root: DirectoryRoot, *statements: str, rows: int = 1) -> Path:
    """Make a job with some rows, or none, and have a stranger run statements on its file; return its path."""
    store = root.open("alpha", StoreOptions())
    if rows:
        store.apply(group(*(put(b"c", b"%d" % at, b"1") for at in range(rows))), 1_000)
    store.close()
    with closing(apsw.Connection(str(root.path("alpha")))) as stranger:
        for statement in statements:
            stranger.execute(statement)
    return root.path("alpha")


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize(
    "job_id",
    [
        "NULL", "7", "x'616c706861'", "'alpha' || char(0) || 'x'", "'beta'", "zeroblob(20000000)",
        "printf('%.20000000c', 'a')", "printf('%.3000c', 'a')", "zeroblob(3000)", "CAST(x'ff' AS TEXT)", "''",
    ],
)  # fmt: skip
def test_a_file_with_another_job_id_is_refused(root: DirectoryRoot, job_id: str, rows: int) -> None:
    """Whatever stands where the id belongs: the file is neither opened, nor read, nor dropped, nor shown at length."""
    path = tampered(root, f"UPDATE meta SET value = {job_id} WHERE name = 'job_id'", rows=rows)
    before = path.read_bytes()
    for act in (
        lambda: root.open("alpha", StoreOptions()).close(),
        lambda: SqliteReader(path, "alpha").close(),
        lambda: root.drop("alpha"),
    ):
        with pytest.raises(Corrupt) as caught:
            act()
        assert len(str(caught.value)) < 1_000
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "statement",
    [
        (
            "INSERT INTO meta WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 5000)"
            " SELECT printf('%s%05d', substr('ak', 1 + i % 2, 1), i), i FROM n"
        ),
        "INSERT INTO meta VALUES (CAST(x'ff41' AS TEXT), 1), (x'ff', 2), (printf('%.1000000c', 'a'), 3)",
        "INSERT INTO meta VALUES ('note', CAST(x'ff41' AS TEXT)), ('other', zeroblob(1000000))",
        "INSERT INTO meta VALUES (CAST(x'41ff' AS TEXT), 1), (printf('%.1000000c', 'b'), 2)",
        "INSERT INTO meta VALUES ('a', printf('%.100000000c', 'b')), ('b', printf('%.3000c', 'b')), ('c', 1.5)",
    ],
)
def test_notes_of_others_are_left_alone(root: DirectoryRoot, statement: str) -> None:
    """What somebody else has noted in a file, however much and however odd, doesn't keep its job from being opened."""
    path = tampered(root, statement, rows=3)
    store = root.open("alpha", StoreOptions())
    assert store.last_version == 3
    assert store.get(b"c", b"1", 2_000) == b"1"
    store.close()
    reader = SqliteReader(path, "alpha")
    assert reader.last_version == 3
    reader.close()


@pytest.mark.parametrize("others", range(3, 8))
def test_a_files_own_notes_are_read_beside_any_number_of_others(root: DirectoryRoot, others: int) -> None:
    """Ours are read to the last, however many of others come before them: some fit into what is read at first."""
    names = ", ".join(f"('a{number}', {number})" for number in range(others))
    path = tampered(root, f"INSERT INTO meta VALUES {names}, ('used_bytes', 3), ('used_ms', 1000)", rows=3)
    with closing(apsw.Connection(str(path))) as connection:
        stored, job_id = meta.read_meta(connection)
    assert job_id == "alpha"
    known = {name: value for name, value in stored.items() if name[0] != "a" and name != "syncs"}
    assert known == {"last_version": 3, "clean": 1, "used_bytes": 3, "used_ms": 1000}
