"""The command: `python -m benchmarks [--case ...] [--contender ...] [--rows ...] [--repeat N] [--json FILE] ...`.

Rules:
  1. This engine always takes part. Without `--contender` everybody does whose package is installed; one that is named
     and isn't installed is an error.
  2. Exit codes: 0, also if a target was missed; 1 if a result was wrong; 2 for a wrong command line, which is told
     before anything is measured.

Doesn't know: how anything is measured.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import plots
from benchmarks.cases import CASES, FULL_CASES
from benchmarks.contenders import OURS, PACKAGES, Missing, load
from benchmarks.harness import Case, Series, run_case
from benchmarks.machine import facts
from benchmarks.pace import Pace
from benchmarks.protocol import Contender
from benchmarks.report import as_json, figures_table, ratios_table
from benchmarks.targets import NOT_ASKED, judged
from benchmarks.verify import Mismatch
from benchmarks.workload import Workload

app = typer.Typer(add_completion=False)
# A report that goes to a file isn't cut at the width of a terminal nobody has.
out = Console(width=None if sys.stdout.isatty() else 160)
err = Console(stderr=True, soft_wrap=True)


def _contenders(names: Sequence[str], left_out: dict[str, str]) -> list[Contender]:
    """Import the contenders asked for, this engine first; without names, all that are installed."""
    found = []
    for name in dict.fromkeys([OURS, *(names or PACKAGES)]):
        if name not in PACKAGES:
            raise typer.BadParameter(f"no contender {name!r}; there are {', '.join(PACKAGES)}")
        try:
            found.append(load(name))
        except Missing as missing:
            err.print(str(missing), markup=False, highlight=False)
            if names:
                raise typer.Exit(2) from missing
            left_out[name] = str(missing)
    return found


def _cases(names: Sequence[str], left_out: dict[str, str], *, full: bool) -> list[Case]:
    """Return the cases asked for; without names all, those that take long only in a `full` run."""
    every = CASES | FULL_CASES
    found = []
    for name in dict.fromkeys([*(names or CASES), *(FULL_CASES if full else ())]):
        if name not in every:
            raise typer.BadParameter(f"no case {name!r}; there are {', '.join(every)}")
        why = every[name].left_out()
        if why is None:
            found.append(every[name])
        else:
            left_out[name] = f"case {name!r} is left out: {why}"
            err.print(left_out[name], markup=False, highlight=False)
    return found


def _measure(
    cases: Sequence[Case], contenders: Sequence[Contender], workload: Workload, repeat: int, parent: Path, pace: Pace
) -> list[Series]:
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    total = repeat * sum(len(case.ways(contender)) for case in cases for contender in contenders)
    series: list[Series] = []
    # The bar is drawn between the measurements only: a thread that draws it would take part in them.
    with Progress(
        *columns, TimeElapsedColumn(), console=err, transient=True, auto_refresh=False, disable=not err.is_terminal
    ) as progress:
        task = progress.add_task("", total=total)

        def step(doing: str) -> None:
            progress.advance(task)
            progress.update(task, description=doing)
            progress.refresh()

        for case in cases:
            series += run_case(case, contenders, workload, repeat, parent=parent, step=step, pace=pace)
    return series


@app.command()
def main(
    case: Annotated[
        list[str] | None, typer.Option(help=f"Measure only this one: {', '.join(CASES | FULL_CASES)}.")
    ] = None,
    contender: Annotated[list[str] | None, typer.Option(help=f"Beside this one: {', '.join(PACKAGES)}.")] = None,
    rows: Annotated[int, typer.Option(min=100, help="Rows to put, and to read from.")] = 200_000,
    payload_bytes: Annotated[int, typer.Option(min=1, help="The size of a payload.")] = 100,
    repeat: Annotated[int, typer.Option(min=1, help="Interleaved repetitions.")] = 5,
    patience: Annotated[
        float,
        typer.Option(min=0, help="Seconds to wait, in all, while the machine is slow, or to measure again."),
    ] = 0.0,
    full: Annotated[
        bool, typer.Option("--full", help=f"Also measure what takes long and gigabytes: {', '.join(FULL_CASES)}.")
    ] = False,
    directory: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="Where the files go; the default is for temporary ones."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write everything measured to this file.")] = None,
    plots_to: Annotated[
        Path | None, typer.Option("--plots", file_okay=False, help="Draw plots (SVG) of it into this folder.")
    ] = None,
) -> None:
    """Measure this engine beside its peers."""
    left_out: dict[str, str] = {}
    contenders = _contenders(contender or [], left_out)
    cases = _cases(case or [], left_out, full=full)
    if plots_to is not None:
        try:
            plots.make_ready(plots_to)
        except plots.Hindered as hindered:
            err.print(str(hindered), markup=False, highlight=False)
            raise typer.Exit(2) from hindered
    parent = Path(tempfile.gettempdir()) if directory is None else directory
    machine, pace = facts(parent), Pace(patience)
    try:
        series = _measure(cases, contenders, Workload(rows, payload_bytes), repeat, parent, pace)
    except Mismatch as mismatch:
        err.print(f"a wrong result, so nothing counts: {mismatch}", markup=False, highlight=False)
        raise typer.Exit(1) from mismatch
    results = list(judged(series, left_out=left_out))
    machine |= pace.facts()
    out.print(", ".join(f"{name} {value}" for name, value in machine.items()), highlight=False)
    out.print(figures_table(series))
    if any(one.reason != NOT_ASKED for one in results):
        out.print(ratios_table(results))
    settings = {
        "rows": rows,
        "payload_bytes": payload_bytes,
        "repeat": repeat,
        "contenders": {one.name: one.settings for one in contenders},
        "cases": {one.name: {"what": one.what, "rows": one.rows} for one in cases},
    }
    report = as_json(series, results, machine, settings, list(left_out.values()))
    if json_file is not None:
        json_file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if plots_to is not None:
        plots.draw(report, plots_to)


if __name__ == "__main__":
    app(prog_name="python -m benchmarks")
