"""Soundness: what must hold of what is read, because a damaged file may hold anything.

Rules:
  1. What is wrong raises `Corrupt`; nothing of it is passed on.

Doesn't know: where it was read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from persistency.errors import Corrupt


def check_blobs(values: Iterable[Any]) -> None:
    """Raise `Corrupt` if something else stands for a key or a payload: a number, a text, NULL."""
    if not {bytes}.issuperset(map(type, values)):
        raise Corrupt("a row's category, key or payload is no blob", hint="Restore the job from a backup.")
