"""The targets: what this engine promises beside its peers, as data.

Rules:
  1. `holds` is the floor, in every single repetition; `aim` is what the median shall reach.
  2. Adding a contender or a case that has a target means adding a line here, nothing else.
  3. A target that couldn't be measured is told with the reason, never dropped.

Doesn't know: how anything is measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from benchmarks.contenders import OURS
from benchmarks.harness import Series

# speed: our rate over theirs, at least so much. time: our time over theirs, at most. us: ours alone, at most.
Measure = Literal["speed", "time", "us"]
Verdict = Literal["reached", "floor only", "missed", "not measured"]
# The reason of what the command line didn't ask for.
NOT_ASKED = "not asked for"


@dataclass(frozen=True, slots=True)
class Target:
    """What holds in every run, and what is aimed at, in one case beside one way of a peer.

    `ours` is our own way, where there are several; the peer may be another way of ours.
    """

    case: str
    measure: Measure
    holds: float
    aim: float
    peer: str = ""
    way: str = ""
    ours: str = ""

    def written(self, value: float) -> str:
        """Return a value with its unit."""
        if self.measure == "us":
            return f"{value:.3g} us" if value < 1000 else f"{value / 1000:.3g} ms"
        return f"{value:.2f} x" if value < 10 else f"{value:.0f} x"

    def meets(self, value: float, bound: float) -> bool:
        """Say whether a value is on the right side of a bound."""
        return value >= bound if self.measure == "speed" else value <= bound


TARGETS = (
    Target("put", "speed", 0.45, 0.75, "apsw", "512 a statement"),
    Target("put", "speed", 1.3, 2, "rocksdict", "put"),
    Target("put", "speed", 1.0, 1.5, "plyvel", "put"),
    Target("put", "speed", 30, 45, "diskcache", "set"),
    Target("put", "speed", 80, 150, "aiosqlite", "execute, commit"),
    Target("put-random", "speed", 0.6, 0.9, "apsw", "groups sorted"),
    Target("put-kept", "speed", 0.28, 0.45, OURS, "plain", "with a ttl"),
    Target("put-kept", "speed", 0.22, 0.4, OURS, "plain", "with a quota"),
    Target("put-kept", "speed", 0.35, 0.5, OURS, "plain", "with a feed"),
    Target("produce", "us", 1.2, 0.4),
    Target("commit", "time", 2.5, 1.5, "apsw", "one statement"),
    Target("acommit", "speed", 1, 2, "aiosqlite", "execute, commit"),
    Target("get", "time", 1.0, 0.6, "apsw", "autocommit"),
    Target("get", "time", 1.6, 1.2, "apsw", "inside BEGIN"),
    Target("get", "speed", 2, 3, "diskcache", "get"),
    Target("aget", "speed", 25, 50, "aiosqlite", "execute"),
    Target("aget", "speed", 10, 20, "aiosqlite", "execute_fetchall"),
    Target("aget-64", "speed", 5, 10, "aiosqlite", "execute_fetchall"),
    Target("aget-64", "speed", 4, 8, "apsw.aio", "async_run"),
    Target("lag", "us", 5_000, 1_000, ours="put, drain"),
    Target("scan", "speed", 0.3, 0.5, "apsw", "fetchall"),
    Target("put-spinning", "speed", 0.05, 0.3, OURS, "alone", "beside one thread"),
    Target("get-producer", "us", 120_000, 10_000),
    Target("aget-producer", "us", 120_000, 10_000),
    Target("key", "time", 0.5, 0.35, "fdb", "fdb.tuple.pack"),
    Target("key-new", "time", 0.75, 0.6, "fdb", "fdb.tuple.pack"),
    Target("import", "us", 60_000, 40_000),
    Target("open", "time", 2.0, 1.5, "apsw", "same pragmas"),
    Target("growth", "time", 2.5, 1.5, OURS, "sorted put (put, flush), 100k rows", "sorted put (put, flush), 10M rows"),
    Target("growth", "time", 1.5, 1.0, "apsw", "get (inside BEGIN), 10M rows", "get (get), 10M rows"),
)


@dataclass(frozen=True, slots=True)
class Judged:
    """A target and what was measured: one value for each repetition, or none and the reason."""

    target: Target
    values: list[float]
    reason: str = ""

    @property
    def median(self) -> float:
        """The value in the middle."""
        return median(self.values)

    @property
    def verdict(self) -> Verdict:
        """`missed` if the floor didn't hold in every repetition; `reached` if the median meets the aim."""
        if not self.values:
            return "not measured"
        if not all(self.target.meets(value, self.target.holds) for value in self.values):
            return "missed"
        return "reached" if self.target.meets(self.median, self.target.aim) else "floor only"


def judged(
    series: Sequence[Series], targets: Sequence[Target] = TARGETS, left_out: Mapping[str, str] | None = None
) -> Iterator[Judged]:
    """Hold what was measured against its targets; `left_out` says why cases and contenders took no part, by name."""
    for target in targets:
        ours = _find(series, target.case, OURS, target.ours)
        if ours is None:
            yield Judged(target, [], _reason(series, target, OURS, target.ours, left_out or {}))
            continue
        mine = [sample.us for sample in ours.samples]
        if target.measure == "us":
            yield Judged(target, mine)
            continue
        theirs = _find(series, target.case, target.peer, target.way)
        if theirs is None:
            yield Judged(target, [], _reason(series, target, target.peer, target.way, left_out or {}))
            continue
        pairs = zip(mine, (sample.us for sample in theirs.samples), strict=True)
        yield Judged(target, [other / one if target.measure == "speed" else one / other for one, other in pairs])


def _find(series: Sequence[Series], case: str, contender: str, way: str) -> Series | None:
    for one in series:
        if one.case == case and one.contender == contender and way in ("", one.way):
            return one
    return None


def _reason(series: Sequence[Series], target: Target, contender: str, way: str, left_out: Mapping[str, str]) -> str:
    """Return why one side of a target wasn't measured."""
    for name in (target.case, contender):
        if name in left_out:
            return left_out[name]
    asked = {one.case for one in series} | {one.contender for one in series}
    if target.case not in asked or contender not in asked:
        return NOT_ASKED
    return f"{contender} has no way {way!r} in the case {target.case!r}"
