"""Many jobs from several processes on one server, with few connections each: every value right.

`python -m tests.soak postgres-crowd` is the long form.
"""

from __future__ import annotations

import pytest

from tests.postgres import fresh_url
from tests.soak.postgres_crowd import PROCESSES, Totals, crowd


@pytest.mark.timeout(300)
def test_many_jobs_share_few_connections() -> None:
    """The jobs of each process are ten times its connections, and all of them written to in turn."""
    totals = Totals()
    crowd(fresh_url(), 40 * PROCESSES, 3, 1, totals, bound=4)
    assert not totals.findings, totals.findings
    assert totals.jobs == 40 * PROCESSES
    assert totals.ops == 40 * PROCESSES * 3 * 103
    assert 1 <= totals.connections <= 4


@pytest.mark.timeout(300)
def test_too_many_connections_are_seen() -> None:
    """Where more are used than the crowd was to be allowed, it says so."""
    totals = Totals()
    crowd(fresh_url(), 20 * PROCESSES, 2, 1, totals, bound=3, told=12)
    (finding,) = totals.findings
    assert "connections, 3 were allowed" in finding
