"""The chat example behind a real server, driven by a real HTTP client: tenants, streams, restarts, kills."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from persistency import Category, Persistency

EXAMPLE = Path(__file__).parent.parent / "examples" / "chat.py"
WAIT = 30.0  # seconds a test waits for what must come


class Server:
    """The example in a process of its own, on a port of its own."""

    def __init__(self, root: Path) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": str(EXAMPLE.parent.parent),
            "CHAT_ROOT": str(root),
            "PORT": "0",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-W", "error::ResourceWarning", str(EXAMPLE)],
            env=environment,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        self.log: list[str] = []
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line)
            if found := re.search(r"running on (http://[\d.:]+)", line):
                break
        else:
            pytest.fail("the server didn't start:\n" + "".join(self.log))
        self.url = f"{found[1]}/tenants"
        self._reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr))  # so that it never waits
        self._reader.start()

    def end(self, number: int) -> int:
        """Send the process a signal and wait for its end; give its return code."""
        self.process.send_signal(number)
        try:
            return self.process.wait(WAIT)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join(WAIT)
            assert self.process.stderr is not None
            self.process.stderr.close()


@contextmanager
def serving(root: Path, ended_by: int = signal.SIGTERM) -> Iterator[Server]:
    """Run the example over a root, end it by a signal, and look that it had nothing to complain about."""
    server = Server(root)
    try:
        yield server
    finally:
        code = server.end(ended_by)
    assert code == -ended_by
    if ended_by == signal.SIGTERM:
        assert "Application shutdown complete" in "".join(server.log)
    assert [line for line in server.log if "Traceback" in line or "Warning" in line] == []


def client(server: Server, tenant: str = "acme") -> httpx.AsyncClient:
    """Give a client of one tenant."""
    return httpx.AsyncClient(base_url=f"{server.url}/{tenant}", timeout=WAIT)


async def sign_up(of: httpx.AsyncClient) -> int:
    """Make a client's tenant; give the status it was answered with."""
    return (await of.put(str(of.base_url).rstrip("/"))).status_code


async def post(to: httpx.AsyncClient, text: str, channel: str = "general") -> dict[str, Any]:
    """Post a message; give what was answered 201."""
    answer = await to.post(f"/channels/{channel}/messages", json={"author": "ada", "text": text})
    assert answer.status_code == 201, answer.text
    message: dict[str, Any] = answer.json()
    return message


async def history(of: httpx.AsyncClient, channel: str = "general") -> list[dict[str, Any]]:
    """Read a channel page by page, to its beginning; give it with the oldest first."""
    found: list[dict[str, Any]] = []
    while True:
        before = {"before": found[-1]["number"]} if found else {}
        page = await of.get(f"/channels/{channel}/messages", params={"limit": 7, **before})
        assert page.status_code == 200, page.text
        found += page.json()
        if len(page.json()) < 7:
            return found[::-1]


@asynccontextmanager
async def following(of: httpx.AsyncClient, **headers: str) -> AsyncIterator[AsyncIterator[dict[str, str]]]:
    """Open the live stream of a channel, and give its events once the server follows."""
    async with of.stream("GET", "/channels/general/live", headers=headers) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = stream.aiter_lines()
        assert await anext(lines) == ": following"
        yield _events(lines)


async def _events(lines: AsyncIterator[str]) -> AsyncIterator[dict[str, str]]:
    event: dict[str, str] = {}
    async for line in lines:
        name, _, value = line.partition(": ")
        if line and name:
            event[name] = value
        elif not line and event:
            yield event
            event = {}


def test_history_and_paging(tmp_path: Path) -> None:
    """Messages come back newest first, page by page, numbered without a gap; what is wrong is refused."""

    async def session(server: Server) -> None:
        async with client(server) as acme:
            assert (await acme.get("/channels/general/messages")).status_code == 404
            assert [await sign_up(acme) for _ in range(2)] == [201, 200]
            assert (await acme.get("/channels/general/messages")).json() == []
            posted = [await post(acme, f"message {number}") for number in range(30)]
            assert [message["number"] for message in posted] == list(range(1, 31))
            assert await history(acme) == posted
            assert (await acme.get("/channels/general/messages?limit=1")).json() == posted[-1:]
            assert (await acme.get("/channels/general/messages?before=1")).json() == []
            assert await history(acme, "general-2") == []
            for wrong in ("limit=0", "limit=1000", "before=0", f"before={'9' * 400}", "before=x"):
                assert (await acme.get(f"/channels/general/messages?{wrong}")).status_code == 422
            for body in ({}, {"author": "", "text": ""}, {"author": "a", "text": "x" * 4_001}):
                assert (await acme.post("/channels/general/messages", json=body)).status_code == 422
            awkward = await post(acme, "no place like it", "%C3%BC%00%25")
            assert await history(acme, "%C3%BC%00%25") == [awkward]
        async with client(server, "no..such") as nobody:
            assert await sign_up(nobody) == 422

    with serving(tmp_path / "root") as server:
        asyncio.run(session(server))
    assert sorted(path.name for path in (tmp_path / "root").glob("*.db")) == ["directory.db", "tenant-acme.db"]


def test_many_clients_of_many_tenants_at_once(tmp_path: Path) -> None:
    """Concurrent posts are numbered once each, and no tenant sees another one's."""
    tenants, clients, each = ["acme", "globex", "initech"], 5, 12

    async def chatter(server: Server, tenant: str, who: int) -> list[dict[str, Any]]:
        async with client(server, tenant) as own:
            return [await post(own, f"{tenant} {who} {number}") for number in range(each)]

    async def session(server: Server) -> None:
        for tenant in tenants:
            async with client(server, tenant) as own:
                assert await sign_up(own) == 201
        tasks = {t: [asyncio.create_task(chatter(server, t, who)) for who in range(clients)] for t in tenants}
        for tenant, chatting in tasks.items():
            answered = [message for task in chatting for message in await task]
            async with client(server, tenant) as own:
                found = await history(own)
            assert [message["number"] for message in found] == list(range(1, clients * each + 1))
            assert found == sorted(answered, key=lambda message: message["number"])
            assert {message["text"].split()[0] for message in found} == {tenant}

    with serving(tmp_path) as server:
        asyncio.run(session(server))


def test_read_marks_and_presence(tmp_path: Path) -> None:
    """A request sees the event that was posted before it; presence ends by itself."""

    async def session(server: Server) -> None:
        async with client(server) as acme:
            assert await sign_up(acme) == 201
            for number in range(5):
                await post(acme, f"message {number}")
            assert (await acme.get("/channels/general/unread/bob")).json() == 5
            assert (await acme.put("/channels/general/read/bob?number=3")).status_code == 202
            assert (await acme.get("/channels/general/unread/bob")).json() == 2
            assert (await acme.get("/channels/general/unread/eve")).json() == 5
            assert (await acme.get("/online")).json() == []
            for user in ("bob", "ada"):
                assert (await acme.put(f"/online/{user}")).status_code == 202
            assert (await acme.get("/online")).json() == ["ada", "bob"]

    with serving(tmp_path) as server:
        asyncio.run(session(server))
    later = datetime.now(UTC) + timedelta(seconds=31)
    with Persistency(tmp_path) as p:
        job = p.open_job("tenant-acme")
        assert {entry.key.parts[0] for entry in job.snapshot("online").result()} <= {"ada", "bob"}
    with Persistency(tmp_path, clock=later.timestamp) as p:
        assert p.open_job("tenant-acme").count("online").result() == 0


def test_an_import_is_numbered_and_whole(tmp_path: Path) -> None:
    """A history from elsewhere takes the next numbers, in its order, with its own times."""
    old = [
        {"author": "old", "text": f"line {n}", "sent": f"2020-01-01T00:{n // 60:02}:{n % 60:02}Z"} for n in range(999)
    ]

    async def session(server: Server) -> None:
        async with client(server) as acme:
            assert await sign_up(acme) == 201
            await post(acme, "before")
            answer = await acme.post("/channels/general/import", json=old)
            assert (answer.status_code, answer.json()) == (201, {"first": 2, "last": 1_000})
            await post(acme, "after")
            found = await history(acme)
            assert [message["number"] for message in found] == list(range(1, 1_002))
            assert [{name: message[name] for name in old[0]} for message in found[1:-1]] == old
            for wrong in ([], [{"author": "a", "text": "b"}], [old[0] | {"sent": "2020-01-01T00:00:00"}]):
                assert (await acme.post("/channels/general/import", json=wrong)).status_code == 422

    with serving(tmp_path) as server:
        asyncio.run(session(server))


def test_a_live_stream_gives_what_is_committed(tmp_path: Path) -> None:
    """A follower gets each message of its channel once, in order; one that was away goes on behind its last event."""

    async def session(server: Server) -> None:
        async with client(server) as acme:
            assert await sign_up(acme) == 201
            await post(acme, "before it followed")
            seen: list[dict[str, str]] = []
            async with following(acme) as events:
                posted = [await post(acme, "one"), await post(acme, "elsewhere", "attic"), await post(acme, "two")]
                seen += [await anext(events), await anext(events)]
            missed = await post(acme, "three")
            async with following(acme, **{"Last-Event-ID": seen[-1]["id"]}) as events:
                last = await post(acme, "four")
                seen += [await anext(events), await anext(events)]
            wanted = [posted[0], posted[2], missed, last]
            assert [httpx.Response(200, text=event["data"]).json() for event in seen] == wanted
            assert {event["event"] for event in seen} == {"message"}
            async with following(acme, **{"Last-Event-ID": "999999"}) as events:  # of another file, perhaps
                assert (await anext(events))["event"] == "truncated"
            assert (await acme.get("/channels/general/live", headers={"Last-Event-ID": "x"})).status_code == 422

    with serving(tmp_path) as server:
        asyncio.run(session(server))


def test_sigterm_ends_streams_and_loses_nothing(tmp_path: Path) -> None:
    """A server that is told to end answers what it has begun, ends its streams and writes what was only posted."""

    async def session(server: Server) -> list[dict[str, Any]]:
        async with client(server) as acme:
            assert await sign_up(acme) == 201
            posted = [await post(acme, f"message {number}") for number in range(20)]
            async with following(acme) as events:
                await acme.put("/channels/general/read/bob?number=20")  # an event, answered before it is committed
                server.process.send_signal(signal.SIGTERM)
                with pytest.raises(StopAsyncIteration):  # an orderly end, no broken connection
                    await asyncio.wait_for(anext(events), WAIT)
        return posted

    with serving(tmp_path) as server:
        posted = asyncio.run(session(server))
    with serving(tmp_path) as server:
        assert asyncio.run(_reread(server)) == posted
    with Persistency(tmp_path) as p:
        assert Category(p.open_job("tenant-acme"), "read").get(("general", "bob")).result() == 20


async def _reread(server: Server) -> list[dict[str, Any]]:
    async with client(server) as acme:
        return await history(acme)


@pytest.mark.parametrize("answers", [1, 40])
def test_what_was_answered_201_survives_kill_9(answers: int, tmp_path: Path) -> None:
    """A server that is killed in the middle of many posts has all it has answered, and numbers without a gap."""
    answered: list[dict[str, Any]] = []

    async def chatter(server: Server, who: int) -> None:
        async with client(server) as acme:
            while True:
                try:
                    answered.append(await post(acme, f"{who} {len(answered)}"))
                except httpx.HTTPError:  # the end
                    return
                if len(answered) >= answers and server.process.poll() is None:
                    server.process.kill()

    async def session(server: Server) -> None:
        async with client(server) as acme:
            assert await sign_up(acme) == 201
        await asyncio.gather(*(chatter(server, who) for who in range(8)))

    with serving(tmp_path, ended_by=signal.SIGKILL) as server:
        asyncio.run(session(server))
    assert len(answered) >= answers
    with serving(tmp_path) as server:
        found = asyncio.run(_reread(server))
        assert [message["number"] for message in found] == list(range(1, len(found) + 1))
        kept = {message["number"]: message for message in found}
        assert [kept.get(message["number"]) for message in answered] == answered
        assert len(found) - len(answered) <= 8  # each client had one that wasn't answered, at the most
        assert asyncio.run(_reread(server)) == found


def test_a_second_server_is_refused(tmp_path: Path) -> None:
    """A root has one owner: another server on it ends at its start, and says whose it is."""
    with serving(tmp_path) as server:
        environment = {**os.environ, "PYTHONPATH": str(EXAMPLE.parent.parent), "CHAT_ROOT": str(tmp_path), "PORT": "0"}
        second = subprocess.run(
            [sys.executable, str(EXAMPLE)], env=environment, capture_output=True, text=True, timeout=WAIT, check=False
        )
        assert second.returncode != 0
        assert "JobLocked" in second.stderr
        assert str(server.process.pid) in second.stderr


def test_the_example_imports_public_names_only() -> None:
    """A reader can copy it: all of persistency that it uses is what the package exports."""
    imported = {line.split()[1] for line in EXAMPLE.read_text().splitlines() if line.startswith("from persistency")}
    assert imported == {"persistency"}
