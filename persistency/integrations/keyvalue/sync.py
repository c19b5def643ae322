"""The sync twin: what `py-key-value-aio` gives event loops, for threads, with the same rows.

Rules:
  1. The same verbs with the same arguments and answers, without `await`; where py-key-value has an error, that error.
  2. It opens what it needs when it is made, and says then what is wrong.

Doesn't know: event loops, how rows are laid out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Protocol, Self, SupportsFloat, Unpack, runtime_checkable

from key_value.aio.errors import StoreSetupError

from persistency import Misuse, OpenOptions, Persistency, PersistencyError
from persistency.integrations.keyvalue.rows import Rows, Stored, as_name
from persistency.integrations.keyvalue.store import NAME, Seed, check_place, closed
from persistency.integrations.keyvalue.values import as_collection, as_row, as_ttl_ms, check_seed, decode, encode
from persistency.recipes.runner import Runner

Value = dict[str, Any]
DEFAULT_COLLECTION = "default_collection"  # py-key-value's own


@runtime_checkable
class KeyValue(Protocol):
    """What py-key-value calls an `AsyncKeyValue`, for threads: the same verbs, without `await`."""

    def get(self, key: str, *, collection: str | None = None) -> Value | None:
        """Return a value, `None` if there is none."""
        raise NotImplementedError

    def ttl(self, key: str, *, collection: str | None = None) -> tuple[Value | None, float | None]:
        """Return a value and after how many seconds it ends (`None`: never)."""
        raise NotImplementedError

    def put(
        self, key: str, value: Mapping[str, Any], *, collection: str | None = None, ttl: SupportsFloat | None = None
    ) -> None:
        """Store a value, which ends after `ttl` seconds."""
        raise NotImplementedError

    def delete(self, key: str, *, collection: str | None = None) -> bool:
        """Remove a value and return whether it was there."""
        raise NotImplementedError

    def get_many(self, keys: Sequence[str], *, collection: str | None = None) -> list[Value | None]:
        """Return several values in the order asked."""
        raise NotImplementedError

    def ttl_many(
        self, keys: Sequence[str], *, collection: str | None = None
    ) -> list[tuple[Value | None, float | None]]:
        """Return several values, each with the seconds it has left."""
        raise NotImplementedError

    def put_many(
        self,
        keys: Sequence[str],
        values: Sequence[Mapping[str, Any]],
        *,
        collection: str | None = None,
        ttl: SupportsFloat | None = None,
    ) -> None:
        """Store several values, which all end after `ttl` seconds."""
        raise NotImplementedError

    def delete_many(self, keys: Sequence[str], *, collection: str | None = None) -> int:
        """Remove several values and return how many were there."""
        raise NotImplementedError


class SyncPersistencyStore:
    """A `KeyValue` in a job, for threads; the arguments are those of `PersistencyStore`, and so are the rows.

    Its `seed` is written when it is made. Raises `Misuse` for wrong arguments, and their `StoreSetupError` if the job
    can't be opened. Don't call it in an event loop, which would stand still meanwhile.
    """

    def __init__(
        self,
        runner: Runner | None = None,
        *,
        directory: str | PathLike[str] | None = None,
        job_id: str = NAME,
        name: str = NAME,
        default_collection: str | None = None,
        seed: Seed | None = None,
        **options: Unpack[OpenOptions],
    ) -> None:
        check_place(runner, directory, job_id, dict(options))
        check_seed(seed, default_collection)
        self._name: str = as_name(name)
        self._own: Persistency | None = None
        self._closed = False
        if runner is None:
            assert directory is not None, "check_place has seen to it"
            self._own = Persistency(directory)
            try:
                runner = self._own.open_job(job_id, **options)
            except BaseException as error:
                self._own.close()
                if not isinstance(error, PersistencyError) or isinstance(error, Misuse):
                    raise
                raise StoreSetupError(message=f"Failed to setup key value store: {error}") from error
        self._open_rows: Rows = Rows(runner, name)
        self.default_collection: str = default_collection or DEFAULT_COLLECTION
        try:
            for collection, items in (seed or {}).items():
                self.put_many(list(items), list(items.values()), collection=collection)
        except BaseException:
            self.close()  # nobody else can
            raise

    @property
    def _rows(self) -> Rows:
        if self._closed:
            raise closed(self)
        return self._open_rows

    # -- values --------------------------------------------------------------------------------------------------

    def get(self, key: str, *, collection: str | None = None) -> Value | None:
        """Return a value, `None` if there is none."""
        return self.ttl(key, collection=collection)[0]

    def ttl(self, key: str, *, collection: str | None = None) -> tuple[Value | None, float | None]:
        """Return a value and after how many seconds it ends (`None`: never); `(None, None)` if there is none."""
        return _answer(self._rows.get(as_row(self._collection(collection), key)).result())

    def put(
        self, key: str, value: Mapping[str, Any], *, collection: str | None = None, ttl: SupportsFloat | None = None
    ) -> None:
        """Store a value, a mapping that JSON can hold, which ends after `ttl` seconds (`None`: never)."""
        self.put_many([key], [value], collection=collection, ttl=ttl)

    def delete(self, key: str, *, collection: str | None = None) -> bool:
        """Remove a value and return whether it was there."""
        return self.delete_many([key], collection=collection) > 0

    def get_many(self, keys: Sequence[str], *, collection: str | None = None) -> list[Value | None]:
        """Return several values of one moment, in the order asked, `None` for those that aren't there."""
        return [value for value, _ in self.ttl_many(keys, collection=collection)]

    def ttl_many(
        self, keys: Sequence[str], *, collection: str | None = None
    ) -> list[tuple[Value | None, float | None]]:
        """Return several values of one moment, each with the seconds it has left."""
        rows = [as_row(self._collection(collection), key) for key in keys]
        return [_answer(stored) for stored in self._rows.get_many(rows).result()] if rows else []

    def put_many(
        self,
        keys: Sequence[str],
        values: Sequence[Mapping[str, Any]],
        *,
        collection: str | None = None,
        ttl: SupportsFloat | None = None,
    ) -> None:
        """Store several values, all or none of them, which all end after `ttl` seconds."""
        if len(keys) != len(values):
            raise Misuse(f"put_many was given {len(keys)} keys and {len(values)} values: pass as many of each")
        named = self._collection(collection)
        ttl_ms = as_ttl_ms(ttl)
        items = [(as_row(named, key), encode(value)) for key, value in zip(keys, values, strict=True)]
        if items:
            self._rows.put_many(items, ttl_ms).result()

    def delete_many(self, keys: Sequence[str], *, collection: str | None = None) -> int:
        """Remove several values, all in one transaction, and return how many were there."""
        rows = [as_row(self._collection(collection), key) for key in keys]
        return self._rows.delete_many(rows).result() if rows else 0

    # -- collections, and the store as a whole -------------------------------------------------------------------

    def keys(self, collection: str | None = None, *, limit: int | None = None) -> list[str]:
        """Return the keys of a collection in their order, all of them or the first `limit`."""
        return self._rows.keys(as_collection(self._collection(collection)), limit).result()

    def collections(self, *, limit: int | None = None) -> list[str]:
        """Return the collections that hold something, in their order."""
        return self._rows.collections(limit).result()

    def destroy_collection(self, collection: str) -> bool:
        """Remove all of a collection and return whether there was anything."""
        return self._rows.delete_collection(as_collection(collection)).result() > 0

    def destroy(self) -> bool:
        """Remove all that the store holds; the job, and what else is in it, stays. Returns `True`."""
        self._rows.delete_all().result()
        return True

    def cull(self) -> None:
        """Have the job looked after: it reclaims what has ended, as it does by itself when it is idle."""
        self._rows.wake().result()

    def close(self) -> None:
        """Close the job, if the store has opened it: then it can't be used any more. A second call is nothing."""
        own, self._own = self._own, None
        if own is not None:
            self._closed = True
            own.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<SyncPersistencyStore {self._name!r} of {self._open_rows.runner!r}>"

    def _collection(self, collection: str | None) -> str:
        return collection or self.default_collection


def _answer(stored: Stored | None) -> tuple[Value | None, float | None]:
    if stored is None:
        return None, None
    return decode(stored.payload), None if stored.left_ms is None else stored.left_ms / 1000
