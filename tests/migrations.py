"""Origins for the tests of migration: real records written by the real libraries, and compared item by item."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Any

import diskcache
from sqlitedict import SqliteDict

from persistency import Job, Persistency, key
from persistency.codec.values import decode
from persistency.integrations.migration import Diskcache, Origin, Report, Sqlitedict, bring

FOLDER = os.environ.get("PERSISTENCY_DATA")
FAR = 4_000_000_000  # Unix seconds
Expected = dict[tuple[Any, ...], tuple[Any, int | None]]


def real_records() -> Iterator[dict[str, Any]]:
    """Give packages and commits: those of the folder, or others of the same shape."""
    if FOLDER is None:
        random = Random(1)
        for number in cycle(range(1 << 30)):
            text = "é" * random.randrange(300)
            yield {"package": f"p{number:x}", "section": "games", "size": number, "depends": ["libc6", text]}
    for name in ("debian-packages", "commits"):
        with gzip.open(Path(FOLDER or "") / f"{name}.jsonl.gz", "rb") as file:
            yield from map(json.loads, file)


def records(count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give so many records, each with a key of its own; where there are too few they come again as other editions."""
    given = 0
    edition = 0
    while given < count:
        for record in islice(real_records(), count - given):
            given += 1
            yield f"{record.get('package') or record.get('commit')}:{edition}:{given}", record
        edition += 1


def make_diskcache(path: Path, count: int) -> tuple[Expected, int]:
    """Make a cache of so many items, of every kind that diskcache stores; return what has to come, and how many ended.

    Of 100 items 90 are records, which it pickles; 4 are text, 2 bytes, 2 numbers; one has a tuple for a key; one has
    ended. One in ten ends some day. Long ones are in files of their own.
    """
    expected: Expected = {}
    ended = 0
    with diskcache.Cache(str(path), eviction_policy="none", cull_limit=0) as cache, cache.transact():
        for number, (name, record) in enumerate(records(count)):
            kind = number % 100
            found: Any = name
            value: Any = record
            if kind < 4:
                value = json.dumps(record) * (1 if kind else 20)
            elif kind < 6:
                value = json.dumps(record).encode() * (1 if kind == 4 else 20)
            elif kind < 8:
                value = number if kind == 6 else number / 7
            elif kind == 8:
                found = ("page", number)
            elif kind == 9:
                cache.set(name, value, expire=-1)
                ended += 1
                continue
            ends = FAR + number if number % 10 == 3 else None
            cache.set(found, value, expire=None if ends is None else ends - time.time())
            expected[found if isinstance(found, tuple) else (found,)] = (value, ends)
    return expected, ended


def make_sqlitedict(path: Path, count: int) -> Expected:
    """Make a file of so many items in one table."""
    expected: Expected = {}
    with SqliteDict(str(path), tablename="packages", outer_stack=False) as table:
        batch: dict[str, Any] = {}
        for name, record in records(count):
            batch[name] = record
            expected[(name,)] = (record, None)
            if len(batch) == 5_000:
                table.update(batch)
                batch = {}
        table.update(batch)
        table.commit()
    return expected


def differences(job: Job, category: str, expected: Expected) -> list[str]:
    """Compare every row of a category with what has to be there; return what is wrong."""
    wrong = []
    rows = {entry.key: entry for entry in job.snapshot(category).result()}
    for parts, (value, ends) in expected.items():
        entry = rows.pop(key(*parts), None)
        if entry is None:
            wrong.append(f"{parts} isn't there")
        elif (found := decode(entry.payload)) != value or type(found) is not type(value):
            wrong.append(f"{parts} has another value")
        elif (entry.expires_ms is None) != (ends is None) or abs((entry.expires_ms or 0) - (ends or 0) * 1000) > 1_000:
            wrong.append(f"{parts} ends at {entry.expires_ms} ms, not at {ends} s")
    return [*wrong, *(f"{found!r} is there" for found in rows)]


def digests(path: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below a path, or of the one that it is."""
    files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@contextmanager
def brought(root: Path, origin: Origin, **options: Any) -> Iterator[tuple[Job, Report]]:
    """Bring an origin into a new job, and give that with the report."""
    with Persistency(root) as persistency, persistency.open_job("brought") as job:
        yield job, bring(job, origin, **options)


def balance(report: Report) -> int:
    """Return how many items a report doesn't account for."""
    return report.records - report.taken - report.kept - report.ended - report.lost - report.withheld


def check_diskcache(place: Path, count: int) -> Iterable[str]:
    """Make a cache, bring it over, and compare every item; give what is wrong."""
    expected, ended = make_diskcache(place / "cache", count)
    before = digests(place / "cache")
    with brought(place / "root", Diskcache(place / "cache"), unpickle="plain") as (job, report):
        if (report.records, report.taken, report.ended) != (count, len(expected), ended) or report.left:
            yield f"of {count:,} items and {ended:,} ended ones it says {report}"
        yield from differences(job, "records", expected)
    if digests(place / "cache") != before:
        yield "the cache isn't what it was, to the byte"


def check_sqlitedict(place: Path, count: int) -> Iterable[str]:
    """Make a file of sqlitedict, bring it over, and compare every item; give what is wrong."""
    expected = make_sqlitedict(place / "packages.sqlite", count)
    before = digests(place / "packages.sqlite")
    with brought(place / "root", Sqlitedict(place / "packages.sqlite"), unpickle="plain") as (job, report):
        if (report.records, report.taken) != (count, count) or report.left:
            yield f"of {count:,} items it says {report}"
        yield from differences(job, "packages", expected)
    if digests(place / "packages.sqlite") != before:
        yield "the file isn't what it was, to the byte"
