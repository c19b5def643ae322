"""Owners that are paused past their lease: when another one has the job, they commit nothing any more, and are told.

The loop runs in a process of its own (`tests.soak.postgres_fence`), and is shown engines without a fence, which it has
to report. `python -m tests.soak postgres-fence` is the long form.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.crash.running import last_json, run
from tests.postgres import postgres_url
from tests.soak.postgres_fence import FIRST, SECOND, judge
from tests.soak.postgres_fence_plants import PLANTS

SEED = random.SystemRandom().getrandbits(32)


def fence_loop(cycles: int, *arguments: str) -> dict[str, Any]:
    """Run the loop and return its totals."""
    given = ("--url", postgres_url(), "--cycles", str(cycles), "--seed", str(SEED), *arguments)
    done = run("tests.soak.postgres_fence", *given, timeout=110)
    print(f"python -m tests.soak.postgres_fence {' '.join(given)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return last_json(done)


@pytest.mark.timeout(120)
def test_no_two_owners_ever_both_commit() -> None:
    """Of eight owners each is stopped in the middle of its work, and of nothing it does later there is a trace."""
    totals = fence_loop(8)
    assert not totals["findings"], totals["findings"]
    assert totals["cycles"] == 8
    assert totals["told"] + totals["unharmed"] == 8


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", sorted(PLANTS))
def test_an_engine_without_a_fence_is_seen(name: str) -> None:
    """The loop reports owners that don't ask whether the job is still theirs."""
    findings = fence_loop(10, "--plant", name)["findings"]
    assert findings
    assert not any("hang" in finding for finding in findings), findings


ROWS = [[at + 1, at, f"{FIRST if at < 3 else SECOND} {at}"] for at in range(6)]


@pytest.mark.parametrize(
    ("rows", "last_version", "acked", "told"),
    [
        (ROWS, 6, {FIRST: 3, SECOND: 6}, None),
        (ROWS, 6, {FIRST: 4, SECOND: 6}, "the first owner was acknowledged 4 rows"),
        (ROWS[:5], 5, {FIRST: 3, SECOND: 6}, "the second owner was acknowledged 6 rows"),
        ([*ROWS[:4], [5, 4, f"{FIRST} 4"], ROWS[5]], 6, {FIRST: 3, SECOND: 6}, "both have committed"),
        ([*ROWS[:4], *ROWS[5:]], 6, {FIRST: 3, SECOND: 5}, "there is a hole"),
        (ROWS, 7, {FIRST: 3, SECOND: 6}, "the versions aren't 1 to 6"),
    ],
)
def test_the_judge_sees_what_is_wrong(
    rows: list[list[Any]], last_version: int, acked: dict[str, int], told: str | None
) -> None:
    """And nothing where all is right."""
    wrong = judge(rows, last_version, acked, 3)
    assert (wrong == []) if told is None else any(told in text for text in wrong)
