"""The protocol between cases and contenders: what a contender brings, and what a case may ask of it.

A contender offers *ways* of doing *tasks*. A way's `make(store)` returns the function that is measured:

| task    | the function                                                                                       |
|---------|----------------------------------------------------------------------------------------------------|
| put     | `(rows) -> None`, which returns when every row is committed                                        |
| put-kept | the same, of a job that keeps more than the rows: ends, a quota, a feed                           |
| produce | `(key, payload) -> None`, the producer's side of a put                                             |
| get     | `(key) -> payload`                                                                                 |
| commit  | `(key, payload) -> object`, which returns when the row is committed                                |
| aget    | `(key) -> awaitable payload`                                                                       |
| acommit | `(key, payload) -> awaitable`, which ends when the row is committed                                |
| post    | `(rows) -> awaitable int`: hands a few rows over, ends when there is room for more; how many it took |
| scan    | `(prefix) -> iterable of (key, payload)`, in key order, of all rows whose key begins with `prefix` |
| encode  | `(parts) -> list of bytes`: the keys of the tuple layer for many pairs of a text and a number       |

Rules:
  1. A contender does a task in the best way its documentation knows; a comment beside it says which, and why.
  2. A way that is slower than another one of the same contender is shown beside it, never instead of it.
  3. What is handed over is ready made: encoded keys, payloads as bytes.

Doesn't know: how anything is measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

Pair: TypeAlias = tuple[bytes, bytes]
PutAll: TypeAlias = Callable[[Sequence[Pair]], None]
PutOne: TypeAlias = Callable[[bytes, bytes], object]
Get: TypeAlias = Callable[[bytes], bytes | None]
AwaitedGet: TypeAlias = Callable[[bytes], Awaitable[bytes | None]]
AwaitedPut: TypeAlias = Callable[[bytes, bytes], Awaitable[object]]
PostSome: TypeAlias = Callable[[Sequence[Pair]], Awaitable[int]]
Scan: TypeAlias = Callable[[bytes], Iterable[Pair]]
EncodeAll: TypeAlias = Callable[[Sequence[tuple[str, int]]], Sequence[bytes]]

# The one category all rows are put into, where a contender has categories.
CATEGORY = "bench"


class Store(Protocol):
    """An open store, in a directory of its own."""

    def fill(self, rows: Sequence[Pair]) -> None:
        """Store rows in whatever way is fastest; this is never measured."""

    def close(self) -> None:
        """Close it; what was stored stays in the directory."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way of doing a task. `share` is the part of a case's operations it is measured with, if it is slow."""

    task: str
    label: str
    make: Callable[[Any], Callable[..., Any]]
    share: float = 1.0


@dataclass(frozen=True, slots=True)
class Contender:
    """One engine, or codec, with its ways.

    `settings` says in a line how it is set up. `open_store` opens a new store in an empty directory; an asynchronous
    one runs in the runner it is given. `read_back` opens a closed store again and returns the number of its rows and
    the payloads of some keys. `takes_keys` is whether it takes this package's `Key`s rather than plain bytes. A codec
    has no store.
    """

    name: str
    settings: str
    ways: tuple[Way, ...]
    open_store: Callable[[Path, asyncio.Runner], Store] | None = None
    read_back: Callable[[Path, Sequence[bytes]], tuple[int, list[bytes | None]]] | None = None
    takes_keys: bool = False
