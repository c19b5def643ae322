"""The commands that write and keep house, each in a process of its own, and what they ask before they delete."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import select
import signal
import subprocess
from pathlib import Path

import pytest

from persistency import ChangeFeed, Persistency, RawKey, StorageError, key
from persistency.cli.app import app
from persistency.cli.arguments import as_ttl
from persistency.cli.owners import Owners
from persistency.cli.show import as_size, as_time
from persistency.codec.values import decode, encode
from tests.test_cli import COMMAND, ENVIRONMENT, lines, run

SECOND_MS = 1_000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with the job `users`."""
    with Persistency(tmp_path / "root") as p, p.open_job("users") as job:
        for number in range(10):
            job.put("records", ("users", number), encode({"number": number}))
        job.put("records", ("empty",), b"")
        job.put("other", (), b"x")
    return tmp_path / "root"


def typed(*words: str | Path) -> None:
    """Run a command in this process; it must end well."""
    with pytest.raises(SystemExit) as ended:
        app([*map(str, words)], prog_name="persistency")
    assert ended.value.code == 0


def answered(answer: str | None, *words: str | Path) -> tuple[int, str]:
    """Run a command on a terminal on which a person answers, or (`None`) types Ctrl-C; return its code and output."""
    master, slave = pty.openpty()
    command = [*COMMAND, *map(str, words)]
    environment = ENVIRONMENT | {"TERM": "dumb", "COLUMNS": "100"}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as asking:
        os.close(slave)
        shown = io.BytesIO()
        # Linux says so with an error when the last one that had the terminal open has gone.
        with contextlib.suppress(OSError):
            while data := _read_of(master, asking, shown, answer):
                shown.write(data)
                if b"[y/N]" in shown.getvalue() and answer is not None:
                    os.write(master, answer.encode())
                    answer = ""
        os.close(master)
    assert b"Traceback" not in shown.getvalue()
    return asking.returncode, shown.getvalue().decode()


def _read_of(master: int, asking: subprocess.Popen[bytes], shown: io.BytesIO, answer: str | None) -> bytes:
    """Return what is shown next; who is asked and has no answer types Ctrl-C until something happens.

    Once may not be enough: Python can miss a signal that comes just before it begins to wait for a line.
    """
    while not select.select([master], [], [], 0.5)[0]:
        if answer is None and b"[y/N]" in shown.getvalue():
            asking.send_signal(signal.SIGINT)  # it isn't the terminal's own session, so that does it
    return os.read(master, 65_536)


# -- put, rm -----------------------------------------------------------------------------------------------------


def test_put_stores_json_as_cbor(tmp_path: Path) -> None:
    """A value is stored as CBOR in a job that is made for it, and `get` shows what was typed."""
    ended = run("put", tmp_path / "new", "users", "users/ada/7", '{"name": "Ada", "n": [1, 2.5, null]}')
    assert (
        ended.stdout
        == f"users/ada/7 is stored in 'records' of the new job 'users' in {tmp_path / 'new'}, as version 1\n"
    )
    assert "of job 'users', as version 2" in run("put", tmp_path / "new", "users", "users/ada/8", "1").stdout
    [shown] = lines(run("put", tmp_path / "new", "users", "when", '{"date": "2024-05-06"}', "-c", "days", "--json"))
    assert shown == {"job": "users", "category": "days", "key": ["when"], "version": 3}
    with Persistency(tmp_path / "new") as p, p.open_job("users") as job:
        stored = job.get("records", ("users", "ada", 7)).result()
        assert decode(stored or b"") == {"name": "Ada", "n": [1, 2.5, None]}
        assert str(decode(job.get("days", ("when",)).result() or b"")) == "2024-05-06"


def test_put_stores_bytes_as_they_are(root: Path, tmp_path: Path) -> None:
    """--raw, --file and stdin store what they are given, the empty text and any bytes included."""
    file = tmp_path / "file.bin"
    file.write_bytes(bytes(range(256)))
    typed("put", root, "users", "raw", "--raw", "")
    typed("put", root, "users", "file", "--file", file)
    for words, into in ((["bytes", "--file", "-"], b"\xff\0"), (["json", "-"], b'{"from": "stdin"}')):
        command = [*COMMAND, "put", root, "users", *words]
        subprocess.run(command, input=into, check=True, env=ENVIRONMENT, capture_output=True, timeout=60)
    with Persistency(root) as p, p.open_job("users") as job:
        assert job.get("records", ("raw",)).result() == b""
        assert job.get("records", ("file",)).result() == bytes(range(256))
        assert job.get("records", ("bytes",)).result() == b"\xff\0"
        assert job.get("records", ("json",)).result() == encode({"from": "stdin"})


def test_put_with_an_end(root: Path) -> None:
    """A row gets the end that was typed, counted from the call."""
    typed("put", root, "users", "session", "1", "--ttl", "2h")
    with Persistency(root) as p, p.open_job("users") as job:
        entry = job.entry("records", ("session",)).result()
        assert entry is not None
        assert entry.expires_ms is not None
        assert 0 < job.now_ms + 7_200 * SECOND_MS - entry.expires_ms < 60 * SECOND_MS
    assert [as_ttl(text) for text in ("90", "1.5s", "500ms", "15m", "2h", "7d")] == [90, 1.5, 0.5, 900, 7_200, 604_800]


def test_a_job_that_keeps_its_changes_has_no_gap_from_a_command(tmp_path: Path) -> None:
    """What a command writes is a change like any other: the service's feed goes on behind it."""
    with Persistency(tmp_path) as p:
        with p.open_job("fed", feed_changes_max=10) as job:
            job.put("records", (1,), b"x")
        typed("put", tmp_path, "fed", "2", "2")
        typed("rm", tmp_path, "fed", "1")
        with p.open_job("fed", feed_changes_max=10) as job:
            changes = ChangeFeed(job, after=0)
            assert [(change.kind, change.key.parts) for change in (next(changes), next(changes), next(changes))] == [
                ("put", (1,)),
                ("put", (2,)),
                ("delete", (1,)),
            ]


def test_rm_deletes_one_row(root: Path) -> None:
    """One row goes without a question; one that isn't there is exit code 1."""
    assert run("rm", root, "users", "users/3").stdout == "1 row deleted\n"
    ended = run("rm", root, "users", "users/3", code=1)
    assert "no key('users', 3) in 'records' of job 'users'" in ended.stderr
    with Persistency(root) as p, p.open_job("users") as job:
        assert job.count("records").result() == 10


def test_rm_deletes_exactly_what_was_meant(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A range, a prefix and a whole category are deleted to the row, and it says how many they were."""
    with Persistency(root) as p, p.open_job("users") as job:
        job.put("records", ("users2",), b"")
        job.put("other", RawKey(b"\xff\xff"), b"")
    typed("rm", root, "users", "--start", "users/2", "--stop", "users/4", "--yes", "--json")
    typed("rm", root, "users", "--prefix", "users", "--yes", "--json")
    typed("rm", root, "users", "--all", "-c", "other", "--yes", "--json")
    typed("rm", root, "users", "--all", "-c", "other", "--json")  # nothing is there, so nothing is asked
    rows = [json.loads(line)["rows"] for line in capsys.readouterr().out.splitlines()]
    assert rows == [2, 8, 2, 0]
    with Persistency(root) as p, p.open_job("users") as job:
        assert [row.key for row in job.scan("records").result()] == [key("empty"), key("users2")]


# -- asking ------------------------------------------------------------------------------------------------------


def test_what_deletes_wants_yes_where_nobody_can_be_asked(root: Path, tmp_path: Path) -> None:
    """Without a terminal and without --yes nothing is done, and the exit code is 2."""
    typed("backup", root, "users", tmp_path / "b")
    before = run("export", root, "users", "-").stdout
    for words in (
        ["rm", root, "users", "--prefix", "users"],
        ["restore", root, "users", tmp_path / "b"],
        ["drop", root, "users"],
        ["purge", root, "1"],
    ):
        ended = run(*words, code=2)
        assert "--yes" in ended.stderr
        assert ended.stdout == ""
    assert run("export", root, "users", "-").stdout == before


def test_a_person_is_asked(root: Path) -> None:
    """On a terminal the question says what would be deleted; no and Ctrl-C do nothing, yes does it."""
    code, shown = answered("n\n", "rm", root, "users", "--prefix", "users")
    assert code == 1
    assert "Delete 10 rows of 'records' in job 'users'?" in shown
    assert "nothing was done" in shown
    code, shown = answered(None, "drop", root, "users")
    assert code == 130
    assert "Delete job 'users' (" in shown
    assert "interrupted: nothing was done" in shown
    assert run("count", root, "users").stdout == "11\n"
    code, shown = answered("y\n", "drop", root, "users")
    assert code == 0
    assert "job 'users' is deleted" in shown
    assert run("ls", root).stdout == ""


# -- looking -----------------------------------------------------------------------------------------------------


def test_ls_lists_jobs(root: Path, tmp_path: Path) -> None:
    """Each job has a line, with its size, last use and end; an empty root is no error, one that isn't there is."""
    with Persistency(root) as p, p.open_job("draft", ttl=3_600):
        pass
    stored = {one.job_id: one for one in Persistency(root).stored_jobs()}
    shown = [line.split("\t") for line in run("ls", root).stdout.splitlines()]
    assert shown == [
        ["draft", str(stored["draft"].bytes), str(stored["draft"].last_used), str(stored["draft"].expires), ""],
        ["users", str(stored["users"].bytes), str(stored["users"].last_used), "", ""],
    ]
    code, table = answered("", "ls", root)
    assert code == 0
    assert "2 jobs" in table
    assert "draft" in table
    (tmp_path / "empty").mkdir()
    assert "no jobs in" in run("ls", tmp_path / "empty").stderr
    assert "no directory" in run("ls", tmp_path / "none", code=1).stderr
    assert not (tmp_path / "none").exists()


def test_stat_shows_what_there_is_to_know(root: Path) -> None:
    """Rows by category, versions, payload bytes, the format and the changes that are kept, as they are."""
    [found] = lines(run("stat", root, "users", "--json"))
    assert found["categories"] == [{"category": "other", "rows": 1}, {"category": "records", "rows": 11}]
    with Persistency(root) as p, p.open_job("users", feed_changes_max=2) as job:
        assert (found["version"], found["payload_bytes"]) == (12, job.storage_used().result())
        for number in range(5):
            job.put("records", (number,), b"")
    assert (found["format"], found["changes"], found["owner"]) == (2, None, None)
    [found] = lines(run("stat", root, "users", "--json"))
    assert (found["version"], found["changes"]) == (17, {"after": 15})
    shown = run("stat", root, "users").stdout
    assert "rows in records\t16\n" in shown
    assert "changes kept\tthose after version 15\n" in shown


def test_count_counts(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A category, a prefix and a range are counted; nothing is no error, and says why."""
    typed("count", root, "users")
    typed("count", root, "users", "--prefix", "users", "--json")
    typed("count", root, "users", "--start", "users/8")
    typed("count", root, "users", "--category", "none")
    told = capsys.readouterr()
    assert told.out.splitlines() == ["11", '{"rows": 10}', "2", "0"]
    assert "the job has: other, records" in told.err


def test_numbers_and_times_for_people() -> None:
    """Sizes have three digits and a unit, and no time is too far away to be shown."""
    sizes = [0, 999, 1_000, 999_949, 999_950, 10**9, 5 * 10**15]
    assert [as_size(size) for size in sizes] == ["0 B", "999 B", "1.0 kB", "999.9 kB", "1.0 MB", "1.0 GB", "5000.0 TB"]
    assert as_time(None, "?") == "?"
    assert as_time(1e18) == "1000000000000000000 s"


# -- keeping house -----------------------------------------------------------------------------------------------


def test_a_backup_is_restored(root: Path, tmp_path: Path) -> None:
    """A backup is a copy at one moment, and comes back under its own id or another one."""
    [told] = lines(run("backup", root, "users", tmp_path / "b", "--json"))
    assert told == {"job": "users", "file": str(tmp_path / "b"), "bytes": (tmp_path / "b").stat().st_size}
    typed("rm", root, "users", "users/3")
    [told] = lines(run("restore", root, "users", tmp_path / "b", "--yes", "--json"))
    assert told["replaced"] is True
    assert "is made of" in run("restore", root, "copy", tmp_path / "b").stdout
    assert [run("count", root, job).stdout for job in ("users", "copy")] == ["11\n", "11\n"]
    (tmp_path / "damaged").write_bytes(b"no backup")
    assert "persistency: " in run("restore", root, "users", tmp_path / "damaged", "--yes", code=1).stderr
    assert "isn't there" in run("restore", tmp_path / "new", "users", tmp_path / "none", code=1).stderr
    assert not (tmp_path / "new").exists()
    assert run("count", root, "users").stdout == "11\n"


def test_check_finds_damage(root: Path) -> None:
    """A sound job is told to be, and a key that doesn't decode is found, with exit code 1."""
    assert run("check", root, "users").stdout == "users\tsound\n"
    with Persistency(root) as p, p.open_job("odd") as job:
        job.put("records", RawKey(b"\xff"), b"")
    ended = run("check", root, "--json", code=1)
    problems = {line["job"]: line["problems"] for line in lines(ended)}
    assert problems["users"] == []
    assert "1 keys are no encoded tuples" in problems["odd"][0]
    assert "1 problem found" in ended.stderr


def test_check_looks_into_a_job_that_is_open_elsewhere(root: Path) -> None:
    """A job that somebody is writing to is checked like any other."""
    with Persistency(root) as p, p.open_job("held") as job:
        job.put("records", RawKey(b"\xff"), b"")
        job.flush().result()
        ended = run("check", root, code=1)
    assert "users\tsound\n" in ended.stdout
    assert "1 problem found" in ended.stderr


def test_check_goes_on_behind_a_job_that_cannot_be_opened(root: Path) -> None:
    """What is wrong with such a job is told with its id, and those behind it are looked at too."""
    (root / "a.db").touch()
    (root / "b.db").write_bytes(b"hello\n")
    ended = run("check", root, "--json", code=1)
    problems = {line["job"]: line["problems"] for line in lines(ended)}
    assert problems["a"] == ["the file of job 'a' is empty: it holds no job yet"]
    assert "file is not a database" in problems["b"][0]
    assert problems["users"] == []
    assert "2 problems found" in ended.stderr
    assert "no job 'none'" in run("check", root, "users", "none", code=1).stderr
    assert "the file of job 'a' is empty" in run("get", root, "a", "k", code=1).stderr


def test_only_a_former_backup_is_replaced_without_a_question(root: Path, tmp_path: Path) -> None:
    """What was backed up before is replaced; any other file, and a job's own, stays, unless --yes says so."""
    typed("backup", root, "users", tmp_path / "users.db")
    typed("backup", root, "users", tmp_path / "users.db")
    (tmp_path / "mine").write_text("a text of mine\n")
    (tmp_path / "other").mkdir()
    run("restore", tmp_path / "other", "job", tmp_path / "users.db")
    for file in (tmp_path / "mine", tmp_path / "other" / "job.db"):
        before = file.read_bytes()
        run("backup", root, "users", file, code=2)
        assert file.read_bytes() == before
    code, shown = answered("n\n", "backup", root, "users", tmp_path / "mine")
    assert code == 1
    assert "which is no former backup?" in " ".join(shown.split())
    assert (tmp_path / "mine").read_text() == "a text of mine\n"
    typed("backup", root, "users", tmp_path / "mine", "--yes")
    run("restore", root, "copy", tmp_path / "mine")


def test_a_place_where_no_backup_can_be_is_named(root: Path, tmp_path: Path) -> None:
    """A directory, and a path in a directory that isn't there, are told as what they are."""
    assert f"{str(tmp_path)!r} is a directory" in run("backup", root, "users", tmp_path, code=1).stderr
    told = run("backup", root, "users", tmp_path / "none" / "b", code=1).stderr
    assert told == f"persistency: there is no directory {str(tmp_path / 'none')!r}\n  Make it first.\n"


def test_a_purge_of_nothing_there_is_an_error(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A root that isn't there, and a job that can't be deleted, are exit code 1."""
    assert "no directory" in run("purge", root / "none", "1MB", "--yes", code=1).stderr

    def refuse(*_: object, **_more: object) -> None:
        raise StorageError("the directory may not be written")

    monkeypatch.setattr("persistency.storage.directory.DirectoryRoot.drop", refuse, raising=True)
    with pytest.raises(SystemExit) as ended:
        app(["purge", str(root), "1", "--yes"], prog_name="persistency")
    assert ended.value.code == 1
    assert (root / "users.db").exists()


def test_kill_leaves_no_draft_of_a_backup(tmp_path: Path) -> None:
    """SIGTERM in the middle of a backup ends it in order, with a word, and nothing is left beside its name."""
    with Persistency(tmp_path / "root") as p, p.open_job("big") as job:
        for number in range(400):
            job.put("records", (number,), bytes(250_000))
    (tmp_path / "to").mkdir()
    command = [*COMMAND, "backup", str(tmp_path / "root"), "big", str(tmp_path / "to" / "b")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as backing:
        while backing.poll() is None and not list((tmp_path / "to").iterdir()):
            pass  # until its draft is there
        backing.send_signal(signal.SIGTERM)
        _, told = backing.communicate(timeout=60)
    if backing.returncode == 128 + signal.SIGTERM:  # else it was through by then
        assert told.startswith(b"persistency: interrupted")
    assert [path.name for path in (tmp_path / "to").iterdir() if path.name != "b"] == []


def test_compact_gives_room_back(root: Path) -> None:
    """The bytes that it says are given back are those that the file has lost."""
    with Persistency(root) as p, p.open_job("users") as job:
        for number in range(500):
            job.put("pages", (number,), bytes(1_000))
        job.delete_prefix("pages", (1,))
        job.flush().result()
        path = job.path
    assert path is not None
    run("rm", root, "users", "--all", "-c", "pages", "--yes")
    before = path.stat().st_size
    [told] = lines(run("compact", root, "users", "--json"))
    assert told == {"job": "users", "bytes": before - path.stat().st_size}
    assert told["bytes"] > 400_000
    assert "no room to give back" in run("compact", root, "users").stdout


def test_drop_deletes_jobs(root: Path) -> None:
    """All that are named go, or, if one of them isn't there, none."""
    with Persistency(root) as p, p.open_job("other"):
        pass
    assert "no job 'none'" in run("drop", root, "users", "none", "--yes", code=1).stderr
    assert len(run("ls", root).stdout.splitlines()) == 2
    told = lines(run("drop", root, "users", "other", "users", "--yes", "--json"))
    assert [one["job"] for one in told] == ["users", "other"]
    assert list(root.iterdir()) == []


def test_purge_makes_room(tmp_path: Path) -> None:
    """Those used the longest ago go until the others fit; those whose time is over go with --expired."""
    now = [1_000_000.0]
    with Persistency(tmp_path, clock=lambda: now[0]) as p:
        for name in ("old", "middle", "new"):
            now[0] += 60
            with p.open_job(name) as job:
                job.put("page", (1,), bytes(100_000))
        with p.open_job("draft", ttl=60):
            pass
        sizes = {stored.job_id: stored.bytes for stored in p.stored_jobs()}
    assert "has ended" in run("scan", tmp_path, "draft", code=1).stderr
    [gone] = lines(run("purge", tmp_path, "--expired", "--yes", "--json"))
    assert gone["job"] == "draft"
    ended = run("purge", tmp_path, str(sizes["middle"] + sizes["new"]), "--yes")
    assert ended.stdout == f"job 'old' is deleted, {as_size(sizes['old'])}\n"
    assert "nothing is to be deleted" in run("purge", tmp_path, "2GiB", "--yes").stderr
    assert sorted(stored.job_id for stored in Persistency(tmp_path).stored_jobs()) == ["middle", "new"]


def test_a_process_that_has_ended_owns_nothing(root: Path) -> None:
    """What a lock file says is believed only of a process that has the file open."""
    [stored] = Persistency(root).stored_jobs()
    lock = stored.path.with_suffix(".lock")
    assert Owners().of(stored) is None
    with Persistency(root) as p, p.open_job("users"):
        assert Owners().of(stored) == os.getpid()
    for text in (b"", b"%d\n" % os.getpid(), b"99999999999999999999\n", b"4194304\n", b"what\n", b"0\n"):
        lock.write_bytes(text)
        assert Owners().of(stored) is None
    lock.unlink()
    assert Owners().of(stored) is None


def test_long_work_shows_its_progress_on_a_terminal(root: Path, tmp_path: Path) -> None:
    """A terminal sees how far it is, and for how long; whatever is no terminal sees none of it."""
    for words in (["check", root], ["compact", root, "users"], ["backup", root, "users", tmp_path / "b"],
                  ["export", root, "users", tmp_path / "rows.jsonl"]):  # fmt: skip
        code, shown = answered("", *words)
        assert code == 0, shown
        assert "0:00:0" in shown
        assert run(*words).stderr == ""


def test_a_key_that_begins_with_a_minus(root: Path) -> None:
    """What stands behind -- is no option."""
    run("put", root, "users", "--", "-7", "-1.5")
    assert run("get", root, "users", "--", "-7").stdout == "-1.5\n"


# -- completion --------------------------------------------------------------------------------------------------


def completed(*words: str | Path) -> list[str]:
    """Return what a shell is offered for the last of the words."""
    environment = ENVIRONMENT | {
        "_PERSISTENCY_COMPLETE": "complete_bash",
        "COMP_WORDS": " ".join(["persistency", *map(str, words)]),
        "COMP_CWORD": str(len(words)),
    }
    ended = subprocess.run(COMMAND, check=False, capture_output=True, text=True, env=environment, timeout=60)
    assert ended.stderr == ""
    return ended.stdout.split()


def test_a_shell_is_offered_jobs_and_categories(root: Path, tmp_path: Path) -> None:
    """Commands, job ids and the categories of the job are completed; where nothing can be known nothing is offered."""
    assert completed("co") == ["count", "copy", "compact"]
    assert completed("scan", root, "u") == ["users"]
    assert completed("scan", root, "users", "-c", "o") == ["other"]
    assert completed("scan", tmp_path / "none", "users", "-c", "o") == []
    assert not (tmp_path / "none").exists()
