"""Jobs on PostgreSQL beside hand-tuned psycopg: `python -m benchmarks.postgres [--rows N] [--gets N] [--repeat N]`.

One run measures all of them, in turn, on one server: the one of `--url`, else the one that `PERSISTENCY_TEST_POSTGRES`
names, else a private one on a socket, started from the machine's binaries with its defaults for what is synced. Beside
them the same is measured of jobs in SQLite files.

The peers are as fast as could be made: rows in arrays by `unnest`, one statement that commits by itself per batch,
prepared statements, the binary protocol, one connection; with batches one after the other, and several under way at
once (pipeline mode). They store the same rows under the same primary key, and nothing else: no versions that are
counted, no lease, no order of reads and writes.

Rules:
  1. Both sides commit with the same `synchronous_commit`: off for durability `process`, on for `power`.
  2. What was put is read back at the end, counted and compared; a wrong result is no figure.
  3. Ratios are of the repetitions, pair by pair; the put's is that to the fastest peer of its repetition.

Doesn't know: how a job stores anything.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Annotated, Any

import psycopg
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.harness import settled_garbage
from benchmarks.machine import facts
from benchmarks.verify import Mismatch
from persistency import Job, Key, Persistency, key

app = typer.Typer(add_completion=False)
out = Console()

OURS, FILES = "persistency, PostgreSQL", "persistency, SQLite"
BATCHES, PIPELINE, BARE, BARE_ASYNC = "psycopg, unnest", "psycopg, unnest, pipeline", "psycopg", "psycopg, async"
CATEGORY = "messages"
BATCH_ROWS = 2_000  # of 250 to 5,000 none was faster by more than the noise
AT_ONCE = 32
CONNECTIONS = 8  # of the async peer for tasks at once; more weren't faster
PAYLOAD_BYTES = 100
Figures = dict[str, list[float]]

_TABLE = (
    "CREATE TABLE {t} (job text NOT NULL, category bytea NOT NULL, key bytea NOT NULL, payload bytea NOT NULL,"
    " version bigint NOT NULL, expires_ms bigint, PRIMARY KEY (job, category, key))"
)
_UPSERT = (
    "INSERT INTO {t} (job, category, key, payload, version) SELECT 'job', %b, u.k, u.p, u.v FROM"
    " unnest(%b::bytea[], %b::bytea[], %b::bigint[]) AS u(k, p, v)"
    " ON CONFLICT (job, category, key) DO UPDATE SET payload = excluded.payload, version = excluded.version"
)
_ONE = (
    "INSERT INTO {t} (job, category, key, payload, version) VALUES ('job', %b, %b, %b, %b)"
    " ON CONFLICT (job, category, key) DO UPDATE SET payload = excluded.payload, version = excluded.version"
)
_GET = "SELECT payload, expires_ms FROM {t} WHERE job = 'job' AND category = %b AND key = %b"


def rows_of(count: int) -> list[tuple[Key, bytes]]:
    """Return the rows: keys of two parts in order, payloads that compress badly."""
    return [(key(f"channel-{number % 50}", number), os.urandom(PAYLOAD_BYTES)) for number in range(count)]


# -- ours ----------------------------------------------------------------------------------------------------------


@contextmanager
def job_at(root: str, durability: str = "process") -> Iterator[Job]:
    """Give a job, open and empty."""
    with Persistency(root) as p, p.open_job(secrets.token_hex(8), durability=durability) as job:  # type: ignore[arg-type]  # one of two
        job.put(CATEGORY, key(""), b"")
        job.flush().result()
        yield job


def put_ours(root: str, durability: str, rows: list[tuple[Key, bytes]]) -> float:
    """Put rows until all are committed; return the seconds."""
    with job_at(root, durability) as job:
        with settled_garbage():
            begun = perf_counter()
            for at, payload in rows:
                job.put(CATEGORY, at, payload)
            job.flush().result()
            took = perf_counter() - begun
        found = {row.key: row.payload for row in job.scan(CATEGORY).result()}
        _compare(found | {}, dict(rows) | {key(""): b""})
    return took


def _compare(found: dict[Any, bytes], expected: dict[Any, bytes]) -> None:
    if found != expected:
        raise Mismatch(f"{len(found)} rows were read back, and they aren't the {len(expected)} that were put")


def fill(job: Job, rows: list[tuple[Key, bytes]]) -> None:
    """Store rows."""
    for at, payload in rows:
        job.put(CATEGORY, at, payload)
    job.flush(sync=True).result()


def get_ours(job: Job, asked: list[tuple[Key, bytes]]) -> float:
    """Get rows in a thread, one after the other; return the seconds."""
    with settled_garbage():
        begun = perf_counter()
        for at, payload in asked:
            if job.get(CATEGORY, at).result() != payload:
                raise Mismatch("a row isn't what was put")
        return perf_counter() - begun


async def aget_ours(job: Job, asked: list[tuple[Key, bytes]], tasks: int) -> float:
    """Get rows in an event loop, by some tasks at once; return the seconds."""

    async def work(share: list[tuple[Key, bytes]]) -> None:
        for at, payload in share:
            if await job.get(CATEGORY, at) != payload:
                raise Mismatch("a row isn't what was put")

    with settled_garbage():
        begun = perf_counter()
        await asyncio.gather(*(work(asked[share::tasks]) for share in range(tasks)))
        return perf_counter() - begun


async def acommit_ours(job: Job, rows: list[tuple[Key, bytes]]) -> float:
    """Commit rows one by one in an event loop; return the seconds."""
    with settled_garbage():
        begun = perf_counter()
        for at, payload in rows:
            job.put(CATEGORY, at, payload)
            await job.flush()
        return perf_counter() - begun


# -- the peers -----------------------------------------------------------------------------------------------------


class Peer:
    """A table of the same rows, and what makes connections to it."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.table = f"bench_{secrets.token_hex(6)}"
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(self._sql(_TABLE))

    def _sql(self, statement: str) -> bytes:
        return statement.replace("{t}", self.table).encode()

    def drop(self) -> None:
        """Remove the table."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute(self._sql("DROP TABLE {t}"))

    def put(self, rows: list[tuple[Key, bytes]], durability: str, *, pipelined: bool) -> float:
        """Put rows in batches until all are committed; return the seconds."""
        statement, category = self._sql(_UPSERT), CATEGORY.encode()
        with psycopg.connect(self.url, autocommit=True) as connection, ExitStack() as stack:
            connection.execute(f"SET synchronous_commit = {'on' if durability == 'power' else 'off'}".encode())
            cursor = connection.cursor(binary=True)
            cursor.execute(statement, (category, [b""], [b""], [0]), prepare=True)
            with settled_garbage():
                begun = perf_counter()
                if pipelined:
                    pipeline = stack.enter_context(connection.pipeline())
                for first in range(0, len(rows), BATCH_ROWS):
                    batch = rows[first : first + BATCH_ROWS]
                    keys, payloads = [bytes(at) for at, _ in batch], [payload for _, payload in batch]
                    versions = list(range(first + 1, first + 1 + len(batch)))
                    cursor.execute(statement, (category, keys, payloads, versions), prepare=True)
                    if pipelined:
                        pipeline.sync()  # each batch commits by itself
                stack.close()
                took = perf_counter() - begun
            found = connection.execute(self._sql("SELECT key, payload FROM {t}")).fetchall()
            _compare(
                {bytes(at): bytes(payload) for at, payload in found}, {bytes(at): p for at, p in rows} | {b"": b""}
            )
        return took

    def get(self, asked: list[tuple[Key, bytes]]) -> float:
        """Get rows in a thread, one after the other; return the seconds."""
        statement, category = self._sql(_GET), CATEGORY.encode()
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.cursor(binary=True)
            cursor.execute(statement, (category, b""), prepare=True)
            with settled_garbage():
                begun = perf_counter()
                for at, payload in asked:
                    cursor.execute(statement, (category, bytes(at)), prepare=True)
                    _check(cursor.fetchone(), payload)
                return perf_counter() - begun

    async def aget(self, asked: list[tuple[Key, bytes]], tasks: int) -> float:
        """Get rows in an event loop, by some tasks at once over a few connections; return the seconds."""
        statement, category = self._sql(_GET), CATEGORY.encode()
        made = [
            await psycopg.AsyncConnection.connect(self.url, autocommit=True) for _ in range(min(tasks, CONNECTIONS))
        ]
        cursors = [connection.cursor(binary=True) for connection in made]
        for cursor in cursors:
            await cursor.execute(statement, (category, b""), prepare=True)
        free: asyncio.LifoQueue[Any] = asyncio.LifoQueue()
        for cursor in cursors:
            free.put_nowait(cursor)

        async def alone(share: list[tuple[Key, bytes]]) -> None:
            for at, payload in share:
                await cursors[0].execute(statement, (category, bytes(at)), prepare=True)
                _check(await cursors[0].fetchone(), payload)

        async def work(share: list[tuple[Key, bytes]]) -> None:
            for at, payload in share:
                cursor = await free.get()
                await cursor.execute(statement, (category, bytes(at)), prepare=True)
                _check(await cursor.fetchone(), payload)
                free.put_nowait(cursor)

        try:
            with settled_garbage():
                begun = perf_counter()
                await asyncio.gather(*((alone if tasks == 1 else work)(asked[at::tasks]) for at in range(tasks)))
                return perf_counter() - begun
        finally:
            for connection in made:
                await connection.close()

    async def acommit(self, rows: list[tuple[Key, bytes]]) -> float:
        """Commit rows one by one in an event loop; return the seconds."""
        statement, category = self._sql(_ONE), CATEGORY.encode()
        async with await psycopg.AsyncConnection.connect(self.url, autocommit=True) as connection:
            await connection.execute("SET synchronous_commit = off")
            cursor = connection.cursor(binary=True)
            await cursor.execute(statement, (category, b"", b"", 0), prepare=True)
            with settled_garbage():
                begun = perf_counter()
                for number, (at, payload) in enumerate(rows):
                    await cursor.execute(statement, (category, bytes(at), payload, number), prepare=True)
                return perf_counter() - begun


def _check(row: Any, payload: bytes) -> None:
    if row is None or row[1] is not None or bytes(row[0]) != payload:
        raise Mismatch("a row isn't what was put")


# -- the cases -----------------------------------------------------------------------------------------------------


def put_case(url: str, place: Path, durability: str, rows: list[tuple[Key, bytes]]) -> dict[str, float]:
    """Put rows until committed, with each; return the seconds of each."""
    found = {OURS: put_ours(url, durability, rows), FILES: put_ours(str(place / durability), durability, rows)}
    for name, pipelined in ((BATCHES, False), (PIPELINE, True)):
        peer = Peer(_bare(url))
        try:
            found[name] = peer.put(rows, durability, pipelined=pipelined)
        finally:
            peer.drop()
    return found


def read_cases(url: str, place: Path, rows: list[tuple[Key, bytes]], gets: int) -> dict[str, dict[str, float]]:
    """Get and commit rows, in threads and in event loops, with each; return the seconds of each by case."""
    step = max(1, len(rows) // gets)
    asked = rows[::step][:gets]
    found: dict[str, dict[str, float]] = {}
    peer = Peer(_bare(url))
    try:
        peer.put(rows, "process", pipelined=True)
        with job_at(url) as job, job_at(str(place / "reads")) as file:
            fill(job, rows)
            fill(file, rows)
            found["get in a thread"] = {OURS: get_ours(job, asked), FILES: get_ours(file, asked), BARE: peer.get(asked)}
            for tasks in (1, AT_ONCE):
                name = "await get" if tasks == 1 else f"await get, {tasks} tasks at once"
                found[name] = {
                    OURS: asyncio.run(aget_ours(job, asked, tasks)),
                    FILES: asyncio.run(aget_ours(file, asked, tasks)),
                    BARE_ASYNC: asyncio.run(peer.aget(asked, tasks)),
                }
            found["await commit of one put"] = {
                OURS: asyncio.run(acommit_ours(job, asked)),
                FILES: asyncio.run(acommit_ours(file, asked)),
                BARE_ASYNC: asyncio.run(peer.acommit(asked)),
            }
    finally:
        peer.drop()
    return found


def measured(url: str, rows: int, gets: int, repeat: int) -> dict[str, dict[str, Any]]:
    """Return, by case, the microseconds an operation took with each, and the ratio of each repetition."""
    results: dict[str, Figures] = {}
    for _ in range(repeat):
        place = Path(tempfile.mkdtemp(prefix="benchmark-"))
        try:
            made = rows_of(rows)
            took: list[tuple[str, int, dict[str, float]]] = []
            for durability in ("process", "power"):
                name = f"put until committed, durability {durability}"
                took.append((name, rows, put_case(url, place, durability, made)))
            took += [(name, gets, found) for name, found in read_cases(url, place, made, gets).items()]
        finally:
            shutil.rmtree(place)
        for name, count, found in took:
            for who, seconds in found.items():
                results.setdefault(name, {}).setdefault(who, []).append(seconds * 1e6 / count)
    return {name: {"us": us, "ratio": ratios(us)} for name, us in results.items()}


def ratios(us: Figures) -> list[float]:
    """Return how fast ours is beside the fastest peer, in each repetition: 1 is as fast, 0.5 half as fast."""
    peers = [times for who, times in us.items() if who not in (OURS, FILES)]
    return [min(pair) / ours for ours, *pair in zip(us[OURS], *peers, strict=True)]


def _bare(url: str) -> str:
    """Return a URL as psycopg knows it: without our parameters."""
    base, _, query = url.partition("?")
    theirs = "&".join(part for part in query.split("&") if part and not part.startswith("persistency_"))
    return f"{base}?{theirs}" if theirs else base


# -- the report ----------------------------------------------------------------------------------------------------

_COLUMNS = (OURS, FILES, BATCHES, PIPELINE, BARE, BARE_ASYNC)


def lines_of(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the table's lines: medians of microseconds, and the ratio to the fastest peer with its spread."""
    lines = []
    for name, found in results.items():
        us = {who: f"{median(times):.1f}" for who, times in found["us"].items()}
        spread = f"{median(found['ratio']):.2f} ({min(found['ratio']):.2f} to {max(found['ratio']):.2f})"
        lines.append([name, *(us.get(who, "") for who in _COLUMNS), spread])
    return lines


def markdown_of(results: dict[str, dict[str, Any]]) -> str:
    """Return the table as it stands in a page."""
    head = ["microseconds per operation", *_COLUMNS, "ours beside the fastest psycopg"]
    rows = [head, ["---"] * len(head), *lines_of(results)]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


@contextmanager
def server_of(url: str | None) -> Iterator[str]:
    """Give the URL of a server; one is started if none is named."""
    named = url or os.environ.get("PERSISTENCY_TEST_POSTGRES")
    if named:
        yield named
        return
    from tests.postgres import Server

    with Server(shared_buffers="256MB", max_wal_size="2GB") as server:
        yield server.url


@app.command()
def main(
    rows: Annotated[int, typer.Option(min=100, help="Rows that are put.")] = 100_000,
    gets: Annotated[int, typer.Option(min=AT_ONCE, help="Rows that are read, or committed one by one.")] = 5_000,
    repeat: Annotated[int, typer.Option(min=1, help="Interleaved repetitions.")] = 5,
    url: Annotated[str | None, typer.Option(help="The server; without it one is started.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
) -> None:
    """Measure jobs on PostgreSQL beside hand-tuned psycopg, and beside jobs in SQLite files."""
    machine = facts(Path(tempfile.gettempdir())) | {"psycopg": psycopg.__version__, "libpq": psycopg.pq.version()}
    machine.pop("durability")
    schema = f"bench_{secrets.token_hex(6)}"
    with server_of(url) as named:
        with psycopg.connect(_bare(named)) as connection:
            machine["server"] = str(connection.execute("SHOW server_version").fetchone()[0])  # type: ignore[index]  # it has a row
        ours = named + ("&" if "?" in named else "?") + f"persistency_schema={schema}"
        try:
            results = measured(ours, rows, gets, repeat)
        except Mismatch as mismatch:
            out.print(f"a wrong result, so nothing counts: {mismatch}", markup=False, highlight=False)
            raise typer.Exit(1) from mismatch
        finally:
            with psycopg.connect(_bare(named), autocommit=True) as connection:
                connection.execute(f"DROP SCHEMA IF EXISTS {schema} CASCADE".encode())
    out.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False, soft_wrap=True)
    _show(results, markdown=markdown)
    if json_file is not None:
        report = {"machine": machine, "rows": rows, "gets": gets, "repeat": repeat, "results": results}
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _show(results: dict[str, dict[str, Any]], *, markdown: bool) -> None:
    if markdown:
        out.print(markdown_of(results), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table(title="microseconds per operation, medians")
    for column in ("", *_COLUMNS, "ours beside the fastest psycopg"):
        table.add_column(column, justify="left" if not column else "right")
    for line in lines_of(results):
        table.add_row(*line)
    out.print(table)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.postgres")
