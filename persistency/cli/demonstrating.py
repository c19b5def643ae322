"""The command that shows the engine at work: `demo`.

Rules:
  1. In a directory of its user it replaces its own two jobs, and nothing else.
  2. A fault is one, and is exit code 1, also where nobody reads the tables.

Doesn't know: how anything is done.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from persistency import JobLocked
from persistency.cli.arguments import AsJson, as_fields
from persistency.cli.ending import Fault, told

if TYPE_CHECKING:
    from persistency.cli.demo import Source

STREAM_JOB = "persistency-demo"
KILLED_JOB = "persistency-demo-killed"


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
    from persistency.cli.demo import demonstrate, show_summary
    from persistency.cli.show import progress, show_json

    with _source(file, as_fields(fields)) as source, _kept_or_temporary(root) as directory:
        try:
            with progress(source.title, source) as advance:
                summary = demonstrate(directory, source, advance)
        except JobLocked as error:  # its jobs are nobody's data: there is no need to wait for them
            raise Fault(str(error), "Another demonstration is under way there; pass another --root.") from error
        try:
            if as_json:
                show_json(summary.to_json())
            else:
                show_summary(summary)
        finally:  # a fault is one, also where nobody reads the tables
            if summary.faults:
                raise Fault("the demonstration failed", "\n".join(summary.faults[:20]))


@contextmanager
def _source(file: Path | None, fields: tuple[str, ...] | None) -> Iterator[Source]:
    if file is None or fields is None:
        from persistency.cli.unicode_data import UnicodeData

        yield UnicodeData()
        return
    from persistency.cli.records import RecordFile

    with closing(RecordFile(file, fields)) as records:
        yield records


@contextmanager
def _kept_or_temporary(root: Path | None) -> Iterator[str]:
    if root is not None:
        yield str(root)
        return
    with tempfile.TemporaryDirectory(prefix="persistency-demo-") as directory:
        yield directory
