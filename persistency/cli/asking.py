"""Asking: what deletes or replaces is done only when a person has said yes, on a terminal or by `--yes`.

Rules:
  1. Nothing is open while somebody thinks.
  2. Where nobody can be asked, and `--yes` wasn't typed, the command was typed wrong: exit code 2, and nothing is done.

Doesn't know: what it is about.
"""

from __future__ import annotations

import sys

import typer

from persistency.cli.ending import Fault, stopped
from persistency.cli.show import visible


def ask(question: str, *, yes: bool) -> None:
    """Have a person agree. Raises `Fault` if the answer is no, `BadParameter` if there is nobody to be asked."""
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise typer.BadParameter(
            f"{visible(question)} There is no terminal to ask on: type --yes", param_hint="'--yes'"
        )
    try:
        agreed = typer.confirm(visible(question), err=True)
    except typer.Abort:  # Ctrl-C, or the end of the input
        raise stopped(KeyboardInterrupt(), "nothing was done") from None
    if not agreed:
        raise Fault("nothing was done")
