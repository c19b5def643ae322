"""The soak's failovers: a server shut down under load and replaced by its copy, each time with a new pair of both."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from tests.soak.part import Part, Tell
from tests.soak.postgres_restarts import part_of


def soak(given: argparse.Namespace, tell: Tell) -> Iterator[Part]:
    """Fail over N // 200 times (5), without a restart before."""
    for at in range(max(1, given.cycles // 200)):
        given = argparse.Namespace(**{**vars(given), "seed": given.seed + at})
        yield part_of(f"postgres, failed over, {at + 1}", 0, given, tell)
