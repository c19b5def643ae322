"""The kvstore service: what a guest's `kv_` functions do, over the `KVStore` that is its plugin's own.

Rules:
  1. Every place in the guest's memory is checked before anything else; then what stands there, before the store is
     asked. A call that has no time left asks it nothing.
  2. Lengths are judged before bytes are copied: a guest can't have its host copy what could never be stored, found or
     given back. What a function reads is at most the values it is asked for, each once: no more than the quota.
  3. A prefix that was granted is a restriction: what doesn't begin with it is denied, and never cut to fit or hidden.
  4. Whatever goes wrong is a number, and a text for `last_error`. Waiting ends with the call; a write that was on its
     way by then may still be done.

Doesn't know: wasmtime, threads, who the guest is, how a store keeps its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from persistency import Closed, Misuse, PersistencyError, QuotaExceeded, Reply
from persistency.kvstore import KVStore
from persistency.plugins import abi
from persistency.plugins.context import CallContext
from persistency.plugins.guestmemory import GuestMemory
from persistency.plugins.manifest import KVGrant
from persistency.plugins.services import SLICE_S, HostFunction, host_function, written

T = TypeVar("T")

SERVICE = "kvstore"
VALUE_BYTES_MAX = 256 * 1024 * 1024  # as the engine has it
_HEAD_BYTES = 4  # before each entry of a list
_NUMBERS: tuple[tuple[type[BaseException], int], ...] = (
    (QuotaExceeded, abi.QUOTA),
    (Misuse, abi.INVALID),
    (Closed, abi.CLOSED),
    (TimeoutError, abi.TIMEOUT),
    (PersistencyError, abi.STORAGE),
)


def functions(store: KVStore, grant: KVGrant) -> list[HostFunction]:
    """Return the functions a plugin with this grant may import; what writes isn't among them if it is read-only."""
    service = _Service(store, grant)
    return [
        host_function(signature.name, _numbered(getattr(service, signature.name)))
        for signature in abi.FUNCTIONS
        if signature.service == SERVICE and not (signature.writes and grant.read_only)
    ]


class _Refused(Exception):
    """What a guest gets instead of an answer: a number, and a text about it."""

    def __init__(self, number: int, text: str) -> None:
        super().__init__(text)
        self.number: int = number


def _numbered(body: Callable[..., int]) -> Callable[..., int]:
    """Return a body that answers with numbers for the errors that are foreseen."""

    def numbered(memory: GuestMemory, call: CallContext, *arguments: int) -> int:
        try:
            return body(memory, call, *arguments)
        except _Refused as refused:
            call.last_error = str(refused)
            return refused.number
        except (PersistencyError, TimeoutError) as error:
            call.last_error = str(error)
            return next(number for kind, number in _NUMBERS if isinstance(error, kind))

    return numbered


def _answer(call: CallContext, ask: Callable[[], Reply[T]]) -> T:
    """Ask the store and return its answer; `TimeoutError` if there is none before the end of the call."""
    if not call.remaining():
        raise TimeoutError("the call is over")
    reply = ask()
    while True:
        try:
            # In slices, because the end of the call may be moved to an earlier time.
            return reply.result(min(call.remaining(), SLICE_S))
        except TimeoutError:
            if reply.done():
                return reply.result()
            if not call.remaining():
                reply.cancel()
                raise TimeoutError("the store gave no answer before the end of the call") from None


class _Service:
    """The bodies of one plugin's functions; places are pairs of a pointer and a length."""

    def __init__(self, store: KVStore, grant: KVGrant) -> None:
        self._store = store
        self._grant = grant

    # -- writes --------------------------------------------------------------------------------------------------

    def kv_set(self, memory: GuestMemory, call: CallContext, at: int, size: int, value_at: int, value_size: int) -> int:
        memory.check(value_at, value_size)
        key = self._key(memory, at, size)
        value = self._value(memory, call, value_at, value_size)
        _answer(call, lambda: self._store.set(key, value))
        return 0

    def kv_set_with_ttl(
        self, memory: GuestMemory, call: CallContext, at: int, size: int, value_at: int, value_size: int, ttl_ms: int
    ) -> int:
        memory.check(value_at, value_size)
        key = self._key(memory, at, size)
        if ttl_ms <= 0:
            raise _Refused(abi.INVALID, f"the time to live must be more than 0 milliseconds, not {ttl_ms}")
        value = self._value(memory, call, value_at, value_size)
        _answer(call, lambda: self._store.set_with_ttl(key, value, ttl_ms / 1000))
        return 0

    def kv_delete(self, memory: GuestMemory, call: CallContext, at: int, size: int) -> int:
        key = self._key(memory, at, size)
        return int(_answer(call, lambda: self._store.delete(key)))

    def kv_delete_by_prefix(self, memory: GuestMemory, call: CallContext, at: int, size: int) -> int:
        prefix = self._key(memory, at, size, "prefix")
        return _answer(call, lambda: self._store.delete_by_prefix(prefix))

    def kv_compare_and_set(
        self,
        memory: GuestMemory,
        call: CallContext,
        at: int,
        size: int,
        old_at: int,
        old_size: int,
        new_at: int,
        new_size: int,
    ) -> int:
        for value_at, value_size in ((old_at, old_size), (new_at, new_size)):
            if value_size != abi.ABSENT:
                memory.check(value_at, value_size)
        key = self._key(memory, at, size)
        new = None if new_size == abi.ABSENT else self._value(memory, call, new_at, new_size)
        if old_size == abi.ABSENT:
            expected = None
        elif self._may_be_there(call, old_size):
            expected = memory.read(old_at, old_size)
        else:
            return 0
        return int(_answer(call, lambda: self._store.compare_and_set(key, expected, new)))

    # -- reads ---------------------------------------------------------------------------------------------------

    def kv_get(self, memory: GuestMemory, call: CallContext, at: int, size: int, room_at: int, room: int) -> int:
        memory.check(room_at, room)
        key = self._key(memory, at, size)
        value = _answer(call, lambda: self._store.get(key))
        if value is None:
            raise _Refused(abi.NOT_FOUND, f"there is no key {key!r:.80}")
        return written(memory, room_at, room, value)

    def kv_get_many(self, memory: GuestMemory, call: CallContext, at: int, size: int, room_at: int, room: int) -> int:
        memory.check(room_at, room)
        keys = self._keys(memory, at, size)
        found = _answer(call, lambda: self._store.get_many(keys))
        values = [found.get(key) for key in keys]
        length = sum(_HEAD_BYTES + len(value or b"") for value in values)
        if length <= room:  # one by one: the whole would be there twice, and values that are asked for twice are one
            for value in values:
                memory.write(room_at, abi.packed(value))
                room_at += _HEAD_BYTES + len(value or b"")
        return length

    def kv_has(self, memory: GuestMemory, call: CallContext, at: int, size: int) -> int:
        key = self._key(memory, at, size)
        return int(_answer(call, lambda: self._store.has(key)))

    def kv_list(
        self,
        memory: GuestMemory,
        call: CallContext,
        at: int,
        size: int,
        after_at: int,
        after_size: int,
        room_at: int,
        room: int,
    ) -> int:
        memory.check(after_at, after_size)
        memory.check(room_at, room)
        prefix = self._permitted(self._text(memory, at, size, "prefix"), "prefix")
        after = self._text(memory, after_at, after_size, "key to go on after") or None
        # No key is shorter than the prefix, or than one byte: more of them can't fit.
        limit = min(abi.KEYS_PER_CALL_MAX, max(1, room // (_HEAD_BYTES + max(1, size))))
        keys = _answer(call, lambda: self._store.list(prefix, after=after, limit=limit))
        page = b""
        for key in keys:
            entry = abi.packed(key.encode())
            if len(page) + len(entry) > room:
                if not page:
                    raise _Refused(abi.TOO_SMALL, f"the first key takes {len(entry)} bytes, the room has {room}")
                break
            page += entry
        return written(memory, room_at, room, page)

    def kv_storage_used(self, _memory: GuestMemory, call: CallContext) -> int:
        return _answer(call, self._store.storage_used)

    # -- what stands in the guest's memory -----------------------------------------------------------------------

    def _value(self, memory: GuestMemory, call: CallContext, at: int, size: int) -> bytes:
        if not self._may_be_there(call, size):
            limit = self._grant.max_bytes
            raise _Refused(abi.QUOTA, f"storage limit exceeded: the value alone has {size} of {limit} bytes allowed")
        return memory.read(at, size)

    def _may_be_there(self, call: CallContext, size: int) -> bool:
        """Say whether the store may have, or get, a value of that length.

        A store whose quota was lowered may hold more than it: there a value may be replaced by one that is no longer.
        """
        if size > VALUE_BYTES_MAX:
            raise _Refused(abi.INVALID, f"the value has {size} bytes, at most {VALUE_BYTES_MAX} are allowed")
        return size <= self._grant.max_bytes or size <= _answer(call, self._store.storage_used)

    def _key(self, memory: GuestMemory, at: int, size: int, what: str = "key") -> str:
        memory.check(at, size)
        if not size:
            raise _Refused(abi.INVALID, f"the {what} is empty")
        return self._permitted(self._text(memory, at, size, what), what)

    def _keys(self, memory: GuestMemory, at: int, size: int) -> list[str]:
        memory.check(at, size)
        most = abi.KEYS_PER_CALL_MAX * (_HEAD_BYTES + self._grant.max_key_bytes)
        if size > most:
            raise _Refused(abi.INVALID, f"the list of keys has {size} bytes, at most {most} can be right")
        try:
            parts = abi.unpack(memory.read(at, size))
        except abi.Malformed as error:
            raise _Refused(abi.INVALID, str(error)) from error
        texts = []
        for part in parts:
            self._check_size(len(part), "key")
            texts.append(self._permitted(_decoded(part, "key"), "key"))
        return texts

    def _text(self, memory: GuestMemory, at: int, size: int, what: str) -> str:
        memory.check(at, size)
        self._check_size(size, what)
        return _decoded(memory.read(at, size), what)

    def _check_size(self, size: int, what: str) -> None:
        if size > self._grant.max_key_bytes:
            raise _Refused(abi.INVALID, f"the {what} has {size} bytes, at most {self._grant.max_key_bytes} are allowed")

    def _permitted(self, text: str, what: str) -> str:
        if not text.startswith(self._grant.prefix):
            raise _Refused(
                abi.DENIED, f"the {what} {text!r:.80} doesn't begin with {self._grant.prefix!r}, which was granted"
            )
        return text


def _decoded(data: bytes, what: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise _Refused(abi.INVALID, f"the {what} is no UTF-8, from byte {error.start} on") from error
