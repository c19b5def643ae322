"""A part of the soak: one row of the table it prints, and what was wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

Tell = Callable[[str], None]


@dataclass
class Part:
    """One row of the table, and what is wrong with it. `cells` are by column: see `tests.soak.__main__.COLUMNS`."""

    name: str
    cells: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
