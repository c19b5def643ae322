"""The ABI: what a plugin and its host may say to each other, in words that have the same meaning in every language.

A guest is a core WebAssembly module. Numbers are little-endian. Whoever changes something here makes another version of
the ABI: the guests that are there were built for this one.

Rules:
  1. Every host function returns an i64: 0 or more is its answer, less than 0 an error number.
  2. Pointers and lengths are i32s and count as unsigned; they are checked before anything is read or written.
  3. What doesn't fit is told and not cut off: an answer that is longer than its room isn't written at all.

Doesn't know: wasmtime, stores, who calls.
"""

from __future__ import annotations

from typing import Final, NamedTuple

MODULE: Final = "persistency"  # what a guest imports its functions from

# -- what a host function returns ----------------------------------------------------------------------------------

NOT_FOUND: Final = -1  # there is no such key
TOO_SMALL: Final = -2  # the room isn't enough even for the first key of a page
QUOTA: Final = -3  # it would take the plugin over its quota, of bytes or of keys; nothing has changed
INVALID: Final = -4  # a key, a prefix, a time to live that isn't allowed
CLOSED: Final = -5  # the store is closed: the plugin is being unloaded
STORAGE: Final = -6  # the disk, the file, or the host itself failed
FAULT: Final = -7  # a pointer or length outside the guest's memory
DENIED: Final = -8  # the key or prefix isn't within the prefix that was granted
TIMEOUT: Final = -9  # no answer before the end of the call

ABSENT: Final = 0xFFFF_FFFF  # as a length: no value at all, where an empty one would have length 0

# -- what a guest's function returns, besides (pointer << 32) | length ------------------------------------------------

FAILED: Final = -1  # what went wrong was said with `fail`, or nothing was
NOT_IMPLEMENTED: Final = -2

# -- what a guest exports -------------------------------------------------------------------------------------------

MEMORY: Final = "memory"
ALLOC: Final = "alloc"  # (length: i32) -> pointer: i32, or 0 where there is no room; called only for arguments
INITIALIZE: Final = "_initialize"  # () -> (), called once, before anything else
RESERVED: Final = frozenset((MEMORY, ALLOC, INITIALIZE, "_start"))


class Signature(NamedTuple):
    """A host function: its parameters, one letter each (`p`ointer, `n`: a length, `l`: an i64), and what it's part of.

    `writes`: a store that is read-only doesn't have it.
    """

    name: str
    parameters: str
    service: str | None = None  # the permission that grants it; None: everybody has it
    writes: bool = False


FUNCTIONS: Final = (
    Signature("last_error", "pn"),  # room -> the length of the text of the last error of this call
    Signature("fail", "pn"),  # text -> 0; what the function that is called is about to fail with
    Signature("kv_set", "pnpn", "kvstore", writes=True),  # key, value -> 0
    Signature("kv_set_with_ttl", "pnpnl", "kvstore", writes=True),  # key, value, milliseconds -> 0
    Signature("kv_get", "pnpn", "kvstore"),  # key, room -> the value's length; it is written if it fits
    Signature("kv_get_many", "pnpn", "kvstore"),  # keys, room -> the answer's length; it is written if it fits
    Signature("kv_has", "pn", "kvstore"),  # key -> 1 or 0
    Signature("kv_list", "pnpnpn", "kvstore"),  # prefix, after, room -> bytes written; 0: there is no more
    Signature("kv_delete", "pn", "kvstore", writes=True),  # key -> 1 if it was there, else 0
    Signature("kv_delete_by_prefix", "pn", "kvstore", writes=True),  # prefix -> how many were there
    Signature("kv_storage_used", "", "kvstore"),  # -> bytes
    # key, what must be there, what then is -> 1 or 0; each of the two may have the length ABSENT
    Signature("kv_compare_and_set", "pnpnpn", "kvstore", writes=True),
)

# -- lists -----------------------------------------------------------------------------------------------------------
#
# A list of keys or values is, for each, its length (4 bytes) and its bytes. `kv_get_many` answers with one entry for
# each key asked, in that order, with the length ABSENT, and no bytes, for one that isn't there.

KEYS_PER_CALL_MAX: Final = 1_000  # of `kv_get_many`, and of a page of `kv_list`


class Malformed(ValueError):
    """A list that isn't one."""


def unpack(data: bytes) -> list[bytes]:
    """Return the parts of a list; raise `Malformed` if it ends in the middle of one, or has too many."""
    parts: list[bytes] = []
    at = 0
    while at < len(data):
        if len(parts) == KEYS_PER_CALL_MAX:
            raise Malformed(f"the list has over {KEYS_PER_CALL_MAX} entries")
        begin = at + 4
        at = begin + int.from_bytes(data[at:begin], "little")
        if begin > len(data) or at > len(data):
            raise Malformed(f"the list ends in the middle of entry {len(parts)}")
        parts.append(data[begin:at])
    return parts


def packed(part: bytes | None) -> bytes:
    """Return one entry of a list; `None`: the one of something that isn't there."""
    return ABSENT.to_bytes(4, "little") if part is None else len(part).to_bytes(4, "little") + part
