"""A server that is restarted, or replaced by its copy, under load: nothing acknowledged is lost, nothing done twice.

It runs in a process of its own (`tests.soak.postgres_restarts`), with a server of its own, and is shown engines with a
planted defect. `python -m tests.soak postgres-restarts postgres-failover` is the long form.
"""

from __future__ import annotations

import random
from typing import Any

import pytest

from tests import postgres
from tests.crash.running import last_json, run
from tests.soak.postgres_plants import RESTART_PLANTS

SEED = random.SystemRandom().getrandbits(32)

pytestmark = pytest.mark.timeout(400)


@pytest.fixture(autouse=True)
def binaries() -> None:
    """Skip where no server of one's own can be started."""
    try:
        postgres.binaries()
    except postgres.NoPostgres as error:
        postgres.missing(str(error))


def restarts(count: int, *arguments: str) -> dict[str, Any]:
    """Restart a server so many times under load; return what came of it."""
    given = ("--restarts", str(count), "--seed", str(SEED), *arguments)
    done = run("tests.soak.postgres_restarts", *given, timeout=380)
    print(f"python -m tests.soak.postgres_restarts {' '.join(given)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return last_json(done)


def test_a_server_may_be_restarted_and_replaced_by_its_copy() -> None:
    """With durability `power` all that was acknowledged is there, once; callers wait, and none of them hangs."""
    totals = restarts(3)
    assert not totals["findings"], totals["findings"]
    assert (totals["restarts"], totals["failovers"]) == (3, 1)
    assert totals["rows"] == totals["acknowledged"] > 0
    assert totals["counted"] > 0
    assert totals["reads"] > 0


IN_DOUBT = ("--held", "--failovers", "0")


def test_commits_that_are_in_doubt_are_done_once() -> None:
    """A server that goes down when commits are on its medium, and nobody was told: they are found, and not repeated."""
    totals = restarts(2, *IN_DOUBT)
    assert not totals["findings"], totals["findings"]
    assert totals["restarts"] == 2
    assert totals["counted"] > 0


@pytest.mark.parametrize(("name", "count", "options"), [("done-again", 2, IN_DOUBT), ("not-synced", 30, ())])
def test_planted_defect_is_seen(name: str, count: int, options: tuple[str, ...]) -> None:
    """An engine that answers before a commit is on the medium, or doesn't ask whether a commit happened, is seen."""
    assert restarts(count, *options, "--plant", name)["findings"]


def test_every_defect_is_planted() -> None:
    """None is left out above."""
    assert set(RESTART_PLANTS) == {"done-again", "not-synced"}
