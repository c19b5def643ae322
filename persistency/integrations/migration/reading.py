"""The reading of a plain pickle: its bytes, the stack, and what bounds its costs.

Rules:
  1. Costs are bounded before they arise: instructions, containers, the digits of a number, what is copied, what becomes
     a key, and what a value that holds something twice comes to when it is written out in full.
  2. Keys that aren't text may have been chosen so that each is looked for at the places of all others, which can't be
     seen beforehand. So they are put in a few at a time, and the processor time of that is what is bounded.
  3. What goes beyond a bound, or takes what isn't there, raises, and nothing is given.

Doesn't know: which instructions there are, what may be named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import date, datetime
from decimal import Decimal
from itertools import chain
from sys import getsizeof
from time import thread_time
from typing import Any, Final, NamedTuple

BYTES_MAX: Final = 256 * 1024 * 1024
"""The longest pickle, and the most bytes of text that its value has when it is written out."""
STEPS_MAX: Final = 1 << 21
"""The most instructions of a pickle, and the most members that its value has when it is written out."""
CONTAINERS_MAX: Final = 1 << 19
"""The most lists, dicts and sets that a pickle makes."""
KEYS_SECONDS_MAX: Final = 2.0
"""The longest that the keys of a pickle that aren't text may take, of processor time: a million of them take 0.3 s."""

DIGITS_MAX: Final = 4_300
INT_BYTES_MAX: Final = 1_024
_STOP, _MEMOIZE, _SHORT_TEXT = ord("."), 0x94, 0x8C
_KEY_LENGTH_MAX = 64 * 1024
_KEY_NODES_MAX = 64
_KEYS_AT_ONCE = 256
_SHORT = 64  # text so short may be there any number of times: it is bounded by the instructions
_FEW = 64  # keys, which can't be slow whatever their hashes are
_SAME_HASH_MAX = 16
_NEAR = 1 << 60  # ints within it have a hash of their own
_LOOSE = frozenset((int, float, bool, type(None), datetime, date, Decimal))  # keys besides text and bytes
_CONTAINERS = frozenset((list, tuple, set, frozenset, dict))


class Refused(ValueError):
    """A pickle that isn't read: it is damaged, would cost too much, or holds more than plain data."""


class Name(NamedTuple):
    """What a pickle has named and may have made, with arguments that come later."""

    module: str
    name: str


class Reading:
    """One pickle under way: the stack, what lies below each mark, and what was memorised."""

    __slots__ = (
        "at", "bytes_copied", "containers", "data", "key_seconds", "looked", "members_copied", "memo", "outer",
        "shared", "stack",
    )  # fmt: skip

    def __init__(self, data: bytes) -> None:
        self.data: bytes = data
        self.at: int = 0
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.containers: int = 0
        self.bytes_copied: int = 0
        self.members_copied: int = 0
        self.key_seconds: float = 0.0  # of processor time, for keys that aren't text
        self.shared: bool = False  # whether the value may hold something long twice, or a name
        # By container: at how many keys their hashes are looked at again. It is kept, so that its id stays its own.
        self.looked: dict[int, tuple[int, object]] = {}

    def run(self, known: Mapping[int, Callable[[Reading], object]], refused: Mapping[int, str]) -> Any:
        """Follow the instructions to the end, and return what is on top then."""
        data, memo = self.data, self.memo
        for _ in range(STEPS_MAX):
            code = data[self.at]
            self.at += 1
            if code == _MEMOIZE:  # this and the next are most of a usual pickle, and quicker than a call
                memo[len(memo)] = self.stack[-1]
            elif code == _SHORT_TEXT:
                start = self.at + 1
                end = self.at = start + data[start - 1]
                self.stack.append(data[start:end].decode("utf-8", "surrogatepass"))
            elif (instruction := known.get(code)) is not None:
                instruction(self)
            elif code == _STOP:
                value = self.stack.pop()
                if self.shared:
                    _check_size(value)
                return value
            else:
                raise Refused(refused.get(code, f"damaged: {code:#04x} is no instruction"))
        raise Refused(f"too large: more than {STEPS_MAX:,} instructions")

    # -- bytes ---------------------------------------------------------------------------------------------------

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        start = self.at
        self.at = end = start + size
        if end > len(self.data) or size < 0:
            raise IndexError
        return self.data[start:end]

    def number(self, size: int) -> int:
        """Return the number that the next bytes are."""
        return int.from_bytes(self.take(size), "little")

    def signed(self, size: int) -> int:
        """Return the number, which may be below zero, that the next bytes are."""
        return int.from_bytes(self.take(size), "little", signed=True)

    def line(self) -> bytes:
        """Return the rest of the line."""
        start = self.at
        end = self.data.index(b"\n", start)
        self.at = end + 1
        return self.data[start:end]

    def digits(self) -> str:
        """Return the number that the rest of the line spells."""
        line = self.line()
        if len(line) > DIGITS_MAX:
            raise Refused("too large: a number of thousands of digits")
        return line.decode("ascii")

    # -- the stack -----------------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        """Put a value on top."""
        self.stack.append(value)

    def push_new(self, container: Any) -> None:
        """Put a container on top that wasn't there before."""
        self.containers += 1
        if self.containers > CONTAINERS_MAX:
            raise Refused(f"too large: more than {CONTAINERS_MAX:,} containers")
        self.stack.append(container)

    def mark(self) -> None:
        """Begin a run of values."""
        self.outer.append(self.stack)
        self.stack = []

    def unmark(self) -> list[Any]:
        """Return the values since the last mark."""
        values = self.stack
        self.stack = self.outer.pop()
        return values

    def last(self, count: int) -> tuple[Any, ...]:
        """Take the topmost values."""
        values = tuple(self.stack[-count:])
        if len(values) < count:
            raise IndexError
        del self.stack[-count:]
        return values

    def drop(self) -> None:
        """Drop the topmost value, or a run that is empty."""
        if self.stack:
            self.stack.pop()
        else:
            self.unmark()

    def share(self, value: Any) -> None:
        """Push a value that may be somewhere else already."""
        if not isinstance(value, str | bytes) or len(value) > _SHORT:
            self.shared = True
        self.stack.append(value)

    def remember(self, place: int) -> None:
        """Memorise the topmost value."""
        self.memo[place] = self.stack[-1]

    # -- containers ----------------------------------------------------------------------------------------------

    def holder(self, kind: type) -> Any:
        """Return the container on top, which has to be of this kind."""
        holder = self.stack[-1]
        if type(holder) is not kind:
            raise Refused(f"damaged: a {type(holder).__name__} where a {kind.__name__} has to be")
        return holder

    def set_items(self, pairs: Sequence[Any]) -> None:
        """Put keys and values into the dict on top."""
        holder: dict[Any, Any] = self.holder(dict)
        if len(pairs) % 2:
            raise Refused("damaged: a key without a value")
        keys, values = pairs[::2], pairs[1::2]
        self._add(holder, keys, lambda start, end: holder.update(zip(keys[start:end], values[start:end], strict=True)))

    def add_items(self, members: Sequence[Any]) -> None:
        """Put members into the set on top."""
        holder: set[Any] = self.holder(set)
        self._add(holder, members, lambda start, end: holder.update(members[start:end]))

    def push_frozen(self, members: Sequence[Any]) -> None:
        """Push a frozenset."""
        self.push_new(frozenset(self.new_set(members)))

    def new_set(self, members: Sequence[Any]) -> set[Any]:
        """Return a set."""
        self.members_copied += len(members)
        if self.members_copied > STEPS_MAX:
            raise Refused(f"too large: sets of more than {STEPS_MAX:,} members")
        made: set[Any] = set()
        self._add(made, members, lambda start, end: made.update(members[start:end]))
        return made

    def charge_bytes(self, count: int) -> None:
        """Refuse to copy more than the longest pickle has."""
        self.bytes_copied += count
        if self.bytes_copied > BYTES_MAX:
            raise Refused(f"too large: more than {BYTES_MAX:,} bytes are copied")

    def _add(self, holder: Collection[Any], keys: Sequence[Any], put: Callable[[int, int], object]) -> None:
        """Put keys into a container, a few at a time where their hashes could have been chosen."""
        if all(map(_is_text, keys)):
            put(0, len(keys))
            return
        if len(holder) + len(keys) <= _FEW and not any(type(key) in (tuple, frozenset) for key in keys):
            self._check_hashes(holder, keys)  # so few cost less than a look at the clock
            put(0, len(keys))
            return
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            since = thread_time()
            end = min(start + _KEYS_AT_ONCE, len(keys))
            self._check_hashes(holder, keys[start:end])
            put(start, end)
            self.key_seconds += thread_time() - since
            if self.key_seconds > KEYS_SECONDS_MAX:
                raise Refused(f"too costly: its keys take over {KEYS_SECONDS_MAX:.0f} s")

    def _check_hashes(self, holder: Collection[Any], keys: Sequence[Any]) -> None:
        """Refuse what can't be a key, or would be a slow one, beside those that a container has already."""
        loose = False
        for key in keys:
            if not _is_text(key) and (type(key) is not int or not -_NEAR < key < _NEAR):
                _check_key(key)
                loose = True
        count = len(holder) + len(keys)
        if not loose or count < self.looked.get(id(holder), (_FEW, None))[0]:
            return
        if max(Counter(map(hash, chain(holder, keys))).values()) > _SAME_HASH_MAX:
            raise Refused("too costly: many keys of one hash")
        self.looked[id(holder)] = 2 * count, holder


def _is_text(key: Any) -> bool:
    """Return whether a key is text or bytes, whose hashes nobody knows beforehand. Raises `Refused` for a long one."""
    kind = type(key)
    if kind is not str and kind is not bytes:
        return False
    if len(key) > _KEY_LENGTH_MAX:
        raise Refused(f"too large: a key of {len(key):,} characters")
    return True


def _check_key(key: Any) -> None:
    """Refuse a key that isn't plain, or whose hash takes long: a tuple could hold another a million times."""
    pending, count, length = [key], 0, 0
    while pending:
        member = pending.pop()
        kind = type(member)
        if kind is tuple or kind is frozenset:
            count += len(member)
            if count > _KEY_NODES_MAX:
                raise Refused(f"too large: a key of more than {_KEY_NODES_MAX} parts")
            pending.extend(member)
        elif kind is str or kind is bytes:
            length += len(member)
            if length > _KEY_LENGTH_MAX:
                raise Refused(f"too large: a key of over {_KEY_LENGTH_MAX:,} characters")
        elif kind not in _LOOSE:
            raise Refused(f"damaged: a {kind.__name__} as a key")


def _check_size(value: Any) -> None:
    """Refuse a value that is too large when all it holds more than once is written out, or that holds a name."""
    pending, count, length = [value], 1, 0
    while pending:
        member = pending.pop()
        kind = type(member)
        if kind is list or kind is tuple or kind is set or kind is frozenset:
            count += len(member)
        elif kind is dict:
            count += 2 * len(member)
        elif kind is str or kind is bytes or kind is bytearray:
            length += len(member)
        elif kind is int or kind is Decimal:
            length += getsizeof(member)  # a number of any length may be there any number of times
        elif kind is Name:
            raise named(member)
        if count > STEPS_MAX or length > BYTES_MAX:
            raise Refused("too large: it holds the same things over and over, or itself")
        if kind is dict:
            pending.extend(member.values())
        if kind in _CONTAINERS:
            pending.extend(member)


def named(name: Name) -> Refused:
    """Return what says that a pickle names something that isn't plain data."""
    return Refused(f"it names {name.module}.{name.name}")
