"""Soundness: what must hold of what is read, because a damaged file may hold anything.

Rules:
  1. What is wrong raises `Corrupt`; nothing of it is passed on.

Doesn't know: where it was read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from persistency.errors import Corrupt


def check_keys(keys: Iterable[Any]) -> None:
    """Raise `Corrupt` if something else stands for a key: a damaged file may hold a number, text or NULL there."""
    if not {bytes}.issuperset(map(type, keys)):
        raise Corrupt("a row's key or category is no blob", hint="Restore the job from a backup.")
