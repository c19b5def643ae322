"""The plots of a report, as SVG that a README can show; from a file by `python -m benchmarks.plots FILE.json DIR`.

Rules:
  1. matplotlib is imported only when plots are asked for; what stands in the way of them is told beforehand, in a line.
  2. A plot is made of a report alone, so that a file gives the plots its run would have given.
  3. Only what was measured is drawn: a plot with nothing in it isn't made, and one that is there already stays.

Doesn't know: how a plot looks, how anything is measured.
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from benchmarks.report import from_json

app = typer.Typer(add_completion=False)
out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


class Hindered(Exception):
    """No plots can be drawn, or not there; the message is one line that says what to do."""


def make_ready(directory: Path) -> None:
    """Make the folder, and see that there is something to draw with. Raises `Hindered`."""
    try:
        import_module("matplotlib")
    except ImportError as error:
        raise Hindered(f"plots can't be drawn: {error}; pip install 'matplotlib>=3.8'") from error
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Hindered(f"plots can't be drawn into {directory}: {error.strerror}; name another folder") from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise Hindered(f"plots can't be drawn into {directory}: nothing may be written there; name another folder")


def draw(report: dict[str, Any], directory: Path) -> list[Path]:
    """Draw what a report, as `as_json` gives it, holds; return the files that were written."""
    from benchmarks.drawing import growth, operations, targets
    from benchmarks.drawing.sheet import styled, write

    series, results = from_json(report)
    written = []
    with styled():
        for name, figure in (
            ("targets", targets.plot(results, report)),
            ("operations", operations.plot(series, report)),
            ("growth", growth.plot(series, report)),
        ):
            if figure is not None:
                written.append(write(figure, directory / f"{name}.svg"))
    return written


def _read(file: Path) -> dict[str, Any]:
    """Return the report in a file. Raises `Hindered`."""
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        from_json(report)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise Hindered(f"{file} is no report of this command; write one by `python -m benchmarks --json`") from error
    return dict(report)


@app.command()
def main(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="What `--json` has written.")],
    directory: Annotated[Path, typer.Argument(file_okay=False, help="Where the plots go.")],
) -> None:
    """Draw the plots of an earlier run."""
    try:
        make_ready(directory)
        written = draw(_read(file), directory)
    except Hindered as hindered:
        err.print(str(hindered), markup=False, highlight=False)
        raise typer.Exit(2) from hindered
    for path in written:
        out.print(str(path), markup=False, highlight=False)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks.plots")
