"""Prometheus: what the jobs of a `Persistency` do, as metrics for `prometheus_client` (the extra `prometheus`).

    PrometheusCollector(persistency)  # and wherever the service shows its metrics, these are among them

Rules:
  1. Nothing is measured beside what `job.statistics()` says, and that only when somebody scrapes.
  2. Names and units are Prometheus' own: counters end in `_total`, times are seconds, sizes bytes.
  3. One series per metric, whatever the number of jobs, unless a series per job is asked for.

Doesn't know: who scrapes, and how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Final, Self

from persistency import Misuse, Persistency, Statistics
from persistency.integrations.census import STATES, Census, Counters, Counting

try:
    from prometheus_client import REGISTRY, CollectorRegistry
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
except ModuleNotFoundError as _missing:
    if (_missing.name or "").partition(".")[0] != "prometheus_client":
        raise
    raise ModuleNotFoundError(
        "persistency.integrations.prometheus needs the extra 'prometheus': pip install 'persistency[prometheus]'",
        name=_missing.name,
    ) from None

_JOB: Final = "job_id"  # `job` is Prometheus' own: the job that scrapes

_COUNTERS: Final[tuple[tuple[str, str, Callable[[Counters], int]], ...]] = (
    ("accepted_operations", "Write operations that were accepted", lambda counters: counters.accepted),
    ("committed_operations", "Write operations that were committed", lambda counters: counters.committed),
    ("failed_operations", "Write operations that have failed", lambda counters: counters.failed),
    ("commits", "Transactions that wrote", lambda counters: counters.commits),
)
# What is a sum over all jobs, and what is that of the one that has the most.
_SIZES: Final[tuple[tuple[str, str, Callable[[Statistics], float]], ...]] = (
    ("pending_operations", "Write operations that wait to be committed", lambda numbers: numbers.pending),
    ("mailbox_bytes", "Bytes of keys and payloads that wait", lambda numbers: numbers.mailbox_bytes),
    ("wal_bytes", "Bytes of the log not yet carried over into the file", lambda numbers: numbers.wal_bytes),
)
_TIMES: Final[tuple[tuple[str, str, Callable[[Statistics], float]], ...]] = (
    ("commit_p50_seconds", "Half of the latest 1,024 commits were shorter", lambda numbers: numbers.commit_ms_p50),
    ("commit_p99_seconds", "99 of 100 of the latest 1,024 commits were shorter", lambda numbers: numbers.commit_ms_p99),
)


class PrometheusCollector:
    """Shows the jobs of one `Persistency`, those that rest among them, from now on until it is closed.

    `registry`: where it is registered (`None`: nowhere; then register it yourself). `per_job`: a series for every open
    job, with the label `job_id`; without, sums over all jobs, and the largest where each job has a bound of its own.
    `prefix` begins every name: with several `Persistency` objects in one registry each needs another.

    Raises `Misuse` for a wrong argument, and what the registry raises (`ValueError`) for names that are taken.
    """

    def __init__(
        self,
        persistency: Persistency,
        registry: CollectorRegistry | None = REGISTRY,
        *,
        per_job: bool = False,
        prefix: str = "persistency",
    ) -> None:
        if not isinstance(persistency, Persistency):
            raise Misuse(f"persistency must be a Persistency, not {type(persistency).__name__}: pass the object itself")
        self._counting = Counting(persistency, by_job=per_job)
        self._per_job = per_job
        self._prefix = prefix
        self._registry: CollectorRegistry | None = None
        if registry is not None:
            registry.register(self)
            self._registry = registry

    def describe(self) -> list[Metric]:
        """Return the metrics without their numbers, for a registry that looks for names that are taken."""
        return list(self._metrics(Census(Counters(), [])))

    def collect(self) -> list[Metric]:
        """Return the metrics of this instant, for whoever scrapes; none in a forked child, whose jobs these aren't."""
        if not self._counting.here:
            return []
        return list(self._metrics(self._counting.take()))

    def close(self) -> None:
        """Leave the registry. A second call is nothing."""
        registry, self._registry = self._registry, None
        if registry is not None:
            registry.unregister(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _metrics(self, census: Census) -> Iterator[Metric]:
        states = self._gauge("jobs", "Jobs that are open", "state")
        for state, count in census.by_state().items():
            states.add_metric([state], count)
        yield states
        yield from self._each(census) if self._per_job else self._together(census)

    def _together(self, census: Census) -> Iterator[Metric]:
        for name, text, count in _COUNTERS:
            yield CounterMetricFamily(f"{self._prefix}_{name}", f"{text}.", value=count(census.total))
        everybody = [job.numbers for job in census.jobs]
        for name, text, size in _SIZES:
            sizes = [size(numbers) for numbers in everybody]
            yield self._gauge(name, text, value=sum(sizes))
            yield self._gauge(f"{name}_max", f"{text}: of the job that has the most", value=max(sizes, default=0))
        pinned = sum(numbers.wal_pinned for numbers in everybody)
        yield self._gauge("wal_pinned_jobs", "Jobs whose log a reader keeps from being carried over", value=pinned)
        for name, text, ms in _TIMES:
            slowest = max(map(ms, everybody), default=0.0)
            yield self._gauge(name, f"{text}: of the slowest job", value=slowest / 1000)

    def _each(self, census: Census) -> Iterator[Metric]:
        for name, text, count in _COUNTERS:
            counted = CounterMetricFamily(f"{self._prefix}_{name}", f"{text}.", labels=[_JOB])
            for job in census.jobs:
                counted.add_metric([job.job_id], count(job.counters))
            yield counted
        for name, text, read in (
            *_SIZES,
            ("wal_pinned", "Whether a reader keeps the log from being carried over", _is_pinned),
            *((name, text, _in_seconds(ms)) for name, text, ms in _TIMES),
        ):
            gauge = self._gauge(name, text, _JOB)
            for job in census.jobs:
                gauge.add_metric([job.job_id], read(job.numbers))
            yield gauge
        is_in = self._gauge("job_state", "1 for the state a job is in, 0 for the others", _JOB, "state")
        for job in census.jobs:
            for state in STATES:
                is_in.add_metric([job.job_id, state], float(job.numbers.state == state))
        yield is_in

    def _gauge(self, name: str, text: str, *labels: str, value: float | None = None) -> Any:
        return GaugeMetricFamily(f"{self._prefix}_{name}", f"{text}.", value=value, labels=labels or None)


def _is_pinned(numbers: Statistics) -> float:
    return float(numbers.wal_pinned)


def _in_seconds(ms: Callable[[Statistics], float]) -> Callable[[Statistics], float]:
    return lambda numbers: ms(numbers) / 1000
