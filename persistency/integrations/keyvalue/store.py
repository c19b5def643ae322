"""The store for `py-key-value-aio`: an `AsyncKeyValue` with every ability that its protocols name.

Rules:
  1. It derives from their `BaseStore`, which checks arguments, seeds, and stays as it is.
  2. A job, or a baton, that it is given isn't its own: closing the store leaves that open. What it opens itself, by
     `directory`, it closes.
  3. Who stops waiting for a verb harms nobody: what was asked for is done whole, or not at all.
  4. What can be told to be wrong without opening anything is told when the store is made.

Doesn't know: threads, how rows are laid out.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime, timedelta
from os import PathLike
from types import TracebackType
from typing import Any, SupportsFloat, Unpack

from key_value.aio.errors import StoreSetupError
from key_value.aio.stores.base import (
    BaseContextManagerStore,
    BaseCullStore,
    BaseDestroyCollectionStore,
    BaseDestroyStore,
    BaseEnumerateCollectionsStore,
    BaseEnumerateKeysStore,
    ManagedEntry,
)

from persistency import Closed, Misuse, OpenOptions, Persistency, Reply
from persistency.integrations.keyvalue.rows import Rows, Stored, as_name
from persistency.integrations.keyvalue.values import as_collection, as_row, as_ttl_ms, check_seed, decode, encode
from persistency.recipes.runner import Runner, as_runner

NAME = "keyvalue"
Seed = Mapping[str, Mapping[str, Mapping[str, Any]]]


class PersistencyStore(
    BaseContextManagerStore,
    BaseDestroyStore,
    BaseDestroyCollectionStore,
    BaseEnumerateCollectionsStore,
    BaseEnumerateKeysStore,
    BaseCullStore,
):
    """An `AsyncKeyValue` in a job: `PersistencyStore(job)`, or `PersistencyStore(directory="data")`.

    `runner`: a `Job`, or a `Baton` where several processes share one. Or `directory`: where the store opens a job of
    its own at its first use, called `job_id`, with the options of `Persistency.open_job`; it closes that when it is
    closed itself. `name` is the category of its rows: stores of several names can share a job.

    `default_collection` is where keys without a collection are; `seed` (`{collection: {key: value}}`) is written at the
    first use of every store that has one, over what is there. A collection's name and a key may have 8,192 bytes
    together, encoded, or it is an `InvalidKeyError`. Raises `Misuse` for wrong arguments; for the value of an option,
    which only opening can tell, at the first use. Opening fails with their `StoreSetupError`, whose cause says why.
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
        self._directory = directory
        self._job_id = job_id
        self._name: str = as_name(name)
        self._options = options
        self._open_rows: Rows | None = None if runner is None else Rows(runner, name)
        self._closed = False
        self._setting_up: Future[None] | None = None
        self._setting_up_lock = threading.Lock()
        super().__init__(
            client_provided_by_user=runner is not None,
            default_collection=default_collection,
            seed=seed,
            stable_api=True,
        )

    async def setup(self) -> None:
        """Set the store up, if that hasn't been done. Raises `StoreSetupError`, `Misuse` and `Closed`."""
        if self._closed:
            raise closed(self)
        if self._setup_complete:
            return
        with self._setting_up_lock:  # theirs lets one go on as well, but the others wait with asyncio
            under_way = self._setting_up
            mine = Future[None]() if under_way is None else None
            self._setting_up = mine or under_way
        if mine is not None:
            await self._set_up(mine)
        elif under_way is not None:
            await Reply.of(under_way)

    async def _set_up(self, done: Future[None]) -> None:
        done.set_running_or_notify_cancel()  # who gives up waiting for it doesn't cancel it
        try:
            await super().setup()
        except BaseException as error:
            told: BaseException = error
            if isinstance(error, StoreSetupError):
                told = error.__cause__ if isinstance(error.__cause__, Misuse) else error
            if self._setup_future is None:  # else theirs has it that the store can't be tried again: a seed failed
                self._setting_up = None
            interrupted = StoreSetupError(message="Store setup was interrupted")
            done.set_exception(told if isinstance(told, Exception) else interrupted)
            if told is error:
                raise
            raise told from None
        self._setting_up = None
        done.set_result(None)

    async def _cleanup_failed_setup(self) -> None:
        await super().close()  # and not this store's own: it can be tried again

    async def close(self) -> None:
        """Close the job, if the store has opened it: then it can't be used any more. A second call is nothing."""
        self._closed = self._directory is not None
        await super().close()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._closed = self._directory is not None
        return await super().__aexit__(kind, error, trace)

    async def put(
        self, key: str, value: Mapping[str, Any], *, collection: str | None = None, ttl: SupportsFloat | None = None
    ) -> None:
        """Store a value, a mapping that JSON can hold, which ends after `ttl` seconds (`None`: never)."""
        await super().put(key, value, collection=collection, ttl=_as_ttl(ttl))

    async def put_many(
        self,
        keys: Sequence[str],
        values: Sequence[Mapping[str, Any]],
        *,
        collection: str | None = None,
        ttl: SupportsFloat | None = None,
    ) -> None:
        """Store several values, all or none of them, which all end after `ttl` seconds."""
        await super().put_many(keys, values, collection=collection, ttl=_as_ttl(ttl))

    async def _setup(self) -> None:
        if self._directory is not None:
            persistency = Persistency(self._directory)
            self._exit_stack.push_async_callback(persistency.aclose)
            self._open_rows = Rows(await persistency.aopen_job(self._job_id, **self._options), self._name)

    async def setup_collection(self, *, collection: str) -> None:  # noqa: ARG002  # theirs
        """Set the store up, if that hasn't been done; a collection needs nothing of its own."""
        await self.setup()

    @property
    def _rows(self) -> Rows:
        rows = self._open_rows
        assert rows is not None, "BaseStore sets a store up before it is used"
        return rows

    async def _get_managed_entry(self, *, collection: str, key: str) -> ManagedEntry | None:
        return _entry(await self._rows.get(as_row(collection, key)))

    async def _get_managed_entries(self, *, collection: str, keys: Sequence[str]) -> list[ManagedEntry | None]:
        rows = [as_row(collection, key) for key in keys]
        return [_entry(stored) for stored in await self._rows.get_many(rows)] if rows else []

    async def _put_managed_entry(self, *, collection: str, key: str, managed_entry: ManagedEntry) -> None:
        item = as_row(collection, key), encode(managed_entry.value)
        ends = managed_entry.expires_at
        ttl = None if ends is None else ends - (managed_entry.created_at or _now())
        await self._rows.put_many([item], as_ttl_ms(ttl))

    async def _put_managed_entries(
        self,
        *,
        collection: str,
        keys: Sequence[str],
        managed_entries: Sequence[ManagedEntry],
        ttl: float | None,
        created_at: datetime,  # noqa: ARG002  # theirs
        expires_at: datetime | None,  # noqa: ARG002  # theirs
    ) -> None:
        pairs = zip(keys, managed_entries, strict=True)
        items = [(as_row(collection, key), encode(entry.value)) for key, entry in pairs]
        if items:
            await self._rows.put_many(items, as_ttl_ms(ttl))

    async def _delete_managed_entry(self, *, key: str, collection: str) -> bool:
        return await self._rows.delete_many([as_row(collection, key)]) > 0

    async def _delete_managed_entries(self, *, keys: Sequence[str], collection: str) -> int:
        rows = [as_row(collection, key) for key in keys]
        return await self._rows.delete_many(rows) if rows else 0

    async def _get_collection_keys(self, *, collection: str, limit: int | None = None) -> list[str]:
        return await self._rows.keys(as_collection(collection), limit)

    async def _get_collection_names(self, *, limit: int | None = None) -> list[str]:
        return await self._rows.collections(limit)

    async def _delete_collection(self, *, collection: str) -> bool:
        return await self._rows.delete_collection(as_collection(collection)) > 0

    async def _delete_store(self) -> bool:
        await self._rows.delete_all()
        return True

    async def _cull(self) -> None:
        await self._rows.wake()

    def __repr__(self) -> str:
        where = self._directory if self._open_rows is None else self._open_rows.runner
        return f"<PersistencyStore {self._name!r} of {where!r}>"


def check_place(
    runner: Runner | None, directory: str | PathLike[str] | None, job_id: str, options: dict[str, Any]
) -> None:
    """Raise `Misuse` unless a store is given either something that is open, or what it needs to open it."""
    if (runner is None) == (directory is None):
        raise Misuse("a store takes a job (or a baton), or a directory, and not both: pass one of them")
    if runner is not None:
        as_runner(runner)
        if options:
            hint = "Give options where the job is opened, or let the store do that: directory=..."
            raise Misuse(f"{min(options)} is an option of opening a job, and this one is open", hint=hint)
    if directory is not None:
        unknown = options.keys() - OpenOptions.__optional_keys__
        if unknown:
            raise TypeError(f"a store got an unexpected keyword argument {min(unknown)!r}")
        with Persistency(directory) as persistency:  # which touches no file
            persistency.has_job(job_id)  # is it an id at all?


def closed(store: object) -> Closed:
    """Return what a store raises that was closed."""
    return Closed(f"{store!r} is closed, and so is its job", hint="Make a new store.")


def _as_ttl(ttl: SupportsFloat | timedelta | None) -> float | None:
    """Return a TTL as their own arithmetic keeps it: whole milliseconds, in seconds."""
    ttl_ms = as_ttl_ms(ttl)
    return None if ttl_ms is None else ttl_ms / 1000


def _entry(stored: Stored | None) -> ManagedEntry | None:
    if stored is None:
        return None
    ends = None if stored.left_ms is None else _now() + timedelta(milliseconds=stored.left_ms)
    return ManagedEntry(value=decode(stored.payload), expires_at=ends)


def _now() -> datetime:
    return datetime.now(tz=UTC)
