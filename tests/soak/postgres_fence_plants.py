"""Owners without a fence: each spoils the engine in this process, so that a pause past the lease goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.crash.running import replace_method

FENCES = (" AND generation = $2::bigint", " AND last_version = $3::bigint")


def unfenced(*fences: str) -> dict[str, str]:
    """Return the statements that commit, with conditions left out; their parameters are still taken."""
    from persistency.storage.postgres import schema

    found: dict[str, str] = {}
    for name, sql in schema._SQL.items():
        if name.startswith("put") or name == "fence":
            for fence in fences:
                sql = sql.replace(fence, f" AND {fence.partition('= ')[2]} IS NOT NULL")
            assert sql != schema._SQL[name], f"{name} has no fence that could be left out"
            found[name] = sql
    return found


def _look_away() -> None:
    """Believe that the job is as it was left."""
    from persistency.storage.postgres.standing import Standing

    def make_sure(self: Any, _session: object, _where: object) -> None:
        self.unsure = False

    replace_method(Standing, "make_sure", make_sure)


def nothing_checked() -> None:
    """Commit whatever the generation is, and whatever was committed meanwhile."""
    from persistency.storage.postgres import schema

    schema._SQL |= unfenced(*FENCES)
    _look_away()


def never_told() -> None:
    """Have the fence, and take its refusals for something that passes."""
    _look_away()


PLANTS: dict[str, Callable[[], None]] = {"nothing-checked": nothing_checked, "never-told": never_told}
"""What a pause at any moment shows."""
