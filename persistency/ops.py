"""The words everyone here speaks: the operations a caller posts and the rows that come back.

Rules:
  1. Operations are frozen values; making one checks nothing. `Job.persist` and `Job.commit` check them, in the
     caller's thread.
  2. A key is a `Key`, or a tuple of its parts that is encoded when the operation is posted.
  3. What comes back is immutable, and its keys are always `Key`s.

Doesn't know: how anything is stored, posted or encoded.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, TypeVar, overload

from persistency.codec.keys import Key, KeyRange, as_key
from persistency.frozen import Frozen, give

T = TypeVar("T")

KeyLike: TypeAlias = Key | tuple[Any, ...]
Payload: TypeAlias = bytes | bytearray | memoryview
Ttl: TypeAlias = float | timedelta


class Put(Frozen):
    """Store `payload` under `key`, whatever was there.

    `payload`: any bytes-like object, empty allowed, up to 256 MiB; `ttl`: after how long the row ends, in seconds or as
    a `timedelta`, counted from the call that posts the operation (`None`: it doesn't end).
    """

    __slots__ = __match_args__ = ("category", "key", "payload", "ttl")

    category: str
    key: KeyLike
    payload: Payload
    ttl: Ttl | None

    def __init__(self, category: str, key: KeyLike, payload: Payload, ttl: Ttl | None = None) -> None:
        give(self, "category", category)
        give(self, "key", key)
        give(self, "payload", payload)
        give(self, "ttl", ttl)


class Delete(Frozen):
    """Remove one row; a missing one is fine."""

    __slots__ = __match_args__ = ("category", "key")

    category: str
    key: KeyLike

    def __init__(self, category: str, key: KeyLike) -> None:
        give(self, "category", category)
        give(self, "key", key)


class DeletePrefix(Frozen):
    """Remove the row of the key `prefix` and those of all its children. An empty prefix is refused."""

    __slots__ = __match_args__ = ("category", "prefix")

    category: str
    prefix: KeyLike

    def __init__(self, category: str, prefix: KeyLike) -> None:
        give(self, "category", category)
        give(self, "prefix", prefix)


class DeleteRange(Frozen):
    """Remove the rows from `key_range.start` up to, not including, `key_range.stop`. Unbounded is refused."""

    __slots__ = __match_args__ = ("category", "key_range")

    category: str
    key_range: KeyRange

    def __init__(self, category: str, key_range: KeyRange) -> None:
        give(self, "category", category)
        give(self, "key_range", key_range)


class Check(Frozen):
    """Require that the row's version is `version` (`None`: that there is no row), or the whole batch fails.

    Checks look at the state before their batch, wherever in the batch they stand.
    """

    __slots__ = __match_args__ = ("category", "key", "version")

    category: str
    key: KeyLike
    version: int | None

    def __init__(self, category: str, key: KeyLike, version: int | None) -> None:
        give(self, "category", category)
        give(self, "key", key)
        give(self, "version", version)


Op: TypeAlias = Put | Delete | DeletePrefix | DeleteRange | Check


class Row(NamedTuple):
    """What a scan gives: a key and its payload."""

    key: Key
    payload: bytes


class Entry(NamedTuple):
    """A row with all that is kept of it.

    `version` is the version of its last write; `expires_ms` the Unix time in milliseconds at which it ends, or `None`.
    """

    key: Key
    payload: bytes
    version: int
    expires_ms: int | None


class Change(NamedTuple):
    """What one operation, or the end of a row, has changed in a job that keeps its changes.

    `kind` is `"put"` (`payload` is what was put), `"delete"`, `"expire"`, or `"delete_range"`: then `key` is where the
    range starts, and `stop` where it stops (`None`: it goes to the last key); the stop is not in it.
    """

    version: int
    kind: Literal["put", "delete", "expire", "delete_range"]
    category: str
    key: Key
    payload: bytes | None
    stop: Key | None


class Found(dict[Key, bytes]):
    """The answer of `get_many`: payloads by `Key`, in the order asked, the missing left out.

    Looking up a tuple works too: it is encoded first. (As dict keys, `(1,)` and `(True,)` would be one; as
    keys of a job they are two.)
    """

    __slots__ = ()

    if TYPE_CHECKING:  # a method of our own would cost every look-up of a Key

        def __getitem__(self, wanted: KeyLike) -> bytes: ...

    def __missing__(self, wanted: object) -> bytes:
        if isinstance(wanted, tuple):
            return self[as_key(wanted)]
        raise KeyError(wanted)

    def __contains__(self, wanted: object) -> bool:
        return super().__contains__(as_key(wanted) if isinstance(wanted, tuple) else wanted)

    @overload
    def get(self, wanted: KeyLike, default: None = None) -> bytes | None: ...
    @overload
    def get(self, wanted: KeyLike, default: bytes) -> bytes: ...
    @overload
    def get(self, wanted: KeyLike, default: T) -> bytes | T: ...
    def get(self, wanted: KeyLike, default: Any = None) -> Any:
        """Return the payload of a `Key` or a tuple, or `default` if it is not among the rows found."""
        return super().get(as_key(wanted) if isinstance(wanted, tuple) else wanted, default)
