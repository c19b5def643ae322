"""The rows of an ordered log, and the transactions on them.

| key | payload |
|---|---|
| `("record", number)` | one CBOR item, an array of two: when it was appended, and what the codec made of its value |
| `("consumer", name)` | the number of the last record that the consumer is done with |
| `("trimmed",)` | the number of the last record that was removed; no row: none was |

Rules:
  1. Every function here is run by a runner, in one transaction, and has no effects but through it, and the bell.
  2. Records are numbered 1, 2, 3, ...: the next one's number is that of the last one, or of what was trimmed, and one.
  3. The bell is rung inside of the transaction: who is woken asks for what there is, and that is answered after it.

Doesn't know: values, codecs, who waits.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from typing import Final, NamedTuple

from persistency import CBOR, Conflict, Corrupt, FeedTruncated, KeyRange, Misuse, Transaction
from persistency.recipes.waiting import Bell

# An array of two, a 64-bit number; the value's own bytes follow.
_HEAD = struct.Struct(">BBQ")
_ARRAY_OF_2, _UINT64 = 0x82, 0x1B
_RECORDS = KeyRange.prefix(("record",))
_CONSUMERS = KeyRange.prefix(("consumer",))
_TRIMMED = ("trimmed",)
READ_BYTES_MAX: Final = 16 * 1024 * 1024
"""A read that has as many bytes ends there."""
_PAGE = 64


class Stored(NamedTuple):
    """A record as it is stored."""

    number: int
    at_ms: int
    encoded: bytes


class Rows:
    """The rows of one log, in one category."""

    def __init__(self, category: str, bell: Bell) -> None:
        self.category = category
        self.bell = bell

    # -- records -------------------------------------------------------------------------------------------------

    def append(self, tx: Transaction, encoded: Sequence[bytes]) -> range:
        """Append records; return their numbers."""
        first, at_ms = self.last(tx) + 1, tx.now_ms
        for number, value in enumerate(encoded, first):
            tx.put(self.category, ("record", number), _HEAD.pack(_ARRAY_OF_2, _UINT64, at_ms) + value)
        self.bell.ring()
        return range(first, first + len(encoded))

    def last(self, tx: Transaction) -> int:
        """Return the number of the last record there ever was."""
        newest = tx.keys(self.category, _RECORDS, reverse=True, limit=1)
        return newest[0].parts[1] if newest else self._trimmed(tx)

    def first(self, tx: Transaction) -> int:
        """Return the number of the first record that is kept; if none is, of the next one to come."""
        return self._trimmed(tx) + 1

    def read(self, tx: Transaction, after: int, limit: int) -> list[Stored]:
        """Return the first records behind a number. Raises `FeedTruncated` if one of them was trimmed."""
        first = self.first(tx)
        if after < first - 1:
            hint = f"The log was trimmed: read from after={first - 1}, or reset the consumer to that."
            raise FeedTruncated(first, hint=hint)
        found, size = [], 0
        span = KeyRange(("record", after + 1), _RECORDS.stop)
        for row in tx.iterate(self.category, span, page=min(limit, _PAGE)):
            number = row.key.parts[1]
            found.append(Stored(number, _at_ms(number, row.payload), row.payload[_HEAD.size :]))
            size += len(row.payload)
            if len(found) == limit or size >= READ_BYTES_MAX:
                break
        return found

    # -- consumers -----------------------------------------------------------------------------------------------

    def position(self, tx: Transaction, name: str, at_end: bool) -> int:
        """Return up to where a consumer is done; one that isn't known yet is entered, at the beginning or the end."""
        stored = tx.get(self.category, ("consumer", name))
        if stored is not None:
            return _number(stored)
        position = self.last(tx) if at_end else self._trimmed(tx)
        tx.put(self.category, ("consumer", name), CBOR.encode(position))
        return position

    def take(self, tx: Transaction, name: str, at_end: bool, limit: int) -> list[Stored]:
        """Return the first records that a consumer isn't done with."""
        return self.read(tx, self.position(tx, name, at_end), limit)

    def commit(self, tx: Transaction, name: str, at_end: bool, number: int, before: int | None) -> bool:
        """Move a consumer's position forward; return whether it was behind `number` (and at `before`, if given)."""
        position, last = self.position(tx, name, at_end), self.last(tx)
        if number > last:
            raise Misuse(f"there is no record {number} to be done with: the last one is {last}")
        if position >= number or before not in (None, position):
            return False
        tx.put(self.category, ("consumer", name), CBOR.encode(number))
        return True

    def commit_or_raise(self, tx: Transaction, name: str, at_end: bool, number: int) -> None:
        """Do what `commit` does, and raise `Conflict` where that returns false."""
        if not self.commit(tx, name, at_end, number, None):
            position = self.position(tx, name, at_end)
            hint = "Another consumer of this name has done it: nothing of this transaction was applied. Take anew."
            raise Conflict(("consumer", name), f"a position before {number}", f"position {position}", hint=hint)

    def reset(self, tx: Transaction, name: str, number: int) -> None:
        """Set a consumer's position, wherever it was."""
        last = self.last(tx)
        if number > last:
            raise Misuse(f"there is no record {number} to go on behind: the last one is {last}")
        tx.put(self.category, ("consumer", name), CBOR.encode(number))
        self.bell.ring()

    def lag(self, tx: Transaction, name: str, at_end: bool) -> int:
        """Return how many records a consumer isn't done with."""
        position = self.position(tx, name, at_end)
        return self.last(tx) - position

    def positions(self, tx: Transaction) -> dict[str, int]:
        """Return the position of each consumer."""
        return {row.key.parts[1]: _number(row.payload) for row in tx.scan(self.category, _CONSUMERS)}

    def drop(self, tx: Transaction, name: str) -> bool:
        """Remove a consumer; return whether there was one."""
        return tx.delete_acked(self.category, ("consumer", name))

    # -- trimming ------------------------------------------------------------------------------------------------

    def trim(self, tx: Transaction, keep_last: int, keep_ms: int, despite_consumers: bool, limit: int) -> int:
        """Remove the first records, as far as they needn't be kept; return how many."""
        trimmed, last = self._trimmed(tx), self.last(tx)
        goal = min(last - keep_last, trimmed + limit)
        if not despite_consumers:
            goal = min(goal, min(self.positions(tx).values(), default=0))
        if keep_ms and goal > trimmed:
            # Times don't go backwards within a log, so a few of them tell where those begin that are too young.
            numbers = range(trimmed + 1, goal + 1)
            goal = trimmed + bisect_right(numbers, tx.now_ms - keep_ms, key=lambda number: self._appended(tx, number))
        if goal <= trimmed:
            return 0
        tx.delete_range(self.category, KeyRange(("record", trimmed + 1), ("record", goal + 1)))
        tx.put(self.category, _TRIMMED, CBOR.encode(goal))
        return goal - trimmed

    def _appended(self, tx: Transaction, number: int) -> int:
        return _at_ms(number, tx.get(self.category, ("record", number)) or b"")

    def _trimmed(self, tx: Transaction) -> int:
        stored = tx.get(self.category, _TRIMMED)
        return 0 if stored is None else _number(stored)


def _at_ms(number: int, payload: bytes) -> int:
    if len(payload) >= _HEAD.size:
        array, uint64, at_ms = _HEAD.unpack_from(payload)
        if (array, uint64) == (_ARRAY_OF_2, _UINT64):
            return int(at_ms)
    raise Corrupt(f"record {number} isn't one of a log", hint="Is the category used for something else?")


def _number(payload: bytes) -> int:
    number = CBOR.decode(payload)
    if not isinstance(number, int):
        raise Corrupt("a position of a log isn't a number", hint="Is the category used for something else?")
    return number
