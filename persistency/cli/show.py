"""What a person, or a machine, sees: rows, one value, tables, summaries, and progress.

Rules:
  1. With `--json` every row is one line of JSON. Lines are UTF-8, whatever the terminal's encoding.
  2. Without it a terminal gets tables, and a pipe gets lines: cells with a tab between them, a key as it is typed, a
     value as JSON.
  3. Rows are shown as they come, a page at a time: a scan of any length takes the memory of a page.
  4. Text from a job is shown as text: it can't command the terminal, nor be taken for markup.
  5. Progress goes to stderr, and only if that is a terminal.

Doesn't know: jobs, where rows come from.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from persistency import Key
from persistency.cli.jsonable import payload_to_json
from persistency.cli.keys import format_key, key_to_json

if TYPE_CHECKING:  # where it draws, it is imported: that takes as long as all else of a short command
    from rich.table import Table

Shown: TypeAlias = tuple[Key, bytes | None]
"""A key and its payload; `None` where only keys were asked for."""
Advance: TypeAlias = Callable[[int, int | None], None]
"""What is told how much is done, and of how much, if anybody knows."""
_PAGE = 200


class Measured(Protocol):
    """What progress can be shown of: `size` is `None` if nobody knows it."""

    size: int | None

    @property
    def position(self) -> int:
        """How far it is, in the unit of `size`."""
        raise NotImplementedError


# -- rows and values ---------------------------------------------------------------------------------------------


def show_rows(rows: Iterable[Shown], *, as_json: bool) -> int:
    """Show rows as they come; return how many they were."""
    if as_json:
        return _write_lines(rows, _json_line)
    if not sys.stdout.isatty():
        return _write_lines(rows, _plain_line)
    return _write_tables(rows)


def show_json(data: Any) -> None:
    """Show one line of JSON."""
    sys.stdout.flush()
    sys.stdout.buffer.write(json.dumps(data, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def show_line(cells: Iterable[str]) -> None:
    """Show one line of cells, with a tab between them."""
    sys.stdout.buffer.write(("\t".join(map(visible, cells)) + "\n").encode())


def show_value(key: Key, payload: bytes, *, as_json: bool) -> None:
    """Show one row: for people, a record as a table of its fields, on a terminal, and else as indented JSON."""
    if as_json:
        sys.stdout.buffer.write(_json_line((key, payload)))
        return
    value = payload_to_json(payload)
    if not isinstance(value, dict) or not value or not sys.stdout.isatty():
        text = visible(json.dumps(value, ensure_ascii=False, indent=2), keep="\n")
        sys.stdout.buffer.write(text.encode() + b"\n")
        return
    show_pairs(format_key(key), [(name, _brief(member)) for name, member in value.items()])


# -- tables ------------------------------------------------------------------------------------------------------


def show_pairs(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Show a table of names and what they are."""
    if not sys.stdout.isatty():
        _write_titled(title, pairs)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in pairs:
        table.add_row(Text(visible(name)), Text(visible(text)))
    _print_titled(title, table)


def show_table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]], numbers: str = "") -> None:
    """Show a table; a pipe gets its rows alone. `numbers` has an `r` for each column that is aligned to the right."""
    if not sys.stdout.isatty():
        for row in rows:
            show_line(row)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column, side in zip(columns, numbers.ljust(len(columns)), strict=True):
        table.add_column(column, justify="right" if side == "r" else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    _print_titled(title, table)


def show_counts(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Show a table whose columns but the first are numbers."""
    if sys.stdout.isatty():
        show_table(title, columns, rows, " " + "r" * (len(columns) - 1))
    else:
        _write_titled(title, [columns, *rows])


def _print_titled(title: str, table: Table) -> None:
    from rich.console import Console
    from rich.text import Text

    # A title of the table's own would be broken to the table's width.
    console = Console()
    console.print(Text(visible(title), style="bold"))
    console.print(table)


def _write_titled(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    show_line((title,))
    for row in rows:
        show_line(row)


# -- numbers -----------------------------------------------------------------------------------------------------


def as_size(nbytes: int) -> str:
    """Return a number of bytes as a person reads it."""
    if nbytes < 1_000:
        return f"{nbytes} B"
    size, units = nbytes / 1_000, ["kB", "MB", "GB", "TB"]
    while size >= 999.95 and len(units) > 1:
        size, units = size / 1_000, units[1:]
    return f"{size:.1f} {units[0]}"


def as_time(seconds: float | None, none: str = "") -> str:
    """Return Unix seconds as local time; `none` is what to show where there is none."""
    if seconds is None:
        return none
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.0f} s"  # beyond every calendar


# -- progress ----------------------------------------------------------------------------------------------------


@contextmanager
def progress(title: str, source: Measured) -> Iterator[Callable[[int], None]]:
    """Show the progress of a source; what is given is to be called with the number of records so far."""
    with _bar(title, "records") as update:
        yield lambda records: update(records, source.position, source.size)


@contextmanager
def working(title: str, unit: str) -> Iterator[Advance]:
    """Show the progress of work that says itself how far it is; what is given may be called in any thread."""
    with _bar(title, unit) as update:
        yield lambda done, total: update(done, done, total)


@contextmanager
def _bar(title: str, unit: str) -> Iterator[Callable[[int, int, int | None], None]]:
    if not sys.stderr.isatty():
        yield lambda _count, _done, _total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[count]:,} {task.fields[unit]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(visible(title).replace("[", "\\["), total=None, count=0, unit=unit)

        def update(count: int, done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total, count=count)

        yield update


# -- lines -------------------------------------------------------------------------------------------------------


def _write_lines(rows: Iterable[Shown], line_of: Callable[[Shown], bytes]) -> int:
    count = 0
    write = sys.stdout.buffer.write
    for row in rows:
        write(line_of(row))
        count += 1
    return count


def _json_line(row: Shown) -> bytes:
    key, payload = row
    line: dict[str, Any] = {"key": key_to_json(key)}
    if payload is not None:
        line["value"] = payload_to_json(payload)
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


def _plain_line(row: Shown) -> bytes:
    key, payload = row
    text = format_key(key)
    if payload is not None:
        text += "\t" + json.dumps(payload_to_json(payload), ensure_ascii=False)
    return (visible(text, keep="\t") + "\n").encode()


def _write_tables(rows: Iterable[Shown]) -> int:
    """Write tables of a page each that look like one: the columns are as wide as the first page wants them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    rest = iter(rows)
    count = 0
    width = 0
    while page := list(islice(rest, _PAGE)):
        keys = [Text(visible(format_key(key))) for key, _payload in page]
        # A quarter leaves room for keys of later pages that are longer.
        width = width or min(max(console.width // 4, *(text.cell_len for text in keys)), console.width // 2)
        table = Table(box=None, show_header=not count, pad_edge=False)
        table.add_column("key", width=width, overflow="fold")
        if page[0][1] is not None:
            table.add_column("value", no_wrap=True, overflow="ellipsis")
        for text, (_key, payload) in zip(keys, page, strict=True):
            table.add_row(text, *(() if payload is None else (Text(visible(_brief(payload_to_json(payload)))),)))
        console.print(table)
        count += len(page)
    console.print(f"{count:,} {'row' if count == 1 else 'rows'}", style="dim", highlight=False)
    return count


def _brief(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, ensure_ascii=False)


def visible(text: str, keep: str = "") -> str:
    """Return text with every character that could command a terminal written as JSON would escape it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else json.dumps(c)[1:-1] for c in text)
