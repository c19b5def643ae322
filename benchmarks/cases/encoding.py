"""Cases that encode keys: a name and a number, with names that repeat and names never seen before.

Rules:
  1. Both sides give the same bytes, all of them compared.

Doesn't know: contenders, targets.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

from benchmarks.harness import Case, Measuring, Sample, parts_in_turn
from benchmarks.protocol import Contender, Way
from benchmarks.verify import check_answers
from benchmarks.workload import Workload
from persistency import Key

KEYS = 200_000
NAMES = 64

_fresh = count()


def _repeating(keys: int) -> list[tuple[str, int]]:
    names = [f"channel-{name}" for name in range(NAMES)]
    return [(names[at % NAMES], 123_456 + at) for at in range(keys)]


def _never_seen(keys: int) -> list[tuple[str, int]]:
    # New in every repetition too: neither side may remember them.
    return [(f"channel-{next(_fresh):08}", 123_456 + at) for at in range(keys)]


def _encode(
    make: Callable[[int], list[tuple[str, int]]],
) -> Callable[[Contender, Way, Workload, Path], Measuring]:
    def run(contender: Contender, way: Way, workload: Workload, _directory: Path) -> Measuring:
        parts = make(workload.portion(way, KEYS))
        encode = way.make(None)
        encoded, us = yield from parts_in_turn(encode, parts)
        check_answers(contender.name, (Key(data).parts for data in encoded), parts)
        return Sample(len(parts), us)

    return run


CASES = (
    Case("key", "a key of a repeating name and a number", ("encode",), _encode(_repeating), in_turn=True),
    Case("key-new", "a key of a name never seen and a number", ("encode",), _encode(_never_seen), in_turn=True),
)
