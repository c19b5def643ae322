"""The key-value store: text keys and bytes, for whoever has to be told at the call what became of it, as a plugin.

Every verb is a request. A write that its tenant has no room for is refused with `QuotaExceeded` by the reply of that
very `set`; the quota is the `max_bytes` the job was opened with, and covers all of the job.

Rules:
  1. Built on `Job`'s public methods alone: order, atomicity and durability are the job's.
  2. A key is a text of 1 to 256 bytes of UTF-8, for every verb alike; anything else is `Misuse` at the call.
  3. A prefix is the beginning of a text, exact to the byte: no wildcard, no escape, and no letter stands for another.
  4. A row that has ended isn't there: no verb gives it, counts it, or says that it has removed it.
  5. The category is the store's own. What is in it and can't be a key of its is `Corrupt`.

Doesn't know: threads, SQL, files, how many bytes there may be.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeAlias

from persistency.actor.reply import Reply
from persistency.arguments import as_category, as_payload, as_ttl_ms
from persistency.codec.keys import Key, KeyRange, key
from persistency.errors import Corrupt, Misuse
from persistency.job import Job
from persistency.ops import Payload, Put, Ttl

CATEGORY = "kv"
TEXT_BYTES_MAX = 256  # of a key, in UTF-8

_Keys: TypeAlias = list[str]


class KVStore:
    """The verbs of a key-value store over a job; making one writes nothing, and closing it is closing the job.

    `category`: where in the job its rows are (`"kv"`). Raises `Misuse` if `job` is no `Job`, or for a bad name.
    """

    __slots__ = ("category", "job")

    def __init__(self, job: Job, *, category: str = CATEGORY) -> None:
        if not isinstance(job, Job):
            raise Misuse(f"job must be a Job, not {type(job).__name__}: pass what open_job gave")
        as_category(category)
        self.job: Job = job
        self.category: str = category

    # -- writes --------------------------------------------------------------------------------------------------

    def set(self, key: str, value: Payload) -> Reply[None]:
        """Store a value (bytes-like, empty allowed) under a key, whatever was there; it doesn't end.

        The reply raises `QuotaExceeded` if it would take the job over its `max_bytes`; nothing has changed then. One
        that is no longer than the value before it is always taken.
        """
        return self._commit(Put(self.category, _key(key), as_payload(value, "value")))

    def set_with_ttl(self, key: str, value: Payload, ttl: Ttl) -> Reply[None]:
        """Do what `set` does with a value that ends after `ttl`: seconds or a `timedelta`, counted from this call."""
        as_ttl_ms(ttl)  # `Put` takes None too
        return self._commit(Put(self.category, _key(key), as_payload(value, "value"), ttl))

    def delete(self, key: str) -> Reply[bool]:
        """Remove a key and answer whether it was there; a missing one is fine."""
        return self.job.delete_acked(self.category, _key(key))

    def delete_by_prefix(self, prefix: str) -> Reply[int]:
        """Remove the keys that begin with `prefix`, itself included, and answer how many were there.

        Those that have ended by then aren't counted: they weren't there. An empty prefix is `Misuse`.
        """
        return self.job.delete_range_acked(self.category, _span(prefix, bytes_min=1))

    def compare_and_set(self, key: str, expected: Payload | None, new: Payload | None) -> Reply[bool]:
        """Put `new` in the place of `expected`, in one step, and answer whether that was there; `None` is no such key.

        Values are compared, byte by byte. `None, new` creates a key only if there is none; `expected, None` deletes one
        only if it still has that value. A value put so doesn't end. `QuotaExceeded` as for `set`.
        """
        return self.job.compare_and_set(self.category, _key(key), expected, new)

    def _commit(self, put: Put) -> Reply[None]:
        return self.job.commit(put).map(_nothing)

    # -- reads ---------------------------------------------------------------------------------------------------

    def get(self, key: str) -> Reply[bytes | None]:
        """Ask for a value; `None` if there is no such key."""
        return self.job.get(self.category, _key(key))

    def get_many(self, keys: Iterable[str]) -> Reply[dict[str, bytes]]:
        """Ask for several values in one snapshot: by key, in the order asked, each once, the missing left out."""
        if isinstance(keys, str | bytes) or not isinstance(keys, Iterable):
            raise Misuse(f"keys must be a list (or another iterable) of keys, not {type(keys).__name__}: pass [key]")
        return self.job.get_many(self.category, [_key(each, "each of keys") for each in keys]).map(self._by_text)

    def has(self, key: str) -> Reply[bool]:
        """Ask whether there is such a key."""
        return self.job.exists(self.category, _key(key))

    def list(self, prefix: str = "", *, after: str | None = None, limit: int | None = None) -> Reply[_Keys]:
        """Ask for the keys that begin with `prefix` in the order of their UTF-8, all of them or the first `limit`.

        With `after` only the keys behind that one, which needn't be there: the last key of a page asks for the next.
        """
        span = _span(prefix)
        if after is not None:
            behind = KeyRange.prefix(_key(after, "after")).stop
            span = KeyRange(max(filter(None, (span.start, behind))), span.stop)
        return self.job.keys(self.category, span, limit=limit).map(self._texts)

    def storage_used(self) -> Reply[int]:
        """Ask how many bytes the values of all the job's rows have; at once if it has `max_bytes`, else by counting."""
        return self.job.storage_used()

    # -- answers -------------------------------------------------------------------------------------------------

    def _by_text(self, found: dict[Key, bytes]) -> dict[str, bytes]:
        return {self._text(stored): value for stored, value in found.items()}

    def _texts(self, stored: Iterable[Key]) -> _Keys:
        return list(map(self._text, stored))

    def _text(self, stored: Key) -> str:
        try:
            (text,) = stored.parts
        except ValueError as error:  # not one part, or not even a key: Misuse is one too
            raise Corrupt(
                f"category {self.category!r} holds {stored!r}, which is no key of a KVStore",
                hint="Give the store a category of its own: KVStore(job, category=...).",
            ) from error
        return text  # type: ignore[no-any-return]  # all ranges asked for here are of texts

    def __repr__(self) -> str:
        return f"<KVStore {self.category!r} of {self.job!r}>"


def _nothing(_version: int) -> None:
    """What `set` answers."""


def _checked(value: Any, argument: str, bytes_min: int) -> str:
    if not isinstance(value, str):
        raise Misuse(f"{argument} must be a str, not {type(value).__name__}: pass text")
    try:
        size = len(str.encode(value))
    except UnicodeEncodeError as error:
        raise Misuse(f"{argument} {value!r:.80} holds a lone surrogate: pass text that UTF-8 can hold") from error
    if size < bytes_min:
        raise Misuse(f"{argument} cannot be empty: pass {bytes_min} to {TEXT_BYTES_MAX} bytes of UTF-8")
    if size > TEXT_BYTES_MAX:
        raise Misuse(f"{argument} exceeds the maximum length of {TEXT_BYTES_MAX} bytes of UTF-8: it has {size}")
    return value


def _key(text: str, argument: str = "key") -> Key:
    return key(_checked(text, argument, 1))


def _span(prefix: str, bytes_min: int = 0) -> KeyRange:
    return KeyRange.text_prefix((), _checked(prefix, "prefix", bytes_min))
