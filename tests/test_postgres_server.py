"""The server that tests share: one for a session, gone with the last of its processes, however that ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import postgres
from tests.postgres import Server, fresh_url, sql, until, url_of

TOP = Path(__file__).parents[1]
USER = "from tests.postgres import postgres_url; print(postgres_url(), flush=True); input()"
SECONDS = 60


def user(session: str) -> tuple[subprocess.Popen[str], str]:
    """Start a process of a session; return it, and the URL that it got."""
    environment = {**os.environ, "PYTEST_XDIST_TESTRUNUID": session, "PYTHONPATH": str(TOP)}
    environment.pop(postgres.NAMED, None)
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", USER], stdin=pipe, stdout=pipe, text=True, env=environment)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def end(process: subprocess.Popen[str], *, kill: bool) -> None:
    """Have a process end, in order or not."""
    if kill:
        process.kill()
    assert process.stdin is not None
    assert process.stdout is not None
    with process.stdin, process.stdout:
        pass
    assert (process.wait(SECONDS) == -signal.SIGKILL) is kill


@pytest.fixture
def binaries() -> None:
    """Skip where there are none."""
    try:
        postgres.binaries()
    except postgres.NoPostgres as error:
        postgres.missing(str(error))


@pytest.mark.usefixtures("binaries")
def test_processes_of_a_session_share_a_server_and_the_last_one_takes_it_along() -> None:
    """Whoever has started it may be killed: the others go on with it; nobody has to stop it."""
    session = os.urandom(8).hex()
    first, url = user(session)
    second, same = user(session)
    assert url == same
    home = Path(url.split("@")[1].split(":")[0].replace("%2F", "/"))
    end(first, kill=True)  # the one that had started it
    assert sql(url, "SELECT 1") == [(1,)]
    third, same = user(session)
    assert url == same
    end(second, kill=True)
    assert sql(url, "SELECT 1") == [(1,)]
    end(third, kill=True)
    until(lambda: not home.exists(), "the server's directory is gone", seconds=SECONDS)
    again, other = user(session)
    assert other not in ("", url)
    end(again, kill=False)


@pytest.mark.usefixtures("binaries")
def test_a_server_of_ones_own_leaves_nothing() -> None:
    """Neither a process nor a file; and it has an order of texts that isn't the one of bytes."""
    with Server(durable=False) as server:
        home, pid = server.home, server.pid
        assert server.sql("SELECT 'a' < 'B', current_setting('listen_addresses')") == [(True, "")]
    assert not home.exists()
    assert pid is not None
    until(lambda: not running(pid), "its process is gone")


@pytest.mark.usefixtures("binaries")
def test_a_standby_has_what_was_answered_and_takes_over() -> None:
    """What a failover is tried with."""
    with Server(durable=False) as first, first.standby() as second:
        first.sql("CREATE TABLE seen (number bigint)")
        for number in range(10):
            first.sql("INSERT INTO seen VALUES (%s)", number)
        first.stop(immediate=True)
        second.promote()
        either = url_of(first, second, target_session_attrs="read-write")
        assert sql(either, "SELECT count(*), max(number) FROM seen") == [(10, 9)]


def running(pid: int) -> bool:
    """Tell whether a process is there, and not merely unburied."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_every_fresh_url_has_a_schema_of_its_own() -> None:
    """Tests beside one another see nothing of each other."""
    first, second = fresh_url(), fresh_url(persistency_lease=1)
    assert first.split("?")[0] == second.split("?")[0] == postgres.postgres_url().split("?")[0]
    assert first != second
    assert second.endswith("&persistency_lease=1")


def test_without_a_server_a_test_is_skipped_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """And fails where a server is needed, as in CI."""
    monkeypatch.delenv(postgres.NEEDED, raising=False)
    monkeypatch.setattr(postgres, "_named", {"why": "there is none"})
    with pytest.raises(pytest.skip.Exception, match="there is none"):
        fresh_url()
    monkeypatch.setenv(postgres.NEEDED, "1")
    with pytest.raises(pytest.fail.Exception, match="there is none"):
        fresh_url()
