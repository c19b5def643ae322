"""Events: a log that is appended to, and consumers that go on where they were, in one job.

    log = EventLog(persistency.open_job("events", feed_changes_max=1_000))
    log.append([{"kind": "sold", "what": "apple"}]).result()      # the number of the last event; or await it
    log.consume("totals", count).result()                         # count(tx, event), for each event that is new to it
    async for number, event in log.follow(after=0): ...           # the past, and then what is committed, as it is

    python examples/events.py [root]        # counts the lines of many commits; PERSISTENCY_DATA names real ones

The job's rows:

| category | key | payload |
|---|---|---|
| last | () | the number of the last event, a CBOR integer |
| event | (number,) | the event, a CBOR map |
| position | (consumer,) | the number of the last event it has dealt with, a CBOR integer |

Rules:
  1. An event and its number are written in one transaction: numbers have no gaps, and nothing is put in between later.
  2. A consumer's position moves in the transaction that writes what it has made of the events. So each event has its
     effect exactly once, whenever the process is killed, as long as the effect is in the same job.
  3. An effect elsewhere (a mail, another service) can't be in that transaction. It is made first, and the position is
     moved after it, by `moved`: it happens at least once, and two who work under one name notice.
  4. Whoever follows holds nothing: a slow one costs the log nothing, and one that falls behind what the job keeps of
     its changes reads the events themselves.

Doesn't know: what an event means, how often somebody consumes. `trim` is called by who knows all consumers.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from persistency import CBOR, ChangeFeed, FeedTruncated, Job, KeyRange, Persistency, Reply, Row, Transaction, key

Event = dict[str, Any]


class EventLog:
    """A log of events in a job that was opened with `feed_changes_max`. It keeps nothing itself."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def append(self, events: Iterable[Event], source: str = "", after: int = 0) -> Reply[int]:
        """Add events, all or none, and answer with the number of the last one.

        A `source` that is read from the beginning again, after a crash, is passed over up to where it was: `after` is
        how many of its events come before these, and those that the log has already are left out.
        """
        return self.job.run(_append, [CBOR.encode(event) for event in events], source, after)

    def taken(self, source: str) -> Reply[int]:
        """Ask how many events of a source the log has."""
        return self.position(f"source:{source}")

    def position(self, consumer: str) -> Reply[int]:
        """Ask for the number of the last event a consumer has dealt with."""
        return self.job.get("position", (consumer,)).map(_number)

    def read(self, after: int = 0, limit: int = 256) -> Reply[list[tuple[int, Event]]]:
        """Ask for the first events behind a number."""
        return self.job.scan("event", _behind(after), limit=limit).map(lambda rows: [_event(row) for row in rows])

    def consume(self, consumer: str, effect: Callable[[Transaction, Event], None], limit: int = 256) -> Reply[int]:
        """Have `effect(tx, event)` called for events that are new to a consumer; answer how many there were.

        All of them, what `effect` writes with `tx` and the consumer's new position are one transaction. If `effect`
        raises, nothing has happened, and the reply raises that.
        """
        return self.job.run(_consume, consumer, effect, limit)

    def moved(self, consumer: str, before: int, to: int) -> Reply[bool]:
        """Move a consumer's position, after an effect elsewhere; `False` if it wasn't at `before` any more."""
        return self.job.compare_and_set(
            "position", (consumer,), CBOR.encode(before) if before else None, CBOR.encode(to)
        )

    async def follow(self, after: int = 0) -> AsyncIterator[tuple[int, Event]]:
        """Give the events behind a number, and then those that come, as they are committed; it has no end."""
        while True:
            # First the feed, then the past: what is committed in between is in both, and told apart by its number.
            with ChangeFeed(self.job, "event") as feed:
                async for row in self.job.iterate("event", _behind(after)):
                    number, event = _event(row)
                    yield number, event
                    after = number
                try:
                    async for change in feed:
                        if change.payload is not None and change.key.parts[0] > after:
                            after = change.key.parts[0]
                            yield after, CBOR.decode(change.payload)
                except FeedTruncated:
                    pass  # it has fallen behind: the events themselves are still there

    def trim(self, keep: int = 0) -> Reply[int]:
        """Delete events that every consumer has dealt with, but for the last `keep`; answer how many there were."""
        return self.job.run(_trim, keep)


def _append(tx: Transaction, payloads: list[bytes], source: str, after: int) -> int:
    if source:
        taken = _number(tx.get("position", (f"source:{source}",)))
        if taken < after:
            raise ValueError(f"events {taken + 1} to {after} of source {source!r} were left out")
        payloads = payloads[taken - after :]
        tx.put("position", (f"source:{source}",), CBOR.encode(taken + len(payloads)))
    last = tx.increment("last", (), len(payloads))
    for number, payload in enumerate(payloads, last - len(payloads) + 1):
        tx.put("event", (number,), payload)
    return last


def _consume(tx: Transaction, consumer: str, effect: Callable[[Transaction, Event], None], limit: int) -> int:
    rows = tx.scan("event", _behind(_number(tx.get("position", (consumer,)))), limit=limit)
    for row in rows:
        number, event = _event(row)
        effect(tx, event)
        tx.put("position", (consumer,), CBOR.encode(number))
    return len(rows)


def _trim(tx: Transaction, keep: int) -> int:
    positions = [row for row in tx.scan("position") if not row.key.parts[0].startswith("source:")]
    done = min((_number(row.payload) for row in positions), default=0)
    last = _number(tx.get("last", ()))
    return tx.delete_range_acked("event", KeyRange(stop=key(min(done, last - keep) + 1)))


def _behind(number: int) -> KeyRange:
    return KeyRange(start=key(number + 1))


def _event(row: Row) -> tuple[int, Event]:
    return row.key.parts[0], CBOR.decode(row.payload)


def _number(payload: bytes | None) -> int:
    return 0 if payload is None else int(CBOR.decode(payload))


# -- the demonstration: how many lines were changed, by repository and by folder ----------------------------------


def commits() -> Iterator[Event]:
    """Give commits, each with its files: those of PERSISTENCY_DATA if it is set, else 2,000 that are made up."""
    folder = os.environ.get("PERSISTENCY_DATA")
    if folder:
        with gzip.open(Path(folder) / "commits.jsonl.gz", "rt") as lines:
            yield from map(json.loads, lines)
        return
    chance = random.Random(7)  # noqa: S311  # nothing here is a secret
    for number in range(2_000):
        files = [
            [f"{chance.choice(('src', 'docs', 'tests'))}/f{chance.randrange(50)}", chance.randrange(90), 1]
            for _ in range(3)
        ]
        yield {"repo": chance.choice(("left", "right")), "commit": f"{number:040x}", "files": files}


def count_lines(tx: Transaction, event: Event) -> None:
    """Add a commit's lines to those of its repository and folders."""
    for path, added, removed in event["files"]:
        folder = path.partition("/")[0] if "/" in path else ""
        tx.increment("lines", (event["repo"], folder), (added or 0) + (removed or 0))


def take_in(log: EventLog) -> None:
    """Append all commits, in batches, from where an earlier run was ended."""
    taken = log.taken("commits").result()
    events = islice(commits(), taken, None)
    while batch := list(islice(events, 100)):
        log.append(batch, "commits", taken).result()
        taken += len(batch)
        print("taken in", taken, flush=True)


def main(root: str) -> None:
    """Take commits in, count their lines, and tell the largest folders."""
    with Persistency(root) as persistency:
        log = EventLog(persistency.open_job("events", feed_changes_max=1_000))
        take_in(log)
        while log.consume("lines", count_lines).result():
            print("counted up to", log.position("lines").result(), flush=True)
        totals = [(CBOR.decode(row.payload), *row.key.parts) for row in log.job.scan("lines").result()]
        for lines, repo, folder in sorted(totals, reverse=True)[:5]:
            print(f"{lines:>9} {repo} {folder}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with TemporaryDirectory() as directory:
            main(directory)
