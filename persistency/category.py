"""A category: one category of a job with its values as objects.

Rules:
  1. Built on `Job`'s public methods alone: an event returns `None`, a request a `Reply`, and their order is the job's.
  2. A value is encoded at the call, in the caller's thread, and `Misuse` is raised there; it is decoded in the thread
     that takes the answer, and what can't be decoded is `Corrupt`, which names the category and the key.
  3. Comparing values needs to read before it writes: `job.run` sends that to the data, and the codec works there then.
  4. `None` stands for "no row" where a verb has no other way to say it. A stored `None` is a value of its own for all
     others: see `get`, `compare_and_set`.

Doesn't know: how values are encoded, threads, SQL, files.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Generic, Literal, TypeVar, overload

from persistency.actor.reply import Reply
from persistency.arguments import as_category, as_payload, as_ttl_ms
from persistency.codec.keys import Key, KeyRange, as_key
from persistency.codec.objects import CBOR, RAW, Codec, same
from persistency.coding import (
    CategoryEntries,
    CategoryEntry,
    CategoryRow,
    CategoryRows,
    Coding,
    Decoded,
    FoundValues,
    K,
    TwoParameters,
    V,
)
from persistency.errors import Misuse
from persistency.job import Job
from persistency.mapping import CategoryMapping
from persistency.ops import KeyLike, Ttl
from persistency.paging import Pages
from persistency.transaction import Transaction

D = TypeVar("D")
_EVERYTHING = KeyRange()


class Category(TwoParameters, Generic[K, V]):
    """The verbs of a job with one category bound, and values as objects.

    `codec`: `CBOR` for plain values (the default), `RAW` for bytes, `typed(cls)` for a dataclass, msgspec struct or
    pydantic model, or anything with an `encode` and a `decode`. Several categories may share a job and a name.

    To a type checker it is a `Category[K, V]`: `K` is the type of its keys as tuples, any tuple unless it is said
    (`users: Category[tuple[str, int], User] = Category(...)`), and `V` is that of its values, which the codec knows.
    """

    __slots__ = ("_coding", "job")

    @overload
    def __init__(self, job: Job, name: str) -> None: ...
    @overload
    def __init__(self, job: Job, name: str, codec: Codec[V]) -> None: ...
    def __init__(self, job: Job, name: str, codec: Codec[Any] = CBOR) -> None:
        if not isinstance(job, Job):
            raise Misuse(f"job must be a Job, not {type(job).__name__}: pass what open_job gave")
        as_category(name)
        if not all(callable(getattr(codec, function, None)) for function in ("encode", "decode")):
            hint = "Pass CBOR, RAW, typed(cls), or an object with encode(value) and decode(data)."
            raise Misuse(f"codec must be a codec, not {codec!r:.80}", hint=hint)
        self.job: Job = job
        self._coding: Coding[V] = Coding(name, codec)

    @property
    def name(self) -> str:
        """The category's name."""
        return self._coding.name

    @property
    def codec(self) -> Codec[V]:
        """What turns its values into payloads and back."""
        return self._coding.codec

    # -- events --------------------------------------------------------------------------------------------------

    def put(self, key: K | Key, value: V, *, ttl: Ttl | None = None) -> None:
        """Store a value under a key, whatever was there; it ends after `ttl` (seconds or a `timedelta`)."""
        self.job.put(self.name, key, self._coding.encode(value), ttl=ttl)

    def delete(self, key: K | Key) -> None:
        """Remove one row; a missing one is fine."""
        self.job.delete(self.name, key)

    def delete_prefix(self, prefix: KeyLike) -> None:
        """Remove the row of the key `prefix` and those of all its children. An empty prefix is `Misuse`."""
        self.job.delete_prefix(self.name, prefix)

    def delete_range(self, key_range: KeyRange) -> None:
        """Remove the rows of a range, start in, stop out. One without any bound is `Misuse`."""
        self.job.delete_range(self.name, key_range)

    # -- reads ---------------------------------------------------------------------------------------------------

    @overload
    def get(self, key: K | Key) -> Reply[V | None]: ...
    @overload
    def get(self, key: K | Key, default: D) -> Reply[V | D]: ...
    def get(self, key: K | Key, default: Any = None) -> Reply[Any]:
        """Ask for a value; `default` if there is no such row. (A stored `None` is `None`, whatever the default.)"""
        key = as_key(key)
        return self.job.get(self.name, key).map(
            lambda payload: default if payload is None else self._coding.decode(key, payload)
        )

    def entry(self, key: K | Key) -> Reply[CategoryEntry[V] | None]:
        """Ask for a row with its version and expiry."""
        return self.job.entry(self.name, key).map(self._coding.entry)

    def get_many(self, keys: Iterable[K | Key]) -> Reply[FoundValues[K, V]]:
        """Ask for several values in one snapshot: a dict by `Key` in the order asked, the missing left out.

        Looking up a tuple in it works too.
        """
        return self.job.get_many(self.name, keys).map(self._coding.found)

    def exists(self, key: K | Key) -> Reply[bool]:
        """Ask whether there is such a row."""
        return self.job.exists(self.name, key)

    def count(self, key_range: KeyRange = _EVERYTHING) -> Reply[int]:
        """Ask how many rows a range has."""
        return self.job.count(self.name, key_range)

    def scan(
        self, key_range: KeyRange = _EVERYTHING, *, reverse: bool = False, limit: int | None = None
    ) -> Reply[CategoryRows[V]]:
        """Ask for the rows of a range in key order, start in, stop out, at most `limit` of them."""
        return self.job.scan(self.name, key_range, reverse=reverse, limit=limit).map(self._coding.rows)

    def scan_prefix(
        self, prefix: KeyLike, *, reverse: bool = False, limit: int | None = None
    ) -> Reply[CategoryRows[V]]:
        """Ask for the row of the key `prefix` itself and those of all its children."""
        return self.job.scan_prefix(self.name, prefix, reverse=reverse, limit=limit).map(self._coding.rows)

    def snapshot(self) -> Reply[CategoryEntries[V]]:
        """Ask for all rows, in the order of their versions."""
        return self.job.snapshot(self.name).map(self._coding.entries)

    @overload
    def iterate(
        self,
        key_range: KeyRange = ...,
        *,
        prefix: KeyLike | None = ...,
        reverse: bool = ...,
        page: int = ...,
        keys_only: Literal[False] = ...,
    ) -> Decoded[CategoryRow[V]]: ...
    @overload
    def iterate(
        self,
        key_range: KeyRange = ...,
        *,
        prefix: KeyLike | None = ...,
        reverse: bool = ...,
        page: int = ...,
        keys_only: Literal[True],
    ) -> Pages[Key]: ...
    @overload
    def iterate(
        self,
        key_range: KeyRange = ...,
        *,
        prefix: KeyLike | None = ...,
        reverse: bool = ...,
        page: int = ...,
        keys_only: bool,
    ) -> Decoded[CategoryRow[V]] | Pages[Key]: ...
    def iterate(
        self,
        key_range: KeyRange = _EVERYTHING,
        *,
        prefix: KeyLike | None = None,
        reverse: bool = False,
        page: int = 256,
        keys_only: bool = False,
    ) -> Decoded[CategoryRow[V]] | Pages[Key]:
        """Walk over a range, or a prefix, with `for` or `async for`, asking for a page of rows at a time.

        Nothing is held between pages: writing meanwhile is safe, and a key that is there throughout is seen once.
        """
        pages = self.job.iterate(self.name, key_range, prefix=prefix, reverse=reverse, page=page, keys_only=keys_only)
        return pages if keys_only else Decoded(pages, self._coding.row)

    def list(self, prefix: KeyLike = (), *, reverse: bool = False, page: int = 256) -> Decoded[tuple[K, V]]:
        """Walk over a key and its children (of an empty prefix: everything) as pairs of the key's tuple and its value.

        For `for` and `async for`, a page at a time like `iterate`; parents come before their children. Raises `Misuse`
        at a `RawKey`, which has no tuple: `iterate` gives those.
        """
        return Decoded(self.job.iterate(self.name, prefix=prefix, reverse=reverse, page=page), self._coding.pair)

    # -- requests that write -------------------------------------------------------------------------------------

    def delete_acked(self, key: K | Key) -> Reply[bool]:
        """Remove one row and answer whether it was there."""
        return self.job.delete_acked(self.name, key)

    def delete_prefix_acked(self, prefix: KeyLike) -> Reply[int]:
        """Remove a key and its children and answer how many rows were there. An empty prefix is `Misuse`."""
        return self.job.delete_prefix_acked(self.name, prefix)

    def delete_range_acked(self, key_range: KeyRange) -> Reply[int]:
        """Remove the rows of a range and answer how many there were. One without any bound is `Misuse`."""
        return self.job.delete_range_acked(self.name, key_range)

    def compare_and_set(
        self, key: K | Key, expected: V | None, new: V | None, *, ttl: Ttl | None = None
    ) -> Reply[bool]:
        """Put `new` in the place of `expected`, and answer whether that was there; `None` is no row, on either side.

        So `None, new` creates a row only if there is none, `expected, None` deletes one only if it is still that, and a
        stored `None` can't be swapped. Values are compared deeply once decoded (with `RAW`, as bytes): the order of a
        map's keys doesn't count, `1` is `1.0`, but `True` isn't `1`.
        """
        key = as_key(key)
        wanted = None if expected is None else self._coding.encode(expected)
        put = None if new is None else self._coding.encode(new)
        if wanted is None or self.codec is RAW:
            return self.job.compare_and_set(self.name, key, wanted, put, ttl=ttl)
        if put is not None:
            as_payload(put, "new")
        if ttl is not None and put is None:
            raise Misuse("ttl was given, but new is None, which deletes the row: leave ttl out")
        end_ms = None if ttl is None else self.job.now_ms + as_ttl_ms(ttl)
        return self.job.run(_swap, self._coding, key, wanted, put, end_ms)

    def increment(self, key: K | Key, delta: int = 1) -> Reply[int]:
        """Count up and answer with the new number; a missing row counts as 0, and an expiry stays.

        Raises `Conflict` if what is there isn't an integer. Raises `Misuse` with any other codec than `CBOR`.
        """
        if self.codec is not CBOR:
            raise Misuse(f"increment stores CBOR integers, which {self.codec!r} doesn't: use a category with CBOR")
        return self.job.increment(self.name, key, delta)

    def touch(self, key: K | Key, ttl: Ttl | None) -> Reply[bool]:
        """Have a row end after `ttl` from now (`None`: not at all), and answer whether there was one."""
        return self.job.touch(self.name, key, ttl)

    # -- as a mapping --------------------------------------------------------------------------------------------

    def mapping(self) -> CategoryMapping[Any, V]:
        """Return the category as a `MutableMapping`, whose reads and removals wait for their answers.

        Its keys are tuples, or bare where the tuple has one part. For a type checker say what yours are:
        `ages: CategoryMapping[str, int] = category.mapping()`.
        """
        return CategoryMapping(self.job, self._coding)

    def __repr__(self) -> str:
        return f"<Category {self.name!r} of {self.job!r}, {self.codec!r}>"


def _swap(tx: Transaction, coding: Coding[V], key: Key, wanted: bytes, put: bytes | None, end_ms: int | None) -> bool:
    stored = tx.get(coding.name, key)
    if stored is None:
        return False
    if stored != wanted and not same(coding.decode(key, stored), coding.decode(key, wanted)):
        return False
    left_ms = None if end_ms is None else end_ms - tx.now_ms  # the TTL has counted since the call
    if put is None or (left_ms is not None and left_ms <= 0):
        tx.delete(coding.name, key)
    else:
        tx.put(coding.name, key, put, ttl=None if left_ms is None else timedelta(milliseconds=left_ms))
    return True
