"""Services: what a host function is, and the two that every guest has.

Rules:
  1. A function is named and typed by `abi.FUNCTIONS` alone; here is its body.
  2. A body gets pointers and lengths as unsigned numbers. It checks every place it will touch before it does anything.
  3. A text goes into or out of a guest whole: what is too long is shortened where it is kept, by whole characters.

Doesn't know: wasmtime, stores, which guest it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from persistency.plugins import abi
from persistency.plugins.context import TEXT_BYTES_MAX, CallContext
from persistency.plugins.guestmemory import GuestMemory

SLICE_S: Final = 0.05  # a body that waits looks again at the deadline after so long: it may have been moved


class HostFunction(NamedTuple):
    """A function a guest may import: where and how it's named, its parameters (letters of the ABI) and its body.

    `body(memory, call, *arguments)` gives what the guest gets. It may raise `Fault`.
    """

    module: str
    name: str
    parameters: str
    body: Callable[..., int]


SIGNATURES = {signature.name: signature for signature in abi.FUNCTIONS}


def host_function(name: str, body: Callable[..., int]) -> HostFunction:
    """Return the function of that name in the ABI, with its body."""
    return HostFunction(abi.MODULE, name, SIGNATURES[name].parameters, body)


def everybody() -> list[HostFunction]:
    """Return the functions that need no permission."""
    return [host_function("last_error", last_error), host_function("fail", fail)]


def last_error(memory: GuestMemory, call: CallContext, at: int, room: int) -> int:
    """Write why the last host function that failed did so, if it fits; return the length of that text in bytes."""
    return written(memory, at, room, shortened(call.last_error))


def fail(memory: GuestMemory, call: CallContext, at: int, size: int) -> int:
    """Keep what the guest says it fails with; the last word counts."""
    memory.check(at, size)
    said = memory.read(at, min(size, TEXT_BYTES_MAX + 4))  # so that a character is cut in two behind the limit, if ever
    call.failure = shortened(said.decode(errors="replace")).decode()
    return 0


def written(memory: GuestMemory, at: int, room: int, data: bytes) -> int:
    """Write an answer if it fits into the room; return its length, which tells the guest whether it did."""
    memory.check(at, room)
    if len(data) <= room:
        memory.write(at, data)
    return len(data)


def printable(text: str) -> str:
    """Return a guest's text as one that can't be taken for anything else in a log, or move a terminal's cursor."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each == "\t" else each.encode("unicode_escape").decode() for each in text
    )


def shortened(text: str) -> bytes:
    """Return a text in UTF-8, as much of it as a guest may be told or may say."""
    data = text.encode(errors="replace")
    return data if len(data) <= TEXT_BYTES_MAX else data[:TEXT_BYTES_MAX].decode(errors="ignore").encode()
