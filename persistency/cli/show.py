"""What a person, or a machine, sees: rows, one value, summaries, and progress.

Rules:
  1. With `--json` every row is one line of JSON. Lines are UTF-8, whatever the terminal's encoding.
  2. Without it a terminal gets tables, and a pipe gets lines: the key as it is typed, a tab, the value as JSON.
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
from itertools import islice
from typing import Any, Protocol, TypeAlias

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from persistency import Key
from persistency.cli.jsonable import payload_to_json
from persistency.cli.keys import format_key, key_to_json

Shown: TypeAlias = tuple[Key, bytes | None]
"""A key and its payload; `None` where only keys were asked for."""
_PAGE = 200


class Measured(Protocol):
    """What progress can be shown of: `size` is `None` if nobody knows it."""

    size: int | None

    @property
    def position(self) -> int:
        """How far it is, in the unit of `size`."""


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
    sys.stdout.buffer.write(json.dumps(data, ensure_ascii=False).encode() + b"\n")


def show_value(key: Key, payload: bytes, *, as_json: bool) -> None:
    """Show one row: for people, a record as a table of its fields, on a terminal, and else as indented JSON."""
    if as_json:
        sys.stdout.buffer.write(_json_line((key, payload)))
        return
    value = payload_to_json(payload)
    if not isinstance(value, dict) or not value or not sys.stdout.isatty():
        text = _visible(json.dumps(value, ensure_ascii=False, indent=2), keep="\n")
        sys.stdout.buffer.write(text.encode() + b"\n")
        return
    show_pairs(format_key(key), [(name, _brief(member)) for name, member in value.items()])


def show_pairs(title: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Show a table of names and what they are."""
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in pairs:
        table.add_row(Text(_visible(name)), Text(_visible(text)))
    _print_titled(title, table)


def show_counts(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> None:
    """Show a table whose columns but the first are numbers."""
    table = Table()
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(Text(_visible(cell)) for cell in row))
    _print_titled(title, table)


def _print_titled(title: str, table: Table) -> None:
    # A title of the table's own would be broken to the table's width.
    console = Console()
    console.print(Text(_visible(title), style="bold"))
    console.print(table)


@contextmanager
def progress(title: str, source: Measured) -> Iterator[Callable[[int], None]]:
    """Show the progress of a source; what is given is to be called with the number of records so far."""
    if not sys.stderr.isatty():
        yield lambda _records: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[records]:,} records"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(_visible(title).replace("[", "\\["), total=source.size, records=0)

        def advance(records: int) -> None:
            bar.update(task, completed=source.position, records=records)

        yield advance


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
    return (_visible(text, keep="\t") + "\n").encode()


def _write_tables(rows: Iterable[Shown]) -> int:
    """Write tables of a page each that look like one: the columns are as wide as the first page wants them."""
    console = Console()
    rest = iter(rows)
    count = 0
    width = 0
    while page := list(islice(rest, _PAGE)):
        keys = [Text(_visible(format_key(key))) for key, _payload in page]
        # A quarter leaves room for keys of later pages that are longer.
        width = width or min(max(console.width // 4, *(text.cell_len for text in keys)), console.width // 2)
        table = Table(box=None, show_header=not count, pad_edge=False)
        table.add_column("key", width=width, overflow="fold")
        if page[0][1] is not None:
            table.add_column("value", no_wrap=True, overflow="ellipsis")
        for text, (_key, payload) in zip(keys, page, strict=True):
            table.add_row(text, *(() if payload is None else (Text(_visible(_brief(payload_to_json(payload)))),)))
        console.print(table)
        count += len(page)
    console.print(f"{count:,} {'row' if count == 1 else 'rows'}", style="dim", highlight=False)
    return count


def _brief(value: Any) -> str:
    return value if isinstance(value, str) and value.isprintable() else json.dumps(value, ensure_ascii=False)


def _visible(text: str, keep: str = "") -> str:
    """Return text with every character that could command a terminal written as JSON would escape it."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else json.dumps(c)[1:-1] for c in text)
