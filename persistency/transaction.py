"""The transaction: what a function gets that travels to the data, by `job.run(fn, *args)`.

It has the job's verbs, and each of them answers directly: no replies, nothing to wait for. What it writes it reads, and
all of it is committed together when the function returns, or undone when it raises.

Rules:
  1. It is used in the thread that runs the function, while the function runs; then it is `Closed`.
  2. Arguments are checked as the job checks them. What fails raises here and now.
  3. A function may be called again, if the transaction has to be begun again: it has no effects but through this.

Doesn't know: mailboxes, replies, SQL, when anything is committed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from threading import get_ident
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any, Literal, TypeVar, TypeVarTuple, overload

from persistency import messages
from persistency.actor.mailbox import Mailbox
from persistency.actor.settling import ready
from persistency.arguments import as_category, as_count, as_flag, as_function, as_key_bytes, as_payload
from persistency.codec.keys import Key, KeyRange
from persistency.errors import Closed, Misuse
from persistency.ops import Change, Entry, Found, KeyLike, Op, Payload, Row, Ttl
from persistency.paging import Pages
from persistency.storage.port import (
    GetRow,
    LastVersion,
    ListCategories,
    Run,
    ScanRange,
    SetRow,
    UsedBytes,
    Within,
)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_EVERYTHING = KeyRange()
_UNDONE = (CoroutineType, GeneratorType, AsyncGeneratorType)  # answers that are work still to be done


class Transaction:
    """The rows of a job as one function sees them. Made by `Job.run`, and of no use outside of its function."""

    __slots__ = ("_job_id", "_now_ms", "_thread", "_within")

    def __init__(self, within: Within, job_id: str, now_ms: Callable[[], int]) -> None:
        self._within: Within | None = within
        self._job_id = job_id
        self._now_ms = now_ms
        self._thread = get_ident()

    @property
    def job_id(self) -> str:
        """The id of the job whose rows these are."""
        return self._job_id

    @property
    def now_ms(self) -> int:
        """The job's time, in Unix milliseconds: what decides which rows have ended."""
        return self._now_ms()

    def _do(self, message: Any) -> Any:
        if self._within is None:
            raise Closed("the transaction is over", hint="Use it inside the function it was given to, and only there.")
        if get_ident() != self._thread:
            raise Misuse("a transaction is used in another thread than its function's")
        return self._within.do(message)

    # -- writes --------------------------------------------------------------------------------------------------

    def put(self, category: str, key: KeyLike, payload: Payload, *, ttl: Ttl | None = None) -> None:
        """Store a payload under a key, whatever was there; it ends after `ttl` (seconds or a `timedelta`)."""
        if ttl is None:
            self._do(SetRow(as_category(category), as_key_bytes(key), as_payload(payload), None))
        else:
            self._do(messages.set_row(category, key, payload, ttl, self._now_ms))

    def delete(self, category: str, key: KeyLike) -> None:
        """Remove one row; a missing one is fine."""
        self._do(messages.drop_row(category, key))

    def delete_prefix(self, category: str, prefix: KeyLike) -> None:
        """Remove the row of the key `prefix` and those of all its children. An empty prefix is `Misuse`."""
        self._do(messages.drop_prefix(category, prefix))

    def delete_range(self, category: str, key_range: KeyRange) -> None:
        """Remove the rows of a range, start in, stop out. One without any bound is `Misuse`."""
        self._do(messages.drop_range(category, key_range))

    def persist(self, ops: Op | Iterable[Op]) -> None:
        """Apply operations, all or nothing. Raises `Conflict` if one of their `Check`s fails."""
        self.commit(ops)

    def commit(self, ops: Op | Iterable[Op]) -> int:
        """Apply operations, all or nothing, and return the last version. Raises `Conflict` if a `Check` fails."""
        batch, _ = messages.batch(ops, self._now_ms)
        return self._do(batch if batch.ops else LastVersion())  # type: ignore[no-any-return]  # a version

    def delete_acked(self, category: str, key: KeyLike) -> bool:
        """Remove one row and return whether it was there."""
        return self._do(messages.drop_row(category, key))  # type: ignore[no-any-return]  # a bool

    def delete_prefix_acked(self, category: str, prefix: KeyLike) -> int:
        """Remove a key and its children and return how many rows were there. An empty prefix is `Misuse`."""
        return self._do(messages.drop_prefix(category, prefix))  # type: ignore[no-any-return]  # a count

    def delete_range_acked(self, category: str, key_range: KeyRange) -> int:
        """Remove the rows of a range and return how many there were. One without any bound is `Misuse`."""
        return self._do(messages.drop_range(category, key_range))  # type: ignore[no-any-return]  # a count

    def compare_and_set(
        self,
        category: str,
        key: KeyLike,
        expected: Payload | None,
        new: Payload | None,
        *,
        ttl: Ttl | None = None,
    ) -> bool:
        """Put `new` in the place of `expected` (`None`: no row, on either side) and return whether it was there."""
        message = messages.swap_row(category, key, expected, new, ttl, self._now_ms)
        return self._do(message)  # type: ignore[no-any-return]  # a bool

    def increment(self, category: str, key: KeyLike, delta: int = 1) -> int:
        """Count a CBOR integer up and return it; see `Job.increment`. Raises `Conflict` if it isn't an integer."""
        from persistency.counting import add  # only here, as in `Job.increment`

        return self._do(add(category, key, delta))  # type: ignore[no-any-return]  # an int

    def touch(self, category: str, key: KeyLike, ttl: Ttl | None) -> bool:
        """Have a row end after `ttl` from now (`None`: not at all) and return whether it was there."""
        return self._do(messages.touch_row(category, key, ttl, self._now_ms))  # type: ignore[no-any-return]  # a bool

    def run(self, fn: Callable[[Transaction, *Ts], T], *args: *Ts) -> T:
        """Call `fn(tx, *args)` as a part of its own: if it raises, only what it wrote is undone."""
        return self._do(program(fn, args, self._job_id, self._now_ms, None))  # type: ignore[no-any-return]  # what fn returns

    # -- reads ---------------------------------------------------------------------------------------------------

    def get(self, category: str, key: KeyLike) -> bytes | None:
        """Return a payload; `None` if there is no such row."""
        return self._do(GetRow(as_category(category), as_key_bytes(key)))  # type: ignore[no-any-return]  # bytes

    def entry(self, category: str, key: KeyLike) -> Entry | None:
        """Return a row with its version and expiry."""
        return messages.entry(self._do(messages.get_entry(category, key)))

    def get_many(self, category: str, keys: Iterable[KeyLike]) -> Found:
        """Return several payloads: a dict by `Key` in the order asked, the missing left out."""
        return Found(self._do(messages.get_rows(category, keys)))

    def exists(self, category: str, key: KeyLike) -> bool:
        """Return whether there is such a row."""
        return self._do(messages.has_row(category, key))  # type: ignore[no-any-return]  # a bool

    def count(self, category: str, key_range: KeyRange = _EVERYTHING) -> int:
        """Return how many rows a range has."""
        return self._do(messages.count_range(category, key_range))  # type: ignore[no-any-return]  # a count

    def scan(
        self, category: str, key_range: KeyRange = _EVERYTHING, *, reverse: bool = False, limit: int | None = None
    ) -> list[Row]:
        """Return the rows of a range in key order, start in, stop out, at most `limit` of them."""
        return messages.rows(self._do(messages.scan_range(category, key_range, reverse, limit)))

    def keys(
        self, category: str, key_range: KeyRange = _EVERYTHING, *, reverse: bool = False, limit: int | None = None
    ) -> list[Key]:
        """Return the keys of a range alone; no payload is read."""
        message = messages.scan_range(category, key_range, reverse, limit)
        return messages.keys(self._do(message._replace(keys_only=True)))

    def scan_prefix(
        self, category: str, prefix: KeyLike, *, reverse: bool = False, limit: int | None = None
    ) -> list[Row]:
        """Return the row of the key `prefix` itself and those of all its children."""
        return messages.rows(self._do(messages.scan_prefix(category, prefix, reverse, limit)))

    @overload
    def iterate(
        self,
        category: str,
        key_range: KeyRange = ...,
        *,
        prefix: KeyLike | None = ...,
        reverse: bool = ...,
        page: int = ...,
        keys_only: Literal[False] = ...,
    ) -> Pages[Row]: ...
    @overload
    def iterate(
        self,
        category: str,
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
        category: str,
        key_range: KeyRange = ...,
        *,
        prefix: KeyLike | None = ...,
        reverse: bool = ...,
        page: int = ...,
        keys_only: bool,
    ) -> Pages[Any]: ...
    def iterate(
        self,
        category: str,
        key_range: KeyRange = _EVERYTHING,
        *,
        prefix: KeyLike | None = None,
        reverse: bool = False,
        page: int = 256,
        keys_only: bool = False,
    ) -> Pages[Any]:
        """Walk over a range, or a prefix, a page at a time; see `Job.iterate`."""
        span = messages.walked_range(key_range, prefix)
        name, reverse, keys_only = as_category(category), as_flag(reverse, "reverse"), as_flag(keys_only, "keys_only")
        return Pages(
            lambda start, stop, limit: ready(self._do(ScanRange(name, start, stop, reverse, limit, keys_only))),
            ready,
            messages.key_alone if keys_only else messages.row,
            span,
            reverse=reverse,
            page=as_count(page, "page", 1),
        )

    def snapshot(self, category: str) -> list[Entry]:
        """Return a category's rows in the order of their versions."""
        return messages.entries(self._do(messages.list_entries(category)))

    def categories(self) -> list[str]:
        """Return the categories that have rows."""
        return messages.names(self._do(ListCategories()))

    def version(self) -> int:
        """Return the version of the last operation, this transaction's own included."""
        return self._do(LastVersion())  # type: ignore[no-any-return]  # a version

    def changes(self, after: int, limit: int) -> list[Change]:
        """Return the first changes behind a version; see `Job.changes`."""
        return messages.changes(self._do(messages.list_changes(after, limit, False)))

    def storage_used(self) -> int:
        """Return the bytes of all payloads."""
        return self._do(UsedBytes())  # type: ignore[no-any-return]  # a number of bytes


def program(
    fn: Callable[..., Any], args: tuple[Any, ...], job_id: str, now_ms: Callable[[], int], mailbox: Mailbox | None
) -> Run:
    """Return the message that has `fn(tx, *args)` called; `mailbox` is told who is inside, so that nobody waits there.

    Raises `Misuse` for what isn't a plain function.
    """
    fn = as_function(fn)

    def call(within: Within) -> Any:
        transaction = Transaction(within, job_id, now_ms)
        try:
            if mailbox is not None:
                mailbox.inside = get_ident()
            answer = fn(transaction, *args)
        finally:  # without a call, at which an interrupt could come
            transaction._within = None
            if mailbox is not None:
                mailbox.inside = None
        if isinstance(answer, _UNDONE):
            if not isinstance(answer, AsyncGeneratorType):
                answer.close()
            raise Misuse(
                f"fn returned a {type(answer).__name__}, whose work isn't done yet: return what it gives",
                hint="Nothing was written. The transaction is over when fn returns.",
            )
        return answer

    return Run(call, (fn,))
