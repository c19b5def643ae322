"""The command that copies a job from one root to another: `copy`.

Rules:
  1. Either root is a directory or the URL of a server, and the job is one that nobody else has meanwhile.
  2. What has rows is not written over, unless that is asked for.
  3. What stops early says what is left, and leaves no copy that looks whole.

Doesn't know: how anything is done.
"""

from __future__ import annotations

from time import monotonic
from typing import Annotated, Any

import typer

from persistency import Persistency
from persistency.cli.arguments import AsJson, JobId, root_given
from persistency.cli.ending import told
from persistency.cli.show import as_size, show_json, show_pairs, working

From = Annotated[
    str,
    typer.Argument(
        metavar="FROM",
        help="Where the job is: a directory, or postgresql://...",
        show_default=False,
        callback=root_given,
    ),
]
To = Annotated[
    str,
    typer.Argument(metavar="TO", help="Where it is to be, likewise.", show_default=False, callback=root_given),
]
As = Annotated[str | None, typer.Option("--as", metavar="ID", help="Its id there, if another.", show_default=False)]
Replace = Annotated[bool, typer.Option("--replace", help="Delete what the job has there, and copy then.")]


@told
def copy(root: From, job: JobId, to: To, new_id: As = None, replace: Replace = False, as_json: AsJson = False) -> None:
    """Copy a job to another root, a directory or a database, and compare every row on both sides.

    The rows keep their keys, payloads and ends, and the order in which they were written; their versions are new
    ones. The job must not be open elsewhere meanwhile. It stays where it was.

    A job that has rows there is left alone, unless --replace is given; a copy that was broken off is begun anew.

    Examples: persistency copy data orders postgresql://db/service;
    persistency copy postgresql://db/service orders backup --as orders-then
    """
    from persistency.cli.comparing import compare
    from persistency.cli.duplicating import Way, duplicate

    way = Way(root, job, to, new_id or job)
    with Persistency(root) as giving, Persistency(to) as taking:
        if (giving.root, way.job_id) == (taking.root, way.new_id):
            raise typer.BadParameter("that is the same job: name another root, or another id", param_hint="'--as'")
        named = f"{job} to {taking.root}"
    started = monotonic()
    copied = duplicate(way, compare, lambda stage: working(f"{stage} {job}", "rows"), replace=replace)
    numbers: dict[str, Any] = {
        "job": way.new_id,
        "rows": copied.rows,
        "bytes": copied.nbytes,
        "categories": copied.categories,
        "sha256": copied.sha256,
        "seconds": round(monotonic() - started, 3),
    }
    if as_json:
        show_json(numbers)
        return
    pairs = [
        ("rows copied, and the same on both sides", f"{copied.rows:,}"),
        ("categories", ", ".join(copied.categories)),
        ("keys and payloads", as_size(copied.nbytes)),
        ("SHA-256 of either", copied.sha256),
        ("seconds", f"{numbers['seconds']:.2f}"),
    ]
    show_pairs(f"{way.new_id}: {named}", pairs)
