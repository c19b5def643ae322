"""Migrating: `import --from`, which takes the items of another store into a job, and says what couldn't come along.

Rules:
  1. An option that means nothing for a kind of store is refused where it was typed.
  2. Whoever looks only (`--dry-run`) opens no job and makes none.
  3. It stops between two batches, and says how far it came. What couldn't come along is exit code 1, and the rest is
     stored.

Doesn't know: how other stores are read, how rows are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import typer

from persistency import CBOR, RAW, Job, Persistency, PersistencyError
from persistency.cli.ending import Fault, say, stopped
from persistency.cli.interrupts import Interrupts
from persistency.cli.opening import having
from persistency.cli.show import show_json, show_pairs, show_table, working

if TYPE_CHECKING:  # it is imported when something is to be brought over
    from persistency.integrations.migration import Origin, Report

ORIGINS = ("diskcache", "sqlitedict", "lmdb")
UNPICKLE = ("plain", "trust")
KEYS = {"sqlitedict": ("auto", "text", "pickle"), "lmdb": ("raw", "text", "bytes")}
ENCODED = {"diskcache": ("auto", "json"), "sqlitedict": ("auto", "pickle", "json", "plain")}
_TRUSTED = "pickles are trusted: what they name is imported, and what they say is run, with all that you may do"
_HINTS = {
    "pickled_key": "With --unpickle plain those are read that hold plain data; nothing in them is run.",
    "pickled_value": "With --unpickle plain those are read that hold plain data; nothing in them is run.",
    "unread": "What holds objects of classes needs --unpickle trust, which runs whatever it says. Better: have the old "
    "program export it.",
}


class Wanted(NamedTuple):
    """What was typed for `--from`, and beside it."""

    origin: str
    tables: list[str] | None
    unpickle: str | None
    keys: str | None
    encoded: str | None
    keep_pickles: bool
    raw: bool
    dry_run: bool

    def beside(self) -> list[tuple[str, object]]:
        """Return the options that stand beside `--from`, each with whether it was typed."""
        return [
            ("--table", self.tables),
            ("--unpickle", self.unpickle),
            ("--keys", self.keys),
            ("--encoded", self.encoded),
            ("--keep-pickles", self.keep_pickles),
            ("--raw", self.raw),
            ("--dry-run", self.dry_run),
        ]


def check_wanted(wanted: Wanted, file: Path) -> None:
    """Refuse what doesn't go together."""
    kind = wanted.origin
    if str(file) == "-":
        raise typer.BadParameter("another store is a file or a directory, and no stream", param_hint="'FILE'")
    for option, typed, known in (
        ("--keys", wanted.keys, KEYS.get(kind, ())),
        ("--encoded", wanted.encoded, ENCODED.get(kind, ())),
        ("--unpickle", wanted.unpickle, () if kind == "lmdb" else UNPICKLE),
        ("--keep-pickles", "" if wanted.keep_pickles else None, () if kind == "lmdb" else ("",)),
    ):
        if typed is not None and typed not in known:
            words = f"for {kind} it is one of {', '.join(known)}" if any(known) else f"it means nothing for {kind}"
            raise typer.BadParameter(words, param_hint=f"'{option}'")


def bring_over(
    root: str, job_id: str, path: Path, wanted: Wanted, category: str | None, *, atomic: bool, as_json: bool
) -> None:
    """Take the items of another store into a job, and show what came of it.

    Raises `Fault` if something couldn't come along, and all that `bring` raises.
    """
    origin = _origin(path, wanted)
    if wanted.unpickle == "trust":
        say(_TRUSTED)
    with _job(root, job_id, wanted) as job:
        report = _brought(job, origin, wanted, category, atomic=atomic)
        if as_json:
            show_json(_as_data(report))
        else:
            _show(f"{job_id}: {path}", report)
        if report.lost:
            lines = dict.fromkeys(_HINTS[reason.name] for reason in report.left if reason.name in _HINTS)
            if wanted.unpickle == "trust":
                lines.pop(_HINTS["unread"], None)
            stored = ["Nothing was stored."] if atomic and not wanted.dry_run else []
            message = f"{report.lost:,} of {report.records:,} items couldn't come along"
            raise Fault(message, "\n".join([*stored, *lines]))


def _origin(path: Path, wanted: Wanted) -> Origin:
    from persistency.integrations.migration import Diskcache, Sqlitedict

    options: dict[str, Any] = {"tables": wanted.tables, "keys": wanted.keys, "encoded": wanted.encoded}
    options = {name: value for name, value in options.items() if value is not None}
    if wanted.origin == "lmdb":
        try:
            from persistency.integrations.migration import Lmdb
        except ModuleNotFoundError as error:
            if error.name != "lmdb":
                raise
            raise Fault("--from lmdb needs the extra 'lmdb'", "pip install 'persistency[lmdb]'") from None
        return Lmdb(path, **options)
    return (Diskcache if wanted.origin == "diskcache" else Sqlitedict)(path, **options)


@contextmanager
def _job(root: str, job_id: str, wanted: Wanted) -> Iterator[Job]:
    """Give the job, or one that nobody else has and that is gone afterwards."""
    if wanted.dry_run:
        with Persistency(":memory:") as persistency:
            yield persistency.open_job(job_id)
    else:
        with having(root, job_id, make=True) as job:
            yield job


def _brought(job: Job, origin: Origin, wanted: Wanted, category: str | None, *, atomic: bool) -> Report:
    from persistency.integrations.migration import bring

    looked_at = 0
    with working(f"{origin.path} to {job.id}", "items") as advance, Interrupts() as interrupts:

        def step(done: int, total: int) -> None:
            nonlocal looked_at
            looked_at = done
            advance(done, total)
            interrupts.done()
            interrupts.busy = True

        interrupts.busy = True  # a batch is stored and counted, or neither
        try:
            return bring(
                job,
                origin,
                category=category,
                codec=RAW if wanted.raw else CBOR,
                unpickle=wanted.unpickle,  # type: ignore[arg-type]  # one of UNPICKLE
                keep_pickles=wanted.keep_pickles,
                atomic=atomic,
                dry_run=wanted.dry_run,
                progress=step,
            )
        except (KeyboardInterrupt, SystemExit) as stop:
            some = f"{looked_at:,} items were looked at, and those that can come along are stored"
            raise stopped(stop, "nothing was stored" if atomic or wanted.dry_run else some) from None
        except (PersistencyError, OSError) as error:
            notes = [note for note in getattr(error, "__notes__", ()) if not note.startswith("Hint: ")]
            if isinstance(error, OSError):
                if not notes:
                    raise  # it was nothing that the store's reading has met
                where = f"{error.filename}: " if error.filename else ""
                raise Fault(f"{where}{error.strerror or error}", "\n".join(notes)) from error
            error.hint = "\n".join([error.hint, *notes])
            raise


def _as_data(report: Report) -> dict[str, Any]:
    """Return a report as JSON data."""
    left = [
        {
            "reason": reason.name,
            "means": reason.value,
            "count": some.count,
            "examples": [{"table": one.part, "key": one.key, "why": one.why} for one in some.examples],
        }
        for reason, some in report.left.items()
    ]
    names = ("records", "taken", "kept", "ended", "withheld", "tagged", "lost")
    numbers = {name: getattr(report, name) for name in names}
    told = {"categories": report.categories, "passed_over": report.passed_over, "guessed": report.guessed}
    return {**numbers, "left": left, **told, "dry_run": report.dry_run, "seconds": round(report.seconds, 3)}


def _show(title: str, report: Report) -> None:
    counts = [
        ("of them ended, and left behind", report.ended),
        ("stored", report.taken),
        ("stored as the pickles they are", report.kept),
        ("stored without their tag", report.tagged),
        ("couldn't come along", report.lost),
        ("not stored, for all come or none", report.withheld),
    ]
    shown = [(name, f"{count:,}") for name, count in counts if count or name == "stored"]
    if report.dry_run:
        title, shown = (
            f"{title} (looked at, nothing stored)",
            [(f"to be {n}" if n[:6] == "stored" else n, c) for n, c in shown],
        )
    categories = [(f"in {name}", f"{count:,}") for name, count in report.categories.items()]
    show_pairs(title, [("items", f"{report.records:,}"), *shown, *categories, ("seconds", f"{report.seconds:.2f}")])
    remarks = [(name, f"passed over: {why}") for name, why in report.passed_over.items()]
    remarks += [(name, f"guessed: {what}") for name, what in report.guessed.items()]
    if remarks:
        show_table("beside that", ("table", "remark"), remarks)
    rows = [
        (f"{some.count:,}", reason.value, one.part or "", one.key, one.why)
        for reason, some in report.left.items()
        for one in some.examples
    ]
    if rows:
        show_table("couldn't come along, for example", ("items", "reason", "table", "key", "why"), rows, "r")
