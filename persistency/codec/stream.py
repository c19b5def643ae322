"""Streams: the items of a CBOR sequence (RFC 8742), read one at a time from whatever has a `read`.

Rules:
  1. What a length claims is never believed: bytes are kept as they come, and no item may grow over the caller's bound.
  2. Definite lengths only. The typed reads take one kind of item, without tags and nothing nested; `value` takes any,
     and `codec.values` decodes it, with all its defences.
  3. What isn't as expected raises `Corrupt`, with the place in the stream; what `read` raises is left as it is.
  4. A stream may give fewer bytes than it was asked for. It has ended when it gives none, and isn't asked again.

Doesn't know: what the items mean, files, jobs.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from typing import Any

from persistency.codec.values import decode
from persistency.errors import Corrupt, Misuse, Unavailable

NUMBER, BYTES, TEXT, ARRAY, MAP, TAG = 0, 2, 3, 4, 5, 6
"""Major types of CBOR: what kind of item it is."""
READ_BYTES_MIN = 64 * 1024
READ_BYTES_MAX = 1024 * 1024
"""How much of the stream is asked for at once."""

_NAMES = ("a number", "a negative number", "bytes", "a text", "an array", "a map", "a tag", "a simple value")
_NULL = b"\xf6"
_HINT = "It is damaged, or wasn't written to its end: get it anew from where it was written."
_SHORT_MAX, _SIZED_MAX, _INDEFINITE = 23, 27, 31  # of the five bits beside the kind


def head(kind: int, number: int) -> bytes:
    """Return the head of an item, as short as can be: its kind, and its value or the length of what follows it."""
    if number <= _SHORT_MAX:
        return bytes((kind << 5 | number,))
    power = ((number.bit_length() + 7) // 8 - 1).bit_length()  # of two: one, two, four or eight bytes
    return bytes((kind << 5 | _SHORT_MAX + 1 + power,)) + number.to_bytes(1 << power, "big")


class Items:
    """A stream of items, of which `read(n)` gives up to n bytes, and none at the end."""

    def __init__(self, read: Callable[[int], Any]) -> None:
        self._read = read
        self._data = b""
        self._at = 0
        self._before = 0  # bytes of the stream that came before `_data`
        self._ended = False
        self._sum = sha256()
        self._summed = 0  # bytes of `_data` that are in the sum

    def sha256(self) -> bytes:
        """Return the SHA-256 of everything that was taken."""
        self._sum.update(self._data[self._summed : self._at])
        self._summed = self._at
        return self._sum.digest()

    def at_end(self) -> bool:
        """Say whether nothing follows; waits until the stream says so."""
        return self._at == len(self._data) and not self._fill(READ_BYTES_MIN)

    def kind(self) -> int:
        """Return the kind of the next item. Raises `Corrupt` if there is none."""
        if self.at_end():
            raise self._broken_off()
        return self._data[self._at] >> 5

    def array(self) -> int:
        """Take the head of an array and return its length: as many items follow."""
        return self._head_of(ARRAY)

    def text(self, bytes_max: int) -> str:
        """Take a text of up to so many bytes of UTF-8."""
        try:
            return self._string(TEXT, bytes_max).decode()
        except UnicodeDecodeError as error:
            raise self.wrong(f"a text that isn't UTF-8: {error.reason}") from error

    def data(self, bytes_max: int) -> bytes:
        """Take a string of up to so many bytes."""
        return self._string(BYTES, bytes_max)

    def number_or_none(self) -> int | None:
        """Take a number that isn't negative, or null."""
        kind, number, raw = self._head()
        if kind != NUMBER and raw != _NULL:
            raise self.wrong(f"{_NAMES[kind]} instead of a number or null")
        return number if kind == NUMBER else None

    def value(self, bytes_max: int) -> Any:
        """Take any one item of up to so many bytes."""
        taken = bytearray()
        missing = 1
        while missing:
            kind, number, raw = self._head()
            taken += raw
            missing -= 1
            contents = number if kind in (BYTES, TEXT) else 0
            members = {ARRAY: number, MAP: 2 * number, TAG: 1}.get(kind, 0)
            missing += members
            # Each member has a byte at least.
            if len(taken) + contents + missing > bytes_max:
                raise self.wrong(f"an item of more than {bytes_max} bytes")
            taken += self._take(contents)
        return decode(bytes(taken))

    def wrong(self, what: str) -> Corrupt:
        """Return the error that says what was found, and where."""
        return Corrupt(f"before byte {self._before + self._at} of the stream there is {what}", hint=_HINT)

    # -- heads and bytes -----------------------------------------------------------------------------------------

    def _head(self) -> tuple[int, int, bytes]:
        """Take a head; return the kind, the number, and its bytes."""
        raw = self._take(1)
        kind, low = raw[0] >> 5, raw[0] & 31
        if low <= _SHORT_MAX:
            return kind, low, raw
        if low > _SIZED_MAX:
            raise self.wrong("an indefinite length" if low == _INDEFINITE else "a head that CBOR doesn't have")
        number = self._take(1 << (low - _SHORT_MAX - 1))
        return kind, int.from_bytes(number, "big"), raw + number

    def _head_of(self, wanted: int) -> int:
        kind, number, _ = self._head()
        if kind != wanted:
            raise self.wrong(f"{_NAMES[kind]} instead of {_NAMES[wanted]}")
        return number

    def _string(self, kind: int, bytes_max: int) -> bytes:
        length = self._head_of(kind)
        if length > bytes_max:
            raise self.wrong(f"the head of {_NAMES[kind]} of {length} bytes, at most {bytes_max} are allowed")
        return self._take(length)

    def _take(self, count: int) -> bytes:
        at, end = self._at, self._at + count
        if end <= len(self._data):
            self._at = end
            return self._data[at:end]
        taken = bytearray(self._data[at:])
        self._at = len(self._data)
        while (missing := count - len(taken)) > 0:
            if not self._fill(min(max(missing, READ_BYTES_MIN), READ_BYTES_MAX)):
                raise self._broken_off()
            taken += self._data[:missing]
            self._at = min(missing, len(self._data))
        return bytes(taken)

    def _fill(self, count: int) -> bool:
        """Read on, once everything was taken; return whether there was something."""
        self.sha256()
        data = b"" if self._ended else self._read(count)
        if not isinstance(data, bytes):
            data = _as_bytes(data)
        self._before += len(self._data)
        self._data, self._at, self._summed = data, 0, 0
        self._ended = not data
        return not self._ended

    def _broken_off(self) -> Corrupt:
        return Corrupt(f"the stream breaks off after byte {self._before + self._at}", hint=_HINT)


def _as_bytes(data: Any) -> bytes:
    """Return what a `read` has given as bytes."""
    if data is None:
        raise Unavailable("the stream has nothing to read just now", hint="Pass a file that waits (a blocking one).")
    try:
        with memoryview(data) as view:
            return bytes(view)
    except TypeError as error:
        raise Misuse(f"read() gave {type(data).__name__}: pass a file opened for reading bytes") from error
