"""The kvstore service: what a guest's `kv_` functions do, over the `KVStore` that is its plugin's own.

Rules:
  1. Every place in the guest's memory is checked before anything else; then what stands there, before the store is
     asked. A call that has no time left asks it nothing.
  2. Lengths are judged before bytes are copied: a guest can't have its host copy what could never be stored, found or
     given back. What a function reads is at most the values it is asked for, each once: no more than the quota.
  3. A prefix that was granted is a restriction: what doesn't begin with it is denied, and never cut to fit or hidden.
  4. Whatever goes wrong is a number, and a text for `last_error`. Waiting ends with the call; a write that was on its
     way by then may still be done.
  5. A key is created in a transaction that knows of room for it: a plugin never has more keys than it was granted, and
     none is refused while it has fewer.

Doesn't know: wasmtime, threads, who the guest is, how a store keeps its rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

from persistency import Closed, KeyRange, Misuse, PersistencyError, QuotaExceeded, Reply, Transaction, key
from persistency.arguments import as_ttl_ms
from persistency.kvstore import KVStore
from persistency.plugins import abi
from persistency.plugins.context import CallContext
from persistency.plugins.guestmemory import GuestMemory
from persistency.plugins.manifest import KVGrant
from persistency.plugins.services import SLICE_S, HostFunction, host_function, written

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

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


class _Writes:
    """The writes of one plugin, each a transaction, with a limit on how many keys there are. Any thread.

    Keys are counted only where there may be too many. Each operation of a job takes a version and creates one key at
    most: the number of keys less the version, the `lead`, never grows, whoever writes. So at version `v` there are at
    most `lead + v` keys, for any lead there ever was; the least that is known is the closest. One that a transaction
    has found is known when that is committed.
    """

    def __init__(self, store: KVStore, keys_max: int) -> None:
        self._store = store
        self._category = store.category
        self._keys_max = keys_max
        self._lead: int | None = None  # nothing was counted yet

    def set(self, call: CallContext, text: str, value: bytes, ttl_s: float | None = None) -> int:
        """Store a value; it ends so many seconds from now, or doesn't."""
        # From now, and not from when it is this transaction's turn.
        end_ms = None if ttl_s is None else self._store.job._now_ms() + as_ttl_ms(ttl_s)
        return self._run(call, self._put, text, value, end_ms)

    def swap(self, call: CallContext, text: str, expected: bytes | None, new: bytes | None) -> int:
        """Put one value in the place of another, `None` for none, if that is there; say whether it was."""
        return self._run(call, self._swap, text, expected, new)

    def delete(self, call: CallContext, text: str) -> int:
        """Remove a key; say how many that were."""
        return self._run(call, self._delete, text)

    def delete_by_prefix(self, call: CallContext, prefix: str) -> int:
        """Remove the keys that begin with a prefix; say how many that were."""
        return self._run(call, self._delete_range, KeyRange.text_prefix((), prefix))

    def _run(
        self, call: CallContext, write: Callable[[Transaction, *Ts], tuple[int, int | None]], *arguments: *Ts
    ) -> int:
        answer, lead = _answer(call, lambda: self._store.job.run(write, *arguments))
        if lead is not None and (self._lead is None or lead < self._lead):
            self._lead = lead
        return answer

    # -- within a transaction: the answer, and the lead it leaves ------------------------------------------------

    def _put(self, tx: Transaction, text: str, value: bytes, end_ms: int | None) -> tuple[int, int | None]:
        at = key(text)
        keys = self._keys(tx, creates=not tx.exists(self._category, at))
        ttl_s = None if end_ms is None else max(1, end_ms - tx.now_ms) / 1000
        tx.put(self._category, at, value, ttl=ttl_s)
        return _left(tx, 0, keys)

    def _swap(self, tx: Transaction, text: str, expected: bytes | None, new: bytes | None) -> tuple[int, int | None]:
        at = key(text)
        creates = expected is None and new is not None and not tx.exists(self._category, at)
        keys = self._keys(tx, creates=creates)
        done = tx.compare_and_set(self._category, at, expected, new)
        return _left(tx, int(done), keys, removed=int(done and expected is not None and new is None))

    def _delete(self, tx: Transaction, text: str) -> tuple[int, int | None]:
        keys = self._keys(tx)
        removed = int(tx.delete_acked(self._category, key(text)))
        return _left(tx, removed, keys, removed)

    def _delete_range(self, tx: Transaction, span: KeyRange) -> tuple[int, int | None]:
        keys = self._keys(tx)
        removed = tx.delete_range_acked(self._category, span)
        return _left(tx, removed, keys, removed)

    def _keys(self, tx: Transaction, *, creates: bool = False) -> int | None:
        """Return how many keys there are at most, with one that is about to be created, if there is room for it."""
        keys = None if self._lead is None else self._lead + tx.version()
        if not creates:
            return keys
        if keys is None or keys >= self._keys_max:
            keys = tx.count(self._category)
            if keys >= self._keys_max:
                text = f"key limit exceeded: there are {keys} keys already, at most {self._keys_max} are allowed"
                raise _Refused(abi.QUOTA, text)
        return keys + 1


def _left(tx: Transaction, answer: int, keys: int | None, removed: int = 0) -> tuple[int, int | None]:
    return answer, None if keys is None else keys - removed - tx.version()


class _Service:
    """The bodies of one plugin's functions; places are pairs of a pointer and a length."""

    def __init__(self, store: KVStore, grant: KVGrant) -> None:
        self._store = store
        self._grant = grant
        self._writes = _Writes(store, grant.max_keys)

    # -- writes --------------------------------------------------------------------------------------------------

    def kv_set(self, memory: GuestMemory, call: CallContext, at: int, size: int, value_at: int, value_size: int) -> int:
        memory.check(value_at, value_size)
        text = self._key(memory, at, size)
        value = self._value(memory, call, value_at, value_size)
        return self._writes.set(call, text, value)

    def kv_set_with_ttl(
        self, memory: GuestMemory, call: CallContext, at: int, size: int, value_at: int, value_size: int, ttl_ms: int
    ) -> int:
        memory.check(value_at, value_size)
        text = self._key(memory, at, size)
        if ttl_ms <= 0:
            raise _Refused(abi.INVALID, f"the time to live must be more than 0 milliseconds, not {ttl_ms}")
        value = self._value(memory, call, value_at, value_size)
        return self._writes.set(call, text, value, ttl_ms / 1000)

    def kv_delete(self, memory: GuestMemory, call: CallContext, at: int, size: int) -> int:
        text = self._key(memory, at, size)
        return self._writes.delete(call, text)

    def kv_delete_by_prefix(self, memory: GuestMemory, call: CallContext, at: int, size: int) -> int:
        prefix = self._key(memory, at, size, "prefix")
        return self._writes.delete_by_prefix(call, prefix)

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
        text = self._key(memory, at, size)
        new = None if new_size == abi.ABSENT else self._value(memory, call, new_at, new_size)
        if old_size == abi.ABSENT:
            expected = None
        elif self._may_be_there(call, old_size):
            expected = memory.read(old_at, old_size)
        else:
            return 0
        return self._writes.swap(call, text, expected, new)

    # -- reads ---------------------------------------------------------------------------------------------------

    def kv_get(self, memory: GuestMemory, call: CallContext, at: int, size: int, room_at: int, room: int) -> int:
        memory.check(room_at, room)
        text = self._key(memory, at, size)
        value = _answer(call, lambda: self._store.get(text))
        if value is None:
            raise _Refused(abi.NOT_FOUND, f"there is no key {text!r:.80}")
        return written(memory, room_at, room, value)

    def kv_get_many(self, memory: GuestMemory, call: CallContext, at: int, size: int, room_at: int, room: int) -> int:
        memory.check(room_at, room)
        keys = self._keys(memory, at, size)
        found = _answer(call, lambda: self._store.get_many(keys))
        values = [found.get(each) for each in keys]
        length = sum(_HEAD_BYTES + len(value or b"") for value in values)
        if length <= room:  # one by one: the whole would be there twice, and values that are asked for twice are one
            for value in values:
                memory.write(room_at, abi.packed(value))
                room_at += _HEAD_BYTES + len(value or b"")
        return length

    def kv_has(self, memory: GuestMemory, call: CallContext, at: int, size: int) -> int:
        text = self._key(memory, at, size)
        return int(_answer(call, lambda: self._store.has(text)))

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
        for each in keys:
            entry = abi.packed(each.encode())
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
