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
| put-object | `(rows) -> None`: as put, with objects in the place of payloads                              |
| get-object | `(key) -> object`                                                                           |
| put-durable, commit-durable | as put and commit, at the level of durability the way says               |
| get-many | `(keys) -> dict of payloads by key`: of some distinct keys, handed over as a tuple           |
| iterate | `() -> iterable of (key, payload)`, in key order, of all rows                                      |
| scan    | `(prefix) -> iterable of (key, payload)`, in key order, of all rows whose key begins with `prefix` |
| put-spinning, get-spinning, scan-spinning | as put, get and scan, while as many threads spin as the way says  |
| get-producer, aget-producer | as get and aget, while another thread calls what the way's `producer` makes      |
| queue   | `(rows) -> context`: inside it all rows wait in memory, and when it has ended they are committed    |
| open    | `(directory, live_max) -> jobs`, several stores, each with its name; `live_max` is `None`          |
| evict   | the same with a `live_max`: at most so many are live at once                                       |
| import  | `() -> str`, the name of the module that a fresh interpreter imports                               |
| encode  | `(parts) -> list of bytes`: the keys of the tuple layer for many pairs of a text and a number       |

Rules:
  1. A contender does a task in the best way its documentation knows; a comment beside it says which, and why.
  2. A way that is slower than another one of the same contender is shown beside it, never instead of it.
  3. What is handed over is ready made: encoded keys, payloads as bytes.

Doesn't know: how anything is measured.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
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
Object: TypeAlias = Any
PutObjects: TypeAlias = Callable[[Sequence[tuple[bytes, Object]]], None]
GetObject: TypeAlias = Callable[[bytes], Object]
GetMany: TypeAlias = Callable[[tuple[bytes, ...]], Mapping[bytes, bytes]]
Iterate: TypeAlias = Callable[[], Iterable[Pair]]
Scan: TypeAlias = Callable[[bytes], Iterable[Pair]]
Queue: TypeAlias = Callable[[Iterable[Pair]], AbstractContextManager[None]]
EncodeAll: TypeAlias = Callable[[Sequence[tuple[str, int]]], Sequence[bytes]]

# The one category all rows are put into, where a contender has categories.
CATEGORY = "bench"


class Store(Protocol):
    """An open store, in a directory of its own."""

    def fill(self, rows: Sequence[Pair]) -> None:
        """Store rows in whatever way is fastest; this is never measured."""

    def close(self) -> None:
        """Close it; what was stored stays in the directory."""


class Job(Protocol):
    """One store of several. Where they are limited it is live when it is used."""

    def put(self, key: bytes, payload: bytes) -> object:
        """Store a row; when this returns it is committed."""

    def get(self, key: bytes) -> bytes | None:
        """Return a payload."""

    def close(self) -> None:
        """Close this one."""


class Jobs(Protocol):
    """Several stores of one directory; what is in `name` is there as `name.db`."""

    def open(self, name: str) -> Job:
        """Open one, new or existing."""

    def close(self) -> None:
        """Close what isn't closed yet."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way of doing a task. `share` is the part of a case's operations it is measured with, if it is slow.

    `spinning` is how many threads run pure Python beside it; `producer(store)` gives what another thread puts rows
    with meanwhile, where the task asks for it.
    """

    task: str
    label: str
    make: Callable[[Any], Callable[..., Any]]
    share: float = 1.0
    spinning: int = 0
    producer: Callable[[Any], PutAll] | None = None


@dataclass(frozen=True, slots=True)
class Contender:
    """One engine, or codec, with its ways.

    `settings` says in a line how it is set up. `open_store` opens a new store in an empty directory; an asynchronous
    one runs in the runner it is given. `read_back` opens a closed store again and returns the number of its rows and
    the payloads of some keys. `takes_keys` is whether it takes this package's `Key`s rather than plain bytes, and
    `takes_objects` whether it has an encoding of its own for objects; else they are stored as CBOR. A codec has no
    store.
    """

    name: str
    settings: str
    ways: tuple[Way, ...]
    open_store: Callable[[Path, asyncio.Runner], Store] | None = None
    read_back: Callable[[Path, Sequence[bytes]], tuple[int, list[bytes | None]]] | None = None
    takes_keys: bool = False
    takes_objects: bool = False
