"""Vectors: what makes items findable by meaning, if the store was given an index.

Rules:
  1. Every vector of a page is compared with that of the query: there is no index structure, and none to keep.
  2. They are stored with the length 1, as 32-bit floats, so a comparison is one sum of products.
  3. An item is as near as the nearest of its vectors.

Doesn't know: items, namespaces, where the vectors are.
"""

from __future__ import annotations

import math
import sys
from array import array
from collections.abc import Mapping, Sequence
from operator import mul
from typing import Any

from langchain_core.embeddings import Embeddings
from langgraph.store.base import IndexConfig, ensure_embeddings, get_text_at_path, tokenize_path

from persistency import CBOR, Corrupt, Misuse

_EVERYTHING = "$"


class Index:
    """How texts of items become vectors: LangGraph's `IndexConfig`, with `embed`, `dims` and `fields`."""

    def __init__(self, config: IndexConfig) -> None:
        self.embeddings: Embeddings = ensure_embeddings(config.get("embed"))
        self._dims = config.get("dims")
        self._paths = _tokenized(config.get("fields") or [_EVERYTHING])

    def texts(self, value: Mapping[str, Any], fields: Sequence[str] | None) -> list[str]:
        """Return the texts of a value that are to be found: those of some fields, or of the index's own."""
        paths = self._paths if fields is None else _tokenized(fields)
        return [text for path in paths for text in get_text_at_path(value, path)]

    def units(self, texts: Sequence[str], made: Sequence[Sequence[float]]) -> dict[str, array[float]]:
        """Return the vectors an embedding has made of texts, each with the length 1.

        Raises `Misuse` if one has another number of dimensions than the index says.
        """
        return {text: self._unit(vector) for text, vector in zip(texts, made, strict=True)}

    def _unit(self, vector: Sequence[float]) -> array[float]:
        if self._dims is not None and len(vector) != self._dims:
            raise Misuse(
                f"the embedding made {len(vector)} dimensions, the index says dims={self._dims}",
                hint="Give the index the number that the embedding makes.",
            )
        length = math.hypot(*vector)
        return array("f", (part / length for part in vector) if length else vector)


def pack(vectors: Sequence[array[float]]) -> bytes:
    """Return an item's vectors as a payload."""
    return CBOR.encode([_little_endian(vector).tobytes() for vector in vectors])


def nearness(query: array[float], payload: bytes) -> float:
    """Return the cosine of a query and the nearest of an item's vectors, from -1 to 1."""
    found = []
    for data in CBOR.decode(payload):
        vector = array("f")
        vector.frombytes(data)
        if len(vector) != len(query):
            raise Corrupt(
                f"an item's vector has {len(vector)} dimensions, the query's {len(query)}",
                hint="Was it stored with another embedding? Put the items again.",
            )
        found.append(_dot(query, _little_endian(vector)))
    return max(found)


def _tokenized(fields: Sequence[str]) -> list[Any]:
    return [path if path == _EVERYTHING else tokenize_path(path) for path in fields]


def _little_endian(vector: array[float]) -> array[float]:
    if sys.byteorder == "big":
        vector = vector[:]
        vector.byteswap()
    return vector


if sys.version_info >= (3, 12):
    _dot = math.sumprod
else:

    def _dot(one: array[float], other: array[float]) -> float:
        return float(sum(map(mul, one, other)))
