"""The commands that change rows: `put`, `rm`.

Rules:
  1. What was changed is committed, and on the medium, when the command ends.
  2. More than one row is deleted only when a person has agreed.

Doesn't know: how anything is done.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from persistency import Delete, DeleteRange, Job, Key, KeyRange, Misuse, Op, Put, RawKey
from persistency import key as key_of
from persistency.cli.arguments import (
    AsJson,
    Category,
    JobId,
    Prefix,
    Root,
    Start,
    Stop,
    TypedKey,
    Yes,
    as_key,
    as_range,
    as_ttl,
    exclude,
)
from persistency.cli.asking import ask
from persistency.cli.ending import Fault, told
from persistency.cli.jsonable import loads, payload_from_json
from persistency.cli.keys import format_key, key_to_json
from persistency.cli.opening import having, looking_into
from persistency.cli.show import show_json, show_line

_FIRST = RawKey(b"\0")  # the smallest key but the empty one


@told
def put(
    root: Root,
    job: JobId,
    key: TypedKey,
    value: Annotated[
        str | None, typer.Argument(metavar="VALUE", help="The value as JSON, as `get` shows it; - is stdin.")
    ] = None,
    category: Category = "records",
    raw: Annotated[str | None, typer.Option("--raw", metavar="TEXT", help="This text's bytes, as they are.")] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", metavar="FILE", help="This file's bytes, as they are; - is stdin.")
    ] = None,
    ttl: Annotated[
        str | None, typer.Option("--ttl", metavar="TIME", help="It ends after so long: 90, 500ms, 15m, 2h, 7d.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Store one value under a key, whatever was there. The job is made if it isn't there.

    JSON is stored as CBOR, as `import` does it; quote a text: '"text"'. --raw and --file store bytes as they are.

    Examples: persistency put data users users/ada '{"name": "Ada"}'; persistency put data pages home --file home.html
    """
    exclude(("VALUE", value is not None), ("--raw", raw is not None), ("--file", file is not None))
    wanted, seconds = as_key(key, "KEY"), as_ttl(ttl)
    payload = _payload(value, raw, file)
    with having(root, job, make=True) as opened:
        new = not opened.version().result()
        try:
            version = opened.commit(Put(category, wanted, payload, seconds)).result()
        except Misuse as error:
            raise typer.BadParameter(str(error)) from error
        opened.flush(sync=True).result()
    if as_json:
        show_json({"job": job, "category": category, "key": key_to_json(wanted), "version": version})
    else:
        where = f"the new job {job!r} in {root}" if new else f"job {job!r}"
        show_line((f"{format_key(wanted)} is stored in {category!r} of {where}, as version {version}",))


def _payload(value: str | None, raw: str | None, file: Path | None) -> bytes:
    if raw is not None:
        return raw.encode("utf-8", "surrogateescape")
    if file is not None:
        return sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    if value is None:
        raise typer.BadParameter("pass a value as JSON, or --raw TEXT, or --file FILE", param_hint="'VALUE'")
    text: str | bytes = sys.stdin.buffer.read() if value == "-" else value
    try:
        return payload_from_json(loads(text))
    except ValueError as error:
        hint = "a text is quoted twice, '\"like this\"', or stored as it is by --raw"
        raise typer.BadParameter(f"{error}; {hint}", param_hint="'VALUE'") from error


@told
def rm(
    root: Root,
    job: JobId,
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="The key of the row.")] = None,
    category: Category = "records",
    prefix: Prefix = None,
    start: Start = None,
    stop: Stop = None,
    everything: Annotated[bool, typer.Option("--all", help="Every row of the category.")] = False,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Delete one row, or those of a prefix, of a range, or of a whole category.

    More than one row is asked about first. Exit code 1 if there is no row with the key.

    Examples: persistency rm data users users/ada; persistency rm data users --prefix users/ada --yes
    """
    ranged = prefix is not None or start is not None or stop is not None
    exclude(("KEY", key is not None), ("--prefix / --start / --stop", ranged), ("--all", everything))
    if key is None and not ranged and not everything:
        raise typer.BadParameter("say what: a key, --prefix, --start, --stop or --all", param_hint="'KEY'")
    span = as_range(prefix, start, stop)
    if ranged and span.start is None and span.stop is None:
        raise typer.BadParameter("that is every row: say --all", param_hint="'--prefix'")
    if key is not None:
        rows = _remove_one(root, job, category, as_key(key, "KEY"))
    else:
        with looking_into(root, job) as reader:
            found = reader.count(category, span).result()
        what = f"{found:,} {'row' if found == 1 else 'rows'} of {category!r} in job {job!r}"
        if found:
            ask(f"Delete {what}?", yes=yes)
        with having(root, job) as opened:
            rows = _remove_range(opened, category, span) if found else 0
    if as_json:
        show_json({"job": job, "category": category, "rows": rows})
    else:
        show_line((f"{rows:,} {'row' if rows == 1 else 'rows'} deleted",))


def _remove_one(root: str, job_id: str, category: str, key: Key) -> int:
    with having(root, job_id) as job:
        if not job.delete_acked(category, key).result():
            raise Fault(f"no {key!r} in {category!r} of job {job_id!r}", "Look with: persistency scan")
        job.flush(sync=True).result()
    return 1


def _remove_range(job: Job, category: str, span: KeyRange) -> int:
    before = job.count(category, span).result()
    ops: list[Op] = [DeleteRange(category, KeyRange(span.start or _FIRST, span.stop))]
    if span.start is None:
        ops.append(Delete(category, key_of()))
    job.commit(ops).result()
    job.flush(sync=True).result()
    return before
