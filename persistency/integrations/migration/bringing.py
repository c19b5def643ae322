"""Bringing over: the items of another store become rows of a job.

Rules:
  1. An item comes along whole or not at all, and what doesn't is counted, with its reason.
  2. Rows are stored in batches of bounded size, each one transaction. Where it stops early, all items up to the last
     batch are dealt with, and none behind it. Bringing the same things again writes the same rows.
  3. An end is a moment, and stays the same moment.
  4. Two keys of an origin don't become one: a tuple is the key's parts, but a tuple of one stays a tuple within the
     key, since anything that isn't a tuple becomes a key of that one part.

Doesn't know: how origins are read, how pickles are, the terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from itertools import islice
from time import monotonic
from typing import Any, Final, NamedTuple, TypeAlias

from persistency import CBOR, Codec, Job, Key, Misuse, PersistencyError, Transaction
from persistency import key as key_of_parts
from persistency.integrations.migration.items import Item, Later, Lost, Origin, Part, Parts, Pickled, Reason
from persistency.integrations.migration.pickles import Unpickle, reader_of
from persistency.integrations.migration.report import Report, leave, shown_key

KeyOf: TypeAlias = Callable[[Any], Key | tuple[Any, ...]]

DEFAULT_CATEGORY: Final = "records"
PICKLES: Final = ".pickles"
BATCH_ITEMS_MAX: Final = 1024
BATCH_BYTES_MAX: Final = 1024 * 1024
_ENDS_MAX = 10_000_000_000.0  # in the year 2286; what ends later doesn't end
_ATTEMPTS = 100
_NAME_SHOWN_MAX = 100
_ALONE = (
    "Bring tables one at a time, each into a category that you name: tables=[name] and category=..., or --table NAME "
    "and --category. The empty name is the table that has none."
)


def bring(
    job: Job,
    origin: Origin,
    *,
    category: str | None = None,
    codec: Codec[Any] = CBOR,
    key: KeyOf | None = None,
    unpickle: Unpickle | None = None,
    keep_pickles: bool = False,
    atomic: bool = False,
    dry_run: bool = False,
    progress: Callable[[int, int], object] | None = None,
) -> Report:
    """Store the items of another store, which is only read, as rows of a job; return what came along and what didn't.

    Each part of the origin becomes a category of its name; what has none becomes `records`. `category` names another
    one, if there is but one part; two parts that would become one category are refused. A value is stored by `codec`,
    so that `Category(job, name, codec)` reads it: with `CBOR` as the object it was, with `RAW` as its bytes, where it
    is bytes. A key that is a tuple is that key, any other a key of one part; `key` is a function that says it in
    another way.

    `unpickle`: whether pickles are read. `None`: they aren't, and can't come along. `"plain"`: those of plain data, by
    `read_plain`, which runs nothing. `"trust"`: all, by `pickle.loads`, which runs whatever they say: only for files
    that nobody else could write to. Or a function of your own. With `keep_pickles` a pickle that isn't read, or
    has a value that can't be stored, comes along as the bytes it is, into the category with `.pickles` behind its name.

    `atomic`: one transaction for all, in memory; and if something can't come along nothing is stored. `dry_run`: look
    at everything, store nothing. `progress(done, total)` is called between batches, and may raise to stop.

    It works in the calling thread, and waits: under an event loop call it by `asyncio.to_thread`.

    Raises `Misuse` for wrong arguments, `FileNotFoundError`, `Corrupt` or `Unavailable` if the origin can't be read,
    and what the job raises; then what was stored before stays, and a note says how far it came.
    """
    if not isinstance(job, Job):
        raise Misuse(f"job must be a Job, not {type(job).__name__}: pass what open_job gave")
    if not callable(getattr(origin, "open", None)):
        raise Misuse("origin must be an origin: pass Diskcache(path), Sqlitedict(path) or Lmdb(path)")
    if job.path is not None and origin.path.exists() and job.path.samefile(origin.path):
        raise Misuse(f"{origin.path} is the job's own file: pass that of another store")
    read = reader_of(unpickle)
    bringing = _Bringing(job, codec, key or _key_of, read, keep=keep_pickles, atomic=atomic, dry_run=dry_run)
    started = monotonic()
    with origin.open() as parts:
        if category is not None and len(parts) > 1:
            names = ", ".join(repr(part.name) for part in parts)
            raise Misuse(
                f"category {category!r} is one, and {origin.path} has {len(parts)} parts", hint=f"They are {names}."
            )
        bringing.run(origin, parts, category, progress)
        if isinstance(parts, Parts):
            bringing.report.passed_over.update(parts.passed_over)
            bringing.report.guessed.update(parts.guessed)
    bringing.report.seconds = monotonic() - started
    return bringing.report


def _key_of(found: Any) -> Key:
    """Return the key that stands for one of an origin, and for no other."""
    if isinstance(found, Key):
        return found
    return key_of_parts(*found) if isinstance(found, tuple) and len(found) != 1 else key_of_parts(found)


class _Row(NamedTuple):
    """A row that is to be stored, the item it is made of, and whether that is a pickle that is kept as one."""

    category: str
    key: Key
    payload: bytes
    ends_ms: int | None
    part: str | None
    item: Item
    kept: bool


_Verdict: TypeAlias = Lost | bool
"""What has become of a row: it is stored, or has ended by now (false), or is refused."""


class _Undone(Exception):
    """What undoes a transaction, once it is known what would have become of its rows."""

    def __init__(self, verdicts: list[_Verdict]) -> None:
        super().__init__()
        self.verdicts = verdicts


class _Bringing:
    """One migration under way."""

    def __init__(
        self,
        job: Job,
        codec: Codec[Any],
        key_of: KeyOf,
        unpickle: Callable[[bytes], Any] | None,
        *,
        keep: bool,
        atomic: bool,
        dry_run: bool,
    ) -> None:
        self.report: Report = Report(dry_run=dry_run)
        self._job = job
        self._codec = codec
        self._key_of = key_of
        self._unpickle = unpickle
        self._keep = keep
        self._atomic = atomic
        self._rows: list[_Row] = []
        self._bytes = 0
        self._done = 0  # so many items were dealt with when the batch at hand began

    def run(
        self,
        origin: Origin,
        parts: Sequence[Part],
        category: str | None,
        progress: Callable[[int, int], object] | None,
    ) -> None:
        """Bring all parts, and wait until all of it is committed."""
        targets = [(part.name or DEFAULT_CATEGORY) if category is None else category for part in parts]
        self._check_targets(origin, parts, targets)
        total = sum(part.count for part in parts)
        for part, name in zip(parts, targets, strict=True):
            items = iter(part)
            while self._take_batch(part, items, name):
                if not self._atomic:
                    self._store()
                if progress is not None:
                    progress(self.report.records, max(total, self.report.records))
        self._store()
        self._job.flush().result()

    def _check_targets(self, origin: Origin, parts: Sequence[Part], targets: Sequence[str]) -> None:
        """Refuse what can't be a category's name, and two parts that would become one category."""
        taken: dict[str, str | None] = {}
        for part, name in zip(parts, targets, strict=True):
            for used in [name, name + PICKLES] if self._keep else [name]:
                try:
                    self._job.exists(used, (None,)).result()
                except Misuse as error:
                    shown = f"{str(part.name)[:_NAME_SHOWN_MAX]!r} of {origin.path}"
                    raise Misuse(
                        f"{shown} can't come into category {used[:_NAME_SHOWN_MAX]!r}: {error}", hint=_ALONE
                    ) from error
                if used in taken:
                    both = f"{taken[used]!r} and {part.name!r} of {origin.path}"
                    raise Misuse(f"{both} would come into one category, {used!r}", hint=_ALONE)
                taken[used] = part.name

    # -- items ---------------------------------------------------------------------------------------------------

    def _take_batch(self, part: Part, items: Iterator[Item | None], category: str) -> bool:
        """Look at a batch of items; return whether there may be more."""
        before, self._bytes = self.report.records, 0
        try:
            for item in islice(items, BATCH_ITEMS_MAX):
                if item is None:
                    return True
                self.report.records += 1
                self._take(part.name, item, category)
                if self._bytes >= BATCH_BYTES_MAX:
                    break
        except (PersistencyError, OSError) as error:  # the origin can't be read on
            if not self._atomic:
                self._store()
            self._note(error)
            raise
        return self.report.records > before

    def _note(self, error: Exception) -> None:
        """Add to an error how far it came."""
        stored = "nothing is stored" if self._atomic or self.report.dry_run else "what of them can come along is stored"
        error.add_note(f"{self._done:,} items were dealt with before; {stored}.")

    def _take(self, part: str | None, item: Item, category: str) -> None:
        ends_ms = None if item.ends is None else _milliseconds(item.ends)
        if ends_ms is not None and ends_ms <= self._job.now_ms:
            self.report.ended += 1
            return
        try:
            key = self._key(item.key)
            payload, kept = self._payload(item.value)
        except Lost as lost:
            leave(self.report, part, item.key, lost)
            if self._atomic:  # nothing will be stored, so nothing has to be kept for it
                self.report.withheld += len(self._rows)
                self._rows.clear()
            return
        if self._atomic and self.report.left:
            self.report.withheld += 1
            return
        self._bytes += len(key) + len(payload)
        item = item._replace(value=None)  # it isn't needed any more, and may be large
        self._rows.append(_Row(category + PICKLES if kept else category, key, payload, ends_ms, part, item, kept))

    def _key(self, found: Any) -> Key:
        if isinstance(found, Lost):
            raise found
        if isinstance(found, Pickled):
            if self._unpickle is None:
                raise Lost(Reason.pickled_key, "pickles aren't read unless that is asked for")
            found = self._unpickle(found.data)
        try:
            made = self._key_of(found)
            return made if isinstance(made, Key) else key_of_parts(*made)
        except Misuse as error:
            raise Lost(Reason.no_key, str(error)) from error

    def _payload(self, value: Any) -> tuple[bytes, bool]:
        """Return what is to be stored, and whether it is a pickle as it was."""
        if isinstance(value, Later):
            value = value.read()
        if isinstance(value, Lost):
            raise value
        if not isinstance(value, Pickled):
            return self._encoded(value), False
        try:
            if self._unpickle is None:
                raise Lost(Reason.pickled_value, "pickles aren't read unless that is asked for")
            return self._encoded(self._unpickle(value.data)), False
        except Lost:
            if self._keep:
                return value.data, True
            raise

    def _encoded(self, value: Any) -> bytes:
        try:
            return self._codec.encode(value)
        except Exception as error:  # whatever an object of a class of somebody else raises
            why = str(error) if isinstance(error, Misuse) else f"{type(error).__name__}: {error}"
            raise Lost(Reason.no_value, why) from error

    # -- batches -------------------------------------------------------------------------------------------------

    def _store(self) -> None:
        """Store what was taken, in one transaction, and count it."""
        rows, self._rows = self._rows, []
        if not rows:
            self._done = self.report.records
            return
        undo = self.report.dry_run
        try:
            verdicts = self._job.run(_put_all, rows, undo, self._atomic).result()
        except _Undone as undone:
            verdicts = undone.verdicts
        except PersistencyError as error:
            first, last = (f"{shown_key(row.item.key)} in {row.category!r}" for row in (rows[0], rows[-1]))
            self._note(error)
            error.add_note(f"The batch that failed begins with {first}, and ends with {last}.")
            raise
        self._count(rows, verdicts)
        self._done = self.report.records

    def _count(self, rows: list[_Row], verdicts: list[_Verdict]) -> None:
        report = self.report
        withheld = self._atomic and any(isinstance(verdict, Lost) for verdict in verdicts)
        for row, verdict in zip(rows, verdicts, strict=True):
            if isinstance(verdict, Lost):
                leave(report, row.part, row.item.key, verdict)
            elif not verdict:
                report.ended += 1
            elif withheld:
                report.withheld += 1
            else:
                report.kept += row.kept
                report.taken += not row.kept
                report.tagged += row.item.tagged
                report.categories[row.category] = report.categories.get(row.category, 0) + 1


def _milliseconds(ends: float) -> int | None:
    """Return an end in Unix milliseconds; `None` for one that never comes."""
    if ends != ends or ends > _ENDS_MAX:
        return None
    return int(max(ends, 0.0) * 1000)


def _put_all(tx: Transaction, rows: list[_Row], undo: bool, whole: bool) -> list[_Verdict]:
    """Put rows; return what has become of each. Raises `_Undone` if none is to stay."""
    verdicts = [_put(tx, row) for row in rows]
    if undo or (whole and any(isinstance(verdict, Lost) for verdict in verdicts)):
        raise _Undone(verdicts)
    return verdicts


def _put(tx: Transaction, row: _Row) -> _Verdict:
    try:
        if row.ends_ms is None:
            tx.put(row.category, row.key, row.payload)
            return True
        for _ in range(_ATTEMPTS):
            now_ms = tx.now_ms
            if row.ends_ms <= now_ms:
                return False
            tx.put(row.category, row.key, row.payload, ttl=timedelta(milliseconds=row.ends_ms - now_ms))
            if tx.now_ms == now_ms:  # else its time has counted from another moment
                break
        return True
    except Misuse as error:
        return Lost(_reason(tx, row), str(error))


def _reason(tx: Transaction, row: _Row) -> Reason:
    """Return what of a row was refused: a look at the key alone is refused as well, if it was that."""
    try:
        tx.exists(row.category, row.key)
    except Misuse:
        return Reason.no_key
    return Reason.large
