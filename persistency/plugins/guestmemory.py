"""A guest's memory, as its host functions may touch it: read and written within its bounds, and nowhere else.

Rules:
  1. A place is checked against the memory as it is at that moment, and only then touched: memories grow, and move.
  2. What is read is a copy: a guest can't change it afterwards.
  3. A place of no bytes has to be within the memory too, or right behind its last byte.

Doesn't know: what the bytes mean, who asks for them.
"""

from __future__ import annotations

import ctypes
from typing import Final

from wasmtime import Caller, Memory, Store

_COPY_BYTES_MAX = 2**30  # `ctypes.string_at` takes no length beyond an int's


class Fault(Exception):
    """A pointer or a length that reaches outside of the guest's memory."""


class GuestMemory:
    """The memory of one guest, as long as `store` is valid: a `Store`, or the `Caller` of a host function."""

    __slots__ = ("_memory", "_store")

    def __init__(self, store: Store | Caller, memory: Memory) -> None:
        self._store: Final = store
        self._memory: Final = memory

    def check(self, at: int, size: int) -> None:
        """Raise `Fault` unless all the bytes from `at` to `at + size` are the guest's."""
        length = self._memory.data_len(self._store)
        if at < 0 or size < 0 or at + size > length:
            raise Fault(f"{size} bytes at {at} reach outside of the guest's memory, which has {length} bytes")

    def read(self, at: int, size: int) -> bytes:
        """Return a copy of the bytes from `at` to `at + size`; `Fault` if they aren't all the guest's."""
        self.check(at, size)
        if not size:
            return b""
        begin = self._address() + at
        if size <= _COPY_BYTES_MAX:
            return ctypes.string_at(begin, size)
        places = range(0, size, _COPY_BYTES_MAX)
        return b"".join(ctypes.string_at(begin + place, min(_COPY_BYTES_MAX, size - place)) for place in places)

    def write(self, at: int, data: bytes) -> None:
        """Put bytes there; `Fault` if there is no room for all of them, and then nothing is written."""
        self.check(at, len(data))
        if data:
            ctypes.memmove(self._address() + at, data, len(data))

    def _address(self) -> int:
        # `Memory.read` and `Memory.write` would make a type, which is garbage, for every size they meet.
        return ctypes.addressof(self._memory.data_ptr(self._store).contents)
