"""An ordered log: records numbered 1, 2, 3, ... without holes, and consumers that each have their own position in it.

Rules:
  1. A record is there when its append is committed, and its number never changes; numbers aren't given twice, after a
     restart, or when all records were trimmed, neither.
  2. Who appends one after the other has them in that order; those of others come in between.
  3. Consumers take nothing away: records stay until `trim` removes what all consumers are done with.

Doesn't know: how its rows look, how a job is run, who waits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from datetime import timedelta
from typing import Any, Generic, Literal, TypeVar, overload

from persistency import CBOR, Codec, Misuse, Reply, Transaction
from persistency.recipes.orderedlog_consumer import Consumer, LogRecord, as_number, decoded
from persistency.recipes.orderedlog_rows import Rows, Stored
from persistency.recipes.runner import Runner, as_runner
from persistency.recipes.waiting import bell_of

__all__ = ["Consumer", "LogRecord", "OrderedLog"]

T = TypeVar("T")

_NAME_BYTES_MAX = 255
_CONSUMER_CHARS_MAX = 1_000
_BATCH_MAX = 10_000


class OrderedLog(Generic[T]):
    """An ordered log in a job, or in a `Baton`.

    `name`: the category its rows are in. `codec`: how values are stored (`CBOR`, `RAW`, `typed(cls)`). Any thread and
    any event loop may use it, and several objects may be about one log.
    """

    @overload
    def __init__(self: OrderedLog[Any], runner: Runner, name: str = "log") -> None: ...
    @overload
    def __init__(self, runner: Runner, name: str = "log", *, codec: Codec[T]) -> None: ...
    def __init__(self, runner: Runner, name: str = "log", *, codec: Codec[Any] = CBOR) -> None:
        self._runner = as_runner(runner)
        if not isinstance(name, str) or not 1 <= len(_encoded(name)) <= _NAME_BYTES_MAX:
            raise Misuse(f"name must be a str of 1 to {_NAME_BYTES_MAX} UTF-8 bytes, not {name!r:.40}")
        if not all(callable(getattr(codec, function, None)) for function in ("encode", "decode")):
            raise Misuse(f"codec must be a codec, not {codec!r:.80}: pass CBOR, RAW or typed(cls)")
        self._codec: Codec[T] = codec
        self._rows = Rows(name, bell_of(self._runner, f"log {name}"))

    @property
    def name(self) -> str:
        """The category its rows are in."""
        return self._rows.category

    # -- appending -----------------------------------------------------------------------------------------------

    def append(self, value: T) -> Reply[int]:
        """Append a record and answer with its number. Raises `Misuse` for a value the codec can't encode."""
        return self._runner.run(self._rows.append, [self._codec.encode(value)]).map(_start)

    def append_many(self, values: Iterable[T]) -> Reply[range]:
        """Append several, all or none, up to 10,000, one behind the other; answer with their numbers."""
        encoded = [self._codec.encode(value) for value in values]
        if len(encoded) > _BATCH_MAX:
            raise Misuse(f"{len(encoded):,} records at once are too many: append up to {_BATCH_MAX:,}")
        return self._runner.run(self._rows.append, encoded)

    def append_in(self, tx: Transaction, value: T) -> int:
        """Append a record in a transaction of one's own, on the same job: it is there if, and only if, the rest is."""
        return self._rows.append(tx, [self._codec.encode(value)]).start

    # -- reading -------------------------------------------------------------------------------------------------

    def read(self, after: int = 0, limit: int = 100) -> Reply[list[LogRecord[T]]]:
        """Ask for the first records behind a number: at most `limit`, or some 16 MiB.

        The reply raises `FeedTruncated` if one of them was trimmed; its `oldest` is the first one that is kept.
        """
        after, limit = as_number(after, "after", 0), as_number(limit, "limit", 1)
        return self._runner.run(self._rows.read, after, limit).map(self._decoded)

    def first(self) -> Reply[int]:
        """Ask for the number of the first record that is kept; where none is, of the next one to come."""
        return self._runner.run(self._rows.first)

    def last(self) -> Reply[int]:
        """Ask for the number of the last record there was; 0: there was none yet."""
        return self._runner.run(self._rows.last)

    # -- consumers -----------------------------------------------------------------------------------------------

    def consumer(self, name: str, *, start: Literal["first", "last"] = "first") -> Consumer[T]:
        """Return the consumer of a name, which goes on where it was.

        One that is new begins with the `"first"` record that is kept, or behind the `"last"` one; its position is kept,
        and holds up `trim`, from now on. For a name that is in use it is another object with the same position: each
        record goes to both, and which of the two was behind is told by `commit`.
        """
        if not isinstance(name, str) or not 1 <= len(name) <= _CONSUMER_CHARS_MAX:
            raise Misuse(f"name must be a str of 1 to {_CONSUMER_CHARS_MAX:,} characters, not {name!r:.40}")
        _encoded(name)
        if start not in ("first", "last"):
            raise Misuse(f"start must be 'first' or 'last', not {start!r:.40}")
        return Consumer(self._runner, self._rows, self._codec, name, at_end=start == "last")

    def consumers(self) -> Reply[dict[str, int]]:
        """Ask for all consumers: the number of the last record each is done with, by name."""
        return self._runner.run(self._rows.positions)

    def drop_consumer(self, name: str) -> Reply[bool]:
        """Remove a consumer, so that it no longer holds up `trim`, and answer whether there was one.

        One that is still in use begins anew.
        """
        if not isinstance(name, str):
            raise Misuse(f"name must be a str, not {type(name).__name__}: pass a consumer's name")
        _encoded(name)
        return self._runner.run(self._rows.drop, name)

    # -- trimming ------------------------------------------------------------------------------------------------

    def trim(
        self,
        *,
        keep_last: int = 0,
        keep_ms: float | timedelta = 0,
        despite_consumers: bool = False,
        limit: int = 10_000,
    ) -> Reply[int]:
        """Remove the first records, as far as all consumers are done with them, and answer how many were removed.

        `keep_last` records stay whatever was done with them, and so do those of the last `keep_ms` milliseconds (or of
        a `timedelta`; a part of a millisecond counts as a whole one). With `despite_consumers` these two alone decide,
        at least one of them then, and a consumer that is behind gets `FeedTruncated`. Without it, and without any
        consumer, nothing is removed. One call removes up to `limit` records, so as not to hold up the job: call it
        again while it answers with that many.
        """
        if isinstance(keep_ms, timedelta):
            keep_ms = -(-keep_ms // timedelta(milliseconds=1))  # rounded up, without a float's error
        if isinstance(keep_ms, bool) or not isinstance(keep_ms, int | float) or not 0 <= keep_ms < 2**62:
            raise Misuse(f"keep_ms must be 0 or more milliseconds, or a timedelta, not {keep_ms!r:.40}")
        if not isinstance(despite_consumers, bool):
            raise Misuse(f"despite_consumers must be a bool, not {type(despite_consumers).__name__}")
        keep_last, keep_ms = as_number(keep_last, "keep_last", 0), math.ceil(keep_ms)
        if despite_consumers and not keep_last and not keep_ms:
            raise Misuse("despite_consumers needs a keep_last or a keep_ms, or it would remove what nobody has read")
        limit = as_number(limit, "limit", 1)
        return self._runner.run(self._rows.trim, keep_last, keep_ms, despite_consumers, limit)

    def __repr__(self) -> str:
        return f"<OrderedLog {self.name!r} of job {self._runner.id!r}>"

    def _decoded(self, stored: list[Stored]) -> list[LogRecord[T]]:
        return decoded(self._codec, stored)


def _encoded(name: str) -> bytes:
    try:
        return name.encode()
    except UnicodeEncodeError as error:
        raise Misuse(f"name {name!r:.80} holds a lone surrogate: pass text that UTF-8 can hold") from error


def _start(numbers: range) -> int:
    return numbers.start
