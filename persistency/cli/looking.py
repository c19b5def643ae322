"""The commands that only look: `ls`, `stat`, `get`, `scan`, `count`, `watch`.

Rules:
  1. A job is read beside whoever has it open; nothing is made, and nothing of a job is written.
  2. A command reads its arguments, calls what does the work, and shows what came back.

Doesn't know: how anything is done.
"""

from __future__ import annotations

import json
import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import typer

from persistency import Change, FeedTruncated, Misuse, Persistency, Reader, StoredJob
from persistency.cli.arguments import (
    AnyCategory,
    AsJson,
    Category,
    JobId,
    Limit,
    Prefix,
    Root,
    Start,
    Stop,
    TypedKey,
    as_key,
    as_range,
    exclude,
)
from persistency.cli.ending import Fault, say, stopped, told
from persistency.cli.interrupts import Interrupts
from persistency.cli.jsonable import payload_to_json
from persistency.cli.keys import format_key, key_to_json
from persistency.cli.opening import check_there, find, looking_into, reading, why_nothing
from persistency.cli.owners import Owners
from persistency.cli.show import as_size, as_time, show_json, show_line, show_pairs, show_rows, show_table, show_value

_HEADER_BYTES = 64


@told
def ls(root: Root, as_json: AsJson = False) -> None:
    """List the jobs of a root: size, last use, end, and the process that has it open.

    A pipe gets lines: id, bytes, last use and end (both Unix seconds), process; what there isn't is empty.

    Example: persistency ls data
    """
    with Persistency(root) as persistency:
        check_there(root)
        jobs = persistency.stored_jobs()
    owners = Owners()
    if as_json:
        for stored in jobs:
            show_json(_stored_json(stored, owners))
        return
    if not jobs:
        say(f"no jobs in {root}")
        return
    if not sys.stdout.isatty():
        for stored in jobs:
            cells = (stored.bytes, stored.last_used, stored.expires, owners.of(stored))
            show_line((stored.job_id, *("" if cell is None else str(cell) for cell in cells)))
        return
    show_table(
        f"{root}: {len(jobs):,} {'job' if len(jobs) == 1 else 'jobs'}, {as_size(sum(one.bytes for one in jobs))}",
        ("job", "size", "last used", "ends", "open in process"),
        [
            (
                stored.job_id,
                as_size(stored.bytes),
                as_time(stored.last_used, "?"),
                as_time(stored.expires),
                str(owners.of(stored) or ""),
            )
            for stored in jobs
        ],
        " r  r",
    )


@told
def stat(root: Root, job: JobId, as_json: AsJson = False) -> None:
    """Show what there is to know of a job: its files, its categories and their rows, versions, changes, owner.

    A quota isn't among it: it is the service's, given at each opening. `payload bytes` is what it is held against.

    Example: persistency stat data packages
    """
    with Persistency(root) as persistency:
        stored = find(persistency, root, job)
        file_format = None if stored.path is None else _format_of(stored.path)
        owner = Owners().of(stored)
        with reading(persistency, stored) as reader:
            rows = {name: reader.count(name).result() for name in reader.categories().result()}
            numbers = {
                **_stored_json(stored, None),
                "owner": owner,
                "path": None if stored.path is None else str(stored.path),
                "format": file_format,
                "version": reader.version().result(),
                "payload_bytes": reader.storage_used().result(),
                "changes": _kept_changes(reader),
                "categories": [{"category": name, "rows": count} for name, count in rows.items()],
            }
    if as_json:
        show_json(numbers)
        return
    kept = numbers["changes"]
    pairs = [
        ("file", "none" if stored.path is None else str(stored.path)),
        ("file format", "?" if file_format is None else str(file_format)),
        ("bytes of all files", f"{stored.bytes:,}"),
        ("payload bytes", f"{numbers['payload_bytes']:,}"),
        ("last version", f"{numbers['version']:,}"),
        ("changes kept", "none" if kept is None else f"those after version {kept['after']:,}"),
        ("last used", as_time(stored.last_used, "?")),
        ("ends", as_time(stored.expires, "never")),
        ("open in process", "none" if owner is None else str(owner)),
        *((f"rows in {name}", f"{count:,}") for name, count in rows.items()),
    ]
    show_pairs(job, pairs)


@told
def get(
    root: Root,
    job: JobId,
    key: TypedKey,
    category: Category = "records",
    raw: Annotated[bool, typer.Option("--raw", help="The payload's bytes as they are stored.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the value of one key.

    A part of the key that is a number, like 7 or -7, is one; quote a JSON array to say it exactly:
    '["users", "ada", "7"]'. Exit code 1 if there is no such key.

    Example: persistency get data packages games/0ad
    """
    wanted = as_key(key, "KEY")
    exclude(("--raw", raw), ("--json", as_json))
    with looking_into(root, job) as opened:
        payload = opened.get(category, wanted).result()
        if payload is None:
            raise Fault(f"no {wanted!r} in {category!r} of job {job!r}", why_nothing(opened, category, key))
        if raw:
            typer.get_binary_stream("stdout").write(payload)
        else:
            show_value(wanted, payload, as_json=as_json)


@told
def scan(
    root: Root,
    job: JobId,
    category: Category = "records",
    prefix: Prefix = None,
    start: Start = None,
    stop: Stop = None,
    reverse: Annotated[bool, typer.Option("--reverse", "-r", help="From the last key to the first.")] = False,
    limit: Limit = None,
    keys_only: Annotated[bool, typer.Option("--keys-only", "-k", help="Keys without their values.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show rows in the order of their keys.

    A terminal gets a table, a pipe gets lines: the key, a tab, the value as JSON. With --json each line is
    {"key": PARTS, "value": VALUE}; a payload that isn't CBOR is shown as {"base64": TEXT}.

    Example: persistency scan data packages --prefix games --limit 20
    """
    span = as_range(prefix, start, stop)
    page = 256 if limit is None else max(1, min(limit, 256))
    with looking_into(root, job) as opened:
        found = opened.iterate(category, span, reverse=reverse, page=page, keys_only=keys_only)
        rows = ((one, None) if keys_only else one for one in islice(found, limit))
        count = show_rows(rows, as_json=as_json)
        if not count and limit != 0:
            say(f"no rows: {why_nothing(opened, category, prefix)}")


@told
def count(
    root: Root,
    job: JobId,
    category: Category = "records",
    prefix: Prefix = None,
    start: Start = None,
    stop: Stop = None,
    as_json: AsJson = False,
) -> None:
    """Count the rows of a category, of a prefix, or of a range. `stat` counts all categories.

    Example: persistency count data packages --prefix games
    """
    span = as_range(prefix, start, stop)
    with looking_into(root, job) as opened:
        rows = opened.count(category, span).result()
        if as_json:
            show_json({"rows": rows})
        else:
            show_line((str(rows),))
        if not rows:
            say(f"no rows: {why_nothing(opened, category, prefix)}")


@told
def watch(
    root: Root,
    job: JobId,
    category: AnyCategory = None,
    prefix: Prefix = None,
    after: Annotated[
        int | None,
        typer.Option("--after", min=0, metavar="VERSION", help="The changes behind this version; without: from now."),
    ] = None,
    limit: Limit = None,
    interval: Annotated[
        float, typer.Option("--interval", min=0.001, metavar="SECONDS", help="How often to look for changes.")
    ] = 0.2,
    as_json: AsJson = False,
) -> None:
    """Show changes as they are committed, until Ctrl-C, of a job that keeps them (`feed_changes_max`).

    A line is the version, the kind (put, delete, expire, delete_range), the category, the key and the value.

    Example: persistency watch data orders --json
    """
    from persistency.cli.following import begin_at, follow, wanted

    if prefix is not None and category is None:
        raise typer.BadParameter("name the category the keys are of: --category", param_hint="'--prefix'")
    span = as_range(prefix, None, None)
    with looking_into(root, job) as opened:
        seen = begin_at(opened, after)
        say(f"changes of job {job!r} after version {seen}; Ctrl-C ends it")
        left = limit
        try:
            with Interrupts() as interrupts:
                for page in follow(opened, seen, interval) if left != 0 else ():
                    for change in page:
                        interrupts.busy = True  # a change is shown and counted, or neither
                        if (shown := wanted(change, category, span)) is not None:
                            _show_change(shown, as_json=as_json)
                            left = None if left is None else left - 1
                        seen = change.version
                        interrupts.done()
                        if left == 0:
                            return
                    sys.stdout.flush()
        except (KeyboardInterrupt, SystemExit) as stop:
            raise stopped(stop, f"go on with --after {seen}") from None


def _show_change(change: Change, *, as_json: bool) -> None:
    value = None if change.payload is None else payload_to_json(change.payload)
    if as_json:
        line: dict[str, Any] = {
            "version": change.version,
            "kind": change.kind,
            "category": change.category,
            "key": key_to_json(change.key),
        }
        if change.kind == "put":
            line["value"] = value
        if change.kind == "delete_range":
            line["stop"] = None if change.stop is None else key_to_json(change.stop)
        show_json(line)
        return
    cells = [str(change.version), change.kind, change.category, format_key(change.key)]
    if change.kind == "put":
        cells.append(json.dumps(value, ensure_ascii=False))
    if change.kind == "delete_range":
        cells.append("" if change.stop is None else format_key(change.stop))
    show_line(cells)


def _stored_json(stored: StoredJob, owners: Owners | None) -> dict[str, Any]:
    data: dict[str, Any] = {
        "job": stored.job_id,
        "bytes": stored.bytes,
        "last_used": stored.last_used,
        "expires": stored.expires,
    }
    return data if owners is None else data | {"owner": owners.of(stored)}


def _format_of(path: Path) -> int | None:
    """Return the format that a file says it has, in SQLite's header; it is read before anything opens it."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except OSError:
        return None
    return int.from_bytes(header[60:64], "big") if header.startswith(b"SQLite format 3\0") else None


def _kept_changes(reader: Reader) -> dict[str, int] | None:
    """Return behind which version a job keeps its changes, or `None` if it keeps none."""
    try:
        reader.changes(0, 1).result()
    except FeedTruncated as truncated:
        return {"after": truncated.oldest - 1}
    except Misuse:
        return None
    return {"after": 0}
