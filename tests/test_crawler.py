"""The crawler example: its frontier rule by rule on a clock that stands still, a whole crawl, and a killed one."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import pytest

from examples.crawler import FakeWeb, Frontier, Lease, crawl, show
from persistency import CBOR, Persistency

EXAMPLE = Path(__file__).parent.parent / "examples" / "crawler.py"
WAIT = 30.0


class Clock(Protocol):
    """What the fixture `wall` is."""

    now: float


@pytest.fixture
def frontier(persistency: Persistency) -> Frontier:
    """Give an empty frontier: one second between requests, a minute to answer, three tries."""
    return Frontier(persistency.open_job("crawl"))


def taken(frontier: Frontier) -> Lease:
    """Take an address that must be there."""
    found = frontier.take().result(WAIT)
    assert isinstance(found, Lease), found
    return found


def test_an_address_is_queued_once(frontier: Frontier) -> None:
    """What was seen is never queued again, whatever became of it."""
    assert frontier.add(["https://a/1", "https://a/2", "https://a/1"]).result(WAIT) == 2
    assert frontier.add(["https://a/2", "https://a/3"]).result(WAIT) == 1
    lease = taken(frontier)
    assert frontier.done(lease, ["https://a/1", "https://b/1"]).result(WAIT)
    assert frontier.add(["https://a/1", "https://b/1"]).result(WAIT) == 0
    assert show(frontier.job) == {"seen": 4, "queue": 3, "page": 1, "failed": 0}


def test_small_priorities_come_first_and_links_after_their_page(frontier: Frontier, wall: Clock) -> None:
    """Within a host the order is priority, then age; a page's links have the next priority."""
    frontier.add(["https://a/late"], priority=2)
    frontier.add(["https://a/1", "https://a/2"])
    order = []
    for _ in range(5):
        lease = taken(frontier)
        order.append(lease.url)
        links = ["https://a/link", "https://a/other"] if lease.url == "https://a/1" else []
        assert frontier.done(lease, links).result(WAIT)
        wall.now += 1
    assert order == ["https://a/1", "https://a/2", "https://a/link", "https://a/other", "https://a/late"]
    assert frontier.take().result(WAIT) is None


def test_a_host_is_asked_by_one_at_a_time_and_not_too_often(frontier: Frontier, wall: Clock) -> None:
    """Beside a lease, and for a second after it, a host's other addresses wait; other hosts don't."""
    frontier.add(["https://a/1", "https://a/2", "https://b/1"])
    first = taken(frontier)
    second = taken(frontier)
    assert {first.url, second.url} == {"https://a/1", "https://b/1"}
    assert frontier.take().result(WAIT) == 60.0  # until a lease ends
    assert frontier.done(first if first.url == "https://a/1" else second).result(WAIT)
    assert frontier.take().result(WAIT) == 1.0
    wall.now += 0.999
    assert frontier.take().result(WAIT) == pytest.approx(0.001)
    wall.now += 0.001
    assert taken(frontier).url == "https://a/2"


def test_a_lease_that_ends_is_handed_out_again_and_its_answer_is_refused(frontier: Frontier, wall: Clock) -> None:
    """A worker that died loses its address to the next one; one that was only slow can't answer any more."""
    frontier.add(["https://a/1"])
    slow = taken(frontier)
    wall.now += 59.999
    assert not isinstance(frontier.take().result(WAIT), Lease)
    wall.now += 0.001
    again = taken(frontier)
    assert (again.url, again.tries) == ("https://a/1", 2)
    assert not frontier.done(slow, ["https://a/2"]).result(WAIT)
    assert not frontier.failed(slow, "too late").result(WAIT)
    assert show(frontier.job) == {"seen": 1, "queue": 1, "page": 0, "failed": 0}
    assert frontier.done(again).result(WAIT)
    assert not frontier.done(again).result(WAIT)  # an answer is taken once
    assert show(frontier.job) == {"seen": 1, "queue": 0, "page": 1, "failed": 0}


def test_what_fails_goes_behind_the_others_and_is_given_up_at_last(frontier: Frontier, wall: Clock) -> None:
    """Three tries, each behind what else the host has; then the reason is kept."""
    frontier.add(["https://a/bad", "https://a/good"])
    order = []
    while True:
        found = frontier.take().result(WAIT)
        if found is None:
            break
        if isinstance(found, Lease):
            order.append((found.url, found.tries))
            answer = frontier.done(found) if "good" in found.url else frontier.failed(found, "no answer")
            assert answer.result(WAIT)
        wall.now += 1
    assert order == [("https://a/bad", 1), ("https://a/good", 1), ("https://a/bad", 2), ("https://a/bad", 3)]
    payload = frontier.job.get("failed", ("https://a/bad",)).result(WAIT)
    assert payload is not None
    assert CBOR.decode(payload) == {"reason": "no answer", "tries": 3}
    assert show(frontier.job) == {"seen": 2, "queue": 0, "page": 1, "failed": 1}
    assert frontier.job.count("due").result(WAIT) == frontier.job.count("host").result(WAIT) == 0


def polite(asked: list[tuple[str, float]], delay: float) -> bool:
    """Say whether each host had its rest between two requests, but for what clocks of milliseconds cut off."""
    by_host: dict[str, list[float]] = {}
    for host, at in asked:
        by_host.setdefault(host, []).append(at)
    return all(later - earlier >= delay - 0.002 for times in by_host.values() for earlier, later in pairwise(times))


@pytest.mark.parametrize("workers", [1, 8])
def test_a_crawl_fetches_everything_once_and_politely(workers: int, tmp_path: Path) -> None:
    """All pages that answer are fetched once, the broken one three times, and no host is asked too often."""
    web = FakeWeb()
    asked: list[tuple[str, float]] = []

    async def fetch(url: str) -> list[str]:
        asked.append((url.split("/")[2], asyncio.get_running_loop().time()))
        return await web.fetch(url)

    with Persistency(tmp_path) as p:
        job = p.open_job("crawl")
        frontier = Frontier(job, delay=0.02)
        frontier.add(web.urls()[:1])
        asyncio.run(asyncio.wait_for(crawl(frontier, fetch, workers), WAIT))
        assert sorted(row.key.parts[0] for row in job.scan("page").result(WAIT)) == sorted(set(web.urls()) - {BROKEN})
        assert [k.parts for k in job.keys("failed").result(WAIT)] == [(BROKEN,)]
        assert show(job)["queue"] == 0
    tries = {url: 3 if url == BROKEN else 2 if url.endswith("/p7") else 1 for url in web.urls()}
    assert web.asked == tries
    assert polite(asked, 0.02)
    assert not polite([*asked, asked[-1]], 0.02)  # the yardstick can tell


BROKEN = "https://h0.test/p7"


def start(root: Path, read: Callable[[subprocess.Popen[str]], Any]) -> tuple[int, Any]:
    """Run the example over a root while its output is read; give its return code and what was read."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parent.parent)}
    command = [sys.executable, "-X", "dev", "-W", "error", str(EXAMPLE), str(root)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            found = read(process)
        finally:
            process.kill()
    return process.wait(WAIT), found


def lines(process: subprocess.Popen[str]) -> list[str]:
    """Read a process' output to its end, and wait for that."""
    assert process.stdout is not None
    found = process.stdout.read().splitlines()
    process.wait(WAIT)
    return found


@pytest.mark.parametrize("kill_after", [1, 9, 20])
def test_a_crawl_that_is_killed_goes_on_where_it_was(kill_after: int, tmp_path: Path) -> None:
    """After kill -9 nothing is lost and nothing is noted twice; fetched again is at most what was under way."""

    def read_some(process: subprocess.Popen[str]) -> list[str]:
        assert process.stdout is not None
        found: list[str] = []
        while len(found) < kill_after:
            line = process.stdout.readline()
            assert line, "the crawl ended before it was to be killed"
            found += [line.split()[1]] if line.startswith("fetched") else []
        process.kill()
        return found + [line.split()[1] for line in process.stdout.read().splitlines()]

    code, before = start(tmp_path / "root", read_some)
    assert code == -9
    code, said = start(tmp_path / "root", lines)
    assert code == 0
    after = [line.split()[1] for line in said if line.startswith("fetched")]
    every = set(FakeWeb().urls()) - {BROKEN}
    assert set(before) | set(after) == every
    assert len(set(after)) == len(after)
    assert len(set(before) & set(after)) <= 4  # one for each worker
    assert said[-1] == "{'seen': 32, 'queue': 0, 'page': 31, 'failed': 1}"


def test_the_example_is_a_program(tmp_path: Path) -> None:
    """Without a root it crawls in a directory of its own, twice, and leaves nothing behind."""
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parent.parent), "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-X", "dev", "-W", "error", "-m", "examples.crawler"]
    done = subprocess.run(
        command, cwd=EXAMPLE.parent.parent, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert said[-2:] == ["new addresses: 0", said[-3]]
    assert list(tmp_path.iterdir()) == []
    text = EXAMPLE.read_text()
    assert {line.split()[1] for line in text.splitlines() if line.startswith("from persistency")} == {"persistency"}
