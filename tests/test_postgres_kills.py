"""Owners killed beside their writes to a server: who takes over finds an exact prefix, with all that was acknowledged.

The loop runs in a process of its own (`tests.soak.postgres_kills`), and is shown engines with a planted defect, each of
which it has to report. `python -m tests.soak postgres-kills` is the long form.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests.crash.running import last_json, run
from tests.postgres import fresh_url
from tests.soak.postgres_plants import PLANTS

SEED = random.SystemRandom().getrandbits(32)

pytestmark = pytest.mark.timeout(300)


def kill_loop(cycles: int, *arguments: str) -> dict[str, Any]:
    """Run the kill loop and return its totals."""
    given = ("--url", fresh_url(), "--cycles", str(cycles), "--seed", str(SEED), *arguments)
    done = run("tests.soak.postgres_kills", *given, timeout=280, flags=("-W", "error"))
    print(f"python -m tests.soak.postgres_kills {' '.join(given)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    totals = last_json(done)
    assert done.returncode == (1 if totals["kinds"] else 0)
    return totals


@pytest.mark.parametrize("durability", ["process", "power"])
def test_an_owner_that_is_killed_leaves_an_exact_prefix(durability: str) -> None:
    """Each of ten owners finds what the one before has left: no hole, no half batch, nothing acknowledged missing."""
    between = 0
    for turn in range(10):  # where a kill falls is chance, and on a busy machine few fall beside writes
        totals = kill_loop(10, "--durability", durability, "--seed", str(SEED + turn))
        assert not totals["findings"], totals["findings"]
        assert totals["cycles"] == 10
        assert totals["recovered"] > 0
        between += totals["between"]
        if between >= 3:
            return
    pytest.fail(f"{between} kills fell beside writes, so they have proved nothing")


@pytest.mark.parametrize("name", sorted(PLANTS))
def test_planted_defect_is_seen(name: str) -> None:
    """The loop reports an engine that was spoilt on purpose, and as what it is."""
    totals = kill_loop(30, "--plant", name)
    assert set(totals["kinds"]) & PLANTS[name].kinds, totals
