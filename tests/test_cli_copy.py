"""Jobs copied from root to root by the command line: between directories and databases, in every direction."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import pytest

from persistency import Entry, Job, Key, Persistency, RawKey
from persistency.cli import comparing, duplicating
from persistency.cli.duplicating import MARK
from persistency.cli.ending import Fault
from persistency.cli.ordering import order_of
from tests.postgres import fresh_url, until
from tests.test_cli import COMMAND, ENVIRONMENT, run
from tests.test_cli_moving import FAR_MS, digest_of_rows, everything, typed

SECONDS = 60
KINDS = ("directory", "postgresql")
WAYS = [(one, other) for one in KINDS for other in KINDS]


@pytest.fixture
def made(tmp_path: Path) -> Callable[[str], str]:
    """Give what makes a root of a kind, new and empty."""

    def make(kind: str) -> str:
        return fresh_url() if kind == "postgresql" else str(tmp_path / os.urandom(4).hex())

    return make


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-to-{way[1]}")
def way(request: pytest.FixtureRequest, made: Callable[[str], str]) -> tuple[str, str]:
    """Give two roots, of every two kinds."""
    one, other = request.param
    return made(one), made(other)


class Says(Protocol):
    """Runs a command in this process, which must end with this code, and returns what it says: `out` and `err`."""

    def __call__(self, *words: str | Path, code: int = 0) -> Any: ...


@pytest.fixture
def says(capfd: pytest.CaptureFixture[str]) -> Says:
    """Give what runs a command where no other process is needed."""

    def say(*words: str | Path, code: int = 0) -> Any:
        capfd.readouterr()
        typed(*words, code=code)
        return capfd.readouterr()

    return say


@contextlib.contextmanager
def opened(root: str, job_id: str = "from", **options: Any) -> Iterator[Job]:
    """Give a job, open."""
    with Persistency(root) as p, p.open_job(job_id, **options) as job:
        yield job


def rows_of(root: str, job_id: str = "from") -> dict[str, list[tuple[Key, bytes, int | None]]]:
    """Return every row of a job by category, in the order in which they were written."""
    with opened(root, job_id) as job:
        entries = {category: job.snapshot(category).result() for category in job.categories().result()}
    return {name: [(row.key, row.payload, row.expires_ms) for row in rows] for name, rows in entries.items()}


def ids(root: str) -> list[str]:
    """Return the jobs of a root."""
    with Persistency(root) as p:
        return [stored.job_id for stored in p.stored_jobs()]


def few(root: str, *, job_id: str = "from", count: int = 300) -> None:
    """Make a job of few rows, written in an order that isn't that of their keys."""
    with opened(root, job_id) as job:
        for number in range(count):
            job.put(f"c{number % 2}", (number * 7 % count,), b"%d" % number)


# -- there and back ----------------------------------------------------------------------------------------------


def test_a_copy_has_every_row_in_the_same_order(way: tuple[str, str], says: Says) -> None:
    """Keys, payloads and ends of every kind are the same to the byte and the millisecond, and so is the order."""
    one, other = way
    with opened(one) as job:
        everything(job)
        for number in (5, 3, 4):
            job.put("keys", (number,), b"again")
        job.touch("keys", (3,), timedelta(hours=1)).result()
        expected = sum(job.count(name).result() for name in job.categories().result())
        before = {name: job.snapshot(name).result() for name in job.categories().result()}
    told = json.loads(says("copy", one, "from", other, "--json").out)
    assert told["rows"] == expected
    assert told["categories"] == {name: len(rows) for name, rows in before.items()}
    assert len(told["sha256"]) == 64
    assert rows_of(other) == rows_of(one)
    in_order = sorted((row.version, name, row.key) for name, rows in before.items() for row in rows)
    with opened(other) as job:
        copies = [
            (row.version, name, row.key) for name in job.categories().result() for row in job.snapshot(name).result()
        ]
    assert [place[1:] for place in sorted(copies)] == [place[1:] for place in in_order]
    back = json.loads(says("copy", other, "from", one, "--as", "back", "--json").out)
    assert {**back, "job": "", "seconds": 0} == {**told, "job": "", "seconds": 0}
    assert rows_of(one, "back") == rows_of(one)


def test_a_temporary_job_ends_when_it_did(way: tuple[str, str]) -> None:
    """The job's own end is a moment too."""
    one, other = way
    with opened(one, ttl=3_600) as job:
        job.put("c", (1,), b"1")
    typed("copy", one, "from", other)
    with Persistency(one) as p, Persistency(other) as q:
        (was,), (is_,) = p.stored_jobs(), q.stored_jobs()
    assert was.expires is not None
    assert is_.expires is not None
    assert abs(was.expires - is_.expires) < 0.01


def test_an_export_of_one_is_an_import_of_the_other(way: tuple[str, str], tmp_path: Path) -> None:
    """Files of rows know nothing of where a job is."""
    one, other = way
    with opened(one) as job:
        everything(job)
        count = job.export(tmp_path / "rows.cbor").result()
    with opened(other) as job:
        assert job.import_(tmp_path / "rows.cbor").result() == count
        job.export(tmp_path / "again.cbor").result()
    assert digest_of_rows(tmp_path / "rows.cbor") == digest_of_rows(tmp_path / "again.cbor")


@pytest.mark.parametrize("count", [0, 1])
def test_a_job_of_hardly_any_rows_is_copied_too(way: tuple[str, str], count: int, says: Says) -> None:
    """None and one are numbers of rows."""
    one, other = way
    few(one, count=count)
    told = json.loads(says("copy", one, "from", other, "--as", "to", "--json").out)
    assert (told["job"], told["rows"]) == ("to", count)
    assert rows_of(other, "to") == rows_of(one)


# -- what is there -----------------------------------------------------------------------------------------------


def test_a_job_that_has_rows_is_left_alone_unless_asked(way: tuple[str, str], says: Says) -> None:
    """The refusal says what is there and what to do; with --replace nothing of it stays."""
    one, other = way
    few(one)
    with opened(other) as job:
        job.put("precious", (1,), b"mine", ttl=60)
    before = rows_of(other)
    refused = says("copy", one, "from", other, code=1).err
    assert "has rows: precious" in refused
    assert "--replace" in refused
    assert rows_of(other) == before
    typed("copy", one, "from", other, "--replace")
    assert rows_of(other) == rows_of(one)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_there_is_told(kind: str, made: Callable[[str], str], says: Says) -> None:
    """A job that isn't there makes none on the other side; a job isn't copied to itself."""
    one, other = made(kind), made(kind)
    few(one)
    told = says("copy", one, "none", other, code=1).err
    assert "no job 'none'" in told
    assert "It has: from." in told
    assert ids(other) == []
    assert "no job 'from'" in says("copy", other, "from", one, "--as", "to", code=1).err
    assert "the same job" in says("copy", one, "from", one, "--as", "from", code=2).err
    assert ids(one) == ["from"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_job_that_is_open_elsewhere_is_refused(kind: str, made: Callable[[str], str]) -> None:
    """Neither side may be in use: exit code 3, and nothing is done."""
    one, other = made(kind), made(kind)
    few(one)
    with opened(one):
        assert "from" in run("copy", one, "from", other, code=3).stderr
    assert ids(other) == []
    with opened(other) as job:
        job.put("precious", (1,), b"mine")
        for more in ([], ["--replace"]):
            run("copy", one, "from", other, *more, code=3)
        assert job.get("precious", (1,)).result() == b"mine"


def test_no_password_is_shown(tmp_path: Path) -> None:
    """What a server's URL says beside its place stays unsaid, whatever goes wrong."""
    few(str(tmp_path / "root"))
    url = "postgresql://ada:secret@127.0.0.1:1/none?connect_timeout=1"
    for words in ((tmp_path / "root", "from", url), (url, "from", tmp_path / "root", "--as", "to")):
        told = run("copy", *words, code=1)
        assert "secret" not in told.stdout + told.stderr
    assert ids(str(tmp_path / "root")) == ["from"]


# -- what goes wrong ---------------------------------------------------------------------------------------------


def spoilt(job: Job, how: str) -> None:
    """Have a copy differ from what was copied, in one way."""
    match how:
        case "payload":
            job.put("c0", (0,), b"other")
        case "end":
            job.touch("c1", (1,), 60).result()
        case "missing":
            job.delete("c1", (1,))
        case "more":
            job.put("c1", ("more",), b"")
        case "category":
            job.put("c2", (1,), b"")
        case "order":
            row = job.get("c0", (0,)).result()
            assert row is not None
            job.put("c0", (0,), row)
    job.flush().result()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("payload", "another payload or end of 0 in category 'c0'"),
        ("end", "another payload or end of 1 in category 'c1'"),
        ("missing", "lacks 1 in category 'c1'"),
        ("more", "300 rows were compared, and job 'from' has 301"),
        ("category", "300 rows were compared, and job 'from' has 301"),
        ("order", "in another place of the order"),
    ],
)
def test_a_copy_that_differs_is_found_and_taken_away(
    how: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every row is compared, and the number of rows: what differs in any way is no copy, and doesn't stay."""
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    few(one)
    send = duplicating._send

    def sent(source: Job, target: Job, *more: Any) -> None:
        send(source, target, *more)
        spoilt(target, how)

    monkeypatch.setattr(duplicating, "_send", sent)
    typed("copy", one, "from", other, code=1)
    assert told in capfd.readouterr().err
    assert not Path(other).exists()
    assert ids(one) == ["from"]


def test_a_comparison_sees_what_only_the_source_has(tmp_path: Path) -> None:
    """Rows that came to the source behind the copying's back are told as well."""
    few(str(tmp_path / "one"))
    with (
        opened(str(tmp_path / "one")) as one,
        opened(str(tmp_path / "other")) as other,
        order_of(one, lambda _rows: None) as order,
    ):
        for category, at, _version in sorted(
            ((name, row.key, row.version) for name in ("c0", "c1") for row in one.snapshot(name).result()),
            key=lambda place: place[2],
        ):
            other.put(category, at, one.get(category, at).result() or b"")
        one.put("c0", ("more",), b"")
        with pytest.raises(Fault, match="300 rows were compared, and job 'from' has 301"):
            comparing.compare(one, other, order, MARK, lambda _rows: None)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_that_was_killed_has_a_mark_and_is_begun_anew(kind: str, tmp_path: Path, says: Says) -> None:
    """Nobody takes it for whole: it is neither copied on nor kept, and the next copy needs no --replace."""
    one, other, third = (str(tmp_path / name) for name in ("one", "other", "third"))
    if kind == "postgresql":
        other = fresh_url(persistency_lease=3)  # which is waited out
    few(one, count=4_000)
    program = (
        "import os, signal; from persistency.cli import duplicating; from persistency.cli.app import app\n"
        "def kill(rows):\n"
        "    if rows > 1_000: os.kill(os.getpid(), signal.SIGKILL)\n"
        "send = duplicating._send\n"
        "duplicating._send = lambda source, target, order, advance: send(source, target, order, kill)\n"
        f"app(['copy', {one!r}, 'from', {other!r}])"
    )
    killed = subprocess.run([sys.executable, "-c", program], check=False, env=ENVIRONMENT, timeout=SECONDS)
    assert killed.returncode == -signal.SIGKILL
    until_free(other)
    with opened(other) as job:
        assert MARK in job.categories().result()
        assert 0 < sum(job.count(name).result() for name in ("c0", "c1")) < 4_000
    assert "broken off" in says("copy", other, "from", third, code=1).err
    assert ids(third) == []
    typed("copy", one, "from", other)
    assert rows_of(other) == rows_of(one)
    assert MARK not in rows_of(other)


def until_free(root: str) -> None:
    """Wait until a killed owner's lease is over."""

    def free() -> bool:
        from persistency import JobLocked

        try:
            with opened(root):
                return True
        except JobLocked:
            return False

    until(free, "the killed process' job is free", seconds=SECONDS)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
@pytest.mark.parametrize("stage", ["_send", "compare", "_make_room"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_copy_leaves_none(
    kind: str, stage: str, number: signal.Signals, made: Callable[[str], str]
) -> None:
    """Ctrl-C and `kill` end it in order, with a word; what was there is as it was, or there is nothing."""
    one, other = made("directory"), made(kind)
    few(one, count=2_000)
    program = (
        "import os, sys; from persistency.cli import duplicating, comparing, main\n"
        f"at = comparing if {stage!r} == 'compare' else duplicating\n"
        f"was = getattr(at, {stage!r})\n"
        "def interrupted(*words, **options):\n"
        f"    os.kill(os.getpid(), {int(number)})\n"
        "    return was(*words, **options)\n"
        f"setattr(at, {stage!r}, interrupted)\n"
        f"sys.argv = ['persistency', 'copy', {one!r}, 'from', {other!r}]\n"
        "main()"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, env=ENVIRONMENT, timeout=SECONDS, capture_output=True, text=True
    )
    assert ended.returncode == (130 if number == signal.SIGINT else 143), ended.stderr
    assert "interrupted: there is no copy of job 'from'" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ids(other) == []
    assert ids(one) == ["from"]


# -- what is shown -----------------------------------------------------------------------------------------------


def test_a_terminal_sees_how_far_it_is(tmp_path: Path) -> None:
    """The stages are shown on stderr, if that is a terminal; a pipe gets a summary alone."""
    few(str(tmp_path / "one"), count=2_000)
    command = [*COMMAND, "copy", tmp_path / "one", "from", tmp_path / "other"]
    ours, theirs = pty.openpty()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, env=ENVIRONMENT) as process:
        os.close(theirs)
        seen = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while piece := os.read(ours, 65_536):
                seen += piece
        os.close(ours)
        assert process.stdout is not None
        shown = process.stdout.read().decode()
    assert process.returncode == 0
    assert all(stage in seen for stage in (b"looking at from", b"copying", b"comparing"))
    assert shown.splitlines()[1] == "rows copied, and the same on both sides\t2,000"


def test_a_row_s_end_does_not_pass_while_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock stands still on both sides: what was a row at the beginning is copied, and found the same."""
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    with opened(one) as job:
        job.put("c", RawKey(b"short"), b"1", ttl=timedelta(seconds=3_600))
        job.put("c", RawKey(b"far"), b"2", ttl=FAR_MS / 1000 - job.now_ms / 1000)
        [row] = [row for row in job.snapshot("c").result() if row.key == b"short"]
    assert row.expires_ms is not None
    monkeypatch.setattr(duplicating, "time", lambda: row.expires_ms / 1000 - 0.001)  # type: ignore[operator]
    typed("copy", one, "from", other)
    with Persistency(other, clock=lambda: 0.0) as p, p.open_job("from") as job:
        found: list[Entry] = job.snapshot("c").result()
    assert (found[0].key, found[0].expires_ms) == (b"short", row.expires_ms)
