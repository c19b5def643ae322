"""Crawler: the frontier of a crawl, which knows what to fetch next, from whom and when, in one job.

    frontier = Frontier(persistency.open_job("crawl"))
    frontier.add(["https://example.org/"])
    asyncio.run(crawl(frontier, fetch))     # fetch(url) -> the links of a page; goes on where an earlier run was ended

    python examples/crawler.py [root]       # crawls a made-up web, twice, from the same root

The job's rows:

| category | key | payload |
|---|---|---|
| seen | (url,) | nothing: this address was added once, whatever became of it |
| queue | (host, priority, number) | the address and how often it was handed out, a CBOR map |
| due | (due_ms, host) | nothing; a row for each host that has something in the queue |
| host | (host,) | the due_ms of its row there, a CBOR integer |
| lease | (host,) | the token of who fetches from it just now; ends by itself |
| page | (url,) | when it was fetched, and how many links it has, a CBOR map |
| failed | (url,) | why it was given up, a CBOR map |

Rules:
  1. Each step is one transaction inside the job: an address is in the queue, among the pages or given up, and never in
     two of them, whenever the process is killed.
  2. A host is asked by one worker at a time, and not before `delay` seconds have passed since the last time: its row in
     `due` says when, and the first row of `due` is the host to ask next.
  3. What is handed out stays in the queue, under a lease on its host. If the lease ends before the worker says what
     became of it, it is handed out again; an answer that comes later is refused.
  4. An address that fails goes to the end of its host's queue, and is given up after `tries_max` times.

Doesn't know: HTTP, robots.txt, what a page is. What is the same address is for whoever calls `add` to say.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from secrets import token_bytes
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from persistency import CBOR, Job, Key, Persistency, Reply, Transaction

FAILED_PRIORITY = 1_000_000  # behind all others


class Lease(NamedTuple):
    """An address that was handed out: to be answered with `done` or `failed` before the lease ends."""

    url: str
    priority: int
    tries: int
    place: Key
    token: bytes


class Frontier:
    """What is left to fetch. It keeps nothing itself, so any number of workers in a process may share it.

    `delay`: seconds between two requests to one host. `lease`: seconds after which a worker is taken for dead.
    """

    def __init__(self, job: Job, *, delay: float = 1.0, lease: float = 60.0, tries_max: int = 3) -> None:
        self.job = job
        self._delay_ms = round(delay * 1000)
        self._lease_ms = round(lease * 1000)
        self._tries_max = tries_max

    def add(self, urls: Iterable[str], priority: int = 0) -> Reply[int]:
        """Queue addresses that were never seen, small priorities first; answer how many those are."""
        return self.job.run(self._add, list(urls), priority)

    def take(self) -> Reply[Lease | float | None]:
        """Hand out the next address; or answer after how many seconds to ask again; or `None`: nothing is left."""
        return self.job.run(self._take, token_bytes(8))

    def done(self, lease: Lease, links: Iterable[str] = ()) -> Reply[bool]:
        """Note down that a page was fetched, and queue its links; `False` if the lease is another's by now."""
        return self.job.run(self._done, lease, list(links))

    def failed(self, lease: Lease, reason: str) -> Reply[bool]:
        """Note down that an address can't be fetched now; `False` if the lease is another's by now."""
        return self.job.run(self._failed, lease, reason)

    # -- inside the job, each in one transaction -------------------------------------------------------------------

    def _add(self, tx: Transaction, urls: list[str], priority: int) -> int:
        added = 0
        for url in urls:
            if tx.exists("seen", (url,)):
                continue
            tx.put("seen", (url,), b"")
            self._queue(tx, url, priority, 0)
            added += 1
        return added

    def _queue(self, tx: Transaction, url: str, priority: int, tries: int) -> None:
        host = urlsplit(url).netloc
        number = tx.increment("number", ())
        tx.put("queue", (host, priority, number), CBOR.encode({"url": url, "tries": tries}))
        if not tx.exists("host", (host,)):
            self._set_due(tx, host, tx.now_ms)

    def _set_due(self, tx: Transaction, host: str, due_ms: int) -> None:
        """Move a host's row to another time."""
        before = tx.get("host", (host,))
        if before is not None:
            tx.delete("due", (CBOR.decode(before), host))
        tx.put("host", (host,), CBOR.encode(due_ms))
        tx.put("due", (due_ms, host), b"")

    def _take(self, tx: Transaction, token: bytes) -> Lease | float | None:
        while first := tx.keys("due", limit=1):
            due_ms, host = first[0].parts
            if due_ms > tx.now_ms:
                return float(due_ms - tx.now_ms) / 1000
            waiting = tx.scan_prefix("queue", (host,), limit=1)
            if not waiting:  # the host has nothing left; it is forgotten, for its delay has passed
                tx.delete("due", first[0])
                tx.delete("host", (host,))
                continue
            place, payload = waiting[0]
            found = CBOR.decode(payload)
            found["tries"] += 1
            tx.put("queue", place, CBOR.encode(found))
            # Should this worker die, the host's turn comes again at the moment at which the lease ends.
            tx.put("lease", (host,), token, ttl=self._lease_ms / 1000)
            self._set_due(tx, host, tx.now_ms + self._lease_ms)
            return Lease(str(found["url"]), place.parts[1], found["tries"], place, token)
        return None

    def _done(self, tx: Transaction, lease: Lease, links: list[str]) -> bool:
        if not self._give_back(tx, lease):
            return False
        tx.put("page", (lease.url,), CBOR.encode({"fetched_ms": tx.now_ms, "links": len(links)}))
        self._add(tx, links, lease.priority + 1)
        return True

    def _failed(self, tx: Transaction, lease: Lease, reason: str) -> bool:
        if not self._give_back(tx, lease):
            return False
        if lease.tries < self._tries_max:
            self._queue(tx, lease.url, FAILED_PRIORITY, lease.tries)
        else:
            tx.put("failed", (lease.url,), CBOR.encode({"reason": reason, "tries": lease.tries}))
        return True

    def _give_back(self, tx: Transaction, lease: Lease) -> bool:
        """End a lease, if it is still this one's: the address leaves the queue, the host waits for its delay."""
        host = lease.place.parts[0]
        if not tx.compare_and_set("lease", (host,), lease.token, None):
            return False
        tx.delete("queue", lease.place)
        self._set_due(tx, host, tx.now_ms + self._delay_ms)
        return True


async def crawl(frontier: Frontier, fetch: Callable[[str], Awaitable[Iterable[str]]], workers: int = 4) -> None:
    """Fetch until nothing is left, with so many workers at a time. What `fetch` raises counts as a failure."""
    news = asyncio.Event()  # set when there may be more to do; each gets another one in its place

    async def visit(lease: Lease) -> None:
        try:
            links = await fetch(lease.url)
        except Exception as error:
            await frontier.failed(lease, str(error))
        else:
            await frontier.done(lease, links)

    async def work() -> None:
        nonlocal news
        while True:
            expected = news
            found = await frontier.take()
            if isinstance(found, Lease):
                await visit(found)
                news.set()
                news = asyncio.Event()
            elif found is None:
                return
            else:  # the first host may be asked after so long, unless another one comes in before
                with suppress(TimeoutError):
                    async with asyncio.timeout(found):
                        await expected.wait()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(workers):
            tasks.create_task(work())


class FakeWeb:
    """A web of `hosts` hosts with `pages` pages each, of which some fail at first and one never answers."""

    def __init__(self, hosts: int = 4, pages: int = 8) -> None:
        self._hosts = hosts
        self._pages = pages
        self.asked: dict[str, int] = {}

    def urls(self) -> list[str]:
        """Name all pages there are, the broken one included."""
        return [self._url(host, page) for host in range(self._hosts) for page in range(self._pages)]

    async def fetch(self, url: str) -> list[str]:
        """Give the links of a page."""
        await asyncio.sleep(0)
        tries = self.asked[url] = self.asked.get(url, 0) + 1
        host, page = (int(part[1:]) for part in (urlsplit(url).netloc.removesuffix(".test"), urlsplit(url).path[1:]))
        if page == self._pages - 1 and (host == 0 or tries == 1):
            raise ConnectionError("no answer")
        ahead = [self._url(host, (page + step) % self._pages) for step in (1, 2)]
        return [*ahead, self._url((host + 1) % self._hosts, page)]

    def _url(self, host: int, page: int) -> str:
        return f"https://h{host}.test/p{page}"


def show(job: Job) -> dict[str, Any]:
    """Count what has become of the addresses."""
    return {category: job.count(category).result() for category in ("seen", "queue", "page", "failed")}


def main(root: str) -> None:
    """Crawl a made-up web, saying each page once it is noted down; a run that was killed is gone on with."""
    web = FakeWeb()
    with Persistency(root) as persistency:
        job = persistency.open_job("crawl")
        frontier = Frontier(job, delay=0.01, lease=1.0)
        print("new addresses:", frontier.add(web.urls()[:1]).result())

        async def fetch(url: str) -> list[str]:
            links = await web.fetch(url)
            print("fetched", url, flush=True)
            return links

        asyncio.run(crawl(frontier, fetch))
        print(show(job))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with TemporaryDirectory() as directory:
            main(directory)
            main(directory)  # nothing is left to do
