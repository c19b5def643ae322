"""`persistency import --from`: what a person types, what is shown, and how it ends."""

from __future__ import annotations

import json
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import diskcache
import lmdb
import pytest
from sqlitedict import SqliteDict

from persistency import CBOR, Persistency, key
from persistency.cli import migrating
from tests.test_cli import COMMAND, ENVIRONMENT
from tests.test_cli_moving import entries, typed
from tests.test_extras import WITHOUT


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache with a record, a text, a pickle that names a class, an item that has ended, and one with a tag."""
    with diskcache.Cache(tmp_path / "cache", cull_limit=0) as made:
        made["record"], made["text"], made["mine"] = {"a": [1]}, "x", complex(1, 2)
        made.set("ended", 1, expire=-1)
        made.set("tagged", 2, tag="red")
    return tmp_path / "cache"


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """A file of sqlitedict with 5,000 numbers."""
    with SqliteDict(str(tmp_path / "numbers.sqlite"), tablename="n", encode=lambda value: value, decode=int) as table:
        table.update({f"k{number:05d}": number for number in range(5_000)})
        table.commit()
    return tmp_path / "numbers.sqlite"


class Ended(NamedTuple):
    """What a command has shown."""

    stdout: str
    stderr: str


Run = Callable[..., Ended]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process, which has to end with an exit code."""

    def run(*words: str | Path, code: int = 0) -> Ended:
        capfd.readouterr()
        typed(*words, code=code)
        return Ended(*capfd.readouterr())

    return run


def there(root: Path, category: str) -> dict[Any, Any]:
    """Return the values of a category of the job `job`, by key."""
    return {found: CBOR.decode(payload) for found, payload, _end in entries(root, "job").get(category, [])}


def test_what_comes_is_stored_and_what_doesn_t_is_exit_code_1(run: Run, cache: Path, tmp_path: Path) -> None:
    """The report has every item: stored, ended, and left, with reason and key; the hint says what would read more."""
    root = tmp_path / "root"
    ended = run("import", "--from", "diskcache", root, "job", cache, "--json", code=1)
    told = json.loads(ended.stdout)
    assert {name: told[name] for name in ("records", "taken", "ended", "kept", "tagged", "lost")} == {
        "records": 5, "taken": 2, "ended": 1, "kept": 0, "tagged": 1, "lost": 2,
    }  # fmt: skip
    assert told["categories"] == {"records": 2}
    [left] = told["left"]
    assert (left["reason"], left["means"], left["count"]) == ("pickled_value", "the value is a pickle", 2)
    assert [example["key"] for example in left["examples"]] == ["'record'", "'mine'"]
    assert ended.stderr.splitlines() == [
        "persistency: 2 of 5 items couldn't come along",
        "  With --unpickle plain those are read that hold plain data; nothing in them is run.",
    ]
    assert there(root, "records") == {key("text"): "x", key("tagged"): 2}
    ended = run("import", root, "job", cache, "--from", "diskcache", "--unpickle", "plain", code=1)
    assert there(root, "records") == {key("text"): "x", key("tagged"): 2, key("record"): {"a": [1]}}
    assert "1\ta pickle can't be read\t\t'mine'\tit names builtins.complex" in ended.stdout.splitlines()
    assert "stored\t3" in ended.stdout.splitlines()
    assert "unpickle trust, which runs whatever it says" in ended.stderr
    assert run("get", root, "job", "record").stdout


def test_everything_that_comes_is_exit_code_0(run: Run, cache: Path, tmp_path: Path) -> None:
    """Items that have ended are nothing that is missing; nor are pickles that are kept because somebody said so."""
    root = tmp_path / "root"
    told = json.loads(
        run("import", root, "job", cache, "--from", "diskcache", "--keep-pickles", "-c", "c", "--json").stdout
    )
    assert told["categories"] == {"c": 2, "c.pickles": 2}
    assert {found.parts[0]: pickle.loads(payload) for found, payload, _ in entries(root, "job")["c.pickles"]} == {
        "record": {"a": [1]}, "mine": complex(1, 2),
    }  # fmt: skip
    told = json.loads(run("import", root, "job", cache, "--from", "diskcache", "--raw", "--json", code=1).stdout)
    assert {left["reason"] for left in told["left"]} == {"no_value", "pickled_value"}


def test_trust_says_what_it_means(run: Run, cache: Path, tmp_path: Path) -> None:
    """Before anything is read it says that whatever the pickles say is run; what they give may have no CBOR."""
    ended = run("import", tmp_path / "root", "job", cache, "--from", "diskcache", "--unpickle", "trust", code=1)
    assert ended.stderr.startswith("persistency: pickles are trusted: what they name is imported, and what they say is")
    assert "no value for it\t\t'mine'\ta value can't hold a builtins.complex" in ended.stdout


def test_a_dry_run_makes_nothing_and_ends_the_same(run: Run, cache: Path, tmp_path: Path) -> None:
    """It shows the same report with the same exit code, makes neither job nor root, and needs no job for itself."""
    root = tmp_path / "root"
    words = ["import", root, "job", cache, "--from", "diskcache", "--json"]
    dry = json.loads(run(*words, "--dry-run", code=1).stdout)
    assert not root.exists()
    real = json.loads(run(*words, code=1).stdout)
    assert {**dry, "seconds": 0, "dry_run": False} == {**real, "seconds": 0}
    shown = run(*words[:-1], "--dry-run", code=1).stdout.splitlines()
    assert "looked at, nothing stored" in shown[0]
    assert "to be stored\t2" in shown
    with Persistency(root) as persistency, persistency.open_job("job"):
        run(*words, "--dry-run", code=1)
        ended = subprocess.run(
            [*COMMAND, *map(str, words)], check=False, capture_output=True, env=ENVIRONMENT, timeout=60
        )
        assert (ended.returncode, ended.stdout) == (3, b"")


def test_nothing_that_came_leaves_no_job(run: Run, tmp_path: Path) -> None:
    """Where nothing could be stored the job that was made for it goes again."""
    with diskcache.Cache(tmp_path / "cache") as made:
        made["mine"] = [1]
    run("import", tmp_path / "root", "job", tmp_path / "cache", "--from", "diskcache", code=1)
    assert not (tmp_path / "root").exists()


def test_tables_and_encodings_are_said(run: Run, tmp_path: Path) -> None:
    """Tables become categories, or one that is named; what values and keys are can be said."""
    file, root = tmp_path / "store.sqlite", tmp_path / "root"
    for name in ("a", "b"):
        with SqliteDict(str(file), tablename=name, encode=json.dumps, decode=json.loads) as table:
            table["k"] = {"in": name}
            table.commit()
    run("import", root, "job", file, "--from", "sqlitedict")
    assert (there(root, "a"), there(root, "b")) == ({key("k"): {"in": "a"}}, {key("k"): {"in": "b"}})
    run("import", root, "job", file, "--from", "sqlitedict", "--table", "a", "-c", "c", "--encoded", "plain")
    assert there(root, "c") == {key("k"): '{"in": "a"}'}
    words = ["import", root, "job", file, "--from", "sqlitedict"]
    assert "They are 'a', 'b'" in run(*words, "-c", "c", code=2).stderr
    assert "It has: 'a', 'b'" in run(*words, "--table", "x", code=2).stderr


def test_an_environment_of_lmdb_comes(run: Run, tmp_path: Path) -> None:
    """Its databases become categories, its keys what was said."""
    with lmdb.open(str(tmp_path / "env"), max_dbs=2) as env, env.begin(write=True) as tx:
        tx.put(b"ada", b"7", db=env.open_db(b"users", txn=tx))
    root = tmp_path / "root"
    run("import", root, "job", tmp_path / "env", "--from", "lmdb", "--keys", "text", "--raw")
    assert entries(root, "job") == {"users": [(key("ada"), b"7", None)]}


def test_a_missing_lmdb_is_told(run: Run, tmp_path: Path) -> None:
    """The extra that has it is named, in a line and without a traceback."""
    program = WITHOUT.format(missing={"lmdb"}) + "from persistency.cli import main\nsys.exit(main())"
    command = [sys.executable, "-c", program, "import", tmp_path / "root", "job", tmp_path, "--from", "lmdb"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert (ended.returncode, ended.stderr.splitlines()) == (
        1, ["persistency: --from lmdb needs the extra 'lmdb'", "  pip install 'persistency[lmdb]'"],
    )  # fmt: skip


@pytest.mark.parametrize(
    "words",
    [
        ["--from", "redis"],
        ["--from", "diskcache", "--keys", "text"],
        ["--from", "diskcache", "--encoded", "pickle"],
        ["--from", "sqlitedict", "--keys", "raw"],
        ["--from", "lmdb", "--unpickle", "plain"],
        ["--from", "lmdb", "--encoded", "json"],
        ["--from", "lmdb", "--keep-pickles"],
        ["--from", "diskcache", "--unpickle", "yes"],
        ["--from", "diskcache", "--key", "a"],
        ["--from", "diskcache", "--format", "csv"],
        ["--unpickle", "plain"],
        ["--table", "a"],
        ["--dry-run"],
        ["--raw"],
        ["--keep-pickles"],
    ],
    ids=" ".join,
)
def test_what_doesn_t_go_together_is_exit_code_2(run: Run, words: list[str], cache: Path, tmp_path: Path) -> None:
    """It is refused before anything is opened."""
    typed("import", tmp_path / "root", "job", cache, *words, code=2)
    assert not (tmp_path / "root").exists()


def test_what_isn_t_there_is_exit_code_1(run: Run, tmp_path: Path) -> None:
    """A path of nothing, or of something else, makes no job."""
    (tmp_path / "text").write_text("text")
    for kind in ("diskcache", "sqlitedict", "lmdb"):
        for path in (tmp_path / "missing", tmp_path / "text"):
            typed("import", tmp_path / "root", "job", path, "--from", kind, code=1)
    typed("import", tmp_path / "root", "job", "-", "--from", "diskcache", code=2)
    assert not (tmp_path / "root").exists()


# Ctrl-C, or `kill`, once so many items were looked at.
STOPPED = """
import os, signal, sys
from contextlib import contextmanager
from persistency.cli import main, migrating

@contextmanager
def working(title, unit):
    def advance(done, total):
        assert total == 5_000
        if done == 2_048:
            os.kill(os.getpid(), signal.{signal})
    yield advance

migrating.working = working
sys.exit(main())
"""


@pytest.mark.parametrize(("signal", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_it_stops_between_two_batches_and_says_how_far_it_came(
    run: Run, signal: str, code: int, numbers: Path, tmp_path: Path
) -> None:
    """What it says is stored; with --atomic, or when it only looks, nothing is. Doing it again completes it."""
    words = ["import", tmp_path / "root", "job", numbers, "--from", "sqlitedict"]

    def stopped(*more: str) -> str:
        command = [sys.executable, "-c", STOPPED.format(signal=signal), *words, *more]
        ended = subprocess.run(command, check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
        assert (ended.returncode, ended.stdout) == (code, ""), ended.stderr
        return ended.stderr

    for more in (["--atomic"], ["--dry-run"]) if signal == "SIGINT" else ():
        assert stopped(*more) == "persistency: interrupted: nothing was stored\n"
        assert not (tmp_path / "root").exists()
    assert stopped() == (
        "persistency: interrupted: 2,048 items were looked at, and those that can come along are stored\n"
    )
    assert there(tmp_path / "root", "n") == {key(f"k{at:05d}"): at for at in range(2_048)}
    run(*words)
    assert there(tmp_path / "root", "n") == {key(f"k{at:05d}"): at for at in range(5_000)}


def test_what_is_passed_over_or_guessed_is_told(run: Run, tmp_path: Path) -> None:
    """Tables of something else, one whose name isn't UTF-8 among them, and what text was taken for."""
    file = tmp_path / "store.sqlite"
    with SqliteDict(str(file), tablename="a", encode=json.dumps, decode=json.loads) as table:
        table["k"] = [1]
        table.commit()
    for name in ("other", "xyyx"):
        with closing(sqlite3.connect(file)) as db, db:
            db.execute(f"CREATE TABLE {name} (id)")
    file.write_bytes(file.read_bytes().replace(b"xyyx", b"x\xff\xfex"))
    words = ["import", tmp_path / "root", "job", file, "--from", "sqlitedict"]
    told = json.loads(run(*words, "--json").stdout)
    assert told["guessed"] == {"a": "text was taken for JSON"}
    assert told["passed_over"]["other"] == "its columns are id, and not key and value"
    assert set(told["passed_over"].values()) == {told["passed_over"]["other"], "its name can't be asked for"}
    lines = run(*words).stdout.splitlines()
    assert "other\tpassed over: its columns are id, and not key and value" in lines
    assert "a\tguessed: text was taken for JSON" in lines


def test_an_origin_that_goes_in_the_middle_is_told_with_how_far_it_came(
    run: Run, numbers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the system says it as any other does."""

    @contextmanager
    def working(_title: str, _unit: str) -> Iterator[Any]:
        yield lambda _done, _total: numbers.unlink(missing_ok=True)

    monkeypatch.setattr(migrating, "working", working)
    words = ["import", tmp_path / "root", "job", numbers, "--from", "sqlitedict"]
    ended = run(*words, code=1)
    stored = len(there(tmp_path / "root", "n"))
    assert 0 < stored < 5_000
    assert ended.stderr.splitlines() == [
        f"persistency: {numbers}: No such file or directory",
        f"  {stored:,} items were dealt with before; what of them can come along is stored.",
    ]
    assert "were dealt with" not in run(*words, code=1).stderr


def test_with_atomic_all_come_or_none(run: Run, cache: Path, tmp_path: Path) -> None:
    """Where something can't come along nothing is stored, and it says so."""
    words = ["import", tmp_path / "root", "job", cache, "--from", "diskcache", "--atomic"]
    ended = run(*words, code=1)
    assert "Nothing was stored." in ended.stderr
    assert "not stored, for all come or none\t2" in ended.stdout
    assert not (tmp_path / "root").exists()
    run(*words, "--keep-pickles")
    assert len(there(tmp_path / "root", "records")) == 2


def test_a_full_disk_is_told_with_how_far_it_came(run: Run, numbers: Path, tmp_path: Path) -> None:
    """Whole batches from the first on are stored, and the message names where the one that failed begins."""
    program = (
        "import resource, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from persistency.cli import main\nsys.exit(main())"
    )
    command = [sys.executable, "-c", program, "import", tmp_path / "root", "job", numbers, "--from", "sqlitedict"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    stored = len(there(tmp_path / "root", "n"))
    assert f"{stored:,} items were dealt with before; what of them can come along is stored." in ended.stderr
    assert f"The batch that failed begins with 'k{stored:05d}' in 'n'" in ended.stderr
    assert 0 < stored < 5_000
