"""The commands, listed: which there are, in what order help shows them, and what is said of them all.

Rules:
  1. A command lives in one of the rooms `looking`, `changing`, `moving`, `caring` and `demonstrating`. It reads its
     arguments, calls what does the work, and shows what came back.
  2. What is typed wrong is typer's to tell, with exit code 2.

Doesn't know: how anything is done.
"""

from __future__ import annotations

import typer

from persistency.cli.caring import backup, check, compact, drop, purge, restore
from persistency.cli.changing import put, rm
from persistency.cli.demonstrating import demo
from persistency.cli.looking import count, get, ls, scan, stat, watch
from persistency.cli.moving import export, import_

app: typer.Typer = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


@app.callback()
def about() -> None:
    """An embedded, durable, ordered key-value engine: look into its jobs, change them, move them, see it work.

    What only looks reads a job beside whoever has it open. What writes needs the job for itself.

    Exit codes: 0 done; 1 it couldn't be done, or what was asked for isn't there; 2 typed wrong; 3 another process has
    the job; 130 interrupted.
    """


for _name, _panel, _command in (
    ("ls", "Look", ls),
    ("stat", "Look", stat),
    ("get", "Look", get),
    ("scan", "Look", scan),
    ("count", "Look", count),
    ("watch", "Look", watch),
    ("put", "Change", put),
    ("rm", "Change", rm),
    ("import", "Move", import_),
    ("export", "Move", export),
    ("backup", "Keep house", backup),
    ("restore", "Keep house", restore),
    ("check", "Keep house", check),
    ("compact", "Keep house", compact),
    ("drop", "Keep house", drop),
    ("purge", "Keep house", purge),
    ("demo", "See it work", demo),
):
    app.command(_name, rich_help_panel=_panel)(_command)
