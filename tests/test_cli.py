"""The command line, typed as a person types it: each command is a process of its own."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from datetime import UTC, date, datetime
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import persistency
from persistency import Key, Persistency, Put, RawKey, key
from persistency.cli.app import app
from persistency.cli.ending import Fault
from persistency.cli.jsonable import exact_json, loads, payload_from_json, payload_to_json
from persistency.cli.keys import as_texts, format_key, key_from_json, key_to_json, parse_key
from persistency.cli.records import RecordFile
from persistency.codec.values import decode, encode
from tests.forks import COMMAND_LINE, Forks

DATA = os.environ.get("PERSISTENCY_DATA")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(persistency.__file__).parents[1])}
COMMAND = [sys.executable, "-m", "persistency"]
FORKS = Forks(*COMMAND_LINE, environment=ENVIRONMENT)
PACKAGES = [
    {"package": name, "section": section, "size": size}
    for section, name, size in [
        ("games", "chess", 1), ("admin", "adduser", 2), ("games", "2048", 3), ("games-extra", "more", 4),
        ("admin", "sudo", 5), ("games", "a\0b", 6), ("games", "chess", 7), ("admin", "é", 8),
    ]
]  # fmt: skip


def run(*typed: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, which must have this exit code and no traceback."""
    ended = FORKS.run_module("persistency", *map(str, typed), timeout=60)
    assert ended.returncode == code, (ended.stdout, ended.stderr)
    assert "Traceback" not in ended.stderr
    return ended


def lines(ended: subprocess.CompletedProcess[str]) -> list[Any]:
    """Parse what a command printed with --json."""
    return [json.loads(line) for line in ended.stdout.splitlines()]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """Write records as JSON lines, packed if the name says so."""
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with the job `packages`, imported from made data."""
    directory = tmp_path_factory.mktemp("imported")
    file = write_jsonl(directory / "packages.jsonl.gz", PACKAGES)
    run("import", directory / "root", "packages", file, "--key", "section,package")
    return directory / "root"


@pytest.fixture
def root(imported: Path, tmp_path: Path) -> Path:
    """A copy of that root for one test."""
    return Path(shutil.copytree(imported, tmp_path / "root"))


# -- import ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["packages.jsonl", "packages.jsonl.gz", "packed-without-saying-so"])
def test_import_counts_records_and_keys(tmp_path: Path, name: str) -> None:
    """Records that share a key count as read, their key counts once, and the last of them wins."""
    file = write_jsonl(tmp_path / name, PACKAGES)
    if name.startswith("packed"):
        file.write_bytes(gzip.compress(file.read_bytes()))
    ended = run("import", tmp_path / "root", "packages", file, "--key", "section,package", "--json")
    [numbers] = lines(ended)
    assert (numbers["records"], numbers["keys"], numbers["new"]) == (8, 7, 7)
    with Persistency(tmp_path / "root") as p, p.open_job("packages") as job:
        assert job.get("records", ("games", "chess")).result() == encode(PACKAGES[6])
        assert job.count("records").result() == 7


def test_import_again_says_what_is_new(root: Path, tmp_path: Path) -> None:
    """A second import keeps what is there and counts as new only what wasn't."""
    file = write_jsonl(tmp_path / "more.jsonl", [*PACKAGES[:2], {"section": "x", "package": "y"}])
    [numbers] = lines(run("import", root, "packages", file, "--key", "section, package", "--json"))
    assert (numbers["records"], numbers["keys"], numbers["new"]) == (3, 8, 1)
    shown = run("import", root, "packages", file, "--key", "package", "--category", "by-name").stdout
    assert "records read" in shown
    assert "keys stored" in shown
    assert "by-name" in shown


def test_import_skips_empty_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    """Empty lines, a mark at the start, CRLF and a missing last end of line are no records and no errors."""
    file = tmp_path / "odd.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"id": 1}\r\n\n  \n{"id": null}\n{"id": NaN}\n{"id": 1.5}')
    [numbers] = lines(run("import", tmp_path / "root", "odd", file, "--key", "id", "--json"))
    assert (numbers["records"], numbers["keys"]) == (4, 4)
    found = lines(run("scan", tmp_path / "root", "odd", "--keys-only", "--json"))
    assert found == [{"key": [None]}, {"key": [1]}, {"key": [1.5]}, {"key": [{"float": "nan"}]}]


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        ('{"package": "x"}', "line 3: no field 'section'"),
        ('{"package": "x", "section": ["y"]}', "line 3: field 'section' is an array, which can't be a part of a key"),
        ('{"package": {}, "section": "y"}', "line 3: field 'package' is an object, which can't be a part of a key"),
        ('{"package": "x", "section": ', "line 3: not JSON"),
        ("[" * 100_000, "line 3: not JSON"),
        ('["x", "y"]', "line 3: an array, not an object"),
        ('{"package": "\\ud800", "section": "y"}', "line 3: a str in a key can't have lone surrogates"),
        ('{"package": "x", "section": "y", "deep": ' + "[" * 80 + "]" * 80 + "}", "line 3: a value can be nested"),
        ('{"package": "' + "x" * 9_000 + '", "section": "y"}', "line 3: key must have at most"),
    ],
    ids=lambda text: text[:30],
)
def test_import_names_the_line_of_a_bad_record(tmp_path: Path, bad: str, told: str) -> None:
    """A record that is no good ends the import with its line; the records before it are stored."""
    file = tmp_path / "bad.jsonl"
    good = [json.dumps(record) for record in PACKAGES]
    file.write_text("\n".join([*good[:2], bad, *good[2:]]))
    ended = run("import", tmp_path / "root", "packages", file, "--key", "section,package", code=1)
    assert f"bad.jsonl, {told}" in ended.stderr
    assert "The records before it, 2, are stored." in ended.stderr
    with Persistency(tmp_path / "root") as p, p.open_job("packages") as job:
        assert job.count("records").result() == 2


def test_import_of_a_file_that_is_no_good_makes_no_job(tmp_path: Path) -> None:
    """A missing file, a folder, and a first line that is no good leave no job and no root behind."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"other": 1}\n')
    for file, told in [(tmp_path / "none.jsonl", "No such file"), (tmp_path, "Is a directory"), (bad, "no field 'id'")]:
        ended = run("import", tmp_path / "root", "job", file, "--key", "id", code=1)
        assert str(file) in ended.stderr
        assert told in ended.stderr
    assert not (tmp_path / "root").exists()


def test_import_tells_of_a_damaged_gzip_file(tmp_path: Path) -> None:
    """A gzip file that ends too early is an error that says so, wherever it ends."""
    file = write_jsonl(tmp_path / "cut.jsonl.gz", [{"id": os.urandom(20).hex()} for _ in range(100)])
    whole = file.read_bytes()
    for cut in (len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:cut])
        with contextlib.closing(RecordFile(file, ("id",))) as records, pytest.raises(Fault, match="is damaged"):
            list(records)
    assert "the gzip file is damaged" in run("import", tmp_path / "r", "job", file, "--key", "id", code=1).stderr


def test_a_line_has_a_longest_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file without an end of line is refused before it is in memory as a whole."""
    monkeypatch.setattr("persistency.cli.records.LINE_BYTES_MAX", 100)
    file = tmp_path / "long.jsonl"
    file.write_text('{"id": 1}\n{"id": "' + "x" * 200 + '"}\n')
    with contextlib.closing(RecordFile(file, ("id",))) as records:
        found = iter(records)
        assert next(found) == (key(1), encode({"id": 1}))
        with pytest.raises(Fault, match=r"long\.jsonl, line 2: over 100 bytes"):
            next(found)


def test_ctrl_c_stores_what_was_read_and_says_so(tmp_path: Path) -> None:
    """An import that is interrupted ends with 130, says how many records it read, and has stored them."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = subprocess.Popen(
        [*COMMAND, "import", tmp_path / "root", "job", pipe, "--key", "id"], stderr=subprocess.PIPE, env=ENVIRONMENT
    )
    with command as importing, open(pipe, "wb", buffering=0) as into:
        # A pipe holds 64 KiB: once a megabyte has gone in, most of it was read, and the rest is being waited for.
        into.writelines(b'{"id": %d, "text": "%090d"}\n' % (number, number) for number in range(10_000))
        importing.send_signal(signal.SIGINT)
        _, told = importing.communicate(timeout=60)
    assert importing.returncode == 130, told
    assert b"Traceback" not in told
    words = told.decode().split()
    assert words[:2] == ["persistency:", "interrupted:"]
    read = int(words[2].replace(",", ""))
    found = lines(run("scan", tmp_path / "root", "job", "--keys-only", "--json"))
    assert found == [{"key": [number]} for number in range(read)]
    assert f"up to line {read:,}, and all of them are stored; job 'job' has {read:,} keys" in told.decode()
    assert read > 5_000


# -- scan --------------------------------------------------------------------------------------------------------


def test_scan_of_a_prefix_is_exactly_its_rows_in_order(root: Path) -> None:
    """A prefix is whole parts: `games` is not `games-extra`, and each section comes in the order of its names."""
    for section in ("admin", "games", "games-extra"):
        rows = lines(run("scan", root, "packages", "--prefix", section, "--json"))
        latest = {record["package"]: record for record in PACKAGES if record["section"] == section}
        wanted = [{"key": [section, name], "value": latest[name]} for name in sorted(latest, key=str.encode)]
        assert rows == wanted


def test_scan_in_reverse_with_a_limit(root: Path) -> None:
    """Reverse, limit and keys-only go together, and the limit counts from the end that comes first."""
    everything = lines(run("scan", root, "packages", "--keys-only", "--json"))
    assert everything == sorted(everything, key=lambda row: [part.encode() for part in row["key"]])
    assert len(everything) == 7
    found = lines(run("scan", root, "packages", "--reverse", "--limit", "3", "--keys-only", "--json"))
    assert found == everything[::-1][:3]
    assert run("scan", root, "packages", "--limit", "0").stdout == ""


def test_scan_into_a_pipe_gives_keys_that_can_be_typed(root: Path) -> None:
    """A line is the key as it is typed, a tab and the value; the key can be given to `get` as it stands."""
    rows = [line.split("\t") for line in run("scan", root, "packages").stdout.splitlines()]
    assert [typed for typed, _value in rows] == [
        "admin/adduser", "admin/sudo", "admin/é", '["games", "2048"]', '["games", "a\\u0000b"]', "games/chess",
        "games-extra/more",
    ]  # fmt: skip
    for typed, value in rows[3:6]:
        assert json.loads(run("get", root, "packages", typed).stdout) == json.loads(value)


def test_scan_of_nothing_says_why(root: Path) -> None:
    """No rows is no error, and a word on stderr says what might have been meant."""
    ended = run("scan", root, "packages", "--category", "other")
    assert ended.stdout == ""
    assert "the job has: records" in ended.stderr
    assert '["games", "2048"]' in run("scan", root, "packages", "--prefix", "games/2048").stderr
    assert "The first key is admin/adduser" in run("scan", root, "packages", "--prefix", "nothing").stderr


def test_scan_into_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    """Whoever stops reading, as `head` does, gets no complaint."""
    with Persistency(tmp_path) as p, p.open_job("long") as job:
        for number in range(5_000):
            job.put("records", (number,), encode("x" * 100))
    for how in ("--json", "--reverse"):
        with subprocess.Popen(
            [*COMMAND, "scan", tmp_path, "long", how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
        ) as scanning:
            assert scanning.stdout is not None
            assert scanning.stderr is not None
            assert scanning.stdout.readline()
            scanning.stdout.close()
            assert scanning.stderr.read() == b""
        assert scanning.returncode == 0


def test_output_that_cannot_be_written_is_an_error(root: Path) -> None:
    """A full disk behind stdout is told, not passed over."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with open("/dev/full", "w") as full:
        ended = subprocess.run(
            [*COMMAND, "scan", root, "packages"],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            env=ENVIRONMENT,
            timeout=60,
        )
    assert ended.returncode == 1
    assert b"stdout: No space left on device" in ended.stderr
    assert b"Free some space" in ended.stderr
    assert b"Traceback" not in ended.stderr


# -- get ---------------------------------------------------------------------------------------------------------


def test_get_shows_a_value(root: Path) -> None:
    """A value comes as JSON, with --json as one line with its key, and with --raw as its bytes."""
    assert json.loads(run("get", root, "packages", "admin/sudo").stdout) == PACKAGES[4]
    [line] = lines(run("get", root, "packages", '["admin", "sudo"]', "--json"))
    assert line == {"key": ["admin", "sudo"], "value": PACKAGES[4]}
    ended = subprocess.run(
        [*COMMAND, "get", root, "packages", "admin/sudo", "--raw"],
        check=False,
        capture_output=True,
        env=ENVIRONMENT,
        timeout=60,
    )
    assert ended.stdout == encode(PACKAGES[4])


def test_get_of_a_missing_key_is_exit_code_1(root: Path) -> None:
    """A key that isn't there is told with its parts, and digits that were meant as text with what to type."""
    ended = run("get", root, "packages", "games/none", code=1)
    assert ended.stdout == ""
    assert "no key('games', 'none') in 'records' of job 'packages'" in ended.stderr
    assert '\'["games", "2048"]\'' in run("get", root, "packages", "games/2048", code=1).stderr
    assert "the job has: records" in run("get", root, "packages", "a", "--category", "none", code=1).stderr


def test_payloads_that_are_not_cbor_are_shown_as_base64(tmp_path: Path) -> None:
    """Any bytes can be shown, and a key in an encoding of its own can be typed as it was shown."""
    with Persistency(tmp_path) as p, p.open_job("raw") as job:
        job.put("records", RawKey(b"\xffown"), b"\xff\x00")
        job.put("records", ("empty",), b"")
    rows = lines(run("scan", tmp_path, "raw", "--json"))
    assert rows == [
        {"key": ["empty"], "value": {"base64": ""}},
        {"key": {"base64": "/293bg=="}, "value": {"base64": "/wA="}},
    ]
    [row] = lines(run("get", tmp_path, "raw", json.dumps(rows[1]["key"]), "--json"))
    assert row == rows[1]


# -- what is wrong -----------------------------------------------------------------------------------------------


def test_a_job_that_is_not_there_is_not_made(root: Path, tmp_path: Path) -> None:
    """Looking into a job or a root that isn't there says so and makes neither."""
    before = sorted(root.iterdir())
    for typed in (["scan", root, "other"], ["get", root, "other", "a/b"]):
        ended = run(*typed, code=1)
        assert f"no job 'other' in {root}" in ended.stderr
        assert "It has: packages." in ended.stderr
    assert sorted(root.iterdir()) == before
    assert "no job 'packages' in" in run("scan", tmp_path / "none", "packages", code=1).stderr
    assert not (tmp_path / "none").exists()


def test_what_writes_to_a_job_of_another_process_is_refused(root: Path, tmp_path: Path) -> None:
    """A job that a living process has open is told with its process id, by every command that needs it, with code 3."""
    file = write_jsonl(tmp_path / "one.jsonl", [{"id": 1}])
    run("backup", root, "packages", tmp_path / "backup")
    with Persistency(root) as p, p.open_job("packages") as job:
        version = job.version().result()
        for typed in (
            ["import", root, "packages", file, "--key", "id"],
            ["put", root, "packages", "a", "1"],
            ["rm", root, "packages", "admin/sudo"],
            ["restore", root, "packages", tmp_path / "backup", "--yes"],
            ["compact", root, "packages"],
            ["drop", root, "packages", "--yes"],
        ):
            ended = run(*typed, code=3)
            assert f"process {os.getpid()}" in ended.stderr
            assert ended.stdout == ""
        assert "nothing is to be deleted" in run("purge", root, "1", "--yes").stderr
        assert (job.version().result(), job.count("records").result()) == (version, 7)


def test_what_only_looks_reads_a_job_of_another_process(root: Path, tmp_path: Path) -> None:
    """A job that a living process has open is read beside it, with what was committed the moment before."""
    with Persistency(root) as p, p.open_job("packages") as job:
        job.commit(Put("records", ("new",), encode({"size": 9}))).result()
        assert json.loads(run("get", root, "packages", "new").stdout) == {"size": 9}
        assert len(lines(run("scan", root, "packages", "--json"))) == 8
        assert run("count", root, "packages").stdout == "8\n"
        [stored] = lines(run("ls", root, "--json"))
        assert (stored["job"], stored["owner"]) == ("packages", os.getpid())
        [found] = lines(run("stat", root, "packages", "--json"))
        assert (found["owner"], found["categories"]) == (os.getpid(), [{"category": "records", "rows": 8}])
        assert len(lines(run("export", root, "packages", "-"))) == 8
        run("export", root, "packages", tmp_path / "live.cbor")
        assert run("check", root).stdout == "packages\tsound\n"
        run("backup", root, "packages", tmp_path / "live.backup")
        job.put("records", ("new",), encode({"size": 10}))
    run("restore", tmp_path / "restored", "packages", tmp_path / "live.backup")
    assert json.loads(run("get", tmp_path / "restored", "packages", "new").stdout) == {"size": 9}
    with Persistency(tmp_path / "copy") as p, p.open_job("packages") as job:
        assert job.import_(tmp_path / "live.cbor").result() == 8
    [stored] = lines(run("ls", root, "--json"))
    assert stored["owner"] is None


@pytest.mark.parametrize(
    "typed",
    [
        ["get", "root", "job", "a//b"],
        ["get", "root", "job", '["a"'],
        ["get", "root", "job", '[{"what": 1}]'],
        ["get", "root", "job", "a", "--raw", "--json"],
        ["scan", "root", "job", "--prefix", "/a"],
        ["scan", "root", "job", "--limit", "-1"],
        ["scan", "root", "job", "--prefix", "a", "--start", "b"],
        ["scan", "root", "job", "--category", ""],
        ["scan", ":memory:", "job"],
        ["count", "root", "job", "--stop", "[1"],
        ["watch", "root", "job", "--after", "now"],
        ["watch", "root", "job", "--prefix", "a"],
        ["put", "root", "job", "a"],
        ["put", "root", "job", "a", "{"],
        ["put", "root", "job", "a", "1", "--raw", "1"],
        ["put", "root", "job", "a", "1", "--ttl", "soon"],
        ["put", "root", "job", "a", "1", "--ttl", "0"],
        ["rm", "root", "job"],
        ["rm", "root", "job", "a", "--all"],
        ["rm", "root", "job", "--prefix", "[]"],
        ["import", "root", "job", "file.jsonl", "--key", "a,,b"],
        ["import", "root", "job", "file.xml", "--format", "xml"],
        ["import", "root", "job", "file.cbor", "--key", "a"],
        ["import", "root", "job", "file.cbor", "--atomic"],
        ["export", "root", "job", "file.jsonl", "--key", "a"],
        ["export", "root", "job", "file.xyz"],
        ["export", "root", "job", "file"],
        ["export", "root", "job", "file.gz"],
        ["backup", "root", "job", "-"],
        ["backup", "root", "job"],
        ["purge", "root"],
        ["purge", "root", "1GB", "--expired"],
        ["purge", "root", "much"],
        ["purge", "root", "0"],
        ["what"],
    ],
    ids=" ".join,
)
def test_what_is_typed_wrong_is_exit_code_2(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """A command that can't be understood is told with its usage, and nothing is done."""
    with pytest.raises(SystemExit) as ended:
        app(typed, prog_name="persistency")
    assert ended.value.code == 2
    told = capsys.readouterr()
    assert "Usage: persistency" in told.err
    assert told.out == ""
    assert not Path("root").exists()


def test_a_wrong_argument_ends_a_process_with_2(tmp_path: Path) -> None:
    """So does the command itself, without a traceback."""
    assert "Usage: persistency" in run("get", tmp_path / "root", "job", "a//b", code=2).stderr
    assert not (tmp_path / "root").exists()


def test_what_the_package_refuses_is_told_without_a_traceback(tmp_path: Path) -> None:
    """An error of the package is its message and its hint."""
    file = write_jsonl(tmp_path / "one.jsonl", [{"id": 1}])
    ended = run("import", tmp_path / "root", "j" * 300, file, "--key", "id", code=2)
    assert ended.stderr.startswith("persistency: job_id is too long")
    assert "Fix the call" not in ended.stderr
    assert "category must have" in run("import", tmp_path, "j", file, "--key", "id", "-c", "x" * 300, code=1).stderr


COMMANDS = [
    "ls", "stat", "get", "scan", "count", "watch", "put", "rm", "import", "export", "backup", "restore", "check",
    "compact", "drop", "purge", "demo",
]  # fmt: skip


def test_help_names_the_commands() -> None:
    """Help lists the commands and the exit codes, and is no error."""
    shown = run("--help").stdout
    for word in [*COMMANDS, "Exit codes", "130", "--install-completion", "--show-completion"]:
        assert word in shown
    assert "users/ada/7" in run("get", "--help").stdout


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_extra_is_named_in_one_line(missing: str) -> None:
    """Without typer or rich the command line says what to install, and nothing else."""
    program = f"import sys; sys.modules[{missing!r}] = None; from persistency.cli import main; sys.exit(main())"
    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    assert ended.returncode == 1
    assert ended.stderr == ("persistency: the command line needs the extra 'cli': pip install 'persistency[cli]'\n")


def test_the_version_is_told() -> None:
    """`--version` is the package's."""
    assert run("--version").stdout == f"persistency {persistency.__version__}\n"


@pytest.mark.parametrize("typed", [["ls"], ["get", "job", "k"], ["check"], ["put", "job", "k", "1"]], ids=" ".join)
def test_a_root_that_is_a_file_is_typed_wrong(
    typed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file in the place of the root is called so."""
    monkeypatch.chdir(tmp_path)
    Path("afile").touch()
    with pytest.raises(SystemExit) as ended:
        app([typed[0], "afile", *typed[1:]], prog_name="persistency")
    assert ended.value.code == 2
    assert "afile is a file, not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_stream_that_is_closed_leads_nowhere(closed: int, root: Path) -> None:
    """Without stdin, stdout or stderr a command does its work, and no file of a job gets the number of one."""
    command = [*COMMAND, "put", root, "packages", "new", "--raw", "x"]
    ended = subprocess.run(
        ["/bin/sh", "-c", f'exec "$@" {closed}>&-', "sh", *map(str, command)],
        check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=60,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (ended.stdout == "") is (closed == 1)
    with Persistency(root) as p, p.open_job("packages") as job:
        assert job.get("records", ("new",)).result() == b"x"


# -- a terminal --------------------------------------------------------------------------------------------------


def run_in_terminal(*typed: str | Path) -> str:
    """Run a command with a terminal for its output and return all that it wrote there."""
    master, slave = pty.openpty()
    environment = ENVIRONMENT | {"COLUMNS": "100", "TERM": "xterm-256color"}
    with subprocess.Popen([*COMMAND, *map(str, typed)], stdout=slave, stderr=slave, env=environment) as running:
        os.close(slave)
        written = io.BytesIO()
        # Linux says so with an error when the last one that had the terminal open has gone.
        with contextlib.suppress(OSError):
            while data := os.read(master, 65_536):
                written.write(data)
        os.close(master)
    assert running.returncode == 0, written.getvalue()
    return written.getvalue().decode()


def test_a_terminal_gets_tables_and_progress(root: Path, tmp_path: Path) -> None:
    """In a terminal rows and values come as tables, and an import shows its progress."""
    shown = run_in_terminal("scan", root, "packages", "--prefix", "admin")
    assert "key" in shown
    assert "admin/adduser" in shown
    assert "3 rows" in shown
    assert "adduser" in run_in_terminal("get", root, "packages", "admin/adduser")
    file = write_jsonl(tmp_path / "[b]more.jsonl", [{"id": number} for number in range(1_000)])
    shown = run_in_terminal("import", root, "more", file, "--key", "id")
    assert "[b]more.jsonl" in shown
    assert "records" in shown
    assert "1,000" in shown
    # Many pages are one table: the heading comes once.
    shown = run_in_terminal("scan", root, "more")
    assert shown.count("value") == 1
    assert "1,000 rows" in shown


def test_what_is_stored_cannot_command_a_terminal(tmp_path: Path) -> None:
    """Control characters are shown as JSON escapes them, in a terminal and in a pipe, and markup is only text."""
    evil = "\x1b[2J\x9b31m[bold]\x7f"
    with Persistency(tmp_path) as p, p.open_job("evil") as job:
        job.put("records", (evil,), encode({evil: evil}))
    typed = json.dumps([evil])
    plain = run("scan", tmp_path, "evil").stdout + run("get", tmp_path, "evil", typed).stdout
    assert not {"\x1b", "\x9b", "\x7f"} & set(plain)
    for command in (["scan", tmp_path, "evil"], ["get", tmp_path, "evil", typed]):
        shown = run_in_terminal(*command)
        assert "\x1b[2J" not in shown
        assert not {"\x9b", "\x7f"} & set(shown)
        assert "[bold]" in shown


# -- keys and values ---------------------------------------------------------------------------------------------

KEYS = [
    ("games/0ad", ("games", "0ad")),
    ("games/", ("games",)),
    ("users/ada/7", ("users", "ada", 7)),
    ("-7/0/007/-0/٣", (-7, 0, "007", "-0", "٣")),
    (" a /b c", (" a ", "b c")),
    ('["users", "ada", "7"]', ("users", "ada", "7")),
    ('["a/b", "", null, true, 1, 1.0, [1, ["x"]]]', ("a/b", "", None, True, 1, 1.0, (1, ("x",)))),
    ("[]", ()),
    ('[{"base64": "AP8="}]', (b"\0\xff",)),
    ('[{"uuid": "12345678-1234-5678-1234-567812345678"}]', (UUID("12345678-1234-5678-1234-567812345678"),)),
    ('[{"datetime": "2024-05-06T07:08:09+00:00"}]', (datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC),)),
    ('[{"float": "-inf"}]', (float("-inf"),)),
]


@pytest.mark.parametrize(("typed", "parts"), KEYS, ids=[typed for typed, _ in KEYS])
def test_typed_keys(typed: str, parts: tuple[Any, ...]) -> None:
    """A typed key has exactly these parts, of these types, and is shown as text that reads as the same key."""
    assert parse_key(typed) == key(*parts)
    assert parse_key(format_key(key(*parts))) == key(*parts)
    assert key_from_json(json.loads(json.dumps(key_to_json(key(*parts))))) == key(*parts)


@pytest.mark.parametrize("odd", ["", "/", "a//b", "/a", "[1", '{"base64": "!"}', '{"x": 1}', '[{"uuid": 1}]', "[{}]",
                                 "9" * 5_000, '["\\ud800"]', "[" * 100_000])  # fmt: skip
def test_typed_keys_that_are_none(odd: str) -> None:
    """What can't be read as a key is a `ValueError` with a message."""
    with pytest.raises(ValueError, match=r"."):
        parse_key(odd)


def test_keys_of_any_kind_are_shown_so_that_they_can_be_typed() -> None:
    """Texts that look like numbers, like JSON or like nothing, and encodings of their own, survive the way."""
    awkward = ["7", "-7", "", "[x]", "{x", "a/b", "/", "\n", "'", '"', "\\", "é", "\u2028", "0", "00", " "]
    keys: list[Key] = (
        [key(text) for text in awkward] + [key("a", text) for text in awkward] + [key(text, 7) for text in awkward]
    )
    for one in [*keys, RawKey(b"\xff"), RawKey(b"")]:
        assert parse_key(format_key(one)) == one


def test_digits_that_may_have_been_meant_as_text() -> None:
    """The other reading of a typed key exists only where numbers were read."""
    assert as_texts("games/2048") == key("games", "2048")
    assert as_texts("games/chess") is None
    assert as_texts('["games", 2048]') is None


def test_values_that_json_has_no_word_for() -> None:
    """Everything the codec of values knows can be shown as JSON."""
    moment = datetime(2024, 5, 6, 7, 8, 9, tzinfo=UTC)
    uuid = UUID("12345678-1234-5678-1234-567812345678")
    value = [
        b"\0", moment, date(2024, 5, 6), Decimal("1.50"), Fraction(1, 3), uuid, float("nan"), {1}, {1: "x"},
        {"a": [None, True, 1, 1.5, "é"]},
    ]  # fmt: skip
    shown = payload_to_json(encode(value))
    assert json.loads(json.dumps(shown, allow_nan=False)) == [
        {"base64": "AA=="},
        {"datetime": "2024-05-06T07:08:09+00:00"},
        {"date": "2024-05-06"},
        {"decimal": "1.50"},
        {"fraction": "1/3"},
        {"uuid": str(uuid)},
        {"float": "nan"},
        {"set": [1]},
        {"map": [[1, "x"]]},
        {"a": [None, True, 1, 1.5, "é"]},
    ]
    assert payload_to_json(encode({3, 1, 20})) == {"set": [1, 20, 3]}  # in one order, whatever theirs is
    assert payload_to_json(b"\xff") == {"base64": "/w=="}
    assert payload_to_json(encode(b"\0")) == {"base64": "QQA="}  # the payload: else it would be taken for other bytes
    assert payload_to_json(b"") == {"base64": ""}


VALUES = [
    None, True, 0, -1, 2**100, 1.5, 1e300, float("inf"), "", "é\0\n", b"\0\xff", [], {}, [1, [2, {"a": b"x"}]],
    {"base64": "QQ=="}, {"set": [1]}, {"map": []}, {"float": 1}, {1: "x", (1, 2): "y"}, {1, 2}, date(2024, 5, 6),
    datetime(2024, 5, 6, 7, 8, 9, 10, tzinfo=UTC), Decimal("1.50"), Fraction(-1, 3), [{"date": "2024-05-06"}],
    UUID("12345678-1234-5678-1234-567812345678"), {"a": 1, "b": [Decimal("1E+5")]},
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_values_come_back_from_their_json(value: Any) -> None:
    """What a payload is shown as is read as the same payload, to the byte, and the value is the same."""
    payload = encode(value)
    shown = json.loads(json.dumps(payload_to_json(payload), allow_nan=False))
    assert decode(payload_from_json(shown)) == value
    assert payload_from_json(json.loads(json.dumps(exact_json(payload), allow_nan=False))) == payload


@pytest.mark.parametrize("payload", [b"", b"\xff", b"\x18\x01", b"\xf9\x3c\x00", b"\xa1\x01\x02", b"A\0", b"\x9f\xff"])
def test_payloads_of_any_bytes_come_back(payload: bytes) -> None:
    """CBOR of another spelling than ours, and what is no CBOR at all, comes back to the byte."""
    assert payload_from_json(json.loads(json.dumps(exact_json(payload), allow_nan=False))) == payload


@pytest.mark.parametrize(
    "odd",
    ['{"base64": "!"}', '{"base64": 1}', '{"set": 1}', '{"map": [1]}', '{"fraction": "1e9"}', '{"fraction": "1/0"}',
     '{"set": [{"a": 1}]}', '{"uuid": "x"}', '[{"date": "x"}]', "[" * 70 + "]" * 70, '"\\ud800"',
     "[" * 5_000 + "]" * 5_000],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_json_that_is_no_value(odd: str) -> None:
    """What can't be stored is a `ValueError` with a message."""
    with pytest.raises(ValueError, match=r"."):
        payload_from_json(loads(odd))


# -- real data ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(DATA is None, reason="PERSISTENCY_DATA doesn't name the folder of debian-packages.jsonl.gz")
def test_the_packages_of_a_distribution(tmp_path: Path) -> None:
    """63,440 real records give 63,436 keys, and each section's prefix scan is exactly its packages in name order."""
    file = Path(str(DATA)) / "debian-packages.jsonl.gz"
    sections: dict[str, set[str]] = {}
    with gzip.open(file, "rt", encoding="utf-8") as records:
        for record in map(json.loads, records):
            sections.setdefault(record["section"], set()).add(record["package"])
    [numbers] = lines(run("import", tmp_path, "packages", file, "--key", "section,package", "--json"))
    assert (numbers["records"], numbers["keys"]) == (63_440, 63_436)
    largest = max(sections, key=lambda section: len(sections[section]))
    found = lines(run("scan", tmp_path, "packages", "--prefix", largest, "--keys-only", "--json"))
    assert [row["key"] for row in found] == [[largest, name] for name in sorted(sections[largest])]
    with Persistency(tmp_path) as p, p.open_job("packages") as job:
        for section, names in sections.items():
            rows = job.scan_prefix("records", key(section)).result()
            assert [row.key.parts for row in rows] == [(section, name) for name in sorted(names, key=str.encode)]
