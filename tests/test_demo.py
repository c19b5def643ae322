"""The demonstration, run as it is typed, and the checks it relies on, given what is wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import unicodedata
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import persistency
from persistency import Key, Persistency, Row, key
from persistency.cli import kill, victim
from persistency.cli.ending import Fault
from persistency.cli.stream import Beside, Posted, percentile_ms, stream
from persistency.cli.verify import count_faults, prefix_faults, rows_faults, survival_faults
from persistency.codec.values import decode, encode
from tests.forks import COMMAND_LINE, Forks

DATA = os.environ.get("PERSISTENCY_DATA")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(persistency.__file__).parents[1])}
COMMAND = [sys.executable, "-m", "persistency", "demo"]
FORKS = Forks(*COMMAND_LINE, "persistency.cli.demo", environment=ENVIRONMENT)


def run(*typed: str | Path, code: int = 0, tmp: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the demonstration to its end, which must have this exit code and no traceback."""
    environment = ENVIRONMENT if tmp is None else ENVIRONMENT | {"TMPDIR": str(tmp)}
    ended = FORKS.run_module("persistency", "demo", *map(str, typed), environment=environment)
    assert ended.returncode == code, (ended.stdout, ended.stderr)
    assert "Traceback" not in ended.stderr
    return ended


def check(summary: dict[str, Any], records: int, keys: int) -> None:
    """Check the numbers of a demonstration that went well."""
    assert (summary["records"], summary["keys"]) == (records, keys)
    assert summary["faults"] == []
    assert summary["seconds"] > 0
    assert summary["records_per_second"] > 0
    assert summary["reads"] >= 1
    assert 0 < summary["read_ms_p50"] <= summary["read_ms_p99"]
    killed = summary["killed"]
    assert 1_000 <= killed["flushed"] <= killed["recovered"] < killed["posted"] < killed["total"]


def test_the_characters_of_unicode(tmp_path: Path) -> None:
    """Without arguments it streams every named character, checks all, and leaves nothing behind."""
    ended = run("--json", tmp=tmp_path)
    summary = json.loads(ended.stdout)
    named = sum(1 for code_point in range(sys.maxunicode + 1) if unicodedata.name(chr(code_point), None) is not None)
    check(summary, named, named)
    counts = {row["prefix"][0]: row["rows"] for row in summary["prefixes"]}
    assert counts["Lu"] == sum(
        1 for code_point in range(sys.maxunicode + 1) if unicodedata.category(chr(code_point)) == "Lu"
    )
    last = [tuple(parts) for parts in summary["range"]["last"]]
    assert last == sorted(last, reverse=True)
    assert list(tmp_path.iterdir()) == []


def test_a_root_is_kept_and_can_be_used_again(tmp_path: Path) -> None:
    """In a root of its user it works twice, keeps its jobs, and touches no other."""
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"kind": number % 3, "id": number}) + "\n" for number in range(1_000)))
    root = tmp_path / "root"
    with Persistency(root) as p, p.open_job("mine") as job:
        job.put("records", ("a",), b"mine")
    run("--root", root, "--input", file, "--key", "kind,id")
    file.write_text('{"kind": true, "id": 1}\n{"kind": 1, "id": 1}\n{"kind": 1, "id": 1, "again": null}\n')
    ended = run("--root", root, "--input", file, "--key", "kind,id", "--json")
    summary = json.loads(ended.stdout)
    check(summary, 3, 2)
    assert summary["prefixes"] == [{"prefix": [1], "rows": 1}, {"prefix": [True], "rows": 1}]
    with Persistency(root) as p:
        with p.open_job("mine") as job:
            assert job.get("records", ("a",)).result() == b"mine"
        with p.open_job("persistency-demo") as job:
            rows = job.scan("records").result()
            assert [(row.key.parts, decode(row.payload)) for row in rows] == [
                ((1, 1), {"kind": 1, "id": 1, "again": None}),
                ((True, 1), {"kind": True, "id": 1}),
            ]
        with p.open_job("persistency-demo-killed") as job:
            assert job.count("records").result() == summary["killed"]["recovered"]


def test_the_tables_say_what_happened(tmp_path: Path) -> None:
    """For people it ends in tables with every number, and shows no progress where nobody sees it move."""
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"id": number}) + "\n" for number in range(1_234)))
    ended = run("--input", file, "--key", "id")
    for words in ("records/s", "p50, ms", "p99, ms", "rows recovered", "flushed", "posted", "1,234", "in reverse"):
        assert words in ended.stdout
    assert ended.stderr == ""


@pytest.mark.skipif(DATA is None, reason="PERSISTENCY_DATA doesn't name the folder of debian-packages.jsonl.gz")
def test_the_packages_of_a_distribution() -> None:
    """It works as well with a file of real records, in which four keys come twice."""
    file = Path(str(DATA)) / "debian-packages.jsonl.gz"
    summary = json.loads(run("--input", file, "--key", "section,package", "--json").stdout)
    check(summary, 63_440, 63_436)


def test_a_write_that_got_lost_fails_it(tmp_path: Path) -> None:
    """With a job that drops a single put, and says nothing, it ends with exit code 1 and names the difference."""
    file = tmp_path / "few.jsonl"
    file.write_text("".join(json.dumps({"id": number}) + "\n" for number in range(500)))
    program = f"""
import sys
from persistency import Job, key
from persistency.cli import main
put = Job.put
Job.put = lambda job, category, one, payload: None if one == key(100) else put(job, category, one, payload)
sys.argv = ["persistency", "demo", "--input", {str(file)!r}, "--key", "id"]
sys.exit(main())
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        check=False,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=ENVIRONMENT,
        timeout=60,
    )
    assert ended.returncode == 1, ended.stderr
    assert "the demonstration failed" in ended.stderr
    assert "the whole scan: row 100 is key(101), not key(100)" in ended.stderr
    assert "the whole scan: 499 rows, not 500" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize(
    ("typed", "code", "told"),
    [
        (["--input", "none.jsonl", "--key", "id"], 1, "none.jsonl: No such file"),
        (["--input", "none.jsonl"], 2, "go together"),
        (["--key", "id"], 2, "go together"),
        (["--input", "none.jsonl", "--key", ","], 2, "empty field name"),
    ],
    ids=str,
)
def test_what_is_wrong_is_told(typed: list[str], code: int, told: str) -> None:
    """A file that isn't there, and options that don't go together, are told without a traceback."""
    assert told in run(*typed, code=code).stderr


def test_records_that_are_no_good_are_told(tmp_path: Path) -> None:
    """A file without records, a bad line, and a key that is too long are errors with their place."""
    file = tmp_path / "bad.jsonl"
    for text, told in [
        ("\n", "bad.jsonl has no records"),
        ('{"id": 1}\n{"no": 1}\n', "bad.jsonl, line 2: no field 'id'"),
        ('{"id": 1}\n{"id": "' + "x" * 9_000 + '"}\n', "bad.jsonl, line 2: key must have at most"),
    ]:
        file.write_text(text)
        assert told in run("--input", file, "--key", "id", code=1).stderr


def test_a_job_of_another_process_is_locked(tmp_path: Path) -> None:
    """A root whose demonstration is open elsewhere is told with the process id, and left alone."""
    with Persistency(tmp_path) as p, p.open_job("persistency-demo") as job:
        job.put("records", ("a",), b"mine")
        assert f"process {os.getpid()}" in run("--root", tmp_path, code=1).stderr
        assert job.get("records", ("a",)).result() == b"mine"


def test_ctrl_c_says_what_was_done(tmp_path: Path) -> None:
    """Interrupted in the stream it ends with 130, says how many records were posted, and removes its directory."""
    pipe, tmp = tmp_path / "pipe", tmp_path / "tmp"
    os.mkfifo(pipe)
    tmp.mkdir()
    command = subprocess.Popen(
        [*COMMAND, "--input", pipe, "--key", "id"], stderr=subprocess.PIPE, env=ENVIRONMENT | {"TMPDIR": str(tmp)}
    )
    with command as running, open(pipe, "wb", buffering=0) as into:
        # A pipe holds 64 KiB: once a megabyte has gone in, most of it was read, and the rest is being waited for.
        into.writelines(b'{"id": %d, "text": "%090d"}\n' % (number, number) for number in range(10_000))
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=60)
    assert running.returncode == 130, told
    assert b"Traceback" not in told
    assert told.startswith(b"persistency: interrupted: ")
    assert b"records were posted" in told
    assert list(tmp.iterdir()) == []


# -- the kill ----------------------------------------------------------------------------------------------------


def test_a_child_that_ends_by_itself_proves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that was through, or couldn't begin, before it could be killed is an error that says so."""
    monkeypatch.setattr(kill, "ROWS_TOTAL", 10)
    with Persistency(tmp_path / "root") as p, pytest.raises(Fault, match="ended by itself, with exit code 0"):
        kill.kill_writer(p, "killed")
    (tmp_path / "file").write_text("")
    with Persistency(tmp_path / "root") as p:
        monkeypatch.setattr(victim, "__name__", "persistency.cli.nothing")
        with pytest.raises(Fault, match="ended by itself, with exit code 1") as raised:
            kill.kill_writer(p, "killed")
        assert "persistency.cli.nothing" in raised.value.hint


def test_a_kill_that_falls_between_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill after which nothing is missing says nothing about the middle, so it isn't believed."""
    told = iter([(5_000, 5_000), (4_000, 3_000)])

    def run_and_kill(root: str, job_id: str) -> tuple[int, int]:
        posted, flushed = next(told)
        with Persistency(root) as p, p.open_job(job_id) as job:
            for number in range(flushed):
                job.put(victim.CATEGORY, *victim.row_of(number))
        return posted, flushed

    monkeypatch.setattr(kill, "_run_and_kill", run_and_kill)
    with Persistency(tmp_path) as p:
        killed = kill.kill_writer(p, "killed")
        assert (killed.posted, killed.flushed, killed.recovered, killed.faults) == (4_000, 3_000, 3_000, [])
        told = iter([(5_000, 5_000)] * 10)
        with pytest.raises(Fault, match="none of them in the middle"):
            kill.kill_writer(p, "killed")


@pytest.mark.parametrize(
    ("posted", "flushed", "recovered", "faults"),
    [
        (100, 50, 50, 0), (100, 50, 99, 0), (100, 50, 101, 0), (100, 50, 49, 1), (100, 50, 102, 1), (0, 0, 0, 0),
    ],
)  # fmt: skip
def test_counts_after_a_kill(posted: int, flushed: int, recovered: int, faults: int) -> None:
    """Fewer rows than were flushed, or more than were posted, is a fault; one put may have been under way."""
    assert len(survival_faults(posted, flushed, recovered)) == faults


def test_rows_after_a_kill_are_an_exact_prefix() -> None:
    """A hole, another payload, and a row that nobody posted are each a fault, and all rows are counted."""
    rows = [victim.row_of(number) for number in range(10)]
    assert prefix_faults(rows, map(victim.row_of, count())) == (10, [])
    assert prefix_faults([], map(victim.row_of, count())) == (0, [])
    for wrong in (
        [*rows[:5], *rows[6:]],
        [*rows[:5], Row(rows[5].key, b"other"), *rows[6:]],
        rows[1:],
        [*rows, Row(key("zzz"), b"")],
    ):
        found, faults = prefix_faults(wrong, rows)
        assert found == len(wrong)
        assert len(faults) == 1


# -- the checks --------------------------------------------------------------------------------------------------


def test_rows_are_compared_with_what_was_posted() -> None:
    """A missing row, one too many, a wrong order and another payload are each a fault."""
    keys: list[Key] = [key(number) for number in range(5)]
    rows = [Row(one, bytes(one)) for one in keys]
    digests = {one: hash(bytes(one)) for one in keys}
    assert rows_faults("it", rows, keys, digests) == []
    assert rows_faults("it", rows[:4], keys, digests) == ["it: 4 rows, not 5"]
    assert rows_faults("it", [*rows, rows[0]], keys, digests) == ["it: 6 rows, not 5"]
    assert rows_faults("it", rows[::-1], keys, digests) == ["it: row 0 is key(4), not key(0)"]
    assert rows_faults("it", [Row(keys[0], b"x"), *rows[1:]], keys, digests) == [
        "it: key(0) has another payload than was posted"
    ]
    assert count_faults("it", 1_000, 1_000) == []
    assert count_faults("it", 999, 1_000) == ["it: 999 rows, not 1,000"]


class Forgetful:
    """A job whose reads miss what was put, or find something else."""

    def __init__(self, answer: bytes | None) -> None:
        self.answer = answer

    def get(self, category: str, one: Key) -> Any:
        return self

    def result(self) -> bytes | None:
        return self.answer


@pytest.mark.parametrize(("answer", "told"), [(None, "didn't find it"), (b"other", "gave another payload")])
def test_reads_beside_the_stream_are_checked(answer: bytes | None, told: str) -> None:
    """A read that doesn't give what was posted before it is a fault, and the reader ends."""
    posted = Posted(records=1, digests={key("a"): hash(b"a")}, keys=[key("a")])
    job: Any = Forgetful(answer)
    beside = Beside(job, "records", posted)
    beside.start()
    beside.stop()
    [fault] = beside.faults
    assert told in fault


def test_reads_beside_the_stream_may_be_overtaken(tmp_path: Path) -> None:
    """A key that is put again and again gives one of its payloads, each of which is right while the stream goes on."""
    posted = Posted()
    records = [(key(number % 7), encode(number)) for number in range(20_000)]
    with Persistency(tmp_path) as p, p.open_job("again") as job:
        streamed = stream(job, "records", records, posted, lambda _records: None)
        assert streamed.faults == []
        assert streamed.reads >= 1
        assert (posted.records, len(posted.digests)) == (20_000, 7)
        rows = job.scan("records").result()
        assert rows_faults("it", rows, sorted(posted.digests), posted.digests) == []


def test_percentiles() -> None:
    """Percentiles are in milliseconds, and of nothing they are nothing."""
    assert percentile_ms([], 0.5) == 0.0
    assert percentile_ms([0.001], 0.99) == 1.0
    assert percentile_ms([number / 1000 for number in range(101)], 0.99) == 99.0
