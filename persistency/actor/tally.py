"""The tally: what a worker counts, and the statistics made of it.

Rules:
  1. accepted == committed + failed + pending, at every instant anybody looks.
  2. Whoever has the turn counts; everybody may look. What is accepted is counted apart from what became of it.

Doesn't know: messages, turns.
"""

from __future__ import annotations

from collections import deque
from itertools import count
from typing import Literal

from persistency.frozen import Frozen, give
from persistency.storage.port import Status

State = Literal["live", "idle", "stalled", "poisoned", "closed"]

_COMMITS_KEPT = 1_024  # the latest, for the percentiles
_openings = count(1)


class Statistics(Frozen):
    """A job's numbers at one instant.

    `accepted`, `committed`, `failed` and `pending` count write operations; `mailbox_bytes` the keys and payloads
    waiting; `commits` transactions that wrote. `commit_ms_p50` and `commit_ms_p99` are milliseconds over the latest
    1,024 commits (0.0 before the first). `wal_bytes` is the size of the log not yet carried over into the file;
    `wal_pinned` says that another process, which reads there, keeps it from being. `opening` tells the openings of
    this process' jobs apart: counters begin anew with each, and go on while a job rests.
    """

    __slots__ = __match_args__ = (
        "state", "accepted", "committed", "failed", "pending", "mailbox_bytes", "commits", "commit_ms_p50",
        "commit_ms_p99", "wal_bytes", "wal_pinned", "opening",
    )  # fmt: skip

    state: State
    accepted: int
    committed: int
    failed: int
    pending: int
    mailbox_bytes: int
    commits: int
    commit_ms_p50: float
    commit_ms_p99: float
    wal_bytes: int
    wal_pinned: bool
    opening: int

    def __init__(
        self,
        state: State,
        accepted: int,
        committed: int,
        failed: int,
        pending: int,
        mailbox_bytes: int,
        commits: int,
        commit_ms_p50: float,
        commit_ms_p99: float,
        wal_bytes: int,
        wal_pinned: bool = False,
        opening: int = 0,
    ) -> None:
        give(self, "state", state)
        give(self, "accepted", accepted)
        give(self, "committed", committed)
        give(self, "failed", failed)
        give(self, "pending", pending)
        give(self, "mailbox_bytes", mailbox_bytes)
        give(self, "commits", commits)
        give(self, "commit_ms_p50", commit_ms_p50)
        give(self, "commit_ms_p99", commit_ms_p99)
        give(self, "wal_bytes", wal_bytes)
        give(self, "wal_pinned", wal_pinned)
        give(self, "opening", opening)


class Tally:
    """The counters of one worker."""

    __slots__ = ("_commit_seconds", "_percentiles", "commits", "committed", "failed", "opening", "state")

    def __init__(self) -> None:
        self.state: State = "live"
        self.committed: int = 0
        self.failed: int = 0
        self.commits: int = 0
        self.opening: int = next(_openings)
        self._commit_seconds: deque[float] = deque(maxlen=_COMMITS_KEPT)
        self._percentiles = (0, 0.0, 0.0)  # after how many commits, and what they were

    def commit(self, seconds: float) -> None:
        """Count one transaction that wrote."""
        self._commit_seconds.append(seconds)
        self.commits += 1  # only now: whoever has looked in between looks again

    def decided(self, committed: int, failed: int) -> None:
        """Count operations of which it is known what became of them."""
        self.committed += committed
        self.failed += failed

    def percentiles(self) -> tuple[float, float]:
        """Return the latest commits' p50 and p99 in milliseconds; sorted again only if there were more meanwhile."""
        commits, p50, p99 = self._percentiles
        if commits != self.commits:
            commits, latest = self.commits, sorted(self._commit_seconds.copy())
            p50, p99 = _percentile(latest, 0.50), _percentile(latest, 0.99)
            self._percentiles = (commits, p50, p99)
        return p50, p99

    def statistics(
        self, accepted: int, mailbox_bytes: int, status: Status | None, commit_ms: tuple[float, float]
    ) -> Statistics:
        """Return the numbers as they are now; `status` is the store's, if it is open."""
        return Statistics(
            state=self.state,
            accepted=accepted,
            committed=self.committed,
            failed=self.failed,
            pending=accepted - self.committed - self.failed,
            mailbox_bytes=mailbox_bytes,
            commits=self.commits,
            commit_ms_p50=commit_ms[0],
            commit_ms_p99=commit_ms[1],
            wal_bytes=0 if status is None else status.wal_bytes,
            wal_pinned=status is not None and status.wal_pinned,
            opening=self.opening,
        )


def _percentile(ordered: list[float], part: float) -> float:
    return round(ordered[int(part * (len(ordered) - 1))] * 1000, 4) if ordered else 0.0
