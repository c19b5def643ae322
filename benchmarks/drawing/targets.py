"""The plot of the targets: how many times better than the floor each one is, and how far the aim is.

Rules:
  1. Right of the line is better, whatever is measured: a rate over its floor, a time under it.
  2. A row holds what the table of targets says: the median, its spread over the repetitions, floor, aim.
  3. What is far off is drawn at the edge and written beside it.
  4. A target that was left out has a row which says so; one that nobody asked for has none, but is counted.

Doesn't know: how anything is measured, or judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.contenders import OURS as OURSELVES
from benchmarks.drawing.sheet import (
    INK,
    LINE,
    MARGIN,
    MISSED,
    OURS,
    SHADE,
    SMALL,
    SOFT,
    TEXT,
    Sheet,
    logarithmic,
    number,
    origin,
    wide,
)
from benchmarks.report import unmeasured
from benchmarks.targets import NOT_ASKED, Judged, Target

ROW = 0.235  # inches, as all below
HEAD = 1.0
FOOT = 0.66
WIDTH_MIN = 9.0  # what the line below the chart needs
NOTE = 0.2  # below the chart, if something has to be said there
BETWEEN = 0.22  # columns of words
CHART_WIDTH = 3.7
COLUMNS = {"median": 0.75, "min - max": 1.8, "floor": 2.6, "aim": 3.2}  # where they end, right of the chart
MARKS: dict[str, dict[str, Any]] = {
    "reached": {"marker": "o", "color": OURS, "markerfacecolor": OURS},
    "floor only": {"marker": "o", "color": OURS, "markerfacecolor": "white"},
    "missed": {"marker": "<", "color": MISSED, "markerfacecolor": MISSED},
}
SIZE: dict[str, Any] = {"markersize": 6.5, "markeredgewidth": 1.4}
SAID = {"reached": "aim reached", "floor only": "floor holds in every run", "missed": "floor missed in some run"}
TICKS = (1.0, 2.0, 5.0)
EDGE = 1.04
LIMITS = (0.1, 30.0)  # what lies beyond stands at the edge, with its figure: it would push all others together


def plot(results: Sequence[Judged], report: dict[str, Any]) -> Figure | None:
    """Draw every target that was asked for as a row; `None` if none was."""
    rows = [judged for judged in results if judged.reason != NOT_ASKED]
    if not rows:
        return None
    who = MARGIN + max(wide(judged.target.case, TEXT, bold=True) for judged in rows) + BETWEEN
    chart = who + max(wide(_beside(judged.target), TEXT) for judged in rows) + BETWEEN
    ends = {name: chart + CHART_WIDTH + end for name, end in COLUMNS.items()}
    notes = unmeasured(results)
    height = HEAD + ROW * len(rows) + FOOT + NOTE * len(notes)
    width = max(ends["aim"], WIDTH_MIN) + MARGIN
    sheet = Sheet(width, height, "Targets: how many times better than the floor", origin(report))
    axes = _axes(sheet, chart, rows)
    _explain(sheet, results)
    for name, end in ends.items():
        sheet.text(end, HEAD - 0.13, name, ha="right", size=SMALL, color=SOFT)
    before = ""
    for at, judged in enumerate(rows):
        middle = HEAD + ROW * (at + 0.5)
        if judged.target.case != before:
            sheet.text(MARGIN, middle, judged.target.case, weight="bold")
            if before:
                _rule(sheet, HEAD + ROW * at)
        before = judged.target.case
        sheet.text(who, middle, _beside(judged.target))
        _draw(axes, at, judged)
        _write(sheet, middle, judged, ends)
    for at, note in enumerate(notes):
        sheet.text(MARGIN, HEAD + ROW * len(rows) + 0.37 + NOTE * at, note, size=SMALL, color=SOFT)
    return sheet.figure


def better(target: Target, value: float) -> float:
    """Return how many times better than its floor a value is."""
    return value / target.holds if target.measure == "speed" else target.holds / value


def _limits(rows: Sequence[Judged]) -> tuple[float, float]:
    every = [better(one.target, value) for one in rows for value in (*one.values, one.target.aim)]
    return max(LIMITS[0], min(0.45, 0.85 * min(every))), min(LIMITS[1], max(2.2, 1.15 * max(every)))


def _axes(sheet: Sheet, left: float, rows: Sequence[Judged]) -> Axes:
    """Return the chart's axes, with the floor marked; what lies before it is in the shade."""
    axes = sheet.axes(left, HEAD, CHART_WIDTH, ROW * len(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xscale("log")
    axes.set_xlim(*_limits(rows))
    axes.grid(axis="x")
    logarithmic(axes.xaxis, unit=" x", steps=TICKS)
    axes.tick_params(labelsize=SMALL)
    axes.axvspan(axes.get_xlim()[0], 1, color=SHADE, zorder=0)
    axes.axvline(1, color=INK, linewidth=1.2)
    axes.annotate(
        "floor", (1, 1), (0, 4), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center", size=SMALL
    )
    return axes


def _beside(target: Target) -> str:
    """Return who stands beside us, and which way of ours is meant."""
    if not target.peer:
        return target.ours or "by itself"
    peer = target.way if target.peer == OURSELVES else f"{target.peer}, {target.way}"
    return f"{target.ours}, vs {peer}" if target.ours else f"vs {peer}"


def _rule(sheet: Sheet, top: float) -> None:
    ends = (MARGIN / sheet.width, 1 - MARGIN / sheet.width)
    height = 1 - top / sheet.height
    sheet.figure.add_artist(Line2D(ends, (height, height), color=LINE, linewidth=0.6))


def _draw(axes: Axes, at: int, judged: Judged) -> None:
    """Draw a row: the way to the aim, the spread, the median."""
    target = judged.target
    aim = better(target, target.aim)
    axes.plot((1, aim), (at, at), color=LINE, linewidth=1.5, zorder=2)
    axes.plot((aim, aim), (at - 0.32, at + 0.32), color=INK, linewidth=1.5, zorder=3)
    if not judged.values:
        return
    mark = MARKS[judged.verdict]
    low, high = axes.get_xlim()
    middle = better(target, judged.median)
    shown = min(max(middle, low * EDGE), high / EDGE)
    if shown == middle:
        spread = [better(target, value) for value in (min(judged.values), max(judged.values))]
        axes.plot(spread, (at, at), color=mark["color"], linewidth=2.4, zorder=4, gid=f"spread-{at}")
    else:
        side = 1 if middle < low else -1
        place: dict[str, Any] = {"ha": "left" if side == 1 else "right", "va": "center_baseline"}
        axes.annotate(
            f"{number(middle)} x", (shown, at), (side * 8, 0), textcoords="offset points", size=SMALL, **place
        )
        mark = {**mark, "marker": "<" if side == 1 else ">"}
    axes.plot(shown, at, zorder=5, gid=f"median-{at}", **mark, **SIZE)


def _write(sheet: Sheet, middle: float, judged: Judged, ends: dict[str, float]) -> None:
    """Write the figures of a row."""
    target = judged.target
    sign = "≥" if target.measure == "speed" else "≤"
    said = {"floor": f"{sign} {_written(target, target.holds)}", "aim": _written(target, target.aim)}
    if judged.values:
        said["median"] = _written(target, judged.median)
        low, high = (_written(target, value) for value in (min(judged.values), max(judged.values)))
        same = low.rpartition(" ")[2] == high.rpartition(" ")[2]
        said["min - max"] = f"{low.rpartition(' ')[0] if same else low} - {high}"
    else:
        said["min - max"] = judged.verdict
    for name, text in said.items():
        look = {"weight": "bold"} if name == "median" else {"color": SOFT}
        sheet.text(ends[name], middle, text, ha="right", size=SMALL, **look)


def _written(target: Target, value: float) -> str:
    return target.written(value).replace(" us", " µs")


def _explain(sheet: Sheet, results: Sequence[Judged]) -> None:
    """Write what the marks mean, and how many there are of each."""
    axes = sheet.axes(0, 0.45, sheet.width, 0.3)
    axes.set_axis_off()
    axes.set(xlim=(0, sheet.width), ylim=(-1, 1))
    left = MARGIN + 0.06
    for verdict, mark in MARKS.items():
        axes.plot(left, 0, linestyle="none", **mark, **SIZE)
        said = f"{SAID[verdict]}: {sum(judged.verdict == verdict for judged in results)}"
        sheet.text(left + 0.14, 0.6, said)
        left += 0.14 + wide(said, TEXT) + 0.35
    axes.plot((left, left), (-0.45, 0.45), color=INK, linewidth=1.5)
    sheet.text(left + 0.14, 0.6, "aim")
