"""Pickles: whether they are read, how, and how one is known that doesn't say so.

Rules:
  1. Nothing is unpickled unless it was asked for; the word that says how has to be given.
  2. What can't be read is `Lost`, whatever the reason: one item never ends a migration.

Doesn't know: origins, jobs.
"""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Callable
from typing import Any, Final, Literal, TypeAlias

from persistency import Misuse
from persistency.integrations.migration.items import Lost, Reason
from persistency.integrations.migration.plain import PROTOCOL_MAX, read_plain
from persistency.integrations.migration.reading import BYTES_MAX

Unpickle: TypeAlias = Literal["plain", "trust"] | Callable[[bytes], Any]
"""How pickles are read: `"plain"` by `read_plain`; `"trust"` by `pickle.loads`, which imports and runs whatever they
say; or a function of your own."""

_STARTS: Final = tuple(bytes((0x80, protocol)) for protocol in range(2, PROTOCOL_MAX + 1))
_END = b"."
_ZLIB = 0x78


def reader_of(unpickle: Unpickle | None) -> Callable[[bytes], Any] | None:
    """Return the function that reads a pickle, and raises `Lost`; `None` if none is to be read.

    Raises `Misuse` for another word.
    """
    if unpickle is None:
        return None
    if callable(unpickle):
        read: Callable[[bytes], Any] = unpickle
    elif unpickle in ("plain", "trust"):
        read = read_plain if unpickle == "plain" else pickle.loads
    else:
        raise Misuse(f"unpickle must be None, 'plain', 'trust' or a function of bytes, not {unpickle!r:.40}")

    def read_one(data: bytes) -> Any:
        try:
            return read(data)
        except Exception as error:  # whatever a class of somebody else raises
            told = str(error) or type(error).__name__
            raise Lost(Reason.unread, told if read is read_plain else f"{type(error).__name__}: {told}") from error

    return read_one


def pickle_in(data: bytes) -> bytes | None:
    """Return the pickle that bytes are, packed by zlib or not; `None` if they are none.

    Known is one of protocol 2 or later, for others begin with nothing that tells them.
    """
    if data.startswith(_STARTS):
        return data if data.endswith(_END) else None
    if len(data) > 2 and data[0] == _ZLIB and not int.from_bytes(data[:2], "big") % 31:
        inner = unpacked(data)
        if inner is not None and inner.startswith(_STARTS) and inner.endswith(_END):
            return inner
    return None


def unpacked(data: bytes) -> bytes | None:
    """Return what zlib has packed; `None` if these bytes aren't that alone, or are too many when they are unpacked."""
    unpacking = zlib.decompressobj()
    try:
        inner = unpacking.decompress(data, BYTES_MAX)
    except zlib.error:
        return None
    return inner if unpacking.eof and not unpacking.unused_data else None
