"""The report: a table of ratios against their targets, a table of all figures, and the same as JSON.

Rules:
  1. Every ratio is shown with its spread.
  2. JSON holds every repetition, so that nothing has to be believed, and all that a plot needs.
  3. What wasn't measured is in both, with the reason.

Doesn't know: how anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any, TypeVar

from rich.markup import escape
from rich.table import Table

from benchmarks.harness import Sample, Series
from benchmarks.targets import NOT_ASKED, Judged, Target

COLOURS = {"reached": "green", "floor only": "yellow", "missed": "red", "not measured": "dim"}


Facts = TypeVar("Facts", Sample, Target)


def ratios_table(results: Sequence[Judged]) -> Table:
    """Return the table of targets; of those that nobody asked for only the number, of others the reason, below it."""
    table = Table("case", "beside", "what", "holds", "aim", "measured", "min - max", "verdict", title="Targets")
    table.caption = "\n".join(escape(line) for line in (*held(results), *unmeasured(results)))
    table.caption_justify = "left"
    for judged in results:
        if judged.reason == NOT_ASKED:
            continue
        target = judged.target
        sign = ">=" if target.measure == "speed" else "<="
        table.add_row(
            f"{target.case}, {target.ours}" if target.ours else target.case,
            f"{target.peer}, {target.way}" if target.peer else "-",
            {"speed": "speed", "time": "time", "us": "time"}[target.measure],
            f"{sign} {target.written(target.holds)}",
            target.written(target.aim),
            target.written(judged.median) if judged.values else "",
            f"{target.written(min(judged.values))} - {target.written(max(judged.values))}" if judged.values else "",
            f"[{COLOURS[judged.verdict]}]{judged.verdict}",
        )
    return table


def held(results: Sequence[Judged]) -> list[str]:
    """Return a line that says how many floors have held, if any was measured: a verdict asks every repetition."""
    measured = [judged for judged in results if judged.values]
    by_median = sum(judged.target.meets(judged.median, judged.target.holds) for judged in measured)
    in_every = sum(judged.verdict != "missed" for judged in measured)
    found = f"floors held: {in_every} of {len(measured)} in every repetition, {by_median} by the median"
    return [found] if measured else []


def unmeasured(results: Sequence[Judged]) -> list[str]:
    """Return a line for each reason why targets weren't measured; how many nobody asked for, if there are some."""
    reasons = [judged.reason for judged in results if not judged.values]
    lines = [f"not measured: {reason}" for reason in dict.fromkeys(reasons) if reason != NOT_ASKED]
    if NOT_ASKED in reasons:
        lines.append(f"targets {NOT_ASKED}: {reasons.count(NOT_ASKED)}")
    return lines


def figures_table(series: Sequence[Series]) -> Table:
    """Return the table of all that was measured, in microseconds."""
    table = Table(
        *("case", "contender", "way", "operations", "us each", "min - max", "p50", "p99", "a second", "besides"),
        title="Figures",
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
            ", ".join(f"{name} {_number(value)}" for name, value in one.besides().items()),
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
                "median": judged.median if judged.values else None,
                "min": min(judged.values, default=None),
                "max": max(judged.values, default=None),
                "verdict": judged.verdict,
                "reason": judged.reason,
            }
            for judged in results
        ],
    }


def from_json(report: dict[str, Any]) -> tuple[list[Series], list[Judged]]:
    """Return the figures and the targets of a report. Raises `KeyError` or `TypeError` for what isn't one."""
    series = [
        Series(one["case"], one["contender"], one["way"], [_read(Sample, sample) for sample in one["samples"]])
        for one in report["figures"]
    ]
    results = [Judged(_read(Target, one), one["values"], one.get("reason", "")) for one in report["targets"]]
    return series, results


def _read(kind: type[Facts], given: dict[str, Any]) -> Facts:
    """Return a dataclass again; a report of another age may know more or less."""
    return kind(**{field.name: given[field.name] for field in fields(kind) if field.name in given})


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
