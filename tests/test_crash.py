"""SIGKILL at any moment: what is opened again is an exact prefix of what was posted, with all that was acknowledged.

The kill loop runs in a process of its own (`tests.crash.kills`). Before it is believed it is shown engines with a
planted defect, each of which it has to report.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.crash.ledger import Contents, Found, Posted, judge, row_payload, state_payload
from tests.crash.plants import PLANTS
from tests.crash.running import last_json, run

SEED = random.SystemRandom().getrandbits(32)


pytestmark = pytest.mark.timeout(300)  # a loop takes half a minute where there is nothing else to do


def kill_loop(cycles: int, *arguments: str, seed: int = SEED) -> dict[str, Any]:
    """Run the kill loop and return its totals."""
    given = ("--cycles", str(cycles), "--seed", str(seed), *arguments)
    done = run("tests.crash.kills", *given, timeout=280, flags=("-W", "error"))
    print(f"python -m tests.crash.kills {' '.join(given)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    totals = last_json(done)
    assert done.returncode == (1 if totals["kinds"] else 0)
    return totals


def check_loop(totals: dict[str, Any], cycles: int) -> None:
    """Hold the totals of a kill loop against the promises."""
    assert not totals["findings"], totals["findings"]
    assert totals["cycles"] == cycles
    # Otherwise the kills would have proved nothing.
    assert totals["between"] >= 0.75 * cycles
    assert totals["cut"] > 0
    assert totals["ahead"] > 0


def test_kill_in_a_loop() -> None:
    """Of 100 killed writers each leaves an exact prefix, whole batches, and every row whose commit was acknowledged."""
    check_loop(kill_loop(100), 100)


def test_kill_in_a_loop_with_durability_power() -> None:
    """The same holds where every commit is synced before it is answered."""
    check_loop(kill_loop(60, "--durability", "power"), 60)


def test_kill_while_opening_and_closing() -> None:
    """A kill in the middle of an opening, a migration or a closing harms nothing either."""
    totals = kill_loop(80, "--writer", "doors")
    assert not totals["findings"], totals["findings"]
    assert totals["cycles"] == 80


@pytest.mark.parametrize("name", sorted(PLANTS))
def test_planted_defect_is_seen(name: str) -> None:
    """The kill loop reports an engine that was spoilt on purpose, and as what it is."""
    totals = kill_loop(100, "--plant", name)
    assert set(totals["kinds"]) & PLANTS[name], totals


# -- the judge --------------------------------------------------------------------------------------------------------


def good_contents() -> Contents:
    """Return what a job holds after five puts and a batch of three."""
    posted = [Posted(number, number, 1, number + 1) for number in range(5)]
    posted += [Posted(5 + at, 5, 3, 6 + at) for at in range(3)]
    rows = [Found(row.number, row_payload(row), row.version) for row in posted]
    return Contents(rows, (state_payload(5), 9), 9)


def kinds(contents: Contents, flushed: int = 5, announced: int = 8) -> set[str]:
    """Return the kinds of what the judge finds."""
    return {finding.kind for finding in judge(contents, flushed, announced)}


def test_judge_accepts_a_prefix() -> None:
    """The judge finds nothing in a prefix with all that was flushed, nor in an empty job where nothing was."""
    assert kinds(good_contents()) == set()
    assert kinds(good_contents(), 8, 8) == set()
    assert kinds(Contents([], None, 0), 0, 100) == set()


@pytest.mark.parametrize(
    ("contents", "kind"),
    [
        (good_contents()._replace(rows=good_contents().rows[:7]), "split"),
        (good_contents()._replace(state=None), "split"),
        (good_contents()._replace(rows=good_contents().rows[:5]), "split"),
        (good_contents()._replace(rows=good_contents().rows[1:]), "hole"),
        (good_contents()._replace(rows=good_contents().rows[:3] + good_contents().rows[4:]), "hole"),
        (good_contents()._replace(last_version=8), "version"),
        (good_contents()._replace(last_version=10), "version"),
        (good_contents()._replace(rows=[row._replace(version=1) for row in good_contents().rows]), "version"),
        (good_contents()._replace(rows=[row._replace(payload=b"") for row in good_contents().rows]), "payload"),
        (good_contents()._replace(rows=[row._replace(payload=row.payload + b"!") for row in good_contents().rows]),
         "payload"),
    ],
)  # fmt: skip
def test_judge_refuses(contents: Contents, kind: str) -> None:
    """The judge names what is wrong with rows, batches or versions that don't fit together."""
    assert kind in kinds(contents)


def test_judge_compares_with_what_was_said() -> None:
    """The judge misses rows that were acknowledged, and objects to rows that were never announced."""
    assert kinds(good_contents(), flushed=9, announced=9) == {"lost"}
    assert kinds(good_contents(), announced=7) == {"beyond"}
