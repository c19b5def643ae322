"""Options: what a job is opened with, checked and told apart.

Rules:
  1. An option that isn't given is `DEFAULT`, so that opening an open job again compares only what was said.
  2. Numbers have their unit in their name: bytes, seconds, or a count.

Doesn't know: what the options do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, Final

from persistency.actor.bounds import Bounds, OnFull
from persistency.arguments import as_choice, as_count, as_flag, as_limit, as_seconds
from persistency.errors import Failure, Misuse
from persistency.storage.port import Durability, StoreOptions

OnError = Callable[[str, Sequence[Failure]], object]


class Default(Enum):
    """The type of `DEFAULT`: an option that wasn't given."""

    DEFAULT = "default"

    def __repr__(self) -> str:
        return "<default>"


DEFAULT: Final = Default.DEFAULT


@dataclass(frozen=True, slots=True)
class JobOptions:
    """How a job runs. The defaults are those of `Persistency.open_job`."""

    durability: Durability = "process"
    max_bytes: int | None = None
    mailbox_ops_max: int = 8192
    mailbox_bytes_max: int = 32 * 1024 * 1024
    requests_max: int = 8192
    on_full: OnFull = "block"
    full_timeout: float | None = 60.0
    stall_timeout: float = 60.0
    feed_changes_max: int = 0
    inline: bool = True
    on_error: OnError | None = None

    @property
    def bounds(self) -> Bounds:
        """What the mailbox needs of them."""
        return Bounds(
            ops_max=self.mailbox_ops_max,
            bytes_max=self.mailbox_bytes_max,
            requests_max=self.requests_max,
            on_full=self.on_full,
            full_timeout=self.full_timeout,
            inline=self.inline,
        )

    @property
    def store(self) -> StoreOptions:
        """What the store needs of them."""
        return StoreOptions(
            durability=self.durability, max_bytes=self.max_bytes, feed_changes_max=self.feed_changes_max
        )


def checked(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, each one checked. Raises `Misuse`."""
    given = {name: value for name, value in given.items() if value is not DEFAULT}
    for name, value in given.items():
        match name:
            case "durability":
                as_choice(value, name, ("process", "power"))
            case "on_full":
                as_choice(value, name, ("block", "raise"))
            case "full_timeout":
                given[name] = as_seconds(value, name)
            case "stall_timeout":
                given[name] = as_seconds(value, name, optional=False)
            case "max_bytes":
                given[name] = as_limit(value, name)
            case "feed_changes_max":
                as_count(value, name, 0)
            case "inline":
                as_flag(value, name)
            case "on_error":
                if value is not None and not callable(value):
                    raise Misuse(f"on_error must be callable, not {type(value).__name__}: pass f(job_id, failures)")
            case _:
                as_count(value, name, 1)
    return given


def differing(options: JobOptions, given: dict[str, Any]) -> list[str]:
    """Return the names of the given options that differ from a job's own."""
    names = {field.name for field in fields(JobOptions)}
    return sorted(name for name in names & given.keys() if getattr(options, name) != given[name])
