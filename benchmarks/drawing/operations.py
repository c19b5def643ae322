"""The plot of the operations: microseconds each of the main cases takes, by contender.

Rules:
  1. Every way of a contender has its bar: none stands for another one.
  2. All bars share one scale, which is logarithmic: equal lengths are equal times in every case.

Doesn't know: how anything is measured, who takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.contenders import OURS as OURSELVES
from benchmarks.drawing.sheet import (
    INK,
    MARGIN,
    OURS,
    PEER,
    SMALL,
    SOFT,
    TEXT,
    Sheet,
    logarithmic,
    number,
    origin,
    wide,
)
from benchmarks.harness import Series

# Two columns: what writes, what reads.
COLUMNS = (("put", "commit", "acommit"), ("get", "aget", "scan"))
ROW = 0.2  # inches, as all below
HEAD = 0.62
TITLE = 0.34  # of a group, above its bars
GAP = 0.16  # below them
FOOT = 0.62
WIDTH_MIN = 9.2  # what the line below needs
BARS = 2.8
VALUE = 0.7  # beside the longest bar, and what keeps two columns apart


def plot(series: Sequence[Series], report: dict[str, Any]) -> Figure | None:
    """Draw the main cases as groups of bars; `None` if none was measured."""
    cases = report.get("settings", {}).get("cases", {})
    rows = {name: case.get("rows", 1) for name, case in cases.items()}
    columns = [[group for case in column if (group := _fastest_first(series, case))] for column in COLUMNS]
    columns = [column for column in columns if column]
    if not columns:
        return None
    height = max(sum(TITLE + ROW * len(group) + GAP for group in column) for column in columns)
    bars = [one for column in columns for group in column for one in group]
    labels = max(wide(_who(one), SMALL, bold=True) for one in bars) + 0.1
    width = max(2 * MARGIN + (labels + BARS + VALUE) * len(columns), WIDTH_MIN)
    sheet = Sheet(width, HEAD + height + FOOT, "Microseconds per operation (less is better)", origin(report))
    every = [sample.us / rows.get(one.case, 1) for one in bars for sample in one.samples]
    limits = (0.6 * min(every), 1.1 * max(every))
    for at, column in enumerate(columns):
        left = MARGIN + (labels + BARS + VALUE) * at
        top = HEAD
        for group in column:
            case = group[0].case
            _title(sheet, left, top + TITLE / 2, case, cases.get(case, {}))
            axes = sheet.axes(left + labels, top + TITLE, BARS, ROW * len(group))
            _bars(axes, group, rows.get(case, 1), limits, marked=group is column[-1])
            top += TITLE + ROW * len(group) + GAP
    return sheet.figure


def _fastest_first(series: Sequence[Series], case: str) -> list[Series]:
    return sorted((one for one in series if one.case == case), key=lambda one: one.us)


def _who(one: Series) -> str:
    return f"{one.contender}, {one.way}"


def _title(sheet: Sheet, left: float, top: float, case: str, known: dict[str, Any]) -> None:
    """Write what a group is about, in the case's own words."""
    per_row = "; per row" if known.get("rows", 1) > 1 else ""
    sheet.text(left, top, case, weight="bold")
    said = f"{known.get('what', '')}{per_row}"
    sheet.text(left + wide(case, TEXT, bold=True) + 0.12, top, said, size=SMALL, color=SOFT)


def _bars(axes: Axes, group: Sequence[Series], rows: int, limits: tuple[float, float], *, marked: bool) -> None:
    """Draw a bar for each way, with its spread and its median."""
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    axes.set_ylim(len(group) - 0.5, -0.5)
    axes.grid(axis="x")
    logarithmic(axes.xaxis, unit=" µs")
    axes.tick_params(axis="x", labelbottom=marked, labelsize=SMALL)
    axes.set_yticks(range(len(group)), [_who(one) for one in group], size=SMALL)
    for at, one in enumerate(group):
        ours = one.contender == OURSELVES
        every = [sample.us / rows for sample in one.samples]
        us = one.us / rows
        axes.barh(
            at, us - limits[0], left=limits[0], height=0.72, color=OURS if ours else PEER, gid=f"bar-{one.case}-{at}"
        )
        axes.plot((min(every), max(every)), (at, at), color=INK, linewidth=1)
        look: dict[str, Any] = {"weight": "bold"} if ours else {}
        axes.annotate(
            number(us),
            (max(every), at),
            (4, 0),
            textcoords="offset points",
            va="center_baseline",
            size=SMALL,
            annotation_clip=False,
            **look,
        )
        axes.get_yticklabels()[at].set(**look)
