"""Options: what a job is opened with, checked and told apart.

Rules:
  1. An option that isn't given is `DEFAULT`, so that opening an open job again compares only what was said.
  2. Numbers have their unit in their name: bytes, seconds, or a count.

Doesn't know: what the options do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Final, NamedTuple, TypedDict

from persistency.actor.bounds import Bounds, OnFull
from persistency.arguments import as_choice, as_count, as_flag, as_limit, as_seconds, as_ttl_ms
from persistency.errors import Failure, Misuse
from persistency.ops import Ttl
from persistency.storage.port import Durability, StoreOptions

OnError = Callable[[str, Sequence[Failure]], object]


class Default(Enum):
    """The type of `DEFAULT`: an option that wasn't given."""

    DEFAULT = "default"

    def __repr__(self) -> str:
        return "<default>"


DEFAULT: Final = Default.DEFAULT


class OpenOptions(TypedDict, total=False):
    """The options of `Persistency.open_job`, for who passes them on: `**options: Unpack[OpenOptions]`."""

    ttl: Ttl | None
    durability: Durability
    max_bytes: int | None
    mailbox_ops_max: int
    mailbox_bytes_max: int
    requests_max: int
    on_full: OnFull
    full_timeout: float | None
    sync_interval: float | None
    stall_timeout: float
    feed_changes_max: int
    inline: bool
    on_error: OnError | None


class JobOptions(NamedTuple):
    """How a job runs. The defaults are those of `Persistency.open_job`."""

    durability: Durability = "process"
    max_bytes: int | None = None
    mailbox_ops_max: int = 8192
    mailbox_bytes_max: int = 32 * 1024 * 1024
    requests_max: int = 8192
    on_full: OnFull = "block"
    full_timeout: float | None = 60.0
    sync_interval: float | None = 1.0
    stall_timeout: float = 60.0
    feed_changes_max: int = 0
    inline: bool = True
    on_error: OnError | None = None
    ttl_ms: int | None = None

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

    def store(self, now_ms: int, expires_ms: int | None, *, must_exist: bool) -> StoreOptions:
        """Return what the store needs of them, and what it needs besides."""
        return StoreOptions(self.durability, self.max_bytes, self.feed_changes_max, now_ms, expires_ms, must_exist)


def _as_callback(value: Any, argument: str) -> Any:
    if value is not None and not callable(value):
        raise Misuse(f"{argument} must be callable, not {type(value).__name__}: pass f(job_id, failures)")
    return value


# How each option is checked; the others are counts of at least one.
_CHECKS: dict[str, Callable[[Any, str], Any]] = {
    "durability": lambda value, name: as_choice(value, name, ("process", "power")),
    "on_full": lambda value, name: as_choice(value, name, ("block", "raise")),
    "full_timeout": as_seconds,
    "sync_interval": as_seconds,
    "stall_timeout": lambda value, name: as_seconds(value, name, optional=False),
    "max_bytes": as_limit,
    "feed_changes_max": lambda value, name: as_count(value, name, 0),
    "inline": as_flag,
    "on_error": _as_callback,
    "ttl": lambda value, _name: None if value is None else as_ttl_ms(value),
}


def checked(given: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, each one checked. Raises `Misuse`."""
    given = {name: value for name, value in given.items() if value is not DEFAULT}
    for name, value in given.items():
        check = _CHECKS.get(name)
        given[name] = as_count(value, name, 1) if check is None else check(value, name)
    ttl_ms = given.pop("ttl", None)
    # One that isn't named is as good as none: a temporary job can be opened again without.
    return given if ttl_ms is None else {**given, "ttl_ms": ttl_ms}


def differing(options: JobOptions, given: dict[str, Any]) -> list[str]:
    """Return the names of the given options that differ from a job's own."""
    different = [name for name in given.keys() & set(JobOptions._fields) if getattr(options, name) != given[name]]
    return sorted(name.removesuffix("_ms") for name in different)
