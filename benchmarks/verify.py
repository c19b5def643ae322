"""The verifier: no figure counts before the result it was measured with was looked at.

Rules:
  1. A wrong result is `Mismatch`, which ends the whole run: a figure beside it would mean nothing.

Doesn't know: how anything is measured.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.protocol import Contender, Pair

SAMPLE_ROWS = 500


class Mismatch(Exception):
    """A contender gave, or stored, something other than what was asked of it."""


def check_answers(who: str, given: Iterable[object], expected: Iterable[object]) -> None:
    """Hold answers against what they must be, one by one and to the last."""
    given, expected = list(given), list(expected)
    if len(given) != len(expected):
        raise Mismatch(f"{who}: {len(given)} answers, not {len(expected)}")
    for at, (one, other) in enumerate(zip(given, expected, strict=True)):
        if one != other:
            raise Mismatch(f"{who}: answer {at} is {_shown(one)}, not {_shown(other)}")


def check_stored(contender: Contender, directory: Path, rows: Sequence[Pair]) -> None:
    """Open a closed store again; its number of rows, and the payloads of some of them, must be those that were put."""
    assert contender.read_back is not None
    expected = dict(rows)  # of rows with one key the last one wins
    keys = list(expected)
    sample = keys if len(keys) <= SAMPLE_ROWS else [keys[0], keys[-1], *random.Random(7).sample(keys, SAMPLE_ROWS)]
    count, found = contender.read_back(directory, sample)
    if count != len(expected):
        raise Mismatch(f"{contender.name}: {count} rows are stored, not {len(expected)}")
    check_answers(f"{contender.name}, read back", found, (expected[key] for key in sample))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
