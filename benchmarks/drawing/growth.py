"""The plot of growth: what an operation takes with more and more rows stored, one line for each contender and way.

Rules:
  1. A case belongs here if its name begins with `growth` and its samples say the `rows` that were stored. Of a way's
     name this number is left out: `get (autocommit), 10M rows` gives a point of `autocommit` in the panel `get`.
  2. What memory a sample says it took is a panel of its own.
  3. A contender has one colour and one marker in all panels, its further ways broken lines.
  4. Both axes are logarithmic: what doesn't grow lies flat.

Doesn't know: how anything is measured, who takes part.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log10
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from benchmarks.contenders import OURS as OURSELVES
from benchmarks.drawing.sheet import LINES, MARGIN, MARKERS, SMALL, TEXT, Sheet, logarithmic, origin, spread_out, wide
from benchmarks.harness import Series

PREFIX = "growth"
PEAK = "peak MiB"
MEMORY = "memory at its peak, to add the rows before"
UNITS = {MEMORY: " MiB"}
STYLES = ("-", "--", ":", "-.")

ACROSS = 2
HEAD = 0.58  # inches, as all below
TITLE = 0.36
AXIS = 0.7  # what stands to the left of a panel
PANEL_WIDTH = 2.9
PANEL_HEIGHT = 2.5
GAP = 0.5
FOOT = 0.42
WIDTH_MIN = 9.2  # what the line below needs
LABEL_APART = 0.165  # from a label to the next


@dataclass
class Line:
    """A way of a contender, with what was measured at several numbers of rows."""

    contender: str
    way: str
    look: dict[str, Any]
    points: dict[int, list[float]] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """What stands at its end."""
        return f"{self.contender}, {self.way}" if self.way else self.contender

    @property
    def ours(self) -> bool:
        """Whether it is this engine's."""
        return self.contender == OURSELVES


def plot(series: Sequence[Series], report: dict[str, Any]) -> Figure | None:
    """Draw a panel for each kind of operation; `None` if no growth was measured."""
    panels = _panels([one for one in series if one.case.startswith(PREFIX)])
    if not panels:
        return None
    labels = max(wide(line.label, SMALL, bold=line.ours) for lines in panels.values() for line in lines)
    across = min(ACROSS, len(panels))
    cell_width = AXIS + PANEL_WIDTH * 1.08 + labels + 0.3
    most = max(len(lines) for lines in panels.values())
    panel_height = max(PANEL_HEIGHT, most * LABEL_APART)
    cell_height = TITLE + panel_height + GAP
    height = HEAD + cell_height * ceil(len(panels) / across) + FOOT
    width = max(2 * MARGIN + cell_width * across, WIDTH_MIN)
    sheet = Sheet(width, height, "Growth: what it takes with more and more rows stored", origin(report, rows=False))
    for at, (name, lines) in enumerate(panels.items()):
        left = MARGIN + cell_width * (at % across)
        top = HEAD + cell_height * (at // across)
        sheet.text(left, top + TITLE / 2, name, size=TEXT, weight="bold")
        axes = sheet.axes(left + AXIS, top + TITLE, PANEL_WIDTH, panel_height)
        _scale(axes, lines, UNITS.get(name, " µs"))
        for line in lines:
            _draw(axes, line, gid=f"line-{name}-{line.label}")
        _name(axes, lines, LABEL_APART / panel_height)
    return sheet.figure


def _panels(series: Sequence[Series]) -> dict[str, list[Line]]:
    """Return the lines by what was measured, this engine's first."""
    panels: dict[str, dict[tuple[str, str], Line]] = {}
    names = sorted(dict.fromkeys(one.contender for one in series), key=lambda name: name != OURSELVES)

    def add(panel: str, contender: str, way: str, rows: int, value: float) -> None:
        lines = panels.setdefault(panel, {})
        which = sum(line.contender == contender for line in lines.values())
        at = names.index(contender)
        look = {"color": LINES[at % len(LINES)], "marker": MARKERS[at % len(MARKERS)]}
        look["linestyle"] = STYLES[which % len(STYLES)]
        line = lines.setdefault((contender, way), Line(contender, way, look))
        line.points.setdefault(rows, []).append(value)

    for one in series:
        for sample in one.samples:
            if rows := round(sample.more.get("rows", 0)):
                add(*_parted(one, rows), rows, sample.us)
    for one in series:
        for sample in one.samples:
            rows, peak = round(sample.more.get("rows", 0)), sample.more.get(PEAK, 0)
            if rows and peak > 0:
                add(MEMORY, one.contender, "", rows, peak)
    return {name: sorted(lines.values(), key=lambda line: not line.ours) for name, lines in panels.items()}


def _parted(one: Series, rows: int) -> tuple[str, str, str]:
    """Return the panel, the contender and the way a series is about, without the number of rows."""
    number = "|".join((_short(rows), f"{rows:,}", str(rows)))
    way = re.sub(rf"(?:,| at)? ?\b(?:{number})\b(?: rows)?", "", one.way).strip()
    found = re.fullmatch(r"(.+?) \((.+)\)", way)
    return (found[1], one.contender, found[2]) if found else (one.case, one.contender, way)


def _scale(axes: Axes, lines: Sequence[Line], unit: str) -> None:
    """Make room for all points, and mark the numbers of rows there are."""
    stored = sorted({rows for line in lines for rows in line.points})
    every = [value for line in lines for values in line.points.values() for value in values]
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(stored[0] / 1.3, stored[-1] * 1.3)
    axes.set_ylim(min(every) / 1.5, max(every) * 1.5)
    axes.xaxis.set_major_locator(FixedLocator(stored))
    axes.xaxis.set_major_formatter(FixedFormatter([_short(rows) for rows in stored]))
    axes.xaxis.set_minor_locator(NullLocator())
    logarithmic(axes.yaxis, unit=unit, steps=(1.0,) if max(every) / min(every) > 100 else (1.0, 2.0, 5.0))
    axes.tick_params(labelsize=SMALL)
    axes.grid()


def _draw(axes: Axes, line: Line, gid: str) -> None:
    """Draw a line through the medians, with the spread of each."""
    points = sorted(line.points.items())
    rows = [rows for rows, _values in points]
    colour = line.look["color"]
    axes.vlines(rows, [min(each) for _, each in points], [max(each) for _, each in points], colour, linewidth=1)
    width, order = (2.4, 4) if line.ours else (1.4, 3)
    medians = [median(values) for _rows, values in points]
    axes.plot(rows, medians, **line.look, markersize=5, linewidth=width, zorder=order, gid=gid)


def _name(axes: Axes, lines: Sequence[Line], apart: float) -> None:
    """Write each line's name where it ends, beside the panel; those that would touch move apart."""
    low, high = (log10(bound) for bound in axes.get_ylim())
    ends = [median(line.points[max(line.points)]) for line in lines]
    places = spread_out([(log10(end) - low) / (high - low) for end in ends], apart)
    for line, place in zip(lines, places, strict=True):
        ends_at = (1.03, 1.07)
        axes.plot(ends_at, (place, place), **line.look, markersize=0, transform=axes.transAxes, clip_on=False)
        axes.plot(1.05, place, **line.look, markersize=5, transform=axes.transAxes, clip_on=False)
        weight = "bold" if line.ours else "normal"
        text = {"va": "center_baseline", "size": SMALL, "weight": weight}
        axes.text(1.09, place, line.label, text, transform=axes.transAxes)


def _short(rows: int) -> str:
    """Write a number of rows as people say it."""
    for size, letter in ((1_000_000, "M"), (1_000, "k")):
        if rows >= size:
            return f"{rows / size:.3g}{letter}"
    return str(rows)
