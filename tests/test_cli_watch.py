"""`persistency watch`, beside a process that owns the job and writes to it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from persistency import Change, Key, KeyRange, Persistency, key
from persistency.cli.following import wanted
from tests.test_cli import COMMAND, ENVIRONMENT, run

OWNER = """
import sys
from persistency import Persistency, key
from persistency.codec.values import encode
with Persistency(sys.argv[1]) as p, p.open_job("orders", feed_changes_max=100) as job:
    print("open", flush=True)
    for line in sys.stdin:
        exec(line)
        job.flush().result()
        print(job.version().result(), flush=True)
"""


class Owner:
    """A process that has the job `orders` open, and does what it is told."""

    def __init__(self, root: Path) -> None:
        command = [sys.executable, "-c", OWNER, root]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        assert self._hear() == "open"

    def do(self, line: str) -> int:
        """Have it do something; return the job's last version once that is committed."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return int(self._hear())

    def _hear(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def close(self) -> None:
        """Have it close the job and end."""
        self.process.communicate(timeout=60)


class Watching:
    """A `watch` under way, which has said from which version on it follows."""

    def __init__(self, root: Path, *words: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "watch", root, "orders", "--interval", "0.01", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )
        assert self.process.stderr is not None
        self.begun = self.process.stderr.readline()

    def line(self) -> str:
        """Wait for a line."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def end(self) -> tuple[int, str, str]:
        """Type Ctrl-C; return the exit code, what else was shown, and what was said."""
        self.process.send_signal(signal.SIGINT)
        return self.wait()

    def wait(self) -> tuple[int, str, str]:
        """Wait for the end; return the exit code, what else was shown, and what was said."""
        shown, said = self.process.communicate(timeout=60)
        assert "Traceback" not in said
        return self.process.returncode, shown, said


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Owner]:
    """A process that owns the job `orders` in the root `tmp_path`."""
    made = Owner(tmp_path)
    yield made
    made.close()


def test_changes_are_shown_as_they_are_committed(owner: Owner, tmp_path: Path) -> None:
    """From now on each change has a line, while another process owns the job; Ctrl-C says how to go on."""
    before = owner.do("job.put('order', (1,), b'')")
    watching = Watching(tmp_path, "--json")
    assert f"changes of job 'orders' after version {before}" in watching.begun
    owner.do("job.put('order', (2, 'a'), encode({'new': True}))")
    assert json.loads(watching.line()) == {
        "version": 2, "kind": "put", "category": "order", "key": [2, "a"], "value": {"new": True},
    }  # fmt: skip
    owner.do("job.delete('order', (2, 'a'))")
    assert json.loads(watching.line()) == {"version": 3, "kind": "delete", "category": "order", "key": [2, "a"]}
    owner.do("job.delete_prefix('order', (1,))")
    last = json.loads(watching.line())
    assert (last["version"], last["kind"], last["key"]) == (4, "delete_range", [1])
    code, shown, said = watching.end()
    assert (code, shown) == (130, "")
    assert "interrupted: go on with --after 4" in said


def test_it_goes_on_exactly_behind_a_version(owner: Owner, tmp_path: Path) -> None:
    """With --after nothing is missed and nothing comes twice; --limit ends it."""
    for number in range(5):
        owner.do(f"job.put('order', ({number},), encode({number}))")
    ended = run("watch", tmp_path, "orders", "--after", "2", "--limit", "3")
    assert ended.stdout == "3\tput\torder\t2\t2\n4\tput\torder\t3\t3\n5\tput\torder\t4\t4\n"
    assert "no longer keeps" not in ended.stderr
    ended = run("watch", tmp_path, "orders", "--after", "6", code=1)
    assert "there is nothing after 6 yet" in ended.stderr


def test_only_what_is_asked_for_is_shown(owner: Owner, tmp_path: Path) -> None:
    """A category and a prefix leave out all others, and cut a range delete to what it takes of them."""
    owner.do("job.put('order', ('a', 1), b''); job.put('other', ('a', 1), b''); job.put('order', ('b',), b'')")
    owner.do("job.delete_prefix('order', ('a', 1)); job.put('order', ('a', 2), encode(2))")
    ended = run("watch", tmp_path, "orders", "--after", "0", "-n", "3", "-c", "order", "-p", "a")
    assert [line.split("\t")[:4] for line in ended.stdout.splitlines()] == [
        ["1", "put", "order", "a/1"],
        ["4", "delete_range", "order", "a/1"],
        ["5", "put", "order", "a/2"],
    ]


def test_it_sees_a_job_that_somebody_else_opens_later(tmp_path: Path) -> None:
    """Nobody need have the job when it begins, and its owners may come and go."""
    with Persistency(tmp_path) as p, p.open_job("orders", feed_changes_max=100):
        pass
    watching = Watching(tmp_path)
    for number in range(2):
        owner = Owner(tmp_path)
        owner.do(f"job.put('order', ({number},), encode('text'))")
        assert watching.line() == f'{number + 1}\tput\torder\t{number}\t"text"'
        owner.close()
    assert watching.end()[0] == 130


def test_it_ends_when_nobody_reads(owner: Owner, tmp_path: Path) -> None:
    """Whoever stops reading, as `head` does, ends it, also where nothing changes any more."""
    watching = Watching(tmp_path)
    owner.do("job.put('order', (1,), encode(1))")
    assert watching.line() == "1\tput\torder\t1\t1"
    assert watching.process.stdout is not None
    assert watching.process.stderr is not None
    watching.process.stdout.close()
    assert watching.process.stderr.read() == ""
    watching.process.stderr.close()
    assert watching.process.wait(60) == 0


def test_it_says_why_there_is_nothing_to_follow(tmp_path: Path) -> None:
    """A job that keeps no changes, changes that are gone, and a job that goes away are told with what to do."""
    with Persistency(tmp_path) as p, p.open_job("orders") as job:
        job.put("order", (1,), b"")
    assert "have its service open it with feed_changes_max" in run("watch", tmp_path, "orders", code=1).stderr.lower()
    with Persistency(tmp_path) as p, p.open_job("orders", feed_changes_max=2) as job:
        for number in range(5):
            job.put("order", (number,), b"")
        job.flush().result()
        ended = run("watch", tmp_path, "orders", "--after", "0", code=1)
        assert "no longer keeps the changes behind version 0" in ended.stderr
        assert "--after 4" in ended.stderr
        watching = Watching(tmp_path)
        p.drop_job("orders")
        code, _shown, said = watching.wait()
    assert code == 1
    assert "removed" in said


def change(kind: Any, first: Key, stop: Key | None = None) -> Change:
    """Make a change of the category `c`."""
    return Change(1, kind, "c", first, None, stop)


def test_filters() -> None:
    """What is not asked for is left out, and ranges are cut on both sides."""
    span = KeyRange.prefix(("b",))
    put = change("put", key("b", 1))
    assert wanted(put, None, KeyRange()) == wanted(put, "c", span) == put
    assert wanted(put, "d", KeyRange()) is None
    assert wanted(change("put", key("a")), "c", span) is None
    assert wanted(change("put", key("c")), "c", span) is None
    assert wanted(change("delete_range", key("a"), key("b")), "c", span) is None
    assert wanted(change("delete_range", key("c"), None), "c", span) is None
    cut = wanted(change("delete_range", key("a"), None), "c", span)
    assert cut is not None
    assert (cut.key, cut.stop) == (span.start, span.stop)
    whole = change("delete_range", key("b", 1), key("b", 2))
    assert wanted(whole, "c", span) == whole
