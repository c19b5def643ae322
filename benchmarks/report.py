"""The report: a table of ratios against their targets, a table of all figures, and the same as JSON.

Rules:
  1. Every ratio is shown with its spread.
  2. JSON holds every repetition, so that nothing has to be believed.

Doesn't know: how anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from benchmarks.harness import Series
from benchmarks.targets import Judged

COLOURS = {"reached": "green", "floor only": "yellow", "missed": "red"}


def ratios_table(results: Sequence[Judged]) -> Table:
    """Return the table of targets."""
    table = Table("case", "beside", "what", "holds", "aim", "measured", "min - max", "verdict", title="Targets")
    for judged in results:
        target = judged.target
        sign = ">=" if target.measure == "speed" else "<="
        table.add_row(
            f"{target.case}, {target.ours}" if target.ours else target.case,
            f"{target.peer}, {target.way}" if target.peer else "-",
            {"speed": "speed", "time": "time", "us": "time"}[target.measure],
            f"{sign} {target.written(target.holds)}",
            target.written(target.aim),
            target.written(judged.median),
            f"{target.written(min(judged.values))} - {target.written(max(judged.values))}",
            f"[{COLOURS[judged.verdict]}]{judged.verdict}",
        )
    return table


def figures_table(series: Sequence[Series]) -> Table:
    """Return the table of all that was measured, in microseconds."""
    table = Table(
        "case", "contender", "way", "operations", "us each", "min - max", "p50", "p99", "a second", title="Figures"
    )
    for column in table.columns[3:]:
        column.justify = "right"
    before = ""
    for one in series:
        if before and one.case != before:
            table.add_section()
        before = one.case
        every = [sample.us for sample in one.samples]
        table.add_row(
            one.case,
            one.contender,
            one.way,
            f"{one.samples[0].operations:,}",
            _number(one.us),
            f"{_number(min(every))} - {_number(max(every))}",
            _number(one.middle("p50_us")),
            _number(one.middle("p99_us")),
            _number(one.middle("per_second")),
        )
    return table


def as_json(
    series: Sequence[Series],
    results: Sequence[Judged],
    machine: dict[str, str | int],
    settings: dict[str, Any],
    left_out: Sequence[str],
) -> dict[str, Any]:
    """Return everything that was measured, ready for `json.dumps`."""
    return {
        "machine": machine,
        "settings": settings,
        "left_out": list(left_out),
        "figures": [{**asdict(one), "us": one.us} for one in series],
        "targets": [
            {
                **asdict(judged.target),
                "values": judged.values,
                "median": judged.median,
                "min": min(judged.values),
                "max": max(judged.values),
                "verdict": judged.verdict,
            }
            for judged in results
        ],
    }


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
