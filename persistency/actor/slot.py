"""The slot: a worker's leave to be live, where there is a limit to how many are, or to how long one may be idle.

Rules:
  1. Whoever rests gives its slot back; whoever is woken waits for one.

Doesn't know: who hands the slots out.
"""

from __future__ import annotations

from typing import Protocol


class Slot(Protocol):
    """One worker's."""

    @property
    def idle_ttl(self) -> float | None:
        """After so many seconds without use a worker rests (`None`: never for that alone)."""

    def pressed(self) -> bool:
        """Say whether somebody waits for whom nobody was asked to rest yet."""
        raise NotImplementedError  # a docstring alone would be read as one that returns None

    def wanted(self) -> bool:
        """Say whether this worker, which could, has to rest for somebody else's sake."""
        raise NotImplementedError  # a docstring alone would be read as one that returns None

    def decline(self) -> None:
        """Note that there is work again, in case it was asked to rest."""

    def give_back(self) -> None:
        """Note that the worker isn't live any more. Nothing happens if it is noted already."""

    def wake(self) -> None:
        """Have the worker started again as soon as there is leave. Called under a mailbox's lock, from any thread."""

    def withdraw(self) -> bool:
        """Stop waiting to be started; return whether that was so."""
        raise NotImplementedError
