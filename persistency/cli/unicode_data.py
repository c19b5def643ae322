"""Real records that every Python carries: the named characters of Unicode, about 140,000.

Rules:
  1. The key is the general category and the code point: ("Lu", 65). The record is what `unicodedata` says.
  2. `size` and `position` count code points, named or not.

Doesn't know: jobs, files.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Iterator
from typing import Any

from persistency import Key, key
from persistency.codec.values import encode


class UnicodeData:
    """The records of this Python's Unicode character database, in the order of the code points."""

    def __init__(self, stop: int = sys.maxunicode + 1) -> None:
        self.title: str = f"Unicode {unicodedata.unidata_version}"
        self.size: int | None = stop
        self.position: int = 0
        self._stop = stop

    @property
    def where(self) -> str:
        """The place that was read last, for messages."""
        return f"U+{self.position:04X}"

    def __iter__(self) -> Iterator[tuple[Key, bytes]]:
        for code_point in range(self._stop):
            character = chr(code_point)
            name = unicodedata.name(character, None)
            if name is not None:
                self.position = code_point
                yield key(unicodedata.category(character), code_point), encode(_record(character, name))
        self.position = self._stop


def _record(character: str, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "character": character,
        "category": unicodedata.category(character),
        "bidirectional": unicodedata.bidirectional(character),
        "combining": unicodedata.combining(character),
        "decomposition": unicodedata.decomposition(character),
        "numeric": unicodedata.numeric(character, None),
        "mirrored": bool(unicodedata.mirrored(character)),
        "width": unicodedata.east_asian_width(character),
    }
