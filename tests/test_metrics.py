"""Metrics: what `persistency.integrations` shows of jobs, by Prometheus and by OpenTelemetry.

Both stand on one census, so what is said of one is tried with both: `Shown` reads either.
"""

from __future__ import annotations

import contextlib
import gc
import random
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader, MetricsData
from opentelemetry.sdk.metrics.export import Sum as SumPoints
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from persistency import Check, Job, Misuse, Persistency, Put, Statistics, WriteFailed
from persistency.actor.sleeper import Sleeper
from persistency.actor.worker import Worker
from persistency.integrations import census
from persistency.integrations.census import Counters, Counting
from persistency.integrations.opentelemetry import OpenTelemetryMetrics
from persistency.integrations.prometheus import PrometheusCollector
from tests.soak.lives import Quiet
from tests.test_engine import WAIT

NEVER = Check("c", ("never",), 10**6)  # a check that fails
Labels = frozenset[tuple[str, str]]


class Shown(Protocol):
    """What one of the two shows: the names of its numbers differ, what they say doesn't."""

    accepted: str
    failed: str
    pending: str
    jobs: str
    job_label: str
    state_label: str

    def read(self) -> dict[tuple[str, Labels], float]:
        """Scrape; return every number by its name and labels."""

    def close(self) -> None:
        """Have it show nothing more."""


class ByPrometheus:
    """A registry of its own, read as a server reads it."""

    accepted = "persistency_accepted_operations_total"
    failed = "persistency_failed_operations_total"
    pending = "persistency_pending_operations"
    jobs = "persistency_jobs"
    job_label = "job_id"
    state_label = "state"

    def __init__(self, persistency: Persistency, *, per_job: bool = False) -> None:
        self.registry = CollectorRegistry()
        self._collector = PrometheusCollector(persistency, self.registry, per_job=per_job)
        self.close = self._collector.close

    def read(self) -> dict[tuple[str, Labels], float]:
        text = generate_latest(self.registry).decode()
        families = text_string_to_metric_families(text)
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in families
            for sample in family.samples
        }


class ByOpenTelemetry:
    """A meter provider of its own, read by its reader."""

    accepted = "persistency.operation.accepted"
    failed = "persistency.operation.failed"
    pending = "persistency.operation.pending"
    jobs = "persistency.job.count"
    job_label = "persistency.job.id"
    state_label = "persistency.job.state"

    def __init__(self, persistency: Persistency, *, per_job: bool = False) -> None:
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)
        self._metrics = OpenTelemetryMetrics(persistency, self.provider, per_job=per_job)

    def read(self) -> dict[tuple[str, Labels], float]:
        return points(self.reader.get_metrics_data())

    def close(self) -> None:
        self._metrics.close()


def points(data: MetricsData | None, *, with_root: bool = False) -> dict[tuple[str, Labels], float]:
    """Return the numbers of a collection by name and attributes."""
    found = {}
    for resource in data.resource_metrics if data is not None else []:
        for scope in resource.scope_metrics:
            assert scope.scope.name == "persistency"
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    kept = {k: str(v) for k, v in (point.attributes or {}).items() if with_root or "root" not in k}
                    at = (metric.name, frozenset(kept.items()))
                    assert at not in found
                    found[at] = point.value  # type: ignore[union-attr]  # none is a histogram
    return found


Show = Callable[..., Shown]


@pytest.fixture(params=[ByPrometheus, ByOpenTelemetry])
def show(request: pytest.FixtureRequest) -> Iterator[Show]:
    """Give what shows a `Persistency`; all are closed at the end."""
    shown: list[Any] = []

    def make(persistency: Persistency, **options: Any) -> Shown:
        shown.append(request.param(persistency, **options))
        return shown[-1]

    yield make
    for one in shown:
        one.close()
        if isinstance(one, ByOpenTelemetry):
            one.provider.shutdown()


def labels(**given: str) -> Labels:
    """Return labels as `Shown.read` gives them."""
    return frozenset(given.items())


def total(shown: Shown, name: str) -> float:
    """Return a number that has no labels."""
    return shown.read()[name, labels()]


def by_state(shown: Shown) -> dict[str, float]:
    """Return how many jobs are in which state, those states apart in which none is."""
    numbers = {dict(at)[shown.state_label]: value for (name, at), value in shown.read().items() if name == shown.jobs}
    return {state: value for state, value in numbers.items() if value}


def write(job: Job, rows: int, failing: int = 0) -> None:
    """Commit so many rows, and have so many operations fail."""
    for number in range(rows):
        job.put("c", (number,), b"x")
    for _ in range(failing):
        job.persist(NEVER)
    try:
        job.flush().result(WAIT)
    except WriteFailed as failed:
        assert len(failed.failures) == failing


# -- what is shown ----------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_all_open_jobs(show: Show, persistency: Persistency) -> None:
    """Counters and sizes are the sums over the jobs, the largest is that of one of them, and all states are there."""
    shown = show(persistency)
    assert total(shown, shown.accepted) == 0
    write(persistency.open_job("a"), 10, failing=3)
    write(persistency.open_job("b"), 5)
    numbers = shown.read()
    assert numbers[shown.accepted, labels()] == 18
    assert numbers[shown.failed, labels()] == 3
    assert numbers[shown.pending, labels()] == 0
    assert by_state(shown) == {"live": 2}
    assert {dict(at)[shown.state_label] for name, at in numbers if name == shown.jobs} == {
        "live", "idle", "stalled", "poisoned",
    }  # fmt: skip


def test_what_waits_is_shown_while_it_waits(show: Show, persistency: Persistency) -> None:
    """What waits is a sum, and the most that one job has; a scrape itself waits for nobody."""
    shown = show(persistency)
    entered, gate = threading.Event(), threading.Event()

    def hold(_tx: Any) -> None:
        entered.set()
        assert gate.wait(WAIT)

    jobs = [persistency.open_job(name) for name in "ab"]
    holding = threading.Thread(target=lambda: jobs[0].run(hold).result(WAIT))
    holding.start()
    try:
        assert entered.wait(WAIT)
        for number in range(100):
            jobs[0].put("c", (number,), b"xyz")
        numbers = shown.read()
    finally:
        gate.set()
        holding.join(WAIT)
    named = {name: value for (name, at), value in numbers.items() if not at}
    assert named[shown.pending] >= 100
    largest = [value for name, value in named.items() if name.endswith("_max") and ("pending" in name)]
    assert largest == [named[shown.pending]]
    assert max(value for name, value in named.items() if "mailbox" in name) >= 300


def test_times_are_in_seconds(persistency: Persistency, monkeypatch: pytest.MonkeyPatch) -> None:
    """Percentiles of commits are told in seconds, those of the slowest job, and per job each job's."""
    real = Job.statistics
    from dataclasses import replace

    slow = {"a": 250.0, "b": 20.0}
    monkeypatch.setattr(
        Job,
        "statistics",
        lambda job: replace(real(job), commit_ms_p50=slow[job.id] / 2, commit_ms_p99=slow[job.id], wal_pinned=True),
    )
    for name in slow:
        persistency.open_job(name)
    prometheus, each = ByPrometheus(persistency), ByPrometheus(persistency, per_job=True)
    assert total(prometheus, "persistency_commit_p50_seconds") == 0.125
    assert total(prometheus, "persistency_commit_p99_seconds") == 0.25
    assert total(prometheus, "persistency_wal_pinned_jobs") == 2
    assert each.read()["persistency_commit_p99_seconds", labels(job_id="b")] == 0.02
    assert each.read()["persistency_wal_pinned", labels(job_id="b")] == 1
    otel = ByOpenTelemetry(persistency)
    assert total(otel, "persistency.commit.p50") == 0.125
    assert total(otel, "persistency.commit.p99") == 0.25
    assert total(otel, "persistency.wal.pinned") == 2
    otel.provider.shutdown()


def test_types_and_units_are_those_of_the_field(persistency: Persistency) -> None:
    """Prometheus: counters end in `_total`, and no label is `job`. OpenTelemetry: monotonic sums, UCUM units."""
    persistency.open_job("a")
    shown = ByPrometheus(persistency, per_job=True)
    families = list(text_string_to_metric_families(generate_latest(shown.registry).decode()))
    assert len(families) == 12
    assert {family.type for family in families} == {"counter", "gauge"}
    for family in families:
        assert family.documentation
        for sample in family.samples:
            assert sample.name.endswith("_total") == (family.type == "counter")
            assert "job" not in sample.labels
    otel = ByOpenTelemetry(persistency)
    data = otel.reader.get_metrics_data()
    assert data is not None
    metrics = data.resource_metrics[0].scope_metrics[0].metrics
    assert len(metrics) == 14
    assert {metric.unit for metric in metrics} == {"{operation}", "{commit}", "{job}", "By", "s"}
    counters = {metric.name for metric in metrics if isinstance(metric.data, SumPoints) and metric.data.is_monotonic}
    assert counters == {
        "persistency.operation.accepted", "persistency.operation.committed", "persistency.operation.failed",
        "persistency.commit.count",
    }  # fmt: skip
    otel.provider.shutdown()


def test_how_many_series_there_are(persistency: Persistency) -> None:
    """As docs/watching.md says: 17, whatever the number of jobs; `per_job` 14 for each, and the four states."""
    shown, each = ByPrometheus(persistency), ByPrometheus(persistency, per_job=True)
    for jobs in range(1, 4):
        persistency.open_job(str(jobs))
        assert len(shown.read()) == 17
        assert len(each.read()) == 14 * jobs + 4


def test_openmetrics_can_be_read_too(persistency: Persistency) -> None:
    """The numbers are valid in the stricter of Prometheus' two formats."""
    from prometheus_client.openmetrics.exposition import generate_latest as generate
    from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse

    write(persistency.open_job('a\n"b\\'), 3)
    for per_job in (False, True):
        shown = ByPrometheus(persistency, per_job=per_job)
        found = {family.name: family for family in parse(generate(shown.registry).decode())}
        assert [sample.value for sample in found["persistency_committed_operations"].samples] == [3]


def test_states_of_jobs_in_trouble(show: Show, tmp_path: Path) -> None:
    """A poisoned job is counted as one, for as long as it is open, and so it can be found out which one it is."""
    with Persistency(tmp_path) as persistency:
        shown, each = show(persistency), show(persistency, per_job=True)
        fine, job = persistency.open_job("fine"), persistency.open_job("lost")
        assert job.path is not None
        write(fine, 1)
        job.path.unlink()
        job.put("c", ("k",), b"x")
        with pytest.raises(Exception, match="removed"):
            job.flush().result(WAIT)
        assert by_state(shown) == {"live": 1, "poisoned": 1}
        assert total(shown, shown.failed) == 1
        if isinstance(each, ByPrometheus):
            is_in = {at: value for (name, at), value in each.read().items() if name == "persistency_job_state"}
            assert is_in[labels(job_id="lost", state="poisoned")] == is_in[labels(job_id="fine", state="live")] == 1
            assert sum(is_in.values()) == 2
        with pytest.raises(WriteFailed):
            job.close()
        assert by_state(shown) == {"live": 1}
        assert total(shown, shown.failed) == 1


# -- counters never go backwards --------------------------------------------------------------------------------------


def test_counters_outlive_the_jobs_they_count(show: Show, persistency: Persistency) -> None:
    """What was done between the last scrape and a job's end is counted, and stays; gauges are of open jobs alone."""
    shown = show(persistency)
    job = persistency.open_job("a")
    write(job, 4)
    assert total(shown, shown.accepted) == 4
    write(job, 3)
    job.close()
    write(persistency.open_job("b"), 2)
    assert total(shown, shown.accepted) == 9
    assert by_state(shown) == {"live": 1}
    persistency.close()
    assert total(shown, shown.accepted) == 9
    assert by_state(shown) == {}


def test_a_plain_sum_would_go_backwards(persistency: Persistency) -> None:
    """What these tests are for: adding up what is open falls when a job is closed."""
    job = persistency.open_job("a")
    write(job, 4)
    before = sum(persistency[job_id].statistics().accepted for job_id in persistency)
    job.close()
    assert sum(persistency[job_id].statistics().accepted for job_id in persistency) < before


def test_reopened_jobs_go_on_where_they_were(show: Show, persistency: Persistency) -> None:
    """Per job, too: a job that is closed disappears, and comes back with its counters grown."""
    shown = show(persistency, per_job=True)
    at = (shown.accepted, labels(**{shown.job_label: "a"}))
    job = persistency.open_job("a")
    write(job, 4)
    assert shown.read()[at] == 4
    write(job, 1)
    job.close()
    assert at not in shown.read()
    job = persistency.open_job("a")
    write(job, 2)
    assert shown.read()[at] == 7


def test_what_two_share_is_counted_once(show: Show, tmp_path: Path) -> None:
    """A job that is opened and closed again and again here, while it stays open elsewhere, is counted once."""
    with Persistency(tmp_path) as web, Persistency(tmp_path) as cron:
        shown, kept = show(cron), web.open_job("a")
        write(kept, 10)
        for night in range(1, 4):
            with cron.open_job("a") as job:
                write(job, 1)
                assert total(shown, shown.accepted) == 10 + night
            assert total(shown, shown.accepted) == 10 + night
        write(kept, 5)  # nothing of cron's: it isn't open there
        assert total(shown, shown.accepted) == 13
        cron.open_job("a")
        assert total(shown, shown.accepted) == 18


def test_a_job_that_closes_slowly_is_counted_to_its_end(show: Show, persistency: Persistency) -> None:
    """A handle that was closed with work left is asked again until there is none."""
    shown = show(persistency)
    job = persistency.open_job("a")
    entered, gate = threading.Event(), threading.Event()

    def hold(_tx: Any) -> None:
        entered.set()
        assert gate.wait(WAIT)

    holding = threading.Thread(target=lambda: job.run(hold).exception(WAIT))
    holding.start()
    try:
        assert entered.wait(WAIT)
        for number in range(10):
            job.persist([Put("c", (number,), b"x"), NEVER])
        assert total(shown, shown.failed) == 0
        with pytest.raises(TimeoutError):
            job.close(timeout=0)
        assert total(shown, shown.failed) == 0
    finally:
        gate.set()
        holding.join(WAIT)
    with contextlib.suppress(WriteFailed):  # or it is closed by now
        job.close(WAIT)
    assert total(shown, shown.failed) == 20
    assert total(shown, shown.accepted) == 21


def test_whatever_opens_and_closes_counters_only_grow(tmp_path: Path) -> None:
    """Jobs opened, used, closed, dropped and reopened in random order, shared or not; with each seen, none is lost."""
    seed = random.SystemRandom().getrandbits(32)
    print(f"seed {seed}")
    rnd = random.Random(seed)
    with Persistency(tmp_path) as p, Persistency(tmp_path) as other:
        counting = Counting(p, by_job=True)
        before, of_job, posted = Counters(), dict[str, Counters](), 0
        for _ in range(200):
            job_id = rnd.choice("abc")
            act = rnd.choice(["write", "write", "close", "drop", "share", "unshare"])
            if act == "write":
                job = p.open_job(job_id)
                counting.take()  # seen once, so that it isn't opened and closed unseen
                write(job, rows := rnd.randrange(5), failing := rnd.randrange(2))
                posted += rows + failing
            elif act == "close":
                p.close_job(job_id)
            elif act == "drop" and not other.has_job(job_id):
                p.drop_job(job_id)
            elif act == "share":
                other.open_job(job_id)
            elif act == "unshare":
                other.close_job(job_id)
            if rnd.random() < 0.5:
                now = counting.take()
                assert all(new >= old for new, old in zip(now.total, before, strict=True))
                before = now.total
                for counted in now.jobs:
                    old = of_job.get(counted.job_id, Counters())
                    assert all(n >= o for n, o in zip(counted.counters, old, strict=True))
                    of_job[counted.job_id] = counted.counters
        last = counting.take().total
        assert (last.accepted, last.committed + last.failed) == (posted, posted)


def test_delta_temporality_never_sees_a_negative(persistency: Persistency) -> None:
    """An exporter that wants differences gets what was done in between, over a job's closing and reopening."""
    reader = InMemoryMetricReader(
        preferred_temporality=dict.fromkeys(_observable_kinds(), AggregationTemporality.DELTA)
    )
    provider = MeterProvider([reader], shutdown_on_exit=False)
    with OpenTelemetryMetrics(persistency, provider, per_job=True):
        at = ("persistency.operation.accepted", labels(**{"persistency.job.id": "a"}))
        for rows in (5, 1, 3):
            with persistency.open_job("a") as job:
                write(job, rows)
                assert points(reader.get_metrics_data())[at] == rows
    provider.shutdown()


def _observable_kinds() -> list[type]:
    from opentelemetry.sdk.metrics import ObservableCounter, ObservableUpDownCounter

    return [ObservableCounter, ObservableUpDownCounter]


def test_what_is_remembered_of_closed_jobs_is_bounded(
    persistency: Persistency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of ids that are gone only the latest are known; the sum has all of them, and open ones are never forgotten."""
    monkeypatch.setattr(census, "_LEFT_MAX", 3)
    counting = Counting(persistency, by_job=True)
    write(persistency.open_job("kept"), 1)
    for number in range(20):
        with persistency.open_job(f"job-{number}") as job:
            write(job, 1)
            counting.take()
    assert counting.take().total.accepted == 21
    assert len(counting._of_job) == len(counting._counted) == 4
    assert set(counting._of_job) == {"kept", "job-17", "job-18", "job-19"}
    assert [job.counters.accepted for job in counting.take().jobs] == [1]


# -- what it costs ----------------------------------------------------------------------------------------------------


def test_a_scrape_asks_each_job_once_and_runs_no_statement(
    show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For 20 jobs: 20 calls of `statistics`, whatever the number of instruments; no ring, no turn, no SQL."""
    counted: Counter[str] = Counter()

    def count(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            counted[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counting)

    def trace(_cursor: Any, sql: str, _bindings: Any) -> bool:
        counted[sql] += 1
        return True

    quiet = Quiet(monkeypatch)
    with Persistency(tmp_path) as persistency:
        shown = show(persistency)
        jobs = [persistency.open_job(f"job-{number}") for number in range(20)]
        for job in jobs:
            write(job, 2)
            quiet.wait(job)
            job._statistics.__self__.store._connection.exec_trace = trace  # type: ignore[attr-defined]  # the worker's
        count(Job, "statistics")
        count(Sleeper, "_ring")
        count(Worker, "serve")
        for scrapes in (1, 2):
            shown.read()
            assert counted == {"statistics": 20 * scrapes}
        for job in jobs:
            job._statistics.__self__.store._connection.exec_trace = None  # type: ignore[attr-defined]  # as above
        monkeypatch.undo()


def test_a_scrape_wakes_no_job_that_rests(show: Show, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs at rest are counted as idle and stay so; none is opened for it."""
    quiet = Quiet(monkeypatch)
    with Persistency(tmp_path, max_live_jobs=1) as persistency:
        shown = show(persistency)
        for name in "abcde":
            job = persistency.open_job(name)
            write(job, 1)
            quiet.wait(job)
        begun: list[str] = []
        monkeypatch.setattr(Worker, "start", lambda worker: begun.append(worker._job_id))
        for _ in range(3):
            assert by_state(shown) == {"live": 1, "idle": 4}
            assert total(shown, shown.accepted) == 5
        assert begun == []
        monkeypatch.undo()


def test_percentiles_are_sorted_again_only_after_a_commit(
    persistency: Persistency, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking again what hasn't changed costs no sorting; a commit is seen at once."""
    from persistency.actor import tally

    sorts = 0

    def counting(values: Any) -> list[float]:
        nonlocal sorts
        sorts += 1
        return sorted(values)

    monkeypatch.setattr(tally, "sorted", counting, raising=False)
    job = persistency.open_job("a")
    write(job, 1)
    first = job.statistics()
    assert (sorts, first.commits > 0, first.commit_ms_p50 > 0) == (1, True, True)
    assert job.statistics() == first
    assert sorts == 1
    write(job, 1)
    assert job.statistics().commits > first.commits
    assert sorts == 2


def test_each_opening_has_a_number_of_its_own(persistency: Persistency) -> None:
    """Counters begin anew with an opening, and the statistics tell one from the next."""
    openings = set()
    for _ in range(3):
        with persistency.open_job("a") as job, persistency.open_job("b") as other:
            openings |= {job.statistics().opening, other.statistics().opening}
    assert len(openings) == 6


# -- beside everything else -------------------------------------------------------------------------------------------


def test_scrapes_beside_jobs_that_come_and_go(show: Show, tmp_path: Path) -> None:
    """Two who scrape at once, beside jobs that are opened and closed: nobody fails, and no counter falls."""
    problems: list[object] = []
    done = threading.Event()
    with Persistency(tmp_path, max_live_jobs=2) as persistency:
        shown = show(persistency)

        def scrape() -> None:
            try:
                last = 0.0
                while not done.is_set():
                    counting = shown._metrics if isinstance(shown, ByOpenTelemetry) else shown._collector  # type: ignore[attr-defined]
                    now = float(counting._counting.take().total.accepted)
                    if now < last:
                        problems.append((now, last))
                    last = now
                    shown.read()
            except BaseException as error:
                problems.append(error)

        scraping = [threading.Thread(target=scrape) for _ in range(2)]
        for thread in scraping:
            thread.start()
        for number in range(60):
            with persistency.open_job(f"job-{number % 7}") as job:
                write(job, 3)
        done.set()
        for thread in scraping:
            thread.join(WAIT)
            assert not thread.is_alive()
    assert problems == []


def test_nobody_is_kept_alive(show: Show, tmp_path: Path) -> None:
    """A `Persistency` that is shown goes when its owner drops it, without a collection of cycles; its counters stay."""
    persistency = Persistency(tmp_path)
    shown = show(persistency)
    write(persistency.open_job("a"), 3)
    assert total(shown, shown.accepted) == 3
    persistency.close()
    gone = weakref.ref(persistency)
    gc.disable()
    try:
        del persistency
        assert gone() is None
    finally:
        gc.enable()
    assert total(shown, shown.accepted) == 3
    assert by_state(shown) == {}


def test_closed_ones_show_nothing_and_let_go(show: Show, persistency: Persistency) -> None:
    """After `close`, and after a second one, there is nothing to be seen; another one may come in its place."""
    shown = show(persistency)
    write(persistency.open_job("a"), 1)
    assert shown.read()
    shown.close()
    shown.close()
    assert shown.read() == {}
    if isinstance(shown, ByPrometheus):
        with PrometheusCollector(persistency, shown.registry):
            assert total(shown, shown.accepted) == 1
    elif isinstance(shown, ByOpenTelemetry):
        with OpenTelemetryMetrics(persistency, shown.provider):
            assert total(shown, shown.accepted) == 1
    assert shown.read() == {}


def test_in_a_forked_child_nothing_is_shown(tmp_path: Path) -> None:
    """The parent's numbers aren't the child's; asking for them there fails nobody, and the child may show its own."""
    program = """
import gc, os, sys, warnings
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from prometheus_client import CollectorRegistry, generate_latest
from persistency import Persistency
from persistency.integrations.opentelemetry import OpenTelemetryMetrics
from persistency.integrations.prometheus import PrometheusCollector

warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
registry, reader = CollectorRegistry(), InMemoryMetricReader()
provider = MeterProvider([reader])
with Persistency(sys.argv[1]) as p:
    collector, metrics = PrometheusCollector(p, registry), OpenTelemetryMetrics(p, provider)
    p.open_job("a").put("c", ("k",), b"x")
    shown = generate_latest(registry)
    assert b"persistency_accepted_operations_total 1.0" in shown, shown
    assert reader.get_metrics_data() is not None
    collector._counting._lock.acquire()  # as if another thread were in the middle of it
    child = os.fork()
    if child == 0:
        code = 1
        try:
            assert generate_latest(registry) == b""
            data = reader.get_metrics_data()
            assert data is None or not any(m.data.data_points for r in data.resource_metrics
                                           for s in r.scope_metrics for m in s.metrics)
            with Persistency(sys.argv[2]) as own, PrometheusCollector(own, CollectorRegistry()) as other:
                own.open_job("b")
                assert [m for m in other.collect() if m.name == "persistency_jobs"][0].samples[0].value == 1
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    collector._counting._lock.release()
    assert b"persistency_accepted_operations_total 1.0" in generate_latest(registry)
    collector.close()
    metrics.close()
"""
    command = [sys.executable, "-c", program, str(tmp_path / "mine"), str(tmp_path / "childs")]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr


# -- Prometheus alone -------------------------------------------------------------------------------------------------


def test_several_roots_need_several_prefixes(tmp_path: Path) -> None:
    """Names that are taken are refused at once, and nothing is asked of anybody for it; another prefix is fine."""
    registry = CollectorRegistry()
    with Persistency(tmp_path / "a") as a, Persistency(tmp_path / "b") as b, PrometheusCollector(a, registry):
        with pytest.raises(ValueError, match="Duplicated"):
            PrometheusCollector(b, registry)
        with PrometheusCollector(b, registry, prefix="cache"):
            write(b.open_job("x"), 2)
            text = generate_latest(registry).decode()
    assert "cache_accepted_operations_total 2.0" in text
    assert "persistency_accepted_operations_total 0.0" in text


def test_without_a_registry_it_is_registered_by_hand(persistency: Persistency) -> None:
    """`registry=None` registers nowhere; the object is an ordinary collector."""
    registry = CollectorRegistry(auto_describe=True)
    collector = PrometheusCollector(persistency, None)
    registry.register(collector)
    assert b"persistency_jobs" in generate_latest(registry)
    collector.close()  # it isn't there that it was registered by itself
    assert b"persistency_jobs" in generate_latest(registry)


@pytest.mark.parametrize("make", [PrometheusCollector, OpenTelemetryMetrics])
def test_what_is_no_persistency_is_refused(make: Any, tmp_path: Path) -> None:
    """A root's path, or a job, is `Misuse` at the call, and nothing is left registered."""
    registry = CollectorRegistry()
    with pytest.raises(Misuse, match="must be a Persistency, not str"):
        make(str(tmp_path), registry)
    assert generate_latest(registry) == b""


# -- OpenTelemetry alone ----------------------------------------------------------------------------------------------


def test_several_roots_share_a_meter(tmp_path: Path) -> None:
    """Each has its own root among its attributes, or what it was given; one that is closed leaves the others."""
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader], shutdown_on_exit=False)
    with Persistency(tmp_path / "a") as a, Persistency(tmp_path / "b") as b:
        write(a.open_job("x"), 1)
        write(b.open_job("x"), 2)
        first = OpenTelemetryMetrics(a, provider)
        with OpenTelemetryMetrics(b, provider, attributes={"persistency.root": "cache", "zone": 7}):
            found = points(reader.get_metrics_data(), with_root=True)
            name = "persistency.operation.accepted"
            assert found[name, frozenset({("persistency.root", a.root)})] == 1
            assert found[name, frozenset({("persistency.root", "cache"), ("zone", "7")})] == 2
            first.close()
            found = points(reader.get_metrics_data(), with_root=True)
            assert {dict(at)["persistency.root"] for _, at in found} == {"cache"}
    provider.shutdown()


def test_two_readers_get_the_same(persistency: Persistency) -> None:
    """Whoever collects second gets a census of its own: nobody is told what was so a while ago."""
    readers = [InMemoryMetricReader(), InMemoryMetricReader()]
    provider = MeterProvider(readers, shutdown_on_exit=False)
    job = persistency.open_job("a")
    with OpenTelemetryMetrics(persistency, provider):
        for rows in (1, 2, 3):
            write(job, 1)
            for reader in readers:
                assert points(reader.get_metrics_data())["persistency.operation.accepted", labels()] == rows
    provider.shutdown()


def test_the_global_provider_may_come_later(tmp_path: Path) -> None:
    """Without a provider it is the global one, whenever that is set; and who names it shares its instruments."""
    program = """
import sys
from opentelemetry import metrics
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from persistency import Persistency
from persistency.integrations.opentelemetry import OpenTelemetryMetrics

with Persistency(sys.argv[1]) as a, Persistency(sys.argv[2]) as b, Persistency(sys.argv[3]) as c:
    early = OpenTelemetryMetrics(a)
    reader = InMemoryMetricReader()
    provider = MeterProvider([reader])
    metrics.set_meter_provider(provider)
    late, named = OpenTelemetryMetrics(b), OpenTelemetryMetrics(c, provider)
    for p in (a, b, c):
        p.open_job("x").put("c", ("k",), b"x")
    (resource,) = reader.get_metrics_data().resource_metrics
    (scope,) = resource.scope_metrics
    (accepted,) = [m for m in scope.metrics if m.name == "persistency.operation.accepted"]
    found = {point.attributes["persistency.root"]: point.value for point in accepted.data.data_points}
    assert found == {a.root: 1, b.root: 1, c.root: 1}, found
    for shown in (early, late, named):
        shown.close()
"""
    command = [sys.executable, "-W", "error", "-c", program, *(str(tmp_path / name) for name in "abc")]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_without_a_provider_nothing_happens(persistency: Persistency, tmp_path: Path) -> None:
    """With the API alone, and no SDK, it costs nothing and fails nobody."""
    from opentelemetry.metrics import NoOpMeterProvider

    with OpenTelemetryMetrics(persistency, NoOpMeterProvider()):
        write(persistency.open_job("a"), 1)


def test_only_the_api_is_imported() -> None:
    """The SDK, an exporter, a propagator: which of them there are is the service's business."""
    program = (
        "import sys, persistency.integrations.opentelemetry; "
        "print([name for name in sys.modules if name.startswith('opentelemetry.sdk')])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout == "[]\n"


def test_statistics_keep_their_fields() -> None:
    """What a census reads is there; `opening` is the last, so that nobody's positions change."""
    assert list(Statistics.__dataclass_fields__)[-1] == "opening"
