"""Duplicating: the work behind `persistency copy`, from the first look to the last row compared.

Rules:
  1. Both jobs are had for the whole of it: nobody else writes to either.
  2. The clock stands still on both sides: what is a row when it begins is one until it is through, and ends don't move.
  3. From its first row on to its last a copy has a mark, a row in a category of its own. It goes when every row was
     found the same on both sides and all is on the medium. What fails or is stopped takes the copy along; where even
     that can't be done, the mark says what it is.
  4. A job is never copied into: what was there is deleted first, and only if it is such a rest, or by request.

Doesn't know: the terminal, what kind of root either is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import time
from typing import NamedTuple, TypeAlias

from persistency import Entry, Job, JobLocked, Persistency, PersistencyError
from persistency.cli.cborstream import Interrupted, read_stream, write_stream
from persistency.cli.comparing import Compared
from persistency.cli.ending import Fault, Stop, stopped
from persistency.cli.opening import find, having, is_url, owned
from persistency.cli.ordering import Order, order_of
from persistency.cli.show import Advance
from persistency.codec.values import encode

MARK = "persistency.copy"
"""The category that only a copy has that isn't through."""
_STALL_SECONDS = 10.0  # a server may be away for a moment; who waits for a command would rather be told then

Compare: TypeAlias = Callable[[Job, Job, Order, str, Callable[[int], None]], Compared]
Showing: TypeAlias = Callable[[str], AbstractContextManager[Advance]]


class Way(NamedTuple):
    """From where to where: two roots, and the job's id in each."""

    root: str
    job_id: str
    to: str
    new_id: str


@dataclass(frozen=True, slots=True)
class _Standing:
    """Unix seconds that don't go on."""

    seconds: float

    def __call__(self) -> float:
        return self.seconds


def duplicate(way: Way, compare: Compare, showing: Showing, *, replace: bool) -> Compared:
    """Copy a job and compare the copy; return what both have.

    Raises `Fault` for what isn't there, is there already or isn't the same, `PersistencyError` for what a job
    refuses, `Stop` with a word about what was done.
    """
    clock = _Standing(time())
    try:
        with having(way.root, way.job_id, clock=clock) as source:
            if MARK in source.categories().result():
                hint = "Copy it again from where it came, or delete it."
                raise Fault(f"job {way.job_id!r} is a copy that was broken off", hint)
            ttl = _time_left(way, clock)
            with showing("looking at") as advance, order_of(source, lambda rows: advance(rows, None)) as order:
                _make_room(way, replace=replace)
                with _receiving(way, clock, ttl) as target:
                    return _copied(way, source, target, order, compare, showing)
    except (KeyboardInterrupt, SystemExit) as stop:
        raise stopped(stop, f"there is no copy of job {way.job_id!r}") from None


def _time_left(way: Way, clock: _Standing) -> float | None:
    """Return the seconds after which the job itself ends."""
    with Persistency(way.root) as persistency:
        expires = find(persistency, way.root, way.job_id).expires
    return None if expires is None else expires - clock.seconds


def _make_room(way: Way, *, replace: bool) -> None:
    """Delete the copy's job if it is there and may go. Raises `Fault` if it has rows, and may not."""
    with Persistency(way.to) as persistency:
        there = [stored for stored in persistency.stored_jobs() if stored.job_id == way.new_id]
        if not there:
            return
        if not replace and (there[0].expires is None or there[0].expires > time()):
            with having(way.to, way.new_id) as job:
                names = job.categories().result()
            if names and MARK not in names:
                hint = "Name another id with --as, or have what is there deleted, with --replace."
                raise Fault(f"job {way.new_id!r} in {persistency.root} has rows: {', '.join(names)}", hint)
        try:
            persistency.drop_job(way.new_id)
        except JobLocked as error:
            raise owned(error) from error


@contextmanager
def _receiving(way: Way, clock: _Standing, ttl: float | None) -> Iterator[Job]:
    """Give the copy's job, new and empty; what goes wrong takes it along."""
    with Persistency(way.to, clock=clock) as persistency:
        try:
            job = persistency.open_job(way.new_id, ttl=ttl, stall_timeout=_STALL_SECONDS)
        except JobLocked as error:
            raise owned(error) from error
        try:
            with job:
                yield job
        except BaseException:
            with suppress(PersistencyError, OSError):
                persistency.drop_job(way.new_id)
                if not is_url(way.to):
                    Path(way.to).rmdir()  # if there is nothing else in it
            raise


def _copied(way: Way, source: Job, target: Job, order: Order, compare: Compare, showing: Showing) -> Compared:
    if target.version().result():
        raise Fault(f"job {way.new_id!r} was written to by somebody else meanwhile")
    target.put(MARK, ("begun",), encode({"from": way.job_id, "rows": order.rows}))
    target.flush().result()
    with showing("copying") as advance:
        _send(source, target, order, lambda rows: advance(rows, order.rows))
    with showing("comparing") as advance:
        compared = compare(source, target, order, MARK, lambda rows: advance(rows, order.rows))
    target.flush(sync=True).result()
    target.delete(MARK, ("begun",))
    target.flush(sync=True).result()
    return compared


def _send(source: Job, target: Job, order: Order, advance: Callable[[int], None]) -> None:
    """Put all rows into the copy, as the stream of an export."""
    try:
        read_stream(target, _stream(source, order), advance)
    except Interrupted as interrupted:
        stop: Stop = interrupted.stop
        raise stop from None


def _stream(source: Job, order: Order) -> Iterator[bytes]:
    written: list[bytes] = []
    for _count in write_stream(source, _rows(source, order), written.append):
        yield b"".join(written)
        written.clear()
    yield b"".join(written)


def _rows(source: Job, order: Order) -> Iterator[tuple[str, Entry]]:
    for page in order.pages():
        asked = [(category, source.entry(category, at)) for category, at in page]
        for category, reply in asked:
            entry = reply.result()
            if entry is not None:
                yield category, entry
