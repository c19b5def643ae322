"""Rows moved in and out from the command line: formats there and back, and imports that end in the middle."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cbor2
import pytest

from persistency import Entry, Job, Key, Persistency, RawKey, key
from persistency.cli.app import app
from persistency.cli.csvrows import Table, read_cell
from persistency.cli.ending import Fault
from persistency.codec.values import encode
from tests.test_cli import COMMAND, ENVIRONMENT, PACKAGES, lines, run, write_jsonl

FAR_MS = 4_000_000_000_000
RECORDS: list[dict[str, Any]] = [
    {"section": "games", "package": "chess", "size": 1, "free": True},
    {"section": "games", "package": "2048", "size": -1.5, "free": None},
    {"section": "admin", "package": 'quo"ted, \r\n', "size": "7", "free": "true"},
    {"section": "admin", "package": "", "size": "", "note": "é\0"},
    {"section": 7, "package": None, "note": '"'},
    {"section": "007", "package": "null", "note": "-"},
]


def digest_of_rows(export: Path) -> str:
    """Return what an export amounts to without its first item and its last, which tell when it was made."""
    stream = io.BytesIO(export.read_bytes())
    ends = []
    while stream.tell() < len(stream.getbuffer()):
        cbor2.load(stream)
        ends.append(stream.tell())
    return hashlib.sha256(stream.getbuffer()[ends[0] : ends[-2]]).hexdigest()


def typed(*words: str | Path, code: int = 0) -> None:
    """Run a command in this process; it must end with this code."""
    with pytest.raises(SystemExit) as ended:
        app([*map(str, words)], prog_name="persistency")
    assert ended.value.code == code


def entries(root: Path, job_id: str) -> dict[str, list[tuple[Key, bytes, int | None]]]:
    """Return every row of a job, with its end, by category."""
    with Persistency(root) as p, p.open_job(job_id) as job:
        return {
            category: sorted((entry.key, entry.payload, entry.expires_ms) for entry in job.snapshot(category).result())
            for category in job.categories().result()
        }


def fill(root: Path, put: Callable[[Job], object]) -> None:
    """Make the job `from`."""
    with Persistency(root) as p, p.open_job("from") as job:
        put(job)


def everything(job: Job) -> None:
    """Put rows of every kind."""
    for at, payload in enumerate([b"", b"\xff", encode(None), encode({"base64": "x"}), encode(b"\0"), b"\x18\x01"]):
        job.put("odd é", (at,), payload)
    job.put("keys", (), b"empty")
    job.put("keys", RawKey(b"\xff\0"), b"raw")
    job.put("keys", (None, b"\0", 1.5, float("inf"), (1, ("x",)), datetime(2024, 5, 6, tzinfo=UTC)), b"parts")
    for number in range(600):
        job.put("many", (number,), encode({"number": number, "text": "é" * number}))
    job.put("ends", ("far",), encode("far"), ttl=FAR_MS / 1000 - job.now_ms / 1000)
    job.put("ends", ("near",), encode("near"), ttl=3_600.123)
    job.put("big", (1,), bytes(6_000_000))
    job.put("big", (2,), os.urandom(1_000_000))


# -- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.cbor", "rows.cbor.gz", "rows"])
def test_what_is_exported_is_imported_the_same(name: str, tmp_path: Path) -> None:
    """Keys, payloads and ends of every kind come back to the byte and the millisecond, in their categories."""
    fill(tmp_path / "root", everything)
    file = tmp_path / name
    form = [] if "." in name else ["--format", "jsonl"]  # what says nothing is read as JSON lines, and never so written
    [told] = lines(run("export", tmp_path / "root", "from", file, *form, "--json"))
    assert (told["rows"], told["categories"]) == (613, ["big", "ends", "keys", "many", "odd é"])
    assert (file.read_bytes()[:2] == b"\x1f\x8b") is name.endswith(".gz")
    assert file.stat().st_mode & 0o777 == 0o600
    [told] = lines(run("import", tmp_path / "root", "to", file, "--json"))
    assert told["records"] == 613
    assert entries(tmp_path / "root", "to") == entries(tmp_path / "root", "from")


@pytest.mark.parametrize("form", ["jsonl", "csv", "cbor"])
def test_a_pipe_takes_and_gives_any_format(form: str, tmp_path: Path) -> None:
    """With - and --format an export goes through a pipe into an import."""
    fill(tmp_path, lambda job: [job.put("records", (at,), encode({"at": at})) for at in range(100)])
    giving = subprocess.run(
        [*COMMAND, "export", tmp_path, "from", "-", "--format", form],
        check=True, capture_output=True, env=ENVIRONMENT, timeout=60,
    )  # fmt: skip
    taking = subprocess.run(
        [*COMMAND, "import", tmp_path, "to", "-", "--format", form, "--json"],
        input=giving.stdout, check=True, capture_output=True, env=ENVIRONMENT, timeout=60,
    )  # fmt: skip
    assert json.loads(taking.stdout)["records"] == 100
    assert entries(tmp_path, "to") == entries(tmp_path, "from")


def test_an_export_is_what_the_package_reads(tmp_path: Path) -> None:
    """The CBOR is an export as `Job.import_` knows it, and what `Job.export` writes can be imported."""
    fill(tmp_path, everything)
    typed("export", tmp_path, "from", tmp_path / "ours.cbor")
    with Persistency(tmp_path) as p, p.open_job("to") as job:
        assert job.import_(tmp_path / "ours.cbor").result() == 613
        job.export(tmp_path / "theirs.cbor").result()
    assert digest_of_rows(tmp_path / "ours.cbor") == digest_of_rows(tmp_path / "theirs.cbor")
    typed("import", tmp_path, "again", tmp_path / "theirs.cbor")
    assert entries(tmp_path, "again") == entries(tmp_path, "from")


def test_rows_go_into_the_category_that_is_named(tmp_path: Path) -> None:
    """One category can be exported, and be imported as another one; a line without one goes to `records`."""
    fill(tmp_path, everything)
    typed("export", tmp_path, "from", tmp_path / "keys.jsonl", "-c", "keys")
    typed("import", tmp_path, "to", tmp_path / "keys.jsonl", "-c", "other")
    (tmp_path / "bare.jsonl").write_text('{"key": ["a"], "value": 1}\n')
    typed("import", tmp_path, "to", tmp_path / "bare.jsonl")
    found = entries(tmp_path, "to")
    assert found == {"other": entries(tmp_path, "from")["keys"], "records": [(key("a"), encode(1), None)]}


def test_rows_that_have_ended_are_left_out(tmp_path: Path) -> None:
    """An end is a moment: a row whose end has passed meanwhile isn't brought back to life."""
    file = tmp_path / "rows.jsonl"
    ends = ((1, 1), (2, FAR_MS))
    write_jsonl(file, [{"key": [at], "value": at, "expires_ms": end} for at, end in ends])
    [told] = lines(run("import", tmp_path, "job", file, "--json"))
    assert (told["records"], told["keys"], told["ended"]) == (2, 1, 1)
    assert entries(tmp_path, "job") == {"records": [(key(2), encode(2), FAR_MS)]}


def test_a_scan_can_be_imported(tmp_path: Path) -> None:
    """What `scan --json` shows is what `import` reads."""
    fill(tmp_path, lambda job: [job.put("records", (at,), encode([at])) for at in range(10)])
    (tmp_path / "rows.jsonl").write_text(run("scan", tmp_path, "from", "--json").stdout)
    typed("import", tmp_path, "to", tmp_path / "rows.jsonl")
    assert entries(tmp_path, "to") == entries(tmp_path, "from")


# -- CSV ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [[], ["--key", "section,package"], ["--key", "package"]], ids=str)
@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
def test_csv_comes_back(fields: list[str], name: str, tmp_path: Path) -> None:
    """Texts, numbers, truth values and null come back as what they are, with the key in one column or in several."""
    names = fields[1].split(",") if fields else ["package", "section"]

    def put(job: Job) -> None:
        for record in RECORDS:
            whole = {"section": None, "package": None, "size": 1, "free": 1, "note": 1} | record
            job.put("records", tuple(record[name] for name in names), encode(whole))

    fill(tmp_path, put)
    typed("export", tmp_path, "from", tmp_path / name, *fields)
    typed("import", tmp_path, "to", tmp_path / name, *fields)
    assert entries(tmp_path, "to") == entries(tmp_path, "from")


def test_csv_has_a_column_for_every_field(tmp_path: Path) -> None:
    """The columns are those of all records, and a field that a record doesn't have is an empty cell."""
    fill(tmp_path, lambda job: [job.put("records", (at,), encode(record)) for at, record in enumerate(RECORDS)])
    shown = run("export", tmp_path, "from", "-", "--format", "csv").stdout.replace("\r\n", "\n").splitlines()
    assert shown[:3] == ["key,section,package,size,free,note", "0,games,chess,1,true,", '1,games,"""2048""",-1.5,null,']
    assert shown[-1] == '5,007,"""null""",,,-'


def test_csv_of_another_program_is_imported(tmp_path: Path) -> None:
    """A header and cells, with a byte order mark, quotes and empty lines; only what is spelled as a number is one."""
    file = tmp_path / "other.csv"
    file.write_bytes('\ufeffname,zip,price,when\r\nada,01234,1.50,"a\nb"\r\n\r\nbob,7,2.5,\r\n'.encode())
    typed("import", tmp_path, "to", file, "--key", "name")
    assert entries(tmp_path, "to") == {
        "records": [
            (key("ada"), encode({"name": "ada", "zip": "01234", "price": "1.50", "when": "a\nb"}), None),
            (key("bob"), encode({"name": "bob", "zip": 7, "price": 2.5}), None),
        ]
    }


def widened(table: Table, entry: Entry) -> list[Entry]:
    """Give a table the columns of a row; return the rows to write."""
    table.widen(entry)
    return [entry]


@pytest.mark.parametrize(
    ("entry", "fields", "told"),
    [
        (Entry(key(1), encode([1]), 1, None), None, "its value is no record"),
        (Entry(key(1), b"\xff", 1, None), None, "its value is no record"),
        (Entry(key(1), encode({1: 2}), 1, None), None, "its value is no record"),
        (Entry(key(1), encode({"a": [1]}), 1, None), None, "its field 'a' is neither a text nor a number"),
        (Entry(key(1), encode({"a": float("nan")}), 1, None), None, "its field 'a' is neither a text nor a number"),
        (Entry(key(1), encode({"key": 1}), 1, None), None, "has a field 'key' besides its key"),
        (Entry(key(1), encode({"a": 1}), 1, FAR_MS), None, "has an end"),
        (Entry(key(1), encode({"a": 2}), 1, None), ("a",), "isn't made of the record's a"),
        (Entry(key(True), encode({"a": 1}), 1, None), ("a",), "isn't made of the record's a"),
        (Entry(key(1), encode({"b": 1}), 1, None), ("a",), "its key isn't made of the record's a"),
    ],
    ids=str,
)
def test_what_csv_cannot_hold_is_told(entry: Entry, fields: tuple[str, ...] | None, told: str) -> None:
    """Nothing is left out or bent: the key is named, with the reason and what to do instead."""
    table = Table(fields)
    with pytest.raises(Fault, match="CSV can't hold") as refused:
        list(table.write_rows(widened(table, entry), lambda _text: None))
    assert told in str(refused.value)
    assert refused.value.hint


def test_an_export_that_fails_leaves_no_file(tmp_path: Path) -> None:
    """A file is there whole or not at all; what was there before stays, and a job's files are never written over."""
    fill(tmp_path / "root", everything)
    (tmp_path / "rows.csv").write_text("before")
    words = ["export", tmp_path / "root", "from", tmp_path / "rows.csv", "--yes"]
    assert "CSV takes one category" in run(*words, code=1).stderr
    ended = run(*words, "-c", "none", code=1)
    assert "no rows in category 'none' of job 'from'" in ended.stderr
    assert "The job has: big, ends, keys, many, odd é." in ended.stderr
    ended = run(*words, "-c", "odd é", code=1)
    assert "CSV can't hold 0: its value is no record" in ended.stderr
    assert (tmp_path / "rows.csv").read_text() == "before"
    before = (tmp_path / "root" / "from.db").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "root" / "from.db")
    for name in ("root/from.db", "link", "root/other.lock"):
        assert "a name for a job's files" in run("export", tmp_path / "root", "from", tmp_path / name, code=1).stderr
    assert (tmp_path / "root" / "from.db").read_bytes() == before
    told = run("export", tmp_path / "root", "from", tmp_path / "none" / "rows.cbor", code=1).stderr
    assert f"there is no directory {str(tmp_path / 'none')!r}" in told
    assert "Make it first." in told
    assert "is a directory" in run("export", tmp_path / "root", "from", tmp_path, "--format", "cbor", code=1).stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "root", "rows.csv"]


def test_an_export_into_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    """Whoever stops reading, as `head` does, gets no complaint."""
    fill(tmp_path, everything)
    for form in ("jsonl", "cbor"):
        command = [*COMMAND, "export", tmp_path, "from", "-", "--format", form]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT) as giving:
            assert giving.stdout is not None
            assert giving.stderr is not None
            assert giving.stdout.read(10)
            giving.stdout.close()
            assert giving.stderr.read() == b""
        assert giving.returncode == 0


@pytest.mark.parametrize(
    ("text", "value"),
    [("7", 7), ("-7", -7), ("0", 0), ("1.5", 1.5), ("1e+16", 1e16), ("true", True), ("null", None), ('"7"', "7"),
     ("007", "007"), ("1.50", "1.50"), ("-0", "-0"), ("1e400", "1e400"), ("-Infinity", "-Infinity"), ("NaN", "NaN"),
     ('"x', '"x'), ("True", "True"), (" 7", " 7"), ("9" * 5_000, "9" * 5_000), ("", ""), ("[1]", "[1]"), ("-", "-")],
)  # fmt: skip
def test_cells(text: str, value: Any) -> None:
    """Only the very spelling of a number, a truth value, null or a JSON string is that; all else is text."""
    found = read_cell(text)
    assert (type(found), found) == (type(value), value)


# -- files that are no good --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bad", "told"),
    [
        ("rows.jsonl", '{"key": ["x"]}', "line 2: no 'value'"),
        ("rows.jsonl", '{"package": "x"}', "line 2: no 'key' and no 'value'"),
        ("rows.jsonl", '{"key": ["x"], "value": 1, "ttl": 5}', "line 2: 'ttl' is nothing a row has"),
        ("rows.jsonl", '{"key": "x", "value": 1}', "line 2: a key must be a JSON array"),
        ("rows.jsonl", '{"key": ["x"], "value": {"base64": "!"}}', "line 2: {\"base64\": \"!\"} can't be read"),
        ("rows.jsonl", '{"key": ["x"], "value": 1, "expires_ms": "soon"}', "line 2: expires_ms isn't a number"),
        ("rows.jsonl", '{"key": ["x"], "value": 1, "expires_ms": 99999999999999999999}', "line 2: an end of"),
        ("rows.jsonl", '{"key": ["x"], "value": 1, "category": 5}', "line 2: the category isn't a text"),
        ("rows.jsonl", '{"key": ["x"], "value": 1, "category": "' + "x" * 300 + '"}', "line 2: category must have"),
        ("rows.csv", "x", "line 3: 1 cells, and the header has 2"),
        ("rows.csv", "a//b,1", "line 3: 'a//b' has an empty part"),
        ("rows.csv", 'x,"1', "line 3: not CSV: unexpected end of data"),
        ("rows.csv", "x,\udcff", "line 3: not CSV in UTF-8"),
    ],
)  # fmt: skip
def test_the_line_of_a_bad_row_is_named(
    name: str, bad: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row that is no good ends the import with its line; the rows before it are stored."""
    good = "key,size\na,1\n" if name.endswith("csv") else '{"key": ["a"], "value": {"size": 1}}\n'
    (tmp_path / name).write_bytes(f"{good}{bad}".encode(errors="surrogateescape"))
    typed("import", tmp_path, "job", tmp_path / name, code=1)
    said = capsys.readouterr().err
    assert f"{name}, {told}" in said
    assert "The records before it, 1, are stored." in said
    assert entries(tmp_path, "job") == {"records": [(key("a"), encode({"size": 1}), None)]}


@pytest.mark.parametrize(
    ("name", "data", "told"),
    [
        ("rows.csv", b"name,size\na,1\n", "line 1: no column 'key'"),
        ("rows.csv", b"key,a,a\n", "two columns have one name"),
        ("rows.csv", b"key,\n", "or one has none"),
        ("rows.csv", b'{"key": ["a"], "value": 1}\n', "it looks like JSON, not CSV"),
        ("rows.csv", b"key;a\n1;2\n", "There is ';' between its cells"),
        ("rows.csv", b"key,a\r1,2\r", "a carriage return in the middle"),
        ("rows.csv", b'key,a\n1,"2\n3,4\n5,6\n', "line 2: not CSV: unexpected end of data"),
        ("rows.cbor", b"", "is no export of a job"),
        ("rows.cbor", b'{"key": 1}', "is no export of a job"),
        ("rows.cbor.gz", gzip.compress(b"\xa1", mtime=0)[:11], "the gzip file is damaged"),
    ],
    ids=[
        "no key",
        "twice",
        "unnamed",
        "looks like JSON",
        "semicolons",
        "old ends",
        "open quote",
        "empty",
        "json",
        "gzip",
    ],
)
def test_a_file_that_is_no_good_makes_no_job(name: str, data: bytes, told: str, tmp_path: Path) -> None:
    """What can be seen of a file before a job is needed is looked at before."""
    (tmp_path / name).write_bytes(data)
    assert told in run("import", tmp_path / "root", "job", tmp_path / name, code=1).stderr
    assert not (tmp_path / "root").exists()


def test_an_export_that_is_cut_says_what_is_stored(tmp_path: Path) -> None:
    """Of a damaged export whole batches are taken in, and the message counts their rows."""
    fill(tmp_path, lambda job: [job.put("records", (at,), bytes(100)) for at in range(3_000)])
    typed("export", tmp_path, "from", tmp_path / "rows.cbor")
    whole = (tmp_path / "rows.cbor").read_bytes()
    (tmp_path / "rows.cbor").write_bytes(whole[:-100])
    ended = run("import", tmp_path, "to", tmp_path / "rows.cbor", code=1)
    assert "2,048 rows were taken in before, and stay" in ended.stderr
    assert len(entries(tmp_path, "to")["records"]) == 2_048
    (tmp_path / "rows.cbor.gz").write_bytes(gzip.compress(whole, mtime=0)[:-10])
    ended = run("import", tmp_path, "two", tmp_path / "rows.cbor.gz", code=1)
    assert "the gzip file is damaged" in ended.stderr
    rows = len(entries(tmp_path, "two").get("records", ()))
    assert f"The rows before it, {rows:,}, are stored." in ended.stderr


# -- nothing half done -------------------------------------------------------------------------------------------


def interrupted(tmp_path: Path, name: str, data: bytes, *options: str) -> str:
    """Interrupt an import that has read most of what a pipe gave it and waits for more; return what it says."""
    pipe = tmp_path / name
    os.mkfifo(pipe)
    command = [*COMMAND, "import", tmp_path / "root", "job", pipe, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=ENVIRONMENT)
    with process as importing, open(pipe, "wb", buffering=0) as into:
        rest = memoryview(data)
        while rest:  # once a pipe of 64 KiB has taken a megabyte, most of it was read
            rest = rest[into.write(rest) :]
        importing.send_signal(signal.SIGINT)
        _, told = importing.communicate(timeout=60)
    assert importing.returncode == 130, told
    assert b"Traceback" not in told
    assert told.startswith(b"persistency: interrupted: ")
    return told.decode()


def test_an_interrupted_import_of_csv_has_stored_what_it_says(tmp_path: Path) -> None:
    """Whole lines from the first to the one that is named are stored, and nothing behind it."""
    told = interrupted(
        tmp_path, "rows.csv", b"key,text\n" + b"".join(b"%d,%0100d\n" % (at, at) for at in range(20_000))
    )
    rows = entries(tmp_path / "root", "job")["records"]
    assert [found.parts for found, _payload, _end in rows] == [(at,) for at in range(len(rows))]
    assert f"interrupted: {len(rows):,} records were read, up to line {len(rows) + 1:,}, and all of them" in told
    assert len(rows) > 10_000


def test_an_interrupted_import_of_cbor_has_stored_what_it_says(tmp_path: Path) -> None:
    """Whole batches from the first row on are stored, and the message counts their rows."""
    fill(tmp_path / "root", lambda job: [job.put("records", (at,), bytes(200)) for at in range(20_000)])
    typed("export", tmp_path / "root", "from", tmp_path / "whole.cbor")
    told = interrupted(tmp_path, "rows.cbor", (tmp_path / "whole.cbor").read_bytes()[:-100])
    rows = entries(tmp_path / "root", "job").get("records", [])
    assert [found.parts for found, _payload, _end in rows] == [(at,) for at in range(len(rows))]
    assert f"interrupted: {len(rows):,} rows were read, and all of them are stored" in told
    assert len(rows) > 5_000


def test_an_interrupted_atomic_import_has_stored_nothing(tmp_path: Path) -> None:
    """With --atomic there is nothing at all, not even the job, until the whole file was read."""
    data = b"".join(b'{"id": %d, "text": "%090d"}\n' % (at, at) for at in range(10_000))
    told = interrupted(tmp_path, "rows.jsonl", data, "--key", "id", "--atomic")
    assert told == "persistency: interrupted: nothing was stored\n"
    assert not (tmp_path / "root").exists()


def test_an_atomic_import_is_all_or_nothing(tmp_path: Path) -> None:
    """A bad line, or a row that the job refuses, leaves everything as it was; a good file is one batch."""
    file = write_jsonl(tmp_path / "rows.jsonl", [*PACKAGES, {"section": []}])
    words = ["import", tmp_path / "root", "job", file, "--key", "section,package", "--atomic"]
    assert "line 9" in run(*words, code=1).stderr
    assert not (tmp_path / "root").exists()
    write_jsonl(file, PACKAGES)
    [told] = lines(run(*words, "--json"))
    assert (told["records"], told["keys"], told["new"]) == (8, 7, 7)
    before = entries(tmp_path / "root", "job")
    (tmp_path / "ends.jsonl").write_text(
        '{"key": ["new"], "value": 1}\n{"key": ["new"], "value": 1, "expires_ms": 99999999999999999999}\n'
    )
    ended = run("import", tmp_path / "root", "job", tmp_path / "ends.jsonl", "--atomic", code=1)
    assert "Nothing was stored." in ended.stderr
    assert entries(tmp_path / "root", "job") == before


def test_kill_ends_an_import_in_order(tmp_path: Path) -> None:
    """SIGTERM, as `kill` sends it, leaves whole lines from the first on, and no traceback."""
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    command = [*COMMAND, "import", tmp_path / "root", "job", pipe, "--key", "id"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, env=ENVIRONMENT)
    with process as importing, open(pipe, "wb", buffering=0) as into:
        into.writelines(b'{"id": %d, "text": "%090d"}\n' % (at, at) for at in range(10_000))
        importing.send_signal(signal.SIGTERM)
        _, told = importing.communicate(timeout=60)
    rows = entries(tmp_path / "root", "job")["records"]
    assert importing.returncode == 128 + signal.SIGTERM
    assert told.startswith(b"persistency: interrupted: %s records were read" % f"{len(rows):,}".encode())
    assert told.count(b"\n") == 1
    assert [found.parts for found, _payload, _end in rows] == [(at,) for at in range(len(rows))]
    assert len(rows) > 5_000


FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
from persistency.cli import main
sys.exit(main())
"""


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """Where no file can grow any more an import ends with a message, and what is stored is the file's beginning."""
    file = write_jsonl(tmp_path / "rows.jsonl", [{"id": at, "text": "x" * 1_000} for at in range(2_000)])
    command = [sys.executable, "-c", FULL, "import", tmp_path / "root", "job", file, "--key", "id"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert ended.returncode == 1, ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Mend that (is there room on the disk?), and try again." in ended.stderr
    assert "What is stored is the beginning of the file" in ended.stderr
    rows = entries(tmp_path / "root", "job").get("records", [])
    assert [found.parts for found, _payload, _end in rows] == [(at,) for at in range(len(rows))]
    assert len(rows) < 2_000
    fill(tmp_path / "root", lambda job: [job.put("records", (at,), bytes(1_000)) for at in range(1_000)])
    command = [sys.executable, "-c", FULL, "export", tmp_path / "root", "from", tmp_path / "rows.cbor"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert f"{tmp_path / 'rows.cbor'}: File too large" in ended.stderr
    assert "ulimit -f" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not [path for path in tmp_path.iterdir() if "cbor" in path.name]


def test_what_a_full_disk_refuses_is_told_once(tmp_path: Path) -> None:
    """What is logged on the way to the error isn't told besides it: there are two lines."""
    (tmp_path / "big").write_bytes(bytes(500_000))
    typed("put", tmp_path / "root", "job", "k", "1")
    command = [sys.executable, "-c", FULL, "put", tmp_path / "root", "job", "big", "--file", tmp_path / "big"]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, env=ENVIRONMENT, timeout=60)
    assert ended.returncode == 1
    first, second = ended.stderr.splitlines()
    assert first.startswith("persistency: job 'job' can't go on: ")
    assert second == "  Mend that (is there room on the disk?), and try again."


def test_an_atomic_import_that_fails_leaves_no_new_job(tmp_path: Path) -> None:
    """A batch that the job refuses leaves neither a job nor a root that weren't there before."""
    write_jsonl(tmp_path / "rows.jsonl", [{"key": ["a"], "value": 1, "category": "x" * 300}])
    words = ["import", tmp_path / "root", "job", tmp_path / "rows.jsonl"]
    for option in ([], ["--atomic"]):
        run(*words, *option, code=1)
        assert not (tmp_path / "root").exists()
    fill(tmp_path / "root", lambda job: job.put("records", (1,), b""))
    run(*words, "--atomic", code=1)
    assert [stored.job_id for stored in Persistency(tmp_path / "root").stored_jobs()] == ["from"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.cbor", "rows.cbor.gz"])
def test_only_a_former_export_is_replaced_without_a_question(name: str, tmp_path: Path) -> None:
    """What was exported in that format before is replaced; any other file stays, unless --yes says so."""
    fill(tmp_path / "root", lambda job: job.put("records", ('"',), encode(1)))
    words = ["export", tmp_path / "root", "from", tmp_path / name]
    typed(*words)
    exported = (tmp_path / name).read_bytes()
    typed(*words)
    other = tmp_path / f"other.{'cbor' if 'jsonl' in name else 'jsonl'}"
    typed("export", tmp_path / "root", "from", other)
    mine = [b'{"section": "games"}\n', gzip.compress(b'{"key": ["a"], "value": 1}\n'), b"\x1f\x8b", other.read_bytes()]
    for data in mine:
        (tmp_path / name).write_bytes(data)
        typed(*words, code=2)
        assert (tmp_path / name).read_bytes() == data
    (tmp_path / name).write_bytes(b"")  # there is nothing to be lost
    typed(*words)
    (tmp_path / name).write_bytes(b"mine")
    typed(*words, "--yes")
    assert len((tmp_path / name).read_bytes()) == pytest.approx(len(exported), abs=20)  # but for its time


def test_a_csv_file_is_never_replaced_without_a_question(tmp_path: Path) -> None:
    """It doesn't say who has written it."""
    fill(tmp_path / "root", lambda job: job.put("records", (1,), encode({"a": 1})))
    words = ["export", tmp_path / "root", "from", tmp_path / "rows.csv"]
    typed(*words)
    typed(*words, code=2)
    typed(*words, "--yes")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "rows.csv")
    typed("export", tmp_path / "root", "from", tmp_path / "link.jsonl", code=2)
    assert (tmp_path / "rows.csv").read_bytes() == b"key,a\r\n1,1\r\n"


def test_sets_come_back_whatever_the_order_of_their_members(tmp_path: Path) -> None:
    """The members of a set have another order in every process; an export in JSON lines has the payload."""
    words = [f"word {number}" for number in range(20)]
    fill(tmp_path, lambda job: [job.put("records", (at,), encode({"in": set(words[at:])})) for at in range(10)])
    for seed in ("1", "2"):
        environment = ENVIRONMENT | {"PYTHONHASHSEED": seed}
        for command in (["export", tmp_path, "from", tmp_path / "rows.jsonl"],
                        ["import", tmp_path, f"to-{seed}", tmp_path / "rows.jsonl"]):  # fmt: skip
            environment["PYTHONHASHSEED"] += "0"
            subprocess.run([*COMMAND, *command], check=True, capture_output=True, env=environment, timeout=60)
        assert entries(tmp_path, f"to-{seed}") == entries(tmp_path, "from")


def test_a_job_that_changes_is_exported_meanwhile(tmp_path: Path) -> None:
    """Rows that come and go beside an export harm nothing: those that are there throughout are in it once."""
    with Persistency(tmp_path / "root") as p, p.open_job("live") as job:
        for at in range(2_000):
            job.put("records", ("stays", at), encode(at))
        job.flush().result()
        command = [*COMMAND, "export", tmp_path / "root", "live", "-"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT) as giving:
            assert giving.stdout is not None
            found = []
            for number, line in enumerate(giving.stdout):
                found.append(json.loads(line)["key"])
                job.put("records", ("comes", number), b"")
                job.delete("records", ("comes", number - 5))
        assert giving.returncode == 0
    assert [parts for parts in found if parts[0] == "stays"] == [["stays", at] for at in range(2_000)]
