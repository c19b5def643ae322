"""The demonstration: real records through a job, and a killed writer, with every count checked.

Rules:
  1. What it shows it has checked against its own account of what was posted; a count that is off is a fault, and a
     demonstration with a fault fails.
  2. In a root that is given it replaces the two jobs of an earlier run and touches nothing else; a root that isn't
     given is temporary, and is removed.
  3. It keeps a digest and the key of each record in memory, for the checks.

Doesn't know: the terminal, how records are read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from time import monotonic
from typing import Any, Protocol

from persistency import Job, Key, KeyRange, Misuse, Persistency, Row, key
from persistency.cli.demonstrating import KILLED_JOB, STREAM_JOB
from persistency.cli.ending import Fault, stopped
from persistency.cli.keys import format_key, key_to_json
from persistency.cli.kill import Killed, kill_writer
from persistency.cli.show import show_counts, show_pairs
from persistency.cli.stream import Posted, Streamed, stream
from persistency.cli.verify import count_faults, rows_faults

CATEGORY = "records"
# A read waits for what was posted before it. The producer is busy all the time with making records, so the mailbox is
# full most of the time, and its bound is what a read's time is made of: enough to share a commit, and no more.
_MAILBOX_OPS_MAX = 256
_PREFIXES_SHOWN = 5
_ROWS_SHOWN = 5


class Source(Protocol):
    """Where records come from: a title, the place that was read last, and (key, payload) pairs."""

    title: str
    size: int | None

    @property
    def position(self) -> int:
        """How far it is, in the unit of `size`."""
        raise NotImplementedError

    @property
    def where(self) -> str:
        """The place that was read last, for messages."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[tuple[Key, bytes]]: ...


@dataclass(frozen=True, slots=True)
class Summary:
    """What happened, and what was wrong."""

    title: str
    records: int
    keys: int
    streamed: Streamed
    prefixes: list[tuple[Key, int]]
    range_rows: int
    last_rows: list[Row]
    killed: Killed
    seconds: float
    faults: list[str]

    def to_json(self) -> dict[str, Any]:
        """Return the numbers as JSON data."""
        streamed, killed = asdict(self.streamed), asdict(self.killed)
        return {
            "source": self.title,
            "records": self.records,
            "keys": self.keys,
            "seconds": round(self.streamed.seconds, 3),
            "records_per_second": round(self.records / self.streamed.seconds),
            **{name: streamed[name] for name in ("reads", "read_ms_p50", "read_ms_p99")},
            "prefixes": [{"prefix": key_to_json(prefix), "rows": rows} for prefix, rows in self.prefixes],
            "range": {"rows": self.range_rows, "last": [key_to_json(row.key) for row in self.last_rows]},
            "killed": {name: killed[name] for name in ("posted", "flushed", "recovered", "total")},
            "demo_seconds": round(self.seconds, 3),
            "faults": self.faults,
        }


def demonstrate(root: str, source: Source, advance: Callable[[int], None]) -> Summary:
    """Run the demonstration in a root.

    Raises `Fault` for a source that is no good or empty, and `KeyboardInterrupt` with a word about what was done.
    """
    posted = Posted()
    started = monotonic()
    try:
        with Persistency(root) as persistency:
            persistency.drop_job(STREAM_JOB)
            with persistency.open_job(STREAM_JOB, mailbox_ops_max=_MAILBOX_OPS_MAX) as job:
                streamed = _stream(job, source, posted, advance)
                ordered = sorted(posted.digests)
                faults = streamed.faults + rows_faults("the whole scan", job.iterate(CATEGORY), ordered, posted.digests)
                prefixes = _scan_prefixes(job, ordered, posted, faults)
                range_rows, last_rows = _scan_backwards(job, ordered, posted, faults)
            killed = kill_writer(persistency, KILLED_JOB)
    except (KeyboardInterrupt, SystemExit) as stop:
        raise stopped(stop, f"{posted.records:,} records were posted") from None
    return Summary(
        title=source.title,
        records=posted.records,
        keys=len(ordered),
        streamed=streamed,
        prefixes=prefixes,
        range_rows=range_rows,
        last_rows=last_rows,
        killed=killed,
        seconds=monotonic() - started,
        faults=faults + killed.faults,
    )


def _stream(job: Job, source: Source, posted: Posted, advance: Callable[[int], None]) -> Streamed:
    try:
        streamed = stream(job, CATEGORY, source, posted, advance)
    except Misuse as error:
        raise Fault(f"{source.where}: {error}", error.hint) from error
    if not posted.records:
        raise Fault(f"{source.title} has no records")
    advance(posted.records)
    return streamed


def _scan_prefixes(job: Job, ordered: Sequence[Key], posted: Posted, faults: list[str]) -> list[tuple[Key, int]]:
    """Scan the first parts that have the most keys; return them with their counts."""
    # As keys, 1 and True and 1.0 are three; as parts of a tuple they would be counted as one.
    firsts = [key(one.parts[0]) for one in ordered]
    shown = []
    for prefix, _rows in Counter(firsts).most_common(_PREFIXES_SHOWN):
        expected = [one for one, first in zip(ordered, firsts, strict=True) if first == prefix]
        rows = job.scan_prefix(CATEGORY, prefix).result()
        what = f"the prefix scan of {format_key(prefix)}"
        faults += rows_faults(what, rows, expected, posted.digests)
        faults += count_faults(f"the count of {format_key(prefix)}", _count(job, prefix), len(expected))
        shown.append((prefix, len(rows)))
    return shown


def _count(job: Job, prefix: Key) -> int:
    return job.count(CATEGORY, KeyRange.prefix(prefix)).result()


def _scan_backwards(job: Job, ordered: Sequence[Key], posted: Posted, faults: list[str]) -> tuple[int, list[Row]]:
    """Scan the middle third of the keys in reverse; return how many they are, and the first rows of the answer."""
    middle = ordered[len(ordered) // 3 : len(ordered) * 2 // 3 + 1]
    stop = ordered[len(ordered) * 2 // 3 + 1] if len(ordered) * 2 // 3 + 1 < len(ordered) else None
    rows = job.scan(CATEGORY, KeyRange(middle[0], stop), reverse=True).result()
    faults += rows_faults("the reverse scan", rows, middle[::-1], posted.digests)
    return len(rows), rows[:_ROWS_SHOWN]


def show_summary(summary: Summary) -> None:
    """Show what happened as tables."""
    streamed, killed = summary.streamed, summary.killed
    show_counts(
        "Prefix scans: the first parts with the most keys",
        ("prefix", "rows"),
        [(format_key(prefix), f"{rows:,}") for prefix, rows in summary.prefixes],
    )
    show_counts(
        f"A range scan in reverse: the first of {summary.range_rows:,} rows",
        ("key", "payload bytes"),
        [(format_key(row.key), f"{len(row.payload):,}") for row in islice(summary.last_rows, _ROWS_SHOWN)],
    )
    show_pairs(
        "What happened",
        [
            ("records posted", f"{summary.records:,} ({summary.title})"),
            ("keys stored", f"{summary.keys:,}"),
            ("seconds until committed", f"{streamed.seconds:.2f}"),
            ("records/s", f"{summary.records / streamed.seconds:,.0f}"),
            ("reads beside the stream", f"{streamed.reads:,}, each behind up to {_MAILBOX_OPS_MAX} writes"),
            ("a read's p50, ms", f"{streamed.read_ms_p50:.3f}"),
            ("a read's p99, ms", f"{streamed.read_ms_p99:.3f}"),
            ("a writer was killed: rows posted", f"{killed.posted:,} of {killed.total:,}"),
            ("rows it had flushed", f"{killed.flushed:,}"),
            ("rows recovered", f"{killed.recovered:,}, {'an exact prefix' if not killed.faults else 'WRONG'}"),
            ("faults", f"{len(summary.faults):,}"),
        ],
    )
