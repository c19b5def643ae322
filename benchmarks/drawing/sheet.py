"""The sheet: what all plots have in common, and how they become files.

Rules:
  1. The same report gives the same bytes: no date, no random ids, no settings of the user's.
  2. Text stays text. It is laid out in DejaVu Sans, which comes with matplotlib and is wider than what a reader without
     it gets instead: so it may become narrower, never too wide.
  3. White ground and dark grey ink, since a README is read in light and in dark. Shape or place tells what colour
     tells, and no red stands against a green.

Doesn't know: what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

INK = "#3b4048"
SOFT = "#6b7280"
LINE = "#dfe3e8"
SHADE = "#f3f4f6"
OURS = "#0072b2"
PEER = "#b6bec9"
MISSED = "#d55e00"
# Told apart by those who see no red or no green (the palette of Okabe and Ito), and by their markers.
LINES = (OURS, "#e69f00", "#cc79a7", "#56b4e9", "#d55e00", "#5d6570", "#009e73", "#b8a500")
MARKERS = "osD^vPX<"

TITLE, TEXT, SMALL = 13, 9, 8  # points
MARGIN = 0.22  # inches
POINTS = 72  # an inch
# `Any`, since matplotlib types the names of its settings one by one, others in each version.
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "persistency",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "Helvetica"],
    "font.size": TEXT,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": LINE,
    "axes.axisbelow": True,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    "text.parse_math": False,
}
METADATA: dict[str, Any] = {"Date": None, "Creator": None}


@contextmanager
def styled() -> Iterator[None]:
    """Draw in the house's style, whatever the user has set for other work."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        yield


def write(figure: Figure, path: Path) -> Path:
    """Write a figure to a file; return its path."""
    figure.savefig(path, format="svg", metadata=METADATA)
    return path


class Sheet:
    """A figure that is laid out in inches from its upper left corner; it has a title, and the machine's facts below."""

    def __init__(self, width: float, height: float, title: str, origin: str) -> None:
        self.width = width
        self.height = height
        self.figure = Figure(figsize=(width, height))
        self.text(MARGIN, 0.3, title, size=TITLE, weight="bold")
        self.text(MARGIN, height - 0.17, origin, size=SMALL, color=SOFT)

    def text(self, left: float, top: float, text: str, **look: Any) -> None:
        """Write a line at a place, on its middle."""
        look = {"va": "center_baseline", "size": TEXT, **look}
        self.figure.text(left / self.width, 1 - top / self.height, text, **look)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Return axes at a place, with nothing drawn around them."""
        place = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(place)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        return axes


def logarithmic(axis: Axis, *, unit: str = "", steps: tuple[float, ...] = (1.0,)) -> None:
    """Mark an axis, which is logarithmic, with plain numbers."""
    axis.set_major_locator(LogLocator(subs=steps, numticks=99))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _at: number(value) + unit))


def wide(text: str, size: float, *, bold: bool = False) -> float:
    """Return the width of a line in inches."""
    font = FontProperties(family=STYLE["font.sans-serif"][0], size=size, weight="bold" if bold else "normal")
    width, _height, _descent = TextToPath().get_text_width_height_descent(text, font, False)
    return float(width) / POINTS


def spread_out(places: Sequence[float], apart: float) -> list[float]:
    """Return the places, from 0 to 1, moved so far that each is at least `apart` from the next: labels that fit."""
    order = sorted(range(len(places)), key=places.__getitem__)
    # Neighbours that would touch become a block, which stands around the middle of what it names.
    blocks: list[list[int]] = []
    for one in order:
        blocks.append([one])
        while len(blocks) > 1 and _begin(blocks[-1], places, apart) < _end(blocks[-2], places, apart) + apart:
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    moved = list(places)
    for block in blocks:
        begin = _begin(block, places, apart)
        for at, one in enumerate(block):
            moved[one] = begin + at * apart
    return moved


def _begin(block: Sequence[int], places: Sequence[float], apart: float) -> float:
    size = (len(block) - 1) * apart
    return max(0.0, min(1 - size, fmean(places[one] for one in block) - size / 2))


def _end(block: Sequence[int], places: Sequence[float], apart: float) -> float:
    return _begin(block, places, apart) + (len(block) - 1) * apart


def number(value: float) -> str:
    """Write a number as briefly as it can be read, with three digits that count."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def origin(report: dict[str, Any], *, rows: bool = True) -> str:
    """Return the line that says where the figures come from; with the rows a run was asked for, if it is about them."""
    machine, settings = report.get("machine", {}), report.get("settings", {})
    facts = [
        machine.get("cpu"),
        f"{machine['cores']} cores" if "cores" in machine else None,
        machine.get("filesystem"),
        machine.get("system"),
        machine.get("python"),
        f"SQLite {machine['sqlite']}" if "sqlite" in machine else None,
        f"{settings['rows']:,} rows" if rows and "rows" in settings else None,
        f"payloads of {settings['payload_bytes']:,} bytes" if "payload_bytes" in settings else None,
        f"{settings['repeat']} repetitions" if "repeat" in settings else None,
        str(machine.get("date", "")).partition("T")[0] or None,
    ]
    return " · ".join(str(fact) for fact in facts if fact is not None)
