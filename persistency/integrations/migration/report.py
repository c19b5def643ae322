"""The report: what came along, and of what couldn't, how much, why, and some examples.

Rules:
  1. Every item of an origin is counted once: `records == taken + ended + kept + lost + withheld`.
  2. Of each reason a few examples are kept, and no payload: memory stays bounded however much is lost.

Doesn't know: origins, jobs, who shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from persistency.integrations.migration.items import Lost, Pickled, Reason

EXAMPLES_MAX: Final = 10
"""How many examples of each reason are kept."""
_SHOWN_MAX = 200


class Example(NamedTuple):
    """One item that couldn't come along: its part of the origin, its key as Python spells it, and why it couldn't."""

    part: str | None
    key: str
    why: str


@dataclass(slots=True)
class Left:
    """What couldn't come along for one reason: how many, and the first of them."""

    count: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass(slots=True)
class Report:
    """What `bring` has done.

    `records` items were looked at. `taken` were stored as rows, `kept` as the pickles they are; how many are in each
    category `categories` says. `ended` were over, and left behind. `left` has those that can't come along, by reason.
    `withheld` could have come, but weren't stored, since with `atomic` all come or none. `tagged` is how many
    of the stored ones had a tag, which stays behind. `passed_over` has what of the origin wasn't looked at, such as
    tables of something else, by name, with why; `guessed` what was guessed, by table. `dry_run` says that nothing was
    stored at all, and the numbers are what would have been. `seconds` is how long it took.
    """

    records: int = 0
    taken: int = 0
    kept: int = 0
    ended: int = 0
    withheld: int = 0
    tagged: int = 0
    left: dict[Reason, Left] = field(default_factory=dict)
    categories: dict[str, int] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)
    guessed: dict[str, str] = field(default_factory=dict)
    dry_run: bool = False
    seconds: float = 0.0

    @property
    def lost(self) -> int:
        """How many can't come along."""
        return sum(left.count for left in self.left.values())

    @property
    def complete(self) -> bool:
        """Whether everything that hadn't ended came along."""
        return not self.left


def leave(report: Report, part: str | None, key: Any, lost: Lost) -> None:
    """Count an item that can't come along."""
    left = report.left.setdefault(lost.reason, Left())
    left.count += 1
    if len(left.examples) < EXAMPLES_MAX:
        left.examples.append(Example(part, shown_key(key), _short(lost.why)))


def shown_key(key: Any) -> str:
    """Return a key as Python spells it, in a few characters."""
    if isinstance(key, Pickled):
        return f"pickle {_short(repr(key.data[:_SHOWN_MAX]))}"
    if isinstance(key, Lost):
        return f"({key.why})"
    try:
        return _short(repr(key[:_SHOWN_MAX] if type(key) in (str, bytes) else key))
    except Exception:  # a number of thousands of digits, or a class of somebody else
        return f"a {type(key).__name__}"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN_MAX else f"{text[: _SHOWN_MAX - 3]}..."
