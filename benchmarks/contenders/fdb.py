"""The tuple layer of FoundationDB's own Python package: the same bytes as our keys.

Rules:
  1. Its documented call, `fdb.tuple.pack`; it needs neither a server nor the client library.

Doesn't know: stores.
"""

from __future__ import annotations

from collections.abc import Sequence

import fdb.tuple

from benchmarks.protocol import Contender, EncodeAll, Way


def _encode(_store: object) -> EncodeAll:
    pack = fdb.tuple.pack

    def encode(parts: Sequence[tuple[str, int]]) -> list[bytes]:
        return [pack((text, number)) for text, number in parts]

    return encode


CONTENDER = Contender(name="fdb", settings="its defaults", ways=(Way("encode", "fdb.tuple.pack", _encode),))
