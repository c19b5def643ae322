"""Real records: packages scanned by section, commits streamed as events and read back in time order.

With `PERSISTENCY_DATA` naming a folder that has `debian-packages.jsonl.gz` and `commits.jsonl.gz` they are the records
of these files; the same tests always run on generated records of the same shape.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from persistency import Job, Key, KeyRange, Persistency, key
from tests.loops import InLoop, bounded

WAIT = 60.0
FOLDER = os.environ.get("PERSISTENCY_DATA")
NEEDS_FOLDER = pytest.mark.skipif(FOLDER is None, reason="PERSISTENCY_DATA doesn't name a folder of real records")


@dataclass(frozen=True)
class Records:
    """Records as lines of JSON, and how many lines and different keys there are known to be."""

    lines: list[bytes]
    rows: int
    keys: int

    def decoded(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        """Give each record decoded, and its line."""
        for line in self.lines:
            yield json.loads(line), line


def stored_lines(name: str) -> list[bytes]:
    """Return the lines of a file of the folder."""
    with gzip.open(Path(FOLDER or "") / name, "rb") as file:
        return file.read().splitlines()


def made_packages() -> Records:
    """Make packages of some sections; some stand there in two versions."""
    random = Random(1)
    sections = ["admin", "games", "libs", "libdevel", "non-free/libs", "python", "x11"]
    lines = []
    for number in range(3_000):
        section = sections[random.randrange(len(sections))]
        name = f"{random.choice(['lib', 'python3-', 'x', '0', 'g++-'])}{number:x}"
        for version in ("1.0-1", "1.0-2") if number % 500 == 7 else ("1.0-1",):
            record = {"package": name, "version": version, "section": section, "depends": ["libc6"] * (number % 9)}
            lines.append(json.dumps(record).encode())
    random.shuffle(lines)
    return Records(lines, 3_006, 3_000)


def made_commits() -> Records:
    """Make commits of some repositories, in no order, some in the same second."""
    random = Random(2)
    lines = []
    for number in range(2_000):
        record = {
            "repo": random.choice(["alpha", "alphabet", "beta", "gamma/delta"]),
            "commit": f"{random.getrandbits(160):040x}",
            "time": 1_500_000_000 + random.randrange(1_500),
            "files": [[f"src/{number}.py", random.randrange(500), 0]],
        }
        lines.append(json.dumps(record).encode())
    return Records(lines, 2_000, 2_000)


@pytest.fixture(scope="module", params=[pytest.param("real", marks=NEEDS_FOLDER), "made"])
def packages(request: pytest.FixtureRequest) -> Records:
    """Give packages."""
    if request.param == "made":
        return made_packages()
    return Records(stored_lines("debian-packages.jsonl.gz"), 63_440, 63_436)


@pytest.fixture(scope="module", params=[pytest.param("real", marks=NEEDS_FOLDER), "made"])
def commits(request: pytest.FixtureRequest) -> Records:
    """Give commits."""
    if request.param == "made":
        return made_commits()
    lines = stored_lines("commits.jsonl.gz")
    return Records(lines, 8_752, 8_752)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """Give an empty job on disk."""
    with Persistency(tmp_path) as persistency:
        yield persistency.open_job("records")


def import_packages(job: Job, packages: Records) -> dict[Key, bytes]:
    """Post every package under its section and name; return what has to be there, by a dict."""
    expected: dict[Key, bytes] = {}
    for record, line in packages.decoded():
        k = key(record["section"], record["package"])
        job.put("packages", k, line)
        expected[k] = line
    assert len(packages.lines) == packages.rows
    assert len(expected) == packages.keys
    return expected


def test_packages_become_rows_and_the_last_one_wins(job: Job, packages: Records) -> None:
    """Issue 2: 63,440 records give 63,436 keys, for four packages stand there in two versions; the last one wins."""
    expected = import_packages(job, packages)
    job.flush().result(WAIT)
    assert job.count("packages").result(WAIT) == packages.keys
    rows = job.scan("packages").result(WAIT)
    assert [row.key for row in rows] == sorted(expected)
    assert dict(rows) == expected
    assert job.version().result(WAIT) == packages.rows


def test_a_section_is_exactly_its_packages_in_the_order_of_their_names(job: Job, packages: Records) -> None:
    """Issue 2: `scan_prefix` of each section gives that section's packages and no others, and their keys decode."""
    expected: dict[str, set[str]] = {}
    for k in import_packages(job, packages):
        section, name = k.parts
        expected.setdefault(section, set()).add(name)
    for section, names in expected.items():
        rows = job.scan_prefix("packages", (section,)).result(WAIT)
        assert [row.key.parts for row in rows] == [(section, name) for name in sorted(names, key=str.encode)]
        assert {json.loads(row.payload)["section"] for row in rows} == {section}
    counts = [job.count("packages", KeyRange.prefix((section,))).result(WAIT) for section in expected]
    assert sum(counts) == packages.keys
    assert job.scan_prefix("packages", (min(expected)[:-1],)).result(WAIT) == []


def test_packages_survive_reopening(tmp_path: Path, packages: Records) -> None:
    """What was imported is there in the order it was, when the job is opened again without a flush in between."""
    with Persistency(tmp_path) as persistency, persistency.open_job("packages") as job:
        expected = import_packages(job, packages)
    with Persistency(tmp_path) as persistency, persistency.open_job("packages") as job:
        assert {row.key: row.payload for row in job.iterate("packages", page=1000)} == expected
        assert list(job.iterate("packages", reverse=True, keys_only=True)) == sorted(expected, reverse=True)
        assert job.version().result(WAIT) == packages.rows


def test_commits_stream_in_and_come_back_in_time_order(job: Job, commits: Records, in_loop: InLoop) -> None:
    """Events keyed (repo, time, n), read back while they are streamed: per repository they are in time order."""
    expected: dict[str, list[tuple[int, int, bytes]]] = {}

    async def main() -> None:
        for number, (record, line) in enumerate(commits.decoded()):
            await job.drain()
            k = key(record["repo"], record["time"], number)
            job.put("commits", k, line)
            expected.setdefault(record["repo"], []).append((record["time"], number, line))
            if number % 100 == 0:
                assert await job.get("commits", k) == line
        assert await job.count("commits") == commits.keys

    in_loop(bounded, main)
    assert len(commits.lines) == commits.rows
    for repo, events in expected.items():
        rows = job.scan_prefix("commits", (repo,)).result(WAIT)
        assert [(*row.key.parts[1:], row.payload) for row in rows] == sorted(events)
        times = [json.loads(row.payload)["time"] for row in rows]
        assert times == sorted(times)


def test_a_span_of_time_is_a_range(job: Job, commits: Records) -> None:
    """The commits of one repository between two times are a range, forwards and in reverse, with a limit."""
    for number, (record, line) in enumerate(commits.decoded()):
        job.put("commits", (record["repo"], record["time"], number), line)
    repo = json.loads(commits.lines[0])["repo"]
    times = sorted(record["time"] for record, _ in commits.decoded() if record["repo"] == repo)
    begin, end = times[len(times) // 4], times[len(times) // 2]
    span = KeyRange((repo, begin), (repo, end))
    rows = job.scan("commits", span).result(WAIT)
    assert [row.key.parts[1] for row in rows] == [time for time in times if begin <= time < end]
    assert job.count("commits", span).result(WAIT) == len(rows) > 0
    assert job.scan("commits", span, reverse=True, limit=5).result(WAIT) == rows[::-1][:5]
    assert list(job.iterate("commits", span, page=7)) == rows
    assert job.delete_range_acked("commits", span).result(WAIT) == len(rows)
    assert job.count("commits").result(WAIT) == commits.keys - len(rows)
