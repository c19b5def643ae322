"""JSON text: read within bounds, for a short packed text may hold a great many values.

Rules:
  1. How many values a text has is counted before any of them is made.
  2. What can't be read is `Lost`, whatever the reason.

Doesn't know: where the text comes from.
"""

from __future__ import annotations

import json
import re
from typing import Any, Final

from persistency.integrations.migration.items import Lost, Reason
from persistency.integrations.migration.reading import CONTAINERS_MAX, STEPS_MAX

JSON_BYTES_MAX: Final = 64 * 1024 * 1024
"""The longest text that is read as JSON: as Python's text it may take four times as much."""
_STRING = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)


def read_json(data: str | bytes) -> Any:
    """Return what JSON says. Raises `Lost`."""
    if len(data) > JSON_BYTES_MAX:
        raise Lost(Reason.large, f"JSON of {len(data):,} bytes, and {JSON_BYTES_MAX:,} are read at most")
    try:
        text = data if isinstance(data, str) else data.decode(json.detect_encoding(data), "surrogatepass")
        if _beyond(text) and _beyond(_STRING.sub("", text)):  # what is within a string is no value of its own
            raise Lost(Reason.large, f"JSON of over {CONTAINERS_MAX:,} containers, or {STEPS_MAX:,} values")
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Lost(Reason.damaged, f"not JSON: {error}") from error


def _beyond(text: str) -> bool:
    return text.count("[") + text.count("{") > CONTAINERS_MAX or text.count(",") > STEPS_MAX
