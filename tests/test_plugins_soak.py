"""Threads that call plugins while these are reloaded and unloaded: every answer is right, and nothing is left over.

`python -m tests.soak plugins` is the long form, which says by how much the process grows.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("wasmtime", reason="needs the extra plugins")

if not Path("/proc/self/maps").exists():
    pytest.skip("the size of a process is read from /proc", allow_module_level=True)

from tests.soak.plugins import GROWN_MAX, SEEN, Outcome, Plan, apart, complaints, grown, planted


def test_a_storm_leaves_nothing_behind() -> None:
    """8 threads call 4 plugins 2,000 times: no wrong answer, and no store, code, thread or file more than before."""
    outcome = apart(Plan(2_000, seed=20), timeout=100)
    assert complaints(outcome, long=False) == []
    assert sum(outcome.done.values()) == 2_000
    assert all(outcome.done[step] > 0 for step in ("add", "trap", "spin", "grow", "reload", "unload")), outcome.done


def test_code_comes_and_goes_in_many_threads() -> None:
    """Plugins that share code are loaded anew and unloaded: what one lets go of, another one gets whole."""
    outcome = apart(Plan(2_000, seed=2, only=["reload", "unload", "echo"]), timeout=100)
    assert complaints(outcome, long=False) == []
    assert min(outcome.done.values()) > 500


@pytest.mark.parametrize("plant", SEEN)
def test_a_planted_defect_is_reported(plant: str) -> None:
    """A host that keeps its stores, or old code, or mixes answers up, is found out as what it is."""
    seen, outcome = planted(plant, seed=20)
    assert SEEN[plant] <= seen, complaints(outcome, long=True)


def test_growth_is_that_of_the_second_half() -> None:
    """What a process takes to warm up isn't counted; what it goes on taking is, and noise on both sides isn't."""
    assert abs(grown([50, 90, *[100, 104] * 50])) < GROWN_MAX
    assert grown([100 + at for at in range(100)]) > 0.2
    assert not complaints(Outcome(kib=[100] * 80, maps=[7] * 80), long=True)
