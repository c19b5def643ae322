"""Messages: what a caller's arguments become on their way to the store, and what its answers become on their way back.

`Job` posts these messages, `Transaction` has them run at once; both speak with one voice through this module.

Rules:
  1. What is wrong raises `Misuse` here, in the caller's thread, before anything is posted.
  2. A TTL is stamped here: it counts from the call.
  3. A message can be turned back into the operations it was made of, for whoever has to be told that it failed.

Doesn't know: mailboxes, threads, SQL.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from persistency.arguments import (
    CATEGORIES,
    as_bounds,
    as_category,
    as_count,
    as_doomed_prefix,
    as_doomed_range,
    as_end,
    as_flag,
    as_key_bytes,
    as_keys,
    as_limit,
    as_payload,
    as_prefix_range,
    as_swapped,
    as_ttl_ms,
)
from persistency.codec.keys import KEY_BYTES_MAX, Key, KeyRange, as_key
from persistency.errors import Corrupt, Misuse
from persistency.ops import Change, Check, Delete, DeletePrefix, DeleteRange, Entry, KeyLike, Op, Payload, Put, Row, Ttl
from persistency.storage.port import (
    PLACES,
    Batch,
    CountRange,
    DropRange,
    DropRow,
    Expect,
    GetEntry,
    GetRows,
    Group,
    HasRow,
    ListChanges,
    ListEntries,
    Run,
    ScanRange,
    SetRow,
    StoredChange,
    StoredRow,
    SwapRow,
    TouchRow,
)

NowMs = Callable[[], int]
# A call of a NamedTuple takes twice as long.
_make_set_row: Callable[[tuple[bytes, bytes, bytes, int, Ttl]], SetRow] = partial(tuple.__new__, SetRow)
_make_batch: Callable[[tuple[Group, int, bool, tuple[Put]]], Batch] = partial(tuple.__new__, Batch)
_make_row: Callable[[tuple[Key, bytes]], Row] = partial(tuple.__new__, Row)

# -- writes ------------------------------------------------------------------------------------------------------


def set_row(category: str, key: KeyLike, payload: Payload, ttl: Ttl, now_ms: NowMs) -> SetRow:
    """Return the message of a put that has a TTL."""
    end = now_ms() + as_ttl_ms(ttl)
    usual = type(key) is Key and type(payload) is bytes and type(category) is str  # as in `Job.put`
    if usual and len(key) + len(payload) <= KEY_BYTES_MAX:
        return _make_set_row((CATEGORIES[category], key, payload, end, ttl))  # type: ignore[arg-type]  # bytes, then
    return _make_set_row((as_category(category), as_key_bytes(key), as_payload(payload), end, ttl))


def drop_row(category: str, key: KeyLike) -> DropRow:
    """Return the message of a delete."""
    return DropRow(as_category(category), as_key(key))


def drop_prefix(category: str, prefix: KeyLike) -> DropRange:
    """Return the message of a delete of a prefix; an empty one is refused."""
    return DropRange(as_category(category), *as_doomed_prefix(prefix))


def drop_range(category: str, key_range: KeyRange) -> DropRange:
    """Return the message of a delete of a range; one without any bound is refused."""
    return DropRange(as_category(category), *as_doomed_range(key_range))


def swap_row(
    category: str, key: KeyLike, expected: Payload | None, new: Payload | None, ttl: Ttl | None, now_ms: NowMs
) -> SwapRow:
    """Return the message of a compare-and-set."""
    if new is None and ttl is not None:
        raise Misuse("ttl was given, but new is None, which deletes the row: leave ttl out")
    return SwapRow(
        as_category(category), as_key(key), as_swapped(expected, "expected"), as_swapped(new, "new"),
        as_end(ttl, now_ms),
    )  # fmt: skip


def touch_row(category: str, key: KeyLike, ttl: Ttl | None, now_ms: NowMs) -> TouchRow:
    """Return the message of a touch."""
    return TouchRow(as_category(category), as_key(key), as_end(ttl, now_ms))


def batch(ops: Op | Iterable[Op], now_ms: NowMs) -> tuple[Batch, int]:
    """Return operations as one batch, and the bytes of its keys and payloads."""
    if type(ops) is Put and ops.ttl is None and type(ops.payload) is bytes:  # the usual one: it needn't be told apart
        return _batch_of_one(ops, ops.key, ops.payload)
    if isinstance(ops, Op):
        given: tuple[Any, ...] = (ops,)
    elif isinstance(ops, Iterable) and not isinstance(ops, str | bytes | dict):
        given = tuple(ops)
    else:
        raise Misuse(f"ops must be an operation or an iterable of them, not {type(ops).__name__}: pass [Put(...), ...]")
    items = list[Any]()
    origin: list[Any] = []
    nbytes = 0
    expects = False
    for op in given:
        category, message, payload = places = _as_places(op, now_ms)
        items += places
        if category is None:
            nbytes += message_bytes(message)
            expects = expects or type(message) is Expect
            payload = message.payload if type(message) is SetRow else None
        else:
            nbytes += len(message) + len(payload)
        if payload is not None and op.payload is not payload:
            op = Put(
                op.category, op.key, payload, op.ttl
            )  # as it was at the call: the caller may go on writing into it
        origin.append(op)
    return Batch(items, len(given), expects, tuple(origin)), nbytes


def _batch_of_one(put: Put, key: KeyLike, payload: bytes) -> tuple[Batch, int]:
    category = put.category
    usual = type(key) is Key and type(category) is str and len(key) + len(payload) <= KEY_BYTES_MAX  # as in `Job.put`
    encoded = key if usual else as_key_bytes(key)
    items = [CATEGORIES[category], key, payload] if usual else [as_category(category), encoded, as_payload(payload)]
    return _make_batch((items, 1, False, (put,))), len(encoded) + len(payload)


def _as_places(op: Any, now_ms: NowMs) -> tuple[Any, Any, Any]:
    match op:
        case Put(ttl=None):
            return as_category(op.category), as_key_bytes(op.key), as_payload(op.payload)
        case Put():
            return None, set_row(op.category, op.key, op.payload, op.ttl, now_ms), None  # type: ignore[arg-type]  # not None
        case Delete():
            return None, drop_row(op.category, op.key), None
        case DeletePrefix():
            return None, drop_prefix(op.category, op.prefix), None
        case DeleteRange():
            return None, drop_range(op.category, op.key_range), None
        case Check():
            if isinstance(op.version, Entry):
                raise Misuse("version must be a version, not an Entry: pass entry.version, or None for no row")
            if op.version is not None:
                as_count(op.version, "version", 0)
            return None, Expect(as_category(op.category), as_key(op.key), op.version), None
        case _:
            raise Misuse(
                f"ops holds {type(op).__name__}, which is no operation: "
                "pass Put, Delete, DeletePrefix, DeleteRange or Check objects"
            )


def message_bytes(message: Any) -> int:
    """Return the bytes a write takes in the mailbox: of its keys and payloads."""
    match message:
        case SetRow():
            return len(message.key) + len(message.payload)
        case SwapRow():
            return len(message.key) + len(message.expected or b"") + len(message.payload or b"")
        case DropRange():
            return len(message.category) + len(message.start)
        case Run():
            return 0
        case _:
            return len(message.category) + len(message.key)


def argument_bytes(args: Iterable[Any]) -> int:
    """Return the bytes of text and bytes among a function's arguments, which wait with it."""
    return sum(
        arg.nbytes if isinstance(arg, memoryview) else len(arg)
        for arg in args
        if isinstance(arg, bytes | bytearray | memoryview | str)
    )


def name_ops(category: bytes | None, message: Any, payload: Any) -> tuple[Any, ...]:
    """Return the operations a message was made of: the very objects of a batch, else ones that mean the same."""
    if category is not None:
        return (Put(category.decode(), message if isinstance(message, Key) else Key(message), payload),)
    match message:
        case Batch() | Run():
            return message.origin
        case SetRow():
            return (Put(message.category.decode(), Key(message.key), message.payload, message.origin),)
        case SwapRow(payload=None) | DropRow():
            return (Delete(message.category.decode(), Key(message.key)),)
        case SwapRow():
            return (Put(message.category.decode(), Key(message.key), message.payload or b""),)
        case DropRange():
            start, stop = message.start or None, message.stop
            return (DeleteRange(message.category.decode(), KeyRange(start, stop)),)  # type: ignore[arg-type]  # Keys
        case TouchRow():
            return (f"touch {message.category.decode()!r} {message.key!r}",)
        case _:
            return ()


# -- reads -------------------------------------------------------------------------------------------------------


def get_entry(category: str, key: KeyLike) -> GetEntry:
    """Return the message of a read of a row with its version."""
    return GetEntry(as_category(category), as_key(key))


def get_rows(category: str, keys: Iterable[KeyLike]) -> GetRows:
    """Return the message of a read of several payloads."""
    return GetRows(as_category(category), as_keys(keys))


def has_row(category: str, key: KeyLike) -> HasRow:
    """Return the message that asks whether there is a row."""
    return HasRow(as_category(category), as_key(key))


def count_range(category: str, key_range: KeyRange) -> CountRange:
    """Return the message of a count."""
    return CountRange(as_category(category), *as_bounds(key_range))


def scan_range(category: str, key_range: KeyRange, reverse: bool, limit: int | None) -> ScanRange:
    """Return the message of a scan."""
    return ScanRange(as_category(category), *as_bounds(key_range), as_flag(reverse, "reverse"), as_limit(limit))


def scan_prefix(category: str, prefix: KeyLike, reverse: bool, limit: int | None) -> ScanRange:
    """Return the message of a scan of a key and its children."""
    return ScanRange(as_category(category), *as_prefix_range(prefix), as_flag(reverse, "reverse"), as_limit(limit))


def walked_range(key_range: KeyRange, prefix: KeyLike | None) -> tuple[bytes, bytes | None]:
    """Return the range to walk over: that of a prefix, if one is given."""
    span = as_bounds(key_range)
    if prefix is None:
        return span
    if span != (b"", None):
        raise Misuse("key_range and prefix were both given: pass one of them")
    return as_prefix_range(prefix)


def list_entries(category: str) -> ListEntries:
    """Return the message of a snapshot."""
    return ListEntries(as_category(category))


def list_changes(after: int, limit: int, wait: bool, origin: Any = None) -> ListChanges:
    """Return the message of a read of changes, which `origin` asks for."""
    return ListChanges(as_count(after, "after", 0), as_count(limit, "limit", 1), as_flag(wait, "wait"), origin)


# -- answers -----------------------------------------------------------------------------------------------------


def rows(pairs: list[tuple[bytes, bytes]]) -> list[Row]:
    """Return what a scan gives."""
    # Mapped at C speed: a call of Row() for each would take longer than the scan itself.
    return list(map(_make_row, ((Key(key), payload) for key, payload in pairs)))


def keys(pairs: list[tuple[bytes, bytes]]) -> list[Key]:
    """Return what a scan of keys alone gives."""
    return [Key(key) for key, _ in pairs]


def row(key: bytes, payload: bytes) -> Row:
    """Return one row of a walk."""
    return Row(Key(key), payload)


def key_alone(key: bytes, _payload: bytes) -> Key:
    """Return one key of a walk over keys."""
    return Key(key)


def entry(stored: StoredRow | None) -> Entry | None:
    """Return a row with all that is kept of it."""
    return None if stored is None else Entry(Key(stored.key), stored.payload, stored.version, stored.expires_ms)


def entries(stored: list[StoredRow]) -> list[Entry]:
    """Return what a snapshot gives."""
    return [Entry(Key(row.key), row.payload, row.version, row.expires_ms) for row in stored]


def names(categories: list[bytes]) -> list[str]:
    """Return the names of categories."""
    return list(map(_name, categories))


def changes(stored: list[StoredChange]) -> list[Change]:
    """Return changes as they are told."""
    return [
        Change(version, kind, _name(category), Key(key), payload, None if stop is None else Key(stop))
        for version, kind, category, key, payload, stop in stored
    ]


def _name(category: bytes) -> str:
    try:
        return category.decode()
    except UnicodeDecodeError as error:  # nobody here has written that
        raise Corrupt(f"the file has a category that is no text, {category!r:.40}") from error


assert PLACES == 3, "a message's places are written out in this module"
