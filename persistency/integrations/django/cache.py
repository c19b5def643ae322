"""The cache: Django's `BaseCache` on a job, in both forms, for threads and for event loops.

Rules:
  1. What each verb does is written once, as a procedure; both forms of the verb drive it.
  2. `add`, `incr`, `decr`, `incr_version`, `set_many` and `delete_many` each are all or nothing, whoever else writes.
  3. Values are made and read outside of transactions: what a class does to be pickled holds nobody up.
  4. What can't be read is a miss, with a line in the log, and is removed; a read doesn't wait for that.
  5. To be closed, as Django does after every request, means nothing to it.

Doesn't know: how a job is opened, what a payload looks like, in which rows an entry is.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from functools import partial
from sys import maxsize
from typing import Any, Final, TypeVar, TypeVarTuple

from persistency import Closed, Key, PersistencyError, Poisoned
from persistency.integrations.django import rows
from persistency.integrations.django.base import DEFAULT_TIMEOUT, BaseCache
from persistency.integrations.django.options import checked
from persistency.integrations.django.places import Place, Stale, place_of, reading
from persistency.integrations.django.steps import Steps, adrive, drive
from persistency.integrations.django.values import Refused, Values
from persistency.logfields import about

log: logging.Logger = logging.getLogger("persistency.django")

T = TypeVar("T")
Ts = TypeVarTuple("Ts")
_TIMEOUT_MAX: Final = 10_000_000_000  # seconds, 317 years; what is longer has no end
_TRIES: Final = (False, False, True)  # whether it is the last one


class PersistencyCache(BaseCache):
    """A cache in a job. Made by Django, of what stands in `CACHES`.

    `location`: the root directory, or `":memory:"`. `params`: Django's own (`TIMEOUT`, `KEY_PREFIX`, `VERSION`,
    `KEY_FUNCTION`) and `OPTIONS`:

    JOB: the id of the job (`"cache"`); caches with the same one share their entries, as far as their keys are the same.
    SHARED: whether other processes use the cache too (`True`). With `False` this process has the job for itself, and
      another one gets `JobLocked`.
    PICKLE: whether values that CBOR doesn't hold are pickled and signed (`True`), or refused with `Misuse`.
    MAX_ENTRIES, CULL_FREQUENCY: how many entries there may be (300, as everywhere in Django; `None`: any number), and
      which part of them goes to make room: one of 3; with 0 all. Those that were written the longest ago go first.
    MAX_BYTES: how many bytes keys and values may have (`None`: any number); the oldest go first here, too.
    KEEP: for how many seconds (0.003) a process keeps the job after a write, in case it writes again.
    WAIT: how many seconds (60) a write waits while other processes have the job, before it raises `JobLocked`; and no
      more than 60 of them while the disk is full.
    DURABILITY: `"process"` (the default) or `"power"`, see `Persistency.open_job`.
    CLOCK: a function like `time.time`, or its dotted path, for tests.

    Raises `ImproperlyConfigured` for a wrong or unknown option.
    """

    def __init__(self, location: Any, params: dict[str, Any]) -> None:
        options = params.get("OPTIONS", {})
        self._settings, pickles = checked(location, options)  # before Django looks into them
        super().__init__(params)
        self._values = Values(self._settings.job_id, pickles=pickles)
        if "MAX_ENTRIES" in options and options["MAX_ENTRIES"] is None:
            self._max_entries = maxsize

    # -- Django's verbs ------------------------------------------------------------------------------------------

    def get(self, key: str, default: Any = None, version: int | None = None) -> Any:
        """Return the value of a key, or `default`."""
        return self._do(self._get, key, default, version)

    async def aget(self, key: str, default: Any = None, version: int | None = None) -> Any:
        """Do what `get` does, without blocking the event loop; so do all the verbs with an `a` before their name."""
        return await self._ado(self._get, key, default, version)

    def set(self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> None:
        """Write a value. One that is larger than `MAX_BYTES` is not there then, nor what was there before."""
        self._do(self._set_many, {key: value}, timeout, version)

    async def aset(self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> None:
        """See `set`."""
        await self._ado(self._set_many, {key: value}, timeout, version)

    def add(self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """Write a value if there is none, and return whether it was written."""
        return self._do(self._add, key, value, timeout, version)

    async def aadd(self, key: str, value: Any, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """See `add`."""
        return await self._ado(self._add, key, value, timeout, version)

    def touch(self, key: str, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """Give an entry another end, counted from now, and return whether there was one."""
        return self._do(self._touch, key, timeout, version)

    async def atouch(self, key: str, timeout: Any = DEFAULT_TIMEOUT, version: int | None = None) -> bool:
        """See `touch`."""
        return await self._ado(self._touch, key, timeout, version)

    def delete(self, key: str, version: int | None = None) -> bool:
        """Remove an entry, and return whether there was one."""
        return self._do(self._delete, key, version)

    async def adelete(self, key: str, version: int | None = None) -> bool:
        """See `delete`."""
        return await self._ado(self._delete, key, version)

    def get_many(self, keys: Iterable[str], version: int | None = None) -> dict[str, Any]:
        """Return the values of those keys that have one, of one moment."""
        return self._do(self._get_many, list(keys), version)

    async def aget_many(self, keys: Iterable[str], version: int | None = None) -> dict[str, Any]:
        """See `get_many`."""
        return await self._ado(self._get_many, list(keys), version)

    def set_many(
        self, data: Mapping[str, Any], timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> list[str]:
        """Write values, all at once; return the keys of those that are larger than `MAX_BYTES`."""
        return self._do(self._set_many, data, timeout, version)

    async def aset_many(
        self, data: Mapping[str, Any], timeout: Any = DEFAULT_TIMEOUT, version: int | None = None
    ) -> list[str]:
        """See `set_many`."""
        return await self._ado(self._set_many, data, timeout, version)

    def delete_many(self, keys: Iterable[str], version: int | None = None) -> None:
        """Remove entries, all at once."""
        self._do(self._delete_many, list(keys), version)

    async def adelete_many(self, keys: Iterable[str], version: int | None = None) -> None:
        """See `delete_many`."""
        await self._ado(self._delete_many, list(keys), version)

    def has_key(self, key: str, version: int | None = None) -> bool:
        """Return whether there is a value that `get` could return; its pickle isn't loaded."""
        return self._do(self._has_key, key, version)

    async def ahas_key(self, key: str, version: int | None = None) -> bool:
        """See `has_key`."""
        return await self._ado(self._has_key, key, version)

    def incr(self, key: str, delta: Any = 1, version: int | None = None) -> Any:
        """Add to a value, whose end stays, and return the sum. Raises `ValueError` if there is none.

        A sum that is larger than `MAX_BYTES` is returned, and isn't there then, as with `set`.
        """
        return self._do(self._incr, key, delta, version)

    async def aincr(self, key: str, delta: Any = 1, version: int | None = None) -> Any:
        """See `incr`."""
        return await self._ado(self._incr, key, delta, version)

    def incr_version(self, key: str, delta: int = 1, version: int | None = None) -> int:
        """Move a value to another version and return that. Raises `ValueError` if there is none."""
        return self._do(self._incr_version, key, delta, version)

    async def aincr_version(self, key: str, delta: int = 1, version: int | None = None) -> int:
        """See `incr_version`."""
        return await self._ado(self._incr_version, key, delta, version)

    def clear(self) -> None:
        """Remove every entry of the job, whatever its prefix and version."""
        self._do(self._clear)

    async def aclear(self) -> None:
        """See `clear`."""
        await self._ado(self._clear)

    async def aclose(self, **kwargs: Any) -> None:
        """Do nothing, as `close` does, and without a thread to do nothing in."""

    # -- what they do --------------------------------------------------------------------------------------------

    def _get(self, place: Place, key: str, default: Any, version: int | None) -> Steps[Any]:
        name = self.make_and_validate_key(key, version)
        payload = yield from reading(place.get, rows.row_key(name))
        if payload is None:
            return default
        values = yield from self._values_of(place, {name: payload})
        return values.get(name, default)

    def _get_many(self, place: Place, keys: list[str], version: int | None) -> Steps[dict[str, Any]]:
        names = {key: self.make_and_validate_key(key, version) for key in keys}
        places = {name: rows.row_key(name) for name in names.values()}
        found: Mapping[Key, bytes] = (yield from reading(place.get_many, list(places.values()))) or {}
        payloads = {name: found[at] for name, at in places.items() if at in found}
        values = yield from self._values_of(place, payloads)
        return {key: values[name] for key, name in names.items() if name in values}

    def _has_key(self, place: Place, key: str, version: int | None) -> Steps[bool]:
        name = self.make_and_validate_key(key, version)
        payload = yield from reading(place.get, rows.row_key(name))
        return (yield from self._is_there(place, name, payload))

    def _set_many(self, place: Place, data: Mapping[str, Any], timeout: Any, version: int | None) -> Steps[list[str]]:
        names = {key: self.make_and_validate_key(key, version) for key in data}
        keys = {key: rows.row_key(name) for key, name in names.items()}
        encoded = yield from self._values.encode([(names[key], value) for key, value in data.items()])
        payloads: dict[Key, bytes] = dict(zip(keys.values(), encoded, strict=True))
        if not payloads:
            return []
        refused = yield place.run(rows.put, payloads, self._ttl(timeout), self._limits, place.census)
        for at in refused:
            self._tell_too_large(at, payloads[at])
        return [key for key in data if keys[key] in refused] if refused else []

    def _add(self, place: Place, key: str, value: Any, timeout: Any, version: int | None) -> Steps[bool]:
        name = self.make_and_validate_key(key, version)
        (payload,) = yield from self._values.encode([(name, value)])
        at, ttl = rows.row_key(name), self._ttl(timeout)
        while True:
            found = yield place.run(rows.add, at, payload, ttl, self._limits, place.census)
            if isinstance(found, bool):
                if not found:
                    self._tell_too_large(at, payload)
                return found
            if (yield from self._is_there(place, name, found)):
                return False

    def _touch(self, place: Place, key: str, timeout: Any, version: int | None) -> Steps[bool]:
        name = self.make_and_validate_key(key, version)
        touched = yield place.run(rows.touch, rows.row_key(name), self._ttl(timeout))
        return (yield from self._is_there(place, name, touched))

    def _delete(self, place: Place, key: str, version: int | None) -> Steps[bool]:
        name = self.make_and_validate_key(key, version)
        deleted = yield place.run(rows.delete, rows.row_key(name))
        return (yield from self._is_there(place, name, deleted))

    def _delete_many(self, place: Place, keys: list[str], version: int | None) -> Steps[None]:
        gone = [rows.row_key(self.make_and_validate_key(key, version)) for key in keys]
        if gone:
            yield place.run(rows.delete_many, gone)

    def _incr(self, place: Place, key: str, delta: Any, version: int | None) -> Steps[Any]:
        name = self.make_and_validate_key(key, version)
        at = rows.row_key(name)
        if type(delta) is int:
            found = yield place.run(rows.increment, at, delta, self._limits)
        else:
            found = yield place.run(rows.get, at)
        while isinstance(found, bytes):  # no integer: it is added to here, and written if it still is what it was
            values = yield from self._values_of(place, {name: found})
            if name not in values:
                found = None
                break
            total = values[name] + delta
            (payload,) = yield from self._values.encode([(name, total)])
            kept = yield place.run(rows.replace, at, found, payload, self._limits)
            if kept is not None:
                found = rows.Sum(total, kept)
                break
            found = yield place.run(rows.get, at)
        if found is None:
            raise ValueError(f"Key '{key}' not found")
        if not found.kept:
            (payload,) = yield from self._values.encode([(name, found.total)])
            self._tell_too_large(at, payload)
        return found.total

    def _incr_version(self, place: Place, key: str, delta: int, version: int | None) -> Steps[int]:
        version = self.version if version is None else version
        name, target = (self.make_and_validate_key(key, one) for one in (version, version + delta))
        source, at = rows.row_key(name), rows.row_key(target)
        moved = False
        while not moved:
            payload = yield place.run(rows.get, source)
            if payload is None:
                raise ValueError(f"Key '{key}' not found")
            moving = yield from self._values.move(name, payload, target)
            if isinstance(moving, Refused):
                self._drop(place, name, payload, moving)
                continue
            ttl = self._ttl(DEFAULT_TIMEOUT)
            moved = yield place.run(rows.move, source, payload, at, moving, ttl, self._limits, place.census)
        return int(version + delta)

    def _clear(self, place: Place) -> Steps[None]:
        yield place.run(rows.clear)

    # -- within --------------------------------------------------------------------------------------------------

    def _do(self, steps: Callable[[Place, *Ts], Steps[T]], *args: *Ts) -> T:
        for last in _TRIES:
            place = place_of(self._settings)
            try:
                place.open()
                return drive(steps(place, *args))
            except (Stale, Poisoned, Closed) as error:
                self._forget(place, error, last=last)
        raise AssertionError  # the last time it is raised

    async def _ado(self, steps: Callable[[Place, *Ts], Steps[T]], *args: *Ts) -> T:
        for last in _TRIES:
            place = place_of(self._settings)
            try:
                await place.aopen()
                return await adrive(steps(place, *args))
            except (Stale, Poisoned, Closed) as error:
                self._forget(place, error, last=last)
        raise AssertionError  # the last time it is raised

    def _forget(self, place: Place, error: BaseException, *, last: bool) -> None:
        """Have what is broken opened anew; raise what it was, if there is no other try."""
        place.forget()
        if not isinstance(error, Stale):
            raise error  # a write: nobody knows whether it was done
        if last:
            raise error.__cause__ or error

    def _values_of(self, place: Place, payloads: dict[str, bytes]) -> Steps[dict[str, Any]]:
        """Return what payloads hold, without those that were refused."""
        values = dict(zip(payloads, (yield from self._values.decode(list(payloads.items()))), strict=True))
        for name, refused in values.items():
            if isinstance(refused, Refused):
                self._drop(place, name, payloads[name], refused)
        return {name: value for name, value in values.items() if not isinstance(value, Refused)}

    def _is_there(self, place: Place, name: str, payload: bytes | None) -> Steps[bool]:
        """Return whether there is an entry, which has this payload then, as far as `has_key` knows."""
        if payload is None:
            return False
        refused = yield from self._values.check(name, payload)
        if refused is not None:
            self._drop(place, name, payload, refused)
        return refused is None

    def _drop(self, place: Place, name: str, payload: bytes, refused: Refused) -> None:
        """Have what can't be read removed, if nobody writes over it meanwhile. Nobody waits for that: it is a miss."""
        self._tell_refused(name, f"is a miss: {refused}", refused.__cause__)
        at = rows.row_key(name)
        if at in place.dropping:
            return  # many may read it while another process has the job
        place.dropping.add(at)
        try:
            place.run(rows.drop, at, payload).add_done_callback(partial(self._look_if_dropped, place, name))
        except PersistencyError as error:
            self._tell_not_dropped(place, name, error)

    def _look_if_dropped(self, place: Place, name: str, dropped: Future[bool]) -> None:
        error = dropped.exception()
        if error is None:
            place.dropping.discard(rows.row_key(name))
        else:
            self._tell_not_dropped(place, name, error)

    def _tell_not_dropped(self, place: Place, name: str, error: BaseException) -> None:
        place.dropping.discard(rows.row_key(name))
        self._tell_refused(name, f"couldn't be removed: {error}", error)

    def _tell_refused(self, name: str, what: str, error: BaseException | None) -> None:
        log.warning(
            "job %r: the value of %.200r %s",
            self._settings.job_id,
            name,
            what,
            extra=about("cache_value_refused", self._settings.job_id, error),
        )

    def _tell_too_large(self, at: Key, payload: bytes) -> None:
        log.warning(
            "job %r: the value of %.200r isn't cached: it has %d bytes, and MAX_BYTES is %d",
            self._settings.job_id,
            at,
            len(payload),
            self._settings.max_bytes,
            extra=about("cache_value_too_large", self._settings.job_id, bytes=len(payload)),
        )

    @property
    def _limits(self) -> rows.Limits:
        return rows.Limits(self._max_entries, self._cull_frequency, self._settings.max_bytes)

    def _ttl(self, timeout: Any) -> float | None:
        """Return a timeout as the rows want it: `None` is for ever, 0 over already."""
        seconds: Any = self.default_timeout if timeout == DEFAULT_TIMEOUT else timeout
        if seconds is None or seconds > _TIMEOUT_MAX:
            return None
        return float(max(0, seconds))
