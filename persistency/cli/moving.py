"""The commands that move rows in and out: `import`, `export`.

Rules:
  1. What `export` writes `import` reads back as the same rows.
  2. An import that stops early says what is stored; an export that stops early leaves no file.
  3. What is read is JSON lines if nothing says else, for a wrong guess is told at its first line; of what is written
     the format is said.
  4. Another program's store is imported with `--from`, and the options beside it mean nothing without.

Doesn't know: how anything is done.
"""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer

from persistency import Persistency, Reader
from persistency.cli.arguments import AnyCategory, AsJson, JobId, Root, Yes, as_fields
from persistency.cli.ending import Fault, told
from persistency.cli.migrating import ENCODED, KEYS, ORIGINS, UNPICKLE, Wanted, bring_over, check_wanted
from persistency.cli.opening import find, looking_into
from persistency.cli.rowfile import Format, RowFile, format_of
from persistency.cli.show import progress, show_json, show_pairs, working

_FORMATS = [form.value for form in Format]


def _known(text: str | None) -> str | None:
    if text is not None and text not in _FORMATS:
        raise typer.BadParameter(f"{text!r} is no format; there are {', '.join(_FORMATS)}")
    return text


Form = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="|".join(_FORMATS),
        help="The format; without it what the file's name ends in says so.",
        show_default=False,
        callback=_known,
        autocompletion=lambda: _FORMATS,
    ),
]


def _word(option: str, words: tuple[str, ...], text: str) -> Any:
    """Return the type of an option of `--from` that takes one of some words."""

    def check(typed: str | None) -> str | None:
        if typed is not None and typed not in words:
            raise typer.BadParameter(f"{typed!r} isn't one of {', '.join(words)}")
        return typed

    return typer.Option(
        option,
        metavar="|".join(words),
        help=text,
        show_default=False,
        callback=check,
        autocompletion=lambda: list(words),
        rich_help_panel=_PANEL,
    )


_PANEL = "From another store"
From = Annotated[str | None, _word("--from", ORIGINS, "What FILE is: a store of another program.")]
Tables = Annotated[
    list[str] | None,
    typer.Option("--table", metavar="NAME", help="Only this table; may be repeated.", rich_help_panel=_PANEL),
]
Unpickle = Annotated[
    str | None,
    _word("--unpickle", UNPICKLE, "Read pickles: plain data, running nothing; or all, running whatever they say."),
]
Keys = Annotated[
    str | None,
    _word(
        "--keys",
        tuple(dict.fromkeys(word for words in KEYS.values() for word in words)),
        "Its keys: text or pickles (sqlitedict); raw, text or bytes (lmdb).",
    ),
]
Encoded = Annotated[
    str | None,
    _word(
        "--encoded",
        tuple(dict.fromkeys(word for words in ENCODED.values() for word in words)),
        "Its values: json (diskcache); pickle, json or plain (sqlitedict).",
    ),
]
KeepPickles = Annotated[
    bool,
    typer.Option("--keep-pickles", help="Store unread pickles as they are, in NAME.pickles.", rich_help_panel=_PANEL),
]
Raw = Annotated[bool, typer.Option("--raw", help="Store bytes as they are, not as CBOR.", rich_help_panel=_PANEL)]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Look at everything, store nothing.", rich_help_panel=_PANEL)]


@told
def import_(
    root: Root,
    job: JobId,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A .jsonl, .csv or .cbor file, packed by gzip or not; - is stdin. With --from: its path.",
            show_default=False,
        ),
    ],
    fields: Annotated[
        str | None,
        typer.Option("--key", metavar="FIELD,FIELD", help="The fields of a record that make its key."),
    ] = None,
    category: AnyCategory = None,
    form: Form = None,
    atomic: Annotated[bool, typer.Option("--atomic", help="All of it in one batch, or nothing.")] = False,
    origin: From = None,
    tables: Tables = None,
    unpickle: Unpickle = None,
    keys: Keys = None,
    encoded: Encoded = None,
    keep_pickles: KeepPickles = False,
    raw: Raw = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Put the rows of a file into a job: those of an export, or records whose fields make the key.

    The job is made if it isn't there. Where two records have one key, the last one wins; rows with other keys stay.
    With --key a record is stored whole, as CBOR. At a bad line, and at Ctrl-C, it stops: all records before it are
    stored, nothing behind it is, and it says how far it came. With --atomic all are stored or none; the file has to
    fit in memory then.

    With --from it is the store of another program: the directory of a diskcache, a file of sqlitedict, an environment
    of lmdb. It is only read. What can't come along is shown, with the reason, and is exit code 1; pickles are never
    read unless --unpickle says so.

    Examples: persistency import data packages debian-packages.jsonl.gz --key section,package;
    persistency import data cache ./cache --from diskcache --unpickle plain
    """
    wanted = Wanted(origin or "", tables or None, unpickle, keys, encoded, keep_pickles, raw, dry_run)
    if origin is not None:
        _refuse("of another store", ("--key", fields is not None), ("--format", form is not None))
        check_wanted(wanted, file)
        bring_over(root, job, file, wanted, category, atomic=atomic, as_json=as_json)
        return
    _refuse("without --from", *wanted.beside())
    names, chosen = as_fields(fields), Format(form) if form else format_of(file) or Format.jsonl
    if chosen is Format.cbor:
        _check_cbor(names, category, atomic=atomic)
        _import_stream(root, job, file, as_json=as_json)
        return
    from persistency.cli import csvrows, jsonlines
    from persistency.cli.infile import InFile
    from persistency.cli.intake import DEFAULT_CATEGORY, take_in

    named = DEFAULT_CATEGORY if category is None and names is not None else category
    read = csvrows.rows_of if chosen is Format.csv else jsonlines.rows_of
    rows = RowFile(InFile(file), partial(read, fields=names))
    with closing(rows) as source, progress(source.title, source) as advance:
        intake = take_in(root, job, named, source, advance, atomic=atomic)
    numbers = {"records": intake.records, "keys": intake.keys, "new": intake.new, "ended": intake.ended}
    if as_json:
        show_json(numbers | {"seconds": round(intake.seconds, 3)})
        return
    pairs = [
        ("records read", f"{intake.records:,}"),
        *([("of them ended, and left out", f"{intake.ended:,}")] if intake.ended else []),
        ("keys stored", f"{intake.keys:,}"),
        ("of them new", f"{intake.new:,}"),
        ("seconds", f"{intake.seconds:.2f}"),
    ]
    show_pairs(f"{job}: {', '.join(intake.before) or named or DEFAULT_CATEGORY}", pairs)


def _refuse(where: str, *options: tuple[str, object]) -> None:
    for option, typed in options:
        if typed:
            raise typer.BadParameter(f"it means nothing {where}", param_hint=f"'{option}'")


def _check_cbor(names: tuple[str, ...] | None, category: str | None, *, atomic: bool) -> None:
    for option, typed in (("--key", names is not None), ("--category", category is not None)):
        if typed:
            raise typer.BadParameter("rows of an export have theirs", param_hint=f"'{option}'")
    if atomic:
        message = "an export is taken in by batches, one after the other; import JSON lines or CSV so"
        raise typer.BadParameter(message, param_hint="'--atomic'")


def _import_stream(root: str, job: str, file: Path, *, as_json: bool) -> None:
    from persistency.cli.infile import InFile
    from persistency.cli.intake import take_stream

    with closing(InFile(file)) as source, progress(source.title, source) as advance:
        intake = take_stream(root, job, source, advance)
    if as_json:
        show_json({"records": intake.records, "seconds": round(intake.seconds, 3)})
    else:
        show_pairs(job, [("rows taken in", f"{intake.records:,}"), ("seconds", f"{intake.seconds:.2f}")])


@told
def export(
    root: Root,
    job: JobId,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="A .jsonl, .csv or .cbor file, with .gz packed; - is stdout. A former export is replaced.",
            show_default=False,
        ),
    ],
    fields: Annotated[
        str | None,
        typer.Option("--key", metavar="FIELD,FIELD", help="CSV: the columns that make the key, in its place."),
    ] = None,
    category: AnyCategory = None,
    form: Form = None,
    yes: Yes = False,
    as_json: AsJson = False,
) -> None:
    """Write the rows of a job to a file, whole or not at all, also while a service has the job open.

    JSON lines and CBOR hold every row, with its end, to the byte. CSV holds one category of flat records, and says
    what it can't hold. It is no snapshot of one moment: rows that come or go meanwhile may be in it or not.

    A former export in the same format, JSON lines or CBOR, is replaced without a question. Any other file of that name
    is asked about first, a CSV file always.

    Examples: persistency export data packages packages.jsonl.gz; persistency export data packages - | jq .value
    """
    from persistency.cli.outfile import STDOUT, check_name, writing
    from persistency.cli.outtake import give_out
    from persistency.cli.replacing import agree

    check_name(file)
    names, chosen = as_fields(fields), Format(form) if form else _format_to_write(file)
    if names is not None and chosen is not Format.csv:
        raise typer.BadParameter(
            "only CSV has columns; JSON lines and CBOR have a key of its own", param_hint="'--key'"
        )
    if str(file) != STDOUT:
        with Persistency(root) as persistency:
            find(persistency, root, job)
        agree(file, chosen, yes=yes)
    started = monotonic()
    with looking_into(root, job) as opened:
        categories = _categories(opened, category, chosen)
        with working(f"{job} to {file.name}", "rows") as advance, writing(file) as into:
            rows = give_out(opened, categories, into, chosen, names, lambda done: advance(done, None))
    if str(file) == STDOUT:
        return
    numbers: dict[str, Any] = {"rows": rows, "categories": categories, "seconds": round(monotonic() - started, 3)}
    if as_json:
        show_json(numbers)
        return
    pairs = [
        ("rows written", f"{rows:,}"),
        ("categories", ", ".join(categories)),
        ("seconds", f"{numbers['seconds']:.2f}"),
    ]
    show_pairs(f"{job}: {file}", pairs)


def _format_to_write(file: Path) -> Format:
    """Return the format that a file's name says; pipes and devices have no names of ours, and get JSON lines."""
    found = format_of(file)
    if found is None and str(file) != "-" and (file.is_file() or not file.exists()):
        message = f"{str(file)!r} doesn't say the format: end it in .jsonl, .csv or .cbor, or pass --format"
        raise typer.BadParameter(message, param_hint="'FILE'")
    return found or Format.jsonl


def _categories(job: Reader, category: str | None, chosen: Format) -> list[str]:
    """Return what is to be exported."""
    there = job.categories().result()
    if category is not None:
        if category not in there:
            has = ", ".join(there) or "no rows at all"
            raise Fault(f"no rows in category {category!r} of job {job.id!r}", f"The job has: {has}.")
        return [category]
    if chosen is Format.csv and len(there) > 1:
        raise Fault("CSV takes one category", f"Name it with --category; the job has: {', '.join(there)}.")
    return there
