"""Arguments: what the commands take, as typer's types, and what is typed made into keys, ranges and seconds.

Rules:
  1. What means the same is typed the same in every command.
  2. What can't be read is a `BadParameter` that names the argument, before anything is opened.

Doesn't know: what the commands do with it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from persistency import Key, KeyRange
from persistency.cli.completing import categories, job_ids
from persistency.cli.keys import parse_key

KEY_HELP = "Slash-separated parts, like games/0ad or users/ada/7, or a JSON array."
_UNITS_MS = {"": 1_000, "ms": 1, "s": 1_000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|[smhd]?)")


def _directory(text: str) -> str:
    """Refuse what names no directory; the engine refuses the rest, with its own words."""
    if text in ("", ":memory:"):
        raise typer.BadParameter("pass a directory: what is kept in memory ends with this command")
    if Path(text).is_file():
        raise typer.BadParameter(f"{text} is a file, not a directory")
    return text


def root_given(text: str) -> str:
    """Refuse what names no root; a URL is for the engine to read."""
    return text if "://" in text else _directory(text)


def _named(name: str | None) -> str | None:
    if name == "":
        raise typer.BadParameter("a category has a name")
    return name


Root = Annotated[
    str, typer.Argument(metavar="ROOT", help="The directory of the jobs.", show_default=False, callback=_directory)
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.", show_default=False, autocompletion=job_ids)]
TypedKey = Annotated[str, typer.Argument(metavar="KEY", help=KEY_HELP, show_default=False)]
Category = Annotated[
    str,
    typer.Option("--category", "-c", metavar="NAME", help="The category.", autocompletion=categories, callback=_named),
]
AnyCategory = Annotated[
    str | None,
    typer.Option(
        "--category", "-c", metavar="NAME", help="Only this category.", autocompletion=categories, callback=_named
    ),
]
Prefix = Annotated[
    str | None, typer.Option("--prefix", "-p", metavar="PARTS", help=f"Only keys that begin so. {KEY_HELP}")
]
Start = Annotated[str | None, typer.Option("--start", metavar="KEY", help="From this key on, itself included.")]
Stop = Annotated[str | None, typer.Option("--stop", metavar="KEY", help="Up to this key, itself excluded.")]
Limit = Annotated[int | None, typer.Option("--limit", "-n", min=0, metavar="N", help="At most so many.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON, for machines.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask; needed where there is no terminal to ask on.")]


def as_key(text: str, name: str) -> Key:
    """Return the key that was typed for the argument of this name."""
    try:
        return parse_key(text)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{name}'") from error


def as_range(prefix: str | None, start: str | None, stop: str | None) -> KeyRange:
    """Return the range of the keys that were typed; without any it is everything."""
    if prefix is not None:
        if start is not None or stop is not None:
            raise typer.BadParameter("a prefix has its own start and stop", param_hint="'--prefix' / '--start'")
        return KeyRange.prefix(as_key(prefix, "--prefix"))
    return KeyRange(
        None if start is None else as_key(start, "--start"), None if stop is None else as_key(stop, "--stop")
    )


def as_fields(text: str | None) -> tuple[str, ...] | None:
    """Return the names of fields, typed with commas between them."""
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(","))
    if "" in names:
        message = f"{text!r} has an empty field name; name fields like section,package"
        raise typer.BadParameter(message, param_hint="'--key'")
    return names


def as_ttl(text: str | None) -> float | None:
    """Return the seconds of a time that was typed: `90`, `1.5s`, `500ms`, `15m`, `2h` or `7d`."""
    if text is None:
        return None
    found = _DURATION.fullmatch(text.strip())
    if found is None or not float(found[1]):
        raise typer.BadParameter(f"{text!r} is no time; type 90, 500ms, 15m, 2h or 7d", param_hint="'--ttl'")
    return float(found[1]) * _UNITS_MS[found[2]] / 1_000


def exclude(*given: tuple[str, bool]) -> None:
    """Refuse options of which more than one was typed, though each says something else."""
    named = [name for name, typed in given if typed]
    if len(named) > 1:
        raise typer.BadParameter("they exclude each other", param_hint=" / ".join(f"'{name}'" for name in named))
