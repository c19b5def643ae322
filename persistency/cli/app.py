"""The commands, as they are typed.

Rules:
  1. A command reads its arguments, calls what does the work, and shows what came back; nothing else is in here.
  2. What is typed wrong is typer's to tell, with exit code 2.

Doesn't know: how anything is done.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from typing import Annotated

import typer

from persistency import Job, Key, Persistency
from persistency.cli.demo import KILLED_JOB, STREAM_JOB, Source, demonstrate, show_summary
from persistency.cli.ending import Fault, told
from persistency.cli.intake import take_in
from persistency.cli.keys import as_texts, format_key, parse_key
from persistency.cli.records import RecordFile
from persistency.cli.show import progress, show_json, show_pairs, show_rows, show_value
from persistency.cli.unicode_data import UnicodeData

app = typer.Typer(
    add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown"
)


def _directory(text: str) -> str:
    """Refuse what names no directory; the engine refuses the rest, with its own words."""
    if text in ("", ":memory:"):
        raise typer.BadParameter("pass a directory: what is kept in memory ends with this command")
    return text


Root = Annotated[
    str,
    typer.Argument(metavar="ROOT", help="The directory of the jobs.", show_default=False, callback=_directory),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.", show_default=False)]
Category = Annotated[str, typer.Option("--category", "-c", metavar="NAME", help="The category.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON, for machines.")]
_KEY_HELP = "Slash-separated parts, like games/0ad or users/ada/7, or a JSON array."


@app.callback()
def about() -> None:
    """An embedded, durable, ordered key-value engine: look into its jobs, fill them, see it work.

    Exit codes: 0 done; 1 it couldn't be done, or what was asked for isn't there; 2 typed wrong; 130 interrupted.
    """


@app.command()
@told
def demo(
    root: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help=f"Keep the jobs in this directory; {STREAM_JOB} and {KILLED_JOB} in it are replaced. "
            "Without it: a temporary one.",
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--input", metavar="FILE.jsonl[.gz]", help="Stream the records of this file.")
    ] = None,
    fields: Annotated[
        str | None, typer.Option("--key", metavar="FIELD,FIELD", help="The fields of a record that make its key.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Stream real records through a job, read them back meanwhile, and kill a writer in the middle.

    Every count is checked; if one is off, the exit code is 1. The records are the named characters of Unicode, as
    this Python knows them, or those of a file of JSON lines.
    """
    if (file is None) != (fields is None):
        raise typer.BadParameter("--input and --key go together", param_hint="'--input' / '--key'")
    with _source(file, fields) as source, _kept_or_temporary(root) as directory:
        with progress(source.title, source) as advance:
            summary = demonstrate(directory, source, advance)
        try:
            if as_json:
                show_json(summary.to_json())
            else:
                show_summary(summary)
        finally:  # a fault is one, also where nobody reads the tables
            if summary.faults:
                raise Fault("the demonstration failed", "\n".join(summary.faults[:20]))


@app.command("import")
@told
def import_(
    root: Root,
    job: JobId,
    file: Annotated[
        Path, typer.Argument(metavar="FILE.jsonl[.gz]", help="One JSON object per line.", show_default=False)
    ],
    fields: Annotated[
        str,
        typer.Option("--key", metavar="FIELD,FIELD", help="The fields that make the key.", show_default=False),
    ],
    category: Category = "records",
    as_json: AsJson = False,
) -> None:
    """Put the records of a file into a job, each under the key its fields make.

    The job is made if it isn't there. Where two records have one key, the last one wins; rows with other keys stay. A
    record is stored whole, as CBOR. At a bad line it stops: the records before it are stored.

    Example: persistency import data packages debian-packages.jsonl.gz --key section,package
    """
    names = _fields(fields)
    with closing(RecordFile(file, names)) as source:
        with progress(source.title, source) as advance:
            intake = take_in(root, job, category, source, advance)
        numbers = {"records": intake.records, "keys": intake.keys, "new": intake.new}
        if as_json:
            show_json(numbers | {"seconds": round(intake.seconds, 3)})
            return
        pairs = [
            ("records read", f"{intake.records:,}"),
            ("keys stored", f"{intake.keys:,}"),
            ("of them new", f"{intake.new:,}"),
            ("seconds", f"{intake.seconds:.2f}"),
        ]
        show_pairs(f"{job}: {category}", pairs)


@app.command()
@told
def scan(
    root: Root,
    job: JobId,
    category: Category = "records",
    prefix: Annotated[
        str | None, typer.Option("--prefix", "-p", metavar="PARTS", help=f"Only keys that begin so. {_KEY_HELP}")
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", "-r", help="From the last key to the first.")] = False,
    limit: Annotated[
        int | None, typer.Option("--limit", "-n", min=0, metavar="N", help="At most so many rows.")
    ] = None,
    keys_only: Annotated[bool, typer.Option("--keys-only", "-k", help="Keys without their values.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show rows in the order of their keys.

    A terminal gets a table, a pipe gets lines: the key, a tab, the value as JSON. With --json each line is
    {"key": PARTS, "value": VALUE}; a payload that isn't CBOR is shown as {"base64": TEXT}.

    Example: persistency scan data packages --prefix games --limit 20
    """
    start = _key(prefix, "--prefix") if prefix is not None else None
    page = 256 if limit is None else max(1, min(limit, 256))
    with _existing(root, job) as opened:
        found = opened.iterate(category, prefix=start, reverse=reverse, page=page, keys_only=keys_only)
        rows = ((one, None) if keys_only else one for one in islice(found, limit))
        count = show_rows(rows, as_json=as_json)
        if not count and limit != 0:
            typer.echo(f"no rows: {_why_nothing(opened, category, prefix)}", err=True)


@app.command()
@told
def get(
    root: Root,
    job: JobId,
    key: Annotated[str, typer.Argument(metavar="KEY", help=_KEY_HELP, show_default=False)],
    category: Category = "records",
    raw: Annotated[bool, typer.Option("--raw", help="The payload's bytes as they are stored.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the value of one key.

    A part of the key that is a number, like 7 or -7, is one; quote a JSON array to say it exactly:
    '["users", "ada", "7"]'. Exit code 1 if there is no such key.

    Example: persistency get data packages games/0ad
    """
    wanted = _key(key, "KEY")
    if raw and as_json:
        raise typer.BadParameter("--raw and --json exclude each other", param_hint="'--raw' / '--json'")
    with _existing(root, job) as opened:
        payload = opened.get(category, wanted).result()
        if payload is None:
            raise Fault(f"no {wanted!r} in {category!r} of job {job!r}", _why_nothing(opened, category, key))
        if raw:
            typer.get_binary_stream("stdout").write(payload)
        else:
            show_value(wanted, payload, as_json=as_json)


def _key(text: str, name: str) -> Key:
    try:
        return parse_key(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{name}'") from error


def _fields(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if "" in names:
        message = f"{text!r} has an empty field name; name fields like section,package"
        raise typer.BadParameter(message, param_hint="'--key'")
    return names


@contextmanager
def _source(file: Path | None, fields: str | None) -> Iterator[Source]:
    if file is None or fields is None:
        yield UnicodeData()
        return
    with closing(RecordFile(file, _fields(fields))) as records:
        yield records


@contextmanager
def _kept_or_temporary(root: Path | None) -> Iterator[str]:
    if root is not None:
        yield str(root)
        return
    with tempfile.TemporaryDirectory(prefix="persistency-demo-") as directory:
        yield directory


@contextmanager
def _existing(root: str, job_id: str) -> Iterator[Job]:
    """Open a job that is there; opening any other would make it."""
    with Persistency(root) as persistency:
        ids = [stored.job_id for stored in persistency.stored_jobs()]
        if job_id not in ids:
            has = ", ".join(ids[:20]) + (", ..." if len(ids) > 20 else "")
            raise Fault(
                f"no job {job_id!r} in {root}", f"It has: {has}." if ids else "There are no jobs in it, if it is there."
            )
        with persistency.open_job(job_id) as job:
            yield job


def _why_nothing(job: Job, category: str, typed: str | None) -> str:
    """Say what might have been meant where nothing was found."""
    names = job.categories().result()
    if category not in names:
        return f"Category {category!r} is empty; the job has: {', '.join(names) or 'no rows at all'}."
    other = as_texts(typed) if typed is not None else None
    if other is not None and job.scan_prefix(category, other, limit=1).result():
        return f"Its digits were read as numbers. With texts it is there: '{format_key(other)}'"
    return f"The first key is {format_key(job.scan(category, limit=1).result()[0].key)}"
