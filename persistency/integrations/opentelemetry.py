"""OpenTelemetry: what the jobs of a `Persistency` do, as metrics by the OpenTelemetry API (the extra `opentelemetry`).

    OpenTelemetryMetrics(persistency)  # the service's own SDK and exporter do the rest

Rules:
  1. Only the API is used. Which SDK there is, and whether there is one, is the service's business.
  2. Nothing is measured beside what `job.statistics()` says, and that only when somebody collects: once per job,
     though each instrument asks on its own.
  3. One set of attributes per `Persistency`, whatever the number of jobs, unless one per job is asked for.
  4. A meter's instruments can't be taken back, nor made twice: all who share a meter share its instruments.

Doesn't know: who collects, and how.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from time import monotonic
from types import TracebackType
from typing import Final, NamedTuple, Self

from persistency import Misuse, Persistency, Statistics, __version__
from persistency.integrations.census import Census, Counters, Counting

try:
    from opentelemetry import metrics
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation
except ModuleNotFoundError as _missing:
    if (_missing.name or "").partition(".")[0] != "opentelemetry":
        raise
    raise ModuleNotFoundError(
        "persistency.integrations.opentelemetry needs the extra 'opentelemetry': "
        "pip install 'persistency[opentelemetry]'",
        name=_missing.name,
    ) from None

METER_NAME: Final = "persistency"
ROOT: Final = "persistency.root"
JOB: Final = "persistency.job.id"
STATE: Final = "persistency.job.state"

# So long one census serves the instruments that haven't asked for it yet; a collection takes a part of that.
_SAME_SECONDS = 1.0

Attributes = dict[str, str | bool | int | float]


class _Counter(NamedTuple):
    """What only grows."""

    name: str
    unit: str
    text: str
    read: Callable[[Counters], int]


class _Sum(NamedTuple):
    """What rises and falls, and may be added up over all jobs."""

    name: str
    unit: str
    text: str
    read: Callable[[Statistics], float]


class _Largest(NamedTuple):
    """What can't be added up: over all jobs it is the largest that counts. Some are of no use `per_job`."""

    name: str
    unit: str
    text: str
    read: Callable[[Statistics], float]
    per_job: bool = True


_JOBS: Final = "persistency.job.count"
_INSTRUMENTS: Final[tuple[_Counter | _Sum | _Largest, ...]] = (
    _Counter("persistency.operation.accepted", "{operation}", "Write operations accepted", lambda c: c.accepted),
    _Counter("persistency.operation.committed", "{operation}", "Write operations committed", lambda c: c.committed),
    _Counter("persistency.operation.failed", "{operation}", "Write operations that have failed", lambda c: c.failed),
    _Counter("persistency.commit.count", "{commit}", "Transactions that wrote", lambda c: c.commits),
    _Sum("persistency.operation.pending", "{operation}", "Write operations that wait", lambda n: n.pending),
    _Sum("persistency.mailbox.size", "By", "Keys and payloads that wait", lambda n: n.mailbox_bytes),
    _Sum("persistency.wal.size", "By", "The log not yet carried over into the file", lambda n: n.wal_bytes),
    _Sum("persistency.wal.pinned", "{job}", "Jobs whose log a reader pins", lambda n: int(n.wal_pinned)),
    _Largest("persistency.operation.pending_max", "{operation}", "The most of one job", lambda n: n.pending, False),
    _Largest("persistency.mailbox.size_max", "By", "The most of one job", lambda n: n.mailbox_bytes, False),
    _Largest("persistency.wal.size_max", "By", "The longest of one job", lambda n: n.wal_bytes, False),
    _Largest("persistency.commit.p50", "s", "The slowest job's median commit", lambda n: n.commit_ms_p50 / 1000),
    _Largest("persistency.commit.p99", "s", "The slowest job's 99th percentile", lambda n: n.commit_ms_p99 / 1000),
)


class OpenTelemetryMetrics:
    """Shows the jobs of one `Persistency`, those that rest among them, from now on until it is closed.

    `meter_provider`: the SDK's (`None`: the global one, which may be set later). `per_job`: each number for every open
    job, with the attribute `persistency.job.id`; without, sums over all jobs, and the largest where each job has a
    bound of its own. `attributes` are put to every number, beside `persistency.root`, which they may override: several
    `Persistency` objects need different ones.

    Raises `Misuse` for a wrong argument.
    """

    def __init__(
        self,
        persistency: Persistency,
        meter_provider: MeterProvider | None = None,
        *,
        per_job: bool = False,
        attributes: Mapping[str, str | bool | int | float] | None = None,
    ) -> None:
        if not isinstance(persistency, Persistency):
            raise Misuse(f"persistency must be a Persistency, not {type(persistency).__name__}: pass the object itself")
        self._counting = Counting(persistency, by_job=per_job)
        self._per_job = per_job
        self._attributes: Attributes = {ROOT: persistency.root, **(attributes or {})}
        self._lock = threading.RLock()
        # Guarded by the lock: the latest census, when it was taken, and which instruments had it.
        self._census = Census(Counters(), [])
        self._taken_at = 0.0
        self._had: set[str] | None = None
        self._shared = _shared(meter_provider)
        self._shared.sources.add(self)

    def close(self) -> None:
        """Show nothing more. A second call is nothing."""
        self._shared.sources.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _now(self, name: str) -> Census:
        """Return the census for an instrument: the one the others have had just now, or, the second time, a new one."""
        with self._lock:
            if self._had is None or name in self._had or monotonic() - self._taken_at > _SAME_SECONDS:
                self._census, self._had, self._taken_at = self._counting.take(), set(), monotonic()
            self._had.add(name)
            return self._census

    def _states(self) -> list[Observation]:
        if not self._counting.here:
            return []
        states = self._now(_JOBS).by_state()
        return [Observation(count, {**self._attributes, STATE: state}) for state, count in states.items()]

    def _observe(self, what: _Counter | _Sum | _Largest) -> list[Observation]:
        if not self._counting.here or (self._per_job and isinstance(what, _Largest) and not what.per_job):
            return []
        census = self._now(what.name)
        if self._per_job:
            return [
                Observation(
                    what.read(job.counters) if isinstance(what, _Counter) else what.read(job.numbers),
                    {**self._attributes, JOB: job.job_id},
                )
                for job in census.jobs
            ]
        if isinstance(what, _Counter):
            return [Observation(what.read(census.total), self._attributes)]
        numbers = [what.read(job.numbers) for job in census.jobs]
        return [Observation(sum(numbers) if isinstance(what, _Sum) else max(numbers, default=0), self._attributes)]


class _Shared:
    """The instruments of one meter, and those who have something to say when they are asked."""

    def __init__(self, meter: Meter) -> None:
        self.sources: set[OpenTelemetryMetrics] = set()
        meter.create_observable_up_down_counter(_JOBS, [self._states], "{job}", "Jobs that are open")
        for what in _INSTRUMENTS:
            make = {
                _Counter: meter.create_observable_counter,
                _Sum: meter.create_observable_up_down_counter,
                _Largest: meter.create_observable_gauge,
            }[type(what)]
            make(what.name, [partial(self._observe, what)], what.unit, what.text)

    def _states(self, _options: CallbackOptions) -> Iterable[Observation]:
        return [seen for source in self.sources.copy() for seen in source._states()]

    def _observe(self, what: _Counter | _Sum | _Largest, _options: CallbackOptions) -> Iterable[Observation]:
        return [seen for source in self.sources.copy() for seen in source._observe(what)]


_by_meter: weakref.WeakKeyDictionary[Meter, _Shared] = weakref.WeakKeyDictionary()
_of_global: list[_Shared] = []  # made when the global provider may not have been set yet
_lock = threading.RLock()


def _in_child() -> None:
    global _lock  # noqa: PLW0603  # another thread of the parent may have had it
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _shared(provider: MeterProvider | None) -> _Shared:
    """Return the instruments of a provider's meter, made by the first who asks."""
    with _lock:
        its_global = provider is None or provider is metrics.get_meter_provider()
        if its_global and _of_global:
            return _of_global[0]
        meter = (provider or metrics.get_meter_provider()).get_meter(METER_NAME, __version__)
        shared = _by_meter.get(meter)
        if shared is None:
            shared = _by_meter[meter] = _Shared(meter)
        if provider is None:
            _of_global.append(shared)
        return shared
