"""The commands, listed: which there are, in what order help shows them, and what is said of them all.

Rules:
  1. A command lives in one of the rooms `looking`, `changing`, `moving`, `copying`, `caring` and `demonstrating`. It
     reads its arguments, calls what does the work, and shows what came back.
  2. What is typed wrong is typer's to tell, with exit code 2.

Doesn't know: how anything is done.
"""

from __future__ import annotations

from typing import Annotated

import typer

from persistency import __version__
from persistency.cli.caring import backup, check, compact, drop, purge, restore
from persistency.cli.changing import put, rm
from persistency.cli.copying import copy
from persistency.cli.demonstrating import demo
from persistency.cli.looking import count, get, ls, scan, stat, watch
from persistency.cli.moving import export, import_
from persistency.cli.show import show_line

app: typer.Typer = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode="markdown")


def _show_version(asked: bool) -> None:
    if asked:
        show_line((f"persistency {__version__}",))
        raise typer.Exit


@app.callback()
def about(
    version: Annotated[  # its callback deals with it
        bool, typer.Option("--version", help="Show the version, and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
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
    ("copy", "Move", copy),
    ("backup", "Keep house", backup),
    ("restore", "Keep house", restore),
    ("check", "Keep house", check),
    ("compact", "Keep house", compact),
    ("drop", "Keep house", drop),
    ("purge", "Keep house", purge),
    ("demo", "See it work", demo),
):
    app.command(_name, rich_help_panel=_panel)(_command)
